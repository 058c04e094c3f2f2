"""Experts in Hugging Face's files, to and from our one tensor for each projection.

On disk every expert has tensors of its own, under names that differ:

                                 Mixtral                                        Qwen3-MoE
    router [E, D]                block_sparse_moe.gate.weight                   mlp.gate.weight
    gate   [I, D] of expert e    block_sparse_moe.experts.{e}.w1.weight         mlp.experts.{e}.gate_proj.weight
    up     [I, D]                block_sparse_moe.experts.{e}.w3.weight         mlp.experts.{e}.up_proj.weight
    down   [D, I]                block_sparse_moe.experts.{e}.w2.weight         mlp.experts.{e}.down_proj.weight

transformers 5 puts them together when it reads: `mlp.experts.gate_up_proj` [E, 2I, D], with gate first, and
`mlp.experts.down_proj` [E, D, I]. Such names are read as well; the older ones are written, which every release reads.

A mixture that neither of the two computes (sigmoid scores, a shared expert, ...) is written under names of our own,
`mlp.experts.gate` [E, I, D] and so on, with `model_type` "picotron_moe", which transformers does not know and refuses.

Upcycling (arXiv 2212.05055) makes a mixture from a dense model: each expert starts as a copy of its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from picotron_mini.config import ConfigError, ModelConfig, MoEConfig
from picotron_mini.model.gpt import bias_shapes, initial_weight, parameter_shapes
from picotron_mini.model.legality import model_problems

OWN = "picotron_moe"
_NAMES = {
    "mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp.gate.weight", "mlp.experts", {p: f"{p}_proj" for p in ("gate", "up", "down")}),
}


def moe_kind(config: ModelConfig) -> str:
    """Which `model_type` computes what this mixture of experts computes."""
    moe = config.moe
    assert moe is not None
    plain = (moe.choice, moe.score, moe.scale, moe.groups, moe.capacity, moe.shared_size, moe.balance == "bias")
    if plain != ("token", "softmax", 1.0, 1, None, 0, False):
        return OWN
    if config.qk_norm:
        return "qwen3_moe"
    return "mixtral" if moe.normalize and not moe.dense_layers else OWN


def to_files(kind: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file for one of ours that belongs to a router or to experts; none for others.

    Args:
        kind: a `model_type`.
        name: as `layers.1.mlp.experts.gate`.
    """
    match = re.fullmatch(r"layers\.(\d+)\.mlp\.(router|experts|shared)\.(.+)", name)
    if match is None:
        return
    layer, module, rest = match.groups()
    if kind == OWN:
        yield f"model.{name}", tensor
    elif module == "router":
        yield f"model.layers.{layer}.{_NAMES[kind][0]}", tensor
    else:
        _, experts, projections = _NAMES[kind]
        for number, weight in enumerate(tensor.unbind()):
            yield f"model.layers.{layer}.{experts}.{number}.{projections[rest]}.weight", weight


def from_files(kind: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors for those of the files; what has nothing to do with experts passes with its name unchanged.

    Raises:
        ConfigError: an expert is missing among others.
    """
    if kind == OWN:
        own = re.compile(r"model\.(layers\.\d+\.mlp\.(router|experts|shared)\..+)")
        return {(match[1] if (match := own.fullmatch(name)) else name): tensor for name, tensor in found.items()}
    if kind not in _NAMES:
        return dict(found)
    router, experts, projections = _NAMES[kind]
    ours = {theirs: projection for projection, theirs in projections.items()}
    out: dict[str, Tensor] = {}
    apart: dict[str, dict[int, Tensor]] = {}  # our name -> tensor by expert
    one = re.compile(rf"model\.layers\.(\d+)\.{re.escape(experts)}\.(\d+)\.(\w+)\.weight")
    fused = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
    for name, tensor in found.items():
        if (match := one.fullmatch(name)) and match[3] in ours:
            apart.setdefault(f"layers.{match[1]}.mlp.experts.{ours[match[3]]}", {})[int(match[2])] = tensor
        elif match := fused.fullmatch(name):
            parts = {"down": tensor}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate", "up"), tensor.chunk(2, dim=1), strict=False))
            out |= {f"layers.{match[1]}.mlp.experts.{part}": value for part, value in parts.items()}
        elif (match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)) and match[2] in (router, "mlp.gate.weight"):
            out[f"layers.{match[1]}.mlp.router.weight"] = tensor
        else:
            out[name] = tensor
    for name, experts_of in apart.items():
        missing = sorted(set(range(max(experts_of) + 1)) - set(experts_of))
        if missing:
            raise ConfigError(
                f"{name}: expert {', '.join(map(str, missing))} is missing, and expert {max(experts_of)} is there"
            )
        shapes = {tuple(weight.shape) for weight in experts_of.values()}
        if len(shapes) > 1:
            raise ConfigError(f"{name}: the experts have different shapes, {sorted(shapes)}")
        out[name] = torch.stack([experts_of[number] for number in range(len(experts_of))])
    return out


def upcycle(
    config: ModelConfig, state: Mapping[str, Tensor], moe: MoEConfig, seed: int = 0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A mixture of experts from a dense model; every expert is a copy of its layer's MLP, the router is random.

    Where a token's weights sum to 1 the mixture computes what the dense model did, whatever the router says:
    sum_e w_e MLP(x) = MLP(x). Then the copies part, since each sees other tokens.

    Args:
        config, state: of the dense model, by global name.
        moe: its experts are as wide as the dense MLP; no shared expert.
        seed: of the routers.

    Returns:
        The configuration and the weights of the mixture, by global name, biases included.

    Raises:
        ConfigError: the model is not dense, or the mixture would not compute the same.
    """
    found = []
    if config.moe is not None:
        found.append("the model has experts already; upcycling starts from a dense one")
    if moe.expert_size != config.intermediate_size:
        found.append(
            f"expert_size={moe.expert_size} is not intermediate_size={config.intermediate_size}: an expert starts as a "
            f"copy of the MLP; use expert_size={config.intermediate_size}"
        )
    for name, only in (
        ("shared_size", 0),
        ("normalize", True),
        ("scale", 1.0),
        ("choice", "token"),
        ("capacity", None),
    ):
        if getattr(moe, name) != only:
            found.append(
                f"{name}={getattr(moe, name)} would change what the model computes; use {name}={only} to upcycle"
            )
    new = replace(config, moe=moe)
    found += [] if found else model_problems(new)
    if found:
        raise ConfigError("\n".join(found))
    out: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(new).items():
        if name in state:
            out[name] = state[name]
        elif match := re.fullmatch(r"(layers\.\d+\.mlp)\.experts\.(\w+)", name):
            out[name] = state[f"{match[1]}.{match[2]}.weight"].expand(shape).clone()
        else:
            out[name] = initial_weight(new, name, shape, seed).to(state["embed.weight"].dtype)
    return new, out | {name: torch.zeros(shape) for name, shape in bias_shapes(new).items()}
