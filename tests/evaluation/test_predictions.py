"""A predictions file is continued where it broke off, and never taken for another's."""

import os

import pytest

from rag.errors import UserError
from rag.evaluation.predictions import Predictions, differences, file_identity, missing_batches
from rag.files import load_json, read_lines

QUESTIONS = [f"question {n}" for n in range(5)]
SETTINGS = {"model": {"path": "a", "digest": "1"}, "num_beams": 4, "index": None}


def answered(questions):
    return [f"answer to {question}" for question in questions]


def make(path, settings=SETTINGS, stop_after=None, **kwargs):
    """Run an evaluation of batches of two; returns the questions that were answered in it."""
    predictions = Predictions(str(path), QUESTIONS, settings, **kwargs)
    predictions.start({"kind": "Flat"})
    done = []
    for batch in missing_batches(len(predictions.lines), len(QUESTIONS), 2)[:stop_after]:
        questions = QUESTIONS[batch.start : batch.stop]
        answers = answered(questions)
        predictions.append(batch.start, answers, [{"answer": answer} for answer in answers])
        done += questions
    return done


def test_batches_lie_where_they_lay_before():
    assert missing_batches(0, 5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert missing_batches(3, 5, 2) == [range(2, 4), range(4, 5)]
    assert missing_batches(4, 5, 2) == [range(4, 5)]
    assert missing_batches(5, 5, 2) == []


def assert_complete(path):
    assert read_lines(path) == answered(QUESTIONS)
    predictions = Predictions(str(path), QUESTIONS, SETTINGS)
    assert predictions.is_complete and predictions.index == {"kind": "Flat"}
    assert [record["id"] for record in predictions.records] == [1, 2, 3, 4, 5]
    assert [record["answer"] for record in predictions.records] == predictions.lines


def test_a_whole_run_is_kept(tmp_path):
    path = tmp_path / "new" / "predictions.txt"
    assert make(path) == QUESTIONS
    assert_complete(path)
    assert {file.name for file in path.parent.iterdir()} == {
        "predictions.txt", "predictions.txt.jsonl", "predictions.txt.settings.json",
    }  # fmt: skip
    assert make(path) == []


@pytest.mark.parametrize("cut", range(0, 75, 7))
def test_a_killed_run_is_continued_from_its_last_whole_line(tmp_path, cut):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=2)
    whole = path.read_bytes()
    path.write_bytes((whole + "änswer".encode()[:2])[: len(whole) + 2 - cut])
    kept = path.read_bytes().count(b"\n")
    assert make(path) == QUESTIONS[kept // 2 * 2 :]  # a batch that was half-written is answered as a whole
    assert_complete(path)


def test_half_written_records_are_made_whole(tmp_path):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=1)
    with open(tmp_path / "predictions.txt.jsonl", "a") as file:  # killed between the two files, inside a record
        file.write('{"id": 3, "question": "question 2", "answer": "x"}\n{"id": 4, "ques')
    assert make(path) == QUESTIONS[2:]
    assert_complete(path)


def test_lost_records_keep_their_place(tmp_path):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=1)
    (tmp_path / "predictions.txt.jsonl").unlink()
    make(path)
    records = Predictions(str(path), QUESTIONS, SETTINGS).records
    assert records[1] == {"id": 2, "question": "question 1"} and records[2]["answer"] == "answer to question 2"


def test_empty_answers_are_lines_too(tmp_path):
    predictions = Predictions(str(tmp_path / "p"), QUESTIONS, SETTINGS)
    predictions.start({})
    predictions.append(0, ["", "a", "", "", ""], [{}] * 5)
    assert Predictions(str(tmp_path / "p"), QUESTIONS, SETTINGS).lines == ["", "a", "", "", ""]


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=1)
    before = path.read_bytes()
    other = {**SETTINGS, "num_beams": 1, "index": {"path": "i", "digest": "2"}}
    with pytest.raises(UserError, match=r"num_beams 4 \(now 1\), index None \(now i\).* --recalculate"):
        make(path, other)
    assert path.read_bytes() == before
    assert make(path, other, recalculate=True) == QUESTIONS
    assert load_json(f"{path}.settings.json")["settings"] == other


def test_differences_tell_files_by_content_where_there_is_content():
    def one(path, digest):
        return {"model": {"path": path, "digest": digest}}

    assert differences(one("a", "1"), one("b", "1")) == []  # moved
    assert differences(one("a", "1"), one("a", "2")) == ["model a (its content has changed)"]
    assert differences(one("a", "1"), one("b", "2")) == ["model a (now b)"]
    assert differences(one("hub/a", None), one("hub/b", None)) == ["model hub/a (now hub/b)"]
    assert differences({}, {"k": 1}) == ["k None (now 1)"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_file_of_another_program_is_taken_with_a_warning(tmp_path, caplog, end):
    path = tmp_path / "predictions.txt"
    path.write_bytes(("\n".join("abcde") + end).encode())
    predictions = Predictions(str(path), QUESTIONS, SETTINGS)
    assert predictions.lines == list("abcde") and not predictions.origin_known
    assert "nothing beside it tells" in caplog.text


def test_a_short_file_of_another_program_is_continued_but_stays_of_unknown_origin(tmp_path):
    path = tmp_path / "predictions.txt"
    path.write_text("a\nb\nhal")
    assert make(path) == QUESTIONS[2:]
    assert read_lines(path) == ["a", "b", *answered(QUESTIONS[2:])]
    assert not Predictions(str(path), QUESTIONS, SETTINGS).origin_known


def test_too_many_lines_are_refused(tmp_path):
    make(tmp_path / "p")
    with pytest.raises(UserError, match="5 lines for 4 questions"):
        Predictions(str(tmp_path / "p"), QUESTIONS[:4], SETTINGS)


def test_file_identity_follows_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    names = ("config.json", "*.safetensors")
    first = file_identity(folder, names)
    (folder / "notes.txt").write_text("not of the model")
    os.utime(folder / "config.json", (0, 0))
    folder.rename(tmp_path / "moved")
    assert file_identity(tmp_path / "moved", names)["digest"] == first["digest"]
    with open(tmp_path / "moved" / "model.safetensors", "r+b") as file:
        file.seek(2_500_000)
        file.write(b"\1")
    assert file_identity(tmp_path / "moved", names)["digest"] != first["digest"]
    assert file_identity("facebook/rag-sequence-nq") == {"path": "facebook/rag-sequence-nq", "digest": None}
    single = file_identity(tmp_path / "moved" / "config.json")
    (tmp_path / "copy").write_text("{}")
    assert file_identity(tmp_path / "copy")["digest"] == single["digest"]


def test_file_identity_reads_slices_of_a_large_file(tmp_path):
    with open(tmp_path / "big", "wb") as file:
        file.truncate(20 << 30)  # sparse
    assert file_identity(tmp_path / "big")["digest"]
