"""The page: what was read and measured, in one HTML file that fetches nothing.

html = render(run, evaluations, gold)
"""

from pathlib import Path
from typing import Any

from rag.evaluation.scores import label
from rag.pages.templates import environment, script_json
from rag.reports.figures import MOST_SERIES, line_chart
from rag.reports.measures import Measured, collapse_signs, measure
from rag.reports.questions import MOST_PASSAGES, detail, details_each, extremes, question_table
from rag.reports.reading import Evaluation, Gold, questions_of
from rag.reports.tables import (
    Calibration,
    by_answer_length,
    by_question_word,
    by_rank,
    calibrations,
    comparisons,
    other_scores,
    same_questions,
    score_table,
)
from rag.reports.training_run import TrainingRun

TEMPLATE = "page.html"
MOST_DETAILED = 10  # evaluations with a chart of calibration and single questions
PERCENT_CHARTS = ("Answers of the validation", "Distinct passages, share", "Contexts cut, share")
SHOWN_SETTINGS = ("model_name_or_path", "model_type", "eval_mode", "n_docs", "num_beams", "decoding", "max_length",
                  "precision", "index_name", "passages_path", "index_path", "evaluation_set", "dataset_name",
                  "prefix")  # fmt: skip
NAMES = {"attribution": "Attribution", "attribution_prior": "Attribution, prior", "mrr": "MRR"}


def render(run: TrainingRun | None, evaluations: list[Evaluation], gold: Gold | None) -> str:
    """The whole page."""
    templates = environment(Path(__file__).parent)
    templates.filters |= {"percent": percent, "score_name": score_name, "p_value": p_value, "number": number}
    measured = [measure(evaluation, gold) for evaluation in evaluations]
    content: dict[str, Any] = {"run": training_part(run), "gold": gold, "limits": {"passages": MOST_PASSAGES}}
    content |= evaluation_part(measured, gold) if measured else {"measured": [], "notes": [], "table": None}
    return templates.get_template(TEMPLATE).render(content)


def training_part(run: TrainingRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    charts = {
        title: line_chart(curves, x="step", percent=title in PERCENT_CHARTS) for title, curves in run.charts.items()
    }
    return {"path": run.path, "charts": charts, "missing": run.missing, "last": run.last, "settings": run.settings}


def evaluation_part(measured: list[Measured], gold: Gold | None) -> dict[str, Any]:
    questions = [questions_of(one.evaluation, gold) for one in measured]
    names, scores = score_table(measured)
    pairs = comparisons(measured, questions)
    alike = [
        one for one, own in zip(measured, questions, strict=True) if same_questions(measured[0], one, questions[0], own)
    ]
    answering = [one for one in alike if "em" in one.values]
    groups = {}
    if answering and questions[0] is not None:
        groups["Question word"] = by_question_word(questions[0], answering)
    if answering and gold is not None and gold.mode != "regex":
        groups["Words of the shortest right answer"] = by_answer_length(gold.right, answering)
    table = question_table(alike, questions[0], gold)
    found = [(one, calibrations(one)) for one in measured[:MOST_DETAILED]]
    return {
        "measured": measured,
        "score_names": names,
        "scores": scores,
        "pairs": pairs,
        "several": len(measured) > 1,
        "answering": answering,
        "groups": groups,
        "retrieval": retrieval_part(measured),
        "calibration": [calibration_part(one, curves) for one, curves in found if curves],
        "extremes": extremes_part(measured, questions, gold),
        "table": script_json(table),
        "table_names": [one.name for one in alike],
        "table_left_out": left_out(table["shown"], table["total"]),
        "settings": {one.name: shown_settings(one.evaluation) for one in measured},
        "notes": notes(measured, alike, gold, [one for one, curves in found if not curves]),
    }


def retrieval_part(measured: list[Measured]) -> dict[str, Any]:
    recall = {one.name: curve for one in measured if (curve := one.recall)}
    precision = {one.name: curve for one in measured if (curve := one.precision)}
    ranked = [(one, by_rank(one)) for one in measured if one.first is not None and "em" in one.values]
    signs = {one.name: found for one in measured if (found := collapse_signs(one.evaluation))}
    return {
        "charts": {
            title: line_chart({name: _by_k(curve) for name, curve in curves.items()}, x="k", percent=True, marks=True)
            for title, curves in (("Recall@k", recall), ("Precision@k", precision))
            if curves
        },
        "ranked": ranked,
        "signs": signs,
    }


def _by_k(curve: list[float]) -> list[tuple[float, float]]:
    return list(enumerate(curve, start=1))


def calibration_part(one: Measured, curves: list[Calibration]) -> dict[str, Any]:
    series = {curve.what: list(zip(curve.stated, curve.found, strict=True)) for curve in curves}
    chart = line_chart(series, x="the model's probability, %", percent=True, diagonal=True, marks=True)
    return {"name": one.name, "chart": chart, "errors": {curve.what: curve.error for curve in curves}}


def extremes_part(
    measured: list[Measured], questions: list[list[str] | None], gold: Gold | None
) -> list[dict[str, Any]]:
    how_many = details_each(len(measured))
    parts = []
    for one, own in zip(measured[:MOST_DETAILED], questions, strict=False):
        if chosen := extremes(one, how_many):
            entries = {kind: [detail(one, at, own, gold) for at in places] for kind, places in chosen.items()}
            parts.append({"name": one.name, **entries})
    return parts


def left_out(shown: int, total: int) -> str:
    """What is said under the table of all questions where it does not hold all of them."""
    return (
        f"The first {shown:,} of {total:,} questions; the others would make this file too large."
        if shown < total
        else ""
    )


def shown_settings(evaluation: Evaluation) -> dict[str, Any]:
    settings = {name: evaluation.settings.get(name) for name in SHOWN_SETTINGS}
    shown = {name: value.get("path") if isinstance(value, dict) else value for name, value in settings.items()}
    index = {f"index: {name}": value for name, value in evaluation.index.items()}
    return {name: value for name, value in (shown | index).items() if value not in (None, "")}


def notes(
    measured: list[Measured], alike: list[Measured], gold: Gold | None, uncalibrated: list[Measured]
) -> list[str]:
    """What the page does not show, and why."""
    lines = [f"{one.name}: {what}" for one in measured for what in one.missing]
    lines += [line for one in measured for line in other_scores(one)]
    if others := [one.name for one in measured if one not in alike]:
        lines.append(
            f"{', '.join(others)}: other questions than {measured[0].name}'s, so not compared with it, in no table by "
            "kind of question, and not in the list of all questions"
        )
    if uncalibrated and gold is not None:
        names = ", ".join(one.name for one in uncalibrated)
        lines.append(
            f"{names}: no calibration; neither probabilities of answers nor passages with texts are in the files"
        )
    if len(measured) > MOST_SERIES:
        lines.append(f"charts of several evaluations show the first {MOST_SERIES}")
    if len(measured) > MOST_DETAILED:
        lines.append(f"calibration, best and worst questions are those of the first {MOST_DETAILED} evaluations")
    return lines


# --- Filters of the template ------------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def score_name(name: str) -> str:
    return NAMES.get(name) or label(name)


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
