"""Documents of any source, one after the other: tab-separated, JSON lines, Parquet, datasets, folders of these.

    for item in read_documents("my_documents"):
        if isinstance(item, Document): item.title, item.text

| source | form |
|---|---|
| tab-separated (any other name) | `title TAB text` a line; nothing quoted; a first line `title TAB text` is a header |
| DPR's psgs_w100.tsv | the header `id TAB text TAB title` says so; fields may be quoted, quotes in them doubled |
| .jsonl, .ndjson, .json | an object with "text" and, perhaps, "title" a line |
| .parquet | the columns text and, perhaps, title |
| a dataset's folder | what `datasets.Dataset.save_to_disk` left, columns as Parquet's |
| any other folder | all of these in it, by name; hidden files are left out |

Text files may be compressed, NAME.gz or NAME.zst. Everything is read as a stream, whatever its size.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rag.index.dpr_tsv import DPR_HEADER, DprRowError, cells, dpr_rows

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
TSV_HEADER = ["title", "text"]
ROWS_AT_A_TIME = 1000
LONGEST_HEADER = 1000  # characters that are looked at to find one


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
    """

    place: str
    reason: str


def read_documents(path: str | os.PathLike) -> Iterator[Document | Problem]:
    """All documents of a file or folder in their order, a `Problem` in the place of each that cannot be one."""
    path = Path(path)
    if path.is_file():
        yield from _read_file(path)
    elif (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        yield from _read_dataset(path)
    elif (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        yield Problem(str(path), f"holds the splits {splits}; give the folder of one of them")
    elif path.is_dir():
        for entry in sorted(path.iterdir()):
            if not entry.name.startswith("."):
                yield from read_documents(entry)
    else:
        yield Problem(str(path), "does not exist; give a file or a folder of documents")


def _read_file(path: Path) -> Iterator[Document | Problem]:
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if kind == ".parquet":
        read = _read_parquet
    elif kind in JSON_LINES:
        read = _read_json_lines
    else:
        read = _read_dpr if _first_line(path) == DPR_HEADER else _read_tsv
    try:
        yield from read(path)
    except (OSError, pa.ArrowException) as error:
        yield Problem(str(path), f"cannot be read to its end ({_one_line(error)}); make or fetch it again")


# --- Text files -------------------------------------------------------------------------------------------------------


def open_text(path: str | os.PathLike, newline: str | None = None) -> io.TextIOWrapper:
    """A text file, compressed or not, for reading; bytes that are not UTF-8 become surrogates."""
    stream = pa.input_stream(str(path), compression=COMPRESSIONS.get(Path(path).suffix))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _first_line(path: Path) -> list[str] | None:
    """The cells of a first line that could be a header, None where the file cannot be read."""
    try:
        with open_text(path) as file:
            return cells(file.readline(LONGEST_HEADER))
    except OSError:
        return None


def _read_tsv(path: Path) -> Iterator[Document | Problem]:
    """Only \\n, \\r\\n and \\r end a line; quotation marks, `NA` and `null` are what they are."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix("\n")
            if number == 1 and cells(line) == TSV_HEADER:
                continue
            place = f"{path} line {number}"
            title, tab, text = line.partition("\t")
            if not line.strip():
                yield Problem(place, "is empty; remove it")
            elif not tab:
                yield Problem(place, "has no tab; write title, tab, text")
            elif not text.strip():
                yield Problem(place, "has no text behind the tab; write title, tab, text")
            else:
                yield _document(place, title, text)


def _read_dpr(path: Path) -> Iterator[Document | Problem]:
    with open_text(path, newline="") as file:
        try:
            for number, _, text, title in dpr_rows(file):
                yield _document(f"{path} line {number}", title, text, is_passage=True)
        except DprRowError as error:  # where the next row begins is not known
            yield Problem(f"{path} line {error.line}", error.reason)


def _read_json_lines(path: Path) -> Iterator[Document | Problem]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Problem(place, f"is not JSON ({_one_line(error)}); write one object a line")
                continue
            if isinstance(row, dict):
                yield _document(place, row.get("title"), row.get("text"))
            else:
                yield Problem(place, 'is no object; write {"title": ..., "text": ...}')


# --- Columns ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Document | Problem]:
    if path.suffix in COMPRESSIONS:
        yield Problem(str(path), "is a packed Parquet file, which is compressed within; unpack it")
        return
    with pq.ParquetFile(path) as file:
        columns = [name for name in TSV_HEADER if name in file.schema_arrow.names]
        if "text" in columns:
            # One thread, because several leave each their own share of unused memory behind.
            yield from _read_batches(path, file.iter_batches(ROWS_AT_A_TIME, columns=columns, use_threads=False))
        else:
            yield _no_text_column(path, file.schema_arrow.names)


def _read_dataset(path: Path) -> Iterator[Document | Problem]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        yield Problem(str(path), f"is not a whole dataset ({_one_line(error)}); save it again")
        return
    columns = [name for name in TSV_HEADER if name in dataset.column_names]
    if "text" in columns:
        yield from _read_batches(path, dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_A_TIME))
    else:
        yield _no_text_column(path, dataset.column_names)


def _read_batches(path: Path, batches: Iterable) -> Iterator[Document | Problem]:
    """Rows of Arrow tables or record batches."""
    number = 0
    for batch in batches:
        texts = batch["text"].to_pylist()
        titles = batch["title"].to_pylist() if "title" in batch.schema.names else [None] * len(texts)
        for title, text in zip(titles, texts, strict=True):
            number += 1
            yield _document(f"{path} row {number}", title, text)


def _no_text_column(path: Path, columns: list[str]) -> Problem:
    return Problem(str(path), f"has no column text (found: {', '.join(columns)}); name the two title and text")


# --- All of them ------------------------------------------------------------------------------------------------------


def _document(place: str, title, text, is_passage: bool = False) -> Document | Problem:
    """A document of two values as they were read; no title is an empty one."""
    if not isinstance(title, str | None):
        return Problem(place, f"has a title that is no string but {title!r:.40}")
    if not isinstance(text, str | None):
        return Problem(place, f"has a text that is no string but {text!r:.40}")
    if text is None or not text.strip():
        return Problem(place, "has no text")
    document = Document(title or "", text, is_passage)
    try:
        document.title.encode()
        text.encode()
    except UnicodeEncodeError:
        return Problem(place, "is not UTF-8; convert the file (iconv -t utf-8)")
    return document


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
