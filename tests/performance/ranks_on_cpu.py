"""What starting ranks and talking between them costs on this machine's CPU: `python tests/performance/ranks_on_cpu.py`.

Prints a log; best and median of several rounds, since other programs only ever add time.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time

import torch

from picotron_mini.config import MeshShape
from picotron_mini.launch import launch

SIZES = [2**k for k in range(8, 25, 4)]  # 256 B to 16 MiB


def summary(seconds: list[float]) -> str:
    return f"best {min(seconds):8.4f} s, median {statistics.median(seconds):8.4f} s of {len(seconds)}"


def timed(fn, rounds: int) -> str:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return summary(seconds)


def nothing() -> None:
    pass


def sums(ranks: int) -> dict[tuple[str, int], float]:
    """In a rank: the best time of each all-reduce at each size."""
    import time

    from picotron_mini.collectives import all_reduce, barrier
    from picotron_mini.course.rings import naive_all_reduce, ring_all_reduce, tree_all_reduce
    from picotron_mini.mesh import Mesh

    axis = Mesh.build(MeshShape(dp=ranks))["dp"]
    out = {}
    for fn in (naive_all_reduce, ring_all_reduce, tree_all_reduce, all_reduce):
        for size in SIZES:
            x, best = torch.ones(size // 4), float("inf")
            for _ in range(8 if size < 2**20 else 4):
                barrier(axis)
                start = time.perf_counter()
                for _ in range(4):
                    fn(x, axis)
                best = min(best, (time.perf_counter() - start) / 4)
            out[fn.__name__, size] = best
    return out


CUSTOM_OP = """
import time, torch
@torch.library.custom_op("measure::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
start = time.perf_counter()
double(torch.ones(1))
print(time.perf_counter() - start)
"""
LIBRARY = """
import time, torch
library = torch.library.Library("measure", "DEF")
library.define("double(Tensor x) -> Tensor")
library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
start = time.perf_counter()
torch.ops.measure.double.default(torch.ones(1))
print(time.perf_counter() - start)
"""
SPAWN = """
import multiprocessing, time
def work():
    import torch.distributed
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    ranks = [context.Process(target=work) for _ in range(4)]
    [rank.start() for rank in ranks]
    [rank.join() for rank in ranks]
    print(time.perf_counter() - start)
"""


def script(text: str, folder: str) -> float:
    path = f"{folder}/script.py"
    with open(path, "w") as file:
        file.write(text)
    return float(subprocess.run([sys.executable, path], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    import tempfile

    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        end="",
    )
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on arrival")
    print("first launch, 1 rank   ", timed(lambda: launch(nothing, world_size=1), 1))
    for ranks in (1, 2, 4, 8):
        print(f"warm launch, {ranks} rank(s) ", timed(lambda ranks=ranks: launch(nothing, world_size=ranks), 12))
    with tempfile.TemporaryDirectory() as folder:
        print("4 spawned processes that import torch.distributed:", summary([script(SPAWN, folder) for _ in range(3)]))
        print(
            "first call of a custom_op:                        ", summary([script(CUSTOM_OP, folder) for _ in range(3)])
        )
        print(
            "first call of an operator of torch.library.Library:", summary([script(LIBRARY, folder) for _ in range(3)])
        )
    for ranks in (2, 4):
        per_rank = launch(sums, ranks, world_size=ranks)
        slowest = {key: max(times[key] for times in per_rank) for key in per_rank[0]}
        print(f"all-reduce of {ranks} ranks, milliseconds (slowest rank, best round)")
        print(f"{'bytes':>18}" + "".join(f"{size:>12,}" for size in SIZES))
        for name in dict.fromkeys(name for name, _ in slowest):
            print(f"{name:>18}" + "".join(f"{1e3 * slowest[name, size]:12.3f}" for size in SIZES))
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
