"""What is claimed about GPUs, row by row: `python tests/performance/on_gpu.py [--list] [--only TEXT ...] [--limit S]`.

Prints a table and, as its last line, one JSON object with everything measured. Uses all the GPUs there are; with one,
only the rows of one GPU run. Needs nothing but the package. `--list` names the rows, `--only` runs those that have one
of the texts in their name, as `--only "verify tp" "bench cp"`, and `--limit` begins no row after so many seconds. A row
that fails says why, and the others go on.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

import torch

from picotron_mini.bench import bench
from picotron_mini.config import UserError
from picotron_mini.launch import RankError
from picotron_mini.model.moe import Router
from picotron_mini.presets import preset
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, verify

Row = tuple[str, str, dict[str, object]]  # "verify" or "bench", the layout, settings
# Routing at its worst: 39 % of the first step's choices find no room; or all tokens choose one expert, and the others
# have no row.
ROUTING = {"capacity": replace(EXPERTS, capacity=0.5), "one_expert": replace(EXPERTS, top_k=1, normalize=False)}
SAVING = {"recompute": "full", "loss_chunks": 8}


def on_one() -> list[Row]:
    """Rows of one GPU: speed by micro-batch, and what saves memory at which speed."""
    rows: list[Row] = [("bench", "dp=1", {"micro_batch_size": size, "micro_batches": 16 // size}) for size in (4, 8)]
    rows.append(("bench", "dp=1", {"micro_batch_size": 6, "micro_batches": 3}))
    few = {"micro_batch_size": 4, "micro_batches": 4}
    rows += [("bench", "dp=1", few | more) for more in ({"loss_chunks": 8}, {"recompute": "full"}, SAVING)]
    for masters in ("split", "none"):
        rows += [("bench", "dp=1", {**few, **more, "masters": masters}) for more in ({}, SAVING)]
    rows.append(("bench", "dp=1", {"micro_batch_size": 16, "micro_batches": 1} | SAVING))
    short = {"micro_batch_size": 1, "micro_batches": 8, "seq_len": 512}  # kernels as short as with many cuts
    experts = {"experts": True, "micro_batch_size": 2, "micro_batches": 4}
    rows += [("bench", "dp=1", each | {"cuda_graph": on}) for each in (short, experts) for on in (False, True)]
    return [*rows, ("bench", "dp=1", few | {"cuda_graph": True})]


def on_several(gpus: int) -> list[Row]:
    """Rows of all GPUs. A zero-bubble schedule does not compile."""
    dp, tp, pp, cp, ep = (f"{axis}={gpus}" for axis in ("dp", "tp", "pp", "cp", "ep"))
    four = {"micro_batch_size": 4, "micro_batches": 4}
    experts = {"experts": True, "micro_batch_size": 2, "micro_batches": 4}
    between: dict[str, object] = {"sequence_parallel": True}
    long = {"micro_batch_size": 1, "micro_batches": 4, "seq_len": 4096}
    graph: dict[str, object] = {"cuda_graph": True}
    techniques: list[tuple[str, dict[str, object]]] = [
        (dp, four),
        *((dp, {**four, "zero": zero}) for zero in (1, 2, 3)),
        (dp, {**four, "bucket_mb": 1e6}),  # one bucket: nothing is summed beside backward
        *((dp, {**four, "zero": 3, "masters": "split", "loss_chunks": parts}) for parts in (1, 2, 8)),
        *((dp, {**four, "zero": zero, "symmetric_memory": True}) for zero in (1, 2, 3)),
        *((dp, {**four, "zero": 2, "bucket_mb": 100.0, "symmetric_memory": on}) for on in (False, True)),
        *((dp, {**four, "zero": 3, "masters": "split", "loss_chunks": parts, "symmetric_memory": True})
          for parts in (2, 8)),
        (dp, {**four, "zero": 3, "masters": "split", "loss_chunks": 2, "bucket_mb": 100.0}),
        *((dp, {**four, **more}) for more in ({"reduce_group": max(gpus // 2, 2)},  # as if on two hosts
                                             {"zero": 2, "zero_group": max(gpus // 2, 2)}) if gpus % 2 == 0),
        (tp, four),
        *((tp, {**four, **between, "tensor_overlap": parts}) for parts in (1, 2, 4)),
        *((pp, {**four, "micro_batches": 8, "schedule": kind}) for kind in ("afab", "1f1b", "interleaved")),
        *((pp, {**four, "micro_batches": 8, "schedule": kind, "compile": False}) for kind in ("zb-h1", "zb-v")),
        *((cp, {**long, "context": kind}) for kind in ("ring", "ulysses")),
        *((cp, {**long, **graph, "context": kind}) for kind in ("ring", "ulysses")),
        *((dp, {**four, **graph, "zero": zero}) for zero in (0, 1, 2)),
        *((tp, {**four, **graph, **between, "tensor_overlap": parts}) for parts in (1, 2, 4)),
        *((tp, {**four, **graph, **between, "tensor_overlap": parts, "symmetric_memory": True}) for parts in (2, 4)),
        *((pp, {**four, **graph, "micro_batches": 8, "schedule": kind}) for kind in ("1f1b", "interleaved")),
        (cp, {"micro_batch_size": 1, "micro_batches": 1, "seq_len": 32768, "recompute": "full"}),
        (f"{dp},{ep}", experts),
        *((f"{dp},{ep}", experts | {"micro_batch_size": size, "micro_batches": 8 // size}) for size in (4, 8)),
        (f"{dp},{ep}", experts | {"micro_batch_size": 4, "micro_batches": 2, "masters": "split"}),
        (f"{dp},{ep}", experts | {"dispatch_parts": 2}),
        (f"{dp},{ep}", experts | {"dispatch_payload": "fp8"}),
        *((f"{dp},{ep}", experts | {**more, "dispatch": "allgather", "micro_batch_size": size,
                                    "micro_batches": 8 // size}) for size in (2, 4) for more in ({}, graph)),
        *((f"{dp},{ep}", experts | {**graph, "dispatch": "allgather", "micro_batch_size": 4, "micro_batches": 2,
                                    "dispatch_parts": parts}) for parts in (2, 4)),
        (f"{dp},{ep}", experts | {"place_every": 2, "expert_replicas": 1}),
    ]  # fmt: skip
    out: list[Row] = []
    for layout, settings in techniques:
        small = {name: value for name, value in settings.items() if name not in ("seq_len", "experts", "bucket_mb")}
        small |= {"micro_batch_size": 1, "micro_batches": 2 * gpus, "compile": settings.get("compile", True)}
        same = "dispatch_payload" in small or "bucket_mb" in settings  # lossy, or verified by another row
        narrow = "masters" in small or {"cuda_graph", "experts"} <= settings.keys()  # in bfloat16 only
        for dtype in ("float32", "bfloat16"):
            row: Row = ("verify", layout, {"dtype": dtype, **small})
            if not same and (dtype == "bfloat16" or not narrow) and row not in out:
                out.append(row)
        out.append(("bench", layout, settings))
    for routing in ROUTING:
        for more in ({}, {"dispatch_parts": 2}, {"dispatch": "allgather"}, {"dispatch": "allgather", **graph}):
            narrow_too = ("bfloat16",) if "cuda_graph" in more else ("float32", "bfloat16")
            few = {"micro_batch_size": 1, "micro_batches": 2 * gpus, "compile": True, "routing": routing}
            out += [("verify", f"{dp},{ep}", {"dtype": dtype, **more, **few}) for dtype in narrow_too]
    return out


def prefer_one_expert(check: bool = False) -> None:
    """From here on every router of this process chooses expert 0; `check` asks each time whether it does."""
    plain = Router.forward

    def leaning(self: Router, x: torch.Tensor) -> torch.Tensor:
        logits = plain(self, x)
        first = logits.new_ones(logits.shape[-1]).cumsum(0) == 1  # names no module: the compiler would look it up in
        logits = logits + 5.0 * first  # the main module of a rank, which is another one
        assert not check or bool((logits.argmax(-1) == 0).all())
        return logits

    Router.forward = leaning  # type: ignore[method-assign]


def verified(layout: str, routing: str = "", device: str = "cuda", **train: object) -> dict[str, object]:
    model = replace(MODEL, moe=ROUTING[routing]) if routing else MODEL
    if "cp=" in layout:  # heads as wide as in training, and tokens enough that a block has several tiles
        model, train = replace(model, head_dim=64), {"seq_len": 256 * torch.cuda.device_count(), **train}
    patch, plain = prefer_one_expert if routing == "one_expert" else None, Router.forward
    if patch:  # in the ranks, and in the reference, which runs here
        patch(check=True)
    try:
        settings = replace(TRAIN, device=device, **train)
        report = verify(layout, model, settings, patch=patch, gpus=torch.cuda.device_count())
    finally:
        Router.forward = plain  # type: ignore[method-assign]
    print(f"    ok={report.ok} max_rel_err={report.max_rel_err:.1e}", flush=True)
    for d in report.differences:
        print(f"    {d.quantity}: {d.error:.2e}, allowed {d.tolerance:.2e} ({d.where})", flush=True)
    return report.to_dict()


def measured(layout: str, experts: bool = False, **train: object) -> dict[str, object]:
    """A layout's speed, and what a profile of one more step says of its communication."""
    run = preset("bench-moe" if experts else "bench")
    run = replace(run, layout=layout, train=replace(run.train, **train))
    result = bench(run, profile=True)
    print(
        f"    {result['tokens_per_second_per_rank']:,.0f} tokens/s per GPU, "
        f"MFU {100 * (result['mfu'] or 0):.1f} %, "
        f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"8192^3 product {result['matmul_tflops']:.0f} TFLOP/s",
        flush=True,
    )
    seen = result["exposed"]
    parts = ", ".join(f"{part} {1000 * seen[part]:.0f}" for part in ("compute", "communication", "exposed", "idle"))
    print(f"    ms of a step of {1000 * seen['step']:.0f} under the profiler: {parts}", flush=True)
    for name, seconds in seen["kernels"]:
        print(f"    {1000 * seconds:8.1f} ms {name[:110]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the rows and run none")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    args = parser.parse_args()
    gpus, began, results, failed = torch.cuda.device_count(), time.monotonic(), [], 0
    if not gpus and not args.list:
        sys.exit("no GPU is visible to torch; this script measures GPUs (--list names the rows)")
    rows = [*on_one(), *(on_several(gpus or 2) if gpus != 1 else [])]
    if not args.list:
        print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}")
        print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout, flush=True)
    for what, layout, settings in rows:
        name = f"{what} {layout} " + " ".join(f"{key}={value}" for key, value in settings.items())
        if not any(text in name for text in args.only):
            continue
        print(name, flush=True)
        if args.list:
            continue
        if time.monotonic() - began > args.limit:
            print("    left out: there was no time for it", flush=True)
            continue
        try:
            result = (verified if what == "verify" else measured)(layout, **settings)
        except (RankError, UserError) as error:
            memory = "OutOfMemoryError" in str(error)
            failed += not memory
            print("    out of memory" if memory else f"    FAILED: {error}", flush=True)
            result = {"out_of_memory": True} if memory else {"error": str(error)}
        results.append({"what": what, "layout": layout, **settings, **result})
    if not args.list:
        print(json.dumps(results))
    if failed:
        sys.exit(f"{failed} row(s) failed")


if __name__ == "__main__":
    main()
