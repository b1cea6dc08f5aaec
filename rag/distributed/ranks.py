"""The ranks of a running job, talking to each other with errors that name the rank and the step.

    ranks = Ranks(timeout=600)                                # collective
    config = ranks.from_rank_zero("start", read_config)       # read on rank 0, known to all
    with joined_job(timeout=600) as ranks: ...                # under torchrun: the job's process group, too

Their gloo group is made inside the running job, so that no port and no network interface has to be chosen. One process
needs no group: it is rank 0 of 1.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rag.distributed.addresses import choose_interface
from rag.distributed.beats import Beats
from rag.distributed.watch import RankWatch, peers_of
from rag.errors import RankError, ReportedError, UserError

GOOD, USER_ERROR, ERROR = range(3)


def world_size() -> int:
    """Ranks of the running job; 1 where no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined_job(timeout: float) -> Iterator["Ranks"]:
    """The ranks that torchrun started this process with; leaving ends the process group that was made for them.

    Collective. One process makes no group, and a group that is already up is used and left as it is.

    Args:
        timeout: as of `Ranks`.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or world_size() > 1:
        yield Ranks(timeout)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size} and {', '.join(missing)} not set: start the ranks with torchrun, or unset WORLD_SIZE"
        )
    one_node = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ["WORLD_SIZE"]
    choose_interface(os.environ["MASTER_ADDR"], one_node)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=2 * timeout))
    except RuntimeError as error:
        raise RankError(f"rank {os.environ['RANK']}: the {size} ranks did not meet ({reason_of(error)})") from error
    watch: RankWatch | None = None
    try:
        ranks = Ranks(timeout)
        beats = None if one_node else Beats(ranks.rank, size, lambda: ranks.step)
        watch = RankWatch(peers_of([]), ranks.rank, lambda: ranks.step, beats=beats)
        watch.start()
        yield ranks
    except RankError as error:
        if watch is None:
            raise
        watch.explain(str(error))
        sys.exit(1)
    finally:
        if watch is not None:
            watch.leave()
        dist.destroy_process_group()


class Ranks:
    """Messages between rank 0 and the other ranks.

    Collective: every rank makes one, and calls its methods in the same order.

    Args:
        timeout: seconds that rank 0 waits for the slowest rank. The others wait twice as long for rank 0, so that it is
            rank 0, which knows who is missing, that speaks first.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.size = world_size()
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.others = range(1, self.size)
        self.step = "start"  # the last one that was begun
        if self.size > 1:
            try:
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout))
            except RuntimeError as error:
                raise RankError(
                    f"rank {self.rank}: the ranks did not all meet within {2 * timeout:g} s ({reason_of(error)}); if "
                    "they run on several nodes, name the network interface between them in GLOO_SOCKET_IFNAME"
                ) from error

    def deadline(self) -> float:
        """When rank 0 stops waiting for the step that begins now, in monotonic seconds."""
        return time.monotonic() + self.timeout

    def send(self, array: np.ndarray, to: int, step: str) -> "Transfer":
        """Begin to send an array; an empty one is not sent. `wait` returns once it is on its way."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        problem = f"{step}: rank {to} does not take its message"
        return Transfer(lambda: dist.isend(tensor, dst=to, group=self.group), tensor, problem, self.timeout)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, step: str) -> "Transfer":
        """Begin to receive an array: the sooner the quicker it comes. Arrays come in the order they were sent in."""
        self.step = step
        tensor = torch.empty(shape, dtype=dtype)
        hint = "has failed, left or is late" if source else "has failed or left, its own message says why"
        problem = f"{step}: rank {source} {hint}"
        return Transfer(lambda: dist.irecv(tensor, src=source, group=self.group), tensor, problem, self.timeout)

    def send_outcome(self, to: int, step: str, error: Exception | None = None, text: str = "", values=()) -> list:
        """Tell another rank that this one's part of a step went well, with a text and int64 values, or why not.

        Returns the transfers to wait for.
        """
        if error is not None:
            text = str(error) if isinstance(error, UserError | RankError) else f"{type(error).__name__}: {error}"
        status = GOOD if error is None else USER_ERROR if isinstance(error, UserError) else ERROR
        message = np.frombuffer(text.encode(), dtype=np.uint8).copy()
        head = np.concatenate([[status, message.size], np.ravel(values)]).astype(np.int64)
        return [self.send(head, to, step), self.send(message, to, step)]

    def receive_outcome(self, source: int, step: str, size: int = 0) -> "PendingOutcome":
        """Begin to receive another rank's `send_outcome` with `size` integers."""
        return PendingOutcome(self, source, step, size)

    def from_rank_zero(self, step: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns on rank 0 (anything JSON can hold), on every rank; or its error. Collective."""
        if self.size == 1:
            return work()
        if self.rank != 0:
            return json.loads(self.receive_outcome(0, step).wait()[0])
        result, failure = _attempt(work)
        self.announce(step, failure, json.dumps(result))
        return result

    def on_rank_zero(self, step: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns, which stays on rank 0; None on the others, who share its error. Collective."""
        if self.size == 1:
            return work()
        if self.rank != 0:
            self.receive_outcome(0, step).wait()
            return None
        result, failure = _attempt(work)
        self.announce(step, failure)
        return result

    def all_or_none(self, step: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns on this rank; an error on one of them is raised on every rank. Collective."""
        if self.size == 1:
            return work()
        result, failure = _attempt(work)
        if self.rank != 0:
            PendingReport(self, step, failure).wait()
            return result
        _, problem = self._wait_for_all([self.receive_outcome(rank, step) for rank in self.others])
        self.announce(step, failure or problem)
        return result

    def in_rounds(self, name: str, rounds: Iterable, work: Callable[[Any], Any], collect: Callable[[Any, list], None]):
        """Work that the ranks share, round by round, and rank 0 collects; an error on one is raised on every rank.

        Collective. A rank works one round ahead of what rank 0 has collected, so that not every round is as long as its
        slowest part.

        Args:
            name: what a round is called in messages.
            rounds: as many on every rank.
            work: on every rank, from a round to this rank's part of it, anything JSON can hold.
            collect: on rank 0, from a round to nothing, given the parts of it, rank by rank.
        """
        if self.size == 1:
            for each in rounds:
                collect(each, [work(each)])
        elif self.rank == 0:
            self._collect_rounds(name, rounds, work, collect)
        else:
            self._contribute_rounds(name, rounds, work)

    def _collect_rounds(self, name: str, rounds: Iterable, work: Callable, collect: Callable) -> None:
        for number, each in enumerate(rounds, start=1):
            step = f"{name} {number}"
            outcomes = [self.receive_outcome(rank, step) for rank in self.others]
            part, failure = _attempt(work, each)
            texts, problem = self._wait_for_all(outcomes)
            failure = failure or problem
            if failure is None:
                _, failure = _attempt(collect, each, [part, *map(json.loads, texts)])
            self.announce(step, failure)

    def _contribute_rounds(self, name: str, rounds: Iterable, work: Callable) -> None:
        report = None
        for number, each in enumerate(rounds, start=1):
            text, failure = _attempt(lambda round_: json.dumps(work(round_)), each)
            if report is not None:
                report.wait()
            report = PendingReport(self, f"{name} {number}", failure, text)
            if failure is not None:
                report.wait()
        if report is not None:
            report.wait()

    def _wait_for_all(self, outcomes: list["PendingOutcome"]) -> tuple[list[str], Exception | None]:
        """Rank 0: the texts of the others and the first of their errors; all are waited for."""
        deadline = self.deadline()
        results = [_attempt(lambda pending: pending.wait(deadline)[0], outcome) for outcome in outcomes]
        return [text for text, _ in results], next((error for _, error in results if error is not None), None)

    def announce(self, step: str, failure: Exception | None, text: str = "", values=None) -> None:
        """Rank 0's end of a step: every rank learns how it went, then rank 0 raises the failure, if there is one.

        Args:
            values: for each of the others the values it waits for.
        """
        transfers = [
            transfer
            for rank in self.others
            for transfer in self.send_outcome(rank, step, failure, text, values[rank - 1] if values else ())
        ]
        for transfer in transfers:
            try:
                transfer.wait()
            except RankError as error:  # the others still have to learn it
                failure = failure or error
        if failure is not None:
            raise failure


class PendingOutcome:
    """How another rank's part of a step went, on its way here.

    Args:
        ranks: this rank's.
        source: the other rank.
        step: for the messages.
        size: int64 values that come with it.
    """

    def __init__(self, ranks: Ranks, source: int, step: str, size: int = 0):
        self.ranks, self.source, self.step = ranks, source, step
        self.head = ranks.receive((2 + size,), torch.int64, source, step)

    def wait(self, deadline: float | None = None) -> tuple[str, np.ndarray]:
        """Text and values; raises the other rank's error, after `deadline` (monotonic seconds) a `RankError`."""
        status, length, *_ = values = self.head.wait(deadline)
        message = self.ranks.receive((int(length),), torch.uint8, self.source, self.step)
        text = message.wait(deadline).tobytes().decode()
        if status == USER_ERROR:
            raise UserError(text) if self.source else ReportedError(text)  # rank 0 raises what it announces, too
        if status == ERROR:
            raise RankError(f"{self.step}: rank {self.source} failed: {text}")
        return text, values[2:]


class PendingReport:
    """How this rank's part of a step went, on its way to rank 0, whose answer is waited for."""

    def __init__(self, ranks: Ranks, step: str, failure: Exception | None, text: str | None = None):
        self.failure = failure
        self.answer = ranks.receive_outcome(0, step)
        self.transfers = ranks.send_outcome(0, step, failure, text or "")

    def wait(self) -> None:
        """Raises the error that rank 0 announces."""
        try:
            self.answer.wait()
        except (RankError, UserError) as error:
            raise error from self.failure
        for transfer in self.transfers:
            transfer.wait()


class Transfer:
    """An array under way between two ranks; whatever goes wrong with it is raised by `wait`.

    Args:
        begin: starts it and returns torch's handle; not called for an empty array, which does not travel.
        tensor: what is sent, or where it is received.
        problem: how a failure's message begins.
        timeout: half of the seconds to wait where `wait` is given no deadline.
    """

    def __init__(self, begin: Callable[[], Any], tensor: torch.Tensor, problem: str, timeout: float):
        self.tensor = tensor
        self.problem = problem
        self.timeout = timeout
        self.work, self.failure = None, None
        try:
            if tensor.numel():
                self.work = begin()
        except RuntimeError as error:
            self.failure = error

    def wait(self, deadline: float | None = None) -> np.ndarray:
        """The array; after `deadline` (monotonic seconds) a `RankError`."""
        seconds = 2 * self.timeout if deadline is None else max(deadline - time.monotonic(), 0.001)
        try:
            if self.failure is not None:
                raise self.failure
            if self.work is not None:
                self.work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise RankError(f"{self.problem} ({reason_of(error)})") from error
        return self.tensor.numpy()


def _attempt(work: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """What `work(*args)` returns, or its error."""
    try:
        return work(*args), None
    except Exception as error:
        return None, error


def reason_of(error: RuntimeError) -> str:
    """The first words of gloo or NCCL, without the place in its source and its advice."""
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]
