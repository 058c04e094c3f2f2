"""Is what `plan` predicts what runs do? Step times, memory, and the order of the layouts.

    python tests/performance/plan_checked.py                     CPU ranks on gloo
    python tests/performance/plan_checked.py --device cuda       this machine's GPUs; with one, what one GPU can vary

    ... --experts                                            mixtures of experts on CPU ranks (preset moe-tiny)

Not a test: it prints the tables for summary/07_3d_parallel.md and summary/08_moe.md. The machine is measured first
(`calibrate`), the layouts are predicted with that, and then they run. Targets: memory within 10 %, time within 20 %,
rank correlation 0.8.

CPU: two ranks, as there are cores, and one thread each. All layouts are built in one launch and stepped in turn, so
that a disturbance of the machine hits all of them; the best of all rounds counts, of the slowest rank. The layouts of
four ranks take turns on two cores; they stand apart. Memory is that of all tensors alive.
Experts: predicted with the skew that the routers of these very steps had, which is counted: for memory the load of the
rank that had most in all layers together, for time that of the busiest rank of each layer.
GPU: each layout in ranks of its own, as `bench` runs it; memory is torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_mini.bench import _random, bench
from picotron_mini.calibrate import calibrate
from picotron_mini.collectives import barrier
from picotron_mini.config import MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.launch import RankError, launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, expert_axis_of
from picotron_mini.moe.dispatch import recording
from picotron_mini.parallel.machine import to_json
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.parallel.plan import settings
from picotron_mini.parallel.predict import predict
from picotron_mini.presets import preset
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step

MODEL = ModelConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_layers=8, num_heads=8, num_kv_heads=4)
TRAIN = TrainConfig(seq_len=256, batch_size=8, device="cpu", bucket_mb=4)
ROUNDS = 8

Setting = tuple[str, dict[str, Any]]
TWO: list[Setting] = [
    ("dp=1", {"micro_batch_size": 2}),
    ("dp=1", {"micro_batch_size": 4, "loss_chunks": 4}),
    ("dp=1", {"micro_batch_size": 4, "recompute": "full"}),
    ("dp=1", {"micro_batch_size": 4, "recompute": "selective"}),
    ("dp=2", {"micro_batch_size": 2}),
    ("dp=2", {"micro_batch_size": 4, "recompute": "full"}),
    ("dp=2", {"micro_batch_size": 2, "zero": 1}),
    ("dp=2", {"micro_batch_size": 2, "zero": 2}),
    ("dp=2", {"micro_batch_size": 2, "zero": 3}),
    ("tp=2", {"micro_batch_size": 2}),
    ("tp=2", {"micro_batch_size": 4, "sequence_parallel": True}),
    ("cp=2", {"micro_batch_size": 2}),
    ("cp=2", {"micro_batch_size": 2, "context": "ulysses"}),
    ("pp=2", {"micro_batch_size": 1}),
    ("pp=2", {"micro_batch_size": 2, "schedule": "interleaved"}),
    ("pp=2", {"micro_batch_size": 1, "schedule": "afab"}),
]
FOUR: list[Setting] = [
    ("dp=4", {"micro_batch_size": 1}),
    ("dp=2,tp=2", {"micro_batch_size": 2}),
    ("dp=2,pp=2", {"micro_batch_size": 1}),
    ("dp=2,pp=2", {"micro_batch_size": 1, "zero": 2}),
    ("dp=2,pp=2", {"micro_batch_size": 1, "zero": 3, "schedule": "interleaved"}),
    ("dp=2,pp=2", {"micro_batch_size": 1, "zero": 3, "schedule": "zb-h1"}),
    ("tp=2,pp=2", {"micro_batch_size": 2, "sequence_parallel": True}),
]
EXPERTS_TWO: list[Setting] = [
    ("dp=1", {"micro_batch_size": 4}),
    ("dp=1", {"micro_batch_size": 4, "recompute": "full"}),
    ("dp=2", {"micro_batch_size": 4}),
    ("dp=2,ep=2", {"micro_batch_size": 4}),
    ("dp=2,ep=2", {"micro_batch_size": 2}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "dispatch_parts": 2}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "recompute": "full"}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "recompute": "selective"}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "zero": 1}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "zero": 2}),
    ("dp=2,ep=2", {"micro_batch_size": 4, "zero": 3}),
    ("cp=2,ep=2", {"micro_batch_size": 4}),
    ("tp=2", {"micro_batch_size": 4}),
    ("tp=2", {"micro_batch_size": 4, "sequence_parallel": True}),
    ("pp=2", {"micro_batch_size": 2}),
]
EXPERTS_FOUR: list[Setting] = [
    ("dp=4", {"micro_batch_size": 2}),
    ("dp=4,ep=2", {"micro_batch_size": 2}),
    ("dp=4,ep=4", {"micro_batch_size": 2}),
    ("dp=4,ep=2", {"micro_batch_size": 2, "zero": 1}),
    ("dp=2,tp=2,ep=2", {"micro_batch_size": 2}),
    ("dp=2,pp=2,ep=2", {"micro_batch_size": 2}),
]
ONE_GPU: list[Setting] = [
    ("dp=1", {"micro_batch_size": 1, "micro_batches": 8}),
    ("dp=1", {"micro_batch_size": 2, "micro_batches": 4}),
    ("dp=1", {"micro_batch_size": 4, "micro_batches": 2}),
    ("dp=1", {"micro_batch_size": 8, "micro_batches": 1}),
    ("dp=1", {"micro_batch_size": 4, "micro_batches": 2, "recompute": "full"}),
    ("dp=1", {"micro_batch_size": 8, "micro_batches": 1, "loss_chunks": 8}),
    ("dp=1", {"micro_batch_size": 8, "micro_batches": 1, "recompute": "full", "loss_chunks": 8}),
    ("dp=1", {"micro_batch_size": 2, "micro_batches": 4, "compile": False}),
    ("dp=1", {"micro_batch_size": 4, "micro_batches": 2, "compile": False, "recompute": "selective"}),
    ("dp=1", {"micro_batch_size": 4, "micro_batches": 2, "compile": False, "recompute": "full"}),
    ("dp=1", {"micro_batch_size": 2, "micro_batches": 2, "seq_len": 4096}),
    ("dp=1", {"micro_batch_size": 8, "micro_batches": 2, "seq_len": 1024}),
]
MORE_GPUS: list[Setting] = [
    ("dp={n}", {"micro_batch_size": 4, "micro_batches": 2}),
    ("dp={n}", {"micro_batch_size": 4, "micro_batches": 2, "zero": 1}),
    ("dp={n}", {"micro_batch_size": 4, "micro_batches": 2, "zero": 2}),
    ("dp={n}", {"micro_batch_size": 4, "micro_batches": 2, "zero": 3}),
    ("tp={n}", {"micro_batch_size": 4, "micro_batches": 4}),
    ("tp={n}", {"micro_batch_size": 4, "micro_batches": 4, "sequence_parallel": True}),
    ("pp={n}", {"micro_batch_size": 4, "micro_batches": 8}),
    ("pp={n}", {"micro_batch_size": 4, "micro_batches": 8, "schedule": "interleaved"}),
    ("cp={n}", {"micro_batch_size": 1, "micro_batches": 4, "seq_len": 4096}),
]


def on_cpu_rank(runs: Sequence[RunConfig], rounds: int) -> tuple[list[int], list[float], list[list[list[int]]]]:
    """Of each run on this rank: peak bytes, best seconds of a step, and to which ranks its routers sent how many."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    meshes = {r.layout: Mesh.build(r.mesh) if r.mesh.world_size > 1 else Mesh(MeshShape(), 0) for r in runs}
    world = Mesh(MeshShape(dp=size), rank)["world"]
    peaks, steps, sent = [], [], []
    for run in runs:
        gc.collect()
        with Live(resized=run.train.zero == 3) as live:
            step = built(run, meshes[run.layout])
            step()
            with recording() as log:
                step()
        peaks.append(live.most)
        ep, held = run.mesh.ep, run.model.moe.num_experts // run.mesh.ep if run.model.moe else 1
        counts = [Counter(slot // held for token in slots for slot in token if slot >= 0) for _, slots in log]
        sent.append([[each[to] for to in range(ep)] for each in counts])
        steps.append(step)
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, step in enumerate(steps):
            barrier(world)
            start = time.perf_counter()
            step()
            best[number] = min(best[number], time.perf_counter() - start)
    return peaks, best, sent


def skews(mesh: MeshShape, sent: Sequence[Sequence[Sequence[int]]]) -> tuple[float, float]:
    """The busiest rank's choices over the even share: of each layer, on average; and of all layers together.

    Args:
        sent: of each rank, of each call in order, the choices for each rank of its ep group.
    """
    if mesh.ep == 1:
        return 1.0, 1.0
    each, together = [], []
    for first in (rank for rank in range(len(sent)) if expert_axis_of(mesh, rank, "ep").index == 0):
        group = [sent[rank] for rank in expert_axis_of(mesh, first, "ep").ranks]
        calls = [[sum(rows) for rows in zip(*of_ranks, strict=True)] for of_ranks in zip(*group, strict=True)]
        each += [mesh.ep * max(load) / sum(load) for load in calls]
        total = [sum(load) for load in zip(*calls, strict=True)]
        together.append(mesh.ep * max(total) / sum(total))
    return sum(each) / len(each), max(together)


def built(run: RunConfig, mesh: Mesh) -> Any:
    """A training step of a run, on random tokens, to be called again and again."""
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    generator = torch.Generator().manual_seed(mesh["dp"].index)
    batches = [_random(run, generator) for _ in range(run.train.micro_batches)]
    return lambda: train_step(parallel, optimizer, batches)


class Live(TorchDispatchMode):
    """The most bytes that lived at once, of all storages made inside the `with` block.

    Not PyTorch's profiler: what gloo's threads give back it does not see.
    """

    def __init__(self, resized: bool) -> None:
        super().__init__()
        self.most = self._total = 0
        self._resized = resized  # ZeRO 3 empties and fills storages: then all of them are looked at again and again
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
                    self._total += storage.nbytes()
                    weakref.finalize(storage, self._leave, storage._cdata)
        if self._resized:
            alive = [ref() for ref, _ in list(self._storages.values())]
            self._total = sum(storage.nbytes() for storage in alive if storage is not None)
        self.most = max(self.most, self._total)
        return out

    def _leave(self, key: int) -> None:
        self._total -= self._storages.pop(key)[1]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the places in both orders."""

    def places(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([places(a), places(b)]))[0, 1])


def show(title: str, rows: Sequence[tuple[RunConfig, float, float, float, float]]) -> None:
    """Predicted beside measured: run, seconds, seconds, bytes, bytes."""
    print(f"\n{title}")
    print(f"{'layout':<16}{'settings':<58}{'s pred.':>9}{'s meas.':>9}{'':>7}{'MiB pred.':>11}{'MiB meas.':>11}{'':>7}")
    for run, seconds, measured, memory, peak in rows:
        what = settings(run) + (f" --context {run.train.context}" if run.mesh.cp > 1 else "")
        what += f" --seq-len {run.train.seq_len}" if run.train.device == "cuda" else ""
        what += " --compile" if run.train.compile else ""
        what += f" --dispatch-parts {run.train.dispatch_parts}" if run.train.dispatch_parts > 1 else ""
        print(
            f"{run.layout:<16}{what:<58}{seconds:>9.3f}{measured:>9.3f}{seconds / measured - 1:>+7.0%}"
            f"{memory / 2**20:>11.1f}{peak / 2**20:>11.1f}{memory / peak - 1:>+7.0%}"
        )
    time_ok = sum(abs(row[1] / row[2] - 1) <= 0.2 for row in rows)
    memory_ok = sum(abs(row[3] / row[4] - 1) <= 0.1 for row in rows)
    print(
        f"time within 20 %: {time_ok} of {len(rows)}; memory within 10 %: {memory_ok} of {len(rows)}; "
        f"rank correlation of times {rank_correlation([r[1] for r in rows], [r[2] for r in rows]):.2f}, "
        f"of memory {rank_correlation([r[3] for r in rows], [r[4] for r in rows]):.2f}",
        flush=True,
    )


def on_cpu(experts: bool) -> None:
    model, train, choices = MODEL, TRAIN, ((2, TWO), (4, FOUR))
    if experts:
        base = preset("moe-tiny")
        model, train = replace(base.model, vocab_size=257), replace(base.train, device="cpu", batch_size=8, bucket_mb=4)
        choices = ((2, EXPERTS_TWO), (4, EXPERTS_FOUR))
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread a rank")
    print(f"gloo, float32, {model}, sequences of {train.seq_len}, {train.batch_size} of them a step; best of {ROUNDS}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    alone = resolve(RunConfig(layout="1", model=model, train=replace(train, micro_batch_size=2)))
    machine = calibrate(alone, 2)
    print(to_json(machine))
    for ranks, chosen in choices:
        runs = [resolve(RunConfig(layout=l, model=model, train=replace(train, **kw))) for l, kw in chosen]  # noqa: E741
        found = launch(on_cpu_rank, runs, ROUNDS, world_size=ranks, timeout=1500, output="hide")
        here = replace(machine, ranks_per_host=ranks)
        rows = []
        for number, run in enumerate(runs):
            each, together = skews(run.mesh, [of_rank[2][number] for of_rank in found])
            seconds, memory = predict(run, here, skew=each).seconds, predict(run, here, skew=together).memory_bytes
            peak, measured = (max(of_rank[which][number] for of_rank in found) for which in (0, 1))
            rows.append((run, seconds, measured, memory, peak))
            if run.mesh.ep > 1:
                print(f"{run.layout} {settings(run)}: busiest rank {each:.2f} in each layer, {together:.2f} in all")
        show(f"{ranks} ranks", rows)
        print(f"load of the machine: {os.getloadavg()[0]:.1f}", flush=True)


def on_gpu() -> None:
    gpus = torch.cuda.device_count()
    print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}")
    base = preset("bench")
    chosen = ONE_GPU + ([(layout.format(n=gpus), kw) for layout, kw in MORE_GPUS] if gpus > 1 else [])
    runs = [
        resolve(replace(base, layout=layout, train=replace(base.train, **{"micro_batches": 0, **kw})), gpus=gpus)
        for layout, kw in chosen
    ]
    machines = {}
    for compiled in (True, False):
        train = replace(base.train, micro_batches=1, compile=compiled)
        machines[compiled] = calibrate(resolve(replace(base, layout="1", train=train), gpus=gpus), gpus)
        print(f"compile={compiled}: {to_json(machines[compiled])}", flush=True)
    rows, results = [], []
    for run in runs:
        said = predict(run, machines[run.train.compile])
        try:
            measured = bench(run)
        except RankError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            print(f"{run.layout} {settings(run)}: out of memory; {said.memory_bytes / 2**30:.1f} GiB were predicted")
            continue
        seconds = sorted(measured["step_seconds"])[len(measured["step_seconds"]) // 2]
        rows.append((run, said.seconds, seconds, said.memory_bytes, measured["peak_memory_bytes"]))
        results.append({"predicted": [said.seconds, said.memory, said.parts], **measured})
        print(f"{run.layout} {settings(run)}: {seconds:.3f} s", flush=True)
    show(f"{gpus} GPU(s)", rows)
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--experts", action="store_true", help="mixtures of experts, on CPU ranks")
    wanted = parser.parse_args()
    on_gpu() if wanted.device == "cuda" else on_cpu(wanted.experts)
