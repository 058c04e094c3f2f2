"""Exercises of chapter 03, ZeRO: the same steps with a share of the optimizer's state.

The checker hands out the optimizer, and looks afterwards at how much state it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from ...collectives import all_gather, all_reduce, ledger, reduce_scatter
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ..exercises import Exercise, Mistake, NotAttempted

RANKS = 3  # with two, many a wrong part is right
Answer = Callable[..., Any]
Make = Callable[[Sequence[Tensor]], optim.Optimizer]


def zero_steps_stub(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    """Train `weight` in place for a few steps, as if one device had the sum of all ranks' gradients.

    Budget: a rank keeps the optimizer state of 1/n of the elements, and no all_reduce is used. There are
    `reduce_scatter(x, axis, 0)`, `all_gather(x, axis, 0)`.

    Args:
        weight: [L], equal on all ranks, and equal on all ranks afterwards; n divides L.
        gradients: of this rank's tokens, one [L] for each step.
        make_optimizer: `make_optimizer([tensor])` is an AdamW over that tensor, which reads its `.grad`.
    """
    raise NotAttempted


def zero_steps(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    """Own the r-th part, update that alone, hand it round."""
    mine = weight.chunk(axis.size)[axis.index]
    optimizer = make_optimizer([mine])
    for gradient in gradients:
        mine.grad = reduce_scatter(gradient, axis, 0)
        optimizer.step()
        weight.copy_(all_gather(mine, axis, 0))


def _everything(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    optimizer = make_optimizer([weight])
    for gradient in gradients:
        weight.grad = all_reduce(gradient, axis)
        optimizer.step()


def _everything_in_halves(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    optimizer = make_optimizer([weight])
    for gradient in gradients:
        weight.grad = all_gather(reduce_scatter(gradient, axis, 0), axis, 0)
        optimizer.step()


def _not_handed_round(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    mine = weight.chunk(axis.size)[axis.index]
    optimizer = make_optimizer([mine])
    for gradient in gradients:
        mine.grad = reduce_scatter(gradient, axis, 0)
        optimizer.step()


def _own_gradient(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    mine = weight.chunk(axis.size)[axis.index]
    optimizer = make_optimizer([mine])
    for gradient in gradients:
        mine.grad = gradient.chunk(axis.size)[axis.index].clone()
        optimizer.step()
        weight.copy_(all_gather(mine, axis, 0))


def _nothing_sent(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    optimizer = make_optimizer([weight])
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()


def _mean(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    zero_steps(weight, [gradient / axis.size for gradient in gradients], make_optimizer, axis)


def _state_forgotten(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    for gradient in gradients:
        zero_steps(weight, [gradient], make_optimizer, axis)


def _first_part_for_all(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    mine = weight.chunk(axis.size)[0]
    optimizer = make_optimizer([mine])
    for gradient in gradients:
        mine.grad = reduce_scatter(gradient, axis, 0)
        optimizer.step()
        weight.copy_(all_gather(mine, axis, 0))


def _reduced_whole(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    mine = weight.chunk(axis.size)[axis.index]
    optimizer = make_optimizer([mine])
    for gradient in gradients:
        mine.grad = all_reduce(gradient, axis).chunk(axis.size)[axis.index].clone()
        optimizer.step()
        weight.copy_(all_gather(mine, axis, 0))


def _not_in_place(weight: Tensor, gradients: Sequence[Tensor], make_optimizer: Make, axis: Axis) -> None:
    zero_steps(weight.clone(), gradients, make_optimizer, axis)


LENGTH, STEPS = 12, 3
_BUDGET = 2 * 8 * LENGTH // RANKS  # two moments of float64
_SUMMED = "all_reduce gives each rank the whole sum, of which it needs its part: reduce_scatter is half of the way"
_STEP_HINTS = {
    "alone": "the ranks' weights differ afterwards: each has updated its own part, and the others never got it",
    "nothing sent": "each rank has trained all of the weight on its own gradients; nothing was exchanged",
    "own": "each part was updated with its owner's own gradient; the other ranks' gradients of it are missing",
    "mean": "the gradients were averaged; the loss is already divided by the global number of targets, so they are "
    "summed",
    "forgotten": "the moments begin anew in each step: make the optimizer once",
    "first": "every rank updates the first part; the rank with index r owns part r",
    "place": "`weight` itself is unchanged; it is to be trained in place",
}
_STEP_MISTAKES: dict[str, Answer] = {
    "alone": _not_handed_round,
    "nothing sent": _nothing_sent,
    "own": _own_gradient,
    "mean": _mean,
    "forgotten": _state_forgotten,
    "first": _first_part_for_all,
    "place": _not_in_place,
}


def _over_budget(state: int) -> str:
    return (
        f"the weights are right, and a rank keeps {state} bytes of optimizer state; the budget is {_BUDGET}: each rank "
        "updates the part that it owns, and needs the moments of that alone"
    )


def _begin(index: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(index)
    weight = torch.linspace(-1, 1, LENGTH, dtype=torch.float64)
    return weight, [torch.randn(LENGTH, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def _steps(answer: Answer, axis: Axis) -> tuple[Tensor, int, set[str]]:
    """The weight afterwards, the bytes of state, the operations used."""
    made: list[optim.Optimizer] = []

    def make(tensors: Sequence[Tensor]) -> optim.Optimizer:
        # a large eps: else Adam would hide a gradient that is too large or too small
        made.append(optim.AdamW(list(tensors), lr=0.1, eps=0.5))
        return made[-1]

    weight, gradients = _begin(axis.index)
    with ledger.recording() as record:
        answer(weight, gradients, make, axis)
    state = [x for each in made for one in each.state.values() for x in one.values() if x.ndim]
    return weight, sum(x.numel() * x.element_size() for x in state), {operation for _, operation in record}


def _all_steps(answer: Answer) -> tuple[tuple[Tensor, int, set[str]], dict[str, Tensor]]:
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    known = {name: _steps(wrong, axis)[0] for name, wrong in _STEP_MISTAKES.items()}
    return _steps(answer, axis), known


def _run_steps(answer: Answer) -> str | None:
    one, _ = _begin(0)
    optimizer = optim.AdamW([one], lr=0.1, eps=0.5)
    for step in range(STEPS):
        one.grad = torch.stack([_begin(rank)[1][step] for rank in range(RANKS)]).sum(0)
        optimizer.step()
    results = launch(_all_steps, answer, world_size=RANKS, timeout=60, output="hide")

    def near(wanted: Sequence[Tensor]) -> bool:
        pairs = zip(results, wanted, strict=True)
        return all(torch.allclose(got, want, rtol=1e-9, atol=1e-12) for ((got, *_), _), want in pairs)

    if not near([one] * RANKS):
        for name, hint in _STEP_HINTS.items():
            if near([known[name] for _, known in results]):
                return hint
        rank, got = next((r, w) for r, ((w, *_), _) in enumerate(results) if not torch.allclose(w, one, rtol=1e-9))
        return f"after {STEPS} steps the weight of rank {rank} begins {got[0]:.4f} and should begin {one[0]:.4f}"
    for (_, state, used), _ in results:
        if state > _BUDGET:
            return _over_budget(state)
        if "all_reduce" in used:
            return _SUMMED
    return None


EXERCISES = [
    Exercise(
        id="03.zero_steps",
        title="The same step with a share of the state",
        task="Train some steps of AdamW over all ranks' gradients. The result is that of one device, and no rank "
        f"keeps more than 1/n of the optimizer's state: here {_BUDGET} bytes.",
        stub=zero_steps_stub,
        reference=zero_steps,
        mistakes=(
            Mistake("everything everywhere", _everything, _over_budget(2 * 8 * LENGTH)),
            Mistake("everything, in two halves", _everything_in_halves, _over_budget(2 * 8 * LENGTH)),
            *(Mistake(name, wrong, _STEP_HINTS[name]) for name, wrong in _STEP_MISTAKES.items()),
            Mistake("reduced whole", _reduced_whole, _SUMMED),
        ),
        run=_run_steps,
    ),
]
