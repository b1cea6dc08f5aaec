"""Text and JSON files, and files and folders that appear whole or not at all.

with atomic_write("metrics.json") as file:
    file.write(text)
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rag.errors import UserError, one_line

LONGEST_LINE = 1 << 26  # bytes of a question, an answer, a list of answers: a thousand times what anybody has
LARGEST_JSON = 1 << 28  # bytes: ten times the largest tokenizer.json; one takes several times as much memory
DATA_FILES = "_data_files"  # what the state.json of a saved dataset calls the list of its files
CHUNK = 1 << 20  # bytes, at most as many as a line


def shown(path: str | os.PathLike) -> str:
    """A path as messages have it: from the working directory where it lies below that, else as it was given."""
    absolute, here = Path(path), Path.cwd()
    return str(absolute.relative_to(here)) if absolute != here and absolute.is_relative_to(here) else str(path)


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""The lines of a UTF-8 file without their ends.

    Lines end at \n, \r\n or \r and nowhere else: `str.splitlines` also splits at U+2028, \x0b or \x85, which stand
    inside Wikipedia's sentences and would shift every later pair of source and target.

    Raises:
        UserError: it is not UTF-8, or a line is longer than `LONGEST_LINE`.
    """
    require_lines(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # text mode turns \r\n and \r into \n
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it first") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def require_lines(path: str | os.PathLike) -> None:
    """Raise `UserError` where a line is too long: gigabytes without an end would take many times as much memory."""
    if os.stat(path).st_size <= LONGEST_LINE:
        return
    length = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            first, *others = chunk.replace(b"\r", b"\n").split(b"\n")
            length += len(first)
            if length > LONGEST_LINE:
                raise UserError(
                    f"{path} has a line of more than {LONGEST_LINE:,} bytes; one example a line is expected"
                )
            length = len(others[-1]) if others else length


def write_lines(lines: Iterable[str], path: str | os.PathLike, follow: bool = False) -> None:
    """Write one line each; a line that holds a line end would come back as two, so it is refused."""
    with atomic_write(path, follow=follow) as file:
        for line in lines:
            assert "\n" not in line and "\r" not in line, f"a line end inside a line: {line!r}"
            file.write(line + "\n")


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", *, follow: bool = False) -> Iterator[IO]:
    """Open a file beside `path` that takes its place when the block ends well and is removed when it does not.

    Args:
        follow: of a link write the file behind it, as is right for a path that the user gave. In a folder, which may be
            a stranger's, a link may lead anywhere, and the file takes its place.
    """
    path = Path(os.path.realpath(path)) if follow else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)  # a killed run's, or a link that leads elsewhere: "x" makes a new file, or none
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(beside, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def not_following(path: str, flags: int) -> int:
    """An `opener` for `open`, for files in folders that may be a stranger's: of a link it raises `OSError`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place, and its old content's, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    remove(beside)  # a killed run's: in a container every run has the same process id
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            path.rename(old)  # os.replace cannot take the place of a folder that holds anything
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def save_json(
    content: Any, path: str | os.PathLike, indent: int | None = 2, *, follow: bool = False, **json_dump_kwargs: Any
) -> None:
    """Write an object as indented JSON, whole or not at all.

    Args:
        follow: as `atomic_write`'s.
        json_dump_kwargs: those of `json.dump`.
    """
    text = json.dumps(content, indent=indent, **({"ensure_ascii": False} | json_dump_kwargs))
    with atomic_write(path, "wb", follow=follow) as file:
        # A file's name may hold bytes that are no UTF-8. The surrogates that Python makes of them are written `\udcff`,
        # which is how JSON escapes them.
        file.write(text.encode(errors="backslashreplace") + b"\n")


def load_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON, or larger than any that is read here, or a pipe or a device, which may have no end.
    """
    state = os.stat(path)
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):  # of a folder `read_text` says so
        raise ValueError("it is a pipe or a device, not a file")
    if (size := state.st_size) > LARGEST_JSON:
        raise ValueError(f"it has {size:,} bytes, more than {LARGEST_JSON:,}")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_state(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object that an earlier run left.

    Args:
        remedy: what the user can do where it cannot be read.

    Raises:
        UserError: there is no such file, or something else is in it.
    """
    try:
        content = load_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise UserError(f"{path} is damaged ({one_line(error, 100)}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return content


def require_own_files(folder: str | os.PathLike) -> None:
    """Raise `ValueError` unless the data files of a saved dataset are files in its folder, as far as it names any."""
    state = Path(folder, "state.json")
    named = load_json(state).get(DATA_FILES, []) if state.is_file() else []
    for name in [file["filename"] for file in named]:
        if Path(name).name != name:
            raise ValueError(f"state.json names {name[:80]!r}, outside of the folder")
        if not Path(folder, name).is_file():
            raise ValueError(f"{name[:80]!r} is no file")


def new_digest(data: bytes = b""):
    """A hash object, fed with `data`, whose 16 bytes tell one content from another: no two ever meet by accident."""
    return hashlib.blake2b(data, digest_size=16)


def json_digest(values: Any) -> str:
    """The digest of what JSON can hold, whatever the order of its keys."""
    return new_digest(json.dumps(values, sort_keys=True).encode()).hexdigest()


def remove(path: str | os.PathLike) -> None:
    """Remove a file, or a folder in one go: under its name it is whole until it is gone. Nothing there is no error."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        gone = path.with_name(f".{path.name}.{os.getpid()}.old")
        if gone.exists():  # a killed run's: in a container every run has the same process id
            shutil.rmtree(gone)
        path = path.rename(gone)
    shutil.rmtree(path)


def free_bytes(path: str | os.PathLike) -> int:
    """Free space on the disk of a file or folder, which may have to be made yet."""
    return shutil.disk_usage(_existing(path)).free


def space_problems(what: str, needs: Mapping[str, int] | Mapping[Path, int], remedy: str) -> list[str]:
    """One line for each disk that has no room for the bytes that are to be written.

    Args:
        what: the flag that asks for them, and its value.
        needs: bytes by the file or folder that they are for; what lies on one disk is added up.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in needs.items():
        existing = _existing(path)
        disk = os.stat(existing).st_dev
        disks[disk] = (existing, disks.get(disk, (existing, 0))[1] + size)
    return [
        f"{what}: {size:,} bytes are needed and {free:,} are free at {folder}; {remedy}"
        for folder, size in disks.values()
        if (free := free_bytes(folder)) < size
    ]


def _existing(path: str | os.PathLike) -> Path:
    return next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
