"""What chapter 08 shows beside the library: a tiny run, pictures, budgets, and a learner's test for the museum."""

from __future__ import annotations

import math
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from picotron_mini.collectives import all_reduce
from picotron_mini.config import MoEConfig
from picotron_mini.course.exercises import Answer, exercise, judge
from picotron_mini.course.figures.moe import draw_load, draw_routes, draw_trade
from picotron_mini.course.figures.picture import Picture
from picotron_mini.course.instruments.mixed import fault, shares
from picotron_mini.course.moe_runs import SUBJECTS, TOKENS, make_rows, routes, small, train
from picotron_mini.course.museum import kill
from picotron_mini.course.tasks import (
    chapter_08,
    chapter_08_common_loss,
    chapter_08_dispatch,
    chapter_08_dispatch_budget,
    chapter_08_dispatch_check,
)
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model import costs
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.moe import Experts
from picotron_mini.model.routing import keep
from picotron_mini.moe.dispatch import ExpertDispatch
from picotron_mini.parallel.expert_traffic import rows_for

pytestmark = pytest.mark.slow  # each check starts ranks

MOE = MoEConfig(num_experts=8, top_k=1, expert_size=64, dense_layers=1, normalize=False, balance="none")


@pytest.mark.parametrize(
    "picture",
    [
        draw_routes([("a+b", [0, 7, 0]), ("x y.", [1, 1, 1, 2])]),
        draw_load({"one": torch.full((40, 8), 0.125), "other": torch.eye(8).repeat(5, 1)}),
        draw_trade(torch.tensor([[3, 0], [1, 5]]), "rows"),
    ],
    ids=["routes", "load", "trade"],
)
def test_drawings(picture: Picture) -> None:
    svg = picture._repr_svg_()
    ElementTree.fromstring(svg)
    assert "<text" in svg and len(svg) < 60_000
    assert len(repr(picture)) > 100


def test_words_of_the_pictures_say_what_is_drawn() -> None:
    assert "of 'x y.' most, 3 of 4 characters, go to expert 1" in repr(draw_routes([("x y.", [1, 1, 1, 2])]))
    assert "In all 4, 5 rows arrive" in repr(draw_trade(torch.tensor([[3, 0], [1, 5]])))


def test_every_row_is_about_one_subject_and_the_text_is_the_same_each_time() -> None:
    rows, subjects = make_rows(40, seed=0)
    assert rows.shape == (40, TOKENS + 1) and subjects.tolist() == list(range(4)) * 10
    assert torch.equal(rows, make_rows(40, seed=0)[0]) and not torch.equal(rows, make_rows(40, seed=1)[0])
    texts = [bytes(row.tolist()).decode() for row in rows]
    alphabets = [text for text, subject in zip(texts, subjects, strict=True) if SUBJECTS[subject] == "alphabet"]
    assert all(character.isupper() or character == "." for text in alphabets for character in text)
    assert all("+" in text for text in texts[::4]) and rows.max() < 128


def test_mixture_and_dense_model_have_as_many_active_weights_but_for_the_router() -> None:
    mixture, dense = small(MOE), small(None)
    assert costs.parameters(mixture, active=True) - costs.parameters(dense) == 8 * mixture.hidden_size


def test_a_run_learns_repeats_itself_and_counts_every_row() -> None:
    first, again = (train(small(MOE), steps=25) for _ in range(2))
    assert first.loss == again.loss and torch.equal(first.load, again.load)
    assert first.loss[-1] < 0.8 * first.loss[0] and first.loss[0] == pytest.approx(math.log(128), rel=0.05)
    assert first.load.shape == (25, 8) and torch.allclose(first.load.sum(1), torch.ones(25, dtype=torch.float64))
    assert first.late_load.mean().item() == pytest.approx(1.0)
    assert 0 <= first.bits <= 2
    dense = train(small(None), steps=2)
    assert dense.bits == 0 and dense.load.numel() == 0


def test_biases_of_a_run_move_against_the_load() -> None:
    from dataclasses import replace

    run = train(small(replace(MOE, balance="bias", bias_rate=0.1)), steps=1)
    bias, load = run.model.layers["1"].mlp.router.bias, run.load[0]  # type: ignore[union-attr]
    assert isinstance(bias, Tensor)
    assert torch.equal(bias.sign().double(), (1 / 8 - load).sign())


def test_routes_are_those_of_the_router() -> None:
    model = GPT(small(MOE))
    init_weights(model, 0)
    found = routes(model, "3,5,7")
    assert found.shape == (5,) and found.min() >= 0 and found.max() < 8
    router = model.layers["1"].mlp.router  # type: ignore[union-attr]
    with torch.no_grad():
        router.weight.zero_()  # type: ignore[union-attr]
        router.weight[3] = 1e-6  # type: ignore[union-attr,index]
        router.weight[5] = -1e-6  # type: ignore[union-attr,index]
    assert set(routes(model, "3,5,7").tolist()) <= {3, 5}


def test_no_rank_of_the_exercise_sends_as_many_rows_as_it_receives() -> None:
    """Else an answer that keeps the forward's numbers would be right somewhere."""
    chosen = [chapter_08_dispatch_check.tokens_of(rank)[1] for rank in range(chapter_08_dispatch.RANKS)]
    routed = [rows_for(each.tolist(), len(chosen), chapter_08_dispatch_check.HELD) for each in chosen]
    for rows in (torch.tensor(chapter_08_dispatch.ROWS), torch.tensor(routed)):
        assert (rows.sum(0) != rows.sum(1)).all()


def test_another_right_answer_passes() -> None:
    """Loops and no library."""

    def loops(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
        out = torch.zeros_like(experts, dtype=torch.bool)
        for b, sequence in enumerate(experts.tolist()):
            room = [capacity] * num_experts
            for t, choices in enumerate(sequence):
                for k, expert in enumerate(choices):
                    out[b, t, k] = room[expert] > 0
                    room[expert] -= 1
        return out

    chosen = torch.rand(4, 9, 6).topk(2).indices
    assert torch.equal(loops(chosen, 6, 2), keep(chosen, 6, 2))
    assert judge(exercise("08.kept"), loops).passed


def test_the_order_of_a_tokens_choices_changes_no_room() -> None:
    """So the exercise does not ask for one: a token's experts are distinct."""
    chosen = torch.rand(4, 9, 6).topk(3).indices
    assert torch.equal(keep(chosen.flip(2), 6, 2).flip(2), keep(chosen, 6, 2))


def test_an_output_shows_how_much_of_each_expert_is_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)  # [N, E, D]
    weights = torch.tensor([[0.7, 0.3, 0], [0, 0.5, 0.5], [0.9, 0, 0.1], [0, 0, 0]], dtype=torch.float64)

    def made_of(weights: Tensor) -> Tensor:
        return (weights[..., None] * outputs).sum(1)

    found = shares(made_of(weights), outputs)
    assert found is not None and torch.allclose(found, weights)
    assert fault(made_of(weights), outputs, weights) is None
    assert fault(made_of(2 * weights), outputs, weights) == "weights"
    assert fault(made_of(weights * torch.tensor([1, 0, 1])), outputs, weights) == "missing"
    assert fault(made_of(weights + torch.tensor([0, 0, 0.1])), outputs, weights) == "unasked"
    # a row of another token, or no row at all
    assert fault(made_of(weights).roll(1, 0), outputs, weights) == "astray"
    assert fault(made_of(weights) * math.nan, outputs, weights) == "astray"


def test_shares_may_be_divided_in_float32_or_in_float64() -> None:
    def divided(dtype: torch.dtype) -> Answer:
        def answer(p: Tensor, experts: Tensor, axis: Axis) -> Tensor:
            counts = all_reduce(one_hot(experts, p.shape[1]).sum((0, 1)), axis).to(dtype)
            return p.shape[1] * experts.shape[1] * (counts * p.sum(0)).sum() / counts.sum() ** 2

        return answer

    assert judge(exercise("08.auxiliary"), divided(torch.float64)).passed
    assert judge(exercise("08.auxiliary"), divided(torch.float32)).passed


def test_no_two_hints_of_the_common_loss_stand_for_one_factor() -> None:
    """What is read from the gradient is a number; two reasons for the same one could not be told apart."""
    ranks, experts, k = chapter_08_common_loss.RANKS, chapter_08_common_loss.EXPERTS, chapter_08_common_loss.K
    tokens = sum(len(chapter_08_common_loss._auxiliary_case(rank)[0]) for rank in range(ranks))
    factors = [k, tokens * k, 1 / k, tokens, 1 / experts, ranks, 1 / ranks]
    assert len({round(math.log(factor), 6) for factor in factors} | {0.0}) == len(factors) + 1


def test_hints_of_answers_that_nobody_planted_are_words() -> None:
    def hint(name: str, answer: Answer) -> str:
        return judge(exercise(name), answer).hint

    scaled = hint("08.mixture", lambda x, logits, experts, k: 1.1 * chapter_08.mixture(x, logits, experts, k))
    assert "with other weights" in scaled
    moved = hint("08.mixture", lambda x, logits, experts, k: chapter_08.mixture(x, logits, experts, k).roll(1, 0))
    assert "the inverse of the order" in moved
    three = hint("08.mixture", lambda x, logits, experts, k: chapter_08.mixture(x, logits, experts, 3))
    assert "none of its best" in three
    assert "not finite" in hint("08.mixture", lambda x, logits, experts, k: x * math.nan)
    no_sum = hint("08.mixture", lambda x, logits, experts, k: torch.stack([x] * k, 1))
    assert no_sum == "return a row for each token, a tensor [N, D] = [9, 8]: what its experts make is added up"
    assert "more rows of a sequence" in hint("08.kept", lambda experts, n, c: torch.ones_like(experts))
    assert "while its expert has room" in hint("08.kept", lambda experts, n, c: torch.zeros_like(experts))
    assert "return one number" in hint("08.auxiliary", lambda p, experts, axis: p.mean(0))
    assert hint("08.dispatch", lambda x, *rest: x[:0]).startswith("return a row for each token")
    flat = hint("08.kept", lambda experts, n, c: keep(experts, n, c).flatten(1))
    assert flat.endswith("a tensor [B, T, K] = [3, 8, 2] of bool")


def test_what_travels_in_another_order_is_told_by_what_it_is() -> None:
    def by_sorting(back: str, *left: str) -> Answer:
        return partial(chapter_08_dispatch_budget._dispatch_by_sorting, back=back, left=left)

    def judged(answer: Answer) -> str | None:
        return chapter_08_dispatch_check.judge_dispatch(answer)

    assert judged(by_sorting("inverse")) is None
    assert judged(by_sorting("inverse", "rows")) == chapter_08_dispatch_check.RANK_ORDER
    assert judged(by_sorting("inverse", "rows", "local")) == chapter_08_dispatch_check.RANK_ORDER
    assert judged(by_sorting("inverse", "weights")) == chapter_08_dispatch_check.WEIGHTS

    def unmarked_to_everyone(
        x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: chapter_08_dispatch_check.Tools
    ) -> Tensor:
        token = [torch.arange(len(x))] * axis.size
        local = [experts % held] * axis.size
        return chapter_08_dispatch_budget._there_and_back(x, token, local, weights, axis, tools)

    assert judged(unmarked_to_everyone) == chapter_08_dispatch_check.UNASKED


def dispatched(mesh: Mesh, weights: Tensor) -> Tensor:
    """Four tokens of this rank, each with an expert on either rank."""
    run = Experts(MoEConfig(num_experts=2, top_k=2, expert_size=3), 4).double()
    for parameter in run.parameters():
        torch.nn.init.constant_(parameter, 0.5 + mesh["ep"].index)
    experts = torch.tensor([[0, 2], [3, 1], [0, 3], [2, 1]])
    return ExpertDispatch(mesh["ep"], 4)(torch.ones(4, 4, dtype=torch.float64), experts, weights, run, None)


def the_router_is_told(mesh: Mesh) -> None:
    """A learner's test that notices: y = sum w E(x) is linear in w, so w . dL/dw is the output's sum."""
    weights = torch.full((4, 2), 0.5, dtype=torch.float64, requires_grad=True)
    y = dispatched(mesh, weights)
    y.sum().backward()
    assert weights.grad is not None, "no gradient"
    torch.testing.assert_close((weights.grad * weights).sum(), y.sum())


def only_outputs(mesh: Mesh) -> None:
    """One that does not."""
    weights = torch.full((4, 2), 0.5, dtype=torch.float64, requires_grad=True)
    assert dispatched(mesh, weights).isfinite().all()


def test_a_test_of_the_weights_kills_the_exhibit_and_one_of_outputs_does_not() -> None:
    name = "08.weights_without_gradient"
    assert kill(name, the_router_is_told, record=False).passed
    outcome = kill(name, only_outputs, record=False)
    assert outcome.status == "failed" and "passes with the bug" in outcome.hint
