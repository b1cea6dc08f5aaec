"""What a source of documents is made of: a document, a problem with one, and which columns or keys hold its parts.

names = find_columns(["id", "title", "body"])      # Columns(title="title", text="body")
item = document("my.tsv line 7", title, text)      # a Document, or the Problem with it
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Of several the first one counts. "contents" is FlashRAG's and Pyserini's, "body" and "passage" are MS MARCO's,
# "page_content" is LangChain's.
TEXT_NAMES = ("text", "contents", "passage", "body", "content", "context", "paragraph", "document", "page_content")
TITLE_NAMES = ("title", "wikipedia_title")  # the second is KILT's
ID_NAMES = ("", "id", "_id", "docid", "doc_id", "pid", "passage_id", "url")  # "": pandas names its numbers so
MILLION = 10**6
ROW_GROUP_LINES = 16  # of the longest length: the most that a row group of a Parquet file may hold


@dataclass(frozen=True)
class ReadingOptions:
    """How sources are read.

    Attributes:
        quoting: of tab-separated files: "csv", as csv writers quote; "none"; "auto" for what a file shows.
        max_line_mb: million characters of the longest line, row or quoted record.
        skip_empty: pass over rows that have no text.
        output: the folder that is being made, which may lie in the source.
    """

    quoting: str = "auto"
    max_line_mb: int = 64
    skip_empty: bool = False
    output: Path | None = None

    @property
    def longest(self) -> int:
        """Characters of the longest line."""
        return self.max_line_mb * MILLION

    @property
    def longest_row_group(self) -> int:
        """Bytes that a row group of a Parquet file may hold."""
        return ROW_GROUP_LINES * self.longest


class Document(NamedTuple):
    """Attributes:
    title: may be empty.
    text: never blank.
    is_passage: whether it is not to be cut any more.
    """

    title: str
    text: str
    is_passage: bool = False


class Problem(NamedTuple):
    """Attributes:
    place: file, and line or row from 1.
    reason: what is wrong there and what to do.
    is_empty: whether nothing is wrong but that there is no text.
    """

    place: str
    reason: str
    is_empty: bool = False


class Notice(NamedTuple):
    """How a file or folder was understood, where that may surprise."""

    place: str
    says: str


class TooLongError(ValueError):
    """A line, or a quoted record, is longer than is read."""

    def __init__(self, line: int):
        super().__init__(f"line {line}")
        self.line = line


class Columns(NamedTuple):
    """The names of the columns that hold title and text; no title: ""."""

    title: str
    text: str


def find_columns(names: Iterable[str]) -> Columns | None:
    """The columns of title and text among `names`, in any case; None where none is known to hold a text."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(name.strip().lower(), name)
    text = next((known[name] for name in TEXT_NAMES if name in known), None)
    return None if text is None else Columns(next((known[name] for name in TITLE_NAMES if name in known), ""), text)


def too_long(path: str | os.PathLike, line: int, options: ReadingOptions) -> Problem:
    return Problem(
        f"{path} line {line}",
        f"is longer than --max_line_mb {options.max_line_mb} (million characters); cut it into documents, or give more",
    )


def document(
    place: str, title: Any, text: Any, options: ReadingOptions, columns: Columns | None = None, is_passage: bool = False
) -> Document | Problem:
    """A document of two values as they were read.

    No title is an empty one. A text may be a list of paragraphs, as KILT's, the first of which may repeat the title.
    Where there is no column of titles, the first line of `contents` is the title, in quotes or not.
    """
    if not isinstance(title, str | None):
        return Problem(place, f"has a title that is no string but {title!r:.40}")
    if isinstance(text, list) and text and all(isinstance(part, str) for part in text):
        text = "\n".join(part.strip("\n") for part in text[title is not None and text[0].strip() == title.strip() :])
    if not isinstance(text, str | None):
        return Problem(place, f"has a text that is no string but {text!r:.40}")
    if text is None or not text.strip():
        return Problem(place, "has no text; --skip_empty passes over such rows", is_empty=True)
    if len(text) > options.longest:
        return Problem(
            place, f"has a text longer than --max_line_mb {options.max_line_mb} (million characters); give more"
        )
    if columns is not None and not columns.title and columns.text.lower() == "contents":
        first, _, rest = text.strip().partition("\n")
        if rest.strip():
            title, text = first.strip().strip('"'), rest
    found = Document(title or "", text, is_passage)
    try:
        found.title.encode()
        text.encode()
    except UnicodeEncodeError:
        return Problem(place, "is not UTF-8; convert the file (iconv -t utf-8)")
    return found
