"""Exercise of chapter 02, the data pipeline: pack documents into rows, under a budget.

The library's `pack` puts the whole stream in memory, which is right for a text that fits. Here the text does not: the
answer gets documents one by one and must hand out rows as they are full. The budget is counted while the answer
runs: no padding, one pass, and a limit to the bytes that it holds at once.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ...data.packing import full_rows, pack
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]
END = 256
MEMORY = 64 * 1024  # bytes that an answer may hold at once; the text has 2 MB


def pack_rows_stub(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    """Yield rows of seq_len + 1 tokens, cut from the documents written one after the other, each closed by `end`.

    A row begins with the last token of the row before. The tail that fills no row is left out.

    Args:
        documents: one array of ids after another, uint16 [n]; it can be gone through once.
    """
    raise NotAttempted


def pack_rows(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    """Holds less than a row and one document."""
    held = np.empty(0, dtype=np.uint16)
    for document in documents:
        held = np.concatenate([held, document, np.array([end], dtype=np.uint16)])
        while len(held) > seq_len:
            yield held[: seq_len + 1]
            held = held[seq_len:]


def _all_at_once(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    yield from _windows(pack(documents, end, np.uint16), seq_len, seq_len)


def _windows(stream: np.ndarray, seq_len: int, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(stream) - seq_len, step):
        yield stream[start : start + seq_len + 1]


def _without_overlap(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    held = np.empty(0, dtype=np.uint16)
    for document in documents:
        held = np.concatenate([held, document, np.array([end], dtype=np.uint16)])
        while len(held) > seq_len:
            yield held[: seq_len + 1]
            held = held[seq_len + 1 :]


def _without_end(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    held = np.empty(0, dtype=np.uint16)
    for document in documents:
        held = np.concatenate([held, document])
        while len(held) > seq_len:
            yield held[: seq_len + 1]
            held = held[seq_len:]


def _padded(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    for document in documents:
        closed = np.append(document, np.array([end], dtype=np.uint16))
        short = -(len(closed) - 1) % seq_len
        yield from _windows(np.pad(closed, (0, short), constant_values=end), seq_len, seq_len)


def _cut(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    held = np.empty(0, dtype=np.uint16)
    for document in documents:
        held = np.concatenate([held, document, np.array([end], dtype=np.uint16)])
        if len(held) > seq_len:
            yield held[: seq_len + 1]
            held = held[:0]


def _tails_dropped(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    for document in documents:
        yield from _windows(np.append(document, np.array([end], dtype=np.uint16)), seq_len, seq_len)


def _last_filled(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    stream = pack(documents, end, np.uint16)
    yield from _windows(np.pad(stream, (0, -(len(stream) - 1) % seq_len)), seq_len, seq_len)


def _exact_lost(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    held = np.empty(0, dtype=np.uint16)
    for document in documents:
        held = np.concatenate([held, document, np.array([end], dtype=np.uint16)])
        while len(held) > seq_len + 1:
            yield held[: seq_len + 1]
            held = held[seq_len:]


def _one_array(documents: Iterator[np.ndarray], end: int, seq_len: int) -> Iterator[np.ndarray]:
    row = np.empty(seq_len + 1, dtype=np.uint16)
    for each in pack_rows(documents, end, seq_len):
        row[:] = each
        yield row


_MEMORY = (
    f"right, but not within the budget: more than {MEMORY // 1024} KiB were held at once for a text of 2 MB. Hand out "
    "a row as soon as it is full, and keep only what is left over"
)
_OVERLAP = (
    "a row must begin with the last token of the row before: that token was a target there and has its own target "
    "here. Cut without overlap, one token in every seq_len + 1 is never predicted"
)
_PADDED = "rows are filled up with padding: the end of one document and the beginning of the next belong in one row"
_UNCLOSED = "documents run into each other: each must be closed by the end token"
_DROPPED = "documents do not meet in a row: the tail of each is dropped, and it should begin the next row"
_FILLED = "the last row is filled up with padding: the tail that fills no row is to be left out"
_EXACT = "a stream that fills its last row exactly loses it"
_OVERWRITTEN = "a row is overwritten after it was handed out: who keeps two of them has one twice. Yield a copy"
_LOST = "what is left of a document when a row is full is thrown away; it begins the next row"


def _text(documents: int, longest: int) -> Iterator[np.ndarray]:
    """Bytes of documents of 1 to `longest` tokens; made as they are asked for."""
    generator = np.random.default_rng(0)
    for _ in range(documents):
        yield generator.integers(97, 123, generator.integers(1, longest + 1), dtype=np.uint16)


def _cases() -> list[tuple[list[np.ndarray], int]]:
    """Texts and row lengths; the last text fills its three rows exactly."""
    exact = [np.arange(97, 97 + n, dtype=np.uint16) for n in (4, 3, 3)]
    return [(list(_text(20, 12)), 8), (list(_text(6, 60)), 16), (exact, 4)]


def _rows(answer: Answer, documents: Iterable[np.ndarray], seq_len: int) -> list[list[int]]:
    """The rows as they are when all are there."""
    return [[int(i) for i in row] for row in list(answer(iter(documents), END, seq_len))]


def _rows_one_by_one(answer: Answer, documents: Iterable[np.ndarray], seq_len: int) -> list[list[int]]:
    return [[int(i) for i in row] for row in answer(iter(documents), END, seq_len)]


_WRONG = (
    (_without_overlap, _OVERLAP),
    (_without_end, _UNCLOSED),
    (_padded, _PADDED),
    (_cut, _LOST),
    (_tails_dropped, _DROPPED),
    (_exact_lost, _EXACT),
)


def _run_pack(answer: Answer) -> str | None:
    for text, seq_len in _cases():
        got, want = _rows(answer, text, seq_len), _rows(pack_rows, text, seq_len)
        if got == want:
            continue
        for wrong, hint in _WRONG:
            if got == _rows(wrong, text, seq_len):
                return hint
        if _rows_one_by_one(answer, text, seq_len) == want:
            return _OVERWRITTEN
        if got[:-1] == want and len(got[-1]) == seq_len + 1:
            return _FILLED  # whatever it is filled with
        if any(len(row) != seq_len + 1 for row in got):
            return f"a row must have seq_len + 1 = {seq_len + 1} tokens"
        at = next(
            (i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), min(len(got), len(want))
        )
        return f"{len(want)} rows were expected and {len(got)} came; the first that differs is row {at}"
    held, rows = _most_held(answer)
    stream = sum(len(document) + 1 for document in _text(*_LARGE))
    if rows != full_rows(stream, _LARGE_ROW):
        return f"a text of {stream} tokens fills {full_rows(stream, _LARGE_ROW)} rows of {_LARGE_ROW}, not {rows}"
    return _MEMORY if held > MEMORY else None


_LARGE, _LARGE_ROW = (10_000, 200), 256


def _most_held(answer: Answer) -> tuple[int, int]:
    """The most bytes that were allocated at once while the rows were read one by one, and how many rows there were."""
    next(_text(1, 1))  # what numpy imports at the first random number is not the answer's
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        rows = sum(1 for _ in answer(_text(*_LARGE), END, _LARGE_ROW))
        return tracemalloc.get_traced_memory()[1] - before, rows
    finally:
        tracemalloc.stop()


EXERCISES = [
    Exercise(
        id="02.pack_rows",
        title="Pack without padding, in one pass",
        task="Documents come one by one and are more than fits in memory. Hand out full rows: no padding, one pass, "
        f"and never more than {MEMORY // 1024} KiB held at once for a text of 2 MB.",
        stub=pack_rows_stub,
        reference=pack_rows,
        mistakes=(
            Mistake("all at once", _all_at_once, _MEMORY),
            Mistake(
                "a list first", lambda documents, end, seq_len: pack_rows(iter(list(documents)), end, seq_len), _MEMORY
            ),
            Mistake("no overlap", _without_overlap, _OVERLAP),
            Mistake("padded", _padded, _PADDED),
            Mistake("not closed", _without_end, _UNCLOSED),
            Mistake("cut off", _cut, _LOST),
            Mistake("tails dropped", _tails_dropped, _DROPPED),
            Mistake("last row filled", _last_filled, _FILLED),
            Mistake("exact fit lost", _exact_lost, _EXACT),
            Mistake("one array for all rows", _one_array, _OVERWRITTEN),
        ),
        run=_run_pack,
    ),
]
