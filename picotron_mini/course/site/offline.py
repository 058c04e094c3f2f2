"""The search where the pages are opened as files, without a server.

A browser lets a page at `file://` read no file beside it, neither the index of the search nor the program that
searches; but it runs scripts from there. So both are written once more, as scripts that set a variable. The theme
asks for `search/search_index.js` by itself; `offline.js` gives it the program. With a server neither is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_scripts(site: Path) -> None:
    """Write `search_index.js` and `worker.js` into the folder `search` of a built site."""
    search = site / "search"
    index = (search / "search_index.json").read_text()
    (search / "search_index.js").write_text(f"var __index = {index};\n")
    (worker,) = site.glob("assets/javascripts/workers/search.*.min.js")
    (search / "worker.js").write_text(f"var __searchWorker = {json.dumps(worker.read_text())};\n")
