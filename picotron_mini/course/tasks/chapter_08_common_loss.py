"""Exercise of chapter 08, an auxiliary loss on ranks: which part of it each of them returns.

It runs on two ranks with unequal numbers of tokens, whose gradients are summed as data parallelism does it; the ledger
counts what they tell each other. What is wrong is read from the gradient, which is E f_e / N for every token:
proportions show which f was taken, and the size by what P was divided.
"""

from __future__ import annotations

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


def _near(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got.double(), want.double(), 1e-9)


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
