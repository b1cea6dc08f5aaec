"""`RayRetriever`: what a Ray actor runs to hold an index and search it.

    actor = ray.remote(RayRetriever).remote(index_config(config))
    doc_ids, vectors = ray.get(actor.retrieve.remote(queries, n_docs))

It is a file of its own because an actor that died is back the sooner the less it imports: neither torch nor
transformers, whose import takes seconds.
"""

import json
import os
from types import SimpleNamespace

import faiss
import numpy as np

from rag.index.knowledge_index import KnowledgeIndex
from rag.index.sources import open_index, open_own
from rag.retrieval.remote import search_to_send, top_docs


def index_config(config) -> SimpleNamespace:
    """A `RagConfig` in plain values, which an actor reads without importing transformers."""
    plain = json.loads(config.to_json_string(use_diff=False), object_hook=lambda values: SimpleNamespace(**values))
    plain.question_encoder.name_or_path = config.question_encoder.name_or_path  # a property, no value
    return plain


class RayRetriever:
    """One index, opened with the first call.

    To survive its restarts an actor needs config or index here; what `create_rag_retriever` gives it ends with them.

    Args:
        config: `RagConfig`, or what `index_config` makes of it.
        workers_on_node: actors among which the node's cores are shared.
        shard: number of the one shard of the index that is held; None for all.
        index: `KnowledgeIndex` or any of transformers' interface, in place of the one that the config describes.
    """

    def __init__(self, config=None, workers_on_node: int = 1, shard: int | None = None, index=None):
        self.config = config
        self.shard = shard
        self.index = index
        self.beside: dict[tuple[str, str], KnowledgeIndex] = {}  # opened in its place, by passages and index
        # Ray sets OMP_NUM_THREADS to 1 for an actor that reserves no more cores.
        faiss.omp_set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_on_node))

    def create_rag_retriever(self, config, question_encoder_tokenizer, generator_tokenizer, index) -> None:
        """Take `index`, or the one that `config` describes; a second call does nothing.

        The tokenizers are the public suite's arguments; an actor only searches.
        """
        self.config = config if self.config is None else self.config
        if self.index is None:
            self.index = open_index(config) if index is None else index

    def init_retrieval(self) -> str | None:
        """Open the index; a second call does nothing but answer, so that it also shows that the actor is ready.

        Returns:
            Why a device that was to search does not, if so.
        """
        if self.index is None and self.beside:  # one that was taken in its place
            return None
        self.create_rag_retriever(self.config, None, None, None)
        if not self.index.is_initialized():
            self.index.init_index(*([] if self.shard is None else [self.shard]))  # transformers' take no argument
        return getattr(self.index, "fallback", None)

    def retrieve(self, question_hidden_states: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """One search for the whole batch.

        Args:
            question_hidden_states: (B, d) float32.
            n_docs: passages a question.

        Returns:
            doc_ids (B, n_docs) int64 and their embeddings (B, n_docs, d) float32.
        """
        self.init_retrieval()
        return top_docs(self.index, question_hidden_states, n_docs)

    def open_beside(self, passages_path: str, index_path: str) -> None:
        """Open another index over the same passages; a second call does nothing."""
        if (passages_path, index_path) in self.beside:
            return
        index = open_own(self.config, passages_path, index_path)
        index.init_index(self.shard)
        self.beside[passages_path, index_path] = index

    def search(
        self, queries: bytes, dimension: int, n_docs: int, knowledge: tuple[str, str] | None = None
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
        """`retrieve` for ranks that have mapped the same passages: embeddings travel only where these lack them.

        Args:
            queries: bytes of a float32 array (B, dimension), which Ray passes on in less time than the array.
            knowledge: passages and index to search in place of those of the config, which are let go of then.

        Returns:
            scores (B, n_docs) float32 where one shard of several is held, else None; doc_ids (B, n_docs) int64; and
            their embeddings (B, n_docs, d) float32, or None where the passages hold them.
        """
        if knowledge is None:
            self.init_retrieval()
            index = self.index
        else:
            knowledge = knowledge[0], knowledge[1]
            self.open_beside(*knowledge)
            index = self.beside[knowledge]
            if len(self.beside) > 1 and next(iter(self.beside)) != knowledge:  # not one that is yet to be taken
                del self.beside[next(iter(self.beside))]
            self.index = None
        array = np.frombuffer(queries, dtype=np.float32).reshape(-1, dimension)
        scores, doc_ids, vectors = search_to_send(index, array, n_docs)
        return None if self.shard is None else scores, doc_ids, vectors
