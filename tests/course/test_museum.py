"""Every exhibit of the bug museum is killed by its oracle where it says so, and there the sound library passes."""

from __future__ import annotations

import functools
import inspect
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from picotron_mini.collectives import all_reduce
from picotron_mini.config import ModelConfig, TrainConfig, UserError
from picotron_mini.course import museum
from picotron_mini.course.museum import Exhibit, Test, Verdict, ask, exhibit, exhibits, kill, run, show
from picotron_mini.data import loader
from picotron_mini.launch import RankError
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.data import GradientBuckets
from picotron_mini.parity import Report
from picotron_mini.verify import verify

pytestmark = pytest.mark.slow  # each exhibit starts ranks

ALL = exhibits()
KILLED = [(item, layout) for item in ALL.values() for layout in item.killed_on]
SURVIVES = [(item, layout) for item in ALL.values() for layout in item.survives_on]
SGD = ("sgd",)  # it shows scales, which AdamW hides


def judged(item: Exhibit, layout: str) -> Report | Verdict:
    return run(item.id, layout, **({} if item.check else {"optimizers": SGD}))


@functools.cache
def sound(check: Test | None, layout: str, model: ModelConfig, train: TrainConfig) -> Report | Verdict:
    return ask(check, layout) if check else verify(layout, model, train, optimizers=SGD)


@pytest.mark.parametrize(("item", "layout"), KILLED, ids=[f"{item.id}-{layout}" for item, layout in KILLED])
def test_exhibit_is_killed(item: Exhibit, layout: str) -> None:
    if item.crashes and item.check is None:
        with pytest.raises(RankError):
            judged(item, layout)
    else:
        report = judged(item, layout)
        assert not report.ok
        if isinstance(report, Verdict):
            assert report.crashed == item.crashes
        else:
            assert report.max_rel_err > 1e-6, "only the bytes differ"
    found = sound(item.check, layout, item.model, item.train)
    assert found.ok, found.first_divergence


@pytest.mark.parametrize(("item", "layout"), SURVIVES, ids=[f"{item.id}-{layout}" for item, layout in SURVIVES])
def test_exhibit_is_invisible_elsewhere(item: Exhibit, layout: str) -> None:
    report = judged(item, layout)
    assert report.ok, report.first_divergence


@pytest.mark.parametrize("item", ALL.values(), ids=list(ALL))
def test_exhibit_is_whole(item: Exhibit) -> None:
    assert item.killed_on
    assert item.title and item.symptom and item.patch.__doc__
    assert item.story.count(".") >= 2
    assert pickle.loads(pickle.dumps(item.patch)) is item.patch  # so that ranks can be given it
    if item.check is not None:
        assert inspect.getdoc(item.check)  # `show` prints its first line
        assert pickle.loads(pickle.dumps(item.check)) is item.check  # by name: by value it would not see the patch


def test_real_bugs_are_there() -> None:
    wanted = {"03.parameter_reduced", "05.loss_not_divided", "04.slice_zero_for_all", "05.stages_start_alike"}
    assert wanted <= set(ALL)


def test_unknown_exhibit_is_named() -> None:
    with pytest.raises(UserError, match=r"'03\.nothing'.*03\.parameter_reduced"):
        exhibit("03.nothing")


def test_show_tells_story_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    show("03.parameter_reduced")
    shown = capsys.readouterr().out
    assert "naive data parallel of huggingface/picotron" in shown
    assert "Killed on: dp=2" in shown
    assert "`kill` runs a test on dp=2, unless it is given another layout." in shown
    assert "def parameter_reduced()" in shown


def summed(mesh: Mesh) -> torch.Tensor:
    """The gradient [3] over two ranks whose own ones are 1 and 2: 3 everywhere, if nothing is broken."""
    dp = mesh["dp"]
    weight = torch.nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([weight], dp)
    buckets.arm()
    (weight * (1.0 + dp.index)).sum().backward()
    buckets.finish()
    assert weight.grad is not None
    return weight.grad


def gradients_are_summed(mesh: Mesh) -> None:
    """A learner's test that notices."""
    assert torch.equal(summed(mesh), torch.full((3,), 3.0))


def gradients_exist(mesh: Mesh) -> None:
    """One that does not look at their values."""
    weight = torch.nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([weight], mesh["dp"])
    weight.sum().backward()
    buckets.finish()
    assert weight.grad is not None


def sum_is_mean(mesh: Mesh) -> None:
    """One that demands the wrong thing."""
    assert all_reduce(torch.ones(1), mesh["dp"]) == 1, "the mean of ones"


def test_kill_judges_a_learners_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bug = "03.parameter_reduced"

    def empty(mesh: Mesh) -> None: ...

    assert kill(bug).status == kill(bug, empty).status == "not attempted yet"
    assert kill(bug, gradients_exist).status == "failed"
    assert kill(bug, sum_is_mean).status == "failed"
    assert kill(bug, gradients_are_summed, record=False).passed
    assert not (tmp_path / ".progress.json").exists()
    assert kill(bug, gradients_are_summed).passed
    assert json.loads((tmp_path / ".progress.json").read_text()) == {"passed": [bug]}
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"{bug}: failed: on dp=2 the test passes with the bug in the library.")
    assert lines[3].startswith(f"{bug}: failed: on dp=2 the test fails on the sound library: on rank ")
    assert lines[3].endswith("AssertionError: the mean of ones")
    assert lines[5] == f"{bug}: passed (on dp=2)"


def both_micro_batches_count(mesh: Mesh) -> None:
    """The natural test of accumulation, as a learner writes it."""
    dp = mesh["dp"]
    weight = torch.nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([weight], dp)
    for last in (False, True):
        if last:
            buckets.arm()
        (weight * (1.0 + dp.index)).sum().backward()
    buckets.finish()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0 * (1 + 2)))  # its message has several lines


@pytest.mark.parametrize("bug", ["03.reduced_too_early", "03.parameter_reduced", "03.accumulation_lost"])
def test_a_natural_test_kills(bug: str) -> None:
    for _ in range(3 if bug == "03.reduced_too_early" else 1):  # this one was a race once
        outcome = kill(bug, both_micro_batches_count, record=False)
        assert outcome.passed, outcome


def reads_what_is_not_there(mesh: Mesh) -> None:
    """A test that ends in an error of its own where the bug is."""
    {3.0: "the sum"}[summed(mesh)[0].item()]


def test_a_crash_is_no_kill_unless_the_bug_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    item = exhibit("03.parameter_reduced")
    outcome = kill(item.id, reads_what_is_not_there, record=False)
    assert outcome.hint.startswith(
        "on dp=2 the test crashes with the bug in the library, and asserts nothing about it:"
    )
    assert "KeyError" in outcome.hint
    monkeypatch.setattr(museum, "exhibits", lambda: {item.id: replace(item, crashes=True)})
    assert kill(item.id, reads_what_is_not_there, record=False).passed


def test_kill_runs_on_the_layout_that_is_asked_for() -> None:
    def four(mesh: Mesh) -> None:
        assert mesh["dp"].size == 4

    outcome = kill("03.parameter_reduced", four, "dp=4", record=False)
    assert outcome.hint.startswith("on dp=4 the test passes with the bug")


def everyone_gets_the_first_rows() -> None:
    """A mutant that `verify` cannot see in one rank, and that this file's check can."""
    real = loader.data_rows
    loader.data_rows = lambda size, dp, index, *rest: real(size, dp, 0, *rest)  # type: ignore[assignment]


def rows_are_divided(mesh: Mesh) -> None:
    """Each data rank has rows of its own.

    Not more.
    """
    dp = mesh["dp"]
    assert loader.data_rows(8, dp.size, dp.index).start == dp.index * 8 // dp.size, "another rank's rows"


@pytest.fixture
def own_oracle(monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of an exhibit that is judged by a check of its own."""
    item = Exhibit(
        id="99.first_rows", title="The first rows for all", story="One. Two.", symptom="equal losses on all ranks.",
        patch=everyone_gets_the_first_rows, killed_on=("dp=2",), check=rows_are_divided,
    )  # fmt: skip
    monkeypatch.setattr(museum, "exhibits", lambda: {item.id: item})
    return item.id


def test_an_exhibit_may_have_an_oracle_of_its_own(own_oracle: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run(own_oracle, "dp=2")
    assert not broken.ok
    assert broken.first_divergence == "on rank 1: AssertionError: another rank's rows"
    assert run(own_oracle, "dp=1") == ask(rows_are_divided, "dp=2") == Verdict(None)
    assert Verdict(None).ok
    with pytest.raises(TypeError, match="optimizers"):  # said, not swallowed
        run(own_oracle, "dp=1", optimizers=SGD)

    show(own_oracle)
    assert "What notices it: Each data rank has rows of its own.\nKilled on: dp=2." in capsys.readouterr().out
    assert kill(own_oracle, rows_are_divided, record=False).passed


def test_a_check_that_never_ends_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_waits(mesh: Mesh) -> None:
        if mesh.rank == 0:
            all_reduce(torch.ones(1), mesh["dp"])
            all_reduce(torch.ones(1), mesh["dp"])
        else:
            all_reduce(torch.ones(1), mesh["dp"])
            threading.Event().wait()

    monkeypatch.setattr(museum, "PATIENCE", 3)
    waited = ask(first_waits, "dp=2")
    assert waited.first_divergence is not None and "the ranks wait for each other" in waited.first_divergence
    assert waited.crashed
