"""Bug museum, room 02: the data, where nothing crashes and the model learns from something else than you think.

`verify` cannot see these: it makes its batches itself. So each has a check of its own, which asks the loader.
"""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment, misc"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...config import ModelConfig
from ...data import loader
from ...data.packing import Batch
from ...mesh import Mesh
from ...model.gpt import GPT, init_weights
from ..museum import Exhibit
from ..tiny_text import tiny_loader

SEED, BATCH, LENGTH = 3, 12, 16  # of the loaders below; G and T


# --- the mutants ------------------------------------------------------------------------------------------


def shards_by_rank() -> None:
    """Each data rank owns a contiguous share of the rows and shuffles that."""
    real, mine = loader.data_rows, (1, 0)

    def data_rows(batch_size: int, dp: int, dp_index: int, *rest: int) -> slice:
        nonlocal mine
        mine = dp, dp_index
        return real(batch_size, dp, dp_index, *rest)

    def rows(self: loader.Loader, n: int, rows: slice | None = None) -> np.ndarray:
        dp, index = mine
        share, each = self.num_rows // dp, self.batch_size // dp
        at = np.arange(self.batch_size)[rows or slice(None)] - index * each + n * each
        return loader.row_order(self.seed, 0, share)[at % share] + index * share

    loader.data_rows, loader.Loader.rows = data_rows, rows


def world_rank() -> None:
    """The batch is divided over all ranks there are, whatever else they share."""
    real = loader.data_rows

    def data_rows(batch_size: int, dp: int, dp_index: int, *rest: int) -> slice:
        return real(batch_size, dist.get_world_size(), dist.get_rank(), *rest)

    loader.data_rows = data_rows


def resumed_twice() -> None:
    """The loader counts the batches that it has yielded, and a resumed one counts from zero again."""
    real_init, real_rows = loader.Loader.__init__, loader.Loader.rows
    saved: dict[int, int] = {}  # step -> batches yielded, as the checkpoint of that step says

    def init(self: loader.Loader, *args: Any, **options: Any) -> None:
        real_init(self, *args, **options)
        self.first = None

    def rows(self: loader.Loader, n: int, rows: slice | None = None) -> np.ndarray:
        if self.first is None:  # a process begins at step n, and skips what the checkpoint says
            self.first, self.skip = n, saved.get(n, n)
        found = real_rows(self, self.skip + n - self.first, rows)
        yielded = n + 1 - self.first  # since this process began, not since the run did
        saved[n + 1] = min(yielded, saved.get(n + 1, yielded))  # a run without a stop, read beside it, heals nothing
        return found

    loader.Loader.__init__, loader.Loader.rows = init, rows


def epoch_forgotten() -> None:
    """Every epoch has the order of the first."""
    real = loader.row_order
    loader.row_order = lambda seed, epoch, num_rows: real(seed, 0, num_rows)


def documents_of_targets() -> None:
    """Documents are numbered by where the *targets* end, one token too early."""
    real = loader.read_rows

    def read_rows(stream: np.ndarray, rows: np.ndarray, seq_len: int, end: int, apart: bool = False) -> Batch:
        batch = real(stream, rows, seq_len, end, apart)
        batch.documents = (batch.targets == end).long().cumsum(1)
        return batch

    loader.read_rows = read_rows


# --- what notices them ------------------------------------------------------------------------------------


def one_batch_for_all_layouts(mesh: Mesh) -> None:
    """The data ranks together hold batch n of one device, and the ranks of one data rank hold the same part of it."""
    dp, micro_batches = mesh["dp"], 3
    with tiny_loader(LENGTH, BATCH, seed=SEED) as text:
        for n in range(2):
            mine = [
                text.rows(n, loader.data_rows(BATCH, dp.size, dp.index, micro_batches, k)) for k in range(micro_batches)
            ]
            everyone: list[Any] = [None] * mesh.shape.world_size
            dist.all_gather_object(everyone, (dp.index, np.concatenate(mine).tolist()))
            parts = dict(everyone)
            assert all(parts[index] == rows for index, rows in everyone), "ranks of one data rank read different rows"
            order = loader.row_order(SEED, 0, text.num_rows)
            got = [row for index in sorted(parts) for row in parts[index]]
            assert got == order[n * BATCH : (n + 1) * BATCH].tolist(), f"batch {n} is another one than on one device"


def each_batch_once_over_two_resumes(mesh: Mesh) -> None:
    """A run that is stopped and resumed twice reads what the run reads that was never stopped."""
    got = []
    for start, stop in ((0, 3), (3, 6), (6, 9)):
        with tiny_loader(LENGTH, BATCH, seed=SEED) as text:  # a new process has a new loader
            got += [text.rows(n).tolist() for n in range(start, stop)]
            order = np.concatenate([loader.row_order(SEED, epoch, text.num_rows) for epoch in range(3)])
    for n, rows in enumerate(got):
        assert rows == order[n * BATCH : (n + 1) * BATCH].tolist(), f"batch {n} is another one than without a stop"


def epochs_differ(mesh: Mesh) -> None:
    """Each epoch has every row once, and no two epochs have them in the same order."""
    with tiny_loader(LENGTH, BATCH, seed=SEED) as text:
        rows = np.concatenate([text.rows(n) for n in range(text.num_rows)])[: 6 * text.num_rows]
    epochs = rows.reshape(6, -1).tolist()
    assert all(sorted(epoch) == list(range(len(epoch))) for epoch in epochs), "a row is missing or comes twice"
    assert len({tuple(epoch) for epoch in epochs}) == 6, "two epochs have one order"


def mask_follows_the_text(mesh: Mesh) -> None:
    """With the mask, the model's output at a token depends on all of its document up to it, and on nothing else.

    Each token is changed in turn, and it is seen where the output moves.
    """
    config = ModelConfig(
        vocab_size=257, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
    )
    model = GPT(config)
    init_weights(model, 0)
    model.double()
    with tiny_loader(LENGTH, 1, shuffle=False) as text:
        batch = text.batch(0)
        end = text.stream.max()  # 256, which no byte is
    ended = (batch.tokens[0] == end).long()
    document = ended.cumsum(0) - ended  # an end token belongs to the document it closes
    assert document[-1] > 0, "one document only: nothing could be seen"
    with torch.no_grad():
        before = model(batch.tokens, batch.positions, batch.documents)
        for s in range(LENGTH):
            changed = batch.tokens.clone()
            changed[0, s] = (changed[0, s] + 1) % end
            after = model(changed, batch.positions, batch.documents)
            moved = (after - before).abs().amax(-1)[0] > 1e-12
            should = (document == document[s]) & (torch.arange(LENGTH) >= s)
            assert torch.equal(moved, should), f"token {s} is seen by {moved.nonzero().flatten().tolist()}"


EXHIBITS = [
    Exhibit(
        id="02.resumed_twice",
        title="Right after the first resume, wrong after the second",
        story="KempnerForge #57: the loader saved how many batches it had yielded and skipped as many after a restart, "
        "but the counter of the new process began at zero. The first resume is right. The second checkpoint says 10 "
        "where 40 batches were read, and the run reads 30 of them again. torchdata (#1437) and datasets (pull request "
        "8295) each had a mistake of this kind. A test that resumes once passes.",
        symptom="no error, and a loss that goes on falling: these batches the model has seen before.",
        patch=resumed_twice,
        killed_on=("dp=1", "dp=2"),
        survives_on=(),
        check=each_batch_once_over_two_resumes,
    ),
    Exhibit(
        id="02.shards_by_rank",
        title="A shuffle that depends on the number of ranks",
        story="Each data rank takes its share of the files and shuffles inside it. Every row comes once an epoch, and "
        "nothing is read twice. But batch n is another set of sequences on 2 ranks than on 4, so two loss curves "
        "differ for a reason that is no bug of the model, and a run that goes on with more ranks repeats some rows "
        "and leaves others out.",
        symptom="two layouts whose losses agree in no single step, with a sound model.",
        patch=shards_by_rank,
        killed_on=("dp=2", "dp=4"),
        survives_on=("dp=1", "tp=2"),
        check=one_batch_for_all_layouts,
    ),
    Exhibit(
        id="02.world_rank",
        title="A sampler that asked for the world",
        story="A sampler that is not told otherwise takes rank and number of ranks from the process group of all "
        "(DeepSpeed #99). With data parallelism alone that is right. With tensor parallelism two ranks that hold "
        "halves of one matrix then multiply them with different sequences, and add up the results.",
        symptom="all shapes fit; tensor-parallel ranks add up parts of different sequences, and a pipeline's last "
        "stage has the targets of sequences that the first one did not read.",
        patch=world_rank,
        killed_on=("tp=2", "dp=2,pp=2"),
        survives_on=("dp=1", "dp=2"),
        check=one_batch_for_all_layouts,
    ),
    Exhibit(
        id="02.epoch_forgotten",
        title="The same order in every epoch",
        story="PyTorch's DistributedSampler shuffles by its seed plus the epoch that it is told by set_epoch. Nobody "
        "has to tell it. Then all epochs have the order of the first one: the same neighbours in a batch, the same "
        "last batches before each validation.",
        symptom="the same batches follow each other in every epoch; nothing in runs of one epoch.",
        patch=epoch_forgotten,
        killed_on=("dp=1", "dp=2"),
        survives_on=(),
        check=epochs_differ,
    ),
    Exhibit(
        id="02.documents_of_targets",
        title="A mask that is one token off",
        story="Targets are the tokens moved by one. Number the documents of a packed row by where the targets end, and "
        "the last token of each document counts for the next one: it no longer sees its own text, and the next "
        "document sees it. Loss and shapes are plausible, and without the mask nothing changes at all.",
        symptom="no shape and no range is wrong; each document's last token attends in the next one.",
        patch=documents_of_targets,
        killed_on=("dp=1",),
        survives_on=(),
        check=mask_follows_the_text,
    ),
]
