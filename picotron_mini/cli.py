"""The command line: `picotron-mini train | generate | verify | describe | plan | bench | progress`.

All settings of `RunConfig` are flags, without prefixes, in every command that has them: `--layout dp=2,tp=2` (or just
`dp=2,tp=2`), `--seq-len 512`, ... They change a preset (`--preset laptop`) or a file (`--config run.toml`, `.yaml` or
`.json`, with the names of `RunConfig`), in this order: preset, file, flags. A flag of experts (`--num-experts 8`) makes
a dense model a mixture.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from .config import ConfigError, Device, Dtype, MoEConfig, RunConfig, UserError, from_dict, to_dict
from .presets import PRESETS, preset

# What needs torch is imported inside the commands, so that `--help` and a misspelt command answer at once.


@dataclass(frozen=True)
class Run:
    """Settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Verify(Run):
    """Compare a layout with one device, on random tokens, with SGD and with AdamW.

    Sizes, dtype, schedule, freezing and compiling count; text, tokenizer, --optimizer and --batch-size do not. Without
    a layout or any other flag, every technique alone and some combinations are compared, on at most 8 ranks.
    """

    json: bool = False  # print a JSON object (one a line) in place of a table; null: an error that is no number


@dataclass(frozen=True)
class Bench(Run):
    """Measure the speed of a layout."""

    json: bool = False  # print one JSON object instead of a table
    warmup: int = 3  # steps before the measured ones
    profile: bool = False  # one more step under a profiler: how much communication is waited for (GPUs)


@dataclass(frozen=True)
class Plan(Run):
    """Rank the legal layouts by predicted speed, or look at one: LAYOUT, and with --dry-run its ranks' own code."""

    json: bool = False  # print one JSON object instead of a table
    ranks: int = 0  # 0: the layout's, else the GPUs or cores of this machine
    machine: str = "this"  # this one, measured; or h100, h100-cluster, or a file that was measured elsewhere
    measure: bool = False  # measure this machine also if it is known
    memory_gib: float = 0.0  # of each rank; 0: the machine's
    link_gb_s: float = 0.0  # gigabytes a second between ranks of a host; 0: the machine's
    host_link_gb_s: float = 0.0  # ... between hosts, for each rank
    ranks_per_host: int = 0  # 0: the machine's
    skew: str = "1"  # the busiest rank's load of experts over the even one, after placement; or a run that measured it
    dry_run: bool = False  # run the layout's ranks without memory, and compare their bytes with the prediction


@dataclass(frozen=True)
class Generate:
    """Let a trained model write."""

    folder: Annotated[str, tyro.conf.Positional]  # a run's folder, or a folder of Hugging Face weights
    prompt: Annotated[str, tyro.conf.Positional] = "def "  # what to continue
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 50  # draw among this many tokens; 0: all
    seed: int = 0
    device: Device = "auto"  # auto: cuda if there is one, else cpu
    dtype: Dtype = "float32"  # of the weights and the compute
    layout: str = "1"  # over how many ranks the model is spread, as tp=2,pp=2; 1: one device


@dataclass(frozen=True)
class Progress:
    """Show which exercises of the lessons are passed."""


# those of the settings of a mixture of experts, which a dense model has not: a parser would not know them
EXPERT_FLAGS = {f"--{name.replace('_', '-')}" for name in MoEConfig.__dataclass_fields__}

C = TypeVar("C")
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


def _parse(kind: type[C], name: str, args: list[str], run: RunConfig | None = None) -> C:
    """Read the flags of a command; `run` is what holds where neither preset nor file says otherwise."""
    base: dict[str, Any] = {}
    if run is not None:
        args, chosen = _take(args, "--preset")
        args, file = _take(args, "--config")
        if chosen is not None:
            run = preset(chosen)
        if file is not None:
            run = _merge(run, read_config(Path(file)))
        args = _name_bare_layout(args)
        if run.model.moe is None and any(arg.split("=")[0].replace("_", "-") in EXPERT_FLAGS for arg in args):
            run = replace(run, model=replace(run.model, moe=MoEConfig()))
        base["default"] = kind(run=run)  # type: ignore[call-arg]
    if sum(arg.split("=")[0] == "--layout" for arg in args) > 1:
        raise ConfigError("the layout is given more than once; write all axes as one, as dp=2,tp=2")
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    described = (kind.__doc__ or "") + (f" Also --preset {{{','.join(PRESETS)}}} and --config FILE." if base else "")
    if run is not None and run.model.moe is None:
        described += " A flag of experts makes the model a mixture: " + ", ".join(sorted(EXPERT_FLAGS)) + "."
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(kind, prog=f"picotron-mini {name}", description=described, args=args, config=flags, **base)
    except SystemExit as end:
        if not end.code:  # it was --help
            raise
        # tyro writes a title and draws a box or rules around the message and its hints, in colour on a terminal;
        # told here as one line, as all other errors are
        plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│]", "", boxed.getvalue()).splitlines()[1:]
        message = re.sub(r"\.? [─-]{3,} ", ". ", " ".join(line.strip() for line in plain)).strip(" .─-")
        raise ConfigError(message) from end


def _take(args: list[str], flag: str) -> tuple[list[str], str | None]:
    """Remove `flag VALUE` or `flag=VALUE` from the arguments."""
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args):
                raise ConfigError(f"{flag} needs a value")
            return args[:i] + args[i + 2 :], args[i + 1]
        if arg.startswith(flag + "="):
            return args[:i] + args[i + 1 :], arg.removeprefix(flag + "=")
    return args, None


def _name_bare_layout(args: list[str]) -> list[str]:
    """`dp=2,tp=2` by itself means `--layout dp=2,tp=2`; after a flag that takes any text it is that flag's value.

    Whatever stands first and is no flag is meant as a layout, so that a wrong one is told what is wrong with it.
    """
    out: list[str] = []
    for arg in args:
        like_a_layout = re.fullmatch(r"[a-z]+=\d+(,[a-z]+=\d+)*", arg)
        if (like_a_layout and (not out or out[-1] not in ("--layout", "--name", "--out"))) or (
            not out and not arg.startswith("-")
        ):
            out.append("--layout")
        out.append(arg)
    return out


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a .toml, .yaml, .yml or .json file.

    Raises:
        ConfigError: it is missing, cannot be parsed, or is of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ConfigError(f"{path}: settings are read from .toml, .yaml or .json files")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; write for example  layout: dp=2,tp=2")
    return values


def _merge(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        both = {
            k: merge(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in new.items()
        }
        return old | both

    return from_dict(RunConfig, merge(to_dict(run), values))


def _on_gpu(run: RunConfig) -> bool:
    import torch

    return run.train.device == "cuda" or (run.train.device == "auto" and torch.cuda.is_available())


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
    wanted = _parse(Run, "train", args, _default_preset())
    from .train import train

    begin()
    summary = train(wanted.run)
    return STOPPED if summary.get("stopped") else 0


def generate_command(args: list[str]) -> int:
    """let a trained model write"""
    wanted = _parse(Generate, "generate", args)
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
    wanted = _parse(Verify, "verify", args, RunConfig(layout="dp=2,tp=2", model=MODEL, train=TRAIN))
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
    wanted = _parse(Run, "describe", args, PRESETS["laptop"])
    import torch

    from .legality import resolve
    from .parallel.describe import describe
    from .planner import memory_table

    run = wanted.run
    vocab_size = run.model.vocab_size or run.data.expected_vocab_size
    gpus = torch.cuda.device_count()
    if run.train.device == "cuda":  # nothing runs here, so it does not matter what this machine has
        gpus = max(gpus, 1 if run.layout == "auto" else run.mesh.world_size)
    run = resolve(replace(run, model=replace(run.model, vocab_size=vocab_size)), gpus=gpus)
    _print(describe(run))
    _print(memory_table(run))
    return 0


def plan_command(args: list[str]) -> int:
    """rank layouts by predicted speed and memory, for any number of ranks"""
    wanted = _parse(Plan, "plan", args, replace(PRESETS["laptop"], layout="auto"))
    from .planner import Wish, answer

    run = wanted.run
    run = replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or run.data.expected_vocab_size))
    if not any(arg.partition("=")[0] == "--layout" for arg in _name_bare_layout(args)):
        run = replace(run, layout="auto")  # a preset's or a file's is only one of those to be compared
    found = answer(run, Wish(**{name: getattr(wanted, name) for name in Wish.__dataclass_fields__}), _width())
    if wanted.json:
        print(json.dumps(found.data, allow_nan=False))
    else:
        _print(found.shown)
    return 0 if found.ok else 1


def bench_command(args: list[str]) -> int:
    """measure tokens per second, MFU and memory of a layout"""
    wanted = _parse(Bench, "bench", args, PRESETS["laptop"])
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
    _parse(Progress, "progress", args)
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
