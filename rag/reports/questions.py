"""Questions one by one: the best and the worst with their passages, and a short row of every one.

    chosen = extremes(measured, how_many=10)
    details = detail(measured, chosen["worst"][0], questions, gold)
    table = question_table(measured, questions, gold)

Texts stay texts here; the template and the page's script escape them.
"""

import unicodedata
from typing import Any

import numpy as np
import regex

from rag.metrics import PATTERN_SECONDS, compile_pattern, find_answers
from rag.pages.templates import script_json
from rag.reports.measures import Measured, softmax
from rag.reports.reading import Gold

MOST_DETAILS = 40  # questions with passages in the whole page, but at least two of the best and of the worst of each
MOST_PASSAGES = 6  # of such a question
LONGEST_TEXT = 900  # characters of a passage
LONGEST_LINE = 500  # of a question, an answer, a title beside passages
BEFORE_ANSWER = 200  # characters kept before an answer where a text is cut
TABLE_BYTES = 3_000_000
CUTS = (200, 100, 60, 30)  # characters of a question and of an answer in the table: the first at which it fits


# --- The best and the worst -------------------------------------------------------------------------------------------


def details_each(evaluations: int) -> int:
    """How many of the best, and of the worst, questions of each evaluation are shown with passages."""
    return max(2, min(10, MOST_DETAILS // (2 * max(evaluations, 1))))


def extremes(one: Measured, how_many: int) -> dict[str, list[int]]:
    """Numbers from 0 of the "worst" questions and of the "best".

    Worst: the lowest F1 (or EM), best: the highest. Of equal ones those come first whose right answer has the largest
    share of the passages: of the worst, answers that the model had before its eyes.
    """
    measure = one.values.get("f1", one.values.get("em"))
    if measure is None:
        return {}
    share = share_on_answer(one)
    order = np.lexsort((np.arange(len(measure)), -share, measure))
    is_low = measure[order] < 1
    worst = order[is_low][:how_many]
    best = np.lexsort((np.arange(len(measure)), -share, -measure))
    best = best[measure[best] > 0][:how_many]
    return {"worst": worst.tolist(), "best": best.tolist()}


def share_on_answer(one: Measured) -> np.ndarray:
    """The posterior, or prior, of all passages together that hold an answer, (n); 0 where nothing is known."""
    column, is_posterior = one.evaluation.column("posteriors"), True
    if column is None:
        column, is_posterior = one.evaluation.column("scores"), False
    n = len(one.evaluation.lines)
    if column is None or one.holds is None:
        return np.zeros(n)
    shares = [np.array(own) if is_posterior else softmax(own) for own in column]
    return np.array([own[held[: len(own)]].sum() for own, held in zip(shares, one.holds, strict=True)], float)


def detail(one: Measured, at: int, questions: list[str] | None, gold: Gold | None) -> dict[str, Any]:
    """All that is known of question `at`, from 0."""
    evaluation = one.evaluation
    record = evaluation.records[at] if evaluation.records else {}
    right = gold.right[at] if gold is not None else []
    titles, texts = record.get("titles", []), record.get("texts", [])
    scores, posteriors = record.get("scores", []), record.get("posteriors", [])
    priors = softmax(scores).tolist() if scores else []
    passages = []
    for n in range(max(len(titles), len(texts))):
        passages.append(
            {
                "rank": n + 1,
                "title": cut(titles[n]) if n < len(titles) else "",
                "text": marked(texts[n], right, gold) if n < len(texts) else [],
                "score": scores[n] if n < len(scores) else None,
                "prior": priors[n] if n < len(priors) else None,
                "posterior": posteriors[n] if n < len(posteriors) else None,
                "holds": bool(one.holds[at, n]) if one.holds is not None else None,
            }
        )
    shown = shown_passages(passages)
    return {
        "number": at + 1,
        "question": cut(questions[at]) if questions is not None else f"Question {at + 1}",
        "answer": cut(evaluation.lines[at]),
        "right": cut(" | ".join(right)),
        "values": {name: float(one.values[name][at]) for name in ("em", "f1") if name in one.values},
        "passages": shown,
        "left_out": len(passages) - len(shown),
    }


def cut(text: str, most: int = LONGEST_LINE) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown_passages(passages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those worth their room, in their order: the first ones, the first with an answer, the one of most posterior."""
    if len(passages) <= MOST_PASSAGES:
        return passages
    must = [next((one for one in passages if one["holds"]), passages[0])]
    must.append(max(passages, key=lambda one: one["posterior"] or 0))
    kept = {one["rank"] for one in must}
    for one in passages:
        if len(kept) < MOST_PASSAGES:
            kept.add(one["rank"])
    return [one for one in passages if one["rank"] in kept]


def marked(text: str, right: list[str], gold: Gold | None) -> list[tuple[str, bool]]:
    """A text in parts, each with whether it is a right answer; cut to what is around the first one."""
    if gold is None or gold.mode == "titles":
        places: list[tuple[int, int]] = []
    elif gold.mode == "regex":
        places = sorted(place for pattern in right for place in _pattern_places(text, pattern))
    else:
        text, places = find_answers(text, right)
    start = max(0, places[0][0] - BEFORE_ANSWER) if places and places[0][1] > LONGEST_TEXT else 0
    end = min(len(text), start + LONGEST_TEXT)
    parts, at = [("…", False)] if start else [], start
    for first, last in places:
        if at <= first < last <= end:
            parts += [(text[at:first], False), (text[first:last], True)]
            at = last
    parts += [(text[at:end], False), ("…" if end < len(text) else "", False)]
    return [(unicodedata.normalize("NFC", part), is_answer) for part, is_answer in parts if part]


def _pattern_places(text: str, pattern: str) -> list[tuple[int, int]]:
    try:
        return [match.span() for match in compile_pattern(pattern).finditer(text, timeout=PATTERN_SECONDS)]
    except (TimeoutError, regex.error):
        return []


# --- All of them ------------------------------------------------------------------------------------------------------


def question_table(measured: list[Measured], questions: list[str] | None, gold: Gold | None) -> dict[str, Any]:
    """Short columns of all questions for the page's script, in at most `TABLE_BYTES`.

    {"questions": [...], "right": [...], "runs": [{"name", "answers", "em", "f1", "first"}], "total", "shown"}, where em
    is a text of 0 and 1, f1 a list of percents, first a list of ranks (0: none). Texts are cut as far as it takes; if
    that does not do, the last questions are left out.
    """
    total = len(measured[0].evaluation.lines)
    for most in CUTS:
        table = _table(measured, questions, gold, most, total)
        if (size := _bytes(table)) <= TABLE_BYTES:
            return table
    return _table(measured, questions, gold, most, total * TABLE_BYTES // (size * 11 // 10))


def _table(
    measured: list[Measured], questions: list[str] | None, gold: Gold | None, most: int, rows: int
) -> dict[str, Any]:
    runs = []
    for one in measured:
        lines = one.evaluation.lines[:rows]
        if one.evaluation.is_retrieval:
            lines = [line.split("\t")[0] for line in lines]
        run: dict[str, Any] = {"name": one.name, "answers": [cut(line, most // 2) for line in lines]}
        if "em" in one.values:
            run["em"] = "".join(str(int(value)) for value in one.values["em"][:rows])
        if "f1" in one.values:
            run["f1"] = [round(100 * value) for value in one.values["f1"][:rows].tolist()]
        if one.first is not None:
            run["first"] = one.first[:rows].tolist()
        runs.append(run)
    table: dict[str, Any] = {"runs": runs, "total": len(measured[0].evaluation.lines), "shown": rows}
    if questions is not None:
        table["questions"] = [cut(question, most) for question in questions[:rows]]
    if gold is not None:
        table["right"] = [cut(" | ".join(right), most // 2) for right in gold.right[:rows]]
    return table


def _bytes(table: dict[str, Any]) -> int:
    return len(script_json(table).encode(errors="replace"))
