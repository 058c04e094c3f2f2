"""An exercise of chapter 01, the model and its costs: what fits into memory.

The checker runs real training steps with the answer and with one sequence more, and watches every tensor that lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...config import ModelConfig, RunConfig, TrainConfig
from ...legality import resolve
from ...model import costs
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.live_bytes import watch_step

Answer = Callable[..., Any]


# --- 4: what fits -----------------------------------------------------------------------------------------


def largest_micro_batch_stub(config: ModelConfig, seq_len: int, memory: int) -> int:
    """The most sequences that one step of bf16 training with AdamW can take at once, in so many bytes.

    `picotron_mini.model.costs` may be used.

    Args:
        memory: bytes for all tensors together: weights, masters, gradients, moments, and whatever lives beside them
            at the worst moment of the step.
    """
    raise NotAttempted


def largest_micro_batch(config: ModelConfig, seq_len: int, memory: int) -> int:
    """The worst moment: everything is saved, and the gradient of the logits exists twice, in float32."""
    state = sum(costs.state_bytes(config, 2).values())
    token = costs.activation_bytes(config, 2) + 2 * 4 * config.vocab_size
    return (memory - state) // (seq_len * token)


def _with(state: Answer, token: Answer, rounding: Answer = math.floor) -> Answer:
    return lambda config, seq_len, memory: int(rounding((memory - state(config)) / (seq_len * token(config))))


def _state(config: ModelConfig) -> int:
    return sum(costs.state_bytes(config, 2).values())


def _token(config: ModelConfig) -> int:
    return costs.activation_bytes(config, 2) + 8 * config.vocab_size


_FITS: dict[str, tuple[Answer, str]] = {
    "weights only": (
        _with(lambda c: costs.state_bytes(c, 2)["weights"], _token),
        "the weights are 2 of the 18 bytes a parameter: masters, gradients and two moments stay in memory too",
    ),
    "no masters": (
        _with(lambda c: _state(c) - costs.state_bytes(c, 2)["masters"], _token),
        "bf16 weights are copies of float32 masters: 4 bytes a parameter more",
    ),
    "sixteen bytes": (
        _with(lambda c: 16 * costs.parameters(c), _token),
        "16 bytes a parameter have the gradients in bf16; here they are summed in float32, which makes 18",
    ),
    "costs of float32": (
        _with(lambda c: sum(costs.state_bytes(c).values()), lambda c: costs.activation_bytes(c) + 8 * c.vocab_size),
        "that is training in float32: the functions of `costs` take the bytes a number, which are 2 in bf16",
    ),
    "AdamW on top": (
        _with(lambda c: _state(c) + 4 * costs.parameters(c), _token),
        "AdamW's 4 bytes a weight come when the activations are gone: the higher of the two moments counts, not both",
    ),
    "end of the forward": (
        _with(_state, lambda c: costs.activation_bytes(c, 2)),
        "that is what lives when the forward ends; a moment later backward makes the gradient of the "
        "log-probabilities and that of the logits, V float32 numbers a token each",
    ),
    "one gradient": (
        _with(_state, lambda c: costs.activation_bytes(c, 2) + 4 * c.vocab_size),
        "the gradients of the log-probabilities and of the logits live at once: V float32 numbers a token, twice",
    ),
    "layers only": (
        _with(_state, lambda c: c.num_layers * costs.layer_activation_bytes(c, 2)),
        "the layers are not all: the loss keeps V numbers a token in float32, and its backward needs as many twice",
    ),
    "all in bf16": (
        _with(_state, lambda c: costs.activation_bytes(c, 4) // 2 + 4 * c.vocab_size),
        "not everything is 2 bytes wide: norms and the loss compute in float32 and keep float32",
    ),
    "rounded up": (
        _with(_state, _token, math.ceil),
        "one sequence too many: a part of a sequence does not fit",
    ),
}
_CONFIGS = [ModelConfig(300, 32, 64, 2, 4, 2, 8), ModelConfig(150, 32, 48, 6, 4, 1, 8, tie_embeddings=False)]
_SEQ_LEN = 16


def _cases() -> list[tuple[ModelConfig, int, int]]:
    """Memory for 12.3, 9.8 and 6.34 sequences: a flag or a counter more does not decide, and no two mistakes agree."""
    sizes = zip((*_CONFIGS, _CONFIGS[1]), (12.3, 9.8, 6.34), strict=True)
    return [(c, _SEQ_LEN, int(_state(c) + sequences * _SEQ_LEN * _token(c))) for c, sequences in sizes]


def _peak(config: ModelConfig, seq_len: int, sequences: int) -> int:
    """Bytes of the worst moment of a real step."""
    train = TrainConfig(seq_len=seq_len, micro_batch_size=sequences, dtype="bfloat16", device="cpu")
    run = resolve(RunConfig(layout="dp=1", model=config, train=train))
    return max(moment.total for moment in watch_step(run))


def _run_largest(answer: Answer) -> str | None:
    cases = _cases()
    got = [answer(*case) for case in cases]
    for wrong, hint in _FITS.values():
        if got == [wrong(*case) for case in cases]:
            return hint
    for (config, seq_len, memory), sequences in zip(cases, got, strict=True):
        if not isinstance(sequences, int) or sequences < 1:
            return f"sequences are whole, and {memory:,} bytes are enough for one at least; the answer was {sequences}"
        if (peak := _peak(config, seq_len, sequences)) > memory:
            return f"a real step with {sequences} sequences takes {peak:,} bytes at its worst moment, not {memory:,}"
        if (peak := _peak(config, seq_len, sequences + 1)) <= memory:
            return f"{sequences + 1} sequences fit too: a real step takes {peak:,} of {memory:,} bytes"
    return None


EXERCISES = [
    Exercise(
        id="01.largest_micro_batch",
        title="What fits",
        task="Given a model, a sequence length and so many bytes, find the largest micro-batch. Real training steps "
        "are run with your answer and with one sequence more, and every tensor that lives is counted.",
        stub=largest_micro_batch_stub,
        reference=largest_micro_batch,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _FITS.items()),
        run=_run_largest,
    ),
]
