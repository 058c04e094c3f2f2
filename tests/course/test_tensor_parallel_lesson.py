"""What chapter 04 shows beside the library: drawings, which ranks need which heads, and when cutting a layer pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini import collectives
from picotron_mini.config import MeshShape, ModelConfig
from picotron_mini.course.exercises import exercise, judge, one_line
from picotron_mini.course.figures.picture import Picture
from picotron_mini.course.figures.tensor import draw_heads, draw_pair, ranks_of_heads
from picotron_mini.course.instruments.tensor_time import block_times, exchange_ratio, layer_of_width
from picotron_mini.launch import RankError
from picotron_mini.legality import layout_problems
from picotron_mini.mesh import Axis
from picotron_mini.model.costs import layer_flops


@pytest.mark.parametrize("picture", [draw_pair(), draw_heads(8, 4, (2, 4, 8))], ids=["pair", "heads"])
def test_drawings(picture: Picture) -> None:
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert "<text" in svg and len(svg) < 60_000


def test_the_drawing_says_what_the_library_refuses() -> None:
    words = repr(draw_heads(8, 4, (2, 4, 8)))
    for tp in (2, 4, 8):
        model = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=4)
        refused = bool(layout_problems(model, MeshShape(tp=tp)))
        assert (f"tp={tp}, refused" in words) == refused


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(8, 4, 2), (8, 4, 8), (12, 3, 6), (6, 6, 3), (8, 1, 4)])
def test_a_key_value_head_is_needed_where_its_queries_are(heads: int, kv_heads: int, tp: int) -> None:
    queries, keys = ranks_of_heads(heads, kv_heads, tp)
    assert [queries.count(rank) for rank in range(tp)] == [heads // tp] * tp
    for query, rank in enumerate(queries):
        assert rank in keys[query * kv_heads // heads]
    assert all(len(ranks) == 1 for ranks in keys) == (kv_heads % tp == 0)


def test_the_ratio_of_exchanges_and_products() -> None:
    layer = layer_of_width(768)
    assert layer.num_heads * layer.head_dim == layer.hidden_size == 768 and layer.intermediate_size == 2048
    seq_len, flops, link = 512, 1e12, 1e9
    one = exchange_ratio(layer, seq_len, 2, 4, flops, link)
    # two ranks, by hand: a ring sends as much as the payload; 4 all_reduces of 768 float32 a token
    assert one == pytest.approx((4 * 768 * 4 / link) / (3 * layer_flops(layer, seq_len) / (2 * flops)))
    assert exchange_ratio(layer, seq_len, 8, 4, flops, link) == pytest.approx(7 * one)
    assert exchange_ratio(layer, seq_len, 1, 4, flops, link) == 0
    assert exchange_ratio(layer, seq_len, 2, 2, flops, link) == pytest.approx(one / 2)


def sent_while_timing() -> tuple[set[tuple[int, int]], bool, int]:
    with collectives.ledger.recording() as sent:
        times = block_times((64,), (1, 2, 4), 8, 2)
    good = all(0 < seconds < 60 for pair in times.values() for seconds in pair)
    return set(times), good, sum(sent.values())


def test_block_times_measure_the_exchanges_of_the_ranks_that_work(ranks) -> None:
    results = ranks(sent_while_timing, world_size=4)
    one = 2 * 4 * 8 * 64 * 4  # two rounds of four all_reduces of [8, 64] float32
    for rank, (cases, good, sent) in enumerate(results):
        sizes = [tp for tp in (1, 2, 4) if rank < tp]
        assert cases == {(64, tp) for tp in sizes} and good
        # one layer for each size that this rank takes part in, and none for those without exchanges or at rest
        assert sent == one * len([tp for tp in sizes if tp > 1]), rank


def test_gathering_the_logits_is_told_by_its_bytes_even_where_it_fails() -> None:
    def gather(logits: torch.Tensor, targets: torch.Tensor, vocabulary: tuple[int, int], axis: Axis) -> torch.Tensor:
        whole = collectives.all_gather(logits, axis, -1, 11)
        raise RuntimeError(f"something about {whole.shape}")

    def fails(logits: torch.Tensor, targets: torch.Tensor, vocabulary: tuple[int, int], axis: Axis) -> torch.Tensor:
        raise RuntimeError("nothing was sent")

    item = exercise("04.split_loss")
    assert "3 numbers a token" in judge(item, gather).hint
    assert judge(item, fails).hint.endswith("RuntimeError: nothing was sent")


def test_a_gradient_that_is_wrong_by_a_factor_is_told_with_rank_input_and_factor() -> None:
    def answer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: Axis) -> torch.Tensor:
        return collectives.reduce_from(x @ weight.T, axis) + 3 * bias - 2 * bias.detach()

    hint = judge(exercise("04.row_linear"), answer).hint
    assert hint == "the value is right, and on rank 0 the gradient of bias is not: it is 3 times what it should be"


def test_an_input_without_gradient_is_told_with_its_rank() -> None:
    def answer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: Axis) -> torch.Tensor:
        return collectives.reduce_from(x @ (weight if axis.index == 0 else weight.detach()).T, axis) + bias

    hint = judge(exercise("04.row_linear"), answer).hint
    assert hint.startswith("the value is right, and on rank 1 no gradient comes back to weight")


def test_a_hook_on_a_view_is_an_entry() -> None:
    def answer(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        y = x.view_as(x)
        y.register_hook(lambda gradient: collectives.all_reduce(gradient, axis))
        return y

    assert judge(exercise("04.copy_to"), answer).passed


def rows_answer(
    weight: Callable[[Tensor, Axis], Tensor], enter: Callable[[Tensor, Axis], Tensor]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Axis], Tensor]:
    """An answer to 04.mlp_on_rows that does `weight` to the norm's weight and has the entry `enter`."""

    def answer(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
        rows = enter(F.rms_norm(x, norm.shape, weight(norm, axis)), axis)
        return collectives.scatter_to(F.silu(rows @ up.T) @ down.T, axis, 0)

    return answer


def hooked(norm: Tensor, axis: Axis) -> Tensor:
    norm.register_hook(lambda gradient: collectives.all_reduce(gradient, axis))
    return norm


def gather(x: Tensor, axis: Axis) -> Tensor:
    return collectives.gather_from(x, axis, 0)


def own_rows_back(x: Tensor, axis: Axis) -> Tensor:
    """The rows of all ranks, of which only the own ones have a gradient."""
    others = list(collectives.all_gather(x.detach(), axis, 0).chunk(axis.size))
    others[axis.index] = x
    return torch.cat(others)


def test_a_hook_on_the_norms_weight_adds_up_its_gradient() -> None:
    assert judge(exercise("04.mlp_on_rows"), rows_answer(hooked, gather)).passed


def test_of_two_mistakes_with_rows_the_first_in_the_order_of_backward_is_told() -> None:
    item = exercise("04.mlp_on_rows")
    hints = {mistake.name: mistake.hint for mistake in item.mistakes}
    assert judge(item, rows_answer(lambda norm, axis: norm, own_rows_back)).hint == hints["own rows of the gradient"]
    assert judge(item, rows_answer(hooked, own_rows_back)).hint == hints["own rows of the gradient"]
    assert judge(item, rows_answer(lambda norm, axis: norm, gather)).hint == hints["norm not summed"]


def test_mistakes_with_rows_that_nobody_planted_are_told_by_rank_and_quantity() -> None:
    def told(answer: Callable[..., object]) -> str:
        return judge(exercise("04.mlp_on_rows"), answer).hint

    twice = rows_answer(lambda norm, axis: hooked(collectives.copy_to(norm, axis), axis), gather)
    assert told(twice).endswith("on rank 0 the gradient of norm is not: it is 2 times what it should be")
    assert told(rows_answer(lambda norm, axis: norm.detach(), gather)).endswith("no gradient comes back to norm")
    assert told(rows_answer(lambda norm, axis: 2 * norm, gather)) == "on rank 0 the value is not that of one device"
    assert told(lambda x, norm, up, down, axis: x[:1]).endswith("its rows of the result are [4, 3], not [1, 3]")
    assert told(lambda x, norm, up, down, axis: [x]).endswith("its rows of the result are [4, 3], not list")


def test_what_fits_two_ranks_alone_is_not_enough_with_rows() -> None:
    def told(answer: Callable[..., object]) -> str:
        return judge(exercise("04.mlp_on_rows"), answer).hint

    def two_only(*inputs: Any) -> Tensor:
        if inputs[-1].size != 2:
            raise ValueError("made for two")
        return rows_answer(hooked, gather)(*inputs)

    assert told(two_only) == "right on 2 ranks, and on 3 it fails: ValueError: made for two"
    twice = rows_answer(lambda norm, axis: hooked(norm, axis) * (axis.size / 2), gather)
    assert told(twice).startswith("right on 2 ranks, and with 3 ranks and other sizes: on rank 0 the value is not")


def test_six_exchanges_are_not_taken_for_bytes_on_the_wire() -> None:
    """With four ranks 6 exchanges of payload are as many bytes as 4 on a ring's wire."""

    def answer(tokens: int, width: int, itemsize: int, micro_batches: int, tp: int) -> int:
        return 6 * micro_batches * tokens * width * itemsize

    assert "the ledger counts" in judge(exercise("04.layer_bytes"), answer).hint


def test_a_rule_that_nobody_has_is_told_by_a_model() -> None:
    hint = judge(exercise("04.legal_sizes"), lambda model, most: [1]).hint
    assert "a vocabulary of 101" in hint or "may be uneven" in hint


def test_a_killed_rank_is_told_without_the_dump() -> None:
    def told(reason: str) -> str:
        text = f"it ended without a result, killed by SIGABRT. The end of its stderr:\nterminate called\n{reason}"
        return one_line(RankError(2, f"rank 2 of 3 failed:\n{text}\nFatal Python error: Aborted\n\nModules: a"))

    assert told("  what():  96 vs 72. Received data size doesn't match").startswith(
        "rank 2 was killed by SIGABRT: it received another number of bytes"
    )
    assert told("  what():  no memory") == "rank 2 was killed by SIGABRT: no memory"
    assert told("nothing") == "rank 2 was killed by SIGABRT"
