"""Checksums of files, and notes of what was found out about a file, so that no large one is read at each start.

    file_checksum(path)                                     # "xxh3:9f2c...:1048576": XXH3 of 128 bits, and the size
    found_once(path, "links", lambda: problems_of(path))    # what this or an earlier process found out about the file

Notes lie in the user's cache, `$XDG_CACHE_HOME/rag` or `~/.cache/rag`, one small JSON file each, never beside the file:
knowledge may be read-only, and is compared and copied as a whole. A note counts as long as the file is the one that was
looked at, by device, inode, size and the times of its last changes. Where no note can be written, the work is done
again by the next process; that is no error.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from rag.files import atomic_write, json_digest, new_digest

HASHED_AT_A_TIME = 2**24
MOST_NOTES = 1000
_notes: dict[str, dict[str, Any]] = {}  # of this process: by file, also where none can be written


def file_checksum(path: str | os.PathLike) -> str:
    """The hash of a file's bytes and their number.

    Raises:
        OSError: it cannot be read.
    """
    state, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(HASHED_AT_A_TIME))
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return f"xxh3:{state.hexdigest()}:{size}"


def checksum_size(checksum: str) -> int:
    """The bytes of a file that has this checksum."""
    return int(checksum.rpartition(":")[2])


def stamp_of(paths: Iterable[str | os.PathLike]) -> str:
    """Tells these files, as they are now, from any others and from what they were before they were written to.

    Raises:
        OSError: one is not there.
    """
    return json_digest([_identity(path) for path in paths])


def found_once(path: str | os.PathLike, name: str, find: Callable[[], Any], again: bool = False) -> Any:
    """What `find` returns, which is JSON: called once for a file as long as that stays as it is.

    Of several processes that ask at once the first one calls it; the others wait and read its note. `find` asks for
    nothing of this kind itself.

    Raises:
        OSError: there is no such file.
    """
    identity = _identity(path)
    known = _read(identity)
    if name in known and not again:
        return known[name]
    with _one_at_a_time(identity):
        known = _read(identity)  # meanwhile another process may have found it
        if name not in known or again:
            known = known | {name: find()}
            if _identity(path) == identity:  # else it was written to meanwhile
                _keep(identity, known)
    return known[name]


def _keep(identity: dict[str, Any], facts: dict[str, Any]) -> None:
    _notes[json.dumps(identity)] = facts
    with suppress(OSError):
        _prune()
        with atomic_write(_note_path(identity)) as file:
            json.dump({"file": identity, "facts": facts}, file)


def _identity(path: str | os.PathLike) -> dict[str, Any]:
    state = os.stat(path)
    return {
        "path": os.path.realpath(path),
        "device": state.st_dev,
        "inode": state.st_ino,
        "size": state.st_size,
        "modified": state.st_mtime_ns,
        "changed": state.st_ctime_ns,  # which no program can set: a copy that keeps the time of change is another file
    }


def _read(identity: dict[str, Any]) -> dict[str, Any]:
    """The facts of the note on this very file; empty where there is none that counts."""
    known = _notes.get(json.dumps(identity), {})
    try:
        note = json.loads(_note_path(identity).read_bytes())
        return known | note["facts"] if note["file"] == identity else known
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return known


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rag"


def _note_path(identity: dict[str, Any]) -> Path:
    return _folder() / f"{new_digest(identity['path'].encode(errors='surrogateescape')).hexdigest()}.json"


def _prune() -> None:
    """Remove the older half of the notes where there are too many: of files that are long gone."""
    notes = list(_folder().glob("*.json"))
    if len(notes) > MOST_NOTES:
        for note in sorted(notes, key=lambda note: note.stat().st_mtime_ns)[: MOST_NOTES // 2]:
            note.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(identity: dict[str, Any]) -> Iterator[None]:
    """Alone among the processes that look at this file, where the cache can be written and its disk knows locks."""
    file = None
    with suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        # One of 64 locks, which stay: a lock of its own for each file would have to be removed, which cannot be sound.
        number = int(_note_path(identity).stem, 16) % 64
        file = open(_folder() / f".{number:02d}.lock", "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, by a kill if need be
    try:
        yield
    finally:
        if file is not None:
            file.close()
