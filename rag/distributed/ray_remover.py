"""A process that outlives the one that started a Ray cluster, and removes what is left of it.

    python -I -S ray_remover.py FOLDER    # FOLDER: sockets and logs of the cluster; a line on stdin, or its end

Its standard input is a pipe that the starter alone holds. A line on it says that Ray has been shut down. Without one
the starter was killed; the kernel then ends what it started itself, but not what those started: Ray's agents wait a
minute for the rest of the cluster. They are killed here. Only the standard library is used: its start costs nothing.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

SECONDS = 20.0  # in which Ray's processes, killed one after the other, may start more of them


def processes_of(folder: str) -> list[int]:
    """Ray's processes of a cluster: they name its folder in their command line, or write logs there.

    The ranks of the job write logs there as well, but carry no name of Ray's.
    """
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().decode(errors="replace")
            if int(pid) == os.getpid():
                continue
            if folder in command or (command.startswith("ray::") and writes_to(pid, folder)):
                found.append(int(pid))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def writes_to(pid: str, folder: str) -> bool:
    return any(os.readlink(entry.path).startswith(f"{folder}/") for entry in os.scandir(f"/proc/{pid}/fd"))


def remove(folder: str) -> None:
    """Kill the cluster's processes, then remove its folder, into which they may write on for a moment."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        running = processes_of(folder)
        for pid in running:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not running and not os.path.exists(folder):
            return
        time.sleep(0.2)


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # also where the whole job is asked to end
        signal.signal(name, signal.SIG_IGN)
    sys.stdin.readline()
    remove(sys.argv[1])
