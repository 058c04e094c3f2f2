"""An executed notebook as a page of Markdown.

A lesson is committed with its outputs, and those are what the site shows: nothing is run here. Prose stays
as it is, code becomes a fenced block, text that was printed becomes a plain block under it, and each picture
becomes a file beside the page.

    # %% [markdown]          ->   the prose
    # %% alt="A ring of 4"   ->   ```python ... ```
    show(ring(4))            ->   ![A ring of 4](03_data_parallel/1.svg)

A picture needs words for those who do not see it: the cell's metadata `alt`, or else what the displayed
object prints as text. A notebook that was not run, or a picture without words, stops the build.
"""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

import nbformat

from picotron_mini.config import UserError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def to_markdown(path: Path, folder: Path) -> str:
    """The page of one notebook.

    Args:
        path: the executed notebook.
        folder: where its pictures are written; the page refers to them from beside this folder.

    Raises:
        UserError: a code cell was never run, ended in an error, or shows a picture without words.
    """
    notebook = nbformat.read(path, as_version=4)
    parts: list[str] = []
    pictures = 0
    for number, cell in enumerate(notebook.cells, start=1):
        where = f"{path.name}, cell {number}"
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        if not cell.source.strip():
            continue
        if cell.execution_count is None:
            raise UserError(f"{where} was never run; `make lessons` runs what changed")
        parts.append(fenced(cell.source, "python"))
        printed = ""
        for output in cell.outputs:
            if output.output_type == "stream":
                printed += output.text
                continue
            if output.output_type == "error":
                raise UserError(f"{where} ended in {output.ename}: {output.evalue}")
            parts.append(_block(printed))
            printed = ""
            kind = next((kind for kind in _PICTURES if kind in output.data), None)
            if kind is None:
                parts.append(_rich(output.data, where))
                continue
            pictures += 1
            name = f"{pictures}.{_PICTURES[kind]}"
            folder.mkdir(parents=True, exist_ok=True)
            data = output.data[kind]
            (folder / name).write_bytes(data.encode() if kind == "image/svg+xml" else base64.b64decode(data))
            parts.append(f"![{_alt(cell.metadata, output.data, where)}]({folder.name}/{name})")
        parts.append(_block(printed))
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def fenced(text: str, language: str) -> str:
    """A fenced block that is longer than any fence inside the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _block(printed: str) -> str:
    """What was printed. Sentences longer than any line of code are wrapped on the page; columns and code scroll."""
    printed = _ANSI.sub("", printed)
    longest = max((line.strip() for line in printed.splitlines()), key=len, default="")
    prose = " .prose" if len(longest) > 120 and "  " not in longest else ""
    return fenced(printed, f"{{.text .output{prose}}}") if printed.strip() else ""


def _rich(data: dict[str, Any], where: str) -> str:
    if "application/javascript" in data:
        raise UserError(f"{where} shows JavaScript; the site runs no script of a notebook")
    if "text/markdown" in data:
        return str(data["text/markdown"])
    if "text/html" in data:
        return f'<div class="output">\n{data["text/html"]}\n</div>'
    return _block(str(data.get("text/plain", "")))


def _alt(metadata: dict[str, Any], data: dict[str, Any], where: str) -> str:
    words = str(metadata.get("alt") or data.get("text/plain", ""))
    if not words or words.startswith("<"):
        raise UserError(f'{where} shows a picture without words; write them as `# %% alt="..."`')
    return html.escape(" ".join(words.strip("'\"").split())).replace("[", "(").replace("]", ")")
