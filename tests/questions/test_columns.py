"""From columns to questions and answers: every kind of cell, the columns that are looked for, what is refused."""

import json

import pytest

from rag.errors import UserError
from rag.questions.arguments import DatasetArguments
from rag.questions.columns import answers_in, read_examples
from rag.questions.tables import Table


def examples_of(records, is_text=False, flags=None, **how):
    names = list(dict.fromkeys(name for record in records for name in record))
    table = Table("t", names, lambda name: [record.get(name) for record in records], is_text=is_text)
    return read_examples(DatasetArguments(dataset_name="d", **(flags or {})), [table], **how)


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("Oslo", ["Oslo"]),
        (["Oslo", "Kristiania"], ["Oslo", "Kristiania"]),
        ({"text": ["Oslo", "oslo"], "answer_start": [3, 9]}, ["Oslo", "oslo"]),  # SQuAD
        ([{"text": "Oslo", "answer_start": 3}], ["Oslo"]),  # SQuAD's own JSON
        ({"value": "Oslo", "aliases": ["Kristiania"], "normalized_value": "oslo"}, ["Oslo", "Kristiania"]),  # TriviaQA
        ([{"answer": "Oslo"}, {"answer": None, "provenance": []}, {"provenance": [{"title": "x"}]}], ["Oslo"]),  # KILT
        (None, []),
        ([], []),
        ([None, "Oslo"], ["Oslo"]),
    ],
)
def test_every_kind_of_cell(cell, answers):
    assert answers_in(cell) == answers


@pytest.mark.parametrize("cell", [7, 1.5, True, [3], {"answer_start": [3]}, {}, b"Oslo", {"text": [2]}, "a\ud800"])
def test_what_is_no_answer_is_refused_with_its_place(cell):
    with pytest.raises(UserError, match=r"^--dataset_name d: t, row 2: .* (is no text|no text$)") as error:
        examples_of([{"question": "q", "answer": "a"}, {"question": "q", "answer": cell}])
    assert "\n" not in str(error.value)


def test_texts_are_one_line_each_answer_once_and_without_blanks():
    record = {"question": " where\tis\nit ", "answers": ["New\nYork", "New  York", " ", "", "NYC\u2028", "<unk>"]}
    examples = examples_of([record, {"question": "q", "answers": None}])
    assert examples.questions == ["where is it", "q"] and examples.answers == [["New York", "NYC"], []]
    assert examples.unanswered == [1] and examples.places == ["t, row 1", "t, row 2"]


def test_patterns_keep_their_whitespace():
    assert examples_of([{"question": "q", "answer": r" a  b\s"}], as_they_are=True).answers == [[r"a  b\s"]]


@pytest.mark.parametrize(
    ("record", "flags", "answers"),
    [
        ({"question": "q", "query": "other", "answers": "a", "answer": "b"}, {}, ["a"]),
        ({"input": "q", "output": [{"answer": "a"}], "id": "1"}, {}, ["a"]),
        ({"query": "q", "target": "a"}, {}, ["a"]),
        ({"question": "q", "golden_answers": ["a"]}, {}, ["a"]),
        ({"question": "q", "answers": "a", "short": "b"}, {"answers_column": "short"}, ["b"]),
        ({"title": "q", "question": "other", "answer": "a"}, {"question_column": "title"}, ["a"]),
    ],
)
def test_the_columns_that_are_looked_for(record, flags, answers):
    examples = examples_of([record], flags=flags)
    assert (examples.questions, examples.answers) == (["q"], [answers])


@pytest.mark.parametrize(
    ("record", "flags", "message"),
    [
        (
            {"q": "q", "answer": "a"},
            {},
            "d: t has no column question, input, query, but these: q, answer; give --quest",
        ),
        (
            {"question": "q", "a": "a"},
            {},
            "has no column answers, answer, target, output, golden_answers, but these: q",
        ),
        (
            {"question": "q", "a": "a"},
            {"answers_column": "b"},
            "--answers_column b: .* no such column, but these: ",
        ),
        (
            {"question": "q", "answer": "a"},
            {"question_column": "Question"},
            "--question_column Question: .* question, ",
        ),
        ({"question": " ", "answer": "a"}, {}, "t, row 1: its question is blank"),
        ({"question": 3, "answer": "a"}, {}, "t, row 1: its question, 3, is no text"),
        ({"question": None, "answer": "a"}, {}, "t, row 1: its question, None, is no text"),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(record, flags, message):
    with pytest.raises(UserError, match=message):
        examples_of([record], flags=flags)


def test_a_table_may_lack_answers_where_they_are_not_needed():
    assert examples_of([{"question": "q"}], may_lack_answers=True).answers == [[]]
    with pytest.raises(UserError, match="--answers_column a"):
        examples_of([{"question": "q"}], flags={"answers_column": "a"}, may_lack_answers=True)


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("Oslo", ["Oslo"]),
        ("['Oslo', \"Don't\"]", ["Oslo", "Don't"]),
        (json.dumps(["Oslo", "é"]), ["Oslo", "é"]),
        ("['Oslo' 'Rome']", ["Oslo", "Rome"]),
        ("[sic] Oslo", ["[sic] Oslo"]),
        ("[]", []),
    ],
)
def test_lists_that_are_written_in_text(cell, answers):
    assert examples_of([{"question": "q", "answer": cell}], is_text=True).answers == [answers]


def test_a_list_that_is_cut_off_is_no_answer_and_in_json_a_text_is_a_text():
    record = {"question": "q", "answer": "['Oslo', 'Ro"}
    with pytest.raises(UserError, match=r"row 1: its answers, .* are no whole list"):
        examples_of([record], is_text=True)
    assert examples_of([record]).answers == [["['Oslo', 'Ro"]]
