"""The candidate answers of RAG-Sequence, and their scores: those of all questions of a batch in one pass.

    candidates = Candidates.of(sequences, question_of, pad_token_id)
    scores = marginal_log_probs(decoder, memory, candidates, doc_log_probs, bos_token_id)    # (Q, C)

The candidates of a question are one tree, in which common beginnings stand once; all its documents are asked for the
probabilities of its edges, the steps from a token to the next. Trees are laid out by NumPy, while no device waits.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from rag.generation.pace import pace_of
from rag.generation.token_trees import Memory
from rag.packing import groups_of_similar_length, to_device


def _places_in_groups(groups: np.ndarray) -> np.ndarray:
    """Where each element stands in its group, (n), of ascending group numbers (n)."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row of (n, m) stands first, in no order, and which of these each row is, (n)."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse


def _distinct_pairs(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `distinct_rows`, of int64 pairs (n), (n) of which neither is negative; in ascending order."""
    base = int(other.max(initial=0)) + 1
    _, first, inverse = np.unique(one * base + other, return_index=True, return_inverse=True)
    return first, inverse


@dataclass
class Candidates:
    """What the beams of the documents of Q questions found; at most C of a question differ."""

    tokens: np.ndarray  # (Q, C, T) int64, padded; in the order in which they were found
    lengths: np.ndarray  # (Q, C) tokens, two at least; 0 where a question has fewer candidates
    proposals: np.ndarray  # (Q, n_docs * num_beams) which candidate a document's beam found; -1: none
    slots: np.ndarray  # (D) int64, ascending: where each document stands among all questions' n_docs

    n_docs: int
    pad_token_id: int

    @classmethod
    def of(
        cls, sequences: np.ndarray, slots: np.ndarray, n_docs: int, pad_token_id: int, is_one: np.ndarray | None = None
    ) -> "Candidates":
        """Of the beams' sequences (D, num_beams, T), padded; the decoder's first token and one more always stay.

        Args:
            is_one: (D, num_beams) bool, one of a question at least; None for all.
        """
        _, beams, longest = sequences.shape
        question_of = slots // n_docs
        questions = int(question_of[-1]) + 1
        is_one = np.ones(sequences.shape[:2], dtype=bool) if is_one is None else is_one
        asker, sequences = question_of.repeat(is_one.sum(1)), sequences[is_one]
        first, inverse = distinct_rows(np.concatenate([asker[:, None], sequences], 1))
        order = np.argsort(first)  # by question, and there as they were found
        owner = asker[first[order]]
        place = _places_in_groups(owner)
        tokens = np.full((questions, place.max() + 1, longest), pad_token_id, dtype=np.int64)
        tokens[owner, place] = sequences[first[order]]
        lengths = np.zeros(tokens.shape[:2], dtype=np.int64)
        is_word = tokens[owner, place] != pad_token_id
        lengths[owner, place] = np.maximum(2, np.where(is_word, np.arange(1, longest + 1), 0).max(-1))
        place_of = np.empty_like(place)
        place_of[order] = place
        own = np.full(is_one.shape, -1, dtype=np.int64)
        own[is_one] = place_of[inverse]
        proposals = np.full((questions * n_docs, beams), -1, dtype=np.int64)
        proposals[slots] = own
        return cls(tokens[..., : lengths.max()], lengths, proposals.reshape(questions, -1), slots, n_docs, pad_token_id)

    def only(self, is_kept: np.ndarray) -> "Candidates":
        """Those of (Q, C) that are kept, in their order."""
        order = np.argsort(~is_kept, axis=1, kind="stable")[:, : is_kept.sum(1).max()]
        place_of = np.where(is_kept, np.cumsum(is_kept, 1) - 1, -1)
        proposals = np.where(self.proposals < 0, -1, np.take_along_axis(place_of, self.proposals, 1))
        lengths = np.take_along_axis(self.lengths * is_kept, order, 1)
        tokens = np.take_along_axis(self.tokens, order[..., None], 1)
        return replace(self, tokens=tokens, lengths=lengths, proposals=proposals)

    def of_questions(self, questions: np.ndarray) -> tuple["Candidates", np.ndarray]:
        """Those of some questions, ascending, and which of the D documents are theirs."""
        documents = np.flatnonzero(np.isin(self.slots // self.n_docs, questions))
        own = self.slots[documents]
        slots = np.searchsorted(questions, own // self.n_docs) * self.n_docs + own % self.n_docs
        parts = {name: getattr(self, name)[questions] for name in ("tokens", "lengths", "proposals")}
        return replace(self, slots=slots, **parts), documents

    def best(self, scores: torch.Tensor, rows: int, distinct: bool) -> np.ndarray:
        """The tokens of the `rows` candidates of the best scores (Q, C), best first, (Q, rows or fewer, T).

        Behind a question's last candidate stands padding.

        Args:
            distinct: equal candidates of several beams count once.
        """
        if not distinct:
            found = torch.from_numpy(self.proposals).to(scores.device)
            scores = scores.gather(1, found.clamp(min=0)).masked_fill(found < 0, float("-inf"))
        chosen = scores.topk(min(rows, scores.shape[1])).indices.cpu().numpy()
        question = np.arange(len(chosen))[:, None]
        if not distinct:
            chosen = self.proposals[question, chosen]
        is_one = (chosen >= 0) & (self.lengths[question, chosen] > 0)
        return np.where(is_one[..., None], self.tokens[question, chosen], self.pad_token_id)


@dataclass
class Trees:
    """The candidates of Q questions as trees of N nodes and E edges at most. All are arrays."""

    sizes: np.ndarray  # (Q) nodes
    tokens: np.ndarray  # (Q, N); 0 behind the last node
    depths: np.ndarray  # (Q, N), of nodes that are numbered downwards; 0 behind the last
    ancestors: np.ndarray  # (Q, N, N) bool, a node its own; behind the last node the root alone
    edges: np.ndarray  # (Q) edges
    places: np.ndarray  # (Q, E) the node that an edge begins at
    targets: np.ndarray  # (Q, E) the token that it leads to
    paths: np.ndarray  # (Q, C, T - 1) the edges of each candidate; E where none is scored

    @classmethod
    def of(cls, candidates: Candidates, pad_token_id: int, bos: int | None) -> "Trees":
        """Trees whose edges lead to no padding.

        Args:
            bos: no edge leads to the first token where every candidate of a question begins with this one.
        """
        tokens, lengths = candidates.tokens, candidates.lengths
        node_of, owner, starts = _nodes(tokens, lengths)
        questions, _, steps = node_of.shape
        question, candidate, step = starts.T
        place = _places_in_groups(owner)
        sizes = np.bincount(owner, minlength=questions)
        shape = questions, int(sizes.max())
        trees_tokens, depths = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        trees_tokens[owner, place], depths[owner, place] = tokens[question, candidate, step], step
        ancestors = np.zeros((*shape, shape[1]), dtype=bool)
        ancestors[..., 0] = True
        above = node_of[question, candidate]  # (nodes, steps): the way to each node, and beyond it
        node, level = np.nonzero(np.arange(steps) <= step[:, None])
        ancestors[owner[node], place[node], place[above[node, level]]] = True

        following = tokens[..., 1:]
        is_scored = (node_of >= 0) & (following != pad_token_id)
        if bos is not None:
            is_scored[..., 0] &= ~((tokens[..., 1] == bos) | (lengths == 0)).all(1, keepdims=True)
        begin, target = node_of[is_scored], following[is_scored]  # of the edges of all candidates
        first, edge_of = _distinct_pairs(begin, target)
        begin, target = begin[first], target[first]
        edge_owner = owner[begin]
        edge_place = _places_in_groups(edge_owner)
        edges = np.bincount(edge_owner, minlength=questions)
        shape = questions, int(edges.max())
        places, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        places[edge_owner, edge_place], targets[edge_owner, edge_place] = place[begin], target
        paths = np.full(node_of.shape, shape[1], dtype=np.int64)
        paths[is_scored] = edge_place[edge_of]
        return cls(sizes, trees_tokens, depths, ancestors, edges, places, targets, paths)


def _nodes(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nodes of candidates (Q, C, T): every token but a candidate's last is one, common beginnings are the same.

    Returns:
        node_of (Q, C, T - 1), -1 behind a candidate's end; the question of each node, ascending, where nodes are
        numbered downwards; and a place in `tokens` of each, (nodes, 3).
    """
    questions, _, longest = tokens.shape
    node_of = np.full((*tokens.shape[:2], longest - 1), -1, dtype=np.int64)
    firsts: list[np.ndarray] = []
    parents = np.broadcast_to(np.arange(questions)[:, None], tokens.shape[:2])
    found = 0
    for step in range(longest - 1):
        alive = np.argwhere(lengths > step + 1)
        rows = alive[:, 0], alive[:, 1]
        # A question's root is numbered as the question: none of them is found before.
        first, inverse = _distinct_pairs(parents[rows], tokens[..., step][rows])
        node_of[..., step][rows] = found + inverse
        firsts.append(np.column_stack([alive[first], np.full(len(first), step)]))
        parents = node_of[..., step]
        found += len(first)
    starts = np.concatenate(firsts)
    order = np.argsort(starts[:, 0], kind="stable")
    number = np.empty(len(order) + 1, dtype=np.int64)
    number[order], number[-1] = np.arange(len(order)), -1
    return number[node_of], starts[order, 0], starts[order]


def marginal_log_probs(
    decoder,
    memory: Memory,
    candidates: Candidates,
    doc_log_probs: torch.Tensor,
    bos: int | None,
    weighs_empty: bool = False,
) -> torch.Tensor:
    """log sum_z p(z) p(candidate | z), as `RagSequenceForGeneration.get_nll` without label smoothing.

    Args:
        memory: of the D documents.
        doc_log_probs: (Q, n_docs), -inf where there is no document.
        bos: the first token is not scored where every candidate begins with this one, as in get_nll.
        weighs_empty: give an answer of one token p(z), too; get_nll puts it on the second token.

    Returns:
        (Q, C), -inf behind a question's last candidate.
    """
    device = doc_log_probs.device
    trees = Trees.of(candidates, decoder.pad, bos)
    edges = edge_log_probs(decoder, memory, trees, candidates)  # (Q, n_docs, E + 1)
    paths = to_device(trees.paths, device)
    of_paths = edges.gather(2, paths.flatten(1)[:, None].expand(-1, edges.shape[1], -1)).unflatten(2, paths.shape[1:])
    weights = doc_log_probs[..., None]
    if not weighs_empty:
        second = candidates.tokens[..., 2:3]
        has_second = to_device((candidates.lengths > 2) & (second != decoder.pad).any(-1), device)
        weights = weights.where(has_second[:, None] | weights.isneginf(), 0.0)  # (Q, n_docs, C)
    scores = (of_paths.sum(-1) + weights).logsumexp(1)
    return scores.masked_fill(to_device(candidates.lengths == 0, device), float("-inf"))


def edge_log_probs(decoder, memory: Memory, trees: Trees, candidates: Candidates) -> torch.Tensor:
    """log p(next token | node) of the edges of each tree under its documents, (Q, n_docs, E + 1); the last is 0."""
    device, slots = memory.mask.device, candidates.slots
    question_of = slots // candidates.n_docs
    most_edges = trees.places.shape[1]
    found = torch.zeros(len(trees.sizes) * candidates.n_docs, most_edges + 1, dtype=decoder.dtype, device=device)
    sizes, pace = trees.sizes[question_of], pace_of(device)
    for group, nodes in groups_of_similar_length(sizes, pace.pass_cost, pace.chunk_tokens):
        documents = np.sort(group)
        own = question_of[documents]
        is_node = np.arange(nodes) < trees.sizes[own][:, None]  # (n, nodes)
        number = np.cumsum(is_node).reshape(is_node.shape) - 1  # of each node among those that are no padding
        row, edge = np.nonzero(np.arange(most_edges) < trees.edges[own][:, None])
        arrays = (
            trees.tokens[own, :nodes],
            trees.depths[own, :nodes],
            trees.ancestors[own, :nodes, :nodes],
            np.flatnonzero(is_node),
            number[row, trees.places[own][row, edge]],
            trees.targets[own][row, edge],
            slots[documents][row],
            edge,
        )
        tokens, depths, ancestors, kept, places, targets, rows, columns = (
            to_device(np.ascontiguousarray(array), device) for array in arrays
        )
        hidden = decoder.decode(tokens, depths, ancestors, memory_of(memory, documents))
        found[rows, columns] = decoder.token_log_probs(hidden.flatten(0, 1)[kept], places, targets)
    return found.unflatten(0, (-1, candidates.n_docs))


def memory_of(memory: Memory, documents: np.ndarray) -> Memory:
    """The memory of some documents, ascending; without a copy where they stand in a row."""
    first, last = int(documents[0]), int(documents[-1])
    if last - first + 1 == len(documents):
        return memory if len(documents) == len(memory.mask) else memory.select(slice(first, last + 1))
    return memory.select(to_device(documents, memory.mask.device))


def beam_scores(candidates: Candidates, log_probs: torch.Tensor, doc_log_probs: torch.Tensor) -> torch.Tensor:
    """log sum of p(z) p(candidate | z) over the documents whose beams found it, (Q, C).

    Args:
        log_probs: (D, num_beams), of the beams' sequences.
        doc_log_probs: (Q, n_docs), -inf where there is no document.
    """
    device = log_probs.device
    proposals = torch.from_numpy(candidates.proposals).to(device)  # (Q, n_docs * num_beams)
    by_slot = log_probs.new_zeros(doc_log_probs.numel(), log_probs.shape[1])
    by_slot[torch.from_numpy(candidates.slots).to(device)] = log_probs
    by_slot = (by_slot + doc_log_probs.flatten()[:, None]).view_as(proposals)
    places = torch.arange(candidates.lengths.shape[1], device=device)
    return by_slot[:, None].masked_fill(proposals[:, None] != places[:, None], float("-inf")).logsumexp(-1)
