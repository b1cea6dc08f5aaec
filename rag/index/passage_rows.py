"""The passages by row: titles and texts at once, every other column on first use.

    rows = PassageRows(dataset)
    docs = rows.doc_dicts([[7, 2], [0, -1]], rows.names)
    docs[0]["title"]         # ["rome", "berlin"]
    docs[0]["embeddings"]    # (2, d) float32, read now
    rows.dataset[7]          # every column of one passage

A generator's contexts are made of titles and texts. To read all other columns for every question, too, would take
longer than many a search.
"""

import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from rag.checksums import stamp_of
from rag.index.columns import ORIGIN, EmbeddingColumn, TextColumn

# Columns that are read with every retrieval.
TEXT_COLUMNS = ("title", "text")
VECTOR_COLUMN = "embeddings"
_UNREAD = object()  # stands for a column's values until they are read


if TYPE_CHECKING:
    ReadingDict = dict[str, Any]
else:  # MutableMapping's methods get values by __getitem__, dict's own would not

    class ReadingDict(MutableMapping, dict):
        pass


class PassageDict(ReadingDict):
    """A dict of the columns of some passages, each column of which is read on first use.

    It equals the plain dict of the same columns, and it is pickled and copied as one.

    Args:
        columns: values by column, `_UNREAD` for those that are read later.
        read: gives the values of a column by its name.
    """

    def __init__(self, columns: dict, read: Callable[[str], object]):
        dict.__init__(self, columns)
        self._read = read

    def __getitem__(self, name):
        values = dict.__getitem__(self, name)
        if values is _UNREAD:
            values = self._read(name)
            dict.__setitem__(self, name, values)
        return values

    def __iter__(self) -> Iterator[str]:
        # A Python function: `dict(passages)` copies a mapping with dict's own __iter__ past __getitem__.
        return dict.__iter__(self)

    __len__ = dict.__len__
    __setitem__ = dict.__setitem__
    __delitem__ = dict.__delitem__
    __contains__ = dict.__contains__
    __reversed__ = dict.__reversed__
    __hash__ = None

    def __eq__(self, other) -> bool:
        if not isinstance(other, dict):
            return NotImplemented
        return self.keys() == other.keys() and all(_equal(values, other[name]) for name, values in self.items())

    def __ne__(self, other) -> bool:
        return not self == other

    def __or__(self, other):
        return dict(self) | other

    def __ror__(self, other):
        return other | dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict:
        return dict(self)

    def __reduce__(self):
        return dict, (dict(self),)


def _equal(one, other) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one == other


class PassageRows:
    """The rows of a dataset of passages, which is memory-mapped where its files are.

    Pickling takes the dataset along, of mapped files their paths alone.

    Args:
        dataset: has the columns title and text (str); if embeddings, lists of floats of one length.
        origin: the flag that gave it, and its value, for the messages.
    """

    def __init__(self, dataset: datasets.Dataset, origin: str = ORIGIN):
        self.origin = origin
        if dataset._indices is not None:  # a selection or shuffle of another dataset: rows must lie in order
            dataset = dataset.flatten_indices()
        # Neither the format of the given dataset nor an index that was added to it, of which each copy would be whole.
        table = dataset.data
        self._plain = datasets.Dataset(
            table, info=dataset.info, split=dataset.split, fingerprint=fingerprint_of(dataset)
        )
        self.names = tuple(self._plain.column_names)
        self.texts = {name: TextColumn(table.column(name), origin) for name in TEXT_COLUMNS}

    def __len__(self) -> int:
        return len(self._plain)

    def __reduce__(self):
        return PassageRows, (self._plain, self.origin)

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Every column; embeddings as float32 arrays."""
        if VECTOR_COLUMN not in self.names:
            return self._plain
        return self._plain.with_format("numpy", [VECTOR_COLUMN], output_all_columns=True, dtype="float32")

    @cached_property
    def _vectors(self) -> EmbeddingColumn:
        column = self.column(VECTOR_COLUMN)
        return EmbeddingColumn(column, len(column[0]) if len(column) else 0, self.origin)

    def column(self, name: str):
        """A column as a chunked Arrow array, mapped where its files are."""
        return self._plain.data.column(name)

    def stamp(self) -> str:
        """Tells the files of the passages, as they are now, from any others."""
        return stamp_of(file["filename"] for file in self._plain.cache_files) + fingerprint_of(self._plain)

    def save(self, folder: str | os.PathLike) -> None:
        """Write every column into a folder, for `datasets.load_from_disk`."""
        self._plain.save_to_disk(os.path.abspath(folder))

    def doc_dicts(self, rows: list[list[int]], names: Iterable[str]) -> list[PassageDict]:
        """The columns of these names for each list of row numbers; each title and text is read once.

        In a slot without a passage, number -1, there is an empty string, a zero vector, or None.
        """
        wanted = list({row: None for numbers in rows for row in numbers})
        titles, texts = (
            dict(zip(wanted, self.texts[name].gather(np.array(wanted, dtype=np.int64)), strict=True))
            for name in TEXT_COLUMNS
        )
        unread = dict.fromkeys(names, _UNREAD)
        return [
            PassageDict(
                unread | {"title": [titles[row] for row in numbers], "text": [texts[row] for row in numbers]},
                partial(self._read, numbers),
            )
            for numbers in rows
        ]

    def _read(self, numbers: list[int], name: str) -> list | np.ndarray:
        """The values of a column in these rows."""
        if name == VECTOR_COLUMN:
            return self._vectors.gather(np.array(numbers, dtype=np.int64))
        there = [row for row in numbers if row >= 0]
        column = self._plain.select_columns([name])  # nothing else is decoded
        values = iter(column[there][name])
        empty = "" if column.features[name] == datasets.Value("string") else None
        return [next(values) if row >= 0 else empty for row in numbers]


def fingerprint_of(dataset: datasets.Dataset) -> str:
    """Tells one content from another; saved with the dataset."""
    return dataset._fingerprint
