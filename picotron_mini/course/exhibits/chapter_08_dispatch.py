"""Bug museum, room 08: experts on other ranks, where tokens travel and gradients find the wrong way back."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...layout import Placement
from ...moe import dispatch
from ...moe.exchange import UnevenExchange
from ...parallel import parallelize
from ..museum import Exhibit
from .chapter_08 import MIXTURE


def swapped_splits() -> None:
    """The two lists of numbers change places when the rows are here, and once more in the backward."""
    real = UnevenExchange.wait

    def wait(self: UnevenExchange, arriving: Tensor) -> Tensor:
        rows = real(self, arriving)
        self.sends, self.receives = self.receives, self.sends
        return rows

    UnevenExchange.wait = wait


def experts_summed_over_dp() -> None:
    """The gradients of experts go with all others: into the buckets that are summed over all data ranks."""
    parallelize._experts = lambda parameters, mesh: {}


def experts_of_the_first_rank() -> None:
    """Of each parameter the first data rank's part counts in the norm: all others are taken to be copies of it."""

    def counts(self: Placement, index: Mapping[str, int]) -> bool:
        return real(self, index) and index["dp"] == index["cp"] == 0

    real = Placement.counts
    Placement.counts = counts


def weights_without_gradient() -> None:
    """The weights beside the rows are numbers for the receiver, so they are sent like the numbers of the experts."""
    real = dispatch.ExpertDispatch._start

    def start(self: dispatch.ExpertDispatch, x: Tensor, weights: Tensor, *rest: Any) -> Any:
        return real(self, x, weights.detach(), *rest)

    dispatch.ExpertDispatch._start = start


EXHIBITS = [
    Exhibit(
        id="08.swapped_splits",
        title="The way back with the numbers of the way there",
        story="An all_to_all with uneven parts takes two lists: how many rows go to each rank, and how many come. In "
        "the backward they change places. Here two people have seen to it, and together they have undone it. Where all "
        "tokens of a test go everywhere, or the router is perfectly balanced, the lists are equal and the mistake is "
        "none. Then the first real text comes.",
        symptom="works with even numbers; else an error about sizes if one is lucky, or ranks that wait for ever.",
        patch=swapped_splits,
        killed_on=("dp=2,ep=2", "dp=4,ep=2"),
        survives_on=("dp=2",),
        model=MIXTURE,
        crashes=True,
    ),
    Exhibit(
        id="08.experts_summed_over_dp",
        title="The mean of different experts",
        story="Data parallelism sums the gradients of what every data rank holds. With expert parallelism the ranks "
        "hold different experts under the same names, of the same shapes. A reducer that is given all parameters adds "
        "up the gradients of expert 0 and of expert 4, and both get the sum. Experts must be summed over the ranks "
        "that hold the same ones, edp, and over nobody else.",
        symptom="trains, and slowly makes all experts alike; the loss is that of a smaller model.",
        patch=experts_summed_over_dp,
        killed_on=("dp=2,ep=2", "dp=4,ep=2", "cp=2,ep=2"),
        survives_on=("dp=2", "tp=2"),
        model=MIXTURE,
    ),
    Exhibit(
        id="08.experts_of_the_first_rank",
        title="A norm without most experts",
        story="To clip by the global norm, each element must count once, and data ranks hold copies: so those of the "
        "first one count. That was right until the experts were spread over them. Now what the others hold is not a "
        "copy, and the norm misses all experts but those of the first rank. Gradients are clipped too little, the more "
        "so the more ranks there are.",
        symptom="the gradient norm falls when ep grows; a learning rate that was stable is not any more.",
        patch=experts_of_the_first_rank,
        killed_on=("dp=2,ep=2", "dp=2,tp=2,ep=2"),
        survives_on=("dp=2", "tp=2"),
        model=MIXTURE,
    ),
    Exhibit(
        id="08.weights_without_gradient",
        title="A router that is never told",
        story="Beside each row travels the weight with which the receiver is to count it. It looks like a number for "
        "the receiver, as the number of the expert is, and is sent without a gradient. The outputs are right, and so "
        "is every gradient but the router's, which hears of nothing but the balancing loss.",
        symptom="the loss falls as the experts learn; the router stays what it was at the start, well balanced.",
        patch=weights_without_gradient,
        killed_on=("dp=2,ep=2",),
        survives_on=("dp=2",),
        model=MIXTURE,
    ),
]
