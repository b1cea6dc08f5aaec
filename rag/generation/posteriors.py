"""Which passages an answer comes from: the exact posterior p(z | x, y), which a model has that sums over passages.

    noted = []
    token_ids = generate_answers(model, ids, mask, doc_scores, n_docs=5, note_posteriors=noted.append)
    noted[0].passages[0]            # (n_docs), sums to 1: how much of the first question's answer each passage says

Bayes' rule on RAG's likelihood (Lewis et al. 2020, section 2.1). RAG-Sequence draws one passage for an answer:
p(z | x, y) = p(z | x) prod_t p(y_t | x, z, y_<t) / p(y | x). RAG-Token draws one for each token:
p(z_t | x, y) = p(z_t | x) p(y_t | x, z_t, y_<t) / p(y_t | x, y_<t); of the whole answer it is the tokens' mean.
A Fusion-in-Decoder draws no passage, and has none.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rag.generation.candidates import Candidates, Trees, edge_log_probs
from rag.generation.token_trees import Memory
from rag.packing import to_device


@dataclass
class Posteriors:
    """Of the best answer to each of B questions; 0 where there is no document.

    Attributes:
        passages: (B, n_docs) float32; None of a Fusion-in-Decoder.
        tokens: (B, T, n_docs) float32, RAG-Token's of each token behind the first one, zero behind the last; else None.
        answers: (B) float32, log p(y | x) of the answers themselves, in nats.
    """

    passages: torch.Tensor | None
    tokens: torch.Tensor | None
    answers: torch.Tensor


def posteriors_of(
    decoder, memory: Memory, slots: np.ndarray, answers: np.ndarray, doc_log_probs: torch.Tensor, of_tokens: bool
) -> Posteriors:
    """The passages' part in answers (B, T), padded, one of each question.

    Args:
        memory: of D documents.
        slots: (D) where each document stands among all questions' n_docs, ascending.
        doc_log_probs: (B, n_docs), -inf where there is no document.
        of_tokens: each token draws a document of its own (RAG-Token).
    """
    questions, longest = answers.shape
    is_word = answers != decoder.pad
    lengths = np.maximum(2, np.where(is_word, np.arange(1, longest + 1), 0).max(1))[:, None]
    nobody = np.full((questions, 0), -1)
    candidates = Candidates(
        answers[:, None, : lengths.max()], lengths, nobody, slots, doc_log_probs.shape[1], decoder.pad
    )
    trees = Trees.of(candidates, decoder.pad, bos=None)
    edges = edge_log_probs(decoder, memory, trees, candidates)  # (B, n_docs, E + 1)
    paths = to_device(trees.paths, edges.device)  # (B, 1, T)
    log_probs = edges.gather(2, paths.expand(-1, edges.shape[1], -1))  # (B, n_docs, T), 0 of what is not scored
    if not of_tokens:
        joint = log_probs.sum(-1) + doc_log_probs
        return Posteriors(joint.softmax(-1).float(), None, joint.logsumexp(-1).float())
    is_scored = (paths < edges.shape[2] - 1).mT  # (B, T, 1)
    joint = log_probs + doc_log_probs[..., None]
    tokens = joint.softmax(1).mT * is_scored
    count = is_scored.sum(1)
    passages = torch.where(count > 0, tokens.sum(1) / count.clamp(min=1), doc_log_probs.exp())
    return Posteriors(passages.float(), tokens.float(), (joint.logsumexp(1) * is_scored[..., 0]).sum(1).float())
