"""Evaluate sparse autoencoders by the definitions of SAEBench 0.6.0.

    python eval_sae.py RUN [RUN ...]               a table; the figures go to eval.json in each RUN
    python eval_sae.py RUN --metrics core probe    some of the families; --help lists every setting
    python eval_sae.py RUN [RUN ...] --paired      differences between settings, with intervals
    python eval_sae.py RUN [RUN ...] --html FILE   and a page: which latents compete, on what text

A RUN is a folder that sgo_sae.py or SAELens wrote, a folder of such folders, or a params.npz of
Gemma Scope, on disk or on the Hub as OWNER/NAME/PATH.

The sections, in this order:

    text           core and behaviour: how well the reconstruction stands for the activation
    competition    which latents are active together more often than chance
    probes         logistic regressions, sparse probing, spurious correlation removal (SCR)
    absorption     latents that take over what another should say
    tasks          the labelled texts of probing and SCR
    model          the language model, and reading it
    autoencoders   everybody's files, and the interface that SAEBench asks for
    evaluation     one method for each family, and eval.json
    table          means, differences and intervals
    page           the HTML page
    main           from the command line to the table

Shapes are named as in sgo_sae.py. Besides, T are texts, words or tokens, U those of a test part, V
words on new prompts, E the tokens of a batch of texts, C letters, S chosen latents and R what is
put in place of an activation.
"""

import argparse
import html
import itertools
import json
import math
import random
import re
import sys
import zlib
from collections import Counter
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy
import pandas
import torch
import torch.nn.functional as F
from torch import nn

import sgo_sae
from sgo_sae import InputError, progress_bar

FAMILIES = ("core", "behaviour", "competition", "probe", "scr", "absorption")


# --------------------------------------------------------------------------------------------- text
@torch.no_grad()
def reconstruction(sae, x_TD, ctx=128):
    """How well x̂ stands for x over all tokens: a dict of figures, in the units of x.

    `mse` is per element. `mse_benchmark` is SAEBench's figure: it divides a token's squared error
    by the number of tokens in its evaluation batch, 16 contexts without their BOS.
    """
    x_TD = x_TD.float()
    T, D = x_TD.shape
    xhat_TD = torch.empty_like(x_TD)
    fired_N = torch.zeros(len(sae.b_enc), device=x_TD.device)
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
        "mse_benchmark": error_T.mean() / (16 * (ctx - 1)),
        "cosine": F.cosine_similarity(x_TD, xhat_TD, dim=1).mean(),
        "l0": fired_N.double().sum() / T,
        "l1": l1,
        "norm_ratio": (xhat_TD.norm(dim=1) / x_TD.norm(dim=1)).mean(),
        "bias": xhat_TD.square().sum() / (x_TD * xhat_TD).sum(),
        "never_fire": (fired_N == 0).float().mean(),
        "dense": (fired_N > T / 10).float().mean(),
    }
    return {name: figure.item() for name, figure in figures.items()}


@torch.inference_mode()
def behaviour(lm, layer, saes, ids_TL, kept_TL):
    """Cross-entropy and KL divergence with x̂ in place of x, in nats: a dict for each autoencoder.

    Beside them stand those of the clean model and of one whose x is zero. With an autoencoder, the
    tokens that are not kept have their own activations; zeroed are all. Means are over kept tokens.
    """
    replacements = [lambda x, kept: x, lambda x, kept: torch.zeros_like(x)]
    replacements += [partial(reconstructed, sae) for sae in saes]
    ce_R = torch.zeros(len(replacements), dtype=torch.double)
    kl_R = torch.zeros_like(ce_R)
    # The logits of four contexts of Gemma-2 are 0.5 GB.
    rows = max(1, 2**27 // (ids_TL.shape[1] * lm.config.get_text_config().vocab_size))
    parts = list(zip(ids_TL.split(rows), kept_TL.split(rows)))
    for ids_BL, kept_BL in progress_bar(parts, desc="behaviour", leave=False):
        next_E1 = ids_BL.roll(-1, 1)[kept_BL][:, None]
        has_next_E = kept_BL.nonzero()[:, 1] < ids_BL.shape[1] - 1
        for n, replace in enumerate(replacements):
            log_q_EV = log_probabilities(lm, layer, ids_BL, kept_BL, replace)
            if n == 0:
                log_p_EV = log_q_EV
                p_EV = log_p_EV.exp()
            ce_R[n] -= log_q_EV.gather(1, next_E1)[has_next_E].double().sum().item()
            kl_R[n] += torch.linalg.vecdot(p_EV, log_p_EV - log_q_EV).double().sum().item()
    ce_clean, ce_zero, *ce_saes = (ce_R / kept_TL[:, :-1].sum().item()).tolist()
    _, kl_zero, *kl_saes = (kl_R / kept_TL.sum().item()).tolist()
    figures = []
    for ce, kl in zip(ce_saes, kl_saes):
        scores = {"ce_score": (ce_zero - ce) / (ce_zero - ce_clean), "kl_score": 1 - kl / kl_zero}
        nats = {"ce_clean": ce_clean, "ce_sae": ce, "ce_zero": ce_zero}
        figures.append({**scores, **nats, "kl_sae": kl, "kl_zero": kl_zero})
    return figures


def reconstructed(sae, x_BLD, kept_BL):
    return torch.where(kept_BL[..., None], sae(x_BLD.float()).to(x_BLD.dtype), x_BLD)


def log_probabilities(lm, layer, ids_BL, kept_BL, replace):
    """Log-probabilities (E, V) of the token after each kept one, with replace(x) for x."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (replace(output[0], kept_BL), *output[1:])
        return replace(output, kept_BL)

    handle = layer.register_forward_hook(hook)
    logits_BLV = lm(input_ids=ids_BL).logits
    handle.remove()
    return logits_BLV[kept_BL].float().log_softmax(-1)


def mean_of(dicts):
    """The mean of dicts, key by key; of no dicts an empty one."""
    return pandas.DataFrame(dicts).mean().to_dict()


# -------------------------------------------------------------------------------------- competition
RARE = 20  # latents that are active on fewer tokens are not compared
DENSE = 0.1  # and those that are active on a larger share of the tokens


@torch.no_grad()
def shared_tokens(sae, x_TD, batch=2048):
    """On how many tokens each pair of latents is active (N, N); the diagonal has |M_i|."""
    N = len(sae.b_enc)
    shared_NN = torch.zeros(N, N, device=x_TD.device)  # exact up to 2^24 tokens
    for x_BD in x_TD.split(batch):
        active_BN = (sae.encode(x_BD.float()) > 0).float()
        shared_NN.addmm_(active_BN.T, active_BN)
    return shared_NN


def over_chance(shared_NN, n_tokens):
    """What w_ij of Eq. 3 is over chance, of each pair i < j of compared latents once.

    It goes by rows I of the matrix: (latents I, latents J, w over chance (I, J)). Compared are the
    latents that are neither rare nor dense: one that fires once has w = 1 with all its neighbours,
    and one that fires on most tokens has a large w with every other latent, by chance. Independent
    latents share |M_i| |M_j| / T tokens on average, so that their w is max(|M_i|, |M_j|) / T, and
    their w over chance is 0 on average.
    """
    fired_N = shared_NN.diagonal()
    columns_J = ((fired_N >= RARE) & (fired_N <= DENSE * n_tokens)).nonzero()[:, 0]
    fired_J = fired_N[columns_J]
    for rows_I in columns_J.split(1024):
        fired_I1 = fired_N[rows_I, None]
        w_IJ = shared_NN[rows_I][:, columns_J] / torch.minimum(fired_I1, fired_J)
        over_IJ = w_IJ - torch.maximum(fired_I1, fired_J) / n_tokens
        yield rows_I, columns_J, over_IJ.masked_fill_(rows_I[:, None] >= columns_J, 0)


def competition(sae, x_TD):
    """Competition of latents over the tokens: a dict of figures.

    `pairs_over_chance` counts the pairs whose w is over chance by more than 0.5, and
    `w_over_chance` is the mean over all pairs. Rare and dense latents are counted apart.
    """
    shared_NN = shared_tokens(sae, x_TD)
    n_over = 0
    total = 0.0
    n_pairs = 0
    for rows_I, columns_J, over_IJ in over_chance(shared_NN, len(x_TD)):
        n_over += (over_IJ > 0.5).sum().item()
        total += over_IJ.sum(dtype=torch.double).item()
        n_pairs += (rows_I[:, None] < columns_J).sum().item()
    fired_N = shared_NN.diagonal()
    return {
        "pairs_over_chance": n_over,
        "w_over_chance": total / max(1, n_pairs),
        "rare": (fired_N < RARE).double().mean().item(),
        "dense": (fired_N > DENSE * len(x_TD)).double().mean().item(),
        "mean_max_cos": nearest_cosine(sae.W_dec).mean().item(),
    }


@torch.no_grad()
def penalty_share(sae, x_BD, alpha, scale):
    """αΩ over the reconstruction term of a batch, in the units of training, x times `scale`."""
    f_BN = sae.encode(x_BD.float())
    error = (x_BD - sae.decode(f_BN)).square().sum(1).mean() * scale**2
    return (alpha * sgo_sae.sgo_penalty_dense(f_BN * scale) / error).item()


@torch.no_grad()
def nearest_cosine(W_dec_ND):
    """The largest |cosine| of each decoder row with another (N,)."""
    W_ND = F.normalize(W_dec_ND, dim=1)
    nearest = []
    for rows_I in torch.arange(len(W_ND), device=W_ND.device).split(1024):
        cosine_IN = (W_ND[rows_I] @ W_ND.T).abs()
        cosine_IN.scatter_(1, rows_I[:, None], 0)
        nearest.append(cosine_IN.amax(1))
    return torch.cat(nearest)


# ------------------------------------------------------------------------------------------- probes
class Probe(NamedTuple):
    """A linear probe: positive where w·x + b > 0."""

    w_D: torch.Tensor
    b: torch.Tensor

    def is_positive(self, x_TD):
        return x_TD.to(self.w_D.dtype) @ self.w_D + self.b > 0


def logistic_regression(x_TS, y_T, weight_T=None):
    """L2-regularised logistic regression as scikit-learn defines it, with C = 1: a Probe.

    Its w (S,) and b minimise ½‖w‖² + Σ_t weight_t log(1 + exp(-±(w·x_t + b))), in float64.
    """
    x_TS = x_TS.double()
    y_T = y_T.double()
    w_S = torch.zeros_like(x_TS[0]).requires_grad_()
    b = torch.zeros_like(x_TS[0, 0]).requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [w_S, b],
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        lbfgs.zero_grad()
        logits_T = x_TS @ w_S + b
        loss = F.binary_cross_entropy_with_logits(logits_T, y_T, weight_T, reduction="sum")
        loss = loss + w_S.square().sum() / 2
        loss.backward()
        return loss

    lbfgs.step(objective)
    return Probe(w_S.detach(), b.detach())


def linear_probe(x_TD, y_T, x_UD, y_U, generator, epochs, batch, lr, l1=0.0, patience=10):
    """SAEBench's probe on many columns, by AdamW: that of the epoch with the best test accuracy.

    It ends after `epochs`, or after `patience` of them without a better one.
    """
    D = x_TD.shape[1]
    y_T = y_T.float()
    w_D = ((2 * torch.rand(D, generator=generator) - 1) / D**0.5).to(x_TD.device).requires_grad_()
    b = torch.zeros((), device=x_TD.device).requires_grad_()
    adam = torch.optim.AdamW([w_D, b], lr=lr, fused=True)
    best_score = -1.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(batch):
            loss = F.binary_cross_entropy_with_logits(x_TD[rows] @ w_D + b, y_T[rows])
            loss = loss + l1 * w_D.abs().sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        score = accuracy(x_UD, y_U, Probe(w_D, b))
        if score > best_score:
            best_score = score
            best_epoch = epoch
            best = Probe(w_D.detach().clone(), b.detach().clone())
        if epoch - best_epoch >= patience:
            break
    return best


@torch.no_grad()
def accuracy(x_TD, y_T, probe):
    """The share of texts whose label the probe tells."""
    return (probe.is_positive(x_TD) == y_T.bool()).float().mean().item()


def class_and_others(labels_T, c, generator):
    """Rows of the texts of class c, and of as many random others, evenly from the other classes."""
    order_T = torch.randperm(len(labels_T), generator=generator).to(labels_T.device)
    rows_of = [order_T[labels_T[order_T] == label] for label in labels_T.unique()]
    mine = rows_of.pop(c)
    share = math.ceil(len(mine) / len(rows_of))
    others = torch.cat([rows[:share] for rows in rows_of])
    return torch.cat([mine, others[: len(mine)]])


def sparse_probing(f_TN, labels_T, n_train, seed=0):
    """Test accuracy of probes that tell a class from as many other texts, meaned over the classes.

    The first `n_train` texts are to train on. Keys: "1", "2", "5" and "20", logistic regressions
    on as many latents, those whose means differ most between class and others; and "all", a linear
    probe on all latents. Chance is half.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for c in labels_T.unique().tolist():
        train = class_and_others(labels_T[:n_train], c, generator)
        test = n_train + class_and_others(labels_T[n_train:], c, generator)
        x_TN = f_TN[train]
        x_UN = f_TN[test]
        y_T = labels_T[train] == c
        y_U = labels_T[test] == c
        order_N = (x_TN[y_T].mean(0) - x_TN[~y_T].mean(0)).abs().argsort(descending=True)
        scores = {}
        for k in (1, 2, 5, 20):
            top_S = order_N[:k]
            probe = logistic_regression(x_TN[:, top_S], y_T)
            scores[str(k)] = accuracy(x_UN[:, top_S], y_U, probe)
        on_all = linear_probe(x_TN, y_T, x_UN, y_U, generator, epochs=100, batch=250, lr=1e-2)
        scores["all"] = accuracy(x_UN, y_U, on_all)
        found.append(scores)
    return mean_of(found)


def scr_rows(a_T, b_T):
    """Rows of two sets of texts, given their attributes a and b, 0 or 1.

    In the clean set each combination of a and b is a quarter. In the biased set a = b. Each has as
    many texts as its smallest combination allows.
    """
    cells = [(2 * a_T + b_T == cell).nonzero()[:, 0] for cell in range(4)]
    quarter = min(len(cell) for cell in cells)
    half = min(len(cells[0]), len(cells[3]))
    clean = torch.cat([cell[:quarter] for cell in cells])
    return clean, torch.cat([cells[0][:half], cells[3][:half]])


def scr_probes(x_TD, a_T, b_T, n_train, seed=0):
    """SCR's probes on mean activations: of a and of b on the clean sets, and the biased one."""
    generator = torch.Generator().manual_seed(seed)
    clean_T, biased_T = scr_rows(a_T[:n_train], b_T[:n_train])
    clean_U, biased_U = scr_rows(a_T[n_train:], b_T[n_train:])
    # SAEBench lets all of them train for all of their epochs.
    options = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "l1": 1e-3}

    def probe(y_T, train, test):
        test = test + n_train
        return linear_probe(x_TD[train], y_T[train], x_TD[test], y_T[test], generator, **options)

    on_clean = [probe(y_T, clean_T, clean_U) for y_T in (a_T, b_T)]
    return on_clean, probe(a_T, biased_T, biased_U)


@torch.no_grad()
def scr(probes, biased, x_TD, f_TN, attributes, n_train, W_dec_ND):
    """Spurious correlation removal: a dict of scores, 1 where ablation mends the biased probe.

    x are mean activations and f mean latents of texts, the first `n_train` to train on. Of the two
    directions, the scores are those of the one in which the biased probe is less accurate. To set
    latents to 0 and add the reconstruction error back takes f_S W_dec_S from the activation of each
    token, and so from the mean.
    """
    clean_T, _ = scr_rows(*(y_T[:n_train] for y_T in attributes))
    clean_U, _ = scr_rows(*(y_T[n_train:] for y_T in attributes))
    clean_U += n_train
    x_UD = x_TD[clean_U]
    before = [accuracy(x_UD, y_T[clean_U], biased) for y_T in attributes]
    wanted = 0 if before[0] <= before[1] else 1
    unwanted = 1 - wanted
    y_U = attributes[wanted][clean_U]
    gap = accuracy(x_UD, y_U, probes[wanted]) - before[wanted]
    z_T = attributes[unwanted][clean_T].bool()
    difference_N = f_TN[clean_T[z_T]].mean(0) - f_TN[clean_T[~z_T]].mean(0)
    effect_N = (difference_N * (W_dec_ND @ probes[unwanted].w_D)).abs()
    order_N = effect_N.argsort(descending=True)[: int((effect_N > 0).sum())]
    scores = {}
    for n in (2, 5, 10, 20, 50, 100, 500):
        top_S = order_N[:n]
        ablated_UD = x_UD - f_TN[clean_U[:, None], top_S] @ W_dec_ND[top_S]
        gain = accuracy(ablated_UD, y_U, biased) - before[wanted]
        scores[f"scr_{n}"] = gain / gap if gap >= 0.001 else 0.0
    return scores


# --------------------------------------------------------------------------------------- absorption
def f1(predicted_T, true_T):
    hits = (predicted_T & true_T).sum().item()
    return 2 * hits / max(1, predicted_T.sum().item() + true_T.sum().item())


def multi_probe(x_TD, y_T, batch, l2, l1=0.0, encode=lambda x_BD: x_BD, seed=0):
    """The weights (C, D) and biases (C,) of SAEBench's probe of all 26 letters at once.

    Positive words are weighted by their rarity. Where `encode` is given, the probe is on latents
    (C, N): they are computed batch by batch, since those of all words would take 18 GB at
    N 32,768.
    """
    torch.manual_seed(seed)
    epochs = 50
    width = encode(x_TD[:1]).shape[1]
    probe = nn.Linear(width, 26).to(x_TD.device)
    y_TC = F.one_hot(y_T, 26).float()
    rarity_C = (len(y_T) - y_TC.sum(0)) / y_TC.sum(0).clamp(min=1)
    adam = torch.optim.Adam(probe.parameters(), lr=0.01, weight_decay=l2, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, (1e-5 / 0.01) ** (1 / epochs))
    for _ in progress_bar(range(epochs), desc="letters", unit="epoch", leave=False):
        for rows in torch.randperm(len(x_TD)).to(x_TD.device).split(batch):
            with torch.no_grad():
                f_BN = encode(x_TD[rows])
            loss = F.binary_cross_entropy_with_logits(probe(f_BN), y_TC[rows], pos_weight=rarity_C)
            if l1:
                loss = loss + l1 * probe.weight.abs().sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
    return probe.weight.detach(), probe.bias.detach()


def letter_split(f_TS, y_T, f_US, y_U, gain=0.03):
    """How many latents S, best first, share a letter: one more must lift F1 by over `gain`."""
    n_positive = y_T.sum()
    weight_T = len(y_T) / 2 / torch.where(y_T, n_positive, len(y_T) - n_positive)
    best = 0.0
    for k in range(1, f_TS.shape[1] + 1):
        probe = logistic_regression(f_TS[:, :k], y_T, weight_T)
        score = f1(probe.is_positive(f_US[:, :k]), y_U)
        if k > 1 and score - best <= gain:
            return k - 1
        best = score
    return f_TS.shape[1]


@torch.no_grad()
def absorbed_share(f_VN, x_VD, W_dec_ND, direction_D, split_S):
    """The absorption fraction of each word (V,), and whether it is fully absorbed (V,).

    Given are the letter's probe direction and the latents of its split. It is the definition of
    Chanin et al. (2024) with SAEBench's thresholds.
    """
    direction_D = F.normalize(direction_D, dim=0)
    cosine_N = F.normalize(W_dec_ND, dim=1) @ direction_D
    projection_VN = f_VN * cosine_N
    target_V = x_VD @ direction_D
    main_V = projection_VN[:, split_S].sum(1)
    others_VN = torch.where(cosine_N >= 0.1, projection_VN.clamp(min=0), 0)
    others_VN[:, split_S] = 0
    absorbers_V = others_VN.topk(min(3, others_VN.shape[1]), dim=1).values.sum(1)
    absorbed_V = torch.minimum(absorbers_V, target_V - main_V)
    share_V = torch.where(main_V <= 0, 1.0, absorbed_V / (absorbed_V + main_V)).clamp(0, 1)
    share_V[(main_V >= target_V) | (absorbers_V < 0.4 * target_V) | (target_V <= 0)] = 0
    top_V = projection_VN.argmax(1)
    full_V = (f_VN[:, split_S] <= 1e-8).all(1) & (cosine_N[top_V] >= 0.025) & (target_V >= 0)
    carried_V = projection_VN.gather(1, top_V[:, None])[:, 0]
    return share_V, full_V & (carried_V >= 0.4 * target_V)


def recognised_words(x_UD, y_U, W_CD, b_C):
    """Which words (U,) the probe W finds, of letters that the residual stream spells: F1 over 0.6.

    InputError if these are under 20 letters, as in SAEBench.
    """
    positive_UC = x_UD @ W_CD.T + b_C > 0
    spelled = [c for c in range(26) if f1(positive_UC[:, c], y_U == c) > 0.6]
    if len(spelled) < 20:
        raise InputError(f"the model spells {len(spelled)} of 26 letters, 20 are needed")
    own_U = positive_UC.gather(1, y_U[:, None])[:, 0]
    return own_U & torch.isin(y_U, torch.tensor(spelled, device=y_U.device))


@torch.no_grad()
def latents_of(sae, x_TD, chosen_CS, batch=4096):
    """The latents that are chosen for each letter (T, C, S), encoded batch by batch."""
    return torch.cat([sae.encode(x_BD)[:, chosen_CS] for x_BD in x_TD.split(batch)])


def absorption(sae, x_TD, y_T, x_UD, y_U, x_VD, y_V, W_CD, seed=0):
    """Absorption and full absorption, meaned over letters: a dict of figures.

    x are activations at words and y their letters, 0 to 25: of T training words, U test words and
    those V of the test words that the probe W recognises, these on new prompts. Letters that no
    word in V has do not count.
    """
    sparse_CN, _ = multi_probe(
        x_TD, y_T, batch=4096, l2=1e-6, l1=0.01, encode=sae.encode, seed=seed
    )
    candidates_CS = sparse_CN.topk(min(10, sparse_CN.shape[1]), dim=1).indices
    f_TCS = latents_of(sae, x_TD, candidates_CS)
    f_UCS = latents_of(sae, x_UD, candidates_CS)
    found = []
    for c in y_V.unique().tolist():
        n_split = letter_split(f_TCS[:, c], y_T == c, f_UCS[:, c], y_U == c)
        x_of_c = x_VD[y_V == c]
        with torch.no_grad():
            f_of_c = sae.encode(x_of_c)
        share_V, full_V = absorbed_share(
            f_of_c, x_of_c, sae.W_dec.detach(), W_CD[c], candidates_CS[c, :n_split]
        )
        figures = {"absorption": share_V.mean().item(), "full": full_V.float().mean().item()}
        found.append({**figures, "split_latents": n_split})
    return {**mean_of(found), "letters": len(found)}


# -------------------------------------------------------------------------------------------- tasks
# The texts of a task are a pandas frame with the columns text, label, attribute (0 where there is
# none) and is_test, in the order of their source.
def cell_sizes(name, frame):
    """How many texts each is_test, label and attribute has; InputError where one has under 20."""
    sizes = frame.groupby(["is_test", "label", "attribute"]).size()
    n_labels = frame["label"].nunique()
    if n_labels < 2 or len(sizes) < 2 * n_labels * frame["attribute"].nunique() or min(sizes) < 20:
        raise InputError(f"{name}: 20 texts of each label are needed, to train and to test on")
    return sizes


def numbered(chosen):
    """The chosen texts, those to train on first, labels and attributes numbered in sorted order."""
    chosen = chosen.sort_values("is_test", kind="stable", ignore_index=True)
    for column in ("label", "attribute"):
        chosen[column] = pandas.factorize(chosen[column], sort=True)[0]
    return chosen


def probing_task(name, frame, train, test, seed):
    """`train` and `test` random texts of each label, as many of each attribute; and notes.

    Where one label has fewer, each has as many as that.
    """
    sizes = cell_sizes(name, frame)
    chosen = []
    notes = []
    for is_test, wanted in ((False, train), (True, test)):
        wanted //= frame["attribute"].nunique()
        count = min(wanted, sizes[is_test].min())
        groups = frame[frame["is_test"] == is_test].groupby(["label", "attribute"])
        chosen.append(groups.sample(count, random_state=seed))
        if count < wanted:
            part = "test" if is_test else "training"
            notes.append(f"{name}: {count} {part} texts of a label and attribute, not {wanted}")
    return numbered(pandas.concat(chosen).sample(frac=1, random_state=seed)), notes


def scr_task(name, frame, train, test):
    """The first texts of each combination of two labels and two attributes; and notes.

    `train` and `test` of them where both are the first or both the second, else half as many. So
    SAEBench takes them, whatever the seed.
    """
    cell_sizes(name, frame)
    is_biased = frame["label"].rank(method="dense") == frame["attribute"].rank(method="dense")
    wanted = frame["is_test"].map({False: train, True: test}) // (2 - is_biased)
    nth = frame.groupby(["is_test", "label", "attribute"]).cumcount()
    chosen = frame[nth < wanted]
    lacks = len(chosen) < 3 * (train + test)
    notes = [f"{name}: {len(chosen)} texts, not {3 * (train + test)}"] if lacks else []
    return numbered(chosen), notes


def library_frames():
    """Frames of the demo's tasks, each by name, two of probing and one of SCR.

    The texts are paragraphs of the standard library: the label is the package, and the attribute
    is whether it has a docstring.
    """
    rows = []
    for file, text in sgo_sae.library_texts():
        is_test = zlib.crc32(file.encode()) % 3 == 0  # no file is in both parts
        for paragraph in text.split("\n\n"):
            if len(paragraph) > 80:
                rows.append((paragraph[:300], file.split("/")[0], '"""' in paragraph, is_test))
    frame = pandas.DataFrame(rows, columns=["text", "label", "attribute", "is_test"])
    # A module of one file has texts in one of the parts alone.
    sizes = frame.groupby(["label", "is_test"]).size().unstack(fill_value=0)
    largest = sizes.min(axis=1).nlargest(5).index
    frame = frame[frame["label"].isin(largest)]
    probing = {
        "package": frame.assign(attribute=0),
        "docstring or not": frame.assign(label=frame["attribute"], attribute=0),
    }
    return probing, {"docstrings of two packages": frame[frame["label"].isin(largest[:2])]}


def file_frames(path):
    """Frames of a local file: of a probing task, and of SCR where it has a column `attribute`.

    A fifth of the texts are test texts. SCR takes the first two labels and attributes.
    """
    with sgo_sae.loading(path):
        frame = pandas.DataFrame(list(sgo_sae.open_dataset(sgo_sae.Config(dataset=path))))
    if not {"text", "label"} <= set(frame):
        raise InputError(f"{path} needs the columns text and label, and has {', '.join(frame)}")
    has_text = frame["text"].map(lambda text: isinstance(text, str) and text.strip() != "")
    frame = frame[has_text & frame["label"].notna()]
    frame = frame.assign(is_test=frame["text"].map(lambda text: zlib.crc32(text.encode()) % 5 == 0))
    name = Path(path).stem
    probing = {name: frame.assign(attribute=0)}
    if "attribute" not in frame:
        return probing, {}
    pair = frame[frame["attribute"].notna()]
    for column in ("label", "attribute"):
        pair = pair[pair[column].rank(method="dense") <= 2]
    return probing, {name: pair}


# Of the datasets of SAEBench: the name on the Hub, and the columns of text, label and attribute.
BIOS = ("LabHC/bias_in_bios", "hard_text", "profession", "gender")
AMAZON = ("canrager/amazon_reviews_mcauley_1and5", "text", "category", "rating")
SENTIMENT = ("canrager/amazon_reviews_mcauley_1and5", "text", "rating", None)
NEWS = ("fancyzhx/ag_news", "text", "label", None)
EUROPARL = ("Helsinki-NLP/europarl", "translation", None, None)
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
PROBING = {  # with the classes
    "bias_in_bios 1": (BIOS, [0, 1, 2, 6, 9]),
    "bias_in_bios 2": (BIOS, [11, 13, 14, 18, 19]),
    "bias_in_bios 3": (BIOS, [20, 21, 22, 25, 26]),
    "amazon category": (AMAZON, [1, 2, 3, 5, 6]),
    "amazon sentiment": (SENTIMENT, [1.0, 5.0]),
    "ag_news": (NEWS, [0, 1, 2, 3]),
    "europarl": (EUROPARL, [*LANGUAGES]),
}
SPURIOUS = {  # with the first and the second class, as SAEBench pairs them
    "professor, nurse": (BIOS, [21, 13]),
    "architect, journalist": (BIOS, [1, 11]),
    "surgeon, psychologist": (BIOS, [25, 22]),
    "attorney, teacher": (BIOS, [2, 26]),
    "books, CDs": (AMAZON, [24, 26]),
    "software, electronics": (AMAZON, [30, 6]),
    "pets, office": (AMAZON, [18, 11]),
    "industrial, toys": (AMAZON, [3, 1]),
}


def hub_frame(source, classes):
    """The texts of one of SAEBench's datasets, the labels being the positions of their classes."""
    import datasets

    name, text, label, attribute = source
    parts = []
    with sgo_sae.loading(name):
        if source == EUROPARL:  # it has no test split, and a configuration for each language
            for n, (language, subset) in enumerate(LANGUAGES.items()):
                rows = datasets.load_dataset(name, subset, split="train[:4000]").to_pandas()
                frame = rows.assign(text=rows[text].str.get(language), label=n, attribute=0)
                parts.append(frame.assign(is_test=frame.index % 5 == 0))
        else:
            for split in ("train", "test"):
                rows = datasets.load_dataset(name, split=split).to_pandas()
                rows = rows[rows[label].isin(classes)]
                frame = rows.assign(text=rows[text], label=rows[label].map(classes.index))
                frame["attribute"] = rows[attribute] if attribute else 0
                parts.append(frame.assign(is_test=split == "test"))
    return pandas.concat(parts)


def load_tasks(family, args, demo, notes):
    """The tasks of probing or of SCR: name and frame; one that can't be had is a line of notes."""
    train = args.train or (500 if demo else 2000)
    test = args.test or (200 if demo else 500)
    is_scr = family == "scr"
    if args.probe:
        pairs = [file_frames(path)[is_scr] for path in args.probe]
        frames = dict(itertools.chain(*(pair.items() for pair in pairs)))
    elif demo:
        frames = library_frames()[is_scr]
    else:
        frames = SPURIOUS if is_scr else PROBING
        if not is_scr:
            notes.append("github-code is left out, since `datasets` does not load it any more")
    for name, frame in frames.items():
        try:
            if isinstance(frame, tuple):
                frame = hub_frame(*frame)
            if is_scr:
                chosen, lacking = scr_task(name, frame, train, test)
            else:
                chosen, lacking = probing_task(name, frame, train, test, args.seed)
        except InputError as error:
            notes.append(f"a task is left out, {error}")
        else:
            notes += lacking
            yield name, chosen


# -------------------------------------------------------------------------------------------- model
class LayerReached(Exception):
    """Ends a forward pass of the language model, whose later layers nobody needs."""


class LanguageModel:
    """A language model, whole if it has a head, one of its layers, and its tokenizer."""

    def __init__(self, name, layer, device, dtype):
        from transformers import AutoConfig

        with sgo_sae.loading(name):
            saved_as = AutoConfig.from_pretrained(name).architectures or []
        heads = "CausalLM|LMHead|ConditionalGeneration"
        self.has_head = bool(re.search(heads, " ".join(saved_as)))
        loaded = sgo_sae.load_lm(name, layer, device, dtype, whole=self.has_head)
        self.lm, self.layer, self.tokenizer = loaded
        self.width = self.lm.config.get_text_config().hidden_size
        self.bos = sgo_sae.first_id(self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)

    def ids(self, lists):
        """Token ids (B, L) on the device, filled up on the right with -1."""
        parts = [torch.tensor(ids) for ids in lists]
        ids_BL = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)
        n_tokens = self.lm.get_input_embeddings().num_embeddings
        if ids_BL.max() >= n_tokens:
            raise InputError(
                f"the tokenizer gives the id {ids_BL.max()} of {n_tokens} in the model"
            )
        return ids_BL.to(self.lm.device)

    def kept(self, ids_BL):
        """The positions (B, L) that count: all but the first, special tokens and the filling."""
        return sgo_sae.kept_tokens(ids_BL, self.tokenizer) & (ids_BL >= 0)

    @torch.inference_mode()
    def read(self, ids_BL):
        """The layer's output (B, L, D); in a causal model the filling on the right changes none."""
        outputs = []

        def hook(module, args, output):
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise LayerReached

        handle = self.layer.register_forward_hook(hook)
        with suppress(LayerReached):
            self.lm(input_ids=ids_BL.clamp(min=0))
        handle.remove()
        return outputs[0]

    def batches(self, lists, desc, batch=64):
        """The rows and token ids (B, L) of batches of like length."""
        order = sorted(range(len(lists)), key=lambda t: len(lists[t]))
        starts = range(0, len(order), batch)
        for start in progress_bar(starts, desc=desc, unit="batch", leave=False):
            rows = order[start : start + batch]
            yield rows, self.ids([lists[t] for t in rows])


@torch.no_grad()
def mean_latents(model, saes, texts, desc, length=128):
    """Means over each text's kept tokens, of the activations (T, D) and each SAE's latents (T, N).

    A text is its first `length` tokens, BOS among them. The means are on the CPU.
    """
    ids = model.tokenizer(texts, add_special_tokens=False).input_ids
    ids = [model.bos + i[: length - len(model.bos)] for i in ids]
    encoders = [lambda x_ED: x_ED] + [sae.encode for sae in saes]
    widths = [model.width] + [len(sae.b_enc) for sae in saes]
    means = [torch.empty(len(texts), width) for width in widths]
    for rows, ids_BL in model.batches(ids, desc):
        kept_BL = model.kept(ids_BL)
        x_ED = model.read(ids_BL)[kept_BL].float()
        text_E = kept_BL.nonzero()[:, 0]
        n_B1 = kept_BL.sum(1, keepdim=True).clamp(min=1)
        for encode, mean_TN in zip(encoders, means):
            f_EN = encode(x_ED)
            sum_BN = f_EN.new_zeros(len(rows), f_EN.shape[1]).index_add_(0, text_E, f_EN)
            mean_TN[rows] = (sum_BN / n_B1).cpu()
    return means


def alphabetic_words(tokenizer):
    """Token ids and letters, 0 to 25, of the tokens that are words, maybe after a space."""
    words = []
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        if re.fullmatch(" ?[A-Za-z]+", text):
            words.append((i, ord(text.strip().upper()[0]) - ord("A")))
    return words


@torch.no_grad()
def spelled_activations(model, words, vocabulary, rng, desc):
    """Activations (T, D) at words whose first letter a prompt asks for after ten random examples.

    A prompt ends with the word, since what follows changes nothing there in a causal model. It is
    put together from token ids, so that the word is one token.
    """
    newline, question, *answers = model.tokenizer(
        ["\n", " has the first letter:", *(f" {chr(65 + c)}" for c in range(26))],
        add_special_tokens=False,
    ).input_ids
    prompts = []
    for word, _ in words:
        others = [other for other in rng.sample(vocabulary, 11) if other[0] != word]
        prompt = list(model.bos)
        for example, letter in others[:10]:
            prompt += newline + [example] + question + answers[letter]
        prompts.append(prompt + newline + [word])
    x_TD = torch.empty(len(prompts), model.width, device=model.lm.device)
    for rows, ids_BL in model.batches(prompts, desc):
        last_B = (ids_BL >= 0).sum(1) - 1
        x_TD[rows] = model.read(ids_BL)[torch.arange(len(rows)), last_B].float()
    return x_TD


# ------------------------------------------------------------------------------------- autoencoders
def open_sae(path, device):
    """An autoencoder as SAEBench measures it, with the settings `cfg` that SAEBench asks for.

    Its decoder rows have unit length wherever that changes no latent's being active. The path is
    a folder of SAELens's format or a params.npz of Gemma Scope, on disk or OWNER/NAME/PATH.
    """
    place = Path(path)
    if not place.exists() and len(place.parts) > 2:
        from huggingface_hub import snapshot_download

        repository = "/".join(place.parts[:2])
        inside = "/".join(place.parts[2:])
        with sgo_sae.loading(repository):
            folder = snapshot_download(repository, allow_patterns=[inside, f"{inside}/*"])
        place = Path(folder, inside)
    if (place / "params.npz").exists():
        place = place / "params.npz"
    if place.suffix == ".npz":
        sae, cfg = open_gemma_scope(place)
    else:
        sae = sgo_sae.load_sae(place)
        cfg = json.loads(Path(place, "cfg.json").read_text())
    metadata = cfg.pop("metadata", None) or {}
    sae.cfg = SAEConfig(**{"model_from_pretrained_kwargs": {}, **metadata, **cfg})
    if hasattr(sae, "theta"):
        sgo_sae.fold_decoder_norms(sae)
    return sae.to(device)


def open_gemma_scope(file):
    """The autoencoder of a params.npz, and what its path says of it."""
    with sgo_sae.loading(str(file)):
        arrays = numpy.load(file)
        weights = {name: torch.from_numpy(arrays[name]).float() for name in arrays}
        N, D = weights["W_dec"].shape
        sae = sgo_sae.ThresholdSAE(D, N, N)
        weights["theta"] = weights.pop("threshold")
        weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]  # it does not subtract b_dec
        sae.load_state_dict(weights)
    layer = re.search(r"layer_(\d+)", str(file))
    return sae, {"hook_name": f"blocks.{layer[1]}.hook_resid_post" if layer else None}


class SAEConfig(argparse.Namespace):
    """What SAEBench asks of `sae.cfg`: model_name, hook_name, hook_layer, context_size, ..."""

    def to_dict(self):
        return json.loads(json.dumps(vars(self), default=vars))


class BenchmarkSAE(nn.Module):
    """The autoencoder of a RUN with the interface that SAEBench asks for."""

    def __init__(self, path, device="cpu"):
        super().__init__()
        self.sae = open_sae(path, device)
        self.forward = self.sae.forward

    def __getattr__(self, name):
        if name in ("cfg", "encode", "decode", "W_enc", "b_enc", "W_dec", "b_dec"):
            return getattr(self.sae, name)
        if name in ("device", "dtype"):
            return getattr(self.sae.W_dec, name)
        return super().__getattr__(name)


# Settings of training that name no column of the table.
FREE = ("seed", "out", "log_every", "save_every", "resume", "device")


class Subject:
    """An autoencoder that is evaluated, what is known of it, and what eval.json says of it."""

    def __init__(self, path, device):
        self.path = path
        self.sae = open_sae(path, device)
        cfg = vars(self.sae.cfg)
        training = cfg.get("settings", {})
        self.training = training
        self.settings = {name: value for name, value in training.items() if name not in FREE}
        self.seed = training.get("seed", 0)
        self.scale = cfg.get("activation_scale", 1.0)
        self.model = cfg.get("model_name")
        self.hook = cfg.get("hook_name")
        self.ctx = cfg.get("context_size")
        dataset = training.get("dataset", cfg.get("dataset_path"))
        text = (dataset, training.get("subset"), training.get("text_column", "text"))
        self.text = text if dataset else None
        local = Path(path)
        self.file = local / "eval.json" if local.is_dir() else local.with_suffix(".eval.json")
        self.results = {}
        if self.file.exists():
            with sgo_sae.loading(str(self.file)):
                known = json.loads(self.file.read_text()).items()
                self.results = {name: record for name, record in known if "figures" in record}

    def layer(self):
        """The number of the layer whose output it is for, or None where it does not say."""
        # The names of TransformerLens and of Hugging Face's modules.
        names = r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)*(?:layers|h)\.(\d+)"
        known = re.fullmatch(names, self.hook or "")
        if self.hook and not known:
            raise InputError(
                f"{self.path} is for {self.hook}, and only a layer's output is measured"
            )
        return int(known[1] or known[2]) if known else None

    def keep(self, family, record):
        """Puts what was measured into eval.json, where there is a folder for it."""
        self.results[family] = record
        if Path(self.path).exists():
            self.file.write_text(json.dumps(self.results, indent=2))


def agreed(values, flag):
    """The value that all of those have that have one, or None."""
    known = set(values) - {None}
    if len(known) > 1:
        raise InputError(f"the runs differ, {sorted(map(str, known))}: give {flag}")
    return known.pop() if known else None


# --------------------------------------------------------------------------------------- evaluation
class Evaluation:
    """Autoencoders of one layer, what they are measured with, and a method for each family.

    A family's method returns for each autoencoder a dict of the parts that it was measured on
    (a task, a partition of the words), each with a dict of figures. It sets `sample`, how much was
    used, and adds to `notes` what lacked. It raises InputError where it can't be measured.
    """

    def __init__(self, args, subjects, device, dtype):
        self.args = args
        self.subjects = subjects
        self.device = device
        self.dtype = dtype
        self.demo = all(subject.training.get("demo") for subject in subjects)
        models = (subject.model for subject in subjects)
        named = args.model or agreed(models, "--model, or a call for each model")
        layer = agreed((subject.layer() for subject in subjects), "a call for each layer")
        self.name = named or sgo_sae.Config.model
        self.layer = layer if args.layer is None else args.layer
        if self.layer is None:
            raise InputError("the runs do not name their layer: give --layer")
        free = ("runs", "metrics", "resume", "paired", "html", "device")
        self.settings = {name: value for name, value in vars(args).items() if name not in free}
        self.settings.update(model=self.name, layer=self.layer, dtype=str(dtype))

    def measure(self, family):
        """Measures a family and puts it into eval.json; with --resume, what is not there yet."""
        self.measured = []
        for subject in self.subjects:
            known = subject.results.get(family, {}).get("settings")
            if not (self.args.resume and known == self.settings):
                self.measured.append(subject)
        if not self.measured:
            return
        self.sample = {}
        self.notes = []
        try:
            found = getattr(self, family)([subject.sae for subject in self.measured])
        except InputError as error:
            self.notes.append(f"not measured, {error}")
            found = [{}] * len(self.measured)
        for subject, parts in zip(self.measured, found):
            record = {
                "figures": mean_of(list(parts.values())),
                "parts": parts,
                "sample": self.sample,
                "notes": self.notes,
                "settings": self.settings,
            }
            subject.keep(family, record)

    @cached_property
    def model(self):
        model = LanguageModel(self.name, self.layer, self.device, self.dtype)
        for subject in self.subjects:
            D = len(subject.sae.b_dec)
            if D != model.width:
                raise InputError(
                    f"{subject.path} is for {D} dimensions, the model has {model.width}"
                )
        return model

    def text_config(self):
        """Where the text of core, behaviour and competition comes from: the same for all."""
        ctx = self.args.ctx or agreed((subject.ctx for subject in self.subjects), "--ctx")
        config = sgo_sae.Config(ctx=ctx or 128, data_seed=self.args.seed)
        if self.args.text or self.demo:
            config.dataset = self.args.text or f"{self.name}/heldout.jsonl"
            return config
        config.split = "validation"
        text = agreed((subject.text for subject in self.subjects), "--text")
        if text:
            config.dataset, config.subset, config.text_column = text
        if Path(config.dataset).exists():
            raise InputError(f"give --text: no text of {config.dataset} is known to be held out")
        return config

    @cached_property
    def contexts(self):
        """Contexts of text (T, L), and which of their tokens count (T, L)."""
        config = self.text_config()
        model = self.model
        texts = (row[config.text_column] for row in sgo_sae.load_texts(config))  # once through
        contexts = sgo_sae.token_contexts(texts, model.tokenizer, config.ctx)
        lists = list(itertools.islice(contexts, self.args.contexts))
        if not lists:
            raise InputError(f"{config.dataset} does not fill a context of {config.ctx} tokens")
        ids_TL = model.ids(lists)
        return ids_TL, model.kept(ids_TL)

    @cached_property
    def activations(self):
        """Activations (T, L, D) of the contexts, in the model's dtype."""
        parts = self.contexts[0].split(32)
        bar = progress_bar(parts, desc="activations", unit="batch", leave=False)
        return torch.cat([self.model.read(ids_BL) for ids_BL in bar])

    def text(self):
        """The contexts' ids (T, L) and kept tokens (T, L); sets the sample."""
        ids_TL, kept_TL = self.contexts
        self.sample = {"contexts": len(ids_TL), "tokens": kept_TL.sum().item()}
        if len(ids_TL) < self.args.contexts:
            self.notes.append(f"the text has {len(ids_TL)} contexts, not {self.args.contexts}")
        return ids_TL, kept_TL

    def core(self, saes):
        ids_TL, kept_TL = self.text()
        x_TD = self.activations[kept_TL]
        return [{"text": reconstruction(sae, x_TD, ids_TL.shape[1])} for sae in each(saes, "core")]

    def behaviour(self, saes):
        model = self.model
        if not model.has_head:
            raise InputError("the model has no language-model head")
        found = behaviour(model.lm, model.layer, saes, *self.text())
        return [{"text": figures} for figures in found]

    def competition(self, saes):
        _, kept_TL = self.text()
        x_TD = self.activations[kept_TL]
        generator = torch.Generator().manual_seed(self.args.seed)
        batch = torch.randperm(len(x_TD), generator=generator)[:2048].to(x_TD.device)
        found = []
        for subject in each(self.measured, "competition"):
            figures = competition(subject.sae, x_TD)
            if "alpha" in subject.training:
                alpha = subject.training["alpha"]
                share = penalty_share(subject.sae, x_TD[batch], alpha, subject.scale)
                figures["penalty_share"] = share
            found.append({"text": figures})
        return found

    def tasks(self, family, saes):
        """Task by task: its name, its number of training texts, their labels and attributes (2, T),
        and the means over its texts of activations and of each autoencoder's latents.

        Every text is read once, for all autoencoders.
        """
        for name, chosen in load_tasks(family, self.args, self.demo, self.notes):
            n_train = int((~chosen["is_test"]).sum())
            self.sample[name] = {"train": n_train, "test": len(chosen) - n_train}
            columns = torch.tensor(chosen[["label", "attribute"]].to_numpy(), device=self.device)
            desc = f"{family}: {name}"
            means = mean_latents(self.model, saes, chosen["text"].tolist(), desc)
            yield name, n_train, columns.T, (f_TN.to(self.device) for f_TN in each(means, desc))
        if not self.sample:
            raise InputError("it has no task, or none whose texts can be had")

    def probe(self, saes):
        found = [{} for _ in saes]
        for name, n_train, (label_T, _), means in self.tasks("probe", saes):
            scores = [sparse_probing(f_TN, label_T, n_train, self.args.seed) for f_TN in means]
            residual = {f"x_{k}": score for k, score in scores[0].items()}
            for parts, own in zip(found, scores[1:]):
                latents = {f"latents_{k}": score for k, score in own.items()}
                parts[name] = {**latents, **residual}
        return found

    def scr(self, saes):
        found = [{} for _ in saes]
        for name, n_train, attributes, means in self.tasks("scr", saes):
            x_TD = next(means)
            probes = scr_probes(x_TD, *attributes, n_train, self.args.seed)
            for parts, f_TN, sae in zip(found, means, saes):
                parts[name] = scr(*probes, x_TD, f_TN, attributes, n_train, sae.W_dec)
        return found

    def absorption(self, saes):
        model = self.model
        seed = self.args.seed
        rng = random.Random(seed)
        vocabulary = alphabetic_words(model.tokenizer)
        n_words = min(self.args.words or len(vocabulary), len(vocabulary))
        if n_words < 100:
            raise InputError(f"there are {n_words} words, 100 are needed")
        self.sample = {"words": n_words}
        words = rng.sample(vocabulary, n_words)
        x_TD = spelled_activations(model, words, vocabulary, rng, "words")
        y_T = torch.tensor([letter for _, letter in words], device=x_TD.device)
        found = [{} for _ in saes]
        for split in range(seed, seed + self.args.splits):
            order_T = torch.randperm(n_words, generator=torch.Generator().manual_seed(split))
            train, test = order_T.to(x_TD.device).tensor_split([n_words * 4 // 5])
            probe = multi_probe(x_TD[train], y_T[train], batch=64, l2=1e-4, seed=split)
            scored = test[recognised_words(x_TD[test], y_T[test], *probe)]
            # They are scored on new prompts, as in SAEBench.
            again = [words[t] for t in scored.tolist()]
            x_VD = spelled_activations(model, again, vocabulary, rng, "new prompts")
            data = (x_TD[train], y_T[train], x_TD[test], y_T[test], x_VD, y_T[scored], probe[0])
            for parts, sae in zip(found, each(saes, "absorption")):
                parts[f"partition {split}"] = absorption(sae, *data, split)
        return found


def each(work, desc):
    return progress_bar(work, desc=desc, unit="SAE", leave=False)


# -------------------------------------------------------------------------------------------- table
# The figures of which more is better, and those of which less is.
HIGHER = re.compile(r".*(: cosine|explained_variance|_score|latents_.*|: x_.*|scr_.*)")
LOWER = re.compile(
    r".*(mse.*|never_fire|dense|rare|ce_sae|kl_sae|over_chance|max_cos|: absorption|full)"
)


def name_subjects(subjects):
    """Gives each a `name`, that of its column: the settings in which it differs from the others.

    Runs that differ in their seeds alone have the same. Those that don't say how they were trained
    are named after their folder.
    """
    trained = [subject for subject in subjects if subject.settings]
    values = pandas.DataFrame([subject.settings for subject in trained]).astype(str)
    differing = [key for key in values if values[key].nunique() > 1]
    taken = set()
    for subject in subjects:
        words = [f"{key} {subject.settings[key]}" for key in differing if key in subject.settings]
        first = trained[0] if subject.settings else subject
        subject.name = ", ".join(words) or Path(first.path.removesuffix("/params.npz")).name
        if (subject.name, subject.seed) in taken:  # the same again, in another folder
            subject.name = subject.path
        taken.add((subject.name, subject.seed))


def baseline_of(subjects):
    """The name of the setting that others are compared with: the first unpenalised topk, else the
    first setting of all."""
    for subject in subjects:
        if subject.settings.get("arch") == "topk" and subject.settings["alpha"] == 0:
            return subject.name
    return subjects[0].name


def table(subjects, families, baseline=None):
    """Markdown: a line for each figure, a column for each setting, mean ± deviation over its seeds.

    With a baseline, the other columns are differences to it, seed by seed, and the last one is half
    the 95 % interval of such a difference.
    """
    rows = []
    notes = []
    for subject in subjects:
        for family in families:
            record = subject.results[family]
            notes += [f"{family}: {note}" for note in record["notes"]]
            for key, value in record["figures"].items():
                rows.append((f"{family}: {key}", subject.name, subject.seed, value))
    seeds = Counter(subject.name for subject in subjects)
    settings = sorted(seeds, key=lambda name: name != baseline)
    head = [f"{name}, {seeds[name]} seeds" if seeds[name] > 1 else name for name in settings]
    if baseline:
        head.append("±")
        notes.append(
            f"All but the first column are differences to {baseline}; ± is half their 95 % "
            "interval, from the variance of all settings. **Better** and _worse_ lie outside it."
        )
    lines = [["", *head]]
    frame = pandas.DataFrame(rows, columns=["figure", "setting", "seed", "value"])
    for figure, part in frame.groupby("figure", sort=False):
        values = part.pivot(index="seed", columns="setting", values="value")
        values = values.reindex(columns=settings)
        sign = int(bool(HIGHER.fullmatch(figure))) - int(bool(LOWER.fullmatch(figure)))
        cells = paired_cells(values, sign) if baseline else map(mean_cell, values.T.to_numpy())
        lines.append([figure.replace("_", " ") + ("", " ↑", " ↓")[sign], *cells])
    return "\n\n".join([markdown(lines), *dict.fromkeys(notes)])


def markdown(lines):
    """Lines of cells as a table in Markdown, of which the first line is the head."""
    columns = []
    for cells in zip(*lines):
        width = max(map(len, cells))
        align = str.rjust if columns else str.ljust
        head, *others = [align(cell, width) for cell in cells]
        columns.append([head, "-" * (width - 1) + ":", *others])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def decimals(number):
    """How many decimals show two digits of a number that count."""
    return max(0, 1 - math.floor(math.log10(abs(number)))) if number else 0


def mean_cell(values_S):
    """The mean ± standard deviation over seeds, or one value with four digits that count."""
    values_S = values_S[~numpy.isnan(values_S)]
    if len(values_S) == 0:
        return ""
    mean = values_S.mean()
    if len(values_S) == 1 or not values_S.std():
        return f"{mean:,.{decimals(mean / 100)}f}"
    deviation = values_S.std(ddof=1)
    digits = decimals(deviation)
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


def paired_cells(values, sign):
    """Cells for a frame of seeds by settings, whose first column is the baseline.

    The variance of a difference comes from what seed and setting together leave unexplained, over
    all settings: with three seeds, that of one setting alone would be luck.
    """
    complete = values.dropna(axis=1, how="all").dropna()
    S, R = complete.shape
    baseline = values.columns[0]
    if S == 0 or baseline not in complete:
        return [""] * (len(values.columns) + 1)
    half = 0.0
    freedom = (S - 1) * (R - 1)
    if freedom:
        residual = complete.sub(complete.mean(axis=1), axis=0)
        residual -= residual.mean()
        variance = residual.pow(2).sum(axis=None) / freedom
        half = student_t(freedom) * math.sqrt(2 * variance / S)
    level = complete[baseline].mean()
    digits = decimals(half or level / 100)
    cells = [f"{level:,.{digits}f}"]
    changes = complete.sub(complete[baseline], axis=0).mean().reindex(values.columns[1:])
    for change in changes:
        text = "" if math.isnan(change) else f"{change:+,.{digits}f}"
        if half and sign and abs(change) > half:
            text = f"**{text}**" if change * sign > 0 else f"_{text}_"
        cells.append(text)
    return [*cells, f"{half:,.{digits}f}" if half else ""]


def student_t(freedom):
    """The 97.5 % quantile of Student's t; the density of atan(t / √freedom) is a power of cos."""
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 1_000_001, dtype=torch.double)
    share = angle.cos().pow(freedom - 1).cumsum(0)
    quantile = torch.searchsorted(share, 0.975 * share[-1])
    return math.sqrt(freedom) * math.tan(angle[quantile])


# --------------------------------------------------------------------------------------------- page
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui; max-width: 1200px; margin: auto; padding: 1em }
figure { margin: 0 }
pre { overflow-x: auto }
small, figcaption, pre { font-size: 13px }
.row { display: grid; gap: 12px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)) }
text { font: 11px system-ui; fill: currentColor }
path { fill: none; stroke: #8884 }
path[class] { stroke-width: 2 }
.key { display: inline-block; margin-right: 1.5em }
.s0 { stroke: #2f8fd0 }
.s1 { stroke: #d55e00; stroke-dasharray: 6 }
.s2 { stroke: #009e73; stroke-dasharray: 2 }
.s3 { stroke: #cc79a7 }
.s4 { stroke: #b8860b; stroke-dasharray: 6 }
.s5 { stroke: #777777; stroke-dasharray: 2 }
summary { font-weight: 600 }
i { font-style: normal;
  background: color-mix(in srgb, #e69f00 calc(var(--a) * 1%), transparent) }
p { font: 13px/1.7 monospace; overflow-wrap: anywhere; margin: 2px 0 8px }
.both { border-bottom: 3px solid #2f8fd0 }
"""
CHARTS = {  # what a chart shows, its x axis and its y axis
    "over": ("Pairs by how much their w is over chance", "w over chance", "log₁₀(1 + pairs)"),
    "explained_variance": ("Explained variance in training", "million tokens", "share"),
    "penalty_share": ("αΩ over the reconstruction term in training", "million tokens", "ratio"),
    "omega": ("Ω in training, whatever its weight α", "million tokens", "Ω"),
    "dead": ("Latents inactive for 200 steps, in training", "million tokens", "latents"),
}


def ticks(values):
    """About five round numbers, 1, 2 or 5 times a power of ten apart, that enclose the values."""
    raw = (max(values) - min(values)) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.floor(min(values) / step)
    return [step * n for n in range(first, math.ceil(max(values) / step) + 1)]


def chart(lines, caption, x_name, y_name):
    """An SVG of lines [(x, y), ...], or nothing where all of their values are the same."""
    points = [point for line in lines for point in line]
    if len({x for x, _ in points}) < 2 or len({y for _, y in points}) < 2:
        return ""
    xs = ticks([x for x, _ in points])
    ys = ticks([y for _, y in points])

    def across(x):
        return 56 + 288 * (x - xs[0]) / (xs[-1] - xs[0])

    def down(y):
        # It ends above the frame, so that a line on the axis can be seen.
        return 184 - 150 * (y - ys[0]) / (ys[-1] - ys[0])

    parts = [f'<path d="M48 22V190H352"/><text x="2" y="12">{y_name}</text>']
    parts.append(f'<text x="200" y="224" text-anchor="middle">{x_name}</text>')
    for x in xs:
        parts.append(f'<text x="{across(x):.1f}" y="205" text-anchor="middle">{x:.4g}</text>')
    for y in ys:
        parts.append(f'<path d="M48 {down(y):.1f}h304"/>')
        parts.append(f'<text x="42" y="{down(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for n, line in enumerate(lines):
        path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in line)
        if path:
            parts.append(f'<path class="s{n % 6}" d="M{path}"/>')
    svg = f'<svg viewBox="0 0 360 230">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}.</figcaption></figure>"


def closest_pairs(shared_NN, n_tokens, count=20):
    """The pairs of latents (i, j) that share most beyond chance, and a histogram of all pairs.

    Pairs are in the order of w over chance times the tokens that they share.
    """
    histogram_20 = torch.zeros(20)
    found = []
    for rows_I, columns_J, over_IJ in over_chance(shared_NN, n_tokens):
        histogram_20 += torch.histc(over_IJ[over_IJ > 0], 20, 0, 1).cpu()
        score_IJ = over_IJ * shared_NN[rows_I][:, columns_J]
        best = score_IJ.flatten().topk(min(count, score_IJ.numel()))
        i = rows_I[best.indices // len(columns_J)]
        j = columns_J[best.indices % len(columns_J)]
        found += zip(best.values.tolist(), i.tolist(), j.tolist())
    found.sort(reverse=True)
    return [(i, j) for score, i, j in found[:count] if score > 0], histogram_20


def tokens_html(evaluation, f_TL, other_TL, t):
    """The tokens around the peak of context t, shaded by activation."""
    ids_TL, _ = evaluation.contexts
    peak = int(f_TL[t].argmax())
    parts = []
    for n in range(max(0, peak - 16), min(f_TL.shape[1], peak + 9)):
        text = html.escape(evaluation.model.tokenizer.decode([ids_TL[t, n].item()]))
        text = text.replace("\n", "⏎")
        a = f_TL[t, n].item()
        if a > 0:
            shade = 15 + 75 * a / f_TL.max().item()
            both = ' class="both"' if other_TL[t, n] > 0 else ""
            text = f'<i{both} style="--a:{shade:.0f}" title="{a:.3g}">{text}</i>'
        parts.append(text)
    return f"<p>{''.join(parts)}</p>"


def latent_html(evaluation, sae, i, f_TL, other_TL):
    """A latent: the tokens that it raises and lowers, and the three contexts where it peaks."""
    model = evaluation.model
    parts = [f"<div><small>latent {i}, on {int((f_TL > 0).sum()):,} tokens</small>"]
    if model.has_head:
        head = model.lm.get_output_embeddings()
        effect_V = head(sae.W_dec[i].to(head.weight.dtype))
        for word, largest in (("raises", True), ("lowers", False)):
            top = effect_V.topk(8, largest=largest).indices[:, None]
            words = "  ".join(map(repr, model.tokenizer.batch_decode(top)))
            parts.append(f"<br><small>{word} {html.escape(words)}</small>")
    peaks = f_TL.amax(1).topk(min(3, len(f_TL)))
    for peak, t in zip(peaks.values.tolist(), peaks.indices.tolist()):
        if peak > 0:
            parts.append(tokens_html(evaluation, f_TL, other_TL, t))
    return "".join([*parts, "</div>"])


@torch.no_grad()
def portrait(evaluation, subject, name):
    """An autoencoder's closest pairs, as HTML, and the lines of its charts."""
    sae = subject.sae
    kept_TL = evaluation.contexts[1]
    x_TLD = evaluation.activations
    n_tokens = int(kept_TL.sum())
    shared_NN = shared_tokens(sae, x_TLD[kept_TL])
    pairs, histogram_20 = closest_pairs(shared_NN, n_tokens)
    latents = sorted(set(itertools.chain(*pairs)))
    f_TLS = torch.cat([sae.encode(x_BLD.float())[..., latents] for x_BLD in x_TLD.split(16)])
    f_of = dict(zip(latents, (f_TLS * kept_TL[..., None]).unbind(-1)))
    parts = [f"<details open><summary>{name}: the pairs that compete most</summary>"]
    for i, j in pairs:
        rarer, oftener = sorted([int(shared_NN[i, i]), int(shared_NN[j, j])])
        both = int(shared_NN[i, j])
        cosine = F.cosine_similarity(sae.W_dec[i], sae.W_dec[j], dim=0).item()
        parts.append(f"<h4>w {both / rarer:.2f}, by chance {oftener / n_tokens:.2f}, ")
        parts.append(f"both on {both:,} tokens, cosine of decoder rows {cosine:.2f}</h4>")
        first = latent_html(evaluation, sae, i, f_of[i], f_of[j])
        second = latent_html(evaluation, sae, j, f_of[j], f_of[i])
        parts.append(f"<div class=row>{first}{second}</div>")
    edges_40 = (torch.arange(40) + 1) // 2 / 20
    pairs_40 = (1 + histogram_20).log10().repeat_interleave(2)
    lines = {key: [] for key in CHARTS}
    lines["over"] = list(zip(edges_40.tolist(), pairs_40.tolist()))
    file = Path(subject.path, "metrics.jsonl")
    for row in map(json.loads, file.open() if file.exists() else []):
        for key in CHARTS:
            if key in row:
                lines[key].append((row["tokens"] / 1e6, row[key]))
    return "".join([*parts, "</details>"]), lines


def page(evaluation, found):
    """One HTML file: what is in the autoencoders, how they were trained, and the table `found`."""
    subjects = evaluation.subjects
    names = [html.escape(f"{subject.name}, seed {subject.seed}") for subject in subjects]
    portraits = []
    for subject, name in zip(each(subjects, "page"), names):
        portraits.append(portrait(evaluation, subject, name))
    charts = [chart([lines[key] for _, lines in portraits], *CHARTS[key]) for key in CHARTS]
    keys = []
    for n, name in enumerate(names):
        line = f'<svg width="32" height="8"><path class="s{n % 6}" d="M0 4H32"/></svg>'
        keys.append(f'<span class="key">{line} {name}</span>')
    title = html.escape(f"{Path(evaluation.name).name}, layer {evaluation.layer}")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: which latents compete</title><style>{STYLE}</style>
<h2>{title}: which latents compete</h2>
<div>Latents compete where they are active on the same tokens. w is the share of the rarer latent's
tokens on which the other one is active too; two latents that have nothing to do with each other
share some by chance. In the texts below, tokens are shaded by a latent's activation, and underlined
where the other latent of the pair is active too.</div>
<div>{"".join(keys)}</div>
<div class=row>{"".join(charts)}</div>
{"".join(text for text, _ in portraits)}
<pre>{html.escape(found)}</pre></html>"""


# --------------------------------------------------------------------------------------------- main
MEMORY_ADVICE = "smaller --contexts, --train, --test and --words need less"


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def new_parser():
    parser = sgo_sae.new_parser("eval_sae.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="an SAE's folder, a folder of such, or a params.npz")
    add("--metrics", nargs="+", choices=FAMILIES, default=FAMILIES, help="families to measure")
    add("--resume", action="store_true", help="keep what eval.json has of the same settings")
    add("--model", help="language model, where a RUN names none that can be loaded")
    add("--layer", type=int, help="layer, where a RUN does not name it")
    add("--text", help="held-out text, column `text` (default: the demo's, or split `validation`)")
    add("--contexts", type=positive, default=512, help="contexts of text")
    add("--ctx", type=positive, help="tokens in a context (default: as in training)")
    add("--probe", nargs="+", help="files with the columns text, label and, for SCR, attribute")
    add("--train", type=positive, help="training texts of a class (default: 2000, of the demo 500)")
    add("--test", type=positive, help="test texts of a class (default: 500, of the demo 200)")
    add(
        "--words",
        type=positive,
        help="words of the absorption task (default: all the tokenizer has)",
    )
    add(
        "--splits", type=positive, default=1, help="partitions of the words, over which is averaged"
    )
    add("--seed", type=int, default=0, help="seed of samples and probes")
    add(
        "--paired",
        action="store_true",
        help="differences to the first RUN or to its topk SAE of alpha 0",
    )
    add("--html", metavar="FILE", help="write a page with the pairs that compete most")
    add("--device", default="auto", help="cuda, cuda:1, cpu; auto is cuda where there is one")
    dtypes = sgo_sae.CHOICES["dtype"]
    add("--dtype", default="auto", choices=dtypes, help="the model's; auto is bfloat16 on cuda")
    return parser


def members(run):
    """The paths of the autoencoders of a RUN: its own, or those of the folders in it."""
    found = sorted(str(path.parent) for path in Path(run).glob("*/cfg.json"))
    alone = not found or Path(run, "cfg.json").exists()
    return [run] if alone else found


def work(argv):
    """Measures what the command line asks for."""
    args = new_parser().parse_args(argv)
    device, dtype = sgo_sae.find_device(args.device, args.dtype)
    runs = [members(run) for run in args.runs]
    subjects = [Subject(path, device) for path in dict.fromkeys(itertools.chain(*runs))]
    name_subjects(subjects)
    evaluation = Evaluation(args, subjects, device, dtype)
    families = [family for family in FAMILIES if family in args.metrics]
    for family in families:
        evaluation.measure(family)
    baseline = baseline_of(subjects[: len(runs[0])]) if args.paired else None
    found = table(subjects, families, baseline)
    print(found)
    if args.html:
        Path(args.html).write_text(page(evaluation, found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(sgo_sae.main(sys.argv[1:], work, "eval_sae.py", MEMORY_ADVICE))
