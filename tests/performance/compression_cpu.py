"""What compressed gradients do to the loss: the tiny model on real text, two data-parallel ranks.

    python tests/performance/compression_cpu.py

Not a test: it prints the table of summary/07_3d_parallel.md. Each way starts from the same weights and sees the same
batches; only how gradients are summed differs. The last row forgets what is owed after each step (no error feedback).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from picotron_mini.config import RunConfig
from picotron_mini.launch import launch
from picotron_mini.parallel import compress
from picotron_mini.presets import preset
from picotron_mini.ready import make_ready, start_folder
from picotron_mini.train import _on_rank

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("bf16", {"compress": "bf16"}),
    ("top 10 %", {"compress": "topk", "compress_keep": 0.1}),
    ("top 1 %", {"compress": "topk", "compress_keep": 0.01}),
    ("top 1 %, nothing owed", {"compress": "topk", "compress_keep": 0.01}),
]


def forgetful(ready: Any) -> Any:
    """A rank whose top-k forgets what it did not send."""
    usual = compress._TopK.__call__

    def call(self: Any, buffer: torch.Tensor, sizes: Any) -> Any:
        self.owed.clear()
        return usual(self, buffer, sizes)

    compress._TopK.__call__ = call  # type: ignore[method-assign]
    return _on_rank(ready)


def trained(name: str, kw: dict[str, Any], out: str) -> tuple[dict[str, Any], list[float], int]:
    """The summary of a run, its losses, and the bytes that rank 0 sends in a step."""
    base = preset("laptop")
    settings = {"steps": STEPS, "seq_len": 128, "batch_size": 16, "eval_every": 0, "device": "cpu", **kw}
    run = RunConfig(
        layout="dp=2", name=name.replace(" ", "_").replace("%", "").replace(",", ""), out=out, model=base.model,
        train=replace(base.train, **settings),
    )  # fmt: skip
    ready = make_ready(run, gpus=0)
    start_folder(ready)
    rank = forgetful if "owed" in name else _on_rank
    summary = launch(rank, ready, world_size=2, timeout=None, output="hide")[0]
    folder = Path(out) / run.name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [float(line["loss"]) for line in lines if "loss" in line]
    traffic = json.loads((folder / "traffic.json").read_text())["per_step"]
    return summary, losses, sum(row["counted"] for row in traffic)


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"preset laptop, dp=2, {STEPS} steps of 16 sequences of 128 tokens, float32, AdamW, the default text\n")
    print(f"{'gradients':<24}{'loss at 50':>12}{'100':>8}{'150':>8}{'200':>8}{'validation':>12}{'KiB a step':>12}")
    with tempfile.TemporaryDirectory() as out:
        for name, kw in WAYS:
            summary, losses, sent = trained(name, kw, out)
            means = [sum(losses[n - 10 : n]) / 10 if len(losses) >= n else float("nan") for n in (50, 100, 150, 200)]
            columns = "".join(f"{mean:>8.3f}" for mean in means[1:])
            print(f"{name:<24}{means[0]:>12.3f}{columns}{summary['val_loss']:>12.4f}{sent / 1024:>12,.1f}", flush=True)
