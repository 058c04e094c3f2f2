"""Where the time of a training step goes on one CPU core, against the flops of the formulas.

    python tests/performance/model_and_its_costs_cpu.py

Not a test: it prints numbers for summary/01_model_and_its_costs.md. What is compared is measured in turn, round after
round, so that a disturbance of the machine hits all of it; the best round of each counts.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from picotron_mini.config import ModelConfig
from picotron_mini.model import costs
from picotron_mini.model.generate import generate
from picotron_mini.model.gpt import GPT, attend, init_weights

ROUNDS = 6
MODEL = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=32
)
ROWS = 1


def naive_attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf")).softmax(-1) @ v


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step_times(attention: Callable[..., Tensor], length: int) -> Callable[[], tuple[float, float, float]]:
    """Makes a function that runs one step: seconds of forward, backward and AdamW."""
    model = GPT(MODEL)
    init_weights(model, 0)
    for block in model.layers.values():
        block.attention.attend = attention
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tokens = torch.randint(MODEL.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))

    def one() -> tuple[float, float, float]:
        start = time.perf_counter()
        loss = model.loss(model(tokens), tokens)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        return middle - start, end - middle, seconds(optimizer.step)

    return one


def without_cache(model: GPT, tokens: Tensor, new: int) -> Tensor:
    for _ in range(new):
        with torch.no_grad():
            tokens = torch.cat([tokens, model.logits(model(tokens)[:, -1:]).argmax(-1)], dim=1)
    return tokens


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread of {os.cpu_count()} cores")
    print(f"{costs.parameters(MODEL):,} float32 weights, {ROWS} sequence, {ROUNDS} rounds, the best counts")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")

    a, b = torch.randn(2, 1024, 1024)
    ways = {(n, T): step_times(f, T) for T in (128, 512, 1024) for n, f in (("fused", attend), ("naive", naive_attend))}
    products: list[float] = []
    times: dict[tuple[str, int], list[tuple[float, float, float]]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        products += [seconds(lambda: a @ b) for _ in range(5)]
        for way, one in ways.items():
            taken = one()
            if round_:  # the first allocates
                times[way].append(taken)
    peak = 2 * 1024**3 / min(products)
    print(f"float32 product 1024^3: {peak / 1e9:.1f} GFLOP/s\n")
    print("attention  length  forward ms  backward ms  AdamW ms  backward/forward  share of the product's speed")
    for (name, length), runs in times.items():
        forward, backward, update = (min(run[i] for run in runs) for i in range(3))
        flops = ROWS * length * costs.flops_per_token(MODEL, length)
        share = flops / (forward + backward + update) / peak
        numbers = f"{1e3 * forward:10.1f}  {1e3 * backward:11.1f}  {1e3 * update:8.1f}  {backward / forward:16.2f}"
        print(f"{name:9}  {length:6}  {numbers}  {100 * share:6.1f} %")

    model = GPT(MODEL)
    init_weights(model, 0)
    prompt = torch.zeros(1, 8, dtype=torch.int64)
    new = 100
    both: list[tuple[float, float]] = []
    for _ in range(2):
        with_it = seconds(lambda: generate(model, prompt, new, temperature=0))
        both.append((with_it, seconds(lambda: without_cache(model, prompt, new))))
    assert torch.equal(generate(model, prompt, new, temperature=0), without_cache(model, prompt, new))
    with_it, without = (min(pair[i] for pair in both) for i in (0, 1))
    print(f"\n{new} tokens after {prompt.shape[1]}: with the cache {with_it:.2f} s, without {without:.2f} s")
