"""Text to token ids and back: bytes, a byte-level BPE trained here, or any `tokenizer.json`.

Both tokenizers made here start from the 256 bytes, so that every text has an encoding and decoding gives it
back exactly. Byte-pair encoding (Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2) then repeats:
find the pair of neighbours that occurs most often, give it an id of its own, replace it everywhere.

    i n t e r n   i n t e r n a l        256 ids, 1 byte a token
    in  t e r n   in  t e r n a l        + "in"
    in  t er n    in  t er n a l         + "er"     fewer tokens a byte, a larger embedding:
    inter n       inter n a l            + ...      V * D weights, and 2 * V * D more flops a token in the head

Training on N bytes costs O(N) a merge at worst; `tokenizers` only touches the words a merge changes.

The last id is the end of a document. A model of bits *per token* looks better the shorter its tokens are, so
runs are compared in bits per byte, for which `token_bytes` says how much text each id stands for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from picotron_mini.config import ConfigError, UserError

END = "<|endoftext|>"
FILE = "tokenizer.json"
# What published tokenizers call the end of a text, tried in this order when no `eos_token` is written beside them.
_END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_BATCH_CHARACTERS = 1_000_000  # encoded at once: `tokenizers` keeps about 100 bytes a token meanwhile


class Tokenizer:
    """One interface over a `tokenizers.Tokenizer`.

    Attributes:
        vocab_size: one more than the largest id.
        end: id of the token that ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end: str = END) -> None:
        # Text is text: "<|endoftext|>" written in a document must not end it, and no template may add tokens.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([end])  # a no-op where the token is there
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.end: int = vocabulary[end]
        self.vocab_size: int = max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end token."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a UTF-16 pair has no bytes
            raise UserError(f"text {text[:40]!r} has a lone surrogate, which UTF-8 cannot write; remove it") from error

    def encode_many(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of many texts, one uint32 array each, on all cores.

        A text of more than a million characters is encoded in pieces that end with a line.
        """
        parts: list[np.ndarray] = []
        for batch in _batches(piece for text in texts for piece in _pieces(text)):
            encodings = self._backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for (_, last), encoding in zip(batch, encodings, strict=True):
                parts.append(np.array(encoding.ids, dtype=np.uint32))
                if last:
                    yield np.concatenate(parts)
                    parts = []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, end tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each id stands for: int64 [V], 0 for special tokens and unused ids.

        Exact for byte-level tokenizers: summed over the ids of a text it gives the bytes of that text. For one
        that normalises (lower case, dropped blanks) it is what decoding gives back.
        """
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if byte_level:  # each byte is written as one printable character
                sizes[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
        for i, added in self._backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    def sha256(self) -> str:
        """Digest of everything that decides how text is encoded."""
        return hashlib.sha256(f"{self.end}\n{self._backend.to_str()}".encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json` and the name of the end token beside it, as Hugging Face does; returns the file."""
        path = Path(folder) / FILE
        self._backend.save(str(path))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._backend.id_to_token(self.end)}
        path.with_name("tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return path


def byte_tokenizer() -> Tokenizer:
    """Id = byte, and 256 ends a document."""
    return Tokenizer(_byte_level({character: byte for byte, character in enumerate(_byte_characters())}, split=False))


def train_bpe(documents: Iterable[str], size: int) -> Tokenizer:
    """Train a byte-level BPE; the same documents give the same tokenizer.

    Args:
        size: entries including the 256 bytes and the end token. Short texts may end up with fewer.

    Raises:
        ConfigError: `size` below 257.
    """
    if size < 257:
        raise ConfigError(f"tokenizer_size={size} is less than the 256 bytes and the end token; use at least 257")
    backend = _byte_level({}, split=True)
    alphabet = sorted(_byte_characters())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((piece for document in documents for piece, _ in _pieces(document)), trainer)
    return Tokenizer(backend)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a `tokenizer.json`, given itself or by its folder (a run's, or a Hugging Face model's).

    The end token is the `eos_token` of a `tokenizer_config.json` beside it, else the first usual name that the
    vocabulary has, else one is added.

    Raises:
        UserError: no such file, one that `tokenizers` cannot read, or one to which no end token can be added.
    """
    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"tokenizer {str(file)!r} does not exist; write 'bytes', 'bpe', or the path of a tokenizer.json of "
            "Hugging Face's"
        )
    settings = file.with_name("tokenizer_config.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        named = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") if settings.is_file() else None
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UserError(
            f"tokenizer {str(file)!r} cannot be read ({error}); it must be the tokenizer.json of Hugging Face's "
            "tokenizers, not a .model or vocab.txt"
        ) from error
    known = backend.get_vocab(with_added_tokens=True)
    named = named.get("content") if isinstance(named, dict) else named
    end = next((name for name in (named, *_END_NAMES) if name in known), END)
    if end not in known and max(known.values()) + 1 != len(known):  # the id that would be given may be taken
        raise UserError(
            f"tokenizer {str(file)!r} names no token that ends a text and its ids have gaps; write one of its "
            f"tokens as eos_token into {settings.name} beside it"
        )
    return Tokenizer(backend, end)


def _byte_level(vocabulary: dict[str, int], split: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, by byte.

    Bytes that Latin-1 prints stand for themselves; the others take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """A text in pieces of at most _BATCH_CHARACTERS, each with whether it is the last."""
    start = 0
    while len(text) - start > _BATCH_CHARACTERS:
        stop = text.rfind("\n", start, start + _BATCH_CHARACTERS) + 1 or start + _BATCH_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
