"""Reading text: what becomes a document, what is refused, and which documents are held out."""

from pathlib import Path

import pytest

from picotron_mini.config import ConfigError, UserError
from picotron_mini.data.corpus import Corpus, load_corpus, split_documents


def corpus_of(*documents: str) -> Corpus:
    return Corpus(tuple(f"d{i}" for i in range(len(documents))), documents, "test")


def many(count: int = 200) -> Corpus:
    return corpus_of(*(f"document {i}\n" + f"line of {i}\n" * (5 + i % 17) for i in range(count)))


def test_default_is_cpython_itself() -> None:
    corpus = load_corpus()
    assert corpus.total_bytes > 5_000_000
    assert "CPython" in corpus.source or "PyPy" in corpus.source
    assert "topic assert" in corpus.names and "argparse.py" in corpus.names
    folders = {part for name in corpus.names for part in name.split("/")[:-1]}
    assert "asyncio" in folders and not folders & {"test", "tests", "site-packages", "dist-packages"}
    assert len(corpus.names) == len(corpus.documents) == len(set(corpus.documents))


def test_folder_is_read_in_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/photo.png", ".git/config.txt", ".hidden.txt", "__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    corpus = load_corpus((str(tmp_path),))
    assert corpus.documents == ("text of a.md", "text of b.txt", "text of sub/c.py")
    assert corpus.names == tuple(f"{tmp_path.name}/{name}" for name in ("a.md", "b.txt", "sub/c.py"))


def test_file_that_is_named_may_end_in_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_bytes("\ufeffnaïve\r\n".encode())
    assert load_corpus((str(tmp_path / "notes.xyz"),)).documents == ("naïve\r\n",)


def test_blank_and_repeated_documents_are_dropped_and_names_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("one")
    (tmp_path / "d.txt").write_text("two")
    corpus = load_corpus((str(tmp_path),))
    assert corpus.documents == ("one", "two")
    assert corpus.total_bytes == 6
    assert corpus.sha256 == corpus_of("one", "two").sha256
    assert corpus.sha256 not in (corpus_of("two", "one").sha256, corpus_of("on", "etwo").sha256)


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt' does not exist"):
        load_corpus((str(tmp_path / "nowhere.txt"),))


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"the text is empty.*empty\.txt"):
        load_corpus((str(tmp_path / "empty.txt"),))


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"has no text file"):
        load_corpus((str(tmp_path),))


@pytest.mark.parametrize(
    ("data", "where", "likely"),
    [("abc é".encode("latin-1"), "0xe9 at offset 4", "WINDOWS-1252"), ("abc".encode("utf-16"), "offset 0", "UTF-16")],
)
def test_other_encodings_are_refused_with_the_byte(tmp_path: Path, data: bytes, where: str, likely: str) -> None:
    (tmp_path / "old.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"old\.txt is not UTF-8.*{where}.*iconv -f {likely}"):
        load_corpus((str(tmp_path),))


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*secret\.txt: Permission denied"):
        load_corpus((str(tmp_path / "secret.txt"),))


def test_what_is_neither_file_nor_folder_is_refused() -> None:
    with pytest.raises(UserError, match="neither a file nor a folder"):
        load_corpus(("/dev/null",))


def test_split_holds_out_the_share_of_whole_documents() -> None:
    corpus = many()
    train, val = split_documents(corpus, 0.1, seed=3)
    assert not set(train.documents) & set(val.documents)
    assert sorted(train.documents + val.documents) == sorted(corpus.documents)
    assert val.total_bytes / corpus.total_bytes == pytest.approx(0.1, abs=0.01)
    assert [n for n in corpus.names if n in train.names] == list(train.names)  # in the order of the corpus


def test_split_depends_on_text_and_seed_only() -> None:
    corpus = many()
    _, val = split_documents(corpus, 0.1, seed=3)
    turned = Corpus(corpus.names, corpus.documents[::-1], "elsewhere")
    assert set(split_documents(turned, 0.1, seed=3)[1].documents) == set(val.documents)
    assert set(split_documents(corpus, 0.1, seed=4)[1].documents) != set(val.documents)
    more = corpus_of(*corpus.documents, "one more, short\n")
    kept = set(split_documents(more, 0.1, seed=3)[1].documents) & set(val.documents)
    assert len(kept) >= len(val.documents) - 1


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("sizes", [(1,), (1, 1), (1, 1, 1), (1, 50), (50, 1, 1), (3, 4, 5, 6), (1,) * 30])
def test_neither_side_is_ever_empty(fraction: float, sizes: tuple[int, ...]) -> None:
    corpus = corpus_of(*("".join(f"{i} {j}\n" for j in range(40 * size)) for i, size in enumerate(sizes)))
    train, val = split_documents(corpus, fraction)
    assert train.documents and val.documents
    assert all(document.strip() for document in train.documents + val.documents)
    assert train.total_bytes + val.total_bytes == corpus.total_bytes
    assert not set(train.documents) & set(val.documents)
    assert val.total_bytes / corpus.total_bytes > 0.4 * fraction


def test_single_document_is_cut_behind_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    train, val = split_documents(corpus_of(text), 0.1)
    assert train.documents[0] + val.documents[0] == text
    assert train.documents[0].endswith("\n")
    assert len(val.documents[0]) == pytest.approx(0.1 * len(text), abs=10)
    words = " ".join(map(str, range(100)))
    assert split_documents(corpus_of(words), 0.1)[0].documents[0].endswith(" ")
    assert split_documents(corpus_of("x" * 100), 0.1)[1].documents == ("x" * 10,)


def test_a_small_document_beside_a_large_one_is_not_all_of_the_validation() -> None:
    book = "".join(f"line {i}\n" for i in range(10_000))
    _, val = split_documents(corpus_of(book, "a note\n"), 0.05)
    assert val.total_bytes == pytest.approx(0.05 * len(book), rel=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_a_document_larger_than_the_share_is_not_held_out(seed: int) -> None:
    book = "".join(f"line {i}\n" for i in range(1000))
    train, val = split_documents(corpus_of(book, *many().documents), 0.1, seed)
    assert book in train.documents and len(val.documents) > 1


def test_split_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="d0 has 1 bytes: too short"):
        split_documents(corpus_of("x"), 0.5)
    with pytest.raises(ConfigError, match=r"val_fraction=1\.5 must lie between 0 and 1"):
        split_documents(corpus_of("x"), 1.5)
