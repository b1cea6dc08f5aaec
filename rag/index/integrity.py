"""Whether passages and index are the bytes that were written: their checksums in `index.json`.

    description = replace(description, checksums=checksums_of(folder, [passages_path, index_path]))
    write_description(folder, description)
    note_undamaged(folder, description)        # so that the first process to open it need not read all of it
    damage(folder, description)                # [] or a phrase for each file that is not what it was

Sizes are compared at each opening. Bytes are read once: what was found is kept in the user's cache as long as no file
is written to (rag/checksums.py). Of more than 4 GiB only sizes and the smallest files are looked at, but where all is
asked for (`verify`).
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from rag.checksums import checksum_size, file_checksum, found_once, stamp_of
from rag.errors import raise_problems
from rag.files import json_digest
from rag.index.index_files import DESCRIPTION_FILE, IndexDescription, read_description

MOST_HASHED = 4 * 2**30  # bytes that are read when knowledge is opened for the first time


def checksums_of(folder: str | os.PathLike, paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """The checksums of files, and of all files in folders, by their path from `folder`, in which they lie.

    Not of hidden ones, nor of what `datasets` leaves beside a dataset when someone maps or filters it.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and not file.name.startswith((".", "cache-"))
    ]
    return {str(file.relative_to(folder)): file_checksum(file) for file in files}


def damage(folder: str | os.PathLike, description: IndexDescription, *, verify: bool = False) -> list[str]:
    """A phrase for each file that is gone, has another size or other bytes than the index.json of `folder` says.

    Args:
        verify: read all of them, whatever was found before.
    """
    return list(damaged(Path(folder), description.checksums, verify).values())


def damaged(folder: Path, checksums: dict[str, str], verify: bool = False) -> dict[str, str]:
    """As `damage`, of files in `folder` with these checksums: what is wrong, by file."""
    problems = {name: problem for name in checksums if (problem := _size_problem(folder, name, checksums[name]))}
    whole = {name: checksum for name, checksum in checksums.items() if name not in problems}
    if not verify:
        whole = _smallest(whole)
    if whole:
        fact = _fact(folder, whole)
        for name in found_once(folder / DESCRIPTION_FILE, fact, lambda: _other_bytes(folder, whole), verify):
            problems[name] = f"{name} is not what was written (its checksum is not the one in {DESCRIPTION_FILE})"
    return problems


def note_undamaged(folder: str | os.PathLike, description: IndexDescription) -> None:
    """Keep in mind that the files are those of the description, just written: no one need read them to know it."""
    for part in ({}, *_parts(description.checksums)):
        whole = _smallest(part or description.checksums)
        found_once(Path(folder) / DESCRIPTION_FILE, _fact(Path(folder), whole), list)


def _parts(checksums: dict[str, str]) -> list[dict[str, str]]:
    """The checksums of each file or folder that lies beside index.json."""
    names = dict.fromkeys(name.partition(os.sep)[0] for name in checksums)
    return [{file: checksums[file] for file in checksums if file.partition(os.sep)[0] == name} for name in names]


def require_undamaged(passages_path: str | os.PathLike, index_path: str | os.PathLike | None = None) -> None:
    """Raise `UserError` if passages or index are not what the index.json beside them says; quiet where it says nothing.

    Both are one knowledge folder's, each another's, or of another origin.
    """
    given = {"--passages_path": passages_path, "--index_path": index_path}
    problems = []
    for flag, path in given.items():
        if path is not None:
            folder, name = Path(path).absolute().parent, Path(path).name
            checksums = read_description(path, flag).checksums
            ours = {file: checksums[file] for file in checksums if file.partition(os.sep)[0] == name}
            for problem in list(damaged(folder, ours).values())[:1]:
                problems.append(f"{flag} {path} is damaged: {problem}; build or fetch it again")
    raise_problems(problems)


def _size_problem(folder: Path, name: str, checksum: str) -> str | None:
    try:
        state = os.stat(folder / name)
    except OSError as error:
        return f"{name} is not there ({error.strerror})"
    if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for, a device read without end
        return f"{name} is no file"
    if (size := state.st_size) != checksum_size(checksum):
        return f"{name} has {size:,} bytes instead of {checksum_size(checksum):,}"
    return None


def _smallest(checksums: dict[str, str]) -> dict[str, str]:
    """The smallest files, as many as are read at an opening."""
    chosen, total = {}, 0
    for name in sorted(checksums, key=lambda name: checksum_size(checksums[name])):
        total += checksum_size(checksums[name])
        if total > MOST_HASHED:
            break
        chosen[name] = checksums[name]
    return chosen


def _fact(folder: Path, checksums: dict[str, str]) -> str:
    """The name under which it is noted which of these files, as they are now, differ from their checksums."""
    return f"damage {stamp_of(folder / name for name in checksums)} {json_digest(checksums)}"


def _other_bytes(folder: Path, checksums: dict[str, str]) -> list[str]:
    return [name for name, checksum in checksums.items() if file_checksum(folder / name) != checksum]
