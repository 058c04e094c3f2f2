"""What the ZeRO part of chapter 03 draws: the order in which units come and go, and bars of what a rank keeps."""

from __future__ import annotations

from xml.etree import ElementTree

import torch
from torch import nn

from picotron_mini.config import MeshShape
from picotron_mini.course.figures.zero import (
    Passage,
    Watched,
    draw_passages,
    draw_states,
    most_at_once,
    spans,
)
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.footprint import Footprint


def watched() -> list[Passage]:
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    layers = [nn.Linear(3, 3) for _ in range(3)]
    sharded = Watched(layers, dp)
    x = torch.ones(2, 3)
    for layer in layers:
        x = layer(x)
    x.sum().backward()
    sharded.after_backward()
    sharded.finish()
    return sharded.passages


def test_units_come_and_go(ranks) -> None:
    first, second = ranks(watched, world_size=2)
    assert first == second  # or their collectives would meet wrong ones
    told = " ".join(f"{what}{unit}" for what, unit in first)
    assert told == (
        "fetch0 here0 fetch1 freed0 here1 fetch2 freed1 here2 freed2 "
        "fetch2 here2 fetch1 freed2 reduce2 here1 fetch0 freed1 reduce1 here0 freed0 reduce0"
    )
    assert most_at_once(first) == 2  # one computes, the next one travels
    assert [span for span in spans(first) if span[1] == 1] == [
        ("on its way", 1, 2, 4), ("here", 1, 4, 6),
        ("on its way", 1, 11, 14), ("here", 1, 14, 16), ("gradient", 1, 17, 18),
    ]  # fmt: skip


def test_drawings() -> None:
    passages = [Passage(*each) for each in (("fetch", 0), ("here", 0), ("freed", 0), ("fetch", 0), ("here", 0))]
    passages += [Passage("freed", 0), Passage("reduce", 0)]
    picture = draw_passages(passages, ["block"], "one unit")
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert all(f">{text}<" in svg for text in ("block", "forward", "backward"))
    assert repr(picture) == "one unit"

    picture = draw_states({"plain": Footprint(20, 40, 40, 80)}, {"plain": 181}, 10)
    ElementTree.fromstring(picture._repr_svg_())
    assert ">18.00<" in picture._repr_svg_()
    assert "plain: 18.00" in repr(picture)
