"""Backwards in two halves: the same gradients, each at its time, and reductions that start when nothing is missing."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picotron_mini.config import ModelConfig
from picotron_mini.mesh import Axis
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.parallel.data import GradientBuckets
from picotron_mini.parallel.deferred import Deferred, additions

ALONE = Axis("dp", 1, 0, (0,))
CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    qk_norm=True,
)  # fmt: skip


def gpt(tied: bool = True, dtype: torch.dtype = torch.float64) -> GPT:
    model = GPT(replace(CONFIG, tie_embeddings=tied)).to(dtype)
    init_weights(model, 0)
    return model


def loss_of(model: GPT, m: int) -> Tensor:
    tokens = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(m))
    return model.loss(model(tokens), tokens.roll(-1, 1))


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def is_product(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer and of nothing else."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)


@pytest.mark.parametrize("tied", [True, False])
def test_both_halves_are_the_whole(tied: bool) -> None:
    whole, split = gpt(tied), gpt(tied)
    deferred = Deferred([split])
    waiting = []
    for m in range(3):
        loss_of(whole, m).backward()
        loss = loss_of(split, m)
        with deferred.collecting() as products:
            loss.backward()
        waiting.append(products)
    after_first = grads(split)
    want = grads(whole)
    for name, got in after_first.items():
        if is_product(split, name):
            assert got is None, name
        elif name != "embed.weight" or not tied:
            torch.testing.assert_close(got, want[name], rtol=1e-12, atol=1e-14, msg=name)
    if tied:  # the look-up's part only
        assert not torch.allclose(after_first["embed.weight"], want["embed.weight"])
    for products in reversed(waiting):
        assert len(products) == 2 * 7 + 1
        assert products[0].weight is (split.embed if tied else split.head).weight  # last layers first
        for product in products:
            product.run()
    for name, got in grads(split).items():
        torch.testing.assert_close(got, want[name], rtol=1e-12, atol=1e-14, msg=name)


def test_outside_of_collecting_a_layer_is_as_ever() -> None:
    whole, split = gpt(), gpt()
    Deferred([split])
    for model in (whole, split):
        loss_of(model, 0).backward()
    for name, want in grads(whole).items():
        torch.testing.assert_close(grads(split)[name], want, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert not loss_of(split, 1).requires_grad


def test_frozen_weights_wait_for_nothing() -> None:
    whole, split = gpt(False), gpt(False)
    deferred = Deferred([split])
    for model in (whole, split):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("embed", "layers.0", "layers.1.attention.q.")))
    loss_of(whole, 0).backward()
    loss = loss_of(split, 0)
    with deferred.collecting() as products:
        loss.backward()
    assert len(products) == 6 + 1
    for product in products:
        product.run()
    want = grads(whole)
    assert {name for name, got in grads(split).items() if got is None} == {n for n, w in want.items() if w is None}
    for name, got in grads(split).items():
        if got is not None:
            torch.testing.assert_close(got, want[name], rtol=1e-12, atol=1e-14)


def test_only_inputs_and_output_gradients_of_linear_layers_wait() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(y := x * 3))
            return y * y  # keeps y for the backward

    seen: list[Any] = []
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Square(), nn.Linear(3, 3))
    deferred = Deferred([model])
    loss = model(torch.randn(4, 3)).sum()
    assert seen[0]() is not None
    with deferred.collecting() as products:
        loss.backward()
    del loss
    assert seen[0]() is None
    assert model[2].bias.grad is not None and model[2].weight.grad is None  # a bias is no product
    inputs = [weakref.ref(product.x) for product in products]
    while products:
        products.pop(0).run()
    assert all(ref() is None for ref in inputs)


def test_additions() -> None:
    model = gpt(tied=True)
    weight = model.get_parameter("embed.weight")
    assert additions(model, split=False)[weight] == 1
    assert additions(model, split=True)[weight] == 2
    rest = [p for p in model.parameters() if p is not weight]
    assert {additions(model, split)[p] for p in rest for split in (True, False)} == {1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buckets_start_in_the_last_w_and_not_before(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """I0 W0 I1 I2 W1 W2: each gradient has a last addition of its own, and its bucket starts with it."""
    micro_batches = 3
    split, whole = gpt(dtype=dtype), gpt(dtype=dtype)
    deferred = Deferred([split])
    buckets, expected = (GradientBuckets(model.parameters(), ALONE, 1.0) for model in (split, whole))
    for m in range(micro_batches):
        loss_of(whole, m).backward()
    expected.finish()
    started: list[str] = []
    real = GradientBuckets._start
    monkeypatch.setattr(GradientBuckets, "_start", lambda self: (started.append(now), real(self)))
    buckets.arm({p: n * micro_batches for p, n in additions(split, True).items()})
    waiting = {}
    for now in ("I0", "W0", "I1", "I2", "W1", "W2", "finish"):
        m = int(now[1]) if now != "finish" else -1
        if now[0] == "I":
            with deferred.collecting() as waiting[m]:
                loss_of(split, m).backward()
        elif now[0] == "W":
            for product in waiting.pop(m):
                product.run()
        else:
            buckets.finish()
    assert started == ["I2"] + ["W2"] * (len(buckets.buckets) - 1)  # the first is that of the last norm
    for name, parameter in split.named_parameters():
        got, want = buckets.gradient(parameter), expected.gradient(whole.get_parameter(name))
        assert got is not None and got.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=name)
