"""The loss in chunks of tokens, so that the logits never exist whole.

Logits are the widest tensor of a step: T V numbers a sequence where a layer's output has T D. With V = 49,152, four
sequences of 2,048 tokens and float32 they take 1.5 GiB, and their gradient as much again. But the loss is a sum over
tokens, and its gradient is known as soon as it is computed. So take the tokens in k parts:

    for each part:   logits = hidden[part] W^T      [B, T/k, V]
                     loss  += cross_entropy(logits)
                     d hidden[part], dW += gradients of that             the logits end here

and hand out what was kept, times the incoming gradient, when backward asks. No product is computed twice. Kept from
here to backward: dL/dhidden [B, T, D] and dL/dW [V, D], in float32 or wider.

The same under a split vocabulary: each part exchanges three numbers a token, all parts together as many as before.
PyTorch has no tool of its own for this; fused kernels of the kind are known from Liger Kernel (arXiv 2410.10989).
Legend: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from ..model.gpt import GPT, at_least_float32


def chunked_loss(model: GPT, chunks: int) -> None:
    """Let `model.loss` take the tokens in `chunks` parts, in place; does nothing on a stage without a head.

    Args:
        chunks: 1 leaves the model as it is; more than there are tokens is as many as there are.
    """
    if model.head is None or chunks == 1:
        return
    whole, head = model.loss, model.head

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            parts = zip(hidden.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True)
            return torch.stack([whole(*part) for part in parts]).sum()
        return _ChunkedLoss.apply(whole, chunks, hidden, targets, head.weight)

    model.loss = loss  # type: ignore[method-assign]


class _ChunkedLoss(Function):
    @staticmethod
    def forward(ctx, whole: Callable[[Tensor, Tensor], Tensor], chunks: int, hidden, targets, weight):  # type: ignore[no-untyped-def]
        wanted = [hidden.requires_grad, weight.requires_grad]
        total = torch.zeros((), dtype=at_least_float32(hidden).dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=total.dtype) if wanted[1] else None
        start = 0
        for part, labels in zip(hidden.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True):
            part = part.detach().contiguous().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                loss = whole(part, labels)
            leaves = [leaf for leaf, want in zip((part, weight), wanted, strict=True) if want]
            gradients = list(torch.autograd.grad(loss, leaves)) if leaves else []
            if d_weight is not None:
                d_weight += gradients.pop()
            if d_hidden is not None:
                d_hidden[:, start : start + part.shape[1]] = gradients.pop()
            total += loss.detach()
            start += part.shape[1]
        ctx.d_hidden, ctx.d_weight = d_hidden, d_weight
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        d_hidden = None if ctx.d_hidden is None else ctx.d_hidden.mul_(grad)
        d_weight = None if ctx.d_weight is None else ctx.d_weight.mul_(grad)
        ctx.d_hidden = ctx.d_weight = None  # they are handed on
        return None, None, d_hidden, None, d_weight
