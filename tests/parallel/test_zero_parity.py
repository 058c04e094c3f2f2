"""ZeRO computes what one device computes, on every kind of layout, and sends the bytes that were predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from picotron_mini.config import MeshShape
from picotron_mini.verify import MODEL, TRAIN, verify

FEW = {"vocab_size": 9, "num_heads": 2, "num_kv_heads": 2}  # over dp=4, tp=2 a rank has no row of the table
CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "1, four ranks": ("dp=4", {}, {"zero": 1}),
    "2, three ranks": ("dp=3", {}, {"zero": 2}),
    "3, eight ranks": ("dp=8", {}, {"zero": 3}),
    "1, one micro-batch, one bucket": (
        "dp=2,tp=2",
        {"qk_norm": True},
        {"zero": 1, "micro_batches": 1, "bucket_mb": 9.0},
    ),
    "2, empty rows": ("dp=4,tp=2", FEW, {"zero": 2}),
    "3, empty rows in a tied table": ("dp=4,pp=2", {"vocab_size": 5}, {"zero": 3}),
    "1, three axes": ("dp=2,tp=2,pp=2", {}, {"zero": 1}),
    "2, three axes, all forward": ("dp=2,tp=2,pp=2", {"qk_norm": True}, {"zero": 2, "schedule": "afab"}),
    "3, three axes": ("dp=2,tp=2,pp=2", {"qk_norm": True}, {"zero": 3}),
    "2, frozen table": ("dp=2,pp=2", {}, {"zero": 2, "freeze": ("embed",)}),
    "3, frozen below": ("dp=3", {"tie_embeddings": False}, {"zero": 3, "freeze": ("embed", "layers.0")}),
    "1, interleaved": (
        "dp=2,pp=2",
        {"num_layers": 5},
        {"zero": 1, "schedule": "interleaved", "micro_batches": 4},
    ),
    "2, zero bubble, context": (
        "dp=2,cp=2,pp=2",
        {"num_layers": 5},
        {"zero": 2, "schedule": "zb-v"},
    ),
    "3, interleaved, recompute": (
        "dp=2,pp=2",
        {"num_layers": 5},
        {"zero": 3, "schedule": "interleaved", "micro_batches": 4, "recompute": "full"},
    ),
    "3, zero bubble, sequence": (
        "dp=2,tp=2,pp=2",
        {"num_layers": 5, "qk_norm": True},
        {"zero": 3, "schedule": "zb-h1", "sequence_parallel": True},
    ),
    "3, a V with a tied table, two groups": (
        "dp=4,pp=2",
        {"num_layers": 5},
        {"zero": 3, "schedule": "zb-v", "zero_group": 2},
    ),
    "3, a V, frozen below": (
        "dp=2,pp=2",
        {"num_layers": 6, "tie_embeddings": False},
        {"zero": 3, "schedule": "zb-v", "freeze": ("embed", "layers.0", "layers.1", "layers.5")},
    ),
    "3, context, sequence, recompute": (
        "dp=2,cp=2,tp=2",
        {"qk_norm": True},
        {"zero": 3, "sequence_parallel": True, "recompute": "full"},
    ),
    "3, loss in chunks": ("dp=2", {}, {"zero": 3, "loss_chunks": 3, "recompute": "selective"}),
    "1, two groups": ("dp=4", {}, {"zero": 1, "zero_group": 2}),
    "3, two groups": ("dp=4,tp=2", {"qk_norm": True}, {"zero": 3, "zero_group": 2}),
    "1, symmetric memory, three ranks": ("dp=3", {}, {"zero": 1, "symmetric_memory": True}),
    "2, symmetric memory, a pipeline, small buckets": (
        "dp=3,pp=2",
        {},
        {"zero": 2, "symmetric_memory": True, "bucket_mb": 0.001},
    ),
    "2, symmetric memory, context, empty rows": (
        "dp=2,cp=2,tp=2",
        FEW,
        {"zero": 2, "symmetric_memory": True},
    ),
    "3, symmetric memory, four ranks, recompute": (
        "dp=4",
        {"qk_norm": True},
        {"zero": 3, "symmetric_memory": True, "recompute": "full"},
    ),
    "3, symmetric memory, a V, two groups": (
        "dp=4,pp=2",
        {"num_layers": 5},
        {"zero": 3, "schedule": "zb-v", "zero_group": 2, "symmetric_memory": True},
    ),
    "3, only the head trained": (
        "dp=2,tp=2",
        {"tie_embeddings": False},
        {"zero": 3, "freeze": ("embed", "layers", "norm"), "document_mask": True},
    ),
}


def check(layout: str, model: dict[str, object], train: dict[str, object]) -> None:
    size = replace(MODEL, **{"num_layers": MeshShape.parse(layout).pp + 1} | model)  # type: ignore[arg-type]
    report = verify(layout, size, replace(TRAIN, **train))  # type: ignore[arg-type]
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"first {report.first_divergence}; {found}; {report.bytes_problems}"
    assert {d.quantity for d in report.differences} == {"loss", "gradients", "gradient norm", "weights"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks(stage: int) -> None:
    check("dp=2", {"num_layers": 1}, {"zero": stage})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layouts(case: str) -> None:
    check(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_with_masters(stage: int) -> None:
    check("dp=2,tp=2", {}, {"zero": stage, "dtype": "bfloat16", "steps": 2})
