"""What this very machine can do, measured in half a minute: the rates that `parallel/machine.py` is made of.

    calibrate(run, ranks) -> Machine

**Computing.** Passes of known work (some layers and the head of the run's own model, at several micro-batches, and as
narrow as tensor parallelism would leave them) are timed on all ranks at once, as in training: ranks of one host share
its memory, and a rank alone would look faster than it will be. Each pass is one equation, its four numbers of work
(`parallel/work.py`) times four unknown seconds; there are more equations than unknowns, so the squares of the relative
errors are made least, with no rate below zero. The best of some rounds counts, of the slowest rank.

**Sending.** Each collective at several sizes; latency and bandwidth are solved for in the same way.

**Overlap.** A pass with an all_reduce under way beside it, against both alone: what share of the message was hidden?

The result is kept in a file by the machine's fingerprint (device, cores, torch, dtype, compile, ranks, model), so that
`plan` asks the machine once.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from .collectives import all_gather, all_reduce, all_reduce_async, all_to_all, barrier, receive, reduce_scatter, send
from .config import MeshShape, RunConfig
from .launch import launch
from .legality import layout_problems
from .mesh import Axis, Mesh
from .model.costs import parameters
from .model.gpt import GPT, init_weights
from .parallel.activations import share_of
from .parallel.machine import MACHINES, Link, Machine, from_json, to_json, wire_bytes
from .parallel.parallelize import DTYPES
from .parallel.work import Work, forward_work
from .training.optimizer import clip_factor, make_optimizer

LAYERS = 2  # of a timed pass: enough that the time of one is not that of its start
ROUNDS = 10
SIZES = (2**10, 2**16, 2**20, 2**23)  # bytes of the timed messages
ELEMENTS = 8_000_000  # of the timed update, or as many as the model has


def calibrated(run: RunConfig, ranks: int, measure: bool = False) -> Machine:
    """This machine for a run, from its file, or measured now and kept.

    Args:
        run: resolved for one rank, with the vocabulary's size filled.
        ranks: that compute at once and send to each other; the machine's GPUs or cores.
        measure: measure in any case.
    """
    path = Path(run.out) / ".cache" / f"machine-{_fingerprint(run, ranks)}.json"
    if path.exists() and not measure:
        return from_json(path.read_text(encoding="utf-8"))
    machine = calibrate(run, ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(machine), encoding="utf-8")
    return machine


def _fingerprint(run: RunConfig, ranks: int) -> str:
    train = run.train
    device = torch.cuda.get_device_name() if train.device == "cuda" else f"cpu {os.cpu_count()}"
    parts = [
        device,
        torch.__version__,
        train.dtype,
        train.compile,
        train.seq_len,
        train.document_mask,
        ranks,
        run.model,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def calibrate(run: RunConfig, ranks: int) -> Machine:
    """Measure."""
    found = launch(_on_rank, run, world_size=ranks, device=run.train.device, timeout=600, output="hide")
    slowest = {key: max(rank[key] for rank in found) for key in found[0]}
    works = _passes(run)
    rows, times = [work.numbers() for work, _ in works], [slowest["forward", n] for n in range(len(works))]
    product, attention, activation, launch_ = solve(rows, times)
    expected = [
        sum(
            n * each
            for n, each in zip(work.backward().numbers(), (product, attention, activation, launch_), strict=True)
        )
        for work, _ in works
    ]
    backward = statistics.median(slowest["backward", n] / seconds for n, seconds in enumerate(expected))
    cuda = run.train.device == "cuda"
    if ranks > 1:
        links = {op: _link(op, ranks, slowest) for op in _OPERATIONS}
        links[""] = links["send"]
    else:
        links = dict(MACHINES["h100"].inside)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    source = f"measured on {ranks} rank(s), torch {torch.__version__}"
    message = slowest["all_reduce", SIZES[-1]] if ranks > 1 else 0.0
    hidden = 1 - (slowest["both", 0] - slowest["alone", 0]) / message if message else MACHINES["h100"].overlap
    return Machine(
        name=name, source=source if ranks > 1 else source + "; links: those of the preset h100",
        memory=torch.cuda.get_device_properties(0).total_memory if cuda else _host_memory() / ranks,
        product_flops=_rate(product), attention_flops=_rate(attention), activation_bandwidth=_rate(activation),
        launch=launch_, backward=backward, accumulate=slowest["accumulate", 0], update=slowest["update", 0],
        overlap=min(1.0, max(0.0, hidden)), ranks_per_host=ranks, inside=links,
        cores=0 if cuda else os.cpu_count() or 1,
    )  # fmt: skip


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else 1e30  # the fit found that this part costs nothing beside the others


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def solve(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Seconds for a unit of each column, none below zero, that make the squares of the relative errors least.

    With so few unknowns every subset of them is tried as the ones above zero; the best that has none below wins.
    """
    a = torch.tensor(rows, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64)[:, None]
    scale = a.abs().amax(0).clamp(min=1e-300)  # columns of like size, or the solver takes the small ones for zero
    a, ones = a / scale, torch.ones(len(times), 1, dtype=torch.float64)
    best, best_error = torch.zeros(a.shape[1], dtype=torch.float64), float("inf")
    for size in range(1, a.shape[1] + 1):
        for columns in combinations(range(a.shape[1]), size):
            found = torch.linalg.lstsq(a[:, columns], ones).solution[:, 0]
            error = float(((a[:, columns] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = torch.zeros_like(best), error
                best[list(columns)] = found
    return [float(x) for x in best / scale]


def _link(operation: str, ranks: int, slowest: dict[tuple[str, int], float]) -> Link:
    hops = max(1, (ranks - 1).bit_length())
    rows = [(float(hops), wire_bytes(operation, _payload(operation, n, ranks), ranks)) for n in SIZES]
    latency, per_byte = solve(rows, [slowest[operation, n] for n in SIZES])
    return Link(latency, _rate(per_byte))


def _payload(operation: str, size: int, ranks: int) -> float:
    return size / ranks if operation == "all_gather" else size


# --- on each rank -----------------------------------------------------------------------------------------


def _passes(run: RunConfig) -> list[tuple[Work, tuple[int, int, bool]]]:
    """The passes to time: their work, and micro-batch, tensor-parallel size and whether it is the head."""
    size = run.train.micro_batch_size
    out = []
    for tp in (1, 2, 4):
        mesh = MeshShape(tp=tp)
        if layout_problems(run.model, mesh):
            continue
        for micro_batch in sorted({max(1, size // 2), size, 2 * size} if tp == 1 else {size}):
            train = replace(run.train, micro_batch_size=micro_batch, recompute="none", sequence_parallel=False)
            each = replace(run, layout=str(mesh), train=train)
            out.append((forward_work(each, LAYERS, False), (micro_batch, tp, False)))
    for micro_batch in (max(1, size // 2), 2 * size):
        each = replace(run, layout="1", train=replace(run.train, micro_batch_size=micro_batch))
        out.append((forward_work(each, 0, True), (micro_batch, 1, True)))
    return out


def _on_rank(run: RunConfig) -> dict[tuple[str, int], float]:
    """Seconds of everything, by name and number or size."""
    mesh = Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))
    axis, cuda = mesh["dp"], run.train.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    out: dict[tuple[str, int], float] = {}

    def timed(*calls: Callable[[], object]) -> list[float]:
        """Best seconds of each call, all made in turn."""
        times: list[list[float]] = [[] for _ in calls]
        for round_ in range(ROUNDS + 2):
            barrier(axis)
            for call, found in zip(calls, times, strict=True):
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                if round_ > 1:
                    found.append(time.perf_counter() - start)
        return [min(found) for found in times]

    for number, (_, which) in enumerate(_passes(run)):
        forward, backward = _pass(run, which, device)
        out["forward", number], out["backward", number] = timed(forward, backward)
    if axis.size > 1:
        for operation, collective in _OPERATIONS.items():
            for size in SIZES:
                x = torch.ones(int(_payload(operation, size, axis.size)) // 4, device=device)
                (out[operation, size],) = timed(lambda c=collective, x=x: c(x, axis))  # type: ignore[misc]
        x = torch.ones(SIZES[-1] // 4, device=device)
        forward, backward = _pass(run, _passes(run)[0][1], device)

        def alone() -> None:
            forward()
            backward()

        def both() -> None:
            work = all_reduce_async(x, axis)
            alone()
            work.wait()

        out["alone", 0], out["both", 0] = timed(alone, both)
    weights = {
        str(i): torch.randn(250, 1000, device=device)
        for i in range(max(1, min(ELEMENTS, parameters(run.model)) // 250_000))
    }
    gradients = [torch.randn_like(weight) for weight in weights.values()]
    others = [torch.randn_like(weight) for weight in weights.values()]
    optimizer = make_optimizer(weights, run.train)

    def update() -> None:
        factor = clip_factor(torch.nn.utils.get_total_norm(gradients), 1.0)
        torch._foreach_mul_(gradients, factor)
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    elements = 250_000 * len(weights)
    adding = lambda: [a.add_(b) for a, b in zip(gradients, others, strict=True)]  # noqa: E731
    times = timed(update, adding)
    out["update", 0], out["accumulate", 0] = (seconds / elements for seconds in times)
    return out


def _pass(run: RunConfig, which: tuple[int, int, bool], device: torch.device) -> tuple[Callable[[], object], ...]:
    """The forward and the backward of some layers, or of the head with the loss, to be called in turn."""
    micro_batch, tp, head = which
    model = GPT(share_of(run.model, tp), layers=range(0 if head else LAYERS), embed=False, head=head)
    init_weights(model, 0)
    model = model.to(device, DTYPES[run.train.dtype])
    if run.train.compile:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]
        model.cross_entropy = torch.compile(model.cross_entropy)
    shape = (micro_batch, run.train.seq_len)
    hidden = torch.randn(
        *shape, run.model.hidden_size, device=device, dtype=DTYPES[run.train.dtype], requires_grad=True
    )
    targets = torch.randint(run.model.vocab_size, shape, device=device)
    documents = torch.zeros(shape, dtype=torch.int64, device=device) if run.train.document_mask else None
    kept: list[torch.Tensor] = []

    def forward() -> None:
        out = model(hidden, None, documents)
        kept[:] = [model.loss(out, targets) if head else out.sum()]

    def backward() -> None:
        kept.pop().backward()

    return forward, backward


def _exchange(x: torch.Tensor, axis: Axis) -> None:
    """A message from each even rank to the next one."""
    if axis.index % 2 == 0 and axis.index + 1 < axis.size:
        send(x, axis, axis.index + 1).wait()
    elif axis.index % 2:
        receive(x, axis, axis.index - 1).wait()


_OPERATIONS: dict[str, Callable[[torch.Tensor, Axis], object]] = {
    "all_reduce": all_reduce,
    "all_gather": lambda x, axis: all_gather(x, axis, 0),
    "reduce_scatter": lambda x, axis: reduce_scatter(x, axis, 0),
    "all_to_all": all_to_all,
    "send": _exchange,
}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
