"""Exercises of chapter 03, ZeRO: what a rank keeps in each stage. Ranks that train decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch

from ..config import ModelConfig, RunConfig
from ..launch import launch
from ..legality import resolve
from ..parallel.parallelize import layout_of
from .exercises import Exercise, Mistake, NotAttempted
from .kept import kept
from .museum import TRAIN

RANKS = 3  # with two, many a wrong part is right
Answer = Callable[..., Any]


def kept_bytes_stub(parameters: int, ranks: int, stage: int) -> float:
    """Bytes that each rank keeps from step to step, with bf16 weights and AdamW, in this library. Flags are too few.

    Args:
        parameters: how many elements the model has.
        ranks: of the dp axis.
        stage: of ZeRO; 0 is plain data parallelism.
    """
    raise NotAttempted


def kept_bytes(parameters: int, ranks: int, stage: int) -> float:
    """Weights 2, gradients 4, masters 4, two moments 8 bytes; ZeRO 1 also has the part that it has reduced."""
    a_parameter = {0: 18.0, 1: 2 + 4 + 16 / ranks, 2: 2 + 16 / ranks, 3: 18 / ranks}
    return parameters * a_parameter[stage]


def _per_parameter(whole: float, part: Sequence[float]) -> Answer:
    """`whole` bytes in stage 0, and whole[s] + part[s] / ranks in stage s: (w1, p1, w2, p2, w3, p3)."""
    numbers = dict(zip((1, 2, 3), zip(part[::2], part[1::2], strict=True), strict=True))

    def answer(parameters: int, ranks: int, stage: int) -> float:
        stays, shared = numbers.get(stage, (whole, 0.0))
        return parameters * (stays + shared / ranks)

    return answer


_KEPT: dict[str, tuple[Answer, str]] = {
    "by the paper": (
        _per_parameter(18, (6, 12, 2, 16, 0, 18)),
        "ZeRO 1 reduces into a buffer of its own: beside the whole gradient it keeps its part of the sum, 4 / N more",
    ),
    "bf16 gradients": (
        _per_parameter(16, (4, 14, 2, 14, 0, 16)),
        "gradients of bf16 weights are kept in float32: 4 bytes a parameter, not 2",
    ),
    "bf16 gradients, by the paper": (
        _per_parameter(16, (4, 12, 2, 14, 0, 16)),
        "gradients of bf16 weights are kept in float32, 4 bytes a parameter and not 2; and ZeRO 1 keeps its part of "
        "the sum beside the whole gradient",
    ),
    "no masters": (
        _per_parameter(14, (6, 12, 2, 12, 0, 14)),
        "4 bytes of the optimizer's are missing: it has float32 masters, from which the bf16 weights are rounded, and "
        "two moments, 4 bytes each",
    ),
    "weights cut as well": (
        _per_parameter(18, (4, 18, 0, 18, 0, 18)),
        "ZeRO 1 and 2 leave the whole weights on every rank; only ZeRO 3 cuts them",
    ),
    "all cut in every stage": (
        _per_parameter(18, (0, 18, 0, 18, 0, 18)),
        "only ZeRO 3 cuts all; ZeRO 1 cuts masters and moments, ZeRO 2 the gradients too",
    ),
    "nothing cut": (
        lambda parameters, ranks, stage: 18 * parameters,
        "this is what plain data parallelism keeps; each stage cuts more of it over the ranks",
    ),
    "of all ranks": (
        lambda parameters, ranks, stage: ranks * kept_bytes(parameters, ranks, stage),
        "this is what all ranks keep together; asked is one",
    ),
}
_MODEL = ModelConfig(vocab_size=384, hidden_size=48, intermediate_size=144, num_layers=1, num_heads=4)


def _states(stage: Literal[0, 1, 2, 3]) -> RunConfig:
    train = replace(TRAIN, dtype="bfloat16", zero=stage)
    return resolve(RunConfig(layout=f"dp={RANKS}", model=_MODEL, train=train))


@cache  # it does not depend on the answer
def _measured() -> list[int]:
    runs = [_states(0), _states(1), _states(2), _states(3)]
    return [total for _, total in launch(kept, runs, world_size=RANKS, timeout=120, output="hide")[0]]


def _run_kept_bytes(answer: Answer) -> str | None:
    parameters = sum(torch.Size(place.shape).numel() for place in layout_of(_states(0)).values())
    arguments = [(parameters, RANKS, stage) for stage in range(4)]
    got = [answer(*each) for each in arguments]

    def near(others: Sequence[float]) -> bool:
        return all(abs(mine - other) <= 0.005 * other for mine, other in zip(got, others, strict=True))

    measured = _measured()
    if near(measured):
        return None
    for wrong, hint in _KEPT.values():
        if near([wrong(*each) for each in arguments]):
            return hint
    pairs = [(mine / parameters, true / parameters) for mine, true in zip(got, measured, strict=True)]
    stage = next(n for n, (mine, true) in enumerate(pairs) if abs(mine - true) > 0.005 * true)
    mine, true = pairs[stage]
    return f"in stage {stage} a rank of {RANKS} keeps {true:.2f} bytes a parameter, measured; this says {mine:.2f}"


EXERCISES = [
    Exercise(
        id="03.kept_bytes",
        title="What a rank keeps",
        task="Predict what each rank keeps from step to step in each stage of ZeRO. Ranks that train decide, within "
        "half a percent.",
        stub=kept_bytes_stub,
        reference=kept_bytes,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _KEPT.items()),
        run=_run_kept_bytes,
    ),
]
