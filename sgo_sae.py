# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "datasets==5.2.0",
#     "numpy==2.4.6",
#     "zstandard==0.25.0",
# ]
# ///
"""Sparse autoencoders with sparsity-guided orthogonality (SGO), in one file.

    python sgo_sae.py --demo                           a small model on this machine, nothing to download
    python sgo_sae.py --dict 18432 --alpha 0.075       the paper's run 4: Gemma-2-2B, layer 12, 10 M tokens
    python sgo_sae.py --help                           every setting

A top-k sparse autoencoder is trained on a language model's activations with one more term in its loss, which
pushes latents apart in proportion to how often they are active on the same tokens (Eq. 2 and 3 of "Feature
Specialization Through Sparsity-Guided Orthogonality"). In the order of the file: the settings, the method
(torch and nothing else: copy it from here), the activations, the training loop, the files, the demo, main.

Shapes are in the names: B tokens, L positions, D hidden size of the model, N latents, K active latents per token,
E entries of a (B, K) array, T latents of a tile. Equation and section numbers are the paper's.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import time
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


# ---------------------------------------------------------------------------------------------- settings


def setting(default, help, group=None, **kwargs):
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **kwargs})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each field is a command-line flag. The defaults are the paper's run 4."""

    dict: int = setting(18432, "number of latents N", "sparse autoencoder")
    k: int = setting(320, "latents that may be active on a token")
    alpha: float = setting(0.075, "weight of the SGO penalty; 0 trains a plain TopK autoencoder", "loss (Eq. 2)")
    alpha_start: float = setting(0.01, "weight at step 0, from which alpha is approached linearly")
    alpha_warmup: int = setting(1000, "steps until alpha is reached")
    l1: float = setting(0.04, "lambda, weight of the L1 term")
    penalty: str = setting(
        "sum", "sum over the pairs as Eq. 2 prints it, mean over the N^2 pairs, or the sum with decoder directions",
        choices=("sum", "mean", "decoder"),
    )  # fmt: skip
    tokens: int = setting(10_000_000, "tokens to train on", "training")
    batch: int = setting(2048, "tokens in a training step")
    lr: float = setting(3e-4, "learning rate of Adam")
    decay_start: float = setting(0.875, "share of the steps after which the learning rate falls linearly to 0")
    normalize: bool = setting(False, "scale activations to a mean squared norm of D; folded back into the saved weights")
    seed: int = setting(0, "seed of the initialisation and of the order of the data")
    model: str = setting("google/gemma-2-2b", "language model: Hugging Face id or local folder", "activations")
    layer: int = setting(12, "layer whose output is used, from 0")
    dataset: str = setting(
        "monology/pile-uncopyrighted", "Hugging Face id, or local file or folder of txt, jsonl, json, csv or parquet"
    )
    subset: str = setting(None, "configuration of the dataset, where it has several")
    split: str = setting("train", "split of a Hugging Face dataset")
    text_column: str = setting("text", "column that holds the text")
    ctx: int = setting(128, "tokens in a context, BOS included")
    lm_batch: int = setting(32, "contexts in a forward pass of the language model")
    buffer: int = setting(2048, "contexts whose activations are held and shuffled")
    device: str = setting("auto", "cuda, cuda:1, cpu, mps; auto is cuda where there is one, else cpu", "run")
    dtype: str = setting(
        "auto", "precision of the language model; auto is bfloat16 on cuda, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    out: str = setting(None, "folder of the result (default: runs/MODEL-lLAYER-nDICT-aALPHA-sSEED)")
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    demo: bool = setting(False, "small Gemma-2 and text made on this machine, other settings scaled to them")
    cache: str = setting(None, "folder that keeps the demo's model (default: $SGO_CACHE, else ~/.cache/sgo_sae)")
    bench: bool = setting(False, "time a step's parts at --dict, --k, --batch and --width, train nothing", "benchmark")
    width: int = setting(2304, "hidden size D for --bench")
    json: bool = setting(False, "print the benchmark as one JSON object")


DEMO = dict(dict=1024, k=16, layer=1, tokens=1_228_800, alpha_warmup=120, buffer=1024, log_every=20, lr=1e-3, width=128)


class InputError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


# ------------------------------------------------------------------------------------------------ method


class TopKEncode(torch.autograd.Function):
    """Pre-activations and their K largest per token; backward costs O(BKD), not the O(BND) of a dense one."""

    @staticmethod
    def forward(ctx, x_BD, W_enc_DN, b_enc_N, b_dec_D, k):
        x_BD = x_BD - b_dec_D
        pre_BN = torch.addmm(b_enc_N, x_BD, W_enc_DN)
        vals_BK, idx_BK = pre_BN.topk(k, dim=1, sorted=False)
        vals_BK = vals_BK.relu().to(x_BD.dtype)
        ctx.save_for_backward(x_BD, W_enc_DN, vals_BK, idx_BK)
        ctx.mark_non_differentiable(idx_BK)
        return vals_BK, idx_BK

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BK, _):
        x_BD, W_enc_DN, vals_BK, idx_BK = ctx.saved_tensors
        N, K = W_enc_DN.shape[1], idx_BK.shape[1]
        g_BK = g_BK * (vals_BK > 0)
        g_b_enc_N = g_BK.new_zeros(N).scatter_add_(0, idx_BK.flatten(), g_BK.flatten())
        # The gradient of row n of W_encᵀ is a weighted sum of the tokens on which n is active: sort entries by latent.
        latent_E, entry_E = idx_BK.flatten().sort(stable=True)
        first_N = torch.searchsorted(latent_E, torch.arange(N, device=latent_E.device))
        g_W_ND = F.embedding_bag(
            entry_E // K, x_BD, first_N, per_sample_weights=g_BK.flatten()[entry_E], mode="sum"
        )
        g_x_BD = None
        if ctx.needs_input_grad[0]:
            g_x_BD = F.embedding_bag(idx_BK, W_enc_DN.T, per_sample_weights=g_BK, mode="sum")
        return g_x_BD, g_W_ND.T, g_b_enc_N, -(W_enc_DN @ g_b_enc_N), None


class SAE(nn.Module):
    """Top-k sparse autoencoder (4.2): f = TopK(ReLU((x - b_dec) W_enc + b_enc)), x̂ = f W_dec + b_dec.

    W_enc (D, N), b_enc (N,), W_dec (N, D) with rows of unit length, b_dec (D,).
    """

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__()
        self.k = k
        self.register_buffer("threshold", None)  # others' SAEs: (N,), active are pre-activations above it, not the top k
        W_dec_ND = F.normalize(torch.randn(d_sae, d_in), dim=1)
        # The encoder starts as the decoder's transpose, and lies in memory like it: latent by latent.
        self.W_enc = nn.Parameter(W_dec_ND.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_dec_ND)
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def topk(self, x_BD):
        """Sparse latents of x (B, D): values (B, K), at least 0, and the latents (B, K) they belong to."""
        return TopKEncode.apply(x_BD, self.W_enc, self.b_enc, self.b_dec, self.k)

    def decode_topk(self, vals_BK, idx_BK):
        """Reconstruction (B, D) of sparse latents."""
        return F.embedding_bag(idx_BK, self.W_dec, per_sample_weights=vals_BK, mode="sum") + self.b_dec

    def encode(self, x):
        """Dense latents (..., N) of x (..., D)."""
        if self.threshold is not None:
            pre = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
            return pre * (pre > self.threshold)
        vals_BK, idx_BK = self.topk(x.reshape(-1, x.shape[-1]))
        f_BN = vals_BK.new_zeros(len(vals_BK), len(self.b_enc)).scatter(1, idx_BK, vals_BK)
        return f_BN.view(*x.shape[:-1], -1)

    def decode(self, f):
        """Reconstruction (..., D) of dense latents f (..., N)."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x):
        """Reconstruction of x (..., D)."""
        if self.threshold is not None:
            return self.decode(self.encode(x))
        return self.decode_topk(*self.topk(x.reshape(-1, x.shape[-1]))).view(x.shape)

    @torch.no_grad()
    def project_decoder_gradient(self):
        """Remove from each row's gradient the part along the row (4.2), which normalisation would undo."""
        self.W_dec.grad.addcmul_(self.W_dec, torch.linalg.vecdot(self.W_dec.grad, self.W_dec)[:, None], value=-1)

    @torch.no_grad()
    def normalize_decoder(self):
        """Rescale each row of W_dec to unit length (4.2)."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def coactivation_weights(f_BN):
    """Eq. 3: w_ij = |M_i ∩ M_j| / min(|M_i|, |M_j|) from dense latents; (N, N), 0 where either never fires."""
    m_BN = (f_BN > 0).to(f_BN.dtype)
    size_N = m_BN.sum(0)
    return m_BN.T @ m_BN / torch.minimum(size_N[:, None], size_N).clamp(min=1)


def sgo_penalty_reference(f_BN):
    """Eq. 2: Ω = Σ_{i≠j} w_ij ⟨f_i, f_j⟩², ⟨f_i, f_j⟩ = Σ_b f_bi f_bj / B, as printed: O(BN²), to read and to test by."""
    w_NN = coactivation_weights(f_BN.detach()).fill_diagonal_(0)
    gram_NN = f_BN.T @ f_BN / len(f_BN)
    return (w_NN * gram_NN**2).sum()


def tile_rows(d_sae, device):
    """Latents of a tile of (T, N + 1) cells: on a CPU what fits its cache, on a GPU what keeps it busy."""
    return max(1, (1 << (23 if device.type == "cuda" else 18)) // (d_sae + 1))


@torch.no_grad()
def coactive_pairs(vals_BK, idx_BK, d_sae):
    """Walk over the pairs of latents that are active together, a tile of T latents i against all N latents j at a time.

    Yields, per tile: the entries of f whose latent i lies in the tile, as positions E in vals_BK.flatten(); for each
    of them and each latent j active on its token, the pair's cell in a (T, N + 1) array, (E, K); and the pair's
    weight w_ij of Eq. 3, (E, K), 0 for i = j. A step touches B K² pairs, whatever N is.
    """
    B, K = vals_BK.shape
    idx_BK = torch.where(vals_BK > 0, idx_BK, d_sae)  # a slot that holds 0 is not active: it becomes latent N
    latent_E, entry_E = idx_BK.flatten().sort(stable=True)
    size_N = torch.bincount(latent_E, minlength=d_sae + 1)
    end_N = size_N.cumsum(0).tolist()
    size_N = size_N.to(vals_BK.dtype).clamp_(min=1)
    size_BK = size_N[idx_BK]

    T = tile_rows(d_sae, vals_BK.device)
    both_TN = vals_BK.new_zeros(T, d_sae + 1)
    one = vals_BK.new_ones(())
    for lo in range(0, d_sae, T):
        hi = min(lo + T, d_sae)
        e_E = entry_E[end_N[lo - 1] if lo else 0 : end_N[hi - 1]]
        if not len(e_E):
            continue
        i_E = idx_BK.flatten()[e_E]
        pair_EK = idx_BK[e_E // K].add_((i_E - lo)[:, None] * (d_sae + 1))
        both_TN.view(-1).scatter_add_(0, pair_EK.flatten(), one.expand(pair_EK.numel()))  # |M_i ∩ M_j|
        both_TN[:, d_sae] = 0
        if pair_EK.numel() * 4 > both_TN.numel():  # most cells are touched: dividing cells is cheaper than dividing pairs
            w_EK = both_TN[: hi - lo].div_(torch.minimum(size_N[lo:hi, None], size_N)).take(pair_EK)
        else:
            w_EK = both_TN.take(pair_EK).div_(torch.minimum(size_N[i_E][:, None], size_BK[e_E // K]))
        clear(both_TN.view(-1), pair_EK)
        w_EK.scatter_(1, (e_E % K)[:, None], 0)  # i = j
        yield lo, hi, e_E, pair_EK, w_EK


def clear(cells, touched):
    """Set the touched cells to 0: all of them at once, where that writes less."""
    if touched.numel() * 16 > cells.numel():
        cells.zero_()
    else:
        cells.scatter_(0, touched.flatten(), 0)


@torch.no_grad()
def penalty_gradient_sparse(vals_BK, idx_BK, d_sae):
    """∂Ω/∂f on the active entries, (B, K), pair by co-active pair: O(B K²) time, a tile's pairs of memory."""
    B, K = vals_BK.shape
    grad_E = vals_BK.new_zeros(B * K)
    gram = vals_BK.new_zeros(tile_rows(d_sae, vals_BK.device) * (d_sae + 1))
    for _, _, e_E, pair_EK, w_EK in coactive_pairs(vals_BK, idx_BK, d_sae):
        f_EK = vals_BK[e_E // K]
        gram.scatter_add_(0, pair_EK.flatten(), (vals_BK.flatten()[e_E][:, None] * f_EK).flatten())  # B ⟨f_i, f_j⟩
        grad_E[e_E] = torch.linalg.vecdot(w_EK.mul_(gram.take(pair_EK)), f_EK)
        clear(gram, pair_EK)
    return grad_E.view(B, K) * (4 / B**2)


@torch.no_grad()
def penalty_gradient_tiled(vals_BK, idx_BK, d_sae, tile=2048):
    """The same by dense products on square tiles of the N × N plane: O(B N²) time, O(B N + tile²) memory.

    The plane is symmetric: tiles above the diagonal serve both sides.
    """
    f_BN = vals_BK.new_zeros(len(vals_BK), d_sae).scatter_(1, idx_BK, vals_BK)
    m_BN = (f_BN > 0).to(f_BN.dtype)
    size_N = m_BN.sum(0).clamp_(min=1)
    grad_BN = torch.zeros_like(f_BN)
    tiles = [slice(lo, lo + tile) for lo in range(0, d_sae, tile)]
    for n, i in enumerate(tiles):
        for j in tiles[n:]:
            w_TT = (m_BN[:, i].T @ m_BN[:, j]).div_(torch.minimum(size_N[i, None], size_N[j]))  # Eq. 3
            wgram_TT = w_TT.mul_(f_BN[:, i].T @ f_BN[:, j])
            if i is j:
                wgram_TT.fill_diagonal_(0)
            else:
                grad_BN[:, j].addmm_(f_BN[:, i], wgram_TT)
            grad_BN[:, i].addmm_(f_BN[:, j], wgram_TT.T)
    return grad_BN.gather(1, idx_BK) * (vals_BK > 0) * (4 / len(vals_BK) ** 2)


# The pairwise way is the faster one where N is over this many times K. Measured on a CPU (README); for a GPU an
# estimate from its rates of dense products and of scattered additions.
CROSSOVER = {"cpu": 15, "cuda": 300}


def sgo_penalty(vals_BK, idx_BK, d_sae):
    """Eq. 2's Ω from sparse latents: exactly sgo_penalty_reference, by the cheaper of the two ways above.

    vals_BK: activations, at least 0; idx_BK: their latents, no latent twice on a token. Differentiable once, in vals.
    ∂Ω/∂f_bi = (4/B) Σ_j f_bj w_ij ⟨f_i, f_j⟩, and Ω is homogeneous of degree 4 in f, so Ω = ¼ Σ f ∂Ω/∂f (Euler).
    """
    f_BK = vals_BK.detach()
    pairwise = d_sae > CROSSOVER.get(f_BK.device.type, 15) * f_BK.shape[1]
    grad_BK = (penalty_gradient_sparse if pairwise else penalty_gradient_tiled)(f_BK, idx_BK, d_sae)
    return with_gradient((f_BK * grad_BK).sum() / 4, vals_BK, grad_BK)


def sgo_penalty_decoder(vals_BK, idx_BK, W_dec_ND):
    """Ω with decoder directions for f: Σ_{i≠j} w_ij ⟨W_i, W_j⟩². Differentiable once, in W_dec: 4 (w ∘ W Wᵀ) W."""
    W_ND = W_dec_ND.detach()
    N = len(W_ND)
    omega, grad_ND = W_ND.new_zeros(()), torch.zeros_like(W_ND)
    for lo, hi, _, pair_EK, w_EK in coactive_pairs(vals_BK.detach(), idx_BK, N):
        w_TN = w_EK.new_zeros((hi - lo) * (N + 1)).scatter_(0, pair_EK.flatten(), w_EK.flatten()).view(hi - lo, -1)
        gram_TN = W_ND[lo:hi] @ W_ND.T
        wgram_TN = w_TN[:, :N] * gram_TN
        omega += (wgram_TN * gram_TN).sum()
        grad_ND[lo:hi] = 4 * wgram_TN @ W_ND
    return with_gradient(omega, W_dec_ND, grad_ND)


def with_gradient(value, x, grad):
    """A scalar equal to `value` whose gradient in x is `grad`: for terms that are differentiated by hand."""
    return value + ((x - x.detach()) * grad).sum()


def max_coactivation(vals_BK, idx_BK, d_sae):
    """max_j≠i w_ij for each latent, (N,): how strongly it competes with its closest rival; 0 where it never fires."""
    max_N = vals_BK.new_zeros(d_sae)
    for _, _, e_E, _, w_EK in coactive_pairs(vals_BK, idx_BK, d_sae):
        max_N.scatter_reduce_(0, idx_BK.flatten()[e_E], w_EK.amax(1), "amax")
    return max_N


def alpha_at(step, alpha=0.075, start=0.01, warmup=1000):
    """Weight of Ω at a step: from `start` to `alpha`, linear over `warmup` steps (4.2); alpha 0 means no penalty."""
    return 0.0 if alpha == 0 else start + (alpha - start) * min(1.0, step / max(1, warmup))


def lr_at(step, lr=3e-4, decay_start=4271, steps=4882):
    """Learning rate at a step: constant, then from `decay_start` linear to 0 at `steps` (5.1)."""
    return lr * min(1.0, (steps - step) / max(1, steps - decay_start))


def geometric_median(x_BD, iterations=100, tol=1e-6):
    """The point with the least sum of distances to the rows of x, (D,), by Weiszfeld's iteration; b_dec starts there (5.1).

    Stops when a step is under `tol` of the mean distance.
    """
    median_D = x_BD.mean(0)
    for _ in range(iterations):
        distance_B = (x_BD - median_D).norm(dim=1).clamp(min=1e-12)
        previous_D, median_D = median_D, (1 / distance_B) @ x_BD / (1 / distance_B).sum()
        if (median_D - previous_D).norm() <= tol * distance_B.mean():
            break
    return median_D


# ------------------------------------------------------------------------------------------- activations


@contextmanager
def loading(what):
    """Turns what the Hub's libraries raise while they load `what` into an InputError that says why in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # readers, decompressors and network layers raise what they like
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
        if "GatedRepoError" in kinds:
            reason = (
                f"is gated: accept its licence at https://huggingface.co/{what}, then log in with `hf auth login` "
                "or set HF_TOKEN; `--demo` needs neither"
            )
        elif kinds & {"ConnectionError", "ConnectError", "TimeoutError", "OfflineModeIsEnabled"}:
            reason = "is not on this machine and the Hugging Face Hub can't be reached; `--demo` needs no network"
        elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
            reason = "is neither a local path nor a public repository of the Hugging Face Hub"
        else:
            reason = "can't be loaded: " + " ".join(str(error).split())[:300]
        raise InputError(f"{what} {reason}") from error


def load_tokenizer(cfg):
    """The model's configuration and its tokenizer, which splits text that spells a special token like any other."""
    from transformers import AutoConfig, AutoTokenizer

    with loading(cfg.model):
        lm_config = AutoConfig.from_pretrained(cfg.model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, split_special_tokens=True)
    if cfg.layer >= lm_config.num_hidden_layers:
        raise InputError(f"--layer {cfg.layer}: the layers of {cfg.model} are 0 to {lm_config.num_hidden_layers - 1}")
    if set(tokenizer("some text", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise InputError(f"{cfg.model} has no tokenizer that can split text into tokens")
    if len(tokenizer) > lm_config.vocab_size:
        raise InputError(f"{cfg.model}: {len(tokenizer)} tokens in the tokenizer, {lm_config.vocab_size} in the model")
    return lm_config, tokenizer


def load_lm(cfg, device, dtype):
    """The language model without its head and the layers after `cfg.layer`, and that layer."""
    from transformers import AutoModel

    with loading(cfg.model):
        lm, report = AutoModel.from_pretrained(
            cfg.model, num_hidden_layers=cfg.layer + 1, dtype=dtype, output_loading_info=True
        )
    if missing := [name for name in report["missing_keys"] if "pooler" not in name]:
        raise InputError(f"{cfg.model}: its files lack {len(missing)} of the model's tensors, {missing[0]} among them")
    lm.config.use_cache = False
    return lm.eval().to(device), layer_list(lm, cfg.layer + 1)[cfg.layer]


def layer_list(lm, n_layers):
    """The language model's layers: the largest of its lists of `n_layers` modules, whatever it is called."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_texts(cfg):
    """The dataset as a stream of rows, shuffled; checks that it can be read and has the text column."""
    import datasets

    path = Path(cfg.dataset)
    with loading(cfg.dataset):
        if path.exists():
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            kinds = {str(f): READERS[suffix] for f in files for suffix in f.suffixes if suffix in READERS}
            if len(set(kinds.values())) != 1:
                raise InputError(f"{path}: one of the formats {', '.join(READERS)} is needed, compressed or not")
            kind = next(iter(kinds.values()))
            options = {"sample_by": "paragraph"} if kind == "text" else {}
            stream = datasets.load_dataset(kind, data_files=list(kinds), split=cfg.split, streaming=True, **options)
        else:
            stream = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, streaming=True)
        first = next(iter(stream), {cfg.text_column: ""})
        if cfg.text_column not in first:
            raise InputError(f"--text-column {cfg.text_column}: the columns of {cfg.dataset} are {', '.join(first)}")
        if not any(is_text(row[cfg.text_column]) for row in stream):
            raise InputError(f"{cfg.dataset} holds no text")
    return stream.shuffle(seed=cfg.seed, buffer_size=1000)


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def text_batches(stream, column, rows=64):
    """Lists of texts, without end: when the stream is through, it starts over in another order."""
    for epoch in count():
        stream.set_epoch(epoch)
        for batch in stream.iter(batch_size=rows):
            if texts := [value for value in batch[column] if is_text(value)]:
                yield texts
        if epoch == 0:
            print("\nall the data has been used once: starting over, reshuffled", file=sys.stderr)


def token_contexts(batches, tokenizer, ctx):
    """Pack texts into contexts of `ctx` token ids: BOS where the tokenizer has one, then the stream of documents with
    EOS, where there is one, after each. What is left when `batches` end is not yielded.
    """
    bos = [tokenizer.bos_token_id, tokenizer.cls_token_id]
    eos = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    bos, eos = ([i for i in ids if i is not None][:1] for ids in (bos, eos))
    width = ctx - len(bos)
    rest = []
    for texts in batches:
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            rest += ids + eos
        whole = len(rest) // width * width
        for start in range(0, whole, width):
            yield bos + rest[start : start + width]
        rest = rest[whole:]


def special_ids(tokenizer):
    """Ids of BOS, EOS and padding, whose activations the autoencoder never sees."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    return sorted({i for name in names if (i := getattr(tokenizer, name)) is not None})


def hooked(lm, layer, ids_BL):
    """Output of `layer` (B, L, D) when the language model reads the token ids (B, L)."""
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        lm(input_ids=ids_BL)
    finally:
        handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def activations(lm, layer, contexts, special, total, lm_batch=32):
    """`total` activations of the contexts' tokens, in chunks (B, D); those of special tokens are left out."""
    special = torch.tensor(special, device=lm.device)
    while total > 0 and (ids := list(islice(contexts, lm_batch))):
        ids_BL = torch.tensor(ids, device=lm.device)
        with torch.inference_mode():
            x_BD = hooked(lm, layer, ids_BL)[~torch.isin(ids_BL, special)][:total]
        total -= len(x_BD)
        yield x_BD


class ShuffleBuffer:
    """Holds `capacity` activations (B, D) of a source of chunks and serves them in random order, each exactly once.

    When half of them are used, the used ones are replaced by new ones, and all are shuffled.
    """

    def __init__(self, source, capacity, d_in, device, dtype, seed):
        self.source = iter(source)
        self.x_BD = torch.empty(capacity, d_in, device=device, dtype=dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.rest_BD = self.x_BD[:0]
        self.order, self.used = torch.arange(0), 0  # rows of x_BD in the order in which they are served
        self.free = torch.arange(capacity)
        self.refill()

    def refill(self):
        self.free = torch.cat([self.free, self.order[: self.used]])
        self.order, self.used = self.order[self.used :], 0
        while len(self.free) and (len(self.rest_BD) or (chunk := next(self.source, None)) is not None):
            chunk = self.rest_BD if len(self.rest_BD) else chunk
            rows, self.free = self.free[: len(chunk)], self.free[len(chunk) :]
            self.x_BD[rows.to(self.x_BD.device)] = chunk[: len(rows)]
            self.rest_BD = chunk[len(rows) :]
            self.order = torch.cat([self.order, rows])
        self.order = self.order[torch.randperm(len(self.order), generator=self.generator)]

    def batch(self, B):
        """The next B activations (B, D) in float32; fewer where the source has ended."""
        if self.used + B > max(B, len(self.x_BD) // 2):
            self.refill()
        rows = self.order[self.used : self.used + B]
        self.used += len(rows)
        return self.x_BD[rows.to(self.x_BD.device)].float()


# ---------------------------------------------------------------------------------------------- training


DEAD_AFTER = 200  # steps without an active token after which a latent counts as dead


def training_step(sae, adam, x_BD, cfg, alpha, lr):
    """One update by the loss of Eq. 2 on the activations x (B, D); returns the parts that metrics are made of.

    Raises FloatingPointError, before the weights change, where the loss or a gradient is not finite.
    """
    with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=x_BD.is_cuda):  # the one dense product of a step
        vals_BK, idx_BK = sae.topk(x_BD)
    error_BD = x_BD - sae.decode_topk(vals_BK, idx_BK)
    reconstruction = error_BD.square().sum(1).mean()
    l1 = vals_BK.sum(1).mean()
    omega = x_BD.new_zeros(())
    if alpha and cfg.penalty == "decoder":
        omega = sgo_penalty_decoder(vals_BK, idx_BK, sae.W_dec)
    elif alpha:
        omega = sgo_penalty(vals_BK, idx_BK, cfg.dict) / (cfg.dict**2 if cfg.penalty == "mean" else 1)
    loss = reconstruction + cfg.l1 * l1 + alpha * omega

    adam.zero_grad()
    loss.backward()
    sae.project_decoder_gradient()
    norm = nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    if not torch.isfinite(loss + norm):
        raise FloatingPointError
    adam.param_groups[0]["lr"] = lr
    adam.step()
    sae.normalize_decoder()
    parts = dict(vals_BK=vals_BK, error_BD=error_BD, loss=loss, reconstruction=reconstruction, l1=l1, omega=omega)
    return {name: part.detach() for name, part in parts.items()} | dict(idx_BK=idx_BK)


def batch_metrics(x_BD, part, cfg, alpha):
    """The figures of a line of metrics.jsonl that come from one step's batch; reconstruction and L1 as in Eq. 2."""
    vals_BK, error_BD = part["vals_BK"], part["error_BD"]
    terms = {name: part[name].item() for name in ("loss", "reconstruction", "l1", "omega")}
    competition_N = max_coactivation(vals_BK, part["idx_BK"], cfg.dict)
    return dict(
        **terms,
        mse=terms["reconstruction"] / x_BD.shape[1],
        penalty_share=alpha * terms["omega"] / terms["reconstruction"],
        explained_variance=1 - (error_BD.square().sum() / (x_BD - x_BD.mean(0)).square().sum()).item(),
        cosine=F.cosine_similarity(x_BD, x_BD - error_BD, dim=1).mean().item(),
        l0=(vals_BK > 0).sum(1).float().mean().item(),
        mean_max_w=competition_N[competition_N > 0].mean().item() if (competition_N > 0).any() else 0.0,
    )


def peak_memory_gb(device):
    """Most memory this process has held so far, in GB: on the GPU where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def train(cfg, device):
    """Train an autoencoder as `cfg` says, save it in cfg.out and return its last metrics."""
    from tqdm import tqdm

    dtype = find_dtype(cfg.dtype, device)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")

    steps = cfg.tokens // cfg.batch
    stream = load_texts(cfg)
    lm_config, tokenizer = load_tokenizer(cfg)
    lm, layer = load_lm(cfg, device, dtype)
    d_in, n_layers = lm_config.hidden_size, lm_config.num_hidden_layers
    print(f"model   {cfg.model}, layer {cfg.layer} of {n_layers}, D {d_in}, {str(dtype)[6:]} on {device}")
    print(f"text    {cfg.dataset}, contexts of {cfg.ctx} tokens")
    print(f"sae     N {cfg.dict:,}, k {cfg.k}, alpha {cfg.alpha:g} ({cfg.penalty}), {2 * cfg.dict * d_in / 1e6:,.1f} M weights")
    print(f"run     {steps:,} steps of {cfg.batch:,} tokens, into {cfg.out}", flush=True)

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", dict(settings=dataclasses.asdict(cfg), versions=versions()))

    contexts = token_contexts(text_batches(stream, cfg.text_column), tokenizer, cfg.ctx)
    source = activations(lm, layer, contexts, special_ids(tokenizer), steps * cfg.batch, cfg.lm_batch)
    capacity = min(max(cfg.buffer * (cfg.ctx - 1), 2 * cfg.batch), steps * cfg.batch)
    started = time.perf_counter()
    buffer = ShuffleBuffer(source, capacity, d_in, device, dtype, cfg.seed)
    seconds = time.perf_counter() - started
    print(f"buffer  {capacity:,} activations in {seconds:.0f} s, {capacity / seconds:,.0f} tokens/s", flush=True)

    sample_BD = buffer.x_BD[: 1 << 14].float()
    scale = (d_in / sample_BD.square().sum(1).mean()).sqrt().item() if cfg.normalize else 1.0
    sae = SAE(d_in, cfg.dict, cfg.k).to(device)
    sae.b_dec.data = geometric_median(sample_BD * scale)
    adam = torch.optim.Adam(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999), fused=True)

    fired_N = torch.zeros(cfg.dict, dtype=torch.long, device=device)  # step after which a latent last fired
    metrics, tokens, since = {}, 0, time.perf_counter()
    with open(out / "metrics.jsonl", "w") as log, tqdm(
        total=steps, unit="step", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10
    ) as bar:
        for step in range(steps):
            x_BD = buffer.batch(cfg.batch) * scale
            alpha = alpha_at(step, cfg.alpha, cfg.alpha_start, cfg.alpha_warmup)
            lr = lr_at(step, cfg.lr, int(cfg.decay_start * steps), steps)
            try:
                part = training_step(sae, adam, x_BD, cfg, alpha, lr)
            except FloatingPointError:
                save_sae(sae, cfg, out / "last_good", scale)
                raise InputError(f"loss or gradient not finite at step {step}; the weights before it: {out / 'last_good'}")
            fired_N[part["idx_BK"][part["vals_BK"] > 0]] = step + 1
            if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
                seconds, since = time.perf_counter() - since, time.perf_counter()
                dead = (fired_N <= max(0, step + 1 - DEAD_AFTER)).sum().item()
                metrics = dict(
                    step=step + 1,
                    tokens=(step + 1) * cfg.batch,
                    **batch_metrics(x_BD, part, cfg, alpha),
                    dead=dead,
                    alpha=alpha,
                    lr=lr,
                    tokens_per_s=((step + 1) * cfg.batch - tokens) / seconds,
                    memory_gb=peak_memory_gb(device),
                )
                tokens = metrics["tokens"]
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                bar.set_postfix_str(
                    f"{metrics['tokens_per_s']:,.0f} tok/s  loss {metrics['loss']:.4g}  EV {metrics['explained_variance']:.3f}"
                    f"  L0 {metrics['l0']:.1f}  dead {dead / cfg.dict:.1%}  α {alpha:.3f}"
                    f"  αΩ/rec {metrics['penalty_share']:.2%}",
                    refresh=False,
                )
            bar.update()
    save_sae(sae, cfg, out, scale)
    return metrics


def median_ms(device, run, *args, times=5, **kwargs):
    """Median milliseconds of `times` calls after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds[1:])[times // 2]


def bench(cfg, device):
    """Median milliseconds of a step and of its parts, with and without the penalty, on Gaussian activations.

    Twice: with latents equally popular, and with a popularity that falls with the latent's rank as on real activations.
    """
    torch.set_float32_matmul_precision("high")
    results = {}
    for kind in ("gaussian", "skewed"):
        torch.manual_seed(cfg.seed)
        sae = SAE(cfg.width, cfg.dict, cfg.k).to(device)
        if kind == "skewed":
            sae.b_enc.data = 5 - 0.5 * (1 + torch.randperm(cfg.dict, device=device)).log()
        adam = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)  # the weights stay: every step is the same work
        x_BD = torch.randn(cfg.batch, cfg.width, device=device)
        step_ms = {
            "without_penalty": median_ms(device, training_step, sae, adam, x_BD, cfg, 0.0, 0.0),
            "with_penalty": median_ms(device, training_step, sae, adam, x_BD, cfg, cfg.alpha or 0.075, 0.0),
        }
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=x_BD.is_cuda):
            pre_BN = torch.addmm(sae.b_enc, x_BD, sae.W_enc)
            vals_BK, idx_BK = sae.topk(x_BD)
            parts_ms = {
                "encoder product": median_ms(device, torch.addmm, sae.b_enc, x_BD, sae.W_enc),
                "top-k": median_ms(device, pre_BN.topk, cfg.k, sorted=False),
                "decoder": median_ms(device, sae.decode_topk, vals_BK, idx_BK),
            }
        with torch.no_grad():
            parts_ms |= {
                "penalty and its gradient": median_ms(device, sgo_penalty, vals_BK, idx_BK, cfg.dict),
                "gradient projection": median_ms(device, sae.project_decoder_gradient),
                "gradient clipping": median_ms(device, nn.utils.clip_grad_norm_, list(sae.parameters()), 1.0),
                "Adam": median_ms(device, adam.step),
                "decoder normalisation": median_ms(device, sae.normalize_decoder),
            }
        parts_ms["other gradients and the loss"] = step_ms["with_penalty"] - sum(parts_ms.values())
        results[kind] = dict(
            step_ms=step_ms,
            parts_ms=parts_ms,
            tokens_per_s=cfg.batch / step_ms["with_penalty"] * 1000,
            peak_gb=peak_memory_gb(device),
            run_s=cfg.tokens // cfg.batch * step_ms["with_penalty"] / 1000,
        )
    shape = dict(batch=cfg.batch, width=cfg.width, dict=cfg.dict, k=cfg.k, device=str(device))
    if cfg.json:
        return json.dumps(shape | results["gaussian"] | dict(skewed=results["skewed"]))
    lines = [f"batch {cfg.batch}, D {cfg.width}, N {cfg.dict}, k {cfg.k}, {device}", f"{'ms':<40}{'gaussian':>12}{'skewed':>12}"]
    table = {"step without the penalty": "without_penalty", "step with the penalty": "with_penalty"}
    rows = {label: [r["step_ms"][name] for r in results.values()] for label, name in table.items()}
    rows |= {"  " + name: [r["parts_ms"][name] for r in results.values()] for name in parts_ms}
    rows["tokens per second"] = [r["tokens_per_s"] for r in results.values()]
    rows[f"minutes for {cfg.tokens:,} tokens, SAE alone"] = [r["run_s"] / 60 for r in results.values()]
    rows["peak memory, GB"] = [r["peak_gb"] for r in results.values()]
    lines += [f"{name:<40}" + "".join(f"{v:>12,.1f}" for v in values) for name, values in rows.items()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- files


def versions():
    """Versions of what a result depends on."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("torch", "transformers", "datasets", "numpy")}


def write_json(path, content):
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def save_sae(sae, cfg, folder, scale=1.0):
    """Write a folder that SAELens loads (cfg.json, sae_weights.safetensors, fp32), for activations as the model has them.

    `scale` is what activations were multiplied by in training. ReLU and top-k commute with it, so the biases are
    divided by it and the weights stay, the decoder's rows of unit length among them.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().float().cpu().contiguous() for name, p in sae.named_parameters()}
    weights["b_enc"], weights["b_dec"] = weights["b_enc"] / scale, weights["b_dec"] / scale
    content = dict(
        architecture="topk", d_in=len(sae.b_dec), d_sae=len(sae.b_enc), k=sae.k, dtype="float32", device="cpu",
        apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
        rescale_acts_by_decoder_norm=False,
        metadata=dict(
            model_name=cfg.model, hook_name=f"blocks.{cfg.layer}.hook_resid_post", hook_layer=cfg.layer,
            dataset_path=cfg.dataset, context_size=cfg.ctx, prepend_bos=True, settings=dataclasses.asdict(cfg),
        ),
    )  # fmt: skip
    write_json(folder / "cfg.json", content)
    save_file(weights, folder / "sae_weights.safetensors.part")
    os.replace(folder / "sae_weights.safetensors.part", folder / "sae_weights.safetensors")


def load_sae(path, device="cpu"):
    """The autoencoder of a folder in SAELens's format, or of a Gemma Scope params.npz; its `cfg` is cfg.json's content.

    path: on disk, or REPOSITORY_OWNER/NAME/PATH on the Hugging Face Hub. Architectures topk, standard, jumprelu.
    """
    import numpy
    from safetensors.torch import load_file

    path = Path(path)
    if not path.exists() and len(path.parts) > 2:
        from huggingface_hub import snapshot_download

        repository, inside = "/".join(path.parts[:2]), "/".join(path.parts[2:])
        with loading(repository):
            path = Path(snapshot_download(repository, allow_patterns=[inside, f"{inside}/*"])) / inside
    path = path / "params.npz" if (path / "params.npz").exists() else path
    with loading(str(path)):
        if path.suffix == ".npz":
            cfg = dict(architecture="jumprelu", apply_b_dec_to_input=False, metadata={})
            weights = {name: torch.from_numpy(array).float() for name, array in numpy.load(path).items()}
        else:
            for name in ("cfg.json", "sae_weights.safetensors"):
                if not (path / name).exists():
                    raise InputError(f"{path} holds no trained autoencoder: {name} is missing")
            cfg = json.loads((path / "cfg.json").read_text())
            weights = {name: tensor.float() for name, tensor in load_file(path / "sae_weights.safetensors").items()}
        if cfg["architecture"] not in ("topk", "standard", "jumprelu"):
            raise InputError(f"{path}: an autoencoder of architecture {cfg['architecture']} can't be read")
        N, D = weights["W_dec"].shape
        sae = SAE(D, N, cfg.get("k", N))
        if cfg["architecture"] != "topk":
            sae.threshold = weights.setdefault("threshold", torch.zeros(N))
        if not cfg.get("apply_b_dec_to_input", True):  # encode() subtracts b_dec: add what that takes away
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        sae.load_state_dict(weights)
    sae.cfg = cfg
    return sae.to(device)


# -------------------------------------------------------------------------------------------------- demo


def library_texts():
    """Name and text of the documents of the demo: the standard library's sources and the topics of Python's help."""
    import sysconfig
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield name.as_posix(), text
    for name, text in sorted(topics.items()):
        yield f"help/{name}", text


def demo_files(cache):
    """Folder with the demo's model, train.jsonl and heldout.jsonl; they are made, in about 100 s, where there are none."""
    import shutil
    import zlib

    folder = cache / "demo-v1-python{}.{}".format(*sys.version_info)
    if folder.exists():
        return folder
    part = cache / f"{folder.name}.part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        splits = {"train": [], "heldout": []}
        for name, text in library_texts():
            splits["heldout" if zlib.crc32(name.encode()) % 10 == 0 else "train"].append(dict(name=name, text=text))
        for split, rows in splits.items():
            (part / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_demo_lm(*([row["text"] for row in splits[s]] for s in ("train", "heldout")), part)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def train_demo_lm(texts, heldout, folder, steps=1000, batch=8, ctx=128):
    """Train a byte-level BPE tokenizer and a small Gemma-2 on texts and save both; prints bits per byte on `heldout`."""
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import tqdm
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=ctx, max_position_embeddings=ctx,
    ))  # fmt: skip
    train_NL, heldout_NL = (torch.tensor(list(token_contexts([t], tokenizer, ctx))) for t in (texts, heldout))
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    order = torch.randperm(len(train_NL))[: steps * batch].split(batch)
    for step, rows in enumerate(tqdm(order, desc="demo language model", unit="step")):
        adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, 0.02 + 1.2 * (1 - step / steps))
        loss = lm(input_ids=train_NL[rows], labels=train_NL[rows]).loss
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
    sample_NL = heldout_NL[torch.randperm(len(heldout_NL))[:256]]
    with torch.inference_mode():
        nats = lm(input_ids=sample_NL, labels=sample_NL).loss.item() * sample_NL[:, 1:].numel()
    written = sum(len(text.encode()) for text in tokenizer.batch_decode(sample_NL, skip_special_tokens=True))
    print(f"demo language model: {nats / math.log(2) / written:.2f} bits per byte on held-out text")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------- main


def parse_args(argv):
    """Config of a command line; with --demo, settings that it does not name are those of DEMO."""
    parser = argparse.ArgumentParser(
        prog="sgo_sae.py", description=__doc__.splitlines()[0], add_help=False,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=28, width=110),
    )  # fmt: skip

    def fail(message):
        raise InputError(message)

    parser.error = fail
    group = None
    for field in dataclasses.fields(Config):
        options = dict(field.metadata)
        title = options.pop("group")
        if field.default is None:
            options["help"] += "%(default).0s"  # keeps the formatter from adding "(default: None)"
        group = parser.add_argument_group(title) if title else group
        if isinstance(field.default, bool):
            options["action"] = "store_true"
        else:
            options |= dict(type=type(field.default) if field.default is not None else str, metavar=field.name.upper())
            if "choices" in options:
                options["metavar"] = "{" + ",".join(options["choices"]) + "}"
        group.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    return Config(**vars(parser.parse_args(argv)))


def find_device(name):
    """The device of that name; auto is cuda where there is one, else cpu."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def find_dtype(name, device):
    """The dtype of that name; auto is bfloat16 on cuda, else float32."""
    return getattr(torch, name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def check(cfg):
    """Complete the settings that depend on others and refuse those that can't work; returns the device."""
    for name in ("dict", "k", "tokens", "batch", "lm_batch", "buffer", "log_every", "width"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(cfg, name)}")
    for name in ("alpha", "alpha_start", "alpha_warmup", "l1", "layer", "lr"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be 0 or more, but is {getattr(cfg, name)}")
    if not 0 <= cfg.decay_start <= 1:
        raise InputError(f"--decay-start is a share of the steps, 0 to 1, but is {cfg.decay_start}")
    if cfg.k > cfg.dict:
        raise InputError(f"--k {cfg.k} is more than the {cfg.dict} latents of --dict")
    if cfg.ctx < 2:
        raise InputError(f"--ctx must be at least 2, BOS and a token, but is {cfg.ctx}")
    if cfg.tokens < cfg.batch:
        raise InputError(f"--tokens {cfg.tokens} is less than one batch of {cfg.batch}")
    device = find_device(cfg.device)
    model = "demo" if cfg.demo else Path(cfg.model).name
    cfg.out = cfg.out or f"runs/{model}-l{cfg.layer}-n{cfg.dict}-a{cfg.alpha:g}-s{cfg.seed}"
    if (Path(cfg.out) / "sae_weights.safetensors").exists():
        raise InputError(f"{cfg.out} already holds a finished run: give another --out, or remove it")
    return device


def summary(cfg, m, seconds):
    """The table that a run ends with; figures are those of its last batch."""
    rows = [
        ("tokens", f"{m['tokens']:,} in {m['step']:,} steps"),
        ("explained variance", f"{m['explained_variance']:.4f}"),
        ("MSE per element", f"{m['mse']:.4g}"),
        ("cosine similarity", f"{m['cosine']:.4f}"),
        ("L0", f"{m['l0']:.1f}"),
        ("dead latents", f"{m['dead']:,} of {cfg.dict:,}, silent for {min(DEAD_AFTER, m['step'])} steps"),
        ("competition", f"{m['mean_max_w']:.3f}, mean over latents of max w_ij"),
        ("penalty", f"{m['penalty_share']:.2%} of the reconstruction term"),
        ("peak memory", f"{m['memory_gb']:.1f} GB"),
        ("time", f"{seconds:.0f} s"),
        ("saved in", cfg.out),
    ]
    return "\n" + "\n".join(f"{name:<20}{value}" for name, value in rows)


def quiet_libraries():
    """Errors are reported by us, in one line, and files are read without a progress bar each."""
    import datasets
    import huggingface_hub
    import transformers

    for library in (datasets, huggingface_hub, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main(argv):
    started = time.perf_counter()
    try:
        cfg = parse_args(argv)
        device = check(cfg)
        if cfg.bench:
            print(bench(cfg, device))
            return 0
        quiet_libraries()
        if cfg.demo:
            cache = Path(cfg.cache or os.environ.get("SGO_CACHE") or Path.home() / ".cache" / "sgo_sae")
            folder = demo_files(cache)
            cfg.model, cfg.dataset = str(folder), str(folder / "train.jsonl")
        metrics = train(cfg, device)
    except InputError as error:
        print(f"sgo_sae.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsgo_sae.py: interrupted", file=sys.stderr)
        return 130
    print(summary(cfg, metrics, time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
