"""Where a run happened, so that a number in a report can be judged and the run repeated.

Only facts that change a result or its speed are kept: versions, processors, the commit of the code, the
command. Environment variables are never written, for they hold passwords and tokens, and neither is the
address of the git remote.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Describe this process and machine as plain data for JSON.

    Keys: `time` (UTC, ISO 8601), `command`, `python`, `torch`, `numpy` (or None), `platform`, `cpus` (that
    this process may use), `torch_threads`, `gpus` (a list of `name` and `memory_bytes`), `cuda`, `nccl` and
    `driver` (None without a GPU), `git` (`commit`, and `dirty`: tracked files differ from it; or None).
    """
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()) if gpus else None,
        "driver": _driver() if gpus else None,
        "git": _git(),
    }


def write_environment(run_dir: Path) -> Path:
    """Write `environment()` to `environment.json` in the run's folder and return its path."""
    path = run_dir / "environment.json"
    path.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program printed; None where it is not installed or fails (no repository, no driver)."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0].strip() if versions else None


def _git() -> dict[str, Any] | None:
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}
