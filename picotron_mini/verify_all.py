"""Verify many configurations in one go: the default matrix of the command line, or all that there are.

    make verify-all        all of `matrix.combinations` (ten minutes on two idle cores) and of `expert_combinations`

A verification is short and starting ranks is not: so configurations of the same size share a launch, a few at a time.
If a rank fails, each of them is run again alone, and the one that fails is reported; the others go on.

What is done is appended to a file, one JSON object a line, with a digest of the library that did it. Interrupted, the
next call goes on where this one ended; a library that has changed begins anew. Once everything was run, a log is
written with a line for each configuration.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.table import Table

from .config import RunConfig
from .launch import RankError
from .matrix import MAX_RANKS, combinations, expert_combinations, flags, optimizers_of, technique
from .verify import verify_together

AT_ONCE = 8  # configurations a launch: all that their ranks computed is held in memory
STATE = Path(".build/verify_all.jsonl")

Result = dict[str, Any]  # `Report.to_dict`, and flags, technique; of a failed rank only some of it, and its error


def results(runs: Sequence[RunConfig]) -> Iterator[Result]:
    """Verify each; gives the results in order, several at once as their launch ends."""
    for _, same in itertools.groupby(runs, lambda run: (run.mesh.world_size, run.train.device)):
        waiting = list(same)
        while waiting:
            now, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
            yield from _together(now)


def _together(runs: Sequence[RunConfig]) -> list[Result]:
    try:
        reports = verify_together([optimizers_of(run) for run in runs])
        found = [report.to_dict() for report in reports]
    except RankError as error:
        if len(runs) > 1:
            return [result for run in runs for result in _together([run])]
        lines = str(error).splitlines()
        found = [{"ok": False, "max_rel_err": None, "bytes_predicted": None, "bytes_counted": None,
                  "layout": runs[0].layout, "error": f"{lines[0]} {lines[-1]}"}]  # fmt: skip
    return [{"flags": flags(run), "technique": technique(run)} | each for run, each in zip(runs, found, strict=True)]


def table(found: Sequence[Result]) -> Table:
    """The results as a table for a terminal."""
    wrong = sum(not result["ok"] for result in found)
    verdict = f"{wrong} of {len(found)} are NOT" if wrong else f"all {len(found)} are"
    title = f"{verdict} equal to one device; bytes of rank 0 in one step"
    out = Table(title=title, title_justify="left")
    for column in ("layout", "largest error", "bytes predicted", "counted", ""):
        out.add_column(column, justify="right" if column in ("bytes predicted", "counted") else "left")
    for result in found:
        predicted, counted = (_number(result[f"bytes_{kind}"]) for kind in ("predicted", "counted"))
        out.add_row(result["technique"], _error(result), predicted, counted, "ok" if result["ok"] else _why(result))
    return out


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _error(result: Result) -> str:
    return "-" if result["max_rel_err"] is None else f"{result['max_rel_err']:.1e}"


def _why(result: Result) -> str:
    problems = (result.get("error"), result.get("first_divergence"), *(result.get("bytes_problems") or ()))
    return f"WRONG: {next((each for each in problems if each), 'no number')}"


# --- all of them ------------------------------------------------------------------------------------------


def library_digest() -> str:
    """Of every line of the library that a verification may run, and of torch's release."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "course")
    found = hashlib.sha256(torch.__version__.encode())
    for path in files:
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def verify_all(log: Path, state: Path = STATE, first: int = 0, max_ranks: int = MAX_RANKS) -> bool:
    """Verify every legal combination, going on where an interrupted call ended; returns whether all are equal.

    Args:
        log: written when all were run, a line for each.
        state: what was done so far.
        first: only so many of those that are left, for trying it out; 0: all.
        max_ranks: of a combination.
    """
    digest, runs = library_digest(), combinations(max_ranks) + expert_combinations(max_ranks)
    lines = state.read_text().splitlines() if state.exists() else []
    # what was wrong is tried again: it may have been the machine
    done = {each["flags"]: each for each in map(json.loads, lines) if each["library"] == digest and each["ok"]}
    left = [run for run in runs if flags(run) not in done]
    print(f"{len(runs)} combinations, {len(runs) - len(left)} done, library {digest}", flush=True)
    left = left[:first] if first else left
    state.parent.mkdir(parents=True, exist_ok=True)
    start, cost = time.monotonic(), sum(run.mesh.world_size for run in left)  # the CPU's work grows with the ranks
    total, spent = cost, 0
    with state.open("a") as file:
        for number, (run, result) in enumerate(zip(left, results(left), strict=True), 1):
            seconds = time.monotonic() - start
            file.write(json.dumps(result | {"library": digest, "seconds": round(seconds, 1)}) + "\n")
            file.flush()
            done[result["flags"]] = result
            spent += run.mesh.world_size
            minutes = seconds / spent * (total - spent) / 60
            print(f"{number}/{len(left)}  {line_of(result)}  ({minutes:.1f} min left)", flush=True)
    mine = [done[key] for run in runs if (key := flags(run)) in done]
    ok = all(result["ok"] for result in mine)
    if len(mine) == len(runs):
        log.write_text(_header(mine, max_ranks, digest) + "".join(f"{line_of(result)}\n" for result in mine))
        print(f"{'all equal' if ok else 'NOT all equal'} to one device: {log}")
    return ok


def line_of(result: Result) -> str:
    """One result as one line."""
    start = f"{'ok   ' if result['ok'] else 'WRONG'}  {_error(result):>7}  {_number(result['bytes_counted']):>11} bytes"
    return f"{start}  {result['flags']}" + ("" if result["ok"] else f"  {_why(result)}")


def _header(found: Sequence[Result], max_ranks: int, digest: str) -> str:
    errors = [result["max_rel_err"] for result in found]
    largest = f"{max(errors):.1e}" if None not in errors else "no number"
    return (
        f"# Every legal combination on at most {max_ranks} ranks: make verify-all. Each line has the flags of a\n"
        "# picotron-mini verify (which takes 3 steps, and this took 2), the largest relative error of loss,\n"
        "# gradients, gradient norm and weights with SGD and with AdamW in float64 (allowed: 1e-9), and the bytes\n"
        "# that rank 0 counted in a step, as many as predicted.\n"
        f"# {len(found)} combinations, {sum(not result['ok'] for result in found)} wrong, largest error {largest}\n"
        f"# library {digest}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n"
    )


def main() -> None:
    """`python -m picotron_mini.verify_all LOG`; exits with 0 only if everything that was run is equal."""
    try:
        ok = tyro.cli(verify_all, config=(tyro.conf.PositionalRequiredArgs,))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
