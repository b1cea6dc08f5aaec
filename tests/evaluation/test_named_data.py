"""Evaluations of data by name: the scores of the same questions in files, and what makes predictions others."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag.errors import UserError
from rag.evaluation.arguments import parse_args
from rag.files import load_json, read_lines
from tests.conftest import QUESTIONS
from tests.evaluation.conftest import ANSWERS

NO_FILES = {"evaluation_set": None, "gold_data_path": None, "gold_data_mode": "qa"}


@pytest.fixture
def named(files):
    """A function that writes records as a file, by its ending, and returns its path."""

    def write(name, records):
        path = files / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    return write


def records(**more):
    return [{"question": q, "answers": [a, "the " + a.title()], **more} for q, a in QUESTIONS]


def kilt_records():
    outputs = [[{"answer": a, "provenance": [{"title": a}]}, {"answer": "x"}] for a in ANSWERS]
    return [{"id": str(n), "input": q, "output": outputs[n]} for n, (q, _) in enumerate(QUESTIONS)]


def test_the_scores_are_those_of_files(run, rag_folder, files, named):
    expected = run(rag_folder, gold="qa")
    lines = read_lines(files / "predictions.txt")
    for name in ("nq.jsonl", "folder/test.parquet"):
        path = named(name, records())
        data = path if name == "nq.jsonl" else path.parent
        assert run(rag_folder, predictions="named.txt", recalculate=True, dataset_name=data, **NO_FILES) == expected
        assert read_lines(files / "named.txt") == lines
        settings = load_json(files / "named.txt.settings.json")["settings"]
        assert "evaluation_set" not in settings
        assert settings["dataset_name"]["path"] == (f"{data}" if data == path else f"{data} (test)")
        assert load_json(files / "named.txt.scores.json")["gold_data_path"] == str(data)


def test_kilts_records_have_their_pages(run, rag_folder, files, named):
    path = named("kilt.jsonl", kilt_records())
    both = {"evaluation_set": path, "gold_data_path": path, "gold_data_mode": "kilt"}
    expected = run(rag_folder, predictions="files.txt", **both)
    assert "kilt_em" in expected
    parquet = named("kilt.parquet", kilt_records())
    for data, mode in ((path, "qa"), (parquet, "kilt")):
        flags = NO_FILES | {"gold_data_mode": mode, "recalculate": True}
        assert run(rag_folder, predictions="named.txt", dataset_name=data, **flags) == expected
    retrieval = {"eval_mode": "retrieval", "k": [1, 3]}
    expected = run(
        rag_folder, predictions="files.tsv", **retrieval, **both | {"gold_data_mode": "qa"}, answers_path=path
    )
    assert run(rag_folder, predictions="named.tsv", dataset_name=parquet, **retrieval, **NO_FILES) == expected
    assert {"recall_at_3", "page_recall_at_3"} <= expected.keys()


def test_titles_stay_a_file_and_answers_are_those_of_the_data(run, rag_folder, files, named):
    retrieval = {"gold": "pages", "k": [1, 3]}
    expected = run(rag_folder, predictions="files.tsv", answers_path=files / "qa", **retrieval)
    flags = {"evaluation_set": None, "gold_data_mode": "qa"}
    path = named("nq.jsonl", records())
    assert run(rag_folder, predictions="named.tsv", dataset_name=path, **retrieval, **flags) == expected
    assert "recall_at_3" in expected
    changed = named("nq.jsonl", [one | {"answers": ["x"]} for one in records()])
    with pytest.raises(UserError, match=r"dataset_name .*nq\.jsonl \(its content has changed\)"):
        run(rag_folder, predictions="named.tsv", dataset_name=changed, **retrieval, **flags)
    with pytest.raises(UserError, match=r"nq\.jsonl has no titles of right passages, .*; give --gold_data_path"):
        run(rag_folder, predictions="x.tsv", dataset_name=path, **retrieval, **NO_FILES)
    questions = named("q.jsonl", [{"question": q} for q, _ in QUESTIONS])
    alone = run(rag_folder, predictions="alone.tsv", dataset_name=questions, **retrieval, **flags)
    assert alone == {name: score for name, score in expected.items() if not name.startswith("recall")}


def test_patterns_are_tried_and_kept_as_they_are(run, rag_folder, named):
    flags = NO_FILES | {"gold_data_mode": "regex"}
    path = named("trec.jsonl", [{"question": q, "answer": [f"{a[:2]}.*"]} for q, a in QUESTIONS])
    assert run(rag_folder, dataset_name=path, **flags).keys() >= {"em"}
    path = named(
        "broken.jsonl", [{"question": q, "answer": "(" if n == 2 else a} for n, (q, a) in enumerate(QUESTIONS)]
    )
    with pytest.raises(UserError, match=r"--dataset_name: .*broken\.jsonl, line 3: "):
        run(rag_folder, predictions="x.txt", dataset_name=path, **flags)


def test_predictions_know_their_questions(run, rag_folder, named, request):
    path = named("nq.jsonl", records())
    flags = NO_FILES | {"dataset_name": path}
    run(rag_folder, **flags)
    request.getfixturevalue("no_model")
    named("nq.jsonl", [one | {"answers": ["x"]} for one in records(more=1)])
    assert run(rag_folder, **flags)["em"] == 0
    named("nq.jsonl", [one | {"question": f"{one['question']} ?"} for one in records()])
    with pytest.raises(UserError, match=r"was made with dataset_name .*nq\.jsonl \(its content has changed\)"):
        run(rag_folder, **flags)


@pytest.mark.parametrize(
    ("splits", "wanted", "asked"),
    [
        (["train", "validation", "test"], None, "test"),
        (["train", "dev"], None, "dev"),
        (["train", "dev"], "validation", "dev"),
        (["train", "dev"], "train", "train"),
    ],
)
def test_the_split_that_is_asked(splits, wanted, asked, run, bart_folder, files, named):
    for split in splits:
        named(f"data/{split}.jsonl", [{"question": f"{split} {q}", "answer": a} for q, a in QUESTIONS[:2]])
    flags = NO_FILES | ({} if wanted is None else {"dataset_split": wanted})
    run(bart_folder, dataset_name=files / "data", **flags)
    record = json.loads(read_lines(files / "predictions.txt.jsonl")[0])
    assert record["question"].startswith(asked)


def test_what_cannot_be_asked_is_named(run, files, named, no_model):
    named("data/train.jsonl", records())
    named("some/test.jsonl", [{"question": "q", "answer": ""}, {"question": "r", "answer": "a"}])
    named("none/test.jsonl", [{"question": "q", "answer": []}])
    named("none/dev.jsonl", records())
    one = named("one.jsonl", records())
    for flags, message in [
        ({"dataset_name": files / "data"}, r"data has no test or validation \(train\); give --dataset_split"),
        ({"dataset_name": files / "data", "dataset_split": "x"}, r"--dataset_split x: .* has no such split \(train\)"),
        ({"dataset_name": one, "dataset_split": "test"}, r"--dataset_split test: .* no such split \(one file\)"),
        (
            {"dataset_name": files / "some"},
            r"split test: 1 of 2 questions have no answer, the first is .*line 1; leave",
        ),
        ({"dataset_name": files / "none"}, r"split test has no answer to any question; give --dataset_split \(val\)"),
        (
            {"dataset_name": one, "gold_data_mode": "kilt"},
            "one.jsonl names no pages, .*leave --gold_data_mode kilt out",
        ),
        ({"dataset_name": one, "predictions_path": one}, "is --dataset_name, which would be overwritten"),
        ({"dataset_name": files / "gone.jsonl"}, "gone.jsonl does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            run("m", **NO_FILES | flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--evaluation_set is missing; give a file of questions, or --dataset_name\n--gold_data_path is missing"),
        (["--dataset_split", "x"], "--dataset_split x is about --dataset_name"),
        (["--dataset_name", "d", "--evaluation_set", "q"], "--evaluation_set q and --dataset_name d both say"),
        (["--dataset_name", "d", "--gold_data_path", "g"], "--gold_data_path g and --dataset_name d both say"),
        (["--dataset_name", "d", "--gold_data_mode", "ans"], "--gold_data_mode ans is for files of lines"),
        (
            ["--dataset_name", "d", "--eval_mode", "retrieval", "--gold_data_path", "g", "--answers_path", "a"],
            "^--answers_path a and --dataset_name d both say",
        ),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--model_name_or_path", "m", *flags])
