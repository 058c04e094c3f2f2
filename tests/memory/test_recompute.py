"""Recompute: less is kept, more is computed, and nothing changes to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from picotron_mini.config import ConfigError, RunConfig, TrainConfig
from picotron_mini.legality import resolve
from picotron_mini.memory.recompute import Recompute, recompute
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.verify import MODEL

B, T, L = 2, 6, 3
KINDS: tuple[Recompute, ...] = ("full", "selective")


def trained(kind: Recompute, frozen: tuple[str, ...] = (), layers: int = L, documents: bool = False) -> dict[str, Any]:
    """One forward and backward: its loss, its gradients, the bytes kept for backward, and calls of each layer's MLP."""
    model = GPT(replace(MODEL, num_layers=layers, tie_embeddings=False))
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    calls = []
    for block in model.layers.values():
        block.mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    recompute(model, kind)
    tokens = torch.arange(B * T).view(B, T)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not any(x.data_ptr() == p.data_ptr() for p in model.parameters()):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(tokens, documents=torch.tensor([[0, 0, 0, 1, 1, 1]] * B) if documents else None)
    loss = model.loss(hidden, tokens)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "gradients": gradients, "kept": sum(kept.values()), "calls": len(calls)}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("frozen", [(), ("embed",), ("embed", "layers.0", "layers.1.attention")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_the_same_bits(kind: Recompute, frozen: tuple[str, ...], documents: bool) -> None:
    plain, again = (trained(k, frozen, documents=documents) for k in ("none", kind))
    assert again["loss"] == plain["loss"]
    assert again["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert torch.equal(again["gradients"][name], gradient), name


def test_a_layer_keeps_its_input_only() -> None:
    one_more = trained("full", layers=L + 1)["kept"] - trained("full", layers=L)["kept"]
    assert one_more == B * T * MODEL.hidden_size * 4
    assert trained("none", layers=L + 1)["kept"] - trained("none", layers=L)["kept"] > 10 * one_more


def test_a_selective_layer_forgets_what_its_mlp_made() -> None:
    more = {k: trained(k, layers=L + 1)["kept"] - trained(k, layers=L)["kept"] for k in ("none", "selective")}
    assert more["none"] - more["selective"] == 4 * B * T * MODEL.intermediate_size * 4  # gate, up, silu, product


def test_what_is_forgotten_is_computed_twice_where_backward_passes() -> None:
    assert [trained(kind)["calls"] for kind in ("none", *KINDS)] == [L, 2 * L, 2 * L]
    assert trained("full", frozen=("embed", "layers.0"))["calls"] == 2 * L - 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_is_kept_or_computed_twice(kind: Recompute) -> None:
    with torch.no_grad():
        model = GPT(MODEL)
        init_weights(model, 0)
        tokens = torch.arange(B * T).view(B, T)
        want = model(tokens)
        recompute(model, kind)
        assert torch.equal(model(tokens), want)


def test_selective_and_compile_are_refused_together() -> None:
    train = TrainConfig(compile=True, recompute="selective")
    with pytest.raises(ConfigError, match="recompute=selective does not go with compile"):
        resolve(RunConfig(layout="dp=1", train=train))
    assert resolve(RunConfig(layout="dp=1", train=replace(train, recompute="full")))
