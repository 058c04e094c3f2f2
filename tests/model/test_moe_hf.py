"""Our mixtures of experts against `transformers`' Mixtral and Qwen3-MoE, both ways; saving the others; upcycling."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from picotron_mini.config import ConfigError, ModelConfig, MoEConfig
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.hf import load_hf, save_hf
from picotron_mini.model.hf_config import config_from_hf, config_to_hf
from picotron_mini.model.hf_experts import upcycle

SMALL = ModelConfig(
    vocab_size=29, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, head_dim=6,
    moe=MoEConfig(num_experts=5, top_k=2, expert_size=20),
)  # fmt: skip


def random_config(seed: int) -> ModelConfig:
    """Mixtral's family for even seeds, Qwen3-MoE's for odd ones; GQA, tied or not, some dense layers."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads, experts, layers = kv_heads * rng.choice([1, 2, 3]), rng.randrange(2, 9), rng.choice([1, 2, 3])
    qwen, size = bool(seed & 1), rng.randrange(5, 40)
    moe = MoEConfig(num_experts=experts, top_k=rng.randrange(2, experts + 1), expert_size=size)
    if qwen:
        moe = replace(moe, normalize=bool(seed & 2), dense_layers=rng.randrange(layers))
    return ModelConfig(
        vocab_size=rng.randrange(7, 90), hidden_size=heads * rng.randrange(3, 12),
        intermediate_size=rng.randrange(5, 70) if qwen else size, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=2 * rng.randrange(1, 9), rope_theta=rng.choice([100.0, 10_000.0]),
        norm_eps=rng.choice([1e-5, 1e-6]), tie_embeddings=bool(seed & 4), qk_norm=qwen, moe=moe,
    )  # fmt: skip


def perturbed(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.2 + (weight.ndim == 1))


def theirs_of(name: str, gradients: dict[str, Tensor]) -> Tensor:
    """Their gradient of our parameter, in the layout of transformers 5."""
    if match := re.fullmatch(r"layers\.(\d+)\.mlp\.experts\.(gate|up|down)", name):
        stem = f"model.layers.{match[1]}.mlp.experts."
        if match[2] == "down":
            return gradients[stem + "down_proj"]
        return gradients[stem + "gate_up_proj"].chunk(2, dim=1)[match[2] == "up"]
    if match := re.fullmatch(r"layers\.(\d+)\.mlp\.router\.weight", name):
        return gradients[f"model.layers.{match[1]}.mlp.gate.weight"]
    from picotron_mini.model.hf import hf_name

    return gradients[hf_name(name)]


def compare(ours: GPT, theirs: Any, config: ModelConfig) -> None:
    theirs.set_experts_implementation("eager")  # their grouped products know no float64
    tokens = torch.randint(config.vocab_size, (2, 33))
    got = ours.logits(ours(tokens))
    want = theirs(tokens).logits
    assert want.dtype == torch.float64
    assert (got - want).abs().max() / want.abs().max() < 1e-9
    mix = torch.randn_like(want)  # a gradient that reaches every logit
    (got * mix).sum().backward()
    (want * mix).sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        a, b = weight.grad, theirs_of(name, gradients)
        assert a is not None and (b.abs().max() > 0 or config.num_layers > 1), name
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), name


@pytest.mark.parametrize("seed", range(10))
def test_transformers_computes_what_we_saved(widened: Any, tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    ours = GPT(config).double()
    perturbed(ours)
    save_hf(ours, config, tmp_path / "model", max_shard_bytes=random.Random(seed).choice([1, 2000, 2**30]))
    theirs, info = widened.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if config.qk_norm else "MixtralForCausalLM")
    compare(ours, theirs, config)


@pytest.mark.parametrize("seed", range(10, 20))
@pytest.mark.parametrize("fused", [False, True])
def test_we_compute_what_transformers_saved(widened: Any, tmp_path: Path, seed: int, fused: bool) -> None:
    config = random_config(seed)
    kind = "Qwen3Moe" if config.qk_norm else "Mixtral"
    theirs = getattr(widened, f"{kind}ForCausalLM")(getattr(widened, f"{kind}Config")(**config_to_hf(config))).double()
    perturbed(theirs)
    theirs.save_pretrained(tmp_path, save_original_format=not fused)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused, sorted(names)
    read, state = load_hf(tmp_path)
    assert read == config
    ours = GPT(read).double()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["head.weight"] if config.tie_embeddings else [])
    compare(ours, theirs, config)


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    for hf, kept in (
        (transformers.MixtralConfig(**sizes), ("num_local_experts", "num_experts_per_tok")),
        (
            transformers.Qwen3MoeConfig(**sizes, norm_topk_prob=True),
            ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        ),
    ):
        sparse = sizes | {"model_type": hf.model_type} | {key: getattr(hf, key) for key in kept}
        assert config_from_hf(sparse) == config_from_hf(hf.to_dict())


OTHERS = {
    "sigmoid, bias, shared, groups": {
        "score": "sigmoid", "balance": "bias", "shared_size": 8, "num_experts": 6, "groups": 3, "limit_groups": 2,
        "scale": 2.5, "dense_layers": 1,
    },
    "experts choose": {"choice": "expert", "balance": "none"},
    "capacity": {"capacity": 1.25},
    "not normalized": {"normalize": False},
}  # fmt: skip


@pytest.mark.parametrize("which", OTHERS)
def test_what_is_saved_is_read_back(tmp_path: Path, which: str) -> None:
    config = replace(SMALL, moe=replace(SMALL.moe, **OTHERS[which]))  # type: ignore[type-var]
    model = GPT(config).bfloat16()
    init_weights(model, 0)
    for name, buffer in model.named_buffers():
        assert name.endswith("router.bias") and buffer.dtype == torch.float32
        buffer.copy_(torch.randn_like(buffer))
    save_hf(model, config, tmp_path / "model", max_shard_bytes=3000)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "picotron_moe"
    read, state = load_hf(tmp_path / "model")
    assert read == config
    want = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(state) == set(want) and all(torch.equal(state[name], want[name]) for name in want)


def test_transformers_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(SMALL, moe=replace(SMALL.moe, score="sigmoid"))  # type: ignore[type-var]
    save_hf(GPT(config), config, tmp_path / "model")
    with pytest.raises(ValueError, match="picotron_moe"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    save_hf(GPT(SMALL), SMALL, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


STEM = "model.layers.1.block_sparse_moe."


def drop_last(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.4." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last, r"layers.0.mlp.experts.down has shape \[4, 24, 20\], not \[5, 24, 20\]"),
        (lambda t: t.pop(STEM + "experts.2.w1.weight"), "layers.1.mlp.experts.gate: expert 2 is missing, and expert 4"),
        (lambda t: t.update({STEM + "experts.2.w1.weight": torch.ones(3, 24)}), "experts have different shapes"),
        (lambda t: t.pop(STEM + "gate.weight"), "layers.1.mlp.router.weight is missing"),
        (lambda t: t.update({STEM + "experts.0.w9.weight": torch.ones(3)}), "experts.0.w9.weight is not a tensor"),
    ],
)
def test_another_number_of_experts_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = edited(tmp_path / "model", change)
    with pytest.raises(ConfigError, match=message):
        load_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"num_local_experts": None}, "num_local_experts=None must be an integer"),
        ({"num_experts_per_tok": 6}, "top_k=6 is more than num_experts=5"),
        ({"sliding_window": 128}, "sliding_window=128"),
    ],
)
def test_configurations_that_cannot_be_computed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_to_hf(SMALL) | change)


def test_layers_with_experts_must_come_last() -> None:
    config = replace(SMALL, qk_norm=True, num_layers=4)
    assert config_from_hf(config_to_hf(config) | {"mlp_only_layers": [0]}).moe_layers == range(1, 4)
    with pytest.raises(ConfigError, match="must come last"):
        config_from_hf(config_to_hf(config) | {"decoder_sparse_step": 2, "num_hidden_layers": 3})
    with pytest.raises(ConfigError, match="must come last"):
        config_from_hf(config_to_hf(config) | {"mlp_only_layers": [2]})


# --- upcycling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [{}, {"dense_layers": 1}, {"score": "sigmoid", "balance": "bias"}, {"top_k": 5}])
def test_an_upcycled_model_computes_what_the_dense_one_did(moe: dict[str, Any]) -> None:
    dense = replace(SMALL, moe=None)
    before = GPT(dense).double()
    perturbed(before)
    config, state = upcycle(
        dense, dict(before.named_parameters()), MoEConfig(**({"num_experts": 5, "expert_size": 20} | moe))
    )
    after = GPT(config).double()
    after.load_state_dict(state, strict=False)
    tokens = torch.randint(29, (2, 17))
    want = before.logits(before(tokens))
    assert (after.logits(after(tokens)) - want).abs().max() / want.abs().max() < 1e-12
    assert after.layers["1"].get_parameter("mlp.router.weight").std() > 0.01, "a router of zeros would never learn"
    one, other = state["layers.1.mlp.experts.up"][:2]
    assert one.data_ptr() != other.data_ptr() and torch.equal(one, other)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"expert_size": 21}, "use expert_size=20"),
        ({"normalize": False}, "use normalize=True"),
        ({"shared_size": 4}, "use shared_size=0"),
        ({"capacity": 1.0}, "use capacity=None"),
        ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
    ],
)
def test_upcycling_refuses_what_would_compute_something_else(moe: dict[str, Any], message: str) -> None:
    dense = replace(SMALL, moe=None)
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, dict(GPT(dense).named_parameters()), MoEConfig(**({"expert_size": 20} | moe)))
    with pytest.raises(ConfigError, match="the model has experts already"):
        upcycle(SMALL, {}, MoEConfig(expert_size=20))
