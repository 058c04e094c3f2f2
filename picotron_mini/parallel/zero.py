"""ZeRO 1 and 2: data parallelism that stops keeping N copies of what only one rank needs to have.

In plain data parallelism N ranks hold the same optimizer state, the same masters, the same summed gradient, and all do
the same update. ZeRO cuts that work: rank r owns the r-th part of every parameter, updates that part alone, and the
others get the result. An all_reduce is a reduce_scatter and an all_gather; ZeRO puts the optimizer between the two:

    plain     g_r --all_reduce--> g = sum_r g_r             every rank: W = update(W, g)
    ZeRO      g_r --reduce_scatter--> g[part r]     rank r: W[part r] = update(W[part r], g[part r])
                                                    W[part r] --all_gather--> W

                 weights   gradients           masters, optimizer state      bytes a rank keeps, bf16 and AdamW,
    plain        whole     whole               whole                         2 + 4 + 12         a parameter
    ZeRO 1       whole     whole and a part    part                          2 + 4 + 16 / N
    ZeRO 2       whole     part                part                          2     + 16 / N
    ZeRO 3       part      part                part                          18 / N             see zero3.py

ZeRO 1 adds up the micro-batches' gradients and reduces once, while the last backward runs. ZeRO 2 has no room to add
them up, so it reduces in every micro-batch's backward: with m micro-batches it sends m times the bytes.

The parts are whole rows, and a buffer has a table for each parameter, with one row a rank (rows.py). As in `data.py`
there is one more column for each parameter, 1 where there was a gradient: what no rank used must have no gradient,
which is not zeros.

Cost a step in payload, with P trained parameters of E elements, C >= E / N the padded columns, g bytes a gradient
element (4 at least) and w a weight:
    reduce_scatter   N (C + P) g, in ZeRO 2 times m;      all_gather   C w, which a ring hands on N - 1 times

In symmetric memory (collectives/symmetric.py) nobody sends: a bucket lies where the other ranks of the host read it. A
bucket gets its room when its reduction starts, which all ranks do in one order; until then gradients wait as they came.

Hybrid (HSDP, arXiv 2304.11277): cut inside groups of N neighbours with fast links, so that each group has a copy of
all. Once a step the rows are summed over the groups: an all_reduce of (C + P) g bytes.

Papers: ZeRO (arXiv 1910.02054). PyTorch's own for ZeRO 1: torch.distributed.optim.ZeroRedundancyOptimizer.
Legend: N ranks of the axis, C columns of a buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..collectives import SymmetricMemory, Work, all_gather_several, all_reduce_async, reduce_scatter_several
from ..mesh import Axis
from .buckets import bucket
from .rows import Cut, cut

# Bytes that may be under way, of one micro-batch at most: the layer before travels while this one computes. A compiled
# layer has all its gradients at once, so these are not a number of buckets: the third would wait for the first, and the
# GPU with it.
UNDER_WAY = 512 * 2**20


@dataclass
class _Bucket:
    cuts: list[Cut]
    columns: int  # without those of the flags
    shard: Tensor  # [C + P], this rank's part of the sum
    whole: Tensor | None = None  # [N (C + P)], what this rank has to give: the tables, then the flags [N, P]
    came: list[tuple[int, Tensor]] = field(default_factory=list)  # parameters and gradients not yet in `whole`
    added: list[bool] = field(default_factory=list)  # which parameters `whole` has a gradient of
    seen: list[bool] = field(default_factory=list)  # ... in this step, on any rank once `finish` is done
    summed: bool = False  # whether `shard` has, or gets, something of this step
    waiting: int = 0  # how many gradients are still to be added before the reduction
    additions: int = 0  # ... and how many there are each time


class ShardedGradients:
    """Gradients of any module's parameters, summed over an axis during backward; each rank gets its part.

        gradients = ShardedGradients(alike(model.parameters()), mesh["dp"], start="last")
        for micro_batch in ...:
            if last: gradients.arm()
            loss(micro_batch).backward()
            gradients.after_backward()
        gradients.finish()            # now gradients.gradient(p) is this rank's rows of the sum
        optimizer.step()              # over those rows
        gradients.publish(masters)    # and everyone has the new weights
        gradients.reset()             # before the next step

    `p.grad` is None after each backward: what was in it is in a bucket, in float32 at least.

    Args:
        groups: of parameters alike; those that are frozen are left out. A group becomes one or more buckets.
        start: "last": reduce once, in the backward that follows `arm` (ZeRO 1). "each": in every one (ZeRO 2, and
            ZeRO 3 where a backward comes in two halves). "told": in every one, when `start_of` is called (ZeRO 3).
        rows: as `cut` has it.
        bucket_bytes: size at which a bucket is closed.
        copies: axes of ranks that own the same rows (other groups in HSDP, context parallelism): the rows are summed
            over each of them, once a step.
        memory: of the axis, in which the buckets lie then, so that ranks read them out of it.
    """

    def __init__(
        self, groups: Sequence[Sequence[nn.Parameter]], axis: Axis, *, start: str,
        rows: Mapping[nn.Parameter, int] | None = None, bucket_bytes: float = 25 * 2**20, copies: Sequence[Axis] = (),
        memory: SymmetricMemory | None = None,
    ) -> None:  # fmt: skip
        self.axis, self.when, self.armed, self.rows = axis, start, False, rows or {}
        self.copies, self.memory = copies, memory
        self.next = 0  # the bucket whose reduction is to be started next: all ranks need one order
        self.buckets: list[_Bucket] = []
        self._place: dict[nn.Parameter, tuple[_Bucket, int]] = {}
        self._under_way: deque[tuple[_Bucket, Tensor, Tensor, Work]] = deque()  # bucket, whole, its sum, work
        for group in groups:
            trained = [p for p in reversed(group) if p.requires_grad]  # backward reaches the last ones first
            if not trained:
                continue
            dtype = torch.promote_types(trained[0].dtype, torch.float32)
            for indices in bucket([p.numel() for p in trained], dtype.itemsize, bucket_bytes):
                cuts, columns = cut([trained[i] for i in indices], axis.size, self.rows)
                shard = torch.zeros(columns + len(cuts), dtype=dtype, device=trained[0].device)
                self.buckets.append(_Bucket(cuts, columns, shard))
                for number, each in enumerate(cuts):
                    self._place[each.parameter] = self.buckets[-1], number
                    each.parameter.register_post_accumulate_grad_hook(self._ready)
        self.reset()

    def reset(self) -> None:
        """Forget the gradients, before the next step."""
        assert not self._under_way, "finish() ends a step"
        self.armed, self.next = False, 0
        for each in self.buckets:
            if self.when == "last" and each.whole is None:  # stays between the steps
                each.whole = self._room(each)
            each.came, each.summed = [], False
            each.added, each.seen = [False] * len(each.cuts), [False] * len(each.cuts)
            each.waiting = each.additions = len(each.cuts)

    def _room(self, into: _Bucket) -> Tensor:
        size = self.axis.size * len(into.shard)
        return self.memory.empty(size, into.shard.dtype) if self.memory else into.shard.new_empty(size)

    def _ready(self, parameter: nn.Parameter) -> None:
        """Called by autograd when a micro-batch's gradient of one parameter is complete."""
        into, number = self._place[parameter]
        if parameter.grad is None:
            return
        into.came.append((number, parameter.grad))
        parameter.grad = None
        into.seen[number] = True
        if self.when == "last":
            self._take_in(into)
        if self.armed or self.when == "each":
            into.waiting -= 1
            if self.when == "each" and self.armed:
                if into.waiting == 0:
                    self._start(into)
                return
            while self.next < len(self.buckets) and self.buckets[self.next].waiting == 0:
                self._start(self.buckets[self.next])

    def _take_in(self, into: _Bucket) -> None:
        """Put what came into `whole`; the first gradients of all parameters in one kernel."""
        if into.whole is None:
            into.whole = self._room(into)
        tables = [place.table(into.whole, self.axis.size) for place in into.cuts]
        first: list[tuple[Cut, Tensor, Tensor]] = []
        more: list[tuple[Cut, Tensor, Tensor]] = []
        for number, grad in into.came:
            (more if into.added[number] else first).append((into.cuts[number], tables[number], grad))
            into.added[number] = True
        into.came = []
        if first:
            torch._foreach_copy_([place.whole(table) for place, table, _ in first], [grad for *_, grad in first])
        for place, table, _ in first:
            place.padding(table).zero_()
        for place, table, grad in more:
            place.whole(table).add_(grad)

    def start_of(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start the reduction of these parameters' buckets, with `start="told"`. In the same order on all ranks."""
        found = [self._place[p][0] for p in parameters if p in self._place]
        for each in self.buckets:
            if any(each is other for other in found):
                self._start(each)

    def _start(self, each: _Bucket) -> None:
        self.next += 1
        while any(each is other for other, *_ in self._under_way):  # of the micro-batch before, long there
            self._finish_oldest()
        self._take_in(each)
        assert each.whole is not None
        ranks, whole = self.axis.size, each.whole
        flags = whole[ranks * each.columns :]
        flags.fill_(1.0)  # no tensor made of a list: that copy would make the host wait for the GPU
        tables = [place.table(whole, ranks) for place in each.cuts]
        for number, added in enumerate(each.added):
            if not added:
                tables[number].zero_()
                flags[number :: len(each.cuts)] = 0.0
        if self.when != "last":  # the room is free again when the sum is there
            each.whole, each.added, each.waiting = None, [False] * len(each.cuts), each.additions
        total = torch.empty_like(each.shard) if each.summed else each.shard  # the first sum needs no adding
        each.summed = True
        rows = [*(place.row(total) for place in each.cuts), total[each.columns :]]
        if self.memory:
            work = self.memory.reduce_scatter_several(rows, [*tables, flags])
        else:
            work = reduce_scatter_several(rows, [*tables, flags], self.axis)
        self._under_way.append((each, whole, total, work))
        while len(self._under_way) > 1 and sum(whole.nbytes for _, whole, _, _ in self._under_way) > UNDER_WAY:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        each, whole, total, work = self._under_way.popleft()
        work.wait()
        if self.memory and whole is not each.whole:
            self.memory.give_back(whole)
        if total is not each.shard:
            each.shard.add_(total)

    def settle(self) -> None:
        """Wait for what is under way, and free its memory."""
        while self._under_way:
            self._finish_oldest()

    def arm(self, times: Mapping[nn.Parameter, int] | None = None) -> None:
        """Say that the next backward is the step's last: its gradients are final, so reductions may start.

        Args:
            times: say instead how often each gradient will be added to before its reduction, 1 where nothing is said:
                in the step, or with start="each" in each micro-batch. For a pipeline in which the gradients of
                different parameters become final at different times. All ranks must add in the same order then.
        """
        self.armed = self.when == "last" or times is not None
        if times is not None:
            for each in self.buckets:
                each.waiting = each.additions = sum(times.get(place.parameter, 1) for place in each.cuts)

    def after_backward(self) -> None:
        """Reduce what a micro-batch's backward did not complete. After each, on every rank, unless `arm` said more."""
        if self.when == "each":
            for each in self.buckets[self.next :]:
                self._start(each)
            self.next = 0

    def finish(self) -> None:
        """Start what has not started, wait for all of it. Once a step, on every rank."""
        for each in self.buckets[self.next :] if self.when == "last" else []:
            self._start(each)
        self.settle()
        for each in self.buckets:
            if not each.summed:
                each.shard.zero_()
        for axis in self.copies:
            for work in [all_reduce_async(each.shard, axis) for each in self.buckets]:
                work.wait()
        for each in self.buckets:
            if not all(each.seen):  # only a rank that misses a gradient looks whether another has it: reading waits
                had = each.shard[each.columns :].tolist()
                each.seen = [seen or ranks > 0 for seen, ranks in zip(each.seen, had, strict=True)]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's rows of the sum (after `finish`), float32 at least; None if no rank had a gradient."""
        each, number = self._place.get(parameter, (None, 0))
        if each is None or not each.seen[number]:
            return None
        return each.cuts[number].own(each.shard, self.axis.index)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's rows of a parameter, as a view of it."""
        (place,), _ = cut([parameter], self.axis.size, self.rows)
        return place.part(parameter.data, self.axis.index)

    @torch.no_grad()
    def publish(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        """Round every rank's rows of the masters into the weights of all.

        Args:
            masters: by parameter, this rank's rows.
        """
        under_way: list[tuple[Work, list[tuple[Cut, Tensor]], Tensor]] = []
        for each in reversed(self.buckets):  # the first layers first: the next forward begins with them
            mine = each.cuts[0].parameter.new_zeros(each.columns)
            own = [place.own(mine, self.axis.index) for place in each.cuts]
            torch._foreach_copy_(own, [masters[place.parameter] for place in each.cuts])
            tables = [self._weight(place) for place in each.cuts]
            rows = [place.row(mine) for place in each.cuts]
            work = all_gather_several(tables, rows, self.axis)
            under_way.append((work, list(zip(each.cuts, tables, strict=True)), mine))
        for work, filled, _ in under_way:
            work.wait()
            for place, table in filled:
                if table.data_ptr() != place.parameter.data_ptr():
                    place.parameter.data.copy_(place.whole(table))

    def _weight(self, place: Cut) -> Tensor:
        """The table of a weight: the weight itself, where it has no padding."""
        weight = place.parameter.data
        whole = weight.numel() == self.axis.size * place.columns and weight.is_contiguous()
        return weight.view(-1) if whole else weight.new_empty(self.axis.size * place.columns)
