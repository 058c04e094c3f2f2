"""`python -m picotron_mini.course.site ROOT DOCS`: the first half of `make site`; `mkdocs build` is the second."""

from __future__ import annotations

import sys
from pathlib import Path

from picotron_mini.config import UserError
from picotron_mini.course.site.assemble import assemble

if __name__ == "__main__":
    try:
        assemble(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
