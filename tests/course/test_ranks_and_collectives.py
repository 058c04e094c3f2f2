"""What chapter 00 shows: the sums made from messages, what they send, and the drawings."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape
from picotron_mini.course.figures.collectives import COLLECTIVES, draw_collective, draw_mesh
from picotron_mini.course.rings import (
    naive_all_reduce,
    ring_all_reduce,
    ring_seconds,
    tree_all_reduce,
    tree_seconds,
)
from picotron_mini.mesh import Mesh

LENGTH = 60  # 1, 2, 3, 4 and 5 ranks divide it


def sums(size: int) -> dict[str, tuple[torch.Tensor, bool, int]]:
    axis = Mesh.build(MeshShape(dp=size))["dp"]
    x = torch.arange(LENGTH, dtype=torch.float64).reshape(-1, 1) + 1000 * axis.index
    out = {}
    for fn in (naive_all_reduce, ring_all_reduce, tree_all_reduce):
        before = x.clone()
        with ledger.recording() as sent:
            got = fn(x, axis)
        assert set(sent) <= {("dp", "send")}
        out[fn.__name__] = (got, torch.equal(x, before), sum(sent.values()))
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sums_from_messages(ranks, size: int) -> None:
    total = sum(torch.arange(LENGTH, dtype=torch.float64).reshape(-1, 1) + 1000 * rank for rank in range(size))
    whole = LENGTH * 8
    tree_bytes = 0
    for rank, results in enumerate(ranks(sums, size, world_size=size)):
        for name, (got, untouched, _) in results.items():
            assert torch.equal(got, total), f"{name} on rank {rank}"
            assert untouched, name
        assert results["naive_all_reduce"][2] == (size - 1) * whole
        assert results["ring_all_reduce"][2] == 2 * (size - 1) * whole // size
        assert results["tree_all_reduce"][2] <= max(1, math.ceil(math.log2(size))) * whole
        tree_bytes += results["tree_all_reduce"][2]
    assert tree_bytes == 2 * (size - 1) * whole  # all together as much as the ring


def test_the_model_of_time() -> None:
    assert ring_seconds(8e9, 4, latency=0.0, bandwidth=1e9) == pytest.approx(12.0)  # 1.5 S
    assert tree_seconds(8e9, 4, latency=0.0, bandwidth=1e9) == pytest.approx(32.0)  # 4 S
    assert ring_seconds(0, 8, latency=1.0, bandwidth=1e9) == 14
    assert tree_seconds(0, 8, latency=1.0, bandwidth=1e9) == 6
    assert tree_seconds(0, 5, latency=1.0, bandwidth=1e9) == 6


@pytest.mark.parametrize("name", COLLECTIVES)
def test_drawings(name: str) -> None:
    picture = draw_collective(name)
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert "<text" in svg  # letters, not outlines: they can be searched and are small
    assert len(svg) < 60_000
    assert svg == draw_collective(name)._repr_svg_()  # the same each time
    assert name.replace("_", "-") in repr(picture)


def test_drawing_of_a_mesh() -> None:
    picture = draw_mesh(MeshShape(pp=2, dp=2, tp=2))
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert all(f">{rank}<" in svg for rank in range(8))
    assert all(
        svg.count(f">{axis}={index}<") == (1 if axis == "pp" else 2) for axis in ("pp", "dp", "tp") for index in (0, 1)
    )
    assert "0 and 4" in repr(picture)
