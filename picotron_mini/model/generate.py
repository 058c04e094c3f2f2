"""Text generation with a key-value cache.

A decoder writes one token at a time, and each new token attends to all that came before. The keys and values of earlier
tokens never change (attention is causal), so they are kept:

    prefill   prompt t0 t1 t2 t3  -> keys, values of 4 tokens stored, logits of the last one  -> t4
    decode    t4                  -> 1 query against 5 keys, 1 key and value stored           -> t5
    decode    t5                  -> 1 query against 6 keys ...

Without the cache, step n runs n tokens through the model, n^2 / 2 in all; with it, n. The price is memory:
2 (keys and values) * layers * Hkv * Dh * tokens numbers a sequence, which is what grouped-query attention divides
by H / Hkv (arXiv 2305.13245).

Legend: B batch, T tokens, Hkv key-value heads, Dh width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from picotron_mini.config import ConfigError, UserError
from picotron_mini.model.gpt import GPT


class LayerCache:
    """The keys and values of one layer, in buffers that hold `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None  # each [B, Hkv, capacity, Dh]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, Hkv, T, Dh] of the new tokens; returns views of all so far, [B, Hkv, length, Dh]."""
        if self._buffers is None:
            batch, heads, _, head_dim = k.shape  # this rank's heads, which the weights decide
            shape = (batch, heads, self.capacity, head_dim)
            self._buffers = (k.new_empty(shape), v.new_empty(shape))
        start, self.length = self.length, self.length + k.shape[2]
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, start : self.length] = new
        keys, values = self._buffers
        return keys[:, :, : self.length], values[:, :, : self.length]


class KeyValueCache:
    """The keys and values of every layer that a model holds, and the documents of the cached tokens if they are given.

    Args:
        capacity: the most tokens a sequence will have, prompt included.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens cached so far
        self._layers: dict[str, LayerCache] = {}
        self._documents: Tensor | None = None  # [B, length]

    def layer(self, index: str) -> LayerCache:
        return self._layers.setdefault(index, LayerCache(self.capacity))

    def extend(self, tokens: int, documents: Tensor | None) -> Tensor | None:
        """Make room for new tokens; returns the documents [B, length] of all, or None if none were ever given.

        Raises:
            ConfigError: more tokens than the capacity, or documents for some tokens and not for others.
        """
        if self.length + tokens > self.capacity:
            raise ConfigError(
                f"{self.length + tokens} tokens do not fit a cache of {self.capacity}; give it more capacity"
            )
        if self.length and (documents is None) != (self._documents is None):
            raise ConfigError("give the documents of every cached token, or of none")
        if documents is not None:
            old = [] if self._documents is None else [self._documents]
            self._documents = torch.cat([*old, documents], dim=1)
        self.length += tokens
        return self._documents


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from logits [B, V] -> [B] int64.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; 0: among all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]  # [B, 1], the score of the last token kept
        scores = scores.masked_fill(scores < least, float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def check_draws(temperature: float, top_k: int, max_new_tokens: int, seed: int) -> None:
    """Refuse settings that no token can be drawn with.

    Raises:
        ConfigError: naming the first of them, its value and what would work.
    """
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} must be a number, 0 (always the most likely token) or above")
    if top_k < 0:
        raise ConfigError(f"top_k={top_k} cannot be negative; 0 draws among all tokens")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} cannot be negative")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be 0 or above, and below 2**63")


def next_logits(model: GPT, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """Scores [B, V] of what follows tokens [B, T], which are appended to the cache."""
    return model.logits(model(tokens, cache=cache)[:, -1])


@torch.no_grad()
def stream(
    scores: Callable[[Tensor, KeyValueCache], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue the prompts, giving each new token as soon as it is drawn.

    Args:
        scores: `next_logits` of a model, whole or spread over ranks, on the device of the tokens.
        tokens: prompts [B, T] int64, T at least 1.
        max_new_tokens: at most this many are written.
        temperature, top_k: see `sample`.
        seed: of the draws; the same seed writes the same text on the same device.
        stop_token: a sequence that wrote it only repeats it; when all have, writing ends.

    Yields:
        [B] int64, one for each step.

    Raises:
        ConfigError: an empty prompt, or settings out of range.
        UserError: a score is NaN or infinite.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ConfigError(f"a prompt of shape {list(tokens.shape)} cannot be continued; it needs one token or more")
    check_draws(temperature, top_k, max_new_tokens, seed)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    cache = KeyValueCache(tokens.shape[1] + max_new_tokens)
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        logits = scores(tokens, cache)  # the whole prompt first, then one by one
        if not logits.isfinite().all():
            raise UserError(
                f"after {cache.length} tokens the model's scores are NaN or infinite, so no token comes next; "
                "its weights have diverged, or dtype is too narrow for them: take a wider one, or train with a lower lr"
            )
        new = sample(logits, temperature, top_k, generator)
        if stop_token is not None:
            new = torch.where(done, stop_token, new)
            done |= new == stop_token
        yield new
        if bool(done.all()):
            return
        tokens = new[:, None]


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_token: int | None = None,
) -> Tensor:
    """The prompts [B, T] with what `stream` writes after them, [B, T + at most max_new_tokens] int64."""
    scores = partial(next_logits, model)
    new = stream(scores, tokens, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop_token=stop_token)
    return torch.cat([tokens, *(token[:, None] for token in new)], dim=1)
