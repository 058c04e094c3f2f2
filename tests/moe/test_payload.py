"""Rows that travel in fewer bits: what arrives, what that costs, and that it is what one device rounds the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import Function

from picotron_mini.config import ConfigError, MeshShape, RunConfig
from picotron_mini.dry_run import dry_run
from picotron_mini.legality import resolve
from picotron_mini.mesh import coordinates
from picotron_mini.model import moe
from picotron_mini.model.moe import Experts, local_dispatch
from picotron_mini.moe import dispatch, exchange, payload
from picotron_mini.moe.exchange import UnevenExchange
from picotron_mini.moe.payload import pack, unpack
from picotron_mini.parallel.machine import MACHINES
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.predict import predict
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.parity import table
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, verify

KINDS = ["bf16", "fp8"]
SMALL = replace(MODEL, num_layers=2, moe=EXPERTS)

# --- one message ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_and_a_scale_for_each_row(dtype: torch.dtype) -> None:
    size = torch.logspace(-20, 20, 9)[:, None]  # rows of very different size
    x = (torch.randn(9, 64, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    message = pack(x, "fp8")
    assert message.dtype == torch.uint8 and message.shape == (9, 64 + 4) and message.is_contiguous()
    got = unpack(message, "fp8", dtype)
    assert got.dtype == dtype
    largest = x.abs().amax(1, keepdim=True)
    # half a unit in the last of three bits, or half of the least step, 2^-9; bf16 rounds once more
    bound = (x.abs() * 2**-4).maximum(largest / 448 * 2**-10).double() * (1 + 2**-4)
    assert ((got.double() - x.double()).abs() <= bound).all()
    assert not torch.equal(got, x)
    assert torch.allclose(got.abs().amax(1), largest[:, 0], rtol=1e-6 if dtype != torch.bfloat16 else 2**-8)


def test_rows_of_zeros_and_no_rows() -> None:
    assert unpack(pack(torch.zeros(2, 3), "fp8"), "fp8", torch.float32).eq(0).all()
    assert unpack(pack(torch.zeros(0, 3), "fp8"), "fp8", torch.float32).shape == (0, 3)
    one = torch.tensor([[1.0, 2.0, 4.0]])  # a width that no number of 4 bytes divides
    assert unpack(pack(one, "fp8"), "fp8", torch.float32).shape == (1, 3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_is_not_hidden(bad: float) -> None:
    got = unpack(pack(torch.tensor([[1.0, bad], [1.0, 2.0]]), "fp8"), "fp8", torch.float32)
    assert not got[0].isfinite().all() and torch.allclose(got[1], torch.tensor([1.0, 2.0]), rtol=2**-4)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    x = torch.randn(5, 8)
    x[3] *= 1e6
    assert torch.equal(unpack(pack(x, "fp8"), "fp8", x.dtype)[1:2], unpack(pack(x[1:2], "fp8"), "fp8", x.dtype))


# --- one device that rounds the same way ------------------------------------------------------------------


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def fp8(x: Tensor) -> Tensor:
    """Written out, and not with the library's own."""
    scale = (x.abs().max(-1, keepdim=True).values / 448).float().to(x.dtype)
    return torch.where(scale > 0, (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale, x)


class Rounded(Function):
    """x, rounded in one way, with a gradient that is rounded in another."""

    @staticmethod
    def forward(ctx, x, there, home):  # type: ignore[no-untyped-def]
        ctx.home = home
        return there(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.home(grad), None, None


def as_if_sent(kind: str, ranks: int) -> Callable[..., Tensor]:
    """A dispatch of one device, whose rows are rounded as if its experts were spread over so many ranks."""
    there, home = {"bf16": (bf16, bf16), "fp8": (fp8, bf16)}[kind]

    def send(x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None = None) -> Tensor:
        held, y = len(run.gate) // ranks, torch.zeros_like(x)
        for rank in range(ranks):
            here = torch.where(experts // held == rank, experts, -1)
            tokens = (here >= 0).any(1).nonzero()[:, 0]
            rows = Rounded.apply(x[tokens], there, home)
            out = local_dispatch(rows, here[tokens], weights[tokens], run)
            y = y.index_add(0, tokens, Rounded.apply(out, home, there))
        return y if shared is None else y + shared(x)

    return send


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alone": ("dp=2,ep=2", "fp8", {}),
    "bf16": ("dp=2,ep=2", "bf16", {}),
    "two copies, in parts": ("dp=4,ep=2", "fp8", {"dispatch_parts": 3}),
    "four ranks, recomputed": ("dp=2,cp=2,ep=4", "fp8", {"seq_len": 16, "recompute": "full"}),
    "zero 3, MLPs recomputed": ("dp=4,ep=2", "fp8", {"zero": 3, "recompute": "selective"}),
    "zero 1, in stages": ("dp=2,pp=2,ep=2", "fp8", {"zero": 1, "schedule": "zb-h1"}),
}


@pytest.mark.parametrize("case", [c if c == "alone" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_equals_one_device_that_rounds_the_same_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` with another reference: its dispatch is replaced in this process, in which the ranks are not."""
    layout, kind, train = CASES[case]
    monkeypatch.setattr(moe, "dispatch_all", as_if_sent(kind, MeshShape.parse(layout).ep))
    model = replace(SMALL, num_layers=MeshShape.parse(layout).pp + 1)
    settings: dict[str, Any] = {"steps": 2, "dispatch_payload": kind, **train}
    report = verify(layout, model, replace(TRAIN, **settings))
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"first {report.first_divergence}; {found}; {report.bytes_problems}"


def scale_of_all_rows() -> None:
    """A mutant: one scale for all rows of a message, which other layouts put together in other ways."""
    real = exchange.pack

    def wrong(x: Tensor, form: payload.Form) -> Tensor:
        if form != "fp8" or not len(x):
            return real(x, form)
        scale = (x.abs().max() / 448).float()
        codes = (x / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([scale.expand(len(x), 1).contiguous().view(torch.uint8), codes], 1)

    exchange.pack = wrong


def all_in_eight_bits() -> None:
    """A mutant: what comes back from the experts goes in 8 bits too."""
    dispatch.FORMS = {"fp8": ("fp8", "fp8")}


def gradients_the_other_way() -> None:
    """A mutant: the gradients of outputs travel as outputs do, and those of rows as rows."""
    real = UnevenExchange.__init__

    def wrong(
        self: UnevenExchange, axis: Any, sends: Any, receives: Any, out: Any = "same", back: Any = "same"
    ) -> None:
        real(self, axis, sends, receives, out, out)

    UnevenExchange.__init__ = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("mutant", [scale_of_all_rows, all_in_eight_bits, gradients_the_other_way])
def test_mutants_are_caught(mutant: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "dispatch_all", as_if_sent("fp8", 2))
    settings: dict[str, Any] = {"steps": 1, "dispatch_payload": "fp8"}
    report = verify("dp=2,ep=2", SMALL, replace(TRAIN, **settings), optimizers=["sgd"], patch=mutant)
    assert report.max_rel_err > 1e-6, report.to_dict()
    assert bool(report.bytes_problems) == (mutant is not scale_of_all_rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_tensor_parallelism_the_error_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the partial sums of the tp ranks are rounded each by itself, on their way back: no more than bf16 does."""
    monkeypatch.setattr(moe, "dispatch_all", as_if_sent(kind, 2))
    settings: dict[str, Any] = {"steps": 1, "dispatch_payload": kind, "sequence_parallel": True}
    report = verify("dp=2,tp=2,ep=2", SMALL, replace(TRAIN, **settings), optimizers=["sgd"])
    errors = {d.quantity: d.error for d in report.differences}
    assert 1e-9 < errors["gradients"] < 0.02 and errors["loss"] < 1e-3, errors
    assert not report.bytes_problems


# --- what is said of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_verify_says_that_it_is_lossy_and_by_how_much(kind: str) -> None:
    settings: dict[str, Any] = {"steps": 1, "dispatch_payload": kind}
    report = verify("dp=2,ep=2", SMALL, replace(TRAIN, **settings), optimizers=["sgd"])
    assert report.lossy == f"dispatch_payload={kind}" and not report.ok and not report.bytes_problems
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(report))
    assert f"NOT exact, and by choice: dispatch_payload={kind} is lossy, and gradients differ by" in captured.get()
    errors = {d.quantity: d.error for d in report.differences}
    assert 1e-4 < errors["gradients"] < (0.02 if kind == "bf16" else 0.2), errors
    assert errors["loss"] < 1e-2, errors


def test_both_ways_of_losing_are_named() -> None:
    settings: dict[str, Any] = {"steps": 1, "dispatch_payload": "fp8", "compress": "bf16"}
    report = verify("dp=2,ep=2", SMALL, replace(TRAIN, **settings), optimizers=["sgd"])
    assert report.lossy == "compress=bf16 with dispatch_payload=fp8" and not report.bytes_problems


def test_within_a_wide_tolerance_it_is_not_called_equal() -> None:
    from picotron_mini.parity import Difference, Report

    found = [Difference("gradients", 0.01, "", 0.02)]
    assert table(Report("dp=2,ep=2", found, {}, {})).title == "dp=2,ep=2: equal to one device"
    assert table(Report("dp=2,ep=2", found, {}, {}, lossy="dispatch_payload=fp8")).title == (
        "dp=2,ep=2: within tolerance of one device, though dispatch_payload=fp8 is lossy"
    )


@pytest.mark.parametrize(
    ("layout", "train", "said"),
    [
        ("dp=2", {"dispatch_payload": "fp8"}, "dispatch_payload=fp8 is for experts on several ranks, and ep=1; use"),
        (
            "dp=2,ep=2",
            {"dispatch_payload": "bf16", "dtype": "bfloat16"},
            "dispatch_payload=bf16 narrows nothing with dtype=bfloat16",
        ),
    ],
)
def test_refused_where_it_does_nothing(layout: str, train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(RunConfig(layout, model=SMALL, train=replace(TRAIN, **train)))


# --- bytes ------------------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    """10 rows sent and 20 received, of width 32, top-3: by way there, way back, and what is beside them."""
    model = replace(SMALL, num_layers=1, moe=replace(EXPERTS, dense_layers=0))

    def bytes_of(kind: str, dtype: str) -> int:
        train = replace(TRAIN, dispatch_payload=kind, dtype=dtype)  # type: ignore[arg-type]
        run = resolve(RunConfig("dp=2,ep=2", model=model, train=train))
        return predict_step(run, layout_of(run), coordinates(run.mesh, 0), {0: (10, 20)})["ep", "all_to_all"]

    for dtype, g in (("float64", 8), ("float32", 4), ("bfloat16", 4)):
        beside = 2 * 3 * g * (10 + 20)
        assert bytes_of("fp8", dtype) == 2 * (10 * (32 + 4) + 20 * 32 * 2) + beside
        if dtype != "bfloat16":
            assert bytes_of("bf16", dtype) == 2 * (10 + 20) * 32 * 2 + beside


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        ("dp=2,ep=2", {"dispatch_payload": "bf16", "dispatch_parts": 2}),
        ("dp=4,ep=2", {"dispatch_payload": "fp8", "dtype": "bfloat16", "zero": 1}),
        ("dp=2,tp=2,ep=2", {"dispatch_payload": "fp8", "sequence_parallel": True, "recompute": "full"}),
        ("dp=4,ep=2", {"dispatch_payload": "fp8", "expert_replicas": 1, "zero": 3}),
    ],
)
def test_bytes_of_a_dry_run(layout: str, train: dict[str, Any]) -> None:
    assert dry_run(resolve(RunConfig(layout, model=SMALL, train=replace(TRAIN, **train))), 1).problems == []


def test_the_planner_knows_that_less_is_sent() -> None:
    runs = {
        kind: resolve(
            RunConfig("dp=4,ep=4", model=SMALL, train=replace(TRAIN, dtype="bfloat16", dispatch_payload=kind))  # type: ignore[arg-type]
        )
        for kind in ("same", "fp8")
    }
    slow = replace(MACHINES["h100"], inside={"": replace(MACHINES["h100"].inside[""], latency=0.0, bandwidth=1e6)})
    plain, less = (predict(run, slow) for run in runs.values())
    assert less.traffic["ep", "all_to_all"] < plain.traffic["ep", "all_to_all"]
    ratio = less.traffic["ep", "all_to_all"] / plain.traffic["ep", "all_to_all"]
    assert less.parts["ep"] / plain.parts["ep"] == pytest.approx(ratio, rel=0.1)
