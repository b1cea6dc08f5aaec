"""The ranks of a running job, talking to each other with errors that name the rank and the step.

    ranks = Ranks(timeout=600)                                # collective
    settings = ranks.from_rank_zero("start", read_settings)   # read on rank 0, known to all
    with joined_job(timeout=600) as ranks: ...                # under torchrun: the job's process group, too

Their gloo group is made inside the running job, so that no port and no network interface has to be chosen. One process
needs no group: it is rank 0 of 1.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rag.errors import ReportedError, UserError

GOOD, USER_ERROR, ERROR = range(3)


class RankError(RuntimeError):
    """Another rank failed, left, or kept this one waiting for too long; the message names it and the step."""


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
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=2 * timeout))
    except RuntimeError as error:
        raise RankError(f"rank {os.environ['RANK']}: the {size} ranks did not meet ({_reason(error)})") from error
    try:
        yield Ranks(timeout)
    finally:
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
        if self.size > 1:
            try:
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout))
            except RuntimeError as error:
                raise RankError(
                    f"rank {self.rank}: the ranks did not all meet within {2 * timeout:g} s ({_reason(error)}); if "
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

    def receive_outcome(self, source: int, step: str, size: int = 0) -> Callable[..., tuple[str, np.ndarray]]:
        """Begin to hear another rank's `send_outcome` with `size` integers.

        Returns a function that waits (until a deadline) for text and values; it raises the other rank's error.
        """
        head = self.receive((2 + size,), torch.int64, source, step)

        def wait(deadline: float | None = None) -> tuple[str, np.ndarray]:
            status, length, *_ = values = head.wait(deadline)
            text = self.receive((int(length),), torch.uint8, source, step).wait(deadline).tobytes().decode()
            if status == USER_ERROR:
                raise UserError(text) if source else ReportedError(text)  # what rank 0 tells it also raises
            if status == ERROR:
                raise RankError(f"{step}: rank {source} failed: {text}")
            return text, values[2:]

        return wait

    def from_rank_zero(self, step: str, make: Callable[[], Any]) -> Any:
        """What `make()` returns on rank 0 (anything JSON can hold), on every rank; so with its error. Collective."""
        if self.size == 1:
            return make()
        if self.rank != 0:
            return json.loads(self.receive_outcome(0, step)()[0])
        result, failure = _attempt(make)
        self.tell_the_others(step, failure, json.dumps(result))
        return result

    def on_rank_zero(self, step: str, make: Callable[[], Any]) -> Any:
        """What `make()` returns, which stays on rank 0; None on the others, who share its error. Collective."""
        made = []
        self.from_rank_zero(step, lambda: made.append(make()))
        return made[0] if made else None

    def all_or_none(self, step: str, act: Callable[[], Any]) -> Any:
        """What `act()` returns on this rank; an error on one of them is raised on every rank. Collective."""
        if self.size == 1:
            return act()
        result, failure = _attempt(act)
        if self.rank != 0:
            self._report(step, failure)()
            return result
        _, problem = self._hear_all([self.receive_outcome(rank, step) for rank in self.others])
        self.tell_the_others(step, failure or problem)
        return result

    def in_rounds(self, name: str, rounds: Iterable, act: Callable[[Any], Any], take: Callable[[Any, list], None]):
        """Work that the ranks share, round by round, and rank 0 collects; an error on one is raised on every rank.

        Collective. A rank works one round ahead of what rank 0 has taken, so that not every round is as long as its
        slowest part.

        Args:
            name: what a round is called in messages.
            rounds: as many on every rank.
            act: on every rank, from a round to this rank's part of it, anything JSON can hold.
            take: on rank 0, from a round to nothing, given the parts of it, rank by rank.
        """
        if self.size == 1:
            for one in rounds:
                take(one, [act(one)])
        elif self.rank == 0:
            self._collect_rounds(name, rounds, act, take)
        else:
            self._contribute_rounds(name, rounds, act)

    def _collect_rounds(self, name: str, rounds: Iterable, act: Callable, take: Callable) -> None:
        for number, one in enumerate(rounds, start=1):
            step = f"{name} {number}"
            answers = [self.receive_outcome(rank, step) for rank in self.others]
            own, failure = _attempt(act, one)
            texts, problem = self._hear_all(answers)
            failure = failure or problem
            if failure is None:
                parts = [own, *map(json.loads, texts)]
                _, failure = _attempt(take, one, parts)
            self.tell_the_others(step, failure)

    def _contribute_rounds(self, name: str, rounds: Iterable, act: Callable) -> None:
        hear = None
        for number, one in enumerate(rounds, start=1):
            text, failure = _attempt(lambda one: json.dumps(act(one)), one)
            if hear is not None:
                hear()
            hear = self._report(f"{name} {number}", failure, text)
            if failure is not None:
                hear()
        if hear is not None:
            hear()

    def _report(self, step: str, failure: Exception | None, text: str | None = None) -> Callable[[], None]:
        """Begin to tell rank 0 how this rank's part of a step went; returns a function that waits for its answer."""
        answer = self.receive_outcome(0, step)
        sent = self.send_outcome(0, step, failure, text or "")

        def hear() -> None:
            try:
                answer()
            except (RankError, UserError) as error:
                raise error from failure
            for transfer in sent:
                transfer.wait()

        return hear

    def _hear_all(self, answers: list[Callable]) -> tuple[list[str], Exception | None]:
        """Rank 0: the texts of the others, from `receive_outcome`, and the first of their errors; all are heard out."""
        deadline = self.deadline()
        heard = [_attempt(lambda answer: answer(deadline)[0], answer) for answer in answers]
        return [text for text, _ in heard], next((error for _, error in heard if error is not None), None)

    def tell_the_others(self, step: str, failure: Exception | None, text: str = "", values=None) -> None:
        """Rank 0's end of a step: every rank hears how it went, then rank 0 raises what went wrong, if anything did.

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
            except RankError as error:  # the others are still to hear it
                failure = failure or error
        if failure is not None:
            raise failure


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
            raise RankError(f"{self.problem} ({_reason(error)})") from error
        return self.tensor.numpy()


def _attempt(act: Callable, *args) -> tuple[Any, Exception | None]:
    """What `act(*args)` returns, or its error."""
    try:
        return act(*args), None
    except Exception as error:
        return None, error


def _reason(error: RuntimeError) -> str:
    """Gloo's own words, without the place in its source and its advice."""
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]
