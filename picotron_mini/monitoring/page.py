"""The paper a report is printed on: escaping, tables, and the frame with the style sheet (report.css).

The page is one file without scripts, and its first line forbids the browser to load anything from outside.
Text of a run (a sample, a path, an error) may hold HTML, so everything passes through `escape`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Control characters become their visible pictures (U+2400 and on); a browser would drop or refuse them.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def escape(value: object) -> str:
    """The text of any value, safe inside HTML elements and quoted attributes."""
    return html.escape(str(value).translate(_VISIBLE))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table whose first column names its rows. Cells are escaped unless they are `Markup`."""
    top = "".join(f'<th scope="col">{_cell(h)}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>{"".join(f"<td>{_cell(c)}</td>" for c in row[1:])}</tr>'
        for row in rows
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """Text that is HTML already."""


def _cell(value: object) -> str:
    return value if isinstance(value, Markup) else escape(value)


def settings_tables(values: dict[str, Any]) -> str:
    """One small table a group of settings; what is not in a group comes first."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    groups = ({"run": plain} if plain else {}) | {k: v for k, v in values.items() if isinstance(v, dict)}
    tables = (table([title, ""], [(k, _value(v)) for k, v in group.items()]) for title, group in groups.items())
    return f'<div class="settings">{"".join(tables)}</div>'


def _value(value: Any) -> str:
    if value is None or value in ([], "", {}):
        return Markup('<span class="quiet">none</span>')
    return Markup(f"<code>{escape(_flat(value))}</code>")


def _flat(value: Any) -> str:
    """Nested data in one line: "name A, memory 80; name B, memory 80"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_flat(inner) for inner in value)
    return json.dumps(value) if value is None or isinstance(value, bool) else f"{value}"


def document(title: str, body: str) -> str:
    """The whole page around its body."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
