"""Local files as tables: every kind gives the same rows; folders by split; what cannot be read is named."""

import csv
import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag.errors import UserError
from rag.questions.arguments import DatasetArguments
from rag.questions.columns import read_examples
from rag.questions.tables import is_local, local_tables, path_problems, read_table
from tests.conftest import ROOT

RECORDS = [
    {"question": 'who says "so", and\twhere', "answers": ["Oslo", 'Don\'t, "x"'], "id": 1},
    {"question": "hvor er é", "answers": ["é"], "id": 2},
]


def write(path, records=RECORDS):
    kind = path.suffix
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == ".jsonl":
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    elif kind == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)  # a list as Python prints it, quoted
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_all_kinds_of_file_have_the_same_rows(kind, tmp_path):
    path = write(tmp_path / f"mine.{kind}")
    (tables,) = local_tables(str(path)).values()
    assert tables[0].names == ["question", "answers", "id"]
    examples = read_examples(DatasetArguments(dataset_name=str(path)), tables)
    assert examples.questions == ['who says "so", and where', "hvor er é"]
    assert examples.answers == [record["answers"] for record in RECORDS]


def test_keys_of_all_lines_are_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "q"}, {"question": "r", "answer": "a"}])
    assert read_table(path).cells("answer") == [None, "a"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], {"train": 1, "val": 1, "test": 1}),
        (["nq-train-kilt.jsonl", "nq-dev-kilt.jsonl"], {"train": 1, "val": 1}),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "VAL.csv"], {"train": 2, "val": 1}),
        (["NQ-open.train.jsonl", "NQ-open.dev.jsonl", "attest.jsonl", ".test.jsonl"], {"train": 1, "val": 1}),
    ],
)
def test_files_of_a_folder_by_their_splits(names, splits, tmp_path):
    for name in names:
        write(tmp_path / name)
    tables = local_tables(str(tmp_path))
    assert {split: len(own) for split, own in tables.items()} == splits
    assert path_problems(DatasetArguments(dataset_name=str(tmp_path))) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"question": "q"}\n{oops\n', r"x\.jsonl, line 2: .* is expected, not '\{oops'"),
        ("x.jsonl", '{"question": "q"}\n\n', "line 2"),
        ("x.jsonl", "", "x.jsonl is empty; .* is expected"),
        ("x.jsonl", "[" * 100_000, "record 1"),
        ("x.json", "[]", "x.json is empty; .* is expected"),
        ("x.json", "[3]", "record 1"),
        ("x.csv", "", "x.csv is empty; a header"),
        ("x.csv", "question,answer\nq\n", "line 2 has 1 columns, its header has 2"),
        ("x.csv", 'question,answer\n"q,a\nr,b\n', "line 3: unexpected end of data"),
        ("x.tsv", "question\tanswer\tanswer\n", "two columns of one name"),
        ("x.parquet", "nothing of the kind", r"x\.parquet cannot be read \(.*magic bytes"),
        ("x.csv", b"question,answer\nq,\xff\n", "cannot be read .*utf-8"),
        ("x.jsonl", b"\xff", "is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^--dataset_name: .*{message}") as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_damage_behind_the_header_of_a_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", RECORDS * 1000)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet cannot be read"):
        read_table(path).cells("question")


def test_paths_that_cannot_be_read_are_told_without_reading(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    mixed, unnamed = tmp_path / "mixed", tmp_path / "unnamed"
    for folder, names in ((mixed, ["train.csv", "train.jsonl"]), (unnamed, ["questions.jsonl"])):
        folder.mkdir()
        for name in names:
            write(folder / name)
    for name, message in {
        tmp_path / "none.jsonl": "does not exist; give a file .parquet",
        "none.jsonl": "does not exist",
        "no/such/path": "does not exist",
        tmp_path / "notes.txt": "is of no kind that is read",
        "/dev/null": "is a device or a pipe",
        tmp_path / "empty": r"has no file of a split \(found: no file of a kind that is read\)",
        unnamed: r"found: questions\.jsonl\); name its files by their splits .*, or give one file",
        mixed: r"train\.csv and train\.jsonl, two kinds of file",
    }.items():
        (problem,) = path_problems(DatasetArguments(dataset_name=str(name)))
        assert problem.startswith(f"--dataset_name {name}") and re.search(message, problem)
    (problem,) = path_problems(DatasetArguments(dataset_name=str(unnamed), dataset_config="en"))
    assert problem.startswith("--dataset_config en is for a dataset of the hub")


def test_names_of_the_hub_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(map(is_local, ("squad", "owner/name", "owner/name.v2")))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name") and is_local("x.jsonl") and is_local("./squad")


def test_a_path_that_is_missing_is_told_before_anything_heavy(tmp_path):
    code = """
import sys
script = __import__(sys.argv.pop(1))
try: script.cli()
finally: print(sorted({"torch", "datasets", "transformers", "pyarrow"} & set(sys.modules)))
"""
    needed = {"finetune_rag": ["--output_dir", str(tmp_path)], "eval_rag": ["--predictions_path", str(tmp_path / "p")]}
    for script, flags in needed.items():
        words = ["-c", code, script, "--model_name_or_path", "m", "--dataset_name", "no/such/path", *flags]
        run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and run.stdout == "[]\n", run.stderr
        assert "error: --dataset_name no/such/path does not exist" in run.stderr and len(run.stderr.splitlines()) == 1
