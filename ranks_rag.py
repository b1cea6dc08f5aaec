"""The ranks of a running job, talking to each other with errors that name the rank and the step.

    ranks = Ranks(timeout=600)                                # collective
    settings = ranks.from_rank_zero("start", read_settings)   # read on rank 0, known to all

Their gloo group is made inside the running job, so that no port and no network interface has to be chosen. One process
needs no group: it is rank 0 of 1.
"""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cli_rag import UserError

GOOD, USER_ERROR, ERROR = range(3)


class RankError(RuntimeError):
    """Another rank failed, left, or kept this one waiting for too long; the message names it and the step."""


def world_size() -> int:
    """Ranks of the running job; 1 where no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
        """When rank 0 stops waiting for the step that begins now."""
        return time.monotonic() + self.timeout

    def send(self, array: np.ndarray, to: int, step: str) -> None:
        """Send an array and wait until it is taken; an empty one is not sent."""
        if array.size:
            try:
                dist.send(torch.from_numpy(np.ascontiguousarray(array)), dst=to, group=self.group)
            except RuntimeError as error:
                raise RankError(f"{step}: rank {to} does not take its message ({_reason(error)})") from error

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, step: str, deadline=None) -> np.ndarray:
        """Receive an array; after `deadline` (monotonic seconds), or twice the timeout, give up with a `RankError`."""
        array = torch.empty(shape, dtype=dtype)
        if array.numel():
            seconds = 2 * self.timeout if deadline is None else max(deadline - time.monotonic(), 0.001)
            try:
                dist.irecv(array, src=source, group=self.group).wait(timedelta(seconds=seconds))
            except RuntimeError as error:
                hint = "has failed, left or is late" if source else "has failed or left, its own message says why"
                raise RankError(f"{step}: rank {source} {hint} ({_reason(error)})") from error
        return array.numpy()

    def send_outcome(self, to: int, step: str, error: Exception | None, text: str = "") -> None:
        """Tell another rank that this one's part of a step went well, with a text, or failed, and why."""
        if error is not None:
            text = str(error) if isinstance(error, UserError | RankError) else f"{type(error).__name__}: {error}"
        status = GOOD if error is None else USER_ERROR if isinstance(error, UserError) else ERROR
        message = np.frombuffer(text.encode(), dtype=np.uint8).copy()
        self.send(np.array([status, message.size]), to, step)
        self.send(message, to, step)

    def receive_outcome(self, source: int, step: str, deadline=None) -> str:
        """The text of another rank's `send_outcome`; its error is raised here too."""
        status, length = self.receive((2,), torch.int64, source, step, deadline)
        text = self.receive((int(length),), torch.uint8, source, step, deadline).tobytes().decode()
        if status == USER_ERROR:
            raise UserError(text)
        if status == ERROR:
            raise RankError(f"{step}: rank {source} failed: {text}")
        return text

    def from_rank_zero(self, step: str, make: Callable[[], Any]) -> Any:
        """What `make()` returns on rank 0 (anything JSON can hold), on every rank; so with its error. Collective."""
        if self.rank != 0:
            return json.loads(self.receive_outcome(0, step))
        result, failure = None, None
        try:
            result = make()
        except Exception as error:
            failure = error
        self.tell_the_others(step, failure, json.dumps(result))
        return result

    def all_or_none(self, step: str, act: Callable[[], None]) -> None:
        """`act()` on every rank; an error on one of them is raised on every rank. Collective."""
        failure = None
        try:
            act()
        except Exception as error:
            failure = error
        if self.rank != 0:
            self.send_outcome(0, step, failure)
            self.receive_outcome(0, step)
            return
        deadline = self.deadline()
        for rank in self.others:
            try:
                self.receive_outcome(rank, step, deadline)
            except (RankError, UserError) as error:
                failure = failure or error
        self.tell_the_others(step, failure)

    def tell_the_others(self, step: str, failure: Exception | None, text: str = "") -> None:
        """Rank 0's end of a step: every rank hears how it went, then rank 0 raises what went wrong, if anything did."""
        for rank in self.others:
            try:
                self.send_outcome(rank, step, failure, text)
            except RankError as error:  # the others are still to hear it
                failure = failure or error
        if failure is not None:
            raise failure


def _reason(error: RuntimeError) -> str:
    """Gloo's own words, without the place in its source and its advice."""
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]
