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


# The last word but one of some names, and what is said of each; then what to tell whoever says all of it. Several may
# apply to one answer: the first is told.
_MISREAD: dict[str, tuple[dict[str, int | str], str]] = {
    "weights read as [in, out]": (
        {**dict.fromkeys(("embed", "head", "q", "k", "v", "gate", "up"), 1), "o": 0, "down": 0},
        "every cut is along the wrong dim: a Linear's weight is [out, in], so cutting the outputs is dim 0",
    ),
    "Linears read as [in, out]": (
        {**dict.fromkeys(("head", "q", "k", "v", "gate", "up"), 1), "o": 0, "down": 0},
        "every Linear is cut along the wrong dim: its weight is [out, in], so cutting the outputs is dim 0 (of "
        "embed, [vocabulary, width], the vocabulary is dim 0 as well)",
    ),
    "all by their outputs": (
        {"o": 0, "down": 0},
        "o and down are cut by their outputs too: they would need their whole input, so one more exchange before "
        "each. Cut them by their inputs, which are already where they belong",
    ),
    "no norm is summed": (
        {"q_norm": "whole", "k_norm": "whole"},
        "q_norm and k_norm meet this rank's heads only, so each rank has a part of their gradient",
    ),
    "head norms cut": (
        {"q_norm": 0, "k_norm": 0},
        "q_norm and k_norm cannot be cut by heads: each is one weight [head_dim] that all heads share, so every rank "
        "holds it whole and meets its own heads with it",
    ),
    "all norms are summed": (
        {"attention_norm": "sum", "mlp_norm": "sum", "norm": "sum"},
        "a norm on the residual stream meets whole tokens, and the whole gradient, on every rank: its gradient is "
        "complete and equal everywhere, and a sum would multiply it by tp",
    ),
    "keys and values whole": (
        {"k": "whole", "v": "whole"},
        "k and v are left whole: then every rank makes the keys and values of all heads, and uses those of its own "
        "query heads; cut them by heads, as q",
    ),
    "vocabulary left whole": (
        {"embed": "whole", "head": "whole"},
        "embed and head are left whole: they are the largest matrices of a small model, and both can be cut by the "
        "vocabulary",
    ),
    "embed left whole": (
        {"embed": "whole"},
        "embed is left whole: a rank can hold some of its rows and put zeros for the other tokens, and the sum over "
        "the ranks is the embedding",
    ),
    "head left whole": (
        {"head": "whole"},
        "head is left whole, so every rank would make all logits: cut it by the vocabulary, as embed, and take the "
        "loss on the slices",
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


def _misread(said: dict[str, int | str]) -> Answer:
    return lambda name: said.get(name.split(".")[-2], plan(name))


def _run_plan(answer: Answer) -> str | None:
    want: dict[str, int | str | None] = {
        name: dim if (dim := sharded_dim(name)) is not None else "sum" if is_partial(name) else "whole"
        for name in _NAMES
    }
    got = {name: answer(name) for name in _NAMES}
    if got == want:
        return None
    for said, hint in _MISREAD.values():
        if all(got[name] == said.get(name.split(".")[-2], got[name]) for name in _NAMES):
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
    "bias on rank 0 only": (
        lambda x, weight, bias, axis: reduce_from(x @ weight.T + (bias if axis.index == 0 else 0), axis),
        "the value is right, and on rank 1 the bias gets no gradient: it is used on rank 0 only, so its copies drift "
        "apart; add it on every rank, after the sum",
    ),
    "no bias": (
        lambda x, weight, bias, axis: reduce_from(x @ weight.T, axis),
        "the bias is left out: add it once, after the sum",
    ),
    "entry for x": (
        lambda x, weight, bias, axis: reduce_from(copy_to(x, axis) @ weight.T, axis) + bias,
        "the value is right, and each rank's gradient of x has the other ranks' added to it: x is a slice that this "
        "rank alone has, so there is nothing to add up; an entry belongs where all ranks use one and the same tensor",
    ),
    "entry for the bias": (
        lambda x, weight, bias, axis: reduce_from(x @ weight.T, axis) + copy_to(bias, axis),
        "the value is right, and the gradient of the bias is multiplied by the number of ranks: after the sum every "
        "rank finds the whole of it by itself",
    ),
    "plain all_reduce": (
        lambda x, weight, bias, axis: all_reduce(x @ weight.T, axis) + bias,
        "the value is right, and no gradient comes back to x and weight: all_reduce is for values only; the sum that "
        "carries gradients is reduce_from",
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
    inputs: tuple[str, ...],
) -> str | None:
    """Compare what an answer computes on every rank with the right answer and with each known mistake.

    The known mistakes run in a launch of their own: an answer may leave ranks in any state.

    Args:
        values: the value of each answer, and then the gradients of its `inputs`.
    """
    got = [rank[0] for rank in on_ranks(values, [answer])]
    known = on_ranks(values, [right, *(mistake for mistake, _ in wrong.values())])
    for number, hint in enumerate([None, *(hint for _, hint in wrong.values())]):
        if all(_all_near(mine, rank[number]) for mine, rank in zip(got, known, strict=True)):
            return hint
    if not all(near(mine[0], rank[0][0]) for mine, rank in zip(got, known, strict=True)):
        return "the value is not that of one device"
    for number, name in enumerate(inputs, 1):
        for index, (mine, rank) in enumerate(zip(got, known, strict=True)):
            if mine[number] is None:
                return (
                    f"the value is right, and on rank {index} no gradient comes back to {name}: "
                    "reduce_from and copy_to carry gradients"
                )
            if not near(mine[number], rank[0][number]):
                factor = by_factor(mine[number], rank[0][number])
                return f"the value is right, and on rank {index} the gradient of {name} is not{factor}"
    raise AssertionError("it is the right answer")


def by_factor(got: Tensor, want: Tensor) -> str:
    """How a gradient is wrong, where that is one factor."""
    factor = (got.flatten() @ want.flatten() / want.pow(2).sum()).item() if got.shape == want.shape else 0
    return f": it is {factor:.3g} times what it should be" if factor and near(got, factor * want) else ""


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


def _hook(x: Tensor, axis: Axis) -> Tensor:
    x.register_hook(lambda gradient: all_reduce(gradient, axis))
    return x


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
    "a hook on x": (
        _hook,
        "all that comes back to x is summed, also what other uses of x send back, as the residual addition around the "
        "pair: the entry is a step of its own, and its result a new tensor",
    ),
}


def _copy_values(answers: list[Answer], axis: Axis) -> list[list[Any]]:
    out = []
    for answer in answers:
        leaf = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()  # the same on every rank
        x = 2 * leaf  # as a norm below the entry
        y = answer(x, axis)
        (y**2 * (axis.index + 1) + 3 * x).sum().backward()  # every rank uses it in another way; x goes on beside it
        out.append([y.detach(), leaf.grad])
    return out


EXERCISES = [
    Exercise(
        id="04.plan",
        title="Which dim of which weight",
        task="For every parameter of the model say what tensor parallelism does to it: the dim that is cut, or whole, "
        "or whole with gradients that must be added up.",
        stub=plan_stub,
        reference=plan,
        mistakes=tuple(Mistake(name, _misread(said), hint) for name, (said, hint) in _MISREAD.items()),
        run=_run_plan,
    ),
    Exercise(
        id="04.row_linear",
        title="A row parallel linear layer",
        task="Each rank holds a slice of the input and of the weight, and the whole bias. Return the whole output.",
        stub=row_linear_stub,
        reference=row_linear,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _ROWS.items()),
        run=lambda answer: run_and_compare(_row_values, answer, row_linear, _ROWS, ("x", "weight", "bias")),
    ),
    Exercise(
        id="04.copy_to",
        title="The entry of a pair",
        task="Write copy_to as a torch.autograd.Function: the identity forward, a sum over the ranks backward.",
        stub=copy_to_stub,
        reference=copy_to_by_hand,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _COPIES.items()),
        run=lambda answer: run_and_compare(_copy_values, answer, copy_to, _COPIES, ("x",)),
    ),
]
