"""Send less than the gradient: rounded to bf16, or its largest entries only, and what that costs in exactness.

All else in this library computes what one device computes. This does not, on purpose: where links are slow, a step with
a slightly wrong gradient may be worth more than an exact one that comes late.

**bf16** (`compress=bf16`): the buffer is rounded before it is sent, and added up in bf16. Half the bytes of float32; an
error of 2^-9 of each entry, more where entries of many ranks nearly cancel. Nothing is remembered.

**Top-k** (`compress=topk`): of each parameter's gradient a rank sends the share `compress_keep` that is largest in
absolute value, values and places. The rest is not lost but put off (*error feedback*, arXiv 1901.09847):

    p_t = g_t + e_t          what should be sent: the gradient, and what is owed from earlier steps
    sent = topk(p_t)         all ranks' are added up where they belong
    e_{t+1} = p_t - sent     owed

Without the memory e the small entries are never sent, however long they point the same way, and training stops short.
With it every entry is sent in the end, some steps late. The memory is as large as the gradient, on each rank its own.

That is shown for SGD. With AdamW and clipping it may do harm: what is owed comes in large lumps, which clipping scales
down and the second moment remembers. In summary/07_3d_parallel_compression_cpu.log, one run each with AdamW and
clip_norm=1, top-1 % learns worse with the memory than without it, and both far worse than bf16.

Places of ranks differ, so the sparse parts cannot be added up on the way: an all_gather carries N parts to every rank.

Cost a step in payload, E elements in P parameters, g bytes of a gradient element (4 at least):
    bf16   all_reduce   2 (E + P)                     in place of g (E + P)
    topk   all_gather   g sum_p (2 k_p + 1)           k_p = ceil(keep * elements): values, places, the flag

Paper: sparsified SGD with memory (arXiv 1809.07599), error feedback (arXiv 1901.09847). A low-rank way: PowerSGD
(arXiv 1905.13727), PyTorch's `torch.distributed.algorithms.ddp_comm_hooks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..collectives import Work, all_gather_async, all_reduce_async
from ..mesh import Axis

# Starts to sum a bucket's buffer over the axis; the buffer holds the sum after `wait()`. The sizes are those of the
# parameters in the buffer, which is as long as they together and one flag for each.
Reduce = Callable[[Tensor, Sequence[int]], Work]


def compression(kind: str, axis: Axis, keep: float) -> Reduce | None:
    """How to sum buckets with `TrainConfig.compress`; None: as they are.

    Args:
        keep: share of the entries that top-k sends, above 0 and at most 1.
    """
    if kind == "none" or axis.size == 1:
        return None
    return _Rounded(axis) if kind == "bf16" else _TopK(axis, keep)


class _Unpacking:
    """A work whose result has still to be put into the buffer."""

    def __init__(self, work: Work, unpack: Callable[[], object], kept: Sequence[Tensor]) -> None:
        self.work, self.unpack, self.kept = work, unpack, kept  # kept: alive until the work is done

    def wait(self) -> None:
        self.work.wait()
        self.unpack()


class _Rounded:
    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, buffer: Tensor, sizes: Sequence[int]) -> Work:
        narrow = buffer.to(torch.bfloat16)  # the flags are small whole numbers, exact up to 256 ranks
        work = all_reduce_async(narrow, self.axis)
        return _Unpacking(work, lambda: buffer.copy_(narrow), [narrow])


class _TopK:
    def __init__(self, axis: Axis, keep: float) -> None:
        self.axis, self.keep = axis, keep
        self.owed: dict[int, Tensor] = {}  # by the buffer's id: the buffers stay from step to step

    def __call__(self, buffer: Tensor, sizes: Sequence[int]) -> Work:
        gradients = buffer[: len(buffer) - len(sizes)]
        owed = self.owed.setdefault(id(buffer), torch.zeros_like(gradients))
        owed += gradients  # p_t, all of which is owed until it is sent
        places, start = [], 0
        for size in sizes:
            part = owed[start : start + size]
            places.append(part.abs().topk(sent(size, self.keep), sorted=False).indices + start)
            start += size
        index = torch.cat(places)
        message = torch.cat([owed[index], index.to(_WHOLE[buffer.dtype]).view(buffer.dtype), buffer[start:]])
        owed[index] = 0
        everyone = message.new_empty(self.axis.size, len(message))
        work = all_gather_async(everyone, message, self.axis)

        def unpack() -> None:
            number = len(index)
            buffer.zero_()
            for row in everyone:  # rank by rank: the same order of additions everywhere
                at = row[number : 2 * number].view(_WHOLE[buffer.dtype]).long()
                buffer.index_add_(0, at, row[:number])
                buffer[start:] += row[2 * number :]

        return _Unpacking(work, unpack, [message, everyone])


_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}  # integers as wide: places travel as such bits


def sent(elements: int, keep: float) -> int:
    """How many entries of a parameter top-k sends: ceil(keep * elements)."""
    return min(elements, math.ceil(keep * elements))
