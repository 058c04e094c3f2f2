"""Exercises of chapter 08, mixtures of experts: route and combine, who finds room, and an auxiliary loss on ranks.

The first counts the rows that experts are given. The last runs on two ranks with unequal numbers of tokens, whose
gradients are summed as data parallelism does it; the ledger counts what they tell each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...collectives import all_reduce, ledger
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ...model.routing import keep
from ..exercises import Exercise, Mistake, NotAttempted

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


def _mixture_averaged(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1.0)
    return mixture(x, torch.where(chosen > 0, 0.0, float("-inf")), experts, top_k)


def _mixture_detached(x: Tensor, logits: Tensor, experts: Sequence[Expert], top_k: int) -> Tensor:
    return mixture(x, logits.detach(), experts, top_k)


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
_BEST_ONLY = "each token passes its best expert only; it has top_k of them"


def _mixture_case(answer: Answer) -> tuple[Tensor, Tensor | None, int]:
    """Output, gradient of the logits, and the number of rows that the experts were given."""
    generator = torch.Generator().manual_seed(0)
    x, logits, gradient, *matrices = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 4), (9, 5), (9, 4), *[(4, 4)] * 5)
    )
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


def _run_mixture(answer: Answer) -> str | None:
    got, gradient, given = _mixture_case(answer)
    want, want_gradient, budget = _mixture_case(mixture)
    if not _near(got, want):
        for wrong, hint in (
            (_mixture_not_divided, _NOT_DIVIDED),
            (_mixture_overwritten, _OVERWRITTEN),
            (_mixture_averaged, _AVERAGED),
            (lambda x, z, experts, k: mixture(x, z, experts, 1), _BEST_ONLY),
        ):
            if _near(got, _mixture_case(wrong)[0]):
                return hint
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return f"the output must be a tensor of shape {tuple(want.shape)}"
        return f"an element of the output is off by {(got - want).abs().max():.3f}"
    assert want_gradient is not None
    if not _near(gradient, want_gradient):
        return _DETACHED
    return _OF_ALL if given > budget else None


# --- 2: who finds room ------------------------------------------------------------------------------------


def kept_stub(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices find room, if every expert takes `capacity` rows of each sequence.

    Earlier positions come first, and of one token its better choices.

    Args:
        experts: [B, T, K] int64, best choice first.

    Returns:
        [B, T, K] bool.
    """
    raise NotAttempted


def _kept_of_batch(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return keep(experts.flatten(0, 1)[None], num_experts, capacity * len(experts)).view_as(experts)


def _kept_choices_first(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    queue = experts.transpose(1, 2).flatten(1)  # [B, K T]: all first choices before all second ones
    first = keep(queue[..., None], num_experts, capacity).squeeze(-1)
    return first.unflatten(1, experts.shape[:0:-1]).transpose(1, 2)


def _kept_all_or_nothing(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    found = keep(experts, num_experts, capacity)
    return found.all(-1, keepdim=True).expand_as(found)


_OF_BATCH = (
    "the sequences of the batch share one queue and one room: then what is dropped depends on what else is in the "
    "batch, so on the micro-batch and on the number of ranks; each sequence has a room of its own"
)
_CHOICES_FIRST = (
    "all first choices stand before all second choices: then a later token pushes out an earlier one, and what a token "
    "is computed from depends on the future; earlier positions come first"
)
_ONE_FEWER = "an expert takes one row fewer than it has room for"
_ALL_OR_NOTHING = "a token loses all its experts when one of them is full; each choice is dropped by itself"


def _run_kept(answer: Answer) -> str | None:
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(3, 8, 5, generator=generator).add(torch.tensor([0.8, 0.4, 0, 0, 0])).topk(2).indices
    got, want = answer(experts.clone(), 5, 3), keep(experts, 5, 3)
    if isinstance(got, Tensor) and got.shape == want.shape and torch.equal(got.bool(), want):
        return None
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"the answer must be a tensor of shape {tuple(want.shape)}"
    for wrong, hint in (
        (_kept_of_batch, _OF_BATCH),
        (_kept_choices_first, _CHOICES_FIRST),
        (_kept_all_or_nothing, _ALL_OR_NOTHING),
        (lambda e, n, c: keep(e, n, c - 1), _ONE_FEWER),
    ):
        if torch.equal(got.bool(), wrong(experts, 5, 3)):
            return hint
    b, t, k = (int(n) for n in (got.bool() != want).nonzero()[0])
    return f"choice {k} of token {t} in sequence {b} {'finds' if want[b, t, k] else 'does not find'} room"


# --- 3: an auxiliary loss on two ranks --------------------------------------------------------------------

RANKS, EXPERTS = 2, 6


def auxiliary_stub(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    """This rank's part of E sum_e f_e P_e over the tokens of all ranks; the ranks' gradients are summed afterwards.

    f_e is the share of all ranks' choices that went to expert e, P_e the mean of its probability over all their tokens.
    `all_reduce(x, axis)` of `collectives` returns the sum over the ranks and has no gradient.

    Args:
        p: [n, E], with a gradient; the ranks may have different n.
        experts: [n, K] int64.

    Returns:
        A scalar. Budget: 8 E + 8 bytes.
    """
    raise NotAttempted


def auxiliary(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    """The counts are summed over ranks; the probabilities need not be, since their sum over ranks is taken later."""
    counts = all_reduce(F.one_hot(experts, p.shape[1]).sum((0, 1)), axis)  # [E]
    choices = counts.sum()
    tokens = choices / experts.shape[1]
    return p.shape[1] * (counts / choices * p.sum(0) / tokens).sum()


def _own_counts(p: Tensor, experts: Tensor) -> Tensor:
    return F.one_hot(experts, p.shape[1]).sum((0, 1))


def _auxiliary_own(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return p.shape[1] * (_own_counts(p, experts) / experts.numel() * p.mean(0)).sum()


def _auxiliary_own_shared(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return _auxiliary_own(p, experts, axis) / axis.size


def _auxiliary_mean(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    counts = all_reduce(_own_counts(p, experts), axis)
    return p.shape[1] * (counts / counts.sum() * p.mean(0)).sum()


def _auxiliary_mean_of_means(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return _auxiliary_mean(p, experts, axis) / axis.size


def _auxiliary_without_gradient(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    counts = all_reduce(_own_counts(p, experts), axis)
    mean = all_reduce(p.detach().sum(0), axis) * experts.shape[1] / counts.sum()
    return p.shape[1] * (counts / counts.sum() * mean).sum()


def _auxiliary_no_experts(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts, axis) / p.shape[1]


def _auxiliary_wide(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    all_reduce(p.detach().sum(0), axis)
    return auxiliary(p, experts, axis)


_OWN_POOL = (
    "f is the share among this rank's own tokens: the sum of the ranks' losses then asks for balance on each rank, and "
    "depends on how many there are; sum the counts over the ranks first"
)
_MEAN = (
    "f is right, and each rank divides by its own number of tokens: summed over the ranks that is as many times too "
    "much as there are ranks; divide by the number of all tokens"
)
_MEAN_OF_MEANS = "the mean of the ranks' means: with unequal numbers of tokens it is not the mean over all tokens"
_NO_GRADIENT = "no gradient reaches p: all_reduce has none; sum the counts, and leave this rank's p in the graph"
_NO_EXPERTS = "the factor E is missing: in perfect balance the loss should be 1"
_WIDE = "right, and over the budget: only the counts need travel, since the ranks' gradients are summed anyway"


def _auxiliary_case(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    p = torch.randn(6 + 4 * rank, EXPERTS, generator=generator, dtype=torch.float64)
    p[:, 3 * rank : 3 * rank + 3] += 1  # each rank has its favourites
    p = p.softmax(-1)
    return p.requires_grad_(), p.detach().topk(2).indices


def _auxiliary_on_rank(answer: Answer) -> tuple[float, Tensor | None, int]:
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    p, experts = _auxiliary_case(axis.index)
    with ledger.recording() as sent:
        part = answer(p, experts, axis)
        if part.requires_grad:
            part.backward()
    return part.item(), p.grad, sum(sent.values())


def _on_ranks(answer: Answer) -> list[tuple[float, Tensor | None, int]]:
    return launch(_auxiliary_on_rank, answer, world_size=RANKS, timeout=60, output="hide")


def _run_auxiliary(answer: Answer) -> str | None:
    cases = [_auxiliary_case(rank) for rank in range(RANKS)]
    p, experts = torch.cat([p for p, _ in cases]), torch.cat([chosen for _, chosen in cases])
    value = EXPERTS * (_own_counts(p, experts) / experts.numel() * p.mean(0)).sum()
    value.backward()
    results = _on_ranks(answer)
    if any(gradient is None for _, gradient, _ in results):
        return _NO_GRADIENT
    same = all(_near(gradient, own.grad) for (_, gradient, _), (own, _) in zip(results, cases, strict=True))  # type: ignore[arg-type]
    if same and abs(sum(part for part, *_ in results) - value.item()) < 1e-9:
        return _WIDE if max(sent for *_, sent in results) > 8 * EXPERTS + 8 else None
    for wrong, hint in (
        (_auxiliary_own, _OWN_POOL),
        (_auxiliary_own_shared, _OWN_POOL),
        (_auxiliary_mean, _MEAN),
        (_auxiliary_mean_of_means, _MEAN_OF_MEANS),
        (_auxiliary_no_experts, _NO_EXPERTS),
    ):
        theirs = _on_ranks(wrong)
        if all(_near(a[1], b[1]) for a, b in zip(results, theirs, strict=True) if b[1] is not None):
            return hint
    return f"the parts sum to {sum(part for part, *_ in results):.4f}, and the loss of all tokens is {value:.4f}"


EXERCISES = [
    Exercise(
        id="08.mixture",
        title="Route and combine",
        task="From logits and the experts as functions of rows, compute the output of a mixture; the experts may be "
        "given at most N top_k rows.",
        stub=mixture_stub,
        reference=mixture,
        mistakes=(
            Mistake("not divided", _mixture_not_divided, _NOT_DIVIDED),
            Mistake("all experts", _mixture_of_all, _OF_ALL),
            Mistake("overwritten", _mixture_overwritten, _OVERWRITTEN),
            Mistake("averaged", _mixture_averaged, _AVERAGED),
            Mistake("detached", _mixture_detached, _DETACHED),
            Mistake("best only", lambda x, z, experts, k: mixture(x, z, experts, 1), _BEST_ONLY),
        ),
        run=_run_mixture,
    ),
    Exercise(
        id="08.kept",
        title="Which choices find room",
        task="Every expert takes so many rows of each sequence, earlier positions first. Say which choices are kept.",
        stub=kept_stub,
        reference=keep,
        mistakes=(
            Mistake("of the batch", _kept_of_batch, _OF_BATCH),
            Mistake("first choices first", _kept_choices_first, _CHOICES_FIRST),
            Mistake("all or nothing", _kept_all_or_nothing, _ALL_OR_NOTHING),
            Mistake("one fewer", lambda e, n, c: keep(e, n, c - 1), _ONE_FEWER),
        ),
        run=_run_kept,
    ),
    Exercise(
        id="08.auxiliary",
        title="An auxiliary loss on two ranks",
        task="Return this rank's part of the auxiliary loss over the tokens of all ranks, with at most 8 E + 8 bytes "
        "sent.",
        stub=auxiliary_stub,
        reference=auxiliary,
        mistakes=(
            Mistake("own pool", _auxiliary_own, _OWN_POOL),
            Mistake("own pool, shared", _auxiliary_own_shared, _OWN_POOL),
            Mistake("mean of the rank", _auxiliary_mean, _MEAN),
            Mistake("mean of means", _auxiliary_mean_of_means, _MEAN_OF_MEANS),
            Mistake("without gradient", _auxiliary_without_gradient, _NO_GRADIENT),
            Mistake("without E", _auxiliary_no_experts, _NO_EXPERTS),
            Mistake("over the budget", _auxiliary_wide, _WIDE),
        ),
        run=_run_auxiliary,
    ),
]
