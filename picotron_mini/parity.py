"""How far what the ranks computed is from what one device computed, and where it is furthest.

The measure is max|a - b| / max|b| of each tensor, absolute where the reference is zero, infinite where shapes differ
or a NaN appears. Each rank's part is compared with the same part of the reference, so copies that should be equal and
are not show up as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .config import AXES, RunConfig
from .layout import Layout
from .reference import Snapshot

QUANTITIES = ("loss", "routing", "gradients", "gradient norm", "weights")  # as a step computes them


@dataclass(frozen=True)
class Difference:
    """The largest relative error of one quantity, and where it is."""

    quantity: str
    error: float
    where: str
    tolerance: float


@dataclass
class Report:
    """What `verify` found."""

    layout: str
    differences: list[Difference]
    bytes_predicted: dict[str, int]  # "axis operation" -> bytes of rank 0 in one step
    bytes_counted: dict[str, int]
    bytes_problems: list[str] = field(default_factory=list)  # ranks where the two differ
    first_divergence: str | None = None
    lossy: str = ""  # the settings, if there are any, by which results are meant to differ

    @property
    def max_rel_err(self) -> float:
        return max(d.error for d in self.differences)

    @property
    def ok(self) -> bool:
        # written so that a NaN is not ok
        return all(d.error <= d.tolerance for d in self.differences) and not self.bytes_problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`. An error that is no number (shapes differ, NaN) is None: JSON has no infinity."""
        return {
            "layout": self.layout,
            "ok": self.ok,
            "lossy": self.lossy,
            "max_rel_err": _finite(self.max_rel_err),
            "bytes_predicted": sum(self.bytes_predicted.values()),
            "bytes_counted": sum(self.bytes_counted.values()),
            "traffic": {k: [self.bytes_predicted.get(k, 0), n] for k, n in self.bytes_counted.items()},
            "quantities": {d.quantity: {"error": _finite(d.error), "where": d.where} for d in self.differences},
            "first_divergence": self.first_divergence,
            "bytes_problems": self.bytes_problems,
        }


def _finite(error: float) -> float | None:
    return error if isfinite(error) else None


def table(report: Report) -> Table:
    """The report as a table for a terminal."""
    verdict = "equal to one device" if report.ok else "NOT equal to one device"
    if report.lossy and report.ok:
        verdict = f"within tolerance of one device, though {report.lossy} is lossy"
    elif report.lossy:
        error = next(d.error for d in report.differences if d.quantity == "gradients")
        verdict = f"NOT exact, and by choice: {report.lossy} is lossy, and gradients differ by up to {error:.1e}"
    out = Table(title=f"{report.layout}: {verdict}", title_justify="left")
    for column in ("quantity", "largest relative error", "tolerance", "where"):
        out.add_column(column)
    for d in report.differences:
        out.add_row(d.quantity, f"{d.error:.2e}", f"{d.tolerance:.0e}", d.where)
    for name in sorted({*report.bytes_predicted, *report.bytes_counted}):
        predicted, counted = report.bytes_predicted.get(name, 0), report.bytes_counted.get(name, 0)
        out.add_row(f"bytes: {name}", f"{counted:,}", f"{predicted:,}", "rank 0, one step; predicted beside")
    if report.first_divergence:
        out.add_row("first divergence", "", "", report.first_divergence)
    for problem in report.bytes_problems:
        out.add_row("bytes differ", "", "", problem)
    return out


def named(traffic: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """Bytes by `"axis operation"`, sorted."""
    return {f"{axis} {operation}": n for (axis, operation), n in sorted(traffic.items())}


class Errors:
    """Relative errors of each quantity: the worst, and all of them with their place in the order of computing.

    That is step by step; in a step the loss, what routers count, gradients from the last parameter of the model to the
    first, as a backward makes them, their norm, and the weights.
    """

    def __init__(self) -> None:
        self.worst: dict[str, tuple[float, str]] = {}
        self.seen: list[tuple[tuple[int, int, int], str, float, str]] = []

    def first(self, tolerance: Callable[[str], float]) -> str | None:
        """Where an error is above its quantity's tolerance for the first time; None if nowhere."""
        wrong = [(at, where) for at, quantity, error, where in self.seen if not error <= tolerance(quantity)]
        return min(wrong, key=lambda each: each[0])[1] if wrong else None

    def note(self, quantity: str, error: float, where: str, step: int = 0, place: int = 0) -> None:
        self.seen.append(((step, QUANTITIES.index(quantity), place), quantity, error, where))
        if quantity not in self.worst or not error <= self.worst[quantity][0]:
            self.worst[quantity] = (error, where)

    def compare(
        self,
        snapshots: Sequence[Snapshot],
        truth: Sequence[Snapshot],
        layouts: Sequence[Layout],
        index: Mapping[str, int],
        rank: int,
        with_weights: bool,
        run: RunConfig,
    ) -> None:
        """Compare one rank's parts with the same parts of the reference.

        Args:
            layouts: of each step that is compared: experts may change their places.
        """
        index = index or dict.fromkeys(AXES, 0)
        # below float64 the runs drift apart after the first update, in any layout
        steps = range(len(truth)) if run.train.dtype == "float64" else range(1)
        for step in steps:
            got, want = snapshots[step], truth[step]
            where = f"step {step}, rank {rank}, {run.train.optimizer}"
            self.note("loss", _relative(_scalar(got.loss), _scalar(want.loss)), where, step)
            held = {name: place for name, place in layouts[step].items() if place.holds(index)}
            behind = {name: number for number, name in enumerate(reversed(layouts[step]))}
            for quantity, mine, theirs in (
                ("gradients", got.gradients, want.gradients),
                ("weights", got.weights, want.weights),
            ):
                if quantity == "weights" and not with_weights:
                    continue
                if quantity == "weights":
                    norms = _scalar(got.grad_norm), _scalar(want.grad_norm)
                    self.note("gradient norm", _relative(*norms), where, step)
                if set(mine) != set(held) & set(theirs):
                    odd = sorted(set(mine) ^ (set(held) & set(theirs)))
                    self.note(quantity, float("inf"), f"{where}: present on one side only: {', '.join(odd)}", step)
                for name, place in held.items():
                    if name in mine and name in theirs:
                        part = place.part(theirs[name], index)
                        error = _relative(mine[name], part, theirs[name])
                        self.note(quantity, error, f"{name}, {where}", step, behind[name])
            # a choice between experts is not continuous: with rounding, two that nearly tie change places
            for name in want.routing if run.train.dtype == "float64" else ():
                self.note("routing", _relative(got.routing[name], want.routing[name]), f"{name}, {where}", step)


def _relative(got: Tensor, want: Tensor, whole: Tensor | None = None) -> float:
    """max|got - want| / max|whole|; absolute where the reference is zero; infinite if shapes differ or NaN appears."""
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max().item()
    scale = (want if whole is None else whole).double().abs().max().item()
    error = error / scale if scale else error
    return error if error == error else float("inf")


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
