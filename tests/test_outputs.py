"""Outputs that cannot be written are told before the work, a full disk in one line."""

import errno
import os

import pytest

from rag.errors import UserError
from rag.outputs import output_file_problems, output_folder_problems, writing


def paths(folder):
    """Paths at which nothing can be written, by the reason."""
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "names nothing": ["", " ", "a\0b"],
        f"{folder / 'file'} is a file": [folder / "file" / "x", folder / "file" / "x" / "y"],
        "is a link to": [folder / "link", folder / "loop"],
        "cannot be written (": ["/proc/x", "/proc/x/y", folder / ("x" * 300)],
        "is a device or a pipe": ["/dev/null", "/dev/full"],
    }


@pytest.mark.parametrize("problems", [output_file_problems, output_folder_problems])
def test_what_cannot_be_written(tmp_path, problems):
    for reason, those in paths(tmp_path).items():
        for path in those:
            (line,) = problems("--out", path)
            assert line.startswith("--out ") and reason in line, line


def test_no_file_has_the_name_of_a_folder_or_lies_behind_one_that_is_missing(tmp_path):
    for path in (f"{tmp_path}/new/", f"{tmp_path}/none/../new"):
        (line,) = output_file_problems("--out", path)
        assert line.startswith("--out ")
    assert output_folder_problems("--out", f"{tmp_path}/new/") == []
    (tmp_path / "there").mkdir()
    assert output_file_problems("--out", f"{tmp_path}/there/../new") == []


def test_folders_have_names_in_utf8(tmp_path):
    (line,) = output_folder_problems("--out", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert line.startswith("--out ") and "is not UTF-8" in line
    assert output_file_problems("--out", os.fsdecode(bytes(tmp_path) + b"/\xff")) == []


def test_what_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "link", tmp_path / "new", tmp_path / "a" / "b" / "new"):
        assert output_file_problems("--out", path) == []
    for path in (tmp_path, tmp_path / "new", tmp_path / "a" / "b"):
        assert output_folder_problems("--out", path) == []
    assert "is a folder, not a file" in output_file_problems("--out", tmp_path)[0]
    assert "is a file, not a folder" in output_folder_problems("--out", tmp_path / "file")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]  # asking has left nothing


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "x"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),  # torch
    Exception("I/O error: No space left on device (os error 28)"),  # safetensors, tokenizers
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # Arrow
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_line(error):
    message = r"^--out x cannot be written: the disk is full; make room, .* again$"
    with pytest.raises(UserError, match=message), writing("--out", "x"):
        raise error
    with pytest.raises(UserError, match=message), writing("--out", "x"):
        try:
            raise error
        finally:
            raise RuntimeError("cannot close")  # it hides the reason


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "", "/elsewhere/x"), RuntimeError("x"), UserError("x"), KeyError("x")):
        with pytest.raises(type(error)) as raised, writing("--out", tmp_path / "x"):
            raise error
        assert raised.value is error


def test_a_disk_that_became_read_only(tmp_path):
    beside = os.fspath(tmp_path / ".p.txt.1.tmp")
    with pytest.raises(UserError, match="Read-only file system"), writing("--out", tmp_path / "p.txt"):
        raise OSError(errno.EROFS, "", beside)
