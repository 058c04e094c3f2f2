"""Data parallelism on any module: whatever the parameters are, the gradients are those of one device.

The module of most tests is awkward on purpose: a weight that is used twice, a frozen one, one that no rank uses, one
that some ranks use, a scalar, and several dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.parallel import data
from picotron_mini.parallel.buckets import bucket
from picotron_mini.parallel.data import GradientBuckets, all_reduce_gradients, broadcast_parameters

Ranks = Callable[..., list[Any]]
WORLD = 3  # two ranks hide bugs
MICRO_BATCHES = 2


class Odd(nn.Module):
    """Everything that a model may do with its parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6, dtype=dtype)
        self.tied = nn.Linear(6, 4, bias=False, dtype=dtype)
        self.frozen = nn.Parameter(torch.rand(4, dtype=dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))  # no dim at all
        self.sometimes = nn.Parameter(torch.rand(4, dtype=dtype))  # used by some ranks only
        self.never = nn.Parameter(torch.rand(2, 3, dtype=dtype))
        self.register_buffer("offset", torch.rand(4, dtype=dtype))

    def forward(self, x: Tensor, sometimes: bool) -> Tensor:
        """[B, 4] -> a scalar."""
        x = torch.tanh(self.first(x)) @ self.tied.weight.T + self.frozen + self.offset  # [B, 4]
        if sometimes:
            x = x * self.sometimes
        return (torch.tanh(x @ self.tied.weight) * self.scale).sum()  # the tied weight again


def inputs(rank: int, micro_batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, bool]:
    """x [B, 4] and whether this micro-batch uses the optional weight: on rank 1, in its first micro-batch."""
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randn(3, 4, generator=generator).to(dtype), (rank, micro_batch) == (1, 0)


def truth(world: int = WORLD, micro_batches: int = MICRO_BATCHES) -> dict[str, Tensor]:
    """The gradients of one device that sees all of it."""
    module = Odd()
    torch.stack([module(*inputs(r, m)) for r in range(world) for m in range(micro_batches)]).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def axis_of_world() -> Axis:
    return Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))["dp"]


def run_step(module: nn.Module, buckets: GradientBuckets, axis: Axis, dtype: torch.dtype = torch.float64) -> None:
    buckets.reset()
    for m in range(MICRO_BATCHES):
        if m == MICRO_BATCHES - 1:
            buckets.arm()
        module(*inputs(axis.index, m, dtype)).backward()
    buckets.finish()


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def bucketed(bucket_bytes: float, steps: int) -> tuple[dict[str, Tensor | None], int, int]:
    """In a rank: the gradients of the last step, the number of buckets, the bytes of that step."""
    axis = axis_of_world()
    module = Odd()
    buckets = GradientBuckets(module.parameters(), axis, bucket_bytes)
    for _ in range(steps):
        with ledger.recording() as sent:
            run_step(module, buckets, axis)
    named = dict(module.named_parameters())
    for parameter in named.values():  # both ways of asking agree
        assert buckets.gradient(parameter) is parameter.grad
    return grads(module), len(buckets.buckets), sent["dp", "all_reduce"]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 1e9])
def test_gradients_of_an_odd_module_equal_one_device(ranks: Ranks, bucket_bytes: float, steps: int) -> None:
    want = truth()
    assert set(want) == {"first.weight", "first.bias", "tied.weight", "scale", "sometimes"}
    trained = [p for p in Odd().parameters() if p.requires_grad]
    for got, number, sent in ranks(bucketed, bucket_bytes, steps, world_size=WORLD):
        assert got["frozen"] is None and got["never"] is None, "what got no gradient must not have zeros"
        for name, expected in want.items():
            torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12, msg=name)
        assert number == {1: len(trained), 1e9: 1}.get(bucket_bytes, number)
        assert bucket_bytes != 200 or 1 < number < len(trained)
        assert sent == 8 * (sum(p.numel() for p in trained) + len(trained))


def test_one_rank_only_accumulates(ranks: Ranks) -> None:
    ((got, _, sent),) = ranks(bucketed, 200, 2, world_size=1)
    assert sent == 0
    want = truth(world=1)
    assert {name for name, g in got.items() if g is not None} == set(want)
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def naive(every: bool) -> tuple[dict[str, Tensor | None], int]:
    axis = axis_of_world()
    module = Odd()
    for m in range(MICRO_BATCHES):
        module(inputs(axis.index, m)[0], every).backward()
    with ledger.recording() as sent:
        all_reduce_gradients(module.parameters(), axis)
    return grads(module), sent["dp", "all_reduce"]


@pytest.mark.parametrize("every", [True, False])
def test_naive_sums_what_all_ranks_have(ranks: Ranks, every: bool) -> None:
    module = Odd()
    torch.stack([module(inputs(r, m)[0], every) for r in range(WORLD) for m in range(MICRO_BATCHES)]).sum().backward()
    want = {name: p.grad for name, p in module.named_parameters()}
    for got, sent in ranks(naive, every, world_size=WORLD):
        for name, expected in want.items():
            if expected is None:
                assert got[name] is None, name
            else:
                torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12, msg=name)
        assert sent == sum(8 * g.numel() for g in want.values() if g is not None)  # no flags


def as_ddp_has_it() -> list[tuple[str, Tensor, Tensor]]:
    """In a rank: (name, our gradient, DDP's) of each trained parameter that any rank uses."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports inside torch
        from torch.nn.parallel import DistributedDataParallel
    axis = axis_of_world()
    ours = Odd()
    run_step(ours, GradientBuckets(ours.parameters(), axis, 100), axis)
    theirs = Odd()
    theirs.never.requires_grad_(False)
    wrapped = DistributedDataParallel(theirs, find_unused_parameters=True)
    for m in range(MICRO_BATCHES):
        x, sometimes = inputs(axis.index, m)
        if m < MICRO_BATCHES - 1:
            with wrapped.no_sync():
                wrapped(x, sometimes).backward()
        else:
            wrapped(x, sometimes).backward()
    mine = dict(ours.named_parameters())
    pairs = [(name, mine[name].grad, p.grad) for name, p in theirs.named_parameters() if mine[name].grad is not None]
    return [(name, a, b * axis.size) for name, a, b in pairs if a is not None and b is not None]


def test_same_as_torchs_own_ddp(ranks: Ranks) -> None:
    for pairs in ranks(as_ddp_has_it, world_size=2):
        assert {name for name, _, _ in pairs} == set(truth(2))
        for name, ours, theirs in pairs:  # DDP averages over the ranks
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def in_bfloat16() -> tuple[list[torch.dtype], bool, dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: dtypes of the sums, whether any .grad is set, the sums, and the micro-batches' own gradients."""
    axis = axis_of_world()
    module = Odd(torch.bfloat16)
    each = []
    for m in range(MICRO_BATCHES):
        module.zero_grad()
        module(*inputs(axis.index, m, torch.bfloat16)).backward()
        each.append({name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None})
    module.zero_grad()
    buckets = GradientBuckets(module.parameters(), axis, 100)
    run_step(module, buckets, axis, torch.bfloat16)
    sums = {name: buckets.gradient(p) for name, p in module.named_parameters()}
    exact = {name: sum(g.get(name, torch.zeros(())) for g in each) for name in {n for g in each for n in g}}
    published = any(p.grad is not None for p in module.parameters())
    return [g.dtype for g in sums.values() if g is not None], published, sums, exact


def test_narrow_gradients_are_summed_in_float32(ranks: Ranks) -> None:
    results = ranks(in_bfloat16, world_size=WORLD)
    for dtypes, published, sums, _ in results:
        assert set(dtypes) == {torch.float32}
        assert not published, "a bf16 .grad would have lost the bits again"
        assert sums["never"] is None and sums["frozen"] is None
        for name, total in sums.items():
            if total is not None:
                parts = [exact[name] for *_, exact in results if name in exact]
                # float32 sums in another order: far closer than any bf16 sum (2^-8)
                torch.testing.assert_close(total, sum(parts), rtol=1e-5, atol=1e-6, msg=name)


class Mixed(nn.Module):
    """Three dtypes in one module."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(n + 2, dtype=kind)) for n, kind in enumerate(kinds)])

    def forward(self, factor: float) -> Tensor:
        return torch.stack([w.double().sum() * factor * (n + 1) for n, w in enumerate(self.weights)]).sum()


def mixed_dtypes() -> tuple[list[Tensor | None], list[torch.dtype], int]:
    axis = axis_of_world()
    module = Mixed()
    buckets = GradientBuckets(module.parameters(), axis, 1e9)
    buckets.arm()
    with ledger.recording() as sent:
        module(float(2**axis.index)).backward()
        buckets.finish()
    return [buckets.gradient(w) for w in module.weights], [b.buffer.dtype for b in buckets.buckets], sum(sent.values())


def test_each_dtype_has_buckets_of_its_own(ranks: Ranks) -> None:
    for sums, dtypes, sent in ranks(mixed_dtypes, world_size=WORLD):
        assert sorted(map(str, dtypes)) == ["torch.float32", "torch.float64"]
        for n, total in enumerate(sums):
            assert total is not None
            assert torch.equal(total.double(), torch.full((n + 2,), 7.0 * (n + 1), dtype=torch.float64))
        assert sent == 4 * (2 + 4 + 5 + 3) + 8 * (3 + 1)


def starts(bucket_bytes: float, reverse_rank_1: bool) -> list[tuple[int, int]]:
    """In a rank: for each reduction, its elements and how many gradients were ready when it started."""
    axis = axis_of_world()
    layers = nn.Sequential(*[nn.Linear(4, n + 2, bias=False, dtype=torch.float64) for n in range(4)])
    for n, layer in enumerate(layers):
        layer.weight = nn.Parameter(torch.ones(4, 4 + n, dtype=torch.float64))
    seen: list[tuple[int, int]] = []
    ready = 0
    real = data.all_reduce_async

    def watched(x: Tensor, over: Axis) -> Any:
        seen.append((x.numel(), ready))
        return real(x, over)

    def count(_: Tensor) -> None:
        nonlocal ready
        ready += 1

    data.all_reduce_async = watched
    for parameter in layers.parameters():  # before the buckets' own hooks
        parameter.register_post_accumulate_grad_hook(count)
    buckets = GradientBuckets(layers.parameters(), axis, bucket_bytes)
    weights = list(layers.parameters())
    order = weights if reverse_rank_1 and axis.index == 1 else weights[::-1]
    buckets.arm()
    for weight in order:  # a backward that completes gradients in this order
        weight.sum().backward()
    buckets.finish()
    for weight in weights:
        assert torch.equal(weight.grad, torch.full_like(weight, axis.size))
    return seen


def test_reductions_start_during_backward(ranks: Ranks) -> None:
    # weights of 16, 20, 24, 28 elements, each with its flag; the last layer's is ready first
    assert ranks(starts, 1, False, world_size=2)[0] == [(29, 1), (25, 2), (21, 3), (17, 4)]
    assert ranks(starts, 8 * 50, False, world_size=2)[0] == [(54, 2), (38, 4)]


def test_all_ranks_start_in_one_order_whatever_becomes_ready_first(ranks: Ranks) -> None:
    first, second = ranks(starts, 1, True, world_size=2)
    assert [size for size, _ in first] == [size for size, _ in second] == [29, 25, 21, 17]
    assert [ready for _, ready in second] == [4, 4, 4, 4]  # bucket 0 was complete last there


def unarmed() -> list[int]:
    """In a rank: reductions under way after each micro-batch."""
    axis = axis_of_world()
    module = Odd()
    buckets = GradientBuckets([p for p in module.parameters() if p is not module.never], axis, 1)
    seen = []
    for m in range(3):
        if m == 2:
            buckets.arm()
        module(inputs(axis.index, m)[0], True).backward()
        seen.append(sum(b.work is not None for b in buckets.buckets))
    buckets.finish()
    return seen


def test_nothing_is_reduced_before_the_last_micro_batch(ranks: Ranks) -> None:
    for seen in ranks(unarmed, world_size=2):
        assert seen == [0, 0, 5]


def broadcasted() -> tuple[dict[str, Tensor], int]:
    axis = axis_of_world()
    module = Odd(seed=1 + axis.index)
    with ledger.recording() as sent:
        broadcast_parameters(module, axis)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}, sum(sent.values())


def test_broadcast_gives_all_the_first_ranks_weights(ranks: Ranks) -> None:
    results = ranks(broadcasted, world_size=WORLD)
    want = Odd(seed=1).state_dict()
    for state, _ in results:
        assert set(state) == set(want)
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert [sent for _, sent in results] == [8 * sum(t.numel() for t in want.values()), 0, 0]


def test_tied_module_is_reduced_once(ranks: Ranks) -> None:
    def tied() -> tuple[Tensor, int]:
        axis = axis_of_world()
        one = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.ones_(one.weight)
        two = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        two.weight = one.weight
        buckets = GradientBuckets([*one.parameters(), *two.parameters()], axis)
        buckets.arm()
        with ledger.recording() as sent:
            (one(torch.eye(3, dtype=torch.float64)) + two(torch.eye(3, dtype=torch.float64))).sum().backward()
            buckets.finish()
        assert one.weight.grad is not None
        return one.weight.grad, sum(sent.values())

    for grad, sent in ranks(tied, world_size=2):
        assert torch.equal(grad, torch.full((3, 3), 4.0, dtype=torch.float64))
        assert sent == 8 * 10


def test_rank_without_data_takes_part(ranks: Ranks) -> None:
    def uneven() -> dict[str, Tensor | None]:
        axis = axis_of_world()
        module = Odd()
        buckets = GradientBuckets(module.parameters(), axis, 100)
        buckets.arm()
        if axis.index > 0:
            module(*inputs(axis.index, 0)).backward()
        buckets.finish()
        return grads(module)

    first, *others = ranks(uneven, world_size=WORLD)
    for other in others:
        for name, grad in first.items():
            assert (grad is None) == (other[name] is None), name
            assert grad is None or torch.equal(grad, other[name]), name
    assert first["first.weight"] is not None


def test_frozen_module_needs_no_bucket(ranks: Ranks) -> None:
    def frozen() -> int:
        module = nn.Linear(2, 2).requires_grad_(False)
        buckets = GradientBuckets(module.parameters(), axis_of_world())
        buckets.reset()
        buckets.arm()
        buckets.finish()
        assert buckets.gradient(module.weight) is None
        return len(buckets.buckets)

    assert ranks(frozen, world_size=2) == [0, 0]


def test_buckets_close_once_full() -> None:
    assert bucket([], 4, 100) == []
    assert bucket([1000], 4, 100) == [[0]]
    assert bucket([9, 9, 9, 9], 4, 80) == [[0, 1], [2, 3]]  # (9 + 1 flag) * 4 bytes each
    assert bucket([1, 1, 1000, 1], 4, 100) == [[0, 1, 2], [3]]
    assert bucket([5, 5], 4, 1) == [[0], [1]]
