import itertools
import math
import random
from fractions import Fraction

import pytest

from phi1.evaluate.passk import bootstrap, interval, pass_at_k


def test_against_brute_force() -> None:
    """The share of all k-subsets that hold a sample which passes."""
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
                assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-12)


def test_large_n_neither_overflows_nor_cancels() -> None:
    for n, c, k in ((1000, 3, 100), (10_000, 1, 9_999), (2000, 1999, 1)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-10)


def test_interval_of_known_cases() -> None:
    # Wilson 95% intervals, to four places (Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29).
    for passed, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert interval([1.0] * passed + [0.0] * (n - passed)) == pytest.approx((low, high), abs=6e-5)
    assert interval([]) == (0.0, 1.0)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_interval_covers_the_truth(rate: float) -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(600):
        low, high = interval([float(rng.random() < rate) for _ in range(164)])
        covered += low <= rate <= high
    assert 0.92 <= covered / 600 <= 0.985


def test_interval_of_shares_is_conservative() -> None:
    """Problems solved by half of their samples vary less than a coin: the interval must not be the narrower for it."""
    assert interval([0.5] * 100) == interval([1.0] * 50 + [0.0] * 50)


def test_bootstrap_is_that_of_the_binomial_where_values_are_zero_or_one() -> None:
    """Means of resamples are binomial: their exact quantiles, give or take one problem and the sampling."""
    low, high = bootstrap([1.0] * 30 + [0.0] * 70)
    cumulative = itertools.accumulate(math.comb(100, i) * 0.3**i * 0.7 ** (100 - i) for i in range(101))
    quantiles = next(i / 100 for i, p in enumerate(cumulative) if p >= 0.025), 0.39
    assert low == pytest.approx(quantiles[0], abs=0.011) and high == pytest.approx(quantiles[1], abs=0.011)
    assert bootstrap([1.0] * 30 + [0.0] * 70) == (low, high)
    assert bootstrap([]) == (0.0, 1.0) and bootstrap([0.0] * 20) == (0.0, 0.0)


def test_bootstrap_of_shares_is_narrower() -> None:
    low, high = bootstrap([0.4, 0.6] * 50)
    wide_low, wide_high = interval([0.4, 0.6] * 50)
    assert high - low < (wide_high - wide_low) / 3
