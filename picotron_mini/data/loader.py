"""Batch n of a run as a pure function of (seed, n).

No iterator, no hidden position: `loader.batch(n)` gives the same sequences whatever was asked before. Resuming at
step n is asking for batch n, and no layout can see other data than another, because none of them appears in the
formula. With N rows in the text and G sequences in a global batch,

    i-th sequence of batch n  =  row  order(seed, epoch)[(n * G + i) mod N]     epoch = (n * G + i) div N

The rows of one global batch are divided in blocks, data rank first, then micro-batch:

    G = 8, dp = 2, 2 micro-batches of 2       i = 0 1 | 2 3 || 4 5 | 6 7
                                                  k=0   k=1    k=0   k=1
                                                data rank 0 || data rank 1

so that the union over ranks and micro-batches is the whole batch for every layout (`data_rows`). All tensor-parallel
ranks and all stages of a data rank take the same rows.

Order: rows sorted by a 64-bit mix of their index (the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
It is a bijection, so no two rows tie, and plain integer arithmetic, so no release of any library can change it.
Cost: N log N once an epoch, 8 bytes a row.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from picotron_mini.config import ConfigError, UserError
from picotron_mini.data.cache import Prepared, Split, prepare
from picotron_mini.data.packing import Batch, full_rows, read_rows

__all__ = ["Batch", "Loader", "Prepared", "data_rows", "prepare", "row_order"]


class Loader:
    """Batches of a prepared text.

    With `shuffle`, batches go on for ever, each row once an epoch; the tail that fills no row is left out. Without,
    they run once through the stream in order and cover every token: the last rows are filled up with targets of
    -100, so a validation set of any size works under every layout.

    Attributes:
        num_rows: sequences in the text.
        num_batches: whole batches an epoch, or with `shuffle=False` the batches there are.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: Split,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        *,
        apart: bool = False,
    ) -> None:
        """Open the stream; nothing is read yet.

        Args:
            seq_len: T, tokens of a sequence.
            batch_size: G, sequences of a global batch over all ranks.
            apart: documents do not see each other (`document_mask`), so none has to guess how the next one begins.

        Raises:
            UserError: the text is shorter than one batch (only with `shuffle`).
        """
        self.stream = prepared.tokens(split)
        self.seq_len, self.batch_size, self.seed, self.shuffle = seq_len, batch_size, seed, shuffle
        self._end, self.apart = prepared.end, apart
        if shuffle:
            _check_length(split, len(self.stream), seq_len, batch_size)
            self.num_rows = full_rows(len(self.stream), seq_len)
            self.num_batches = self.num_rows // batch_size
        else:
            self.num_rows = -(-(len(self.stream) - 1) // seq_len)
            self.num_batches = -(-self.num_rows // batch_size)

    def rows(self, n: int, rows: slice | None = None) -> np.ndarray:
        """Which rows of the text batch n holds: int64 [G], or the part of it that `rows` selects.

        Without `shuffle`, indices from `num_rows` on stand for filling.

        Raises:
            IndexError: n below 0, or, without `shuffle`, `num_batches` or more.
        """
        if n < 0 or (not self.shuffle and n >= self.num_batches):
            raise IndexError(f"batch {n} of {self.num_batches}")
        at = np.arange(self.batch_size, dtype=np.int64)[rows or slice(None)] + n * self.batch_size
        if not self.shuffle:
            return at
        chosen = np.empty_like(at)
        for epoch in np.unique(at // self.num_rows):
            here = at // self.num_rows == epoch
            chosen[here] = row_order(self.seed, int(epoch), self.num_rows)[at[here] % self.num_rows]
        return chosen

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """Batch n, or the sequences of it that `rows` selects (see `data_rows`); only those are read.

        Returns:
            [B, T] int64 each, B = number of selected sequences.
        """
        return read_rows(self.stream, self.rows(n, rows), self.seq_len, self._end, self.apart)


@lru_cache(maxsize=4)  # a batch spans two epochs at most, and training and validation alternate
def row_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of range(num_rows), int64 [num_rows], read-only."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little")
    x = np.arange(num_rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(x ^ (x >> np.uint64(31)))
    order.flags.writeable = False
    return order


def data_rows(batch_size: int, dp: int, dp_index: int, micro_batches: int = 1, k: int = 0) -> slice:
    """The sequences of a global batch that micro-batch k of a data rank works on.

    Sequence i goes to data rank i // (G / dp), and there to micro-batch (i % (G / dp)) // micro_batch_size.

    Raises:
        ConfigError: batch_size does not split evenly.
    """
    if batch_size % (dp * micro_batches):
        raise ConfigError(f"batch_size={batch_size} does not split over dp={dp} with micro_batches={micro_batches}")
    size = batch_size // dp // micro_batches
    start = (dp_index * micro_batches + k) * size
    return slice(start, start + size)


def _check_length(split: str, tokens: int, seq_len: int, batch_size: int) -> None:
    needed = batch_size * seq_len + 1
    if tokens >= needed:
        return
    ways = [
        f"{name}<={fits}"
        for name, fits, least in (
            ("batch_size", (tokens - 1) // seq_len, 1),
            ("seq_len", (tokens - 1) // batch_size, 2),
        )
        if fits >= least
    ]
    raise UserError(
        f"the {split} text has {tokens} tokens and one batch needs {needed} (batch_size={batch_size} sequences of "
        f"seq_len={seq_len}, and one more token); use {' or '.join([*ways, 'more text'])}"
    )
