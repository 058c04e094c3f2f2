"""What happens when on a rank: journeys that start and end, a shared expert and experts that compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from picotron_mini.model.moe import Experts


def noting(real: Callable[..., Any], name: str, events: list[str]) -> Callable[..., Any]:
    """An asynchronous collective that notes its start, as `name`, and that it is waited for."""

    class Noted:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def noted(*args: Any) -> Any:
        events.append(name)
        return Noted(real(*args))

    return noted


class Shared(nn.Linear):
    """A shared expert of so many features that notes its forward and the begin of its backward."""

    def __init__(self, features: int, events: list[str]) -> None:
        super().__init__(features, features, dtype=torch.float64)
        self.events = events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("shared")
        y = super().forward(x)
        y.register_hook(lambda _: self.events.append("shared'"))
        return y


def watched(real: Experts, events: list[str]) -> Any:
    """Experts that note the same."""

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        events.append("experts")
        out: Tensor = real(rows, counts)
        out.register_hook(lambda _: events.append("experts'"))
        return out

    experts.gate, experts.passes = real.gate, real.passes  # type: ignore[attr-defined]
    return experts
