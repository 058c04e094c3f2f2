"""How each chapter ends, on the GPUs of one host: `python tests/performance/closing_runs.py [--chapters 03] [--tiny]`.

For each chapter one training run on real text, under `torchrun` on all the GPUs there are (an even number), with the
chapter's technique. What a run prints goes to stdout and, with the command, to `<out>/<chapter>.log`, which the
chapter's write-up keeps. A run that does not end in time is stopped and says so, and the others go on.

`--tiny`: a tiny model for four steps; without a GPU on two gloo ranks, which tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

TINY = "--hidden-size 32 --num-heads 4 --num-kv-heads 2 --num-layers 4 --intermediate-size 64 --seq-len 64 \
--micro-batch-size 1 --batch-size 8 --tokenizer bytes --steps 4"
PRESETS = {"08": "moe-tiny"}  # the others: h100


def flags(chapter: str, ranks: int) -> str:
    """The technique of a chapter, as flags of `picotron-mini train`."""
    return {
        "02": f"dp={ranks} --document-mask",
        "03": f"dp={ranks} --zero 2",
        "04": f"tp={ranks} --sequence-parallel",
        "05": f"pp={ranks} --schedule interleaved",
        "06": f"cp={ranks}",
        "07": f"dp={ranks // 2},tp=2 --zero 1" if ranks > 2 else f"tp={ranks} --recompute full",
        "08": f"dp={ranks},ep={ranks}",
    }[chapter]


def command(chapter: str, ranks: int, tiny: bool, steps: int) -> list[str]:
    """`torchrun` and what it runs."""
    size = TINY if tiny else f"--steps {steps}"
    preset = "" if tiny and chapter != "08" else f"--preset {PRESETS.get(chapter, 'h100')}"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "picotron_mini"]
    return [*start, "train", *shlex.split(f"{preset} {flags(chapter, ranks)} {size}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapters", nargs="*", default=["02", "03", "04", "05", "06", "07", "08"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=Path("runs/closing"))
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not args.tiny and (gpus < 2 or gpus % 2):
        parser.error(f"{gpus} GPU(s) here and an even number is needed; --tiny tries the script without")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for chapter in args.chapters:
        order = command(chapter, max(gpus, 2), args.tiny, args.steps)
        shown = "torchrun " + shlex.join(order[3:])
        began = time.monotonic()
        with (args.out / f"{chapter}.log").open("w") as log:
            log.write(f"torch {torch.__version__}, {gpus} GPU(s)\n$ {shown}\n")
            log.flush()
            with subprocess.Popen(order, stdout=log, stderr=subprocess.STDOUT) as process:
                try:
                    code: int | str = process.wait(timeout=args.limit)
                except subprocess.TimeoutExpired:
                    process.terminate()  # the run saves itself
                    process.wait()
                    code = f"stopped after {args.limit:.0f} s"
            log.write(f"exit {code}, {time.monotonic() - began:.0f} s in all\n")
        print((args.out / f"{chapter}.log").read_text(), flush=True)
        if code != 0:
            failed.append(chapter)
    if failed:
        raise SystemExit(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
