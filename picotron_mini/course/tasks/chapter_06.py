"""Exercises of chapter 06, context parallelism: attention from two blocks, and attention that goes round a ring.

The first is judged against attention over all keys, with scores that make careless exponentials overflow. The second
runs on three ranks; the ledger counts what it sends, and a watch over every operator what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...collectives import all_gather, ledger, rotate
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ...parallel.attention_kernels import attend_with_lse
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.largest import Largest

Answer = Callable[..., Any]


def on_ranks(ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """What `fn(*args, axis)` returns on each rank of a context-parallel axis."""
    return launch(_with_axis, fn, args, ranks, world_size=ranks, timeout=60, output="hide")


def _with_axis(fn: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> Any:
    return fn(*args, Mesh.build(MeshShape(cp=ranks))["cp"])


def _near(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


# --- 1: two blocks are one --------------------------------------------------------------------------------


def merge_stub(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over two blocks of them.

    Args:
        out_1, out_2: [B, H, T, Dh], each normalised over the keys of its own block.
        lse_1, lse_2: [B, H, T], logarithm of the block's sum of exponentials; any size, -1e30 where no key was seen.

    Returns:
        Output and log-sum-exp over the keys of both.
    """
    raise NotAttempted


def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Each block weighs what its exponentials are of all exponentials; differences of logarithms do not overflow."""
    lse = torch.logaddexp(lse_1, lse_2)
    return out_1 * (lse_1 - lse).exp()[..., None] + out_2 * (lse_2 - lse).exp()[..., None], lse


def _merge_mean(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    return (out_1 + out_2) / 2, torch.logaddexp(lse_1, lse_2)


def _merge_sum(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    return out_1 + out_2, torch.logaddexp(lse_1, lse_2)


def _merge_overflow(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    w_1, w_2 = lse_1.exp(), lse_2.exp()
    return (out_1 * w_1[..., None] + out_2 * w_2[..., None]) / (w_1 + w_2)[..., None], (w_1 + w_2).log()


def _merge_logs_as_weights(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    total = lse_1 + lse_2
    return out_1 * (lse_1 / total)[..., None] + out_2 * (lse_2 / total)[..., None], total


_MEAN = (
    "the blocks are averaged as if both had the same weight; a block's weight is its share of the sum of exponentials, "
    "exp(lse_1 - lse)"
)
_SUM = (
    "each block is normalised to weight 1 and they are added: the result has weight 2; scale each by exp(lse_i - lse)"
)
_OVERFLOW = (
    "right for small scores, and not a number for large ones: exp(lse) overflows; subtract first, and add the "
    "exponentials with logaddexp"
)
_LOGS = "the log-sum-exps are used as weights themselves; they are logarithms, so take exp of their differences"
_TWO = "return two tensors, the output and its log-sum-exp: without the second, no further block could be merged"
_LSE = "the output is right and the log-sum-exp is not: the next block would be merged with a wrong weight"


def _run_merge(answer: Answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 9, 9))
    for scale, unseen in ((1.0, False), (400.0, False), (1.0, True)):
        parts = [attend_with_lse(scale * q, k[:, :, s], v[:, :, s]) for s in (slice(0, 3), slice(3, 9))]
        want, lse = attend_with_lse(scale * q, k, v)
        if unseen:
            parts[0] = parts[0][0], torch.full_like(lse, -1e30)
            want, lse = parts[1]
        args = (*parts[0], *parts[1])
        got = answer(*(x.clone() for x in args))
        if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(x, Tensor) for x in got):
            return _TWO
        if _near(got[0], want) and _near(got[1], lse):
            continue
        if _near(got[0], want) and not (scale > 1 and not got[1].isfinite().all()):
            return _LSE
        for wrong, hint in ((_merge_mean, _MEAN), (_merge_sum, _SUM), (_merge_logs_as_weights, _LOGS)):
            if _near(got[0], wrong(*args)[0]):
                return hint
        if not got[0].isfinite().all():
            return _OVERFLOW
        return f"an element of the output is off by {(got[0] - want).abs().max():.3f}"
    return None


# --- 2: a ring with a budget ------------------------------------------------------------------------------

RANKS = 3
_SHAPE = (2, 4, 2, 16, 4)  # B, H, Hkv, t, Dh


def ring_stub(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks, without a mask. Forward only.

    `attend_with_lse(q, k, v)` of `parallel.attention_kernels` gives output and log-sum-exp over one block of keys,
    `rotate(x, axis)` of `collectives` a buffer and a work: the buffer is filled after `work.wait()`.

    Args:
        q: [B, H, t, Dh].
        k, v: [B, Hkv, t, Dh].

    Returns:
        [B, H, t, Dh]. Budget for each rank: (cp - 1) times the bytes of its own k and v, and at no time a tensor
        larger than these two together.
    """
    raise NotAttempted


def ring(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """cp - 1 hops, each on its way while attention to what is here is computed."""
    held = torch.stack([k, v])
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -1e30)
    for step in range(axis.size):
        coming = rotate(held, axis) if step + 1 < axis.size else None
        out, lse = merge(out, lse, *attend_with_lse(q, held[0], held[1]))
        if coming is not None:
            coming[1].wait()
            held = coming[0]
    return out


def _ring_gathered(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    return attend_with_lse(q, all_gather(k, axis, 2), all_gather(v, axis, 2))[0]


def _ring_with_a_last_hop(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    held = torch.stack([k, v])
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -1e30)
    for _ in range(axis.size):
        buffer, work = rotate(held, axis)
        out, lse = merge(out, lse, *attend_with_lse(q, held[0], held[1]))
        work.wait()
        held = buffer
    return out


def _ring_of_repeated_heads(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return ring(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), axis)


def _ring_keys_only(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -1e30)
    for step in range(axis.size):
        out, lse = merge(out, lse, *attend_with_lse(q, k, v))
        if step + 1 < axis.size:
            buffer, work = rotate(k, axis)
            work.wait()
            k = buffer
    return out


def _ring_own_keys(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    return attend_with_lse(q, k, v)[0]


def _ring_last_word(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    held = torch.stack([k, v])
    out = torch.zeros_like(q)
    for step in range(axis.size):
        out = out + attend_with_lse(q, held[0], held[1])[0] / axis.size
        if step + 1 < axis.size:
            buffer, work = rotate(held, axis)
            work.wait()
            held = buffer
    return out


def _ring_like(first: bool = True, new_lse: bool = True, hops: int = RANKS - 1, passes_on: bool = True) -> Answer:
    """A ring with a mistake: what `first` is, is merged into; `hops`: how many; `passes_on`: what came, or its own."""

    def answer(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
        own = held = torch.stack([k, v])
        empty = torch.zeros_like(q), q.new_full(q.shape[:3], -1e30)
        out, lse = attend_with_lse(q, k, v) if first else merge(*empty, *attend_with_lse(q, k, v))
        lse = lse if first or new_lse else empty[1]
        for _ in range(hops):
            held, work = rotate(held if passes_on else own, axis)
            work.wait()
            out, merged = merge(out, lse, *attend_with_lse(q, held[0], held[1]))
            lse = merged if new_lse else lse
        return out

    return answer


def _ring_added(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    return axis.size * _ring_last_word(q, k, v, axis)


def _ring_without_waiting(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    held = torch.stack([k, v])
    out, lse = attend_with_lse(q, k, v)
    for _ in range(axis.size - 1):
        held, _ = rotate(held, axis)
        out, lse = merge(out, lse, *attend_with_lse(q, held[0], held[1]))
    return out


_GATHERED = (
    "right, and over the budget of memory: a rank held the keys or values of the whole sequence, or something larger; "
    "let blocks travel and merge what they give"
)
_LAST_HOP = (
    "right, and over the budget of bytes: cp messages where cp - 1 suffice; after the last block nobody needs a hop"
)
_HEADS = (
    "right, and over the budget of bytes: the keys were repeated for every query head before they were sent; the "
    "kernel takes H query heads on Hkv key-value heads as they are"
)
_KEYS_ONLY = "the keys travelled and the values stayed: a query then takes weights from one rank and values of another"
_OWN = "a rank's queries saw the keys of their own rank only"
_ADDED = "the blocks' outputs are added, each of them normalised to weight 1; merge them by their log-sum-exps"
_OLD_LSE = (
    "the log-sum-exp is not updated after a merge: what has been merged weighs as its first block did, and the next "
    "block too much"
)
_FEW = "the queries of a rank have not met the keys of all ranks: one hop too few; with cp ranks there are cp - 1"
_SAME = "each hop passes on the rank's own keys again: what goes to the next rank is what came from the last one"
_UNFILLED = (
    "a buffer is read before it is filled: `rotate` has only started the message, and `work.wait()` returns when it is "
    "here (what you saw was chance)"
)
_AVERAGED = "the blocks' outputs are averaged; merge them by their log-sum-exps"


_RINGS = (
    (_ring_own_keys, _OWN),
    (_ring_keys_only, _KEYS_ONLY),
    (_ring_last_word, _AVERAGED),
    (_ring_added, _ADDED),
    (_ring_like(new_lse=False), _OLD_LSE),
    (_ring_like(first=False, new_lse=False), _OLD_LSE),
    (_ring_like(hops=RANKS - 2), _FEW),
    (_ring_like(passes_on=False), _SAME),
)


def _whole() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch, heads, kv_heads, tokens, width = _SHAPE
    drawn = (
        torch.randn(batch, h, RANKS * tokens, width, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )
    q, k, v = drawn
    return [q, 2 * k, v]


class _Watched:
    """A message under way, and whether it was waited for."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self.work, self.tensor, self.waited = work, tensor, False  # the tensor is kept until the message is through

    def wait(self) -> None:
        self.waited = True
        self.work.wait()


def _own_part(axis: Axis) -> tuple[Tensor, ...]:
    return tuple(x.chunk(axis.size, 2)[axis.index].contiguous() for x in _whole())


def _ring_on_rank(answer: Answer, axis: Axis) -> tuple[Tensor, int, int, bool]:
    """The output, the bytes sent, the elements of the largest tensor, and whether all messages were waited for."""
    own, start, messages = _own_part(axis), dist.batch_isend_irecv, []

    def started(operations: list[Any]) -> list[Any]:
        works = [_Watched(*pair) for pair in zip(start(operations), (p.tensor for p in operations), strict=True)]
        messages.extend(works)
        return works

    dist.batch_isend_irecv = started  # type: ignore[assignment]  # in this rank, which ends after the answer
    with ledger.recording() as sent, Largest() as largest:
        out = answer(*own, axis)
    in_time = all(message.waited for message in messages)
    for message in messages:
        if not message.waited:
            message.wait()
    return out, sum(sent.values()), largest.elements, in_time


def _known_on_rank(answers: list[Answer], axis: Axis) -> list[Tensor]:
    return [answer(*_own_part(axis), axis) for answer in answers]


def _run_ring(answer: Answer) -> str | None:
    results = on_ranks(RANKS, _ring_on_rank, answer)
    q, k, v = _whole()
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if not all(in_time for *_, in_time in results):
        return _UNFILLED
    got = torch.cat([out for out, *_ in results], 2)
    kv = 2 * k.numel() // RANKS
    if not _near(got, want):
        known = on_ranks(RANKS, _known_on_rank, [wrong for wrong, _ in _RINGS])
        for parts, (_, hint) in zip(zip(*known, strict=True), _RINGS, strict=True):
            if _near(got, torch.cat(parts, 2)):
                return hint
        return f"an element of the output is off by {(got - want).abs().max():.3f}"
    sent, largest = max(n for _, n, _, _ in results), max(n for _, _, n, _ in results)
    budget = (RANKS - 1) * kv * k.itemsize
    if sent == budget * q.shape[1] // k.shape[1]:
        return _HEADS
    if sent == budget * RANKS // (RANKS - 1):
        return _LAST_HOP
    if sent > budget:
        return f"right, and over the budget: a rank sent {sent} bytes, where {budget} suffice"
    return _GATHERED if largest > kv else None


EXERCISES = [
    Exercise(
        id="06.merge",
        title="Two blocks are one",
        task="From attention over two blocks of keys, each with its log-sum-exp, compute attention over all of them.",
        stub=merge_stub,
        reference=merge,
        mistakes=(
            Mistake("averaged", _merge_mean, _MEAN),
            Mistake("added", _merge_sum, _SUM),
            Mistake("logarithms as weights", _merge_logs_as_weights, _LOGS),
            Mistake("exponentials first", _merge_overflow, _OVERFLOW),
            Mistake("output alone", lambda o1, l1, o2, l2: merge(o1, l1, o2, l2)[0], _TWO),
            Mistake("larger one kept", lambda o1, l1, o2, l2: (merge(o1, l1, o2, l2)[0], l1.maximum(l2)), _LSE),
        ),
        run=_run_merge,
    ),
    Exercise(
        id="06.ring",
        title="A ring with a budget",
        task="Let this rank's queries attend to the keys of all ranks, with at most (cp - 1) times the bytes of its "
        "own keys and values sent, and never a tensor larger than these.",
        stub=ring_stub,
        reference=ring,
        mistakes=(
            Mistake("gathered", _ring_gathered, _GATHERED),
            Mistake("one hop more", _ring_with_a_last_hop, _LAST_HOP),
            Mistake("heads repeated", _ring_of_repeated_heads, _HEADS),
            Mistake("values stayed", _ring_keys_only, _KEYS_ONLY),
            Mistake("own keys", _ring_own_keys, _OWN),
            Mistake("averaged", _ring_last_word, _AVERAGED),
            Mistake("added", _ring_added, _ADDED),
            Mistake("old log-sum-exp", _ring_like(new_lse=False), _OLD_LSE),
            Mistake("old log-sum-exp, from nothing", _ring_like(first=False, new_lse=False), _OLD_LSE),
            Mistake("one hop too few", _ring_like(hops=RANKS - 2), _FEW),
            Mistake("own keys again", _ring_like(passes_on=False), _SAME),
            Mistake("no wait", _ring_without_waiting, _UNFILLED),
        ),
        run=_run_ring,
    ),
]
