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
"""Evaluate sparse autoencoders as SAEBench defines it: reconstruction, model behaviour, probing, SCR, absorption.

    python eval_sae.py RUN [RUN ...]               a table, a column per run; eval.json in each run's folder
    python eval_sae.py RUN --metrics core,probe    only some of the families
    python eval_sae.py --help                      every setting

A RUN is a folder that sgo_sae.py or SAELens wrote, or a Gemma Scope params.npz, on disk or on the Hub. Shapes are in
the names as in sgo_sae.py, and T texts, S selected latents, P probes.
"""

import ast
import dataclasses
import json
import math
import random
import re
import sys
import zlib
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sgo_sae
from sgo_sae import InputError

FAMILIES = ("core", "behaviour", "competition", "probe", "scr", "absorption")
KS = (1, 2, 5, 20)  # latents a sparse probe may use
ABLATED = (2, 5, 10, 20, 50, 100, 500)  # latents that SCR ablates
BENCHMARK_CONTEXTS = 16  # contexts in the benchmark's batch, by whose tokens its "mse" is divided


# ------------------------------------------------------------------------------- reconstruction, behaviour


@torch.no_grad()
def reconstruction(sae, x_TD, ctx=128, chunk=2048):
    """How well x̂ stands for x over all tokens (T, D); `mse` is per element, `mse_benchmark` is SAEBench's figure.

    SAEBench divides a token's squared error by the tokens of its evaluation batch, 16 contexts less their BOS.
    """
    mean_D = x_TD.double().mean(0)
    total = dict.fromkeys(("error", "variance", "cosine", "l0", "l1", "ratio", "xhat2", "dot"), 0.0)
    fired_N = torch.zeros(len(sae.b_enc), dtype=torch.long, device=x_TD.device)
    for x_BD in x_TD.split(chunk):
        x_BD = x_BD.float()
        f_BN = sae.encode(x_BD)
        xhat_BD = sae.decode(f_BN).double()
        x_BD = x_BD.double()
        active_BN = f_BN > 0
        fired_N += active_BN.sum(0)
        total["error"] += (x_BD - xhat_BD).square().sum().item()
        total["variance"] += (x_BD - mean_D).square().sum().item()
        total["cosine"] += F.cosine_similarity(x_BD, xhat_BD, dim=1).sum().item()
        total["l0"] += active_BN.sum().item()
        total["l1"] += f_BN.double().sum().item()
        total["ratio"] += (xhat_BD.norm(dim=1) / x_BD.norm(dim=1)).sum().item()
        total["xhat2"] += xhat_BD.square().sum().item()
        total["dot"] += (x_BD * xhat_BD).sum().item()
    T, D = x_TD.shape
    return {
        "mse": total["error"] / (T * D),
        "mse_benchmark": total["error"] / T / (BENCHMARK_CONTEXTS * (ctx - 1)),
        "cosine": total["cosine"] / T,
        "explained_variance": 1 - total["error"] / total["variance"],
        "l0": total["l0"] / T,
        "l1": total["l1"] / T,
        "norm_ratio": total["ratio"] / T,
        "reconstruction_bias": total["xhat2"] / total["dot"],
        "never_fire": (fired_N == 0).float().mean().item(),
        "dense": (fired_N > 0.1 * T).float().mean().item(),
    }


def spliced_logits(lm, layer, ids_BL, replace=None):
    """Logits (B, L, V) of the language model where `replace` maps the layer's output (B, L, D) to another."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    handle = layer.register_forward_hook(hook) if replace else None
    try:
        return lm(input_ids=ids_BL).logits.float()
    finally:
        if handle:
            handle.remove()


def next_token_loss(logits_BLV, ids_BL):
    """Cross-entropy summed over the predicted tokens."""
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum").item()


def kl(clean_BLV, patched_BLV):
    """KL(clean ‖ patched), summed over positions."""
    clean = clean_BLV.log_softmax(-1)
    return (clean.exp() * (clean - patched_BLV.log_softmax(-1))).sum().item()


@torch.no_grad()
def behaviour(lm, layer, saes, ids_TL, special, bar=None):
    """Cross-entropy and KL with each autoencoder's x̂ in place of x, beside clean and zeroed; a dict per autoencoder.

    Positions of special tokens keep their activations.
    """
    special = torch.tensor(special, device=ids_TL.device)
    sums = torch.zeros(len(saes) + 2, 2, dtype=torch.float64)  # CE, KL of: clean, zero, each SAE
    rows = max(1, 2**23 // (ids_TL.shape[1] * lm.config.get_text_config().vocab_size))
    for ids_BL in ids_TL.split(rows):
        keep_BL1 = ~torch.isin(ids_BL, special)[..., None]
        clean = spliced_logits(lm, layer, ids_BL)
        replacements = [lambda x: x, torch.zeros_like] + [lambda x, s=s: s(x.float()).to(x.dtype) for s in saes]
        for i, replacement in enumerate(replacements):
            logits = clean
            if i > 0:
                logits = spliced_logits(lm, layer, ids_BL, lambda x: torch.where(keep_BL1, replacement(x), x))
            sums[i, 0] += next_token_loss(logits, ids_BL)
            sums[i, 1] += kl(clean, logits)
        if bar:
            bar.update(len(ids_BL))
    ce = (sums[:, 0] / ids_TL[:, 1:].numel()).tolist()
    divergence = (sums[:, 1] / ids_TL.numel()).tolist()
    return [
        {
            "ce_clean": ce[0],
            "ce_sae": ce[i],
            "ce_zero": ce[1],
            "ce_score": (ce[1] - ce[i]) / (ce[1] - ce[0]),
            "kl_sae": divergence[i],
            "kl_zero": divergence[1],
            "kl_score": (divergence[1] - divergence[i]) / divergence[1],
        }
        for i in range(2, len(ce))
    ]


@torch.no_grad()
def competition(sae, x_TD, alpha=None, batch=2048):
    """Feature competition in batches as in training: w_ij of co-active pairs, decoder cosines, αΩ over reconstruction."""
    N = len(sae.b_enc)
    found = {name: [] for name in ("w_mean", "mean_max_w", "pairs_over_half", "penalty_share")}
    for x_BD in x_TD.split(batch):
        if len(x_BD) < batch and found["w_mean"]:
            break
        x_BD = x_BD.float()
        f_BN = sae.encode(x_BD)
        vals_BK, idx_BK = f_BN.topk(int((f_BN > 0).sum(1).max()), dim=1)
        weight = pairs = over = 0.0
        for lo, hi, _, pair_EK, w_EK in sgo_sae.coactive_pairs(vals_BK, idx_BK, N):
            w_C = w_EK.new_zeros((hi - lo) * (N + 1)).scatter_(0, pair_EK.flatten(), w_EK.flatten())
            weight, pairs, over = weight + w_C.sum().item(), pairs + (w_C > 0).sum().item(), over + (w_C > 0.5).sum().item()
        max_N = sgo_sae.max_coactivation(vals_BK, idx_BK, N)
        found["w_mean"].append(weight / max(1, pairs))
        found["mean_max_w"].append(max_N[max_N > 0].mean().item())
        found["pairs_over_half"].append(over / 2)
        omega = sgo_sae.sgo_penalty(vals_BK, idx_BK, N).item()
        found["penalty_share"].append(omega * (alpha or 0) / (x_BD - sae.decode(f_BN)).square().sum(1).mean().item())
    result = {name: sum(values) / len(values) for name, values in found.items()}
    if alpha is None:
        del result["penalty_share"]
    W_ND = F.normalize(sae.W_dec, dim=1)
    cosine_N = torch.cat([
        (W_ND[rows] @ W_ND.T).abs().scatter_(1, rows[:, None], 0).amax(1) for rows in torch.arange(N, device=W_ND.device).split(1024)
    ])  # fmt: skip
    return result | {"mean_max_cos": cosine_N.mean().item()}


# ------------------------------------------------------------------------------------------------ probing


def logistic_regression(x_PTS, y_PT, weight_PT=None, C=1.0, tol=1e-6):
    """L2 logistic regression at its optimum, as scikit-learn defines it, for P probes at once: w (P, S), b (P,).

    Minimises ½‖w‖² + C Σ_t weight_t log(1 + exp(-±(w·x_t + b))), the intercept unpenalised; float64.
    x may be (T, S), shared by all probes. L-BFGS works on centred columns scaled to a curvature near 1.
    """
    x = x_PTS.double()
    x = x if x.dim() == 3 else x[None]
    y_PT = y_PT.double()
    weight_PT = torch.ones_like(y_PT) if weight_PT is None else weight_PT.double()
    n_P1 = weight_PT.sum(1, keepdim=True)
    center_PS = torch.einsum("pt,pts->ps", weight_PT, x.expand(len(y_PT), -1, -1)) / n_P1
    second_PS = torch.einsum("pt,pts->ps", weight_PT, (x**2).expand(len(y_PT), -1, -1)) / n_P1
    scale_PS = (1 + C * n_P1 / 4 * (second_PS - center_PS**2).clamp(min=0)).rsqrt()
    v_PS = torch.zeros_like(scale_PS, requires_grad=True)
    b_P = torch.zeros_like(v_PS[:, 0], requires_grad=True)  # intercept, in units that give it a curvature near 1
    unit_P = (C * n_P1[:, 0] / 4).rsqrt()

    def logits():
        w_PS = v_PS * scale_PS
        shift_P = b_P * unit_P - (w_PS * center_PS).sum(1)
        return (x @ w_PS[:, :, None])[..., 0] + shift_P[:, None] if len(x) > 1 else w_PS @ x[0].T + shift_P[:, None]

    lbfgs = torch.optim.LBFGS(
        [v_PS, b_P], max_iter=2000, max_eval=4000, history_size=20, tolerance_grad=tol, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective():
        lbfgs.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(), y_PT, weight=weight_PT, reduction="none").sum()
        value = C * loss + (v_PS * scale_PS).square().sum() / 2
        value.backward()
        return value

    lbfgs.step(objective)
    w_PS = (v_PS * scale_PS).detach()
    return w_PS, (b_P * unit_P).detach() - (w_PS * center_PS).sum(1)


def one_vs_rest(labels, classes, count, generator):
    """Weights (P, T), 0 or 1, that choose for each class up to `count` texts, half of them its own and the other half
    drawn evenly from the other classes; and whether a text is of the class (P, T)."""
    y_PT = torch.stack([labels == c for c in classes])
    chosen_PT = torch.zeros_like(y_PT, dtype=torch.double)
    for p, c in enumerate(classes):
        for other in classes:
            members = (labels == other).nonzero()[:, 0]
            quota = count // 2 if other == c else math.ceil(count / 2 / (len(classes) - 1))
            chosen_PT[p, members[torch.randperm(len(members), generator=generator)[:quota]]] = 1
    return y_PT, chosen_PT


def accuracy(x, y_PT, chosen_PT, w_PS, b_P):
    """Mean over probes of the share of chosen texts on the right side; x is (T, S) or (P, T, S)."""
    logits_PT = (x.double() @ w_PS[:, :, None])[..., 0] if x.dim() == 3 else w_PS @ x.double().T
    right_PT = ((logits_PT + b_P[:, None]) > 0) == y_PT
    return ((right_PT * chosen_PT).sum(1) / chosen_PT.sum(1)).mean().item()


def sparse_probing(f_train, labels_train, f_test, labels_test, ks=KS, train=4000, test=1000, seed=0):
    """Test accuracy, averaged over one-vs-rest classes, of logistic regressions on the k latents (columns of f (T, N))
    with the largest |mean difference| between the classes on the training texts, and on all of them."""
    generator = torch.Generator().manual_seed(seed)
    classes = sorted(set(labels_train.tolist()))
    y_PT, chosen_PT = one_vs_rest(labels_train, classes, train, generator)
    y_PU, chosen_PU = one_vs_rest(labels_test, classes, test, generator)
    if len(classes) == 2:  # one probe tells them apart
        y_PT, chosen_PT, y_PU, chosen_PU = (a[1:] for a in (y_PT, chosen_PT, y_PU, chosen_PU))
    positive_PT, negative_PT = chosen_PT * y_PT, chosen_PT * ~y_PT
    difference_PN = (positive_PT / positive_PT.sum(1, keepdim=True) - negative_PT / negative_PT.sum(1, keepdim=True)) @ f_train.double()
    result = {}
    for k in ks:
        top_PS = difference_PN.abs().topk(min(k, f_train.shape[1]), dim=1).indices
        x_PTS, x_PUS = (f.T[top_PS].transpose(1, 2) for f in (f_train, f_test))
        result[k] = accuracy(x_PUS, y_PU, chosen_PU, *logistic_regression(x_PTS, y_PT, chosen_PT))
    result["all"] = accuracy(f_test, y_PU, chosen_PU, *logistic_regression(f_train, y_PT, chosen_PT))
    return result


# ---------------------------------------------------------------------------------------------------- SCR


def linear_probe(x_TD, y_T, x_UD, y_U, seed=0, epochs=20, batch=16, lr=1e-3, l1=1e-3):
    """SAEBench's SCR probe on mean activations: AdamW, L1 on the weights, the epoch with the best test accuracy.

    Returns weight (D,), bias and that accuracy.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_D = (torch.randn(x_TD.shape[1], generator=generator) / x_TD.shape[1] ** 0.5).requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    adam = torch.optim.AdamW([weight_D, bias], lr=lr)
    best = (-1.0, None, None)
    x_TD, x_UD, y_T = x_TD.float(), x_UD.float(), y_T.float()
    for _ in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).split(batch):
            loss = F.binary_cross_entropy_with_logits(x_TD[rows] @ weight_D + bias, y_T[rows]) + l1 * weight_D.abs().sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        score = probe_accuracy(x_UD, y_U, weight_D, bias)
        if score > best[0]:
            best = (score, weight_D.detach().clone(), bias.detach().clone())
    return best[1], best[2], best[0]


@torch.no_grad()
def probe_accuracy(x_TD, y_T, weight_D, bias):
    return ((x_TD.float() @ weight_D + bias > 0) == y_T.bool()).float().mean().item()


def scr_probes(x_TD, a_T, b_T, x_UD, a_U, b_U, seed=0):
    """The three probes of SCR on mean activations: attribute a, attribute b, and one that saw only texts where a = b."""
    both_T = a_T == b_T
    return {
        "a": linear_probe(x_TD, a_T, x_UD, a_U, seed),
        "b": linear_probe(x_TD, b_T, x_UD, b_U, seed),
        "biased": linear_probe(x_TD[both_T], a_T[both_T], x_UD[a_U == b_U], a_U[a_U == b_U], seed),
    }


@torch.no_grad()
def scr(probes, f_TN, a_T, b_T, x_UD, f_UN, a_U, b_U, W_dec_ND, counts=ABLATED):
    """Spurious correlation removal for each number of ablated latents, {n: score}, 1 where ablation mends the biased probe.

    a, b: two attributes (T,), 0 or 1; f: mean latents of the texts, x: their mean activations; T training, U test texts,
    of which every combination of a and b is equally frequent. Setting latents to 0 with the reconstruction error
    added back takes f_S W_dec_S from each token, and so from the mean.
    """
    weight_D, bias, _ = probes["biased"]
    result, headline = {}, None
    for wanted, unwanted, y_T, y_U, label_U in (("a", "b", b_T, b_U, a_U), ("b", "a", a_T, a_U, b_U)):
        probe_D = probes[unwanted][0]
        difference_N = f_TN[y_T.bool()].mean(0) - f_TN[~y_T.bool()].mean(0)
        effect_N = (difference_N * (W_dec_ND @ probe_D)).abs()
        biased = probe_accuracy(x_UD, label_U, weight_D, bias)
        clean = probes[wanted][2]
        scores = {}
        for count in counts:
            top_S = effect_N.topk(min(count, len(effect_N))).indices
            ablated = probe_accuracy(x_UD - f_UN[:, top_S] @ W_dec_ND[top_S], label_U, weight_D, bias)
            scores[count] = (ablated - biased) / (clean - biased) if clean - biased >= 0.001 else 0.0
        if headline is None or biased < headline:
            headline, result = biased, scores
    return result


# --------------------------------------------------------------------------------------------- absorption


def letter_split(f_train, y_train, f_test, y_test, order_S, gain=0.03):
    """The latents that share a letter: of `order_S`, best first, as long as one more lifts the test F1 by over `gain`."""
    best, split = 0.0, 0
    for k in range(1, len(order_S) + 1):
        x = f_train[:, order_S[:k]]
        balance_1T = torch.where(y_train, len(y_train) / 2 / y_train.sum(), len(y_train) / 2 / (~y_train).sum())[None]
        w_1S, b_1 = logistic_regression(x, y_train[None], balance_1T)
        score = f1(f_test[:, order_S[:k]].double() @ w_1S[0] + b_1 > 0, y_test)
        if k > 1 and score - best <= gain:
            break
        best, split = score, k
    return order_S[:split]


def f1(predicted_T, true_T):
    hits = (predicted_T & true_T).sum().item()
    return 2 * hits / max(1, predicted_T.sum().item() + true_T.sum().item())


@torch.no_grad()
def absorbed_share(f_TN, x_TD, W_dec_ND, direction_D, split_S):
    """Absorption fraction of each word (T,) and whether it is fully absorbed, given the letter's probe direction and
    the latents of its split (Chanin et al. 2024, with SAEBench's thresholds)."""
    direction_D = F.normalize(direction_D, dim=0)
    cosine_N = F.normalize(W_dec_ND, dim=1) @ direction_D
    projection_TN = f_TN * cosine_N
    target_T = x_TD @ direction_D
    main_T = projection_TN[:, split_S].sum(1)
    others_TN = torch.where(cosine_N >= 0.1, projection_TN.clamp(min=0), 0)
    others_TN[:, split_S] = 0
    absorbers_T = others_TN.topk(min(3, others_TN.shape[1]), dim=1).values.sum(1)
    absorbed_T = torch.minimum(absorbers_T, target_T - main_T)
    share_T = torch.where(main_T <= 0, 1.0, absorbed_T / (absorbed_T + main_T)).clamp(0, 1)
    share_T[(main_T >= target_T) | (absorbers_T < 0.4 * target_T)] = 0
    top_T = projection_TN.argmax(1)
    full_T = (f_TN[:, split_S] <= 1e-8).all(1) & (cosine_N[top_T] >= 0.025) & (target_T >= 0)
    full_T &= projection_TN.gather(1, top_T[:, None])[:, 0] >= 0.4 * target_T
    return share_T, full_T


def multi_probe(x_TD, y_TC, l1=0.0, l2=1e-6, epochs=50, batch=4096, lr=0.01, end_lr=1e-5):
    """SAEBench's 26-way probe: Adam with an exponentially falling rate, positives weighted by their rarity; W (C, D), b (C,)."""
    torch.manual_seed(0)
    probe = nn.Linear(x_TD.shape[1], y_TC.shape[1]).to(x_TD.device)
    nn.init.zeros_(probe.weight)  # the problem is convex; few words leave Adam too few steps to forget a random start
    positives_C = y_TC.float().sum(0).clamp(min=1)
    adam = torch.optim.Adam(probe.parameters(), lr=lr, weight_decay=l2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, (end_lr / lr) ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.randperm(len(x_TD)).split(batch):
            logits = probe(x_TD[rows])
            loss = F.binary_cross_entropy_with_logits(logits, y_TC[rows].float(), pos_weight=(len(x_TD) - positives_C) / positives_C)
            loss = loss + l1 * probe.weight.abs().sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
    return probe.weight.detach(), probe.bias.detach()


def absorption(sae, x_train, y_train, x_test, y_test, probe, max_split=10):
    """Mean absorption over the letters that the residual stream spells (F1 > 0.6), {"absorption", "full_absorption"}.

    x (T, D): activations at the words; y (T,): their letters, 0 to 25; probe: multi_probe's on x. Raises InputError
    where fewer than 20 letters are spelled.
    """
    W_CD, b_C = probe
    logits = x_test @ W_CD.T + b_C
    letters = [c for c in range(26) if f1(logits[:, c] > 0, y_test == c) > 0.6]
    if len(letters) < 20:
        raise InputError(f"the model spells {len(letters)} of 26 letters, 20 are needed")
    with torch.no_grad():
        f_train, f_test = (torch.cat([sae.encode(x) for x in part.split(512)]) for part in (x_train, x_test))
    sparse_CN, _ = multi_probe(f_train, F.one_hot(y_train, 26), l1=0.01)
    shares, fulls = [], []
    for c in letters:
        split_S = letter_split(f_train, y_train == c, f_test, y_test == c, sparse_CN[c].topk(max_split).indices)
        right_T = (y_test == c) & (logits.argmax(1) == c)
        if right_T.any():
            share_T, full_T = absorbed_share(f_test[right_T], x_test[right_T], sae.W_dec.detach(), W_CD[c], split_S)
            shares.append(share_T.mean().item())
            fulls.append(full_T.float().mean().item())
    return {"absorption": sum(shares) / len(shares), "full_absorption": sum(fulls) / len(fulls)}


# -------------------------------------------------------------------------------------- texts with labels


@dataclasses.dataclass
class Task:
    """Texts with a label, and for SCR an attribute, parted into training and test texts of which no document is in both."""

    name: str
    texts: list
    labels: torch.Tensor  # (T,), small integers
    test: torch.Tensor  # (T,), bool
    attribute: torch.Tensor = None  # (T,), 0 or 1


def make_task(name, rows, train, test, seed, attribute=False):
    """Task from rows (text, label, attribute, is_test): up to `train` and `test` texts in equal parts per label, and per
    attribute where there is one. Raises InputError where a class has too few."""
    labels = sorted({row[1] for row in rows}, key=str)
    if len(labels) < 2:
        raise InputError(f"{name}: at least two labels are needed, found {len(labels)}")
    cells = {}
    for row in rows:
        cells.setdefault((row[1], row[2] if attribute else None, row[3]), []).append(row)
    values = sorted({row[2] for row in rows}, key=str) if attribute else [None]
    chosen = []
    for is_test, total in ((False, train), (True, test)):
        parts = {(label, value): cells.get((label, value, is_test), []) for label in labels for value in values}
        (label, value), fewest = min(parts.items(), key=lambda part: len(part[1]))
        if len(fewest) < 20:
            where = f"{label}" + (f" with attribute {value}" if attribute else "")
            kind = "test" if is_test else "training"
            raise InputError(f"{name}: class {where} has {len(fewest)} {kind} texts, 20 are needed")
        for part in parts.values():
            chosen += random.Random(seed).sample(part, min(total // len(parts), len(fewest)))
    return Task(
        name,
        [row[0] for row in chosen],
        torch.tensor([labels.index(row[1]) for row in chosen]),
        torch.tensor([row[3] for row in chosen]),
        torch.tensor([values.index(row[2]) for row in chosen]) if attribute else None,
    )


def library_pieces():
    """Pieces of about 200 characters of the demo's documents: dicts of file, package, kind, text and what the tasks ask.

    Kinds: window (consecutive lines), docstring, comment, body (of a function) and prose (Python's help).
    """
    for file, text in sgo_sae.library_texts():
        package = file.split("/")[0] if "/" in file else None
        if package == "help":
            for part in cut(text.splitlines(keepends=True)):
                yield dict(file=file, package=package, kind="prose", text=part)
            continue
        lines = text.splitlines(keepends=True)
        start = 0
        for part in cut(lines):
            first = part.lstrip("\n")
            indent, place = len(first) - len(first.lstrip(" ")), start / max(1, len(text))
            start += len(part)
            yield dict(file=file, package=package, kind="window", text=part, indent=min(8, indent // 4 * 4),
                       place="head" if place < 0.15 else "tail" if place > 0.85 else None)  # fmt: skip
        for block in re.findall(r"(?:^[ \t]*#.*\n){4,}", text, re.M):
            plain = re.sub(r"^[ \t]*#+ ?", "", block, flags=re.M)
            yield dict(file=file, package=package, kind="comment", text=plain[:200])
        try:
            tree = ast.parse(text)
        except SyntaxError:  # templates and grammars of old versions that the library carries
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                doc = ast.get_docstring(node) or ""
                for part in list(cut(doc.splitlines(keepends=True))) or [doc] * (len(doc) > 80):
                    yield dict(file=file, package=package, kind="docstring", text=part)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                code = node.body[1:] if ast.get_docstring(node) else node.body
                source = "".join(lines[code[0].lineno - 1 : code[-1].end_lineno]) if code else ""
                if len(source) > 120:
                    names = [a.arg for a in node.args.args]
                    yield dict(file=file, package=package, kind="body", text=source[:200], method=names[:1] == ["self"])


def cut(lines, size=200):
    """Groups of consecutive lines, each of at least `size` characters."""
    part = ""
    for line in lines:
        part += line
        if len(part) >= size:
            yield part[: 2 * size]
            part = ""


def library_tasks(train, test, seed):
    """Eight probing tasks and two for SCR from the standard library; of each package, files with a third of the text test."""
    pieces = list(library_pieces())
    length = Counter()
    for p in pieces:
        length[p["package"], p["file"]] += len(p["text"])
    whole, held, test_files = Counter(), Counter(), set()
    for (package, _), size in length.items():
        whole[package] += size
    for (package, file), size in sorted(length.items(), key=lambda item: zlib.crc32(item[0][1].encode())):
        if held[package] + size <= whole[package] / 2 and held[package] < whole[package] / 3:
            held[package] += size
            test_files.add(file)

    def rows(label, kinds=("window",), attribute=lambda p: None):
        labelled = ((p, label(p)) for p in pieces if p["kind"] in kinds)
        return [(p["text"], y, attribute(p), p["file"] in test_files) for p, y in labelled if y is not None]

    def ranking(kinds):
        """Packages by the number of examples in the smallest of their parts, largest first."""
        counts = Counter((p["package"], p["kind"], p["file"] in test_files) for p in pieces)
        fewest = {n: min(counts[n, k, t] for k in kinds for t in (False, True)) for n in whole if n not in (None, "help")}
        return sorted(fewest, key=lambda n: (-fewest[n], n))

    ranked = ranking(["window"])
    probing = [
        (f"packages {i + 1}", rows(lambda p, s=ranked[5 * i : 5 * i + 5]: p["package"] if p["package"] in s else None))
        for i in range(3)
    ] + [
        ("prose or code", rows(lambda p: p["kind"], ("prose", "window"))),
        ("docstring, comment or code", rows(lambda p: p["kind"], ("docstring", "comment", "body"))),
        ("indentation", rows(lambda p: p["indent"])),
        ("head or tail of a file", rows(lambda p: p["place"])),
        ("method or function", rows(lambda p: p["method"], ("body",))),
    ]
    tasks = [make_task(name, part, train, test, seed) for name, part in probing]
    kinds = ("docstring", "body")
    best = ranking(kinds)
    spurious = [
        make_task(
            f"{a} or {b}, docstring or code",
            rows(lambda p: p["package"] if p["package"] in (a, b) else None, kinds, lambda p: p["kind"]),
            train, test, seed, attribute=True,
        )
        for a, b in (best[0:2], best[2:4])
    ]  # fmt: skip
    return tasks, spurious


BIOS = ("LabHC/bias_in_bios", None, "hard_text", "profession", "gender")
AMAZON = ("canrager/amazon_reviews_mcauley_1and5", None, "text", "category", "rating")
EUROPARL = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
PROBING = [  # name, (dataset, subset, text column, label column, attribute column), classes, balance by attribute
    ("bias_in_bios 1", BIOS, (0, 1, 2, 6, 9), True),
    ("bias_in_bios 2", BIOS, (11, 13, 14, 18, 19), True),
    ("bias_in_bios 3", BIOS, (20, 21, 22, 25, 26), True),
    ("amazon category", AMAZON, (1, 2, 3, 5, 6), False),
    ("amazon sentiment", (*AMAZON[:3], "rating", None), (1.0, 5.0), False),
    ("github-code", ("codeparrot/github-code", None, "code", "language", None), ("C", "Python", "HTML", "Java", "PHP"), False),
    ("ag_news", ("fancyzhx/ag_news", None, "text", "label", None), (0, 1, 2, 3), False),
    ("europarl", ("Helsinki-NLP/europarl", EUROPARL, "translation", None, None), tuple(EUROPARL), False),
]
SPURIOUS = [  # first and second class, as SAEBench pairs them; gender 0 is male
    ("professor or nurse", BIOS, (21, 13)),
    ("architect or journalist", BIOS, (1, 11)),
    ("surgeon or psychologist", BIOS, (25, 22)),
    ("attorney or teacher", BIOS, (2, 26)),
    ("books or CDs", AMAZON, (24, 26)),
    ("software or electronics", AMAZON, (30, 6)),
    ("pets or office", AMAZON, (18, 11)),
    ("industrial or toys", AMAZON, (3, 1)),
]


def hub_rows(source, classes, per_class, split):
    """Rows (text, label, attribute) of a Hub dataset, at most `per_class` of a label and attribute."""
    import datasets

    dataset, subset, text, label, attribute = source
    with sgo_sae.loading(dataset):
        if isinstance(subset, dict):  # Europarl: a language is one side of a pair
            for language, pair in subset.items():
                stream = datasets.load_dataset(dataset, pair, split=split, streaming=True)
                for row in islice(stream, per_class):
                    yield row[text][language], language, None
            return
        counts = {}
        for row in datasets.load_dataset(dataset, subset, split=split, streaming=True):
            cell = (row[label], row[attribute] if attribute else None)
            if row[label] in classes and counts.get(cell, 0) < per_class:
                counts[cell] = counts.get(cell, 0) + 1
                yield row[text][150:] if label == "language" else row[text], *cell
            if len(counts) == len(classes) * (2 if attribute else 1) and min(counts.values()) >= per_class:
                return


def benchmark_task(name, source, classes, balanced, train, test, seed):
    """A task of SAEBench from the Hub; datasets without a test split give their last fifth."""
    parts = len(classes) * (2 if balanced else 1)
    source = source if balanced else (*source[:4], None)
    only_train = source[0] in ("codeparrot/github-code", "Helsinki-NLP/europarl")
    rows = []
    if only_train:
        by_class = {}
        for text, label, _ in hub_rows(source, classes, math.ceil((train + test) / parts), "train"):
            by_class.setdefault(label, []).append(text)
        for label, texts in by_class.items():
            rows += [(text, label, None, i >= len(texts) * train / (train + test)) for i, text in enumerate(texts)]
    else:
        for split, count in (("train", train), ("test", test)):
            found = hub_rows(source, classes, math.ceil(count / parts), split)
            rows += [(text, classes.index(label), attribute, split == "test") for text, label, attribute in found]
    return make_task(name, rows, train, test, seed, attribute=balanced)


def file_tasks(path, train, test, seed):
    """Probing task, and one for SCR where there is a column `attribute`, from a csv, jsonl or parquet file; a fifth tests."""
    cfg = sgo_sae.Config(dataset=str(path))
    stream = sgo_sae.load_texts(cfg)
    rows = []
    for row in stream:
        if missing := [name for name in ("text", "label") if name not in row]:
            raise InputError(f"{path} lacks the column {missing[0]}; its columns are {', '.join(row)}")
        if sgo_sae.is_text(row["text"]) and row["label"] is not None:
            is_test = zlib.crc32(row["text"].encode()) % 5 == 0
            rows.append((row["text"], row["label"], row.get("attribute"), is_test))
    name = Path(path).stem
    tasks, values = [make_task(name, rows, train, test, seed)], {row[2] for row in rows} - {None}
    if not values:
        return tasks, []
    two = sorted({row[1] for row in rows}, key=str)[:2]
    if len(values) != 2:
        raise InputError(f"{path}: the column attribute must hold two values for SCR, found {len(values)}")
    return tasks, [make_task(name, [r for r in rows if r[1] in two and r[2] is not None], train, test, seed, attribute=True)]


# ------------------------------------------------------------------------------------ the language model


@torch.no_grad()
def mean_latents(read, tokenizer, saes, texts, length, device, batch=64):
    """Mean over each text's tokens, special ones left out, of the activations (T, D) and of each SAE's latents (T, N).

    read: token ids (B, L) -> activations (B, L, D). Texts are cut at `length` tokens; batches are of like length.
    """
    special = torch.tensor(sgo_sae.special_ids(tokenizer), device=device)
    bos = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None][:1]
    ids = [bos + i[: length - len(bos)] for i in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pad = tokenizer.pad_token_id or 0
    order = sorted(range(len(ids)), key=lambda t: len(ids[t]))
    encoders = [lambda x: x, *(sae.encode for sae in saes)]
    means = [torch.zeros(len(ids), width) for width in (len(saes[0].b_dec), *(len(sae.b_enc) for sae in saes))]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        longest = max(len(ids[t]) for t in rows)
        ids_BL = torch.tensor([ids[t] + [pad] * (longest - len(ids[t])) for t in rows], device=device)
        real_BL = torch.arange(longest, device=device) < torch.tensor([len(ids[t]) for t in rows], device=device)[:, None]
        keep_BL = real_BL & ~torch.isin(ids_BL, special)
        x_ED, text_E = read(ids_BL)[keep_BL].float(), keep_BL.nonzero()[:, 0]
        count_B1 = keep_BL.sum(1, keepdim=True).clamp(min=1)
        for encode, mean_TN in zip(encoders, means, strict=True):
            part_EN = encode(x_ED)
            mean_BN = part_EN.new_zeros(len(rows), part_EN.shape[1]).index_add_(0, text_E, part_EN) / count_B1
            mean_TN[rows] = mean_BN.cpu()
    return means[0], means[1:]


@torch.no_grad()
def word_activations(read, tokenizer, device, count, seed):
    """Activations at the last word of prompts that name first letters, its letter (0 to 25) and whether it is for testing.

    Words are the tokenizer's alphabetic tokens. Prompts are put together from token ids, so that the word is one token.
    """
    rng = random.Random(seed)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    words = [(i, t.strip()) for i, t in enumerate(texts) if t.strip().isascii() and t.strip().isalpha()]
    words = rng.sample(words, min(count, len(words)))
    cut_at = len(words) * 4 // 5
    tail = tokenizer(" has the first letter:", add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    answers = {c: tokenizer(f" {c}", add_special_tokens=False)["input_ids"] for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    bos = [i for i in (tokenizer.bos_token_id,) if i is not None]
    rows = []
    for word in words:
        examples = rng.sample([w for w in words[: min(cut_at, 1000)] if w != word], min(10, cut_at - 1))
        ids = sum((newline + [i] + tail + answers[text[0].upper()] for i, text in examples), bos)
        rows.append(ids + newline + [word[0]])
    x = []
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        # what follows the word does not change a causal model's activation there, so the prompt may end with it
        ids_BL = torch.tensor([r + [pad] * (longest - len(r)) for r in batch], device=device)
        last_B = torch.tensor([len(r) - 1 for r in batch], device=device)
        x.append(read(ids_BL)[torch.arange(len(batch), device=device), last_B].float())
    letters = torch.tensor([ord(text[0].upper()) - ord("A") for _, text in words], device=device)
    return torch.cat(x), letters, torch.arange(len(words), device=device) >= cut_at


def load_full_lm(name, layer, device, dtype):
    """The whole language model, its list of layers and whether it predicts next tokens."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    with sgo_sae.loading(name):
        config = AutoConfig.from_pretrained(name)
        causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or [])
        lm = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(name, dtype=dtype)
    n_layers = config.get_text_config().num_hidden_layers
    if layer >= n_layers:
        raise InputError(f"layer {layer}: the layers of {name} are 0 to {n_layers - 1}")
    lm.config.use_cache = False
    return lm.eval().to(device), sgo_sae.layer_list(lm, n_layers), causal


# -------------------------------------------------------------------------------------------------- table


ROWS = [  # family, key in eval.json, name in the table, direction
    ("core", "mse", "MSE per element", "↓"),
    ("core", "mse_benchmark", "MSE as SAEBench divides it", "↓"),
    ("core", "cosine", "cosine similarity", "↑"),
    ("core", "explained_variance", "explained variance", "↑"),
    ("core", "l0", "L0", ""),
    ("core", "l1", "L1", ""),
    ("core", "norm_ratio", "norm of x̂ over norm of x", ""),
    ("core", "reconstruction_bias", "relative reconstruction bias", ""),
    ("core", "never_fire", "latents that never fire", "↓"),
    ("core", "dense", "latents on > 10 % of tokens", "↓"),
    ("behaviour", "ce_clean", "cross-entropy, clean", ""),
    ("behaviour", "ce_sae", "cross-entropy with the SAE", "↓"),
    ("behaviour", "ce_zero", "cross-entropy, zeroed", ""),
    ("behaviour", "ce_score", "CE score", "↑"),
    ("behaviour", "kl_score", "KL score", "↑"),
    ("competition", "w_mean", "mean w_ij of co-active pairs", "↓"),
    ("competition", "mean_max_w", "mean max w_ij", "↓"),
    ("competition", "pairs_over_half", "pairs with w_ij > 0.5", "↓"),
    ("competition", "mean_max_cos", "mean max |cos| of decoder rows", "↓"),
    ("competition", "penalty_share", "αΩ over reconstruction", ""),
    *(("probe", f"top_{k}", f"probing, {k} latent{'s' * (k > 1)}", "↑") for k in KS),
    ("probe", "all", "probing, all latents", "↑"),
    *(("probe", f"residual_{k}", f"probing, {k} dimension{'s' * (k > 1)} of x", "↑") for k in KS),
    ("probe", "residual_all", "probing, x", "↑"),
    *(("scr", f"scr_{n}", f"SCR, {n} latents", "↑") for n in ABLATED),
    ("absorption", "absorption", "absorption", "↓"),
    ("absorption", "full_absorption", "full absorption", "↓"),
]
PAPER = {"mse_benchmark": 1.41, "cosine": 0.93, "top_1": 0.961, "top_20": 0.959, "scr_2": 0.172, "absorption": 0.025}


def table(names, results, paper=False, markdown=False, means=False):
    """The table of results {family: {key: value} or reason}: a column per run, and mean ± standard deviation over seeds.

    With `means`, a column per setting, whatever its number of seeds, takes the place of the runs'.
    """
    def of(result):
        return lambda family, key: result[family].get(key) if isinstance(result.get(family), dict) else None

    columns = [] if means else [(name, of(result)) for name, result in zip(names, results, strict=True)]
    groups = {}
    for name, r in zip(names, results, strict=True):
        same = {k: v for k, v in r["settings"].items() if k not in ("seed", "out", "cache")} or name
        groups.setdefault(json.dumps(same, sort_keys=True), []).append((name, r))
    for group in groups.values():
        if len(group) > 1:

            def spread(family, key, group=group):
                values = [value for _, r in group if (value := of(r)(family, key)) is not None]
                if len(values) > 1:
                    values = torch.tensor(values, dtype=torch.double)
                    mean, deviation = values.mean().item(), values.std().item()
                    return f"{number(mean)} ± {number(deviation, mean)}"

            settings = group[0][1]["settings"]
            name = "{}, α {:g}, N {}, {} seeds".format(*(settings.get(n) for n in ("arch", "alpha", "dict")), len(group))
            columns.append((name, spread))
        elif means:
            columns.append((group[0][0], of(group[0][1])))
    if paper:
        columns.append(("the paper's, as reported", lambda family, key: PAPER.get(key)))
    lines = [["", *(name for name, _ in columns)]]
    for family, key, label, direction in ROWS:
        values = [value(family, key) for _, value in columns]
        if any(of(result)(family, key) is not None for result in results):
            cells = ["" if v is None else v if isinstance(v, str) else number(v) for v in values]
            lines.append([f"{label} {direction}".strip(), *cells])
    notes = [f"{family}: not measured, {r[family]}" for family in FAMILIES for r in results if isinstance(r.get(family), str)]
    notes += [note for r in results for note in r["notes"]]
    lines += [[note] for note in dict.fromkeys(notes)]
    return layout(lines, markdown)


def number(value, like=None):
    """A figure with three or four digits that count, or with as many decimals as the figure `like` gets."""
    size = abs(value if like is None else like)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 3}f}"


def layout(lines, markdown):
    full = [line for line in lines if len(line) > 1]
    widths = [max(len(line[i]) for line in full) for i in range(len(full[0]))]
    out = []
    for n, line in enumerate(lines):
        if len(line) == 1:
            line = line + [""] * (len(widths) - 1) if markdown else line
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        out.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and n == 0:
            out.append("|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|")
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------- main


def parse_args(argv):
    parser = sgo_sae.make_parser("eval_sae.py", __doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a trained SAE or of a grid of them, or Gemma Scope params.npz")
    parser.add_argument("--metrics", default=",".join(FAMILIES), help="families to measure")
    parser.add_argument("--model", help="language model, where a RUN does not name one that can be loaded")
    parser.add_argument("--layer", type=int, help="layer, where a RUN does not name it")
    parser.add_argument("--text", help="text for core, behaviour and competition (default: the demo's held-out documents, "
                        "else the split `validation` of the run's dataset)")  # fmt: skip
    parser.add_argument("--probe", help="csv, jsonl or parquet file with text, label and, for SCR, attribute")
    parser.add_argument("--contexts", type=int, default=512, help="contexts of text for core and behaviour")
    parser.add_argument("--train", type=int, help="training texts of a probing task (default: 4000, of the demo's 1500)")
    parser.add_argument("--test", type=int, help="test texts of a probing task (default: 1000, of the demo's 2000)")
    parser.add_argument("--length", type=int, help="tokens of a text (default: 128, of the demo's 64)")
    parser.add_argument("--words", type=int, default=20000, help="words of the absorption task, at most")
    parser.add_argument("--paper", action="store_true", help="add the paper's figures for its run 4, as it reports them")
    parser.add_argument("--means", action="store_true", help="a column per setting, over its seeds, instead of one per run")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--device", default="auto", help="cuda, cpu; auto is cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="precision of the language model; auto is bfloat16 on cuda, else float32")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and probes")
    args = parser.parse_args(argv)
    runs, args.runs = args.runs, []
    for run in runs:
        members = sorted(str(path.parent) for path in Path(run).glob("*/cfg.json"))
        args.runs += members if members and not (Path(run) / "cfg.json").exists() else [run]
    args.metrics = args.metrics.split(",")
    if unknown := [m for m in args.metrics if m not in FAMILIES]:
        raise InputError(f"--metrics {unknown[0]}: the families are {', '.join(FAMILIES)}")
    for name in ("contexts", "train", "test", "length", "words"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, but is {getattr(args, name)}")
    return args


def origin(sae, args):
    """Model, layer and the training settings, {} where they are not known, of an autoencoder."""
    known = vars(sae.cfg)
    hook = re.search(r"blocks\.(\d+)\.hook_resid_post", str(known.get("hook_name")))
    model = args.model or known.get("model_name") or "google/gemma-2-2b"
    layer = args.layer if args.layer is not None else int(hook.group(1)) if hook else 12
    return model, layer, known.get("settings") or {}


def task_scores(family, tasks, saes, latents_of, train, test, seed):
    """Probing or SCR of each autoencoder, {task: {key: score}}; numbers of texts; notes on tasks that can't be had.

    latents_of(texts): their mean activations, and a list of their mean latents, one per autoencoder.
    """
    from tqdm import tqdm

    scores, samples, notes = [{} for _ in saes], {}, []
    for task in tqdm(tasks, desc=family, unit="task"):
        try:
            if not isinstance(task, Task):
                name, source, classes, *balanced = task
                task = benchmark_task(name, source, classes, (balanced or [True])[0], train, test, seed)
        except InputError as error:
            notes.append(f"{family}: {name} is left out, {error}")
            continue
        x, latents = latents_of(task.texts)
        fit, held = ~task.test, task.test
        if family == "probe":
            split = lambda f: (f[fit], task.labels[fit], f[held], task.labels[held])  # noqa: E731
            residual = sparse_probing(*split(x), train=train, test=test, seed=seed)
            for f, score in zip(latents, scores):
                ours = sparse_probing(*split(f), train=train, test=test, seed=seed)
                score[task.name] = {f"top_{k}" if k != "all" else k: v for k, v in ours.items()}
                score[task.name] |= {f"residual_{k}": v for k, v in residual.items()}
        else:
            a, b = task.labels, task.attribute
            probes = scr_probes(x[fit], a[fit], b[fit], x[held], a[held], b[held], seed)
            for f, sae, score in zip(latents, saes, scores):
                W_dec_ND = sae.W_dec.detach().cpu()
                removal = scr(probes, f[fit], a[fit], b[fit], x[held], f[held], a[held], b[held], W_dec_ND)
                score[task.name] = {f"scr_{n}": v for n, v in removal.items()}
        samples[f"{family}: {task.name}"] = {"train": int(fit.sum()), "test": int(held.sum())}
    return scores, samples, notes


def evaluate(args, device, saes, model, layer, settings):
    """Results of autoencoders of one model and layer: a dict {family: {key: value} or the reason why not} for each."""
    from tqdm import tqdm

    dtype = sgo_sae.find_dtype(args.dtype, device)
    demo = bool(settings[0].get("demo"))
    train, test = args.train or (1500 if demo else 4000), args.test or (2000 if demo else 1000)
    length = args.length or (64 if demo else 128)
    ctx = settings[0].get("ctx", 128)
    cfg = sgo_sae.Config(model=model, layer=layer, ctx=ctx, data_seed=args.seed)
    lm_config, tokenizer = sgo_sae.load_tokenizer(cfg)
    for sae in saes:
        if len(sae.b_dec) != lm_config.hidden_size:
            raise InputError(f"the autoencoder is for {len(sae.b_dec)} dimensions, {model} has {lm_config.hidden_size}")
    results = [{"settings": s, "samples": {}, "notes": []} for s in settings]

    def record(families, values):
        for result, value in zip(results, values if isinstance(values, list) else [values] * len(results), strict=True):
            for family in families:
                result[family] = value

    probing, spurious = None, None
    if {"probe", "scr"} & set(args.metrics):
        if args.probe:
            probing, spurious = file_tasks(args.probe, train, test, args.seed)
        elif demo:
            probing, spurious = library_tasks(train, test, args.seed)
    if args.text:
        cfg = dataclasses.replace(cfg, dataset=args.text)
    elif demo:
        cfg = dataclasses.replace(cfg, dataset=str(Path(model) / "heldout.jsonl"))
    else:
        cfg = dataclasses.replace(cfg, dataset=settings[0].get("dataset", cfg.dataset), split="validation")
        if Path(cfg.dataset).exists():
            raise InputError(f"give --text: no text of {cfg.dataset} is known to be held out from training")
    lm, layers, causal = load_full_lm(model, layer, device, dtype)
    special = sgo_sae.special_ids(tokenizer)

    text_families = [f for f in ("core", "behaviour", "competition") if f in args.metrics]
    if text_families:
        try:
            stream = sgo_sae.load_texts(cfg)
            contexts = sgo_sae.token_contexts(sgo_sae.text_batches(stream, "text", dict(epoch=0, row=0)), tokenizer, ctx)
            ids_TL = torch.tensor(list(islice(contexts, args.contexts)), device=device)
        except InputError as error:
            if args.text:
                raise
            record(text_families, str(error))
            text_families = []
    if "behaviour" in text_families:
        if causal:
            with tqdm(total=len(ids_TL), desc="behaviour", unit="context") as bar, torch.inference_mode():
                record(["behaviour"], behaviour(lm, layers[layer], saes, ids_TL, special, bar))
        else:
            record(["behaviour"], "the model has no language-model head")
    del layers[layer + 1 :]  # nothing below needs what comes after the layer
    lm = lm.base_model

    def read(ids_BL):
        with torch.inference_mode():
            return sgo_sae.hooked(lm, layers[layer], ids_BL)

    if {"core", "competition"} & set(text_families):
        source = sgo_sae.activations(lm, layers[layer], iter(ids_TL.tolist()), special, dict(left=ids_TL.numel()))
        x_TD = torch.cat([chunk.clone() for chunk in tqdm(source, desc="activations", unit="batch")])
        x_TD = x_TD[torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(args.seed)).to(device)]
        for sae, result, s in zip(tqdm(saes, desc="reconstruction", unit="SAE"), results, settings):
            result["samples"]["tokens"] = len(x_TD)
            if "core" in args.metrics:
                result["core"] = reconstruction(sae, x_TD, ctx)
            if "competition" in args.metrics:
                result["competition"] = competition(sae, x_TD[: 8 * 2048], s.get("alpha"))
        del x_TD

    for family, tasks, benchmark in (("probe", probing, PROBING), ("scr", spurious, SPURIOUS)):
        tasks = benchmark if tasks is None else tasks
        if family not in args.metrics:
            continue
        if not tasks:
            record([family], "the probe file has no column `attribute`")
            continue
        scores, samples, notes = task_scores(
            family, tasks, saes, partial(mean_latents, read, tokenizer, saes, length=length, device=device), train, test, args.seed
        )
        for result, score in zip(results, scores):
            result["samples"] |= samples
            result["notes"] += notes
            if not score:
                result[family] = "none of its datasets can be had"
                continue
            keys = next(iter(score.values()))
            result[family] = {key: sum(s[key] for s in score.values()) / len(score) for key in keys}
            result[f"{family}_tasks"] = score

    if "absorption" in args.metrics:
        try:
            if not causal:
                raise InputError("the model has no language-model head")
            x, letters, held = word_activations(read, tokenizer, device, args.words, args.seed)
            probe = multi_probe(x[~held], F.one_hot(letters[~held], 26))
            for sae, result in zip(tqdm(saes, desc="absorption", unit="SAE"), results):
                result["absorption"] = absorption(sae, x[~held], letters[~held], x[held], letters[held], probe)
                result["samples"]["words"] = len(letters)
        except InputError as error:
            record(["absorption"], str(error))
    return results


def work(argv):
    args = parse_args(argv)
    device = sgo_sae.find_device(args.device)
    sgo_sae.quiet_libraries()
    torch.manual_seed(args.seed)
    saes = [sgo_sae.load_sae(run, device) for run in args.runs]
    origins = [origin(sae, args) for sae in saes]
    results = [None] * len(saes)
    for key in dict.fromkeys((model, layer) for model, layer, _ in origins):
        members = [i for i, (model, layer, _) in enumerate(origins) if (model, layer) == key]
        found = evaluate(args, device, [saes[i] for i in members], *key, [origins[i][2] for i in members])
        for i, result in zip(members, found):
            results[i] = result
    for run, result in zip(args.runs, results):
        if Path(run).exists():
            folder = Path(run) if Path(run).is_dir() else Path(run).parent
            sgo_sae.write_json(folder / "eval.json", {"command": vars(args), "versions": sgo_sae.versions(), **result})
    print(table([Path(run).name for run in args.runs], results, args.paper, args.markdown, args.means))


def main(argv):
    return sgo_sae.exit_code("eval_sae.py", work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
