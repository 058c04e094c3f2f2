"""Placement: experts by load, and moving them in the middle of a run without changing a bit or a result."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape, RunConfig
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.moe.placement import by_load, by_number, imbalance, load_of_ranks, moves
from picotron_mini.parallel.expert_traffic import migration_bytes, rows_of_step
from picotron_mini.parallel.gather import gather
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.training import migrate
from picotron_mini.training.migrate import place_experts
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import apply_gradients, compute_gradients
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, _select, make_batches, verify

pytestmark = pytest.mark.slow  # each case trains on several ranks

MOE = replace(MODEL, num_layers=2, moe=EXPERTS)


def zipf(experts: int, seed: int) -> list[float]:
    """Loads that fall as 1 / rank, in random order: a few experts do most of the work."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed)).tolist()
    return [1 / (1 + place) for place in order]


# --- which expert where -----------------------------------------------------------------------------------


def test_the_example_in_the_docstring() -> None:
    load = [40, 30, 10, 5, 5, 5, 3, 2]
    assert load_of_ranks(load, by_number(8), 2) == [85, 15] and imbalance(load, by_number(8), 2) == 1.7
    order = by_load(load, 2)
    assert {*order[:4]} == {0, 3, 5, 7} and load_of_ranks(load, order, 2) == [52, 48]
    assert imbalance(load, order, 2) == 1.04


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (8, 4), (8, 8), (6, 3), (64, 8)])
def test_every_expert_has_a_slot_and_balance_is_never_far_from_the_best(experts: int, ranks: int) -> None:
    for seed in range(20):
        load = zipf(experts, seed)
        order = by_load(load, ranks)
        assert sorted(order) == list(range(experts))
        best = max(max(load), sum(load) / ranks)  # no placement can beat either
        assert max(load_of_ranks(load, order, ranks)) <= 4 / 3 * best + 1e-9
        assert imbalance(load, order, ranks) <= imbalance(load, by_number(experts), ranks) + 1e-9


def test_on_few_experts_it_is_close_to_the_best_of_all_placements() -> None:
    ratios = []
    for seed in range(10):
        load = zipf(6, seed)
        best = min(max(sum(load[e] for e in part), sum(load) - sum(load[e] for e in part))
                   for part in itertools.combinations(range(6), 3))  # fmt: skip
        ratios.append(max(load_of_ranks(load, by_load(load, 2), 2)) / best)
    assert max(ratios) < 1.1 and min(ratios) == pytest.approx(1.0)


def test_nothing_moves_without_need() -> None:
    load = zipf(8, 3)
    order = by_load(load, 4)
    assert by_load(load, 4, order) == order and moves(order, order, 4) == []
    assert by_load([1.0] * 8, 2) == by_number(8), "another order would be as good, and would cost a journey"


def test_experts_that_stay_keep_their_slot() -> None:
    for seed in range(20):
        before = by_load(zipf(8, seed), 2)
        after = by_load(zipf(8, seed + 100), 2, before)
        moved = {expert for expert, _, _ in moves(before, after, 2)}
        assert all(
            before[slot] == after[slot] for slot in range(8) if before[slot] not in moved and after[slot] not in moved
        )
        assert len(moved) <= 4, "a set goes where most of it is"


def test_no_load_is_balanced() -> None:
    assert imbalance([0.0] * 4, by_number(4), 2) == 1.0


# --- moving -----------------------------------------------------------------------------------------------


def whole_of(parallel, optimizer, name: str) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """A parameter's master and its optimizer state, whole and by expert, on rank 0; the weights of compute if here."""
    out = []
    place, master = parallel.layout[name], parallel.masters[name]
    state = optimizer.state.get(parallel.trained.get(name), {})
    states = [value for value in state.values() if value.shape == master.shape]
    for tensor in [master, *states]:
        got = gather(tensor, place, parallel.mesh, tensor.dtype, parallel.device)
        if got is not None:
            out.append(got.clone())
    weight = parallel.parameters[name]
    if weight.untyped_storage().nbytes():
        got = gather(weight.data, place.without("edp"), parallel.mesh, weight.dtype, parallel.device)
        if got is not None:
            out.append(got.clone())
    return out


def move_after_a_step(run: RunConfig) -> tuple[bool, dict[tuple[str, str], int], int]:
    """Train a step, move experts by a made-up load; returns whether all is the same, the bytes, and how many moved."""
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    batch = make_batches(run)[0]
    share = run.train.batch_size // mesh["dp"].size
    rows = [slice(mesh["dp"].index * share + k * 2, mesh["dp"].index * share + k * 2 + 2) for k in range(3)]
    loss, tokens = compute_gradients(parallel, [_select(batch, r, torch.device("cpu")) for r in rows])
    apply_gradients(parallel, optimizer, loss, tokens)
    names = [name for name in parallel.layout if "experts" in name]
    before = {name: whole_of(parallel, optimizer, name) for name in names}
    with ledger.recording() as sent:
        done = place_experts(parallel, optimizer, {1: torch.tensor([40.0, 30, 10, 5, 5, 5, 3, 2])})
    assert [(round(m.before, 2), round(m.after, 2)) for m in done] == [(1.7, 1.04)]
    assert parallel.layout[names[0]].order == by_load([40, 30, 10, 5, 5, 5, 3, 2], 2)
    after = {name: whole_of(parallel, optimizer, name) for name in names}
    same = all(torch.equal(a, b) for name in names for a, b in zip(before[name], after[name], strict=True))
    return same, dict(sent), done[0].moved


CASES = [
    ("dp=2,ep=2", {}),
    ("dp=4,ep=2", {"zero": 1}),
    ("dp=4,ep=2", {"zero": 2, "dtype": "bfloat16"}),
    ("dp=4,ep=2", {"zero": 3, "dtype": "bfloat16"}),
    ("dp=2,ep=2", {"optimizer": "sgd"}),
    pytest.param("dp=2,ep=2", {"masters": "split", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("dp=2,ep=2", {"masters": "none", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("dp=2,cp=2,ep=2", {"zero": 3, "seq_len": 16}, marks=pytest.mark.slow),
    pytest.param("dp=2,tp=2,ep=2", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("dp=4,ep=2", {"zero": 1, "freeze": ("layers.1.mlp.experts.up",)}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "train"), CASES, ids=str)
def test_a_move_changes_no_bit_and_sends_what_was_predicted(ranks, layout: str, train: dict[str, object]) -> None:
    run = resolve(RunConfig(layout=layout, model=MOE, train=replace(TRAIN, **train)))  # type: ignore[arg-type]
    places, order = layout_of(run), by_load([40, 30, 10, 5, 5, 5, 3, 2], 2)
    for rank, (same, sent, moved) in enumerate(ranks(move_after_a_step, run, world_size=run.mesh.world_size)):
        assert same and moved == 4
        assert sent == migration_bytes(run, places, coordinates(run.mesh, rank), 1, order)
        assert sent, "something was sent"


def test_the_bytes_by_hand() -> None:
    """Two of four experts leave each rank; three projections of 16 * 32 numbers in float64, with two moments."""
    run = resolve(RunConfig(layout="dp=2,ep=2", model=MOE, train=TRAIN))
    order = by_load([40, 30, 10, 5, 5, 5, 3, 2], 2)
    sent = migration_bytes(run, layout_of(run), coordinates(run.mesh, 0), 1, order)
    assert sent == {("ep", "all_to_all"): 2 * 3 * (16 * 32) * 8 * 3}


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        ("dp=4,ep=2", {}),
        ("dp=4,ep=2", {"zero": 1}),
        ("dp=4,ep=4", {"zero": 3, "recompute": "full"}),
        ("dp=2,tp=2,pp=2,ep=2", {"dispatch_parts": 2}),
    ],
    ids=str,
)
def test_a_run_whose_experts_move_every_step_equals_one_device(layout: str, train: dict[str, object]) -> None:
    model = replace(MOE, num_layers=MeshShape.parse(layout).pp + 1)
    report = verify(layout, model, replace(TRAIN, place_every=1, **train))  # type: ignore[arg-type]
    assert report.ok, f"{report.first_divergence}, {report.bytes_problems}"


def forget_the_moments() -> None:
    """Broken on purpose: weights move, and the optimizer's state stays where it was."""
    migrate._state = lambda optimizer, master: []


def forget_to_redirect() -> None:
    """Broken on purpose: experts move, and tokens are sent to where they were."""
    real = migrate.place_experts

    def wrong(parallel, optimizer, load):  # type: ignore[no-untyped-def]
        done = real(parallel, optimizer, load)
        for chunk in parallel.chunks:
            for moe in migrate.mixtures(chunk):
                moe.dispatch.slot = None  # type: ignore[union-attr]
        return done

    migrate.place_experts = wrong


@pytest.mark.parametrize("patch", [forget_the_moments, forget_to_redirect])
def test_half_a_move_is_noticed(patch) -> None:  # type: ignore[no-untyped-def]
    report = verify("dp=2,ep=2", MOE, replace(TRAIN, place_every=1), patch=patch, optimizers=["adamw"])
    assert not report.ok and "step 1" in (report.first_divergence or "")


# --- what it is good for ------------------------------------------------------------------------------------


def skewed(run: RunConfig, place: bool) -> tuple[list[tuple[int, list[list[int]]]], float, float]:
    """A step whose router prefers low numbers: what its ranks decided, and the imbalance predicted before and after."""
    from picotron_mini.moe.dispatch import recording

    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    router = parallel.parameters["layers.1.mlp.router.weight"]
    batch = make_batches(run)[0]
    share = run.train.batch_size // mesh["dp"].size
    mine = [
        _select(
            batch, slice(mesh["dp"].index * share + k * 2, mesh["dp"].index * share + k * 2 + 2), torch.device("cpu")
        )
        for k in range(3)
    ]
    with torch.no_grad():  # experts 0 and 1 are alike in being wanted by the same tokens, and so on down
        router.copy_(
            torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) * (2.0 ** -torch.arange(8.0))[:, None] * 4
        )
    loss, tokens = compute_gradients(parallel, mine)
    result = apply_gradients(parallel, optimizer, loss, tokens)
    assert result.routing is not None
    done = [(1.0, 1.0)]
    if place:
        done = [(m.before, m.after) for m in place_experts(parallel, optimizer, {1: result.routing.counts[0]})]
    with recording() as decided:
        compute_gradients(parallel, mine)
    return decided, *done[0]


def test_the_gain_is_measured_under_a_skewed_load(ranks) -> None:
    run = resolve(RunConfig(layout="dp=4,ep=4", model=replace(MOE, moe=replace(EXPERTS, aux_weight=0.0)),
                            train=replace(TRAIN, lr=1e-9)))  # fmt: skip
    busiest = {}
    for place in (False, True):
        results = ranks(skewed, run, place, world_size=4)
        # choices that reach each rank's experts, over the mean, from what the routers decided
        loads = [0] * 4
        for decided, *_ in results:
            for _, choices in decided:
                for slots in choices:
                    for slot in slots:
                        loads[slot // 2] += 1
        busiest[place] = max(loads) * 4 / sum(loads)
        if place:
            _, before, after = results[0]
        rows = rows_of_step([decided for decided, *_ in results], run.mesh, run.model.moe, 3)  # type: ignore[arg-type]
        assert all(math.prod(each[1]) > 0 for each in rows)
    assert busiest[False] == pytest.approx(before, rel=0.02), "what was predicted for the old placement"
    assert busiest[True] == pytest.approx(after, rel=0.02), "... and for the new one"
    assert busiest[True] < busiest[False] - 0.1, busiest
