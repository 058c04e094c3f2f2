"""What a rank keeps from step to step, measured: every storage that is alive once some steps are over.

    launch(kept, runs, world_size=4)[0]   ->   for each run (bytes of weights and masters, bytes of everything)

`footprint` predicts these numbers from a layout alone. Here a rank trains two steps and Python's garbage collector is
asked for every tensor that is still there. Nothing is left out because somebody forgot to list it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import RunConfig
from ...memory.masters import SplitMasters
from ...mesh import Mesh
from ...parallel.parallelize import parallelize
from ...training.optimizer import make_optimizer
from ...training.step import train_step
from ...verify import make_batches


def storages() -> dict[int, int]:
    """Every storage that any tensor of this process has: address -> bytes."""
    gc.collect()
    # by type: asking some of torch's objects for their class warns
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found if x.untyped_storage().nbytes()}


def kept(runs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """In a rank, for each run: the bytes of weights and masters, and of all that a training keeps.

    Args:
        runs: resolved, of one mesh, on the CPU.
    """
    mesh = Mesh.build(runs[0].mesh)
    gc.collect()
    gc.freeze()  # what is there already need not be looked through
    out = []
    for run in runs:
        before = storages()
        parallel = parallelize(run, mesh, torch.device("cpu"))
        optimizer = make_optimizer(parallel.trained, run.train)
        batches = make_batches(run)[:2]
        for batch in batches:
            train_step(parallel, optimizer, [batch] * run.train.micro_batches)
        batches.clear()
        masters = parallel.masters
        beside = masters.rests if isinstance(masters, SplitMasters) else masters
        for master in beside.values():
            master.grad = None
        del batch
        rows = [row for unit in getattr(parallel.gradients, "units", []) for _, row in unit.buffers]
        states = [*parallel.parameters.values(), *beside.values(), *rows]
        weights = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in states}
        totals = []
        for _ in range(5):  # gloo's thread may hold what was sent last a moment longer
            totals.append(sum(n for at, n in storages().items() if before.get(at) != n))
            time.sleep(0.02)
        out.append((sum(weights.values()), min(totals)))
        del parallel, optimizer, states, rows, master, masters, beside
    return out
