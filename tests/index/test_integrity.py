"""Checksums, the notes of what was found out about a file, and damage that is told when knowledge is opened."""

import json
import multiprocessing
import os
import shutil
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rag import checksums
from rag.checksums import checksum_size, file_checksum, found_once
from rag.errors import UserError
from rag.index import integrity
from rag.index.index_files import DocumentsPart, IndexDescription, read_description, write_description
from rag.index.integrity import checksums_of, damage, note_undamaged
from rag.index.knowledge_index import KnowledgeIndex
from tests.conftest import DIMENSION


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of this test's own, and no memory of what this process found out."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(checksums, "_notes", {})
    return folder


# --- Notes ------------------------------------------------------------------------------------------------------------


def test_the_checksum_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert file_checksum(path) == "xxh3:99aa06d3014798d86001c324468d497f:0"  # as xxhsum -H2 has it
    path.write_bytes(bytes(3 * checksums.HASHED_AT_A_TIME + 5))
    whole = file_checksum(path)
    assert checksum_size(whole) == 3 * checksums.HASHED_AT_A_TIME + 5
    with open(path, "r+b") as file:
        file.seek(checksums.HASHED_AT_A_TIME + 1)
        file.write(b"\1")
    assert file_checksum(path) != whole


def test_a_file_is_looked_at_once_and_again_when_it_was_written_to(tmp_path, cache, monkeypatch):
    path, looked = tmp_path / "file", []

    def look():
        looked.append(path.read_bytes())
        return len(looked)

    path.write_bytes(b"1")
    for _ in range(2):
        assert found_once(path, "fact", look) == 1
        monkeypatch.setattr(checksums, "_notes", {})  # another process
    assert found_once(path, "other fact", look) == 2
    assert found_once(path, "fact", look) == 1  # is still known
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"2")
    os.utime(path, ns=times)  # as a copy that keeps the times
    assert found_once(path, "fact", look) == 3
    assert found_once(path, "fact", look, again=True) == 4
    for note in (cache / "rag").glob("*.json"):
        note.write_text("{")
    monkeypatch.setattr(checksums, "_notes", {})
    assert found_once(path, "fact", look) == 5  # a damaged note counts for nothing
    assert sorted(file.suffix for file in (cache / "rag").iterdir()) == [".json", ".lock"]


def test_where_no_note_can_be_written_the_process_remembers(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = iter([1, 2])
    assert [found_once(tmp_path / "file", "fact", lambda: next(found)) for _ in range(2)] == [1, 1]


def _look_slowly(path: str, log: str) -> None:
    def look():
        with open(log, "a") as file:
            file.write("looked\n")
        multiprocessing.Event().wait(0.2)
        return True

    assert found_once(path, "fact", look)


def test_of_several_processes_one_does_the_work(tmp_path):
    (tmp_path / "file").touch()
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "file"), str(tmp_path / "log"))
    processes = [context.Process(target=_look_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "looked\n"


def test_old_notes_go(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(checksums, "MOST_NOTES", 10)
    for number in range(40):
        (tmp_path / str(number)).touch()
        found_once(tmp_path / str(number), "fact", lambda: 1)
    assert len(list((cache / "rag").glob("*.json"))) <= 11


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(knowledge, tmp_path):
    """A folder of knowledge with checksums in its index.json."""
    shutil.copytree(knowledge["passages_path"], tmp_path / "kb")
    shutil.copy(knowledge["index_path"], tmp_path / "kb.faiss")
    (tmp_path / "kb/cache-0123.arrow").touch()  # as `datasets` leaves them
    sums = checksums_of(tmp_path, [tmp_path / "kb", tmp_path / "kb.faiss"])
    assert set(sums) == {"kb/data-00000-of-00001.arrow", "kb/dataset_info.json", "kb/state.json", "kb.faiss"}
    write_description(tmp_path, IndexDescription(index="kb.faiss", checksums=sums))
    return tmp_path


def opened(folder) -> KnowledgeIndex:
    index = KnowledgeIndex.load_from_disk(DIMENSION, folder / "kb", folder / "kb.faiss")
    index.init_index()
    return index


def flip(path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip(f / "kb.faiss"), "--index_path .*kb.faiss is damaged: kb.faiss is not what was written"),
        (lambda f: os.truncate(f / "kb.faiss", 0), r"kb.faiss has 0 bytes instead of [\d,]+; build or fetch it again"),
        (lambda f: flip(f / "kb/data-00000-of-00001.arrow", 0.9), "--passages_path .*kb is damaged: kb/data-00000"),
        (lambda f: (f / "kb/data-00000-of-00001.arrow").unlink(), "data-00000-of-00001.arrow is not there"),
        (lambda f: flip(f / "kb/dataset_info.json"), "kb/dataset_info.json is not what was written"),
    ],
)
def test_damage_is_told_when_knowledge_is_opened(folder, change, message):
    opened(folder)
    assert damage(folder, read_description(folder / "kb")) == []
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    assert len(damage(folder, read_description(folder / "kb"))) == 1


def test_files_are_read_at_the_first_opening_alone(folder, monkeypatch):
    read = []
    monkeypatch.setattr(integrity, "file_checksum", lambda path: read.append(path.name) or file_checksum(path))
    for _ in range(2):
        opened(folder)
        monkeypatch.setattr(checksums, "_notes", {})  # another process
        assert len(read) == 4
    os.utime(folder / "kb.faiss")
    opened(folder)
    assert read[4:] == ["kb.faiss"]
    damage(folder, read_description(folder / "kb"), verify=True)
    assert len(read) == 9


def test_what_was_just_written_need_not_be_read(folder, monkeypatch):
    description = read_description(folder / "kb")
    note_undamaged(folder, description)
    monkeypatch.setattr(integrity, "file_checksum", lambda path: pytest.fail(f"{path} is read"))
    opened(folder)
    assert damage(folder, description) == []


def test_of_more_than_some_gigabytes_only_the_smallest_files_are_read(folder, monkeypatch):
    monkeypatch.setattr(integrity, "MOST_HASHED", 2000)
    flip(folder / "kb.faiss")
    description = read_description(folder / "kb")
    sizes = {name: checksum_size(checksum) for name, checksum in description.checksums.items()}
    assert sizes["kb/state.json"] + sizes["kb/dataset_info.json"] < 2000 < sum(sizes.values()) - max(sizes.values())
    flip(folder / "kb/state.json")
    assert [problem.split()[0] for problem in damage(folder, description)] == ["kb/state.json"]
    assert len(damage(folder, description, verify=True)) == 2


def test_knowledge_without_checksums_is_opened(folder):
    write_description(folder, replace(read_description(folder / "kb"), checksums={}))
    assert len(opened(folder)) == 8
    (folder / "index.json").unlink()
    assert len(opened(folder)) == 8


def test_nothing_is_written_beside_knowledge_that_is_read_only(folder):
    before = sorted(folder.rglob("*"))
    for path in [folder, *before]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP))
    opened(folder)
    assert sorted(folder.rglob("*")) == before
    for path in [folder, *before]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


# --- index.json -------------------------------------------------------------------------------------------------------

PART = {"csv_path": "d", "csv_digest": "0", "drop_duplicates": False, "documents": 1, "passages": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"parts": [3]}', b'{"parts": [{}]}', b'{"parts": {}}',
        b'{"index": 3}',
        b'{"dimension": "x"}', b'{"dimension": true}', b'{"index": "../victim/x.faiss"}', b'{"index": "/etc/passwd"}',
        b'{"index": "a/../../x"}', b'{"index": "below/x"}', b'{"checksums": {"../x": "xxh3:00:1"}}', b'{"index": ".."}',
        b'{"checksums": {"/x": "xxh3:00:1"}}', b'{"checksums": {"x": 3}}', b'{"checksums": {"x": "y"}}', b"[" * 10**5,
        b'{"index": "."}', b'{"index": "x/"}', b'{"checksums": {"x": "xxh3:00:%s"}}' % (b"9" * 5000),
        b'{"parts": [{"csv_path": "d", "csv_digest": "0", "passages": 1}]}',
    ],
)  # fmt: skip
def test_any_other_index_json_is_told_in_one_line(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: its index.json cannot be read") as error:
        read_description(tmp_path / "x", "--output_dir")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_damaged(tmp_path, kind):
    os.mkfifo(tmp_path / "x") if kind == "pipe" else (tmp_path / "x").symlink_to("/dev/zero")
    assert damage(tmp_path, IndexDescription(checksums={"x": "xxh3:00:0"})) == ["x is no file"]


def test_warnings_of_encoders_are_printable():
    theirs = SimpleNamespace(model_type="dpr", name_or_path="\x1b[2J-multiset")
    (warning,) = IndexDescription(encoder="\x1b[2J-single-nq").encoder_mismatches(theirs)
    assert warning.isprintable() and "\\x1b[2J-single-nq" in warning


def test_an_index_json_of_any_version_is_read(tmp_path):
    content = {"index": "x.faiss", "parts": [PART], "recall": None, "later": [1], "index_seconds": 3}
    (tmp_path / "index.json").write_text(json.dumps(content))
    description = read_description(tmp_path / "x.faiss")
    assert description.parts == [DocumentsPart("d", "0", False, 1, 1)] and description.is_finished
    assert description.index_seconds == 3
