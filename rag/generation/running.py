"""What a search has of each answer so far, told after each step: for who watches it.

told = []
token_ids = generate_answers(model, ids, mask, doc_scores, n_docs=5, note_step=told.append)
told[0]         # (B, 2): the first token and one more of each question's best running sequence
"""

from collections.abc import Callable

import numpy as np
import torch

from rag.generation.beams import EXCLUDED, Beams


class RunningBest:
    """Tells the best running sequence of each of B questions; of a question where none runs any more, its last one.

    It need not begin as the answer does: other beams may overtake it, and RAG-Sequence weighs what the search found.

    Args:
        tell: is given (B, T) int64 on the CPU after a step that leads to T tokens. What it raises ends the search.
        doc_log_probs: (B, n_docs) log p(z | x).
        slots: (I) where each item of the search, a document, stands among all questions' n_docs; None where the items
            are questions.
        pad: behind a sequence's end.
    """

    def __init__(
        self, tell: Callable[[torch.Tensor], None], doc_log_probs: torch.Tensor, slots: np.ndarray | None, pad: int
    ):
        self.tell, self.pad, self.questions = tell, pad, len(doc_log_probs)
        priors = doc_log_probs.float().cpu().numpy()
        self.question_of = np.arange(len(priors)) if slots is None else slots // priors.shape[1]
        self.log_priors = np.zeros(len(priors)) if slots is None else priors.ravel()[slots]
        self.best: np.ndarray | None = None  # (B, max_length)

    def note(self, beams: Beams, is_over: torch.Tensor, length: int) -> None:
        """What a step has come to.

        Args:
            is_over: (I) bool, whether an item runs no more.
            length: tokens of the running sequences.
        """
        sequences, items = beams.running[:, 0].cpu().numpy(), beams.item.cpu().numpy()
        if self.best is None:
            self.best = np.full((self.questions, sequences.shape[1]), self.pad)
            self.best[:, 0] = sequences[0, 0]
        scores = beams.running_scores[:, 0].float().cpu().numpy()
        runs = ~is_over.cpu().numpy() & (scores > EXCLUDED / 2)
        scores = (scores + self.log_priors[items])[runs]
        ascending = np.argsort(scores, kind="stable")  # of several rows for one place the last one stays
        self.best[self.question_of[items[runs][ascending]]] = sequences[runs][ascending]
        self.tell(torch.from_numpy(self.best[:, :length].copy()))
