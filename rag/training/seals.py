"""Whether a checkpoint is the one that was written: a hash of its bytes stands at its end, as the comment of its zip.

    with atomic_write(path, "wb") as file:
        sealed = SealedFile(file)
        torch.save(checkpoint, sealed)
        sealed.seal()
    is_whole(path)

XXH3 of 128 bits runs at the speed of memory, far above that of a disk, so that to write costs nothing more and to
verify costs one pass. Inside the file no kill can part the two; a second name or a copy of it has it, too. A zip
without such a comment, another version's, is verified by the checksums of its parts.
"""

import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import xxhash

from rag.checksums import file_checksum
from rag.hub import CARD_FILE

MARK = b"xxh3:"
COMMENT_BYTES = len(MARK) + 32  # the hash in hexadecimal
NO_COMMENT = (0).to_bytes(2, "little")  # the last bytes of a zip are the length of its comment and the comment
BLOCK = 2**24  # bytes read at a time


class SealedFile:
    """A binary file that is written from its start to its end, all of it hashed."""

    def __init__(self, file: IO[bytes]):
        self.file, self.hash = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        """Put the hash into the zip that has been written."""
        self.file.seek(-len(NO_COMMENT), os.SEEK_END)
        self.file.write(COMMENT_BYTES.to_bytes(2, "little") + MARK + self.hash.hexdigest().encode())


def is_whole(path: str | os.PathLike) -> bool:
    """Whether the file is there and holds what was written, asked of the disk once as long as it does not change."""
    try:
        state = os.stat(path)
        return _is_whole(os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError:
        return False


@lru_cache(maxsize=64)
def _is_whole(path: str, size: int, *_: int) -> bool:
    with open(path, "rb") as file:
        file.seek(max(size - COMMENT_BYTES, 0))
        comment = file.read()
        if not comment.startswith(MARK):
            return _parts_are_whole(path)
        file.seek(0)
        found = _digest(file, size - COMMENT_BYTES - len(NO_COMMENT))
    return found.encode() == comment.removeprefix(MARK)


def _parts_are_whole(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False


def _digest(file: IO[bytes], size: int) -> str:
    """The hash of the next `size` bytes, as they were before they got a comment."""
    state = xxhash.xxh3_128()
    while size > 0 and (block := file.read(min(BLOCK, size))):
        state.update(block)
        size -= len(block)
    state.update(NO_COMMENT)
    return state.hexdigest()


def stamp_of(path: Path) -> list[int]:
    """Size and time of change (ns), which tell a file that has been written to."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def records_of(folder: Path) -> dict[str, list]:
    """Size, time of change (ns) and checksum of each file in a folder but its card, by its path below it.

    A card is for its readers, who may write more into it.
    """
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / CARD_FILE)
    return {str(file.relative_to(folder)): _record(file) for file in files}


def _record(file: Path) -> list:
    return [*stamp_of(file), file_checksum(file)]


def is_as_recorded(folder: Path, records: dict[str, list]) -> bool:
    """Whether a folder has the files that were recorded; a file is read again only where its size or time is another's.

    Of a folder without records, another version's, it is only asked whether it is there.
    """
    return folder.is_dir() and all(_is_recorded(folder / name, record) for name, record in records.items())


def _is_recorded(file: Path, record: list) -> bool:
    if not file.is_file():
        return False
    return stamp_of(file) == record[:2] or (file.stat().st_size == record[0] and _record(file)[2] == record[2])
