"""Ulysses: trade tokens for heads, attend to the whole sequence on a share of the heads, and trade back.

Attention mixes tokens and never heads; all else mixes neither with the other. A rank holds a part of the sequence with
all heads (`context.py`). One all_to_all before attention turns that into the whole sequence with a part of the heads,
and one after it turns it back:

             tokens ->                     tokens ->
    heads    [ r0 | r1 ]   all_to_all    [ r0   r0 ]   any attention   [ r0   r0 ]   all_to_all    [ r0 | r1 ]
             [ r0 | r1 ]  ------------>  [ r1   r1 ]  ------------->   [ r1   r1 ]  ------------>  [ r0 | r1 ]

Between them is ordinary attention, whichever kernel and mask, with every query head beside its key-value head: heads
h .. h + H/cp of the queries read heads h Hkv/H .. of the keys. So cp * tp must divide both numbers of heads, which
bounds cp by the number of *key-value* heads: 8 in many models. The ring has no such bound. All heads cost the same, so
nothing has to be balanced.

Cost for each layer and micro-batch, in payload: B (T/cp) (H + 2 Hkv) Dh numbers before attention and B (T/cp) H Dh
after it, and the same again backward, since the gradient of an all_to_all is the one that goes back (`exchange`). The
more ranks, the smaller: the ring's (cp-1)/cp 2 B T Hkv Dh hardly shrinks. But it is all waited for, nothing hides it.
With masked documents 8 B (T/cp) bytes more: every rank needs all ids. The model's own `attend` makes a mask
[B, 1, T, T] of them, one byte each: for long packed sequences the ring is the better choice.

Paper: DeepSpeed Ulysses (arXiv 2309.14509).
Legend: B batch, H query heads, Hkv key-value heads, T tokens, t = T/cp of a rank, Dh width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives import all_gather, exchange
from ..mesh import Axis

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v, documents, as `model.gpt.attend`


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, documents: Tensor | None, attend: Attend) -> Tensor:
    """Attention over the whole sequence, of which rank r of the axis holds the r-th run of t tokens.

    Args:
        q: [B, H, t, Dh].
        k, v: [B, Hkv, t, Dh]; the axis' size divides H and Hkv (`config.context_problems`).
        documents: [B, t] int64, or None.
        attend: attention on one device, as `model.gpt.attend`.

    Returns:
        [B, H, t, Dh].
    """
    size = axis.size
    # [B, H, t, Dh] -> [B, cp, H/cp, t, Dh]: for each rank its heads of queries, keys and values, in one message
    heads = torch.cat([x.unflatten(1, (size, -1)) for x in (q, k, v)], 2).movedim(1, 0)  # [cp, B, h, t, Dh]
    whole = exchange(heads, axis).movedim(0, 2).flatten(2, 3)  # [B, h, T, Dh], h = (H + 2 Hkv) / cp
    q, k, v = whole.split([x.shape[1] // size for x in (q, k, v)], 1)
    if documents is not None:
        documents = all_gather(documents, axis, 1)  # [B, T]
    out = attend(q, k, v, documents)  # [B, H/cp, T, Dh]
    tokens = out.unflatten(2, (size, -1)).movedim(2, 0)  # [cp, B, H/cp, t, Dh]
    return exchange(tokens, axis).movedim(0, 1).flatten(1, 2)  # [B, H, t, Dh]
