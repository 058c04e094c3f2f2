"""Exercises of chapter 03, data parallelism: what is summed.

For each: the right answer, the mistakes that people make, and what tells them apart. The checkers run the answer on
what is really there: ranks that add up gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...collectives import all_reduce
from ...config import MeshShape
from ...launch import RankError, launch
from ...mesh import Axis, Mesh
from ..exercises import Exercise, Mistake, NotAttempted

RANKS = 2
Answer = Callable[..., Any]


def _on_ranks(fn: Callable[..., Any], *args: Any) -> list[Any]:
    return launch(_with_axis, fn, args, world_size=RANKS, timeout=60, output="hide")


def _with_axis(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(*args, Mesh.build(MeshShape(dp=RANKS))["dp"])


def _near(got: Any, want: Any) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


# --- 1: what each rank calls backward on ------------------------------------------------------------------


def local_loss_stub(losses: Tensor, mask: Tensor, axis: Axis) -> Tensor:
    """What this rank calls `.backward()` on, so that the SUM of the ranks' gradients is that of the global mean.

    Args:
        losses: [T] one loss a token, of this rank's tokens.
        mask: [T] bool, which tokens count. Other ranks have other numbers of them.
    """
    raise NotAttempted


def local_loss(losses: Tensor, mask: Tensor, axis: Axis) -> Tensor:
    """The sum of this rank's losses over the number of targets of all ranks."""
    return losses[mask].sum() / all_reduce(mask.sum(), axis)


_LOSSES = {
    "local mean": (
        lambda losses, mask, axis: losses[mask].mean(),
        "each rank divides by its own number of targets, and the sum over ranks is then as many times too large as "
        "there are ranks; divide by the number of targets of all ranks",
    ),
    "average of averages": (
        lambda losses, mask, axis: losses[mask].mean() / axis.size,
        "this is the average of the ranks' averages: a token on a rank with few targets weighs more than one on a "
        "rank with many; divide the sum by the number of targets of all ranks",
    ),
    "no division": (
        lambda losses, mask, axis: losses[mask].sum(),
        "the sum is not divided by anything: the gradient grows with the batch; divide by the number of targets of "
        "all ranks",
    ),
    "padding counted": (
        lambda losses, mask, axis: losses[mask].sum() / all_reduce(torch.tensor(mask.numel()), axis),
        "the divisor counts all tokens, also those that are masked out; count the targets only",
    ),
    "local tokens": (
        lambda losses, mask, axis: losses[mask].sum() / mask.numel(),
        "the divisor is the number of this rank's own tokens; divide by the number of targets of all ranks",
    ),
    "masked tokens kept": (
        lambda losses, mask, axis: losses.sum() / all_reduce(mask.sum(), axis),
        "losses of tokens that the mask leaves out are in the sum",
    ),
    "mean of everything": (
        lambda losses, mask, axis: losses.mean(),
        "this is the mean over all of this rank's tokens, masked or not; take the sum of the targets' losses, and "
        "divide by the number of targets of all ranks",
    ),
    "times the ranks": (
        lambda losses, mask, axis: losses[mask].sum() / all_reduce(mask.sum(), axis) * axis.size,
        "times the number of ranks is right where gradients are averaged afterwards, as PyTorch's DDP does; here they "
        "are summed",
    ),
    "loss of all": (
        lambda losses, mask, axis: all_reduce(losses[mask].sum(), axis) / all_reduce(mask.sum(), axis),
        "this is the loss of all ranks, on each of them; a rank differentiates its own tokens' part, and the sum over "
        "ranks is made of the gradients",
    ),
}


def _loss_values(answer: Answer, axis: Axis) -> tuple[Any, dict[str, Tensor], bool]:
    generator = torch.Generator().manual_seed(axis.index)
    losses = torch.rand(10, generator=generator, dtype=torch.float64)
    at = torch.arange(10)
    # 6 and 3 targets of 10: no wrong divisor is by chance the right one
    mask = at < 6 if axis.index == 0 else (at >= 4) & (at < 7)
    known = {name: wrong(losses, mask, axis) for name, (wrong, _) in _LOSSES.items()}
    known["right"] = local_loss(losses, mask, axis)
    got = answer(losses.requires_grad_(), mask, axis)
    if not isinstance(got, Tensor):
        return got, known, False
    return got.detach(), known, got.requires_grad


def _run_local_loss(answer: Answer) -> str | None:
    for rank, (got, known, differentiable) in enumerate(_on_ranks(_loss_values, answer)):
        if not isinstance(got, Tensor):
            return f"on rank {rank} the answer is {got!r}; it should be a tensor, to call backward on"
        if _near(got, known["right"]):
            if not differentiable:
                return "the value is right, and has lost its graph: backward cannot be called on it"
            continue
        for name, (_, hint) in _LOSSES.items():
            if _near(got, known[name]):
                return hint
        return f"on rank {rank} the loss is {float(got):.4f} and should be {float(known['right']):.4f}"
    return None


# --- 2: the naive reduction -------------------------------------------------------------------------------


def reduce_gradients_stub(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    """Sum each parameter's gradient over the axis, in place, with `all_reduce(x, axis)`, which returns a new tensor.

    Args:
        parameters: some are frozen (their `.grad` is None on every rank), and a tied one is listed twice.
    """
    raise NotAttempted


def reduce_gradients(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    """Each parameter once, its gradient and not itself."""
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            parameter.grad.copy_(all_reduce(parameter.grad, axis))


def _reduce_parameters(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            parameter.data.copy_(all_reduce(parameter.data, axis) / axis.size)


def _reduce_to_mean(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    reduce_gradients(parameters, axis)
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            parameter.grad /= axis.size


def _reduce_tied_twice(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(all_reduce(parameter.grad, axis))


def _reduce_and_drop(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            all_reduce(parameter.grad, axis)


_NOT_SUMMED = "the weights were changed. What is summed is each parameter's .grad, not the parameter"
_MEAN = (
    "the gradients are averaged; the loss is already divided by the global number of targets, so they must be summed"
)
_FILLED = (
    "a parameter without a gradient was given one: None must stay None, for an optimizer skips None and moves a weight "
    "whose gradient is zero"
)
_NEW = (
    "the gradients are still each rank's own: `all_reduce(x, axis)` returns the sum as a new tensor and leaves x as it "
    "is; put the sum into .grad"
)
_NONE = "a frozen parameter has no gradient: its .grad is None on every rank, and there is nothing to sum; skip it"
_TIED = "the tied parameter is listed twice and was summed twice; go through each parameter once"


def _reduce_and_fill(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    reduce_gradients(parameters, axis)


def _reduce_without_looking(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    for parameter in dict.fromkeys(parameters):
        parameter.grad = all_reduce(parameter.grad, axis)  # type: ignore[arg-type]


def _gradients_after(answer: Answer, axis: Axis) -> tuple[list[tuple[Tensor, Tensor]], bool, bool]:
    """Gradients and what they should be; whether the frozen one has none still; whether weights were changed."""
    start = 1.0 + axis.index  # other weights on each rank, so that a reduction of them shows
    parameters = [nn.Parameter(torch.full((3,), start, dtype=torch.float64)) for _ in range(3)]
    plain, tied, frozen = parameters
    plain.grad, tied.grad = torch.full_like(plain, 1.0 + axis.index), torch.full_like(tied, 10.0 + axis.index)
    want = [all_reduce(p.grad, axis) for p in (plain, tied) if p.grad is not None]
    answer([plain, tied, frozen, tied], axis)
    pairs = [(p.grad, w) for p, w in zip((plain, tied), want, strict=True) if p.grad is not None]
    return pairs, frozen.grad is None, any(bool((p != start).any()) for p in parameters)


def _run_reduce(answer: Answer) -> str | None:
    try:
        results = _on_ranks(_gradients_after, answer)
    except RankError as error:
        if "NoneType" in str(error):
            return _NONE
        raise
    for ((plain, sum_plain), (tied, sum_tied)), still_none, moved in results:
        if not still_none:
            return _FILLED
        if _near(plain, sum_plain / RANKS):
            return _MEAN
        if moved:
            return _NOT_SUMMED
        if not _near(plain, sum_plain):
            return _NEW
        if not _near(tied, sum_tied):
            return _TIED
    return None


EXERCISES = [
    Exercise(
        id="03.local_loss",
        title="The loss that each rank differentiates",
        task="Two ranks hold different numbers of targets. Return what this rank calls backward on, so that the sum "
        "of the two gradients is the gradient of the mean loss over all targets.",
        stub=local_loss_stub,
        reference=local_loss,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _LOSSES.items()),
        run=_run_local_loss,
    ),
    Exercise(
        id="03.reduce_gradients",
        title="The naive reduction",
        task="After backward, add up the gradients of all ranks, one parameter at a time. Some parameters are frozen, "
        "and a tied one is listed twice.",
        stub=reduce_gradients_stub,
        reference=reduce_gradients,
        mistakes=(
            Mistake("the parameter", _reduce_parameters, _NOT_SUMMED),
            Mistake("result dropped", _reduce_and_drop, _NEW),
            Mistake("zeros for what is frozen", _reduce_and_fill, _FILLED),
            Mistake("mean", _reduce_to_mean, _MEAN),
            Mistake("tied twice", _reduce_tied_twice, _TIED),
            Mistake("None not skipped", _reduce_without_looking, _NONE),
        ),
        run=_run_reduce,
    ),
]
