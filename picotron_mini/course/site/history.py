"""When each page last changed, from git.

A shallow clone has one commit, which seems to have changed every file: its dates would be wrong, so there are
none. The same without git. Either way the reason is said, and the site is built.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def last_changes(root: Path) -> dict[str, str]:
    """The day (`2026-11-24`) of the last commit that touched each file below `root`; empty where git cannot say."""
    try:
        shallow = _git(root, "rev-parse", "--is-shallow-repository").strip() == "true"
        log = "" if shallow else _git(root, "log", "--format=%x00%cs", "--name-only", "--no-renames", "--relative")
        problem = "a shallow clone does not know when files changed" if shallow else ""
    except FileNotFoundError:
        log, problem = "", "git is not installed"
    except subprocess.CalledProcessError as error:
        log, problem = "", error.stderr.strip().splitlines()[0]
    if problem:
        print(f"the pages get NO DATES: {problem}", file=sys.stderr)
    found: dict[str, str] = {}
    for commit in log.split("\0")[1:]:  # the latest first
        day, *files = commit.split("\n")
        for name in filter(None, files):
            found.setdefault(name, day)
    return found


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "core.quotePath=false", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
