"""Sparse autoencoders with sparsity-guided orthogonality (SGO): a reference in one file.

A top-k sparse autoencoder (SAE) is trained on a language model's activations. SGO adds one term to
its loss, which pushes its latents (the paper's features) apart: for each pair the square of the
mean product of their activations, weighted by how often both are active on the same tokens. It is
the method of "Feature Specialization Through Sparsity-Guided Orthogonality", below called the
paper.

    python sgo_sae.py --demo                        a small model made on this machine
    python sgo_sae.py --dict 18432 --alpha 0.075    the paper's run 4: Gemma-2-2B, layer 12
    torchrun --nproc-per-node=4 sgo_sae.py          its batches shared by four GPUs
    python sgo_sae.py --help                        every setting

Part 1 is the reference. A reader who stops at its end has missed nothing of the method.

    settings       what can be chosen; the defaults are the paper's run 4
    method         the paper: the model, Eq. 2 and 3, one update, the schedules; needs torch alone
    fast           the same results up to rounding, faster; if they ever differ, `method` is right
    activations    from text to batches of activations, and which tokens are left out
    training       `Run.step` is one training step, `train` the loop

Part 2 is the program around it.

    baselines      batchtopk, relu and jumprelu
    processes      all that torchrun changes, and what ends a run early
    texts          local files and the Hub
    language model any of transformers, up to a layer
    files          checkpoints, and results in SAELens's format
    demo           a small language model and its text
    main           from the command line to a run

Each of these is told in one place:

    the loss and its units                      `total_loss`
    a training step, and an auxiliary loss      `Run.step`
    why the fast Ω is the paper's               the head of `fast`
    which tokens are left out                   the head of `activations`
    what --normalize changes                    `begin`
    what --resume promises                      `save_checkpoint`
    what several processes change               the head of `processes`
    another architecture                        the head of `baselines`

Shapes are in the names: x_BD is an array of B by D. B are the tokens of a batch, L the positions of
a context, D the hidden size, N the latents (d_sae) and K the active latents of a token. Other
letters are told where they are used. λ is `lam`, and Ω is `omega`.

What this file does not do: it has no auxiliary loss against dead latents, as the paper has none. It
trains on one layer, and each GPU must hold the language model up to it. It logs to a file, not to a
service. Its figures are of training batches; eval_sae.py measures held-out text.
"""

import argparse
import codecs
import csv
import dataclasses
import functools
import glob
import inspect
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
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
    dataset: str = "monology/pile-uncopyrighted"  # Hugging Face id, local file, folder or pattern
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
    dtype: str = "auto"  # of the model; auto: bfloat16 on cuda; with it the SAE has mixed precision
    out: str = None  # new folder of the result, or of all (default: runs/MODEL-lLAYER-ARCH-...)
    log_every: int = 50  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints; 0 writes one only when stopped
    resume: bool = False  # continue the run that the folder holds, if it holds one
    demo: bool = False  # small Gemma-2 and text made on this machine, settings scaled to them


LISTS = ("arch", "d_sae", "k", "alpha", "pair_weights", "seed")


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


def orthogonality(f_BN, weighted=True):
    """Third term of Eq. 2, unit x⁴: Ω = Σ_{i≠j} w_ij ⟨f_i, f_j⟩², each pair in both its orders.

    Ours: ⟨f_i, f_j⟩ is divided by B, and i = j is left out. w, a ratio of counts, has no gradient.
    If not `weighted`, w_ij is 1 for each pair: an ablation, which is ours, too.
    """
    w_NN = coactivation_weights(f_BN.detach())
    if not weighted:
        w_NN = torch.ones_like(w_NN)
    w_NN.fill_diagonal_(0)
    gram_NN = f_BN.T @ f_BN / len(f_BN)  # ⟨f_i, f_j⟩
    return (w_NN * gram_NN**2).sum()


class Terms(NamedTuple):
    """The terms of Eq. 2 for a batch, and detached by-products."""

    reconstruction: torch.Tensor  # ‖x - x̂‖², unit x²: the sum over D. Ours: the mean over tokens.
    sparsity: torch.Tensor  # ‖f‖₁, unit x
    omega: torch.Tensor  # Ω, unit x⁴
    xhat_BD: torch.Tensor
    fired_N: torch.Tensor  # which latents are active on at least one token of the batch
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
    """Eq. 2, in which λ‖f‖₁ stands beside top-k as well.

    With means over the B tokens of a batch, and the unit of each term in brackets:
    mean ‖x - x̂‖² [x²] + λ mean ‖f‖₁ [x] + α Σ_{i≠j} w_ij (mean f_i f_j)² [x⁴].
    """
    return terms.reconstruction + lam * terms.sparsity + alpha * terms.omega


@torch.no_grad()
def update(sae, adam, loss, lr, clip=1.0):
    """One update by `adam`, torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999)) (4.2, 5.1).

    Returns the norm of the projected gradient, before it is clipped. Where it is not finite,
    neither `sae` nor `adam` changes.
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
# The same results as `method`, up to rounding, in less time and memory. `Run.terms` chooses between
# the two, and the update is that of `method`.
#
# Of Ω, its gradient is computed: ∂Ω/∂f_bi = (4/B) Σ_j w_ij ⟨f_i, f_j⟩ f_bj. The square gives 2, and
# so do a pair's two orders. Ω itself is Σ f ∂Ω/∂f / 4, as it has degree 4 in f (Euler). Three ways
# compute the same sum. By tiles, w_ij ⟨f_i, f_j⟩ is computed for a block of i at a time, from dense
# products over all tokens. By pairs, and by blocks of pairs on a CPU, a token adds to |M_i ∩ M_j|
# and ⟨f_i, f_j⟩ for the pairs of its own K latents alone: for all others it would add 0. In each, w
# is a constant, and f at least 0.
#
# In a top-k autoencoder `select` alone decides which latents are active. `topk_loss_terms` repeats
# `SAE`'s decoder and sparsity term, and the backward pass of a CPU its encoder. To change one of
# these, derive a class from `SAE`: what is not `SAE` itself is trained by `loss_terms`.
def product(a, b):
    """a @ b. Products of half precision are exact, and summed in float32; bfloat16 itself does not
    count above 256. Float32 is as PyTorch is set, in `train` TF32 on a GPU. Counts are exact in
    each.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def gradient_by_tiles(f_BN, weighted=True, tile=None):
    """∂Ω/∂f (B, N) of latents f by dense products: O(B N²) time at most, and no N × N array.

    It is (4/B) f M, where M_ij = w_ij ⟨f_i, f_j⟩ is symmetric, and 0 for i = j. So only tiles M_TJ
    on and right of its diagonal are computed: T is a block of rows, J are the columns from T's
    first row on. A tile adds f_J M_TJᵀ to the columns T of f M. By symmetry it is also the tile of
    M below the diagonal, and so adds f_T M_TJ to the columns right of T.

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
        if weighted:
            matrix_TJ = product(active_BA[:, start:end].T, active_BA[:, start:])  # |M_i ∩ M_j|
            matrix_TJ /= torch.minimum(size_A[start:end, None], size_A[start:])  # Eq. 3
            matrix_TJ *= product(f_BT.T, f_BJ).div_(B)  # ⟨f_i, f_j⟩
        else:
            matrix_TJ = product(f_BT.T, f_BJ).div_(B)
        matrix_TJ = matrix_TJ.fill_diagonal_(0).to(f_BA.dtype)  # 0 for i = j
        gradient_BA[:, start:end] += product(f_BJ, matrix_TJ.T)
        gradient_BA[:, end:] += product(f_BT, matrix_TJ[:, tile:])
    gradient_BN = torch.zeros(B, N, dtype=dtype, device=f_BA.device)
    gradient_BA = gradient_BA[:, : len(active_latents)].mul_(4 / B)
    return gradient_BN.index_copy_(1, active_latents, gradient_BA)


def gradient_by_pairs(vals_BK, idx_BK, d_sae, weighted=True):
    """∂Ω/∂f of the entries (B, K), from the P = K (K - 1) / 2 pairs of latents of each token.

    The B P pairs are sorted into U different ones and summed. That takes time and memory for
    O(B K²) entries: 7 GB for B 2,048 and K 320, and 0.3 GB for K 64. A million latents cost no more
    than ten thousand.
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

    matrix_U = sum_over_tokens(vals_BK[:, i_P] * vals_BK[:, j_P])  # B ⟨f_i, f_j⟩
    if weighted:
        both_U = sum_over_tokens(active_BK[:, i_P] * active_BK[:, j_P])  # |M_i ∩ M_j|
        smaller_U = torch.minimum(size_N[pair_U // d_sae], size_N[pair_U % d_sae])
        matrix_U *= both_U / smaller_U.clamp(min=1)  # Eq. 3
    matrix_BP = matrix_U[place_BP]
    gradient_BK = torch.zeros_like(vals_BK)
    gradient_BK.index_add_(1, i_P, matrix_BP * vals_BK[:, j_P])
    gradient_BK.index_add_(1, j_P, matrix_BP * vals_BK[:, i_P])
    gradient_BK *= active_BK * (4 / B**2)
    return torch.zeros_like(vals_BK).scatter(1, order_BK, gradient_BK)


class Omega(torch.autograd.Function):
    """Ω of f, from a function that computes ∂Ω/∂f of f. It can be differentiated once, backward."""

    @staticmethod
    def forward(ctx, f, gradient_of):
        with torch.autocast(f.device.type, enabled=False):  # The caller's does not act here.
            gradient = gradient_of(f.detach())  # or a CPU's threads would record a graph
            ctx.save_for_backward(gradient)
            return (f * gradient).sum() / 4  # Euler

    @staticmethod
    def backward(ctx, d_omega):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("Ω has no second derivative here; `orthogonality` has all")
        (gradient,) = ctx.saved_tensors
        return d_omega * gradient, None


# Pairs are faster where N > PAIRS_PAY · K. For each product, tiles take B N² multiply-adds, pairs
# B K² entries. On an H200 an entry takes as long as 127² multiply-adds do, and on a CPU as 15².
PAIRS_PAY = {"cuda": 127, "cpu": 15}
PAIRS_FIT = 2048 * 320**2  # B K² of run 4, for which `gradient_by_pairs` needs 7 GB of a GPU


def sgo_penalty(vals_BK, idx_BK, d_sae, weighted=True):
    """`orthogonality` of latents of which each token has K selected: their values, at least 0, and
    their indices, (B, K) each.

    All active latents of a token must be among its K, each once. Values of 0 get no gradient, as
    ReLU's derivative is 0 there.
    """
    B, K = vals_BK.shape
    pays = d_sae > PAIRS_PAY.get(vals_BK.device.type, 127) * K

    def gradient_of(vals_BK):
        if pays and vals_BK.is_cpu:
            return gradient_by_blocks(vals_BK, idx_BK, d_sae, weighted)
        if pays and B * K**2 <= PAIRS_FIT:
            return gradient_by_pairs(vals_BK, idx_BK, d_sae, weighted)
        gradient_BN = gradient_by_tiles(dense(vals_BK, idx_BK, d_sae), weighted)
        return gradient_BN.gather(1, idx_BK) * (vals_BK > 0)

    return Omega.apply(vals_BK, gradient_of)


def sgo_penalty_dense(f_BN, weighted=True):
    """`orthogonality` of latents f (B, N), at least 0.

    Latents that are not active have a gradient too. ReLU and top-k drop it, but JumpReLU passes it
    on to its thresholds.
    """
    if not f_BN.requires_grad:  # Without a gradient only active latents matter.
        most = max(1, int((f_BN > 0).sum(1).max()))
        vals_BK, idx_BK = f_BN.topk(most, dim=1, sorted=False)
        return sgo_penalty(vals_BK, idx_BK, f_BN.shape[1], weighted)
    return Omega.apply(f_BN, lambda f_BN: gradient_by_tiles(f_BN, weighted))


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


# What a CPU does differently; skip it on a first reading, up to the activations. Its dense products
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


def gradient_by_blocks(vals_BK, idx_BK, d_sae, weighted=True, cells=1 << 18):
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
        w_TN = both_TN.div_(torch.minimum(size_T[:, None], size_N))  # Eq. 3
        if not weighted:
            w_TN.fill_(1)
        w_TN.diagonal(first).zero_()  # i = j
        return torch.linalg.vecdot(w_TN.mul_(gram_TN).take(cell_SK), f_SK)

    threads = torch.get_num_threads()
    workers = {"initializer": torch.set_num_threads, "initargs": (1,)}  # each computes alone
    try:
        with ThreadPoolExecutor(threads, **workers) as pool:
            parts = list(pool.map(gradient_of, blocks))
    finally:
        torch.set_num_threads(threads)  # Workers changed the default of new threads, too.
    gradient_E = torch.zeros_like(f_E)
    gradient_E[entry_E] = torch.cat([f_E[:0], *parts])
    return gradient_E.view(B, K) * (4 / B**2)


# -------------------------------------------------------------------------------------- activations
# Activations come in rounds. Each reads --buffer contexts and serves their tokens shuffled, in
# batches. These tokens never reach the autoencoder:
#
#     the first of each context, BOS or not;
#     the tokenizer's special tokens, such as EOS and unknown words;
#     outliers, whose norm is over --max-norm times the median of their round: copies of other
#     tokens of the round, chosen at random, take their places;
#     the last tokens of a round, where they fill no batch;
#     blank text, text with \0, and lines of a jsonl that are not a JSON object.
#
# From here on Part 1 calls Part 2. The helpers that it uses most: `say` tells the user something,
# once if it is `say_once`. `rank()` is the number of this process and `n_processes()` how many
# there are: 0 and 1 without torchrun, and then `all_reduce_`, `gather_tokens` and
# `average_gradients` change nothing. `stop_if_asked` and `each` raise where a signal came.
class Reader(NamedTuple):
    """A language model that is read at one of its layers."""

    lm: nn.Module
    layer: nn.Module
    tokenizer: object
    hook_name: str  # the layer's path in the model with its head, such as model.layers.12


def first_id(*ids):
    """A list of the first token id that is not None; it is empty where there is none."""
    return [i for i in ids if i is not None][:1]


TEXTS_WITHOUT = 10_000  # texts in a row that may give no token


def token_contexts(texts, tokenizer, ctx):
    """Contexts of `ctx` token ids: BOS, then the texts one after another, with EOS after each."""
    bos = first_id(tokenizer.bos_token_id, tokenizer.cls_token_id)
    eos = first_id(tokenizer.eos_token_id, tokenizer.sep_token_id)
    length = ctx - len(bos)
    ids = []
    without = 0  # texts in a row that gave no token
    for text in texts:
        more = tokenizer(text, add_special_tokens=False).input_ids + eos
        without = 0 if more else without + 1
        if without == TEXTS_WITHOUT:
            raise InputError(f"the tokenizer makes no token of {without:,} texts in a row")
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

    def end_pass(module, args, output):
        raise LayerReached(output[0] if isinstance(output, (tuple, list)) else output)

    handle = layer.register_forward_hook(end_pass)
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


def harvest(reader, ids_RL, x_CD, lm_batch):
    """Fills x (C, D) from the front with the layer's activations at the kept tokens of R contexts.

    Returns how many tokens were kept. A pass of the language model reads `lm_batch` contexts, of
    which it keeps Q tokens.
    """
    filled = 0
    parts = ids_RL.split(lm_batch)
    for part_RL in each(parts, "activations"):
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


def round_of_contexts(contexts, tokenizer, per_process, enough):
    """The next contexts for each of n processes, of which a process has every n-th.

    Returns their token ids (R, L), and how many tokens each process keeps of its own. Reading stops
    early where each process has `enough` tokens: a run that is shorter than a round needs no more.
    """
    n = n_processes()
    ids = []
    kept_by_process = torch.zeros(n, dtype=torch.long)
    while len(ids) < per_process * n and kept_by_process.min() < enough:
        ids += itertools.islice(contexts, n)
        kept_by_process += kept_tokens(torch.tensor(ids[-n:]), tokenizer).sum(1)
    return torch.tensor(ids), kept_by_process


def batches(cfg, reader, skip=0):
    """Batches of activations x (B, D) in the model's dtype, without end; the first `skip` are left
    out.

    They come in rounds. A round reads contexts, drops what of their kept tokens fills no batch,
    shuffles the others' activations and serves them.
    """
    lm = reader.lm
    B = cfg.batch // n_processes()  # tokens of a batch in this process
    # Up to half of the tokens may be EOS: contexts for two batches are read to be sure of one.
    per_process = max(cfg.buffer // n_processes(), 2 * math.ceil(B / (cfg.ctx - 1)))
    enough = cfg.tokens // cfg.batch * B  # tokens of the whole run in this process
    lm_batch = cfg.lm_batch or (128 if lm.device.type == "cuda" else 32)
    contexts = token_contexts(read_texts(cfg), reader.tokenizer, cfg.ctx)
    # The activations of a round: 1.2 GB in run 4.
    shape = (per_process * (cfg.ctx - 1), lm.config.hidden_size)
    x_CD = torch.empty(shape, dtype=lm.dtype, device=lm.device)
    n_tokens = lm.get_input_embeddings().num_embeddings
    told = False
    for number in itertools.count():
        stop_if_asked()
        ids_RL, kept_by_process = round_of_contexts(contexts, reader.tokenizer, per_process, enough)
        if ids_RL.max() >= n_tokens:
            raise InputError(
                f"the tokenizer gives the id {ids_RL.max()} of {n_tokens} in the model"
            )
        n_batches = int(kept_by_process.min()) // B
        if n_batches == 0:
            raise InputError(
                f"{cfg.dataset}: of {ids_RL.numel():,} tokens read, {int(kept_by_process.sum()):,} "
                f"are kept, too few for a batch of {cfg.batch:,}; the others are special, such as "
                "unknown words, or first in their context"
            )
        if skip >= n_batches:
            skip -= n_batches
            continue
        filled = harvest(reader, ids_RL[rank() :: n_processes()], x_CD, lm_batch)
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
        for chosen_B in order.split(B)[skip:]:
            yield x_CD[chosen_B]
        skip = 0


# ----------------------------------------------------------------------------------------- training
DEAD_AFTER = 409_600  # tokens: a latent that was active on none of so many is dead; ours
SAMPLE = 16384  # tokens from which the scale, b_dec and the thresholds of baselines are taken


def scheduled_alpha(cfg, step, steps):
    """Weight of Ω at a step of a run.

    Ours: the warm-up is in proportion to the run. It starts at 0.01/0.075 of α, and reaches α after
    1,000/4,882 of the steps, which in run 4 are the paper's numbers. The settings alpha_start and
    alpha_warmup change it.
    """
    start = cfg.alpha * (0.01 / 0.075) if cfg.alpha_start is None else cfg.alpha_start
    return alpha_at(step, cfg.alpha, start, int(cfg.alpha_warmup * steps))


class Run:
    """An autoencoder in training, its settings, optimiser, α and λ, and what was logged of it."""

    def __init__(self, cfg, d_in, device, mixed_precision=False):
        torch.manual_seed(cfg.seed)  # the weights are drawn on the CPU, the same for every device
        self.cfg = cfg
        self.sae = ARCHITECTURES[cfg.arch](d_in, cfg.d_sae, cfg.k).to(device)
        self.adam = torch.optim.Adam(self.sae.parameters(), betas=(0.9, 0.999), fused=True)
        self.mixed_precision = mixed_precision and not cfg.plain
        self.started = time.monotonic()
        self.alpha = 0.0
        self.lam = torch.tensor(cfg.lam, device=device)
        self.gradient_norm = 0.0
        # For each latent, how many steps were done when it was last active; at first, 0.
        self.last_fired_N = torch.zeros(cfg.d_sae, dtype=torch.long, device=device)
        self.history = []  # the lines of metrics.jsonl
        self.log_is_whole = False  # whether the file has them
        self.failure = None
        self.weighted = cfg.pair_weights == "coactivation"
        dense_penalty = orthogonality if cfg.plain else sgo_penalty_dense
        self.penalty = partial(dense_penalty, weighted=self.weighted)  # Ω of latents f (B, N)
        average_gradients(self.sae)  # It registers hooks, which act in each backward pass.

    def terms(self, x_BD):
        """The `Terms` of Eq. 2. Here it is chosen how they are computed: by `method` with --plain,
        fast for a top-k autoencoder, and by `method` with a fast Ω for the others.

        Ω is over the tokens of all processes, or 0 where α is 0.
        """

        def omega_of_selected(vals_BK, idx_BK, N):
            if self.cfg.alpha == 0:
                return 0.0
            return sgo_penalty(gather_tokens(vals_BK), gather_tokens(idx_BK), N, self.weighted)

        def omega(f_BN):
            return 0.0 if self.cfg.alpha == 0 else self.penalty(gather_tokens(f_BN))

        if type(self.sae) is SAE and not self.cfg.plain:
            return topk_loss_terms(self.sae, x_BD, omega_of_selected)
        return loss_terms(self.sae, x_BD, omega)

    def step(self, x_BD, step, steps):
        """One training step, in this order:

        1. α and the learning rate of the step;
        2. the terms of Eq. 2, in mixed precision where the language model runs in bfloat16, but not
           with --plain;
        3. the loss, and which latents fired;
        4. λ of a baseline for the next step, and the threshold of batchtopk;
        5. the update: the gradient, its mean over processes (by the hooks of `average_gradients`),
           the projection of W_dec's gradient, clipping, Adam, unit rows.

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
        # 3. With n processes, `update` takes the mean of their gradients. That is right for the two
        # first terms, which are means over the tokens of each. Ω is that of all tokens together,
        # and each process gets its gradient only for its own tokens, so that the sum over the
        # processes is the whole gradient. With α times n, their mean is that sum.
        loss = total_loss(terms, self.lam, self.alpha * n_processes())
        # An auxiliary loss would be added here, as a mean over the tokens of this process. What
        # `terms` has beside the terms is detached. AuxK (Gao et al. 2024), for example, lets dead
        # latents reconstruct what is left of x, on any device:
        #     dead_N = self.dead(step)
        #     def select(pre_BN):
        #         vals_BK, idx_BK = pre_BN.masked_fill(~dead_N, -math.inf).topk(512)
        #         return vals_BK.relu(), idx_BK
        #     aux_BD = decode_selected(self.sae, *encode_selected(self.sae, x_BD, select))
        #     loss += (x_BD - terms.xhat_BD - aux_BD).square().sum(1).mean() / 32
        fired_N = all_reduce_(terms.fired_N.int(), "MAX") > 0
        self.last_fired_N.masked_fill_(fired_N, step + 1)
        # 4.
        self.lam = adjust_baseline(self.sae, self.lam, terms.f_BN, lr)
        # 5.
        self.gradient_norm = update(self.sae, self.adam, loss, lr, cfg.clip)
        if not math.isfinite(self.gradient_norm):
            self.failure = f"{cfg.out}: gradient not finite at step {step}, α {self.alpha:.4g}"
            say(f"\n{self.failure}")

    def dead(self, done):
        """Which latents (N,) have been active on none of the last DEAD_AFTER tokens."""
        return (done - self.last_fired_N) * self.cfg.batch >= DEAD_AFTER

    def log(self, x_BD, done, scale):
        """Adds a line to metrics.jsonl, and says once if Ω outweighs the reconstruction."""
        is_known = done * self.cfg.batch >= DEAD_AFTER  # earlier, none can be dead
        peak = torch.cuda.max_memory_allocated(x_BD.device) if x_BD.is_cuda else 0
        m = {
            "step": done,
            "tokens": done * self.cfg.batch,
            "lr": self.adam.param_groups[0]["lr"],
            "alpha": self.alpha,
            "activation_scale": scale,
            "gradient_norm": self.gradient_norm,
            "dead": int(self.dead(done).sum()) if is_known else None,
            "seconds": time.monotonic() - self.started,  # since this call began
            "peak_memory_gb": peak / 1e9 if x_BD.is_cuda else None,
            **figures_of(self.sae, gather_tokens(x_BD), self.lam, self.alpha, scale, self.penalty),
        }
        share = m["penalty_share"]
        if share > 1 and all(past["penalty_share"] <= 1 for past in self.history):
            say(f"\n{self.cfg.out}: αΩ is {share:.3g} times the reconstruction error at {done:,}")
        self.history.append(m)
        write_log(self)

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
            f"L0 {m['l0']:.1f}  dead {dead} ({DEAD_AFTER:,} tokens)  "
            f"Ω {m['omega']:<6.4g}  αΩ/rec {m['penalty_share']:.2%}"
        )


@torch.no_grad()
def figures_of(sae, x_BD, lam, alpha, scale, penalty=sgo_penalty_dense):
    """Figures of a batch after its update, outside of autocast. `penalty` computes Ω of latents f.

    They are those of the autoencoder as it is saved: in batchtopk its θ decides which latents are
    active, and not the batch. The terms of the loss are in the units of training, in which
    activations are `scale` times those of the model; `mse` is in the model's. λ, which a baseline
    adjusts, is that of the next step.
    """
    f_BN = sae.encode(x_BD)
    xhat_BD = sae.decode(f_BN)
    terms = Terms(
        reconstruction=(x_BD - xhat_BD).square().sum(1).mean(),
        sparsity=sae.sparsity(sae.pre_activations(x_BD), f_BN),
        omega=penalty(f_BN),
        xhat_BD=xhat_BD,
        fired_N=(f_BN > 0).any(0),
    )
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
        "l0": (f_BN > 0).sum(1).float().mean(),
    }
    return {name: figure.item() for name, figure in figures.items()}


def begin(runs, data, steps):
    """Sets what depends on the data, from its first batches.

    Returns the factor by which activations are multiplied, and the data from the first batch on.
    Without --normalize the factor is 1. With it, ‖x‖² averages D, and that is all that --normalize
    changes: α, λ and the learning rate stay what they are, the figures but `mse` are in the units
    of the multiplied activations, and `save_sae` divides the factor out again. On activations times
    2, the same α weighs Ω 4 times as much beside the reconstruction.
    """
    cfg = runs[0].cfg
    first = list(itertools.islice(data, min(steps, math.ceil(SAMPLE / cfg.batch))))
    sample_BD = gather_tokens(torch.cat(first).float())
    scale = 1.0
    if cfg.normalize:
        scale = (sample_BD.shape[1] / sample_BD.square().sum(1).mean()).sqrt().item()
    sample_BD *= scale
    median_D = geometric_median(sample_BD)
    for run in runs:
        run.sae.b_dec.data.copy_(median_D)
        start_baseline(run.sae, sample_BD, run.cfg.lam)
    # `iter`, so that the list is freed after its last batch; `chain` alone would hold it for ever.
    return scale, itertools.chain(iter(first), data)


def train(cfgs, folder, device, dtype):
    """Trains autoencoders on the same batches and saves each in its `out`.

    Their settings differ in those of LISTS and in `out` alone. Whatever ends the run between two
    of its steps leaves a checkpoint, from which --resume goes on.
    """
    cfg = cfgs[0]
    # All float32 products of a GPU are in TF32: those of the language model, of training, and of
    # the figures.
    torch.backends.cuda.matmul.allow_tf32 = True
    steps = cfg.tokens // cfg.batch
    check_texts(cfg)
    reader = load_lm(cfg.model, cfg.layer, device, dtype, cfg.ctx)
    # The language model's dtype decides whether the autoencoder has mixed precision (5.1).
    d_in = reader.lm.config.hidden_size
    runs = [Run(c, d_in, device, mixed_precision=dtype == torch.bfloat16) for c in cfgs]
    checkpoint = folder / "checkpoint.pt"
    scale, done = load_checkpoint(checkpoint, runs)  # 1 and 0 where there is none
    say(f"{cfg.model} in {dtype} on {device}; steps {done:,} to {steps:,}, into {folder}")
    data = batches(cfg, reader, done)
    if done == 0:
        scale, data = begin(runs, data, steps)
    bar = progress_bar(range(done, steps), initial=done, total=steps)
    try:
        # `zip` asks the bar first, so that after the last step no batch is read. What fails
        # there in one process, or a signal, is raised as EndedBetweenSteps in all of them.
        for step, x_BD in in_every_process(zip(bar, data)):
            x_BD = x_BD.float() * scale
            for run in runs:
                run.step(x_BD, step, steps)
            done = step + 1
            live = [run for run in runs if not run.failure]
            if not live:
                raise InputError(f"{runs[0].failure}; the last checkpoint, if any, stays")
            if done % cfg.log_every == 0 or done == steps:
                for run in live:
                    run.log(x_BD, done, scale)
                bar.set_postfix_str(live[-1].short_figures(), refresh=False)
            if cfg.save_every and done % cfg.save_every == 0:
                save_checkpoint(checkpoint, runs, done, scale)
    except EndedBetweenSteps as end:
        bar.close()
        if done and save_checkpoint(checkpoint, runs, done, scale):
            say(f"stopped after step {done:,}; the same command with --resume goes on")
        raise end.__cause__  # the error or signal itself, for `main`
    save_all(runs, folder, done, scale, reader)


# ==================================================================================================
# Part 2: the program around the reference, which ends here.
# ==================================================================================================


# ---------------------------------------------------------------------------------------- baselines
# The architectures that the paper compares with. Where a top-k autoencoder takes the k largest
# latents of a token, these take those above a threshold θ. Each is one class. To add another,
# derive it from `ThresholdSAE`, or from `SAE`, and enter it in ARCHITECTURES. It says
#
#     activate       the latents in training, at least 0, from the pre-activations
#     encode         the latents after training, where they are others: by θ in batchtopk
#     saelens_name   what SAELens calls what is saved: "topk", with k; "jumprelu", with thresholds
#                    `threshold()`; or "standard", a ReLU. If none of the three computes what the
#                    class does, `saelens_form` and `from_saelens` must be extended as well
#
# and `sparsity`, the term that λ weighs, where it is another. A `ThresholdSAE` may also say
#
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

    def activate(self, pre):
        pre = pre.relu()
        return pre * (pre > self.threshold())

    def start(self, x_BD, lam):
        """Sets what a sample x and λ decide before training."""

    def adjust(self, lam, f_BN, lr):
        """Returns λ for the next step, after one with the latents f."""
        return lam


def start_baseline(sae, x_BD, lam):
    if isinstance(sae, ThresholdSAE):
        sae.start(x_BD, lam)


def adjust_baseline(sae, lam, f_BN, lr):
    """λ for the next step; that of a top-k autoencoder stays."""
    return sae.adjust(lam, f_BN, lr) if isinstance(sae, ThresholdSAE) else lam


class BatchTopK(ThresholdSAE):
    """In training, the B k largest pre-activations of a batch (Bussmann et al. 2024)."""

    def activate(self, pre_BN):
        vals, cells = pre_BN.relu().flatten().topk(len(pre_BN) * self.k, sorted=False)
        return torch.zeros_like(pre_BN).flatten().scatter(0, cells, vals).view_as(pre_BN)

    def encode(self, x):
        return super().activate(self.pre_activations(x))

    def sparsity(self, pre_BN, f_BN):
        """Bussmann et al. have no sparsity term."""
        return f_BN.new_zeros(())

    def adjust(self, lam, f_BN, lr):
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

    def adjust(self, lam, f_BN, lr):
        """PI control of log(L0 / k): both parts are factors of λ.

        The integral moves by at most exp(100 lr) in a step, no faster than Adam moves the weights.
        The proportional part, a 4th power, acts at once and keeps L0 from swinging. Both numbers
        are ours, tried on the demo.
        """
        l0 = all_reduce_((f_BN > 0).sum() / len(f_BN)) / n_processes()
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
# Each process reads and tokenizes all of the text, and runs the language model on every n-th
# context. A run of two processes is not that of one: each shuffles only the tokens of its own
# contexts, so batches are put together differently, and batchtopk selects among a process's own
# tokens. The first process decides what is in the folder, and alone writes there: nodes need not
# share it. From the first step on, a signal, or data that can't be read, in one process ends the
# run in all, between the same two steps (`in_every_process`).
JOIN_MINUTES = 10  # that a process waits for the others


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
        return  # A cluster may set WORLD_SIZE to 1 for a process that is alone.
    if ":" in device:
        raise InputError(f"--device {device}: torchrun gives each process a GPU; --device cuda")
    try:
        if device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # While it waits, Python's handlers would not run: the system's own ends the process. The
        # limit is of this wait alone; that of `init_process_group` would be of all later ones, too.
        with handling_signals(signal.SIG_DFL):
            wait = timedelta(minutes=JOIN_MINUTES)
            store, place, world = next(dist.rendezvous("env://", timeout=wait))
            # NCCL for tensors on GPUs, Gloo for others
            dist.init_process_group(store=store, rank=place, world_size=world)
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
    """Tells the user, from the first process alone; where nobody can be told, the work goes on."""
    if rank() == 0:
        with suppress(OSError):
            print(message, file=sys.stderr)


@functools.cache
def say_once(message):
    say(message)


def progress_bar(work, **options):
    """tqdm, with a line every 10 s where the output is no terminal."""
    from tqdm import tqdm

    often = 0.5 if sys.stderr.isatty() else 10
    return tqdm(work, mininterval=often, disable=rank() > 0, **options)


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
    if not torchrun():
        return

    def average(parameter):
        # W_enc's gradient is a transposed tensor, and NCCL takes contiguous ones only.
        gradient = all_reduce_(parameter.grad.contiguous())
        parameter.grad.copy_(gradient / n_processes())

    for parameter in sae.parameters():
        parameter.register_post_accumulate_grad_hook(average)


class Stopped(BaseException):
    """A signal asks the program to stop; the argument is its number."""


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has not all of them
noted_signals = []  # their numbers and times


@contextmanager
def handling_signals(handler):
    """Within, the signals that stop a program call the handler, but for those that are ignored."""
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    for number, old in before.items():
        if old is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handler)
    try:
        yield
    finally:
        noted_signals.clear()
        for number, old in before.items():
            signal.signal(number, old)


def note_signal(number, frame):
    """Notes a signal, on which `stop_if_asked` acts. One that comes over a second later ends the
    program at once; until then it is taken for the same one, as torchrun hands on to its processes
    what a scheduler has sent to all."""
    now = time.monotonic()
    noted_signals.append((number, now))
    if now - noted_signals[0][1] > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def stop_if_asked():
    """Raises Stopped where a signal was noted: between two steps, or two passes of the language
    model, when nothing is lost by it."""
    if noted_signals:
        raise Stopped(noted_signals[0][0])


def each(parts, desc):
    """Yields the parts of some work, beside a progress bar. A signal stops it between two."""
    for part in progress_bar(parts, desc=desc, leave=False):
        stop_if_asked()
        yield part


class EndedBetweenSteps(Exception):
    """A run ends before its last step; the cause is what ended it."""


def is_in_any_process(condition):
    return bool(all_reduce_(torch.tensor(int(bool(condition))), "MAX"))


def in_every_process(steps):
    """Yields what an iterator yields. What ends it in one of the processes, be it a signal, data
    that can't be read or a closed output, ends it in all of them, between the same two steps.
    """
    while True:
        try:
            stop_if_asked()
            item = next(steps, None)
        except (Exception, Stopped) as error:
            is_in_any_process(True)
            raise EndedBetweenSteps from error
        if is_in_any_process(False):
            raise EndedBetweenSteps from InputError("another process ended the run")
        if item is None:
            return
        yield item


# -------------------------------------------------------------------------------------------- texts
LOCAL = re.compile(r"\.(txt|jsonl|csv|parquet)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)  # local files
LOOKED_AT = 10_000  # rows among the first of which there must be a text
LONGEST = 2**18  # characters of a text; longer ones are cut, so that what is held has a bound
HELD = 1000  # texts that are shuffled together


@contextmanager
def loading(what):
    """Makes one line of whatever the Hub and the readers of files raise while they load `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever readers, decompressors and networks raise
        reason = f"{type(error).__name__} {error}"[:400]
        raise InputError(f"{what} can't be loaded: {reason}") from error


def is_here(name):
    """Whether a name is that of a file or folder, or a pattern of some."""
    return Path(name).exists() or bool(glob.glob(str(name)))


def check_name(name):
    """Refuses what is plainly a path, and not a name on the Hub, where nothing is at that path."""
    is_path = str(name).startswith((".", "/", "~")) or len(Path(name).parts) > 2
    if (is_path or LOCAL.search(str(name))) and not is_here(name):
        raise InputError(f"{name}: there is no such file or folder")


def local_files(name):
    """The files of a dataset that is here: a file, those of a folder, or of a pattern, such as
    "data/*.jsonl". There are none where it is a name on the Hub."""
    path = Path(name)
    pattern = glob.escape(name) + ("/*" if path.is_dir() else "")
    found = sorted(glob.glob(pattern if path.exists() else name, recursive=True))
    files = [file for file in found if LOCAL.search(file)]
    kinds = {LOCAL.search(file)[1].lower() for file in files}
    if len(kinds) != 1 and (found or path.exists()):
        raise InputError(
            f"{name}: txt, jsonl, csv or parquet files are needed, all of one kind; a pattern such "
            "as 'data/*.jsonl' chooses some"
        )
    if len(files) > 1:
        say_once(f"{name}: {len(files)} files are read, {', '.join(files)}"[:400])
    return files


def absolute(name):
    """The same name in any folder: of what is here the path, and of what is on the Hub its name."""
    return str(Path(name).resolve()) if is_here(name) else name


def replaced(error):
    """� in the place of bytes that are not UTF-8."""
    say_once("bytes that are not UTF-8 are read as \ufffd; iconv converts files")
    return "\ufffd", error.end


codecs.register_error("replaced", replaced)


def text_rows(stream):
    """The rows of a text file, in which documents are between blank lines. Long ones are cut."""
    lines = []
    length = 0
    while line := stream.readline(LONGEST):
        is_blank = not line.strip()
        if not is_blank:
            lines.append(line)
            length += len(line)
        if is_blank or length > LONGEST:
            yield {"text": "".join(lines).rstrip("\n")}
            lines = []
            length = 0
    yield {"text": "".join(lines).rstrip("\n")}


def unicode_of(value):
    """A value with � for each half of a surrogate pair, which JSON can spell and is no Unicode."""
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


def json_rows(stream, file):
    """The rows of a file with a JSON object a line. A line that is none costs itself."""
    for line in filter(str.strip, stream):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield {name: unicode_of(value) for name, value in row.items()}
        else:
            say_once(f"{file}: lines that are no JSON object are left out")


def rows_of(files, columns=None):
    """The rows of local files, as dicts. Of parquet no other columns than these are read."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    for file in files:
        kind = LOCAL.search(file)[1].lower()
        if kind == "parquet":
            parquet = ParquetFile(file)
            known = [name for name in parquet.schema_arrow.names if name in (columns or ())]
            for batch in parquet.iter_batches(1000, columns=known or None):
                yield from batch.to_pylist()
            continue
        # A byte order mark is no text, and csv asks for line ends as they are.
        options = {"encoding": "utf-8-sig", "errors": "replaced"}
        options["newline"] = "" if kind == "csv" else None
        with fsspec.open(file, "rt", compression="infer", **options) as stream:
            if kind == "txt":
                yield from text_rows(stream)
            elif kind == "csv":
                csv.field_size_limit(2**31 - 1)  # of characters, in place of 131,072
                yield from csv.DictReader(stream)
            else:
                yield from json_rows(stream, file)


def generator_of(seed, epoch):
    """The random generator of an epoch, by the rule of `datasets` 5.2: the seed of epoch 0 is
    `seed`, and that of a later one the first integer drawn with `seed`, less the epoch. So local
    files and those of the Hub are shuffled alike.
    """
    import numpy

    first = numpy.random.default_rng(seed)
    if epoch == 0:
        return first
    return numpy.random.default_rng((int(first.integers(0, 2**63)) - epoch) % 2**63)


def open_dataset(cfg, columns=None, epoch=None):
    """The rows of cfg.dataset, once: of local files, or of the Hub.

    With an epoch the files are in random order, without one in the order of their names.
    """
    files = local_files(cfg.dataset)
    if files:
        if cfg.subset or cfg.split != "train":
            raise InputError("--subset and --split are of the Hub: name the files in --dataset")
        if epoch is not None:
            generator_of(cfg.data_seed, epoch).shuffle(files)
        return rows_of(files, columns)
    import datasets

    check_name(cfg.dataset)
    rows = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, streaming=True)
    if epoch is not None:
        rows = rows.shuffle(seed=cfg.data_seed, buffer_size=1)  # `shuffled` shuffles the rows
        rows.set_epoch(epoch)
    return rows


def is_text(value):
    """Whether a value is text that is not blank. UTF-16, read as UTF-8, has \\0, and is none."""
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def shuffled(texts, generator):
    """The texts in random order, as `datasets` 5.2 has it: HELD of them are held and shuffled; one
    half goes out, and the other is held on, to be shuffled with those that follow."""
    held = []
    for text in texts:
        held.append(text)
        if len(held) == HELD:
            order = generator.permutation(HELD)
            yield from (held[i] for i in order[: HELD // 2])
            held = [held[i] for i in order[HELD // 2 :]]
    yield from (held[i] for i in generator.permutation(len(held)))


def texts_in(rows, column):
    """The texts of a column, in parts of at most LONGEST characters."""
    for row in rows:
        text = row.get(column)
        if is_text(text):
            for start in range(0, len(text), LONGEST):
                yield text[start : start + LONGEST]


def texts_of(cfg, epoch=0):
    """The texts of a dataset, once, in random order."""
    with loading(cfg.dataset):
        rows = open_dataset(cfg, (cfg.text_column,), epoch)
        texts = texts_in(rows, cfg.text_column)
        yield from shuffled(texts, generator_of(cfg.data_seed, epoch))


def check_texts(cfg):
    """Refuses a dataset that has no text among its first rows."""
    column = cfg.text_column
    names = set()
    with loading(cfg.dataset):
        for row in itertools.islice(open_dataset(cfg, (column,)), LOOKED_AT):
            if is_text(row.get(column)):
                return
            names.update(map(str, row))
    found = ", ".join(sorted(names)) or "none"
    raise InputError(f"{cfg.dataset} has no text in --text-column {column}; its columns: {found}")


def read_texts(cfg):
    """Texts without end, shuffled anew each time that the dataset has been read."""
    for epoch in itertools.count():
        if epoch == 1:
            say("\nall the data has been read once: reading starts over, reshuffled")
        text = None
        for text in texts_of(cfg, epoch):
            yield text
        if text is None:
            raise InputError(f"{cfg.dataset} holds no text any more")


# ---------------------------------------------------------------------------------- language model
def load_lm(name, layer, device, dtype, ctx=2, whole=False):
    """The `Reader` of a language model: up to a layer, or whole and with its head for eval_sae.py.

    ctx is the length of the longest context that it is going to read, in tokens. The class of the
    model is the one that its own configuration names, so that each of its tensors has its place.
    """
    import transformers
    from transformers.utils import find_adapter_config_file

    check_name(name)
    with loading(name):
        if find_adapter_config_file(name):
            raise InputError(f"{name} has an adapter: merge it into its model and save that")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        if model_class is None or config.is_encoder_decoder:
            raise InputError(f"{name}: a decoder of transformers, or an encoder alone, is needed")
        # Text that spells "<bos>" must not become that token.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, split_special_tokens=True, trust_remote_code=False
        )
        ids = tokenizer("some text", add_special_tokens=False).input_ids
        if set(ids) <= {tokenizer.unk_token_id}:
            raise InputError(f"{name} has no tokenizer that can split text into tokens")
        text_config = config.get_text_config()
        n_layers = text_config.num_hidden_layers
        if layer >= n_layers:
            raise InputError(f"--layer {layer}: the layers of {name} are 0 to {n_layers - 1}")
        text_config.use_cache = False  # of keys and values, which nobody reads
        with torch.device("meta"):  # the model without the content of its tensors
            outline = model_class(config)
        most = getattr(text_config, "max_position_embeddings", None) or ctx
        for path, module in outline.named_modules():
            padding = getattr(module, "padding_idx", None)
            if path.endswith("position_embeddings") and padding is not None:
                # As in RoBERTa: the positions begin after the padding's.
                most = module.num_embeddings - padding - 1
        if ctx > most:
            raise InputError(f"--ctx {ctx}: {name} was made for {most} tokens")
        reader_path, layers_path = paths_in(outline, n_layers, name)
        if not whole:
            model_class = up_to_layer(model_class, layer, layers_path)
        lm, report = model_class.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True
        )
    check_tensors(lm, name, report, layers_path, layer)
    lm.eval()
    hook_name = f"{layers_path}.{layer}"
    module = lm.get_submodule(hook_name)
    reader = lm if whole else lm.get_submodule(reader_path)  # without the head
    return Reader(reader.to(device), module, tokenizer, hook_name)


def check_tensors(lm, name, report, layers_path, layer):
    """Refuses a model whose files lack tensors. Where they have some that it does not take, such as
    the scales of a quantised model, this is said. `report` is what transformers says of the files.
    """
    # A pooler comes after the last layer, and is often not saved.
    missing = [tensor for tensor in report["missing_keys"] if "pooler" not in tensor]
    if missing:
        raise InputError(f"{name}: its files lack tensors, {missing[0]} among them")
    base = f"{lm.base_model_prefix}."  # which names in files may lack
    layers = rf"({re.escape(base)})?{re.escape(layers_path.removeprefix(base))}"
    unused = []
    for tensor in sorted(report["unexpected_keys"]):
        of_layer = re.match(rf"{layers}\.(?P<number>\d+)\.", tensor)
        if not of_layer or int(of_layer["number"]) <= layer:
            unused.append(tensor)
    if unused:
        say(f"{name}: {len(unused)} tensors of its files are not used, {unused[0]} among them")


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

    The list is the outermost one with n_layers members.
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


# ------------------------------------------------------------------------------------------ files
def write_whole(path, write):
    """Lets `write` make a file, given the path, beside its place, and puts it there when it is
    whole. So a program that ends, or a full disk, leaves the file that was there before."""
    aside = path.with_name(f"{path.name}.part")
    try:
        write(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def finite(figures):
    """The figures as JSON has them: None where one is no finite number, such as 0 / 0."""
    known = {}
    for name, value in figures.items():
        known[name] = value if value is not None and math.isfinite(value) else None
    return known


def write_log(run):
    """Adds the last line of a run's history to its metrics.jsonl.

    The whole history is written at first, as a run that was killed may have logged more than its
    checkpoint has, and after a line that could not be written.
    """
    if rank() > 0:
        return
    path = Path(run.cfg.out, "metrics.jsonl")
    figures = run.history[-1:] if run.log_is_whole else run.history
    lines = "".join(json.dumps(finite(m)) + "\n" for m in figures)
    try:
        if run.log_is_whole:
            with path.open("a") as file:
                file.write(lines)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda aside: aside.write_text(lines))
        run.log_is_whole = True
    except OSError as error:
        run.log_is_whole = False
        say(f"\n{path} can't be written, and will be at the next line: {error}")


# A resumed run may change these.
FREE = ("out", "device", "lm_batch", "log_every", "save_every", "resume")
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

    This is what --resume promises. A run that goes on from here gets the batches that it would have
    got, and on the same CPU with as many threads the same weights to the bit; a GPU's sums vary in
    their last digits, and so do those of another --device or --lm-batch. All settings but FREE must
    be the same, --dtype auto being what it is on this machine, and so must the number of processes;
    the first of them has the file. A run that was killed before its first checkpoint starts anew.

    A run finds its place by counting batches. The data, --data-seed and the number of a round fix
    what is in the round, so that `batches` reads again the text of rounds that are over, without
    the language model, and skips what was used of the next. No state of a random generator is
    needed, as after the weights only the order of the data is drawn.
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


def read_checkpoint(path, runs):
    """The content of a checkpoint on the CPU, or None where there is none."""
    if not path.exists():
        return None
    with loading(str(path)):
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; without it the run starts anew")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(path, saved["settings"], settings_of(runs))
    return saved


def load_checkpoint(path, runs):
    """Brings the runs to where a checkpoint has them. Returns its scale and the steps done.

    The first process reads it: other nodes need not have it.
    """
    saved = decide_together(lambda: read_checkpoint(path, runs))
    if saved is None:
        return 1.0, 0
    with loading(str(path)):
        for run, state in zip(runs, saved["runs"], strict=True):
            run.sae.load_state_dict(state["sae"])
            run.adam.load_state_dict(state["adam"])
            run.lam = state["lam"].to(run.lam.device)
            run.last_fired_N = state["last_fired_N"].to(run.lam.device)
            run.history = state["history"]
            run.failure = state["failure"]
        return saved["scale"], saved["done"]


def saelens_form(sae, cfg, scale=1.0, more=()):
    """What SAELens has in a folder: the content of cfg.json, and the weights in float32.

    `more` is what its metadata has beside the settings.

    In training, activations were multiplied by `scale`. Dividing biases and thresholds by it gives
    the autoencoder of the model's own activations: f(s x) = s ReLU((x - b_dec/s) W_enc + b_enc/s),
    with the same latents active.
    """
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
    return content, weights


@torch.no_grad()
def check_saved_form(arch):
    """Refuses an architecture that would be loaded as another function than it is.

    A small one, whose tensors are all random, must compute the same when it was saved and loaded.
    """
    sae = ARCHITECTURES[arch](8, 32, 4)
    form = getattr(sae, "saelens_name", "topk")
    if form == "jumprelu" and not hasattr(sae, "threshold"):
        raise InputError(f"--arch {arch} would be saved as jumprelu, and has no threshold()")
    for tensor in (*sae.parameters(), *sae.buffers()):
        tensor += 0.1 * torch.rand_like(tensor)
    x_BD = torch.randn(64, 8)
    for scale in (1.0, 2.0):  # as of --normalize
        again = from_saelens(*saelens_form(sae, Config(arch=arch), scale), f"--arch {arch}")
        found = torch.cat([again.encode(x_BD), again(x_BD)], dim=1)
        expected = torch.cat([sae.encode(x_BD * scale), sae(x_BD * scale)], dim=1) / scale
        if not torch.allclose(found, expected, atol=1e-5):
            raise InputError(f"--arch {arch} would be saved as {form}, which computes another")


@torch.no_grad()
def save_sae(sae, cfg, folder, scale=1.0, more=()):
    """Writes a folder that SAELens loads: cfg.json and sae_weights.safetensors."""
    from safetensors.torch import save

    content, weights = saelens_form(sae, cfg, scale, more)
    text = json.dumps(content, indent=2)
    Path(folder).mkdir(parents=True, exist_ok=True)
    # safetensors's own writing of files has errors of its own kind, and makes them unreadable to
    # other users.
    data = save(weights)
    write_whole(Path(folder, "sae_weights.safetensors"), lambda path: path.write_bytes(data))
    write_whole(Path(folder, "cfg.json"), lambda path: path.write_text(text))


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
                if not run.log_is_whole:
                    write_log(run)
                saved.append(run)
            except OSError as error:
                unsaved.append(f"{run.cfg.out} can't be written: {error}")
    if is_in_any_process(unsaved):  # in the first one, which saves
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


def load_sae(path, device="cpu"):
    """The autoencoder of a folder that this file or SAELens wrote, in float32."""
    from safetensors.torch import load_file

    names = ("cfg.json", "sae_weights.safetensors")
    if not all(Path(path, name).exists() for name in names):
        raise InputError(f"{path}: a folder with {' and '.join(names)} is needed, SAELens's format")
    with loading(str(path)):
        content = json.loads(Path(path, "cfg.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise InputError(f"{path}: cfg.json holds no settings")
        stored = load_file(Path(path, "sae_weights.safetensors"))
        weights = {name: tensor.float() for name, tensor in stored.items()}
        return from_saelens(content, weights, path).to(device)


def from_saelens(content, weights, path):
    """The autoencoder of a cfg.json's content and weights. `path` is for what is refused.

    Known are topk, standard and jumprelu. Whatever would give other latents is refused.
    """
    N, D = weights["W_dec"].shape
    # SAELens before version 6 names the architecture only where it is not the standard one.
    kind = content.get("architecture", "standard")
    refuse_unknown(path, kind, "architecture", ("topk", "standard", "jumprelu"))
    for name in ("activation_fn_str", "activation_fn"):  # of SAELens before version 6
        refuse_unknown(path, content.get(name, "relu"), name, ("relu",))
    refuse_unknown(path, content.get("activation_fn_kwargs") or {}, "activation_fn_kwargs", ({},))
    normalization = content.get("normalize_activations") or "none"  # null and false were none, too
    refuse_unknown(path, normalization, "normalize_activations", ("none",))
    for flag in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        refuse_unknown(path, content.get(flag) or False, flag, (True, False))
    if kind == "topk":
        k = content.get("k")
        if type(k) is not int or not 1 <= k <= N:
            raise InputError(f"{path}: k is {k!r}, an integer from 1 to {N} is needed")
        sae = SAE(D, N, k)
    else:
        sae = ThresholdSAE(D, N, N)  # k is not used
        weights["theta"] = weights.pop("threshold") if kind == "jumprelu" else sae.theta
    if not content.get("apply_b_dec_to_input", True):  # encode() subtracts b_dec: add it back
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    set_weights(sae, weights, path)
    if content.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norms(sae)
    return sae


def set_weights(sae, weights, path):
    """Gives an autoencoder the weights of a file, or refuses them where they are not finite."""
    sae.load_state_dict(weights)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError(f"{path}: its weights are not finite")


def refuse_unknown(path, value, name, known):
    """Refuses a value in cfg.json that this file does not know how to honour."""
    if json.dumps(value) not in map(json.dumps, known):  # in which 1 is not true
        raise InputError(f"{path} has {name} {value!r}, and known are {', '.join(map(str, known))}")


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

    They are made beside their place, so that what is there is whole. Of several processes the first
    makes them: a demo on several nodes needs a SGO_CACHE that they share.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        documents = {"heldout": [], "train": []}
        for name, text in library_texts():
            split = "heldout" if zlib.crc32(name.encode()) % 10 == 0 else "train"
            documents[split].append({"name": name, "text": text})
        for split, rows in documents.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(aside, f"{split}.jsonl").write_text(lines)
        train_demo_lm([row["text"] for row in documents["train"]], aside)
        if not folder.exists():  # Another demo may have made it.
            os.rename(aside, folder)


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
    for step, rows in enumerate(each(order, "demo language model")):
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


# --------------------------------------------------------------------------------------------- main
# Other flags are named after their settings; the number of processes has none.
FLAGS = {"d_sae": "--dict", "lam": "--sparsity", "processes": "processes"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOICES = {
    "arch": tuple(ARCHITECTURES),
    "pair_weights": ("coactivation", "uniform"),
    "dtype": DTYPES,
}


def flag_of(name):
    return FLAGS.get(name, "--" + name.replace("_", "-"))


class Given(argparse.Action):
    """Stores what a flag is given. A list is added to where its flag comes again; of other flags
    the last value counts, and this is said."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self in parser.given and self.nargs:
            values = getattr(namespace, self.dest) + values
        elif self in parser.given:
            say(f"{option_string} is given twice, and {values} counts")
        parser.given.append(self)
        setattr(namespace, self.dest, values)


def new_parser(usage, text, settings, lists, choices):
    """A parser with a flag for each field of a dataclass, whose help is the comment beside it.

    Fields among `lists` take several values. The help shows the defaults, but for those that the
    comment tells. Errors are one line, without the usage.
    """
    parser = argparse.ArgumentParser(
        prog=usage.split()[0],
        usage=argparse.SUPPRESS,
        description=f"{text} Usage: python {usage}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("action", None, Given)
    parser.given = []
    comment = re.compile(r"^    (\w+): .+  # (.+)$", re.MULTILINE)
    comments = dict(comment.findall(inspect.getsource(settings)))
    for field in dataclasses.fields(settings):
        options = {"dest": field.name, "default": field.default, "help": comments[field.name]}
        if field.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = field.type
            options["choices"] = choices.get(field.name)
        if field.name in lists:
            options["nargs"] = "+"
            options["default"] = [field.default]
        if "default:" in comments[field.name]:
            options["default"] = argparse.SUPPRESS  # left out of the help; the field's applies
        parser.add_argument(flag_of(field.name), **options)
    return parser


def parse_args(argv):
    """The settings of a command line: a Config for each combination of the values of LISTS."""
    usage = "sgo_sae.py [--flag VALUE ...]"
    parser = new_parser(usage, __doc__.splitlines()[0], Config, LISTS, CHOICES)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    values = vars(parser.parse_args(argv))
    lists = itertools.product(*[values[name] for name in LISTS])
    cfgs = [Config(**dict(values, **dict(zip(LISTS, one)))) for one in lists]
    # Where α is 0 no pair has a weight, and one of --pair-weights is trained.
    return [cfg for cfg in cfgs if cfg.alpha != 0 or cfg.pair_weights == values["pair_weights"][0]]


SHARES = ("decay_start", "alpha_warmup")
COUNTS = ("d_sae", "k", "tokens", "batch", "lm_batch", "buffer", "log_every")
LARGEST = 2**40  # which is no size of anything, and which every generator takes as a seed


def check(cfg):
    """Refuses settings that can't work."""
    for name, value in vars(cfg).items():
        least = 1 if name in COUNTS else 0
        most = 1 if name in SHARES else LARGEST
        if type(value) in (int, float) and not least <= value <= most:
            raise InputError(f"{flag_of(name)} must be from {least} to {most}, but is {value}")
    if cfg.ctx < 2:
        raise InputError(f"--ctx {cfg.ctx}: the first token of a context is left out")
    if 0 < cfg.max_norm < 1:
        raise InputError(f"--max-norm {cfg.max_norm} would leave out half of the tokens and more")
    if cfg.k > cfg.d_sae:
        raise InputError(f"--k {cfg.k} is more than the {cfg.d_sae} latents of --dict")
    if cfg.tokens < cfg.batch:
        raise InputError(f"--tokens {cfg.tokens} is less than one batch of {cfg.batch}")
    if cfg.batch % n_processes():
        raise InputError(f"--batch {cfg.batch} can't be shared evenly by {n_processes()} processes")
    if cfg.demo and (cfg.model or cfg.dataset):
        raise InputError("--demo makes its own model and text: no --model, no --dataset")
    check_saved_form(cfg.arch)
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
    """Makes a folder, and keeps other runs out of it. It is removed where it stays empty."""
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


def has_ended(folder, cfgs):
    """Whether the runs of a command have ended. A folder that holds a run is refused, unless there
    is --resume, and the run is the command's.

    With neither a checkpoint nor anything saved, the run was killed before its first checkpoint,
    and starts anew.
    """
    held = []
    for depth in ("", "*/", "*/*/"):  # a run's own folder, a grid's, and one of several grids
        for name in ("checkpoint.pt", "cfg.json", "metrics.jsonl"):
            held += folder.glob(depth + name)
    if held and not cfgs[0].resume:
        raise InputError(f"{folder} holds a run: --resume continues it, or choose another --out")
    if folder / "checkpoint.pt" in held:
        return False
    ours = {Path(cfg.out) for cfg in cfgs}
    saved = {file.parent for file in held if file.name == "cfg.json"}
    if {file.parent for file in held} - ours or saved not in (set(), ours):
        raise InputError(
            f"{folder} holds other runs than the command's, or not all of them, and no checkpoint: "
            "choose another --out"
        )
    for cfg in cfgs if saved else ():
        file = Path(cfg.out, "cfg.json")
        with loading(str(file)):
            theirs = json.loads(file.read_text())["metadata"]["settings"]
        check_settings(file, [theirs], [fixed_settings(cfg)])
    return bool(saved)


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
        cfg.model = str(demo_folder()) if cfg.demo else absolute(cfg.model)
        cfg.dataset = str(demo_folder() / "train.jsonl") if cfg.demo else absolute(cfg.dataset)
    with taken(folder):
        if decide_together(lambda: has_ended(folder, cfgs)):
            say(f"{folder} holds this run, and it has ended: there is nothing to resume")
        else:
            if cfgs[0].demo:
                decide_together(lambda: demo_files(demo_folder()))
            train(cfgs, folder, device, dtype)
    if cfgs[0].demo and rank() == 0:
        print(f"to see what the penalty did:  python eval_sae.py {folder} --html page.html")
    if torchrun():
        dist.barrier()  # A process that left while the first one saves was seen to abort at exit.
        dist.destroy_process_group()


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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that its encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        with handling_signals(note_signal):
            return work(argv) or 0
    except SystemExit as end:  # of the parser
        return end.code
    except Stopped as stopped:
        say(f"{program}: stopped")
        return 128 + stopped.args[0]
    except (InputError, OSError) as error:  # an OSError here is a file that can't be written
        message = " ".join(str(error).split())
    except RuntimeError as error:
        if is_lack_of_memory(error):
            message = f"out of memory, {memory_advice}: {str(error)[:200]}"
        elif torchrun() and ("closed by peer" in str(error) or "NCCL" in str(error)):
            message = f"another process has ended, or can't be reached: {str(error)[:200]}"
        else:
            raise
    with suppress(OSError):
        print(f"{program}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
