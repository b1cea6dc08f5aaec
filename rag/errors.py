"""The user's mistakes: the error that carries them to the command line, and the checks that many scripts share.

    raise_problems(file_problems("--csv_path", args.csv_path, "give a table of documents"))

`x_problems(...)` returns a list of messages, so that all of them are reported at once; `require_x(...)` raises.
"""

import os
import re
from pathlib import Path

COLUMNS = 120  # of a line that is printed, where its words allow that

# Control characters but tab and newline, those that change the direction of what follows, halves of surrogate pairs.
_OBEYED_BY_TERMINALS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake of the user's; the message names the flag, its value and the remedy printed without traceback."""


class ReportedError(UserError):
    """A mistake of the user's that another process of the same job prints."""


class JobError(RuntimeError):
    """What ended a job and is no mistake of the user's, such as a lost process; printed without traceback, status 1."""


class RankError(JobError):
    """Another rank failed, left, or kept this one waiting for too long; the message names it and the step."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What a library says of an error, on one line, or the first `most` characters of it."""
    return " ".join(str(error).split())[:most]


def is_failure(error: BaseException) -> bool:
    """Whether something failed, and nobody asked this process to end: a panic of a library in Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def printable(text: str) -> str:
    """A text of a stranger's as a terminal shows it without obeying it: an escape code is spelled out, `\\x1b`."""
    return _OBEYED_BY_TERMINALS.sub(lambda match: repr(match[0])[1:-1], text)


def raise_problems(problems: list[str]) -> None:
    """Raise all problems as one `UserError`; return quietly when there is none."""
    if problems:
        raise UserError("\n".join(problems))


def file_problems(flag: str, path: str | os.PathLike | None, remedy: str) -> list[str]:
    """The problem with an input file as a list of none or one line, ready for `problems += file_problems(...)`."""
    if path is None:
        return [f"{flag} is missing; {remedy}"]
    if not str(path).strip():
        return [f"{flag} {str(path)!r} names nothing; {remedy}"]
    if Path(path).is_file():
        return []
    what = "is a device or a pipe, not a file" if os.path.exists(path) else "does not exist"
    return [f"{flag} {path} {'is a folder, not a file' if Path(path).is_dir() else what}; {remedy}"]
