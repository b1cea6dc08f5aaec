"""How sure a mean over questions is, and a difference of two: percentile bootstrap and exact sign test.

    intervals(np.array([[1.0, 0.0, 1.0]]))          # [(0.0, 1.0)]: 95%, a row of values each
    sign_test(wins=9, losses=1)                      # 0.0215: two-sided, ties left out

A seed makes them the same in every run. Questions are drawn with replacement, all rows by the same draw, so that the
interval of a difference is that of pairs (Efron and Tibshirani 1993; for evaluations Koehn 2004).
"""

from fractions import Fraction

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
CHUNK_NUMBERS = 1 << 24  # weights held at a time


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of rows (m, n) over `resamples` draws of n questions: (resamples, m)."""
    rng = np.random.default_rng(SEED)
    rows, n = values.shape
    means = np.empty((resamples, rows))
    step = max(1, CHUNK_NUMBERS // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(size)])
        means[start : start + size] = weights @ values.T / n
    return means


def intervals(values: np.ndarray) -> list[tuple[float, float]]:
    """The bounds within which 95% of the draws' means lie, of each row of values (m, n)."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(bootstrap_means(values), tails, axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def sign_test(wins: int, losses: int) -> float:
    """How often a fair coin would be as uneven or more, exactly; 1 where there is nothing but ties."""
    n = wins + losses
    term = total = 1  # n choose k, summed for k up to the smaller count
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))
