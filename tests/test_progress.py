"""rag/progress.py: lines with rate and time left where there is no terminal."""

from rag import progress as progress_module
from rag.progress import Pace, progress


def test_progress_logs_lines_when_piped(capsys, monkeypatch):
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert list(progress([[1, 2], [3, 4], [5, 6], [7]], 7, "Answering", "questions", size=len))[-1] == [7]
    assert capsys.readouterr().err.splitlines() == [
        "Answering: 6 of 7 questions, 0.2 questions/s, 00:04 left",
        "Answering: 7 questions in 00:32, 0.2 questions/s",
    ]


def test_the_time_left_is_by_the_pace_so_far(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    now = 100.0
    pace = Pace("steps")
    now = 130.0
    assert (pace.time_left(0, 40), pace.time_left(10, 40), pace.time_left(40, 40)) == ("?", "01:30", "00:00")


def test_lines_become_rarer_up_to_one_a_minute(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    now, due = 0, []
    pace = Pace("steps")
    for now in range(301):
        if pace.line_is_due():
            due.append(now)
    assert due == [20, 60, 120, 180, 240, 300]


def test_the_end_is_told_once(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert list(progress([1, 2], 2, "Answering", "questions")) == [1, 2]
    assert capsys.readouterr().err.splitlines() == [
        "Answering: 1 of 2 questions, 0.1 questions/s, 00:20 left",
        "Answering: 2 questions in 00:40, 0.1 questions/s",
    ]
