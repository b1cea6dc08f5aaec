"""The bookkeeping of beam search, without a model: which sequences run on, which are finished, when no better can come.

    search = BeamSearch(num_beams=4, max_length=50, end_tokens=1)
    beams = search.start(items=8, start_token_id=2, pad_token_id=1)
    for length in range(1, search.max_length):
        log_probs = ...  # (8, 4, vocabulary) of the token behind beams.running[..., :length]
        beams = search.advance(beams, log_probs, length, stops)
        if search.is_over(beams).all():
            break
    beams.sequences, beams.scores  # best first

The sequences and scores are those of transformers' `generate`, for every length penalty and early stopping. The items
of a batch do not influence each other, so that the caller may drop those that are over.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch.nn.functional import log_softmax

# The score of what must not be chosen: finite, as transformers' is, so that it can still be told from -inf.
EXCLUDED = -1e9


@dataclass
class Beams:
    """The state of the search over I items, row by row."""

    item: torch.Tensor  # (I) the item's row at the start
    running: torch.Tensor  # (I, num_beams, max_length) unfinished sequences, best first
    running_scores: torch.Tensor  # (I, num_beams) their log-probabilities
    parents: torch.Tensor  # (I, num_beams) the running beam of the previous step that each one continues
    sequences: torch.Tensor  # (I, num_beams, max_length) the best finished sequences, best first
    scores: torch.Tensor  # (I, num_beams) their log-probabilities / length ** length_penalty
    lengths: torch.Tensor  # (I, num_beams) their tokens behind the first
    finished: torch.Tensor  # (I, num_beams) bool, False where no sequence has finished yet
    improvable: torch.Tensor  # (I, 1) bool, whether a running sequence may still beat a finished one
    notes: torch.Tensor  # (I, num_beams, ...) what the caller adds up along each running sequence
    finished_notes: torch.Tensor  # (I, num_beams, ...) and along each finished one

    def select(self, rows: torch.Tensor) -> "Beams":
        """The beams of some items."""
        return Beams(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class BeamSearch:
    """The rules of a search; the names and meanings of the settings are those of transformers' GenerationConfig."""

    num_beams: int
    max_length: int  # tokens of a sequence, the first one included
    end_tokens: int = 1  # how many different tokens end a sequence
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # True, False or "never"

    reads_log_probs: ClassVar[bool] = True  # which rules on tokens have changed, where greedy search reads logits

    def start(
        self, items: int, start_token_id: int, pad_token_id: int, dtype: torch.dtype = torch.float32, device=None,
        noted: tuple[int, ...] = (0,),
    ) -> Beams:  # fmt: skip
        """Beams that hold the first token alone; `dtype` is the scores', `noted` the shape of a sequence's notes."""
        shape = (items, self.num_beams)
        blank = torch.full((*shape, self.max_length), pad_token_id, device=device)
        blank[..., 0] = start_token_id
        running_scores = torch.full(shape, EXCLUDED, dtype=dtype, device=device)
        running_scores[:, 0] = 0.0  # all beams are alike: only the first one may be continued
        notes = torch.zeros(*shape, *noted, dtype=dtype, device=device)
        return Beams(
            item=torch.arange(items, device=device),
            running=blank,
            running_scores=running_scores,
            parents=torch.zeros(shape, dtype=torch.long, device=device),
            sequences=blank.clone(),
            scores=torch.full(shape, EXCLUDED, dtype=dtype, device=device),
            lengths=torch.zeros(shape, dtype=torch.long, device=device),
            finished=torch.zeros(shape, dtype=torch.bool, device=device),
            improvable=torch.ones(items, 1, dtype=torch.bool, device=device),
            notes=notes,
            finished_notes=notes.clone(),
        )

    def advance(
        self,
        beams: Beams,
        log_probs: torch.Tensor,
        length: int,
        stops: Callable[[torch.Tensor, None], torch.Tensor],
        gains: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> Beams:
        """One step, from `length` tokens to one more.

        Args:
            log_probs: (I, N, vocabulary) of the token that comes next on each running beam; N is num_beams, or 1 for
                all of them alike, as they are at the first step.
            stops: transformers' stopping criteria: token ids (rows, length + 1) to (rows) bool, whether they end.
            gains: what a beam's notes gain by a token: (I, C) beams and (I, C) tokens to (I, C, ...).
        """
        rows = torch.arange(len(log_probs), device=log_probs.device)[:, None]
        candidates, scores, parents = self._candidates(beams, rows, log_probs, length)
        notes = beams.notes[rows, parents]
        if gains is not None:
            notes = notes + gains(parents, candidates[..., length])
        ended = stops(candidates[..., : length + 1].flatten(0, 1), None).view_as(scores)  # (I, C)
        running_scores, chosen = (scores + EXCLUDED * ended).topk(self.num_beams)
        sequences, finished_scores, lengths, finished, finished_notes = self._finish(
            beams, rows, candidates, scores, ended, notes, length
        )
        return Beams(
            item=beams.item,
            running=candidates[rows, chosen],
            running_scores=running_scores,
            parents=parents[rows, chosen],
            sequences=sequences,
            scores=finished_scores,
            lengths=lengths,
            finished=finished,
            improvable=beams.improvable & self._may_improve(running_scores, finished_scores, finished, length),
            notes=notes[rows, chosen],
            finished_notes=finished_notes,
        )

    def is_over(self, beams: Beams) -> torch.Tensor:
        """Whether each item has its answer, (I) bool."""
        over = ~beams.improvable.squeeze(1)
        return over | beams.finished.all(1) if self.early_stopping is True else over

    def stays(self, beams: Beams, length: int) -> torch.Tensor:
        """Whether each finished sequence of `length` tokens at most is among the best for good, (I, num_beams) bool.

        That holds where no token raises a running sequence's score before the length penalty.
        """
        last = self.max_length - 1
        best = [beams.running_scores[:, :1] / end**self.length_penalty for end in {min(length + 1, last), last}]
        possible = torch.cat(best, 1).amax(1, keepdim=True)
        return beams.finished & (self.is_over(beams)[:, None] | (beams.scores > possible))

    def log_probs(self, beams: Beams) -> torch.Tensor:
        """The finished sequences' log-probabilities without the length penalty, (I, num_beams)."""
        return beams.scores * beams.lengths.float() ** self.length_penalty

    def _candidates(self, beams: Beams, rows: torch.Tensor, log_probs: torch.Tensor, length: int):
        """The C best continuations of each item, best first: tokens (I, C, max_length), scores and parents (I, C).

        C is large enough that num_beams of them run on even if each beam's every end token is among them.
        """
        count = max(2, 1 + self.end_tokens) * self.num_beams
        # The best of an item are among the best of its beams; so few are quickly sorted.
        best, tokens = log_probs.topk(min(count, log_probs.shape[-1]))  # (I, N, k)
        scores, places = (best + beams.running_scores[..., None]).flatten(1).topk(count)
        parents = places // best.shape[-1]
        candidates = beams.running[rows, parents]
        if tokens.shape[1] < self.num_beams:
            tokens = tokens.expand(-1, self.num_beams, -1)
        candidates[..., length] = tokens.flatten(1).gather(1, places)
        return candidates, scores, parents

    def _finish(self, beams: Beams, rows: torch.Tensor, candidates, scores, ended, notes, length: int):
        """The best num_beams of the finished sequences and of those that end now.

        Only the best num_beams candidates may end; the others are there to run on.

        Returns:
            Tokens, scores, lengths, finished and notes.
        """
        new = slice(self.num_beams)
        is_open = beams.improvable  # (I, 1)
        if self.early_stopping is True:
            is_open = is_open & ~beams.finished.all(1, keepdim=True)
        new_scores = scores[:, new] / length**self.length_penalty + EXCLUDED * ~(ended[:, new] & is_open)
        best_scores, best = torch.cat([beams.scores, new_scores], 1).topk(self.num_beams)
        return (
            torch.cat([beams.sequences, candidates[:, new]], 1)[rows, best],
            best_scores,
            torch.cat([beams.lengths, torch.full_like(beams.lengths, length)], 1)[rows, best],
            torch.cat([beams.finished, ended[:, new]], 1)[rows, best],
            torch.cat([beams.finished_notes, notes[:, new]], 1)[rows, best],
        )

    def _may_improve(self, running_scores, scores, finished, length: int) -> torch.Tensor:
        """Whether the best running sequence may still beat the worst finished one, (I, 1) bool.

        Its future length is not known. As in transformers, it is taken to end at once, so that the search may stop too
        early where long sequences are favored; "never" takes the length that favors it most.
        """
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_length - 1
        best_possible = running_scores[:, :1] / length**self.length_penalty
        worst = scores.amin(1, keepdim=True).where(finished, EXCLUDED)  # (I, num_beams), any score beats an empty place
        return (best_possible > worst).any(1, keepdim=True)


class GreedySearch(BeamSearch):
    """The same for one beam, which takes the best token until one ends it; scores are log-probabilities."""

    def __init__(self, max_length: int):
        super().__init__(num_beams=1, max_length=max_length, length_penalty=0.0)

    reads_log_probs: ClassVar[bool] = False

    def advance(self, beams, log_probs, length, stops, gains=None):
        """As `BeamSearch.advance`, from logits (I, 1, vocabulary) that rules on tokens have changed."""
        tokens = log_probs.argmax(-1)  # (I, 1)
        running = beams.running.clone()
        running[..., length] = tokens
        running_scores = beams.running_scores + log_softmax(log_probs, -1).gather(2, tokens[..., None])[..., 0]
        notes = beams.notes if gains is None else beams.notes + gains(beams.parents, tokens)
        ends = stops(running[:, 0, : length + 1], None)[:, None] & ~beams.finished
        finished = beams.finished | ends
        return Beams(
            item=beams.item,
            running=running,
            running_scores=running_scores,
            parents=beams.parents,
            sequences=running.where(ends[..., None], beams.sequences),
            scores=running_scores.where(ends, beams.scores),
            lengths=torch.full_like(beams.lengths, length).where(ends, beams.lengths),
            finished=finished,
            improvable=~finished,
            notes=notes,
            finished_notes=notes.where(ends[..., None, None], beams.finished_notes) if gains is not None else notes,
        )
