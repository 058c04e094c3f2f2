"""Exercises of chapter 04, tensor parallelism: how far a model can be cut, and what a layer costs.

The first is decided by the predicate that refuses a layout, the second by the ledger of a real run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...collectives import ledger
from ...config import MeshShape, ModelConfig
from ...legality import layout_problems
from ...mesh import Axis
from ...model.gpt import GPT, init_weights
from ...parallel.tensor import tensor_parallel
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_04 import on_ranks

Answer = Callable[..., Any]


# --- which sizes are legal --------------------------------------------------------------------------------


def legal_sizes_stub(model: ModelConfig, most: int) -> list[int]:
    """The sizes of tp, from 1 to `most`, that this library accepts for a model.

    Args:
        model: reads like `model.num_heads`, `model.num_kv_heads`, `model.intermediate_size`, `model.vocab_size`.
    """
    raise NotAttempted


def legal_sizes(model: ModelConfig, most: int) -> list[int]:
    """Whole heads, whole key-value heads, equal parts of the MLP; the vocabulary may be uneven, but nobody's empty."""
    cut = (model.num_heads, model.num_kv_heads, model.intermediate_size)
    return [
        tp
        for tp in range(1, most + 1)
        if not any(size % tp for size in cut) and (tp - 1) * -(-model.vocab_size // tp) < model.vocab_size
    ]


_SIZES: dict[str, tuple[Answer, str]] = {
    "key-value heads forgotten": (
        lambda model, most: legal_sizes(replace(model, num_kv_heads=model.num_heads), most),
        "under grouped-query attention k and v have fewer heads than q, and they are cut into whole heads too: tp must "
        "divide num_kv_heads",
    ),
    "MLP forgotten": (
        lambda model, most: legal_sizes(replace(model, intermediate_size=model.num_heads), most),
        "gate and up are cut by their outputs: tp must divide intermediate_size",
    ),
    "vocabulary divided evenly": (
        lambda model, most: [tp for tp in legal_sizes(model, most) if model.vocab_size % tp == 0],
        "the vocabulary may be uneven: the last ranks hold fewer rows",
    ),
    "an empty rank": (
        lambda model, most: legal_sizes(replace(model, vocab_size=10**9), most),
        "with a small vocabulary, shards of the ceiling of V / tp may leave the last rank without any row",
    ),
}
_MODEL = ModelConfig(vocab_size=101, hidden_size=64, intermediate_size=96, num_heads=16, num_kv_heads=4, head_dim=4)
_SMALL = 9  # a vocabulary
_MODELS = [
    _MODEL,
    replace(_MODEL, num_kv_heads=8, intermediate_size=100),
    replace(_MODEL, vocab_size=_SMALL, num_kv_heads=8),
    replace(_MODEL, num_heads=12, num_kv_heads=12),
]


def _with_empty_ranks(wrong: Answer) -> Answer:
    return lambda model, most: wrong(replace(model, vocab_size=10**9), most)


def _run_legal_sizes(answer: Answer) -> str | None:
    want = [[tp for tp in range(1, 9) if not layout_problems(model, MeshShape(tp=tp))] for model in _MODELS]
    got = [list(answer(model, 8)) for model in _MODELS]
    if got == want:
        return None
    for wrong, hint in _SIZES.values():
        known = [wrong(model, 8) for model in _MODELS]
        # the rule of empty ranks shows in a small vocabulary only: without it, too, another mistake is told
        large = [at for at, model in enumerate(_MODELS) if model.vocab_size > _SMALL]
        if got == known or [got[at] for at in large] == [known[at] for at in large] != [want[at] for at in large]:
            return hint
    at = next(i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
    model = _MODELS[at]
    return (
        f"with {model.num_heads} heads, {model.num_kv_heads} key-value heads, an inner width of "
        f"{model.intermediate_size} and a vocabulary of {model.vocab_size} the library accepts {want[at]}, not "
        f"{got[at]}"
    )


# --- the price of a layer ---------------------------------------------------------------------------------


def layer_bytes_stub(tokens: int, width: int, itemsize: int, micro_batches: int, tp: int) -> int:
    """Payload, in bytes, that one rank hands to all_reduce for one layer in one step, forward and backward.

    Args:
        tokens: of one micro-batch.
        width: of the model.
        itemsize: bytes of a number: 2 for bf16, 4 for float32, 8 for float64.
    """
    raise NotAttempted


def layer_bytes(tokens: int, width: int, itemsize: int, micro_batches: int, tp: int) -> int:
    """Two exits forward and two entries backward, for every micro-batch; nothing on one rank."""
    return 0 if tp == 1 else 4 * micro_batches * tokens * width * itemsize


_PRICES: dict[str, tuple[Answer, str]] = {
    "forward only": (
        lambda tokens, width, itemsize, micro_batches, tp: layer_bytes(tokens, width, itemsize, micro_batches, tp) // 2,
        "backward mirrors forward: the entries of attention and MLP sum the gradients of their input",
    ),
    "once a step": (
        lambda tokens, width, itemsize, micro_batches, tp: layer_bytes(tokens, width, itemsize, 1, tp),
        "it is activations that are exchanged, not gradients of weights: each micro-batch pays again",
    ),
    "on the wire": (
        lambda tokens, width, itemsize, micro_batches, tp: (
            layer_bytes(tokens, width, itemsize, micro_batches, tp) * 2 * (tp - 1) // tp
        ),
        "2(n-1)/n is what a ring puts on the wire; the question is what a rank hands to all_reduce",
    ),
    "a share": (
        lambda tokens, width, itemsize, micro_batches, tp: (
            layer_bytes(tokens, width, itemsize, micro_batches, tp) // tp
        ),
        "the exits yield whole outputs, D numbers a token on every rank: nothing here is divided by tp",
    ),
    "one rank pays": (
        lambda tokens, width, itemsize, micro_batches, tp: 4 * micro_batches * tokens * width * itemsize,
        "an axis of one rank exchanges nothing",
    ),
}
_CASES = [(torch.float64, 5, 1), (torch.float32, 3, 2), (torch.float32, 4, 3)]  # dtype, tokens, micro-batches
_LAYER = ModelConfig(
    vocab_size=8, hidden_size=12, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4
)


def _counted(axis: Axis) -> list[int]:
    out = []
    for dtype, tokens, micro_batches in _CASES:
        layer = GPT(_LAYER, layers=[0], embed=False, head=False)
        init_weights(layer, 0)
        tensor_parallel(layer, axis)
        layer.to(dtype)
        with ledger.recording() as sent:
            for _ in range(micro_batches):
                layer(torch.ones(1, tokens, _LAYER.hidden_size, dtype=dtype, requires_grad=True)).sum().backward()
        out.append(sum(sent.values()))
    return out


def _run_layer_bytes(answer: Answer) -> str | None:
    for sizes in ((2, 4), (1,)):  # on two ranks a ring's factor is 1, on four it is that of 6 exchanges in place of 4
        counted = [number for tp in sizes for number in on_ranks(_counted, ranks=tp)[0]]
        arguments = [
            (tokens, _LAYER.hidden_size, dtype.itemsize, micro_batches, tp)
            for tp in sizes
            for dtype, tokens, micro_batches in _CASES
        ]
        got = [answer(*each) for each in arguments]
        if got == counted:
            continue
        for wrong, hint in _PRICES.values():
            if got == [wrong(*each) for each in arguments]:
                return hint
        at = next(i for i, pair in enumerate(zip(got, counted, strict=True)) if pair[0] != pair[1])
        return f"for layer_bytes{arguments[at]} the ledger counts {counted[at]}, not {got[at]}"
    return None


EXERCISES = [
    Exercise(
        id="04.legal_sizes",
        title="How far a model can be cut",
        task="List the sizes of tp that the library accepts for a model with grouped-query attention.",
        stub=legal_sizes_stub,
        reference=legal_sizes,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _SIZES.items()),
            *(
                Mistake(f"{name}, and empty ranks", _with_empty_ranks(wrong), hint)
                for name, (wrong, hint) in list(_SIZES.items())[:2]
            ),
        ),
        run=_run_legal_sizes,
    ),
    Exercise(
        id="04.layer_bytes",
        title="The price of a layer, to the byte",
        task="Predict the payload of one layer in one step. The ledger of a real run decides.",
        stub=layer_bytes_stub,
        reference=layer_bytes,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _PRICES.items()),
        run=_run_layer_bytes,
    ),
]
