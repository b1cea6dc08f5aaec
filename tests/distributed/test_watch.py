"""Who is stopped, killed or gone is told in one line, and ended; what is left of a Ray cluster goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from rag.distributed import ray_cluster, watch
from rag.distributed.beats import Beats
from rag.distributed.ray_cluster import ClusterGuard
from rag.distributed.ray_remover import processes_of
from rag.distributed.stopped import StoppedClock, is_gone, is_stopped
from rag.distributed.watch import LAUNCHER, LEFT_ALONE, RankWatch, peers_of


@pytest.fixture
def start():
    """Starts a process that sleeps, or any other; it is gone when the test ends."""
    started = []

    def start_one(*command: str, **environment: str) -> subprocess.Popen:
        started.append(subprocess.Popen(command or ["sleep", "60"], env=os.environ | environment))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def stop(process: subprocess.Popen) -> psutil.Process:
    process.send_signal(signal.SIGSTOP)
    assert until(lambda: is_stopped(psutil.Process(process.pid)))
    return psutil.Process(process.pid)


def watch_of(launched: list, patience: float = 30.0) -> RankWatch:
    return RankWatch(peers_of(launched), 0, lambda: "step 7", launched, StoppedClock(patience))


# --- Stopped processes ------------------------------------------------------------------------------------------------


def test_a_stopped_process_stands_still_by_the_time_this_one_runs(start):
    running, stopped = psutil.Process(start().pid), stop(start())
    clock = StoppedClock(patience=5)
    clock.looked -= 1.5
    assert clock.stood_still([running, stopped]) == []
    clock.looked -= 3600  # this process was stopped for an hour: Ctrl-Z stops whole jobs
    assert clock.stood_still([running, stopped]) == []
    clock.looked -= 2
    assert clock.stood_still([running, stopped]) == [stopped]
    stopped.send_signal(signal.SIGCONT)
    assert until(lambda: not is_stopped(stopped))
    assert clock.stood_still([running, stopped]) == [] and clock.seconds == {}


def test_a_process_that_nobody_asked_about_is_gone(start):
    process = start()
    assert not is_gone(psutil.Process(process.pid))
    seen = psutil.Process(process.pid)
    process.kill()
    assert until(lambda: is_gone(seen))  # a zombie
    process.wait()
    assert is_gone(seen)


# --- Ranks ------------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_once(start, capfd):
    first, second = start("sh", "-c", f"exit {LEFT_ALONE}"), start()
    watched = watch_of([first, second])
    second.kill()
    assert until(lambda: first.poll() and second.poll() and watched._look())
    watched.explain("Connection closed by peer")
    assert capfd.readouterr().err == (
        f"{Path(sys.argv[0]).name}: error: rank 2 (process {second.pid}) was killed (SIGKILL); rank 0 was at step 7; "
        "the same command resumes\n"
    )


def test_a_stopped_rank_is_named_and_ended(start, capfd):
    running, stopped = start(), start()
    watched = watch_of([running, stopped], patience=0)
    assert not watched._look()
    stop(stopped)
    watched.clock.looked -= 1
    assert watched._look()
    assert f"rank 2 (process {stopped.pid}) was stopped (SIGSTOP)" in capfd.readouterr().err
    assert stopped.wait(5) == -signal.SIGKILL and running.poll() is None


@pytest.mark.parametrize(
    ("status", "words"),
    [(1, "has ended with status 1, its own message says why"), (143, "lost"), (LEFT_ALONE, "lost"), (None, "lost")],
)
def test_a_rank_that_ended_by_itself_is_named_where_a_collective_call_fails(status, words, start, capfd, monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    rank = start() if status is None else start("sh", "-c", f"exit {status}")
    watched = watch_of([rank])
    assert until(lambda: status is None or watched._look())
    assert capfd.readouterr().err == ""  # it has said why, or was asked to
    watched.explain("lost")
    assert words in capfd.readouterr().err


def test_a_rank_that_waits_for_a_lost_one_is_ended(start, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    monkeypatch.setattr(watch, "PATIENCE", 0.01)
    other = start()
    watched = watch_of([start("sh", "-c", "exit 1"), other])
    watched.run()
    assert ended == [1] and other.wait(5) == -signal.SIGKILL
    assert "rank 1" in capfd.readouterr().err


# Ranks as rank 0 (or torchrun) starts them: what each finds of the others, and what it says where one is lost.
RANK = """
import json, os, sys, time
from rag.distributed.watch import RankWatch, peers_of
time.sleep(0.5)
rank = int(os.environ["LOCAL_RANK"])
watch = RankWatch(peers_of([]), rank, lambda: "step 7")
print(json.dumps({r: p.pid for r, p in watch.peers.items()}), flush=True)
sys.stdin.readline()
watch.explain("a call failed")
"""
STARTER = """
import json, os, subprocess, sys
ours, program = sys.argv[1:]
os.environ["RAG_LAUNCHER_PID"] = str(os.getpid() if ours == "launched" else 0)
ranks = [1, 2] if ours == "launched" else [0, 1, 2]
pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
command = [sys.executable, "-c", program]
started = [subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)}, **pipe) for rank in ranks]
print(json.dumps([[p.pid for p in started], [json.loads(p.stdout.readline()) for p in started]]), flush=True)
if ours == "launched":
    os.kill(os.getpid(), 9)  # which ends their standard input
started[0].kill()
started[0].wait()
for p in started[1:]:
    p.stdin.close()
for p in started[1:]:
    p.wait()
"""


@pytest.mark.parametrize("ours", ["launched", "torchrun"])
def test_the_first_rank_that_is_left_says_which_was_lost(ours):
    shown = subprocess.run([sys.executable, "-c", STARTER, ours, RANK], capture_output=True, text=True, timeout=60)
    (pids, peers), launched = json.loads(shown.stdout), ours == "launched"
    for rank, found in zip([1, 2] if launched else [0, 1, 2], peers, strict=True):
        assert {0, 1, 2} - {rank} == set(map(int, found))
    lost = peers[0]["0"] if launched else pids[0]
    fate = "was killed" if launched else "was lost"
    assert shown.stderr == (
        f"-c: error: rank 0 (process {lost}) {fate}; rank 1 was at step 7; the same command resumes\n"
    )


def test_a_launcher_that_ends_between_two_looks_was_killed_all_the_same(start, monkeypatch, capfd):
    launcher = psutil.Process(start().pid)
    monkeypatch.setattr(watch, "is_launched_by_rank_zero", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    watched, looks = RankWatch({0: launcher}, 1, lambda: "step 7"), []

    def look() -> bool:
        looks.append(watched)
        if len(looks) > 1:
            return RankWatch._look(watched)
        launcher.kill()  # right after the first look, which found it running
        return not until(lambda: is_gone(launcher))

    monkeypatch.setattr(watched, "_look", look)
    watched.explain("a call failed")
    assert "was killed; rank 1 was at step 7" in capfd.readouterr().err


def test_a_process_that_was_started_alone_has_no_peers(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(LAUNCHER, "1")
    assert peers_of([]) == {}


def test_a_rank_of_another_machine_that_is_not_heard_of_is_named(monkeypatch, capfd):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first, second, third = (Beats(rank, 3, lambda rank=rank: f"step {70 + rank}", interval=0.05) for rank in range(3))
    watched = RankWatch({}, 0, lambda: "step 7", beats=first)
    for beats in (first, second, third):
        beats.start()
    assert until(lambda: len(first.heard) == 2 and all(beat[0] != "0" for beat, _ in first.heard.values()))
    assert first.silent() == second.silent() == ""
    third.leave()  # as one that is stopped
    assert until(first.silent)
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    watched.explain("timed out")
    assert "not heard of any more: rank 2 (last heard of at step 72); timed out;" in capfd.readouterr().err
    second.leave()
    watched.leave()
    assert first.left.is_set()


# --- Ray's processes --------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_cluster_is_killed_and_its_folder_removed(start, tmp_path):
    folder = tmp_path / "rag_ray_1"
    (folder / "logs").mkdir(parents=True)
    named = start("sh", "-c", "sleep 60; true", f"--session-dir={folder}/session")
    log = f"exec -a ray::DashboardAgent sleep 60 > {folder}/logs/agent.out"
    titled, rank = start("bash", "-c", log), start("bash", "-c", log.replace("ray::DashboardAgent", "rank"))
    assert until(lambda: set(processes_of(str(folder))) == {named.pid, titled.pid})
    remover = ray_cluster._remover(str(folder))
    remover.communicate()  # the end of its input: the starter was killed
    assert named.wait(5) == titled.wait(5) == -signal.SIGKILL
    assert not folder.exists() and rank.poll() is None


@pytest.mark.parametrize("fate", ["killed", "stopped", "left"])
def test_a_job_ends_with_rays_own_processes(fate, start, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(ClusterGuard, "_end_at_once", lambda guard: ended.append(True))
    monkeypatch.setattr(ray_cluster, "SECONDS_TO_END", 0.01)
    monkeypatch.setattr(ray_cluster, "DAEMONS", ("sleep",))
    daemon = start()
    assert until(lambda: psutil.Process(daemon.pid).name() == "sleep")
    guard = ClusterGuard(remover=0)
    guard.clock.patience = 0
    assert [process.pid for process in guard.daemons] == [daemon.pid]
    if fate == "left":
        guard.leave()
    stop(daemon) if fate == "stopped" else daemon.kill()
    guard.run()
    words = {"killed": "has died", "stopped": "was stopped (SIGSTOP)"}
    assert bool(ended) == (fate != "left")
    assert fate == "left" or f"Ray's sleep (process {daemon.pid}) {words[fate]}" in capfd.readouterr().err
