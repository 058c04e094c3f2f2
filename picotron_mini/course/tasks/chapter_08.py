"""Exercise of chapter 08, mixtures of experts: route and combine.

Its check counts the rows that experts are given, and reads from an output how much of each expert is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.mixed import fault

Answer = Callable[..., Any]
Expert = Callable[[Tensor], Tensor]


def _near(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got.double(), want.double(), 1e-9)


# --- 1: route and combine ---------------------------------------------------------------------------------


def mixture_stub(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    """Softmax over the logits, the best top_k experts of each token, weights that sum to 1, and their weighted sum.

    Args:
        x: [N, D].
        logits: [N, E].
        experts: each a function from rows [M, D] to rows [M, D]. Together they may be given at most N top_k rows.

    Returns:
        [N, D].
    """
    raise NotAttempted


def mixture(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    """Each expert gets the tokens that chose it, and its weighted outputs are added where they came from."""
    weights, chosen = logits.softmax(-1).topk(top_k)  # [N, K] each
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        y = y.index_add(0, token, expert(x[token]) * weights[token, place, None])
    return y


def _mixture_not_divided(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    weights = logits.softmax(-1).topk(top_k).values
    return mixture(x, logits, experts, top_k) * weights.sum(-1, keepdim=True)


def _mixture_of_all(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    each = torch.stack([expert(x) for expert in experts])  # [E, N, D]
    return sum(each[chosen[:, k], torch.arange(len(x))] * weights[:, k, None] for k in range(top_k))  # type: ignore[return-value]


def _mixture_overwritten(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        y = y.index_copy(0, token, expert(x[token]) * weights[token, place, None])
    return y


def _mixture_of_choices(
    x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int, order: str = "by expert"
) -> Tensor:
    """By sorting the choices, of which each has a row; with the order undone it is right."""
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    sort = chosen.flatten().argsort(stable=True)  # [N K], by expert
    rows = x[sort // top_k].split(torch.bincount(chosen.flatten(), minlength=len(experts)).tolist())
    made = torch.cat([expert(part) for expert, part in zip(experts, rows, strict=True)])
    if order != "by expert":
        made = made[sort.argsort() if order == "by token" else sort]
    return (made.unflatten(0, (-1, top_k)) * weights[..., None]).sum(1)


def _mixture_sorted_twice(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return _mixture_of_choices(x, logits, experts, top_k, order="sorted again")


def _mixture_of_logits(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.topk(top_k).values
    return _mixture_with(x, logits, experts, top_k, best / best.sum(-1, keepdim=True))


def _mixture_first_weight(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.softmax(-1).topk(top_k).values
    return _mixture_with(x, logits, experts, top_k, (best / best.sum(-1, keepdim=True))[:, :1].expand_as(best))


def _mixture_with(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int, weights: Tensor) -> Tensor:
    chosen = logits.topk(top_k).indices
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        y = y.index_add(0, token, expert(x[token]) * weights[token, place, None])
    return y


def _mixture_weighed_before(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        y = y.index_add(0, token, expert(x[token] * weights[token, place, None]))
    return y


def _mixture_mean(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits, experts, top_k) / top_k


def _mixture_unweighed(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return _mixture_with(x, logits, experts, top_k, torch.ones(len(x), top_k, dtype=x.dtype))


def _mixture_of_the_worst(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, -logits, experts, top_k)


def _mixture_averaged(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1.0)
    return mixture(x, torch.where(chosen > 0, 0.0, float("-inf")), experts, top_k)


def _mixture_detached(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits.detach(), experts, top_k)


def _mixture_sum_detached(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.softmax(-1).topk(top_k).values
    return _mixture_with(x, logits, experts, top_k, best / best.sum(-1, keepdim=True).detach())


def _mixture_second_detached(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.softmax(-1).topk(top_k).values
    best = torch.cat((best[:, :1], best[:, 1:].detach()), 1)
    return _mixture_with(x, logits, experts, top_k, best / best.sum(-1, keepdim=True))


def _mixture_sigmoid(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.sigmoid().topk(top_k).values
    return _mixture_with(x, logits, experts, top_k, best / best.sum(-1, keepdim=True))


def _mixture_from_one(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits, [torch.zeros_like, *experts[1:]], top_k)


def _mixture_rounded(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits, experts, top_k).float()


def _mixture_repeated(
    x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int, both_ways: bool = True
) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).flatten()
    rows, chosen = x.repeat(top_k, 1), chosen.flatten()
    made = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        made[chosen == number] = expert(rows[chosen == number])
    token = torch.arange(len(x))
    token = token.repeat(top_k) if both_ways else token.repeat_interleave(top_k)
    return torch.zeros_like(x).index_add(0, token, made * weights[:, None])


def _mixture_repeated_there(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return _mixture_repeated(x, logits, experts, top_k, both_ways=False)


def _mixture_swapped(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    best = logits.softmax(-1).topk(top_k).values
    return _mixture_with(x, logits, experts, top_k, (best / best.sum(-1, keepdim=True)).flip(1))


def _mixture_with_residual(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return x + mixture(x, logits, experts, top_k)


def _mixture_last_choice(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for k in range(top_k):
        for number, expert in enumerate(experts):
            token = (chosen[:, k] == number).nonzero().flatten()
            y = y.index_copy(0, token, expert(x[token]) * weights[token, k, None])
    return y


def _mixture_best_only(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits, experts, 1)


_NOT_DIVIDED = "the weights of a token's experts do not sum to 1: divide the chosen probabilities by their sum"
_OF_ALL = (
    "right, and over the budget: the experts were given more than N top_k rows, as if the model were dense; give each "
    "the tokens that chose it"
)
_OVERWRITTEN = (
    "a token's experts replace each other's output, and the last one stays; their weighted outputs are added up"
)
_AVERAGED = "every chosen expert counts the same; weigh each with its probability, or the router learns nothing"
_DETACHED = (
    "the output is right and no gradient reaches the logits: the weights are the only way by which a router learns, so "
    "they must stay in the graph"
)
_SUM_DETACHED = (
    "the output is right and a part of the gradient of the logits is missing: the sum by which the weights are divided "
    "depends on the logits too, and was taken out of the graph"
)
_PART_DETACHED = (
    "the output is right and the gradient of the logits is not: a part of what makes the weights has left the graph, "
    "by detach, no_grad, item or a copy"
)
_BEST_ONLY = "each token passes its best expert only; it has top_k of them"
_LOGITS = "the weights are logits, which are no shares and may lie below 0: softmax makes probabilities of them first"
_FIRST_WEIGHT = "a token's experts all got the weight of its best one; each choice has a weight of its own"
_WEIGHED_BEFORE = (
    "the rows were weighed before their expert, which is not linear: what it makes of half a token is not half of what "
    "it makes of the token; weigh its output"
)
_SWAPPED = (
    "a token's experts got each other's weights: whatever is sorted or turned round, the weight at place k belongs to "
    "the expert at place k of the same token"
)
_REPEATED = (
    "rows and choices are out of step: in `chosen.flatten()` the choices of one token stand side by side, so each row "
    "is needed top_k times in a row, which is repeat_interleave; repeat gives all tokens, and then all once more"
)
_RESIDUAL = (
    "this is x + y: the residual stream is added around a mixture, once; return only what the experts make of the "
    "tokens"
)
_MEAN = "the outputs were averaged over top_k: their weights sum to 1 already, so they are only added up"
_UNWEIGHED = "the outputs of a token's experts were added without weights: weigh each with its probability"
_ASTRAY = (
    "a token's output is no weighted sum of what experts make of that very token: rows that were sorted by expert must "
    "go back to their tokens, and the way back is the inverse of the order, not the order once more"
)
_UNASKED = "a token passes an expert that is none of its best: choose the top_k largest of its own row"
_MISSING = "what one of a token's experts makes of it is missing from the sum"
_WEIGHTS = (
    "each token passes the right experts, with other weights than these: softmax over the logits, and of the chosen "
    "probabilities each divided by their sum"
)
_NOT_FINITE = "the output has numbers that are not finite; experts and logits here are"
_DTYPE = "return the dtype of x: in another, too little is left of the output to say what else is wrong with it"
_ROUNDED = "right but for rounding: keep the dtype of x, in which all of it can be computed"

# what can be told from the output alone, and else by what is in it
_MIXTURES: dict[str, tuple[Answer, str]] = {
    "not divided": (_mixture_not_divided, _NOT_DIVIDED),
    "overwritten": (_mixture_overwritten, _OVERWRITTEN),
    "averaged": (_mixture_averaged, _AVERAGED),
    "unweighed": (_mixture_unweighed, _UNWEIGHED),
    "mean": (_mixture_mean, _MEAN),
    "best only": (_mixture_best_only, _BEST_ONLY),
    "logits as weights": (_mixture_of_logits, _LOGITS),
    "first weight": (_mixture_first_weight, _FIRST_WEIGHT),
    "weighed before": (_mixture_weighed_before, _WEIGHED_BEFORE),
    "overwritten by choice": (_mixture_last_choice, _OVERWRITTEN),
    "weights swapped": (_mixture_swapped, _SWAPPED),
    "repeat": (_mixture_repeated, _REPEATED),
    "repeat on the way there": (_mixture_repeated_there, _REPEATED),
    "residual": (_mixture_with_residual, _RESIDUAL),
}


def _mixture_case(answer: Answer) -> tuple[Tensor, Tensor | None, int]:
    """Output, gradient of the logits, and the number of rows that the experts were given."""
    x, logits, gradient, *matrices = _drawn()
    logits.requires_grad_()
    given = [0]

    def expert(matrix: Tensor) -> Expert:
        def apply(rows: Tensor) -> Tensor:
            given[0] += len(rows)
            return (rows @ matrix).tanh()

        return apply

    out = answer(x, logits, [expert(matrix) for matrix in matrices], 2)
    if isinstance(out, Tensor) and out.requires_grad and out.shape == gradient.shape:
        (out * gradient).sum().backward()
    return out, logits.grad, given[0]


def _drawn() -> list[Tensor]:
    """x [9, 8], logits [9, 5], the output's gradient [9, 8], and a matrix [8, 8] for each expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 8), (9, 5), (9, 8), *[(8, 8)] * 5)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _run_mixture(answer: Answer) -> str | None:
    got, gradient, given = _mixture_case(answer)
    want, want_gradient, budget = _mixture_case(mixture)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"return a row for each token, a tensor [N, D] = {list(want.shape)}: what its experts make is added up"
    if not got.isfinite().all():
        return _NOT_FINITE
    if not _near(got, want):
        if torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4):
            return _ROUNDED
        if got.dtype != want.dtype:
            return _DTYPE
        known = (hint for wrong, hint in _MIXTURES.values() if _near(got, _mixture_case(wrong)[0]))
        return next(known, None) or _read_mixture(got.detach().double())
    assert want_gradient is not None
    if gradient is None or not gradient.any():
        return _DETACHED
    if not _near(gradient, want_gradient):
        without_sum = _mixture_case(_mixture_sum_detached)[1]
        assert without_sum is not None
        return _SUM_DETACHED if _near(gradient, without_sum) else _PART_DETACHED
    return _OF_ALL if given > budget else None


def _read_mixture(got: Tensor) -> str:
    """What is wrong with an output that is none of the known ones."""
    x, logits, _, *matrices = _drawn()
    weights, chosen = logits.softmax(-1).topk(2)
    wanted = torch.zeros_like(logits).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
    found = fault(got, torch.stack([(x @ matrix).tanh() for matrix in matrices], 1), wanted)
    return {"astray": _ASTRAY, "unasked": _UNASKED, "missing": _MISSING}.get(found or "", _WEIGHTS)


EXERCISES = [
    Exercise(
        id="08.mixture",
        title="Route and combine",
        task="From logits and the experts as functions of rows, compute the output of a mixture; the experts may be "
        "given at most N top_k rows.",
        stub=mixture_stub,
        reference=mixture,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _MIXTURES.items()),
            Mistake("all experts", _mixture_of_all, _OF_ALL),
            Mistake("left sorted", _mixture_of_choices, _ASTRAY),
            Mistake("sorted twice", _mixture_sorted_twice, _ASTRAY),
            Mistake("the worst", _mixture_of_the_worst, _UNASKED),
            Mistake("detached", _mixture_detached, _DETACHED),
            Mistake("sum detached", _mixture_sum_detached, _SUM_DETACHED),
            Mistake("second detached", _mixture_second_detached, _PART_DETACHED),
            Mistake("sigmoid", _mixture_sigmoid, _WEIGHTS),
            Mistake("in float32", _mixture_rounded, _ROUNDED),
            Mistake("mean in float32", lambda *asked: _mixture_mean(*asked).float(), _DTYPE),
            Mistake("experts from 1 on", _mixture_from_one, _MISSING),
        ),
        run=_run_mixture,
    ),
]
