"""Sums of gradients host by host: the same sums, bytes to the byte with padding, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.course.instruments.witness import Witness
from picotron_mini.dry_run import dry_run
from picotron_mini.legality import resolve
from picotron_mini.matrix import optimizers_of, sample
from picotron_mini.mesh import Mesh
from picotron_mini.model.gpt import parameter_shapes
from picotron_mini.parallel.buckets import bucket, last_first
from picotron_mini.parallel.data import GradientBuckets
from picotron_mini.parallel.describe import WHEN, _when
from picotron_mini.parallel.hierarchical import Hierarchical
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, verify, verify_together

pytestmark = pytest.mark.slow  # each case trains on several ranks

Ranks = Callable[..., list[Any]]
UNTIED = replace(MODEL, tie_embeddings=False, vocab_size=97, hidden_size=20)
TIED, FEWER = replace(MODEL, num_layers=5), replace(UNTIED, num_layers=3)


def resolved(layout: str, group: int, model: ModelConfig = MODEL, **train: Any) -> RunConfig:
    settings = {"reduce_group": group, "steps": 2, "micro_batches": 2, **train}
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **settings)))


# --- without processes ------------------------------------------------------------------------------------


def test_which_parameters_share_a_bucket() -> None:
    sizes = {"embed": 90, "layer 0": 40, "layer 1": 50, "norm": 8}  # the module's picture
    assert last_first(sizes, 4, 400) == [["norm", "layer 1", "layer 0"], ["embed"]]
    assert last_first(sizes, 4, 1) == [["norm"], ["layer 1"], ["layer 0"], ["embed"]]
    assert last_first(sizes, 8, 400) == [["norm", "layer 1"], ["layer 0", "embed"]]
    assert last_first({}, 4, 1) == bucket([], 4, 1) == []


@pytest.mark.parametrize(
    ("layout", "group", "settings", "message"),
    [
        ("dp=6", 4, {}, "reduce_group=4 does not cut dp*cp=6 into groups of 2 or more; reduce_group could be 2 or 3"),
        ("dp=2,cp=2", 3, {}, "reduce_group=3 does not cut dp*cp=4 into groups of 2 or more; reduce_group could be 2"),
        ("dp=4", 1, {}, "reduce_group=1 does not cut dp*cp=4 into groups of 2 or more; reduce_group could be 2 or 4"),
        ("tp=2", 2, {}, "reduce_group=2 does not cut dp*cp=1 into groups of 2 or more; leave it out"),
        ("dp=4", 2, {"zero": 1}, "and zero=1 only what a rank owns; use reduce_group=0"),
        ("dp=4", 2, {"compress": "bf16"}, "compress=bf16 exchanges buckets in a way of its own; use compress=none"),
    ],
)  # fmt: skip
def test_what_is_refused(layout: str, group: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(layout, group, seq_len=16, **settings)
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_refused_with_experts_on_several_ranks() -> None:
    with pytest.raises(ConfigError, match="with ep=2 the copies of an expert are 2 ranks apart"):
        resolved("dp=4,ep=2", 2, replace(MODEL, moe=EXPERTS))
    assert resolved("dp=4", 2, replace(MODEL, moe=EXPERTS)).train.reduce_group == 2


DRY = {
    "a padded bucket of each parameter": ("dp=6", 3, MODEL, {"bucket_mb": 1e-6}),
    "cp ranks are neighbours": ("dp=3,cp=2", 3, UNTIED, {"bucket_mb": 0.001}),
    "one host": ("dp=4", 4, MODEL, {"bucket_mb": 0.002}),
    "a tied head on the last stage": ("dp=4,pp=3", 4, MODEL, {"bucket_mb": 0.003}),
    "a V, whose head is on the first": ("dp=3,pp=2", 3, MODEL, {"bucket_mb": 0.003, "schedule": "zb-v"}),
    "virtual stages": ("dp=5,pp=3", 5, UNTIED, {"bucket_mb": 0.002, "schedule": "interleaved", "micro_batches": 3}),
    "uneven parts of the vocabulary": ("dp=4,tp=4", 4, MODEL, {"bucket_mb": 0.001, "sequence_parallel": True}),
    "frozen": ("dp=7,pp=2", 7, MODEL, {"bucket_mb": 0.001, "freeze": ("embed", "layers.2.mlp")}),
    "float32 sums of bf16 weights": ("dp=3", 3, UNTIED, {"bucket_mb": 0.001, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", DRY)
def test_bytes_of_a_dry_run(case: str) -> None:
    layout, group, model, train = DRY[case]
    run = resolved(layout, group, model, **train)
    for rank in {0, run.mesh.world_size - 1}:
        found = dry_run(run, rank)
        assert found.problems == [], case
        axis = "dp" if run.mesh.cp == 1 else "dp_cp"
        assert found.counted[axis, "reduce_scatter"] == group * found.counted[axis, "all_gather"] > 0


def test_padding_counts() -> None:
    run = resolved("dp=6", 3, bucket_mb=1e-6)  # a bucket for each parameter
    rows = [prod(shape) + 1 for shape in parameter_shapes(run.model).values()]
    padded = 8 * sum(-(-n // 3) * 3 for n in rows)
    counted = dry_run(run, 0).counted
    assert counted["dp", "reduce_scatter"] == padded > 8 * sum(rows)
    assert counted["dp", "all_gather"] == padded // 3 == counted["dp", "all_reduce"] - 8


def test_it_is_among_what_is_sampled() -> None:
    assert any(run.train.reduce_group for run in sample(60, 0))


def test_describe_says_so() -> None:
    run = resolved("dp=2,cp=2", 2)
    said = [_when(run, ("dp_cp", name)) for name in ("reduce_scatter", "all_reduce", "all_gather")]
    assert all(said) and len({*said, *WHEN.values()}) == 3 + len(set(WHEN.values()))
    assert "the number of targets" in said[1]


# --- on ranks ---------------------------------------------------------------------------------------------


def groups() -> list[Any]:
    mesh = Mesh.build(MeshShape(dp=2, cp=2, tp=2))
    return [(axis.name, axis.size, axis.index, axis.ranks) for axis in mesh.halves("dp_cp", 2)]


def test_groups_are_neighbours_of_the_data_axis(ranks: Ranks) -> None:
    found = ranks(groups, world_size=8)
    assert found[0] == [("dp_cp", 2, 0, (0, 2)), ("dp_cp", 2, 0, (0, 4))]
    assert found[7] == [("dp_cp", 2, 1, (5, 7)), ("dp_cp", 2, 1, (3, 7))]


def summed(length: int, size: int) -> tuple[list[float], dict[Any, int], dict[Any, int], bool, int]:
    """On a rank: the sum of a buffer, what the ledger and a witness count, if it is in place, where the part starts."""
    mesh = Mesh.build(MeshShape(dp=4))
    reduce = Hierarchical(*mesh.halves("dp", size))
    buffer = torch.arange(length, dtype=torch.float64) + 100 * mesh.rank
    with ledger.recording() as counted, Witness() as witness:
        work = reduce(buffer, [length - 1])
        whole, part = work.whole, work.part  # type: ignore[attr-defined]
        work.wait()
    return buffer.tolist(), dict(counted), dict(witness.bytes), whole is buffer, part.storage_offset()


@pytest.mark.parametrize(("length", "size"), [(8, 2), (7, 2), (5, 4), (1, 2), (8, 4)])
def test_the_sum_its_bytes_and_its_copies(ranks: Ranks, length: int, size: int) -> None:
    padded = -(-length // size) * size
    for rank, (total, counted, witnessed, in_place, start) in enumerate(ranks(summed, length, size, world_size=4)):
        assert total == [4 * n + 600.0 for n in range(length)]
        across = {("dp", "all_reduce"): 8 * padded // size} if size < 4 else {}
        assert counted == {
            ("dp", "reduce_scatter"): 8 * padded, ("dp", "all_gather"): 8 * padded // size, **across
        }  # fmt: skip
        assert sum(witnessed.values()) == sum(counted.values())
        assert in_place == (length % size == 0)
        # NCCL: the output of a reduce_scatter may lie in its input, at the rank's own part. On gloo any place is right.
        assert start == rank % size * padded // size


def unready() -> tuple[list[list[float]], list[bool]]:
    """On a rank: gradients of a module of which each rank uses other parts, summed in small buckets."""
    mesh = Mesh.build(MeshShape(dp=4))
    layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(4)])
    for number, layer in enumerate(layers):
        nn.init.constant_(layer.weight, number + 1.0)
    buckets = GradientBuckets(layers.parameters(), mesh["dp"], 1.0, Hierarchical(*mesh.halves("dp", 2)))
    buckets.arm()
    used = [layers[mesh.rank], layers[1]] if mesh.rank != 1 else [layers[1]]
    sum(layer(torch.ones(3)).sum() for layer in used).backward()  # type: ignore[union-attr]
    buckets.finish()
    found = [buckets.gradient(layer.weight) for layer in layers]
    return [[] if g is None else g.flatten().tolist() for g in found], [g is None for g in found]


def test_parameters_that_some_ranks_do_not_use(ranks: Ranks) -> None:
    for found, missing in ranks(unready, world_size=4):
        assert missing == [False] * 4
        assert found == [[1.0] * 9, [4.0] * 9, [1.0] * 9, [1.0] * 9]


# --- parity -----------------------------------------------------------------------------------------------

FOUR = [
    resolved("dp=4", 2, TIED, bucket_mb=0.001),
    resolved("dp=2,cp=2", 2, FEWER, bucket_mb=0.003, seq_len=16),
    resolved("dp=2,tp=2", 2, TIED, bucket_mb=0.002, freeze=("embed", "layers.1.mlp")),
    resolved("dp=2,pp=2", 2, TIED, bucket_mb=0.003),
    resolved("dp=4", 4, replace(FEWER, num_layers=2, moe=EXPERTS), bucket_mb=0.01),
]
EIGHT = [
    resolved("dp=8", 2, FEWER, bucket_mb=0.001),
    resolved("dp=8", 4, FEWER, bucket_mb=0.002),
    resolved("dp=4,pp=2", 2, TIED, bucket_mb=0.003, schedule="zb-v", micro_batches=4),
    resolved("dp=4,tp=2", 2, FEWER, bucket_mb=25.0, sequence_parallel=True),
    resolved("dp=2,cp=2,pp=2", 2, TIED, bucket_mb=0.002, seq_len=8, recompute="full"),
    resolved("dp=2,cp=2,tp=2", 4, FEWER, bucket_mb=0.002, seq_len=8),
    resolved("dp=2,tp=2,pp=2", 2, TIED, bucket_mb=0.001),
]


@pytest.mark.parametrize("runs", [FOUR, EIGHT], ids=["4 ranks", "8 ranks"])
def test_it_equals_one_device(runs: list[RunConfig]) -> None:
    for run, report in zip(runs, verify_together([optimizers_of(run) for run in runs]), strict=True):
        print(f"{run.layout} by {run.train.reduce_group}: {report.max_rel_err:.1e}")
        assert report.ok, f"{run.layout}: {report.first_divergence} {report.bytes_problems}"
        assert any("reduce_scatter" in name for name in report.bytes_counted)


def hosts_apart() -> None:
    """A mutant: each host keeps the sum of its own ranks."""
    from picotron_mini.collectives import Done
    from picotron_mini.parallel import hierarchical

    hierarchical.all_reduce_async = lambda x, axis: Done()  # type: ignore[assignment]


def gathered_from_the_others() -> None:
    """A mutant: the parts are gathered from the ranks of the other hosts."""
    from picotron_mini.parallel import hierarchical

    real = hierarchical._Sum.wait

    def wait(self: Any) -> None:
        gather = hierarchical.all_gather_async
        hierarchical.all_gather_async = lambda out, x, axis: gather(out, x, self.across)
        real(self)
        hierarchical.all_gather_async = gather

    hierarchical._Sum.wait = wait  # type: ignore[method-assign]


def padding_kept() -> None:
    """A mutant: where a bucket is padded, its sum stays in the copy."""
    from picotron_mini.parallel import hierarchical

    real = hierarchical._Sum.__init__

    def init(self: Any, buffer: Any, whole: Any, inside: Any, across: Any) -> None:
        real(self, buffer, whole, inside, across)
        self.buffer = self.whole

    hierarchical._Sum.__init__ = init  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("mutant", "bytes_differ"), [(hosts_apart, True), (gathered_from_the_others, False), (padding_kept, False)]
)
def test_mutants_are_caught(mutant: Any, bytes_differ: bool) -> None:
    train = replace(TRAIN, reduce_group=2, bucket_mb=0.001, steps=2, micro_batches=1)
    report = verify("dp=4", replace(MODEL, num_layers=1), train, optimizers=["sgd"], patch=mutant)
    assert not report.ok and bool(report.bytes_problems) == bytes_differ
    assert max(d.error for d in report.differences if d.quantity == "gradients") > 1e-6
