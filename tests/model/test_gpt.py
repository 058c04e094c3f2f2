"""The single-device model: its equations, its seams, its initial weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.config import ConfigError, ModelConfig, RopeScaling
from picotron_mini.model.gpt import (
    GPT,
    RMSNorm,
    attend,
    cross_entropy,
    global_name,
    init_weights,
    initial_weight,
    parameter_shapes,
    rope,
    rotate,
)

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    qk_norm=True,
    rope_scaling=RopeScaling(original_max_position=16),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(config: ModelConfig = CONFIG, **parts: object) -> GPT:
    model = GPT(config, **parts).double()  # type: ignore[arg-type]
    init_weights(model, 3)
    return model


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length))


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Softmax attention, one query at a time."""
    out = torch.zeros_like(q)
    past = k.shape[2] - q.shape[2]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.shape[1] // k.shape[1])
        seen = [j for j in range(past + i + 1) if documents is None or documents[b, j] == documents[b, past + i]]
        scores = k[b, group, seen] @ q[b, h, i] / q.shape[-1] ** 0.5
        out[b, h, i] = scores.softmax(0) @ v[b, group, seen]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("new", [1, 3, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_softmax_over_what_a_token_may_see(kv_heads: int, new: int, packed: bool) -> None:
    q, k, v = (torch.randn(2, heads, t, 6).double() for heads, t in ((4, new), (kv_heads, 7), (kv_heads, 7)))
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, 4, 4, 4]]) if packed else None
    torch.testing.assert_close(attend(q, k, v, documents), attend_by_hand(q, k, v, documents), rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_each_document_alone() -> None:
    model, x = build(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)])[None]
    together = model(x, positions, documents)
    alone = torch.cat([model(part) for part in x.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together, model(x, positions))  # the documents do matter


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, CONFIG.head_dim).double()

    def score(at: int, to: int) -> Tensor:
        turned = [rotate(x, *rope(CONFIG, torch.tensor([[p]]), x.dtype)) for x, p in ((q, at), (k, to))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_rope_scaling_leaves_fast_pairs_and_slows_slow_ones() -> None:
    config = replace(CONFIG, head_dim=64, rope_scaling=None)
    at_one = torch.tensor([[1]])
    plain = torch.atan2(*reversed(rope(config, at_one, torch.float64)))[0, 0, 0]
    config = replace(config, rope_scaling=RopeScaling(factor=8.0, original_max_position=1024))
    scaled = torch.atan2(*reversed(rope(config, at_one, torch.float64)))[0, 0, 0]
    turns = 1024 * plain / (2 * torch.pi)
    torch.testing.assert_close(scaled[turns > 4], plain[turns > 4], rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-12, atol=0)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (turns < 1).any() and (turns > 4).any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_narrow_types_are_widened_and_wide_ones_are_not_narrowed() -> None:
    norm = RMSNorm(64, 1e-6)
    x = torch.randn(3, 64).double() * 1e3
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm.double()(x), exact, rtol=1e-14, atol=1e-14)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=2**-7, atol=0)
    assert rope(CONFIG, torch.arange(4)[None], torch.bfloat16)[0].dtype == torch.float32
    assert rope(CONFIG, torch.arange(4)[None], torch.float64)[0].dtype == torch.float64
    logits, targets = torch.randn(1, 5, 37, dtype=torch.bfloat16), torch.randint(37, (1, 5))
    assert cross_entropy(logits, targets).dtype == torch.float32
    assert cross_entropy(logits.double(), targets).dtype == torch.float64
    assert build()(tokens()).dtype == torch.float64
    assert build().bfloat16()(tokens()).dtype == torch.bfloat16


def test_loss_is_a_sum_over_the_targets_that_count() -> None:
    model, x, targets = build(), tokens(), tokens()
    targets[0, 3:9] = -100
    hidden = model(x)
    by_hand = sum(
        -model.logits(hidden)[b, t].log_softmax(-1)[targets[b, t]]
        for b in range(2)
        for t in range(12)
        if targets[b, t] != -100
    )
    torch.testing.assert_close(model.loss(hidden, targets), by_hand, rtol=1e-12, atol=1e-12)
    assert model.loss(hidden, torch.full_like(targets, -100)) == 0


def test_parts_in_a_row_equal_the_whole() -> None:
    for config in (CONFIG, replace(CONFIG, tie_embeddings=False)):
        whole, x = build(config), tokens()
        first = build(config, layers=[0], head=False)
        middle = build(config, layers=[1], embed=False, head=False)
        last = build(config, layers=[2], embed=False)
        hidden = last(middle(first(x)))
        torch.testing.assert_close(hidden, whole(x), rtol=0, atol=0)
        torch.testing.assert_close(last.loss(hidden, x), whole.loss(whole(x), x), rtol=0, atol=0)
        names = [global_name(config, n) for part in (first, middle, last) for n, _ in part.named_parameters()]
        assert set(names) == set(parameter_shapes(config))
        assert names.count("embed.weight") == (2 if config.tie_embeddings else 1)
        assert middle.embed is None and middle.norm is None and middle.head is None
        with pytest.raises(ConfigError, match="no head"):
            middle.logits(hidden)


def test_names_and_shapes_are_the_agreed_ones() -> None:
    shapes = parameter_shapes(CONFIG)
    assert list(shapes)[:12] == [
        "embed.weight",
        "layers.0.attention_norm.weight",
        *(f"layers.0.attention.{name}.weight" for name in ("q", "k", "v", "o", "q_norm", "k_norm")),
        "layers.0.mlp_norm.weight",
        *(f"layers.0.mlp.{name}.weight" for name in ("gate", "up", "down")),
    ]
    assert list(shapes)[-1] == "norm.weight"
    assert shapes["layers.2.attention.k.weight"] == (20, 24)
    assert list(parameter_shapes(replace(CONFIG, tie_embeddings=False)))[-1] == "head.weight"


def test_a_tied_head_stays_tied_when_the_model_moves() -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    model.to_empty(device="cpu")
    assert model.head is not None and model.embed is not None
    assert model.head.weight is model.embed.weight
    assert model.double().head.weight is model.embed.weight  # type: ignore[union-attr]


def test_fewer_heads_in_the_weights_are_fewer_heads_in_the_model() -> None:
    # what tensor parallelism does to a rank: half of the heads, and the halves sum to the whole
    model = build()
    attention = model.layers["0"].attention
    x, (cos, sin) = torch.randn(1, 5, 24).double(), rope(CONFIG, torch.arange(5)[None], torch.float64)
    whole = attention(x, cos, sin)
    halves = torch.zeros_like(whole)
    for half in range(2):
        part = build().layers["0"].attention
        for name in "qkv":
            linear = getattr(part, name)
            linear.weight = torch.nn.Parameter(linear.weight.chunk(2, dim=0)[half])
        part.o.weight = torch.nn.Parameter(part.o.weight.chunk(2, dim=1)[half])
        halves += part(x, cos, sin)
    torch.testing.assert_close(halves, whole, rtol=1e-12, atol=1e-12)


def test_attention_and_loss_can_be_replaced() -> None:
    model, x = build(), tokens()
    hidden = model(x)
    for block in model.layers.values():
        block.attention.attend = attend_by_hand
    torch.testing.assert_close(model(x), hidden, rtol=1e-12, atol=1e-12)
    model.cross_entropy = lambda logits, targets: logits.sum()
    assert model.loss(hidden, x) == model.logits(hidden).sum()


def test_blocks_compile_without_a_graph_break() -> None:
    model, x = build(replace(CONFIG, num_layers=1)), tokens()
    documents = torch.zeros_like(x)
    cos, sin = rope(CONFIG, torch.arange(12)[None], torch.float64)
    for given in (None, documents):
        h = torch.randn(2, 12, 24).double().requires_grad_()
        # aot_eager traces forward and backward as inductor would, and needs no C++ compiler
        compiled = torch.compile(model.layers["0"], fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(h, cos, sin, given).square().sum(), h)
        (want,) = torch.autograd.grad(model.layers["0"](h, cos, sin, given).square().sum(), h)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_initial_weights_depend_on_seed_and_global_name_only() -> None:
    model = build(replace(CONFIG, num_layers=8, hidden_size=64, intermediate_size=96))
    config = model.config
    weights = dict(model.named_parameters())
    part = GPT(config, layers=[5], embed=False)
    init_weights(part, 3)
    torch.testing.assert_close(part.layers["5"].mlp.up.weight.double(), weights["layers.5.mlp.up.weight"])
    assert part.head is not None
    torch.testing.assert_close(
        part.head.weight.double(), weights["embed.weight"], msg="a tied head starts as the embedding"
    )
    assert not torch.equal(weights["layers.5.mlp.up.weight"], weights["layers.4.mlp.up.weight"])
    other = initial_weight(config, "embed.weight", weights["embed.weight"].shape, seed=4)
    assert not torch.equal(other.double(), weights["embed.weight"])
    assert other.dtype == torch.float32
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith((".o.weight", ".down.weight")) else 0.02  # 1 / sqrt(2 * 8) = 1 / 4
            assert weight.std().item() == pytest.approx(std, rel=0.1), name


def test_first_loss_is_near_that_of_a_uniform_guess() -> None:
    x = tokens(4, 32)
    model = build()
    loss = model.loss(model(x), x.roll(1)) / x.numel()
    assert loss.item() == pytest.approx(torch.tensor(37.0).log().item(), abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 is not filled"),
        ({"head_dim": 0}, "head_dim=0 is not filled"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"rope_scaling": RopeScaling(high_freq_factor=1.0)}, "high_freq_factor=1.0"),
    ],
)
def test_open_or_impossible_configurations_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(replace(CONFIG, **change))  # type: ignore[arg-type]


def test_gradients_reach_every_parameter() -> None:
    model, x = build(), tokens()
    model.loss(model(x), x).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert F.normalize(model(x), dim=-1).isfinite().all()
