"""How much of an exact search an index finds, and how fast, at growing effort.

    rows = measure_efforts(open_index, queries, exact_scores(vectors, queries, n_docs=5))

Efforts are efSearch and nprobe; recall is the share of the exact search's passages.
"""

import time

import faiss
import numpy as np

from rag.index.build import EmbeddingFiles

# Efforts that are tried on a new index, each four times the last; FAISS's own are 16 and 1.
EFFORTS = {"ef_search": (16, 64, 256), "nprobe": (1, 4, 16, 64, 256)}


def exact_scores(vectors: EmbeddingFiles, queries: np.ndarray, n_docs: int) -> np.ndarray:
    """The largest inner products (Q, n_docs) float32 with each of `queries` (Q, d), best first, of all vectors."""
    heap = faiss.ResultHeap(len(queries), n_docs, keep_max=True)
    for block in vectors.blocks():
        heap.add_result(*faiss.knn(queries, block, min(n_docs, len(block)), metric=faiss.METRIC_INNER_PRODUCT))
    heap.finalize()
    return heap.D


def recall(queries: np.ndarray, retrieved: np.ndarray, best: np.ndarray) -> float:
    """The share of an exact search's passages that were retrieved.

    A passage counts whose inner product reaches the last of `best`: of equal ones it does not matter which.

    Args:
        queries: (Q, d) float32.
        retrieved: (Q, n_docs, d) float32, the vectors of the passages that were retrieved.
        best: (Q, n_docs) float32, from `exact_scores`.
    """
    scores = np.einsum("qd,qnd->qn", queries, retrieved)
    worst = best[:, -1:]
    return float((scores >= worst - 1e-5 * np.abs(worst)).mean())


def measure_efforts(open_index, queries: np.ndarray, best: np.ndarray) -> list[dict]:
    """Recall and queries a second, all queries in one call on all cores, at growing effort as long as that helps.

    Args:
        open_index: called with ef_search or nprobe or neither; returns a `KnowledgeIndex`, not yet opened.
        queries: (Q, d) float32.
        best: (Q, n_docs) float32, from `exact_scores`.
    """
    index = open_index()
    index.init_index()
    setting = next((name for name in ("nprobe", "ef_search") if name in index.description()), None)
    rows: list[dict] = []
    for effort in [{setting: value} for value in EFFORTS[setting]] if setting else [{}]:
        index = open_index(**effort)
        index.init_index()
        index.search(queries, best.shape[1])  # reads from the disk
        start = time.perf_counter()
        _, ids = index.search(queries, best.shape[1])
        speed = len(queries) / (time.perf_counter() - start)
        share = recall(queries, index.embeddings.gather(ids), best)
        if rows and share <= rows[-1]["recall"]:
            break
        rows.append(effort | {"recall": share, "queries_per_second": speed})
    return rows
