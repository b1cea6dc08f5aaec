"""Training on data by name: the losses of the six files, runs that go on, ranks that wait, what is refused."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import finetune_rag
from rag.errors import UserError
from rag.files import load_json, read_lines
from rag.training.arguments import parse_args
from rag.training.loggers import _data_name
from tests.conftest import QUESTIONS
from tests.distributed.many_ranks import run_ranks
from tests.training.rank_runs import TOLERANCE, assert_same, outcome, train, two_ranks
from tests.training.test_finetune_rag import SMALL, run

COUNTS = {"train": 7, "validation": 5, "test": 5}


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


def write_split(folder, split, records, kind):
    folder.mkdir(exist_ok=True, parents=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / f"{split}.parquet")
    else:
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture
def named(tmp_path):
    """A function that writes the questions of `words` as a data set of a kind, with one answer each or several."""

    def write(kind="jsonl", others=()):
        for split, count in COUNTS.items():
            records = [{"question": q, "answers": [a, *others]} for q, a in QUESTIONS[:count]]
            write_split(tmp_path / kind, split, records, kind)
        return tmp_path / kind

    return write


def train_on(model, named, out, *flags):
    words = ["--model_name_or_path", model, "--dataset_name", named, "--output_dir", out, *SMALL, *flags]
    return finetune_rag.main(finetune_rag.parse_args([str(word) for word in words]))


def results(out):
    """What a run has measured, but for times."""
    rows = load_json(out / "metrics.json")["val"]
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows], losses


@pytest.mark.parametrize("others", [(), ("the city",)])
def test_the_losses_are_those_of_the_six_files(others, model_folder, named, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for split, count in zip(("train", "val", "test"), COUNTS.values(), strict=True):
        (files / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS[:count]))
        (files / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS[:count]))
        if others:
            lines = [f"{question}\t{[answer, *others]}\n" for question, answer in QUESTIONS[:count]]
            (files / f"{split}.qa").write_text("".join(lines))
    flags = ["--do_train", "--do_predict", "--max_steps", 2]
    expected = run(model_folder, files, tmp_path / "out", *flags)
    for kind in ("jsonl", "parquet"):
        out = tmp_path / f"out_{kind}"
        metrics = train_on(model_folder, named(kind, others), out, *flags)
        assert results(out) == results(tmp_path / "out") and len(results(out)[1]) == 2
        assert {k: v for k, v in metrics.items() if k.startswith("test") and "time" not in k} == {
            k: v for k, v in expected.items() if k.startswith("test") and "time" not in k
        }
        settings = load_json(out / "hparams.json")["data"]
        assert settings["dataset_name"] == str(tmp_path / kind) and settings["data_dir"] is None
        card = (out / "checkpoint1" / "README.md").read_text()
        assert f"- Questions: `{kind}`: 7 train, 5 val\n" in card and "--data_dir" not in card


def test_a_run_goes_on_with_what_was_read_and_refuses_what_has_changed(model_folder, named, tmp_path, capsys):
    source, out = named(), tmp_path / "out"
    train_on(model_folder, source, out, "--num_train_epochs", 1)
    capsys.readouterr()
    train_on(model_folder, source, out, "--num_train_epochs", 2)
    assert "as they were read before" in capsys.readouterr().out
    assert [row["step"] for row in load_json(out / "metrics.json")["val"]] == [2, 4]

    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, flags, message in [
        (named(others=["more"]), [], r"--dataset_name .*jsonl is not what the run in .*out was begun with"),
        (named("parquet"), [], r"--dataset_name was .*jsonl and is .*parquet"),
        (source, ["--answers_column", "question"], "--answers_column was None and is question"),
        (source, ["--do_predict"], "is not what the run in"),
    ]:
        with pytest.raises(UserError, match=message):
            train_on(model_folder, name, out, *flags)
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train_on(model_folder, source, out, "--max_steps", 1, "--overwrite_output_dir")
    assert any("more" in read_lines(path / "train.qa")[0] for path in (out / "dataset").iterdir())


def test_a_start_afresh_that_is_refused_leaves_the_run_its_examples(model_folder, named, tmp_path):
    out = tmp_path / "out"
    train_on(model_folder, named(), out, "--num_train_epochs", 1)
    with pytest.raises(UserError, match="--n_docs 100000"):
        train_on(model_folder, named(others=["more"]), out, "--overwrite_output_dir", "--n_docs", 100000)
    train_on(model_folder, named(), out, "--num_train_epochs", 2)
    assert len(list((out / "dataset").iterdir())) == 1


def test_examples_that_were_removed_are_replaced_by_the_same_alone(model_folder, named, tmp_path):
    out = tmp_path / "out"
    train_on(model_folder, named(), out, "--num_train_epochs", 1)
    shutil.rmtree(out / "dataset")
    with pytest.raises(UserError, match="is not what the run in"):
        train_on(model_folder, named(others=["more"]), out, "--num_train_epochs", 2)
    train_on(model_folder, named(), out, "--num_train_epochs", 2)


@pytest.mark.slow
def test_two_ranks_read_what_the_first_has_written(words, alone, named, tmp_path):
    at = words.index("--data_dir")
    words = [*words[:at], "--dataset_name", str(named()), *words[at + 2 :]]
    flags = ["--max_steps", "2"]
    argv = two_ranks(words, tmp_path / "out", "--do_train", "--do_predict", *flags)
    (_, written), (_, written_by_other) = run_ranks(train, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    found = outcome(tmp_path / "out")
    assert "dataset" in found["files"] and written and not written_by_other
    found["files"].remove("dataset")
    assert_same(found, alone(1, *flags), **TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"^--data_dir is missing; give a folder of .*, or --dataset_name$"),
        (["--data_dir", "d", "--dataset_name", "n"], "--data_dir d and --dataset_name n both name the data; give one"),
        (["--data_dir", "d", "--question_column", "q"], "--question_column q is about --dataset_name; give it, too"),
        (["--dataset_name", " "], "--dataset_name ' ' names nothing"),
        (["--dataset_name", "n", "--answers_column", ""], "--answers_column '' names nothing"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--model_name_or_path", "m", "--output_dir", "o", *flags])


def test_logs_go_under_the_name_of_the_data():
    needed = ["--model_name_or_path", "m", "--output_dir", "o"]
    assert _data_name(parse_args([*needed, "--dataset_name", "owner/name"])) == "name"


def test_what_is_refused_leaves_nothing(model_folder, tmp_path):
    write_split(tmp_path / "source", "train", [{"question": "q", "text": "a"}], "jsonl")
    with pytest.raises(UserError, match=r"has no column answers, .*but these: question, text; give --answers_column"):
        train_on(model_folder, tmp_path / "source", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
