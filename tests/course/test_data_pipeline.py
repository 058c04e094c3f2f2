"""What chapter 02 draws and counts, and that its tiny text has what its checks need."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from picotron_mini.course.figures.data import (
    PADDING,
    draw_resumes,
    draw_rows,
    draw_shares,
    packed_rows,
    padded_rows,
)
from picotron_mini.course.figures.picture import Picture
from picotron_mini.course.museum import kill
from picotron_mini.course.tasks.chapter_02_packing import END, MEMORY, _most_held, pack_rows
from picotron_mini.course.tiny_text import DOCUMENTS, tiny_loader
from picotron_mini.data.packing import full_rows, pack, read_rows
from picotron_mini.mesh import Mesh

LENGTHS = [3, 8, 1, 9, 16, 5]


def texts(drawn: Picture) -> list[str]:
    """The letters in a drawing."""
    root = ElementTree.fromstring(drawn._repr_svg_())
    return ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_padded_rows_count_what_the_formula_says() -> None:
    rows = padded_rows(LENGTHS, 8)
    assert len(rows) == sum(math.ceil(n / 8) for n in LENGTHS)
    assert all(len(row) == 8 for row in rows)
    flat = [document for row in rows for document in row]
    assert [flat.count(document) for document in range(len(LENGTHS))] == LENGTHS
    assert flat.count(PADDING) == 8 * len(rows) - sum(LENGTHS)
    assert rows[0] == [0, 0, 0] + [PADDING] * 5
    assert all(len(set(row) - {PADDING}) == 1 for row in rows)  # one document a row


def test_packed_rows_have_no_padding() -> None:
    rows = packed_rows(LENGTHS, 8)
    assert [len(row) for row in rows] == [8] * (sum(LENGTHS) // 8) + [sum(LENGTHS) % 8]
    assert [document for row in rows for document in row] == sorted(document for row in rows for document in row)
    assert rows[0] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_pictures_say_what_they_show() -> None:
    drawn = draw_rows(LENGTHS, 8)
    assert {f"padded: {len(padded_rows(LENGTHS, 8))} rows of 8", "packed: 6 rows of 8"} <= set(texts(drawn))
    assert "fill 6 rows" in repr(drawn)

    shares = draw_shares([5, 21, 15, 18], [(1, 1), (2, 2), (1, 2)])
    found = texts(shares)
    assert [found.count(number) for number in ("5", "21", "15", "18")] == [3] * 4  # in each layout once
    assert {"dp=1, 1 micro-batch", "dp=2, 2 micro-batches", "dp=1, 2 micro-batches"} <= set(found)

    resumes = draw_resumes({"sound": [0, 1, 2], "broken": [0, 1, 1]}, [2])
    assert {"sound", "broken"} <= set(texts(resumes))
    assert "before steps 2. sound: 0, 1, 2; broken: 0, 1, 1" in repr(resumes)


def test_tiny_text_has_short_documents_and_several_epochs_in_a_check() -> None:
    assert len(set(DOCUMENTS)) == len(DOCUMENTS) == 100
    with tiny_loader(16, 12, seed=3) as text:
        assert 12 * 2 < text.num_rows < 12 * 9  # nine batches cross the end of an epoch
        assert text.num_rows % 12
        documents = text.batch(0).documents
        assert int(documents.max()) >= 1
        held = text
    assert held.num_rows  # the files are gone; the numbers are not


@pytest.mark.parametrize("seq_len", [3, 16])
def test_reference_packs_what_the_library_reads(seq_len: int) -> None:
    documents = [np.full(n, 97 + n, dtype=np.uint16) for n in (1, 5, 40, 2, 0, 7)]
    stream = pack(documents, END, np.uint16)
    rows = list(pack_rows(iter(documents), END, seq_len))
    assert len(rows) == full_rows(len(stream), seq_len)
    batch = read_rows(stream, np.arange(len(rows)), seq_len, END)
    assert np.array([row[:-1] for row in rows]).tolist() == batch.tokens.tolist()
    assert np.array([row[1:] for row in rows]).tolist() == batch.targets.tolist()


def test_budget_has_room_for_the_right_answer_and_none_for_the_stream() -> None:
    held, _ = _most_held(pack_rows)
    assert held < MEMORY / 2


def one_loader_twice(mesh: Mesh) -> None:
    with tiny_loader(16, 12) as text:
        assert text.rows(3).tolist() == text.rows(3).tolist()


def begun_again(mesh: Mesh) -> None:
    with tiny_loader(16, 12) as first, tiny_loader(16, 12) as second:
        assert first.rows(0).tolist() == second.rows(0).tolist()


def resumed(stops: list[int]) -> list[list[int]]:
    out = []
    for start, stop in pairwise(stops):
        with tiny_loader(16, 12) as text:
            out += [text.rows(n).tolist() for n in range(start, stop)]
    return out


def without_a_stop(batches: int) -> list[list[int]]:
    with tiny_loader(16, 12) as text:
        return [text.rows(n).tolist() for n in range(batches)]


def one_resume(mesh: Mesh) -> None:
    assert without_a_stop(8) == resumed([0, 4, 8])


def opened_twice_at_one_step(mesh: Mesh) -> None:
    with tiny_loader(16, 12) as first, tiny_loader(16, 12) as second:
        assert first.rows(3).tolist() == second.rows(3).tolist()


def two_resumes(mesh: Mesh) -> None:
    assert without_a_stop(12) == resumed([0, 4, 8, 12])


def two_resumes_beside_a_run_without_a_stop(mesh: Mesh) -> None:
    with tiny_loader(16, 12) as straight:
        for start in (0, 4, 8):
            with tiny_loader(16, 12) as text:
                for n in range(start, start + 4):
                    assert text.rows(n).tolist() == straight.rows(n).tolist()


def a_loader_for_each_batch(mesh: Mesh) -> None:
    assert resumed(list(range(5))) == without_a_stop(4)


@pytest.mark.slow
def test_a_loader_that_counts_is_right_until_it_is_resumed_twice() -> None:
    for test in (one_loader_twice, begun_again, one_resume, opened_twice_at_one_step):
        said = kill("02.resumed_twice", test, record=False)
        assert said.status == "failed" and "the test passes with the bug" in said.hint
    for test in (two_resumes, two_resumes_beside_a_run_without_a_stop, a_loader_for_each_batch):
        assert kill("02.resumed_twice", test, record=False).passed
