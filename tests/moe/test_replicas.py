"""Copies of hot experts: balance that moving cannot reach, and no result changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from picotron_mini import layout as layouts
from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape, MoEConfig, RunConfig
from picotron_mini.dry_run import dry_run, sample
from picotron_mini.layout import Placement, Shard, to_json
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.model.moe import Experts, local_dispatch
from picotron_mini.moe.dispatch import ExpertDispatch, recording
from picotron_mini.moe.placement import by_load, by_number, copies, holders, imbalance, load_of_ranks, moves, pack
from picotron_mini.parallel.expert_costs import skew_of_loads
from picotron_mini.parallel.expert_traffic import migration_bytes, replica_bytes
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.gather import gather
from picotron_mini.parallel.machine import MACHINES
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.parallel.predict import predict
from picotron_mini.training import step
from picotron_mini.training.migrate import move_parameter, place_experts
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import apply_gradients, compute_gradients
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, _select, make_batches, verify

pytestmark = pytest.mark.slow  # each case trains on several ranks

LOAD = [40.0, 30, 10, 5, 5, 5, 3, 2]
MOE = replace(MODEL, num_layers=2, moe=EXPERTS)


def run_of(layout: str, **train: object) -> RunConfig:
    settings = {"expert_replicas": 1, **train}
    return resolve(RunConfig(layout=layout, model=MOE, train=replace(TRAIN, **settings)))  # type: ignore[arg-type]


# --- which copies, and where ------------------------------------------------------------------------------


def test_the_example_in_the_docstring() -> None:
    assert copies(LOAD, 4, 12) == [3, 3, 1, 1, 1, 1, 1, 1]
    order = by_load(LOAD, 4, by_number(8, 4, 1))
    assert [sorted(order[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 6], [0, 3, 4], [1, 2, 5], [0, 1, 7]]
    assert load_of_ranks(LOAD, order, 4) == pytest.approx([79 / 3, 70 / 3, 25, 76 / 3])
    assert imbalance(LOAD, order, 4) == pytest.approx(79 / 75)
    assert imbalance(LOAD, by_load(LOAD, 4), 4) == 1.68, "what moving alone can do"


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (8, 4), (4, 4), (6, 3), (64, 8)])
def test_every_expert_has_a_slot_and_no_rank_has_one_twice(experts: int, ranks: int) -> None:
    held = experts // ranks
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        load = (torch.rand(experts, generator=generator) ** 6).tolist()
        for replicas in {0, 1, (experts - held) // 2, experts - held}:
            start = by_number(experts, ranks, replicas)
            order = by_load(load, ranks, start)
            for placed in (start, order):
                assert {*placed} == {*range(experts)} and len(placed) == experts + ranks * replicas
                sets = [placed[i : i + held + replicas] for i in range(0, len(placed), held + replicas)]
                assert all(len({*each}) == held + replicas for each in sets)
            assert sum(load_of_ranks(load, order, ranks)) == pytest.approx(sum(load)), "copies share a load"
            assert imbalance(load, order, ranks) <= imbalance(load, start, ranks) + 1e-9
            if replicas == experts - held:
                assert imbalance(load, order, ranks) == pytest.approx(1.0), "everything is everywhere"


def test_a_rank_that_is_full_takes_a_copy_and_hands_on_another() -> None:
    """Expert 0 fills a rank's share and 1, 2, 3 the other's slots; then both copies of 4 find room on one rank only."""
    sets = pack([3.0, 1, 1, 1, 0.5], [1, 1, 1, 1, 2], 2)
    assert [sorted(each) for each in sets] == [[0, 1, 4], [2, 3, 4]]


def test_copies_that_stay_do_not_travel_and_a_new_one_comes_from_any_rank_that_has_it() -> None:
    before, after = (0, 1, 2, 3, 0, 2), (0, 1, 2, 0, 3, 2)  # expert 0 comes to rank 1, expert 3 to rank 2
    assert moves(before, after, 3) == [(0, 2, 1), (3, 1, 2)]
    assert moves((0, 1, 0, 2, 0, 3, 1, 2), (0, 1, 0, 2, 1, 3, 0, 2), 4) == [(0, 0, 3), (1, 0, 2)]


# --- the layout knows copies ------------------------------------------------------------------------------


def test_a_placement_with_copies() -> None:
    place = Placement((3, 2), (0,), (Shard("ep", 0, layouts.split(4, 2)),), ("edp",), (2, 0, 1, 2))
    whole = torch.arange(6.0).view(3, 2)
    ranks = [{"pp": 0, "dp": i, "cp": 0, "tp": 0, "ep": i, "edp": 0} for i in range(2)]
    parts = [place.part(whole, index) for index in ranks]
    assert place.kept == (4, 2) and [place.local_shape(index) for index in ranks] == [(2, 2), (2, 2)]
    assert parts[0].tolist() == [[4, 5], [0, 1]] and parts[1].tolist() == [[2, 3], [4, 5]]
    counted = [place.once(part, index) for part, index in zip(parts, ranks, strict=True)]
    assert counted[0].tolist() == parts[0].tolist() and counted[1].tolist() == [[2, 3]]
    assert sum((part**2).sum() for part in counted) == (whole**2).sum()
    (shown,) = to_json({"layers.0.mlp.experts.up": place}, MeshShape(dp=2, ep=2))["parameters"]
    assert shown["shape"] == [4, 2], "the ranges are of what is kept"


@pytest.mark.parametrize(("layout", "train"), [("dp=4,ep=2", {}), ("dp=4,ep=2", {"zero": 3}), ("dp=8,ep=4", {})])
def test_the_planner_counts_slots_for_copies(layout: str, train: dict[str, object]) -> None:
    run = run_of(layout, **train)
    for rank in sample(run):
        result = dry_run(run, rank)
        assert not result.problems
        assert any(operation == "replicas" and n for (_, operation), n in result.counted.items()) or run.train.zero
    without = replace(run, train=replace(run.train, expert_replicas=0))
    index = coordinates(run.mesh, 0)
    more = footprint(run, layout_of(run), index).weights - footprint(without, layout_of(without), index).weights
    cut = run.mesh.edp if run.train.zero == 3 else 1
    held = 8 // run.mesh.ep
    assert more == (-(-(held + 1) // cut) - -(-held // cut)) * 3 * 16 * 32 * 8
    one, other = (predict(each, MACHINES["h100"]) for each in (run, without))
    assert one.memory_bytes > other.memory_bytes and one.seconds > other.seconds


def test_a_skew_is_known_for_copies() -> None:
    loads = [LOAD, [1.0] * 8]
    assert skew_of_loads(loads, 4) == pytest.approx((2.8 + 1) / 2)
    assert skew_of_loads(loads, 4, placed=True) == pytest.approx((1.68 + 1) / 2)
    assert skew_of_loads(loads, 4, replicas=1, placed=True) < (79 / 75 + 1.02) / 2 + 0.1


@pytest.mark.parametrize(
    ("layout", "train", "says"),
    [
        ("dp=2", {}, r"expert_replicas=1 is for experts on several ranks, and ep=1; use expert_replicas=0, or ep=2"),
        ("dp=4,ep=4", {"expert_replicas": 7}, r"expert_replicas=7 must be 0 to 6: a rank has 2 of the 8"),
        ("dp=4,ep=2", {"compress": "topk", "place_every": 2}, r"by slot.*use compress=bf16 or none, or place_every=0"),
        ("dp=4,ep=4", {"expert_replicas": -1}, r"expert_replicas=-1 must be 0 to 6"),
    ],
)
def test_what_cannot_be_is_refused(layout: str, train: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_of(layout, **train)


# --- tokens -----------------------------------------------------------------------------------------------

ORDER = (0, 1, 4, 2, 3, 4, 4, 5, 0)  # on three ranks: expert 4 on each, expert 0 on two
TOKENS = (7, 1, 8)


def dispatched(parts: int) -> tuple[list[tuple[int, list[list[int]]]], Tensor, dict[str, Tensor]]:
    """Every copy computes what its expert would: y, the gradient of x and the sum over copies of those of weights."""
    axis = Mesh.build(MeshShape(dp=3, ep=3))["ep"]
    torch.manual_seed(0)
    config = MoEConfig(num_experts=6, top_k=3, expert_size=5)
    run = Experts(config, 4).double()
    for weight in run.parameters():
        nn.init.normal_(weight)
    chosen = [torch.rand(n, 6).topk(3).indices for n in TOKENS]
    chosen[0][::2, 0] = -1
    tokens = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in TOKENS]
    weights = [torch.rand(n, 3, dtype=torch.float64) for n in TOKENS]
    want = [local_dispatch(x, e, w, run) for x, e, w in zip(tokens, chosen, weights, strict=True)]
    sum((y**2).sum() for y in want).backward()  # type: ignore[union-attr]

    rank = axis.index
    mine = Experts(config, 4).double()
    for name, weight in run.named_parameters():
        setattr(mine, name, nn.Parameter(weight.detach()[list(ORDER[3 * rank : 3 * rank + 3])]))
    send = ExpertDispatch(axis, 6, parts)
    send.place(ORDER)
    x = tokens[rank].detach().clone().requires_grad_()
    with recording() as log:
        y = send(x, chosen[rank], weights[rank], mine, None)
    (y**2).sum().backward()
    torch.testing.assert_close(y, want[rank], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, tokens[rank].grad, rtol=1e-12, atol=1e-12)
    return log, run.up.grad, {name: weight.grad for name, weight in mine.named_parameters()}  # type: ignore[return-value]


@pytest.mark.parametrize("parts", [1, 3])
def test_tokens_take_copies_in_turn(ranks, parts: int) -> None:
    results = ranks(dispatched, parts, world_size=3)
    total = torch.zeros_like(results[0][1])
    for rank, (_, _, grads) in enumerate(results):
        for row, expert in zip(grads["up"], ORDER[3 * rank : 3 * rank + 3], strict=True):
            total[expert] += row
    torch.testing.assert_close(total, results[0][1], rtol=1e-12, atol=1e-12)
    rows = Counter(slot for log, *_ in results for _, choices in log for slots in choices for slot in slots)
    for expert in (0, 4):
        of = [rows[slot] for slot, e in enumerate(ORDER) if e == expert]
        assert min(of) > 0 and max(of) - min(of) <= 3, "each copy has some"


# --- training ---------------------------------------------------------------------------------------------


def steps_with_moves(run: RunConfig, loads: list[list[float]]) -> list[dict[str, object]]:
    """A step, then a new placement, again and again.

    Returns:
        Of each move its bytes and what they were predicted to be, whether gathered weights and state are the same
        before and after, and all that this rank keeps of experts, after it.
    """
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    names = [name for name in parallel.layout if "experts" in name]

    def kept(name: str) -> list[Tensor]:
        master, weight = parallel.masters[name], parallel.parameters[name]
        state = optimizer.state.get(parallel.trained.get(name), {})
        whole = [weight.data] if weight.untyped_storage().nbytes() else []
        return [master, *[v for v in state.values() if v.shape == master.shape], *whole]

    def gathered() -> list[Tensor]:
        out = []
        for name in names:
            for tensor in kept(name):
                place = parallel.layout[name]
                if tensor.shape != place.local_shape(parallel.index):
                    place = place.without("edp")
                got = gather(tensor, place, mesh, tensor.dtype, parallel.device)
                out += [] if got is None else [got.clone()]
        return out

    out = []
    share = run.train.batch_size // mesh["dp"].size
    for batch, load in zip(make_batches(run), loads, strict=True):
        first = mesh["dp"].index * share
        rows = [slice(first + k * 2, first + k * 2 + 2) for k in range(3)]
        loss, tokens = compute_gradients(parallel, [_select(batch, r, torch.device("cpu")) for r in rows])
        apply_gradients(parallel, optimizer, loss, tokens)
        before, layout = gathered(), dict(parallel.layout)
        with ledger.recording() as sent:
            place_experts(parallel, optimizer, {1: torch.tensor(load)})
        after = parallel.layout[names[0]].order
        out.append(
            {
                "same": all(torch.equal(a, b) for a, b in zip(before, gathered(), strict=True)),
                "sent": sent,
                "predicted": migration_bytes(run, layout, parallel.index, 1, after),
                "kept": {name: [t.clone() for t in kept(name)] for name in names},
                "layout": dict(parallel.layout),
            }
        )
    return out


CASES = [
    ("dp=4,ep=4", {}),
    ("dp=4,ep=2", {"zero": 1, "expert_replicas": 3}),
    ("dp=4,ep=2", {"zero": 3, "dtype": "bfloat16"}),
    ("dp=4,ep=2", {"zero": 2, "expert_replicas": 2, "dtype": "bfloat16"}),
    pytest.param("dp=2,tp=2,ep=2", {"dtype": "bfloat16", "masters": "split"}, marks=pytest.mark.slow),
    pytest.param("dp=2,ep=2", {"dtype": "bfloat16", "masters": "none"}, marks=pytest.mark.slow),
    pytest.param("dp=2,cp=2,ep=4", {"seq_len": 16, "dtype": "float32"}, marks=pytest.mark.slow),
    pytest.param("dp=4,ep=2", {"optimizer": "sgd", "zero": 1}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "train"), CASES, ids=str)
def test_copies_are_equal_to_the_bit_and_moves_send_what_was_predicted(ranks, layout: str, train) -> None:  # type: ignore[no-untyped-def]
    run = run_of(layout, **train)
    results = ranks(steps_with_moves, run, [LOAD, LOAD[::-1], LOAD[4:] + LOAD[:4]], world_size=run.mesh.world_size)
    for move in range(3):
        whole: dict[object, Tensor] = {}
        seen = Counter[object]()
        for rank, each in enumerate(result[move] for result in results):
            assert each["same"] and each["predicted"] == Counter(each["sent"])
            index = coordinates(run.mesh, rank)
            for name, tensors in each["kept"].items():
                place = each["layout"][name]
                for number, tensor in enumerate(tensors):
                    at = place if tensor.shape == place.local_shape(index) else place.without("edp")
                    rows = at.slices(index)[0]
                    for row, expert in zip(tensor, place.order[rows], strict=True):
                        key = name, number, expert, index["tp"]
                        seen[key] += 1
                        assert torch.equal(whole.setdefault(key, row), row), f"{key} on rank {rank} after move {move}"
        assert len({key[2] for key in whole}) == 8 and max(seen.values()) > min(seen.values())  # type: ignore[index]
    assert any(sum(move["sent"].values()) for result in results for move in result), "something moved"


def moved_by_hand(run: RunConfig, after: tuple[int, ...]) -> list[Tensor]:
    """An expert's up projection before and after a move of our own, whole, on rank 0."""
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer, name, out = make_optimizer(parallel.trained, run.train), "layers.1.mlp.experts.up", []
    for _ in range(2):
        for tensor, place in (
            (parallel.masters[name], parallel.layout[name]),
            (parallel.parameters[name].data, parallel.layout[name].without("edp")),
        ):
            got = gather(tensor, place, mesh, tensor.dtype, parallel.device)
            out += [] if got is None else [got.clone()]
        if after != parallel.layout[name].order:
            move_parameter(parallel, optimizer, name, parallel.layout[name].order, after)
    return out


@pytest.mark.parametrize("zero", [0, 1])
def test_an_expert_may_change_its_slot_and_stay_on_its_rank(ranks, zero: int) -> None:
    run = run_of("dp=4,ep=2", zero=zero)
    after = (3, 4, 2, 0, 1, 5, 0, 6, 4, 7)
    before, weight, master_after, weight_after = ranks(moved_by_hand, run, after, world_size=4)[0]
    assert torch.equal(before, master_after) and torch.equal(weight, weight_after) and torch.equal(before, weight)


def test_the_bytes_by_hand() -> None:
    """Two ranks, experts 0 to 4 and 4 to 7 and 0: experts 0 and 4 have a copy, each 3 * 16 * 32 numbers of float64."""
    run = run_of("dp=2,ep=2")
    layout, index = layout_of(run), coordinates(run.mesh, 0)
    assert layout["layers.1.mlp.experts.up"].order == (0, 1, 2, 3, 4, 4, 5, 6, 7, 0)
    assert replica_bytes(run, layout, index) == {("ep", "replicas"): 2 * 3 * (16 * 32) * 8}
    assert replica_bytes(run_of("dp=2,ep=2", freeze=("layers.1.mlp.experts",)), layout, index) == {}
    three = holders((0, 1, 2, 0, 3, 1, 0, 1, 4), 3)
    assert three[0] == {0: 0, 1: 0, 2: 0} and three[3] == {1: 1}


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        ("dp=2,ep=2", {}),
        ("dp=4,ep=4", {"expert_replicas": 2}),
        ("dp=4,ep=2", {"zero": 1, "expert_replicas": 3}),
        ("dp=4,ep=2", {"zero": 3, "recompute": "full"}),
        ("dp=2,tp=2,pp=2,ep=2", {"dispatch_parts": 2, "schedule": "zb-h1"}),
        ("dp=2,cp=2,ep=4", {"seq_len": 16, "zero": 2}),
    ],
    ids=str,
)
def test_a_run_with_copies_that_move_every_step_equals_one_device(layout: str, train: dict[str, object]) -> None:
    model = replace(MOE, num_layers=MeshShape.parse(layout).pp + 1)
    settings = {"expert_replicas": 1, "place_every": 1, **train}
    report = verify(layout, model, replace(TRAIN, **settings))  # type: ignore[arg-type]
    assert report.ok, f"{report.first_divergence}, {report.bytes_problems}"
    assert any("replicas" in key for key in report.bytes_counted)


# --- broken on purpose ------------------------------------------------------------------------------------


def forget_the_sum() -> None:
    """Each copy learns from its own tokens."""
    step.sum_replicas = lambda *args: None


def count_copies() -> None:
    """The norm has an expert as often as it has copies."""
    Placement.once = lambda self, part, index: part  # type: ignore[method-assign]


def count_them_here_and_elsewhere() -> None:
    """A copy adds what came, and forgets its own."""
    from picotron_mini.parallel import replicas

    real = replicas._sum

    def wrong(gradient, axis, kept):  # type: ignore[no-untyped-def]
        own = gradient.clone()
        real(gradient, axis, kept)
        for rows in kept.values():
            if axis.index in rows and len(rows) > 1:
                gradient[rows[axis.index]] -= own[rows[axis.index]]

    replicas._sum = wrong


@pytest.mark.parametrize(
    ("patch", "where"),
    [(forget_the_sum, "experts"), (count_copies, "step 0"), (count_them_here_and_elsewhere, "experts")],
)
def test_half_a_copy_is_noticed(patch, where: str) -> None:  # type: ignore[no-untyped-def]
    report = verify("dp=2,ep=2", MOE, replace(TRAIN, expert_replicas=1), patch=patch, optimizers=["sgd"])
    assert not report.ok and where in (report.first_divergence or ""), report.first_divergence
    if patch is count_copies:
        (norm,) = (each for each in report.differences if each.quantity == "gradient norm")
        assert norm.error > 1e-6
