"""An exercise of chapter 01, the model and its costs: attention within a budget of bytes.

The checker compares the values with the library's attention, and adds up every tensor that is made on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...model.gpt import attend
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


def grouped_attention_stub(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in which query heads share keys, without a copy of the keys for each of them.

    Query head h uses key-value head h // (H / Hkv). The queries are those of the last Tq of the Tk positions, as
    when text is written with a cache.

    Args:
        q: [B, H, Tq, Dh], contiguous.
        k, v: [B, Hkv, Tk, Dh].

    Returns:
        [B, H, Tq, Dh].
    """
    raise NotAttempted


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a group stand below each other, as if they were more queries of one head."""
    batch, heads, new, width = q.shape
    kv_heads, all_ = k.shape[1], k.shape[2]
    folded = q.view(batch, kv_heads, heads // kv_heads * new, width)  # [B, Hkv, G Tq, Dh]
    scores = (folded @ k.mT / math.sqrt(width)).view(batch, heads, new, all_)
    seen = torch.arange(all_) <= torch.arange(all_ - new, all_)[:, None]  # [Tq, Tk]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights.view(batch, kv_heads, -1, all_) @ v).view(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int | None) -> Tensor:
    """Keys and values as many as queries; query i sees `first + i` and what is before. None: everything."""
    scores = q @ k.mT * scale
    if first is not None:
        seen = torch.arange(k.shape[2]) <= first + torch.arange(q.shape[2])[:, None]
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return _plain(q, k, v, q.shape[-1] ** -0.5, k.shape[2] - q.shape[2])


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], group))  # [B, Hkv, G, Tq, Dh] @ [B, Hkv, 1, Dh, Tk]
    scores = grouped @ k[:, :, None].mT * q.shape[-1] ** -0.5
    seen = torch.arange(k.shape[2]) <= torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def _tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
    return _plain(q, k, v, q.shape[-1] ** -0.5, k.shape[2] - q.shape[2])


def _wrong_scale(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    return grouped_attention(q * scale * math.sqrt(q.shape[-1]), k, v)


def _scaled_by_width(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _wrong_scale(q, k, v, (q.shape[1] * q.shape[-1]) ** -0.5)


def _double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q /= math.sqrt(q.shape[-1])
    return grouped_attention(q, k, v)


def _scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q /= math.sqrt(q.shape[-1])
    return _wrong_scale(q, k, v)


def _emptied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v.zero_()
    return torch.zeros_like(q)


def _float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return grouped_attention(q.float(), k.float(), v.float())


def _upper_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return _plain(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), q.shape[-1] ** -0.5, 0)


def _sees_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return _plain(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), q.shape[-1] ** -0.5, None)


_COPIES = (
    "the result is right, and the keys were copied for the query heads that share them; the budget is one k. "
    "(A product that broadcasts over heads copies too: @ expands both sides.) Let the queries of a group be more rows"
)
_CHANGED = "q, k or v was changed in place: the caller still needs it"
_NARROW = "it is computed in a narrower dtype than that of q, which is float64 here: convert nothing"
_ATTENTIONS: dict[str, tuple[Answer, str]] = {
    "tiled": (
        _tiled,
        "heads share the wrong keys: neighbours share, 0 0 1 1, as repeat_interleave does; repeat gives 0 1 0 1",
    ),
    "no scale": (_wrong_scale, "the scores are not divided by the square root of Dh"),
    "scaled by the width": (_scaled_by_width, "the scores are divided by the root of H Dh; a head has Dh numbers"),
    "mask in the upper left": (
        _upper_left,
        "the first query is not the first position: it is number Tk - Tq, and sees all keys up to there",
    ),
    "sees the future": (_sees_all, "the last queries may see every key, and those before them not: there is no mask"),
}


class _Made(TorchDispatchMode):
    """The bytes of all tensors that operations made, however short they lived."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.bytes = 0
        self._seen = [x.untyped_storage() for x in given]  # kept, so that no address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor) and all(x.untyped_storage()._cdata != s._cdata for s in self._seen):
                self._seen.append(x.untyped_storage())
                self.bytes += x.untyped_storage().nbytes()
        return out


def _run_attention(answer: Answer) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(2, heads, tokens, 64, generator=generator, dtype=torch.float64)

    q, k, v = draw(8, 2), draw(2, 48), draw(2, 48)
    want, given = attend(q, k, v), (q.clone(), k.clone(), v.clone())  # before the answer can change them
    with _Made((q, k, v)) as made:
        got = answer(q, k, v)
    if not all(torch.equal(now, before) for now, before in zip((q, k, v), given, strict=True)):
        return _CHANGED
    if not isinstance(got, Tensor) or got.shape != q.shape:
        return f"the result must have the shape of q, {list(q.shape)}"
    error = (got.double() - want).abs().max()
    if got.dtype != q.dtype or 1e-9 < error < 1e-5:
        return _NARROW
    if not torch.allclose(got, want, rtol=1e-9, atol=1e-12):
        for wrong, hint in _ATTENTIONS.values():
            if torch.allclose(got, wrong(q, k, v), rtol=1e-9, atol=1e-12):
                return hint
        return f"the result differs from the library's attention by up to {error:.1e}"
    return None if made.bytes <= k.nbytes else _COPIES


EXERCISES = [
    Exercise(
        id="01.grouped_attention",
        title="Shared keys without copies",
        task="Write grouped-query attention for the last Tq of Tk positions. Budget: all tensors that are made on the "
        "way, the result included, have no more bytes than k.",
        stub=grouped_attention_stub,
        reference=grouped_attention,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _ATTENTIONS.items()),
            Mistake("scaled in place, and again", _double, _CHANGED),
            Mistake("scaled in place", _scaled_in_place, _CHANGED),
            Mistake("emptied", _emptied, _CHANGED),
            Mistake("float32", _float32, _NARROW),
            Mistake("float32, widened again", lambda q, k, v: _float32(q, k, v).double(), _NARROW),
            Mistake("repeated", _repeated, _COPIES),
            Mistake("broadcast", _broadcast, _COPIES),
        ),
        run=_run_attention,
    ),
]
