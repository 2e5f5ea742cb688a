"""Milliseconds of a training step, with and without the penalty.

    python study/benchmark.py              N 18,432, k 320, D 2,304: two minutes on two CPU cores
    python study/benchmark.py --peers      and the plain step of the trainers that are installed
    python study/benchmark.py --memory     a GPU's memory for the paper's runs, counted without one
    python study/benchmark.py --dict 5120 --k 64 --width 640 --dtype bfloat16

On a GPU it takes seconds. The peers are SAELens 6.54, sparsify 1.3.3 and dictionary_learning 0.1.0.
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgo_sae


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


# Architectures and numbers of latents that are trained together, and the GB that they take at most.
PAPERS_RUNS = [
    (["topk"], [18432], 6.5),
    (["topk"] * 2, [18432] * 2, 7.6),
    (["topk"], [32768], 8.0),
    (["topk"] * 3, [18432] * 3, 8.6),
    (["topk"] * 4, [2304] * 4, 5.2),
    (["topk"] * 4, [18432, 18432, 32768, 32768], 11.9),
    (["topk", "relu", "jumprelu"], [18432] * 3, 9.3),
]


def held_bytes(cfgs, d_in=2304):
    """Bytes at the peak of two training steps of a GPU, counted on tensors that have sizes and no
    content. Every latent counts as active.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    def all_places(t):
        return torch.arange(t.numel())[:, None]

    def product(a, b):  # with sums in float32, as CUDA has it
        return torch.empty(a.shape[0], b.shape[1])

    instead = [
        mock.patch.object(torch.Tensor, "nonzero", all_places),
        mock.patch.object(torch.Tensor, "item", lambda self: 1.0),
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda self: False)),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch.nn.Module, "to", lambda self, *args: self),
        mock.patch.object(sgo_sae, "PAIRS_PAY", {"cpu": sgo_sae.PAIRS_PAY["cuda"]}),
        mock.patch.object(sgo_sae, "product", product),
    ]
    with ExitStack() as stack:
        for patch in instead:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        cpu = torch.device("cpu")
        runs = [sgo_sae.Run(cfg, d_in, cpu, mixed_precision=True) for cfg in cfgs]
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

    config = transformers.Gemma2Config(num_hidden_layers=layer + 1)  # otherwise that of 2B
    assert (config.hidden_size, config.vocab_size) == (2304, 256000)
    with torch.device("meta"):
        lm = transformers.Gemma2Model(config)
    first = math.ceil(sgo_sae.SAMPLE / batch) * batch
    return 2 * sum(p.numel() for p in lm.parameters()) + 2 * (buffer * (ctx - 1) + first) * 2304


def counted_gb(archs, sizes):
    """Memory in GB, tensor by tensor, of a run of these architectures and numbers of latents."""
    cfgs = []
    for arch, d_sae in zip(archs, sizes, strict=True):
        alpha = 0.075 if arch == "topk" else 0.0
        cfgs.append(sgo_sae.Config(arch=arch, d_sae=d_sae, alpha=alpha))
    return (gemma_bytes() + held_bytes(cfgs)) / 1e9


def main(argv):
    """Times training steps on Gaussian activations, with and without the penalty, and with --peers
    the plain TopK step of the other trainers that are installed.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, value in {"dict": 18432, "k": 320, "batch": 2048, "width": 2304}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory", action="store_true", help="count, and time nothing")
    args = parser.parse_args(argv)
    if args.memory:
        for archs, sizes, _ in PAPERS_RUNS:
            print(f"{', '.join(archs)}, N {sizes}: {counted_gb(archs, sizes):.2f} GB")
        return
    device, _ = sgo_sae.find_device("auto", "auto")
    mixed = args.dtype == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    x_BD = torch.randn(args.batch, args.width, device=device)
    works = {}
    for name, settings in {
        "without the penalty": {"alpha": 0.0},
        "with the penalty": {},
        "with w = 1": {"pair_weights": "uniform"},
    }.items():
        # Without a learning rate every step is the same work.
        cfg = sgo_sae.Config(d_sae=args.dict, k=args.k, lr=0.0, **settings)
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
    main(sys.argv[1:])
