"""A text of a few kilobytes, and a loader over it: what the exercises and exhibits of chapter 02 read.

Short documents, all different, so that a row of 16 tokens often holds two or three of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..config import DataConfig
from ..data import loader

DOCUMENTS = tuple(f"{n} squared: {n * n}"[: 3 + 5 * n % 13] for n in range(10, 110))


@contextmanager
def tiny_loader(seq_len: int, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Iterator[loader.Loader]:
    """A `Loader` over the tiny text in bytes; its files are gone after the `with` block."""
    with TemporaryDirectory(prefix="picotron-") as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for n, document in enumerate(DOCUMENTS):
            (folder / "text" / f"{n:03}.txt").write_text(document)
        prepared = loader.prepare(DataConfig(text=(str(folder / "text"),)), folder / "cache")
        yield loader.Loader(prepared, "train", seq_len, batch_size, seed, shuffle)
