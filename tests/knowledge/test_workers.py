"""Several processes, or a Ray cluster's tasks, embed what one process does."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from datasets import load_from_disk

from rag.distributed.stopped import StoppedClock
from rag.errors import UserError
from rag.knowledge import workers as workers_module
from rag.knowledge.workers import EncoderPlan, EncodingResources, NodeWorkers, RayWorkers, encoding_workers
from rag.models.checkpoints import load_tokenizer, weights_digest
from rag.models.encoders import load_encoder
from tests.conftest import PASSAGES, ROOT, assert_equal_but_for_rounding
from tests.knowledge.test_use_own_knowledge_dataset import run

MANY = 100  # times four shards of passages: a warm worker has seconds of work, in which it can be killed


@pytest.fixture(scope="module")
def embedder(context_encoder_folder):
    from rag.knowledge.embedding import PassageEmbedder

    folder = str(context_encoder_folder)
    return PassageEmbedder(load_encoder(folder, "context"), load_tokenizer(folder), batch_size=2)


@pytest.fixture(scope="module")
def plan(context_encoder_folder, embedder):
    return EncoderPlan(str(context_encoder_folder), "auto", weights_digest(embedder.encoder), 2, "cpu", torch.float32)


@pytest.fixture(scope="module")
def ray_workers(embedder, plan):
    """Tasks of a cluster of our own, which ends with them."""
    ray = pytest.importorskip("ray")
    with RayWorkers(embedder, plan, "auto", gpus_a_task=0) as workers:
        yield workers
    assert not ray.is_initialized()


def embedded(workers, times: int = 1) -> dict:
    """The vectors of four shards of so many times the same passages, by their paths."""
    shards = {"a": PASSAGES[:3], "b": PASSAGES[3:5], "c": PASSAGES[5:], "d": PASSAGES[:1]}
    shards = {path: shard * times for path, shard in shards.items()}
    written = {}
    done = list(
        workers.embed_shards(iter(shards.items()), lambda path, shard, vectors: written.update({path: vectors}))
    )
    assert sum(done) == 9 * times
    return written


def assert_equal_to(expected: dict, found: dict) -> None:
    assert_equal_but_for_rounding(found, expected)


def test_processes_of_this_node(embedder, plan, monkeypatch):
    monkeypatch.setattr(workers_module, "StoppedClock", lambda: StoppedClock(patience=0.5))
    others = set(multiprocessing.active_children())
    with NodeWorkers(embedder, plan, processes=2) as workers:
        assert_equal_to(embedded(embedder), embedded(workers))
        idle = set(multiprocessing.active_children()) - others
        assert len(idle) == 2
        os.kill(idle.pop().pid, signal.SIGSTOP)  # it may hold the lock with which the other one waits for work
    wrong = replace(plan, digest="of other weights")
    with NodeWorkers(embedder, wrong, processes=1) as workers, pytest.raises(UserError, match="has other weights on"):
        embedded(workers)


def test_tasks_of_a_cluster_of_our_own(ray_workers, embedder, plan, flags, tmp_path, monkeypatch):
    assert_equal_to(embedded(embedder), embedded(ray_workers))
    with monkeypatch.context() as patch:
        patch.setattr(ray_workers, "plan", replace(plan, digest="of other weights"))
        with pytest.raises(UserError, match="has other weights on"):
            embedded(ray_workers)
    # The script uses the cluster that is there, and leaves it up.
    run(flags, **{"--distributed": "ray", "--num_shards": 4})
    run(flags, **{"--output_dir": tmp_path / "alone", "--num_shards": 4})
    spread, alone = (load_from_disk(tmp_path / name / "my_knowledge_dataset") for name in ("out", "alone"))
    assert spread["text"] == alone["text"]
    assert_equal_but_for_rounding(*(np.array(one["embeddings"], dtype=np.float32) for one in (spread, alone)))
    with pytest.raises(UserError, match="--gpus_per_task 64 is more than"), RayWorkers(embedder, plan, "auto", 64):
        pass
    assert_equal_to(embedded(embedder), embedded(ray_workers))


class Killer(threading.Thread):
    """Sends SIGKILL to processes below this one that have a word in their command line or title.

    Args:
        word: what tells them from others.
        count: how many, one after the other; each once it has been seen.
    """

    def __init__(self, word: str, count: int):
        super().__init__(daemon=True)
        self.word, self.count, self.killed, self.over = word, count, set(), threading.Event()

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while len(self.killed) < self.count and not self.over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if self.word in " ".join(process.cmdline()) and process.pid not in self.killed:
                        time.sleep(0.1)  # let it begin
                        process.kill()
                        self.killed.add(process.pid)
                        break
                except psutil.Error:  # it has just ended
                    pass


def test_a_stopped_process_is_told(embedder, plan, monkeypatch):
    monkeypatch.setattr(workers_module, "StoppedClock", lambda: StoppedClock(patience=0.5))

    others = set(multiprocessing.active_children())

    def stop_all(path, shard, vectors):
        for process in set(multiprocessing.active_children()) - others:
            os.kill(process.pid, signal.SIGSTOP)

    with pytest.raises(UserError, match=r"--num_encoding_processes 2: process \d+ was stopped \(SIGSTOP\)"):  # noqa: SIM117
        with NodeWorkers(embedder, plan, 2) as workers:
            shards = {str(number): PASSAGES for number in range(8)}
            list(workers.embed_shards(iter(shards.items()), stop_all))


def test_a_killed_process_is_told_and_nothing_is_lost(embedder, plan, flags, tmp_path):
    more = {"--num_shards": 4, "--batch_size": 1}
    with Killer("spawn_main", 1) as killer, pytest.raises(UserError) as error:
        run(flags, **more, **{"--num_encoding_processes": 2})
    assert len(killer.killed) == 1
    assert "one of 2 processes that encode was killed" in str(error.value)
    assert "give fewer --num_encoding_processes" in str(error.value)
    assert not (tmp_path / "out" / "my_knowledge_dataset").exists()
    assert run(flags, **more).passages == 11


def test_shards_of_a_killed_ray_worker_are_encoded_by_another(ray_workers, embedder):
    with Killer("ray::embed_shard", 2) as killer:
        assert_equal_to(embedded(embedder, MANY), embedded(ray_workers, MANY))
    assert len(killer.killed) == 2


def test_ray_workers_that_die_too_often_are_told(ray_workers, embedder, plan, monkeypatch):
    monkeypatch.setattr(workers_module, "RETRIES", 0)
    with (
        pytest.raises(UserError, match="--distributed ray: of 1 tries to encode a shard the last one ended so: "),
        RayWorkers(embedder, plan, "auto", gpus_a_task=0) as workers,
        Killer("ray::embed_shard", 1),
    ):
        embedded(workers, MANY)


def test_threads_that_tokenize(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert EncodingResources().tokenizer_threads(None) == 1
    assert EncodingResources().tokenizer_threads(3) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert EncodingResources(processes=1).tokenizer_threads(None) == cores
    assert EncodingResources(processes=10**6).tokenizer_threads(None) == 1
    assert EncodingResources(processes=1).tokenizer_threads(1) == 1


def test_who_embeds(embedder, plan):
    def workers(**resources):
        resources = EncodingResources(**resources)
        return encoding_workers(embedder, replace(plan, device=resources.device), resources)

    with workers() as workers_or_embedder:
        assert workers_or_embedder is embedder and EncodingResources().device == "cpu"
    with workers(processes=3) as several:
        assert isinstance(several, NodeWorkers) and several.processes == 3
    on_ray = workers(distributed="ray", gpus_per_task=0.5)
    assert (on_ray.plan.device, on_ray.gpus_a_task) == ("cuda", 0.5)
    on_ray = workers(distributed="ray")
    assert (on_ray.plan.device, on_ray.gpus_a_task) == ("cpu", 0)


ORPHANING = """
import multiprocessing, os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from rag.knowledge.workers import _start_worker
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    gpus = spawn.Queue()
    gpus.put("")
    pool = ProcessPoolExecutor(1, spawn, initializer=_start_worker, initargs=(gpus, 1))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    script = tmp_path / "orphaning.py"
    script.write_text(ORPHANING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # The worker shares the pipe: this returns when both are gone.
    command = [sys.executable, script]
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    number, until = int(killed.stdout), time.monotonic() + 10  # its pipe closes before it is gone
    while psutil.pid_exists(number) and psutil.Process(number).status() != "zombie" and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie"
