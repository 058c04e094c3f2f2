"""Exercise of chapter 08, experts with a capacity: which choices find room.

What is wrong with an answer that is none of the known ones is read from how many rows each expert takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.routing import keep
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


# --- 2: who finds room ------------------------------------------------------------------------------------


def kept_stub(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices find room, if every expert takes `capacity` rows of each sequence.

    Earlier positions come first. A token's experts are distinct, so no two of its choices want the same room.

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


def _kept_one_room(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return keep(experts.flatten(0, 1)[None], num_experts, capacity).view_as(experts)


def _kept_each_choice(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    each = [keep(choice[..., None], num_experts, capacity) for choice in experts.unbind(-1)]
    return torch.cat(each, -1)


def _kept_last(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return keep(experts.flip(1, 2), num_experts, capacity).flip(1, 2)


def _kept_any(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    found = keep(experts, num_experts, capacity)
    return found.any(-1, keepdim=True).expand_as(found)


def _kept_tokens(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    first = torch.arange(experts.shape[1]) < capacity
    return first[None, :, None].expand_as(experts)


def _kept_each_of_k(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return keep(experts, num_experts, capacity * experts.shape[-1])


def _kept_second_first(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return _kept_choices_first(experts.flip(2), num_experts, capacity).flip(2)


def _kept_half(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    found = keep(experts, num_experts, capacity)
    return torch.cat((found[..., :1], found[..., 1:] & found[..., :1]), -1)


def _kept_as_sorted(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    return _sorted_places(experts).lt(capacity).view_as(experts)


def _kept_sorted_twice(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    order = experts.flatten(1).argsort(dim=1, stable=True)
    return _sorted_places(experts).gather(1, order).lt(capacity).view_as(experts)


def _sorted_places(experts: Tensor) -> Tensor:
    """[B, T K]: of the choices sorted by expert, how many of the same expert stand before each."""
    queue = experts.flatten(1).sort(dim=1, stable=True).values
    return torch.arange(queue.shape[1]) - torch.searchsorted(queue, queue)


def _kept_none_of_overfull(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    wanted = F.one_hot(experts, num_experts).sum((1, 2))  # [B, E]
    return wanted.gather(1, experts.flatten(1)).le(capacity).view_as(experts)


_OF_BATCH = (
    "the sequences of the batch share one queue and one room: then what is dropped depends on what else is in the "
    "batch, so on the micro-batch and on the number of ranks; each sequence has a room of its own"
)
_CHOICES_FIRST = (
    "all first choices stand before all second choices: then a later token pushes out an earlier one, and what a token "
    "is computed from depends on the future; earlier positions come first"
)
_ONE_FEWER = (
    "an expert takes one row fewer than it has room for: with the places of its queue counted from 0, a place below "
    "`capacity` finds room"
)
_ONE_MORE = (
    "an expert takes one row more than it has room for: with the places of its queue counted from 0, the place "
    "`capacity` is the first without room"
)
_ALL_OR_NOTHING = "a token loses all its experts when one of them is full; each choice is dropped by itself"
_ANY = "a token keeps all its experts when one of them has room; each choice finds room by itself"
_EACH_CHOICE = (
    "first choices have a room of their own, and second ones another: an expert has one, which counts all choices of a "
    "sequence together"
)
_LAST = "the last ones are kept and the first are dropped: who comes first finds room, and a later one is dropped"
_INVERTED = "these are the choices that are dropped; True is for those that find room"
_SORTED = (
    "these are answers about the choices sorted by expert: put each back where its choice stands, out[order] = found; "
    "the way back is the inverse of the order, not the order once more"
)
_OVERFULL = (
    "an expert that more choices want than it has room for gets none of them; it takes the first `capacity`, and only "
    "later ones are dropped"
)
_TOO_MANY = "an expert takes more rows of a sequence than it has room for, all choices of it counted together"
_TOO_FEW = (
    "a choice is dropped while its expert has room: full is an expert by itself, and not the token or the sequence"
)
_NOT_FIRST = (
    "experts take as many rows as they have room for, and not those that came first: a choice is dropped that stands "
    "before one that is kept"
)

_KEPT: dict[str, tuple[Answer, str]] = {
    "of the batch": (_kept_of_batch, _OF_BATCH),
    "one room for the batch": (_kept_one_room, _OF_BATCH),
    "first choices first": (_kept_choices_first, _CHOICES_FIRST),
    "a room for each choice": (_kept_each_choice, _EACH_CHOICE),
    "all or nothing": (_kept_all_or_nothing, _ALL_OR_NOTHING),
    "any": (_kept_any, _ANY),
    "one fewer": (lambda e, n, c: keep(e, n, c - 1), _ONE_FEWER),
    "one more": (lambda e, n, c: keep(e, n, c + 1), _ONE_MORE),
    "the last": (_kept_last, _LAST),
    "left sorted": (_kept_as_sorted, _SORTED),
    "sorted again": (_kept_sorted_twice, _SORTED),
    "none of the overfull": (_kept_none_of_overfull, _OVERFULL),
    "inverted": (lambda e, n, c: ~keep(e, n, c), _INVERTED),
}


def _run_kept(answer: Answer) -> str | None:
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(3, 8, 5, generator=generator).add(torch.tensor([0.8, 0.4, 0, 0, 0])).topk(2).indices
    got, want = answer(experts.clone(), 5, 3), keep(experts, 5, 3)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"say of each choice whether it finds room: a tensor [B, T, K] = {list(want.shape)} of bool"
    got = got.bool()
    if torch.equal(got, want):
        return None
    known = (hint for wrong, hint in _KEPT.values() if torch.equal(got, wrong(experts, 5, 3)))
    return next(known, None) or _read_kept(got, want, experts)


def _read_kept(got: Tensor, want: Tensor, experts: Tensor) -> str:
    """What is wrong with choices that are none of the known ones, from how many each expert takes."""
    each = F.one_hot(experts, 5)  # [B, T, K, E]
    taken, right = ((each * kept[..., None]).sum((1, 2)) for kept in (got, want))  # [B, E]
    return _TOO_MANY if (taken > right).any() else _TOO_FEW if (taken < right).any() else _NOT_FIRST


EXERCISES = [
    Exercise(
        id="08.kept",
        title="Which choices find room",
        task="Every expert takes so many rows of each sequence, earlier positions first. Say which choices are kept.",
        stub=kept_stub,
        reference=keep,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _KEPT.items()),
            Mistake("the first tokens", _kept_tokens, _TOO_FEW),
            Mistake("second after first", _kept_half, _TOO_FEW),
            Mistake("room for each of K", _kept_each_of_k, _TOO_MANY),
            Mistake("second choices first", _kept_second_first, _NOT_FIRST),
        ),
        run=_run_kept,
    ),
]
