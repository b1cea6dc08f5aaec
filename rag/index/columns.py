"""The columns of the passages, memory-mapped: strings and vectors by row, without decoding anything else.

    embeddings = EmbeddingColumn(passages.data.column("embeddings"), dimension=768)
    embeddings.gather(doc_ids)                                # (B, n_docs) int64 to (B, n_docs, 768) float32
    TextColumn(passages.data.column("title")).gather(row_numbers)

A row is read without decoding any other.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import faiss
import numpy as np
import pyarrow as pa

from rag.errors import UserError

ORIGIN = "the passages"  # in messages, where it is not said which flag gave them
LENGTHS_DIFFER = 2e-3  # share of the squared length
REBUILD = "build the passages again, or fetch them"


def is_text(kind: pa.DataType) -> bool:
    """Whether the values of an Arrow type can be read as strings; a column of nulls alone as empty ones."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def is_vectors(kind: pa.DataType) -> bool:
    """Whether the values of an Arrow type are lists of numbers."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    numbers = (pa.types.is_floating, pa.types.is_integer)
    return any(is_list(kind) for is_list in lists) and any(is_number(kind.value_type) for is_number in numbers)


def require_finite(vectors: np.ndarray, rows: np.ndarray, origin: str = ORIGIN) -> None:
    """Raise `UserError` if one of `vectors` (..., d), of the passages `rows` (...), holds NaN or infinity."""
    finite = np.isfinite(vectors)
    if not finite.all():
        row = rows[~finite.all(axis=-1)].flat[0]
        raise UserError(f"{origin}: the embedding of row {row} holds NaN or infinity; embed the passages again")


def equally_long(blocks: Iterable[np.ndarray]) -> bool:
    """Whether all vectors, in blocks (any, d), have one length but for the rounding of half precision."""
    least, most = np.inf, 0.0
    for block in blocks:
        squares = np.einsum("ij,ij->i", block, block)
        least, most = np.minimum(least, squares.min()), np.maximum(most, squares.max())
        if not most <= least * (1 + LENGTHS_DIFFER):  # also where one is NaN
            return False
    return True


class _Views(dict):
    """The views of a column's chunks by their number, made on first use: Wikipedia has 20,000 chunks."""

    def __init__(self, view):
        super().__init__()
        self.view = view

    def __missing__(self, number: int):
        self[number] = self.view(number)
        return self[number]


class _Column:
    """A memory-mapped Arrow column of some chunks, of which a row is read without decoding anything else.

    A chunk is looked at when the first of its rows is read: what its head or its offsets say may be damaged.
    """

    def __init__(self, column, origin: str):
        self.arrow_chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.origin = origin
        self.chunks = _Views(self._checked_view)
        self.starts = np.cumsum([0] + [len(chunk) for chunk in self.arrow_chunks])

    def _checked_view(self, number: int):
        chunk = self.arrow_chunks[number]
        try:
            chunk.validate()
            return self._view(chunk, int(self.starts[number]))
        except pa.ArrowException as error:
            rows = f"{self.starts[number]} to {self.starts[number + 1] - 1}"
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.origin}: rows {rows} are damaged ({reason}); {REBUILD}") from error

    def _view(self, chunk, first: int):
        """What rows are read from, of a chunk whose first row is the `first` of the column."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _places(self, ids: np.ndarray) -> Iterable[tuple[int, int]]:
        """For each of `ids` (n,) the number of its chunk, -1 where the id is -1, and the row in it."""
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        return zip(numbers.tolist(), (ids - self.starts[numbers]).tolist(), strict=True)


class TextColumn(_Column):
    """The strings of a column, read straight from its buffers: half the time that pyarrow takes for one.

    Args:
        column: chunked Arrow array of an `is_text` type; nulls are empty strings.
        origin: the flag that gave it, and its value.
    """

    def __init__(self, column, origin: str = ORIGIN):
        super().__init__(column, origin)

    def _view(self, chunk, first: int) -> tuple[memoryview, memoryview]:
        """Where each string begins, and behind the last where it ends; and the bytes of all."""
        if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            chunk = chunk.cast(pa.large_string())
        _, offsets, data = chunk.buffers()
        # Of a memoryview a number is read in half the time that numpy takes.
        size = 8 if pa.types.is_large_string(chunk.type) else 4
        offsets = memoryview(offsets)[chunk.offset * size : (chunk.offset + len(chunk) + 1) * size]
        offsets = offsets.cast("q") if size == 8 else offsets.cast("i")
        if (np.diff(np.asarray(offsets)) < 0).any():
            raise pa.ArrowInvalid("a string ends before it begins")
        return offsets, memoryview(data if data is not None else b"")

    def gather(self, ids: np.ndarray) -> list[str]:
        """The strings of `ids` (n,) int64, "" where an id is -1."""
        strings = []
        for number, row in self._places(ids):
            if number < 0:
                strings.append("")
                continue
            offsets, data = self.chunks[number]
            try:
                strings.append(str(data[offsets[row] : offsets[row + 1]], "utf-8"))
            except UnicodeDecodeError as error:
                row += self.starts[number]
                raise UserError(f"{self.origin}: row {row} is not UTF-8 ({error.reason}); {REBUILD}") from error
        return strings


class EmbeddingColumn(_Column):
    """The vectors of a column of lists of numbers, fixed-size or not.

    Args:
        column: chunked Arrow array.
        dimension: length of every vector.
        origin: the flag that gave it, and its value.

    Raises:
        UserError: it holds something else, or a list of the first chunk, or of one that is read later, is missing or
            not `dimension` long.
    """

    def __init__(self, column, dimension: int, origin: str = ORIGIN):
        self.dimension = dimension
        super().__init__(column, origin)
        if not is_vectors(column.type):
            raise UserError(f"{origin}: the column embeddings holds {column.type}, not lists of numbers; {REBUILD}")
        if len(self):
            self.chunks[0]  # reports a wrong dimension before anything else begins

    def _view(self, chunk, first: int) -> np.ndarray:
        """(rows, d), a view into the mapped file."""
        if chunk.null_count:
            raise self._not_a_vector(first, chunk.is_null().to_numpy(zero_copy_only=False), "is missing (null)")
        if pa.types.is_fixed_size_list(chunk.type):
            lengths = np.array([chunk.type.list_size])
        else:
            lengths = np.diff(chunk.offsets.to_numpy())
        if (lengths != self.dimension).any():
            if (lengths == lengths[0]).all():
                raise UserError(
                    f"{self.origin}: the embeddings have dimension {lengths[0]}, but the question encoder gives "
                    f"{self.dimension}; embed the passages with the matching context encoder"
                )
            wrong = lengths != self.dimension
            raise self._not_a_vector(first, wrong, f"has {lengths[wrong][0]} numbers, not {self.dimension}")
        values = chunk.flatten()
        if values.null_count:
            null = values.is_null().to_numpy(zero_copy_only=False).reshape(len(chunk), self.dimension)
            raise self._not_a_vector(first, null.any(axis=1), "has a number missing (null)")
        return values.to_numpy(zero_copy_only=True).reshape(len(chunk), self.dimension)

    def _not_a_vector(self, first: int, wrong: np.ndarray, what: str) -> UserError:
        row = first + int(np.flatnonzero(wrong)[0])
        return UserError(f"{self.origin}: the embedding of row {row} {what}; embed the passages again")

    def blocks(self, size: int = 65536, rows: range | None = None) -> Iterable[np.ndarray]:
        """All vectors in order, or those of consecutive rows, as float32 arrays of at most `size` rows."""
        for view in self.views(range(len(self)) if rows is None else rows):
            for start in range(0, len(view), size):
                yield np.ascontiguousarray(view[start : start + size], dtype=np.float32)

    def views(self, rows: range) -> Iterable[np.ndarray]:
        """The vectors of consecutive rows in order, as they lie in the mapped file: of any type of numbers, unread.

        Rows beyond the last are left out.
        """
        for number, (start, stop) in enumerate(pairwise(self.starts)):
            if rows.start < stop and start < rows.stop:
                yield self.chunks[number][max(rows.start - start, 0) : rows.stop - start]

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of `ids` (any shape, int64) as float32 `ids.shape + (d,)`; zeros where an id is -1."""
        vectors = np.zeros((ids.size, self.dimension), dtype=np.float32)
        # Rows of a search lie in as many chunks: a copy each is quicker than a selection of each chunk.
        for place, (number, row) in enumerate(self._places(ids.reshape(-1))):
            if number >= 0:
                with np.errstate(over="ignore"):  # is infinite, which is told where it matters
                    vectors[place] = self.chunks[number][row]
        return vectors.reshape(*ids.shape, self.dimension)


class IndexVectors:
    """The vectors that a FAISS index gives back of what it keeps: exact (Flat), rounded (SQ8) or approximate (PQ).

    Args:
        faiss_index: index over the passages in their order.
        dimension: of the vectors wanted; what an index has beyond it (the legacy one) is cut off.
    """

    def __init__(self, faiss_index, dimension: int):
        self.faiss_index = faiss_index
        self.dimension = dimension
        lists = faiss.try_extract_index_ivf(faiss_index)
        if lists is not None:
            lists.make_direct_map()  # where each id lies in the lists: 8 bytes of memory a passage

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of `ids` (any shape, int64) as float32 `ids.shape + (d,)`; zeros where an id is -1."""
        vectors = np.zeros((*ids.shape, self.dimension), dtype=np.float32)
        present = ids >= 0
        if present.any():
            vectors[present] = self.faiss_index.reconstruct_batch(ids[present])[:, : self.dimension]
        return vectors

    def blocks(self, size: int = 65536, rows: range | None = None) -> Iterable[np.ndarray]:
        """All vectors in order, or those of consecutive rows, as float32 arrays of at most `size` rows."""
        rows = range(self.faiss_index.ntotal) if rows is None else rows
        for start in range(rows.start, rows.stop, size):
            yield self.gather(np.arange(start, min(start + size, rows.stop)))

    def views(self, rows: range) -> Iterable[np.ndarray]:
        """The vectors of consecutive rows in order, float32."""
        return self.blocks(rows=rows)


def finite_blocks(embeddings: EmbeddingColumn | IndexVectors, rows: range, origin: str) -> Iterator[np.ndarray]:
    """The vectors of these rows, in blocks as `blocks` gives them.

    Raises:
        UserError: one holds NaN or infinity.
    """
    first = rows.start
    for block in embeddings.blocks(rows=rows):
        require_finite(block, np.arange(first, first + len(block)), origin)
        first += len(block)
        yield block
