"""Records what SAEBench 0.6.0 gives on the planted inputs of the tests.

    python study/saebench.py     prints it, as SAEBENCH in test_sgo_sae.py; two minutes on two cores

It runs in an environment of its own: `pip install torch==2.13.0 sae-lens==6.54.12
transformer-lens==3.9.0 transformers==5.23.0 datasets==5.2.0 scikit-learn==1.9.1 tabulate==0.10.0
pytest==9.2.0`, then `pip install --no-deps sae-bench==0.6.0`.
"""

import argparse
import importlib.util
import os
import pprint
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pandas
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgo_sae

CPU = torch.device("cpu")


class ForSAEBench:
    """A language model of Hugging Face as far as SAEBench's core evaluation asks for one, and its
    store of tokens, 16 contexts a batch."""

    def __init__(self, lm, ids_RL):
        self.lm = lm
        self.layer = lm.model.layers[1]
        self.batches = iter(ids_RL.split(16))

    def get_batch_tokens(self, size):
        return next(self.batches)

    def run_with_cache(self, ids_BL, **options):
        x_BLD = sgo_sae.layer_output(self.lm, self.layer, ids_BL)
        return None, {options["names_filter"][0]: x_BLD.clone()}

    def __call__(self, ids_BL, **options):
        with torch.inference_mode():
            logits_BLV = self.lm(input_ids=ids_BL).logits
        log_p_BLV = logits_BLV[:, :-1].log_softmax(-1)
        loss_BL = -log_p_BLV.gather(2, ids_BL[:, 1:, None])[..., 0]
        return logits_BLV, loss_BL

    def run_with_hooks(self, ids_BL, fwd_hooks, **options):
        ((_, hook),) = fwd_hooks
        handle = self.layer.register_forward_hook(lambda module, args, x: hook(x, None))
        try:
            return self(ids_BL)
        finally:
            handle.remove()


class ActivationsForSAEBench:
    """A language model as SAEBench's absorption asks for one, whose activations are given, ten
    words a batch."""

    def __init__(self, x_TD):
        self.batches = iter(x_TD.split(10))

    def to_tokens(self, text):
        return torch.zeros(1, 3)

    def run_with_cache(self, prompts, names_filter):
        return None, {names_filter[0]: next(self.batches)[:, None]}


def figures(lm):
    """What SAEBench gives on the planted inputs of the tests, as it is recorded there."""
    import test_sgo_sae as inputs

    os.environ["JAXTYPING_DISABLE"] = "1"
    import beartype

    with mock.patch.object(beartype, "beartype", lambda function=None, **options: function):
        from sae_bench.evals.absorption import feature_absorption_calculator, k_sparse_probing
        from sae_bench.evals.absorption.probing import LinearProbe
        from sae_bench.evals.core import main as core
        from sae_bench.evals.scr_and_tpp import main as scr
        from sae_bench.evals.sparse_probing import probe_training
    found = {}

    sae = inputs.saebench_sae()
    hook = "blocks.1.hook_resid_post"
    sae.cfg = argparse.Namespace(hook_name=hook, hook_layer=1, hook_head_index=None, d_sae=64)
    sizes = {"n_batches": 3, "eval_batch_size_prompts": 16}
    lm_and_store = [ForSAEBench(lm, inputs.saebench_tokens())] * 2
    with torch.no_grad():
        metrics, features = core.get_sparsity_and_variance_metrics(
            sae,
            *lm_and_store,
            **sizes,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            model_kwargs={},
            ignore_tokens={0, 1, 2},
        )
    density_N = torch.tensor(features["feature_density"])
    found["core"] = {
        "mse_benchmark": metrics["mse"],
        "cosine": metrics["cossim"],
        "l0": metrics["l0"],
        "l1": metrics["l1"],
        "norm_ratio": metrics["l2_ratio"],
        "bias": metrics["relative_reconstruction_bias"],
        "never_fire": (density_N == 0).float().mean().item(),
        "dense": (density_N > 0.1).float().mean().item(),
    }
    lm_and_store = [ForSAEBench(lm, inputs.saebench_tokens())] * 2
    metrics = core.get_downstream_reconstruction_metrics(
        sae,
        *lm_and_store,
        compute_kl=True,
        compute_ce_loss=True,
        **sizes,
        ignore_tokens={0, 1, 2},
        exclude_special_tokens_from_reconstruction=True,
    )
    found["behaviour"] = {
        "ce_clean": metrics["ce_loss_without_sae"],
        "ce_sae": metrics["ce_loss_with_sae"],
        "ce_zero": metrics["ce_loss_with_ablation"],
        "ce_score": metrics["ce_loss_score"],
        "kl_sae": metrics["kl_div_with_sae"],
        "kl_zero": metrics["kl_div_with_ablation"],
        "kl_score": metrics["kl_div_score"],
    }

    f_TN, label_T, n_train = inputs.saebench_texts()
    parts = []
    for own in (slice(0, n_train), slice(n_train, None)):
        parts.append({str(c): f_TN[own][label_T[own] == c] for c in (0, 1)})
    found["probe"] = {}
    for k in (1, 2, 5, 20):
        torch.manual_seed(0)
        _, scores = probe_training.train_probe_on_activations(*parts, select_top_k=k)
        found["probe"][k] = statistics.mean(scores.values())
    found["probe all"] = []
    for seed in range(5):
        torch.manual_seed(seed)
        options = {"use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
        _, scores = probe_training.train_probe_on_activations(*parts, **options)
        found["probe all"].append(statistics.mean(scores.values()))

    names = ("professor / nurse", "male / female", "male_professor / female_nurse")
    others = ("nurse_data_only", "female_data_only", "female_nurse_data_only")
    for strong in ("label", "attribute"):
        x_TD, label_T, attribute_T, n_train = inputs.saebench_attributes(strong)
        acts = []
        for own in (slice(0, n_train), slice(n_train, None)):
            x, a, b = x_TD[own, None], label_T[own], attribute_T[own]
            positive = (x[a == 1], x[b == 1], x[(a == 1) & (b == 1)])
            negative = (x[a == 0], x[b == 0], x[(a == 0) & (b == 0)])
            acts.append(dict(zip(names, positive)) | dict(zip(others, negative)))
        sae = inputs.saebench_sae()
        trained = []
        fixed = {}
        for name, probe in zip(
            names, inputs.fixed_probes(x_TD[:n_train], label_T[:n_train], attribute_T[:n_train])
        ):
            fixed[name] = probe_training.Probe(16, torch.float32)
            fixed[name].net.weight.data = probe.w_D[None].clone()
            fixed[name].net.bias.data = probe.b[None].clone()
        meaned = [{name: x[:, 0] for name, x in part.items()} for part in acts]
        runs = [fixed]
        for seed in range(5):
            torch.manual_seed(seed)
            probes, _ = probe_training.train_probe_on_activations(
                *meaned,
                use_sklearn=False,
                batch_size=16,
                epochs=20,
                lr=1e-3,
                perform_scr=True,
                early_stopping_patience=20,
                l1_penalty=1e-3,
            )
            runs.append(probes)
        for probes in runs:
            with torch.no_grad():
                clean = scr.get_probe_test_accuracy(probes, list(names), meaned[1], 250, True)
                effects = scr.get_all_node_effects_for_one_sae(
                    sae, probes, list(names), True, acts[0], 250
                )
                sizes = [2, 5, 10, 20, 50]
                ablated = scr.perform_feature_ablations(
                    probes, sae, 250, acts[1], effects, sizes, list(names), 250, True
                )
                scores = scr.get_scr_plotting_dict(ablated, clean)
            trained.append([scores[f"scr_metric_threshold_{n}"] for n in sizes])
        found[f"scr, {strong} is strong"] = trained[0]
        found[f"scr, {strong} is strong, trained"] = trained[1:]

    sae, x_TD, letter_T, probe_AD = inputs.saebench_words()
    sae.cfg = argparse.Namespace(d_sae=160)
    full = []
    fractions = []
    for a in range(26):
        words = x_TD[letter_T == a]
        calculator = feature_absorption_calculator.FeatureAbsorptionCalculator(
            model=ActivationsForSAEBench(words), icl_word_list=["b", "c"], word_token_pos=-1
        )
        split = [a] if a % 3 else [a, 52 + a]
        results = calculator.calculate_absorption(
            sae, ["a"] * len(words), probe_AD[a], split, layer=1, show_progress=False
        ).word_results
        fractions.append(statistics.mean(float(word.absorption_fraction) for word in results))
        full.append(statistics.mean(word.is_full_absorption for word in results))
    found["absorption"] = fractions
    found["full absorption"] = full
    found["split latents"] = []
    for seed in range(5):
        torch.manual_seed(seed)
        order_T = torch.randperm(len(x_TD))
        train, test = order_T[:1664], order_T[1664:]
        labels = [("", letter) for letter in letter_T.tolist()]
        probes = k_sparse_probing.train_k_sparse_probes(
            sae, [labels[t] for t in train], x_TD[train], ks=list(range(1, 11))
        )
        residual_probe = LinearProbe(64, 26)
        residual_probe.fc.weight.data = probe_AD
        raw = k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(
            sae, residual_probe, probes, [labels[t] for t in test], x_TD[test]
        )
        rows = []
        for k, of_letters in probes.items():
            for letter, probe in of_letters.items():
                rows.append(
                    {
                        "letter": k_sparse_probing.LETTERS[letter],
                        "k": k,
                        "feats": probe.feature_ids.numpy(),
                        "cos_probe_sae_enc": 0,
                        "cos_probe_sae_dec": 0,
                        "weights": 0,
                        "bias": 0,
                        "layer": 1,
                        "sae_name": "",
                    }
                )
        metrics = k_sparse_probing.build_metrics_df(raw, pandas.DataFrame(rows), max_k_value=10)
        k_sparse_probing.add_feature_splits_to_metrics_df(
            metrics, max_k_value=10, f1_jump_threshold=0.03
        )
        found["split latents"].append(statistics.mean(metrics["num_split_features"] + 1))
    return found


def main():
    if importlib.util.find_spec("sae_bench") is None:
        sys.exit("study/saebench.py needs sae-bench: its first lines say how to install it")
    import test_sgo_sae

    with tempfile.TemporaryDirectory() as folder:
        lm, _ = test_sgo_sae.make_model(folder)
        pprint.pprint(figures(lm))


if __name__ == "__main__":
    main()
