"""Turn DPR's relevance data into the question file and the gold title file of `eval_rag.py --eval_mode retrieval`.

    python parse_dpr_relevance_data.py --src_path biencoder-nq-dev.json \\
        --evaluation_set output/biencoder-nq-dev.questions --gold_data_path output/biencoder-nq-dev.pages

The source is one JSON array of records with a `question` and its `positive_ctxs`, up to gigabytes long
(https://dl.fbaipublicfiles.com/dpr/data/retriever/biencoder-nq-dev.json.gz). It is read record by record. Line n of the
gold file holds the tab-separated titles of the positive passages of the question on line n. A record without positive
passages would score 0 whatever was retrieved: it is left out of both files and counted.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError, file_problems, raise_problems
from rag.files import atomic_write
from rag.progress import progress

CHUNK_BYTES = 1 << 20


@dataclass
class ParseArguments:
    evaluation_set: str = field(metadata={"help": "File to write: a question a line."})
    gold_data_path: str = field(metadata={"help": "File to write: the question's gold titles a line, tab-separated."})
    src_path: str = field(
        default="biencoder-nq-dev.json", metadata={"help": "DPR's relevance data, unzipped: a JSON array of records."}
    )


def parse_args(argv: list[str] | None = None) -> ParseArguments:
    return parse_into(ParseArguments, description=__doc__, argv=argv)


def main(args: ParseArguments) -> dict[str, int]:
    """Write both files, whole or not at all; return the number of records written and skipped."""
    check_arguments(args)
    written = skipped = 0
    chunks = progress(read_chunks(args.src_path), os.path.getsize(args.src_path), "Parsing", "bytes", size=len)
    reader = JsonArrayReader(args.src_path, chunks)
    with atomic_write(args.evaluation_set) as questions, atomic_write(args.gold_data_path) as pages:
        for record in reader:
            try:
                question, titles = question_and_titles(record)
            except (KeyError, TypeError) as error:
                where = f"record {written + skipped + 1}, which ends at byte {reader.byte()}"
                raise UserError(
                    f"--src_path {args.src_path}, {where}: needs a `question` and `positive_ctxs`, each with a `title`"
                ) from error
            if not titles:
                skipped += 1
                continue
            written += 1
            questions.write(question + "\n")
            pages.write("\t".join(titles) + "\n")
    print(f"{written:,} questions in {args.evaluation_set}, their titles in {args.gold_data_path}")
    if skipped:
        print(f"{skipped:,} of {written + skipped:,} records have no positive passage and were left out of both files")
    return {"written": written, "skipped": skipped}


def check_arguments(args: ParseArguments) -> None:
    problems = file_problems("--src_path", args.src_path, "download and unzip DPR's biencoder-nq-dev.json.gz")
    for flag, path in (("--evaluation_set", args.evaluation_set), ("--gold_data_path", args.gold_data_path)):
        if Path(path).is_dir():
            problems.append(f"{flag} {path} is a folder; name a file in it")
    paths = [args.src_path, args.evaluation_set, args.gold_data_path]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        problems.append("--src_path, --evaluation_set and --gold_data_path name one file twice; give three names")
    raise_problems(problems)


def question_and_titles(record: Any) -> tuple[str, list[str]]:
    """The question of a DPR record and the titles of its positive passages, each fit for a tab-separated line."""
    titles = [on_one_line(context["title"]) for context in record["positive_ctxs"]]
    return on_one_line(record["question"]), [title for title in titles if title]


def on_one_line(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)


def read_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class JsonArrayReader:
    """The elements of a JSON array in a UTF-8 byte stream, one after the other.

    Holds one chunk and one element at a time, whatever the length of the array.
    """

    def __init__(self, name: str, chunks: Iterable[bytes]):
        self.name = name
        self.chunks = iter(chunks)
        self.decode_utf8 = codecs.getincrementaldecoder("utf-8")().decode
        self.decode_json = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0  # the next character of `text`
        self.bytes_before_text = 0

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        closed = self._next_character() == "]" and self._take("]")
        while not closed:
            self._next_character()
            yield self._element()
            closed = self._take(",]") == "]"
        if self._next_character():
            raise self._fault("more text behind the end of the array")

    def byte(self, at: int | None = None) -> int:
        """Where the reader, or the character `at`, stands in the file."""
        return self.bytes_before_text + len(self.text[: self.at if at is None else at].encode())

    def _element(self) -> Any:
        while True:
            try:
                element, self.at = self.decode_json(self.text, self.at)
                return element
            except json.JSONDecodeError as error:
                # A fault far from the end of the text is one; a fault at its end may only be the end of a chunk.
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if not (cut_off and self._read_on()):
                    raise self._fault(error.msg, self.byte(error.pos)) from error

    def _take(self, expected: str) -> str:
        character = self._next_character()
        if not character or character not in expected:
            found = f"{character!r} stands" if character else "the file ends"
            raise self._fault(f"{found} where {' or '.join(expected)} is expected")
        self.at += 1
        return character

    def _next_character(self) -> str:
        """Go to the next character that is not white space; the empty string at the end of the stream."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self._read_on():
                return ""

    def _read_on(self) -> bool:
        """Drop what has been read and append a chunk; False at the end of the stream."""
        chunk = next(self.chunks, None)
        if chunk is None:
            return False
        self.bytes_before_text = self.byte()
        self.text, self.at = self.text[self.at :], 0
        try:
            self.text += self.decode_utf8(chunk)
        except UnicodeDecodeError as error:
            position = self.byte(len(self.text)) + error.start
            raise self._fault("not UTF-8 text (a .gz file has to be unzipped first)", position) from error
        return True

    def _fault(self, what: str, byte: int | None = None) -> UserError:
        byte = self.byte() if byte is None else byte
        return UserError(f"--src_path {self.name} is no JSON array of records: {what}, at byte {byte}")


if __name__ == "__main__":
    run_script(parse_args, main)
