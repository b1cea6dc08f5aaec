"""How likely it is that two evaluations differ as they do by chance: the exact sign test.

    sign_test(wins=9, losses=1)     # 0.0215: two-sided, ties left out

Intervals of scores, and of the differences of pairs, are those of `rag.evaluation.intervals`.
"""

from fractions import Fraction


def sign_test(wins: int, losses: int) -> float:
    """How often a fair coin would be as uneven or more, exactly; 1 where there is nothing but ties."""
    n = wins + losses
    term = total = 1  # n choose k, summed for k up to the smaller count
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))
