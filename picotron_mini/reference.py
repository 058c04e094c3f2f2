"""What one device computes: the plain model, torch's own optimizer and clipping, each global batch at once.

This is the oracle of `verify`. It imports the model and the settings and nothing else of this library, so that a
mistake in the library cannot be in both. Everything is written out: no layout, no micro-batches, no buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import ModelConfig, TrainConfig
from .model.gpt import GPT, IGNORE, init_weights

if TYPE_CHECKING:
    from .data.loader import Batch


@dataclass
class Snapshot:
    """One step: what was computed. Tensors by global parameter name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]  # before clipping
    weights: dict[str, Tensor]  # after the update


def reference(
    model: ModelConfig, train: TrainConfig, batches: Sequence[Batch], dtype: torch.dtype, device: str
) -> list[Snapshot]:
    """Train the plain model on one device, each global batch at once, with torch's own optimizer and clipping."""
    gpt = GPT(model).to(device)
    init_weights(gpt, train.seed)
    gpt.to(dtype)
    named = dict(gpt.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(not train.freezes(name))
    trained = [p for p in named.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=train.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2))
    out = []
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        hidden = gpt(batch.tokens, batch.positions, batch.documents if train.document_mask else None)
        loss = gpt.loss(hidden, batch.targets) / (batch.targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        gradients = {n: p.grad.detach().cpu().clone() for n, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip_norm or float("inf"))
        optimizer.step()
        weights = {n: p.detach().cpu().clone() for n, p in named.items()}
        out.append(Snapshot(loss.item(), norm.item(), gradients, weights))
    return out
