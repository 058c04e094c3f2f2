"""Routing against loops that do what the definitions say."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from picotron_mini.config import ConfigError, ModelConfig, MoEConfig, from_dict, to_dict
from picotron_mini.model import routing
from picotron_mini.model.legality import model_problems

CONFIG = MoEConfig(num_experts=6, top_k=3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_softmax_after_the_choice_is_softmax_before_it_and_normalized() -> None:
    logits = torch.randn(50, 6, dtype=torch.float64)
    scores = routing.score(CONFIG, logits)
    experts = routing.choose(CONFIG, scores)
    after = logits.gather(1, experts).softmax(1)
    torch.testing.assert_close(routing.weigh(CONFIG, scores, experts), after)
    before = routing.weigh(replace(CONFIG, normalize=False), scores, experts)
    torch.testing.assert_close(before, logits.softmax(1).gather(1, experts))
    assert (before.sum(1) < 1).all() and torch.allclose(after.sum(1), torch.ones(50, dtype=torch.float64))


def test_scores_and_scale() -> None:
    logits = torch.randn(5, 6)
    sigmoid = replace(CONFIG, score="sigmoid", scale=2.5)
    scores = routing.score(sigmoid, logits)
    torch.testing.assert_close(scores, 1 / (1 + (-logits).exp()))
    experts = routing.choose(sigmoid, scores)
    torch.testing.assert_close(routing.weigh(sigmoid, scores, experts).sum(1), torch.full((5,), 2.5))
    nothing = torch.zeros(2, 6)  # sigmoids that underflow must not make NaN
    assert routing.weigh(sigmoid, nothing, experts[:2]).eq(0).all()


def slowly_chosen(config: MoEConfig, scores: list[float], bias: list[float]) -> set[int]:
    wish = {e: s + b for e, (s, b) in enumerate(zip(scores, bias, strict=True))}
    size = config.num_experts // config.groups
    members = [range(g * size, (g + 1) * size) for g in range(config.groups)]
    worth = [sum(sorted((wish[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(config.groups), key=lambda g: -worth[g])[: config.limit_groups]
    allowed = [e for g in best for e in members[g]]
    return set(sorted(allowed, key=lambda e: -wish[e])[: config.top_k])


@pytest.mark.parametrize(("groups", "limit"), [(1, 1), (4, 2), (4, 4), (3, 1), (12, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_token_choice(groups: int, limit: int, biased: bool) -> None:
    config = MoEConfig(num_experts=12, top_k=3, groups=groups, limit_groups=limit)
    scores = torch.randn(80, 12).softmax(1)
    bias = torch.randn(12) * 0.1 if biased else torch.zeros(12)
    experts = routing.choose(config, scores, bias if biased else None)
    for row, chosen in zip(scores.tolist(), experts.tolist(), strict=True):
        assert len(chosen) == 3 and set(chosen) == slowly_chosen(config, row, bias.tolist())
    if biased:
        assert not torch.equal(experts.sort().values, routing.choose(config, scores).sort().values)
        weights = routing.weigh(replace(config, normalize=False), scores, experts)
        torch.testing.assert_close(weights, scores.gather(1, experts))  # the bias is in the choice only


def test_a_bias_cannot_bring_back_a_group_that_was_left_out() -> None:
    config = MoEConfig(num_experts=4, top_k=2, groups=2, limit_groups=1)
    assert set(routing.choose(config, torch.tensor([[-5.0, -6.0, -9.0, -9.5]]))[0].tolist()) == {0, 1}


@pytest.mark.parametrize("capacity", [1, 2, 5, 40])
def test_capacity_keeps_the_first_rows_of_each_expert_in_each_sequence(capacity: int) -> None:
    experts = torch.stack([torch.randperm(6)[:3] for _ in range(2 * 20)]).view(2, 20, 3)
    kept = routing.keep(experts, 6, capacity)
    for sequence in range(2):
        taken = [0] * 6
        for token in range(20):
            for k in range(3):
                expert = int(experts[sequence, token, k])
                assert bool(kept[sequence, token, k]) == (taken[expert] < capacity)
                taken[expert] += 1


def test_a_later_token_never_pushes_out_an_earlier_one() -> None:
    experts = torch.randint(6, (1, 20, 3))
    for end in range(1, 20):
        assert torch.equal(routing.keep(experts, 6, 3)[:, :end], routing.keep(experts[:, :end], 6, 3))


def test_room() -> None:
    assert routing.room(replace(CONFIG, capacity=1.0), 8) == 4  # 8 * 3 / 6
    assert routing.room(replace(CONFIG, capacity=1.25), 9) == math.ceil(1.25 * 9 * 3 / 6) == 6
    assert routing.room(replace(CONFIG, capacity=0.001), 8) == 1  # an expert takes one row at least
    assert routing.room(replace(CONFIG, capacity=100.0), 8) == 8
    assert routing.room(CONFIG, 8) == 4  # expert choice without a factor: the even share


def test_expert_choice() -> None:
    config = replace(CONFIG, choice="expert", balance="none")
    scores = torch.rand(2, 20, 6)
    taken = routing.choose_tokens(scores, 4)
    for sequence in range(2):
        for expert in range(6):
            best = scores[sequence, :, expert].argsort(descending=True)[:4]
            assert set(taken[sequence, :, expert].nonzero().flatten().tolist()) == set(best.tolist())
    weights = routing.weigh_taken(config, scores.flatten(0, 1), taken.flatten(0, 1))
    total = weights.sum(1)
    served = taken.flatten(0, 1).any(1)
    torch.testing.assert_close(total, served.float())  # normalized where there is an expert, else zeros
    assert not served.all() and weights.isfinite().all()
    raw = routing.weigh_taken(replace(config, normalize=False), scores.flatten(0, 1), taken.flatten(0, 1))
    torch.testing.assert_close(raw, scores.flatten(0, 1) * taken.flatten(0, 1))


def test_ties_go_to_the_earlier_token() -> None:
    for dtype in (torch.float32, torch.float64):
        scores = torch.full((1, 10, 2), 0.5, dtype=dtype)
        scores[:, 7:] *= 1 + 4 * torch.finfo(dtype).eps  # rounding is no reason
        assert routing.choose_tokens(scores, 3)[0, :, 0].tolist() == [True] * 3 + [False] * 7
        scores[:, 9:] += 0.001
        assert routing.choose_tokens(scores, 3)[0, :, 0].tolist() == [True] * 2 + [False] * 7 + [True]


# --- jitter -----------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_token_and_of_nothing_else() -> None:
    index = torch.arange(40)
    whole = routing.noise(0.1, 7, index, 16, torch.float64)
    order = torch.randperm(40)
    assert torch.equal(routing.noise(0.1, 7, order, 16, torch.float64), whole[order])
    assert torch.equal(routing.noise(0.1, 7, index[30:], 16, torch.float64), whole[30:])
    assert not torch.equal(routing.noise(0.1, 8, index, 16, torch.float64), whole)
    assert routing.noise(0.1, 7 + (5 << 60), index, 16, torch.float32).dtype == torch.float32  # keys may be large


def test_noise_is_uniform() -> None:
    noise = routing.noise(0.25, 3, torch.arange(2000), 50, torch.float64).flatten()
    assert 0.75 <= float(noise.min()) < 0.751 and 1.249 < float(noise.max()) < 1.25
    assert abs(float(noise.mean()) - 1) < 0.002
    assert abs(float(noise.var()) - 0.5**2 / 12) < 0.0005
    by_bin = torch.histc(noise, 10, 0.75, 1.25)
    assert by_bin.min() > 9500 and by_bin.max() < 10500
    neighbours = torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.02


def test_logical_shift_knows_no_sign() -> None:
    x = torch.tensor([-1, 1 << 62, -(1 << 63)])
    assert routing._shift(x, 60).tolist() == [15, 4, 8]


# --- settings ---------------------------------------------------------------------------------------------

MODEL = ModelConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=3, num_heads=2, num_kv_heads=2)


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"top_k": 9}, "top_k=9 is more than num_experts=8; use top_k<=8"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"capacity": 0.0}, "capacity=0.0 leaves no expert a row; use a number above 0, as 1.25, or None"),
        ({"capacity": float("nan")}, "capacity=nan leaves no expert a row"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"dense_layers": 3}, "dense_layers=3 leaves none of num_layers=3 an expert; use dense_layers<=2"),
        ({"groups": 3}, "groups=3 does not divide num_experts=8; groups could be 2 or 4"),
        ({"groups": 2, "limit_groups": 3}, "limit_groups=3 is more than groups=2"),
        ({"groups": 8, "limit_groups": 1}, "top_k=2 is more than the 1 experts of limit_groups=1 of groups=8"),
        ({"jitter": 1.0}, "jitter=1.0 must be 0 or above, and below 1"),
        ({"aux_weight": -0.1}, "aux_weight=-0.1 must be 0 or above"),
        ({"z_weight": float("nan")}, "z_weight=nan must be 0 or above"),
        ({"scale": 0.0}, "scale=0.0 must be a number above 0"),
        ({"top_k": 1}, "so the router learns nothing from the loss; use normalize=False"),
        ({"choice": "expert"}, "balance=aux must be none"),
        ({"choice": "expert", "balance": "none", "groups": 2}, "groups=2 must be 1"),
    ],
)
def test_settings_that_cannot_work_are_named(moe: dict[str, Any], said: str) -> None:
    problems = model_problems(replace(MODEL, moe=MoEConfig(**moe)))
    assert len(problems) == 1 and said in problems[0], problems


def test_settings_that_work_have_no_problems_and_survive_a_file() -> None:
    for moe in (
        MoEConfig(),
        MoEConfig(top_k=1, normalize=False),
        MoEConfig(choice="expert", balance="none", capacity=2.0),
        MoEConfig(num_experts=8, groups=4, limit_groups=2, top_k=4, score="sigmoid", balance="bias"),
    ):
        model = replace(MODEL, moe=moe)
        assert model_problems(model) == []
        assert from_dict(ModelConfig, to_dict(model)) == model
    with pytest.raises(ConfigError, match="moe.capacity='much' must be of type float"):
        from_dict(ModelConfig, {"moe": {"capacity": "much"}})
    assert from_dict(ModelConfig, {"moe": {"capacity": 1}}).moe == MoEConfig(capacity=1.0)


def test_which_layers_have_experts() -> None:
    assert list(MODEL.moe_layers) == []
    assert list(replace(MODEL, moe=MoEConfig(dense_layers=1)).moe_layers) == [1, 2]
