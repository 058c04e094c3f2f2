"""Bug museum, room 00: each exchange between ranks that training needs, broken once.

The smallest mutants there are: one collective that does a little less than its name says. They stand for a mistake in
a wrapper, a backend's other convention, a buffer that was reused too early.
"""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

import torch
from torch import Tensor

from ...collectives import Work, operators
from ...mesh import GROUPS, Axis
from ...parallel import data, pipeline, tensor
from ..museum import Exhibit


def all_reduce_averages() -> None:
    """The sum of the ranks is divided by their number."""
    real = operators.all_reduce

    def average(x: Tensor, key: str) -> Tensor:
        return real(x, key) / GROUPS[key].size()

    operators.all_reduce = average


def async_reduces_a_copy() -> None:
    """The asynchronous sum lands in a temporary, and the caller's tensor keeps this rank's own values."""
    real = data.all_reduce_async
    copies: list[Tensor] = []

    def reduce(x: Tensor, axis: Axis) -> Work:
        copies.append(x.clone())
        return real(copies[-1], axis)

    data.all_reduce_async = reduce


def maximum_not_shared() -> None:
    """Each rank subtracts the maximum of its own logits before it exponentiates."""
    tensor.all_reduce_max = lambda x, axis: x


def sent_buffer_overwritten() -> None:
    """The sender clears its buffer while the message is still on its way."""
    real = pipeline.send
    cleared: list[Tensor] = []

    def send(x: Tensor, axis: Axis, to: int) -> Work:
        cleared.append(torch.zeros_like(x))
        return real(cleared[-1], axis, to)

    pipeline.send = send


def received_buffer_not_filled() -> None:
    """The message arrives in another tensor than the one that is computed with."""
    real = pipeline.receive
    elsewhere: list[Tensor] = []

    def receive(buffer: Tensor, axis: Axis, source: int) -> Work:
        elsewhere.append(torch.empty_like(buffer.zero_()))
        return real(elsewhere[-1], axis, source)

    pipeline.receive = receive


EXHIBITS = [
    Exhibit(
        id="00.all_reduce_averages",
        title="The sum that was a mean",
        story="Backends have an AVG beside SUM, and some loops divide by the number of ranks out of habit. With a loss "
        "that is already divided by the global number of tokens, dividing again makes every gradient too small by "
        "the number of ranks, and it makes partial sums inside a layer too small as well.",
        symptom="the gradient norm shrinks in proportion to the number of ranks; AdamW hides it.",
        patch=all_reduce_averages,
        killed_on=("tp=2", "dp=2"),
    ),
    Exhibit(
        id="00.async_reduces_a_copy",
        title="The reduction that nobody reads",
        story="An asynchronous collective works in place, on the tensor it is handed. Make that tensor contiguous or "
        "cast it first, and the sum goes to a temporary: no error, the right number of bytes on the wire, and "
        "each rank goes on with its own gradient.",
        symptom="traffic looks right; the replicas drift apart from the first step.",
        patch=async_reduces_a_copy,
        killed_on=("dp=2",),
        survives_on=("dp=1", "tp=2"),
    ),
    Exhibit(
        id="00.maximum_not_shared",
        title="A softmax over half of the words",
        story="The loss over a split vocabulary subtracts the largest logit before it exponentiates. The shift cancels "
        "only if all ranks take the same one. The sums of exponentials of ranks with different shifts cannot be "
        "added.",
        symptom="the loss is slightly off, by more as the logits grow in training.",
        patch=maximum_not_shared,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="00.sent_buffer_overwritten",
        title="The message that changed on its way",
        story="A started send reads its buffer until it is waited for. Whoever reuses the buffer for the next "
        "micro-batch sends that one twice, or zeros, or a mixture. On a fast link with small messages it works "
        "nearly always.",
        symptom="the loss stays near the logarithm of the vocabulary's size; on real links it comes and goes.",
        patch=sent_buffer_overwritten,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="00.received_buffer_not_filled",
        title="A letter to the old address",
        story="A receive fills the very tensor that it was given. If that was reshaped into a copy, or moved to "
        "another dtype, the message goes to the copy and the stage computes with what the buffer held before.",
        symptom="later stages train on noise or zeros; the first stage gets no useful gradient.",
        patch=received_buffer_not_filled,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
]
