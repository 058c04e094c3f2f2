"""Where each file of the repository goes on the site, and how links to it are turned.

Links are written for the repository, and must work on a code host. `[Reducer](../picotron_mini/parallel/
data.py#Reducer)` opens the file there, and the symbol's documentation on the site. A link to nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath, relpath

from picotron_mini.config import UserError

# Code, which is left alone, or a link, whose words may be code: whichever begins first.
_CODE_OR_LINK = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)`*[ \t]*$|(?<!`)`[^`\n]+`(?!`)"
    r"|(?P<words>!?\[(?:`[^`\n]+`|[^\]`])*\]\()(?P<link>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def address(root: Path, name: str) -> str:
    """Where in the site's source the page of the repository's file `name` is.

    Raises:
        UserError: it is a folder, which has no page.
    """
    if name == "README.md":
        return "index.md"
    if name == "picotron_mini":
        return "api/index.md"
    if (root / name).is_dir():
        raise UserError(f"a link to the folder {name}: link to a file in it")
    if re.fullmatch(r"lessons/\d\d_\w+\.(py|ipynb)", name):
        return str(Path(name).with_suffix(".md"))
    if name.startswith("picotron_mini/") and name.endswith(".py") and not Path(name).name.startswith("_"):
        return "api/" + name.removeprefix("picotron_mini/").removesuffix(".py") + ".md"
    if name.split("/")[0] in ("summary", "interview_questions") or name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        return name
    return f"source/{name}.md"


def dotted(name: str) -> str:
    """The module's name of a file: `picotron_mini/parallel/data.py` is `picotron_mini.parallel.data`."""
    return name.removesuffix(".py").replace("/", ".")


def turn(root: Path, name: str, text: str, linked: Callable[[str], None]) -> str:
    """The Markdown of the file `name` with its links turned to where their targets went; code is left alone.

    Args:
        linked: called with the name of each file that is linked.

    Raises:
        UserError: a link to nothing, or to a folder.
    """
    page = address(root, name)

    def turned(match: re.Match[str]) -> str:
        link = match["link"]
        if not link or re.match(r"[a-z]+:|#", link) or link.startswith(page.split("/")[-1].removesuffix(".md") + "/"):
            return match[0]  # code; or elsewhere, on this page, a picture of this lesson
        path, _, symbol = link.partition("#")
        wanted = normpath(f"{name.rpartition('/')[0] or '.'}/{path}")
        if wanted.startswith("..") or not (root / wanted).exists():
            raise UserError(f"{name} links to {link}: there is no {wanted}")
        target = address(root, wanted)
        linked(wanted)
        if target.startswith("api/") and symbol and wanted.endswith(".py"):
            private = any(part.startswith("_") for part in symbol.split("."))  # it has no documentation of its own
            symbol = "" if private else f"{dotted(wanted)}.{symbol}"
        return match["words"] + relpath(target, page.rpartition("/")[0] or ".") + (f"#{symbol}" if symbol else "") + ")"

    return _CODE_OR_LINK.sub(turned, text)
