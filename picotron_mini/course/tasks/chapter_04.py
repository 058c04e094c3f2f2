"""Exercises of chapter 04, tensor parallelism: where weights are cut, and the exchanges that put values together.

The checkers run the answers on ranks, forward and backward: half of the mistakes of this chapter compute the right
value and the wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...collectives import all_reduce, copy_to, reduce_from
from ...config import MeshShape, ModelConfig
from ...launch import launch
from ...mesh import Axis, Mesh
from ...model.gpt import parameter_shapes
from ...parallel.tensor import is_partial, sharded_dim
from ..exercises import Exercise, Mistake, NotAttempted

RANKS = 2
Answer = Callable[..., Any]


def on_ranks(fn: Callable[..., Any], *args: Any, ranks: int = RANKS) -> list[Any]:
    """Call fn(*args, axis) on ranks, axis being their tp axis; values in rank order."""
    return launch(_with_axis, fn, args, ranks, world_size=ranks, timeout=60, output="hide")


def _with_axis(fn: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> Any:
    return fn(*args, Mesh.build(MeshShape(tp=ranks))["tp"])


def near(got: Any, want: Tensor) -> bool:
    """Whether an answer is this tensor, up to rounding."""
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


# --- 1: which dim of which weight -------------------------------------------------------------------------


def plan_stub(name: str) -> int | str:
    """What happens to a parameter, by its name as "layers.2.mlp.down.weight" or "head.weight".

    Returns:
        0 or 1: the dim that is cut over the ranks (a Linear's weight is [out, in], an Embedding's [vocabulary, width]);
        "whole": every rank holds it, and computes its whole gradient by itself;
        "sum": every rank holds it, and the ranks' gradients must be added up.
    """
    raise NotAttempted


def plan(name: str) -> int | str:
    """Outputs first, inputs second; a norm inside the heads sees this rank's heads only."""
    module = name.split(".")[-2]
    if module in ("o", "down"):
        return 1
    if module in ("q_norm", "k_norm"):
        return "sum"
    return "whole" if module.endswith("norm") else 0


def _swapped(name: str) -> int | str:
    found = plan(name)
    return 1 - found if isinstance(found, int) else found


_PLANS: dict[str, tuple[Answer, str]] = {
    "weights read as [in, out]": (
        _swapped,
        "every cut is along the wrong dim: a Linear's weight is [out, in], so cutting the outputs is dim 0",
    ),
    "all by their outputs": (
        lambda name: 0 if plan(name) == 1 else plan(name),
        "o and down are cut by their outputs too: they would need their whole input, so one more exchange before "
        "each. Cut them by their inputs, which are already where they belong",
    ),
    "no norm is summed": (
        lambda name: "whole" if plan(name) == "sum" else plan(name),
        "q_norm and k_norm meet this rank's heads only, so each rank has a part of their gradient",
    ),
    "all norms are summed": (
        lambda name: "sum" if plan(name) == "whole" else plan(name),
        "a norm on the residual stream meets whole tokens, and the whole gradient, on every rank: its gradient is "
        "complete and equal everywhere, and a sum would multiply it by tp",
    ),
    "vocabulary left whole": (
        lambda name: "whole" if name in ("embed.weight", "head.weight") else plan(name),
        "embed and head are left whole: they are the largest matrices of a small model, and both can be cut by the "
        "vocabulary",
    ),
}
_NAMES = list(
    parameter_shapes(
        ModelConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4,
            qk_norm=True, tie_embeddings=False,
        )
    )
)  # fmt: skip


def _run_plan(answer: Answer) -> str | None:
    want: dict[str, int | str | None] = {
        name: dim if (dim := sharded_dim(name)) is not None else "sum" if is_partial(name) else "whole"
        for name in _NAMES
    }
    got = {name: answer(name) for name in _NAMES}
    if got == want:
        return None
    for wrong, hint in _PLANS.values():
        if got == {name: wrong(name) for name in _NAMES}:
            return hint
    name = next(name for name in _NAMES if got[name] != want[name])
    return f"{name}: {got[name]!r} is not what the library does; what does this rank need of it, and what does it see?"


# --- 2: a row parallel linear -----------------------------------------------------------------------------


def row_linear_stub(x: Tensor, weight: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """Forward of a row parallel linear layer with a bias; autograd must find the right gradients through it.

    Args:
        x: [T, F/n], this rank's slice of the input.
        weight: [D, F/n], this rank's slice of a Linear's weight [D, F].
        bias: [D], whole and the same on every rank.

    Returns:
        [T, D], the same on every rank. There are `reduce_from(x, axis)` and `copy_to(x, axis)`.
    """
    raise NotAttempted


def row_linear(x: Tensor, weight: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """The sum first, the bias once after it."""
    return reduce_from(x @ weight.T, axis) + bias


_ROWS: dict[str, tuple[Answer, str]] = {
    "bias on every rank": (
        lambda x, weight, bias, axis: reduce_from(x @ weight.T + bias, axis),
        "the bias is added on every rank before the sum, so it counts as many times as there are ranks",
    ),
    "a share of the bias": (
        lambda x, weight, bias, axis: reduce_from(x @ weight.T + bias / axis.size, axis),
        "the value is right, and the bias gets its gradient divided by the number of ranks: add it once, after the sum",
    ),
    "no sum": (
        lambda x, weight, bias, axis: x @ weight.T + bias,
        "each rank returns its own term: a product over F is a sum of products over the parts of F, and the ranks "
        "have one part each",
    ),
    "swapped pair": (
        lambda x, weight, bias, axis: copy_to(x @ weight.T, axis) + bias,
        "copy_to is the entry of a pair: forward it adds nothing up. The exit is reduce_from",
    ),
    "summed both ways": (
        lambda x, weight, bias, axis: reduce_from(copy_to(x @ weight.T, axis), axis) + bias,
        "the value is right, and the gradients of x and weight are multiplied by the number of ranks: backward, a sum "
        "hands each term the gradient as it is",
    ),
}


def _row_values(answers: list[Answer], axis: Axis) -> list[list[Any]]:
    """For each answer: its value, and the gradients of x, weight and bias."""
    out = []
    for answer in answers:
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 6), (3, 6), (3,))
        x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        half = slice(3 * axis.index, 3 * axis.index + 3)
        leaves = [t.clone().requires_grad_() for t in (x[:, half], weight[:, half], bias)]
        y = answer(*leaves, axis)
        (y**2).sum().backward()
        out.append([y.detach(), *(leaf.grad for leaf in leaves)])
    return out


def run_and_compare(
    values: Callable[[list[Answer], Axis], list[list[Any]]],
    answer: Answer,
    right: Answer,
    wrong: dict[str, tuple[Answer, str]],
    ranks: int = RANKS,
) -> str | None:
    """Compare what an answer computes on every rank with the right answer and with each known mistake.

    The known mistakes run in a launch of their own: an answer may leave ranks in any state.
    """
    got = [rank[0] for rank in on_ranks(values, [answer], ranks=ranks)]
    known = on_ranks(values, [right, *(mistake for mistake, _ in wrong.values())], ranks=ranks)
    for number, hint in enumerate([None, *(hint for _, hint in wrong.values())]):
        if all(_all_near(mine, rank[number]) for mine, rank in zip(got, known, strict=True)):
            return hint
    if any(mine[i] is None for mine in got for i in range(1, len(mine))):
        return "autograd does not come back through it to every input: reduce_from and copy_to carry gradients"
    forward = all(near(mine[0], rank[0][0]) for mine, rank in zip(got, known, strict=True))
    return "the value is right and a gradient is not" if forward else "the value is not that of one device"


def _all_near(got: list[Any], want: list[Any]) -> bool:
    return all(near(a, b) if isinstance(b, Tensor) else a is b for a, b in zip(got, want, strict=True))


# --- 3: the entry of a pair -------------------------------------------------------------------------------


def copy_to_stub(x: Tensor, axis: Axis) -> Tensor:
    """The entry of a pair: the identity forward, the sum over the axis backward.

    Write a `torch.autograd.Function` and return what its `apply` returns. `all_reduce(x, axis)` adds up over the
    ranks and returns a new tensor.
    """
    raise NotAttempted


def copy_to_by_hand(x: Tensor, axis: Axis) -> Tensor:
    """Forward nothing is sent; backward every rank's part of the gradient is added."""

    class CopyTo(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)  # a new tensor object, so that autograd sees a step here

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return all_reduce(gradient, axis)

    out: Tensor = CopyTo.apply(x)
    return out


_COPIES: dict[str, tuple[Answer, str]] = {
    "identity": (
        lambda x, axis: x,
        "forward nothing is missing, and backward each rank keeps its own part of the gradient: add the parts up",
    ),
    "the exit": (
        reduce_from,
        "this sums forward: the ranks' copies of x are equal, and now they are multiplied by the number of ranks",
    ),
    "summed both ways": (
        lambda x, axis: reduce_from(copy_to(x, axis), axis),
        "the gradient is summed, and so is x: forward the entry leaves x alone",
    ),
    "mean": (
        lambda x, axis: copy_to(x / axis.size, axis) + x.detach() * (1 - 1 / axis.size),
        "the gradient is the mean over the ranks: each rank has a part of a sum, so the parts must be added",
    ),
}


def _copy_values(answers: list[Answer], axis: Axis) -> list[list[Any]]:
    out = []
    for answer in answers:
        x = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()  # the same on every rank
        y = answer(x, axis)
        (y**2 * (axis.index + 1)).sum().backward()  # every rank uses it in another way
        out.append([y.detach(), x.grad])
    return out


EXERCISES = [
    Exercise(
        id="04.plan",
        title="Which dim of which weight",
        task="For every parameter of the model say what tensor parallelism does to it: the dim that is cut, or whole, "
        "or whole with gradients that must be added up.",
        stub=plan_stub,
        reference=plan,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _PLANS.items()),
        run=_run_plan,
    ),
    Exercise(
        id="04.row_linear",
        title="A row parallel linear layer",
        task="Each rank holds a slice of the input and of the weight, and the whole bias. Return the whole output.",
        stub=row_linear_stub,
        reference=row_linear,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _ROWS.items()),
        run=lambda answer: run_and_compare(_row_values, answer, row_linear, _ROWS),
    ),
    Exercise(
        id="04.copy_to",
        title="The entry of a pair",
        task="Write copy_to as a torch.autograd.Function: the identity forward, a sum over the ranks backward.",
        stub=copy_to_stub,
        reference=copy_to_by_hand,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _COPIES.items()),
        run=lambda answer: run_and_compare(_copy_values, answer, copy_to, _COPIES),
    ),
]
