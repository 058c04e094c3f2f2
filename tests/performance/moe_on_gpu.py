"""What is claimed about experts on one GPU: `python tests/performance/moe_on_gpu.py [--quick]`.

1 grouped products against a loop over experts: are they equal (also with groups of odd sizes, and empty ones), how fast
2 where the time of a layer goes: router, permutation, experts; and what it costs to let the host wait for numbers
3 whole steps of the benchmark's mixture (width 2048, 8 experts of 4096, top-2), with as many layers as fit, beside the
  dense model of as many layers; and with 8 to 64 experts of the same active and total size

Prints as it goes, and as its last line one JSON object. Without a GPU it runs with tiny sizes, which only tries the
script.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from picotron_mini.bench import bench
from picotron_mini.config import MoEConfig, RunConfig
from picotron_mini.launch import RankError
from picotron_mini.mesh import Axis
from picotron_mini.model import moe as moe_module
from picotron_mini.model.costs import parameters
from picotron_mini.model.moe import Experts, MoE, Pool, fits_grouped, local_dispatch
from picotron_mini.model.permute import PLAIN, fused
from picotron_mini.moe.dispatch import plan
from picotron_mini.presets import preset

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
WIDTH, INNER, TOKENS = (2048, 4096, 4096) if CUDA else (32, 64, 64)
REPEATS = 20 if CUDA else 2
BYTES_A_PARAMETER = 18  # bf16 weight, float32 master and gradient, two moments
STATE_SHARE = 0.7  # of the memory, for those; activations have the rest


def milliseconds(work: Callable[[], object]) -> float:
    """Median of one call, after a few."""
    times = []
    for _ in range(3 + REPEATS):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def experts_of(number: int, inner: int) -> Experts:
    run = Experts(MoEConfig(num_experts=number, top_k=1, expert_size=inner), WIDTH)
    for weight in run.parameters():
        nn.init.normal_(weight, std=0.02)
    return run.to(DEVICE, DTYPE)


def with_loop(run: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """The experts one by one, whatever the rule says."""
    rule = moe_module.fits_grouped
    moe_module.fits_grouped = lambda rows, weight: False
    try:
        return run(rows, counts)
    finally:
        moe_module.fits_grouped = rule


def gradients(run: Callable[[Tensor, Tensor], Tensor], module: Experts, rows: Tensor, counts: Tensor) -> list[Tensor]:
    """Output, and gradients of rows and weights, for a fixed gradient of the output."""
    rows = rows.detach().requires_grad_()
    y = run(rows, counts)
    torch.manual_seed(1)
    toward = torch.randn(y.shape, device=y.device).to(y.dtype)
    out = torch.autograd.grad(y, [rows, *module.parameters()], toward)
    return [y.detach(), *out]


def equality() -> dict[str, Any]:
    """Relative errors of both ways against float32, group sizes being awkward."""
    out: dict[str, Any] = {}
    cases = {
        "even": [64] * 8,
        "odd sizes": [1, 63, 17, 129, 5, 7, 211, 79],
        "empty ones": [0, 300, 0, 0, 19, 0, 193, 0],
        "one takes all": [0, 0, 0, 512, 0, 0, 0, 0],
    }
    for name, sizes in cases.items():
        run, counts = experts_of(8, INNER), torch.tensor(sizes, device=DEVICE)
        rows = torch.randn(sum(sizes), WIDTH, device=DEVICE).to(DTYPE)
        wide = experts_of(8, INNER).float()
        wide.load_state_dict({n: w.float() for n, w in run.state_dict().items()})
        truth = gradients(wide, wide, rows.float(), counts)
        errors = {}
        for way, call in (("grouped", run), ("loop", lambda r, c, run=run: with_loop(run, r, c))):
            got = gradients(call, run, rows, counts)
            errors[way] = max(
                float((g.float() - t).abs().max() / t.abs().max().clamp(min=1e-20))
                for g, t in zip(got, truth, strict=True)
            )
        ok = errors["grouped"] <= 2 * errors["loop"] + 1e-6
        out[name] = {**errors, "grouped_used": fits_grouped(rows, run.gate), "ok": ok}
        print(f"grouped against loop, {name}: {errors} {'equal' if ok else 'NOT EQUAL'}", flush=True)
    return out


def products(quick: bool) -> dict[str, Any]:
    """Forward and backward of the experts alone, grouped and in a loop, at one number of rows times inner width."""
    out: dict[str, Any] = {}
    for number in (8, 64) if quick else (8, 16, 32, 64):
        inner, rows_each = 8 * INNER // number, number // 4  # K = number / 4: the same rows times width
        run = experts_of(number, inner)
        rows = torch.randn(TOKENS * rows_each, WIDTH, device=DEVICE).to(DTYPE)
        shares = torch.rand(number) + 0.5
        counts = (shares / shares.sum() * len(rows)).long()
        counts[0] += len(rows) - counts.sum()
        counts = counts.to(DEVICE)
        leaf = rows.detach().requires_grad_()
        toward = torch.randn(leaf.shape, device=DEVICE).to(DTYPE)

        def step(
            call: Callable[[Tensor, Tensor], Tensor], run: Experts = run, leaf: Tensor = leaf, counts: Tensor = counts,
            toward: Tensor = toward,
        ) -> object:  # fmt: skip
            return torch.autograd.grad(call(leaf, counts), [leaf, *run.parameters()], toward)

        def loop(rows: Tensor, counts: Tensor, run: Experts = run) -> Tensor:
            return with_loop(run, rows, counts)

        times = {
            "grouped": milliseconds(lambda step=step, run=run: step(run)),
            "loop": milliseconds(lambda step=step, loop=loop: step(loop)),
        }
        flops = 18 * len(rows) * WIDTH * inner
        out[str(number)] = {
            **times, "rows": len(rows), "inner": inner, "tflops_grouped": flops / times["grouped"] / 1e9,
            "tflops_loop": flops / times["loop"] / 1e9,
        }  # fmt: skip
        print(f"{number} experts of {inner}, {len(rows)} rows, forward and backward: {out[str(number)]}", flush=True)
    return out


def parts_of_a_layer() -> dict[str, Any]:
    """Forward only: the router, the permutation around experts that do nothing, the experts; and the host's waiting."""
    config = MoEConfig(num_experts=8, top_k=2, expert_size=INNER)
    moe = MoE(config, WIDTH, 0)
    for weight in moe.parameters():
        nn.init.normal_(weight, std=0.02)
    moe = moe.to(DEVICE, DTYPE)
    x = torch.randn(1, TOKENS, WIDTH, device=DEVICE).to(DTYPE)
    with torch.no_grad():
        routing = moe.route(x, Pool())
        flat, chosen, weights = x.flatten(0, 1), routing.experts, routing.weights

        def nothing(rows: Tensor, counts: Tensor) -> Tensor:
            return rows

        nothing.gate, nothing.passes = moe.experts.gate, PLAIN  # type: ignore[attr-defined]

        def compiled(rows: Tensor, counts: Tensor) -> Tensor:
            return rows

        compiled.gate, compiled.passes = moe.experts.gate, fused()  # type: ignore[attr-defined]
        alone = Axis("ep", 1, 0, (0,))
        out = {
            "layer": milliseconds(lambda: moe(x)),
            "router": milliseconds(lambda: moe.route(x, Pool())),
            "permutation": milliseconds(lambda: local_dispatch(flat, chosen, weights, nothing, None, chosen.numel())),  # type: ignore[arg-type]
            "permutation_compiled": milliseconds(
                lambda: local_dispatch(flat, chosen, weights, compiled, None, chosen.numel())  # type: ignore[arg-type]
            ),
            "permutation_and_counting": milliseconds(lambda: local_dispatch(flat, chosen, weights, nothing)),  # type: ignore[arg-type]
            "experts": milliseconds(lambda: moe.experts(flat.repeat(2, 1), _even(8, 2 * TOKENS))),
            "plan_with_host_wait": milliseconds(lambda: plan([chosen], alone, 8)),
            "plan_compiled": milliseconds(lambda: plan([chosen], alone, 8, fuse=True)),
        }
    print(f"a layer, forward, {TOKENS} tokens, milliseconds: {out}", flush=True)
    return out


def _even(number: int, rows: int) -> Tensor:
    return torch.full((number,), rows // number, dtype=torch.int64, device=DEVICE)


def fitting(run: RunConfig) -> RunConfig:
    """The run with as many layers as leave `STATE_SHARE` of the memory for the model's states."""
    room = STATE_SHARE * (torch.cuda.get_device_properties(0).total_memory if CUDA else 2**20 * 64)
    layers = run.model.num_layers
    while layers > 1 and BYTES_A_PARAMETER * parameters(replace(run.model, num_layers=layers)) > room:
        layers -= 1
    return replace(run, model=replace(run.model, num_layers=layers))


def steps(name: str, run: RunConfig) -> dict[str, Any]:
    """tokens/s of whole training steps on one device."""
    what = f"{name}, {run.model.num_layers} layers, {parameters(run.model) / 1e9:.2f} B parameters"
    try:
        result = bench(run, warmup=3 if CUDA else 1)
    except RankError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        print(f"{what}: out of memory", flush=True)
        return {"name": name, "layers": run.model.num_layers, "out_of_memory": True}
    mfu = f"MFU {100 * result['mfu']:.1f} %, " if result["mfu"] else ""
    peak = f"{result['peak_memory_bytes'] / 2**30:.1f} GiB" if result["peak_memory_bytes"] else ""
    print(f"{what}: {result['tokens_per_second_per_rank']:,.0f} tokens/s, {mfu}{peak}", flush=True)
    return {"name": name, "layers": run.model.num_layers, **result}


def main() -> None:
    quick = "--quick" in sys.argv
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'no GPU: tiny sizes'}", flush=True)
    torch.manual_seed(0)
    results: dict[str, Any] = {"equality": equality(), "products": products(quick), "layer": parts_of_a_layer()}
    run = replace(preset("bench-moe"), layout="dp=1")
    if not CUDA:
        small = replace(
            run.model, hidden_size=WIDTH, intermediate_size=2 * INNER, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=8, vocab_size=300, moe=replace(run.model.moe, expert_size=INNER),
        )  # fmt: skip
        run = replace(
            run,
            model=small,
            train=replace(run.train, seq_len=32, dtype="float32", compile=False, steps=2, device="cpu"),
        )
    assert run.model.moe is not None
    run = replace(fitting(run), train=replace(run.train, micro_batch_size=2, micro_batches=4))
    results["steps"] = [steps("8 experts, top-2", run)]
    results["steps"].append(steps("dense, as many layers", replace(run, model=replace(run.model, moe=None))))
    for number in () if quick else (16, 32, 64):
        finer = replace(
            run.model.moe, num_experts=number, top_k=number // 4, expert_size=8 * run.model.moe.expert_size // number
        )
        results["steps"].append(
            steps(f"{number} experts, top-{number // 4}", replace(run, model=replace(run.model, moe=finer)))
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
