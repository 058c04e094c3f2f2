"""How fast a layout trains: whole steps, clipping and optimizer included, on random tokens.

tokens/s per rank = global tokens / median step time / ranks.   MFU = tokens/s per rank * flops per token / peak, with
6 N + 12 L H Dh T flops per token (no causal halving, embeddings counted) and the data sheet's dense bf16 peak.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from .calibrate import with_bucket
from .collectives import ledger
from .config import ConfigError, RunConfig
from .data.loader import Batch
from .launch import first_rank, launch
from .legality import notices, resolve
from .mesh import Mesh
from .model.costs import flops_per_token, parameters
from .monitoring.exposed import profiled
from .monitoring.metrics import memory_bytes
from .monitoring.peak import peak_flops
from .monitoring.units import bytes_text
from .parallel.parallelize import parallelize
from .training.optimizer import make_optimizer
from .training.step import settle, train_step


def bench(run: RunConfig, warmup: int = 3, profile: bool = False) -> dict[str, Any]:
    """Measure `run.train.steps` steps after `warmup` steps. Under `torchrun` every rank calls it.

    Args:
        profile: run one more step under a profiler, and say how much communication was exposed (GPUs only).

    Returns:
        Plain data: layout, parameters, `tokens_per_second_per_rank`, `step_seconds` (all measured ones), `mfu` (None
        on the CPU), `peak_memory_bytes` of rank 0, `bytes_per_step` of rank 0, `matmul_tflops` of the machine (an
        8192 x 8192 x 8192 bf16 product; None on the CPU), `exposed` of rank 0 (None without `profile`), and the
        resolved settings that matter.

    Raises:
        ConfigError: it cannot run.
    """
    if warmup < 0:
        raise ConfigError(f"warmup={warmup} must be 0 or above")
    vocab_size = run.model.vocab_size or run.data.expected_vocab_size
    gpus = torch.cuda.device_count()
    run = resolve(with_bucket(replace(run, model=replace(run.model, vocab_size=vocab_size)), gpus), gpus=gpus)
    size, train = run.mesh.world_size, run.train
    if profile and train.device != "cuda":
        raise ConfigError("a profile tells kernels of compute and communication apart, and only GPUs have both")
    for notice in notices(run) if first_rank() else ():
        print(f"note: {notice}", file=sys.stderr, flush=True)
    ranks = launch(_on_rank, run, warmup, profile, world_size=size, device=train.device, timeout=None, output="hide")
    seconds = ranks[0]["step_seconds"]
    speed = train.batch_size * train.seq_len / statistics.median(seconds) / size
    peak = ranks[0]["peak_flops"]
    return {
        "layout": run.layout,
        "device": ranks[0]["device"],
        "torch": torch.__version__,
        "dtype": train.dtype,
        "compile": train.compile,
        "parameters": parameters(run.model),
        "active_parameters": parameters(run.model, active=True),
        "max_load": ranks[0]["max_load"],
        "seq_len": train.seq_len,
        "micro_batch_size": train.micro_batch_size,
        "micro_batches": train.micro_batches,
        "bucket_mb": train.bucket_mb,
        "tokens_per_second_per_rank": speed,
        "mfu": speed * flops_per_token(run.model, train.seq_len) / peak if peak else None,
        "peak_memory_bytes": ranks[0]["peak_memory_bytes"],
        "bytes_per_step": ranks[0]["bytes_per_step"],
        "matmul_tflops": ranks[0]["matmul_tflops"],
        "step_seconds": seconds,
        "exposed": ranks[0]["exposed"],
    }


def _on_rank(run: RunConfig, warmup: int, profile: bool) -> dict[str, Any]:
    train, mesh = run.train, Mesh.build(run.mesh)
    cuda = train.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if cuda:
        torch.set_float32_matmul_precision("high")
    matmul = _matmul_tflops(device) if cuda else None
    parallel = parallelize(run, mesh, device)
    optimizer = make_optimizer(parallel.trained, train)
    generator = torch.Generator().manual_seed(train.seed + mesh["dp"].index)
    seconds = []
    for step in range(warmup + train.steps):
        if step == warmup:
            settle()
        batches = [_random(run, generator).to(device) for _ in range(train.micro_batches)]
        _wait(device)
        start = time.perf_counter()
        with ledger.recording() as sent:
            result = train_step(parallel, optimizer, batches)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    exposed = profiled(lambda: train_step(parallel, optimizer, batches)).to_dict() if profile else None
    every: list[list[float]] = [[]] * mesh.shape.world_size
    dist.all_gather_object(every, seconds[warmup:])
    return {
        "step_seconds": [max(times) for times in zip(*every, strict=True)],  # a step is as long as the slowest rank's
        "max_load": result.routing.metrics()["moe_max_load"] if result.routing else None,
        "peak_memory_bytes": memory_bytes(device),
        "bytes_per_step": {f"{axis} {op}": n for (axis, op), n in sent.items()},
        "peak_flops": peak_flops(device),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "matmul_tflops": matmul,
        "exposed": exposed,
    }


def _random(run: RunConfig, generator: torch.Generator) -> Batch:
    shape = (run.train.micro_batch_size, run.train.seq_len)
    tokens = torch.randint(run.model.vocab_size, shape, generator=generator)
    targets = torch.randint(run.model.vocab_size, shape, generator=generator)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return Batch(tokens, targets, positions, torch.zeros_like(tokens))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_tflops(device: torch.device, n: int = 8192) -> float:
    """What this very machine reaches in a plain bf16 product of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1000)
    return 2 * n**3 / statistics.median(times[2:]) / 1e12


def table(result: dict[str, Any]) -> Table:
    """The result as a table for a terminal."""
    out = Table(title=f"{result['layout']}, {result['device']}, torch {result['torch']}", title_justify="left")
    for column in ("", "value"):
        out.add_column(column)
    seconds = result["step_seconds"]
    out.add_row("parameters", f"{result['parameters']:,}")
    if result.get("max_load") is not None:
        out.add_row("parameters that a token passes", f"{result['active_parameters']:,}")
        out.add_row("busiest expert, over its even share", f"{result['max_load']:.2f}")
    out.add_row("bucket", f"{result['bucket_mb']:.3g} MiB")
    out.add_row("tokens/s per rank", f"{result['tokens_per_second_per_rank']:,.0f}")
    out.add_row(
        "MFU (6N + 12 L H Dh T)", f"{100 * result['mfu']:.1f} %" if result["mfu"] else "not known on this device"
    )
    out.add_row(
        "step, median (min to max)", f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
    )
    out.add_row("peak memory", bytes_text(result["peak_memory_bytes"]))
    for name, number in result["bytes_per_step"].items():
        out.add_row(f"sent each step: {name}", f"{number:,} bytes")
    if result["matmul_tflops"]:
        out.add_row("8192^3 bf16 product here", f"{result['matmul_tflops']:.0f} TFLOP/s")
    if result.get("exposed"):
        seen = result["exposed"]
        for part in ("compute", "communication", "exposed", "idle"):
            out.add_row(f"profiled step: {part}", f"{seen[part]:.3f} s ({100 * seen[part] / seen['step']:.1f} %)")
        for name, seconds in seen["kernels"]:
            out.add_row(f"    {name[:60]}", f"{seconds:.3f} s")
    return out
