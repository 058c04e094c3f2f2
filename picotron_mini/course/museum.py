"""The bug museum: real bugs of real trainers, each of them a small change to this library that anyone can run.

    show("03.parameter_reduced")             the story, and the mutant's source
    run("03.parameter_reduced", "dp=2")      the oracle with the mutant: which number diverges first
    kill("03.parameter_reduced", my_test)    does a learner's own test notice it, on the first layout where it shows?

A mutant is a function that is called inside each rank before anything else and replaces a part of the library there;
the process that started the ranks, and the next launch, never see it. Most of these bugs crash nothing. They train,
the loss falls, and the result is not what one device would have computed. So each exhibit names the layouts on which
its oracle must kill it, and those on which it is invisible (usually the ones that people test on). A test runs all.

The oracle is `verify`. What `verify` does not look at (which rows a batch holds, what a checkpoint brings back) an
exhibit judges by a `check` of its own. That is a test in the form of a learner's: called on every rank with the mesh,
it raises where something is wrong, and it must pass on the sound library.

To notice is to assert. A test that ends in another error with the bug in the library, or in ranks that wait for each
other, has met the bug and not seen it: that is reported as a crash. Where the bug itself is a crash or a hang, the
exhibit says so (`crashes`), and then a crash is what kills it.

Exhibits are the lists `EXHIBITS` of `course/exhibits/*.py`.
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


_SOUND_NAMES = (
    "(Does it call what `show` replaces through its module? A name that was imported alone is the sound one.)"
)
PATIENCE = 60.0  # seconds for a test on all ranks; then they are taken to wait for each other
Test = Callable[[Mesh], object]  # called on every rank; raises (as `assert` does) on some rank if something is wrong


@dataclass(frozen=True)
class Verdict:
    """What a test said on all ranks of a layout; has the attributes of a `Report` that a lesson reads.

    Attributes:
        first_divergence: the first rank that raised and its last line; None: no rank did.
        crashed: what it raised was no assertion, or the ranks waited for each other.
    """

    first_divergence: str | None
    crashed: bool = False

    @property
    def ok(self) -> bool:
        return self.first_divergence is None


@dataclass(frozen=True)
class Exhibit:
    """One bug.

    Attributes:
        id: chapter and name, as "03.parameter_reduced".
        story: what happened, where it was found, and why nobody saw it.
        symptom: what a run with it looks like.
        patch: mutates the library inside a rank; importable, so that it can be sent there.
        killed_on: layouts on which the oracle fails with it.
        survives_on: layouts on which it changes nothing, or nothing that the oracle can see.
        model, train: for `verify`, a model that has what the bug needs.
        check: the oracle in place of `verify`, importable as `patch` is. A patch replaces attributes of modules, so
            it must look up what it calls there: `loader.row_order(...)`, not a name that was imported alone. The
            first line of its docstring says what it demands.
        crashes: with the bug, ranks fail or wait for each other on the layouts of `killed_on`.
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
    check: Test | None = None
    crashes: bool = False

    @property
    def chapter(self) -> str:
        return self.id.split(".")[0]


def exhibits() -> dict[str, Exhibit]:
    """Every exhibit by its id."""
    return {exhibit.id: exhibit for exhibit in registered("exhibits", "EXHIBITS")}


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
    if item.check is not None:
        print(f"What notices it: {(inspect.getdoc(item.check) or '').splitlines()[0]}")
    print(f"Killed on: {' · '.join(item.killed_on)}. Invisible on: {' · '.join(item.survives_on) or 'nothing'}.")
    print(f"`kill` runs a test on {item.killed_on[0]}, unless it is given another layout.\n")
    print(inspect.getsource(item.patch).rstrip())


def run(exhibit_id: str, layout: str, **options: Any) -> Report | Verdict:
    """The exhibit's oracle, with the mutant in every rank.

    Args:
        options: further arguments of `verify`, as `optimizers`; a check of the exhibit's own takes none.

    Raises:
        RankError: the mutant made a rank of `verify` fail.
    """
    item = exhibit(exhibit_id)
    if item.check is not None:
        return ask(item.check, layout, item.patch, **options)
    return verify(layout, item.model, item.train, patch=item.patch, **options)


def ask(test: Test, layout: str, patch: Callable[[], None] | None = None) -> Verdict:
    """Call a test on every rank of a layout, in the sound library or with a mutant in it.

    Returns:
        Not ok if any rank raised, or if they were not done after a minute.
    """
    shape = MeshShape.parse(layout)
    try:
        launch(_on_rank, test, shape, patch, world_size=shape.world_size, timeout=PATIENCE, output="hide")
    except (RankError, UserError) as error:
        line = one_line(error)
        return Verdict(line, crashed=": AssertionError" not in line)
    return Verdict(None)


def _on_rank(test: Test, shape: MeshShape, patch: Callable[[], None] | None) -> None:
    if patch is not None:
        patch()
    mesh = Mesh.build(shape)
    try:
        test(mesh)
    except AssertionError as error:  # in one line, so that the report begins with what kind of error it was
        raise AssertionError(*str(error).splitlines()[:1]) from None


def kill(exhibit_id: str, test: Test | None = None, layout: str | None = None, *, record: bool = True) -> Outcome:
    """Say whether a learner's test tells the sound library from the mutant, in one printed line that names the layout.

    Args:
        test: called on every rank with the mesh; asserts what holds in the sound library and not with the bug.
            None, or a function without a body: not attempted yet.
        layout: where it runs; None: the first of the layouts on which the exhibit says that the bug shows.
    """
    item = exhibit(exhibit_id)
    layout = layout or item.killed_on[0]
    outcome = _judge(item, test, layout)
    print(f"{outcome} (on {layout})" if outcome.passed else outcome)
    if outcome.passed and record:
        record_pass(exhibit_id)
    return outcome


def _judge(item: Exhibit, test: Test | None, layout: str) -> Outcome:
    if test is None or is_empty(test):
        return Outcome(item.id, "not attempted yet")

    def failed(why: str) -> Outcome:
        return Outcome(item.id, "failed", f"on {layout} {why}")

    sound = ask(test, layout)
    if not sound.ok:
        return failed(f"the test fails on the sound library: {sound.first_divergence}")
    broken = ask(test, layout, item.patch)
    if broken.ok:
        return failed(f"the test passes with the bug in the library. What one sees: {item.symptom} {_SOUND_NAMES}")
    if broken.crashed and not item.crashes:
        return failed(
            f"the test crashes with the bug in the library, and asserts nothing about it: {broken.first_divergence}"
        )
    return Outcome(item.id, "passed")
