"""Two runs on one output: the second is told who holds it; the death of the first frees it."""

import json
import multiprocessing
import os
import re
import signal

import pytest

from rag import locks
from rag.errors import UserError
from rag.locks import lock_beside, one_at_a_time


def hold(path, connection) -> None:
    with one_at_a_time(path, "--output_dir", "out"):
        connection.send("held")
        connection.recv()


@pytest.fixture
def holder(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / ".lock", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_the_first_ones_process_and_host(tmp_path, holder):
    message = f"--output_dir out is in use by process {holder.pid} on {os.uname().nodename}; wait for its end"
    with pytest.raises(UserError, match=re.escape(message)), one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        pass


def test_a_sigkill_frees_the_lock_and_the_next_one_holds_it_by_name(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""
    with one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):  # and again by the same process
        pass


def test_what_a_killed_run_started_may_hold_its_lock_a_moment_longer(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename}))  # no such process
    with pytest.raises(UserError, match="in use"), one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        pass
    monkeypatch.setattr(locks, "PATIENCE", 20)
    monkeypatch.setattr(locks.time, "sleep", lambda _: (holder.kill(), holder.join()))
    with one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_lock_that_does_not_say_who_holds_it(tmp_path, holder, content, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_TO_SIGN", 0.05)
    (tmp_path / ".lock").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="process unknown"), one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        pass


def test_half_written_files_of_killed_runs_go(tmp_path):
    dead, alive = 2**22 + 1, os.getppid()
    for name in (f".p.txt.{alive}.tmp", f".p.txt.jsonl.{dead}.tmp", ".p.txt.lock"):
        (tmp_path / name).touch()
    others = [f".other.{dead}.tmp", f".p.txt.tsv.{alive}.tmp", f".p.txt2.{dead}.tmp", f"p.txt.{dead}.tmp"]
    for name in others:
        (tmp_path / name).touch()
    with one_at_a_time(lock_beside(tmp_path / "p.txt"), "--predictions_path", "p.txt"):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".p.txt.lock"])
    with one_at_a_time(tmp_path / ".lock", "--output_dir", "out"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".p.txt.lock", others[-1]]


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / ".p.lock")
    for lock in (tmp_path / ".lock", lock_beside(tmp_path / "p")):
        with pytest.raises(UserError, match=re.escape(f"--x p: its lock {lock}")), one_at_a_time(lock, "--x", "p"):
            pass
    assert (tmp_path / "victim").read_text() == "kept"
