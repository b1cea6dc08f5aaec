"""Passages of other people's making, and damaged ones: told when they are opened, by row, not at a retrieval.

    passages = open_passages("my_knowledge_dataset")        # --passages_path
    raise_problems(passage_problems(passages, ("title", "text", "embeddings"), origin))

Types and missing values are in the files' heads. Of the rows themselves all are read where they are few, else some
that are spread over the whole; what is wrong with any other is told by the retrieval that finds it.
"""

import os
from pathlib import Path

import datasets
import numpy as np

from rag.errors import UserError, one_line
from rag.files import require_own_files
from rag.index.columns import EmbeddingColumn, TextColumn, is_text, is_vectors, require_finite

FEW_ROWS, SOME_ROWS = 4096, 64  # read at an opening: all of so many, or so many of more
KIND = {"title": "text", "text": "text", "embeddings": "lists of numbers"}


def load_saved(path) -> datasets.Dataset:
    """A dataset that `save_to_disk` has written, of files in its own folder alone."""
    require_own_files(path)
    return datasets.load_from_disk(os.path.abspath(path))  # of "~" and "file:" datasets makes something else


def open_passages(path, flag: str = "--passages_path") -> datasets.Dataset:
    """The dataset in a folder, mapped.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if path is None or not os.path.isdir(path):  # False, too, of a name that can be none
        raise UserError(f"{flag} {path} is not a folder of passages; build it with use_own_knowledge_dataset.py")
    try:
        passages = load_saved(path)
    except Exception as error:  # JSON, Arrow and the disk fail in ways of their own
        if inside := sorted(Path(path).glob("*/state.json")):
            raise UserError(
                f"{flag} {path} is not a folder of passages, but {inside[0].parent} is; give that"
            ) from error
        reason = one_line(error, 200) or type(error).__name__
        raise UserError(
            f"{flag} {path} is not a folder of passages, or is damaged ({reason}); build it with "
            "use_own_knowledge_dataset.py, or fetch it again"
        ) from error
    if not isinstance(passages, datasets.Dataset):
        raise UserError(f"{flag} {path} holds several splits ({', '.join(map(str, passages))}); give the folder of one")
    return passages


def passage_problems(passages, needed: tuple[str, ...], origin: str) -> list[str]:
    """Columns that are missing, of another type or with missing values; a title may be missing, which is an empty one.

    Args:
        passages: a dataset.
        needed: names of columns.
        origin: the flag that gave it, and its value.
    """
    missing = [name for name in needed if name not in passages.column_names]
    if missing:
        return [
            f"{origin}: the passages lack the column(s) {', '.join(missing)} (found: "
            f"{', '.join(passages.column_names)}); build them with use_own_knowledge_dataset.py"
        ]
    problems = []
    for name in needed:
        column = passages.data.column(name)
        fits = is_vectors(column.type) if name == "embeddings" else is_text(column.type)
        if not fits:
            problems.append(
                f"{origin}: the column {name} holds {column.type}, not {KIND[name]}; build the passages with "
                "use_own_knowledge_dataset.py, or cast the column and save them again"
            )
        elif name != "title" and (row := _first_missing(column)) is not None:
            problems.append(
                f"{origin}: row {row} has no {name} (null, as {column.null_count:,} rows have); leave such rows out "
                "and build passages and index again"
            )
    return problems


def _first_missing(column) -> int | None:
    """The row of the first null of a column; null counts are in the files' heads."""
    start = 0
    for chunk in column.chunks if column.null_count else ():
        if chunk.null_count:
            return start + int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
        start += len(chunk)
    return None


def look_at_rows(texts: list[TextColumn], embeddings: EmbeddingColumn | None, origin: str) -> None:
    """Read all rows where they are few, else some.

    Raises:
        UserError: a text is not UTF-8, or an embedding is not as long as the others or holds NaN or infinity.
    """
    count = len(texts[0])
    rows = np.arange(count) if count <= FEW_ROWS else np.linspace(0, count - 1, SOME_ROWS).astype(np.int64)
    for column in texts:
        column.gather(rows)
    if embeddings is not None:
        require_finite(embeddings.gather(rows), rows, origin)
