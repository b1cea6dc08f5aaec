"""A data set by name as text files: what is in them, what is left out, when they are written again."""

import json
import threading

import pytest

from rag.errors import RankError, UserError
from rag.files import load_json, read_lines
from rag.questions.arguments import DatasetArguments
from rag.questions.folder import awaited_folder, written_folder
from utils_rag import data_file_problems, read_answers

ALL = ("train", "val", "test")


@pytest.fixture
def source(tmp_path):
    """A function that writes splits as JSON lines, and gives the flags that name them."""

    def write(**splits):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        for split, records in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return DatasetArguments(dataset_name=str(folder))

    return write


def record(question, *answers):
    return {"question": question, "answers": list(answers)}


def test_the_files_are_those_of_a_training(source, tmp_path, capsys):
    args = source(train=[record("who  is it", "Ann", 'the "Ann"'), record("why")], validation=[record("é", "\u2028é")])
    written_folder(args, tmp_path / "dataset", ["train", "val"], may_replace=False)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'dataset'}: 1 train, 1 val, 1 test examples of --dataset_name {args.dataset_name}; of train 1 "
        "are left out for want of an answer; no test split has answers, so that test is the validation's\n"
    )
    names = {f"{split}.{end}" for split in ALL for end in ("source", "target", "qa")}
    assert {path.name for path in (tmp_path / "dataset").iterdir()} == names | {"dataset.json"}
    assert read_lines(tmp_path / "dataset" / "train.target") == ["Ann"]
    assert read_answers(tmp_path / "dataset", "train") == [("who is it", ["Ann", 'the "Ann"'])]
    assert read_answers(tmp_path / "dataset", "test") == [("é", ["é"])]
    assert data_file_problems(tmp_path / "dataset", ALL) == []


@pytest.mark.parametrize(
    ("splits", "needed", "message"),
    [
        (
            {"train": [record("q", "a")]},
            ALL[:2],
            r"has no split validation \(it has: train\); set aside some of its rows",
        ),
        ({"test": [record("q", "a")]}, ALL[:2], "has no split train"),
        ({"train": [record("q")], "val": [record("q", "a")]}, ALL[:2], "no question of train has an answer"),
        ({"train": [record("q", "a")]}, ALL[2:], "has no split test"),
    ],
)
def test_a_split_that_is_needed_and_lacking(splits, needed, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        written_folder(source(**splits), tmp_path / "dataset", needed, may_replace=True)
    assert not (tmp_path / "dataset").exists()


def test_one_file_is_no_training_data(source, tmp_path):
    args = DatasetArguments(dataset_name=f"{source(train=[record('q', 'a')]).dataset_name}/train.jsonl")
    with pytest.raises(UserError, match=r"has no split train \(it has: one file\); .* a folder"):
        written_folder(args, tmp_path / "dataset", ALL[:2], may_replace=True)


def test_a_test_alone_needs_a_test_alone(source, tmp_path):
    written_folder(source(test=[record("q", "a")]), tmp_path / "dataset", ["test"], may_replace=True)
    assert read_lines(tmp_path / "dataset" / "test.source") == ["q"]


def test_what_is_written_stays_while_its_source_does(source, tmp_path, capsys):
    splits = {"train": [record("q", "a")], "val": [record("q", "a")]}
    folder = tmp_path / "dataset"
    (tmp_path / ".dataset.1.tmp").mkdir()  # a killed run's
    written_folder(source(**splits), folder, ALL[:2], may_replace=True)
    assert not (tmp_path / ".dataset.1.tmp").exists()
    (folder / "train.target").write_text("marked\n")
    written_folder(source(**splits), folder, ALL[:2], may_replace=False)
    assert "as they were read before" in capsys.readouterr().out
    assert read_lines(folder / "train.target") == ["marked"]

    changed = source(**splits | {"train": [record("q", "b")]})
    with pytest.raises(
        UserError, match=r"is not what the run in .* was begun with .* restore them, or give another --out"
    ):
        written_folder(changed, folder, ALL[:2], may_replace=False)
    written_folder(changed, folder, ALL[:2], may_replace=True)
    assert read_lines(folder / "train.target") == ["b"]
    other = DatasetArguments(dataset_name=changed.dataset_name, answers_column="question")
    written_folder(other, folder, ALL[:2], may_replace=True)
    assert read_lines(folder / "train.target") == ["q"] and load_json(folder / "dataset.json")["answers_column"]


def test_others_wait_for_the_files_of_this_data_set(source, tmp_path):
    splits = {"train": [record("q", "a")], "val": [record("q", "a")]}
    written_folder(source(**splits), tmp_path / "dataset", ALL[:2], may_replace=True)
    args = source(**splits | {"train": [record("q", "b")]})
    with pytest.raises(RankError, match=r"is not there after --rank_timeout 0\.3: rank 0 has failed, or sees another"):
        awaited_folder(args, tmp_path / "dataset", ALL[:2], 0.3)
    first = threading.Timer(0.3, written_folder, (args, tmp_path / "dataset", ALL[:2], True))
    first.start()
    awaited_folder(args, tmp_path / "dataset", ALL[:2], 30)
    assert read_lines(tmp_path / "dataset" / "train.target") == ["b"]
    first.join()
