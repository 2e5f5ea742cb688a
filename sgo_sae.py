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
The paper is in the method and in `training_step`; the rest feeds them, keeps a run alive and reports it.

Shapes are in the names: B tokens, L positions, D hidden size of the model, N latents, K active latents per token,
E entries of a (B, K) array, T latents of a tile. Equation and section numbers are the paper's.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


# ---------------------------------------------------------------------------------------------- settings


def setting(default, help, group=None, **kwargs):
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **kwargs})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each field is a command-line flag. The defaults are the paper's run 4."""

    arch: str = setting(
        "topk", "architecture; several values of --arch, --dict, --alpha and --seed train a grid on the same batches",
        "sparse autoencoder", choices=("topk", "batchtopk", "relu", "jumprelu"), nargs="+",
    )  # fmt: skip
    dict: int = setting(18432, "number of latents N", nargs="+")
    k: int = setting(320, "latents that are active on a token: exactly, or on average where --arch is not topk")
    alpha: float = setting(0.075, "weight of the SGO penalty; 0 trains without it", "loss (Eq. 2)", nargs="+")
    alpha_start: float = setting(0.01, "weight at step 0, from which alpha is approached linearly")
    alpha_warmup: int = setting(1000, "steps until alpha is reached")
    sparsity: float = setting(
        0.04, "lambda, weight of the L1 term, of jumprelu's L0 term; relu and jumprelu adjust it until L0 is k"
    )
    fixed_sparsity: bool = setting(False, "leave lambda as it is for relu and jumprelu too, whatever L0 becomes")
    penalty: str = setting(
        "sum", "sum over the pairs as Eq. 2 prints it, mean over the N^2 pairs, or the sum with decoder directions",
        choices=("sum", "mean", "decoder"),
    )  # fmt: skip
    tokens: int = setting(10_000_000, "tokens to train on", "training")
    batch: int = setting(2048, "tokens in a training step")
    lr: float = setting(3e-4, "learning rate of Adam")
    decay_start: float = setting(0.875, "share of the steps after which the learning rate falls linearly to 0")
    normalize: bool = setting(False, "scale activations to a mean squared norm of D; folded back into the saved weights")
    seed: int = setting(0, "seed of the initialisation", nargs="+")
    data_seed: int = setting(0, "seed of the order of the data")
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
    out: str = setting(
        None, "folder of the result, of a grid's results (default: runs/MODEL-lLAYER-ARCH-nDICT-aALPHA-sSEED)"
    )
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    save_every: int = setting(500, "steps between checkpoints; 0 writes one only when the run is stopped")
    save_failure: str = setting(
        "continue", "what to do where a checkpoint can't be written, as on a full disk", choices=("continue", "stop")
    )
    resume: bool = setting(False, "continue from the checkpoint in the folder of the result, where there is one")
    demo: bool = setting(False, "small Gemma-2 and text made on this machine, other settings scaled to them")
    cache: str = setting(None, "folder that keeps the demo's model (default: $SGO_CACHE, else ~/.cache/sgo_sae)")
    bench: bool = setting(False, "time a step's parts at --dict, --k, --batch and --width, train nothing", "benchmark")
    width: int = setting(2304, "hidden size D for --bench")
    json: bool = setting(False, "print the benchmark as one JSON object")


DEMO = dict(dict=1024, k=16, layer=1, tokens=1_228_800, alpha_warmup=120, buffer=1024, log_every=20, lr=1e-3, width=128)


class InputError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


# ------------------------------------------------------------------------------------------------ method


class SparseEncode(torch.autograd.Function):
    """Pre-activations and those that `choose` picks per token; backward costs O(BKD), not the O(BND) of a dense one."""

    @staticmethod
    def forward(ctx, x_BD, W_enc_DN, b_enc_N, b_dec_D, choose):
        x_BD = x_BD - b_dec_D
        vals_BK, idx_BK = choose(torch.addmm(b_enc_N, x_BD, W_enc_DN))
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


class JumpReLU(torch.autograd.Function):
    """z where z > θ, else 0; and whether z > θ, 1 or 0. Gradients in θ are those of a rectangle of width ε around θ
    (Rajamanoharan et al. 2024, Eq. 11 and 12): the step function has none.
    """

    @staticmethod
    def forward(ctx, z, theta, epsilon):
        on = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, epsilon, on)
        return z * on, on

    @staticmethod
    @once_differentiable
    def backward(ctx, g_vals, g_on):
        z, theta, epsilon, on = ctx.saved_tensors
        near = ((z - theta).abs() < epsilon / 2) / epsilon
        return g_vals * on, -near * (theta * g_vals + g_on), None


class SAE(nn.Module):
    """Sparse autoencoder (4.2): f = σ((x - b_dec) W_enc + b_enc), x̂ = f W_dec + b_dec.

    W_enc (D, N), b_enc (N,), W_dec (N, D) with rows of unit length, b_dec (D,). σ is what architectures differ in:
    topk       ReLU of a token's k largest (the paper's)
    batchtopk  in training ReLU of the B k largest of a batch, afterwards of those above `threshold` (N,)
    relu       ReLU (Eq. 1)
    jumprelu   what is above `threshold` (N,), which is learned
    """

    def __init__(self, d_in: int, d_sae: int, k: int, arch: str = "topk"):
        super().__init__()
        self.k, self.arch = k, arch
        W_dec_ND = F.normalize(torch.randn(d_sae, d_in), dim=1)
        # The encoder starts as the decoder's transpose, and lies in memory like it: latent by latent.
        self.W_enc = nn.Parameter(W_dec_ND.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_dec_ND)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if arch == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(d_sae))
            self.register_buffer("bandwidth", torch.zeros(()))  # ε
        else:
            self.register_buffer("threshold", None if arch == "topk" else torch.zeros(d_sae))

    device = property(lambda self: self.W_dec.device)
    dtype = property(lambda self: self.W_dec.dtype)

    @torch.no_grad()
    def initialize(self, x_BD, median_D, bandwidth=0.2):
        """Start b_dec at the activations' geometric median (5.1); relu's bias and jumprelu's threshold where L0 is k.

        bandwidth: ε as a share of that threshold.
        """
        self.b_dec.copy_(median_D)
        if self.arch in ("relu", "jumprelu"):
            x_BD = x_BD[: 2**26 // len(self.b_enc)]  # 0.3 GB of pre-activations are sample enough
            least = ((x_BD - self.b_dec) @ self.W_enc).flatten().topk(len(x_BD) * self.k, sorted=False).values.min()
            if self.arch == "relu":
                self.b_enc.fill_(-least)
            else:
                self.threshold.fill_(least)
                self.bandwidth.copy_(bandwidth * least)

    def choose(self, pre_BN):
        """What may be active on each token, (B, K) values and latents; K is the most on one token, the rest hold 0."""
        if self.arch == "topk":
            return pre_BN.topk(self.k, dim=1, sorted=False)
        least = 0.0
        if self.arch == "batchtopk":
            count = ranks()[1] * len(pre_BN) * self.k
            top = gathered(pre_BN.flatten().topk(min(count, pre_BN.numel()), sorted=False).values[None])
            least = top.flatten().topk(count, sorted=False).values.min().clamp(min=0)
            mean_N = self.threshold.lerp(least.to(self.threshold), 0.05)  # running, over about 20 batches
            self.threshold.copy_(torch.where(self.threshold > 0, mean_N, least))
        elif self.arch == "jumprelu":
            least = self.threshold - self.bandwidth / 2  # what is just under the threshold counts in its gradient
        pre_BN = torch.where(pre_BN >= least, pre_BN, 0)
        return pre_BN.topk((pre_BN > 0).sum(1).max().clamp(min=1).item(), dim=1, sorted=False)

    def sparse(self, x_BD):
        """Sparse latents of x (B, D): values (B, K), at least 0; the latents (B, K) they belong to; 1 where active."""
        vals_BK, idx_BK = SparseEncode.apply(x_BD, self.W_enc, self.b_enc, self.b_dec, self.choose)
        if self.arch == "jumprelu":
            theta_BK = self.threshold.index_select(0, idx_BK.flatten()).view_as(vals_BK)
            vals_BK, active_BK = JumpReLU.apply(vals_BK, theta_BK, self.bandwidth)
            return vals_BK, idx_BK, active_BK
        return vals_BK, idx_BK, (vals_BK > 0).to(vals_BK.dtype)

    def decode_sparse(self, vals_BK, idx_BK):
        """Reconstruction (B, D) of sparse latents."""
        return F.embedding_bag(idx_BK, self.W_dec, per_sample_weights=vals_BK, mode="sum") + self.b_dec

    def encode(self, x):
        """Dense latents (..., N) of x (..., D), as after training."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.arch == "topk":
            vals, idx = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, idx, vals.relu())
        return pre.relu() * (pre > self.threshold)

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
    weight w_ij of Eq. 3, (E, K), 0 for i = j. A step touches B K² pairs, whatever N is. Processes share the tiles.
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
    rank, world = ranks()
    for lo in range(rank * T, d_sae, world * T):
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
    f_BN = vals_BK.new_zeros(len(vals_BK), d_sae).scatter_add_(1, idx_BK, vals_BK)
    m_BN = (f_BN > 0).to(f_BN.dtype)
    size_N = m_BN.sum(0).clamp_(min=1)
    grad_BN = torch.zeros_like(f_BN)
    tiles = [slice(lo, lo + tile) for lo in range(0, d_sae, tile)]
    rank, world = ranks()
    for n in range(rank, len(tiles), world):
        i = tiles[n]
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
    rank, world = ranks()
    f_BK, idx_all_BK = gathered(vals_BK.detach()), gathered(idx_BK)
    pairwise = d_sae > CROSSOVER.get(f_BK.device.type, 15) * f_BK.shape[1]
    grad_BK = total((penalty_gradient_sparse if pairwise else penalty_gradient_tiled)(f_BK, idx_all_BK, d_sae))
    omega = (f_BK * grad_BK).sum() / 4
    own_BK = grad_BK[rank * len(vals_BK) : (rank + 1) * len(vals_BK), : vals_BK.shape[1]]
    return with_gradient(omega, vals_BK, own_BK * world)  # gradients of processes are averaged


def sgo_penalty_decoder(vals_BK, idx_BK, W_dec_ND):
    """Ω with decoder directions for f: Σ_{i≠j} w_ij ⟨W_i, W_j⟩². Differentiable once, in W_dec: 4 (w ∘ W Wᵀ) W."""
    W_ND = W_dec_ND.detach()
    N = len(W_ND)
    omega, grad_ND = W_ND.new_zeros(()), torch.zeros_like(W_ND)
    for lo, hi, _, pair_EK, w_EK in coactive_pairs(gathered(vals_BK.detach()), gathered(idx_BK), N):
        w_TN = w_EK.new_zeros((hi - lo) * (N + 1)).scatter_(0, pair_EK.flatten(), w_EK.flatten()).view(hi - lo, -1)
        gram_TN = W_ND[lo:hi] @ W_ND.T
        wgram_TN = w_TN[:, :N] * gram_TN
        omega += (wgram_TN * gram_TN).sum()
        grad_ND[lo:hi] = 4 * wgram_TN @ W_ND
    return with_gradient(total(omega), W_dec_ND, grad_ND * ranks()[1])


def with_gradient(value, x, grad):
    """A scalar equal to `value` whose gradient in x is `grad`: for terms that are differentiated by hand."""
    return value + ((x - x.detach()) * grad).sum()


def max_coactivation(vals_BK, idx_BK, d_sae):
    """max_j≠i w_ij for each latent, (N,): how strongly it competes with its closest rival; 0 where it never fires."""
    max_N = vals_BK.new_zeros(d_sae)
    for _, _, e_E, _, w_EK in coactive_pairs(vals_BK, idx_BK, d_sae):
        max_N.scatter_reduce_(0, idx_BK.flatten()[e_E], w_EK.amax(1), "amax")
    return total(max_N, dist.ReduceOp.MAX)


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


def ranks():
    """Rank of this process and number of processes that train together; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def total(t, op=None):
    """Sum (or `op`) of a tensor over the processes that train together."""
    if ranks()[1] > 1:
        dist.all_reduce(t, op or dist.ReduceOp.SUM)
    return t


def gathered(t_BK):
    """The rows of all processes in the order of their ranks, (B, K); where K differs, rows are filled up with 0."""
    world = ranks()[1]
    if world == 1:
        return t_BK
    width = total(torch.tensor(t_BK.shape[1], device=t_BK.device), dist.ReduceOp.MAX).item()
    t_BK = F.pad(t_BK, (0, width - t_BK.shape[1])).contiguous()
    parts = [torch.empty_like(t_BK) for _ in range(world)]
    dist.all_gather(parts, t_BK)
    return torch.cat(parts)


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
    from datasets.distributed import split_dataset_by_node

    path = Path(cfg.dataset)
    with loading(cfg.dataset):
        if path.exists():
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            kinds = {str(f): READERS[suffix] for f in files for suffix in f.suffixes if suffix in READERS}
            if len(set(kinds.values())) != 1:
                raise InputError(f"{path}: one of the formats {', '.join(READERS)} is needed, compressed or not")
            kind = next(iter(kinds.values()))
            options = {"sample_by": "paragraph"} if kind == "text" else {}
            if kind != "parquet":  # "utf8", since `datasets` heeds encoding_errors in json for encodings other than "utf-8"
                options |= {"encoding": "utf8", "encoding_errors": "replace"}
            stream = datasets.load_dataset(kind, data_files=list(kinds), split=cfg.split, streaming=True, **options)
        else:
            stream = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, streaming=True)
        first = next(iter(stream), {cfg.text_column: ""})
        if cfg.text_column not in first:
            raise InputError(f"--text-column {cfg.text_column}: the columns of {cfg.dataset} are {', '.join(first)}")
        stream = split_dataset_by_node(stream, *ranks())
        if not any(is_text(row[cfg.text_column]) for row in stream):
            enough = ", or not enough for every process" if ranks()[1] > 1 else ""
            raise InputError(f"{cfg.dataset} holds no text{enough}")
    return stream.shuffle(seed=cfg.data_seed, buffer_size=1000)


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


RETRY_AFTER = (1, 4, 16, 64, 256)  # seconds to wait before a read that failed is tried again


def text_batches(stream, column, at, rows=16):
    """Lists of texts, without end: when the stream is through, it starts over in another order.

    `at` holds the epoch and the rows that were read of it. It is kept up to date, and where it says reading begins.
    """
    failures = 0
    while True:
        stream.set_epoch(at["epoch"])
        try:
            unread = islice(iter(stream), at["row"], None)
            while batch := list(islice(unread, rows)):
                at["row"] += len(batch)
                failures = 0
                if texts := [row[column] for row in batch if is_text(row[column])]:
                    yield texts
        except Exception as error:  # a network, a decompressor, a disk: each has its own
            if failures == len(RETRY_AFTER):
                raise InputError(f"reading the data failed {failures + 1} times: {str(error)[:300]}") from error
            print(f"\nreading the data failed, again in {RETRY_AFTER[failures]} s: {error}", file=sys.stderr)
            time.sleep(RETRY_AFTER[failures])
            failures += 1
            continue
        if at["epoch"] == 0 and ranks()[0] == 0:
            print("\nall the data has been used once: starting over, reshuffled", file=sys.stderr)
        at.update(epoch=at["epoch"] + 1, row=0)


def token_contexts(batches, tokenizer, ctx, rest=None):
    """Pack texts into contexts of `ctx` token ids: BOS where the tokenizer has one, then the stream of documents with
    EOS, where there is one, after each. `rest`, a deque, holds the tokens that are read but not yet yielded.
    """
    bos = [tokenizer.bos_token_id, tokenizer.cls_token_id]
    eos = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    bos, eos = ([i for i in ids if i is not None][:1] for ids in (bos, eos))
    rest = deque() if rest is None else rest
    while True:
        while len(rest) >= ctx - len(bos):
            yield bos + [rest.popleft() for _ in range(ctx - len(bos))]
        if (texts := next(batches, None)) is None:
            return
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            rest.extend(ids + eos)


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


MAX_SKIPPED = 10  # batches of activations that may be left out because they are not finite


def activations(lm, layer, contexts, special, at, lm_batch=32):
    """Activations of the contexts' tokens in chunks (B, D), until at["left"] are yielded; special tokens' are left out."""
    special = torch.tensor(special, device=lm.device)
    held = at.setdefault("held", [])  # contexts that are read but not harvested: reading may fail between two of them
    while at["left"] > 0:
        for context in islice(contexts, lm_batch - len(held)):
            held.append(context)
        if not held:
            return
        ids_BL = torch.tensor(held, device=lm.device)
        held.clear()
        with torch.inference_mode():
            x_BD = hooked(lm, layer, ids_BL)[~torch.isin(ids_BL, special)][: at["left"]]
            bad = (~torch.isfinite(x_BD).all(1)).sum().item()
        if bad:
            at["skipped"] = at.get("skipped", 0) + 1
            print(f"\na batch of activations is left out: {bad} of its {len(x_BD)} are not finite", file=sys.stderr)
            if at["skipped"] > MAX_SKIPPED:
                raise InputError(f"{at['skipped']} batches of activations were not finite; try --dtype float32")
            continue
        at["left"] -= len(x_BD)
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
        self.filling = True  # a refill is due, or was interrupted

    def refill(self):
        self.filling = True
        self.free = torch.cat([self.free, self.order[: self.used]])
        self.order, self.used = self.order[self.used :], 0
        while len(self.free) and (len(self.rest_BD) or (chunk := next(self.source, None)) is not None):
            chunk = self.rest_BD if len(self.rest_BD) else chunk
            rows, self.free = self.free[: len(chunk)], self.free[len(chunk) :]
            self.x_BD[rows.to(self.x_BD.device)] = chunk[: len(rows)]
            self.rest_BD = chunk[len(rows) :]
            self.order = torch.cat([self.order, rows])
        self.order = self.order[torch.randperm(len(self.order), generator=self.generator)]
        self.filling = False

    def batch(self, B):
        """The next B activations (B, D) in float32; fewer where the source has ended."""
        if self.filling or self.used + B > max(B, len(self.x_BD) // 2):
            self.refill()
        rows = self.order[self.used : self.used + B]
        self.used += len(rows)
        return self.x_BD[rows.to(self.x_BD.device)].float()

    def state(self):
        tensors = dict(x_BD=self.x_BD.cpu(), rest_BD=self.rest_BD.cpu(), order=self.order, free=self.free)
        return tensors | dict(used=self.used, filling=self.filling, generator=self.generator.get_state())

    def load(self, state):
        self.x_BD.copy_(state["x_BD"])
        self.rest_BD = state["rest_BD"].to(self.x_BD.device)
        self.order, self.free = state["order"], state["free"]
        self.used, self.filling = state["used"], state["filling"]
        self.generator.set_state(state["generator"])


# ---------------------------------------------------------------------------------------------- training


DEAD_AFTER = 200  # steps without an active token after which a latent counts as dead


def optimizer(sae, lr):
    """Adam as in 5.1. A learned threshold gets a rate of its own size: Adam moves what it trains by about lr a step."""
    weights = [p for p in sae.parameters() if p is not sae.threshold]
    groups = [dict(params=weights, unit=1.0)]
    if sae.arch == "jumprelu":
        groups.append(dict(params=[sae.threshold], unit=10 * sae.threshold.mean().item()))
    return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), fused=True)


def training_step(sae, adam, x_BD, cfg, alpha, lr, lam):
    """One update by the loss of Eq. 2 on the activations x (B, D); returns the parts that metrics are made of.

    x are this process's tokens of the batch; the update is that of all processes' tokens.
    Raises FloatingPointError, before the weights change, where a gradient is not finite.
    """
    with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=x_BD.is_cuda):  # the one dense product of a step
        vals_BK, idx_BK, active_BK = sae.sparse(x_BD)
    error_BD = x_BD - sae.decode_sparse(vals_BK, idx_BK)
    reconstruction = error_BD.square().sum(1).mean()
    l1, l0 = vals_BK.sum(1).mean(), active_BK.sum(1).mean()
    omega = x_BD.new_zeros(())
    if alpha and cfg.penalty == "decoder":
        omega = sgo_penalty_decoder(vals_BK, idx_BK, sae.W_dec)
    elif alpha:
        omega = sgo_penalty(vals_BK, idx_BK, cfg.dict) / (cfg.dict**2 if cfg.penalty == "mean" else 1)
    loss = reconstruction + lam * (l0 if sae.arch == "jumprelu" else l1) + alpha * omega

    adam.zero_grad()
    loss.backward()
    if (world := ranks()[1]) > 1:
        for p in sae.parameters():
            total(p.grad).div_(world)
    sae.project_decoder_gradient()
    norm = nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError
    for group in adam.param_groups:
        group["lr"] = lr * group["unit"]
    adam.step()
    sae.normalize_decoder()
    if sae.arch == "jumprelu":
        sae.threshold.data.clamp_(min=0)
    parts = dict(vals_BK=vals_BK, error_BD=error_BD, loss=loss, reconstruction=reconstruction, l1=l1, l0=l0, omega=omega)
    return {name: part.detach() for name, part in parts.items()} | dict(idx_BK=idx_BK)


def steer(log_lam, l0, k, rate):
    """log λ and λ after a step with that L0, so that L0 comes to k: the integral of log(L0/k), and once more log(L0/k).

    `rate` goes with the learning rate: λ must not move faster than the weights that answer it.
    """
    excess = (l0 / k).log().clamp(-1, 1)
    log_lam = log_lam + rate * excess
    return log_lam, (log_lam + excess).exp()


def batch_metrics(x_BD, part, cfg, alpha):
    """The figures of a line of metrics.jsonl that come from one step's batch; reconstruction and L1 as in Eq. 2."""
    terms = {name: (total(part[name]) / ranks()[1]).item() for name in ("loss", "reconstruction", "l1", "l0")}
    x_BD, error_BD = gathered(x_BD), gathered(part["error_BD"])
    competition_N = max_coactivation(gathered(part["vals_BK"]), gathered(part["idx_BK"]), cfg.dict)
    return terms | dict(
        omega=part["omega"].item(),
        mse=terms["reconstruction"] / x_BD.shape[1],
        penalty_share=alpha * part["omega"].item() / terms["reconstruction"],
        explained_variance=1 - (error_BD.square().sum() / (x_BD - x_BD.mean(0)).square().sum()).item(),
        cosine=F.cosine_similarity(x_BD, x_BD - error_BD, dim=1).mean().item(),
        mean_max_w=competition_N[competition_N > 0].mean().item() if (competition_N > 0).any() else 0.0,
    )


def peak_memory_gb(device):
    """Most memory this process has held so far, in GB: on the GPU where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Run:
    """An autoencoder in training: its settings, weights, optimiser, sparsity coefficient λ, and what its metrics need."""

    def __init__(self, cfg, d_in, device):
        torch.manual_seed(cfg.seed)
        self.cfg, self.out = cfg, Path(cfg.out)
        self.sae = SAE(d_in, cfg.dict, cfg.k, cfg.arch).to(device)
        self.lam = torch.tensor(cfg.sparsity, device=device)
        self.log_lam = self.lam.log()
        self.fired_N = torch.zeros(cfg.dict, dtype=torch.long, device=device)  # step after which a latent last fired

    def start(self, sample_BD, median_D):
        self.sae.initialize(sample_BD, median_D)
        self.adam = optimizer(self.sae, self.cfg.lr)

    def step(self, x_BD, step, steps):
        """One update, with the coefficients of that step."""
        cfg = self.cfg
        self.alpha = alpha_at(step, cfg.alpha, cfg.alpha_start, cfg.alpha_warmup)
        self.lr = lr_at(step, cfg.lr, int(cfg.decay_start * steps), steps)
        self.part = training_step(self.sae, self.adam, x_BD, cfg, self.alpha, self.lr, self.lam)
        if cfg.arch in ("relu", "jumprelu") and not cfg.fixed_sparsity:
            l0 = total(self.part["l0"].clone()) / ranks()[1]
            self.log_lam, self.lam = steer(self.log_lam, l0, cfg.k, 100 * self.lr)
        self.fired_N[self.part["idx_BK"][self.part["vals_BK"] > 0]] = step + 1

    def measure(self, x_BD, step, tokens_per_s):
        """Sets `metrics` to those of the last update and adds them to metrics.jsonl."""
        dead = (total(self.fired_N, dist.ReduceOp.MAX) <= max(0, step - DEAD_AFTER)).sum().item()
        self.metrics = {
            "step": step, "tokens": step * self.cfg.batch, **batch_metrics(x_BD, self.part, self.cfg, self.alpha),
            "dead": dead, "alpha": self.alpha, "lambda": self.lam.item(), "lr": self.lr,
            "tokens_per_s": tokens_per_s, "memory_gb": peak_memory_gb(x_BD.device),
        }  # fmt: skip
        if ranks()[0] == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.metrics) + "\n")

    def state(self):
        tensors = dict(lam=self.lam, log_lam=self.log_lam, fired_N=self.fired_N)
        return dict(sae=self.sae.state_dict(), adam=self.adam.state_dict(), tensors=tensors)

    def load(self, state):
        self.sae.load_state_dict(state["sae"])
        self.adam = optimizer(self.sae, self.cfg.lr)
        self.adam.load_state_dict(state["adam"])
        vars(self).update({name: tensor.to(self.lam.device) for name, tensor in state["tensors"].items()})


class Interrupted(Exception):
    """A signal, the first argument, ended the run after the step that is the second; its checkpoint is written."""


@contextmanager
def signals():
    """Collects SIGINT and SIGTERM in a list, so that a step can be finished; the same one again acts at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, before[number])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress(runs, tokens_per_s):
    """What stands behind the progress bar."""
    m = runs[0].metrics
    if len(runs) > 1:
        variances = [run.metrics["explained_variance"] for run in runs]
        return f"{tokens_per_s:,.0f} tok/s  {len(runs)} SAEs  EV {min(variances):.3f} to {max(variances):.3f}"
    return (
        f"{tokens_per_s:,.0f} tok/s  loss {m['loss']:.4g}  EV {m['explained_variance']:.3f}  L0 {m['l0']:.1f}"
        f"  dead {m['dead'] / runs[0].cfg.dict:.1%}  α {m['alpha']:.3f}  αΩ/rec {m['penalty_share']:.2%}"
    )


def train(cfgs, folder, device):
    """Train the autoencoders that `cfgs` describe on the same batches, save each in its `out`; returns their last metrics.

    The settings differ in arch, dict, alpha, seed and out only. `folder` keeps the checkpoint and all settings.
    Raises Interrupted when a signal has stopped the run.
    """
    from tqdm import tqdm

    cfg, path, (rank, world) = cfgs[0], folder / "checkpoint.pt", ranks()
    say = print if rank == 0 else lambda *_, **__: None
    dtype = find_dtype(cfg.dtype, device)
    torch.set_float32_matmul_precision("high")

    steps = cfg.tokens // cfg.batch
    stream = load_texts(cfg)
    lm_config, tokenizer = load_tokenizer(cfg)
    lm, layer = load_lm(cfg, device, dtype)
    d_in = lm_config.hidden_size
    say(f"model   {cfg.model}, layer {cfg.layer} of {lm_config.num_hidden_layers}, D {d_in}, {str(dtype)[6:]} on {device}")
    say(f"text    {cfg.dataset}, contexts of {cfg.ctx} tokens")
    for c in cfgs:
        weights = f"{2 * c.dict * d_in / 1e6:,.1f} M weights"
        say(f"sae     {c.arch}, N {c.dict:,}, k {c.k}, alpha {c.alpha:g} ({c.penalty}), seed {c.seed}, {weights}")
    say(f"run     {steps:,} steps of {cfg.batch:,} tokens, into {folder}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        locked = lock(folder)  # noqa: F841
    saved = load_checkpoint(path, cfgs) if cfg.resume and path.exists() else None
    if rank == 0:
        write_json(folder / "settings.json", dict(settings=[dataclasses.asdict(c) for c in cfgs], versions=versions()))
    own = saved["data"][rank] if saved else dict(at=dict(epoch=0, row=0, left=steps * cfg.batch // world), rest=[])
    at, rest = own["at"], deque(own["rest"])
    contexts = token_contexts(text_batches(stream, cfg.text_column, at), tokenizer, cfg.ctx, rest)
    source = activations(lm, layer, contexts, special_ids(tokenizer), at, cfg.lm_batch)
    capacity = min(max(cfg.buffer * (cfg.ctx - 1), 2 * cfg.batch), steps * cfg.batch) // world
    buffer = ShuffleBuffer(source, capacity, d_in, device, dtype, cfg.data_seed)
    runs = [Run(c, d_in, device) for c in cfgs]
    if saved:
        first, scale = saved["step"], saved["scale"]
        buffer.load(own["buffer"])
        for run, state in zip(runs, saved["runs"]):
            run.load(state)
        say(f"resume  after step {first:,}", flush=True)
    else:
        first, started = 0, time.perf_counter()
        buffer.refill()
        seconds = time.perf_counter() - started
        say(f"buffer  {capacity:,} activations in {seconds:.0f} s, {capacity / seconds:,.0f} tokens/s", flush=True)
        sample_BD = gathered(buffer.x_BD[: (1 << 14) // world].float())
        scale = (d_in / sample_BD.square().sum(1).mean()).sqrt().item() if cfg.normalize else 1.0
        sample_BD = sample_BD * scale
        median_D = geometric_median(sample_BD)
        for run in runs:
            run.start(sample_BD, median_D)
    if rank == 0:
        for run in runs:
            cut_metrics(run.out, first)
    saved = own = None  # the buffer's copy is 1.2 GB at the paper's size

    def checkpoint(step):
        save_checkpoint(path, cfgs, step, scale, runs, dict(at=at, rest=list(rest), buffer=buffer.state()))

    since, since_step = time.perf_counter(), first
    bar = tqdm(
        total=steps, initial=first, unit="step", dynamic_ncols=True, disable=rank > 0,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    with bar, signals() as caught:
        for step in range(first, steps):
            try:
                x_BD = buffer.batch(cfg.batch // world) * scale
            except InputError:
                if world == 1:
                    checkpoint(step)
                raise
            for run in runs:
                try:
                    run.step(x_BD, step, steps)
                except FloatingPointError:
                    if rank == 0:
                        save_sae(run.sae, run.cfg, run.out / "last_good", scale)
                    raise InputError(f"gradient not finite at step {step}; the weights before it: {run.out / 'last_good'}")
            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                tokens_per_s = (done - since_step) * cfg.batch / (time.perf_counter() - since)
                since, since_step = time.perf_counter(), done
                for run in runs:
                    run.measure(x_BD, done, tokens_per_s)
                bar.set_postfix_str(progress(runs, tokens_per_s), refresh=False)
            bar.update()
            stop = (world > 1 and total(torch.tensor(len(caught), device=device)).item()) or caught
            if done < steps and (stop or cfg.save_every and done % cfg.save_every == 0):
                try:
                    checkpoint(done)
                except (OSError, RuntimeError) as error:  # torch.save hides a disk's error behind one of its own
                    why = error.__context__ or error
                    reason = f"checkpoint of step {done} can't be written, the one before it stays: {why}"
                    if stop or cfg.save_failure == "stop":
                        raise InputError(reason) from error
                    print(f"\n{reason}", file=sys.stderr)
                if stop:
                    raise Interrupted(caught[0] if caught else signal.SIGTERM, done)
    if rank == 0:
        for run in runs:
            save_sae(run.sae, run.cfg, run.out, scale)
        for file in folder.glob("checkpoint.pt*"):
            file.unlink()
    return [run.metrics for run in runs]


def median_ms(device, work, times=5):
    """Median milliseconds of `times` calls after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds[1:])[times // 2]


def bench(cfg, device):
    """Median milliseconds of a step and of its parts on Gaussian activations, as a table, or as JSON with --json.

    Twice: with latents equally popular, and with a popularity that falls with the latent's rank as on real activations.
    """
    torch.set_float32_matmul_precision("high")
    rows = {}
    for skew in (0.0, 0.5):
        torch.manual_seed(cfg.seed)
        x_BD = torch.randn(cfg.batch, cfg.width, device=device)
        sae = SAE(cfg.width, cfg.dict, cfg.k, cfg.arch).to(device)
        sae.initialize(x_BD, geometric_median(x_BD))
        sae.b_enc.data -= skew * ((1 + torch.randperm(cfg.dict, device=device)).log() - 10)
        adam = optimizer(sae, lr=0.0)  # the weights stay: every step is the same work

        def gradients():
            vals_BK, idx_BK, _ = sae.sparse(x_BD)
            (x_BD - sae.decode_sparse(vals_BK, idx_BK)).square().sum(1).mean().backward()

        with torch.autocast(device.type, torch.bfloat16, enabled=x_BD.is_cuda):
            all_gradients = median_ms(device, gradients)
            with torch.no_grad():
                pre_BN = torch.addmm(sae.b_enc, x_BD, sae.W_enc)
                vals_BK, idx_BK, _ = sae.sparse(x_BD)
                encoder = median_ms(device, lambda: torch.addmm(sae.b_enc, x_BD, sae.W_enc))
        step = lambda alpha: training_step(sae, adam, x_BD, cfg, alpha, 0.0, cfg.sparsity)  # noqa: E731
        without, with_penalty = (median_ms(device, lambda: step(alpha)) for alpha in (0.0, cfg.alpha or 0.075))
        with torch.no_grad():
            parts = {
                "  loss and gradients but the penalty's": all_gradients,
                "    encoder product": encoder,
                "    choice of the active": median_ms(device, lambda: sae.choose(pre_BN)),
                "    decoder": median_ms(device, lambda: sae.decode_sparse(vals_BK, idx_BK)),
                "  penalty and its gradient": median_ms(device, lambda: sgo_penalty(vals_BK, idx_BK, cfg.dict)),
                "  gradient projection": median_ms(device, sae.project_decoder_gradient),
                "  gradient clipping": median_ms(device, lambda: nn.utils.clip_grad_norm_(sae.parameters(), 1.0)),
                "  Adam": median_ms(device, adam.step),
                "  decoder normalisation": median_ms(device, sae.normalize_decoder),
            }
        column = {"step without the penalty, ms": without, "step with the penalty, ms": with_penalty} | parts
        column |= {
            "tokens per second": cfg.batch / with_penalty * 1000,
            f"minutes for {cfg.tokens:,} tokens, SAE alone": cfg.tokens // cfg.batch * with_penalty / 60_000,
            "peak memory, GB": peak_memory_gb(device),
        }
        for name, value in column.items():
            rows.setdefault(name, []).append(value)
    shape = dict(arch=cfg.arch, batch=cfg.batch, width=cfg.width, dict=cfg.dict, k=cfg.k, device=str(device))
    if cfg.json:
        return json.dumps(shape | {name.strip(): dict(gaussian=g, skewed=s) for name, (g, s) in rows.items()})
    title = "{arch}, batch {batch}, D {width}, N {dict}, k {k}, {device}".format(**shape)
    lines = [title, f"{'':<40}{'gaussian':>12}{'skewed':>12}"]
    return "\n".join(lines + [f"{name:<40}{g:>12,.1f}{s:>12,.1f}" for name, (g, s) in rows.items()])


# ------------------------------------------------------------------------------------------------- files


def versions():
    """Versions of what a result depends on."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("torch", "transformers", "datasets", "numpy")}


@contextmanager
def written_whole(path):
    """A binary file that takes the place of `path` when it is whole and on the disk, not before."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def lock(folder):
    """A file in `folder` that is locked while this process holds it, however the process ends; refuses a second one."""
    import fcntl

    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{folder} is in use: another run trains into it") from None
    return file


def write_json(path, content):
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def cut_metrics(folder, step):
    """Leave in metrics.jsonl what was measured up to a step: all lines that are whole, none for a run that starts."""
    path = folder / "metrics.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with written_whole(path) as file:
        file.write("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step).encode())


# A run that is resumed may change these; with any other one changed it would be another run.
FREE = {"out", "device", "log_every", "save_every", "save_failure", "resume", "cache"}


def save_checkpoint(path, cfgs, step, scale, runs, own):
    """Write all that the runs need to continue exactly; `own` is where this process's data stands.

    No other random numbers are drawn after the start than those of the buffer.
    """
    rank, world = ranks()
    data = [own] * world
    if world > 1:
        dist.gather_object(own, data if rank == 0 else None)
    if rank == 0:
        settings = [dataclasses.asdict(cfg) for cfg in cfgs]
        states = [run.state() for run in runs]
        with written_whole(path) as file:
            torch.save(dict(step=step, scale=scale, settings=settings, data=data, runs=states), file)


def load_checkpoint(path, cfgs):
    """Content of a checkpoint that was written under the same settings."""
    with loading(str(path)):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["settings"]
    ours = [dataclasses.asdict(cfg) for cfg in cfgs]
    differing = {name for a, b in zip(ours, theirs) for name in a if a[name] != b.get(name)} - FREE
    if len(ours) != len(theirs):
        differing = {"arch", "dict", "alpha", "seed"}
    if differing:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(differing))
        raise InputError(f"{path} can't be resumed: it was written with another value of {names}")
    if len(saved["data"]) != ranks()[1]:
        raise InputError(f"{path} can't be resumed: it was written by {len(saved['data'])} processes, not {ranks()[1]}")
    return saved


# SAELens's name of an architecture, as it is after training: batchtopk has a fixed threshold then, and is loaded as
# the last one of that name.
ARCHITECTURE = {"topk": "topk", "batchtopk": "jumprelu", "relu": "standard", "jumprelu": "jumprelu"}


@torch.no_grad()
def save_sae(sae, cfg, folder, scale=1.0):
    """Write a folder that SAELens loads (cfg.json, sae_weights.safetensors, fp32), for activations as the model has them.

    `scale` is what activations were multiplied by in training. Every activation function here commutes with it, so
    biases and threshold are divided by it and the weights stay, the decoder's rows of unit length among them.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(
        architecture=ARCHITECTURE[sae.arch], d_in=len(sae.b_dec), d_sae=len(sae.b_enc), dtype="float32", device="cpu",
        apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
        metadata=dict(
            model_name=cfg.model, hook_name=f"blocks.{cfg.layer}.hook_resid_post", hook_layer=cfg.layer,
            dataset_path=cfg.dataset, context_size=cfg.ctx, prepend_bos=True, settings=dataclasses.asdict(cfg),
        ),
    )  # fmt: skip
    weights = dict(W_enc=sae.W_enc, b_enc=sae.b_enc / scale, W_dec=sae.W_dec, b_dec=sae.b_dec / scale)
    if content["architecture"] == "topk":
        content |= dict(k=sae.k, rescale_acts_by_decoder_norm=False)
    elif content["architecture"] == "jumprelu":
        weights["threshold"] = sae.threshold / scale
    write_json(folder / "cfg.json", content)
    with written_whole(folder / "sae_weights.safetensors") as file:
        file.write(save({name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}))


class SAEConfig(SimpleNamespace):
    """What tools such as SAEBench ask of `sae.cfg`: model_name, hook_name, hook_layer, context_size, d_in, d_sae, ..."""

    def to_dict(self):
        return vars(self)


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
            cfg = dict(architecture="jumprelu", apply_b_dec_to_input=False)
            weights = {name: torch.from_numpy(array).float() for name, array in numpy.load(path).items()}
        else:
            for name in ("cfg.json", "sae_weights.safetensors"):
                if not (path / name).exists():
                    raise InputError(f"{path} holds no trained autoencoder: {name} is missing")
            cfg = dict(json.loads((path / "cfg.json").read_text()))
            weights = {name: tensor.float() for name, tensor in load_file(path / "sae_weights.safetensors").items()}
        arch = {theirs: ours for ours, theirs in ARCHITECTURE.items()}.get(str(cfg.get("architecture")))
        if arch is None:
            raise InputError(f"{path}: an autoencoder of architecture {cfg.get('architecture')} can't be read")
        if missing := {"W_enc", "b_enc", "W_dec", "b_dec"} - set(weights):
            raise InputError(f"{path} lacks the tensors {', '.join(sorted(missing))}")
        N, D = weights["W_dec"].shape
        if arch == "topk" and not (type(cfg.get("k")) is int and 1 <= cfg["k"] <= N):
            raise InputError(f"{path}: k is {cfg.get('k')!r}, an integer from 1 to {N} is needed")
        if arch == "relu":
            weights["threshold"] = torch.zeros(N)
        elif arch == "jumprelu":
            weights["bandwidth"] = torch.zeros(())
        sae = SAE(D, N, cfg.get("k", N), arch)
        if not cfg.get("apply_b_dec_to_input", True):  # encode() subtracts b_dec: add what that takes away
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        sae.load_state_dict(weights)
        always = dict(d_in=D, d_sae=N, dtype="float32", model_from_pretrained_kwargs={}, hook_head_index=None)
        sae.cfg = SAEConfig(**dict(cfg.get("metadata") or {}) | cfg | always)
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
    train_NL, heldout_NL = (torch.tensor(list(token_contexts(iter([t]), tokenizer, ctx))) for t in (texts, heldout))
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


def make_parser(program, description):
    """An argument parser whose errors are InputErrors and whose help shows the defaults."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=28, width=110),
    )  # fmt: skip

    def fail(message):
        raise InputError(message)

    parser.error = fail
    return parser


def parse_args(argv):
    """Configs of a command line, one for each autoencoder; with --demo, settings that it does not name are DEMO's."""
    parser = make_parser("sgo_sae.py", __doc__.splitlines()[0])
    for field in dataclasses.fields(Config):
        options = dict(field.metadata)
        if title := options.pop("group"):
            group = parser.add_argument_group(title)
        if field.default is None:
            options["help"] += "%(default).0s"  # keeps the formatter from adding "(default: None)"
        if isinstance(field.default, bool):
            options["action"] = "store_true"
        else:
            options["type"] = str if field.default is None else type(field.default)
            options["metavar"] = "{" + ",".join(options["choices"]) + "}" if "choices" in options else field.name.upper()
        group.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    values = vars(parser.parse_args(argv))
    grid = [field.name for field in dataclasses.fields(Config) if "nargs" in field.metadata]
    lists = [values[name] if isinstance(values[name], list) else [values[name]] for name in grid]
    return [Config(**values | dict(zip(grid, choice))) for choice in product(*lists)]


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
    """Refuse settings that can't work."""
    for name in ("dict", "k", "tokens", "batch", "lm_batch", "buffer", "log_every", "width"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(cfg, name)}")
    for name in ("alpha", "alpha_start", "alpha_warmup", "sparsity", "layer", "lr", "save_every", "seed", "data_seed"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be 0 or more, but is {getattr(cfg, name)}")
    if cfg.sparsity == 0 and cfg.arch in ("relu", "jumprelu") and not cfg.fixed_sparsity:
        raise InputError(f"--sparsity 0 leaves {cfg.arch} nothing to adjust: give more than 0, or --fixed-sparsity")
    if not 0 <= cfg.decay_start <= 1:
        raise InputError(f"--decay-start is a share of the steps, 0 to 1, but is {cfg.decay_start}")
    if cfg.k > cfg.dict:
        raise InputError(f"--k {cfg.k} is more than the {cfg.dict} latents of --dict")
    if cfg.ctx < 2:
        raise InputError(f"--ctx must be at least 2, BOS and a token, but is {cfg.ctx}")
    if cfg.tokens < cfg.batch:
        raise InputError(f"--tokens {cfg.tokens} is less than one batch of {cfg.batch}")
    if cfg.batch % ranks()[1]:
        raise InputError(f"--batch {cfg.batch} can't be shared evenly by {ranks()[1]} processes")


def place(cfgs):
    """Folder of the whole, with `out` of each run set: the folder itself for one run, a folder in it for each of several."""
    model = "demo" if cfgs[0].demo else Path(cfgs[0].model).name
    names = [f"{c.arch}-n{c.dict}-a{c.alpha:g}-s{c.seed}" for c in cfgs]
    if len(set(names)) < len(names):
        raise InputError("a value of --arch, --dict, --alpha or --seed is given twice")
    folder = Path(cfgs[0].out or f"runs/{model}-l{cfgs[0].layer}-{names[0] if len(cfgs) == 1 else 'grid'}")
    for cfg, name in zip(cfgs, names):
        cfg.out = str(folder if len(cfgs) == 1 else folder / name)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not cfgs[0].resume:
        raise InputError(f"{folder} holds a run that was stopped: add --resume to continue it, or remove {checkpoint}")
    for cfg in cfgs:
        if not checkpoint.exists() and (Path(cfg.out) / "sae_weights.safetensors").exists():
            raise InputError(f"{cfg.out} already holds a finished run: give another --out, or remove it")
    return folder


def summary(cfgs, metrics, folder, seconds):
    """The table that a training ends with; figures are those of the last batch."""
    width = max(len(Path(c.out).name) for c in cfgs)
    lines = ["", f"{'':<{width}}      EV     MSE  cosine     L0    dead  max w  αΩ/rec"]
    for cfg, m in zip(cfgs, metrics):
        lines.append(
            f"{Path(cfg.out).name:<{width}}  {m['explained_variance']:.4f}  {m['mse']:>#6.4g}  {m['cosine']:.4f}"
            f"  {m['l0']:>5.1f}  {m['dead'] / cfg.dict:>6.2%}  {m['mean_max_w']:.3f}  {m['penalty_share']:>6.2%}"
        )
    m = metrics[-1]
    size = f"{m['tokens']:,} tokens, {m['step']:,} steps, {seconds:.0f} s, at most {m['memory_gb']:.1f} GB"
    return "\n".join([*lines, f"{size}; saved in {folder}"])


def quiet_libraries():
    """Errors are reported by us, in one line, and files are read without a progress bar each."""
    import datasets
    import huggingface_hub
    import transformers

    for library in (datasets, huggingface_hub, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


OUT_OF_MEMORY = r"tried to allocate ([\d.]+ ?\w+)"  # the words of both the CUDA and the CPU allocator


def exit_code(program, work, argv):
    """Runs work(argv); what goes wrong is said in one line and is the exit code that comes back."""
    code, message = 0, None
    try:
        work(argv)
    except (InputError, OSError) as error:  # what is left of OSErrors are files that can't be written
        code, message = 2, "error: " + " ".join(str(error).split())
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "interrupted"
    except Interrupted as stop:
        command = ["torchrun", f"--nproc-per-node={ranks()[1]}"] if ranks()[1] > 1 else ["python"]
        again = shlex.join([*command, sys.argv[0], *argv, *(["--resume"] if "--resume" not in argv else [])])
        code, message = 128 + stop.args[0], f"stopped after step {stop.args[1]:,}; this continues it:\n{again}"
    except (MemoryError, RuntimeError) as error:
        size = re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)
        if size is None and not isinstance(error, MemoryError):
            raise
        asked = f" when {size[1]} were asked for" if size else ""
        code, message = 2, f"error: out of memory{asked}; smaller --dict, --batch, --buffer and --lm-batch need less"
    if message and (code == 2 or ranks()[0] == 0):
        print(f"{program}: {message}", file=sys.stderr)
    return code


def work(argv):
    started = time.perf_counter()
    cfgs = parse_args(argv)
    cfg = cfgs[0]
    if "WORLD_SIZE" in os.environ:  # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    for c in cfgs:
        check(c)
    device = find_device(cfg.device)
    if cfg.bench:
        print(bench(cfg, device))
        return
    quiet_libraries()
    folder = place(cfgs)
    rank, world = ranks()
    if cfg.demo:
        cache = Path(cfg.cache or os.environ.get("SGO_CACHE") or Path.home() / ".cache" / "sgo_sae")
        if rank > 0:
            dist.barrier()  # the first process makes the files
        demo = demo_files(cache)
        if rank == 0 and world > 1:
            dist.barrier()
        for c in cfgs:
            c.model, c.dataset = str(demo), str(demo / "train.jsonl")
    metrics = train(cfgs, folder, device)
    if rank == 0:
        print(summary(cfgs, metrics, folder, time.perf_counter() - started))
    if world > 1:
        dist.barrier()  # the first process still writes, and the others must not leave before it
        dist.destroy_process_group()


def main(argv):
    return exit_code("sgo_sae.py", work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
