"""How every script starts, reports its user's mistakes and ends.

def cli() -> NoReturn:  # a command of pyproject.toml
    run_script(parse_args, main)

if __name__ == "__main__":
    cli()
"""

import contextlib
import gc
import io
import itertools
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from rag.command_line.parser import program_name
from rag.errors import JobError, ReportedError, UserError, printable

LONGEST_LINE = 4000  # characters of a message: what it quotes may be a stranger's


def _parse_once(parse_args):
    """What `parse_args` returns. Of the ranks of a node, which share a command line, the first says what is wrong."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return parse_args()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse_args()
    except UserError as error:
        raise ReportedError(str(error)) from error
    except SystemExit as leaving:
        if leaving.code == 0:  # --help
            raise
        raise ReportedError("argparse has printed it") from leaving


def _leave_it_to_the_reporter() -> NoReturn:
    """End with status 2 too, but second: torchrun ends all ranks, by SIGTERM, once it sees that one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)
    sys.exit(2)


def _path_problem(error: OSError) -> str | None:
    """What the disk says of a path that a flag names, or of one below it; None where no flag names it."""
    name = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else None
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in itertools.pairwise(words):
        if name and value and flag.startswith("--") and Path(value) in (Path(name), *Path(name).parents):
            return f"{flag} {value}: {name} cannot be used ({error.strerror}); give another path"
    return None


def _print_safely() -> None:
    """Print any file's name and any text: what an encoding cannot hold, and in warnings what a terminal would obey, is
    spelled out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    make_record = logging.getLogRecordFactory()

    def make_printable(*args, **kwargs) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # a library's slip, of which logging itself tells
            record.msg, record.args = printable(record.getMessage()), None
        return record

    logging.setLogRecordFactory(make_printable)


def run_script(parse_args, main) -> NoReturn:
    """The entry point of every script: a mistake of the user's ends with its message and status 2, Ctrl-C with 130.

    What ended a job of several processes (`JobError`) ends with its message and status 1. SIGTERM ends with 143, by way
    of every `finally`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # torch and transformers make millions of objects that stay: looking through them again and again takes a tenth of
    # the start.
    gc.set_threshold(10_000, 10, 10)
    # Fork-safe, quiet tokenizers: data-loading workers are forked after the tokenizer was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    _print_safely()
    script = program_name()
    try:
        main(_parse_once(parse_args))
    except ReportedError:
        _leave_it_to_the_reporter()
    except UserError as error:
        print(
            *(f"{script}: error: {printable(line[:LONGEST_LINE])}" for line in str(error).split("\n")),
            sep="\n",
            file=sys.stderr,
        )
        sys.exit(2)
    except JobError as error:
        print(f"{script}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a name that is too long, no permission, a disk that fails: wherever it is noticed
        if (problem := _path_problem(error)) is None:
            raise
        print(f"{script}: error: {printable(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{script}: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
