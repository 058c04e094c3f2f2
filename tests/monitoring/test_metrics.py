"""metrics.jsonl: what is written can be read, also after a kill, also when the numbers are not numbers."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path

import pytest
import torch

from picotron_mini.config import UserError
from picotron_mini.monitoring.metrics import MetricsWriter, Smoothed, memory_bytes, read_metrics
from picotron_mini.monitoring.units import bytes_text, count_text, number_text, seconds_text


def test_lines_come_back_in_order_and_are_flushed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(step=1, loss=torch.tensor(2.5), lr=1e-3)
        assert path.read_bytes().endswith(b"}\n")  # before close: a kill now loses nothing
        writer.write(step=1, val_loss=2.75, val_bits_per_byte=1.3, time=12.0)
    got = read_metrics(path)
    assert got.torn is None
    [training], [validation] = got.training, got.validation
    assert (training["step"], training["loss"], training["lr"]) == (1, 2.5, 1e-3)
    assert training["time"] > 1.7e9
    assert validation == {"step": 1, "val_loss": 2.75, "val_bits_per_byte": 1.3, "time": 12.0}


def test_numbers_that_are_not_finite_are_strings_in_the_file_and_floats_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(step=1, loss=math.nan, grad_norm=torch.tensor(math.inf), lr=-math.inf, mfu=None)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert (raw["loss"], raw["grad_norm"], raw["lr"], raw["mfu"]) == ("NaN", "Infinity", "-Infinity", None)
    [line] = read_metrics(path).lines
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["lr"] == -math.inf


def test_every_torn_end_is_tolerated_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(step=1, loss=2.0)
        writer.write(step=2, loss=1.0)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        got = read_metrics(path)
        assert [line["step"] for line in got.lines] == [1], whole[:cut]
        assert got.torn and "line 2 was cut short" in got.torn
    for cut in (second, len(whole) - 1, len(whole)):  # between two lines, without the newline, whole
        path.write_bytes(whole[:cut])
        assert read_metrics(path).torn is None
    path.write_bytes(whole[:second] + b"\xff\xfe\x00")
    assert read_metrics(path).torn


def test_a_bad_line_in_the_middle_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"step": ', "7", "\u00e9"):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n', encoding="latin-1")
        with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not a JSON object"):
            read_metrics(path)


def test_no_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist; give the folder of a run"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl").lines == []


def test_appending_cuts_off_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    with MetricsWriter(path) as writer:
        writer.write(step=2, loss=2)
    assert [line["loss"] for line in read_metrics(path).lines] == [3, 2]


def test_smoothed_is_unbiased_and_survives_nan() -> None:
    average = Smoothed(horizon=10)
    assert math.isnan(average.update(math.nan))
    assert average.update(5.0) == pytest.approx(5.0)  # without the correction it would be 0.5
    assert average.update(math.inf) == pytest.approx(5.0)
    expected = (0.9 * 0.1 * 5 + 0.1 * 3) / (0.9 * 0.1 + 0.1)
    assert average.update(3.0) == pytest.approx(expected)
    for _ in range(300):
        last = average.update(1.0)
    assert last == pytest.approx(1.0)


def test_memory_is_in_bytes_on_each_system(monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory_bytes("cpu")
    assert 50 << 20 < real < 64 << 30  # an interpreter with PyTorch: bytes, not KiB and not pages
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": peak})())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory_bytes(torch.device("cpu")) == peak
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory_bytes(torch.device("cpu")) == 1024 * peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_cuda_is_the_allocators_peak() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = memory_bytes("cuda")
    block = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    del block
    assert memory_bytes("cuda:0") >= before + (32 << 20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1536), "1.5 KiB"),
        (bytes_text(1023), "0.999 KiB"),
        (bytes_text(12_582_912), "12 MiB"),
        (bytes_text(None), "?"),
        (count_text(985), "985"),
        (count_text(3_021_312), "3.02 M"),
        (count_text(999_999), "1 M"),
        (count_text(1_810_000_000), "1.81 B"),
        (number_text(3.21449), "3.214"),
        (number_text(21302.4), "21,302"),
        (number_text(999.99), "1,000"),
        (number_text(math.nan), "nan"),
        (number_text(None), "?"),
        (seconds_text(75), "1:15"),
        (seconds_text(59.7), "1:00"),
        (seconds_text(7325), "2:02:05"),
        (seconds_text(None), "?"),
        (seconds_text(math.inf), "?"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected
