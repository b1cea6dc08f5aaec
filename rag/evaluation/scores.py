"""Scores of answers and of retrieved titles, line by line against what counts as right; fractions.

    score_answers(["norway"], [["norway", "the kingdom of norway"]])           # {"em": 1.0, "f1": 1.0}
    score_titles(["oslo\\trome"], [["rome"]], ks=[1, 2], n_docs=2)              # {"precision_at_1": 0.0, ...}
    get_scores(args, "predictions.txt", "test.qa")                             # of two files, as in the public suite

Line n of the predictions is scored against line n of the gold.
"""

import logging
from collections.abc import Callable
from statistics import fmean
from typing import Any

from rag.errors import UserError
from rag.evaluation.arguments import EvalArguments
from rag.evaluation.gold import gold_lines, parse_lines, strip_title
from rag.evaluation.predictions import Predictions
from rag.files import read_lines
from rag.metrics import (
    exact_match_score,
    f1_score,
    metric_max_over_ground_truths,
    pattern_match_score,
    precision_at_k,
    reciprocal_rank,
)

logger = logging.getLogger(__name__)


def score_answers(lines: list[str], gold: list[list[str]]) -> dict[str, float]:
    """EM and F1 against the best of the right answers (SQuAD v1.1)."""
    pairs = list(zip(lines, gold, strict=True))
    return {
        name: fmean(metric_max_over_ground_truths(metric, line, right) for line, right in pairs)
        for name, metric in (("em", exact_match_score), ("f1", f1_score))
    }


def score_patterns(lines: list[str], patterns: list[list[str]]) -> dict[str, float]:
    """EM: share of the answers that one of their patterns matches. F1 has no meaning for patterns.

    Raises:
        UserError: a pattern takes too long; names the line.
    """
    right = []
    for number, (line, own) in enumerate(zip(lines, patterns, strict=True), start=1):
        try:
            right.append(any(pattern_match_score(line, pattern) for pattern in own))
        except ValueError as error:
            raise UserError(f"--gold_data_path, line {number}: {error}; write it in another way") from error
    return {"em": fmean(right)}


def score_attribution(
    records: list[dict], gold: list[list[str]], holds_answer: Callable[..., bool]
) -> dict[str, float]:
    """How often the passage of the largest posterior holds an answer, and the one of the largest score; {} if unknown.

    Args:
        holds_answer: of `rag.metrics`.
    """
    if not all("posteriors" in record for record in records):
        return {}

    def holds(record: dict, right: list[str], by: str) -> bool:
        best = max(range(len(record["texts"])), key=record[by].__getitem__, default=None)
        return best is not None and holds_answer([record["texts"][best]], right, 1)

    pairs = list(zip(records, gold, strict=True))
    return {
        name: fmean(holds(record, right, by) for record, right in pairs)
        for name, by in (("attribution", "posteriors"), ("attribution_prior", "scores"))
    }


def score_titles(lines: list[str], gold: list[list[str]], ks: list[int], n_docs: int) -> dict[str, float]:
    """precision@k for every k, and MRR over the first `n_docs` titles of each line, though it may have more."""
    titles = [[strip_title(title) for title in line.split("\t")[:n_docs]] for line in lines]
    pairs = list(zip(titles, gold, strict=True))
    scores = {f"precision_at_{k}": fmean(precision_at_k(*pair, k) for pair in pairs) for k in ks}
    return scores | {"mrr": fmean(reciprocal_rank(*pair) for pair in pairs)}


def score_answer_ranks(args: EvalArguments, predictions: Predictions) -> dict[str, float]:
    """recall@k for every k: whether one of the first k passages holds an answer."""
    if any("answer_rank" not in record for record in predictions.records):
        raise UserError(
            f"--answers_path {args.answers_path}: the passages of some lines of {args.predictions_path} are not "
            f"recorded in {predictions.records_path}; give --recalculate, or leave --answers_path out"
        )
    ranks = [record["answer_rank"] or float("inf") for record in predictions.records]
    return {f"recall_at_{k}": fmean(rank <= k for rank in ranks) for k in args.k}


def require_titles(path: str, lines: list[str], k: int) -> None:
    """Raise `UserError` where no line of a predictions file has as many titles as are to be scored."""
    most = max((len(line.split("\t")) for line in lines), default=k)
    if most < k:
        raise UserError(
            f"--predictions_path {path} has {most} titles a line at most, too few for --k {k}; give --recalculate to "
            "retrieve more, or a smaller --k"
        )


def label(name: str) -> str:
    """em -> EM, precision_at_5 -> Precision@5, attribution_prior -> Attribution-prior."""
    return name.upper() if name in ("em", "f1", "mrr") else name.replace("_at_", "@").replace("_", "-").capitalize()


# --- Two files, as the public suite scores them -----------------------------------------------------------------------


def get_scores(args: Any, preds_path: str, gold_data_path: str) -> dict[str, float]:
    """EM and F1 of a file of answers, as fractions; logged in percent.

    Args:
        args: has `gold_data_mode`, "qa", "regex" or "ans".

    Raises:
        UserError: the files are of different length, or a gold line is faulty.
    """
    score = score_patterns if args.gold_data_mode == "regex" else score_answers
    return _logged(score(*_read_both(preds_path, gold_data_path, args.gold_data_mode)))


def get_precision_at_k(args: Any, preds_path: str, gold_data_path: str) -> dict[str, float]:
    """precision@k of a file of tab-separated titles, for one k or several, and MRR; logged and raising as `get_scores`.

    Args:
        args: has `k`, a number or a list of them.
    """
    ks = [args.k] if isinstance(args.k, int) else args.k
    lines, gold = _read_both(preds_path, gold_data_path, "titles")
    require_titles(preds_path, lines, max(ks))
    return _logged(score_titles(lines, gold, ks, n_docs=max(len(line.split("\t")) for line in lines)))


def _read_both(preds_path: str, gold_data_path: str, mode: str) -> tuple[list[str], list[list[str]]]:
    lines, gold = read_lines(preds_path), gold_lines("gold_data_path", gold_data_path, mode)
    if len(lines) != len(gold) or not lines:
        raise UserError(
            f"{preds_path} has {len(lines)} lines and {gold_data_path} {len(gold)}; give two files of which line "
            "n of one belongs to line n of the other"
        )
    return lines, parse_lines("gold_data_path", gold_data_path, gold, mode)


def _logged(scores: dict[str, float]) -> dict[str, float]:
    for name, score in scores.items():
        logger.info(f"{label(name)}: {100 * score:.2f}")
    return scores
