"""Which candidates of RAG-Sequence may be the best, told from what the search has computed already.

    states = States()
    found = Search(generator, settings, decoder, memory, ids, states=states).run()      # notes what it expands
    candidates = candidates.only(may_be_best(candidates, states, decoder, doc_log_probs, rows))

A search has asked a document for what follows each beginning that it went on with. Where a candidate of another
document begins alike, the probabilities of so many of its tokens are known, and those of the others are 1 at most: its
score has a bound. One that is below the scores of as many others as are wanted need not be scored, and mostly that is
all but one.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from rag.generation.candidates import Candidates
from rag.generation.forward import full_precision
from rag.packing import to_device

MARGIN, MARGIN_OF_HALF = 1e-3, 0.5  # of log-probabilities: more than what rounding moves a score by


@dataclass
class States:
    """What a search knows of the beginnings that it went on with, step by step."""

    documents: list[torch.Tensor] = field(default_factory=list)  # (I)
    prefixes: list[torch.Tensor] = field(default_factory=list)  # (I, N, length)
    hidden: list[torch.Tensor] = field(default_factory=list)  # (I, N, d), what the output layer reads
    normalizers: list[torch.Tensor] = field(default_factory=list)  # (I, N), log of the sum of all words' exp(logit)

    def note(self, documents, prefixes, hidden, logits, log_probs) -> None:
        """A step's; logits and log_probs (I, N, vocabulary)."""
        self.documents.append(documents)
        self.prefixes.append(prefixes.clone())  # of a tensor that is written into
        self.hidden.append(hidden)
        self.normalizers.append(logits[..., 0] - log_probs[..., 0])

    def numbers(self) -> dict[tuple[int, bytes], int]:
        """The number of each document's beginning, as its row of `rows`."""
        found: dict[tuple[int, bytes], int] = {}
        end = 0
        for documents, prefixes in zip(self.documents, self.prefixes, strict=True):
            for document, beams in zip(documents.tolist(), prefixes.cpu().numpy(), strict=True):
                found |= {(document, beam.tobytes()): end + row for row, beam in enumerate(beams)}
                end += len(beams)
        return found

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (M, d) and normalizers (M)."""
        return torch.cat([h.flatten(0, 1) for h in self.hidden]), torch.cat([n.flatten() for n in self.normalizers])


def may_be_best(candidates: Candidates, states: States, decoder, doc_log_probs: torch.Tensor, rows: int) -> np.ndarray:
    """(Q, C) bool, False where a candidate's score under all documents is below those of `rows` others.

    Args:
        states: of the search that found the candidates, by document.
        doc_log_probs: (Q, n_docs), -inf where there is no document.
    """
    known, is_whole = _known_log_probs(candidates, states, decoder)  # (D, C)
    slots = to_device(candidates.slots, known.device)
    most = known.new_full((doc_log_probs.numel(), known.shape[1]), float("-inf"))
    most[slots] = known + doc_log_probs.flatten()[slots, None]
    least = most.clone()
    least[slots] = most[slots].masked_fill(~is_whole, float("-inf"))
    most, least = (terms.unflatten(0, doc_log_probs.shape).logsumexp(1) for terms in (most, least))  # (Q, C)
    is_one = to_device(candidates.lengths > 0, known.device)
    best = least.masked_fill(~is_one, float("-inf")).topk(min(rows, least.shape[1])).values[:, -1:]
    margin = MARGIN if decoder.weight.dtype in (torch.float32, torch.float64) else MARGIN_OF_HALF
    return ((most >= best - margin) & is_one).cpu().numpy()


def _known_log_probs(candidates: Candidates, states: States, decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each candidate's known beginning under each document, (D, C), and whether it is all."""
    tokens, lengths = candidates.tokens, candidates.lengths
    numbers, n_docs = states.numbers(), candidates.n_docs
    at, row_of, targets = [], [], []
    is_whole = np.zeros((len(candidates.slots), lengths.shape[1]), dtype=bool)
    for document, question in enumerate(candidates.slots // n_docs):
        for number, (candidate, length) in enumerate(zip(tokens[question], lengths[question], strict=True)):
            for step in range(1, length):
                row = numbers.get((document, candidate[:step].tobytes()))
                if row is None:
                    break
                at.append(document * lengths.shape[1] + number)
                row_of.append(row)
                targets.append(candidate[step])
            else:
                is_whole[document, number] = True
    device = states.hidden[0].device
    hidden, normalizers = states.rows()
    rows, words, places = (to_device(np.array(numbers, dtype=np.int64), device) for numbers in (row_of, targets, at))
    log_probs = full_precision(hidden[rows] * decoder.weight[words]).sum(-1) + decoder.bias[words] - normalizers[rows]
    # An answer that has not ended is filled with padding, which is not scored.
    log_probs = log_probs.masked_fill(words == decoder.pad, 0.0)
    known = log_probs.new_zeros(is_whole.size).index_add(0, places, log_probs).view(is_whole.shape)
    return known, to_device(is_whole, device)
