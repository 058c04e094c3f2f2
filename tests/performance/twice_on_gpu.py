"""The same layout, run twice with torch's deterministic algorithms: `python tests/performance/twice_on_gpu.py`.

Loss, gradients and weights of both runs must be equal to the bit, in float32 and in bf16, with blocks compiled; where
a run is recorded (`cuda_graph`), also to one that is not. Uses all the GPUs there are. cuBLAS wants a workspace of its
own for that (`CUBLAS_WORKSPACE_CONFIG`), which is set here.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import torch

from picotron_mini.config import RunConfig
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, _jobs_on_rank


def settings(gpus: int) -> list[tuple[str, dict[str, Any]]]:
    one: list[tuple[str, dict[str, Any]]] = [("dp=1", {}), ("dp=1", {"experts": True}), ("dp=1", {"cuda_graph": True})]
    if gpus < 2:
        return one
    several = [(f"dp={gpus}", {"zero": zero}) for zero in (0, 1, 2, 3)]
    several += [(f"tp={gpus}", {"sequence_parallel": on}) for on in (False, True)]
    several += [(f"pp={gpus}", {"schedule": kind, "micro_batches": 2 * gpus}) for kind in ("1f1b", "interleaved")]
    several += [(f"cp={gpus}", {"context": kind}) for kind in ("ring", "ulysses")]
    return [*one, *several, (f"dp={gpus},ep={gpus}", {"experts": True})]


def deterministic() -> None:
    torch.use_deterministic_algorithms(True)


def steps(run: RunConfig) -> list[list[torch.Tensor]]:
    """Of each rank: losses, gradients and weights of all steps, from a launch of its own."""
    ranks = launch(_jobs_on_rank, [[run]], deterministic, world_size=run.mesh.world_size, device="cuda", output="hide")
    return [
        [
            x
            for shot in rank[0][0][0]
            for x in (torch.tensor(shot.loss), *shot.gradients.values(), *shot.weights.values())
        ]
        for rank in ranks
    ]


def main() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    gpus, differ = torch.cuda.device_count(), 0
    if not gpus:
        sys.exit("no GPU is visible to torch")
    print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}", flush=True)
    for layout, wanted in settings(gpus):
        model = replace(MODEL, moe=EXPERTS) if wanted.get("experts") else MODEL
        chosen = {name: value for name, value in wanted.items() if name != "experts"}
        for dtype in ("float32", "bfloat16"):
            train = replace(TRAIN, device="cuda", dtype=dtype, compile=True, batch_size=0, **chosen)  # type: ignore[arg-type]
            run = resolve(RunConfig(layout=layout, model=model, train=train), gpus=gpus)
            first, others = steps(run), [steps(run)]
            if train.cuda_graph:
                others.append(steps(replace(run, train=replace(train, cuda_graph=False))))
            same = all(
                torch.equal(a, b)
                for other in others
                for x, y in zip(first, other, strict=True)
                for a, b in zip(x, y, strict=True)
            )
            differ += not same
            number = sum(x.numel() for rank in first for x in rank)
            print(
                f"{layout} {wanted} {dtype}: {number:,} numbers {'equal to the bit' if same else 'DIFFER'}", flush=True
            )
    if differ:
        sys.exit(f"{differ} of them differ")


if __name__ == "__main__":
    main()
