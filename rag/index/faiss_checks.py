"""What a FAISS file may say that would give wrong passages, or end the process: told before the first search.

    ranking_of(index)                       # "inner product", "distance", "cosine", ...
    rank_by_inner_product(index)            # a Flat index of distances gives the same vectors' inner products
    ids_problem(index, count)               # ids of its own, which are no row numbers
    foreign_row(index, embeddings.gather)   # the row of a vector that is not the passage's
    links_problem(levels, ...)              # links of an HNSW graph that lead out of it

FAISS trusts all of these. Checks are vectorized and take blocks of a bounded size.
"""

from collections.abc import Callable, Iterator

import faiss
import numpy as np

from rag.index.faiss_kinds import parts_of, transforms_of, view_of

NUMBERS_AT_A_TIME = 2**18
# What keeps vectors as they are, or rounds each of their numbers, and gives one back without a search.
EXACT, ROUNDED = (faiss.IndexFlat, faiss.IndexHNSWFlat), (faiss.IndexScalarQuantizer, faiss.IndexHNSWSQ)
SOME_VECTORS = 16
# The largest difference of two vectors of length one: half precision makes 5e-4, four bits a number 0.15.
EXACT_DIFFERENCE, ROUNDED_DIFFERENCE = 0.02, 0.3
METRIC_NAMES = {faiss.METRIC_INNER_PRODUCT: "inner product", faiss.METRIC_L2: "distance"}


# --- What it ranks by -------------------------------------------------------------------------------------------------


def ranking_of(index) -> str:
    """What the largest scores of an index are those of, whatever it is wrapped in."""
    index = faiss.downcast_index(index)
    rankings = {ranking_of(part) for part in parts_of(index)}
    if any(_changes_lengths(transform) for transform in transforms_of(index)):
        return "cosine"
    if not rankings:
        rankings = {METRIC_NAMES.get(index.metric_type, "another metric")}
        if hasattr(index, "hnsw"):
            rankings.add(METRIC_NAMES.get(index.storage.metric_type, "another metric"))
    return rankings.pop() if len(rankings) == 1 else "several metrics"


def _changes_lengths(transform) -> bool:
    whitens = isinstance(transform, faiss.PCAMatrix) and transform.eigen_power != 0
    return whitens or isinstance(transform, (faiss.NormalizationTransform, faiss.ITQTransform))


def rank_by_inner_product(index):
    """The index over the same vectors by inner products, where it compares all of them by distances; else None.

    The vectors stay where they are, and what was given stays as it is; it must live as long as the answer.
    """
    flat = faiss.downcast_index(index)
    if type(flat) not in (faiss.IndexFlat, faiss.IndexFlatL2) or flat.metric_type != faiss.METRIC_L2:
        return None
    by_product = faiss.IndexFlatIP(flat.d)
    size = flat.ntotal * flat.code_size
    if size:
        by_product.codes = view_of(faiss.rev_swig_ptr(flat.codes.data(), size))
    by_product.ntotal = flat.ntotal
    by_product.referenced_objects = [index]
    return by_product


# --- Its vectors ------------------------------------------------------------------------------------------------------


def foreign_row(index, vectors_of: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """The first of a few rows whose vector in the index is another than the passage's; None where that is not known.

    An index over as many other passages, or over these by another encoder, would find any passage.

    Args:
        vectors_of: rows (n,) to the passages' vectors (n, d).
    """
    index, ids = faiss.downcast_index(index), None
    if isinstance(index, faiss.IndexIDMap):
        index, ids = faiss.downcast_index(index.index), faiss.vector_to_array(index.id_map)
    if not isinstance(index, EXACT + ROUNDED) or not index.ntotal:
        return None
    places = np.unique(np.linspace(0, index.ntotal - 1, SOME_VECTORS).astype(np.int64))
    rows = places if ids is None else ids[places]
    ours, theirs = np.float64(index.reconstruct_batch(places)), np.float64(vectors_of(rows))
    most = EXACT_DIFFERENCE if isinstance(index, EXACT) else ROUNDED_DIFFERENCE
    with np.errstate(invalid="ignore"):  # NaN of a passage is told elsewhere
        # Their lengths may be others: an index for cosines holds vectors of length one.
        a, b = (np.linalg.norm(vectors, axis=1) for vectors in (ours, theirs))
        differences = np.linalg.norm(ours * b[:, None] - theirs * a[:, None], axis=1)
        foreign = ~(differences <= most * a * b) & np.isfinite(theirs).all(axis=1)
    return int(rows[foreign][0]) if foreign.any() else None


# --- Ids --------------------------------------------------------------------------------------------------------------


def ids_problem(index, count: int) -> str | None:
    """Whether an index, over `count` vectors, gives other ids than the rows 0 to count - 1, each once."""
    index = faiss.downcast_index(index)
    for part in parts_of(index):
        if not isinstance(index, faiss.IndexShards) and (problem := ids_problem(part, count)):
            return problem
    if isinstance(index, faiss.IndexIDMap):
        return _rows_problem([faiss.vector_to_array(index.id_map)], count)
    if isinstance(index, faiss.IndexFastScan):
        return _blocks_problem(index)
    if isinstance(index, faiss.IndexIVF):
        lists = index.invlists
        if lists.nlist != index.nlist:
            return f"it has {lists.nlist} lists in the place of {index.nlist}"
        sizes = [lists.list_size(number) for number in range(lists.nlist)]
        return _rows_problem(
            (faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in enumerate(sizes) if size), count
        )
    return None


def _blocks_problem(index) -> str | None:
    """Whether the codes of an index of 4-bit codes, which FAISS reads in blocks, are as many as the blocks hold."""
    block, rows, parts = index.bbs, index.ntotal2, index.M2
    fits = block > 0 and block % 32 == 0 and rows % block == 0 and index.ntotal <= rows < index.ntotal + block
    if fits and index.M <= parts <= index.M + 1 and index.codes.size() == rows * parts // 2:
        return None
    return "its codes do not fill the blocks that it says it has"


def _rows_problem(blocks, count: int) -> str | None:
    seen = np.zeros(count, dtype=bool)
    total = 0
    for ids in blocks:
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= count:
            wrong = ids[(ids < 0) | (ids >= count)][0]
            return f"it has ids of its own: {wrong} is not the number of one of {count} passages"
        seen[ids] = True
        total += len(ids)
    if total != count or not seen.all():
        return f"its ids are not the numbers of {count} passages, each once"
    return None


# --- Links ------------------------------------------------------------------------------------------------------------


def links_problem(levels, offsets, links, first_of_level, entry_point: int, max_level: int) -> str | None:
    """Why a search that follows the links of an HNSW graph of n vectors would leave it, if so.

    Args:
        levels: (n,) int32, on how many levels each vector is.
        offsets: (n + 1,) uint64, where its links begin; the last one is where all end.
        links: int32, all links; -1 where there is none.
        first_of_level: int32, behind how many links those of a level begin.
        entry_point: the vector from which a search starts.
        max_level: of the entry point, the highest.
    """
    count, slots = len(levels), first_of_level.astype(np.int64)
    if max_level < 0 or len(slots) < max_level + 2 or slots[0] != 0 or (np.diff(slots) < 0).any():
        return "an HNSW graph of levels that it does not have"
    if not (0 <= entry_point < count and levels[entry_point] == max_level + 1 and offsets[0] == 0):
        return "an HNSW graph without a place to start"
    for start, end in _spans(count):
        of_these = levels[start:end]
        if of_these.min() < 1 or of_these.max() > max_level + 1:
            return "an HNSW graph with vectors on levels that it does not have"
        if (np.diff(offsets[start : end + 1].astype(np.int64)) != slots[of_these]).any():
            return "an HNSW graph of which the links are not where they should be"
    for start, end in _spans(len(links)):
        block = np.array(links[start:end])  # a copy lies in the cache and is aligned, as the file's numbers are not
        if block.min() < -1 or block.max() >= count:
            return f"an HNSW graph with links to vectors beyond its {count}"
    for start, end in _spans(count):
        upper = start + np.flatnonzero(levels[start:end] > 1)
        for level in range(1, max_level + 1):
            upper = upper[levels[upper] > level]
            places = offsets[upper].astype(np.int64)[:, None] + np.arange(slots[level], slots[level + 1])
            targets = links[places]
            if (levels[targets[targets >= 0]] <= level).any():
                return "an HNSW graph with links to vectors that are not on that level"
    return None


def _spans(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, NUMBERS_AT_A_TIME):
        yield start, min(start + NUMBERS_AT_A_TIME, count)
