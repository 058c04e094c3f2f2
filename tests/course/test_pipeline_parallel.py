"""What chapter 05 shows: real timelines beside simulated ones, bytes that autograd keeps, messages in order."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.config import MeshShape, ModelConfig
from picotron_mini.course.exercises import exercise, judge
from picotron_mini.course.figures.timeline import draw_timelines, merge, pretend, timed
from picotron_mini.course.instruments.in_order import messages_in_order
from picotron_mini.course.instruments.saved import SavedBytes
from picotron_mini.course.tasks.chapter_05 import slow_links
from picotron_mini.course.tasks.chapter_05_weights import SIZES, allowed, late_weights, units
from picotron_mini.launch import RankError
from picotron_mini.mesh import Mesh
from picotron_mini.model.costs import layer_activation_bytes
from picotron_mini.model.gpt import GPT
from picotron_mini.parallel.pipeline import run_pipeline
from picotron_mini.parallel.schedules import SCHEDULES, Action, Event, Timeline, find_schedule, route_of, simulate

FORWARD, BACKWARD = 0.01, 0.02
CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4
)


def run(mesh: Mesh, name: str, m: int, forward, gradient_axis=None) -> None:
    axis = mesh["pp"]
    run_pipeline(
        SCHEDULES[name](axis.index, axis.size, m), forward=forward, axis=axis,
        gradient_axis=gradient_axis or mesh["pp.backward"], shape=(4,), dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def traced(name: str, stages: int, m: int) -> list[Event]:
    mesh = Mesh.build(MeshShape(pp=stages))
    events: list[Event] = []
    weight = torch.ones(4, requires_grad=True)

    def stage(number: int, hidden: torch.Tensor | None) -> torch.Tensor:
        x = pretend(weight * (1.0 if hidden is None else hidden), FORWARD, BACKWARD)
        return x.sum() if mesh["pp"].index == stages - 1 else x

    run(mesh, name, m, timed(stage, mesh["pp"].index, events))
    return events


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_real_run_becomes_a_timeline(ranks, name: str) -> None:
    stages, m = 3, 5
    timeline = merge(ranks(traced, name, stages, m, world_size=stages))
    simulated = simulate(SCHEDULES[name], stages, m, FORWARD, BACKWARD)
    assert timeline.peak_live == simulated.peak_live
    assert min(event.start for event in timeline.events) == 0
    at = {(event.stage, event.action): event for event in timeline.events}
    assert len(at) == len(timeline.events) == 2 * m * stages
    for stage in range(stages):  # each stage did what it was told, in order
        mine = [event.action for event in timeline.events if event.stage == stage]
        assert mine == SCHEDULES[name](stage, stages, m)
    for event in timeline.events:  # at least as long as it slept, and never before its input was there
        assert event.end - event.start > 0.9 * (FORWARD if event.action.kind == "forward" else BACKWARD)
        before = event.stage - 1 if event.action.kind == "forward" else event.stage + 1
        if 0 <= before < stages:
            assert event.start > at[before, event.action].start
    assert timeline.total > 0.9 * simulated.total


def test_pretending_changes_no_gradient() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (pretend(x, 0.0, 0.0) ** 2).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [4.0, 6.0]


def test_drawing_of_timelines() -> None:
    timelines = {name: simulate(SCHEDULES[name], 4, 6) for name in SCHEDULES}
    picture = draw_timelines(timelines, "two schedules", "forwards")
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert repr(picture) == "two schedules"
    assert re.findall(r">(\w+): (\d+) % idle<", svg) == [("afab", "33"), ("1f1b", "33")]
    assert svg.count("<rect") == 2 * 2 * 4 * 6 + 2  # and the legend
    assert ">forward</text>" in svg and ">backward</text>" in svg and "(W)" not in svg and "chunk" not in svg
    assert len(re.findall(r'y="[\d.]+">5</text>', svg)) == 2 * 2 * 4  # forward and backward of 5, on each stage of both
    assert len(svg) < 20_000
    assert svg == draw_timelines(timelines, "", "forwards")._repr_svg_()


def test_drawing_of_halves_and_chunks_names_them() -> None:
    timeline = simulate(find_schedule("zb-v"), 2, 3, route=route_of("zb-v", 2, 2))
    svg = draw_timelines({"zb-v": timeline}, "", "forwards")._repr_svg_()
    ElementTree.fromstring(svg)
    assert svg.count("<rect") == 2 * 2 * 3 * 3 + 3  # F, I and W of each micro-batch in each chunk; the legend
    assert "backward, weights (W)" in svg and ">backward</text>" not in svg and "0' in a second chunk" in svg
    assert len(re.findall(r">2'</text>", svg)) == 2 * 3


def test_drawing_leaves_out_numbers_that_do_not_fit() -> None:
    events = tuple(Event(0, Action("forward", m), m * 1.0, m + 0.5) for m in range(200))
    assert ">77</text>" not in draw_timelines({"long": Timeline(events)}, "", "s")._repr_svg_()


def test_saved_bytes_are_those_of_the_formula_and_go_with_the_backward() -> None:
    model = GPT(CONFIG, layers=[0, 1], embed=False, head=False)
    positions = torch.arange(6)[None]
    saved = SavedBytes(model.parameters())
    outputs = []
    for live in (1, 2, 3):
        x = torch.randn(2, 6, 8, requires_grad=True)
        with saved.watching():
            outputs.append(model(x, positions))
        tables = 2 * (6 * 2 * 4)  # cosines and sines [1, 1, T, Dh / 2], made anew in each forward
        assert saved.now == saved.peak == live * (2 * (2 * 6) * layer_activation_bytes(CONFIG) + tables)
    for left in (2, 1, 0):
        outputs.pop().sum().backward()
        assert saved.now * 3 == saved.peak * left


def test_saved_bytes_count_shared_memory_once_and_owned_memory_never() -> None:
    weight = torch.ones(10, requires_grad=True)
    x = torch.ones(10, requires_grad=True)
    for owned, kept in (((), 80), ((weight,), 40), ((weight, x), 0)):
        saved = SavedBytes(owned)
        with saved.watching():
            y = weight * x + weight * x.view(2, 5).view(10)  # each product keeps both of its factors
        assert saved.now == kept
        del y
        assert saved.now == 0 and saved.peak == kept


def in_order(one_group: bool, m: int) -> float:
    messages_in_order()
    mesh = Mesh.build(MeshShape(pp=2))
    weight = torch.ones(4, requires_grad=True)

    def stage(number: int, hidden: torch.Tensor | None) -> torch.Tensor:
        x = weight * (number + 1.0 if hidden is None else hidden)
        return x.sum() if mesh["pp"].index == 1 else x

    run(mesh, "1f1b", m, stage, mesh["pp"] if one_group else None)
    assert weight.grad is not None
    return weight.grad.sum().item()


@pytest.mark.slow
def test_two_groups_finish_where_one_waits_for_ever(ranks) -> None:
    assert ranks(in_order, False, 4, world_size=2) == [40.0, 40.0]
    assert ranks(in_order, True, 2, world_size=2) == [12.0, 12.0]  # too few micro-batches to meet on the way
    with pytest.raises(RankError, match=r"(?s)Still running: 2.*in run_backward_of.*in run_forward_of"):
        ranks(in_order, True, 4, world_size=2, timeout=10)


def test_the_schedule_for_slow_links_is_as_fast_as_can_be_until_a_message_takes_half_a_turn() -> None:
    for cost, equal in ((0.5, True), (1.5, True), (2.0, False)):
        deep = simulate(slow_links, 4, 32, send_cost=cost)
        wide = simulate(SCHEDULES["afab"], 4, 32, send_cost=cost)
        assert (deep.total == wide.total) == equal
        assert deep.peak_live == (7, 5, 3, 1)
        assert simulate(SCHEDULES["1f1b"], 4, 32, send_cost=cost).total > wide.total


def test_a_weight_gradient_that_waits_buys_one_unit_for_each_micro_batch_kept() -> None:
    assert len(SIZES) == len(set(SIZES)) == 80  # as the lesson says
    for p, m, more in SIZES:
        timeline = simulate(lambda *size, more=more: late_weights(*size, more), p, m)
        assert timeline.total == units(p, m, more) == 3 * m + 2 * (p - 1) - min(more, p - 1)
        assert timeline.peak_live == tuple(allowed(stage, p, more) for stage in range(p))
        if more == 0:
            assert timeline.peak_live == simulate(SCHEDULES["1f1b"], p, m).peak_live
        if more >= p - 1:
            assert all(late_weights(stage, p, m, more) == find_schedule("zb-h1")(stage, p, m) for stage in range(p))


def test_other_orders_of_weight_gradients_pass_if_they_keep_to_time_and_memory() -> None:
    item = exercise("05.late_weights")

    def whole_on_stage_0(stage: int, stages: int, m: int, more: int) -> list[Action]:
        return late_weights(stage, stages, m, more) if stage else SCHEDULES["1f1b"](stage, stages, m)

    def last_ones_backwards(stage: int, stages: int, m: int, more: int) -> list[Action]:
        actions, wait = late_weights(stage, stages, m, more), min(stage, more)
        return actions[: len(actions) - wait] + actions[len(actions) - wait :][::-1]

    def newest_first(stage: int, stages: int, m: int, more: int) -> list[Action]:
        waiting, actions = [], []
        for action in late_weights(stage, stages, m, more):  # the same places, in each the W of the latest I
            if action.kind == "backward_input":
                waiting.append(action.micro_batch)
            weights = action.kind == "backward_weight"
            actions.append(Action("backward_weight", waiting.pop()) if weights else action)
        return actions

    for answer in (whole_on_stage_0, last_ones_backwards, newest_first):
        assert judge(item, answer).passed, answer
        assert any(answer(stage, 4, 9, 2) != late_weights(stage, 4, 9, 2) for stage in range(4))


def test_a_stage_that_goes_back_before_it_went_forward_is_told_so() -> None:
    item = exercise("05.late_weights")
    early = next(mistake.hint for mistake in item.mistakes if mistake.name == "W before I")

    def backward_first(stage: int, stages: int, m: int, more: int) -> list[Action]:
        actions = late_weights(stage, stages, m, more)
        return actions if stage < stages - 1 else [actions[1], actions[0], *actions[2:]]

    assert judge(item, backward_first).hint == early
