"""Lossy sums: what is sent, what is owed, what of it `verify` says; and that nothing is lost where all is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape, RunConfig
from picotron_mini.dry_run import dry_run
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.compress import compression, sent
from picotron_mini.parity import table
from picotron_mini.verify import MODEL, TRAIN, verify

SIZES = [10, 4]


def summed(kind: str, keep: float, steps: int) -> tuple[list[torch.Tensor], dict[tuple[str, str], int]]:
    """On a rank: the sums of some steps, each of the same gradients with the flags behind, and the bytes of one."""
    axis = Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))["dp"]
    reduce = compression(kind, axis, keep)
    assert reduce is not None
    mine = torch.cat([torch.arange(14) * (0.1 + axis.index), torch.tensor([1.0, float(axis.index)])]).float()
    buffer, out = torch.empty(16), []
    for _ in range(steps):
        buffer.copy_(mine)
        with ledger.recording() as counted:
            reduce(buffer, SIZES).wait()
        out.append(buffer.clone())
    return out, dict(counted)


def whole(ranks: int) -> torch.Tensor:
    rows = [torch.cat([torch.arange(14) * (0.1 + r), torch.tensor([1.0, float(r)])]) for r in range(ranks)]
    return torch.stack(rows).sum(0)


@pytest.fixture(scope="module")
def three() -> dict[str, Any]:
    from picotron_mini.launch import launch

    cases = {"bf16": ("bf16", 1.0, 1), "all": ("topk", 1.0, 2), "some": ("topk", 0.2, 40)}
    return {name: launch(summed, *case, world_size=3, output="hide") for name, case in cases.items()}


def test_rounded_sums(three: dict[str, Any]) -> None:
    for (total,), counted in three["bf16"]:
        assert torch.allclose(total, whole(3), rtol=2**-7)
        assert not torch.equal(total[:14], whole(3)[:14])  # or nothing was rounded
        assert torch.equal(total[14:], torch.tensor([3.0, 3.0]))  # flags: how many ranks had one
        assert counted == {("dp", "all_reduce"): 2 * 16}


def test_all_entries_are_the_sum(three: dict[str, Any]) -> None:
    for totals, counted in three["all"]:
        for total in totals:
            assert torch.allclose(total, whole(3), rtol=1e-6)
        assert counted == {("dp", "all_gather"): 4 * (2 * 14 + 2)}


def test_what_is_not_sent_is_owed_and_not_lost(three: dict[str, Any]) -> None:
    for totals, counted in three["some"]:
        assert all(torch.equal(total[14:], torch.tensor([3.0, 3.0])) for total in totals)
        assert int((totals[0][:14] != 0).sum()) <= 3 * (2 + 1)  # ceil(0.2 * 10) and ceil(0.2 * 4) of three ranks
        # after many steps the mean of what was applied is the gradient, but for what is still owed
        mean = torch.stack(totals).mean(0)[:14]
        assert torch.allclose(mean, whole(3)[:14], atol=0.15 * float(whole(3)[:14].max()))
        assert torch.stack(totals)[:, 1].any()  # the smallest entry came as well
        assert counted == {("dp", "all_gather"): 4 * (2 * 3 + 2)}
    first = three["some"][0][0]
    for totals, _ in three["some"][1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, totals, strict=True))  # the same on every rank


def test_how_many_are_sent() -> None:
    assert [sent(n, 0.01) for n in (1, 100, 101, 1000)] == [1, 1, 2, 10]
    assert sent(7, 1.0) == 7


@pytest.mark.parametrize("train", [{"compress": "bf16"}, {"compress": "topk", "compress_keep": 0.3}])
def test_bytes_of_a_dry_run(train: dict[str, Any]) -> None:
    for layout in ("dp=2,tp=2", "dp=2,cp=2"):
        run = resolve(RunConfig(layout=layout, model=MODEL, train=replace(TRAIN, **train)))
        assert dry_run(run, 1).problems == []


@pytest.mark.slow
def test_nothing_is_lost_where_all_is_kept() -> None:
    report = verify("dp=2,tp=2", train=replace(TRAIN, compress="topk", compress_keep=1.0))
    assert report.ok, report.first_divergence
    assert report.lossy == "compress=topk"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "topk"])
def test_verify_says_that_it_is_lossy_and_by_how_much(kind: str) -> None:
    report = verify("dp=2", train=replace(TRAIN, compress=kind), optimizers=["sgd"])  # type: ignore[arg-type]
    assert not report.ok and not report.bytes_problems
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(report))
    assert f"NOT exact, and by choice: compress={kind} is lossy, and gradients differ by up to" in captured.get()
    error = next(d.error for d in report.differences if d.quantity == "gradients")
    assert (1e-4 < error < 0.05) if kind == "bf16" else error > 0.1


def test_refused_together_with_zero() -> None:
    train = replace(TRAIN, compress="bf16", zero=1)
    with pytest.raises(ConfigError, match="compress=bf16 is for whole gradients, and zero=1 cuts them; use zero=0"):
        resolve(RunConfig(layout="dp=2", model=MODEL, train=train))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compress_keep=0.0 must lie above 0"):
        resolve(RunConfig(layout="dp=2", model=MODEL, train=replace(TRAIN, compress_keep=0.0)))
