"""Tests of sgo_sae.py and eval_sae.py against independent truth; no network.

    python -m pytest              all of them; -n auto on all cores
    python -m pytest -k scr       those whose names have a word

The test of a line stands in the section of the same name as the line's:

    helpers             planted data, models, runs, stand-ins that several sections use

    method, fast, activations, training, baselines, processes, texts, language model, files, demo,
    main                those of sgo_sae.py

    figures, core, behaviour, competition, model, tasks, probe, scr, absorption, autoencoders,
    table, page, evaluation, results
                        those of eval_sae.py

    refusals            command lines of both, and what they are told
    SAEBench's recorded outputs, other people's trainers
                        the same inputs measured by it; training with the penalty in three of them
    what stands in for a GPU, where there is a GPU
                        a pretended GPU, and what is skipped without one
    study               the scripts of the folder study
"""

import argparse
import dataclasses
import gzip
import html
import html.parser
import http.server
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import combinations, count, islice, product
from pathlib import Path
from typing import NamedTuple

# As main() sets them, but earlier.
os.environ.update(TRANSFORMERS_VERBOSITY="critical", HF_HUB_VERBOSITY="critical")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
# The arrays of the tests are small, so that threads would mostly wait for each other.
if __name__ != "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pandas
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import eval_sae
import sgo_sae
from sgo_sae import (
    ARCHITECTURES,
    SAE,
    InputError,
    coactivation_weights,
    loss_terms,
    orthogonality,
    sgo_penalty,
    sgo_penalty_dense,
    topk_loss_terms,
    total_loss,
    update,
)
from study import benchmark, planted, tasks

# What starts the tests may ignore signals, as nohup does SIGHUP.
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

HERE = Path(__file__).parent
SCRIPT = HERE / "sgo_sae.py"
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()


# ------------------------------------------------------------------------------------------ helpers


TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps near a stone by the river . "
CUDA = torch.device("cuda", 0)
SHAPES = [(7, 5, 1), (16, 12, 12), (40, 30, 6), (1, 9, 3), (33, 64, 2), (64, 100, 8), (3, 200, 200)]
WAYS = ["tiles", "pairs", "blocks"]
ARCHS = ("topk", "batchtopk", "relu", "jumprelu")


with warnings.catch_warnings():  # one file, so nowhere to register a mark
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow


LONG = {"tokens": 64 * 400, "save_every": 7}  # the data is used more than twice


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Each test starts with the same random numbers, and sees no GPU unless it asks for it."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def python(*argv, **environment):
    """What a process of Python with these arguments came to."""
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env=env | {"PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""} | environment,
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def contexts_noted():
    """A list of the contexts that a language model reads within, as its embedding gets them: a
    tensor ids_BL for each pass."""
    passes = []

    def note(module, args):
        if isinstance(module, torch.nn.Embedding):
            passes.append(args[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


def metrics_of(folder):
    """The lines of metrics.jsonl, without what depends on the machine."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "peak_memory_gb"):
            row.pop(name, None)
    return rows


def sparse_latents(B, N, K, dtype=torch.float64):
    """Top-k latents with ties, inactive slots, all-zero rows and, for large N, latents that never
    fire.
    """
    generator = torch.Generator().manual_seed(0)
    pre_BN = torch.randn(B, N, generator=generator, dtype=dtype)
    pre_BN -= 2 * torch.linspace(0, 1, N, dtype=dtype)
    pre_BN = (pre_BN * 4).round() / 4
    pre_BN[:: max(2, B // 3)] = -1
    vals_BK, idx_BK = pre_BN.topk(K, dim=1)
    return vals_BK.relu(), idx_BK


def dense(vals_BK, idx_BK, N):
    return vals_BK.new_zeros(len(vals_BK), N).scatter(1, idx_BK, vals_BK)


def definition(f_BN):
    """Ω, w and ∂Ω/∂f from Eq. 2 and 3, w with Python sets."""
    f_BN = f_BN.double()
    B, N = f_BN.shape
    M = [set(f_BN[:, i].nonzero()[:, 0].tolist()) for i in range(N)]
    w_NN = torch.zeros(N, N, dtype=torch.float64)
    for i, j in product(range(N), repeat=2):
        if M[i] and M[j]:
            w_NN[i, j] = len(M[i] & M[j]) / min(len(M[i]), len(M[j]))
    gram_NN = f_BN.T @ f_BN / B
    off_NN = w_NN * gram_NN * (1 - torch.eye(N))
    return (off_NN * gram_NN).sum().item(), w_NN, 4 / B * f_BN @ off_NN


def uniform_definition(f_BN):
    """The same with w_ij = 1, pair by pair: Ω and ∂Ω/∂f."""
    f_BN = f_BN.double()
    B, N = f_BN.shape
    omega = 0.0
    gradient_BN = torch.zeros_like(f_BN)
    for i, j in product(range(N), repeat=2):
        if i != j:
            inner = f_BN[:, i].dot(f_BN[:, j]) / B
            omega += inner.item() ** 2
            gradient_BN[:, i] += 4 / B * inner * f_BN[:, j]  # of (i, j) and of (j, i)
    return omega, gradient_BN


def take(way, monkeypatch, **sizes):
    """Makes sgo_penalty compute its gradient in one way, whatever the sizes: by tiles, by sorted
    pairs, or by the blocks of pairs of a CPU.
    """
    pay = math.inf if way == "tiles" else 0
    monkeypatch.setattr(sgo_sae, "PAIRS_PAY", {"cpu": pay, "cuda": pay})
    if way == "pairs":
        monkeypatch.setattr(sgo_sae, "gradient_by_blocks", sgo_sae.gradient_by_pairs)
    elif sizes:
        name = f"gradient_by_{way}"
        monkeypatch.setattr(sgo_sae, name, partial(getattr(sgo_sae, name), **sizes))


def make_model(folder, bos=True, layers=4):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [TEXT], vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=64,
        )
    ).eval()
    with torch.no_grad():  # random layers that change their input visibly
        for p in lm.parameters():
            p.mul_(8)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm, tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(folder), *make_model(folder)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_rows(path, [{"text": f"{i} {TEXT * (i % 3 + 1)}"} for i in range(60)])
    return str(path)


def flags(model, dataset, folder, /, **other):
    settings = {
        "model": model,
        "dataset": dataset,
        "layer": 1,
        "dict": 64,
        "k": 4,
        "batch": 64,
        "tokens": 64 * 12,
        "ctx": 16,
        "buffer": 16,
        "lm_batch": 4,
        "log_every": 5,
        "out": folder,
        "device": "cpu",
    } | other
    argv = []
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return argv


@pytest.fixture
def train_argv(model, texts, tmp_path):
    """The command line of a small run, with settings of one's own."""
    return partial(flags, model[0], texts, tmp_path / "run")


def loaded(model, layer):
    """The language model up to a layer, and that layer."""
    lm, module, *_ = sgo_sae.load_lm(model[0], layer, CPU, torch.float32)
    return lm, module


def data_of(cfg):
    """The batches x_BD of a configuration, without the autoencoders."""
    reader = sgo_sae.load_lm(cfg.model, cfg.layer, CPU, torch.float32)
    return sgo_sae.batches(cfg, reader)


def random_sae(arch):
    """An autoencoder with biases and thresholds of all kinds, on 8 dimensions."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[arch](8, 32, 4)
    sae.b_dec.data.normal_()
    sae.b_enc.data.normal_()
    if arch == "batchtopk":
        sae.theta.uniform_(0.1, 2)
    elif arch == "jumprelu":
        sae.theta_raw.data.uniform_(-0.2, 0.07)
    return sae, torch.randn(100, 8)


def write_foreign(folder, weights, **cfg):
    """A folder of SAELens's format, with what its own trainer writes and we do not."""
    metadata = {
        "model_name": "some/model",
        "hook_name": "blocks.3.hook_resid_post",
        "model_from_pretrained_kwargs": {},
    }
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps({"metadata": metadata, "d_in": 8, "d_sae": 32} | cfg)
    )


def foreign_weights():
    torch.manual_seed(0)
    shapes = {"W_enc": (8, 32), "b_enc": (32,), "W_dec": (32, 8), "b_dec": (8,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}, torch.randn(100, 8)


def train_by_saelens(sae_cfg, model, texts, folder, sae=None, **settings):
    """SAELens's own runner trains its autoencoder, or `sae`, on a local model, whose layer it reads
    by a hook on the module.
    """
    import datasets
    import sae_lens

    cfg = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_cfg,
        model_name=model[0],
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.1",
        dataset_path="local",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=16,
        train_batch_size_tokens=256,
        n_batches_in_buffer=32,
        store_batch_size_prompts=4,
        device="cpu",
        output_path=str(folder),
        checkpoint_path=None,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        **settings,
    )
    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    rows = datasets.Dataset.from_list(rows)
    sae_lens.LanguageModelSAETrainingRunner(cfg, override_dataset=rows, override_sae=sae).run()


def weights_of(folder):
    return (Path(folder) / "sae_weights.safetensors").read_bytes()


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0, and is computed on the CPU."""


class PretendedGPU(TorchFunctionMode):
    """Makes tensors for cuda OnGPU, refuses operands on two devices as CUDA does, and counts what
    waits for the GPU.
    """

    waits = ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "nonzero", "cpu")

    def __init__(self):
        self.syncs = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__
        on_gpu = len(args) > 0 and isinstance(args[0], OnGPU)
        properties = {
            torch.Tensor.device: CUDA,
            torch.Tensor.is_cpu: False,
            torch.Tensor.is_cuda: True,
        }
        if on_gpu and name == "__get__" and func.__self__ in properties:
            return properties[func.__self__]
        if on_gpu and name in self.waits:
            self.syncs.append(name)
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        gpu = any(isinstance(a, OnGPU) for a in tensors)
        if name in ("to", "cpu"):
            wanted = [
                a for a in (*args[1:], *kwargs.values()) if isinstance(a, (torch.device, str))
            ]
            if wanted or name == "cpu":
                gpu = bool(wanted) and torch.device(wanted[0]).type == "cuda"
            args = ["cpu" if isinstance(a, (torch.device, str)) else a for a in args]
            kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        elif kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
            gpu = True
        crosses = name in ("to", "cpu", "copy_", "__getitem__", "__setitem__", "__set__")
        if gpu and not crosses and any(not isinstance(a, OnGPU) and a.dim() > 0 for a in tensors):
            raise RuntimeError(f"{name}: operands on cuda:0 and on the CPU")
        with torch._C.DisableTorchFunctionSubclass():
            if kwargs.pop("out_dtype", None):  # which only CUDA has
                args = [a.float() for a in args]
            result = func(*args, **kwargs)
        kind, other = (OnGPU, torch.Tensor) if gpu else (torch.Tensor, OnGPU)
        return tree_map(lambda a: a.as_subclass(kind) if type(a) is other else a, result)


def moved(module, *args, **kwargs):
    """nn.Module.to, which makes parameters and buffers OnGPU."""
    if any(torch.device(a).type == "cuda" for a in args if isinstance(a, (str, torch.device))):
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = torch.nn.Parameter(
                        p.detach().as_subclass(OnGPU), p.requires_grad
                    )
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.as_subclass(OnGPU)
    return module


@pytest.fixture
def patch_gpu(monkeypatch):
    """A context manager within which there is a pretended GPU."""

    @contextmanager
    def pretending():
        real = torch.autocast
        with monkeypatch.context() as patch:
            patch.setattr(torch, "autocast", lambda device, *a, **k: real("cpu", *a, **k))
            patch.setattr(torch.nn.Module, "to", moved)
            with PretendedGPU() as mode:
                yield mode

    return pretending


def last_of_each(argv):
    """A command line in which the last values of a flag are its values, so that tests can change
    some: a list's are added up."""
    values = {"": []}
    flag = ""
    for part in map(str, argv):
        if part.startswith("--"):
            flag = part
            values[flag] = [part]
        else:
            values[flag].append(part)
    return [part for parts in values.values() for part in parts]


def trained(argv):
    return sgo_sae.main(last_of_each(argv))


def evaluated(argv):
    argv = last_of_each(argv)
    return sgo_sae.main(argv, eval_sae.work, "eval_sae.py", eval_sae.MEMORY_ADVICE)


class Result(NamedTuple):
    """What a command line came to: the exit code, what it printed, and the eval.json of its RUN."""

    code: int
    out: str
    err: str
    stored: dict

    @property
    def last(self):
        """The last line of the errors."""
        return self.err.splitlines()[-1]

    @property
    def refusal(self):
        """The one line with which it is refused."""
        assert self.code == 2
        (line,) = self.err.splitlines()
        assert ": error: " in line
        return line

    def row(self, label):
        """The cells of a row of the printed table."""
        rows = [row for row in cells_in(self.out) if row[0] == label]
        assert len(rows) == 1, self.out
        return rows[0][1:]


@pytest.fixture
def result(capsys):
    """The Result of a command line: one of eval_sae.py, where it begins with a RUN."""

    def run(argv):
        capsys.readouterr()
        stored = {}
        if str(argv[0]).startswith("--"):
            code = trained(argv)
        else:
            code = evaluated(argv)
            file = Path(argv[0], "eval.json")
            if file.exists():
                stored = json.loads(file.read_text())
        out, err = capsys.readouterr()
        return Result(code, out, err, stored)

    return run


def before_call(n, function, act):
    """A function that acts before its n-th call."""
    calls = count(1)

    def called(*args, **options):
        if next(calls) == n:
            act()
        return function(*args, **options)

    return called


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal during a step of the next run."""
    send = partial(os.kill, os.getpid(), number)
    # A plain function, so that it is a method of the class.
    stepping = before_call(step, sgo_sae.Run.step, send)
    monkeypatch.setattr(sgo_sae.Run, "step", stepping)


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert trained(flags(model[0], texts, out, **LONG)) == 0
    return out


def tiny(kind):
    """A small model of another family, of four layers, or more where the number must be larger."""
    import transformers as t

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "max_position_embeddings": 40,
        **ends,
    }
    grouped = {**sizes, "num_key_value_heads": 1, "head_dim": 16}
    attends = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    if kind == "minicpm3":  # scales its branches by the number of layers
        lora = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        return t.MiniCPM3ForCausalLM(
            t.MiniCPM3Config(v_head_dim=8, num_key_value_heads=2, **lora, **sizes)
        )
    if kind == "gemma4":  # later layers share keys and values; one tensor is as long as all layers
        own = {"num_hidden_layers": 12, "num_kv_shared_layers": 5, "layer_types": attends}
        own |= {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "sliding_window": 4,
        }
        return t.Gemma4ForCausalLM(t.Gemma4TextConfig(global_head_dim=16, **grouped | own))
    if kind == "esm":  # a head over the attention of all layers
        return t.EsmForMaskedLM(
            t.EsmConfig(mask_token_id=3, position_embedding_type="rotary", **sizes)
        )
    if kind == "nemotron_h":  # the number of layers is the length of a list
        own = {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "n_groups": 1}
        own |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
        grouped.pop("num_hidden_layers")
        return t.NemotronHForCausalLM(t.NemotronHConfig(**grouped, **own))
    if kind == "gpt1":  # a layer's output is a list
        own = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 40, "vocab_size": 300}
        return t.OpenAIGPTLMHeadModel(t.OpenAIGPTConfig(**own))
    if kind == "ettin":  # what it calls its decoder is its head
        return t.ModernBertDecoderForCausalLM(
            t.ModernBertDecoderConfig(cls_token_id=1, sep_token_id=2, **sizes)
        )
    if kind == "opt":  # a table of positions
        return t.OPTForCausalLM(t.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes))
    if kind == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**grouped))
    if kind == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=4, num_heads=2)
        )
    if kind == "albert":  # one layer, used four times
        return t.AlbertForMaskedLM(t.AlbertConfig(embedding_size=16, **sizes))
    if kind == "xlm":  # its layers are rows of several lists
        return t.XLMWithLMHeadModel(t.XLMConfig(vocab_size=300, emb_dim=32, n_layers=4, n_heads=2))
    return t.RobertaForMaskedLM(t.RobertaConfig(**sizes))  # its first position is never used


def saved(kind, model, folder):
    torch.manual_seed(0)
    lm = tiny(kind).eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)  # layers that change their input visibly
    lm.save_pretrained(folder)
    model[2].save_pretrained(folder)
    return lm


def skewed_latents(B=2048, N=300, K=12, dtype=torch.float32):
    """Latents of unequal rates without ties; many are never active."""
    pre_BN = torch.randn(B, N, dtype=dtype) - 3 * torch.linspace(0, 1, N, dtype=dtype)
    vals_BK, idx_BK = pre_BN.topk(K, dim=1)
    return vals_BK.relu(), idx_BK


def fast_definition(f_BN):
    """`definition` by matrices, in float64."""
    f_BN = f_BN.double()
    omega = orthogonality(f_BN).item()
    w_NN = coactivation_weights(f_BN).fill_diagonal_(0)
    return omega, w_NN, 4 / len(f_BN) * f_BN @ (w_NN * (f_BN.T @ f_BN / len(f_BN)))


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def planted_sae(W_dec_ND):
    """An autoencoder with a given dictionary, whose encoder reads each direction's coefficient."""
    N, D = W_dec_ND.shape
    sae = SAE(D, N, N)
    sae.W_dec.data = W_dec_ND.clone()
    sae.W_enc.data = W_dec_ND.T.clone()
    return sae


def independent_latents(T, N):
    """Latents that fire independently at log-normal rates, of mean 1 in 80."""
    generator = torch.Generator().manual_seed(0)
    rate_N = (torch.randn(N, generator=generator) * 1.5).exp()
    rate_N = (rate_N / rate_N.mean() / 80).clamp(max=0.9)
    return (torch.rand(T, N, generator=generator) < rate_N).float()


def frame_of(cells):
    """A frame of numbered texts, a label and an attribute for each cell, and how many texts."""
    rows = []
    for is_test in (False, True):
        for (label, attribute), size in cells.items():
            for n in range(size):
                rows.append((f"{label} {attribute} {is_test} {n}", label, attribute, is_test))
    frame = pandas.DataFrame(rows, columns=["text", "label", "attribute", "is_test"])
    return frame.sample(frac=1, random_state=0).sort_values("text", key=lambda t: t.str[-5:])


def sizes_of(chosen, is_test):
    """How many of the chosen texts each combination of label and attribute has."""
    part = chosen[chosen["is_test"] == is_test]
    return part.groupby(["label", "attribute"]).size().tolist()


def fit(adam, loss_of, batches):
    for rows in batches:
        adam.zero_grad()
        loss_of(rows).backward()
        adam.step()


@pytest.fixture(scope="session")
def reader(model):
    return eval_sae.LanguageModel(model[0], 1, CPU, torch.float32)


def gemma_scope(folder, seed=0):
    """Writes a params.npz of 32 latents of 16 dimensions; returns its weights."""
    import numpy

    torch.manual_seed(seed)
    shapes = {"W_enc": (16, 32), "b_enc": (32,), "W_dec": (32, 16), "b_dec": (16,)}
    arrays = {name: torch.randn(shape).numpy() for name, shape in shapes.items()}
    arrays["threshold"] = torch.rand(32).numpy()
    folder.mkdir(parents=True)
    numpy.savez(folder / "params.npz", **arrays)
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


@pytest.fixture(scope="session")
def run(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert trained(flags(model[0], texts, folder / f"s{seed}", seed=seed)) == 0
    return folder


def copy_of(run, folder, **metadata):
    """A folder with the autoencoder of a run, as another trainer would have written it."""
    shutil.copytree(run / "s0", folder, ignore=shutil.ignore_patterns("eval.json", ".eval.lock"))
    config = json.loads((folder / "cfg.json").read_text())
    for name in ("settings", "activation_scale", "dataset_path"):
        config["metadata"].pop(name)
    config["metadata"].update(metadata)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def probe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "words.csv"
    lines = ["text,label,attribute"]
    for i in range(400):
        for word in ("fox", "dog"):
            lines += [f"{word} {i} {how},{word},{how}" for how in ("warm", "lazy")]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def planted_words(sae):
    """Words of random activations, twenty of each letter."""
    D = len(sae.b_dec)
    letter_T = torch.arange(520) % 26
    x_TD = torch.randn(520, D) + F.one_hot(letter_T % D, D)
    new_x_PD = torch.randn(104, D)
    return eval_sae.Words(x_TD, letter_T, 416, new_x_PD, letter_T[416:], torch.randn(26, D))


class Speller:
    """A language model whose activations at words are known, and autoencoders of them.

    It has 40 words for each letter. An activation is 3 in the letter's dimension, and noise in
    others; that of every eighth word has 2 in dimension 30, too. W, X, Y and Z have one dimension,
    so that they can't be told. All of it is times the square root of the width, as Gemma has it.
    """

    n_spelled = 22
    width = 48

    def __init__(self, folder):
        from tokenizers import Tokenizer, models
        from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

        self.folder = folder
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        fixed = ["<unk>", "<bos>", "<eos>", "some text", "\n", ":", " has the first letter:"]
        vocab = [*fixed, *(f" {letter}" for letter in letters)]
        first_word = len(vocab)
        for letter, one, two in product(letters.lower(), letters.lower()[:8], "abcde"):
            vocab.append(f" {letter}{one}{two}")
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>")
        )
        # Each piece of the prompts is a token of its own.
        from tokenizers import Regex, pre_tokenizers

        pattern = Regex("some text|\n|:(?= )| has the first letter:| [A-Z]| [a-z]+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        config = Gemma2Config(
            vocab_size=len(vocab),
            hidden_size=self.width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=256,
        )
        torch.manual_seed(0)
        lm = Gemma2ForCausalLM(config)
        with torch.no_grad():
            for layer in lm.model.layers:  # which add next to nothing to the embedding
                layer.post_attention_layernorm.weight.fill_(0.02 - 1)
                layer.post_feedforward_layernorm.weight.fill_(0 - 1)
            E = lm.model.embed_tokens.weight
            E.zero_()
            E[:, 31:].normal_(0, 0.02)
            for i, word in enumerate(vocab[len(fixed) :], len(fixed)):
                letter = letters.index(word[1].upper())
                E[i, min(letter, self.n_spelled)] = 3
                if i >= first_word and i % 8 == 0:
                    E[i, 30] = 2
        lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def sae(self, folder, kind):
        """A folder with an autoencoder: a latent for each letter, and, where it is absorbing, one
        for five letters each, which takes over on words with dimension 30.

        The other latents are never active. There are many of them, so that the weights with which
        the letters' L1 probe starts are small.
        """
        N = 2000
        W_enc_DN = torch.zeros(self.width, N)
        W_dec_ND = torch.randn(N, self.width)
        W_dec_ND[:26] = torch.eye(self.width)[:26]
        # A probe of a letter is against all others. So is what takes over for some.
        W_dec_ND[26:39] = -0.5 * (torch.arange(self.width) < self.n_spelled)
        b_enc_N = torch.zeros(N)
        for letter in range(26):
            W_enc_DN[letter, letter] = 1
            group = 26 + letter // 5
            W_dec_ND[group, letter] = 1
            if kind == "absorbing":
                W_enc_DN[30, letter] = -5
                W_enc_DN[letter, group] = 4
        if kind == "absorbing":
            W_enc_DN[30, 26:39] = 20
            # 4 · 3 + 20 · 2 is over it; 20 · 2 and 4 · 3 are not.
            b_enc_N[26:39] = -42 * self.width**0.5
        sae = SAE(self.width, N, 3)
        sae.W_enc.data = W_enc_DN
        sae.W_dec.data = F.normalize(W_dec_ND, dim=1)
        sae.b_enc.data = b_enc_N
        cfg = sgo_sae.Config(model=str(self.folder), layer=0, d_sae=N, k=3, ctx=64)
        sgo_sae.save_sae(sae, cfg, folder)
        return folder


@pytest.fixture(scope="session")
def speller(tmp_path_factory):
    return Speller(tmp_path_factory.mktemp("speller") / "lm")


def record_of(parts, notes=(), is_whole=True, settings=None):
    found = eval_sae.Found([], {}, list(notes), is_whole)
    return eval_sae.record_of(found, parts, settings or {})


class Measured:
    """As much of a Subject as a table needs: figures of one family, part by part."""

    def __init__(self, path, settings, seed, parts, family="core"):
        self.path = path
        self.settings = settings
        self.seed = seed
        parts = [eval_sae.Part(*part) for part in parts]
        self.records = {family: record_of(parts)}


def measured(values, family="core", figure="mse"):
    """Subjects with the values of a figure, or with dicts of figures, by (α, seed), or by (α, seed,
    sample), where a sample is a number, or the name of a task.
    """
    parts = {}
    for (alpha, seed, *sample), value in values.items():
        figures = value if isinstance(value, dict) else {figure: value}
        task, number = ("text", *sample, 0)[:2]
        if isinstance(number, str):
            task, number = number, 0
        parts.setdefault((alpha, seed), []).append((task, number, figures))
    subjects = []
    for (alpha, seed), own in parts.items():
        settings = {"arch": "topk", "alpha": alpha}
        subjects.append(Measured(f"{alpha}-{seed}", settings, seed, own, family))
    return subjects


def cells_in(text):
    lines = text.splitlines()
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ]


def table_of(subjects, families=("core",), **options):
    eval_sae.name_subjects(subjects)
    return eval_sae.table(subjects, families, **options)


def small_library(monkeypatch, folder, files):
    """Makes Python's standard library a folder of these files, a name and a text each."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr("pydoc_data.topics.topics", {})


ODD_FILES = {
    "empty.jsonl": b"",
    "empty.txt": b"",
    "broken.jsonl": b'{"text": "a',
    "broken.jsonl.gz": b"this is not gzip",
    "broken.parquet": b"PAR1 but not really",
    "blank.jsonl": b'{"text": ""}\n{"text": null}\n',
    "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
    "chats.jsonl": b'{"text": [{"role": "user"}]}\n',
    "lines.json": b'[{"text": "a"},\n{"text": "b"}]',
    "two.jsonl.zip": b"PK",
    "picture.png": b"\x89PNG",
    "lists.jsonl": b'{"text": "a", "label": ["b"]}\n',
}


# What is done to the two files of an autoencoder, with the word that tells it.
DAMAGES = {
    ("half a cfg", "can't be loaded"): lambda cfg, weights: cfg.write_bytes(cfg.read_bytes()[:100]),
    ("a list as cfg", "holds no settings"): lambda cfg, weights: cfg.write_text("[]"),
    ("no weights beside it", "sae_weights.safetensors"): lambda cfg, weights: weights.unlink(),
    ("a misspelled cfg", "known are"): lambda cfg, weights: cfg.write_text(
        '{"architecture": "topkk"}'
    ),
    ("k over N", "k is 65"): lambda cfg, weights: cfg.write_text(
        cfg.read_text().replace('"k": 4', '"k": 65')
    ),
    ("k in words", "k is '4'"): lambda cfg, weights: cfg.write_text(
        cfg.read_text().replace('"k": 4', '"k": "4"')
    ),
    ("half of the weights", "can't be loaded"): lambda cfg, weights: weights.write_bytes(
        weights.read_bytes()[:300]
    ),
    ("noise as weights", "can't be loaded"): lambda cfg, weights: weights.write_bytes(
        b"\xff" * 500
    ),
    ("one tensor", "W_dec"): lambda cfg, weights: save_file(
        {"W_enc": torch.zeros(16, 64)}, weights
    ),
    ("a short tensor", "size mismatch for b_dec"): lambda cfg, weights: save_file(
        {**load_file(weights), "b_dec": torch.ones(3)}, weights
    ),
    ("a tensor too many", "W_skip"): lambda cfg, weights: save_file(
        {**load_file(weights), "W_skip": torch.ones(3)}, weights
    ),
}


# What cfg.json of an autoencoder may say, so that it can't be measured.
ODD_METADATA = {
    "without a layer": {"hook_name": None},
    "of an MLP": {"hook_name": "blocks.1.hook_mlp_out"},
    "changed": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
}


@pytest.fixture(scope="session")
def odd(model, run, tmp_path_factory):
    """A folder of what is refused, by name: texts, language models and autoencoders."""
    folder = tmp_path_factory.mktemp("odd")
    for name, content in ODD_FILES.items():
        (folder / name).write_bytes(content)
    pandas.DataFrame({"count": range(9)}).to_parquet(folder / "numbers.parquet")
    for kind in ("t5", "albert", "xlm", "roberta"):
        saved(kind, model, folder / kind)
    make_model(folder / "one layer", layers=1)
    shutil.copy(Path(model[0], "config.json"), folder / "one layer")
    parts = {
        "no files": [],
        "no tokenizer": ["config.json", "model.safetensors"],
        "no weights": ["config.json", "tokenizer.json", "tokenizer_config.json"],
    }
    for name, files in parts.items():
        (folder / name).mkdir()
        for file in files:
            shutil.copy(Path(model[0], file), folder / name)
    for (name, _), change in DAMAGES.items():
        copy_of(run, folder / name)
        change(folder / name / "cfg.json", folder / name / "sae_weights.safetensors")
    for name, metadata in ODD_METADATA.items():
        copy_of(run, folder / name, **metadata)
    copy_of(run, folder / "normalized")
    cfg = json.loads((folder / "normalized" / "cfg.json").read_text())
    cfg["normalize_activations"] = "layer_norm"
    (folder / "normalized" / "cfg.json").write_text(json.dumps(cfg))
    (folder / "under way").mkdir()
    (folder / "under way" / "metrics.jsonl").write_text("")
    cfg = sgo_sae.Config(model=str(folder / "roberta"), layer=1, k=4, ctx=16)
    sgo_sae.save_sae(SAE(32, 64, 4), cfg, folder / "not causal")
    return folder


# ------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("B, N, K", SHAPES[:5])
def test_orthogonality_is_the_definition(B, N, K):
    f_BN = dense(*sparse_latents(B, N, K), N)
    omega, w_NN, _ = definition(f_BN)
    assert torch.allclose(coactivation_weights(f_BN), w_NN, atol=1e-12, rtol=0)
    assert math.isclose(orthogonality(f_BN).item(), omega, rel_tol=1e-12, abs_tol=1e-15)


def test_weights_of_a_case_worked_by_hand():
    f_BN = torch.tensor([[1.0, 2, 0, 0], [3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 2, 0]])
    expected = [
        [1, 1, 0.5, 0],
        [1, 1, 0, 0],
        [0.5, 0, 1, 0],
        [0, 0, 0, 0],
    ]  # fourth latent never fires
    assert coactivation_weights(f_BN).tolist() == expected
    # ⟨f0,f1⟩ = (2 + 1)/4, ⟨f0,f2⟩ = 3/4, each pair counted in both orders
    assert orthogonality(f_BN).item() == pytest.approx(2 * (1 * 0.75**2 + 0.5 * 0.75**2))


def plain_topk(sae, x_BD):
    """Dense top-k latents, written independently: everything under the k-th largest pre-activation
    is 0.
    """
    pre_BN = ((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    return torch.where(
        pre_BN >= pre_BN.sort(dim=1, descending=True).values[:, sae.k - 1 : sae.k], pre_BN, 0
    )


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_sae_and_its_gradients_match_a_dense_one(bias):
    """Also where a token has fewer active latents than k."""
    sae = SAE(6, 20, 4).double()
    for p in sae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    sae.b_enc.data += bias
    x_BD = torch.randn(50, 6, dtype=torch.float64)
    f_BN = plain_topk(sae, x_BD)
    assert ((f_BN > 0).sum(1) < 4).any() == (bias < 0)
    assert torch.allclose(sae.encode(x_BD), f_BN, atol=1e-14)
    assert torch.allclose(sae(x_BD), f_BN @ sae.W_dec + sae.b_dec, atol=1e-12)
    inputs = list(sae.parameters())
    expected = (f_BN @ sae.W_dec + sae.b_dec - x_BD).square().sum(1).mean() + f_BN.sum(1).mean()
    expected = [expected, *torch.autograd.grad(expected, inputs)]
    for terms in (loss_terms(sae, x_BD), topk_loss_terms(sae, x_BD, sgo_penalty)):
        loss = total_loss(terms, 1.0, 0.0)
        found = [loss, *torch.autograd.grad(loss, inputs)]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
        assert torch.equal(terms.fired_N, (f_BN > 0).any(0))


def test_a_latent_that_is_selected_with_value_0_has_not_fired():
    sae = SAE(6, 20, 4)
    sae.b_enc.data.fill_(-100.0)
    sae.b_enc.data[7] = 100.0
    for terms in (loss_terms(sae, torch.randn(50, 6)), topk_loss_terms(sae, torch.randn(50, 6))):
        assert terms.fired_N.nonzero().tolist() == [[7]]


def test_schedules_at_their_corners():
    assert sgo_sae.alpha_at(0) == pytest.approx(0.01)
    assert sgo_sae.alpha_at(999) == pytest.approx(0.01 + 0.065 * 0.999)
    assert sgo_sae.alpha_at(1000) == sgo_sae.alpha_at(4881) == pytest.approx(0.075)
    assert sgo_sae.alpha_at(0, alpha=0) == sgo_sae.alpha_at(500, alpha=0) == 0
    assert (
        sgo_sae.alpha_at(0, alpha=0.004) == sgo_sae.alpha_at(500, alpha=0.004) == 0.004
    )  # it never falls
    assert sgo_sae.lr_at(0) == sgo_sae.lr_at(4270) == sgo_sae.lr_at(4271) == pytest.approx(3e-4)
    assert sgo_sae.lr_at(4272) == pytest.approx(3e-4 * 610 / 611)
    assert sgo_sae.lr_at(4881) == pytest.approx(3e-4 / 611)


def test_geometric_median_meets_its_optimality_condition():
    x_BD = torch.randn(501, 8, dtype=torch.float64).exp()
    median_D = sgo_sae.geometric_median(x_BD, iterations=1000)
    assert (
        F.normalize(x_BD - median_D, dim=1).sum(0).norm() < 1e-6
    )  # the unit vectors to the points cancel
    assert torch.equal(
        sgo_sae.geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(), torch.zeros(1)
    )


def adam_of(sae, lr=1e-3):
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))


def step_of(sae, adam, x_BD, alpha, lr, lam=0.04, penalty=sgo_penalty):
    """One step as a CPU takes it; its loss."""
    loss = total_loss(topk_loss_terms(sae, x_BD, penalty), lam, alpha)
    assert 0 < update(sae, adam, loss, lr) < math.inf
    return loss.item()


def test_alpha_zero_is_a_separate_plain_topk_step():
    x_BD = torch.randn(256, 16) * 3
    sae = SAE(16, 64, 4)
    plain = SAE(16, 64, 4)
    plain.load_state_dict(sae.state_dict())
    ours = adam_of(sae, 1e-3)
    theirs = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in range(10):
        step_of(sae, ours, x_BD, 0.0, 1e-3)
        f_BN = plain_topk(plain, x_BD)
        loss = (x_BD - plain.decode(f_BN)).square().sum(1).mean() + 0.04 * f_BN.sum(1).mean()
        theirs.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_ND = plain.W_dec
            g_ND = plain.W_dec.grad
            g_ND -= (g_ND * W_ND).sum(1, keepdim=True) * W_ND
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            theirs.step()
            W_ND /= W_ND.norm(dim=1, keepdim=True)
    for a, b in zip(sae.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_planted_features_are_recovered():
    D = 32
    N = 48
    active = 3
    true_ND = F.normalize(torch.randn(N, D), dim=1)
    sae = SAE(D, 2 * N, active)
    adam = adam_of(sae)
    for step in range(500):
        slots_BK = torch.rand(256, N).topk(active, dim=1).indices
        f_BN = torch.zeros(256, N).scatter(1, slots_BK, torch.rand(256, active) + 0.5)
        alpha = sgo_sae.alpha_at(step, 0.075, warmup=150)
        step_of(sae, adam, f_BN @ true_ND, alpha, sgo_sae.lr_at(step, 500, 5e-3, 0.8), 0.0)
    matched_N = (true_ND @ sae.W_dec.T).amax(1)
    assert (matched_N > 0.9).float().mean() > 0.95


def test_penalty_lowers_competition_in_training():
    shares = {}
    for alpha in (0.0, 0.5):
        torch.manual_seed(0)
        sae = SAE(16, 64, 8)
        adam = adam_of(sae)
        for _ in range(200):
            x_BD = torch.randn(512, 16) * 2
            step_of(sae, adam, x_BD, alpha, 3e-3)
        shares[alpha] = orthogonality(sae.encode(x_BD).detach()).item()
    assert shares[0.5] < 0.8 * shares[0.0]


def test_method_section_stands_alone():
    """The method, under the imports of torch and with no other package, trains; it names no
    process, file or other architecture.
    """
    section = re.search(r"# -+ method\n(.*?)# -+ fast\n", SCRIPT.read_text(), re.DOTALL).group(1)
    assert not re.search(r"\b(dist|rank|Path|Config|arch|device)\b", section)
    use = """
import sys
for name in ("transformers", "datasets", "numpy", "tqdm", "safetensors", "tokenizers", "resource"):
    sys.modules[name] = None  # Windows has no resource
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
METHOD
torch.manual_seed(0)
sae = SAE(8, 32, 4)
x_BD = torch.randn(64, 8)
sae.b_dec.data = geometric_median(x_BD)
adam = torch.optim.Adam(sae.parameters())
losses = []
for step in range(50):
    loss = total_loss(loss_terms(sae, x_BD), alpha=alpha_at(step))
    assert 0 < update(sae, adam, loss, lr_at(step, 50, 1e-2)) < float('inf')
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0]
import sgo_sae
sgo_sae.total_loss(sgo_sae.topk_loss_terms(sae, x_BD)).backward()
"""
    result = python("-W", "ignore", "-c", use.replace("METHOD", section))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("clip, most", [(1.0, 1.0), (0.25, 0.25), (0.0, math.inf)])
def test_gradients_are_clipped_to_the_norm_that_is_set(clip, most):
    sae = SAE(6, 20, 4)
    x_BD = torch.randn(50, 6) * 10
    norms = []

    class Adam:
        param_groups = ({},)

        def step(self):
            assert self.param_groups[0]["lr"] == 0.1
            along_N = (sae.W_dec.grad * sae.W_dec).sum(1)  # which is taken away (4.2)
            assert along_N.norm() < 1e-5 * sae.W_dec.grad.norm()
            norms.append(math.sqrt(sum(p.grad.square().sum() for p in sae.parameters())))

        def zero_grad(self):
            pass

    norm = update(sae, Adam(), total_loss(topk_loss_terms(sae, x_BD)), 0.1, clip)
    assert norm > 1 and norms == [pytest.approx(min(norm, most), rel=1e-4)]
    run = sgo_sae.Run(sgo_sae.Config(d_sae=20, k=4, clip=clip), 6, CPU)
    run.step(x_BD, 0, 10)
    # After its first step Adam's mean of gradients is a tenth of that step's.
    means = [run.adam.state[p]["exp_avg"] for p in run.sae.parameters()]
    taken = 10 * math.sqrt(sum(mean.square().sum() for mean in means))
    assert taken == pytest.approx(min(run.gradient_norm, most), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_whose_gradient_is_not_finite_changes_nothing(bad):
    sae = SAE(6, 20, 4)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    loss = total_loss(topk_loss_terms(sae, torch.randn(50, 6)))
    assert not math.isfinite(update(sae, adam_of(sae), loss * bad, 0.1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


# --------------------------------------------------------------------------------------------- fast


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_penalty_and_gradient_match_the_definition(B, N, K, way, rows, monkeypatch):
    sizes = {"tiles": {"tile": rows}, "blocks": {"cells": rows * (N + 1)}, "pairs": {}}
    take(way, monkeypatch, **sizes[way])
    vals_BK, idx_BK = sparse_latents(B, N, K)
    f_BN = dense(vals_BK, idx_BK, N).requires_grad_()
    omega, _, grad_BN = definition(f_BN.detach())
    vals_BK.requires_grad_()
    sparse = sgo_penalty(vals_BK, idx_BK, N)
    whole = sgo_penalty_dense(f_BN)
    without_gradient = sgo_penalty_dense(f_BN.detach())
    for found in (sparse, whole, without_gradient):
        assert found.item() == pytest.approx(omega, rel=1e-12, abs=1e-15)
    (grad_BK,) = torch.autograd.grad(sparse, vals_BK)
    (found_BN,) = torch.autograd.grad(whole, f_BN)
    expected_BK = grad_BN.gather(1, idx_BK) * (vals_BK > 0)
    assert torch.allclose(grad_BK, expected_BK, rtol=1e-10, atol=1e-14)
    assert torch.allclose(found_BN, grad_BN, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "weights, way", [*(("coactivation", way) for way in WAYS), ("uniform", "tiles")]
)
@pytest.mark.parametrize("arch", sgo_sae.ARCHITECTURES)
def test_thirty_steps_by_the_fast_way_are_those_by_the_plain_one(
    arch, weights, way, monkeypatch, patch_gpu
):
    """On a CPU, and as on a GPU. JumpReLU's thresholds get a gradient of Ω from latents that are
    not active, too.
    """
    take(way, monkeypatch)
    batches = torch.randn(30, 256, 16, dtype=torch.float64) * 2
    states = []

    def train(device, plain):
        settings = {"lr": 5e-3, "alpha": 0.5, "pair_weights": weights, "plain": plain}
        cfg = sgo_sae.Config(arch=arch, d_sae=64, k=8, **settings)
        run = sgo_sae.Run(cfg, 16, device)
        run.sae.double()
        if arch != "topk":
            run.sae.start(batches[0].to(device), cfg.lam)
        for step, x_BD in enumerate(batches):
            run.step(x_BD.to(device), step, 30)
        states.append({name: tensor.cpu() for name, tensor in run.sae.state_dict().items()})

    train(CPU, True)
    train(CPU, False)
    with patch_gpu():
        train(CUDA, False)
    plain, *fast = states
    for state in fast:
        for name, tensor in state.items():
            assert (tensor - plain[name]).abs().max() < 1e-12
    start = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=64, k=8), 16, CPU).sae
    assert (plain["W_dec"] - start.W_dec).abs().max() > 0.1  # it did train


@pytest.mark.parametrize("weighted", [True, False])
def test_penalty_inside_a_callers_autocast(weighted):
    """Counts stay exact, gradients finite, the value that of float32."""
    of_selected = partial(sgo_penalty, weighted=weighted)
    of_dense = partial(sgo_penalty_dense, weighted=weighted)
    vals_BK, idx_BK = sparse_latents(600, 40, 12, dtype=torch.float32)
    exact = of_selected(vals_BK, idx_BK, 40).item()
    with torch.autocast("cpu", torch.bfloat16):
        for penalty in (
            lambda v: of_selected(v, idx_BK, 40),
            lambda v: of_dense(dense(v, idx_BK, 40)),
        ):
            leaf_BK = vals_BK.clone().requires_grad_()
            value = penalty(leaf_BK)
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(exact, rel=1e-5)
            value.backward()
            assert 0 < leaf_BK.grad.abs().sum() < math.inf
        coarse = of_selected(vals_BK.bfloat16(), idx_BK, 40)
        assert coarse.dtype == torch.float32
        assert coarse.item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_the_ablation_is_eq_2_with_a_weight_of_1_for_each_pair(B, N, K, way, monkeypatch):
    """By `method` and by all ways of `fast`: Ω, and its gradient where latents are active."""
    take(way, monkeypatch, **{"tiles": {"tile": 7}, "blocks": {"cells": 3 * (N + 1)}}.get(way, {}))
    vals_BK, idx_BK = sparse_latents(B, N, K)
    f_BN = dense(vals_BK, idx_BK, N)
    omega, gradient_BN = uniform_definition(f_BN)
    active_BN = f_BN > 0
    for penalty in (
        lambda v: orthogonality(dense(v, idx_BK, N), weighted=False),
        lambda v: sgo_penalty(v, idx_BK, N, weighted=False),
        lambda v: sgo_penalty_dense(dense(v, idx_BK, N), weighted=False),
    ):
        leaf_BK = vals_BK.clone().requires_grad_()
        value = penalty(leaf_BK)
        value.backward()
        assert value.item() == pytest.approx(omega, rel=1e-9, abs=1e-12)
        found_BN = dense(leaf_BK.grad, idx_BK, N)
        assert torch.allclose(found_BN[active_BN], gradient_BN[active_BN], rtol=1e-9, atol=1e-12)
    leaf_BK = vals_BK.clone().requires_grad_()
    sgo_penalty(leaf_BK, idx_BK, N, weighted=False).backward()
    assert (leaf_BK.grad[vals_BK == 0] == 0).all()  # as ReLU's derivative is


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_the_penalty_can_not_differentiate_is_an_error(way, weighted, monkeypatch):
    """A second derivative, forward mode, an empty batch: never another number."""
    take(way, monkeypatch)
    vals_BK, idx_BK = sparse_latents(16, 12, 4)
    penalties = {
        "selected": lambda v: sgo_penalty(v, idx_BK, 12, weighted),
        "dense": lambda v: sgo_penalty_dense(dense(v, idx_BK, 12), weighted),
    }
    for penalty in penalties.values():
        leaf_BK = vals_BK.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(penalty(leaf_BK), leaf_BK, create_graph=True)
        with pytest.raises(RuntimeError):  # Function has no jvp
            torch.func.jvp(penalty, (vals_BK,), (torch.ones_like(vals_BK),))
    for empty in (
        lambda: sgo_penalty(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.long), 12, weighted),
        lambda: sgo_penalty_dense(torch.zeros(0, 12).requires_grad_(), weighted),
    ):
        with pytest.raises((ZeroDivisionError, RuntimeError, IndexError)):
            empty()


def test_penalty_of_no_active_latent_and_without_gradients():
    assert sgo_penalty(torch.zeros(9, 3), torch.arange(3).expand(9, 3), 200) == 0
    assert sgo_penalty_dense(torch.zeros(9, 200)) == 0
    vals_BK, idx_BK = sparse_latents(64, 100, 8)
    expected = sgo_penalty(vals_BK, idx_BK, 100)
    with torch.inference_mode():
        assert sgo_penalty(vals_BK.clone(), idx_BK, 100) == expected
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtype, most", [(torch.bfloat16, 1e-3), (torch.float16, 2e-4), (torch.float32, 1e-6)]
)
def test_the_gradient_of_half_precision_latents_is_nearly_that_of_the_definition(way, dtype, most):
    """Of the rounded latents: counts over 256 are exact, and sums are not in their precision."""
    vals_BK, idx_BK = skewed_latents()
    vals_BK = vals_BK.to(dtype)
    f_BN = dense(vals_BK, idx_BK, 300)
    _, _, expected_BN = fast_definition(f_BN)
    expected_BK = expected_BN.gather(1, idx_BK) * (vals_BK > 0)
    assert (f_BN > 0).sum(0).max() > 256 and (f_BN > 0).sum(0).min() == 0
    if way == "tiles":
        found_BK = sgo_sae.gradient_by_tiles(f_BN).gather(1, idx_BK) * (vals_BK > 0)
    else:
        found_BK = getattr(sgo_sae, f"gradient_by_{way}")(vals_BK, idx_BK, 300)
    assert found_BK.dtype == torch.float32
    assert relative_error(found_BK, expected_BK) < most


def test_products_over_a_batch_do_not_overflow_in_float16():
    """⟨f_i, f_j⟩ is 64 here, and B times as much is more than float16 has."""
    f_BN = torch.zeros(2048, 70, dtype=torch.float16)
    f_BN[:, :2] = 8.0
    found_BN = sgo_sae.gradient_by_tiles(f_BN)
    assert torch.equal(found_BN[:, :2], torch.full((2048, 2), 4 / 2048 * 64 * 8.0))
    assert (found_BN[:, 2:] == 0).all()


@pytest.mark.parametrize("N, tile", [(300, None), (300, 64), (64, 128), (5, None)])
def test_rows_of_the_tiles_products_are_aligned(monkeypatch, N, tile):
    """A GPU is slow where their length in memory is no multiple of a few numbers."""
    strides = []
    real = sgo_sae.product

    def product(a, b):
        strides.extend(max(operand.stride()) for operand in (a, b))
        return real(a, b)

    monkeypatch.setattr(sgo_sae, "product", product)
    f_BN = dense(*skewed_latents(B=128, N=N, K=3), N)
    found_BN = sgo_sae.gradient_by_tiles(f_BN, tile=tile)
    assert strides and all(stride % 64 == 0 for stride in strides)
    assert relative_error(found_BN, fast_definition(f_BN)[2]) < 1e-6


def test_products_of_half_precision_are_summed_in_float32():
    ones = torch.ones(1, 3001, dtype=torch.bfloat16)  # bfloat16 has no 3001
    assert sgo_sae.product(ones, ones.T).item() == 3001
    for dtype in (torch.float32, torch.float64):
        assert sgo_sae.product(ones.to(dtype), ones.T.to(dtype)).dtype == dtype


def test_pairs_cost_nothing_by_the_number_of_latents():
    """A million latents: an array of N² would have a terabyte or more, one of B N 0.3 GB."""
    vals_BK, idx_BK = skewed_latents(64, 300, 6, torch.float64)
    few_BK = sgo_sae.gradient_by_pairs(vals_BK, idx_BK, 300)
    many_BK = sgo_sae.gradient_by_pairs(vals_BK, idx_BK * 3495, 300 * 3495)
    assert torch.equal(few_BK, many_BK)


def ways_taken(monkeypatch):
    """A list of the ways by which gradients are computed from now on."""
    taken = []
    for name in ("gradient_by_tiles", "gradient_by_pairs", "gradient_by_blocks"):
        real = getattr(sgo_sae, name)
        monkeypatch.setattr(
            sgo_sae, name, lambda *data, n=name, real=real: taken.append(n) or real(*data)
        )
    return taken


@pytest.mark.parametrize("device, ratio", sgo_sae.PAIRS_PAY.items())
def test_the_way_is_chosen_by_cost(device, ratio, monkeypatch, patch_gpu):
    taken = ways_taken(monkeypatch)
    with patch_gpu():
        for N in (2 * ratio, 2 * ratio + 1):
            vals_BK = torch.rand(5, 2).to(device)
            idx_BK = torch.arange(10).view(5, 2).to(device)
            sgo_penalty(vals_BK, idx_BK, N)
    assert taken == [
        "gradient_by_tiles",
        "gradient_by_blocks" if device == "cpu" else "gradient_by_pairs",
    ]


def test_without_a_gradient_a_gpu_takes_pairs_only_where_they_fit(monkeypatch, patch_gpu):
    """A token of a baseline may have so many active latents that their pairs have no room."""
    taken = ways_taken(monkeypatch)
    monkeypatch.setattr(sgo_sae, "PAIRS_FIT", 5 * 2**2)
    with patch_gpu():
        for most in (2, 3):
            f_BN = torch.zeros(5, 3 * 127 + 1)
            f_BN[0, :most] = torch.rand(most)
            f_BN[1:, 0] = 1.0
            omega = sgo_penalty_dense(f_BN.to("cuda")).item()
            assert omega == pytest.approx(orthogonality(f_BN).item(), rel=1e-5)
    assert taken == ["gradient_by_pairs", "gradient_by_tiles"]


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_computed_without_a_graph(way, monkeypatch):
    """A CPU's threads would record one, whatever the caller's mode, and take a quarter longer."""
    take(way, monkeypatch)
    name = f"gradient_by_{'blocks' if way == 'pairs' else way}"
    real = getattr(sgo_sae, name)
    seen = []
    monkeypatch.setattr(sgo_sae, name, lambda f, *a: seen.append(f.requires_grad) or real(f, *a))
    vals_BK, idx_BK = sparse_latents(16, 12, 4)
    sgo_penalty(vals_BK.requires_grad_(), idx_BK, 12).backward()
    assert seen == [False]


def test_the_threads_of_other_people_are_left_alone():
    """The workers of a CPU compute alone, which is no setting for threads to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sgo_sae.gradient_by_blocks(*skewed_latents(64), 300)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_cpu_trains_is_what_select_says(monkeypatch):
    """There is no second definition of the encoder: whoever edits `select` changes both."""
    x_BD = torch.randn(40, 6)
    sae = SAE(6, 20, 4)
    before = topk_loss_terms(sae, x_BD).reconstruction

    def select(self, pre):
        vals, idx = pre.topk(2, dim=-1)
        return vals.relu() * 3, idx

    monkeypatch.setattr(SAE, "select", select)
    after = topk_loss_terms(sae, x_BD)
    assert torch.allclose(after.reconstruction, loss_terms(sae, x_BD).reconstruction)
    assert abs(after.reconstruction - before) > 0.1
    assert torch.allclose(after.sparsity, sae.encode(x_BD).sum(1).mean())


# -------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hook_reads_the_hidden_states_of_the_full_model(model, layer):
    _, full, tokenizer = model
    ids_BL = torch.randint(3, len(tokenizer), (3, 20))
    lm, module = loaded(model, layer)
    assert len(lm.layers) == layer + 1 and not hasattr(lm, "lm_head")
    with torch.inference_mode():
        x_BLD = sgo_sae.layer_output(lm, module, ids_BL)
        assert torch.equal(x_BLD, full(ids_BL, output_hidden_states=True).hidden_states[layer + 1])
        assert torch.equal(x_BLD, sgo_sae.layer_output(full, full.model.layers[layer], ids_BL))
    assert not module._forward_hooks


def test_a_tokenizer_may_know_more_than_the_model_reads(train_argv, tmp_path, result):
    """As Gemma 3's, whose one entry more than the model has rows no text produces; an id that is
    produced is refused.
    """
    from transformers import AutoTokenizer

    make_model(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] + 1
    assert result(train_argv(model=tmp_path / "lm")).code == 0
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "lm")
    found = result(train_argv(model=tmp_path / "lm", out=tmp_path / "other"))
    assert found.code == 2 and f"the id {len(tokenizer) - 1}" in found.last


def test_packing_loses_and_repeats_no_token(model):
    _, _, tokenizer = model
    documents = [f"{TEXT[: 7 * i]} {i}" for i in range(1, 30)]
    ids_TL = torch.tensor(list(sgo_sae.token_contexts(documents, tokenizer, 12)))
    assert (ids_TL[:, 0] == tokenizer.bos_token_id).all()
    stream = ids_TL[:, 1:].flatten().tolist()
    whole = []
    for ids in tokenizer(documents, add_special_tokens=False).input_ids:
        whole += [*ids, tokenizer.eos_token_id]
    assert stream == whole[: len(stream)]
    assert len(whole) - len(stream) < 11


def test_packing_without_bos(tmp_path):
    _, tokenizer = make_model(tmp_path, bos=False)
    contexts = list(sgo_sae.token_contexts([TEXT] * 4, tokenizer, 8))
    read = [token for context in contexts for token in context]
    assert read == (tokenizer(TEXT)["input_ids"] * 4)[: 8 * len(contexts)]


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_and_the_first_one_never_reach_the_autoencoder(tmp_path, bos):
    """A text that spells special tokens gives ordinary ones. Position 0 is left out also where it
    is no BOS.
    """
    make_model(tmp_path, bos=bos)
    text = "a <bos> b <eos><pad> c"
    write_rows(tmp_path / "t.jsonl", [{"text": text}] * 20)
    settings = {"model": str(tmp_path), "dataset": str(tmp_path / "t.jsonl"), "layer": 1}
    cfg = sgo_sae.Config(**settings, ctx=8, batch=4, buffer=10, lm_batch=3)
    lm, layer, tokenizer, _ = sgo_sae.load_lm(cfg.model, 1, CPU, torch.float32)
    contexts = list(islice(sgo_sae.token_contexts([text] * 20, tokenizer, 8), 10))
    ids_TL = torch.tensor(contexts)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id] if bos else []
    kept_TL = ~torch.isin(ids_TL, torch.tensor(special))
    kept_TL[:, 0] = False
    assert kept_TL.sum() < 70 if bos else kept_TL.sum() == 70
    with torch.inference_mode():
        kept = sgo_sae.layer_output(lm, layer, ids_TL)[kept_TL]
    # The first round has ten contexts.
    harvested = torch.cat(list(islice(data_of(cfg), len(kept) // 4)))
    distance = (harvested[:, None] - kept).abs().amax(2)
    # Each is one of them, and, less than a batch aside, each of them is there.
    assert distance.amin(1).max() < 1e-4
    assert (distance.amin(0) < 1e-4).sum() > len(kept) - 4


class Counting(torch.nn.Module):
    """A language model of one layer, whose activations number the tokens as it reads them."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Identity()
        self.n_read = 0
        self.device = CPU
        self.dtype = torch.float32
        self.config = argparse.Namespace(hidden_size=16)
        self.embedding = torch.nn.Embedding(10_000, 16)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **inputs):
        numbers = torch.arange(self.n_read, self.n_read + input_ids.numel()).float()
        self.n_read += input_ids.numel()
        return self.layer(numbers.view(*input_ids.shape, 1).expand(-1, -1, 16))


@pytest.mark.parametrize("lm_batch, batch", [(3, 8), (64, 16), (5, 31)])
def test_rounds_serve_each_activation_once_and_in_another_order(model, texts, lm_batch, batch):
    """With numbers in place of activations: a round is all of its contexts', shuffled; the next one
    follows on it.
    """
    settings = {"model": model[0], "dataset": texts, "layer": 1, "ctx": 16, "buffer": 16}
    cfg = sgo_sae.Config(**settings, batch=batch, lm_batch=lm_batch)
    lm = Counting()
    reader = sgo_sae.load_lm(cfg.model, cfg.layer, CPU, torch.float32)
    reader = reader._replace(lm=lm, layer=lm.layer)
    contexts = 16  # of a round
    rounds = {}
    for x_BD in islice(sgo_sae.batches(cfg, reader), 150):
        for number in x_BD[:, 0].tolist():
            rounds.setdefault(number // (contexts * 16), []).append(number)
    assert list(rounds) == sorted(rounds)  # one after another
    assert len(rounds) > 3
    for numbers in list(rounds.values())[:-1]:
        assert len(set(numbers)) == len(numbers)
        assert numbers != sorted(numbers)
        # BOS, EOS and less than a batch are left out.
        assert contexts * 15 - len(numbers) < batch + contexts * 2


def little_tokenizer(kind):
    """A tokenizer that knows the words "some" and "text", or the letters of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = {}
    if kind == "words":
        unknown = {"unk_token": "[UNK]"}
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "some": 1, "text": 2}, **unknown))
    else:
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("sometx")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **unknown)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("words", "too few for a batch of 64"),
        ("letters", "no token of 10,000 texts"),
    ],
)
def test_text_that_gives_no_batch_ends_the_run(train_argv, tmp_path, result, kind, words):
    make_model(tmp_path / "lm")
    little_tokenizer(kind).save_pretrained(tmp_path / "lm")
    write_rows(tmp_path / "t.jsonl", [{"text": "\u044f \u0436 \u0436\u044f" * 9}] * 30)
    found = result(train_argv(model=tmp_path / "lm", dataset=tmp_path / "t.jsonl"))
    assert found.code == 2 and words in found.last


def with_outliers(monkeypatch, share=0.01, times=100):
    """Lets some tokens within the texts have a norm of many times the others'."""
    real = sgo_sae.layer_output

    def output(lm, layer, ids_BL):
        x_BLD = real(lm, layer, ids_BL).clone()
        generator = torch.Generator().manual_seed(int(ids_BL.sum()))
        x_BLD[torch.rand(ids_BL.shape, generator=generator) < share] *= times
        return x_BLD

    monkeypatch.setattr(sgo_sae, "layer_output", output)


def test_outliers_give_their_places_to_other_tokens(model, texts, monkeypatch):
    settings = {"model": model[0], "dataset": texts, "layer": 1, "ctx": 16, "buffer": 200}
    cfg = sgo_sae.Config(**settings, batch=16)
    usual = torch.cat(list(islice(data_of(cfg), 300)))
    with_outliers(monkeypatch, share=0.1)  # so many that they raise the mean norm tenfold
    cfg.max_norm = 0.0
    all_of_them = torch.cat(list(islice(data_of(cfg), 300)))
    cfg.max_norm = 5.0
    without = torch.cat(list(islice(data_of(cfg), 300)))
    norm_T = all_of_them.norm(dim=1)
    is_outlier_T = norm_T > 5 * norm_T.median()
    assert 300 < is_outlier_T.sum() < 700
    # The others stay where they are, and each outlier becomes one of them.
    assert torch.equal(without[~is_outlier_T], usual[~is_outlier_T])
    assert without.norm(dim=1).max() < 5 * norm_T.median()
    places = without[is_outlier_T][:, None] == usual
    is_there = places.all(2).any(1)  # or it is one of the few that fill no batch of the round
    assert is_there.float().mean() > 0.97


def test_an_outlier_is_one_beside_the_median_norm():
    """Of many of them, the mean norm would hide all."""
    x_CD = F.normalize(torch.randn(100, 8), dim=1)
    x_CD[::3] *= 6
    assert sgo_sae.replace_outliers(x_CD, 5.0, torch.Generator().manual_seed(0)) == 34
    assert x_CD.norm(dim=1).max() < 1.01


def test_outliers_are_told_once_and_leave_resuming_exact(train_argv, tmp_path, monkeypatch, result):
    with_outliers(monkeypatch)
    argv = train_argv(**LONG)
    found = result(train_argv(out=tmp_path / "whole", **LONG))
    assert found.code == 0 and found.err.count("over 5 times the median norm") == 1
    with monkeypatch.context() as patch:
        stop_at(patch, 333)
        assert trained(argv) == 143
    assert trained([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_short_run_reads_no_more_than_it_needs(train_argv, tmp_path, result):
    """12 steps of 64 tokens; a context has 15 tokens beside its BOS, of which some are EOS."""
    argv = train_argv(buffer=2048, lm_batch=1)
    tokenizer = sgo_sae.load_lm(argv[1], 0, CPU, torch.float32).tokenizer
    with contexts_noted() as passes:
        found = result(argv)
    n_kept = sum(sgo_sae.kept_tokens(ids_BL, tokenizer).sum().item() for ids_BL in passes)
    assert found.code == 0 and 12 * 64 <= n_kept < 12 * 64 + 15
    # Nor of the text: it has some 1,900 tokens, and is said to be used up where it is.
    assert "has been read once" not in found.err
    long = result(train_argv(**LONG | {"out": tmp_path / "long"}))
    assert long.code == 0 and long.err.count("has been read once") == 1


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("weights", ["coactivation", "uniform"])
def test_logged_figures_are_those_of_the_definitions(arch, plain, weights, tmp_path, monkeypatch):
    """Of the autoencoder as it is saved: in batchtopk by θ. With --plain Ω is that of `method`."""
    x_BD = torch.randn(128, 16)
    settings = {"alpha": 0.5, "alpha_warmup": 0, "plain": plain, "out": str(tmp_path)}
    settings["pair_weights"] = weights
    run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=64, k=4, **settings), 16, CPU)
    if arch != "topk":
        run.sae.start(x_BD, 0.1)
    run.step(x_BD, 0, 10)
    if plain:
        for name in ("gradient_by_tiles", "gradient_by_pairs", "gradient_by_blocks"):
            monkeypatch.setattr(sgo_sae, name, None)
    run.log(x_BD, 1, 0.5)
    (found,) = metrics_of(tmp_path)
    sgo_sae.save_sae(run.sae, run.cfg, tmp_path / "saved")
    saved = sgo_sae.load_sae(tmp_path / "saved")
    f_BN = saved.encode(x_BD).detach()
    in_training_BN = run.sae.activate(run.sae.pre_activations(x_BD)).detach()
    assert torch.equal(f_BN, in_training_BN) == (arch != "batchtopk")
    error_BD = (x_BD - saved(x_BD)).detach()
    omega = {"coactivation": definition, "uniform": uniform_definition}[weights](f_BN)[0]
    l0 = (f_BN > 0).sum(1).float().mean().item()
    sparsity = {"jumprelu": l0, "batchtopk": 0}.get(arch, f_BN.sum(1).mean().item())
    reconstruction = error_BD.square().sum(1).mean().item()
    variance = (x_BD - x_BD.mean(0)).square().sum(1).mean().item()
    expected = {
        "omega": omega,
        "sparsity": sparsity,
        "reconstruction": reconstruction,
        "loss": reconstruction + found["lambda"] * sparsity + 0.5 * omega,
        "penalty_share": 0.5 * omega / reconstruction,
        "mse": reconstruction / 16 / 0.25,  # in the model's units
        "explained_variance": 1 - reconstruction / variance,
        "cosine": F.cosine_similarity(x_BD, x_BD - error_BD, dim=1).mean().item(),
        "l0": l0,
        "step": 1,
        "tokens": 2048,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_logged_l0_is_that_of_the_autoencoder_as_it_is_saved():
    """After training, θ decides in batchtopk, which lags behind that of the last batch."""
    sae = sgo_sae.BatchTopK(16, 64, 4)
    x_BD = torch.randn(500, 16)
    for theta in (0.5, 1.0):
        sae.theta.fill_(theta)
        expected = (((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc) > theta).sum(1).float().mean()
        figures = sgo_sae.figures_of(sae, x_BD, torch.tensor(0.0), 0.0, 1.0)
        assert figures["l0"] == pytest.approx(expected.item())


@pytest.mark.parametrize("normalize", [False, True])
def test_a_run_begins_at_the_geometric_median_of_its_first_activations(normalize):
    """Scaled to a mean squared norm of D where --normalize asks for it; no batch is lost."""
    parts = [3 * torch.randn(64, 8).exp() for _ in range(3)]
    run = sgo_sae.Run(sgo_sae.Config(d_sae=32, k=4, batch=64, normalize=normalize), 8, CPU)
    scale, rest = sgo_sae.begin([run], iter(parts), 3)
    x_TD = scale * torch.cat(parts)
    if normalize:
        assert x_TD.square().sum(1).mean().item() == pytest.approx(8, rel=1e-4)
    else:
        assert scale == 1
    b_dec_D = run.sae.b_dec.detach()
    assert F.normalize(x_TD - b_dec_D, dim=1).sum(0).norm() < 0.1
    assert (x_TD.mean(0) - b_dec_D).norm() > 0.1 * b_dec_D.norm()
    assert all(torch.equal(batch_BD, x_BD) for batch_BD, x_BD in zip(rest, parts, strict=True))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_auxiliary_loss_has_what_it_needs(on_gpu, patch_gpu):
    """AuxK as the comment in `Run.step` has it, against a dense one by autograd."""
    sae = SAE(6, 40, 4).double()
    x_BD = torch.randn(50, 6, dtype=torch.float64)
    dead_N = torch.arange(40) % 2 == 0

    def select(pre_BN):
        vals_BK, idx_BK = pre_BN.masked_fill(~dead_N.to(pre_BN.device), -math.inf).topk(3)
        return vals_BK.relu(), idx_BK

    pre_BN = sae.pre_activations(x_BD)
    rest_BD = (x_BD - sae(x_BD)).detach()
    f_BN = sae.activate(pre_BN)
    vals_BK, idx_BK = pre_BN[:, dead_N].topk(3)
    aux_BD = (dense(vals_BK.relu(), 2 * idx_BK, 40)) @ sae.W_dec
    expected = (x_BD - sae.decode(f_BN)).square().sum(1).mean()
    expected = expected + (rest_BD - aux_BD).square().sum(1).mean() / 32
    weights = list(sae.parameters())
    expected = torch.autograd.grad(expected, weights)

    def found():
        x = x_BD.to("cuda") if on_gpu else x_BD
        module = sae.to("cuda") if on_gpu else sae
        terms = topk_loss_terms(module, x, lambda *latents: 0.0)
        aux = sgo_sae.decode_selected(module, *sgo_sae.encode_selected(module, x, select))
        loss = terms.reconstruction + (x - terms.xhat_BD - aux).square().sum(1).mean() / 32
        return torch.autograd.grad(loss, list(module.parameters()))

    if on_gpu:
        with patch_gpu():
            gradients = [gradient.cpu() for gradient in found()]
    else:
        gradients = found()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("batch", [2048, 4096])
def test_dead_is_one_thing(batch, tmp_path):
    """A latent that was active on no token of the last 409,600, never-active ones among them."""
    cfg = sgo_sae.Config(d_sae=3, k=1, alpha=0.0, lr=0.0, batch=batch, out=str(tmp_path))
    run = sgo_sae.Run(cfg, 2, CPU)
    run.sae.W_enc.data = torch.tensor([[1.0, 0, -1], [0, 1, 0]])
    first, second = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    found = {}
    for step in range(300):
        run.step(second if step == 50 else first, step, 300)
        run.log(first, step + 1, 1.0)
        found[step + 1] = run.history[-1]["dead"]
    many = 409_600 // batch
    assert found[many - 1] is None and "(409,600 tokens)" in run.figures()
    # The third one is never active, and the second one last in step 50, after which 51 are done.
    assert (found[many], found[50 + many], found[51 + many], found[300]) == (1, 1, 2, 2)


def test_run_is_complete_and_repeatable(train_argv, tmp_path, result):
    for name in ("a", "b"):
        found = result(train_argv(out=tmp_path / name))
        assert found.code == 0 and "steps 0 to 12" in found.err
        for word in ("EV 0.", "MSE", "L0 4.0", "dead", "Ω ", "αΩ/rec", "saved in"):
            assert word in found.out
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    rows = metrics_of(tmp_path / "a")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert rows[0].pop("dead") is None  # as none can be before 200 steps
    assert all(math.isfinite(value) for value in rows[0].values())
    keys = [
        "gradient_norm",
        "loss",
        "sparsity",
        "omega",
        "explained_variance",
        "cosine",
        "l0",
        "lr",
        "lambda",
        "tokens",
        "mse",
    ]
    assert {*keys, "activation_scale"} <= set(rows[0])
    assert rows[-1]["alpha"] == 0.075  # since the warm-up is a fifth of 12 steps
    weighed = rows[0]["alpha"] * rows[0]["omega"]
    assert rows[0]["penalty_share"] == pytest.approx(weighed / rows[0]["reconstruction"])
    metadata = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
    assert metadata["settings"]["k"] == 4
    assert metadata["torch_version"] == torch.__version__


@pytest.mark.parametrize(
    "option", [["--plain"], ["--normalize"], ["--alpha", "0"], ["--dtype", "bfloat16"]]
)
def test_options_train(train_argv, tmp_path, option):
    assert trained(train_argv() + option) == 0
    last = metrics_of(tmp_path / "run")[-1]
    assert last["omega"] > 0 and (last["penalty_share"] == 0) == (
        option == ["--alpha", "0"]
    )  # what α 0 would weigh


def test_grid_trains_each_as_if_alone(train_argv, tmp_path, result):
    """And the language model reads as much for all as for one."""
    grid = ["--arch", "topk", "relu", "--alpha", 0, 0.05, "--dict", 64, 32, "--k", 4, 6]
    grid += ["--seed", 0, 1]
    with contexts_noted() as read_by_grid:
        table = result(train_argv() + grid).out
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert len(folders) == 32
    assert all(name in table for name in folders)
    for arch, n, k, alpha, seed in (("topk", 64, 4, "0", 0), ("relu", 32, 6, "0.05", 1)):
        name = f"{arch}-n{n}-k{k}-a{alpha}-s{seed}"
        one = {"arch": arch, "dict": n, "k": k, "alpha": alpha, "seed": seed}
        with contexts_noted() as read_by_one:
            assert trained(train_argv(out=tmp_path / name, **one)) == 0
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "run" / name)
        assert len(read_by_one) == len(read_by_grid)


def test_the_ablation_of_the_weights_in_a_grid(train_argv, texts, tmp_path, result):
    """It has a name of its own, and the weights that it gets alone, which are not SGO's."""
    argv = [*train_argv(), "--alpha", "0", "5", "--pair-weights", "coactivation", "uniform"]
    table = result(argv).out
    names = ["topk-n64-k4-a0-s0", "topk-n64-k4-a5-s0", "topk-n64-k4-a5-uniform-s0"]
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert sorted(folders) == names
    assert all(name in table for name in names)
    _, sgo, uniform = (weights_of(tmp_path / "run" / name) for name in names)
    assert sgo != uniform
    assert trained(train_argv(out=tmp_path / "alone", alpha=5, pair_weights="uniform")) == 0
    assert weights_of(tmp_path / "alone") == uniform
    argv = [tmp_path / "run", "--metrics", "core", "--text", texts, "--contexts", 4]
    heads = " ".join(cells_in(result(argv).out)[0])
    assert "coactivation" in heads and "uniform" in heads, heads


def test_activations_that_are_not_finite_end_the_run(train_argv, monkeypatch, result):
    real = sgo_sae.layer_output
    calls = []

    def infinite(*args):
        x_BLD = real(*args).clone()
        calls.append(1)
        if len(calls) == 6:
            x_BLD[0, 3:5, 0] = float("inf")
        return x_BLD

    monkeypatch.setattr(sgo_sae, "layer_output", infinite)
    found = result(train_argv())
    assert found.code == 2 and "not finite; try --dtype float32" in found.last


@slow
def test_memory_is_flat(tmp_path):
    """Resident memory of a run in steps 200 to 400 and 1,000 to 1,200.

    A copy of a batch that were kept at each step would add 0.25 MB times 800, a third. It varies
    by 5 % from run to run, as the allocator finds its blocks.
    """
    documents = [text for _, text in sgo_sae.library_texts()][:300]
    sgo_sae.train_demo_lm(documents, tmp_path / "lm", steps=1)
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in documents])
    sizes = {"layer": 0, "dict": 256, "k": 8, "ctx": 128, "batch": 512, "tokens": 512 * 1200}
    often = {"lm_batch": 32, "log_every": 200, "save_every": 200, "alpha": 0.075}
    files = (tmp_path / "lm", tmp_path / "texts.jsonl", tmp_path / "run")
    argv = [sys.executable, SCRIPT, *flags(*files, **sizes, **often)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    resident = {}
    while process.poll() is None:
        part = metrics.read_text().count("\n") if metrics.exists() else 0
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        resident.setdefault(part, []).append(pages)
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read()
    middle = {part: statistics.median(pages) for part, pages in resident.items()}
    assert middle[5] == pytest.approx(middle[1], rel=0.12), middle


def test_metrics_are_appended(tmp_path):
    """What stands in the file is not written again, but for the first time."""
    run = sgo_sae.Run(sgo_sae.Config(d_sae=20, k=4, out=str(tmp_path)), 6, CPU)
    sgo_sae.write_log(run)
    x_BD = torch.randn(50, 6)
    run.log(x_BD, 1, 1.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    run.log(x_BD, 2, 1.0)
    assert [row["step"] for row in metrics_of(tmp_path)] == [0, 2]
    again = sgo_sae.Run(run.cfg, 6, CPU)
    again.history = run.history  # after a resume
    sgo_sae.write_log(again)
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]


def test_the_schedule_belongs_to_the_run(train_argv, tmp_path):
    """α is reached in a run of any length, and starts at the share of it that the paper's does."""
    cfg = sgo_sae.Config()
    steps = cfg.tokens // cfg.batch
    for step in (0, 1, 500, 999, 1000, 4881):
        assert sgo_sae.scheduled_alpha(cfg, step, steps) == sgo_sae.alpha_at(step)
    assert sgo_sae.scheduled_alpha(dataclasses.replace(cfg, alpha_start=0.0), 0, steps) == 0
    assert trained(train_argv(alpha=3, tokens=64 * 50, log_every=1)) == 0
    alphas = [row["alpha"] for row in metrics_of(tmp_path / "run")]
    rise = [3 * (2 / 15 + 13 / 15 * min(1, step / 10)) for step in range(50)]
    assert alphas == pytest.approx(rise)
    assert trained(train_argv(alpha=3, alpha_start=1, log_every=1, out=tmp_path / "c")) == 0
    assert metrics_of(tmp_path / "c")[0]["alpha"] == 1


def poisoned(monkeypatch, when):
    """From the step `when`(cfg, number of its steps so far) says, a run's activations are not
    finite.
    """
    real = sgo_sae.Run.step
    calls = {}

    def step(self, x_BD, *rest):
        calls[self.cfg.out] = calls.get(self.cfg.out, 0) + 1
        return real(
            self, x_BD * (float("nan") if when(self.cfg, calls[self.cfg.out]) else 1), *rest
        )

    monkeypatch.setattr(sgo_sae.Run, "step", step)


def test_one_bad_member_ends_alone(train_argv, tmp_path, result, monkeypatch):
    """Also where the grid is stopped and resumed after that."""
    bad = "topk-n64-k4-a0.05-s0"
    grid = ["--alpha", "0", "0.05", "--seed", "0", "1"]
    assert trained(train_argv(out=tmp_path / "whole") + grid) == 0
    with monkeypatch.context() as patch:
        poisoned(patch, lambda cfg, calls: bad in cfg.out and calls == 3)
        stop_at(patch, 17)
        assert trained(train_argv() + grid) in (2, 143)
    found = result([*train_argv(), *grid, "--resume"])
    assert found.code == 2 and f"{bad}: gradient not finite at step 2" in found.last
    assert bad not in found.out
    names = [path.parent.name for path in (tmp_path / "run").glob("*/cfg.json")]
    assert len(names) == 3
    assert bad not in names
    for name in names:
        assert weights_of(tmp_path / "whole" / name) == weights_of(tmp_path / "run" / name)


def test_a_penalty_that_outweighs_the_reconstruction_is_said_once(train_argv, tmp_path, result):
    err = result(train_argv(alpha=50, alpha_warmup=0, log_every=1)).err
    shares = [row["penalty_share"] for row in metrics_of(tmp_path / "run")]
    first = next(share for share in shares if share > 1)
    assert sum(share > 1 for share in shares) > 1
    assert err.count(f"αΩ is {first:.3g} times the reconstruction error") == 1
    assert err.count("times the reconstruction error") == 1


# ---------------------------------------------------------------------------------------- baselines


class Squares(sgo_sae.ThresholdSAE):
    """An architecture of one's own."""

    def activate(self, pre):
        return pre.relu().square()

    def adjust(self, lam, f_BN, lr):
        return lam


class Halves(SAE):
    """Top-k with formulas of its own, and no name by which SAELens knows it."""

    def pre_activations(self, x):
        return super().pre_activations(x) * 0.5

    def sparsity(self, pre_BN, f_BN):
        return f_BN.square().sum(1).mean()


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_other_architectures_and_their_gradients_match_the_formulas(arch):
    """jumprelu's threshold by the formulas of Rajamanoharan et al. 2024: (θ/ε) and
    (1/ε) times a rectangle of width ε,
    which is θ here; the derivative in log θ is θ times that in θ."""
    sae = ARCHITECTURES[arch](6, 20, 4).double()
    x_BD = torch.randn(50, 6, dtype=torch.float64)
    sae.start(torch.randn(1000, 6, dtype=torch.float64), 0.04)
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    for p in weights:
        p.data += 0.1 * torch.randn_like(p)
    terms = loss_terms(sae, x_BD, lambda f_BN: 0.0)
    loss = terms.reconstruction + 0.3 * terms.sparsity

    theta_N = sae.threshold().detach()
    pre_BN = (x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc
    if arch == "batchtopk":
        f_BN = torch.where(
            pre_BN >= pre_BN.flatten().sort(descending=True).values[50 * 4 - 1], pre_BN, 0
        )
        assert (terms.f_BN > 0).sum() == 50 * 4
        sae.adjust(0.04, terms.f_BN, 1e-3)
        assert sae.threshold().unique() == pytest.approx(f_BN[f_BN > 0].min().item())
    else:
        f_BN = torch.where(pre_BN > theta_N, pre_BN, 0)
    assert torch.allclose(terms.f_BN, f_BN, atol=1e-14)
    f_BN.retain_grad()
    expected = (sae.decode(f_BN) - x_BD).square().sum(1).mean()
    if arch == "relu":  # batchtopk has no sparsity term
        expected = expected + 0.3 * f_BN.sum(1).mean()
    grads = torch.autograd.grad(expected, [*weights, f_BN])
    ours = torch.autograd.grad(loss, weights + ([sae.theta_raw] if arch == "jumprelu" else []))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours[:4], grads[:4], strict=True))
    if arch == "jumprelu":
        assert terms.sparsity == (f_BN > 0).sum(1).double().mean()
        near_BN = ((pre_BN - theta_N).abs() < theta_N / 2).double() / theta_N
        assert 10 < (near_BN > 0).sum() < 400
        expected_N = (
            -(near_BN * (theta_N * grads[-1] + 0.3 / 50)).sum(0) * 30 * theta_N
        )  # θ is exp(30 theta_raw)
        assert torch.allclose(ours[-1], expected_N, atol=1e-10)


def test_batchtopks_threshold_is_a_running_mean_over_some_20_batches():
    sae = sgo_sae.BatchTopK(6, 3, 1)
    sae.adjust(0.04, torch.tensor([[0.0, 3, 1]]), 1e-3)
    assert sae.threshold().tolist() == [1, 1, 1]  # the first one counts whole
    sae.adjust(0.04, torch.tensor([[2.0, 0, 5]]), 1e-3)
    assert sae.threshold().tolist() == pytest.approx([1.05] * 3)


def test_batchtopks_threshold_is_the_mean_of_the_processes(monkeypatch):
    """Another one's smallest value of the batch is 3 here."""

    def all_reduce(t, operation):
        t += 3.0

    monkeypatch.setattr(sgo_sae.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sgo_sae.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(sgo_sae.dist, "all_reduce", all_reduce)
    sae = sgo_sae.BatchTopK(6, 3, 1)
    sae.adjust(0.04, torch.tensor([[0.0, 3, 1]]), 1e-3)
    assert sae.threshold().tolist() == [2, 2, 2]


def test_batchtopk_takes_exactly_k_a_token_where_many_tie():
    sae = sgo_sae.BatchTopK(8, 40, 5)
    pre_BN = (torch.randn(64, 40) * 2).round() / 2  # as coarse as bfloat16, and coarser
    f_BN = sae.activate(pre_BN)
    assert (f_BN > 0).sum() == 64 * 5
    assert (
        torch.equal(f_BN, pre_BN.where(f_BN > 0, 0))
        and f_BN[f_BN > 0].min() >= pre_BN[f_BN == 0].max()
    )


@pytest.mark.parametrize(
    "steps, sparsity, rel",
    [(200, 0.04, 0.2), (200, 1.0, 0.2), (1500, 0.001, 0.05), (1500, 1.0, 0.05)],
)
@pytest.mark.parametrize("arch", ["relu", "jumprelu"])
def test_sparsity_is_steered_to_k(arch, steps, sparsity, rel):
    """From a λ that is far off, and in a run so short that L0 has not settled when λ first meets
    it.
    """
    mix_DD = torch.randn(32, 32) * torch.linspace(2, 0.2, 32)[:, None]
    cfg = sgo_sae.Config(arch=arch, d_sae=96, k=5, lr=1e-3, alpha=0.0, lam=sparsity)
    run = sgo_sae.Run(cfg, 32, CPU)
    run.sae.start(torch.randn(512, 32) @ mix_DD, cfg.lam)
    l0 = []
    for step in range(steps):
        x_BD = torch.randn(512, 32) @ mix_DD
        run.step(x_BD, step, steps)
        l0.append((run.sae.encode(x_BD) > 0).sum(1).float().mean().item())
    assert statistics.mean(l0[-50:]) == pytest.approx(5, rel=rel)


def test_a_threshold_of_nearly_0_has_a_finite_gradient():
    sae = sgo_sae.JumpReLU(6, 20, 4)
    sae.theta_raw.data.fill_(-5.0)  # e^-150 is 0 in float32
    sae.sparsity(sae.pre_activations(torch.randn(50, 6)), None).backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)
    assert (sae.threshold() > 0).all()


class Twice(sgo_sae.ThresholdSAE):
    """A ReLU by other formulas: its values are halved and its encoder is twice what it says."""

    saelens_name = "standard"

    def activate(self, pre):
        return (2 * pre).relu() / 2


class Named(SAE):
    """Top-k by other formulas than those of its name."""

    saelens_name = "topk"

    def activate(self, pre):
        return super().activate(pre).square()


class NoThreshold(SAE):
    saelens_name = "jumprelu"


class LearnedGain(SAE):
    """It is a top-k autoencoder only before it is trained."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def activate(self, pre):
        return self.gain * super().activate(pre)


class OtherDecoder(SAE):
    def decode(self, f):
        return 0.5 * super().decode(f)


def test_an_architecture_of_ones_own_is_one_class_and_one_name(train_argv, tmp_path, monkeypatch):
    """It is trained by its formulas, and saved as what it computes."""
    monkeypatch.setitem(ARCHITECTURES, "squares", Squares)
    run = sgo_sae.Run(sgo_sae.Config(arch="squares", d_sae=20, k=4, alpha=0.0), 6, CPU)
    x_BD = torch.randn(40, 6)
    f_BN = run.sae.pre_activations(x_BD).relu() ** 2
    assert torch.equal(run.terms(x_BD).f_BN, f_BN)
    monkeypatch.setitem(ARCHITECTURES, "twice", Twice)
    monkeypatch.setitem(sgo_sae.CHOICES, "arch", tuple(ARCHITECTURES))
    assert trained(train_argv(arch="twice")) == 0
    assert json.loads((tmp_path / "run" / "cfg.json").read_text())["architecture"] == "standard"
    assert (sgo_sae.load_sae(tmp_path / "run").threshold() == 0).all()


@pytest.mark.parametrize("own", [Squares, Halves, Named, NoThreshold, OtherDecoder, LearnedGain])
def test_a_class_that_is_saved_as_another_is_refused_before_the_first_step(
    train_argv, tmp_path, monkeypatch, result, own
):
    monkeypatch.setitem(ARCHITECTURES, "own", own)
    monkeypatch.setitem(sgo_sae.CHOICES, "arch", tuple(ARCHITECTURES))
    monkeypatch.setattr(sgo_sae.Run, "step", None)
    assert "--arch own would be saved as" in result(train_argv(arch="own")).refusal
    assert not (tmp_path / "run").exists()


def test_a_class_of_ones_own_trains_by_its_formulas(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "halves", Halves)
    run = sgo_sae.Run(sgo_sae.Config(arch="halves", d_sae=20, k=4), 6, CPU)
    x_BD = torch.randn(40, 6)
    expected, found = loss_terms(run.sae, x_BD), run.terms(x_BD)
    for name in ("reconstruction", "sparsity", "omega"):
        assert torch.allclose(getattr(found, name), getattr(expected, name))
    weights = list(run.sae.parameters())
    gradients = [torch.autograd.grad(t.reconstruction, weights) for t in (expected, found)]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_of_any_architecture_ends_by_itself_where_activations_are_not_finite(arch):
    run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=20, k=4), 6, torch.device("cpu"))
    run.step(torch.full((50, 6), math.nan), 0, 10)
    assert "gradient not finite at step 0" in run.failure
    if arch == "batchtopk":  # nor does a batch in which nothing is active end it
        assert (
            run.sae.adjust(0.04, torch.zeros(5, 20), 0.1) == 0.04 and run.sae.theta.isfinite().all()
        )


# ---------------------------------------------------------------------------------------- processes


def test_processes_take_turns_at_contexts(model, texts, monkeypatch):
    """Two processes read, between them, what one reads; each forward pass is of their own."""
    settings = {"model": model[0], "dataset": texts, "layer": 1, "ctx": 16, "buffer": 16}
    cfg = sgo_sae.Config(**settings, batch=16)
    reader = sgo_sae.load_lm(cfg.model, cfg.layer, CPU, torch.float32)
    read = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(sgo_sae.dist, "is_initialized", lambda world=world: world > 1)
        monkeypatch.setattr(sgo_sae.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(sgo_sae.dist, "get_world_size", lambda world=world: world)
        with contexts_noted() as passes:
            next(sgo_sae.batches(cfg, reader))
        read[rank, world] = torch.cat(passes).tolist()
    assert len(read[0, 1]) == 16
    assert read[0, 2] == read[0, 1][::2]
    assert read[1, 2] == read[0, 1][1::2]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


TWO_PROCESSES = """
import math, os, sys, torch, sgo_sae
import torch.distributed as dist
torch.set_num_threads(1)
sgo_sae.PAIRS_PAY = {"cpu": 0 if sys.argv[1] == "pairs" else math.inf}
real = dist.all_reduce
def all_reduce(tensor, *args):  # as ProcessGroupNCCL's check_gpu_single_tensor
    if not tensor.is_contiguous():
        raise ValueError("Tensors must be contiguous")
    return real(tensor, *args)
dist.all_reduce = all_reduce
dist.init_process_group("gloo")
rank, world = sgo_sae.rank(), sgo_sae.n_processes()
together = sgo_sae.torchrun
steps = 6
generators = [torch.Generator().manual_seed(i) for i in range(steps)]
batches = [torch.randn(64, 16, generator=generator) * 3 for generator in generators]
cases = [("topk", "uniform")]
cases += [(arch, "coactivation") for arch in ("topk", "batchtopk", "relu", "jumprelu")]
for arch, weights in cases:
    for plain in (False, True):
        out = f'{sys.argv[2]}/{rank}'
        cfg = sgo_sae.Config(arch=arch, d_sae=96, k=4, lr=1e-2, batch=64,
                             alpha_start=0.05, plain=plain, pair_weights=weights, out=out)
        os.makedirs(cfg.out, exist_ok=True)
        found = []
        for several in (True, False):
            sgo_sae.torchrun = together if several else lambda: False
            share = [x.chunk(world)[rank] for x in batches] if several else batches
            run = sgo_sae.Run(cfg, 16, batches[0].device)
            if arch != "topk":
                run.sae.start(batches[0], cfg.lam)
            for step, x_BD in enumerate(share):
                run.step(x_BD, step, steps)
            assert run.failure is None
            run.log(x_BD, steps, 1.0)
            figures = {k: torch.tensor(v or 0.0) for k, v in run.history[-1].items()}
            del figures['seconds']
            figures['last_fired_N'] = run.last_fired_N.double()
            found.append(run.sae.state_dict() | figures)
        sgo_sae.torchrun = together
        ours, alone = found
        apart = {n: (ours[n] - alone[n]).abs() / (1 + alone[n].abs()) for n in alone}
        difference = max(apart[n].max().item() for n in apart)
        if rank == 0:
            print(arch, weights, plain, difference, flush=True)
"""


@pytest.mark.parametrize("way", ["pairs", "tiles"])
def test_two_processes_train_as_one_does_under_the_rule_of_nccl(tmp_path, way):
    """batchtopk selects among a process's own tokens, so that it trains, but not as one process
    does.
    """
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    result = python(*TORCHRUN, tmp_path / "two.py", way, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    differences = {tuple(case): float(difference) for *case, difference in lines}
    assert len(differences) == 10
    exact = [differences[key] for key in differences if key[0] != "batchtopk"]
    assert max(exact) < 1e-5, result.stdout


TWO = LONG | {"tokens": 64 * 300}  # the run of two processes


@pytest.fixture(scope="module")
def whole_by_two(model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    result = python(*TORCHRUN, SCRIPT, *flags(model[0], texts, out, **TWO))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("saved in") == 1  # by the first process alone
    return out


@slow
def test_two_processes_are_stopped_and_resumed(train_argv, tmp_path, whole_by_two):
    argv = train_argv(**TWO)
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, SCRIPT, *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert "stopped after step" in process.communicate(timeout=60)[1]
    assert python(*TORCHRUN, SCRIPT, *argv, "--resume").returncode == 0
    assert weights_of(whole_by_two) == weights_of(tmp_path / "run")
    assert metrics_of(whole_by_two) == metrics_of(tmp_path / "run")


LOSES_DATA = """
import itertools, os, sys, sgo_sae
real = sgo_sae.batches
def batches(*args):
    for n, batch in enumerate(real(*args)):
        if n == 270 and os.environ["RANK"] == "1":
            raise OSError("connection reset")
        yield batch
sgo_sae.batches = batches
sys.exit(sgo_sae.main(sys.argv[1:]))
"""


@slow
def test_data_that_one_of_two_processes_can_not_read_ends_both_with_a_checkpoint(
    train_argv, tmp_path, whole_by_two
):
    argv = train_argv(**TWO)
    (tmp_path / "loses.py").write_text(LOSES_DATA)
    result = python(*TORCHRUN, tmp_path / "loses.py", *argv)
    assert result.returncode == 1
    assert "stopped after step 270; the same command with --resume goes on" in result.stderr
    assert "connection reset" in result.stderr and "another process ended the run" in result.stderr
    assert python(*TORCHRUN, SCRIPT, *argv, "--resume").returncode == 0
    assert weights_of(whole_by_two) == weights_of(tmp_path / "run")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@slow
def test_two_nodes_that_share_no_folder_are_stopped_and_resumed(train_argv, tmp_path, whole_by_two):
    """Two machines are two folders here. The second one has no checkpoint."""

    def start(*more):
        argv = train_argv(out="run", **TWO)
        nodes = []
        place = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        for node in (0, 1):
            (tmp_path / str(node)).mkdir(exist_ok=True)
            launch = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", *place]
            command = [sys.executable, *launch, SCRIPT, *argv, *more]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            nodes.append(subprocess.Popen(command, cwd=tmp_path / str(node), **pipes))
        return nodes

    nodes = start()
    while not (tmp_path / "0" / "run" / "checkpoint.pt").exists():
        assert nodes[0].poll() is None
        time.sleep(0.01)
    for node in nodes:
        node.terminate()
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert "--resume goes on" in said[0]
    assert not (tmp_path / "1" / "run").exists()
    nodes = start("--resume")
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert weights_of(tmp_path / "0" / "run") == weights_of(whole_by_two)


ALONE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_a_process_that_waits_for_others_gives_up_in_a_line_and_can_be_stopped(train_argv):
    program = (
        "import sys, sgo_sae; sgo_sae.JOIN_MINUTES = 0.03; sys.exit(sgo_sae.main(sys.argv[1:]))"
    )
    environment = ALONE | {"MASTER_PORT": str(free_port())}
    result = python("-c", program, *train_argv(), **environment)
    assert result.returncode == 2
    assert "several processes are started by torchrun" in result.stderr.splitlines()[-1]
    environment = os.environ | ALONE | {"MASTER_PORT": str(free_port())}
    command = [sys.executable, SCRIPT, *train_argv()]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    time.sleep(6)  # so that it waits
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM


SLOW_STEP = """
import signal, sys, time, sgo_sae
def step(*args):
    print("in a step", flush=True)
    for _ in range(600):
        time.sleep(0.1)
sgo_sae.Run.step = step
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(sgo_sae.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["taken", "ignored"])
def test_a_second_signal_ends_a_run_at_once_and_one_that_is_ignored_none(train_argv, how):
    """As nohup ignores SIGHUP."""
    command = [sys.executable, "-c", SLOW_STEP, how, *train_argv()]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)  # as torchrun hands on what a scheduler has sent to all
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    if how == "ignored":
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    ended_by = {"taken": signal.SIGHUP, "ignored": signal.SIGINT}[how]
    assert process.wait(timeout=10) == -ended_by


def signal_in_pass(monkeypatch, n, number):
    """Sends this process a signal during the n-th pass of the language model from now on."""
    reading = before_call(n, sgo_sae.layer_output, partial(os.kill, os.getpid(), number))
    monkeypatch.setattr(sgo_sae, "layer_output", reading)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_in_a_line(
    train_argv, tmp_path, monkeypatch, result, number
):
    signal_in_pass(monkeypatch, 3, number)
    found = result(train_argv())
    assert found.code == 128 + number and found.last == "sgo_sae.py: stopped"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_batch_is_read_stops_before_the_next_pass(
    train_argv, tmp_path, monkeypatch, result, whole
):
    """A round has four passes, and 86 rounds are read before the first step."""
    argv = train_argv(**LONG)
    with monkeypatch.context() as patch, contexts_noted() as passes:
        signal_in_pass(patch, 4 * 100 + 2, signal.SIGTERM)
        found = result(argv)
    assert found.code == 143 and "stopped after step" in found.err
    assert len(passes) == 4 * 100 + 2  # the pass in which the signal came is the last
    assert trained([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


@pytest.mark.parametrize(
    "environment, code, words",
    [
        ({"WORLD_SIZE": "1"}, 0, "saved in"),
        ({"WORLD_SIZE": "2"}, 2, "several processes are started by torchrun"),
        ({"WORLD_SIZE": "many"}, 2, "several processes are started by torchrun"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 2, "several processes are started by torchrun"),
    ],
)
def test_what_a_cluster_sets_is_understood_or_told(train_argv, environment, code, words):
    result = python(SCRIPT, *train_argv(), **environment)
    assert result.returncode == code and words in result.stdout + result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_the_device_of_several_processes(monkeypatch):
    """torchrun's number of a process chooses its GPU, where it is to use one."""
    chosen = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(sgo_sae.dist, "rendezvous", lambda *args, **more: iter([(None, 1, 2)]))
    monkeypatch.setattr(sgo_sae.dist, "init_process_group", lambda **group: None)
    sgo_sae.start_processes("cpu")
    assert chosen == []
    sgo_sae.start_processes("auto")
    sgo_sae.start_processes("cuda")
    assert chosen == [1, 1]
    with pytest.raises(InputError, match="--device cuda:1: torchrun gives each process a GPU"):
        sgo_sae.start_processes("cuda:1")


def test_what_nccl_says_is_told(monkeypatch, capsys):
    def work(argv):
        raise RuntimeError("NCCL error: Duplicate GPU detected")

    monkeypatch.setattr(sgo_sae, "torchrun", lambda: True)
    assert sgo_sae.main([], work) == 2
    assert "Duplicate GPU detected" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- texts


WRITERS = {
    "txt": lambda frame, path: path.write_text("\n\n".join(frame["text"])),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "csv": lambda frame, path: frame.to_csv(path),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "jsonl.zst": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "csv.xz": lambda frame, path: frame.to_csv(path),
    "JSONL.bz2": lambda frame, path: frame.to_json(path, orient="records", lines=True),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("in_folder", [False, True])
def test_local_texts_are_read(tmp_path, form, in_folder):
    rows = [f"document {i}: {TEXT.strip()}" for i in range(30)]
    frame = pandas.DataFrame({"text": rows, "n": 1})
    WRITERS[form](frame[:15], tmp_path / f"a.{form}")
    WRITERS[form](frame if not in_folder else frame[15:], tmp_path / f"b.{form}")
    path = tmp_path if in_folder else tmp_path / f"b.{form}"
    cfg = sgo_sae.Config(dataset=str(path))
    read = list(islice(sgo_sae.read_texts(cfg), 60))
    assert sorted(read[:30]) == sorted(read[30:]) == sorted(rows)
    assert read[:30] != read[30:]  # the second pass is shuffled anew


def test_odd_documents_are_passed_over(tmp_path):
    path = tmp_path / "odd.jsonl"
    write_rows(path, [{"text": t} for t in ["", None, "  ", "good one", None, "another"]])
    cfg = sgo_sae.Config(dataset=str(path))
    texts = sgo_sae.read_texts(cfg)
    assert sorted(islice(texts, 2)) == ["another", "good one"]


def texts_read(path, **settings):
    """The texts that training reads of a path, in the order of reading."""
    cfg = sgo_sae.Config(dataset=str(path), **settings)
    with sgo_sae.loading(str(path)):
        rows = sgo_sae.open_dataset(cfg, (cfg.text_column,))
        return list(sgo_sae.texts_in(rows, cfg.text_column))


def test_only_the_text_column_matters(tmp_path, capsys):
    """Columns that come, go or change their type, rows that are none, and bad lines cost nothing
    else.
    """
    rows = [{"text": f"a{i}", "meta": None} for i in range(300)]
    rows += [{"meta": {"deep": [i]}, "text": f"b{i}", "more": 1.5} for i in range(300)]
    rows += [{"text": f"c{i}", "meta": "now a string"} for i in range(300)]
    lines = [json.dumps(row) for row in rows]
    expected = [row["text"] for row in rows]
    odd = ['{"text": "half', "17", '["listed"]', "", '{"text": ' + "[" * 10**5, '{"other": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:600], *odd, *lines[600:]]))
    assert texts_read(tmp_path / "a.jsonl") == expected
    assert capsys.readouterr().err.count("lines that are no JSON object are left out") == 1
    other = {"text": [f"d{i}" for i in range(9)], "score": range(9)}
    pandas.DataFrame(other).to_parquet(tmp_path / "1.parquet")
    other = {"score": [str(i) for i in range(9)], "text": [f"e{i}" for i in range(9)]}
    pandas.DataFrame(other).to_parquet(tmp_path / "2.parquet")
    rows = sgo_sae.rows_of([f"{tmp_path}/1.parquet", f"{tmp_path}/2.parquet"], ("text",))
    assert all(list(row) == ["text"] for row in rows)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.jsonl.bak")
    assert texts_read(tmp_path) == [f"{x}{i}" for x in "de" for i in range(9)]
    long = "many words " * 20_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\nshort\n")
    assert texts_read(tmp_path / "long.csv") == [long, "short"]
    ragged = 'id,text\n1,x\n2\n3,y,z\n"4","a ""b""\nc"\n'
    (tmp_path / "ragged.csv").write_text(ragged)
    assert texts_read(tmp_path / "ragged.csv") == ["x", "y", 'a "b"\nc']


def test_what_is_written_is_what_is_read(tmp_path):
    written = [
        "NA",
        "None",
        "null",
        "nan",
        "007",
        "1e5",
        "true",
        "#N/A",
        " n/a ",
        "-",
        "2020-01-01",
    ]
    lines = ["text,label", *[f"{text},{text}" for text in written]]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "a.txt").write_text("\n\n".join(written))
    write_rows(tmp_path / "a.jsonl", [{"text": text, "label": text} for text in written])
    for name in ("a.csv", "a.txt", "a.jsonl"):
        assert texts_read(tmp_path / name) == written
    for name in ("a.csv", "a.jsonl"):
        frame = eval_sae.file_frame(str(tmp_path / name))
        assert frame["label"].tolist() == written


def test_a_pattern_chooses_files(tmp_path, capsys):
    """A folder is read if its data files are of one kind; what is hidden is none of them."""
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "more/train-2.jsonl", ".a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}])
    for name in ("README.md", "notes", "train.jsonl.bak", "data.zip"):
        (tmp_path / name).write_text("no data")
    assert texts_read(tmp_path) == ["test.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert "3 files are read" in capsys.readouterr().err
    assert texts_read(tmp_path / "train-*.jsonl") == ["train-0.jsonl", "train-1.jsonl"]
    sgo_sae.check_name(f"{tmp_path}/train-*.jsonl")
    with pytest.raises(InputError, match="no such file"):
        texts_read(tmp_path / "valid-*.jsonl")
    deep = texts_read(tmp_path / "**" / "train-*.jsonl")
    assert sorted(deep) == ["more/train-2.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert texts_read(tmp_path / "test.jsonl") == ["test.jsonl"]
    (tmp_path / "latest.csv").write_text("text\na")
    for name in ("", "data.zip", "*.zip"):
        with pytest.raises(InputError, match="a pattern such as"):
            texts_read(f"{tmp_path}/{name}")
    for wrong in ({"split": "test"}, {"subset": "en"}):
        with pytest.raises(InputError, match="name the files"):
            texts_read(tmp_path / "test.jsonl", **wrong)


def test_documents_of_a_txt_are_between_blank_lines(tmp_path):
    """Lines of spaces are blank; a file without any is read in parts, and loses nothing."""
    (tmp_path / "a.txt").write_text("one\ntwo\n \t\nthree\r\n\r\n\n\nfour")
    assert texts_read(tmp_path / "a.txt") == ["one\ntwo", "three", "four"]


def test_a_file_that_loses_its_text_ends_the_reading(tmp_path):
    """Else it would be read for ever."""
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    cfg = sgo_sae.Config(dataset=str(tmp_path / "a.jsonl"))
    texts = sgo_sae.read_texts(cfg)
    assert [next(texts), next(texts)] == ["one", "one"]
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no text any more"):
        next(texts)


@pytest.mark.parametrize("end", [" ", "\n", ""])
def test_a_document_of_any_length_is_read_in_parts(tmp_path, monkeypatch, end):
    """Nothing is lost, and what is held to be shuffled has a bound."""
    monkeypatch.setattr(sgo_sae, "LONGEST", 1000)
    monkeypatch.setattr(sgo_sae, "HELD", 4)
    text = "".join(f"word{i}{end}" for i in range(2000))
    (tmp_path / "a.txt").write_text(f"first\n\n{text}\n\nlast")
    write_rows(tmp_path / "a.jsonl", [{"text": "first"}, {"text": text}, {"text": "last"}])
    for name in ("a.txt", "a.jsonl"):
        read = texts_read(tmp_path / name)
        assert "".join(read).replace("\n", "") == f"first{text}last".replace("\n", "")
        assert len(read) > 5 and max(map(len, read)) <= 1000
        shuffled = list(sgo_sae.texts_of(sgo_sae.Config(dataset=str(tmp_path / name))))
        assert sorted(shuffled) == sorted(read) and shuffled != read


def test_what_is_not_utf_8_is_replaced_or_refused(tmp_path, capsys):
    text = "naïve café → 漢字"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "mark.jsonl").write_bytes(f"{row}\n{row}\n".encode("utf-8-sig"))
    assert texts_read(tmp_path / "mark.jsonl") == [text, text]
    (tmp_path / "real.jsonl").write_text(json.dumps({"text": "a � b"}, ensure_ascii=False))
    assert texts_read(tmp_path / "real.jsonl") == ["a � b"]
    assert "UTF-8" not in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("première\n\ndéjà vu\n\nplain".encode("latin-1"))
    assert texts_read(tmp_path / "latin.txt") == ["premi�re", "d�j� vu", "plain"]
    assert capsys.readouterr().err.count("are not UTF-8") == 1
    halves = ("\\ud800", "\\ud83d", "\\udfff")  # of surrogate pairs
    (tmp_path / "half.jsonl").write_text("".join(f'{{"text": "a {half} b"}}\n' for half in halves))
    assert texts_read(tmp_path / "half.jsonl") == ["a � b"] * 3
    for encoding, name in product(("utf-16", "utf-32"), ("a.txt", "a.jsonl")):
        (tmp_path / name).write_bytes(f"{row}\n{row}\n".encode(encoding))
        with pytest.raises(InputError, match="has no text"):
            sgo_sae.check_texts(sgo_sae.Config(dataset=str(tmp_path / name)))


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub on this machine that answers every request as the real one answers for a gated or
    missing repository.
    """

    def answer(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access is restricted" if gated else "Not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("place", ["here", "hub"])
def test_the_order_of_texts_is_that_of_datasets(tmp_path, monkeypatch, place):
    """Of a local file, and of the Hub's files, as `datasets` shuffles them in each epoch."""
    import datasets

    texts = {n: [f"{n} {i}" if i % 7 else " " for i in range(1300)] for n in "abc"}
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts["a"]])

    def rows_of(names):
        for name in names:
            for text in texts[name]:
                yield {"text": text}

    names = ["a"] if place == "here" else ["a", "b", "c"]
    rows = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"names": names})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: rows)
    expected = rows.filter(lambda row: row["text"] != " ").shuffle(seed=5, buffer_size=1000)
    path = "some/name" if place == "hub" else str(tmp_path / "a.jsonl")
    cfg = sgo_sae.Config(dataset=path, data_seed=5)
    for epoch in (0, 1, 2):
        expected.set_epoch(epoch)
        assert list(sgo_sae.texts_of(cfg, epoch)) == [row["text"] for row in expected]


def test_several_files_are_read_in_another_order_each_time(tmp_path):
    for n in range(5):
        write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(1300)])
    cfg = sgo_sae.Config(dataset=str(tmp_path))
    first, again, second = (list(sgo_sae.texts_of(cfg, epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(first) == sorted(second) == sorted(texts_read(tmp_path))
    assert len({text[0] for text in first[:300] + second[:300]}) > 1


def test_a_path_means_the_same_tomorrow(model, texts, tmp_path, monkeypatch):
    """Relative paths, links and patterns are kept as absolute paths, and names of the Hub as they
    are."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(model[0])
    shutil.copytree(model[0], tmp_path / "here" / "gpt2")
    shutil.copy(texts, tmp_path / "here" / "texts.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    settings = {"../link": model[0], "gpt2": str(tmp_path / "here" / "gpt2")}
    for n, (name, path) in enumerate(settings.items()):
        dataset = ["texts.jsonl", "*.jsonl"][n]
        assert trained(flags(name, dataset, tmp_path / str(n))) == 0
        metadata = json.loads((tmp_path / str(n) / "cfg.json").read_text())["metadata"]
        assert metadata["model_name"] == metadata["settings"]["model"] == path
        assert metadata["dataset_path"] == str(tmp_path / "here" / dataset)
    assert sgo_sae.absolute("google/gemma-2-2b") == "google/gemma-2-2b"


def test_local_files_need_no_home(train_argv):
    """Nor a cache of the Hub's libraries that can be written."""
    nowhere = {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere"}
    result = python(SCRIPT, *train_argv(), **nowhere)
    assert result.returncode == 0, result.stderr
    assert not Path("/proc/nowhere").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"model": "some/gated-model"},
            "gated repo. Make sure to have access to it at https://huggingface.co/some/gated-model",
        ),
        (
            {"model": "some/missing-model"},
            "is not a local folder and is not a valid model identifier",
        ),
        ({"dataset": "some/missing-data"}, "doesn't exist on the Hub or cannot be accessed"),
    ],
)
def test_what_the_hub_refuses_is_explained(train_argv, tmp_path, hub, settings, words):
    result = python(SCRIPT, *train_argv(**settings), HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert (
        result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    ), result.stderr
    assert not (tmp_path / "run").exists()


def test_no_network_is_explained(train_argv, tmp_path):
    def run(settings):  # the Hub's libraries try again for half a minute: both cases at once
        argv = train_argv(out=tmp_path / next(iter(settings)), **settings)
        return python(SCRIPT, *argv, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, [{"model": "some/model"}, {"dataset": "some/data"}]):
            assert result.returncode == 2 and re.search(
                "couldn't connect|Couldn't reach", result.stderr
            ), result.stderr
            assert len(result.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------- language model


@pytest.mark.parametrize("kind", ["gpt2", "bert", "multimodal gemma3"])
def test_other_models_load(model, tmp_path, kind):
    import transformers as t

    model[2].save_pretrained(tmp_path)
    sizes = {"vocab_size": len(model[2]), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "gpt2":
        full = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, **sizes))
    elif kind == "bert":
        full = t.BertForMaskedLM(t.BertConfig(hidden_size=16, **heads, **sizes))
    else:  # 3 layers in the vision tower too, and wider ones: the text model's are wanted
        attention = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
        text = t.Gemma3TextConfig(hidden_size=16, **attention, **heads, **sizes)
        vision = t.SiglipVisionConfig(hidden_size=64, image_size=28, patch_size=14, **heads)
        cfg = t.Gemma3Config(text_config=text, vision_config=vision)
        full = t.Gemma3ForConditionalGeneration(cfg)
    full.eval().save_pretrained(tmp_path)
    lm, module = loaded((tmp_path,), 1)
    ids_BL = torch.randint(3, 40, (2, 9))
    with torch.inference_mode():
        expected = full(ids_BL, output_hidden_states=True).hidden_states[2]
        assert torch.equal(sgo_sae.layer_output(lm, module, ids_BL), expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    "kind", ["minicpm3", "gemma4", "esm", "nemotron_h", "gpt1", "ettin", "opt", "qwen3"]
)
def test_layers_are_those_of_the_whole_model_bit_for_bit(model, tmp_path, kind, layer):
    """Also where a model's layers depend on how many there are. The later ones are not loaded."""
    whole = saved(kind, model, tmp_path)
    ids_BL = torch.randint(3, 80, (3, 12))
    outputs = []
    paths = [
        p
        for p, m in whole.named_modules()
        if re.fullmatch(rf"(\w+\.)*(layers|layer|h)\.{layer}", p)
    ]
    path = min(paths, key=len)
    whole.get_submodule(path).register_forward_hook(lambda m, args, output: outputs.append(output))
    with torch.inference_mode():
        whole(ids_BL)
    expected = outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]
    lm, module = loaded((tmp_path,), layer)
    assert torch.equal(sgo_sae.layer_output(lm, module, ids_BL), expected)
    if kind != "esm":  # which has no causal model
        part, *_ = sgo_sae.load_lm(tmp_path, layer, CPU, torch.float32, whole=True)
        assert torch.equal(sgo_sae.layer_output(part, part.get_submodule(path), ids_BL), expected)
    n_layers = 12 if kind == "gemma4" else 4
    assert not any(
        re.fullmatch(rf"(\w+\.)*(layers|layer|h)\.{n_layers - 1}", p) for p, _ in lm.named_modules()
    )


@pytest.mark.parametrize("kind, most", [("opt", 40), ("roberta", 39), ("gpt1", 40), ("qwen3", 40)])
def test_positions_that_a_model_has_not_are_refused(
    train_argv, model, texts, tmp_path, result, kind, most
):
    saved(kind, model, tmp_path / "lm")
    assert result(train_argv(model=tmp_path / "lm", ctx=most)).code == 0
    longer = result(train_argv(model=tmp_path / "lm", ctx=most + 1, out=tmp_path / "b"))
    text = ["--text", texts, "--contexts", 9, "--metrics", "core"]
    measured = result([tmp_path / "run", *text, "--ctx", most + 1])
    for found in (longer, measured):
        assert found.code == 2 and f"was made for {most} tokens" in found.err


def vision_model():
    """A small LLaVA: its text part is a Llama."""
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = 4
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes}
    text = {"model_type": "llama", "vocab_size": 300, "num_key_value_heads": 1, **sizes}
    cfg = t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=299)
    return t.LlavaForConditionalGeneration(cfg)


def base_model():
    """A GPT-2 that was saved without its head."""
    import transformers as t

    return t.GPT2Model(t.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=40, vocab_size=300))


def model_with_a_head():
    import transformers as t

    return t.GPT2LMHeadModel(base_model().config)


@pytest.mark.parametrize("made", [vision_model, base_model, model_with_a_head])
def test_a_model_is_of_the_class_that_its_configuration_names(
    train_argv, model, texts, tmp_path, result, made
):
    """The file names a module of that class, and what can be trained on can be evaluated."""
    torch.manual_seed(0)
    whole = made().eval()
    whole.save_pretrained(tmp_path / "lm")
    model[2].save_pretrained(tmp_path / "lm")
    found = result(train_argv(model=tmp_path / "lm"))
    assert found.code == 0 and "are not used" not in found.err
    metadata = json.loads((tmp_path / "run" / "cfg.json").read_text())["metadata"]
    module = whole.get_submodule(metadata["hf_hook_name"])
    ids_BL = torch.randint(3, 80, (2, 9))
    reader = sgo_sae.load_lm(str(tmp_path / "lm"), 1, CPU, torch.float32)
    expected = sgo_sae.layer_output(reader.lm, reader.layer, ids_BL)
    assert torch.equal(sgo_sae.layer_output(whole, module, ids_BL), expected)
    text = ["--text", texts, "--contexts", 9]
    assert result([tmp_path / "run", *text, "--metrics", "core", "competition"]).code == 0
    found = result([tmp_path / "run", *text, "--metrics", "behaviour"])
    assert found.code == (2 if made is base_model else 0)  # which has no head


def test_tensors_that_a_model_does_not_take_are_said(train_argv, model, tmp_path, result):
    """Such as scales and biases; those of later layers are not missed. An adapter is refused."""
    shutil.copytree(model[0], tmp_path / "lm")
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    for layer in (0, 3):
        weights[f"model.layers.{layer}.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    found = result(train_argv(model=tmp_path / "lm"))
    assert found.code == 0
    assert re.search(r"1 tensors .* not used, model.layers.0.mlp.up_proj.weight_scale", found.err)
    torch.manual_seed(0)
    base_model().save_pretrained(tmp_path / "gpt2")  # its names lack those of the head's class
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    model[2].save_pretrained(tmp_path / "gpt2")
    found = result(train_argv(model=tmp_path / "gpt2", out=tmp_path / "b"))
    assert found.code == 0 and "are not used" not in found.err
    (tmp_path / "lm" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    argv = train_argv(model=tmp_path / "lm", out=tmp_path / "other")
    assert "adapter" in result(argv).refusal


@pytest.mark.parametrize("kind", ["gemma2", "opt", "gpt1", "qwen3"])
def test_cfg_names_the_module_in_the_model_with_its_head(train_argv, model, tmp_path, kind):
    import transformers

    folder = model[0]
    if kind != "gemma2":
        folder = tmp_path / "lm"
        saved(kind, model, folder)
    assert trained(train_argv(model=folder)) == 0
    metadata = json.loads((tmp_path / "run" / "cfg.json").read_text())["metadata"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    module = whole.get_submodule(metadata["hf_hook_name"])
    last = metrics_of(tmp_path / "run")[-1]
    assert metadata["l0"] == last["l0"] and metadata["dead_latents"] == last["dead"]
    ids_BL = torch.randint(3, 80, (2, 9))
    reader = sgo_sae.load_lm(folder, 1, CPU, torch.float32)
    expected = sgo_sae.layer_output(reader.lm, reader.layer, ids_BL)
    assert torch.equal(sgo_sae.layer_output(whole.eval(), module, ids_BL), expected)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("arch", ARCHS)
def test_normalize_folds_back_into_the_saved_weights(tmp_path, arch):
    (sae, x_BD) = random_sae(arch)
    scale = 0.37
    sgo_sae.save_sae(sae, sgo_sae.Config(arch=arch), tmp_path, scale)
    folded = sgo_sae.load_sae(tmp_path)
    assert torch.allclose(folded(x_BD), sae(x_BD * scale) / scale, atol=1e-5)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)


@pytest.mark.parametrize(
    "arch, name", list(zip(ARCHS, ["topk", "jumprelu", "standard", "jumprelu"]))
)
def test_saved_and_loaded_outputs_are_identical(tmp_path, arch, name):
    sae, x_BD = random_sae(arch)
    sgo_sae.save_sae(sae, sgo_sae.Config(k=4, arch=arch), tmp_path)
    again = sgo_sae.load_sae(tmp_path)
    assert torch.equal(again(x_BD), sae(x_BD))
    assert torch.equal(again.encode(x_BD), sae.encode(x_BD))
    modes = {(tmp_path / file).stat().st_mode for file in ("cfg.json", "sae_weights.safetensors")}
    assert len(modes) == 1  # whoever may read the one may read the other
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == name
    assert cfg["metadata"]["hook_name"] == "blocks.12.hook_resid_post"
    assert cfg["metadata"]["sae_lens_version"] == "6.0.0"  # without it SAELens drops the metadata
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    shapes = {"W_enc": (8, 32), "b_enc": (32,), "W_dec": (32, 8), "b_dec": (8,)}
    if name == "jumprelu":
        shapes["threshold"] = (32,)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes


@pytest.mark.parametrize("arch", ARCHS)
def test_saelens_loads_the_folder(tmp_path, arch):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    sae, x_BD = random_sae(arch)
    sgo_sae.save_sae(sae, sgo_sae.Config(k=4, arch=arch), tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    metadata = theirs.cfg.metadata
    assert metadata.model_name == sgo_sae.Config.model and metadata.context_size == 128
    assert metadata.hook_name == "blocks.12.hook_resid_post" and metadata.settings["k"] == 4
    assert torch.allclose(theirs.encode(x_BD), sae.encode(x_BD), atol=1e-4)
    assert torch.allclose(theirs(x_BD), sae(x_BD), atol=1e-4)


def test_folders_of_saelenss_trainer_load_with_its_latents(tmp_path):
    """rescale_acts_by_decoder_norm selects by the product of latents and decoder norms, which here
    differ.
    """
    weights, x_BD = foreign_weights()
    write_foreign(tmp_path, weights, architecture="topk", k=4, rescale_acts_by_decoder_norm=True)
    norm_N = weights["W_dec"].norm(dim=1)
    pre_BN = ((x_BD - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu() * norm_N
    f_BN = torch.where(pre_BN >= pre_BN.sort(descending=True).values[:, 3:4], pre_BN, 0)
    for sae in (sgo_sae.load_sae(tmp_path), eval_sae.open_sae(tmp_path, "cpu")):
        assert torch.allclose(sae.encode(x_BD), f_BN, atol=1e-4)
        assert torch.allclose(
            sae(x_BD), f_BN @ (weights["W_dec"] / norm_N[:, None]) + weights["b_dec"], atol=1e-4
        )
    assert eval_sae.open_sae(tmp_path, "cpu").cfg.model_from_pretrained_kwargs == {}


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        {"architecture": "gated"},
        {"architecture": "topk", "k": 4, "normalize_activations": "expected_average_only_in"},
    ],
)
def test_folders_whose_latents_would_be_others_are_refused(tmp_path, cfg):
    write_foreign(tmp_path, foreign_weights()[0], **cfg)
    with pytest.raises(InputError, match="and known are"):
        sgo_sae.load_sae(tmp_path)


@pytest.mark.parametrize("arch", ["topk", "standard", "jumprelu", "batchtopk"])
def test_autoencoders_that_saelens_trained_load(arch, model, texts, tmp_path):
    """Trained by its own runner, where it is installed."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    kinds = {
        "topk": sae_lens.TopKTrainingSAEConfig,
        "standard": sae_lens.StandardTrainingSAEConfig,
        "jumprelu": sae_lens.JumpReLUTrainingSAEConfig,
        "batchtopk": sae_lens.BatchTopKTrainingSAEConfig,
    }
    sae_cfg = kinds[arch](d_in=16, d_sae=64, **({"k": 4} if "topk" in arch else {}))
    train_by_saelens(sae_cfg, model, texts, tmp_path / "out", training_tokens=2000)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    ours = sgo_sae.load_sae(tmp_path / "out")
    x_BD = torch.randn(200, 16)
    assert (ours.encode(x_BD) > 0).any() and torch.allclose(
        ours.encode(x_BD), theirs.encode(x_BD), atol=1e-5
    )
    assert torch.allclose(ours(x_BD), theirs(x_BD), atol=1e-5)


def test_runs_from_before_there_were_pair_weights(train_argv, texts, tmp_path, result):
    """They are resumed and have one column with new runs, as if they had the default."""
    for seed in (0, 1):
        assert trained(train_argv(out=tmp_path / f"s{seed}", seed=seed, save_every=10)) == 0
    file = tmp_path / "s0" / "cfg.json"
    content = json.loads(file.read_text())
    assert content["metadata"]["settings"].pop("pair_weights") == "coactivation"
    file.write_text(json.dumps(content))
    uniform = train_argv(out=tmp_path / "u", pair_weights="uniform")
    assert trained(uniform) == 0
    assert "has ended" in result([*uniform, "--resume"]).err
    runs = [tmp_path / name for name in ("s0", "s1", "u")]
    found = result([*runs, "--metrics", "core", "--text", texts, "--contexts", 4])
    cells = found.row("core: mse ↓")
    assert len(cells) == 2 and "±" in cells[0] and "±" not in cells[1]
    argv = train_argv(out=tmp_path / "s0", seed=0, save_every=10)
    assert "has ended" in result([*argv, "--resume"]).err
    line = result([*argv, "--resume", "--pair-weights", "uniform"]).refusal
    assert "--pair-weights coactivation, not uniform" in line


def assert_same_files(folder, whole):
    """Weights and metrics of all runs of a folder are those of another."""
    files = [p for p in whole.rglob("*") if p.suffix in (".safetensors", ".jsonl")]
    assert len(files) >= 2
    for file in files:
        same = folder / file.relative_to(whole)
        if file.suffix == ".jsonl":
            assert metrics_of(same.parent) == metrics_of(file.parent)
        else:
            assert same.read_bytes() == file.read_bytes()


def test_a_run_stopped_at_any_step_is_resumed(train_argv, tmp_path, monkeypatch):
    """By each of the signals; a checkpoint of its own is every fifth step's."""
    settings = {"tokens": 64 * 12, "save_every": 5, "log_every": 2}
    assert trained(train_argv(out=tmp_path / "whole", **settings)) == 0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    for step in range(1, 13):
        number = numbers[step % 4]
        argv = train_argv(out=tmp_path / str(step), **settings)
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            assert trained(argv) == 128 + number
        assert not (tmp_path / str(step) / "sae_weights.safetensors").exists()
        assert trained([*argv, "--resume"]) == 0
        assert_same_files(tmp_path / str(step), tmp_path / "whole")
        assert not list((tmp_path / str(step)).glob("checkpoint*"))


@pytest.mark.parametrize(
    "options, steps, number",
    [
        ([], [113], signal.SIGINT),
        ([], [250], signal.SIGUSR1),
        ([], [140, 7, 1, 200], signal.SIGTERM),
        (["--arch", *ARCHS, "--seed", "0", "1", "--tokens", "2560"], [64], signal.SIGTERM),
        (["--normalize", "--plain", "--dtype", "bfloat16"], [9], signal.SIGTERM),
    ],
)
def test_stopped_and_resumed_is_the_run_that_never_stopped(
    train_argv, tmp_path, monkeypatch, result, options, steps, number
):
    """Also where the text is used more than twice, and where it is stopped again and again."""
    assert trained(train_argv(out=tmp_path / "whole", **LONG) + options) == 0
    argv = train_argv(**LONG) + options
    for n, step in enumerate(steps):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            found = result(argv + ["--resume"] * (n > 0))
        assert found.code == 128 + number and "--resume goes on" in found.err
    assert not list((tmp_path / "run").rglob("sae_weights.safetensors"))
    assert "--resume continues it" in result(argv).refusal
    assert trained([*argv, "--resume"]) == 0
    assert not list((tmp_path / "run").rglob("checkpoint*"))
    assert_same_files(tmp_path / "run", tmp_path / "whole")
    folders = list((tmp_path / "run").rglob("cfg.json"))
    assert len(folders) == (8 if "--arch" in options else 1)


def test_resume_of_another_run_is_refused_by_name(train_argv, tmp_path, monkeypatch, result):
    argv = train_argv()
    stop_at(monkeypatch, 3)
    assert trained(argv) == 143
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    argv += ["--resume"]
    line = result([*argv, "--lr", "0.01", "--alpha", "0.2", "--log-every", "1"]).refusal
    assert line.endswith("--alpha 0.075, not 0.2; --lr 0.0003, not 0.01")
    line = result([*argv, "--alpha", "0.075", "0.2"]).refusal
    assert line.endswith("of 1 autoencoders, and the command of 2")
    for content in (
        b"",
        kept[: len(kept) // 2],
        b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.",
        pickle.dumps({"settings": Path("x")}, protocol=2),
    ):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        words = "can't be loaded" if content else "is empty"
        assert f"checkpoint.pt {words}" in result(argv).refusal
    assert not Path("pwned").exists()


KILL = """
import os, random, sys, time
import datasets, tokenizers, torch, transformers, sgo_sae

checkpoint, argv = sys.argv[1], sys.argv[2:]
random.seed(int(time.time()))
written = lambda: os.path.getmtime(checkpoint) if os.path.exists(checkpoint) else 0
for kills in range(1000):
    last, child = written(), os.fork()  # the imports, slow, are done once
    if child == 0:
        os._exit(sgo_sae.main(argv))
    kill_at = None
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if kills < 12 and kill_at is None and (written() != last or random.random() < 0.001):
            kill_at = time.time() + random.uniform(0, 0.1)
        if kill_at and time.time() > kill_at:
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    else:
        break
print(kills)
"""


@slow
def test_killed_at_any_moment_resumes_to_the_same_weights(train_argv, tmp_path):
    settings = {"tokens": 64 * 500, "save_every": 3}
    assert trained(train_argv(out=tmp_path / "whole", **settings)) == 0
    argv = [tmp_path / "run" / "checkpoint.pt", *train_argv(**settings), "--resume"]
    result = python("-c", KILL, *argv)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 10
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_read_that_fails_ends_the_run_at_once_and_keeps_what_it_trained(
    train_argv, texts, tmp_path, monkeypatch, result, whole
):
    """The run that ends so is continued, when reading works again, to the same weights."""
    real = sgo_sae.json_rows
    rows = []

    def breaks(*args):
        for row in real(*args):
            rows.append(row)
            if len(rows) == 200:
                raise OSError("connection reset")
            yield row

    argv = train_argv(**LONG)
    with monkeypatch.context() as patch:
        patch.setattr(sgo_sae, "json_rows", breaks)
        found = result(argv)
    assert found.code == 2
    *_, kept, told = found.err.splitlines()
    assert texts in told and "can't be loaded: OSError connection reset" in told
    done = re.search(r"after step (\d+)", kept)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == int(done[1]) and saved["done"] % LONG["save_every"] > 0
    assert trained([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("odd text")])
def test_whatever_a_pass_of_the_language_model_raises_keeps_what_was_trained(
    train_argv, tmp_path, monkeypatch, result, whole, error
):
    def fail():
        raise error

    argv = train_argv(**LONG)
    with monkeypatch.context() as patch:
        patch.setattr(sgo_sae, "layer_output", before_call(40, sgo_sae.layer_output, fail))
        if isinstance(error, ValueError):
            with pytest.raises(ValueError, match="odd text"):
                trained(argv)
        else:
            found = result(argv)
            assert found.code == 2 and "out of memory, smaller --dict" in found.last
    assert trained([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_a_disk_that_is_full_at_a_log_line_costs_no_line_and_no_run(
    train_argv, tmp_path, monkeypatch, result, whole
):
    """Half of the line may have been written; the file is whole again when there is room."""
    real = Path.open
    opened = []

    def full(path, *args, **more):
        file = real(path, *args, **more)
        if path.name == "metrics.jsonl":
            opened.append(1)
            if len(opened) in (3, 4):
                file.write('{"step": 1')
                file.close()
                raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    found = result(train_argv(**LONG))
    assert found.code == 0 and found.err.count("metrics.jsonl can't be written") == 2
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    assert weights_of(tmp_path / "run") == weights_of(whole)


OFTEN = """
import sys, sgo_sae, tqdm
sgo_sae.progress_bar = lambda work, **options: tqdm.tqdm(work, mininterval=0, **options)
sys.exit(sgo_sae.main(sys.argv[1:]))
"""


def test_a_stream_that_nobody_reads_any_more_ends_the_run_with_a_checkpoint(
    train_argv, tmp_path, whole
):
    argv = train_argv(**LONG | {"save_every": 0})
    command = [sys.executable, "-c", OFTEN, *argv]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        process.stderr.read(100)
    process.stderr.read(2000)
    process.stderr.close()
    process.wait(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "run" / "cfg.json").exists()
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert trained([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_full_disk_keeps_the_checkpoint_before(train_argv, tmp_path, whole):
    """A limit on the size of files stands for the full disk: writes end in the middle, with an
    OSError.
    """
    argv = train_argv(**LONG)
    program = """
import resource, sys, sgo_sae
real, calls = sgo_sae.torch.save, []
def save(*args):
    calls.append(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if len(calls) in (2, 3) else -1, -1))
    try:
        real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
sgo_sae.torch.save = save
sys.exit(sgo_sae.main(sys.argv[1:]))
"""
    result = python("-c", program, *argv)
    assert (
        result.returncode == 0 and result.stderr.count("can't be written, the last one stays") == 2
    ), result.stderr
    assert "checkpoint of step 14 " in result.stderr and "checkpoint of step 21 " in result.stderr
    assert not (tmp_path / "run" / "checkpoint.part").exists()
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_one_autoencoder_that_can_not_be_written_costs_no_other(
    train_argv, tmp_path, monkeypatch, result
):
    """The others are saved, and --resume saves it when there is room again. A limit on the size of
    files stands for the full disk.
    """
    resource = pytest.importorskip("resource")
    real = sgo_sae.save_sae
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(sae, cfg, folder, *rest):
        if "a0-" in folder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            real(sae, cfg, folder, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    argv = [*train_argv(), "--alpha", "0", "0.05"]
    with monkeypatch.context() as patch:
        patch.setattr(sgo_sae, "save_sae", save)
        found = result(argv)
    assert found.code == 2 and "a0-s0 can't be written: [Errno 27]" in found.last
    assert not list((tmp_path / "run").rglob("*.part"))
    (saved_one,) = (tmp_path / "run").glob("*/cfg.json")
    assert saved_one.parent.name == "topk-n64-k4-a0.05-s0"
    assert trained([*argv, "--resume"]) == 0
    assert trained(train_argv(out=tmp_path / "alone", alpha=0)) == 0
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "run" / "topk-n64-k4-a0-s0")


def test_a_file_is_put_in_place_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")

    def fails(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sgo_sae.write_whole(path, fails)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    sgo_sae.write_whole(path, lambda aside: aside.write_text("after"))
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_an_autoencoder_is_computed_in_float32_whatever_its_file_has(tmp_path):
    weights, x_BD = foreign_weights()
    weights = {name: (tensor * 20).bfloat16() for name, tensor in weights.items()}
    write_foreign(tmp_path, weights, architecture="standard", apply_b_dec_to_input=False)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    f_BN = (x_BD.double() @ exact["W_enc"] + exact["b_enc"]).relu()
    found_BN = sgo_sae.load_sae(tmp_path).encode(x_BD)
    assert ((found_BN > 0) == (f_BN > 0)).all()
    assert torch.allclose(found_BN.double(), f_BN, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    "cfg",
    [
        {"k": True},
        {"k": 4.5},
        {"apply_b_dec_to_input": "false"},
        {"rescale_acts_by_decoder_norm": 1},
        {"normalize_activations": "layer_norm"},
        {"architecture": None},
        {"architecture": ["topk"]},
    ],
)
def test_odd_values_are_refused_by_name(tmp_path, cfg):
    write_foreign(tmp_path, foreign_weights()[0], **{"architecture": "topk", "k": 4} | cfg)
    with pytest.raises(InputError, match=next(iter(cfg))):
        sgo_sae.load_sae(tmp_path)


@pytest.mark.parametrize("none", [False, None, "none"])
def test_values_that_mean_none_are_none(tmp_path, none):
    cfg = {"architecture": "topk", "k": 4, "normalize_activations": none}
    write_foreign(tmp_path, foreign_weights()[0], **cfg)
    assert sgo_sae.load_sae(tmp_path).k == 4


@pytest.mark.parametrize("files", [["ae.pt", "config.json"], ["sae_weights.safetensors"], []])
def test_folders_of_other_formats_are_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="sae_weights"):
            sgo_sae.load_sae(folder)


@pytest.mark.parametrize(
    "old",
    [
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}},  # of SAELens 3
        {"activation_fn_str": "tanh-relu"},
        {"activation_fn": "relu", "activation_fn_kwargs": {"k": 4}},
    ],
)
def test_older_folders_of_saelens_are_loaded_where_their_meaning_is_certain(tmp_path, old):
    weights, x_BD = foreign_weights()
    write_foreign(tmp_path, weights, activation_fn="relu", activation_fn_kwargs={})
    expected = ((x_BD - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    found = sgo_sae.load_sae(tmp_path)
    assert torch.allclose(found.encode(x_BD), expected, atol=1e-4)
    write_foreign(tmp_path, weights, **old)
    with pytest.raises(InputError, match="activation_fn"):
        sgo_sae.load_sae(tmp_path)
    write_foreign(tmp_path, weights, architecture="jumprelu")
    with pytest.raises(InputError, match="threshold"):
        sgo_sae.load_sae(tmp_path)


# --------------------------------------------------------------------------------------------- demo


def test_a_finished_demo_is_finished(tmp_path, monkeypatch, result):
    """Its model is a folder of the cache, which --resume compares."""
    monkeypatch.setenv("SGO_CACHE", str(tmp_path / "cache"))

    def files(folder):
        make_model(folder)
        write_rows(folder / "train.jsonl", [{"text": TEXT * 3}] * 99)

    monkeypatch.setattr(sgo_sae, "demo_files", files)
    small = ["--tokens", "4096", "--dict", "32", "--k", "4", "--layer", "1", "--buffer", "9"]
    argv = ["--demo", *small, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert result(argv).code == 0
    again = result([*argv, "--resume"])
    assert again.code == 0 and "it has ended" in again.last
    settings = json.loads(next((tmp_path / "run").glob("*/cfg.json")).read_text())["metadata"]
    assert (
        settings["settings"]["dtype"] == "float32"
    )  # and not auto, which another machine resolves


def test_demo_flags_override_the_demo():
    plain, sgo = sgo_sae.parse_args(["--demo", "--k", "8"])
    assert (plain.alpha, sgo.alpha) == (0.0, 0.075)
    assert (
        sgo.k == 8 and [sgo.d_sae] == sgo_sae.DEMO["d_sae"] and sgo.layer == sgo_sae.DEMO["layer"]
    )


def test_a_demo_that_is_killed_while_it_is_made_is_made_anew(tmp_path, monkeypatch):
    """One text of ten is held out, by its name alone."""
    files = {f"{n}.py": f"text {n}" for n in range(40)}
    small_library(monkeypatch, tmp_path / "library", files)
    made = []

    def train(texts, folder):
        Path(folder, "config.json").write_text("{}")
        made.append(folder)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sgo_sae, "train_demo_lm", train)
    folder = tmp_path / "cache" / "demo"
    with pytest.raises(KeyboardInterrupt):
        sgo_sae.demo_files(folder)
    assert list(folder.parent.iterdir()) == []
    sgo_sae.demo_files(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"heldout.jsonl", "train.jsonl", "config.json"}
    assert list(folder.parent.iterdir()) == [folder]
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    held_out = sorted(name for name in files if zlib.crc32(name.encode()) % 10 == 0)
    assert [row["name"] for row in rows] == held_out and 0 < len(held_out) < 12
    sgo_sae.demo_files(folder)  # it is there
    assert len(made) == 2


def test_another_python_has_a_demo_of_its_own(tmp_path, monkeypatch):
    """As its standard library is another text."""
    monkeypatch.setenv("SGO_CACHE", str(tmp_path))
    ours = sgo_sae.demo_folder()
    later = sys.version_info[:1] + (sys.version_info[1] + 1,)
    monkeypatch.setattr(sys, "version_info", argparse.Namespace(major=later[0], minor=later[1]))
    assert ours.parent == sgo_sae.demo_folder().parent == tmp_path and ours != sgo_sae.demo_folder()


def test_demo_language_model_learns(tmp_path):
    from transformers import AutoModelForCausalLM

    sgo_sae.train_demo_lm([TEXT * 30 for _ in range(20)], tmp_path, steps=40, batch=4)
    lm, _, tokenizer, _ = sgo_sae.load_lm(str(tmp_path), 1, CPU, torch.float32)
    assert lm.config.hidden_size == 128 and len(lm.layers) == 2
    ids_BL = torch.tensor([[tokenizer.bos_token_id] + tokenizer(TEXT * 5)["input_ids"][:100]])
    with torch.inference_mode():
        nats = AutoModelForCausalLM.from_pretrained(tmp_path)(
            input_ids=ids_BL, labels=ids_BL
        ).loss.item()
    assert nats < 4  # a model that learned nothing needs log 1024 = 6.9


# --------------------------------------------------------------------------------------------- main


def test_defaults_are_the_papers_run_4():
    (cfg,) = sgo_sae.parse_args([])
    assert (cfg.d_sae, cfg.k, cfg.alpha, cfg.lam, cfg.lr) == (18432, 320, 0.075, 0.04, 3e-4)
    steps = cfg.tokens // cfg.batch
    assert steps == 4882 and int(cfg.decay_start * steps) == 4271


def test_out_of_memory_names_the_size_and_the_flags(train_argv, result):
    found = result(train_argv(batch=10**12, tokens=10**12))
    assert found.code == 2 and re.search(r"\d{12,} bytes", found.last)
    assert "out of memory" in found.last and "--batch" in found.last and "--buffer" in found.last


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_of_few_characters_loses_no_autoencoder(train_argv, tmp_path, encoding):
    result = python(SCRIPT, *train_argv(), "--alpha", "0", "0.05", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "run").glob("*/sae_weights.safetensors"))) == 2
    assert r"\u03a9" in result.stdout and "EV 0." in result.stdout


def test_an_output_that_was_closed_before_ends_no_run(train_argv, tmp_path):
    """Nor one whose last lines nobody reads: all is saved before they are printed."""
    for n, closed in enumerate([">&- 2>&-", "> /dev/full", "| true"]):
        argv = train_argv(out=tmp_path / str(n))
        command = " ".join(map(str, [sys.executable, SCRIPT, *argv, closed]))
        subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False)
        assert (tmp_path / str(n) / "cfg.json").exists()
        assert not (tmp_path / str(n) / "checkpoint.pt").exists()


def test_a_folder_is_one_runs_alone(train_argv, tmp_path, result):
    """From the first moment; and a folder that holds runs is no folder for another."""
    with sgo_sae.taken(tmp_path / "run"):
        for argv in (train_argv(), [*train_argv(), "--resume"]):
            assert "another run is under way" in result(argv).refusal
    assert not (tmp_path / "run").exists()
    grid = train_argv(out=tmp_path / "runs" / "grid") + ["--alpha", "0", "0.05"]
    assert trained(grid) == 0
    for out in ("runs/grid", "runs"):
        assert "--resume continues it" in result(train_argv(out=tmp_path / out)).refusal
    assert trained(train_argv(out=tmp_path / "runs" / "other")) == 0
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        argv = train_argv(out=tmp_path / out, model="not/asked")
        assert str(tmp_path / "file") in result(argv).refusal


def test_a_run_killed_before_its_first_checkpoint_is_kept_and_resumed(train_argv, tmp_path, result):
    assert trained(train_argv()) == 0
    whole = weights_of(tmp_path / "run")
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert "holds a run: --resume" in result(train_argv()).refusal
    assert trained([*train_argv(), "--resume"]) == 0
    assert weights_of(tmp_path / "run") == whole
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [5, 10, 12]


def test_finished_run_is_not_overwritten(train_argv, tmp_path, result):
    assert trained(train_argv()) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "choose another --out" in result(train_argv()).refusal
    line = result(train_argv(lr=0.1) + ["--resume"]).refusal
    assert line.endswith("cfg.json was written with --lr 0.0003, not 0.1")
    again = result([*train_argv(), "--resume"])
    assert again.code == 0 and "it has ended" in again.last
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_finished_grid_is_not_resumed_with_more_of_it(train_argv, tmp_path, result):
    grid = train_argv(out=tmp_path / "grid") + ["--resume", "--seed", "0", "1"]
    assert trained(grid) == 0
    before = weights_of(tmp_path / "grid" / "topk-n64-k4-a0.075-s0")
    assert "other runs than the command's" in result([*grid, "2"]).refusal
    again = result(grid)
    assert again.code == 0 and "it has ended" in again.last
    assert weights_of(tmp_path / "grid" / "topk-n64-k4-a0.075-s0") == before


def test_a_grid_of_which_one_run_was_not_saved_has_not_ended(train_argv, tmp_path, result):
    """As when it is killed while it saves, and had no checkpoint."""
    grid = [*train_argv(), "--seed", "0", "1", "--resume"]
    assert trained(grid) == 0
    (tmp_path / "run" / "topk-n64-k4-a0.075-s1" / "cfg.json").unlink()
    assert "or not all of them" in result(grid).refusal


def test_a_flag_that_is_given_twice_adds_to_its_list_or_is_said(capsys):
    argv = [
        "--alpha",
        "0",
        "--seed",
        "1",
        "--alpha",
        "2",
        "3",
        "--tokens",
        "5000",
        "--tokens",
        "6000",
    ]
    cfgs = sgo_sae.parse_args(argv)
    assert [cfg.alpha for cfg in cfgs] == [0, 2, 3]
    assert {cfg.tokens for cfg in cfgs} == {6000}
    assert capsys.readouterr().err == "--tokens is given twice, and 6000 counts\n"
    assert [cfg.alpha for cfg in sgo_sae.parse_args([])] == [0.075]  # the defaults are still those
    argv = ["a", "b", "--probe", "a.csv", "--probe", "b.csv", "--seed", "4", "--seed", "5"]
    runs, args = eval_sae.parse_args(argv)
    assert (runs, args.probe, args.seed) == (["a", "b"], ["a.csv", "b.csv"], [4, 5])


def test_help_shows_every_setting_with_its_default():
    text = " ".join(python(SCRIPT, "--help").stdout.split())
    settings = SCRIPT.read_text().split("class Config:")[1].split("LISTS =")[0]
    for field in dataclasses.fields(sgo_sae.Config):
        assert sgo_sae.flag_of(field.name) + " " in text
        (comment,) = re.findall(rf"^    {field.name}: .*  # (.*)$", settings, re.MULTILINE)
        assert comment in text
    assert (
        "(default: [18432])" in text and "(default: [0.075])" in text and "(default: 0.875)" in text
    )


# ------------------------------------------------------------------------------------------ figures


def test_every_figure_has_a_direction_and_a_meaning():
    """And its own line of the table, whatever the family."""
    better = {(figure.family, figure.name): figure.better for figure in eval_sae.FIGURES}
    assert len(better) == len(eval_sae.FIGURES)
    assert {family for family, _ in better} == set(eval_sae.FAMILIES)
    assert set(better.values()) == {"↑", "↓", "–"}
    for up in ("core/explained_variance", "core/cosine", "behaviour/kl_score", "probe/latents"):
        assert better[tuple(up.split("/"))] == "↑"
    for down in (
        "core/mse",
        "core/dense",
        "behaviour/ce_sae",
        "absorption/full",
        "core/never_fire",
    ):
        assert better[tuple(down.split("/"))] == "↓"
    for neither in ("core/l0", "behaviour/ce_zero", "probe/x", "absorption/letters"):
        assert better[tuple(neither.split("/"))] == "–"


@pytest.mark.parametrize("family", eval_sae.FAMILIES)
def test_a_table_says_what_each_of_its_figures_means(family):
    """Those of several sizes in one line."""
    sizes = {"scr": (2, 5, 10, 20, 50, 100, 500)}
    sizes.update(dict.fromkeys(("latents", "standardised", "x"), (1, 2, 5, 20)))
    figures = {}
    lines = []
    for figure in eval_sae.FIGURES:
        if figure.family == family:
            own = sizes.get(figure.name, ())
            names = [f"{figure.name}_{size}" for size in own] or [figure.name]
            figures |= dict.fromkeys(names, 0.5)
            title = " ".join([figure.name.replace("_", " "), ", ".join(map(str, own))]).strip()
            direction = "" if figure.better == "–" else f" {figure.better}"
            lines.append(f"- {family}: {title}{direction}: {figure.meaning}")
    text = table_of(measured({(0, 0): figures}, family), (family,))
    assert [line for line in text.splitlines() if line.startswith("- ")] == lines


def test_a_mean_lacks_what_one_of_its_parts_lacks():
    found = eval_sae.mean_of([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}])
    assert found["a"] == 2 and math.isnan(found["b"])
    assert sgo_sae.finite({"a": math.inf, "b": math.nan, "c": 2}) == {"a": None, "b": None, "c": 2}
    assert eval_sae.mean_of([]) == {}


# --------------------------------------------------------------------------------------------- core


def test_reconstruction_of_constructed_cases():
    x_TD = torch.randn(5000, 8)
    perfect = planted_sae(torch.cat([torch.eye(8), -torch.eye(8)]))  # x = Σ relu(±x_i) ±e_i
    expected = {
        "explained_variance": 1,
        "mse": 0,
        "mse_benchmark": 0,
        "cosine": 1,
        "l0": 8,
        "l1": x_TD.abs().sum(1).mean().item(),
        "norm_ratio": 1,
        "bias": 1,
        "never_fire": 0,
        "dense": 1,
    }
    assert eval_sae.reconstruction(perfect, x_TD) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_reconstruction_is_that_of_its_definition():
    """In float64, token by token, where no figure is 0 or 1."""
    sae, _ = random_sae("topk")
    sae.b_enc.data[:8] = -100.0  # these are never active
    sae.b_enc.data[8] = 50.0  # and this one always
    x_TD = torch.randn(3000, 8) * torch.rand(3000, 1) * 3 + 1
    with torch.no_grad():
        f_TN = sae.encode(x_TD).double()
        xhat_TD = sae.decode(sae.encode(x_TD)).double()
    x = x_TD.double()
    error = [(a - b).square().sum().item() for a, b in zip(x, xhat_TD)]
    variance = [(a - x.mean(0)).square().sum().item() for a in x]
    n_active = [(f_TN[:, n] > 0).sum().item() for n in range(f_TN.shape[1])]
    expected = {
        "explained_variance": 1 - sum(error) / sum(variance),
        "mse": statistics.mean(error) / 8,
        "mse_benchmark": statistics.mean(error) / (16 * 64),
        "cosine": statistics.mean((a @ b / a.norm() / b.norm()).item() for a, b in zip(x, xhat_TD)),
        "l0": sum(n_active) / 3000,
        "l1": f_TN.sum().item() / 3000,
        "norm_ratio": statistics.mean((b.norm() / a.norm()).item() for a, b in zip(x, xhat_TD)),
        "bias": sum(b @ b for b in xhat_TD).item() / sum(a @ b for a, b in zip(x, xhat_TD)).item(),
        "never_fire": sum(n == 0 for n in n_active) / len(n_active),
        "dense": sum(n > 300 for n in n_active) / len(n_active),
    }
    assert all(value not in (0, 1) for value in expected.values())
    between = [n for n in n_active if 120 < n <= 300]  # dense is over 10 %, and not over 4
    assert between and any(300 < n < 1200 for n in n_active)
    found = eval_sae.reconstruction(sae, x_TD, per_context=64)
    assert found == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("max_logits", [2**27, 1])
def test_behaviour_is_that_of_its_definition(model, monkeypatch, max_logits):
    """Special tokens keep their activations, but where all is zeroed, and are no source of means.

    Also context by context.
    """
    monkeypatch.setattr(eval_sae, "MAX_LOGITS", max_logits)
    _, full, tokenizer = model
    ids_RL = torch.randint(3, len(tokenizer), (5, 12))
    ids_RL[:, 0] = tokenizer.bos_token_id
    ids_RL[2, 5] = tokenizer.eos_token_id
    layer = full.model.layers[1]
    hooks_before = dict(layer._forward_hooks)
    kept_RL = ids_RL > 2
    places = kept_RL.nonzero().tolist()

    def by_hand(log_p, log_q):
        ce = [-log_q[t, i, ids_RL[t, i + 1]].item() for t, i in places if i < 11]
        kl = [(log_p[t, i].exp() * (log_p[t, i] - log_q[t, i])).sum().item() for t, i in places]
        return statistics.mean(ce), statistics.mean(kl)

    def halved(x):
        return x / 2

    saes = [torch.clone, torch.zeros_like, halved]
    exact, none, half = eval_sae.behaviour(full, layer, saes, ids_RL, kept_RL)
    factors = {
        "zero": torch.zeros_like(kept_RL).float(),
        "none": (~kept_RL).float(),
        "half": torch.where(kept_RL, 0.5, 1.0),
    }
    found = {}
    with torch.inference_mode():
        clean = full(ids_RL).logits.log_softmax(-1)
        for name, factor in factors.items():
            handle = layer.register_forward_hook(lambda m, a, x, by=factor: x * by[..., None])
            found[name] = by_hand(clean, full(ids_RL).logits.log_softmax(-1))
            handle.remove()
    ce_clean = by_hand(clean, clean)[0]
    ce_zero, kl_zero = found["zero"]
    for name, figures in (("none", none), ("half", half)):
        ce_sae, kl_sae = found[name]
        expected = {
            "ce_clean": ce_clean,
            "ce_zero": ce_zero,
            "ce_sae": ce_sae,
            "kl_zero": kl_zero,
            "kl_sae": kl_sae,
            "ce_score": (ce_zero - ce_sae) / (ce_zero - ce_clean),
            "kl_score": 1 - kl_sae / kl_zero,
        }
        assert figures == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (exact["ce_score"], exact["kl_score"]) == pytest.approx((1, 1), abs=1e-5)
    assert abs(none["ce_sae"] - none["ce_zero"]) > 1e-3
    assert layer._forward_hooks == hooks_before


def test_behaviour_leaves_no_hook_behind_and_needs_a_token_to_predict(model):
    _, full, tokenizer = model
    layer = full.model.layers[1]
    hooks_before = dict(layer._forward_hooks)
    ids_RL = torch.randint(3, len(tokenizer), (2, 2))
    kept_RL = torch.tensor([[False, True]] * 2)  # the last token is followed by none
    with pytest.raises(InputError, match="no token that counts and is followed"):
        eval_sae.behaviour(full, layer, [], ids_RL, kept_RL)

    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        eval_sae.behaviour(full, layer, [broken], ids_RL, torch.ones_like(kept_RL))
    assert layer._forward_hooks == hooks_before


@pytest.mark.parametrize("kind", ["gpt1", "qwen3"])
def test_behaviour_of_layers_that_return_lists_and_tensors(kind):
    """With x in the place of x̂ nothing changes, and with another one something does."""
    torch.manual_seed(0)
    lm = tiny(kind).eval()
    layers = lm.transformer.h if kind == "gpt1" else lm.model.layers
    ids_RL = torch.randint(3, 300, (4, 12))
    kept_RL = torch.ones_like(ids_RL, dtype=torch.bool)
    saes = [torch.clone, lambda x: x.flip(-1)]
    exact, other = eval_sae.behaviour(lm, layers[1], saes, ids_RL, kept_RL)
    assert exact["ce_sae"] == exact["ce_clean"] != exact["ce_zero"]
    assert exact["kl_sae"] == pytest.approx(0, abs=1e-9) and other["kl_sae"] > 1e-6


# -------------------------------------------------------------------------------------- competition


def competition_of(f_TN):
    sae = planted_sae(torch.eye(f_TN.shape[1]))
    sae.encode = lambda x: x
    return eval_sae.competition(sae, f_TN)


def test_independent_latents_do_not_compete():
    """Eq. 3 alone says that they do: thousands of their pairs have w over 0.5 in a batch."""
    f_TN = independent_latents(8192, 1500)
    w_NN = coactivation_weights(f_TN[:2048])
    assert (w_NN.triu(1) > 0.5).sum() > 2000
    figures = competition_of(f_TN)
    assert figures["pairs_over_chance"] <= 2
    assert figures["share_over_chance"] < 1e-5
    assert figures["rare"] < 0.5


@pytest.mark.parametrize("at_once", [2**22, 2000, 1])
def test_competition_is_that_of_its_definition(monkeypatch, at_once):
    """Latents of 19, 20, 300 and 301 tokens of 3,000 are at the edges of what is compared."""
    monkeypatch.setattr(eval_sae, "MAX_PAIRS", at_once)
    f_TN = independent_latents(3000, 90)
    moderate = ((f_TN.sum(0) > 100) & (f_TN.sum(0) < 250)).nonzero()[:3, 0]
    f_TN[:, moderate[1]] = f_TN[:, moderate[0]] * (torch.rand(3000) < 0.8)
    # The third shares 60 of its 100 tokens with the first.
    is_first = f_TN[:, moderate[0]] > 0
    f_TN[:, moderate[2]] = 0
    f_TN[is_first.nonzero()[:60, 0], moderate[2]] = 1
    f_TN[(~is_first).nonzero()[:40, 0], moderate[2]] = 1
    for n, size in enumerate((19, 20, 300, 301)):
        f_TN[:, 80 + n] = 0
        f_TN[torch.randperm(3000)[:size], 80 + n] = 1
    # Two more share 55 of 100 and 240 tokens: w is over 0.5, and not by that much over chance.
    tokens = torch.randperm(3000)
    f_TN[:, 84:86] = 0
    f_TN[tokens[:240], 84] = 1
    f_TN[tokens[185:285], 85] = 1
    M = [set(f_TN[:, i].nonzero()[:, 0].tolist()) for i in range(90)]
    compared = [m for m in M if 20 <= len(m) <= 300]
    n_over = 0
    for one, other in combinations(compared, 2):
        smaller, larger = sorted([len(one), len(other)])
        n_over += len(one & other) / smaller - larger / 3000 > 0.5
    n_pairs = len(compared) * (len(compared) - 1) / 2
    first, third = M[moderate[0]], M[moderate[2]]
    excess = len(first & third) / len(third) - len(first) / 3000
    assert 0.5 < excess < 0.6
    figures = competition_of(f_TN)
    assert figures["pairs_over_chance"] == n_over >= 2
    assert figures["compared"] == len(compared)
    assert figures["share_over_chance"] == pytest.approx(n_over / n_pairs)
    assert figures["rare"] == pytest.approx(sum(len(m) < 20 for m in M) / 90)
    assert figures["mean_max_cos"] == 0


def test_competition_of_131072_latents_takes_no_square_of_them():
    """One of float32 would be 69 GB. Two latents of 40 tokens share all of them."""
    T, N = 20_000, 131_072
    tokens = torch.arange(T).repeat_interleave(8)
    latents = (tokens * 7919 + torch.arange(len(tokens)) % 8 * 16_001) % (N - 2)
    planted = torch.arange(40) * 50
    tokens = torch.cat([tokens, planted, planted])
    latents = torch.cat([latents, torch.full((40,), N - 2), torch.full((40,), N - 1)])
    # Others fire once or twice, and are made common enough to be compared.
    tokens = torch.cat([tokens, torch.randint(T, (21 * 5000,))])
    latents = torch.cat([latents, torch.arange(5000).repeat(21)])
    order = (tokens * N + latents).unique()
    tokens, latents = order // N, order % N
    activity = eval_sae.Activity(T, torch.bincount(latents, minlength=N), tokens, latents)
    assert len(activity.compared) > 4000
    pairs = eval_sae.closest_pairs(activity, 1)
    assert [(pair.i, pair.j, pair.shared, pair.w) for pair in pairs] == [(N - 2, N - 1, 40, 1)]


def test_nearest_cosine_is_that_of_the_definition():
    W_ND = torch.randn(1100, 8)  # more rows than a tile has
    cosine_NN = F.cosine_similarity(W_ND[:, None], W_ND, dim=2).abs().fill_diagonal_(0)
    assert torch.allclose(eval_sae.nearest_cosine(W_ND), cosine_NN.amax(1), atol=1e-6)


@pytest.mark.parametrize("N", [1, 2, 9])
def test_dictionaries_of_few_latents_are_measured(N):
    """What they can't have is absent, and no figure."""
    sae = SAE(16, N, 1)
    x_TD = torch.randn(500, 16)
    assert math.isnan(eval_sae.competition(sae, x_TD)["mean_max_cos"]) == (N == 1)
    assert eval_sae.reconstruction(sae, x_TD)["l0"] <= 1
    words = planted_words(sae)
    assert 0 <= eval_sae.absorption(sae, words)["absorption"] <= 1
    splits = eval_sae.class_splits(torch.arange(500) % 2, 400, 0)
    f_TN = sae.encode(x_TD).detach()
    found = eval_sae.sparse_probing(f_TN, splits, eval_sae.mean_difference)
    assert list(found) == [k for k in (1, 2, 5, 20) if k <= N]


# -------------------------------------------------------------------------------------------- model


def test_the_whole_model_is_read_up_to_a_layer(model, reader):
    ids_BL = torch.randint(3, len(model[2]), (3, 20))
    with torch.inference_mode():
        expected = model[1](ids_BL, output_hidden_states=True).hidden_states[2]
    assert torch.equal(reader.read(ids_BL), expected)
    assert reader.has_head and not reader.layer._forward_hooks


def test_no_code_of_a_models_folder_is_run(model, run, texts, tmp_path, monkeypatch, result):
    """Nor is anybody asked: a stranger's cfg.json may name the folder."""
    shutil.copytree(model[0], tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    config["model_type"] = "unheard"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lm" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    argv = [run / "s0", "--text", texts, "--metrics", "core", "--model", tmp_path / "lm"]
    assert "custom code" in result(argv).refusal and not (tmp_path / "ran").exists()


def test_a_model_whose_files_lack_tensors_is_refused(model, run, odd, tmp_path, texts, result):
    """They would be drawn at random. A model that was saved without a head lacks nothing else."""
    import transformers

    argv = [run / "s0", "--text", texts, "--contexts", "9", "--metrics", "core", "behaviour"]
    assert "lack" in result([*argv, "--model", odd / "one layer"]).refusal
    transformers.AutoModel.from_pretrained(model[0]).save_pretrained(tmp_path)
    model[2].save_pretrained(tmp_path)
    found = result([*argv, "--model", tmp_path])
    assert found.code == 1 and found.row("core: mse ↓")
    assert "behaviour: not measured, the model has no language-model head" in found.out


def test_an_id_that_the_model_lacks_is_refused(reader):
    n_tokens = reader.lm.get_input_embeddings().num_embeddings
    assert reader.ids([[n_tokens - 1], []]).tolist() == [[n_tokens - 1], [-1]]
    with pytest.raises(InputError, match=f"gives the id {n_tokens} of {n_tokens} in the model"):
        reader.ids([[n_tokens]])


# -------------------------------------------------------------------------------------------- tasks


def test_the_demos_texts_keep_documents_apart(tmp_path, monkeypatch):
    sizes = {"big": 60, "middle": 50, "small": 40, "tiny": 30, "least": 25, "left": 20}
    files = {}
    for package, size in sizes.items():
        for i in range(size):
            code = f"{package}{i}x = 0  # " + "filling " * 12
            files[f"{package}/{i}.py"] = f'{code}\n\ndef f():\n    """{code}"""\n\nshort'
    # One file is in one part, so that it can't be a class.
    files["lonely.py"] = files["big/0.py"] * 200
    small_library(monkeypatch, tmp_path, files)
    frame = eval_sae.demo_frame()
    parts = frame.groupby("file")["is_test"].nunique()
    assert parts.max() == 1
    assert set(frame["label"]) == set(sizes) - {"left"}
    assert (frame["text"].str.extract(r"([a-z]+)\d+x")[0] == frame["label"]).all()
    assert (frame["text"].str.contains('"""') == frame["attribute"]).all()


def test_what_is_held_out_is_one_name_of_so_many():
    names = [f"a/{n}.py" for n in range(3000)]
    for every in (3, 5):
        held = [name for name in names if eval_sae.held_out(name, every)]
        assert len(held) == pytest.approx(3000 / every, rel=0.1)
        assert held == [name for name in names if eval_sae.held_out(name, every)]


def test_texts_that_are_none_are_left_out(tmp_path):
    rows = [{"text": text, "label": "a"} for text in ("one", "", "  ", None, "two")]
    rows.append({"text": "three", "label": None})
    write_rows(tmp_path / "rows.jsonl", rows)
    assert eval_sae.file_frame(str(tmp_path / "rows.jsonl"))["text"].tolist() == ["one", "two"]
    write_rows(tmp_path / "numbers.jsonl", [{"text": 1, "label": 2}, {"text": 3, "label": 4}])
    assert len(eval_sae.file_frame(str(tmp_path / "numbers.jsonl"))) == 0


def test_a_text_that_occurs_twice_is_in_one_part(tmp_path):
    rows = [{"text": f"text {n // 3}", "label": "a"} for n in range(300)]
    write_rows(tmp_path / "rows.jsonl", rows)
    frame = eval_sae.file_frame(str(tmp_path / "rows.jsonl"))
    assert frame.groupby("text")["is_test"].nunique().max() == 1
    assert 0.1 < frame["is_test"].mean() < 0.3


def test_an_empty_cell_is_no_label_in_any_format(tmp_path, capsys):
    """Nor an attribute. How many texts are left out is said."""
    rows = []
    for n in range(12):
        labels = {"label": ["a", "b", None][n % 3], "attribute": ["x", None, "y", "y"][n % 4]}
        rows.append({"text": f"text {n}", **labels})
    write_rows(tmp_path / "rows.jsonl", rows)
    pandas.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    found = []
    for kind in ("jsonl", "csv", "parquet"):
        frame = eval_sae.file_frame(str(tmp_path / f"rows.{kind}"))
        assert f"rows.{kind}: 4 texts have no label" in capsys.readouterr().err
        frame["attribute"] = frame["attribute"].fillna("none")
        found.append(frame.to_dict("records"))
    assert len(found[0]) == 8 and found[0] == found[1] == found[2]
    assert {row["attribute"] for row in found[0]} == {"x", "y", "none"}


def test_labels_that_are_none_are_refused_and_mixed_ones_are_words(tmp_path):
    write_rows(tmp_path / "lists.jsonl", [{"text": "one", "label": ["a", "b"]}])
    with pytest.raises(InputError, match="column label has values of the kind list"):
        eval_sae.file_frame(str(tmp_path / "lists.jsonl"))
    rows = [{"text": "a", "label": 1, "attribute": {}}, {"text": "b", "label": 2}]
    write_rows(tmp_path / "dicts.jsonl", rows)
    with pytest.raises(InputError, match="column attribute has values of the kind dict"):
        eval_sae.file_frame(str(tmp_path / "dicts.jsonl"))
    write_rows(tmp_path / "mixed.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "1x"}])
    assert eval_sae.file_frame(str(tmp_path / "mixed.jsonl"))["label"].tolist() == ["1", "1x"]
    write_rows(tmp_path / "numbers.jsonl", [{"text": "a", "label": 10}, {"text": "b", "label": 9}])
    assert eval_sae.file_frame(str(tmp_path / "numbers.jsonl"))["label"].tolist() == [10, 9]


def mean_latents(reader, sae, texts, folder):
    """Mean activations and mean latents of texts, in their order."""
    folder.mkdir(exist_ok=True)
    found = eval_sae.read_texts(reader, [sae], texts, folder, "texts")
    rows = [found.row_of[text] for text in texts]
    (f_TN,) = found.latents(rows)
    return found.x_TD[rows], f_TN


def test_mean_latents_are_those_of_each_text_alone(reader, tmp_path, monkeypatch):
    """Whatever else is in the batch. A text is cut, and tokens that are special do not count."""
    sae = SAE(16, 64, 4)
    texts = [TEXT[: 5 + 3 * i] for i in range(20)]
    texts[4] = "<eos>".join(texts[4:6])
    monkeypatch.setattr(eval_sae, "TASK_LENGTH", 12)
    x_TD, f_TN = mean_latents(reader, sae, texts, tmp_path)
    for t, text in enumerate(texts):
        ids = (reader.bos_ids + reader.tokenizer(text).input_ids)[:12]
        kept = [n for n, i in enumerate(ids) if i > 2 and n > 0]
        alone_LD = reader.read(torch.tensor([ids]))[0, kept]
        assert torch.allclose(x_TD[t], alone_LD.mean(0), atol=1e-4)
        assert torch.allclose(f_TN[t], sae.encode(alone_LD).mean(0), atol=1e-3)


class TokenizerThatDrops:
    """A tokenizer that makes no token of one text, as some do of characters that they lack."""

    def __init__(self, tokenizer, text):
        self.tokenizer = tokenizer
        self.text = text

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        texts = ["" if text == self.text else text for text in texts]
        return self.tokenizer(texts, **options)


def test_a_text_without_a_token_that_counts_is_zeros(tmp_path):
    """Also where the tokenizer has no BOS and makes nothing of it."""
    make_model(tmp_path, bos=False)
    reader = eval_sae.LanguageModel(str(tmp_path), 1, CPU, torch.float32)
    reader.tokenizer = TokenizerThatDrops(reader.tokenizer, "none")
    sae = SAE(16, 32, 4)
    x_TD, f_TN = mean_latents(reader, sae, ["none", TEXT], tmp_path / "two")
    assert (x_TD[0] == 0).all() and (f_TN[0] == 0).all() and (f_TN[1] != 0).any()
    x_TD, _ = mean_latents(reader, sae, ["none"], tmp_path / "one")
    assert (x_TD == 0).all()


@pytest.mark.parametrize("kind", ["roberta", "qwen3"])
def test_the_padding_of_a_batch_changes_nothing(model, tmp_path, monkeypatch, kind):
    """Nor where each token sees all others. Whether that is so is known."""
    saved(kind, model, tmp_path)
    reader = eval_sae.LanguageModel(str(tmp_path), 1, CPU, torch.float32)
    monkeypatch.setattr(eval_sae, "TASK_LENGTH", 30)
    sae = SAE(reader.width, 32, 4)
    alone, _ = mean_latents(reader, sae, [TEXT[:20]], tmp_path / "alone")
    beside, _ = mean_latents(reader, sae, [TEXT[:20], TEXT], tmp_path / "beside")
    assert torch.allclose(beside[:1], alone, atol=1e-5)
    assert eval_sae.is_causal(reader) == (kind == "qwen3")


def test_probing_takes_several_files(run, probe_file, tmp_path, result):
    """Each is a task of its own, and the figure is their mean."""
    other = tmp_path / "other.csv"
    other.write_text(Path(probe_file).read_text().replace("fox", "dog 1").replace("warm", "lazy 2"))
    argv = [run / "s0", "--metrics", "probe", "scr", "--train", "100", "--test", "50", "--probe"]
    found = []
    for files in ([probe_file], [other], [probe_file, other]):
        found.append(result([*argv, *files]).stored)
    for family in ("probe", "scr"):
        first, second, both = (content[family] for content in found)
        assert [part["task"] for part in both["parts"]] == ["words", "other"]
        assert both["parts"] == first["parts"] + second["parts"]
        assert_mean(both, first, second)
    assert found[0]["probe"]["figures"] != found[1]["probe"]["figures"]


def assert_mean(both, first, second):
    """The figures of one entry of eval.json are the mean of those of two others."""
    means = {key: (first["figures"][key] + second["figures"][key]) / 2 for key in first["figures"]}
    assert both["figures"] == pytest.approx(means)


def test_two_files_of_one_name_are_two_tasks(probe_file, tmp_path):
    (tmp_path / "other").mkdir()
    same_name = tmp_path / "other" / Path(probe_file).name
    shutil.copy(probe_file, same_name)
    frames = eval_sae.task_frames([str(probe_file), str(same_name)], False, {})
    assert set(frames) == {str(probe_file), str(same_name)}
    files = ["d/x.jsonl", "x.jsonl", "x.jsonl.gz"]
    assert list(eval_sae.task_frames(files, False, {})) == files


def test_one_task_that_can_not_be_had_costs_itself(run, probe_file, tmp_path, result):
    """With its reason; what is measured is not whole."""
    few = tmp_path / "few.csv"
    few.write_text("text,label\nfox,a\ndog,b\n")
    plain = tmp_path / "plain.csv"
    plain.write_text(re.sub(",[a-z]+$", "", Path(probe_file).read_text(), flags=re.MULTILINE))
    argv = [run / "s0", "--probe", probe_file, few, plain, "--train", 40, "--test", 20]
    found = result([*argv, "--metrics", "probe", "scr"])
    assert found.code == 0
    reason = r"probe: few is left out: .*the label \w has \d \w+ texts, and 20 are needed"
    assert re.search(reason, found.out)
    assert "scr: plain is left out: it has no column `attribute`" in found.out
    assert not found.stored["probe"]["is_whole"]
    assert [part["task"] for part in found.stored["probe"]["parts"]] == ["words", "plain"]
    assert [part["task"] for part in found.stored["scr"]["parts"]] == ["words"]


def test_the_benchmarks_tasks_that_can_not_be_had_are_told(run, monkeypatch, result):
    """Each with its reason, and github-code always."""
    import datasets

    def load_dataset(name, *subset, split):
        if "ag_news" not in name:
            raise ConnectionError("no network")
        rows = [{"text": f"{TEXT[:30]} {i}", "label": i % 4} for i in range(240)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = result([run / "s0", "--metrics", "probe", "--train", "40", "--test", "20"])
    assert found.code == 0
    stored = found.stored["probe"]
    assert [(part["task"], part["seed"]) for part in stored["parts"]] == [("ag_news", 0)]
    assert stored["sample"] == {"ag_news": {"train": 160, "test": 80}}
    assert stored["notes"][0].startswith("github-code is left out")
    assert len(stored["notes"]) == 7 and not stored["is_whole"]
    (bios,) = [note for note in stored["notes"] if note.startswith("bias_in_bios 1 ")]
    assert "LabHC/bias_in_bios" in bios and "no network" in bios
    assert f"probe: {bios}" in found.out


@pytest.mark.parametrize("family", ["probe", "scr"])
def test_a_text_is_read_once_for_all_samples_and_autoencoders(
    run, probe_file, tmp_path, monkeypatch, family
):
    """And memory holds the latents of one autoencoder at a time; no file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = []
    fromfile = numpy.fromfile
    monkeypatch.setattr(
        numpy, "fromfile", lambda file, **kind: held.append(file.name) or fromfile(file, **kind)
    )
    argv = [run, "--metrics", family, "--probe", probe_file, "--seed", "0", "1", "2"]
    with contexts_noted() as passes:
        assert evaluated([*argv, "--train", "40", "--test", "20"]) == 0
    texts = [tuple(ids) for ids_BL in passes for ids in ids_BL.tolist()]
    assert 60 <= len(set(texts)) == len(texts)
    assert held == ["0", "1"] * 3 and not list(tmp_path.iterdir())


def test_figures_are_meaned_over_seeds(run, probe_file, result):
    """Those of several seeds are the mean of those of each alone, which stand beside it."""
    argv = [run / "s0", "--metrics", "probe", "scr", "--probe", probe_file, "--train", "40"]
    found = [result([*argv, "--seed", *seeds]).stored for seeds in ("0", "1", ("0", "1", "0"))]
    for family in ("probe", "scr"):
        first, second, both = [stored[family] for stored in found]
        assert first["figures"] != second["figures"]
        assert [part["seed"] for part in both["parts"]] == [0, 1]
        assert both["parts"] == first["parts"] + second["parts"]
        assert_mean(both, first, second)


# -------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("separable", [True, False])
def test_logistic_regression_meets_its_optimality_conditions(separable):
    x_TS = torch.randn(200, 5).double() * torch.tensor([0.01, 1, 1, 30, 5]) + 3
    noise_T = 0 if separable else 2 * torch.randn(200)
    y_T = x_TS[:, 1] + x_TS[:, 2] + noise_T > 6
    weight_T = (torch.rand(200) > 0.2).double()
    probe = eval_sae.logistic_regression(x_TS, y_T, weight_T)
    residual_T = weight_T * (torch.sigmoid(x_TS @ probe.w_D + probe.b) - y_T.double())
    assert (probe.w_D + residual_T @ x_TS).abs().max() < 1e-4
    assert residual_T.sum().abs() < 1e-4
    right = eval_sae.accuracy(x_TS, y_T, probe)
    assert right > 0.97 if separable else 0.6 < right < 0.95


def test_the_probe_on_many_columns_is_autograds():
    x_TD = torch.randn(60, 8)
    y_T = torch.rand(60) > 0.5
    generator = torch.Generator().manual_seed(3)
    own = eval_sae.linear_probe(x_TD, y_T, x_TD, y_T, generator, 1, batch=6, lr=0.02, l1=0.01)
    generator.manual_seed(3)
    w_D = torch.zeros(8).uniform_(-(8**-0.5), 8**-0.5, generator=generator).requires_grad_()
    b = torch.zeros(()).uniform_(-(8**-0.5), 8**-0.5, generator=generator).requires_grad_()

    def loss_of(rows):
        entropy = F.binary_cross_entropy_with_logits(x_TD[rows] @ w_D + b, y_T[rows].float())
        return entropy + 0.01 * w_D.abs().sum()

    adam = torch.optim.AdamW([w_D, b], lr=0.02)
    fit(adam, loss_of, torch.randperm(60, generator=generator).split(6))
    assert torch.allclose(own.w_D, w_D, atol=1e-5)
    assert torch.allclose(own.b, b, atol=1e-5)


def test_a_probe_is_that_of_its_best_epoch_and_ends_without_a_better_one():
    """Epoch by epoch by autograd. The labels are noise, so that the best epoch is none of the last,
    and others are as good; with a patience of 3 a worse one ends it.
    """
    torch.manual_seed(38)
    x_TD = torch.randn(60, 4)
    y_T = torch.rand(60) > 0.5
    x_UD = torch.randn(31, 4)
    y_U = torch.rand(31) > 0.5
    generator = torch.Generator().manual_seed(2)
    w_D = torch.zeros(4).uniform_(-0.5, 0.5, generator=generator).requires_grad_()
    b = torch.zeros(()).uniform_(-0.5, 0.5, generator=generator).requires_grad_()
    adam = torch.optim.AdamW([w_D, b], lr=0.1)
    weights = []
    right = []

    def loss_of(rows):
        logits = x_TD[rows] @ w_D + b
        return F.binary_cross_entropy_with_logits(logits, y_T[rows].float())

    for _ in range(20):
        fit(adam, loss_of, torch.randperm(60, generator=generator).split(10))
        weights.append(w_D.detach().clone())
        right.append((((x_UD @ w_D + b) > 0) == y_U).sum().item())
    best = right.index(max(right))
    early = right.index(max(right[:6]))
    assert best == 7 and right.count(right[best]) > 1
    assert early == 2 and right[:6].count(right[early]) > 1
    for patience, epoch in ((99, best), (3, early)):
        generator.manual_seed(2)
        data = (x_TD, y_T, x_UD, y_U, generator)
        own = eval_sae.linear_probe(*data, epochs=20, batch=10, lr=0.1, patience=patience)
        assert torch.allclose(own.w_D, weights[epoch], atol=1e-5)
        assert not torch.allclose(own.w_D, weights[epoch + 1], atol=1e-3)


def test_a_probe_sees_as_many_of_its_class_as_of_the_others():
    label_T = torch.tensor([0] * 50 + [1] * 61 + [2] * 70)[torch.randperm(181)] + 5
    rows = eval_sae.class_and_others(label_T, 6, torch.Generator())
    first, own, last = torch.bincount(label_T[rows]).tolist()[5:]
    assert own == 61 and sorted([first, last]) == [30, 31]
    assert len(rows.unique()) == 122
    splits = eval_sae.class_splits(label_T, 100, seed=0)
    assert len(splits) == 3
    for label, (train, test, is_class_T) in zip((5, 6, 7), splits):
        assert train.max() < 100 <= test.min()
        assert torch.equal(is_class_T, label_T == label)
        for rows in (train, test):
            assert is_class_T[rows].float().mean() == 0.5
        assert is_class_T[train].sum() == is_class_T[:100].sum()
    again = eval_sae.class_splits(label_T, 100, seed=1)
    assert not torch.equal(again[0].train, splits[0].train)


def test_the_others_of_a_class_are_random_and_so_is_what_is_too_much():
    label_T = torch.arange(4).repeat_interleave(100)
    taken = []
    for seed in range(12):
        rows = eval_sae.class_and_others(label_T, 0, torch.Generator().manual_seed(seed))
        taken.append(torch.bincount(label_T[rows], minlength=4).tolist())
        own = rows[label_T[rows] == 1] - 100
        assert own.max() > 60  # not the first 34
    # 34 of each of three are two too many, of whichever.
    assert {tuple(sorted(sizes)) for sizes in taken} <= {(33, 33, 34, 100), (32, 34, 34, 100)}
    assert {sizes.index(34, 1) for sizes in taken} == {1, 2}
    assert any(sizes[3] == 34 for sizes in taken)


def test_a_class_is_told_by_the_latents_of_either_choice():
    """One latent is large and hardly differs, another is small and tells all."""
    label_T = torch.arange(400) % 2
    f_TN = torch.zeros(400, 2)
    f_TN[:, 0] = torch.randn(400) * 50 + 10 * label_T
    f_TN[:, 1] = 0.1 * torch.rand(400) + label_T
    inputs = eval_sae.TaskInputs(0, label_T, label_T * 0, 300, f_TN)
    (figures,) = eval_sae.probing_figures(inputs, [None], iter([f_TN]))
    assert figures["standardised_1"] == 1 and figures["latents_1"] == figures["x_1"] < 0.8
    assert figures["latents_2"] == 1 and figures["latents_all"] > 0.9


def test_probing_finds_the_planted_latent():
    """And noise is told by chance, half, whatever the number of classes."""
    label_T = torch.arange(1500) % 5
    f_TN = torch.rand(1500, 40)
    for c in range(5):
        f_TN[:, 7 * c] = (label_T == c) + 0.1 * torch.rand(1500)
    f_TN[:, 30] *= 3  # large, and tells nothing
    splits = eval_sae.class_splits(label_T, 750, 0)
    found = eval_sae.sparse_probing(f_TN, splits, eval_sae.mean_difference)
    assert found[1] == found[2] == 1
    assert eval_sae.full_probing(f_TN, splits, 0) > 0.99
    noise_TN = torch.rand(6000, 20)
    splits = eval_sae.class_splits(torch.arange(6000) % 5, 3000, 0)
    noise = eval_sae.sparse_probing(noise_TN, splits, eval_sae.mean_difference)
    assert all(abs(noise[k] - 0.5) < 0.03 for k in (1, 2, 5, 20))
    assert abs(eval_sae.full_probing(noise_TN, splits, 0) - 0.5) < 0.08  # that of its best epoch


def test_a_standardised_choice_does_not_hang_on_a_latents_size():
    """A large, noisy latent has the largest difference of means, a small one the clearest."""
    y_T = torch.arange(2000) % 2 == 0
    f_TN = torch.randn(2000, 6)
    f_TN[:, 2] = 100 * torch.randn(2000) + 30 * y_T
    f_TN[:, 4] = 0.001 * torch.randn(2000) + 0.005 * y_T
    f_TN[:, 5] = 7.0  # without deviation
    score_N = eval_sae.standardised_difference(f_TN, y_T)
    for n in range(5):
        first, second = f_TN[y_T, n].double(), f_TN[~y_T, n].double()
        pooled = math.sqrt((first.var() + second.var()) / 2)
        assert score_N[n].item() == pytest.approx(
            abs(first.mean() - second.mean()).item() / pooled, rel=1e-4
        )
    assert score_N[5] == 0
    assert score_N.argmax() == 4
    assert eval_sae.mean_difference(f_TN, y_T).argmax() == 2
    scale_N = torch.tensor([1, 10, 0.1, 3, 1000, 1])
    scaled_N = eval_sae.standardised_difference(f_TN * scale_N, y_T)
    assert torch.allclose(scaled_N, score_N, rtol=1e-3)


def test_probings_texts_are_random_and_balanced():
    cells = dict.fromkeys(product("xyz", (0, 1)), 400)
    chosen = eval_sae.probing_sample(frame_of(cells), 80, 60, seed=0).frame
    assert sizes_of(chosen, False) == [40] * 6
    assert sizes_of(chosen, True) == [30] * 6
    numbers = chosen["text"].str.split().str[-1].astype(int)
    assert numbers.max() > 300  # not the first ones
    again = eval_sae.probing_sample(frame_of(cells), 80, 60, seed=1).frame
    assert again["text"].tolist() != chosen["text"].tolist()
    for text, label, attribute in zip(chosen["text"], chosen["label"], chosen["attribute"]):
        assert text.startswith(f"{'xyz'[label]} {attribute} ")
    cells["y", 1] = 30
    chosen = eval_sae.probing_sample(frame_of(cells), 80, 60, seed=0).frame
    assert sizes_of(chosen, False) == [30] * 6
    cells["y", 1] = 20  # are enough
    chosen = eval_sae.probing_sample(frame_of(cells), 80, 60, seed=0).frame
    assert sizes_of(chosen, False) == sizes_of(chosen, True) == [20] * 6
    cells["y", 1] = 19
    with pytest.raises(
        InputError, match="y with the attribute 1 has 19 training texts, and 20 are"
    ):
        eval_sae.probing_sample(frame_of(cells), 80, 60, seed=0)
    with pytest.raises(InputError, match="two labels are needed, and it has 1"):
        eval_sae.probing_sample(frame_of({("x", 0): 90}), 80, 60, seed=0)


def test_benchmark_frames_are_of_its_columns_and_classes(monkeypatch):
    """The loader's calls, answered by rows made here, as the benchmark's datasets have them."""
    import datasets

    def reviews(name, split):
        rows = [{"text": f"{i}", "category": i % 4, "rating": (1.0, 5.0)[i % 2]} for i in range(99)]
        return datasets.Dataset.from_list(rows[: 80 if split == "train" else 40])

    monkeypatch.setattr(datasets, "load_dataset", reviews)
    frame = eval_sae.hub_frame(eval_sae.AMAZON, [3, 1])
    assert frame["text"].astype(int).mod(4).map({3: 0, 1: 1}).tolist() == frame["label"].tolist()
    assert set(frame["attribute"]) == {5.0}
    assert frame["is_test"].tolist() == [False] * 40 + [True] * 20

    def sentences(name, subset, split):
        rows = [{"translation": {x: f"{x} {i}" for x in subset.split("-")}} for i in range(300)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", sentences)
    frame = eval_sae.hub_frame(*eval_sae.PROBING["europarl"])
    languages = [list(eval_sae.LANGUAGES)[label] for label in frame["label"]]
    assert frame["text"].str.split().str[0].tolist() == languages
    assert frame["is_test"].mean() == 0.2


def test_probing_says_which_label_lacks_texts():
    cells = {("x", 0): 80, ("y", 0): 50, ("z", 0): 70}
    sample = eval_sae.probing_sample(frame_of(cells), 60, 50, 0)
    lack = "the label y has 50 training texts, and 60 are needed: no other gives more"
    assert sample.notes == [lack]


# ---------------------------------------------------------------------------------------------- scr


def planted_attributes(T=4800):
    """Activations in which one direction has the label, weakly, and another the attribute,
    strongly; labels and attributes."""
    torch.manual_seed(0)
    label_T = torch.arange(T) % 2
    attribute_T = torch.arange(T) // 2 % 2
    f_TN = torch.rand(T, 8) * 0.05
    strong_T = 2.0 * attribute_T
    f_TN[:, :4] += torch.stack([label_T, 1 - label_T, strong_T, 2.0 - strong_T], 1)
    return f_TN, label_T, attribute_T


def test_scr_of_a_planted_dictionary():
    f_TN, label_T, attribute_T = planted_attributes()
    W_ND = torch.eye(8)
    x_TD = f_TN @ W_ND
    sets = eval_sae.scr_sets(label_T, attribute_T, 2400)
    probes = eval_sae.scr_probes(x_TD, label_T, attribute_T, sets)
    assert eval_sae.accuracy(x_TD, label_T, probes.label) == 1
    assert eval_sae.accuracy(x_TD, attribute_T, probes.attribute) == 1
    assert eval_sae.accuracy(x_TD, label_T, probes.biased) < 0.9  # it took the attribute for it
    score = partial(eval_sae.scr, probes, x_TD, f_TN, label_T, attribute_T, sets)
    assert score(W_ND)["scr_2"] == pytest.approx(1, abs=0.02)
    assert set(score(torch.zeros(8, 8)).values()) == {0.0}
    assert set(score(W_ND)) == {"scr_2", "scr_5"}  # no more than there are latents
    f_TN[:2400, 2:4] = 0  # the attribute's latents tell no longer: they are not ablated
    W_ND[2:] = 0
    assert score(W_ND)["scr_5"] <= 0


def fixed_scr(cells, bad, biased_D=(0.4, 0.6, 0.3)):
    """SCR with fixed probes, of texts with so many of each (label, attribute).

    Dimension 0 has the label, 1 the attribute, 2 is always 1. The clean probes look at the first
    and at the second, but that of what is `bad` always says no.
    """
    label_T = torch.tensor([label for (label, _), size in cells.items() for _ in range(size)])
    attribute_T = torch.tensor([one for (_, one), size in cells.items() for _ in range(size)])
    f_TN = torch.stack([label_T, attribute_T, torch.ones(len(label_T))], 1).float()
    no = torch.tensor(-10.0)
    half = torch.tensor(-0.5)
    probes = eval_sae.ScrProbes(
        label=eval_sae.Probe(torch.eye(3)[0], no if bad == "label" else half),
        attribute=eval_sae.Probe(torch.eye(3)[1], no if bad == "attribute" else half),
        biased=eval_sae.Probe(torch.tensor(biased_D), half),
    )
    rows = torch.arange(len(f_TN))
    sets = eval_sae.ScrSets(rows, rows, rows, rows)
    return eval_sae.scr(probes, f_TN, f_TN, label_T, attribute_T, sets, torch.eye(3))["scr_2"]


@pytest.mark.parametrize(
    "worse, cells",
    [
        ("label", {(0, 0): 2, (0, 1): 3, (1, 0): 1, (1, 1): 2}),
        ("attribute", {(0, 0): 2, (0, 1): 1, (1, 0): 3, (1, 1): 2}),
        ("label", {(0, 0): 2, (0, 1): 3, (1, 0): 2, (1, 1): 2}),  # the bad one is worse than it
    ],
)
def test_scr_takes_the_direction_in_which_the_biased_probe_is_worse(worse, cells):
    """It says yes where the label or the attribute is 1, and is mended wholly by ablating either.

    So the score is 1. Where the clean probe of what it is worse at is bad, there is no gap, and it
    is 0; where that of the other one is bad, nothing changes.
    """
    other = {"label": "attribute", "attribute": "label"}[worse]
    assert fixed_scr(cells, bad=None) == 1
    assert fixed_scr(cells, bad=worse) == 0
    assert fixed_scr(cells, bad=other) == 1


def test_scr_ablates_by_effect_and_no_latent_without():
    """The effect is the difference of means times what the latent writes along the probe.

    Latents 2 and 4 differ most between the attribute's values, and write nothing along its probe;
    3 writes along it and does not differ. Only latent 1 does both. Without it the biased probe is
    right, and without 0 or 3 it is as wrong as can be.
    """
    label_T = torch.arange(8) // 4
    attribute_T = torch.arange(8) // 2 % 2
    columns = [label_T, attribute_T, 5 * attribute_T, torch.ones(8), 3 * attribute_T]
    f_TN = torch.stack(columns, 1).float()
    W_ND = torch.eye(5)
    W_ND[3, 1] = 1
    x_TD = f_TN @ W_ND
    biased = eval_sae.Probe(torch.tensor([0.4, 0.6, 0.001, 0.2, 0.0]), torch.tensor(-1.0))
    probes = eval_sae.ScrProbes(
        label=eval_sae.Probe(torch.eye(5)[0], torch.tensor(-0.5)),
        attribute=eval_sae.Probe(torch.eye(5)[1], torch.tensor(-1.5)),
        biased=biased,
    )
    rows = torch.arange(8)
    sets = eval_sae.ScrSets(rows, rows, rows, rows)
    assert eval_sae.accuracy(x_TD, label_T, biased) == 0.75
    assert eval_sae.accuracy(x_TD - f_TN[:, 1:2] @ W_ND[1:2], label_T, biased) == 1
    found = eval_sae.scr(probes, x_TD, f_TN, label_T, attribute_T, sets, W_ND)
    assert found == {"scr_2": 1.0, "scr_5": 1.0}


def test_scr_trains_its_effects_and_tests_its_probes_on_the_clean_sets():
    """The two halves differ: in the training texts latent 1 has the attribute, in the others 2."""
    label_T = torch.arange(8).repeat(2) // 4
    attribute_T = torch.arange(8).repeat(2) // 2 % 2
    is_test_T = torch.arange(16) >= 8
    first_T = attribute_T * ~is_test_T
    f_TN = torch.stack([label_T, first_T, attribute_T * is_test_T, torch.ones(16)], 1).float()
    W_ND = torch.eye(4)
    W_ND[2] = W_ND[1]  # both write the attribute
    x_TD = f_TN @ W_ND
    half = torch.tensor(-0.5)
    probes = eval_sae.ScrProbes(
        label=eval_sae.Probe(torch.eye(4)[0], half),
        attribute=eval_sae.Probe(torch.eye(4)[1], half),
        biased=eval_sae.Probe(torch.tensor([0.4, 0.6, 0.0, 0.3]), half),
    )
    rows = torch.arange(16)
    none = torch.zeros(0, dtype=torch.long)
    sets = eval_sae.ScrSets(rows[:8], rows[8:], none, none)
    # Of the latents that have an effect on the training texts, none is active on the test texts.
    assert eval_sae.scr(probes, x_TD, f_TN, label_T, attribute_T, sets, W_ND) == {"scr_2": 0.0}
    sets = eval_sae.ScrSets(rows[8:], rows[8:], none, none)
    assert eval_sae.scr(probes, x_TD, f_TN, label_T, attribute_T, sets, W_ND) == {"scr_2": 1.0}


def test_scr_is_zero_where_there_is_next_to_nothing_to_mend():
    """The biased probe errs on one text of 2,500, of both label and attribute, and ablating mends
    it; a gap of under 0.001 gives 0, as in SAEBench."""
    found = {}
    for T in (2500, 500):
        label_T = torch.arange(T) % 2
        f_TN = torch.stack([label_T, torch.zeros(T), torch.ones(T)], 1).float()
        f_TN[1, 1] = 5
        zero = torch.tensor(0.0)
        probes = eval_sae.ScrProbes(
            label=eval_sae.Probe(torch.eye(3)[0], torch.tensor(-0.5)),
            attribute=eval_sae.Probe(torch.eye(3)[1], zero),
            biased=eval_sae.Probe(torch.tensor([1.0, -0.2, 0.0]), torch.tensor(-0.5)),
        )
        rows = torch.arange(T)
        sets = eval_sae.ScrSets(rows, rows, rows, rows)
        found[T] = eval_sae.scr(probes, f_TN, f_TN, label_T, label_T, sets, torch.eye(3))["scr_2"]
    assert found == {2500: 0.0, 500: pytest.approx(1.0)}


def test_scr_balances_what_is_clean_and_takes_as_many_texts_for_what_is_biased():
    """The smallest combination limits only the sets that it is in."""
    label_T = torch.arange(4000) % 2
    attribute_T = torch.arange(4000) // 2 % 2
    few = torch.arange(4000) % 2000 < 400
    kept = ((label_T == attribute_T) | few).nonzero()[:, 0]
    cells_T = (2 * label_T + attribute_T)[kept]
    n_train = int((kept < 2000).sum())
    sets = eval_sae.scr_sets(label_T[kept], attribute_T[kept], n_train)
    sizes = [torch.bincount(cells_T[rows]).tolist() for rows in sets]
    assert sizes == [[100] * 4, [100] * 4, [500, 0, 0, 500], [500, 0, 0, 500]]
    for rows in (sets.clean_train, sets.biased_train):
        assert rows.max() < n_train
    for rows in (sets.clean_test, sets.biased_test):
        assert rows.min() >= n_train


def test_scrs_probes_are_trained_as_saebench_trains_them():
    """The biased one for the label. All of them for 20 epochs, also without a better one."""
    f_TN, label_T, attribute_T = planted_attributes(400)
    f_TN += 0.5 * torch.randn(f_TN.shape)
    sets = eval_sae.scr_sets(label_T, attribute_T, 200)
    found = eval_sae.scr_probes(f_TN, label_T, attribute_T, sets, seed=3)
    generator = torch.Generator().manual_seed(3)
    settings = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "l1": 1e-3}
    for name, y_T, train, test in (
        ("label", label_T, sets.clean_train, sets.clean_test),
        ("attribute", attribute_T, sets.clean_train, sets.clean_test),
        ("biased", label_T, sets.biased_train, sets.biased_test),
    ):
        data = (f_TN[train], y_T[train], f_TN[test], y_T[test], generator)
        expected = eval_sae.linear_probe(*data, **settings)
        assert torch.equal(getattr(found, name).w_D, expected.w_D)
        assert torch.equal(getattr(found, name).b, expected.b)


def test_scrs_texts_are_the_first_of_each_combination():
    """Of the first two labels and attributes, whatever the seed."""
    cells = {("x", 0): 90, ("x", 1): 90, ("y", 0): 30, ("y", 1): 90}
    frame = frame_of({**cells, ("z", 0): 90, ("x", 2): 90})
    sample = eval_sae.scr_sample(frame, 80, 60, 7)
    assert sample.seed == 7
    chosen = sample.frame
    assert sizes_of(chosen, False) == [80, 40, 30, 80]
    assert sizes_of(chosen, True) == [60, 30, 30, 60]
    assert chosen["is_test"].is_monotonic_increasing  # the training texts come first
    first = frame[(frame["label"] == "x") & (frame["attribute"] == 1) & ~frame["is_test"]]
    shown = chosen[(chosen["label"] == 0) & (chosen["attribute"] == 1) & ~chosen["is_test"]]
    assert shown["text"].tolist() == first["text"].tolist()[:40]


@pytest.mark.parametrize(
    "cells, words",
    [
        ({("x", 0): 90, ("x", 1): 90, ("y", 0): 19, ("y", 1): 90}, "y with the attribute 0 has 19"),
        ({("x", 0): 90, ("y", 0): 90}, "two values of `attribute` are needed"),
        ({("x", 0): 90, ("x", 1): 90}, "two values of `label` are needed"),
        ({("x", 0): 90, ("y", 1): 90}, "x with the attribute 1 has 0"),
    ],
)
def test_a_task_that_scr_can_not_use_says_why(cells, words):
    with pytest.raises(InputError, match=words):
        eval_sae.scr_sample(frame_of(cells), 80, 60, 0)


def test_scr_leaves_out_texts_without_an_attribute():
    cells = dict.fromkeys(product("xy", ("m", "n")), 60)
    frame = frame_of(cells)
    without = frame.assign(attribute=None, text="none " + frame["text"])
    sample = eval_sae.scr_sample(pandas.concat([without, frame]), 40, 40, 0)
    assert sample.notes == ["480 texts have no attribute, and are left out"]
    assert sample.frame.equals(eval_sae.scr_sample(frame, 40, 40, 0).frame)


def test_scr_says_which_labels_it_takes():
    """The first two; odd numbers of texts are no lack, and what is one is told with its cell."""
    cells = {(label, attribute): 120 for label in range(3) for attribute in range(2)}
    sample = eval_sae.scr_sample(frame_of(cells), 41, 21, 0)
    assert sample.notes == ["0 and 1 alone are used of 3 values of `label`"]
    assert len(sample.frame) == 2 * (41 + 20) + 2 * (21 + 10)
    cells = {(0, 0): 60, (0, 1): 30, (1, 0): 60, (1, 1): 60}
    sample = eval_sae.scr_sample(frame_of(cells), 80, 60, 0)
    cell = "the label {} with the attribute {} has {} training texts, and {} are needed"
    short = [(0, 0, 60, 80), (0, 1, 30, 40), (1, 1, 60, 80)]
    assert sample.notes == [cell.format(*values) for values in short]


# --------------------------------------------------------------------------------------- absorption


def absorbed(f_of, cosine_of, split=(0,), extra=0.0):
    """The absorption fraction of one word, and whether it is fully absorbed.

    Latent n has the value f_of[n] and a decoder row of cosine_of[n] with the letter's direction.
    The reconstruction has no error, except for `extra` along the direction.
    """
    N = len(f_of)
    cosine_N = torch.tensor(cosine_of).double()
    rest_N1 = (1 - cosine_N**2).sqrt()[:, None]
    W_ND = torch.cat([cosine_N[:, None], rest_N1 * torch.eye(N)], 1)
    direction_D = torch.eye(N + 1)[0].double()
    f_1N = torch.tensor([f_of]).double()
    x_1D = f_1N @ W_ND + extra * direction_D
    # Neither the length of rows nor that of the direction counts.
    long = (f_1N, x_1D, 3 * W_ND, 7 * direction_D, torch.tensor(split))
    share_P, full_P = eval_sae.absorbed_share(*long)
    return share_P.item(), full_P.item()


@pytest.mark.parametrize(
    "name, share, full, case",
    [
        ("the letter's latent has all", 0, False, ([2, 0, 0, 0], [1, 0.5, 0.5, 0.5])),
        ("another has all", 1, True, ([0, 4, 0, 0], [1, 0.5, 0.5, 0.5])),
        ("half and half", 0.5, False, ([1, 2, 0, 0], [1, 0.5, 0.5, 0.5])),
        ("of four absorbers, three", 0.6, False, ([2, 1, 1, 1, 0.5], [1, 1, 1, 1, 1])),
        ("no more than is missing", 1 / 3, False, ([2, 4, 0], [1, 0.5, 0.5], (0,), -1)),
        ("cosine 0.09 absorbs nothing", 0, False, ([1, 10, 0], [1, 0.09, 0.5])),
        ("cosine 0.11 does", 1.1 / 2.1, False, ([1, 10, 0], [1, 0.11, 0.5])),
        ("a negative cosine does not", 0.5, False, ([1, 2, 5], [1, 0.5, -0.5], (0,), 2.5)),
        ("absorbers carry 39 %", 0, False, ([0.61, 0.78, 0], [1, 0.5, 0.5])),
        ("absorbers carry 41 %", 0.41, False, ([0.59, 0.82, 0], [1, 0.5, 0.5])),
        ("two in the split, one active", 0.5, False, ([0, 1, 2], [1, 1, 0.5], (0, 1))),
        ("two in the split, none active", 1, True, ([0, 0, 2], [1, 1, 0.5], (0, 1))),
        ("the split's sum counts", 0.5, False, ([1, 1, 4], [1, 1, 0.5], (0, 1))),
        ("the residual points away", 0, False, ([0, 4, 0], [1, 0.5, 0.5], (0,), -3)),
        ("the split is negative", 1, False, ([1, 4, 0], [-0.5, 0.5, 0.5])),
        ("the residual and the split point away", 0, False, ([4, 2, 0], [-0.5, 0.5, 0.5])),
        ("the split is more negative", 1, False, ([4, 2, 0], [-0.5, 0.5, 0.5], (0,), 3)),
        ("none carries 40 % alone", 1, False, ([0, 0.78, 0.78], [1, 0.5, 0.5], (0,), 0.22)),
        ("one carries 41 % alone", 1, True, ([0, 0.82, 0.82], [1, 0.5, 0.5], (0,), 0.18)),
        ("full, of cosine 0.024", 0, False, ([0, 50, 0], [1, 0.024, 0.5])),
        ("full, of cosine 0.026", 0, True, ([0, 50, 0], [1, 0.026, 0.5])),
        ("nearly silent is active", 1, False, ([1e-7, 4, 0], [-0.5, 0.5, 0.5])),
        ("silent is not", 1, True, ([1e-9, 4, 0], [-0.5, 0.5, 0.5])),
    ],
)
def test_absorption_of_a_word_worked_by_hand(name, share, full, case):
    """On both sides of each of SAEBench's thresholds."""
    found_share, found_full = absorbed(*case)
    assert found_share == pytest.approx(share, abs=1e-6)
    assert found_full == full


@pytest.mark.parametrize(
    "f1s, expected",
    [
        ([0.5, 0.52, 0.9, 0.9, 0.9], 1),
        ([0.5, 0.54, 0.56, 0.9, 0.9], 2),
        ([0.5, 0.532, 0.564, 0.596, 0.628], 5),
        ([0.5, 0.528, 0.564, 0.596, 0.628], 1),
        ([0.9, 0.9, 0.99, 0.99, 0.99], 1),
        ([0.0, 0.1, 0.1, 0.2, 0.3], 2),
    ],
)
def test_a_letter_is_split_as_long_as_a_latent_lifts_f1_by_over_3_percent(f1s, expected):
    """The first n latents find a share r of a letter's words, and no other: F1 is 2 r / (1 + r)."""
    y_T = torch.arange(8000) % 4 == 0
    nth_T = torch.arange(8000) // 4 % 1000  # of a thousand words with the letter, in either half
    f_TS = torch.zeros(8000, 5)
    before = 0
    for s, f1 in enumerate(f1s):
        found = round(1000 * f1 / (2 - f1))
        f_TS[y_T & (nth_T >= before) & (nth_T < found), s] = 1
        before = max(before, found)
    assert eval_sae.letter_split(f_TS, y_T, 4000) == expected


def test_a_letters_split_is_what_balanced_probes_find():
    """Three latents have a third of its words each, which are one in 26; the fourth has none.

    Unbalanced probes would call no word positive. What is scored is the test part.
    """
    y_T = torch.arange(5200) % 26 == 0
    nth_T = torch.arange(5200) // 26
    f_TS = 0.01 * torch.rand(5200, 5)
    for n in range(3):
        f_TS[:, n] += 0.3 * (y_T & (nth_T % 3 == n)) + 0.05 * torch.rand(5200)
    assert eval_sae.letter_split(f_TS, y_T, 4160) == 3
    f_TS[4160:] = f_TS[4160:][:, [3, 4, 0, 1, 2]]  # on test words the first two tell nothing
    assert eval_sae.letter_split(f_TS, y_T, 4160) == 1


def test_f1_is_that_of_its_definition():
    predicted_T = torch.tensor([1, 1, 1, 0, 0, 0, 0]).bool()
    true_T = torch.tensor([1, 1, 0, 1, 1, 0, 0]).bool()
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert eval_sae.f1(predicted_T, true_T) == pytest.approx(expected)
    assert eval_sae.f1(torch.zeros(3).bool(), torch.zeros(3).bool()) == 0


def test_letters_that_the_model_spells_have_f1_over_60_percent():
    letter_U = torch.arange(260) % 26
    positive_UA = F.one_hot(letter_U, 26).bool()
    nth_U = torch.arange(260) // 26
    positive_UA[:, 0] &= nth_U < 5  # F1 2 · 5 / 15 = 0.67
    positive_UA[:, 1] &= nth_U < 4  # 2 · 4 / 14 = 0.57
    positive_UA[:, 2] &= nth_U < 0  # 0
    spelled_A = eval_sae.spelled_letters(positive_UA, letter_U)
    assert spelled_A.tolist() == [True, False, False] + [True] * 23


@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_the_probe_of_all_letters_is_autograds(l1):
    """On latents, which it computes batch by batch; positive words are weighted by their rarity."""
    sae = SAE(6, 20, 4)
    x_TD = torch.randn(300, 6)
    y_T = torch.randint(26, (300,))
    own = eval_sae.letter_probe(x_TD, y_T, batch=100, l2=1e-4, l1=l1, encode=sae.encode, seed=5)
    generator = torch.Generator().manual_seed(5)
    probe = torch.nn.Linear(20, 26)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-1, 1, generator=generator))
            parameter.mul_(20**-0.5)
    adam = torch.optim.Adam(probe.parameters(), weight_decay=1e-4)
    counts_A = torch.bincount(y_T, minlength=26)
    entropy = torch.nn.BCEWithLogitsLoss(pos_weight=(300 - counts_A) / counts_A)

    def loss_of(rows):
        loss = entropy(probe(sae.encode(x_TD[rows])), F.one_hot(y_T[rows], 26).float())
        return loss + l1 * probe.weight.abs().sum(1).mean()

    for epoch in range(50):
        adam.param_groups[0]["lr"] = 0.01 * 0.001 ** (epoch / 50)
        fit(adam, loss_of, torch.randperm(300, generator=generator).split(100))
    assert torch.allclose(own[0], probe.weight, atol=1e-4)
    assert torch.allclose(own[1], probe.bias, atol=1e-4)


def planted_letters(absorbing):
    """An autoencoder of 53 latents, the first 26 of which are letters, and Words that it spells.

    Where it is absorbing, one A word in 25 has latent 52, whose decoder row has a cosine of 0.71
    with the letter's, in the place of the letter's own.
    """
    nth_T, letter_T = torch.cartesian_prod(torch.arange(100), torch.arange(26)).T
    f_TN = 4.0 * F.one_hot(letter_T, 53) + 0.5 * F.one_hot(torch.randint(26, 52, (2600,)), 53)
    W_ND = torch.eye(60)[:53]
    W_ND[52] = F.normalize(torch.eye(60)[0] + torch.eye(60)[58], dim=0)
    if absorbing:
        f_TN[(letter_T == 0) & (nth_T % 25 == 0)] = 6.0 * F.one_hot(torch.tensor(52), 53)
    x_TD = f_TN @ W_ND
    decode = torch.linalg.pinv(W_ND)
    sae = planted_sae(W_ND)
    sae.encode = lambda x: (x @ decode).clamp(min=0)
    n_train = 75 * 26
    words = eval_sae.Words(
        x_TD, letter_T, n_train, x_TD[n_train:], letter_T[n_train:], 20 * torch.eye(60)[:26]
    )
    return sae, words


def test_absorption_is_the_mean_over_letters_of_planted_words(monkeypatch):
    """Latent 52 takes over one A word in 25, too few for it to be in the letter's split.

    The L1 probe is planted, too: of so few words it would find other candidates by chance.
    """
    own_latent_first = torch.eye(53)[:26]
    monkeypatch.setattr(eval_sae, "letter_probe", lambda *data, **_: (own_latent_first, None))
    for absorbing in (False, True):
        sae, words = planted_letters(absorbing)
        found = eval_sae.absorption(sae, words)
        share = 1 / 25 / 26 if absorbing else 0
        expected = {"full": share, "absorption": share, "split_latents": 1, "letters": 26}
        assert found == pytest.approx(expected, abs=1e-6)
    # What counts is what the scored words are on their new prompts.
    new_x_PD = words.new_x_PD.clone()
    new_x_PD[words.new_letter_P == 0] = 6.0 * sae.W_dec[52].detach()
    found = eval_sae.absorption(sae, words._replace(new_x_PD=new_x_PD))
    assert found["full"] == pytest.approx(1 / 26, abs=1e-6)
    # A letter that no scored word has does not count.
    without = words.new_letter_P != 3
    fewer = words._replace(
        new_x_PD=words.new_x_PD[without], new_letter_P=words.new_letter_P[without]
    )
    assert eval_sae.absorption(sae, fewer)["letters"] == 25


def test_absorption_chooses_its_candidates_by_an_l1_probe_on_the_training_words():
    """By the ten largest weights, and not the largest in size; with SAEBench's settings."""
    sae = SAE(16, 60, 8)
    torch.manual_seed(1)
    words = planted_words(sae)
    n_train = words.n_train
    train = (words.x_TD[:n_train], words.letter_T[:n_train])
    settings = {"batch": 4096, "l2": 1e-6, "l1": 0.01, "seed": 3}
    weight_AN, _ = eval_sae.letter_probe(*train, encode=sae.encode, **settings)
    largest_AS = weight_AN.abs().topk(10, dim=1).indices
    f_TN = sae.encode(words.x_TD).detach()
    shares = []
    sizes = []
    for letter in range(26):
        own_S = weight_AN[letter].sort(descending=True).indices[:10]
        n_split = eval_sae.letter_split(f_TN[:, own_S], words.letter_T == letter, n_train)
        x_PD = words.new_x_PD[words.new_letter_P == letter]
        direction_D = words.probe_AD[letter]
        data = (sae.encode(x_PD).detach(), x_PD, sae.W_dec.detach(), direction_D)
        share_P, _ = eval_sae.absorbed_share(*data, own_S[:n_split])
        shares.append(share_P.mean().item())
        sizes.append(n_split)
    assert not torch.equal(largest_AS, weight_AN.topk(10, dim=1).indices)
    assert max(sizes) > 1 and len(set(shares)) > 5
    found = eval_sae.absorption(sae, words, seed=3)
    assert found["absorption"] == pytest.approx(statistics.mean(shares), abs=1e-6)
    assert found["split_latents"] == pytest.approx(statistics.mean(sizes))


def test_words_are_read_after_ten_examples(reader, monkeypatch):
    """The prompts, as text: ten lines with the right letters, then the word, and others anew."""
    rng = random.Random(0)
    words = eval_sae.alphabetic_words(reader.tokenizer)
    read = []
    original = reader.batches

    def batches(prompts, *rest):  # with a column more, as beside a longer prompt
        read.append(prompts)
        for rows, ids_BL, kept_BL, x_BLD in original(prompts, *rest):
            yield rows, F.pad(ids_BL, (0, 1), value=-1), kept_BL, F.pad(x_BLD, (0, 0, 0, 1))

    monkeypatch.setattr(reader, "batches", batches)
    both = [eval_sae.spelled_activations(reader, words[:9], words, rng, "") for _ in range(2)]
    assert read[0] != read[1]
    assert not torch.allclose(*both)
    for prompt, (word, letter), x_D in zip(read[0], words, both[0]):
        *lines, last = reader.tokenizer.decode(prompt[1:]).strip("\n").split("\n")
        assert len(lines) == 10
        for line in lines:
            example, answer = line.split(" has the first letter:")
            assert example.strip()[0].upper() == answer.strip()
            assert example != reader.tokenizer.decode([word])
        assert prompt[0] == reader.tokenizer.bos_token_id
        assert prompt[-1] == word
        assert last == reader.tokenizer.decode([word])
        assert "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[letter] == last.strip()[0].upper()
        assert torch.allclose(reader.read(torch.tensor([prompt]))[0, -1], x_D, atol=1e-4)


def test_words_are_tokens_of_letters_maybe_after_a_space():
    tokens = [" the", "The", "<0x41>", " a1", "  b", "é", "!", " Zoo", ""]
    tokenizer = argparse.Namespace(
        batch_decode=lambda rows: [tokens[i].replace("<0x41>", "A") for (i,) in rows],
        convert_ids_to_tokens=lambda ids: [tokens[i] for i in ids],
    )
    tokenizer.__class__ = type("Tokenizer", (argparse.Namespace,), {"__len__": lambda self: 9})
    assert eval_sae.alphabetic_words(tokenizer) == [(0, 19), (1, 19), (7, 25)]


def test_absorption_of_a_planted_speller(speller, tmp_path, monkeypatch, result):
    """From the command line, of a model whose activations spell, on two samples of words.

    With a latent for each letter nothing is absorbed. Where one word in eight has a latent of its
    own that stands for the letter, it is, on the words of that latent.
    """
    monkeypatch.setattr(eval_sae, "FEWEST_LETTERS", speller.n_spelled)  # so many are enough
    found = {}
    for kind in ("letters", "absorbing"):
        argv = [speller.sae(tmp_path / kind, kind), "--metrics", "absorption"]
        run = result([*argv, "--words", "1040", "--seed", "0", "1"])
        assert run.code == 0 and run.row("absorption: full ↓")
        found[kind] = run.stored["absorption"]
        assert [part["seed"] for part in found[kind]["parts"]] == [0, 1]
        assert found[kind]["sample"] == {"words": 1040}
    letters = found["letters"]["figures"]
    assert letters["letters"] == speller.n_spelled
    assert letters["split_latents"] == 1
    assert letters["full"] == letters["absorption"] == 0
    absorbing = found["absorbing"]["figures"]
    # One word in eight has its own latent, of the letter's direction.
    assert absorbing["full"] == pytest.approx(1 / 8, abs=0.04)
    assert absorbing["absorption"] == pytest.approx(1 / 8, abs=0.04)
    # Each sample has its own words.
    first, second = (part["figures"] for part in found["absorbing"]["parts"])
    assert first != second
    # Letters that the model does not spell are left out, and too few are no measurement.
    argv = [tmp_path / "letters", "--metrics", "absorption", "--words", "104", "--seed", "0"]
    few = result(argv)
    assert few.code == 2 and few.stored["absorption"]["figures"] == letters
    assert re.search(r"spells \d+ of 26 letters with 104 of its 1,066 words", few.out)
    assert "22 are needed; more --words spell more" in few.out


def test_scored_are_the_words_that_the_probe_recognises_of_letters_that_the_model_spells(
    speller, monkeypatch
):
    """On new prompts, of the last fifth of the words. The probe is made to fail on E and H."""
    reader = eval_sae.LanguageModel(str(speller.folder), 0, CPU, torch.float32)
    probe = eval_sae.letter_probe
    calls = []

    def letter_probe(*data, **options):
        calls.append((data, options))
        weight_AD, b_A = probe(*data, **options)
        b_A = b_A.clone()
        b_A[4] = -1e6  # it finds no word with E
        b_A[7] = 1e6  # and takes all for H, those with E among them
        return weight_AD, b_A

    monkeypatch.setattr(eval_sae, "letter_probe", letter_probe)
    # E counts as spelled all the same, so that only the probe leaves it out.
    spelled = eval_sae.spelled_letters
    monkeypatch.setattr(
        eval_sae, "spelled_letters", lambda *data: spelled(*data) | (torch.arange(26) == 4)
    )
    with contexts_noted() as passes:
        words = eval_sae.words_of(reader, 1040, 3)
    (call,) = calls
    (x_TD, _), options = call
    assert options == {"batch": 64, "l2": 1e-4, "seed": 3}
    assert len(x_TD) == words.n_train == 832
    # Prompts end with their word, and all are as long.
    asked = torch.cat(passes)[:, -1].tolist()
    first, again = asked[:1040], asked[1040:]
    assert set(again) < set(first[832:])
    letter_of = dict(eval_sae.alphabetic_words(reader.tokenizer))
    old = []
    for word, x_D, letter in zip(again, words.new_x_PD, words.new_letter_P.tolist(), strict=True):
        assert letter == letter_of[word] and letter not in (4, 7)
        old.append(words.x_TD[first.index(word)])
    assert len(set(words.new_letter_P.tolist())) >= 20
    # They are other prompts of the same words.
    assert not torch.allclose(torch.stack(old), words.new_x_PD)


# ------------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize("kind", ["mlp", "att", "transcoders"])
def test_gemma_scopes_autoencoders_of_other_activations_are_refused(tmp_path, kind):
    file = tmp_path / f"gemma-scope-2b-pt-{kind}" / "layer_1" / "width_16k" / "params.npz"
    gemma_scope(file.parent)
    with pytest.raises(InputError, match=f"is of Gemma Scope's {kind}"):
        eval_sae.open_sae(str(file), "cpu")


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_old_folders_of_saelens_name_their_hook_otherwise(tmp_path, hook):
    """Before version 6: no architecture, and hook_point beside the settings."""
    old = {"model_name": "some/model", "context_size": 16, "metadata": None, "hook_point": hook}
    write_foreign(tmp_path, foreign_weights()[0], **old)
    subject = eval_sae.Subject(str(tmp_path), "cpu")
    assert subject.unfit == f"it is for {hook}, and only a layer's output is measured"
    head = {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 3}
    write_foreign(tmp_path, foreign_weights()[0], **old | head)
    assert "it is for one attention head" in eval_sae.Subject(str(tmp_path), "cpu").unfit
    right = {"hook_point": "blocks.1.hook_resid_post"}
    write_foreign(tmp_path, foreign_weights()[0], **old | right)
    subject = eval_sae.Subject(str(tmp_path), "cpu")
    assert subject.layer == 1 and subject.unfit is None


def test_a_file_of_gemma_scope_that_is_not_finite_is_refused(tmp_path):
    weights = gemma_scope(tmp_path / "layer_3")
    weights["W_enc"][0, 0] = math.nan
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    numpy.savez(tmp_path / "layer_3" / "params.npz", **arrays)
    with pytest.raises(InputError, match="its weights are not finite"):
        eval_sae.open_sae(tmp_path / "layer_3", "cpu")


def test_gemma_scope_file_is_read_and_its_decoder_norms_folded(tmp_path):
    p = gemma_scope(tmp_path / "layer_3")
    x_BD = torch.randn(50, 16)
    sae = eval_sae.open_sae(tmp_path / "layer_3" / "params.npz", "cpu")
    pre_BN = x_BD @ p["W_enc"] + p["b_enc"]
    f_BN = pre_BN.relu() * (pre_BN > p["threshold"])
    assert torch.allclose(sae.encode(x_BD), f_BN * p["W_dec"].norm(dim=1), atol=1e-3)
    assert torch.allclose(sae(x_BD), f_BN @ p["W_dec"] + p["b_dec"], atol=1e-3)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.cfg.hook_name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize(
    "folder, hook",
    [
        ("layer_0_study/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_82", "blocks.1."),
        ("layer_0/gemma-scope-2b-pt-res/layer_12", "blocks.12."),
        ("my-mlp-study/gemma-scope-2b-pt-res/layer_2", "blocks.2."),
        ("my-res-study/gemma-scope-2b-pt-mlp/layer_2", None),
        ("gemma-scope-2b-pt-res/old/gemma-scope-9b-pt-att/layer_2", None),
        ("gemma-scope-2b-pt-transcoders/layer_2/width_16k", None),
    ],
)
def test_the_last_parts_of_a_path_say_what_a_file_of_gemma_scope_is_of(tmp_path, folder, hook):
    gemma_scope(tmp_path / folder)
    if hook:
        sae = eval_sae.open_sae(tmp_path / folder / "params.npz")
        assert sae.cfg.hook_name == f"{hook}hook_resid_post"
    else:
        with pytest.raises(InputError, match="only its -res is of a layer's output"):
            eval_sae.open_sae(tmp_path / folder / "params.npz")


def test_a_change_of_the_activations_that_was_not_made_is_none(run, tmp_path):
    kwargs = {"center_writing_weights": False, "fold_ln": True}
    folder = copy_of(run, tmp_path / "sae", model_from_pretrained_kwargs=kwargs)
    assert eval_sae.open_sae(folder).cfg.model_from_pretrained_kwargs == kwargs


def test_a_topk_autoencoder_keeps_its_decoder_norms(tmp_path):
    """To fold them could change which latents are active."""
    sae, _ = random_sae("topk")
    sae.W_dec.data *= torch.rand(len(sae.b_enc), 1) + 0.5
    sgo_sae.save_sae(sae, sgo_sae.Config(k=sae.k), tmp_path)
    x_BD = torch.randn(30, 8)
    opened = eval_sae.open_sae(tmp_path, "cpu")
    assert torch.allclose(opened.encode(x_BD), sae.encode(x_BD), atol=1e-5)


def test_a_name_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    gemma_scope(tmp_path / "layer_5" / "width_16k")
    calls = []

    def download(repository, allow_patterns):
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sae = eval_sae.open_sae("some/scope/layer_5/width_16k", "cpu")
    inside = "layer_5/width_16k"
    assert calls == [("some/scope", [inside, f"{inside}/*"])]
    assert sae.cfg.hook_name == "blocks.5.hook_resid_post"
    for name in ("some/scope", str(tmp_path / "nowhere" / "sae")):
        with pytest.raises(InputError, match="there is no such file or folder"):
            eval_sae.open_sae(name, "cpu")


def test_loaded_autoencoder_has_the_interface_of_saebench(tmp_path):
    """What SAEBench 0.6.0 reads: weights of whatever type and device it moves them to, cfg."""
    sae, _ = random_sae("topk")
    cfg = sgo_sae.Config(k=sae.k, layer=7, model="some/model", ctx=64)
    sgo_sae.save_sae(sae, cfg, tmp_path)
    loaded = eval_sae.open_sae(tmp_path)
    x_BLD = torch.randn(2, 5, 8)
    assert torch.allclose(loaded(x_BLD), sae(x_BLD), atol=1e-5)
    assert torch.allclose(loaded.decode(loaded.encode(x_BLD)), sae(x_BLD), atol=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.allclose(getattr(loaded, name), getattr(sae, name))
    assert (loaded.cfg.hook_layer, loaded.cfg.hook_name) == (7, "blocks.7.hook_resid_post")
    assert (loaded.cfg.model_name, loaded.cfg.context_size) == ("some/model", 64)
    assert loaded.cfg.to_dict()["d_sae"] == len(sae.b_enc)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    moved = loaded.to(torch.bfloat16)
    assert moved.dtype == moved.W_dec.dtype == torch.bfloat16
    assert moved.encode(x_BLD.bfloat16()).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- table


def cells_of(subjects, families=("core",), **options):
    return cells_in(table_of(subjects, families, **options))


def test_table_has_means_and_deviations_over_seeds():
    values = {(0.0, 0): 1.0, (0.0, 1): 3.0, (0.1, 1): 9.0, (0.1, 0): 8.0, (0.2, 0): 2.5}
    subjects = measured(values)
    head, _, row = cells_of(subjects)
    assert head == ["", "alpha 0.0, 2 seeds", "alpha 0.1, 2 seeds", "alpha 0.2"]
    assert row == ["core: mse ↓", "2.0 ± 1.4", "8.50 ± 0.71", "2.500"]
    again = Measured("copies/a", subjects[0].settings, 0, [("text", 0, {"mse": 1.5})])
    head, _, row = cells_of([subjects[0], again])
    assert (head[2], row[1:]) == ("copies/a", ["1.000", "1.500"])


def test_a_column_is_named_by_what_differs_or_by_what_matters():
    base = {"arch": "topk", "d_sae": 64, "k": 4, "alpha": 0.0, "lr": 0.1, "lm_batch": 32}
    parts = [("text", 0, {"mse": 1.0})]
    alone = [Measured("runs/a-s0", base, 0, parts), Measured("runs/a-s1", base, 1, parts)]
    assert cells_of(alone)[0] == ["", "arch topk, d_sae 64, k 4, alpha 0.0, 2 seeds"]
    other = Measured("runs/b", {**base, "lr": 0.2}, 0, parts)
    assert cells_of([*alone, other])[0] == ["", "lr 0.1, 2 seeds", "lr 0.2"]
    # A setting that one of them lacks, or has as None, is another one.
    for value in (None, 0.5):
        other = Measured("runs/b", {**base, "alpha_start": value}, 1, parts)
        missing = Measured("runs/a", {**base, "alpha_start": 0.1}, 0, parts)
        names = cells_of([missing, other])[0][1:]
        assert names == ["alpha_start 0.1", f"alpha_start {value}"]
    later = Measured("runs/b", {**base, "max_norm": 5.0}, 1, parts)
    assert cells_of([alone[0], later])[0][1:] == ["a-s0", "max_norm 5.0"]
    foreign = Measured("some/where/params.npz", {}, 0, parts)
    assert cells_of([alone[0], foreign])[0][2] == "where"


def test_a_mean_over_tasks_lacks_what_one_of_them_lacks():
    values = {(0, 0, "a"): 0.1, (0, 0, "b"): 0.5, (0, 1, "a"): 0.1, (0, 1, "b"): None}
    subjects = measured(values, "scr", "scr_2")
    assert cells_of(subjects, ("scr",))[2][1] == "0.3000 (1 seeds)"
    assert cells_of(subjects[1:], ("scr",))[2][1] == ""


def test_a_figure_that_some_seeds_lack_says_how_many_count():
    values = {
        (alpha, seed): {
            "mse": None if alpha == 0 else 1.0 + seed,
            "bias": None if (alpha, seed) == (0, 1) else 2.0,
        }
        for alpha, seed in product((0, 1), range(3))
    }
    _, _, mse, bias = cells_of(measured(values))
    assert mse == ["core: mse ↓", "", "2.0 ± 1.0"]
    assert bias == ["core: bias", "2.000 (2 seeds)", "2.000"]


def two_way(n_settings, n_seeds):
    """Figures of setting + seed + a residual, and one that is the same for all, by (α, seed); and
    the values (seeds, settings)."""
    generator = torch.Generator().manual_seed(0)
    residual_SR = torch.randn(n_seeds, n_settings, generator=generator).double() / 100
    values_SR = 5 * torch.arange(n_seeds)[:, None] + 0.3 * torch.arange(n_settings) + residual_SR
    values = {}
    for setting, alpha in zip(range(n_settings), (20, 0, 2.5, 3, 4)):
        for seed in range(n_seeds):
            value = values_SR[seed, setting].item()
            values[alpha, seed] = {"mse": value, "cosine": value, "l0": 0.7}
    return values, values_SR


def test_intervals_pool_the_variance_over_the_settings():
    """A two-way analysis by hand; the differences are marked where they are better or worse.

    There are two settings more than seeds.
    """
    values, values_SR = two_way(n_settings=5, n_seeds=3)
    subjects = measured(values)
    eval_sae.name_subjects(subjects)
    baseline = eval_sae.baseline_of(subjects)
    assert baseline == "alpha 0"  # the unpenalised topk, and not the first
    head, _, mse, score, l0 = cells_of(subjects, baseline=baseline)
    names = ["alpha 20", "alpha 2.5", "alpha 3", "alpha 4"]
    assert head == ["", "alpha 0, 3 seeds", *(f"{name}, 3 seeds" for name in names), "±"]
    residual_SR = values_SR - values_SR.mean(1, keepdim=True) - values_SR.mean(0)
    residual_SR += values_SR.mean()
    deviation = (residual_SR.square().sum() / 8).sqrt().item()
    half = 2.30600 * deviation * math.sqrt(2 / 3)  # Student's t with 8 degrees of freedom
    assert eval_sae.student_t(4) == pytest.approx(2.77645, rel=1e-5)
    assert eval_sae.student_t(8) == pytest.approx(2.30600, rel=1e-5)
    assert float(mse[-1]) == pytest.approx(half, rel=0.05)
    means = values_SR.mean(0)
    for cell, setting in zip(mse[2:-1], (0, 2, 3, 4)):
        change = (means[setting] - means[1]).item()
        assert float(cell.strip("*_")) == pytest.approx(change, abs=1e-3)
        assert cell[0] == ("*" if change < 0 else "_")  # a smaller error is better
        assert score[mse.index(cell)][0] == ("_" if change < 0 else "*")  # and a larger cosine
    assert l0[1:] == ["0.7000", *["+0.0000"] * 4, "0.0000"]
    assert cells_of(subjects)[4][1:] == ["0.7000"] * 5  # though their mean is not exact


def test_a_difference_within_the_interval_is_not_marked():
    """Nor is one without an interval."""
    values = {(0, 0): 1.0, (0, 1): 1.1, (0, 2): 0.95, (1, 0): 1.02, (1, 1): 1.05, (1, 2): 1.0}
    row = cells_of(measured(values), baseline="alpha 0")[2]
    assert float(row[2]) == pytest.approx(0.0067, abs=5e-3) and float(row[3]) > 0.05
    first = {key: value for key, value in values.items() if key[1] == 0}
    assert cells_of(measured(first), baseline="alpha 0")[2][1:] == ["1.000", "+0.020", ""]


def test_a_setting_without_a_figure_takes_none_from_the_others():
    values, _ = two_way(n_settings=3, n_seeds=3)
    whole = cells_of(measured(values), baseline="alpha 0")
    lacking = measured(values)
    for subject in lacking:
        if subject.settings["alpha"] == 20:
            subject.records["core"] = record_of([], ["no text"])
    text = table_of(lacking, baseline="alpha 0")
    mse = cells_in(text)[2]
    assert mse[2] == "" and mse[3].strip("*_") == whole[2][3].strip("*_")
    assert "core of 20-0, 20-1, 20-2: no text" in text
    # And where the baseline lacks it, that is said.
    for subject in lacking:
        if subject.settings["alpha"] == 0:
            subject.records["core"] = record_of([])
    text = table_of(lacking, baseline="alpha 0")
    assert "core: mse: alpha 0 has no figure" in text
    assert cells_in(text)[2][1:] == ["", "", "", ""]


def test_differences_are_over_the_seeds_that_all_settings_have():
    """As if the others had not been trained; that is said."""
    values, _ = two_way(n_settings=3, n_seeds=4)
    fewer = {key: value for key, value in values.items() if key != (2.5, 1)}
    text = table_of(measured(fewer), baseline="alpha 0")
    assert "core: of 4 seeds, only 0, 2, 3 count" in text
    without = {key: value for key, value in values.items() if key[1] != 1}
    assert cells_in(text)[1:] == cells_of(measured(without), baseline="alpha 0")[1:]
    # With one that all have there is no interval, and with none no difference.
    lonely = {key: value for key, value in values.items() if key[0] != 2.5 or key[1] == 0}
    mse = cells_of(measured(lonely), baseline="alpha 0")[2]
    assert all(mse[1:4]) and mse[4] == ""
    apart = {(alpha, seed + 10 * (alpha == 2.5)): x for (alpha, seed), x in values.items()}
    text = table_of(measured(apart), baseline="alpha 0")
    assert "core: mse: the settings share no seed" in text
    assert cells_in(text)[2][1:] == ["", "", "", ""]


def test_samples_enter_the_interval():
    """Each run has two samples of words: ± over seeds and ± over samples are added in squares."""
    values_RSA = torch.tensor(  # samples, seeds, settings
        [[[0.50, 0.60], [0.52, 0.66], [0.51, 0.58]], [[0.54, 0.68], [0.55, 0.70], [0.58, 0.69]]]
    ).double()
    values = {}
    for setting, alpha in enumerate((0, 2)):
        for seed, sample in product(range(3), range(2)):
            values[alpha, seed, sample] = values_RSA[sample, seed, setting].item()

    def half(values, quantile):
        residual = values - values.mean(1, keepdim=True) - values.mean(0) + values.mean()
        freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
        deviation = (residual.square().sum() / freedom).sqrt().item()
        return quantile * deviation * math.sqrt(2 / values.shape[0])

    def text_of(keys):
        own = {key: values[key] for key in keys}
        return table_of(measured(own, "absorption", "full"), ("absorption",), baseline="alpha 0")

    over_seeds = half(values_RSA.mean(0), 4.30265)
    over_samples = half(values_RSA.mean(1), 12.7062)
    row = cells_in(text_of(values))[2]
    assert float(row[-1]) == pytest.approx(math.hypot(over_seeds, over_samples), rel=0.05)
    # With one seed, the samples alone give an interval, and it is said.
    text = text_of(key for key in values if key[1] == 0)
    assert "With one seed a setting ± is over samples alone" in text
    assert float(cells_in(text)[2][-1]) == pytest.approx(half(values_RSA[:, 0], 12.7062), rel=0.05)
    # The seed of a run that lacks a sample does not count in any.
    text = text_of(key for key in values if key != (0, 0, 0))
    assert "absorption: of 3 seeds, only 1, 2 count" in text
    mean = values_RSA[:, 1:, 0].mean().item()
    assert float(cells_in(text)[2][1]) == pytest.approx(mean, abs=1e-3)
    # Another family's sample is none of this one's.
    one = {key: value for key, value in values.items() if key[1:] == (0, 1)}
    subjects = measured(one, "absorption", "full")
    for subject in subjects:
        subject.records["core"] = record_of([eval_sae.Part("text", 0, {"mse": 1.0})])
    text = table_of(subjects, ("core", "absorption"), baseline="alpha 0")
    assert "With one seed a setting there is no ±" in text


def test_one_seed_gives_no_interval_and_says_so():
    for n_seeds in (1, 2):
        values, _ = two_way(n_settings=3, n_seeds=n_seeds)
        text = table_of(measured(values), baseline="alpha 0")
        assert ("there is no ±: train several" in text) == (n_seeds == 1)
        assert all((row[-1] == "") == (n_seeds == 1) for row in cells_in(text)[2:])


def test_what_the_user_names_is_compared_with(run, tmp_path, texts, result):
    """--paired takes the first unpenalised topk of the first RUN, --against what it names."""
    subjects = measured(two_way(n_settings=3, n_seeds=1)[0])
    eval_sae.name_subjects(subjects)
    assert eval_sae.baseline_of(subjects[:1]) == "alpha 20"
    relu = Measured("r", {"arch": "relu", "alpha": 0}, 0, [("text", 0, {"mse": 1})])
    relu.name = "arch relu"
    assert eval_sae.baseline_of([relu, *subjects]) == "alpha 0"
    other = trained_copy(run, copy_of(run, tmp_path / "other"), alpha=0.0)
    argv = ["--text", texts, "--contexts", "9", "--metrics", "core"]
    named = result([run / "s0", other, *argv, "--against", "alpha 0.0"])
    assert "are differences to alpha 0.0." in named.out
    assert "are differences to alpha 0.075." in result([run / "s0", other, *argv, "--paired"]).out
    assert "are differences to alpha 0.0." in result([other, run / "s0", *argv, "--paired"]).out


def trained_copy(run, folder, **changes):
    """Gives a copy of a run the settings of its training, with changes."""
    settings = json.loads((run / "s0" / "cfg.json").read_text())["metadata"]["settings"]
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["settings"] = {**settings, **changes}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_a_run_that_is_left_out_is_no_baseline(run, tmp_path, texts, result):
    other = copy_of(run, tmp_path / "runs" / "a", hook_name="blocks.2.hook_resid_post")
    trained_copy(run, other, alpha=0.0)
    copy_of(run, tmp_path / "runs" / "b")
    argv = [tmp_path / "runs", "--layer", "1", "--text", texts, "--contexts", "9"]
    found = result([*argv, "--metrics", "core", "--paired"])
    assert found.code == 1 and "are differences to b." in found.out
    assert float(cells_in(found.out)[2][1]) > 0


def test_a_sample_that_one_setting_lacks_altogether_leaves_no_difference():
    values = {}
    for (alpha, seed), figures in two_way(n_settings=3, n_seeds=3)[0].items():
        for sample in range(1 if alpha == 2.5 else 2):
            values[alpha, seed, sample] = figures
    text = table_of(measured(values), baseline="alpha 0")
    assert "core: mse: the settings share no seed" in text


def test_a_difference_that_is_the_same_in_each_seed_is_marked():
    """Its interval has no width, which is not to have none."""
    values = {(alpha, seed): alpha / 10 for alpha, seed in product((0, 1), range(3))}
    row = cells_of(measured(values), baseline="alpha 0")[2]
    assert row[2].startswith("_+0.10") and float(row[3]) == 0


def test_settings_are_compared_over_the_tasks_that_all_runs_have():
    """Each in a table of its own would have the mean over other tasks."""
    values = {}
    for alpha, seed in product((0, 1), (0, 1)):
        values[alpha, seed, "bios"] = 0.7 + 0.01 * alpha + 0.02 * seed
        if (alpha, seed) != (1, 1):
            values[alpha, seed, "hard"] = 0.1
    subjects = measured(values, "probe", "latents_all")
    for options in ({}, {"baseline": "alpha 0"}):
        text = table_of(subjects, ("probe",), **options)
        assert re.search("probe: left out of the means .*: hard", text)
        row = cells_in(text)[2]
        assert float(row[1].split()[0]) == pytest.approx(0.71)
    assert float(row[2].strip("*_")) == pytest.approx(0.01)
    assert "With one sample a task ± is over the seeds of training alone" in text


def test_a_difference_to_nothing_has_its_digits():
    """With one seed there is no ±."""
    subjects = measured({(0, 0): 0.0, (1, 0): 0.07594}, figure="dense")
    assert cells_of(subjects, baseline="alpha 0")[2][1:] == ["0.00000", "+0.07594", ""]


def test_cells_of_odd_names_and_numbers():
    assert eval_sae.markdown([["", "a|b"], ["x", "1"]]).splitlines()[0] == r"|   | a\|b |"
    assert eval_sae.mean_cell(0.0, 0.0) == "0"
    assert eval_sae.mean_cell(123456.0, 0.0) == "123,456"
    assert eval_sae.mean_cell(968.0, 0.0) == "968" and eval_sae.mean_cell(23.5, 0.0) == "23.50"
    assert eval_sae.mean_cell(1.0, 0.0) == "1.000"
    assert eval_sae.mean_cell(0.00012346, 0.0) == "0.0001235"
    assert eval_sae.mean_cell(2.0, 0.0123) == "2.000 ± 0.012"


def test_the_legend_has_the_figures_that_are_shown():
    text = table_of(measured({(0, 0): {"mse": 1.0, "l0": 3.0}}))
    assert "- core: mse ↓: squared error per element, in the model's units" in text
    assert "- core: l0: active latents of a token" in text
    assert "cosine" not in text


# --------------------------------------------------------------------------------------------- page


def little_pieces(kind):
    """A tokenizer of bytes as GPT-2's has them, or one that marks words as Llama's does."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte level":
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([TEXT], 300, show_progress=False)
        return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    known += [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_pieces_give_the_whole_text_with_whole_characters(kind):
    """Of a tokenizer whose characters are several tokens, and of one that marks words."""
    tokenizer = little_pieces(kind)
    text = "naïve 日本語  the quick\n    fox"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = eval_sae.pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(n for _, n in pieces) == len(ids)
    assert not any("\ufffd" in piece for piece, _ in pieces)
    # Where the text is cut within a character, its part is shown as what it is.
    whole = tokenizer("語", add_special_tokens=False).input_ids
    if kind == "byte level":
        assert len(whole) > 1
        assert eval_sae.text_of(tokenizer, whole[0]) == tokenizer.convert_ids_to_tokens(whole[0])
    word = tokenizer("the quick", add_special_tokens=False).input_ids[-1]
    assert eval_sae.text_of(tokenizer, word).endswith(tokenizer.decode([word]).strip())


def test_closest_pairs_are_those_of_the_definition():
    f_TN = independent_latents(2000, 1100)
    rate_N = f_TN.mean(0)
    i, j, k = ((rate_N > 0.04) & (rate_N < 0.09)).nonzero()[2:5, 0].tolist()
    f_TN[:, j] = f_TN[:, i]
    f_TN[:, k] = f_TN[:, i] * (torch.rand(2000) < 0.9)
    # A rare pair shares all of its 25 tokens: it is furthest over chance, and shares fewest.
    f_TN[:, :2] = (torch.arange(2000) < 25).float()[:, None]
    sae = argparse.Namespace(encode=torch.clone, b_enc=rate_N)
    activity = eval_sae.activity_of(sae, f_TN)
    assert torch.equal(torch.stack([activity.tokens, activity.latents], 1), f_TN.nonzero())
    assert torch.equal(activity.fired_N, (f_TN > 0).sum(0))
    first = eval_sae.closest_pairs(activity, 3)
    pairs = eval_sae.closest_pairs(activity, 5)
    assert first == pairs[:3]
    assert pairs[0][:2] == (i, j)
    assert {pair[:2] for pair in pairs[1:3]} == {(i, k), (j, k)}
    assert len(pairs) == 5
    shared_NN = f_TN.T @ f_TN
    fired_N = shared_NN.diagonal()
    for pair in pairs:
        shared = shared_NN[pair.i, pair.j].item()
        sizes = sorted(fired_N[[pair.i, pair.j]].tolist())
        assert (pair.shared, pair.chance) == pytest.approx((shared, sizes[1] / 2000))
        assert pair.w == pytest.approx(shared / sizes[0])
    score = [(pair.w - pair.chance) * pair.shared for pair in pairs]
    assert score == sorted(score, reverse=True)
    # Two latents that share fewer tokens than by chance are no pair that competes.
    token_T = torch.arange(2000)
    f_TN = torch.stack([token_T < 200, (token_T >= 199) & (token_T < 399)], 1).float()
    assert eval_sae.closest_pairs(eval_sae.activity_of(sae, f_TN), 5) == []


class Numbers:
    """A tokenizer whose token n is the text <n>. A multiple of 5 is the first half of a character,
    of which the next token is the second half.
    """

    def decode(self, ids, **options):
        pieces = []
        for n, token in enumerate(ids):
            if token % 5 == 0 and n + 1 == len(ids):
                pieces.append("\ufffd")
            elif n == 0 or ids[n - 1] % 5 > 0:
                pieces.append(f"<{token}>")
        return "".join(pieces)

    def __call__(self, text, **options):
        return argparse.Namespace(input_ids=[1])

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


@pytest.fixture
def planted_page():
    """An evaluation of six latents on 40 contexts of 32 tokens, whose token n is the text <n>."""
    rate_N = torch.tensor([0.09, 0.09, 0.08, 0.08, 0.08, 0.0])
    f_RLN = torch.rand(40, 32, 6) * (torch.rand(40, 32, 6) < rate_N)
    f_RLN[..., 1] = torch.where(torch.rand(40, 32) < 0.8, f_RLN[..., 0] / 2, 0)
    kept_RL = torch.ones(40, 32, dtype=torch.bool)
    kept_RL[:, 0] = False
    head = torch.nn.Linear(6, 50)  # a bias, as Phi's has, raises the same for all latents
    torch.nn.init.normal_(head.bias, std=9)
    lm = argparse.Namespace(get_output_embeddings=lambda: head)
    ids_RL = torch.arange(40 * 32).view(40, 32)
    return argparse.Namespace(
        activations=f_RLN,
        contexts=eval_sae.Contexts(ids_RL, kept_RL, {}, []),
        model=argparse.Namespace(has_head=True, lm=lm, tokenizer=Numbers()),
    )


def test_page_shows_pairs_and_contexts_of_a_planted_dictionary(planted_page):
    sae = planted_sae(torch.linalg.qr(torch.randn(6, 6))[0])
    sae.encode = lambda x: x
    views = eval_sae.portrait(planted_page, sae)
    f_RLN = planted_page.activations * planted_page.contexts.kept_RL[..., None]
    active = f_RLN > 0
    sizes = active.sum((0, 1)).tolist()
    both = int((active[..., 0] & active[..., 1]).sum())
    first = views[0]
    pair = (both, both / min(sizes[:2]), max(sizes[:2]) / (40 * 31))
    assert (first["both"], first["w"], first["chance"]) == pytest.approx(pair)
    assert first["cosine"] == pytest.approx((sae.W_dec[0] @ sae.W_dec[1]).item(), abs=1e-6)
    W_unembed = planted_page.model.lm.get_output_embeddings().weight
    for i, view in enumerate(first["latents"]):
        assert (view["number"], view["n_tokens"]) == (i, sizes[i])
        order = (W_unembed @ sae.W_dec[i]).argsort(descending=True).tolist()
        assert [word for word, _ in view["effects"]] == ["raises", "lowers"]
        for (_, tokens), best in zip(view["effects"], (order[:8], order[:-9:-1])):
            assert tokens == [f"'<{n}>'" for n in best]
        peaks = f_RLN[..., i].amax(1).topk(3)
        assert view["peak"] == peaks.values[0]
        for context, r in zip(view["contexts"], peaks.indices.tolist(), strict=True):
            peak = max(piece.own for piece in context)
            assert peak == f_RLN[r, :, i].max()
            for piece in context[:-1]:
                number = int(piece.text[1:-1])
                own = slice(number - 32 * r, number - 32 * r + (2 if number % 5 == 0 else 1))
                assert 0 <= own.start < own.stop <= 32
                expected = (f_RLN[r, own, i].max(), f_RLN[r, own, 1 - i].max())
                assert (piece.own, piece.other) == expected


def test_page_shows_no_context_in_which_a_latent_is_silent(planted_page):
    """Nor what it is on tokens that do not count, such as BOS."""
    f_RLN = planted_page.activations
    f_RLN[..., :2] = 0
    f_RLN[:2, 1:16, :2] = 1 + torch.rand(2, 15, 2)
    f_RLN[:, 0, :2] = 9
    sae = planted_sae(torch.eye(6))
    sae.encode = lambda x: x
    first = eval_sae.portrait(planted_page, sae)[0]
    assert [view["number"] for view in first["latents"]] == [0, 1]
    for view in first["latents"]:
        assert view["n_tokens"] == 30 and 1 < view["peak"] < 2 and len(view["contexts"]) == 2


def test_page_is_one_file_in_which_text_is_text(train_argv, tmp_path, result):
    """Documents with HTML and scripts; nothing is loaded from elsewhere, and nothing runs."""
    attack = '</p></script><script>alert("x")</script><img src=x onerror=alert(1)> & <!--'
    texts = tmp_path / "texts.jsonl"
    rows = [f"{attack} {TEXT[i * 40 : i * 40 + 300]} {attack}" for i in range(60)]
    write_rows(texts, [{"text": row} for row in rows])
    out = tmp_path / "<b>run" / "<i>s0"
    out.parent.mkdir()
    assert trained(train_argv(dataset=texts, out=out)) == 0
    other = tmp_path / "other"
    shutil.copytree(out, other)
    argv = [out, other, "--text", texts, "--metrics", "core", "--html", tmp_path / "page.html"]
    printed = result(argv)
    assert printed.code == 0  # competition, which the page needs, is measured too
    page = (tmp_path / "page.html").read_text()
    assert f"wrote {tmp_path / 'page.html'}" in printed.err
    tags = []
    words = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            forbidden = {"src", "href", "action", "srcdoc", "data"}
            for name, _ in attributes:
                assert name not in forbidden and not name.startswith("on"), name

        def handle_data(self, data):
            words.append(data)

    Reader().feed(page)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
    assert not re.search(r"@import|url\(", page)
    text = " ".join("".join(words).split())
    assert f"{other}, seed 0" in text and "alert" in text
    # The pairs come first, then the table as it was printed.
    heads = ["The pairs that compete most", "All figures"]
    places = [text.index(head) for head in heads]
    assert places == sorted(places)
    n_tokens = printed.stored["core"]["sample"]["tokens"]
    assert f"measured on {n_tokens:,} tokens" in text
    assert printed.out.strip() in html.unescape(page)


# --------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_of_activations_that_are_not_finite_is_none(
    run, texts, probe_file, monkeypatch, result
):
    """In every family that reads the model."""
    real = sgo_sae.layer_output
    monkeypatch.setattr(
        sgo_sae, "layer_output", lambda *args, **more: real(*args, **more) * math.inf
    )
    monkeypatch.setattr(eval_sae, "is_causal", lambda model: True)
    monkeypatch.setattr(eval_sae, "FEWEST_WORDS", 5)
    argv = [run / "s0", "--text", texts, "--contexts", "9", "--probe", probe_file]
    families = ["core", "competition", "probe", "scr", "absorption"]
    found = result([*argv, "--train", "40", "--test", "20", "--metrics", *families])
    assert found.code == 2 and "mse" not in found.out
    for family in families:
        (reason,) = re.findall(f"^{family}: not measured, (.*)$", found.out, re.MULTILINE)
        assert "not finite; try --dtype" in reason


def test_the_runs_of_a_folder_are_its_own_and_those_within(run, tmp_path):
    copy_of(run, tmp_path / "all")
    copy_of(run, tmp_path / "all" / "old")
    copy_of(run, tmp_path / "all" / "deep" / "grid" / "s0")
    expected = [tmp_path / "all", tmp_path / "all/deep/grid/s0", tmp_path / "all/old"]
    assert eval_sae.members(f"{tmp_path}/all/") == list(map(str, expected))
    assert eval_sae.members(str(run)) == [str(run / "s0"), str(run / "s1")]
    assert eval_sae.members(str(run / "s1") + "/") == [str(run / "s1")]


def test_a_run_a_saelens_folder_and_gemma_scope_stand_in_one_table(
    model, run, texts, tmp_path, result
):
    """SAELens names the hook as Hugging Face's modules are called, and the model's context size."""
    changed = {"hook_name": "model.layers.1", "context_size": 16, "model_name": "a-small-model"}
    lens = copy_of(run, tmp_path / "lens", **changed)
    gemma_scope(tmp_path / "layer_1" / "average_l0_4")
    scope = tmp_path / "layer_1" / "average_l0_4" / "params.npz"
    argv = [run / "s0", lens, scope, "--text", texts, "--metrics", "core", "--contexts", "9"]
    found = result([*argv, "--model", model[0]])
    assert found.code == 0
    names = ["arch topk, d_sae 64, k 4, alpha 0.075", "lens", "average_l0_4"]
    assert cells_in(found.out)[0][1:] == names
    ours, theirs, others = found.row("core: mse ↓")
    assert ours == theirs != others
    for file in (run / "s0" / "eval.json", lens / "eval.json", scope.with_suffix(".eval.json")):
        assert json.loads(file.read_text())["core"]["sample"]["contexts"] == 9


def test_the_model_and_the_layer_are_those_of_runs_that_are_measured(run, texts, tmp_path, result):
    """And not of one that is refused, whatever its place."""
    head = copy_of(run, tmp_path / "a", hook_head_index=3, model_name="/nowhere/model")
    argv = ["--text", texts, "--metrics", "core", "--contexts", "9"]
    found = result([head, run / "s0", *argv])
    assert found.code == 1 and found.row("core: mse ↓")
    assert f"{head} is left out: " in found.err
    layer = copy_of(run, tmp_path / "b", hook_name="blocks.2.hook_resid_post", model_name="/other")
    found = result([layer, run / "s0", *argv, "--layer", "1"])
    assert found.code == 1 and "it is for layer 2" in found.err


def evaluation_of(paths, *argv):
    _, args = eval_sae.parse_args([*map(str, paths), *argv])
    subjects = [eval_sae.Subject(str(path), "cpu") for path in paths]
    return eval_sae.Evaluation(args, subjects, CPU, torch.float32)


def test_runs_of_several_texts_are_not_measured_on_that_of_the_first(run, tmp_path):
    """They share the text of those that name one, of whose dataset the validation split is held
    out.
    """
    one = copy_of(run, tmp_path / "one", context_size=32, dataset_path="some/data")
    two = copy_of(run, tmp_path / "two", context_size=64, dataset_path="other/data")
    none = copy_of(run, tmp_path / "none", context_size=None)
    config = evaluation_of([one, none]).text_config()
    assert (config.dataset, config.split, config.ctx) == ("some/data", "validation", 32)
    with pytest.raises(InputError, match=r"their --ctx, 32 \(.*one\) and 64 \(.*two\): give --ctx"):
        evaluation_of([one, two]).text_config()
    with pytest.raises(InputError, match="some/data.*other/data.*give --text"):
        evaluation_of([one, two], "--ctx", "16").text_config()
    config = evaluation_of([one, two], "--ctx", "16", "--text", "held.jsonl").text_config()
    assert (config.dataset, config.split, config.ctx) == ("held.jsonl", "train", 16)
    argv = ["--ctx", "16", "--text", "some/data", "--split", "test"]
    assert evaluation_of([one, two], *argv).text_config().split == "test"
    evaluation = evaluation_of([run / "s0"])
    other = {"dataset": "some/data", "subset": "small", "text_column": "body"}
    evaluation.subjects[0].training.update(other)
    config = evaluation.text_config()
    assert (config.subset, config.text_column, config.ctx) == ("small", "body", 16)


def test_a_pattern_of_texts_is_known_by_its_contents(run, texts, tmp_path, result):
    """With --resume figures are measured again where one of its files changed. A run that was
    trained on a pattern is not measured on it."""
    shutil.copy(texts, tmp_path / "a.jsonl")
    shutil.copy(texts, tmp_path / "b.jsonl")
    folder = copy_of(run, tmp_path / "sae")
    argv = [folder, "--metrics", "core", "--text", f"{tmp_path}/?.jsonl", "--contexts", "9"]
    before = result([*argv, "--resume"]).stored["core"]["settings"]["text"]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert result([*argv, "--resume"]).stored["core"]["settings"]["text"] != before
    trained_on = copy_of(run, tmp_path / "other", dataset_path=f"{tmp_path}/?.jsonl")
    found = result([trained_on, "--metrics", "core"])
    assert found.code == 2 and "held out" in found.out


def test_another_seed_reads_other_contexts(run, texts, tmp_path, result):
    """Of a text that has more than are read; the first seed counts."""
    argv = [copy_of(run, tmp_path / "sae"), "--text", texts, "--metrics", "core", "--contexts", "9"]
    found = [result([*argv, "--seed", *seeds]).stored["core"] for seeds in ("0", "1", ("1", "0"))]
    first, second, again = (content["figures"] for content in found)
    assert first != second == again


def test_the_column_of_a_text_can_be_chosen(run, texts, tmp_path, result):
    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    write_rows(tmp_path / "other.jsonl", [{"body": row["text"], "text": None} for row in rows])
    argv = [run / "s0", "--metrics", "core", "--contexts", "9", "--text"]
    first = result([*argv, texts])
    other = result([*argv, tmp_path / "other.jsonl", "--text-column", "body"])
    assert first.code == other.code == 0
    assert first.stored["core"]["figures"] == other.stored["core"]["figures"]
    assert "not held out" in first.out and "not held out" not in other.out  # a copy is not known


def test_text_that_was_trained_on_is_told(run, texts, tmp_path, result):
    """It is the file of --dataset, or one of its folder, or its split on the Hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(texts, folder / name)
    cases = [
        (folder, folder / "b.jsonl", {}, True),
        (folder / "*.jsonl", tmp_path / "data/../data/a.jsonl", {}, True),
        (folder / "a.jsonl", folder / "b.jsonl", {}, False),
        ("some/data", "some/data", {}, True),
        ("some/data", "some/data", {"split": "test"}, False),
        ("some/data", "other/data", {}, False),
        (None, texts, {}, False),
    ]
    for n, (dataset, text, options, expected) in enumerate(cases):
        metadata = {"dataset_path": str(dataset)} if dataset else {}
        subject = eval_sae.Subject(str(copy_of(run, tmp_path / str(n), **metadata)), CPU)
        config = sgo_sae.Config(dataset=str(text), **options)
        assert subject.is_trained_on(config) == expected, (dataset, text)
    own, other = tmp_path / "0", tmp_path / "2"
    argv = ["--text", folder / "b.jsonl", "--metrics", "core", "--contexts", "9"]
    found = result([own, other, *argv])
    words = f"core: the text is not held out: {own} trained on it"
    assert found.code == 0 and words in found.out.splitlines()


def test_runs_of_two_context_sizes_are_probed_together(run, probe_file, texts, tmp_path, result):
    """Which reads no contexts; core, which does, asks for --ctx."""
    copy_of(run, tmp_path / "longer", context_size=32)
    argv = [run / "s0", tmp_path / "longer", "--probe", probe_file, "--train", 40, "--test", 20]
    found = result([*argv, "--text", texts, "--metrics", "probe", "core"])
    assert found.code == 1 and all(found.row("probe: latents 1 ↑"))
    assert re.search(r"^core: not measured, .*--ctx, 16 \(", found.out, re.MULTILINE)


def test_a_model_of_few_positions_says_so(model, tmp_path, texts, result):
    """The texts of tasks have up to 128 tokens, whatever the contexts have."""
    saved("opt", model, tmp_path / "lm")
    cfg = sgo_sae.Config(model=str(tmp_path / "lm"), layer=1, k=4, ctx=16)
    sgo_sae.save_sae(SAE(32, 64, 4), cfg, tmp_path / "sae")
    rows = [{"text": f"{i} {TEXT * 2}", "label": i % 2} for i in range(400)]
    write_rows(tmp_path / "long.jsonl", rows)
    write_rows(tmp_path / "short.jsonl", [{**row, "text": row["text"][:40]} for row in rows])
    sizes = ["--train", 40, "--test", 20, "--text", texts, "--contexts", 9]
    argv = [tmp_path / "sae", *sizes, "--probe", tmp_path / "long.jsonl"]
    found = result([*argv, "--metrics", "probe", "core"])
    assert found.code == 1 and found.row("core: mse ↓")
    assert re.search(r"probe: not measured, long .* the model can't read \d+ tokens", found.out)
    # Contexts that are too long for the model are no matter of tasks, which are short.
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["context_size"] = 1024
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    argv = [tmp_path / "sae", *sizes, "--probe", tmp_path / "short.jsonl"]
    assert result([*argv, "--metrics", "probe"]).code == 0
    assert "--ctx 1024: " in result([*argv, "--metrics", "probe", "core"]).refusal


def test_evaluation_prints_a_table_and_is_repeatable(run, texts, probe_file, result):
    argv = [run / "s0", run / "s1", "--text", texts, "--probe", probe_file, "--contexts", "40"]
    argv += ["--train", "200", "--test", "100", "--words", "200"]
    found = result(argv)
    assert found.code == 1  # absorption has no words
    assert result(argv).out == found.out
    assert "2 seeds" in found.out.splitlines()[0]
    for label in (
        "core: mse ↓",
        "behaviour: ce score ↑",
        "competition: mean max cos ↓",
        "probe: latents 1 ↑",
        "probe: standardised 20 ↑",
        "scr: scr 2 ↑",
    ):
        assert found.row(label)
    assert "- probe: latents 1, 2, 5, 20 ↑: accuracy of a probe on the latents" in found.out
    assert re.search("^absorption: not measured, ", found.out, re.MULTILINE)
    for family, content in found.stored.items():
        known = {figure.name for figure in eval_sae.FIGURES if figure.family == family}
        assert {re.sub(r"_\d+$", "", name) for name in content["figures"]} <= known
    core = found.stored["core"]
    assert core["figures"]["l0"] == pytest.approx(4, abs=0.2)
    assert core["settings"]["contexts"] == 40
    assert found.stored["probe"]["sample"]["words"] == {"train": 400, "test": 200}
    counted = 16 * core["sample"]["tokens"] / core["sample"]["contexts"]
    expected = core["figures"]["mse"] * 16 / counted  # of 16 dimensions
    assert core["figures"]["mse_benchmark"] == pytest.approx(expected)
    found = result([*argv[:4], "--metrics", "core", "--contexts", "100000"])
    assert found.code == 0 and re.search(r"has \d{2,3} contexts, not 100000", found.out)


def half_weights(folder):
    (folder / "sae_weights.safetensors").write_text("half")


def narrow(folder):
    sgo_sae.save_sae(SAE(8, 32, 4), sgo_sae.Config(), folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] = {"hook_name": "blocks.1.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_name": "a-small-model"}, "it is for a-small-model"),
        ({"hook_name": "blocks.2.hook_resid_post"}, "it is for layer 2"),
        ({"hook_name": "blocks.0.hook_resid_post"}, "it is for layer 0"),
        ({"hook_name": "blocks.1.hook_mlp_out"}, "it is for blocks.1.hook_mlp_out"),
        ({"hook_head_index": 0}, "it is for one attention head"),
        ({"hook_name": 12}, "its cfg.json can't be loaded"),
        ({"settings": [1]}, "its cfg.json can't be loaded"),
        ({"settings": {"seed": None}}, "its cfg.json can't be loaded"),
        ({"context_size": "long"}, "its cfg.json can't be loaded"),
        ({"model_from_pretrained_kwargs": ["fold_ln"]}, ""),
        (half_weights, "can't be loaded"),
        (narrow, "it is for 8 dimensions"),
    ],
)
def test_what_is_wrong_with_one_run_costs_itself(run, texts, tmp_path, result, change, words):
    """The figures of others are printed, and the code is 1, as where a figure lacks. What can be
    known at the beginning is said there.
    """
    metadata = {} if callable(change) else change
    odd = copy_of(run, tmp_path / "odd", **metadata)
    if callable(change):
        change(odd)
    argv = ["--text", texts, "--metrics", "core", "competition", "--contexts", "9", "--ctx", "16"]
    found = result([run / "s0", odd, *argv])
    assert found.code == 1
    reasons = re.findall(f"{odd}(?: is left out: |: not measured, )(.*)", found.out)
    assert reasons and all(words in reason for reason in reasons)
    assert (f"{odd} is left out: " in found.err) == (change is not narrow)
    for row in (found.row("core: mse ↓"), found.row("competition: rare ↓")):
        assert float(row[0]) > 0 and row[1:] in ([], [""])
    assert not (odd / "eval.json").exists()


# ------------------------------------------------------------------------------------------ results


def small_record(figures, **changes):
    settings = changes.pop("settings", {"contexts": 9})
    part = eval_sae.Part("text", 0, figures)
    made = record_of([part] if figures else [], settings=settings)
    return made._replace(**changes)


def test_two_evaluations_of_a_folder_keep_each_others_families(run, tmp_path):
    copy_of(run, tmp_path / "sae")
    first, second = (eval_sae.Subject(str(tmp_path / "sae"), CPU) for _ in range(2))
    eval_sae.keep(first, "core", small_record({"mse": 1.0}))
    eval_sae.keep(second, "probe", small_record({"latents_1": 0.5}))
    eval_sae.keep(first, "scr", small_record({"scr_2": 0.1}))
    stored = json.loads((tmp_path / "sae" / "eval.json").read_text())
    assert {family: content["figures"] for family, content in stored.items()} == {
        "core": {"mse": 1.0},
        "probe": {"latents_1": 0.5},
        "scr": {"scr_2": 0.1},
    }
    names = {file.name for file in (tmp_path / "sae").iterdir()}
    files = {"cfg.json", "sae_weights.safetensors", "metrics.jsonl", "eval.json", ".eval.lock"}
    assert names == files


def test_a_failure_takes_the_place_of_no_measurement(run, tmp_path):
    copy_of(run, tmp_path / "sae")
    subject = eval_sae.Subject(str(tmp_path / "sae"), CPU)
    parts = [eval_sae.Part(task, 0, {"mse": 1.0}) for task in ("one", "two")]
    settings = {"contexts": 9}
    both = record_of(parts, settings=settings)
    eval_sae.keep(subject, "core", both)
    eval_sae.keep_failure(subject, "core", "no network")
    assert subject.records["core"].figures == {}  # what this call says
    assert subject.records["core"].notes == ["not measured, no network"]
    assert eval_sae.stored_record(eval_sae.file_of(subject), "core", settings) == both
    # What has fewer tasks is not put in the place of what has more, unless the settings differ.
    eval_sae.keep(subject, "core", record_of(parts[:1], ["lacks"], False, settings))
    assert eval_sae.stored_record(eval_sae.file_of(subject), "core", settings) == both
    eval_sae.keep(
        subject, "core", small_record({"mse": 3.0}, is_whole=False, settings={"contexts": 8})
    )
    assert eval_sae.stored_families(eval_sae.file_of(subject))["core"]["figures"] == {"mse": 3.0}
    assert not eval_sae.stored_record(eval_sae.file_of(subject), "core", {"contexts": 8}).is_whole
    assert eval_sae.stored_record(eval_sae.file_of(subject), "core", {"contexts": 7}) is None
    eval_sae.keep(subject, "core", small_record({"mse": 4.0}, settings={"contexts": 8}))
    assert eval_sae.stored_record(eval_sae.file_of(subject), "core", {"contexts": 8}).figures == {
        "mse": 4.0
    }


def test_a_kill_leaves_the_figures_that_were_there(run, tmp_path, monkeypatch):
    copy_of(run, tmp_path / "sae")
    subject = eval_sae.Subject(str(tmp_path / "sae"), CPU)
    eval_sae.keep(subject, "core", small_record({"mse": 1.0}))
    before = eval_sae.file_of(subject).read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        eval_sae.keep(subject, "probe", small_record({"latents_1": 0.5}))
    assert eval_sae.file_of(subject).read_bytes() == before


def test_eval_json_is_json(run, tmp_path):
    """A figure that is no number is null there, and is said to be none."""
    copy_of(run, tmp_path / "sae")
    subject = eval_sae.Subject(str(tmp_path / "sae"), CPU)
    eval_sae.keep(
        subject, "core", small_record({"mse": 1.0, "bias": math.nan, "norm_ratio": math.inf})
    )

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads(eval_sae.file_of(subject).read_text(), parse_constant=refuse)["core"]
    assert stored["figures"] == {"mse": 1.0, "bias": None, "norm_ratio": None}
    assert stored["parts"][0]["figures"] == stored["figures"]
    assert stored["notes"] == ["bias, norm_ratio: no finite number, as 0 / 0 is none"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"mse": 1.0', '"mse": NaN'),  # as an earlier version wrote it
        lambda text: text.replace('"mse": 1.0', '"mse": 0.5'),
        lambda text: re.sub(r'"parts": \[.*?\n    \]', '"parts": null', text, flags=re.DOTALL),
        lambda text: text.replace('"notes": []', '"notes": "good"'),
        lambda text: text.replace('"is_whole": true,', ""),
        lambda text: '{"core": null, "probe": null}',
        lambda text: f'{{"core": {{"seal": "{eval_sae.digest_of([None] * 6)}"}}}}',
        lambda text: "[" * 100_000,
        lambda text: text.replace('"mse": 1.0', '"mse": 1e999', 1),
        lambda text: "[1, 2]",
        lambda text: text[:40],
        lambda text: "",
    ],
)
def test_what_is_no_eval_json_of_ours_is_measured_again(run, texts, tmp_path, result, change):
    """Of an earlier version, edited by hand, or cut off: all that is measured is printed."""
    folder = copy_of(run, tmp_path / "sae")
    subject = eval_sae.Subject(str(folder), CPU)
    for family in ("core", "probe"):
        eval_sae.keep(subject, family, small_record({"mse": 1.0}))
    assert eval_sae.stored_record(
        eval_sae.file_of(subject), "core", {"contexts": 9}
    ) == small_record({"mse": 1.0})
    before = eval_sae.file_of(subject).read_text()
    eval_sae.file_of(subject).write_text(change(before))
    assert eval_sae.file_of(subject).read_text() != before
    assert eval_sae.stored_record(eval_sae.file_of(subject), "core", {"contexts": 9}) is None
    argv = [folder, "--text", texts, "--metrics", "core", "--contexts", "9", "--resume"]
    found = result(argv)
    assert found.code == 0 and found.row("core: mse ↓")
    assert 0 < found.stored["core"]["figures"]["mse"] not in (0.5, 1.0)


def test_an_eval_json_of_which_one_part_is_odd_costs_no_figure(run, texts, tmp_path, result):
    """A number that JSON can't hold, in another family: what is measured is printed. A byte order
    mark, as editors write it, costs nothing."""
    folder = copy_of(run, tmp_path / "sae")
    subject = eval_sae.Subject(str(folder), CPU)
    eval_sae.keep(subject, "probe", small_record({"mse": 1.0}))
    file = eval_sae.file_of(subject)
    text = file.read_text()
    argv = [folder, "--text", texts, "--metrics", "core", "--contexts", "9"]
    file.write_text(text.replace('"mse": 1.0', '"mse": 1e999'))
    found = result(argv)
    assert found.code == 0 and found.row("core: mse ↓") and "only printed" in found.err
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert result(argv).code == 0
    assert eval_sae.stored_record(file, "probe", {"contexts": 9}).figures == {"mse": 1.0}


def test_a_folder_that_can_not_be_written_costs_no_figure(run, texts, tmp_path, result):
    folder = copy_of(run, tmp_path / "sae")
    (folder / ".eval.lock").mkdir()  # so that it can't be opened
    found = result([folder, "--text", texts, "--metrics", "core", "--contexts", "9"])
    assert found.code == 0 and found.row("core: mse ↓")
    assert "eval.json can't be written, its core is only printed" in found.err


def test_an_eval_json_that_another_process_holds_is_waited_for_and_not_for_ever(
    run, texts, tmp_path, monkeypatch, result
):
    import filelock

    folder = copy_of(run, tmp_path / "sae")
    monkeypatch.setattr(eval_sae, "LOCK_WAIT", 0.2)
    argv = [folder, "--text", texts, "--metrics", "core", "--contexts", "9"]
    with filelock.FileLock(folder / ".eval.lock"):
        found = result(argv)
    assert found.code == 0 and found.row("core: mse ↓")
    assert "its core is only printed" in found.err and not found.stored
    assert result(argv).stored


def test_a_run_is_measured_again_where_weights_texts_or_settings_are_others(
    run, texts, probe_file, tmp_path, monkeypatch, result
):
    """And only then; each family has its own settings. What is to be measured is what fails where
    every measurement does.
    """
    folder = copy_of(run, tmp_path / "sae")
    own_texts = tmp_path / "texts.jsonl"
    own_probe = tmp_path / "task.csv"
    shutil.copy(texts, own_texts)
    shutil.copy(probe_file, own_probe)
    argv = [folder, "--text", own_texts, "--probe", own_probe, "--train", 40, "--test", 20]
    argv += ["--contexts", 9, "--metrics", "core", "probe", "--resume"]

    def failing(*data):
        raise InputError("nothing can be measured")

    def to_measure(*more):
        with monkeypatch.context() as patch:
            for family in ("core", "probe"):
                patch.setitem(eval_sae.MEASURES, family, failing)
            found = re.findall(r"^(\w+): not measured", result([*argv, *more]).out, re.MULTILINE)
        assert evaluated([*argv, *more]) == 0
        return found

    assert to_measure() == ["core", "probe"]
    assert to_measure() == []
    assert to_measure("--contexts", 8) == ["core"]
    assert to_measure("--contexts", 9) == ["core"]
    assert to_measure("--train", 30) == ["probe"]
    assert to_measure("--train", 40, "--words", 200) == ["probe"]
    own_texts.write_text(own_texts.read_text() + '{"text": "more"}\n')
    assert to_measure() == ["core"]
    own_probe.write_text(own_probe.read_text().replace("warm", "cold"))
    assert to_measure() == ["probe"]
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_enc"] += 0.01
    save_file(weights, folder / "sae_weights.safetensors")
    assert to_measure() == ["core", "probe"]
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "k": 3}))
    assert to_measure() == ["core", "probe"]
    assert to_measure() == []


def test_a_file_of_gemma_scope_is_known(tmp_path):
    """Also where its folder is named, in which eval.json stands."""
    gemma_scope(tmp_path / "layer_1")

    def stamp():
        return eval_sae.stamps_of(eval_sae.Subject(str(path), CPU))

    for path in (tmp_path / "layer_1", tmp_path / "layer_1" / "params.npz"):
        first = eval_sae.Subject(str(path), CPU)
        eval_sae.keep(first, "core", small_record({"mse": 1.0}))
        again = eval_sae.Subject(str(path), CPU)
        assert stamp() == stamp()
        assert eval_sae.stored_families(eval_sae.file_of(again))["core"]["figures"] == {"mse": 1.0}
    before = stamp()
    shutil.rmtree(tmp_path / "layer_1")
    gemma_scope(tmp_path / "layer_1", seed=1)
    assert stamp() != before


@pytest.mark.parametrize(
    "error, words, is_foreseen",
    [
        (InputError("the text is empty"), "the text is empty", True),
        (OSError(28, "No space left on device"), "[Errno 28] No space", True),
        (MemoryError(), "out of memory, smaller --contexts", True),
        (RuntimeError("CPUAllocator: can't allocate memory: 9"), "out of memory, smaller", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory, smaller", True),
        (RuntimeError("CUDA error: out of memory"), "out of memory, smaller --contexts", True),
        (RuntimeError("CUDA error: an illegal access"), "RuntimeError: CUDA error", False),
        (TypeError("zeros_like()"), "TypeError: zeros_like()", False),
        (KeyError("x"), "KeyError: 'x'", False),
    ],
)
def test_a_family_that_fails_costs_itself(
    run, texts, tmp_path, monkeypatch, result, error, words, is_foreseen
):
    """What one run has is not lost where another one fails, and what nobody foresaw is shown."""

    def failing(*data):
        raise error

    first = copy_of(run, tmp_path / "first")
    second = copy_of(run, tmp_path / "second")
    argv = ["--text", texts, "--contexts", "9", "--metrics", "core"]
    before = result([first, *argv]).stored
    monkeypatch.setitem(eval_sae.MEASURES, "core", failing)
    found = result([first, second, *argv, "competition", "--resume"])
    assert found.code == 1
    (reason,) = re.findall(f"^core of {second}: not measured, (.*)$", found.out, re.MULTILINE)
    assert words in reason and f"core of {first}" not in found.out
    mse = found.row("core: mse ↓")
    assert float(mse[0]) > 0 and mse[1] == ""
    assert all(float(cell) >= 0 for cell in found.row("competition: rare ↓"))
    assert found.stored["core"] == before["core"]
    assert list(json.loads((second / "eval.json").read_text())) == ["competition"]
    assert ("in failing" in found.err) == (not is_foreseen)  # as a traceback has it


@pytest.mark.parametrize(
    "family, function, is_first",
    [
        ("probe", "read_texts", lambda *data: data[-1] == "words"),
        ("scr", "read_texts", lambda *data: data[-1] == "words"),
        ("absorption", "words_of", lambda *data: data[-1] == 0),
    ],
)
def test_one_part_that_can_not_be_measured_costs_itself(
    run, probe_file, speller, tmp_path, monkeypatch, result, family, function, is_first
):
    """A task, or a sample of words, with its reason. Where none can be, the family has no figures.
    What fails later takes no figures from eval.json, and --resume measures what failed.
    """
    if family == "absorption":
        monkeypatch.setattr(eval_sae, "FEWEST_LETTERS", speller.n_spelled)
        argv = [speller.sae(tmp_path / "sae", "letters"), "--words", "1040", "--seed", "0", "1"]
        both = [("words", 0), ("words", 1)]
    else:
        second = shutil.copy(probe_file, tmp_path / "second.csv")
        argv = [copy_of(run, tmp_path / "sae"), "--probe", probe_file, second]
        argv += ["--train", "40", "--test", "20"]
        both = [("words", 0), ("second", 0)]
    argv += ["--metrics", family, "--resume"]
    real = getattr(eval_sae, function)

    def failing(fails):
        def measured(*data):
            if fails(*data):
                raise InputError("this one fails")
            return real(*data)

        return measured

    with monkeypatch.context() as patch:
        patch.setattr(eval_sae, function, failing(is_first))
        found = result(argv)
        assert found.code == 0
        assert re.search(f"^{family}: words .*left out.*: this one fails", found.out, re.MULTILINE)
        kept = found.stored[family]
        assert [(part["task"], part["seed"]) for part in kept["parts"]] == both[1:]
        assert not kept["is_whole"]
        patch.setattr(eval_sae, function, failing(lambda *data: True))
        found = result(argv)
        assert found.code == 2 and found.stored[family] == kept
        assert re.search(f"^{family}: not measured, .*this one fails", found.out, re.MULTILINE)
    found = result(argv)
    assert found.code == 0 and found.stored[family]["is_whole"]
    assert [(part["task"], part["seed"]) for part in found.stored[family]["parts"]] == both


def test_an_evaluation_that_is_stopped_anywhere_prints_what_it_has_and_goes_on(
    run, texts, probe_file, tmp_path, monkeypatch, result
):
    """Wherever a signal may end it, it keeps the families that are whole, and --resume gives what
    one that never stopped gives.
    """
    folder = copy_of(run, tmp_path / "sae")
    families = ["core", "behaviour", "competition", "probe", "scr"]
    argv = [folder, "--text", texts, "--contexts", "9", "--probe", probe_file, "--resume"]
    argv += ["--train", "20", "--test", "20", "--metrics", *families]
    whole = result(argv)
    assert whole.code == 0 and list(whole.stored) == families
    kept = []

    def stopped():
        raise sgo_sae.Stopped(signal.SIGINT)

    for n in count(1):
        (folder / "eval.json").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            asked = before_call(n, sgo_sae.stop_if_asked, stopped)
            patch.setattr(sgo_sae, "stop_if_asked", asked)
            found = result(argv)
        if found.code == 0:
            break
        assert found.code == 130
        done = list(found.stored)
        assert done == families[: len(done)] and found.stored == {f: whole.stored[f] for f in done}
        printed = dict.fromkeys(row[0].split(":")[0] for row in cells_in(found.out)[2:])
        assert list(printed) == done
        if done not in kept:
            kept.append(done)
            again = result(argv)
            assert again.stored == whole.stored and again.out == whole.out
    assert kept == [families[:n] for n in range(len(families))]
    (folder / "eval.json").write_text(json.dumps(whole.stored))

    def not_called(*data):
        raise AssertionError("nothing is to be measured")

    for family in families:
        monkeypatch.setitem(eval_sae.MEASURES, family, not_called)
    assert result(argv).out == whole.out


def test_what_fails_takes_no_figures_from_eval_json(run, texts, tmp_path, result):
    """A model that can't be loaded, or a text that is none. --resume measures what failed."""
    folder = copy_of(run, tmp_path / "sae")
    argv = [folder, "--text", texts, "--metrics", "core", "--contexts", "9"]
    before = result(argv).stored
    found = result([*argv, "--model", "/nowhere"])
    assert found.code == 2 and found.stored == before
    later = tmp_path / "later.jsonl"
    later.write_text("no text\n")
    found = result([*argv, "--text", later])
    assert found.code == 2 and found.stored == before
    assert "core: not measured" in found.out
    shutil.copy(texts, later)
    found = result([*argv, "--text", later, "--resume"])
    assert found.code == 0 and found.stored["core"]["settings"]["dataset"] == str(later)


# ----------------------------------------------------------------------------------------- refusals


def argv_of(line, **places):
    """The words of a command line. Names in capitals stand for places; after ODD _ is a space."""
    argv = []
    for word in line.split():
        if word.startswith("ODD"):
            word = word.replace("_", " ")
        for name, place in places.items():
            word = word.replace(name, str(place))
        argv.append(word)
    return argv


REFUSED = [
    ("--k 65", "64 latents"),
    ("--k 0", "--k must be from 1"),
    ("--dict 0", "--dict must be from 1"),
    ("--alpha -0.1", "--alpha must be from 0"),
    ("--alpha nan", "--alpha must be from 0"),
    ("--alpha inf", "--alpha must be from 0"),
    ("--alpha x", "invalid float value: 'x'"),
    ("--alpha 1 1", "twice"),
    ("--lr -1", "--lr must be from 0"),
    ("--sparsity nan", "--sparsity must be from 0"),
    ("--max-norm 0.5", "--max-norm"),
    ("--decay-start 2", "--decay-start must be from 0 to 1,"),
    ("--alpha-warmup 1000", "--alpha-warmup must be from 0 to 1,"),
    (f"--seed {2**64}", "--seed must be from 0 to"),
    (f"--data-seed {2**60}", "--data-seed must be from 0 to"),
    ("--ctx 1", "--ctx"),
    ("--tokens 10", "one batch"),
    ("--log-every 0", "--log-every must be from 1"),
    ("--arch mean", "invalid choice"),
    ("--demo", "--demo makes its own model and text"),
    ("--arch relu --sparsity 0", "--sparsity 0"),
    ("--nonsense 1", "unrecognized arguments"),
    ("--device cuda:7", "--device cuda:7"),
    ("--device toaster", "--device toaster"),
    ("--layer 4", "0 to 3"),
    ("--layer -1", "--layer must be from 0"),
    ("--text-column body", "its columns: text"),
    ("--dataset ODD/numbers.parquet", "its columns: count"),
    ("--split test", "name the files"),
    ("--subset en", "name the files"),
    ("--model /nowhere/at/all", "/nowhere/at/all"),
    ("--model ./misspelled", "./misspelled: there is no such file"),
    ("--dataset /nowhere/at/all.jsonl", "/nowhere/at/all.jsonl: there is no such file"),
    ("--dataset misspelled.csv", "misspelled.csv: there is no such file"),
    ("--dataset ODD/empty.jsonl", "empty.jsonl"),
    ("--dataset ODD/empty.txt", "empty.txt has no text"),
    ("--dataset ODD/broken.jsonl", "broken.jsonl has no text"),
    ("--dataset ODD/broken.jsonl.gz", "broken.jsonl.gz can't be loaded"),
    ("--dataset ODD/broken.parquet", "broken.parquet can't be loaded"),
    ("--dataset ODD/blank.jsonl", "no text in --text-column text"),
    ("--dataset ODD/numbers.jsonl", "no text in --text-column text"),
    ("--dataset ODD/chats.jsonl", "no text in --text-column text"),
    ("--dataset ODD/lines.json", "jsonl"),
    ("--dataset ODD/two.jsonl.zip", "two.jsonl.zip"),
    ("--dataset ODD/picture.png", "picture.png"),
    ("--model ODD/no_files", "no files"),
    ("--model ODD/no_tokenizer", "no tokenizer"),
    ("--model ODD/no_weights", "no weights"),
    ("--model ODD/one_layer", "lack"),
    ("--model ODD/t5", "an encoder alone"),
    ("--model ODD/albert", "its 4 layers are not in one list"),
    ("--model ODD/xlm", "its 4 layers are not in one list"),
    ("/nowhere", "/nowhere: there is no such file or folder"),
    ("RUN --metrics core beauty", "invalid choice"),
    ("RUN --metrics core --text TEXTS --model /nowhere", "/nowhere"),
    ("RUN --metrics core --text TEXTS --layer 2", "it is for layer 1"),
    ("RUN --contexts 0", "--contexts must be from 1 to 4294967295, but is 0"),
    ("RUN --contexts many", "--contexts: invalid int value: 'many'"),
    ("RUN --ctx 1", "--ctx must be from 2 "),
    ("RUN --train 1", "--train must be from 20 "),
    ("RUN --test 1", "--test must be from 20 "),
    ("RUN --words 9", "--words must be from 100 "),
    ("RUN --seed 0 -1", "--seed must be from 0 to 4294967295, but is -1"),
    ("RUN --seed 4294967296", "--seed must be from 0 to 4294967295"),
    ("RUN --layer -1", "--layer must be from 0 "),
    ("RUN --text ./none.jsonl", "./none.jsonl: there is no such file"),
    ("RUN --probe ./none.csv", "./none.csv: there is no such file"),
    ("RUN --html nowhere/page.html", "no folder"),
    ("RUN --html ODD", "is a folder"),
    ("RUN --split test", "--text, which is not given"),
    ("RUN --text-column body", "--text, which is not given"),
    ("RUN --against beauty", "the settings are arch topk, d_sae 64"),
    ("ODD/under_way", "its run is under way"),
    ("ODD/without_a_layer", "give --layer"),
    ("ODD/without_a_layer --metrics core --text TEXTS --layer 9", "are 0 to 3"),
    ("ODD/of_an_MLP", "blocks.1.hook_mlp_out"),
    ("ODD/changed", "center_writing_weights"),
    ("ODD/normalized", "normalize_activations"),
    *[(f"ODD/{name.replace(' ', '_')}", words) for name, words in DAMAGES],
]


@pytest.mark.parametrize("line, words", REFUSED)
def test_what_can_not_work_is_refused_in_one_line(
    train_argv, run, texts, odd, tmp_path, monkeypatch, result, line, words
):
    """With what a user needs to mend it, and before anything is written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = argv_of(line, RUN=run / "s0", TEXTS=texts, ODD=odd)
    program = "eval_sae.py"
    if line.startswith("--"):
        program = "sgo_sae.py"
        argv = [*train_argv(), *argv]
    found = result(argv)
    assert found.code == 2 and found.out == ""
    assert found.last.startswith(f"{program}: error: ") and words in found.last
    assert len(found.err.splitlines()) == 1 or "ODD" in line or "--layer 2" in line
    assert not (tmp_path / "run").exists() and not list(odd.glob("*/eval.json"))


@pytest.mark.parametrize(
    "line, words",
    [
        ("RUN --metrics probe --probe TEXTS", "needs the columns text and label, and has text"),
        ("RUN --metrics probe --probe ODD/lists.jsonl", "kind list"),
        ("RUN --metrics scr --probe SAME", "two values of `attribute` are needed"),
        ("RUN --metrics core", "give --text"),
        ("RUN --metrics core --html PAGE", "give --text"),
        ("RUN --metrics core --text TEXTS --text-column body", "--text-column body"),
        ("ODD/not_causal --metrics absorption", "not causal"),
    ],
)
def test_what_can_not_be_measured_is_told_under_the_table(
    run, texts, probe_file, odd, tmp_path, result, line, words
):
    (tmp_path / "same.csv").write_text(Path(probe_file).read_text().replace("lazy\n", "warm\n"))
    places = {"RUN": run / "s0", "TEXTS": texts, "ODD": odd, "SAME": tmp_path / "same.csv"}
    found = result(argv_of(line, PAGE=tmp_path / "page.html", **places))
    assert found.code == 2
    (family,) = re.findall(r"--metrics (\w+)", line)
    (reason,) = re.findall(f"^{family}: not measured, (.*)$", found.out, re.MULTILINE)
    assert words in reason
    assert not (tmp_path / "page.html").exists()


# ---------------------------------------------------------------------- SAEBench's recorded outputs


# What SAEBench 0.6.0 itself gave on the inputs below, which are planted and the same everywhere, as
# `study/saebench.py` prints it. Where SAEBench is installed, a test compares the two. What it does
# without chance has to agree to the digit. What it trains from random weights is given for its
# seeds 0 to 4. Absorption is given letter by letter, from A to Z.
ABSORPTION = """
0.0125 0.0475995 0.0982548 0.0299327 0.430068 0.0396975 0.0396726 0.0639139 0.0503619 0.025
0.0710532 0.288178 0.0732662 0.0823523 0.0217686 0.00317506 0.0475413 0.0410107 0.0482494
0.210841 0.0168198 0.0132552 0.0871769 0.0509006 0.038271 0.384854
"""


FULL_ABSORPTION = """
0.0125 0.025 0.0875 0.025 0.4125 0.0125 0.05 0.0375 0.0375 0.0125 0.075 0.2625 0.0375 0.0625
0.0125 0 0.0375 0.025 0.025 0.2125 0.0125 0 0.025 0.0375 0.025 0.375
"""


def numbers_in(text):
    return [float(word) for word in text.split()]


SAEBENCH = {
    "core": {
        "bias": 1.90497,
        "cosine": 0.746972,
        "dense": 0.34375,
        "l0": 6.0,
        "l1": 18.7998,
        "mse_benchmark": 0.157898,
        "never_fire": 0.109375,
        "norm_ratio": 1.37872,
    },
    "behaviour": {
        "ce_clean": 5.75204,
        "ce_sae": 5.7266,
        "ce_score": 0.838306,
        "ce_zero": 5.59471,
        "kl_sae": 0.119047,
        "kl_score": 0.420227,
        "kl_zero": 0.205333,
    },
    "probe": {1: 0.665, 2: 0.74, 5: 0.815, 20: 0.895},
    "probe all": [0.86, 0.865, 0.865, 0.8525, 0.8675],
    "scr, label is strong": [0.00773201, 0.0283505, 0.041237, -0.0953608, -0.198454],
    "scr, attribute is strong": [0.00604222, 0.199396, 0.151057, 0.220544, 0.169184],
    "scr, label is strong, trained": [
        [0.0409208, 0.109975, 0.0179029, -0.260869, -0.350384],
        [0.00471706, 0.0377359, 0.0471699, 0.0495284, -0.00235846],
        [0.0095694, 0.0239234, 0.0789473, -0.0741626, -0.167464],
        [0.00717694, 0.00478463, -0.0789474, -0.0645933, -0.133971],
        [0.00475067, 0.00237541, -0.0926365, -0.0783847, -0.225653],
    ],
    "scr, attribute is strong, trained": [
        [-0.00769229, -0.107692, 0.0948718, 0.192308, 0.135898],
        [0.185484, 0.317204, 0.247312, 0.153226, -0.0322581],
        [0.0313315, 0.138381, 0.203655, 0.122715, 0.0339424],
        [0.13941, 0.227882, 0.19571, 0.155496, -0.0884717],
        [0.0833333, 0.111979, 0.346354, 0.234375, 0.166667],
    ],
    "absorption": numbers_in(ABSORPTION),
    "full absorption": numbers_in(FULL_ABSORPTION),
    "split latents": [1.46154, 1.65385, 1.61538, 1.73077, 1.57692],
}


def saebench_sae():
    """An autoencoder of 64 latents on 16 dimensions, with biases, so that some are active more."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(16, 64, 6)
    W_ND = torch.randn(64, 16, generator=generator)
    sae.W_dec.data = F.normalize(W_ND, dim=1)
    sae.W_enc.data = sae.W_dec.data.T.clone()
    sae.b_enc.data = 0.3 * torch.randn(64, generator=generator) - 0.2
    sae.b_enc.data[:6] = -50.0
    sae.b_dec.data = 0.5 * torch.randn(16, generator=generator)
    return sae


def saebench_tokens():
    """48 contexts of 24 tokens of the tests' language model, BOS first, and some other specials."""
    generator = torch.Generator().manual_seed(1)
    ids_RL = torch.randint(3, 60, (48, 24), generator=generator)
    ids_RL[:, 0] = 2
    ids_RL[5, 7] = ids_RL[9, 3] = 1
    return ids_RL


def saebench_texts():
    """Mean latents of two classes, told weakly by a few of 60 latents, with labels: 300 + 100 of
    each."""
    generator = torch.Generator().manual_seed(0)
    strength_2N = torch.randn(2, 60, generator=generator)
    strength_2N *= torch.rand(2, 60, generator=generator) < 0.2
    latents = []
    labels = []
    for count_each in (300, 100):
        label_T = torch.arange(2 * count_each) % 2
        noise_TN = torch.randn(len(label_T), 60, generator=generator)
        latents.append((noise_TN + 0.6 * strength_2N[label_T]).relu())
        labels.append(label_T)
    return torch.cat(latents), torch.cat(labels), 600


def saebench_attributes(strong):
    """Activations of texts of one token, with a label and an attribute, of which one is `strong`:
    500 + 250 of each combination."""
    generator = torch.Generator().manual_seed(2)
    direction_2D = torch.randn(2, 16, generator=generator)
    size_2 = (0.9, 0.35) if strong == "label" else (0.35, 0.9)
    x = []
    labels = []
    attributes = []
    for count_each in (500, 250):
        label_T = torch.arange(4 * count_each) % 2
        attribute_T = torch.arange(4 * count_each) // 2 % 2
        x_TD = torch.randn(4 * count_each, 16, generator=generator)
        x_TD += size_2[0] * (2 * label_T - 1)[:, None] * direction_2D[0]
        x_TD += size_2[1] * (2 * attribute_T - 1)[:, None] * direction_2D[1]
        x.append(x_TD)
        labels.append(label_T)
        attributes.append(attribute_T)
    return torch.cat(x), torch.cat(labels), torch.cat(attributes), 2000


def saebench_words():
    """1,040 words whose letters latents spell, some of them others; probes that are not exact."""
    generator = torch.Generator().manual_seed(3)
    sae = SAE(64, 160, 5)
    W_ND = torch.randn(160, 64, generator=generator)
    letter_T = torch.arange(2080) % 26
    for absorber in range(52, 104):  # carries its letter beside what it is for
        W_ND[absorber] += (0.2 + absorber % 7 / 5) * W_ND[(absorber - 52) % 26]
    sae.W_dec.data = F.normalize(W_ND, dim=1)
    sae.W_enc.data = sae.W_dec.data.T.clone()
    f_TN = torch.zeros(2080, 160)
    rows = torch.arange(2080)
    absorbed_T = torch.rand(2080, generator=generator) < 0.35
    own_T = 4 * torch.rand(2080, generator=generator)
    f_TN[rows, letter_T] = torch.where(absorbed_T, 0.3 * own_T - 0.8, own_T).clamp(min=0)
    f_TN[rows, 52 + letter_T] = torch.where(absorbed_T, 5.0, 0.0)
    f_TN[rows, 104 + rows % 56] = 1 + torch.rand(2080, generator=generator)
    noise_TD = torch.randn(2080, 64, generator=generator)
    x_TD = f_TN @ sae.W_dec.data + 0.05 * noise_TD
    probe_AD = sae.W_dec.data[:26] + 0.05 * torch.randn(26, 64, generator=generator)
    return sae, x_TD, letter_T, probe_AD


def fixed_probes(x_TD, label_T, attribute_T):
    """Probes along differences of means: of the label, of the attribute, and of both."""
    probes = []
    for y_T in (label_T, attribute_T):
        difference_D = x_TD[y_T == 1].mean(0) - x_TD[y_T == 0].mean(0)
        middle_D = (x_TD[y_T == 1].mean(0) + x_TD[y_T == 0].mean(0)) / 2
        probes.append(eval_sae.Probe(difference_D, -(difference_D @ middle_D)))
    both_D = probes[0].w_D + probes[1].w_D
    return eval_sae.ScrProbes(*probes, eval_sae.Probe(both_D, -(both_D @ x_TD.mean(0))))


@pytest.mark.skipif(
    importlib.util.find_spec("sae_bench") is None, reason="SAEBench is not installed"
)
def test_recorded_outputs_are_those_of_saebench(model):
    from study import saebench

    found = saebench.figures(model[1])
    assert set(found) == set(SAEBENCH)
    for name, expected in SAEBENCH.items():
        if isinstance(expected, list):
            found[name], expected = numpy.array(found[name]), numpy.array(expected)
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_core_gives_saebenchs_figures(model):
    """Its means over batches of 16 contexts stand for those over all, of two figures."""
    _, lm, tokenizer = model
    ids_RL = saebench_tokens()
    kept_RL = sgo_sae.kept_tokens(ids_RL, tokenizer)
    x_RLD = sgo_sae.layer_output(lm, lm.model.layers[1], ids_RL)
    per_context = kept_RL.sum().item() / len(kept_RL)
    found = eval_sae.reconstruction(saebench_sae(), x_RLD[kept_RL], per_context)
    for name, expected in SAEBENCH["core"].items():
        rel = 1e-2 if name in ("mse_benchmark", "bias") else 1e-4
        assert found[name] == pytest.approx(expected, rel=rel), name
    (found,) = eval_sae.behaviour(lm, lm.model.layers[1], [saebench_sae()], ids_RL, kept_RL)
    assert found == pytest.approx(SAEBENCH["behaviour"], rel=1e-3)


def test_probing_gives_saebenchs_figures():
    """The probe on all latents starts from random weights: its mean lies in their range."""
    f_TN, label_T, n_train = saebench_texts()
    splits = eval_sae.class_splits(label_T, n_train, 0)
    found = eval_sae.sparse_probing(f_TN, splits, eval_sae.mean_difference)
    assert found == pytest.approx(SAEBENCH["probe"], abs=1e-6)
    ours = statistics.mean(eval_sae.full_probing(f_TN, splits, seed) for seed in range(5))
    assert min(SAEBENCH["probe all"]) <= ours <= max(SAEBENCH["probe all"])


@pytest.mark.parametrize("strong", ["label", "attribute"])
def test_scr_gives_saebenchs_figures(strong):
    """In both directions, with probes that are given, and with those that are trained."""
    x_TD, label_T, attribute_T, n_train = saebench_attributes(strong)
    sae = saebench_sae()
    f_TN = sae.encode(x_TD).detach()
    sets = eval_sae.scr_sets(label_T, attribute_T, n_train)
    train = slice(0, n_train)
    probes = fixed_probes(x_TD[train], label_T[train], attribute_T[train])
    data = (x_TD, f_TN, label_T, attribute_T, sets, sae.W_dec)
    found = eval_sae.scr(probes, *data)
    assert list(found) == [f"scr_{n}" for n in (2, 5, 10, 20, 50)]
    expected = SAEBENCH[f"scr, {strong} is strong"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    theirs = numpy.array(SAEBENCH[f"scr, {strong} is strong, trained"])
    ours = []
    for seed in range(2):
        probes = eval_sae.scr_probes(x_TD, label_T, attribute_T, sets, seed)
        ours.append(list(eval_sae.scr(probes, *data).values()))
    scatter = theirs.std(0, ddof=1)
    assert (abs(numpy.mean(ours, 0) - theirs.mean(0)) < 3 * scatter).all()


def test_absorption_gives_saebenchs_figures():
    """Word by word with splits that are given, and how far letters are split."""
    sae, x_TD, letter_T, probe_AD = saebench_words()
    fractions = []
    full = []
    with torch.no_grad():
        for a in range(26):
            x_PD = x_TD[letter_T == a]
            split_S = torch.tensor([a] if a % 3 else [a, 52 + a])
            f_PN = sae.encode(x_PD)
            share_P, full_P = eval_sae.absorbed_share(f_PN, x_PD, sae.W_dec, probe_AD[a], split_S)
            fractions.append(share_P.mean().item())
            full.append(full_P.float().mean().item())
    assert fractions == pytest.approx(SAEBENCH["absorption"], abs=1e-5)
    assert full == pytest.approx(SAEBENCH["full absorption"], abs=1e-6)
    ours = []
    for seed in range(2):
        order_T = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(seed))
        x, letters = x_TD[order_T], letter_T[order_T]
        words = eval_sae.Words(x, letters, 1664, x[1664:], letters[1664:], probe_AD)
        ours.append(eval_sae.absorption(sae, words, seed)["split_latents"])
    theirs = SAEBENCH["split latents"]
    scatter = statistics.stdev(theirs)
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 3 * scatter


# -------------------------------------------------------------------------- other people's trainers


# What makes three trainers train with the penalty. Each is run here, where the library is
# installed, by the library's own training function.
#
# SAELens's needs normalize_activations="expected_average_only_in", use_sparse_activations=False,
# and the runner's override_sae=SGOTopK(cfg.sae). α is 1,600 / D for D 2,304, and the warm-up a
# fifth of 5,000 steps.
SAELENS = """
from sae_lens import TopKTrainingSAE
from sgo_sae import alpha_at, sgo_penalty_dense

class SGOTopK(TopKTrainingSAE):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        step = step_input.n_training_steps
        alpha = alpha_at(step, alpha=0.7, start=0.7 * 0.01 / 0.075, warmup=1000)
        losses["sgo"] = alpha * sgo_penalty_dense(feature_acts)
        return losses
"""


DICTIONARY_LEARNING = """
from dictionary_learning.trainers.top_k import TopKTrainer
from sgo_sae import alpha_at, sgo_penalty

class SGOTopKTrainer(TopKTrainer):
    alpha = 0.075 * 21_000  # for normalize_activations=True, a mean squared norm of 1
    start = 0.01 * 21_000

    def loss(self, x, step=None, logging=False):
        loss = super().loss(x, step=step, logging=logging)
        if logging:
            return loss
        f, vals, idx, pre = self.ae.encode(x, return_topk=True, use_threshold=False)
        omega = sgo_penalty(vals, idx, self.ae.dict_size)
        return loss + alpha_at(step, self.alpha, self.start) * omega
"""


SPARSIFY = """
from sparsify import SparseCoder
from sgo_sae import alpha_at, sgo_penalty

class SGOSparseCoder(SparseCoder):
    alpha = 0.075  # for activations as large as those of Gemma-2-2B
    calls = 0  # one in a training step, with micro_acc_steps=1

    def forward(self, x, y=None, *, total_variance=None, **options):
        out = super().forward(x, y, total_variance=total_variance, **options)
        omega = sgo_penalty(out.latent_acts, out.latent_indices, self.num_latents)
        alpha = alpha_at(self.calls, self.alpha)
        self.calls += 1
        # The loss is the squared error over the variance, of the sum of all tokens.
        return out._replace(fvu=out.fvu + alpha * omega * len(x) / total_variance)

import sparsify.trainer
sparsify.trainer.SparseCoder = SGOSparseCoder
"""


def run_of(code, folder):
    """The names that a piece of code defines; its alpha_at notes the steps at which
    it is called."""
    file = folder / "trainer.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("trainer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = vars(module)
    names["steps"] = []

    def noted(step, *settings, **options):
        names["steps"].append(step)
        return sgo_sae.alpha_at(step, *settings, **options)

    names["alpha_at"] = noted
    return names


def assert_is_the_penalty(extra, alpha, f_BN, parameter):
    """What was added to a loss is α Ω, with the gradient of `orthogonality` as it stands there."""
    expected = alpha * orthogonality(f_BN)
    assert extra.item() == pytest.approx(expected.item(), rel=1e-3)
    (theirs,) = torch.autograd.grad(extra, parameter, retain_graph=True)
    (ours,) = torch.autograd.grad(expected, parameter, retain_graph=True)
    assert (theirs - ours).norm() < 1e-3 * ours.norm()


def in_our_format(folder, model, W_enc_DN, b_enc_N, W_dec_ND, b_dec_D):
    """A folder with the top-k autoencoder of those weights."""
    sae = SAE(16, 64, 4)
    weights = {"W_enc": W_enc_DN, "b_enc": b_enc_N, "W_dec": W_dec_ND, "b_dec": b_dec_D}
    sae.load_state_dict(weights)
    folder.mkdir()
    cfg = sgo_sae.Config(d_sae=64, k=4, model=model[0], layer=1, ctx=16)
    sgo_sae.save_sae(sae, cfg, folder)
    return sae


def assert_evaluated_beside_ours(run, folder, texts, probe_file, result, *others):
    """It stands in one table with an autoencoder that was trained here on the same text."""
    settings = "--metrics core competition probe --contexts 40 --ctx 16 --train 100 --test 50"
    argv = [run / "s0", folder, *others, "--text", texts, "--probe", probe_file, *settings.split()]
    found = result(argv)
    assert found.code == 0 and "not measured" not in found.out
    assert all(0.1 < float(cell) < 1 for cell in found.row("core: explained variance ↑")[:2])


def test_the_readmes_definition_is_the_penalty(tmp_path):
    readme = (HERE / "README.md").read_text()
    (code,) = re.findall(r"```python\n(def orthogonality.*?)```", readme, re.DOTALL)
    pre_BN = torch.randn(200, 60, dtype=torch.float64).sub(1).requires_grad_()
    f_BN = pre_BN.relu()  # only active latents have a gradient
    plain = run_of(f"import torch\n\n{code}", tmp_path)["orthogonality"](f_BN)
    assert_is_the_penalty(plain, 1.0, f_BN, pre_BN)
    assert_is_the_penalty(sgo_penalty_dense(f_BN), 1.0, f_BN, pre_BN)


def test_other_trainers_saelens(model, run, texts, probe_file, tmp_path, result):
    """By its own runner."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    names = run_of(SAELENS, tmp_path)
    sae_cfg = sae_lens.TopKTrainingSAEConfig(
        d_in=16,
        d_sae=64,
        k=4,
        use_sparse_activations=False,
        normalize_activations="expected_average_only_in",
    )
    sae = names["SGOTopK"](sae_cfg)
    settings = {"training_tokens": 256 * 60, "lr": 3e-3}
    train_by_saelens(sae_cfg, model, texts, tmp_path / "out", sae, **settings)
    assert names["steps"] == list(range(60))
    x_BD = torch.randn(256, 16)
    f_BN, pre_BN = sae.encode_with_hidden_pre(x_BD)
    batch = argparse.Namespace(sae_in=x_BD, dead_neuron_mask=None, n_training_steps=500)
    losses = sae.calculate_aux_loss(batch, f_BN, pre_BN, sae.decode(f_BN))
    assert_is_the_penalty(
        losses["sgo"], sgo_sae.alpha_at(500, 0.7, 0.7 * 0.01 / 0.075), f_BN, sae.W_enc
    )
    gemma_scope(tmp_path / "layer_1" / "average_l0_4")
    scope = tmp_path / "layer_1" / "average_l0_4" / "params.npz"
    assert_evaluated_beside_ours(run, tmp_path / "out", texts, probe_file, result, scope)


def test_other_trainers_dictionary_learning(model, run, texts, probe_file, tmp_path, result):
    """Its own loop on activations of ours, since its buffer needs an older nnsight."""
    reason = "dictionary_learning is not installed"
    training = pytest.importorskip("dictionary_learning.training", reason=reason)
    names = run_of(DICTIONARY_LEARNING, tmp_path)
    cfg = sgo_sae.Config(model=model[0], dataset=texts, layer=1, ctx=16, batch=256, buffer=64)
    data = data_of(cfg)
    settings = {
        "trainer": names["SGOTopKTrainer"],
        "steps": 60,
        "activation_dim": 16,
        "dict_size": 64,
        "k": 4,
        "layer": 1,
        "lm_name": "local",
        "warmup_steps": 0,
        "device": "cpu",
        "lr": 3e-3,
    }
    options = {"steps": 60, "normalize_activations": True, "device": "cpu"}
    training.trainSAE(data, [dict(settings)], save_dir=str(tmp_path / "theirs"), **options)
    assert names["steps"] == list(range(60))
    weights = torch.load(tmp_path / "theirs" / "trainer_0" / "ae.pt")
    encoder = weights["encoder.weight"]
    decoder = weights["decoder.weight"]
    sae = in_our_format(
        tmp_path / "sae", model, encoder.T, weights["encoder.bias"], decoder.T, weights["b_dec"]
    )
    settings.pop("trainer")
    trainer = names["SGOTopKTrainer"](**settings)
    trainer.ae.load_state_dict(weights)
    x_BD = torch.cat(list(islice(data, 1))) / 4
    assert torch.allclose(trainer.ae(x_BD), sae(x_BD), atol=1e-3)
    plain = super(names["SGOTopKTrainer"], trainer).loss(x_BD, step=500)
    extra = trainer.loss(x_BD, step=500) - plain
    alpha = sgo_sae.alpha_at(500, 0.075 * 21_000, 0.01 * 21_000)
    assert_is_the_penalty(extra, alpha, trainer.ae.encode(x_BD), trainer.ae.encoder.weight)
    assert_evaluated_beside_ours(run, tmp_path / "sae", texts, probe_file, result)


def test_other_trainers_sparsify(model, run, texts, probe_file, tmp_path, result):
    """Its own Trainer; BOS, an outlier in norm, is left out as we leave it out."""
    sparsify = pytest.importorskip("sparsify", reason="sparsify is not installed")
    import datasets
    import transformers

    names = run_of(SPARSIFY, tmp_path)
    rows = [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    contexts = list(sgo_sae.token_contexts(rows, model[2], 16))
    data = datasets.Dataset.from_dict({"input_ids": contexts}).with_format("torch")
    bos = model[2].bos_token_id
    cfg = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=64, k=4),
        batch_size=16,
        hookpoints=["layers.1"],
        log_to_wandb=False,
        save_dir=str(tmp_path),
        run_name="theirs",
        optimizer="adam",
        lr=3e-3,
        lr_warmup_steps=1,
        exclude_tokens=[bos, model[2].eos_token_id],
    )
    lm = transformers.AutoModelForCausalLM.from_pretrained(model[0])
    sparsify.Trainer(cfg, data, lm).fit()
    assert names["steps"] == list(range(math.ceil(len(contexts) / 16)))
    sae = names["SGOSparseCoder"].load_from_disk(tmp_path / "theirs" / "layers.1")
    ours = in_our_format(
        tmp_path / "sae", model, sae.encoder.weight.T, sae.encoder.bias, sae.W_dec, sae.b_dec
    )
    x_BD = torch.randn(256, 16)
    variance = (x_BD - x_BD.mean(0)).square().sum()
    coder = names["SGOSparseCoder"](16, cfg.sae)
    coder.load_state_dict(sae.state_dict())
    out = coder(x_BD, total_variance=variance)
    assert torch.allclose(out.sae_out, ours(x_BD), atol=1e-3)
    plain = super(names["SGOSparseCoder"], coder).forward(x_BD, total_variance=variance)
    extra = (out.fvu - plain.fvu) * variance / 256
    f_BN = torch.zeros(256, 64).scatter(1, out.latent_indices, out.latent_acts)
    assert_is_the_penalty(extra, 0.01, f_BN, coder.encoder.weight)
    assert_evaluated_beside_ours(run, tmp_path / "sae", texts, probe_file, result)


# ------------------------------------------------------------------------- what stands in for a GPU


@pytest.mark.parametrize("archs, sizes, most", benchmark.PAPERS_RUNS)
def test_memory_of_the_papers_runs_on_a_gpu(archs, sizes, most):
    """By account, in GB, of run 5 and of the commands in the README's table."""
    assert benchmark.counted_gb(archs, sizes) <= most


@pytest.fixture
def pretended_gpu(patch_gpu):
    with patch_gpu() as mode:
        yield mode


@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_on_a_pretended_gpu_waits_for_it_twice(arch, pretended_gpu):
    run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=64, k=4), 16, CUDA, mixed_precision=True)
    x_BD = torch.randn(128, 16).to("cuda")
    if arch != "topk":
        run.sae.start(x_BD, 0.04)
    for step in range(3):
        pretended_gpu.syncs.clear()
        run.step(x_BD, step, 10)
        # Which latents are active, and is the gradient finite?
        assert run.failure is None and pretended_gpu.syncs == ["nonzero", "item"]
        assert run.sae.W_dec.is_cuda and run.last_fired_N.is_cuda


def test_a_log_on_a_pretended_gpu_takes_pairs_where_training_does(
    pretended_gpu, monkeypatch, tmp_path
):
    """Tiles of a large dictionary would take longer than the steps between two logs."""

    def tiles(f_BN):
        raise AssertionError("tiles")

    monkeypatch.setattr(sgo_sae, "gradient_by_tiles", tiles)
    cfg = sgo_sae.Config(d_sae=2048, k=4, out=str(tmp_path))
    run = sgo_sae.Run(cfg, 16, CUDA, mixed_precision=True)
    run.log(torch.randn(128, 16).to("cuda"), 1, 1.0)
    assert run.history[0]["omega"] > 0


def test_training_and_evaluation_on_a_pretended_gpu(
    train_argv, texts, probe_file, speller, tmp_path, result, pretended_gpu
):
    argv = train_argv(device="cuda", dtype="bfloat16") + ["--arch", "topk", "relu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
        assert trained(argv) == 0
    file = next((tmp_path / "run").glob("*/metrics.jsonl"))
    assert json.loads(file.read_text().splitlines()[-1])["peak_memory_gb"] == 3.0
    settings = ["--device", "cuda", "--contexts", "8", "--train", "40", "--test", "20"]
    argv = [tmp_path / "run", *settings, "--text", texts, "--probe", probe_file]
    families = ["core", "behaviour", "competition", "probe", "scr"]
    found = result([*argv, "--metrics", *families, "--html", tmp_path / "page.html"])
    assert found.code == 0 and "not measured" not in found.out
    for figure in (
        "core: explained variance ↑",
        "behaviour: ce score ↑",
        "competition: pairs over chance ↓",
        "probe: standardised 5 ↑",
        "scr: scr 10 ↑",
    ):
        assert found.row(figure)
    assert "The pairs that compete most" in (tmp_path / "page.html").read_text()
    folder = speller.sae(tmp_path / "speller", "letters")
    argv = [folder, "--device", "cuda", "--metrics", "absorption", "--words", "1040"]
    found = result(argv)
    assert found.code == 0 and found.row("absorption: full ↓")


# ----------------------------------------------------------------------------- where there is a GPU


on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")


@pytest.fixture
def real_gpu(seeded, monkeypatch):
    """The GPU, which other tests hide, with float32 products in TF32, as in training."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False  # PyTorch's default


@on_a_gpu
@pytest.mark.parametrize("way", ["tiles", "pairs"])
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 1e-3), (torch.float32, 1e-3)])
def test_gpu_both_ways_of_omega_are_the_definition(way, dtype, most, monkeypatch, real_gpu):
    take(way, monkeypatch)
    vals_BK, idx_BK = skewed_latents(2048, 3000, 40)
    vals_BK = vals_BK.to(dtype)
    omega, _, expected_BN = fast_definition(dense(vals_BK, idx_BK, 3000))
    leaf_BK = vals_BK.cuda().requires_grad_()
    found = sgo_penalty(leaf_BK, idx_BK.cuda(), 3000)
    (found_BK,) = torch.autograd.grad(found, leaf_BK)
    assert found.item() == pytest.approx(omega, rel=most)
    expected_BK = expected_BN.gather(1, idx_BK) * (vals_BK > 0)
    assert relative_error(found_BK.cpu(), expected_BK) < (4e-3 if dtype == torch.bfloat16 else most)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_ablation_of_the_weights_is_the_definition(dtype, real_gpu):
    vals_BK, idx_BK = skewed_latents(512, 300, 12)
    vals_BK = vals_BK.to(dtype)
    omega, expected_BN = uniform_definition(dense(vals_BK, idx_BK, 300))
    expected_BK = expected_BN.gather(1, idx_BK) * (vals_BK > 0)
    for penalty in (
        lambda v: sgo_penalty(v, idx_BK.cuda(), 300, weighted=False),
        lambda v: sgo_penalty_dense(dense(v, idx_BK.cuda(), 300), weighted=False),
    ):
        leaf_BK = vals_BK.cuda().requires_grad_()
        found = penalty(leaf_BK)
        (found_BK,) = torch.autograd.grad(found, leaf_BK)
        assert found.item() == pytest.approx(omega, rel=2e-3)
        assert relative_error(found_BK.cpu() * (vals_BK > 0), expected_BK) < 4e-3


@on_a_gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_gpu_trains_as_a_cpu_does(arch, real_gpu):
    torch.backends.cuda.matmul.allow_tf32 = False
    batches = torch.randn(30, 256, 64) * 2
    ends = []
    for device in (CPU, torch.device("cuda")):
        run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=1024, k=6, lr=5e-3), 64, device)
        if arch != "topk":
            run.sae.start(batches[0].to(device), 0.04)
        for step, x_BD in enumerate(batches):
            run.step(x_BD.to(device), step, 30)
        x_BD = batches[-1].to(device)
        ends.append((x_BD - run.sae(x_BD)).square().sum().item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-2)


@on_a_gpu
def test_gpu_run_is_stopped_resumed_and_evaluated(
    train_argv, texts, probe_file, speller, tmp_path, monkeypatch, real_gpu
):
    """By all families; on the CPU the figures of the text are the same."""
    argv = train_argv(device="cuda", **LONG)
    stop_at(monkeypatch, 113)
    assert trained(argv) == 143
    assert trained([*argv, "--resume"]) == 0
    sizes = ["--contexts", 8, "--train", 40, "--test", 20, "--dtype", "float32"]
    argv = [tmp_path / "run", "--text", texts, "--probe", probe_file, *sizes]
    families = ["core", "behaviour", "competition", "probe", "scr"]
    found = {}
    for device in ("cpu", "cuda"):
        more = ["--device", device, "--html", tmp_path / "page.html"]
        assert evaluated([*argv, "--metrics", *families, *more]) == 0
        found[device] = json.loads((tmp_path / "run" / "eval.json").read_text())
    for family in ("core", "behaviour"):
        figures = [found[device][family]["figures"] for device in ("cpu", "cuda")]
        assert figures[1] == pytest.approx(figures[0], rel=0.02, abs=0.02)
    folder = speller.sae(tmp_path / "speller", "absorbing")
    assert evaluated([folder, "--metrics", "absorption", "--words", "1040"]) == 0
    full = json.loads((folder / "eval.json").read_text())["absorption"]["figures"]["full"]
    assert full == pytest.approx(1 / 8, abs=0.06)


@on_a_gpu
def test_gpu_memory_of_run_4_is_that_of_the_account(real_gpu):
    """Of the autoencoder alone: what is allocated at the peak of three steps."""
    cfg = sgo_sae.Config(d_sae=18432)
    counted = benchmark.held_bytes([cfg])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = sgo_sae.Run(cfg, 2304, torch.device("cuda"), mixed_precision=True)
    for step in range(3):
        run.step(torch.randn(2048, 2304, device="cuda") * 3, step, 4882)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"run 4: {measured / 1e9:.2f} GB measured, {counted / 1e9:.2f} GB counted")
    assert measured < 1.1 * counted


# -------------------------------------------------------------------------------------------- study


def planted_of(kind, T=200_000):
    """Which features are active on T tokens, and their rates."""
    generator = torch.Generator().manual_seed(0)
    rate_F = torch.tensor([0.02, 0.02, 0.05, 0.05, 0.1, 0.1, 0.03, 0.03])
    active_TF, x_TD = planted.tokens_of(kind, torch.eye(8), rate_F, T, generator)
    assert torch.equal(x_TD != 0, active_TF)
    size_E = x_TD[active_TF]
    assert (size_E.mean().item(), size_E.std().item()) == pytest.approx((1, 0.25), abs=0.01)
    return active_TF.double(), rate_F.double()


def test_planted_features_are_active_together_as_their_kind_says():
    active_TF, rate_F = planted_of("independent")
    expected_FF = rate_F[:, None] * rate_F
    expected_FF.diagonal().copy_(rate_F)
    both_FF = active_TF.T @ active_TF / len(active_TF)
    assert torch.allclose(both_FF, expected_FF, atol=3e-3)
    active_TF, rate_F = planted_of("pairs")
    both_FF = active_TF.T @ active_TF / len(active_TF)
    for first in range(0, 8, 2):
        copied = (rate_F[first] + rate_F[first] ** 2) / 2
        expected_FF[first, first + 1] = expected_FF[first + 1, first] = copied
    assert torch.allclose(both_FF, expected_FF, atol=3e-3)
    active_TF, rate_F = planted_of("parents")
    rates_F = active_TF.mean(0)
    for parent in (0, 4):
        family = slice(parent + 1, parent + 4)
        assert active_TF[:, parent][active_TF[:, family].any(1)].all()
        assert torch.allclose(rates_F[family], rate_F[family], atol=3e-3)
        silent = (1 - rate_F[parent : parent + 4]).prod()
        assert rates_F[parent].item() == pytest.approx(1 - silent.item(), abs=3e-3)


def test_figures_of_planted_features_by_hand():
    """Of latents that are the features, in another order; then the first parent's is silent where
    its second child is active, and another latent, nearest to the last child, is always active.
    """
    pytest.importorskip("scipy")
    active_TF = torch.zeros(40, 8, dtype=torch.bool)
    active_TF[:10, [0, 1]] = True  # on 10 tokens a parent and its first child,
    active_TF[10:16, [0, 2]] = True  # on 6 its second,
    active_TF[16:20, 0] = True  # on 4 it alone,
    active_TF[20:25, [4, 7]] = True  # and on 5 the other parent and its last child
    x_TD = active_TF.float()
    order = torch.tensor([3, 0, 7, 1, 2, 4, 5, 6])
    sae = planted_sae(torch.eye(8)[order])
    found = planted.figures_of(sae, torch.eye(8), active_TF, x_TD, "parents")
    # The latents of the features 3, 5 and 6 are never active, and their F1 is 0.
    assert found == pytest.approx({"MCC": 1, "F1": 5 / 8, "EV": 1, "parent silent": 0}, abs=1e-6)
    sae.W_enc.data[2, 1] = -1  # latent 1 is feature 0; its other child is feature 2
    sae.b_enc.data[2] = 1  # latent 2 is feature 7
    found = planted.figures_of(sae, torch.eye(8), active_TF, x_TD, "parents")
    f1_of_parent = 2 * 14 / (14 + 20)
    f1_of_child = 2 * 5 / (40 + 5)
    error = 6 * 1 + 40 * 1  # the parent's 1 on 6 tokens, and 1 too much on all
    variance = (x_TD - x_TD.mean(0)).square().sum().item()
    assert found["F1"] == pytest.approx((f1_of_parent + f1_of_child + 3) / 8)
    assert found["EV"] == pytest.approx(1 - error / variance)
    assert found["parent silent"] == pytest.approx(6 / 21)
    assert "parent silent" not in planted.figures_of(sae, torch.eye(8), active_TF, x_TD, "pairs")
    sae.W_dec.data[0] = torch.eye(8)[0] + torch.eye(8)[3]  # of features 3 and 0; matched with 3
    found = planted.figures_of(sae, torch.eye(8), active_TF, x_TD, "pairs")
    assert found["MCC"] == pytest.approx((7 + math.sqrt(0.5)) / 8)


def test_figures_of_planted_features_are_saelens_s():
    synthetic = pytest.importorskip("sae_lens.synthetic", reason="SAELens is not installed")
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic import evals

    torch.manual_seed(1)
    direction_FD = F.normalize(torch.randn(48, 16), dim=1)
    generator = torch.Generator().manual_seed(0)
    tokens = planted.tokens_of("parents", direction_FD, torch.full((48,), 0.06), 3000, generator)
    active_TF, x_TD = tokens
    sae = SAE(16, 40, 5)  # fewer latents than features, and some of them near to the same feature
    found = planted.figures_of(sae, direction_FD, active_TF, x_TD, "pairs")
    with torch.no_grad():
        f_TN = sae.encode(x_TD)
        xhat_TD = sae.decode(f_TN)
    theirs = evals.compute_classification_metrics(f_TN, active_TF.float(), sae.W_dec, direction_FD)
    variance = ExplainedVarianceCalculator()
    variance.add_batch(xhat_TD, x_TD)
    expected = {
        "MCC": synthetic.mean_correlation_coefficient(sae.W_dec.data, direction_FD),
        "F1": theirs.f1_score,
        "EV": variance.compute(),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_planted_trial_starts_far_from_the_features_and_moves_towards_them(monkeypatch):
    pytest.importorskip("scipy")
    arms = {"α 0": {"k": 8, "alpha": 0.0}, "SGO": {"k": 8, "alpha": planted.PAPER_STRENGTH}}
    monkeypatch.setattr(planted, "arms_of", lambda kind, k: arms)
    first, then = (planted.trial("independent", 0, steps, batch=512) for steps in (1, 25))
    assert first["α 0"]["MCC"] < 0.5
    assert then["α 0"]["MCC"] > first["α 0"]["MCC"] + 0.05
    assert then["α 0"]["αΩ/rec"] == 0 < then["SGO"]["αΩ/rec"]
    again = planted.trial("independent", 0, 25, batch=512)
    assert then == again  # a seed fixes everything


def test_the_table_of_planted_features_by_hand():
    pytest.importorskip("scipy")
    trials = []
    for plain, penalised, uniform in ((0.5, 0.6, 0.7), (0.7, 0.75, 0.65), (0.6, 0.9, 0.9)):
        arms = {"α 0": plain, "SGO, 1": penalised, "w = 1, EV of SGO, 1": uniform}
        arms["α 0, k - 2"] = plain + 0.1
        trials.append({arm: {"MCC": value} for arm, value in arms.items()})
    _, first, second, third, last, control, less = planted.lines_of(trials)
    # Differences 0.1, 0.05 and 0.3: their deviation is 0.1323, t(2) at 97.5 % is 4.303.
    assert first.split() == ["α", "0", "0.600"]
    assert second.split() == ["SGO,", "1", "0.750", "(+0.150", "±", "0.329)"]
    assert third.startswith("w = 1, EV of SGO, 1   0.750 (+0.150 ± ")
    # To SGO 0.1, -0.1 and 0, of deviation 0.1.
    assert last.split() == ["less", "SGO,", "1", "0.750", "(+0.000", "±", "0.248)"]
    # The control is always 0.1 better than α 0.
    assert control.split()[-5:] == ["2", "0.700", "(+0.100", "±", "0.000)"]
    assert less.split() == ["SGO,", "1", "less", "it", "0.750", "(+0.050", "±", "0.329)"]


def test_the_tasks_are_made_of_what_is_downloaded(tmp_path, monkeypatch):
    """Of two packages that were downloaded before, and of what the Hub has."""
    import datasets

    def put(archive, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    downloads = tmp_path / "downloads"
    downloads.mkdir()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for n, source in enumerate(tasks.SOURCES):
            lines = [f"{i}\t{i - 2}\t{source} {i // 2} {'x' * 20}" for i in range(5)]
            content = "\n".join([*lines, f"9\t2.5\tshort {n}"]).encode()
            put(archive, f"hutto_ICWSM_2014/{source}_GroundTruth.txt", content)
    for (requirement, name), content in (
        (tasks.SNIPPETS, inner.getvalue()),
        (tasks.SENTENCES, "\ufeff-1,This is a fact of biology.\n1,It may well be one.\n".encode()),
    ):
        with tarfile.open(
            downloads / f"{requirement.replace('==', '-')}.tar.gz", "w:gz"
        ) as archive:
            put(archive, name, content)
    news = datasets.Dataset.from_list([{"text": "Some news of today.", "label": 3}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: news)
    tasks.main(["tasks", str(tmp_path)])
    found = {}
    for name in ("topics", "sources", "sentiment", "hedging"):
        found[name] = pandas.read_json(tmp_path / f"{name}.jsonl", lines=True)
    assert found["topics"].to_dict("records") == [{"text": "Some news of today.", "label": 3}]
    # Of five lines two have the text of the one before, and one text is short.
    assert found["sources"]["label"].value_counts().to_dict() == dict.fromkeys(tasks.SOURCES, 3)
    # Of the reviews alone; the second text has the rating 0, and is left out.
    rated = {
        (row["text"].split()[1], row["label"]) for row in found["sentiment"].to_dict("records")
    }
    assert rated == {("0", False), ("2", True)} and len(found["sentiment"]) == 4
    assert found["hedging"]["label"].tolist() == [-1]  # the other one has no 20 characters


def test_the_text_of_the_comparison_is_of_several_sources(tmp_path, monkeypatch):
    import datasets

    small_library(monkeypatch, tmp_path / "library", {"a.py": "code\n\n" * 400, "b.py": "short"})
    articles = [
        " = One = ",
        "first " * 100,
        " = = Section = = ",
        "more",
        " = Two = ",
        "second " * 90,
    ]
    rows = datasets.Dataset.from_dict({"text": [f"{line}\n" for line in articles]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: rows)
    page = tmp_path / "downloads" / "debian-handbook" / "html" / "de-DE" / "a.html"
    page.parent.mkdir(parents=True)
    page.write_text("<head>no</head><p>Ein &amp; Satz.</p>\n \n\n<p>" + "Wort " * 90)
    entries = tmp_path / "downloads" / "dict-gcide" / "gcide.dict.dz"
    entries.parent.mkdir()
    entries.write_bytes(gzip.compress(b"entry " * 90))
    tasks.main(["text", str(tmp_path), "--packages"])
    found = []
    for name in ("train", "heldout"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        found += [(row["source"], row["text"]) for row in map(json.loads, lines)]
    sources = ["code", "dictionary", "languages", "wikitext", "wikitext"]
    assert sorted(source for source, _ in found) == sources
    texts = dict(found)
    assert texts["dictionary"].startswith("entry entry")
    assert texts["languages"].startswith("Ein & Satz.\n\nWort") and "<" not in texts["languages"]
    one = next(text for _, text in found if "first" in text)
    assert "Section" in one and "second" not in one


def test_the_links_of_the_texts_resolve():
    """To files that are there, and to headings, by the names that GitHub gives them."""
    texts = {name: (HERE / name).read_text() for name in ("README.md", "study/README.md")}
    anchors = {}
    for name, text in texts.items():
        heads = re.findall(
            r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
        )
        words = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
        anchors[name] = {word.replace(" ", "-") for word in words}
    n_links = 0
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith("http"):
                path, _, anchor = target.partition("#")
                file = (HERE / name).parent / path if path else HERE / name
                assert file.exists(), target
                assert not anchor or anchor in anchors[str(file.relative_to(HERE))], target
                n_links += 1
    assert n_links > 10


def test_a_long_document_is_cut_at_empty_lines():
    text = "\n\n".join([*["line " * 10] * 5, "x" * 250])
    parts = list(tasks.parts_of(text, 100))
    assert "".join(parts).split() == [*["line"] * 50, "x" * 100, "x" * 100, "x" * 50]
    assert max(len(part.strip()) for part in parts) <= 100


def test_the_studies_run_as_their_first_lines_say():
    """At a small size; what one needs beyond requirements.txt is said where it lacks."""
    sizes = ["--dict", "256", "--k", "8", "--batch", "128", "--width", "32"]
    result = python(HERE / "study" / "benchmark.py", *sizes, "--peers")
    assert result.returncode == 0, result.stderr
    milliseconds = {}
    for line in result.stdout.splitlines()[1:]:
        name, _, number = line.removeprefix("step ").removesuffix(" ms").strip().rpartition(" ")
        milliseconds[name.strip()] = float(number.replace(",", ""))
    assert {"without the penalty", "with the penalty", "with w = 1"} <= set(milliseconds)
    assert min(milliseconds.values()) > 0
    planted_at = [HERE / "study" / "planted.py", "--seeds", "2", "--steps", "2", "--batch", "256"]
    if importlib.util.find_spec("scipy"):
        result = python(*planted_at)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("SGO, 1 less it") == 3
    code = "import importlib.util; importlib.util.find_spec = lambda name: None; import sys; "
    code += "sys.path.insert(0, 'study'); import planted; planted.main()"
    result = python("-c", code, cwd=HERE)
    assert result.returncode == 1 and "needs scipy" in result.stderr
    if importlib.util.find_spec("sae_bench") is None:
        result = python(HERE / "study" / "saebench.py")
        assert result.returncode == 1 and "needs sae-bench" in result.stderr
