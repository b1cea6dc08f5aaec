"""Documents are read as they stand and cut without changing a character."""

import random
import re

import pytest

from rag.knowledge.passages import read_passages, split_documents, split_text, survey_documents


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes):
        path = tmp_path / "documents.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def test_nothing_is_quoted_escaped_or_missing(write):
    """The public suite's CSV reader took an unbalanced quote for the rest of the file, and NA for nothing."""
    rows = [
        ('"Heroes"', 'He said "no'),
        ("NA", "null"),
        ("", "text without a title"),
        ("two\u2028lines", "one\x0bline\x85still the same\u2028line"),
        ("back\\slash", "a\\tb and a, comma"),
        ("tab", "one\ttwo"),
    ]
    path = write("".join(f"{title}\t{text}\n" for title, text in rows))
    assert list(read_passages(path)) == rows
    survey = survey_documents(path)
    assert (survey.problems, survey.documents, survey.passages) == ([], 6, 6)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("start", ["", "\ufeff", "title\ttext{}", "\ufeffTitle \t TEXT{}"])
def test_line_ends_headers_and_byte_order_marks(write, newline, end, start):
    path = write(start.format(newline) + f"a\tb{newline}c\td" + end * newline)
    assert list(read_passages(path)) == [("a", "b"), ("c", "d")]
    assert survey_documents(path).documents == 2


def test_only_the_first_line_can_be_a_header(write):
    assert list(read_passages(write("a\tb\ntitle\ttext\n"))) == [("a", "b"), ("title", "text")]


def test_faults_are_told_with_their_lines_all_at_once(write):
    path = write(b"title\ttext\na\tb\nno tab here\n\n \t \nc\t  \nd\t\xff\ne\tf\n")
    assert [problem.removeprefix(f"--csv_path {path} ") for problem in survey_documents(path).problems] == [
        "line 3: has no tab; write title, tab, text",
        "line 4: is empty; remove it",
        "line 5: is empty; remove it",
        "line 6: has no text behind the tab; write title, tab, text",
        "line 7: is not UTF-8; convert the file (iconv -t utf-8)",
    ]
    many = survey_documents(write("x\n" * 25)).problems
    assert len(many) == 11 and many[-1].endswith("15 more lines like these")
    for empty in ("", "title\ttext\n"):
        assert "holds no document" in survey_documents(write(empty)).problems[0]


def test_the_digest_is_of_what_is_read(write):
    digests = {survey_documents(write(text)).digest for text in ("a\tb\n", "a\tb", "title\ttext\r\na\tb\r\n")}
    assert len(digests) == 1
    assert survey_documents(write("a\tb c\n")).digest not in digests


def test_passages_of_a_hundred_words_keep_every_character_but_the_space_between_them():
    random.seed(0)
    for count in (1, 99, 100, 101, 200, 1234):
        words = [random.choice(["word", '"quote"', "naïve", "a-b", "東京", "3.14"]) for _ in range(count)]
        text = " ".join(word + random.choice(["", "", " ", "\t", "\u00a0"]) for word in words)
        passages = split_text(f"  {text} ")
        assert [len(passage.split()) for passage in passages] == [100] * (count // 100) + [count % 100] * (
            count % 100 > 0
        )
        assert all(passage in text for passage in passages)
        assert re.sub(r"\s", "", "".join(passages)) == re.sub(r"\s", "", text)
    assert split_text(" \t ") == []


def test_a_text_is_split_at_any_character_and_number_of_words():
    assert split_text("a b\tc  d", n=2) == ["a b", "c  d"]
    assert split_text("a b, c d,, e,", n=2, character=",") == ["a b, c d", "e"]
    assert split_text("one. two. three", 1, ".") == ["one", "two", "three"]


def test_documents_are_split_with_their_titles():
    documents = {"title": ["long", None, "none"], "text": ["word " * 101, "short", None]}
    split = split_documents(documents)
    assert split["title"] == ["long", "long", ""]
    assert [len(text.split()) for text in split["text"]] == [100, 1, 1]


def test_the_title_goes_with_every_passage(write):
    path = write("long\t" + " ".join(map(str, range(250))) + "\nshort\tword\n")
    passages = list(read_passages(path))
    assert [title for title, _ in passages] == ["long"] * 3 + ["short"]
    assert passages[2][1].split() == [str(i) for i in range(200, 250)]
    assert survey_documents(path).passages == 4


def test_real_passages_come_through_whole(shared_data, tmp_path):
    lines = (shared_data / "nq_gold" / "passages.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    columns = [line.split("\t")[1:] for line in lines]
    path = tmp_path / "documents.csv"
    path.write_text("".join(f"{title}\t{text}\n" for title, text in columns), encoding="utf-8")
    survey = survey_documents(path)
    assert (survey.problems, survey.documents) == ([], 2588)
    together = {}
    for title, text in read_passages(path):
        together[title] = together.get(title, "") + text
    assert all(re.sub(r"\s", "", text) in re.sub(r"\s", "", together[title]) for title, text in columns)
