"""KILT's measures, worked out by hand from the definition in its own scripts (eval_retrieval.py)."""

import json

import pytest

from rag.evaluation.kilt import answers_of, page_recall_at_k, pages_of, question_of, r_precision, read_record

# One page is enough (A), or one (B), or two are needed together (C and D).
PAGES = [["A"], ["B"], ["C", "D"]]


def record(*outputs, question="who"):
    return {"id": "1", "input": question, "output": list(outputs)}


@pytest.mark.parametrize(
    ("titles", "expected"),
    [
        (["A", "x"], 1.0),  # R = 1 of [A]: the first page
        (["x", "A"], 0.0),  # the first page is wrong for [A] and [B]; of [C, D] none is there
        (["C", "x", "D"], 0.5),  # [C, D]: R = 2, of C and x one is right
        (["C", "C", "D"], 1.0),  # two passages of C are one page
        (["D", "C"], 1.0),  # in any order
        (["x", "D"], 0.5),
        ([], 0.0),
    ],
)
def test_r_precision_by_hand(titles, expected):
    assert r_precision(titles, PAGES) == expected


@pytest.mark.parametrize(
    ("titles", "k", "expected"),
    [
        (["A", "x", "B"], 1, 1 / 3),  # places: A's set, x, B's set
        (["A", "x", "B"], 2, 1 / 3),
        (["A", "x", "B"], 3, 2 / 3),
        (["A", "A", "A", "B"], 2, 2 / 3),  # passages of one page take one place
        (["C", "x", "D"], 2, 1 / 3),  # C's place is given up when D completes the set: x, then C and D
        (["C", "x", "D"], 1, 0.0),
        (["C", "D", "A"], 1, 1 / 3),  # C and D take one place together
        (["C", "D", "A"], 2, 2 / 3),
        (["C", "x", "y"], 3, 0.0),  # C alone takes a place and does not count
        (["C", "x", "A"], 2, 0.0),
        (["C", "x", "A"], 3, 1 / 3),
        ([], 5, 0.0),
    ],
)
def test_page_recall_by_hand(titles, k, expected):
    assert page_recall_at_k(titles, PAGES, k) == pytest.approx(expected)


def test_a_page_of_two_sets_takes_a_place_for_each():
    """Sets {A, B} and {A, C}; found: A, B, C. Ranking: {A, B} at B, {A, C} at C; A's own two places are given up."""
    pages = [["A", "B"], ["A", "C"]]
    assert [page_recall_at_k(["A", "B", "C"], pages, k) for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    # {A, C} stays incomplete and keeps its place at A, before {A, B}, which is complete at B.
    assert [page_recall_at_k(["A", "B"], pages, k) for k in (1, 2)] == [0.0, 0.5]


def test_equal_evidence_sets_are_one_and_empty_ones_are_never_found():
    assert page_recall_at_k(["A", "B"], [["A", "B"], ["B", "A"]], 5) == 1.0
    assert page_recall_at_k(["A"], [["A"], []], 5) == 0.5
    assert r_precision(["A"], [["A"], []]) == 1.0
    assert page_recall_at_k(["A"], [], 5) == r_precision(["A"], []) == 0.0
    assert page_recall_at_k(["A"], [[]], 5) == r_precision(["A"], [[]]) == 0.0


def test_a_record_has_answers_and_pages():
    page = {"wikipedia_id": "12", "title": " Oslo ", "start_paragraph_id": 3}
    read = read_record(
        json.dumps(
            record(
                {"answer": " Oslo", "provenance": [page, page | {"start_paragraph_id": 4}, {"title": "Norway"}]},
                {"answer": "Kristiania", "meta": {"score": 1}},
                {"answer": "Oslo", "provenance": []},
                {"answer": ""},
                {"provenance": [{"title": "Akershus"}]},
                question="which city\n is it?",
            )
        )
    )
    assert question_of(read) == "which city is it?"
    assert answers_of(read) == ["Oslo", "Kristiania"]
    assert pages_of(read) == [["Oslo", "Norway"], [], ["Akershus"]]


@pytest.mark.parametrize(
    "line",
    [
        "", "3", "[]", "{}", "[" * 100_000, '{"input": 3, "output": [{}]}', '{"input": "q"}',
        '{"input": "q", "output": []}', '{"input": "q", "output": ["a"]}',
    ],
)  # fmt: skip
def test_what_is_no_record_is_told(line):
    with pytest.raises(ValueError, match=r"is expected"):
        read_record(line)


def test_answers_and_pages_of_other_types_are_told():
    with pytest.raises(ValueError, match=r"`answer` 3 is no text"):
        answers_of(record({"answer": 3}))
    for provenance in ("Oslo", ["Oslo"], {"title": "Oslo"}):
        with pytest.raises(ValueError, match=r"`provenance` is a list of pages"):
            pages_of(record({"provenance": provenance}))
    for page in ({}, {"title": None}, {"title": " "}, {"wikipedia_id": "3"}):
        with pytest.raises(ValueError, match=r"no `title` to compare it by"):
            pages_of(record({"provenance": [page]}))
