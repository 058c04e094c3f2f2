"""Routing: which experts a token passes, and with which weights. Pure functions; no weights, no ranks.

    logits [N, E] --score--> scores [N, E] --choose--> experts [N, K]  --weigh--> weights [N, K]

Score. softmax(z) makes a distribution; sigmoid(z) judges each expert by itself (DeepSeek-V3, arXiv 2412.19437).

Choose. Token choice: each token takes its K best experts. With `groups`, first its best groups (by the sum of their two
best experts), then the experts inside them, so that a token's experts lie on few machines. A bias may be added for the
choice, and for the choice only (arXiv 2408.15664). Expert choice (arXiv 2202.09368): each expert takes its C best
tokens of each sequence, so all are equally busy; a token may get no expert, or all. Whether that is so depends on
later tokens, so it cannot be used to write text.

Weigh. The chosen scores, divided by their sum if `normalize`. A softmax over the chosen logits alone is the same thing:

    exp(z_i) / sum_chosen exp(z_j) = p_i / sum_chosen p_j          since p_i = exp(z_i) / Z, and Z cancels

Capacity. An expert takes C = ceil(capacity T K / E) rows of a sequence of T tokens; what comes later is dropped, which
leaves an expert index of -1 and, of the token, the residual stream. "Later" is by position, then by the order of the
token's choices: a later token never pushes out an earlier one. It is by sequence, so no batch, no accumulation and no
number of ranks changes it.

All of it is computed in at least float32: in bf16 two scores often tie, and the choice would be noise.

Legend: N tokens, B sequences of T tokens, E experts, K experts a token, C rows of an expert in a sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from picotron_mini.config import MoEConfig


class Routing(NamedTuple):
    """What a router decided for N tokens. All experts are numbered over the whole model."""

    experts: Tensor  # [N, K] int64, -1: no expert (dropped); with expert choice K = E columns, one for each expert
    weights: Tensor  # [N, K], 0 where there is no expert, of at least float32
    logits: Tensor  # [N, E], of at least float32
    scores: Tensor  # [N, E], before any bias
    chosen: Tensor  # [N, E] bool: which experts were chosen, those that had no room included


def score(config: MoEConfig, logits: Tensor) -> Tensor:
    """Scores [N, E] of the logits [N, E]."""
    return logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()


def choose(config: MoEConfig, scores: Tensor, bias: Tensor | None = None) -> Tensor:
    """Token choice: the experts [N, K] of each token, best first.

    Args:
        scores: [N, E].
        bias: [E], added for the choice.
    """
    wish = scores.detach() if bias is None else scores.detach() + bias
    if config.groups > 1:
        grouped = wish.unflatten(-1, (config.groups, -1))  # [N, G, E/G]
        worth = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)  # [N, G]
        best = worth.topk(config.limit_groups).indices
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        wish = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return wish.topk(config.top_k).indices


def room(config: MoEConfig, tokens: int) -> int:
    """C, the rows that an expert takes of a sequence of this many tokens; at most all of them."""
    return min(tokens, math.ceil((config.capacity or 1.0) * tokens * config.top_k / config.num_experts))


def keep(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices [B, T, K] find room: the first `capacity` of each expert in each sequence.

    Args:
        experts: [B, T, K] int64 of whole sequences, in the order of positions.

    Returns:
        [B, T, K] bool.
    """
    queue = experts.flatten(1)  # [B, T * K]: by position, then by choice
    order = queue.argsort(dim=1, stable=True)
    number = torch.arange(num_experts, device=queue.device).expand(len(queue), -1).contiguous()
    first = torch.searchsorted(queue.gather(1, order), number)  # [B, E]: where each expert's begin in that order
    index = torch.arange(queue.shape[1], device=queue.device).expand_as(queue)
    place = torch.empty_like(queue).scatter_(1, order, index) - first.gather(1, queue)  # 0 for the first of its expert
    return (place < capacity).view_as(experts)


def choose_tokens(scores: Tensor, capacity: int) -> Tensor:
    """Expert choice: each expert takes the `capacity` tokens of each sequence that score highest; ties: the earlier.

    Scores that differ by no more than rounding are a tie. Such are not rare: a token that begins a sequence twice is
    twice the same to every layer, and which of the two rounds higher depends on the order of a sum, so on the layout.

    Args:
        scores: [B, T, E] of whole sequences, in the order of positions.

    Returns:
        [B, T, E] bool: whether the expert takes the token.
    """
    coarse = (scores.detach() / math.sqrt(torch.finfo(scores.dtype).eps)).round()  # half of the digits
    order = coarse.sort(dim=1, descending=True, stable=True).indices  # [B, T, E]
    taken = torch.zeros_like(scores, dtype=torch.bool)
    return taken.scatter(1, order[:, :capacity], True)


def weigh(config: MoEConfig, scores: Tensor, experts: Tensor) -> Tensor:
    """The weights [N, K] of the chosen experts [N, K], before any is dropped: no weight depends on another's room."""
    return _scaled(config, scores.gather(-1, experts))


def weigh_taken(config: MoEConfig, scores: Tensor, taken: Tensor) -> Tensor:
    """Expert choice: the weights [N, E], 0 where the expert did not take the token."""
    return _scaled(config, scores * taken)


def _scaled(config: MoEConfig, weights: Tensor) -> Tensor:
    if config.normalize:  # a token that nobody took, or whose sigmoids are all 0, keeps its zeros
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights * config.scale if config.scale != 1.0 else weights


def noise(amplitude: float, key: int, index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Factors between 1 - amplitude and 1 + amplitude, a pure function of (key, token, channel).

    A generator's next number depends on how many were drawn before, so on the layout. These depend on nothing but the
    token's number: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) turns a counter into random bits.

    Args:
        key: of the step and the layer.
        index: [N] int64, the number of each token in the global batch.

    Returns:
        [N, width].
    """
    channel = torch.arange(width, device=index.device)
    x = (index[:, None] * width + channel) * -0x61C8864680B583EB + _signed(key)  # the odd constant of the golden ratio
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ _shift(x, 31)
    uniform = _shift(x, 11).to(torch.float64) * 2.0**-53  # [0, 1)
    return (1 + amplitude * (2 * uniform - 1)).to(dtype)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 has a sign, which `>>` would copy."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
