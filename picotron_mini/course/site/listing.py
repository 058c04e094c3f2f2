"""The source of a technique beside the text that explains it, taken from the library when the site is built.

A paragraph of a write-up that is one line of this form, with nothing else in it,

    Source: [GradientBuckets](../picotron_mini/parallel/data.py#GradientBuckets)

is a plain link on a code host. On the site the code follows it, folded where it is long. So the text can never
show code that the library does not have. Classes, functions, methods (`data.py#GradientBuckets.arm`) and names
that a module assigns can be shown.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from posixpath import normpath

from picotron_mini.config import UserError
from picotron_mini.course.site.notebook import fenced

LONG = 30  # lines; about what a screen shows beside its explanation
_LINE = re.compile(r"^Source: (\[[^\]]+\]\(([^)\s#]+\.py)#([\w.]+)\))[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"(^(`{3,}|~{3,}).*?^\2`*[ \t]*$)", re.DOTALL | re.MULTILINE)


def expand(root: Path, name: str, text: str) -> str:
    """The Markdown of the file `name` with the code put behind each `Source:` line.

    Raises:
        UserError: there is no such file, or no such symbol in it.
    """

    def shown(match: re.Match[str]) -> str:
        link, path, symbol = match.groups()
        file = normpath(f"{name.rpartition('/')[0] or '.'}/{path}")
        if not (root / file).is_file():
            raise UserError(f"{name} shows the source of {path}: there is no {file}")
        first, code = source_of(root / file, symbol)
        lines = code.count("\n") + 1
        head = f"Source: {link}, `{file}`, " + (f"line {first}" if lines == 1 else f"lines {first}–{first + lines - 1}")
        block = fenced(code, "python")
        if lines > LONG:
            block = (
                f'<details class="listing" markdown="1">\n<summary>{lines} lines of {symbol}</summary>\n\n'
                f"{block}\n\n</details>"
            )
        return f"{head}\n{{ .listing }}\n\n{block}"

    pieces = _FENCE.split(text)  # prose, fenced block, its fence, prose, ...
    return "".join(_LINE.sub(shown, piece) if at % 3 == 0 else piece for at, piece in enumerate(pieces) if at % 3 != 2)


def source_of(path: Path, symbol: str) -> tuple[int, str]:
    """The number of the first line, and the text, of a symbol (`name` or `Class.name`) of a Python file.

    Raises:
        UserError: the file has no such symbol.
    """
    text = path.read_text()
    body: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for part in symbol.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            raise UserError(f"{path.name} has no {symbol} to show the source of")
        body = getattr(found, "body", [])
    assert found is not None  # a symbol has at least one part
    first = min([found.lineno, *(d.lineno for d in getattr(found, "decorator_list", []))])
    return first, textwrap.dedent("\n".join(text.splitlines()[first - 1 : found.end_lineno]))


def _names(node: ast.stmt) -> list[str]:
    """What a statement gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
