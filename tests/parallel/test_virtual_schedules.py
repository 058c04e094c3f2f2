"""Interleaved 1F1B, ZB-H1 and ZB-V, checked as data: order, time, memory and messages, without a process."""

from __future__ import annotations

import graphlib
import itertools
from collections import defaultdict
from collections.abc import Callable

import pytest

from picotron_mini.parallel import schedule_interleaved, schedule_zero_bubble
from picotron_mini.parallel.actions import Action, Message, Route, route_of
from picotron_mini.parallel.receives import receives_in_one_order, receives_in_own_order
from picotron_mini.parallel.schedules import SCHEDULES, Timeline, draw, find_schedule, simulate

SIZES = list(itertools.product(range(1, 9), range(1, 17)))  # stages, micro-batches
CASES = [("zb-h1", 1), ("zb-v", 2), ("interleaved", 2), ("interleaved", 3)]
IDS = [f"{name}-{chunks}" for name, chunks in CASES]


def sizes(name: str) -> list[tuple[int, int]]:
    return [(p, m) for p, m in SIZES if name != "interleaved" or m % p == 0]


def clock(name: str, chunks: int, p: int, m: int, **costs: object) -> Timeline:
    return simulate(find_schedule(name, chunks), p, m, route=route_of(name, p, chunks), **costs)  # type: ignore[arg-type]


def all_lists(name: str, chunks: int, p: int, m: int) -> list[list[Action]]:
    return [find_schedule(name, chunks)(stage, p, m) for stage in range(p)]


# --- the words ------------------------------------------------------------------------------------------------


def test_names_of_actions() -> None:
    kinds = ("forward", "backward", "backward_input", "backward_weight")
    assert [str(Action(kind, 3)) for kind in kinds] == ["F3", "B3", "I3", "W3"]
    assert [str(Action("forward", 12, chunk)) for chunk in range(3)] == ["F12", "F12'", "F12''"]


def test_routes() -> None:
    line, loop, vee = Route(4), Route(4, 2), Route(4, 2, turns=True)
    assert [line.stage(n) for n in range(line.length)] == [0, 1, 2, 3]
    assert [loop.stage(n) for n in range(loop.length)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [vee.stage(n) for n in range(vee.length)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [Route(2, 3, turns=True).stage(n) for n in range(6)] == [0, 1, 1, 0, 0, 1]
    for route in (line, loop, vee, Route(3, 3), Route(3, 3, turns=True)):
        places = [(stage, chunk) for stage in range(route.stages) for chunk in range(route.chunks)]
        assert sorted(route.position(*place) for place in places) == list(range(route.length))
        assert all(route.stage(route.position(stage, chunk)) == stage for stage, chunk in places)


def test_messages_of_a_loop_and_of_a_v() -> None:
    loop, vee = Route(4, 2), Route(4, 2, turns=True)
    made = loop.makes(3, Action("forward", 7))
    assert made == Message("forward", 3, 7) == loop.needs(0, Action("forward", 7, 1))
    assert loop.ends(made) == (3, 0) and loop.goes_down(made)
    back = loop.makes(0, Action("backward", 7, 1))
    assert back == loop.needs(3, Action("backward", 7)) and loop.ends(back) == (0, 3) and not loop.goes_down(back)
    turn = vee.makes(3, Action("forward", 7))
    assert turn == vee.needs(3, Action("forward", 7, 1)) and vee.ends(turn) == (3, 3)
    up = vee.makes(3, Action("forward", 7, 1))
    assert up == vee.needs(2, Action("forward", 7, 1)) and vee.ends(up) == (3, 2) and not vee.goes_down(up)
    assert vee.goes_down(vee.makes(2, Action("backward_input", 7, 1)))
    assert vee.makes(0, Action("forward", 7, 1)) is vee.needs(0, Action("backward_input", 7, 1)) is None  # the loss
    assert vee.needs(0, Action("forward", 7)) is vee.makes(0, Action("backward_input", 7)) is None  # the tokens
    assert vee.needs(2, Action("backward_weight", 7)) is vee.makes(2, Action("backward_weight", 7)) is None


# --- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "chunks"), CASES, ids=IDS)
def test_every_action_once_and_in_an_order_that_can_be(name: str, chunks: int) -> None:
    """Not by the simulator's own rules: the actions' times are laid beside the dependencies, written out here."""
    for p, m in sizes(name):
        route = route_of(name, p, chunks)
        costs = {"forward_cost": 1.0, "backward_cost": 2.25, "send_cost": 0.5, "weight_share": 0.4}
        timeline = clock(name, chunks, p, m, **costs)
        starts, ends = {}, {}
        for stage, action, start, end in timeline.events:
            letter = str(action)[0]
            key = ("I" if letter == "B" else letter, route.position(stage, action.chunk), action.micro_batch)
            assert key not in ends
            starts[key], ends[key] = start, end
            if letter == "B":  # a whole backward is both halves at once
                key = ("W", *key[1:])
                starts[key] = ends[key] = end
        every = itertools.product("FIW", range(p * chunks), range(m))
        assert set(ends) == set(every)
        for (letter, v, k), start in starts.items():
            here = 0.5 if v + 1 < p * chunks and route.stage(v) != route.stage(v + 1) else 0.0
            if letter == "F" and v > 0:
                assert start >= ends["F", v - 1, k] + (0.5 if route.stage(v) != route.stage(v - 1) else 0.0)
            if letter == "I":
                assert start >= ends["F", v, k]
                if v + 1 < p * chunks:
                    assert start >= ends["I", v + 1, k] + here
            if letter == "W":
                assert start >= ends["I", v, k]
        for one, two in itertools.pairwise(timeline.events):
            assert one.stage < two.stage or one.end <= two.start


def test_a_schedule_that_forgets_a_w_or_a_chunk_is_refused() -> None:
    def forgets(stage: int, stages: int, micro_batches: int) -> list[Action]:
        return find_schedule("zb-h1")(stage, stages, micro_batches)[:-1]

    with pytest.raises(ValueError, match="stage 0 must run every action once, and runs F0 F1 I0 W0 I1$"):
        simulate(forgets, 2, 2)
    with pytest.raises(ValueError, match="every action once in each of 2 chunks"):
        simulate(SCHEDULES["1f1b"], 2, 2, route=Route(2, 2))


@pytest.mark.parametrize(("first", "second"), ["IF", "WI"])
def test_a_half_before_what_it_needs_deadlocks(first: str, second: str) -> None:
    def swapped(stage: int, stages: int, micro_batches: int) -> list[Action]:
        actions = find_schedule("zb-h1")(stage, stages, micro_batches)
        names = [str(action)[0] for action in actions]
        actions.insert(names.index(second), actions.pop(names.index(first)))
        return actions

    with pytest.raises(ValueError, match=f"stage 0 waits for the input of {first}0"):
        simulate(swapped, 1, 2)


def test_what_stays_on_a_stage_takes_no_time() -> None:
    at = {(e.stage, str(e.action)): e for e in clock("zb-v", 2, 3, 1, send_cost=0.5).events}
    assert at[2, "F0'"].start == at[2, "F0"].end == 3 + 2 * 0.5
    assert at[0, "F0'"].end == 6 + 4 * 0.5
    assert at[0, "I0"].end == 12 + 8 * 0.5 + 1  # the last stage does W0' before its other I


def test_interleaved_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="6 micro-batches are not a multiple of 4 stages"):
        find_schedule("interleaved")(0, 4, 6)


# --- time and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int) -> None:
    for p, m in sizes("interleaved"):
        for forward, backward in ((1.0, 2.0), (1.0, 1.0), (2.0, 3.0)):
            timeline = clock("interleaved", chunks, p, m, forward_cost=forward, backward_cost=backward)
            assert timeline.total == (chunks * m + p - 1) * (forward + backward)
            assert timeline.bubble == pytest.approx((p - 1) / (chunks * m + p - 1), abs=1e-12)
        ahead = [2 * (p - 1 - stage) + (chunks - 1) * p + 1 for stage in range(p)]
        assert list(timeline.peak_live) == [min(chunks * m, n) for n in ahead]


def test_zb_h1_waits_less_than_1f1b_and_keeps_as_much() -> None:
    for p, m in SIZES:
        f, i, w = 1.0, 1.0, 1.0
        timeline, plain = clock("zb-h1", 1, p, m), simulate(SCHEDULES["1f1b"], p, m)
        assert timeline.total == m * (f + i + w) + (p - 1) * (f + i - w) + max(0, p - m)
        assert timeline.bubble < plain.bubble or p == 1
        assert all(live <= min(p, m) for live in timeline.peak_live)
        assert max(timeline.peak_live) == max(plain.peak_live) == plain.peak_live[0]


@pytest.mark.parametrize(("f", "i", "w"), [(1, 2, 1), (2, 1, 1), (1, 1, 2), (3, 2, 1), (1, 1.5, 0.5)])
def test_zb_h1_with_other_costs(f: float, i: float, w: float) -> None:
    for p, m in SIZES:
        costs = {"forward_cost": f, "backward_cost": i + w}
        total = clock("zb-h1", 1, p, m, weight_share=w / (i + w), **costs).total
        if m >= p:
            assert total == pytest.approx(m * (f + i + w) + (p - 1) * max(f, f + i - w))
        assert total < simulate(SCHEDULES["1f1b"], p, m, **costs).total or p == 1


def test_zb_v_waits_for_the_first_micro_batch_only() -> None:
    for p, m in SIZES:
        timeline = clock("zb-v", 2, p, m)
        assert timeline.total == max(6 * m + p - 1, 4 * (m + p) - 2)
        assert all(live <= min(2 * p, 2 * m) for live in timeline.peak_live)
        if m >= 2 * p - 1 > 1:
            assert timeline.bubble == pytest.approx((p - 1) / (6 * m + p - 1), abs=1e-12)
            # the same work on the same stages: a chunk is half of what a stage of ZB-H1 holds
            assert timeline.bubble < clock("zb-h1", 1, p, m).bubble


def test_costs_are_given_by_virtual_stage() -> None:
    route = Route(2, 2, turns=True)
    timeline = simulate(
        find_schedule("zb-v"), 2, 3, [1, 2, 3, 4], [10, 20, 30, 40], weight_share=0.25, route=route
    )  # fmt: skip
    for stage, action, start, end in timeline.events:
        n = 1 + route.position(stage, action.chunk)
        assert end - start == {"F": n, "I": 7.5 * n, "W": 2.5 * n}[str(action)[0]]


def test_drawings_of_the_docstrings_are_what_draw_prints() -> None:
    drawn = [(schedule_interleaved, "interleaved", 2, 2, 4), (schedule_zero_bubble, "zb-h1", 1, 4, 4)]
    for module, name, chunks, p, m in [*drawn, (schedule_zero_bubble, "zb-v", 2, 2, 3)]:
        for line in draw(clock(name, chunks, p, m)).splitlines():
            assert module.__doc__ and f"    {line}\n" in module.__doc__


# --- messages -------------------------------------------------------------------------------------------------


def starts_of(
    p: int, receives: list[list[list[Message]]], lists: list[list[Action]], route: Route
) -> list[list[tuple[str, bool, Message]]]:
    """Each stage's sends and receives in the order in which it starts them, as ("s" | "r", down, message)."""
    out = []
    for stage in range(p):
        mine: list[tuple[str, bool, Message]] = []
        for action, upcoming in zip(lists[stage], receives[stage], strict=True):
            mine += [("r", route.goes_down(message), message) for message in upcoming]
            made = route.makes(stage, action)
            if made is not None and route.ends(made)[1] != stage:
                mine.append(("s", route.goes_down(made), made))
        out.append(mine)
    return out


def in_own_order(lists: list[list[Action]], route: Route) -> list[list[list[Message]]]:
    away = [receives_in_own_order(actions, route, stage) for stage, actions in enumerate(lists)]
    return [[[m for m in ms if len(set(route.ends(m))) == 2] for ms in stage] for stage in away]


Orders = Callable[[list[list[Action]], Route], list[list[list[Message]]]]


@pytest.mark.parametrize(
    ("name", "chunks", "order"),
    [
        *[(name, 1, in_own_order) for name in ("afab", "1f1b", "zb-h1")],
        *[(*case, receives_in_one_order) for case in [("afab", 1), ("1f1b", 1), *CASES]],
        *[("interleaved", chunks, in_own_order) for chunks in (2, 3)],
    ],
)
def test_both_sides_of_every_pair_agree_on_the_order_of_their_messages(name: str, chunks: int, order: Orders) -> None:
    for p, m in sizes(name):
        lists, route = all_lists(name, chunks, p, m), route_of(name, p, chunks)
        starts = starts_of(p, order(lists, route), lists, route)
        pairs: dict[tuple[str, int, int, bool], list[Message]] = defaultdict(list)
        for stage in range(p):
            for side, down, message in starts[stage]:
                source, to = route.ends(message)
                assert stage == (source if side == "s" else to)
                pairs[side, source, to, down].append(message)
        for _, source, to, down in list(pairs):
            assert pairs["s", source, to, down] == pairs["r", source, to, down]
        sent = sum(len(messages) for (side, *_), messages in pairs.items() if side == "s")
        borders = sum(route.stage(v) != route.stage(v + 1) for v in range(route.length - 1))
        assert sent == 2 * m * borders


def test_in_a_v_messages_are_not_used_in_the_order_in_which_they_come() -> None:
    """Which is why a stage cannot receive in its own order there."""
    lists, route = all_lists("zb-v", 2, 4, 8), Route(4, 2, turns=True)
    starts = starts_of(4, in_own_order(lists, route), lists, route)
    sent = [message for side, down, message in starts[0] if side == "s" and down]
    used = [message for side, down, message in starts[1] if side == "r" and down]
    assert sorted(sent) == sorted(used) and sent != used


def circle(lists: list[list[Action]], receives: list[list[list[Message]]], route: Route) -> bool:
    """Whether no order of all messages has every stage's order in it."""
    before: dict[Message, set[Message]] = defaultdict(set)
    for mine in starts_of(len(lists), receives, lists, route):
        for (_, _, one), (_, _, two) in itertools.pairwise(mine):
            before[two].add(one)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError:
        return True
    return False


@pytest.mark.parametrize(("name", "chunks"), CASES, ids=IDS)
def test_one_order_for_all_in_which_few_messages_wait(name: str, chunks: int) -> None:
    for p, m in sizes(name):
        lists, route = all_lists(name, chunks, p, m), route_of(name, p, chunks)
        receives = receives_in_one_order(lists, route)
        assert not circle(lists, receives, route)
        for stage in range(p):
            waiting: set[Message] = set()
            for action, upcoming in zip(lists[stage], receives[stage], strict=True):
                waiting.update(upcoming)
                assert len(waiting) <= 4
                needed = route.needs(stage, action)
                if needed is not None and route.ends(needed)[0] != stage:
                    waiting.remove(needed)  # it was started in time
            assert not waiting


def test_on_a_ring_everyones_own_order_is_a_circle() -> None:
    for p, m in sizes("interleaved"):
        lists, route = all_lists("interleaved", 2, p, m), Route(p, 2)
        assert circle(lists, in_own_order(lists, route), route) == (p > 1)
