"""What hiding the exchanges of tensor parallelism is worth: python tests/performance/tensor_overlap.py

On GPUs the model of the `bench` preset over all of them, else a small one over 2 CPU ranks with a thread each. For each
number of parts, with and without sequence parallelism: the median step, and the exposed time, which is what the step
takes longer than one whose exchanges between tp ranks are left out (and whose numbers are therefore wrong).
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from picotron_mini.config import ModelConfig, RunConfig, TrainConfig
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.presets import preset
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step
from picotron_mini.verify import make_batches

SMALL = RunConfig(
    model=ModelConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_layers=4, num_heads=8, num_kv_heads=8
    ),
    train=TrainConfig(seq_len=512, micro_batch_size=2, device="cpu"),
)


class _Nothing:
    def wait(self) -> None: ...


def _leave_out() -> None:
    """Let the exchanges between tp ranks take no time; tensors keep their shapes."""
    from picotron_mini.collectives import operators
    from picotron_mini.parallel import overlap

    def reduced(x: torch.Tensor, key: str) -> torch.Tensor:
        return x.clone()

    def gathered(x: torch.Tensor, key: str, size: int) -> torch.Tensor:
        return x.repeat(size, *[1] * (x.ndim - 1))

    def scattered(x: torch.Tensor, key: str, size: int) -> torch.Tensor:
        return x.chunk(size)[0].clone()

    operators.all_reduce, operators.all_gather, operators.reduce_scatter = reduced, gathered, scattered
    for name in ("all_reduce_async", "all_gather_async", "reduce_scatter_async"):
        setattr(overlap, name, lambda *_: _Nothing())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_rank(runs: list[RunConfig], without: bool, steps: int) -> list[list[float]]:
    """Seconds of each step of each run; rounds of all runs, so that a slow minute hits all alike."""
    torch.set_num_threads(1)
    if without:
        _leave_out()
    mesh = Mesh.build(runs[0].mesh)
    cuda = runs[0].train.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    out: list[list[float]] = []
    for run in runs:
        parallel = parallelize(run, mesh, device)
        optimizer = make_optimizer(parallel.trained, run.train)
        batch = make_batches(replace(run, train=replace(run.train, steps=1)))[0].to(device)
        size = run.train.micro_batch_size
        batches: list[Any] = [
            type(batch)(*(getattr(batch, f)[k * size : (k + 1) * size] for f in vars(batch)))
            for k in range(run.train.micro_batches)
        ]
        out.append([])
        for _ in range(steps + 2):
            _wait(device)
            start = time.perf_counter()
            train_step(parallel, optimizer, batches)
            _wait(device)
            out[-1].append(time.perf_counter() - start)
        del parallel, optimizer
        if cuda:
            torch.cuda.empty_cache()
    return [seconds[2:] for seconds in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    base, size = (preset("bench"), gpus) if gpus > 1 else (SMALL, 2)
    runs = []
    for sequence_parallel in (False, True):
        for parts in args.parts:
            train = replace(base.train, tensor_overlap=parts, sequence_parallel=sequence_parallel)
            runs.append(resolve(replace(base, layout=f"tp={size}", train=train), gpus=gpus if gpus > 1 else 0))
    device = runs[0].train.device
    measured = {}
    for without in (True, False):
        ranks = launch(_on_rank, runs, without, args.steps, world_size=size, device=device, timeout=None, output="hide")
        measured[without] = [[max(step) for step in zip(*of, strict=True)] for of in zip(*ranks, strict=True)]
    print(
        f"torch {torch.__version__}, tp={size}, {torch.cuda.get_device_name() if gpus > 1 else 'CPU, a thread a rank'}"
    )
    rows = []
    for run, bare, full in zip(runs, measured[True], measured[False], strict=True):
        step, least = statistics.median(full), statistics.median(bare)
        row = {
            "sequence_parallel": run.train.sequence_parallel,
            "parts": run.train.tensor_overlap,
            "step_seconds": step,
            "without_exchanges": least,
            "exposed": step - least,
            "tokens_per_second_per_rank": run.train.batch_size * run.train.seq_len / step / size,
        }
        rows.append(row)
        print(
            f"sequence_parallel={run.train.sequence_parallel!s:5} parts={run.train.tensor_overlap}: step {step:.3f} s, "
            f"without exchanges {least:.3f}, exposed {step - least:.3f}, "
            f"{row['tokens_per_second_per_rank']:,.0f} tokens/s per rank",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
