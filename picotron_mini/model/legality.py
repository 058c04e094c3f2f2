"""What shapes a model may have by itself, before anyone asks on how many ranks: `legality.py` of the library does that.

Each `*_problems` returns sentences that name the setting, its value and what would work; an empty list means legal.
"""

from __future__ import annotations

from picotron_mini.config import ModelConfig, RopeScaling, divisors, nearest


def model_problems(model: ModelConfig) -> list[str]:
    """What is wrong with a model's shape by itself, in words; empty when it is fine."""
    found = []
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "max_position"):
        if getattr(model, name) < 1:
            found.append(f"{name}={getattr(model, name)} must be at least 1")
    for name, filled in (("vocab_size", "the tokenizer's entries"), ("head_dim", "hidden_size // num_heads")):
        if getattr(model, name) < 0:
            found.append(f"{name}={getattr(model, name)} must be at least 1, or 0 for {filled}")
    if found:
        return found
    if model.num_heads % model.num_kv_heads:
        found.append(
            f"num_heads={model.num_heads} is not a multiple of num_kv_heads={model.num_kv_heads}; "
            f"num_kv_heads could be {nearest(model.num_kv_heads, divisors(model.num_heads))}"
        )
    if not model.head_dim and model.hidden_size % model.num_heads:
        found.append(
            f"hidden_size={model.hidden_size} is not a multiple of num_heads={model.num_heads}; "
            f"num_heads could be {nearest(model.num_heads, divisors(model.hidden_size))}, or set head_dim"
        )
    elif (head_dim := model.head_dim or model.hidden_size // model.num_heads) % 2:
        where = "" if model.head_dim else f" (hidden_size={model.hidden_size} / num_heads={model.num_heads})"
        fits = " or ".join(str(even) for even in (head_dim - 1, head_dim + 1) if even)
        found.append(
            f"head_dim={head_dim}{where} must be even: rotary embedding turns pairs of channels; use head_dim={fits}"
        )
    if not 0 < model.rope_theta < float("inf"):
        found.append(f"rope_theta={model.rope_theta} must be a number above 0, as 10000.0")
    if not 0 <= model.norm_eps < float("inf"):
        found.append(f"norm_eps={model.norm_eps} must be 0 or above, as 1e-05")
    if model.rope_scaling is not None:
        found += _scaling_problems(model.rope_scaling)
    return found + moe_problems(model)


def _scaling_problems(scaling: RopeScaling) -> list[str]:
    found = []
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"):
        if not 0 < getattr(scaling, name) < float("inf"):
            found.append(f"rope_scaling: {name}={getattr(scaling, name)} must be a number above 0")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if not found and not low < high:
        found.append(f"rope_scaling: low_freq_factor={low} must be below high_freq_factor={high}")
    return found


def moe_problems(model: ModelConfig) -> list[str]:
    """What is wrong with a mixture of experts by itself, in words; empty when it is fine, or the model dense."""
    if (moe := model.moe) is None:
        return []
    found = []
    for name in ("num_experts", "top_k", "expert_size", "shared_size", "dense_layers", "groups", "limit_groups"):
        least = 0 if name in ("shared_size", "dense_layers") else 1
        if getattr(moe, name) < least:
            found.append(f"{name}={getattr(moe, name)} must be at least {least}")
    if found:
        return found
    if moe.top_k > moe.num_experts:
        found.append(f"top_k={moe.top_k} is more than num_experts={moe.num_experts}; use top_k<={moe.num_experts}")
    if moe.dense_layers >= model.num_layers:
        found.append(
            f"dense_layers={moe.dense_layers} leaves none of num_layers={model.num_layers} an expert; "
            f"use dense_layers<={model.num_layers - 1}"
        )
    if moe.num_experts % moe.groups:
        fits = nearest(moe.groups, divisors(moe.num_experts))
        found.append(f"groups={moe.groups} does not divide num_experts={moe.num_experts}; groups could be {fits}")
    elif moe.limit_groups > moe.groups:
        found.append(f"limit_groups={moe.limit_groups} is more than groups={moe.groups}")
    elif moe.groups > 1 and moe.top_k > (most := moe.limit_groups * moe.num_experts // moe.groups):
        found.append(
            f"top_k={moe.top_k} is more than the {most} experts of limit_groups={moe.limit_groups} of "
            f"groups={moe.groups}; use top_k<={most}, or more limit_groups"
        )
    if moe.capacity is not None and not 0 < moe.capacity < float("inf"):
        found.append(
            f"capacity={moe.capacity} leaves no expert a row; use a number above 0, as 1.25, or None (no limit)"
        )
    for name in ("jitter", "aux_weight", "z_weight", "bias_rate"):
        below = 1.0 if name == "jitter" else float("inf")
        if not 0 <= getattr(moe, name) < below:
            found.append(f"{name}={getattr(moe, name)} must be 0 or above, and below {below:g}")
    if not 0 < moe.scale < float("inf"):
        found.append(f"scale={moe.scale} must be a number above 0")
    if moe.normalize and moe.top_k == 1 and moe.choice == "token":
        found.append(
            "top_k=1 with normalize=True makes every weight 1, so the router learns nothing from the loss; use "
            "normalize=False"
        )
    if moe.choice == "expert":
        for name, only in (("balance", "none"), ("groups", 1)):
            if getattr(moe, name) != only:
                found.append(
                    f"choice=expert takes equally many rows for every expert and knows no groups; {name}="
                    f"{getattr(moe, name)} must be {only}"
                )
    return found
