"""Exercises of chapter 02, the data pipeline: where a run stands, who reads what, and how good a model is.

A batch is a pure function of (seed, n). So one number says where a run stands, and a rank finds its rows by arithmetic.
The checkers join what an answer gives, over micro-batches, ranks and restarts, and compare with the text read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...config import MeshShape
from ...data.loader import data_rows, row_order
from ...data.tokenizer import byte_tokenizer, train_bpe
from ...launch import launch
from ...mesh import Mesh
from ..exercises import Exercise, Mistake, NotAttempted
from ..tiny_text import tiny_loader

Answer = Callable[..., Any]
Hinted = dict[str, tuple[Answer, str]]  # name of a mistake -> the wrong answer, and what to say to it


def _mistakes(hinted: Hinted) -> tuple[Mistake, ...]:
    return tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in hinted.items())


# --- 1: from perplexity to bits per byte ------------------------------------------------------------------


def bits_per_byte_stub(perplexity: float, tokens: int, text: str) -> float:
    """How many bits a byte of text costs.

    Args:
        perplexity: e to the mean loss over `tokens` tokens.
        tokens: how many tokens were predicted.
        text: what they stand for.
    """
    raise NotAttempted


def bits_per_byte(perplexity: float, tokens: int, text: str) -> float:
    """The bits of all tokens, over the bytes of all text."""
    return tokens * math.log2(perplexity) / len(text.encode())


_UNITS: Hinted = {
    "bits per token": (
        lambda perplexity, tokens, text: math.log2(perplexity),
        "these are bits a token, which depend on the tokenizer: a longer token costs more bits and says more",
    ),
    "nats": (
        lambda perplexity, tokens, text: tokens * math.log(perplexity) / len(text.encode()),
        "these are nats: the natural logarithm is ln 2 = 0.69 of the one to base 2",
    ),
    "characters": (
        lambda perplexity, tokens, text: tokens * math.log2(perplexity) / len(text),
        "these are bits a character; outside ASCII a character has two to four bytes",
    ),
    "not a logarithm": (
        lambda perplexity, tokens, text: tokens * perplexity / len(text.encode()),
        "perplexity is an exponential: costs add up only as its logarithm",
    ),
    "number of tokens forgotten": (
        lambda perplexity, tokens, text: math.log2(perplexity) / len(text.encode()),
        "these are the bits of one token over the bytes of the whole text: multiply by the number of tokens",
    ),
    "ratio upside down": (
        lambda perplexity, tokens, text: len(text.encode()) * math.log2(perplexity) / tokens,
        "that multiplies by bytes a token, where it should divide by them",
    ),
}


def _run_bits_per_byte(answer: Answer) -> str | None:
    text = "Zoë counts bytes, not letters: 漢字 are six. " * 4
    for tokenizer in (byte_tokenizer(), train_bpe([text], 300)):
        ids = tokenizer.encode(text)
        # a model that knows nothing: each token has probability 1/V, so its perplexity is V
        case = float(tokenizer.vocab_size), len(ids), text
        right = len(ids) * math.log2(tokenizer.vocab_size) / int(tokenizer.token_bytes()[ids].sum())
        got = answer(*case)
        if math.isclose(got, right, rel_tol=1e-9):
            continue
        for wrong, hint in _UNITS.values():
            if math.isclose(got, wrong(*case), rel_tol=1e-9):
                return hint
        sizes = f"{case[1]} tokens for {len(text.encode())} bytes"
        return f"with perplexity {case[0]:g} and {sizes} it is {right:.4f}, not {got:.6g}"
    return None


# --- 2: the position of a run -----------------------------------------------------------------------------


def position_stub(seen: int, batch_size: int, num_rows: int) -> list[tuple[int, int]]:
    """What the next batch holds: for each of its `batch_size` sequences (epoch, place in the order of that epoch).

    Args:
        seen: how many sequences the run has trained on so far, over all restarts; all that a checkpoint has.
        num_rows: rows of the text. Each is used once an epoch; a batch may begin in one epoch and end in the next.
    """
    raise NotAttempted


def position(seen: int, batch_size: int, num_rows: int) -> list[tuple[int, int]]:
    """Quotient and remainder."""
    return [divmod(seen + i, num_rows) for i in range(batch_size)]


_POSITIONS: Hinted = {
    "starts anew": (
        lambda seen, batch_size, num_rows: [(0, i) for i in range(batch_size)],
        "`seen` is not used: after each restart the run reads the same first batches again",
    ),
    "wraps inside the epoch": (
        lambda seen, batch_size, num_rows: [(seen // num_rows, (seen + i) % num_rows) for i in range(batch_size)],
        "the batch that crosses the end of an epoch reads the beginning of the same epoch again: its later sequences "
        "belong to the next one, which has another order",
    ),
    "tail dropped": (
        lambda seen, batch_size, num_rows: [
            divmod(seen + i, num_rows // batch_size * batch_size) for i in range(batch_size)
        ],
        "an epoch ends here with its last whole batch, so some rows are left out of every epoch, and which depends on "
        "batch_size: a run that changes it no longer knows where it is",
    ),
    "counted in batches": (
        lambda seen, batch_size, num_rows: [
            divmod(seen // batch_size * batch_size + i, num_rows) for i in range(batch_size)
        ],
        "the position is rounded to whole batches of today's size; the run has had another batch size before, and some "
        "rows are read twice",
    ),
}
_SIZES = [24] * 3 + [10] * 12 + [7] * 20  # sequences a batch: the run is restarted twice, each time with smaller ones


def _read(answer: Answer, num_rows: int) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for size in _SIZES:
        out += [(int(epoch), int(place)) for epoch, place in answer(len(out), size, num_rows)]
    return out


def _run_position(answer: Answer) -> str | None:
    with tiny_loader(seq_len=16, batch_size=1) as text:
        got = _read(answer, text.num_rows)
        num_rows = text.num_rows
        want = [int(text.rows(n)[0]) for n in range(sum(_SIZES))]  # batches of one, read without a stop
    if [int(row_order(0, epoch, num_rows)[place]) for epoch, place in got if place < num_rows] == want:
        return None
    for wrong, hint in _POSITIONS.values():
        if got == _read(wrong, num_rows):
            return hint
    if len(got) != len(want):
        return f"{len(want)} sequences were asked for in all, and {len(got)} came"
    at = next(i for i in range(len(want)) if got[i] != divmod(i, num_rows))
    return f"sequence {at} of the run, with {num_rows} rows, is {divmod(at, num_rows)} and not {got[at]}"


# --- 3: the rows of a rank --------------------------------------------------------------------------------


def my_rows_stub(batch_size: int, mesh: Mesh, micro_batches: int, k: int) -> Sequence[int]:
    """Which sequences of the global batch (0 to batch_size - 1) this rank works on in micro-batch k.

    Args:
        batch_size: of the global batch: over all ranks and micro-batches.
        mesh: `mesh["dp"]` and so on, each with `.size` and `.index`; `mesh.rank` among all ranks.
    """
    raise NotAttempted


def my_rows(batch_size: int, mesh: Mesh, micro_batches: int, k: int) -> Sequence[int]:
    """A block of the data rank, cut into blocks of micro-batches; tensor and pipeline ranks do not appear."""
    return range(batch_size)[data_rows(batch_size, mesh["dp"].size, mesh["dp"].index, micro_batches, k)]


def _world_rows(batch_size: int, mesh: Mesh, micro_batches: int, k: int) -> Sequence[int]:
    return range(batch_size)[data_rows(batch_size, mesh.shape.world_size, mesh.rank, micro_batches, k)]


_WORLD = (
    "two ranks of one data rank got different sequences: tensor-parallel ranks and stages share one sequence between "
    "them, so divide by mesh['dp'] and not by all ranks"
)
_GROWS = "a sequence is outside the global batch: batch_size is that of all data ranks together, not of each"
_ALL = "two data ranks work on the same sequence: the batch must be divided among them"
_REPEATED = "two micro-batches of a rank hold the same sequence: its share must be divided among them"
_MISSING = "some sequences of the batch are on no rank"
# dp=2,tp=2 as a person has it who tests; stages beside data; data alone
_CASES = [("dp=2,tp=2", 16, 2), ("dp=2,pp=2", 24, 3), ("dp=4", 8, 1)]


def _rows_on_rank(answer: Answer, shape: MeshShape, batch_size: int, micro_batches: int) -> tuple[int, list[list[int]]]:
    mesh = Mesh.build(shape)
    rows = [[int(i) for i in answer(batch_size, mesh, micro_batches, k)] for k in range(micro_batches)]
    return mesh["dp"].index, rows


def _run_my_rows(answer: Answer) -> str | None:
    for layout, batch_size, micro_batches in _CASES:
        shape = MeshShape.parse(layout)
        arguments = answer, shape, batch_size, micro_batches
        ranks = launch(_rows_on_rank, *arguments, world_size=shape.world_size, timeout=60, output="hide")
        parts = dict(ranks)  # data rank -> its micro-batches
        flat = {index: [i for rows in batches for i in rows] for index, batches in parts.items()}
        everything = [i for rows in flat.values() for i in rows]
        if not set(everything) <= set(range(batch_size)):
            return _GROWS
        if any(batches != parts[index] for index, batches in ranks):
            return _WORLD
        if any(len(rows) > len(set(rows)) for rows in flat.values()):
            return _REPEATED
        if len(everything) > len(set(everything)):
            return _ALL
        if len(everything) < batch_size:
            return _MISSING
        if len({len(rows) for batches in parts.values() for rows in batches}) > 1:
            return "micro-batches have different sizes"
    return None


EXERCISES = [
    Exercise(
        id="02.bits_per_byte",
        title="Perplexity to bits per byte",
        task="Two runs with different tokenizers report their perplexity. Make numbers of them that can be compared.",
        stub=bits_per_byte_stub,
        reference=bits_per_byte,
        mistakes=_mistakes(_UNITS),
        run=_run_bits_per_byte,
    ),
    Exercise(
        id="02.position",
        title="Resume from one number",
        task="A run stops and goes on, now with a smaller batch. Its checkpoint has one number: the sequences that it "
        "has trained on. Say which sequences come next.",
        stub=position_stub,
        reference=position,
        mistakes=_mistakes(_POSITIONS),
        run=_run_position,
    ),
    Exercise(
        id="02.my_rows",
        title="Every layout reads the same batch",
        task="Say which sequences of the global batch a rank works on in a micro-batch, so that for every layout all "
        "ranks together have each of them once. Three layouts of four real ranks decide.",
        stub=my_rows_stub,
        reference=my_rows,
        mistakes=(
            Mistake("rank of the world", _world_rows, _WORLD),
            Mistake(
                "batch of each rank",
                lambda G, mesh, number, k: range(mesh["dp"].index * G + G // number * k, mesh["dp"].index * G + G),
                _GROWS,
            ),
            Mistake("not divided", lambda G, mesh, number, k: range(G)[data_rows(G, 1, 0, number, k)], _ALL),
            Mistake(
                "every micro-batch the same",
                lambda G, mesh, number, k: range(G)[data_rows(G, mesh["dp"].size, mesh["dp"].index)],
                _REPEATED,
            ),
            Mistake(
                "one micro-batch only",
                lambda G, mesh, number, k: range(G)[data_rows(G, mesh["dp"].size, mesh["dp"].index, number, k)][:1],
                _MISSING,
            ),
        ),
        run=_run_my_rows,
    ),
]
