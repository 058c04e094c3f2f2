"""Time of one layer, forward and backward, at tp=1, 2 and 4 on CPU ranks, with the share that its exchanges take.

    python tests/performance/tensor_parallel_cpu.py

Not a test: it prints numbers for summary/04_tensor_parallel.md. All cases are measured in turn, in one run, and
compared as ratios; the best of all rounds counts, of the slowest rank.
"""

from __future__ import annotations

import os
import platform

import torch

from picotron_mini.course.instruments.tensor_time import block_times
from picotron_mini.launch import launch

WIDTHS = (64, 128, 256, 512, 1024)
SIZES = (1, 2, 4)
SEQ_LEN = 256
ROUNDS = 12

if __name__ == "__main__":
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread a rank")
    print(f"gloo, float32, one layer, one sequence of {SEQ_LEN} tokens, best of {ROUNDS} rounds")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")
    per_rank = launch(block_times, WIDTHS, SIZES, SEQ_LEN, ROUNDS, world_size=max(SIZES), timeout=900)
    print(f"{'width':>6}{'tp':>4}{'ms':>9}{'of tp=1':>9}{'products ms':>13}{'exchanges':>11}")
    for width in WIDTHS:
        alone = per_rank[0][width, 1][0]
        for tp in SIZES:
            whole, products = (max(times[width, tp][i] for times in per_rank[:tp]) for i in (0, 1))
            share = f"{1 - products / whole:.0%}" if tp > 1 else "none"
            print(f"{width:>6}{tp:>4}{1e3 * whole:>9.2f}{whole / alone:>9.2f}{1e3 * products:>13.2f}{share:>11}")
    print(f"\nload of the machine after: {os.getloadavg()[0]:.1f}")
