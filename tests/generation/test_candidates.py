"""rag/generation/candidates.py: trees of many questions at once are those that plain Python makes of each."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rag.generation.candidates import Candidates, Trees, beam_scores

PAD, BOS, N_DOCS, BEAMS, LONGEST = 1, 0, 3, 4, 7
SLOTS = np.array([0, 1, 2, 4, 6, 7, 11])  # of four questions' twelve


def make_sequences(seed: int) -> np.ndarray:
    """Beams of seven documents: few different words, so that many begin alike; ends at all lengths, and empty ones."""
    random = np.random.default_rng(seed)
    sequences = random.integers(0, 5, (len(SLOTS), BEAMS, LONGEST))
    sequences[..., 0] = 2
    sequences[:4, :, 1] = BOS  # all candidates of the first two questions begin so
    lengths = random.integers(1, LONGEST + 1, (len(SLOTS), BEAMS, 1))
    return np.where(np.arange(LONGEST) < lengths, sequences, PAD)


def candidates_of(sequences) -> list[list[tuple]]:
    """What the beams of each question found, in order, without the padding."""
    pools: list[list[tuple]] = [[] for _ in range(4)]
    for slot, beams in zip(SLOTS, sequences.tolist(), strict=True):
        for tokens in beams:
            while len(tokens) > 2 and tokens[-1] == PAD:
                tokens.pop()
            pools[slot // N_DOCS].append(tuple(tokens))
    return pools


@pytest.mark.parametrize("seed", range(5))
def test_equal_candidates_stand_once_in_their_order(seed):
    sequences = make_sequences(seed)
    candidates = Candidates.of(sequences, SLOTS, N_DOCS, PAD)
    for question, pool in enumerate(candidates_of(sequences)):
        distinct = list(dict.fromkeys(pool))
        lengths = candidates.lengths[question]
        assert lengths.tolist() == [*map(len, distinct), *[0] * (len(lengths) - len(distinct))]
        rows = zip(candidates.tokens[question].tolist(), lengths, strict=True)
        assert [tuple(row[:length]) for row, length in rows if length] == distinct
        found = [distinct[place] for place in candidates.proposals[question] if place >= 0]
        assert found == pool
    missing = np.setdiff1d(np.arange(4 * N_DOCS), SLOTS)
    assert (candidates.proposals.reshape(-1, BEAMS)[missing] == -1).all() and len(missing) == 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bos", [None, BOS])
def test_trees_are_those_of_plain_dictionaries(seed, bos):
    sequences = make_sequences(seed)
    candidates = Candidates.of(sequences, SLOTS, N_DOCS, PAD)
    trees = Trees.of(candidates, PAD, bos)
    for question, pool in enumerate(candidates_of(sequences)):
        distinct = list(dict.fromkeys(pool))
        skips_first = bos is not None and all(candidate[1] == bos for candidate in distinct)
        beginnings = {candidate[: n + 1] for candidate in distinct for n in range(len(candidate) - 1)}
        size = trees.sizes[question]
        ways = [way_of(trees, question, node) for node in range(size)]
        assert len(ways) == len(beginnings) and set(ways) == beginnings
        assert [len(way) - 1 for way in ways] == trees.depths[question, :size].tolist()
        assert not trees.ancestors[question, size:, 1:].any()
        assert trees.ancestors[question, size:, 0].all()
        ends = set()
        for candidate, path in zip(distinct, trees.paths[question], strict=False):
            expected = [
                (candidate[: n + 1], target)
                for n, (_, target) in enumerate(pairwise(candidate))
                if target != PAD and not (skips_first and n == 0)
            ]
            edges = [edge for edge in path.tolist() if edge < trees.places.shape[1]]
            assert [(ways[trees.places[question, e]], trees.targets[question, e]) for e in edges] == expected
            ends.update(expected)
        assert len(ends) == trees.edges[question]
        assert (trees.paths[question, len(distinct) :] == trees.places.shape[1]).all()


def way_of(trees: Trees, question: int, node: int) -> tuple:
    above = np.flatnonzero(trees.ancestors[question, node])
    assert above[-1] == node and (np.diff(trees.depths[question, above]) == 1).all()
    return tuple(trees.tokens[question, above].tolist())


@pytest.mark.parametrize("distinct", [True, False])
def test_the_best_are_sums_over_the_beams_that_found_them(distinct):
    sequences = make_sequences(0)
    candidates = Candidates.of(sequences, SLOTS, N_DOCS, PAD)
    random = torch.Generator().manual_seed(0)
    log_probs = torch.rand(len(SLOTS), BEAMS, generator=random).double().log()
    doc_log_probs = torch.full((4 * N_DOCS,), float("-inf"), dtype=torch.double)
    doc_log_probs[SLOTS] = torch.rand(len(SLOTS), generator=random).double().log()
    scores = beam_scores(candidates, log_probs, doc_log_probs.view(4, -1))
    best = candidates.best(scores, 20, distinct)
    for question, pool in enumerate(candidates_of(sequences)):
        weights = (log_probs + doc_log_probs[SLOTS, None])[question == SLOTS // N_DOCS].exp().flatten()
        sums = {c: sum(w for w, other in zip(weights, pool, strict=True) if other == c) for c in pool}
        expected = sorted(sums if distinct else pool, key=lambda candidate: -sums[candidate])
        rows = [tuple(row[: len(c)]) for row, c in zip(best[question].tolist(), expected, strict=False)]
        assert [sums[row] for row in rows] == [sums[c] for c in expected]
        assert (best[question, len(expected) :] == PAD).all()
        places = {c: n for n, c in enumerate(dict.fromkeys(pool))}
        assert all(abs(scores[question, places[c]].exp() - sums[c]) < 1e-12 for c in pool)
