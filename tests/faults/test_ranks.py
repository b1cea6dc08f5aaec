"""Jobs of several processes of which one dies, stops or is asked to end: the rest ends, too, and leaves nothing.

Each job is a process of its own, which starts the others: none is forked from this one.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.faults.jobs import Job, differences, write_longer_data
from tests.faults.processes import words_of

pytestmark = pytest.mark.faults
PATIENCE = 120  # seconds from the fault to the end of the last process
TWO = {"--devices": 2, "--num_train_epochs": 200, "--do_predict": None}
RETRIEVERS = {
    "pytorch": {"--distributed_retriever": "pytorch"},
    "local": {"--distributed_retriever": "local"},
    "ray": {"--distributed_retriever": "ray", "--num_retrieval_workers": 2},
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@dataclass
class Ranks:
    """A job and all the processes that it has started, also those that outlive the first."""

    job: Job
    launcher: tuple = ()
    all: dict[int, psutil.Process] = field(default_factory=dict)

    def __enter__(self):
        self.log = self.job.folder.with_suffix(".log")
        temporary = self.job.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [sys.executable, *self.launcher, str(ROOT / self.job.script), *words_of(self.job.flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        self.job.before = self.job._state()
        with open(self.log, "wb") as log:
            self.first = subprocess.Popen(
                command, cwd=self.job.folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_):
        for process in self.alive():
            process.kill()
        self.first.wait()

    def alive(self) -> list[psutil.Process]:
        for process in list(self.all.values()) + (
            [psutil.Process(self.first.pid)] if self.first.poll() is None else []
        ):
            try:
                for child in [process, *process.children(recursive=True)]:
                    self.all[child.pid] = child
            except psutil.Error:
                continue
        return [one for one in self.all.values() if one.is_running() and _status(one) != psutil.STATUS_ZOMBIE]

    def wait_until_it_works(self) -> None:
        deadline = time.monotonic() + 120
        names = ("last.ckpt", "p.txt")
        while not any((self.job.out / name).exists() for name in names) and not list(self.job.out.glob(".my*/data*")):
            assert self.first.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            self.alive()
            time.sleep(0.05)
        time.sleep(0.5)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        found = [one for one in self.alive() if self.job.script in " ".join(one.cmdline())
                 and "torch.distributed.run" not in one.cmdline()
                 and one.environ().get("LOCAL_RANK", "0") == str(number)]  # fmt: skip
        return min(found, key=lambda one: one.pid)

    def named(self, pattern: str) -> psutil.Process:
        return next(one for one in self.alive() if re.search(pattern, " ".join(one.cmdline()) or one.name()))

    def end(self) -> str:
        """What was printed, once all processes are gone."""
        deadline = time.monotonic() + PATIENCE
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        text = self.log.read_text(errors="replace")
        assert not left, (left, text[-2000:])
        self.first.wait()
        return text


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return psutil.STATUS_ZOMBIE


@pytest.fixture
def job(world, tmp_path):
    write_longer_data(world.folder)

    def make(kind: str, **changes) -> Job:
        return Job(world, kind, tmp_path / "job", changes={f"--{name}": value for name, value in changes.items()})

    return make


def two_ranks(job, retriever: str, **changes) -> Ranks:
    flags = TWO | RETRIEVERS[retriever] | changes
    return Ranks(job("finetune", **{name.removeprefix("--"): value for name, value in flags.items()}))


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_only_loopback_is_listened_on(job, retriever):
    with two_ranks(job, retriever) as ranks:
        ranks.wait_until_it_works()
        sockets = [one for process in ranks.alive() for one in process.net_connections("tcp")]
        listening = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        assert all(re.match(r"127\.|::1$|::ffff:127\.", address) for address in listening), listening


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_a_rank_is_lost(job, retriever, number, which):
    """All of them end, by the status of the signal where rank 0 was asked to end; nothing is left."""
    if which == signal.SIGSTOP and number == 0:
        pytest.skip("a stopped rank 0 has stopped the job, as Ctrl-Z does")
    with two_ranks(job, retriever) as ranks:
        ranks.wait_until_it_works()
        shared = _shared_memory()
        ranks.rank(number).send_signal(which)
        text = ranks.end()
        assert ranks.first.returncode != 0
        if number == 0 and which in (signal.SIGTERM, signal.SIGINT):
            assert ranks.first.returncode == 128 + which
        if number == 1:
            assert "rank 1" in text or which in (signal.SIGTERM, signal.SIGINT)
        assert _shared_memory() <= shared


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_actor_is_done_without(job, which):
    with two_ranks(job, "ray") as ranks:
        ranks.wait_until_it_works()
        ranks.named("ray::RayRetriever").send_signal(which)
        before = ranks.job._state()
        time.sleep(15)
        assert ranks.first.poll() is None and ranks.job._state() != before
        ranks.first.send_signal(signal.SIGTERM)
        ranks.end()
        assert ranks.first.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["raylet/raylet|/raylet ", "gcs_server", "ray::DashboardAgent"])
def test_a_lost_part_of_ray_ends_the_job(job, name):
    with two_ranks(job, "ray") as ranks:
        ranks.wait_until_it_works()
        ranks.named(name).kill()
        ranks.end()
        assert ranks.first.returncode != 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_of_an_evaluation_is_killed(job, number):
    with Ranks(job("eval", num_beams=8, max_length=40, min_length=39), TORCHRUN) as ranks:
        ranks.wait_until_it_works()
        ranks.rank(number).kill()
        ranks.end()
        assert ranks.first.returncode != 0


def test_an_encoding_process_is_killed(job):
    with Ranks(job("knowledge", num_encoding_processes=2, batch_size=1)) as ranks:
        ranks.wait_until_it_works()
        ranks.named("spawn_main|forkserver").kill()
        text = ranks.end()
        assert ranks.first.returncode == 2 and "error: " in text


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_all_ranks_are_killed_and_go_on(job, tmp_path, seconds):
    with two_ranks(job, "pytorch", **{"--num_train_epochs": 6, "--do_predict": True}) as ranks:
        ranks.end()
        assert ranks.first.returncode == 0
    reference = ranks.job.out.rename(tmp_path / "reference")
    for _ in range(3):
        with Ranks(ranks.job) as ranks:
            ranks.wait_until_it_works()
            time.sleep(seconds)
    with Ranks(ranks.job) as ranks:
        ranks.end()
        assert ranks.first.returncode == 0
    assert not differences(ranks.job.out, reference)
