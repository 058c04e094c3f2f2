"""Which layout should it be? All legal ones for so many ranks, predicted and ranked.

    ranks = pp * dp * cp * tp, every way to write it   x   zero, sequence parallel, schedule, micro-batch, recompute
        -> legality.resolve: what may run        (one predicate for all: here nothing is decided anew)
        -> predict, quickly: seconds and bytes
        -> the best of those that fit: predict again, with the schedule on its clock
        -> ranked by seconds

The global batch stays what it is, and so do the model and the sequence: layouts are compared at the same work. What can
be given up to save memory is only given up where it must be: the steps of `SAVINGS` are climbed until a layout fits, so
that a layout with recompute is listed only where it does not fit without. ZeRO 1 is tried from the start: it sends what
plain data parallelism sends, and each rank updates less.

Most layouts of a large machine are hopeless, and nobody wants to read about them: cut off are tensor and context
parallelism across hosts (exchanges in every layer over slow links), and pipelines of more stages than micro-batches.

A prediction orders layouts; it does not replace a measurement. `bench` the two or three best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from ..config import ConfigError, MeshShape, RunConfig, divisors
from ..legality import resolve
from .machine import GIB, Machine
from .messages import crosses_hosts
from .predict import Prediction, predict

# What saves memory, from what costs least: (zero, recompute). zero counts where dp > 1 only.
SAVINGS = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "selective"), (1, "full"), (3, "full"))
FINE = 40  # how many of the best are put on the clock


@dataclass(frozen=True)
class Plan:
    """The layouts that were looked at, best first."""

    machine: Machine
    ranks: int
    considered: int  # legal settings that were predicted
    refused: int  # that are not legal for the model and the work
    ranked: tuple[Prediction, ...]  # that fit, by seconds
    smallest: Prediction | None  # what needs least memory, where nothing fits


def meshes(ranks: int) -> list[MeshShape]:
    """Every way to write `ranks` as pp * dp * cp * tp."""
    return [
        MeshShape(pp, dp, cp, ranks // (pp * dp * cp))
        for pp in divisors(ranks)
        for dp in divisors(ranks // pp)
        for cp in divisors(ranks // (pp * dp))
    ]


def plan(run: RunConfig, ranks: int, machine: Machine) -> Plan:
    """Predict and rank the layouts of a run.

    Args:
        run: with the vocabulary's size filled. Its layout, zero, schedule, micro-batch, recompute and sequence
            parallelism are what is looked for. `batch_size` is kept; if it is open it is
            `micro_batch_size * micro_batches` sequences for every rank.

    Raises:
        ConfigError: no layout is legal, with the reasons why the plainest is not.
    """
    run = _with_batch(run, ranks)
    considered = refused = 0
    fitting: list[Prediction] = []
    smallest: Prediction | None = None
    for mesh in meshes(ranks):
        if any(getattr(mesh, axis) > 1 and crosses_hosts(mesh, axis, machine) for axis in ("tp", "cp")):
            continue
        for family in _families(run, mesh):
            fits = 0
            for candidate in family:
                try:
                    candidate = resolve(candidate, gpus=ranks)
                except ConfigError:
                    refused += 1
                    continue
                if mesh.pp > 1 and candidate.train.micro_batches < mesh.pp:
                    continue
                found = predict(candidate, machine, clock=False)
                considered += 1
                if smallest is None or found.memory_bytes < smallest.memory_bytes:
                    smallest = found
                if found.fits:
                    fitting.append(found)
                    fits += 1
                    # plain data parallelism that fits has ZeRO 1 to be compared with; else the first that fits is it
                    if candidate.train.zero or mesh.dp == 1 or fits > 1:
                        break
    if not considered:
        resolve(replace(run, layout=f"dp={ranks}"), gpus=ranks)  # says why
        raise ConfigError(f"no layout of {ranks} ranks is legal for this model and batch; try another --ranks")
    fitting.sort(key=lambda found: found.seconds)
    ranked = [*(predict(found.run, machine) for found in fitting[:FINE]), *fitting[FINE:]]
    ranked.sort(key=lambda found: found.seconds)
    return Plan(machine, ranks, considered, refused, tuple(ranked), None if fitting else smallest)


def _with_batch(run: RunConfig, ranks: int) -> RunConfig:
    train = run.train
    batch = train.batch_size or ranks * (train.micro_batch_size or 1) * (train.micro_batches or 1)
    return replace(run, train=replace(train, batch_size=batch))


def _families(run: RunConfig, mesh: MeshShape) -> Iterator[list[RunConfig]]:
    """Settings of one mesh, in lists that save more and more memory: the first that fits is the fastest of its list."""
    train = run.train
    if train.batch_size % mesh.dp:
        return
    a_rank = train.batch_size // mesh.dp
    sizes = [size for size in divisors(a_rank) if size & (size - 1) == 0 and size <= max(8, train.micro_batch_size)]
    schedules = ["1f1b", "interleaved", "zb-h1"] if mesh.pp > 1 else ["1f1b"]
    savings = SAVINGS if mesh.dp > 1 else ((0, "none"), (0, "selective"), (0, "full"))
    for size in sizes:
        for schedule in schedules:
            for between in (False, True) if mesh.tp > 1 else (False,):
                family = []
                for zero, kind in savings:
                    chosen: dict[str, Any] = {
                        "micro_batch_size": size, "micro_batches": a_rank // size, "schedule": schedule,
                        "virtual_stages": 2, "sequence_parallel": between, "zero": zero, "zero_group": 0,
                        "recompute": kind, "compress": "none" if zero else train.compress,
                    }  # fmt: skip
                    family.append(replace(run, layout=str(mesh), train=replace(train, **chosen)))
                yield family


def settings(run: RunConfig) -> str:
    """What besides the mesh makes a layout, as flags."""
    train = run.train
    words = [f"--micro-batch-size {train.micro_batch_size}"]
    words += [f"--zero {train.zero}"] if train.zero else []
    words += ["--sequence-parallel"] if train.sequence_parallel else []
    words += [f"--schedule {train.schedule}"] if run.mesh.pp > 1 else []
    words += [f"--recompute {train.recompute}"] if train.recompute != "none" else []
    words += [f"--loss-chunks {train.loss_chunks}"] if train.loss_chunks > 1 else []
    return " ".join(words)


def by_axis(prediction: Prediction) -> dict[str, int]:
    """Bytes a step by axis, of the rank that sends most."""
    out: dict[str, int] = {}
    for (axis, _), count in prediction.traffic.items():
        out[axis] = out.get(axis, 0) + count
    return out


def to_dict(found: Prediction) -> dict[str, Any]:
    """One layout as plain data, for `--json`."""
    train = found.run.train
    return {
        "layout": found.run.layout,
        **{
            name: getattr(train, name)
            for name in (
                "batch_size", "micro_batch_size", "micro_batches", "zero", "sequence_parallel", "schedule", "recompute",
                "loss_chunks",
            )
        },
        "step_seconds": found.seconds, "tokens_per_second": found.tokens_per_second, "seconds": found.parts,
        "memory_bytes": found.memory_bytes, "memory": found.memory, "fits": found.fits, "bytes": by_axis(found),
    }  # fmt: skip


def table(result: Plan, rows: int = 10) -> Table:
    """The best layouts as a table for a terminal."""
    shown: Sequence[Prediction] = result.ranked[:rows] or ([result.smallest] if result.smallest else [])
    verdict = (
        f"{len(result.ranked)} of {result.considered} legal layouts fit" if result.ranked else "NOTHING FITS; least"
    )
    out = Table(
        title=f"{result.ranks} ranks of {result.machine.name} with {result.machine.memory / GIB:.3g} GiB: {verdict}",
        title_justify="left", caption=f"rates: {result.machine.source}", caption_justify="left",
    )  # fmt: skip
    for column in ("layout", "settings"):
        out.add_column(column)
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    for column in ("step s", "tokens/s", "GiB", *(f"{kind}" for kind in kinds), "MiB sent a step"):
        out.add_column(column, justify="right")
    for found in shown:
        sent = " ".join(f"{axis} {count / 2**20:,.0f}" for axis, count in by_axis(found).items() if count > 2**19)
        out.add_row(
            found.run.layout, settings(found.run), f"{found.seconds:.3g}", f"{found.tokens_per_second:,.0f}",
            f"{found.memory_bytes / GIB:.3g}", *(f"{found.memory[kind] / GIB:.2g}" for kind in kinds), sent or "-",
        )  # fmt: skip
    return out
