"""What `eval_rag.py` scores beside EM and F1: intervals, answers that contain a right one, KILT's files."""

import json
import re

import pytest

from rag.evaluation.intervals import intervals
from rag.evaluation.predictions import sealed
from rag.files import load_json, read_lines, write_lines
from tests.conftest import QUESTIONS

ASKED, ANSWERS = zip(*QUESTIONS, strict=True)


def test_scores_have_their_intervals_beside_them(run, rag_folder, files, no_model, capsys):
    write_lines(["paris", "london", "rome", "x", "y", "madrid", "lisbon", "z"], files / "predictions.txt")
    scores = run(rag_folder, "ans")
    written = load_json(files / "predictions.txt.scores.json")
    assert written["scores"] == scores == {"em": 5 / 8, "f1": 5 / 8}
    expected = {name: list(own) for name, own in intervals({"em": [1, 1, 1, 0, 0, 1, 1, 0]}).items()}
    assert written["intervals"] == {"em": expected["em"], "f1": expected["em"]}
    low, high = expected["em"]
    assert f" 62.50  [{100 * low:.1f}, {100 * high:.1f}]\n" in capsys.readouterr().out
    write_lines(["paris\tx"] * 8, files / "titles")
    run(rag_folder, "pages", "titles", k=[1, 2])
    ranges = load_json(files / "titles.scores.json")["intervals"]
    assert list(ranges) == ["precision_at_1", "precision_at_2", "mrr"] and ranges["mrr"][0] <= 1 / 8 <= ranges["mrr"][1]


def test_answers_that_contain_a_right_one(run, rag_folder, files, no_model):
    lines = ["It is Paris.", "londoners", "ROME", "x", "y", "it is the Madrid of old", "lisbon", ""]
    write_lines(lines, files / "predictions.txt")
    assert run(rag_folder, "qa", contains=True)["contains"] == 4 / 8
    assert "contains" not in run(rag_folder, "qa")
    write_lines([f"{question}\t['r.me|p.ris']" for question in ASKED], files / "patterns")
    scores = run(rag_folder, "patterns", gold_data_mode="regex", contains=True)
    assert scores == {"em": 1 / 8, "contains": 2 / 8}


# --- KILT's files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kilt(files):
    """Gold of KILT's, `kilt.jsonl`: right is the page of the question's city, and "another" and "rome" together."""
    records = [
        {"id": f"k{number}", "input": question, "output": [
            {"answer": answer.title(), "provenance": [{"wikipedia_id": "1", "title": answer, "start_paragraph_id": 2}]},
            {"answer": f"city of {answer}"},
            {"provenance": [{"wikipedia_id": "2", "title": "another"}, {"wikipedia_id": "3", "title": "rome"}]},
        ]}
        for number, (question, answer) in enumerate(QUESTIONS)
    ]  # fmt: skip
    write_lines([json.dumps(record) for record in records], files / "kilt.jsonl")
    return records


def test_kilt_measures_passages(run, rag_folder, files, kilt, no_model):
    titles = [  # and its R-precision, recall@1 and recall@2
        '"paris"\tx',  # 1, 1/2, 1/2
        "london\trome",  # 1, 1/2, 1/2
        "rome\tanother",  # 1, 1/2, 1: rome is the question's own, too, so that both sets are complete
        "another\trome",  # 1, 1/2, 1/2: of two pages two; they take one place
        "x\tvienna",  # 0, 0, 1/2: x takes a place
        "rome\tx\tanother",  # 1/2, 0, 1/2: of the first two pages one; rome's place is given up for another's
        "x\ty",  # 0, 0, 0
        "oslo\toslo\tanother",  # 1, 1/2, 1/2: two passages of a page are one
    ]
    write_lines(titles, files / "predictions.txt")
    scores = run(rag_folder, "kilt.jsonl", eval_mode="retrieval", gold_data_mode="qa", k=[1, 2])
    assert scores["r_precision"] == (1 + 1 + 1 + 1 + 0 + 1 / 2 + 0 + 1) / 8
    assert scores["page_recall_at_1"] == (1 / 2 + 1 / 2 + 1 / 2 + 1 / 2 + 0 + 0 + 0 + 1 / 2) / 8
    assert scores["page_recall_at_2"] == (1 / 2 + 1 / 2 + 1 + 1 / 2 + 1 / 2 + 1 / 2 + 0 + 1 / 2) / 8
    # All titles that any output names count for precision@k and MRR.
    assert scores["precision_at_1"] == 6 / 8 and scores["mrr"] == (6 + 1 / 2) / 8
    assert run(rag_folder, "kilt.jsonl", eval_mode="retrieval", gold_data_mode="kilt", k=[1, 2]) == scores


def test_kilt_awards_answers_whose_pages_are_right(run, rag_folder, files, kilt, capsys):
    flags = {"gold_data_mode": "qa", "evaluation_set": files / "kilt.jsonl"}
    assert run(rag_folder, "kilt.jsonl", **flags).keys() >= {"em", "f1", "r_precision", "kilt_em", "kilt_f1"}
    # Other answers and passages in the place of the model's.
    answers = ["paris", "City of London", "rome", "berlin berlin", "vienna", "madrid", "x", "oslo"]
    titles = [["paris"], ["x"], ["another", "rome"], ["berlin"], ["rome", "x"], ['"madrid"'], ["lisbon"], []]
    records = [json.loads(line) for line in read_lines(files / "predictions.txt.jsonl")]
    records = [
        {"id": record["id"], "question": record["question"], "answer": answer, "titles": own}
        for record, answer, own in zip(records, answers, titles, strict=True)
    ]
    write_lines(answers, files / "predictions.txt")
    pairs = zip(records, answers, strict=True)
    write_lines([sealed(record, answer) for record, answer in pairs], files / "predictions.txt.jsonl")
    scores = run(rag_folder, "kilt.jsonl", **flags)
    # R-precision by question: 1, 0, 1, 1, 1/2, 1, 1, 0. F1 of "berlin berlin" by "Berlin": 2/3.
    assert scores["em"] == 6 / 8 and scores["f1"] == pytest.approx((6 + 2 / 3) / 8)
    assert scores["r_precision"] == 5.5 / 8
    assert scores["kilt_em"] == 3 / 8 and scores["kilt_f1"] == pytest.approx((3 + 2 / 3) / 8)
    printed = capsys.readouterr().out
    assert re.search(r"\nR-precision: +68\.75  \[", printed) and re.search(r"\nKILT-EM: +37\.50  \[", printed)


def test_kilt_without_passages_has_no_pages_to_measure(run, bart_folder, kilt):
    assert run(bart_folder, "kilt.jsonl", gold_data_mode="qa").keys() == {"em", "f1"}


def test_recall_of_kilts_answers_in_passages(run, rag_folder, files, kilt):
    flags = {"eval_mode": "retrieval", "k": [1, 8], "n_docs": 8}
    expected = run(rag_folder, "pages", "other", answers_path=files / "qa", **flags)
    scores = run(rag_folder, "kilt.jsonl", answers_path=files / "kilt.jsonl", **flags)
    assert scores["recall_at_8"] == expected["recall_at_8"] == 1 and scores["recall_at_1"] == expected["recall_at_1"]
