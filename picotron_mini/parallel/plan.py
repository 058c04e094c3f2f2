"""Which layout should it be? All legal ones for so many ranks, predicted and ranked.

    ranks = pp * dp * cp * tp, every way to write it   x   zero, sequence parallel, schedule, micro-batch, recompute
    and, of a mixture of experts, ep: every number of the dp * cp ranks that can share the experts
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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from ..config import ConfigError, MeshShape, ModelConfig, RunConfig, divisors
from ..legality import notices, resolve
from .machine import Machine
from .messages import crosses_hosts
from .predict import Prediction, predict

# What saves memory, from what costs least: (zero, recompute). zero counts where dp > 1 only.
SAVINGS = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "selective"), (1, "full"), (3, "full"))
FINE = 40  # how many of the best are put on the clock
NEAR = 64  # how far other numbers of ranks are looked at when none of the wanted one works


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


def spreads(mesh: MeshShape, model: ModelConfig) -> list[MeshShape]:
    """The mesh with every `ep` over which its dp * cp ranks can spread the model's experts; itself if it has none."""
    both = gcd(mesh.dp * mesh.cp, model.moe.num_experts) if model.moe else 1
    return [replace(mesh, ep=ep) for ep in divisors(both)]


def plan(run: RunConfig, ranks: int, machine: Machine, skew: Callable[[int], float] = lambda ep: 1.0) -> Plan:
    """Predict and rank the layouts of a run.

    Args:
        run: with the vocabulary's size filled. Its layout, zero, schedule, micro-batch, recompute and sequence
            parallelism are what is looked for. `batch_size` is kept; if it is open it is
            `micro_batch_size * micro_batches` sequences for every rank.
        skew: load of the busiest of so many ep ranks over the even one (`expert_costs.py`).

    Raises:
        ConfigError: no layout is legal, with the reasons why the plainest is not, and numbers of ranks that work.
    """
    asked, run = run, _with_batch(run, ranks)
    considered = refused = 0
    fitting: list[Prediction] = []
    smallest: Prediction | None = None
    for mesh in _worth(ranks, machine):
        for family in (each for spread in spreads(mesh, run.model) for each in _families(run, spread, machine)):
            fits = 0
            for candidate in family:
                try:
                    candidate = resolve(candidate, gpus=ranks)
                except ConfigError:
                    refused += 1
                    continue
                if mesh.pp > 1 and candidate.train.micro_batches < mesh.pp:
                    continue
                found = predict(candidate, machine, clock=False, skew=skew(candidate.mesh.ep))
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
        raise ConfigError(_why_none(asked, ranks, machine))
    fitting.sort(key=lambda found: found.seconds)
    ranked = [*(predict(found.run, machine, skew=found.skew) for found in fitting[:FINE]), *fitting[FINE:]]
    ranked.sort(key=lambda found: found.seconds)
    return Plan(machine, ranks, considered, refused, tuple(ranked), None if fitting else smallest)


def _worth(ranks: int, machine: Machine) -> Iterator[MeshShape]:
    """The meshes that are looked at: those whose tp and cp stay inside a host."""
    for mesh in meshes(ranks):
        if not any(getattr(mesh, axis) > 1 and crosses_hosts(mesh, axis, machine) for axis in ("tp", "cp")):
            yield mesh


def _any_legal(run: RunConfig, ranks: int, machine: Machine) -> bool:
    """Whether `plan` would find something to predict."""
    run = _with_batch(run, ranks)
    for mesh in _worth(ranks, machine):
        for plainest, *_ in _families(run, mesh, machine):
            if plainest.train.micro_batches >= mesh.pp:
                try:
                    resolve(plainest, gpus=ranks)
                except ConfigError:
                    continue
                return True
    return False


def _why_none(run: RunConfig, ranks: int, machine: Machine) -> str:
    """Why no layout of so many ranks can be, and how many ranks could."""
    near = [
        next((n for n in numbers if n > 0 and _any_legal(run, n, machine)), 0)
        for numbers in (range(ranks - 1, max(0, ranks - NEAR), -1), range(ranks + 1, ranks + NEAR))
    ]
    works = " or ".join(str(n) for n in near if n)
    out = f"no layout of {ranks} ranks works for this model and batch; " + (
        f"--ranks {works} would" if works else "another --batch-size might"
    )
    try:
        resolve(replace(_with_batch(run, ranks), layout=f"dp={ranks}"), gpus=ranks)
    except ConfigError as error:
        return f"{out}. With dp={ranks}: " + "; ".join(str(error).splitlines())
    return out


def _with_batch(run: RunConfig, ranks: int) -> RunConfig:
    train = run.train
    batch = train.batch_size or ranks * (train.micro_batch_size or 1) * (train.micro_batches or 1)
    return replace(run, train=replace(train, batch_size=batch))


def _families(run: RunConfig, mesh: MeshShape, machine: Machine) -> Iterator[list[RunConfig]]:
    """Settings of one mesh, in lists that save more and more memory: the first that fits is the fastest of its list."""
    train = run.train
    if train.batch_size % mesh.dp:
        return
    a_rank = train.batch_size // mesh.dp
    divides = mesh.dp * mesh.cp % (train.reduce_group or 1) == 0
    sizes = [size for size in divisors(a_rank) if size & (size - 1) == 0 and size <= max(8, train.micro_batch_size)]
    schedules = ["1f1b", "interleaved", "zb-h1"] if mesh.pp > 1 else ["1f1b"]
    shared = train.symmetric_memory and not crosses_hosts(mesh, "dp", machine)
    savings = SAVINGS if mesh.dp > 1 else ((0, "none"), (0, "selective"), (0, "full"))
    for size in sizes:
        for schedule in schedules:
            for between in (False, True) if mesh.tp > 1 else (False,):
                family = []
                for zero, kind in savings:
                    chosen: dict[str, Any] = {
                        "micro_batch_size": size, "micro_batches": a_rank // size, "schedule": schedule,
                        "dispatch": train.dispatch if mesh.ep > 1 else "alltoall",
                        "dispatch_parts": train.dispatch_parts if mesh.ep > 1 else 1,
                        "dispatch_payload": train.dispatch_payload if mesh.ep > 1 else "same",
                        "place_every": train.place_every if mesh.ep > 1 else 0,
                        "expert_replicas": train.expert_replicas if mesh.ep > 1 else 0,
                        "virtual_stages": 2, "sequence_parallel": between, "zero": zero, "zero_group": 0,
                        "symmetric_memory": shared and (zero > 0 or (between and train.tensor_overlap > 1)),
                        "recompute": kind, "compress": "none" if zero else train.compress,
                        "reduce_group": train.reduce_group if not zero and divides else 0,
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
    words += [f"--zero-group {train.zero_group}"] if train.zero_group else []
    words += ["--symmetric-memory"] if train.symmetric_memory else []
    words += ["--cuda-graph"] if train.cuda_graph else []
    words += [f"--dispatch {train.dispatch}"] if train.dispatch != "alltoall" else []
    words += [f"--dispatch-parts {train.dispatch_parts}"] if train.dispatch_parts > 1 else []
    words += [f"--dispatch-payload {train.dispatch_payload}"] if train.dispatch_payload != "same" else []
    words += [f"--place-every {train.place_every}"] if train.place_every else []
    words += [f"--expert-replicas {train.expert_replicas}"] if train.expert_replicas else []
    return " ".join(words)


def by_axis(prediction: Prediction) -> dict[str, int]:
    """Bytes a step by axis, of the rank that sends most."""
    out: dict[str, int] = {}
    for (axis, _), count in prediction.traffic.items():
        out[axis] = out.get(axis, 0) + count
    return out


def to_dict(found: Prediction) -> dict[str, Any]:
    """One layout as plain data, for `--json`. Which keys there are does not depend on the layout.

    layout                what `--layout` takes; ep, its share for experts, beside it
    batch_size ... cuda_graph     settings, named as their flags
    skew                  that was assumed of the busiest of ep ranks
    step_seconds, tokens_per_second, seconds    of a step; of all ranks together; the former by what it is spent on
    memory_bytes, memory, fits    of the rank that needs most; by what it is for; whether the machine has it
    bytes                 that a rank sends in a step, by axis
    notices               what it does not gain, in words (`legality.notices`)
    """
    train = found.run.train
    sent = by_axis(found)
    return {
        "layout": found.run.layout, "ep": found.run.mesh.ep,
        **{name: getattr(train, name) for name in SETTINGS},
        "skew": found.skew,
        "step_seconds": found.seconds, "tokens_per_second": found.tokens_per_second,
        "seconds": {name: found.parts.get(name, 0.0) for name in SPENT},
        "memory_bytes": found.memory_bytes, "memory": {name: found.memory.get(name, 0) for name in NEEDED},
        "fits": found.fits, "bytes": {axis: sent.get(axis, 0) for axis in SENT},
        "notices": notices(found.run),
    }  # fmt: skip


SETTINGS = (
    "batch_size", "micro_batch_size", "micro_batches", "zero", "zero_group", "symmetric_memory", "sequence_parallel",
    "schedule",
    "recompute", "loss_chunks", "dispatch", "dispatch_parts", "dispatch_payload", "cuda_graph",
)  # fmt: skip
SPENT = ("computing", "host", "bubble", "tp", "cp", "ep", "dp", "gradients and weights", "update", "scalars")
NEEDED = ("weights", "gradients", "optimizer", "activations", "routing", "buffers")
SENT = ("dp", "dp_cp", "cp", "tp", "pp", "ep", "edp", "world")
