"""Exact search over as many vectors as Wikipedia has passages, 21,015,300 x 768, in half precision and in int8.

There is no public way beside it: FAISS searches on a GPU in a package of its own. The first million is compared with
float32.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu_parts.measuring import Measured, Settings, attempt, seconds_of, synchronize

N_DOCS = 5
DIMENSION = 768
WIKIPEDIA = 21_015_300
QUESTIONS = (64, 1024)
PRECISIONS = ("fp16", "int8")
BYTES = {"fp16": 2, "int8": 1}  # a number
BLOCK = 500_000  # vectors that are handed over at a time
SHIFT = 16  # numbers by which each block begins behind the one before it, in the same memory
FEW_SECONDS = 30  # that loading may take: of a slower one fewer vectors are searched
LOADING, EQUALITY = "loading", "of a million, beside float32"


def search_case(questions: int, precision: str) -> str:
    return f"search, {questions:,} questions, {precision}"


def opening_case(precision: str) -> str:
    return f"vectors in {precision}"


class Vectors:
    """Random float32 vectors, all different, out of the memory of one block."""

    def __init__(self, dimension: int, block: int):
        import numpy as np

        self.dimension, self.block = dimension, block
        random = np.random.default_rng(0)
        self.stream = random.standard_normal(block * dimension + dimension, dtype=np.float32)
        self.queries = random.standard_normal((max(QUESTIONS), dimension), dtype=np.float32)

    def blocks(self, rows: int):
        for number, first in enumerate(range(0, rows, self.block)):
            start = SHIFT * number
            assert start < self.dimension, "from here on vectors would come again"
            values = self.stream[start : start + self.block * self.dimension]
            yield values.reshape(self.block, self.dimension)[: rows - first]

    def gather(self, rows):
        """The vectors of these rows, (..., d)."""
        from numpy.lib.stride_tricks import sliding_window_view

        starts = SHIFT * (rows // self.block) + rows % self.block * self.dimension
        return sliding_window_view(self.stream, self.dimension)[starts]


def search(settings: Settings) -> Iterator[Measured]:
    block, few, many = (300, 600, 900) if settings.short else (BLOCK, 2 * BLOCK, WIKIPEDIA)
    vectors = Vectors(64 if settings.short else DIMENSION, block)
    loaded = {"rows": float(few), "s": 0.0}
    yield from attempt(LOADING, "ours", partial(measure_loading, settings, vectors, loaded))
    yield from attempt(EQUALITY, "ours", partial(measure_equality, settings, vectors, few))
    if loaded["s"] * many / few > FEW_SECONDS:
        many = int(few * FEW_SECONDS / loaded["s"])
    found: dict[int, Any] = {}  # what half precision finds, by the number of questions
    for precision in PRECISIONS:
        held: list = []
        yield from attempt(
            opening_case(precision), "ours", partial(measure_opening, settings, vectors, many, precision, held)
        )
        for questions in QUESTIONS:
            measure = partial(measure_search, settings, vectors, many, precision, held, questions, found)
            yield from attempt(search_case(questions, precision), "ours", measure)
        held.clear()  # room for the next


def open_search(settings: Settings, vectors: Vectors, rows: int, **how):
    from rag.index.device_search import DeviceSearch

    opened = DeviceSearch(vectors.blocks(rows), rows=rows, dimension=vectors.dimension, device=settings.device, **how)
    synchronize(settings.device)
    return opened


def measure_loading(settings: Settings, vectors: Vectors, loaded: dict[str, float]) -> dict[str, float]:
    """Seconds a million, from memory."""
    open_search(settings, vectors, vectors.block)
    start = time.perf_counter()
    open_search(settings, vectors, int(loaded["rows"]))
    loaded["s"] = time.perf_counter() - start
    return {"s_a_million": loaded["s"] * 1e6 / loaded["rows"], "bus_bytes": 4e6 * vectors.dimension}


def measure_equality(settings: Settings, vectors: Vectors, rows: int) -> dict[str, float]:
    """The share of the passages that a product in float32 finds, too."""
    import torch

    queries = vectors.queries[:64]
    _, found = open_search(settings, vectors, rows).search(queries, N_DOCS)
    asked = torch.from_numpy(queries).to(settings.device)
    scores = torch.cat([asked @ torch.from_numpy(block).to(settings.device).T for block in vectors.blocks(rows)], dim=1)
    return {"same": float((scores.topk(N_DOCS).indices.cpu().numpy() == found).mean())}


def measure_opening(settings: Settings, vectors: Vectors, rows: int, precision: str, held: list) -> dict[str, float]:
    """Leaves the search in `held`."""
    import torch

    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    how = {} if precision == "fp16" else {"precision": precision, "gather": vectors.gather}
    held.append(open_search(settings, vectors, rows, **how))
    seconds = time.perf_counter() - start
    return {"s": seconds, "gib": (torch.cuda.memory_allocated() - before) / 2**30, "rows": rows}


def measure_search(
    settings: Settings, vectors: Vectors, rows: int, precision: str, held: list, questions: int, found: dict[int, Any]
) -> dict[str, float]:
    """Milliseconds of a search; of another precision than half also the share of passages that it finds, too."""
    if not held:
        raise RuntimeError("there are no vectors to search")
    queries = vectors.queries[:questions]
    seconds = seconds_of(lambda: held[0].search(queries, N_DOCS), settings.device)
    _, answers = held[0].search(queries, N_DOCS)
    recall = (answers[:, :, None] == found.setdefault(questions, answers)[:, None]).any(2).mean()
    figures = {"ms": 1e3 * seconds, "bytes": BYTES[precision] * rows * vectors.dimension, "recall": float(recall)}
    if precision == "fp16":
        figures["flop"] = 2 * rows * vectors.dimension * questions
    return figures
