"""Tests of sgo_sae.py and eval_sae.py against independent truth; no network. `python -m pytest` runs them."""

import ast
import dataclasses
import gzip
import http.server
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import statistics
import string
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval_sae
import sgo_sae
from sgo_sae import SAE, InputError, coactivation_weights, sgo_penalty, sgo_penalty_decoder, sgo_penalty_reference

HERE = Path(__file__).parent
SCRIPT = HERE / "sgo_sae.py"


def sparse_latents(B, N, K, seed=0, skew=2.0, dtype=torch.float64):
    """Top-k latents with ties, inactive slots, all-zero rows and, for large N, latents that never fire."""
    generator = torch.Generator().manual_seed(seed)
    pre_BN = torch.randn(B, N, generator=generator, dtype=dtype) - skew * torch.linspace(0, 1, N, dtype=dtype)
    pre_BN = (pre_BN * 4).round() / 4
    pre_BN[:: max(2, B // 3)] = -1
    vals_BK, idx_BK = pre_BN.topk(K, dim=1)
    return vals_BK.relu(), idx_BK


def dense(vals_BK, idx_BK, N):
    return vals_BK.new_zeros(len(vals_BK), N).scatter(1, idx_BK, vals_BK)


def definition(f_BN):
    """Ω, w and ∂Ω/∂f pair by pair, from Eq. 2 and 3 with Python sets and floats."""
    f = f_BN.tolist()
    B, N = f_BN.shape
    M = [{b for b in range(B) if f[b][i] > 0} for i in range(N)]
    w = [[len(M[i] & M[j]) / min(len(M[i]), len(M[j])) if M[i] and M[j] else 0.0 for j in range(N)] for i in range(N)]
    gram = [[sum(f[b][i] * f[b][j] for b in range(B)) / B for j in range(N)] for i in range(N)]
    omega = sum(w[i][j] * gram[i][j] ** 2 for i in range(N) for j in range(N) if i != j)
    grad = [[4 / B * sum(f[b][j] * w[i][j] * gram[i][j] for j in range(N) if j != i) for i in range(N)] for b in range(B)]
    return omega, torch.tensor(w, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)


SHAPES = [(7, 5, 1), (16, 12, 12), (40, 30, 6), (1, 9, 3), (33, 64, 2), (64, 100, 8), (3, 200, 200)]


# ------------------------------------------------------------------------------------------------ method


@pytest.mark.parametrize("B, N, K", SHAPES[:5])
def test_reference_is_the_definition(B, N, K):
    f_BN = dense(*sparse_latents(B, N, K), N)
    omega, w_NN, _ = definition(f_BN)
    assert torch.allclose(coactivation_weights(f_BN), w_NN, atol=1e-12, rtol=0)
    assert math.isclose(sgo_penalty_reference(f_BN).item(), omega, rel_tol=1e-12, abs_tol=1e-15)


def test_weights_of_a_case_worked_by_hand():
    f_BN = torch.tensor([[1.0, 2, 0, 0], [3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 2, 0]])
    expected = [[1, 1, 0.5, 0], [1, 1, 0, 0], [0.5, 0, 1, 0], [0, 0, 0, 0]]  # fourth latent never fires
    assert coactivation_weights(f_BN).tolist() == expected
    # ⟨f0,f1⟩ = (2 + 1)/4, ⟨f0,f2⟩ = 3/4, each pair counted in both orders
    assert sgo_penalty_reference(f_BN).item() == pytest.approx(2 * (1 * 0.75**2 + 0.5 * 0.75**2))


@pytest.mark.parametrize("way, rows", [("pairs", 1), ("pairs", 7), ("pairs", 1000), ("tiles", 1), ("tiles", 7), ("tiles", 1000)])
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_penalty_and_gradient_match_the_definition(B, N, K, way, rows, monkeypatch):
    monkeypatch.setattr(sgo_sae, "tile_rows", lambda d_sae, device: rows)
    monkeypatch.setattr(sgo_sae, "penalty_gradient_tiled", partial(sgo_sae.penalty_gradient_tiled, tile=rows))
    monkeypatch.setitem(sgo_sae.CROSSOVER, "cpu", 0 if way == "pairs" else math.inf)
    vals_BK, idx_BK = sparse_latents(B, N, K)
    omega, w_NN, grad_BN = definition(dense(vals_BK, idx_BK, N)) if N <= 64 else reference_by_autograd(vals_BK, idx_BK, N)
    vals_BK.requires_grad_()
    value = sgo_penalty(vals_BK, idx_BK, N)
    (grad_BK,) = torch.autograd.grad(value, vals_BK)
    assert math.isclose(value.item(), omega, rel_tol=1e-12, abs_tol=1e-15)
    expected_BK = grad_BN.gather(1, idx_BK) * (vals_BK > 0)  # only active entries receive a gradient
    assert torch.allclose(grad_BK, expected_BK, rtol=1e-10, atol=1e-14)
    rivals_N = w_NN.clone().fill_diagonal_(0).amax(1)
    assert torch.allclose(sgo_sae.max_coactivation(vals_BK.detach(), idx_BK, N), rivals_N, atol=1e-12, rtol=0)


def reference_by_autograd(vals_BK, idx_BK, N):
    f_BN = dense(vals_BK, idx_BK, N).requires_grad_()
    omega = sgo_penalty_reference(f_BN)
    return omega.item(), coactivation_weights(f_BN.detach()), torch.autograd.grad(omega, f_BN)[0]


def test_penalty_passes_gradcheck():
    vals_BK, idx_BK = sparse_latents(12, 10, 4)
    vals_BK = torch.where(vals_BK > 0, vals_BK + 0.1, vals_BK)  # away from 0, where w jumps
    active = vals_BK > 0
    values_A = vals_BK[active].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: sgo_penalty(torch.zeros_like(vals_BK).masked_scatter(active, v), idx_BK, 10), values_A
    )


def test_penalty_does_not_depend_on_the_order_of_tokens_or_slots():
    vals_BK, idx_BK = sparse_latents(50, 40, 6)
    rows, slots = torch.randperm(50), torch.randperm(6)
    same = sgo_penalty(vals_BK[rows][:, slots], idx_BK[rows][:, slots], 40)
    assert torch.allclose(same, sgo_penalty(vals_BK, idx_BK, 40), rtol=1e-12)
    f_BN = dense(vals_BK, idx_BK, 40)
    assert torch.equal(coactivation_weights(f_BN), coactivation_weights(f_BN[rows]))


@pytest.mark.parametrize("rows", [1, 1000])
def test_decoder_penalty_matches_its_definition(rows, monkeypatch):
    monkeypatch.setattr(sgo_sae, "tile_rows", lambda d_sae, device: rows)
    vals_BK, idx_BK = sparse_latents(40, 30, 5)
    W_ND = F.normalize(torch.randn(30, 7, dtype=torch.float64), dim=1).requires_grad_()
    value = sgo_penalty_decoder(vals_BK, idx_BK, W_ND)
    w_NN = definition(dense(vals_BK, idx_BK, 30))[1].fill_diagonal_(0)
    expected = (w_NN * (W_ND @ W_ND.T) ** 2).sum()
    assert torch.allclose(value, expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(v, W_ND)[0] for v in (value, expected)), rtol=1e-10)


def test_penalty_is_the_same_in_float32():
    vals_BK, idx_BK = sparse_latents(512, 256, 16)
    exact = sgo_penalty(vals_BK, idx_BK, 256)
    assert torch.allclose(sgo_penalty(vals_BK.float(), idx_BK, 256).double(), exact, rtol=1e-5)


def test_training_is_the_same_with_either_way_of_the_penalty(monkeypatch):
    losses = {}
    for way, crossover in (("pairs", 0), ("tiles", math.inf)):
        monkeypatch.setitem(sgo_sae.CROSSOVER, "cpu", crossover)
        torch.manual_seed(0)
        sae, cfg = SAE(16, 64, 8).double(), sgo_sae.Config(dict=64, k=8)
        adam = sgo_sae.optimizer(sae, 3e-3)
        steps = [torch.randn(256, 16, dtype=torch.float64) * 2 for _ in range(30)]
        losses[way] = [sgo_sae.training_step(sae, adam, x_BD, cfg, 0.5, 3e-3, 0.04)["loss"].item() for x_BD in steps]
    assert losses["pairs"] == pytest.approx(losses["tiles"], rel=1e-9)


def plain_topk(sae, x_BD):
    """Dense top-k latents, written independently: everything under the k-th largest pre-activation is 0."""
    pre_BN = ((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    return torch.where(pre_BN >= pre_BN.sort(dim=1, descending=True).values[:, sae.k - 1 : sae.k], pre_BN, 0)


def test_sae_and_its_gradients_match_a_dense_one():
    torch.manual_seed(0)
    sae = SAE(6, 20, 4).double()
    for p in sae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x_BD = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    f_BN = plain_topk(sae, x_BD)
    assert torch.allclose(sae.encode(x_BD), f_BN, atol=1e-14)
    assert torch.allclose(sae(x_BD), f_BN @ sae.W_dec + sae.b_dec, atol=1e-12)
    inputs = [x_BD, *sae.parameters()]
    vals_BK, idx_BK, active_BK = sae.sparse(x_BD)
    assert torch.equal(active_BK, (vals_BK > 0).double())
    xhat_BD = sae.decode_sparse(vals_BK, idx_BK)
    assert torch.allclose(dense(vals_BK, idx_BK, 20), f_BN, atol=1e-14)
    ours = torch.autograd.grad((xhat_BD - x_BD).square().sum() + vals_BK.sum(), inputs)
    expected = torch.autograd.grad((f_BN @ sae.W_dec + sae.b_dec - x_BD).square().sum() + f_BN.sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours, expected, strict=True))


ARCHS = ("topk", "batchtopk", "relu", "jumprelu")


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_other_architectures_and_their_gradients_match_dense_ones(arch):
    """jumprelu's threshold by the formulas of Rajamanoharan et al. 2024: (θ/ε) and (1/ε) times a rectangle of width ε."""
    torch.manual_seed(0)
    sae, x_BD = SAE(6, 20, 4, arch).double(), torch.randn(50, 6, dtype=torch.float64)
    sample_BD = torch.randn(1000, 6, dtype=torch.float64)
    sae.initialize(sample_BD, sgo_sae.geometric_median(sample_BD), bandwidth=0.4)
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    for p in weights:
        p.data += 0.1 * torch.randn_like(p)
    vals_BK, idx_BK, active_BK = sae.sparse(x_BD)
    lam, loss = 0.3, (sae.decode_sparse(vals_BK, idx_BK) - x_BD).square().sum()
    loss = loss + lam * (active_BK if arch == "jumprelu" else vals_BK).sum()

    pre_BN = (x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc
    if arch == "batchtopk":
        f_BN = torch.where(pre_BN >= pre_BN.flatten().sort(descending=True).values[50 * 4 - 1], pre_BN, 0)
        assert (vals_BK > 0).sum() == 50 * 4
        assert sae.threshold.unique() == pytest.approx(f_BN[f_BN > 0].min().item())
    else:
        f_BN = torch.where(pre_BN > sae.threshold.detach(), pre_BN, 0)
    assert torch.allclose(dense(vals_BK, idx_BK, 20), f_BN, atol=1e-14)
    assert torch.equal(dense(active_BK, idx_BK, 20), (f_BN > 0).double())
    f_BN.retain_grad()
    expected = (sae.decode(f_BN) - x_BD).square().sum() + lam * (0 if arch == "jumprelu" else f_BN.sum())
    grads = torch.autograd.grad(expected, weights + [f_BN])
    ours = torch.autograd.grad(loss, weights + ([sae.threshold] if arch == "jumprelu" else []))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours[:4], grads[:4], strict=True))
    if arch == "jumprelu":
        near_BN = ((pre_BN - sae.threshold).abs() < sae.bandwidth / 2).double() / sae.bandwidth
        assert 10 < (near_BN > 0).sum() < 200
        assert torch.allclose(ours[-1], -(near_BN * (sae.threshold * grads[-1] + lam)).sum(0), atol=1e-10)


def test_learned_threshold_counts_as_a_step_in_l0():
    """On average over the batch the pseudo-gradient of L0 is the slope of the true L0, wherever the kernel is narrow."""
    torch.manual_seed(0)
    sae, x_BD = SAE(4, 6, 2, "jumprelu").double(), torch.randn(200_000, 4, dtype=torch.float64)
    sae.initialize(x_BD, sgo_sae.geometric_median(x_BD), bandwidth=0.2)
    (grad_N,) = torch.autograd.grad(sae.sparse(x_BD)[2].sum(1).mean(), sae.threshold)
    pre_BN, h = (x_BD - sae.b_dec) @ sae.W_enc, 0.05
    slope_N = ((pre_BN > sae.threshold + h).double().mean(0) - (pre_BN > sae.threshold - h).double().mean(0)) / (2 * h)
    assert torch.allclose(grad_N, slope_N, rtol=0.1)


@pytest.mark.parametrize("arch", ["relu", "jumprelu"])
def test_sparsity_is_steered_to_k(tmp_path, arch):
    def train(steps, **settings):
        cfg = sgo_sae.Config(arch=arch, dict=96, k=5, lr=3e-3, alpha=0.0, out=str(tmp_path), **settings)
        run, l0 = sgo_sae.Run(cfg, 32, torch.device("cpu")), []
        true_ND = F.normalize(torch.randn(48, 32), dim=1)
        for step in range(steps):
            f_BN = torch.rand(512, 48) * (torch.rand(512, 48) < 3 / 48)
            x_BD = f_BN @ true_ND * 5
            if step == 0:
                run.start(x_BD, sgo_sae.geometric_median(x_BD))
            run.step(x_BD, step, steps)
            l0.append(run.part["l0"].item())
        return run, sum(l0[-50:]) / 50

    for sparsity in (0.001, 1.0):
        assert train(700, sparsity=sparsity)[1] == pytest.approx(5, rel=0.05)
    run, _ = train(20, fixed_sparsity=True)
    assert run.lam == pytest.approx(0.04)


@pytest.mark.parametrize("arch", ARCHS)
def test_penalty_of_a_step_is_that_of_its_codes(arch):
    torch.manual_seed(0)
    sae, x_BD = SAE(16, 64, 4, arch), torch.randn(128, 16)
    sae.initialize(x_BD, sgo_sae.geometric_median(x_BD))
    part = sgo_sae.training_step(sae, sgo_sae.optimizer(sae, 0.0), x_BD, sgo_sae.Config(arch=arch, dict=64, k=4), 0.5, 0.0, 0.1)
    f_BN = dense(part["vals_BK"], part["idx_BK"], 64)
    terms = (x_BD - sae.decode(f_BN)).square().sum(1).mean() + 0.5 * sgo_penalty_reference(f_BN)
    terms = terms + 0.1 * ((f_BN > 0).float() if arch == "jumprelu" else f_BN).sum(1).mean()
    assert part["loss"].item() == pytest.approx(terms.item(), rel=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_encode_takes_any_leading_shape(arch):
    sae, x = SAE(6, 20, 4, arch), torch.randn(2, 3, 5, 6)
    assert sae.encode(x).shape == (2, 3, 5, 20) and sae(x).shape == x.shape
    assert torch.allclose(sae.encode(x)[1, 2, 4], sae.encode(x[1, 2, 4]), atol=1e-6)
    assert torch.allclose(sae.decode(sae.encode(x)), sae(x), atol=1e-6)


def test_decoder_constraint():
    torch.manual_seed(0)
    sae = SAE(16, 64, 4)
    adam = sgo_sae.optimizer(sae, 1e-2)
    cfg = sgo_sae.Config(dict=64, k=4)
    for _ in range(5):
        sgo_sae.training_step(sae, adam, torch.randn(128, 16), cfg, 0.05, 1e-2, 0.04)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
        sae.zero_grad()
        (sae(torch.randn(128, 16)) ** 2).sum().backward()
        before_N = (sae.W_dec.grad * sae.W_dec).sum(1)
        sae.project_decoder_gradient()
        along_N = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert before_N.abs().max() > 1 and along_N.abs().max() < 1e-5 * before_N.abs().max()


def test_schedules_at_their_corners():
    assert sgo_sae.alpha_at(0) == pytest.approx(0.01)
    assert sgo_sae.alpha_at(999) == pytest.approx(0.01 + 0.065 * 0.999)
    assert sgo_sae.alpha_at(1000) == sgo_sae.alpha_at(4881) == pytest.approx(0.075)
    assert sgo_sae.alpha_at(0, alpha=0) == sgo_sae.alpha_at(500, alpha=0) == 0
    assert sgo_sae.lr_at(0) == sgo_sae.lr_at(4270) == sgo_sae.lr_at(4271) == pytest.approx(3e-4)
    assert sgo_sae.lr_at(4272) == pytest.approx(3e-4 * 610 / 611)
    assert sgo_sae.lr_at(4881) == pytest.approx(3e-4 / 611)


def test_defaults_are_the_papers_run_4():
    (cfg,) = sgo_sae.parse_args([])
    assert (cfg.dict, cfg.k, cfg.alpha, cfg.sparsity, cfg.lr) == (18432, 320, 0.075, 0.04, 3e-4)
    steps = cfg.tokens // cfg.batch
    assert steps == 4882 and int(cfg.decay_start * steps) == 4271


def test_geometric_median_meets_its_optimality_condition():
    torch.manual_seed(0)
    x_BD = torch.randn(501, 8, dtype=torch.float64).exp()
    median_D = sgo_sae.geometric_median(x_BD, iterations=1000, tol=1e-12)
    assert F.normalize(x_BD - median_D, dim=1).sum(0).norm() < 1e-6  # the unit vectors to the points cancel
    assert torch.equal(sgo_sae.geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(), torch.zeros(1))


def test_alpha_zero_is_a_separate_plain_topk_step():
    torch.manual_seed(0)
    x_BD = torch.randn(256, 16) * 3
    sae = SAE(16, 64, 4)
    plain = SAE(16, 64, 4)
    plain.load_state_dict(sae.state_dict())
    ours = sgo_sae.optimizer(sae, 1e-3)
    theirs = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in range(10):
        sgo_sae.training_step(sae, ours, x_BD, sgo_sae.Config(dict=64, k=4, alpha=0.0), 0.0, 1e-3, 0.04)
        f_BN = plain_topk(plain, x_BD)
        loss = (x_BD - plain.decode(f_BN)).square().sum(1).mean() + 0.04 * f_BN.sum(1).mean()
        theirs.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_ND, g_ND = plain.W_dec, plain.W_dec.grad
            g_ND -= (g_ND * W_ND).sum(1, keepdim=True) * W_ND
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            theirs.step()
            W_ND /= W_ND.norm(dim=1, keepdim=True)
    for a, b in zip(sae.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_planted_features_are_recovered():
    torch.manual_seed(0)
    D, N, active = 32, 48, 3
    true_ND = F.normalize(torch.randn(N, D), dim=1)
    sae = SAE(D, 2 * N, active)
    cfg = sgo_sae.Config(dict=2 * N, k=active)
    adam = sgo_sae.optimizer(sae, 3e-3)
    for step in range(1000):
        slots_BK = torch.rand(1024, N).topk(active, dim=1).indices
        f_BN = torch.zeros(1024, N).scatter(1, slots_BK, torch.rand(1024, active) + 0.5)
        alpha = sgo_sae.alpha_at(step, 0.075, warmup=300)
        sgo_sae.training_step(sae, adam, f_BN @ true_ND, cfg, alpha, sgo_sae.lr_at(step, 3e-3, 800, 1000), 0.0)
    matched_N = (true_ND @ sae.W_dec.T).amax(1)
    assert (matched_N > 0.9).float().mean() > 0.95


def test_penalty_lowers_competition_in_training():
    shares = {}
    for alpha in (0.0, 0.5):
        torch.manual_seed(0)
        sae, cfg = SAE(16, 64, 8), sgo_sae.Config(dict=64, k=8)
        adam = sgo_sae.optimizer(sae, 3e-3)
        for _ in range(200):
            x_BD = torch.randn(512, 16) * 2
            sgo_sae.training_step(sae, adam, x_BD, cfg, alpha, 3e-3, 0.04)
        shares[alpha] = sgo_penalty_reference(sae.encode(x_BD).detach()).item()
    assert shares[0.5] < 0.8 * shares[0.0]


def test_method_needs_torch_alone(tmp_path):
    program = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'numpy', 'tqdm', 'safetensors', 'tokenizers'): sys.modules[name] = None\n"
        "import torch, sgo_sae\n"
        "sae = sgo_sae.SAE(8, 32, 4)\n"
        "vals, idx, _ = sae.sparse(torch.randn(64, 8))\n"
        "sgo_sae.sgo_penalty(vals, idx, 32).backward()\n"
        "assert sae.W_enc.grad.abs().sum() > 0\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_method_section_stands_alone():
    """The method part, copied with the imports of torch alone, runs."""
    source = SCRIPT.read_text()
    section = re.search(r"# -+ method\n(.*?)# -+ activations\n", source, re.S).group(1)
    names = {}
    exec("import torch\nimport torch.distributed as dist\nimport torch.nn.functional as F\nfrom torch import nn\n"
         "from torch.autograd.function import once_differentiable\n" + section, names)  # fmt: skip
    vals_BK, idx_BK, _ = names["SAE"](8, 32, 4).sparse(torch.randn(64, 8))
    assert names["sgo_penalty"](vals_BK, idx_BK, 32) > 0


# ------------------------------------------------------------------------------------------- activations


TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps near a warm stone by the river . "


def make_model(folder, bos=True, layers=4, vocab=80):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    names = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>") if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=64,
    )).eval()  # fmt: skip
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
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT * (i % 3 + 1)}"}) + "\n" for i in range(60)))
    return str(path)


def flags(language_model, texts, out, **other):
    settings = dict(model=language_model[0], dataset=texts, layer=1, dict=64, k=4, batch=64, tokens=64 * 12, ctx=16, buffer=16,
                    lm_batch=4, log_every=5, out=out, device="cpu") | other  # fmt: skip
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def loaded(model, layer):
    cfg = sgo_sae.Config(model=model[0], layer=layer)
    return sgo_sae.load_lm(cfg, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hook_reads_the_hidden_states_of_the_full_model(model, layer):
    _, full, tokenizer = model
    ids_BL = torch.randint(3, len(tokenizer), (3, 20))
    lm, module = loaded(model, layer)
    assert len(lm.layers) == layer + 1 and not hasattr(lm, "lm_head")
    with torch.inference_mode():
        x_BLD = sgo_sae.hooked(lm, module, ids_BL)
        assert torch.equal(x_BLD, full(ids_BL, output_hidden_states=True).hidden_states[layer + 1])
        assert torch.equal(x_BLD, sgo_sae.hooked(full, full.model.layers[layer], ids_BL))
    assert not module._forward_hooks


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_architectures_load(tmp_path, kind):
    import transformers

    sizes = dict(vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "gpt2":
        full = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, **sizes))
    else:
        config = transformers.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, **sizes)
        full = transformers.BertForMaskedLM(config)
    full.eval().save_pretrained(tmp_path)
    lm, module = sgo_sae.load_lm(sgo_sae.Config(model=str(tmp_path), layer=1), torch.device("cpu"), torch.float32)
    ids_BL = torch.randint(3, 40, (2, 9))
    with torch.inference_mode():
        expected = full(ids_BL, output_hidden_states=True).hidden_states[2]
        assert torch.equal(sgo_sae.hooked(lm, module, ids_BL), expected)


def test_packing_loses_and_repeats_no_token(model):
    _, _, tokenizer = model
    documents = [f"{TEXT[: 7 * i]} {i}" for i in range(1, 30)]
    contexts = list(sgo_sae.token_contexts(iter([documents[:10], documents[10:11], documents[11:]]), tokenizer, 12))
    assert all(len(c) == 12 and c[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in c[1:] for c in contexts)
    stream = [i for c in contexts for i in c[1:]]
    whole = [i for d in documents for i in tokenizer(d, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]]
    assert stream == whole[: len(stream)] and len(whole) - len(stream) < 11


def test_packing_without_bos(tmp_path):
    _, tokenizer = make_model(tmp_path, bos=False)
    contexts = list(sgo_sae.token_contexts(iter([[TEXT] * 4]), tokenizer, 8))
    assert sum(contexts, []) == (tokenizer(TEXT)["input_ids"] * 4)[: 8 * len(contexts)]


def test_special_tokens_never_reach_the_autoencoder(model):
    """A text that spells special tokens gives ordinary ones, and positions of BOS and EOS are left out."""
    cfg = sgo_sae.Config(model=model[0], layer=1)
    _, tokenizer = sgo_sae.load_tokenizer(cfg)
    special = sgo_sae.special_ids(tokenizer)
    contexts = list(sgo_sae.token_contexts(iter([["a <bos> b <eos><pad> c"] * 20]), tokenizer, 8))
    inner = [i for c in contexts for i in c[1:]]
    assert tokenizer.bos_token_id not in inner and tokenizer.pad_token_id not in inner
    lm, module = loaded(model, 1)
    rows = torch.cat(list(sgo_sae.activations(lm, module, iter(contexts), special, dict(left=10**6), lm_batch=3)))
    with torch.inference_mode():
        x_BLD = sgo_sae.hooked(lm, module, torch.tensor(contexts))
    kept = [x_BLD[i, j] for i, c in enumerate(contexts) for j, token in enumerate(c) if token not in special]
    assert torch.allclose(rows, torch.stack(kept), atol=1e-5) and len(rows) < 7 * len(contexts)


@pytest.mark.parametrize("chunk, capacity, batch", [(7, 40, 8), (64, 40, 16), (5, 16, 16), (300, 100, 7)])
def test_buffer_delivers_each_activation_exactly_once(chunk, capacity, batch):
    rows_ND = torch.arange(500.0)[:, None].expand(-1, 3)
    buffer = sgo_sae.ShuffleBuffer(rows_ND.split(chunk), capacity, 3, "cpu", torch.float32, seed=0)
    served, sizes = [], []
    while len(x_BD := buffer.batch(batch)):
        served += x_BD[:, 0].tolist()
        sizes.append(len(x_BD))
    assert sorted(served) == list(range(500)) and served != sorted(served)
    assert set(sizes[:-1]) <= {batch}


FORMATS = {
    "txt": lambda rows: "\n\n".join(rows),
    "jsonl": lambda rows: "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows),
    "json": lambda rows: json.dumps([{"text": row, "n": 1} for row in rows]),
    "csv": lambda rows: "text,n\n" + "".join(f'"{row}",1\n' for row in rows),
}


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst", "txt.gz", "folder"])
def test_local_texts_are_read(tmp_path, form):
    rows = [f"document {i}: {TEXT}" for i in range(30)]
    kind, _, packed = form.partition(".")
    path = tmp_path / f"texts.{form}"
    if form == "folder":
        path = tmp_path / "texts"
        path.mkdir()
        (path / "a.jsonl").write_text(FORMATS["jsonl"](rows[:15]))
        (path / "b.jsonl").write_text(FORMATS["jsonl"](rows[15:]))
    elif form == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        import zstandard

        compress = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[packed]
        path.write_bytes(compress(FORMATS[kind](rows).encode()))
    stream = sgo_sae.load_texts(sgo_sae.Config(dataset=str(path)))
    batches = sgo_sae.text_batches(stream, "text", dict(epoch=0, row=0), rows=8)
    read = []
    while len(read) < 60:
        read += next(batches)
    assert sorted(t.strip() for t in read[:30]) == sorted(t.strip() for t in rows)
    assert sorted(read[30:60]) == sorted(read[:30]) and read[30:60] != read[:30]  # second pass: all again, reshuffled


def test_odd_documents_are_passed_over(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["", None, "  ", "good one", None, "another"]))
    stream = sgo_sae.load_texts(sgo_sae.Config(dataset=str(path)))
    assert sorted(next(sgo_sae.text_batches(stream, "text", dict(epoch=0, row=0)))) == ["another", "good one"]


# ---------------------------------------------------------------------------------------------- training


def test_run_is_complete_and_repeatable(model, texts, tmp_path, capsys):
    weights = []
    for name in ("a", "b"):
        assert sgo_sae.main(flags(model, texts, tmp_path / name)) == 0
        weights.append((tmp_path / name / "sae_weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    captured = capsys.readouterr()
    for word in ("EV", "MSE", "L0", "dead", "max w", "αΩ/rec", "768 tokens, 12 steps", "saved in"):
        assert word in captured.out
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    keys = {"reconstruction", "l1", "omega", "penalty_share", "explained_variance", "cosine", "l0", "dead",
            "mean_max_w", "lr", "alpha", "lambda", "tokens", "tokens_per_s", "memory_gb"}  # fmt: skip
    assert keys <= set(lines[0]) and all(math.isfinite(v) for line in lines for v in line.values())
    assert lines[-1]["alpha"] == pytest.approx(sgo_sae.alpha_at(11))
    assert lines[0]["penalty_share"] == pytest.approx(lines[0]["alpha"] * lines[0]["omega"] / lines[0]["reconstruction"])
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["settings"][0]["k"] == 4 and settings["versions"]["torch"].startswith("2.13.0")


@pytest.mark.parametrize("option", [["--penalty", "mean"], ["--penalty", "decoder"], ["--normalize"], ["--alpha", "0"],
                                    ["--dtype", "bfloat16"]])  # fmt: skip
def test_options_train(model, texts, tmp_path, option):
    assert sgo_sae.main(flags(model, texts, tmp_path / "run") + option) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["omega"] == 0) == (option == ["--alpha", "0"])


def test_starting_over_is_said_once(model, texts, tmp_path, capsys):
    assert sgo_sae.main(flags(model, texts, tmp_path / "run", tokens=64 * 200)) == 0
    assert capsys.readouterr().err.count("starting over") == 1


def random_sae(arch):
    """An autoencoder with biases and thresholds of all kinds, on 8 dimensions."""
    torch.manual_seed(0)
    sae = SAE(8, 32, 4, arch)
    sae.b_dec.data.normal_(), sae.b_enc.data.normal_()
    if arch in ("batchtopk", "jumprelu"):
        sae.threshold.data.uniform_(0.1, 2)
    return sae, torch.randn(100, 8)


@pytest.mark.parametrize("arch", ARCHS)
def test_normalize_folds_back_into_the_saved_weights(tmp_path, arch):
    (sae, x_BD), scale = random_sae(arch), 0.37
    sgo_sae.save_sae(sae, sgo_sae.Config(), tmp_path, scale)
    folded = sgo_sae.load_sae(tmp_path)
    assert torch.allclose(folded(x_BD), sae(x_BD * scale) / scale, atol=1e-5)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)


@pytest.mark.parametrize("arch, name", list(zip(ARCHS, ["topk", "jumprelu", "standard", "jumprelu"])))
def test_saved_and_loaded_outputs_are_identical(tmp_path, arch, name):
    sae, x_BD = random_sae(arch)
    sgo_sae.save_sae(sae, sgo_sae.Config(k=4), tmp_path)
    again = sgo_sae.load_sae(tmp_path)
    assert torch.equal(again(x_BD), sae(x_BD)) and torch.equal(again.encode(x_BD), sae.encode(x_BD))
    assert again.cfg.architecture == name and again.cfg.hook_name == "blocks.12.hook_resid_post"
    from safetensors import safe_open

    with safe_open(tmp_path / "sae_weights.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    threshold = {"threshold": [32]} if name == "jumprelu" else {}
    assert shapes == {"W_enc": [8, 32], "b_enc": [32], "W_dec": [32, 8], "b_dec": [8]} | threshold


@pytest.mark.parametrize("arch", ARCHS)
def test_saelens_loads_the_folder(tmp_path, arch):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    sae, x_BD = random_sae(arch)
    sgo_sae.save_sae(sae, sgo_sae.Config(k=4), tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert torch.allclose(theirs.encode(x_BD), sae.encode(x_BD), atol=1e-4)
    assert torch.allclose(theirs(x_BD), sae(x_BD), atol=1e-4)


def test_loaded_autoencoder_has_the_interface_of_saebench(tmp_path):
    """The attributes that SAEBench's evaluations and its custom SAEs' base class read."""
    sgo_sae.save_sae(random_sae("topk")[0], sgo_sae.Config(k=4, layer=5, ctx=64), tmp_path)
    sae = sgo_sae.load_sae(tmp_path).to(dtype=torch.bfloat16)
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert sae.W_enc.shape == (8, 32) and sae.W_dec.shape == (32, 8) and sae.b_enc.shape == (32,) and sae.b_dec.shape == (8,)
    cfg = sae.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("google/gemma-2-2b", "blocks.5.hook_resid_post", 5)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.context_size, cfg.prepend_bos) == (8, 32, "float32", 64, True)
    assert cfg.model_from_pretrained_kwargs == {} and cfg.hook_head_index is None
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "topk"
    x_BLD = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(sae(x_BLD), sae.decode(sae.encode(x_BLD)))


# ------------------------------------------------------------------------------- grids and many processes


def weights_of(folder):
    return (Path(folder) / "sae_weights.safetensors").read_bytes()


def test_grid_trains_each_as_if_alone(model, texts, tmp_path, monkeypatch, capsys):
    passes, real = [], sgo_sae.hooked
    monkeypatch.setattr(sgo_sae, "hooked", lambda *args: passes.append(1) or real(*args))
    grid = ["--arch", "topk", "relu", "--alpha", "0", "0.05", "--dict", "64", "32", "--seed", "0", "1"]
    assert sgo_sae.main(flags(model, texts, tmp_path / "grid") + grid) == 0
    in_grid, folders = len(passes), sorted(p.name for p in (tmp_path / "grid").iterdir() if p.is_dir())
    assert len(folders) == 16 and "relu-n32-a0.05-s1" in folders
    table = capsys.readouterr().out
    assert all(name in table for name in folders)
    for arch, n, alpha, seed in (("topk", 64, 0, 0), ("relu", 32, 0.05, 1)):
        passes.clear()
        out = tmp_path / f"{arch}{n}"
        assert sgo_sae.main(flags(model, texts, out, dict=n, arch=arch, alpha=alpha, seed=seed)) == 0
        assert weights_of(out) == weights_of(tmp_path / "grid" / f"{arch}-n{n}-a{alpha:g}-s{seed}")
        assert len(passes) == in_grid


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWO_PROCESSES = """
import sys, torch, sgo_sae
import torch.distributed as dist
torch.set_num_threads(1)
sgo_sae.CROSSOVER["cpu"] = float(sys.argv[1])
sgo_sae.tile_rows = lambda d_sae, device: 20  # five tiles, so that both processes have some
sgo_sae.penalty_gradient_tiled.__defaults__ = (20,)
dist.init_process_group("gloo")
rank, world = sgo_sae.ranks()
steps, weights = 6, []
batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) * 3 for i in range(steps)]
for penalty in ("sum", "decoder"):
    for arch in ("topk", "batchtopk", "relu", "jumprelu"):
        cfg = sgo_sae.Config(arch=arch, dict=96, k=4, lr=1e-2, batch=64, penalty=penalty, alpha_start=0.05, out=sys.argv[2])
        for together in (True, False):
            if not together:
                sgo_sae.ranks = lambda: (0, 1)
            share = batches if not together else [x.chunk(world)[rank] for x in batches]
            run = sgo_sae.Run(cfg, 16, torch.device("cpu"))
            run.start(batches[0], sgo_sae.geometric_median(batches[0]))
            for step, x_BD in enumerate(share):
                run.step(x_BD, step, steps)
            run.measure(x_BD, steps, 1.0)
            weights.append(run.sae.state_dict() | {k: torch.tensor(v) for k, v in run.metrics.items() if k not in
                           ("tokens_per_s", "memory_gb")})
        sgo_sae.ranks = lambda: (rank, world)
        ours, alone = weights[-2:]
        difference = max(((ours[n] - alone[n]).abs() / (1 + alone[n].abs())).max().item() for n in alone)
        if rank == 0:
            print(penalty, arch, difference, flush=True)
"""


@pytest.mark.parametrize("crossover", [0, 1e9])
def test_two_processes_train_as_one_does(tmp_path, crossover):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    result = subprocess.run([*TORCHRUN, tmp_path / "two.py", str(crossover), tmp_path], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    differences = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(differences) == 8 and max(differences) < 1e-5, result.stdout


def test_torchrun_trains_and_the_first_process_alone_writes(model, texts, tmp_path):
    result = subprocess.run([*TORCHRUN, SCRIPT, *flags(model, texts, tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("saved in") == 1 and result.stdout.count("buffer") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert torch.isfinite(sgo_sae.load_sae(tmp_path / "run").W_dec).all()


def test_processes_read_documents_of_their_own(texts, monkeypatch):
    read = []
    for rank in (0, 1):
        monkeypatch.setattr(sgo_sae, "ranks", lambda rank=rank: (rank, 2))
        read.append([row["text"] for row in sgo_sae.load_texts(sgo_sae.Config(dataset=texts))])
    assert len(read[0]) == len(read[1]) == 30 and not set(read[0]) & set(read[1])


# ------------------------------------------------------------------------------------------------ errors


def refused(argv, capsys):
    """The one line with which a command line is refused."""
    assert sgo_sae.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sgo_sae.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize("bad, words", [
    ("--k 65", "65 is more than the 64 latents"),
    ("--k 0", "--k must be at least 1"),
    ("--dict 0", "--dict must be at least 1"),
    ("--alpha -0.1", "--alpha must be 0 or more"),
    ("--alpha nan", "--alpha must be 0 or more"),
    ("--alpha inf", "--alpha must be 0 or more"),
    ("--alpha x", "invalid float value: 'x'"),
    ("--lr -1", "--lr must be 0 or more"),
    ("--sparsity nan", "--sparsity must be 0 or more"),
    ("--decay-start 2", "--decay-start is a share"),
    ("--ctx 1", "--ctx must be at least 2"),
    ("--tokens 10", "less than one batch"),
    ("--log-every 0", "--log-every must be at least 1"),
    ("--penalty max", "invalid choice"),
    ("--nonsense 1", "unrecognized arguments"),
    ("--device cuda:7", "--device cuda:7"),
    ("--device toaster", "--device toaster"),
    ("--layer 4", "the layers of"),
    ("--layer -1", "--layer must be 0 or more"),
    ("--text-column body", "the columns of"),
    ("--split test", "train"),
    ("--model /nowhere/at/all", "/nowhere/at/all"),
    ("--dataset /nowhere/at/all.jsonl", "/nowhere/at/all.jsonl"),
])  # fmt: skip
def test_bad_settings_are_refused_in_one_line(model, texts, tmp_path, capsys, monkeypatch, bad, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in refused(flags(model, texts, tmp_path / "run") + bad.split(), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, content, words", [
    ("empty.jsonl", b"", "empty.jsonl"),
    ("empty.txt", b"", "holds no text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text', "can't be loaded"),
    ("broken.jsonl.gz", b"this is not gzip", "can't be loaded"),
    ("broken.parquet", b"PAR1 but not really", "can't be loaded"),
    ("blank.jsonl", b'{"text": ""}\n{"text": null}\n', "holds no text"),
    ("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n', "holds no text"),
    ("picture.png", b"\x89PNG", "is needed"),
])  # fmt: skip
def test_bad_files_are_refused_in_one_line(model, tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    line = refused(flags(model, str(tmp_path / name), tmp_path / "run"), capsys)
    assert words in line and name in line
    assert not (tmp_path / "run" / "sae_weights.safetensors").exists()


def test_bad_models_are_refused_in_one_line(model, texts, tmp_path, capsys):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((Path(model[0]) / file).read_bytes())
        return refused(flags((tmp_path / name,), texts, tmp_path / "run"), capsys)

    assert "nothing" in folder("nothing")
    assert "no-tokenizer" in folder("no-tokenizer", "config.json", "model.safetensors")
    assert "no-weights" in folder("no-weights", "config.json", "tokenizer.json", "tokenizer_config.json")
    other = tmp_path / "other"
    make_model(other, layers=1)
    (other / "config.json").write_text((Path(model[0]) / "config.json").read_text())
    assert "lack" in refused(flags((other,), texts, tmp_path / "run"), capsys)
    make_model(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    assert "tokens in the tokenizer, 50 in the model" in refused(flags((tmp_path / "small",), texts, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_finished_run_is_not_overwritten(model, texts, tmp_path, capsys):
    assert sgo_sae.main(flags(model, texts, tmp_path / "run")) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert "already holds a finished run" in refused(flags(model, texts, tmp_path / "run"), capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_non_finite_loss_names_step_and_last_good_state(model, texts, tmp_path, capsys, monkeypatch):
    real, calls = sgo_sae.training_step, []

    def poisoned(sae, adam, x_BD, *rest):
        calls.append({name: p.detach().clone() for name, p in sae.named_parameters()})
        return real(sae, adam, x_BD * (float("nan") if len(calls) == 4 else 1), *rest)

    monkeypatch.setattr(sgo_sae, "training_step", poisoned)
    assert sgo_sae.main(flags(model, texts, tmp_path / "run")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "not finite at step 3" in message and str(tmp_path / "run" / "last_good") in message
    good = sgo_sae.load_sae(tmp_path / "run" / "last_good")
    assert all(torch.equal(p, calls[3][name]) for name, p in good.named_parameters())
    assert not (tmp_path / "run" / "sae_weights.safetensors").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub on this machine that answers every request as the real one answers for a gated or missing repository."""

    def answer(self):
        gated = "gated" in self.path
        body = b'{"error": "no"}'
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this resource is restricted." if gated else "Repository not found")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def command(argv, **environment):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | environment)  # fmt: skip


@pytest.mark.parametrize("settings, words", [
    (dict(model="some/gated-model"), "accept its licence at https://huggingface.co/some/gated-model"),
    (dict(model="some/missing-model"), "neither a local path nor a public repository"),
    (dict(dataset="some/missing-data"), "neither a local path nor a public repository"),
])  # fmt: skip
def test_what_the_hub_refuses_is_explained(model, texts, tmp_path, hub, settings, words):
    result = command(flags(model, texts, tmp_path / "run", **settings), HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "run").exists()


def test_no_network_is_explained(model, texts, tmp_path):
    def run(settings):  # the Hub's libraries try again for half a minute: both cases at once
        return command(flags(model, texts, tmp_path / "run", **settings), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, [dict(model="some/model"), dict(dataset="some/data")]):
            assert result.returncode == 2 and "can't be reached" in result.stderr, result.stderr
            assert "--demo" in result.stderr and len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------- interruption, faults, bad input

with warnings.catch_warnings():  # one file, so nowhere to register a mark
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow


def metrics_of(folder):
    """Lines of metrics.jsonl without what depends on the clock and the process."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb")} for line in lines]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal during a step of the next run."""
    real, calls = sgo_sae.training_step, []

    def step_and_signal(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(sgo_sae, "training_step", step_and_signal)


LONG = dict(tokens=64 * 400, save_every=7)  # the data is used more than twice


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert sgo_sae.main(flags(model, texts, out, **LONG)) == 0
    return out


@pytest.mark.parametrize("steps, number", [([1], signal.SIGTERM), ([113], signal.SIGINT), ([140, 7, 1, 200], signal.SIGTERM)])
def test_stopped_and_resumed_is_the_run_that_never_stopped(model, texts, tmp_path, monkeypatch, capsys, whole, steps, number):
    argv = flags(model, texts, tmp_path / "run", **LONG)
    for n, step in enumerate(steps):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            assert sgo_sae.main(argv + ["--resume"] * (n > 0)) == 128 + number
        assert f"stopped after step {sum(steps[: n + 1])}; this continues it" in capsys.readouterr().err
        assert not (tmp_path / "run" / "sae_weights.safetensors").exists()
    assert "add --resume to continue it" in refused(argv, capsys)
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole) and metrics_of(tmp_path / "run") == metrics_of(whole)
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("options", [["--arch", *ARCHS, "--seed", "0", "1"], ["--normalize"], ["--penalty", "decoder", "--dtype", "bfloat16"]])
def test_grids_and_options_resume_exactly(model, texts, tmp_path, monkeypatch, options):
    argv = [flags(model, texts, tmp_path / name, tokens=64 * 40) + options for name in "ab"]
    assert sgo_sae.main(argv[0]) == 0
    stop_at(monkeypatch, 8 * len(list((tmp_path / "a").glob("*/cfg.json"))) or 9)
    assert sgo_sae.main(argv[1]) == 143
    assert sgo_sae.main([*argv[1], "--resume"]) == 0
    results = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("sae_weights.safetensors")]
    assert results and all(weights_of((tmp_path / "a" / p).parent) == weights_of((tmp_path / "b" / p).parent) for p in results)


def test_the_printed_command_resumes(model, texts, tmp_path, whole):
    argv = flags(model, texts, tmp_path / "run", **LONG | dict(tokens=64 * 20_000))
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopping after this step" in err
    printed = err.splitlines()[-1]
    assert printed.startswith("python ") and printed.endswith(" --resume")
    again = subprocess.Popen([sys.executable, *shlex.split(printed)[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("resume  after step" in line for line in again.stdout)
    again.kill()
    again.communicate()


@slow
def test_two_processes_are_stopped_and_resumed(model, texts, tmp_path):
    argv = {name: flags(model, texts, tmp_path / name, **LONG | dict(tokens=64 * 400)) for name in "ab"}
    result = subprocess.run([*TORCHRUN, SCRIPT, *argv["a"]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    process = subprocess.Popen([*TORCHRUN, SCRIPT, *argv["b"]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "b" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert "stopped after step" in process.communicate(timeout=60)[1]
    assert subprocess.run([*TORCHRUN, SCRIPT, *argv["b"], "--resume"], capture_output=True).returncode == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") and metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


def test_resume_without_a_checkpoint_starts(model, texts, tmp_path, whole):
    assert sgo_sae.main([*flags(model, texts, tmp_path / "run", **LONG), "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_resume_of_another_run_is_refused_by_name(model, texts, tmp_path, monkeypatch, capsys):
    argv = flags(model, texts, tmp_path / "run")
    stop_at(monkeypatch, 3)
    assert sgo_sae.main(argv) == 143
    capsys.readouterr()
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    line = refused([*argv, "--resume", "--lr", "0.01", "--alpha", "0.2", "--log-every", "1"], capsys)
    assert line.endswith("another value of --alpha, --lr")
    for content in (b"", kept[: len(kept) // 2], b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.", pickle.dumps({"settings": Path("x")}, protocol=2)):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt can't be loaded" in refused([*argv, "--resume"], capsys)
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
        if kills < 22 and kill_at is None and (written() != last or random.random() < 0.001):
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
def test_killed_at_any_moment_resumes_to_the_same_weights(model, texts, tmp_path):
    settings = dict(tokens=64 * 1500, save_every=3)
    assert sgo_sae.main(flags(model, texts, tmp_path / "whole", **settings)) == 0
    argv = [tmp_path / "run" / "checkpoint.pt", *flags(model, texts, tmp_path / "run", **settings), "--resume"]
    result = subprocess.run([sys.executable, "-c", KILL, *map(str, argv)], cwd=HERE, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 20
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("checkpoint*"))


class Faulty:
    """A stream of numbered documents whose reads fail where `fails` says so."""

    def __init__(self, fails):
        self.fails = fails

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(200):
            if self.fails(self.epoch, i):
                raise ConnectionError(f"no answer at document {i}")
            yield {"text": f"epoch {self.epoch} document {i}"}


def test_failed_reads_are_tried_again_without_loss_or_repeat(monkeypatch, capsys):
    waits, failures = [], {(0, 70): 3, (0, 150): 5, (1, 10): 1}
    monkeypatch.setattr(sgo_sae.time, "sleep", waits.append)

    def fails(*place):
        failures[place] = failures.get(place, 0) - 1
        return failures[place] >= 0

    at = dict(epoch=0, row=0)
    batches, read = sgo_sae.text_batches(Faulty(fails), "text", at), []
    while len(read) < 400:
        read += next(batches)
    assert read == [f"epoch {e} document {i}" for e in (0, 1) for i in range(200)]
    assert waits == [1, 4, 16, 1, 4, 16, 64, 256, 1]
    assert "no answer at document 70" in capsys.readouterr().err


def test_reads_that_keep_failing_end_with_a_checkpoint(model, texts, tmp_path, monkeypatch, capsys, whole):
    """The run that ends so is continued, when reading works again, to the same weights."""
    real, broken = sgo_sae.load_texts, [True]
    monkeypatch.setattr(sgo_sae.time, "sleep", lambda seconds: None)

    class Breaks:
        def __init__(self, stream):
            self.stream = stream

        def set_epoch(self, epoch):
            self.epoch = epoch
            self.stream.set_epoch(epoch)

        def __iter__(self):
            for i, row in enumerate(self.stream):
                if broken and (self.epoch, i) == (1, 47):
                    raise OSError("connection reset")
                yield row

    monkeypatch.setattr(sgo_sae, "load_texts", lambda cfg: Breaks(real(cfg)))
    argv = flags(model, texts, tmp_path / "run", **LONG)
    assert sgo_sae.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == "sgo_sae.py: error: reading the data failed 6 times: connection reset"
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    broken.clear()
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


@pytest.mark.parametrize("failure", ["continue", "stop"])
def test_full_disk_keeps_the_checkpoint_before(model, texts, tmp_path, whole, failure):
    """A limit on the size of files stands for the full disk: writes end in the middle, with an OSError."""
    argv = flags(model, texts, tmp_path / "run", **LONG, save_failure=failure)
    program = """
import resource, sys, sgo_sae
real, calls = sgo_sae.torch.save, []
def save(*args):
    calls.append(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if len(calls) in (2, 3) else -1, -1))
    try:
        real(*args)
        args[1].flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
sgo_sae.torch.save = save
sys.exit(sgo_sae.main(sys.argv[1:]))
"""
    result = subprocess.run([sys.executable, "-c", program, *map(str, argv)], cwd=HERE, capture_output=True, text=True)
    assert "checkpoint of step 14 can't be written, the one before it stays: [Errno 27] File too large" in result.stderr
    assert not (tmp_path / "run" / "checkpoint.pt.part").exists()
    if failure == "stop":
        assert result.returncode == 2
        assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 7
        assert sgo_sae.main([*map(str, argv), "--resume"]) == 0
    else:
        assert result.returncode == 0 and result.stderr.count("can't be written") == 2
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_result_that_cannot_be_written_leaves_the_checkpoint(model, texts, tmp_path, monkeypatch, capsys, whole):
    argv, real = flags(model, texts, tmp_path / "run", **LONG), sgo_sae.save_sae
    monkeypatch.setattr(sgo_sae, "save_sae", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert sgo_sae.main(argv) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(sgo_sae, "save_sae", real)
    assert sgo_sae.main([*argv, "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_out_of_memory_names_the_size_and_the_flags(model, texts, tmp_path, capsys):
    line = refused(flags(model, texts, tmp_path / "run", batch=10**12, tokens=10**12), capsys)
    assert "out of memory when 64000000000000 bytes were asked for" in line and "--batch" in line and "--buffer" in line


def test_activations_that_are_not_finite_are_left_out_and_counted(model, texts, tmp_path, monkeypatch, capsys):
    real, calls = sgo_sae.hooked, []

    def poisoned(*args):
        x_BLD = real(*args).clone()
        calls.append(1)
        if len(calls) in bad:
            x_BLD[0, 3:5, 0] = float("inf")
        return x_BLD

    monkeypatch.setattr(sgo_sae, "hooked", poisoned)
    bad = {2, 5}
    assert sgo_sae.main(flags(model, texts, tmp_path / "run")) == 0
    assert capsys.readouterr().err.count("2 of its 60 are not finite") == 2
    calls.clear()
    bad = range(3, 1000)
    assert sgo_sae.main(flags(model, texts, tmp_path / "other")) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("11 batches of activations were not finite; try --dtype float32")


def test_two_runs_into_one_folder_are_refused(model, texts, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    held = sgo_sae.lock(tmp_path / "run")
    assert "is in use" in refused(flags(model, texts, tmp_path / "run"), capsys)
    held.close()
    assert sgo_sae.main(flags(model, texts, tmp_path / "run")) == 0


@slow
@pytest.mark.parametrize("content", [
    json.dumps({"text": "word " * 2_000_000}).encode() + b"\n",
    b'{"text": "\xff\xfe broken \xc3"}\n' * 400,
    json.dumps({"text": "<bos><eos><pad> <bos>"}).encode() + b"\n" + b'{"text": null}\n{"text": ""}\n{"text": "x"}\n' * 50,
    b"\xff\n\n" * 400,
])  # fmt: skip
def test_odd_documents_train(model, tmp_path, content):
    path = tmp_path / ("odd.jsonl" if content.startswith(b"{") else "odd.txt")
    path.write_bytes(content)
    assert sgo_sae.main(flags(model, str(path), tmp_path / "run")) == 0


def bad_flag(rng):
    """A flag with a value that can't be meant."""
    numbers = [f.name for f in dataclasses.fields(sgo_sae.Config) if isinstance(f.default, (int, float)) and f.default is not True
               and f.default is not False]  # fmt: skip
    name = "--" + rng.choice(numbers).replace("_", "-")
    junk = "".join(rng.choice(string.ascii_letters + "äß€\U0001f600.,;:/") for _ in range(rng.randint(1, 12)))
    return rng.choice([
        [name, rng.choice(["nan", "-inf", "-1", "-7.5", "1e400x", "", " ", "0x10", "--", "1,5", "1_", "None"]) or junk],
        [name, junk], [name], ["--" + junk, "1"], [junk],
        ["--" + rng.choice(["arch", "penalty", "dtype", "save-failure"]), junk],
        ["--device", junk], ["--layer", str(rng.randint(4, 10**6))], ["--k", str(rng.randint(65, 10**9))],
        ["--alpha", "0.1", "0.1"], ["--seed", "1", "1"], ["--arch", "topk", junk], ["--tokens", str(rng.randint(-100, 63))],
    ])  # fmt: skip


def test_300_bad_command_lines_are_refused_in_one_line(model, texts, tmp_path, capsys):
    rng = random.Random(0)
    for _ in range(300):
        bad = bad_flag(rng)
        assert sgo_sae.main(flags(model, texts, tmp_path / "run") + bad) == 2, bad
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("sgo_sae.py: error: "), (bad, lines)
    assert not (tmp_path / "run").exists()


def damaged(rng, folder):
    """Damages the autoencoder in `folder` in a random way that no loader may let pass."""
    from safetensors.torch import load_file, save_file

    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    cfg, tensors = json.loads(config.read_text()), load_file(weights)
    name = rng.choice(list(tensors))
    kind = rng.randrange(8)
    if kind == 0:
        config.write_bytes(config.read_bytes()[: rng.randrange(config.stat().st_size - 2)])
    elif kind == 1:
        cfg[rng.choice(["architecture", "k"])] = rng.choice([None, "topkk", -1, 0, 33, 4.5, [4], {}, "4"])
        config.write_text(json.dumps(cfg))
    elif kind == 2:
        config.write_text(rng.choice(["[]", "null", "1", '"topk"', "{}", '{"architecture": "topk"', "\x00"]))
    elif kind == 3:
        weights.write_bytes(weights.read_bytes()[: rng.randrange(weights.stat().st_size)])
    elif kind == 4:
        start = rng.randrange(8)
        weights.write_bytes(weights.read_bytes()[:start] + rng.randbytes(8 - start) + rng.randbytes(rng.randrange(2000)))
    elif kind == 5:
        save_file({n: t for n, t in tensors.items() if n != name}, weights)
    elif kind == 6:
        save_file(tensors | {rng.choice(["W_skip", "extra", "threshold"]): torch.zeros(3)}, weights)
    else:
        shape = rng.choice([(3,), (0,), (8, 33), (2, 2, 2), ()])
        save_file(tensors | {name: torch.zeros(shape)}, weights)
    return kind


def test_200_damaged_autoencoders_are_refused_in_one_line(model, tmp_path, capsys):
    rng = random.Random(0)
    for n in range(200):
        folder = tmp_path / str(n)
        sgo_sae.save_sae(SAE(8, 32, 4), sgo_sae.Config(model=model[0]), folder)
        kind = damaged(rng, folder)
        assert eval_sae.main([str(folder)]) == 2, (n, kind)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("eval_sae.py: error: ") and str(folder) in lines[0], (n, kind, lines)


def test_50_damaged_data_files_are_refused_in_one_line(model, tmp_path, capsys):
    rng = random.Random(0)
    for n in range(50):
        kind = rng.choice(["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst", "csv.gz"])
        path = tmp_path / f"{n}.{kind}"
        path.write_bytes(rng.choice([b"", b"{", b"PAR1", b"\x1f\x8b\x08", b"\n\n"]) + rng.randbytes(rng.randrange(300)))
        assert str(path) in refused(flags(model, str(path), tmp_path / "run"), capsys)


@slow
def test_memory_is_flat(tmp_path):
    """Resident memory of a run of the demo's sizes after 200 and after 2,000 steps."""
    documents = [text for _, text in sgo_sae.library_texts()][:300]
    sgo_sae.train_demo_lm(documents, documents[:20], tmp_path / "lm", steps=1)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    settings = sgo_sae.DEMO | dict(model=tmp_path / "lm", dataset=tmp_path / "texts.jsonl", tokens=2048 * 2060, log_every=100,
                                   save_every=100, out=tmp_path / "run")  # fmt: skip
    argv = [str(part) for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics, resident = tmp_path / "run" / "metrics.jsonl", {}
    while process.poll() is None:
        steps = 100 * metrics.read_text().count("\n") if metrics.exists() else 0
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        resident.setdefault(steps, []).append(pages)
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    middle = {steps: statistics.median(pages) for steps, pages in resident.items()}  # harvesting takes 60 MB for a moment
    assert middle[2000] == pytest.approx(middle[200], rel=0.05), middle


# -------------------------------------------------------------------------------------------- evaluation


def planted_sae(W_dec_ND, W_enc_DN=None, k=None):
    """An autoencoder with a given dictionary, whose encoder reads each direction's coefficient."""
    N, D = W_dec_ND.shape
    sae = SAE(D, N, k or N)
    sae.W_dec.data = W_dec_ND.clone()
    sae.W_enc.data = (W_dec_ND.T if W_enc_DN is None else W_enc_DN).clone()
    return sae


def test_reconstruction_of_constructed_cases():
    x_TD = torch.randn(500, 8)
    perfect = planted_sae(torch.cat([torch.eye(8), -torch.eye(8)]))  # x = Σ relu(±x_i) ±e_i
    figures = eval_sae.reconstruction(perfect, x_TD)
    assert figures["explained_variance"] == pytest.approx(1, abs=1e-10) and figures["cosine"] == pytest.approx(1)
    assert figures["l0"] == 8 and figures["l1"] == pytest.approx(x_TD.abs().sum(1).mean().item(), rel=1e-5)
    assert figures["norm_ratio"] == pytest.approx(1) and figures["never_fire"] == 0 and figures["dense"] == 1
    half = planted_sae(torch.cat([torch.eye(8)[:4], -torch.eye(8)[:4]]))  # the first 4 of 8 dimensions
    figures = eval_sae.reconstruction(half, x_TD, ctx=65)
    error = x_TD[:, 4:].double().square().sum().item()
    assert figures["mse"] == pytest.approx(error / 4000, rel=1e-6)
    assert figures["mse_benchmark"] == pytest.approx(error / 500 / (16 * 64), rel=1e-6)
    assert figures["cosine"] == pytest.approx((x_TD[:, :4].norm(dim=1) / x_TD.norm(dim=1)).mean().item(), rel=1e-5)
    variance = (x_TD.double() - x_TD.double().mean(0)).square().sum().item()
    assert figures["explained_variance"] == pytest.approx(1 - error / variance, rel=1e-6)
    assert figures["reconstruction_bias"] == pytest.approx(1, rel=1e-6)  # a projection has ‖x̂‖² = ⟨x, x̂⟩


def test_reconstruction_does_not_depend_on_batch_size():
    torch.manual_seed(0)
    sae, x_TD = SAE(8, 32, 4), torch.randn(300, 8)
    whole, parts = (eval_sae.reconstruction(sae, x_TD, chunk=c) for c in (300, 7))
    assert all(whole[key] == pytest.approx(parts[key], rel=1e-6) for key in whole)


def test_cross_entropy_and_kl_by_hand():
    logits_BLV = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3] * 3]]))
    ids_BL = torch.tensor([[0, 1, 2]])  # predicts 1 with 0.25, then 2 with 0.1
    assert eval_sae.next_token_loss(logits_BLV, ids_BL) == pytest.approx(-math.log(0.25) - math.log(0.1))
    uniform = torch.zeros(1, 3, 3)
    expected = sum(p * math.log(p * 3) for p in (0.5, 0.25, 0.25, 0.1, 0.8, 0.1))
    assert eval_sae.kl(logits_BLV, uniform) == pytest.approx(expected, rel=1e-5)


class Exact(torch.nn.Module):
    def forward(self, x):
        return x


class Zero(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_splicing_the_exact_activation_changes_nothing_and_zeroing_is_the_ablation(model):
    _, full, tokenizer = model
    ids_TL = torch.randint(3, len(tokenizer), (5, 12))
    ids_TL[:, 0] = tokenizer.bos_token_id
    layer = full.model.layers[1]
    with torch.inference_mode():
        clean = full(ids_TL).logits
        assert torch.equal(eval_sae.spliced_logits(full, layer, ids_TL, lambda x: x), clean)
        exact, zero = eval_sae.behaviour(full, layer, [Exact(), Zero()], ids_TL, sgo_sae.special_ids(tokenizer))
        by_hand = F.cross_entropy(clean[:, :-1].flatten(0, 1), ids_TL[:, 1:].flatten()).item()
        handle = layer.register_forward_hook(lambda m, a, x: torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1))
        zeroed = full(ids_TL).logits
        handle.remove()
    assert exact["ce_clean"] == exact["ce_sae"] == pytest.approx(by_hand, rel=1e-5)
    assert exact["ce_score"] == 1 and exact["kl_score"] == pytest.approx(1) and exact["kl_sae"] == pytest.approx(0, abs=1e-6)
    ablated = F.cross_entropy(zeroed[:, :-1].flatten(0, 1), ids_TL[:, 1:].flatten()).item()
    assert zero["ce_sae"] == zero["ce_zero"] == pytest.approx(ablated, rel=1e-5)
    assert zero["ce_score"] == 0 and zero["kl_score"] == 0


@pytest.mark.parametrize("separable", [True, False])
def test_logistic_regression_meets_its_optimality_conditions(separable):
    torch.manual_seed(0)
    x_PTS = torch.randn(3, 200, 5, dtype=torch.float64) * torch.tensor([0.01, 1, 1, 30, 5]) + 3
    y_PT = x_PTS[:, :, 1] + x_PTS[:, :, 2] + (0 if separable else 2 * torch.randn(3, 200)) > 6
    weight_PT = (torch.rand(3, 200) > 0.2).double()
    w_PS, b_P = eval_sae.logistic_regression(x_PTS, y_PT, weight_PT, C=0.7)
    residual_PT = weight_PT * (torch.sigmoid((x_PTS @ w_PS[:, :, None])[..., 0] + b_P[:, None]) - y_PT.double())
    assert (w_PS + 0.7 * (residual_PT[:, None] @ x_PTS)[:, 0]).abs().max() < 1e-4
    assert residual_PT.sum(1).abs().max() < 1e-4
    right = eval_sae.accuracy(x_PTS, y_PT, weight_PT, w_PS, b_P)
    assert right > 0.97 if separable else 0.6 < right < 0.95
    shared = eval_sae.logistic_regression(x_PTS[0], y_PT[:1], weight_PT[:1], C=0.7)
    assert torch.allclose(shared[0][0], w_PS[0], atol=1e-5)


def test_probing_finds_the_planted_latent():
    torch.manual_seed(0)
    labels = torch.arange(900) % 3
    f_TN = torch.rand(900, 40)
    for c in range(3):
        f_TN[:, 7 * c] = (labels == c) + 0.1 * torch.rand(900)
    f_TN[:, 30] *= 3  # large, and tells nothing
    found = eval_sae.sparse_probing(f_TN[::2], labels[::2], f_TN[1::2], labels[1::2], ks=(1, 2), train=200, test=200)
    assert found[1] == found[2] == 1 and found["all"] > 0.99
    noise = eval_sae.sparse_probing(torch.rand(450, 40), labels[::2], torch.rand(450, 40), labels[1::2], train=200, test=200)
    assert all(abs(v - 0.5) < 0.15 for v in noise.values())


def planted_attributes(T=1200):
    """Activations in which one direction carries attribute a, weakly, and another attribute b, strongly."""
    torch.manual_seed(0)
    a_T, b_T = torch.arange(T) % 2, torch.arange(T) // 2 % 2
    f_TN = torch.rand(T, 8) * 0.05
    f_TN[:, 0] += a_T
    f_TN[:, 1] += 10.0 * b_T
    return f_TN, a_T, b_T


def test_scr_of_a_planted_dictionary():
    f_TN, a_T, b_T = planted_attributes()
    W_ND = torch.eye(8)
    x_TD = f_TN @ W_ND
    halves = [slice(0, 600), slice(600, 1200)]
    (xa, fa, aa, ba), (xb, fb, ab, bb) = ((x_TD[h], f_TN[h], a_T[h], b_T[h]) for h in halves)
    probes = eval_sae.scr_probes(xa, aa, ba, xb, ab, bb)
    assert probes["a"][2] == 1
    assert eval_sae.probe_accuracy(xb, ab, *probes["biased"][:2]) < 0.9  # it took b for a
    one = eval_sae.scr(probes, fa, aa, ba, xb, fb, ab, bb, W_ND, counts=(1,))
    assert one[1] == pytest.approx(1, abs=0.02)
    nothing = eval_sae.scr(probes, fa, aa, ba, xb, fb, ab, bb, torch.zeros(8, 8), counts=(1, 2))
    assert nothing == {1: 0, 2: 0}


def test_absorption_of_planted_words():
    direction_D = F.one_hot(torch.tensor(0), 6).float()
    W_ND = torch.eye(6)
    W_ND[3] = F.normalize(torch.tensor([0.6, 0, 0, 0.8, 0, 0]), dim=0)  # an absorber, cosine 0.6 with the letter
    f_TN = torch.tensor([[2.0, 0, 0, 0, 0, 0],     # the letter's latent carries all of it
                         [0, 0, 0, 2.5, 0, 0],     # absorbed: 1.5 of 1.5 by latent 3
                         [0.5, 0, 0, 2.5, 0, 0],   # 0.5 by the letter, 1.5 by latent 3
                         [1.6, 0, 0, 0.5, 0, 0]])  # latent 3 carries 0.3 of 1.9: under 40 %
    share_T, full_T = eval_sae.absorbed_share(f_TN, f_TN @ W_ND, W_ND, direction_D, torch.tensor([0]))
    assert torch.allclose(share_T, torch.tensor([0, 1, 0.75, 0]))
    assert full_T.tolist() == [False, True, False, False]


@pytest.mark.parametrize("absorbing", [False, True])
def test_absorption_from_planted_letters_to_the_mean(absorbing):
    torch.manual_seed(0)
    letters, words = torch.arange(26).repeat(200), torch.arange(5200) // 26
    W_ND = torch.eye(60)[:53]
    f_TN = torch.zeros(5200, 53)
    f_TN[torch.arange(5200), letters] = 4 + torch.rand(5200)
    f_TN[torch.arange(5200), 26 + torch.randint(26, (5200,))] = 0.5
    W_ND[52] = F.normalize(torch.eye(60)[0] + torch.eye(60)[58], dim=0)
    taken = (letters == 0) & (words % 25 == 0)
    if absorbing:  # of one A word in 25, too few to split the letter, latent 52 takes the letter over
        f_TN[taken] = 0
        f_TN[taken, 52] = 6
    x_TD, decode = f_TN @ W_ND, torch.linalg.pinv(W_ND)
    sae = SAE(60, 53, 53)
    sae.W_dec.data = W_ND
    sae.encode = lambda x: (x @ decode).clamp(min=0)
    test = words >= 150
    probe = (20 * torch.eye(60)[:26], torch.full((26,), -20.0))
    found = eval_sae.absorption(sae, x_TD[~test], letters[~test], x_TD[test], letters[test], probe)
    share = 2 / 50 / 26 if absorbing else 0
    assert found["full_absorption"] == pytest.approx(share, abs=1e-6)
    assert found["absorption"] == pytest.approx(share, abs=1e-6)


def test_absorption_refuses_a_model_that_cannot_spell():
    x_TD, y_T = torch.randn(200, 6), torch.randint(26, (200,))
    with pytest.raises(InputError, match="spells .* of 26 letters, 20 are needed"):
        eval_sae.absorption(SAE(6, 20, 4), x_TD, y_T, x_TD, y_T, eval_sae.multi_probe(x_TD, F.one_hot(y_T, 26), epochs=2))


def test_competition_is_that_of_the_definitions():
    torch.manual_seed(0)
    sae, x_TD = SAE(8, 32, 4), torch.randn(256, 8)
    figures = eval_sae.competition(sae, x_TD, alpha=0.1)
    f_BN = sae.encode(x_TD).detach()
    w_NN = coactivation_weights(f_BN).fill_diagonal_(0)
    assert figures["w_mean"] == pytest.approx(w_NN[w_NN > 0].mean().item(), rel=1e-5)
    assert figures["pairs_over_half"] == (w_NN.triu(1) > 0.5).sum().item()
    assert figures["mean_max_w"] == pytest.approx(w_NN.amax(1)[f_BN.any(0)].mean().item(), rel=1e-5)
    cosine_NN = F.cosine_similarity(sae.W_dec[:, None], sae.W_dec, dim=2).abs().fill_diagonal_(0)
    assert figures["mean_max_cos"] == pytest.approx(cosine_NN.amax(1).mean().item(), rel=1e-5)
    error = (x_TD - sae(x_TD)).square().sum(1).mean()
    assert figures["penalty_share"] == pytest.approx((0.1 * sgo_penalty_reference(f_BN) / error).item(), rel=1e-5)


def test_mean_latents_do_not_depend_on_batch_size_or_padding(model):
    _, full, tokenizer = model
    lm, module = loaded(model, 1)
    sae, texts = SAE(16, 64, 4), [TEXT[: 5 + 3 * i] for i in range(20)]
    read = torch.inference_mode()(lambda ids_BL: sgo_sae.hooked(lm, module, ids_BL))
    one, many = (eval_sae.mean_latents(read, tokenizer, [sae], texts, 12, "cpu", batch=b) for b in (1, 8))
    assert torch.allclose(one[0], many[0], atol=1e-4) and torch.allclose(one[1][0], many[1][0], atol=1e-3)
    ids = [tokenizer.bos_token_id] + tokenizer(texts[3])["input_ids"][:11]
    alone = read(torch.tensor([ids]))[0, 1:]
    assert torch.allclose(one[0][3], alone.mean(0), atol=1e-4)


@pytest.fixture(scope="session")
def run(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert sgo_sae.main(flags(model, texts, folder / f"s{seed}", seed=seed)) == 0
    return folder


@pytest.fixture(scope="session")
def probe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "words.csv"
    rows = [f"{w} {i} {v},{w},{v}" for i in range(400) for w in ("fox", "dog") for v in ("warm", "lazy")]
    path.write_text("text,label,attribute\n" + "\n".join(rows) + "\n")
    return str(path)


def test_evaluation_prints_a_table_and_is_repeatable(run, texts, probe_file, capsys):
    argv = [str(run / "s0"), str(run / "s1"), "--text", texts, "--probe", probe_file, "--contexts", "40", "--paper",
            "--train", "400", "--test", "200", "--words", "200"]  # fmt: skip
    assert eval_sae.main(argv) == 0
    first = capsys.readouterr().out
    assert eval_sae.main(argv) == 0
    assert capsys.readouterr().out == first
    rows = first.splitlines()
    assert "2 seeds" in rows[0] and "as reported" in rows[0]
    for label in ("MSE per element ↓", "CE score ↑", "mean max w_ij ↓", "probing, 1 latent ↑", "SCR, 2 latents ↑"):
        assert any(row.startswith(label) for row in rows), label
    assert any("±" in row for row in rows)
    assert any(row.startswith("absorption: not measured, the model spells") for row in rows)
    content = json.loads((run / "s0" / "eval.json").read_text())
    assert content["core"]["l0"] == pytest.approx(4, abs=0.2) and content["settings"]["k"] == 4
    assert content["samples"]["tokens"] > 0 and content["versions"]["torch"]
    assert eval_sae.main([*argv, "--markdown", "--metrics", "core"]) == 0
    assert all(row.startswith("|") and row.endswith("|") for row in capsys.readouterr().out.splitlines())


def test_table_means_and_deviations_are_over_seeds_alone():
    runs = [dict(settings=dict(alpha=a, dict=8, seed=s, out=str(s)), notes=[], core=dict(mse=m))
            for a, s, m in ((0.0, 0, 1.0), (0.0, 1, 3.0), (0.1, 0, 9.0))]  # fmt: skip
    rows = eval_sae.table(["a", "b", "c"], runs).splitlines()
    assert rows[1].split() == ["MSE", "per", "element", "↓", "1.000", "3.000", "9.000", "2.000", "±", "1.414"]


def test_gemma_scope_file_is_read(tmp_path):
    import numpy

    torch.manual_seed(0)
    shapes = dict(W_enc=(8, 32), b_enc=(32,), W_dec=(32, 8), b_dec=(8,), threshold=(32,))
    arrays = {name: torch.randn(shape).numpy() for name, shape in shapes.items()}
    arrays["threshold"] = abs(arrays["threshold"])
    numpy.savez(tmp_path / "params.npz", **arrays)
    sae, x_BD = sgo_sae.load_sae(tmp_path / "params.npz"), torch.randn(50, 8)
    p = {name: torch.from_numpy(a) for name, a in arrays.items()}
    pre_BN = x_BD @ p["W_enc"] + p["b_enc"]
    f_BN = pre_BN.relu() * (pre_BN > p["threshold"])
    assert torch.allclose(sae.encode(x_BD), f_BN, atol=1e-4)
    assert torch.allclose(sae(x_BD), f_BN @ p["W_dec"] + p["b_dec"], atol=1e-3)


@pytest.mark.parametrize("argv, words", [
    (["/nowhere"], "holds no trained autoencoder"),
    (["RUN", "--metrics", "core,beauty"], "the families are"),
    (["RUN", "--model", "/nowhere"], "/nowhere"),
    (["RUN", "--layer", "9"], "are 0 to 3"),
    (["RUN"], "give --text"),
    (["RUN", "--text", "TEXTS", "--probe", "TEXTS"], "lacks the column label; its columns are text"),
    (["RUN", "--text", "TEXTS", "--probe", "FEW"], "texts, 20 are needed"),
    (["NARROW", "--layer", "1", "--text", "TEXTS", "--model", "MODEL"], "is for 8 dimensions"),
    (["RUN", "--contexts", "0"], "--contexts must be at least 1"),
])  # fmt: skip
def test_bad_evaluations_are_refused_in_one_line(model, run, texts, tmp_path, capsys, argv, words):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"{t}{i}", "label": t}) + "\n" for t in "ab" for i in range(4)))
    sgo_sae.save_sae(SAE(8, 32, 4), sgo_sae.Config(), tmp_path / "narrow")
    names = {"RUN": run / "s0", "TEXTS": texts, "FEW": tmp_path / "few.jsonl", "NARROW": tmp_path / "narrow", "MODEL": model[0]}
    assert eval_sae.main([str(names.get(a, a)) for a in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and lines[-1].startswith("eval_sae.py: error: "), lines


def test_library_tasks_keep_documents_apart():
    pieces = list(eval_sae.library_pieces())
    assert {p["kind"] for p in pieces} == {"window", "docstring", "comment", "body", "prose"}
    tasks, spurious = eval_sae.library_tasks(600, 400, seed=0)
    assert len(tasks) == 8 and len(spurious) == 2
    for task in tasks + spurious:
        assert len(task.texts) == len(task.labels) == len(task.test) and 200 < task.test.sum() <= 400, task.name
    cells = spurious[0].labels * 2 + spurious[0].attribute
    assert all(torch.bincount(cells[part]).unique().numel() == 1 for part in (spurious[0].test, ~spurious[0].test))


# ----------------------------------------------------------------------------------------- demo and files


def test_demo_flags_override_the_demo():
    (cfg,) = sgo_sae.parse_args(["--demo", "--k", "8"])
    assert cfg.k == 8 and cfg.dict == sgo_sae.DEMO["dict"] and cfg.layer == sgo_sae.DEMO["layer"]


def test_demo_texts_are_split_by_document():
    names = [name for name, _ in sgo_sae.library_texts()]
    assert len(names) == len(set(names)) > 500 and "argparse.py" in names and any(n.startswith("help/") for n in names)


def test_demo_language_model_learns(tmp_path, capsys):
    documents = [TEXT * 30 for _ in range(20)]
    sgo_sae.train_demo_lm(documents, documents[:2], tmp_path, steps=40, batch=4)
    bits = float(re.search(r"([\d.]+) bits per byte", capsys.readouterr().out).group(1))
    assert bits < 1  # a text that repeats itself; a model that learned nothing needs about 4
    cfg = sgo_sae.Config(model=str(tmp_path), layer=1)
    assert sgo_sae.load_tokenizer(cfg)[0].hidden_size == 128
    assert len(loaded((tmp_path,), 1)[0].layers) == 2


def test_benchmark_prints_a_table_and_json(capsys):
    shape = ["--bench", "--dict", "256", "--k", "8", "--batch", "64", "--width", "16"]
    assert sgo_sae.main(shape) == 0
    assert "step with the penalty" in capsys.readouterr().out
    assert sgo_sae.main([*shape, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dict"] == 256
    for kind in ("gaussian", "skewed"):
        figures = {name: both[kind] for name, both in found.items() if isinstance(both, dict)}
        step = figures["step with the penalty, ms"]
        assert step > 0 and figures["tokens per second"] == pytest.approx(64_000 / step) and figures["peak memory, GB"] > 0
        assert figures["encoder product"] > 0 and figures["penalty and its gradient"] > 0


def test_help_shows_every_setting_with_its_default():
    text = " ".join(command(["--help"]).stdout.split())
    for field in dataclasses.fields(sgo_sae.Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default: 18432)" in text and "(default: 0.075)" in text


@pytest.mark.parametrize("script", sorted(p.name for p in HERE.glob("*_sae.py") if not p.name.startswith("test_")))
def test_script_metadata_equal_requirements(script):
    block = re.search(r"# dependencies = (\[.*?\])", (HERE / script).read_text(), re.S).group(1)
    inline = ast.literal_eval(re.sub(r"^#", "", block, flags=re.M))
    required = [line for line in (HERE / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert inline == required and "torch==2.13.0" in required
