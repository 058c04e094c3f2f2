"""How arguments become settings: a dataclass for each command, whose fields are its flags.

All settings of `RunConfig` are flags, without prefixes, in every command that has them: `--layout dp=2,tp=2` (or just
`dp=2,tp=2`), `--seq-len 512`, ... They change a preset (`--preset laptop`) or a file (`--config run.toml`, `.yaml` or
`.json`, with the names of `RunConfig`), in this order: preset, file, flags. A flag of experts (`--num-experts 8`) makes
a dense model a mixture.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from .config import ConfigError, Device, Dtype, MoEConfig, PlanConfig, RunConfig, from_dict, to_dict
from .presets import PRESETS, preset


@dataclass(frozen=True)
class Run:
    """Settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Train(Run):
    """Train a language model on real text."""

    json: bool = False  # print the summary as one JSON object (null: no number); progress goes to stderr


@dataclass(frozen=True)
class Verify(Run):
    """Compare a layout with one device, on random tokens, with SGD and with AdamW.

    Sizes, dtype, schedule, freezing and compiling count; text, tokenizer, --optimizer and --batch-size do not. Without
    a layout or any other flag, every technique alone and some combinations are compared, on at most 8 ranks.
    """

    json: bool = False  # print a JSON object (one a line) in place of a table; null: an error that is no number


@dataclass(frozen=True)
class Describe(Run):
    """Show where each parameter of a layout lives, what a rank sends in a step, and the memory it needs."""

    skew: str = PlanConfig.skew  # the busiest rank's load of experts over the even one; or the folder of a run


@dataclass(frozen=True)
class Bench(Run):
    """Measure the speed of a layout."""

    json: bool = False  # print one JSON object instead of a table
    warmup: int = 3  # steps before the measured ones
    profile: bool = False  # one more step under a profiler: how much communication is waited for (GPUs)


@dataclass(frozen=True)
class Plan(PlanConfig, Run):
    """Rank the legal layouts by predicted speed, or look at one: LAYOUT, and with --dry-run its ranks' own code."""

    json: bool = False  # print one JSON object instead of a table


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


def parse(kind: type[C], name: str, args: list[str], run: RunConfig | None = None) -> C:
    """Read the flags of a command; `run` is what holds where neither preset nor file says otherwise.

    Raises:
        ConfigError: a flag that is not known, or a value that does not fit.
        SystemExit: it was `--help`, which is printed.
    """
    base: dict[str, Any] = {}
    if run is not None:
        args, chosen = _take(args, "--preset")
        args, file = _take(args, "--config")
        if chosen is not None:
            run = preset(chosen)
        if file is not None:
            run = _merge(run, read_config(Path(file)))
        args = name_bare_layout(args)
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


def name_bare_layout(args: list[str]) -> list[str]:
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
