"""rag/files.py: lines, JSON, files and folders that appear whole or not at all, room on the disk."""

import os
from types import SimpleNamespace

import pytest

from rag import files as files_module
from rag.errors import UserError
from rag.files import (
    atomic_folder,
    atomic_write,
    free_bytes,
    load_json,
    read_lines,
    read_state,
    remove,
    save_json,
    shown,
    space_problems,
    write_lines,
)


def test_lines_end_at_newlines_and_nowhere_else(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\x85\x0c\rthree\n\n".encode())
    assert read_lines(path) == ["one\u2028still one", "two\x0b\x85\x0c", "three", ""]


@pytest.mark.parametrize(
    ("text", "lines"), [("", []), ("\n", [""]), ("a", ["a"]), ("a\n", ["a"]), ("a\n\n", ["a", ""])]
)
def test_no_phantom_line_at_the_end(tmp_path, text, lines):
    (tmp_path / "f").write_text(text)
    assert read_lines(tmp_path / "f") == lines


def test_written_lines_come_back(tmp_path):
    lines = ["a", "", "Łódź\u2028b", " c ", ""]
    write_lines(lines, tmp_path / "new" / "f")
    assert read_lines(tmp_path / "new" / "f") == lines
    with pytest.raises(AssertionError):
        write_lines(["two\nlines"], tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin is not UTF-8 \(byte 3"):
        read_lines(tmp_path / "latin")


def test_a_broken_write_leaves_the_old_file_and_no_rest(tmp_path):
    save_json({"title": "Łódź"}, tmp_path / "f.json")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "f.json") as file:
        file.write("half")
        raise RuntimeError
    assert load_json(tmp_path / "f.json") == {"title": "Łódź"}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    save_json({"name": (name := os.fsdecode(b"Lodz \xff"))}, tmp_path / "f.json")  # of a file, which is not UTF-8
    assert load_json(tmp_path / "f.json") == {"name": name}
    with atomic_write(tmp_path / "b", "wb") as file:
        file.write(b"\r\n")
    assert (tmp_path / "b").read_bytes() == b"\r\n"


def test_a_folder_takes_its_place_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_files_and_folders_are_removed_whole(tmp_path):
    for name in ("folder", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    left = tmp_path / f".folder.{os.getpid()}.old"  # by a run that was killed, of the same process id
    left.mkdir()
    (left / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").touch()
    for name in ("folder", ".hidden", "link", "file", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_space_is_added_up_by_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        files_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if path.exists() else -1)
    )
    assert free_bytes(tmp_path / "to" / "be" / "made") == 100
    assert space_problems("--x y", {tmp_path / "a": 60, tmp_path / "b" / "c": 40}, "free some") == []
    assert space_problems("--x y", {tmp_path / "a": 60, tmp_path / "b" / "c": 1041}, "free some") == [
        f"--x y: 1,101 bytes are needed and 100 are free at {tmp_path}; free some"
    ]


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rag.files.LONGEST_LINE", 100)
    monkeypatch.setattr("rag.files.CHUNK", 30)
    path = tmp_path / "f"
    for lines, end in ((["x" * 100, "y" * 100], b"\n"), (["x" * 99] * 9, b"\r"), ([""] * 999, b"\n")):
        path.write_bytes(b"".join(line.encode() + end for line in lines))
        assert read_lines(path) == lines
    for content in (b"x" * 101, b"a\n" + b"x" * 101 + b"\nb\n", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} has a line of more than 100 bytes"):
            read_lines(path)


def test_a_link_is_followed_only_where_it_was_asked_for(tmp_path):
    for name in ("own", "strangers"):
        (tmp_path / name).write_text("old")
        (tmp_path / f"{name}_link").symlink_to(tmp_path / name)
    write_lines(["new"], tmp_path / "own_link", follow=True)
    write_lines(["new"], tmp_path / "strangers_link")
    assert (tmp_path / "own").read_text() == "new\n" and (tmp_path / "own_link").is_symlink()
    assert (tmp_path / "strangers").read_text() == "old" and not (tmp_path / "strangers_link").is_symlink()


def test_an_unfinished_file_of_the_same_name_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f".x.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    with atomic_write(tmp_path / "x") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "victim").read_text() == "kept"


def test_no_json_is_read_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.json", "/dev/zero"):
        with pytest.raises(ValueError, match="a pipe or a device"):
            load_json(path)


def test_no_json_is_read_that_is_larger_than_any(tmp_path):
    with open(tmp_path / "x.json", "w") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        load_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="damaged"):
        read_state(tmp_path / "x.json", "remove it")


def test_paths_are_shown_from_here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shown(tmp_path / "here" / "output" / "a.txt") == "output/a.txt"
    for path in (tmp_path / "here", tmp_path / "other", "output/a.txt", "../a.txt", "facebook/rag-sequence-nq"):
        assert shown(path) == str(path)
