"""Scores of answers and of retrieved titles, line by line against what counts as right; fractions.

    answer_values(["norway"], [["norway", "the kingdom of norway"]])           # {"em": [1.0], "f1": [1.0]}
    score_answers(["norway"], [["norway", "the kingdom of norway"]])           # {"em": 1.0, "f1": 1.0}
    title_values(["oslo\\trome"], [["rome"]], ks=[1, 2], n_docs=2)              # {"precision_at_1": [0.0], ...}
    get_scores(args, "predictions.txt", "test.qa")                             # of two files, as in the public suite

Line n of the predictions is scored against line n of the gold. What ends in `_values` has a number a question, of which
`means` makes scores and `rag.evaluation.intervals` their intervals.
"""

import logging
from collections.abc import Callable
from statistics import fmean
from typing import Any

from rag.errors import UserError
from rag.evaluation.arguments import EvalArguments
from rag.evaluation.gold import EvalData, gold_lines, parse_lines, strip_title
from rag.evaluation.kilt import page_recall_at_k, r_precision
from rag.evaluation.predictions import Predictions
from rag.files import read_lines
from rag.metrics import (
    answer_recall_at_k,
    exact_match_score,
    f1_score,
    metric_max_over_ground_truths,
    pattern_match_score,
    pattern_recall_at_k,
    precision_at_k,
    reciprocal_rank,
)

logger = logging.getLogger(__name__)


# By the score's name a number a question.
Values = dict[str, list[float]]


def means(values: Values) -> dict[str, float]:
    """The scores, by name."""
    return {name: fmean(own) for name, own in values.items()}


def values_of(args: EvalArguments, data: EvalData, predictions: Predictions) -> Values:
    """All that an evaluation measures of its questions."""
    lines, records = predictions.lines, predictions.records
    if args.eval_mode == "retrieval":
        values = title_values(lines, data.gold, args.k, args.passages_per_question)
        if data.pages is not None:
            values |= page_values(titles_of(lines, args.passages_per_question), data.pages, args.k)
        if data.answers is not None:
            values |= rank_values(args, predictions)
        return values
    is_regex = args.gold_data_mode == "regex"
    holds_answer = pattern_recall_at_k if is_regex else answer_recall_at_k
    values = (pattern_values if is_regex else answer_values)(lines, data.gold)
    if args.contains:
        values |= contains_values(lines, data.gold, holds_answer)
    values |= attribution_values(records, data.gold, holds_answer)
    if data.pages is not None and all("titles" in record for record in records):
        titles = [list(map(strip_title, record["titles"])) for record in records]
        values |= kilt_values(page_values(titles, data.pages, []) | values)
    return values


def answer_values(lines: list[str], gold: list[list[str]]) -> Values:
    """EM and F1 against the best of the right answers (SQuAD v1.1)."""
    pairs = list(zip(lines, gold, strict=True))
    return {
        name: [float(metric_max_over_ground_truths(metric, line, right)) for line, right in pairs]
        for name, metric in (("em", exact_match_score), ("f1", f1_score))
    }


def pattern_values(lines: list[str], patterns: list[list[str]]) -> Values:
    """EM: 1 for an answer that one of its patterns matches. F1 has no meaning for patterns.

    Raises:
        UserError: a pattern takes too long; names the line.
    """
    return {"em": _each_line(lines, patterns, lambda line, own: any(pattern_match_score(line, one) for one in own))}


def contains_values(lines: list[str], gold: list[list[str]], holds_answer: Callable[..., bool]) -> Values:
    """contains: 1 for an answer in which one of the right ones stands, word for word, as DPR finds them in passages.

    Args:
        holds_answer: of `rag.metrics`, whether a text holds an answer, or what a pattern matches.

    Raises:
        UserError: as of `pattern_values`.
    """
    return {"contains": _each_line(lines, gold, lambda line, right: holds_answer([line], right, 1))}


def _each_line(lines: list[str], gold: list[list[str]], is_right: Callable[[str, list[str]], bool]) -> list[float]:
    values = []
    for number, (line, right) in enumerate(zip(lines, gold, strict=True), start=1):
        try:
            values.append(float(is_right(line, right)))
        except ValueError as error:
            raise UserError(f"--gold_data_path, line {number}: {error}; write it in another way") from error
    return values


def attribution_values(records: list[dict], gold: list[list[str]], holds_answer: Callable[..., bool]) -> Values:
    """Whether the passage of the largest posterior holds an answer, and the one of the largest score; {} if unknown.

    Args:
        holds_answer: of `rag.metrics`.
    """
    if not all("posteriors" in record for record in records):
        return {}

    def holds(record: dict, right: list[str], by: str) -> float:
        best = max(range(len(record["texts"])), key=record[by].__getitem__, default=None)
        return float(best is not None and holds_answer([record["texts"][best]], right, 1))

    pairs = list(zip(records, gold, strict=True))
    return {
        name: [holds(record, right, by) for record, right in pairs]
        for name, by in (("attribution", "posteriors"), ("attribution_prior", "scores"))
    }


def titles_of(lines: list[str], n_docs: int) -> list[list[str]]:
    """The first `n_docs` titles of each line, though it may have more."""
    return [[strip_title(title) for title in line.split("\t")[:n_docs]] for line in lines]


def title_values(lines: list[str], gold: list[list[str]], ks: list[int], n_docs: int) -> Values:
    """precision@k for every k, and MRR over the first `n_docs` titles of each line."""
    pairs = list(zip(titles_of(lines, n_docs), gold, strict=True))
    values = {f"precision_at_{k}": [precision_at_k(*pair, k) for pair in pairs] for k in ks}
    return values | {"mrr": [reciprocal_rank(*pair) for pair in pairs]}


def page_values(titles: list[list[str]], pages: list[list[list[str]]], ks: list[int]) -> Values:
    """R-precision, and recall@k of pages for every k, as KILT defines them."""
    pairs = list(zip(titles, pages, strict=True))
    values = {f"page_recall_at_{k}": [page_recall_at_k(*pair, k) for pair in pairs] for k in ks}
    return {"r_precision": [r_precision(*pair) for pair in pairs]} | values


def kilt_values(values: Values) -> Values:
    """R-precision, and KILT-EM and KILT-F1: EM and F1 of the answers whose R-precision is 1, 0 of the others."""
    right = [value == 1 for value in values["r_precision"]]
    return {"r_precision": values["r_precision"]} | {
        f"kilt_{name}": [score * is_right for score, is_right in zip(values[name], right, strict=True)]
        for name in ("em", "f1")
    }


def rank_values(args: EvalArguments, predictions: Predictions) -> Values:
    """recall@k for every k: whether one of the first k passages holds an answer."""
    if any("answer_rank" not in record for record in predictions.records):
        raise UserError(
            f"--answers_path {args.answers_path}: the passages of some lines of {args.predictions_path} are not "
            f"recorded in {predictions.records_path}; give --recalculate, or leave --answers_path out"
        )
    ranks = [record["answer_rank"] or float("inf") for record in predictions.records]
    return {f"recall_at_{k}": [float(rank <= k) for rank in ranks] for k in args.k}


def score_answers(lines: list[str], gold: list[list[str]]) -> dict[str, float]:
    """The means of `answer_values`."""
    return means(answer_values(lines, gold))


def score_patterns(lines: list[str], patterns: list[list[str]]) -> dict[str, float]:
    """The means of `pattern_values`."""
    return means(pattern_values(lines, patterns))


def require_titles(path: str, lines: list[str], k: int) -> None:
    """Raise `UserError` where no line of a predictions file has as many titles as are to be scored."""
    most = max((len(line.split("\t")) for line in lines), default=k)
    if most < k:
        raise UserError(
            f"--predictions_path {path} has {most} titles a line at most, too few for --k {k}; give --recalculate to "
            "retrieve more, or a smaller --k"
        )


IN_CAPITALS = ("em", "f1", "mrr", "kilt_em", "kilt_f1")


def label(name: str) -> str:
    """em -> EM, precision_at_5 -> Precision@5, attribution_prior -> Attribution-prior."""
    hyphened = name.replace("_at_", "@").replace("_", "-")
    return hyphened.upper() if name in IN_CAPITALS else hyphened.capitalize()


# --- Two files, as the public suite scores them -----------------------------------------------------------------------


def get_scores(args: Any, preds_path: str, gold_data_path: str) -> dict[str, float]:
    """EM and F1 of a file of answers, as fractions; logged in percent.

    Args:
        args: has `gold_data_mode`, "qa", "regex", "kilt" or "ans".

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
    return _logged(means(title_values(lines, gold, ks, n_docs=max(len(line.split("\t")) for line in lines))))


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
