"""The command line: `picotron-mini train | generate | verify | describe | plan | bench | progress`.

What their arguments mean is in `flags.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from .config import ConfigError, RunConfig, UserError
from .flags import Bench, Describe, Generate, Plan, Progress, Train, Verify, name_bare_layout, parse
from .presets import PRESETS

# What needs torch is imported inside the commands, so that `--help` and a misspelt command answer at once.

STOPPED = 128 + signal.SIGINT  # the exit status of a run that was asked to end early


def main(argv: list[str] | None = None) -> None:
    """Entry point of `picotron-mini`; exits with 0, 1 (it failed), 2 (wrong use) or 128 + signal."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if args else 2)
    command = COMMANDS.get(args[0])
    if command is None:
        print(f"error: unknown command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    from .launch import RankError, raise_on_sigterm

    sigterms = raise_on_sigterm()
    try:
        code = command(args[1:])
    except UserError as error:
        if debug:
            raise
        _tell(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except RankError as error:
        if debug:
            raise
        lines = str(error).splitlines()
        print(f"error: {lines[0]} {lines[-1]}\n(--debug shows the rank's traceback)", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = STOPPED
    except BrokenPipeError:  # the reader has left, as in `| head`; Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    sys.exit(128 + signal.SIGTERM if code == STOPPED and sigterms else code)


def _tell(error: UserError, patience: float = 3.0) -> None:
    """Print what the user has to know: once, though under `torchrun` every rank may have found the same."""
    from .launch import first_rank

    if not first_rank():
        try:
            time.sleep(patience)  # rank 0 says it and leaves, and so torchrun ends this one; else it is this one's own
        except KeyboardInterrupt:
            return
    print(f"error: {error}", file=sys.stderr)


def _usage() -> str:
    lines = [
        "usage: picotron-mini COMMAND [LAYOUT] [--preset NAME] [--config FILE] [FLAGS]",
        "",
        *(f"  {name:<9} {(fn.__doc__ or '').splitlines()[0]}" for name, fn in COMMANDS.items()),
        "",
        "LAYOUT is the number of ranks on each axis, as dp=2,tp=2,pp=2.",
        f"Presets: {', '.join(PRESETS)}. Every command explains its flags with --help; --debug shows tracebacks.",
    ]
    return "\n".join(lines)


def _default_preset() -> RunConfig:
    import torch

    gpus = torch.cuda.device_count()
    return PRESETS["laptop"] if not gpus else replace(PRESETS["h100" if gpus == 1 else "h100x2"], layout="auto")


def begin() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, so that ranks are stopped and files are closed in good order."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- commands ---------------------------------------------------------------------------------------------


def train_command(args: list[str]) -> int:
    """train a language model on real text"""
    wanted = parse(Train, "train", args, _default_preset())
    from .launch import first_rank
    from .train import train

    begin()
    with _to_stderr() if wanted.json else nullcontext():
        summary = train(wanted.run)
    if wanted.json and first_rank():
        finite = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # a run that diverged: null
        print(json.dumps(finite))
    return STOPPED if summary.get("stopped") else 0


@contextmanager
def _to_stderr() -> Iterator[None]:
    """What this process and the ranks that it starts print goes to stderr meanwhile."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def generate_command(args: list[str]) -> int:
    """let a trained model write"""
    wanted = parse(Generate, "generate", args)
    from .write import Wish, write

    begin()
    wish = Wish(wanted.prompt, wanted.max_new_tokens, wanted.temperature, wanted.top_k, wanted.seed)
    write(wanted.folder, wish, wanted.device, wanted.layout, wanted.dtype)
    return 0


def verify_command(args: list[str]) -> int:
    """prove that a layout computes what one device computes"""
    from .parity import table
    from .verify import MODEL, TRAIN, verify

    if not args or args == ["--json"]:
        return _verify_matrix(as_json=bool(args))
    wanted = parse(Verify, "verify", args, RunConfig(layout="dp=2,tp=2", model=MODEL, train=TRAIN))
    import torch

    run = wanted.run
    model = replace(run.model, vocab_size=run.model.vocab_size or run.data.expected_vocab_size)
    train = replace(run.train, steps=min(run.train.steps, TRAIN.steps))  # a preset's hundreds would show nothing more
    asked = any(arg.partition("=")[0] in ("--dtype", "--config") for arg in args)
    if train.dtype == "float32" and not asked:  # a preset's, to train in; in float64 a fault is told from rounding
        train = replace(train, dtype="float64")
    begin()
    report = verify(run.layout, model, train, gpus=torch.cuda.device_count())
    if wanted.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    else:
        _print(table(report))
    return 0 if report.ok else 1


def _verify_matrix(as_json: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .matrix import default_matrix
    from .verify_all import results, table

    begin()
    runs, found = default_matrix(), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("verifying", total=len(runs))
        for result in results(runs):
            found.append(result)
            bars.advance(task)
            if as_json:
                print(json.dumps(result, allow_nan=False), flush=True)
    if not as_json:
        _print(table(found))
    return 0 if all(result["ok"] for result in found) else 1


def describe_command(args: list[str]) -> int:
    """show where each parameter of a layout lives, and what is sent"""
    wanted = parse(Describe, "describe", args, PRESETS["laptop"])
    import torch

    from .legality import resolve
    from .parallel.describe import describe
    from .planner import memory_table, skew_wanted

    run = wanted.run
    vocab_size = run.model.vocab_size or run.data.expected_vocab_size
    gpus = torch.cuda.device_count()
    if run.train.device == "cuda":  # nothing runs here, so it does not matter what this machine has
        gpus = max(gpus, 1 if run.layout == "auto" else run.mesh.world_size)
    run = resolve(replace(run, model=replace(run.model, vocab_size=vocab_size)), gpus=gpus)
    if run.model.moe and run.mesh.ep == 1 and wanted.skew != Describe.skew:
        raise ConfigError(
            f"skew={wanted.skew} is of ranks that share experts, and with ep=1 each has all; leave it out"
        )
    skew = skew_wanted(run, wanted.skew)(run.mesh.ep)
    _print(describe(run))
    _print(memory_table(run, skew))
    return 0


def plan_command(args: list[str]) -> int:
    """rank layouts by predicted speed and memory, for any number of ranks"""
    wanted = parse(Plan, "plan", args, replace(PRESETS["laptop"], layout="auto"))
    from .planner import answer

    run = wanted.run
    run = replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or run.data.expected_vocab_size))
    if not any(arg.partition("=")[0] == "--layout" for arg in name_bare_layout(args)):
        run = replace(run, layout="auto")  # a preset's or a file's is only one of those to be compared
    found = answer(run, wanted, _width())
    if wanted.json:
        print(json.dumps(found.data, allow_nan=False))
    else:
        _print(found.shown)
    return 0 if found.ok else 1


def bench_command(args: list[str]) -> int:
    """measure tokens per second, MFU and memory of a layout"""
    wanted = parse(Bench, "bench", args, PRESETS["laptop"])
    from .bench import bench, table
    from .launch import first_rank

    begin()
    result = bench(wanted.run, wanted.warmup, wanted.profile)
    if not first_rank():
        return 0
    if wanted.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print(table(result))
    return 0


def progress_command(args: list[str]) -> int:
    """show which exercises of the lessons you have passed"""
    parse(Progress, "progress", args)
    from .course.progress import progress_table

    _print(progress_table())
    return 0


def _width() -> int:
    """Columns of text that there is room for; in a file or a pipe 120."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 120


def _print(what: Any) -> None:
    from rich.console import Console

    Console(width=_width()).print(what)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "generate": generate_command,
    "verify": verify_command,
    "describe": describe_command,
    "plan": plan_command,
    "bench": bench_command,
    "progress": progress_command,
}
