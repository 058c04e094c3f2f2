"""Which parameters share a bucket: what the reducers make and the prediction of bytes must know alike.

Parameters come in the order in which forward uses them. Backward reaches the last first, so buckets are filled from
there; and each parameter brings one number of its own beside its elements, the flag (`data.py` says what for):

    parameters   embed   layer 0   layer 1   norm       buckets of about 100 numbers:
    elements        90        40        50      8
    bucket           1         0         0      0       9 + 51 + 41 = 101, and 91

No process and no collective is needed to say so.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def bucket(sizes: Sequence[int], itemsize: int, bucket_bytes: float) -> list[list[int]]:
    """Group parameters, given in order with their sizes in elements, into buckets of about `bucket_bytes`.

    Returns lists of indices. A bucket is closed once it has reached the size, so one large parameter fits.
    """
    buckets: list[list[int]] = []
    filled = float("inf")
    for index, size in enumerate(sizes):
        if filled >= bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += (size + 1) * itemsize  # one more for the flag
    return buckets


def last_first(sizes: Mapping[Key, int], itemsize: int, bucket_bytes: float) -> list[list[Key]]:
    """The buckets of `GradientBuckets`, in the order in which they are started, with their parameters in order.

    Args:
        sizes: of the trained parameters of one dtype, in elements, in the order of forward.
        itemsize: bytes of a gradient's element.
    """
    order = list(sizes)[::-1]
    groups = bucket([sizes[key] for key in order], itemsize, bucket_bytes)
    return [[order[index] for index in group] for group in groups]
