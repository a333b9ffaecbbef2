"""pass@k, and how sure one can be of it."""

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples passes, estimated from `correct` of `samples` that did.

    1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
    equation 1), as a product that neither overflows nor cancels. Needs 0 <= correct <= samples and 1 <= k <= samples.
    """
    assert 0 <= correct <= samples and 1 <= k <= samples, (samples, correct, k)
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def interval(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for the mean of values in [0, 1], one per problem (z = 1.96: 95%).

    Exact in form where the values are 0 or 1. Otherwise conservative: a variable in [0, 1] with mean p has
    variance at most p (1 - p). It speaks of problems drawn like these, not of the sampling within one.
    """
    n = len(values)
    if n == 0:
        return 0.0, 1.0
    p = sum(values) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    values: Sequence[float], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of values, one per problem: problems drawn again, with replacement.

    It takes the values' spread as it is, so for shares of several samples it is narrower than Wilson's; where all are
    equal it shrinks to a point, which is why Wilson's stands beside it.
    """
    import numpy

    if not len(values):
        return 0.0, 1.0
    data = numpy.asarray(values, dtype=numpy.float64)
    rng = numpy.random.default_rng(seed)
    means = numpy.concatenate(
        [
            data[rng.integers(0, len(data), (part, len(data)))].mean(axis=1)
            for part in [min(500, resamples - start) for start in range(0, resamples, 500)]
        ]
    )
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
