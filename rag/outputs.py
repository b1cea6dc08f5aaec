"""Whether an output can be written, asked before the work, and one line where the disk fills up in mid-work.

raise_problems(output_file_problems("--predictions_path", args.predictions_path))
with writing("--predictions_path", args.predictions_path):
    ...
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rag.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ENOENT, errno.EISDIR}
# Of a full disk: Rust's (safetensors, tokenizers), C's (FAISS, Arrow) and what torch says when its writer ends early.
FULL_WORDS = ("os error 28", "os error 122", "No space left", "Disk quota", "unexpected pos", "PytorchStreamWriter")


def output_file_problems(flag: str, path: str | os.PathLike) -> list[str]:
    """Why no file can be written at `path`, as a list of none or one line."""
    return _problems(flag, path, "file", "folder")


def output_folder_problems(flag: str, path: str | os.PathLike) -> list[str]:
    """Why `path` can be no folder to write in, as a list of none or one line."""
    return _problems(flag, path, "folder", "file")


def _problems(flag: str, path: str | os.PathLike, wanted: str, other: str) -> list[str]:
    if not str(path).strip() or "\0" in str(path):
        return [f"{flag} {str(path)!r} names nothing; give the path of a {wanted} to write"]
    if wanted == "file" and str(path).endswith(os.sep):
        return [f"{flag} {path} ends as a folder does; give the path of a file to write"]
    if wanted == "folder" and not _is_utf8(path):  # FAISS, tokenizers and safetensors write in no other
        return [f"{flag} {path} is not UTF-8; give the path of a folder to write in that is"]
    path = Path(path)
    try:
        reason = _obstacle(path, wanted, other)
    except OSError as error:  # a name that is too long, a loop of links, what the disk answers
        reason = f"cannot be written ({error.strerror})"
    return [f"{flag} {path} {reason}; give the path of a {wanted} that can be written"] if reason else []


def _is_utf8(path: str | os.PathLike) -> bool:
    try:
        str(Path(path).absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def _obstacle(path: Path, wanted: str, other: str) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist"
    if path.exists():
        mode = path.stat().st_mode
        kinds = {"file": stat.S_ISREG(mode), "folder": stat.S_ISDIR(mode)}
        if not kinds[wanted]:
            return f"is a {other}, not a {wanted}" if kinds[other] else f"is a device or a pipe, not a {wanted}"
    if wanted == "file" and ".." in path.parts and not path.parent.exists():
        return f"cannot be written: there is no {path.parent}"
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir() or folder.exists())
    if folder != path or wanted == "folder":
        if not folder.is_dir():
            return f"cannot be written: {folder} is a file"
        with tempfile.TemporaryFile(
            dir=folder
        ):  # asks the disk: of root's rights, /proc or a network disk a mode says little
            pass
    elif not os.access(path, os.W_OK):
        return "cannot be written (no permission)"
    return None


@contextmanager
def writing(flag: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn what a full disk, or one that cannot be written any more, makes libraries raise into one line.

    Raises:
        UserError: names the flag, the path and the remedy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, safetensors, tokenizers, FAISS and Arrow each have an error of their own
        if (reason := _reason(error, Path(path))) is None:
            raise
        raise UserError(
            f"{flag} {path} cannot be written: {reason}; make room, or give another path, "
            "and run the same command again"
        ) from error


def _reason(error: BaseException | None, path: Path) -> str | None:
    """Why it could not be written, by the error or what it came from; None where it is another error."""
    while error is not None:
        code = getattr(error, "errno", None)
        if code in FULL or any(word in str(error) for word in FULL_WORDS):
            return "the disk is full"
        if isinstance(error, OSError) and code in UNWRITABLE and _is_below(error.filename, path):
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def _is_below(name: object, path: Path) -> bool:
    """Whether an error's file is the output, or lies in it or beside it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    file = Path(os.path.realpath(os.fsdecode(name)))
    output = Path(os.path.realpath(path))
    return output == file or output in file.parents or file.parent == output.parent
