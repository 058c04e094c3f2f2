"""Exercise of chapter 08, an auxiliary loss on ranks: which part of it each of them returns.

It runs on two ranks with unequal numbers of tokens, whose gradients are summed as data parallelism does it; the ledger
counts what they tell each other. What is wrong is read from the gradient, which is E f_e / N for every token:
proportions show which f was taken, and the size by what P was divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...collectives import all_reduce, ledger
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


def _near(got: Tensor, want: Tensor) -> bool:
    """Shares are counts over counts, which torch divides in float32."""
    return got.shape == want.shape and torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-7)


# --- 3: an auxiliary loss on two ranks --------------------------------------------------------------------

RANKS, EXPERTS, K = 2, 6, 3


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


def _auxiliary_of_tokens(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts, axis) * experts.shape[1]


def _auxiliary_counts(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    counts = all_reduce(_own_counts(p, experts), axis)
    return p.shape[1] * (counts * p.sum(0) / (counts.sum() / experts.shape[1])).sum()


def _auxiliary_over_choices(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts, axis) / experts.shape[1]


def _auxiliary_sum(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    counts = all_reduce(_own_counts(p, experts), axis)
    return p.shape[1] * (counts / counts.sum() * p.sum(0)).sum()


def _auxiliary_first_choice(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts[:, :1], axis)


def _auxiliary_mean_of_shares(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    share = all_reduce(_own_counts(p, experts) / experts.numel(), axis) / axis.size
    tokens = all_reduce(torch.tensor(len(p)), axis)
    return p.shape[1] * (share * p.sum(0) / tokens).sum()


def _auxiliary_of_the_chosen(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p * F.one_hot(experts, p.shape[1]).sum(1), experts, axis)


def _auxiliary_averaged(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts, axis) / axis.size


def _auxiliary_whole(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    part = auxiliary(p, experts, axis)
    return part + (all_reduce(part.detach(), axis) - part).detach()


def _auxiliary_squared(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    share = all_reduce(_own_counts(p, experts), axis) / all_reduce(torch.tensor(experts.numel()), axis)
    return p.shape[1] * (share**2 * p.sum(0)).sum() * experts.shape[1] / all_reduce(torch.tensor(experts.numel()), axis)


def _auxiliary_no_experts(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p, experts, axis) / p.shape[1]


def _auxiliary_wide(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    all_reduce(p.detach().sum(0), axis)
    return auxiliary(p, experts, axis)


def _auxiliary_on_one_rank(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    part = auxiliary(p, experts, axis)
    return part if axis.index == 0 else torch.zeros(())


def _auxiliary_square_of_p(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p.square(), experts, axis)


def _auxiliary_square_of_mean(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    counts = all_reduce(_own_counts(p, experts), axis)
    return p.shape[1] * (counts / counts.sum() * p.mean(0).square()).sum()


def _auxiliary_without_choices(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    tokens = all_reduce(torch.tensor(len(p)), axis)
    mean = all_reduce(p.detach().sum(0), axis) / tokens
    return p.shape[1] * (mean * p.sum(0) / tokens).sum()


def _auxiliary_of_logarithms(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
    return auxiliary(p.log(), experts, axis)


_OWN_POOL = (
    "f is the share among this rank's own tokens: the sum of the ranks' losses then asks for balance on each rank, and "
    "depends on how many there are; sum the counts over the ranks first"
)
_FIRST_CHOICE = "f counts the best choice of each token; it is a share of all K choices of all tokens"
_MEAN_OF_SHARES = (
    "f is the mean of the ranks' shares: with unequal numbers of tokens it is not the share of all choices; sum the "
    "counts over the ranks, and divide once"
)
_OTHER_SHARES = (
    "f is none of these experts' shares: f_e is how many of all ranks' N K choices went to expert e, over N K"
)
_OF_THE_CHOSEN = (
    "the gradient differs from token to token: P_e is the mean of p_e over all tokens, also over those that did not "
    "choose e, and only f knows of choices"
)
_TWICE = (
    "p is in the loss twice, and the gradient grows with it: f_e is counted from the choices and has no p in it, and "
    "P_e is the mean of p_e, not of its square nor the square of the mean"
)
_UNEVEN = (
    "the gradient differs from token to token: P_e is the mean over all tokens of p_e as it is, not masked, weighed, "
    "normalised anew or put through a function"
)
_OF_TOKENS = "f is a share of N K choices, not of N tokens: its sum over the experts is 1, and not K"
_COUNTS = "f is a share: divide the counts of choices by the number of all ranks' choices, N K"
_OVER_CHOICES = "P is a mean over N tokens, not over N K choices: its sum over the experts is 1, and not 1 / K"
_SUM = "P is a mean: divide the sum of p by the number of all ranks' tokens"
_MEAN = (
    "f is right, and each rank divides by its own number of tokens: summed over the ranks that is as many times too "
    "much as there are ranks; divide by the number of all tokens"
)
_MEAN_OF_MEANS = "the mean of the ranks' means: with unequal numbers of tokens it is not the mean over all tokens"
_AVERAGED = (
    "the loss was divided or multiplied by the number of ranks: their gradients are summed, and that already is the "
    "gradient of all tokens' mean"
)
_NO_GRADIENT = "no gradient reaches p: all_reduce has none; sum the counts, and leave this rank's p in the graph"
_SOME_RANKS = (
    "a rank's p gets no gradient, and another's does: every rank returns a part, that of its own tokens, since no "
    "other's p is in its graph"
)
_NO_EXPERTS = "the factor E is missing: in perfect balance the loss should be 1"
_OTHER_FACTOR = (
    "f has the right proportions, and a factor is wrong: counts are divided by all ranks' N K choices, the sum of p by "
    "all their N tokens, and the sum over the experts is multiplied by E"
)
_WHOLE = (
    "the gradient is right, and every rank returns the loss of all tokens; it returns its part, and the parts add up"
)
_OTHER_VALUE = "the gradient is right, and the parts do not add up to the loss of all tokens"
_WIDE = "right, and over the budget: only the counts need travel, since the ranks' gradients are summed anyway"


def _auxiliary_case(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    p = torch.randn(6 + 4 * rank, EXPERTS, generator=generator, dtype=torch.float64)
    p[:, 3 * rank : 3 * rank + 3] += 1  # each rank has its favourites
    p = p.softmax(-1)
    return p.requires_grad_(), p.detach().topk(K).indices


def _auxiliary_on_rank(answer: Answer) -> tuple[float, Tensor | None, int]:
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    p, experts = _auxiliary_case(axis.index)
    with ledger.recording() as sent:
        part = answer(p, experts, axis)
        if not isinstance(part, Tensor) or part.numel() != 1:
            raise TypeError("return one number, a tensor: this rank's part of the loss")
        if part.requires_grad:
            part.backward()
    return part.item(), p.grad, sum(sent.values())


def _on_ranks(answer: Answer) -> list[tuple[float, Tensor | None, int]]:
    return launch(_auxiliary_on_rank, answer, world_size=RANKS, timeout=60, output="hide")


def _run_auxiliary(answer: Answer) -> str | None:
    cases = [_auxiliary_case(rank) for rank in range(RANKS)]
    p, experts = torch.cat([p for p, _ in cases]), torch.cat([chosen for _, chosen in cases])
    value = EXPERTS * (_own_counts(p, experts).double() / experts.numel() * p.mean(0)).sum()
    value.backward()
    results = _on_ranks(answer)
    parts, gradients = [part for part, *_ in results], [g for _, g, _ in results if g is not None and g.any()]
    if len(gradients) < RANKS:
        return _SOME_RANKS if gradients else _NO_GRADIENT
    if not all(_near(gradient, own.grad) for gradient, (own, _) in zip(gradients, cases, strict=True)):  # type: ignore[arg-type]
        return _read_shares(gradients, cases) or _read_factor(gradients)
    if not math.isclose(sum(parts), value.item(), rel_tol=1e-5):
        return _WHOLE if all(math.isclose(part, value.item(), rel_tol=1e-5) for part in parts) else _OTHER_VALUE
    return _WIDE if max(sent for *_, sent in results) > 8 * EXPERTS + 8 else None


def _read_shares(gradients: list[Tensor], cases: list[tuple[Tensor, Tensor]]) -> str | None:
    """What is wrong with f, if it is: a token's gradient has its proportions."""
    probabilities, experts = [p.detach() for p, _ in cases], [chosen for _, chosen in cases]
    if not all(_same_for_all_tokens(gradient) for gradient in gradients):
        if all(_same_for_all_tokens(gradient / p) for gradient, p in zip(gradients, probabilities, strict=True)):
            return _TWICE
        unchosen = [F.one_hot(chosen, EXPERTS).sum(1) == 0 for chosen in experts]
        masked = not any(gradient[there].any() for gradient, there in zip(gradients, unchosen, strict=True))
        return _OF_THE_CHOSEN if masked else _UNEVEN
    counts = [F.one_hot(chosen, EXPERTS).sum(0) for chosen in experts]  # of each rank, [K, E]: by choice, best first
    whole, own = torch.stack(counts).sum(0), [each.sum(0) for each in counts]
    of_means = torch.stack([each / each.sum() for each in own]).sum(0)
    sums = [p.sum(0) for p in probabilities]
    all_sums = torch.stack(sums).sum(0)
    for f, hint in (
        ([whole.sum(0)] * RANKS, None),
        (own, _OWN_POOL),
        ([whole[0]] * RANKS, _FIRST_CHOICE),
        ([of_means] * RANKS, _MEAN_OF_SHARES),
        (sums, _TWICE),
        ([all_sums] * RANKS, _TWICE),
        ([whole.sum(0) * each for each in sums], _TWICE),
        ([whole.sum(0) * all_sums] * RANKS, _TWICE),
    ):
        if all(_near(g[0] / g[0].sum(), each / each.sum()) for g, each in zip(gradients, f, strict=True)):
            return hint
    return _OTHER_SHARES


def _same_for_all_tokens(x: Tensor) -> bool:
    return _near(x, x[:1].expand_as(x))


def _read_factor(gradients: list[Tensor]) -> str:
    """What a gradient was multiplied by: with a right f, its sum over the experts is E / N."""
    each = [len(gradient) for gradient in gradients]
    tokens = sum(each)
    found = torch.stack([gradient[0].sum() * tokens / EXPERTS for gradient in gradients])
    for factors, hint in (
        ([tokens / n for n in each], _MEAN),
        ([tokens / n / RANKS for n in each], _MEAN_OF_MEANS),
        ([K] * RANKS, _OF_TOKENS),
        ([tokens * K] * RANKS, _COUNTS),
        ([1 / K] * RANKS, _OVER_CHOICES),
        ([tokens] * RANKS, _SUM),
        ([1 / EXPERTS] * RANKS, _NO_EXPERTS),
        ([RANKS] * RANKS, _AVERAGED),
        ([1 / RANKS] * RANKS, _AVERAGED),
    ):
        if _near(found, torch.tensor(factors, dtype=torch.float64)):
            return hint
    return _OTHER_FACTOR


EXERCISES = [
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
            Mistake("first choices", _auxiliary_first_choice, _FIRST_CHOICE),
            Mistake("mean of shares", _auxiliary_mean_of_shares, _MEAN_OF_SHARES),
            Mistake("squared shares", _auxiliary_squared, _OTHER_SHARES),
            Mistake("of the chosen", _auxiliary_of_the_chosen, _OF_THE_CHOSEN),
            Mistake("squares of p", _auxiliary_square_of_p, _TWICE),
            Mistake("squares of P", _auxiliary_square_of_mean, _TWICE),
            Mistake("P in place of f", _auxiliary_without_choices, _TWICE),
            Mistake("logarithms", _auxiliary_of_logarithms, _UNEVEN),
            Mistake("shares of tokens", _auxiliary_of_tokens, _OF_TOKENS),
            Mistake("counts", _auxiliary_counts, _COUNTS),
            Mistake("over choices", _auxiliary_over_choices, _OVER_CHOICES),
            Mistake("sums", _auxiliary_sum, _SUM),
            Mistake("mean of the rank", _auxiliary_mean, _MEAN),
            Mistake("mean of means", _auxiliary_mean_of_means, _MEAN_OF_MEANS),
            Mistake("without gradient", _auxiliary_without_gradient, _NO_GRADIENT),
            Mistake("on one rank", _auxiliary_on_one_rank, _SOME_RANKS),
            Mistake("without E", _auxiliary_no_experts, _NO_EXPERTS),
            Mistake("averaged", _auxiliary_averaged, _AVERAGED),
            Mistake("its own scale", lambda p, experts, axis: auxiliary(p, experts, axis) * 0.7, _OTHER_FACTOR),
            Mistake("whole on each rank", _auxiliary_whole, _WHOLE),
            Mistake("a constant more", lambda p, experts, axis: auxiliary(p, experts, axis) - 1, _OTHER_VALUE),
            Mistake("over the budget", _auxiliary_wide, _WIDE),
        ),
        run=_run_auxiliary,
    ),
]
