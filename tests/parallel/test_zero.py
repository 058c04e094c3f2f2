"""ZeRO on any module: the ranks' rows together are the gradients of one device; and what a rank keeps and sends."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picotron_mini import collectives
from picotron_mini.collectives import SymmetricMemory, asynchronous, ledger, operators
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig, TrainConfig, from_dict
from picotron_mini.course.instruments.kept import kept
from picotron_mini.course.instruments.witness import Witness
from picotron_mini.layout import Placement, Shard, split
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh, coordinates
from picotron_mini.model.gpt import parameter_shapes
from picotron_mini.monitoring.placement import held
from picotron_mini.parallel import zero
from picotron_mini.parallel.deferred import Deferred, additions, halves
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.gather import gather
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.parallel.rows import alike, cut
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.parallel.zero import ShardedGradients
from picotron_mini.parallel.zero3 import ShardedWeights
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import compute_gradients, gradients_of, train_step
from picotron_mini.verify import make_batches

Ranks = Callable[..., list[Any]]
WORLD = 3  # two ranks hide bugs
MICRO_BATCHES = 2
LR = 1e-4
MODEL = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2)
TRAIN = TrainConfig(seq_len=8, micro_batch_size=2, micro_batches=3, device="cpu")


def resolved(layout: str, model: ModelConfig = MODEL, **train: object) -> RunConfig:
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **train)))  # type: ignore[arg-type]


# --- where the rows are -----------------------------------------------------------------------------------


def test_a_later_cut_is_inside_an_earlier_one() -> None:
    place = Placement((10, 3), (0,), (Shard("tp", 0, split(10, 2)), Shard("dp", 0, split(5, 2))))
    parts = {(tp, dp): place.slices({"pp": 0, "dp": dp, "cp": 0, "tp": tp})[0] for tp in range(2) for dp in range(2)}
    assert parts == {(0, 0): slice(0, 3), (0, 1): slice(3, 5), (1, 0): slice(5, 8), (1, 1): slice(8, 10)}
    assert place.without("dp").slices({"pp": 0, "dp": 1, "cp": 0, "tp": 1})[0] == slice(5, 10)
    assert place.padded_size("dp", {"pp": 0, "dp": 1, "cp": 0, "tp": 1}) == 9


def test_a_shorter_part_ends_where_it_ends() -> None:
    # 9 over tp=2 is 5 and 4; each over dp=4 as 5 is: 2, 2, 1, 0
    place = Placement((9,), (0,), (Shard("tp", 0, split(9, 2)), Shard("dp", 0, split(5, 4))))
    lengths = [[place.local_size({"pp": 0, "dp": dp, "cp": 0, "tp": tp}) for dp in range(4)] for tp in range(2)]
    assert lengths == [[2, 2, 1, 0], [2, 2, 0, 0]]
    assert {place.padded_size("dp", {"pp": 0, "dp": dp, "cp": 0, "tp": tp}) for dp in range(4) for tp in range(2)} == {
        2
    }


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("layout", ["dp=4,tp=2", "dp=8", "dp=6,tp=2,pp=2"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_element_has_one_owner_a_group(layout: str, tied: bool, group: int) -> None:
    mesh = MeshShape.parse(layout)
    model = replace(MODEL, tie_embeddings=tied, head_dim=4, qk_norm=True)
    groups = mesh.dp // group if group else 1
    for name, place in layout_of(resolved(layout, model, zero=3, zero_group=group)).items():
        assert [shard.axis for shard in place.shards][-1] == "dp"
        held_by, counted = torch.zeros(place.shape), torch.zeros(place.shape)
        for index in (coordinates(mesh, rank) for rank in range(mesh.world_size)):
            if place.holds(index):
                held_by[place.slices(index)] += 1
            if place.counts(index):
                counted[place.slices(index)] += 1
        tensor_parallel = any(shard.axis == "tp" for shard in place.shards)
        assert bool((held_by == groups * len(place.stages) * (1 if tensor_parallel else mesh.tp)).all()), name
        assert bool((counted == 1).all()), f"{name}: the norm would be wrong"


def test_the_report_draws_the_same_rows() -> None:
    mesh = MeshShape(dp=4, tp=2)
    for name, place in layout_of(resolved("dp=4,tp=2", zero=1)).items():
        plain = {
            "stages": place.stages,
            "shape": place.shape,
            "shards": [{"axis": s.axis, "dim": s.dim, "ranges": s.ranges} for s in place.shards],
        }
        for index in (coordinates(mesh, rank) for rank in range(8)):
            mine = [(part.start, part.stop) for part in place.slices(index)]
            assert held(plain, index) == (mine if place.local_size(index) else None), name


def test_a_buffer_holds_rows_and_nothing_else() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.rand(shape)) for shape in ((5, 2), (), (2, 3), (4,), (1, 2, 2))]
    cuts, columns = cut(parameters, 4, {})
    assert [each.rows for each in cuts] == [2, 1, 1, 1, 1]
    assert columns == 4 + 1 + 3 + 1 + 4
    buffer = torch.zeros(4 * columns)
    for each, parameter in zip(cuts, parameters, strict=True):
        table = each.table(buffer, 4)
        each.whole(table).copy_(parameter.detach())
        assert len(each.padding(table)) == 4 * each.columns - parameter.numel()
        owned = torch.zeros(columns)
        rows = []
        for rank, part in enumerate(table.chunk(4)):  # as reduce_scatter and all_gather cut it
            each.row(owned).copy_(part)
            rows.append(each.own(owned, rank).clone())
            assert torch.equal(rows[-1], each.part(parameter, rank))
        assert torch.equal(torch.cat(rows).view_as(parameter), parameter)
        whole = parameter if parameter.ndim else parameter[None]
        wanted = list(whole.chunk(4)) + [whole[:0]] * 4  # as fully_shard has it
        assert [tuple(row.shape) for row in rows] == [tuple(part.shape) for part in wanted[:4]]
    assert int((buffer == 0).sum()) == buffer.numel() - sum(p.numel() for p in parameters)


def test_what_kernels_read_begins_at_multiples_of_128_bytes() -> None:
    shapes = ((64, 3), (96,), (50, 64), (128, 2))  # over three ranks 96 is 32 a rank, which shifts what follows
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    cuts, columns = cut(parameters, 3, {})
    assert columns == sum(each.columns for each in cuts)
    for each in cuts:
        if each.columns % 64 == 0:
            assert each.start % 64 == 0, each.parameter.shape
    assert [each.start % 64 for each in cuts] == [0, 0, 2, 34]  # the lengths 17 64; 22 3; 32; 43 2


# --- settings ---------------------------------------------------------------------------------------------


def test_settings() -> None:
    with pytest.raises(ConfigError, match="zero=2 cuts over dp, and dp=1 has nothing to cut; use dp=2 or more, or ze"):
        resolved("tp=2", zero=2)
    with pytest.raises(ConfigError, match=r"zero=4 must be 0 \(off\), 1, 2 or 3"):
        resolved("dp=2", zero=4)
    with pytest.raises(ConfigError, match="train.zero=7 is not one of 0, 1, 2, 3"):
        from_dict(RunConfig, {"train": {"zero": 7}})
    assert resolved("dp=2", zero=3).train.zero == 3
    with pytest.raises(ConfigError, match="zero_group=2 says how zero cuts, and zero=0 does not"):
        resolved("dp=4", zero_group=2)
    with pytest.raises(ConfigError, match="zero_group=3 does not cut dp=4 into groups of 2 or more; .* be 2 or 4"):
        resolved("dp=4", zero=1, zero_group=3)
    assert resolved("dp=4", zero=1, zero_group=2).train.zero_group == 2


# --- bytes, by hand ---------------------------------------------------------------------------------------

LAYER = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16
EVEN = replace(MODEL, vocab_size=36)


def predicted(layout: str, model: ModelConfig = EVEN, **train: object) -> dict[tuple[str, str], int]:
    run = resolved(layout, model, **train)
    places = layout_of(run)
    return dict(predict_step(run, places, coordinates(run.mesh, 0)))


def test_bytes_where_all_is_even() -> None:
    elements, parameters = 36 * 16 + 2 * LAYER + 16, 1 + 2 * 9 + 1
    scatter, shard = 4 * (elements + 2 * parameters), 4 * elements // 2
    small = {("dp", "all_reduce"): 8, ("world", "all_reduce"): 24}
    assert predicted("dp=2", zero=1) == small | {("dp", "reduce_scatter"): scatter, ("dp", "all_gather"): shard}
    assert predicted("dp=2", zero=2) == small | {("dp", "reduce_scatter"): 3 * scatter, ("dp", "all_gather"): shard}
    twice = 3 * 2 * (shard + 4 * 36 * 16 // 2)  # forward and backward; the tied table at both ends
    assert predicted("dp=2", zero=3) == small | {("dp", "reduce_scatter"): 3 * scatter, ("dp", "all_gather"): twice}


def test_groups_sum_their_rows_once() -> None:
    two, groups = predicted("dp=2", zero=2), predicted("dp=8", zero=2, zero_group=2)
    rows = two["dp", "reduce_scatter"] // 3 // 2
    assert groups == two | {("dp", "all_reduce"): 8 + rows}


def test_padding_counts() -> None:
    even, odd = predicted("dp=2", zero=1), predicted("dp=2", replace(EVEN, vocab_size=35), zero=1)
    assert even == odd  # 35 rows take the room of 36


def test_what_no_gradient_reaches_is_gathered_once() -> None:
    model = replace(EVEN, tie_embeddings=False)
    frozen = ("embed", "layers.0")
    (all_, some) = (predicted("dp=2", model, zero=3, freeze=f)["dp", "all_gather"] for f in ((), frozen))
    assert all_ - some == 3 * 4 * (36 * 16 + LAYER) // 2
    assert predicted("dp=2", model, zero=2, freeze=frozen)["dp", "all_gather"] == 4 * (36 * 16 + LAYER + 16) // 2


# --- any module -------------------------------------------------------------------------------------------


class Part(nn.Module):
    """Everything that a module may do with its parameters: frozen, unused, sometimes used, a scalar, two dtypes."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, 7, dtype=torch.float64)
        self.second = nn.Linear(7, width, bias=False, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.rand(width, dtype=torch.float64), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.rand(width, dtype=torch.float32))
        self.sometimes = nn.Parameter(torch.rand(width, dtype=torch.float64))
        self.never = nn.Parameter(torch.rand(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor, *, used: bool) -> tuple[Tensor, Tensor]:
        y = self.second(torch.tanh(self.first(x))) * self.scale + self.frozen + self.narrow
        y = y * self.sometimes if used else y
        return x + y, y.sum()


class Odd(nn.Module):
    """A table that is used at both ends, three parts and a frozen one below them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(11, 5, dtype=torch.float64)
        self.still = nn.Linear(5, 5, dtype=torch.float64).requires_grad_(False)
        self.parts = nn.ModuleList([Part() for _ in range(3)])
        self.head = nn.Linear(5, 11, bias=False, dtype=torch.float64)
        self.head.weight = self.table.weight

    def units(self) -> list[nn.Module]:
        return [self.table, self.still, *self.parts, self.head]

    def forward(self, tokens: Tensor, used: bool) -> Tensor:
        x = self.still(self.table(tokens))
        extra = x.new_zeros(())
        for part in self.parts:
            x, more = part(x, used=used)
            extra = extra + more
        return self.head(x).square().sum() + extra


def inputs(rank: int, micro_batch: int) -> tuple[Tensor, bool]:
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randint(11, (4,), generator=generator), (rank, micro_batch) == (1, 0)


def truth() -> dict[str, Tensor]:
    module = Odd()
    torch.stack([module(*inputs(r, m)) for r in range(WORLD) for m in range(MICRO_BATCHES)]).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def axis_of_world() -> Axis:
    return Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))["dp"]


def make(
    stage: int, module: Odd, axis: Axis, bucket_bytes: float = 300, symmetric: bool = False
) -> ShardedGradients | ShardedWeights:
    memory = SymmetricMemory(axis, torch.device("cpu")) if symmetric else None
    if stage == 3:
        return ShardedWeights(module.units(), axis, memories={axis: memory} if memory else {})
    when = "last" if stage == 1 else "each"
    return ShardedGradients(alike(module.parameters()), axis, start=when, bucket_bytes=bucket_bytes, memory=memory)


def run_step(module: Odd, sharded: ShardedGradients | ShardedWeights, axis: Axis) -> None:
    sharded.reset()
    for m in range(MICRO_BATCHES):
        if m == MICRO_BATCHES - 1:
            sharded.arm()
        module(*inputs(axis.index, m)).backward()
        sharded.after_backward()
    sharded.finish()


def rows_of_gradients(stage: int, steps: int, symmetric: bool) -> tuple[dict[str, Tensor | None], bool]:
    axis = axis_of_world()
    module = Odd()
    sharded = make(stage, module, axis, symmetric=symmetric)
    for _ in range(steps):
        run_step(module, sharded, axis)
    left = any(p.grad is not None for p in module.parameters())
    return {name: sharded.gradient(p) for name, p in module.named_parameters()}, left


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_ranks_rows_are_the_gradients_of_one_device(ranks: Ranks, stage: int, steps: int, symmetric: bool) -> None:
    want = truth()
    results = ranks(rows_of_gradients, stage, steps, symmetric, world_size=WORLD)
    assert not any(left for _, left in results), "p.grad is not kept beside the rows"
    for name in results[0][0]:
        rows = [mine[name] for mine, _ in results]
        if name not in want:
            assert rows == [None] * WORLD, f"{name}: what no rank used must not have zeros"
        else:
            assert name != "table.weight" or [len(part) for part in rows] == [4, 4, 3]
            whole = torch.cat(rows).view_as(want[name])
            close = 1e-12 if want[name].dtype == torch.float64 else 1e-5
            torch.testing.assert_close(whole, want[name], rtol=close, atol=close, msg=name)


def trained(stage: int, symmetric: bool) -> dict[str, Tensor]:
    """In a rank: the whole weights after three steps of SGD on the rows."""
    axis = axis_of_world()
    module = Odd()
    sharded = make(stage, module, axis, symmetric=symmetric)
    for _ in range(3):
        run_step(module, sharded, axis)
        for parameter in module.parameters():
            gradient = sharded.gradient(parameter)
            if gradient is not None:
                sharded.own(parameter).sub_(gradient.to(parameter.dtype), alpha=LR)
        sharded.publish({p: sharded.own(p) for p in module.parameters()})
    if isinstance(sharded, ShardedWeights):
        assert all(p.untyped_storage().nbytes() == 0 for p in module.parameters()), "a freed weight has no storage"
        with sharded.whole():
            return {name: p.detach().clone() for name, p in module.named_parameters()}
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_have_the_updated_weights(ranks: Ranks, stage: int, symmetric: bool) -> None:
    module = Odd()
    for _ in range(3):
        module.zero_grad()
        torch.stack([module(*inputs(r, m)) for r in range(WORLD) for m in range(MICRO_BATCHES)]).sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=LR)
    for state in ranks(trained, stage, symmetric, world_size=WORLD):
        for name, want in module.named_parameters():
            # the one float32 weight is rounded, and all others feel it in the next step
            torch.testing.assert_close(state[name], want.detach(), rtol=1e-6, atol=1e-6, msg=name)


def without_gradients() -> tuple[float, list[int], bool]:
    """In a rank: a forward for validation, and what is left behind."""
    axis = axis_of_world()
    module, plain = Odd(), Odd()
    sharded = ShardedWeights(module.units(), axis)
    with torch.no_grad(), ledger.recording() as sent:
        got = module(*inputs(0, 0))
    with torch.no_grad():
        want = plain(*inputs(0, 0))
    assert got.item() == want.item()
    once = sum(len(row) * row.element_size() for unit in sharded.units for _, row in unit.buffers)
    return float(got), [p.untyped_storage().nbytes() for p in module.parameters()], sent["dp", "all_gather"] == once


def test_validation_gathers_once(ranks: Ranks) -> None:
    for _, storages, once in ranks(without_gradients, world_size=2):
        assert set(storages) == {0} and once


def read_and_written(late: str) -> list[float]:
    """In a rank: a weight as it was put together before and after an update; rank 1 reads late, or writes late."""
    axis = axis_of_world()
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data.fill_(1)
    sharded = ShardedWeights([layer], axis, memories={axis: SymmetricMemory(axis, torch.device("cpu"))})
    seen = []
    for value in (2.0, 3.0):
        with sharded.whole():
            seen += layer.weight.flatten().tolist()
            if axis.index == 1 and late == "read":
                time.sleep(0.5)
        with sharded.whole():
            seen += layer.weight.flatten().tolist()
        sharded.reset()
        sharded.finish()
        if axis.index == 1 and late == "write":
            time.sleep(0.5)
        sharded._own[layer.weight].fill_(value)
    return seen


@pytest.mark.parametrize("late", ["read", "write"])
def test_in_symmetric_memory_nobody_reads_too_early_or_writes_too_soon(ranks: Ranks, late: str) -> None:
    assert ranks(read_and_written, late, world_size=2) == [[1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]] * 2


# --- what happens when ------------------------------------------------------------------------------------


def events(bucket_bytes: float, stage: int) -> list[list[int]]:
    """In a rank: for each micro-batch, how many gradients were ready when each reduction started."""
    axis = axis_of_world()
    layers = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    ready = 0
    seen: list[list[int]] = []
    real = zero.reduce_scatter_several

    def watched(outs: list[Tensor], xs: list[Tensor], over: Axis) -> Any:
        seen[-1].append(ready)
        return real(outs, xs, over)

    def count(_: Tensor) -> None:
        nonlocal ready
        ready += 1

    zero.reduce_scatter_several = watched
    for parameter in layers.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    when = "last" if stage == 1 else "each"
    gradients = ShardedGradients(alike(layers.parameters()), axis, start=when, bucket_bytes=bucket_bytes)
    for m in range(2):
        ready = 0
        seen.append([])
        if m == 1:
            gradients.arm()
        layers(torch.ones(1, 4)).sum().backward()
        gradients.after_backward()
    gradients.finish()
    return seen


def test_zero_1_reduces_in_the_last_backward_and_zero_2_in_each(ranks: Ranks) -> None:
    assert ranks(events, 1, 1, world_size=2)[0] == [[], [1, 2, 3, 4]]
    assert ranks(events, 1, 2, world_size=2)[0] == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert ranks(events, 4 * 30, 2, world_size=2)[0] == [[2, 4], [2, 4]]


def story(chunks: list[int] | None = None, late: bool = False) -> tuple[list[str], int]:
    """In a rank: what happens around a stack of layers, and the most layers whose weights were here at once.

    Args:
        chunks: of layers, called one after another.
        late: whether weight gradients come after the backward.
    """
    from picotron_mini.parallel import zero3

    axis = axis_of_world()
    layers = [nn.Linear(3 + n, 4 + n, bias=False) for n in range(4)]
    names = {2 * ((4 + n) // 2 + (4 + n) % 2) * (3 + n): f"{n}" for n in range(4)}  # by the buffer's size
    told: list[str] = []
    most = 0
    gathers, reductions = zero3.all_gather_several, zero.reduce_scatter_several

    def gather_(outs: list[Tensor], xs: list[Tensor], over: Axis) -> Any:
        told.append(f"gather {names[outs[0].numel()]}")
        return gathers(outs, xs, over)

    def reduce_(outs: list[Tensor], xs: list[Tensor], over: Axis) -> Any:
        told.append(f"reduce {names[xs[0].numel()]}")
        return reductions(outs, xs, over)

    zero3.all_gather_several, zero.reduce_scatter_several = gather_, reduce_
    for n, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, n=n: told.append(f"forward {n}"))
        layer.weight.register_post_accumulate_grad_hook(lambda _, n=n: told.append(f"backward {n}"))

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            most = max(most, sum(layer.weight.untyped_storage().nbytes() > 0 for layer in layers))
            return func(*args, **(kwargs or {}))

    deferred = Deferred(layers) if late else None
    sharded = ShardedWeights(layers, axis, chunks=chunks, counted=late)
    sharded.arm({layer.weight: 1 for layer in layers} if late else None)
    x = torch.ones(2, 3)
    with Look():
        for layer in layers:
            x = layer(x)
        with nullcontext([]) if deferred is None else deferred.collecting() as products:
            x.sum().backward()
        sharded.after_backward()
        for product in products:
            told.append("later")
            product.run()
        sharded.finish()
    return told, most


def test_the_next_units_weights_travel_while_one_computes(ranks: Ranks) -> None:
    told, most = ranks(story, world_size=2)[0]
    assert told == [
        "gather 0", "gather 1", "forward 0", "gather 2", "forward 1", "gather 3", "forward 2", "forward 3",
        "gather 3", "gather 2", "backward 3", "reduce 3", "gather 1", "backward 2", "reduce 2", "gather 0",
        "backward 1", "reduce 1", "backward 0", "reduce 0",
    ]  # fmt: skip
    assert most == 2, "the layer that computes, and the one whose weights travel"


def test_nothing_travels_ahead_for_another_chunk(ranks: Ranks) -> None:
    """Between two chunks of a stage others compute, and weights that came too early would wait here."""
    told, _ = ranks(story, [2, 2], world_size=2)[0]
    assert told == [
        "gather 0", "gather 1", "forward 0", "forward 1", "gather 2", "gather 3", "forward 2", "forward 3",
        "gather 3", "gather 2", "backward 3", "reduce 3", "backward 2", "reduce 2", "gather 1", "gather 0",
        "backward 1", "reduce 1", "backward 0", "reduce 0",
    ]  # fmt: skip


def test_late_weight_gradients_are_reduced_when_they_are_there_and_need_no_weights(ranks: Ranks) -> None:
    told, _ = ranks(story, None, True, world_size=2)[0]
    assert told[8:] == [
        "gather 3", "gather 2", "gather 1", "gather 0",
        *(word for n in (3, 2, 1, 0) for word in ("later", f"backward {n}", f"reduce {n}")),
    ]  # fmt: skip


def between_halves(stage: int) -> tuple[list[int], float]:
    """In a rank: how many buckets hold whole gradients after I0, I1, W0 and W1; and the error of all sums."""
    torch.manual_seed(0)
    plain = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)]
    torch.manual_seed(0)
    units = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)]
    batches = [torch.rand(2, 4), torch.rand(2, 4)]
    deferred = Deferred(units)
    sharded: ShardedWeights | ShardedGradients
    if stage == 3:
        sharded = ShardedWeights(units, axis_of_world(), counted=True)
        (reducer,) = sharded.gradients.reducers
    else:
        groups = alike((p for unit in units for p in unit.parameters()), halves(units))
        sharded = reducer = ShardedGradients(groups, axis_of_world(), start="each")
    sharded.arm(sum((additions(unit, True) for unit in units), Counter()))
    held, waiting = [], []

    def through(layers: list[nn.Sequential], x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x.square().sum()

    def note() -> None:
        held.append(sum(bucket.whole is not None for bucket in reducer.buckets))

    for batch in batches:
        with deferred.collecting() as products:
            through(units, batch).backward()
        sharded.after_backward()
        waiting.append(products)
        note()
    for products in waiting:
        for product in products:
            product.run()
        note()
    sharded.finish()
    sum(through(plain, batch) for batch in batches).backward()
    wanted = [2 * p.grad for layer in plain for p in layer.parameters()]  # both ranks have the same batches
    rows = [sharded.gradient(p) for unit in units for p in unit.parameters()]
    index = torch.distributed.get_rank()
    errors = [(mine - whole.chunk(2)[index]).abs().max() for mine, whole in zip(rows, wanted, strict=True)]
    return held, float(max(errors))


@pytest.mark.parametrize("stage", [2, 3])
def test_no_whole_gradient_is_kept_between_the_halves_of_a_backward(ranks: Ranks, stage: int) -> None:
    """Two backwards may begin before the first weight gradient is made: norms and matrices are counted apart."""
    for whole, error in ranks(between_halves, stage, world_size=2):
        assert whole == [0, 0, 0, 0] and error < 1e-5


def in_one_bucket(schedule: str) -> list[set[str]]:
    """In a rank, under ZeRO 2: of each bucket, in which halves of a backward its gradients come; the head is tied."""
    model = ModelConfig(vocab_size=8, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2)
    train = TrainConfig(zero=2, schedule=schedule, micro_batches=2, device="cpu")  # type: ignore[arg-type]
    run = resolve(RunConfig(layout="dp=2", model=model, train=train))
    parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
    found = halves(parallel.chunks)
    assert isinstance(parallel.gradients, ShardedGradients)
    return [{found[each.parameter] for each in bucket.cuts} for bucket in parallel.gradients.buckets]


def test_buckets_of_zero_2_mix_no_halves_of_a_backward(ranks: Ranks) -> None:
    split = ranks(in_one_bucket, "zb-h1", world_size=2)[0]
    assert sorted(kind for (kind,) in split) == ["both", "first", "second"]
    assert ranks(in_one_bucket, "1f1b", world_size=2)[0] == [{"both", "first", "second"}]


def reductions_at_once(stage: int, micro_batches: int) -> tuple[int, int]:
    """In a rank: the most reductions that were under way at once, and the number of buckets."""
    layers = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    sharded = ShardedWeights(list(layers), axis_of_world()) if stage == 3 else None
    gradients = ShardedGradients(alike(layers.parameters()), axis_of_world(), start="each", bucket_bytes=1)
    if sharded is not None:
        (gradients,) = sharded.gradients.reducers
    most, real = 0, zero.reduce_scatter_several

    def watched(outs: list[Tensor], xs: list[Tensor], over: Axis) -> Any:
        nonlocal most
        most = max(most, 1 + len(gradients._under_way))
        return real(outs, xs, over)

    zero.reduce_scatter_several = watched
    for _ in range(micro_batches):
        layers(torch.ones(1, 4)).sum().backward()
        (sharded or gradients).after_backward()
    (sharded or gradients).finish()
    return most, len(gradients.buckets)


@pytest.mark.parametrize("stage", [2, 3])
def test_of_several_micro_batches_only_one_is_under_way(ranks: Ranks, stage: int) -> None:
    """Else a small model would keep the gradients of all its micro-batches, which is what ZeRO 2 is to spare."""
    for most, buckets in ranks(reductions_at_once, stage, 3, world_size=2):
        assert most == buckets == 4


def recomputed(around: bool) -> list[Tensor | None]:
    """In a rank: gradients where the forward runs again in the backward, inside the unit or around it."""
    import functools

    from torch.utils.checkpoint import checkpoint

    axis = axis_of_world()
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double() for _ in range(3)])
    if not around:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    sharded = ShardedWeights(list(layers), axis)
    x = torch.linspace(0, 1, 8, dtype=torch.float64).view(2, 4) + axis.index
    with ledger.recording() as sent:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if around else layer(x)
        x.square().sum().backward()
        sharded.after_backward()
        sharded.finish()
    kept = sum(len(row) * row.element_size() for unit in sharded.units for _, row in unit.buffers)
    assert sent["dp", "all_gather"] == 2 * kept, "computing again needs no weights again"
    assert all(p.untyped_storage().nbytes() == 0 for p in layers.parameters())
    return [sharded.gradient(p) for p in layers.parameters()]


def test_recomputing_stays_possible(ranks: Ranks) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double() for _ in range(3)])
    for rank in range(2):
        layers(torch.linspace(0, 1, 8, dtype=torch.float64).view(2, 4) + rank).square().sum().backward()
    for around in (False, True):
        results = ranks(recomputed, around, world_size=2)
        for n, parameter in enumerate(layers.parameters()):
            torch.testing.assert_close(torch.cat([mine[n] for mine in results]), parameter.grad, rtol=1e-12, atol=1e-12)


class Writes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is written into gradient buffers: (operator, in one piece and at an address of 16 bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[tuple[str, bool]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        # gradients come in bf16, and are added up in float32
        if name in ("add_", "copy_", "_foreach_copy_"):
            for both in zip(*(x if isinstance(x, list) else [x] for x in args[:2]), strict=True):
                if [x.dtype for x in both] == [torch.float32, torch.bfloat16]:
                    # a norm that the ranks do not divide may shift the next one
                    straight = all(x.is_contiguous() and (x.ndim < 2 or x.data_ptr() % 16 == 0) for x in both)
                    self.found[name, straight] += 1
        return func(*args, **(kwargs or {}))


def writes(zero_stages: Sequence[int]) -> list[Counter[tuple[str, bool]]]:
    """In a rank: what one step of two micro-batches writes into the buffers of each stage."""
    model = ModelConfig(vocab_size=67, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, head_dim=16)
    out = []
    for stage in zero_stages:
        run = resolved("dp=3", model, zero=stage, dtype="bfloat16", micro_batches=2, steps=2)
        parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
        batches = make_batches(run)[:2]
        with Writes() as seen:
            compute_gradients(parallel, batches)
        out.append(seen.found)
    return out


def test_gradients_are_added_in_one_piece_at_aligned_addresses(ranks: Ranks) -> None:
    """Each once, and by no other kernels than plain data parallelism uses."""
    parameters = len(parameter_shapes(resolved("dp=1").model))
    plain, one, two, three = ranks(writes, [0, 1, 2, 3], world_size=WORLD)[0]
    assert plain == one == {("_foreach_copy_", True): parameters, ("add_", True): parameters}
    assert two == three == {("_foreach_copy_", True): 2 * parameters}


def compiled(stage: int, recompute: str) -> tuple[Any, Any, int]:
    """In a rank: gradients of a deep model, eager and compiled, and into how many graphs it was compiled."""
    import functools

    from torch._dynamo.utils import counters

    warnings.simplefilter("ignore")  # the compiler makes some of its own
    # traces forward and backward as inductor would, and needs no C++ compiler
    real, torch.compile = torch.compile, functools.partial(torch.compile, backend="aot_eager")
    found = []
    for compile_ in (False, True):
        model = replace(MODEL, num_layers=12, vocab_size=36)  # dynamo compiles a function for 8 classes at most
        run = resolved("dp=2", model, zero=stage, compile=compile_, dtype="float64", recompute=recompute, steps=2)
        parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
        optimizer = make_optimizer(parallel.trained, run.train)
        for batch in make_batches(run)[:2]:
            train_step(parallel, optimizer, [batch] * 3)
        found.append((gradients_of(parallel), dict(parallel.masters)))
    torch.compile = real
    return found[0], found[1], counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "graphs"), [("none", 3), ("full", 4)])
def test_all_layers_share_one_compiled_graph(ranks: Ranks, recompute: str, graphs: int) -> None:
    """One for a layer, the last norm and the loss each; with recompute one more, of a layer that keeps nothing."""
    for eager, fast, number in ranks(compiled, 3, recompute, world_size=2):
        for before, after in zip(eager, fast, strict=True):
            assert before.keys() == after.keys() and len(before) > 100
            for name, want in before.items():
                torch.testing.assert_close(after[name], want, rtol=1e-9, atol=1e-12, msg=name)
        assert number == graphs


# --- as PyTorch has it ------------------------------------------------------------------------------------


def beside_fully_shard() -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """In a rank: (name, our rows and theirs, our gradient and theirs) after two steps of SGD."""
    import warnings

    axis = axis_of_world()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports inside torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        def stack() -> nn.Sequential:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()

        ours, theirs = stack(), stack()
        sharded = ShardedWeights([ours[0], ours[2], ours[4]], axis)
        mesh = init_device_mesh("cpu", (axis.size,))
        for layer in (theirs[0], theirs[2], theirs[4], theirs):
            fully_shard(layer, mesh=mesh)
        for step in range(2):
            x = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4) + axis.index + step
            sharded.reset()
            ours(x).square().sum().backward()
            sharded.after_backward()
            sharded.finish()
            theirs.zero_grad()
            theirs(x).square().sum().backward()
            out = []
            for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                gradient, average = sharded.gradient(mine), other.grad.to_local() * axis.size  # it divides by the ranks
                with torch.no_grad():
                    sharded.own(mine).sub_(gradient, alpha=LR)
                    other.to_local().sub_(average, alpha=LR)
                out.append((name, sharded.own(mine), other.to_local().detach(), gradient, average))
    return out


def test_same_as_torchs_own_fully_shard(ranks: Ranks) -> None:
    for result in ranks(beside_fully_shard, world_size=WORLD):
        assert len(result) == 6
        for name, weight, their_weight, gradient, their_gradient in result:
            assert weight.shape == their_weight.shape, name
            torch.testing.assert_close(gradient, their_gradient, rtol=1e-12, atol=1e-12, msg=name)
            torch.testing.assert_close(weight, their_weight, rtol=1e-12, atol=1e-12, msg=name)


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "group"), [("dp=2,tp=2", 0), ("dp=4", 2)])
def test_a_rank_keeps_what_was_predicted(ranks: Ranks, layout: str, group: int) -> None:
    runs = [
        resolved(
            layout, zero=stage, zero_group=group, dtype=dtype, optimizer=kind, freeze=freeze, masters=masters, steps=2
        )
        for stage in range(1 if group else 0, 4)
        for dtype, kind, freeze, masters in (
            ("bfloat16", "adamw", ("layers.1",), "whole"),
            ("bfloat16", "adamw", ("layers.1",), "split"),
            ("float64", "sgd", ("embed",), "whole"),
        )
    ]
    for rank, results in enumerate(ranks(kept, runs, world_size=runs[0].mesh.world_size)):
        for run, (weights, total) in zip(runs, results, strict=True):
            places = layout_of(run)
            want = footprint(run, places, coordinates(run.mesh, rank))
            assert (weights, total) == (want.weights + want.masters, want.total), f"rank {rank}: {run.train}"


def most_at_once(micro_batches: int) -> tuple[int, int, list[int]]:
    """In a rank: the most bytes of whole weights and of gradients on their way that six equal layers ever have here,
    and of these gradients what is there when each layer begins a later forward."""
    zero.UNDER_WAY = 1  # in a model of real size two layers exceed what may be under way
    axis = axis_of_world()
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(6)])
    sharded = ShardedWeights(list(layers), axis)
    (gradients,) = sharded.gradients.reducers
    weights, sums, later = 0, 0, []

    def travelling() -> int:
        tensors = [bucket.whole for bucket in gradients.buckets]
        for bucket, whole, total, _ in gradients._under_way:
            tensors += [whole, total if total is not bucket.shard else None]
        return sum(x.nbytes for x in tensors if x is not None)

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal weights, sums
            weights = max(weights, sum(layer.weight.untyped_storage().nbytes() for layer in layers))
            sums = max(sums, travelling())
            return func(*args, **(kwargs or {}))

    for layer in layers:
        layer.register_forward_hook(lambda *_: later.append(travelling()))
    with Look():
        for _ in range(micro_batches):
            later.clear()
            layers(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
            sharded.after_backward()
        sharded.finish()
    return weights, sums, later


def test_two_layers_weights_and_two_layers_gradients_at_most(ranks: Ranks) -> None:
    layer = 8 * 8
    weights, sums, later = ranks(most_at_once, 3, world_size=2)[0]
    assert weights == 2 * 2 * layer  # one computes, one travels; there is no second copy of either
    whole = 4 * (layer + 2)  # with a flag from each rank
    assert sums == 2 * whole + whole // 2  # one is filled, one travels, and its sum arrives
    assert later[:3] == [whole + whole // 2] * 3 and later[3:] == [0, 0, 0]  # nothing is there beside the logits


def test_what_sharding_saves() -> None:
    """The table of the module's docstring: bf16 weights, AdamW, many ranks."""
    model = ModelConfig(vocab_size=8000, hidden_size=512, intermediate_size=1536, num_layers=4, num_heads=8)
    elements = sum(torch.Size(shape).numel() for shape in parameter_shapes(resolved("dp=1", model).model).values())
    a_parameter = []
    for stage in range(4):
        run = resolved("dp=64", model, zero=stage, dtype="bfloat16")
        kept = footprint(run, layout_of(run), coordinates(run.mesh, 0))
        a_parameter.append(round(kept.total / elements, 2))
    assert a_parameter == [18.0, 6 + 16 / 64, 2 + 16 / 64, round(18 / 64, 2)]


# --- whole again, and the collectives ---------------------------------------------------------------------


def gathered(layout: str, group: int) -> dict[str, Tensor]:
    mesh = Mesh.build(MeshShape.parse(layout))
    run = resolved(layout, replace(MODEL, num_heads=2, head_dim=4), zero=3, zero_group=group)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    found = {
        name: gather(parallel.masters.get(name), place, mesh, torch.float32, torch.device("cpu"))
        for name, place in parallel.layout.items()
    }
    return {name: whole for name, whole in found.items() if whole is not None}


@pytest.mark.parametrize(("layout", "group"), [("dp=4,tp=2", 0), ("dp=2,tp=2,pp=2", 0), ("dp=4,tp=2", 2)])
def test_whole_weights_are_those_of_one_device(ranks: Ranks, layout: str, group: int) -> None:
    from picotron_mini.model.gpt import initial_weight

    config = resolved("dp=1", replace(MODEL, num_heads=2, head_dim=4)).model
    first, *others = ranks(gathered, layout, group, world_size=8)
    assert not any(others)
    for name, shape in parameter_shapes(config).items():
        assert torch.equal(first[name], initial_weight(config, name, shape, 0)), name


def halved() -> tuple[list[tuple[int, int, tuple[int, ...]]], float, float]:
    mesh = Mesh.build(MeshShape(dp=4, tp=2))
    inside, across = mesh.halves("dp", 2)
    mine = torch.tensor([10.0**mesh.rank])
    sums = [collectives.all_reduce(mine, axis).item() for axis in (inside, across)]
    return [(axis.size, axis.index, axis.ranks) for axis in (inside, across)], sums[0], sums[1]


def test_halves_of_an_axis(ranks: Ranks) -> None:
    results = ranks(halved, world_size=8)
    assert results[5] == ([(2, 0, (5, 7)), (2, 1, (1, 5))], 1e5 + 1e7, 1e1 + 1e5)
    assert results[2] == ([(2, 1, (0, 2)), (2, 0, (2, 6))], 1e0 + 1e2, 1e2 + 1e6)


def started_and_waited_for(break_it: str = "") -> tuple[dict[Any, int], dict[str, int]]:
    """In a rank: the collectives against what one process computes, and who counted what."""
    axis = axis_of_world()
    if break_it == "gather":
        real = operators.torch_all_gather
        operators.torch_all_gather = lambda out, x, **options: real(out, x.flip(0), **options)
    if break_it == "scatter":
        real = operators.torch_reduce_scatter
        operators.torch_reduce_scatter = lambda out, x, **options: real(out, x.roll(len(out)), **options)
    if break_it.endswith("_several"):
        spread = asynchronous._Spread.wait
        left_out = axis.size if break_it == "gather_several" else 1  # the rows of what is not filled
        asynchronous._Spread.wait = lambda self: None if len(self.whole) == left_out else spread(self)
    for coalesced in ("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"):
        setattr(torch.distributed.ProcessGroup, coalesced, None)  # gloo's corrupts the heap
    every = [torch.arange(4.0 * axis.size).view(axis.size, 4) + 100 * rank for rank in range(axis.size)]
    flat = [torch.arange(2.0 * axis.size) - rank for rank in range(axis.size)]
    whole, part = torch.empty(axis.size, 3), torch.empty(4)
    wholes, parts = [torch.empty(axis.size, 3), torch.empty(axis.size)], [torch.empty(4), torch.empty(2)]
    with ledger.recording() as counted, Witness() as witness:
        mine = every[axis.index]
        works = [
            collectives.all_gather_async(whole, mine[0, :3].contiguous(), axis),
            collectives.reduce_scatter_async(part, mine, axis),
            collectives.all_gather_several(wholes, [mine[0, :3].contiguous(), mine[1 % axis.size, 1:2]], axis),
            collectives.reduce_scatter_several(parts, [mine, flat[axis.index]], axis),
        ]
        for work in works:
            work.wait()
    rows, total = torch.stack([x[0, :3] for x in every]), torch.stack(every).sum(0)[axis.index]
    assert torch.equal(whole, rows), "all_gather_async"
    assert torch.equal(part, total), "reduce_scatter_async"
    ones = torch.stack([x[1 % axis.size, 1] for x in every])
    assert torch.equal(wholes[0], rows) and torch.equal(wholes[1], ones), "all_gather_several"
    two = torch.stack(flat).sum(0).view(axis.size, 2)[axis.index]
    assert torch.equal(parts[0], total) and torch.equal(parts[1], two), "reduce_scatter_several"
    return dict(counted), dict(witness.bytes)


def test_asynchronous_collectives(ranks: Ranks) -> None:
    gathered, scattered = 2 * 12 + 4, (2 * 4 + 2) * 4 * WORLD
    for counted, seen in ranks(started_and_waited_for, world_size=WORLD):
        assert counted == {("dp", "all_gather"): gathered, ("dp", "reduce_scatter"): scattered}
        assert seen == {"all_gather": gathered, "reduce_scatter": scattered}
    assert ranks(started_and_waited_for, world_size=1) == [({}, {})]


@pytest.mark.parametrize("which", ["gather", "scatter", "gather_several", "scatter_several"])
def test_broken_ones_are_noticed(ranks: Ranks, which: str) -> None:
    from picotron_mini.launch import RankError

    with pytest.raises(RankError, match=f"AssertionError: .*{which}"):
        ranks(started_and_waited_for, which, world_size=2)
