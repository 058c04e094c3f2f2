"""What chapter 06 shows beside the library: who computes which chunks, prices, and a learner's test for the museum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape, ModelConfig, TrainConfig
from picotron_mini.course.figures.context import border, draw_bytes, draw_pairs, draw_work, layer_bytes, ring_pairs
from picotron_mini.course.figures.picture import Picture
from picotron_mini.course.instruments.largest import Largest
from picotron_mini.course.museum import kill
from picotron_mini.course.tasks import chapter_06_shares
from picotron_mini.legality import context_problems
from picotron_mini.mesh import Mesh
from picotron_mini.model.gpt import attend
from picotron_mini.parallel.context import ring_attention
from picotron_mini.parallel.ulysses import ulysses_attention

pytestmark = pytest.mark.slow  # each check starts ranks

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    "picture",
    [draw_pairs(4), draw_work(4, 4096), draw_bytes(32, (32, 8, 2), (2, 4, 8))],
    ids=["pairs", "work", "bytes"],
)
def test_drawings(picture: Picture) -> None:
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert "<text" in svg and len(svg) < 60_000
    assert len(repr(picture)) > 100


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_the_triangle_is_computed_once_and_every_step_is_equal(cp: int) -> None:
    pairs = ring_pairs(cp)
    assert sorted((p.queries, p.keys) for p in pairs) == [(q, k) for q in range(2 * cp) for k in range(q + 1)]
    cost: Counter[tuple[int, int]] = Counter()
    for p in pairs:
        cost[p.rank, p.step] += 1 if p.queries == p.keys else 2  # half a square on the diagonal
    assert set(cost.values()) == {4} and len(cost) == cp * cp


def sent(how: str, cp: int, kv_heads: int, dtype: torch.dtype) -> int:
    axis = Mesh.build(MeshShape(cp=cp))["cp"]
    q, k, v = (torch.randn(2, heads, 4, 8).to(dtype).requires_grad_() for heads in (6, kv_heads, kv_heads))
    with ledger.recording() as record:
        out = ring_attention(q, k, v, axis) if how == "ring" else ulysses_attention(q, k, v, axis, None, attend)
        out.sum().backward()
    return sum(record.values())


@pytest.mark.parametrize(
    ("how", "kv_heads", "dtype"),
    [
        ("ring", 2, torch.bfloat16),
        ("ring", 3, torch.float64),
        ("ulysses", 3, torch.bfloat16),
        ("ulysses", 6, torch.float32),
    ],
)
def test_the_price_of_a_layer_is_what_the_ledger_counts(
    ranks: Ranks, how: str, kv_heads: int, dtype: torch.dtype
) -> None:
    want = layer_bytes(how, 3, 2 * 4 * 6 * 8, 2 * 4 * kv_heads * 8, dtype.itemsize)
    assert ranks(sent, how, 3, kv_heads, dtype, world_size=3) == [want] * 3


@pytest.mark.parametrize("cp", [2, 3, 8])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_at_the_border_both_send_the_same(cp: int, itemsize: int) -> None:
    share = border(cp, itemsize)
    keys = 1000 * share
    both = [layer_bytes(how, cp, 1000, keys, itemsize) for how in ("ring", "ulysses")]  # type: ignore[arg-type]
    assert both[0] == pytest.approx(both[1])
    assert share == pytest.approx(1 / (2 * (cp - 1)) if itemsize == 2 else 2 / (3 * cp - 4))


def test_the_picture_says_where_ulysses_is_refused() -> None:
    words = repr(draw_bytes(32, (8,), (2, 4, 8, 16)))
    train = TrainConfig(seq_len=64, context="ulysses")
    model = ModelConfig(hidden_size=64, num_heads=32, num_kv_heads=8)
    ring = [cp for cp in (2, 4, 8, 16) if context_problems(model, MeshShape(cp=cp), train) or border(cp, 2) > 8 / 32]
    assert ring == [2, 16] and f"cp={ring}" in words


def test_no_case_of_the_exercise_is_a_tie() -> None:
    for case in chapter_06_shares.CASES:
        counted = [
            layer_bytes(how, case.cp, case.num_heads, case.num_kv_heads, case.bytes_per_number)
            for how in ("ring", "ulysses")
        ]
        assert not chapter_06_shares._legal(case) or counted[0] != counted[1], case


def test_largest_sees_the_largest() -> None:
    with Largest() as largest:
        x = torch.ones(3, 5)
        (x[:, :1] @ x[:1, :].repeat(1, 4)).sum()
    assert largest.elements == 60


def gradients_are_those_of_all_keys(mesh: Mesh) -> None:
    """A learner's test: without a mask, both ranks together, against one device."""
    axis = mesh["cp"]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2, 8, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    everything = [x.clone().requires_grad_() for x in whole]
    attend_to_all = torch.nn.functional.scaled_dot_product_attention(*everything)
    attend_to_all.square().sum().backward()
    q, k, v = (x.chunk(2, 2)[axis.index].clone().requires_grad_() for x in whole)
    ring_attention(q, k, v, axis, causal=False).square().sum().backward()
    for part, full in zip((q, k, v), everything, strict=True):
        assert part.grad is not None and full.grad is not None
        torch.testing.assert_close(part.grad, full.grad.chunk(2, 2)[axis.index], rtol=0, atol=1e-10)


def only_the_output_is_right(mesh: Mesh) -> None:
    """A test that looks at the forward does not notice."""
    q, k, v = (torch.ones(1, 2, 4, 4) for _ in range(3))
    torch.testing.assert_close(ring_attention(q, k, v, mesh["cp"]), v)


def test_a_test_of_gradients_kills_the_exhibit_and_one_of_outputs_does_not() -> None:
    name = "06.probabilities_of_one_block"
    assert kill(name, gradients_are_those_of_all_keys, record=False).passed
    outcome = kill(name, only_the_output_is_right, record=False)
    assert outcome.status == "failed" and "passes with the bug" in outcome.hint
