"""One run at a time on one output: a lock that its process holds and that its death frees.

    with one_at_a_time(lock_beside(predictions_path), "--predictions_path", predictions_path):
        ...

The lock is the operating system's (flock, by the filelock package) on a small file that stays, `.lock` in a folder or
`.NAME.lock` beside a file; in it stands who holds it, or nothing. On a disk that several nodes share it holds where the
disk has locks: NFS with its lock service, Lustre mounted with `flock`.
"""

import glob
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rag.errors import UserError

SECONDS_TO_SIGN = 1.0  # in which a process that has just taken the lock says who it is
PATIENCE = 20.0  # seconds that the children of a killed run may hold its lock


def lock_beside(path: str | os.PathLike) -> Path:
    """The lock of an output file, of a link that of the file behind it."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.lock")


@contextmanager
def one_at_a_time(lock_path: str | os.PathLike, flag: str, output: str | os.PathLike) -> Iterator[None]:
    """Hold a lock while the block runs. What killed runs left half-written beside it, `.NAME.PID.tmp`, is removed.

    Args:
        lock_path: the lock's file; its folder is made.
        flag: that names the output, for the message.
        output: its value.

    Raises:
        UserError: another process, which is named, holds it; or the lock is no file.
    """
    lock_path = Path(lock_path)
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    if lock_path.is_symlink() or (lock_path.exists() and not lock_path.is_file()):
        raise UserError(f"{flag} {output}: its lock {lock_path} is a link, a pipe or a folder, not a file; remove it")
    lock = FileLock(lock_path)
    _acquire(lock, lock_path, f"{flag} {output}")
    try:
        lock_path.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        _remove_leftovers(lock_path)
        yield
    finally:
        with suppress(OSError):
            os.truncate(lock_path, 0)  # so that the outputs of two equal runs are equal
        lock.release()


def _acquire(lock: FileLock, path: Path, what: str) -> None:
    begun = time.monotonic()
    deadline = begun + PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout as error:
            holder = _holder(path)
            if not holder and time.monotonic() < begun + SECONDS_TO_SIGN:
                time.sleep(0.01)
                continue
            if not _is_dead(holder) or time.monotonic() > deadline:
                raise UserError(
                    f"{what} is in use by process {holder.get('pid', 'unknown')} on {holder.get('host', 'this disk')}; "
                    "wait for its end, or give another path"
                ) from error
        time.sleep(0.1)


def _holder(path: Path) -> dict[str, Any]:
    """Who holds the lock, as far as it has said."""
    try:
        with open(path) as file:
            holder = json.loads(file.read(1000))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process that took the lock is gone, so that only what it started can still hold it."""
    return holder.get("host") == os.uname().nodename and not Path(f"/proc/{holder.get('pid')}").exists()


def _remove_leftovers(lock_path: Path) -> None:
    """The unfinished files of `rag.files.atomic_write`: nobody but the holder of the lock writes here.

    Beside a file, those of its name and of names that go on behind a point; of the latter not a living process's, which
    may write `preds.tsv` where this one's output is `preds`.
    """
    name = glob.escape(lock_path.name.removesuffix(".lock"))
    for pattern in (name, f"{name}.*") if name else (".*",):
        for left in lock_path.parent.glob(f"{pattern}.[0-9]*.tmp"):
            pid = left.name.split(".")[-2]
            is_anothers = name and pattern != name and pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()
            if left.is_file() and not is_anothers:
                left.unlink(missing_ok=True)
