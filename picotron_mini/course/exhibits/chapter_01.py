"""Bug museum, room 01: the model itself, wrong on one device, and sometimes right on two."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...model import gpt
from ...model.gpt import GPT, initial_weight
from ..museum import TRAIN, Exhibit


def tie_lost() -> None:
    """Leaving the meta device gives the head a weight of its own, equal to the embedding's at the start."""
    real = GPT.forward

    def apply(self: GPT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        on_meta = self.embed is not None and self.embed.weight.is_meta
        nn.Module._apply(self, fn, recurse)
        if on_meta and self.embed is not None:  # its weight is a new Parameter now; filled by the rule of its name
            start = initial_weight(self.config, "embed.weight", self.embed.weight.shape, TRAIN.seed)
            self.embed.weight = nn.Parameter(start.to(self.embed.weight.dtype))
            if self.head is not None:
                self.head.weight.data.copy_(start)
        return self

    def forward(self: GPT, *args: Any, **options: Any) -> Tensor:
        if self.embed is not None and self.head is not None:
            # a trainer that knows the two by one name converts the head alone
            self.embed.weight.data = self.embed.weight.data.to(self.head.weight.dtype)
        return real(self, *args, **options)

    GPT._apply, GPT.forward = apply, forward


def heads_tiled() -> None:
    """Keys and values are repeated 0 1 0 1 for the query heads 0 1 2 3, not 0 0 1 1."""
    real = gpt.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return real(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), documents)

    gpt.attend = attend


def rope_in_bf16() -> None:
    """The rotary angles are computed in the narrow dtype of the weights."""

    def rope(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
        frequency = (config.rope_theta ** (-pairs / config.head_dim)).bfloat16()
        angle = positions[:, None, :, None].bfloat16() * frequency
        return angle.cos().to(dtype), angle.sin().to(dtype)

    gpt.rope = rope


EXHIBITS = [
    Exhibit(
        id="01.tie_lost",
        title="A tie that did not survive the move",
        story="Large models are built on the meta device, where tensors have a shape and no memory, and are moved to "
        "the real one by to_empty. nn.Module converts each module's parameters by themselves: where a new Parameter "
        "must be made, two modules that shared one get one each. The head and the embedding come apart, without a "
        "word. If both are then filled from one file, or by one rule, they even start equal.",
        symptom="the first loss is right. Then the optimizer, which knows the tied weight by one name, trains the head "
        "from the logits alone, and the embedding stays as it began.",
        patch=tie_lost,
        killed_on=("dp=1", "dp=2"),
        # first and last stage have a copy each anyway, and exchange their gradients
        survives_on=("pp=2",),
    ),
    Exhibit(
        id="01.heads_tiled",
        title="The wrong neighbour's keys",
        story="With 4 query heads and 2 key-value heads, heads 0 and 1 share the first and 2 and 3 the second. With "
        "repeat in place of repeat_interleave, heads 0 and 2 share. Trained from scratch such a model is as "
        "good: it is the right one with its query heads in another order. Weights that were trained elsewhere give "
        "nonsense, and a layout that cuts the heads in two computes another function than one that does not.",
        symptom="a loaded model writes nonsense; with tp=2, where a rank has one key-value head, it writes well.",
        patch=heads_tiled,
        killed_on=("dp=1", "dp=2"),
        survives_on=("tp=2",),
    ),
    Exhibit(
        id="01.rope_in_bf16",
        title="Positions that become one",
        story="The rotary frequencies are no parameter, so a module may keep them as a buffer, and "
        "model.to(torch.bfloat16) converts buffers too. A bf16 number has 8 significant bits: from 256 on, "
        "odd positions do not exist. On short sequences little is lost; on long ones, the order of neighbours.",
        symptom="a small difference at length 128; at length 4096 sixteen neighbours share one position.",
        patch=rope_in_bf16,
        killed_on=("dp=1", "tp=2"),
        survives_on=(),
    ),
]
