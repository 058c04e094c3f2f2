"""Text as a list of documents, and the split that holds some of them out.

A language model is judged on text that it has not seen. Cutting a random set of *sequences* out of one long
stream does not give that: the sequence before and the sequence after come from the same file. So the split
is made here, by document, before anything is tokenised:

    files ──► documents (empty ones and exact copies dropped) ──► train │ validation
                                                                        │
              order of sha256(seed, text): adding a file moves none of the others ahead of each other

The default needs no network: every CPython carries the topics of its documentation (`pydoc_data.topics`) and
the source of its standard library, about 10 MB of English and code. It differs between Python releases, so a
run records `Corpus.sha256` beside `Corpus.source`.

Near copies of a document may still fall on both sides; finding them (MinHash, as in arXiv 2107.06499, which
shows how much they flatter the validation loss) is beyond a corpus of this size.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from picotron_mini.config import ConfigError, UserError

# What is read when a folder is given; a file that is named itself may end in anything.
_ENDINGS = (
    "txt text md markdown rst adoc org tex html htm xml json jsonl csv tsv toml yaml yml ini cfg "
    "py pyi js jsx ts tsx css c h cc cpp hpp cu java kt go rs rb php swift scala jl r lua hs ml sh sql"
)
SUFFIXES = frozenset("." + ending for ending in _ENDINGS.split())
_SKIPPED_FOLDERS = {"__pycache__", "node_modules"}  # and every folder whose name starts with a dot
# Not prose and not code that a person wrote: tests (half of the library), code-page tables, build settings.
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_SKIPPED_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ between machines of one release


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        names: one a document, for messages.
        documents: the texts; none is blank and no two are equal.
        source: where they come from, in a few words.
    """

    names: tuple[str, ...]
    documents: tuple[str, ...]
    source: str

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents as UTF-8."""
        return sum(len(document.encode()) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Digest of the texts and their order, not of the names: a moved folder is the same corpus."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(b"%d\n" % len(data) + data)
        return digest.hexdigest()


def load_corpus(paths: tuple[str, ...] = ()) -> Corpus:
    """Read files and folders, or CPython's documentation and source where no path is given.

    A folder is read recursively, in the order of its path names, taking the files that end in one of `SUFFIXES`
    and leaving out hidden ones. One file is one document. Blank documents and exact copies are dropped.

    Raises:
        UserError: a path that is missing, unreadable, not UTF-8, or a folder without text; nothing but blanks.
    """
    if paths:
        found = [named for path in paths for named in _read_path(Path(path).expanduser())]
        source = ", ".join(paths)
    else:
        found = [*_documentation(), *_standard_library()]
        source = f"documentation and standard library of {platform.python_implementation()} {platform.python_version()}"
    unique: dict[str, str] = {}
    for name, document in found:
        if document.strip():
            unique.setdefault(document, name)
    if not unique:
        raise UserError(f"the text is empty: {source} has no character that is not blank; name files with text in them")
    return Corpus(tuple(unique.values()), tuple(unique), source)


def split_documents(corpus: Corpus, val_fraction: float, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Hold out about `val_fraction` of the bytes, whole documents where that is possible.

    Documents are taken in the order of sha256(seed, text) until the share is reached; one that alone is larger
    than the share stays in training. Where that gives less than half of the share (one file, or a few large
    ones), the end of the largest document is held out instead, cut off at a line boundary.

    Returns:
        The training part and the validation part; neither is empty, and no document is in both.

    Raises:
        ConfigError: `val_fraction` outside (0, 1).
        UserError: a single document too short to cut.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction={val_fraction} must lie between 0 and 1")
    sizes = [len(document.encode()) for document in corpus.documents]
    share = val_fraction * sum(sizes)
    order = sorted(range(len(sizes)), key=lambda i: hashlib.sha256(f"{seed}\n{corpus.documents[i]}".encode()).digest())
    held: set[int] = set()
    taken = 0
    for i in order:
        if sizes[i] > share:
            continue
        if taken + sizes[i] / 2 > share or len(held) == len(sizes) - 1:  # this one would miss the share by more
            break
        held.add(i)
        taken += sizes[i]
    if taken >= share / 2:
        return _part(corpus, (i for i in range(len(sizes)) if i not in held)), _part(corpus, sorted(held))
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    head, tail = _cut(corpus.documents[largest], 1 - min(share / sizes[largest], max(val_fraction, 0.5)))
    if not head.strip() or not tail.strip():
        raise UserError(
            f"{corpus.names[largest]} has {sizes[largest]} bytes: too short to hold a part of it out; add text"
        )
    documents = list(corpus.documents)
    documents[largest] = head
    train = Corpus(corpus.names, tuple(documents), corpus.source)
    return train, Corpus((corpus.names[largest] + " (its end)",), (tail,), corpus.source)


def _part(corpus: Corpus, indices: Iterable[int]) -> Corpus:
    kept = list(indices)
    return Corpus(tuple(corpus.names[i] for i in kept), tuple(corpus.documents[i] for i in kept), corpus.source)


def _cut(text: str, where: float) -> tuple[str, str]:
    """Cut after about `where` of the characters: behind a line, else behind a space, else anywhere."""
    middle = min(max(round(len(text) * where), 1), max(len(text) - 1, 1))
    for boundary in ("\n", " "):
        at = text.rfind(boundary, 0, middle) + 1
        if text[:at].strip() and text[at:].strip():
            return text[:at], text[at:]
    return text[:middle], text[middle:]


def _documentation() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics  # half a megabyte that only the default text needs

    for name in sorted(topics):
        yield f"topic {name}", topics[name]


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        skipped = _SKIPPED_STDLIB.intersection(relative.parts) or relative.name.startswith(_SKIPPED_MODULES)
        if not skipped and not relative.parts[0].startswith("config-"):
            yield relative.as_posix(), _read_file(path)


def _read_path(path: Path) -> list[tuple[str, str]]:
    if path.is_file():
        return [(path.name, _read_file(path))]
    if not path.exists():
        raise UserError(f"text {str(path)!r} does not exist (looked for {path.absolute()}); name a file or a folder")
    if not path.is_dir():
        raise UserError(f"text {str(path)!r} is neither a file nor a folder; save the text to a file first")
    files: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(
            f"folder {str(path)!r} has no text file; files ending in .txt, .md, .rst, .py and the like are read, "
            "any other file when it is named itself"
        )
    named = sorted((file.relative_to(path).as_posix(), file) for file in files)
    return [(f"{path.absolute().name}/{name}", _read_file(file)) for name, file in named]


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from error


def _read_file(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        _unreadable(OSError(error.errno, error.strerror, str(path)))
    try:
        return data.decode().removeprefix("\ufeff")  # a byte-order mark is not text
    except UnicodeDecodeError as error:
        likely = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. If it is {likely} text, "
            f"convert it: iconv -f {likely} -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"
        ) from error
