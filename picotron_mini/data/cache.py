"""Tokenise once, keep the ids on disk, and let every rank map the same file.

    <cache>/<key>/train.npy  val.npy         token ids, uint16 where the vocabulary allows it, else uint32
                  tokenizer.json  tokenizer_config.json
                  prepared.json              counts and digests

`key` is a digest of all that decides the ids: the text, the tokenizer, the share held out and its seed. The
same text and settings find the folder again; a changed file is another key. The folder is written under a
temporary name and renamed, so that a run that is killed leaves nothing half made, and its digests are checked
at each use, so that a flipped bit is found and not learned.

Ranks open the arrays by `numpy` memory map: R ranks of one machine share one copy of the pages in memory
(2 bytes a token with uint16), and a rank reads only the rows it works on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from picotron_mini.config import DataConfig, UserError
from picotron_mini.data.corpus import Corpus, load_corpus, split_documents
from picotron_mini.data.packing import pack
from picotron_mini.data.tokenizer import FILE, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

FORMAT = 1  # of the folder; part of the key
Progress = Callable[[str, int, int], None]  # what is done, bytes of text done, bytes in all
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Prepared:
    """A tokenised text on disk. Small and picklable: what a rank is given."""

    folder: str
    source: str
    text_sha256: str
    text_bytes: int
    tokenizer: str  # "bytes", "bpe" or the path, as configured
    tokenizer_sha256: str
    vocab_size: int
    end: int
    train_documents: int
    val_documents: int
    train_tokens: int  # end tokens included
    val_tokens: int
    train_bytes: int
    val_bytes: int
    files: dict[str, str]  # name -> sha256

    def tokens(self, split: Split) -> np.ndarray:
        """The stream of a split as a read-only memory map: [train_tokens] or [val_tokens], uint16 or uint32."""
        return np.load(Path(self.folder) / f"{split}.npy", mmap_mode="r")

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)


def prepare(data: DataConfig, cache_dir: Path | str, progress: Progress | None = None) -> Prepared:
    """Read, split, tokenise and store a text, or find it done. Call it once, in the parent process.

    A stored folder that is damaged is built again, after a RuntimeWarning that names it.

    Raises:
        UserError: the text or the tokenizer cannot be used, or `cache_dir` cannot be written.
    """
    corpus = load_corpus(data.text)
    if data.tokenizer == "bpe":
        ready = None  # trained below, on the training part only
        identity = f"bpe {data.tokenizer_size} tokenizers-{tokenizers.__version__}"
    else:
        ready = byte_tokenizer() if data.tokenizer == "bytes" else load_tokenizer(data.tokenizer)
        identity = ready.sha256()
    decides = [FORMAT, corpus.sha256, identity, data.val_fraction, data.val_seed]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        if folder.exists():
            try:
                return _open(folder, corpus.source, data.tokenizer)
            except (OSError, ValueError, LookupError, TypeError) as error:
                warnings.warn(f"the tokens in {folder} are damaged ({error}); building them again", RuntimeWarning, 2)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build(partial, corpus, data, ready, progress or (lambda stage, done, total: None))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has just put the same folder there
                raise
        return _open(folder, corpus.source, data.tokenizer)
    except OSError as error:
        raise UserError(f"cannot use {folder} for the tokens: {error}; choose a folder that can be written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, corpus: Corpus, data: DataConfig, ready: Tokenizer | None, progress: Progress) -> None:
    train, val = split_documents(corpus, data.val_fraction, data.val_seed)
    parts = {"train": train, "val": val}
    sizes = {name: part.total_bytes for name, part in parts.items()}
    done, total = 0, sum(sizes.values())

    def told(documents: tuple[str, ...], stage: str) -> Iterator[str]:
        nonlocal done
        for document in documents:
            progress(stage, done, total)
            done += len(document.encode())
            yield document
        progress(stage, done, total)

    if ready is None:
        progress("training the tokenizer", 0, total)
        ready = train_bpe(train.documents, data.tokenizer_size)
    dtype = np.uint16 if ready.vocab_size <= 1 << 16 else np.uint32
    counts = {}
    for name, part in parts.items():
        stream = pack(ready.encode_many(told(part.documents, "tokenising")), ready.end, dtype)
        np.save(folder / f"{name}.npy", stream)
        counts[name] = len(stream)
    ready.save(folder)
    prepared = Prepared(
        folder="",  # is where the file is found
        source=corpus.source,
        text_sha256=corpus.sha256,
        text_bytes=total,
        tokenizer=data.tokenizer,
        tokenizer_sha256=ready.sha256(),
        vocab_size=ready.vocab_size,
        end=ready.end,
        train_documents=len(train.documents),
        val_documents=len(val.documents),
        train_tokens=counts["train"],
        val_tokens=counts["val"],
        train_bytes=sizes["train"],
        val_bytes=sizes["val"],
        files={name: _sha256(folder / name) for name in ("train.npy", "val.npy", FILE, "tokenizer_config.json")},
    )
    values = asdict(prepared)
    record = {"prepared": values, "sha256": hashlib.sha256(json.dumps(values).encode()).hexdigest()}
    (folder / "prepared.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path, source: str, tokenizer: str) -> Prepared:
    """Read a folder back; raises where anything in it is not what was written.

    `source` and `tokenizer` are as this call names them: the same text may have been stored from elsewhere.
    """
    record = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    values = record["prepared"]
    if hashlib.sha256(json.dumps(values).encode()).hexdigest() != record["sha256"]:
        raise ValueError("prepared.json has changed")
    for name, digest in values["files"].items():
        if _sha256(folder / name) != digest:
            raise ValueError(f"{name} has changed")
    return Prepared(**values | {"folder": str(folder.absolute()), "source": source, "tokenizer": tokenizer})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
