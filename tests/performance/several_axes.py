"""Three and four axes at once, on all the GPUs there are: `python tests/performance/several_axes.py [--tiny]`.

Made for one host with eight GPUs, in one call of less than nine minutes; it takes any even number. The 1.81 billion
parameters of the `bench` preset, and the mixture of experts of the same active size, on one axis and on several. For
each layout: tokens/s per GPU, MFU, peak memory, the predicted step time beside the measured one, the bytes that rank 0
counted beside the predicted ones, and how much communication was exposed.

`--tiny`: the same layouts of tiny models; without a GPU as eight gloo ranks, which tries the script and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from picotron_mini.bench import bench
from picotron_mini.calibrate import calibrate
from picotron_mini.config import ConfigError, ModelConfig, MoEConfig, RunConfig
from picotron_mini.launch import RankError
from picotron_mini.legality import resolve
from picotron_mini.mesh import coordinates
from picotron_mini.parallel.machine import Machine, to_json
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.plan import plan, settings
from picotron_mini.parallel.predict import predict
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.presets import preset

SMALL = ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=8, num_kv_heads=8)
LIMIT = 480.0  # seconds, after which no further layout is begun


def layouts(ranks: int) -> list[tuple[str, dict[str, Any]]]:
    """What is run on so many ranks: a layout and its settings. A long sequence is 32,768 tokens, or as tiny as it goes.

    Half of the ranks, and a quarter, are what is left for data where tensor, pipeline or context parallel has two.
    """
    half, quarter = ranks // 2, ranks // 4
    out: list[tuple[str, dict[str, Any]]] = [
        (f"dp={ranks}", {"micro_batch_size": 4, "micro_batches": 4}),
        (f"dp={ranks}", {"micro_batch_size": 4, "micro_batches": 4, "zero": 3}),
        (f"dp={ranks},ep={ranks}", {"micro_batch_size": 2, "micro_batches": 4, "experts": True}),
    ]
    three = {"micro_batch_size": 4, "micro_batches": 8, "schedule": "interleaved", "sequence_parallel": True}
    long = {"micro_batch_size": 1, "micro_batches": 1, "recompute": "full", "sequence_parallel": True, "long": True}
    if quarter:
        out.append((f"dp={quarter},tp=2,pp=2", three))
        out.append((f"dp={quarter},tp=2,cp=2", long))
        out.append((f"dp={half},tp=2", {"micro_batch_size": 4, "micro_batches": 4, "sequence_parallel": True}))
    return out


def base(tiny: bool, experts: bool, long: bool) -> RunConfig:
    run = preset("bench-moe" if experts else "bench")
    train = replace(run.train, seq_len=32768) if long else run.train
    if not tiny:
        return replace(run, train=train)
    moe = MoEConfig(num_experts=8, top_k=2, expert_size=32) if experts else None
    cuda = torch.cuda.is_available()
    small = {"device": "cuda" if cuda else "cpu", "dtype": "float32", "compile": False, "steps": 2}
    train = replace(train, seq_len=128 if long else 32, **small)
    return replace(run, model=replace(SMALL, moe=moe), train=train)


def wanted(layout: str, kw: dict[str, Any], tiny: bool, gpus: int) -> RunConfig:
    sizes = {name: value for name, value in kw.items() if name not in ("experts", "long")}
    run = base(tiny, bool(kw.get("experts")), bool(kw.get("long")))
    run = replace(run, layout=layout, train=replace(run.train, **{"batch_size": 0, **sizes}))
    return resolve(run, gpus=gpus)


def row(run: RunConfig, machine: Machine) -> dict[str, Any]:
    """One layout: what was predicted, and what ran."""
    said = predict(run, machine)
    cuda = run.train.device == "cuda"
    first = coordinates(run.mesh, 0)
    result: dict[str, Any] = {"layout": run.layout, "settings": settings(run), "predicted_seconds": said.seconds}
    result["predicted_memory_bytes"] = said.memory_bytes
    if run.mesh.ep == 1:  # where tokens go is known only when the router has decided
        sent = predict_step(run, layout_of(run), first)
        result["predicted_bytes"] = {f"{axis} {op}": n for (axis, op), n in sent.items()}
    try:
        result |= bench(run, profile=cuda)
    except RankError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        return result | {"out_of_memory": True}
    if "predicted_bytes" in result:
        result["bytes_as_predicted"] = result["bytes_per_step"] == result["predicted_bytes"]
    return result


def show(result: dict[str, Any]) -> None:
    name = f"{result['layout']:<22}{result['settings']:<62}"
    if result.get("out_of_memory"):
        print(f"{name}out of memory; {result['predicted_memory_bytes'] / 2**30:.1f} GiB were predicted", flush=True)
        return
    seconds, seen = statistics.median(result["step_seconds"]), result["exposed"]
    mfu = f"{100 * result['mfu']:5.1f} %" if result["mfu"] else "not known"
    shown = f"{1000 * seen['exposed']:.0f} of {1000 * seen['step']:.0f} ms" if seen else "not profiled"
    peak, expected = (result[key] / 2**30 for key in ("peak_memory_bytes", "predicted_memory_bytes"))
    print(
        f"{name}{result['tokens_per_second_per_rank']:>9,.0f} tokens/s per rank   MFU {mfu}   "
        f"peak {peak:.2f} GiB (predicted {expected:.2f})   "
        f"step {seconds:.3f} s (predicted {result['predicted_seconds']:.3f})   "
        f"bytes as predicted: {result.get('bytes_as_predicted', 'not predicted')}   exposed {shown}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true")
    tiny, gpus = parser.parse_args().tiny, torch.cuda.device_count()
    if not gpus and not tiny:
        raise SystemExit("no GPU is visible to torch; --tiny tries the script on the CPU")
    ranks, started, results = gpus or 8, time.monotonic(), []
    where = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{ranks} gloo ranks on {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}", flush=True)
    alone = wanted("dp=1", {"micro_batch_size": 4, "micro_batches": 1}, tiny, gpus)
    machine = replace(calibrate(alone, min(ranks, gpus or 2)), ranks_per_host=ranks)
    print(f"this machine: {to_json(machine)}", flush=True)
    runs = [wanted(layout, kw, tiny, gpus) for layout, kw in layouts(ranks)]
    best = plan(replace(base(tiny, False, False), layout="auto"), ranks, machine).ranked
    if best:
        runs.append(best[0].run)
        print(f"plan ranks first: {best[0].run.layout} {settings(best[0].run)}", flush=True)
    for run in runs:
        if time.monotonic() - started > LIMIT:
            print(f"{run.layout} {settings(run)}: left out, there was no time for it", flush=True)
            continue
        results.append(row(run, machine))
        show(results[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
