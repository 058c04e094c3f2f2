"""Documents of every length in sequences of one length, without padding.

Written one after the other, each closed by an end token, the documents make one long stream. It is cut into
rows of T + 1 tokens that overlap by one, so that every token but the very first is a target exactly once:

    stream   a a a | b b b b b | c c |        ("|" ends a document), T = 4
    row 0    a a a | b                tokens  a a a |     targets  a a | b
    row 1            b b b b b        tokens  b b b b     targets  b b b b
    row 2                    b | c c |        b | c c              | c c |

One document a row, padded to a multiple of T, would waste the end of each last row. With lengths n_i (end token
included) the share of useful positions is

    padded:  sum(n_i) / (T * sum(ceil(n_i / T)))        about n / (n + T/2) for long documents
    packed:  1, less the at most T tokens that do not fill the last row

and a document half as long as a row makes it 50% against 100%, for the same flops.

A token of a row may look at the document before its own. `documents` numbers them inside each row (the end token
belongs to the document it closes), for an attention that forbids it; `positions` count 0..T-1 in the row either
way: rotary positions act only through differences (arXiv 2104.09864), so a document that starts at 17 is no
different from one that starts at 0.

The target of an end token is the first token of the next document. Where attention keeps documents apart, so must the
targets (`apart`): such a target becomes -100. Then a row of packed documents has the loss and the gradients that its
documents have one by one, which is what a mask is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100  # a target that counts for nothing


@dataclass
class Batch:
    """What the model reads. B sequences of T tokens; all int64 [B, T]."""

    tokens: torch.Tensor
    targets: torch.Tensor  # the next token; -100 where there is none
    positions: torch.Tensor  # 0..T-1
    documents: torch.Tensor  # index of the document inside the row, from 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.positions, self.documents))
        return Batch(*moved)


def pack(documents: Iterable[np.ndarray], end: int, dtype: type[np.unsignedinteger] = np.uint32) -> np.ndarray:
    """One stream of all documents, each followed by `end`: [sum(n_i + 1)]."""
    closing = np.array([end], dtype=dtype)
    pieces = [piece for ids in documents for piece in (ids.astype(dtype), closing)]
    return np.concatenate(pieces) if pieces else closing[:0]


def full_rows(tokens: int, seq_len: int) -> int:
    """How many rows of seq_len targets a stream fills."""
    return max(tokens - 1, 0) // seq_len


def read_rows(stream: np.ndarray, rows: np.ndarray, seq_len: int, end: int, apart: bool = False) -> Batch:
    """Rows of a stream by their index; only what they cover is read.

    Args:
        stream: [N] token ids, as `pack` made them; may be a memory map.
        rows: [B] indices. Behind the end of the stream, tokens are `end` and targets -100.
        apart: no target lies in another document than its token; -100 in place of the first token of each.
    """
    at = np.asarray(rows, dtype=np.int64)[:, None] * seq_len + np.arange(seq_len + 1)  # [B, T + 1]
    inside = at < len(stream)
    window = np.where(inside, stream[np.minimum(at, len(stream) - 1)], end).astype(np.int64)  # [B, T + 1]
    tokens, targets = window[:, :-1].copy(), np.where(inside[:, 1:], window[:, 1:], IGNORED)
    ends = tokens == end
    if apart:
        targets[ends] = IGNORED
    documents = np.cumsum(ends, axis=1) - ends  # the end token is still in the document it closes
    positions = np.broadcast_to(np.arange(seq_len), tokens.shape).copy()
    return Batch(*(torch.from_numpy(x) for x in (tokens, targets, positions, documents)))
