"""What `describe` prints: every parameter's place, and each byte of a step."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from picotron_mini.config import ModelConfig, RunConfig, TrainConfig
from picotron_mini.legality import resolve
from picotron_mini.mesh import coordinates
from picotron_mini.parallel.describe import describe
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.traffic import predict_step

MODEL = ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2)


def resolved(layout: str, **model: object) -> RunConfig:
    train = TrainConfig(seq_len=16, micro_batch_size=2, micro_batches=2, device="cpu")
    return resolve(RunConfig(layout=layout, model=replace(MODEL, **model), train=train))  # type: ignore[arg-type]


def shown(run: RunConfig) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(describe(run))
    return out.getvalue()


def row(text: str, *starts: str) -> list[str]:
    """The cells of the one row that begins with these cells."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines() if "│" in line]
    (found,) = [cells for cells in rows if cells[: len(starts)] == list(starts)]
    return found


def test_where_parameters_live() -> None:
    text = shown(resolved("dp=2,tp=2,pp=2"))
    assert row(text, "embed.weight") == ["embed.weight", "[97, 32]", "0, 1", "dim 0 over tp: 49+48", "dp, pp"]
    down = row(text, "layers.*.mlp.down.weight")
    assert down[1:] == ["[32, 64]", "0: layers 0-1; 1: layers 2-3", "dim 1 over tp: 32+32", "dp"]
    assert row(text, "layers.*.attention.k.weight")[3] == "dim 0 over tp: 8+8"
    assert row(text, "norm.weight")[1:] == ["[32]", "1", "whole", "dp"]
    assert "head.weight" not in text  # tied


def test_one_rank() -> None:
    text = shown(resolved("dp=1", tie_embeddings=False))
    assert row(text, "head.weight")[1:] == ["[97, 32]", "0", "whole", "nothing"]
    assert "all_reduce" not in text


def test_a_sequence_shared_by_trading_heads() -> None:
    run = resolved("dp=2,cp=2")
    run = replace(run, train=replace(run.train, context="ulysses", document_mask=True))
    text = shown(run)
    assert row(text, "cp", "all_to_all")[2].startswith("tokens against heads")
    assert row(text, "cp", "all_gather")[3] == f"{2 * 4 * 8 * 2 * 8:,}"  # micro-batches, layers, bytes, sequences, T/cp
    assert row(text, "norm.weight")[4] == "dp, cp"


def test_norms_on_heads_are_summed_over_their_ranks() -> None:
    assert row(shown(resolved("tp=2", qk_norm=True)), "layers.*.attention.q_norm.weight")[4] == "tp"


@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=3", "dp=2,tp=2,pp=2", "pp=4,dp=3", "cp=2,pp=2", "dp=2,cp=2"])
def test_every_byte_is_shown(layout: str) -> None:
    run = resolved(layout)
    text = shown(run)
    places = layout_of(run)
    firsts = [
        rank for rank in range(run.mesh.world_size) if rank % (run.mesh.dp * run.mesh.cp * run.mesh.tp) == 0
    ]  # of the stages
    predicted = [predict_step(run, places, coordinates(run.mesh, rank)) for rank in firsts]
    keys = {key for stage in predicted for key in stage}
    axes = {part.split("=")[0] for part in layout.split(",")}
    if "cp" in axes:  # gradients are summed over both at once
        axes = axes - {"dp"} | {"dp_cp"}
    assert {axis for axis, _ in keys} == axes | {"world"}
    for axis, operation in keys:
        cells = row(text, axis, operation)
        assert cells[2], "when it is sent"
        assert cells[3:] == [f"{stage[axis, operation]:,}" for stage in predicted]


def test_where_ranks_of_a_stage_differ_the_most_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from picotron_mini.parallel import describe as module

    def uneven(run: RunConfig, layout: object, index: dict[str, int]) -> Counter[tuple[str, str]]:
        return Counter({("tp", "all_reduce"): 1000 * index["pp"] + 10 * index["tp"] - index["dp"]})

    monkeypatch.setattr(module, "predict_step", uneven)
    text = shown(resolved("dp=2,tp=2,pp=2"))
    assert row(text, "tp", "all_reduce")[3:] == ["10", "1,010"]
    assert "where the ranks of a stage differ, the most" in " ".join(text.split())
