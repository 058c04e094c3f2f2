"""Parity: every layout computes what one device computes, and sends exactly the bytes that were predicted."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.legality import layout_problems, resolve
from picotron_mini.model.gpt import IGNORE
from picotron_mini.parity import Difference, Errors, Report, table
from picotron_mini.verify import MODEL, TRAIN, make_batches, verify

SHAPES = [
    shape
    for pp in range(1, 9)
    for dp in range(1, 9)
    for tp in range(1, 9)
    if (shape := MeshShape(pp=pp, dp=dp, tp=tp)).world_size <= 8 and not layout_problems(MODEL, shape)
]


def expect_equal(report: Report) -> None:
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"{report.layout}: first {report.first_divergence}; {found}; {report.bytes_problems}"
    assert {d.quantity for d in report.differences} == {"loss", "gradients", "gradient norm", "weights"}


def test_the_list_of_layouts_is_complete() -> None:
    assert len(SHAPES) == 32
    assert {shape.world_size for shape in SHAPES} == set(range(1, 9))
    for axis in ("pp", "dp", "tp"):  # cp: see parallel/test_context_parallel.py
        assert max(getattr(shape, axis) for shape in SHAPES) == 8


def small(layout: str, **model: object) -> ModelConfig:
    """One layer more than there are stages: always uneven, and no slower than it must be."""
    return replace(MODEL, num_layers=MeshShape.parse(layout).pp + 1, **model)  # type: ignore[arg-type]


TWO_STEPS = replace(TRAIN, steps=2)


@pytest.mark.parametrize(
    "layout", [pytest.param(str(s), marks=[pytest.mark.slow] if s.world_size > 2 else []) for s in SHAPES]
)
def test_every_layout_equals_one_device(layout: str) -> None:
    expect_equal(verify(layout, small(layout), TWO_STEPS))


# Each variant changes what another part of the code sees; on four ranks or more.
VARIANTS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "untied head": ("tp=2,pp=2", {"tie_embeddings": False}, {}),
    "norm on queries and keys": ("dp=2,tp=2", {"qk_norm": True}, {}),
    "norm on queries and keys, in stages": ("tp=2,pp=2", {"qk_norm": True}, {}),
    "all heads their own keys": ("tp=4", {"num_kv_heads": 16}, {}),
    "documents masked": ("dp=2,pp=2", {}, {"document_mask": True}),
    "frozen embedding": ("dp=2,pp=2", {}, {"freeze": ("embed",)}),
    "frozen embedding and first layer": ("tp=2,pp=2", {"tie_embeddings": False}, {"freeze": ("embed", "layers.0")}),
    "only the head trained": ("dp=2,tp=2", {"tie_embeddings": False}, {"freeze": ("embed", "layers", "norm")}),
    "all forward, all backward": ("dp=2,pp=2", {}, {"schedule": "afab"}),
    "one micro-batch": ("dp=2,tp=2,pp=2", {}, {"micro_batches": 1}),
    "five micro-batches of one sequence": ("tp=2,pp=2", {}, {"micro_batch_size": 1, "micro_batches": 5}),
    "one bucket": ("dp=2,tp=2", {}, {"bucket_mb": 100.0}),
    "no clipping": ("dp=2,tp=2,pp=2", {}, {"clip_norm": 0.0}),
    "sequence parallel": ("dp=2,tp=2", {}, {"sequence_parallel": True}),
    "sequence parallel, in stages": ("tp=2,pp=4", {}, {"sequence_parallel": True}),
    "sequence parallel, untied, norm on heads": (
        "tp=4",
        {"tie_embeddings": False, "qk_norm": True},
        {"sequence_parallel": True, "document_mask": True},
    ),
    "sequence parallel, frozen below": (
        "tp=2,pp=2",
        {"tie_embeddings": False, "qk_norm": True},
        {"sequence_parallel": True, "freeze": ("embed", "layers.0.attention.q.", "layers.0.attention_norm")},
    ),
    "sequence parallel, only the norm on heads trained": (
        "dp=2,tp=2",
        {"tie_embeddings": False, "qk_norm": True},
        {
            "sequence_parallel": True,
            "freeze": (
                *("embed", "head", "norm", "layers.0.mlp", "layers.1.mlp"),
                *(f"layers.{i}.attention{n}" for i in range(2) for n in ("_norm", ".q.", ".k.", ".v.", ".o.")),
            ),
        },
    ),
    "layers recomputed": ("dp=2,tp=2", {}, {"recompute": "full", "freeze": ("embed", "layers.0")}),
    "layers recomputed, sequence parallel, loss in parts": (
        "tp=2,pp=2",
        {"tie_embeddings": False},
        {"recompute": "full", "sequence_parallel": True, "loss_chunks": 5, "document_mask": True},
    ),
    "MLPs recomputed, tied head, loss in parts": ("tp=2,pp=2", {}, {"recompute": "selective", "loss_chunks": 3}),
    "vocabulary that leaves a short last slice": ("tp=4,pp=2", {"vocab_size": 59}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    layout, model, train = VARIANTS[variant]
    expect_equal(verify(layout, small(layout, **model), replace(TWO_STEPS, **train)))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes_are_as_exact_as_one_device_in_them(dtype: str) -> None:
    report = verify("dp=2,tp=2", small("dp=2,tp=2"), replace(TWO_STEPS, dtype=dtype))
    assert report.ok, report.to_dict()
    assert report.max_rel_err > 1e-9, "a run in float64 by mistake would be exact"


@pytest.mark.slow
def test_the_same_layout_gives_the_same_bits_twice() -> None:
    first, second = (verify("dp=2,tp=2,pp=2", small("pp=2"), TWO_STEPS, optimizers=["adamw"]) for _ in range(2))
    assert [d.error for d in first.differences] == [d.error for d in second.differences]


def scale_the_gradients() -> None:
    """A mutant: gradients are averaged instead of summed over dp."""
    from picotron_mini.parallel import data

    finish = data.GradientBuckets.finish

    def wrong(self: data.GradientBuckets) -> None:
        finish(self)
        for each in self.buckets:
            each.buffer.div_(self.axis.size)

    data.GradientBuckets.finish = wrong  # type: ignore[method-assign]


def test_a_mutant_is_caught_and_named() -> None:
    report = verify("dp=2", replace(MODEL, num_layers=1), patch=scale_the_gradients)
    assert not report.ok
    assert report.max_rel_err > 0.1
    assert report.first_divergence is not None and report.first_divergence.startswith(
        "norm.weight, step 0, rank 0, sgd"
    )
    assert {d.quantity: d.error <= 1e-9 for d in report.differences}["gradients"] is False


def test_what_is_computed_first_is_named_first() -> None:
    """Of a wrong loss in a later step, and gradients and weights of this one: the last gradient of the model."""
    errors = Errors()
    errors.note("loss", 0.0, "loss, step 0", 0)
    errors.note("weights", 1.0, "norm.weight after step 0", 0, 0)
    errors.note("gradients", 1.0, "embed.weight", 0, 9)
    errors.note("loss", 1.0, "loss, step 1", 1)
    assert errors.first(lambda quantity: 1e-9) == "embed.weight"
    errors.note("gradients", 1.0, "head.weight, another rank", 0, 0)
    assert errors.first(lambda quantity: 1e-9) == "head.weight, another rank"
    assert errors.first(lambda quantity: 1.0) is None


def send_more() -> None:
    """A mutant that computes the same and sends too much."""
    from picotron_mini.training import step

    exchange = step.sum_partial_gradients

    def wrong(gradients, layout, mesh):  # type: ignore[no-untyped-def]
        step.all_reduce(next(iter(gradients.values())).clone(), mesh["dp"])
        exchange(gradients, layout, mesh)

    step.sum_partial_gradients = wrong


def test_bytes_that_were_not_predicted_are_caught() -> None:
    report = verify("dp=2", replace(MODEL, num_layers=1), patch=send_more)
    assert report.max_rel_err < 1e-9 and not report.ok
    assert "predicted" in report.bytes_problems[0]


def test_report_as_data_and_as_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    report = verify("tp=2", replace(MODEL, num_layers=1))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True and data["layout"] == "tp=2" and data["max_rel_err"] <= 1e-9
    assert data["bytes_predicted"] == data["bytes_counted"] > 0
    Console(width=120).print(table(report))
    assert "equal to one device" in capsys.readouterr().out


def test_an_error_that_is_no_number_is_null_in_json() -> None:
    differences = [Difference("loss", float("inf"), "step 0", 1e-9), Difference("weights", 1e-15, "norm.weight", 1e-9)]
    report = Report("tp=2", differences, {}, {})
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is False and data["max_rel_err"] is None
    assert [each["error"] for each in data["quantities"].values()] == [None, 1e-15]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=3", "tp=3 does not divide num_heads=16; tp could be 2 or 4"),
        ("pp=10", "pp=10 is more than num_layers=9; use pp<=9"),
        ("ep=2", "ep=2 does not divide dp*cp=1"),
        ("cp=4", "2*cp=8 does not divide seq_len=12, and context=ring cuts equal parts; use seq_len=8 or 16"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(layout: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        verify(layout)


def test_freezing_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze='embedding' begins no parameter's name"):
        verify("dp=2", train=replace(TRAIN, freeze=("embedding",)))


@pytest.mark.parametrize("seed", range(490, 496))
def test_every_sequence_has_a_target_that_depends_on_another_token(seed: int) -> None:
    """Else queries have gradients of rounding alone, and one rounding differs from another by 100 %: seed 490 did."""
    run = resolve(RunConfig(layout="1", model=MODEL, train=replace(TRAIN, seq_len=4, steps=8, seed=seed)))
    for batch in make_batches(run):
        before = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.tokens[:, 1:] != batch.tokens[:, :-1])
        assert ((batch.targets[:, 1:] != IGNORE) & before).any(1).all()
