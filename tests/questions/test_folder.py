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
    folder, _ = written_folder(args, tmp_path / "dataset", ["train", "val"], None)
    assert folder.parent == tmp_path / "dataset"
    assert capsys.readouterr().out == (
        f"{folder}: 1 train, 1 val, 1 test examples of --dataset_name {args.dataset_name}; of train 1 are left out for "
        "want of an answer; no test split has answers, so that test is the validation's\n"
    )
    names = {f"{split}.{end}" for split in ALL for end in ("source", "target", "qa")}
    assert {path.name for path in folder.iterdir()} == names | {"dataset.json"}
    assert read_lines(folder / "train.target") == ["Ann"]
    assert read_answers(folder, "train") == [("who is it", ["Ann", 'the "Ann"'])]
    assert read_answers(folder, "test") == [("é", ["é"])]
    assert data_file_problems(folder, ALL) == []


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
        written_folder(source(**splits), tmp_path / "dataset", needed, None)
    assert not (tmp_path / "dataset").exists() or not any((tmp_path / "dataset").iterdir())


def test_one_file_is_no_training_data(source, tmp_path):
    args = DatasetArguments(dataset_name=f"{source(train=[record('q', 'a')]).dataset_name}/train.jsonl")
    with pytest.raises(UserError, match=r"has no split train \(it has: one file\); .* a folder"):
        written_folder(args, tmp_path / "dataset", ALL[:2], None)


def test_a_test_alone_needs_a_test_alone(source, tmp_path):
    folder, _ = written_folder(source(test=[record("q", "a")]), tmp_path / "dataset", ["test"], None)
    assert read_lines(folder / "test.source") == ["q"]


def test_what_is_written_stays_while_its_source_does(source, tmp_path, capsys):
    splits = {"train": [record("q", "a", "b")], "val": [record("q", "a")]}
    parent = tmp_path / "dataset"
    (parent / ".ab.1.tmp").mkdir(parents=True)  # a killed run's
    folder, digest = written_folder(source(**splits), parent, ALL[:2], None)
    assert not (parent / ".ab.1.tmp").exists()
    before = (folder / "train.source").stat().st_mtime_ns
    assert written_folder(source(**splits), parent, ALL[:2], digest) == (folder, digest)
    assert "as they were read before" in capsys.readouterr().out
    assert (folder / "train.source").stat().st_mtime_ns == before

    changed = source(**splits | {"train": [record("q", "b")]})
    with pytest.raises(UserError, match=r"is not what the run in .* was begun with: .* restore it, or give another"):
        written_folder(changed, parent, ALL[:2], digest)
    assert list(parent.iterdir()) == [folder]
    other, other_digest = written_folder(changed, parent, ALL[:2], None)
    assert other != folder and other_digest != digest
    assert read_lines(other / "train.target") == ["b"] and read_lines(folder / "train.target") == ["a"]
    swapped = DatasetArguments(dataset_name=changed.dataset_name, answers_column="question")
    folder, _ = written_folder(swapped, parent, ALL[:2], None)
    assert read_lines(folder / "train.target") == ["q"]
    assert load_json(folder / "dataset.json")["source"]["answers_column"]


@pytest.mark.parametrize("name", ["train.qa", "train.source", "dataset.json"])
@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_text("{}\n")])
def test_what_is_lost_or_changed_is_written_again(harm, name, source, tmp_path):
    args = source(train=[record("q", "a", "b")], val=[record("q", "a")])
    folder, digest = written_folder(args, tmp_path / "dataset", ALL[:2], None)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    harm(folder / name)
    assert written_folder(args, tmp_path / "dataset", ALL[:2], digest) == (folder, digest)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_others_wait_for_the_files_of_this_data_set(source, tmp_path):
    splits = {"train": [record("q", "a")], "val": [record("q", "a")]}
    parent = tmp_path / "dataset"
    written_folder(source(**splits), parent, ALL[:2], None)
    args = source(**splits | {"train": [record("q", "b")]})
    with pytest.raises(RankError, match=r"is not there after --rank_timeout 0\.3: rank 0 has failed, or sees another"):
        awaited_folder(args, parent, ALL[:2], 0.3)
    first = threading.Timer(0.3, written_folder, (args, parent, ALL[:2], None))
    first.start()
    folder, _ = awaited_folder(args, parent, ALL[:2], 30)
    assert read_lines(folder / "train.target") == ["b"]
    first.join()
