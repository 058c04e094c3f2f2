"""The bug museum: real bugs of real trainers, each of them a small change to this library that anyone can run.

    show("03.parameter_reduced")             the story, and the mutant's source
    run("03.parameter_reduced", "dp=2")      `verify` with the mutant: which number diverges first
    kill("03.parameter_reduced", my_test)    does a learner's own test notice it?

A mutant is a function that is called inside each rank before anything else and replaces a part of the library there;
the process that started the ranks, and the next launch, never see it. Most of these bugs crash nothing. They train,
the loss falls, and the result is not what one device would have computed. So each exhibit names the layouts on which
`verify` must kill it, and those on which it is invisible (usually the ones that people test on). A test runs all.

Exhibits are the lists `EXHIBITS` of `course/exhibits_*.py`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import MeshShape, ModelConfig, TrainConfig, UserError
from ..launch import RankError, launch
from ..mesh import Mesh
from ..parity import Report
from ..verify import verify
from .exercises import Outcome, is_empty, one_line, registered
from .passes import record as record_pass

# Smaller than what `verify` takes by itself; still uneven, grouped-query and tied.
MODEL = ModelConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4
)
TRAIN = TrainConfig(
    steps=3, seq_len=8, micro_batch_size=2, micro_batches=3, lr=0.01, lr_schedule="constant", warmup_steps=0,
    clip_norm=0.5, bucket_mb=0.002, dtype="float64", device="cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Exhibit:
    """One bug.

    Attributes:
        id: chapter and name, as "03.parameter_reduced".
        story: what happened, where it was found, and why nobody saw it.
        symptom: what a run with it looks like.
        patch: mutates the library inside a rank; importable, so that it can be sent there.
        killed_on: layouts on which `verify` fails with it.
        survives_on: layouts on which it changes nothing, or nothing that `verify` can see.
        model: a model that has what the bug needs.
    """

    id: str
    title: str
    story: str
    symptom: str
    patch: Callable[[], None]
    killed_on: tuple[str, ...]
    survives_on: tuple[str, ...] = ("dp=1",)
    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN

    @property
    def chapter(self) -> str:
        return self.id.split(".")[0]


def exhibits() -> dict[str, Exhibit]:
    """Every exhibit by its id."""
    return {exhibit.id: exhibit for exhibit in registered("exhibits_", "EXHIBITS")}


def exhibit(exhibit_id: str) -> Exhibit:
    """One exhibit.

    Raises:
        UserError: there is none of this id.
    """
    found = exhibits()
    if exhibit_id not in found:
        raise UserError(f"there is no exhibit {exhibit_id!r}; there are {', '.join(found)}")
    return found[exhibit_id]


def show(exhibit_id: str) -> None:
    """Print the story, the symptom, and the source of the mutant."""
    item = exhibit(exhibit_id)
    print(f"{item.title}\n")
    print(textwrap.fill(item.story, 100))
    print(f"\nWhat one sees: {textwrap.fill(item.symptom, 100)}")
    print(f"Killed on: {' · '.join(item.killed_on)}. Invisible on: {' · '.join(item.survives_on) or 'nothing'}.\n")
    print(inspect.getsource(item.patch).rstrip())


def run(exhibit_id: str, layout: str, **options: Any) -> Report:
    """`verify` with the mutant in every rank.

    Args:
        options: further arguments of `verify`, as `optimizers`.

    Raises:
        RankError: the mutant made a rank fail.
    """
    item = exhibit(exhibit_id)
    return verify(layout, item.model, item.train, patch=item.patch, **options)


def kill(
    exhibit_id: str, test: Callable[[Mesh], object] | None = None, layout: str | None = None, *, record: bool = True
) -> Outcome:
    """Say whether a learner's test tells the sound library from the mutant, in one printed line.

    Args:
        test: called on every rank with the mesh; raises (as `assert` does) on some rank if something is wrong.
            None, or a function without a body: not attempted yet.
        layout: where it runs; None: the first layout on which the bug shows.
    """
    item = exhibit(exhibit_id)
    outcome = _judge(item, test, MeshShape.parse(layout or item.killed_on[0]))
    print(outcome)
    if outcome.passed and record:
        record_pass(exhibit_id)
    return outcome


def _judge(item: Exhibit, test: Callable[[Mesh], object] | None, shape: MeshShape) -> Outcome:
    if test is None or is_empty(test):
        return Outcome(item.id, "not attempted yet")
    try:
        launch(_on_rank, test, shape, None, world_size=shape.world_size, timeout=60, output="hide")
    except (RankError, UserError) as error:
        return Outcome(item.id, "failed", f"the test fails on the sound library: {one_line(error)}")
    try:
        launch(_on_rank, test, shape, item.patch, world_size=shape.world_size, timeout=60, output="hide")
    except RankError:
        return Outcome(item.id, "passed")
    return Outcome(item.id, "failed", f"the test passes with the bug in the library. What one sees: {item.symptom}")


def _on_rank(test: Callable[[Mesh], object], shape: MeshShape, patch: Callable[[], None] | None) -> None:
    if patch is not None:
        patch()
    test(Mesh.build(shape))
