"""Tables as csv writers, spreadsheets and other people's data sets lay them out; and what is no table of documents."""

import csv
import gzip
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag.knowledge.documents import read_documents
from rag.knowledge.passages import open_source, read_passages, split_text, survey_documents
from rag.knowledge.records import Document, Notice, Problem, ReadingOptions
from tests.knowledge.test_documents import rows_of

ROWS = [
    ('"Heroes"', 'He said "no", and left.'),
    ("two lines", "one\nand two"),
    ("tabs", "one\ttwo"),
    ("plain", "nothing of it"),
]
QUOTED, RAW = "are quoted as csv writers do", "are part of the text"


def written(rows, header=(), **dialect):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n", **({"delimiter": "\t"} | dialect)).writerows(
        [*([header] if header else []), *rows]
    )
    return file.getvalue()


def notices(path, options=None):
    return [item.says for item in read_documents(path, options) if isinstance(item, Notice)]


def problems(path, **options):
    return [
        item.removeprefix(f"--csv_path {path}").strip()
        for item in survey_documents(path, ReadingOptions(**options)).problems
    ]


@pytest.mark.parametrize("header", [(), ("title", "text")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2]])
def test_what_csv_writers_quote_is_unquoted(tmp_path, header, quoting, rows):
    path = tmp_path / "d.csv"
    path.write_text(written(rows, header, quoting=quoting))
    assert rows_of(path) == rows
    assert QUOTED in notices(path)[0]
    path.write_bytes(written(rows, header, quoting=quoting).replace("\n", "\r\n").encode())
    assert rows_of(path) == rows


def test_one_column_may_be_quoted_throughout(tmp_path):
    """As in DPR's own file, of which somebody has cut off the ids."""
    path = tmp_path / "d.tsv"
    path.write_text('Oslo\t"Oslo is a city."\nRome\t"Some say ""the eternal city""."\n')
    assert rows_of(path) == [("Oslo", "Oslo is a city."), ("Rome", 'Some say "the eternal city".')]


@pytest.mark.parametrize(
    "text",
    [
        '"Heroes"\tHe said "no".\nplain\ttext\n',
        'Hamlet\t"To be or not to be"\nplain\ttext\n',
        'a\t"never closed\nb\tc\n',
        'a\t"closed" too early ""\nb\tc\n',
        'a\t"one ""of these"" is quoted"\nb\tthe "other" is not\n',
    ],
)
def test_other_quotation_marks_are_text(tmp_path, text):
    path = tmp_path / "d.tsv"
    path.write_text(text)
    assert rows_of(path) == [tuple(line.split("\t")) for line in text.splitlines()]
    assert all(RAW in notice for notice in notices(path))


def test_quoting_as_it_is_asked_for(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text('"a"\t"b ""c"""\n')
    assert rows_of(path, ReadingOptions(quoting="none")) == [('"a"', '"b ""c"""')]
    assert rows_of(path, ReadingOptions(quoting="csv")) == [("a", 'b "c"')]
    path.write_text('a\t"b" c\nd\te\n')
    (problem,) = problems(path, quoting="csv")
    assert problem.startswith("line 1: has a quotation mark that is not doubled, behind 'b'")
    path.write_text('t\tx\na\t"open\nd\te\n')
    (problem,) = problems(path, quoting="csv")
    assert problem.startswith("line 2: opens a quotation mark that is never closed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id\ttitle\ttext\n1\tOslo\tin Norway\n", ("Oslo", "in Norway")),
        ("text\ttitle\nin Norway\tOslo\n", ("Oslo", "in Norway")),
        ("Title\tText\tlang\nOslo\tin Norway\ten\n", ("Oslo", "in Norway")),
        ("docid\turl\ttitle\tbody\nD1\thttp://a\tOslo\tin Norway\n", ("Oslo", "in Norway")),
        ("title\tdocument\nOslo\tin Norway\n", ("Oslo", "in Norway")),
        ("D1\thttps://a.b\tOslo\tin Norway\n", ("Oslo", "in Norway")),
        ("pid\tpassage\n7\tin Norway\n", ("", "in Norway")),
        ("0\tin Norway\n", ("", "in Norway")),
        ("title\ttext\n1984\ta novel\n", ("1984", "a novel")),
        ("title,text\nOslo,\"in Norway, the \"\"north\"\"\"\n", ("Oslo", 'in Norway, the "north"')),
        ('"title","text"\n"Oslo","in Norway\nand so on"\n', ("Oslo", "in Norway\nand so on")),
        ('"title"\t"text"\n"Oslo"\tin Norway\n', ("Oslo", "in Norway")),
        ("id,contents\n3,in Norway\n", ("", "in Norway")),
        ('title;text\nOslo;"in Norway; the ""north"""\n', ("Oslo", 'in Norway; the "north"')),
        ("id|title|text\n1|Oslo|in Norway\n", ("Oslo", "in Norway")),
        (',text\n0,"in Norway, north"\n', ("", "in Norway, north")),
        ("\ttext\n0\tin Norway\n", ("", "in Norway")),
        ('text\n"in Norway, north"\n', ("", "in Norway, north")),
        ("title\ttext\t\nOslo\tin Norway\t\t\n", ("Oslo", "in Norway")),
    ],
)  # fmt: skip
def test_headers_and_layouts(tmp_path, text, expected):
    path = tmp_path / "d.csv"
    path.write_text(text)
    assert rows_of(path) == [expected]


def test_columns_that_nobody_names_are_a_fault_that_shows_the_line(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("1\tOslo is in Norway.\tOslo\n2\tRome is in Italy.\tRome\n")
    (problem,) = problems(path)
    assert problem.startswith(r"line 1: has 3 columns, and no header says which are title and text ('1\tOslo is in")
    path.write_text("id\ttext\ttitle\n1\tx\n2\ta\tb\tc\n")
    assert [problem.split(" (")[0] for problem in problems(path)] == [
        "line 2: has 2 columns instead of 3", "line 3: has 4 columns instead of 3"
    ]  # fmt: skip


def test_fields_of_any_length_up_to_the_limit(tmp_path):
    path, long = tmp_path / "d.tsv", "w " * 100_000
    path.write_text(written([(1, f'{long}"quoted"', "t")], ("id", "text", "title")))
    assert rows_of(path) == [("t", f'{long}"quoted"')]
    path.write_text("t\t" + "x" * 10**6 + "\n")
    assert problems(path, max_line_mb=1)[0].startswith("line 1: is longer than --max_line_mb 1 (million characters)")
    path.write_text('t\t"' + "line\n" * 250_000 + '"\n')
    assert problems(path, max_line_mb=1, quoting="csv")[0].startswith("line 1: is longer than --max_line_mb 1")
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 10**6 + '"}\n')
    assert problems(path, max_line_mb=1)[0].startswith("line 2: is longer than --max_line_mb 1")


def test_bombs_end_soon(tmp_path):
    lines = tmp_path / "lines.tsv.gz"
    with gzip.open(lines, "wb", compresslevel=1) as file:
        file.write(b"\n" * 5_000_000)
    survey = survey_documents(lines)
    assert survey.problems[-1] == f"--csv_path {lines}: 990 more lines like these; nothing behind them was read"
    one = tmp_path / "one.tsv.gz"
    with gzip.open(one, "wb", compresslevel=1) as file:
        file.write(b"t\t" + b"x" * 3_000_000)
    assert "line 1: is longer than" in problems(one, max_line_mb=1)[0]
    parquet = tmp_path / "d.parquet"  # a text of a megabyte, as often as you like
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["x" * 10**6]))
    pq.write_table(pa.table({"text": shared}), parquet)
    assert parquet.stat().st_size < 10**5
    assert problems(parquet, max_line_mb=2)[0].startswith("row group 1: holds more than 16 times --max_line_mb 2")
    assert len(rows_of(parquet)) == 100
    assert "row 1: has a text longer than --max_line_mb 1" in survey_documents(
        write_parquet(tmp_path / "long.parquet", ["x" * (10**6 + 1)]), ReadingOptions(max_line_mb=1)
    ).problems[0]  # fmt: skip


def write_parquet(path, texts):
    pq.write_table(pa.table({"text": texts}), path)
    return path


def test_rows_without_text_are_passed_over_and_counted(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("t\tgood\n\nt\t \n")
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"title": "t"}\n\n{"text": ""}\n')
    write_parquet(tmp_path / "c.parquet", ["good", None, ""])
    assert len(survey_documents(tmp_path).problems) == 7
    source = open_source(str(tmp_path), options=ReadingOptions(skip_empty=True))
    assert [text for _, text in source.passages()] == ["good"] * 3
    assert "7 rows without text are passed over" in capsys.readouterr().out


def test_well_known_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    objects = [
        {"_id": "1", "title": "Oslo", "text": "in Norway", "metadata": {}},
        {"id": "1", "contents": '"Oslo"\nin Norway'},
        {"id": "1", "contents": "in Norway"},
        {"wikipedia_title": "Oslo", "text": ["Oslo\n", "in Norway\n", "with a castle\n"]},
        {"pid": 1, "passage": "in Norway"},
        {"title": "Oslo", "body": "in Norway"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))
    assert rows_of(path) == [
        ("Oslo", "in Norway"), ("Oslo", "in Norway"), ("", "in Norway"), ("Oslo", "in Norway\nwith a castle"),
        ("", "in Norway"), ("Oslo", "in Norway"),
    ]  # fmt: skip
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    assert problems(path) == ["line 1: begins a JSON array; write one object a line (jq -c '.[]' does)"]


def test_of_a_beir_folder_the_corpus_is_read(tmp_path):
    folder = tmp_path / "scifact"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "1", "title": "t", "text": "x"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "asked"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    assert rows_of(tmp_path) == [("t", "x")]
    assert notices(tmp_path) == ["is a BEIR data set: its corpus is read, its queries and qrels are not"]


def test_folders_that_hold_what_was_built_of_them(tmp_path):
    (tmp_path / "d.tsv").write_text("t\tx\n")
    for output in (tmp_path, tmp_path / "out"):
        (output / "my_knowledge_dataset").mkdir(parents=True)
        (output / "index.json").write_text("{}")
        (output / "my_knowledge_dataset_index.faiss").write_bytes(b"\xff")
        assert rows_of(tmp_path, ReadingOptions(output=output)) == [("t", "x")]
    assert survey_documents(tmp_path).problems == []


def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "a.tsv").write_text("t\tx\n")
    (tmp_path / "self").symlink_to(tmp_path)
    assert list(read_documents(tmp_path)) == [Document("t", "x")]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("/nowhere/x")
    found = [item for item in read_documents(tmp_path) if isinstance(item, Problem)]
    assert [item.reason.split(";")[0] for item in found] == [
        "does not exist",
        "is a device or a pipe, which is not read",
    ]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("北京是中华人民共和国的首都。" * 50, [215, 215, 216, 54]),
        ("東京は日本の首都です。" * 30, None),
        ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย" * 20, None),
    ],
)
def test_texts_without_blanks_are_cut(tmp_path, text, lengths):
    (tmp_path / "d.jsonl").write_text(json.dumps({"title": "t", "text": text}))
    pieces = [piece for _, piece in read_passages(tmp_path / "d.jsonl")]
    assert "".join(pieces) == text
    assert len(pieces) > 1 and max(map(len, pieces)) < 300
    assert lengths is None or [len(piece) for piece in pieces] == lengths
    assert all(piece[0] not in "。\u0e31\u0e34\u0e35\u0e37\u0e38\u0e39\u0e48" for piece in pieces)


def test_a_name_in_another_script_is_a_word_as_any_other():
    text = "Beijing (北京市) is large. ไทย, 東京 and Lagos are, too. " * 30
    words = text.split()
    assert split_text(text) == [" ".join(words[i : i + 100]) for i in range(0, len(words), 100)]
