"""How much a real pipeline idles against what the bubble predicts, and how long a message takes.

    python tests/performance/pipeline_parallel_cpu.py

Not a test: it prints numbers for summary/05_pipeline_parallel.md. First four stages in which a sleep stands for the
layers, so that they need no core of their own: what is measured is the executor, its messages and its order. Then two
stages of real layers, against one rank with the whole model. Ways are measured in turn, round after round, so that a
disturbance of the machine hits all of them; the best round of each counts.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from picotron_mini.collectives import receive, send
from picotron_mini.config import MeshShape, ModelConfig
from picotron_mini.course.figures.timeline import merge, pretend, timed
from picotron_mini.launch import launch
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.parallel.pipeline import run_pipeline
from picotron_mini.parallel.schedules import SCHEDULES, Event, balance, simulate

FORWARD, BACKWARD = 0.02, 0.04  # seconds of sleep
ROUNDS, ROWS, T = 6, 16, 64
MODEL = ModelConfig(
    vocab_size=256, hidden_size=192, intermediate_size=512, num_layers=8, num_heads=6, num_kv_heads=6, head_dim=32
)
COUNTS = (1, 2, 4, 8, 16)


def sleeping(stages: int, rounds: int) -> dict[tuple[str, int], list[list[Event]]]:
    """On a rank: the events of each round, for each schedule and number of micro-batches."""
    mesh = Mesh.build(MeshShape(pp=stages))
    pp, weight = mesh["pp"], torch.ones(64, requires_grad=True)
    out: dict[tuple[str, int], list[list[Event]]] = {(name, m): [] for name in SCHEDULES for m in COUNTS}

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        x = pretend(weight * (1 if hidden is None else hidden), FORWARD, BACKWARD)
        return x.sum() if pp.index == stages - 1 else x

    for _ in range(rounds):
        for (name, m), found in out.items():
            events: list[Event] = []
            dist.barrier()
            run_pipeline(
                SCHEDULES[name](pp.index, stages, m), forward=timed(forward, pp.index, events), axis=pp,
                gradient_axis=mesh["pp.backward"], shape=(64,), dtype=torch.float32, device=torch.device("cpu"),
            )  # fmt: skip
            found.append(events)
    return out


def step(model: GPT, axis: Axis, gradient_axis: Axis, name: str, micro_batches: int) -> float:
    """Seconds of forward and backward of the whole batch."""
    tokens = torch.randint(MODEL.vocab_size, (ROWS, T), generator=torch.Generator().manual_seed(0)).chunk(micro_batches)

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        output = model(tokens[m] if hidden is None else hidden)
        return output if model.head is None else model.loss(output, tokens[m]) / (ROWS * T)

    model.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    run_pipeline(
        SCHEDULES[name](axis.index, axis.size, micro_batches), forward=forward, axis=axis, gradient_axis=gradient_axis,
        shape=(ROWS // micro_batches, T, MODEL.hidden_size), dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    return time.perf_counter() - start


def border(axis: Axis, gradient_axis: Axis, numbers: int) -> float:
    """Seconds of a message of `numbers` float32 to the other rank and back, halved."""
    x = torch.ones(numbers)
    dist.barrier()
    start = time.perf_counter()
    if axis.index == 0:
        send(x, axis, 1).wait()
        receive(x, gradient_axis, 1).wait()
    else:
        receive(x, axis, 0).wait()
        send(x, gradient_axis, 0).wait()
    return (time.perf_counter() - start) / 2


def computing(rounds: int) -> dict[tuple[str, int], list[float]]:
    """On one of two ranks: seconds of each round, for each way to run the batch and for messages of some KiB."""
    mesh = Mesh.build(MeshShape(pp=2))
    pp, back, alone = mesh["pp"], mesh["pp.backward"], Axis("pp", 1, 0, (0,))
    whole = GPT(MODEL)
    layers = balance([1.0] * MODEL.num_layers, 2)[pp.index]
    part = GPT(MODEL, layers=layers, embed=pp.index == 0, head=pp.index == 1)
    for model in (whole, part):
        init_weights(model, 0)

    def one_rank(m: int) -> float:
        if pp.index == 0:
            return step(whole, alone, alone, "1f1b", m)
        dist.barrier()  # the one in `step`
        return 0.0

    ways: dict[tuple[str, int], Callable[[], float]] = {}
    for m in COUNTS:
        ways["one rank", m] = lambda m=m: one_rank(m)
        for name in SCHEDULES:
            ways[name, m] = lambda m=m, name=name: step(part, pp, back, name, m)
    for kib in (1, 48, 768):
        ways["message", kib] = lambda kib=kib: border(pp, back, 256 * kib)
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, one in ways.items():
            dist.barrier()
            seconds = one()
            if round_:  # the first opens connections and allocates
                times[way].append(seconds)
    return times


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread a rank")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}; best of {ROUNDS} rounds\n")
    stages = 4
    print(f"{stages} stages on gloo, a forward is a sleep of {FORWARD:g} s, a backward of {BACKWARD:g} s")
    print(f"{'micro-batches':>14}{'predicted':>12}{'afab':>8}{'1f1b':>8}   % idle")
    slept = launch(sleeping, stages, ROUNDS, world_size=stages)
    for m in COUNTS:
        row = [100 * simulate(SCHEDULES["1f1b"], stages, m).bubble]
        for name in SCHEDULES:
            rounds = zip(*(rank[name, m] for rank in slept), strict=True)
            row.append(100 * min((merge(per_rank) for per_rank in rounds), key=lambda line: line.total).bubble)
        print(f"{m:>14}{row[0]:>12.1f}{row[1]:>8.1f}{row[2]:>8.1f}")

    print(f"\n2 stages on gloo, {MODEL.num_layers} layers of width {MODEL.hidden_size}, {ROWS} sequences of {T} tokens")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    per_rank = launch(computing, ROUNDS, world_size=2)
    # the slower rank decides, round by round
    best = {way: min(map(max, zip(*(times[way] for times in per_rank), strict=True))) for way in per_rank[0]}
    print(f"{'micro-batches':>14}{'one rank':>10}{'afab':>8}{'1f1b':>8}  ms{'speed-up':>12}{'':>8}{'2m/(m+1)':>10}")
    for m in COUNTS:
        one, afab, f1b1 = (1e3 * best[name, m] for name in ("one rank", "afab", "1f1b"))
        ratios = f"{one / afab:>12.2f}{one / f1b1:>8.2f}{2 * m / (m + 1):>10.2f}"
        print(f"{m:>14}{one:>10.1f}{afab:>8.1f}{f1b1:>8.1f}    {ratios}")
    for (name, kib), seconds in best.items():
        if name == "message":
            print(f"a message of {kib:>3} KiB to the neighbour: {1e6 * seconds:.0f} us")
