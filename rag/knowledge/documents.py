"""Documents of any source, one after the other: tables of text, JSON lines, Parquet, datasets, folders of these.

    for item in read_documents("my_documents"):
        if isinstance(item, Document): item.title, item.text

| source | form |
|---|---|
| tab-separated (any other name) | `title TAB text` a line, or columns that a header names; see `tables` |
| DPR's psgs_w100.tsv | the header `id TAB text TAB title` says so; its passages are not cut |
| .jsonl, .ndjson, .json | an object with "text" (or "contents", "passage", "body") and, perhaps, "title" a line |
| .parquet | columns of the same names |
| a dataset's folder | what `datasets.Dataset.save_to_disk` left, columns as Parquet's |
| a BEIR folder | its corpus.jsonl |
| any other folder | all of these in it, by name; hidden files and what this suite has built there are left out |

Text files may be compressed, NAME.gz, NAME.bz2 or NAME.zst. Everything is read as a stream, whatever its size; no line,
and no row group of a Parquet file, beyond a stated size.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rag.errors import UserError, one_line
from rag.files import read_state
from rag.knowledge.arguments import OUTPUT_NAMES, PASSAGES_FOLDER
from rag.knowledge.records import (
    MILLION,
    ROW_GROUP_LINES,
    Columns,
    Document,
    Notice,
    Problem,
    ReadingOptions,
    TooLongError,
    document,
    find_columns,
    too_long,
)
from rag.knowledge.tables import COMPRESSIONS, limited_lines, open_text, read_table

JSON_LINES = (".jsonl", ".ndjson", ".json")
ROWS_AT_A_TIME = 1000
BEIR_CORPUS = {"corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"}
BEIR_OTHERS = ("queries.jsonl", "qrels")
# How files begin that are no text, what they are, and what to do about it.
OTHER_KINDS = {
    rb"\x1f\x8b": ("packed by gzip", "name it NAME.gz"),
    rb"\x28\xb5\x2f\xfd": ("packed by zstd", "name it NAME.zst"),
    rb"BZh[1-9]1AY&SY": ("packed by bzip2", "name it NAME.bz2"),
    rb"\xfd7zXZ\0": ("packed by xz", "unpack it"),
    rb"7z\xbc\xaf\x27\x1c": ("an archive of 7-Zip", "unpack it"),
    rb"PK\x03\x04": ("a zip archive or an office document", "unpack it, or save it as tab-separated text in UTF-8"),
    rb"PAR1": ("a Parquet file", "name it NAME.parquet"),
    rb"ARROW1": ("an Arrow file", "write it as Parquet"),
    rb"\xff\xff\xff\xff": ("an Arrow stream", "give the whole folder of the dataset, or write it as Parquet"),
    rb"%PDF-": ("a PDF", "save its text"),
    rb"SQLite format 3\0": ("a SQLite database", "write its rows as JSON lines or tab-separated text"),
    rb"\xff\xfe|\xfe\xff": ("UTF-16 text", "convert it (iconv -f utf-16 -t utf-8)"),
}

Items = Iterator[Document | Problem | Notice]


def read_documents(path: str | os.PathLike, options: ReadingOptions | None = None) -> Items:
    """All documents of a file or folder in their order, a `Problem` in the place of each that cannot be one."""
    yield from _read(Path(path), options or ReadingOptions(), ())


def _read(path: Path, options: ReadingOptions, above: tuple[str, ...]) -> Items:
    """Args:
    above: the folders that this one lies in, links followed: one that leads back to them is not followed again.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        remedy = "give a file or a folder of documents"
        missing = isinstance(error, FileNotFoundError)
        yield Problem(str(path), f"does not exist; {remedy}" if missing else f"{error.strerror or error}; {remedy}")
        return
    if stat.S_ISREG(mode):
        yield from _read_file(path, options)
    elif not stat.S_ISDIR(mode):
        yield Problem(str(path), "is a device or a pipe, which is not read; give a file or a folder of documents")
    elif _is_dataset(path):
        yield from _read_dataset(path, options)
    elif (path / "dataset_dict.json").is_file():
        yield _splits(path)
    elif os.path.realpath(path) not in above:
        yield from _read_folder(path, options, (*above, os.path.realpath(path)))


def _is_dataset(path: Path) -> bool:
    """Whether a folder is a saved dataset, or was one before one of its two lists was lost."""
    lists = [name for name in ("dataset_info.json", "state.json") if (path / name).is_file()]
    return len(lists) == 2 or (len(lists) == 1 and any(path.glob("data-*.arrow")))


def _read_folder(path: Path, options: ReadingOptions, above: tuple[str, ...]) -> Items:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        yield Problem(str(path), f"cannot be read ({error.strerror})")
        return
    names = {entry.name for entry in entries}
    if names & BEIR_CORPUS and names & set(BEIR_OTHERS):
        yield Notice(str(path), "is a BEIR data set: its corpus is read, its queries and qrels are not")
        entries = [entry for entry in entries if entry.name in BEIR_CORPUS]
    is_output = options.output is not None and os.path.realpath(path) == os.path.realpath(options.output)
    if is_output or {PASSAGES_FOLDER, "index.json"} <= names:
        if not is_output:
            yield Notice(str(path), "holds knowledge that was built there, which is not read as documents")
        entries = [entry for entry in entries if entry.name not in OUTPUT_NAMES]
    for entry in entries:
        yield from _read(entry, options, above)


def _read_file(path: Path, options: ReadingOptions) -> Items:
    packed = path.suffix.lower() in COMPRESSIONS
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    read = _read_parquet if kind == ".parquet" else _read_json_lines if kind in JSON_LINES else read_table
    try:
        if not packed and kind != ".parquet" and (problem := _of_other_kind(path)):
            yield problem
            return
        yield from read(path, options)
    except TooLongError as error:
        yield too_long(path, error.line, options)
    except (OSError, pa.ArrowException) as error:
        yield Problem(str(path), f"cannot be read to its end ({one_line(error, 120)}); make or fetch it again")


def _of_other_kind(path: Path) -> Problem | None:
    """Why a file cannot be read as text, where its first bytes say so."""
    with open(path, "rb") as file:
        head = file.read(16)
    for beginning, (what, remedy) in OTHER_KINDS.items():
        if re.match(beginning, head):
            return Problem(str(path), f"is {what}; {remedy}")
    return None


def _read_json_lines(path: Path, options: ReadingOptions) -> Items:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(limited_lines(file, options.longest), start=1):
            place = f"{path} line {number}"
            if number == 1 and line.lstrip().startswith("["):
                yield Problem(place, "begins a JSON array; write one object a line (jq -c '.[]' does)")
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Problem(place, f"is not JSON ({one_line(error, 120)}); write one object a line", not line.strip())
                continue
            if isinstance(row, dict):
                columns = find_columns(name for name, value in row.items() if value is not None)
                if columns is None and find_columns(row) is None:
                    found = ", ".join(row)[:80]
                    reason = f"has no text (found: {found}); name it text, or give --skip_empty to pass over such rows"
                    yield Problem(place, reason, is_empty=True)
                    continue
                columns = columns or Columns("", "text")
                yield document(place, row.get(columns.title), row.get(columns.text), options, columns)
            else:
                yield Problem(place, 'is no object; write {"title": ..., "text": ...}')


# --- Columns ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, options: ReadingOptions) -> Items:
    if path.suffix.lower() in COMPRESSIONS:
        yield Problem(str(path), "is a packed Parquet file, which is compressed within; unpack it")
        return
    with pq.ParquetFile(pa.OSFile(os.fsencode(path))) as file:
        columns = find_columns(file.schema_arrow.names)
    if columns is None:
        yield _no_text_column(path, file.schema_arrow.names)
        return
    names = [name for name in columns if name]
    if any(file.schema_arrow.names.count(name) > 1 for name in names):
        yield Problem(str(path), f"has two columns of one name ({', '.join(file.schema_arrow.names)}); rename one")
        return
    # A text that many rows share is read once: a file of some KB can be made to hold any number of copies.
    shared = [name for name in names if not pa.types.is_nested(file.schema_arrow.field(name).type)]
    with pq.ParquetFile(pa.OSFile(os.fsencode(path)), read_dictionary=shared) as file:
        row = 0
        for group in range(file.num_row_groups):
            size = _size_on_disk(file.metadata.row_group(group), names)
            if size <= options.longest_row_group:
                size = 0
                # One thread, because several leave each their own share of unused memory behind.
                for batch in file.iter_batches(ROWS_AT_A_TIME, [group], names, use_threads=False):
                    size += sum(map(_size_of, batch.columns))
                    if size > options.longest_row_group:
                        break
                    yield from _read_batch(path, batch, columns, row, options)
                    row += len(batch)
            if size > options.longest_row_group:
                yield Problem(
                    f"{path} row group {group + 1}",
                    f"holds more than {ROW_GROUP_LINES} times --max_line_mb {options.max_line_mb} (million bytes); "
                    "write smaller row groups, or give more",
                )
                return


def _size_on_disk(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """Bytes of the columns of a row group, unpacked."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names)


def _size_of(column: pa.Array) -> int:
    """Bytes of the values of a column, each counted as often as it occurs."""
    if not isinstance(column, pa.DictionaryArray):
        return column.nbytes
    return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0


def _read_dataset(path: Path, options: ReadingOptions) -> Items:
    from rag.index.passage_checks import load_saved

    try:
        dataset = load_saved(path)
        columns = find_columns(dataset.column_names)
        if columns is None:
            yield _no_text_column(path, dataset.column_names)
            return
        rows = dataset.select_columns([name for name in columns if name]).with_format("arrow").iter(ROWS_AT_A_TIME)
        row = 0
        for batch in rows:
            batch.validate(full=True)  # else a damaged place of a text would end the process
            yield from _read_batch(path, batch, columns, row, options)
            row += len(batch)
    except (
        OSError,
        LookupError,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        yield Problem(str(path), f"is not a whole dataset ({one_line(error, 120)}); save it again")


def _splits(path: Path) -> Problem:
    try:
        splits = ", ".join(read_state(path / "dataset_dict.json", "save it again")["splits"])
    except (UserError, KeyError, TypeError) as error:
        return Problem(str(path), f"is not a whole dataset ({one_line(error, 120)}); save it again")
    return Problem(str(path), f"holds the splits {splits}; give the folder of one of them")


def _read_batch(path: Path, batch, columns: Columns, row: int, options: ReadingOptions) -> Items:
    """Rows of an Arrow table or record batch, before which there are `row` others."""
    titles = _values(batch[columns.title]) if columns.title else [None] * len(batch)
    for number, (title, text) in enumerate(zip(titles, _values(batch[columns.text]), strict=True), start=row + 1):
        yield document(f"{path} row {number}", title, text, options, columns)


def _values(column: pa.Array | pa.ChunkedArray) -> Iterable:
    """The values of a column, one after the other where all at once would take much memory."""
    is_shared = pa.types.is_dictionary(column.type)
    return (value.as_py() for value in column) if is_shared and _size_of(column) > MILLION else column.to_pylist()


def _no_text_column(path: Path, columns: Iterable[str]) -> Problem:
    return Problem(str(path), f"has no column text (found: {', '.join(columns)}); name the two title and text")
