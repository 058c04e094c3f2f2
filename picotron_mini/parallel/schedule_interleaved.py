"""Interleaved 1F1B: several small stages on each rank, so that a micro-batch comes round sooner.

A pipeline idles while its first micro-batch is on the way down and its last one on the way up: p - 1 stages' worth of
forward and backward. Smaller stages make a shorter way. So the model is cut into v p virtual stages, dealt out in turn:
with p = 2 and v = 2, stage 0 holds parts 0 and 2, stage 1 parts 1 and 3, and each micro-batch goes round twice. Two
stages, four micro-batches; F0' is the second chunk's forward, and a chunk takes half the time of a whole stage:

    stage 0  F0  F1  F0' F1' F2  ... B0'==== F3  B1'==== F2' B0===== F3' B1===== ... B2'==== ... B3'==== B2===== B3=====
    stage 1  ... F0  F1  F0' B0'==== F1' B1'==== F2  B0===== F3  B1===== F2' B2'==== F3' B3'==== B2===== B3===== ... ...

Order. Micro-batches go in groups of p: a group passes chunk 0, then chunk 1, ..., then the next group comes; backwards
take the chunks from the last to the first. A stage runs 2 (p - 1 - stage) + (v - 1) p forwards ahead, then alternates
like 1F1B. A group fills the ring exactly, so m must be a multiple of p.

Time. With f + b for a chunk, all stages work v m (f + b), and the schedule lasts (v m + p - 1) (f + b):

    bubble = (p - 1) / (v m + p - 1)                      1F1B: (p - 1) / (m + p - 1)

Memory. A stage keeps at most 2 (p - 1 - stage) + (v - 1) p + 1 chunks, never more than v m. Counted in layers, stage 0
keeps 1 + (p - 1) / (v p) times what 1F1B keeps. Messages: v p - 1 borders instead of p - 1, so about v times the bytes.

Paper: Megatron-LM (arXiv 2104.04473).
Legend: p stages, v chunks a stage, m micro-batches.
"""

from __future__ import annotations

from .actions import Action, Kind


def interleaved_1f1b(stage: int, stages: int, micro_batches: int, chunks: int = 2) -> list[Action]:
    """1F1B over several chunks a stage, laid out as a loop.

    Raises:
        ValueError: the number of micro-batches is not a multiple of the stages.
    """
    if micro_batches % stages:
        raise ValueError(f"interleaved: {micro_batches} micro-batches are not a multiple of {stages} stages")

    def nth(kind: Kind, n: int) -> Action:
        """The n-th forward or backward of this stage, of whichever chunk."""
        group, rest = divmod(n, stages * chunks)
        chunk, member = divmod(rest, stages)
        return Action(kind, group * stages + member, chunk if kind == "forward" else chunks - 1 - chunk)

    total = chunks * micro_batches
    warm_up = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, total)
    actions = [nth("forward", n) for n in range(warm_up)]
    for n in range(total - warm_up):
        actions += [nth("forward", warm_up + n), nth("backward", n)]
    return actions + [nth("backward", n) for n in range(total - warm_up, total)]
