"""The same layout, run twice to the bit: `python tests/performance/twice_on_gpu.py [--only TEXT ...]`.

With deterministic algorithms loss, gradients and weights of both runs must be equal to the bit, in float32 and in
bf16, with blocks compiled where the schedule allows; where a run is recorded (`cuda_graph`), also to one that is not.
Uses all the GPUs there are. Each run is a launch of its own, one for all settings of a layout. Heads are as wide as in
training, so that its kernels run. `--only` runs the layouts that begin so, as `--only pp cp`. cuBLAS wants a workspace
of its own for equal bits, which is set here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from picotron_mini.config import RunConfig
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, _jobs_on_rank

Settings = dict[str, Any]


def settings(gpus: int) -> dict[str, list[Settings]]:
    """By layout; several GPUs first."""
    one: dict[str, list[Settings]] = {"dp=1": [{}, {"cuda_graph": True}, {"experts": True}]}
    if gpus < 2:
        return one
    ways: list[Settings] = [{"experts": True}, {"experts": True, "dispatch": "allgather"}]
    several: dict[str, list[Settings]] = {
        f"pp={gpus}": [{"schedule": kind, "micro_batches": 2 * gpus} for kind in ("1f1b", "interleaved")]
        + [{"schedule": kind, "micro_batches": 2 * gpus, "compile": False} for kind in ("zb-h1", "zb-v")],
        f"cp={gpus}": [{"context": kind} for kind in ("ring", "ulysses")],
        f"dp={gpus}": [{"zero": zero} for zero in (0, 1, 2, 3)]
        + [{"zero": zero, "symmetric_memory": True} for zero in (1, 2, 3)],
        f"dp={gpus},ep={gpus}": ways,
        f"tp={gpus}": [{"sequence_parallel": on} for on in (False, True)],
    }
    return several | one


def deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    torch._dynamo.config.recompile_limit = 64  # one process compiles the same code for all settings


def steps(runs: Sequence[RunConfig]) -> list[list[torch.Tensor]]:
    """Of each run: losses, gradients and weights of all steps on all ranks, from one launch."""
    size = runs[0].mesh.world_size
    jobs = [[run] for run in runs]
    ranks = launch(_jobs_on_rank, jobs, deterministic, world_size=size, device="cuda", output="hide")
    return [
        [
            x
            for rank in ranks
            for shot in rank[job][0][0]
            for x in (torch.tensor(shot.loss), *shot.gradients.values(), *shot.weights.values())
        ]
        for job in range(len(runs))
    ]


def made(layout: str, wanted: Settings, dtype: str, gpus: int) -> RunConfig:
    model = replace(MODEL, head_dim=64, moe=EXPERTS if wanted.get("experts") else None)
    chosen = {"compile": True} | {name: value for name, value in wanted.items() if name != "experts"}
    train = replace(TRAIN, device="cuda", dtype=dtype, batch_size=0, **chosen)  # type: ignore[arg-type]
    return resolve(RunConfig(layout=layout, model=model, train=train), gpus=gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    args = parser.parse_args()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    gpus, differ = torch.cuda.device_count(), 0
    if not gpus:
        sys.exit("no GPU is visible to torch")
    print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}", flush=True)
    for layout, several in settings(gpus).items():
        if not layout.startswith(tuple(args.only)):
            continue
        names = [(wanted, dtype) for wanted in several for dtype in ("float32", "bfloat16")]
        runs = [made(layout, wanted, dtype, gpus) for wanted, dtype in names]
        plain = [replace(run, train=replace(run.train, cuda_graph=False)) for run in runs if run.train.cuda_graph]
        first, second, unrecorded = steps(runs), steps(runs), iter(steps(plain) if plain else [])
        for (wanted, dtype), run, one, *others in zip(names, runs, first, second, strict=True):
            if run.train.cuda_graph:
                others.append(next(unrecorded))
            same = all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))
            differ += not same
            number = sum(x.numel() for x in one)
            verdict = "equal to the bit" if same else "DIFFER"
            print(f"{layout} {wanted} {dtype}: {number:,} numbers {verdict}", flush=True)
    if differ:
        sys.exit(f"{differ} of them differ")


if __name__ == "__main__":
    main()
