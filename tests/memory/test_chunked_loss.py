"""The loss in parts: the same loss and gradients, and no tensor as large as the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_mini.memory.chunked_loss import chunked_loss
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.verify import MODEL

B, T = 2, 7


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def loss_of(chunks: int, dtype: torch.dtype = torch.float64, frozen: str = "", tied: bool = False) -> dict[str, Any]:
    model = GPT(replace(MODEL, num_layers=1, vocab_size=701, tie_embeddings=tied))  # V well above T and D
    init_weights(model, 0)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    chunked_loss(model, chunks)
    tokens = torch.arange(B * T).view(B, T)
    targets = tokens.clone()
    targets[0, :3] = -100
    hidden = model(tokens)
    loss = model.loss(hidden, targets) / 11  # the incoming gradient is not 1
    if loss.requires_grad:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", ["", "head", "layers"])
@pytest.mark.parametrize("chunks", [2, 3, 7, 100])
def test_the_same_loss_and_gradients(chunks: int, frozen: str, tied: bool) -> None:
    whole, parts = loss_of(1, frozen=frozen, tied=tied), loss_of(chunks, frozen=frozen, tied=tied)
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=1e-13, atol=0)
    assert parts["gradients"].keys() == whole["gradients"].keys()
    for name, want in whole["gradients"].items():
        torch.testing.assert_close(parts["gradients"][name], want, rtol=1e-11, atol=1e-14, msg=name)


def most(chunks: int, tokens: int = 64) -> int:
    """The most elements of any tensor while the loss and the gradient of the hidden states are computed."""
    model = GPT(replace(MODEL, num_layers=1, vocab_size=701, tie_embeddings=False)).requires_grad_(False)
    chunked_loss(model, chunks)
    hidden = torch.zeros(B, tokens, MODEL.hidden_size, requires_grad=True)
    with Largest() as largest:
        model.loss(hidden, torch.zeros(B, tokens, dtype=torch.int64)).backward()
    return largest.elements


def test_the_logits_never_exist_whole() -> None:
    logits, weight = B * 64 * 701, 701 * MODEL.hidden_size
    assert most(1) == logits > 3 * weight
    assert most(8) == weight > logits / 8  # the weight itself, transposed for the product, is the largest now


def test_bf16_is_added_up_in_float32() -> None:
    exact = loss_of(1)
    whole, parts = loss_of(1, torch.bfloat16), loss_of(7, torch.bfloat16)
    assert parts["loss"].dtype == torch.float32
    name = "head.weight"
    error = {
        k: (x["gradients"][name].double() - exact["gradients"][name]).norm().item()
        for k, x in {"whole": whole, "parts": parts}.items()
    }
    assert error["parts"] < 1.5 * error["whole"]


def test_without_gradients() -> None:
    with torch.no_grad():
        torch.testing.assert_close(loss_of(3)["loss"], loss_of(1)["loss"], rtol=1e-13, atol=0)
