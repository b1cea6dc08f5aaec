"""Which processes have been stopped (SIGSTOP, Ctrl-Z) for so long that nobody is going to let them run on.

clock = StoppedClock()
while not clock.stood_still(processes):   # psutil's, every second or so
    time.sleep(1)
"""

import contextlib
import time
from collections.abc import Iterable

import psutil

# Seconds that a stopped process may stand still: Ctrl-Z and fg take less. The kernel says that it is stopped, so that
# one that is only slow is never taken for one.
PATIENCE_WITH_STOPPED = 30.0
LONGEST_LOOK = 2.0  # seconds; from one look to the next more go by only where the one that looks was stopped itself


class StoppedClock:
    """Seconds that processes have stood still, of those that this process itself has run: Ctrl-Z stops whole jobs."""

    def __init__(self, patience: float = PATIENCE_WITH_STOPPED):
        self.patience = patience
        self.seconds: dict[int, float] = {}  # by process id
        self.looked = time.monotonic()

    def stood_still(self, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
        """Those that have been stopped for longer than the patience; to be called every second or so."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, LONGEST_LOOK), now
        stopped = [process for process in processes if is_stopped(process)]
        self.seconds = {process.pid: self.seconds.get(process.pid, 0.0) + passed for process in stopped}
        return [process for process in stopped if self.seconds[process.pid] > self.patience]


def is_stopped(process: psutil.Process) -> bool:
    """Not of one that a debugger holds: somebody sees to that."""
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_STOPPED
    return False


def is_gone(process: psutil.Process) -> bool:
    """Also of one that has ended and that its parent has not asked about."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
