r"""Documents in tables of text: tab-separated, or by commas, semicolons or bars under a header; quoted or not at all.

    for item in read_table(Path("my.tsv"), ReadingOptions()): ...

A first line that names a column of texts and one of titles or ids, or that of texts alone, is a header, in any order of
columns; without one a line is `title TAB text`. Whether fields are quoted is seen in the whole file before anything is
taken from it:

- a header whose names are quoted, DPR's header and a header without tabs say that they are;
- so does a file in which every field is quoted, and one in which in each column all are, or exactly those that have to
  be, if in one of them a quotation mark is doubled, or a tab or a line's end is quoted;
- in any other file quotation marks are part of the text.

A tab too many belongs to the text where that is the last column and nothing is quoted; elsewhere it is a fault, and so
is a first line of more than two columns without a header.
"""

import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from rag.index.dpr_tsv import DPR_HEADER
from rag.knowledge.records import (
    ID_NAMES,
    TITLE_NAMES,
    Document,
    Notice,
    Problem,
    ReadingOptions,
    TooLongError,
    document,
    find_columns,
    too_long,
)

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
LONGEST_HEADER = 1000  # characters that are looked at to find one
READ_AT_A_TIME = 2**20
NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
FIELD = re.compile(r'"((?:[^"]++|"")*+)"')  # a quoted field, closed
CLOSING = re.compile(r'(?:[^"]++|"")*+"')  # the rest of one, on a later line
ARE_QUOTED = "fields are quoted as csv writers do, and are unquoted; --csv_quoting none leaves them as they are"
ARE_TEXT = "quotation marks around fields are part of the text; --csv_quoting csv takes them off"
MS_MARCO_DOCUMENT = re.compile(r"D\d+\thttps?://[^\t]*\t[^\t]*\t[^\t]*")  # msmarco-docs.tsv, which has no header
UNKNOWN_COLUMNS = "put a header line above that names them, such as id TAB text TAB title"


class QuotingError(ValueError):
    """A record is not as csv writers write it."""

    def __init__(self, line: int, reason: str):
        super().__init__(f"line {line} {reason}")
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class Layout:
    """How a file is laid out.

    Attributes:
        separator: between two fields.
        columns: fields of a line; 0 where it is not known what they are, as `notice` says.
        title, text: numbers of the fields; no title: -1.
        has_header: whether the first line is one.
        quoted: as csv writers do.
        is_passages: DPR's, which are not cut any more.
        notice: what is worth telling about it; may be empty.
    """

    separator: str = "\t"
    columns: int = 2
    title: int = 0
    text: int = 1
    has_header: bool = False
    quoted: bool = False
    is_passages: bool = False
    notice: str = ""


def read_table(path: Path, options: ReadingOptions) -> Iterator[Document | Problem | Notice]:
    r"""Only \n, \r\n and \r end a line; `NA` and `null` are what they are."""
    state = os.stat(path)
    try:
        layout = _layout_of(path, (state.st_mtime_ns, state.st_size), options.quoting, options.longest)
        if not layout.columns:
            yield Problem(f"{path} line 1", layout.notice)
            return
        if layout.notice:
            yield Notice(str(path), layout.notice)
        with open_text(path) as file:
            rows = _rows(limited_lines(file, options.longest), layout, options.longest)
            for number, fields in itertools.islice(rows, int(layout.has_header), None):
                yield _item(f"{path} line {number}", fields, layout, options)
    except TooLongError as error:
        yield too_long(path, error.line, options)
    except QuotingError as error:  # where the next record begins is not known
        yield Problem(f"{path} line {error.line}", error.reason)


def _item(place: str, fields: list[str], layout: Layout, options: ReadingOptions) -> Document | Problem:
    name = NAMES[layout.separator]
    if not any(field.strip() for field in fields):
        return Problem(place, "is empty; remove it", is_empty=True)
    if len(fields) == 1 < layout.columns:
        return Problem(place, f"has no {name}; write title, {name}, text")
    if len(fields) > layout.columns:
        fields = _without_surplus(fields, layout)
    if len(fields) != layout.columns:
        shown = layout.separator.join(fields)
        return Problem(place, f"has {len(fields)} columns instead of {layout.columns} ({shown!r:.80})")
    if not fields[layout.text].strip():
        return Problem(place, f"has no text behind the {name}; write title, {name}, text", is_empty=True)
    title = fields[layout.title] if layout.title >= 0 else None
    return document(place, title, fields[layout.text], options, is_passage=layout.is_passages)


def _without_surplus(fields: list[str], layout: Layout) -> list[str]:
    """Without separators at the end of a line, as spreadsheets leave them; others belong to a text that is last."""
    while len(fields) > layout.columns and not fields[-1].strip():
        fields = fields[:-1]
    if layout.quoted or layout.text != layout.columns - 1:
        return fields
    return [*fields[: layout.text], layout.separator.join(fields[layout.text :])]


# --- Lines and records ------------------------------------------------------------------------------------------------


def open_text(path: str | os.PathLike, newline: str | None = None) -> io.TextIOWrapper:
    """A text file, compressed or not, for reading; bytes that are not UTF-8 become surrogates."""
    stream = pa.input_stream(pa.OSFile(os.fsencode(path)), compression=COMPRESSIONS.get(Path(path).suffix.lower()))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def limited_lines(file: io.TextIOWrapper, longest: int) -> Iterator[str]:
    """The lines of a file without the \\n at their ends, none of which is ever read beyond `longest` characters."""
    for number in itertools.count(1):
        line = file.readline(longest + 1)
        if not line:
            return
        if len(line) > longest:
            raise TooLongError(number)
        yield line.removesuffix("\n")


def _rows(lines: Iterator[str], layout: Layout, longest: int) -> Iterator[tuple[int, list[str]]]:
    """The number of its first line, and the fields, of every record."""
    if layout.quoted:
        return ((number, fields) for number, fields, _ in quoted_records(lines, layout.separator, longest))
    return ((number, line.split(layout.separator)) for number, line in enumerate(lines, start=1))


def quoted_records(lines: Iterator[str], separator: str, longest: int) -> Iterator[tuple[int, list[str], list[bool]]]:
    """Number of the first line, fields, and whether each was quoted, of every record that a csv writer wrote.

    Raises:
        QuotingError: a quotation mark within a quoted field is not doubled, or one is never closed.
        TooLongError: a record goes on for more than `longest` characters.
    """
    number = 0
    for line in lines:
        number += 1
        first = number
        if '"' not in line:
            fields = line.split(separator)
            yield first, fields, [False] * len(fields)
            continue
        fields, quoted, position = [], [], 0
        while position >= 0:
            if not line.startswith('"', position):
                end = line.find(separator, position)
                fields.append(line[position:] if end < 0 else line[position:end])
                quoted.append(False)
                position = end + 1 if end >= 0 else -1
                continue
            match = FIELD.match(line, position)
            if match is None:
                line, lines_read = _to_closing(line[position:], lines, first, longest)
                number += lines_read
                position, match = 0, FIELD.match(line)
                assert match is not None
            fields.append(match[1].replace('""', '"'))
            quoted.append(True)
            if match.end() < len(line) and line[match.end()] != separator:
                raise QuotingError(
                    first,
                    f"has a quotation mark that is not doubled, behind {match[1][-30:]!r}; double those in quoted "
                    "fields, or give --csv_quoting none where nothing is quoted",
                )
            position = match.end() + 1 if match.end() < len(line) else -1
        yield first, fields, quoted


def _to_closing(start: str, lines: Iterator[str], first: int, longest: int) -> tuple[str, int]:
    """A record from the field on that is open at the end of its line to the line that closes it; lines read for it."""
    parts, size = [start], len(start)
    for line in lines:
        parts.append(line)
        size += len(line) + 1
        if size > longest:
            raise TooLongError(first)
        if CLOSING.match(line):
            return "\n".join(parts), len(parts) - 1
    raise QuotingError(
        first, "opens a quotation mark that is never closed; close it, or give --csv_quoting none if nothing is quoted"
    )


# --- Layouts ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1000)
def _layout_of(path: Path, state: tuple[int, int], quoting: str, longest: int) -> Layout:
    """The layout of a file, of which `state` tells one content from another; read once, however often it is asked."""
    with open_text(path) as file:
        first = file.readline(LONGEST_HEADER).removesuffix("\n")
    layout, says_quoted = _header_of(first)
    if not layout.has_header and MS_MARCO_DOCUMENT.fullmatch(first):
        layout = replace(layout, columns=4, title=2, text=3, notice="MS MARCO's documents: id, address, title, text")
    if quoting != "auto":
        layout = replace(layout, quoted=quoting == "csv")
    elif says_quoted:
        layout = replace(layout, quoted=True, notice="" if layout.is_passages else ARE_QUOTED)
    else:
        layout = _with_quoting(path, layout, longest)
    columns = len(first.rstrip("\t").split("\t"))
    if not (layout.has_header or layout.quoted) and layout.columns == 2 < columns:
        notice = (
            f"has {columns} columns, and no header says which are title and text ({first!r:.80}); {UNKNOWN_COLUMNS}"
        )
        return replace(layout, columns=0, notice=notice)
    if not layout.has_header and layout.columns == 2 and _are_numbered(path, layout, longest):
        notice = "the first column holds numbers, which are taken for ids, not titles; a header title TAB text above"
        layout = replace(layout, title=-1, notice=f"{notice} makes them titles")
    return layout


def _header_of(line: str) -> tuple[Layout, bool]:
    """The layout that a first line names, if it is a header, and whether it says that fields are quoted."""
    for separator in NAMES if "\t" not in line else "\t":
        cells = [cell.strip() for cell in line.split(separator)]
        names = [cell.strip('"').strip().lower() for cell in cells]
        columns = find_columns(names)
        if columns is None or len(set(names)) < len(names):
            continue
        if len(names) > 1 and not set(names) & {*TITLE_NAMES, *ID_NAMES}:
            continue
        if len(names) == 1:
            separator = ","
        is_dpr = names == DPR_HEADER
        layout = Layout(
            separator, len(names), names.index(columns.title) if columns.title else -1, names.index(columns.text),
            has_header=True, is_passages=is_dpr and separator == "\t",
        )  # fmt: skip
        return layout, is_dpr or separator != "\t" or any(cell.startswith('"') for cell in cells)
    return Layout(), False


def _with_quoting(path: Path, layout: Layout, longest: int) -> Layout:
    """Whether fields are quoted, seen in all of them."""
    if not _has_quoted_field(path, layout.separator, longest):
        return layout
    quoted = _are_quoted(path, layout, longest)
    notice = ARE_QUOTED if quoted else ARE_TEXT
    return replace(layout, quoted=quoted, notice=f"{layout.notice}; {notice}" if layout.notice else notice)


def _are_quoted(path: Path, layout: Layout, longest: int) -> bool:
    needs = re.compile(f'["\n{layout.separator}]')
    always, minimal = ([True] * layout.columns for _ in range(2))  # by column
    evidence = False
    with open_text(path) as file:
        records = quoted_records(limited_lines(file, longest), layout.separator, longest)
        try:
            for _, fields, quoted in itertools.islice(records, int(layout.has_header), None):
                if len(fields) != layout.columns:
                    return False
                for column, (field, is_quoted) in enumerate(zip(fields, quoted, strict=True)):
                    needed = needs.search(field) is not None
                    evidence |= is_quoted and needed
                    always[column] &= is_quoted
                    # Spreadsheets quote fields with commas, too.
                    minimal[column] &= needed or "," in field if is_quoted else not needed
                    if not (always[column] or minimal[column]):
                        return False
        except (QuotingError, TooLongError):
            return False
    return evidence or all(always)


def _has_quoted_field(path: Path, separator: str, longest: int) -> bool:
    """Whether any field begins with a quotation mark: a fast look, which most files need no more than."""
    begins = re.compile(rf'[\n{separator}]"')
    last, length = "\n", 0  # of the line that goes on beyond a block
    with open_text(path) as file:
        while block := file.read(READ_AT_A_TIME):
            if begins.search(last + block):
                return True
            end = block.rfind("\n")
            last, length = block[-1], len(block) - end - 1 if end >= 0 else length + len(block)
            if length > longest or not block.strip():  # it is not read to its end, either
                return False
    return False


def _are_numbered(path: Path, layout: Layout, longest: int) -> bool:
    """Whether every line begins with a number, as those of MS MARCO's collection.tsv do."""
    with open_text(path) as file:
        firsts = (fields[0].strip() for _, fields in _rows(limited_lines(file, longest), layout, longest))
        try:
            return next(firsts, "").isdecimal() and all(map(str.isdecimal, firsts))
        except (QuotingError, TooLongError):
            return False
