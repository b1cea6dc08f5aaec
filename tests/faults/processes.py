"""A script as a process that is watched: what it says and what it leaves.

    seen = run("eval_rag.py", {"--n_docs": 0}, folder)
    seen.status, seen.errors, seen.has_traceback

A process is forked from this one, in which the packages are imported already: that spares each case six seconds.
"""

import gc
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.conftest import ROOT

LARGEST_HASHED = 1 << 30  # bytes
MEMORY = 8 << 30  # bytes that a case may ask for


@dataclass
class Seen:
    """What one process did."""

    status: int | None  # None where it had to be ended
    text: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if ".py: error: " in line]

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text or "Fatal Python error" in self.text


@dataclass
class Process:
    """A running script, and the file of what it prints."""

    pid: int
    log: Path

    def wait(self, seconds: float = 120) -> Seen:
        """Its end, or after so many seconds its end by force."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (status := self.poll()) is not None:
                return Seen(status, self.log.read_text(errors="replace"))
            time.sleep(0.01)
        self.kill()
        return Seen(None, self.log.read_text(errors="replace"))

    def poll(self) -> int | None:
        """The status, once it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """SIGKILL for it and all it started."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run(
    script: str, flags: dict, folder: Path, seconds: float = 120, *, answer: bytes = b"", memory: int = MEMORY
) -> Seen:
    """Run a script to its end, in `folder`. A flag of None is left out, True is a switch, a list several values.

    Args:
        answer: what it reads from standard input.
        memory: bytes that it may ask for beyond what this process has.
    """
    return start(script, flags, folder, answer=answer, memory=memory).wait(seconds)


def start(script: str, flags: dict, folder: Path, *, answer: bytes = b"", memory: int = MEMORY) -> Process:
    log = folder.parent / f"{folder.name}.log"
    # Each module the scripts need, before the first fork.
    import callbacks_rag  # noqa: F401
    import rag.evaluation.predictors
    import rag.knowledge.folder
    import rag.knowledge.search
    import rag.knowledge.workers
    import rag.training.qa_module  # noqa: F401

    pid = os.fork()
    if pid == 0:
        _become(script, words_of(flags), folder, log, answer, memory)
    return Process(pid, log)


def words_of(flags: dict) -> list[str]:
    words = []
    for flag, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [flag, *map(str, values)]
    return words


def _become(script: str, words: list[str], folder: Path, log: Path, answer: bytes, memory: int):
    """The script, in this process, which ends with it."""
    status = 1
    try:
        own = memory + psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (own, own))
        os.setsid()
        os.chdir(folder)
        os.environ |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder.parent)}
        readable, writable = os.pipe()
        os.write(writable, answer)
        os.close(writable)
        os.dup2(readable, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _own_lock_of_bars(tqdm)
        gc.freeze()
        sys.argv = [script, *words]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _own_lock_of_bars(bars: type) -> None:
    """Give each class of progress bars a lock of this process: tqdm's is of all, and who is killed with it keeps it."""
    if "_lock" in vars(bars):
        bars._lock = threading.RLock()
    for kind in bars.__subclasses__():
        _own_lock_of_bars(kind)


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder: each file's digest, each link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and (size := path.stat().st_size) > LARGEST_HASHED:
            found[name] = f"{size} bytes"
        elif path.is_file():
            found[name] = blake2b(path.read_bytes(), digest_size=8).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def left_behind(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What a refused start must not do to a folder: all but locks and empty folders."""
    new = [name for name in after if after[name] not in (before.get(name), "folder") and not name.endswith(".lock")]
    return new + [f"{name} is gone" for name in before.keys() - after.keys()]
