"""Bug museum, room 03: data parallelism, where a wrong sum still trains."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from typing import Any

from torch import Tensor

from ...collectives import Done, all_reduce
from ...layout import Placement
from ...mesh import Axis
from ...parallel.data import GradientBuckets, _Bucket, _Slot
from ...training import step
from ..museum import Exhibit


def parameter_reduced() -> None:
    """The hook gets the parameter, and averages that instead of its gradient."""

    def start(self: GradientBuckets) -> None:
        current = self.buckets[self.next]
        self.next += 1
        for slot in current.slots:
            weight = slot.parameter.detach()
            weight.copy_(all_reduce(weight, self.axis) / self.axis.size)
        current.work = Done()

    GradientBuckets._start = start


def average_of_averages() -> None:
    """Each rank divides by the number of its own targets, and the ranks' results are averaged."""
    real = step.all_reduce

    def reduce(x: Tensor, axis: Axis) -> Tensor:
        total = real(x, axis)
        return x * axis.size if axis.name == "dp" else total

    step.all_reduce = reduce


def accumulation_lost() -> None:
    """Each micro-batch's gradient replaces the one before it."""

    def ready(self: GradientBuckets, into: _Bucket, slot: _Slot) -> None:
        assert slot.parameter.grad is not None
        slot.grad.copy_(slot.parameter.grad)
        slot.parameter.grad, slot.used = None, True
        if self.armed:
            into.waiting -= 1
            while self.next < len(self.buckets) and self.buckets[self.next].waiting == 0:
                self._start()

    GradientBuckets._ready = ready


def reduced_too_early() -> None:
    """The sums start in the first micro-batch's backward, while gradients are still being added up.

    Each is waited for at once, so that the bug shows alike in every run: what later backwards add stays on its rank.
    """
    real_init, real_reset, real_start = GradientBuckets.__init__, GradientBuckets.reset, GradientBuckets._start

    def init(self: GradientBuckets, *arguments: Any, **options: Any) -> None:
        real_init(self, *arguments, **options)
        self.armed = True

    def reset(self: GradientBuckets) -> None:
        real_reset(self)
        self.armed = True

    def start(self: GradientBuckets) -> None:
        real_start(self)
        work = self.buckets[self.next - 1].work
        assert work is not None
        work.wait()

    GradientBuckets.__init__, GradientBuckets.reset, GradientBuckets._start = init, reset, start
    GradientBuckets.arm = lambda self, times=None: None


def norm_counts_copies() -> None:
    """Every rank adds all that it holds to the squared norm, also what others hold a copy of."""
    Placement.counts = lambda self, index: True


EXHIBITS = [
    Exhibit(
        id="03.parameter_reduced",
        title="The hook that reduced the parameter",
        story="In the naive data parallel of huggingface/picotron (commit 59714b1, class DataParallelNaive), the hook "
        "that autograd calls once a gradient is ready is handed the parameter, not the gradient, and all-reduces what "
        "it is handed. So the weights are averaged once a step and each rank updates them with a gradient of its own. "
        "The class that its training script uses, DataParallelBucket, sums gradients.",
        symptom="the loss falls, as it does on one rank; the ranks' gradients differ.",
        patch=parameter_reduced,
        killed_on=("dp=2",),
        survives_on=("dp=1", "tp=2"),
    ),
    Exhibit(
        id="03.average_of_averages",
        title="The average of averages",
        story="Each rank takes the mean loss over its own tokens, and the gradients are averaged. If one rank has 3 "
        "targets and another 300, each of the 3 weighs as much as a hundred others. With padding, masked prompts "
        "or packed documents the numbers are never equal; in a test on full batches they always are.",
        symptom="nothing, on batches where every token is a target; else a loss slightly different in every layout.",
        patch=average_of_averages,
        killed_on=("dp=2",),
        survives_on=("dp=1", "tp=2"),
    ),
    Exhibit(
        id="03.accumulation_lost",
        title="Only the last micro-batch counts",
        story="A bucketed reducer keeps gradients in buffers of its own. If its hook copies the new gradient in, "
        "rather than adding it, all micro-batches but the last are computed for nothing.",
        symptom="training is as noisy as with the small batch; the norm is too small.",
        patch=accumulation_lost,
        killed_on=("dp=2", "dp=1"),
        survives_on=(),
    ),
    Exhibit(
        id="03.reduced_too_early",
        title="Reduced before it was complete",
        story="Reductions may overlap with backward in the last micro-batch only (PyTorch's no_sync). Start in the "
        "first one, and the others are added to a buffer that is being reduced or already was: they stay on their own "
        "rank.",
        symptom="right with one micro-batch; with more, the replicas drift apart.",
        patch=reduced_too_early,
        killed_on=("dp=2",),
        survives_on=("dp=1", "tp=2"),
    ),
    Exhibit(
        id="03.norm_counts_copies",
        title="A norm that grows with the ranks",
        story="Clipping needs the norm of the one global gradient. Sum the squares over all ranks and what is "
        "replicated is counted once a copy: over dp=4 the norm is twice too large, so gradients are clipped twice "
        "too hard, on a cluster harder than on a laptop.",
        symptom="a gradient norm that depends on the layout, and slower learning wherever clipping acts.",
        patch=norm_counts_copies,
        killed_on=("dp=2", "tp=2"),
    ),
]
