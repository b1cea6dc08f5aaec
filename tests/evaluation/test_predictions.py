"""A predictions file is continued where it broke off, and never taken for another's."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from rag.errors import UserError
from rag.evaluation.predictions import Predictions, differences, file_identity, missing_batches
from rag.files import load_json, read_lines, save_json, write_lines

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


def test_empty_answers_are_lines_too(tmp_path):
    predictions = Predictions(str(tmp_path / "p"), QUESTIONS, SETTINGS)
    predictions.start({})
    predictions.append(0, ["", "a", "", "", ""], [{}] * 5)
    assert Predictions(str(tmp_path / "p"), QUESTIONS, SETTINGS).lines == ["", "a", "", "", ""]


# --- Files that were damaged or changed since -------------------------------------------------------------------------


def flip(data: bytes, place: float) -> bytes:
    at = int(len(data) * place)
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def without_line(number: int):
    return lambda data: b"".join(line for n, line in enumerate(data.splitlines(True)) if n != number)


@pytest.mark.parametrize(
    ("end", "change", "what"),
    [
        ("", without_line(1), "line 2: it is not what .*jsonl has there"),
        ("", lambda data: data.replace(b"question 2", b"question 7"), "line 3: it is not"),
        ("", lambda data: b"one more\n" + data, "line 1: it is not|has 6 lines for 5 questions"),
        ("", lambda data: data.replace(b"\n", b"", 1), "line 1: it is not"),
        ("", lambda data: data.replace(b"answer", b"\xff\xfe", 1), "line 1 is not UTF-8"),
        (".jsonl", without_line(0), "line 1: it is not"),
        (".jsonl", without_line(2), "line 3: it is not"),
        (".jsonl", lambda data: data.replace(b'"id": 2', b'"id": 3'), "line 2: it is not"),
        (".jsonl", lambda data: data.replace(b"question", b"\x00\xffuestion", 1), "line 1 is not UTF-8"),
        (".jsonl", lambda data: b"3\n" * 5, "line 1: it is not"),
        (".jsonl", lambda data: b"[" * 100_000 + b"\n" + data, "line 1: it is not"),
        (".jsonl", lambda data: b"", "its records, .*, are gone"),
        (".jsonl", None, "its records, .*, are gone"),
        (".settings.json", None, "is missing; it belongs to --predictions_path"),
        (".settings.json", lambda data: data[: len(data) // 2], "is damaged .*--predictions_path"),
        (".settings.json", lambda data: b"[]", "is damaged .*--predictions_path"),
        (".settings.json", lambda data: b"{}", "is damaged .*--predictions_path"),
        (".settings.json", lambda data: b"\xff" + data, "is damaged .*--predictions_path"),
        (".settings.json", lambda data: data.replace(b'"a"', b'"b"'), "is damaged .*--predictions_path"),
        (".settings.json", lambda data: data.replace(b'"digest": "', b'"digesu": "'), "is damaged|was made with"),
    ],
)
@pytest.mark.parametrize("stop_after", [2, None])
def test_what_was_changed_is_refused_with_its_line(tmp_path, end, change, what, stop_after):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=stop_after)
    file = Path(f"{path}{end}")
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"(?:{what}).*; give another path, or --recalculate to overwrite it") as error:
        make(path)
    assert "--predictions_path" in str(error.value) and "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert make(path, recalculate=True) == QUESTIONS
    assert_complete(path)


@pytest.mark.parametrize("end", ["", ".jsonl", ".settings.json"])
def test_no_flipped_byte_is_another_result(tmp_path, end):
    make(tmp_path / "whole")
    make(tmp_path / "half", stop_after=2)
    whole = [Path(f"{tmp_path / 'whole'}{end}").read_bytes() for end in ("", ".jsonl")]
    refused = 0
    for begin in ("half", "whole"):
        for place in range(100):
            for other in ("", ".jsonl", ".settings.json"):
                shutil.copy(f"{tmp_path / begin}{other}", f"{tmp_path / 'p'}{other}")
            file = Path(f"{tmp_path / 'p'}{end}")
            file.write_bytes(flip(file.read_bytes(), place / 100))
            try:
                make(tmp_path / "p")
            except UserError:
                refused += 1
                continue
            assert [Path(f"{tmp_path / 'p'}{end}").read_bytes() for end in ("", ".jsonl")] == whole
    assert refused > 100


@pytest.mark.parametrize("stop_after", [2, None])
def test_lines_that_lost_their_records_are_predicted_again(tmp_path, caplog, stop_after):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=stop_after)
    records = Path(f"{path}.jsonl")
    records.write_bytes(records.read_bytes()[: len(records.read_bytes()) // 2])
    kept = records.read_bytes().count(b"\n")
    assert make(path) == QUESTIONS[kept // 2 * 2 :]
    assert_complete(path)
    assert f"{(stop_after or 2.5) * 2 - kept:g} of its" in caplog.text


def test_files_of_an_old_version_are_taken_where_question_and_answer_fit(tmp_path, caplog):
    path = tmp_path / "predictions.txt"
    make(path)
    settings, records = load_json(f"{path}.settings.json"), Path(f"{path}.jsonl")
    del settings["digest"]
    save_json(settings, f"{path}.settings.json")
    with pytest.raises(UserError, match="line 1: it is not what"):  # some records have theirs
        make(path)
    old = [
        {"id": n, "question": question, "answer": f"answer to {question}"} for n, question in enumerate(QUESTIONS, 1)
    ]
    write_lines(map(json.dumps, [*old[:3], old[3] | {"answer": "x"}, old[4]]), records)
    with pytest.raises(UserError, match="line 4: it is not what"):
        make(path)
    write_lines(map(json.dumps, old), records)
    assert make(path) == [] and "an old version made it" in caplog.text
    assert_complete(path)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "predictions.txt"
    make(path, stop_after=1)
    predictions = Predictions(str(path), QUESTIONS, SETTINGS)
    predictions.start({"kind": "Flat"})

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path(f"{path}.jsonl").stat().st_size + 30  # in the middle of a record
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=r"--predictions_path .* cannot be written: the disk is full; make room"):
            predictions.append(2, answered(QUESTIONS[2:4]), [{"answer": answer} for answer in answered(QUESTIONS[2:4])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(f"{path}.jsonl").stat().st_size == size
    assert make(path) == QUESTIONS[2:]
    assert_complete(path)


# --- Other settings, other programs -----------------------------------------------------------------------------------


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
