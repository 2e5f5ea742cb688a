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
words on new prompts, E the tokens of a batch of texts, C letters and S chosen latents. In a table,
S are seeds and R settings.
"""

import argparse
import itertools
import json
import math
import random
import re
import string
import sys
import zlib
from collections import Counter
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import mpmath
import numpy
import pandas
import torch
import torch.nn.functional as F
from torch import nn

import sgo_sae
from sgo_sae import InputError

FAMILIES = ("core", "behaviour", "competition", "probe", "scr", "absorption")


def each(work, desc):
    """The parts of the work, one by one, beside a bar of the progress."""
    return sgo_sae.progress_bar(work, desc=desc, leave=False)


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

    def zero(x_BLD, kept_BL):
        return torch.zeros_like(x_BLD)

    def reconstructed(sae, x_BLD, kept_BL):
        return torch.where(kept_BL[..., None], sae(x_BLD.float()).to(x_BLD.dtype), x_BLD)

    replacements = [zero, *(partial(reconstructed, sae) for sae in saes)]
    ce_clean = 0.0
    ce_R = torch.zeros(len(replacements)).double()
    kl_R = torch.zeros_like(ce_R)
    # The logits of four contexts of Gemma-2 are 0.5 GB.
    rows = max(1, 2**27 // (ids_TL.shape[1] * lm.config.get_text_config().vocab_size))
    parts = list(zip(ids_TL.split(rows), kept_TL.split(rows)))
    for ids_BL, kept_BL in each(parts, "behaviour"):
        log_p_EV = log_probabilities(lm, layer, ids_BL, kept_BL, lambda x_BLD, kept_BL: x_BLD)
        ce_clean += cross_entropy(log_p_EV, ids_BL, kept_BL)
        for r, replace in enumerate(replacements):
            log_q_EV = log_probabilities(lm, layer, ids_BL, kept_BL, replace)
            ce_R[r] += cross_entropy(log_q_EV, ids_BL, kept_BL)
            kl_EV = F.kl_div(log_q_EV, log_p_EV, reduction="none", log_target=True)
            kl_R[r] += kl_EV.sum(1).double().sum().item()
    n_predicted = kept_TL[:, :-1].sum().item()
    ce_clean /= n_predicted
    ce_zero, *ce_saes = (ce_R / n_predicted).tolist()
    kl_zero, *kl_saes = (kl_R / kept_TL.sum().item()).tolist()
    found = []
    for ce_sae, kl_sae in zip(ce_saes, kl_saes):
        found.append(
            {
                "ce_score": (ce_zero - ce_sae) / (ce_zero - ce_clean),
                "kl_score": 1 - kl_sae / kl_zero,
                "ce_clean": ce_clean,
                "ce_sae": ce_sae,
                "ce_zero": ce_zero,
                "kl_sae": kl_sae,
                "kl_zero": kl_zero,
            }
        )
    return found


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


def cross_entropy(log_p_EV, ids_BL, kept_BL):
    """Cross-entropy, in nats, summed over the kept tokens that another one follows."""
    next_E1 = ids_BL.roll(-1, 1)[kept_BL][:, None]
    has_next_E = kept_BL.nonzero()[:, 1] < ids_BL.shape[1] - 1
    return -log_p_EV.gather(1, next_E1)[has_next_E].double().sum().item()


def mean_of(dicts):
    """The mean of dicts, key by key; of no dicts an empty one."""
    return pandas.DataFrame(dicts).mean().to_dict()


# -------------------------------------------------------------------------------------- competition
RARE = 20  # latents that are active on fewer tokens are not compared
DENSE = 0.1  # and those that are active on a larger share of the tokens


@torch.no_grad()
def shared_tokens(sae, x_TD):
    """On how many tokens each pair of latents is active (N, N); the diagonal has |M_i|."""
    N = len(sae.b_enc)
    shared_NN = torch.zeros(N, N, device=x_TD.device)  # exact up to 2^24 tokens
    for x_BD in x_TD.split(2048):
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

    `pairs_over_chance` counts the pairs whose w is over chance by more than 0.5. Rare latents are
    counted apart; dense ones are among the figures of reconstruction.
    """
    shared_NN = shared_tokens(sae, x_TD)
    parts = over_chance(shared_NN, len(x_TD))
    return {
        "pairs_over_chance": sum((over_IJ > 0.5).sum().item() for _, _, over_IJ in parts),
        "rare": (shared_NN.diagonal() < RARE).double().mean().item(),
        "mean_max_cos": nearest_cosine(sae.W_dec).mean().item(),
    }


@torch.no_grad()
def nearest_cosine(W_dec_ND):
    """The largest |cosine| of each decoder row with another (N,)."""
    W_ND = F.normalize(W_dec_ND, dim=1)
    nearest = []
    for W_ID in W_ND.split(1024):
        own_and_nearest_I2 = (W_ID @ W_ND.T).abs().topk(2, dim=1).values
        nearest.append(own_and_nearest_I2[:, 1])
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


@torch.no_grad()
def linear_probe(x_TD, y_T, x_UD, y_U, generator, epochs, batch, lr, l1=0.0, patience=10):
    """SAEBench's probe on many columns, by AdamW: that of the epoch with the best test accuracy.

    It ends after `epochs`, or after `patience` of them without a better one. The gradients of the
    cross-entropy are written out: on batches so small, autograd takes longer than they do.
    """
    y_T = y_T.float()
    bound = x_TD.shape[1] ** -0.5
    w_D = torch.zeros(x_TD.shape[1]).uniform_(-bound, bound, generator=generator).to(x_TD.device)
    b = torch.zeros((), device=x_TD.device)
    adam = torch.optim.AdamW([w_D, b], lr=lr, fused=True)
    best_score = -1.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(batch):
            x_BD = x_TD[rows]
            error_B = (torch.sigmoid(x_BD @ w_D + b) - y_T[rows]) / len(rows)
            w_D.grad = error_B @ x_BD + l1 * w_D.sign()
            b.grad = error_B.sum()
            adam.step()
        score = accuracy(x_UD, y_U, Probe(w_D, b))
        if score > best_score:
            best_score = score
            best_epoch = epoch
            best = Probe(w_D.clone(), b.clone())
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


def sparse_probing(f_TN, labels_T, n_train, name, seed=0):
    """Test accuracy of probes that tell a class from as many other texts, meaned over the classes.

    The first `n_train` texts are to train on. Keys: name_1, name_2, name_5 and name_20, logistic
    regressions on as many latents, those whose means differ most between class and others; and
    name_all, a linear probe on all latents. Chance is half.
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
            scores[f"{name}_{k}"] = accuracy(x_UN[:, top_S], y_U, probe)
        on_all = linear_probe(x_TN, y_T, x_UN, y_U, generator, epochs=100, batch=250, lr=1e-2)
        scores[f"{name}_all"] = accuracy(x_UN, y_U, on_all)
        found.append(scores)
    return mean_of(found)


def scr_sets(attributes, n_train):
    """Rows of SCR's four sets of texts, by their attributes a and b, 0 or 1 (2, T).

    In the clean sets, to train and to test on, each combination of a and b is a quarter. In the
    biased ones a = b. Each has as many texts as its smallest combination allows.
    """
    cell_T = attributes[0] * 2 + attributes[1]
    sets = []
    for chosen in ((0, 1, 2, 3), (0, 3)):
        for start, part_T in ((0, cell_T[:n_train]), (n_train, cell_T[n_train:])):
            cells = [start + (part_T == cell).nonzero()[:, 0] for cell in chosen]
            size = min(map(len, cells))
            sets.append(torch.cat([cell[:size] for cell in cells]))
    return sets


def scr_probes(x_TD, attributes, sets, seed=0):
    """SCR's probes on mean activations: of a and of b on the clean sets, and the biased one."""
    generator = torch.Generator().manual_seed(seed)
    clean_T, clean_U, biased_T, biased_U = sets

    def probe(y_T, train, test):
        # SAEBench lets all of them train for all of their epochs.
        options = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "l1": 1e-3}
        return linear_probe(x_TD[train], y_T[train], x_TD[test], y_T[test], generator, **options)

    on_clean = [probe(y_T, clean_T, clean_U) for y_T in attributes]
    return on_clean, probe(attributes[0], biased_T, biased_U)


@torch.no_grad()
def scr(probes, biased, x_TD, f_TN, attributes, sets, W_dec_ND):
    """Spurious correlation removal: a dict of scores, 1 where ablation mends the biased probe.

    x are mean activations and f mean latents of texts. Of the two directions, the scores are those
    of the one in which the biased probe is less accurate. To set latents to 0 and add the
    reconstruction error back takes f_S W_dec_S from the activation of each token, and so from the
    mean.
    """
    clean_T, clean_U, _, _ = sets
    x_UD = x_TD[clean_U]
    before = [accuracy(x_UD, y_U, biased) for y_U in attributes[:, clean_U]]
    wanted = int(before[0] > before[1])
    unwanted = 1 - wanted
    y_U = attributes[wanted, clean_U]
    gap = accuracy(x_UD, y_U, probes[wanted]) - before[wanted]
    z_T = attributes[unwanted, clean_T].bool()
    difference_N = f_TN[clean_T[z_T]].mean(0) - f_TN[clean_T[~z_T]].mean(0)
    effect_N = (difference_N * (W_dec_ND @ probes[unwanted].w_D)).abs()
    order_N = effect_N.argsort(descending=True)[: (effect_N > 0).sum()]
    scores = {}
    for n in (2, 5, 10, 20, 50, 100, 500):
        top_S = order_N[:n]
        ablated_UD = x_UD - f_TN[clean_U[:, None], top_S] @ W_dec_ND[top_S]
        gain = accuracy(ablated_UD, y_U, biased) - before[wanted]
        scores[f"scr_{n}"] = gain / gap if gap >= 0.001 else 0.0
    return scores


# --------------------------------------------------------------------------------------- absorption
def f1(predicted_T, true_T):
    hits = (predicted_T & true_T).sum()
    return 2 * hits / (predicted_T.sum() + true_T.sum()).clamp(min=1)


@torch.no_grad()
def multi_probe(x_TD, y_T, batch, l2, l1=0.0, encode=lambda x_BD: x_BD, seed=0):
    """The weights (C, D) and biases (C,) of SAEBench's probe of all 26 letters at once.

    Positive words are weighted by their rarity. Where `encode` is given, the probe is on latents
    (C, N): they are computed batch by batch, since those of all words would take 18 GB at
    N 32,768. The gradients are written out, as above.
    """
    torch.manual_seed(seed)
    epochs = 50
    width = encode(x_TD[:1]).shape[1]
    probe = nn.Linear(width, 26).to(x_TD.device)
    y_TC = F.one_hot(y_T, 26).float()
    count_C = y_TC.sum(0)
    rarity_C = (len(y_T) - count_C) / count_C.clamp(min=1)
    weight_TC = torch.where(y_TC > 0, rarity_C, 1)
    adam = torch.optim.Adam(probe.parameters(), lr=0.01, weight_decay=l2, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.001 ** (1 / epochs))
    for _ in each(range(epochs), "letters"):
        for rows in torch.randperm(len(x_TD)).to(x_TD.device).split(batch):
            f_BN = encode(x_TD[rows])
            y_BC = y_TC[rows]
            error_BC = weight_TC[rows] / y_BC.numel() * (torch.sigmoid(probe(f_BN)) - y_BC)
            probe.weight.grad = error_BC.T @ f_BN
            if l1:
                probe.weight.grad += l1 / 26 * probe.weight.sign()
            probe.bias.grad = error_BC.sum(0)
            adam.step()
        schedule.step()
    return probe.weight.detach(), probe.bias.detach()


def letter_split(f_TS, y_T, n_train):
    """How many latents S, best first, share a letter: one more must lift F1 by over 0.03.

    y are whether words have the letter; the first `n_train` are to train on, the others to test.
    """
    train_T = y_T[:n_train]
    n_positive = train_T.sum()
    weight_T = n_train / 2 / torch.where(train_T, n_positive, n_train - n_positive)
    best = 0.0
    for k in range(1, f_TS.shape[1] + 1):
        probe = logistic_regression(f_TS[:n_train, :k], train_T, weight_T)
        score = f1(probe.is_positive(f_TS[n_train:, :k]), y_T[n_train:])
        if k > 1 and score - best <= 0.03:
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
    absorbers_V = others_VN.topk(3, dim=1).values.sum(1)
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
    scores = [f1(positive_UC[:, c], y_U == c) for c in range(26)]
    spelled_C = torch.stack(scores) > 0.6
    if spelled_C.sum() < 20:
        raise InputError(f"the model spells {spelled_C.sum()} of 26 letters, 20 are needed")
    return positive_UC.gather(1, y_U[:, None])[:, 0] & spelled_C[y_U]


@torch.no_grad()
def absorption(sae, x_TD, y_T, n_train, x_VD, y_V, W_CD, seed=0):
    """Absorption and full absorption, meaned over letters: a dict of figures.

    x are activations at words and y their letters, 0 to 25: of T words, the first `n_train` to
    train on, and of those V of the others that the probe W recognises, these on new prompts.
    Letters that no word in V has do not count.
    """
    sparse_CN, _ = multi_probe(
        x_TD[:n_train], y_T[:n_train], 4096, l2=1e-6, l1=0.01, encode=sae.encode, seed=seed
    )
    candidates_CS = sparse_CN.topk(10, dim=1).indices
    f_TCS = torch.cat([sae.encode(x_BD)[:, candidates_CS] for x_BD in x_TD.split(4096)])
    found = []
    for c in y_V.unique().tolist():
        n_split = letter_split(f_TCS[:, c], y_T == c, n_train)
        split_S = candidates_CS[c, :n_split]
        x_of_c = x_VD[y_V == c]
        f_of_c = sae.encode(x_of_c)
        share_V, full_V = absorbed_share(f_of_c, x_of_c, sae.W_dec, W_CD[c], split_S)
        found.append(
            {
                "absorption": share_V.mean().item(),
                "full": full_V.float().mean().item(),
                "split_latents": n_split,
            }
        )
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
    """`train` and `test` random texts of each label, as many of each attribute.

    Where one label has fewer, each has as many as that.
    """
    sizes = cell_sizes(name, frame)
    n_attributes = frame["attribute"].nunique()
    chosen = []
    for is_test, wanted in ((False, train), (True, test)):
        groups = frame[frame["is_test"] == is_test].groupby(["label", "attribute"])
        count = min(wanted // n_attributes, sizes[is_test].min())
        chosen.append(groups.sample(count, random_state=seed))
    return numbered(pandas.concat(chosen).sample(frac=1, random_state=seed))


def scr_task(name, frame, train, test):
    """The first texts of each combination of the first two labels and attributes.

    `train` and `test` of them where both are the first or both the second, else half as many. So
    SAEBench takes them, whatever the seed.
    """
    for column in ("label", "attribute"):
        frame = frame[frame[column].rank(method="dense") <= 2]
    cell_sizes(name, frame)
    is_biased = frame["label"].rank(method="dense") == frame["attribute"].rank(method="dense")
    wanted = frame["is_test"].map({False: train, True: test}) // (2 - is_biased)
    nth = frame.groupby(["is_test", "label", "attribute"]).cumcount()
    return numbered(frame[nth < wanted])


def demo_frame():
    """The demo's texts, paragraphs of the standard library.

    The label is the package, one of the five with the most texts, and the attribute is whether it
    has a docstring.
    """
    frame = pandas.DataFrame(sgo_sae.library_texts(), columns=["file", "text"])
    # No file is in both parts.
    frame["is_test"] = frame["file"].map(lambda file: zlib.crc32(file.encode()) % 3 == 0)
    frame["label"] = frame["file"].str.split("/").str[0]
    frame = frame.assign(text=frame["text"].str.split("\n\n")).explode("text", ignore_index=True)
    frame = frame[frame["text"].str.len() > 80]
    frame = frame.assign(attribute=frame["text"].str.contains('"""'))
    sizes = frame.groupby(["label", "attribute", "is_test"]).size().unstack([1, 2], fill_value=0)
    return frame[frame["label"].isin(sizes.min(axis=1).nlargest(5).index)]


def file_frame(path):
    """The texts of a local file with the columns text, label and, for SCR, attribute.

    A fifth of them are test texts.
    """
    config = sgo_sae.Config(dataset=path)
    sgo_sae.check_name(path)
    with sgo_sae.loading(path):
        rows = sgo_sae.open_dataset(config, ("text", "label", "attribute"))
        frame = pandas.DataFrame(list(rows))
    if not {"text", "label"} <= set(frame):
        columns = next(iter(sgo_sae.open_dataset(config)), {})
        raise InputError(f"{path} needs the columns text and label, and has {', '.join(columns)}")
    frame = frame[frame["text"].map(sgo_sae.is_text) & frame["label"].notna()]
    return frame.assign(is_test=frame["text"].map(lambda text: zlib.crc32(text.encode()) % 5 == 0))


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
                rows = rows.assign(text=rows[text].str.get(language), label=n, attribute=0)
                parts.append(rows.assign(is_test=rows.index % 5 == 0))
        else:
            for split in ("train", "test"):
                rows = datasets.load_dataset(name, split=split).to_pandas()
                rows = rows[rows[label].isin(classes)]
                rows = rows.assign(text=rows[text], label=rows[label].map(classes.index))
                rows["attribute"] = rows[attribute] if attribute else 0
                parts.append(rows.assign(is_test=split == "test"))
    return pandas.concat(parts)


def load_tasks(family, args, demo, notes):
    """The tasks of probing, for each seed, or of SCR, whose texts hang on no seed: name and frame.

    One that can't be had is a line of notes.
    """
    is_scr = family == "scr"
    if args.probe:
        stems = Counter(Path(path).stem for path in args.probe)
        frames = {}
        for path in args.probe:  # files of the same name are told apart by their paths
            frames[Path(path).stem if stems[Path(path).stem] == 1 else path] = file_frame(path)
    elif demo:
        frames = {"packages": demo_frame()}
    elif is_scr:
        frames = SPURIOUS
    else:
        frames = PROBING
        notes.append("github-code is left out, since `datasets` does not load it any more")
    for name, frame in frames.items():
        try:
            if isinstance(frame, tuple):
                frame = hub_frame(*frame)
            elif not is_scr:
                frame = frame.assign(attribute=0)
            elif "attribute" not in frame:
                continue
            sizes = (args.train, args.test)
            if is_scr:
                samples = [scr_task(name, frame, *sizes)]
            else:
                samples = [probing_task(name, frame, *sizes, seed) for seed in args.seed]
        except InputError as error:
            notes.append(f"a task is left out, {error}")
            continue
        wanted = (3 if is_scr else frame["label"].nunique()) * sum(sizes)
        if len(samples[0]) < wanted:
            notes.append(f"{name}: {len(samples[0])} texts, not {wanted}")
        for seed, chosen in zip(args.seed, samples):
            yield name, seed, chosen


# -------------------------------------------------------------------------------------------- model
class LanguageModel:
    """A language model, whole if it has a head, one of its layers, and its tokenizer."""

    def __init__(self, name, layer, device, dtype, ctx=2):
        from transformers import AutoConfig

        sgo_sae.check_name(name)
        # A RUN may name it otherwise than the Hub; SAELens's have TransformerLens's names.
        with sgo_sae.loading(f"{name}, the language model (--model gives another),"):
            saved_as = str(AutoConfig.from_pretrained(name).architectures)
        self.has_head = bool(re.search("CausalLM|LMHead|ConditionalGeneration", saved_as))
        loaded = sgo_sae.load_lm(name, layer, device, dtype, ctx, whole=self.has_head)
        self.lm, self.layer, self.tokenizer, _ = loaded
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

    def read(self, ids_BL):
        """The layer's output (B, L, D); the filling changes none of it."""
        is_filled = bool((ids_BL < 0).any())
        inputs = {"attention_mask": (ids_BL >= 0).long()} if is_filled else {}
        x_BLD = sgo_sae.layer_output(self.lm, self.layer, ids_BL.clamp(min=0), **inputs)
        if not x_BLD[self.kept(ids_BL)].isfinite().all():
            raise InputError("the model's activations are not finite; try --dtype float32")
        return x_BLD

    def batches(self, lists, desc, batch=64):
        """The rows and token ids (B, L) of batches of like length."""
        order = sorted(range(len(lists)), key=lambda t: len(lists[t]))
        starts = range(0, len(order), batch)
        for start in each(starts, desc):
            rows = order[start : start + batch]
            yield rows, self.ids([lists[t] for t in rows])


@torch.no_grad()
def mean_latents(model, saes, texts, desc, length=128):
    """Means over each text's kept tokens, of the activations (T, D) and each SAE's latents (T, N).

    A text is its first `length` tokens, BOS among them. The means are on the CPU.
    """
    ids = model.tokenizer(texts, add_special_tokens=False).input_ids
    ids = [model.bos + i[: length - len(model.bos)] for i in ids]
    encoders = [nn.Identity()] + [sae.encode for sae in saes]
    widths = [model.width] + [len(sae.b_enc) for sae in saes]
    means = [torch.empty(len(texts), width) for width in widths]
    for rows, ids_BL in model.batches(ids, desc):
        kept_BL = model.kept(ids_BL)
        share_BL = kept_BL / kept_BL.sum(1, keepdim=True).clamp(min=1)
        x_BLD = model.read(ids_BL).float()
        for encode, mean_TN in zip(encoders, means):
            mean_TN[rows] = torch.einsum("bln,bl->bn", encode(x_BLD), share_BL).cpu()
    return means


def alphabetic_words(tokenizer):
    """Token ids and letters, 0 to 25, of the tokens that are words, maybe after a space."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [
        (i, ord(text.strip().upper()[0]) - 65)
        for i, text in enumerate(texts)
        if re.fullmatch(" ?[A-Za-z]+", text)
    ]


@torch.no_grad()
def spelled_activations(model, words, vocabulary, rng, desc):
    """Activations (T, D) at words whose first letter a prompt asks for after ten random examples.

    A prompt ends with the word, since what follows changes nothing there in a causal model. It is
    put together from token ids, so that the word is one token.
    """
    newline, question, *answers = model.tokenizer(
        ["\n", " has the first letter:", *(f" {letter}" for letter in string.ascii_uppercase)],
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
    if not place.exists():
        from huggingface_hub import snapshot_download

        if len(place.parts) < 3 or Path(place.parts[0]).exists():
            raise InputError(f"{path}: there is no such file or folder")
        owner, name, inside = path.split("/", 2)
        with sgo_sae.loading(f"{path}, which is no folder here and would be on the Hub,"):
            folder = snapshot_download(f"{owner}/{name}", allow_patterns=[inside, f"{inside}/*"])
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
    # Gemma Scope has autoencoders of other activations, too, whose files look the same.
    other = re.search(r"-(mlp|att|transcoders)\b", str(file))
    if other:
        raise InputError(
            f"{file} is of Gemma Scope's {other[1]}; only its -res is of a layer's output"
        )
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
        self.cfg = vars(self.sae.cfg)
        self.training = self.cfg.get("settings", {})
        self.settings = {key: value for key, value in self.training.items() if key not in FREE}
        self.seed = self.training.get("seed", 0)
        local = Path(path)
        self.file = local / "eval.json" if local.is_dir() else local.with_suffix(".eval.json")
        self.results = {}
        if self.file.exists():
            with sgo_sae.loading(str(self.file)):
                self.results = json.loads(self.file.read_text())

    def text(self):
        """The dataset that it was trained on, its subset and its column, or None."""
        dataset = self.training.get("dataset", self.cfg.get("dataset_path"))
        column = self.training.get("text_column", "text")
        return (dataset, self.training.get("subset"), column) if dataset else None

    def layer(self):
        """The number of the layer whose output it is for, or None where it does not say."""
        # The names of TransformerLens and of Hugging Face's modules.
        names = r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)*(?:layers|h)\.(\d+)"
        if self.cfg.get("hook_head_index") is not None:
            raise InputError(
                f"{self.path} is for one attention head, and a layer's output is measured"
            )
        hook = self.cfg.get("hook_name") or self.cfg.get("hook_point")  # SAELens before version 4
        known = re.fullmatch(names, hook or "")
        if hook and not known:
            raise InputError(f"{self.path} is for {hook}, and only a layer's output is measured")
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

    A family's method returns for each autoencoder a dict of what it was measured on, the text or
    a task with a seed, each with a dict of figures. It sets `sample`, how much was used, and adds
    to `notes` what lacked. It raises InputError where it can't be measured.
    """

    def __init__(self, args, subjects, device, dtype):
        self.args = args
        self.subjects = subjects
        self.device = device
        self.dtype = dtype
        self.demo = all(subject.training.get("demo") for subject in subjects)
        models = (subject.cfg.get("model_name") for subject in subjects)
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
        measured = []
        for subject in self.subjects:
            known = subject.results.get(family, {}).get("settings")
            if not (self.args.resume and known == self.settings):
                measured.append(subject)
        if not measured:
            return
        self.sample = {}
        self.notes = []
        try:
            found = getattr(self, family)([subject.sae for subject in measured])
        except InputError as error:
            self.notes.append(f"not measured, {error}")
            found = [{}] * len(measured)
        for subject, parts in zip(measured, found):
            record = {
                "figures": mean_of(parts.values()),
                "parts": parts,
                "sample": self.sample,
                "notes": self.notes,
                "settings": self.settings,
            }
            subject.keep(family, record)

    @cached_property
    def model(self):
        sizes = [subject.cfg.get("context_size") or 0 for subject in self.subjects]
        longest = self.args.ctx or max(sizes) or sgo_sae.Config.ctx
        model = LanguageModel(self.name, self.layer, self.device, self.dtype, longest)
        for subject in self.subjects:
            D = len(subject.sae.b_dec)
            if D != model.width:
                raise InputError(
                    f"{subject.path} is for {D} dimensions, the model has {model.width}"
                )
        return model

    def text_config(self):
        """Where the text of core, behaviour and competition comes from: the same for all."""
        ctx = self.args.ctx or agreed(
            (subject.cfg.get("context_size") for subject in self.subjects), "--ctx"
        )
        config = sgo_sae.Config(ctx=ctx or sgo_sae.Config.ctx, data_seed=self.args.seed[0])
        if self.args.text or self.demo:
            config.dataset = self.args.text or f"{self.name}/heldout.jsonl"
            return config
        config.split = "validation"
        text = agreed((subject.text() for subject in self.subjects), "--text")
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
        rows = sgo_sae.load_texts(config)
        texts = (row[config.text_column] for row in rows)  # once through
        contexts = sgo_sae.token_contexts(texts, model.tokenizer, config.ctx)
        with sgo_sae.loading(config.dataset):
            lists = list(itertools.islice(contexts, self.args.contexts))
        if not lists:
            raise InputError(f"{config.dataset} does not fill a context of {config.ctx} tokens")
        ids_TL = model.ids(lists)
        return ids_TL, model.kept(ids_TL)

    @cached_property
    def activations(self):
        """Activations (T, L, D) of the contexts, in the model's dtype."""
        parts = each(self.contexts[0].split(32), "activations")
        return torch.cat([self.model.read(ids_BL) for ids_BL in parts])

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
        return [{"text": competition(sae, x_TD)} for sae in each(saes, "competition")]

    def tasks(self, family, saes):
        """Task by task: its name, the seed of its texts, the number to train on, their labels and
        attributes (2, T), and the means over them of activations and of each autoencoder's latents.

        Every text is read once, for all autoencoders.
        """
        for name, seed, chosen in load_tasks(family, self.args, self.demo, self.notes):
            n_train = int((~chosen["is_test"]).sum())
            self.sample[name] = {"train": n_train, "test": len(chosen) - n_train}
            columns = torch.tensor(chosen[["label", "attribute"]].to_numpy(), device=self.device)
            desc = f"{family}: {name}"
            means = mean_latents(self.model, saes, chosen["text"].tolist(), desc)
            yield (
                name,
                seed,
                n_train,
                columns.T,
                (f_TN.to(self.device) for f_TN in each(means, desc)),
            )
        if not self.sample:
            raise InputError("it has no task, or none whose texts can be had")

    def probe(self, saes):
        found = [{} for _ in saes]
        for name, seed, n_train, (label_T, _), means in self.tasks("probe", saes):
            residual = sparse_probing(next(means), label_T, n_train, "x", seed)
            for parts, f_TN in zip(found, means):
                own = sparse_probing(f_TN, label_T, n_train, "latents", seed)
                parts[f"{name}, seed {seed}"] = {**own, **residual}
        return found

    def scr(self, saes):
        found = [{} for _ in saes]
        for name, _, n_train, attributes, means in self.tasks("scr", saes):
            x_TD = next(means)
            sets = scr_sets(attributes, n_train)
            trained = {seed: scr_probes(x_TD, attributes, sets, seed) for seed in self.args.seed}
            for parts, f_TN, sae in zip(found, means, saes):
                data = (x_TD, f_TN, attributes, sets, sae.W_dec)
                for seed, probes in trained.items():
                    parts[f"{name}, seed {seed}"] = scr(*probes, *data)
        return found

    def absorption(self, saes):
        found = [{} for _ in saes]
        for seed in self.args.seed:
            data = self.words(seed)
            for parts, sae in zip(found, each(saes, "absorption")):
                parts[f"words, seed {seed}"] = absorption(sae, *data, seed)
        return found

    def words(self, seed):
        """What `absorption` asks for, in its order, of a random sample of words; sets `sample`."""
        model = self.model
        rng = random.Random(seed)
        vocabulary = alphabetic_words(model.tokenizer)
        rng.shuffle(vocabulary)
        words = vocabulary[: self.args.words]
        if len(words) < 100:
            raise InputError(f"there are {len(words)} words, 100 are needed")
        self.sample = {"words": len(words)}
        n_train = len(words) * 4 // 5
        x_TD = spelled_activations(model, words, vocabulary, rng, "words")
        y_T = torch.tensor([letter for _, letter in words], device=x_TD.device)
        W_CD, b_C = multi_probe(x_TD[:n_train], y_T[:n_train], 64, l2=1e-4, seed=seed)
        recognised_U = recognised_words(x_TD[n_train:], y_T[n_train:], W_CD, b_C)
        # They are scored on new prompts, as in SAEBench.
        again = list(itertools.compress(words[n_train:], recognised_U.tolist()))
        x_VD = spelled_activations(model, again, vocabulary, rng, "new prompts")
        return x_TD, y_T, n_train, x_VD, y_T[n_train:][recognised_U], W_CD


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
        sign = bool(HIGHER.fullmatch(figure)) - bool(LOWER.fullmatch(figure))
        if baseline:
            cells = paired_cells(values, sign)
        else:
            # Of equal values it can be 1e-16.
            cells = map(mean_cell, values.mean(), values.std().fillna(0).round(12))
        lines.append([figure.replace("_", " ") + ("", " ↑", " ↓")[sign], *cells])
    return "\n\n".join([markdown(lines), *dict.fromkeys(notes)])


def markdown(lines):
    """Lines of cells as a table in Markdown, of which the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for name, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append(f"| {name.ljust(widths[0])} | {' | '.join(cells)} |")
    return "\n".join(text)


def decimals(number):
    """How many decimals show two digits of a number that count."""
    return max(0, 1 - math.floor(math.log10(abs(number)))) if number else 0


def mean_cell(mean, deviation):
    """A mean ± its deviation over seeds; with none, the mean with four digits that count."""
    if math.isnan(mean):
        return ""
    digits = decimals(deviation or mean / 100)
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {deviation:,.{digits}f}" if deviation else text


def paired_cells(values, sign):
    """Cells for a frame of seeds by settings, whose first column is the baseline.

    The variance of a difference comes from what seed and setting together leave unexplained, over
    all settings: with three seeds, that of one setting alone would be luck. Seeds count that all
    settings have.
    """
    x_SR = values.dropna().to_numpy()
    S, R = x_SR.shape
    if S == 0:
        return [""] * (R + 1)
    half = 0.0
    freedom = (S - 1) * (R - 1)
    if freedom:
        residual_SR = x_SR - x_SR.mean(0) - x_SR.mean(1, keepdims=True) + x_SR.mean()
        variance = (residual_SR.round(12) ** 2).sum() / freedom
        half = student_t(freedom) * math.sqrt(2 * variance / S)
    level, *others = x_SR.mean(0)
    digits = decimals(half or level / 100)
    cells = [f"{level:,.{digits}f}"]
    for other in others:
        change = other - level
        text = f"{change:+,.{digits}f}"
        if half and sign and abs(change) > half:
            text = f"**{text}**" if change * sign > 0 else f"_{text}_"
        cells.append(text)
    return [*cells, f"{half:,.{digits}f}" if half else ""]


def student_t(freedom):
    """The 97.5 % quantile of Student's t."""

    def excess(t):  # of P(|T| > t), a regularised incomplete beta function, over 5 %
        x = freedom / (freedom + t**2)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) - 0.05

    return float(mpmath.findroot(excess, (1, 20), solver="anderson"))


# --------------------------------------------------------------------------------------------- page
CURVES = {  # what a chart of the training shows, by its name in metrics.jsonl, and its y axis
    "explained_variance": ("Explained variance in training", "share"),
    "penalty_share": ("αΩ over the reconstruction term in training", "ratio"),
    "omega": ("Ω in training, whatever its weight α", "Ω"),
    "dead": ("Latents inactive for 200 steps, in training", "latents"),
}
PAGE = """
{%- macro across(chart, x) -%}
{{ "%.1f" % (56 + 288 * (x - chart.xs[0]) / (chart.xs[-1] - chart.xs[0])) }}
{%- endmacro -%}
{# A curve ends above the frame, so that one on the axis can be seen. #}
{%- macro down(chart, y) -%}
{{ "%.1f" % (184 - 150 * (y - chart.ys[0]) / (chart.ys[-1] - chart.ys[0])) }}
{%- endmacro -%}
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: which latents compete</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui; max-width: 1200px; margin: auto; padding: 1em }
figure { margin: 0 }
pre { overflow-x: auto }
small, figcaption, pre { font-size: 13px }
.row { display: grid; gap: 12px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)) }
text { font: 11px system-ui; fill: currentColor }
path { stroke: #8884 }
path, polyline { fill: none }
polyline { stroke-width: 2 }
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
</style>
<h2>{{ title }}: which latents compete</h2>
<div>Latents compete where they are active on the same tokens. w is the share of the rarer latent's
tokens on which the other one is active too; two latents that have nothing to do with each other
share some by chance. In the texts below, tokens are shaded by a latent's activation, and underlined
where the other latent of the pair is active too.</div>
<div>
{% for name in names %}
<span class="key"><svg width="32" height="8"><polyline class="s{{ loop.index0 % 6 }}"
points="0,4 32,4"/></svg> {{ name }}</span>
{% endfor %}
</div>
<div class="row">
{% for chart in charts if chart %}
<figure><svg viewBox="0 0 360 230">
<path d="M48 22V190H352"/>
<text x="2" y="12">{{ chart.y_name }}</text>
<text x="200" y="224" text-anchor="middle">{{ chart.x_name }}</text>
{% for x in chart.xs %}
<text x="{{ across(chart, x) }}" y="205" text-anchor="middle">{{ "%.4g" % x }}</text>
{% endfor %}
{% for y in chart.ys %}
<path d="M48 {{ down(chart, y) }}h304"/>
<text x="42" y="{{ down(chart, y) }}" dy="4" text-anchor="end">{{ "%.4g" % y }}</text>
{% endfor %}
{% for line in chart.lines %}
<polyline class="s{{ loop.index0 % 6 }}" points="
{%- for x, y in line %}{{ across(chart, x) }},{{ down(chart, y) }} {% endfor %}"/>
{% endfor %}
</svg><figcaption>{{ chart.caption }}.</figcaption></figure>
{% endfor %}
</div>
{% for pairs in portraits %}
<details open><summary>{{ names[loop.index0] }}: the pairs that compete most</summary>
{% for pair in pairs %}
<h4>w {{ "%.2f" % pair.w }}, by chance {{ "%.2f" % pair.chance }}, both on
{{ "{:,}".format(pair.both) }} tokens, cosine of decoder rows {{ "%.2f" % pair.cosine }}</h4>
<div class="row">
{% for latent in pair.latents %}
<div><small>latent {{ latent.number }}, on {{ "{:,}".format(latent.n_tokens) }} tokens</small>
{% for word, tokens in latent.effects %}
<br><small>{{ word }} {{ tokens | join("  ") }}</small>
{% endfor %}
{% for context in latent.contexts %}
<p>
{%- for token, a, other in context %}
{%- set text = token.replace("\\n", "⏎") %}
{%- if a > 0 %}<i{% if other > 0 %} class="both"{% endif %}
 style="--a:{{ (15 + 75 * a / latent.peak) | round | int }}" title="{{ "%.3g" % a }}">
{{- text }}</i>{% else %}{{ text }}{% endif %}
{%- endfor %}
</p>
{% endfor %}
</div>
{% endfor %}
</div>
{% endfor %}
</details>
{% endfor %}
<pre>{{ table }}</pre></html>
"""


def ticks(values):
    """About five round numbers, 1, 2 or 5 times a power of ten apart, that enclose the values."""
    raw = numpy.ptp(values) / 4
    steps = 10 ** numpy.floor(numpy.log10(raw)) * numpy.array([1, 2, 5, 10])
    step = steps[steps >= raw][0]
    first = numpy.floor(numpy.min(values) / step)
    return step * numpy.arange(first, numpy.ceil(numpy.max(values) / step) + 1)


def chart(lines, caption, x_name, y_name):
    """What the page draws of lines (points, 2); nothing where all of their values are the same."""
    points = numpy.concatenate(lines)
    if len(points) == 0 or not numpy.ptp(points, axis=0).all():
        return {}
    return {
        "lines": lines,
        "caption": caption,
        "x_name": x_name,
        "y_name": y_name,
        "xs": ticks(points[:, 0]),
        "ys": ticks(points[:, 1]),
    }


def training_curves(subject):
    """The lines (points, 2) of the charts of training, by name; empty where nothing is known."""
    file = Path(subject.path, "metrics.jsonl")
    logged = pandas.read_json(file, lines=True) if file.exists() else pandas.DataFrame()
    logged = logged.reindex(columns=["tokens", *CURVES])
    return {key: logged[["tokens", key]].dropna().to_numpy() / (1e6, 1) for key in CURVES}


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
        i, j = torch.unravel_index(best.indices, score_IJ.shape)
        found += zip(best.values.tolist(), rows_I[i].tolist(), columns_J[j].tolist())
    found.sort(reverse=True)
    return [(i, j) for score, i, j in found[:count] if score > 0], histogram_20


def latent_view(evaluation, sae, i, f_TL, other_TL):
    """What the page says of a latent.

    `effects` are the tokens that it raises and lowers, and `contexts` the tokens around its three
    highest peaks, each with the activations of the latent and of the other one of its pair.
    """
    model = evaluation.model
    effects = []
    if model.has_head:
        head = model.lm.get_output_embeddings()
        effect_V = head(sae.W_dec[i].to(head.weight.dtype))
        for word, sign in (("raises", 1), ("lowers", -1)):
            top = (sign * effect_V).topk(8).indices
            tokens = model.tokenizer.batch_decode(top[:, None])
            effects.append((word, map(repr, tokens)))
    contexts = []
    highest = f_TL.amax(1).topk(min(3, len(f_TL)))
    for t in highest.indices[highest.values > 0].tolist():
        peak = f_TL[t].argmax().item()
        around = slice(max(0, peak - 16), peak + 9)
        tokens = model.tokenizer.batch_decode(evaluation.contexts[0][t, around, None])
        contexts.append(list(zip(tokens, f_TL[t, around].tolist(), other_TL[t, around].tolist())))
    return {
        "number": i,
        "n_tokens": (f_TL > 0).sum().item(),
        "peak": f_TL.max().item(),
        "effects": effects,
        "contexts": contexts,
    }


@torch.no_grad()
def portrait(evaluation, sae):
    """What the page shows of the closest pairs of latents, and the histogram of all pairs."""
    kept_TL = evaluation.contexts[1]
    x_TLD = evaluation.activations
    n_tokens = kept_TL.sum().item()
    shared_NN = shared_tokens(sae, x_TLD[kept_TL])
    pairs, histogram_20 = closest_pairs(shared_NN, n_tokens)
    latents = sorted(set(itertools.chain(*pairs)))
    f_TLS = torch.cat([sae.encode(x_BLD.float())[..., latents] for x_BLD in x_TLD.split(16)])
    f_of = dict(zip(latents, (f_TLS * kept_TL[..., None]).unbind(-1)))
    views = []
    for i, j in pairs:
        rarer, oftener = sorted(shared_NN.diagonal()[[i, j]].tolist())
        both = shared_NN[i, j].item()
        first = latent_view(evaluation, sae, i, f_of[i], f_of[j])
        second = latent_view(evaluation, sae, j, f_of[j], f_of[i])
        views.append(
            {
                "both": int(both),
                "w": both / rarer,
                "chance": oftener / n_tokens,
                "cosine": F.cosine_similarity(sae.W_dec[i], sae.W_dec[j], dim=0).item(),
                "latents": [first, second],
            }
        )
    return views, histogram_20


def page(evaluation, found):
    """One HTML file: what is in the autoencoders, how they were trained, and the table `found`."""
    subjects = evaluation.subjects
    portraits = []
    histograms = []
    middle_20 = (numpy.arange(20) + 0.5) / 20
    for subject in each(subjects, "page"):
        views, histogram_20 = portrait(evaluation, subject.sae)
        portraits.append(views)
        log_20 = (1 + histogram_20).log10().numpy()
        histograms.append(numpy.stack([middle_20, log_20], axis=1))
    charts = [
        chart(
            histograms,
            "Pairs by how much their w is over chance",
            "w over chance",
            "log₁₀(1 + pairs)",
        )
    ]
    curves = [training_curves(subject) for subject in subjects]
    for key, (caption, y_name) in CURVES.items():
        charts.append(chart([own[key] for own in curves], caption, "million tokens", y_name))
    return jinja2.Template(PAGE, autoescape=True, trim_blocks=True).render(
        title=f"{Path(evaluation.name).name}, layer {evaluation.layer}",
        names=[f"{subject.name}, seed {subject.seed}" for subject in subjects],
        charts=charts,
        portraits=portraits,
        table=found,
    )


# --------------------------------------------------------------------------------------------- main
MEMORY_ADVICE = "smaller --contexts, --train, --test and --words need less"


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def new_parser():
    parser = sgo_sae.new_parser(
        "eval_sae.py RUN [RUN ...] [--flag VALUE ...]", __doc__.splitlines()[0]
    )
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
    add("--train", type=positive, default=2000, help="training texts of a class")
    add("--test", type=positive, default=500, help="test texts of a class")
    add(
        "--words",
        type=positive,
        help="words of the absorption task (default: all the tokenizer has)",
    )
    add(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of samples and probes to take the mean over; the text is that of the first",
    )
    add(
        "--paired",
        action="store_true",
        help="differences to the first RUN or to its topk SAE of alpha 0",
    )
    add("--html", metavar="FILE", help="write a page with the pairs that compete most")
    add("--device", default="auto", help="cuda, cuda:1, cpu; auto is cuda where there is one")
    add(
        "--dtype",
        default="auto",
        choices=sgo_sae.DTYPES,
        help="the model's; auto is bfloat16 on cuda",
    )
    return parser


def members(run):
    """The paths of the autoencoders of a RUN: those of the folders in it, or its own."""
    return sorted(str(path.parent) for path in Path(run).glob("*/cfg.json")) or [run]


def work(argv):
    """Measures what the command line asks for."""
    args = new_parser().parse_args(argv)
    device, dtype = sgo_sae.find_device(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in training
    runs = [members(run) for run in args.runs]
    subjects = [Subject(path, device) for path in dict.fromkeys(itertools.chain(*runs))]
    name_subjects(subjects)
    evaluation = Evaluation(args, subjects, device, dtype)
    families = dict.fromkeys(args.metrics)
    for family in families:
        evaluation.measure(family)
    baseline = baseline_of(subjects[: len(runs[0])]) if args.paired else None
    found = table(subjects, families, baseline)
    print(found)
    if args.html:
        Path(args.html).write_text(page(evaluation, found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(sgo_sae.main(sys.argv[1:], work, "eval_sae.py", MEMORY_ADVICE))
