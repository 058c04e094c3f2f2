"""What counting bytes costs a step: `python tests/performance/ledger_cost.py [--layout dp=2,tp=2] [--steps 200]`.

Two ways, in one run. Steps in turn with the ledger and with one that counts nothing: noisy, and all there is to it. And
the calls of a step times what one call takes by itself: what the ledger can cost at most where a step is long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from picotron_mini.bench import _random
from picotron_mini.collectives import Ledger, barrier, ledger
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.presets import preset
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import settle, train_step

CALLS = 100_000


def on_rank(run: Any, steps: int) -> tuple[list[float], list[float], int, float]:
    mesh, device = Mesh.build(run.mesh), torch.device("cpu")
    parallel = parallelize(run, mesh, device)
    optimizer = make_optimizer(parallel.trained, run.train)
    batches = [_random(run, torch.Generator().manual_seed(0)) for _ in range(run.train.micro_batches)]
    count, calls = Ledger.record, 0

    def counted(self: Ledger, *args: Any) -> None:
        nonlocal calls
        calls += 1
        count(self, *args)

    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(steps + 4):
        on = step % 2 == 0
        Ledger.record = count if on else lambda self, *args: None  # type: ignore[method-assign]
        barrier(mesh["world"])
        start = time.perf_counter()
        with ledger.recording():
            train_step(parallel, optimizer, batches)
        if step >= 4:  # the first ones warm up
            times[on].append(time.perf_counter() - start)
        if step == 3:
            settle()
    Ledger.record = counted  # type: ignore[method-assign]
    train_step(parallel, optimizer, batches)
    payload, start = torch.zeros(4), time.perf_counter()
    with ledger.recording():
        for _ in range(CALLS):
            count(ledger, "dp", "all_reduce", payload)
    return times[True], times[False], calls, (time.perf_counter() - start) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="dp=2,tp=2")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    run = preset("laptop")
    run = replace(run, layout=args.layout, model=replace(run.model, vocab_size=257))
    run = resolve(replace(run, train=replace(run.train, device="cpu")))
    ranks = launch(on_rank, run, args.steps, world_size=run.mesh.world_size, device="cpu", timeout=None)
    with_, without, calls, each = ranks[0]
    on, off = statistics.median(with_), statistics.median(without)
    print(f"torch {torch.__version__}, {run.layout} on {os.cpu_count()} cores, preset laptop, {args.steps} steps")
    print(f"median step with the ledger {on:.4f} s, without {off:.4f} s: {on / off:.4f}")
    print(f"{calls} calls a step of {1e6 * each:.2f} us each: {100 * calls * each / off:.3f} % of a step")


if __name__ == "__main__":
    main()
