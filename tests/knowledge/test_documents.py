"""The same documents from every kind of file, faults where they are, and memory that does not grow."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag.errors import UserError
from rag.knowledge.documents import read_documents
from rag.knowledge.passages import read_passages, survey_documents
from rag.knowledge.records import Document, Problem
from tests.conftest import ROOT

LONG = " ".join(f"word{i}" for i in range(250))
ROWS = [
    ('"Heroes"', 'He said "no", and\u2028left. \x85 Then'),
    ("NA", "null"),
    ("", "text without a title"),
    ("hundred", LONG.rpartition(" word100")[0]),
    ("東京", "naïve"),
]


def write_tsv(path, rows):
    path.write_text("".join(f"{title}\t{text}\n" for title, text in rows), newline="")


def write_dpr(path, rows):
    with open(path, "w", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerows([("id", "text", "title"), *((n, text, title) for n, (title, text) in enumerate(rows, 1))])


def write_json_lines(path, rows):
    objects = [{"title": title, "text": text} if title else {"text": text, "other": 1} for title, text in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" for n, row in enumerate(objects)))


def columns(rows):
    return {name: list(column) for name, column in zip(("title", "text"), zip(*rows, strict=True), strict=True)}


def write_parquet(path, rows):
    pq.write_table(pa.table(columns(rows) | {"id": range(len(rows))}), path, row_group_size=2 if rows is ROWS else 500)


def write_dataset(path, rows):
    datasets.Dataset.from_dict(columns(rows)).save_to_disk(path, num_shards=min(2, len(rows)))


def write_chosen_rows(path, rows):
    """A dataset whose rows are a selection of those in its files."""
    datasets.Dataset.from_dict(columns([("no", "no"), *rows[::-1]])).select(range(len(rows), 0, -1)).save_to_disk(path)


KINDS = {
    "d.tsv": write_tsv,
    "documents": write_tsv,
    "psgs_w100.tsv": write_dpr,
    "d.jsonl": write_json_lines,
    "d.parquet": write_parquet,
    "dataset": write_dataset,
    "chosen": write_chosen_rows,
}
TEXT_KINDS = [name for name in KINDS if "." in name and "parquet" not in name]


def rows_of(path, options=None):
    return [(item.title, item.text) for item in read_documents(path, options) if isinstance(item, Document)]


def compress(path, ending):
    packed = path.with_name(f"{path.name}.{ending}")
    with pa.output_stream(str(packed), compression={"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[ending]) as file:
        file.write(path.read_bytes())
    path.unlink()
    return packed


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path, name):
    KINDS[name](tmp_path / name, ROWS)
    assert rows_of(tmp_path / name) == ROWS


def test_the_same_documents_have_the_same_digest_whatever_the_kind(tmp_path):
    for name, write in KINDS.items():
        write(tmp_path / name, ROWS)
    surveys = [survey_documents(tmp_path / name) for name in KINDS]
    assert {(survey.digest, survey.documents, survey.passages, survey.text_bytes) for survey in surveys} == {
        (surveys[0].digest, 5, 5, sum(len(word.encode()) for row in ROWS for word in row))
    }
    for changed in (ROWS[::-1], ROWS[:-1], [*ROWS[:-1], ("東京", "naïv")], [*ROWS[:-1], ("東京n", "aïve")]):
        write_parquet(tmp_path / "other.parquet", changed)
        assert survey_documents(tmp_path / "other.parquet").digest != surveys[0].digest


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2"])
@pytest.mark.parametrize("name", TEXT_KINDS)
def test_compressed_files(tmp_path, name, ending):
    KINDS[name](tmp_path / name, ROWS)
    packed = compress(tmp_path / name, ending)
    assert rows_of(packed) == ROWS
    packed.write_bytes(packed.read_bytes()[:-9])
    (problem,) = survey_documents(packed).problems
    assert problem.startswith(f"--csv_path {packed}: cannot be read to its end (")


def test_a_folder_of_all_kinds_in_the_order_of_names(tmp_path):
    for number, (name, write) in enumerate(KINDS.items()):
        write(tmp_path / f"{9 - number} {name}", [(name, "some text")])
    compress(tmp_path / "9 d.tsv", "zst")
    (tmp_path / "5 inner").mkdir()
    write_tsv(tmp_path / "5 inner" / "deep.tsv", [("inner", "text")])
    (tmp_path / ".hidden.tsv").write_text("nothing that could be read")
    titles = [item.title for item in read_documents(tmp_path)]
    assert titles == [
        "chosen", "dataset", "d.parquet", "inner", "d.jsonl", "psgs_w100.tsv", "documents", "d.tsv"
    ]  # fmt: skip


def test_passages_of_dpr_stay_whole(tmp_path):
    write_dpr(tmp_path / "d.tsv", [("long", f"  {LONG} ")])
    assert list(read_documents(tmp_path / "d.tsv")) == [Document("long", f"  {LONG} ", is_passage=True)]
    assert list(read_passages(tmp_path / "d.tsv")) == [("long", LONG)]
    write_tsv(tmp_path / "own.tsv", [("long", LONG)])
    assert survey_documents(tmp_path / "own.tsv").passages == 3


def reasons(path):
    return [
        (item.place.removeprefix(str(path)), item.reason) for item in read_documents(path) if isinstance(item, Problem)
    ]


def test_faults_of_json_lines_are_told_with_their_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        '{"text": "good"}',
        "{'text': 'x'}",
        "",
        '["text"]',
        '{"title": "t"}',
        '{"text": 5}',
        '{"text": "\\ud800"}',
    ]
    lines += ['{"title": ["t"], "text": "x"}', '{"title": null, "text": " "}', '{"title": null, "text": "good"}']
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    assert [(place, reason.split(" (")[0]) for place, reason in reasons(path)] == [
        (" line 2", "is not JSON"),
        (" line 3", "is not JSON"),
        (" line 4", 'is no object; write {"title": ..., "text": ...}'),
        (" line 5", "has no text"),
        (" line 6", "has a text that is no string but 5"),
        (" line 7", "is not UTF-8; convert the file"),
        (" line 8", "has a title that is no string but ['t']"),
        (" line 9", "has no text; --skip_empty passes over such rows"),
        (" line 11", "is not UTF-8; convert the file"),
    ]


@pytest.mark.parametrize("write", [write_parquet, write_dataset])
def test_faults_of_columns_are_told_with_their_rows(tmp_path, write):
    write(tmp_path / "d.parquet", [("a", "good"), (None, "good"), ("b", None), ("c", "  ")])
    assert [(place, reason.split(";")[0]) for place, reason in reasons(tmp_path / "d.parquet")] == [
        (" row 3", "has no text"), (" row 4", "has no text")
    ]  # fmt: skip
    numbers = pa.table({"title": ["a"], "text": [1]})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    assert reasons(tmp_path / "numbers.parquet") == [(" row 1", "has a text that is no string but 1")]


def test_names_in_any_case(tmp_path):
    pq.write_table(pa.table({"ID": [1], "Title": ["Oslo"], "TEXT": ["in Norway"]}), tmp_path / "a.PARQUET")
    (tmp_path / "b.JSONL").write_text('{"Title": "Oslo", "Text": "in Norway"}\n')
    (tmp_path / "c.jsonl").write_text('{"Contents": "Oslo\\nin Norway"}\n')
    (tmp_path / "d.GZ").write_bytes(gzip.compress(b"TITLE\tTEXT\nOslo\tin Norway\n"))
    assert rows_of(tmp_path) == [("Oslo", "in Norway")] * 4


def test_texts_in_columns_of_any_type(tmp_path):
    paragraphs = pa.array([["one", "two"], None])
    pq.write_table(pa.table({"title": ["a", "b"], "text": paragraphs}), tmp_path / "lists.parquet")
    assert next(iter(read_documents(tmp_path / "lists.parquet"))) == Document("a", "one\ntwo")
    assert [reason.split(";")[0] for _, reason in reasons(tmp_path / "lists.parquet")] == ["has no text"]
    for text in (pa.array([{"a": "b"}]), pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))):
        pq.write_table(pa.table({"text": text}), tmp_path / "other.parquet")
        ((place, reason),) = reasons(tmp_path / "other.parquet")
        assert place == " row 1" and reason.startswith("has a text that is no string but ")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "other.parquet")
    assert reasons(tmp_path / "other.parquet") == [("", "has two columns of one name (text, text); rename one")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"a\tb\n"), "is packed by gzip; name it NAME.gz"),
        (b"PK\x03\x04\x14\0", "is a zip archive or an office document; unpack it, or save it as "),
        (b"PAR1\x15\x04", "is a Parquet file; name it NAME.parquet"),
        (b"%PDF-1.7\n", "is a PDF; save its text"),
        ("a\tb\n".encode("utf-16"), "is UTF-16 text; convert it (iconv -f utf-16 -t utf-8)"),
    ],
    ids=["gzip", "zip", "Parquet", "PDF", "UTF-16"],  # pytest's would hold the time, which gzip notes
)
def test_files_of_other_kinds_are_told_by_how_they_begin(tmp_path, content, says):
    for name in ("d.tsv", "d.jsonl"):
        (tmp_path / name).write_bytes(content)
        ((place, reason),) = reasons(tmp_path / name)
        assert place == "" and reason.startswith(says)


def test_datasets_that_are_none(tmp_path):
    whole = datasets.Dataset.from_dict({"text": ["a"]})
    whole.select([]).save_to_disk(tmp_path / "empty")
    whole.save_to_disk(tmp_path / "nested")
    (tmp_path / "nested" / "state.json").write_text("[" * 100_000)
    for name in ("empty", "nested"):
        ((_, reason),) = reasons(tmp_path / name)
        assert reason.startswith("is not a whole dataset (")


def test_columns_that_lack(tmp_path):
    pq.write_table(pa.table({"title": ["a"], "other": ["b"]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"other": ["b"]}).save_to_disk(tmp_path / "b")
    pq.write_table(pa.table({"text": ["no title"]}), tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"text": ["no title"]}).save_to_disk(tmp_path / "d")
    assert list(read_documents(tmp_path)) == [
        Problem(f"{tmp_path}/a.parquet", "has no column text (found: title, other); name the two title and text"),
        Problem(f"{tmp_path}/b", "has no column text (found: other); name the two title and text"),
        Document("", "no title"),
        Document("", "no title"),
    ]


@pytest.mark.parametrize("write", [write_tsv, write_json_lines, write_parquet])
def test_names_that_are_not_utf8(tmp_path, write):
    ending = {write_json_lines: ".jsonl", write_parquet: ".parquet"}.get(write, ".tsv")
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).with_suffix(ending)
    write(tmp_path / "x", ROWS[1:3])
    (tmp_path / "x").rename(path)
    assert rows_of(path) == ROWS[1:3]


def test_files_that_cannot_be_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", ROWS)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    (tmp_path / "b.parquet.gz").write_bytes(whole)
    (tmp_path / "c.tsv.gz").write_bytes(b"title\ttext\nnot packed\tat all\n")
    write_dataset(tmp_path / "d", ROWS)
    next((tmp_path / "d").glob("*.arrow")).unlink()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns(ROWS))}).save_to_disk(tmp_path / "e")
    write_dpr(tmp_path / "f.tsv", ROWS)
    with open(tmp_path / "f.tsv", "a") as file:
        file.write('6\t"open\ttitle\n')
    problems = survey_documents(tmp_path).problems
    assert [problem.removeprefix(f"--csv_path {tmp_path}/").split(" (")[0] for problem in problems] == [
        "a.parquet: cannot be read to its end",
        "b.parquet.gz: is a packed Parquet file, which is compressed within; unpack it",
        "c.tsv.gz: cannot be read to its end",
        "d: is not a whole dataset",
        "e: holds the splits train; give the folder of one of them",
        "f.tsv line 7: opens a quotation mark that is never closed; close it, or give --csv_quoting none if nothing is "
        "quoted",
    ]
    assert all("\n" not in problem for problem in problems)
    assert reasons(tmp_path / "none") == [("", "does not exist; give a file or a folder of documents")]


def test_a_file_that_changed_since_it_was_looked_at(tmp_path):
    (tmp_path / "d.tsv").write_text("a\tb\nno tab")
    with pytest.raises(UserError, match=r"line 2: has no tab; .* \(it has changed since it was looked at\)"):
        list(read_passages(tmp_path / "d.tsv"))


MEMORY = """
import re, sys
from pathlib import Path
from rag.knowledge.passages import read_passages, survey_documents

def read(path):
    survey_documents(path), sum(1 for _ in read_passages(path))
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # KiB, the peak so far

small, large = sys.argv[1:6], sys.argv[6:]
before = max(map(read, small))
print(max(map(read, large)) - before)
"""


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Eight times the documents, 16 MB a file: less than 8 MB more."""
    paths = []
    for count in (1000, 8000):
        rows = [(f"title {n}", f"{n}{'x' * 2000}") for n in range(count)]
        for name in ("documents", "d.tsv.zst", "psgs_w100.tsv", "d.jsonl.gz", "d.parquet"):
            path = tmp_path / str(count) / name.removesuffix(".zst").removesuffix(".gz")
            path.parent.mkdir(exist_ok=True)
            KINDS[path.name](path, rows)
            paths.append(compress(path, name.rpartition(".")[2]) if name.endswith(("gz", "zst")) else path)
    words = [sys.executable, "-c", MEMORY, *map(str, paths)]
    assert int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout) < 8 * 1024
