"""A mixture of experts on the CPU: what permuting costs beside the experts' own products, and balance over seeds.

    python tests/performance/moe_cpu.py

First, in one process with one thread, forward and backward of three ways through the same experts: the experts alone
on rows that are sorted already, the library's dispatch (sort, permute, experts, un-permute, weigh), and the naive way
(every expert on every token, most results thrown away). Best of the rounds, which go through all ways in turn; ratios.

Then the lesson's tiny run, with each way of balancing, for eight seeds: how unequal the load is at the end, what the
experts tell of the subject, and the loss on held-out text.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.config import MoEConfig
from picotron_mini.course.moe_runs import small, train
from picotron_mini.model.moe import Experts, dispatch_all

ROUNDS, SEEDS = 12, 8


def naive(x: Tensor, experts: Tensor, weights: Tensor, run: Experts) -> Tensor:
    """Every expert on every token; what was not chosen gets weight 0."""
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(run.gate, run.up, run.down, strict=True)):
        weight = (weights * (experts == e)).sum(1, keepdim=True)  # [N, 1]
        y = y + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return y


def ways(tokens: int, width: int, config: MoEConfig, backward: bool) -> dict[str, float]:
    """Seconds of each way."""
    torch.manual_seed(0)
    run = Experts(config, width)
    for weight in run.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(tokens, width, requires_grad=backward)
    experts = torch.rand(tokens, config.num_experts).topk(config.top_k).indices
    weights = torch.rand(tokens, config.top_k).softmax(-1)
    counts = experts.flatten().bincount(minlength=config.num_experts)
    rows = x.detach()[experts.flatten().argsort(stable=True) // config.top_k].requires_grad_(backward)
    each: dict[str, Callable[[], Tensor]] = {
        "experts alone": lambda: run(rows, counts),
        "dispatch": lambda: dispatch_all(x, experts, weights, run),
        "naive": lambda: naive(x, experts, weights, run),
    }
    assert torch.allclose(each["dispatch"](), each["naive"](), atol=1e-5)
    best = dict.fromkeys(each, float("inf"))
    for _ in range(ROUNDS):
        for name, fn in each.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                out = fn()
            if backward:
                out.sum().backward()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def seeds() -> None:
    """The lesson's runs, many times."""
    one = MoEConfig(num_experts=8, top_k=1, expert_size=64, dense_layers=1, normalize=False, balance="none")
    kinds = {
        "none": one,
        "z-loss 0.001": replace(one, z_weight=0.001),
        "aux 0.01, global": replace(one, balance="aux"),
        "aux 0.01, sequence": replace(one, balance="aux", aux_scope="sequence"),
        "bias 0.01": replace(one, balance="bias", bias_rate=0.01),
    }
    print(f"\nthe lesson's run, 150 steps, {SEEDS} seeds: mean (smallest to largest)")
    print(f"{'':20}{'busiest, of its share':>26}{'idlest':>26}{'bits':>24}{'held-out loss':>26}")
    for name, moe in {"dense": None, **kinds}.items():
        runs = [train(small(moe), seed=seed) for seed in range(SEEDS)]
        columns = [[run.bits for run in runs], [run.held_out for run in runs]]
        if moe is not None:
            columns = [[float(r.late_load.max()) for r in runs], [float(r.late_load.min()) for r in runs], *columns]
        told = [f"{sum(c) / len(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        print(f"{name:20}", "".join(f"{t:>26}" for t in (["", ""] if moe is None else []) + told), flush=True)


def main() -> None:
    """Print both."""
    torch.set_num_threads(1)
    print(f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, float32, one thread")
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("\nof the experts' own time, 8 experts of which a token passes 2")
    for tokens, width, inner in ((4096, 128, 176), (4096, 256, 512), (2048, 512, 1024)):
        config = MoEConfig(num_experts=8, top_k=2, expert_size=inner)
        for backward in (False, True):
            best = ways(tokens, width, config, backward)
            told = "  ".join(f"{name} {best[name] / best['experts alone']:.2f}" for name in best)
            what = "forward and backward" if backward else "forward"
            print(f"{tokens} tokens, width {width}, inner {inner}, {what:20} {told}", flush=True)
    seeds()
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
