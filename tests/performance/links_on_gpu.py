"""What an exchange between GPUs costs: `torchrun --nproc-per-node 2 tests/performance/links_on_gpu.py`.

For each collective of the library and each size: the time on the device, the payload a second, and the time for which
Python and NCCL keep the host busy until it is launched. `--device cpu` tries the script on gloo ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from picotron_mini.collectives import all_gather, all_reduce, all_to_all, barrier, reduce_scatter, rotate
from picotron_mini.config import MeshShape
from picotron_mini.launch import first_rank, launch
from picotron_mini.mesh import Axis, Mesh

KIB = 2**10
SIZES = {"cuda": [64 * KIB, 2**20, 8 * 2**20, 64 * 2**20, 256 * 2**20], "cpu": [64 * KIB, 2**20]}
REPEATS = 20

Row = tuple[str, int, float, float]  # operation, bytes, seconds on the device, seconds of the host


def rotated(x: torch.Tensor, axis: Axis) -> None:
    _, work = rotate(x, axis)
    work.wait()


def work(ranks: int, device: str) -> list[Row]:
    """In a rank: every collective at every size, in bf16."""
    axis = Mesh.build(MeshShape(dp=ranks))["dp"]
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_reduce": lambda x: all_reduce(x, axis),
        "all_gather": lambda x: all_gather(x, axis, 0),
        "reduce_scatter": lambda x: reduce_scatter(x, axis, 0),
        "all_to_all": lambda x: all_to_all(x, axis),
        "send and receive": lambda x: rotated(x, axis),
    }
    return [
        (name, size, *timed(call, torch.ones(size // 2, dtype=torch.bfloat16, device=device), axis))
        for name, call in calls.items()
        for size in SIZES[device]
    ]


def timed(call: Callable[[torch.Tensor], Any], x: torch.Tensor, axis: Axis) -> tuple[float, float]:
    """Median seconds of several rounds of a few calls each: until they are done, and until they are launched."""
    done, launched = [], []
    for _ in range(REPEATS):
        wait(x)
        barrier(axis)
        wait(x)
        start = time.perf_counter()
        for _ in range(4):
            call(x)
        launched.append((time.perf_counter() - start) / 4)
        wait(x)
        done.append((time.perf_counter() - start) / 4)
    return statistics.median(done[2:]), statistics.median(launched[2:])


def wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    ranks = int(os.environ.get("WORLD_SIZE", 2))
    rows = launch(work, ranks, device, world_size=ranks, device=device)[0]
    if not first_rank():
        return
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {ranks} ranks, {where}; payload: what a rank hands over")
    print(f"{'':<18}{'payload':>12}{'time':>12}{'payload/s':>14}{'host':>12}")
    for name, size, seconds, host in rows:
        gigabytes = size / seconds / 1e9
        print(f"{name:<18}{size / KIB:>8,.0f} KiB{1e6 * seconds:>9,.0f} us{gigabytes:>9.1f} GB/s{1e6 * host:>9.0f} us")


if __name__ == "__main__":
    main()
