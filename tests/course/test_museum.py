"""Every exhibit of the bug museum is killed by `verify` where it says so, and there the sound library passes."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import pytest
import torch

from picotron_mini.collectives import all_reduce
from picotron_mini.config import ModelConfig, TrainConfig, UserError
from picotron_mini.course.museum import Exhibit, exhibit, exhibits, kill, run, show
from picotron_mini.launch import RankError
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.data import GradientBuckets
from picotron_mini.verify import verify

ALL = exhibits()
KILLED = [(item, layout) for item in ALL.values() for layout in item.killed_on]
SURVIVES = [(item, layout) for item in ALL.values() for layout in item.survives_on]
SGD = ("sgd",)  # it shows scales, which AdamW hides


@functools.cache
def sound(layout: str, model: ModelConfig, train: TrainConfig) -> bool:
    return verify(layout, model, train, optimizers=SGD).ok


@pytest.mark.slow
@pytest.mark.parametrize(("item", "layout"), KILLED, ids=[f"{item.id}-{layout}" for item, layout in KILLED])
def test_exhibit_is_killed(item: Exhibit, layout: str) -> None:
    try:
        report = run(item.id, layout, optimizers=SGD)
        assert not report.ok
        assert report.max_rel_err > 1e-6, "only the bytes differ"
    except RankError:
        pass  # a crash is noticed too
    assert sound(layout, item.model, item.train)


@pytest.mark.slow
@pytest.mark.parametrize(("item", "layout"), SURVIVES, ids=[f"{item.id}-{layout}" for item, layout in SURVIVES])
def test_exhibit_is_invisible_elsewhere(item: Exhibit, layout: str) -> None:
    assert run(item.id, layout, optimizers=SGD).ok


@pytest.mark.parametrize("item", ALL.values(), ids=list(ALL))
def test_exhibit_is_whole(item: Exhibit) -> None:
    assert item.killed_on
    assert item.title and item.symptom and item.patch.__doc__
    assert item.story.count(".") >= 2
    assert pickle.loads(pickle.dumps(item.patch)) is item.patch  # so that ranks can be given it


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
    assert "def parameter_reduced()" in shown


def gradients_are_summed(mesh: Mesh) -> None:
    """A learner's test that notices."""
    dp = mesh["dp"]
    weight = torch.nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([weight], dp)
    buckets.arm()
    (weight * (1.0 + dp.index)).sum().backward()
    buckets.finish()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3,), 3.0))


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
    assert lines[2].startswith(f"{bug}: failed: the test passes with the bug in the library.")
    assert lines[3].startswith(f"{bug}: failed: the test fails on the sound library: on rank ")
    assert lines[3].endswith("AssertionError: the mean of ones")
    assert lines[5] == f"{bug}: passed"


def test_kill_runs_on_the_layout_that_is_asked_for() -> None:
    def four(mesh: Mesh) -> None:
        assert mesh["dp"].size == 4

    outcome = kill("03.parameter_reduced", four, "dp=4", record=False)
    assert outcome.hint.startswith("the test passes with the bug")
