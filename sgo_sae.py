"""Sparse autoencoders with sparsity-guided orthogonality (SGO), in one file.

    python sgo_sae.py --demo                           a small model on this machine, nothing to download
    python sgo_sae.py --dict 18432 --alpha 0.075       the paper's run 4: Gemma-2-2B, layer 12, 10 M tokens
    torchrun --nproc-per-node=4 sgo_sae.py             the same on four GPUs
    python sgo_sae.py --help                           every setting

A top-k sparse autoencoder is trained on a language model's activations with one more term in its loss, which pushes
latents apart in proportion to how often they are active on the same tokens (Eq. 2 and 3 of "Feature Specialization
Through Sparsity-Guided Orthogonality", whose numbers stand here). The paper is in the section `method`, to be copied
from here, and in `training_step`; the rest feeds them, keeps a run alive and reports it. Shapes are in the names:
B tokens, L positions, D hidden size, N latents, K active latents of a token, E entries of a (B, K) array, T of a tile.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import resource
import signal
import sys
import time
import zlib
from collections import deque
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, islice, product
from pathlib import Path

import torch
import torch.distributed as dist


# ---------------------------------------------------------------------------------------------- settings
def setting(default, help, group=None, least=None, **options):
    """A field of Config: default, line in --help, the group that begins with it, the least value it may have."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "least": least, "more": options})


ARCHITECTURES = {"topk": "topk", "batchtopk": "jumprelu", "relu": "standard", "jumprelu": "jumprelu"}  # SAELens's names
STEERED = ("relu", "jumprelu")  # their L0 depends on λ
DTYPES = ("auto", "float32", "bfloat16", "float16")
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclasses.dataclass
class Config:
    """Every setting of a run; each field is a flag. The defaults are the paper's run 4."""

    arch: str = setting("topk", "architecture; lists make a grid", "autoencoder", choices=ARCHITECTURES, nargs="+")
    dict: int = setting(18432, "number of latents N", least=1, nargs="+")
    k: int = setting(320, "active latents per token; on average where --arch is not topk", least=1, nargs="+")
    alpha: float = setting(0.075, "weight of the SGO penalty; 0 trains without it", "loss (Eq. 2)", 0, nargs="+")
    alpha_start: float = setting(0.01, "weight at step 0, from which alpha is approached linearly", least=0)
    alpha_warmup: int = setting(1000, "steps until alpha is reached", least=0)
    sparsity: float = setting(0.04, "lambda; relu and jumprelu adjust it from there until L0 is k", least=0)
    penalty: str = setting("sum", "f of Eq. 2: activations (sum) or decoder directions", choices=("sum", "decoder"))
    tokens: int = setting(10_000_000, "tokens to train on", "training", 1)
    batch: int = setting(2048, "tokens in a training step", least=1)
    lr: float = setting(3e-4, "learning rate of Adam", least=0)
    decay_start: float = setting(0.875, "share of the steps after which the learning rate falls linearly to 0", least=0)
    normalize: bool = setting(False, "scale activations to a mean squared norm of D; folded back when saved")
    seed: int = setting(0, "seed of the initialisation", least=0, nargs="+")
    data_seed: int = setting(0, "seed of the order of the data", least=0)
    model: str = setting("google/gemma-2-2b", "language model: Hugging Face id or local folder", "activations")
    layer: int = setting(12, "layer whose output is used, from 0", least=0)
    dataset: str = setting("monology/pile-uncopyrighted", "Hugging Face id; file or folder of txt, json, csv, parquet")
    subset: str = setting(None, "configuration of the dataset, where it has several")
    split: str = setting("train", "split of a Hugging Face dataset")
    text_column: str = setting("text", "column that holds the text")
    ctx: int = setting(128, "tokens in a context, BOS included", least=2)
    lm_batch: int = setting(32, "contexts in a forward pass of the language model", least=1)
    buffer: int = setting(2048, "contexts whose activations are harvested and shuffled at a time", least=1)
    device: str = setting("auto", "cuda, cuda:1, cpu, mps; auto is cuda where there is one, else cpu", "run")
    dtype: str = setting("auto", "the model's; auto is bfloat16 on cuda, else float32", choices=DTYPES)
    out: str = setting(None, "folder of the result, or of a grid's (default: runs/MODEL-lLAYER-ARCH-...)")
    log_every: int = setting(50, "steps between lines of metrics.jsonl", least=1)
    save_every: int = setting(500, "steps between checkpoints; 0 writes one only when the run is stopped", least=0)
    resume: bool = setting(False, "continue from the checkpoint in the folder of the result, where there is one")
    demo: bool = setting(False, "small Gemma-2 and text made on this machine, other settings scaled to them")


DEMO = {"dict": 1024, "k": 16, "layer": 1, "tokens": 1_228_800, "lr": 1e-3, "alpha_warmup": 120, "buffer": 1024}


class InputError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


# ------------------------------------------------------------------------------------------------ method
embedding_bag = torch.nn.functional.embedding_bag  # sums of rows, weighted


class SparseEncode(torch.autograd.Function):
    """ReLU of the pre-activations that `select` picks on each token; backward costs O(BKD), a dense one's is O(BND)."""

    @staticmethod
    def forward(ctx, x_BD, W_enc_DN, b_enc_N, b_dec_D, select):
        x_BD = x_BD - b_dec_D
        vals_BK, idx_BK = select(torch.addmm(b_enc_N, x_BD, W_enc_DN))
        vals_BK = vals_BK.relu().to(x_BD.dtype)
        ctx.save_for_backward(x_BD, W_enc_DN, vals_BK, idx_BK)
        ctx.mark_non_differentiable(idx_BK)
        return vals_BK, idx_BK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_BK, _):
        x_BD, W_enc_DN, vals_BK, idx_BK = ctx.saved_tensors
        N, K = W_enc_DN.shape[1], idx_BK.shape[1]
        g_BK = g_BK * (vals_BK > 0)
        g_b_enc_N = g_BK.new_zeros(N).scatter_add_(0, idx_BK.flatten(), g_BK.flatten())
        # The gradient of row n of W_encᵀ is a weighted sum of the tokens on which n is active: sort entries by latent.
        latent_E, entry_E = idx_BK.flatten().sort(stable=True)
        first_N = torch.searchsorted(latent_E, torch.arange(N, device=latent_E.device))
        g_W_ND = embedding_bag(entry_E // K, x_BD, first_N, per_sample_weights=g_BK.flatten()[entry_E], mode="sum")
        wanted = ctx.needs_input_grad[0]
        g_x_BD = embedding_bag(idx_BK, W_enc_DN.T, per_sample_weights=g_BK, mode="sum") if wanted else None
        return g_x_BD, g_W_ND.T, g_b_enc_N, -(W_enc_DN @ g_b_enc_N), None


class SAE(torch.nn.Module):
    """Top-k sparse autoencoder (4.2): f = TopK(ReLU((x - b_dec) W_enc + b_enc)), x̂ = f W_dec + b_dec.

    W_enc (D, N), b_enc (N,), W_dec (N, D) with rows of unit length, b_dec (D,).
    """

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__()
        self.k = k
        W_dec_ND = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        # The encoder starts as the decoder's transpose, and lies in memory like it: latent by latent.
        self.W_enc = torch.nn.Parameter(W_dec_ND.clone().T)
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.W_dec = torch.nn.Parameter(W_dec_ND)
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))

    device = property(lambda self: self.W_dec.device)
    dtype = property(lambda self: self.W_dec.dtype)

    def select(self, pre_BN):
        """Values and latents, (B, K), of the pre-activations that may be active: the k largest of each token."""
        return pre_BN.topk(self.k, dim=1, sorted=False)

    def sparse(self, x_BD):
        """Sparse latents of x (B, D), to train with: values (B, K), at least 0, and their latents (B, K)."""
        return SparseEncode.apply(x_BD, self.W_enc, self.b_enc, self.b_dec, self.select)

    def decode_sparse(self, vals_BK, idx_BK):
        """Reconstruction (B, D) of sparse latents."""
        return embedding_bag(idx_BK, self.W_dec, per_sample_weights=vals_BK, mode="sum") + self.b_dec

    def encode(self, x):
        """Dense latents (..., N) of x (..., D)."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        vals, idx = pre.topk(self.k, dim=-1, sorted=False)
        return dense_latents(vals.relu(), idx, len(self.b_enc))

    def decode(self, f):
        """Reconstruction (..., D) of dense latents f (..., N)."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x):
        """Reconstruction of x (..., D)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def project_decoder_gradient(self):
        """Remove from each row's gradient the part along the row (4.2), which normalisation would undo."""
        self.W_dec.grad.addcmul_(self.W_dec, torch.linalg.vecdot(self.W_dec.grad, self.W_dec)[:, None], value=-1)

    @torch.no_grad()
    def normalize_decoder(self):
        """Rescale each row of W_dec to unit length (4.2)."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def coactivation_weights(f_BI, f_BJ):
    """Eq. 3: w_ij = |M_i ∩ M_j| / min(|M_i|, |M_j|), (I, J), of two blocks of latents; 0 where either never fires."""
    m_BI, m_BJ = (f_BI > 0).to(f_BI.dtype), (f_BJ > 0).to(f_BJ.dtype)
    return (m_BI.T @ m_BJ).div_(torch.minimum(m_BI.sum(0)[:, None], m_BJ.sum(0)).clamp(min=1))


def sgo_penalty_reference(f_BN):
    """Eq. 2 as printed, to read and test by: Ω = Σ_{i≠j} w_ij ⟨f_i, f_j⟩², where ⟨f_i, f_j⟩ = Σ_b f_bi f_bj / B."""
    w_NN = coactivation_weights(f_BN.detach(), f_BN.detach()).fill_diagonal_(0)
    gram_NN = f_BN.T @ f_BN / len(f_BN)
    return (w_NN * gram_NN**2).sum()


def dense_latents(vals, idx, d_sae):
    """Dense latents (..., N) of sparse ones (..., K)."""
    return vals.new_zeros(*vals.shape[:-1], d_sae).scatter_add(-1, idx, vals)


def penalty_gradient_tiled(vals_BK, idx_BK, d_sae, tile=2048):
    """∂Ω/∂f on the active entries, (B, K), by dense products: O(BN²) time, O(BN + N tile) memory."""
    f_BN = dense_latents(vals_BK, idx_BK, d_sae)
    grad_BN = torch.zeros_like(f_BN)
    for lo in range(0, d_sae, tile):
        f_BT, f_BJ = f_BN[:, lo : lo + tile], f_BN[:, lo:]  # pairs right of the diagonal serve both sides
        w_gram_TJ = coactivation_weights(f_BT, f_BJ).mul_(f_BT.T @ f_BJ).fill_diagonal_(0)
        grad_BN[:, lo : lo + tile].addmm_(f_BJ, w_gram_TJ.T)
        grad_BN[:, lo + tile :].addmm_(f_BT, w_gram_TJ[:, tile:])
    return grad_BN.gather(1, idx_BK) * (vals_BK > 0) * (4 / len(vals_BK) ** 2)


def penalty_gradient_pairwise(vals_BK, idx_BK, d_sae, cells=1 << 18):
    """The same, pair by co-active pair: O(BK²) time and a pass over N² cells, O(BK + cells) memory."""
    B, K = vals_BK.shape
    idx_BK = torch.where(vals_BK > 0, idx_BK, d_sae)  # a slot that holds 0 is not active: it becomes latent N
    latent_E, entry_E = idx_BK.flatten().sort(stable=True)
    size_N = torch.bincount(latent_E, minlength=d_sae + 1)  # |M_i|
    end_N, size_N = [0, *size_N.cumsum(0).tolist()], size_N.to(vals_BK.dtype).clamp_(min=1)
    grad_E, tile = vals_BK.new_zeros(B * K), max(1, cells // (d_sae + 1))
    for lo in range(0, d_sae, tile):
        hi = min(lo + tile, d_sae)
        i_E, e_E = latent_E[end_N[lo] : end_N[hi]], entry_E[end_N[lo] : end_N[hi]]
        f_E1, f_EK = vals_BK.flatten()[e_E, None], vals_BK[e_E // K]
        pair_EK = idx_BK[e_E // K] + (i_E - lo)[:, None] * (d_sae + 1)  # cell of pair (i, j) in a (T, N + 1) array
        both_TN, gram_TN = vals_BK.new_zeros(2, hi - lo, d_sae + 1)
        both_TN.view(-1).scatter_add_(0, pair_EK.flatten(), vals_BK.new_ones(()).expand(pair_EK.numel()))  # |M_i ∩ M_j|
        gram_TN.view(-1).scatter_add_(0, pair_EK.flatten(), (f_E1 * f_EK).flatten())  # B ⟨f_i, f_j⟩
        w_gram_TN = both_TN.div_(torch.minimum(size_N[lo:hi, None], size_N)).mul_(gram_TN)  # Eq. 3
        w_gram_TN.diagonal(lo).zero_()  # i = j
        grad_E[e_E] = torch.linalg.vecdot(w_gram_TN.take(pair_EK), f_EK)
    return grad_E.view(B, K) * (4 / B**2)


def sgo_penalty(vals_BK, idx_BK, d_sae):
    """Eq. 2's Ω from sparse latents: sgo_penalty_reference to rounding, by what was the faster way above (README).

    vals_BK: activations, at least 0; idx_BK: their latents, no latent twice on a token. Differentiable once, in vals.
    ∂Ω/∂f_bi = (4/B) Σ_j f_bj w_ij ⟨f_i, f_j⟩, and Ω is homogeneous of degree 4 in f, so Ω = ¼ Σ f ∂Ω/∂f (Euler).
    """
    f_BK = vals_BK.detach()
    pairwise = f_BK.device.type == "cpu" and d_sae**2 > 225 * (f_BK > 0).sum(1).float().mean() * f_BK.shape[1]
    grad_BK = (penalty_gradient_pairwise if pairwise else penalty_gradient_tiled)(f_BK, idx_BK, d_sae)
    return (f_BK * grad_BK).sum() / 4 + ((vals_BK - f_BK) * grad_BK).sum()  # Ω and 0, with the gradient of Ω


def alpha_at(step, alpha=0.075, start=0.01, warmup=1000):
    """Weight of Ω at a step: linear over `warmup` steps from `start`, or `alpha` if that is less, to `alpha` (4.2)."""
    start = min(start, alpha)
    return start + (alpha - start) * min(1.0, step / max(1, warmup))


def lr_at(step, lr=3e-4, decay_start=4271, steps=4882):
    """Learning rate at a step: constant, then from `decay_start` linear to 0 at `steps` (5.1)."""
    return lr * min(1.0, (steps - step) / max(1, steps - decay_start))


def geometric_median(x_BD, iterations=100, tol=1e-6):
    """The point (D,) of least total distance to the rows of x, by Weiszfeld's iteration; b_dec starts there (5.1)."""
    median_D = x_BD.mean(0)
    for _ in range(iterations):
        distance_B = (x_BD - median_D).norm(dim=1).clamp(min=1e-12)
        previous_D, median_D = median_D, (1 / distance_B) @ x_BD / (1 / distance_B).sum()
        if (median_D - previous_D).norm() <= tol * distance_B.mean():
            break
    return median_D


# --------------------------------------------------------------------------------------------- baselines
class Baseline(SAE):
    """The architectures the paper compares with: a latent is active above a threshold, not among a token's k largest.

    relu: 0 (Eq. 1). jumprelu: learned, as exp(30 p), since λ moves fast. batchtopk: what leaves the B k largest of a
    process's batch, and after training the running mean of that.
    """

    def __init__(self, d_in, d_sae, k, arch):
        super().__init__(d_in, d_sae, k)
        self.arch = arch
        if arch == "jumprelu":
            self.log_theta = torch.nn.Parameter(torch.zeros(d_sae))
        else:
            self.register_buffer("theta", torch.zeros(d_sae))

    def threshold(self):
        return (30 * self.log_theta).exp() if self.arch == "jumprelu" else self.theta

    @torch.no_grad()
    def calibrate(self, x_BD):
        """Start where the mean L0 on x is k: relu by its bias, jumprelu by its threshold, which must be over 0."""
        x_BD = x_BD[: 2**26 // len(self.b_enc)]  # 0.3 GB of pre-activations are sample enough
        pre_BN = (x_BD - self.b_dec) @ self.W_enc
        cut = pre_BN.flatten().topk(len(x_BD) * self.k, sorted=False).values.min()
        theta = cut.clamp(min=0.1 * pre_BN.std()) if self.arch == "jumprelu" else 0.0
        self.b_enc.fill_(theta - cut)
        if self.arch == "jumprelu":
            self.log_theta.fill_(theta.log() / 30)

    def select(self, pre_BN):
        if self.arch == "batchtopk":
            vals, cells = pre_BN.flatten().topk(len(pre_BN) * self.k, sorted=False)
            pre_BN = torch.zeros_like(pre_BN).view(-1).scatter_(0, cells, vals).view_as(pre_BN)
            least = vals.min().clamp(min=0).to(self.theta.dtype)
            self.theta.copy_(torch.where(self.theta > 0, self.theta.lerp(least, 0.05), least))  # over about 20 batches
        elif self.arch == "jumprelu":  # what is under the threshold, from half of it, counts in its gradient
            pre_BN = torch.where(pre_BN > 0.5 * self.threshold(), pre_BN, 0)
        most = (pre_BN > 0).sum(1).max().clamp(min=1).item()
        return pre_BN.topk(most, dim=1, sorted=False)

    def sparse(self, x_BD):
        vals_BK, idx_BK = super().sparse(x_BD)
        if self.arch == "jumprelu":
            theta_BK = self.threshold().index_select(0, idx_BK.flatten()).view_as(vals_BK)
            fixed_BK = theta_BK.detach()
            on_BK = (vals_BK > fixed_BK).to(vals_BK.dtype)
            # A step has no gradient in θ: a rectangle of width ε = θ stands for it (Rajamanoharan et al. 2024).
            near_BK = (vals_BK - fixed_BK).abs() < fixed_BK / 2
            shift_BK = near_BK * (theta_BK / fixed_BK - 1)  # 0, but for its gradient
            self.active_BK = on_BK - shift_BK
            vals_BK = vals_BK * on_BK - fixed_BK * shift_BK
        return vals_BK, idx_BK

    def encode(self, x):
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        return pre.relu() * (pre > self.threshold())


def sgo_penalty_decoder(vals_BK, idx_BK, W_dec_ND, tile=1024):
    """Ω with decoder directions for f: Σ_{i≠j} w_ij ⟨W_i, W_j⟩². Differentiable once, in W_dec: 4 (w ∘ W Wᵀ) W."""
    W_ND = W_dec_ND.detach()
    f_BN = dense_latents(vals_BK.detach(), idx_BK, len(W_ND))
    omega, grad_ND = W_ND.new_zeros(()), torch.zeros_like(W_ND)
    for lo in range(0, len(W_ND), tile):
        gram_TN = W_ND[lo : lo + tile] @ W_ND.T
        w_gram_TN = gram_TN * coactivation_weights(f_BN[:, lo : lo + tile], f_BN)
        w_gram_TN.diagonal(lo).zero_()
        omega += (w_gram_TN * gram_TN).sum()
        grad_ND[lo : lo + tile] = 4 * w_gram_TN @ W_ND
    return omega + ((W_dec_ND - W_ND) * grad_ND).sum()


# ------------------------------------------------------------------------------------------- activations
@contextmanager
def loading(what):
    """Turns what the Hub's libraries and file readers raise while they load `what` into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # readers, decompressors and network layers raise what they like
        hint = "" if Path(what).exists() else "; --demo needs no download"
        raise InputError(f"{what} can't be loaded: {' '.join(str(error).split())[:400]}{hint}") from error


def load_lm(cfg, device, dtype, head=False):
    """The language model up to `cfg.layer`, or whole with its head; the list of its layers; its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    with loading(cfg.model):
        lm_config = AutoConfig.from_pretrained(cfg.model)
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, split_special_tokens=True)  # text that spells <bos> too
        text_config = lm_config.get_text_config()
        if cfg.layer >= (n_layers := text_config.num_hidden_layers):
            raise InputError(f"--layer {cfg.layer}: the layers of {cfg.model} are 0 to {n_layers - 1}")
        if set(tokenizer("some text", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
            raise InputError(f"{cfg.model} has no tokenizer that can split text into tokens")
        text_config.num_hidden_layers = n_layers if head else cfg.layer + 1
        load = (AutoModelForCausalLM if head else AutoModel).from_pretrained
        lm, report = load(cfg.model, config=lm_config, dtype=dtype, output_loading_info=True)
    if missing := [name for name in report["missing_keys"] if "pooler" not in name]:
        raise InputError(f"{cfg.model}: its files lack {len(missing)} of the model's tensors, {missing[0]} among them")
    text_model = lm.get_decoder()  # of a multimodal model, what reads text
    lists = [m for m in text_model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=lambda m: (len(m) == text_config.num_hidden_layers, sum(p.numel() for p in m.parameters())))
    return (lm if head else text_model).eval().to(device), layers, tokenizer


def load_texts(cfg):
    """The dataset as a stream of rows, shuffled; checks that it can be read and has the text column."""
    import datasets

    path, source, options = Path(cfg.dataset), cfg.dataset, {"name": cfg.subset}
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        kinds = {str(f): READERS[suffix] for f in files for suffix in f.suffixes if suffix in READERS}
        if len(set(kinds.values())) != 1:
            raise InputError(f"{path}: one of the formats {', '.join(READERS)} is needed, compressed or not")
        (source,), options = set(kinds.values()), {"data_files": list(kinds)}
        options |= {"sample_by": "paragraph"} if source == "text" else {}
        if source != "parquet":  # "utf8", since `datasets` heeds encoding_errors in json where this is not "utf-8"
            options |= {"encoding": "utf8", "encoding_errors": "replace"}
    with loading(cfg.dataset):
        stream = datasets.load_dataset(source, split=cfg.split, streaming=True, **options)
        first = next(iter(stream), {cfg.text_column: ""})
        if cfg.text_column not in first:
            raise InputError(f"--text-column {cfg.text_column}: the columns of {cfg.dataset} are {', '.join(first)}")
        stream = stream.filter(lambda row: isinstance(row[cfg.text_column], str) and row[cfg.text_column].strip() != "")
        if next(iter(stream), None) is None:
            raise InputError(f"{cfg.dataset} holds no text")
    return stream.shuffle(seed=cfg.data_seed, buffer_size=1000)


def read_texts(stream, cfg, at):
    """Texts, without end, in another order each time through; `at`, the epoch and its rows read, is kept up to date."""
    while True:
        stream.set_epoch(at["epoch"])
        with loading(cfg.dataset):
            for row in islice(stream, at["row"], None):
                at["row"] += 1
                yield row[cfg.text_column]
        if at["epoch"] == 0 and ranks()[0] == 0:
            print("\nall the data has been used once: starting over, reshuffled", file=sys.stderr)
        at |= {"epoch": at["epoch"] + 1, "row": 0}


def token_contexts(texts, tokenizer, ctx, rest):
    """Contexts of `ctx` token ids: BOS, then the texts in a row, EOS after each; the deque `rest` is what is left."""
    bos = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None][:1]
    eos = [i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None][:1]
    for text in texts:
        rest.extend(tokenizer(text, add_special_tokens=False)["input_ids"] + eos)
        while len(rest) >= ctx - len(bos):
            yield bos + [rest.popleft() for _ in range(ctx - len(bos))]


def special_ids(tokenizer):
    """Ids of BOS, EOS and padding, whose activations the autoencoder never sees."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    return sorted({i for name in names if (i := getattr(tokenizer, name)) is not None})


@torch.inference_mode()
def hooked(lm, layer, ids_BL):
    """Output of `layer` (B, L, D) when the language model reads the token ids (B, L)."""
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    lm(input_ids=ids_BL)
    handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def progress_bar(work=None, **options):
    """tqdm, with a line every 10 s where the output is no terminal."""
    from tqdm import tqdm

    return tqdm(work, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10, **options)


def batches(cfg, stream, lm, layer, tokenizer, position=None):
    """Activations (B, D), float32, without end: a round of contexts is read, shuffled and served, then the next.

    With each batch comes the position after it: where the data stood when its round began, and what is served of the
    round; from a position on, the same batches follow again. What is left of a round and fills no batch is dropped.
    """
    (rank, world), tokens = ranks(), cfg.ctx - 1
    # A round fills a batch even where every document is a token and EOS, and is no longer than the run needs.
    R = max(2 * math.ceil(cfg.batch / tokens), min(cfg.buffer, math.ceil(1.1 * cfg.tokens / tokens)))
    B, R = cfg.batch // world, math.ceil(R / world) * world
    at = position or {"epoch": 0, "row": 0, "rest": [], "round": 0, "served": 0}
    rest, special = deque(at["rest"]), torch.tensor(special_ids(tokenizer), device=lm.device)
    x_CD = torch.empty(R // world * cfg.ctx, lm.config.hidden_size, dtype=lm.dtype, device=lm.device)  # 1.2 GB in run 4
    contexts, known = token_contexts(read_texts(stream, cfg, at), tokenizer, cfg.ctx, rest), lm.get_input_embeddings()
    while True:
        began, filled = at | {"rest": list(rest)}, 0
        ids_RL = torch.tensor(list(islice(contexts, R)), device=lm.device)[rank::world]  # processes take turns
        if ids_RL.max() >= known.num_embeddings:
            raise InputError(f"the tokenizer gives the id {ids_RL.max()}, the model has {known.num_embeddings} tokens")
        for ids_BL in progress_bar(ids_RL.split(cfg.lm_batch), desc="activations", leave=False, disable=rank > 0):
            x_BD = hooked(lm, layer, ids_BL)[~torch.isin(ids_BL, special)]
            if not torch.isfinite(x_BD).all():
                raise InputError("the language model's activations are not finite; try --dtype float32")
            x_CD[filled : filled + len(x_BD)] = x_BD
            filled += len(x_BD)
        C = reduced(torch.tensor(filled, device=x_CD.device), dist.ReduceOp.MIN).item() // B * B
        generator = torch.Generator().manual_seed((cfg.data_seed << 20) + at["round"])
        order_C = torch.randperm(C, generator=generator).to(x_CD.device)
        for start in range(at["served"], C, B):
            yield x_CD[order_C[start : start + B]].float(), began | {"served": start + B}
        at |= {"round": at["round"] + 1, "served": 0}


# ---------------------------------------------------------------------------------------------- training
def ranks():
    """Rank of this process and number of processes that train together; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def reduced(t, op=dist.ReduceOp.SUM):
    """Sum, maximum or minimum of a tensor over the processes; in place."""
    if ranks()[1] > 1:
        dist.all_reduce(t, op)
    return t


def gathered(t_BK):
    """The rows of all processes in the order of their ranks, K made equal by zeros; gradients reach this one's rows."""
    rank, world = ranks()
    if world == 1:
        return t_BK
    K = reduced(torch.tensor(t_BK.shape[1], device=t_BK.device), dist.ReduceOp.MAX).item()
    t_BK = torch.nn.functional.pad(t_BK, (0, K - t_BK.shape[1])).contiguous()
    parts = [torch.empty_like(t_BK) for _ in range(world)]
    dist.all_gather(parts, t_BK.detach())
    return torch.cat([*parts[:rank], t_BK, *parts[rank + 1 :]])


def training_step(sae, adam, x_BD, cfg, alpha, lr, lam):
    """One update by Eq. 2's loss on this process's part of a batch, (B, D); None where a gradient is not finite."""
    world = ranks()[1]
    tokens = world * len(x_BD)
    with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=x_BD.is_cuda):  # the encoder's product (5.1)
        vals_BK, idx_BK = sae.sparse(x_BD)
    error_BD = x_BD - sae.decode_sparse(vals_BK, idx_BK)
    # Sums over this process's tokens are divided by those of all: gradients of processes add up to the batch's.
    reconstruction = error_BD.square().sum() / tokens
    sparsity = (sae.active_BK if cfg.arch == "jumprelu" else vals_BK).sum() / tokens  # ‖f‖₀ or ‖f‖₁
    l0, next_lam = reduced((vals_BK > 0).sum() / tokens), lam
    if cfg.arch in STEERED:
        excess = (l0 / cfg.k).clamp(1 / math.e, math.e)  # PI control of log(L0/k), no faster than the weights answer
        lam, next_lam = lam * excess**4, lam * excess ** (100 * lr)
    omega = x_BD.new_zeros(())
    if alpha and cfg.penalty == "sum":
        omega = sgo_penalty(gathered(vals_BK), gathered(idx_BK), cfg.dict)
    elif alpha:
        omega = sgo_penalty_decoder(gathered(vals_BK), gathered(idx_BK), sae.W_dec)
    copies = world if cfg.penalty == "decoder" else 1  # every process has the whole gradient in W_dec
    loss = reconstruction + lam * sparsity + alpha * omega / copies

    adam.zero_grad()
    loss.backward()
    for p in sae.parameters():
        reduced(p.grad)
    sae.project_decoder_gradient()
    if not torch.isfinite(torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)):
        return None
    adam.param_groups[0]["lr"] = lr
    adam.step()
    sae.normalize_decoder()
    part = {"loss": loss, "reconstruction": reconstruction, "l0": l0, "omega": omega, "lambda": lam}
    part |= {"next_lambda": next_lam, "vals_BK": vals_BK, "idx_BK": idx_BK, "error_BD": error_BD}
    return {name: tensor.detach() for name, tensor in part.items()}


def max_coactivation(f_BN, tile=1024):
    """max_j≠i w_ij of each latent, (N,): how strongly it competes with its closest rival; 0 where it never fires."""
    max_N = f_BN.new_zeros(f_BN.shape[1])
    for lo in range(0, len(max_N), tile):
        w_TN = coactivation_weights(f_BN[:, lo : lo + tile], f_BN)
        w_TN.diagonal(lo).zero_()
        max_N[lo : lo + tile] = w_TN.amax(1)
    return max_N


class Run(torch.nn.Module):
    """An autoencoder in training: settings, weights, optimiser, sparsity coefficient λ, and what its metrics need."""

    def __init__(self, cfg, sample_BD, median_D):
        super().__init__()
        torch.manual_seed(cfg.seed)
        self.cfg, self.history, self.failure = cfg, [], None
        sizes = (sample_BD.shape[1], cfg.dict, cfg.k)
        self.sae = SAE(*sizes) if cfg.arch == "topk" else Baseline(*sizes, cfg.arch)
        self.register_buffer("lam", torch.tensor(cfg.sparsity))
        self.register_buffer("fired_N", torch.zeros(cfg.dict, dtype=torch.long))  # step after which it last fired
        self.to(sample_BD.device)
        self.sae.b_dec.data.copy_(median_D)
        if cfg.arch in STEERED:
            self.sae.calibrate(sample_BD)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999), fused=True)

    def step(self, x_BD, step, steps):
        """One update, with the coefficients of that step; a gradient that is not finite ends this run alone."""
        cfg = self.cfg
        self.alpha = alpha_at(step, cfg.alpha, cfg.alpha_start, cfg.alpha_warmup)
        self.lr = lr_at(step, cfg.lr, int(cfg.decay_start * steps), steps)
        self.part = training_step(self.sae, self.adam, x_BD, cfg, self.alpha, self.lr, self.lam)
        if self.part is None:
            self.failure = f"{cfg.out}: gradient not finite at step {step}"
            return
        self.lam = self.part["next_lambda"]
        self.fired_N[self.part["idx_BK"][self.part["vals_BK"] > 0]] = step + 1

    def measure(self, x_BD, step, tokens_per_s, dead_after=200):
        """Adds the figures of the last update to `history` and metrics.jsonl; what did not fire for so long is dead."""
        cfg, part = self.cfg, self.part
        x_BD, error_BD = gathered(x_BD), gathered(part["error_BD"])
        f_BN = dense_latents(gathered(part["vals_BK"]), gathered(part["idx_BK"]), cfg.dict)
        competition_N = max_coactivation(f_BN)
        m = {"step": step, "tokens": step * cfg.batch, "tokens_per_s": tokens_per_s, "alpha": self.alpha, "lr": self.lr}
        m |= {name: part[name].item() for name in ("lambda", "l0", "omega")}
        m |= {"reconstruction": error_BD.square().sum(1).mean().item(), "l1": f_BN.sum(1).mean().item()}
        penalty, sparsity = m["alpha"] * m["omega"], m["lambda"] * m["l0" if cfg.arch == "jumprelu" else "l1"]
        m |= {"loss": m["reconstruction"] + sparsity + penalty, "penalty_share": penalty / m["reconstruction"]}
        m["mse"] = error_BD.square().mean().item()
        m["explained_variance"] = 1 - (error_BD.square().sum() / (x_BD - x_BD.mean(0)).square().sum()).item()
        m["cosine"] = torch.cosine_similarity(x_BD, x_BD - error_BD, dim=1).mean().item()
        m["mean_max_w"] = competition_N[competition_N > 0].mean().nan_to_num().item()
        m["dead"] = (reduced(self.fired_N.clone(), dist.ReduceOp.MAX) <= max(0, step - dead_after)).sum().item()
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        m["memory_gb"] = (torch.cuda.max_memory_allocated() if x_BD.is_cuda else 1024 * kilobytes) / 1e9
        self.history.append(m)
        if ranks()[0] == 0:
            with open(Path(cfg.out, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(m) + "\n")
            if m["penalty_share"] > 1 and all(past["penalty_share"] <= 1 for past in self.history[:-1]):
                what = f"{cfg.out}: the penalty weighs {m['penalty_share']:.3g} times the reconstruction"
                print(f"\n{what}: activations are large, use --normalize or a smaller --alpha", file=sys.stderr)

    def figures(self):
        """The last figures, for the progress bar and the end."""
        m = self.history[-1]
        competition = f"max w {m['mean_max_w']:.3f}  αΩ/rec {m['penalty_share']:.2%}"
        figures = f"EV {m['explained_variance']:.4f}  MSE {m['mse']:<6.4g}  cosine {m['cosine']:.4f}  L0 {m['l0']:.1f}"
        return f"{figures}  dead {m['dead'] / self.cfg.dict:.2%}  {competition}"


def start(cfgs, data, steps, saved, folder):
    """The runs and the factor for their activations, as they start or as they were saved; the batches looked at."""
    batches_seen = list(islice(data, min(steps, math.ceil(16384 / cfgs[0].batch))))
    sample_BD = gathered(torch.cat([x_BD for x_BD, _ in batches_seen]))
    scale = (sample_BD.shape[1] / sample_BD.square().sum(1).mean()).sqrt().item() if cfgs[0].normalize else 1.0
    scale = saved["scale"] if saved else scale
    median_D = geometric_median(sample_BD * scale)
    runs = [Run(cfg, sample_BD * scale, median_D) for cfg in cfgs]
    for run, state in zip(runs, saved["runs"] if saved else []):
        run.load_state_dict(state["weights"])
        run.adam.load_state_dict(state["adam"])
        run.failure, run.history = state["failure"], state["history"]
    if ranks()[0] == 0:
        for run in runs:
            Path(run.cfg.out).mkdir(parents=True, exist_ok=True)
            Path(run.cfg.out, "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in run.history))
        versions = {name: version(name) for name in ("torch", "transformers", "datasets", "numpy")}
        settings = {"settings": [dataclasses.asdict(cfg) for cfg in cfgs], "versions": versions}
        Path(folder, "settings.json").write_text(json.dumps(settings, indent=2))
    return runs, scale, batches_seen


def train(cfgs, folder, device, dtype):
    """Train autoencoders on the same batches and save each in its `out`; returns their Runs, the steps done, and the
    number of the signal that stopped them, or 0. Their settings differ in arch, dict, k, alpha, seed and out alone.
    """
    cfg, path, rank = cfgs[0], folder / "checkpoint.pt", ranks()[0]
    torch.set_float32_matmul_precision("high")
    steps = cfg.tokens // cfg.batch
    saved = load_checkpoint(path, cfgs) if cfg.resume and path.exists() else None
    first = saved["step"] if saved else 0
    stream = load_texts(cfg)
    lm, layers, tokenizer = load_lm(cfg, device, dtype)
    data = batches(cfg, stream, lm, layers[cfg.layer], tokenizer, saved["position"] if saved else None)
    if rank == 0:
        print(f"model   {cfg.model}, layer {cfg.layer}, D {lm.config.hidden_size}, {str(dtype)[6:]} on {device}")
        print(f"text    {cfg.dataset}, contexts of {cfg.ctx} tokens")
        for c in cfgs:
            print(f"sae     {c.arch}, N {c.dict:,}, k {c.k}, alpha {c.alpha:g} ({c.penalty}), seed {c.seed}")
        print(f"run     steps {first:,} to {steps:,} of {cfg.batch:,} tokens, into {folder}", flush=True)
    runs, scale, seen = start(cfgs, data, steps - first, saved, folder)
    caught, live = [], [run for run in runs if not run.failure]
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step; the same signal again acts at once
        signal.signal(number, lambda number, _: (caught.append(number), signal.signal(number, signal.SIG_DFL)))
    since, since_step = time.perf_counter(), first
    with progress_bar(total=steps, initial=first, unit="step", disable=rank > 0) as bar:
        for done, (x_BD, position) in zip(range(first + 1, steps + 1), chain(seen, data)):
            x_BD = x_BD * scale
            for run in live:
                run.step(x_BD, done - 1, steps)
            live = [run for run in live if not run.failure]
            if not live:
                raise InputError(f"{runs[0].failure}; the last checkpoint, if there is one, stays")
            if done % cfg.log_every == 0 or done == steps:
                tokens_per_s = (done - since_step) * cfg.batch / (time.perf_counter() - since)
                since, since_step = time.perf_counter(), done
                for run in live:
                    run.measure(x_BD, done, tokens_per_s)
                bar.set_postfix_str(live[0].figures(), refresh=False)
            bar.update()
            stop = reduced(torch.tensor(max(caught, default=0), device=device), dist.ReduceOp.MAX).item()
            if done < steps and (stop or cfg.save_every and done % cfg.save_every == 0):
                if rank == 0:
                    save_checkpoint(path, cfgs, done, scale, runs, position)
                if stop:
                    return runs, done, stop
    if rank == 0:
        for run in live:
            save_sae(run.sae, run.cfg, run.cfg.out, scale)
        path.unlink(missing_ok=True)
    return runs, steps, 0


# ------------------------------------------------------------------------------------------------- files
def save_checkpoint(path, cfgs, step, scale, runs, position):
    """Write what the runs need to continue exactly: after the start, the data alone draws random numbers."""
    content = {"step": step, "scale": scale, "position": position, "runs": []}
    for run in runs:
        state = {"weights": run.state_dict(), "adam": run.adam.state_dict()}
        content["runs"].append(state | {"failure": run.failure, "history": run.history})
    content |= {"settings": [dataclasses.asdict(cfg) for cfg in cfgs], "processes": ranks()[1]}
    part = path.with_suffix(".part")  # takes the place of the one before when it is whole
    try:
        torch.save(content, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides a disk's error behind one of its own
        part.unlink(missing_ok=True)
        why = error.__context__ or error
        print(f"\ncheckpoint of step {step} can't be written, the one before it stays: {why}", file=sys.stderr)


def load_checkpoint(path, cfgs):
    """Content of a checkpoint that was written under the same settings, but for those that leave the run as it is."""
    with loading(str(path)):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = [settings | {"processes": saved["processes"]} for settings in saved["settings"]]
    ours = [dataclasses.asdict(cfg) | {"processes": ranks()[1]} for cfg in cfgs]
    changed = {name for a, b in zip(ours, theirs) for name in a if a[name] != b.get(name)}
    changed -= {"out", "device", "log_every", "save_every", "resume"}
    if changed or len(ours) != len(theirs):
        names = ", ".join(sorted(changed)) or "arch, dict, k, alpha, seed"
        raise InputError(f"{path} can't be resumed: it was written with another value of {names}")
    return saved


@torch.no_grad()
def save_sae(sae, cfg, folder, scale=1.0):
    """Write a folder that SAELens loads: cfg.json, and sae_weights.safetensors in float32.

    Activations were multiplied by `scale` in training. What selects latents commutes with it, so biases are divided.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc / scale, "W_dec": sae.W_dec, "b_dec": sae.b_dec / scale}
    content = {"architecture": ARCHITECTURES[cfg.arch], "d_in": len(sae.b_dec), "d_sae": len(sae.b_enc)}
    content |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    content |= {"normalize_activations": "none", "reshape_activations": "none"}
    if cfg.arch == "topk":
        content |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    elif content["architecture"] == "jumprelu":
        weights["threshold"] = sae.threshold() / scale
    metadata = {"model_name": cfg.model, "hook_name": f"blocks.{cfg.layer}.hook_resid_post", "hook_layer": cfg.layer}
    metadata |= {"dataset_path": cfg.dataset, "context_size": cfg.ctx, "prepend_bos": True, "activation_scale": scale}
    content["metadata"] = metadata | {"settings": dataclasses.asdict(cfg)}
    (folder / "cfg.json").write_text(json.dumps(content, indent=2))
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "sae_weights.safetensors")


class SAEConfig(argparse.Namespace):
    """What SAEBench asks of `sae.cfg`: model_name, hook_name, hook_layer, context_size, d_in, d_sae, ..."""

    def to_dict(self):
        return json.loads(json.dumps(vars(self), default=vars))


def load_sae(path, device="cpu"):
    """The autoencoder of a folder in SAELens's format, architecture topk, standard or jumprelu; `cfg` is cfg.json's."""
    from safetensors.torch import load_file

    with loading(str(path)):
        cfg = dict(json.loads(Path(path, "cfg.json").read_text()))
        weights = load_file(Path(path, "sae_weights.safetensors"))
        weights = {name: tensor.float() for name, tensor in weights.items()}
        (N, D), arch = weights["W_dec"].shape, cfg["architecture"]
        if arch == "topk" and not (type(cfg["k"]) is int and 1 <= cfg["k"] <= N):
            raise InputError(f"{path}: k is {cfg['k']!r}, an integer from 1 to {N} is needed")
        if arch not in ARCHITECTURES.values() or (cfg.get("normalize_activations") or "none") != "none":
            raise InputError(f"{path}: its architecture ({arch}) or its normalize_activations can't be honoured")
        sae = SAE(D, N, cfg["k"]) if arch == "topk" else Baseline(D, N, N, "relu")
        if arch != "topk":
            weights["theta"] = weights.pop("threshold") if arch == "jumprelu" else torch.zeros(N)
        if not cfg.get("apply_b_dec_to_input", True):  # encode() subtracts b_dec: add what that takes away
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        sae.load_state_dict(weights)
        sae.cfg = SAEConfig(**dict(cfg.pop("metadata", None) or {}) | cfg, model_from_pretrained_kwargs={})
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
        if not skip & set(name.parts) and (text := path.read_text(encoding="utf-8", errors="ignore")).strip():
            yield name.as_posix(), text
    for name, text in sorted(topics.items()):
        yield f"help/{name}", text


def demo_files(folder):
    """Make the demo's heldout.jsonl, train.jsonl and language model, in about 100 s."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("heldout", "train"):
        texts = {n: t for n, t in library_texts() if (zlib.crc32(n.encode()) % 10 == 0) == (split == "heldout")}
        rows = [json.dumps({"name": name, "text": text}) + "\n" for name, text in texts.items()]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    train_demo_lm(list(texts.values()), folder)


def train_demo_lm(texts, folder, steps=1000, batch=8, ctx=128):
    """Train a byte-level BPE tokenizer and a small Gemma-2 on texts and save both."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": ctx}
    lm = Gemma2ForCausalLM(Gemma2Config(vocab_size=1024, max_position_embeddings=ctx, **sizes, **heads))
    ids_NL = torch.tensor(list(token_contexts(texts, tokenizer, ctx, deque())))
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    order = torch.randperm(len(ids_NL))[: steps * batch].split(batch)
    for step, rows in enumerate(progress_bar(order, desc="demo language model", unit="step")):
        adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, 0.02 + 1.2 * (1 - step / steps))
        loss = lm(input_ids=ids_NL[rows], labels=ids_NL[rows]).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------- main
class Parser(argparse.ArgumentParser):
    """A parser whose help shows the defaults and whose errors are InputErrors."""

    def __init__(self, text):
        super().__init__(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(message)


def parse_args(argv):
    """Configs of a command line, one for each autoencoder; with --demo, settings that it does not name are DEMO's."""
    parser, fields = Parser(__doc__.splitlines()[0]), dataclasses.fields(Config)
    for field in fields:
        if title := field.metadata["group"]:
            group = parser.add_argument_group(title)
        options = {"help": field.metadata["help"], "default": field.default, **field.metadata["more"]}
        if isinstance(field.default, bool):
            options["action"] = "store_true"
        else:
            options["type"] = str if field.default is None else type(field.default)
        group.add_argument("--" + field.name.replace("_", "-"), **options)
    if "--demo" in argv:
        parser.set_defaults(**DEMO, model="", dataset="")
    values = {name: v if isinstance(v, list) else [v] for name, v in vars(parser.parse_args(argv)).items()}
    return [Config(**dict(zip(values, choice))) for choice in product(*values.values())]


def find_device(name, dtype):
    """The device and dtype of those names; auto is cuda and bfloat16 where there is a GPU, else cpu and float32."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def check(cfgs, folder):
    """Refuse settings that can't work."""
    for cfg, field in product(cfgs, dataclasses.fields(Config)):
        value, least = getattr(cfg, field.name), field.metadata["least"]
        if least is not None and not least <= value < math.inf:
            raise InputError(f"--{field.name.replace('_', '-')} must be at least {least}, but is {value}")
    outs, world, begun = [cfg.out for cfg in cfgs], ranks()[1], (folder / "settings.json").exists()
    stopped = (folder / "checkpoint.pt").exists() or not any(Path(out, "cfg.json").exists() for out in outs)
    for cfg in cfgs:
        for wrong, message in (
            (len(set(outs)) < len(outs), "a value of --arch, --dict, --k, --alpha or --seed is given twice"),
            (cfg.demo and (cfg.model or cfg.dataset), "--demo makes its own model and text: no --model, no --dataset"),
            (cfg.decay_start > 1, f"--decay-start is a share of the steps, 0 to 1, but is {cfg.decay_start}"),
            (cfg.k > cfg.dict, f"--k {cfg.k} is more than the {cfg.dict} latents of --dict"),
            (cfg.tokens < cfg.batch, f"--tokens {cfg.tokens} is less than one batch of {cfg.batch}"),
            (cfg.batch % world, f"--batch {cfg.batch} can't be shared evenly by {world} processes"),
            (cfg.sparsity == 0 and cfg.arch in STEERED, f"--sparsity 0 leaves {cfg.arch} nothing to adjust"),
            (begun and not (cfg.resume and stopped), f"{folder} holds a run: --resume continues one that was stopped"),
        ):
            if wrong:
                raise InputError(message)


def work(argv):
    """Trains what the command line asks for; returns the exit code."""
    started, cfgs = time.perf_counter(), parse_args(argv)
    if "WORLD_SIZE" in os.environ:  # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank, world = ranks()
    cfg, names = cfgs[0], [f"{c.arch}-n{c.dict}-k{c.k}-a{c.alpha:g}-s{c.seed}" for c in cfgs]
    model = "demo" if cfg.demo else Path(cfg.model).name
    folder = Path(cfg.out or f"runs/{model}-l{cfg.layer}-{names[0] if len(cfgs) == 1 else 'grid'}")
    for c, name in zip(cfgs, names):
        c.out = str(folder if len(cfgs) == 1 else folder / name)
    check(cfgs, folder)
    device, dtype = find_device(cfg.device, cfg.dtype)
    if cfg.demo:
        cache = Path(os.environ.get("SGO_CACHE", "~/.cache/sgo_sae")).expanduser()
        demo = cache / f"demo-python3.{sys.version_info.minor}"
        if rank == 0 and not (demo / "tokenizer_config.json").exists():  # the file that is written last
            demo_files(demo)
        if world > 1:
            dist.barrier()
        for c in cfgs:
            c.model, c.dataset = str(demo), str(demo / "train.jsonl")
    runs, done, stop = train(cfgs, folder, device, dtype)
    if rank == 0 and stop:
        print(f"stopped after step {done:,}; the same command with --resume continues it", file=sys.stderr)
    elif rank == 0:
        for run in (finished := [run for run in runs if not run.failure]):
            print(f"{Path(run.cfg.out).name:<28}  {run.figures()}")
        cost = f"{time.perf_counter() - started:.0f} s, at most {finished[0].history[-1]['memory_gb']:.1f} GB"
        print(f"{done:,} steps, {cost}; saved in {folder}")
    if world > 1:
        dist.barrier()  # the first process still writes, and the others must not leave before it
        dist.destroy_process_group()
    if failures := [run.failure for run in runs if run.failure]:
        raise InputError("; ".join(failures))
    return 128 + stop if stop else 0


def main(argv, work=work, program="sgo_sae.py"):
    """Does the work, or trains, and returns the exit code; what goes wrong is said in one line."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "critical"}  # they raise: no log beside it
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # nor here, but of reads that are retried
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        return work(argv)
    except (InputError, OSError) as error:  # what is left of OSErrors are files that can't be written
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        message = f"out of memory, smaller --dict, --batch, --buffer and --lm-batch need less: {str(error)[:200]}"
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
