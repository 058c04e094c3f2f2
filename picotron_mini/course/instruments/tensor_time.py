"""When tensor parallelism pays: the time that a layer's exchanges take beside its products, derived and measured.

For one layer and one token, forward and backward, on n ranks with R useful flops a second each and links of b bytes
a second, a ring being behind each of the four all_reduces of D numbers of g bytes:

    products    3 flops / (n R)             flops: the layer's forward, `model.costs.layer_flops`
    exchanges   4 * 2 (n-1)/n * D g / b

    exchanges / products  =  8 (n - 1) D g R / (3 flops b)

The batch cancels, since both grow with the tokens. flops is about 24 D^2 + 4 D T for a layer with F = 8/3 D, so the
ratio falls as 1 / D and grows as n - 1. Latency is left out: it adds to the exchanges of small batches.

Legend: D model width, F inner width, T tokens of a sequence, n ranks of the tp axis.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...collectives import barrier
from ...config import MeshShape, ModelConfig
from ...mesh import Axis, Mesh
from ...model.costs import layer_flops
from ...model.gpt import GPT, init_weights
from ...parallel.tensor import tensor_parallel

HEAD_DIM = 16


def exchange_ratio(model: ModelConfig, seq_len: int, tp: int, itemsize: int, flops: float, link: float) -> float:
    """Seconds of a layer's exchanges over seconds of its products, by the formula above.

    Args:
        itemsize: bytes of a number that is exchanged.
        flops: useful operations a second of one rank.
        link: bytes a second that a rank sends.
    """
    products = 3 * layer_flops(model, seq_len) / (tp * flops)
    exchanges = 4 * 2 * (tp - 1) / tp * model.hidden_size * itemsize / link
    return exchanges / products


def layer_of_width(width: int) -> ModelConfig:
    """A Llama-like layer: heads of 16 with keys of their own, and an inner width of 8/3 of the width, rounded to 8."""
    heads = width // HEAD_DIM
    inner = 8 * round(width / 3)
    return ModelConfig(
        vocab_size=1, hidden_size=width, intermediate_size=inner, num_layers=1, num_heads=heads, num_kv_heads=heads,
        head_dim=HEAD_DIM,
    )  # fmt: skip


def _block(model: ModelConfig, axis: Axis) -> GPT:
    block = GPT(model, layers=[0], embed=False, head=False)
    init_weights(block, 0)
    tensor_parallel(block, axis)
    return block


def _seconds(block: GPT, x: torch.Tensor, axis: Axis) -> float:
    """One forward and backward, all ranks of the axis at the same time."""
    block.zero_grad()
    barrier(axis)
    start = time.perf_counter()
    block(x).sum().backward()
    return time.perf_counter() - start


def block_times(
    widths: Sequence[int], sizes: Sequence[int], seq_len: int, rounds: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """Best seconds of one block's forward and backward on this rank; call it on max(sizes) ranks.

    All cases are measured in turn, round after round, so that a disturbance of the machine hits all of them. The
    second time is that of the same products without a word: a block that is as small as the rank's slice.

    Returns:
        (width, tp) -> (with exchanges, without), for the sizes that this rank takes part in.
    """
    ranks = max(sizes)
    axes = {tp: Mesh.build(MeshShape(dp=ranks // tp, tp=tp))["tp"] for tp in sizes}
    everyone = Mesh(MeshShape(tp=ranks), axes[ranks].ranks[axes[ranks].index])["world"]
    alone = Axis("tp", 1, 0, (everyone.index,))
    cases = {}
    for width in widths:
        model = layer_of_width(width)
        for tp, axis in axes.items():
            slice_ = replace(
                model, num_heads=model.num_heads // tp, num_kv_heads=model.num_kv_heads // tp,
                intermediate_size=model.intermediate_size // tp,
            )  # fmt: skip
            cases[width, tp] = (axis, _block(model, axis), _block(slice_, alone))
    best = {case: (float("inf"), float("inf")) for case in cases}
    for _ in range(rounds):
        for (width, tp), (axis, with_, without) in cases.items():
            barrier(everyone)
            if everyone.index >= tp:
                continue  # the first tp ranks work, and the others leave them the machine
            x = torch.ones(1, seq_len, width, requires_grad=True)
            times = _seconds(with_, x, axis), _seconds(without, x, axis)
            best[width, tp] = (min(best[width, tp][0], times[0]), min(best[width, tp][1], times[1]))
    barrier(everyone)
    return {case: times for case, times in best.items() if everyone.index < case[1]}
