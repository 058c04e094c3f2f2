"""Exercises of chapter 01, the model and its costs: how well a machine is used.

Of the ways to a number that looks better than the machine did, each gets a hint of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...config import ModelConfig
from ..exercises import Exercise, NotAttempted
from .chapter_01 import CONFIGS, Wrong, mistakes, parameters

Answer = Callable[..., Any]


def mfu_stub(config: ModelConfig, seq_len: int, line: Mapping[str, Any], sheet: Mapping[str, float]) -> float:
    """The utilisation (MFU) that a line of a log stands for, with 6 N + 12 L H Dh T flops a token.

    Args:
        line: "tokens_per_second" of all GPUs together, padding included; "gpus"; "padding", the share of the tokens
            that is padding; "recompute", True if each layer's forward runs a second time before its backward.
        sheet: flop/s of one GPU in bf16: "dense", and "sparse", with two of four weights zero.
    """
    raise NotAttempted


def mfu(config: ModelConfig, seq_len: int, line: Mapping[str, Any], sheet: Mapping[str, float]) -> float:
    """Useful tokens of one GPU, times the flops that the model needs for one, over what the GPU could do."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    useful = line["tokens_per_second"] * (1 - line["padding"]) / line["gpus"]
    return float(useful * (6 * parameters(config) + attention) / sheet["dense"])


def _mfu_with(factor: Callable[..., float]) -> Answer:
    return lambda config, seq_len, line, sheet: mfu(config, seq_len, line, sheet) * factor(config, seq_len, line, sheet)


def _attention_share(config: ModelConfig, seq_len: int) -> float:
    pairs = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return pairs / (6 * parameters(config) + pairs)


def _width_over_heads(config: ModelConfig) -> float:
    return config.hidden_size / (config.num_heads * config.head_dim)


_MFU: Wrong = {
    "all GPUs": (
        _mfu_with(lambda c, t, line, sheet: line["gpus"]),
        "the tokens are those of all GPUs and the peak is that of one: divide",
    ),
    "recompute counted": (
        _mfu_with(lambda c, t, line, sheet: 4 / 3 if line["recompute"] else 1),
        "that is HFU: work that is done twice keeps the hardware busy, and the model needs it once",
    ),
    "sparse peak": (
        _mfu_with(lambda c, t, line, sheet: sheet["dense"] / sheet["sparse"]),
        "no weight is zero here: the peak to compare with is the dense one",
    ),
    "padding counted": (
        _mfu_with(lambda c, t, line, sheet: 1 / (1 - line["padding"])),
        "padding is in the tokens a second, and teaches the model nothing: leave it out",
    ),
    "six N alone": (
        _mfu_with(lambda c, t, line, sheet: 1 - _attention_share(c, t)),
        "the products of attention are missing: 12 L H Dh T a token",
    ),
    "halved for the mask": (
        _mfu_with(lambda c, t, line, sheet: 1 - _attention_share(c, t) / 2),
        "attention was halved for the mask: that is another convention than the one asked for",
    ),
    "width, not heads": (
        _mfu_with(lambda c, t, line, sheet: 1 + _attention_share(c, t) * (_width_over_heads(c) - 1)),
        "12 L D T holds only where H Dh = D: head_dim is a setting of its own",
    ),
    "padding added": (
        _mfu_with(lambda c, t, line, sheet: (1 - line["padding"]) ** -2),
        "divided by 1 - padding, the tokens grow: those that are padding are to be taken away",
    ),
    "percent": (
        _mfu_with(lambda c, t, line, sheet: 100.0),
        "a share is asked for, not percent",
    ),
}
_SHEET = {"dense": 1e10, "sparse": 2e10}
_LINES = [
    (CONFIGS[0], 64, {"tokens_per_second": 16_000.0, "gpus": 8, "padding": 0.25, "recompute": True}, _SHEET),
    (CONFIGS[2], 512, {"tokens_per_second": 9_000.0, "gpus": 4, "padding": 0.1, "recompute": False}, _SHEET),
]


def _run_mfu(answer: Answer) -> str | None:
    def like(other: Answer) -> bool:
        return all(math.isclose(answer(*case), other(*case), rel_tol=1e-9) for case in _LINES)

    if like(mfu):
        return None
    for wrong, hint in _MFU.values():
        if like(wrong):
            return hint
    case = next(case for case in _LINES if not math.isclose(answer(*case), mfu(*case), rel_tol=1e-9))
    return f"for the line {case[2]} it is {mfu(*case):.4f}, not {answer(*case):.4f}"


EXERCISES = [
    Exercise(
        id="01.mfu",
        title="An honest utilisation",
        task="Compute the MFU from a line of a log. It offers several numbers that look better.",
        stub=mfu_stub,
        reference=mfu,
        mistakes=mistakes(_MFU),
        run=_run_mfu,
    ),
]
