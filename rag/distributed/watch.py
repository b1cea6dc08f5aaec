"""Looks after the ranks of a job that share this machine: one that is lost or stopped ends the job, and is named.

    watch = RankWatch(peers_of(launched), rank, step=lambda: f"step {trainer.global_step}", launched=launched)
    watch.start()
    try: ...                            # collective calls
    except RuntimeError as error:       # one of them failed
        watch.explain(str(error))
    watch.leave()

Over gloo a rank hears of the loss of another at once; on GPUs, or where the other is only stopped, it may wait without
end. The kernel knows: it is asked every second. Of the ranks that are left the machine's first says what happened.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rag.distributed.beats import SECONDS_TO_JOIN, Beats
from rag.distributed.stopped import StoppedClock, is_gone, is_stopped

# Seconds that a rank has to end by itself when another one is lost: what it has started is to be stopped, too.
PATIENCE = 30.0
INTERVAL = 1.0  # seconds between two looks
# Of a rank that leaves because another one was lost; and of all where the user asked one to end.
LEFT_ALONE = 75
ASKED_TO_END = (128 + signal.SIGTERM, 128 + signal.SIGINT)
LAUNCHER = "RAG_LAUNCHER_PID"  # of rank 0, in the environment of the ranks that it launched


def peers_of(launched: list[subprocess.Popen]) -> dict[int, psutil.Process]:
    """The other ranks of this machine, by LOCAL_RANK: what this process launched, or its launcher and siblings."""
    if launched:
        return {rank: psutil.Process(process.pid) for rank, process in enumerate(launched, start=1)}
    if "LOCAL_RANK" not in os.environ:
        return {}
    parent, peers = psutil.Process(os.getppid()), {}
    for process in parent.children():
        try:
            rank = process.environ().get("LOCAL_RANK", "")
        except psutil.Error:
            continue
        if rank.isdigit() and process.pid != os.getpid():
            peers[int(rank)] = process
    return peers | ({0: parent} if is_launched_by_rank_zero() else {})


def is_launched_by_rank_zero() -> bool:
    return os.environ.get(LAUNCHER) == str(os.getppid())


class RankWatch(threading.Thread):
    """Watches the other ranks of this machine.

    Args:
        peers: by LOCAL_RANK.
        rank: this one, among those of all machines.
        step: says where this rank is.
        launched: those of `peers` that are this process's children, in order from LOCAL_RANK 1.
        clock: says who has been stopped for too long.
        beats: of a job on several machines; they end with the watch.
    """

    def __init__(
        self,
        peers: dict[int, psutil.Process],
        rank: int,
        step: Callable[[], str],
        launched: list[subprocess.Popen] | None = None,
        clock: StoppedClock | None = None,
        beats: Beats | None = None,
    ):
        super().__init__(daemon=True)
        self.peers, self.rank, self.step, self.launched = peers, rank, step, launched or []
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.launcher = peers[0] if 0 in peers and is_launched_by_rank_zero() else None
        self.clock, self.beats = clock or StoppedClock(), beats
        self.left = threading.Event()
        self.lost: str | None = None  # which rank, and how
        self.is_told = False

    def run(self) -> None:
        if self.beats is not None:
            self.beats.start()
        while not self.left.wait(INTERVAL):
            if self._look():
                break
        if not self.left.wait(PATIENCE):
            self._tell(self.lost or "a rank has ended and this one waits for it")
            for process in self.launched:
                process.kill()
            os._exit(1)

    def explain(self, problem: str) -> None:
        """After a collective call has failed: one rank of this machine prints which of them was lost, else the problem.

        Args:
            problem: what this rank knows.
        """
        deadline = time.monotonic() + 2 * INTERVAL
        while not self._look() and self.lost is None and time.monotonic() < deadline:
            if not self.launched:  # nobody tells us how a sibling ended; of the launcher the next look does
                siblings = {rank: process for rank, process in self.peers.items() if process != self.launcher}
                gone = [rank for rank, process in sorted(siblings.items()) if is_gone(process)]
                self.lost = f"{self._named(gone[0])} was lost" if gone else None
            time.sleep(0.1)
        if self.lost is None and self.beats is not None and (silent := self.beats.silent()):
            problem = f"not heard of any more: {silent}; {problem}"
        self._tell(self.lost or problem)
        if self.peers and not self.launched and self.launcher is None:
            time.sleep(INTERVAL)  # the others look, too, and are not to find this one gone

    def leave(self) -> None:
        """From now on ranks may end. No thread is left that Python would end in the middle of torch's code."""
        self.left.set()
        if self.beats is not None:
            self.beats.leave()
        if self.is_alive():
            self.join(SECONDS_TO_JOIN)

    def _look(self) -> bool:
        """Whether the job cannot go on."""
        statuses = {rank: process.poll() or 0 for rank, process in enumerate(self.launched, start=1)}
        failed = {rank: status for rank, status in statuses.items() if status != 0}
        for rank, status in failed.items():
            if status < 0:
                self._lose(f"{self._named(rank)} was killed ({signal.Signals(-status).name})")
            elif status not in (LEFT_ALONE, *ASKED_TO_END):  # it has said why
                self.lost = self.lost or f"{self._named(rank)} has ended with status {status}, its own message says why"
        if failed:
            return True
        if self.launcher is not None and is_gone(self.launcher):
            self._lose(f"{self._named(0)} was killed")
            return True
        stopped = self.clock.stood_still(self.peers.values())
        if stopped and self._speaks():
            rank = next(rank for rank, process in self.peers.items() if process == stopped[0])
            self._lose(f"{self._named(rank)} was stopped (SIGSTOP) and stood still for {self.clock.patience:g} s")
            stopped[0].kill()
        return bool(stopped)

    def _lose(self, lost: str) -> None:
        self.lost = self.lost or lost
        self._tell(self.lost)

    def _named(self, local_rank: int) -> str:
        return f"rank {self.rank - self.local_rank + local_rank} (process {self.peers[local_rank].pid})"

    def _speaks(self) -> bool:
        """Whether it is this rank of those of the machine that says what happened: the first that runs."""
        if self.launched:
            return True
        if self.launcher is not None:
            return self.local_rank == 1 and (is_gone(self.launcher) or is_stopped(self.launcher))
        return all(
            rank > self.local_rank or is_gone(process) or is_stopped(process) for rank, process in self.peers.items()
        )

    def _tell(self, problem: str) -> None:
        if not self.is_told and self._speaks():
            self.is_told = True
            tell(f"{problem}; rank {self.rank} was at {self.step()}; the same command resumes")


def tell(problem: str) -> None:
    """Print a problem as `run_script` does, from where the job is ended."""
    print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr, flush=True)
