"""Exercises of chapter 03, data parallelism: what a step costs in bytes, decided by the ledger of a real run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...collectives import ledger
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ...parallel.data import GradientBuckets
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


def step_bytes_stub(sizes: Sequence[int], itemsize: int, micro_batches: int, ranks: int) -> int:
    """Predict the bytes that one rank hands to all_reduce in one step of `GradientBuckets`.

    Args:
        sizes: elements of each parameter.
        itemsize: bytes of an element of the weights: 2 for bf16, 4 for float32, 8 for float64.
        ranks: of the axis, 1 or more.
    """
    raise NotAttempted


def step_bytes(sizes: Sequence[int], itemsize: int, micro_batches: int, ranks: int) -> int:
    """Once a step, at least float32, and one flag for each parameter; nothing where there is nobody to sum with."""
    return (sum(sizes) + len(sizes)) * max(itemsize, 4) if ranks > 1 else 0


_FLAGS = "each parameter carries one number more, which says whether its gradient exists on a rank"
_WIDE = "gradients of bf16 weights are summed in float32: 4 bytes an element, not 2"
_ONCE = "the sums are taken once a step, in the last micro-batch's backward: the number of micro-batches is no factor"
_WIRE = "2(n-1)/n is what a ring puts on the wire; the question is what a rank hands to all_reduce"
_RANKS = "the number of ranks is no factor: each hands over its own gradients, whole, however many others do so too"


def _right(sizes: Sequence[int], itemsize: int) -> int:
    return step_bytes(sizes, itemsize, 1, 2)


_COSTS: dict[str, tuple[Answer, str]] = {
    "every micro-batch": (lambda sizes, itemsize, m, n: _right(sizes, itemsize) * m, _ONCE),
    "no flags": (lambda sizes, itemsize, m, n: sum(sizes) * max(itemsize, 4), _FLAGS),
    "narrow sums": (lambda sizes, itemsize, m, n: (sum(sizes) + len(sizes)) * itemsize, _WIDE),
    "on the wire": (lambda sizes, itemsize, m, n: _right(sizes, itemsize) * 2 * (n - 1) // n, _WIRE),
    "times the ranks": (lambda sizes, itemsize, m, n: _right(sizes, itemsize) * n, _RANKS),
    "a share of it": (lambda sizes, itemsize, m, n: _right(sizes, itemsize) // n, _RANKS),
    "always float32": (
        lambda sizes, itemsize, m, n: (sum(sizes) + len(sizes)) * 4,
        "gradients are summed in float32 at least: those of float64 weights in float64",
    ),
    "the tokens too": (
        lambda sizes, itemsize, m, n: _right(sizes, itemsize) + 8,
        "the 8 bytes for the number of targets are part of a step, and GradientBuckets does not send them",
    ),
    "weights alone": (lambda sizes, itemsize, m, n: sum(sizes) * itemsize, f"{_FLAGS}; and {_WIDE}"),
    "weights, on the wire": (
        lambda sizes, itemsize, m, n: sum(sizes) * itemsize * 2 * (n - 1) // n,
        f"{_FLAGS}; {_WIDE}; and {_WIRE}",
    ),
    "weights, every micro-batch": (
        lambda sizes, itemsize, m, n: sum(sizes) * itemsize * m,
        f"{_FLAGS}; {_WIDE}; and {_ONCE}",
    ),
}
_ALONE = "with one rank there is nobody to sum with, and nothing is handed to all_reduce"
_CASES = [
    ([5, 7], torch.float32, 1),
    ([5, 7], torch.bfloat16, 1),
    ([3, 1, 8], torch.float64, 3),
    ([6, 3], torch.bfloat16, 2),
]


def _counted(axis: Axis | None = None) -> list[int]:
    axis = axis or Mesh.build(MeshShape(dp=2))["dp"]
    out = []
    for sizes, dtype, micro_batches in _CASES:
        weights = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
        reducer = GradientBuckets(weights, axis, 24)
        with ledger.recording() as record:
            for m in range(micro_batches):
                if m == micro_batches - 1:
                    reducer.arm()
                torch.stack([weight.sum() for weight in weights]).sum().backward()
            reducer.finish()
        out.append(sum(record.values()))
    return out


def _run_step_bytes(answer: Answer) -> str | None:
    ranks = 4  # where a ring's factor differs from 1
    arguments = [(sizes, dtype.itemsize, micro_batches, ranks) for sizes, dtype, micro_batches in _CASES]
    got = [answer(*each) for each in arguments]
    counted = launch(_counted, world_size=2, timeout=60, output="hide")[0]
    if got == counted:
        alone = _counted(Axis("dp", 1, 0, (0,)))
        return None if [answer(*each[:3], 1) for each in arguments] == alone else _ALONE
    for wrong, hint in _COSTS.values():
        if got == [wrong(*each) for each in arguments]:
            return hint
    at = next(i for i, pair in enumerate(zip(got, counted, strict=True)) if pair[0] != pair[1])
    return f"for step_bytes{arguments[at]} the ledger counts {counted[at]}, not {got[at]}"


EXERCISES = [
    Exercise(
        id="03.step_bytes",
        title="The price, to the byte",
        task="Predict how many bytes a rank hands to all_reduce in one step. The ledger of a real run decides.",
        stub=step_bytes_stub,
        reference=step_bytes,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _COSTS.items()),
            Mistake("one rank too", lambda sizes, itemsize, m, n: _right(sizes, itemsize), _ALONE),
        ),
        run=_run_step_bytes,
    ),
]
