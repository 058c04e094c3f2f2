"""What this very machine can do, measured in half a minute: the rates that `parallel/machine.py` is made of.

    calibrate(run, ranks) -> Machine

**Computing.** Four rates are measured by themselves: a large matrix product, attention at the run's own sizes, a large
copy, and the start of an operator. Then passes of known work (some layers and the head of the run's own model, at
several micro-batches, and as narrow as tensor parallelism would leave them) are timed on all ranks at once, as in
training: ranks of one host share its memory, and a rank alone would look faster than it will be. Each pass is one
equation, its four numbers of work (`parallel/work.py`) times four seconds a unit.

The passes alone do not determine these: in layers of one shape products and activations grow together, and whatever
one is given the other loses. Least squares over them once found 3.5e15 flops a second on a GPU that makes 0.7e15. So
each unknown stays within bounds of what was measured of it alone (`fit`): a product of a layer is slower than a large
square one, but not by any factor; and between solutions that explain the passes equally well the nearest to those is
taken. How far the worst pass is missed is kept with the machine, and beyond `MISSED` it is not planned with.

**The host.** On a GPU none of the above contains what its host needs to launch it (`measure.py`). That is measured
beside it, for a layer and for a message.

**Sending.** Each collective at several sizes; latency and bandwidth are solved for in the same way.

**Overlap.** A pass with an all_reduce under way beside it, against both alone: what share of the message was hidden?

The result is kept in a file by the machine's fingerprint (device, cores, torch, dtype, compile, micro-batch, ranks,
model), so that `plan` asks the machine once.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import torch

from .config import ConfigError, RunConfig
from .launch import launch, under_torchrun
from .legality import resolve
from .measure import OPERATIONS, SIZES, measure, passes, payload
from .mesh import coordinates
from .parallel.expert_costs import DENSE
from .parallel.footprint import footprint
from .parallel.machine import MACHINES, Link, Machine, from_json, to_json, wire_bytes
from .parallel.messages import best_bucket
from .parallel.parallelize import layout_of

FREE = 1e30  # a rate that the fit found to cost nothing beside the others
NEAR = 1e-3  # weight of what was measured alone
COMPILED = 15  # operators of a compiled dense layer: seven products, attention, and what is fused between them
METHOD = 3  # counts up when something is measured otherwise, so that no file of before is taken
MISSED = 0.25  # by which a rate may fail to explain the very passes that it was made from
# Seconds a unit, over those that were measured alone: the least and the most. Products of a layer may be narrow; a kept
# activation is written once at least, and by eager code read and written several times; starts may hide behind work
BOUNDS = ((0.9, 4.0), (0.5, 2.0), (1.0, 12.0), (0.0, 3.0))


def calibrated(run: RunConfig, ranks: int, anew: bool = False) -> Machine:
    """This machine for a run, from its file, or measured now and kept.

    Args:
        run: resolved for one rank, with the vocabulary's size filled.
        ranks: that compute at once and send to each other; the machine's GPUs or cores.
        anew: measure also if there is a file.
    """
    path = Path(run.out) / ".cache" / f"machine-{_fingerprint(run, ranks)}.json"
    if path.exists() and not anew:
        return from_json(path.read_text(encoding="utf-8"))
    print("measuring this machine, up to a minute or two ...", file=sys.stderr, flush=True)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = load > cores / 4  # one process on two cores keeps it just below 1
    if busy:
        print(
            f"this machine was busy in the last minute: a load of {load:.1f} on {cores} cores. Beside another program "
            "links were once measured 1.4 to 3.3 times slower than they are: if any still runs, stop it and try "
            "plan --measure",
            file=sys.stderr,
            flush=True,
        )
    machine = calibrate(run, ranks)
    if busy:
        machine = replace(machine, source=f"{machine.source}, at a load of {load:.1f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(machine), encoding="utf-8")
    return machine


def on_one_rank(run: RunConfig, gpus: int) -> RunConfig:
    """The run without what only several ranks have, resolved: what a machine is measured with."""
    train = replace(run.train, batch_size=0, zero=0, zero_group=0, schedule="1f1b", virtual_stages=2, compress="none",
                    sequence_parallel=False, recompute="none", loss_chunks=1, reduce_group=0, dispatch="alltoall",
                    dispatch_parts=1, dispatch_payload="same", place_every=0, expert_replicas=0,
                    cuda_graph=False, symmetric_memory=False)  # fmt: skip
    return resolve(replace(run, layout="1", train=train), gpus=gpus)


def with_bucket(run: RunConfig, gpus: int) -> RunConfig:
    """The run with a `bucket_mb` of 0 replaced by the best for this machine's links (`messages.best_bucket`).

    Args:
        run: with the vocabulary's size filled, not resolved yet.
        gpus: that this machine has.

    Raises:
        ConfigError: the run is not legal, or this is a rank of `torchrun`.
    """
    if run.train.bucket_mb:
        return run
    if under_torchrun():
        raise ConfigError(
            "bucket_mb=0 measures the links in ranks of its own, and every rank of torchrun would; give it a number: "
            "`picotron-mini bench --bucket-mb 0` finds one"
        )
    probe = resolve(replace(run, train=replace(run.train, bucket_mb=25.0)), gpus=gpus)
    ranks = probe.mesh.dp * probe.mesh.cp
    if ranks == 1:
        return replace(run, train=replace(run.train, bucket_mb=25.0))
    machine = calibrated(on_one_rank(probe, gpus), min(ranks, gpus or os.cpu_count() or 1))
    layout, index = layout_of(probe), coordinates(probe.mesh, 0)
    plain = replace(probe, train=replace(probe.train, zero=0, zero_group=0, compress="none", reduce_group=0))
    size = footprint(plain, layout, index).gradients
    link = machine.inside.get("all_reduce") or machine.inside[""]
    return replace(run, train=replace(run.train, bucket_mb=best_bucket(size, link, ranks) / 2**20))


def _fingerprint(run: RunConfig, ranks: int) -> str:
    train = run.train
    device = torch.cuda.get_device_name() if train.device == "cuda" else f"cpu {os.cpu_count()}"
    what = train.dtype, train.compile, train.seq_len, train.micro_batch_size, train.document_mask
    parts = [METHOD, device, torch.__version__, *what, ranks, run.model]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def calibrate(run: RunConfig, ranks: int) -> Machine:
    """Measure."""
    found = launch(measure, run, world_size=ranks, device=run.train.device, timeout=600, output="hide")
    slowest = {key: max(rank[key] for rank in found) for key in found[0]}
    works = passes(run)
    rows, times = [work.numbers() for work, _ in works], [slowest["forward", n] for n in range(len(works))]
    eager = not run.train.compile or run.model.moe is not None
    alone = [slowest[name, 0] for name in ("product", "attention", "copy", "start")]
    alone[3] *= DENSE if eager else COMPILED
    units, missed = fit(rows, times, alone)
    product_, attention, activation, launch_ = units
    expected = [sum(n * each for n, each in zip(work.backward().numbers(), units, strict=True)) for work, _ in works]
    backward = statistics.median(slowest["backward", n] / seconds for n, seconds in enumerate(expected))
    cuda = run.train.device == "cuda"
    sizes = SIZES[run.train.device]
    if ranks > 1:
        links = {op: _link(op, ranks, sizes, slowest) for op in OPERATIONS}
        links[""] = links["send"]
    else:
        links = dict(MACHINES["h100"].inside)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    source = f"measured on {ranks} rank(s), torch {torch.__version__}"
    message = slowest["all_reduce", sizes[-1]] if ranks > 1 else 0.0
    # a host launches a layer's forward in a quarter of the time of both passes (`work.host_seconds`)
    host = host_message = 0.0
    if cuda:
        host = statistics.median(slowest["host", n] / 4 / work.modules for n, (work, _) in enumerate(works))
        host_message = slowest.get(("host_message", 0), MACHINES["h100"].host_message)
    hidden = 1 - (slowest["both", 0] - slowest["alone", 0]) / message if message else MACHINES["h100"].overlap
    return Machine(
        name=name, source=source if ranks > 1 else source + "; links: those of the preset h100",
        memory=torch.cuda.get_device_properties(0).total_memory if cuda else _host_memory() / ranks,
        product_flops=_rate(product_), attention_flops=_rate(attention), activation_bandwidth=_rate(activation),
        launch=launch_, backward=backward, accumulate=slowest["accumulate", 0], update=slowest["update", 0],
        overlap=min(1.0, max(0.0, hidden)), ranks_per_host=ranks, inside=links, host=host, host_message=host_message,
        cores=0 if cuda else os.cpu_count() or 1, missed=missed,
    )  # fmt: skip


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else FREE


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def fit(rows: Sequence[Sequence[float]], times: Sequence[float], alone: Sequence[float]) -> tuple[list[float], float]:
    """Seconds for a unit of each column that explain the times, near those that were measured alone.

        least   sum over rows (row . x / time - 1)^2  +  NEAR sum over columns (x / alone - 1)^2
        where   least <= x / alone <= most        for each column, by BOUNDS

    The second sum makes the solution unique whatever the rows are; it is so light that it decides only what they leave
    open. With so few columns every choice of those that are at a bound is tried; the best whose others are within wins.

    Args:
        alone: of each column, above 0.

    Returns:
        The seconds, and by which part the worst time is missed.
    """
    unit = torch.tensor(alone, dtype=torch.float64)
    a = torch.tensor(rows, dtype=torch.float64) * unit / torch.tensor(times, dtype=torch.float64)[:, None]
    number = len(BOUNDS)
    wanted = torch.cat([a, NEAR**0.5 * torch.eye(number, dtype=torch.float64)])  # the second sum as rows of its own
    aims = torch.cat([torch.ones(len(a)), torch.full((number,), NEAR**0.5)]).double()
    best, best_error = torch.ones(number, dtype=torch.float64), float("inf")
    for choice in product(("least", "most", "free"), repeat=number):
        x = torch.tensor([most if at == "most" else least for at, (least, most) in zip(choice, BOUNDS, strict=True)])
        x, free = x.double(), [column for column, at in enumerate(choice) if at == "free"]
        if free:
            fixed = [column for column in range(number) if column not in free]
            x[free] = torch.linalg.lstsq(wanted[:, free], (aims - wanted[:, fixed] @ x[fixed])[:, None]).solution[:, 0]
        within = all(least <= value <= most for value, (least, most) in zip(x.tolist(), BOUNDS, strict=True))
        if within and (error := float(((wanted @ x - aims) ** 2).sum())) < best_error:
            best, best_error = x, error
    return [float(each) for each in best * unit], float((a @ best - 1).abs().max())


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


def _link(operation: str, ranks: int, sizes: Sequence[int], slowest: dict[tuple[str, int], float]) -> Link:
    hops = max(1, (ranks - 1).bit_length())
    rows = [(float(hops), wire_bytes(operation, payload(operation, n, ranks), ranks)) for n in sizes]
    latency, per_byte = solve(rows, [slowest[operation, n] for n in sizes])
    return Link(latency, _rate(per_byte))
