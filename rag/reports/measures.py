"""What is known of each question of an evaluation: whether its answer is right, and which of its passages hold one.

measured = measure(evaluation, gold)
measured.values        # {"em": (n), "f1": (n), "recall_at_5": (n), ...}: what the files allow, fractions
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rag.errors import UserError
from rag.evaluation.gold import strip_title
from rag.evaluation.scores import answer_values, pattern_values
from rag.metrics import answer_recall_at_k, pattern_recall_at_k
from rag.reports.reading import Evaluation, Gold

KS = (1, 5, 10, 20, 50, 100)


@dataclass(eq=False)
class Measured:
    """An evaluation's n questions, one by one."""

    evaluation: Evaluation
    values: dict[str, np.ndarray] = field(default_factory=dict)  # (n) by the score's name
    holds: np.ndarray | None = None  # (n, K) bool: passage k holds a right answer, or has a right title
    first: np.ndarray | None = None  # (n): rank of the first such passage from 1, 0 where there is none
    depth: int = 0  # K, or what is known of it
    missing: list[str] = field(default_factory=list)  # what is not told, and why

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def recall(self) -> list[float] | None:
        """recall@k for k = 1, 2, ..., K: the share of questions with a right passage among the first k."""
        if self.first is None:
            return None
        return [float(((self.first > 0) & (self.first <= k)).mean()) for k in range(1, self.depth + 1)]

    @property
    def precision(self) -> list[float] | None:
        """precision@k: the right passages among the first k, over k."""
        if self.holds is None:
            return None
        return (self.holds.cumsum(1).mean(0) / np.arange(1, self.depth + 1)).tolist()


def measure(evaluation: Evaluation, gold: Gold | None) -> Measured:
    measured = Measured(evaluation)
    if gold is None:
        measured.missing.append("scores of single questions: give --gold_data_path")
    elif evaluation.is_retrieval or gold.mode == "titles":
        what = "it has titles, no answers" if evaluation.is_retrieval else "the gold file has titles"
        measured.missing.append(f"scores of answers: {what}")
    else:
        found = (pattern_values if gold.mode == "regex" else answer_values)(evaluation.lines, gold.right)
        measured.values |= {name: np.array(own) for name, own in found.items()}
    _measure_passages(measured, gold)
    return measured


def _measure_passages(measured: Measured, gold: Gold | None) -> None:
    evaluation = measured.evaluation
    rows = held_by_passage(evaluation, gold) if gold is not None else None
    if rows is not None:
        measured.depth = max(map(len, rows), default=0)
        measured.holds = np.zeros((len(rows), measured.depth), bool)
        for at, row in enumerate(rows):
            measured.holds[at, : len(row)] = row
        measured.first = np.where(measured.holds.any(1), measured.holds.argmax(1) + 1, 0) if measured.depth else None
        if measured.first is None:
            measured.holds = None
    elif (ranks := evaluation.column("answer_rank")) is not None:
        measured.first = np.array([rank or 0 for rank in ranks])
        titles = evaluation.column("titles")
        measured.depth = max([int(measured.first.max()), *map(len, titles or [])])
    if measured.first is None:
        if gold is not None:
            measured.missing.append("which passages hold the answer: its .jsonl file has no passages' texts")
        return
    for k in KS:
        if k <= measured.depth:
            measured.values[f"recall_at_{k}"] = ((measured.first > 0) & (measured.first <= k)).astype(float)
    if gold is not None and gold.mode == "titles":
        measured.values["mrr"] = np.divide(
            1, measured.first, where=measured.first > 0, out=np.zeros(len(measured.first))
        )
    _measure_attribution(measured)


def held_by_passage(evaluation: Evaluation, gold: Gold) -> list[list[bool]] | None:
    """Of each question's passages, in their order, whether it is a right one; None where the files do not say.

    Answers are searched in texts, as recall@k of eval_rag.py does. Of titles the first of equal ones counts.
    """
    if gold.mode == "titles":
        titles = evaluation.column("titles")
        if titles is None and evaluation.is_retrieval:
            titles = [line.split("\t") for line in evaluation.lines]
        return None if titles is None else list(map(_right_titles, titles, gold.right))
    texts = evaluation.column("texts")
    if texts is None:
        return None
    search = pattern_recall_at_k if gold.mode == "regex" else answer_recall_at_k
    try:
        return [[search([text], right, 1) for text in own] for own, right in zip(texts, gold.right, strict=True)]
    except ValueError as error:  # a pattern takes too long
        raise UserError(f"--gold_data_path: {error}; write it in another way") from error


def _right_titles(titles: list[str], right: list[str]) -> list[bool]:
    left = set(right)
    found = []
    for title in map(strip_title, titles):
        found.append(title in left)
        left.discard(title)
    return found


def _measure_attribution(measured: Measured) -> None:
    """Whether the passage of the largest posterior holds an answer, and the one of the largest score."""
    evaluation = measured.evaluation
    if measured.holds is None or evaluation.column("posteriors") is None or evaluation.column("texts") is None:
        return
    for name, by in (("attribution", "posteriors"), ("attribution_prior", "scores")):
        if (column := evaluation.column(by)) is not None:
            best = [int(np.argmax(values)) if values else None for values in column]
            held = [at is not None and measured.holds[n, at] for n, at in enumerate(best)]
            measured.values[name] = np.array(held, float)


# --- Passages of all questions together -------------------------------------------------------------------------------


def softmax(scores: list[float]) -> np.ndarray:
    """p(z|x) of a question's passages, by their scores."""
    shifted = np.exp(np.array(scores, float) - max(scores, default=0.0))
    return shifted / shifted.sum()


def collapse_signs(evaluation: Evaluation) -> dict[str, Any]:
    """Whether all questions fetch the same few passages: distinct ones over all fetched, the most fetched one's share
    of questions, the mean entropy of p(z|x) in nats; what the records allow.
    """
    signs: dict[str, Any] = {}
    if ids := evaluation.column("doc_ids"):
        fetched = np.array([one for own in ids for one in own])
        if len(fetched):
            counts = np.unique(fetched, return_counts=True)[1]
            signs["distinct"] = len(counts) / len(fetched)
            signs["most"] = counts.max() / len(ids)
    if any(scores := evaluation.column("scores") or []):
        signs["entropy"] = float(np.mean([entropy(softmax(own)) for own in scores if own]))
    if any(posteriors := evaluation.column("posteriors") or []):
        signs["posterior_entropy"] = float(np.mean([entropy(np.array(own)) for own in posteriors if own]))
    return signs


def entropy(probabilities: np.ndarray) -> float:
    """In nats."""
    own = probabilities[probabilities > 0]
    return float(-(own * np.log(own)).sum())
