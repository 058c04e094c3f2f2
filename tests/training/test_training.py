"""Learning rate, optimizer groups, masters, clipping: what a step is made of, without processes where possible."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from picotron_mini.config import MeshShape, RunConfig, TrainConfig
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.training.lr import learning_rate
from picotron_mini.training.optimizer import clip_factor, make_optimizer, set_learning_rate
from picotron_mini.training.step import evaluate, train_step
from picotron_mini.verify import MODEL, TRAIN, make_batches


def test_learning_rate_warms_up_and_decays() -> None:
    train = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1, lr_schedule="cosine")
    rates = [learning_rate(train, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[55] == pytest.approx(0.55)  # half way down
    assert rates[99] == pytest.approx(0.1, abs=1e-3)


def test_wsd_holds_and_then_falls() -> None:
    train = TrainConfig(steps=100, warmup_steps=0, lr=1.0, min_lr_ratio=0.0, lr_schedule="wsd")
    rates = [learning_rate(train, step) for step in range(100)]
    assert rates[:80] == [1.0] * 80
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_constant_and_a_warm_up_as_long_as_the_run() -> None:
    assert learning_rate(TrainConfig(lr=2.0, warmup_steps=0, lr_schedule="constant"), 7) == 2.0
    assert learning_rate(TrainConfig(steps=5, warmup_steps=5, lr=1.0), 4) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_matrices_decay_and_vectors_do_not(kind: str) -> None:
    matrix, vector = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    train = TrainConfig(optimizer=kind, weight_decay=0.5, lr=0.1)  # type: ignore[arg-type]
    optimizer = make_optimizer({"m": matrix, "v": vector}, train)
    set_learning_rate(optimizer, 0.2)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.tensor(0.9)) and torch.equal(vector, torch.ones(2))


def test_clipping_only_shrinks() -> None:
    assert clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0


def narrow_steps(steps: int) -> tuple[float, float, float, str]:
    run = resolve(
        RunConfig(layout="dp=2", model=replace(MODEL, num_layers=1), train=replace(TRAIN, dtype="bfloat16", lr=1e-5))
    )
    mesh = Mesh.build(MeshShape(dp=2))
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.masters, run.train)
    name = "layers.0.mlp.up.weight"
    before, narrow_before = parallel.masters[name].clone(), parallel.parameters[name].clone()
    batch = make_batches(run)[0]
    half = slice(0, run.train.micro_batch_size)
    mine = [type(batch)(*(getattr(batch, f)[half] for f in ("tokens", "targets", "positions", "documents")))]
    for _ in range(steps):
        train_step(parallel, optimizer, mine * run.train.micro_batches)
    master, narrow = parallel.masters[name], parallel.parameters[name]
    moved = (master - before).abs().mean().item()
    narrow_moved = (narrow.float() - narrow_before.float()).abs().mean().item()
    rounding = (narrow.float() - master).abs().max().item() / master.abs().max().item()
    return moved, narrow_moved, rounding, str(parallel.gradients.gradient(narrow).dtype)  # type: ignore[union-attr]


def test_masters_keep_what_bf16_would_round_away() -> None:
    for moved, _, rounding, dtype in launch(narrow_steps, 3, world_size=2):
        assert dtype == "torch.float32"
        assert moved == pytest.approx(3e-5, rel=0.5)  # three AdamW steps of 1e-5, each below bf16's resolution
        assert 0 < rounding < 2**-8


def losses_of_validation(layout: str) -> tuple[float, int, bool]:
    train = replace(TRAIN, micro_batch_size=12 // MeshShape.parse(layout).dp, micro_batches=1)
    run = resolve(RunConfig(layout=layout, model=replace(MODEL, num_layers=4), train=train))
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    batch = make_batches(run)[0]
    rows = torch.arange(12).chunk(mesh["dp"].size)[mesh["dp"].index]
    part = type(batch)(*(getattr(batch, f)[rows] for f in ("tokens", "targets", "positions", "documents")))
    return evaluate(parallel, [part], stop=mesh.rank == 1)


def test_validation_is_the_same_under_every_layout() -> None:
    want = launch(losses_of_validation, "dp=1", world_size=1)[0]
    assert math.log(101) * 0.9 < want[0] < math.log(101) * 1.1  # an untrained model knows nothing
    for layout in ("dp=2,tp=2", "tp=2,pp=2", "dp=2,pp=2"):
        for loss, tokens, stop in launch(losses_of_validation, layout, world_size=4):
            assert tokens == want[1]
            assert stop, "one rank was asked, so all must know"
            assert loss == pytest.approx(want[0], rel=1e-12)
