"""Turn DPR's relevance data into the question file and the gold title file of `eval_rag.py --eval_mode retrieval`.

    python parse_dpr_relevance_data.py --src_path biencoder-nq-dev.json \\
        --evaluation_set output/biencoder-nq-dev.questions --gold_data_path output/biencoder-nq-dev.pages

The source is one JSON array of records with a `question` and its `positive_ctxs`, up to gigabytes long
(https://dl.fbaipublicfiles.com/dpr/data/retriever/biencoder-nq-dev.json.gz), or, in a file named .jsonl, a record a
line. It is read record by record, a .gz file as it is. Line n of the gold file holds the tab-separated titles of the
positive passages of the question on line n. A record without positive passages would score 0 whatever was retrieved: it
is left out of both files and counted.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import ijson

from rag.command_line.flags import flag, required_flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError, file_problems, raise_problems
from rag.evaluation.gold import strip_title
from rag.files import atomic_write
from rag.locks import lock_beside, one_at_a_time
from rag.outputs import output_file_problems, writing
from rag.progress import progress

CHUNK_BYTES = 1 << 20
LONGEST_PIECE = 1 << 20  # bytes without a `}` that are kept together: DPR's passages are a thousand times shorter
LONGEST_RECORD = 256 << 20  # bytes; one takes several times as much memory
GZIP = b"\x1f\x8b"
WHITE_SPACE = b" \t\r\n"
NO_ARRAY = "'{' stands where [ is expected"
NEEDED = "needs a `question` and `positive_ctxs`, each with a `title`"
DEEPEST, LONGEST_NUMBER = 1000, 1000  # brackets in brackets, digits: what is more, ijson's parser in C does not survive
# The first half of a surrogate pair, escaped, without the second, which ijson replaces in silence.
HALF_A_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
LONG_NUMBER = re.compile(rb"[0-9]{%d}" % LONGEST_NUMBER)
STRING_OR_CONSTANT = re.compile(rb'("(?:[^"\\]|\\.)*(?:"|\Z))|-?Infinity|NaN', re.DOTALL)


@dataclass
class ParseArguments:
    evaluation_set: str = required_flag("File to write: a question a line.")
    gold_data_path: str = required_flag("File to write: the question's gold titles a line, tab-separated.")
    src_path: str = flag(
        "biencoder-nq-dev.json",
        "DPR's relevance data: a JSON array of records, or .jsonl with a record a line, also as .gz.",
    )


def parse_args(argv: list[str] | None = None) -> ParseArguments:
    return parse_into(ParseArguments, description=__doc__, argv=argv)


def main(args: ParseArguments) -> dict[str, int]:
    """Write both files, whole or not at all; return the number of records written and skipped."""
    require_arguments(args)
    written = skipped = 0
    total = None if is_gzip(args.src_path) else os.path.getsize(args.src_path)
    chunks = progress(read_chunks(args.src_path), total, "Parsing", "bytes", size=len)
    with (
        output("--evaluation_set", args.evaluation_set) as questions,
        output("--gold_data_path", args.gold_data_path) as pages,
    ):
        for record, end in read_records(args.src_path, chunks, has_lines(args.src_path)):
            try:
                question, titles = question_and_titles(record)
            except (KeyError, TypeError, ValueError) as error:
                where = f"record {written + skipped + 1}, which ends at byte {end}"
                what = str(error) if isinstance(error, ValueError) else NEEDED
                raise UserError(f"--src_path {args.src_path}, {where}: {what}") from error
            if not titles:
                skipped += 1
                continue
            written += 1
            with writing("--evaluation_set", args.evaluation_set):
                questions.write(question + "\n")
            with writing("--gold_data_path", args.gold_data_path):
                pages.write("\t".join(titles) + "\n")
    print(f"{written:,} questions in {args.evaluation_set}, their titles in {args.gold_data_path}")
    if skipped:
        print(f"{skipped:,} of {written + skipped:,} records have no positive passage and were left out of both files")
    return {"written": written, "skipped": skipped}


@contextmanager
def output(flag: str, path: str) -> Iterator[IO]:
    """A file that appears when the block ends well; no other run may write it meanwhile."""
    with writing(flag, path), one_at_a_time(lock_beside(path), flag, path), atomic_write(path, follow=True) as file:
        yield file


def require_arguments(args: ParseArguments) -> None:
    problems = file_problems("--src_path", args.src_path, "download DPR's biencoder-nq-dev.json.gz")
    for name, path in (("--evaluation_set", args.evaluation_set), ("--gold_data_path", args.gold_data_path)):
        longest = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp") if Path(path).name else path
        problems += output_file_problems(name, path) or output_file_problems(name, longest)
    paths = [args.src_path, args.evaluation_set, args.gold_data_path]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        problems.append("--src_path, --evaluation_set and --gold_data_path name one file twice; give three names")
    raise_problems(problems)


def question_and_titles(record: Any) -> tuple[str, list[str]]:
    """The question of a DPR record and the titles of its positive passages, each fit for a tab-separated line.

    Raises:
        KeyError, TypeError: it is no such record.
        ValueError: what else is wrong with it; `eval_rag.py` would refuse the line.
    """
    titles = [on_one_line(context["title"]) for context in record["positive_ctxs"]]
    question = on_one_line(record["question"])
    if not question.strip():
        raise ValueError("its `question` is blank")
    return question, [title for title in titles if strip_title(title)]


def on_one_line(text: str) -> str:
    """Without a byte order mark, which at the beginning of a file would be none of the text."""
    return re.sub(r"[\t\r\n]+", " ", text).lstrip("\ufeff")


def has_lines(path: str) -> bool:
    """Whether the file's name says that it has a record a line."""
    return path.removesuffix(".gz").endswith(".jsonl")


def is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(GZIP)) == GZIP


def read_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a file, unzipped; blanks stand in for a byte order mark, so that places in it stay what they are.

    Raises:
        UserError: it is a damaged .gz file.
    """
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                yield b" " * len(codecs.BOM_UTF8)
            else:
                file.seek(0)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--src_path {path} is a damaged .gz file ({error}); download it again") from error


# --- A JSON array, record by record -----------------------------------------------------------------------------------


def read_records(name: str, chunks: Iterable[bytes], has_lines: bool = False) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON array in a stream of UTF-8 bytes, each with the number of bytes up to its end.

    With `has_lines` the records follow each other without an array around them.

    Holds one chunk and one record at a time, whatever the length of the array. ijson reads the stream. It does not say
    where an error is, so the json module, which does, reads the record that ijson refuses once more.

    Raises:
        UserError: what is wrong with the file, and at which byte.
    """
    what = f"--src_path {name} " + ("has no JSON record a line" if has_lines else "is no JSON array of records")
    records = ijson.sendable_list()
    parser = ijson.items_coro(records, "" if has_lines else "item", multiple_values=has_lines)
    rest, start = bytearray(), 0  # what follows the last record, and the byte where that starts
    depth = 0  # at most that many brackets are open behind `rest`; those in texts count
    try:
        for piece in _pieces(chunks):
            rest += piece
            if len(rest) > LONGEST_RECORD:
                raise UserError(f"{what}: a record of more than {LONGEST_RECORD >> 20} MB, behind byte {start}")
            is_first = len(rest) - len(piece) == start == 0
            if is_first and not has_lines and not rest.lstrip(WHITE_SPACE).startswith(b"["):
                raise _syntax_error(what, rest, start)
            depth += _opened(piece)
            has_long_number = len(piece) >= LONGEST_NUMBER and LONG_NUMBER.search(piece)
            if (depth > DEEPEST or has_long_number) and (problem := _hostile(rest)):
                raise UserError(f"{what}: {problem}, behind byte {start}")
            has_constants = b"NaN" in piece or b"Infinity" in piece
            parser.send(_without_constants(rest)[-len(piece) :] if has_constants else piece)
            if records and (b"\\ud" in rest or b"\\uD" in rest) and HALF_A_PAIR.search(rest):
                raise UnicodeError("ijson puts something else in its place")
            if records:
                start += len(rest)
                rest.clear()
                depth = 0
                yield from ((record, start) for record in records)
                records.clear()
        parser.close()
    except (ijson.JSONError, UnicodeError) as error:
        raise _syntax_error(what, rest, start, has_lines, error) from error


def _pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut behind each `}`: every record ends where a piece ends, and no number is cut in two."""
    held = b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"}")
        for piece in whole:
            yield piece + b"}"
        if len(held) > LONGEST_PIECE:
            yield held
            held = b""
    if held:
        yield held


def _without_constants(text: bytes) -> bytes:
    """JSON without the NaN, Infinity and -Infinity that Python writes and ijson refuses: 0 and blanks, as many bytes.

    Args:
        text: begins outside a string.
    """
    return STRING_OR_CONSTANT.sub(lambda match: match[1] or b"0".ljust(len(match[0])), text)


def _hostile(rest: bytes) -> str | None:
    """What no record has outside its texts."""
    bare = STRING_OR_CONSTANT.sub(b"", rest)
    if LONG_NUMBER.search(bare):
        return f"a number of {LONGEST_NUMBER:,} digits or more"
    return f"more than {DEEPEST:,} brackets in each other" if _opened(bare) > DEEPEST else None


def _opened(text: bytes) -> int:
    """Brackets that are open behind `text`, less those that it closes of others."""
    return text.count(b"[") + text.count(b"{") - text.count(b"]") - text.count(b"}")


def _syntax_error(
    what: str, rest: bytes, start: int, has_lines: bool = False, error: Exception | None = None
) -> UserError:
    """What is wrong in `rest`, which follows a record, from byte `start` on, or is the file's beginning.

    Args:
        what: the beginning of the message.
        error: ijson's.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(rest)  # `rest` may end inside a character
    except UnicodeDecodeError as not_utf8:
        problem, byte = "not UTF-8 text (of archives only .gz is read)", start + not_utf8.start
    else:
        problem, at = _first_problem(f",{text}", ",") if has_lines else _first_problem(text, ",]" if start else "[")
        at -= has_lines
        if isinstance(error, UnicodeError):  # \ud800 to \udfff without the escape behind or before it, for a pair
            problem, at = "half of a surrogate pair in the record", _skip_white_space(text, 0 if has_lines else 1)
        byte = start + len(text[:at].encode())
    remedy = "; a file with a record a line must be named .jsonl" if problem == NO_ARRAY else ""
    return UserError(f"{what}: {problem}, at byte {byte}{remedy}")


def _first_problem(text: str, expected: str) -> tuple[str, int]:
    """What is wrong, and the character where it is; the first character of `text` must be one of `expected`."""
    at = _skip_white_space(text, 0)
    while at < len(text):
        if text[at] not in expected:
            return f"{text[at]!r} stands where {' or '.join(expected)} is expected", at
        value = _skip_white_space(text, at + 1)
        if text[at] == "]":
            return "more text behind the end of the array", value
        if text[at] == "[" and text.startswith("]", value):
            return "more text behind the end of the array", _skip_white_space(text, value + 1)
        try:
            _, at = json.JSONDecoder().raw_decode(text, value)
        except json.JSONDecodeError as error:
            return error.msg, error.pos
        at, expected = _skip_white_space(text, at), ",]"
    return f"the file ends where {' or '.join(expected)} is expected", at


def _skip_white_space(text: str, at: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def cli() -> NoReturn:
    """The command `rag-parse-dpr`."""
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
