"""Float32 masters in two halves: exact, rounded to the nearest, and the same training as with whole masters."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.legality import resolve
from picotron_mini.memory.masters import SplitMasters, cut, join, parts
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.parallelize import Parallel, parallelize
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step
from picotron_mini.verify import make_batches, verify

MODEL = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2)


def halves(master: Tensor) -> tuple[Tensor, Tensor]:
    weight, rest = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    cut(master, weight, rest)
    return weight, rest


def patterns() -> Tensor:
    """All upper halves with the lower halves where rounding could go wrong, and some at random, as float32."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *torch.randint(0, 2**16, (4,)).tolist()])
    upper = torch.arange(-(2**15), 2**15)
    return ((upper[:, None] << 16) + lower).flatten().to(torch.int32).view(torch.float32)


def test_every_float32_comes_back_bit_for_bit():
    master = patterns()
    again = torch.empty_like(master)
    join(again, *halves(master))
    finite = ~master.isnan()
    assert torch.equal(again.view(torch.int32)[finite], master.view(torch.int32)[finite])
    assert again[~finite].isnan().all()


def test_the_weight_is_the_nearest_bf16_and_ties_go_away_from_zero():
    master = patterns()
    weight, _ = halves(master)
    torchs = master.to(torch.bfloat16)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    known = ~master.isnan()
    assert torch.equal(weight[known & ~tie], torchs[known & ~tie])
    assert weight[~known & ~tie].float().isfinite().sum() == 0, "a NaN never becomes a number"
    some = torch.tensor([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8])  # between two bf16 neighbours each
    assert halves(some)[0].tolist() == [1 + 2**-7, -(1 + 2**-7), 1 + 2 * 2**-7]
    assert some.to(torch.bfloat16).tolist() == [1.0, -1.0, 1 + 2 * 2**-7]


def test_cudas_nan_stays_one():
    weight, _ = halves(torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32))
    assert weight.isnan().all()


def test_parts_are_in_order_and_bounded():
    sizes = {"a": 5, "b": 3, "c": 20, "d": 1, "e": 8}
    assert parts(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [name for part in parts(sizes, 9) for name in part] == list(sizes)


def parallel_of(masters: str, **settings: object) -> Parallel:
    train = TrainConfig(
        seq_len=8, micro_batch_size=2, lr=0.01, dtype="bfloat16", device="cpu", masters=masters, **settings
    )  # type: ignore[arg-type]
    return parallelize(resolve(RunConfig("dp=1", model=MODEL, train=train)), Mesh(MeshShape(), 0), torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_with_halves_is_training_with_whole_masters(optimizer, monkeypatch):
    monkeypatch.setattr("picotron_mini.training.step.parts", lambda sizes: parts(sizes, 500))
    whole, split = (parallel_of(kind, optimizer=optimizer, freeze=("layers.0",)) for kind in ("whole", "split"))
    assert isinstance(split.masters, SplitMasters)
    run = replace(whole.run, train=replace(whole.run.train, steps=4))
    optimizers = [make_optimizer(p.trained, run.train) for p in (whole, split)]
    for batch in make_batches(run):
        losses = [train_step(p, o, [batch]).loss for p, o in zip((whole, split), optimizers, strict=True)]
        assert losses[0] == losses[1]
        for name, master in whole.masters.items():
            assert torch.equal(split.masters[name], master), name
        assert all(held.untyped_storage().nbytes() == 0 for held in split.masters.held.values())


@pytest.mark.parametrize(("masters", "each"), [("whole", 18), ("split", 16), ("none", 10)])
def test_the_bytes_of_a_parameter(masters, each):
    parallel = parallel_of(masters)
    optimizer = make_optimizer(parallel.trained, parallel.run.train)
    train_step(parallel, optimizer, [make_batches(parallel.run)[0]])
    kept = [*parallel.parameters.values(), *(b.buffer for b in parallel.gradients.buckets)]
    if isinstance(parallel.masters, SplitMasters):
        kept += [*parallel.masters.rests.values(), *parallel.masters.held.values()]
    else:
        kept += parallel.masters.values()
    kept += [tensor for state in optimizer.state.values() for tensor in state.values()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    count, elements = len(parallel.parameters), sum(p.numel() for p in parallel.parameters.values())
    assert sum(storages.values()) == each * elements + 8 * count  # a flag and a step counter for each
    assert footprint(parallel.run, parallel.layout, parallel.index).total == each * elements + 8 * count


def test_without_masters_small_updates_are_lost():
    lost = {}
    for masters in ("split", "none"):
        parallel = parallel_of(masters, optimizer="sgd", weight_decay=0.0)
        optimizer = make_optimizer(parallel.trained, replace(parallel.run.train, lr=1e-4))
        before = {name: master.clone() for name, master in parallel.masters.items()}
        train_step(parallel, optimizer, [make_batches(parallel.run)[0]])
        matrices = [name for name, master in before.items() if master.ndim > 1]
        moved = [(parallel.masters[name] != before[name]).float().mean().item() for name in matrices]
        lost[masters] = 1 - sum(moved) / len(moved)
    assert lost["split"] < 0.5 < 0.9 < lost["none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masters", "zero", "layout"),
    [("split", 0, "dp=2,tp=2"), ("none", 0, "dp=2,tp=2"), ("split", 1, "dp=2,tp=2"), ("split", 3, "dp=3"),
     ("none", 2, "dp=2"), ("none", 3, "dp=2,pp=2")],
)  # fmt: skip
def test_it_goes_with_every_axis(masters, zero, layout):
    train = TrainConfig(
        steps=2, seq_len=8, micro_batch_size=1, micro_batches=2, lr=0.01, clip_norm=0.5, dtype="bfloat16", device="cpu",
        warmup_steps=0, masters=masters, bucket_mb=0.01, zero=zero,
    )  # fmt: skip
    report = verify(layout, MODEL, train, optimizers=["adamw"])
    assert report.ok, report.to_dict()
    assert math.isfinite(report.max_rel_err)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masters": "split"}, "masters=split is for dtype=bfloat16; float32 weights are their own masters"),
        (
            {"masters": "none", "dtype": "bfloat16", "zero": 1, "place_every": 2},
            r"masters=none does not go with zero=1 where experts move \(place_every=2\); use masters=whole, zero=0 or",
        ),
    ],
)
def test_what_does_not_go_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(RunConfig("dp=2", model=MODEL, train=TrainConfig(device="cpu", **settings)))
