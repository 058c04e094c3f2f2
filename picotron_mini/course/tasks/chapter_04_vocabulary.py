"""Exercises of chapter 04, tensor parallelism: the loss over a split vocabulary, within a budget.

The ledger of a real run says what was sent. The vocabulary is uneven, some targets do not count, and one of the cases
has logits so large that only the shift by the maximum saves the exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...collectives import all_gather, all_reduce, all_reduce_max, copy_to, gather_from, ledger, reduce_from
from ...launch import RankError
from ...layout import split
from ...mesh import Axis
from ...model.gpt import IGNORE, cross_entropy
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_04 import near, on_ranks

RANKS = 3
VOCABULARY = 11  # 4, 4 and 3 over three ranks
Answer = Callable[..., Any]


def split_loss_stub(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
    """Sum of the cross-entropies of the targets that count, the same on every rank; at most 3 numbers a token are sent.

    Args:
        logits: [T, Vr], the columns [start, stop) of the whole logits [T, V].
        targets: [T] int64, ids of the whole vocabulary, on every rank the same; -100 does not count.
        vocabulary: (start, stop).

    Returns:
        A scalar through which autograd finds this rank's slice of the gradient. There are `reduce_from(x, axis)`,
        a sum that autograd passes, and `all_reduce_max(x, axis)`, a maximum without a gradient.
    """
    raise NotAttempted


def split_loss(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
    """The maximum, the sum of the exponentials and the target's logit: three numbers a token."""
    start, stop = vocabulary
    z = logits - all_reduce_max(logits.detach().amax(-1), axis)[:, None]  # [T, Vr]
    mine = (targets >= start) & (targets < stop)
    index = torch.where(mine, targets - start, 0)
    target = z.gather(-1, index[:, None])[:, 0] * mine
    both = reduce_from(torch.stack([z.exp().sum(-1), target]), axis)  # [2, T]
    return ((both[0].log() - both[1]) * (targets != IGNORE)).sum()


def _gathered(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
    start, stop = vocabulary
    others = all_gather(logits.detach(), axis, -1, VOCABULARY)
    return cross_entropy(torch.cat([others[:, :start], logits, others[:, stop:]], -1), targets)


def _variant(
    shift: str = "global",
    everywhere: bool = False,
    ignore: bool = True,
    again: bool = False,
    unshifted: bool = False,
    plain: bool = False,
) -> Answer:
    def answer(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
        start, stop = vocabulary
        m = logits.detach().amax(-1)
        m = {"global": all_reduce_max(m, axis), "local": m, "none": torch.zeros_like(m)}[shift]
        z = logits - m[:, None]
        mine = (targets >= start) & (targets < stop)
        index = (targets - start).clamp(0, stop - start - 1)
        target = (logits if unshifted else z).gather(-1, index[:, None])[:, 0]
        target = target if everywhere else torch.where(mine, target, 0.0)
        both = torch.stack([z.exp().sum(-1), target])
        both = all_reduce(both, axis) if plain else reduce_from(copy_to(both, axis) if again else both, axis)
        loss = both[0].log() - both[1]
        return (loss * (targets != IGNORE) if ignore else loss).sum()

    return answer


_GATHERS = (
    "more than 3 numbers a token were sent: the logits need not meet, since a sum of exponentials can be taken slice "
    "by slice"
)
_LOSSES: dict[str, tuple[Answer, str]] = {
    "gathered logits": (_gathered, _GATHERS),
    "no shift": (
        _variant(shift="none"),
        "right while logits are small; exp overflows on large ones: subtract the maximum over all ranks first",
    ),
    "each rank's own maximum": (
        _variant(shift="local"),
        "each rank subtracts its own maximum, so the exponentials that are added have different units: all ranks must "
        "subtract the same number",
    ),
    "target on every rank": (
        _variant(everywhere=True),
        "each rank adds a logit for every target, also for those that another rank holds: it must add 0 for them",
    ),
    "target not shifted": (
        _variant(unshifted=True),
        "the target's logit is not shifted by the maximum as the exponentials are: the shift cancels only if it is in "
        "both",
    ),
    "ignored targets counted": (
        _variant(ignore=False),
        "targets of -100 do not count, and here they do",
    ),
    "summed both ways": (
        _variant(again=True),
        "the loss is right, and its gradient is multiplied by the number of ranks: all ranks compute one and the same "
        "loss, so backward nothing is added up",
    ),
    "plain all_reduce": (
        _variant(plain=True),
        "the loss is right, and no gradient comes back through it: all_reduce and all_reduce_max are for values only; "
        "the sum that carries gradients is reduce_from",
    ),
}
# These kill a rank: gloo ends a process that receives another number of bytes than it waits for.
_UNEVEN = (
    "a rank was killed: the ranks handed tensors of different sizes to a collective. The slices of the vocabulary are "
    "uneven, 4, 4 and 3 columns. Neither the logits nor their gradients need to be exchanged: a sum of exponentials "
    "can be taken slice by slice, and each rank's gradient is that of its own slice"
)
_KILLED: dict[str, Answer] = {
    "slices gathered as they are": lambda logits, targets, vocabulary, axis: cross_entropy(
        gather_from(logits, axis, -1), targets
    ),
    "entry for the slices": lambda logits, targets, vocabulary, axis: split_loss(
        copy_to(logits, axis), targets, vocabulary, axis
    ),
}


def _case(scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return logits, torch.tensor([0, 5, IGNORE, 10, 4, IGNORE])


def _budget(targets: Tensor, logits: Tensor) -> int:
    return 3 * targets.numel() * logits.element_size()


def _loss_values(answers: list[Answer], axis: Axis) -> list[list[tuple[Tensor, Tensor | None, int]]]:
    """For each answer and each case: loss, this rank's slice of the gradient, bytes sent."""
    start, stop = split(VOCABULARY, axis.size)[axis.index]
    out = []
    for answer in answers:
        results = []
        for scale in (1.0, 1e3):
            logits, targets = _case(scale)
            mine = logits[:, start:stop].clone().requires_grad_()
            with ledger.recording() as sent:
                try:
                    loss = answer(mine, targets, (start, stop), axis)
                    if loss.requires_grad:
                        loss.backward()
                except Exception:
                    if sum(sent.values()) <= _budget(targets, logits):
                        raise
                    loss = torch.tensor(
                        torch.nan, dtype=logits.dtype
                    )  # what failed had left the budget already: say that
            results.append((loss.detach(), mine.grad, sum(sent.values())))
        out.append(results)
    return out


def _run_split_loss(answer: Answer) -> str | None:
    try:
        got = [rank[0] for rank in on_ranks(_loss_values, [answer], ranks=RANKS)]
    except RankError as error:
        if "killed by SIGABRT" in str(error):
            return _UNEVEN
        raise
    problems = [_judge(rank, results) for rank, results in enumerate(got)]
    if not any(problems):
        return None
    wrong = list(_LOSSES.values())[1:]  # without the one that gathers
    known = on_ranks(_loss_values, [mistake for mistake, _ in wrong], ranks=RANKS)
    for number, (_, hint) in enumerate(wrong):
        if all(_alike(mine, rank[number]) for mine, rank in zip(got, known, strict=True)):
            return hint
    return next(problem for problem in problems if problem)


def _judge(rank: int, results: list[tuple[Tensor, Tensor | None, int]]) -> str | None:
    """What is wrong on one rank, against one device."""
    start, stop = split(VOCABULARY, RANKS)[rank]
    for scale, (loss, gradient, sent) in zip((1.0, 1e3), results, strict=True):
        logits, targets = _case(scale)
        if sent > _budget(targets, logits):
            return _GATHERS
        logits.requires_grad_()
        want = cross_entropy(logits, targets)
        want.backward()
        assert logits.grad is not None
        if not near(loss, want.detach()):
            return f"on rank {rank} the loss is {loss.item():.4f} and should be {want.item():.4f}"
        if not near(gradient, logits.grad[:, start:stop]):
            return f"on rank {rank} the loss is right and the gradient of its slice of the logits is not"
    return None


def _alike(got: list[tuple[Tensor, Tensor | None, int]], known: list[tuple[Tensor, Tensor | None, int]]) -> bool:
    return all(_same(a, b) and _same(x, y) for (a, x, _), (b, y, _) in zip(got, known, strict=True))


def _same(got: Tensor | None, known: Tensor | None) -> bool:
    if got is None or known is None:
        return got is known
    return torch.allclose(got, known, equal_nan=True)


EXERCISES = [
    Exercise(
        id="04.split_loss",
        title="The loss without the logits",
        task="Each rank holds a slice of the vocabulary. Return the loss of one device, its gradient included, and "
        "send at most three numbers a token.",
        stub=split_loss_stub,
        reference=split_loss,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _LOSSES.items())
        + tuple(Mistake(name, wrong, _UNEVEN) for name, wrong in _KILLED.items()),
        run=_run_split_loss,
    ),
]
