"""The vectors of an index on a device, in whole or in part, or why not.

search, fallback = hold_on_device(index.embeddings, range(len(index)), 768, "cuda", "fp16", "--passages_path x")
rows = slice_of(21_015_300, number=3, count=8)
"""

from rag.index.columns import EmbeddingColumn, IndexVectors, finite_blocks
from rag.index.device_search import BeyondPrecisionError, DeviceSearch, DeviceUnavailableError


def slice_of(rows: int, number: int, count: int) -> range:
    """The `number`-th of `count` parts of the rows, of nearly equal size."""
    return range(rows * number // count, rows * (number + 1) // count)


def hold_on_device(
    vectors: EmbeddingColumn | IndexVectors, rows: range, dimension: int, device: str, precision: str, origin: str
) -> tuple[DeviceSearch | None, str | None]:
    """A search over consecutive vectors, which counts from 0, or None and why there is none.

    Args:
        vectors: of all passages.
        rows: those that are to be searched.
        dimension: d.
        device, precision: as of `DeviceSearch`.
        origin: the flag that gave the vectors, and its value.

    Raises:
        UserError: a vector holds NaN or infinity.
    """
    try:
        search = DeviceSearch(
            vectors.views(rows), len(rows), dimension, device, precision,
            gather=lambda places: vectors.gather(places + rows.start),
        )  # fmt: skip
        return search, None
    except DeviceUnavailableError as error:
        if isinstance(error, BeyondPrecisionError):
            for _ in finite_blocks(vectors, rows, origin):
                pass  # raises with the row, if one holds NaN or infinity
        return None, f"--index_device {device}: {error}; FAISS searches instead"
