"""The numbers of a report against sums by hand and by brute force."""

import json
from itertools import product
from math import comb

import numpy as np
import pytest

from rag.evaluation.intervals import intervals
from rag.metrics import answer_recall_at_k, find_answers
from rag.reports.measures import collapse_signs, measure, softmax
from rag.reports.questions import detail, extremes, marked, question_table, shown_passages
from rag.reports.reading import Evaluation, Gold, read_evaluation, read_gold, short_names
from rag.reports.statistics import sign_test
from rag.reports.tables import (
    answer_length,
    by_rank,
    calibrate,
    calibrations,
    compare,
    comparisons,
    question_word,
    score_table,
)
from rag.reports.training_run import read_run, thinned
from tests.evaluation.report_files import write_evaluation, write_files, write_gold, write_run


def evaluation(lines, records=(), name="a") -> Evaluation:
    return Evaluation(name, f"{name}.txt", list(lines), list(records))


def gold(*right, mode="qa") -> Gold:
    return Gold("gold", mode, list(map(list, right)), None)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_sign_test_is_the_sum_over_all_coins():
    for wins, losses in [(0, 0), (3, 3), (9, 1), (1, 9), (7, 2), (5, 0)]:
        n, uneven = wins + losses, abs(wins - losses)
        tosses = [abs(2 * sum(toss) - n) >= uneven for toss in product([0, 1], repeat=n)]
        assert sign_test(wins, losses) == pytest.approx(sum(tosses) / len(tosses), abs=1e-12)


def test_sign_test_of_many_questions_neither_overflows_nor_underflows():
    n = 3000
    expected = 2 * sum(comb(n, k) for k in range(1401)) / 2**n
    assert sign_test(1600, 1400) == pytest.approx(expected, rel=1e-12)
    assert sign_test(5000, 0) == 0.0 and sign_test(5000, 5000) == 1.0


def test_the_difference_of_pairs_is_surer_than_each_mean():
    rng = np.random.default_rng(5)
    a = (rng.random(400) < 0.5).astype(float)
    b = np.where(rng.random(400) < 0.05, 1.0, a)
    found = intervals({"a": a, "b": b, "difference": b - a})
    low, high = found["difference"]
    assert 0 < low < (b - a).mean() < high
    assert high - low < 0.6 * (found["a"][1] - found["a"][0])


# --- Questions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    records = [
        {"texts": ["nothing", "in Oslo here", "Oslo"], "scores": [3.0, 2.0, 1.0], "posteriors": [0.2, 0.7, 0.1]},
        {"texts": ["Romeo", "none", "x"], "scores": [1.0, 1.0, 1.0], "posteriors": [0.5, 0.25, 0.25]},
        {"texts": ["Paris", "x", "Paris"], "scores": [9.0, 1.0, 1.0], "posteriors": [0.1, 0.8, 0.1]},
        {"texts": [], "scores": [], "posteriors": []},
    ]
    return measure(
        evaluation(["the oslo", "Rome", "Paris France", ""], records), gold(["Oslo"], ["Rome"], ["Paris"], ["x"])
    )


def test_scores_of_each_question(measured):
    assert measured.values["em"].tolist() == [1, 1, 0, 0]
    assert measured.values["f1"].tolist() == pytest.approx([1, 1, 2 / 3, 0])
    assert measured.first.tolist() == [2, 0, 1, 0]
    assert measured.recall == [1 / 4, 2 / 4, 2 / 4]
    assert measured.precision == pytest.approx([(0 + 0 + 1) / 4, (1 / 2 + 0 + 1 / 2) / 4, (2 / 3 + 0 + 2 / 3) / 4])
    assert measured.values["attribution"].tolist() == [1, 0, 0, 0]
    assert measured.values["attribution_prior"].tolist() == [0, 0, 1, 0]
    assert [(row["kind"], row["questions"], row["means"][0]["em"]) for row in by_rank(measured)] == [
        ("first", 1, 0.0), ("second", 1, 1.0), ("in none", 2, 0.5),
    ]  # fmt: skip


def test_means_are_those_that_eval_rag_writes(tmp_path):
    from rag.evaluation.scores import score_answers

    right = read_gold(str(write_gold(tmp_path / "gold", 50)), "qa")
    path = write_evaluation(tmp_path / "a.txt", tmp_path / "gold", 0.6)
    one = measure(read_evaluation("a", str(path), right), right)
    assert {name: one.values[name].mean() for name in ("em", "f1")} == pytest.approx(
        score_answers(one.evaluation.lines, right.right)
    )
    [names], [row] = [score_table([one])[0]], score_table([one])[1]
    assert names[:3] == ["em", "f1", "recall_at_1"] and row["em"].low < row["em"].value < row["em"].high


def test_patterns_have_no_f1():
    one = measure(
        evaluation(["in 1911", "x"], [{"texts": ["b 1911"]}, {"texts": ["2"]}]),
        gold([r".*19\d\d"], ["y"], mode="regex"),
    )
    assert one.values["em"].tolist() == [1, 0] and "f1" not in one.values and one.first.tolist() == [1, 0]
    assert marked("born 1911.", [r"19\d\d"], gold(mode="regex")) == [("born ", False), ("1911", True), (".", False)]


def test_titles_are_judged_as_the_public_suite_does():
    lines = ["Oslo\tRome\tOslo", "Paris\tBonn\tKiel"]
    one = measure(evaluation(lines), gold(["Oslo", "Kiel"], ["Kiel", "Rome"], mode="titles"))
    assert one.evaluation.is_retrieval and one.precision == pytest.approx([1 / 2, 1 / 4, (1 / 3 + 1 / 3) / 2])
    assert one.values["mrr"].tolist() == pytest.approx([1, 1 / 3]) and "em" not in one.values


def test_a_record_of_retrieval_has_the_rank_alone():
    records = [{"titles": ["a", "b"], "answer_rank": 2}, {"titles": ["a", "b"], "answer_rank": None}]
    one = measure(evaluation(["a\tb", "a\tb"], records), None)
    assert one.recall == [0, 0.5] and one.precision is None


def test_kinds():
    words = {"Whose is it": "who", "In which year": "which", "name it": "other", "whatever": "other", "And how?": "how"}
    assert {question: question_word(question) for question in words} == words
    assert [answer_length(right) for right in (["a b c", "x"], ["a b"], ["a b c d"], ["1 2 3 4 5"])] == [
        "1 word", "2 words", "3 or 4 words", "5 words or more",
    ]  # fmt: skip


def test_run_against_run():
    a = measure(evaluation(["x", "x", "x", "y"]), gold("x", "x", "y", "y"))
    b = measure(evaluation(["x", "y", "y", "x"], name="b"), gold("x", "x", "y", "y"))
    em, f1 = compare(a, b)
    assert (em.wins, em.losses, em.ties, em.p, em.difference) == (1, 2, 1, 1.0, -0.25) and f1.score == "f1"
    assert em.low <= em.difference <= em.high
    assert comparisons([a, b], [["1", "2", "3", "4"], ["1", "2", "3", "other"]]) == []
    assert len(comparisons([a, b, a], [None] * 3)) == 3 * 2, "all pairs"
    assert {row.first for row in comparisons([a, b, b, b, b], [None] * 5)} == {"a"}, "too many for all pairs"


def test_calibration_by_hand():
    found = calibrate("x", np.array([0.05, 0.02, 0.95, 1.0, 0.91]), np.array([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert (
        found.questions == [2, 3] and found.stated == pytest.approx([0.035, 2.86 / 3]) and found.found == [0.5, 2 / 3]
    )
    assert found.error == pytest.approx((2 * 0.465 + 3 * abs(2.86 / 3 - 2 / 3)) / 5)


def test_calibration_of_what_the_records_hold(measured):
    assert [one.what for one in calibrations(measured)] == ["posterior of a passage", "prior of a passage"]
    records = [{"answer_log_prob": -0.1}, {"answer_log_prob": -5.0}]
    [found] = calibrations(measure(evaluation(["a", "b"], records), gold("a", "a")))
    assert (
        found.what == "answer"
        and found.stated == pytest.approx(np.exp([-5.0, -0.1]).tolist())
        and found.found == [0, 1]
    )
    assert calibrations(measure(evaluation(["a"]), gold("a"))) == []


def test_signs_of_collapse():
    same = [{"doc_ids": [1, 2], "scores": [0.0, 0.0]}] * 4
    assert collapse_signs(evaluation("abcd", same)) == pytest.approx(
        {"distinct": 0.25, "most": 1.0, "entropy": np.log(2)}
    )
    assert softmax([1000.0, 1000.0]).tolist() == [0.5, 0.5]
    assert collapse_signs(evaluation("ab")) == {}


def test_best_and_worst(measured):
    assert extremes(measured, 2) == {"worst": [3, 2], "best": [0, 1]}
    assert extremes(measure(evaluation("ab"), None), 2) == {}
    entry = detail(measured, 0, ["where?", "b", "c", "d"], gold(["Oslo"]))
    assert [passage["holds"] for passage in entry["passages"]] == [False, True, True]
    assert entry["passages"][1]["text"] == [("in ", False), ("Oslo", True), (" here", False)]


def test_passages_shown_have_the_answer_and_the_largest_posterior():
    passages = [{"rank": n, "holds": n == 30, "posterior": 0.9 if n == 40 else 0.0} for n in range(1, 51)]
    assert [one["rank"] for one in shown_passages(passages)] == [1, 2, 3, 4, 30, 40]


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Romeo in ROME, Rome's", ["rome"], ["ROME", "Rome"]),
        ("à Orléans.", ["orléans"], ["Orléans"]),
        ("the New  York City-", ["new york city"], ["New  York City"]),
        ("我住在北京市", ["北京"], ["北京"]),
        ("none", ["", "."], []),
    ],
)
def test_what_is_marked_is_what_recall_finds(text, answers, expected):
    parts = marked(text, answers, gold(answers))
    assert [part for part, is_answer in parts if is_answer] == expected
    assert "".join(part for part, _ in parts) == text
    assert bool(find_answers(text, answers)[1]) == answer_recall_at_k([text], answers, 1)


def test_a_long_text_is_cut_around_the_answer():
    parts = marked("word " * 1000 + "Oslo" + " word" * 1000, ["Oslo"], gold(["Oslo"]))
    assert ("Oslo", True) in parts and len("".join(part for part, _ in parts)) < 1000
    assert parts[0] == parts[-1] == ("…", False)


def test_the_table_is_cut_as_far_as_it_takes(monkeypatch):
    lines = ["answer " * 30] * 100
    one = measure(evaluation(lines), gold(*[["right " * 40]] * 100))
    monkeypatch.setattr("rag.reports.questions.TABLE_BYTES", 20_000)
    table = question_table([one], ["question " * 40] * 100, gold(*[["right"]] * 100))
    assert table["shown"] == 100 and len(table["questions"][0]) < 150
    monkeypatch.setattr("rag.reports.questions.TABLE_BYTES", 3_000)
    table = question_table([one], ["question " * 40] * 100, gold(*[["right"]] * 100))
    assert 10 < table["shown"] == len(table["questions"]) == len(table["runs"][0]["em"]) < 60
    assert len(json.dumps(table)) < 3_500


# --- Files ------------------------------------------------------------------------------------------------------------


def test_names_are_as_short_as_they_can_be():
    assert short_names(["a/x.txt"]) == ["x"]
    assert short_names(["before/x.txt", "after/x.txt"]) == ["before/x", "after/x"]
    assert short_names(["out/x.txt", "out/x.tsv"]) == ["x.txt", "x.tsv"]


def test_curves_are_those_of_the_log(tmp_path):
    run = read_run(str(write_run(tmp_path / "run")))
    assert run.charts["Loss"]["loss"][0] == (0, 5.0) and len(run.charts["Loss"]["loss"]) == 6
    assert run.last["val"]["val_em"] == 0.5 and "val_avg_em" not in run.last["val"]
    assert "Contexts cut, share" in run.missing and run.settings == {"model_name_or_path": "some/model"}
    (tmp_path / "run" / "training_log.jsonl").unlink()
    assert read_run(str(tmp_path / "run")).charts["Loss"] == {"val_avg_loss": [(60, 1.5)]}


def test_a_long_curve_is_thinned_by_means():
    curve = thinned([(step, step % 2) for step in range(8000)])
    assert len(curve) == 400 and curve[0] == (9.5, 0.5)


def test_a_log_may_end_in_half_a_row(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "training_log.jsonl", "a") as file:
        file.write('{"step": 70, "lo')
    assert len(read_run(str(run)).charts["Loss"]["loss"]) == 6


def test_files_without_records_do(tmp_path):
    path = write_files(tmp_path / "a.txt", ["x", "y"])
    one = measure(read_evaluation("a", str(path), None), None)
    assert one.values == {} and one.recall is None and score_table([one])[1] == [{}]
