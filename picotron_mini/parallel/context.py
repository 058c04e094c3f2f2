"""Context parallelism: each rank has a part of every sequence. Ring attention: keys and values go round.

All of a decoder but attention works token by token, so a rank with T/cp of the tokens needs nothing of the others.
In attention each query needs the keys and values of every token before it. They go round a ring: each rank
attends with its own queries to the keys that it holds at the moment, while these are already on their way to the next.

    step 0     rank 0: kv0      rank 1: kv1      rank 2: kv2          send on ->, receive from <-, attend, merge
    step 1     rank 0: kv2      rank 1: kv0      rank 2: kv1
    step 2     rank 0: kv1      rank 1: kv2      rank 2: kv0          cp - 1 hops, each beside one step's attention

A step yields an output and its log-sum-exp, from which outputs merge exactly (`attention_kernels.py`).

**Balance.** Under a causal mask the query at position p sees p + 1 keys. With the sequence cut in cp runs, the last
rank computes 2 - 1/cp times the mean, and all wait for it. So it is cut in 2 cp chunks, and rank r holds chunks r and
2cp-1-r: one cheap, one dear, the same sum on all ranks (`work`). With cp = 4:

    chunk   0 1 2 3 4 5 6 7          what rank r computes while it holds the keys of rank j (C = T / 2cp tokens):
    rank    0 1 2 3 3 2 1 0             j = r    its own, causal                               2 C^2
                                        j < r    all its queries, the first chunk of keys      2 C^2, no mask
                                        j > r    its last queries, both chunks of keys         2 C^2, no mask

No step computes what the mask would throw away, and all steps are equally long.

**Backward** is a second ring. Each rank's dQ stays; K and V go round again, probabilities are computed again from the
saved log-sum-exp, and dK and dV travel one hop behind their K and V, each rank adding its part, in float32 at least:

    step s:  K, V of j depart ->  |  this rank's part of dK, dV of j  |  + what came from the last rank  -> depart

After cp hops they are home. Nothing of size T x T exists: a block of scores is never wider than a rank's keys.

**Documents.** Where tokens may see their own document only, the ids travel with the keys. A pair of chunks within one
document needs no mask, one without a document in common is skipped, and only a pair that spans a border gets a mask
[B, 1, C, C]. Telling them apart reads the ids, for which a GPU would have to be waited for: there all pairs are masked.

Cost for each layer and micro-batch, with kv = 2 B (T/cp) Hkv Dh numbers: (cp-1) kv sent forward; (cp-1) kv and cp kv
(in float32 at least) backward, whatever the number of query heads. Attention of C^2 hides a message of C: the longer
the sequence, the better. Activations shrink by cp.

Paper: Ring Attention (arXiv 2310.01889). Head-tail chunks: as in Llama 3 (arXiv 2407.21783), which gathers all keys.
Legend: B batch, H query heads, Hkv key-value heads, T tokens of a sequence, t = T/cp of a rank, Dh width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..collectives import _operator, rotate
from ..data.loader import Batch
from ..mesh import Axis, axis_with_key
from ..model.gpt import GPT, Block
from .attention_kernels import attend_backward, attend_with_lse
from .ulysses import ulysses_attention


def chunks(seq_len: int, cp: int, index: int, how: str = "ring") -> list[slice]:
    """Which positions of a sequence a rank holds, in the order in which it holds them.

    Args:
        how: "ring": chunks r and 2cp-1-r of 2 cp. "ulysses": one run, the r-th of cp.
    """
    parts = [index, 2 * cp - 1 - index] if how == "ring" else [index]
    size = seq_len // (2 * cp if how == "ring" else cp)
    return [slice(part * size, (part + 1) * size) for part in parts]


def context_slice(batch: Batch, axis: Axis, how: str = "ring") -> Batch:
    """This rank's part of whole sequences: tokens, targets, positions and documents, [B, T] -> [B, T/cp] each."""
    if axis.size == 1:
        return batch
    where = chunks(batch.tokens.shape[1], axis.size, axis.index, how)
    parts = (
        torch.cat([x[:, s] for s in where], 1) for x in (batch.tokens, batch.targets, batch.positions, batch.documents)
    )
    return Batch(*parts)


def context_parallel(model: GPT, axis: Axis, how: str) -> None:
    """Replace the attention of every layer by one that sees the sequence of which this rank holds `context_slice`."""
    if axis.size == 1:
        return
    for block in model.layers.values():
        assert isinstance(block, Block)
        whole = block.attention.attend
        block.attention.attend = (
            (lambda q, k, v, documents=None: ring_attention(q, k, v, axis, documents))
            if how == "ring"
            else (lambda q, k, v, documents=None, whole=whole: ulysses_attention(q, k, v, axis, documents, whole))
        )


def work(seq_len: int, cp: int, zigzag: bool = True) -> list[int]:
    """Pairs of a query and a key that each rank multiplies under a causal mask, with and without head-tail chunks."""
    held = [chunks(seq_len, cp, rank, "ring" if zigzag else "ulysses") for rank in range(cp)]
    return [sum(p + 1 for part in parts for p in range(part.start, part.stop)) for parts in held]


class Call(NamedTuple):
    """One call of the attention kernel: which of the rank's queries, which of the keys that it holds."""

    queries: slice
    keys: slice
    causal: bool


def calls(rank: int, source: int, chunk: int, causal: bool) -> list[Call]:
    """What a rank computes while it holds the keys of rank `source`, as in the module's table. `chunk` is in tokens."""
    early, late, both = slice(0, chunk), slice(chunk, 2 * chunk), slice(0, 2 * chunk)
    if source == rank or not causal:
        return [Call(both, both, causal)]
    return [Call(both, early, False) if source < rank else Call(late, both, False)]


def masked_calls(
    call: Call, chunk: int, queries: Tensor | None, keys: Tensor | None
) -> Iterator[tuple[Call, Tensor | None]]:
    """The call with the documents' mask: chunk by chunk, without pairs that have no document in common.

    Args:
        queries, keys: documents of both, [B, 2 C] int64, or None where all may see all.

    Yields:
        A call and its mask, [B, 1, C, C] bool, or None where it needs none.
    """
    if queries is None or keys is None:
        yield call, None
        return
    for start in range(call.queries.start, call.queries.stop, chunk):
        for key in range(call.keys.start, call.keys.stop, chunk):
            if call.causal and key > start:
                continue
            pair = Call(slice(start, start + chunk), slice(key, key + chunk), call.causal and key == start)
            q_ids, k_ids = queries[:, pair.queries], keys[:, pair.keys]
            if not q_ids.is_cuda:
                (q_low, q_high), (k_low, k_high) = q_ids.aminmax(dim=1), k_ids.aminmax(dim=1)  # [B] each
                if ((q_high < k_low) | (k_high < q_low)).all():
                    continue
                if ((q_low == q_high) & (k_low == k_high) & (q_low == k_low)).all():
                    yield pair, None
                    continue
            mask = q_ids[:, None, :, None] == k_ids[:, None, None, :]
            yield pair._replace(causal=False), mask.tril() if pair.causal else mask


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


@_operator(
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
    kv = torch.stack([k, v])  # [2, B, Hkv, t, Dh], one message
    ids = [] if documents is None else [documents.contiguous()]
    for step in range(axis.size):
        coming = []
        if step + 1 < axis.size:  # away with them, while this step computes
            coming = [rotate(x, axis) for x in (kv, *ids[-1:])]
        for call in calls(axis.index, (axis.index - step) % axis.size, chunk, causal):
            for part, mask in masked_calls(call, chunk, documents, ids[-1] if ids else None):
                rows = (slice(None), slice(None), part.queries)
                found = attend_with_lse(q[rows], *kv[:, :, :, part.keys], causal=part.causal, mask=mask)
                _merge(out[rows], lse[rows], *found)
        for buffer, work in coming:
            work.wait()
            if buffer.dtype == torch.int64:
                ids.append(buffer)
            else:
                kv = buffer
    return out.to(q.dtype), lse, torch.stack(ids) if ids else q.new_empty(0, dtype=torch.int64)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put the attention over more keys into `out` [B, H, Tq, Dh] and `lse` [B, H, Tq], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp()[..., None]).add_(part * (part_lse - total).exp()[..., None])
    lse.copy_(total)


@_operator(
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
