"""One rank of any layout in this process: what it would send and keep is what was predicted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from picotron_mini import dry_run as module
from picotron_mini.collectives import ledger, operators
from picotron_mini.config import ConfigError, ModelConfig, MoEConfig, RunConfig
from picotron_mini.dry_run import dry_run, sample, table
from picotron_mini.legality import resolve
from picotron_mini.mesh import GROUPS
from picotron_mini.verify import MODEL, TRAIN, verify

pytestmark = pytest.mark.slow  # each case is computed twice, for real too

LARGE = ModelConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
    tie_embeddings=False,
)  # fmt: skip


def resolved(layout: str, model: ModelConfig = MODEL, **train: Any) -> RunConfig:
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **train)))


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        ("dp=1", {}),
        ("dp=2,tp=2,pp=2", {}),
        ("dp=2,tp=2,pp=2", {"zero": 1, "sequence_parallel": True}),
        ("dp=4,tp=2", {"zero": 3, "zero_group": 2}),
        ("dp=2,pp=2", {"zero": 2, "dtype": "bfloat16", "recompute": "full", "loss_chunks": 2}),
        ("dp=2,cp=2", {"document_mask": True}),
        ("dp=2,tp=2", {"dtype": "bfloat16", "masters": "split"}),
        ("dp=2,tp=2", {"dtype": "bfloat16", "masters": "none"}),
        ("cp=2,tp=2", {"context": "ulysses", "document_mask": True}),
        ("pp=4", {"schedule": "zb-v", "micro_batches": 4}),
        ("dp=2,tp=2", {"freeze": ("embed", "layers.0")}),
        ("dp=2", {"compress": "topk"}),
    ],
)
def test_agrees_with_the_prediction(layout: str, train: dict[str, Any]) -> None:
    run = resolved(layout, **train)
    for rank in sample(run):
        result = dry_run(run, rank)
        assert result.problems == []
        assert result.held > 0
        assert bool(result.counted) == (run.mesh.world_size > 1)


@pytest.mark.parametrize(
    ("layout", "moe", "train"),
    [
        ("dp=1", {}, {}),
        ("dp=2", {"dense_layers": 1}, {"recompute": "full"}),
        ("dp=2,ep=2", {}, {}),
        ("dp=4,ep=2", {}, {"zero": 1, "dtype": "bfloat16"}),
        ("dp=4,ep=4", {"shared_size": 8, "z_weight": 0.1, "balance": "bias"}, {"zero": 3}),
        ("dp=4,ep=2", {"shared_size": 8}, {"zero": 1, "zero_group": 2, "dtype": "bfloat16", "masters": "split"}),
        ("dp=8,ep=2", {"dense_layers": 1}, {"zero": 2, "zero_group": 4, "dtype": "bfloat16"}),
        ("dp=4,cp=2,ep=4", {}, {"zero": 3, "zero_group": 2, "seq_len": 16, "recompute": "full"}),
        ("dp=8,tp=2,ep=2", {"num_experts": 2, "top_k": 2}, {"zero": 3, "zero_group": 4, "freeze": ("layers.0",)}),
        ("dp=2,cp=2,ep=4", {"capacity": 1.25}, {"dispatch_parts": 3, "seq_len": 28}),
        ("dp=2,tp=2,ep=2", {}, {"sequence_parallel": True, "recompute": "selective"}),
        ("dp=2,pp=2,ep=2", {"choice": "expert", "balance": "none"}, {"zero": 2}),
    ],
)
def test_agrees_with_the_prediction_for_experts(layout: str, moe: dict[str, Any], train: dict[str, Any]) -> None:
    experts = replace(MoEConfig(num_experts=8, top_k=3, expert_size=16), **moe)
    run = resolved(layout, replace(MODEL, moe=experts), **train)
    for rank in sample(run):
        result = dry_run(run, rank)
        assert result.problems == []
        if run.mesh.ep > 1:
            assert result.counted["ep", "all_to_all"] > 0 < result.counted["ep", "counts"]


def test_a_rehearsed_mixture_sends_what_evenly_chosen_experts_would() -> None:
    """By hand: 8 experts on 2 ranks, top-1, so each token goes to one rank, and what it brings back has one row."""
    model = replace(MODEL, moe=MoEConfig(num_experts=8, top_k=1, expert_size=16, normalize=False))
    run = resolved("dp=2,ep=2", model, micro_batch_size=1, micro_batches=2)
    tokens, width = 2 * run.train.seq_len, model.hidden_size
    there = tokens * 8 * (width + 2)  # float64: a row, one weight, one expert
    back = tokens * 8 * width
    counted = dry_run(run, 0).counted
    assert counted["ep", "all_to_all"] == model.num_layers * 2 * (there + back)  # ... and the gradients


def test_sends_what_real_ranks_send() -> None:
    report = verify("dp=2,tp=2", optimizers=["adamw"])
    counted = dry_run(resolved("dp=2,tp=2"), 0).counted
    assert {f"{axis} {operation}": n for (axis, operation), n in counted.items()} == report.bytes_counted


def test_one_of_a_thousand_ranks_in_seconds() -> None:
    run = resolved(
        "dp=16,tp=8,pp=8", LARGE, seq_len=8192, micro_batch_size=1, micro_batches=16, zero=1, dtype="bfloat16",
        sequence_parallel=True,
    )  # fmt: skip
    start = time.monotonic()
    result = dry_run(run, 517)
    assert result.index == {"pp": 4, "dp": 0, "cp": 0, "tp": 5}
    assert result.problems == []
    assert result.counted["pp", "send"] == 2 * 16 * (8192 // 8) * 4096 * 2
    assert time.monotonic() - start < 60  # a fraction of it on an idle machine


def test_a_wrong_count_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(key: str, operation: str, payload: Any, record: Callable[..., None] = ledger.record) -> None:
        if not key.startswith("pp"):
            record(key, operation, payload)

    monkeypatch.setattr(ledger, "record", forgetful)
    (problem,) = dry_run(resolved("dp=2,pp=2"), 0).problems
    assert problem.startswith("rank 0: pp send: predicted ") and problem.endswith("counted 0")


def test_what_is_kept_for_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "held_bytes", lambda parallel, optimizer: 7)
    (problem,) = dry_run(resolved("dp=2"), 1).problems
    assert problem.endswith("counted 7")


def test_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = sys.excepthook
    dry_run(resolved("dp=2"), 1)
    assert not dist.is_initialized() and GROUPS == {} and sys.excepthook is hook

    def fail(*args: Any) -> None:
        raise RuntimeError("no place")

    monkeypatch.setattr(module, "make_optimizer", fail)
    with pytest.raises(RuntimeError, match="no place"):
        dry_run(resolved("dp=2"), 1)
    assert not dist.is_initialized() and GROUPS == {} and sys.excepthook is hook


def test_refuses_a_rank_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="rank=4 is not one of the 4 of dp=4; use 0 to 3"):
        dry_run(resolved("dp=4"), 4)


def test_the_table_names_what_differs() -> None:
    run = resolved("dp=2,pp=2")
    good = dry_run(run, 0)
    bad = replace(good, held=1)
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table(run, [good, bad]))
    text = captured.get()
    assert "to the byte" in text and "counted 1" in text


def test_real_steps_are_not_touched() -> None:
    """Outside of a rehearsal operators on meta tensors give shapes and count nothing."""
    with ledger.recording() as sent:
        assert operators.all_reduce(torch.empty(3, device="meta"), "tp:0,1").shape == (3,)
    assert not sent
