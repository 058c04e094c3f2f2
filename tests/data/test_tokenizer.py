"""Tokenizers: exact round trips, the bytes each id stands for, one path for saving and loading."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from picotron_mini.config import ConfigError, UserError
from picotron_mini.data import tokenizer as module
from picotron_mini.data.tokenizer import END, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

TEXTS = [Path(module.__file__).read_text(), "naïve café, 東京 and 🙂\n" * 20, "def f(x):\n    return x + 1\n" * 30]
TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": train_bpe(TEXTS, 400)}

both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


@both
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end for i in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_bytes_are_ids() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    assert tokenizer.encode("aé\0") == list("aé\0".encode())
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    assert tokenizer.token_bytes().dtype == np.int64


def test_bpe_has_the_size_asked_for_and_shortens_text() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert (tokenizer.vocab_size, tokenizer.end) == (400, 399)
    assert len(tokenizer.encode(TEXTS[0])) < 0.7 * len(TEXTS[0].encode())


def test_bpe_trained_twice_is_identical() -> None:
    assert train_bpe(list(TEXTS), 400).sha256() == TOKENIZERS["bpe"].sha256()
    assert train_bpe(TEXTS[:1], 400).sha256() != TOKENIZERS["bpe"].sha256()


def test_bpe_of_a_short_text_has_fewer_entries() -> None:
    assert 257 <= train_bpe(["abab abab abab"], 4096).vocab_size < 300


def test_bpe_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_size=100.*at least 257"):
        train_bpe(TEXTS, 100)


@both
def test_end_token_written_in_a_text_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        ids = one.encode(f"a{END}b")
        assert one.end not in ids
        assert one.end not in next(one.encode_many([f"a{END}b"]))
        assert one.decode(ids) == f"a{END}b"
        assert one.decode([one.end]) == END


@both
def test_many_documents_encode_as_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, "", "x"]
    many = list(tokenizer.encode_many(iter(texts)))
    assert [ids.tolist() for ids in many] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in many} == {np.dtype(np.uint32)}


@both
def test_long_documents_are_encoded_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 50)
    texts = ["short", TEXTS[0], "x" * 175, "", TEXTS[1]]
    many = list(tokenizer.encode_many(texts))
    assert [tokenizer.decode(ids) for ids in many] == texts
    assert max(len(piece) for text in texts for piece, _ in module._pieces(text)) == 50


@both
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.save(tmp_path).name == "tokenizer.json"
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = load_tokenizer(path)
        assert (again.vocab_size, again.end, again.sha256()) == (
            tokenizer.vocab_size,
            tokenizer.end,
            tokenizer.sha256(),
        )
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_lone_surrogate_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        byte_tokenizer().encode("a\ud800")


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gpt2' does not exist; write 'bytes', 'bpe'"):
        load_tokenizer("gpt2")
    with pytest.raises(UserError, match=r"tokenizer\.json' does not exist"):
        load_tokenizer(tmp_path)
    for content in (b"{}", b"\xff\xfe not json", b'{"version": "1.0", "model": {"type": "BPE"'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json' cannot be read.*must be the tokenizer\.json"):
            load_tokenizer(tmp_path)


def word_tokenizer(folder: Path, words: dict[str, int], special: str | None = None) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    if special:
        backend.add_special_tokens([special])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_foreign_file_ends_documents_its_own_way(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "▁the": 1, "##ing": 2, "<0x0A>": 3, "naïve": 4, "a": 5}
    plain = load_tokenizer(word_tokenizer(tmp_path, words))
    assert (plain.vocab_size, plain.end) == (7, 6)  # an end token was added
    assert plain.token_bytes().tolist() == [5, 4, 3, 1, 6, 1, 0]
    assert plain.encode("a a a naïve") == [5, 5, 5, 4]  # no truncation, no padding

    usual = load_tokenizer(word_tokenizer(tmp_path, words, "</s>"))
    assert usual.end == 6 and usual.decode([usual.end]) == "</s>"

    for value in ("naïve", {"content": "naïve"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(tmp_path).end == 4


def test_ids_may_have_gaps_but_then_the_file_must_name_its_end(tmp_path: Path) -> None:
    file = word_tokenizer(tmp_path, {"[UNK]": 0, "a": 3, "</s>": 7})
    tokenizer = load_tokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.end) == (8, 7)
    assert tokenizer.token_bytes().tolist() == [5, 0, 0, 1, 0, 0, 0, 0]
    # `tokenizers` numbers an added token by how many there are, here 2: it would get an id that is taken.
    with pytest.raises(UserError, match=r"names no token that ends a text.*eos_token"):
        load_tokenizer(word_tokenizer(tmp_path, {"[UNK]": 0, "a": 2}))


def test_added_words_count_their_bytes(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(byte_tokenizer().save(tmp_path)))
    backend.add_tokens(["é    é"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("aé    éa")
    assert len(ids) == 3 and tokenizer.token_bytes()[ids].tolist() == [1, 8, 1]
