"""A reranker of --search: the passages that an index has found, in the order of another model's scores.

rescore = SearchReranker("upr", depth=50, rag_model_name="path/to/rag_checkpoint")
scores, ids = rescore(index, questions, ids, n_docs=5)         # ids (Q, 50) that the index found
"""

import numpy as np
import torch

from rag.errors import UserError
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.search import RAG_FLAG
from rag.models.checkpoints import load_model, load_tokenizer
from rag.retrieval.arguments import UPR
from rag.retrieval.finding import FetchedPassages
from rag.retrieval.reranking import open_reranker


class SearchReranker:
    """What --reranker names.

    Args:
        depth: passages a question that it reads.
        rag_model_name: of the generator that upr asks.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, name: str, depth: int, rag_model_name: str | None = None):
        model = tokenizer = None
        if name == UPR:
            assert rag_model_name is not None, "`flag_problems` asks for it"
            model = load_model(rag_model_name, flag=RAG_FLAG)
            if model.config.model_type != "rag":
                kind = model.config.model_type
                raise UserError(f"{RAG_FLAG} {rag_model_name} is a {kind} model; give a RAG checkpoint")
            tokenizer = load_tokenizer(rag_model_name, flag=RAG_FLAG).generator
        self.depth = depth
        self.rescore = open_reranker(name, depth, model, tokenizer)

    def __call__(
        self, index: KnowledgeIndex, questions: list[str], ids: np.ndarray, n_docs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, n_docs) float32 and ids (Q, n_docs) int64, best first, of those that were found; -1 behind them.

        Args:
            ids: (Q, depth) int64 that the index found, -1 for none.
        """
        assert self.rescore is not None
        docs: list = index.get_doc_dicts(ids)
        found = FetchedPassages(torch.zeros(len(ids), 1), questions, ids, docs)
        with torch.inference_mode():
            scores = self.rescore(found).numpy()
        scores = np.where(ids >= 0, scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
