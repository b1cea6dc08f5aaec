"""Bootstrap intervals: against a resampling by hand, and against what theory says of their width and coverage."""

import numpy as np
import pytest

from rag.evaluation import intervals as module
from rag.evaluation.intervals import intervals


def test_a_resampling_by_hand_gives_the_same():
    values = {"em": [1, 0, 0, 1, 1, 0, 1], "f1": [1, 0.5, 0, 1, 1, 0.25, 1]}
    generator = np.random.default_rng(module.SEED)
    draws = [generator.integers(7, size=7) for _ in range(2000)]
    for name, (low, high) in intervals(values).items():
        means = sorted(sum(values[name][n] for n in draw) / 7 for draw in draws)
        # 2.5% of 1,999 steps between 2,000 means
        assert low == pytest.approx(means[49] + 0.975 * (means[50] - means[49]))
        assert high == pytest.approx(means[1949] + 0.025 * (means[1950] - means[1949]))


def test_blocks_of_resamples_are_the_resamples(monkeypatch):
    values = {"em": np.random.default_rng(1).integers(2, size=50).tolist()}
    whole = intervals(values)
    monkeypatch.setattr(module, "DRAWS_AT_A_TIME", 50 * 7)
    assert intervals(values) == whole
    monkeypatch.setattr(module, "DRAWS_AT_A_TIME", 1)
    assert intervals(values) == whole


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_says():
    ones = [1.0] * 3000 + [0.0] * 7000
    low, high = intervals({"em": ones})["em"]
    half = 1.96 * (0.3 * 0.7 / 10_000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.0007) and high == pytest.approx(0.3 + half, abs=0.0007)


def test_most_intervals_hold_the_truth():
    """Of 200 samples of 100 questions each, about 95% (of the binomial: 181 or more in all but 1 of 100 cases)."""
    generator = np.random.default_rng(2)
    samples = {str(n): (generator.random(100) < 0.4).astype(float).tolist() for n in range(200)}
    assert 181 <= sum(low <= 0.4 <= high for low, high in intervals(samples).values()) < 200


def test_what_does_not_vary_has_a_point():
    assert intervals({"em": [1.0]}) == {"em": (1.0, 1.0)}
    assert intervals({"em": [0.0] * 9, "f1": [1.0] * 9}) == {"em": (0.0, 0.0), "f1": (1.0, 1.0)}
    assert intervals({}) == {}
