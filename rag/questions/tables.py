"""The rows of local files with named columns: JSON lines, a JSON list of records, Parquet, text by commas or tabs.

    tables = local_tables("my_questions")     # {"train": [Table, ...], "val": [...]}
    tables["train"][0].cells("question")

What cannot be read is a `UserError` that names the file and, in text, the line.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import UserError, one_line
from rag.files import read_lines, require_lines
from rag.questions.arguments import DatasetArguments

KINDS = ("parquet", "jsonl", "json", "csv", "tsv")
# What splits are called, by the names of the suite's own files.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
KINDS_TEXT = "give a file .parquet, .jsonl, .json, .csv or .tsv, a folder of such, or a name on the hub"
FOLDER_TEXT = "name its files by their splits (train.jsonl, validation.jsonl, test.jsonl)"


@dataclass
class Table:
    """Rows with named columns.

    Args:
        place: what messages call it.
        names: of its columns.
        cells: from a column's name to its cells, one a row.
        row: what messages call a row, whose numbers begin at 1.
        is_text: each cell is a text, also where a list is meant.
    """

    place: str
    names: list[str]
    cells: Callable[[str], list[Any]]
    row: str = "row"
    is_text: bool = False


def is_local(name: str) -> bool:
    """Whether a name is a path: it is there, or can be no name on the hub, or ends as a file does that is read."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or _kind(name) in KINDS


def path_problems(args: DatasetArguments) -> list[str]:
    """Why --dataset_name cannot be read, as far as a look at the disk tells; none of a name on the hub."""
    name, what = args.dataset_name, f"--dataset_name {args.dataset_name}"
    if name is None or not is_local(name):
        return []
    if args.dataset_config is not None:
        return [
            f"--dataset_config {args.dataset_config} is for a dataset of the hub, and {what} is a path; leave it out"
        ]
    if os.path.isdir(name):
        try:
            _files_by_split(Path(name), what)
        except UserError as error:
            return [str(error)]
        return []
    if not os.path.exists(name):
        return [f"{what} does not exist; {KINDS_TEXT}"]
    if not os.path.isfile(name):
        return [f"{what} is a device or a pipe; {KINDS_TEXT}"]
    return [] if _kind(name) in KINDS else [f"{what} is of no kind that is read; {KINDS_TEXT}"]


def local_files(name: str) -> dict[str, list[Path]]:
    """The files of a path by their split; a single file is of the split ""."""
    return _files_by_split(Path(name), f"--dataset_name {name}") if os.path.isdir(name) else {"": [Path(name)]}


def local_tables(name: str) -> dict[str, list[Table]]:
    """The tables of each split, of a single file of the split ""."""
    return {split: [read_table(path) for path in files] for split, files in local_files(name).items()}


def _kind(name: str | Path) -> str:
    return Path(name).suffix.lower().removeprefix(".")


def _files_by_split(folder: Path, what: str) -> dict[str, list[Path]]:
    files = sorted(path for path in folder.iterdir() if _kind(path) in KINDS and not path.name.startswith("."))
    by_split: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[-_. ]", path.stem.lower())
        if split := next((split for word in words for split, names in SPLIT_NAMES.items() if word in names), None):
            by_split.setdefault(split, []).append(path)
    for own in by_split.values():
        if len({_kind(path) for path in own}) > 1:
            names = " and ".join(path.name for path in own[:2])
            raise UserError(f"{what} has {names}, two kinds of file for one split; leave one of them")
    if not by_split:
        found = ", ".join(path.name for path in files[:5]) or "no file of a kind that is read"
        raise UserError(f"{what} has no file of a split (found: {found}); {FOLDER_TEXT}, or give one file")
    return by_split


# --- Files ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Table:
    """The rows of a file, by the ending of its name."""
    kind = _kind(path)
    with _reading(path):
        if kind == "parquet":
            return _read_parquet(path)
        return _read_separated(path, "," if kind == "csv" else "\t") if kind in ("csv", "tsv") else _read_json(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file becomes one line with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--dataset_name: {error}") from error
    except PermissionError as error:
        raise UserError(f"--dataset_name: {path} may not be read ({error.strerror}); change its permissions") from error
    except Exception as error:  # Arrow has an error for each kind of damage, which share no class with others
        raise UserError(f"--dataset_name: {path} cannot be read ({one_line(error, 200)}); make it again") from error


def _read_json(path: Path) -> Table:
    lines = read_lines(path)
    is_list = bool(lines) and lines[0].lstrip().startswith("[")
    records = json_of("\n".join(lines)) if is_list else [json_of(line) for line in lines]
    row = "record" if is_list else "line"
    if records == []:
        raise UserError(f'{path} is empty; `{{"question": "...", "answers": ["..."]}}` is expected, one a question')
    for number, record in enumerate([None] if records is None else records, start=1):
        if not isinstance(record, dict):
            shown = "" if is_list else f", not {lines[number - 1][:80]!r}"
            raise UserError(f'{path}, {row} {number}: `{{"question": "...", "answers": ["..."]}}` is expected{shown}')
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(str(path), names, lambda name: [record.get(name) for record in records], row)


def json_of(text: str) -> Any:
    """What is written there; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.OSFile(os.fsencode(path))) as file:
        names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of one name ({', '.join(names)}); rename one")

    def cells(name: str) -> list[Any]:
        with _reading(path), pq.ParquetFile(pa.OSFile(os.fsencode(path))) as file:
            return file.read(columns=[name], use_threads=False).column(name).to_pylist()

    return Table(str(path), names, cells)


def _read_separated(path: Path, delimiter: str) -> Table:
    """Fields as csv writers quote them; a quotation mark that is not closed is an error: it would swallow lines."""
    require_lines(path)
    csv.field_size_limit(2**27)
    rows: list[list[str]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row and rows and len(row) != len(rows[0]):
                    raise UserError(
                        f"{path}, line {reader.line_num} has {len(row)} columns, its header has {len(rows[0])}; quote "
                        "what holds a separator"
                    )
                rows += [row] if row else []
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; write it with a csv writer") from error
    if not rows:
        raise UserError(f"{path} is empty; a header with the names of its columns is expected")
    header, *body = rows
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name ({', '.join(header)}); rename one")
    return Table(str(path), header, lambda name: [row[header.index(name)] for row in body], is_text=True)
