"""environment.json: the facts are right, the secrets stay out, and nothing needs a repository or a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from picotron_mini.monitoring import environment as module
from picotron_mini.monitoring.environment import environment, write_environment


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_it_is_plain_data_and_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/picotron-mini", "train", "--name", "two words"])
    path = write_environment(tmp_path)
    assert path == tmp_path / "environment.json"
    got = json.loads(path.read_text())
    assert got["torch"] == torch.__version__
    assert got["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert got["command"] == "picotron-mini train --name 'two words'"
    assert got["cpus"] >= 1 and got["torch_threads"] >= 1
    assert datetime.fromisoformat(got["time"]).utcoffset() is not None


def test_no_environment_variable_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "s3cr3t-value")
    assert "s3cr3t-value" not in json.dumps(environment())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_and_whether_it_is_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    git("init")
    assert environment()["git"] is None  # a repository without a commit
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    (tmp_path / "untracked").write_text("two")
    clean = environment()["git"]
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert environment()["git"] == {"commit": clean["commit"], "dirty": True}


def test_a_machine_without_git_or_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment()["git"] is None
    assert module._version("a-package-that-nobody-installed") is None


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    got = environment()
    assert len(got["gpus"]) == torch.cuda.device_count()
    if got["gpus"]:
        assert got["gpus"][0]["name"] and got["gpus"][0]["memory_bytes"] > 1 << 30
        assert got["cuda"] and got["driver"] and got["nccl"][0].isdigit()
    else:
        assert (got["cuda"], got["nccl"], got["driver"]) == (None, None, None)
    gpu = type("Properties", (), {"name": "Made-up GPU", "total_memory": 123})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(module, "_output", lambda *command: "580.1\n580.1" if command[0] == "nvidia-smi" else None)
    got = environment()
    assert got["gpus"] == [{"name": "Made-up GPU", "memory_bytes": 123}] * 2
    assert (got["nccl"], got["driver"], got["git"]) == ("2.27.5", "580.1", None)
