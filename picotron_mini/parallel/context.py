"""Context parallelism: each rank has a part of every sequence. Ring attention: keys and values go round.

All of a decoder but attention works token by token, so a rank with T/cp of the tokens needs nothing of the others.
In attention each query needs the keys and values of every token before it. They go round a ring: each rank
attends with its own queries to the keys that it holds at the moment, while these are already on their way to the next.

    step 0     rank 0: kv0      rank 1: kv1      rank 2: kv2          send on ->, receive from <-, attend, merge
    step 1     rank 0: kv2      rank 1: kv0      rank 2: kv1
    step 2     rank 0: kv1      rank 1: kv2      rank 2: kv0          cp - 1 hops, each beside one step's attention

A step yields an output and its log-sum-exp, from which outputs merge exactly (`attention_kernels.py`).

Under a causal mask not every query sees every key. `chunks.py` deals out the tokens such that no step computes what the
mask would throw away, and all steps are equally long.

**Backward** is a second ring. Each rank's dQ stays; K and V go round again, probabilities are computed again from the
saved log-sum-exp, and dK and dV travel one hop behind their K and V, each rank adding its part, in float32 at least:

    step s:  K, V of j depart ->  |  this rank's part of dK, dV of j  |  + what came from the last rank  -> depart

After cp hops they are home. Nothing of size T x T exists: a block of scores is never wider than a rank's keys.

Documents, where tokens may see their own only, travel with the keys, as ids. Which pairs of chunks need a mask is read
from them. On a GPU that would be waited for, so there every pair is masked.

Cost for each layer and micro-batch, with kv = 2 B (T/cp) Hkv Dh numbers: (cp-1) kv sent forward; (cp-1) kv and cp kv
(in float32 at least) backward, whatever the number of query heads. Attention of C^2 hides a message of C: the longer
the sequence, the better. Activations shrink by cp.

Paper: Ring Attention (arXiv 2310.01889). Head-tail chunks: as in Llama 3 (arXiv 2407.21783), which gathers all keys.
Legend: B batch, H query heads, Hkv key-value heads, T tokens of a sequence, t = T/cp of a rank, Dh width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..collectives import rotate
from ..collectives.operators import operator
from ..mesh import Axis, axis_with_key
from ..model.gpt import GPT, Block
from .attention_kernels import attend_backward, attend_with_lse
from .chunks import calls, masked_calls
from .ulysses import Attend, ulysses_attention


def context_parallel(model: GPT, axis: Axis, how: str) -> None:
    """Replace the attention of every layer by one that sees the sequence of which this rank holds `context_slice`."""
    if axis.size == 1:
        return
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attention.attend = _ring(axis) if how == "ring" else _ulysses(axis, block.attention.attend)


def _ring(axis: Axis) -> Attend:
    return lambda q, k, v, documents: ring_attention(q, k, v, axis, documents)


def _ulysses(axis: Axis, whole: Attend) -> Attend:
    return lambda q, k, v, documents: ulysses_attention(q, k, v, axis, documents, whole)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, axis: Axis, documents: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Softmax attention over the whole sequence, of which each rank of the axis holds two chunks.

    Args:
        q: [B, H, t, Dh], of the positions that `chunks` names.
        k, v: [B, Hkv, t, Dh]; H is a multiple of Hkv.
        documents: [B, t] int64: a token sees its own document only. None: one document.
        causal: a token sees itself and those before it; else all.

    Returns:
        [B, H, t, Dh], in the dtype of q.
    """
    return _RingAttention.apply(q, k, v, documents, axis.key, causal)


class _RingAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, key, causal):  # type: ignore[no-untyped-def]
        out, lse, ids = _ring_forward(q, k, v, documents, key, causal)
        ctx.save_for_backward(q, k, v, out, lse, ids)
        ctx.key, ctx.causal = key, causal
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *_ring_backward(grad, *ctx.saved_tensors, ctx.key, ctx.causal), None, None, None


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, key: str, causal: bool) -> Any:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    ids = q.new_empty(0 if documents is None else (key.count(",") + 1, *documents.shape), dtype=torch.int64)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, ids


@operator(
    "ring_forward(Tensor q, Tensor k, Tensor v, Tensor? documents, str key, bool causal) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _ring_forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, key: str, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Out [B, H, t, Dh], its lse [B, H, t], and for backward the documents in the order in which they came."""
    axis, chunk = axis_with_key(key), q.shape[2] // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    held = [torch.stack([k, v])]  # [2, B, Hkv, t, Dh]: K and V as one message
    held += [] if documents is None else [documents.contiguous()]  # [B, t]
    seen = held[1:]
    for step in range(axis.size):
        coming = [rotate(x, axis) for x in held] if step + 1 < axis.size else []  # on their way while this computes
        for call in calls(axis.index, (axis.index - step) % axis.size, chunk, causal):
            for part, mask in masked_calls(call, chunk, documents, seen[-1] if seen else None):
                rows = (slice(None), slice(None), part.queries)
                found = attend_with_lse(q[rows], *held[0][:, :, :, part.keys], causal=part.causal, mask=mask)
                _merge(out[rows], lse[rows], *found)
        for _, work in coming:
            work.wait()
        held = [buffer for buffer, _ in coming]
        seen += held[1:]
    return out.to(q.dtype), lse, torch.stack(seen) if seen else q.new_empty(0, dtype=torch.int64)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put the attention over more keys into `out` [B, H, Tq, Dh] and `lse` [B, H, Tq], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp()[..., None]).add_(part * (part_lse - total).exp()[..., None])
    lse.copy_(total)


@operator(
    "ring_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor ids, str key, bool causal)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)),
)
def _ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, key: str, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes and dtype."""
    axis, chunk = axis_with_key(key), q.shape[2] // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    kv = torch.stack([k, v])  # [2, B, Hkv, t, Dh]
    home = None  # dK and dV on their way, one hop behind
    for step in range(axis.size):
        coming = rotate(kv, axis) if step + 1 < axis.size else None
        dkv = torch.zeros(kv.shape, dtype=wide, device=kv.device)
        documents = (ids[0], ids[step]) if len(ids) else (None, None)
        for call in calls(axis.index, (axis.index - step) % axis.size, chunk, causal):
            for part, mask in masked_calls(call, chunk, *documents):
                rows, columns = (slice(None), slice(None), part.queries), (slice(None), slice(None), part.keys)
                block = (grad[rows], q[rows], kv[0][columns], kv[1][columns], out[rows], lse[rows])
                for total, more in zip(
                    (dq[rows], dkv[0][columns], dkv[1][columns]),
                    attend_backward(*block, causal=part.causal, mask=mask),
                    strict=True,
                ):
                    total.add_(more)
        if home is not None:
            home[1].wait()
            dkv.add_(home[0])
        home = rotate(dkv, axis)
        if coming is not None:
            coming[1].wait()
            kv = coming[0]
    assert home is not None
    home[1].wait()
    return dq.to(q.dtype), home[0][0].to(k.dtype), home[0][1].to(v.dtype)
