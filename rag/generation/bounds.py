"""How good RAG-Sequence's candidates may be and must be, told from what the search computes anyway.

    bounds = Bounds(slots, doc_log_probs, decoder, beams=4, rows=1)
    found = Search(generator, settings, decoder, memory, ids, bounds=bounds).run()
    candidates = candidates.only(bounds.may_be_best(candidates))

A search asks a document for what follows each beginning that it goes on with. Where a sequence of another document
begins alike, the probabilities of so many of its tokens are known, and those of the others are 1 at most: its score
under all documents has bounds. A candidate below as many others as are wanted need not be scored, and mostly that is
all but one. A question whose running sequences are all below a finished one is decided: nothing that its documents
could still find would be the answer.
"""

import torch

from rag.generation.beams import Beams
from rag.generation.candidates import Candidates
from rag.packing import to_device

MARGIN, MARGIN_OF_HALF = 1e-3, 0.5  # of log-probabilities: more than what rounding moves a score by


class Bounds:
    """Bounds of the sequences that the documents of Q questions find, K of each document.

    What is known of a sequence, (2, n_docs), is noted along the beams: its log-probability under each document of its
    question, at most and at least. They are the same while that document goes on with the same tokens.

    Args:
        slots: (D) int64, where each document stands among all questions' n_docs.
        doc_log_probs: (Q, n_docs), -inf where there is no document.
        beams: K.
        rows: how many answers are wanted. Where it is more than one, no question is decided before the search's end.
    """

    def __init__(self, slots: torch.Tensor, doc_log_probs: torch.Tensor, decoder, beams: int, rows: int):
        self.slots, self.doc_log_probs, self.pad, self.rows = slots, doc_log_probs, decoder.pad, rows
        in_full = decoder.weight.dtype in (torch.float32, torch.float64)
        self.margin = MARGIN if in_full else MARGIN_OF_HALF
        self.n_docs = doc_log_probs.shape[1]
        self.noted = 2, self.n_docs
        shape = doc_log_probs.numel(), beams  # of what is kept by slot
        self.most = doc_log_probs.new_full(shape, float("-inf"))  # of finished sequences; -inf where there is none
        self.least = self.most.clone()
        self.stays = torch.zeros(shape, dtype=torch.bool, device=slots.device)
        self.running = self.most[:, 0]  # the best of a document's running ones, at most
        self.sequences: torch.Tensor | None = None  # (Q * n_docs, K, T)
        self.kinds = torch.zeros(shape, dtype=torch.long, device=slots.device)  # equal where running ones are equal

    def begin(self, item: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Begin a step of the I documents `item`: tokens (I, N) behind beams of the step before, (I, N).

        Args:
            log_probs: (I, N, vocabulary), of what follows.
        """
        slots, (items, beams, vocabulary) = self.slots[item], log_probs.shape
        own = self.kinds[slots[:, None], parents] * vocabulary + tokens
        kinds = own.new_full((len(self.most), beams), -1)  # of documents that are over
        kinds[slots] = own
        kinds = kinds.view(len(self.doc_log_probs), -1)  # (Q, n_docs * N)
        alike = (kinds[:, :, None] == kinds[:, None]) & (kinds >= 0)[:, None]
        most_beams, numbers = self.most.shape[1], torch.arange(alike.shape[1], device=own.device)
        first = numbers.where(alike, len(numbers)).amin(-1)  # that is equal
        self.kinds = first.view(-1, beams).expand(-1, most_beams)
        in_document, beam = alike.unflatten(2, (self.n_docs, beams)).int().max(-1)  # (Q, n_docs * N, n_docs)
        row = own.new_zeros(len(self.most))
        row[slots] = torch.arange(items, device=own.device)
        place = row.view(-1, 1, self.n_docs) * beams + beam
        of_beams = [known.view(-1, beams, self.n_docs)[slots] for known in (in_document > 0, place)]  # (I, N, n_docs)
        # (I, K, n_docs), where one beam at first stands for all; places are those in `log_probs`.
        self.is_known, self.places = (known.expand(-1, most_beams, -1) for known in of_beams)
        self.log_probs = log_probs.flatten(0, 1)

    def gains(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the step's beams `parents` (I, C) gain by tokens (I, C), (I, C, 2, n_docs)."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        is_pad = (tokens == self.pad)[..., None]  # which is not scored
        gains = self.log_probs[self.places[rows, parents], tokens[..., None]].masked_fill(is_pad, 0.0)
        is_known = self.is_known[rows, parents] | is_pad
        return torch.stack([gains.where(is_known, 0.0), gains.where(is_known, float("-inf"))], 2)

    def note(self, beams: Beams, over: torch.Tensor, stays: torch.Tensor) -> None:
        """What the step has come to.

        Args:
            over: (I) bool, whether a document finds nothing more.
            stays: (I, K) bool, whether a finished sequence is among its document's best for good.
        """
        slots, none = self.slots[beams.item], float("-inf")
        running, finished = (self._over_documents(slots, known) for known in (beams.notes, beams.finished_notes))
        self.running = torch.full_like(self.most[:, 0], none)
        self.running[slots] = running[..., 0].amax(1).masked_fill(over, none)
        self.most[slots], self.least[slots] = finished.masked_fill(~beams.finished[..., None], none).unbind(-1)
        self.stays[slots] = stays
        if self.sequences is None:
            self.sequences = beams.sequences.new_full((*self.most.shape, beams.sequences.shape[2]), self.pad)
        self.sequences[slots] = beams.sequences

    def decided(self, item: torch.Tensor) -> torch.Tensor:
        """Whether each document's question has its answer, whatever is found from here on: (I) to (I) bool."""
        assert self.sequences is not None, "a step comes first"
        kept = self.most, self.least, self.stays, self.running
        most, least, stays, running = (self._by_question(part) for part in kept)
        bar = least.masked_fill(~stays, float("-inf")).amax(1, keepdim=True) - self.margin  # (Q, 1)
        own = self._by_question(self.sequences)
        alike = (own[:, :, None] == own[:, None]).all(-1)
        stays = (alike & stays[:, None]).any(-1)  # in the document that found it, or in another
        is_open = (running >= bar).any(1) | ((most >= bar) & ~stays).any(1)
        return ~is_open[self.slots[item] // self.n_docs]

    def may_be_best(self, candidates: Candidates) -> torch.Tensor:
        """(Q, C) bool, False where a candidate's score is below those of as many others as are wanted."""
        proposals = to_device(candidates.proposals, self.slots.device)
        bounds = torch.stack([self._by_question(kept) for kept in (self.most, self.least)])
        of_candidates = bounds.new_full((*bounds.shape[:2], candidates.lengths.shape[1] + 1), float("-inf"))
        at = proposals.where(proposals >= 0, candidates.lengths.shape[1]).expand_as(bounds)
        most, least = of_candidates.scatter_reduce(2, at, bounds, "amax")[..., :-1]
        best = least.topk(min(self.rows, least.shape[1])).values[:, -1:]
        return (most >= best - self.margin) & to_device(candidates.lengths > 0, self.slots.device)

    def _over_documents(self, slots: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """log sum_z p(z) p(sequence | z), at most and at least: (I, N, 2, n_docs) to (I, N, 2)."""
        return (known + self.doc_log_probs[slots // self.n_docs][:, None, None]).logsumexp(-1)

    def _by_question(self, kept: torch.Tensor) -> torch.Tensor:
        """(Q * n_docs, K, ...) to (Q, n_docs * K, ...)."""
        return kept.unflatten(0, (-1, self.n_docs)).flatten(1, 2) if kept.dim() > 1 else kept.view(-1, self.n_docs)
