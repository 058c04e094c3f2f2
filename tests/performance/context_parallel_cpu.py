"""Attention over one sequence, shared in three ways by CPU ranks; and how unequal the ranks' shares are.

    python tests/performance/context_parallel_cpu.py

First, in one process, the products of each of four ranks are timed in turn, without any message: one run of the
sequence a rank, and head-tail chunks. Then two ranks run forward and backward by gathering all keys, by the ring and
by Ulysses, against one rank with the whole sequence. Best of the rounds, which go through all ways in turn.
"""

from __future__ import annotations

import os
import platform
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.collectives import gather_from
from picotron_mini.config import MeshShape
from picotron_mini.launch import launch
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import attend
from picotron_mini.parallel.attention_kernels import attend_with_lse
from picotron_mini.parallel.chunks import calls
from picotron_mini.parallel.context import ring_attention
from picotron_mini.parallel.ulysses import ulysses_attention

HEADS, KV_HEADS, WIDTH, ROUNDS = 8, 2, 64, 12


def inputs(tokens: int) -> list[Tensor]:
    """q [1, H, tokens, Dh], k and v [1, Hkv, tokens, Dh], float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, WIDTH, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def shares(seq_len: int, cp: int) -> dict[str, list[float]]:
    """Seconds of each rank's forward products, with one run a rank and with head-tail chunks."""
    tokens, chunk = seq_len // cp, seq_len // (2 * cp)
    q, k, v = inputs(tokens)

    def runs(rank: int) -> None:
        for source in range(rank + 1):
            attend_with_lse(q, k, v, causal=source == rank)

    def headtail(rank: int) -> None:
        for source in range(cp):
            for call in calls(rank, source, chunk, causal=True):
                attend_with_lse(q[:, :, call.queries], k[:, :, call.keys], v[:, :, call.keys], causal=call.causal)

    best = {"one run a rank": [float("inf")] * cp, "head-tail chunks": [float("inf")] * cp}
    for _ in range(ROUNDS):
        for name, fn in (("one run a rank", runs), ("head-tail chunks", headtail)):
            for rank in range(cp):
                start = time.perf_counter()
                fn(rank)
                best[name][rank] = min(best[name][rank], time.perf_counter() - start)
    return best


def gathered(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """Attention of the axis.index-th run of tokens to all keys."""
    k, v = gather_from(k, axis, 2), gather_from(v, axis, 2)
    here = torch.arange(q.shape[2]) + axis.index * q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(k.shape[2]) <= here[:, None], enable_gqa=True)


def ways(seq_len: int, cp: int) -> dict[str, float]:
    """In a rank: seconds of forward and backward, by each way; with cp=1 of plain attention."""
    axis = Mesh.build(MeshShape(cp=cp))["cp"]
    each = {
        "gathered": lambda q, k, v: gathered(q, k, v, axis),
        "ring": lambda q, k, v: ring_attention(q, k, v, axis),
        "ulysses": lambda q, k, v: ulysses_attention(q, k, v, axis, None, attend),
    }
    chosen = {"one rank": attend} if cp == 1 else each
    best = dict.fromkeys(chosen, float("inf"))
    for _ in range(ROUNDS):
        for name, fn in chosen.items():
            q, k, v = (x.requires_grad_() for x in inputs(seq_len // cp))
            start = time.perf_counter()
            fn(q, k, v).sum().backward()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Print the two tables."""
    torch.set_num_threads(1)
    print(f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, gloo, float32")
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("\nforward products of each of 4 ranks, 2048 tokens, of the mean of all ranks with head-tail chunks")
    found = shares(2048, 4)
    mean = sum(found["head-tail chunks"]) / 4
    for name, seconds in found.items():
        print(f"{name:18}", "  ".join(f"{s / mean:.2f}" for s in seconds))
    print("\nforward and backward on 2 ranks, of one rank's time with the whole sequence")
    for seq_len in (512, 1024, 2048):
        one = launch(ways, seq_len, 1, world_size=1)[0]["one rank"]
        two = launch(ways, seq_len, 2, world_size=2)
        print(f"{seq_len:>6} tokens ", "  ".join(f"{name} {max(r[name] for r in two) / one:.2f}" for name in two[0]))
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
