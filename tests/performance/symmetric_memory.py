"""What messages take, and what they take from the products beside them: by collectives, and by symmetric memory.

    python tests/performance/symmetric_memory.py

On all GPUs if there are some, else on two CPU ranks. Each way is timed alone and beside matrix products (on a GPU on
another stream; on the CPU nothing runs beside), in turn, round after round; the medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from picotron_mini.collectives import SymmetricMemory, Work, all_gather_several, reduce_scatter_several
from picotron_mini.config import MeshShape
from picotron_mini.launch import launch
from picotron_mini.mesh import Mesh

ROUNDS = 7
GPUS = torch.cuda.device_count()
RANKS = GPUS if GPUS > 1 else 2
SHARD = 32 * 2**20 if GPUS > 1 else 2**20  # numbers of a rank
TIMES = 50 if GPUS > 1 else 8  # messages in a row
PRODUCTS = 180  # beside them, on a GPU: each of 8192 x 2048 by 2048 x 8192


def measure() -> list[tuple[str, float, float, float, float]]:
    """In a rank: way, GiB of its payload, ms of the messages alone, of the products alone, of the products beside."""
    device = torch.device("cuda", torch.cuda.current_device()) if GPUS > 1 else torch.device("cpu")
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    memory = SymmetricMemory(axis, device)
    weights = torch.bfloat16 if GPUS > 1 else torch.float32
    shard, gradients = memory.empty(SHARD, weights).zero_(), memory.empty(RANKS * SHARD, torch.float32).zero_()
    whole, part = torch.empty(RANKS * SHARD, dtype=weights, device=device), torch.empty(SHARD, device=device)
    memory.meet()
    ways: dict[str, tuple[int, Callable[[], Work]]] = {
        "all_gather": (shard.nbytes, lambda: all_gather_several([whole], [shard], axis)),
        "all_gather, symmetric": (shard.nbytes, lambda: memory.all_gather_several([whole], [shard])),
        "reduce_scatter": (gradients.nbytes, lambda: reduce_scatter_several([part], [gradients], axis)),
        "reduce_scatter, symmetric": (gradients.nbytes, lambda: memory.reduce_scatter_several([part], [gradients])),
    }
    matrix = torch.randn(8192, 2048, device=device, dtype=weights) if GPUS > 1 else torch.empty(0)
    product = torch.empty(8192, 8192, device=device, dtype=weights) if GPUS > 1 else torch.empty(0)

    def now() -> Any:
        if GPUS < 2:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if GPUS > 1 else 1000 * (end - start)

    def timed(messages: int, products: int, start: Callable[[], Work]) -> tuple[float, float]:
        """Until the products are done, and until all is."""
        memory.meet()
        if GPUS > 1:
            torch.cuda.synchronize()
        begun = now()
        works = [start() for _ in range(messages)] if GPUS > 1 else []
        for _ in range(products if GPUS > 1 else 0):
            torch.mm(matrix, matrix.T, out=product)
        between = now()
        for work in works:
            work.wait()
        for _ in range(messages if GPUS < 2 else 0):
            start().wait()
        done = now()
        if GPUS > 1:
            torch.cuda.synchronize()
        return ms(begun, between), ms(begun, done)

    found = []
    for name, (size, start) in ways.items():
        timed(2, 2, start)
        rounds = [(timed(TIMES, 0, start)[1], timed(0, PRODUCTS, start)[0], timed(TIMES, PRODUCTS, start)[0])
                  for _ in range(ROUNDS)]  # fmt: skip
        alone, products, beside = (statistics.median(each) for each in zip(*rounds, strict=True))
        found.append((name, TIMES * size / 2**30, alone, products, beside))
    return found


if __name__ == "__main__":
    kind = torch.cuda.get_device_name() if GPUS > 1 else "CPU"
    print(f"torch {torch.__version__}, {RANKS} ranks on {kind}, {TIMES} messages in a row")
    for name, size, alone, products, beside in launch(measure, world_size=RANKS, device="cuda" if GPUS > 1 else "cpu")[
        0
    ]:
        line = f"{name:26} {alone:7.1f} ms, {1000 * size / alone:6.2f} GiB/s of payload"
        if GPUS > 1:
            line += f"; products {products:.1f} ms alone, {beside:.1f} beside: {beside - products:+.1f}"
        print(line)
