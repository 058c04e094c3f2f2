"""How much of a tensor-parallel exchange its products hide: on paper, and in which order a rank really works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...config import RunConfig
from ...legality import resolve
from ...mesh import Mesh
from ...parallel import overlap
from ...parallel.parallelize import parallelize
from ...training.step import compute_gradients
from ...verify import MODEL, TRAIN, make_batches


def exposed(product: float, exchange: float, parts: int) -> float:
    """Time for which an exit is waited for after its last product: part j travels behind the products that follow.

    Args:
        product, exchange: of all parts together, in the same unit. Parts are equal and cost no latency.
    """
    arrived = 0.0
    for part in range(1, parts + 1):
        computed = product * part / parts
        arrived = max(arrived, computed) + exchange / parts
    return arrived - product


def order_of_work(sequence_parallel: bool, parts: int) -> list[str]:
    """What a rank of tp=2 starts, waits for and computes in one step of one layer, in order; for `launch`.

    Named are exchanges when they start, "wait", and "dW", the gradient of one weight.
    """
    seen: list[str] = []
    for name in ("all_reduce_async", "reduce_scatter_async", "all_gather_async"):
        setattr(overlap, name, _noted(seen, name.removesuffix("_async"), getattr(overlap, name)))
    overlap._weight_gradient = _noted(seen, "dW", overlap._weight_gradient)
    train = replace(TRAIN, tensor_overlap=parts, sequence_parallel=sequence_parallel, micro_batches=1, steps=1)
    run = resolve(RunConfig("tp=2", model=replace(MODEL, num_layers=1), train=train))
    parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
    compute_gradients(parallel, make_batches(run))
    return seen


def _noted(seen: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which now notes its calls and the waits for what it started."""

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("wait")
            self.work.wait()

    def watched(*args: Any) -> Any:
        seen.append(name)
        result = function(*args)
        return Watched(result) if hasattr(result, "wait") else result

    return watched
