"""What it does to the loss that tokens travel to experts in fewer bits: a tiny mixture on real text, two ranks.

    python tests/performance/dispatch_payload_cpu.py [STEPS] [SEEDS]

Not a test: it prints the table for summary/08_moe.md. Each way starts from the same weights and sees the same batches;
only the form in which rows travel differs. The first way is a control: without ep nothing travels, and all that differs
from the second is the order of additions, so what these two differ by after some steps is noise. Bytes are those of
rank 0 in its last step, by the ledger; those of rows depend on what the routers chose. Times are not compared: other
work may run meanwhile.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from picotron_mini.config import RunConfig
from picotron_mini.launch import launch
from picotron_mini.presets import preset
from picotron_mini.ready import make_ready, start_folder
from picotron_mini.train import _on_rank

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
SEEDS = int(sys.argv[2]) if len(sys.argv) > 2 else 2


WAYS = (("dp=2", "same"), ("dp=2,ep=2", "same"), ("dp=2,ep=2", "bf16"), ("dp=2,ep=2", "fp8"))


def trained(layout: str, kind: str, seed: int, out: str) -> tuple[float, list[float], int]:
    """Held-out loss, losses of the steps, and bytes over ep of one."""
    base = preset("moe-tiny")
    settings = replace(
        base.train, steps=STEPS, seq_len=128, batch_size=16, micro_batch_size=0, micro_batches=1, eval_every=0,
        device="cpu", dispatch_payload=kind, seed=seed,
    )  # fmt: skip
    run = RunConfig(layout=layout, name=f"{layout}-{kind}-{seed}", out=out, model=base.model, train=settings)
    ready = make_ready(run, gpus=0)
    start_folder(ready)
    summary = launch(_on_rank, ready, world_size=2, timeout=None, output="hide")[0]
    folder = Path(out) / run.name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((folder / "traffic.json").read_text())["per_step"]
    assert all(row["predicted"] == row["counted"] for row in rows)
    sent = sum(row["counted"] for row in rows if row["axis"] == "ep" and row["op"] == "all_to_all")
    return summary["val_loss"], [float(line["loss"]) for line in lines if "loss" in line], sent


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"preset moe-tiny, {STEPS} steps of 16 sequences of 128 tokens, float32, AdamW, the default text")
    print("means of the training loss over the last 10 steps before each\n")
    at = [STEPS * n // 4 for n in (1, 2, 3, 4)]
    columns = "".join(f"{n:>9}" for n in at)
    print(f"{'layout':<11}{'payload':<9}{'seed':>5}{columns}{'held out':>10}{'KiB a step over ep':>20}")
    with tempfile.TemporaryDirectory() as out:
        for seed in range(SEEDS):
            for layout, kind in WAYS:
                held, losses, sent = trained(layout, kind, seed, out)
                means = "".join(f"{sum(losses[n - 10 : n]) / 10:>9.4f}" for n in at)
                print(f"{layout:<11}{kind:<9}{seed:>5}{means}{held:>10.4f}{sent / 1024:>20,.1f}", flush=True)
