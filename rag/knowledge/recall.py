"""How much of an exact search a new index finds, and how fast: printed after building, kept in index.json.

    rows = report_recall(passages_path, index_path, embedder, vectors, description, queries=256, n_docs=5)

It answers what a user asks first of a new index: is its kind good enough, and at which effort?
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag.errors import printable
from rag.index.build import EmbeddingFiles
from rag.index.index_files import IndexDescription
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.passage_checks import load_saved
from rag.index.recall import exact_scores, measure_efforts
from rag.knowledge.passages import count_words, words_from

if TYPE_CHECKING:
    from rag.knowledge.embedding import PassageEmbedder

WORDS_A_QUERY = 10


def report_recall(
    passages_path: Path,
    index_path: Path,
    embedder: "PassageEmbedder",
    vectors: EmbeddingFiles,
    description: IndexDescription,
    queries: int,
    n_docs: int,
) -> list[dict[str, float]]:
    """Print recall and queries a second at growing effort, and return these rows.

    Queries are ten words from the middle of passages, embedded by the passages' encoder: no question is at hand, and
    these are not vectors that the index holds.

    Args:
        vectors: all embeddings, for the exact search.
        queries: at most so many.
        n_docs: passages a query over which recall is counted.
    """
    passages = load_saved(passages_path).select_columns(["title", "text"])
    count, n_docs = min(queries, len(passages)), min(n_docs, len(passages))
    rows = np.sort(np.random.default_rng(0).choice(len(passages), count, replace=False, shuffle=False))
    pieces = [("", _middle(text)) for text in passages[rows]["text"]]
    query_vectors = np.empty((count, embedder.dimension), dtype=np.float32)
    for places, batch in embedder(pieces):
        query_vectors[places] = batch

    def open_index(**effort) -> KnowledgeIndex:
        return KnowledgeIndex.load_from_disk(embedder.dimension, passages_path, index_path, **effort)

    results = measure_efforts(open_index, query_vectors, exact_scores(vectors, query_vectors, n_docs))
    print(
        f"{printable(description.factory)}: {size_of(index_path):,} bytes, built in {description.index_seconds} s; of "
        f"the {n_docs} best for {count} pieces of {WORDS_A_QUERY} words it finds"
    )
    for row in results:
        effort = " ".join(f"--{name} {value}" for name, value in row.items() if name in ("ef_search", "nprobe"))
        print(f"  {100 * row['recall']:5.1f}%  {row['queries_per_second']:10,.0f} queries/s  {effort}".rstrip())
    return results


def _middle(text: str) -> str:
    start = max((count_words(text) - WORDS_A_QUERY) // 2, 0)
    return " ".join(words_from(text, start, WORDS_A_QUERY).split())


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
