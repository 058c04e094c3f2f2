"""Bug museum, room 06: context parallelism, where each rank sees a part of the sequence and takes it for all of it."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...data.loader import Batch
from ...mesh import Axis, Mesh
from ...parallel import chunks, context
from ...parallel.attention_kernels import attend_with_lse
from ...training import step
from ..museum import Exhibit


def one_data_rank_is_not_wrapped() -> None:
    """Gradients are summed only if there is more than one data rank, whatever cp is."""
    real = Mesh.__getitem__

    def axis_of(self: Mesh, name: str) -> Axis:
        alone = name == "dp_cp" and self.shape.dp == 1
        return Axis("dp", 1, 0, (self.rank,)) if alone else real(self, name)

    Mesh.__getitem__ = axis_of


def positions_from_zero() -> None:
    """Every rank numbers its own tokens 0, 1, 2, ..."""
    real = step.context_slice

    def slice_of(batch: Batch, axis: Axis, how: str) -> Batch:
        part = real(batch, axis, how)
        return replace(part, positions=torch.arange(part.tokens.shape[1]).expand_as(part.tokens))

    step.context_slice = slice_of


def tokens_cut_in_runs() -> None:
    """Tokens are dealt out in one run a rank, and the ring goes on as if it were head-tail chunks."""

    def runs(seq_len: int, cp: int, index: int, how: str = "ring") -> list[slice]:
        return [slice(index * seq_len // cp, (index + 1) * seq_len // cp)]

    chunks.chunks = runs


def probabilities_of_one_block() -> None:
    """Backward normalises each block's probabilities over that block, as the block's own forward did."""
    real = context.attend_backward

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return real(grad, q, k, v, *attend_with_lse(q, k, v, **how), **how)

    context.attend_backward = backward


EXHIBITS = [
    Exhibit(
        id="06.one_data_rank_is_not_wrapped",
        title="Too few data ranks to sum gradients",
        story="picotron wraps the model in data parallelism only if there is more than one data rank. Ranks of one "
        "context-parallel group see different tokens too, so with dp=1 their gradients are never summed: norms of "
        ".0789 and .0667 for what should be one number. With dp=2 the wrapper is there, and the same code is right.",
        symptom="right in every test with dp=2; with dp=1 the copies of each weight drift apart.",
        patch=one_data_rank_is_not_wrapped,
        killed_on=("cp=2",),
        survives_on=("dp=2", "dp=2,cp=2"),
    ),
    Exhibit(
        id="06.positions_from_zero",
        title="Every slice begins at zero",
        story="A model that makes positions out of the length of its input has been right for years. Given a slice of "
        "the sequence it turns the tokens of every rank as if each slice began the text. Within a chunk all distances "
        "are right, since rotary positions act through differences; between chunks they are not.",
        symptom="a loss that is a little worse, the more so the longer the context that the model could use.",
        patch=positions_from_zero,
        killed_on=("cp=2",),
        survives_on=("dp=2", "tp=2"),
    ),
    Exhibit(
        id="06.tokens_cut_in_runs",
        title="Two ideas of who holds what",
        story="Head-tail chunks are an agreement between the loader, which deals out the tokens, and attention, which "
        "knows from it what is before what. Change it in one place only and some queries see the future, others "
        "miss their past. Positions travel with the tokens and are still right. A small model of Python source had a "
        "loss of 1.95 after 400 steps with the bug and cp=2, and of 1.88 without.",
        symptom="all shapes fit and the loss falls, a little worse: cp-1 tokens of a sequence have seen their target, "
        "and many miss a part of their past.",
        patch=tokens_cut_in_runs,
        killed_on=("cp=2",),
        survives_on=("dp=2", "tp=2"),
    ),
    Exhibit(
        id="06.probabilities_of_one_block",
        title="A share of a part taken for a share of the whole",
        story="Forward, each block's output is normalised over its own keys and the blocks are merged by their "
        "log-sum-exps. Backward needs each key's share of the whole, so it must be given the merged output and "
        "log-sum-exp. What the block's own forward returned is at hand, has the same shape, and is wrong.",
        symptom="the loss of the first step is right to the last digit; gradients of queries, keys and values are not.",
        patch=probabilities_of_one_block,
        killed_on=("cp=2",),
        survives_on=("dp=2", "tp=2"),
    ),
]
