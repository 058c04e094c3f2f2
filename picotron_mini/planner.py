"""What `picotron-mini plan` does: find the machine, then rank all layouts, or look at one, or rehearse it.

plan --ranks 64 --machine h100-cluster --preset bench        the best layouts of 64 ranks
plan dp=8,tp=4,pp=2 --machine h100-cluster ...               one layout, with where its seconds and bytes go
plan dp=8,tp=4,pp=2 --dry-run ...                            its ranks' own code, without memory (dry_run.py)
plan --ranks 8 --preset bench-moe --skew runs/NAME ...        experts as busy as in a run that was measured
plan --measure                                               this machine, measured anew

What `--json` prints is one object. Of layouts, whether one was named or all were ranked:

    machine, source, memory_bytes     the machine's name, where its rates come from, what a rank may use
    ranks                             how many
    sorted_by                         "step_seconds"
    considered, refused               settings that were predicted, and that are not legal (a named layout: 1, 0)
    fits                              whether any does
    layouts                           best first (`parallel.plan.to_dict`); where none fits, the one that needs least

Of a dry run: layout, ok, problems (sentences), ranks: {rank: {"axis operation": bytes counted}}.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from .calibrate import MISSED, calibrated, on_one_rank
from .config import ConfigError, MeshShape, PlanConfig, RunConfig, UserError, divisors
from .dry_run import dry_run, sample
from .dry_run import table as dry_table
from .expert_legality import expert_problems
from .legality import notices, resolve
from .monitoring.metrics import read_metrics
from .monitoring.units import bytes_text
from .parallel.expert_costs import skew_of_loads
from .parallel.machine import GIB, Link, Machine, find_machine
from .parallel.plan import by_axis, plan, settings, to_dict
from .parallel.plan_table import table
from .parallel.predict import Prediction, memory_of_stages, predict


@dataclass(frozen=True)
class Answer:
    """What is printed, as a table or as plain data, and whether all is well."""

    shown: RenderableType
    data: dict[str, Any]
    ok: bool


def answer(run: RunConfig, wanted: PlanConfig, width: int = 120) -> Answer:
    """Do what was asked.

    Args:
        run: with the vocabulary's size filled; its layout "auto" asks for all.
        width: columns of text that there is room for.

    Raises:
        ConfigError: nothing legal, or wants that contradict each other.
    """
    skew = skew_wanted(run, wanted.skew)
    if run.train.tensor_overlap > 1 and not wanted.dry_run:
        raise ConfigError(
            f"plan does not predict what tensor_overlap={run.train.tensor_overlap} hides; leave it out, or measure it "
            "with `bench`"
        )
    for name in ("memory_gib", "link_gb_s", "host_link_gb_s", "ranks_per_host"):
        value = getattr(wanted, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={value} must be a number above 0, or 0 for the machine's own")
    known = "" if run.layout == "auto" else run.layout
    if wanted.dry_run and not known:
        raise ConfigError("--dry-run rehearses one layout; name it, as dp=16,tp=8,pp=8")
    size = run.mesh.world_size if known else 0
    if size and wanted.ranks not in (0, size):
        raise ConfigError(f"layout {known} has {size} ranks, and --ranks says {wanted.ranks}; leave one of them out")
    here = torch.cuda.device_count() or os.cpu_count() or 1
    ranks = size or wanted.ranks or here
    if ranks < 1:
        raise ConfigError(f"ranks={ranks} must be at least 1")
    if wanted.dry_run:
        run = resolve(replace(run, train=replace(run.train, device="cpu")))
        results = [dry_run(run, rank) for rank in sample(run)]
        problems = [problem for each in results for problem in each.problems]
        data = {
            "layout": run.layout, "ok": not problems, "problems": problems,
            "ranks": {
                each.rank: {f"{axis} {operation}": n for (axis, operation), n in sorted(each.counted.items())}
                for each in results
            },
        }  # fmt: skip
        return Answer(dry_table(run, results), data, not problems)
    if not known:
        refuse_everywhere(run, ranks)
    elif wanted.machine == "this":  # what is illegal is refused before this machine is measured for it
        train = replace(run.train, device="cuda" if torch.cuda.device_count() else "cpu")
        resolve(replace(run, train=train), gpus=ranks)
    machine = choose_machine(run, wanted, min(ranks, here))
    run = replace(run, train=replace(run.train, device="cpu" if machine.cores else "cuda"))
    about = {"machine": machine.name, "source": machine.source, "memory_bytes": machine.memory, "ranks": ranks,
             "sorted_by": "step_seconds"}  # fmt: skip
    if known:
        found = predict(resolve(run, gpus=ranks), machine, skew=skew(run.mesh.ep))
        data = {**about, "considered": 1, "refused": 0, "fits": found.fits, "layouts": [to_dict(found)]}
        return Answer(_one(found, machine), data, found.fits)
    result = plan(run, ranks, machine, skew)
    shown = result.ranked or ((result.smallest,) if result.smallest else ())
    data = {
        **about, "considered": result.considered, "refused": result.refused, "fits": bool(result.ranked),
        "layouts": [to_dict(found) for found in shown],
    }  # fmt: skip
    return Answer(table(result, width=width), data, bool(result.ranked))


def refuse_everywhere(run: RunConfig, ranks: int) -> None:
    """Before a search: settings that would only make layouts with ep illegal, or that no search varies.

    Raises:
        ConfigError: naming them.
    """
    if run.train.zero_group:
        raise ConfigError(f"zero_group={run.train.zero_group} is not searched: name a layout, or leave it out")
    moe = run.model.moe
    ep = max(d for d in divisors(moe.num_experts if moe else 1) if ranks % d == 0)  # admits the most copies
    problems = expert_problems(run.model, MeshShape(dp=ep, ep=ep), run.train)
    if problems:
        raise ConfigError("; ".join(problems))


def skew_wanted(run: RunConfig, text: str) -> Callable[[int], float]:
    """The load of the busiest of so many ep ranks over the even one.

    Args:
        text: the number itself, or the folder of a run, whose last load of each expert is taken.

    Raises:
        ConfigError: the number is below 1, the model has no experts, or the run has other ones.
        UserError: there is no such run.
    """
    moe = run.model.moe
    if moe is None:
        if text != PlanConfig.skew:
            raise ConfigError(f"skew={text} is for a mixture of experts, and this model is dense; leave it out")
        return lambda ep: 1.0
    try:
        number = float(text)
    except ValueError:
        if not text or not Path(text).is_dir():
            raise ConfigError(f"skew={text} is neither a number of 1 or above nor the folder of a run") from None
        lines = [line for line in read_metrics(Path(text) / "metrics.jsonl").lines if "moe_load" in line]
        if not lines or len(loads := lines[-1]["moe_load"][0]) != moe.num_experts:
            has = f"{len(loads)} experts, and the model {moe.num_experts}" if lines else "no load of experts"
            raise ConfigError(f"skew={text}: that run has {has}; give a number of 1 or above") from None
        train = run.train
        return partial(
            skew_of_loads, lines[-1]["moe_load"], replicas=train.expert_replicas, placed=train.place_every > 0
        )
    if not 1 <= number <= moe.num_experts:
        raise ConfigError(
            f"skew={text} must be between 1 (all ranks are equally busy) and num_experts={moe.num_experts}, or the "
            "folder of a run"
        )
    return lambda ep: min(number, ep)


def choose_machine(run: RunConfig, wanted: PlanConfig, ranks: int) -> Machine:
    """The machine that is meant, with what is wanted otherwise of it.

    Args:
        ranks: to measure with, if it is this one.
    """
    if wanted.machine == "this":
        machine = calibrated(on_one_rank(run, torch.cuda.device_count()), ranks, wanted.measure)
        if machine.missed > MISSED:
            raise UserError(
                f"the rates measured here miss a pass that they were made from by {machine.missed:.0%}, more than "
                f"{MISSED:.0%}: other programs may be using this machine. Try again with --measure when it is quiet, "
                "or take a known one: --machine h100"
            )
    elif wanted.measure:
        raise ConfigError(f"--measure measures this machine, and --machine {wanted.machine} asks for another")
    else:
        machine = find_machine(wanted.machine)
    if wanted.memory_gib:
        machine = replace(machine, memory=wanted.memory_gib * GIB)
    if wanted.ranks_per_host:
        machine = replace(machine, ranks_per_host=wanted.ranks_per_host)
    if wanted.link_gb_s:
        machine = replace(machine, inside=_faster(machine.inside, wanted.link_gb_s))
    if wanted.host_link_gb_s:
        machine = replace(machine, across=_faster(machine.across or machine.inside, wanted.host_link_gb_s))
    return machine


def _faster(links: Any, gb_s: float) -> dict[str, Link]:
    return {name: replace(link, bandwidth=gb_s * 1e9) for name, link in links.items()}


def memory_table(run: RunConfig, skew: float = 1.0) -> Table:
    """What a rank of each stage needs, predicted; for `describe`.

    Args:
        run: resolved, with the vocabulary's size filled.
        skew: load of the busiest ep rank over the even one.
    """
    stages = memory_of_stages(run, skew)
    busy = "experts are taken to be equally busy (--skew)" if skew == 1 else f"of the busiest experts, skew {skew:.2f}"
    about = f"; {busy}" if run.model.moe else ""
    out = Table(title=f"memory of a rank at the worst moment of a step, predicted{about}", title_justify="left")
    out.add_column("what for")
    for number in range(len(stages)):
        out.add_column(f"stage {number}", justify="right")
    for kind in dict.fromkeys(kind for each in stages for kind in each):
        out.add_row(kind, *(bytes_text(each.get(kind, 0)) for each in stages))
    out.add_row("all", *(bytes_text(sum(each.values())) for each in stages), style="bold")
    return out


def _one(found: Prediction, machine: Machine) -> RenderableType:
    """One layout: where its seconds go, its memory, its bytes."""
    verdict = "fits" if found.fits else "does NOT fit"
    speed = f"{found.seconds:.4g} s a step, {found.tokens_per_second:,.0f} tokens/s"
    title = f"{found.run.layout} {settings(found.run)}: {speed}"
    seconds = Table(title=title, title_justify="left")
    memory = Table(title=f"{verdict} into {bytes_text(machine.memory)} of {machine.name}", title_justify="left")
    sent = Table(title="a rank sends in one step", title_justify="left")
    for out, unit in ((seconds, "seconds"), (memory, "bytes"), (sent, "bytes")):
        out.add_column("")
        out.add_column(unit, justify="right")
    for name, value in found.parts.items():
        seconds.add_row(name, f"{value:.4g}")
    for name, size in [*found.memory.items(), ("all", found.memory_bytes)]:
        memory.add_row(name, bytes_text(size))
    for axis, count in by_axis(found).items():
        sent.add_row(axis, f"{count:,}")
    return Group(seconds, memory, sent, *(f"note: {notice}" for notice in notices(found.run)))
