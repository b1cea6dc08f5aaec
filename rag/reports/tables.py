"""The tables of the page, as numbers: scores with intervals, run against run, by kind of question, calibration.

scores = score_table(measured)
pairs = comparisons(measured, questions)

Fractions throughout; the template multiplies by 100.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rag.evaluation.intervals import intervals
from rag.evaluation.scores import label
from rag.reports.measures import Measured, softmax
from rag.reports.statistics import sign_test

QUESTION_WORDS = ("who", "whom", "whose", "what", "which", "when", "where", "why", "how")
LENGTHS = ((1, "1 word"), (2, "2 words"), (4, "3 or 4 words"), (float("inf"), "5 words or more"))
RANKS = ((1, "first"), (2, "second"), (5, "third to fifth"), (float("inf"), "later"))
COMPARED = ("em", "f1", "recall_at_", "mrr")  # the beginnings of their names
MOST_IN_ALL_PAIRS = 4  # of more evaluations each is compared with the first
BINS = 10


@dataclass
class Score:
    """A mean over questions."""

    value: float
    low: float | None = None  # 95%; None where only the mean is known
    high: float | None = None


def score_table(measured: list[Measured]) -> tuple[list[str], list[dict[str, Score]]]:
    """The names of all scores, in the order in which they come first, and those of each evaluation."""
    rows = []
    for one in measured:
        row = {name: Score(value) for name, value in one.evaluation.scores.items()}
        bounds = intervals(one.values)
        row |= {name: Score(float(values.mean()), *bounds[name]) for name, values in one.values.items()}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return sorted(names, key=lambda name: [not name.startswith(start) for start in ("em", "f1", "recall")]), rows


def other_scores(one: Measured) -> list[str]:
    """What eval_rag.py wrote and is not what comes out here, as by another gold file."""
    return [
        f"{one.name}: {label(name)} is {100 * one.values[name].mean():.2f} by this gold file, and {100 * written:.2f} "
        "in its .scores.json"
        for name, written in one.evaluation.scores.items()
        if name in one.values and abs(one.values[name].mean() - written) > 1e-4
    ]


@dataclass
class Comparison:
    """One score of two evaluations of the same questions."""

    first: str
    second: str
    score: str
    difference: float  # second less first
    low: float
    high: float
    wins: int  # questions of which the second's value is the larger one
    losses: int
    ties: int
    p: float


def comparisons(measured: list[Measured], questions: list[list[str] | None]) -> list[Comparison]:
    """Every pair that answered the same questions, or each with the first where these are too many."""
    pairs: Iterable = combinations(range(len(measured)), 2)
    if len(measured) > MOST_IN_ALL_PAIRS:
        pairs = ((0, other) for other in range(1, len(measured)))
    rows: list[Comparison] = []
    for a, b in pairs:
        if same_questions(measured[a], measured[b], questions[a], questions[b]):
            rows += compare(measured[a], measured[b])
    return rows


def same_questions(a: Measured, b: Measured, of_a: list[str] | None, of_b: list[str] | None) -> bool:
    same_number = len(a.evaluation.lines) == len(b.evaluation.lines)
    return same_number and (of_a is None or of_b is None or of_a == of_b)


def compare(a: Measured, b: Measured) -> list[Comparison]:
    names = [name for name in a.values if name in b.values and name.startswith(COMPARED)]
    differences = {name: b.values[name] - a.values[name] for name in names}
    rows = []
    for name, (low, high) in intervals(differences).items():
        values = differences[name]
        wins, losses = int((values > 1e-9).sum()), int((values < -1e-9).sum())
        ties = len(values) - wins - losses
        p = sign_test(wins, losses)
        rows.append(Comparison(a.name, b.name, name, float(values.mean()), low, high, wins, losses, ties, p))
    return rows


# --- Kinds of questions -----------------------------------------------------------------------------------------------


def question_word(question: str) -> str:
    """The first of who, what, when, ... in it; whom and whose are who."""
    found = next((word for word in re.findall(r"[a-z]+", question.lower()) if word in QUESTION_WORDS), "other")
    return "who" if found.startswith("who") else found


def answer_length(right: list[str]) -> str:
    words = min(len(answer.split()) for answer in right)
    return next(name for most, name in LENGTHS if words <= most)


def rank_of_answer(first: int) -> str:
    return next(name for most, name in RANKS if first <= most) if first else "in none"


def grouped(kinds: list[str], order: Callable[[str], Any], measured: list[Measured]) -> list[dict[str, Any]]:
    """A row a kind of question: its number of questions and, of each evaluation, the means of EM and F1."""
    names = np.array(kinds)
    rows = []
    for kind in sorted(set(kinds), key=order):
        own = names == kind
        means = [
            {name: float(one.values[name][own].mean()) for name in ("em", "f1") if name in one.values}
            for one in measured
        ]
        rows.append({"kind": kind, "questions": int(own.sum()), "means": means})
    return rows


def by_question_word(questions: list[str], measured: list[Measured]) -> list[dict[str, Any]]:
    kinds = list(map(question_word, questions))
    return grouped(kinds, lambda kind: (kind == "other", -kinds.count(kind), kind), measured)


def by_answer_length(right: list[list[str]], measured: list[Measured]) -> list[dict[str, Any]]:
    return grouped(list(map(answer_length, right)), [name for _, name in LENGTHS].index, measured)


def by_rank(one: Measured) -> list[dict[str, Any]]:
    """EM and F1 by the rank of the first passage that holds an answer."""
    assert one.first is not None
    return grouped(list(map(rank_of_answer, one.first)), [*(name for _, name in RANKS), "in none"].index, [one])


# --- Calibration ------------------------------------------------------------------------------------------------------


@dataclass
class Calibration:
    """How often it is so where the model says so with probability p."""

    what: str
    stated: list[float]  # the mean probability of each bin that has questions
    found: list[float]  # how often it was so
    questions: list[int]
    error: float  # expected calibration error: mean |stated - found|, weighted by questions


def calibrate(what: str, probabilities: np.ndarray, right: np.ndarray) -> Calibration:
    """In ten bins of equal width (Guo et al. 2017); probabilities and right (n)."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    used = sorted(set(bins.tolist()))
    stated = [float(probabilities[bins == one].mean()) for one in used]
    found = [float(right[bins == one].mean()) for one in used]
    questions = [int((bins == one).sum()) for one in used]
    gaps = np.abs(np.array(stated) - found)
    return Calibration(what, stated, found, questions, float((gaps * questions).sum() / len(right)))


def calibrations(one: Measured) -> list[Calibration]:
    """Of answers, where the records hold their log probabilities, and of the passage that the model leans on."""
    found = []
    log_probabilities = one.evaluation.column("answer_log_prob")
    if log_probabilities is not None and "em" in one.values:
        found.append(calibrate("answer", np.exp(np.array(log_probabilities, float)).clip(0, 1), one.values["em"]))
    for name, what, by in (
        ("attribution", "posterior of a passage", "posteriors"),
        ("attribution_prior", "prior of a passage", "scores"),
    ):
        column = one.evaluation.column(by)
        if name in one.values and column is not None:
            shares = [own if by == "posteriors" else softmax(own) for own in column]
            largest = np.array([max(own, default=0.0) for own in shares], float)
            found.append(calibrate(what, largest.clip(0, 1), one.values[name]))
    return found
