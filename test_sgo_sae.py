"""Tests of sgo_sae.py and eval_sae.py against independent truth; no network. `python -m pytest`
runs them.
"""

import argparse
import dataclasses
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
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from itertools import combinations, count, islice, product
from pathlib import Path

# As main() sets them, but earlier.
os.environ.update(TRANSFORMERS_VERBOSITY="critical", HF_HUB_VERBOSITY="critical")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
# The arrays of the tests are small, so that threads would mostly wait for each other.
if __name__ != "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import operator

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

HERE = Path(__file__).parent
SCRIPT = HERE / "sgo_sae.py"
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Each test starts with the same random numbers, and sees no GPU unless it asks for it."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def real_gpu(seeded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


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


def metrics_of(folder):
    """The lines of metrics.jsonl, without what depends on the machine."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("tokens_per_second", "peak_memory_gb"):
            row.pop(name, None)
    return rows


def last_line(capsys):
    """The last line that was printed as an error."""
    return capsys.readouterr().err.splitlines()[-1]


def sparse_latents(B, N, K, seed=0, skew=2.0, dtype=torch.float64):
    """Top-k latents with ties, inactive slots, all-zero rows and, for large N, latents that never
    fire.
    """
    generator = torch.Generator().manual_seed(seed)
    pre_BN = torch.randn(B, N, generator=generator, dtype=dtype) - skew * torch.linspace(
        0, 1, N, dtype=dtype
    )
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


SHAPES = [(7, 5, 1), (16, 12, 12), (40, 30, 6), (1, 9, 3), (33, 64, 2), (64, 100, 8), (3, 200, 200)]


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


WAYS = ["tiles", "pairs", "blocks"]


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


def adam_of(sae, lr=1e-3):
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))


def step_of(sae, adam, x_BD, alpha, lr, lam=0.04, penalty=sgo_penalty):
    """One step as a CPU takes it; its loss."""
    loss = total_loss(topk_loss_terms(sae, x_BD, penalty), lam, alpha)
    assert 0 < update(sae, adam, loss, lr) < math.inf
    return loss.item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", sgo_sae.ARCHITECTURES)
def test_thirty_steps_by_the_fast_way_are_those_by_the_plain_one(arch, way, monkeypatch, patch_gpu):
    """On a CPU, and as on a GPU. JumpReLU's thresholds get a gradient of Ω from latents that are
    not active, too.
    """
    take(way, monkeypatch)
    batches = torch.randn(30, 256, 16, dtype=torch.float64) * 2
    trained = []

    def train(device, plain):
        cfg = sgo_sae.Config(arch=arch, d_sae=64, k=8, lr=5e-3, alpha=0.5, plain=plain)
        run = sgo_sae.Run(cfg, 16, device)
        run.sae.double()
        if arch != "topk":
            run.sae.start(batches[0].to(device), cfg.lam)
        for step, x_BD in enumerate(batches):
            run.step(x_BD.to(device), step, 30)
        trained.append({name: tensor.cpu() for name, tensor in run.sae.state_dict().items()})

    train(CPU, True)
    train(CPU, False)
    with patch_gpu():
        train(CUDA, False)
    plain, *fast = trained
    for state in fast:
        for name, tensor in state.items():
            assert (tensor - plain[name]).abs().max() < 1e-12
    start = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=64, k=8), 16, CPU).sae
    assert (plain["W_dec"] - start.W_dec).abs().max() > 0.1  # it did train


def test_penalty_and_step_inside_a_callers_autocast():
    """Counts stay exact, gradients finite, the value that of float32."""
    vals_BK, idx_BK = sparse_latents(600, 40, 12, dtype=torch.float32)
    exact = sgo_penalty(vals_BK, idx_BK, 40).item()
    with torch.autocast("cpu", torch.bfloat16):
        for penalty in (
            lambda v: sgo_penalty(v, idx_BK, 40),
            lambda v: sgo_penalty_dense(dense(v, idx_BK, 40)),
        ):
            leaf_BK = vals_BK.clone().requires_grad_()
            value = penalty(leaf_BK)
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(exact, rel=1e-5)
            value.backward()
            assert 0 < leaf_BK.grad.abs().sum() < math.inf
        coarse = sgo_penalty(vals_BK.bfloat16(), idx_BK, 40)
        assert coarse.item() == pytest.approx(exact, rel=1e-2)


def test_penalty_of_no_active_latent_and_without_gradients():
    assert sgo_penalty(torch.zeros(9, 3), torch.arange(3).expand(9, 3), 200) == 0
    assert sgo_penalty_dense(torch.zeros(9, 200)) == 0
    vals_BK, idx_BK = sparse_latents(64, 100, 8)
    expected = sgo_penalty(vals_BK, idx_BK, 100)
    with torch.inference_mode():
        assert sgo_penalty(vals_BK.clone(), idx_BK, 100) == expected
    assert torch.get_num_threads() > 0 and not torch.is_inference_mode_enabled()


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


ARCHS = ("topk", "batchtopk", "relu", "jumprelu")


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
        sae.adjust(0.04, terms.f_BN, terms.f_BN, 1e-3)
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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("plain", [True, False])
def test_logged_figures_are_those_of_the_definitions(arch, plain, tmp_path):
    x_BD = torch.randn(128, 16)
    settings = {"alpha": 0.5, "alpha_warmup": 0, "plain": plain, "out": str(tmp_path)}
    run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=64, k=4, **settings), 16, CPU)
    if arch != "topk":
        run.sae.start(x_BD, 0.1)
    run.step(x_BD, 0, 10)
    run.log(x_BD, 1, 0.5)
    (found,) = metrics_of(tmp_path)
    f_BN = run.sae.activate(run.sae.pre_activations(x_BD)).detach()
    error_BD = (x_BD - run.sae.decode(f_BN)).detach()
    omega = definition(f_BN)[0]
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
        "l0": l0,
        "step": 1,
        "tokens": 2048,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


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


def test_defaults_are_the_papers_run_4():
    (cfg,) = sgo_sae.parse_args([])
    assert (cfg.d_sae, cfg.k, cfg.alpha, cfg.lam, cfg.lr) == (18432, 320, 0.075, 0.04, 3e-4)
    steps = cfg.tokens // cfg.batch
    assert steps == 4882 and int(cfg.decay_start * steps) == 4271


def test_geometric_median_meets_its_optimality_condition():
    x_BD = torch.randn(501, 8, dtype=torch.float64).exp()
    median_D = sgo_sae.geometric_median(x_BD, iterations=1000)
    assert (
        F.normalize(x_BD - median_D, dim=1).sum(0).norm() < 1e-6
    )  # the unit vectors to the points cancel
    assert torch.equal(
        sgo_sae.geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(), torch.zeros(1)
    )


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
    for step in range(1000):
        slots_BK = torch.rand(1024, N).topk(active, dim=1).indices
        f_BN = torch.zeros(1024, N).scatter(1, slots_BK, torch.rand(1024, active) + 0.5)
        alpha = sgo_sae.alpha_at(step, 0.075, warmup=300)
        step_of(sae, adam, f_BN @ true_ND, alpha, sgo_sae.lr_at(step, 1000, 3e-3, 0.8), 0.0)
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


def test_method_section_stands_alone(tmp_path):
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


# -------------------------------------------------------------------------------------- activations


TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps near a stone by the river . "


def make_model(folder, bos=True, layers=4, vocab=80):
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


def test_a_tokenizer_may_know_more_than_the_model_reads(train_argv, tmp_path, capsys):
    """As Gemma 3's, whose one entry more than the model has rows no text produces; an id that is
    produced is refused.
    """
    from transformers import AutoTokenizer

    make_model(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "lm")
    assert (
        len(tokenizer)
        == json.loads((tmp_path / "lm" / "config.json").read_text())["vocab_size"] + 1
    )
    assert sgo_sae.main(train_argv(model=tmp_path / "lm")) == 0
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "lm")
    capsys.readouterr()
    assert sgo_sae.main(train_argv(model=tmp_path / "lm", out=tmp_path / "other")) == 2
    assert "the tokenizer gives the id" in last_line(capsys)


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
    assert (
        reduce(operator.iadd, contexts, [])
        == (tokenizer(TEXT)["input_ids"] * 4)[: 8 * len(contexts)]
    )


def data_of(cfg, skip=0):
    """The batches x_BD of a configuration, without the autoencoders."""
    lm, layer, tokenizer, _ = sgo_sae.load_lm(cfg.model, cfg.layer, CPU, torch.float32)
    found = sgo_sae.batches(cfg, sgo_sae.load_texts(cfg), lm, layer, tokenizer, skip)
    return (batch.x_BD for batch in found)


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


@pytest.mark.parametrize("lm_batch, batch", [(3, 8), (64, 16), (5, 31)])
def test_rounds_serve_each_activation_once_and_in_another_order(
    model, texts, lm_batch, batch, monkeypatch
):
    """With numbers in place of activations: a round is all of its contexts', shuffled; the next one
    follows on it.
    """
    served = count()

    def numbered(lm, layer, ids_BL):
        numbers = torch.tensor([next(served) for _ in range(ids_BL.numel())]).float()
        return numbers.view(*ids_BL.shape, 1).expand(-1, -1, 16)

    monkeypatch.setattr(sgo_sae, "layer_output", numbered)
    settings = {"model": model[0], "dataset": texts, "layer": 1, "ctx": 16, "buffer": 16}
    cfg = sgo_sae.Config(**settings, batch=batch, lm_batch=lm_batch)
    contexts = max(16, 2 * math.ceil(batch / 15))
    rounds = {}
    for number in torch.cat(list(islice(data_of(cfg), 150)))[:, 0].tolist():
        rounds.setdefault(number // (contexts * 16), []).append(number)
    assert list(rounds) == sorted(rounds)  # one after another
    assert len(rounds) > 3
    for numbers in list(rounds.values())[:-1]:
        assert len(set(numbers)) == len(numbers)
        assert numbers != sorted(numbers)
        # BOS, EOS and less than a batch are left out.
        assert contexts * 15 - len(numbers) < batch + contexts * 2


def test_processes_take_turns_at_contexts(model, texts, monkeypatch):
    """Two processes read, between them, what one reads; each forward pass is of their own."""
    settings = {"model": model[0], "dataset": texts, "layer": 1, "ctx": 16, "buffer": 16}
    cfg = sgo_sae.Config(**settings, batch=16)
    real = sgo_sae.layer_output
    read = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        ids = read[rank, world] = []

        def noted(lm, layer, ids_BL, ids=ids):
            ids.extend(ids_BL.tolist() if len(ids_BL[0]) == 16 else [])  # not when it is loaded
            return real(lm, layer, ids_BL)

        monkeypatch.setattr(sgo_sae, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(sgo_sae, "n_processes", lambda world=world: world)
        monkeypatch.setattr(sgo_sae, "layer_output", noted)
        next(data_of(cfg))
    assert len(read[0, 1]) == 16
    assert read[0, 2] == read[0, 1][::2]
    assert read[1, 2] == read[0, 1][1::2]


WRITERS = {
    "txt": lambda frame, path: path.write_text("\n\n".join(frame["text"])),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "csv": lambda frame, path: frame.to_csv(path),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "jsonl.zst": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "csv.gz": lambda frame, path: frame.to_csv(path),
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
    read = list(islice(sgo_sae.read_texts(sgo_sae.load_texts(cfg), cfg), 60))
    assert sorted(read[:30]) == sorted(read[30:]) == sorted(rows)
    assert read[:30] != read[30:]  # the second pass is shuffled anew


def test_odd_documents_are_passed_over(tmp_path):
    path = tmp_path / "odd.jsonl"
    write_rows(path, [{"text": t} for t in ["", None, "  ", "good one", None, "another"]])
    cfg = sgo_sae.Config(dataset=str(path))
    texts = sgo_sae.read_texts(sgo_sae.load_texts(cfg), cfg)
    assert sorted(islice(texts, 2)) == ["another", "good one"]


# ----------------------------------------------------------------------------------------- training


def test_run_is_complete_and_repeatable(train_argv, tmp_path, capsys):
    for name in ("a", "b"):
        assert sgo_sae.main(train_argv(out=tmp_path / name)) == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    captured = capsys.readouterr()
    assert "steps 0 to 12" in captured.err
    for word in ("EV 0.", "MSE", "L0 4.0", "dead", "Ω ", "αΩ/rec", "saved in"):
        assert word in captured.out
    rows = metrics_of(tmp_path / "a")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert rows[0].pop("dead") is None  # as none can be before 200 steps
    assert all(math.isfinite(value) for value in rows[0].values())
    keys = [
        "outliers",
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
    assert metadata["torch_version"].startswith("2.13.0")


@pytest.mark.parametrize(
    "option", [["--plain"], ["--normalize"], ["--alpha", "0"], ["--dtype", "bfloat16"]]
)
def test_options_train(train_argv, tmp_path, option):
    assert sgo_sae.main(train_argv() + option) == 0
    last = metrics_of(tmp_path / "run")[-1]
    assert last["omega"] > 0 and (last["penalty_share"] == 0) == (
        option == ["--alpha", "0"]
    )  # what α 0 would weigh


def random_sae(arch):
    """An autoencoder with biases and thresholds of all kinds, on 8 dimensions."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[arch](8, 32, 4)
    sae.b_dec.data.normal_(), sae.b_enc.data.normal_()
    if arch == "batchtopk":
        sae.theta.uniform_(0.1, 2)
    elif arch == "jumprelu":
        sae.theta_raw.data.uniform_(-0.2, 0.07)
    return sae, torch.randn(100, 8)


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


def test_loaded_autoencoder_has_the_interface_of_saebench(tmp_path):
    """The attributes that SAEBench's evaluations and its custom SAEs' base class read."""
    sgo_sae.save_sae(random_sae("topk")[0], sgo_sae.Config(k=4, layer=5, ctx=64), tmp_path)
    sae = eval_sae.BenchmarkSAE(tmp_path).to(dtype=torch.bfloat16)
    assert (sae.device, sae.dtype) == (CPU, torch.bfloat16)
    shapes = [tuple(part.shape) for part in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    assert shapes == [(8, 32), (32,), (32, 8), (8,)]
    cfg = sae.cfg
    expected = {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.5.hook_resid_post",
        "hook_layer": 5,
        "d_in": 8,
        "d_sae": 32,
        "dtype": "float32",
        "context_size": 64,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
    }
    assert vars(cfg).items() >= expected.items()
    # SAEBench sets its own attributes on cfg and on cfg.metadata, which it makes where there is
    # none, and saves to_dict().
    assert not hasattr(cfg, "metadata")
    cfg.metadata = argparse.Namespace(hook_layer=5)
    assert cfg.to_dict()["metadata"] == {"hook_layer": 5}
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "topk"
    x_BLD = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(sae(x_BLD), sae.decode(sae.encode(x_BLD)))


# ------------------------------------------------------------------------- grids and many processes


def weights_of(folder):
    return (Path(folder) / "sae_weights.safetensors").read_bytes()


def test_grid_trains_each_as_if_alone(train_argv, tmp_path, monkeypatch, capsys):
    passes = []
    real = sgo_sae.layer_output
    monkeypatch.setattr(sgo_sae, "layer_output", lambda *args: passes.append(1) or real(*args))
    grid = [
        "--arch",
        "topk",
        "relu",
        "--alpha",
        "0",
        "0.05",
        "--dict",
        "64",
        "32",
        "--k",
        "4",
        "6",
        "--seed",
        "0",
        "1",
    ]
    assert sgo_sae.main(train_argv() + grid) == 0
    in_grid = len(passes)
    table = capsys.readouterr().out
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert len(folders) == 32
    assert all(name in table for name in folders)
    for arch, n, k, alpha, seed in (("topk", 64, 4, "0", 0), ("relu", 32, 6, "0.05", 1)):
        passes.clear()
        name = f"{arch}-n{n}-k{k}-a{alpha}-s{seed}"
        one = {"arch": arch, "dict": n, "k": k, "alpha": alpha, "seed": seed}
        assert sgo_sae.main(train_argv(out=tmp_path / name, **one)) == 0
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "run" / name)
        assert len(passes) == in_grid


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
for arch in ("topk", "batchtopk", "relu", "jumprelu"):
    for plain in (False, True):
        out = f'{sys.argv[2]}/{rank}'
        cfg = sgo_sae.Config(arch=arch, d_sae=96, k=4, lr=1e-2, batch=64,
                             alpha_start=0.05, plain=plain, out=out)
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
            figures['last_fired_N'] = run.last_fired_N.double()
            found.append(run.sae.state_dict() | figures)
        sgo_sae.torchrun = together
        ours, alone = found
        apart = {n: (ours[n] - alone[n]).abs() / (1 + alone[n].abs()) for n in alone}
        difference = max(apart[n].max().item() for n in apart)
        if rank == 0:
            print(arch, plain, difference, flush=True)
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
    differences = {(arch, plain): float(difference) for arch, plain, difference in lines}
    assert len(differences) == 8
    exact = [differences[key] for key in differences if key[0] != "batchtopk"]
    assert max(exact) < 1e-5, result.stdout


# ------------------------------------------------------------------------- what stands in for a GPU


def held_bytes(cfgs, monkeypatch, d_in=2304):
    """Bytes at the peak of two training steps of a GPU, counted on tensors that have sizes and no
    content. Every latent counts as active.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    def all_places(t):
        return torch.arange(t.numel())[:, None]

    def product(a, b):  # with sums in float32, as CUDA has it
        return torch.empty(a.shape[0], b.shape[1])

    monkeypatch.setattr(torch.Tensor, "nonzero", all_places)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args: self)
    monkeypatch.setattr(sgo_sae, "PAIRS_PAY", {"cpu": sgo_sae.PAIRS_PAY["cuda"]})
    monkeypatch.setattr(sgo_sae, "product", product)
    with FakeTensorMode(allow_non_fake_inputs=True):
        runs = [sgo_sae.Run(cfg, d_in, CPU, mixed_precision=True) for cfg in cfgs]
        x_BD = torch.empty(cfgs[0].batch, d_in)
        tracker = MemTracker()
        tracker.track_external(*[run.sae for run in runs], *[run.adam for run in runs], x_BD)
        with tracker:
            for step in range(2):
                for run in runs:
                    run.step(x_BD, step, 10)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


def gemma_bytes(layer=12, buffer=2048, ctx=128, batch=2048):
    """Gemma-2-2B up to the layer in bfloat16, the activations of a round, and the first batches,
    which are kept.
    """
    import transformers

    config = transformers.Gemma2Config(
        num_hidden_layers=layer + 1
    )  # its defaults are those of the 2B model
    assert (config.hidden_size, config.vocab_size) == (2304, 256000)
    with torch.device("meta"):
        lm = transformers.Gemma2Model(config)
    first = math.ceil(sgo_sae.SAMPLE / batch) * batch
    return 2 * sum(p.numel() for p in lm.parameters()) + 2 * (buffer * (ctx - 1) + first) * 2304


def config_of(arch, d_sae):
    return sgo_sae.Config(arch=arch, d_sae=d_sae, alpha=0.075 if arch == "topk" else 0.0)


@pytest.mark.parametrize(
    "archs, sizes, most",
    [
        (["topk"], [18432], 6.5),
        (["topk"], [32768], 8.0),
        (["topk"] * 3, [18432] * 3, 8.6),
        (["topk"] * 4, [2304] * 4, 5.2),
        (["topk"] * 4, [18432, 18432, 32768, 32768], 11.9),
        (["topk", "relu", "jumprelu"], [18432] * 3, 9.3),
    ],
)
def test_memory_of_the_papers_runs_on_a_gpu(archs, sizes, most, monkeypatch):
    """By account, in GB, of run 5 and of the commands in the README's table."""
    cfgs = [config_of(arch, d_sae) for arch, d_sae in zip(archs, sizes)]
    gb = (gemma_bytes() + held_bytes(cfgs, monkeypatch)) / 1e9
    print(f"{', '.join(archs)}, N {sizes}: {gb:.2f} GB")
    assert most - 0.6 < gb <= most


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0, and is computed on the CPU."""


class PretendedGPU(TorchFunctionMode):
    """Makes tensors for cuda OnGPU, refuses operands on two devices as CUDA does, and counts what
    waits for the GPU.
    """

    waits = ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "nonzero")

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


CUDA = torch.device("cuda", 0)


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


@pytest.fixture
def pretended_gpu(patch_gpu):
    with patch_gpu() as mode:
        yield mode


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "relu"])
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


def test_training_and_evaluation_on_a_pretended_gpu(
    train_argv, texts, probe_file, tmp_path, capsys, pretended_gpu
):
    argv = train_argv(device="cuda", dtype="bfloat16") + ["--arch", "topk", "relu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
        card = argparse.Namespace(total_memory=80e9)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        assert sgo_sae.main(argv) == 0
    assert "peak memory 3.0 of 80 GB" in capsys.readouterr().err
    settings = ["--device", "cuda", "--contexts", "8", "--train", "40", "--test", "20"]
    assert evaluated([tmp_path / "run", *settings, "--text", texts, "--probe", probe_file]) == 0
    table = capsys.readouterr().out
    for family in ("core", "behaviour", "competition", "probe", "scr"):
        assert f"{family}: " in table


# ------------------------------------------------------------------------------------------- errors


def evaluated(argv):
    argv = [str(part) for part in argv]
    return sgo_sae.main(argv, eval_sae.work, "eval_sae.py", eval_sae.MEMORY_ADVICE)


def refused(argv, capsys):
    """The one line with which a command line is refused."""
    assert sgo_sae.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sgo_sae.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "bad, words",
    [
        ("--k 65", "65 is more than the 64 latents"),
        ("--k 0", "--k must be at least 1"),
        ("--dict 0", "--dict must be at least 1"),
        ("--alpha -0.1", "--alpha must be at least 0"),
        ("--alpha nan", "--alpha must be at least 0"),
        ("--alpha inf", "--alpha must be at least 0"),
        ("--alpha x", "invalid float value: 'x'"),
        ("--lr -1", "--lr must be at least 0"),
        ("--sparsity nan", "--sparsity must be at least 0"),
        ("--max-norm 0.5", "would leave out half of the tokens"),
        ("--decay-start 2", "--decay-start must be at least 0 and at most 1"),
        ("--alpha-warmup 1000", "--alpha-warmup must be at least 0 and at most 1"),
        (f"--seed {2**64}", "--seed must be at least 0 and at most"),
        (f"--data-seed {2**60}", "--data-seed must be at least 0 and at most"),
        ("--ctx 1", "--ctx must be at least 2"),
        ("--tokens 10", "less than one batch"),
        ("--log-every 0", "--log-every must be at least 1"),
        ("--arch mean", "invalid choice"),
        ("--demo", "--demo makes its own model and text"),
        ("--arch relu --sparsity 0", "leaves relu nothing to adjust"),
        ("--nonsense 1", "unrecognized arguments"),
        ("--device cuda:7", "--device cuda:7"),
        ("--device toaster", "--device toaster"),
        ("--layer 4", "the layers of"),
        ("--layer -1", "--layer must be at least 0"),
        ("--text-column body", "texts.jsonl has text"),
        ("--split test", "train"),
        ("--model /nowhere/at/all", "/nowhere/at/all"),
        ("--dataset /nowhere/at/all.jsonl", "/nowhere/at/all.jsonl: there is no such file"),
        ("--dataset misspelled.csv", "misspelled.csv: there is no such file"),
        ("--model ./misspelled", "./misspelled: there is no such file"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    train_argv, tmp_path, capsys, monkeypatch, bad, words
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in refused(train_argv() + bad.split(), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.jsonl", b"", "empty.jsonl"),
        ("empty.txt", b"", "holds no text"),
        ("broken.jsonl", b'{"text": "a', "holds no text"),
        ("broken.json", b'[{"text": "a"},\n{"text', "can't be loaded"),
        ("broken.jsonl.gz", b"this is not gzip", "can't be loaded"),
        ("broken.parquet", b"PAR1 but not really", "can't be loaded"),
        ("blank.jsonl", b'{"text": ""}\n{"text": null}\n', "its column text is NoneType and blank"),
        ("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n', "its column text is int"),
        ("chats.jsonl", b'{"text": [{"role": "user"}]}\n', "its column text is list"),
        ("picture.png", b"\x89PNG", "is needed"),
    ],
)
def test_bad_files_are_refused_in_one_line(train_argv, tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert sgo_sae.main(train_argv(dataset=tmp_path / name)) == 2
    line = last_line(capsys)
    assert line.startswith("sgo_sae.py: error: ") and words in line and name in line
    assert not (tmp_path / "run" / "sae_weights.safetensors").exists()


def test_bad_models_are_refused_in_one_line(train_argv, model, tmp_path, capsys):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((Path(model[0]) / file).read_bytes())
        return refused(train_argv(model=tmp_path / name), capsys)

    assert "nothing" in folder("nothing")
    assert "no-tokenizer" in folder("no-tokenizer", "config.json", "model.safetensors")
    assert "no-weights" in folder(
        "no-weights", "config.json", "tokenizer.json", "tokenizer_config.json"
    )
    other = tmp_path / "other"
    make_model(other, layers=1)
    (other / "config.json").write_text((Path(model[0]) / "config.json").read_text())
    assert "lack" in refused(train_argv(model=other), capsys)
    assert not (tmp_path / "run").exists()


def test_finished_run_is_not_overwritten(train_argv, tmp_path, capsys):
    assert sgo_sae.main(train_argv()) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert "cfg.json: choose another --out" in refused(train_argv(), capsys)
    line = refused(train_argv(lr=0.1) + ["--resume"], capsys)
    assert line.endswith("cfg.json was written with --lr 0.0003, not 0.1")
    assert sgo_sae.main([*train_argv(), "--resume"]) == 0
    assert "it has ended: there is nothing to resume" in last_line(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


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


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_of_any_architecture_ends_by_itself_where_activations_are_not_finite(arch):
    run = sgo_sae.Run(sgo_sae.Config(arch=arch, d_sae=20, k=4), 6, torch.device("cpu"))
    run.step(torch.full((50, 6), math.nan), 0, 10)
    assert "gradient not finite at step 0" in run.failure
    if arch == "batchtopk":  # nor does a batch in which nothing is active end it
        assert (
            run.sae.adjust(0.04, torch.zeros(5, 20), None, 0.1) == 0.04
            and run.sae.theta.isfinite().all()
        )


def test_one_bad_member_ends_alone(train_argv, tmp_path, capsys, monkeypatch):
    """Also where the grid is stopped and resumed after that."""
    bad = "topk-n64-k4-a0.05-s0"
    grid = ["--alpha", "0", "0.05", "--seed", "0", "1"]
    assert sgo_sae.main(train_argv(out=tmp_path / "whole") + grid) == 0
    with monkeypatch.context() as patch:
        poisoned(patch, lambda cfg, calls: bad in cfg.out and calls == 3)
        stop_at(patch, 17)
        assert sgo_sae.main(train_argv() + grid) in (2, 143)
    capsys.readouterr()
    assert sgo_sae.main([*train_argv(), *grid, "--resume"]) == 2
    printed = capsys.readouterr()
    assert f"{bad}: gradient not finite at step 2" in printed.err.splitlines()[-1]
    assert bad not in printed.out.split("run  ")[-1]
    names = [path.parent.name for path in (tmp_path / "run").glob("*/cfg.json")]
    assert len(names) == 3
    assert bad not in names
    for name in names:
        assert weights_of(tmp_path / "whole" / name) == weights_of(tmp_path / "run" / name)


def test_a_penalty_that_outweighs_the_reconstruction_is_said_once(train_argv, tmp_path, capsys):
    assert sgo_sae.main(train_argv(alpha=50, alpha_warmup=0, log_every=1)) == 0
    err = capsys.readouterr().err
    assert (
        err.count("use a smaller --alpha or --normalize") == 1
        and "the paper's strength is α " in err
    )
    shares = [row["penalty_share"] for row in metrics_of(tmp_path / "run")]
    assert (
        f"weighs {next(s for s in shares if s > 1):.3g} times" in err
        and sum(s > 1 for s in shares) > 1
    )


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


# ------------------------------------------------------------------ interruption, faults, bad input

with warnings.catch_warnings():  # one file, so nowhere to register a mark
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal during a step of the next run."""
    real = sgo_sae.Run.step
    calls = []

    def step_and_signal(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(sgo_sae.Run, "step", step_and_signal)


LONG = {"tokens": 64 * 400, "save_every": 7}  # the data is used more than twice


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert sgo_sae.main(flags(model[0], texts, out, **LONG)) == 0
    return out


@pytest.mark.parametrize(
    "options, steps, number",
    [
        ([], [1], signal.SIGTERM),
        ([], [113], signal.SIGINT),
        ([], [140, 7, 1, 200], signal.SIGTERM),
        (["--arch", *ARCHS, "--seed", "0", "1", "--tokens", "2560"], [64], signal.SIGTERM),
        (["--normalize", "--plain", "--dtype", "bfloat16"], [9], signal.SIGTERM),
    ],
)
def test_stopped_and_resumed_is_the_run_that_never_stopped(
    train_argv, tmp_path, monkeypatch, capsys, options, steps, number
):
    assert sgo_sae.main(train_argv(out=tmp_path / "whole", **LONG) + options) == 0
    argv = train_argv(**LONG) + options
    for n, step in enumerate(steps):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            assert sgo_sae.main(argv + ["--resume"] * (n > 0)) == 128 + number
        assert "the same command with --resume goes on" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("sae_weights.safetensors"))
    assert "checkpoint.pt: --resume continues it" in refused(argv, capsys)
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert not list((tmp_path / "run").rglob("checkpoint*"))
    files = [p for p in (tmp_path / "whole").rglob("*") if p.suffix in (".safetensors", ".jsonl")]
    assert len(files) == (16 if "--arch" in options else 2)
    for file in files:
        same = tmp_path / "run" / file.relative_to(tmp_path / "whole")
        if file.suffix == ".jsonl":
            assert metrics_of(same.parent) == metrics_of(file.parent)
        else:
            assert same.read_bytes() == file.read_bytes()


@slow
def test_two_processes_are_stopped_and_resumed(train_argv, tmp_path):
    argv = {name: train_argv(out=tmp_path / name, **LONG | {"tokens": 64 * 150}) for name in "ab"}
    result = python(*TORCHRUN, SCRIPT, *argv["a"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("saved in") == 1  # by the first process alone
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, SCRIPT, *argv["b"]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "b" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert "stopped after step" in process.communicate(timeout=60)[1]
    assert python(*TORCHRUN, SCRIPT, *argv["b"], "--resume").returncode == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") and metrics_of(
        tmp_path / "a"
    ) == metrics_of(tmp_path / "b")


def test_resume_of_another_run_is_refused_by_name(train_argv, tmp_path, monkeypatch, capsys):
    argv = train_argv()
    stop_at(monkeypatch, 3)
    assert sgo_sae.main(argv) == 143
    capsys.readouterr()
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    line = refused(
        [*argv, "--resume", "--lr", "0.01", "--alpha", "0.2", "--log-every", "1"], capsys
    )
    assert line.endswith(
        "checkpoint.pt was written with --alpha 0.075, not 0.2; --lr 0.0003, not 0.01"
    )
    line = refused([*argv, "--resume", "--alpha", "0.075", "0.2"], capsys)
    assert line.endswith("checkpoint.pt is of 1 autoencoders, and the command of 2")
    for content in (
        b"",
        kept[: len(kept) // 2],
        b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.",
        pickle.dumps({"settings": Path("x")}, protocol=2),
    ):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        line = refused([*argv, "--resume"], capsys)
        assert (
            "checkpoint.pt is empty" if content == b"" else "checkpoint.pt can't be loaded"
        ) in line
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
    assert sgo_sae.main(train_argv(out=tmp_path / "whole", **settings)) == 0
    argv = [tmp_path / "run" / "checkpoint.pt", *train_argv(**settings), "--resume"]
    result = python("-c", KILL, *argv)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 10
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_read_that_fails_ends_the_run_at_once_and_keeps_its_checkpoint(
    train_argv, texts, tmp_path, monkeypatch, capsys, whole
):
    """The run that ends so is continued, when reading works again, to the same weights."""
    real = sgo_sae.load_texts
    rows = []

    class Breaks:
        def __init__(self, cfg):
            self.stream = real(cfg)
            self.set_epoch = self.stream.set_epoch

        def __iter__(self):
            for row in self.stream:
                rows.append(row)
                if len(rows) == 200:
                    raise OSError("connection reset")
                yield row

    argv = train_argv(**LONG)
    with monkeypatch.context() as patch:
        patch.setattr(sgo_sae, "load_texts", Breaks)
        assert sgo_sae.main(argv) == 2
    assert last_line(capsys) == f"sgo_sae.py: error: {texts} can't be loaded: connection reset"
    assert sgo_sae.main([*argv, "--resume"]) == 0
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


@pytest.mark.parametrize(
    "change",
    [
        lambda cfg, weights: cfg.write_bytes(cfg.read_bytes()[:100]),
        lambda cfg, weights: cfg.write_text("[]"),
        lambda cfg, weights: cfg.write_text('{"architecture": "topkk"}'),
        lambda cfg, weights: cfg.write_text(cfg.read_text().replace('"k": 4', '"k": 33')),
        lambda cfg, weights: cfg.write_text(cfg.read_text().replace('"k": 4', '"k": "4"')),
        lambda cfg, weights: weights.write_bytes(weights.read_bytes()[:300]),
        lambda cfg, weights: weights.write_bytes(b"\xff" * 500),
        lambda cfg, weights: save_file({"W_enc": torch.zeros(8, 32)}, weights),
        lambda cfg, weights: save_file({**load_file(weights), "b_dec": torch.ones(3)}, weights),
        lambda cfg, weights: save_file({**load_file(weights), "W_skip": torch.ones(3)}, weights),
    ],
)
def test_damaged_autoencoders_are_refused_in_one_line(model, tmp_path, capsys, change):
    sgo_sae.save_sae(SAE(8, 32, 4), sgo_sae.Config(model=model[0], k=4), tmp_path)
    change(tmp_path / "cfg.json", tmp_path / "sae_weights.safetensors")
    assert evaluated([tmp_path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_sae.py: error: ")
    assert str(tmp_path) in line


def test_out_of_memory_names_the_size_and_the_flags(train_argv, capsys):
    assert sgo_sae.main(train_argv(batch=10**12, tokens=10**12)) == 2
    line = last_line(capsys)
    assert (
        "out of memory" in line
        and "--batch" in line
        and "--buffer" in line
        and re.search(r"\d{12,} bytes", line)
    ), line


def test_activations_that_are_not_finite_end_the_run(train_argv, monkeypatch, capsys):
    real = sgo_sae.layer_output
    calls = []

    def infinite(*args):
        x_BLD = real(*args).clone()
        calls.append(1)
        if len(calls) == 6:
            x_BLD[0, 3:5, 0] = float("inf")
        return x_BLD

    monkeypatch.setattr(sgo_sae, "layer_output", infinite)
    assert sgo_sae.main(train_argv()) == 2
    assert last_line(capsys).endswith("activations are not finite; try --dtype float32")


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


# --------------------------------------------------------------------- the world's files and models


def texts_of(path, **settings):
    """The texts that training reads of a path, in the order of reading."""
    cfg = sgo_sae.Config(dataset=str(path), **settings)
    with sgo_sae.loading(str(path)):
        rows = list(sgo_sae.open_dataset(cfg, (cfg.text_column,)))
    return [row[cfg.text_column] for row in rows if sgo_sae.is_text(row.get(cfg.text_column))]


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
    assert texts_of(tmp_path / "a.jsonl") == expected[:600] + ["listed"] + expected[600:]
    assert capsys.readouterr().err.count("a.jsonl: line 601 and others like it are left out") == 1
    other = {"text": [f"d{i}" for i in range(9)], "score": range(9)}
    pandas.DataFrame(other).to_parquet(tmp_path / "1.parquet")
    other = {"score": [str(i) for i in range(9)], "text": [f"e{i}" for i in range(9)]}
    pandas.DataFrame(other).to_parquet(tmp_path / "2.parquet")
    rows = sgo_sae.rows_of([tmp_path / "1.parquet", tmp_path / "2.parquet"], ("text",))
    assert all(list(row) == ["text"] for row in rows)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.jsonl.bak")
    assert texts_of(tmp_path) == [f"{x}{i}" for x in "de" for i in range(9)]
    long = "many words " * 20_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\nshort\n")
    assert texts_of(tmp_path / "long.csv") == [long, "short"]
    ragged = 'id,text\n1,x\n2\n3,y,z\n"4","a ""b""\nc"\n'
    (tmp_path / "ragged.csv").write_text(ragged)
    assert texts_of(tmp_path / "ragged.csv") == ["x", "y", 'a "b"\nc']


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
        assert texts_of(tmp_path / name) == written
    for name in ("a.csv", "a.jsonl"):
        frame = eval_sae.file_frame(str(tmp_path / name))
        assert frame["label"].tolist() == written


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"},\n {"text": "b"}]',
        '[{"text": "a"}, {"text": "b"}]\n',
        '["a", "b"]',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}',
        '\n{"text": "a"}{"text": "b"}\n',
        '{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
    ],
)
def test_json_of_any_layout_is_read(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode())
    assert texts_of(tmp_path / "a.json") == ["a", "b"]


def test_files_that_are_not_the_data_are_left_out(tmp_path, capsys):
    for name in ("train-0.jsonl", "more/b.jsonl", "test.jsonl", "dev/c.jsonl", "x.jsonl.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}])
    for name in (".hidden.jsonl", ".cache/d.jsonl", "__MACOSX/e.jsonl", "~$f.jsonl", "g.jsonl~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}])
    for name in ("README.txt", "LICENSE.txt", "dataset_infos.json", "notes.md"):
        (tmp_path / name).write_text("no data")
    assert sorted(texts_of(tmp_path)) == ["more/b.jsonl", "train-0.jsonl"]
    said = capsys.readouterr().err
    assert "files are read, more/b.jsonl, train-0.jsonl" in said
    assert texts_of(tmp_path, split="test") == ["test.jsonl"]
    assert texts_of(tmp_path, split="validation") == ["dev/c.jsonl"]
    assert texts_of(tmp_path / "test.jsonl") == ["test.jsonl"]  # what is named is read
    with pytest.raises(InputError, match="no files of the split other: --split test or train or"):
        texts_of(tmp_path, split="other")
    (tmp_path / "latest.csv").write_text("text\na")
    with pytest.raises(InputError, match=re.escape("and it has .csv and .jsonl")):
        texts_of(tmp_path)


def test_a_file_that_loses_its_text_ends_the_reading(tmp_path):
    """Else it would be read for ever."""
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    cfg = sgo_sae.Config(dataset=str(tmp_path / "a.jsonl"))
    texts = sgo_sae.read_texts(sgo_sae.load_texts(cfg), cfg)
    assert [next(texts), next(texts)] == ["one", "one"]
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no text any more"):
        next(texts)


def test_a_zip_of_several_files_is_refused(tmp_path):
    """Of which only the first would be read."""
    for names in (["a.txt"], ["a.txt", "__MACOSX/._a.txt"], ["a.txt", "b.txt"]):
        with zipfile.ZipFile(tmp_path / "data.txt.zip", "w") as archive:
            for name in names:
                archive.writestr(name, f"text of {name}")
        if names[-1] != "b.txt":
            assert texts_of(tmp_path / "data.txt.zip") == ["text of a.txt"]
    with pytest.raises(InputError, match="has 2 files; only one can be read out of a zip"):
        texts_of(tmp_path / "data.txt.zip")


@pytest.mark.parametrize("spaces", [True, False])
def test_a_document_of_any_length_is_read_in_pieces(model, tmp_path, monkeypatch, spaces):
    """No piece is longer than LONGEST, none is lost, and none is cut within a word that fits."""
    monkeypatch.setattr(sgo_sae, "LONGEST", 1000)
    text = "".join(f"word{i}" + (" \n"[i % 2] if spaces else "") for i in range(2000))
    parts = list(sgo_sae.pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 1000
    if spaces:
        assert all(part[0] in " \n" for part in parts[1:])
    (tmp_path / "a.txt").write_text(f"first\n\n{text}\n\nlast")
    read = texts_of(tmp_path / "a.txt")
    assert "".join(read) == f"first{text}last" and max(map(len, read)) <= 2000
    ids = model[2](TEXT * 50, add_special_tokens=False).input_ids  # one text over several pieces
    contexts = list(sgo_sae.token_contexts([TEXT * 50], model[2], 11))
    assert [i for context in contexts for i in context[1:]] == [*ids, model[2].eos_token_id][
        : 10 * len(contexts)
    ]


def test_encodings_are_known_or_told(tmp_path, capsys):
    text = "naïve café → 漢字"
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        row = json.dumps({"text": text}, ensure_ascii=False)
        (tmp_path / f"{encoding}.jsonl").write_bytes(f"{row}\n{row}\n".encode(encoding))
        assert texts_of(tmp_path / f"{encoding}.jsonl") == [text, text]
        told = capsys.readouterr().err
        assert told.count("byte order mark") == (encoding != "utf-8-sig")
    (tmp_path / "latin.txt").write_bytes("première\n\ndéjà vu\n\nplain".encode("latin-1"))
    assert texts_of(tmp_path / "latin.txt") == ["premi�re", "d�j� vu", "plain"]
    assert capsys.readouterr().err.count("latin.txt is not all UTF-8") == 1
    (tmp_path / "half.jsonl").write_text('{"text": "a \\ud83d b"}\n')  # half of a surrogate pair
    assert texts_of(tmp_path / "half.jsonl") == ["a � b"]


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
        ("words", " are kept, too few for a batch of 64"),
        ("letters", "the tokenizer makes no token of 10,000 texts in a row"),
    ],
)
def test_text_that_gives_no_batch_ends_the_run(train_argv, tmp_path, capsys, kind, words):
    make_model(tmp_path / "lm")
    little_tokenizer(kind).save_pretrained(tmp_path / "lm")
    write_rows(tmp_path / "t.jsonl", [{"text": "\u044f \u0436 \u0436\u044f" * 9}] * 30)
    assert sgo_sae.main(train_argv(model=tmp_path / "lm", dataset=tmp_path / "t.jsonl")) == 2
    assert words in last_line(capsys)


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


@pytest.mark.parametrize(
    "kind, words",
    [
        ("t5", "is an encoder with a decoder, which can't be read"),
        ("albert", "its 4 layers are not in one list"),
        ("xlm", "its 4 layers are not in one list"),
    ],
)
def test_models_that_can_not_be_read_are_refused(train_argv, model, tmp_path, capsys, kind, words):
    saved(kind, model, tmp_path / "lm")
    assert words in refused(train_argv(model=tmp_path / "lm"), capsys)


@pytest.mark.parametrize("kind, most", [("opt", 40), ("roberta", 39), ("gpt1", 40)])
def test_positions_that_a_model_has_not_are_refused(
    train_argv, model, texts, tmp_path, capsys, kind, most
):
    saved(kind, model, tmp_path / "lm")
    assert sgo_sae.main(train_argv(model=tmp_path / "lm", ctx=most)) == 0
    capsys.readouterr()
    words = f"--ctx {most + 1}: {tmp_path / 'lm'} can't read as many tokens"
    assert words in refused(
        train_argv(model=tmp_path / "lm", ctx=most + 1, out=tmp_path / "b"), capsys
    )
    argv = [
        tmp_path / "run",
        "--text",
        texts,
        "--contexts",
        9,
        "--metrics",
        "core",
        "--ctx",
        most + 1,
    ]
    evaluated(argv)
    assert words in capsys.readouterr().out


# ---------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_of_few_characters_loses_no_autoencoder(train_argv, tmp_path, encoding):
    result = python(SCRIPT, *train_argv(), "--alpha", "0", "0.05", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "run").glob("*/sae_weights.safetensors"))) == 2
    assert r"\u03a9" in result.stdout and "EV 0." in result.stdout


def test_an_output_that_nobody_reads_ends_no_run(train_argv, tmp_path):
    """Both pipes are closed before anything is written; a closed stderr is None to Python."""
    for n, closed in enumerate(["2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"]):
        argv = train_argv(out=tmp_path / str(n))
        command = " ".join(map(str, [sys.executable, SCRIPT, *argv, closed]))
        process = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False)
        assert process.returncode == 0, closed
        assert (tmp_path / str(n) / "cfg.json").exists()


def test_one_autoencoder_that_can_not_be_written_costs_no_other(
    train_argv, tmp_path, monkeypatch, capsys
):
    """The others are saved, and --resume saves it when there is room again."""
    real = sgo_sae.save_sae

    def save(sae, cfg, folder, *rest):
        if "a0-" in folder:
            raise OSError(28, "No space left on device")
        real(sae, cfg, folder, *rest)

    argv = [*train_argv(), "--alpha", "0", "0.05"]
    with monkeypatch.context() as patch:
        patch.setattr(sgo_sae, "save_sae", save)
        assert sgo_sae.main(argv) == 2
    assert "No space left on device" in last_line(capsys)
    assert [path.parent.name for path in (tmp_path / "run").glob("*/cfg.json")] == [
        "topk-n64-k4-a0.05-s0"
    ]
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert sgo_sae.main(train_argv(out=tmp_path / "alone", alpha=0)) == 0
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


def signal_in_pass(monkeypatch, n, number):
    """Sends this process a signal during the n-th pass of the language model from now on."""
    real = sgo_sae.layer_output
    passes = []

    def read_and_signal(*args):
        passes.append(1)
        if len(passes) == n:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(sgo_sae, "layer_output", read_and_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_in_a_line(
    train_argv, tmp_path, monkeypatch, capsys, number
):
    signal_in_pass(monkeypatch, 3, number)
    assert sgo_sae.main(train_argv()) == 128 + number
    assert last_line(capsys) == "sgo_sae.py: stopped"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_batch_is_read_stops_at_once(
    train_argv, tmp_path, monkeypatch, capsys, whole
):
    """Two passes try the model's positions, a round has four, and 86 rounds are read before the
    first step.
    """
    argv = train_argv(**LONG)
    with monkeypatch.context() as patch:
        passes = []
        real = sgo_sae.layer_output

        def noted(*args):
            passes.append(1)
            return real(*args)

        patch.setattr(sgo_sae, "layer_output", noted)
        signal_in_pass(patch, 2 + 4 * 100 + 2, signal.SIGTERM)
        assert sgo_sae.main(argv) == 143
        assert len(passes) == 2 + 4 * 100 + 1  # the pass that the signal came in is not made
    assert "the same command with --resume goes on" in last_line(capsys)
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_a_short_run_reads_no_more_than_it_needs(train_argv, monkeypatch):
    """12 steps of 64 tokens; a context has 15 tokens beside its BOS, of which some are EOS."""
    contexts = []
    real = sgo_sae.layer_output

    def noted(lm, layer, ids_BL):
        if len(ids_BL[0].unique()) > 1:  # else it tries the model's positions
            contexts.append(int(sgo_sae.kept_tokens(ids_BL, tokenizer).sum()))
        return real(lm, layer, ids_BL)

    argv = train_argv(buffer=2048, lm_batch=1)
    tokenizer = sgo_sae.load_lm(argv[1], 0, CPU, torch.float32).tokenizer
    monkeypatch.setattr(sgo_sae, "layer_output", noted)
    assert sgo_sae.main(argv) == 0
    assert 12 * 64 <= sum(contexts) < 12 * 64 + 15


def test_a_folder_is_one_runs_alone(train_argv, tmp_path, capsys):
    """From the first moment; and a folder that holds runs is no folder for another."""
    with sgo_sae.taken(tmp_path / "run"):
        assert "another run is under way in this folder" in refused(train_argv(), capsys)
        assert "another run is under way" in refused([*train_argv(), "--resume"], capsys)
    assert not (tmp_path / "run").exists()
    grid = train_argv(out=tmp_path / "runs" / "grid") + ["--alpha", "0", "0.05"]
    assert sgo_sae.main(grid) == 0
    capsys.readouterr()
    for out in ("runs/grid", "runs"):
        line = refused(train_argv(out=tmp_path / out), capsys)
        assert "holds a run, " in line and "choose another --out" in line
    assert sgo_sae.main(train_argv(out=tmp_path / "runs" / "other")) == 0
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        assert str(tmp_path / "file") in refused(
            train_argv(out=tmp_path / out, model="not/asked"), capsys
        )


def test_a_run_killed_before_its_first_checkpoint_is_kept_and_resumed(train_argv, tmp_path, capsys):
    assert sgo_sae.main(train_argv()) == 0
    whole = weights_of(tmp_path / "run")
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert "metrics.jsonl: choose another --out" in refused(train_argv(), capsys)
    assert sgo_sae.main([*train_argv(), "--resume"]) == 0
    assert weights_of(tmp_path / "run") == whole
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [5, 10, 12]


def test_metrics_are_appended(tmp_path):
    """What stands in the file is not written again."""
    run = sgo_sae.Run(sgo_sae.Config(d_sae=20, k=4, out=str(tmp_path)), 6, CPU)
    sgo_sae.prepare_folder(run)
    x_BD = torch.randn(50, 6)
    run.log(x_BD, 1, 1.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    run.log(x_BD, 2, 1.0)
    assert [row["step"] for row in metrics_of(tmp_path)] == [0, 2]
    sgo_sae.prepare_folder(run)  # after a resume
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]


def test_the_schedule_belongs_to_the_run(train_argv, tmp_path, capsys):
    """α is reached in a run of any length, and starts at the share of it that the paper's does."""
    cfg = sgo_sae.Config()
    steps = cfg.tokens // cfg.batch
    for step in (0, 1, 500, 999, 1000, 4881):
        assert sgo_sae.scheduled_alpha(cfg, step, steps) == sgo_sae.alpha_at(step)
    assert sgo_sae.main(train_argv(alpha=3, tokens=64 * 50, log_every=1)) == 0
    alphas = [row["alpha"] for row in metrics_of(tmp_path / "run")]
    rise = [3 * (2 / 15 + 13 / 15 * min(1, step / 10)) for step in range(50)]
    assert alphas == pytest.approx(rise)
    assert "α rises" not in capsys.readouterr().err
    assert sgo_sae.main(train_argv(alpha=3, alpha_warmup=1, out=tmp_path / "b")) == 0
    last = metrics_of(tmp_path / "b")[-1]["alpha"]
    assert last < 3 and f"α rises to {last:.4g} and not to 3" in capsys.readouterr().err
    assert sgo_sae.main(train_argv(alpha=3, alpha_start=1, log_every=1, out=tmp_path / "c")) == 0
    assert metrics_of(tmp_path / "c")[0]["alpha"] == 1


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


def test_advice_on_a_gradient_that_is_not_finite_blames_no_alpha_that_is_small():
    x_BD = torch.randn(50, 6)
    cfg = sgo_sae.Config(alpha=0.0)
    assert sgo_sae.failure_of(cfg, x_BD) == "use a smaller --lr"
    strong = sgo_sae.Config(alpha=1e4)
    paper = f"the paper's strength is α {0.075 * 21000 / x_BD.square().sum(1).mean():.2g} here"
    assert sgo_sae.failure_of(strong, x_BD) == f"use a smaller --alpha or --normalize ({paper})"
    strong.normalize = True
    assert sgo_sae.failure_of(strong, x_BD) == f"use a smaller --alpha ({paper})"
    assert "activations are not finite" in sgo_sae.failure_of(strong, x_BD * math.inf)


# ---------------------------------------------------------------------- other people's autoencoders


def test_an_autoencoder_is_computed_in_float32_whatever_its_file_has(tmp_path):
    weights, x_BD = foreign_weights()
    weights = {name: (tensor * 20).bfloat16() for name, tensor in weights.items()}
    write_foreign(tmp_path, weights, architecture="standard", apply_b_dec_to_input=False)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    f_BN = (x_BD.double() @ exact["W_enc"] + exact["b_enc"]).relu()
    found_BN = sgo_sae.load_sae(tmp_path).encode(x_BD)
    assert ((found_BN > 0) == (f_BN > 0)).all()
    assert torch.allclose(found_BN.double(), f_BN, atol=1e-2, rtol=1e-4)


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
    with pytest.raises(InputError, match=f"is for {hook}, and only a layer's output is measured"):
        subject.layer()
    head = {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 3}
    write_foreign(tmp_path, foreign_weights()[0], **old | head)
    with pytest.raises(InputError, match="is for one attention head"):
        eval_sae.Subject(str(tmp_path), "cpu").layer()
    right = {"hook_point": "blocks.1.hook_resid_post"}
    write_foreign(tmp_path, foreign_weights()[0], **old | right)
    assert eval_sae.Subject(str(tmp_path), "cpu").layer() == 1


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


@pytest.mark.parametrize(
    "files, words",
    [
        (["ae.pt", "config.json"], "dictionary_learning's format"),
        (["cfg.json", "sae.safetensors"], "sparsify's format"),
        (["config.json", "params.safetensors"], "Gemma Scope 2's format"),
        (["hyperparams.json"], "hyperparams.json, which is an unknown format"),
        ([], "there is no such folder, or it is empty"),
    ],
)
def test_folders_of_other_formats_are_named(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=words):
        sgo_sae.load_sae(tmp_path)


# -------------------------------------------------------------------------- Ω on a GPU and by pairs


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
    gradient_of = {
        "tiles": sgo_sae.tiles_of_selected,
        "pairs": sgo_sae.gradient_by_pairs,
        "blocks": sgo_sae.gradient_by_blocks,
    }[way]
    found_BK = gradient_of(vals_BK.float() if way == "blocks" else vals_BK, idx_BK, 300)
    assert found_BK.dtype == torch.float32
    assert relative_error(found_BK, expected_BK) < most


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


@pytest.mark.parametrize("device, ratio", sgo_sae.PAIRS_PAY.items())
def test_the_way_is_chosen_by_cost(device, ratio, monkeypatch, patch_gpu):
    taken = []
    for name in ("tiles_of_selected", "gradient_by_pairs", "gradient_by_blocks"):
        real = getattr(sgo_sae, name)
        monkeypatch.setattr(
            sgo_sae, name, lambda *a, n=name, real=real: taken.append(n) or real(*a)
        )
    with patch_gpu():
        for N in (2 * ratio, 2 * ratio + 1):
            vals_BK = torch.rand(5, 2).to(device)
            idx_BK = torch.arange(10).view(5, 2).to(device)
            sgo_penalty(vals_BK, idx_BK, N)
    assert taken == [
        "tiles_of_selected",
        "gradient_by_blocks" if device == "cpu" else "gradient_by_pairs",
    ]


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


class Squares(sgo_sae.ThresholdSAE):
    """An architecture of one's own."""

    def activate(self, pre):
        return pre.relu().square()

    def adjust(self, lam, f_BN, l0, lr):
        return lam


def test_an_architecture_of_ones_own_is_one_class_and_one_name(train_argv, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "squares", Squares)
    run = sgo_sae.Run(sgo_sae.Config(arch="squares", d_sae=20, k=4, alpha=0.0), 6, CPU)
    x_BD = torch.randn(40, 6)
    f_BN = run.sae.pre_activations(x_BD).relu() ** 2
    assert torch.equal(run.terms(x_BD).f_BN, f_BN)
    assert sgo_sae.main(train_argv(arch="squares")) == 0
    assert json.loads((tmp_path / "run" / "cfg.json").read_text())["architecture"] == "jumprelu"


class Halves(SAE):
    """Top-k with formulas of its own, and no name by which SAELens knows it."""

    def pre_activations(self, x):
        return super().pre_activations(x) * 0.5

    def sparsity(self, pre_BN, f_BN):
        return f_BN.square().sum(1).mean()


def test_a_class_of_ones_own_trains_by_its_formulas_and_can_be_saved(
    train_argv, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(ARCHITECTURES, "halves", Halves)
    run = sgo_sae.Run(sgo_sae.Config(arch="halves", d_sae=20, k=4), 6, CPU)
    x_BD = torch.randn(40, 6)
    expected, found = loss_terms(run.sae, x_BD), run.terms(x_BD)
    for name in ("reconstruction", "sparsity", "omega"):
        assert torch.allclose(getattr(found, name), getattr(expected, name))
    weights = list(run.sae.parameters())
    gradients = [torch.autograd.grad(t.reconstruction, weights) for t in (expected, found)]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    assert "halves: its class has no saelens_name" in refused(train_argv(arch="halves"), capsys)


def test_a_finished_demo_is_finished(tmp_path, monkeypatch, capsys):
    """Its model is a folder of the cache, which --resume compares."""
    monkeypatch.setenv("SGO_CACHE", str(tmp_path / "cache"))

    def files(folder):
        make_model(folder)
        write_rows(folder / "train.jsonl", [{"text": TEXT * 3}] * 99)

    monkeypatch.setattr(sgo_sae, "demo_files", files)
    small = ["--tokens", "4096", "--dict", "32", "--k", "4", "--layer", "1", "--buffer", "9"]
    argv = ["--demo", *small, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert sgo_sae.main(argv) == 0
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert "it has ended: there is nothing to resume" in last_line(capsys)
    settings = json.loads(next((tmp_path / "run").glob("*/cfg.json")).read_text())["metadata"]
    assert (
        settings["settings"]["dtype"] == "float32"
    )  # and not auto, which another machine resolves


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
        terms = topk_loss_terms(module, x, sgo_sae.no_omega)
        aux = sgo_sae.decode_selected(module, *sgo_sae.encode_selected(module, x, select))
        loss = terms.reconstruction + (x - terms.xhat_BD - aux).square().sum(1).mean() / 32
        return torch.autograd.grad(loss, list(module.parameters()))

    if on_gpu:
        with patch_gpu():
            gradients = [gradient.cpu() for gradient in found()]
    else:
        gradients = found()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, expected, strict=True))


def test_dead_is_one_thing():
    """A latent that was active on no token of the last 200 steps, never-active ones among them."""
    run = sgo_sae.Run(sgo_sae.Config(d_sae=3, k=1, alpha=0.0, lr=0.0, out="."), 2, CPU)
    run.sae.W_enc.data = torch.tensor([[1.0, 0, -1], [0, 1, 0]])
    first, second = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda *args: io.StringIO())
        for step in range(300):
            run.step(second if step == 50 else first, step, 300)
            run.log(first, step + 1, 1.0)
            found[step + 1] = run.history[-1]["dead"]
    assert found[199] is None and "dead unknown" not in run.figures()
    # The third one is never active, and the second one last in step 50, after which 51 are done.
    assert (found[200], found[250], found[251], found[300]) == (1, 1, 2, 2)


@pytest.mark.parametrize("clip, most", [(1.0, 1.0), (0.25, 0.25), (0.0, math.inf)])
def test_gradients_are_clipped_to_the_norm_that_is_set(clip, most, monkeypatch):
    sae = SAE(6, 20, 4)
    x_BD = torch.randn(50, 6) * 10
    norms = []

    class Adam:
        param_groups = ({},)

        def step(self):
            norms.append(math.sqrt(sum(p.grad.square().sum() for p in sae.parameters())))

        def zero_grad(self):
            pass

    norm = update(sae, Adam(), total_loss(topk_loss_terms(sae, x_BD)), 0.1, clip)
    assert norm > 1 and norms == [pytest.approx(min(norm, most), rel=1e-4)]
    clips = []
    monkeypatch.setattr(sgo_sae, "update", lambda *args: clips.append(args[-1]) or 1.0)
    run = sgo_sae.Run(sgo_sae.Config(d_sae=20, k=4, clip=clip), 6, CPU)
    run.step(x_BD, 0, 10)
    assert clips == [clip] and run.gradient_norm == 1.0


# ---------------------------------------------------------------------------- outliers, and figures


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
    cfg.max_norm = 10.0
    without = torch.cat(list(islice(data_of(cfg), 300)))
    norm_T = all_of_them.norm(dim=1)
    is_outlier_T = norm_T > 10 * norm_T.median()
    assert 300 < is_outlier_T.sum() < 700
    # The others stay where they are, and each outlier becomes one of them.
    assert torch.equal(without[~is_outlier_T], usual[~is_outlier_T])
    assert without.norm(dim=1).max() < 10 * norm_T.median()
    places = without[is_outlier_T][:, None] == usual
    is_there = places.all(2).any(1)  # or it is one of the few that fill no batch of the round
    assert is_there.float().mean() > 0.97


def test_outliers_are_logged_told_once_and_leave_resuming_exact(
    train_argv, tmp_path, monkeypatch, capsys
):
    with_outliers(monkeypatch)
    argv = train_argv(**LONG)
    assert sgo_sae.main(train_argv(out=tmp_path / "whole", **LONG)) == 0
    assert capsys.readouterr().err.count("tokens have over 10 times the median norm") == 1
    counts = [row["outliers"] for row in metrics_of(tmp_path / "whole")]
    assert max(counts) > 0
    with monkeypatch.context() as patch:
        stop_at(patch, 333)
        assert sgo_sae.main(argv) == 143
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_the_pace_is_told_once_after_the_first_steps(train_argv, tmp_path, capsys):
    assert sgo_sae.main(train_argv()) == 0
    told = capsys.readouterr().err
    line = (
        r"7 steps to go, of [\d.e+]+ ms, and [\d.e+]+ ms for reading; done at about \w+ \d\d:\d\d; "
    )
    assert len(re.findall(line + r"peak memory \d+\.\d of \d+ GB", told)) == 1
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(row["tokens_per_second"] > 0 and 0.1 < row["peak_memory_gb"] < 100 for row in rows)


def test_the_pace_is_what_was_measured(capsys):
    pace = sgo_sae.Pace(100, CPU)
    pace.add(50.0, 50.0)  # a first step, which is left out
    assert pace.figures(2048)["tokens_per_second"] is None
    pace.add(0.3, 0.1)
    pace.add(0.5, 0.1)
    assert pace.figures(2048)["tokens_per_second"] == pytest.approx(2048 * 2 / 1.0)
    pace.tell_once(3)
    assert "97 steps to go, of 400 ms, and 100 ms for reading" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gemma2", "opt", "gpt1", "qwen3"])
def test_cfg_names_the_module_in_the_model_with_its_head(train_argv, model, tmp_path, kind):
    import transformers

    folder = model[0]
    if kind != "gemma2":
        folder = tmp_path / "lm"
        saved(kind, model, folder)
    assert sgo_sae.main(train_argv(model=folder)) == 0
    metadata = json.loads((tmp_path / "run" / "cfg.json").read_text())["metadata"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    module = whole.get_submodule(metadata["hf_hook_name"])
    last = metrics_of(tmp_path / "run")[-1]
    assert metadata["l0"] == last["l0"] and metadata["dead_latents"] == last["dead"]
    ids_BL = torch.randint(3, 80, (2, 9))
    reader = sgo_sae.load_lm(folder, 1, CPU, torch.float32)
    expected = sgo_sae.layer_output(reader.lm, reader.layer, ids_BL)
    assert torch.equal(sgo_sae.layer_output(whole.eval(), module, ids_BL), expected)


# ----------------------------------------------------------------------------- where there is a GPU

on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")


@on_a_gpu
@pytest.mark.parametrize("way", ["tiles", "pairs"])
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 1e-3), (torch.float32, 1e-3)])
def test_gpu_both_ways_of_omega_are_the_definition(way, dtype, most, monkeypatch, real_gpu):
    """float32 is TF32 there."""
    torch.set_float32_matmul_precision("high")
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
@pytest.mark.parametrize("arch", ARCHS)
def test_gpu_trains_as_a_cpu_does(arch, real_gpu):
    torch.set_float32_matmul_precision("highest")
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
    train_argv, texts, tmp_path, monkeypatch, capsys, real_gpu
):
    argv = train_argv(device="cuda", **LONG)
    stop_at(monkeypatch, 113)
    assert sgo_sae.main(argv) == 143
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert evaluated([tmp_path / "run", "--text", texts, "--contexts", 8, "--metrics", "core"]) == 0
    assert "explained variance" in capsys.readouterr().out


@on_a_gpu
def test_gpu_memory_of_run_4_is_that_of_the_account(monkeypatch, real_gpu):
    """Of the autoencoder alone: what is allocated at the peak of three steps."""
    with monkeypatch.context() as patch:
        counted = held_bytes([config_of("topk", 18432)], patch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = sgo_sae.Run(config_of("topk", 18432), 2304, torch.device("cuda"), mixed_precision=True)
    for step in range(3):
        run.step(torch.randn(2048, 2304, device="cuda") * 3, step, 4882)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"run 4: {measured / 1e9:.2f} GB measured, {counted / 1e9:.2f} GB counted")
    assert measured < 1.1 * counted


# ------------------------------------------------------------------------------------- evaluation


def planted_sae(W_dec_ND, k=None):
    """An autoencoder with a given dictionary, whose encoder reads each direction's coefficient."""
    N, D = W_dec_ND.shape
    sae = SAE(D, N, k or N)
    sae.W_dec.data = W_dec_ND.clone()
    sae.W_enc.data = W_dec_ND.T.clone()
    return sae


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
    half = planted_sae(torch.cat([torch.eye(8)[:4], -torch.eye(8)[:4]]))  # 4 of 8 dimensions
    figures = eval_sae.reconstruction(half, x_TD, ctx=65)
    error = x_TD[:, 4:].double().square().sum().item()
    variance = (x_TD - x_TD.mean(0)).double().square().sum().item()
    assert figures["explained_variance"] == pytest.approx(1 - error / variance, rel=1e-5)
    assert figures["mse"] == pytest.approx(error / (5000 * 8), rel=1e-5)
    assert figures["mse_benchmark"] == pytest.approx(error / 5000 / (16 * 64), rel=1e-5)


def test_behaviour_of_the_exact_activation_and_of_zero(model):
    """Special tokens keep their activations, but where all is zeroed, and are no
    source of means."""
    _, full, tokenizer = model
    ids_TL = torch.randint(3, len(tokenizer), (5, 12))
    ids_TL[:, 0] = tokenizer.bos_token_id
    ids_TL[2, 5] = tokenizer.eos_token_id
    layer = full.model.layers[1]
    kept_TL = ids_TL > 2
    places = kept_TL.nonzero().tolist()

    def by_hand(log_p, log_q):
        ce = [-log_q[t, i, ids_TL[t, i + 1]].item() for t, i in places if i < 11]
        kl = [(log_p[t, i].exp() * (log_p[t, i] - log_q[t, i])).sum().item() for t, i in places]
        return statistics.mean(ce), statistics.mean(kl)

    def identity(x):
        return x

    saes = [identity, torch.zeros_like]
    exact, zero = eval_sae.behaviour(full, layer, saes, ids_TL, kept_TL)
    with torch.inference_mode():
        clean = full(ids_TL).logits.log_softmax(-1)
        for name, keep in (("zero", torch.zeros_like(kept_TL)), ("sae", ~kept_TL)):
            handle = layer.register_forward_hook(lambda m, a, x, keep=keep: x * keep[..., None])
            expected = by_hand(clean, full(ids_TL).logits.log_softmax(-1))
            handle.remove()
            assert (zero[f"ce_{name}"], zero[f"kl_{name}"]) == pytest.approx(expected, rel=1e-4)
    assert exact["ce_clean"] == exact["ce_sae"] == pytest.approx(by_hand(clean, clean)[0], rel=1e-5)
    assert (exact["ce_score"], exact["kl_score"]) == pytest.approx((1, 1))
    assert exact["kl_sae"] == pytest.approx(0, abs=1e-6)
    assert abs(zero["ce_sae"] - zero["ce_zero"]) > 1e-3


def independent_latents(T, N, seed=0):
    """Latents that fire independently at log-normal rates, of mean 1 in 80."""
    generator = torch.Generator().manual_seed(seed)
    rate_N = (torch.randn(N, generator=generator) * 1.5).exp()
    rate_N = (rate_N / rate_N.mean() / 80).clamp(max=0.9)
    return (torch.rand(T, N, generator=generator) < rate_N).float()


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
    assert figures["rare"] < 0.5


def test_competition_is_that_of_its_definition():
    f_TN = independent_latents(3000, 90)
    moderate = ((f_TN.sum(0) > 100) & (f_TN.sum(0) < 250)).nonzero()[:2, 0]
    f_TN[:, moderate[1]] = f_TN[:, moderate[0]] * (torch.rand(3000) < 0.8)
    M = [set(f_TN[:, i].nonzero()[:, 0].tolist()) for i in range(90)]
    compared = [m for m in M if 20 <= len(m) <= 300]
    n_over = 0
    for one, other in combinations(compared, 2):
        smaller, larger = sorted([len(one), len(other)])
        n_over += len(one & other) / smaller - larger / 3000 > 0.5
    figures = competition_of(f_TN)
    assert figures["pairs_over_chance"] == n_over > 0
    assert figures["rare"] == pytest.approx(sum(len(m) < 20 for m in M) / 90)
    assert figures["mean_max_cos"] == 0


def test_nearest_cosine_is_that_of_the_definition():
    W_ND = torch.randn(32, 8)
    cosine_NN = F.cosine_similarity(W_ND[:, None], W_ND, dim=2).abs().fill_diagonal_(0)
    assert torch.allclose(eval_sae.nearest_cosine(W_ND), cosine_NN.amax(1), atol=1e-6)


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


def test_a_probe_sees_as_many_of_its_class_as_of_the_others():
    labels_T = torch.tensor([0] * 50 + [1] * 60 + [2] * 70)[torch.randperm(180)]
    rows = eval_sae.class_and_others(labels_T, 1, torch.Generator())
    assert torch.bincount(labels_T[rows]).tolist() == [30, 60, 30]
    assert len(rows.unique()) == 120


def test_probing_finds_the_planted_latent():
    """And noise is told by chance, half, whatever the number of classes."""
    labels_T = torch.arange(1500) % 5
    f_TN = torch.rand(1500, 40)
    for c in range(5):
        f_TN[:, 7 * c] = (labels_T == c) + 0.1 * torch.rand(1500)
    f_TN[:, 30] *= 3  # large, and tells nothing
    found = eval_sae.sparse_probing(f_TN, labels_T, 750, "f")
    assert found["f_1"] == found["f_2"] == 1
    assert found["f_all"] > 0.99
    noise = eval_sae.sparse_probing(torch.rand(6000, 20), torch.arange(6000) % 5, 3000, "x")
    assert all(abs(noise[f"x_{k}"] - 0.5) < 0.03 for k in (1, 2, 5, 20))
    assert abs(noise["x_all"] - 0.5) < 0.08  # it is that of its best epoch


def planted_attributes(T=4800):
    """Activations in which one direction has attribute a, weakly, and another b, strongly."""
    torch.manual_seed(0)
    a_T = torch.arange(T) % 2
    b_T = torch.arange(T) // 2 % 2
    f_TN = torch.rand(T, 8) * 0.05
    f_TN[:, :4] += torch.stack([a_T, 1 - a_T, 2.0 * b_T, 2.0 * (1 - b_T)], 1)
    return f_TN, torch.stack([a_T, b_T])


def test_scr_of_a_planted_dictionary():
    f_TN, attributes = planted_attributes()
    W_ND = torch.eye(8)
    x_TD = f_TN @ W_ND
    sets = eval_sae.scr_sets(attributes, 2400)
    probes, biased = eval_sae.scr_probes(x_TD, attributes, sets)
    assert eval_sae.accuracy(x_TD, attributes[0], probes[0]) == 1
    assert eval_sae.accuracy(x_TD, attributes[0], biased) < 0.9  # it took b for a
    score = partial(eval_sae.scr, probes, biased, x_TD, f_TN, attributes, sets)
    assert score(W_ND)["scr_2"] == pytest.approx(1, abs=0.02)
    assert set(score(torch.zeros(8, 8)).values()) == {0.0}
    f_TN[:2400, 2:4] = 0  # the latents of b tell no longer: without effect, they are not ablated
    W_ND[2:] = 0
    assert score(W_ND)["scr_5"] <= 0


def test_scr_balances_what_is_clean_and_takes_as_many_texts_for_what_is_biased():
    """The smallest combination limits only the sets that it is in."""
    a_T = torch.arange(4000) % 2
    b_T = torch.arange(4000) // 2 % 2
    kept = ((a_T == b_T) | (torch.arange(4000) % 2000 < 400)).nonzero()[:, 0]
    cells_T = (2 * a_T + b_T)[kept]
    n_train = int((kept < 2000).sum())
    sets = eval_sae.scr_sets(torch.stack([a_T, b_T])[:, kept], n_train)
    sizes = [torch.bincount(cells_T[rows]).tolist() for rows in sets]
    assert sizes == [[100] * 4, [100] * 4, [500, 0, 0, 500], [500, 0, 0, 500]]
    assert all((sets[n] < n_train).all() and (sets[n + 1] >= n_train).all() for n in (0, 2))


def test_scrs_probes_train_for_all_of_their_epochs(monkeypatch):
    """Also where no epoch is better than the first: SAEBench sets their patience to
    their number."""
    f_TN, attributes = planted_attributes(400)
    scores = []
    monkeypatch.setattr(eval_sae, "accuracy", lambda *data: scores.append(0.5) or 0.5)
    eval_sae.scr_probes(f_TN, attributes, eval_sae.scr_sets(attributes, 200))
    assert len(scores) == 3 * 20


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


def test_scrs_texts_are_the_first_of_each_combination():
    """Of the first two labels and attributes."""
    cells = {("x", 0): 90, ("x", 1): 90, ("y", 0): 30, ("y", 1): 90}
    frame = frame_of({**cells, ("z", 0): 90, ("x", 2): 90})
    chosen = eval_sae.scr_task("two", frame, 80, 60)
    assert sizes_of(chosen, False) == [80, 40, 30, 80]
    assert sizes_of(chosen, True) == [60, 30, 30, 60]
    assert chosen["is_test"].is_monotonic_increasing  # the training texts come first
    first = frame[(frame["label"] == "x") & (frame["attribute"] == 1) & ~frame["is_test"]]
    shown = chosen[(chosen["label"] == 0) & (chosen["attribute"] == 1) & ~chosen["is_test"]]
    assert shown["text"].tolist() == first["text"].tolist()[:40]
    with pytest.raises(InputError, match="two: 20 texts of each label are needed"):
        eval_sae.scr_task("two", frame_of({**cells, ("y", 0): 19}), 80, 60)


def test_probings_texts_are_random_and_balanced():
    cells = dict.fromkeys(product("xyz", (0, 1)), 400)
    chosen = eval_sae.probing_task("three", frame_of(cells), 80, 60, seed=0)
    assert sizes_of(chosen, False) == [40] * 6
    assert sizes_of(chosen, True) == [30] * 6
    numbers = chosen["text"].str.split().str[-1].astype(int)
    assert numbers.max() > 300  # not the first ones
    again = eval_sae.probing_task("three", frame_of(cells), 80, 60, seed=1)
    assert again["text"].tolist() != chosen["text"].tolist()
    for text, label, attribute in zip(chosen["text"], chosen["label"], chosen["attribute"]):
        assert text.startswith(f"{'xyz'[label]} {attribute} ")
    cells["y", 1] = 30
    chosen = eval_sae.probing_task("three", frame_of(cells), 80, 60, seed=0)
    assert sizes_of(chosen, False) == [30] * 6


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


def test_the_demos_texts_keep_documents_apart(monkeypatch):
    sizes = {"big": 60, "middle": 50, "small": 40, "tiny": 30, "least": 25, "left": 20}
    files = []
    for package, size in sizes.items():
        for i in range(size):
            code = f"{package}{i}x = 0  # " + "filling " * 12
            files.append((f"{package}/{i}.py", f'{code}\n\ndef f():\n    """{code}"""\n\nshort'))
    # One file is in one part, so that it can't be a class.
    files.append(("lonely.py", files[0][1] * 200))
    monkeypatch.setattr(sgo_sae, "library_texts", lambda: iter(files))
    frame = eval_sae.demo_frame()
    parts = frame.groupby("file")["is_test"].nunique()
    assert parts.max() == 1
    assert set(frame["label"]) == set(sizes) - {"left"}
    assert (frame["text"].str.extract(r"([a-z]+)\d+x")[0] == frame["label"]).all()
    assert (frame["text"].str.contains('"""') == frame["attribute"]).all()


def test_absorption_of_planted_words():
    direction_D = F.one_hot(torch.tensor(0), 6).float()
    W_ND = torch.eye(6)
    W_ND[3] = torch.tensor([0.6, 0, 0, 0.8, 0, 0])  # an absorber, cosine 0.6 with the letter
    f_VN = torch.tensor(
        [
            [2.0, 0, 0, 0, 0, 0],  # the letter's latent carries all of it
            [0, 0, 0, 2.5, 0, 0],  # absorbed: 1.5 of 1.5 by latent 3
            [0.5, 0, 0, 2.5, 0, 0],  # 0.5 by the letter, 1.5 by latent 3
            [1.6, 0, 0, 0.5, 0, 0],  # latent 3 carries 0.3 of 1.9: under 40 %
        ]
    )
    x_VD = f_VN @ W_ND
    letter = (W_ND, direction_D, torch.tensor([0]))
    share_V, full_V = eval_sae.absorbed_share(f_VN, x_VD, *letter)
    assert torch.allclose(share_V, torch.tensor([0, 1, 0.75, 0]))
    assert full_V.tolist() == [False, True, False, False]
    x_VD[1, 0] = -1.0  # nothing to absorb where the residual does not point to the letter
    assert eval_sae.absorbed_share(f_VN, x_VD, *letter)[0][1] == 0


@pytest.mark.parametrize("absorbing", [False, True])
def test_absorption_from_planted_letters_to_the_mean(absorbing, monkeypatch):
    """Latent 52 takes over one A word in 25, too few for it to be in the letter's split."""
    nth_T, letters_T = torch.cartesian_prod(torch.arange(600), torch.arange(26)).T
    f_TN = 4.0 * F.one_hot(letters_T, 53) + 0.5 * F.one_hot(torch.randint(26, 52, (15600,)), 53)
    W_ND = torch.eye(60)[:53]
    W_ND[52] = F.normalize(torch.eye(60)[0] + torch.eye(60)[58], dim=0)
    absorber_N = 6.0 * F.one_hot(torch.tensor(52), 53)
    is_A_T = letters_T == 0
    if absorbing:
        f_TN[is_A_T & (nth_T % 25 == 0)] = absorber_N
    x_TD = f_TN @ W_ND
    decode = torch.linalg.pinv(W_ND)
    sae = planted_sae(W_ND)
    sae.encode = lambda x: (x @ decode).clamp(min=0)
    # Each letter's own latent comes first.
    monkeypatch.setattr(eval_sae, "multi_probe", lambda *data, **_: (torch.eye(53)[:26], None))
    n_train = 450 * 26
    W_CD = 20 * torch.eye(60)[:26]
    y_U = letters_T[n_train:]
    assert eval_sae.recognised_words(x_TD[n_train:], y_U, W_CD, torch.full((26,), -20.0)).all()
    found = eval_sae.absorption(sae, x_TD, letters_T, n_train, x_TD[n_train:], y_U, W_CD)
    share = 2 / 50 / 26 if absorbing else 0
    assert (found["full"], found["absorption"]) == pytest.approx((share, share), abs=1e-6)
    # What counts is what the scored words are on their new prompts.
    f_TN[is_A_T] = absorber_N
    new_UD = (f_TN @ W_ND)[n_train:]
    found = eval_sae.absorption(sae, x_TD, letters_T, n_train, new_UD, y_U, W_CD)
    assert found["full"] == pytest.approx(1 / 26, abs=1e-6)


def test_a_model_that_can_not_spell_is_refused():
    x_TD = torch.randn(200, 6)
    with pytest.raises(InputError, match="spells 0 of 26 letters, 20 are needed"):
        eval_sae.recognised_words(
            x_TD, torch.randint(26, (200,)), torch.zeros(26, 6), -torch.ones(26)
        )


def fit(adam, loss_of, batches):
    for rows in batches:
        adam.zero_grad()
        loss_of(rows).backward()
        adam.step()


def test_the_probe_of_all_letters_is_autograds():
    """On latents, which it computes batch by batch."""
    sae = SAE(6, 20, 4)
    x_TD = torch.randn(300, 6)
    y_T = torch.randint(26, (300,))
    own = eval_sae.multi_probe(x_TD, y_T, batch=100, l2=1e-4, l1=0.01, encode=sae.encode)
    torch.manual_seed(0)
    probe = torch.nn.Linear(20, 26)
    adam = torch.optim.Adam(probe.parameters(), weight_decay=1e-4)
    counts_C = torch.bincount(y_T, minlength=26)
    entropy = torch.nn.BCEWithLogitsLoss(pos_weight=(300 - counts_C) / counts_C)

    def loss_of(rows):
        loss = entropy(probe(sae.encode(x_TD[rows])), F.one_hot(y_T[rows], 26).float())
        return loss + 0.01 * probe.weight.abs().sum(1).mean()

    for epoch in range(50):
        adam.param_groups[0]["lr"] = 0.01 * 0.001 ** (epoch / 50)
        fit(adam, loss_of, torch.randperm(300).split(100))
    assert torch.allclose(own[0], probe.weight, atol=1e-4)
    assert torch.allclose(own[1], probe.bias, atol=1e-4)


def test_the_probe_on_many_columns_is_autograds():
    x_TD = torch.randn(60, 8)
    y_T = torch.rand(60) > 0.5
    generator = torch.Generator().manual_seed(3)
    own = eval_sae.linear_probe(x_TD, y_T, x_TD, y_T, generator, 1, batch=6, lr=0.02, l1=0.01)
    generator.manual_seed(3)
    w_D = torch.zeros(8).uniform_(-(8**-0.5), 8**-0.5, generator=generator).requires_grad_()
    b = torch.zeros((), requires_grad=True)

    def loss_of(rows):
        entropy = F.binary_cross_entropy_with_logits(x_TD[rows] @ w_D + b, y_T[rows].float())
        return entropy + 0.01 * w_D.abs().sum()

    adam = torch.optim.AdamW([w_D, b], lr=0.02)
    fit(adam, loss_of, torch.randperm(60, generator=generator).split(6))
    assert torch.allclose(own.w_D, w_D, atol=1e-5)


# ------------------------------------------------------------------- reading, and other people's


@pytest.fixture(scope="session")
def reader(model):
    return eval_sae.LanguageModel(model[0], 1, CPU, torch.float32)


def test_the_whole_model_is_read_up_to_a_layer(model, reader):
    ids_BL = torch.randint(3, len(model[2]), (3, 20))
    with torch.inference_mode():
        expected = model[1](ids_BL, output_hidden_states=True).hidden_states[2]
    assert torch.equal(reader.read(ids_BL), expected)
    assert reader.has_head and not reader.layer._forward_hooks


def test_a_model_whose_files_lack_tensors_is_refused(model, run, tmp_path, texts, capsys):
    """They would be drawn at random. A model that was saved without a head lacks nothing else."""
    import transformers

    short = tmp_path / "short"
    make_model(short, layers=1)
    (short / "config.json").write_text((Path(model[0]) / "config.json").read_text())
    argv = [run / "s0", "--text", texts, "--contexts", "9", "--metrics", "core", "behaviour"]
    assert evaluated([*argv, "--model", short]) == 0
    assert "its files lack" in capsys.readouterr().out
    headless = tmp_path / "headless"
    transformers.AutoModel.from_pretrained(model[0]).save_pretrained(headless)
    model[2].save_pretrained(headless)
    assert evaluated([*argv, "--model", headless]) == 0
    printed = capsys.readouterr().out
    assert "core: mse" in printed
    assert "behaviour: not measured, the model has no language-model head" in printed


def test_texts_that_are_none_are_left_out(tmp_path):
    rows = [{"text": text, "label": "a"} for text in ("one", "", "  ", None, "two")]
    rows.append({"text": "three", "label": None})
    write_rows(tmp_path / "rows.jsonl", rows)
    assert eval_sae.file_frame(str(tmp_path / "rows.jsonl"))["text"].tolist() == ["one", "two"]
    write_rows(tmp_path / "numbers.jsonl", [{"text": 1, "label": 2}, {"text": 3, "label": 4}])
    assert len(eval_sae.file_frame(str(tmp_path / "numbers.jsonl"))) == 0


def test_mean_latents_do_not_depend_on_batch_size_or_padding(reader):
    sae = SAE(16, 64, 4)
    texts = [TEXT[: 5 + 3 * i] for i in range(20)]
    x_TD, f_TN = eval_sae.mean_latents(reader, [sae], texts, "texts", 12)
    for t in range(20):
        x_1D, f_1N = eval_sae.mean_latents(reader, [sae], texts[t : t + 1], "text", 12)
        assert torch.allclose(x_TD[t], x_1D[0], atol=1e-4)
        assert torch.allclose(f_TN[t], f_1N[0], atol=1e-3)
    ids = reader.bos + reader.tokenizer(texts[3]).input_ids[:11]
    alone = reader.read(torch.tensor([ids]))[0, 1:]
    assert torch.allclose(x_TD[3], alone.mean(0), atol=1e-4)


@pytest.mark.parametrize("kind", ["roberta", "qwen3"])
def test_the_filling_of_a_batch_changes_nothing(model, tmp_path, kind):
    """Nor where each token sees all others."""
    saved(kind, model, tmp_path)
    reader = eval_sae.LanguageModel(str(tmp_path), 1, CPU, torch.float32)
    alone = eval_sae.mean_latents(reader, [], [TEXT[:20]], "x", 30)[0]
    beside = eval_sae.mean_latents(reader, [], [TEXT[:20], TEXT], "x", 30)[0]
    assert torch.allclose(beside[:1], alone, atol=1e-5)


def test_an_evaluation_of_activations_that_are_not_finite_is_none(run, texts, monkeypatch, capsys):
    real = sgo_sae.layer_output
    monkeypatch.setattr(
        sgo_sae, "layer_output", lambda *args, **more: real(*args, **more) * math.inf
    )
    argv = [run / "s0", "--text", texts, "--contexts", "9", "--metrics", "core", "competition"]
    evaluated(argv)
    printed = capsys.readouterr().out
    assert printed.count("not measured, the model's activations are not finite") == 2
    assert "mse" not in printed


def test_words_are_read_after_ten_examples(reader, monkeypatch):
    """The prompts, as text: ten lines with the right letters, then the word, and
    other ones anew."""
    rng = random.Random(0)
    words = eval_sae.alphabetic_words(reader.tokenizer)
    read = []
    original = reader.batches
    monkeypatch.setattr(reader, "batches", lambda p, desc: read.append(p) or original(p, desc))
    both = [eval_sae.spelled_activations(reader, words[:9], words, rng, "") for _ in range(2)]
    assert read[0] != read[1]
    assert not torch.allclose(*both)
    for prompt, (word, letter), x_D in zip(read[0], words, both[0]):
        *lines, last = reader.tokenizer.decode(prompt[1:]).strip("\n").split("\n")
        assert len(lines) == 10
        for line in lines:
            example, answer = line.split(" has the first letter:")
            assert example.strip()[0].upper() == answer.strip()
        assert prompt[-1] == word
        assert last == reader.tokenizer.decode([word])
        assert "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[letter] == last.strip()[0].upper()
        assert torch.allclose(reader.read(torch.tensor([prompt]))[0, -1], x_D, atol=1e-4)


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


@pytest.fixture(scope="session")
def run(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert sgo_sae.main(flags(model[0], texts, folder / f"s{seed}", seed=seed)) == 0
    return folder


def copy_of(run, folder, **metadata):
    """A folder with the autoencoder of a run, as another trainer would have written it."""
    shutil.copytree(run / "s0", folder)
    config = json.loads((folder / "cfg.json").read_text())
    for name in ("settings", "activation_scale", "dataset_path"):
        config["metadata"].pop(name)
    config["metadata"].update(metadata)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_a_run_a_saelens_folder_and_gemma_scope_stand_in_one_table(
    model, run, texts, tmp_path, capsys
):
    """SAELens names the hook as Hugging Face's modules are called, and the model's context size."""
    changed = {"hook_name": "model.layers.1", "context_size": 16, "model_name": "a-small-model"}
    lens = copy_of(run, tmp_path / "lens", **changed)
    gemma_scope(tmp_path / "layer_1" / "average_l0_4")
    scope = tmp_path / "layer_1" / "average_l0_4" / "params.npz"
    argv = [run / "s0", lens, scope, "--text", texts, "--metrics", "core", "--contexts", "9"]
    assert evaluated(argv) == 2
    assert "give --model, or a call for each model" in capsys.readouterr().err
    argv += ["--model", model[0]]
    assert evaluated(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["s0", "lens", "average_l0_4"]
    mse = next(line for line in lines if "core: mse ↓" in line).split("|")
    assert mse[2].strip() == mse[3].strip() != mse[4].strip()
    for file in (run / "s0" / "eval.json", lens / "eval.json", scope.with_suffix(".eval.json")):
        assert json.loads(file.read_text())["core"]["sample"]["contexts"] == 9


def evaluation_of(paths, *argv):
    args = eval_sae.new_parser().parse_args([*map(str, paths), *argv])
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
    with pytest.raises(InputError, match="'32', '64'.*give --ctx"):
        evaluation_of([one, two]).text_config()
    with pytest.raises(InputError, match="other/data.*some/data.*give --text"):
        evaluation_of([one, two], "--ctx", "16").text_config()
    config = evaluation_of([one, two], "--ctx", "16", "--text", "held.jsonl").text_config()
    assert (config.dataset, config.split, config.ctx) == ("held.jsonl", "train", 16)
    evaluation = evaluation_of([run / "s0"])
    other = {"dataset": "some/data", "subset": "small", "text_column": "body"}
    evaluation.subjects[0].training.update(other)
    config = evaluation.text_config()
    assert (config.subset, config.text_column, config.ctx) == ("small", "body", 16)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "hook_mlp_out"),
        ({"metadata": {}}, "give --layer"),
    ],
)
def test_autoencoders_that_would_be_measured_wrongly_are_refused(
    model, texts, tmp_path, capsys, change, words
):
    (tmp_path / "sae").mkdir()
    sgo_sae.save_sae(SAE(16, 64, 4), sgo_sae.Config(model=model[0], layer=1, k=4), tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | change))
    assert evaluated([str(tmp_path / "sae"), "--text", texts]) == 2
    assert words in last_line(capsys)


# ------------------------------------------------------------------------ table and command line


@pytest.fixture(scope="session")
def probe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "words.csv"
    lines = ["text,label,attribute"]
    for i in range(400):
        for word in ("fox", "dog"):
            lines += [f"{word} {i} {how},{word},{how}" for how in ("warm", "lazy")]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_probing_takes_several_files(run, probe_file, tmp_path, capsys):
    """Each is a task of its own, and the figure is their mean."""
    other = tmp_path / "other.csv"
    other.write_text(Path(probe_file).read_text())
    files = [probe_file, other, "--train", "100", "--test", "50"]
    assert evaluated([run / "s0", "--metrics", "probe", "scr", "--probe", *files]) == 0
    capsys.readouterr()
    found = json.loads((run / "s0" / "eval.json").read_text())
    for family in ("probe", "scr"):
        figures = found[family]["figures"]
        assert found[family]["parts"] == {"words, seed 0": figures, "other, seed 0": figures}


def test_runs_of_two_context_sizes_are_probed_together(run, probe_file, texts, tmp_path, capsys):
    """Which reads no contexts; core, which does, asks for --ctx."""
    copy_of(run, tmp_path / "longer", context_size=32)
    argv = [run / "s0", tmp_path / "longer", "--probe", probe_file, "--train", 40, "--test", 20]
    assert evaluated([*argv, "--text", texts, "--metrics", "probe", "core"]) == 0
    printed = capsys.readouterr().out
    assert "probe: latents 1" in printed and "probe: not measured" not in printed
    assert "core: not measured, the runs differ, ['16', '32']: give --ctx" in printed


def test_two_files_of_one_name_are_two_tasks(run, probe_file, tmp_path):
    (tmp_path / "other").mkdir()
    same_name = tmp_path / "other" / Path(probe_file).name
    shutil.copy(probe_file, same_name)
    args = eval_sae.new_parser().parse_args(["x", "--probe", str(probe_file), str(same_name)])
    args.train, args.test = 40, 20
    names = {name for name, _, _ in eval_sae.load_tasks("probe", args, False, [])}
    assert names == {str(probe_file), str(same_name)}


def test_figures_are_meaned_over_seeds(run, probe_file):
    """Those of several seeds are the mean of those of each alone."""
    argv = [run / "s0", "--metrics", "probe", "scr", "--probe", probe_file, "--train", "40"]
    found = []
    for seeds in (["0"], ["1"], ["0", "1"]):
        assert evaluated([*argv, "--seed", *seeds]) == 0
        found.append(eval_sae.Subject(run / "s0", CPU).results)
    for family in ("probe", "scr"):
        first, second, both = [results[family]["figures"] for results in found]
        assert first != second
        assert both == pytest.approx({key: (first[key] + second[key]) / 2 for key in first})


def small_evaluation(run, texts, probe_file):
    sizes = ["--contexts", "40", "--train", "200", "--test", "100", "--words", "200"]
    return [run / "s0", run / "s1", "--text", texts, "--probe", probe_file, *sizes]


def test_evaluation_prints_a_table_and_is_repeatable(run, texts, probe_file, capsys):
    argv = small_evaluation(run, texts, probe_file)
    assert evaluated(argv) == 0
    first = capsys.readouterr().out
    assert evaluated(argv) == 0
    assert capsys.readouterr().out == first
    lines = first.splitlines()
    assert "2 seeds" in lines[0]
    for label in (
        "core: mse ↓",
        "behaviour: ce score ↑",
        "competition: mean max cos ↓",
        "probe: latents 1 ↑",
        "scr: scr 2 ↑",
    ):
        assert any(line.startswith(f"| {label} ") for line in lines), label
    assert any(line.startswith("absorption: not measured, ") for line in lines)
    content = json.loads((run / "s0" / "eval.json").read_text())
    assert content["core"]["figures"]["l0"] == pytest.approx(4, abs=0.2)
    assert content["core"]["settings"]["contexts"] == 40
    assert content["probe"]["sample"]["words"] == {"train": 400, "test": 200}
    assert evaluated([*argv[:4], "--metrics", "core", "--contexts", "100000"]) == 0
    assert re.search(r"the text has \d{2,3} contexts, not 100000", capsys.readouterr().out)


def test_what_was_measured_stays_when_a_later_family_fails(
    run, texts, probe_file, capsys, monkeypatch
):
    """And is not measured again with --resume, unless the settings are others."""
    argv = small_evaluation(run, texts, probe_file)
    (run / "s0" / "eval.json").unlink(missing_ok=True)

    def full(*data):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(eval_sae.Evaluation, "absorption", full)
        assert evaluated(argv) == 2
    last = last_line(capsys)
    assert "out of memory, smaller --contexts, --train, --test and --words" in last
    kept = json.loads((run / "s0" / "eval.json").read_text())
    assert set(kept) == {"core", "behaviour", "competition", "probe", "scr"}
    measured = []
    original = eval_sae.reconstruction
    monkeypatch.setattr(
        eval_sae, "reconstruction", lambda *data: measured.append(1) or original(*data)
    )
    assert evaluated([*argv, "--metrics", "core", "absorption", "--resume"]) == 0
    assert measured == []
    assert set(json.loads((run / "s0" / "eval.json").read_text())) == set(eval_sae.FAMILIES)
    assert evaluated([*argv, "--metrics", "core", "--resume", "--seed", "1"]) == 0
    assert len(measured) == 2


class Measured:
    """As much of a Subject as a table needs."""

    def __init__(self, path, settings, seed, figures, family="core"):
        self.path = path
        self.settings = settings
        self.seed = seed
        self.results = {family: {"figures": figures, "notes": []}}


def cells_of(subjects, families=("core",), **options):
    eval_sae.name_subjects(subjects)
    lines = eval_sae.table(subjects, families, **options).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]


def test_table_has_means_and_deviations_over_seeds():
    values = {(0.0, 0): 1.0, (0.0, 1): 3.0, (0.1, 1): 9.0, (0.1, 0): 8.0, (0.2, 0): 2.5}
    subjects = [
        Measured(f"{alpha}{seed}", {"alpha": alpha, "dict": 8}, seed, {"mse": value})
        for (alpha, seed), value in values.items()
    ]
    head, _, row = cells_of(subjects)
    assert head == ["", "alpha 0.0, 2 seeds", "alpha 0.1, 2 seeds", "alpha 0.2"]
    assert row == ["core: mse ↓", "2.0 ± 1.4", "8.50 ± 0.71", "2.500"]
    again = [subjects[0], Measured("copies/a", subjects[0].settings, 0, {"mse": 1.5})]
    head, _, row = cells_of(again)
    assert (head[2], row[1:]) == ("copies/a", ["1.000", "1.500"])


def paired_subjects():
    """Three settings with three seeds: figures of setting + seed + a residual, and one of all."""
    residual_33 = torch.randn(3, 3).double() / 100
    subjects = []
    values_33 = 0.3 * torch.arange(3)[:, None] + 5 * torch.arange(3) + residual_33
    for i, alpha in enumerate((20, 0, 2.5)):
        for seed in range(3):
            settings = {"arch": "topk", "alpha": alpha}
            value = values_33[i, seed].item()
            figures = {"mse": value, "ce_score": -value, "l0": 0.7}
            subjects.append(Measured("", settings, seed, figures))
    return subjects, values_33


def test_intervals_pool_the_variance_over_the_settings():
    """A two-way analysis by hand; the differences are marked where they are better or worse."""
    subjects, values_33 = paired_subjects()
    eval_sae.name_subjects(subjects)
    baseline = eval_sae.baseline_of(subjects)
    assert baseline == "alpha 0"  # the unpenalised topk, and not the first
    head, _, mse, score, same = cells_of(subjects, baseline=baseline)
    assert head == ["", "alpha 0, 3 seeds", "alpha 20, 3 seeds", "alpha 2.5, 3 seeds", "±"]
    residual_33 = values_33 - values_33.mean(1, keepdim=True) - values_33.mean(0) + values_33.mean()
    deviation = (residual_33.square().sum() / 4).sqrt().item()
    half = 2.77645 * deviation * math.sqrt(2 / 3)  # Student's t with 4 degrees of freedom
    assert eval_sae.student_t(4) == pytest.approx(2.77645, rel=1e-5)
    assert float(mse[4]) == pytest.approx(half, rel=0.05)
    means = values_33.mean(1)
    assert float(mse[2].strip("*")) == pytest.approx((means[0] - means[1]).item(), abs=1e-3)
    assert (mse[2][:2], mse[3][:2]) == ("**", "_+")  # a smaller error is better
    assert (score[2][:1], score[3][:1]) == ("*", "_")  # of a smaller score only the sign counts
    assert same[1:] == ["0.7000", "+0.0000", "+0.0000", ""]
    assert cells_of(subjects)[4][1:] == ["0.7000"] * 3  # though their mean is not exact


def test_what_the_user_names_first_is_compared_with(run):
    subjects, _ = paired_subjects()
    eval_sae.name_subjects(subjects)
    assert eval_sae.baseline_of(subjects[:1]) == "alpha 20"
    assert eval_sae.members(str(run)) == [str(run / "s0"), str(run / "s1")]
    assert eval_sae.members(str(run / "s1")) == [str(run / "s1")]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["/nowhere"], "/nowhere: there is no such file or folder"),
        (["RUN", "--metrics", "core", "beauty"], "invalid choice"),
        (["RUN", "--metrics", "core", "--text", "TEXTS", "--model", "/nowhere"], "/nowhere"),
        (["RUN", "--metrics", "core", "--text", "TEXTS", "--layer", "9"], "are 0 to 3"),
        (["RUN", "--metrics", "core"], "give --text"),
        (
            ["RUN", "--probe", "TEXTS", "--metrics", "probe"],
            "the columns text and label, and has text",
        ),
        (["RUN", "--probe", "FEW", "--metrics", "probe"], "20 texts of each label are needed"),
        (
            ["NARROW", "--layer", "1", "--metrics", "core", "--text", "TEXTS", "--model", "MODEL"],
            "is for 8 dimensions",
        ),
        (["RUN", "--contexts", "0"], "invalid positive value: '0'"),
    ],
)
def test_bad_evaluations_are_told_in_one_line(model, run, texts, tmp_path, capsys, argv, words):
    """What a family lacks is a line under the table, since the other families can be measured."""
    rows = [{"text": f"{label}{i}", "label": label} for label, i in product("ab", range(4))]
    write_rows(tmp_path / "few.jsonl", rows)
    (tmp_path / "narrow").mkdir()
    sgo_sae.save_sae(SAE(8, 32, 4), sgo_sae.Config(), tmp_path / "narrow")
    names = {
        "RUN": run / "s0",
        "TEXTS": texts,
        "FEW": tmp_path / "few.jsonl",
        "NARROW": tmp_path / "narrow",
        "MODEL": model[0],
    }
    code = evaluated([str(names.get(a, a)) for a in argv])
    printed = capsys.readouterr()
    if code == 0:
        assert any(words in line for line in printed.out.splitlines()), printed.out
    else:
        last = printed.err.splitlines()[-1]
        assert words in last and last.startswith("eval_sae.py: error: "), last


# ------------------------------------------------------------------------------------------- page


def test_closest_pairs_are_those_of_the_definition():
    f_TN = independent_latents(2000, 1100)  # more latents than a tile has
    rate_N = f_TN.mean(0)
    i, j, k = ((rate_N > 0.02) & (rate_N < 0.1)).nonzero()[:3, 0].tolist()
    f_TN[:, j] = f_TN[:, i]
    f_TN[:, k] = f_TN[:, i] * (torch.rand(2000) < 0.9)
    sae = argparse.Namespace(encode=torch.clone, b_enc=rate_N)
    shared_NN = eval_sae.shared_tokens(sae, f_TN)
    assert torch.equal(shared_NN, f_TN.T @ f_TN)
    pairs, histogram_20 = eval_sae.closest_pairs(shared_NN, 2000, 5)
    assert pairs[0] == (i, j)
    assert set(pairs[1:3]) == {(i, k), (j, k)}
    assert len(pairs) == 5
    assert histogram_20[-3:].sum() == 3


@pytest.fixture
def planted_page():
    """An evaluation of six latents on 40 contexts of 32 tokens, whose token n is the text <n>."""
    rate_N = torch.tensor([0.09, 0.09, 0.08, 0.08, 0.08, 0.0])
    f_TLN = torch.rand(40, 32, 6) * (torch.rand(40, 32, 6) < rate_N)
    f_TLN[..., 1] = torch.where(torch.rand(40, 32) < 0.8, f_TLN[..., 0] / 2, 0)
    kept_TL = torch.ones(40, 32, dtype=torch.bool)
    kept_TL[:, 0] = False
    head = torch.nn.Linear(6, 50, bias=False)
    tokenizer = argparse.Namespace(batch_decode=lambda rows: [f"<{row[0]}>" for row in rows])
    lm = argparse.Namespace(get_output_embeddings=lambda: head)
    return argparse.Namespace(
        activations=f_TLN,
        contexts=(torch.arange(40 * 32).view(40, 32), kept_TL),
        model=argparse.Namespace(has_head=True, tokenizer=tokenizer, lm=lm),
    )


def test_page_shows_pairs_and_contexts_of_a_planted_dictionary(planted_page):
    sae = planted_sae(torch.linalg.qr(torch.randn(6, 6))[0])
    sae.encode = lambda x: x
    views, histogram_20 = eval_sae.portrait(planted_page, sae)
    f_TLN = planted_page.activations * planted_page.contexts[1][..., None]
    active = f_TLN > 0
    sizes = active.sum((0, 1)).tolist()
    both = int((active[..., 0] & active[..., 1]).sum())
    first = views[0]
    pair = (both, both / min(sizes[:2]), max(sizes[:2]) / (40 * 31))
    assert (first["both"], first["w"], first["chance"]) == pair
    assert first["cosine"] == pytest.approx((sae.W_dec[0] @ sae.W_dec[1]).item(), abs=1e-6)
    assert histogram_20.sum() >= 1
    W_unembed = planted_page.model.lm.get_output_embeddings().weight
    for i, view in enumerate(first["latents"]):
        assert (view["number"], view["n_tokens"]) == (i, sizes[i])
        order = (W_unembed @ sae.W_dec[i]).argsort(descending=True).tolist()
        for (_, tokens), best in zip(view["effects"], (order[:8], order[:-9:-1])):
            assert list(tokens) == [f"'<{n}>'" for n in best]
        peaks = f_TLN[..., i].amax(1).topk(3)
        assert view["peak"] == peaks.values[0]
        for context, t in zip(view["contexts"], peaks.indices.tolist(), strict=True):
            for token, a, other in context:
                place = divmod(int(token[1:-1]), 32)
                assert place[0] == t
                assert (a, other) == (f_TLN[place][i], f_TLN[place][1 - i])


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 0.93], [0, 0.5, 1]),
        ([-5, 170], [-50, 0, 50, 100, 150, 200]),
        ([0, 0.07, 0.061], [0, 0.02, 0.04, 0.06, 0.08]),
        ([3, 7], [3, 4, 5, 6, 7]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, expected):
    assert eval_sae.ticks(values) == pytest.approx(expected)


def test_charts_enclose_their_points_and_constant_ones_are_left_out():
    lines = [torch.tensor([(0, 0), (3.3, 0)]).numpy(), torch.zeros(0, 2).numpy()]
    chart = eval_sae.chart([*lines, torch.tensor([(0, 1), (3.3, 170)]).numpy()], "a", "b", "c")
    assert chart["xs"] == pytest.approx([0, 1, 2, 3, 4])
    assert chart["ys"] == pytest.approx([0, 50, 100, 150, 200])
    constant = torch.tensor([(1.0, 16.0), (2.0, 16.0)]).numpy()
    for empty in ([constant], lines[1:]):
        assert eval_sae.chart(empty, "a", "b", "c") == {}


def test_page_is_one_file_in_which_text_is_text(train_argv, tmp_path, capsys):
    """Documents with HTML and scripts; nothing is loaded from elsewhere."""
    attack = '</p></script><script>alert("x")</script><img src=x onerror=alert(1)> & <!--'
    texts = tmp_path / "texts.jsonl"
    rows = [f"{attack} {TEXT[i * 40 : i * 40 + 300]} {attack}" for i in range(60)]
    write_rows(texts, [{"text": row} for row in rows])
    out = tmp_path / "<b>run" / "<i>s0"
    out.parent.mkdir()
    assert sgo_sae.main(train_argv(dataset=texts, out=out)) == 0
    argv = [out, "--text", texts, "--metrics", "core", "--html", tmp_path / "page.html"]
    assert evaluated(argv) == 0
    page = (tmp_path / "page.html").read_text()
    printed = capsys.readouterr().out
    found = set()
    words = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.update([tag, *(name for name, _ in attributes)])

        def handle_data(self, data):
            words.append(data)

    Reader().feed(page)
    svg = (
        "svg path polyline text figure figcaption viewbox width height d points x y dy text-anchor"
    )
    text = "html lang meta charset name content title style details summary open div p i small br"
    assert found <= {*svg.split(), *text.split(), "h2", "h4", "pre", "span", "class"}
    assert not re.search(r"@import|url\(", page)
    assert "<i>s0" in "".join(words)
    assert all(row in html.unescape(page) for row in printed.splitlines() if row.startswith("|"))


# -------------------------------------------------------------------------- other people's trainers
# What makes the trainers of dictionary_learning and sparsify train with the penalty; SAELens's is
# in the
# README. Each is run here, where the library is installed, by the library's own training function.
DICTIONARY_LEARNING = """
from dictionary_learning.trainers.top_k import TopKTrainer
from sgo_sae import alpha_at, sgo_penalty

class SGOTopKTrainer(TopKTrainer):
    alpha = 0.075 * 21_000  # for normalize_activations=True, a mean squared norm of 1

    def loss(self, x, step=None, logging=False):
        loss = super().loss(x, step=step, logging=logging)
        if logging:
            return loss
        f, vals, idx, pre = self.ae.encode(x, return_topk=True, use_threshold=False)
        return loss + alpha_at(step, self.alpha) * sgo_penalty(vals, idx, self.ae.dict_size)
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


def readme_code(word):
    """The Python of the README that has a word."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


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


def assert_evaluated_beside_ours(run, folder, texts, probe_file, capsys, *others):
    """It stands in one table with an autoencoder that was trained here on the same text."""
    settings = "--metrics core competition probe --contexts 40 --ctx 16 --train 100 --test 50"
    argv = [run / "s0", folder, *others, "--text", texts, "--probe", probe_file, *settings.split()]
    assert evaluated(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    variance = next(line for line in lines if "explained variance" in line).split("|")
    assert all(0.1 < float(cell) < 1 for cell in variance[2:4])
    assert not any("not measured" in line for line in lines)


def test_the_readmes_definition_is_the_penalty(tmp_path):
    code = "import torch\n\n" + readme_code("def orthogonality(f_BN)")
    pre_BN = torch.randn(200, 60, dtype=torch.float64).sub(1).requires_grad_()
    f_BN = pre_BN.relu()  # only active latents have a gradient
    plain = run_of(code, tmp_path)["orthogonality"](f_BN)
    assert_is_the_penalty(plain, 1.0, f_BN, pre_BN)
    assert_is_the_penalty(sgo_penalty_dense(f_BN), 1.0, f_BN, pre_BN)


def test_other_trainers_saelens(model, run, texts, probe_file, tmp_path, capsys):
    """The README's class, in SAELens's own runner."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    names = run_of(readme_code("TopKTrainingSAE"), tmp_path)
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
    assert_is_the_penalty(losses["sgo"], sgo_sae.alpha_at(500, 0.7), f_BN, sae.W_enc)
    gemma_scope(tmp_path / "layer_1" / "average_l0_4")
    scope = tmp_path / "layer_1" / "average_l0_4" / "params.npz"
    assert_evaluated_beside_ours(run, tmp_path / "out", texts, probe_file, capsys, scope)


def test_other_trainers_dictionary_learning(model, run, texts, probe_file, tmp_path, capsys):
    """Its own loop on activations of ours, since its buffer needs an older nnsight."""
    reason = "dictionary_learning is not installed"
    training = pytest.importorskip("dictionary_learning.training", reason=reason)
    names = run_of(DICTIONARY_LEARNING, tmp_path)
    cfg = sgo_sae.Config(model=model[0], dataset=texts, layer=1, ctx=16, batch=256, buffer=64)
    lm, layer, tokenizer, _ = sgo_sae.load_lm(model[0], 1, CPU, torch.float32)
    data = sgo_sae.batches(cfg, sgo_sae.load_texts(cfg), lm, layer, tokenizer)
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
    alpha = sgo_sae.alpha_at(500, 0.075 * 21_000)
    assert_is_the_penalty(extra, alpha, trainer.ae.encode(x_BD), trainer.ae.encoder.weight)
    assert_evaluated_beside_ours(run, tmp_path / "sae", texts, probe_file, capsys)


def test_other_trainers_sparsify(model, run, texts, probe_file, tmp_path, capsys):
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
    assert_evaluated_beside_ours(run, tmp_path / "sae", texts, probe_file, capsys)


# ------------------------------------------------------------------- SAEBench's recorded outputs


def planted_texts():
    """Mean latents of 5 classes, told weakly by a few of 60 latents: 300 + 100 of each; labels."""
    generator = torch.Generator().manual_seed(0)
    strength_5N = torch.randn(5, 60, generator=generator)
    strength_5N *= torch.rand(5, 60, generator=generator) < 0.15
    strength_5N *= 0.6
    latents = []
    labels = []
    for count_each in (300, 100):
        labels_T = torch.arange(5 * count_each) % 5
        noise_TN = torch.randn(len(labels_T), 60, generator=generator)
        latents.append((noise_TN + strength_5N[labels_T]).relu())
        labels.append(labels_T)
    return torch.cat(latents), torch.cat(labels), 1500


# What sae-bench 0.6.0 gave on these inputs (torch 2.13.0, transformer-lens 3.9.0), each with its
# seeds 0, 1 and 2.
SAEBENCH_PROBING = {"1": 0.6637, "2": 0.7070, "5": 0.7730, "20": 0.8033, "all": 0.7780}


def test_probing_gives_saebenchs_figures():
    """Its figures are means of three seeds, and a seed scatters by 0.01 here and there."""
    found = [eval_sae.sparse_probing(*planted_texts(), "f", seed) for seed in range(10)]
    for k, expected in SAEBENCH_PROBING.items():
        ours = statistics.mean(f[f"f_{k}"] for f in found)
        assert ours == pytest.approx(expected, abs=0.02), k


# ----------------------------------------------------------------------------------- demo and files


def test_demo_flags_override_the_demo():
    plain, sgo = sgo_sae.parse_args(["--demo", "--k", "8"])
    assert (plain.alpha, sgo.alpha) == (0.0, 0.075)
    assert (
        sgo.k == 8 and [sgo.d_sae] == sgo_sae.DEMO["d_sae"] and sgo.layer == sgo_sae.DEMO["layer"]
    )


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


def test_help_shows_every_setting_with_its_default():
    text = " ".join(python(SCRIPT, "--help").stdout.split())
    for field in dataclasses.fields(sgo_sae.Config):
        assert sgo_sae.flag_of(field.name) + " " in text
    assert (
        "(default: [18432])" in text and "(default: [0.075])" in text and "(default: 0.875)" in text
    )


def test_benchmark_prints_milliseconds(capsys):
    benchmark(["--dict", "256", "--k", "8", "--batch", "64", "--width", "16", "--peers"])
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert float(line.split()[-2].replace(",", "")) > 0


# ---------------------------------------------------------------------------------------- benchmark


def median_ms(works, times=7):
    """Median milliseconds of each of the works by name, called in turn; the first round is not
    counted.
    """
    seconds = {name: [] for name in works}
    for _ in range(times + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(measured[1:]) for name, measured in seconds.items()}


def saelens_step(x_BD, N, k):
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    cfg = TopKTrainingSAEConfig(d_in=x_BD.shape[1], d_sae=N, k=k, device=str(x_BD.device))
    sae = TopKTrainingSAE(cfg)
    adam = torch.optim.Adam(sae.parameters(), lr=0.0)
    dead_N = torch.zeros(N, dtype=torch.bool, device=x_BD.device)
    data = TrainStepInput(x_BD, {}, dead_N, n_training_steps=0, is_logging_step=False)

    def step():
        adam.zero_grad()
        sae.training_forward_pass(data).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()

    return step


def sparsify_step(x_BD, N, k):
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(num_latents=N, k=k)
    coder = SparseCoder(x_BD.shape[1], cfg, device=x_BD.device, dtype=torch.float32)
    adam = torch.optim.Adam(coder.parameters(), lr=0.0)

    def step():
        adam.zero_grad()
        coder(x_BD).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        coder.set_decoder_norm_to_unit_norm()

    return step


def dictionary_learning_step(x_BD, N, k):
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"activation_dim": x_BD.shape[1], "dict_size": N, "k": k, "device": str(x_BD.device)}
    trainer = TopKTrainer(steps=10**9, layer=0, lm_name="", **sizes)
    return partial(trainer.update, 1, x_BD)


PEERS = {  # by the name of the package
    "sae_lens": saelens_step,
    "sparsify": sparsify_step,
    "dictionary_learning": dictionary_learning_step,
}


def benchmark(argv):
    """Times training steps on Gaussian activations, with and without the penalty, and with --peers
    the plain TopK step of the other trainers that are installed.
    """
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    for name, value in {"dict": 18432, "k": 320, "batch": 2048, "width": 2304}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    device, _ = sgo_sae.find_device("auto", "auto")
    mixed = args.dtype == "bfloat16"
    torch.set_float32_matmul_precision("high")
    x_BD = torch.randn(args.batch, args.width, device=device)
    works = {}
    for name, alpha in {"without the penalty": 0.0, "with the penalty": 0.075}.items():
        # Without a learning rate every step is the same work.
        cfg = sgo_sae.Config(d_sae=args.dict, k=args.k, alpha=alpha, lr=0.0)
        run = sgo_sae.Run(cfg, args.width, device, mixed)
        works[name] = partial(run.step, x_BD, 0, 100)
    if args.peers:
        for package, step_of_peer in PEERS.items():
            if importlib.util.find_spec(package):
                step = step_of_peer(x_BD, args.dict, args.k)
                works[package] = torch.autocast(device.type, torch.bfloat16, enabled=mixed)(step)
    print(f"batch {args.batch}, D {args.width}, N {args.dict}, k {args.k}, {args.dtype}, {device}")
    for name, milliseconds in median_ms(works).items():
        print(f"step {name:<20}{milliseconds:>12,.1f} ms")


if __name__ == "__main__":
    benchmark(sys.argv[1:])
