"""What is claimed about GPUs, run in one go: `python tests/performance/on_gpu.py [--quick]`.

Prints a table and, as its last line, one JSON object with everything measured. Uses all the GPUs there are; with one,
only the one-GPU rows run. Needs nothing but the package.
"""

import json
import subprocess
import sys
from dataclasses import replace

import torch

from picotron_mini.bench import bench
from picotron_mini.launch import RankError
from picotron_mini.presets import preset
from picotron_mini.verify import MODEL, TRAIN, verify


def verified(layout: str, **train: object) -> dict[str, object]:
    report = verify(layout, MODEL, replace(TRAIN, device="cuda", **train), gpus=torch.cuda.device_count())
    result = {"what": "verify", "layout": layout, **train, **report.to_dict()}
    print(f"verify {layout} {train}: ok={report.ok} max_rel_err={report.max_rel_err:.1e}", flush=True)
    for d in report.differences:
        print(f"    {d.quantity}: {d.error:.2e}, allowed {d.tolerance:.2e} ({d.where})", flush=True)
    return result


def measured(layout: str, micro_batch_size: int, micro_batches: int, **train: object) -> dict[str, object]:
    """One row: a layout's speed, and what a profile of one more step says of its communication."""
    run = preset("bench")
    sizes = {"micro_batch_size": micro_batch_size, "micro_batches": micro_batches}
    run = replace(run, layout=layout, train=replace(run.train, **sizes, **train))
    what = f"bench {layout} {micro_batch_size} x {micro_batches} {train}"
    try:
        result = {"what": "bench", **bench(run, profile=True)}
    except RankError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        print(f"{what}: out of memory", flush=True)
        return {"what": "bench", "layout": layout, **sizes, **train, "out_of_memory": True}
    print(
        f"{what}: {result['tokens_per_second_per_rank']:,.0f} tokens/s per GPU, "
        f"MFU {100 * (result['mfu'] or 0):.1f} %, "
        f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"8192^3 product {result['matmul_tflops']:.0f} TFLOP/s",
        flush=True,
    )
    seen = result["exposed"]
    parts = ", ".join(f"{part} {1000 * seen[part]:.0f}" for part in ("compute", "communication", "exposed", "idle"))
    print(f"    ms of a step of {1000 * seen['step']:.0f}: {parts}", flush=True)
    for name, seconds in seen["kernels"]:
        print(f"    {1000 * seconds:8.1f} ms {name[:110]}", flush=True)
    return result


def several(gpus: int) -> list[tuple[str, int, int, dict[str, object]]]:
    """Layouts over all GPUs: micro-batch size, their number, settings. A zero-bubble schedule does not compile."""
    dp, tp, pp, cp = (f"{axis}={gpus}" for axis in ("dp", "tp", "pp", "cp"))
    sequence = {"sequence_parallel": True}
    return [
        *((dp, 4, 4, {"zero": zero}) for zero in (1, 2, 3)),
        *((dp, 4, 4, {"zero": 3, "masters": "split", "loss_chunks": parts}) for parts in (1, 8)),
        *((dp, 4, 4, {"reduce_group": max(gpus // 2, 2)}) for _ in range(gpus % 2 == 0)),  # as if on two hosts
        *((tp, 4, 4, {**sequence, "tensor_overlap": parts}) for parts in (1, 2, 4)),
        (pp, 4, 8, {}),
        (pp, 4, 8, {"schedule": "interleaved"}),
        (pp, 4, 8, {"schedule": "zb-h1", "compile": False}),
        (pp, 4, 8, {"schedule": "zb-v", "compile": False}),
        *((cp, 1, 4, {"seq_len": 4096, "context": context}) for context in ("ring", "ulysses")),
        (cp, 1, 1, {"seq_len": 32768, "recompute": "full"}),
    ]


def main() -> None:
    gpus, quick = torch.cuda.device_count(), "--quick" in sys.argv
    if not gpus:
        sys.exit("no GPU is visible to torch; this script measures GPUs")
    print(f"torch {torch.__version__}, {gpus} x {torch.cuda.get_device_name()}")
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout, flush=True)
    layouts = ["dp=1"] + ([f"dp={gpus}", f"tp={gpus}", f"pp={gpus}"] if gpus > 1 else [])
    results = []
    for layout in layouts:
        results.append(verified(layout, dtype="float64"))
        results.append(verified(layout, dtype="float32", compile=True))
        results.append(verified(layout, dtype="bfloat16", compile=True))
        results.append(verified(layout, dtype="bfloat16", compile=True, recompute="full", loss_chunks=3))
        for masters in ("split", "none"):
            results.append(verified(layout, dtype="bfloat16", compile=True, masters=masters))
    sizes = [(4, 4)] if quick else [(4, 4), (6, 3), (8, 2)]
    for micro_batch_size, micro_batches in sizes:
        for layout in layouts:
            results.append(measured(layout, micro_batch_size, micro_batches))
    for layout, micro_batch_size, micro_batches, settings in several(gpus) if gpus > 1 else []:
        small = {name: value for name, value in settings.items() if name not in ("seq_len", "compile")}
        dtype = "bfloat16" if "masters" in small else "float32"
        results.append(verified(layout, dtype=dtype, micro_batches=2 * gpus, **small))
        results.append(measured(layout, micro_batch_size, micro_batches, **settings))
    both = {"recompute": "full", "loss_chunks": 8}
    memory = [(4, 4, {"loss_chunks": 8}), (4, 4, {"recompute": "full"}), (4, 4, both)]
    memory += [(4, 4, {**more, "masters": masters}) for masters in ("split", "none") for more in ({}, both)]
    if not quick:
        memory += [(8, 2, {"loss_chunks": 8}), (16, 1, both)]
    for micro_batch_size, micro_batches, saving in memory:
        results.append(measured("dp=1", micro_batch_size, micro_batches, **saving))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
