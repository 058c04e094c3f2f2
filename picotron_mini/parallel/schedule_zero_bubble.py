"""Zero bubble: a backward is two products, and only one of them is waited for.

For a linear layer y = x W^T the backward computes, from the gradient of y,

    I    dL/dx = dL/dy W         the stage before waits for it
    W    dL/dW = dL/dy^T x       nobody does, until the optimizer

with as many flops each. So a stage may send I's result at once and do W when it would idle (`deferred.py` splits them).

    zb-h1, 4 stages and 4 micro-batches
    stage 0  F0 F1 F2 F3 .. .. .. I0 W0 I1 W1 I2 W2 I3 W3
    stage 1  .. F0 F1 F2 .. .. I0 F3 I1 W0 I2 W1 I3 W2 W3
    stage 2  .. .. F0 F1 .. I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
    stage 3  .. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

    zb-v, 2 stages of 2 chunks and 3 micro-batches
    stage 0  F0  F1  F2  F0' I0' W0' F1' I1' W1' I0  W0  F2' I2' W2' I1  W1  I2  W2  ...
    stage 1  ... F0  F0' F1  F1' I0' W0' F2  I0  W0  F2' I1' W1' I1  I2' I2  W1  W2' W2

ZB-H1 is 1F1B with I in place of B and each W put off by as many backwards as the stage has stages above it: the last
stage, which starts its backwards first, hurries the gradients up and pays back at the end, when all others still work.
With f, i, w the times of F, I and W, and m >= p:

    time = m (f + i + w) + (p - 1) max(f, f + i - w)      1F1B: m (f + i + w) + (p - 1) (f + i + w)

With equal times the idle part is a third of 1F1B's (and p - m more where m < p). A stage keeps at most min(p, m)
micro-batches, the same on each, and the same as 1F1B keeps where it keeps most, on stage 0. (What I has used up is
freed earlier: only the inputs and the output gradients of linear layers wait for W.)

ZB-V lays two chunks a stage out as a V, so that the last virtual stage is on rank 0, and every rank works on
both ways at once. Then nothing is left to wait for but the way of the first micro-batch down to the last stage. With
f = i = w = 1 for a chunk and m >= 2 p - 1,

    time = 6 m + p - 1        memory: at most 2 p chunks, half as large as 1F1B's stages: as much as 1F1B

In general the time is max(6 m + p - 1, 4 (m + p) - 2). When f, i and w differ, the pattern waits for the slowest of
them, and some bubble returns. (Tried: an order found by a greedy clock. With equal times it is nearly as short; with
1, 1.2 and 0.8, p = 8 and m = 32, its stages idle for 44.2 units, and with the regular pattern below for 8.4.)

Papers: ZB-H1 arXiv 2401.10241, the V arXiv 2405.15362; both by Qi and others.
Legend: p stages, m micro-batches.
"""

from __future__ import annotations

from collections import Counter

from .actions import Action, Kind


def zb_h1(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """1F1B with split backwards, W `stage` backwards behind I."""
    warm_up = min(stages - 1 - stage, micro_batches)
    actions = [Action("forward", m) for m in range(warm_up)]
    for m in range(micro_batches):
        if warm_up + m < micro_batches:
            actions.append(Action("forward", warm_up + m))
        actions.append(Action("backward_input", m))
        if m >= stage:
            actions.append(Action("backward_weight", m - stage))
    return actions + [Action("backward_weight", m) for m in range(max(0, micro_batches - stage), micro_batches)]


def zb_v(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Two chunks a stage along a V, split backwards. Fewer than 2 stages - 1 micro-batches leave gaps in it."""
    below, full = stages - stage, max(micro_batches, 2 * stages - 1)
    pattern = ["F"] * (2 * below - 1)  # until the first micro-batch is back from its turn
    pattern += ["F' F"] * stage  # one comes up, one goes down
    pattern += ["F' I' W'"] * below  # the first backwards come down
    pattern += ["F I W F' I' W'"] * (full - stages)  # all four ways at once
    pattern += ["I I'"] * stage + ["I W"] * below  # hurry the last gradients on, then
    pattern += ["W'"] * full + ["W"] * full  # do what was put off
    kinds: dict[str, Kind] = {"F": "forward", "I": "backward_input", "W": "backward_weight"}
    done: Counter[str] = Counter()
    actions = []
    for word in " ".join(pattern).split():
        if done[word] < full:  # the pattern names some more often, at its end
            actions.append(Action(kinds[word[0]], done[word], len(word) - 1))
            done[word] += 1
    return [action for action in actions if action.micro_batch < micro_batches]
