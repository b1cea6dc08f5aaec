"""Vectors and words together: `--index_name hybrid --passages_path FOLDER --index_path INDEX`.

    index = open_hybrid(config)                      # BM25's part is built beside the passages the first time
    index.init_index()
    words = index.encode_questions(["who wrote hamlet"])
    doc_ids, found = index.get_top_docs(np.concatenate([vectors, words], axis=1), n_docs=5)

Both indexes are searched for `depth` passages of each question. Of all that either found, the candidates, both scores
are looked up: the inner product with the passage's own embedding, and BM25. Fused they decide.

weighted  w z(dense) + (1 - w) z(BM25), where z takes off the mean over the candidates and divides by their standard
          deviation: scores of two scales can be added only after that (Karpukhin et al. 2020, arXiv 2004.04906, section
          5, add BM25 and DPR with one factor for all questions).
ranks     w / (60 + rank by dense) + (1 - w) / (60 + rank by BM25), for w 1/2 the order of Cormack et al. 2009
          (reciprocal rank fusion, SIGIR, 10.1145/1571941.1572114). A passage that shares no word has no rank by BM25.

A fused score is the logit of p(passage | question). So that it is as peaked as the question encoder was trained to make
it, it is put on the scale of the dense scores: multiplied by their standard deviation. With w = 1 `weighted` is the
dense score, but for a constant of the question's that no probability depends on.

A question travels as its vector, a one, the numbers of its words, and -1 to fill up, float32. A passage that was found
answers with as long a vector, whose inner product with the question's is the fused score. Of `weighted` it is w times
the embedding, and a constant at the one: the question encoder learns through it as through any index, with the means
and deviations held fixed. Of `ranks` it is the constant alone, from which nothing is learned.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from rag.index.arguments import fusion_of
from rag.index.bm25 import QUERY_SIZE, Bm25Index, largest, open_bm25
from rag.index.columns import require_finite
from rag.index.knowledge_index import KnowledgeIndex

RANK_CONSTANT = 60  # Cormack et al.'s


def standardized(scores: np.ndarray) -> np.ndarray:
    """Scores (N,) float64 less their mean, in units of their standard deviation; zeros where they are all equal."""
    deviation = scores.std()
    return (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)


def unit_of(dense: np.ndarray) -> float:
    """What a fused score counts in: the standard deviation of dense scores (N,); 1 where they are all equal."""
    return float(dense.std()) or 1.0


def fuse_weighted(dense: np.ndarray, words: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
    """What is added to `weight` times the dense score of each candidate, (N,) float64, and that weight."""
    unit = unit_of(dense)
    share = weight if dense.std() > 0 else 0.0  # equal ones, of one passage alone perhaps, tell nothing
    return (1 - weight) * unit * standardized(words) - share * dense.mean(), share


def fuse_ranks(dense: np.ndarray, words: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
    """The fused scores of the candidates, (N,) float64, and 0: none of the dense score is added."""
    by_words = np.where(words > 0, 1 / (RANK_CONSTANT + ranks_of(words)), 0.0)
    return unit_of(dense) * standardized(weight / (RANK_CONSTANT + ranks_of(dense)) + (1 - weight) * by_words), 0.0


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """The ranks (N,) from 1 of scores, the largest first; of equal ones the first."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


# From dense and BM25 scores (N,) float64 of the candidates and the weight of the dense ones to a constant of each, and
# what its dense score is multiplied by: fused = share * dense + constant.
FUSIONS: dict[str, Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]] = {
    "weighted": fuse_weighted,
    "ranks": fuse_ranks,
}


class HybridIndex(KnowledgeIndex):
    """A `KnowledgeIndex` that reads a question's vector and its words.

    Args:
        dense: over the passages' embeddings.
        words: over the same passages.
        fusion: a key of `FUSIONS`.
        dense_weight: w, from 0 to 1.
        hybrid_depth: passages that each of the two is asked for; as many as are wanted where these are more.
    """

    reads_text, reads_vectors = True, True

    def __init__(self, dense: KnowledgeIndex, words: Bm25Index, fusion: str, dense_weight: float, hybrid_depth: int):
        self.dense = dense
        self.words = words
        self.fusion = fusion
        self.dense_weight = dense_weight
        self.depth = hybrid_depth
        self.teaches = fusion == "weighted" and dense_weight > 0
        size = dense.vector_size + QUERY_SIZE
        super().__init__(
            dense.dataset.with_format(None),
            size,
            vectors_from="index",
            index_flag=dense.index_flag,
            origin=dense.origin,
        )

    def __copy__(self) -> "HybridIndex":
        """Shares what is open; what is opened of one later is not of the other."""
        copied = super().__copy__()
        assert isinstance(copied, HybridIndex)
        copied.dense, copied.words = copy.copy(self.dense), copy.copy(self.words)
        return copied

    @property
    def index_origin(self) -> str:
        return self.dense.index_origin

    def is_initialized(self) -> bool:
        return self.dense.is_initialized() and self.words.is_initialized()

    def init_index(self, shard: int | None = None) -> None:
        """Open both; a second call does nothing. There is one shard: all of the dense ones."""
        self.words.init_index()
        self.dense.init_index()
        self.fallback = self.dense.fallback

    def encode_questions(self, questions: list[str]) -> np.ndarray:
        """The part (B, QUERY_SIZE) float32 of the queries that stands behind the question vectors."""
        return self.words.encode_questions(questions)

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """Fused scores (B, n_docs) float32 and ids (B, n_docs) int64, best first; where there are fewer: id -1."""
        scores, ids, _, _ = self._fused(queries, n_docs)
        return scores, ids

    def get_top_docs(self, question_hidden_states: np.ndarray, n_docs: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, n_docs) int64, best first, and (B, n_docs, d + QUERY_SIZE) float32 whose inner product with the query
        is the fused score."""
        _, ids, constants, shares = self._fused(question_hidden_states, n_docs)
        d = self.dense.vector_size
        vectors = np.zeros((*ids.shape, d + QUERY_SIZE), dtype=np.float32)
        vectors[:, :, d] = constants
        if shares.any():
            vectors[:, :, :d] = self._embeddings(ids) * shares[:, None, None]
        return ids, vectors

    def _embeddings(self, ids: np.ndarray) -> np.ndarray:
        assert self.dense.embeddings is not None, "init_index comes first"
        return self.dense.embeddings.gather(ids)

    def _fused(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Scores and ids (B, n_docs), the constants in the scores (B, n_docs) and the dense scores' shares (B,)."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        vectors, words = queries[:, : self.dense.vector_size], queries[:, self.dense.vector_size :]
        depth = min(max(self.depth, n_docs), len(self))
        found = self.dense.search(vectors, depth)[1] if len(queries) else np.zeros((0, depth), dtype=np.int64)
        scores = np.full((len(queries), n_docs), np.finfo(np.float32).min, dtype=np.float32)
        ids = np.full(scores.shape, -1, dtype=np.int64)
        constants, shares = np.zeros_like(scores), np.zeros(len(queries), dtype=np.float32)
        for row, (vector, query) in enumerate(zip(vectors, words, strict=True)):
            by_words = self.words.scores(query)
            candidates = self._candidates(found[row], by_words, depth)
            embeddings = self._embeddings(candidates)
            require_finite(embeddings, candidates, self.origin)
            dense = embeddings.astype(np.float64) @ vector.astype(np.float64)
            constant, share = FUSIONS[self.fusion](dense, by_words[candidates].astype(np.float64), self.dense_weight)
            fused = share * dense + constant
            best = np.argsort(-fused, kind="stable")[:n_docs]
            ids[row, : len(best)], scores[row, : len(best)] = candidates[best], fused[best]
            constants[row, : len(best)], shares[row] = constant[best], share
        return scores, ids, constants, shares

    def _candidates(self, found: np.ndarray, by_words: np.ndarray, depth: int) -> np.ndarray:
        """The rows, ascending, that either index has among its best: by words those that share one."""
        best = largest(by_words, depth)
        return np.union1d(found[found >= 0], best[by_words[best] > 0])

    def description(self) -> dict[str, Any]:
        settings = {"fusion": self.fusion, "dense_weight": self.dense_weight, "hybrid_depth": self.depth}
        dense = self.dense.description()
        return dense | {"kind": f"{dense['kind']} and BM25"} | settings


def open_hybrid(config, open_dense: Callable[[Any], KnowledgeIndex]) -> HybridIndex:
    """The index of `config.passages_path` and `config.index_path`, and that of the same passages' words, fused.

    Raises:
        UserError: a part is missing or does not fit.
    """
    dense_config = copy.copy(config)
    dense_config.index_name = "custom"
    dense = open_dense(dense_config)
    words = open_bm25(SimpleNamespace(passages_path=config.passages_path, index_path=None))
    return HybridIndex(dense, words, **fusion_of(config))
