"""The recording of a step: what is done around it, without a GPU; and on a GPU that it computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, ModelConfig, MoEConfig, RunConfig, TrainConfig
from picotron_mini.data.packing import Batch
from picotron_mini.legality import cuda_graph_problems, resolve
from picotron_mini.mesh import MeshShape
from picotron_mini.parallel.cuda_graph import RecordedStep
from picotron_mini.verify import MODEL, TRAIN, verify

MOE = ModelConfig(hidden_size=32, moe=MoEConfig(num_experts=4, top_k=2, expert_size=16))
GPU = TrainConfig(device="cuda", dtype="bfloat16", cuda_graph=True)


class _Graph:
    """Stands for a CUDA graph: does again what was done while it was recorded, and like one, no Python but this."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def replay(self) -> None:
        self.work()


def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedStep:
    """A recorded step whose graph multiplies the first batch's tokens anew, into the tensor that it made at first."""

    def record(self: RecordedStep, fill: Any, batches: Sequence[Batch]) -> None:
        self.batches = [Batch(*(x.clone() for x in vars(batch).values())) for batch in batches]
        with ledger.recording() as self.sent:
            self.found = fill(self.batches)
        loss = self.found[0]
        loss.fill_(-1.0)  # recording computes nothing
        self.graph = _Graph(lambda: loss.copy_(self.batches[0].tokens.sum() * 2.0))  # type: ignore[assignment]

    monkeypatch.setattr(RecordedStep, "_record", record)
    return RecordedStep()


def batch(n: int) -> Batch:
    return Batch(*(torch.full((1, 3), n) for _ in range(4)))


def test_each_step_sees_its_own_batches_and_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fill(batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batches)
        ledger.record("dp", "all_reduce", torch.zeros(5))
        return batches[0].tokens.sum() * 2.0, torch.tensor(3)

    step, losses, given = recorded(monkeypatch), [], [batch(n) for n in range(1, 5)]
    for each in given:
        with ledger.recording() as sent:
            losses.append(step(fill, [each])[0])
        assert sent == {("dp", "all_reduce"): 20}
    assert [loss.item() for loss in losses] == [6.0, 12.0, 18.0, 24.0]  # none written over by a later step
    assert len(calls) == 2  # itself, and while it was recorded
    assert calls[1][0].tokens.data_ptr() != given[1].tokens.data_ptr()  # the caller's batch may go
    assert all((each.tokens == n).all() for n, each in enumerate(given, 1))


def test_more_micro_batches_than_recorded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = recorded(monkeypatch)
    for n in range(2):
        step(lambda batches: (batches[0].tokens.sum() * 2.0, torch.tensor(3)), [batch(n)])
    with pytest.raises(ValueError, match="zip"):
        step(lambda batches: (torch.zeros(()), torch.tensor(3)), [batch(1), batch(2)])


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"device": "cpu"}, "device=cpu is none"),
        ({"zero": 3}, "zero=3 makes and frees weights"),
        ({"zero": 2, "symmetric_memory": True}, "symmetric_memory and zero=2 was never tried"),
    ],
)
def test_what_cannot_be_recorded_is_refused(train: dict[str, Any], words: str) -> None:
    (problem,) = cuda_graph_problems(MODEL, MeshShape(dp=2), replace(GPU, **train))
    assert words in problem
    assert "cuda_graph=False" in problem


@pytest.mark.parametrize(
    ("moe", "mesh", "dtype", "words"),
    [
        (
            {},
            MeshShape(dp=2, ep=2),
            "bfloat16",
            "ep=2 ranks ask each other how many rows come (none does with dispatch=allgather)",
        ),
        ({"choice": "expert"}, MeshShape(), "bfloat16", "choice=expert the host reads"),
        ({"jitter": 0.1}, MeshShape(), "bfloat16", "jitter=0.1 each step"),
        ({"expert_size": 12}, MeshShape(), "bfloat16", "expert_size=12, tp=1 experts are a loop"),
        ({}, MeshShape(tp=4), "bfloat16", "expert_size=16, tp=4 experts are a loop"),
        ({}, MeshShape(), "float32", "dtype=float32 experts are a loop"),
    ],
)
def test_experts_that_make_the_host_read_are_refused(
    moe: dict[str, Any], mesh: MeshShape, dtype: Any, words: str
) -> None:
    model = replace(MOE, moe=replace(MOE.moe, **moe))
    (problem,) = cuda_graph_problems(model, mesh, replace(GPU, dtype=dtype))
    assert words in problem


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"place_every": 5}, "place_every=5 experts move to other slots"),
        ({"expert_replicas": 1}, "expert_replicas=1 the host picks the rows of copies"),
    ],
)
def test_experts_that_move_or_have_copies_are_refused(train: dict[str, Any], words: str) -> None:
    (problem,) = cuda_graph_problems(MOE, MeshShape(dp=2, ep=2), replace(GPU, dispatch="allgather", **train))
    assert words in problem


def test_what_can_be_recorded_is_not_refused() -> None:
    assert not cuda_graph_problems(MOE, MeshShape(), GPU)
    assert MOE.moe is not None
    for choice in ("token", "expert"):
        model = replace(MOE, moe=replace(MOE.moe, choice=choice))  # type: ignore[arg-type]
        assert not cuda_graph_problems(model, MeshShape(dp=2, ep=2), replace(GPU, dispatch="allgather"))
    assert not cuda_graph_problems(MODEL, MeshShape(dp=2, tp=2), replace(GPU, zero=2))


def test_a_run_on_the_cpu_is_refused_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="cuda_graph records what a GPU does"):
        resolve(RunConfig(layout="dp=2", model=MODEL, train=replace(TRAIN, cuda_graph=True, batch_size=0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records what a GPU does")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_recorded_step_equals_one_that_is_not(dtype: Any) -> None:
    report = verify("dp=1", MODEL, replace(TRAIN, device="cuda", dtype=dtype, cuda_graph=True), gpus=1)
    assert report.ok, report.differences
