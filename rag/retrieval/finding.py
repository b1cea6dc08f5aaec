"""The passages of a batch of questions, and their scores: the logits of p(passage | question).

    found = find_passages(model.rag.question_encoder, retriever, tokens, questions, n_docs=5)
    found.doc_ids, found.docs, found.scores

The scores are the index's, by a question encoder, by words or by both; or those of a `Rescoring`, such as a reranker,
that is shown more passages than are kept.
"""

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import RagRetriever

from rag.index.knowledge_index import KnowledgeIndex
from rag.models.packed_encoder import can_pack, encode_packed
from rag.packing import Packing, to_device


def learns_from(retriever: RagRetriever) -> bool:
    """Whether scores have a gradient for a question encoder; BM25's, given ones and those of fused ranks have none."""
    return not isinstance(retriever.index, KnowledgeIndex) or retriever.index.teaches


def passages_in(retriever: RagRetriever) -> int:
    """How many passages an index of ours holds, and more than enough of another: of more there are only empty slots."""
    return len(retriever.index) if isinstance(retriever.index, KnowledgeIndex) else sys.maxsize


def question_vectors(
    question_encoder, retriever: RagRetriever, tokens, questions: list[str], lengths: np.ndarray | None = None
) -> torch.Tensor:
    """The query vectors of B questions, (B, d), on the device of the tokens, float32 of half-precision weights, too.

    Args:
        tokens: input_ids and attention_mask (B, S) of the questions, for an index of vectors.
        questions: the same questions, for an index that reads text.
        lengths: (B) tokens of each, on the host, so that they are read without padding and the device is not asked
            where it is; None where that is not known.
    """
    index, parts = retriever.index, []
    is_ours = isinstance(index, KnowledgeIndex)
    if not is_ours or index.reads_vectors:
        if lengths is not None and can_pack(question_encoder):
            packing = Packing(lengths, tokens["input_ids"].device)
            vectors = encode_packed(question_encoder, packing.pack(tokens["input_ids"]), packing)
        else:
            vectors = question_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
        parts.append(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))  # float64 stays
    if is_ours and index.reads_text:
        words = torch.from_numpy(index.encode_questions(questions)).to(tokens["input_ids"].device)
        parts.append(words.to(parts[0].dtype) if parts else words)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass
class FetchedPassages:
    """The passages of B questions, in the index's order.

    Attributes:
        queries: (B, d), as of `question_vectors`.
        questions: B texts.
        doc_ids: (B, n_docs) int64 row numbers in the index, -1 in a slot without a passage.
        docs: B dicts of the passages' columns, among them the lists "title" and "text".
    """

    queries: torch.Tensor
    questions: list[str]
    doc_ids: np.ndarray
    docs: list[dict]


@dataclass
class FoundPassages(FetchedPassages):
    """The passages of B questions, best first.

    Attributes:
        scores: (B, n_docs), -inf in a slot without a passage.
    """

    scores: torch.Tensor


class Rescoring(Protocol):
    """Scores in the place of those that the index gives: `depth` passages are fetched, and the best of them kept.

    Attributes:
        depth: passages a question that are fetched, n_docs at least.
        learns: whether the scores have gradients; those of the passages that are kept are then taken with them.
    """

    depth: int
    learns: bool

    def __call__(self, found: FetchedPassages) -> torch.Tensor:
        """The logits of p(passage | question), as many as were found a question, on the device of the queries."""


def find_passages(
    question_encoder,
    retriever: RagRetriever,
    tokens,
    questions: list[str],
    n_docs: int,
    lengths: np.ndarray | None = None,
    rescore: Rescoring | None = None,
) -> FoundPassages:
    """Encode questions and fetch the passages of each. Collective where the retriever's `retrieve` is.

    Args:
        tokens, questions, lengths: as of `question_vectors`.
        n_docs: passages a question.
        rescore: gives the scores, which then decide which passages are kept; None for the index's.
    """
    queries = question_vectors(question_encoder, retriever, tokens, questions, lengths)  # (B, d)
    fetched = n_docs if rescore is None else max(n_docs, min(rescore.depth, passages_in(retriever)))
    doc_embeds, doc_ids, docs = retriever.retrieve(queries.detach().to("cpu", torch.float32).numpy(), fetched)
    if rescore is None:
        doc_embeds = to_device(torch.from_numpy(doc_embeds).to(queries.dtype), queries.device)  # (B, n_docs, d)
        scores = (queries.unsqueeze(1) * doc_embeds).sum(-1)
        return FoundPassages(queries, questions, doc_ids, docs, _masked(scores, doc_ids))
    is_choice, with_gradients = fetched > n_docs, torch.is_grad_enabled()
    with torch.set_grad_enabled(with_gradients and not is_choice):
        scores = _masked(rescore(FetchedPassages(queries, questions, doc_ids, docs)), doc_ids)
    order = scores.detach().argsort(dim=1, descending=True, stable=True)[:, :n_docs]
    doc_ids = np.take_along_axis(doc_ids, order.cpu().numpy(), axis=1)
    docs = retriever.index.get_doc_dicts(doc_ids)
    found = FoundPassages(queries, questions, doc_ids, docs, scores.gather(1, order))
    if is_choice and with_gradients and rescore.learns:
        found.scores = _masked(rescore(found), doc_ids)
    return found


def _masked(scores: torch.Tensor, doc_ids: np.ndarray) -> torch.Tensor:
    """Scores (B, n_docs), -inf where there is no passage, so that the slot gets no probability."""
    return scores.masked_fill(to_device(doc_ids < 0, scores.device), float("-inf"))
