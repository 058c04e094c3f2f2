"""The optimizer over a rank's part of the weights, with float32 masters where compute is narrower.

A bf16 number has 8 bits of precision: an update smaller than 1/256 of a weight is rounded away. So the optimizer
keeps and updates float32 masters and rounds them into the weights that compute uses:

    gradients (float32, summed) -> AdamW on masters (float32) -> weights (bf16)

Weight decay pulls matrices only: norms are scales around 1, and pulling them to 0 only hurts. AdamW: arXiv 1711.05101.
Every rule here works element by element, so a rank may update its slices alone and all layouts agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import TrainConfig


def make_optimizer(masters: Mapping[str, Tensor], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the masters of trained parameters, in two groups: matrices decay, vectors do not.

    Args:
        masters: by global name; those that do not require a gradient must be left out by the caller.
    """
    groups = [
        {"params": [m for m in masters.values() if m.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [m for m in masters.values() if m.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or [{"params": [torch.zeros(0)]}]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, foreach=True)
    fused = all(m.is_cuda for m in masters.values()) and bool(masters)
    kind = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), **kind)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients are multiplied with so that their global norm is at most `clip_norm`; stays on the device."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)
