"""Exact search on an accelerator: all passages' embeddings, held there, compared with every question.

    search = DeviceSearch(embeddings.blocks(), rows=len(embeddings), dimension=768, device="cuda:0")
    scores, rows = search.search(queries, n_docs=5)

Half precision halves the memory and the time of a pass, which reads every embedding once; products are summed in
float32. The answers are those of FAISS's Flat index over float32 vectors but where two scores differ by less than the
rounding of the embeddings. Of equal scores the lower row comes first. int8 halves both again: its scores choose
candidates, which are ranked by their float32 vectors.

Nothing is asked of the device before the end of a search, when scores and rows are copied from it in one piece. The
same code runs on the CPU. torch is imported where it is used: what searches without a device does not wait for it.
"""

from collections.abc import Callable, Iterable

import numpy as np

from rag.index.device_loading import load
from rag.index.device_topk import members, rows_of, scores_of, tile_size, to_keys, top_places
from rag.index.device_vectors import STORES

# Scores of a block: 32 MiB. Reckoned from an H100's figures, not measured: 64 questions over 21,015,300 x 768 are 161
# blocks, each 80 us of product (13.2 ms in all, measured) and two launches, some 25 us of Python, which so is ahead of
# the device. The embeddings of such a block (200 MB) drive its scores from the L2 (50 MB), so their maxima read 5.4 GB
# from memory: 1.8 ms. 1,024 questions are 2,566 blocks of 16,384 rows and 512 questions, whose embeddings are 25 MB, so
# most scores are still in the L2: 16 us of product at the chip's peak, some 10 us of maxima, about as much as Python
# takes. Smaller blocks would wait for Python, larger ones read more from memory. A CUDA graph would need buffers for
# each number of questions and hide only what is hidden.
SCORES_AT_A_TIME = 2**23
# Maxima of tiles, or scores where these are few enough to be kept: 512 MiB. Of 21 million rows that is 800 questions
# a pass, where a pass is bound by arithmetic, so that a second one costs nothing.
MAXIMA_AT_A_TIME = 2**27
# Embeddings that a CPU widens to float32 at a time: they stay in its cache.
CPU_CHUNK = 4096
# What a search needs beside the embeddings, in bytes, of a large index; a small one needs less.
WORKSPACE, SMALL_WORKSPACE = 2**30 + 2**29, 2**26
# Candidates a question that int8 chooses, at least; a multiple of what is asked for where that is more. 16 lose none of
# the best 5 (benchmarks/index_precision.py); each costs a read of the mapped file, some microseconds.
CANDIDATES, CANDIDATES_A_PASSAGE = 64, 4
RANKED_AT_A_TIME = 2**26  # numbers of candidates' vectors


class DeviceUnavailableError(RuntimeError):
    """There is no such device, or it cannot hold the embeddings; the message says which, and the bytes needed."""


class BeyondPrecisionError(DeviceUnavailableError):
    """An embedding goes beyond what the precision can hold, or is NaN or infinite."""


def usable_device(name: str):
    """The torch device of this name.

    Raises:
        DeviceUnavailableError: there is no such device.
    """
    import torch

    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise DeviceUnavailableError(f"there is no such device ({str(error).splitlines()[0]})") from error


class DeviceSearch:
    """Exact inner-product search over embeddings that are held on a device.

    Args:
        blocks: the embeddings in order, arrays (any, dimension) of any type of numbers.
        rows: how many there are in all, at most 2**32.
        dimension: d.
        device: "cpu", "cuda" (the current one) or "cuda:1".
        precision: "fp16", or "int8" for candidates that are ranked by what `gather` gives.
        gather: rows (any shape, int64) to their vectors, float32 `rows.shape + (d,)`; for int8.

    Attributes:
        candidates, candidates_a_passage: of int8, for each question at least so many, and so many for each passage.

    Raises:
        DeviceUnavailableError: see there.
        BeyondPrecisionError: see there.
    """

    def __init__(
        self, blocks: Iterable[np.ndarray], rows: int, dimension: int, device: str, precision: str = "fp16",
        gather: Callable[[np.ndarray], np.ndarray] | None = None,
    ):  # fmt: skip
        self.device = usable_device(device)
        self.rows, self.precision = rows, precision
        store = STORES[precision]
        assert store.is_exact or gather is not None, f"{precision} needs the vectors to rank by"
        self.gather = None if store.is_exact else gather
        self.candidates, self.candidates_a_passage = CANDIDATES, CANDIDATES_A_PASSAGE
        _require_memory(store, rows, dimension, self.device)
        try:
            self.vectors = store(rows, dimension, self.device)
            found, largest = load(blocks, self.vectors, dimension)
        except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one
            raise DeviceUnavailableError(str(error).splitlines()[0]) from error
        assert found == rows, f"{found} embeddings instead of {rows}"
        if not largest <= store.largest:  # also where it is NaN
            raise BeyondPrecisionError(f"{store.name} ends at {store.largest:g}, an embedding goes beyond it")

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest inner products, best first, of equal ones the lower row first.

        Args:
            queries: (B, d) float32.
            n_docs: passages a query.

        Returns:
            scores (B, n_docs) float32 and rows (B, n_docs) int64; -inf and -1 where there are fewer passages.
        """
        count = min(n_docs, self.rows)
        scores = np.full((len(queries), n_docs), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), n_docs), -1, dtype=np.int64)
        if count and len(queries):
            if self.gather is None:
                keys = self._top_keys(queries, count)
                scores[:, :count], rows[:, :count] = scores_of(keys), rows_of(keys)
            else:
                wanted = min(self.rows, max(self.candidates, self.candidates_a_passage * n_docs))
                candidates = rows_of(self._top_keys(queries, wanted))
                scores[:, :count], rows[:, :count] = best_of(queries, candidates, count, self.gather)
        return scores, rows

    def _top_keys(self, queries: np.ndarray, count: int) -> np.ndarray:
        """The best (B, count) as keys, int64, best first; the questions of as few passes as memory allows."""
        import torch

        passes, tile = self._passes(len(queries), count)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            on_device = torch.tensor(queries, device=self.device)
            keys = [
                self._one_pass(self.vectors.prepare(part), count, tile)[: len(part)]
                for part in on_device.tensor_split(passes)
            ]
            return torch.cat(keys).cpu().numpy()

    def _passes(self, questions: int, count: int) -> tuple[int, int]:
        """How many passes these questions take, and the rows of a tile: 1 where every score can be kept."""
        tile = tile_size(count, self.rows)
        most = MAXIMA_AT_A_TIME if tile > 1 else MAXIMA_AT_A_TIME // 8  # of all scores keys are made then
        tile = 1 if questions * self.rows <= most else tile
        at_a_time = max(1, most // (self.rows // tile))
        return -(-questions // at_a_time), tile

    def _one_pass(self, queries, count: int, tile: int):
        """The maxima of all tiles, then once more the products with the rows of the best tiles.

        Where the two round differently a tile may be missed whose best score is below the last answer's, or above
        it by a rounding of float32.
        """
        maxima = self._maxima(queries, tile)
        places = top_places(maxima, count)
        if tile == 1:
            return to_keys(maxima.gather(1, places), places)
        rows = members(places, tile, self.rows)
        return to_keys(self.vectors.scores_of(queries, rows), rows).topk(count).values

    def _maxima(self, queries, tile: int):
        """The largest score of each whole tile, (B, rows // tile); with tiles of 1 all scores."""
        import torch

        tiles = self.rows // tile
        on_cpu = self.device.type == "cpu"
        if tile == 1 and not on_cpu:
            return self.vectors.scores(queries, 0, self.rows)
        maxima = torch.empty((len(queries), tiles), device=self.device)
        size = max(1, (CPU_CHUNK if on_cpu else SCORES_AT_A_TIME // len(queries)) // tile)
        for first, part in zip(range(0, tiles, size), maxima.split(size, dim=1), strict=True):
            scores = self.vectors.scores(queries, first * tile, (first + part.shape[1]) * tile)
            torch.amax(scores.unflatten(1, (-1, tile)), dim=2, out=part)
        return maxima

    def description(self) -> dict:
        """What bears on a score."""
        if self.gather is None:
            return {"kind": f"all embeddings, float16 on {self.device}"}
        return {"kind": f"all embeddings, int8 on {self.device}, the best {self.candidates} ranked in float32"}


def best_of(
    queries: np.ndarray, candidates: np.ndarray, count: int, gather: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The best of each query's candidates by their float32 vectors, of equal scores the lower row first.

    Args:
        queries: (B, d) float32.
        candidates: (B, C) int64 rows.
        count: at most C.
        gather: as of `DeviceSearch`.

    Returns:
        scores (B, count) float32 and rows (B, count) int64.
    """
    at_a_time = max(1, RANKED_AT_A_TIME // (candidates.shape[1] * queries.shape[1]))
    scores = np.empty(candidates.shape, dtype=np.float32)
    for start in range(0, len(queries), at_a_time):
        part = slice(start, start + at_a_time)
        scores[part] = np.einsum("bd,bnd->bn", queries[part], gather(candidates[part]))
    order = np.lexsort((candidates, -scores), axis=1)[:, :count]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def _require_memory(store, rows: int, dimension: int, device) -> None:
    import psutil
    import torch

    embeddings = store.bytes_needed(rows, dimension)
    needed = embeddings + min(WORKSPACE, SMALL_WORKSPACE + embeddings)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise DeviceUnavailableError(f"the embeddings in {store.name} need {needed:,} bytes there, {free:,} are free")
