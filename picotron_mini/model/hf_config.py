"""The `config.json` of a Hugging Face folder, to and from `ModelConfig`.

A model with `qk_norm` is a Qwen3, any other a Llama; with experts a Qwen3-MoE or a Mixtral, if one of them computes the
same, else a type of our own that holds all settings. How experts are kept in balance belongs to a training run and not
to the model, and these two have losses of their own: it is neither written for them nor read.

What this model cannot compute (biases, other activations, sliding windows, other rotary types) is refused by name
rather than dropped: a model that runs with a part missing gives plausible and wrong text.

The rotary settings have two spellings, and both are in use. transformers 4 has `rope_theta` and `rope_scaling` side by
side, transformers 5 writes one `rope_parameters` and still reads the older form. So both are read, and the older is
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picotron_mini.config import ConfigError, ModelConfig, MoEConfig, RopeScaling, from_dict, to_dict
from picotron_mini.model.hf_experts import OWN, moe_kind
from picotron_mini.model.legality import model_problems

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    OWN: "PicotronMoEForCausalLM",
}

_ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"}
_ROPE |= {"original_max_position_embeddings"}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the form that transformers 4 and 5 both read.

    transformers' Llama refuses a hidden_size that num_heads does not divide, even with head_dim given; its Qwen3 and
    `load_hf` take it.
    """
    kind = moe_kind(config) if config.moe else "qwen3" if config.qk_norm else "llama"
    scaling = config.rope_scaling
    return _experts_to_hf(config, kind) | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe.expert_size if config.moe and kind == "mixtral" else config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "bos_token_id": None,  # left out, transformers would take ids 1 and 2, which are ordinary tokens here
        "eos_token_id": None,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
    }


def _experts_to_hf(config: ModelConfig, kind: str) -> dict[str, Any]:
    if (moe := config.moe) is None:
        return {}
    if kind == OWN:
        return {"qk_norm": config.qk_norm, "moe": to_dict(moe)}
    if kind == "mixtral":
        return {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "sliding_window": None}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.dense_layers)),
        "use_sliding_window": False,
    }


def _experts_from_hf(values: Mapping[str, Any], kind: str) -> MoEConfig | None:
    """The mixture of experts, once every size is known to be an integer.

    Raises:
        ConfigError: layers with experts do not all come behind those without.
    """
    if kind == OWN:
        return from_dict(MoEConfig, values.get("moe") or {}, "moe.")
    if kind == "mixtral":
        experts, k = values["num_local_experts"], values["num_experts_per_tok"]
        return MoEConfig(num_experts=experts, top_k=k, expert_size=values["intermediate_size"])
    if kind == "qwen3_moe":
        dense, every, layers = values["mlp_only_layers"], values["decoder_sparse_step"], values["num_hidden_layers"]
        sparse = [layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0]
        if not sparse or sparse != list(range(sparse[0], layers)):
            raise ConfigError(
                f"mlp_only_layers={dense} with decoder_sparse_step={every} is not supported; layers with experts must "
                "come last"
            )
        return MoEConfig(
            num_experts=values["num_experts"], top_k=values["num_experts_per_tok"], dense_layers=sparse[0],
            expert_size=values["moe_intermediate_size"], normalize=bool(values.get("norm_topk_prob")),
        )  # fmt: skip
    return None


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Raises:
        ConfigError: naming every setting that this model cannot compute, that is missing or not a number.
    """
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"model_type={kind!r} is not supported; it must be {' or '.join(ARCHITECTURES)}")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling={rope!r} must be an object")
    # what transformers takes where nothing is said
    values: dict[str, Any] = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
    if kind == "mixtral":
        values = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5}
    values |= {key: value for key, value in (*hf.items(), *rope.items()) if value is not None}
    values["rope_type"] = rope_type = values.get("rope_type", values.get("type", "default"))

    found = _unsupported(values, kind) + [
        f"{key!r} in the rotary settings is not supported" for key in rope.keys() - _ROPE
    ]
    # where a size is left out, transformers takes that of one published model; only these follow from the others
    if kind in ("llama", "mixtral"):
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    integers = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    integers += ["num_key_value_heads", "max_position_embeddings"]
    integers += ["head_dim"] if kind == "qwen3" or values.get("head_dim") is not None else []
    if kind == "mixtral":
        integers += ["num_local_experts", "num_experts_per_tok"]
    elif kind == "qwen3_moe":
        values = {"decoder_sparse_step": 1, "mlp_only_layers": [], **values}
        values.setdefault("num_experts", values.get("num_local_experts"))  # transformers 5 writes it under this name
        integers += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"]
    numbers = ["rope_theta", "rms_norm_eps"]
    if rope_type == "llama3":
        values.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        integers += ["original_max_position_embeddings"]
        numbers += ["factor", "low_freq_factor", "high_freq_factor"]
    for names, types, what in ((integers, (int,), "an integer"), (numbers, (int, float), "a number")):
        found += [f"{n}={values.get(n)!r} must be {what}" for n in names if type(values.get(n)) not in types]
    if found:
        raise ConfigError("\n".join(found))

    config = ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // max(values["num_attention_heads"], 1),
        rope_theta=float(values["rope_theta"]),
        rope_scaling=RopeScaling(
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_max_position=values["original_max_position_embeddings"],
        )
        if rope_type == "llama3"
        else None,
        norm_eps=float(values["rms_norm_eps"]),
        tie_embeddings=bool(values.get("tie_word_embeddings")),
        qk_norm=kind in ("qwen3", "qwen3_moe") or (kind == OWN and bool(values.get("qk_norm"))),
        max_position=values["max_position_embeddings"],
        moe=_experts_from_hf(values, kind),
    )
    if problems := model_problems(config):
        raise ConfigError("\n".join(problems))
    return config


def _unsupported(values: Mapping[str, Any], kind: str) -> list[str]:
    # Qwen3 writes the size of a window even where it is switched off
    windowed = kind in ("llama", "mixtral") or values.get("use_sliding_window")
    only = {
        "architectures": (values.get("architectures") or [ARCHITECTURES[kind]], [ARCHITECTURES[kind]]),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "attention_bias": (values.get("attention_bias") or False, False),
        "mlp_bias": (values.get("mlp_bias") or False, False),
        "attention_dropout": (values.get("attention_dropout") or 0, 0),
        "sliding_window": (values.get("sliding_window") if windowed else None, None),
        "layer_types": (sorted(set(values.get("layer_types") or []) | {"full_attention"}), ["full_attention"]),
        "router_jitter_noise": (values.get("router_jitter_noise") or 0, 0),  # it would reach the experts as well
        "quantization_config": (values.get("quantization_config"), None),
        "partial_rotary_factor": (values.get("partial_rotary_factor") or 1, 1),
    }
    found = [
        f"{name}={got!r} is not supported; it must be {want!r}" for name, (got, want) in only.items() if got != want
    ]
    if values["rope_type"] not in ("default", "llama3"):
        found.append(f"rope_type={values['rope_type']!r} is not supported; it must be 'default' or 'llama3'")
    return found
