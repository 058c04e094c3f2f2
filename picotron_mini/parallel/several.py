"""Gradients that are summed over different ranks, asked for as one.

Experts that are spread over ranks have their copies on other ranks than all else has (`expert.py`). So there is a
reducer for each set of ranks. Each starts its own sums in an order of its own: in one order for both, the gradients of
one would wait for those of the other to be ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from torch import Tensor, nn

from ..mesh import Axis
from .data import GradientBuckets
from .zero import ShardedGradients

Reducer = TypeVar("Reducer", GradientBuckets, ShardedGradients)


def by_axis(
    parameters: Iterable[nn.Parameter], axis_of: Callable[[nn.Parameter], Axis]
) -> dict[Axis, list[nn.Parameter]]:
    """The parameters, each once and in their order, by the axis over which their gradients are summed."""
    groups: dict[Axis, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(parameters):
        groups.setdefault(axis_of(parameter), []).append(parameter)
    return groups


class Several(Generic[Reducer]):
    """Reducers of one kind as one of that kind.

    Args:
        reducers: with the parameters of each.
    """

    def __init__(self, reducers: Iterable[tuple[Reducer, Iterable[nn.Parameter]]]) -> None:
        self._of: dict[nn.Parameter, Reducer] = {
            parameter: reducer for reducer, parameters in reducers for parameter in parameters
        }
        self.reducers: list[Reducer] = list(dict.fromkeys(self._of.values()))

    def reset(self) -> None:
        """Forget the gradients, before the next step."""
        for each in self.reducers:
            each.reset()

    def arm(self, times: Mapping[nn.Parameter, int] | None = None) -> None:
        """Say when gradients are final; as `GradientBuckets.arm`."""
        for each in self.reducers:
            each.arm(times)

    def finish(self) -> None:
        """Wait for all sums. Once a step, on every rank."""
        for each in self.reducers:
            each.finish()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum of a parameter's gradients, or this rank's rows of it; None if no rank had one."""
        return self._of[parameter].gradient(parameter)


class SeveralBuckets(Several[GradientBuckets]):
    """Of plain data parallelism."""


class SeveralSharded(Several[ShardedGradients]):
    """Of ZeRO, each cutting its parameters over its own axis."""

    def after_backward(self) -> None:
        """As `ShardedGradients.after_backward`."""
        for each in self.reducers:
            each.after_backward()

    def settle(self) -> None:
        """As `ShardedGradients.settle`."""
        for each in self.reducers:
            each.settle()

    def start_of(self, parameters: Iterable[nn.Parameter]) -> None:
        """As `ShardedGradients.start_of`."""
        wanted = list(parameters)
        for each in self.reducers:
            each.start_of(wanted)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's rows of a parameter, as a view of it."""
        return self._of[parameter].own(parameter)

    def publish(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        """Round every rank's rows of the masters into the weights of all."""
        for each in self.reducers:
            each.publish(masters)
