"""Mixtures of experts over ranks: parity with one device, auxiliary losses, counts and biases included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from picotron_mini.cli import main
from picotron_mini.config import ConfigError, MoEConfig, RunConfig
from picotron_mini.legality import resolve
from picotron_mini.mesh import coordinates
from picotron_mini.model.hf import load_hf
from picotron_mini.parallel.parallelize import layout_of, stage_layers
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.parity import Report
from picotron_mini.verify import MODEL, TRAIN, verify

SMALL = replace(MODEL, num_layers=3)
MOE = MoEConfig(num_experts=5, top_k=2, expert_size=24, aux_weight=0.3, z_weight=0.1)  # uneven, and heavy losses
TWO_STEPS = replace(TRAIN, steps=2)


def expect_equal(report: Report) -> None:
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"{report.layout}: first {report.first_divergence}; {found}; {report.bytes_problems}"
    assert {d.quantity for d in report.differences} == {"loss", "gradients", "gradient norm", "weights", "routing"}


BIAS: dict[str, Any] = {
    "balance": "bias", "score": "sigmoid", "shared_size": 8, "dense_layers": 1, "scale": 2.5, "num_experts": 6,
    "groups": 3, "limit_groups": 2, "bias_rate": 0.05,
}  # fmt: skip
FEW: dict[str, Any] = {"capacity": 0.6}
CHOOSE: dict[str, Any] = {"choice": "expert", "balance": "none"}

# name: layout, of the mixture, of the model, of the training
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one device": ("1", FEW | {"jitter": 0.1}, {}, {}),
    "data": ("dp=2", {}, {}, {}),
    "tensor": ("tp=2", {"shared_size": 8}, {}, {}),
    "context, capacity": ("cp=2", FEW, {}, {}),
    "stages": ("pp=2", BIAS, {}, {}),
    "all four axes but one": ("dp=2,tp=2,pp=2", FEW, {}, {}),
    "all four axes but one, with context": ("dp=2,cp=2,pp=2", FEW, {"tie_embeddings": False}, {}),
    "context and tensor, jitter": ("cp=2,tp=2", {"jitter": 0.1, "shared_size": 8}, {}, {"sequence_parallel": True}),
    "each sequence balanced": ("dp=2,cp=2", {"aux_scope": "sequence"}, {}, {}),
    "ulysses, recomputed": ("cp=2", FEW, {}, {"context": "ulysses", "recompute": "full", "document_mask": True}),
    "MLPs recomputed, frozen below": ("cp=2", FEW, {}, {"recompute": "selective", "freeze": ("embed", "layers.0")}),
    "experts choose": ("dp=2,cp=2", CHOOSE, {}, {"recompute": "full"}),
    "experts choose few, in parts": ("cp=2,tp=2", CHOOSE | FEW, {}, {"sequence_parallel": True}),
    "biases": ("dp=2,tp=2", BIAS, {}, {}),
    "biases of four": ("dp=4", BIAS, {}, {"zero": 3, "recompute": "full"}),
    "one expert a token": ("dp=2,pp=2", {"top_k": 1, "normalize": False, "jitter": 0.1}, {}, {}),
    "all experts a token": ("dp=2,tp=2", {"top_k": 5}, {}, {}),
    "sequence parallel, recomputed": (
        "tp=2,pp=2", {"shared_size": 8}, {}, {"sequence_parallel": True, "recompute": "full"},
    ),
    "overlap of attention": ("dp=2,tp=2", {"shared_size": 8}, {}, {"tensor_overlap": 2, "sequence_parallel": True}),
    "router frozen": ("dp=2,tp=2", {}, {}, {"freeze": ("layers.1.mlp.router", "layers.0.mlp.experts")}),
    "only routers trained": (
        "tp=2,pp=2", {}, {"tie_embeddings": False},
        {"freeze": ("embed", "head", "norm", *(f"layers.{i}.{part}" for i in range(3) for part in (
            "attention", "mlp_norm", "mlp.experts")))},
    ),
    "zero 1": ("dp=2,tp=2", {"shared_size": 8}, {}, {"zero": 1}),
    "zero 2": ("dp=2,cp=2", FEW, {}, {"zero": 2}),
    "zero 3": ("dp=2,tp=2", {"shared_size": 8}, {}, {"zero": 3}),
    "hybrid zero": ("dp=4", {}, {}, {"zero": 1, "zero_group": 2}),
    "afab": ("pp=2", {}, {"num_layers": 5}, {"schedule": "afab"}),
    "interleaved": ("dp=2,pp=2", {}, {"num_layers": 5}, {"schedule": "interleaved", "micro_batches": 4, "zero": 2}),
    "zb-h1": ("pp=2", {"shared_size": 8}, {"num_layers": 5}, {"schedule": "zb-h1", "micro_batches": 4}),
    "zb-v": ("dp=2,pp=2", BIAS, {"num_layers": 5}, {"schedule": "zb-v", "micro_batches": 4}),
}  # fmt: skip
FAST = ("one device", "data", "tensor", "context, capacity")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CASES]
)
def test_equals_one_device(case: str) -> None:
    layout, moe, model, train = CASES[case]
    expect_equal(verify(layout, replace(SMALL, moe=replace(MOE, **moe), **model), replace(TWO_STEPS, **train)))


@pytest.mark.slow
def test_eight_ranks() -> None:
    expect_equal(verify("dp=2,cp=2,tp=2", replace(SMALL, moe=replace(MOE, **FEW)), TWO_STEPS))
    expect_equal(verify("dp=8", replace(SMALL, moe=replace(MOE, **BIAS)), replace(TWO_STEPS, zero=1)))


@pytest.mark.slow
def test_compiled_around_the_experts() -> None:
    report = verify(
        "dp=2", replace(SMALL, num_layers=2, moe=replace(MOE, dense_layers=1)), replace(TWO_STEPS, compile=True)
    )
    expect_equal(report)


# --- what must be noticed ---------------------------------------------------------------------------------


def biases_of_each_rank() -> None:
    """A mutant: biases follow the rank's own rows."""
    from picotron_mini.parallel import routers

    move, numbers = routers.move_bias, routers.Routers.numbers
    own: list[torch.Tensor] = []

    def noted(self):  # type: ignore[no-untyped-def]
        own.append(numbers(self))
        return own[-1]

    def wrong(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> torch.Tensor:
        mine = own[-1].view(len(bias), -1)[:, : bias.shape[1]].to(bias)
        return move(bias, mine, rate)

    routers.Routers.numbers, routers.move_bias = noted, wrong  # type: ignore[method-assign]


def noise_of_each_rank() -> None:
    """A mutant: every rank numbers its tokens from 0."""
    from picotron_mini.parallel import routers

    routers.data_rows = lambda *_: slice(0, 1)  # type: ignore[assignment]


def capacity_of_each_rank() -> None:
    """A mutant: a rank of cp drops as if its part were the sequence."""
    from picotron_mini.parallel import routers

    routers._whole = routers._part = lambda x, cp, how: x  # type: ignore[assignment]


def order_of_ranks() -> None:
    """A mutant: the parts of a sequence are put together by rank, not by position."""
    from picotron_mini.parallel import routers

    routers._positions = lambda tokens, cp, how: torch.arange(tokens)  # type: ignore[assignment]


def every_rank_adds_all_of_it() -> None:
    """A mutant: each tensor-parallel rank adds the whole auxiliary loss."""
    from picotron_mini.parallel import routers

    class Greedy(routers.Balance):
        def __init__(self, config, tokens, pool, pools, share, *rest):  # type: ignore[no-untyped-def]
            super().__init__(config, tokens, pool, pools, 1.0, *rest)

    routers.Balance = Greedy  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mutant", "layout", "moe", "quantity"),
    [
        (biases_of_each_rank, "dp=2", BIAS, "routing"),
        (noise_of_each_rank, "dp=2", {"jitter": 0.3}, "gradients"),
        (capacity_of_each_rank, "cp=2", FEW, "loss"),
        (order_of_ranks, "cp=2", FEW, "loss"),
        (every_rank_adds_all_of_it, "tp=2", {}, "gradients"),
    ],
)
def test_mutants_are_caught(mutant: Any, layout: str, moe: dict[str, Any], quantity: str) -> None:
    report = verify(layout, replace(SMALL, moe=replace(MOE, **moe)), TWO_STEPS, optimizers=["sgd"], patch=mutant)
    assert not report.ok
    assert max(d.error for d in report.differences if d.quantity == quantity) > 1e-6


# --- without processes ------------------------------------------------------------------------------------


def test_layouts_that_do_not_fit_are_refused() -> None:
    for moe, said in (
        (replace(MOE, expert_size=6), "tp=4 does not divide expert_size=6; tp could be 1 or 2"),
        (replace(MOE, shared_size=6), "tp=4 does not divide shared_size=6"),
        (replace(MOE, top_k=7), "top_k=7 is more than num_experts=5"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(RunConfig("tp=4", model=replace(SMALL, moe=moe), train=TRAIN))
    # where no layer has a dense MLP its width does not matter
    resolve(RunConfig("tp=4", model=replace(SMALL, moe=MOE, intermediate_size=6), train=TRAIN))
    with pytest.raises(ConfigError, match="does not divide intermediate_size=6"):
        resolve(
            RunConfig("tp=4", model=replace(SMALL, moe=replace(MOE, dense_layers=1), intermediate_size=6), train=TRAIN)
        )


def test_stages_are_balanced_by_active_weights() -> None:
    heavy = replace(MOE, expert_size=400, dense_layers=4)
    model = replace(SMALL, num_layers=6, moe=heavy, vocab_size=3)
    assert [len(layers) for layers in stage_layers(model, 2, 12)] == [5, 1]
    assert [len(layers) for layers in stage_layers(replace(model, moe=None), 2, 12)] == [3, 3]


def test_bytes_of_routers_are_what_the_formulas_say() -> None:
    def bytes_of(layout: str, train: dict[str, Any], **moe: Any) -> dict[tuple[str, str], int]:
        run = resolve(RunConfig(layout, model=replace(SMALL, moe=replace(MOE, **moe)), train=replace(TRAIN, **train)))
        return dict(predict_step(run, layout_of(run), coordinates(run.mesh, 0)))

    world = 24 + 8 * 3 * (5 + 5)
    quiet, loud = bytes_of("dp=2", {}, balance="none"), bytes_of("dp=2", {})
    assert quiet["world", "all_reduce"] == loud["world", "all_reduce"] == world
    assert loud["dp", "all_reduce"] - quiet["dp", "all_reduce"] == 3 * 3 * 8 * 5  # micro-batches, layers, experts
    assert bytes_of("dp=2", {}, aux_scope="sequence") == quiet
    each = bytes_of("cp=2", {}, aux_scope="sequence")
    assert each["cp", "all_reduce"] == 3 * 3 * 2 * 8 * 5  # ... and the sequences of a micro-batch
    for recompute, times in (("none", 1), ("selective", 2), ("full", 2)):
        few = bytes_of("cp=2", {"recompute": recompute}, capacity=1.0)
        assert few["cp", "all_gather"] == times * 3 * 3 * 2 * 6 * 2 * 8  # sequences, tokens here, choices, int64
        choose = bytes_of("cp=2", {"recompute": recompute}, **CHOOSE)
        assert choose["cp", "all_gather"] == times * 3 * 3 * 2 * 6 * 5 * 8  # scores in float64


# --- the whole way ----------------------------------------------------------------------------------------

FLAGS = (
    *("--preset", "moe-tiny", "--steps", "4", "--seq-len", "32", "--batch-size", "4", "--hidden-size", "32"),
    *("--num-experts", "4", "--expert-size", "16", "--num-layers", "2", "--eval-every", "2", "--eval-batches", "1"),
    *("--balance", "bias", "--bias-rate", "0.01", "--capacity", "1.0", "--device", "cpu"),
)


@pytest.mark.slow
def test_a_run_is_trained_saved_reported_and_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(3000)))
    for layout in ("dp=1", "tp=2,pp=2"):
        with pytest.raises(SystemExit) as end:
            main(["train", layout, *FLAGS, "--text", "text.txt", "--name", layout])
        assert end.value.code == 0, capfd.readouterr().err
    runs = [tmp_path / "runs" / layout for layout in ("dp=1", "tp=2,pp=2")]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for one, other in zip(*lines, strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["moe_drop_rate"] == pytest.approx(other["moe_drop_rate"], abs=0.01)
            assert len(one["moe_load"]) == 2 and sum(one["moe_load"][0]) == pytest.approx(1, abs=1e-4)
    for run in runs:
        page = (run / "report.html").read_text()
        assert "<h2>Experts</h2>" in page and "expert 3" in page and "Rows dropped" in page
        summary = json.loads((run / "summary.json").read_text())
        assert summary["active_parameters"] < summary["parameters"]
        assert [layer["layer"] for layer in summary["experts"]["layers"]] == [0, 1]
        for row in json.loads((run / "traffic.json").read_text())["per_step"]:
            assert row["predicted"] == row["counted"]
        config, state = load_hf(run / "weights")
        assert config.moe is not None and config.moe.balance == "bias"
        bias = state["layers.1.mlp.router.bias"]
        assert bias.any() and bias.abs().max() < 0.0401  # four steps of 0.01
    capfd.readouterr()
    for layout in ("1", "tp=2,pp=2"):
        with pytest.raises(SystemExit) as end:
            main(["generate", str(runs[1]), "line ", "--max-new-tokens", "5", "--temperature", "0", "--layout", layout])
        assert end.value.code == 0
    one, spread = (text for text in capfd.readouterr().out.split("line ") if text)
    assert one.strip() == spread.strip()
