"""One rank of a layout of any size, in this process alone: its real code runs, on tensors that have no memory.

A layout of 1,024 ranks is not tried on 1,024 GPUs to learn that its bytes were miscounted. What a rank does in a step
depends on its coordinates only, never on what it receives. So let one process be rank 517 of 1,024:

    process group   torch's fake one: every collective returns at once, and nothing is sent
    device          meta: tensors have a shape and a dtype, operations compute shapes, nothing is stored
    code            `parallelize`, `compute_gradients`, `update`: those of every training step, unchanged

The ledger counts what the rank hands to `torch.distributed`, which must be what `traffic.predict_step` says, to the
byte. The tensors that stay are counted as well, and must be what `footprint` says. Values are not computed: that they
are right is for `verify`, on the same layout with smaller axes.

One thing does depend on values: to which experts tokens go. Here as many rows travel as evenly chosen experts get
(`expert_traffic.even_rows`), which is also what is predicted; with a router's real choices both change alike.

    dry_run(run, rank=517).problems        what differs, in words; empty when all agrees
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from .collectives import ledger
from .collectives.operators import rehearsal
from .config import ConfigError, RunConfig
from .data.loader import Batch
from .memory.masters import SplitMasters
from .mesh import GROUPS, Mesh, coordinates
from .moe.dispatch import ExpertDispatch
from .monitoring.units import bytes_text
from .parallel.data import GradientBuckets
from .parallel.expert import mixtures
from .parallel.expert_traffic import Traffic, even_rows
from .parallel.footprint import Footprint, footprint
from .parallel.parallelize import Parallel, layout_of, parallelize
from .parallel.several import Several
from .parallel.traffic import predict_step
from .parallel.zero3 import ShardedWeights
from .training.optimizer import make_optimizer
from .training.step import compute_gradients, update

META = torch.device("meta")


@dataclass(frozen=True)
class DryRun:
    """What one rank would send in a step, and keep between steps."""

    rank: int
    index: dict[str, int]  # its coordinates
    parameters: int  # elements of all weights that it computes with
    predicted: Traffic
    counted: Traffic
    kept: Footprint  # predicted
    held: int  # bytes of weights, masters, gradients and optimizer state, counted

    @property
    def problems(self) -> list[str]:
        """Where prediction and count differ."""
        found = [
            f"rank {self.rank}: {axis} {operation}: predicted {self.predicted[axis, operation]:,} bytes, "
            f"counted {self.counted[axis, operation]:,}"
            for axis, operation in sorted({*self.predicted, *self.counted})
            if self.predicted[axis, operation] != self.counted[axis, operation]
        ]
        if self.held != self.kept.total:
            found.append(f"rank {self.rank}: predicted to keep {self.kept.total:,} bytes, counted {self.held:,}")
        return found


def dry_run(run: RunConfig, rank: int) -> DryRun:
    """Let this process be one rank for one training step.

    Args:
        run: resolved, with the vocabulary's size filled; of any number of ranks. `device` and `compile` do not count.

    Raises:
        ConfigError: there is no such rank, or this process is a rank already.
    """
    size = run.mesh.world_size
    if not 0 <= rank < size:
        raise ConfigError(f"rank={rank} is not one of the {size} of {run.layout}; use 0 to {size - 1}")
    if dist.is_initialized():
        raise ConfigError("a dry run makes a process group of its own; run it outside of the ranks")
    run = replace(run, train=replace(run.train, compile=False, cuda_graph=False, symmetric_memory=False))
    hook = sys.excepthook  # torch.distributed puts one of its own there, and leaves it
    dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=size, store=FakeStore())
    assert dist.group.WORLD is not None
    dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)  # else its end complains that none is
    try:
        with META, rehearsal():
            parallel = parallelize(run, Mesh.build(run.mesh), META)
            optimizer = make_optimizer(parallel.trained, run.train)
            for moe in (each for chunk in parallel.chunks for each in mixtures(chunk)):
                if isinstance(moe.dispatch, ExpertDispatch):
                    moe.dispatch.expected = partial(
                        even_rows, moe.config, run.mesh.ep, replicas=run.train.expert_replicas
                    )
            batches = [_batch(run) for _ in range(run.train.micro_batches)]
            with ledger.recording() as counted:
                update(parallel, optimizer, compute_gradients(parallel, batches)[0])
    finally:
        dist.destroy_process_group()
        GROUPS.clear()
        sys.excepthook = hook
    layout, index = layout_of(run), coordinates(run.mesh, rank)
    return DryRun(
        rank, index, sum(p.numel() for p in parallel.parameters.values()), predict_step(run, layout, index), counted,
        footprint(run, layout, index), held_bytes(parallel, optimizer),
    )  # fmt: skip


def _batch(run: RunConfig) -> Batch:
    shape = (run.train.micro_batch_size, run.train.seq_len)
    return Batch(*(torch.empty(shape, dtype=torch.int64) for _ in range(4)))


def held_bytes(parallel: Parallel, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all storages that stay between steps: weights, masters, gradient buffers, optimizer state."""
    gradients = parallel.gradients
    masters = parallel.masters
    beside = masters.rests if isinstance(masters, SplitMasters) else masters
    held: list[Tensor | None] = [*parallel.parameters.values(), *beside.values()]
    if isinstance(gradients, ShardedWeights):
        held += [row for unit in gradients.units for _, row in unit.buffers]
        gradients = gradients.gradients
    for reducer in gradients.reducers if isinstance(gradients, Several) else [gradients]:
        if isinstance(reducer, GradientBuckets):
            held += [bucket.buffer for bucket in reducer.buckets]
            held += getattr(reducer.reduce, "owed", {}).values()  # what compression has not sent yet
        else:
            held += [tensor for bucket in reducer.buckets for tensor in (bucket.shard, bucket.whole)]
    held += [value for state in optimizer.state.values() for value in state.values()]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor)}
    return sum(storages.values())


def sample(run: RunConfig) -> list[int]:
    """Ranks that stand for all: of each pipeline stage the first and the last one."""
    a_stage = run.mesh.world_size // run.mesh.pp
    return sorted({stage * a_stage + offset for stage in range(run.mesh.pp) for offset in (0, a_stage - 1)})


def table(run: RunConfig, results: Sequence[DryRun]) -> Table:
    """Results of some ranks as a table for a terminal."""
    out = Table(title=f"dry run of {run.layout}, {run.mesh.world_size} ranks", title_justify="left")
    for column in ("rank", "pp dp cp tp"):
        out.add_column(column)
    for column in ("parameters", "kept", "bytes sent a step", "messages agree"):
        out.add_column(column, justify="right")
    for each in results:
        where = " ".join(str(each.index[axis]) for axis in ("pp", "dp", "cp", "tp"))
        verdict = "to the byte" if not each.problems else each.problems[0]
        sent = f"{sum(each.counted.values()):,}"
        out.add_row(str(each.rank), where, f"{each.parameters:,}", bytes_text(each.held), sent, verdict)
    return out
