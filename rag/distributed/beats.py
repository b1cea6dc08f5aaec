"""Which rank of another machine was not heard of any more, where all that is known is that it does not answer.

    beats = Beats(rank, world_size, step=lambda: f"step {trainer.global_step}")
    beats.start()
    try: ...                                # collective calls
    except RuntimeError: beats.silent()     # on rank 0: "rank 5 (last heard of at step 87)"

Each rank writes every few seconds to the store at which the ranks have met that it runs, and where it is; rank 0 reads
that. One that was stopped or cut off writes no more. Machines' clocks need not agree.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

INTERVAL = 10.0  # seconds
SECONDS_TO_JOIN = 5.0  # more only where the job falls apart anyway
MISSED = 3  # beats after which a rank is silent


class Beats(threading.Thread):
    """Writes this rank's; on rank 0 also looks after the others'.

    Args:
        rank: this one.
        size: ranks of the job.
        step: says where this rank is.
    """

    def __init__(self, rank: int, size: int, step: Callable[[], str], interval: float = INTERVAL):
        super().__init__(daemon=True)
        self.rank, self.size, self.step, self.interval = rank, size, step, interval
        self.left = threading.Event()
        self.heard: dict[int, tuple[str, float]] = {}  # of each rank its last beat, and when that came here

    def run(self) -> None:
        while not dist.is_initialized():  # the store may not be there yet
            if self.left.wait(1.0):
                return
        try:
            # One of its own: the process group's may be waiting in another thread.
            address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=30)
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            number = 0
            while not self.left.wait(self.interval if number else 0):
                number += 1
                store.set(self._key(self.rank), f"{number} {self.step()}")
                if self.rank == 0:
                    self._listen(store)
        except dist.DistError:  # rank 0 is gone, which its watch tells
            return

    def silent(self) -> str:
        """The ranks that have missed beats, and where they were; "" where there are none or on another rank than 0."""
        last = time.monotonic() - MISSED * self.interval
        return ", ".join(
            f"rank {rank} (last heard of at {beat.partition(' ')[2]})"
            for rank, (beat, came) in sorted(self.heard.items())
            if came < last
        )

    def leave(self) -> None:
        self.left.set()
        if self.is_alive():
            self.join(SECONDS_TO_JOIN)

    def _listen(self, store: dist.TCPStore) -> None:
        for rank in range(1, self.size):
            beat = store.get(self._key(rank)).decode() if store.check([self._key(rank)]) else "0 the start"
            if rank not in self.heard or self.heard[rank][0] != beat:
                self.heard[rank] = beat, time.monotonic()

    @staticmethod
    def _key(rank: int) -> str:
        return f"rag_beat/{rank}"
