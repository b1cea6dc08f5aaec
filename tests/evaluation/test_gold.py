"""Gold files as people have them: the right answers, or the line that is none, before anything is loaded."""

import json

import pytest

from rag.errors import UserError
from rag.evaluation.arguments import parse_args
from rag.evaluation.gold import parse_qa_line, read_data
from rag.evaluation.scores import score_answers, score_patterns

QUESTIONS = ["what is the sign", 'who sang "it"', "where", "when"]
ANSWERS = [["😀 face"], ["Don't Cry", "x"], ["AC/DC"], ["the 1990s"]]


@pytest.fixture
def read(tmp_path):
    """The data of a gold file of that content; keyword arguments are flags."""

    def read(content, name="gold.qa", questions=QUESTIONS, **flags):
        (tmp_path / "q").write_text("".join(f"{question}\n" for question in questions))
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        flags = {"gold_data_path": tmp_path / name, "predictions_path": tmp_path / "out" / "p.txt"} | flags
        flags = {"evaluation_set": tmp_path / "q"} | flags
        words = ["--model_name_or_path", "m"]
        words += [
            word for name, value in flags.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])
        ]
        data = read_data(parse_args([str(word) for word in words]))
        assert not (tmp_path / "out").exists()
        return data

    return read


def test_one_file_of_many_writers(read, caplog):
    """Each line by another program; the first three questions as csv writers quote them."""
    lines = [
        r'what is the sign	["\ud83d\ude00 face"]',
        '''"who sang ""it"""	"[""Don't Cry"", 'x']"''',
        r'where	"[""AC\/DC""]"',
        "when	['the 1990s' '']",
    ]
    data = read("\n".join(lines) + "\n")
    assert data.gold == ANSWERS and data.questions == QUESTIONS and not caplog.records
    assert score_answers(["😀 face", "Don't Cry", "AC/DC", "1990s"], data.gold) == {"em": 1.0, "f1": 1.0}


def test_a_list_that_numpy_broke_over_lines_is_one_answer_field(read):
    content = "a\t['x']\nb\t\"['one two three'\n 'four \"\"five\"\"'\n 'six']\"\n\"c\td\"\t['y']\n"
    data = read(content, questions=["a", "b", "c d"])
    assert data.gold == [["x"], ["one two three", 'four "five"', "six"], ["y"]]
    with pytest.raises(UserError, match=r"--gold_data_path .*, line 2: a quote before its answers is not closed"):
        read("a\t['x']\nb\t\"['one'\n'two']\n", questions=["a", "b"])


def test_json_lines_are_read_by_their_name(read, caplog):
    records = [{"question": 'who\tsang "it"', "answer": ["Don't Cry", "x"]}, {"question": "where", "answers": "AC/DC"}]
    content = "".join(json.dumps(record) + "\n" for record in records)
    assert read(content, "nq.jsonl", QUESTIONS[1:3]).gold == ANSWERS[1:3] and not caplog.records
    for line in ("{", "3", "{}", '{"question": "q"}', '{"question": 3, "answer": ["a"]}', "[" * 100_000):
        with pytest.raises(UserError, match=r'line 1: `\{"question": "\.\.\.", "answer": '):
            read(line, "nq.jsonl", ["where"])
    with pytest.raises(UserError, match=r"line 1: .*is expected, not"):
        read('{"question": "q", "answer": [1]}', "nq.jsonl", ["where"])
    with pytest.raises(UserError, match=r"give --gold_data_mode qa"):
        read(content, "nq.jsonl", QUESTIONS[1:3], gold_data_mode="ans")


@pytest.mark.parametrize(
    "line", ["q\t[1, 2]", "q\t'x'", "q\t[]", "q\t['', ' ']", "q\t[null]", "q", "q\t" + "[" * 100_000]
)
def test_a_faulty_line_is_named_in_one_short_line(read, line):
    with pytest.raises(UserError, match=r"--gold_data_path .*, line 2: ") as error:
        read(f"q\t['a']\n{line}\n", questions=["q", "q"])
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_header_is_named(read):
    with pytest.raises(UserError, match=r"has 2 lines, .* is a header: take it out"):
        read("question\tanswers\nwhere\t['a']\n", questions=["where"])
    with pytest.raises(UserError, match=r"line 1: .* is a header: take it out"):
        read('"question"\t"answer"\nwhere\t[\'a\']\n', questions=["question", "where"])


def test_answers_read_as_something_else_are_refused(read, tmp_path):
    content = "where\t['a']\nwhen\t['b']\n"
    with pytest.raises(UserError, match=r"--gold_data_path .* give --gold_data_mode qa"):
        read(content, questions=["where", "when"], gold_data_mode="ans")
    with pytest.raises(UserError, match=r"--gold_data_path .* give answers as --answers_path"):
        read(content, questions=["where", "when"], eval_mode="retrieval")
    # One that only looks like it is a title, or an answer.
    data = read("Album\t['x']\nOther\tone\n", questions=["where", "when"], eval_mode="retrieval")
    assert data.gold == [["Album", "['x']"], ["Other", "one"]]


@pytest.mark.parametrize(
    "content",
    [
        "where\t['a']\nwhen\t[\"b\"]\n",
        'where,"[\'a\']"\nwhen,"[""b"", ""c""]"\n',
        'where,Oslo\nwhen,Monday\n',
        '{"question": "where", "answer": ["a"]}\n{"question": "when", "answer": ["b"]}\n',
        '[\n {\n  "question": "where"\n }\n]\n',
    ],
    ids=["qa", "csv", "header", "jsonl", "json"],
)  # fmt: skip
def test_answers_are_not_asked_as_questions(read, tmp_path, content, request):
    head = "question,answer\n" if request.node.callspec.id == "header" else ""
    (tmp_path / "other").write_text(head + content)
    with pytest.raises(
        UserError, match=r"--evaluation_set .* has more than questions: .* this one as --gold_data_path"
    ):
        read("where\t['a']\nwhen\t['b']\n", evaluation_set=tmp_path / "other")


def test_a_question_may_look_like_more(read):
    questions = ["tab\there", "where, (a) or (b)", "what does x, ['y'] mean", "{a}", "[MASK] is", '["a"]', "a\t[1]"]
    assert read("a\n" * len(questions), questions=questions, gold_data_mode="ans").questions == questions


def test_files_that_are_no_utf8_are_named_by_their_flag(read, tmp_path):
    with pytest.raises(UserError, match=r"--gold_data_path .* is not UTF-8"):
        read("where\t['a']\n".encode("utf-16"), questions=["where"])
    (tmp_path / "utf16").write_bytes("where\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"--evaluation_set .* is not UTF-8"):
        read("where\t['a']\n", evaluation_set=tmp_path / "utf16")


# --- KILT's files -----------------------------------------------------------------------------------------------------

KILT = [
    {"input": "where\nis it", "output": [{"answer": "Oslo", "provenance": [{"title": '"Oslo"'}]}, {"answer": "x"}]},
    {"input": "when", "output": [{"answer": "1048", "provenance": [{"title": "Oslo"}, {"title": "Norway"}]}]},
]  # fmt: skip


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_kilts_lines_are_read_by_their_name_or_by_the_mode(read, tmp_path, caplog):
    for name, flags in (("gold.jsonl", {}), ("gold", {"gold_data_mode": "kilt"})):
        data = read(lines_of(*KILT), name, ["where is it", "when"], **flags)
        assert data.gold == [["Oslo", "x"], ["1048"]] and data.pages == [[["Oslo"]], [["Oslo", "Norway"]]]
    data = read(lines_of(*KILT), "gold.jsonl", ["where is it", "when"], eval_mode="retrieval")
    assert data.gold == [["Oslo"], ["Oslo", "Norway"]] and data.pages == [[["Oslo"]], [["Oslo", "Norway"]]]
    data = read(lines_of(*KILT), "gold.jsonl", evaluation_set=tmp_path / "gold.jsonl")
    assert data.questions == ["where is it", "when"] and not caplog.records
    read(lines_of(*KILT), "gold.jsonl", ["where is it", "who"])
    assert "1 of 2 questions are not those of --evaluation_set" in caplog.text


def test_the_questions_of_nq_opens_records_are_asked(read, tmp_path):
    content = '{"question": "where\\tis it", "answer": ["a"]}\n{"question": "when", "answer": ["b"]}\n'
    assert read(content, "nq.jsonl", evaluation_set=tmp_path / "nq.jsonl").questions == ["where is it", "when"]
    content += '{"answer": ["b"]}\n'
    with pytest.raises(UserError, match=r"--evaluation_set .*nq.jsonl, line 3: a record with a `question`"):
        read(content, "nq.jsonl", evaluation_set=tmp_path / "nq.jsonl")


def test_mistakes_in_kilts_files_are_named_by_their_line(read):
    asked = ["where is it", "when"]
    for broken, reason in [
        ({"input": "when"}, r"KILT's .* is expected"),
        ({"input": "when", "output": []}, "test sets come without"),
        ({"input": "when", "output": [{"answer": " "}]}, "no answer that is not blank"),
        ({"input": "when", "output": [{"answer": "a", "provenance": [{"wikipedia_id": "1"}]}]}, "no `title`"),
        ({"question": "when", "answer": ["a"]}, r"KILT's .* is expected"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"--gold_data_path .*, line 2: .*{reason}") as error:
            read(lines_of(KILT[0], broken), "gold.jsonl", asked)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--gold_data_path .* has 2 lines, but the number of questions is 1"):
        read(lines_of(*KILT), "gold.jsonl", asked[:1], eval_mode="retrieval")
    with pytest.raises(UserError, match=r"line 1: KILT's .* is expected"):
        read("where\t['a']\n", questions=["where"], gold_data_mode="kilt")


# --- Regular expressions ----------------------------------------------------------------------------------------------


def test_patterns_are_matched_from_the_beginning_in_any_case(read):
    content = "when\t['\\\\d{4}|nineteen .*', '(?:the )?90s']\nwhere\t['new (york|jersey)']\n"
    data = read(content, questions=["when", "where"], gold_data_mode="regex")
    assert data.gold == [[r"\d{4}|nineteen .*", "(?:the )?90s"], ["new (york|jersey)"]]
    assert score_patterns(["1990 or so", "New York City"], data.gold) == {"em": 1.0}
    assert score_patterns(["in 1990", "new england"], data.gold) == {"em": 0.0}
    assert score_patterns(["The 90s", "york"], data.gold) == {"em": 0.5}


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{99999999999}", "(a{9999}){9999}", "(?P<x>a)(?P<x>b)", "(" * 5000 + ")" * 5000]
)
def test_a_broken_pattern_is_named_by_its_line(read, pattern):
    with pytest.raises(UserError, match=r"line 2: '.*' is no regular expression: "):
        read(f"q\t['a']\nq\t{[pattern]}\n", questions=["q", "q"], gold_data_mode="regex")


def test_a_pattern_without_end_is_named_by_its_line(monkeypatch):
    monkeypatch.setattr("rag.metrics.PATTERN_SECONDS", 0.05)
    with pytest.raises(
        UserError, match=r"--gold_data_path, line 2: the pattern '.*' has not come to an end after 0.05 s"
    ):
        score_patterns(["a", "a" * 5000 + "!"], [["a"], ["(a|aa)+$"]])


def test_patterns_of_passages_need_a_file_of_answers(read):
    with pytest.raises(UserError, match=r"--gold_data_mode regex is for answers; .* give --answers_path"):
        read("a\n", questions=["q"], eval_mode="retrieval", gold_data_mode="regex")


# --- Outputs, before anything is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".jsonl", ".settings.json", ".scores.json"])
def test_a_file_beside_the_predictions_that_cannot_be_written_is_named(read, tmp_path, end):
    (tmp_path / f"p.txt{end}").mkdir()
    with pytest.raises(UserError, match=rf"--predictions_path .*p\.txt{end} is a folder"):
        read("q\t['a']\n", questions=["q"], predictions_path=tmp_path / "p.txt")


def test_outputs_that_cannot_be_written_have_one_line_each(read, tmp_path):
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "file" / "p.txt",
        "/proc/p.txt",
        "",
        tmp_path / ("x" * 300),
        tmp_path / ("x" * 240),
        "/dev/full",
        ".",
    ):
        with pytest.raises(UserError, match=r"^--predictions_path ") as error:
            read("q\t['a']\n", questions=["q"], predictions_path=path)
        assert "\n" not in str(error.value)


def test_inputs_are_never_outputs(read, tmp_path):
    with pytest.raises(
        UserError, match=r"--predictions_path .*nq.jsonl, beside it, is --gold_data_path, which would be"
    ):
        read('{"question": "q", "answer": ["a"]}\n', "nq.jsonl", ["q"], predictions_path=tmp_path / "nq")


def test_a_line_that_the_public_suite_reads():
    assert parse_qa_line("who\t['Xiu Li Dai', \"Dai's\"]") == ["Xiu Li Dai", "Dai's"]


@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "n_docs": [0, -1, 10**9, 10**12],
        "k": [0, 10**12],
        "num_beams": [0, -1, 100_000],
        "min_length": [-1, 60],
        "max_length": [0, 1, -5, 10**9],
        "eval_batch_size": [0, 10**9],
        "max_source_length": [0, 10**9],
    }.items(),
)
def test_numbers_out_of_range_are_named_by_their_flag(read, flag, values):
    for value in values:
        with pytest.raises(UserError, match=f"^--{flag} {value}"):
            read("q\t['a']\n", questions=["q"], **{flag: value})


@pytest.mark.parametrize("value", ["", "x", "3.5", "1e3", "nan", "inf", "9" * 5000])
def test_what_is_no_number_is_named_by_its_flag(read, value, capsys):
    with pytest.raises(SystemExit, match=r"2"):
        read("q\t['a']\n", questions=["q"], n_docs=value)
    assert "argument --n_docs/--n-docs: invalid int value" in capsys.readouterr().err
