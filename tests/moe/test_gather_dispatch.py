"""Dispatch without asking: every rank gets all tokens, every shape is known before, and no result changes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from watching import Shared, noting, watched

from picotron_mini import collectives
from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, MoEConfig, RunConfig
from picotron_mini.dry_run import dry_run, sample
from picotron_mini.launch import RankError
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh, coordinates
from picotron_mini.model import moe as moe_module
from picotron_mini.model.moe import Experts, dispatch_all, local_dispatch
from picotron_mini.moe import exchange, gather_dispatch
from picotron_mini.moe.dispatch import recording
from picotron_mini.moe.gather_dispatch import GatherDispatch
from picotron_mini.parallel.describe import describe
from picotron_mini.parallel.expert_costs import flow, mixture
from picotron_mini.parallel.machine import MACHINES, Link
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.plan import plan
from picotron_mini.parallel.predict import predict
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, verify

E, K, D, RANKS, N = 6, 3, 4, 3, 5
SAME = {"rtol": 1e-12, "atol": 1e-12}


# --- a grouped product that ends before its rows do -------------------------------------------------------


class GroupedProduct(Function):
    """`torch._grouped_mm` as it is on a GPU: what is behind the last group is left as it was, here as NaN."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, offs)
        out = rows.new_full((len(rows), weights.shape[2]), float("nan"))
        for e, part in enumerate(_groups(offs)):
            out[part] = rows[part] @ weights[e]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, offs = ctx.saved_tensors
        of_rows, of_weights = torch.full_like(rows, float("nan")), torch.zeros_like(weights)
        for e, part in enumerate(_groups(offs)):
            of_rows[part] = grad[part] @ weights[e].T
            of_weights[e] = rows[part].T @ grad[part]
        return of_rows, of_weights, None


def _groups(offs: Tensor) -> Iterator[slice]:
    ends = offs.tolist()
    yield from map(slice, [0, *ends[:-1]], ends)


@contextmanager
def as_on_a_gpu() -> Iterator[set[tuple[int, int]]]:
    """Every product is grouped; yields, of those that ran, how many rows there were and how many passed an expert."""
    rows: set[tuple[int, int]] = set()

    def product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        rows.add((len(a), offs.tolist()[-1]))
        return GroupedProduct.apply(a, b, offs)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        for module in (moe_module, gather_dispatch):
            patch.setattr(module, "fits_grouped", lambda rows, weight: len(rows) > 0)
        patch.setattr(torch, "_grouped_mm", product)
        yield rows


def make_experts(number: int = E) -> Experts:
    run = Experts(MoEConfig(num_experts=number, top_k=K, expert_size=5), D).double()
    for weight in run.parameters():
        nn.init.normal_(weight)
    return run


def everyone(rank: int) -> Tensor:
    return torch.rand(N, E).topk(K).indices


def one_expert(rank: int) -> Tensor:
    """All tokens of all ranks want expert 4, and nothing else."""
    return torch.tensor([[4, -1, -1]]).repeat(N, 1)


def some_dropped(rank: int) -> Tensor:
    chosen = everyone(rank)
    return chosen.masked_fill(torch.rand(chosen.shape) < 0.6, -1)


def nobody(rank: int) -> Tensor:
    return torch.full((N, K), -1)


def own_experts(rank: int) -> Tensor:
    return torch.tensor([[2 * rank, 2 * rank + 1, -1]]).repeat(N, 1)


def one_rank_has_none(rank: int) -> Tensor:
    return nobody(rank) if rank == 1 else everyone(rank)


def experts_choose(rank: int) -> Tensor:
    """As with choice=expert: a column for each expert."""
    return torch.where(torch.rand(N, E) < 0.4, torch.arange(E), -1)


CHOICES: dict[str, Callable[[int], Tensor]] = {
    f.__name__: f for f in (everyone, one_expert, some_dropped, nobody, own_experts, one_rank_has_none, experts_choose)
}


def results(
    dispatch: Callable[..., Tensor], x: Tensor, experts: Tensor, weights: Tensor, run: Experts, *rest: object
) -> list[Tensor]:
    """The output, and all gradients of the sum of its squares."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    run.zero_grad()
    y = dispatch(x, experts, weights, run, *rest)
    (y**2).sum().backward()
    out = [y, x.grad, weights.grad, *(w.grad for w in run.parameters())]
    return [t.clone() for t in out]  # type: ignore[union-attr]


@pytest.mark.parametrize("how", CHOICES)
def test_rows_behind_all_others_reach_no_result(how: str) -> None:
    """Of a grouped product, against the loop: outputs, and the gradients of tokens, weights and experts."""
    torch.manual_seed(0)
    run, chosen = make_experts(), CHOICES[how](0)
    x, weights = torch.randn(N, D).double(), torch.rand(chosen.shape).double()
    want = results(local_dispatch, x, chosen, weights, run)
    assert all(t.isfinite().all() for t in want)
    alone = Axis("ep", 1, 0, (0,))
    ways: dict[str, Callable[..., Tensor]] = {
        "all": dispatch_all, "gathered": lambda *args: GatherDispatch(alone, E)(*args, None)
    }  # fmt: skip
    for name, way in ways.items():
        with as_on_a_gpu() as rows:
            found = results(way, x, chosen, weights, run)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, **SAME, msg=name)
        passed = max(1, int((chosen >= 0).sum()))  # one does where none has to
        assert rows == {(chosen.numel(), passed)}, "as many rows whatever was chosen, and no expert computes the rest"


def test_there_are_no_more_rows_than_a_rank_has_slots_for() -> None:
    """Two of six experts are here, so two of a token's choices at most, though it has three."""
    torch.manual_seed(0)
    with as_on_a_gpu() as rows:
        sender = GatherDispatch(Axis("ep", 1, 0, (0,)), 2)
        sender(torch.randn(N, D).double(), everyone(0), torch.rand(N, K).double(), make_experts(2), None)
    assert {number for number, _ in rows} == {2 * N}


class Asked(TorchDispatchMode):
    """Notes whether a number was read from a tensor, for which a host waits for its GPU."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_gpu() -> None:
    torch.manual_seed(0)
    run, chosen = make_experts(), some_dropped(0)
    x, weights = torch.randn(N, D).double(), torch.rand(chosen.shape).double()
    sender = GatherDispatch(Axis("ep", 1, 0, (0,)), E)
    sender.place((3, 0, 5, 1, 4, 2))
    with as_on_a_gpu(), Asked() as asked:
        results(sender, x, chosen, weights, run, None)
    assert asked.number == 0
    with Asked() as asked:  # where a loop takes the rows, and it costs nothing
        results(sender, x, chosen, weights, run, None)
    assert asked.number > 0


# --- on ranks ---------------------------------------------------------------------------------------------


def check(how: str, order: tuple[int, ...] = (), grouped: bool = False, parts: int = 1) -> None:
    """On a rank: outputs and all gradients against those of one process that has all tokens and experts."""
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    torch.manual_seed(0)
    run, shared = make_experts(), nn.Linear(D, D, dtype=torch.float64)
    chosen = [CHOICES[how](rank) for rank in range(RANKS)]
    tokens, weights = torch.randn(RANKS, N, D).double(), torch.rand(RANKS, *chosen[0].shape).double()
    # one dispatch of all tokens: its gradients of the experts are those of all ranks together
    y, of_x, of_w, *of_experts = results(
        local_dispatch, tokens.flatten(0, 1), torch.cat(chosen), weights.flatten(0, 1), run, shared
    )
    rank, slots = axis.index, order or tuple(range(E))
    held = len(slots) // RANKS
    own = list(slots[rank * held : (rank + 1) * held])
    mine = make_experts(held)
    for name, weight in run.named_parameters():
        setattr(mine, name, nn.Parameter(weight.detach()[own].clone()))
    send = GatherDispatch(axis, E, parts)
    if order:
        send.place(order)
    given = (tokens[rank], chosen[rank], weights[rank], mine, shared)
    if grouped:
        with as_on_a_gpu():
            found = results(send, *given)
    else:
        found = results(send, *given)
    part = slice(rank * N, (rank + 1) * N)
    whole = [each[own] for each in of_experts] if len(slots) == E else []  # of copies each has its tokens' part
    for one, other in zip(found, [y[part], of_x[part], of_w[part], *whole], strict=len(slots) == E):
        torch.testing.assert_close(one, other, **SAME)


@pytest.mark.parametrize("how", CHOICES)
def test_it_is_what_one_device_computes(ranks, how: str) -> None:
    ranks(check, how, world_size=RANKS)


@pytest.mark.parametrize("how", ["some_dropped", "one_expert", "nobody", "experts_choose"])
def test_with_grouped_products_too(ranks, how: str) -> None:
    ranks(check, how, (), True, world_size=RANKS)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("parts", [2, N])
def test_in_parts_too(ranks, parts: int, grouped: bool) -> None:
    ranks(check, "some_dropped", (), grouped, parts, world_size=RANKS)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("order", [(3, 0, 5, 1, 4, 2), (0, 1, 4, 2, 3, 4, 4, 5, 0)], ids=["moved", "copies"])
def test_experts_may_be_anywhere_and_several_times(ranks, order: tuple[int, ...], grouped: bool) -> None:
    ranks(check, "some_dropped", order, grouped, world_size=RANKS)


def nothing_is_masked() -> None:
    """Choices of experts elsewhere pass an expert that is here."""
    real = gather_dispatch.local_dispatch
    gather_dispatch.local_dispatch = lambda rows, local, *rest, **more: real(rows, local.clamp(min=0), *rest, **more)


def another_owner() -> None:
    """A rank takes the choices of its neighbour's experts for its own."""
    real = GatherDispatch.__call__

    def wrong(self: GatherDispatch, *args: Any) -> Tensor:
        mine = self.axis
        self._slots = lambda experts: torch.where(experts < 0, -1, (experts + self.held) % E)  # type: ignore[method-assign]
        assert mine.size == RANKS
        return real(self, *args)

    GatherDispatch.__call__ = wrong  # type: ignore[method-assign]


def parts_in_another_order() -> None:
    """Beside the tokens of one part are the weights and slots of the other."""
    real = gather_dispatch.GatherTrip.start
    waiting: list[tuple[Any, Tensor]] = []

    def start(self: Any, x: Tensor) -> Tensor:
        waiting.append((self, real(self, x)))
        return waiting[-1][1]

    def wait(self: Any, ticket: Tensor) -> Tensor:
        return real_wait(*waiting.pop())

    real_wait = gather_dispatch.GatherTrip.wait
    gather_dispatch.GatherTrip.start = start  # type: ignore[method-assign]
    gather_dispatch.GatherTrip.wait = wait  # type: ignore[method-assign]


class Travels:
    """In place of a trip: everything is done when it is waited for."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def start(self, x: Tensor) -> Tensor:
        return x


def nothing_is_added_up() -> None:
    """A rank keeps its own part of its own outputs."""

    class Trip(Travels):
        def wait(self, ticket: Tensor) -> Tensor:
            return ticket.chunk(self.axis.size)[self.axis.index]

    gather_dispatch.ScatterTrip = Trip  # type: ignore[misc, assignment]


def gradients_of_own_experts_only() -> None:
    """Tokens are gathered without the sum of their gradients that goes with it."""

    class Gather(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return collectives.all_gather(x, axis, 0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad.chunk(ctx.axis.size)[ctx.axis.index], None

    class Trip(Travels):
        def wait(self, ticket: Tensor) -> Tensor:
            return Gather.apply(ticket, self.axis)  # type: ignore[no-any-return]

    gather_dispatch.GatherTrip = Trip  # type: ignore[misc, assignment]


def weights_of_other_tokens() -> None:
    """Weights and slots are gathered, and stand beside the tokens of another rank."""
    real = gather_dispatch.gather_from
    gather_dispatch.gather_from = lambda x, axis, dim: real(x, axis, dim).roll(N if x.shape[1] > D else 0, 0)


def broken(patch: Callable[[], None]) -> None:
    patch()
    check("everyone", parts=N if patch is parts_in_another_order else 1)


@pytest.mark.parametrize(
    "patch",
    [
        parts_in_another_order,
        nothing_is_masked,
        another_owner,
        nothing_is_added_up,
        gradients_of_own_experts_only,
        weights_of_other_tokens,
    ],
)
def test_mistakes_are_noticed(ranks, patch: Callable[[], None]) -> None:
    with pytest.raises(RankError, match="not close"):
        ranks(broken, patch, world_size=RANKS)


def count(how: str) -> tuple[dict[tuple[str, str], int], list[tuple[int, list[list[int]]]]]:
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    torch.manual_seed(0)
    chosen = [CHOICES[how](rank) for rank in range(RANKS)][axis.index]
    given = torch.randn(N, D).double(), chosen, torch.rand(chosen.shape).double(), make_experts(E // RANKS), None
    with ledger.recording() as sent, recording() as decided:
        results(GatherDispatch(axis, E, layer=7), *given)
    return dict(sent), decided


@pytest.mark.parametrize("how", ["everyone", "nobody"])
def test_bytes_are_the_same_whatever_was_chosen(ranks, how: str) -> None:
    row, beside = 8 * D, 8 * 2 * K
    for sent, ((layer, slots),) in ranks(count, how, world_size=RANKS):
        assert sent == {("ep", "all_gather"): N * (2 * row + beside),
                        ("ep", "reduce_scatter"): RANKS * N * (2 * row + beside)}  # fmt: skip
        assert layer == 7 and len(slots) == N  # of its own tokens


def order_of_events(parts: int) -> list[str]:
    """On a rank: when journeys of tokens start and end, and when the shared expert and the experts compute."""
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    mine, chosen, events = make_experts(E // RANKS), everyone(axis.index), []
    for name in ("all_gather_async", "reduce_scatter_async"):
        setattr(exchange, name, noting(getattr(exchange, name), name.split("_")[1], events))

    x = torch.randn(N, D).double().requires_grad_()
    given = x, chosen, torch.rand(N, K).double(), watched(mine, events), Shared(D, events)
    y = GatherDispatch(axis, E, parts)(*given)
    events.append("backward")
    y.sum().backward()
    return events


def test_the_shared_expert_computes_while_tokens_travel_both_ways(ranks) -> None:
    for events in ranks(order_of_events, 1, world_size=RANKS):
        at = events.index("backward")
        assert events[:at] == ["gather", "shared", "wait", "experts", "scatter", "wait"]
        assert events[at + 1 :] == ["gather", "wait", "experts'", "scatter", "shared'", "wait"]


def test_while_one_part_computes_the_next_one_travels(ranks) -> None:
    for events in ranks(order_of_events, 2, world_size=RANKS):
        at = events.index("backward")
        assert events[:at] == [
            "gather", "gather", "shared", "wait", "experts", "scatter", "wait", "experts", "scatter", "wait", "wait"
        ]  # fmt: skip
        assert events[at + 1 :] == [
            "gather", "gather", "wait", "experts'", "scatter", "wait", "experts'", "scatter", "shared'", "wait", "wait"
        ]  # fmt: skip


# --- whole models -----------------------------------------------------------------------------------------

MOE = replace(MODEL, num_layers=2, moe=EXPERTS)
ALL = {"dispatch": "allgather"}


def ready(layout: str, model: ModelConfig = MOE, **train: object) -> RunConfig:
    settings = ALL | train
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **settings)))  # type: ignore[arg-type]


CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "alone": ("dp=2,ep=2", {}, {}),
    "two copies": ("dp=4,ep=2", {}, {}),
    "an expert each": ("dp=4,ep=4", {"num_experts": 4}, {"micro_batch_size": 1}),
    "with tensor": ("dp=2,tp=2,ep=2", {}, {"sequence_parallel": True, "tensor_overlap": 2}),
    "with context": ("dp=2,cp=2,ep=4", {"capacity": 0.5}, {"seq_len": 16, "document_mask": True}),
    "context only": ("cp=2,ep=2", {"choice": "expert", "balance": "none"}, {"seq_len": 16, "context": "ulysses"}),
    "in parts": ("dp=4,ep=4", {}, {"dispatch_parts": 3, "recompute": "full"}),
    "in stages": ("dp=2,pp=2,ep=2", {"balance": "bias", "score": "sigmoid", "dense_layers": 0}, {}),
    "in a V, halves of the backward apart": ("dp=2,pp=2,ep=2", {}, {"schedule": "zb-v", "micro_batches": 4}),
    "eight ranks, all axes": ("dp=2,tp=2,pp=2,ep=2", {}, {"recompute": "full"}),
    "eight ranks, all hold experts": ("dp=8,ep=8", {"aux_scope": "sequence"}, {"recompute": "selective"}),
    "experts choose": ("dp=4,ep=4", {"choice": "expert", "balance": "none", "capacity": 1.5}, {"recompute": "full"}),
    "zero 1, split in groups": ("dp=4,ep=2", {}, {"zero": 1, "zero_group": 2}),
    "zero 2, context": ("dp=2,cp=2,ep=2", {}, {"zero": 2, "seq_len": 16}),
    "zero 3, recomputed": ("dp=4,ep=2", {}, {"zero": 3, "recompute": "full"}),
    "experts move": ("dp=4,ep=2", {}, {"place_every": 1}),
    "copies move": ("dp=4,ep=4", {"shared_size": 0}, {"place_every": 1, "expert_replicas": 1, "zero": 1}),
    "only the routers trained": (
        "dp=2,ep=2", {"dense_layers": 0},
        {"freeze": ("embed", "norm", *(f"layers.{i}.{part}" for i in range(2) for part in (
            "attention", "attention_norm", "mlp_norm", "mlp.experts", "mlp.shared")))},
    ),
    "only the experts trained": (
        "dp=4,ep=2", {"dense_layers": 0},
        {"freeze": ("embed", "norm", *(f"layers.{i}.{part}" for i in range(2) for part in (
            "attention", "attention_norm", "mlp_norm", "mlp.router", "mlp.shared")))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [c if c == "alone" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_parity(case: str) -> None:
    layout, moe, train = CASES[case]
    layers = 4 if train.get("schedule") == "zb-v" else MeshShape.parse(layout).pp + 1
    model = replace(MODEL, num_layers=layers, moe=replace(EXPERTS, **moe))  # type: ignore[arg-type]
    settings = {"steps": 3 if "place_every" in train else 2, **ALL, **train}
    report = verify(layout, model, replace(TRAIN, **settings))  # type: ignore[arg-type]
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"{report.layout}: first {report.first_divergence}; {found}; {report.bytes_problems}"
    assert report.bytes_counted["ep all_gather"] > 0 < report.bytes_counted["ep reduce_scatter"]
    assert "ep all_to_all" not in report.bytes_counted and "ep counts" not in report.bytes_counted


def to_expert_0(config: MoEConfig, scores: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.zeros(len(scores), config.top_k, dtype=torch.int64)


def all_tokens_to_expert_0() -> None:
    moe_module.choose = to_expert_0


@pytest.mark.slow
def test_one_expert_may_take_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of ep has all of the work, the other none."""
    monkeypatch.setattr(moe_module, "choose", to_expert_0)  # of the one device, too
    model = replace(MOE, moe=replace(EXPERTS, top_k=1, normalize=False))
    settings = replace(TRAIN, steps=2, **ALL)  # type: ignore[arg-type]
    report = verify("dp=4,ep=2", model, settings, patch=all_tokens_to_expert_0)
    assert report.ok, (report.first_divergence, report.bytes_problems)


def a_weight_for_every_rank() -> None:
    """A mutant: the gradients of weights stay where they are, and a router hears of its own rank's experts only."""
    real = gather_dispatch.gather_from

    def wrong(x: Tensor, axis: Axis, dim: int) -> Tensor:
        if x.shape[1] != 2 * EXPERTS.top_k:
            return real(x, axis, dim)
        others = list(collectives.all_gather(x, axis, dim).detach().chunk(axis.size))
        others[axis.index] = x
        return torch.cat(others)

    gather_dispatch.gather_from = wrong


def test_a_router_that_hears_of_its_own_rank_only_is_noticed() -> None:
    report = verify("dp=2,ep=2", MOE, replace(TRAIN, steps=1, **ALL), optimizers=["sgd"], patch=a_weight_for_every_rank)  # type: ignore[arg-type]
    assert max(d.error for d in report.differences if d.quantity == "gradients") > 1e-3
    assert all("reduce_scatter" in each for each in report.bytes_problems) and report.bytes_problems


# --- predicted ----------------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    """Two micro-batches of 24 tokens; backward as forward, but that what is beside the tokens is a gradient of it."""
    run = ready("dp=2,ep=2", replace(MOE, num_layers=1, moe=replace(EXPERTS, dense_layers=0)), micro_batches=2)
    found = predict_step(run, layout_of(run), coordinates(run.mesh, 0))
    tokens, row, beside = 2 * 24, 32 * 8, 2 * 3 * 8
    assert found["ep", "all_gather"] == tokens * (2 * row + beside)
    assert found["ep", "reduce_scatter"] == 2 * tokens * (2 * row + beside)
    assert not {operation for axis, operation in found if axis == "ep"} - {"all_gather", "reduce_scatter"}
    frozen = replace(run, train=replace(run.train, freeze=("embed", "layers", "norm")))
    found = predict_step(frozen, layout_of(run), coordinates(run.mesh, 0))
    assert found["ep", "all_gather"] == tokens * (row + beside)
    assert found["ep", "reduce_scatter"] == 2 * tokens * row


@pytest.mark.parametrize(
    ("layout", "moe", "train"),
    [
        ("dp=2,ep=2", {}, {}),
        ("dp=4,ep=4", {"choice": "expert", "balance": "none"}, {"zero": 3}),
        ("dp=2,tp=2,pp=2,ep=2", {}, {"sequence_parallel": True, "recompute": "selective"}),
        ("dp=16,cp=2,ep=8", {"capacity": 1.25}, {"seq_len": 16, "dtype": "bfloat16", "expert_replicas": 1}),
    ],
)
def test_a_rehearsed_step_sends_what_is_predicted(layout: str, moe: dict[str, Any], train: dict[str, Any]) -> None:
    run = ready(layout, replace(MOE, num_layers=3, moe=replace(EXPERTS, **moe)), **train)
    for rank in sample(run):
        result = dry_run(run, rank)
        assert result.problems == []
        assert result.counted["ep", "all_gather"] > 0 < result.counted["ep", "reduce_scatter"]


def test_rows_that_there_is_memory_for() -> None:
    """On the CPU those that come; on a GPU, where nobody knows how many, all that could come."""
    few, many = (replace(MODEL, moe=replace(EXPERTS, top_k=k, normalize=False)) for k in (1, 3))
    tokens = 24
    for layout, model, rows in (("dp=4,ep=4", many, 2 * 4), ("dp=2,ep=2", many, 3 * 2), ("dp=8,ep=8", few, 8)):
        run = ready(layout, model)
        there = replace(run, train=replace(run.train, device="cuda", dtype="bfloat16"))
        here = replace(run, train=replace(run.train, dtype="bfloat16"))
        k = model.moe.top_k  # type: ignore[union-attr]
        assert flow(here).kept == flow(here).routed == flow(there).routed == k * tokens
        assert flow(there).kept == rows * tokens
        assert mixture(there).experts > mixture(here).experts
        asked = replace(there, train=replace(there.train, dispatch="alltoall"))
        assert flow(asked).kept == k * tokens


def test_what_is_waited_for() -> None:
    """A link and nothing else: (ep - 1) N D w each way, forward and backward, and the same for what is beside them."""
    machine = replace(MACHINES["h100"], inside={"": Link(0.0, 1e6)})
    found = predict(ready("dp=4,ep=4"), machine)
    tokens, row, beside = 24, 32 * 8, 2 * 3 * 8
    assert found.parts["ep"] == pytest.approx(3 * 3 * tokens * (4 * row + 2 * beside) / 1e6)
    assert predict(ready("dp=4,ep=4", recompute="full"), machine).parts["ep"] > found.parts["ep"]
    slow = replace(machine, inside={"": Link(1.0, 1e12)})  # messages: 3 forward, 3 backward; the logarithm of the ranks
    assert predict(ready("dp=2,ep=2"), slow).parts["ep"] == pytest.approx(3 * 6, rel=1e-3)
    # in four parts: four gathers and scatters each way, and one for what is beside all parts
    parted = predict(ready("dp=2,ep=2", dispatch_parts=4), replace(slow, overlap=0.0))
    assert parted.parts["ep"] == pytest.approx(3 * (8 + 1) * 2, rel=1e-3)
    # a message fewer to wait for in a forward: nobody tells how many rows will come
    assert predict(ready("dp=2,ep=2", dispatch="alltoall"), slow).parts["ep"] == pytest.approx(3 * 7, rel=1e-3)


def test_a_search_leaves_it_out_on_one_rank_and_says_it_elsewhere() -> None:
    train = replace(TRAIN, batch_size=8, micro_batches=0, micro_batch_size=0, **ALL)  # type: ignore[arg-type]
    ranked = plan(RunConfig(model=replace(MODEL, moe=EXPERTS), train=train), 4, MACHINES["h100"]).ranked
    for ep, has in ((1, "alltoall"), (2, "allgather"), (4, "allgather")):
        assert {found.run.train.dispatch for found in ranked if found.run.mesh.ep == ep} == {has}


def test_describe_says_what_travels() -> None:
    out = io.StringIO()
    Console(width=220, file=out).print(describe(ready("dp=4,ep=2")))
    assert re.search(r"ep +│ all_gather +│ tokens of all ranks to all experts", out.getvalue())
    assert re.search(r"ep +│ reduce_scatter +│ what experts made, added up", out.getvalue())


@pytest.mark.parametrize(
    ("layout", "model", "train", "says"),
    [
        ("dp=2", MOE, {}, "dispatch=allgather is for experts on several .*; use dispatch=alltoall, or ep=2"),
        ("dp=2", MODEL, {}, "dispatch=allgather is for experts on several ranks, and ep=1; use dispatch=alltoall$"),
        ("dp=2,ep=2", MOE, {"dispatch_parts": 25}, "dispatch_parts=25 is more than the 24 tokens .* use at most 24"),
        ("dp=2,ep=2", MOE, {"dispatch_payload": "fp8"}, "dispatch_payload=fp8 packs it .* use dispatch_payload=same"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(layout: str, model: ModelConfig, train: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ready(layout, model, **train)
