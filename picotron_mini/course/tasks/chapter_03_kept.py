"""Exercises of chapter 03, ZeRO: what a rank keeps in each stage. Ranks that train decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch

from ...config import ModelConfig, RunConfig
from ...launch import launch
from ...legality import resolve
from ...parallel.parallelize import layout_of
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.kept import kept
from ..museum import TRAIN

RANKS = 3  # with two, many a wrong part is right
Answer = Callable[..., Any]


def kept_bytes_stub(parameters: int, ranks: int, stage: int, itemsize: int) -> float:
    """Bytes that each rank keeps from step to step with AdamW, in this library. Flags are too few to count.

    Args:
        parameters: how many elements the model has.
        ranks: of the dp axis.
        stage: of ZeRO; 0 is plain data parallelism.
        itemsize: bytes of a weight: 2 for bf16; 4 for float32, where the optimizer updates the weights themselves.
    """
    raise NotAttempted


def kept_bytes(parameters: int, ranks: int, stage: int, itemsize: int) -> float:
    """Gradients 4, two moments 8, masters 4 beside bf16 weights; ZeRO 1 also has the part that it has reduced."""
    owned = 8 + (4 if itemsize == 2 else 0)
    a_parameter = {
        0: itemsize + 4 + owned,
        1: itemsize + 4 + (4 + owned) / ranks,
        2: itemsize + (4 + owned) / ranks,
        3: (itemsize + 4 + owned) / ranks,
    }
    return parameters * a_parameter[stage]


def _per_parameter(whole: float, part: Sequence[float], wrong_at: int = 2) -> Answer:
    """`whole` bytes in stage 0, w + p / ranks in the others: (w1, p1, w2, p2, w3, p3); right at another itemsize."""
    numbers = dict(zip((1, 2, 3), zip(part[::2], part[1::2], strict=True), strict=True))

    def answer(parameters: int, ranks: int, stage: int, itemsize: int) -> float:
        if itemsize != wrong_at:
            return kept_bytes(parameters, ranks, stage, itemsize)
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
        _per_parameter(18, (18, 0, 18, 0, 18, 0)),
        "this is what plain data parallelism keeps; each stage cuts more of it over the ranks",
    ),
    "of all ranks": (
        lambda parameters, ranks, stage, itemsize: ranks * kept_bytes(parameters, ranks, stage, itemsize),
        "this is what all ranks keep together; asked is one",
    ),
    "masters beside float32": (
        _per_parameter(20, (8, 16, 4, 16, 0, 20), wrong_at=4),
        "right for bf16; float32 weights need no masters beside them: the optimizer updates the weights themselves",
    ),
    "always bf16": (
        _per_parameter(18, (6, 16, 2, 16, 0, 18), wrong_at=4),
        "right for bf16, and the same numbers were given for float32: there a weight has 4 bytes, and no master",
    ),
    "own rows apart": (
        _per_parameter(16, (8, 16, 4, 16, 0, 16), wrong_at=4),
        "right for bf16; with float32 weights the part that a rank owns is a part of the weights that it has already: "
        "only moments, and the gradient's part, come on top",
    ),
}
_MODEL = ModelConfig(vocab_size=384, hidden_size=48, intermediate_size=144, num_layers=1, num_heads=4)


CASES: list[tuple[Literal[0, 1, 2, 3], int]] = [(0, 2), (1, 2), (2, 2), (3, 2), (0, 4), (1, 4), (2, 4), (3, 4)]


def _run(stage: Literal[0, 1, 2, 3], itemsize: int) -> RunConfig:
    train = replace(TRAIN, dtype="bfloat16" if itemsize == 2 else "float32", zero=stage)
    return resolve(RunConfig(layout=f"dp={RANKS}", model=_MODEL, train=train))


@cache  # it does not depend on the answer
def _measured() -> list[int]:
    runs = [_run(*case) for case in CASES]
    return [total for _, total in launch(kept, runs, world_size=RANKS, timeout=120, output="hide")[0]]


def _run_kept_bytes(answer: Answer) -> str | None:
    parameters = sum(torch.Size(place.shape).numel() for place in layout_of(_run(0, 2)).values())
    arguments = [(parameters, RANKS, *case) for case in CASES]
    got = [answer(*each) for each in arguments]

    def near(others: Sequence[float], cases: slice) -> bool:
        pairs = zip(got[cases], others[cases], strict=True)
        return all(abs(mine - other) <= 0.005 * other for mine, other in pairs)

    measured = _measured()
    bf16, float32 = slice(0, 4), slice(4, 8)
    if near(measured, bf16) and near(measured, float32):
        return None
    judged = float32 if near(measured, bf16) else bf16
    for wrong, hint in _KEPT.values():
        known = [wrong(*each) for each in arguments]
        if near(known, judged) and not near(measured, judged):
            return hint
    pairs = [(mine / parameters, true / parameters) for mine, true in zip(got, measured, strict=True)]
    at = next(n for n, (mine, true) in enumerate(pairs) if abs(mine - true) > 0.005 * true)
    (stage, itemsize), (mine, true) = CASES[at], pairs[at]
    return (
        f"in stage {stage}, with weights of {itemsize} bytes, a rank of {RANKS} keeps {true:.2f} bytes a parameter, "
        f"measured; this says {mine:.2f}"
    )


EXERCISES = [
    Exercise(
        id="03.kept_bytes",
        title="What a rank keeps",
        task="Predict what each rank keeps from step to step in each stage of ZeRO, with bf16 and with float32 "
        "weights. Ranks that train decide, within half a percent.",
        stub=kept_bytes_stub,
        reference=kept_bytes,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _KEPT.items()),
        run=_run_kept_bytes,
    ),
]
