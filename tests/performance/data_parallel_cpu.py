"""Time of a backward pass with its reduction on two CPU ranks: naive, bucketed, and PyTorch's DDP.

    python tests/performance/data_parallel_cpu.py

Not a test: it prints numbers for summary/03_data_parallel.md. The ways are measured in turn, round after round, so
that a disturbance of the machine hits all of them; the best round of each counts.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from picotron_mini.config import MeshShape, ModelConfig
from picotron_mini.launch import launch
from picotron_mini.mesh import Mesh
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.parallel.data import GradientBuckets, all_reduce_gradients

ROUNDS = 12
MODEL = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=32
)


def make() -> GPT:
    model = GPT(MODEL)
    init_weights(model, 0)
    return model


def measure() -> list[tuple[str, int, float, float]]:
    """On a rank: (way, messages, best seconds of backward until all sums are done, median seconds)."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    x = torch.randint(MODEL.vocab_size, (4, 128), generator=torch.Generator().manual_seed(dp.index))
    ways: list[tuple[str, int, Callable[[], float]]] = []

    def timed(model: GPT, forward: Callable[[torch.Tensor], torch.Tensor], after: Callable[[], object]) -> float:
        loss = model.loss(forward(x), x)
        torch.distributed.barrier()
        start = time.perf_counter()
        loss.backward()
        after()
        return time.perf_counter() - start

    def alone(model: GPT) -> Callable[[], float]:
        return lambda: (model.zero_grad(), timed(model, model, lambda: None))[1]

    def naive(model: GPT) -> Callable[[], float]:
        return lambda: (model.zero_grad(), timed(model, model, lambda: all_reduce_gradients(model.parameters(), dp)))[1]

    def bucketed(model: GPT, buckets: GradientBuckets, arm: bool) -> Callable[[], float]:
        def one() -> float:
            buckets.reset()
            if arm:
                buckets.arm()
            return timed(model, model, buckets.finish)

        return one

    def ddp(model: GPT) -> Callable[[], float]:
        wrapped = DistributedDataParallel(model)
        return lambda: (model.zero_grad(), timed(model, wrapped, lambda: None))[1]

    number = len(list(make().parameters()))
    ways.append(("backward alone", 0, alone(make())))
    ways.append(("naive, after backward", number, naive(make())))
    for size in (2**16, 2**20, 2**22, 25 * 2**20):
        model = make()
        buckets = GradientBuckets(model.parameters(), dp, size)
        ways.append((f"buckets of {size / 2**20:g} MiB", len(buckets.buckets), bucketed(model, buckets, True)))
    model = make()
    buckets = GradientBuckets(model.parameters(), dp, 2**20)
    ways.append(("1 MiB, all after backward", len(buckets.buckets), bucketed(model, buckets, False)))
    ways.append(("PyTorch's DDP, 25 MiB", 0, ddp(make())))

    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for round_ in range(ROUNDS + 2):
        for name, _, one in ways:
            seconds = one()
            if round_ >= 2:  # the first ones open connections and allocate
                times[name].append(seconds)
    return [(name, n, min(times[name]), sorted(times[name])[ROUNDS // 2]) for name, n, _ in ways]


if __name__ == "__main__":
    weights = sum(p.numel() for p in make().parameters())
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread a rank")
    print(f"2 ranks on gloo, {weights:,} float32 weights, {4 * weights / 2**20:.1f} MiB of gradients, {ROUNDS} rounds")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")
    per_rank = launch(measure, world_size=2)
    print(f"{'way':28}{'messages':>9}{'best ms':>9}{'median ms':>11}")
    for rows in zip(*per_rank, strict=True):  # the slower rank decides
        name, messages = rows[0][:2]
        count = str(messages) if messages else "-"
        print(f"{name:28}{count:>9}{1e3 * max(r[2] for r in rows):>9.1f}{1e3 * max(r[3] for r in rows):>11.1f}")
