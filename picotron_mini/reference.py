"""What one device computes: the plain model, torch's own optimizer and clipping, each global batch at once.

This is the oracle of `verify`. It imports the model and the settings and nothing else of this library, so that a
mistake in the library cannot be in both. Everything is written out: no layout, no buckets; micro-batches only where
they are part of the definition, as pools of tokens over which experts are balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import ModelConfig, MoEConfig, TrainConfig
from .model.gpt import GPT, IGNORE, init_weights
from .model.moe import MoE, Pool
from .model.routing import Routing

if TYPE_CHECKING:
    from .data.loader import Batch


@dataclass
class Snapshot:
    """One step: what was computed. Tensors by global parameter name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]  # before clipping
    weights: dict[str, Tensor]  # after the update
    routing: dict[str, Tensor] = field(default_factory=dict)  # of experts: counts, auxiliary losses, biases after it


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
    routers = {module.layer: module.router for module in gpt.modules() if isinstance(module, MoE)}
    for router in routers.values():
        if router.bias is not None:
            router.bias = torch.zeros_like(router.bias, dtype=torch.promote_types(dtype, torch.float32))
    out = []
    for step, cpu_batch in enumerate(batches):
        batch = cpu_batch.to(device)
        seen: dict[int, Routing] = {}
        pool = _watching(seen, batch.tokens, train.seed, step)
        hidden = gpt(batch.tokens, batch.positions, batch.documents if train.document_mask else None, pool=pool)
        loss = gpt.loss(hidden, batch.targets) / (batch.targets != IGNORE).sum()
        extra, routing = _auxiliary(model.moe, train, seen)
        optimizer.zero_grad()
        (loss + extra).backward()
        gradients = {n: p.grad.detach().cpu().clone() for n, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip_norm or float("inf"))
        optimizer.step()
        weights = {n: p.detach().cpu().clone() for n, p in named.items()}
        for layer, router in routers.items():
            if router.bias is not None and model.moe is not None:
                rows = routing[f"layer {layer}, rows"].to(router.bias)
                router.bias = router.bias + model.moe.bias_rate * torch.sign(rows.mean() - rows)
                routing[f"layer {layer}, bias"] = router.bias.cpu()
        out.append(Snapshot(loss.item(), norm.item(), gradients, weights, routing))
    return out


def _watching(seen: dict[int, Routing], tokens: Tensor, seed: int, step: int) -> Pool:
    """The whole global batch as a pool; what each layer's router decides is put into `seen`."""

    def observe(layer: int, routing: Routing, y: Tensor) -> Tensor:
        seen[layer] = routing
        return y

    index = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
    return Pool(index, seed, step, observe=observe)


def _auxiliary(
    moe: MoEConfig | None, train: TrainConfig, seen: dict[int, Routing]
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted auxiliary losses of a step, from their definitions, and what the routers did, by name.

    A global pool is micro-batch k of all data ranks. The batch has the ranks' sequences one after the other, and in
    them their micro-batches.
    """
    total: Tensor | float = 0.0
    noted: dict[str, Tensor] = {}
    for layer, routing in seen.items():
        assert moe is not None
        p = (routing.scores / routing.scores.sum(-1, keepdim=True)).view(train.batch_size, train.seq_len, -1)
        chosen = routing.chosen.to(p.dtype).view_as(p)  # [G, T, E]
        if moe.aux_scope == "global":
            by_rank = (-1, train.micro_batches, train.micro_batch_size * train.seq_len, moe.num_experts)
            p, chosen = (x.reshape(by_rank).transpose(0, 1).flatten(1, 2) for x in (p, chosen))  # [k, tokens, E]
        aux = moe.num_experts * (chosen.mean(1) / moe.top_k * p.mean(1)).sum(-1).mean()
        z = routing.logits.exp().sum(-1).log().square().mean()
        weight = moe.aux_weight if moe.balance == "aux" else 0.0
        total = total + weight * aux + moe.z_weight * z
        values = {
            "rows": routing.chosen.sum(0),
            "dropped": routing.chosen.sum() - (routing.experts >= 0).sum(),
            "auxiliary loss": aux * (weight > 0),
            "z-loss": z,
        }
        noted |= {f"layer {layer}, {what}": value.detach().cpu().double() for what, value in values.items()}
    return total, noted
