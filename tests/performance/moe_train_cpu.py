"""Validation loss of a mixture of experts against a dense model with as many active parameters, on the same text.

    python tests/performance/moe_train_cpu.py [--out FOLDER] [--seeds 0 1]

Not a test: it prints numbers for summary/08_moe.md. It trains `--preset laptop` and `--preset moe-tiny`, one rank each,
with nothing else changed, and skips runs that the folder holds already. Both see the same batches in the same order,
with the same learning rate, which was chosen for the dense model. Times are not compared: other work may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from picotron_mini.presets import preset
from picotron_mini.train import train

NAMES = ("laptop", "moe-tiny")


def result(out: Path, name: str, seed: int) -> dict[str, Any]:
    """The summary and the lines of metrics of a run, which is trained if it is not there."""
    folder = out / f"{name}-{seed}"
    if not (folder / "summary.json").exists():
        run = preset(name)
        train(replace(run, layout="dp=1", name=folder.name, out=str(out), train=replace(run.train, seed=seed)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((folder / "summary.json").read_text()), "lines": lines}


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args()
    found = {(name, seed): result(chosen.out, name, seed) for seed in chosen.seeds for name in NAMES}

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(found[NAMES[0], chosen.seeds[0]]["data"]["description"])
    print(f"\n{'':>9} {'seed':>4} {'parameters':>11} {'active':>9} {'steps':>6} {'tokens':>10} {'bits per byte':>14}")
    for (name, seed), run in found.items():
        sizes = f"{run['parameters']:>11,} {run.get('active_parameters', run['parameters']):>9,}"
        print(
            f"{name:>9} {seed:>4} {sizes} {run['steps_done']:>6} {run['tokens']:>10,} {run['val_bits_per_byte']:>14.3f}"
        )
    for seed in chosen.seeds:
        dense, moe = (found[name, seed]["val_bits_per_byte"] for name in NAMES)
        print(f"seed {seed}: the mixture is {dense - moe:+.3f} bits per byte better")
    gaps = [found[NAMES[0], s]["val_bits_per_byte"] - found[NAMES[1], s]["val_bits_per_byte"] for s in chosen.seeds]
    print(f"mean over {len(gaps)} seed(s): {mean(gaps):+.3f}")

    print("\nvalidation on the way (bits per byte, a smaller part of the held-out text)")
    for (name, seed), run in found.items():
        each = [line for line in run["lines"] if "val_loss" in line][:-1]  # the last one is the whole split
        print(f"{name:>9} {seed:>4} " + "  ".join(f"{x['step']}: {x['val_bits_per_byte']:.3f}" for x in each))

    for seed in chosen.seeds:
        run = found["moe-tiny", seed]
        steps = [line for line in run["lines"] if "moe_load" in line]
        print(f"\nbalance over time, seed {seed}:  step, entropy of the load, busiest / even, auxiliary loss, dead")
        for line in [steps[n] for n in (0, 9, 49, 149, 299, -1)]:
            values = f"{line['moe_entropy']:.3f} {line['moe_max_load']:>6.2f} {line['moe_aux']:>7.3f}"
            print(f"{line['step']:>9} {values} {line['moe_dead_experts']:>4}")
        print("information of the chosen expert about the kind of character, bits by layer (chance alone):")
        layers = run["experts"]["layers"]
        print("  " + "   ".join(f"{x['layer']}: {x['bits']:.3f} ({x['chance']:.3f})" for x in layers))


if __name__ == "__main__":
    main()
