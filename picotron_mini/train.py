"""The main job, from text to weights, in the order in which it happens:

    data -> model -> parallelize -> schedule -> step -> observe -> save

`train` runs once, in the process that was started: it makes the run ready (`ready.py` refuses what cannot work and
prepares the text) and launches the ranks. `_on_rank` is what each rank does; rank 0 has a `Recorder` (`record.py`).
Everything a run leaves is in `runs/<name>/`:

    config.json       every setting, resolved            layout.json    where each parameter lived
    environment.json  machine and versions               traffic.json   bytes each axis sent, predicted and counted
    metrics.jsonl     a line a step                      weights/       Hugging Face format, with the tokenizer
    summary.json      the results                        report.html    all of it, to look at
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from .collectives import ledger
from .config import RunConfig, UserError
from .data.loader import Batch, Loader, data_rows
from .launch import launch, under_torchrun
from .legality import notices
from .mesh import Mesh
from .model.costs import parameters
from .moe.dispatch import recording
from .monitoring.report import write_report
from .parallel.expert_traffic import Decided, Rows, rows_of_step
from .parallel.gather import gather
from .parallel.parallelize import Parallel, parallelize
from .ready import ReadyRun, make_ready, start_folder
from .record import Recorder
from .training.lr import learning_rate
from .training.migrate import Placer
from .training.optimizer import make_optimizer, set_learning_rate
from .training.step import evaluate, settle, train_step

FINAL_EVAL = 10  # the last validation looks at this many times `eval_batches`, or at the whole split if it is smaller


def train(run: RunConfig) -> dict[str, Any]:
    """Train; returns what `summary.json` holds. Under `torchrun` every rank calls it, elsewhere it starts the ranks.

    Raises:
        UserError: the run cannot start, in one message; nothing was written then.
        RankError: a rank failed. What was measured so far is kept, and the report is written.
    """
    if under_torchrun():
        size = int(os.environ["WORLD_SIZE"])
        device = "cuda" if torch.cuda.is_available() and run.train.device != "cpu" else "cpu"
        return launch(_join, run, world_size=size, device=device)[0]
    ready = make_ready(run, gpus=torch.cuda.device_count())
    start_folder(ready)
    print(_headline(ready))
    try:
        values = launch(
            _on_rank,
            ready,
            world_size=ready.run.mesh.world_size,
            device=ready.run.train.device,
            timeout=None,
            output="live",
        )
    except BaseException:
        _report_so_far(ready)
        raise
    report = write_report(ready.folder)
    print(f"\n{_result(values[0])}\nreport: {report}")
    if values[0]["sample"]["prompt"]:  # it can write
        print(f'write with it: picotron-mini generate {ready.folder} "def "')
    return values[0]


def _join(run: RunConfig) -> dict[str, Any]:
    """One rank that `torchrun` has started: the first of each machine prepares the text, the others find it done."""
    size, rank, local_rank = dist.get_world_size(), dist.get_rank(), int(os.environ["LOCAL_RANK"])
    first, mistake = rank == 0, None
    for turn in (True, False):
        if turn == (local_rank == 0):
            try:
                ready = make_ready(run, gpus=size if torch.cuda.is_available() else 0, ranks=size)
            except UserError as error:
                mistake = error
        dist.barrier()
    mistakes: list[UserError | None] = [None] * size
    texts: list[str] = [""] * size
    dist.all_gather_object(mistakes, mistake)
    dist.all_gather_object(texts, "" if mistake else ready.prepared.text_sha256)
    if not any(mistakes) and len(set(texts)) > 1:
        mistakes[0] = mistake = UserError(
            "the machines have different texts (the default text differs between Python releases); give the same --text"
        )
    if any(mistakes):  # told once, by the first rank that found one
        raise mistake if mistake and not any(mistakes[:rank]) else SystemExit(1)
    if first:
        start_folder(ready)
        print(_headline(ready))
    try:
        summary = _on_rank(ready)
    except BaseException:
        if first:
            _report_so_far(ready)
        raise
    if first:
        print(f"\n{_result(summary)}\nreport: {write_report(ready.folder)}")
    return summary


def _report_so_far(ready: ReadyRun) -> None:
    """The report of a run that failed; trouble with it must not hide why the run failed."""
    try:
        print(f"report so far: {write_report(ready.folder)}")
    except (OSError, UserError) as error:
        print(f"no report could be written: {error}", file=sys.stderr)


def _headline(ready: ReadyRun) -> str:
    run = ready.run
    number = f"{parameters(run.model) / 1e6:.1f} million parameters"
    number += f" ({parameters(run.model, active=True) / 1e6:.1f} for a token)" if run.model.moe else ""
    return (
        f"{number} on {run.mesh.world_size} {run.train.device} rank(s), "
        f"{run.layout}, {run.train.dtype}; {ready.prepared.train_tokens:,} tokens of {ready.prepared.source}\n"
        f"run folder: {ready.folder}" + "".join(f"\nnote: {notice}" for notice in notices(run))
    )


# --- on each rank -----------------------------------------------------------------------------------------


def _on_rank(ready: ReadyRun) -> dict[str, Any]:
    run, train = ready.run, ready.run.train
    mesh = Mesh.build(run.mesh)
    device = torch.device("cuda", torch.cuda.current_device()) if train.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")

    # data
    size, apart = (train.seq_len, train.batch_size), train.document_mask
    text = Loader(ready.prepared, "train", *size, train.seed, apart=apart)
    held_out = Loader(ready.prepared, "val", *size, shuffle=False, apart=apart)

    def share(loader: Loader, n: int) -> list[Batch]:
        dp, number = mesh["dp"], train.micro_batches
        rows = [data_rows(train.batch_size, dp.size, dp.index, number, k) for k in range(number)]
        return [loader.batch(n, r).to(device) for r in rows]

    # model, parallelize, schedule
    parallel = parallelize(run, mesh, device)
    optimizer = make_optimizer(parallel.trained, train)

    # step and observe
    stop, placer = _StopRequest(), Placer(parallel, optimizer)
    recorder = Recorder(ready, device) if mesh.rank == 0 else None
    done, result, started, rows = 0, None, time.monotonic(), None
    with ExitStack() as stack:
        if recorder:
            stack.enter_context(recorder)
        for step in range(train.steps):
            before = time.monotonic()
            lr = learning_rate(train, step)
            set_learning_rate(optimizer, lr)
            with ledger.recording() as sent, recording(step == 0) as decided:
                result = train_step(parallel, optimizer, share(text, step), stop.requested)
            done = step + 1
            if step == 0:
                settle()
                rows = _rows(run, decided) if run.mesh.ep > 1 else None
            if recorder:
                recorder.step(done, result, lr, time.monotonic() - before, sent, rows)
            if result.stop:
                break
            for each in placer.after(done, result.routing) if done < train.steps else ():
                if recorder:
                    recorder.moved(done, each)
            if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                batches = [b for n in range(min(train.eval_batches, held_out.num_batches)) for b in share(held_out, n)]
                loss, *_ = evaluate(parallel, batches)
                if recorder:
                    recorder.validation(done, loss)
        # decided by what all ranks know: a signal may have reached only some of them
        stopped = result is not None and result.stop
        final = min(1 if stopped else FINAL_EVAL * train.eval_batches, held_out.num_batches)
        total, val_tokens, seen = 0.0, 0, 0
        while seen < final:  # one by one: memory does not grow with their number, and a stop is heard
            loss, count, stopped_now = evaluate(parallel, share(held_out, seen), stop.requested)
            total, val_tokens, seen = total + loss * count, val_tokens + count, seen + 1
            if stopped_now:
                stopped = True
                break
        val_loss = total / val_tokens
        seconds = time.monotonic() - started

        # save
        state = _whole_weights(parallel)
        if recorder is None:
            return {}
        seen *= train.batch_size * train.seq_len
        return recorder.finish(state, done, result, val_loss, val_tokens, seen, seconds, stopped)


def _rows(run: RunConfig, decided: Decided) -> Rows:
    """How many rows this rank has sent to experts and received for its own in a step, from what all routers decided."""
    logs: list[Decided] = [[]] * run.mesh.world_size
    dist.all_gather_object(logs, decided)
    assert run.model.moe is not None
    found = rows_of_step(logs, run.mesh, run.model.moe, run.train.micro_batches, run.train.expert_replicas)
    return found[dist.get_rank()]


def _whole_weights(parallel: Parallel) -> dict[str, torch.Tensor]:
    """All parameters whole on rank 0 (nothing elsewhere), in the masters' dtype, on the CPU."""
    out = {}
    dtype = torch.promote_types(parallel.dtype, torch.float32)
    for name, place in parallel.layout.items():
        whole = gather(parallel.masters.get(name), place, parallel.mesh, dtype, parallel.device)
        if whole is not None:
            out[name] = whole.cpu()
    if out and parallel.routers is not None:  # every rank knows the biases of all layers
        out |= {name: bias.cpu() for name, bias in parallel.routers.named_biases().items()}
    return out


class _StopRequest:
    """SIGTERM (and Ctrl-C under `torchrun`) asks for an end after the current step, where all ranks hear of it."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._note)
        if under_torchrun():
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


def _result(summary: dict[str, Any]) -> str:
    stopped = f", stopped {summary['stopped']}" if summary["stopped"] else ""
    return (
        f"{summary['steps_done']} of {summary['steps']} steps in {summary['seconds']:.0f} s{stopped}. Validation: "
        f"{summary['val_bits_per_byte']:.3f} bits per byte; a bigram model of the same tokens has "
        f"{summary['bigram_bits_per_byte']:.3f}, a unigram model {summary['unigram_bits_per_byte']:.3f}.\n"
        f"{summary['sample']['text']!r}"
    )
