"""Tokens are made once, found again, and made again when the file on disk is not what was written."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from picotron_mini.config import DataConfig, UserError
from picotron_mini.data import cache
from picotron_mini.data.cache import Prepared, prepare
from picotron_mini.data.corpus import load_corpus, split_documents
from picotron_mini.data.tokenizer import train_bpe


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text("".join(f"{i} and {j}, né\n" for j in range(20 + i)))
    return DataConfig(text=(str(folder),), tokenizer="bpe", tokenizer_size=300, val_fraction=0.2)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were built, in order."""
    made: list[Path] = []
    build = cache._build
    monkeypatch.setattr(cache, "_build", lambda folder, *rest: (made.append(folder), build(folder, *rest))[1])
    return made


def test_what_is_stored(data: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(data, tmp_path / "cache")
    tokenizer = prepared.load_tokenizer()
    assert (prepared.vocab_size, prepared.end) == (tokenizer.vocab_size, tokenizer.end) == (300, 299)
    assert tokenizer.sha256() == prepared.tokenizer_sha256
    assert prepared.train_bytes + prepared.val_bytes == prepared.text_bytes
    assert prepared.train_documents + prepared.val_documents == 30
    for split in ("train", "val"):
        stream = prepared.tokens(split)
        assert isinstance(stream, np.memmap) and stream.dtype == np.uint16 and not stream.flags.writeable
        assert len(stream) == getattr(prepared, f"{split}_tokens")
        assert (stream == prepared.end).sum() == getattr(prepared, f"{split}_documents")
        assert tokenizer.token_bytes()[stream].sum() == getattr(prepared, f"{split}_bytes")
    texts = tokenizer.decode(prepared.tokens("val")).split("<|endoftext|>")[:-1]
    assert all(text in [p.read_text() for p in Path(data.text[0]).iterdir()] for text in texts)


def test_second_call_finds_it(data: DataConfig, tmp_path: Path, builds: list[Path]) -> None:
    first = prepare(data, tmp_path / "cache")
    Path(data.text[0]).rename(tmp_path / "moved")  # the same text from elsewhere
    moved = replace(data, text=(str(tmp_path / "moved"),))
    assert prepare(moved, tmp_path / "cache") == replace(first, source=str(tmp_path / "moved"))
    assert len(builds) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(first.folder).name]


@pytest.mark.parametrize("change", ["val_seed", "val_fraction", "tokenizer", "tokenizer_size", "text"])
def test_whatever_decides_the_tokens_is_in_the_key(
    data: DataConfig, tmp_path: Path, builds: list[Path], change: str
) -> None:
    first = prepare(data, tmp_path / "cache")
    changes = {"val_seed": 1, "val_fraction": 0.3, "tokenizer": "bytes", "tokenizer_size": 290}
    if change in changes:
        data = replace(data, **{change: changes[change]})
    if change == "text":
        (Path(data.text[0]) / "00.txt").write_text("another text\n")
    other = prepare(data, tmp_path / "cache")
    assert len(builds) == 2 and other.folder != first.folder and other.files != first.files


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer.json", "prepared.json"])
@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "remove"])
def test_damage_is_found_told_and_repaired(
    data: DataConfig, tmp_path: Path, builds: list[Path], name: str, damage: str
) -> None:
    first = prepare(data, tmp_path / "cache")
    path = Path(first.folder) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip a bit" else path.read_bytes()[:-3])
    if damage == "remove":
        path.unlink()
    with pytest.warns(RuntimeWarning, match=rf"{Path(first.folder).name} are damaged .*building them again"):
        assert prepare(data, tmp_path / "cache") == first
    assert len(builds) == 2
    assert prepare(data, tmp_path / "cache") == first
    assert len(builds) == 2


def test_a_number_that_was_edited_is_damage_too(data: DataConfig, tmp_path: Path) -> None:
    first = prepare(data, tmp_path / "cache")
    record = Path(first.folder) / "prepared.json"
    record.write_text(record.read_text().replace('"end": 299', '"end": 298'))
    with pytest.warns(RuntimeWarning, match=r"prepared\.json has changed"):
        assert prepare(data, tmp_path / "cache") == first


def test_bpe_is_trained_on_the_training_documents_only(data: DataConfig, tmp_path: Path) -> None:
    train, val = split_documents(load_corpus(data.text), data.val_fraction, 0)
    digest = prepare(data, tmp_path / "cache").tokenizer_sha256
    assert digest == train_bpe(train.documents, 300).sha256()
    assert digest != train_bpe(train.documents + val.documents, 300).sha256()


def test_folder_that_is_a_file_is_replaced_with_words(data: DataConfig, tmp_path: Path) -> None:
    first = prepare(data, tmp_path / "cache")
    with pytest.raises(UserError, match=r"cannot use .* for the tokens"):
        prepare(data, Path(first.folder) / "train.npy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_told(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot use .*Permission denied"):
        prepare(data, tmp_path / "locked" / "cache")


def test_nothing_half_made_is_left(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", stop)
        prepare(data, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    prepare(data, tmp_path / "cache")


def test_two_processes_at_once_end_with_one_folder(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def other_was_faster(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        winner = prepare(data, tmp_path / "cache2")
        Path(winner.folder).rename(target)
        return rename(self, target)  # fails: the folder is there and not empty

    monkeypatch.setattr(Path, "rename", other_was_faster)
    prepared = prepare(data, tmp_path / "cache")
    assert Path(prepared.folder).parent == tmp_path / "cache"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(prepared.folder).name]


def test_progress_reaches_the_end(data: DataConfig, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    prepared: Prepared = prepare(data, tmp_path / "cache", lambda *what: said.append(what))
    assert said[0] == ("training the tokenizer", 0, prepared.text_bytes)
    assert said[-1] == ("tokenising", prepared.text_bytes, prepared.text_bytes)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)


def test_any_tokenizer_file(data: DataConfig, tmp_path: Path) -> None:
    trained = prepare(data, tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = prepare(replace(data, tokenizer=f"{trained.folder}/tokenizer.json"), tmp_path / "cache")
    assert named.files == trained.files and named.folder != trained.folder
    with pytest.raises(UserError, match="'nothing' does not exist"):
        prepare(replace(data, tokenizer="nothing"), tmp_path / "cache")


def test_large_vocabularies_need_four_bytes(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = cache.byte_tokenizer()
    big.vocab_size = (1 << 16) + 1
    monkeypatch.setattr(cache, "byte_tokenizer", lambda: big)
    assert prepare(replace(data, tokenizer="bytes"), tmp_path / "cache").tokens("val").dtype == np.uint32
