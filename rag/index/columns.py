"""The columns of the passages, memory-mapped: strings and vectors by row, without decoding anything else.

embeddings = EmbeddingColumn(passages.data.column("embeddings"), dimension=768)
embeddings.gather(doc_ids)                                # (B, n_docs) int64 to (B, n_docs, 768) float32
TextColumn(passages.data.column("title")).gather(row_numbers)
"""

from collections.abc import Iterable

import faiss
import numpy as np
import pyarrow as pa

from rag.errors import UserError


class _Views(dict):
    """The views of a column's chunks by their number, made on first use: Wikipedia has 20,000 chunks."""

    def __init__(self, chunks: list, view):
        super().__init__()
        self.arrow_chunks, self.view = chunks, view

    def __missing__(self, number: int):
        self[number] = self.view(self.arrow_chunks[number])
        return self[number]


class _Column:
    """A memory-mapped Arrow column of some chunks, of which a row is read without decoding anything else."""

    def __init__(self, column):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.chunks = _Views(chunks, self._view)
        self.starts = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def _view(self, chunk):
        return chunk

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _places(self, ids: np.ndarray) -> Iterable[tuple[int, int]]:
        """For each of `ids` (n,) the number of its chunk, -1 where the id is -1, and the row in it."""
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        return zip(numbers.tolist(), (ids - self.starts[numbers]).tolist(), strict=True)


class TextColumn(_Column):
    """The strings of a column, read straight from its buffers: half the time that pyarrow takes for one."""

    def _view(self, chunk) -> tuple[memoryview, memoryview]:
        """Where each string begins, and behind the last where it ends; and the bytes of all."""
        _, offsets, data = chunk.buffers()
        # Of a memoryview a number is read in half the time that numpy takes.
        offsets = memoryview(offsets).cast("q" if pa.types.is_large_string(chunk.type) else "i")
        offsets = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
        return offsets, memoryview(data if data is not None else b"")

    def gather(self, ids: np.ndarray) -> list[str]:
        """The strings of `ids` (n,) int64, "" where an id is -1."""
        strings = []
        for number, row in self._places(ids):
            if number < 0:
                strings.append("")
                continue
            offsets, data = self.chunks[number]
            strings.append(str(data[offsets[row] : offsets[row + 1]], "utf-8"))
        return strings


class EmbeddingColumn(_Column):
    """The vectors of a column of lists of floats, fixed-size or not.

    Args:
        column: chunked Arrow array.
        dimension: length of every vector.

    Raises:
        UserError: the lists of the first chunk, or of one that is read later, are not all `dimension` long.
    """

    def __init__(self, column, dimension: int):
        self.dimension = dimension
        super().__init__(column)
        if len(self):
            self.chunks[0]  # reports a wrong dimension before anything else begins

    def _view(self, chunk) -> np.ndarray:
        """(rows, d), a view into the mapped file."""
        values = chunk.flatten().to_numpy(zero_copy_only=True)
        if len(values) != len(chunk) * self.dimension:
            raise UserError(
                f"the passages' embeddings have dimension {len(values) / len(chunk):g}, but the question encoder gives "
                f"{self.dimension}; embed the passages with the matching context encoder"
            )
        return values.reshape(len(chunk), self.dimension)

    def blocks(self, size: int = 65536, rows: range | None = None) -> Iterable[np.ndarray]:
        """All vectors in order, or those of consecutive rows, as float32 arrays of at most `size` rows."""
        rows = range(len(self)) if rows is None else rows
        for number, first in enumerate(self.starts[:-1]):
            chunk = self.chunks[number][max(rows.start - first, 0) : max(rows.stop - first, 0)]
            for start in range(0, len(chunk), size):
                yield np.ascontiguousarray(chunk[start : start + size], dtype=np.float32)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of `ids` (any shape, int64) as float32 `ids.shape + (d,)`; zeros where an id is -1."""
        vectors = np.zeros((ids.size, self.dimension), dtype=np.float32)
        # Rows of a search lie in as many chunks: a copy each is quicker than a selection of each chunk.
        for place, (number, row) in enumerate(self._places(ids.reshape(-1))):
            if number >= 0:
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
