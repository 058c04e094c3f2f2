"""ZeRO 3, fully sharded data parallelism: a rank keeps its part of the weights, and borrows the rest when it computes.

ZeRO 1 and 2 (zero.py) leave the whole weights on every rank. Yet a layer's weights are needed only while that layer
runs. So each unit (a block, the embedding, the head) is put together just before and freed just after, in the forward
and once more in the backward:

    all_gather 1 | all_gather 2 | all_gather 3 |                                    while a unit computes, the
                 | forward 1    | forward 2    | forward 3 | ...                    next one's weights travel
                                 free 1         free 2

    all_gather 3 | all_gather 2 |       all_gather 1       |
                 | backward 3   | backward 2               | backward 1   | ...
                                | free 3, reduce_scatter 3 | free 2, reduce_scatter 2 |

A freed parameter keeps its shape and its storage has no bytes. What autograd has saved for the backward is that same
storage, filled again in time, so no operator notices, and no compiled code. The collective writes right into it: a
storage has room for the padding, too (rows.py).

When a unit's backward is about to start, and when it is over, is found out in uses.py.

In a pipeline a stage may hold several chunks of the model, and call one for many micro-batches before the next: so
nothing travels ahead for another chunk. And a backward may come in two halves (deferred.py), the second of which makes
the gradients of matrices and needs no weights. Then a unit has two messages of gradients, each reduced when the last of
its gradients has been added.

Modules that share a parameter (a tied embedding and head) are one unit that is used in two places: it is put together
for each of them, and reduced after the backward of the first place, which comes last.

Cost in payload, in each micro-batch and for a unit of C padded columns (w bytes a weight, g a gradient element):
    all_gather   C w forward and C w backward (none where nothing above needs a gradient)
    reduce_scatter   N (C + P) g, as in ZeRO 2
On each rank's wire a ring moves (N - 1) times an all_gather's payload and (N - 1) / N times a reduce_scatter's: about
3 E elements, where plain data parallelism has 2 E. But that is once a step there, and here in every micro-batch.
Memory: 1/N of weights, gradients, masters and optimizer state, and the weights of two units.

In symmetric memory (collectives/symmetric.py) a rank copies the others' rows when it needs them, and they need not
notice. They must not write meanwhile: all meet before the update, and before the first use behind it.

Papers: ZeRO (arXiv 1910.02054), PyTorch FSDP (arXiv 2304.11277). PyTorch's own: torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..collectives import SymmetricMemory, Work, all_gather_several
from ..mesh import Axis
from ..model.gpt import GPT
from .deferred import halves
from .rows import Cut, alike, cut
from .several import SeveralSharded, by_axis
from .uses import Use
from .zero import ShardedGradients

SETTLED = 3  # units of a chunk's forward, behind which the last reductions of the backward before have travelled


def empty(like: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of this shape that has no storage, as a freed parameter has none."""
    out = torch.empty_like(like, device=device, dtype=dtype)
    out.untyped_storage().resize_(0)
    return out


@dataclass(eq=False)
class _Unit:
    """Parameters that come and go together, in one message for each dtype."""

    buffers: list[tuple[list[Cut], Tensor]]  # the cuts, and this rank's rows [C]
    axes: list[Axis] = field(default_factory=list)  # of each buffer: the ranks that have the other rows
    tables: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # the storage of each, with room for the padding
    travelling: list[Work] = field(default_factory=list)  # what fills them
    here: bool = False


class ShardedWeights:
    """The weights of any modules, cut over an axis, put together around each use; the gradients as in ZeRO 2.

        sharded = ShardedWeights([embed, *blocks, norm, head], mesh["dp"])
        for micro_batch in ...:
            loss(micro_batch).backward()
            sharded.after_backward()
        sharded.finish()            # now sharded.gradient(p) is this rank's rows of the sum
        optimizer.step()            # over the rows that sharded.own(p) gives
        sharded.publish(masters)    # where masters are others than these rows
        sharded.reset()

    All ranks must call the modules in the same order. A module has to be called, not its parameters used from outside.

    Args:
        modules: in the order in which the forward uses them; between them they have all parameters.
        chunks: how many of the modules, one after another, are called in one go; None: all. Nothing travels ahead from
            one chunk for the next.
        counted: reduce a unit's gradients when they have been added to as often as `arm` says, and not at the end of
            its backward: for backwards whose weight gradients come later (`deferred.py`).
        rows: as `rows.cut` has it.
        copies: of each axis that parameters are cut over, as `ShardedGradients` has it.
        others: the axis of those parameters that are cut over another one.
        memories: of each axis; the rows lie in it then, and ranks read them there, without the ranks that have them.

    A parameter's value is taken over from the module, unless it has no storage (see `empty`); then fill `own`.
    """

    def __init__(
        self, modules: Sequence[nn.Module], axis: Axis, *, rows: Mapping[nn.Parameter, int] | None = None,
        copies: Mapping[Axis, Sequence[Axis]] | None = None, others: Mapping[nn.Parameter, Axis] | None = None,
        chunks: Sequence[int] | None = None, counted: bool = False,
        memories: Mapping[Axis, SymmetricMemory] | None = None,
    ) -> None:  # fmt: skip
        others, copies, self.counted = others or {}, copies or {}, counted
        self.memories = memories or {}
        self._written = True  # whether others' rows may have changed since the last meeting
        self.begins = list(accumulate(chunks or [len(modules)], initial=0))  # the place where each chunk begins
        assert self.begins[-1] == len(modules), "every module is in a chunk"
        self._own: dict[nn.Parameter, Tensor] = {}
        self.units: list[_Unit] = [_Unit([])] * len(modules)  # by place; the same twice where modules share a parameter
        for parameters, places in _sharing(modules):
            unit = self._make(parameters, rows or {}, lambda p: others.get(p, axis))
            for place in places:
                self.units[place] = unit
        apart = halves(modules) if counted else {}
        groups: dict[Axis, list[list[nn.Parameter]]] = {}
        for unit in dict.fromkeys(self.units):
            for (cuts, _), over in zip(unit.buffers, unit.axes, strict=True):
                groups.setdefault(over, []).extend(alike([each.parameter for each in cuts], apart))
        self.gradients = SeveralSharded(
            (
                ShardedGradients(
                    each,
                    over,
                    start="each" if counted else "told",
                    rows=rows,
                    copies=copies.get(over, ()),
                    bucket_bytes=math.inf,
                    memory=self.memories.get(over),
                ),
                [parameter for group in each for parameter in group],
            )
            for over, each in groups.items()
        )
        self.uses = [
            Use(
                module,
                before_forward=partial(self._before_forward, place),
                after_forward=partial(self._free, self.units[place]),
                before_backward=partial(self._before_backward, place),
                after_backward=partial(self._after_backward, place),
            )
            for place, module in enumerate(modules)
        ]

    def _make(
        self, parameters: Sequence[nn.Parameter], rows: Mapping[nn.Parameter, int],
        axis_of: Callable[[nn.Parameter], Axis],
    ) -> _Unit:  # fmt: skip
        unit = _Unit([])
        groups = [(axis, group) for axis, mine in by_axis(parameters, axis_of).items() for group in alike(mine)]
        for axis, group in groups:
            cuts, columns = cut(group, axis.size, rows)
            row = self._room(columns, group[0], axis).zero_()
            unit.buffers.append((cuts, row))
            unit.axes.append(axis)
            for each in cuts:
                weight = each.parameter
                self._own[weight] = each.own(row, axis.index)
                if weight.untyped_storage().nbytes():
                    self._own[weight].copy_(each.part(weight.data, axis.index))
                unit.tables[weight] = row.new_empty(axis.size * each.columns)
                weight.data = each.whole(unit.tables[weight])
                unit.tables[weight].untyped_storage().resize_(0)
        return unit

    def _room(self, columns: int, like: Tensor, axis: Axis) -> Tensor:
        memory = self.memories.get(axis)
        return memory.empty(columns, like.dtype) if memory else like.new_empty(columns).detach()

    # --- weights come and go ------------------------------------------------------------------------------

    def _fetch(self, unit: _Unit) -> None:
        """Let the weights of a unit set out, unless they are here or under way."""
        if not unit.here and not unit.travelling:
            if self._written:
                self._meet()
                self._written = False
            for table in unit.tables.values():
                table.untyped_storage().resize_(table.nbytes)
            for (cuts, row), axis in zip(unit.buffers, unit.axes, strict=True):
                tables = [unit.tables[each.parameter] for each in cuts]
                rows = [each.row(row) for each in cuts]
                memory = self.memories.get(axis)
                work = memory.all_gather_several(tables, rows) if memory else all_gather_several(tables, rows, axis)
                unit.travelling.append(work)

    def _meet(self) -> None:
        for memory in self.memories.values():
            memory.meet()

    def _need(self, unit: _Unit) -> None:
        """Have the weights of a unit here."""
        self._fetch(unit)
        for work in unit.travelling:
            work.wait()
        unit.travelling, unit.here = [], True

    def _free(self, unit: _Unit) -> None:
        if unit.here:
            for table in unit.tables.values():
                table.untyped_storage().resize_(0)
        unit.here = False

    # --- the four borders of a use ------------------------------------------------------------------------

    def _before_forward(self, place: int) -> None:
        self._need(self.units[place])
        if place + 1 not in self.begins:
            self._fetch(self.units[place + 1])
        begin, end = next(each for each in pairwise(self.begins) if each[0] <= place < each[1])  # of this chunk
        if place == min(begin + SETTLED, end - 1):
            self.gradients.settle()  # memory is wanted for activations again

    def _before_backward(self, place: int) -> None:
        self._need(self.units[place])
        if place not in self.begins and self.uses[place - 1].reached:
            self._fetch(self.units[place - 1])

    def _after_backward(self, place: int) -> None:
        unit = self.units[place]
        self._free(unit)
        places = [other for other, each in enumerate(self.units) if each is unit and self.uses[other].reached]
        if place == places[0] and not self.counted:  # the last of its uses in the backward
            self.gradients.start_of(each.parameter for cuts, _ in unit.buffers for each in cuts)

    # --- one step, as in `ShardedGradients` ---------------------------------------------------------------

    def reset(self) -> None:
        """Forget the gradients, before the next step."""
        self.gradients.reset()

    def arm(self, times: Mapping[nn.Parameter, int] | None = None) -> None:
        """As `ShardedGradients.arm`, if `counted`; else nothing: each backward reduces its own gradients."""
        if self.counted:
            self.gradients.arm(times)

    def after_backward(self) -> None:
        """End the uses whose input needed no gradient. After each backward (of two halves the first), on every rank."""
        for use in reversed(self.uses):
            use.end()

    def finish(self) -> None:
        """Wait for all reductions, and until all have read the weights that change now. Once a step, on every rank."""
        self.gradients.finish()
        self._meet()
        self._written = True

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's rows of the sum (after `finish`), float32 at least; None if no rank had a gradient."""
        return self.gradients.gradient(parameter)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's rows of a parameter, which is what it keeps of it; to be written before the first use of the
        modules, or between `finish` and the next use."""
        return self._own[parameter]

    @torch.no_grad()
    def publish(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        """Round this rank's rows of the masters into its rows of the weights; the others see them at the next use."""
        pairs = [(self._own[p], master) for p, master in masters.items() if master is not self._own[p]]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [master for _, master in pairs])

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every rank has all weights whole, to look at; the modules must not be called there."""
        for unit in self.units:
            self._need(unit)
        try:
            yield
        finally:
            for unit in self.units:
                self._free(unit)


class _HeadWithLoss(nn.Module):
    def __init__(self, head: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.loss = head, loss

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.loss(hidden, targets)


def head_with_loss(model: GPT) -> nn.Module | None:
    """The head as a unit, in place: `model.loss` calls it, and may call the head itself many times (in chunks)."""
    if model.head is None:
        return None
    unit = _HeadWithLoss(model.head, model.loss)
    model.loss = lambda hidden, targets: unit(hidden, targets)  # type: ignore[method-assign]
    return unit


def _sharing(modules: Sequence[nn.Module]) -> list[tuple[list[nn.Parameter], list[int]]]:
    """Parameters and places of the modules, put together where modules share a parameter."""
    groups: list[tuple[list[nn.Parameter], list[int]]] = []
    for place, module in enumerate(modules):
        parameters, places = list(module.parameters()), [place]
        for group in [g for g in groups if {*g[0]} & {*parameters}]:
            groups.remove(group)
            parameters, places = [*dict.fromkeys([*group[0], *parameters])], [*group[1], *places]
        groups.append((parameters, sorted(places)))
    return groups
