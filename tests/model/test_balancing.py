"""Auxiliary losses against autograd on their formulas, through the exit that carries no value."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from picotron_mini.config import ModelConfig, MoEConfig
from picotron_mini.memory.recompute import recompute
from picotron_mini.model.balancing import EXTRA, Balance, RoutingStats, move_bias
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.moe import MoE, Pool
from picotron_mini.model.routing import Routing

B, T = 3, 10
MODEL = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    moe=MoEConfig(num_experts=5, top_k=2, expert_size=12, aux_weight=0.3, z_weight=0.2),
)  # fmt: skip


class Done:
    """A sum over one device."""

    def wait(self) -> None: ...


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def made(**moe: Any) -> tuple[GPT, MoEConfig]:
    config = replace(MODEL.moe, **moe)  # type: ignore[type-var]
    model = GPT(replace(MODEL, moe=config))
    init_weights(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router" in name:
                weight.mul_(40)  # far from balance
    return model.double(), config


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def formula(config: MoEConfig, seen: dict[int, Routing], sequences: bool) -> Tensor:
    """E sum_e f_e P_e in each pool, and the mean square of the log-sum-exp, with their weights, over all layers."""
    total = torch.zeros((), dtype=torch.float64)
    for routing in seen.values():
        p = routing.scores / routing.scores.sum(-1, keepdim=True)
        each = []
        for pool in torch.arange(B * T).split(T if sequences else B * T):
            f = torch.stack([(routing.experts[pool] == e).sum() for e in range(5)]).double() / (
                len(pool) * config.top_k
            )
            each.append(5 * (f * p[pool].mean(0)).sum() * len(pool) / (B * T))
        aux = config.aux_weight * torch.stack(each).sum() if config.balance == "aux" else 0.0
        total = total + aux + config.z_weight * torch.logsumexp(routing.logits, -1).square().mean()
    return total


@pytest.mark.parametrize("scope", ["global", "sequence"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_the_exit_adds_the_gradient_of_the_formula(scope: str, score: str, balance: str) -> None:
    model, config = made(aux_scope=scope, score=score, balance=balance)
    tokens = torch.randint(31, (B, T))
    seen: dict[int, Routing] = {}

    def note(layer: int, routing: Routing, y: Tensor) -> Tensor:
        seen[layer] = routing
        return y

    loss = model.loss(model(tokens, pool=Pool(observe=note)), tokens)
    (loss + formula(config, seen, scope == "sequence")).backward()
    want = gradients(model)

    each = scope == "sequence"
    exit_ = Balance(config, B * T, T if each else B * T, B if each else 1)
    through = model.loss(model(tokens, pool=Pool(observe=exit_.observe)), tokens)
    assert torch.equal(through, loss)  # the value of the loss is not touched
    through.backward()
    got = gradients(model)
    assert want.keys() == got.keys()
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-12 * want[name].abs().max(), name

    value = sum(
        config.aux_weight * n[-2] * (balance == "aux") + config.z_weight * n[-1]
        for n in (exit_.numbers(layer) for layer in (0, 1))
    )
    torch.testing.assert_close(torch.as_tensor(value), formula(config, seen, each).detach(), rtol=1e-12, atol=0)


def test_micro_batches_add_up_and_a_recomputed_layer_is_noted_once() -> None:
    """Each micro-batch is a pool; forwards and backwards of different ones are interleaved, as a pipeline does it."""
    tokens = torch.randint(31, (2, B, T))
    found = []
    for kind in ("none", "full", "selective"):
        model, config = made()
        recompute(model, kind)  # type: ignore[arg-type]
        started: list[Tensor] = []
        exits = [Balance(config, 2 * B * T, B * T, start=lambda c: (started.append(c), Done())[1]) for _ in range(2)]  # noqa: B023
        losses = [
            model.loss(model(part, pool=Pool(observe=exit_.observe)), part)
            for part, exit_ in zip(tokens, exits, strict=True)
        ]
        for loss in losses:
            loss.backward()
        assert len(started) == 4, "other devices are asked once for each layer and micro-batch"
        found.append((gradients(model), [exit_.numbers(layer) for exit_ in exits for layer in (0, 1)]))
    for gradient, numbers in found[1:]:
        assert all(torch.equal(gradient[name], found[0][0][name]) for name in gradient)
        assert all(torch.equal(a, b) for a, b in zip(numbers, found[0][1], strict=True))
    assert sum(n[:5].sum() for n in found[0][1]) == 2 * 2 * B * T * 2  # micro-batches, layers, tokens, choices


def test_counts_of_other_devices_are_waited_for_in_the_backward_only() -> None:
    """Two devices with half of the sequences each: their sums are the whole's."""
    model, config = made(z_weight=0.0)
    tokens = torch.randint(31, (4, T))
    whole = Balance(config, 4 * T, 4 * T)
    (model(tokens, pool=Pool(observe=whole.observe)) * 0).sum().backward()
    want = gradients(model)
    waited: list[str] = []

    class Late:
        def __init__(self, counts: Tensor, layer: int) -> None:
            self.counts, self.layer = counts, layer

        def wait(self) -> None:
            waited.append("now")
            self.counts.copy_(whole.layers[self.layer].counts)  # what an all_reduce would have left

    layers = iter([0, 1, 0, 1])
    parts = [Balance(config, 4 * T, 4 * T, start=lambda counts: Late(counts, next(layers))) for _ in range(2)]
    outs = [model(half, pool=Pool(observe=part.observe)) for half, part in zip(tokens.split(2), parts, strict=True)]
    assert not waited
    for out in outs:
        (out * 0).sum().backward()
    assert len(waited) == 4
    got = gradients(model)
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-12 * max(want[name].abs().max(), 1e-30), name
    for layer in (0, 1):
        torch.testing.assert_close(sum(part.numbers(layer) for part in parts), whole.numbers(layer))


def test_the_loss_is_1_in_balance_and_most_where_all_choose_the_same() -> None:
    config = MoEConfig(num_experts=4, top_k=2, z_weight=0.0)
    for experts, logits, value in (
        (torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]]), torch.zeros(4, 4), 1.0),
        (torch.tensor([[0, 1]] * 4), torch.tensor([[50.0, 50.0, 0.0, 0.0]] * 4), 2.0),  # E / K
    ):
        chosen = torch.zeros(4, 4, dtype=torch.bool).scatter(1, experts, True)
        exit_ = Balance(config, 4, 4)
        exit_.observe(0, Routing(experts, torch.ones(4, 2), logits, logits.softmax(1), chosen), torch.zeros(4, 3))
        assert float(exit_.numbers(0)[4 + EXTRA.index("aux")]) == pytest.approx(value)


def test_each_of_several_equal_devices_has_its_share() -> None:
    model, config = made(z_weight=0.5)
    tokens = torch.randint(31, (B, T))
    found = []
    for share in (1.0, 0.25):
        (model(tokens, pool=Pool(observe=Balance(config, B * T, B * T, share=share).observe)) * 0).sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name] * 4, gradient)


def test_a_frozen_router_or_no_loss_at_all_is_no_error() -> None:
    for moe in ({"aux_weight": 0.0, "z_weight": 0.0}, {"balance": "none"}, {"balance": "bias", "z_weight": 0.0}):
        model, config = made(**moe)
        tokens = torch.randint(31, (B, T))
        model.loss(model(tokens, pool=Pool(observe=Balance(config, B * T, B * T).observe)), tokens).backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    model, config = made()
    model.requires_grad_(False)
    model.layers["1"].get_parameter("mlp.experts.up").requires_grad_()
    model.loss(model(tokens, pool=Pool(observe=Balance(config, B * T, B * T).observe)), tokens).backward()
    assert list(gradients(model)) == ["layers.1.mlp.experts.up"]


# --- bias only --------------------------------------------------------------------------------------------


def test_a_bias_moves_against_the_load() -> None:
    bias = move_bias(torch.zeros(2, 4), torch.tensor([[5.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]), 0.01)
    torch.testing.assert_close(bias, torch.tensor([[-0.01, 0.01, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_biases_balance_a_router_that_nobody_trains() -> None:
    model, _ = made(balance="bias", z_weight=0.0)
    mixture = model.layers["0"].get_submodule("mlp")
    assert isinstance(mixture, MoE)
    x = torch.randn(8, 50, 16, dtype=torch.float64) + 0.5
    worst = []
    for _ in range(600):
        counts = mixture.route(x, Pool()).chosen.sum(0)
        worst.append(float(counts.max() / counts.double().mean()))
        mixture.router.bias = move_bias(mixture.router.bias, counts.double(), 0.0005)
    assert worst[0] > 1.5 and max(worst[-10:]) < 1.1


# --- metrics ----------------------------------------------------------------------------------------------


def test_metrics_say_what_happened() -> None:
    totals = torch.tensor(
        [
            [4.0, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0, 1.0, 2.0],
            [16.0, 0.0, 0.0, 0.0, 8.0, 2.0, 3.0, 2.0, 4.0],
        ],
        dtype=torch.float64,
    )
    found = RoutingStats(totals, tokens=8, top_k=2).metrics()
    assert found["moe_load"] == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]
    assert found["moe_entropy"] == pytest.approx(0.5) and found["moe_max_load"] == 4.0
    assert found["moe_dead_experts"] == 3 and found["moe_drop_rate"] == 0.25 and found["moe_unserved"] == 2 / 16
    assert found["moe_aux"] == 1.5 and found["moe_z"] == 3.0 and found["moe_not_finite"] == 3


def test_logits_that_are_not_finite_are_counted() -> None:
    model, config = made()
    with torch.no_grad():
        model.layers["1"].get_parameter("mlp.router.weight")[2] = float("nan")
    exit_ = Balance(config, B * T, B * T)
    tokens = torch.randint(31, (B, T))
    model(tokens, pool=Pool(observe=exit_.observe))
    odd = [float(exit_.numbers(layer)[5 + EXTRA.index("not_finite")]) for layer in (0, 1)]
    assert odd == [0.0, B * T]
