"""What went into a mixture, read from what came out: how much of each expert is in each token's output.

    y[n] = sum_e c[n, e] E_e(x[n])          solved for c, where there are no more experts than channels

A wrong c tells more than a wrong y: which expert is missing, which is there unasked, or which has another weight. And
if no c makes a token's output, then something else than its own experts' outputs is in it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Fault = Literal["astray", "unasked", "missing", "weights"]


def shares(y: Tensor, outputs: Tensor) -> Tensor | None:
    """How much of each expert is in each token's output; None if some token's is no sum of its experts' outputs.

    Args:
        y: [N, D].
        outputs: [N, E, D], what each expert makes of each token; linearly independent, so E <= D.

    Returns:
        [N, E].
    """
    found = (torch.linalg.pinv(outputs.mT) @ y[..., None]).squeeze(-1)
    again = (found[..., None] * outputs).sum(1)
    return found if torch.allclose(again, y, rtol=1e-6, atol=1e-9) else None


def fault(y: Tensor, outputs: Tensor, weights: Tensor) -> Fault | None:
    """What is wrong with a mixture's output, the gravest first; None if nothing is.

    Args:
        y: [N, D].
        outputs: [N, E, D].
        weights: [N, E], how much of each expert should be in each token's output; 0 for those it did not choose.
    """
    found = shares(y, outputs)
    if found is None:
        return "astray"
    there, wanted = found.abs() > 1e-6, weights != 0
    if (there & ~wanted).any():
        return "unasked"
    if (wanted & ~there).any():
        return "missing"
    return None if torch.allclose(found, weights, rtol=1e-6, atol=1e-6) else "weights"
