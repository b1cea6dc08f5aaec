"""Searches on behalf of another process: only ids travel where that process can read the vectors itself.

    scores, doc_ids, vectors = search_to_send(index, queries, n_docs)
    doc_ids = best_of_shards([(scores, ids) for scores, ids, _ in answers], n_docs)

Neither torch nor transformers is imported: a Ray actor that only searches is back in a moment.
"""

import numpy as np

from rag.index.knowledge_index import KnowledgeIndex


def search_to_send(index, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
    """A search on behalf of another process, which has mapped the same passages.

    Args:
        index: `KnowledgeIndex` or any of transformers' interface.
        queries: (B, d) float32, also B = 0.
        n_docs: passages a query.

    Returns:
        scores (B, n_docs) float32, doc_ids (B, n_docs) int64 and the embeddings (B, n_docs, d) float32; but None in
        place of the embeddings where the other process can read them itself, else of the scores.
    """
    if isinstance(index, KnowledgeIndex) and index.vectors_from == "passages":
        return *index.search(queries, n_docs), None
    return None, *top_docs(index, queries, n_docs)


def top_docs(index, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
    """`index.get_top_docs` as doc_ids (B, n_docs) int64 and embeddings (B, n_docs, d) float32, also for B = 0."""
    doc_ids, vectors = index.get_top_docs(queries, n_docs)
    shape = (len(queries), n_docs)  # transformers' legacy index loses it where there are no queries
    return (
        np.asarray(doc_ids, dtype=np.int64).reshape(shape),
        np.asarray(vectors, dtype=np.float32).reshape(*shape, queries.shape[1]),
    )


def best_of_shards(answers: list[tuple[np.ndarray, np.ndarray]], n_docs: int) -> np.ndarray:
    """The ids (B, n_docs) int64 of the largest scores among those that every shard found.

    Args:
        answers: scores (B, n) float32 and ids (B, n) int64 of each shard, in the order of their rows.
    """
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip(*answers, strict=True))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]  # what is missing scores least
    return np.take_along_axis(ids, best, axis=1)


def pack_found(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Scores (B, n) float32 and ids (B, n) int64 as (2 * B * n) int64, which travel as one message."""
    return np.concatenate([ids.reshape(-1), scores.astype(np.float64).reshape(-1).view(np.int64)])


def unpack_found(packed: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of `pack_found`, of this shape."""
    ids, scores = np.split(packed, 2)
    return scores.view(np.float64).astype(np.float32).reshape(shape), ids.reshape(shape)
