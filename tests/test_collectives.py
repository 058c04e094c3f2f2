"""Each collective: its value, its gradient, its bytes, and that it compiles; and that broken ones are noticed.

The bytes are checked against a witness that shares no code with the ledger: see course/instruments/witness.py.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from picotron_mini import collectives
from picotron_mini.collectives import conjugate, ledger, operators
from picotron_mini.config import MeshShape
from picotron_mini.course.instruments.witness import Witness
from picotron_mini.launch import RankError
from picotron_mini.mesh import Mesh

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
SIZES = [2, 3]  # three: with two ranks many a wrong order looks right


def ours(rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[6, 2], different on each rank; whole numbers, so that sums are exact in every dtype here."""
    return torch.arange(12).reshape(6, 2).to(dtype) + 20 * rank


def check_values(shape: MeshShape, dtype: torch.dtype) -> None:
    """In a rank: every collective against what one process computes from all ranks' inputs."""
    torch.manual_seed(0)
    axis = Mesh.build(shape)["tp"]
    n, r = axis.size, axis.index
    every = [ours(rank, dtype) for rank in range(n)]
    x = every[r]
    total = torch.stack(every).sum(0)

    def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
        assert got.dtype == dtype, f"{what}: dtype {got.dtype}"
        assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
        assert torch.equal(got, want), f"{what}: {got.tolist()} instead of {want.tolist()}"

    same(collectives.all_reduce(x, axis), total, "all_reduce")
    same(collectives.all_reduce_max(x, axis), every[-1], "all_reduce_max")
    for dim in (0, 1, -1):
        same(collectives.all_gather(x, axis, dim), torch.cat(every, dim), f"all_gather {dim}")
        part = x if dim == 0 else x.T.contiguous()  # [6, 2] or [2, 6]: dim is a multiple of n
        want = (total if dim == 0 else total.T).chunk(n, dim)[r]
        same(collectives.reduce_scatter(part, axis, dim), want, f"reduce_scatter {dim}")
    same(collectives.all_to_all(x, axis), torch.cat([other.chunk(n)[r] for other in every]), "all_to_all")
    # not contiguous: a transposed view
    same(collectives.all_reduce(x.T, axis), total.T, "all_reduce of a view")
    same(collectives.all_gather(x.T, axis, 1), torch.cat([e.T for e in every], 1), "all_gather of a view")
    same(collectives.all_to_all(x.T.repeat(n, 1), axis), torch.cat([e.T for e in every]), "all_to_all of a view")
    # the inputs are as they were
    same(x, ours(r, dtype), "the input")

    whole = torch.arange(10).to(dtype)  # 10 by 3 is 4, 4, 2
    for total_length in range(n, 11):
        mine = list(whole[:total_length].chunk(n)) + [whole[:0]] * n
        got = collectives.all_gather(mine[r], axis, 0, total=total_length)
        same(got, whole[:total_length], f"uneven all_gather of {total_length}")

    for root in range(n):
        same(collectives.broadcast(ours(r, dtype), axis, root), every[root], f"broadcast from {root}")
    inplace = ours(r, dtype)
    collectives.all_reduce_async(inplace, axis).wait()
    same(inplace, total, "all_reduce_async")
    buffer = torch.empty_like(x)  # around the ring
    works = [collectives.send(x, axis, (r + 1) % n), collectives.receive(buffer, axis, (r - 1) % n)]
    for work in works:
        work.wait()
    same(buffer, every[r - 1], "send and receive")
    arriving, work = collectives.rotate(x.T.contiguous(), axis)
    work.wait()
    same(arriving, every[r - 1].T, "rotate")
    collectives.barrier(axis)
    same(collectives.reduce_from(x, axis), total, "reduce_from")
    same(collectives.copy_to(x, axis), x, "copy_to")
    same(collectives.gather_from(x, axis, 1), torch.cat(every, 1), "gather_from")
    same(collectives.scatter_to(x, axis, 0), total.chunk(n)[r], "scatter_to")
    same(collectives.exchange(x, axis), torch.cat([other.chunk(n)[r] for other in every]), "exchange")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(ranks, dtype: torch.dtype, size: int) -> None:
    ranks(check_values, MeshShape(tp=size), dtype, world_size=size)


def check_two_axes() -> None:
    mesh = Mesh.build(MeshShape(dp=2, tp=2))
    x = torch.tensor([10.0**mesh.rank])
    assert collectives.all_reduce(x, mesh["tp"]).item() == (11 if mesh.rank < 2 else 1100)
    assert collectives.all_reduce(x, mesh["dp"]).item() == (101 if mesh.rank % 2 == 0 else 1010)
    # global ranks and coordinates differ here: to and source are coordinates
    assert collectives.broadcast(x.clone(), mesh["dp"], root=1).item() == 10.0 ** (2 + mesh.rank % 2)
    buffer = torch.empty(1)
    tp = mesh["tp"]
    works = [collectives.send(x, tp, 1 - tp.index), collectives.receive(buffer, tp, 1 - tp.index)]
    for work in works:
        work.wait()
    assert buffer.item() == 10.0 ** (mesh.rank ^ 1)


def test_coordinates_are_not_ranks(ranks) -> None:
    ranks(check_two_axes, world_size=4)


# --- gradients --------------------------------------------------------------------------------------------


def a_split_layer(shape: MeshShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two linear layers, the first cut by outputs and the second by inputs, as tensor parallelism has it."""
    axis = Mesh.build(shape)["tp"]
    x, first, second = two_layers()
    x.requires_grad_()
    a = first.chunk(axis.size, 1)[axis.index].clone().requires_grad_()
    b = second.chunk(axis.size, 0)[axis.index].clone().requires_grad_()
    y = collectives.reduce_from(torch.tanh(collectives.copy_to(x, axis) @ a) @ b, axis)
    (y**2).sum().backward()
    return y.detach(), x.grad, a.grad, b.grad


def a_split_layer_and_sequence(shape: MeshShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same two layers, with each rank's part of the tokens before and after them."""
    axis = Mesh.build(shape)["tp"]
    x, first, second = two_layers()
    x = x.chunk(axis.size)[axis.index].clone().requires_grad_()
    a = first.chunk(axis.size, 1)[axis.index].clone().requires_grad_()
    b = second.chunk(axis.size, 0)[axis.index].clone().requires_grad_()
    y = collectives.scatter_to(torch.tanh(collectives.gather_from(x, axis, 0) @ a) @ b, axis, 0)
    (y**2).sum().backward()
    return y.detach(), x.grad, a.grad, b.grad


def two_layers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in ((6, 4), (4, 6), (6, 3)))


def through_plain_ones() -> dict[str, tuple[float, int]]:
    """In a rank: the gradient that comes back through each plain collective, and how many warnings there were."""
    axis, found = Mesh.build(MeshShape(tp=2))["tp"], {}
    calls = {
        "all_reduce": lambda x: collectives.all_reduce(x, axis),
        "all_gather": lambda x: collectives.all_gather(x, axis, 0),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, axis, 0),
        "all_to_all": lambda x: collectives.all_to_all(x, axis),
    }
    for name, call in calls.items():
        x = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (call(x).sum() + 0.0 * x.sum()).backward()
        found[name] = x.grad.abs().max().item(), len(told)
    return found


def test_no_gradient_comes_through_a_plain_collective_and_torch_says_so(ranks) -> None:
    """Not the identity by accident either: in a tensor-parallel layer that would be right, until it is compiled."""
    for found in ranks(through_plain_ones, world_size=2):
        assert found == dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), (0.0, 1))


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_the_pair_are_those_of_one_device(ranks, size: int) -> None:
    x, first, second = (t.requires_grad_() for t in two_layers())
    y = torch.tanh(x @ first) @ second
    (y**2).sum().backward()
    for rank, (got_y, got_x, got_a, got_b) in enumerate(ranks(a_split_layer, MeshShape(tp=size), world_size=size)):
        torch.testing.assert_close(got_y, y.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got_x, x.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(got_a, first.grad.chunk(size, 1)[rank], rtol=1e-12, atol=0)
        torch.testing.assert_close(got_b, second.grad.chunk(size, 0)[rank], rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_a_split_sequence_are_those_of_one_device(ranks, size: int) -> None:
    x, first, second = (t.requires_grad_() for t in two_layers())
    y = torch.tanh(x @ first) @ second
    (y**2).sum().backward()
    results = ranks(a_split_layer_and_sequence, MeshShape(tp=size), world_size=size)
    for rank, (got_y, got_x, got_a, got_b) in enumerate(results):
        torch.testing.assert_close(got_y, y.detach().chunk(size)[rank], rtol=1e-12, atol=0)
        torch.testing.assert_close(got_x, x.grad.chunk(size)[rank], rtol=1e-12, atol=0)
        torch.testing.assert_close(got_a, first.grad.chunk(size, 1)[rank], rtol=1e-12, atol=0)
        torch.testing.assert_close(got_b, second.grad.chunk(size, 0)[rank], rtol=1e-12, atol=0)


def check_gradient_of_exchange(shape: MeshShape) -> None:
    """In a rank: every rank gives what it receives a weight of its own, and it comes back from where the part went."""
    axis = Mesh.build(shape)["tp"]
    x = ours(axis.index).requires_grad_()
    (collectives.exchange(x, axis) * (axis.index + 1)).sum().backward()
    assert x.grad is not None
    came = [part.unique().tolist() for part in x.grad.chunk(axis.size)]
    assert came == [[j + 1.0] for j in range(axis.size)], came


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_exchange(ranks, size: int) -> None:
    ranks(check_gradient_of_exchange, MeshShape(tp=size), world_size=size)


# --- bytes ------------------------------------------------------------------------------------------------


def use_everything(mesh: Mesh) -> None:
    """Each operation with a payload of another size, forward and backward."""
    axis = mesh["tp"]
    n, r = axis.size, axis.index
    collectives.all_reduce(torch.ones(3), axis)
    collectives.all_reduce_max(torch.ones(5, dtype=torch.float64), axis)
    collectives.all_gather(torch.ones(7, 2), axis, 1)
    collectives.all_gather(torch.ones(5).chunk(n)[r], axis, 0, total=5)
    collectives.reduce_scatter(torch.ones(2, 11 * n, dtype=torch.bfloat16), axis, 1)
    collectives.all_to_all(torch.ones(13 * n), axis)
    collectives.broadcast(torch.ones(17), axis, root=n - 1)
    collectives.barrier(axis)
    collectives.all_reduce_async(torch.ones(19), axis).wait()
    buffer = torch.empty(23)
    works = [collectives.send(torch.ones(23), axis, (r + 1) % n), collectives.receive(buffer, axis, (r - 1) % n)]
    for work in works:
        work.wait()
    x = torch.ones(29, requires_grad=True)
    collectives.reduce_from(collectives.copy_to(x, axis).exp(), axis).sum().backward()
    y = torch.ones(31, requires_grad=True)
    collectives.scatter_to(collectives.gather_from(y, axis, 0).exp(), axis, 0).sum().backward()
    collectives.rotate(torch.ones(41), axis)[1].wait()
    collectives.exchange(torch.ones(37 * n, requires_grad=True), axis).sum().backward()


def ledger_and_witness(shape: MeshShape) -> tuple[dict[Any, int], dict[str, int], dict[str, int]]:
    mesh = Mesh.build(shape)
    with ledger.recording() as counted, Witness() as witness:
        use_everything(mesh)
    return dict(counted), dict(witness.bytes), dict(witness.calls)


@pytest.mark.parametrize("size", SIZES)
def test_the_ledger_counts_what_the_witness_sees(ranks, size: int) -> None:
    shard = -(-5 // size) * 4  # padded to the first shard
    for rank, (counted, seen, calls) in enumerate(ranks(ledger_and_witness, MeshShape(tp=size), world_size=size)):
        expected = {
            ("tp", "all_reduce"): 3 * 4 + 5 * 8 + 19 * 4 + 2 * 29 * 4,
            ("tp", "all_gather"): 14 * 4 + shard + 2 * 31 * 4,
            ("tp", "reduce_scatter"): 2 * 11 * size * 2 + 2 * 31 * size * 4,
            ("tp", "all_to_all"): (13 + 2 * 37) * size * 4,
            ("tp", "send"): (23 + 41) * 4,
        }
        if rank == size - 1:
            expected["tp", "broadcast"] = 17 * 4
        assert counted == expected
        assert seen == {operation: n for (_, operation), n in counted.items()}
        assert calls["all_reduce"] == 5
        assert calls["broadcast"] == calls["barrier"] == 1
        assert calls["send"] == calls["receive"] == 2


def test_an_axis_of_one_rank_does_nothing(ranks) -> None:
    ((counted, seen, calls),) = ranks(one_rank, world_size=1)
    assert counted == seen == calls == {}


def one_rank() -> tuple[dict[Any, int], dict[str, int], dict[str, int]]:
    axis = Mesh.build(MeshShape())["tp"]
    x = torch.ones(4, 2)
    with ledger.recording() as counted, Witness() as witness:
        for same in (
            collectives.all_reduce(x, axis),
            collectives.all_reduce_max(x, axis),
            collectives.all_gather(x, axis, 0),
            collectives.reduce_scatter(x, axis, 0),
            collectives.all_to_all(x, axis),
            collectives.broadcast(x, axis),
            collectives.copy_to(x, axis),
            collectives.reduce_from(x, axis),
            collectives.gather_from(x, axis, 0),
            collectives.scatter_to(x, axis, 0),
            collectives.exchange(x, axis),
        ):
            assert same is x
        collectives.barrier(axis)
        assert collectives.all_reduce_async(x, axis).wait() is None
    return dict(counted), dict(witness.bytes), dict(witness.calls)


def test_a_function_that_names_the_ledger_meets_the_ranks_own() -> None:
    assert pickle.loads(pickle.dumps(ledger)) is ledger


def recordings() -> list[dict[Any, int]]:
    mesh = Mesh.build(MeshShape(pp=2))
    x = torch.ones(2)
    with ledger.recording() as outer:
        collectives.all_reduce(x, mesh["pp"])
        with ledger.recording() as inner:
            collectives.all_reduce(x, mesh["pp.backward"])  # both directions count as pp
        try:
            with ledger.recording() as broken:
                raise ValueError
        except ValueError:
            pass
        collectives.all_reduce(x, mesh["pp"])
    collectives.all_reduce(x, mesh["pp"])
    return [dict(outer), dict(inner), dict(broken)]


def test_recordings_nest_and_end(ranks) -> None:
    for outer, inner, broken in ranks(recordings, world_size=2):
        assert outer == {("pp", "all_reduce"): 24}
        assert inner == {("pp", "all_reduce"): 8}
        assert broken == {}


def test_recordings_that_counted_the_same_end_one_by_one() -> None:
    with ledger.recording() as outer:
        with ledger.recording() as inner:
            pass  # both are empty, and so equal
        ledger.again(Counter({("tp", "all_reduce"): 8}))
    assert (outer, inner) == ({("tp", "all_reduce"): 8}, {})


# --- compiled ---------------------------------------------------------------------------------------------


def eager_and_compiled() -> list[Any]:
    warnings.simplefilter("ignore")  # the compiler makes some of its own
    axis = Mesh.build(MeshShape(tp=2))["tp"]

    def block(x: torch.Tensor) -> torch.Tensor:
        x = collectives.copy_to(x, axis).sin()
        x = collectives.reduce_from(x, axis)
        x = collectives.scatter_to(collectives.gather_from(x, axis, 1).cos(), axis, 1)
        y = collectives.all_gather(x.detach(), axis, 1)
        y = y + collectives.all_gather(y[:, : 3 - axis.index], axis, 1, total=5).sum()
        y = collectives.all_to_all(y, axis)
        y = collectives.reduce_scatter(y, axis, 1)
        return x + y + collectives.all_reduce(y, axis)

    out = []
    for fn in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x = (torch.arange(8, dtype=torch.float64).reshape(2, 4) + axis.index).requires_grad_()
        for _ in range(2):  # the first call compiles, the second only runs
            x.grad = None
            with ledger.recording() as counted:
                y = fn(x)
                (y * y).sum().backward()
            out.append((y.detach(), x.grad, dict(counted)))
    return out


@pytest.mark.slow
def test_compiled_blocks_compute_and_count_the_same(ranks) -> None:
    for eager, _, first, second in ranks(eager_and_compiled, world_size=2):
        assert {operation for _, operation in eager[2]} == {
            "all_reduce",
            "all_gather",
            "all_to_all",
            "reduce_scatter",
        }
        for compiled in (first, second):
            assert torch.equal(compiled[0], eager[0])
            assert torch.equal(compiled[1], eager[1])
            assert compiled[2] == eager[2]


# --- mistakes ---------------------------------------------------------------------------------------------


def sizes_that_do_not_fit() -> list[str]:
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    said = []
    for call in (
        lambda: collectives.reduce_scatter(torch.ones(2, 5), axis, 1),
        lambda: collectives.all_to_all(torch.ones(3), axis),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_sizes_that_do_not_fit_are_named(ranks) -> None:
    for said in ranks(sizes_that_do_not_fit, world_size=2):
        assert said == [
            "reduce_scatter: tp=2 does not divide 5; pad it first",
            "all_to_all: tp=2 does not divide 3; pad it first",
        ]


# Each entry breaks one collective in a rank, as a careless change of the library might.
def _forgets_the_sum() -> None:
    dist.all_reduce = lambda x, group, op=None, async_op=False: collectives.Done()


def _only_maximum() -> None:
    real = dist.all_reduce
    dist.all_reduce = lambda x, **options: real(x, **options | {"op": dist.ReduceOp.MAX})


def _gathers_backwards() -> None:
    real = operators.torch_all_gather
    operators.torch_all_gather = lambda out, x, group: (real(out, x, group=group), out.copy_(out.flip(0)))


def _scatters_to_the_next_rank() -> None:
    real = operators.torch_reduce_scatter
    operators.torch_reduce_scatter = lambda out, x, group: real(out, x.roll(out.shape[0], 0), group=group)


def _keeps_its_own() -> None:
    dist.all_to_all_single = lambda out, x, group: out.copy_(x)


def _broadcasts_from_rank_zero() -> None:
    real = dist.broadcast
    dist.broadcast = lambda x, src, group: real(x, src=0, group=group)


def _receives_nothing() -> None:
    real = dist.irecv
    dist.irecv = lambda buffer, source, group: real(torch.empty_like(buffer), source, group=group)


def _swaps_the_pair() -> None:
    collectives.copy_to, collectives.reduce_from = collectives.reduce_from, collectives.copy_to


def _forgets_backward() -> None:
    conjugate._CopyTo.backward = staticmethod(lambda ctx, grad: (grad, None))


def _sums_backward_too() -> None:
    conjugate._ReduceFrom.backward = staticmethod(lambda ctx, grad: (operators.all_reduce(grad, "tp:0,1"), None))


def _scatters_without_gathering_back() -> None:
    conjugate._ScatterTo.backward = staticmethod(lambda ctx, grad: (torch.cat([grad] * ctx.size), None, None))


def _rotates_nothing() -> None:
    dist.batch_isend_irecv = lambda operations: []


def _keeps_the_gradient() -> None:
    conjugate._Exchange.backward = staticmethod(lambda ctx, grad: (grad, None))


BROKEN = [
    _forgets_the_sum,
    _only_maximum,
    _gathers_backwards,
    _scatters_to_the_next_rank,
    _keeps_its_own,
    _broadcasts_from_rank_zero,
    _receives_nothing,
    _swaps_the_pair,
    _forgets_backward,
    _sums_backward_too,
    _scatters_without_gathering_back,
    _rotates_nothing,
    _keeps_the_gradient,
]


def with_broken(break_it: Callable[[], None]) -> tuple[Any, ...]:
    break_it()
    check_values(MeshShape(tp=2), torch.float64)
    check_gradient_of_exchange(MeshShape(tp=2))
    _, x, a, _ = a_split_layer_and_sequence(MeshShape(tp=2))
    return (*a_split_layer(MeshShape(tp=2)), x, a)


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda fn: fn.__name__.strip("_"))
def test_a_broken_collective_is_noticed(ranks, break_it: Callable[[], None]) -> None:
    x, first, second = (t.requires_grad_() for t in two_layers())
    ((torch.tanh(x @ first) @ second) ** 2).sum().backward()
    try:
        results = ranks(with_broken, break_it, world_size=2)
    except RankError as error:
        assert "AssertionError" in str(error)  # check_values said so, and nothing else went wrong
        return
    right = [torch.allclose(r[1], x.grad, rtol=1e-12, atol=0) for r in results]
    right += [torch.allclose(r[4], x.grad.chunk(2)[i], rtol=1e-12, atol=0) for i, r in enumerate(results)]
    right += [torch.allclose(r[5], first.grad.chunk(2, 1)[i], rtol=1e-12, atol=0) for i, r in enumerate(results)]
    right += [torch.allclose(r[2], first.grad.chunk(2, 1)[i], rtol=1e-12, atol=0) for i, r in enumerate(results)]
    assert not all(right)


def silent_ledger() -> bool:
    """A call that the ledger does not count, as a careless change might make it."""
    mesh = Mesh.build(MeshShape(tp=2))
    ledger.record = lambda *_: None
    with ledger.recording() as counted, Witness() as witness:
        collectives.all_reduce(torch.ones(3), mesh["tp"])
    return dict(witness.bytes) == {operation: n for (_, operation), n in counted.items()}


def unknown_operator() -> str:
    Mesh.build(MeshShape(tp=2))
    try:
        with Witness():
            dist.gather(torch.ones(1), [torch.ones(1)] * 2 if dist.get_rank() == 0 else None)
    except KeyError as error:
        return str(error)
    return ""


def test_the_witness_notices(ranks) -> None:
    assert ranks(silent_ledger, world_size=2) == [False, False]
    assert ranks(unknown_operator, world_size=2) == ["'gather_'"] * 2
