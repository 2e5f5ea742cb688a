"""Evaluate sparse autoencoders by the definitions of SAEBench 0.6.0.

    python eval_sae.py RUN [RUN ...]               a table; the figures go to eval.json in each RUN
    python eval_sae.py RUN --metrics core probe    some of the families; --help lists every setting
    python eval_sae.py RUN [RUN ...] --paired      differences between settings, with intervals
    python eval_sae.py RUN [RUN ...] --html FILE   and a page: which latents compete, on what text

A RUN is a folder that sgo_sae.py or SAELens wrote, a folder of such folders, or a params.npz of
Gemma Scope, on disk or on the Hub as OWNER/NAME/PATH. The figures of a params.npz go to
params.eval.json beside it; of what is on the Hub they are only printed. The exit code is 0 where
every RUN has figures of every family that was asked for, 1 where one of them has none, and 2 where
none has any, or where the call can't be carried out.

The sections, in this order:

    settings       what can be chosen
    figures        every figure: its name, which direction is better, what it means

    core           how well the reconstruction stands for the activation
    behaviour      what the language model makes of the reconstruction
    competition    which latents are active together more often than chance
    model          the language model, and reading it
    tasks          the labelled texts of the next two families
    probe          linear probes, and sparse probing
    scr            spurious correlation removal
    absorption     latents that take over what another should say

    autoencoders   everybody's files
    table          means, differences and intervals
    page           the HTML page
    evaluation     what the families share: the language model and the text
    results        one family measured, and eval.json
    main           from the command line to the table

A family is a section that ends with `measure_NAME`, which is where to begin. It takes two things.
An `Evaluation` has the settings `args`, the language model `model`, and for the first three
families a text: `contexts`, with the ids (R, L) and which of these tokens are kept, (R, L), and
their `activations` (R, L, D). These are loaded and read when they are first asked for. A `Subject`
has an autoencoder `sae`. What `measure_NAME` returns is `Found`, a list of `Parts` for each
Subject: the figures on one text or task.

A call begins at the end of the file. `work` makes the Subjects and the Evaluation, and lets
`measure` call one family after another and keep what is found.

Shapes are named as in sgo_sae.py: B tokens, texts or contexts of a batch, L positions, R contexts,
D hidden size, N latents. Besides, T are all tokens, texts or words of a measurement and U those of
its test part, P words on new prompts, E the tokens of a batch that count, V the vocabulary, A the
letters of the alphabet, S latents that were selected, and I latents that are paired with all others
at once. A digit is a size.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import math
import random
import re
import string
import sys
import tempfile
import traceback
import types
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import mpmath
import numpy
import pandas
import torch
import torch.nn.functional as F
from torch import nn

import sgo_sae
from sgo_sae import InputError


# ----------------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Settings:
    """Every setting is a flag, and the comment beside it is its line in --help.

    Those that are marked "list" are lists; of `seed` the default is the list of 0.
    """

    metrics: str = None  # families to measure (list; default: all; of the demo all but absorption)
    resume: bool = False  # keep what eval.json has of the same settings
    model: str = None  # language model, whatever the RUNs name (default: theirs)
    layer: int = None  # layer; RUNs that name another one are left out (default: the first RUN's)
    # The text of core, behaviour and competition
    text: str = None  # held-out text: a file or dataset (default: split `validation` of RUN's)
    text_column: str = None  # the column of --text that holds it (default: text)
    split: str = None  # the split of --text (default: train)
    contexts: int = 512  # contexts of text
    ctx: int = None  # tokens in a context (default: as in training)
    # The tasks of probe and scr, and the words of absorption
    probe: str = None  # files with the columns text, label, attribute (list; default: SAEBench's)
    train: int = 2000  # training texts of a class
    test: int = 500  # test texts of a class
    words: int = None  # words of absorption (default: all that the tokenizer has)
    seed: int = 0  # seeds of samples and probes; the text is that of the first (list)
    # The table
    paired: bool = False  # differences to the first RUN's topk SAE of alpha 0, or its first SAE
    against: str = None  # the same to the setting of that name in the table (default: none)
    html: str = None  # file of a page, too, which needs competition (default: none)
    # The machine
    device: str = "auto"  # cuda, cuda:1, cpu; auto is cuda where there is one
    dtype: str = "auto"  # the model's; auto is bfloat16 on cuda


LISTS = ("metrics", "probe", "seed")


# ------------------------------------------------------------------------------------------ figures
PROBE_SIZES = (1, 2, 5, 20)  # latents in a probe; 20 is ours
SCR_SIZES = (2, 5, 10, 20, 50, 100, 500)  # latents that SCR ablates
RARE = 20  # latents that are active on fewer tokens are not compared with others; ours
DENSE = 0.1  # latents that are active on a larger share of the tokens are dense, as in SAEBench
OVER_CHANCE = 0.5  # a pair competes where its w is over chance by more than that; ours


class Figure(NamedTuple):
    """A figure, or several that differ in a size."""

    family: str
    name: str  # in eval.json, where _1, _2, ... follow for sizes
    better: str  # ↑ where more is better, ↓ where less is, – where neither is
    meaning: str


# The order is that of the table. A new figure takes a line here, and the same name in what the
# function of its family returns.
LINES = f"""
core         explained_variance  ↑  share of x's variance that x̂ explains
core         mse                 ↓  squared error per element, in the model's units
core         mse_benchmark       ↓  SAEBench's: ‖x - x̂‖² of a token ÷ the tokens of 16 contexts
core         cosine              ↑  cosine of x and x̂, mean over the tokens; 1 is the best
core         l0                  –  active latents of a token
core         l1                  –  sum of a token's latents
core         norm_ratio          –  ‖x̂‖ / ‖x‖, mean over the tokens; 1 is no shrinkage
core         bias                –  Σ‖x̂‖² / Σ⟨x, x̂⟩; 1 is no bias of x̂'s length
core         never_fire          ↓  share of the latents that are active on no token
core         dense               ↓  share of the latents active on over {DENSE:.0%} of the tokens
behaviour    ce_score            ↑  share that x̂ saves of the cross-entropy that zero for x costs
behaviour    kl_score            ↑  the same for the KL divergence; 1 is the best
behaviour    ce_clean            –  cross-entropy, nats, with x
behaviour    ce_zero             –  cross-entropy, nats, with zero in the place of x
behaviour    ce_sae              ↓  cross-entropy, nats, with x̂ in the place of x
behaviour    kl_zero             –  KL divergence from the model's, nats, with zero
behaviour    kl_sae              ↓  KL divergence from the model's, nats, with x̂
competition  pairs_over_chance   ↓  pairs of latents whose w is over chance by over {OVER_CHANCE}
competition  share_over_chance   ↓  their share of all pairs compared
competition  compared            –  latents that are compared, neither rare nor dense
competition  rare                ↓  share of the latents active on under {RARE} tokens
competition  mean_max_cos        ↓  largest |cosine| of a decoder row with another, on average
probe        latents             ↑  accuracy of a probe on the latents whose means differ most
probe        standardised        ↑  the same on those that differ most in standard deviations
probe        latents_all         ↑  accuracy of a probe on all latents
probe        x                   –  accuracy on dimensions of x itself, whatever the autoencoder
probe        x_all               –  accuracy on all dimensions of x; chance is 0.5 for all probes
scr          scr                 ↑  share of the accuracy lost by bias that ablation gives back
absorption   absorption          ↓  share of a letter's direction that others than its latents carry
absorption   full                ↓  share of words on which one other latent carries it
absorption   split_latents       –  latents that share a letter
absorption   letters             –  letters that are scored, of 26
"""
FIGURES = [Figure(*line.split(maxsplit=3)) for line in LINES.strip().splitlines()]


def ratio(part, whole):
    """part / whole, NaN where whole is 0: there is no such figure, and a Record says so."""
    return part / whole if whole else math.nan


class Part(NamedTuple):
    """Figures of an autoencoder on one text or task."""

    task: str
    seed: int  # of the sample of texts or words; 0 where there is one alone
    figures: dict


class Found(NamedTuple):
    """What was found of a family."""

    parts: list  # for each autoencoder, a list of Parts
    sizes: dict  # how many texts, tokens or words were used
    notes: list  # what a reader of the figures has to know
    is_whole: bool  # whether all was measured that was asked for


# --------------------------------------------------------------------------------------------- core
BENCHMARK_CONTEXTS = 16  # contexts in a batch of SAEBench's evaluation


@torch.no_grad()
def reconstruction(sae, x_TD, per_context=127):
    """How well x̂ stands for x over all tokens: a dict of figures.

    FIGURES says what each means. `per_context` is how many tokens of a context count on average.
    (SAEBench's explained variance takes the mean of x² for that of x, in its variance.)
    """
    x_TD = x_TD.float()
    T, D = x_TD.shape
    N = len(sae.b_enc)
    xhat_TD = torch.empty_like(x_TD)
    fired_N = torch.zeros(N, device=x_TD.device)
    l1 = 0.0
    for rows in torch.arange(T, device=x_TD.device).split(2048):
        f_BN = sae.encode(x_TD[rows])
        xhat_TD[rows] = sae.decode(f_BN)
        fired_N += (f_BN > 0).sum(0)
        l1 += f_BN.sum().double() / T
    error_T = (x_TD - xhat_TD).square().sum(1).double()
    variance_T = (x_TD - x_TD.mean(0)).square().sum(1).double()
    figures = {
        "explained_variance": 1 - error_T.sum() / variance_T.sum(),
        "mse": error_T.mean() / D,
        "mse_benchmark": error_T.mean() / (BENCHMARK_CONTEXTS * per_context),
        "cosine": F.cosine_similarity(x_TD, xhat_TD, dim=1).mean(),
        "l0": fired_N.double().sum() / T,
        "l1": l1,
        "norm_ratio": (xhat_TD.norm(dim=1) / x_TD.norm(dim=1)).mean(),
        "bias": xhat_TD.square().sum() / (x_TD * xhat_TD).sum(),
        "never_fire": (fired_N == 0).float().mean(),
        "dense": (fired_N > DENSE * T).float().mean(),
    }
    return {name: figure.item() for name, figure in figures.items()}


def measure_core(evaluation, subjects):
    """What was Found of the reconstruction of the text's activations."""
    contexts = evaluation.contexts
    x_TD = evaluation.activations[contexts.kept_RL]
    per_context = len(x_TD) / len(contexts.kept_RL)
    saes = sgo_sae.each([subject.sae for subject in subjects], "core")
    return contexts.found([reconstruction(sae, x_TD, per_context) for sae in saes])


# ---------------------------------------------------------------------------------------- behaviour
MAX_LOGITS = 2**27  # logits at once; in float32 they are 0.5 GB, four contexts of Gemma-2


def unchanged(x_BLD, kept_BL):
    return x_BLD


def zeroed(x_BLD, kept_BL):
    """SAEBench's zero ablation: zero for every token, BOS and other special tokens among them."""
    return torch.zeros_like(x_BLD)


def reconstructed_by(sae):
    """A replacement of x by x̂. Tokens that do not count, such as BOS, keep their activations."""

    def replace(x_BLD, kept_BL):
        xhat_BLD = sae(x_BLD.float()).to(x_BLD.dtype)
        return torch.where(kept_BL[..., None], xhat_BLD, x_BLD)

    return replace


@torch.inference_mode()
def behaviour(lm, layer, saes, ids_RL, kept_RL):
    """What the language model makes of x̂ in the place of x: a dict of figures for each SAE.

    Cross-entropies and KL divergences are in nats, means over the tokens that count. The last
    token of a context is followed by none, so that it has a divergence and no cross-entropy.
    """
    n_predicted = kept_RL[:, :-1].sum().item()
    if n_predicted == 0:
        raise InputError("the contexts have no token that counts and is followed by another")
    replacements = [zeroed, *map(reconstructed_by, saes)]
    clean_sum = 0.0
    ce_sums = [0.0] * len(replacements)
    kl_sums = [0.0] * len(replacements)
    vocabulary = lm.config.get_text_config().vocab_size
    rows = max(1, MAX_LOGITS // (ids_RL.shape[1] * vocabulary))
    parts = list(zip(ids_RL.split(rows), kept_RL.split(rows)))
    for ids_BL, kept_BL in sgo_sae.each(parts, "behaviour"):
        clean_EV = log_probabilities(lm, layer, ids_BL, kept_BL, unchanged)
        clean_sum += cross_entropy(clean_EV, ids_BL, kept_BL)
        for n, replace in enumerate(replacements):
            log_p_EV = log_probabilities(lm, layer, ids_BL, kept_BL, replace)
            ce_sums[n] += cross_entropy(log_p_EV, ids_BL, kept_BL)
            kl_EV = F.kl_div(log_p_EV, clean_EV, reduction="none", log_target=True)
            kl_sums[n] += kl_EV.sum(1).double().sum().item()
    ce_clean = clean_sum / n_predicted
    ce_zero, *ce_of_saes = [total / n_predicted for total in ce_sums]
    kl_zero, *kl_of_saes = [total / kept_RL.sum().item() for total in kl_sums]
    found = []
    for ce_sae, kl_sae in zip(ce_of_saes, kl_of_saes):
        figures = {
            "ce_clean": ce_clean,
            "ce_zero": ce_zero,
            "ce_sae": ce_sae,
            "kl_zero": kl_zero,
            "kl_sae": kl_sae,
            "ce_score": ratio(ce_zero - ce_sae, ce_zero - ce_clean),
            "kl_score": 1 - ratio(kl_sae, kl_zero),
        }
        found.append(figures)
    return found


def log_probabilities(lm, layer, ids_BL, kept_BL, replace):
    """Log-probabilities (E, V) of the token after each that counts, with replace(x) for x."""

    def hook(module, args, output):
        if isinstance(output, (tuple, list)):  # OpenAI-GPT's layers return a list
            return (replace(output[0], kept_BL), *output[1:])
        return replace(output, kept_BL)

    handle = layer.register_forward_hook(hook)
    try:
        logits_BLV = lm(input_ids=ids_BL).logits
    finally:
        handle.remove()
    return logits_BLV[kept_BL].float().log_softmax(-1)


def cross_entropy(log_p_EV, ids_BL, kept_BL):
    """Cross-entropy, in nats, summed over the tokens that count and are followed by another."""
    next_BL = torch.full_like(ids_BL, -100)  # which nll_loss leaves out
    next_BL[:, :-1] = ids_BL[:, 1:]
    return F.nll_loss(log_p_EV, next_BL[kept_BL], reduction="none").double().sum().item()


def measure_behaviour(evaluation, subjects):
    """What was Found of what the language model makes of the text's reconstruction."""
    model = evaluation.model
    if not model.has_head:
        raise InputError("the model has no language-model head")
    contexts = evaluation.contexts
    saes = [subject.sae for subject in subjects]
    figures = behaviour(model.lm, model.layer, saes, contexts.ids_RL, contexts.kept_RL)
    return contexts.found(figures)


# -------------------------------------------------------------------------------------- competition
MAX_PAIRS = 2**22  # pairs of latents whose counts are held at once


class Pairs(NamedTuple):
    """Pairs of latents i < j that are active together. The fields are vectors with an entry for
    each pair, or numbers of one pair."""

    i: torch.Tensor
    j: torch.Tensor
    shared: torch.Tensor  # |M_i ∩ M_j|, the tokens on which both are active
    w: torch.Tensor  # of Eq. 3, over all tokens
    chance: torch.Tensor  # what w would be on average if the two were independent


class Activity(NamedTuple):
    """Which latents are active on which tokens, on the CPU.

    tokens[e] and latents[e] are entry e: a token, and a latent that is active on it.
    """

    n_tokens: int
    fired_N: torch.Tensor  # |M_i|
    tokens: torch.Tensor
    latents: torch.Tensor

    @property
    def compared(self):
        """The numbers of the latents that are neither rare nor dense.

        A latent that fires once has w = 1 with all its neighbours, and one that fires on most
        tokens has a large w with every other, by chance.
        """
        is_dense_N = self.fired_N > DENSE * self.n_tokens
        return ((self.fired_N >= RARE) & ~is_dense_N).nonzero()[:, 0]


@torch.no_grad()
def activity_of(sae, x_TD):
    """The Activity of an autoencoder's latents on all tokens."""
    parts = []
    for start in range(0, len(x_TD), 2048):
        active = (sae.encode(x_TD[start : start + 2048].float()) > 0).nonzero().cpu()
        active[:, 0] += start
        parts.append(active)
    tokens, latents = torch.cat(parts).T
    fired_N = torch.bincount(latents, minlength=len(sae.b_enc))
    return Activity(len(x_TD), fired_N, tokens, latents)


def compared_pairs(activity):
    """Yields the Pairs of compared latents, part by part.

    The counts are the product of the activity, 0 or 1, with itself, as in `coactivation_weights`.
    It is sparse here, and some of its rows at once, so that no array has the size of N × N.
    Independent latents share |M_i| |M_j| / T tokens on average, so that their w is on average
    max(|M_i|, |M_j|) / T.
    """
    numbers = activity.compared
    S = len(numbers)
    # From here on, latents are numbered among those that are compared.
    fired_S = activity.fired_N[numbers]
    number_N = torch.full_like(activity.fired_N, -1)
    number_N[numbers] = torch.arange(S)
    latents = number_N[activity.latents]
    is_compared = latents >= 0
    where = torch.stack([latents[is_compared], activity.tokens[is_compared]])
    ones = torch.ones(where.shape[1])
    size = (S, activity.n_tokens)
    active_ST = torch.sparse_coo_tensor(where, ones, size, check_invariants=False).coalesce()
    active_TS = active_ST.T.coalesce()
    for rows_I in torch.arange(S).split(max(1, MAX_PAIRS // max(S, 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls its sparse products a beta
            shared_IS = torch.sparse.mm(active_ST.index_select(0, rows_I), active_TS).coalesce()
        row, j = shared_IS.indices()
        i = rows_I[row]
        once = i < j
        i, j, shared = i[once], j[once], shared_IS.values()[once]
        w = shared / torch.minimum(fired_S[i], fired_S[j])
        chance = torch.maximum(fired_S[i], fired_S[j]) / activity.n_tokens
        yield Pairs(numbers[i], numbers[j], shared, w, chance)


def competition(sae, x_TD):
    """Competition of latents over the tokens: a dict of figures.

    Rare latents are counted apart; dense ones are among the figures of reconstruction.
    """
    activity = activity_of(sae, x_TD)
    n_over = 0
    for pairs in compared_pairs(activity):
        n_over += (pairs.w - pairs.chance > OVER_CHANCE).sum().item()
    n_compared = len(activity.compared)
    return {
        "pairs_over_chance": n_over,
        "share_over_chance": ratio(n_over, math.comb(n_compared, 2)),
        "compared": n_compared,
        "rare": (activity.fired_N < RARE).double().mean().item(),
        "mean_max_cos": nearest_cosine(sae.W_dec).mean().item(),
    }


@torch.no_grad()
def nearest_cosine(W_dec_ND):
    """The largest |cosine| of each decoder row with another (N,); NaN where there is no other."""
    if len(W_dec_ND) == 1:
        return torch.tensor([math.nan])
    W_ND = F.normalize(W_dec_ND, dim=1)
    nearest = []
    for rows_I in torch.arange(len(W_ND), device=W_ND.device).split(1024):
        cosine_IN = (W_ND[rows_I] @ W_ND.T).abs()
        cosine_IN[torch.arange(len(rows_I)), rows_I] = 0  # of a row with itself
        nearest.append(cosine_IN.amax(1))
    return torch.cat(nearest)


def measure_competition(evaluation, subjects):
    """What was Found of the competition of latents on the text."""
    contexts = evaluation.contexts
    x_TD = evaluation.activations[contexts.kept_RL]
    saes = sgo_sae.each([subject.sae for subject in subjects], "competition")
    return contexts.found([competition(sae, x_TD) for sae in saes])


# -------------------------------------------------------------------------------------------- model
class Batch(NamedTuple):
    """Token lists of similar length that the language model has read together."""

    rows: list  # which of the lists they are
    ids_BL: torch.Tensor  # padded on the right with -1
    kept_BL: torch.Tensor  # the positions that count
    x_BLD: torch.Tensor  # the layer's output


class LanguageModel:
    """A language model, whole if it has a head, the layer that is read, and its tokenizer."""

    def __init__(self, name, layer, device, dtype, ctx=2):
        from transformers import AutoConfig

        sgo_sae.check_name(name)
        # A RUN may name it otherwise than the Hub; SAELens's have TransformerLens's names.
        with sgo_sae.loading(f"{name}, the language model (--model gives another),"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # The names of classes that have a head that predicts the next token.
        self.has_head = bool(
            re.search("CausalLM|LMHead|ConditionalGeneration", str(config.architectures))
        )
        loaded = sgo_sae.load_lm(name, layer, device, dtype, ctx, whole=self.has_head)
        self.lm = loaded.lm
        self.layer = loaded.layer
        self.tokenizer = loaded.tokenizer
        self.width = self.lm.config.get_text_config().hidden_size
        self.n_ids = self.lm.get_input_embeddings().num_embeddings
        self.bos_ids = sgo_sae.first_id(self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)

    def ids(self, lists):
        """Token ids (B, L) on the device, padded on the right with -1."""
        parts = [torch.tensor(ids, dtype=torch.long) for ids in lists]
        ids_BL = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)
        largest = ids_BL.max()
        if largest >= self.n_ids:
            raise InputError(f"the tokenizer gives the id {largest} of {self.n_ids} in the model")
        return ids_BL.to(self.lm.device)

    def kept(self, ids_BL):
        """The positions (B, L) that count: all but the first, special tokens and the padding."""
        return sgo_sae.kept_tokens(ids_BL, self.tokenizer) & (ids_BL >= 0)

    def read(self, ids_BL):
        """The layer's output (B, L, D); the padding changes none of it."""
        is_padded = bool((ids_BL < 0).any())
        inputs = {"attention_mask": (ids_BL >= 0).long()} if is_padded else {}
        try:
            x_BLD = sgo_sae.layer_output(self.lm, self.layer, ids_BL.clamp(min=0), **inputs)
        except IndexError as error:  # of a table of positions
            raise InputError(f"the model can't read {ids_BL.shape[1]} tokens at once") from error
        if not x_BLD[self.kept(ids_BL)].isfinite().all():
            raise InputError("the model's activations are not finite; try --dtype float32")
        return x_BLD

    def batches(self, lists, desc, batch=64):
        """Reads lists of token ids, and yields Batches of similar length."""
        order = sorted(range(len(lists)), key=lambda t: len(lists[t]))
        for start in sgo_sae.each(range(0, len(order), batch), desc):
            rows = order[start : start + batch]
            ids_BL = self.ids([lists[t] for t in rows])
            yield Batch(rows, ids_BL, self.kept(ids_BL), self.read(ids_BL))


# -------------------------------------------------------------------------------------------- tasks
# The texts of a task are a pandas frame with the columns text, label, attribute and is_test, in the
# order of their source. Files of one's own may have no attributes; only SCR needs them.
FEWEST_TEXTS = 20  # of each label, and of each attribute of it, to train and to test on; ours
TASK_LENGTH = 128  # tokens of a text of a task, as in SAEBench


class HubTexts(NamedTuple):
    """A dataset of SAEBench: its name on the Hub, and its columns."""

    name: str
    text: str
    label: str
    attribute: str


BIOS = HubTexts("LabHC/bias_in_bios", "hard_text", "profession", "gender")
AMAZON = HubTexts("canrager/amazon_reviews_mcauley_1and5", "text", "category", "rating")
SENTIMENT = HubTexts("canrager/amazon_reviews_mcauley_1and5", "text", "rating", None)
NEWS = HubTexts("fancyzhx/ag_news", "text", "label", None)
EUROPARL = HubTexts("Helsinki-NLP/europarl", "translation", None, None)
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}


def held_out(name, every):
    """Whether a file or a text of that name is one of those to test on: one of `every`."""
    return zlib.crc32(name.encode()) % every == 0


def demo_frame():
    """The demo's texts, paragraphs of the standard library.

    The label is the package, one of the five that have most texts in their smallest combination of
    attribute and part. The attribute is whether the paragraph has a docstring. No file has texts of
    both parts.
    """
    files = pandas.DataFrame(sgo_sae.library_texts(), columns=["file", "text"])
    files["is_test"] = files["file"].map(lambda file: held_out(file, 3))
    files["label"] = files["file"].str.split("/").str[0]
    files["text"] = files["text"].str.split("\n\n")
    frame = files.explode("text", ignore_index=True)
    frame = frame[frame["text"].str.len() > 80].copy()
    frame["attribute"] = frame["text"].str.contains('"""')
    sizes = frame.groupby(["label", "attribute", "is_test"]).size()
    smallest = sizes.unstack(["attribute", "is_test"], fill_value=0).min(axis=1)
    return frame[frame["label"].isin(smallest.nlargest(5).index)]


def file_frame(path):
    """The texts of a local file with the columns text, label and, for SCR, attribute.

    A fifth of them are test texts. An empty cell is no label, whatever the file's format.
    """
    config = sgo_sae.Config(dataset=path)
    with sgo_sae.loading(path):
        rows = sgo_sae.open_dataset(config, ("text", "label", "attribute"))
        frame = pandas.DataFrame(list(rows))
    if not {"text", "label"} <= set(frame):
        columns = next(iter(sgo_sae.open_dataset(config)), {})
        found = ", ".join(map(str, columns)) or "nothing"
        raise InputError(f"{path} needs the columns text and label, and has {found}")
    frame = frame[frame["text"].map(sgo_sae.is_text)].replace({"label": "", "attribute": ""}, None)
    n_without = frame["label"].isna().sum()
    if n_without:
        sgo_sae.say_once(f"{path}: {n_without} texts have no label, and are left out")
    frame = frame[frame["label"].notna()].copy()
    for column in frame.columns.intersection(["label", "attribute"]):
        kinds = {type(value) for value in frame[column].dropna()}
        others = kinds - {str, int, float, bool}
        if others:
            kind = others.pop().__name__
            raise InputError(f"{path}: its column {column} has values of the kind {kind}")
        if str in kinds and len(kinds) > 1:
            frame[column] = frame[column].map(str, na_action="ignore")
    frame["is_test"] = frame["text"].map(lambda text: held_out(text, 5))
    return frame


def hub_frame(source, classes):
    """The texts of one of SAEBench's datasets, the labels being the positions of their classes."""
    import datasets

    parts = []
    with sgo_sae.loading(source.name):
        if source == EUROPARL:  # it has no test split, and a configuration for each language
            for n, (language, subset) in enumerate(LANGUAGES.items()):
                rows = datasets.load_dataset(source.name, subset, split="train[:4000]").to_pandas()
                rows["text"] = rows[source.text].str.get(language)  # the column has dicts
                rows["label"] = n
                rows["attribute"] = 0
                rows["is_test"] = rows.index % 5 == 0
                parts.append(rows)
        else:
            for split in ("train", "test"):
                rows = datasets.load_dataset(source.name, split=split).to_pandas()
                rows = rows[rows[source.label].isin(classes)]
                columns = {
                    "text": rows[source.text],
                    "label": rows[source.label].map(classes.index),
                    "attribute": rows[source.attribute] if source.attribute else 0,
                }
                parts.append(pandas.DataFrame({**columns, "is_test": split == "test"}))
    return pandas.concat(parts)


def task_frames(files, demo, benchmark):
    """For each task, its name and a function that gives its frame.

    They are one's own files, or the demo's texts, or the benchmark's: for each name HubTexts and
    the classes.
    """
    if files:
        names = [Path(path).stem for path in files]
        if len(set(names)) < len(files):  # they are told apart by their paths
            names = files
        return {name: partial(file_frame, path) for name, path in zip(names, files)}
    if demo:
        return {"packages": demo_frame}
    return {
        name: partial(hub_frame, source, classes) for name, (source, classes) in benchmark.items()
    }


def measure_tasks(evaluation, subjects, benchmark, draw, figures_of):
    """What was Found of a family of tasks. A task that can't be had, or measured, costs itself.

    `draw` makes a Sample of a task's frame, with each seed: it is `probing_sample` or `scr_sample`.
    `figures_of` makes the figures of each autoencoder, of a Sample's TaskInputs and the mean
    latents: it is `probing_figures` or `scr_figures`. The language model reads each text once.
    """
    args = evaluation.args
    saes = [subject.sae for subject in subjects]
    parts = [[] for _ in saes]
    sizes = {}
    notes = []
    lacks = []
    for task, load in task_frames(args.probe, evaluation.demo, benchmark).items():
        try:
            frame = load()
            samples = [draw(frame, args.train, args.test, seed) for seed in args.seed]
            every = itertools.chain(*[sample.frame["text"] for sample in samples])
            with tempfile.TemporaryDirectory() as folder:
                texts = read_texts(evaluation.model, saes, list(dict.fromkeys(every)), folder, task)
                found = []
                for sample in samples:
                    rows_T = [texts.row_of[text] for text in sample.frame["text"]]
                    inputs = inputs_of(sample, texts.x_TD[rows_T], evaluation.device)
                    found.append(figures_of(inputs, saes, texts.latents(rows_T)))
        except InputError as error:
            lacks.append(f"{task} is left out: {error}")
            continue
        for sample, figures_of_saes in zip(samples, found):
            for own, figures in zip(parts, figures_of_saes):
                own.append(Part(task, sample.seed, figures))
            is_test = sample.frame["is_test"]
            sizes[task] = {"train": int((~is_test).sum()), "test": int(is_test.sum())}
            notes += [f"{task}: {note}" for note in sample.notes]
        n_empty = (texts.x_TD == 0).all(1).sum().item()
        if n_empty:
            notes.append(f"{task}: {n_empty} texts have no token that counts, and are zeros")
    if not any(parts):
        raise InputError("; ".join(lacks))
    return Found(parts, sizes, list(dict.fromkeys(notes)) + lacks, is_whole=not lacks)


class Texts(NamedTuple):
    """Texts that the language model has read, each once, for all autoencoders and samples.

    Their mean latents are in files, so that memory holds those of one autoencoder at a time.
    """

    row_of: dict  # of a text, its row
    x_TD: torch.Tensor  # mean activations
    files: list  # of each autoencoder, with mean latents (T, N) in float32

    def latents(self, rows_B):
        """Yields the mean latents (B, N) at some rows, of one autoencoder after another."""
        for file in self.files:
            f_TN = torch.from_numpy(numpy.fromfile(file, dtype=numpy.float32))
            yield f_TN.view(len(self.x_TD), -1)[rows_B]


@torch.no_grad()
def read_texts(model, saes, texts, folder, desc):
    """The Texts, none of which occurs twice. Their files go to the folder.

    A mean is over the tokens that count among a text's first TASK_LENGTH ones, to which BOS
    belongs. It is 0 where there is none.
    """
    ids = model.tokenizer(texts, add_special_tokens=False).input_ids
    ids = [model.bos_ids + i[: TASK_LENGTH - len(model.bos_ids)] for i in ids]
    ids = [i or [0] for i in ids]  # of no token: any, since the first one does not count
    # Batches come in the order of the texts' lengths, and all that is kept has that order.
    order = []
    parts = []
    files = [Path(folder, str(n)) for n in range(len(saes))]
    for rows, _, kept_BL, x_BLD in model.batches(ids, desc):
        share_BL1 = (kept_BL / kept_BL.sum(1, keepdim=True).clamp(min=1))[..., None]
        # What does not count may be infinite, and 0 times that is NaN.
        x_BLD = x_BLD.float().masked_fill(~kept_BL[..., None], 0)
        order += rows
        parts.append((x_BLD * share_BL1).sum(1).cpu())
        for sae, file in zip(saes, files):
            f_BN = (sae.encode(x_BLD) * share_BL1).sum(1)
            with file.open("ab") as stream:
                f_BN.cpu().numpy().tofile(stream)
    row_of = {texts[t]: row for row, t in enumerate(order)}
    return Texts(row_of, torch.cat(parts), files)


class Sample(NamedTuple):
    """Texts that were drawn for a task with a seed, those to train on first."""

    seed: int
    frame: pandas.DataFrame
    notes: list  # what a reader of the figures has to know


class TaskInputs(NamedTuple):
    """What is measured of a Sample: a row for each of its texts, those to train on first."""

    seed: int
    label_T: torch.Tensor
    attribute_T: torch.Tensor
    n_train: int
    x_TD: torch.Tensor  # mean activations


def inputs_of(sample, x_TD, device):
    """The TaskInputs of a Sample, given the mean activations of its texts."""
    frame = sample.frame
    return TaskInputs(
        seed=sample.seed,
        label_T=torch.tensor(frame["label"].to_numpy(), device=device),
        attribute_T=torch.tensor(frame["attribute"].to_numpy(), device=device),
        n_train=int((~frame["is_test"]).sum()),
        x_TD=x_TD.to(device),
    )


def cell_sizes(frame):
    """How many texts there are of each (is_test, label, attribute); InputError where too few."""
    n_labels = frame["label"].nunique()
    if n_labels < 2:
        raise InputError(f"two labels are needed, and it has {n_labels}")
    sizes = frame.groupby(["is_test", "label", "attribute"]).size()
    labels, attributes = sizes.index.levels[1:]
    every = pandas.MultiIndex.from_product([[False, True], labels, attributes])
    sizes = sizes.reindex(every.set_names(sizes.index.names), fill_value=0)
    if sizes.min() < FEWEST_TEXTS:
        raise InputError(lack_of(sizes, sizes.idxmin(), FEWEST_TEXTS))
    return sizes


def lack_of(sizes, cell, wanted):
    """Says that one of the `cell_sizes` is less than what is wanted."""
    is_test, label, attribute = cell
    part = "test" if is_test else "training"
    of = f"the label {label}"
    if sizes.index.get_level_values("attribute").nunique() > 1:
        of += f" with the attribute {attribute}"
    return f"{of} has {sizes[cell]} {part} texts, and {wanted} are needed"


def numbered(chosen):
    """The chosen texts, those to train on first, labels and attributes numbered in sorted order."""
    chosen = chosen.sort_values("is_test", kind="stable", ignore_index=True)
    for column in ("label", "attribute"):
        chosen[column] = pandas.factorize(chosen[column], sort=True)[0]
    return chosen


# -------------------------------------------------------------------------------------------- probe
# The numbers of the classes are those of SAEBench's dataset_info.py.
PROBING = {
    "bias_in_bios 1": (BIOS, [0, 1, 2, 6, 9]),
    "bias_in_bios 2": (BIOS, [11, 13, 14, 18, 19]),
    "bias_in_bios 3": (BIOS, [20, 21, 22, 25, 26]),
    "amazon category": (AMAZON, [1, 2, 3, 5, 6]),
    "amazon sentiment": (SENTIMENT, [1.0, 5.0]),
    "ag_news": (NEWS, [0, 1, 2, 3]),
    "europarl": (EUROPARL, [*LANGUAGES]),
}
LEFT_OUT = "github-code is left out, since `datasets` does not load it any more"
FULL_PROBE = {"epochs": 100, "batch": 250, "lr": 1e-2}  # SAEBench's, on all latents


def probing_sample(frame, train, test, seed):
    """A Sample of `train` and `test` random texts of each label, as many of each attribute.

    Where one label, with one attribute, has fewer texts than that, each has as many as it.
    """
    sizes = cell_sizes(frame)
    n_attributes = frame["attribute"].nunique()
    chosen = []
    notes = []
    for is_test, per_label in ((False, train), (True, test)):
        groups = frame[frame["is_test"] == is_test].groupby(["label", "attribute"])
        wanted = max(1, per_label // n_attributes)
        fewest = sizes.xs(is_test, level="is_test", drop_level=False).idxmin()
        if sizes[fewest] < wanted:
            lack = lack_of(sizes, fewest, wanted)
            notes.append(f"{lack}: no other gives more")
        chosen.append(groups.sample(min(wanted, sizes[fewest]), random_state=seed))
    shuffled = pandas.concat(chosen).sample(frac=1, random_state=seed)
    return Sample(seed, numbered(shuffled), notes)


class ClassSplit(NamedTuple):
    """A class that a probe is to tell from the others."""

    train: torch.Tensor  # rows of the texts to train on
    test: torch.Tensor  # rows of those to test on
    is_class_T: torch.Tensor  # whether a text is of the class


def class_and_others(label_T, label, generator):
    """Rows of the texts of a label, and of as many random others.

    The others are of all other labels. As in SAEBench, each gives as many, rounded up, and what is
    too much is left out at random.
    """
    order_T = torch.randperm(len(label_T), generator=generator).to(label_T.device)
    rows_of = {}
    for other in label_T.unique().tolist():
        rows_of[other] = order_T[label_T[order_T] == other]
    own = rows_of.pop(label)
    share = math.ceil(len(own) / len(rows_of))
    others = torch.cat([rows[:share] for rows in rows_of.values()])
    chosen = torch.randperm(len(others), generator=generator)[: len(own)]
    return torch.cat([own, others[chosen.to(others.device)]])


def class_splits(label_T, n_train, seed):
    """A ClassSplit for each class. The first `n_train` texts are to train on."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for label in label_T.unique().tolist():
        train = class_and_others(label_T[:n_train], label, generator)
        test = n_train + class_and_others(label_T[n_train:], label, generator)
        splits.append(ClassSplit(train, test, label_T == label))
    return splits


class Probe(NamedTuple):
    """A linear probe: positive where w·x + b > 0."""

    w_D: torch.Tensor
    b: torch.Tensor

    def is_positive(self, x_TD):
        return x_TD.to(self.w_D.dtype) @ self.w_D + self.b > 0


@torch.no_grad()
def linear_probe(x_TD, y_T, x_UD, y_U, generator, epochs, batch, lr, l1=0.0, patience=10):
    """SAEBench's probe on many columns, by AdamW: that of the epoch with the best test accuracy.

    It ends after `epochs`, or after `patience` of them without a better one. The gradients of the
    cross-entropy are written out: on batches so small, autograd takes longer than they do.
    """
    y_T = y_T.float()
    bound = x_TD.shape[1] ** -0.5  # within which nn.Linear draws its weights
    w_D = torch.zeros(x_TD.shape[1]).uniform_(-bound, bound, generator=generator).to(x_TD.device)
    b = torch.zeros(()).uniform_(-bound, bound, generator=generator).to(x_TD.device)
    adam = torch.optim.AdamW([w_D, b], lr=lr, fused=True)
    best = Probe(w_D.clone(), b.clone())
    best_score = -1.0
    best_epoch = 0
    for epoch in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(batch):
            x_BD = x_TD[rows]
            error_B = (torch.sigmoid(x_BD @ w_D + b) - y_T[rows]) / len(rows)
            w_D.grad = error_B @ x_BD + l1 * w_D.sign()
            b.grad = error_B.sum()
            adam.step()
        score = accuracy(x_UD, y_U, Probe(w_D, b))
        if score > best_score:
            best_score = score
            best_epoch = epoch
            best = Probe(w_D.clone(), b.clone())
        if epoch - best_epoch >= patience:
            break
    return best


def logistic_regression(x_TS, y_T, weight_T=None):
    """L2-regularised logistic regression as scikit-learn defines it, with C = 1: a Probe.

    Its w (S,) and b minimise ½‖w‖² + Σ_t weight_t log(1 + exp(-s_t (w·x_t + b))), in float64, where
    s_t is 1 or -1.
    """
    x_TS = x_TS.double()
    y_T = y_T.double()
    w_S = torch.zeros(x_TS.shape[1], dtype=torch.float64, device=x_TS.device).requires_grad_()
    b = torch.zeros((), dtype=torch.float64, device=x_TS.device).requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [w_S, b],
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=0,  # the gradient alone says when to stop
        line_search_fn="strong_wolfe",
    )

    def objective():
        lbfgs.zero_grad()
        logits_T = x_TS @ w_S + b
        loss = F.binary_cross_entropy_with_logits(logits_T, y_T, weight_T, reduction="sum")
        loss = loss + w_S.square().sum() / 2
        loss.backward()
        return loss

    lbfgs.step(objective)  # within it, gradients are enabled
    return Probe(w_S.detach(), b.detach())


@torch.no_grad()
def accuracy(x_TD, y_T, probe):
    """The share of texts whose label the probe tells."""
    return (probe.is_positive(x_TD) == y_T.bool()).float().mean().item()


def mean_difference(x_TN, y_T):
    """SAEBench's score of latents (N,): how far apart their means are where y is true and false."""
    return (x_TN[y_T].mean(0) - x_TN[~y_T].mean(0)).abs()


def standardised_difference(x_TN, y_T):
    """The same in standard deviations of the latent within the two classes. Ours.

    A penalty that shrinks large latents changes which of them `mean_difference` takes, and not
    which this takes.
    """
    variance_N = (x_TN[y_T].var(0) + x_TN[~y_T].var(0)) / 2
    difference_N = mean_difference(x_TN, y_T)
    return torch.where(difference_N > 0, difference_N / variance_N.sqrt(), 0)


def sparse_probing(x_TN, splits, score):
    """Test accuracy of probes on the few latents of the highest score, mean over the classes.

    The keys of the dict are the numbers of latents, no more than there are.
    """
    found = []
    for train, test, is_class_T in splits:
        y_T = is_class_T[train]
        y_U = is_class_T[test]
        order_N = score(x_TN[train], y_T).argsort(descending=True)
        scores = {}
        for k in PROBE_SIZES:
            if k > len(order_N):
                break
            top_S = order_N[:k]
            probe = logistic_regression(x_TN[train[:, None], top_S], y_T)
            scores[k] = accuracy(x_TN[test[:, None], top_S], y_U, probe)
        found.append(scores)
    return pandas.DataFrame(found).mean().to_dict()


def full_probing(x_TN, splits, seed):
    """Test accuracy of a probe on all latents, mean over the classes.

    SAEBench takes the epoch that does best on the test texts, and so do we.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for train, test, is_class_T in splits:
        data = (x_TN[train], is_class_T[train], x_TN[test], is_class_T[test])
        probe = linear_probe(*data, generator, **FULL_PROBE)
        found.append(accuracy(x_TN[test], is_class_T[test], probe))
    return numpy.mean(found).item()


def probing_figures(inputs, saes, latents):
    """Figures of probing with a Sample's TaskInputs: a dict for each autoencoder.

    `latents` yields the mean latents (T, N) of one after another.
    """
    splits = class_splits(inputs.label_T, inputs.n_train, inputs.seed)
    of_x = {}
    for k, score in sparse_probing(inputs.x_TD, splits, mean_difference).items():
        of_x[f"x_{k}"] = score
    of_x["x_all"] = full_probing(inputs.x_TD, splits, inputs.seed)
    found = []
    # Each is read from its file as it is asked for.
    for _, f_TN in zip(sgo_sae.each(saes, "probes"), latents):
        f_TN = f_TN.to(inputs.x_TD.device)
        figures = {}
        for k, score in sparse_probing(f_TN, splits, mean_difference).items():
            figures[f"latents_{k}"] = score
        for k, score in sparse_probing(f_TN, splits, standardised_difference).items():
            figures[f"standardised_{k}"] = score
        figures["latents_all"] = full_probing(f_TN, splits, inputs.seed)
        found.append({**figures, **of_x})
    return found


def measure_probe(evaluation, subjects):
    """What was Found of sparse probing on the tasks of SAEBench, or on one's own."""
    if evaluation.args.probe or evaluation.demo:

        def draw(frame, train, test, seed):  # of one's own texts, attributes are for SCR alone
            return probing_sample(frame.assign(attribute=0), train, test, seed)

        return measure_tasks(evaluation, subjects, {}, draw, probing_figures)
    found = measure_tasks(evaluation, subjects, PROBING, probing_sample, probing_figures)
    return found._replace(notes=[LEFT_OUT, *found.notes])


# ---------------------------------------------------------------------------------------------- scr
# The order of the two classes is SAEBench's. The first of them goes with the first attribute in
# the biased set, the second with the second.
SPURIOUS = {
    "professor, nurse": (BIOS, [21, 13]),
    "architect, journalist": (BIOS, [1, 11]),
    "surgeon, psychologist": (BIOS, [25, 22]),
    "attorney, teacher": (BIOS, [2, 26]),
    "books, CDs": (AMAZON, [24, 26]),
    "software, electronics": (AMAZON, [30, 6]),
    "pets, office": (AMAZON, [18, 11]),
    "industrial, toys": (AMAZON, [3, 1]),
}
SCR_PROBE = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "l1": 1e-3}  # SAEBench's
SCR_GAP = 0.001  # SAEBench gives 0 where the biased probe is not worse than the clean one by that


def scr_sample(frame, train, test, seed):
    """A Sample of the first texts of each combination of the first two labels and attributes.

    `train` and `test` are the numbers of texts where label and attribute are both the first, or
    both the second. The biased set takes all of these. Of the two other combinations, half as many
    are taken. As in SAEBench, the texts are the same whatever the seed, which is for the probes.
    """
    if "attribute" not in frame:
        raise InputError("it has no column `attribute`, which SCR needs")
    notes = []
    n_without = frame["attribute"].isna().sum()
    if n_without:
        notes.append(f"{n_without} texts have no attribute, and are left out")
    frame = frame[frame["attribute"].notna()]
    if frame.empty:
        raise InputError("none of its texts has an attribute, which SCR needs")
    for column in ("label", "attribute"):
        values = sorted(frame[column].unique())
        if len(values) < 2:
            raise InputError(f"two values of `{column}` are needed, and it has {values}")
        if len(values) > 2:
            first = f"{values[0]} and {values[1]}"
            notes.append(f"{first} alone are used of {len(values)} values of `{column}`")
        frame = frame[frame[column].isin(values[:2])]
    sizes = cell_sizes(frame)
    is_second_label = frame["label"] == frame["label"].max()
    is_second_attribute = frame["attribute"] == frame["attribute"].max()
    is_same = is_second_label == is_second_attribute
    most = numpy.where(frame["is_test"], test, train)
    frame = frame.assign(wanted=numpy.where(is_same, most, most // 2))
    cells = frame.groupby(["is_test", "label", "attribute"])
    for cell, wanted in cells["wanted"].first().items():
        if sizes[cell] < wanted:
            notes.append(lack_of(sizes, cell, wanted))
    return Sample(seed, numbered(frame[cells.cumcount() < frame["wanted"]]), notes)


class ScrSets(NamedTuple):
    """Rows of SCR's sets of texts."""

    clean_train: torch.Tensor
    clean_test: torch.Tensor
    biased_train: torch.Tensor
    biased_test: torch.Tensor


class ScrProbes(NamedTuple):
    """SCR's probes: of the label and of the attribute on the clean sets, and the biased one."""

    label: Probe
    attribute: Probe
    biased: Probe


def scr_sets(label_T, attribute_T, n_train):
    """The ScrSets of texts by their labels and attributes, both 0 or 1.

    In the clean sets each combination of the two is a quarter. In the biased ones both are the
    same. A set has as many texts as its smallest combination allows.
    """
    cell_T = label_T * 2 + attribute_T
    is_train_T = torch.arange(len(cell_T), device=cell_T.device) < n_train

    def balanced(is_part_T, cells):
        rows = [(is_part_T & (cell_T == cell)).nonzero()[:, 0] for cell in cells]
        size = min(map(len, rows))
        return torch.cat([own[:size] for own in rows])

    every = (0, 1, 2, 3)
    same = (0, 3)  # label and attribute are both 0, or both 1
    return ScrSets(
        clean_train=balanced(is_train_T, every),
        clean_test=balanced(~is_train_T, every),
        biased_train=balanced(is_train_T, same),
        biased_test=balanced(~is_train_T, same),
    )


def scr_probes(x_TD, label_T, attribute_T, sets, seed=0):
    """The ScrProbes on mean activations."""
    generator = torch.Generator().manual_seed(seed)

    def probe(y_T, train, test):
        data = (x_TD[train], y_T[train], x_TD[test], y_T[test])
        return linear_probe(*data, generator, **SCR_PROBE)

    return ScrProbes(
        label=probe(label_T, sets.clean_train, sets.clean_test),
        attribute=probe(attribute_T, sets.clean_train, sets.clean_test),
        biased=probe(label_T, sets.biased_train, sets.biased_test),
    )


@torch.no_grad()
def scr(probes, x_TD, f_TN, label_T, attribute_T, sets, W_dec_ND):
    """Spurious correlation removal: a dict of scores, 1 where ablation mends the biased probe.

    x are mean activations and f mean latents of texts. SAEBench has two directions: latents of the
    attribute are ablated so that the biased probe tells the label, or latents of the label so that
    it tells the attribute. The scores are those of the direction in which the biased probe is less
    accurate before. Where it is as accurate in both, SAEBench has no score, and we take the first.
    Unlike SAEBench's, means leave out padding and BOS in what is taken away, too.
    """
    x_UD = x_TD[sets.clean_test]
    of_label = accuracy(x_UD, label_T[sets.clean_test], probes.biased)
    of_attribute = accuracy(x_UD, attribute_T[sets.clean_test], probes.biased)
    if of_label <= of_attribute:
        before = of_label
        y_U = label_T[sets.clean_test]
        clean = accuracy(x_UD, y_U, probes.label)
        unwanted_T = attribute_T
        unwanted_probe = probes.attribute
    else:
        before = of_attribute
        y_U = attribute_T[sets.clean_test]
        clean = accuracy(x_UD, y_U, probes.attribute)
        unwanted_T = label_T
        unwanted_probe = probes.label
    # The effect of a latent on the probe of what is unwanted.
    f_of_train = f_TN[sets.clean_train]
    is_unwanted = unwanted_T[sets.clean_train].bool()
    difference_N = f_of_train[is_unwanted].mean(0) - f_of_train[~is_unwanted].mean(0)
    effect_N = (difference_N * (W_dec_ND @ unwanted_probe.w_D)).abs()
    n_effective = int((effect_N > 0).sum())
    order_N = effect_N.argsort(descending=True)[:n_effective]
    scores = {}
    for n in SCR_SIZES:
        if n > len(W_dec_ND):
            break
        # To set latents to 0 and add the error of the reconstruction back gives
        # decode(f without S) + x - decode(f) = x - f_S W_dec_S. It is linear, so that means do.
        top_S = order_N[:n]
        f_US = f_TN[sets.clean_test[:, None], top_S]
        ablated_UD = x_UD - f_US @ W_dec_ND[top_S]
        gain = accuracy(ablated_UD, y_U, probes.biased) - before
        gap = clean - before
        scores[f"scr_{n}"] = gain / gap if gap >= SCR_GAP else 0.0
    return scores


def scr_figures(inputs, saes, latents):
    """Figures of SCR with a Sample's TaskInputs: a dict for each autoencoder.

    `latents` yields the mean latents (T, N) of one after another.
    """
    x_TD, label_T, attribute_T = inputs.x_TD, inputs.label_T, inputs.attribute_T
    sets = scr_sets(label_T, attribute_T, inputs.n_train)
    probes = scr_probes(x_TD, label_T, attribute_T, sets, inputs.seed)
    found = []
    for sae, f_TN in zip(saes, latents):
        f_TN = f_TN.to(x_TD.device)
        found.append(scr(probes, x_TD, f_TN, label_T, attribute_T, sets, sae.W_dec))
    return found


def measure_scr(evaluation, subjects):
    """What was Found of SCR on the tasks of SAEBench, or on one's own."""
    return measure_tasks(evaluation, subjects, SPURIOUS, scr_sample, scr_figures)


# --------------------------------------------------------------------------------------- absorption
# The definitions are those of Chanin et al. (2024), the numbers SAEBench's.
LETTERS = len(string.ascii_uppercase)
EXAMPLES = 10  # lines of a prompt that show what is asked
WORDS_TO_TRAIN = 0.8  # share of the words
FEWEST_WORDS = 100  # of which a fifth is to test on; ours
FEWEST_LETTERS = 20  # that the model must spell
SPELLED = 0.6  # F1 of the residual stream's probe, over which the model spells a letter
CANDIDATES = 10  # latents of which a letter's split is chosen
SPLIT_GAIN = 0.03  # by which one more latent of a split must lift F1
FRACTION_COSINE = 0.1  # with the letter's direction, from which a latent can absorb a part
FULL_COSINE = 0.025  # the same, to absorb all
CARRIED = 0.4  # share of the letter's projection that absorbers must carry
ABSORBERS = 3  # latents that can absorb together
SILENT = 1e-8  # up to which a latent counts as not active
# Training of the probes of all letters
LETTER_EPOCHS = 50
LETTER_LR = 0.01
LETTER_LR_END = 1e-5
RESIDUAL_PROBE = {"batch": 64, "l2": 1e-4}
LATENT_PROBE = {"batch": 4096, "l2": 1e-6, "l1": 0.01}


def alphabetic_words(tokenizer):
    """Token ids and letters, 0 to 25, of the tokens that are words, maybe after a space."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = []
    for i, (text, token) in enumerate(zip(texts, tokens)):
        is_byte = re.fullmatch("<0x..>", str(token))  # a letter as a byte, which no text has
        if re.fullmatch(" ?[A-Za-z]+", text) and not is_byte:
            words.append((i, string.ascii_uppercase.index(text.strip()[0].upper())))
    return words


def ids_after(tokenizer, anchor, text):
    """The token ids of a text that follows another."""
    before = tokenizer(anchor, add_special_tokens=False).input_ids
    both = tokenizer(anchor + text, add_special_tokens=False).input_ids
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def spelled_activations(model, words, vocabulary, rng, desc):
    """Activations (T, D) at words whose first letter a prompt asks for after ten random examples.

    A prompt is ten lines such as "\\n house has the first letter: H", and "\\n tree": it ends with
    the word, since what follows changes nothing there in a causal model. SAEBench's goes on to the
    colon, and reads the sixth token from its end. A prompt is put together from token ids, so that
    a word is one token. The examples are of all words, where SAEBench's are of the words' own
    part, to train on or to test on.
    """
    newline = ids_after(model.tokenizer, "a", "\n")
    question = ids_after(model.tokenizer, "a", " has the first letter:")
    answers = [ids_after(model.tokenizer, ":", f" {letter}") for letter in string.ascii_uppercase]
    prompts = []
    for word, _ in words:
        # One more is drawn, so that enough are left where the word itself is among them.
        others = [other for other in rng.sample(vocabulary, EXAMPLES + 1) if other[0] != word]
        prompt = list(model.bos_ids)
        for example, letter in others[:EXAMPLES]:
            prompt += newline + [example] + question + answers[letter]
        prompts.append(prompt + newline + [word])
    x_TD = torch.empty(len(prompts), model.width, device=model.lm.device)
    for rows, ids_BL, _, x_BLD in model.batches(prompts, desc):
        last_B = (ids_BL >= 0).sum(1) - 1
        x_TD[rows] = x_BLD[torch.arange(len(rows)), last_B].float()
    return x_TD


class Words(NamedTuple):
    """Words, and the probe of their first letters, 0 to 25.

    A prompt asks for a word's first letter, and x is the activation at the word. The first
    `n_train` words are to train on. The new x are those of the other words that the probe
    recognises, on new prompts. They are scored.
    """

    x_TD: torch.Tensor
    letter_T: torch.Tensor
    n_train: int
    new_x_PD: torch.Tensor
    new_letter_P: torch.Tensor
    probe_AD: torch.Tensor  # the probe's weights


def words_of(model, n_words, seed):
    """A random sample of the tokenizer's Words, `n_words` of them, or all where that is None."""
    rng = random.Random(seed)
    vocabulary = alphabetic_words(model.tokenizer)
    rng.shuffle(vocabulary)
    words = vocabulary[:n_words]
    if len(words) < FEWEST_WORDS:
        raise InputError(f"{FEWEST_WORDS} words are needed, the tokenizer has {len(words)}")
    n_train = int(WORDS_TO_TRAIN * len(words))
    x_TD = spelled_activations(model, words, vocabulary, rng, "words")
    letter_T = torch.tensor([letter for _, letter in words], device=x_TD.device)
    letter_U = letter_T[n_train:]
    weight_AD, b_A = letter_probe(x_TD[:n_train], letter_T[:n_train], **RESIDUAL_PROBE, seed=seed)
    positive_UA = x_TD[n_train:] @ weight_AD.T + b_A > 0
    spelled_A = spelled_letters(positive_UA, letter_U)
    if spelled_A.sum() < FEWEST_LETTERS:
        raise InputError(
            f"the model spells {spelled_A.sum()} of 26 letters with {len(words):,} of its "
            f"{len(vocabulary):,} words, and {FEWEST_LETTERS} are needed"
            + ("; more --words spell more" if len(words) < len(vocabulary) else "")
        )
    own_U = positive_UA[torch.arange(len(letter_U)), letter_U]
    recognised_U = own_U & spelled_A[letter_U]
    # They are scored on new prompts, as in SAEBench.
    again = [word for word, kept in zip(words[n_train:], recognised_U.tolist()) if kept]
    new_x_PD = spelled_activations(model, again, vocabulary, rng, "new prompts")
    return Words(x_TD, letter_T, n_train, new_x_PD, letter_U[recognised_U], weight_AD)


@torch.no_grad()
def absorbed_share(f_PN, x_PD, W_dec_ND, direction_D, split_S):
    """The absorption fraction of each word (P,), and whether it is fully absorbed (P,).

    Given are the letter's probe direction and the latents of its split. As in SAEBench, what a
    latent carries is its activation times a cosine, which takes decoder rows of unit length.
    """
    direction_D = F.normalize(direction_D, dim=0)
    cosine_N = F.normalize(W_dec_ND, dim=1) @ direction_D
    projection_PN = f_PN * cosine_N
    target_P = x_PD @ direction_D
    split_P = projection_PN[:, split_S].sum(1)

    # The fraction: what the best absorbers carry of what the split leaves.
    others_PN = projection_PN.clamp(min=0)
    others_PN[:, cosine_N < FRACTION_COSINE] = 0
    others_PN[:, split_S] = 0
    n_absorbers = min(ABSORBERS, others_PN.shape[1])
    absorbers_P = others_PN.topk(n_absorbers, dim=1).values.sum(1)
    absorbed_P = torch.minimum(absorbers_P, target_P - split_P)
    share_P = (absorbed_P / (absorbed_P + split_P)).clamp(0, 1)
    # The formula holds between two ends. Each of the lines overrules those before it.
    share_P[split_P <= 0] = 1  # the split carries nothing, and all is absorbed
    share_P[split_P >= target_P] = 0  # it carries everything
    share_P[absorbers_P < CARRIED * target_P] = 0  # the absorbers carry too little to count
    share_P[target_P <= 0] = 0  # the word does not have the direction at all

    # Full absorption: no latent of the split is active, and another one carries enough alone.
    top_P = projection_PN.argmax(1)
    carried_P = projection_PN.gather(1, top_P[:, None])[:, 0]
    full_P = (f_PN[:, split_S] < SILENT).all(1)
    full_P &= cosine_N[top_P] >= FULL_COSINE
    full_P &= carried_P >= CARRIED * target_P
    full_P &= target_P >= 0
    return share_P, full_P


def f1(predicted_T, true_T):
    """The F1 score, 2 · hits / (predicted + true); 0 where both are none."""
    hits = (predicted_T & true_T).sum()
    return 2 * hits / (predicted_T.sum() + true_T.sum()).clamp(min=1)


def spelled_letters(positive_UA, letter_U):
    """Which letters (A,) the model spells, given which words the probe finds positive (U, A)."""
    scores = [f1(positive_UA[:, a], letter_U == a) for a in range(LETTERS)]
    return torch.stack(scores) > SPELLED


def letter_split(f_TS, y_T, n_train):
    """How many of the candidates S, best first, a letter is split into.

    A candidate belongs to the split where it lifts the test F1 of a probe on it and those before
    it. y says which words have the letter; the first `n_train` are to train on.
    """
    train_T = y_T[:n_train]
    n_positive = train_T.sum()
    # Both classes weigh the same, as class_weight="balanced" of scikit-learn has it.
    weight_T = n_train / 2 / torch.where(train_T, n_positive, n_train - n_positive)
    best = 0.0
    for k in range(1, f_TS.shape[1] + 1):
        probe = logistic_regression(f_TS[:n_train, :k], train_T, weight_T)
        score = f1(probe.is_positive(f_TS[n_train:, :k]), y_T[n_train:])
        if k > 1 and score <= best + SPLIT_GAIN:
            return k - 1
        best = score
    return f_TS.shape[1]


@torch.no_grad()
def letter_probe(x_TD, letter_T, batch, l2, l1=0.0, encode=None, seed=0):
    """SAEBench's probe of all 26 letters at once: its weights (A, D or N) and biases (A,).

    Positive words are weighted by their rarity. With `encode` it is on latents, which are computed
    batch by batch: those of 137,000 words would take 18 GB at N 32,768. The gradients are written
    out, as in linear_probe.
    """
    generator = torch.Generator().manual_seed(seed)
    encode = encode or nn.Identity()
    width = encode(x_TD[:1]).shape[1]
    probe = nn.Linear(width, LETTERS).to(x_TD.device)
    for parameter in probe.parameters():
        drawn = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
        parameter.copy_(drawn * width**-0.5)  # as nn.Linear draws them
    y_TA = F.one_hot(letter_T, LETTERS).float()
    count_A = y_TA.sum(0)
    rarity_A = (len(letter_T) - count_A) / count_A.clamp(min=1)
    weight_TA = torch.where(y_TA > 0, rarity_A, 1)
    adam = torch.optim.Adam(probe.parameters(), lr=LETTER_LR, weight_decay=l2, fused=True)
    decay = (LETTER_LR_END / LETTER_LR) ** (1 / LETTER_EPOCHS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, decay)
    for _ in sgo_sae.each(range(LETTER_EPOCHS), "letters"):
        for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(batch):
            f_BN = encode(x_TD[rows])
            y_BA = y_TA[rows]
            # The loss is the weighted cross-entropy, mean over words and letters, and the mean
            # over letters of l1 ‖w‖₁.
            error_BA = weight_TA[rows] * (torch.sigmoid(probe(f_BN)) - y_BA)
            error_BA /= y_BA.numel()
            probe.weight.grad = error_BA.T @ f_BN
            if l1:
                probe.weight.grad += l1 / LETTERS * probe.weight.sign()
            probe.bias.grad = error_BA.sum(0)
            adam.step()
        schedule.step()
    return probe.weight.detach(), probe.bias.detach()


@torch.no_grad()
def absorption(sae, words, seed=0):
    """Absorption and full absorption, mean over letters: a dict of figures.

    Letters that no scored word has do not count.
    """
    n_train = words.n_train
    train = (words.x_TD[:n_train], words.letter_T[:n_train])
    weight_AN, _ = letter_probe(*train, **LATENT_PROBE, encode=sae.encode, seed=seed)
    # SAEBench takes the largest weights, not the largest absolute ones: latents that say yes.
    candidates_AS = weight_AN.topk(min(CANDIDATES, weight_AN.shape[1]), dim=1).indices
    parts = [sae.encode(x_BD)[:, candidates_AS] for x_BD in words.x_TD.split(4096)]
    f_TAS = torch.cat(parts)
    found = []
    for a in words.new_letter_P.unique().tolist():
        n_split = letter_split(f_TAS[:, a], words.letter_T == a, n_train)
        split_S = candidates_AS[a, :n_split]
        x_PD = words.new_x_PD[words.new_letter_P == a]
        f_PN = sae.encode(x_PD)
        share_P, full_P = absorbed_share(f_PN, x_PD, sae.W_dec, words.probe_AD[a], split_S)
        share = share_P.mean().item()
        full = full_P.float().mean().item()
        found.append({"absorption": share, "full": full, "split_latents": n_split})
    return {**pandas.DataFrame(found).mean(), "letters": len(found)}


def is_causal(model):
    """Whether a token changes nothing before it."""
    first_1L = torch.arange(8, device=model.lm.device)[None] % model.n_ids
    second_1L = first_1L.clone()
    second_1L[0, -1] = (first_1L[0, -1] + 1) % model.n_ids
    x_1LD = model.read(first_1L)[:, :-1]
    other_1LD = model.read(second_1L)[:, :-1]
    return torch.allclose(x_1LD, other_1LD, rtol=1e-3, atol=1e-3)


def measure_absorption(evaluation, subjects):
    """What was Found of the absorption of first letters, with words drawn with each seed."""
    args = evaluation.args
    model = evaluation.model
    if not is_causal(model):
        raise InputError("the model is not causal, and the prompts of absorption end too early")
    parts = [[] for _ in subjects]
    sizes = {}
    lacks = []
    for seed in args.seed:
        try:
            words = words_of(model, args.words, seed)
        except InputError as error:
            lacks.append(f"words are left out, seed {seed}: {error}")
            continue
        sizes = {"words": len(words.x_TD)}
        for subject, own in zip(sgo_sae.each(subjects, "absorption"), parts):
            own.append(Part("words", seed, absorption(subject.sae, words, seed)))
    if not any(parts):
        raise InputError("; ".join(lacks))
    return Found(parts, sizes, lacks, is_whole=not lacks)


# ------------------------------------------------------------------------------------- autoencoders
# TransformerLens's settings by which the residual stream is no longer the model's own.
CHANGES_ACTIVATIONS = ("center_writing_weights", "refactor_factored_attn_matrices")

# A RUN of ours that is opened by `open_sae` can be given to SAEBench's own run_eval, as
# study/README.md shows. It asks an autoencoder for these, wherever it has moved it, and for `cfg`.
sgo_sae.SAE.device = property(lambda sae: sae.W_dec.device)
sgo_sae.SAE.dtype = property(lambda sae: sae.W_dec.dtype)


class SAEConfig(types.SimpleNamespace):
    """What SAEBench asks of `sae.cfg`: model_name, hook_name, hook_layer, context_size, ..."""

    def to_dict(self):
        return json.loads(json.dumps(vars(self), default=vars))


def open_gemma_scope(file):
    """The autoencoder of a params.npz, and what its path says of it."""
    # Gemma Scope has autoencoders of other activations, too, whose files look the same. The name
    # of its folder ends with the kind. Folders above it may be called anything.
    kinds = re.findall(r"-(res|mlp|att|transcoders)(?=[-/])", file.parent.as_posix() + "/")
    if kinds and kinds[-1] != "res":
        raise InputError(
            f"{file} is of Gemma Scope's {kinds[-1]}; only its -res is of a layer's output"
        )
    with sgo_sae.loading(str(file)):
        arrays = numpy.load(file)
        weights = {name: torch.from_numpy(arrays[name]).float() for name in arrays}
        N, D = weights["W_dec"].shape
        sae = sgo_sae.ThresholdSAE(D, N, N)
        weights["theta"] = weights.pop("threshold")
        # Gemma Scope does not subtract b_dec from x, and our encode() does.
        weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]
        sgo_sae.set_weights(sae, weights, file)
    layers = [re.fullmatch(r"layer_(\d+)", part) for part in file.parts]
    numbers = [layer[1] for layer in layers if layer]
    return sae, {"hook_name": f"blocks.{numbers[-1]}.hook_resid_post" if numbers else None}


def open_sae(path, device="cpu"):
    """An autoencoder as SAEBench measures it, with the settings `cfg` that SAEBench asks for.

    The path is a folder of SAELens's format or a params.npz of Gemma Scope, on disk or
    OWNER/NAME/PATH. Where latents have thresholds, decoder rows are scaled to unit length, as
    SAEBench does; of a top-k autoencoder that could change which latents are active.
    """
    place = Path(path)
    if not place.exists():
        from huggingface_hub import snapshot_download

        if len(place.parts) < 3 or Path(place.parts[0]).exists():
            raise InputError(f"{path}: there is no such file or folder")
        owner, name, inside = str(path).split("/", 2)
        inside = inside.strip("/")
        with sgo_sae.loading(f"{path}, which is no folder here and would be on the Hub,"):
            folder = snapshot_download(f"{owner}/{name}", allow_patterns=[inside, f"{inside}/*"])
        place = Path(folder, inside)
    if (place / "params.npz").exists():
        place = place / "params.npz"
    if place.suffix == ".npz":
        sae, cfg = open_gemma_scope(place)
    elif (place / "cfg.json").exists():
        sae = sgo_sae.load_sae(place)
        cfg = json.loads((place / "cfg.json").read_text(encoding="utf-8"))
    elif (place / "metrics.jsonl").exists() or (place / "checkpoint.pt").exists():
        raise InputError(f"{path}: its run is under way, or was stopped (--resume continues it)")
    else:
        raise InputError(f"{path} holds no autoencoder: there is no cfg.json")
    with sgo_sae.loading(str(path)):
        # SAELens 6 has what is not about the architecture in `metadata`.
        metadata = cfg.pop("metadata", None) or {}
        known = {"model_from_pretrained_kwargs": {}, **metadata, **cfg}  # SAEBench reads that key
        for name, value in (known["model_from_pretrained_kwargs"] or {}).items():
            if name in CHANGES_ACTIVATIONS and value:
                changed = "activations that TransformerLens changed"
                raise InputError(f"{path} is for {changed}, by {name}")
        sae.cfg = SAEConfig(**known)
    if isinstance(sae, sgo_sae.ThresholdSAE):
        sgo_sae.fold_decoder_norms(sae)
    return sae.to(device)


# Settings of training that name no column of the table. Runs that differ in them are the same
# setting: they are trained on other devices or in other passes, or with another seed.
NOT_NAMED = ("seed", "data_seed", "lm_batch", "out", "log_every", "save_every", "resume", "device")


class Subject:
    """An autoencoder that is measured, what is known of it, and the Records of this call."""

    def __init__(self, path, device):
        self.path = path
        self.sae = open_sae(path, device)
        self.width = len(self.sae.b_dec)
        self.name = None  # of its column, which hangs on the others: see name_subjects
        self.records = {}  # of each family its Record, whose parts are dicts as in eval.json
        self.layer = None  # whose output it is for, where it says that
        self.unfit = None  # why it can't be measured, where that is so
        self.cfg = vars(self.sae.cfg)  # all that its files say of it
        with sgo_sae.loading(f"{path}: its cfg.json"):
            self.training = {**(self.cfg.get("settings") or {})}  # ours: those of its training
            if self.training:  # those that came later are as they were before
                self.training = {**sgo_sae.LATER, **self.training}
            named = [name for name in self.training if name not in NOT_NAMED]
            self.settings = {name: self.training[name] for name in named}  # of its column
            self.seed = int(self.training.get("seed", 0))
            self.ctx = int(self.cfg.get("context_size") or 0) or None
            try:
                self.layer = layer_of(self.cfg)
            except InputError as error:
                self.unfit = str(error)

    def text(self):
        """The dataset that it was trained on, its subset and its column, or None."""
        dataset = self.training.get("dataset", self.cfg.get("dataset_path"))
        column = self.training.get("text_column", "text")
        return (dataset, self.training.get("subset"), column) if dataset else None

    def is_trained_on(self, config):
        """Whether the text of a Config is, or is among, what it was trained on."""
        text = self.text()
        if text is None:
            return False
        dataset, subset, _ = text
        if not sgo_sae.is_here(dataset):
            split = self.training.get("split", "train")
            return (dataset, subset, split) == (config.dataset, config.subset, config.split)
        with suppress(InputError):  # of files that are there no more
            trained_on = {Path(file).resolve() for file in sgo_sae.local_files(dataset)}
            return any(Path(f).resolve() in trained_on for f in sgo_sae.local_files(config.dataset))
        return False


def layer_of(cfg):
    """The number of the layer whose output an autoencoder is for, or None where it does not say."""
    if cfg.get("hook_head_index") is not None:
        raise InputError("it is for one attention head, and a layer's output is measured")
    hook = cfg.get("hook_name") or cfg.get("hook_point")  # SAELens before version 4
    if not hook:
        return None
    for pattern in (
        r"blocks\.(\d+)\.hook_resid_post",  # as TransformerLens names it
        r"(?:\w+\.)*(?:layers|h)\.(\d+)",  # as Hugging Face's modules are named
    ):
        known = re.fullmatch(pattern, hook)
        if known:
            return int(known[1])
    raise InputError(f"it is for {hook}, and only a layer's output is measured")


# -------------------------------------------------------------------------------------------- table
CONFIDENCE = 0.95  # of intervals
SIGNS = {"↑": 1, "↓": -1, "–": 0}  # of a change for the better


def name_subjects(subjects):
    """Gives each its `name`, that of its column: the settings in which it differs from the others.

    Runs that differ in their seeds alone have the same name. Those that don't say how they were
    trained are named after their folder.
    """
    trained = [subject for subject in subjects if subject.settings]
    values = pandas.DataFrame([subject.settings for subject in trained]).map(repr)
    differing = [key for key in values if values[key].nunique() > 1]
    if not differing:  # of one setting, what matters most
        differing = [key for key in ("arch", "d_sae", "k", "alpha") if key in values]
    for subject in subjects:
        words = [f"{key} {subject.settings[key]}" for key in differing if key in subject.settings]
        folder = Path(subject.path.removesuffix("/params.npz"))
        subject.name = ", ".join(words) or folder.resolve().name
    # The same setting and seed again, in another folder.
    first = set()
    for subject in subjects:
        column = (subject.name, subject.seed)
        if column in first:
            subject.name = subject.path
        first.add(column)


def baseline_of(subjects):
    """The setting that others are compared with: the first unpenalised topk, else the first."""
    for subject in subjects:
        if subject.settings.get("arch") == "topk" and subject.settings.get("alpha") == 0:
            return subject.name
    return subjects[0].name


def measured(subjects, families):
    """A frame of all figures: family, figure, setting, seed, sample (the seed of the evaluation)
    and value, the mean over the tasks that all runs have. A figure is NaN where a task has none."""
    rows = []
    for family in families:
        common = common_tasks(subjects, family)
        for subject in subjects:
            for part in subject.records[family].parts:
                if part["task"] not in common:
                    continue
                for name, value in part["figures"].items():
                    rows.append((family, name, subject.name, subject.seed, part["seed"], value))
    keys = ["family", "figure", "setting", "seed", "sample"]
    frame = pandas.DataFrame(rows, columns=[*keys, "value"]).astype({"value": float})
    return frame.groupby(keys, as_index=False, sort=False)["value"].agg(whole_mean)


def common_tasks(subjects, family):
    """The tasks that all runs have that have any."""
    tasks = []
    for subject in subjects:
        own = {part["task"] for part in subject.records[family].parts}
        if own:
            tasks.append(own)
    return set.intersection(*tasks) if tasks else set()


def whole_mean(values):
    """The mean, NaN where one of the values is."""
    return values.mean(skipna=False)


def title_of(figure, name):
    """The beginning of a figure's line."""
    better = "" if figure.better == "–" else f" {figure.better}"
    return f"{figure.family}: {name.replace('_', ' ')}{better}"


def names_of(figure, names):
    """The figure's own name, or those of its sizes, smallest first, among names."""
    sized = [name for name in names if re.fullmatch(rf"{figure.name}_\d+", name)]
    own = [name for name in names if name == figure.name]
    return own or sorted(sized, key=lambda name: int(name.rsplit("_", 1)[1]))


def table(subjects, families, baseline=None):
    """Markdown: a line for each figure and a column for each setting, then a legend, then notes.

    A cell is the mean over the runs of a setting, which differ in their seeds, ± their deviation.
    With a baseline, the other columns are differences to it, and the last one is half the interval
    of such a difference.
    """
    frame = measured(subjects, families)
    seeds = Counter(subject.name for subject in subjects)
    settings = list(seeds)
    notes = []
    if baseline is not None:
        settings.sort(key=lambda name: name != baseline)
        notes += notes_on_intervals(frame, seeds, baseline)
    for family in families:
        tasks = {part["task"] for subject in subjects for part in subject.records[family].parts}
        missing = ", ".join(sorted(tasks - common_tasks(subjects, family)))
        if missing:
            notes.append(f"{family}: left out of the means is what not all runs have: {missing}")
    head = [f"{name}, {seeds[name]} seeds" if seeds[name] > 1 else name for name in settings]
    lines = [["", *head, *(["±"] if baseline is not None else [])]]
    legend = []
    for figure in FIGURES:
        own = frame[frame["family"] == figure.family]
        names = names_of(figure, own["figure"].unique())
        for name in names:
            rows = own[own["figure"] == name]
            if baseline is not None:
                cells, note = paired_cells(rows, settings, SIGNS[figure.better])
                notes += [f"{figure.family}: {note}"] if note else []
            else:
                cells = mean_cells(rows, settings, seeds)
            lines.append([title_of(figure, name), *cells])
        if names:
            legend.append(legend_line(figure, names))
    notes += notes_of(subjects, families)
    parts = [markdown(lines), "\n".join(legend), *dict.fromkeys(notes)]
    return "\n\n".join(part for part in parts if part)


def legend_line(figure, names):
    """What a figure means; one of several sizes is named once."""
    first, *others = [name.replace("_", " ") for name in names]
    sizes = [name.split()[-1] for name in others]
    title = title_of(figure, ", ".join([first, *sizes]))
    return f"- {title}: {figure.meaning}"


def notes_of(subjects, families):
    """The notes of all records, with the names of their runs where not all have them."""
    notes = []
    for family in families:
        runs_of = {}
        for subject in subjects:
            for note in subject.records[family].notes:
                runs_of.setdefault(note, []).append(subject.path)
        for note, paths in runs_of.items():
            of = "" if len(paths) == len(subjects) else f" of {', '.join(paths)}"
            notes.append(f"{family}{of}: {note}")
    return notes


def markdown(lines):
    """Lines of cells as a table in Markdown, of which the first line is the head."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    head, *others = lines
    text = []
    for name, *cells in [head, ["-" * width for width in widths], *others]:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append(f"| {name.ljust(widths[0])} | {' | '.join(cells)} |")
    return "\n".join(text)


def significant(number, digits):
    """Decimals that show so many significant digits of a number."""
    return max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0


def mean_cells(rows, settings, seeds):
    """A cell for each setting: the mean over its seeds ± their deviation.

    It says how many seeds count where not all have the figure.
    """
    cells = []
    for setting in settings:
        own = rows[rows["setting"] == setting].groupby("seed")["value"].agg(whole_mean).dropna()
        if own.empty:
            cells.append("")
            continue
        # Of equal values the deviation can be 1e-16.
        deviation = round(own.std(), 12) if len(own) > 1 else 0.0
        cell = mean_cell(own.mean(), deviation)
        cells.append(cell if len(own) == seeds[setting] else f"{cell} ({len(own)} seeds)")
    return cells


def mean_cell(mean, deviation):
    """A mean ± its deviation over seeds; with none, the mean with four significant digits.

    A count of ten or more has no decimals.
    """
    if deviation:
        digits = significant(deviation, 2)
        return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"
    is_count = mean == round(mean) and abs(mean) >= 10
    digits = 0 if is_count else significant(mean, 4)
    return f"{mean:,.{digits}f}"


def notes_on_intervals(frame, seeds, baseline):
    """What a table of differences says of its intervals."""
    differences = (
        f"All but the first column are differences to {baseline}. ± is half their {CONFIDENCE:.0%} "
        "interval, from the variance over seeds and samples of all settings of the table. It does "
        "not cover the choice of the texts that samples are drawn from. **Better** and _worse_ lie "
        "outside it."
    )
    notes = [differences]
    has_samples = frame.groupby("family")["sample"].nunique().max() > 1
    if max(seeds.values()) == 1:
        over = "± is over samples alone" if has_samples else "there is no ±"
        notes.append(f"With one seed a setting {over}: train several, sgo_sae.py --seed 0 1 2.")
    elif not has_samples and set(frame["family"]) & {"probe", "scr", "absorption"}:
        over = "± is over the seeds of training alone"
        notes.append(f"With one sample a task {over}: measure several, --seed 0 1 2.")
    return notes


def half_interval(values):
    """Half the interval of a difference of two columns' means; None where nothing tells it.

    The columns are settings, and the rows seeds, or samples. The variance is that of the residuals
    of value = setting + row, over all settings: randomised blocks. With three seeds, the variance
    of one setting alone would be luck.
    """
    n_rows, n_settings = values.shape
    freedom = (n_rows - 1) * (n_settings - 1)
    if freedom == 0:
        return None
    of_rows = values.mean(axis=1, keepdims=True)
    residual = values - of_rows - values.mean(axis=0) + values.mean()
    residual[abs(residual) < 1e-12 * abs(values).max()] = 0  # equal values leave rounding errors
    variance = (residual**2).sum() / freedom
    return student_t(freedom) * math.sqrt(2 * variance / n_rows)


def paired_cells(rows, settings, sign):
    """Cells of one figure: the baseline's mean, the others' differences to it, and ±; and a note
    where something lacks, or None.

    `rows` are those of the figure in `measured`, and the baseline is the first of the settings.
    Settings that have no such figure have empty cells. Of the seeds those count that all others
    have, with all samples.
    """
    baseline = settings[0]
    figure = rows["figure"].iloc[0].replace("_", " ")
    empty = [""] * (len(settings) + 1)
    rows = rows.dropna()
    if baseline not in set(rows["setting"]):
        return empty, f"{figure}: {baseline} has no figure, and there is no difference"
    n_cells = rows["setting"].nunique() * rows["sample"].nunique()
    is_whole = rows.groupby("seed").size() == n_cells
    shared = rows[rows["seed"].map(is_whole)]
    if shared.empty:
        return empty, f"{figure}: the settings share no seed, and there is no difference"
    note = None
    if not is_whole.all():
        which = ", ".join(map(str, is_whole.index[is_whole]))
        note = f"of {len(is_whole)} seeds, only {which} count, which all settings have"
    by_seed = shared.pivot_table(index="seed", columns="setting", values="value")
    by_sample = shared.pivot_table(index="sample", columns="setting", values="value")
    # Seeds and samples are drawn independently, so that their variances add.
    halves = [half_interval(by_seed.to_numpy()), half_interval(by_sample.to_numpy())]
    halves = [half for half in halves if half is not None]
    half = math.hypot(*halves) if halves else None
    means = by_seed.mean()
    changes = means - means[baseline]
    if half:
        digits = significant(half, 2)
    else:
        digits = significant(means[baseline] or changes.abs().max(), 4)
    cells = [f"{means[baseline]:,.{digits}f}"]
    for setting in settings[1:]:
        if setting not in changes:
            cells.append("")
            continue
        cell = f"{changes[setting]:+,.{digits}f}"
        if half is not None and sign and abs(changes[setting]) > half:
            cell = f"**{cell}**" if changes[setting] * sign > 0 else f"_{cell}_"
        cells.append(cell)
    return [*cells, "" if half is None else f"{half:,.{digits}f}"], note


def student_t(freedom):
    """The quantile of Student's t that a two-sided interval takes."""

    def excess(t):
        """P(|T| > t), a regularised incomplete beta function, less what the interval leaves out."""
        x = freedom / (freedom + t**2)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) - (1 - CONFIDENCE)

    return float(mpmath.findroot(excess, (1, 20), solver="anderson"))


# --------------------------------------------------------------------------------------------- page
N_PAIRS = 20  # pairs that the page shows of an autoencoder
N_CONTEXTS = 3  # contexts of a latent, those of its highest peaks
BEFORE, AFTER = 16, 8  # tokens around a peak
N_EFFECTS = 8  # tokens that a latent raises most, and lowers most
PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: which latents compete</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui; max-width: 1240px; margin: auto; padding: 1em }
small, pre, h3, h4 { font-size: 13px }
.row { display: grid; gap: 12px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)) }
pre { overflow-x: auto }
section { border-top: 1px solid #8888; padding-top: 4px }
h3, h4 { margin: 8px 0 2px; overflow-wrap: anywhere }
h4 { font-weight: normal }
summary { font-weight: 600; margin-top: 1em }
i { font-style: normal;
  background: color-mix(in srgb, #e69f00 calc(var(--a) * 1%), transparent) }
p.text { font: 13px/1.7 monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 2px 0 8px }
.both { border-bottom: 3px solid #2f8fd0 }
</style>
<h1>{{ title }}: which latents compete</h1>
<p>Latents compete where they are active on the same tokens. <b>w</b> is the share of the rarer
latent's tokens on which the other one is active too. Two latents that have nothing to do with each
other share some by chance. All of it is measured on {{ "{:,}".format(n_tokens) }} tokens.</p>
<h2>The pairs that compete most</h2>
<p>The autoencoders stand beside each other. Pairs are in the order of (w − chance) times the tokens
on which both are active. Below each latent stand the tokens whose prediction its decoder row raises
and lowers most, by the unembedding alone, and the text around its {{ n_contexts }} highest peaks:
tokens are shaded by its activation, and underlined where the other latent of the pair is active
too.</p>
{% for pairs in ranks %}
<details{% if loop.index <= 5 %} open{% endif %}><summary>Pair {{ loop.index }}</summary>
<div class="row">
{% for pair in pairs %}
<section><h3>{{ runs[loop.index0] }}</h3>
{% if pair %}
<h4>w {{ "%.2f" % pair.w }}, by chance {{ "%.2f" % pair.chance }}; both on
{{ "{:,}".format(pair.both) }} tokens; cosine of decoder rows {{ "%.2f" % pair.cosine }}</h4>
{% for latent in pair.latents %}
<div><small><b>latent {{ latent.number }}</b>,
on {{ "{:,}".format(latent.n_tokens) }} tokens</small>
{% for word, tokens in latent.effects %}
<br><small>{{ word }} {{ tokens | join("  ") }}</small>
{% endfor %}
{% for context in latent.contexts %}
<p class="text">
{%- for piece in context %}
{%- set text = piece.text.replace("\n", "⏎\n") %}
{%- if piece.own > 0 %}<i{% if piece.other > 0 %} class="both"{% endif %}
 style="--a:{{ (15 + 75 * piece.own / latent.peak) | round | int }}"
 title="{{ "%.3g" % piece.own }}">
{{- text }}</i>{% else %}{{ text }}{% endif %}
{%- endfor %}
</p>
{% endfor %}
</div>
{% endfor %}
{% else %}
<h4>No other pair shares more tokens than by chance.</h4>
{% endif %}
</section>
{% endfor %}
</div>
</details>
{% endfor %}
<h2>All figures</h2>
<pre>{{ printed }}</pre>
</html>
"""


def closest_pairs(activity, count=N_PAIRS):
    """The pairs with the largest (w - chance) · shared, each as Pairs of numbers, largest first."""
    best = []
    for pairs in compared_pairs(activity):
        score = (pairs.w - pairs.chance) * pairs.shared
        for n in score.topk(min(count, len(score))).indices.tolist():
            best.append(Pairs(*(values[n].item() for values in pairs)))
    best.sort(key=lambda pair: (pair.w - pair.chance) * pair.shared, reverse=True)
    return [pair for pair in best[:count] if pair.w > pair.chance]


class Piece(NamedTuple):
    """A piece of text, and the activations there of a latent and of the other of its pair."""

    text: str
    own: float
    other: float


def pieces(tokenizer, ids):
    """Pairs of a text and the number of tokens that it takes, which give the ids' whole text.

    A character that several tokens share is one piece. Pieces are what the text gains with
    each token, since some tokenizers, Llama's for one, drop the space before a token that is
    decoded alone.
    """
    decode = partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    found = []
    before = ""
    waiting = 0  # tokens that are no whole character yet
    for n in range(1, len(ids) + 1):
        waiting += 1
        text = decode(ids[:n])
        if text.endswith("\ufffd") and n < len(ids):
            continue
        new = text.removeprefix(before)
        if new == text and before:  # the token changed the text before it
            new = decode(ids[n - waiting : n])
        found.append((new, waiting))
        before = text
        waiting = 0
    return found


def text_of(tokenizer, token):
    """The text of one token as it is within a text."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids
    *_, (text, n_tokens) = pieces(tokenizer, [*anchor, token])
    if n_tokens > 1 or "\ufffd" in text:  # a part of a character
        return tokenizer.convert_ids_to_tokens(token)
    return text


def latent_view(evaluation, sae, i, f_RL, other_RL):
    """What the page says of a latent.

    `effects` are the tokens that it raises and lowers, and `contexts` the Pieces of text around its
    highest peaks.
    """
    model = evaluation.model
    ids_RL = evaluation.contexts.ids_RL
    effects = []
    # The head's bias is no latent's. Some heads are of another width, behind a projection.
    W_VD = model.lm.get_output_embeddings().weight if model.has_head else None
    if W_VD is not None and W_VD.shape[1] == sae.W_dec.shape[1]:
        effect_V = W_VD @ sae.W_dec[i].to(W_VD.dtype)
        for word, sign in (("raises", 1), ("lowers", -1)):
            top = (sign * effect_V).topk(N_EFFECTS).indices.tolist()
            effects.append((word, [repr(text_of(model.tokenizer, token)) for token in top]))
    contexts = []
    highest = f_RL.amax(1).topk(min(N_CONTEXTS, len(f_RL)))
    for r in highest.indices[highest.values > 0].tolist():
        peak = f_RL[r].argmax().item()
        start = max(0, peak - BEFORE)
        end = peak + AFTER + 1
        shown = []
        for text, n_tokens in pieces(model.tokenizer, ids_RL[r, start:end].tolist()):
            own = f_RL[r, start : start + n_tokens].max().item()
            other = other_RL[r, start : start + n_tokens].max().item()
            shown.append(Piece(text, own, other))
            start += n_tokens
        contexts.append(shown)
    return {
        "number": i,
        "n_tokens": (f_RL > 0).sum().item(),
        "peak": f_RL.max().item(),
        "effects": effects,
        "contexts": contexts,
    }


@torch.no_grad()
def portrait(evaluation, sae):
    """What the page shows of the closest pairs of latents."""
    kept_RL = evaluation.contexts.kept_RL
    x_RLD = evaluation.activations
    closest = closest_pairs(activity_of(sae, x_RLD[kept_RL]))
    latents = sorted({pair.i for pair in closest} | {pair.j for pair in closest})
    f_RLS = torch.cat([sae.encode(x_BLD.float())[..., latents] for x_BLD in x_RLD.split(16)])
    f_of = dict(zip(latents, (f_RLS * kept_RL[..., None]).unbind(-1)))
    views = []
    for i, j, shared, w, chance in closest:
        first = latent_view(evaluation, sae, i, f_of[i], f_of[j])
        second = latent_view(evaluation, sae, j, f_of[j], f_of[i])
        views.append(
            {
                "both": int(shared),
                "w": w,
                "chance": chance,
                "cosine": F.cosine_similarity(sae.W_dec[i], sae.W_dec[j], dim=0).item(),
                "latents": [first, second],
            }
        )
    return views


def page(evaluation, subjects, printed):
    """One HTML file: which pairs of latents compete, on what text, and the table as printed."""
    portraits = [portrait(evaluation, subject.sae) for subject in sgo_sae.each(subjects, "page")]
    return jinja2.Template(PAGE, autoescape=True, trim_blocks=True).render(
        title=f"{Path(evaluation.model_name).name}, layer {evaluation.layer}",
        runs=[f"{subject.name}, seed {subject.seed}" for subject in subjects],
        n_tokens=evaluation.contexts.sizes["tokens"],
        n_contexts=N_CONTEXTS,
        ranks=list(itertools.zip_longest(*portraits)),
        printed=printed,
    )


# --------------------------------------------------------------------------------------- evaluation
TEXT_FAMILIES = ("core", "behaviour", "competition")
TASK_FAMILIES = ("probe", "scr")
FAMILIES = (*TEXT_FAMILIES, *TASK_FAMILIES, "absorption")


def agreed(subjects, value_of, what, flag):
    """The one value that the subjects have, or None where none has any.

    InputError where they have several. Those without a value do not count.
    """
    path_of = {}
    for subject in subjects:
        value = value_of(subject)
        if value is not None:
            path_of.setdefault(value, subject.path)
    if len(path_of) > 1:
        found = " and ".join(f"{value} ({path})" for value, path in path_of.items())
        raise InputError(f"the runs differ in {what}, {found}: give {flag}")
    return next(iter(path_of), None)


class Contexts(NamedTuple):
    """The text of core, behaviour and competition."""

    ids_RL: torch.Tensor
    kept_RL: torch.Tensor  # the tokens that count
    sizes: dict  # how many contexts and tokens
    notes: list  # what a reader of the figures has to know

    def found(self, figures):
        """What was Found on the text, given the figures of each autoencoder."""
        parts = [[Part("text", 0, own)] for own in figures]
        return Found(parts, self.sizes, self.notes, is_whole=True)


class Evaluation:
    """What the families share: the settings, the language model and the text.

    The autoencoders that can be measured together, of one model and one layer, are `subjects`.
    `refused` has the others, and for each of them the reason. What --model and --layer do not say
    is taken from the first that is fit. `families` are those to measure.
    """

    def __init__(self, args, subjects, device, dtype):
        self.args = args
        self.device = device
        self.dtype = dtype
        fit = [subject for subject in subjects if not subject.unfit]
        self.layer = args.layer
        if self.layer is None:
            layers = [subject.layer for subject in fit if subject.layer is not None]
            if fit and not layers:
                raise InputError("the runs do not name their layer: give --layer")
            self.layer = next(iter(layers), None)
        fit = [subject for subject in fit if subject.layer in (None, self.layer)]
        names = [subject.cfg.get("model_name") for subject in fit]
        self.model_name = args.model or next(filter(None, names), None)
        if fit and self.model_name is None:
            self.model_name = sgo_sae.Config.model
            sgo_sae.say(f"no RUN names its language model, and {self.model_name} is taken")
        self.subjects = []
        self.refused = {}
        for subject in subjects:
            reason = self.reason_against(subject)
            if reason:
                self.refused[subject] = reason
                sgo_sae.say(f"{subject.path} is left out: {reason}")
            else:
                self.subjects.append(subject)
        if not self.subjects:
            raise InputError(f"{subject.path}: {reason}")
        self.demo = all(subject.training.get("demo") for subject in self.subjects)
        self.families = list(dict.fromkeys(args.metrics or FAMILIES))
        if self.demo and not args.metrics:
            self.families.remove("absorption")
        if args.html and "competition" not in self.families:
            self.families.append("competition")

    def reason_against(self, subject):
        """Why an autoencoder can't be measured in this call, or None."""
        model = subject.cfg.get("model_name")
        if subject.unfit:
            return subject.unfit
        if subject.layer not in (None, self.layer):
            return f"it is for layer {subject.layer}, and this call is for layer {self.layer}"
        if not self.args.model and model not in (None, self.model_name):
            return f"it is for {model}, and this call is for {self.model_name} (--model chooses)"
        return None

    def text_config(self):
        """Where the text of core, behaviour and competition comes from: the same for all.

        It is that of --text, or the demo's held-out text, or the validation split of the dataset
        that the autoencoders were trained on.
        """
        args = self.args
        ctx = args.ctx or agreed(self.subjects, lambda subject: subject.ctx, "their --ctx", "--ctx")
        config = sgo_sae.Config(ctx=ctx or sgo_sae.Config.ctx, data_seed=args.seed[0])
        if config.ctx < 2:
            raise InputError(f"contexts of {config.ctx} token have none that counts: give --ctx")
        if args.text:
            config.dataset = args.text
            config.text_column = args.text_column or config.text_column
            config.split = args.split or config.split
            return config
        if self.demo:  # whose model is a folder, in which demo_files put the text, too
            config.dataset = f"{self.subjects[0].training['model']}/heldout.jsonl"
            return config
        config.split = "validation"
        text = agreed(self.subjects, Subject.text, "their text", "--text")
        if text:
            config.dataset, config.subset, config.text_column = text
        if sgo_sae.is_here(config.dataset):
            raise InputError(f"give --text: no text of {config.dataset} is known to be held out")
        return config

    @cached_property
    def contexts(self):
        """The Contexts that are read."""
        config = self.text_config()
        model = self.model
        sgo_sae.check_texts(config)
        texts = sgo_sae.texts_of(config)
        with sgo_sae.loading(config.dataset):
            contexts = sgo_sae.token_contexts(texts, model.tokenizer, config.ctx)
            lists = list(itertools.islice(contexts, self.args.contexts))
        if not lists:
            raise InputError(f"{config.dataset} does not fill a context of {config.ctx} tokens")
        ids_RL = model.ids(lists)
        kept_RL = model.kept(ids_RL)
        if not kept_RL.any():
            raise InputError("no token of the text counts: all are special tokens")
        notes = []
        if len(ids_RL) < self.args.contexts:
            notes.append(f"the text has {len(ids_RL)} contexts, not {self.args.contexts}")
        trained_on_it = [s.path for s in self.subjects if s.is_trained_on(config)]
        if trained_on_it:
            notes.append(f"the text is not held out: {', '.join(trained_on_it)} trained on it")
        sizes = {"contexts": len(ids_RL), "tokens": kept_RL.sum().item()}
        return Contexts(ids_RL, kept_RL, sizes, notes)

    @cached_property
    def activations(self):
        """Activations (R, L, D) of the contexts, in the model's dtype."""
        parts = self.contexts.ids_RL.split(32)
        return torch.cat([self.model.read(ids_BL) for ids_BL in sgo_sae.each(parts, "activations")])

    @cached_property
    def model(self):
        """The language model. Where it can't be loaded, nothing can be measured: InputError."""
        longest = 2
        if set(self.families) & set(TEXT_FAMILIES):
            sizes = [subject.ctx or 0 for subject in self.subjects]
            longest = self.args.ctx or max(sizes) or sgo_sae.Config.ctx
        return LanguageModel(self.model_name, self.layer, self.device, self.dtype, longest)


# ------------------------------------------------------------------------------------------ results
DEFINITIONS = 1  # Who changes what a figure means raises it: --resume keeps no figures of another.
LOCK_WAIT = 60  # seconds to wait for another evaluation that writes into the same eval.json
MEMORY_ADVICE = "smaller --contexts, --train, --test and --words, fewer --seed and RUNs need less"


class Record(NamedTuple):
    """What was measured of a family, as eval.json has it."""

    figures: dict  # the mean over the parts
    parts: list
    sample: dict  # how many texts, tokens or words were used
    notes: list  # what a reader of the figures has to know
    is_whole: bool  # whether all was measured that was asked for
    settings: dict  # what the figures depend on, which --resume compares


def mean_of(dicts):
    """The mean of dicts, key by key: NaN where one of them has None, and {} of no dicts."""
    return pandas.DataFrame(dicts, dtype=float).mean(skipna=False).to_dict()


def record_of(found, parts, settings):
    """The Record of an autoencoder's Parts of what was Found, with figures as JSON has them."""
    parts = [{**part._asdict(), "figures": sgo_sae.finite(part.figures)} for part in parts]
    figures = sgo_sae.finite(mean_of([part["figures"] for part in parts]))
    notes = list(found.notes)
    blank = [name for name, value in figures.items() if value is None]
    if blank:
        notes.append(f"{', '.join(blank)}: no finite number, as 0 / 0 is none")
    if parts and not figures:
        notes.append("not measured, there are too few latents")
    return Record(figures, parts, found.sizes, notes, found.is_whole, settings)


def file_of(subject):
    """Where the figures go, whether it is there or not."""
    path = Path(subject.path)
    return path / "eval.json" if path.is_dir() else path.with_suffix(".eval.json")


def stored_families(file):
    """What eval.json has: a dict of families, empty where the file is none of ours."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    try:
        content = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        sgo_sae.say_once(f"{file} holds no figures that can be read")
        return {}
    return content


def digest_of(content):
    """16 digits that hang on all of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def stored_record(file, family, settings):
    """The Record of eval.json that has those settings, or None.

    Its seal is its digest. Where that does not fit, it is of another version, or was edited.
    """
    content = stored_families(file).get(family)
    if not isinstance(content, dict) or not content.keys() >= set(Record._fields):
        return None
    record = Record(*[content[name] for name in Record._fields])
    is_ours = content.get("seal") == digest_of(record)
    return record if is_ours and record.settings == settings else None


def keep(subject, family, record):
    """Takes a Record, and puts it into eval.json, where the RUN is on this disk.

    A failure is not put there, nor what has fewer parts than the file has with the same settings.
    Of a family the file has one Record. Two evaluations at once keep each other's families, and a
    kill leaves the file that was there. Where it can't be written, that is said, and the figures
    are only printed.
    """
    import filelock

    subject.records[family] = record
    if not Path(subject.path).exists() or not record.parts:
        return
    file = file_of(subject)
    try:
        # The lock's file stays: two processes could take it at once if it were removed.
        with filelock.FileLock(file.with_name(".eval.lock"), timeout=LOCK_WAIT):
            known = stored_record(file, family, record.settings)
            if known is None or len(record.parts) >= len(known.parts):
                entry = {**record._asdict(), "seal": digest_of(record)}
                content = {**stored_families(file), family: entry}
                text = json.dumps(content, indent=2, allow_nan=False)
                sgo_sae.write_whole(file, lambda path: path.write_text(text))
    # Files may not be writable, or not be lockable, or hold a number that JSON can't.
    except (OSError, NotImplementedError, ValueError) as error:
        sgo_sae.say(f"\n{file} can't be written, its {family} is only printed: {error}")


def keep_failure(subject, family, reason):
    """Keeps that there are no figures of a family."""
    found = Found([], {}, [f"not measured, {reason}"], is_whole=False)
    keep(subject, family, record_of(found, [], {}))


def stamp_of(name):
    """A digest of names, sizes and times of a file, of the files of a folder, or of a pattern; that
    of nothing where the name is on the Hub.

    Who changes a file changes these, and they are known at once, whatever the file's size.
    """
    places = [name] if Path(name).exists() else glob.glob(name, recursive=True)
    files = []
    for place in map(Path, places):
        for file in [place, *place.rglob("*")]:
            if file.is_file():
                own = file.name if file == place else str(file.relative_to(place))
                status = file.stat()
                files.append([own, status.st_size, status.st_mtime_ns])
    return digest_of(sorted(files))


def settings_of(evaluation, family):
    """What the figures of a family depend on beside the autoencoder, to compare with eval.json."""
    args = evaluation.args
    model = evaluation.model_name
    settings = {"definitions": DEFINITIONS, "model": model, "model_files": stamp_of(model)}
    settings.update(layer=evaluation.layer, dtype=str(evaluation.dtype))
    if family in TEXT_FAMILIES:
        config = evaluation.text_config()
        for name in ("dataset", "subset", "split", "text_column", "ctx", "data_seed"):
            settings[name] = getattr(config, name)
        settings.update(contexts=args.contexts, text=stamp_of(config.dataset))
    elif family in TASK_FAMILIES:
        settings.update(train=args.train, test=args.test, seed=args.seed)
        settings["probe"] = {path: stamp_of(path) for path in args.probe}
        settings["demo"] = evaluation.demo
    else:
        settings.update(words=args.words, seed=args.seed)
    return settings


def stamps_of(subject):
    """The stamps of an autoencoder's own files, whatever else its folder has."""
    path = Path(subject.path)
    if not path.is_dir():
        return [stamp_of(subject.path)]
    names = ("sae_weights.safetensors", "cfg.json", "params.npz")
    return [stamp_of(str(path / name)) for name in names]


def reason_of(error):
    """Why a family could not be measured, in a line. Of what nobody foresaw, all is printed."""
    if isinstance(error, (InputError, OSError)):  # an OSError is a disk that is full
        return str(error)
    if isinstance(error, MemoryError) or sgo_sae.is_lack_of_memory(error):
        return f"out of memory, {MEMORY_ADVICE}: {str(error)[:200]}"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error)[:200]}"


MEASURES = {
    "core": measure_core,
    "behaviour": measure_behaviour,
    "competition": measure_competition,
    "probe": measure_probe,
    "scr": measure_scr,
    "absorption": measure_absorption,
}


def measure(evaluation, family):
    """Measures a family, and keeps the Record of each autoencoder.

    With --resume those that eval.json has whole, of the same settings, are taken from there. A
    family that fails costs itself, whatever it raises.
    """
    for subject, reason in evaluation.refused.items():
        keep_failure(subject, family, reason)
    try:
        common = settings_of(evaluation, family)
    except InputError as error:
        for subject in evaluation.subjects:
            keep_failure(subject, family, str(error))
        return
    settings = {}  # of those that are to be measured
    for subject in evaluation.subjects:
        own = {**common, "files": stamps_of(subject)}
        stored = None
        with suppress(OSError):  # what can't be read is measured again
            if evaluation.args.resume:
                stored = stored_record(file_of(subject), family, own)
        if stored and stored.is_whole:
            subject.records[family] = stored
        elif subject.width != evaluation.model.width:
            widths = f"{subject.width} dimensions, and the model has {evaluation.model.width}"
            keep_failure(subject, family, f"it is for {widths}")
        else:
            settings[subject] = own
    if not settings:
        return
    try:
        found = MEASURES[family](evaluation, list(settings))
    except Exception as error:  # noqa: BLE001 (it is said, and it costs the family)
        reason = reason_of(error)
        for subject in settings:
            keep_failure(subject, family, reason)
        return
    for (subject, own), parts in zip(settings.items(), found.parts):
        keep(subject, family, record_of(found, parts, own))


# --------------------------------------------------------------------------------------------- main
CHOICES = {"metrics": FAMILIES, "dtype": sgo_sae.DTYPES}
LEAST = {"layer": 0, "contexts": 1, "ctx": 2, "train": FEWEST_TEXTS, "test": FEWEST_TEXTS}
LEAST.update(words=FEWEST_WORDS, seed=0)
LARGEST = 2**32 - 1  # that numpy takes as a seed


def work(argv):
    """Measures what the command line asks for. Returns the exit code."""
    runs, args = parse_args(argv)
    check(args)
    device, dtype = sgo_sae.find_device(args.device, args.dtype)
    if device.type == "mps":
        raise InputError("--device mps: it has no float64, which the probes take; use cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    subjects, broken = open_subjects(runs, device)
    evaluation = Evaluation(args, subjects, device, dtype)
    baseline = args.against
    if args.paired and baseline is None:
        paths = members(runs[0])
        first = [subject for subject in evaluation.subjects if subject.path in paths]
        baseline = baseline_of(first or evaluation.subjects)
    names = list(dict.fromkeys(subject.name for subject in evaluation.subjects))
    if baseline is not None and baseline not in names:
        raise InputError(f"--against {baseline}: the settings are {'; '.join(names)}")
    printed = ""
    done = []
    try:
        for family in evaluation.families:
            measure(evaluation, family)
            done.append(family)
    finally:  # whatever ends the call, what was measured is printed
        if done:
            printed = "\n\n".join([table(subjects, done, baseline), *broken])
            print(printed)
    if args.html:
        write_page(evaluation, printed)
    has_figures = [False for _ in broken]
    for subject in subjects:
        for family in evaluation.families:
            figures = subject.records[family].figures.values()
            has_figures.append(any(value is not None for value in figures))
    if not any(has_figures):
        return 2
    return 0 if all(has_figures) else 1


def open_subjects(runs, device):
    """The Subjects of the RUNs, and a line for each that can't be opened. One alone is refused."""
    paths = list(dict.fromkeys(itertools.chain(*map(members, runs))))
    subjects = []
    broken = []
    for path in paths:
        try:
            subjects.append(Subject(path, device))
        except InputError as error:
            if len(paths) == 1:
                raise
            broken.append(f"{path} is left out: {error}")
            sgo_sae.say(broken[-1])
    if not subjects:
        raise InputError("none of the runs can be opened")
    name_subjects(subjects)
    return subjects, broken


def members(run):
    """The paths of the autoencoders of a RUN: its own, and those of the folders in it."""
    folders = sorted(path.parent for path in Path(run).rglob("cfg.json"))
    return [str(folder) for folder in folders] or [str(run).rstrip("/")]


def parse_args(argv):
    """The paths of the RUNs and the Settings of a command line."""
    usage = "eval_sae.py RUN [RUN ...] [--flag VALUE ...]"
    parser = sgo_sae.new_parser(usage, __doc__.splitlines()[0], Settings, LISTS, CHOICES)
    what = "an SAE's folder, a folder of such, or a params.npz"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    values = vars(parser.parse_args(argv))
    runs = values.pop("runs")
    args = Settings(**values)
    args.seed = list(dict.fromkeys(args.seed))
    args.probe = list(dict.fromkeys(args.probe or ()))
    return runs, args


def check(args):
    """Refuses settings that can't work, before anything is loaded."""
    for name, least in LEAST.items():
        values = getattr(args, name)
        for value in values if name in LISTS else [values]:
            if value is not None and not least <= value <= LARGEST:
                flag = sgo_sae.flag_of(name)
                raise InputError(f"{flag} must be from {least} to {LARGEST}, but is {value}")
    if args.html and not Path(args.html).parent.is_dir():
        raise InputError(f"--html {args.html}: there is no folder {Path(args.html).parent}")
    if args.html and Path(args.html).is_dir():
        raise InputError(f"--html {args.html} is a folder, and a file is needed")
    if not args.text and (args.split or args.text_column):
        raise InputError("--split and --text-column are of --text, which is not given")
    for name in filter(None, [args.text, *args.probe]):
        sgo_sae.check_name(name)


def write_page(evaluation, printed):
    """Writes the page of --html."""
    file = Path(evaluation.args.html)
    shown = [subject for subject in evaluation.subjects if subject.records["competition"].parts]
    if not shown:
        sgo_sae.say(f"{file} is not written, since competition could not be measured")
        return
    text = page(evaluation, shown, printed)
    sgo_sae.write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
    sgo_sae.say(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(sgo_sae.main(sys.argv[1:], work, "eval_sae.py", MEMORY_ADVICE))
