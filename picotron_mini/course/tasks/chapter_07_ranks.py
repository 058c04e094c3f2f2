"""Exercises of chapter 07 on eight ranks: the norm of a gradient that nobody has whole, and a layout within a budget.

The norm is judged against the gradient put together. The layout is run: the ledger says what it sent, and its storages
what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...collectives import all_reduce, ledger
from ...config import ConfigError, ModelConfig, RunConfig, TrainConfig
from ...data.loader import Batch
from ...dry_run import held_bytes
from ...launch import launch
from ...layout import Layout
from ...legality import resolve
from ...mesh import Mesh, coordinates
from ...parallel.parallelize import layout_of, parallelize
from ...training.optimizer import make_optimizer
from ...training.step import train_step
from ..exercises import Exercise, Mistake, NotAttempted
from ..figures.layout import bytes_between_hosts
from ..museum import MODEL, TRAIN

Answer = Callable[..., Any]
RANKS = 8


# --- 3: the norm of the whole gradient --------------------------------------------------------------------


def norm_stub(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    """The norm of the one global gradient, the same on every rank.

    `all_reduce(x, axis)` of `collectives` returns the sum over an axis; `mesh["pp"]`, `mesh["dp"]`, `mesh["tp"]` and
    `mesh["world"]` are axes. `coordinates(mesh.shape, mesh.rank)` of `mesh` is where this rank is, and
    `layout[name].counts(where)` says of all ranks with the same numbers whether this is the first.

    Args:
        gradients: by global name, this rank's slices, already summed over dp: no two stages have a name in common but
            that of a tied embedding, and norms are whole on every tensor-parallel rank.
    """
    raise NotAttempted


def norm(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    """Squares add up over ranks, once for each element; the root comes last."""
    index = coordinates(mesh.shape, mesh.rank)
    mine = _squares(g for name, g in gradients.items() if layout[name].counts(index))
    return math.sqrt(float(all_reduce(mine, mesh["world"])))


def _squares(gradients: Any) -> Tensor:
    return sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64))


def _local(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    return math.sqrt(float(_squares(gradients.values())))


def _over(*axes: str) -> Answer:
    def answer(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
        total = _squares(gradients.values())
        for axis in axes:
            total = all_reduce(total, mesh[axis])
        return math.sqrt(float(total))

    return answer


def _stage_by_stage(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    cut = _squares(g for name, g in gradients.items() if layout[name].shards)
    whole = _squares(g for name, g in gradients.items() if not layout[name].shards)
    return math.sqrt(float(all_reduce(cut, mesh["tp"]) + whole))


def _tie_twice(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    return math.sqrt(_stages_added(_stage_by_stage(gradients, layout, mesh) ** 2, mesh))


def _stages_added(squared: float, mesh: Mesh) -> float:
    return float(all_reduce(torch.tensor(squared, dtype=torch.float64), mesh["pp"]))


def _each_root(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    index = coordinates(mesh.shape, mesh.rank)
    mine = [g.double().norm() for name, g in gradients.items() if layout[name].counts(index)]
    return float(all_reduce(sum(mine, torch.zeros((), dtype=torch.float64)), mesh["world"]))


def _without_root(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    index = coordinates(mesh.shape, mesh.rank)
    mine = _squares(g for name, g in gradients.items() if layout[name].counts(index))
    return float(all_reduce(mine, mesh["world"]))


def _own_stage(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    index = coordinates(mesh.shape, mesh.rank)
    mine = _squares(g for name, g in gradients.items() if layout[name].counts(index))
    return math.sqrt(float(all_reduce(mine, mesh["tp"])))


def _roots_added(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> float:
    index = coordinates(mesh.shape, mesh.rank)
    mine = _squares(g for name, g in gradients.items() if layout[name].counts(index)).sqrt()
    return float(all_reduce(mine, mesh["world"]))


_NORMS: dict[str, tuple[Answer, str]] = {
    "this rank alone": (_local, "this is the norm of what one rank holds, and every rank gets another one"),
    "each stage by itself": (
        _stage_by_stage,
        "each stage gets a norm of its own; gradients would be clipped by different factors, and the step would turn",
    ),
    "all copies": (
        _over("world"),
        "every rank added all that it holds: what is held in copies, over dp, and norms over tp, counts once a copy",
    ),
    "norms counted tp times": (
        _over("tp", "pp"),
        "copies over dp are left out, and those over tp are not: norms are whole on every tensor-parallel rank",
    ),
    "tie counted twice": (
        _tie_twice,
        "right for all but the tied embedding, which is one parameter and lies on the first and the last stage",
    ),
    "roots added": (_roots_added, "norms do not add up, their squares do: take the root after the sum"),
    "a root of each": (_each_root, "norms of parameters do not add up, their squares do: take the root after the sum"),
    "no root": (_without_root, "this is the square of the norm"),
    "over tp only": (
        _own_stage,
        "another stage's share is missing, and copies over dp, which do not count, say nothing: all ranks need the sum",
    ),
}


def _norm_on_rank(answers: list[Answer]) -> tuple[list[float], float]:
    """What the answers say on this rank, and the truth."""
    run = resolve(RunConfig(layout="dp=2,tp=2,pp=2", model=MODEL, train=TRAIN))
    mesh, layout = Mesh.build(run.mesh), layout_of(run)
    index, generator = coordinates(mesh.shape, mesh.rank), torch.Generator().manual_seed(0)
    whole = {n: torch.randn(place.shape, generator=generator, dtype=torch.float64) for n, place in layout.items()}
    mine = {n: g[layout[n].slices(index)].clone() for n, g in whole.items() if layout[n].holds(index)}
    return [float(answer(mine, layout, mesh)) for answer in answers], math.sqrt(float(_squares(whole.values())))


def _run_norm(answer: Answer) -> str | None:
    wrong = [each for each, _ in _NORMS.values()]
    found = launch(_norm_on_rank, [answer, *wrong], world_size=RANKS, timeout=60, output="hide")
    want = found[0][1]
    got = [said[0] for said, _ in found]
    if all(math.isclose(value, want, rel_tol=1e-9) for value in got):
        return None
    for number, (_, hint) in enumerate(_NORMS.values(), start=1):
        if all(math.isclose(said[0], said[number], rel_tol=1e-9) for said, _ in found):
            return hint
    return f"rank 0 says {got[0]:.4f}, rank {RANKS - 1} {got[-1]:.4f}; the norm is {want:.4f}"


# --- 4: a layout within a budget --------------------------------------------------------------------------

HOST = 4  # ranks of a host
WORK_MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2, tie_embeddings=False
)
WORK = TrainConfig(seq_len=16, batch_size=8, micro_batch_size=1, dtype="float32", device="cpu", bucket_mb=0.05)
MEMORY, SLOW = 140_000, 5_000  # bytes that a rank may keep between steps, and send on axes that cross hosts


@dataclass(frozen=True)
class Measured:
    """Of the worst rank: bytes kept between steps, and bytes sent in a step on axes that cross hosts."""

    kept: int
    slow: int


def choose_stub() -> tuple[str, dict[str, Any]]:
    """A layout of 8 ranks, 4 a host, and settings beside it, such as ("dp=8", {"zero": 1}).

    Settings may be `zero`, `sequence_parallel`, `context` and `schedule`. The work is `WORK_MODEL` and `WORK` of
    `course.tasks.chapter_07_ranks`: 8 sequences of 16 tokens a step, in micro-batches of one, float32, AdamW.

    Returns:
        One that is legal, whose ranks each keep at most MEMORY bytes from step to step (weights, gradients, optimizer)
        and hand over at most SLOW bytes a step on axes with ranks on both hosts.
    """
    raise NotAttempted


def choose() -> tuple[str, dict[str, Any]]:
    """Only pp may cross: hidden states of few tokens. ZeRO 2 inside the host, and each tp rank sends its tokens."""
    return "dp=2,tp=2,pp=2", {"zero": 2, "sequence_parallel": True}


def settle(layout: str, settings: dict[str, Any]) -> RunConfig:
    """The run that an answer means.

    Raises:
        ConfigError: it is not legal.
    """
    return resolve(RunConfig(layout=layout, model=WORK_MODEL, train=replace(WORK, **settings)))


def measure(run: RunConfig) -> Measured:
    """Run a step on all ranks, and count."""
    found = launch(_step_on_rank, run, world_size=run.mesh.world_size, timeout=60, output="hide")
    return Measured(
        max(kept for kept, _ in found),
        max(bytes_between_hosts(sent, run.mesh, HOST) for _, sent in found),
    )


def _step_on_rank(run: RunConfig) -> tuple[int, dict[tuple[str, str], int]]:
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    shape = (run.train.micro_batch_size, run.train.seq_len)
    tokens = torch.arange(shape[1]).expand(shape).contiguous()
    batch = Batch(tokens, tokens, tokens, torch.zeros_like(tokens))
    with ledger.recording() as sent:
        train_step(parallel, optimizer, [batch] * run.train.micro_batches)
    return held_bytes(parallel, optimizer), dict(sent)


_RANKS = f"the layout must have {RANKS} ranks: the sizes of its axes multiply to it"
_KEPT = (
    f"within the budget of bytes, and a rank keeps more than {MEMORY:,}: cut weights, gradients and optimizer state "
    "over the axes that lie inside a host"
)
_SENT = (
    f"within the budget of memory, and a rank sends more than {SLOW:,} bytes on axes that cross hosts; which of them "
    "need not cross?"
)
_WHOLE_TOKENS = (
    "within the budget of memory; between the hosts only hidden states travel, and every tensor-parallel rank sends "
    "all of them, the same numbers"
)
_BOTH = "a rank keeps too much, and sends too much between hosts: what is copied on every rank is also summed there"


CHOICES = ("zero", "sequence_parallel", "context", "schedule")


def _refusal(layout: str, settings: dict[str, Any]) -> str:
    extra = ", ".join(sorted(set(settings) - set(CHOICES)))
    if extra:
        return (
            f"{extra} is not yours to set: settings are {', '.join(CHOICES)}, and the rest of the work stays as it is"
        )
    try:
        settle(layout, settings)
    except ConfigError as error:
        return f"the library refuses it: {error}".splitlines()[0]
    return ""


def _run_choose(answer: Answer) -> str | None:
    said = answer()
    if not (isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], str) and isinstance(said[1], dict)):
        return f'return a layout and a dict of settings, as ("dp=8", {{"zero": 1}}), not {said!r}'
    layout, settings = said
    refused = _refusal(layout, settings)
    if refused:
        return refused
    run = settle(layout, settings)
    if run.mesh.world_size != RANKS:
        return _RANKS
    found = measure(run)
    if found.kept > MEMORY:
        return _BOTH if found.slow > SLOW else _KEPT
    if found.slow <= SLOW:
        return None
    same_tokens = run.mesh.tp > 1 and not run.train.sequence_parallel and found.slow <= run.mesh.tp * SLOW
    return _WHOLE_TOKENS if same_tokens else _SENT


def _always(layout: str, **settings: Any) -> Answer:
    return lambda: (layout, settings)


EXERCISES = [
    Exercise(
        id="07.norm",
        title="The norm of a gradient that nobody has whole",
        task="On dp=2,tp=2,pp=2, compute the norm of the global gradient from the slices that each rank holds.",
        stub=norm_stub,
        reference=norm,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _NORMS.items()),
        run=_run_norm,
    ),
    Exercise(
        id="07.budget",
        title="A layout within a budget",
        task=f"Find a legal layout of 8 ranks on two hosts that keeps at most {MEMORY:,} bytes a rank and sends at "
        f"most {SLOW:,} on axes that cross hosts.",
        stub=choose_stub,
        reference=choose,
        mistakes=(
            Mistake("too many for the heads", _always("tp=4,pp=2"), _refusal("tp=4,pp=2", {})),
            Mistake("four ranks", _always("tp=2,pp=2"), _RANKS),
            Mistake("everything copied", _always("dp=8"), _BOTH),
            Mistake("cut over the slow axis", _always("dp=8", zero=3), _SENT),
            Mistake("tp and pp alone", _always("cp=2,tp=2,pp=2", sequence_parallel=True), _KEPT),
            Mistake("the same tokens twice", _always("dp=2,tp=2,pp=2", zero=2), _WHOLE_TOKENS),
        ),
        run=_run_choose,
    ),
]
