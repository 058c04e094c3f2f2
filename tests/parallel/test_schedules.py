"""Schedules and the balance of stages, checked as data: no process is started."""

import itertools
import random

import pytest

from picotron_mini.config import ConfigError
from picotron_mini.parallel import schedules
from picotron_mini.parallel.schedules import SCHEDULES, Action, balance, draw, simulate

SIZES = [(stages, micro_batches) for stages in range(1, 9) for micro_batches in range(1, 17)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_once_and_backward_after_its_forward(name):
    for stages, micro_batches in SIZES:
        for stage in range(stages):
            actions = SCHEDULES[name](stage, stages, micro_batches)
            assert len(actions) == len(set(actions)) == 2 * micro_batches
            for kind in ("forward", "backward"):
                # The executor's messages carry no label: neighbours rely on this order.
                assert [a.micro_batch for a in actions if a.kind == kind] == list(range(micro_batches))
            for m in range(micro_batches):
                assert actions.index(Action("forward", m)) < actions.index(Action("backward", m))


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_bubble_and_memory_follow_the_formulas(name):
    for p, m in SIZES:
        timeline = simulate(SCHEDULES[name], p, m, forward_cost=1.0, backward_cost=2.0)
        assert len(timeline.events) == 2 * p * m
        assert timeline.stages == p
        assert timeline.total == 3 * (m + p - 1)
        assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        live = {"afab": [m] * p, "1f1b": [min(p - stage, m) for stage in range(p)]}
        assert list(timeline.peak_live) == live[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_simulated_order_respects_stages_and_travel(name):
    forward, backward = [1.0, 3.0, 2.0], [2.0, 1.5, 4.0]
    timeline = simulate(SCHEDULES[name], 3, 5, forward, backward, send_cost=0.25)
    at = {(e.stage, e.action): e for e in timeline.events}
    for event in timeline.events:
        stage, action = event.stage, event.action
        assert event.end - event.start == {"forward": forward, "backward": backward}[action.kind][stage]
        before = stage - 1 if action.kind == "forward" else stage + 1
        if 0 <= before < 3:
            assert event.start >= at[before, action].end + 0.25
    for one, two in itertools.pairwise(timeline.events):
        assert one.stage < two.stage or one.end <= two.start


def test_slow_links_cost_time_once_in_each_direction():
    # One micro-batch over p stages crosses p - 1 links forward and p - 1 back.
    assert simulate(SCHEDULES["1f1b"], 4, 1, send_cost=0.5).total == 4 * 3 + 6 * 0.5


def test_one_stage_is_gradient_accumulation():
    assert [str(a) for a in SCHEDULES["1f1b"](0, 1, 3)] == ["F0", "B0", "F1", "B1", "F2", "B2"]


def test_simulator_refuses_schedules_that_cannot_run():
    def backward_first(stage, stages, micro_batches):
        return SCHEDULES["afab"](stage, stages, micro_batches)[::-1]

    def impatient_first_stage(stage, stages, micro_batches):  # wants B0 before it has sent F1; stage 1 runs F1 first
        one_by_one = SCHEDULES["1f1b"](0, 1, micro_batches)
        return one_by_one if stage == 0 else SCHEDULES["afab"](stage, stages, micro_batches)

    with pytest.raises(ValueError, match="deadlocks: stage 0 waits for the input of B1"):
        simulate(backward_first, 1, 2)
    with pytest.raises(ValueError, match="stage 0 waits for the input of B0; stage 1 waits for the input of F1"):
        simulate(impatient_first_stage, 2, 2)
    with pytest.raises(ValueError, match="stage 0 must run every action once, and runs F0 B0 F0 B0"):
        simulate(lambda *sizes: SCHEDULES["1f1b"](0, 1, 1) * 2, 1, 1)
    with pytest.raises(ConfigError, match="0 micro-batches"):
        simulate(SCHEDULES["1f1b"], 2, 0)
    with pytest.raises(ConfigError, match=r"costs \[1.0, 2.0\]"):
        simulate(SCHEDULES["1f1b"], 3, 1, forward_cost=[1.0, 2.0])


def test_drawings_of_the_docstring_are_what_draw_prints():
    for name in SCHEDULES:
        for line in draw(simulate(SCHEDULES[name], 4, 4)).splitlines():
            assert f"    {line}\n" in schedules.__doc__
    assert draw(simulate(SCHEDULES["1f1b"], 2, 2)).splitlines() == [
        "stage 0  F0 F1 .. .. B0=== .. B1===",
        "stage 1  .. F0 B0=== F1 B1=== .. ..",
    ]


def _brute_force(costs, stages, first_extra, last_extra):
    """All splits, the least slowest stage first, then the evenest, then the most layers on early stages."""
    found = []
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        bounds = [0, *cuts, len(costs)]
        loads = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
        loads[0] += first_extra
        loads[-1] += last_extra
        found.append((max(loads), sum(load**2 for load in loads), [-bound for bound in bounds], bounds))
    return [range(a, b) for a, b in itertools.pairwise(min(found)[-1])]


def test_balance_equals_brute_force():
    rng = random.Random(0)
    for layers in range(1, 9):
        for stages in range(1, layers + 1):
            for _ in range(6):
                costs = [rng.randint(1, 5) for _ in range(layers)]
                first, last = rng.randint(0, 6), rng.randint(0, 6)
                assert balance(costs, stages, first, last) == _brute_force(costs, stages, first, last)


def test_balance_of_equal_layers_gives_room_to_a_heavy_head():
    assert [len(r) for r in balance([1.0] * 8, 4)] == [2, 2, 2, 2]
    assert [len(r) for r in balance([1.0] * 8, 2, last_extra=2.0)] == [5, 3]
    assert [len(r) for r in balance([1.0] * 3, 2, last_extra=100.0)] == [2, 1]
    assert [len(r) for r in balance([1.0] * 24, 8, last_extra=1.33)] == [4, 3, 3, 3, 3, 3, 3, 2]
    assert [len(r) for r in balance([1e18 / 3] * 24, 8, last_extra=1.33e18 / 3)] == [4, 3, 3, 3, 3, 3, 3, 2]


def test_balance_takes_nearly_the_shortest_step_of_those_with_its_slowest_stage():
    """By the clock, of 1F1B; the fewest layers on early stages, tempting for memory, may cost more than a tenth."""
    rng, slower = random.Random(0), 0.0
    for _ in range(60):
        stages = rng.randint(2, 5)
        layers, head, m = rng.randint(stages, 12), rng.choice([0, 0.3, 0.7, 1.33, 2.2]), stages * rng.choice([1, 2, 4])

        def step(split):
            costs = [n + head * (stage == stages - 1) for stage, n in enumerate(split)]  # noqa: B023
            return max(costs), simulate(SCHEDULES["1f1b"], stages, m, costs, [2 * cost for cost in costs]).total  # noqa: B023

        cuts = itertools.combinations(range(1, layers), stages - 1)
        splits = [[b - a for a, b in itertools.pairwise([0, *each, layers])] for each in cuts]
        pace, best = min(map(step, splits))
        ours = step([len(part) for part in balance([1.0] * layers, stages, last_extra=head)])
        assert ours[0] == pytest.approx(pace) and ours[1] <= 1.02 * best
        slower = max(slower, step(min(split for split in splits if step(split)[0] < pace + 1e-9))[1] / best)
    assert slower > 1.1


@pytest.mark.parametrize("stages", [0, 4])
def test_balance_refuses_what_does_not_fit(stages):
    with pytest.raises(ConfigError, match=f"pp={stages} stages do not fit 3 layers; use 1 <= pp <= 3"):
        balance([1.0] * 3, stages)
