"""Data parallelism: every rank has the whole model and its own share of the batch; the gradients are added up.

The loss is a sum over tokens, so its gradient is a sum over ranks, each with the gradient of its own tokens:

    dL/dW = sum_r dL_r/dW        (L_r already divided by the *global* number of tokens, so SUM and never AVG)

Naive: when backward is done, all_reduce each gradient. It is right, and it is slow twice: many small messages pay
the latency each, and the network idles during backward, then the processor during the reduction.

Bucketed: gradients become ready from the last layer to the first. Parameters are put into buckets in that order;
as soon as a bucket is full its all_reduce starts, while backward computes the next ones:

    backward     layer 4 | layer 3 | layer 2 | layer 1 |
    all_reduce           | bucket 0          | bucket 1| bucket 2 |  <- only this tail is waited for

With gradient accumulation only the last micro-batch's backward may start reductions (`arm`).

All ranks must start the same reductions in the same order, though their gradients become ready in orders of their
own. So bucket k is started only after bucket k - 1. And a parameter may have got a gradient on some ranks only (or
on none: then its gradient stays None, since an optimizer treats None unlike zero). Each bucket therefore carries
one extra number per parameter, 1 where there is a gradient: after the sum it is the number of ranks that had one.

Cost: (gradient elements + parameters) * itemsize of the reduction dtype, once a step, whatever the micro-batches.

Paper: PyTorch DDP (arXiv 2006.15704). PyTorch's own: torch.nn.parallel.DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..collectives import Work, all_reduce_async, broadcast
from ..mesh import Axis
from .buckets import last_first
from .compress import Reduce
from .rows import ALIGNED


def broadcast_parameters(module: nn.Module, axis: Axis) -> None:
    """Give every rank the parameters and buffers of the axis' first rank, so that all start equal."""
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast(tensor.detach(), axis)


def all_reduce_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """The naive way: after backward, sum each parameter's gradient over the axis, one by one.

    Every rank must have a gradient for the same parameters.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            all_reduce_async(parameter.grad, axis).wait()


@dataclass
class _Slot:
    """One parameter's place in a bucket."""

    parameter: nn.Parameter
    grad: Tensor  # view into the bucket's buffer, of the parameter's shape
    used: bool = False  # whether this step's backward has reached the parameter


@dataclass
class _Bucket:
    buffer: Tensor  # [elements of all slots + number of slots]
    slots: list[_Slot] = field(default_factory=list)
    waiting: int = 0  # slots that the last backward has not reached yet
    work: Work | None = None

    @property
    def flags(self) -> Tensor:
        return self.buffer[len(self.buffer) - len(self.slots) :]


class GradientBuckets:
    """Gradients of any module, kept in flat buckets of at least float32 and summed over an axis during backward.

        buckets = GradientBuckets(model.parameters(), mesh["dp"])
        for micro_batch in ...:
            if last: buckets.arm()
            loss(micro_batch).backward()
        buckets.finish()           # now buckets.gradient(p) is the sum over micro-batches and ranks
        optimizer.step()
        buckets.reset()            # before the next step

    For parameters of float32 or float64 `p.grad` is that sum too. For bf16 parameters, whose gradients would lose bits
    at each addition, `p.grad` stays None and the sum is held in float32.

    Args:
        parameters: those that are frozen or given twice (tied) are handled.
        axis: to sum over; with one rank it only accumulates.
        bucket_bytes: size at which a bucket is closed.
        reduce: another way to sum a bucket (`compress.py`, `hierarchical.py`).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        axis: Axis,
        bucket_bytes: float = 25 * 2**20,
        reduce: Reduce | None = None,
    ) -> None:
        self.axis, self.reduce = axis, reduce
        self.armed = False
        self.next = 0  # the bucket whose reduction is to be started next
        trained = [p for p in dict.fromkeys(parameters) if p.requires_grad]  # dict: a tied parameter once
        self.buckets: list[_Bucket] = []
        self._slots: dict[nn.Parameter, _Slot] = {}
        kinds = dict.fromkeys((torch.promote_types(p.dtype, torch.float32), p.device) for p in trained)
        for dtype, device in kinds:
            group = [p for p in trained if (torch.promote_types(p.dtype, torch.float32), p.device) == (dtype, device)]
            for together in last_first({p: p.numel() for p in group}, dtype.itemsize, bucket_bytes):
                self.buckets.append(self._make(together, dtype, device))

    def _make(self, parameters: list[nn.Parameter], dtype: torch.dtype, device: torch.device) -> _Bucket:
        size = sum(p.numel() for p in parameters) + len(parameters)
        new = _Bucket(torch.zeros(size, dtype=dtype, device=device), waiting=len(parameters))
        offset = 0
        # whole multiples of 128 bytes first: so the others shift no view off the addresses that kernels are fast at
        for parameter in sorted(parameters, key=lambda p: p.numel() % ALIGNED > 0):
            view = new.buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            slot = _Slot(parameter, view)
            new.slots.append(slot)
            self._slots[parameter] = slot
            parameter.register_post_accumulate_grad_hook(lambda _, b=new, s=slot: self._ready(b, s))
        return new

    def _ready(self, into: _Bucket, slot: _Slot) -> None:
        """Called by autograd when a micro-batch's gradient of one parameter is complete."""
        parameter = slot.parameter
        if parameter.grad is not None and parameter.grad is not slot.grad:
            if slot.used:
                slot.grad.add_(parameter.grad)
            else:
                # of bf16 into float32 this kernel reads more at once: on an H200 2.5 TB/s, copy_ 1.8
                torch._foreach_copy_([slot.grad], [parameter.grad])
            # keeping the view as .grad lets autograd add the next micro-batch in place
            parameter.grad = slot.grad if slot.grad.dtype == parameter.dtype else None
        slot.used = True
        if self.armed:
            into.waiting -= 1
            while self.next < len(self.buckets) and self.buckets[self.next].waiting == 0:
                self._start()

    def _start(self) -> None:
        current = self.buckets[self.next]
        self.next += 1
        current.flags.fill_(1.0)  # not copied from a list: the host would wait for the GPU
        for number, slot in enumerate(current.slots):
            if not slot.used:
                current.flags[number] = 0.0
                slot.grad.zero_()
        if self.reduce is not None:
            current.work = self.reduce(current.buffer, [slot.parameter.numel() for slot in current.slots])
        else:
            current.work = all_reduce_async(current.buffer, self.axis)

    def arm(self, times: Mapping[nn.Parameter, int] | None = None) -> None:
        """Say that the next backward is the step's last: its gradients are final, so reductions may start.

        Args:
            times: say instead how often each gradient will still be added to, 1 where nothing is said. For a pipeline
                in which the gradients of different parameters become final at different times.
        """
        assert self.next == 0, "reset() before the next step"
        self.armed = True
        if times is not None:
            for current in self.buckets:
                current.waiting = sum(times.get(slot.parameter, 1) for slot in current.slots)

    def finish(self) -> None:
        """Start what has not started, wait for all of it, and publish the sums. Once a step, on every rank."""
        while self.next < len(self.buckets):
            self._start()
        for current in self.buckets:
            assert current.work is not None
            current.work.wait()
            missing = [slot for slot in current.slots if not slot.used]
            # Only a rank that misses a gradient has to look whether another has it: reading waits for the GPU.
            had = current.flags.tolist() if missing and self.axis.size > 1 else [0.0] * len(current.slots)
            for slot, ranks in zip(current.slots, had, strict=True):
                slot.used = slot.used or ranks > 0
                same = slot.grad.dtype == slot.parameter.dtype
                slot.parameter.grad = slot.grad if slot.used and same else None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The accumulated gradient (summed after `finish`), of at least float32; None if no rank had one."""
        slot = self._slots.get(parameter)
        return slot.grad if slot is not None and slot.used else None

    def reset(self) -> None:
        """Forget the gradients, before the next step."""
        self.armed, self.next = False, 0
        for current in self.buckets:
            current.work, current.waiting = None, len(current.slots)
            for slot in current.slots:
                slot.used, slot.parameter.grad = False, None
