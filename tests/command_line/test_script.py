"""How a script ends where the disk refuses a path that a flag names."""

import errno
import os

import pytest

from rag.command_line.script import run_script


def end(monkeypatch, error: OSError, *words: str):
    """The status with which a script of these words ends where this happens in it."""

    def main(args):
        raise error

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["eval_rag.py", *words])
    with pytest.raises(SystemExit) as raised:
        run_script(lambda: None, main)
    return raised.value.code


@pytest.mark.parametrize(
    "words", [["--data_dir", "in/data"], ["--data_dir=in/data"], ["--k", "1", "--data_dir", "in/data/"]]
)
def test_the_flag_that_names_the_path_is_told(monkeypatch, capsys, words):
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "in/data/train.source")
    assert end(monkeypatch, error, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_rag.py: error: --data_dir in/data")
    assert "in/data/train.source cannot be used (Permission denied)" in line


def test_what_no_flag_names_stays_what_it_is(monkeypatch):
    for name in ("elsewhere/train.source", "in/dat", None):
        error = OSError(errno.EACCES, "no", name)
        with pytest.raises(OSError, match="no") as raised:
            end(monkeypatch, error, "--data_dir", "in/data")
        assert raised.value is error
