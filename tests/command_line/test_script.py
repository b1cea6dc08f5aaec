"""How a script ends where the disk refuses a path that a flag names, and what a terminal sees of strangers' texts."""

import errno
import logging
import os

import pytest

from rag.command_line.script import run_script
from rag.errors import UserError


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


def test_no_escape_code_of_a_message_reaches_the_terminal(monkeypatch, capsys, caplog):
    code = "\x1b]0;x\x07\u202e\x85\ud800"

    def main(args):
        logging.getLogger("rag").warning("%s %d%%", code, 7)
        raise UserError(f"one {code}\ntwo\tö")

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["eval_rag.py"])
    factory = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit):
            run_script(lambda: None, main)
    finally:
        logging.setLogRecordFactory(factory)
    shown = r"\x1b]0;x\x07\u202e\x85\ud800"
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"eval_rag.py: error: one {shown}",
        "eval_rag.py: error: two\tö",
    ]
    assert caplog.messages == [f"{shown} 7%"]
