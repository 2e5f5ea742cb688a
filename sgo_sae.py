"""Sparse autoencoders with sparsity-guided orthogonality (SGO): a reference in one file.

A top-k sparse autoencoder (SAE) is trained on a language model's activations. SGO adds one term to
its loss, which pushes its latents (the paper's features) apart: for each pair the square of the
mean product of their activations, weighted by how often both are active on the same tokens. It is
the method of "Feature Specialization Through Sparsity-Guided Orthogonality", below called the
paper.

    python sgo_sae.py --demo                        a small model made on this machine
    python sgo_sae.py --dict 18432 --alpha 0.075    the paper's run 4: Gemma-2-2B, layer 12
    torchrun --nproc-per-node=4 sgo_sae.py          the same on four GPUs
    python sgo_sae.py --help                        every setting

The sections, in this order:

    settings       what can be chosen; the defaults are the paper's run 4
    method         the paper: the model, Eq. 2 and 3, one update, the schedules; needs torch alone
    fast           the same results up to rounding, faster; if they ever differ, `method` is right
    baselines      batchtopk, relu and jumprelu
    processes      all that torchrun changes
    texts          from local files and the Hub to documents; skip it on a first reading
    activations    from documents to batches of activations; which tokens are left out; resuming
    training       `Run.step` is one training step, `train` the loop
    files          checkpoints, and results in SAELens's format
    demo           a small language model and its text
    main           from the command line to a run

Shapes are in the names: x_BD is an array of B by D. B are the tokens of a batch, L the positions of
a context, D the hidden size, N the latents (d_sae) and K the active latents of a token. Other
letters are told where they are used. λ is `lam`, and Ω is `omega`.

What this file does not do: it has no auxiliary loss against dead latents, as the paper has none,
but `Run.step` says where one would go. It trains on one layer, and on the GPUs of one machine, each
of which must hold the language model. It logs to a file, not to a service. Its figures are of
training batches; eval_sae.py measures held-out text.
"""

import argparse
import codecs
import csv
import dataclasses
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ----------------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Config:
    """Every setting is a flag, and the comment beside it is its line in --help.

    The flag of a_b is --a-b. Two flags have other names: --dict is d_sae, --sparsity is lam.
    """

    # The autoencoder. The settings marked "list" take several values, and every combination is
    # trained.
    arch: str = "topk"  # architecture (list)
    d_sae: int = 18432  # number of latents N (list)
    k: int = 320  # active latents of a token; on average where --arch is not topk (list)
    seed: int = 0  # seed of the initial weights (list)
    # The loss, Eq. 2
    alpha: float = 0.075  # weight of the SGO penalty, in any --arch; 0 trains without it (list)
    pair_weights: str = "coactivation"  # w_ij: Eq. 3; uniform: all 1, an ablation (list)
    alpha_start: float = None  # weight at step 0, then rising (default: alpha · 0.01 / 0.075)
    alpha_warmup: float = 0.205  # share of the steps until alpha is reached: 1,000 of 4,882
    lam: float = 0.04  # lambda, the weight of the sparsity term; relu and jumprelu change it
    # Training
    tokens: int = 10_000_000  # tokens to train on
    batch: int = 2048  # tokens in a training step, over all processes
    lr: float = 3e-4  # learning rate of Adam
    decay_start: float = 0.875  # share of the steps after which the learning rate falls to 0
    clip: float = 1.0  # norm to which larger gradients are scaled; 0: none
    normalize: bool = False  # scale activations to a mean squared norm of D; undone when saved
    plain: bool = False  # train by `method` alone, in float32 (on a GPU TF32), to check the rest
    # The activations
    model: str = "google/gemma-2-2b"  # language model: Hugging Face id or local folder
    layer: int = 12  # layer whose output is used, from 0
    dataset: str = "monology/pile-uncopyrighted"  # Hugging Face id, local file or folder
    subset: str = None  # configuration of the dataset, where it has several
    split: str = "train"  # split of a Hugging Face dataset
    text_column: str = "text"  # column that holds the text
    ctx: int = 128  # tokens in a context, BOS included; no more than the model was made for
    lm_batch: int = None  # contexts in a pass of the language model (default: 128 on cuda, or 32)
    buffer: int = 2048  # contexts whose activations are shuffled together
    data_seed: int = 0  # seed of the order of the data
    max_norm: float = 5.0  # times the median norm; tokens over it give way to others; 0: none
    # The run
    device: str = "auto"  # cuda, cuda:1, cpu or mps; auto is cuda where there is one, else cpu
    dtype: str = "auto"  # of the model; bfloat16 gives the SAE mixed precision; auto: that on cuda
    out: str = None  # new folder of the result, or of all (default: runs/MODEL-lLAYER-ARCH-...)
    log_every: int = 50  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints; 0 writes one only when stopped
    resume: bool = False  # continue from the checkpoint in the folder, where there is one
    demo: bool = False  # small Gemma-2 and text made on this machine, settings scaled to them


FLAGS = {"d_sae": "--dict", "lam": "--sparsity"}  # the other flags are the names of their settings
LISTS = ("arch", "d_sae", "k", "alpha", "pair_weights", "seed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
AT_LEAST = {  # the others may be 0
    "d_sae": 1,
    "k": 1,
    "tokens": 1,
    "batch": 1,
    "ctx": 2,
    "lm_batch": 1,
    "buffer": 1,
    "log_every": 1,
}
AT_MOST = {  # shares, and numbers that the generators of random numbers take
    "seed": 2**63 - 1,
    "data_seed": 2**40,
    "decay_start": 1,
    "alpha_warmup": 1,
}
DEMO = {
    "d_sae": [1024],
    "k": [16],
    "alpha": [0.0, 0.075],
    "alpha_warmup": 0.2,
    "tokens": 1_228_800,
    "lr": 1e-3,
    "layer": 1,
    "buffer": 1024,
    "model": "",  # empty, so that `check` sees a --model or --dataset beside --demo
    "dataset": "",
}


class InputError(Exception):
    """The run can't go on, for a reason that one line tells the user."""


# ------------------------------------------------------------------------------------------- method
# The paper in its own order, dense and plain. "Ours" marks what it leaves open. The terms of the
# loss have the units x², x and x⁴, so what α weighs depends on the scale of the activations x.
# `Run.step` switches on mixed precision (5.1). Gradient checkpointing (5.1) is not used: there is
# one layer, and the latents f are needed again at once.
class SAE(nn.Module):
    """Top-k autoencoder (4.2): f = TopK(ReLU((x - b_dec) W_enc + b_enc)), x̂ = f W_dec + b_dec."""

    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.k = k
        W_dec_ND = F.normalize(torch.randn(d_sae, d_in), dim=1)  # rows of unit length (4.2)
        self.W_enc = nn.Parameter(W_dec_ND.T.clone())  # ours: starts as the decoder's transpose
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_dec_ND)
        self.b_dec = nn.Parameter(torch.zeros(d_in))  # `begin` sets it to the geometric median

    def pre_activations(self, x):
        """(x - b_dec) W_enc + b_enc, (..., N). Ours: b_dec is subtracted first.

        F.linear(x, W.T, b) is x W + b in one operation.
        """
        return F.linear(x - self.b_dec, self.W_enc.T, self.b_enc)

    def select(self, pre):
        """ReLU and the k largest of a token (4.2); the order of the two makes no difference.

        Returns their values, at least 0, and the indices of their latents, (..., K) each.
        """
        vals, idx = pre.topk(self.k, dim=-1, sorted=False)
        return vals.relu(), idx

    def activate(self, pre):
        """Latents f (..., N): those selected, and 0 elsewhere. Other classes override this."""
        vals, idx = self.select(pre)
        return torch.zeros_like(pre).scatter(-1, idx, vals)

    def sparsity(self, pre_BN, f_BN):
        """‖f‖₁ of Eq. 1 and 2, unit x. Ours: the mean over tokens. (JumpReLU needs pre_BN.)"""
        return f_BN.sum(1).mean()

    def encode(self, x):
        """Latents f (..., N) of x (..., D)."""
        return self.activate(self.pre_activations(x))

    def decode(self, f):
        """Reconstruction x̂ (..., D) of latents f (..., N)."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


def coactivation_weights(f_BN):
    """Eq. 3, (N, N): w_ij = |M_i ∩ M_j| / min(|M_i|, |M_j|), ours 0 where one is never active."""
    active_BN = (f_BN > 0).to(f_BN.dtype)  # M_i are the tokens where f_i > 0
    both_NN = active_BN.T @ active_BN  # |M_i ∩ M_j|
    size_N = active_BN.sum(0)  # |M_i|
    return both_NN / torch.minimum(size_N[:, None], size_N[None, :]).clamp(min=1)


def orthogonality(f_BN, weights=coactivation_weights):
    """Third term of Eq. 2, unit x⁴: Ω = Σ_{i≠j} w_ij ⟨f_i, f_j⟩², each pair in both its orders.

    Ours: ⟨f_i, f_j⟩ is divided by B, and i = j is left out. w, a ratio of counts, has no gradient.
    """
    w_NN = weights(f_BN.detach()).fill_diagonal_(0)
    gram_NN = f_BN.T @ f_BN / len(f_BN)  # ⟨f_i, f_j⟩
    return (w_NN * gram_NN**2).sum()


def uniform_weights(f_BN):
    """Ones (N, N) in the place of Eq. 3, so that each pair weighs 1: an ablation, which is ours."""
    return f_BN.new_ones(f_BN.shape[1], f_BN.shape[1])


class Terms(NamedTuple):
    """The terms of Eq. 2 for a batch, and detached by-products."""

    reconstruction: torch.Tensor  # ‖x - x̂‖², unit x²: the sum over D. Ours: the mean over tokens.
    sparsity: torch.Tensor  # ‖f‖₁, unit x
    omega: torch.Tensor  # Ω, unit x⁴
    xhat_BD: torch.Tensor
    fired_N: torch.Tensor  # which latents are active on a token of the batch
    f_BN: torch.Tensor = None  # the latents, where they were computed as such an array


def loss_terms(sae, x_BD, penalty=orthogonality):
    """The `Terms` of a batch x (B, D). `penalty` computes Ω of latents f (B, N)."""
    pre_BN = sae.pre_activations(x_BD)
    f_BN = sae.activate(pre_BN)
    xhat_BD = sae.decode(f_BN)
    return Terms(
        reconstruction=(x_BD - xhat_BD).square().sum(1).mean(),
        sparsity=sae.sparsity(pre_BN, f_BN),
        omega=penalty(f_BN),
        xhat_BD=xhat_BD.detach(),
        fired_N=(f_BN > 0).any(0),
        f_BN=f_BN.detach(),
    )


def total_loss(terms, lam=0.04, alpha=0.075):
    """Eq. 2, in which λ‖f‖₁ stands beside top-k as well."""
    return terms.reconstruction + lam * terms.sparsity + alpha * terms.omega


@torch.no_grad()
def update(sae, adam, loss, lr, clip=1.0):
    """One update by `adam`, torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999)) (4.2, 5.1).

    Returns the norm of the projected gradient, before it is clipped. Where it is not finite,
    nothing changes.
    """
    loss.backward()  # no_grad does not forbid it
    W_ND = sae.W_dec
    along_N = (W_ND.grad * W_ND).sum(1)
    W_ND.grad -= along_N[:, None] * W_ND  # Removes the gradient's component along each row.
    # Ours: the paper does not clip. The loss is a sum over D, so that gradients are long. In the
    # demo all are scaled, as the norm falls from 12 at step 50 to 5 at the end. On Gemma 3 270M,
    # with --normalize, it falls from 54 at step 10 to 1 at step 150 and 0.4 at step 1,000, so that
    # later only a few are scaled. The largest of these was 90.
    largest = clip if clip > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_(sae.parameters(), largest).item()  # This waits for a GPU.
    if norm < float("inf"):
        adam.param_groups[0]["lr"] = lr
        adam.step()
        W_ND /= W_ND.norm(dim=1, keepdim=True)  # rows back to unit length
    adam.zero_grad()
    return norm


def alpha_at(step, alpha=0.075, start=0.01, warmup=1000):
    """Weight of Ω at a step: linear from `start` to `alpha` over `warmup` steps (4.2)."""
    if step >= warmup:
        return alpha
    start = min(start, alpha)  # ours: an alpha under `start` is constant
    return start + (alpha - start) * (step / warmup)


def lr_at(step, steps=4882, lr=3e-4, decay_start=0.875):
    """Learning rate at a step: constant for `decay_start` of the steps, in the paper 4,271 of 4,882
    (5.1).

    Ours: then it is linear to 0. It has no warm-up.
    """
    return lr * min(1.0, (steps - step) / max(1, steps - int(decay_start * steps)))


def geometric_median(x_BD, iterations=100):
    """Where b_dec starts (5.1): the point (D,) nearest to the rows of x in sum, by Weiszfeld."""
    median_D = x_BD.mean(0)
    for _ in range(iterations):
        weight_B = 1 / (x_BD - median_D).norm(dim=1).clamp(min=1e-12)
        median_D = weight_B @ x_BD / weight_B.sum()
    return median_D


# --------------------------------------------------------------------------------------------- fast
# The same results as `method`, up to rounding, in less time and memory. `Run.terms` chooses:
#
#     an `SAE`               `topk_loss_terms`, with Ω by `sgo_penalty`
#     the baselines          `loss_terms`, with Ω by `sgo_penalty_dense`
#     --plain                `loss_terms`, with Ω by `orthogonality`
#
# With --pair-weights uniform Ω is by `uniform_penalty`, `uniform_penalty_dense`, or `orthogonality`
# with `uniform_weights`.
#
# In a top-k autoencoder `select` alone decides which latents are active. `topk_loss_terms` repeats,
# for speed, `SAE`'s decoder and sparsity term, and the backward pass of a CPU its encoder. Who
# changes those changes both, or derives a class, which is then trained by `loss_terms`. The update
# is that of `method`.
#
# First comes Ω, whose gradient is computed in one of two ways: by tiles of dense products, or pair
# by pair.
def product(a, b):
    """a @ b. Products of half precision are exact, and summed in float32; bfloat16 itself does not
    count above 256. Float32 is as PyTorch is set, in `train` TF32 on a GPU. Counts are exact in
    each.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def gradient_by_tiles(f_BN, tile=None):
    """∂Ω/∂f (B, N) of latents f by dense products: O(B N²) time at most, and no N × N array.

    ∂Ω/∂f_bi = (4/B) Σ_j w_ij ⟨f_i, f_j⟩ f_bj: the square gives 2, and so do a pair's two orders.
    That is (4/B) f M, where M_ij = w_ij ⟨f_i, f_j⟩ is symmetric, and 0 for i = j. So only tiles
    M_TJ on and right of its diagonal are computed: T is a block of rows, J are the columns from T's
    first row on. Each serves twice. f_J M_TJᵀ is added to the columns T of f M, and f_T M_TJ to the
    columns right of T.

    Latents that are active on no token have w = 0, and are left out. The others are padded with
    some that are never active to A, a multiple of 64: a GPU's products of bfloat16 are slow where
    rows are not aligned. Of latents in bfloat16, counts and ⟨f_i, f_j⟩ are summed from exact
    products. M is rounded to bfloat16 for its two products, which changes the gradient by 1e-4 (K
    320) to 9e-4 (K 16) of its norm; rounding the gradient itself to bfloat16 changes it by more.
    """
    tile = tile or (2048 if f_BN.is_cuda else 256)
    size_N = (f_BN > 0).sum(0)  # |M_i|
    active_latents = size_N.nonzero()[:, 0]  # This waits for a GPU.
    B, N = f_BN.shape
    padding = (0, -len(active_latents) % 64)
    f_BA = F.pad(f_BN[:, active_latents], padding)
    del f_BN  # frees 0.08 GB in run 4, where the caller holds no reference
    active_BA = (f_BA > 0).to(f_BA.dtype)
    dtype = torch.promote_types(f_BA.dtype, torch.float32)
    size_A = F.pad(size_N[active_latents].to(dtype), padding, value=1)  # it divides
    gradient_BA = torch.zeros_like(f_BA, dtype=dtype)
    for start in range(0, len(size_A), tile):
        end = start + tile
        f_BT, f_BJ = f_BA[:, start:end], f_BA[:, start:]
        matrix_TJ = product(active_BA[:, start:end].T, active_BA[:, start:])  # |M_i ∩ M_j|
        matrix_TJ /= torch.minimum(size_A[start:end, None], size_A[start:])  # Eq. 3
        matrix_TJ *= product(f_BT.T, f_BJ).div_(B)  # ⟨f_i, f_j⟩
        matrix_TJ = matrix_TJ.fill_diagonal_(0).to(f_BA.dtype)  # 0 for i = j
        gradient_BA[:, start:end] += product(f_BJ, matrix_TJ.T)
        gradient_BA[:, end:] += product(f_BT, matrix_TJ[:, tile:])
    gradient_BN = torch.zeros(B, N, dtype=dtype, device=f_BA.device)
    gradient_BA = gradient_BA[:, : len(active_latents)].mul_(4 / B)
    return gradient_BN.index_copy_(1, active_latents, gradient_BA)


def gradient_by_pairs(vals_BK, idx_BK, d_sae):
    """∂Ω/∂f of the entries (B, K), from the P = K (K - 1) / 2 pairs of latents of each token.

    The formula is that of `gradient_by_tiles`. A token counts in |M_i ∩ M_j| and ⟨f_i, f_j⟩ only
    where i and j are both among its K entries. So B P pairs are sorted into U different ones and
    summed, which takes the time and the memory of O(B K²) entries: 7 GB for B 2,048 and K 320, and
    0.3 GB for K 64. A million latents cost no more than ten thousand.
    """
    B, K = vals_BK.shape
    vals_BK = vals_BK.to(torch.promote_types(vals_BK.dtype, torch.float32))
    idx_BK, order_BK = idx_BK.sort(dim=1)  # so that a pair (i, j) has i < j
    vals_BK = vals_BK.gather(1, order_BK)
    active_BK = (vals_BK > 0).to(vals_BK.dtype)
    size_N = vals_BK.new_zeros(d_sae).index_add_(0, idx_BK.flatten(), active_BK.flatten())  # |M_i|
    i_P, j_P = torch.triu_indices(K, K, 1, device=idx_BK.device)
    pair_BP = idx_BK[:, i_P] * d_sae + idx_BK[:, j_P]  # the number of a pair of latents
    pair_U, place_BP = torch.unique(pair_BP, return_inverse=True)  # This waits for a GPU.

    def sum_over_tokens(x_BP):
        return x_BP.new_zeros(len(pair_U)).index_add_(0, place_BP.flatten(), x_BP.flatten())

    both_U = sum_over_tokens(active_BK[:, i_P] * active_BK[:, j_P])  # |M_i ∩ M_j|
    gram_U = sum_over_tokens(vals_BK[:, i_P] * vals_BK[:, j_P])  # B ⟨f_i, f_j⟩
    smaller_U = torch.minimum(size_N[pair_U // d_sae], size_N[pair_U % d_sae])
    w_U = both_U / smaller_U.clamp(min=1)  # Eq. 3
    matrix_BP = (w_U * gram_U)[place_BP]
    gradient_BK = torch.zeros_like(vals_BK)
    gradient_BK.index_add_(1, i_P, matrix_BP * vals_BK[:, j_P])
    gradient_BK.index_add_(1, j_P, matrix_BP * vals_BK[:, i_P])
    gradient_BK *= active_BK * (4 / B**2)
    return torch.zeros_like(vals_BK).scatter(1, order_BK, gradient_BK)


def penalty_from(f, gradient_of):
    """Ω of f, from a function that computes ∂Ω/∂f of f. Ω can be differentiated once.

    Ω has degree 4 in f, so Σ f ∂Ω/∂f = 4 Ω (Euler); this is `inner`. As ∂Ω/∂f is a constant in it,
    its gradient is ∂Ω/∂f. Subtracting 3 Ω, detached, corrects the value and leaves the gradient.
    The caller's autocast does not act here.
    """
    with torch.autocast(f.device.type, enabled=False):
        gradient = gradient_of(f.detach())
        inner = (f * gradient).sum()
        return inner - 0.75 * inner.detach()


# Pairs are faster where N > PAIRS_PAY · K. Tiles take B N² multiply-adds for each product, pairs
# B K² entries, and an entry takes as long as 127² multiply-adds on an H200, and 15² on a CPU.
PAIRS_PAY = {"cuda": 127, "cpu": 15}
PAIRS_FIT = 2048 * 320**2  # B K² of run 4, for which `gradient_by_pairs` needs 7 GB


def sgo_penalty(vals_BK, idx_BK, d_sae):
    """`orthogonality` of latents of which each token has K selected: their values, at least 0, and
    their indices, (B, K) each.

    All active latents of a token must be among its K, each once. Values of 0 get no gradient, as
    ReLU's derivative is 0 there.
    """

    def gradient_of(vals_BK):
        if d_sae > PAIRS_PAY.get(vals_BK.device.type, 127) * vals_BK.shape[1]:
            by_pairs = gradient_by_blocks if vals_BK.is_cpu else gradient_by_pairs
            return by_pairs(vals_BK, idx_BK, d_sae)
        return at_entries(gradient_by_tiles(dense(vals_BK, idx_BK, d_sae)), vals_BK, idx_BK)

    return penalty_from(vals_BK, gradient_of)


def at_entries(gradient_BN, vals_BK, idx_BK):
    """∂Ω/∂f of the entries (B, K), from that of latents f (B, N)."""
    return gradient_BN.gather(1, idx_BK) * (vals_BK > 0)


def sgo_penalty_dense(f_BN):
    """`orthogonality` of latents f (B, N), at least 0.

    Latents that are not active have a gradient too. ReLU and top-k drop it, but JumpReLU passes it
    on to its thresholds.
    """
    if not f_BN.requires_grad:  # Without a gradient only active latents matter.
        most = max(1, int((f_BN > 0).sum(1).max()))
        # A token of a baseline may have any number of them, for whose pairs a GPU has no memory.
        if f_BN.is_cpu or len(f_BN) * most**2 <= PAIRS_FIT:
            return sgo_penalty(*f_BN.topk(most, dim=1, sorted=False), f_BN.shape[1])
    return penalty_from(f_BN, gradient_by_tiles)


def uniform_penalty(vals_BK, idx_BK, d_sae):
    """`orthogonality` with `uniform_weights`, of latents as `sgo_penalty` takes them."""

    def gradient_of(vals_BK):
        return at_entries(uniform_gradient(dense(vals_BK, idx_BK, d_sae)), vals_BK, idx_BK)

    return penalty_from(vals_BK, gradient_of)


def uniform_penalty_dense(f_BN):
    """`orthogonality` with `uniform_weights`, of latents f (B, N)."""
    return penalty_from(f_BN, uniform_gradient)


def uniform_gradient(f_BN):
    """∂Ω/∂f (B, N) where w_ij = 1: (4/B) Σ_{j≠i} ⟨f_i, f_j⟩ f_bj.

    Nothing is counted. The sum over all j is f (fᵀ f) / B, which is computed as (f fᵀ) f / B: a
    B × B array stands for the N × N one. From it j = i is subtracted.
    """
    f_BN = f_BN.to(torch.promote_types(f_BN.dtype, torch.float32))
    own_N = f_BN.square().sum(0)  # B ⟨f_i, f_i⟩
    return (f_BN @ f_BN.T @ f_BN - own_N * f_BN) * (4 / len(f_BN) ** 2)


def dense(vals_BK, idx_BK, d_sae):
    """Latents f (B, N) that have these values at these indices, and are 0 elsewhere."""
    return vals_BK.new_zeros(len(vals_BK), d_sae).scatter(1, idx_BK, vals_BK)


def encode_selected(sae, x_BD, select):
    """Values and indices of the latents that `select` takes of the pre-activations, (B, K) each."""
    if x_BD.is_cpu:
        return SparseEncode.apply(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, sae, select)
    return select(sae.pre_activations(x_BD))


def decode_selected(sae, vals_BK, idx_BK):
    """The weighted sum (B, D) of the K selected rows of W_dec, without b_dec."""
    if vals_BK.is_cpu:
        return F.embedding_bag(idx_BK, sae.W_dec, per_sample_weights=vals_BK, mode="sum")
    return dense(vals_BK, idx_BK, len(sae.b_enc)) @ sae.W_dec


def topk_loss_terms(sae, x_BD, penalty=sgo_penalty):
    """`loss_terms` of a top-k autoencoder, whose latents stay (B, K) values and indices.

    `penalty` computes Ω of these and N, as `sgo_penalty` does.
    """
    N = len(sae.b_enc)
    vals_BK, idx_BK = encode_selected(sae, x_BD, sae.select)
    xhat_BD = decode_selected(sae, vals_BK, idx_BK) + sae.b_dec
    place_BK = torch.where(vals_BK > 0, idx_BK, N)  # an entry of 0 is at the extra place N
    fired = torch.zeros(N + 1, dtype=torch.bool, device=x_BD.device)
    return Terms(
        reconstruction=(x_BD - xhat_BD).square().sum(1).mean(),
        sparsity=vals_BK.sum(1).mean(),
        omega=penalty(vals_BK, idx_BK, N),
        xhat_BD=xhat_BD.detach(),
        fired_N=fired.scatter_(0, place_BK.flatten(), True)[:N],
    )


# What a CPU does differently; skip it on a first reading, up to the baselines. Its dense products
# are slow, so that only the K selected latents of a token take part in the gradient, and pairs are
# counted in its caches.
class SparseEncode(torch.autograd.Function):
    """`encode_selected`, with a gradient that is a sum over the B K entries of its results.

    A dense backward pass, whose products are over B N, would multiply mostly zeros. x gets no
    gradient.
    """

    @staticmethod
    def forward(ctx, x_BD, W_enc_DN, b_enc_N, b_dec_D, sae, select):
        if x_BD.requires_grad:
            raise ValueError("x gets no gradient here")
        vals_BK, idx_BK = select(sae.pre_activations(x_BD))
        vals_BK = vals_BK.to(x_BD.dtype)  # a caller's autocast computes them in bfloat16
        ctx.save_for_backward(x_BD - b_dec_D, W_enc_DN, vals_BK, idx_BK)
        ctx.mark_non_differentiable(idx_BK)
        return vals_BK, idx_BK

    @staticmethod
    def backward(ctx, d_vals_BK, _):
        """The gradients d_… of the weights, from that of the values. E are the B K entries."""
        centred_BD, W_enc_DN, vals_BK, idx_BK = ctx.saved_tensors  # x - b_dec
        d_pre_E = (d_vals_BK * (vals_BK > 0)).flatten()  # ReLU's derivative is 0 at 0
        # Sorted, the entries of a latent are neighbours; those of latent n begin at first_N[n].
        latent_E, entry_E = idx_BK.flatten().sort(stable=True)
        first_N = torch.searchsorted(latent_E, torch.arange(W_enc_DN.shape[1]))
        # b_enc gets the sum of each latent's entries.
        d_b_enc_N = torch.zeros_like(W_enc_DN[0]).scatter_add_(0, idx_BK.flatten(), d_pre_E)
        # W_enc gets, for each latent, the sum of its tokens' x, weighted by its entries.
        token_E = entry_E // idx_BK.shape[1]
        d_W_enc_ND = F.embedding_bag(
            token_E, centred_BD, first_N, per_sample_weights=d_pre_E[entry_E], mode="sum"
        )
        # b_dec is subtracted from x before the product with W_enc.
        d_b_dec_D = -(W_enc_DN @ d_b_enc_N)
        return None, d_W_enc_ND.T, d_b_enc_N, d_b_dec_D, None, None


def gradient_by_blocks(vals_BK, idx_BK, d_sae, cells=1 << 18):
    """`gradient_by_pairs` without sorting the pairs: O(B K²) time and a pass over N² cells.

    A token's K² pairs of entries are added to the cells (i, j) of two tables, and an entry's
    gradient is summed over the K cells of its own pairs. The tables are made by blocks of latents
    i, small enough for a core's cache. Each thread has blocks of its own and works on them alone:
    if all threads shared each small operation, all would wait whenever one lost its core.
    """
    B, K = vals_BK.shape
    vals_BK = vals_BK.to(torch.promote_types(vals_BK.dtype, torch.float32))
    width = d_sae + 1  # Entries of 0 are in an extra, last column.
    rows = max(1, cells // width)  # latents of a block
    f_E = vals_BK.flatten()
    idx_BK = torch.where(vals_BK > 0, idx_BK, d_sae)
    latent_E = idx_BK.flatten()
    size_N = torch.bincount(latent_E, minlength=width).clamp(min=1).to(f_E.dtype)  # |M_i|
    # The entries by latent, those of 0 left out, and cut between blocks.
    entry_E = latent_E.argsort(stable=True)[: (f_E > 0).sum()]
    entries_of_blocks = torch.bincount(latent_E[entry_E] // rows)
    blocks = entry_E.split(entries_of_blocks[entries_of_blocks > 0].tolist())

    def gradient_of(entry_S):
        """The gradient of the S entries of a block, which are of its latents T."""
        token_S = entry_S // K
        f_SK = vals_BK[token_S]  # the values of their tokens
        first = int(latent_E[entry_S[0]]) // rows * rows  # the block's first latent
        cell_SK = width * (latent_E[entry_S] - first)[:, None] + idx_BK[token_S]
        product_SK = f_E[entry_S, None] * f_SK
        size_T = size_N[first : first + rows]
        both_TN = f_E.new_zeros(len(size_T), width)
        gram_TN = torch.zeros_like(both_TN)
        both_TN.view(-1).scatter_add_(0, cell_SK.flatten(), torch.ones_like(f_SK).flatten())
        gram_TN.view(-1).scatter_add_(0, cell_SK.flatten(), product_SK.flatten())
        both_TN.diagonal(first).zero_()  # i = j
        w_TN = both_TN.div_(torch.minimum(size_T[:, None], size_N))  # Eq. 3
        return torch.linalg.vecdot(w_TN.mul_(gram_TN).take(cell_SK), f_SK)

    threads = torch.get_num_threads()
    workers = {"initializer": torch.set_num_threads, "initargs": (1,)}  # each computes alone
    with ThreadPoolExecutor(threads, **workers) as pool:
        parts = list(pool.map(gradient_of, blocks))
    torch.set_num_threads(threads)  # Workers changed the default of new threads, too.
    gradient_E = torch.zeros_like(f_E)
    gradient_E[entry_E] = torch.cat([f_E[:0], *parts])
    return gradient_E.view(B, K) * (4 / B**2)


# ---------------------------------------------------------------------------------------- baselines
# The architectures that the paper compares with. Where a top-k autoencoder takes the k largest
# latents of a token, these take those above a threshold θ. Each is one class. To add another,
# derive it from `ThresholdSAE`, or from `SAE`, and enter it in ARCHITECTURES. It must have
#
#     activate       the latents while it is trained, from the pre-activations
#     saelens_name   what SAELens calls what is saved: "topk", with k; "jumprelu", with thresholds
#                    `threshold()`; or "standard", a ReLU
#
# and, where they differ from those of `ThresholdSAE`,
#
#     encode         the latents after training, by θ
#     sparsity       the term that λ weighs
#     start          what is set before training, from a sample of the activations
#     adjust         what is set after a step, so that k latents of a token are active on average;
#                    it returns λ for the next step
#
# Ours: they train with Ω, too, unless --alpha is 0; the paper's baselines have none.
class ThresholdSAE(SAE):
    """f = pre where pre > θ ≥ 0, else 0. Any trained baseline is loaded as this class."""

    saelens_name = "jumprelu"

    def __init__(self, d_in, d_sae, k):
        super().__init__(d_in, d_sae, k)
        self.register_buffer("theta", torch.zeros(d_sae))

    def threshold(self):
        return self.theta

    def encode(self, x):
        pre = self.pre_activations(x).relu()
        return pre * (pre > self.threshold())

    def start(self, x_BD, lam):
        """Sets what a sample x and λ decide before training."""

    def adjust(self, lam, f_BN, l0, lr):
        """Returns λ for the next step, after one with the latents f, l0 of them active a token."""
        return lam


class BatchTopK(ThresholdSAE):
    """In training, the B k largest pre-activations of a batch (Bussmann et al. 2024)."""

    def activate(self, pre_BN):
        vals, cells = pre_BN.relu().flatten().topk(len(pre_BN) * self.k, sorted=False)
        return torch.zeros_like(pre_BN).flatten().scatter(0, cells, vals).view_as(pre_BN)

    def sparsity(self, pre_BN, f_BN):
        """Bussmann et al. have no sparsity term."""
        return f_BN.new_zeros(())

    def adjust(self, lam, f_BN, l0, lr):
        """Moves θ, one for all latents: a running mean, over some 20 batches, of the least active
        value of a batch. Returns λ for the next step."""
        least = f_BN.masked_fill(f_BN <= 0, math.inf).min().to(self.theta.dtype)
        least = torch.where(least < math.inf, least, 0)  # 0 where nothing is active
        least = all_reduce_(least) / n_processes()
        self.theta.copy_(torch.where(self.theta > 0, self.theta.lerp(least, 0.05), least))
        return lam


class ReLU(ThresholdSAE):
    """Eq. 1: θ is 0. Ours: λ is adjusted until k latents of a token are active on average."""

    saelens_name = "standard"
    INTEGRAL = 100  # of the control of λ in `adjust`
    PROPORTIONAL = 4

    def __init__(self, d_in, d_sae, k):
        super().__init__(d_in, d_sae, k)
        self.register_buffer("lam_integral", torch.zeros(()))

    def activate(self, pre_BN):
        return pre_BN.relu()

    def first_threshold(self, pre_BN, cut):
        """θ before training. With the threshold `cut`, k latents of a token would be active."""
        return 0.0

    @torch.no_grad()
    def start(self, x_BD, lam):
        """The biases start where, on a sample, k latents of a token are active on average."""
        self.lam_integral.fill_(lam)
        x_BD = x_BD[: 2**26 // len(self.b_enc)]  # 2²⁶ pre-activations, 0.3 GB, are sample enough
        pre_BN = self.pre_activations(x_BD)
        cut = pre_BN.flatten().topk(len(x_BD) * self.k, sorted=False).values.min()
        self.b_enc.add_(self.first_threshold(pre_BN, cut) - cut)  # moves the cut to θ

    def adjust(self, lam, f_BN, l0, lr):
        """PI control of log(L0 / k): both parts are factors of λ.

        The integral moves by at most exp(100 lr) in a step, no faster than Adam moves the weights.
        The proportional part, a 4th power, acts at once and keeps L0 from swinging. Both numbers
        are ours, tried on the demo.
        """
        excess = (l0 / self.k).clamp(1 / math.e, math.e)
        self.lam_integral *= excess ** (self.INTEGRAL * lr)
        return self.lam_integral * excess**self.PROPORTIONAL


class Jump(torch.autograd.Function):
    """JumpReLU z H(z - θ), and H(z - θ), that is 1 where z > θ, else 0.

    A step has no gradient in θ. A rectangle around θ, of width ε and height 1/ε, stands for its
    derivative (Rajamanoharan et al. 2024, Eq. 11 and 12). Ours: ε = θ. With a narrower one, latents
    that cease to be active have no gradient by which to come back.
    """

    @staticmethod
    def forward(ctx, z_BN, theta_N):
        ctx.save_for_backward(z_BN, theta_N)
        active_BN = (z_BN > theta_N).to(z_BN.dtype)
        return z_BN * active_BN, active_BN

    @staticmethod
    def backward(ctx, f_gradient_BN, active_gradient_BN):
        z_BN, theta_N = ctx.saved_tensors
        is_near_BN = (z_BN - theta_N).abs() < theta_N / 2
        rectangle_BN = is_near_BN / theta_N
        theta_gradient_BN = -rectangle_BN * (theta_N * f_gradient_BN + active_gradient_BN)
        return f_gradient_BN * (z_BN > theta_N), theta_gradient_BN.sum(0)


class JumpReLU(ReLU):
    """θ is learned, and the sparsity term is L0 in place of L1."""

    saelens_name = "jumprelu"
    SPEED = 30  # θ moves so many times Adam's rate, or it would lag many steps behind λ; ours

    def __init__(self, d_in, d_sae, k):
        super().__init__(d_in, d_sae, k)
        self.theta_raw = nn.Parameter(torch.zeros(d_sae))  # θ = exp(30 theta_raw)

    def threshold(self):
        return (self.SPEED * self.theta_raw).exp().clamp(min=1e-30)  # `Jump` divides by it

    def activate(self, pre_BN):
        return Jump.apply(pre_BN.relu(), self.threshold())[0]

    def sparsity(self, pre_BN, f_BN):
        return Jump.apply(pre_BN.relu(), self.threshold())[1].sum(1).mean()

    def first_threshold(self, pre_BN, cut):
        theta = cut.clamp(min=0.1 * pre_BN.std())  # it must be over 0
        self.theta_raw.fill_(theta.log() / self.SPEED)
        return theta


ARCHITECTURES = {"topk": SAE, "batchtopk": BatchTopK, "relu": ReLU, "jumprelu": JumpReLU}


# ---------------------------------------------------------------------------------------- processes
# What torchrun changes. Each process has a GPU, or some cores, and its part of every batch's
# tokens, and all hold the same weights. Two terms of the loss are means over tokens, so the
# gradient of the whole batch is the mean of the processes' gradients, which `average_gradients`
# takes. Ω is no mean: its counts and products need all tokens of the batch. So each process gathers
# the latents of all, computes the whole Ω, and differentiates it for its own tokens alone. The sum
# over the n processes is then the whole gradient, and since the mean divides it by n, `Run.step`
# multiplies α by n.
#
# A run of two processes is not that of one: each shuffles the tokens that it has read itself, so
# batches are put together differently, and batchtopk selects among a process's own tokens.
def torchrun():
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if torchrun() else 0


def n_processes():
    return dist.get_world_size() if torchrun() else 1


def start_processes(device):
    """Joins the processes that torchrun started, if it did, for a --device."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and "RANK" not in os.environ:
        return  # WORLD_SIZE 1 without RANK is a process alone on a cluster
    if ":" in device:
        raise InputError(f"--device {device}: torchrun gives each process a GPU; --device cuda")
    try:
        if device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # NCCL for tensors on GPUs, Gloo for others
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"several processes are started by torchrun: {error}") from error


def decide_together(work):
    """What `work` returns or refuses in the first process, in every process."""
    outcome = [None]
    if rank() == 0:
        try:
            outcome = [work()]
        except InputError as error:
            outcome = [error]
    if torchrun():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def say(message):
    """Tells the user, from the first process alone."""
    if rank() == 0:
        print(message, file=sys.stderr)


@functools.cache
def say_once(message):
    say(message)


def all_reduce_(t, operation="SUM"):
    """Replaces t in every process by the sum, or the MAX, over the processes."""
    if torchrun():
        dist.all_reduce(t, getattr(dist.ReduceOp, operation))
    return t


def gather_tokens(t):
    """The rows of all processes, by rank; gradients pass to this process's rows alone."""
    if not torchrun():
        return t
    parts = [torch.empty_like(t) for _ in range(n_processes())]
    dist.all_gather(parts, t.detach())
    parts[rank()] = t
    return torch.cat(parts)


def average_gradients(sae):
    """From now on, backward() leaves the mean of the processes' gradients in every process."""

    def average(parameter):
        # W_enc's gradient is a transposed tensor, and NCCL takes contiguous ones only.
        gradient = all_reduce_(parameter.grad.contiguous())
        parameter.grad.copy_(gradient / n_processes())

    for parameter in sae.parameters():
        parameter.register_post_accumulate_grad_hook(average)


# -------------------------------------------------------------------------------------------- texts
@contextmanager
def loading(what):
    """Makes one line of whatever the Hub and the readers of files raise while they load `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever readers, decompressors and networks raise
        kind = type(error).__name__
        reason = f"{kind} {error}" if isinstance(error, LookupError) else str(error) or kind
        reason = reason[:400]
        raise InputError(f"{what} can't be loaded: {reason}") from error


def check_name(name):
    """Refuses what is plainly a path, and not a name on the Hub, where nothing is at that path."""
    path = Path(name)
    is_path = str(name).startswith((".", "/", "~")) or len(path.parts) > 2 or format_of(path)
    if is_path and not path.exists():
        raise InputError(f"{name}: there is no such file or folder")


# The formats of local files, each of which may be compressed (.jsonl.gz).
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
FOREIGN = re.compile(  # names of files that come with data and are none
    r"(readme|licen[sc]e|copying|notice|authors|changelog|requirements)\b.*"
    r"|(dataset_infos?|dataset_dict|state|config)\.json",
    re.IGNORECASE,
)
SPLITS = {  # the words by which a file's name says what split it is of, as `datasets` has them
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
MARKS = {  # byte order marks; UTF-16's are the beginning of UTF-32's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LOOKED_AT = 10_000  # rows among the first of which there must be a text
LONGEST = 2**18  # characters that are handled at once, so that any document fits into memory


def format_of(file):
    """The format of a file by its name, one of FORMATS, or None."""
    from fsspec.utils import infer_compression

    name = file.stem if infer_compression(file.name) else file.name
    suffix = Path(name).suffix.lower()
    return suffix if suffix in FORMATS else None


def split_of(path):
    """The split that a relative path names; it is "train" where it names none."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split in SPLITS if SPLITS[split] & words), "train")


def local_files(path, split):
    """The data files of a path: itself, or those of a folder that are of the split."""
    if path.is_file():
        if not format_of(path):
            raise InputError(f"{path}: one of the formats {', '.join(FORMATS)} is needed")
        if split != "train":
            raise InputError(f"--split {split}: {path} is a file, whose split is train")
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith((".", "__", "~")) for part in parts)
        if file.is_file() and not hidden and not FOREIGN.fullmatch(file.name):
            found.append(file)
    data = [file for file in found if format_of(file)]
    formats = {format_of(file) for file in data}
    if len(formats) != 1:
        names = sorted(formats) or sorted({file.suffix or file.name for file in found})[:5]
        raise InputError(
            f"{path}: files of one of the formats {', '.join(FORMATS)} are needed, and it has "
            + (" and ".join(names) or "none")
        )
    split_by_file = {file: split_of(file.relative_to(path)) for file in data}
    chosen = [file for file in data if split_by_file[file] == split]
    if not chosen:
        others = " or ".join(sorted(set(split_by_file.values())))
        raise InputError(f"{path} has no files of the split {split}: --split {others}")
    names = ", ".join(file.relative_to(path).as_posix() for file in chosen[:5])
    say_once(f"{path}: {len(chosen)} of {len(found)} files are read, {names}"[:400])
    return chosen


def open_text(file, newline=None):
    """A local file as a stream of text. Only UTF-16 and UTF-32 with a byte order mark are known
    beside UTF-8, and bytes that are not UTF-8 become lone surrogates, which `clean` replaces."""
    import fsspec

    if str(file).endswith(".zip"):
        names = [name for name in zipfile.ZipFile(file).namelist() if "__MACOSX" not in name]
        if len(names) != 1:
            raise InputError(f"{file} has {len(names)} files; only one can be read out of a zip")
    with fsspec.open(str(file), "rb", compression="infer") as stream:
        head = stream.read(4)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding != "utf-8-sig":
        say_once(f"{file} is read as {encoding.upper()}, as its byte order mark says")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    options = {"encoding": encoding, "errors": errors, "newline": newline}
    return fsspec.open(str(file), "rt", compression="infer", **options)


def clean(value, file):
    """A field's value; in text, � stands for what is no Unicode."""
    if not isinstance(value, str) or value.isascii():
        return value
    text = re.sub("[\ud800-\udfff]", "\ufffd", value)
    if text != value:
        say_once(f"{file} is not all UTF-8, and the rest is read as \ufffd; iconv converts files")
    return text


def pieces(text):
    """The parts of a text, of at most LONGEST characters each, cut before spaces if it has some."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + LONGEST
        space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        if space > 0:
            end = space
        yield text[start:end]
        start = end
    yield text[start:]


def text_rows(stream):
    """The rows of a text file, in which documents are between blank lines. Long ones are cut."""
    rest = ""
    while block := stream.read(LONGEST):
        *documents, rest = (rest + block).split("\n\n")
        *parts, rest = pieces(rest)
        for text in documents + parts:
            yield {"text": text}
    yield {"text": rest}


def json_values(text):
    """The values of a text in JSON, which may be one after another."""
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")
    end = space.match(text).end()
    while end < len(text):
        value, end = decoder.raw_decode(text, end)
        yield value
        end = space.match(text, end).end()


def json_rows(stream, file):
    """The rows of a file with a JSON object a line, or with one array of objects or of strings."""
    first = True
    for number, line in enumerate(stream, 1):
        over_lines = first and (line.startswith("[") or line.strip() == "{")
        try:
            values = list(json_values(line + stream.read() if over_lines else line))
        except (ValueError, RecursionError) as error:
            if over_lines:
                raise
            say_once(f"{file}: line {number} and others like it are left out: {error}")
            continue
        first = first and not values
        for value in values:
            for row in value if isinstance(value, list) else [value]:
                yield {"text": row} if isinstance(row, str) else row


def rows_of(files, columns=None):
    """The rows of local files, as dicts of those of the columns that a row has; None is all.

    Other columns are not read. A row of JSON that can't be read costs itself. In a csv, a quote
    that is not closed makes one field of all that follows, up to the next quote.
    """
    for file in files:
        kind = format_of(Path(file))
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            parquet = ParquetFile(file)
            known = parquet.schema_arrow.names
            if columns:
                known = [name for name in known if name in columns]
            for batch in parquet.iter_batches(1000, columns=known):
                yield from batch.to_pylist()
            continue
        with open_text(file, newline="" if kind == ".csv" else None) as stream:
            if kind == ".txt":
                rows = text_rows(stream)
            elif kind == ".csv":
                csv.field_size_limit(2**31 - 1)  # of characters, in place of 131,072
                rows = csv.DictReader(stream)
            else:
                rows = json_rows(stream, file)
            for row in rows:
                if isinstance(row, dict):
                    names = columns or tuple(row)
                    yield {name: clean(row[name], file) for name in names if name in row}


def open_dataset(cfg, columns=None):
    """The rows of cfg.dataset as a stream: of local files, or of the Hub."""
    import datasets

    path = Path(cfg.dataset)
    if path.exists():
        if cfg.subset:
            raise InputError(f"--subset {cfg.subset}: {path} is here, and has no configurations")
        files = [str(file) for file in local_files(path, cfg.split)]
        options = {"files": files, "columns": columns}
        return datasets.IterableDataset.from_generator(rows_of, gen_kwargs=options)
    check_name(cfg.dataset)
    return datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, streaming=True)


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def load_texts(cfg):
    """The rows of the dataset that have text, shuffled, as a stream; checks that there are any."""
    column = cfg.text_column
    with loading(cfg.dataset):
        rows = open_dataset(cfg, (column,))
        kinds = set()
        for row in itertools.islice(rows, LOOKED_AT):
            if is_text(row.get(column)):
                break
            if column in row:
                kinds.add("blank" if isinstance(row[column], str) else type(row[column]).__name__)
        else:
            if kinds:
                found = " and ".join(sorted(kinds))
                raise InputError(f"{cfg.dataset} holds no text: its column {column} is {found}")
            first_row = next(iter(open_dataset(cfg)), {})
            if first_row:
                names = ", ".join(map(str, first_row))
                raise InputError(f"--text-column {column}: {cfg.dataset} has {names}")
            raise InputError(f"{cfg.dataset} holds no text")
        rows = rows.filter(lambda row: is_text(row.get(column)))
    return rows.shuffle(seed=cfg.data_seed, buffer_size=1000)


def read_texts(rows, cfg):
    """Texts without end, shuffled anew each time that the dataset is used up."""
    for epoch in itertools.count():
        if epoch == 1:
            say("\nall the data has been used once: starting over, reshuffled")
        rows.set_epoch(epoch)
        text = None
        with loading(cfg.dataset):
            for row in rows:
                text = row[cfg.text_column]
                yield text
        if text is None:
            raise InputError(f"{cfg.dataset} holds no text any more")


# -------------------------------------------------------------------------------------- activations
# These tokens never reach the autoencoder: the first of each context, BOS or not; the tokenizer's
# special tokens, such as EOS and unknown words; those whose norm is over --max-norm times the
# median of their round, whose places others take; and what is left of a round when it fills no
# batch.
class Reader(NamedTuple):
    """A language model that is read at one of its layers."""

    lm: nn.Module
    layer: nn.Module
    tokenizer: object
    hook_name: str  # of the layer, in the language model with its head


def load_lm(name, layer, device, dtype, ctx=2, whole=False):
    """The `Reader` of a language model: up to a layer, or whole and with its head for eval_sae.py.

    ctx is the length of the longest context that it is going to read, in tokens.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    check_name(name)
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        # Text that spells "<bos>" must not become that token.
        tokenizer = AutoTokenizer.from_pretrained(name, split_special_tokens=True)
        ids = tokenizer("some text", add_special_tokens=False).input_ids
        if set(ids) <= {tokenizer.unk_token_id}:
            raise InputError(f"{name} has no tokenizer that can split text into tokens")
        text_config = config.get_text_config()
        if config.is_encoder_decoder:
            raise InputError(f"{name} is an encoder with a decoder, which can't be read")
        n_layers = text_config.num_hidden_layers
        if layer >= n_layers:
            raise InputError(f"--layer {layer}: the layers of {name} are 0 to {n_layers - 1}")
        text_config.use_cache = False  # of keys and values, which nobody reads
        auto = AutoModelForCausalLM if whole else AutoModel
        with torch.device("meta"):  # the model without the content of its tensors
            outline = auto.from_config(config)
        reader_path, layers_path = paths_in(outline, n_layers, name)
        model_class = type(outline)
        if not whole:
            model_class = up_to_layer(model_class, layer, layers_path)
        lm, report = model_class.from_pretrained(
            name, config=outline.config, dtype=dtype, output_loading_info=True
        )
    # A pooler comes after the last layer, and is often not saved.
    missing = [tensor for tensor in report["missing_keys"] if "pooler" not in tensor]
    if missing:
        raise InputError(f"{name}: its files lack tensors, {missing[0]} among them")
    lm.eval()
    reader = lm.get_submodule(reader_path)  # of a multimodal model, the part that reads text
    layers = lm.get_submodule(layers_path)
    check_positions(reader, layers[0], ids[0], ctx, name)
    most = getattr(text_config, "max_position_embeddings", None) or ctx
    if ctx > most:
        say(f"--ctx {ctx}: {name} reads so many tokens, but was made for {most}")
    prefix = "" if whole else f"{lm.base_model_prefix}."
    hook_name = f"{prefix}{layers_path}.{layer}"
    return Reader((lm if whole else reader).to(device), layers[layer], tokenizer, hook_name)


def up_to_layer(model_class, layer, layers_path):
    """The class of a language model without the layers after `layer`, which are never loaded.

    The configuration stays that of the whole model, since some models scale or share their layers
    by how many there are: with a smaller number in it they would be other models.
    """

    class UpToLayer(model_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.get_submodule(layers_path)[layer + 1 :]

    # By these, transformers knows which tensors have other names in files.
    UpToLayer.__name__ = model_class.__name__
    UpToLayer.__module__ = model_class.__module__
    return UpToLayer


def paths_in(lm, n_layers, name):
    """Where a language model has the part that reads text, and its list of layers.

    The list is the outermost one that has as many members.
    """
    for part in (lm.get_decoder(), lm):
        reader_path = next(path for path, module in lm.named_modules() if module is part)
        lists = [
            path
            for path, module in part.named_modules(prefix=reader_path)
            if isinstance(module, nn.ModuleList) and len(module) == n_layers
        ]
        depth = min((path.count(".") for path in lists), default=0)
        outermost = [path for path in lists if path.count(".") == depth]
        if len(outermost) == 1:
            return reader_path, outermost[0]
    raise InputError(f"{name} can't be read, since its {n_layers} layers are not in one list")


def check_positions(lm, first_layer, token, ctx, name):
    """Refuses contexts that are longer than a model's table of positions; a GPU would just abort.

    The first layer reads one, on the CPU.
    """
    try:
        layer_output(lm, first_layer, torch.full((1, 2), token))
    except RuntimeError:
        return  # The CPU lacks an operation in this dtype, so that it can't be tried.
    try:
        layer_output(lm, first_layer, torch.full((1, ctx), token))
    except (IndexError, RuntimeError) as error:
        raise InputError(f"--ctx {ctx}: {name} can't read as many tokens: {error}") from error


def first_id(*ids):
    """A list of the first token id that is not None; it is empty where there is none."""
    return [i for i in ids if i is not None][:1]


def token_ids(texts, tokenizer):
    """Lists of token ids, one for each piece of a text, and EOS after each text."""
    eos = first_id(tokenizer.eos_token_id, tokenizer.sep_token_id)
    without = 0  # texts in a row that gave no token
    for text in texts:
        without += 1
        for piece in pieces(text):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            without = 0 if ids or eos else without
            yield ids
        yield eos
        if without == LOOKED_AT:
            raise InputError(f"the tokenizer makes no token of {without:,} texts in a row")


def token_contexts(texts, tokenizer, ctx):
    """Contexts of `ctx` token ids: BOS, then the texts one after another, with EOS after each."""
    bos = first_id(tokenizer.bos_token_id, tokenizer.cls_token_id)
    length = ctx - len(bos)
    ids = []
    for more in token_ids(texts, tokenizer):
        ids += more
        whole = len(ids) // length * length
        for start in range(0, whole, length):
            yield bos + ids[start : start + length]
        ids = ids[whole:]


def kept_tokens(ids_RL, tokenizer):
    """Which tokens (R, L) of R contexts are used: all but the first one of each and special ones.

    The first is BOS. In a model that has none, whatever stands there takes over BOS's part
    as attention sink, and its activation is as much of an outlier in norm.
    """
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    kept_RL = ~torch.isin(ids_RL, special.to(ids_RL.device))
    kept_RL[:, 0] = False
    return kept_RL


class LayerReached(Exception):
    """Ends a forward pass of the language model at a layer, whose output it has."""


@torch.inference_mode()
def layer_output(lm, layer, ids_RL, **inputs):
    """Output (R, L, D) of a layer when the language model reads the token ids of R contexts."""

    def stop(module, args, output):
        raise LayerReached(output[0] if isinstance(output, (tuple, list)) else output)

    handle = layer.register_forward_hook(stop)
    try:
        lm(input_ids=ids_RL, **inputs)
    except LayerReached as reached:
        x_RLD = reached.args[0]
    else:
        raise InputError("the model does not use its layer")
    finally:
        handle.remove()
    if x_RLD.dim() != 3 or x_RLD.shape[:2] != ids_RL.shape:
        found = " × ".join(map(str, x_RLD.shape))
        raise InputError(f"the layer's output is {found}, and not one vector for each token")
    return x_RLD


def progress_bar(work, **options):
    """tqdm, with a line every 10 s where the output is no terminal."""
    from tqdm import tqdm

    return tqdm(work, mininterval=0.5 if sys.stderr.isatty() else 10, **options)


def harvest(reader, ids_RL, x_CD, lm_batch):
    """Fills x (C, D) from the front with the layer's activations at the kept tokens of R contexts.

    Returns how many tokens were kept. A pass of the language model reads `lm_batch` contexts, of
    which it keeps Q tokens.
    """
    filled = 0
    parts = ids_RL.split(lm_batch)
    for part_RL in progress_bar(parts, desc="activations", leave=False, disable=rank() > 0):
        part_RL = part_RL.to(reader.lm.device)
        x_RLD = layer_output(reader.lm, reader.layer, part_RL)
        x_QD = x_RLD[kept_tokens(part_RL, reader.tokenizer)]
        if not x_QD.isfinite().all():
            raise InputError("the model's activations are not finite; try --dtype float32")
        x_CD[filled : filled + len(x_QD)] = x_QD
        filled += len(x_QD)
    return filled


def replace_outliers(x_CD, max_norm, generator):
    """Puts other tokens in the place of those whose norm is over max_norm times the median norm.

    Returns their number. This is ours. Ω grows with the 4th power of the norm: one token of 100
    times the usual norm in a batch of 2,048 multiplied it by 18,600 (Gaussian x, N 512, k 16), and
    such tokens mislead --normalize. They are tokens that take over BOS's part as attention sink. Of
    93,375 tokens at layer 9 of Gemma 3 270M, nine had 9.0 to 10.7 times the median norm, and no
    other had twice. With some of them in a batch its Ω was up to 36 times as large. Replacing them,
    rather than dropping them, keeps the number of a round's batches, on which resuming relies.
    """
    norm_C = torch.linalg.vector_norm(x_CD, dim=1, dtype=torch.float32)
    is_outlier_C = norm_C > max_norm * norm_C.median()
    n_outliers = int(is_outlier_C.sum())
    if n_outliers:
        others = (~is_outlier_C).nonzero()[:, 0]
        chosen = torch.randint(len(others), (n_outliers,), generator=generator)
        x_CD[is_outlier_C] = x_CD[others[chosen.to(others.device)]]
    return n_outliers


class Batch(NamedTuple):
    """A batch of activations, and what is known of its round."""

    x_BD: torch.Tensor  # in the model's dtype
    outliers: int  # tokens of this process that were left out of the round for their norm
    seconds: float  # that reading the round took, for each of its batches


def batches(cfg, rows, reader, skip=0):
    """A `Batch` after another, without end, from the one after the first `skip` on.

    They come in rounds. A round reads R contexts, of which a process has every n-th, n being the
    number of processes. It has room for C tokens. It drops what of the kept ones fills no batch,
    shuffles the others' activations and serves them. A run that is shorter than a round reads no
    more than it needs. The data, data_seed and the number of the round fix all of it, so to resume
    a run is to count batches: rounds that are over are read again, and the language model does not
    run on them.
    """
    lm = reader.lm
    world = n_processes()
    B = cfg.batch // world  # tokens of a batch in this process
    # Up to half of the tokens may be EOS: contexts for two batches are read to be sure of one.
    per_process = max(cfg.buffer // world, 2 * math.ceil(B / (cfg.ctx - 1)))  # contexts
    steps = cfg.tokens // cfg.batch
    lm_batch = cfg.lm_batch or (128 if lm.device.type == "cuda" else 32)
    told = False
    contexts = token_contexts(read_texts(rows, cfg), reader.tokenizer, cfg.ctx)
    # The activations of a round, in the model's dtype: 1.2 GB in run 4.
    shape = (per_process * (cfg.ctx - 1), lm.config.hidden_size)
    x_CD = torch.empty(shape, dtype=lm.dtype, device=lm.device)
    n_tokens = lm.get_input_embeddings().num_embeddings
    for number in itertools.count():
        started = time.monotonic()
        ids_RL = torch.tensor(list(itertools.islice(contexts, per_process * world)))
        if ids_RL.max() >= n_tokens:
            raise InputError(
                f"the tokenizer gives the id {ids_RL.max()} of {n_tokens} in the model"
            )
        kept_R = kept_tokens(ids_RL, reader.tokenizer).sum(1)
        # How many contexts of a process hold all its tokens of the run: a short run needs fewer.
        kept_so_far = [kept_R[r::world].cumsum(0) for r in range(world)]  # by process
        needed = 1 + max(int((kept < steps * B).sum()) for kept in kept_so_far)
        ids_RL = ids_RL[: needed * world]
        n_batches = min(int(kept[:needed][-1]) for kept in kept_so_far) // B
        if n_batches == 0:
            raise InputError(
                f"{cfg.dataset}: of {ids_RL.numel():,} tokens read, {int(kept_R.sum()):,} are "
                f"kept, too few for a batch of {cfg.batch:,}; the others are special, such as "
                "unknown words, or first in their context"
            )
        if skip >= n_batches:
            skip -= n_batches
            continue
        filled = harvest(reader, ids_RL[rank() :: world], x_CD, lm_batch)
        generator = torch.Generator().manual_seed((cfg.data_seed << 20) + number)
        order = torch.randperm(n_batches * B, generator=generator).to(lm.device)
        outliers = 0
        if cfg.max_norm > 0:
            outliers = replace_outliers(x_CD[:filled], cfg.max_norm, generator)
        if outliers and not told:
            say(
                f"\n{outliers:,} of {filled:,} tokens have over {cfg.max_norm:g} times the median "
                "norm; other tokens take their places (--max-norm)"
            )
            told = True
        seconds = (time.monotonic() - started) / n_batches
        for chosen_B in order.split(B)[skip:]:
            yield Batch(x_CD[chosen_B], outliers, seconds)
        skip = 0


# ----------------------------------------------------------------------------------------- training
DEAD_AFTER = 200  # steps: a latent that was active on no token of so many is dead
SAMPLE = 16384  # tokens from which the scale, the geometric median and the thresholds are taken


def paper_alpha(x_BD):
    """The α that would be on these activations as strong as 0.075 is in the paper.

    α Ω grows with the 4th power of the activations' norm, the reconstruction with the 2nd. The
    paper's MSE is SAEBench's, which divides a token's ‖x - x̂‖² by the 2,032 tokens of its batch,
    so that ‖x - x̂‖² = 1.41 · 2,032 = 2,865 on average. If the error is orthogonal to x̂, its cosine
    of 0.93 makes this 1 - 0.93² of ‖x‖², which thus is 21,000.
    """
    return 0.075 * 21_000 / x_BD.square().sum(1).mean().item()


def alpha_advice(cfg, x_BD):
    normalize = "" if cfg.normalize else " or --normalize"
    if cfg.pair_weights != "coactivation":
        return f"use a smaller --alpha{normalize}"
    strength = f"the paper's strength is α {paper_alpha(x_BD):.2g} here"
    return f"use a smaller --alpha{normalize} ({strength})"


def failure_of(cfg, x_BD):
    """Why a gradient is not finite, as far as can be told."""
    if not x_BD.isfinite().all():
        return "the activations are not finite"
    # How strong uniform weights are beside the paper's is not known.
    harmless = paper_alpha(x_BD) if cfg.pair_weights == "coactivation" else 0
    return alpha_advice(cfg, x_BD) if cfg.alpha > harmless else "use a smaller --lr"


def scheduled_alpha(cfg, step, steps):
    """Weight of Ω at a step of a run.

    Ours: the warm-up is in proportion to the run. It starts at 0.01/0.075 of α, and reaches α after
    1,000/4,882 of the steps, which in run 4 are the paper's numbers. The settings alpha_start and
    alpha_warmup change it.
    """
    start = cfg.alpha * (0.01 / 0.075) if cfg.alpha_start is None else cfg.alpha_start
    return alpha_at(step, cfg.alpha, start, int(cfg.alpha_warmup * steps))


class Penalty(NamedTuple):
    """What a --pair-weights stands for: w as `method` has it, and Ω in its two fast forms."""

    weights: Callable  # of latents f (B, N), w (N, N)
    of_selected: Callable  # of selected latents (B, K), their indices and N, Ω
    of_dense: Callable  # of latents f (B, N), Ω


PENALTIES = {
    "coactivation": Penalty(coactivation_weights, sgo_penalty, sgo_penalty_dense),
    "uniform": Penalty(uniform_weights, uniform_penalty, uniform_penalty_dense),
}


class Run:
    """An autoencoder in training, its settings, optimiser, α and λ, and what was logged of it."""

    def __init__(self, cfg, d_in, device, mixed_precision=False):
        torch.manual_seed(cfg.seed)  # the weights are drawn on the CPU, the same for every device
        self.cfg = cfg
        self.sae = ARCHITECTURES[cfg.arch](d_in, cfg.d_sae, cfg.k).to(device)
        self.adam = torch.optim.Adam(self.sae.parameters(), betas=(0.9, 0.999), fused=True)
        self.mixed_precision = mixed_precision and not cfg.plain
        self.alpha = 0.0
        self.lam = torch.tensor(cfg.lam, device=device)
        self.gradient_norm = 0.0
        # For each latent, how many steps were done when it was last active; at first, 0.
        self.last_fired_N = torch.zeros(cfg.d_sae, dtype=torch.long, device=device)
        self.history = []  # the lines of metrics.jsonl
        self.failure = None
        self.penalty = PENALTIES[cfg.pair_weights]
        if torchrun():
            average_gradients(self.sae)

    def terms(self, x_BD):
        """The `Terms` of Eq. 2; the section `fast` tells which way trains what."""
        if type(self.sae) is SAE and not self.cfg.plain:
            return topk_loss_terms(self.sae, x_BD, self.omega_of_selected)
        return loss_terms(self.sae, x_BD, self.omega)

    def omega_of_selected(self, vals_BK, idx_BK, d_sae):
        """Ω over the tokens of all processes, or 0 where α is 0."""
        if self.cfg.alpha == 0:
            return 0.0
        return self.penalty.of_selected(gather_tokens(vals_BK), gather_tokens(idx_BK), d_sae)

    def omega(self, f_BN):
        """The same of latents f (B, N)."""
        if self.cfg.alpha == 0:
            return 0.0
        f_BN = gather_tokens(f_BN)
        if self.cfg.plain:
            return orthogonality(f_BN, self.penalty.weights)
        return self.penalty.of_dense(f_BN)

    def step(self, x_BD, step, steps):
        """One training step, in this order:

        1. α and the learning rate of the step;
        2. the terms of Eq. 2, in mixed precision where the language model runs in bfloat16, but not
           with --plain;
        3. the loss, and which latents fired;
        4. λ of a baseline for the next step, and batchtopk's θ;
        5. the update: the gradient, its mean over processes (`average_gradients`), the projection
           of W_dec's gradient, clipping, Adam, unit rows.

        A gradient that is not finite ends this run, and others go on.
        """
        if self.failure:
            return
        cfg = self.cfg
        # 1.
        self.alpha = scheduled_alpha(cfg, step, steps)
        lr = lr_at(step, steps, cfg.lr, cfg.decay_start)
        # 2.
        with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=self.mixed_precision):
            terms = self.terms(x_BD)
        # 3. Ω is that of all processes' tokens. The mean over processes will divide its gradient by
        # their number, by which α is multiplied here.
        loss = total_loss(terms, self.lam, self.alpha * n_processes())
        # An auxiliary loss would be added here, as a mean over the tokens of this process. What
        # `terms` has beside the terms is detached. AuxK (Gao et al. 2024), for example, lets dead
        # latents reconstruct what is left of x, on any device:
        #     dead_N = step - self.last_fired_N >= DEAD_AFTER
        #     def select(pre_BN):
        #         vals_BK, idx_BK = pre_BN.masked_fill(~dead_N, -math.inf).topk(512)
        #         return vals_BK.relu(), idx_BK
        #     aux_BD = decode_selected(self.sae, *encode_selected(self.sae, x_BD, select))
        #     loss += (x_BD - terms.xhat_BD - aux_BD).square().sum(1).mean() / 32
        fired_N = all_reduce_(terms.fired_N.int(), "MAX") > 0
        self.last_fired_N.masked_fill_(fired_N, step + 1)
        # 4.
        if isinstance(self.sae, ThresholdSAE):
            l0 = (terms.f_BN > 0).sum() / len(x_BD)
            l0 = all_reduce_(l0) / n_processes()
            self.lam = self.sae.adjust(self.lam, terms.f_BN, l0, lr)
        # 5.
        self.gradient_norm = update(self.sae, self.adam, loss, lr, cfg.clip)
        if not math.isfinite(self.gradient_norm):
            why = failure_of(cfg, x_BD)
            self.failure = f"{cfg.out}: gradient not finite at step {step}; {why}"

    def log(self, x_BD, done, scale, **more):
        """Adds a line to metrics.jsonl, and says once if Ω outweighs the reconstruction."""
        dead = int((done - self.last_fired_N >= DEAD_AFTER).sum())
        omega = self.penalty.of_dense
        m = {
            "step": done,
            "tokens": done * self.cfg.batch,
            "lr": self.adam.param_groups[0]["lr"],
            "alpha": self.alpha,
            "activation_scale": scale,
            "gradient_norm": self.gradient_norm,
            "dead": dead if done >= DEAD_AFTER else None,  # earlier, none can be
            **figures_of(self.sae, gather_tokens(x_BD), self.lam, self.alpha, scale, omega),
            **more,
        }
        if m["penalty_share"] > 1 and all(past["penalty_share"] <= 1 for past in self.history):
            weighs = f"the penalty weighs {m['penalty_share']:.3g} times the reconstruction"
            say(f"\n{self.cfg.out}: {weighs}: {alpha_advice(self.cfg, x_BD)}")
        self.history.append(m)
        if rank() == 0:
            with Path(self.cfg.out, "metrics.jsonl").open("a") as file:
                file.write(json_line(m))

    def short_figures(self):
        """What fits beside a bar of the progress."""
        m = self.history[-1]
        return f"EV {m['explained_variance']:.4f}, αΩ/rec {m['penalty_share']:.1%}"

    def figures(self):
        """The last figures in a line."""
        m = self.history[-1]
        dead = "unknown" if m["dead"] is None else f"{m['dead'] / self.cfg.d_sae:.2%}"
        return (
            f"EV {m['explained_variance']:.4f}  MSE {m['mse']:<6.4g}  cosine {m['cosine']:.4f}  "
            f"L0 {m['l0']:.1f}  dead {dead}  "
            f"Ω {m['omega']:<6.4g}  αΩ/rec {m['penalty_share']:.2%}"
        )


@torch.no_grad()
def figures_of(sae, x_BD, lam, alpha, scale, omega=sgo_penalty_dense):
    """Figures of a batch after its update, outside of autocast. `omega` computes Ω of latents f.

    The terms of the loss are in the units of training, in which activations are `scale` times those
    of the model; `mse` is in the model's.
    """
    terms = loss_terms(sae, x_BD, omega)
    error = terms.reconstruction
    figures = {
        "loss": total_loss(terms, lam, alpha),
        "reconstruction": error,
        "sparsity": terms.sparsity,
        "omega": terms.omega,
        "lambda": lam,
        "penalty_share": alpha * terms.omega / error,
        "mse": error / x_BD.shape[1] / scale**2,  # per element
        "explained_variance": 1 - error / (x_BD - x_BD.mean(0)).square().sum(1).mean(),
        "cosine": F.cosine_similarity(x_BD, terms.xhat_BD, dim=1).mean(),
        # Of the autoencoder as it is saved: in batchtopk θ decides there, and not the batch.
        "l0": (sae.encode(x_BD) > 0).sum(1).float().mean(),
    }
    return {name: figure.item() for name, figure in figures.items()}


def begin(runs, data, steps):
    """Sets what depends on the data, from its first batches.

    Returns the factor by which activations are multiplied, and the data from the first batch on.
    α is not changed by it: on activations times 2, the same α weighs Ω 4 times as much beside the
    reconstruction. With --normalize, ‖x‖² averages D, and the paper's strength is α 1,600 / D.
    """
    cfg = runs[0].cfg
    first = list(itertools.islice(data, min(steps, math.ceil(SAMPLE / cfg.batch))))
    sample_BD = gather_tokens(torch.cat([batch.x_BD for batch in first]).float())
    scale = 1.0
    if cfg.normalize:
        scale = (sample_BD.shape[1] / sample_BD.square().sum(1).mean()).sqrt().item()
    sample_BD *= scale
    median_D = geometric_median(sample_BD)
    for run in runs:
        run.sae.b_dec.data.copy_(median_D)
        if isinstance(run.sae, ThresholdSAE):
            run.sae.start(sample_BD, run.cfg.lam)
    return scale, itertools.chain(iter(first), data)  # `iter` lets go of them when they are used up


def finite(figures):
    """The figures as JSON has them: None where one is no finite number, such as 0 / 0."""
    known = {}
    for name, value in figures.items():
        known[name] = value if value is not None and math.isfinite(value) else None
    return known


def json_line(figures):
    """A line of metrics.jsonl."""
    return json.dumps(finite(figures)) + "\n"


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the argument is its number."""


@contextmanager
def handling_signals(handler):
    """Within, SIGINT and SIGTERM call the handler."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def interrupt(number, frame):
    """Handles a signal by raising Interrupted, wherever the program is."""
    raise Interrupted(number)


def train(cfgs, folder, device, dtype):
    """Trains autoencoders on the same batches and saves each in its `out`.

    Their settings differ in those of LISTS and in `out` alone.
    """
    cfg = cfgs[0]
    # All float32 products of a GPU are in TF32: those of the language model, of training, and of
    # the figures.
    torch.backends.cuda.matmul.allow_tf32 = True
    steps = cfg.tokens // cfg.batch
    rows = load_texts(cfg)
    reader = load_lm(cfg.model, cfg.layer, device, dtype, cfg.ctx)
    # The language model's dtype decides whether the autoencoder has mixed precision (5.1).
    mixed = dtype == torch.bfloat16
    runs = [Run(c, reader.lm.config.hidden_size, device, mixed) for c in cfgs]
    checkpoint = folder / "checkpoint.pt"
    done = 0
    scale = None
    if cfg.resume and checkpoint.exists():
        scale, done = load_checkpoint(checkpoint, runs)
    say(f"{cfg.model} in {dtype} on {device}; steps {done:,} to {steps:,}, into {folder}")
    for c in cfgs:
        most = scheduled_alpha(c, steps - 1, steps)
        if most < c.alpha:
            say(f"{c.out}: α rises to {most:.4g} and not to {c.alpha:g}, since the run ends before")
    data = batches(cfg, rows, reader, done)
    if scale is None:
        scale, data = begin(runs, data, steps)
    for run in runs:
        prepare_folder(run)
    caught = []  # signals that wait for the end of a step

    def wait(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # the same once more acts at once

    # Alone, a signal ends the reading of a batch at once. Several processes wait for the end of the
    # step, so that all end in the same one.
    while_reading = wait if torchrun() else interrupt
    bar = progress_bar(range(done, steps), initial=done, total=steps, disable=rank() > 0)
    pace = Pace(steps, device)
    try:
        for step in bar:
            try:
                with handling_signals(while_reading):
                    batch = next(data)
                    x_BD = batch.x_BD.float() * scale
            except InputError as error:
                # The data can't be read any more. Several processes may fail in different steps.
                if torchrun() or not save_checkpoint(checkpoint, runs, done, scale):
                    raise
                kept = f"step {done:,} is kept, and the same command with --resume goes on"
                raise InputError(f"{error}; {kept}") from error
            with handling_signals(wait):
                started = time.monotonic()
                for run in runs:
                    run.step(x_BD, step, steps)
                pace.add(time.monotonic() - started, batch.seconds)
                done = step + 1
                live = [run for run in runs if not run.failure]
                if not live:
                    raise InputError(f"{runs[0].failure}; the last checkpoint, if any, stays")
                if done % cfg.log_every == 0 or done == steps:
                    more = {"outliers": batch.outliers, **pace.figures(cfg.batch)}
                    for run in live:
                        run.log(x_BD, done, scale, **more)
                    pace.tell_once(done)
                    bar.set_postfix_str(live[-1].short_figures(), refresh=False)
                stop = int(all_reduce_(torch.tensor(max(caught, default=0)), "MAX"))
                if cfg.save_every and done % cfg.save_every == 0 and not stop:
                    save_checkpoint(checkpoint, runs, done, scale)
            if stop:
                raise Interrupted(stop)
    except Interrupted as interrupted:
        bar.close()
        if save_checkpoint(checkpoint, runs, done, scale):
            say(f"stopped after step {done:,}; the same command with --resume goes on")
        raise SystemExit(128 + interrupted.args[0]) from None
    with handling_signals(wait):
        save_all(runs, folder, done, scale, reader)


class Pace:
    """How long steps take, and how much memory."""

    def __init__(self, steps, device):
        self.steps = steps
        self.device = device
        self.timed = 0  # steps
        self.training = 0.0  # seconds
        self.reading = 0.0
        self.told = False

    def add(self, training, reading):
        """Counts a step, and the seconds that its training and the reading of its batch took."""
        self.timed += 1
        if self.timed == 1:
            return  # A first step also loads the device's libraries.
        self.training += training
        self.reading += reading

    def figures(self, batch):
        """For metrics.jsonl: tokens a second, reading and training, and the peak of memory."""
        seconds = self.training + self.reading
        speed = batch * (self.timed - 1) / seconds if seconds else None
        return {"tokens_per_second": speed, "peak_memory_gb": peak_memory(self.device)[0]}

    def tell_once(self, done):
        """One line after the first steps: how fast it goes, when it ends and what it needs."""
        if self.told or self.timed < 2:
            return
        self.told = True
        training = self.training / (self.timed - 1)
        reading = self.reading / (self.timed - 1)
        end = time.localtime(time.time() + (self.steps - done) * (training + reading))
        used, there_is = peak_memory(self.device)
        memory = f"; peak memory {used:.1f} of {there_is:.0f} GB" if used else ""
        say(
            f"\n{self.steps - done:,} steps to go, of {1000 * training:.3g} ms, and "
            f"{1000 * reading:.3g} ms for reading; done at about "
            f"{time.strftime('%a %H:%M', end)}{memory}"
        )


def peak_memory(device):
    """The peak of the memory used, and how much there is, in GB: of the GPU, or of the process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    try:
        import resource
    except ImportError:  # Windows does not tell it so
        return None, None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return used / 1e9, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def save_all(runs, folder, done, scale, reader):
    """Saves the autoencoders that did not fail, and then prints their last figures.

    The checkpoint goes last, and where one can't be saved it stays, so that nothing is lost.
    """
    failures = [run.failure for run in runs if run.failure]
    saved = []
    unsaved = []
    for run in runs:
        if not run.failure and rank() == 0:
            try:
                save_sae(run.sae, run.cfg, run.cfg.out, scale, about(run, reader))
                saved.append(run)
            except OSError as error:
                unsaved.append(f"{run.cfg.out} can't be written: {error}")
    if int(all_reduce_(torch.tensor(len(unsaved)), "MAX")):  # the first process's number
        save_checkpoint(folder / "checkpoint.pt", runs, done, scale)
    elif rank() == 0:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    if rank() == 0:
        for run in saved:
            print(f"{Path(run.cfg.out).name:<26}  {run.figures()}")
        if saved:
            print(f"saved in {folder}")
    if failures + unsaved:
        raise InputError("; ".join(failures + unsaved))


# ------------------------------------------------------------------------------------------ files
def about(run, reader):
    """What cfg.json says of a run beside its settings."""
    last = run.history[-1]
    tokenizer = reader.tokenizer
    return {
        "hf_hook_name": reader.hook_name,
        "prepend_bos": bool(first_id(tokenizer.bos_token_id, tokenizer.cls_token_id)),
        "l0": last["l0"],
        "dead_latents": last["dead"],
    }


def write_whole(path, write):
    """Lets `write` make a file, given the path, beside its place, and puts it there when it is
    whole. So a crash or a full disk leaves the file that was there before."""
    aside = path.with_name(f"{path.name}.part")
    try:
        write(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def prepare_folder(run):
    """Makes the folder of a run, and its metrics.jsonl with what was logged up to its checkpoint.

    What a run logged after its checkpoint, before it was killed, it is going to log again.
    """
    lines = "".join(map(json_line, run.history))
    if rank() == 0:
        Path(run.cfg.out).mkdir(parents=True, exist_ok=True)
        write_whole(Path(run.cfg.out, "metrics.jsonl"), lambda path: path.write_text(lines))


FREE = ("out", "device", "log_every", "save_every", "resume")  # a resumed run may change these
LATER = {"pair_weights": "coactivation"}  # settings that older files lack, and what they were then


def fixed_settings(cfg):
    return {name: value for name, value in vars(cfg).items() if name not in FREE}


def check_settings(path, theirs, ours):
    """Refuses to resume with other settings than those that a file has, a dict for each run."""
    if len(theirs) != len(ours):
        raise InputError(f"{path} is of {len(theirs)} autoencoders, and the command of {len(ours)}")
    changed = []
    for before, now in zip(theirs, ours, strict=True):
        before = LATER | before
        for name, value in now.items():
            if before.get(name) != value:
                changed.append(f"{flag_of(name)} {before.get(name)}, not {value}")
    if changed:
        raise InputError(f"{path} was written with {'; '.join(dict.fromkeys(changed))}")


def settings_of(runs):
    return [{**fixed_settings(run.cfg), "processes": n_processes()} for run in runs]


def save_checkpoint(path, runs, done, scale):
    """Writes what the runs need to continue. Returns whether it could.

    With --resume a run gets, from here on, the batches that it would have got, and on a CPU the
    same weights to the bit; a GPU's sums vary in their last digits. All settings but FREE must be
    the same, and so must the number of processes. A run that was killed before its first
    checkpoint starts anew.

    No state of a random generator is needed: after the weights, only the order of the data is
    drawn, and `batches` finds its place again from the number of steps.
    """
    content = {"done": done, "scale": scale, "settings": settings_of(runs), "runs": []}
    for run in runs:
        state = {name: getattr(run, name) for name in ("lam", "last_fired_N", "history", "failure")}
        state.update(sae=run.sae.state_dict(), adam=run.adam.state_dict())
        content["runs"].append(state)
    written = True
    if rank() == 0:
        try:
            write_whole(path, partial(torch.save, content))
        except (OSError, RuntimeError) as error:
            written = False
            # torch.save hides a disk's error behind one of its own.
            reason = error.__context__ or error
            say(f"\ncheckpoint of step {done} can't be written, the last one stays: {reason}")
    if torchrun():
        dist.barrier()  # a process that ended before this is written would end the first one too
    return written


def load_checkpoint(path, runs):
    """Brings the runs to where a checkpoint has them. Returns its scale and the steps done."""
    with loading(str(path)):
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; without it the run starts anew")
        saved = torch.load(path, map_location=runs[0].lam.device, weights_only=True)
        check_settings(path, saved["settings"], settings_of(runs))
        for run, state in zip(runs, saved["runs"], strict=True):
            run.sae.load_state_dict(state.pop("sae"))
            run.adam.load_state_dict(state.pop("adam"))
            vars(run).update(state)
        return saved["scale"], saved["done"]


@torch.no_grad()
def save_sae(sae, cfg, folder, scale=1.0, more=()):
    """Writes a folder that SAELens loads: cfg.json, and sae_weights.safetensors in float32.

    `more` is what its metadata has beside the settings.

    In training, activations were multiplied by `scale`. Dividing biases and thresholds by it gives
    the autoencoder of the model's own activations: f(s x) = s ReLU((x - b_dec/s) W_enc + b_enc/s),
    with the same latents active.
    """
    from safetensors.torch import save

    weights = {
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc / scale,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec / scale,
    }
    content = {
        "architecture": getattr(sae, "saelens_name", "topk"),
        "d_in": len(sae.b_dec),
        "d_sae": len(sae.b_enc),
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {
            "model_name": cfg.model,
            "hook_name": f"blocks.{cfg.layer}.hook_resid_post",
            "hook_layer": cfg.layer,
            "dataset_path": cfg.dataset,
            "context_size": cfg.ctx,
            "prepend_bos": True,
            "activation_scale": scale,
            "sae_lens_version": "6.0.0",  # whose format this is; SAELens drops metadata without it
            "settings": vars(cfg),
            "torch_version": torch.__version__,
            **dict(more),
        },
    }
    if content["architecture"] == "topk":
        content["k"] = sae.k
        content["rescale_acts_by_decoder_norm"] = False
    if content["architecture"] == "jumprelu":
        weights["threshold"] = sae.threshold() / scale
    weights = {name: w.detach().float().cpu().contiguous() for name, w in weights.items()}
    text = json.dumps(content, indent=2)
    Path(folder).mkdir(parents=True, exist_ok=True)
    # safetensors's own writing of files has errors of its own kind, and makes them unreadable to
    # other users.
    data = save(weights)
    write_whole(Path(folder, "sae_weights.safetensors"), lambda path: path.write_bytes(data))
    write_whole(Path(folder, "cfg.json"), lambda path: path.write_text(text))


def load_sae(path, device="cpu"):
    """The autoencoder of a folder that this file or SAELens wrote, in float32.

    Known are topk, standard and jumprelu. Whatever would give other latents is refused.
    """
    from safetensors.torch import load_file

    check_sae_folder(Path(path))
    with loading(str(path)):
        cfg = json.loads(Path(path, "cfg.json").read_text(encoding="utf-8"))
        if not isinstance(cfg, dict):
            raise InputError(f"{path}: cfg.json holds no settings")
        stored = load_file(Path(path, "sae_weights.safetensors"))
        weights = {name: tensor.float() for name, tensor in stored.items()}
        N, D = weights["W_dec"].shape
        # SAELens before version 6 names the architecture only where it is not the standard one.
        kind = cfg.get("architecture", "standard")
        refuse_unknown(path, kind, "architecture", ("topk", "standard", "jumprelu"))
        refuse_unknown(path, cfg.get("activation_fn_str", "relu"), "activation_fn_str", ("relu",))
        normalization = cfg.get("normalize_activations") or "none"  # null and false were none, too
        refuse_unknown(path, normalization, "normalize_activations", ("none",))
        for flag in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
            refuse_unknown(path, cfg.get(flag) or False, flag, (True, False))
        if kind == "topk":
            k = cfg.get("k")
            if type(k) is not int or not 1 <= k <= N:
                raise InputError(f"{path}: k is {k!r}, an integer from 1 to {N} is needed")
            sae = SAE(D, N, k)
        else:
            sae = ThresholdSAE(D, N, N)  # k is not used
            weights["theta"] = weights.pop("threshold", sae.theta)
        if not cfg.get("apply_b_dec_to_input", True):  # encode() subtracts b_dec: add it back
            weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]
        set_weights(sae, weights, path)
    if cfg.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norms(sae)
    return sae.to(device)


def set_weights(sae, weights, path):
    """Gives an autoencoder the weights of a file, or refuses them where they are not finite."""
    sae.load_state_dict(weights)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError(f"{path}: its weights are not finite")


def refuse_unknown(path, value, name, known):
    """Refuses a value in cfg.json that this file does not know how to honour."""
    if not any(value is one or value == one and type(value) is type(one) for one in known):
        raise InputError(f"{path} has {name} {value!r}, and known are {', '.join(map(str, known))}")


def check_sae_folder(folder):
    """Refuses a folder without our two files, and says what it is where that can be told."""
    if (folder / "cfg.json").exists() and (folder / "sae_weights.safetensors").exists():
        return
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not there:
        raise InputError(f"{folder}: there is no such folder, or it is empty")
    kind = "an unknown format"
    if {"ae.pt", "config.json"} <= set(there):
        kind = "dictionary_learning's format"
    elif {"sae.safetensors", "cfg.json"} <= set(there):
        kind = "sparsify's format"
    elif {"params.safetensors", "config.json"} <= set(there):
        kind = "Gemma Scope 2's format"
    raise InputError(
        f"{folder} has {', '.join(there[:5])}, which is {kind}; needed are cfg.json and "
        "sae_weights.safetensors, as SAELens and save_sae write them"
    )


@torch.no_grad()
def fold_decoder_norms(sae):
    """Makes the decoder's rows unit vectors and multiplies their latents by what their norms were.

    A top-k autoencoder then selects by the product of both, as SAELens does where its
    rescale_acts_by_decoder_norm is set. With thresholds the same latents are active as before.
    """
    norm_N = sae.W_dec.norm(dim=1).clamp(min=1e-8)
    for tensor in (sae.W_enc, sae.b_enc, *sae.buffers()):
        tensor.mul_(norm_N)
    sae.W_dec.div_(norm_N[:, None])


# --------------------------------------------------------------------------------------------- demo
def library_texts():
    """Names and texts of the standard library's sources and of the topics of Python's help."""
    import sysconfig
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip.isdisjoint(name.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield name.as_posix(), text
    for name, text in sorted(topics.items()):
        yield f"help/{name}", text


def demo_files(folder):
    """Makes the demo's heldout.jsonl, train.jsonl and language model; this takes about 100 s.

    They are made beside their place, so that what is there is whole. Another demo waits for them.
    """
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a demo that was killed
        part.mkdir()
        documents = {"heldout": [], "train": []}
        for name, text in library_texts():
            split = "heldout" if zlib.crc32(name.encode()) % 10 == 0 else "train"
            documents[split].append({"name": name, "text": text})
        for split, rows in documents.items():
            (part / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_demo_lm([row["text"] for row in documents["train"]], part)
        part.rename(folder)


def train_demo_lm(texts, folder, steps=1000, batch=8, ctx=128):
    """Trains a byte-level BPE tokenizer and a small Gemma-2 on texts, and saves both."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, 1024, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=ctx,
    )
    lm = Gemma2ForCausalLM(config)
    ids_RL = torch.tensor(list(token_contexts(texts, tokenizer, ctx)))
    adam = torch.optim.AdamW(
        lm.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    order = torch.randperm(len(ids_RL))[: steps * batch].split(batch)
    for step, rows in enumerate(progress_bar(order, desc="demo language model", unit="step")):
        decay = 0.02 + 1.2 * (1 - step / steps)
        adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, decay)
        loss = lm(input_ids=ids_RL[rows], labels=ids_RL[rows]).loss
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demo_folder():
    """Where the demo's model and text are, which are made once and kept in SGO_CACHE."""
    cache = Path(os.environ.get("SGO_CACHE", "~/.cache/sgo_sae")).expanduser()
    return cache / f"demo-python3.{sys.version_info.minor}"


# --------------------------------------------------------------------------------------------- main
def flag_of(name):
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def new_parser(usage, text):
    """A parser whose help shows the defaults, and whose errors are one line, without the usage."""
    return argparse.ArgumentParser(
        prog=usage.split()[0],
        usage=argparse.SUPPRESS,
        description=f"{text} Usage: python {usage}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def parse_args(argv):
    """The settings of a command line: a Config for each combination of the values of LISTS."""
    parser = new_parser("sgo_sae.py [--flag VALUE ...]", __doc__.splitlines()[0])
    comment = re.compile(r"^    (\w+): .+  # (.+)$", re.MULTILINE)
    comments = dict(comment.findall(inspect.getsource(Config)))
    choices = {"arch": tuple(ARCHITECTURES), "pair_weights": tuple(PENALTIES), "dtype": DTYPES}
    for field in dataclasses.fields(Config):
        options = {"dest": field.name, "default": field.default, "help": comments[field.name]}
        if "(default" in comments[field.name]:
            options["default"] = argparse.SUPPRESS  # of argparse's own line on it
        if field.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = field.type
            options["choices"] = choices.get(field.name)
        if field.name in LISTS:
            options["nargs"] = "+"
            options["default"] = [field.default]
        parser.add_argument(flag_of(field.name), **options)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    values = vars(parser.parse_args(argv))
    lists = itertools.product(*[values[name] for name in LISTS])
    cfgs = [Config(**dict(values, **dict(zip(LISTS, one)))) for one in lists]
    # Where α is 0 no pair has a weight, and one of --pair-weights is trained.
    return [cfg for cfg in cfgs if cfg.alpha != 0 or cfg.pair_weights == values["pair_weights"][0]]


def check(cfg):
    """Refuses settings that can't work."""
    for name, value in vars(cfg).items():
        least = AT_LEAST.get(name, 0)
        most = AT_MOST.get(name, sys.float_info.max)
        if type(value) in (int, float) and not least <= value <= most:
            up_to = f" and at most {most}" if name in AT_MOST else ""
            raise InputError(f"{flag_of(name)} must be at least {least}{up_to}, but is {value}")
    if 0 < cfg.max_norm < 1:
        raise InputError(f"--max-norm {cfg.max_norm} would leave out half of the tokens and more")
    own_class = ARCHITECTURES[cfg.arch]
    if own_class is not SAE and not hasattr(own_class, "saelens_name"):
        raise InputError(f"--arch {cfg.arch}: its class has no saelens_name to be saved by")
    if cfg.k > cfg.d_sae:
        raise InputError(f"--k {cfg.k} is more than the {cfg.d_sae} latents of --dict")
    if cfg.tokens < cfg.batch:
        raise InputError(f"--tokens {cfg.tokens} is less than one batch of {cfg.batch}")
    if cfg.batch % n_processes():
        raise InputError(f"--batch {cfg.batch} can't be shared evenly by {n_processes()} processes")
    if cfg.demo and (cfg.model or cfg.dataset):
        raise InputError("--demo makes its own model and text: no --model, no --dataset")
    if cfg.lam == 0 and issubclass(ARCHITECTURES[cfg.arch], ReLU):
        raise InputError(f"--sparsity 0 leaves {cfg.arch} nothing to adjust")


def choose_folders(cfgs):
    """Sets each run's `out` and returns the folder of all."""
    cfg = cfgs[0]
    names = []
    for c in cfgs:
        ablation = "" if c.pair_weights == "coactivation" else f"-{c.pair_weights}"
        names.append(f"{c.arch}-n{c.d_sae}-k{c.k}-a{c.alpha:g}{ablation}-s{c.seed}")
    if len(set(names)) < len(names):
        twice = ", ".join(flag_of(name) for name in LISTS)
        raise InputError(f"a value of one of {twice} is given twice")
    what = names[0] if len(cfgs) == 1 else "grid"
    folder = Path(cfg.out or f"runs/{Path(cfg.model or 'demo').name}-l{cfg.layer}-{what}")
    for c, name in zip(cfgs, names, strict=True):
        c.out = str(folder / name if len(cfgs) > 1 else folder)
    return folder


@contextmanager
def taken(folder):
    """Makes a folder and keeps other processes out of it. It is removed where it stays empty."""
    import filelock

    if rank() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "running.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"{folder}: another run is under way in this folder") from error
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def check_folder(folder, cfgs):
    """Refuses a folder that holds runs, unless they can be resumed. Returns whether they ended."""
    found = []
    for depth in ("", "*/", "*/*/"):
        for name in ("checkpoint.pt", "cfg.json", "metrics.jsonl"):
            found += folder.glob(depth + name)
    if cfgs[0].resume:
        if folder / "checkpoint.pt" in found:
            return False
        saved = [cfg for cfg in cfgs if Path(cfg.out, "cfg.json") in found]
        # One whose gradient was not finite has been logged, and is not saved.
        missing = [cfg.out for cfg in cfgs if Path(cfg.out, "metrics.jsonl") not in found]
        for cfg in saved:
            file = Path(cfg.out, "cfg.json")
            with loading(str(file)):
                theirs = json.loads(file.read_text())["metadata"]["settings"]
            check_settings(file, [theirs], [fixed_settings(cfg)])
        if saved and missing:
            raise InputError(
                f"{folder}: its runs have ended, and {missing[0]} is not one of them; "
                "choose another --out for it"
            )
        if saved:
            return True
        # Where there is nothing but metrics.jsonl, the run was killed before its first checkpoint.
        if {Path(cfg.out, "metrics.jsonl") for cfg in cfgs} >= set(found):
            return False
    if found:
        stopped = folder / "checkpoint.pt" in found
        advice = "--resume continues it" if stopped else "choose another --out"
        raise InputError(f"{folder} holds a run, {found[0]}: {advice}")
    return False


def find_device(name, dtype):
    """The device and dtype of those names; auto is cuda and bfloat16 where there is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {error}") from error
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def work(argv):
    """Trains what the command line asks for."""
    cfgs = parse_args(argv)
    start_processes(cfgs[0].device)
    for cfg in cfgs:
        check(cfg)
    device, dtype = find_device(cfgs[0].device, cfgs[0].dtype)
    folder = choose_folders(cfgs)
    for cfg in cfgs:
        cfg.dtype = str(dtype).removeprefix("torch.")  # what auto stands for here
        if cfg.demo:
            cfg.model = str(demo_folder())
            cfg.dataset = str(demo_folder() / "train.jsonl")
    with taken(folder):
        if decide_together(lambda: check_folder(folder, cfgs)):
            say(f"{folder} holds this run, and it has ended: there is nothing to resume")
            return
        if cfgs[0].demo:
            decide_together(lambda: demo_files(demo_folder()))
        train(cfgs, folder, device, dtype)
    if torchrun():
        dist.destroy_process_group()
    if cfgs[0].demo:
        print(f"to see what the penalty did:  python eval_sae.py {folder} --html page.html")


class Output:
    """A stream that text is written to, if it can be: no print may end a run.

    Characters that its encoding lacks are escaped. When a pipe is closed or a disk full, the rest
    goes nowhere.
    """

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # None is a stream that was closed before

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


MEMORY_ADVICE = "smaller --dict, --k, --batch, --buffer and --lm-batch need less"


def is_lack_of_memory(error):
    """Whether a RuntimeError of PyTorch says that memory is lacking, on a CPU or a GPU."""
    return bool(re.search("allocate|ALLOC_FAILED|out of memory", str(error)))


def main(argv, work=work, program="sgo_sae.py", memory_advice=MEMORY_ADVICE):
    """Does the work and returns the exit code. What the user can mend is one line, and code 2.

    eval_sae.py has its own work, which may return a code, its own name and its own advice.
    """
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    logging.disable()  # the libraries raise what they also log
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            with handling_signals(interrupt):
                return work(argv) or 0
        except SystemExit as end:  # of the parser, or of a run that was stopped
            return end.code
        except Interrupted as interrupted:
            print(f"{program}: stopped", file=sys.stderr)
            return 128 + interrupted.args[0]
        except (InputError, OSError) as error:  # an OSError here is a file that can't be written
            message = " ".join(str(error).split())
        except RuntimeError as error:
            if is_lack_of_memory(error):
                message = f"out of memory, {memory_advice}: {str(error)[:200]}"
            elif torchrun() and ("closed by peer" in str(error) or "NCCL" in str(error)):
                message = f"another process has ended, or can't be reached: {str(error)[:200]}"
            else:
                raise
        print(f"{program}: error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
