"""The bigram baseline against the formulas written out with dictionaries."""

from collections import Counter
from itertools import pairwise
from math import log2

import numpy as np
import pytest

from picotron_mini.data.bigram import _fit, bigram_bits_per_byte, unigram_bits_per_byte

V = 12
RNG = np.random.default_rng(0)
TRAIN = np.minimum(RNG.geometric(0.3, 300) - 1, V - 2).astype(np.uint16)  # V - 1 never occurs
VAL = np.concatenate([[2], np.minimum(RNG.geometric(0.3, 80) - 1, V - 2), [V - 1, 0, V - 1, V - 1]]).astype(np.uint16)
BYTES = np.arange(V) % 4


def discount(counts: list[int]) -> float:
    once, twice = counts.count(1), counts.count(2)
    return min(once / (once + 2 * twice), 0.95) if once else 0.5


def slow_unigram(counts: Counter[int]) -> list[float]:
    d = discount(list(counts.values()))
    total, kinds = sum(counts.values()), len(counts)
    return [max(counts[w] - d, 0) / total + d * kinds / total / V for w in range(V)]


def slow_bigram(v: int, w: int) -> float:
    train = TRAIN.tolist()
    pairs = Counter(pairwise(train))
    q = slow_unigram(Counter(after for _, after in pairs))[w]
    total = sum(c for (a, _), c in pairs.items() if a == v)
    kinds = sum(1 for a, _ in pairs if a == v)
    if not total:
        return q
    d = discount(list(pairs.values()))
    return max(pairs[v, w] - d, 0) / total + d * kinds / total * q


def test_bigram_equals_the_slow_one() -> None:
    val = VAL.tolist()
    bits = -sum(log2(slow_bigram(v, w)) for v, w in pairwise(val))
    expected = bits / sum(int(BYTES[w]) for w in val[1:])
    assert bigram_bits_per_byte(TRAIN, VAL, V, BYTES) == pytest.approx(expected, rel=1e-12)


def test_unigram_equals_the_slow_one() -> None:
    p = slow_unigram(Counter(TRAIN.tolist()))
    expected = -sum(log2(p[w]) for w in VAL[1:].tolist()) / sum(int(BYTES[w]) for w in VAL[1:].tolist())
    assert unigram_bits_per_byte(TRAIN, VAL, V, BYTES) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokens", [TRAIN, np.array([0, 1]), np.arange(V), np.array([3] * 50)])
def test_probabilities_sum_to_one_and_none_is_zero(tokens: np.ndarray) -> None:
    before, after = np.divmod(np.arange(V * V), V)
    p = _fit(tokens, V).probability(before, after).reshape(V, V)
    assert np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert (p > 0).all()


def test_a_bigram_learns_what_a_unigram_cannot() -> None:
    cycle = np.tile(np.arange(4), 500)
    ones = np.ones(4, dtype=np.int64)
    assert unigram_bits_per_byte(cycle, cycle, 4, ones) == pytest.approx(2, abs=0.01)  # log2(4)
    assert bigram_bits_per_byte(cycle, cycle, 4, ones) < 0.01


def test_random_tokens_cost_their_entropy() -> None:
    train, val = (RNG.integers(0, 16, n) for n in (200_000, 20_000))
    assert bigram_bits_per_byte(train, val, 16, np.full(16, 2)) == pytest.approx(4 / 2, abs=0.01)


def test_large_vocabulary_does_not_overflow() -> None:
    tokens = np.array([60_000, 59_999] * 50, dtype=np.uint16)
    assert bigram_bits_per_byte(tokens, tokens, 65_536, np.ones(65_536, dtype=np.int64)) < 0.5
