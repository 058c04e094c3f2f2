"""Who holds which tokens of a sequence, and which keys meet which queries: pure functions, no process.

A causal mask makes late queries dear: the one at position p sees p + 1 keys. Cut a sequence in cp runs, and the last
rank computes 2 - 1/cp times the mean, while all wait for it. Cut it in 2 cp chunks, give rank r chunks r and 2cp-1-r,
and each has a cheap one and a dear one, with the same sum (`work`). With cp = 4:

    chunk   0 1 2 3 4 5 6 7          what rank r computes while it holds the keys of rank j (C = T / 2cp tokens):
    rank    0 1 2 3 3 2 1 0             j = r    its own, causal                               2 C^2
                                        j < r    all its queries, the first chunk of keys      2 C^2, no mask
                                        j > r    its last queries, both chunks of keys         2 C^2, no mask

With j < r, chunk j lies before both chunks of the rank and chunk 2cp-1-j behind both; with j > r, both chunks of j lie
between the two of the rank. No pair of chunks is half masked but a chunk and itself. So nothing is computed to be
thrown away, and every step of the ring is equally long on all ranks.

Where tokens may see their own document only, most pairs of chunks are simple as well: within one document they need no
mask, with no document in common they are skipped. Only a pair that spans a border gets a mask [B, 1, C, C].

Legend: B batch, T tokens of a sequence, cp ranks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.loader import Batch
from ..mesh import Axis


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


def work(seq_len: int, cp: int, zigzag: bool = True) -> list[int]:
    """Pairs of a query and a key that each rank multiplies under a causal mask, with and without head-tail chunks."""
    held = [chunks(seq_len, cp, rank, "ring" if zigzag else "ulysses") for rank in range(cp)]
    return [sum(sum(range(part.start + 1, part.stop + 1)) for part in parts) for parts in held]


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
            if q_ids.device.type == "cpu":  # reading them waits for a GPU, and on meta there is nothing to read
                (q_low, q_high), (k_low, k_high) = q_ids.aminmax(dim=1), k_ids.aminmax(dim=1)  # [B] each
                if ((q_high < k_low) | (k_high < q_low)).all():
                    continue
                if ((q_low == q_high) & (k_low == k_high) & (q_low == k_low)).all():
                    yield pair, None
                    continue
            mask = q_ids[:, None, :, None] == k_ids[:, None, None, :]
            yield pair._replace(causal=False), mask.tril() if pair.causal else mask
