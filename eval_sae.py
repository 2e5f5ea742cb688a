"""Evaluate sparse autoencoders as SAEBench defines it: reconstruction, model behaviour, probing, SCR, absorption.

    python eval_sae.py RUN [RUN ...]               a table, a column per setting; eval.json in each run's folder
    python eval_sae.py RUN --metrics core probe    only some of the families; --help lists every setting
    python eval_sae.py RUN --html FILE             and a page to look at: which latents compete, and on what

A RUN is a folder that sgo_sae.py or SAELens wrote, a folder of such folders, or a Gemma Scope params.npz, on disk or on
the Hub. Shapes are named as in sgo_sae.py, and T texts, words or tokens, U those of a test part, S chosen latents.
"""

import argparse
import ast
import html
import json
import math
import random
import re
import statistics
import sys
import zlib
from collections import Counter, namedtuple
from contextlib import suppress
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sgo_sae
from sgo_sae import InputError, progress_bar

FAMILIES = ("core", "behaviour", "competition", "probe", "scr", "absorption")
KS = (1, 2, 5, 20)  # latents a sparse probe may use
ABLATED = (2, 5, 10, 20, 50, 100, 500)  # latents that SCR ablates


# ------------------------------------------------------------------- reconstruction, behaviour, competition
@torch.no_grad()
def reconstruction(sae, x_TD, ctx=128, chunk=2048):
    """How well x̂ stands for x over all tokens (T, D); `mse` is per element, `mse_benchmark` is SAEBench's figure.

    SAEBench divides a token's squared error by the tokens of its evaluation batch, 16 contexts less their BOS.
    """
    (T, D), mean_D, sums = x_TD.shape, x_TD.double().mean(0), Counter()
    fired_N = torch.zeros(len(sae.b_enc), device=x_TD.device)
    for x_BD in x_TD.split(chunk):
        f_BN = sae.encode(x_BD.float())
        fired_N += (f_BN > 0).sum(0)
        x_BD, xhat_BD = x_BD.double(), sae.decode(f_BN).double()
        sums["error"] += (x_BD - xhat_BD).square().sum().item()
        sums["variance"] += (x_BD - mean_D).square().sum().item()
        sums["cosine"] += F.cosine_similarity(x_BD, xhat_BD, dim=1).sum().item()
        sums["l0"] += (f_BN > 0).sum().item()
        sums["l1"] += f_BN.double().sum().item()
        sums["norm_ratio"] += (xhat_BD.norm(dim=1) / x_BD.norm(dim=1)).sum().item()
        sums["xhat2"] += xhat_BD.square().sum().item()
        sums["dot"] += (x_BD * xhat_BD).sum().item()
    result = {name: sums[name] / T for name in ("cosine", "l0", "l1", "norm_ratio")}
    result |= {
        "mse": sums["error"] / (T * D),
        "mse_benchmark": sums["error"] / T / (16 * (ctx - 1)),
    }
    result |= {
        "explained_variance": 1 - sums["error"] / sums["variance"],
        "bias": sums["xhat2"] / sums["dot"],
    }
    never_N, dense_N = (fired_N == 0).double(), (fired_N > T / 10).double()
    return result | {"never_fire": never_N.mean().item(), "dense": dense_N.mean().item()}


@torch.inference_mode()
def behaviour(lm, layer, saes, ids_TL, ordinary_TL):
    """Cross-entropy and KL with each autoencoder's x̂ in place of x, beside clean and zeroed; a dict per autoencoder.

    Tokens that are not ordinary keep their activations, but where everything is zeroed. Means are over ordinary ones.
    """
    splices = [lambda x, keep: x, lambda x, keep: torch.zeros_like(x)]
    splices += [
        lambda x, keep, sae=sae: torch.where(keep, sae(x.float()).to(x.dtype), x) for sae in saes
    ]
    rows = max(1, 2**23 // (ids_TL.shape[1] * lm.config.get_text_config().vocab_size))
    sums, parts = (
        torch.zeros(len(splices), 2).double(),
        list(zip(ids_TL.split(rows), ordinary_TL.split(rows))),
    )

    def hook(module, args, output):
        x_BLD = splice(output[0] if isinstance(output, tuple) else output, ordinary_BL[..., None])
        return (x_BLD, *output[1:]) if isinstance(output, tuple) else x_BLD

    handle = layer.register_forward_hook(hook)
    for ids_BL, ordinary_BL in progress_bar(parts, desc="behaviour", leave=False):
        p_EV = log_p_EV = None
        next_E1, last_BL = ids_BL.roll(-1, 1)[ordinary_BL][:, None], torch.zeros_like(ordinary_BL)
        last_BL[:, -1] = True  # nothing follows
        for i, splice in enumerate(splices):
            log_q_EV = lm(input_ids=ids_BL).logits[ordinary_BL].float().log_softmax(-1)
            p_EV, log_p_EV = (log_q_EV.exp(), log_q_EV) if i == 0 else (p_EV, log_p_EV)
            sums[i, 0] -= log_q_EV.gather(1, next_E1)[~last_BL[ordinary_BL]].double().sum().item()
            sums[i, 1] += torch.linalg.vecdot(p_EV, log_p_EV - log_q_EV).double().sum().item()
    handle.remove()
    ce = (sums[:, 0] / ordinary_TL[:, :-1].sum().item()).tolist()
    kl = (sums[:, 1] / ordinary_TL.sum().item()).tolist()
    common = {"ce_clean": ce[0], "ce_zero": ce[1], "kl_zero": kl[1]}
    return [
        common
        | {
            "ce_sae": c,
            "kl_sae": d,
            "ce_score": (ce[1] - c) / (ce[1] - ce[0]),
            "kl_score": (kl[1] - d) / kl[1],
        }
        for c, d in zip(ce[2:], kl[2:])
    ]


@torch.no_grad()
def competition(sae, x_TD, settings, scale=1.0, batch=2048):
    """Feature competition in batches as in training: w_ij of co-active pairs, decoder cosines, αΩ over reconstruction.

    scale: what activations were multiplied by in training, with whose 4th power Ω grows, the error with its 2nd.
    """
    N, found = len(sae.b_enc), []
    for x_BD in x_TD.float().split(batch)[: max(1, len(x_TD) // batch)]:
        f_BN = sae.encode(x_BD)
        sums, rivals = torch.zeros(3, dtype=torch.double, device=f_BN.device), []
        for lo in range(0, N, 1024):
            w_TN = sgo_sae.weights_between(f_BN[:, lo : lo + 1024], f_BN)
            w_TN.diagonal(lo).zero_()
            sums += torch.stack([w_TN.sum(), (w_TN > 0).sum(), (w_TN > 0.5).sum()])
            rivals.append(w_TN.amax(1))
        max_N, (total, pairs, over) = torch.cat(rivals), sums.tolist()
        figures = {"w_mean": total / max(1, pairs), "pairs_over_half": over / 2}
        figures["mean_max_w"] = max_N[max_N > 0].mean().item()
        if settings:
            vals_BK, idx_BK = f_BN.topk(int((f_BN > 0).sum(1).max()), dim=1)
            error = (x_BD - sae.decode(f_BN)).square().sum(1).mean() * scale**2
            omega = sgo_sae.sgo_penalty(vals_BK * scale, idx_BK, N)
            figures["penalty_share"] = (settings["alpha"] * omega / error).item()
        found.append(figures)
    return mean_of(found) | {"mean_max_cos": nearest_cosine(sae.W_dec).mean().item()}


def nearest_cosine(W_dec_ND):
    """The largest |cosine| of each decoder row with another (N,)."""
    W_ND = F.normalize(W_dec_ND.detach(), dim=1)
    tiles = torch.arange(len(W_ND), device=W_ND.device).split(1024)
    return torch.cat([(W_ND[i] @ W_ND.T).abs().scatter_(1, i[:, None], 0).amax(1) for i in tiles])


def mean_of(dicts):
    """Key by key."""
    return {key: sum(d[key] for d in dicts) / len(dicts) for key in dicts[0]}


# -------------------------------------------------------------------------------------------------- probes
def logistic_regression(x_TS, y_T, weight_T=None, C=1.0):
    """L2 logistic regression at its optimum, as scikit-learn defines it: w (S,), b, by Newton's method in float64.

    Minimises ½‖w‖² + C Σ_t weight_t log(1 + exp(-±(w·x_t + b))), the intercept unpenalised.
    """
    x_TS, y_T = (
        F.pad(x_TS.double(), (0, 1), value=1),
        y_T.double(),
    )  # the last column is the intercept's
    weight_T = C * (torch.ones_like(y_T) if weight_T is None else weight_T.double())
    w_S, ridge_S = torch.zeros_like(x_TS[0]), torch.ones_like(x_TS[0])
    ridge_S[-1] = 1e-12  # keeps the system solvable

    def objective(w_S):
        loss = F.binary_cross_entropy_with_logits(x_TS @ w_S, y_T, weight=weight_T, reduction="sum")
        return loss + (ridge_S * w_S.square()).sum() / 2

    for _ in range(100):
        p_T = (x_TS @ w_S).sigmoid()
        gradient_S = x_TS.T @ (weight_T * (p_T - y_T)) + ridge_S * w_S
        step_S = torch.linalg.solve(
            x_TS.T * (weight_T * p_T * (1 - p_T)) @ x_TS + ridge_S.diag(), gradient_S
        )
        while objective(w_S - step_S) > objective(w_S) * (1 + 1e-12):
            step_S = step_S / 2
        w_S = w_S - step_S
        if gradient_S.abs().max() < 1e-9:
            break
    return w_S[:-1], w_S[-1]


def linear_probe(x_TD, y_T, x_UD, y_U, generator, epochs, batch, lr, l1=0.0, patience=10):
    """SAEBench's probe on many columns: AdamW, until `epochs` or `patience` without a better one; of the epoch with
    the best test accuracy w (D,), b and that accuracy."""
    x_TD, y_T, x_UD = x_TD.float(), y_T.float(), x_UD.float()
    w_D = (2 * torch.rand(x_TD.shape[1], generator=generator) - 1).to(x_TD.device) / x_TD.shape[
        1
    ] ** 0.5
    w_D, b = w_D.requires_grad_(), torch.zeros((), device=x_TD.device, requires_grad=True)
    adam, best, waited = torch.optim.AdamW([w_D, b], lr=lr, fused=True), (-1.0,), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(batch):
            loss = (
                F.binary_cross_entropy_with_logits(x_TD[rows] @ w_D + b, y_T[rows])
                + l1 * w_D.abs().sum()
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
        score, waited = accuracy(x_UD, y_U, w_D, b), waited + 1
        if score > best[0]:
            best, waited = (score, w_D.detach().clone(), b.detach().clone()), 0
        if waited >= patience:
            break
    return best[1], best[2], best[0]


@torch.no_grad()
def accuracy(x_TD, y_T, w_D, b):
    return ((x_TD.to(w_D.dtype) @ w_D + b > 0) == y_T.bool()).float().mean().item()


def class_and_others(labels_T, c, generator):
    """Rows of the texts of class c, and of as many others, drawn evenly from the other classes."""
    mine = (labels_T == c).nonzero()[:, 0]
    classes = [
        (labels_T == other).nonzero()[:, 0] for other in labels_T.unique().tolist() if other != c
    ]
    share = math.ceil(len(mine) / len(classes))
    others = torch.cat(
        [rows[torch.randperm(len(rows), generator=generator)[:share]] for rows in classes]
    )
    return torch.cat([mine, others[torch.randperm(len(others), generator=generator)[: len(mine)]]])


def sparse_probing(f_TN, labels_T, f_UN, labels_U, seed=0):
    """{k: test accuracy} of logistic regressions on the k latents of most |mean difference| between a class and as many
    others (chance is half), and of a linear probe on all; averaged over classes."""
    generator, found = torch.Generator().manual_seed(seed), []
    for c in labels_T.unique().tolist():
        rows_T, rows_U = (
            class_and_others(labels_T, c, generator),
            class_and_others(labels_U, c, generator),
        )
        x_TN, y_T, x_UN, y_U = (
            f_TN[rows_T],
            labels_T[rows_T] == c,
            f_UN[rows_U],
            labels_U[rows_U] == c,
        )
        order_N = (x_TN[y_T].mean(0) - x_TN[~y_T].mean(0)).abs().argsort(descending=True)
        tops = {k: order_N[:k] for k in KS}
        found.append(
            {
                k: accuracy(x_UN[:, S], y_U, *logistic_regression(x_TN[:, S], y_T))
                for k, S in tops.items()
            }
        )
        found[-1]["all"] = linear_probe(
            x_TN, y_T, x_UN, y_U, generator, epochs=100, batch=250, lr=1e-2
        )[2]
    return mean_of(found)


# ---------------------------------------------------------------------------------------------------- SCR
def scr_rows(a_T, b_T):
    """Rows in which each combination of the attributes a and b, 0 or 1, is a quarter, and as many of a = b alone."""
    cells = [((a_T == a) & (b_T == b)).nonzero()[:, 0] for a in (0, 1) for b in (0, 1)]
    fewest = min(len(cell) for cell in cells)
    return torch.cat([cell[: fewest // 2] for cell in cells]), torch.cat(
        [cells[0][:fewest], cells[3][:fewest]]
    )


def scr_probes(x_TD, a_T, b_T, x_UD, a_U, b_U, seed=0):
    """SCR's probes on mean activations: for attribute a, for b, and for a (or b) where a = b in training and test."""
    generator = torch.Generator().manual_seed(seed)
    (even_T, equal_T), (even_U, equal_U) = scr_rows(a_T, b_T), scr_rows(a_U, b_U)

    sets = {
        "a": (even_T, a_T, even_U, a_U),
        "b": (even_T, b_T, even_U, b_U),
        "biased": (equal_T, a_T, equal_U, a_U),
    }
    how = {"generator": generator, "epochs": 20, "batch": 16, "lr": 1e-3, "l1": 1e-3}
    return {
        name: linear_probe(x_TD[t], y_T[t], x_UD[u], y_U[u], **how)
        for name, (t, y_T, u, y_U) in sets.items()
    }


@torch.no_grad()
def scr(probes, f_TN, a_T, b_T, x_UD, f_UN, a_U, b_U, W_dec_ND, counts=ABLATED):
    """Spurious correlation removal, {ablated latents: score}, 1 where ablation mends the biased probe.

    a, b: two attributes (T,), 0 or 1; f: mean latents, x: mean activations. Latents set to 0, with the reconstruction
    error added back, take f_S W_dec_S from each token, and so from the mean.
    """
    (even_T, _), (even_U, _), headline, result = scr_rows(a_T, b_T), scr_rows(a_U, b_U), None, {}
    f_TN, a_T, b_T = f_TN[even_T], a_T[even_T].bool(), b_T[even_T].bool()
    x_UD, f_UN, a_U, b_U = x_UD[even_U], f_UN[even_U], a_U[even_U], b_U[even_U]
    for wanted, unwanted, y_T, label_U in (("a", "b", b_T, a_U), ("b", "a", a_T, b_U)):
        effect_N = (
            (f_TN[y_T].mean(0) - f_TN[~y_T].mean(0)) * (W_dec_ND @ probes[unwanted][0])
        ).abs()
        order_N = effect_N.argsort(descending=True)[: int((effect_N > 0).sum())]
        w_D, b, _ = probes["biased"]
        biased, clean = (
            accuracy(x_UD, label_U, w_D, b),
            accuracy(x_UD, label_U, *probes[wanted][:2]),
        )
        if headline is None or biased < headline:
            headline = biased
            for n in counts:
                top_S = order_N[:n]
                ablated = accuracy(x_UD - f_UN[:, top_S] @ W_dec_ND[top_S], label_U, w_D, b)
                result[n] = (
                    (ablated - biased) / (clean - biased) if clean - biased >= 0.001 else 0.0
                )
    return result


# --------------------------------------------------------------------------------------------- absorption
def letter_split(f_train, y_train, f_test, y_test, order_S, gain=0.03):
    """The latents that share a letter: of `order_S`, best first, while one more lifts the test F1 by over `gain`."""
    best, split = 0.0, 0
    weight_T = torch.where(
        y_train, len(y_train) / 2 / y_train.sum(), len(y_train) / 2 / (~y_train).sum()
    )
    for k in range(1, len(order_S) + 1):
        w_S, b = logistic_regression(f_train[:, order_S[:k]], y_train, weight_T)
        score = f1(f_test[:, order_S[:k]].double() @ w_S + b > 0, y_test)
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
    target_T, main_T = x_TD @ direction_D, projection_TN[:, split_S].sum(1)
    others_TN = torch.where(cosine_N >= 0.1, projection_TN.clamp(min=0), 0)
    others_TN[:, split_S] = 0
    absorbers_T = others_TN.topk(min(3, others_TN.shape[1]), dim=1).values.sum(1)
    absorbed_T = torch.minimum(absorbers_T, target_T - main_T)
    share_T = torch.where(main_T <= 0, 1.0, absorbed_T / (absorbed_T + main_T)).clamp(0, 1)
    share_T[(main_T >= target_T) | (absorbers_T < 0.4 * target_T) | (target_T <= 0)] = 0
    top_T = projection_TN.argmax(1)
    full_T = (f_TN[:, split_S] <= 1e-8).all(1) & (cosine_N[top_T] >= 0.025) & (target_T >= 0)
    return share_T, full_T & (projection_TN.gather(1, top_T[:, None])[:, 0] >= 0.4 * target_T)


def multi_probe(x_TD, y_T, batch, l2, l1=0.0, epochs=50, lr=0.01, end_lr=1e-5, seed=0):
    """SAEBench's 26-way probe: Adam, rate falling exponentially, positives weighted by rarity; W (26, D), b (26,)."""
    torch.manual_seed(seed)
    probe, y_TC = nn.Linear(x_TD.shape[1], 26).to(x_TD.device), F.one_hot(y_T, 26).float()
    rarity_C = (len(y_T) - y_TC.sum(0)) / y_TC.sum(0).clamp(min=1)
    adam = torch.optim.Adam(probe.parameters(), lr=lr, weight_decay=l2, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, (end_lr / lr) ** (1 / epochs))
    for _ in progress_bar(range(epochs), desc="letters", unit="epoch", leave=False):
        for rows in torch.randperm(len(x_TD)).to(x_TD.device).split(batch):
            loss = F.binary_cross_entropy_with_logits(
                probe(x_TD[rows]), y_TC[rows], pos_weight=rarity_C
            )
            loss = loss + l1 * probe.weight.abs().sum(1).mean() if l1 else loss
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
    return probe.weight.detach(), probe.bias.detach()


def absorption(sae, x_TD, y_T, x_UD, y_U, probe, seed=0, max_split=10):
    """Mean absorption over the letters that the residual stream spells, those of F1 over 0.6, and full absorption.

    x: activations at the words; y: their letters, 0 to 25; probe: multi_probe's on x. InputError under 20 letters.
    """
    W_CD, b_C = probe
    positive_UC = x_UD @ W_CD.T + b_C > 0
    letters = [c for c in range(26) if f1(positive_UC[:, c], y_U == c) > 0.6]
    if len(letters) < 20:
        raise InputError(f"the model spells {len(letters)} of 26 letters, 20 are needed")
    with torch.no_grad():
        f_TN, f_UN = (torch.cat([sae.encode(x) for x in part.split(2048)]) for part in (x_TD, x_UD))
    sparse_CN, _ = multi_probe(f_TN, y_T, batch=4096, l2=1e-6, l1=0.01, seed=seed)
    shares = []
    for c in letters:
        split_S = letter_split(f_TN, y_T == c, f_UN, y_U == c, sparse_CN[c].topk(max_split).indices)
        scored_U = (y_U == c) & positive_UC[:, c]
        if scored_U.any():
            share_U, full_U = absorbed_share(
                f_UN[scored_U], x_UD[scored_U], sae.W_dec.detach(), W_CD[c], split_S
            )
            shares.append(
                {"absorption": share_U.mean().item(), "full": full_U.float().mean().item()}
            )
    return mean_of(shares) | {"letters": len(letters)}


# -------------------------------------------------------------------------------------- texts with labels
# Texts, their labels (T,) and, for SCR, an attribute (T,), 0 or 1; `test` (T,) parts them; `note` is what lacks.
Task = namedtuple("Task", "name texts labels test attribute note")


def make_task(name, rows, train, test, seed, balanced=False):
    """Task from rows (text, label, attribute, is_test): `train` and `test` random texts of each label or, where one has
    fewer, as many as it has; `balanced`: as many of each attribute. InputError where one has under 20."""
    rows = [(*row[:2], row[2] if balanced else None, row[3]) for row in rows]
    labels, values = (sorted({row[i] for row in rows}, key=str) for i in (1, 2))
    if len(labels) < 2 or len(values) != 1 + balanced:
        raise InputError(
            f"{name}: two labels or more are needed, and two attributes where they are balanced"
        )
    chosen, note = [], ""
    for is_test, count in ((False, train // len(values)), (True, test // len(values))):
        parts = {
            cell: [row for row in rows if row[1:] == (*cell, is_test)]
            for cell in product(labels, values)
        }
        cell, fewest = min(parts.items(), key=lambda part: len(part[1]))
        named = " with ".join(str(c) for c in cell if c is not None)
        has = f"{name}: {named} has {len(fewest)} texts to {'test' if is_test else 'train'} on"
        if len(fewest) < 20:
            raise InputError(f"{has}, 20 are needed")
        note = f"{has}, so each class has no more, not {count}" if len(fewest) < count else note
        for part in parts.values():
            chosen += random.Random(seed).sample(part, min(count, len(fewest)))
    random.Random(seed).shuffle(chosen)
    y_T, test_T = (
        torch.tensor([labels.index(row[1]) for row in chosen]),
        torch.tensor([row[3] for row in chosen]),
    )
    attribute_T = torch.tensor([values.index(row[2]) for row in chosen]) if balanced else None
    return Task(name, [row[0] for row in chosen], y_T, test_T, attribute_T, note)


def library_tasks(train, test, seed, size=300):
    """Two probing tasks and one for SCR from docstrings and bodies of the standard library, no file in both parts."""
    rows = []  # text, package, kind, whether it is a test text
    for file, text in sgo_sae.library_texts():
        package, held, lines = (
            file.split("/")[0],
            zlib.crc32(file.encode()) % 3 == 0,
            text.splitlines(),
        )
        with suppress(SyntaxError):  # of help texts, and of templates that the library carries
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    doc = ast.get_docstring(node) or ""
                    body = node.body[bool(doc) :]
                    code = "\n".join(lines[body[0].lineno - 1 : node.end_lineno]) if body else ""
                    rows += [
                        (doc[:size], package, "docstring", held),
                        (code[:size], package, "body", held),
                    ]
    rows = [row for row in rows if len(row[0]) > 80]
    sizes = Counter((p, held) for _, p, kind, held in rows if kind == "docstring" and "." not in p)
    packages = sorted(
        {p for p, _ in sizes}, key=lambda p: (-min(sizes[p, True], sizes[p, False]), p)
    )[:5]
    kinds = [(text, kind, None, held) for text, _, kind, held in rows]
    bodies = [
        (text, p, None, held) for text, p, kind, held in rows if kind == "body" and p in packages
    ]
    probing = [("docstring or body", kinds), ("package of a body", bodies)]
    two = [row for row in rows if row[1] in packages[:2]]
    spurious = make_task(" or ".join(packages[:2]), two, 2 * train, 2 * test, seed, balanced=True)
    return [make_task(name, part, train, test, seed) for name, part in probing], [spurious]


BIOS = ("LabHC/bias_in_bios", None, "hard_text", "profession", "gender")
AMAZON = ("canrager/amazon_reviews_mcauley_1and5", None, "text", "category", "rating")
EUROPARL = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
PROBING = [  # name, (dataset, subset, text column, label column, attribute column that is balanced), classes
    ("bias_in_bios 1", BIOS, (0, 1, 2, 6, 9)),
    ("bias_in_bios 2", BIOS, (11, 13, 14, 18, 19)),
    ("bias_in_bios 3", BIOS, (20, 21, 22, 25, 26)),
    ("amazon category", AMAZON, (1, 2, 3, 5, 6)),
    ("amazon sentiment", (*AMAZON[:3], "rating", None), (1.0, 5.0)),
    (
        "github-code",
        ("codeparrot/github-code", None, "code", "language", None),
        ("C", "Python", "HTML", "Java", "PHP"),
    ),
    ("ag_news", ("fancyzhx/ag_news", None, "text", "label", None), (0, 1, 2, 3)),
    ("europarl", ("Helsinki-NLP/europarl", EUROPARL, "translation", None, None), tuple(EUROPARL)),
]
SPURIOUS = [  # first and second class, as SAEBench pairs them; gender 0 is male
    *(
        (f"professions {a} and {b}", BIOS, (a, b))
        for a, b in ((21, 13), (1, 11), (25, 22), (2, 26))
    ),
    *(
        (f"categories {a} and {b}", AMAZON, (a, b))
        for a, b in ((24, 26), (30, 6), (18, 11), (3, 1))
    ),
]


def benchmark_task(name, source, classes, train, test, seed):
    """A task of SAEBench from the Hub, of random rows; without a test split, the last rows read are the test texts."""
    import datasets

    dataset, subset, text, label, attribute = source
    values = {"gender": (0, 1), "rating": (1.0, 5.0)}.get(attribute, (None,))
    whole, rows = dataset in ("codeparrot/github-code", "Helsinki-NLP/europarl"), []
    for split, count in [("train", train + test)] if whole else [("train", train), ("test", test)]:
        missing = dict.fromkeys(product(classes, values), math.ceil(count / len(values)))
        for tongue, part in (
            subset.items() if isinstance(subset, dict) else [(None, subset)]
        ):  # Europarl: one of each
            with sgo_sae.loading(dataset):
                stream = datasets.load_dataset(dataset, part, split=split, streaming=True)
                for row in stream.shuffle(seed=seed, buffer_size=20_000):
                    cell = (tongue or row[label], row[attribute] if attribute else None)
                    content = row[text][tongue] if tongue else row[text]
                    if label == "language":  # of code, long files without their head
                        content = content[150:] if len(content) > 534 else ""
                    if missing.get(cell) and content:
                        missing[cell] -= 1
                        is_test = missing[cell] < test if whole else split == "test"
                        rows.append((content, classes.index(cell[0]), cell[1], is_test))
                    if not any(n for (c, _), n in missing.items() if tongue in (None, c)):
                        break
    return make_task(name, rows, train, test, seed, balanced=len(values) == 2)


def file_tasks(path, train, test, seed):
    """Probing task, and one for SCR where there is a column `attribute`, of a local file; a fifth of its rows test."""
    rows, stream = [], sgo_sae.load_texts(sgo_sae.Config(dataset=str(path)))
    for row in stream:
        if "label" not in row:
            raise InputError(f"{path} lacks the column label; its columns are {', '.join(row)}")
        if row["label"] is not None:
            rows.append(
                (
                    row["text"],
                    row["label"],
                    row.get("attribute"),
                    zlib.crc32(row["text"].encode()) % 5 == 0,
                )
            )
    name, two = Path(path).stem, sorted({row[1] for row in rows}, key=str)[:2]
    tasks, rows = (
        [make_task(name, rows, train, test, seed)],
        [r for r in rows if r[1] in two and r[2] is not None],
    )
    return tasks, [make_task(name, rows, 2 * train, 2 * test, seed, balanced=True)] if rows else []


# ------------------------------------------------------------------------------------ the language model
def padded(ids, tokenizer, device, desc, batch=64):
    """Token id lists in batches of like length: their indices, ids (B, L) filled up on the right, which are real."""
    order = sorted(range(len(ids)), key=lambda t: len(ids[t]))
    for start in progress_bar(range(0, len(order), batch), desc=desc, unit="batch", leave=False):
        rows = order[start : start + batch]
        longest = len(ids[rows[-1]])
        ids_BL = torch.tensor(
            [ids[t] + [tokenizer.pad_token_id or 0] * (longest - len(ids[t])) for t in rows]
        )
        real_BL = torch.arange(longest) < torch.tensor([len(ids[t]) for t in rows])[:, None]
        yield rows, ids_BL.to(device), real_BL.to(device)


def load_whole(name, layer, device, dtype):
    """The whole language model with its head, and one of its layers."""
    from transformers import AutoModelForCausalLM

    with sgo_sae.loading(name):
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval().to(device)
    n_layers = lm.config.get_text_config().num_hidden_layers
    return lm, sgo_sae.layers_of(lm.get_decoder(), n_layers)[layer]


def bos_of(tokenizer):
    return sgo_sae.first_id(tokenizer.bos_token_id, tokenizer.cls_token_id)


@torch.no_grad()
def mean_latents(read, tokenizer, saes, texts, length, device, desc="texts"):
    """Mean over each text's tokens, special ones left out, of the activations (T, D) and of each SAE's latents (T, N).

    read: token ids (B, L) -> activations (B, L, D). Texts are cut at `length` tokens, BOS included.
    """
    bos = bos_of(tokenizer)
    ids = [
        bos + i[: length - len(bos)]
        for i in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    encoders = [lambda x: x, *(sae.encode for sae in saes)]
    means = [
        torch.zeros(len(ids), width)
        for width in (len(saes[0].b_dec), *(len(sae.b_enc) for sae in saes))
    ]
    for rows, ids_BL, real_BL in padded(ids, tokenizer, device, desc):
        keep_BL = real_BL & sgo_sae.kept_tokens(ids_BL, tokenizer)
        x_ED, text_E = read(ids_BL)[keep_BL].float(), keep_BL.nonzero()[:, 0]
        for encode, mean_TN in zip(encoders, means, strict=True):
            part_EN = encode(x_ED)
            sum_BN = part_EN.new_zeros(len(rows), part_EN.shape[1]).index_add_(0, text_E, part_EN)
            mean_TN[rows] = (sum_BN / keep_BL.sum(1, keepdim=True).clamp(min=1)).cpu()
    return means[0], means[1:]


@torch.no_grad()
def word_activations(read, tokenizer, device, count, seed):
    """Activations (T, D) at the word of prompts that ask for its first letter after ten examples; the letters, 0 to 25.

    Words are the tokenizer's alphabetic tokens, with at most one space before them. Prompts are put together from token
    ids, so that a word is one, and end with it: what follows changes nothing there in a causal model.
    """
    rng, texts = random.Random(seed), tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    words = [(i, t.strip(" ")) for i, t in enumerate(texts) if re.fullmatch(" ?[A-Za-z]+", t)]
    words = rng.sample(words, min(count or len(words), len(words)))
    if len(words) < 100:
        raise InputError(f"the tokenizer has {len(words)} words, 100 are needed")
    tail, newline = (
        tokenizer(t, add_special_tokens=False)["input_ids"]
        for t in (" has the first letter:", "\n")
    )
    answers = [
        tokenizer(f" {c}", add_special_tokens=False)["input_ids"]
        for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ]
    letters, prompts = [ord(text[0].upper()) - ord("A") for _, text in words], []
    for word, _ in words:
        examples = [j for j in rng.sample(range(len(words)), 11) if words[j][0] != word][:10]
        prompts.append(
            sum(
                (newline + [words[j][0]] + tail + answers[letters[j]] for j in examples),
                bos_of(tokenizer),
            )
        )
        prompts[-1] += [*newline, word]
    order, found = [], []
    for rows, ids_BL, real_BL in padded(prompts, tokenizer, device, "words"):
        order += rows
        found.append(
            read(ids_BL)[torch.arange(len(rows), device=device), real_BL.sum(1) - 1].float()
        )
    return torch.cat(found)[torch.tensor(order).argsort()], torch.tensor(letters, device=device)


# --------------------------------------------------------------------------------------------- evaluation
class Evaluation:
    """Autoencoders of one language model and layer; `results`: for each {family: {key: value} or why there is none}."""

    def __init__(self, args, model, layer, saes, device, dtype):
        from transformers import AutoConfig

        self.args, self.saes, self.device, self.dtype = args, saes, device, dtype
        self.samples, self.notes = {}, []
        common = {"samples": self.samples, "notes": self.notes}
        self.results = [{"settings": getattr(sae.cfg, "settings", {}), **common} for sae in saes]
        first = self.results[0]["settings"]
        self.demo, self.bar = bool(first.get("demo")), {"unit": "SAE", "leave": False}
        asked = {
            "model": model,
            "layer": layer,
            "data_seed": args.seed,
            "ctx": first.get("ctx", 128),
        }
        if args.text or self.demo:
            asked["dataset"] = args.text or str(Path(model) / "heldout.jsonl")
        else:
            asked |= {k: first[k] for k in ("dataset", "subset", "text_column") if k in first} | {
                "split": "validation"
            }
            if "dataset" in asked and Path(asked["dataset"]).exists():
                raise InputError(
                    f"give --text: no text of {asked['dataset']} is known to be held out from training"
                )
        self.cfg = sgo_sae.Config(**asked)
        lm, module, self.tokenizer = sgo_sae.load_lm(model, layer, device, dtype)
        self.read = partial(sgo_sae.layer_output, lm, module)
        names = AutoConfig.from_pretrained(model).architectures or []
        self.head = any(re.search("CausalLM|LMHead|ConditionalGeneration", name) for name in names)
        for sae in saes:
            if len(sae.b_dec) != (D := lm.config.hidden_size):
                raise InputError(
                    f"the autoencoder is for {len(sae.b_dec)} dimensions, {model} has {D}"
                )
        self.train, self.test = (
            args.train or (500 if self.demo else 2000),
            args.test or (200 if self.demo else 500),
        )

    def record(self, family, values):
        for result, value in zip(
            self.results, values if isinstance(values, list) else [values] * len(self.saes)
        ):
            result[family] = value

    def text(self, families):
        """Reconstruction, behaviour and competition on contexts of text."""
        texts = (row[self.cfg.text_column] for row in sgo_sae.load_texts(self.cfg))  # once through
        contexts = sgo_sae.token_contexts(texts, self.tokenizer, self.cfg.ctx)
        ids_TL = torch.tensor(list(islice(contexts, self.args.contexts)), device=self.device)
        if not len(ids_TL):
            raise InputError(f"{self.cfg.dataset} does not fill a context of {self.cfg.ctx} tokens")
        if len(ids_TL) < self.args.contexts:
            have = f"{len(ids_TL)} contexts of {self.cfg.ctx} tokens, not {self.args.contexts}"
            self.notes.append(f"text: {self.cfg.dataset} has {have}")
        keep_TL = sgo_sae.kept_tokens(ids_TL, self.tokenizer)
        if "behaviour" in families and self.head:
            lm, module = load_whole(self.cfg.model, self.cfg.layer, self.device, self.dtype)
            self.record("behaviour", behaviour(lm, module, self.saes, ids_TL, keep_TL))
        elif "behaviour" in families:
            self.record("behaviour", "the model has no language-model head")
        parts = progress_bar(ids_TL.split(32), desc="activations", unit="batch", leave=False)
        x_TLD = torch.cat([self.read(ids_BL) for ids_BL in parts])
        x_TD = x_TLD[keep_TL]
        if self.args.html:  # what the page looks at again; documents are parted by EOS
            self.x_TLD, self.keep_TL, self.ids_TL = x_TLD, keep_TL, ids_TL
            self.document_TL = (
                (~keep_TL & (ids_TL != ids_TL[0, 0])).flatten().cumsum(0).view_as(ids_TL)
            )
        x_TD = x_TD[
            torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(self.args.seed)).to(
                self.device
            )
        ]
        self.samples["tokens"] = len(x_TD)
        for sae, result in zip(
            progress_bar(self.saes, desc="reconstruction", **self.bar), self.results
        ):
            if "core" in families:
                result["core"] = reconstruction(sae, x_TD, self.cfg.ctx)
            if "competition" in families:
                scale = getattr(sae.cfg, "activation_scale", 1.0)
                result["competition"] = competition(
                    sae, x_TD[: 8 * 2048], result["settings"], scale
                )

    def tasks(self, families):
        """Sparse probing and SCR: every text is read once, for all autoencoders."""
        args, sets = self.args, {"probe": PROBING, "scr": SPURIOUS}
        if families and (args.probe or self.demo):
            load = partial(file_tasks, args.probe) if args.probe else library_tasks
            sets["probe"], sets["scr"] = load(self.train, self.test, args.seed)
        for family in families:
            scores, double = [{} for _ in self.saes], 2 if family == "scr" else 1
            for task in sets[family]:
                try:
                    if not isinstance(task, Task):
                        task = benchmark_task(
                            *task, double * self.train, double * self.test, args.seed
                        )
                except InputError as error:
                    self.notes.append(f"{family}: a task is left out, {error}")
                    continue
                desc, length = f"{family}: {task.name}", args.length or (64 if self.demo else 128)
                x, latents = mean_latents(
                    self.read, self.tokenizer, self.saes, task.texts, length, self.device, desc
                )
                score_all = self.probing if family == "probe" else self.removal
                found = score_all(task, x, progress_bar(latents, desc=desc, **self.bar))
                for score, values in zip(scores, found):
                    score[task.name] = values
                self.samples[desc] = {
                    "train": int((~task.test).sum()),
                    "test": int(task.test.sum()),
                }
                self.notes += [f"{family}: {task.note}"] if task.note else []
            why = (
                "none of its datasets can be had"
                if sets[family]
                else "the probe file has no column `attribute`"
            )
            self.record(
                family, [mean_of(list(score.values())) if score else why for score in scores]
            )
            self.record(f"{family}_tasks", scores)

    def probing(self, task, x_TD, latents):
        fit, held, y_T = ~task.test, task.test, task.labels
        residual, *found = (
            sparse_probing(f_TN[fit], y_T[fit], f_TN[held], y_T[held], self.args.seed)
            for f_TN in chain([x_TD], latents)
        )
        common = {f"x_{k}": score for k, score in residual.items()}
        return [common | {f"latents_{k}": score for k, score in scores.items()} for scores in found]

    def removal(self, task, x_TD, latents):
        fit, held, a, b = ~task.test, task.test, task.labels, task.attribute
        probes = scr_probes(x_TD[fit], a[fit], b[fit], x_TD[held], a[held], b[held], self.args.seed)
        for f_TN, sae in zip(latents, self.saes):
            tests = (x_TD[held], f_TN[held], a[held], b[held], sae.W_dec.detach().cpu())
            yield {
                f"scr_{n}": score
                for n, score in scr(probes, f_TN[fit], a[fit], b[fit], *tests).items()
            }

    def absorption(self):
        """Absorption, its mean over --splits partitions of the words into training and test ones."""
        try:
            if not self.head:
                raise InputError("the model has no language-model head")
            x_TD, y_T = word_activations(
                self.read, self.tokenizer, self.device, self.args.words, self.args.seed
            )
            found = [[] for _ in self.saes]
            for seed in progress_bar(
                range(self.args.seed, self.args.seed + self.args.splits), desc="splits"
            ):
                order = torch.randperm(len(y_T), generator=torch.Generator().manual_seed(seed)).to(
                    self.device
                )
                fit, held = order[: len(y_T) * 4 // 5], order[len(y_T) * 4 // 5 :]
                parts = (x_TD[fit], y_T[fit], x_TD[held], y_T[held])
                probe = multi_probe(*parts[:2], batch=64, l2=1e-4, seed=seed)
                for sae, figures in zip(
                    progress_bar(self.saes, desc="absorption", **self.bar), found
                ):
                    figures.append(absorption(sae, *parts, probe, seed))
            self.record("absorption", [mean_of(figures) for figures in found])
            self.record("absorption_splits", found)
            self.samples["words"] = len(y_T)
        except InputError as error:
            self.record("absorption", str(error))


# -------------------------------------------------------------------------------------------------- table
HIGHER = r"cosine|explained_variance|.*_score|latents_.*|x_.*|scr_.*"  # is better; of these lower:
LOWER = r"mse.*|never_fire|dense|ce_sae|kl_sae|w_mean|mean_max.*|pairs_over_half|absorption|full"
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # two-sided 95 %, by degrees of freedom


def table(names, results, paired=False):
    """Markdown of results {family: {key: value} or reason}: a column per setting, mean ± standard deviation over seeds.

    paired: the difference to the first setting instead, seed by seed, and half its 95 % interval.
    """
    groups, runs = {}, ("seed", "out", "log_every", "save_every", "resume", "device")
    for name, result in zip(names, results, strict=True):
        setting = {k: v for k, v in result["settings"].items() if k not in runs} or {"run": name}
        flat = {
            (f, key): value
            for f in FAMILIES
            if type(result.get(f)) is dict
            for key, value in result[f].items()
        }
        seed, group = result["settings"].get("seed", name), json.dumps(setting, sort_keys=True)
        if seed in groups.get(group, ()):  # the same run again, in another folder
            group = json.dumps(setting | {"run": name}, sort_keys=True)
        groups.setdefault(group, {})[seed] = flat
    settings, seeds = [json.loads(group) for group in groups], list(groups.values())
    differing = [
        k
        for k in dict.fromkeys(k for s in settings for k in s)
        if len({str(s.get(k)) for s in settings}) > 1
    ]
    labels = [
        ", ".join(f"{k} {s[k]}" for k in differing if k in s) or Path(names[0]).name
        for s in settings
    ]
    lines = [
        [
            "",
            *(
                f"{label}, {len(s)} seeds" if len(s) > 1 else label
                for label, s in zip(labels, seeds)
            ),
        ]
    ]
    for family, key in dict.fromkeys(k for group in seeds for flat in group.values() for k in flat):
        cells = []
        for i, group in enumerate(seeds):
            values = {
                seed: flat[family, key] for seed, flat in group.items() if (family, key) in flat
            }
            if difference := paired and i > 0:
                shared = [seed for seed in values if (family, key) in seeds[0].get(seed, ())]
                values = {seed: values[seed] - seeds[0][seed][family, key] for seed in shared}
            cells.append(spread(list(values.values()), difference))
        arrow = " ↑" if re.fullmatch(HIGHER, key) else " ↓" if re.fullmatch(LOWER, key) else ""
        lines.append([f"{family}: {key.replace('_', ' ')}{arrow}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
        for line in lines
    ]
    rows = ["| " + " | ".join(line) + " |" for line in aligned]
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    notes = [
        f"{name}: not measured, {r[name]}"
        for name in FAMILIES
        for r in results
        if type(r.get(name)) is str
    ]
    notes = dict.fromkeys(notes + [note for r in results for note in r["notes"]])
    return "\n".join([rows[0], f"|{rule}|", *rows[1:], *(f"\n{note}" for note in notes)])


def spread(values, difference=False):
    """Mean ± standard deviation, of differences ± half the 95 % interval, with three or four digits that count."""
    if not values:
        return ""
    n, mean = len(values), statistics.mean(values)
    digits, sign = (
        0 if abs(mean) >= 1000 else 1 if abs(mean) >= 100 else 3,
        "+" if difference else "",
    )
    if n == 1:
        return f"{mean:{sign},.{digits}f}"
    deviation = statistics.stdev(values) * (STUDENT[min(n, 10) - 2] / n**0.5 if difference else 1)
    return f"{mean:{sign},.{digits}f} ± {deviation:,.{digits}f}"


# ---------------------------------------------------------------------------------------------- the page
STYLE = """:root { color-scheme: light dark } body { font: 15px/1.5 system-ui; max-width: 1200px; margin: auto }
body { padding: 1em } figure { margin: 0 } pre { overflow-x: auto } small, figcaption, pre { font-size: 13px }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px 24px }
text { font: 11px system-ui; fill: currentColor } path { fill: none; stroke: #8884; vector-effect: non-scaling-stroke }
svg svg { overflow: visible } svg [class] { stroke-width: 2 } summary { font-weight: 600 } .s0 { stroke: #2f8fd0 }
.s1 { stroke: #d55e00; stroke-dasharray: 6 } .s2 { stroke: #009e73; stroke-dasharray: 2 } .s3 { stroke: #cc79a7 }
.s4 { stroke: #b8860b; stroke-dasharray: 6 } .s5 { stroke: #777777; stroke-dasharray: 2 }
i { font-style: normal; background: color-mix(in srgb, #e69f00 calc(var(--a) * 1%), transparent) }
p { font: 13px/1.7 monospace; overflow-wrap: anywhere; margin: 2px 0 8px } .both { border-bottom: 3px solid #2f8fd0 }"""
FIGURES = {  # what it shows, x axis, y axis; from `explained_variance` on of training
    "w": (
        "Pairs of latents active together in 16 contexts, by how strongly they overlap.",
        "w",
        "log₁₀(1 + pairs)",
    ),
    "density": ("Latents by how often they are active.", "log₁₀ of the share of tokens", "latents"),
    "cosine": (
        "Latents by their decoder row's largest |cosine| with another.",
        "largest |cosine|",
        "latents",
    ),
    "explained_variance": (
        "Training: variance that is explained, of a batch.",
        "million tokens",
        "share",
    ),
    "penalty_share": (
        "Training: the penalty αΩ over the reconstruction term.",
        "million tokens",
        "ratio",
    ),
    "omega": ("Training: Ω of a batch, whatever its weight α.", "million tokens", "Ω"),
    "dead": (
        "Training: latents that no token of the last 200 steps activated.",
        "million tokens",
        "latents",
    ),
    "l0": ("Training: latents active on a token, mean of a batch.", "million tokens", "latents"),
}


def chart(lines, caption, x_name, y_name):
    """SVG of lines [(x, y), ...] with axes of about five round numbers, and a sentence that says what they show."""
    axes, parts = (
        [],
        [
            f'<text x="196" y="222" text-anchor="middle">{x_name}</text><text x="2" y="10">{y_name}</text>'
        ],
    )
    for values in zip(*chain(*lines)) if any(lines) else ([0], [0]):
        step = float(f"{(max(values) - min(values) or 1) / 4:.0e}")
        low = math.floor(min(values) / step)
        axes.append([step * n for n in range(low, max(low + 1, math.ceil(max(values) / step)) + 1)])
    for n, x in enumerate(xs := axes[0]):
        parts.append(
            f'<text x="{48 + 296 * n / (len(xs) - 1)}" y="204" text-anchor="middle">{x:.4g}</text>'
        )
    for n, y in enumerate(ys := axes[1]):
        Y = 190 - 162 * n / (len(ys) - 1)
        parts.append(f'<path d="M48 {Y}h296"/><text x="2" y="{Y}">{y:.4g}</text>')
    paths = ("L".join(f"{x:.6g} {-y:.6g}" for x, y in line) for line in lines)
    drawn = "".join(f'<path class="s{i % 6}" d="M{path}"/>' for i, path in enumerate(paths) if path)
    box = (
        f'viewBox="{xs[0]} {-ys[-1]} {xs[-1] - xs[0]} {ys[-1] - ys[0]}" preserveAspectRatio="none"'
    )
    parts.append(f'<svg x="48" y="28" width="296" height="162" {box}>{drawn}</svg>')
    return f'<figure><svg viewBox="0 0 360 230">{"".join(parts)}</svg><figcaption>{caption}</figcaption></figure>'


def closest_pairs(f_BN, count):
    """The `count` pairs (i, j) of most w_ij |M_i ∩ M_j|, and a histogram of w_ij over co-active pairs."""
    N, size_N, found, histogram = f_BN.shape[1], (f_BN > 0).sum(0), [], 0
    for lo in range(0, N, 1024):
        w_TN = sgo_sae.weights_between(f_BN[:, lo : lo + 1024], f_BN).triu(lo + 1)
        histogram += torch.histc(w_TN[w_TN > 0], 20, 0, 1)
        score_TN = w_TN.square() * torch.minimum(size_N[lo : lo + 1024, None], size_N)
        score, cell = score_TN.flatten().topk(min(count, score_TN.numel()))
        found += zip(score.tolist(), (cell // N + lo).tolist(), (cell % N).tolist())
    return [pair for score, *pair in sorted(found, reverse=True)[:count] if score], histogram


@torch.no_grad()
def portrait(e, sae, label, wanted, head, sample=12):
    """HTML of an autoencoder's closest pairs and some other latents; its lines of FIGURES.

    Pairs are sought in 16 contexts, about a batch, and counted in all of them; only what is shown is kept.
    """
    N, every = len(sae.b_enc), max(1, len(e.x_TLD) // 16)
    some = slice(None, 16 * every, every)
    pairs, histogram = closest_pairs(sae.encode(e.x_TLD[some][e.keep_TL[some]].float()), 20)
    others, fired_N, kept, parts = [*wanted, *range(0, N, max(1, N // sample))], 0, [], []
    latents = list(dict.fromkeys([*chain(*pairs), *others]))
    for x_BLD, keep_BL in zip(e.x_TLD.split(16), e.keep_TL.split(16)):
        f_BLN = sae.encode(x_BLD.float()) * keep_BL[..., None]
        fired_N += (f_BLN > 0).sum((0, 1))
        kept.append(f_BLN[..., latents])
    f_TL_of = dict(zip(latents, torch.cat(kept).unbind(-1)))

    def show(i, other_TL):
        f_TL, (peak_T, at_T), places = f_TL_of[i], f_TL_of[i].max(1), {}
        parts.append(f"<div><small>latent {i}, on {fired_N[i]:,} tokens</small>")
        for word, sign in (("raises", 1), ("lowers", -1)) if head else ():
            best = (sign * head(sae.W_dec[i].to(e.dtype))).topk(8).indices[:, None]
            words = html.escape("  ".join(map(repr, e.tokenizer.batch_decode(best))))
            parts.append(f"<br><small>{word} {words}</small>")
        for t in peak_T.argsort(descending=True)[: int((peak_T > 0).sum())].tolist():
            places.setdefault(e.document_TL[t, at_T[t]].item(), (t, at_T[t].item()))
        for t, at in list(places.values())[:3]:
            parts.append("<p>")
            for n in range(max(0, at - 16), min(f_TL.shape[1], at + 9)):
                a, token = (
                    f_TL[t, n].item(),
                    html.escape(e.tokenizer.decode([e.ids_TL[t, n].item()])),
                )
                both, shade = (
                    ' class="both"' if other_TL[t, n] > 0 else "",
                    15 + 75 * a / peak_T.max(),
                )
                token = (
                    f'<i{both} style="--a:{shade:.0f}" title="{a:.3g}">{token}</i>'
                    if a > 0
                    else token
                )
                parts.append(token.replace("\n", "⏎"))
        parts.append("</div>")

    parts.append(f"<details open><summary>{label}: the pairs that compete most</summary>")
    for i, j in pairs:
        both, cosine = (
            int((f_TL_of[i] * f_TL_of[j] > 0).sum()),
            F.cosine_similarity(*sae.W_dec[[i, j]], dim=0),
        )
        w = both / min(fired_N[i], fired_N[j])
        parts.append(
            f"<h4>w {w:.2f}, both on {both:,} tokens, cosine of decoder rows {cosine:.2f}</h4><div class=row>"
        )
        show(i, f_TL_of[j])
        show(j, f_TL_of[i])
        parts.append("</div>")
    parts.append(f"</details><details><summary>{label}: other latents</summary><div class=row>")
    for i in others:
        show(i, torch.zeros_like(e.keep_TL))
    log_N, share = (fired_N / e.keep_TL.sum()).log10(), nearest_cosine(sae.W_dec)
    bars = {
        "w": (0, 1, histogram.log1p() / math.log(10)),
        "density": (-5, 0, torch.histc(log_N, 20, -5, 0)),
    }
    bars["cosine"], lines = (0, 1, torch.histc(share, 20, 0, 1)), {}
    for name, (lo, hi, n_20) in bars.items():
        edges = torch.linspace(lo, hi, 21).repeat_interleave(2)[1:-1].tolist()
        lines[name] = list(zip(edges, n_20.repeat_interleave(2).tolist()))
    return "".join([*parts, "</div></details>"]), lines


def page(e, markdown, runs, wanted):
    """One HTML file: what an Evaluation of these runs found, as its table says it, and what is in them."""
    found, keys = [], ""
    head = None
    if e.head:
        head = load_whole(e.cfg.model, e.cfg.layer, e.device, e.dtype)[0].get_output_embeddings()
    for i, (run, sae) in enumerate(progress_bar(list(zip(runs, e.saes)), desc="page", **e.bar)):
        label, file = html.escape(run), Path(run, "metrics.jsonl")
        keys += f'<svg width="32" height="8"><path class="s{i % 6}" d="M0 4H32"/></svg> {label}<br>'
        text, lines = portrait(e, sae, label, wanted, head)
        rows = [json.loads(line) for line in file.open()] if file.exists() else []
        found.append(
            (
                text,
                {name: [(m["tokens"] / 1e6, m[name]) for m in rows] for name in list(FIGURES)[3:]}
                | lines,
            )
        )
    charts = "".join(chart([lines[name] for _, lines in found], *FIGURES[name]) for name in FIGURES)
    title = f"{html.escape(Path(e.cfg.model).name)}, layer {e.cfg.layer}: which latents compete"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style><h2>{title}</h2>{keys}<div>
Latents compete where they are active on the same tokens: w = |M_i ∩ M_j| / min(|M_i|, |M_j|), M_i the tokens on which
latent i is active, of {int(e.keep_TL.sum()):,}. Text is shaded by activation, underlined where both are active.</div>
<div class=row>{charts}</div>{"".join(text for text, _ in found)}<pre>{html.escape(markdown)}</pre></html>"""


# --------------------------------------------------------------------------------------------------- main
def open_sae(path, device):
    """An autoencoder as SAEBench measures it: decoder rows of unit length where that changes no latent's being active.

    path: a folder of SAELens's format or Gemma Scope's params.npz, on disk or as OWNER/NAME/PATH on the Hub.
    """
    import numpy

    place = Path(path)
    if not place.exists() and len(place.parts) > 2:
        from huggingface_hub import snapshot_download

        repository, inside = "/".join(place.parts[:2]), "/".join(place.parts[2:])
        with sgo_sae.loading(repository):
            place = (
                Path(snapshot_download(repository, allow_patterns=[inside, f"{inside}/*"])) / inside
            )
    place = place / "params.npz" if (place / "params.npz").exists() else place
    if place.suffix == ".npz":
        with sgo_sae.loading(path):
            weights = {
                name: torch.from_numpy(array).float() for name, array in numpy.load(place).items()
            }
            weights["theta"] = weights.pop("threshold")
            weights["b_enc"] = (
                weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
            )  # it does not subtract b_dec
            (N, D), layer = weights["W_dec"].shape, re.search(r"layer_(\d+)", str(path))
            sae = sgo_sae.ThresholdSAE(D, N, N)
            sae.load_state_dict(weights)
            cfg = {"hook_name": f"blocks.{layer[1]}.hook_resid_post" if layer else None}
    else:
        sae, cfg = sgo_sae.load_sae(place), json.loads(Path(place, "cfg.json").read_text())
    sae.cfg = SAEConfig(
        **({"model_from_pretrained_kwargs": {}} | (cfg.pop("metadata", None) or {}) | cfg)
    )
    if hasattr(sae, "theta"):  # with thresholds the same latents stay active
        sgo_sae.fold_decoder_norms(sae)
    return sae.to(device)


class SAEConfig(argparse.Namespace):
    """What SAEBench asks of `sae.cfg`: model_name, hook_name, hook_layer, context_size, d_in, d_sae, ..."""

    def to_dict(self):
        return json.loads(json.dumps(vars(self), default=vars))


class BenchmarkSAE(nn.Module):
    """The autoencoder of a RUN with the interface that SAEBench asks for."""

    def __init__(self, path, device="cpu"):
        super().__init__()
        self.sae = open_sae(path, device)
        self.cfg, self.encode, self.decode, self.forward = (
            self.sae.cfg,
            self.sae.encode,
            self.sae.decode,
            self.sae.forward,
        )

    W_enc = property(lambda self: self.sae.W_enc)
    b_enc = property(lambda self: self.sae.b_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_dec = property(lambda self: self.sae.b_dec)
    device = property(lambda self: self.sae.W_dec.device)
    dtype = property(lambda self: self.sae.W_dec.dtype)


def origin(sae, args, path):
    """Model and layer of an autoencoder."""
    hook = getattr(sae.cfg, "hook_name", None)
    known = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook or "")
    if not known and (hook or args.layer is None):
        raise InputError(
            f"{path} names {hook} as its hook: hook_resid_post is needed, or none and --layer"
        )
    model = args.model or getattr(sae.cfg, "model_name", None) or sgo_sae.Config.model
    return model, args.layer if args.layer is not None else int(known[1])


def parse_args(argv):
    parser = sgo_sae.new_parser("eval_sae.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of an SAE or of a grid of them, or Gemma Scope's params.npz",
    )
    add("--metrics", nargs="+", choices=FAMILIES, default=FAMILIES, help="families to measure")
    add("--model", help="language model, where a RUN does not name one that can be loaded")
    add("--layer", type=int, help="layer, where a RUN does not name it")
    add(
        "--text",
        help="text for core, behaviour, competition; else the demo's or the dataset's split `validation`",
    )
    add("--probe", help="csv, jsonl or parquet file with text, label and, for SCR, attribute")
    add(
        "--contexts",
        type=int,
        default=512,
        help="contexts of text for core, behaviour and competition",
    )
    add("--train", type=int, help="training texts of each class (default: 2000, of the demo's 500)")
    add("--test", type=int, help="test texts of each class (default: 500, of the demo's 200)")
    add("--length", type=int, help="tokens of a text (default: 128, of the demo's 64)")
    add("--words", type=int, help="words of the absorption task (default: all of the tokenizer's)")
    add(
        "--splits",
        type=int,
        default=1,
        help="partitions of the words over which absorption is averaged",
    )
    add(
        "--paired",
        action="store_true",
        help="differences to the first setting, seed by seed, with 95 %% intervals",
    )
    add("--device", default="auto", help="cuda, cpu; auto is cuda where there is one")
    add(
        "--dtype",
        default="auto",
        choices=sgo_sae.CHOICES["dtype"],
        help="the model's; auto is bfloat16 on cuda, else float32",
    )
    add("--seed", type=int, default=0, help="seed of samples and probes")
    add(
        "--html",
        metavar="FILE",
        help="write a page to look at: pairs that compete most, latents, curves, the table",
    )
    add(
        "--latents",
        type=lambda text: [*map(int, text.split(","))],
        default=[],
        help="latents to add: 12,345",
    )
    args = parser.parse_args(argv)
    runs, args.runs = args.runs, []
    for run in runs:
        members = sorted(str(path.parent) for path in Path(run).glob("*/cfg.json"))
        args.runs += members if members and not (Path(run) / "cfg.json").exists() else [run]
    for name in ("contexts", "train", "test", "length", "words", "splits"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, but is {getattr(args, name)}")
    return args


MEMORY_ADVICE = "smaller --contexts, --train, --test and --words need less"


def work(argv):
    args = parse_args(argv)
    device, dtype = sgo_sae.find_device(args.device, args.dtype)
    torch.manual_seed(args.seed)
    saes = [open_sae(run, device) for run in args.runs]
    if wrong := [i for i in args.latents for sae in saes if not 0 <= i < len(sae.b_enc)]:
        raise InputError(
            f"--latents {wrong[0]}: the latents are 0 to {min(len(sae.b_enc) for sae in saes) - 1}"
        )
    place, *others = dict.fromkeys(origin(sae, args, run) for sae, run in zip(saes, args.runs))
    if others:
        raise InputError(
            f"{place} and {others[0]}: autoencoders of several models or layers need a call for each"
        )
    evaluation = Evaluation(args, *place, saes, device, dtype)
    text = [family for family in ("core", "behaviour", "competition") if family in args.metrics]
    if text or args.html:
        evaluation.text(text)
    evaluation.tasks([family for family in ("probe", "scr") if family in args.metrics])
    if "absorption" in args.metrics:
        evaluation.absorption()
    for run, result in zip(args.runs, evaluation.results):
        if Path(run).exists():
            path = (
                Path(run) / "eval.json"
                if Path(run).is_dir()
                else Path(run).with_suffix(".eval.json")
            )
            path.write_text(
                json.dumps({"command": vars(args), "torch": torch.__version__, **result}, indent=2)
            )
    print(markdown := table(args.runs, evaluation.results, args.paired))
    if args.html:
        Path(args.html).write_text(
            page(evaluation, markdown, args.runs, args.latents), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(sgo_sae.main(sys.argv[1:], work, "eval_sae.py", MEMORY_ADVICE))
