"""`picotron-mini bench`: that it measures what it says; how fast the machine is, is not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picotron_mini.bench import table
from picotron_mini.cli import main
from picotron_mini.config import ModelConfig as Model
from picotron_mini.config import RunConfig, TrainConfig
from picotron_mini.legality import resolve
from picotron_mini.mesh import coordinates
from picotron_mini.model.costs import parameters
from picotron_mini.monitoring.exposed import Exposed
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.traffic import predict_step

FLAGS = (
    *("--hidden-size", "32", "--num-heads", "4", "--num-kv-heads", "2", "--num-layers", "2"),
    *("--intermediate-size", "64", "--vocab-size", "101", "--seq-len", "16", "--steps", "3", "--warmup", "1"),
    *("--batch-size", "0", "--micro-batch-size", "2", "--micro-batches", "2", "--device", "cpu"),
)


@pytest.fixture
def measured(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)

    def run(layout: str, *flags: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            main(["bench", layout, *FLAGS, "--json", *flags])
        out, err = capfd.readouterr()
        assert end.value.code == 0, err
        assert err == ""
        assert list(tmp_path.iterdir()) == []  # it leaves nothing
        return json.loads(out)

    return run


@pytest.mark.parametrize("layout", ["dp=1", "dp=2", "tp=2", "pp=2", "cp=2"])
def test_measures(layout: str, measured: Callable[..., dict[str, Any]]) -> None:
    result = measured(layout)
    train = TrainConfig(seq_len=16, micro_batch_size=2, micro_batches=2, device="cpu")
    model = Model(
        vocab_size=101, hidden_size=32, num_heads=4, num_kv_heads=2, num_layers=2, intermediate_size=64, head_dim=8
    )
    run = resolve(RunConfig(layout=layout, model=model, train=train))
    assert result["parameters"] == parameters(model)
    assert (result["layout"], result["device"], result["dtype"], result["compile"]) == (layout, "cpu", "float32", False)
    assert (result["seq_len"], result["micro_batch_size"], result["micro_batches"]) == (16, 2, 2)
    seconds = result["step_seconds"]
    assert len(seconds) == 3 and all(s > 0 for s in seconds)  # warm-up steps are not among them
    tokens = 16 * 2 * 2 * run.mesh.dp
    assert result["tokens_per_second_per_rank"] == pytest.approx(tokens / sorted(seconds)[1] / run.mesh.world_size)
    assert result["mfu"] is None and result["matmul_tflops"] is None  # nobody knows the peak of this CPU
    assert result["peak_memory_bytes"] > 1 << 20
    predicted = predict_step(run, layout_of(run), coordinates(run.mesh, 0))
    assert result["bytes_per_step"] == {f"{axis} {operation}": n for (axis, operation), n in predicted.items()}


@pytest.mark.slow
def test_the_vocabulary_is_that_of_the_tokenizer_if_it_is_open(measured: Callable[..., dict[str, Any]]) -> None:
    found = {
        flags: measured("dp=1", "--vocab-size", "0", *flags.split())["parameters"]
        for flags in ("--tokenizer bytes", "--tokenizer bpe --tokenizer-size 300")
    }
    assert list(found.values()) == [measured("dp=1", "--vocab-size", size)["parameters"] for size in ("257", "300")]


def test_prints_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "dp=2", *FLAGS])
    assert end.value.code == 0
    out = capfd.readouterr().out
    for words in ("dp=2, cpu", "tokens/s per rank", "MFU", "not known on this device", "peak memory", "dp all_reduce"):
        assert words in out


def test_the_table_of_a_gpu() -> None:
    from rich.console import Console

    result = {
        "layout": "dp=1", "device": "H", "torch": "2", "parameters": 1234567, "tokens_per_second_per_rank": 45678.4,
        "step_seconds": [0.3, 0.1, 0.2], "mfu": 0.421, "peak_memory_bytes": 3 << 30, "bytes_per_step": {"dp x": 9000},
        "matmul_tflops": 712.3, "bucket_mb": 25.0,
        "exposed": Exposed(0.2, 0.15, 0.05, 0.03, [("gemm_kernel", 0.12)]).to_dict(),
    }  # fmt: skip
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(result))
    text = captured.get()
    for words in (
        "1,234,567",
        "45,678",
        "42.1 %",
        "0.200 s (0.100 to 0.300)",
        "GiB",
        "9,000 bytes",
        "712 TFLOP/s",
        "0.030 s (15.0 %)",
        "0.020 s (10.0 %)",
        "gemm_kernel",
    ):
        assert words in text
