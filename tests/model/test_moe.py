"""The layer against a loop over tokens; its seams; writing text with it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from picotron_mini.config import ConfigError, ModelConfig, MoEConfig
from picotron_mini.model import costs
from picotron_mini.model.balancing import Balance
from picotron_mini.model.generate import KeyValueCache, generate
from picotron_mini.model.gpt import GPT, MLP, init_weights, parameter_shapes, rope
from picotron_mini.model.moe import Experts, MoE, Pool, local_dispatch
from picotron_mini.model.routing import room

MODEL = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
    moe=MoEConfig(num_experts=5, top_k=2, expert_size=12, shared_size=8, dense_layers=1),
)  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "not normalized": {"normalize": False},
    "sigmoid, scaled": {"score": "sigmoid", "scale": 2.5},
    "all experts": {"top_k": 5},
    "biased": {"balance": "bias"},
    "capacity": {"capacity": 0.7},
    "one row an expert": {"capacity": 0.01},
    "experts choose": {"choice": "expert", "balance": "none"},
    "experts choose few": {"choice": "expert", "balance": "none", "capacity": 0.4},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def layer(**moe: Any) -> MoE:
    config = MoEConfig(**{"num_experts": 5, "top_k": 2, "expert_size": 12} | moe)
    made = MoE(config, 16, 0, MLP(16, 8)).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.5)
        if made.router.bias is not None:
            made.router.bias.copy_(torch.randn(5) * 0.3)
    return made


def slowly(moe: MoE, x: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, D], one token, one expert at a time, from the definitions."""
    config, experts = moe.config, moe.experts
    out = []
    for sequence in x:
        logits = [sequence[t] @ moe.router.weight.T for t in range(len(sequence))]
        scores = [z.softmax(0) if config.score == "softmax" else z.sigmoid() for z in logits]
        pairs: list[list[int]] = [[] for _ in sequence]  # the experts that work on each token
        weighing: list[list[int]] = [[] for _ in sequence]  # those that share its weight
        capacity = room(config, len(sequence)) if config.capacity or config.choice == "expert" else len(sequence)
        if config.choice == "expert":
            for e in range(5):
                for t in sorted(range(len(sequence)), key=lambda t, e=e: -scores[t][e].item())[:capacity]:  # type: ignore[misc]
                    pairs[t].append(e)
            weighing = pairs
        else:
            taken = [0] * 5
            for t in range(len(sequence)):
                wish = scores[t] if moe.router.bias is None else scores[t] + moe.router.bias
                weighing[t] = wish.argsort(descending=True)[: config.top_k].tolist()
                for e in weighing[t]:
                    taken[e] += 1
                    if taken[e] <= capacity:
                        pairs[t].append(e)
        for t, token in enumerate(sequence):
            y = moe.shared(token) if moe.shared is not None else torch.zeros_like(token)
            total = sum(scores[t][e] for e in weighing[t]) if config.normalize else 1.0
            for e in pairs[t]:
                h = F.silu(experts.gate[e] @ token) * (experts.up[e] @ token)
                y = y + config.scale * scores[t][e] / total * (experts.down[e] @ h)
            out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_tokens(kind: str) -> None:
    moe = layer(**KINDS[kind])
    x = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    got, want = moe(x), slowly(moe, x)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    mix = torch.randn_like(got)
    leaves = [x, *moe.parameters()]
    for a, b, name in zip(
        torch.autograd.grad((got * mix).sum(), leaves),
        torch.autograd.grad((want * mix).sum(), leaves),
        ["x", *dict(moe.named_parameters())],
        strict=True,
    ):
        assert b.abs().max() > 0, f"{name}: a gradient of zeros would show nothing"
        assert (a - b).abs().max() < 1e-12 * b.abs().max(), name


@pytest.mark.parametrize("kind", ["one row an expert", "experts choose few"])
def test_a_token_without_an_expert_passes_the_shared_one_only(kind: str) -> None:
    moe = layer(**KINDS[kind])
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    routing = moe.route(x, Pool())
    alone = (routing.experts < 0).all(1)
    assert alone.any() and not alone.all()
    assert moe.shared is not None
    torch.testing.assert_close(moe(x).flatten(0, 1)[alone], moe.shared(x).flatten(0, 1)[alone])
    assert torch.equal(routing.weights.eq(0), routing.experts < 0)


def test_one_expert_may_get_everything_and_others_nothing() -> None:
    moe = layer(normalize=False, top_k=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3, 0] = 100.0
    x = torch.rand(2, 11, 16, dtype=torch.float64) + 0.1
    assert moe.route(x, Pool()).chosen.sum(0).tolist() == [0, 0, 0, 22, 0]
    y = moe(x)
    assert (y - slowly(moe, x)).abs().max() < 1e-12 * y.abs().max()
    y.sum().backward()
    assert moe.experts.up.grad is not None
    assert moe.experts.up.grad.abs().amax((1, 2)).gt(0).tolist() == [False, False, False, True, False]


def test_capacity_is_of_each_sequence() -> None:
    """A sequence computes the same whatever else is in the batch."""
    for kind in ("capacity", "experts choose"):
        moe = layer(**KINDS[kind])
        x = torch.randn(4, 11, 16, dtype=torch.float64)
        torch.testing.assert_close(moe(x), torch.cat([moe(x[i : i + 1]) for i in range(4)]), rtol=1e-12, atol=1e-13)


def test_routers_compute_in_float32_at_least() -> None:
    moe = layer().bfloat16()
    x = torch.randn(2, 11, 16).bfloat16()
    routing = moe.route(x, Pool())
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.float().flatten(0, 1) @ moe.router.weight.float().T)
    assert moe(x).dtype == torch.bfloat16


def test_a_bias_stays_exact_in_a_narrow_model() -> None:
    moe = layer(balance="bias").float()
    assert moe.router.bias is not None
    moe.router.bias.fill_(0.501)
    moe.bfloat16()
    assert moe.router.bias.dtype == torch.float32 and float(moe.router.bias[0]) == pytest.approx(0.501, abs=1e-7)
    assert moe.double().router.bias.dtype == torch.float64


def test_jitter_reaches_the_router_only_and_only_where_tokens_are_numbered() -> None:
    moe = layer(jitter=0.2)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    quiet = moe.route(x, Pool())
    number = torch.arange(22).view(2, 11)
    loud = moe.route(x, Pool(number, seed=1, step=2))
    assert not torch.equal(quiet.logits, loud.logits)
    assert (loud.logits / quiet.logits - 1).abs().median() < 0.2
    seen = []
    moe.dispatch = lambda rows, *rest: (seen.append(rows), local_dispatch(rows, *rest))[1]
    moe(x, Pool(number, seed=1, step=2))
    assert torch.equal(seen[0], x.flatten(0, 1))
    for other in (Pool(number, seed=2, step=2), Pool(number, seed=1, step=3)):
        assert not torch.equal(moe.route(x, other).logits, loud.logits)
    moved = moe.route(x.flip(0), Pool(number.flip(0), seed=1, step=2))
    assert torch.equal(moved.logits.view(2, 11, 5).flip(0), loud.logits.view(2, 11, 5))


# --- seams ------------------------------------------------------------------------------------------------


def test_experts_read_from_their_weights_how_many_they_are() -> None:
    whole = layer().experts
    part = Experts(MoEConfig(num_experts=5, top_k=2, expert_size=12), 16).double()
    for name, weight in whole.named_parameters():
        setattr(part, name, nn.Parameter(weight.detach()[1:3].clone()))
    counts = torch.tensor([4, 0, 3, 2, 1])
    rows = torch.randn(10, 16, dtype=torch.float64)
    got = part(rows[4:7], counts[1:3])
    torch.testing.assert_close(got, whole(rows, counts)[4:7])
    empty = part(rows[:0], torch.tensor([0, 0]))
    assert empty.shape == (0, 16)
    empty.sum().backward()  # a rank that gets no row at all still has gradients: zeros
    assert all(weight.grad is not None and not weight.grad.any() for weight in part.parameters())


def test_dispatch_and_observe_can_be_replaced() -> None:
    moe = layer()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    moe.dispatch = lambda rows, experts, weights, run, shared: rows * 2 + shared(rows)
    assert moe.shared is not None
    torch.testing.assert_close(moe(x), 2 * x + moe.shared(x))
    torch.testing.assert_close(
        moe(x, Pool(observe=lambda number, routing, y: y * 0 + number + 3)), torch.full_like(x, 3)
    )


@pytest.mark.parametrize("kind", ["capacity", "experts choose"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_slice_of_a_sequence_decides_like_the_whole(kind: str, first: int) -> None:
    """A device with the odd or the even positions, which hears of the others through `whole`."""
    moe = layer(**KINDS[kind])
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    want = moe(x)
    asked: list[Tensor] = []
    moe.route(x, Pool(whole=lambda y: (asked.append(y), y)[1]))
    pool = Pool(whole=lambda _: asked[0], part=lambda y: y[:, first::2])
    torch.testing.assert_close(moe(x[:, first::2], pool), want[:, first::2])
    assert not torch.allclose(moe(x[:, first::2]), want[:, first::2])  # nor would it without


# --- the model --------------------------------------------------------------------------------------------


def test_names_and_shapes() -> None:
    shapes = parameter_shapes(MODEL)
    assert [name for name in shapes if name.startswith("layers.1.mlp.")] == [
        *(f"layers.1.mlp.{name}" for name in ("router.weight", "experts.gate", "experts.up", "experts.down")),
        *(f"layers.1.mlp.shared.{name}.weight" for name in ("gate", "up", "down")),
    ]
    assert shapes["layers.0.mlp.gate.weight"] == (24, 16)  # a dense layer
    assert shapes["layers.2.mlp.experts.gate"] == (5, 12, 16) and shapes["layers.2.mlp.experts.down"] == (5, 16, 12)
    biased = GPT(replace(MODEL, moe=replace(MODEL.moe, balance="bias")))  # type: ignore[type-var]
    assert [name for name, _ in biased.named_buffers()] == [f"layers.{i}.mlp.router.bias" for i in (1, 2)]


def test_initial_experts_differ_and_write_to_the_residual_stream_gently() -> None:
    model = GPT(MODEL)
    init_weights(model, 0)
    down, up = (model.layers["1"].get_parameter(f"mlp.experts.{name}") for name in ("down", "up"))
    assert up.std().item() == pytest.approx(0.02, rel=0.1)
    assert down.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert not torch.equal(up[0], up[1])


@pytest.mark.parametrize("moe", [{}, {"capacity": 1.0}, {"score": "sigmoid", "balance": "bias"}])
def test_writing_with_a_cache_is_writing_without(moe: dict[str, Any]) -> None:
    model = GPT(replace(MODEL, moe=replace(MODEL.moe, **moe))).double()  # type: ignore[type-var]
    init_weights(model, 0)
    tokens = torch.randint(31, (2, 9))
    # a whole sequence without a limit, which is what is written with
    want = model.logits(model(tokens, pool=Pool(limit=False)))
    cache = KeyValueCache(9)
    got = [model.logits(model(part, cache=cache)) for part in tokens.split([4, 1, 1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(got, 1), want)
    assert generate(model, tokens, 5, temperature=0).shape == (2, 14)


def test_experts_that_choose_tokens_cannot_write() -> None:
    model = GPT(replace(MODEL, moe=replace(MODEL.moe, choice="expert", balance="none")))  # type: ignore[type-var]
    init_weights(model, 0)
    tokens = torch.randint(31, (1, 4))
    model(tokens)
    with pytest.raises(ConfigError, match="cannot write text token by token; train with choice=token"):
        generate(model, tokens, 1)


def test_a_model_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=6 is more than num_experts=5"):
        GPT(replace(MODEL, moe=replace(MODEL.moe, top_k=6)))  # type: ignore[type-var]


# --- costs ------------------------------------------------------------------------------------------------

PRICES = [MODEL, replace(MODEL, moe=replace(MODEL.moe, shared_size=0, dense_layers=0)), replace(MODEL, qk_norm=True)]  # type: ignore[type-var]


@pytest.mark.parametrize("config", PRICES)
def test_parameters_and_flops(config: ModelConfig) -> None:
    model = GPT(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    for number in range(3):
        assert costs.layer_parameters(config, number) == sum(p.numel() for p in model.layers[str(number)].parameters())
    assert config.moe is not None
    idle = (config.moe.num_experts - config.moe.top_k) * 3 * 16 * config.moe.expert_size * len(config.moe_layers)
    assert costs.parameters(config, active=True) == costs.parameters(config) - idle
    assert costs.flops_per_token(config, 8) == 6 * costs.parameters(config, active=True) + 12 * 3 * 16 * 8
    init_weights(model, 0)
    tokens = torch.randint(31, (2, 24))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
    ):
        model(tokens)
    assert counter.get_total_flops() == 48 * sum(costs.layer_flops(config, 24, number) for number in range(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_activation_bytes_are_what_autograd_keeps(dtype: torch.dtype, shared: int, z_weight: float) -> None:
    config = replace(MODEL, moe=replace(MODEL.moe, shared_size=shared, z_weight=z_weight, dense_layers=0))  # type: ignore[type-var]
    assert config.moe is not None
    model = GPT(config)
    init_weights(model, 0)
    block = model.layers["0"].to(dtype)
    x = torch.randn(2, 64, 16, dtype=dtype, requires_grad=True) * 1
    cos, sin = rope(config, torch.arange(64)[None], dtype)
    owned = {t.untyped_storage().data_ptr() for t in (*block.parameters(), cos, sin)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in owned:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, cos, sin, None, None, Pool(observe=Balance(config.moe, 128, 128).observe))
    counted = sum(t.untyped_storage().nbytes() for t in kept.values())
    router = 4 * 5 * 16 if dtype == torch.bfloat16 else 0  # the widened weight, whatever the number of tokens
    assert counted == 128 * costs.layer_activation_bytes(config, dtype.itemsize) + router
