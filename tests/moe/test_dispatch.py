"""Dispatch: what comes back is what one device computes, gradients too, however unevenly the tokens choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from watching import Shared, noting, watched

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape, MoEConfig
from picotron_mini.launch import RankError
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.moe import Experts, local_dispatch
from picotron_mini.moe import dispatch, exchange
from picotron_mini.moe.dispatch import ExpertDispatch, plan, recording
from picotron_mini.moe.placement import by_number
from picotron_mini.parallel.expert_traffic import even_rows, rows_for, rows_of_step

E, K, D, RANKS = 6, 3, 4, 3
TOKENS = (5, 1, 8)  # of each rank


def everyone(_: int) -> Tensor:
    return torch.rand(max(TOKENS), E).topk(K).indices


def one_expert(_: int) -> Tensor:
    """All tokens of all ranks want expert 4, and nothing else."""
    return torch.tensor([[4, -1, -1]]).repeat(max(TOKENS), 1)


def some_dropped(_: int) -> Tensor:
    chosen = everyone(0)
    return chosen.masked_fill(torch.rand(chosen.shape) < 0.6, -1)


def nobody(_: int) -> Tensor:
    return torch.full((max(TOKENS), K), -1)


def own_experts(rank: int) -> Tensor:
    """Nothing leaves its rank."""
    return torch.tensor([[2 * rank, 2 * rank + 1, -1]]).repeat(max(TOKENS), 1)


def one_rank_has_none(rank: int) -> Tensor:
    """No token of rank 1 has an expert."""
    return nobody(0) if rank == 1 else everyone(0)


CHOICES: dict[str, Callable[[int], Tensor]] = {
    f.__name__: f for f in (everyone, one_expert, some_dropped, nobody, own_experts, one_rank_has_none)
}


def case(how: str) -> tuple[Experts, list[Tensor], list[Tensor], list[Tensor]]:
    """All experts, and of each rank its tokens [N, D], their experts [N, K], the weights."""
    torch.manual_seed(0)
    run = Experts(MoEConfig(num_experts=E, top_k=K, expert_size=5), D).double()
    for weight in run.parameters():
        nn.init.normal_(weight)
    chosen = [CHOICES[how](rank)[:n] for rank, n in enumerate(TOKENS)]
    tokens = [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in TOKENS]
    weights = [torch.rand(n, K, dtype=torch.float64, requires_grad=True) for n in TOKENS]
    return run, tokens, chosen, weights


def slice_of(run: Experts, slots: slice) -> Experts:
    part = Experts(MoEConfig(num_experts=E, top_k=K, expert_size=5), D).double()
    for name, weight in run.named_parameters():
        setattr(part, name, nn.Parameter(weight.detach()[slots].clone()))
    return part


def check(how: str, parts: int = 1, order: list[int] | None = None) -> None:
    """On a rank: outputs and all gradients against those of one process that has all tokens and experts."""
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    run, tokens, chosen, weights = case(how)
    shared = nn.Linear(D, D, dtype=torch.float64)
    want = [local_dispatch(x, e, w, run, shared) for x, e, w in zip(tokens, chosen, weights, strict=True)]
    sum((y**2).sum() for y in want).backward()  # type: ignore[union-attr]

    rank, held = axis.index, E // RANKS
    own = slice(rank * held, (rank + 1) * held)
    moved = Experts(MoEConfig(num_experts=E, top_k=K, expert_size=5), D).double()
    for name, weight in run.named_parameters():
        setattr(moved, name, nn.Parameter(weight.detach()[order or list(range(E))]))
    mine, x, w = slice_of(moved, own), tokens[rank].detach().clone().requires_grad_(), weights[rank].detach().clone()
    send = ExpertDispatch(axis, E, parts)
    if order is not None:
        send.place(tuple(order))
    y = send(x, chosen[rank], w.requires_grad_(), mine, shared)
    (y**2).sum().backward()
    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, want[rank], **same)
    torch.testing.assert_close(x.grad, tokens[rank].grad, **same)
    torch.testing.assert_close(w.grad, weights[rank].grad, **same)
    for name, weight in mine.named_parameters():
        whole = run.get_parameter(name).grad
        assert whole is not None and weight.grad is not None, "an expert without rows has a gradient of zeros"
        torch.testing.assert_close(weight.grad, whole[order or list(range(E))][own], **same)


@pytest.mark.parametrize("how", CHOICES)
def test_it_is_what_one_device_computes(ranks, how: str) -> None:
    ranks(check, how, world_size=RANKS)


@pytest.mark.parametrize("how", ["everyone", "some_dropped", "one_expert"])
def test_in_parts_too(ranks, how: str) -> None:
    ranks(check, how, 3, world_size=RANKS)


def test_experts_may_be_anywhere(ranks) -> None:
    ranks(check, "some_dropped", 2, [3, 0, 5, 1, 4, 2], world_size=RANKS)


# --- broken on purpose ------------------------------------------------------------------------------------


def without_weights_of_their_own() -> None:
    """Rows keep their order, and the weights beside them are those of the rank's first tokens."""
    real = dispatch.plan

    def wrong(*args):  # type: ignore[no-untyped-def]
        plans = real(*args)
        for each in plans:
            each.local = each.local.roll(1, 0)
        return plans

    dispatch.plan = wrong


def each_row_twice() -> None:
    """What comes back is added to the wrong token."""
    real = dispatch.plan

    def wrong(*args):  # type: ignore[no-untyped-def]
        plans = real(*args)
        for each in plans:
            each.token = each.token.flip(0)
        return plans

    dispatch.plan = wrong


def gradients_stay() -> None:
    """Backward hands on what it got, as if a row had never travelled."""
    exchange._Start.backward = staticmethod(lambda ctx, grad: (ctx.trip.arrived(), (grad * 0, None))[1])


def broken(patch: Callable[[], None]) -> None:
    patch()
    check("everyone")


@pytest.mark.parametrize("patch", [without_weights_of_their_own, each_row_twice, gradients_stay])
def test_mistakes_are_noticed(ranks, patch: Callable[[], None]) -> None:
    with pytest.raises(RankError):
        ranks(broken, patch, world_size=RANKS)


# --- rows and bytes ---------------------------------------------------------------------------------------


def one_rank_plan(slots: list[list[int]], ranks: int, held: int) -> dispatch.Plan:
    (only,) = plan([torch.tensor(slots)], Axis("ep", 1, 0, (0,)), ranks * held)
    return only


def test_a_token_sends_one_row_to_a_rank_however_many_of_its_experts_are_there() -> None:
    assert rows_for([[0, 1, 2], [3, 4, 5], [0, 5, -1], [-1, -1, -1]], 3, 2) == [2, 2, 2]
    assert rows_for([[0, 1, -1]] * 5, 3, 2) == [5, 0, 0]


def test_on_one_rank_every_token_with_an_expert_is_sent_once() -> None:
    found = one_rank_plan([[1, 0], [-1, -1], [-1, 2]], 1, 3)
    assert found.sends == found.receives == [2] and found.routed == 3
    assert found.token.tolist() == [0, 2] and found.local.tolist() == [[1, 0], [-1, 2]]


def test_rows_to_expect_are_those_of_all_sets_of_experts() -> None:
    import itertools

    for experts, k, ep in ((8, 2, 2), (6, 3, 3), (8, 8, 4), (4, 1, 2)):
        sets = list(itertools.combinations(range(experts), k))
        rows = sum(rows_for(sets, ep, experts // ep))
        assert even_rows(MoEConfig(num_experts=experts, top_k=k), ep, len(sets)) == rows


def test_rows_to_expect_count_copies() -> None:
    """Every set of experts once in each turn of the copies, by the dispatch's own choice of slots."""
    import itertools

    for experts, k, ep, replicas in ((8, 2, 4, 1), (8, 2, 4, 4), (8, 2, 4, 6), (6, 3, 3, 2), (8, 2, 2, 3)):
        sets, turns = list(itertools.combinations(range(experts), k)), 12
        sender = ExpertDispatch(Axis("ep", ep, 0, tuple(range(ep))), experts)
        sender.place(by_number(experts, ep, replicas))
        slots = sender._slots(torch.tensor([each for each in sets for _ in range(turns)])).tolist()
        rows = sum(rows_for(slots, ep, sender.held))
        assert even_rows(MoEConfig(num_experts=experts, top_k=k), ep, len(slots), replicas) == rows


def count(how: str) -> tuple[dict[tuple[str, str], int], list[tuple[int, list[list[int]]]]]:
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    run, tokens, chosen, weights = case(how)
    held = E // RANKS
    mine = slice_of(run, slice(axis.index * held, (axis.index + 1) * held))
    with ledger.recording() as sent, recording() as decided:
        send = ExpertDispatch(axis, E, layer=7)
        send(tokens[axis.index], chosen[axis.index], weights[axis.index], mine, None).sum().backward()
    return dict(sent), decided


@pytest.mark.parametrize("how", CHOICES)
def test_bytes_are_those_of_the_formula(ranks, how: str) -> None:
    counted = ranks(count, how, world_size=RANKS)
    moe, mesh = MoEConfig(num_experts=E, top_k=K), MeshShape(dp=RANKS, ep=RANKS)
    rows = rows_of_step([decided for _, decided in counted], mesh, moe, 1)
    assert sum(sent for each in rows for sent, _ in each.values()) == sum(r for each in rows for _, r in each.values())
    for (sent, _), each in zip(counted, rows, strict=True):
        s, r = each[7]
        row, beside = 8 * D, 8 * 2 * K
        want = {("ep", "all_to_all"): (s + r) * (2 * row + beside), ("ep", "counts"): 16 * RANKS}
        assert sent == {key: n for key, n in want.items() if n or key in sent}


# --- what happens when -------------------------------------------------------------------------------------


def order_of_events(parts: int) -> list[str]:
    """On a rank: when journeys start and end, and when the shared expert and the experts compute."""
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    run, tokens, chosen, weights = case("everyone")
    mine = slice_of(run, slice(axis.index * 2, axis.index * 2 + 2))
    events: list[str] = []
    exchange.all_to_all_async = noting(exchange.all_to_all_async, "start", events)
    x, e, w = tokens[axis.index], chosen[axis.index], weights[axis.index]
    y = ExpertDispatch(axis, E, parts)(x, e, w, watched(mine, events), Shared(D, events))
    events.append("backward")
    y.sum().backward()
    return events


def test_the_shared_expert_computes_while_rows_travel_both_ways(ranks) -> None:
    for events in ranks(order_of_events, 1, world_size=RANKS):
        forward = ["start", "start", "shared", "wait", "wait", "experts", "start", "wait"]
        assert events[: events.index("backward")] == forward
        backward = events[events.index("backward") + 1 :]
        assert backward == ["start", "wait", "experts'", "start", "start", "shared'", "wait", "wait"], backward


def test_while_one_part_computes_the_next_one_travels(ranks) -> None:
    for events in ranks(order_of_events, 2, world_size=RANKS):
        forward = events[: events.index("backward")]
        first = forward.index("experts")
        assert forward[:4] == ["start"] * 4, "both parts have set out"
        assert forward[:first].count("wait") == 2, "and only the first has arrived"
        backward = events[events.index("backward") + 1 :]
        first = backward.index("experts'")
        assert backward[:first].count("start") == 2 and backward[:first].count("wait") == 1, backward
