"""How far a score would lie elsewhere with other questions of the same kind: percentile bootstrap (Efron, 1979).

    intervals({"em": [1.0, 0.0, 1.0, 1.0]})      # {"em": (0.25, 1.0)}: of 95% of the resamples

As many questions as there are, drawn with replacement, are a resample; its score is one that other questions could
have given. The draws depend on the number of questions alone, so that two files of the same questions are resampled
alike, and a file that is scored again has the same intervals.
"""

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
DRAWS_AT_A_TIME = 2**22  # 32 MB of question numbers


def intervals(values: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, tuple[float, float]]:
    """The middle 95% of the means of 2,000 resamples, by the score's name; between values, linearly.

    Args:
        values: for each score a number a question, as many for all; at least one question.
    """
    if not values:
        return {}
    columns = np.array(list(values.values()), dtype=np.float64).T  # (questions, scores)
    means = np.concatenate([counts @ columns for counts in _resamples(len(columns))]) / len(columns)
    tail = 100 * (1 - CONFIDENCE) / 2
    lows, highs = np.percentile(means, [tail, 100 - tail], axis=0).tolist()
    return dict(zip(values, zip(lows, highs, strict=True), strict=True))


def _resamples(questions: int):
    """How often each question was drawn, (resamples, questions) float64, in blocks of a bounded size."""
    generator = np.random.default_rng(SEED)
    block = max(1, DRAWS_AT_A_TIME // questions)
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        draws = generator.integers(questions, size=(count, questions))
        draws += questions * np.arange(count)[:, None]  # a question of another resample is another one
        counts = np.bincount(draws.ravel(), minlength=count * questions)
        yield counts.reshape(count, questions).astype(np.float64)
