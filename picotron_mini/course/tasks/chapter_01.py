"""Exercises of chapter 01, the model and its costs: parameters and flops, counted.

The checkers count on the model itself: its parameters one by one, its flops as they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...config import ModelConfig
from ...model.gpt import GPT, Attention, rope
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]
Wrong = dict[str, tuple[Answer, str]]  # name -> a wrong answer and its hint

# V, D, F, L, H, Hkv, Dh. Something differs from the plain case in each: shared keys, a head width, an untied head.
CONFIGS = [
    ModelConfig(50, 32, 88, 3, 4, 2, 8),
    ModelConfig(61, 24, 40, 2, 4, 4, 10, tie_embeddings=False),
    ModelConfig(61, 48, 96, 5, 6, 1, 12),
]


def _short(config: ModelConfig) -> str:
    sizes = {"V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size, "L": config.num_layers}
    sizes |= {"H": config.num_heads, "Hkv": config.num_kv_heads, "Dh": config.head_dim}
    return (
        ", ".join(f"{name}={size}" for name, size in sizes.items())
        + ", tied" * config.tie_embeddings
        + ", qk_norm" * config.qk_norm
    )


def _first_hint(got: Any, wrong: Wrong, cases: list[tuple[Any, ...]]) -> str | None:
    return next((hint for answer, hint in wrong.values() if got == [answer(*case) for case in cases]), None)


# --- 1: parameters ----------------------------------------------------------------------------------------


def parameters_stub(config: ModelConfig) -> int:
    """Count the parameters of the lesson's model, to the unit, from its configuration.

    Args:
        config: `vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim` and
            `tie_embeddings`; with `qk_norm` queries and keys have a norm each, whose weight all heads share.
    """
    raise NotAttempted


def parameters(config: ModelConfig) -> int:
    """Tables, layers and the last norm."""
    width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = width * config.head_dim * (2 * heads + 2 * kv_heads)  # q and o, k and v
    norms = 2 * width + (2 * config.head_dim if config.qk_norm else 0)
    layer = attention + 3 * width * config.intermediate_size + norms
    tables = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    return tables + config.num_layers * layer + width


def _attention(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)


_PARAMETERS: Wrong = {
    "tied twice": (
        lambda c: parameters(replace(c, tie_embeddings=False)),
        "a tied head is the embedding's table, and the two are one parameter: count it once",
    ),
    "never tied": (
        lambda c: parameters(replace(c, tie_embeddings=True)),
        "an untied head has a table of its own: V D more",
    ),
    "all heads have keys": (
        lambda c: parameters(replace(c, num_kv_heads=c.num_heads)),
        "k and v are [Hkv Dh, D]: there are num_kv_heads of them, not num_heads",
    ),
    "width over heads": (
        lambda c: parameters(replace(c, head_dim=c.hidden_size // c.num_heads)),
        "head_dim is a setting of its own; hidden_size // num_heads is only its usual value",
    ),
    "square": (
        lambda c: parameters(c) + c.num_layers * (4 * c.hidden_size**2 - _attention(c)),
        "4 D^2 is attention's only where H Dh = D and no keys are shared: q and o are [H Dh, D], k and v [Hkv Dh, D]",
    ),
    "two matrices": (
        lambda c: parameters(c) - c.num_layers * c.hidden_size * c.intermediate_size,
        "SwiGLU has three matrices: gate, up and down",
    ),
    "no norms": (
        lambda c: parameters(replace(c, qk_norm=False)) - (2 * c.num_layers + 1) * c.hidden_size,
        "each norm has a weight of D numbers: two a layer, and one at the end",
    ),
    "no norms of queries and keys": (
        lambda c: parameters(replace(c, qk_norm=False)),
        "with qk_norm a layer has two norms more, of queries and of keys, with Dh weights each",
    ),
    "a norm for each head": (
        lambda c: parameters(c) + c.num_layers * c.head_dim * (c.num_heads + c.num_kv_heads - 2) * c.qk_norm,
        "all heads of a layer share the weight of the queries' norm, and that of the keys': Dh numbers each",
    ),
    "one norm a layer": (
        lambda c: parameters(c) - c.num_layers * c.hidden_size,
        "each layer has two norms, one before attention and one before the MLP",
    ),
    "no last norm": (
        lambda c: parameters(c) - c.hidden_size,
        "one norm is missing: the last, before the head, has D weights too",
    ),
}


def _run_parameters(answer: Answer) -> str | None:
    configs = [*CONFIGS[:-1], replace(CONFIGS[-1], qk_norm=True)]
    got = [answer(config) for config in configs]
    with torch.device("meta"):
        models = [GPT(config) for config in configs]
    counted = [sum(p.numel() for p in model.parameters()) for model in models]
    if got == counted:
        return None
    if hint := _first_hint(got, _PARAMETERS, [(config,) for config in configs]):
        return hint
    at = next(i for i in range(len(got)) if got[i] != counted[i])
    return f"{_short(configs[at])} has {counted[at]:,} parameters, not {got[at]}"


# --- 2: flops ---------------------------------------------------------------------------------------------


def attention_flops_stub(config: ModelConfig, seq_len: int) -> int:
    """Count the flops of one attention module (q, k, v, scores, weighted sum, o) on one sequence, forward.

    A multiplication with its addition is 2 flops. Masked scores count like the others, softmax and RoPE do not count.
    """
    raise NotAttempted


def attention_flops(config: ModelConfig, seq_len: int) -> int:
    """Two flops a weight and token; and for each pair of tokens two products of Dh numbers in each query head."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    projections = 2 * seq_len * config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)
    pairs = 2 * 2 * seq_len * seq_len * heads * config.head_dim
    return projections + pairs


def _pairs(config: ModelConfig, seq_len: int) -> int:
    return 4 * seq_len**2 * config.num_heads * config.head_dim


_FLOPS: Wrong = {
    "scores of the key heads": (
        lambda c, t: attention_flops(c, t) - _pairs(c, t) + 4 * t * t * c.num_kv_heads * c.head_dim,
        "each query head has scores of its own; sharing keys saves memory and k's and v's projections, and no scores",
    ),
    "all heads have keys": (
        lambda c, t: attention_flops(replace(c, num_kv_heads=c.num_heads), t),
        "the projections k and v are as small as num_kv_heads says",
    ),
    "one flop a product": (
        lambda c, t: attention_flops(c, t) // 2,
        "half of it: a multiplication and its addition are two operations",
    ),
    "halved for the mask": (
        lambda c, t: attention_flops(c, t) - _pairs(c, t) // 2,
        "half of the pairs are missing: masked scores count here, and there are two products, q kT and p v",
    ),
    "halved exactly": (
        lambda c, t: attention_flops(c, t) - _pairs(c, t) + _pairs(c, t) * (t + 1) // (2 * t),
        "T (T + 1) / 2 pairs are those that the mask leaves; masked scores count here",
    ),
    "linear in the tokens": (
        lambda c, t: attention_flops(c, t) - _pairs(c, t) + _pairs(c, t) // t,
        "every token looks at all T tokens, so the products of pairs grow with T squared",
    ),
    "of one token": (
        lambda c, t: attention_flops(c, t) // t,
        "these are the flops of one token; a whole sequence is asked for",
    ),
    "width, not heads": (
        lambda c, t: attention_flops(c, t) - _pairs(c, t) + 4 * t * t * c.hidden_size,
        "the scores multiply H Dh numbers for each pair, and that is D only where head_dim is D / H",
    ),
    "all layers": (
        lambda c, t: c.num_layers * attention_flops(c, t),
        "these are the flops of all layers; one attention module is asked for",
    ),
    "no o": (
        lambda c, t: attention_flops(c, t) - 2 * t * c.hidden_size * c.num_heads * c.head_dim,
        "the last projection is missing: o turns H Dh numbers into D, for each token",
    ),
}


def _counted_flops(config: ModelConfig, seq_len: int) -> int:
    attention = Attention(config)
    cos, sin = rope(config, torch.arange(seq_len)[None], torch.float32)
    x = torch.zeros(1, seq_len, config.hidden_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(x, cos, sin)
    return int(counter.get_total_flops())


def _run_flops(answer: Answer) -> str | None:
    cases = [(config, seq_len) for config in CONFIGS for seq_len in (8, 20)]
    got = [answer(*case) for case in cases]
    counted = [_counted_flops(*case) for case in cases]
    if got == counted:
        return None
    if hint := _first_hint(got, _FLOPS, cases):
        return hint
    at = next(i for i in range(len(got)) if got[i] != counted[i])
    return f"with T={cases[at][1]} and {_short(cases[at][0])} it takes {counted[at]:,} flops, not {got[at]}"


def mistakes(wrong: Wrong) -> tuple[Mistake, ...]:
    """Wrong answers in the form that an exercise carries."""
    return tuple(Mistake(name, answer, hint) for name, (answer, hint) in wrong.items())


EXERCISES = [
    Exercise(
        id="01.parameters",
        title="Parameters, to the unit",
        task="Count the parameters of a configuration. The model itself, built without memory, is counted beside you.",
        stub=parameters_stub,
        reference=parameters,
        mistakes=mistakes(_PARAMETERS),
        run=_run_parameters,
    ),
    Exercise(
        id="01.attention_flops",
        title="What shared keys save",
        task="Count the flops of one grouped-query attention module. PyTorch's counter watches a real one.",
        stub=attention_flops_stub,
        reference=attention_flops,
        mistakes=mistakes(_FLOPS),
        run=_run_flops,
    ),
]
