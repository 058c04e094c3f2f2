"""Exercises of chapter 06, context parallelism: who holds which tokens, and which of two ways sends less.

The first is decided by counting pairs under the mask; the second by the ledger of real runs, of the ring and of
Ulysses, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...collectives import ledger
from ...config import MeshShape, ModelConfig, TrainConfig
from ...legality import context_problems
from ...mesh import Axis
from ...model.gpt import attend
from ...parallel.context import ring_attention
from ...parallel.ulysses import ulysses_attention
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_06 import on_ranks

Answer = Callable[..., Any]


# --- 3: who holds what ------------------------------------------------------------------------------------


def held_stub(seq_len: int, cp: int, rank: int) -> list[int]:
    """The positions that a rank holds, so that all ranks have the same to do under a causal mask.

    The query at position p is multiplied with p + 1 keys. Use at most two runs of consecutive positions a rank, so that
    few pairs of runs are half masked.

    Args:
        seq_len: a multiple of 2 cp.
    """
    raise NotAttempted


def held(seq_len: int, cp: int, rank: int) -> list[int]:
    """A cheap chunk and a dear one: r from the front and r from the back."""
    size = seq_len // (2 * cp)
    return [p for chunk in (rank, 2 * cp - 1 - rank) for p in range(chunk * size, (chunk + 1) * size)]


def _two_chunks(first: Callable[[int, int], int], second: Callable[[int, int], int]) -> Answer:
    def answer(seq_len: int, cp: int, rank: int) -> list[int]:
        size = seq_len // (2 * cp)
        return [p for c in (first(cp, rank), second(cp, rank)) for p in range(c * size, (c + 1) * size)]

    return answer


_NOT_ALL = "some positions are held by no rank, or by more than one"
_UNEQUAL_NUMBER = "the ranks do not hold the same number of tokens; all of the model but attention would be uneven"
_RUNS = (
    "one run a rank: the last rank's queries see the most keys, and it works nearly twice the mean while all wait for "
    "it; give each rank an early chunk and a late one"
)
_SHIFTED = (
    "two chunks a rank, and every rank's second lies as far behind its first: the sums still grow with the rank; pair "
    "the first chunk with the last, the second with the last but one"
)
_STRIPED = (
    "dealt out one by one: the work is nearly equal, but every pair of ranks' tokens is half masked, and no block of "
    "scores can be skipped or left without a mask; use two runs a rank"
)


def _pairs(positions: list[int]) -> int:
    return sum(p + 1 for p in positions)


def _run_held(answer: Answer) -> str | None:
    for seq_len, cp in ((24, 3), (32, 4), (20, 2)):
        got = [list(answer(seq_len, cp, rank)) for rank in range(cp)]
        if sorted(p for each in got for p in each) != list(range(seq_len)):
            return _NOT_ALL
        if len({len(each) for each in got}) > 1:
            return _UNEQUAL_NUMBER
        runs = max(sum(p - 1 not in each for p in each) for each in got)
        if runs > 2:
            return _STRIPED
        work = [_pairs(each) for each in got]
        if len(set(work)) > 1:
            if runs == 1:
                return _RUNS
            if work == sorted(work):
                return _SHIFTED
            return f"with cp={cp} and {seq_len} tokens the ranks multiply {work} pairs"
    return None


# --- 4: which way sends less ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer and a number of ranks. `bytes_per_number` is 2 for bf16, 4 for float32."""

    cp: int
    num_heads: int
    num_kv_heads: int
    bytes_per_number: int


def cheaper_stub(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str:
    """ "ring" or "ulysses": which is allowed, and hands fewer bytes to `torch.distributed` for a layer's training step.

    Args:
        bytes_per_number: 2 for bf16, 4 for float32. One document, no tensor parallelism.
    """
    raise NotAttempted


def cheaper(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str:
    """Compare forward and backward, for one token and channel; the ring returns dK and dV in float32 at least."""
    if num_heads % cp or num_kv_heads % cp:
        return "ring"
    ring = 2 * num_kv_heads * (2 * (cp - 1) * bytes_per_number + cp * max(bytes_per_number, 4))
    return "ring" if ring < 4 * (num_heads + num_kv_heads) * bytes_per_number else "ulysses"


def _forward_only(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str:
    if num_heads % cp or num_kv_heads % cp:
        return "ring"
    return "ring" if 2 * (cp - 1) * num_kv_heads < 2 * (num_heads + num_kv_heads) else "ulysses"


def _always_legal(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str:
    ring = 2 * num_kv_heads * (2 * (cp - 1) * bytes_per_number + cp * max(bytes_per_number, 4))
    return "ring" if ring < 4 * (num_heads + num_kv_heads) * bytes_per_number else "ulysses"


def _on_the_wire(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str:
    if num_heads % cp or num_kv_heads % cp:
        return "ring"
    ring = 2 * num_kv_heads * (2 * (cp - 1) * bytes_per_number + cp * max(bytes_per_number, 4))
    return "ring" if ring < 4 * (num_heads + num_kv_heads) * bytes_per_number * (cp - 1) / cp else "ulysses"


_CHOICES: dict[str, tuple[Answer, str]] = {
    "refused layouts": (
        _always_legal,
        "ulysses gives each rank whole heads: cp must divide the query heads and the key-value heads, else only the "
        "ring is left",
    ),
    "forward only": (
        _forward_only,
        "backward sends too: ulysses as much again, the ring its keys and values again and their gradients, cp hops",
    ),
    "narrow gradients": (
        lambda cp, heads, kv_heads, itemsize: cheaper(cp, heads, kv_heads, 4),
        "of bf16 keys the gradients travel in float32, since every rank adds to them: 4 bytes a number",
    ),
    "on the wire": (
        _on_the_wire,
        "right for the wire, on which an all_to_all carries (cp - 1) / cp of its payload and the ring all of it; "
        "asked is what a rank hands to torch.distributed, which the ledger counts",
    ),
    "border of bf16": (
        lambda cp, heads, kv_heads, itemsize: cheaper(cp, heads, kv_heads, 2),
        "the border Hkv/H = 1/(2(cp-1)) is that of bf16, where the ring's gradients are twice as wide as its keys; in "
        "float32 they are as wide, and the ring is cheaper up to 2/(3cp-4)",
    ),
    "all heads travel": (
        lambda cp, heads, kv_heads, itemsize: cheaper(cp, heads, heads, itemsize),
        "what goes round the ring are key-value heads, however many query heads there are",
    ),
    "always ulysses": (
        lambda cp, heads, kv_heads, itemsize: "ring" if heads % cp or kv_heads % cp else "ulysses",
        "ulysses is not always the cheaper one: with few ranks and few key-value heads the ring sends less",
    ),
}
CASES = [
    Case(2, 8, 2, 4),
    Case(2, 8, 4, 4),
    Case(2, 8, 8, 2),
    Case(2, 6, 2, 2),
    Case(4, 4, 2, 4),
    Case(4, 8, 4, 2),
    Case(4, 20, 4, 2),
    Case(4, 20, 4, 4),
    Case(4, 32, 4, 4),
]


def _legal(case: Case) -> bool:
    model = ModelConfig(hidden_size=2 * case.num_heads, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads)
    return not context_problems(model, MeshShape(cp=case.cp), TrainConfig(seq_len=64, context="ulysses"))


def _counted(cases: list[Case], axis: Axis) -> list[str]:
    """Which way sent less, by running both where both are legal."""
    out = []
    for case in cases:
        dtype = torch.bfloat16 if case.bytes_per_number == 2 else torch.float32
        shapes = [(1, heads, 4, 8) for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)]
        bytes_sent = {}
        for how in ("ring", "ulysses") if _legal(case) else ("ring",):
            q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
            with ledger.recording() as sent:
                whole = (
                    ring_attention(q, k, v, axis) if how == "ring" else ulysses_attention(q, k, v, axis, None, attend)
                )
                whole.sum().backward()
            bytes_sent[how] = sum(sent.values())
        out.append(min(bytes_sent, key=lambda how: bytes_sent[how]))
    return out


def _run_cheaper(answer: Answer) -> str | None:
    def ask(fn: Answer) -> list[str]:
        return [fn(case.cp, case.num_heads, case.num_kv_heads, case.bytes_per_number) for case in CASES]

    got = ask(answer)
    counted: dict[Case, str] = {}
    for cp in sorted({case.cp for case in CASES}):
        cases = [case for case in CASES if case.cp == cp]
        counted |= dict(zip(cases, on_ranks(cp, _counted, cases)[0], strict=True))
    want = [counted[case] for case in CASES]
    if got == want:
        return None
    for wrong, hint in _CHOICES.values():
        if got == ask(wrong):
            return hint
    at = next(i for i in range(len(want)) if got[i] != want[i])
    return f"for {CASES[at]} the ledger says {want[at]}, not {got[at]}"


EXERCISES = [
    Exercise(
        id="06.held",
        title="Who holds which tokens",
        task="Deal out the positions of a sequence so that every rank multiplies the same number of query-key pairs "
        "under a causal mask, in at most two runs a rank.",
        stub=held_stub,
        reference=held,
        mistakes=(
            Mistake(
                "one run",
                lambda seq_len, cp, rank: list(range(rank * seq_len // cp, (rank + 1) * seq_len // cp)),
                _RUNS,
            ),
            Mistake("one by one", lambda seq_len, cp, rank: list(range(rank, seq_len, cp)), _STRIPED),
            Mistake("shifted", _two_chunks(lambda cp, r: r, lambda cp, r: r + cp), _SHIFTED),
            Mistake("head and tail overlap", _two_chunks(lambda cp, r: r, lambda cp, r: 2 * cp - 2 - r), _NOT_ALL),
        ),
        run=_run_held,
    ),
    Exercise(
        id="06.cheaper",
        title="Ring or Ulysses",
        task="Say which of the two hands fewer bytes to torch.distributed in a training step of one layer, or which is "
        "allowed at all.",
        stub=cheaper_stub,
        reference=cheaper,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _CHOICES.items()),
        run=_run_cheaper,
    ),
]
