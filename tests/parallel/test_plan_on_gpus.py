"""Predictions beside what ran on one and two GPUs: the rows of summary/07_3d_parallel.md and summary/08_moe.md.

All rows that the present code can run. The rates of the preset `h100` are fitted to other rows, of one H100
(`test_plan.py`), but for three numbers: what a host needs for a layer and for a message, and what is not compiled
(`work.EAGER`, from the row of ZeRO 3 that is not). Rows of H200s are among them, the same processor with faster memory.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest

from picotron_mini.legality import resolve
from picotron_mini.parallel.machine import MACHINES
from picotron_mini.parallel.predict import Prediction, predict
from picotron_mini.presets import preset

FOUR = {"micro_batch_size": 4, "micro_batches": 4}
EIGHT = {"micro_batch_size": 4, "micro_batches": 8}
LONG = {"micro_batch_size": 1, "micro_batches": 4, "seq_len": 4096}
SHORT = {"micro_batch_size": 1, "micro_batches": 8, "seq_len": 512}
MIXED = {"experts": True, "micro_batch_size": 2, "micro_batches": 4}
WIDE = {"experts": True, "micro_batch_size": 4, "micro_batches": 2}
ALL = {"dispatch": "allgather"}
GRAPH = {"cuda_graph": True}

Row = tuple[str, dict[str, Any], float, float]  # layout, settings, ms of a step, peak GiB
MET: list[Row] = [
    ("dp=1", FOUR, 719, 47.8),
    ("dp=1", FOUR | GRAPH, 682, 47.8),
    ("dp=1", {"micro_batch_size": 6, "micro_batches": 3}, 777, 56.6),
    ("dp=1", SHORT | GRAPH, 176, 31.7),
    ("dp=2", FOUR, 734, 47.9),
    ("dp=2", FOUR | {"bucket_mb": 25.0}, 691, 47.8),  # an H200
    ("dp=2", FOUR | {"bucket_mb": 1e6}, 688, 47.8),
    ("dp=2", FOUR | GRAPH, 680, 47.8),
    ("dp=2", FOUR | {"zero": 1}, 743, 41.1),
    ("dp=2", {"micro_batch_size": 8, "micro_batches": 2, "zero": 1}, 668, 58.4),
    ("dp=2", FOUR | {"zero": 2}, 751, 34.9),
    ("dp=2", FOUR | GRAPH | {"zero": 2}, 729, 35.0),
    ("dp=2", FOUR | {"zero": 3}, 770, 32.8),
    ("dp=2", FOUR | {"zero": 3, "compile": False}, 1163, 44.3),
    ("dp=2", FOUR | {"zero": 3, "bucket_mb": 25.0}, 724, 32.8),  # an H200
    ("dp=2", FOUR | {"zero": 3, "masters": "split"}, 729, 31.1),
    ("dp=2", FOUR | {"zero": 3, "masters": "split", "loss_chunks": 2}, 736, 30.8),
    ("dp=2", FOUR | {"zero": 3, "masters": "split", "loss_chunks": 8}, 802, 30.3),
    ("tp=2", FOUR | {"sequence_parallel": True}, 450, 25.8),
    ("tp=2", FOUR | GRAPH | {"sequence_parallel": True}, 414, 25.8),
    ("tp=2", FOUR | {"sequence_parallel": True, "tensor_overlap": 2}, 539, 26.2),
    ("tp=2", FOUR | GRAPH | {"sequence_parallel": True, "tensor_overlap": 2}, 417, 25.8),
    ("tp=2", FOUR | GRAPH | {"sequence_parallel": True, "tensor_overlap": 4}, 448, 25.8),
    ("pp=2", EIGHT, 818, 33.7),
    ("pp=2", EIGHT | {"schedule": "interleaved"}, 799, 39.1),
    ("pp=2", EIGHT | {"schedule": "zb-h1", "compile": False}, 1170, 42.1),
    ("pp=2", EIGHT | {"schedule": "zb-v", "compile": False}, 1128, 47.0),
    ("cp=2", LONG | GRAPH, 301, 34.8),
    ("cp=2", LONG | {"context": "ulysses"}, 384, 34.8),
    ("cp=2", LONG | GRAPH | {"context": "ulysses"}, 270, 34.8),
    ("cp=2", {"micro_batch_size": 1, "micro_batches": 1, "seq_len": 32768, "recompute": "full"}, 1085, 35.1),
    ("dp=1", MIXED, 544, 101.8),
    ("dp=1", MIXED | GRAPH, 514, 101.8),
    ("dp=2,ep=2", MIXED | {"bucket_mb": 25.0}, 1035, 62.3),  # an H200
    ("dp=2,ep=2", MIXED | ALL | GRAPH, 553, 67.3),
    ("dp=2,ep=2", WIDE | ALL, 549, 83.8),
    ("dp=2,ep=2", WIDE | ALL | GRAPH, 498, 83.9),
    ("dp=2,ep=2", WIDE | ALL | GRAPH | {"dispatch_parts": 2}, 519, 83.9),
    ("dp=2,ep=2", WIDE | ALL | GRAPH | {"dispatch_parts": 4}, 559, 83.9),
]
# Where the host decides, and is another one, or has more to launch than is counted, or the other rank's is late.
MISSED: list[Row] = [
    ("dp=1", SHORT, 387, 31.7),
    ("dp=2,ep=2", MIXED, 1084, 62.6),
    ("dp=2,ep=2", MIXED | ALL, 898, 67.3),
]
ROWS = MET + MISSED


def predicted(layout: str, settings: dict[str, Any]) -> Prediction:
    train = {name: value for name, value in settings.items() if name != "experts"}
    run = preset("bench-moe" if "experts" in settings else "bench")
    run = replace(run, layout=layout, train=replace(run.train, batch_size=0, **train))
    return predict(resolve(run, gpus=2), MACHINES["h100"])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_memory_is_within_10_percent(row: Row) -> None:
    layout, settings, _, peak = row
    assert predicted(layout, settings).memory_bytes / 2**30 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("row", MET, ids=str)
def test_time_is_within_20_percent(row: Row) -> None:
    layout, settings, ms, _ = row
    assert 1000 * predicted(layout, settings).seconds == pytest.approx(ms, rel=0.2)


def places(values: list[float]) -> list[float]:
    """Each value's place in the order; of equal ones the mean of their places."""
    below = [sum(other < value for other in values) for value in values]
    return [first + (values.count(value) - 1) / 2 for first, value in zip(below, values, strict=True)]


def correlation(rows: list[Row]) -> float:
    """Spearman's rank correlation of measured and predicted speeds, in tokens a second and GPU."""
    measured, said = [], []
    for layout, settings, ms, _ in rows:
        found = predicted(layout, settings)
        said.append(found.tokens_per_second / found.run.mesh.world_size)
        measured.append(said[-1] * found.seconds / (ms / 1000))
    return statistics.correlation(places(measured), places(said))


def test_layouts_are_in_the_right_order() -> None:
    """Of all rows, missed ones too; and of those that one would choose between: one model and length, two H100s."""
    assert len(ROWS) == 42 and correlation(ROWS) > 0.9
    h100 = [row for row in ROWS if row[0] in ("dp=2", "tp=2", "pp=2") and row[1]["micro_batch_size"] == 4]
    h100 = [row for row in h100 if not {"cuda_graph", "bucket_mb"} & row[1].keys()]
    h100 = [row for row in h100 if "masters" not in row[1] or row[1].get("loss_chunks") == 8]
    assert len(h100) == 12 and correlation(h100) > 0.8


def test_what_a_host_makes_of_it() -> None:
    """Much where kernels are short or ranks ask each other; nothing where the step is recorded or kernels are long."""
    host = {str(row): predicted(*row[:2]).parts.get("host", 0.0) for row in ROWS}
    assert host[str(("dp=2,ep=2", MIXED, 1084, 62.6))] > 0.3
    assert all(host[str(row)] == 0.0 for row in ROWS if "cuda_graph" in row[1])
    assert all(host[str(row)] == 0.0 for row in MET if row[0] in ("dp=2", "tp=2", "pp=2"))
    assert host[str(("dp=1", SHORT, 387, 31.7))] > 0.2
