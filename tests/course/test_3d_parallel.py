"""What chapter 07 shows beside the library: groups and hosts, pictures, and a learner's test for the museum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.config import AXES, MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.figures.layout import (
    bytes_between_hosts,
    crosses,
    draw_bytes,
    draw_memory,
    draw_mesh,
    draw_time,
    groups,
)
from picotron_mini.course.figures.picture import Picture
from picotron_mini.course.museum import MODEL, TRAIN, kill
from picotron_mini.course.tasks import chapter_07, chapter_07_ranks
from picotron_mini.course.tasks.chapter_07 import Answer
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.parallel.machine import MACHINES
from picotron_mini.parallel.messages import crosses_hosts
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.parallel.predict import predict
from picotron_mini.parallel.traffic import predict_step

SHAPES = [MeshShape(pp, dp, cp, tp) for pp, dp, cp, tp in product((1, 2), (1, 3), (1, 2), (1, 2))]
WORK = TrainConfig(seq_len=64, batch_size=8, micro_batch_size=1, dtype="bfloat16", device="cuda")


def resolved(layout: str, **train: object) -> RunConfig:
    model = ModelConfig(vocab_size=128)
    return resolve(RunConfig(layout=layout, model=model, train=replace(WORK, **train)), gpus=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_are_those_of_the_mesh(shape: MeshShape) -> None:
    for axis in (*AXES, "world", *(["dp_cp"] if shape.cp > 1 else [])):
        assert set(groups(shape, axis)) == {Mesh(shape, rank)[axis].ranks for rank in range(shape.world_size)}


@pytest.mark.parametrize("order", [AXES, ("tp", "cp", "dp", "pp"), ("dp", "pp", "cp", "tp")], ids="-".join)
def test_groups_of_an_axis_share_out_all_ranks(order: tuple[str, ...]) -> None:
    shape = MeshShape(2, 3, 2, 2)
    for axis in (*AXES, "dp_cp", "world"):
        found = groups(shape, axis, order)
        assert sorted(rank for group in found for rank in group) == list(range(24))
    assert all(group == tuple(range(group[0], group[0] + len(group))) for group in groups(shape, order[-1], order))


def test_the_planner_agrees_about_what_crosses() -> None:
    for shape in SHAPES:
        for axis in AXES:
            if getattr(shape, axis) > 1 and shape.dp != 3:  # a host may begin in the middle of a group of three
                machine = replace(MACHINES["h100"], ranks_per_host=4)
                assert crosses(shape, axis, 4) == crosses_hosts(shape, axis, machine), (shape, axis)


def test_another_numbering_moves_bytes_and_makes_none() -> None:
    run = resolved("dp=2,tp=2,pp=2")
    sent = predict_step(run, layout_of(run), coordinates(run.mesh, 0))
    ours = bytes_between_hosts(sent, run.mesh, 4)
    assert ours == sent["pp", "send"] + sent["world", "all_reduce"]
    slowest = bytes_between_hosts(sent, run.mesh, 4, ("tp", "cp", "dp", "pp"))
    assert slowest == sent["tp", "all_reduce"] + sent["world", "all_reduce"] > ours
    assert bytes_between_hosts(sent, run.mesh, 8) == 0
    assert bytes_between_hosts(sent, run.mesh, 1) == sum(sent.values())


def pictures() -> dict[str, Picture]:
    found = [predict(resolved(layout), MACHINES["h100"]) for layout in ("dp=8", "dp=2,tp=2,pp=2")]
    by_name = {each.run.layout: each for each in found}
    return {
        "mesh": draw_mesh(MeshShape(dp=2, tp=2, pp=2), 4),
        "memory": draw_memory(by_name, MACHINES["h100"].memory),
        "time": draw_time(found),
        "bytes": draw_bytes({"dp=8": {"dp": 100}, "dp=2,tp=2,pp=2": {"dp": 20, "tp": 400, "pp": 30}}),
    }


def test_pictures() -> None:
    for name, picture in pictures().items():
        svg = picture._repr_svg_()
        ElementTree.fromstring(svg)
        assert "<text" in svg and len(svg) < 60_000, name
        assert len(repr(picture)) > 100, name
    assert "tp inside a host" in repr(pictures()["mesh"]) and "pp between hosts" in repr(pictures()["mesh"])
    assert "dp=8 1.00" in repr(pictures()["time"])
    assert "tp 400" in repr(pictures()["bytes"])


@pytest.mark.slow
def test_more_than_one_layout_is_within_the_budget_and_few_are() -> None:
    passing = [("dp=2,tp=2,pp=2", {"zero": 3, "sequence_parallel": True}), ("dp=4,pp=2", {"zero": 3})]
    for layout, settings in passing:
        found = chapter_07_ranks.measure(chapter_07_ranks.settle(layout, settings))
        assert found.kept <= chapter_07_ranks.MEMORY and found.slow <= chapter_07_ranks.SLOW
    tight = chapter_07_ranks.measure(chapter_07_ranks.settle("dp=4,pp=2", {"zero": 2}))
    assert tight.kept > chapter_07_ranks.MEMORY and tight.slow <= chapter_07_ranks.SLOW


def test_the_budget_refuses_other_work() -> None:
    hint = chapter_07_ranks._run_choose(lambda: ("dp=8", {"batch_size": 1}))
    assert hint is not None and hint.startswith("batch_size is not yours to set: settings are zero, ")


def test_the_budget_wants_a_layout_and_settings() -> None:
    hint = chapter_07_ranks._run_choose(lambda: "dp=8")
    assert hint == """return a layout and a dict of settings, as ("dp=8", {"zero": 1}), not 'dp=8'"""


@pytest.mark.parametrize("axis", ["tp", "cp", "dp", "dp_cp", "pp", "world"])
@pytest.mark.parametrize("missing", [True, False])
def test_an_axis_that_crosses_and_is_not_counted_is_named(axis: str, missing: bool) -> None:
    """And one that is counted and does not cross; the mesh that is told as an example is one."""

    def answer(shape: MeshShape, per_host: int, sent: Mapping[tuple[str, str], int]) -> int:
        others = {key: n for key, n in sent.items() if key[0] != axis}
        own = sum(sent.values()) - sum(others.values())
        return chapter_07.across(shape, per_host, others) + (0 if missing else own)

    hint = chapter_07._run_across(answer)
    told = re.fullmatch(rf"{axis} is (left out|counted) where .*, as on (\S+) with (\d) ranks a host: .*", hint or "")
    assert told is not None, hint
    assert (told[1] == "left out") is missing
    assert crosses(MeshShape.parse(told[2]), axis, int(told[3])) is missing


@pytest.mark.parametrize("said", [None, 0.5, "dp", -1])
def test_what_is_no_sum_of_the_bytes_is_told_so(said: object) -> None:
    hint = chapter_07._run_across(lambda *case: said)
    assert hint is not None and hint.startswith("this is no sum of the bytes")


def _all_but(kind: str, axis: str) -> Answer:
    """Right but for one axis of one kind of parameter: named where it should not be, and not where it should."""

    def answer(asked: str, shape: MeshShape, between: bool) -> set[str]:
        right = chapter_07.summed(asked, shape, between)
        return right ^ {axis} if asked == kind and getattr(shape, axis) > 1 else right

    return answer


@pytest.mark.parametrize(
    ("kind", "axis", "words"),
    [(kind, "dp", "other sequences") for kind in ("matrix", "norm", "tied")]
    + [(kind, "cp", "other tokens") for kind in ("matrix", "norm", "tied")]
    + [(kind, "tp", "different slices") for kind in ("matrix", "tied")]
    + [("norm", "tp", "sequence parallelism"), ("matrix", "pp", "different layers")]
    + [("norm", "pp", "different layers"), ("tied", "pp", "the first stage and on the last")],
)
def test_an_axis_too_many_or_too_few_is_explained(kind: str, axis: str, words: str) -> None:
    hint = chapter_07._run_summed(_all_but(kind, axis))
    assert hint is not None and words in hint


@pytest.mark.parametrize("kind", [set, frozenset, list, tuple, iter], ids=lambda kind: kind.__name__)
def test_right_axes_may_come_in_any_container_or_one_by_one(kind: type) -> None:
    assert chapter_07._run_summed(lambda *case: kind(chapter_07.summed(*case))) is None


@pytest.mark.parametrize("said", [None, 3, "dp", ["world"], [("dp", "cp")], [["dp"]]])
def test_what_is_no_set_of_axes_is_told_so(said: object) -> None:
    hint = chapter_07._run_summed(lambda *case: said)
    assert hint is not None and hint.startswith("return a set of axes of the mesh")


def knows_its_place(mesh: Mesh) -> None:
    """A learner's test: what is cut by coordinates agrees with the groups."""
    run = resolve(RunConfig(layout=str(mesh.shape), model=replace(MODEL, vocab_size=36), train=TRAIN))
    parallel = parallelize(run, mesh, torch.device("cpu"))
    assert parallel.index["tp"] == mesh["tp"].index


def only_the_ranks_are_there(mesh: Mesh) -> None:
    """A test that looks at groups alone does not notice."""
    assert mesh.rank in mesh["tp"].ranks


@pytest.mark.slow
def test_a_test_of_coordinates_kills_the_exhibit_and_one_of_groups_does_not() -> None:
    assert kill("07.two_numberings", knows_its_place, record=False).passed
    outcome = kill("07.two_numberings", only_the_ranks_are_there, record=False)
    assert outcome.status == "failed" and "passes with the bug" in outcome.hint
