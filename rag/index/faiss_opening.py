"""FAISS files to the index that is searched: whole, of these passages, by inner product; or one line that says why not.

files = files_of(index_path, count)                    # one, or the shards, each with the rows it holds
require_all_rows(files, count, "--index_path my.faiss")
part, by_distance = fitting_index(map_file(path, "--index_path"), 300, "--index_path my.faiss", path, are_equally_long)
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss

from rag.checksums import found_once
from rag.errors import UserError
from rag.index.faiss_checks import ids_problem, rank_by_inner_product, ranking_of
from rag.index.faiss_kinds import core_of
from rag.index.faiss_mapping import map_index
from rag.index.index_files import shard_files

# Candidates or lists that any index may be searched with; more only if it has as many passages.
ANY_EFFORT = 65_536


def files_of(index_path: str | os.PathLike, count: int) -> list[tuple[str, int, int]]:
    """The FAISS files of an index over `count` passages, each with its first row and the one behind its last."""
    if Path(index_path).is_dir():
        return [(str(path), start, end) for path, start, end in shard_files(index_path)]
    return [(str(index_path), 0, count)]


def require_all_rows(files: list[tuple[str, int, int]], count: int, origin: str) -> None:
    """Raise `UserError` unless the rows of the files follow each other and are `count`."""
    expected = 0
    for _, start, end in files:
        if start != expected:
            raise UserError(
                f"{origin}: its shards do not hold row {min(start, expected)} exactly once; put all of one index "
                "there, and no other"
            )
        expected = end
    if expected != count:
        raise UserError(other_count(origin, expected, count))


def map_file(path: str, flag: str):
    """The FAISS index of a file, mapped.

    Raises:
        UserError: the file, which `flag` gave, is not a whole one.
    """
    try:
        return map_index(path)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise UserError(f"{flag} {path} is not a whole FAISS index ({reason}); build or fetch it again") from error


def fitting_index(
    index, count: int, origin: str, path: str | None, are_equally_long: Callable[[], bool]
) -> tuple[Any, bool]:
    """The index to search, and whether it ranks by distance where that is the same as by inner product.

    One that compares all vectors by distances gives place to one that compares the same by inner products.

    Args:
        index: over `count` passages.
        origin: the flag that gave it, and its value.
        path: its file; None for an index in memory.
        are_equally_long: whether all passages' vectors have one length, so that the nearest ones are those of largest
            inner product; asked where it matters.

    Raises:
        UserError: its ids are not the passages' rows, or it ranks otherwise.
    """
    if index.ntotal == count:

        def find() -> str | None:
            return ids_problem(index, count)

        if problem := find() if path is None else found_once(path, f"ids of {count}", find):
            raise UserError(f"{origin}: {problem}; build it of all vectors in the order of the passages, without ids")
    ranking = ranking_of(index)
    if ranking == "inner product":
        return index, False
    if (by_product := rank_by_inner_product(index)) is not None:
        return by_product, False
    if ranking not in ("distance", "cosine") or not are_equally_long():
        raise UserError(
            f"{origin} ranks passages by {ranking}, RAG by inner product, and their vectors are not equally long; "
            "build it with faiss.METRIC_INNER_PRODUCT, or with use_own_knowledge_dataset.py --index_factory"
        )
    return index, True


def joined(parts: list):
    """One index of several, the rows of one behind those of the other."""
    if len(parts) == 1:
        return parts[0]
    whole = faiss.IndexShards(parts[0].d, False, True)  # one after the other, each with all threads
    for part in parts:
        whole.add_shard(part)
    return whole


def set_effort(index, effort: dict[str, int | None], count: int) -> list[str]:
    """Apply what is set of efSearch and nprobe to an index over `count` passages; the problems with it."""
    problems = []
    for (name, value), flag in zip(effort.items(), ("--ef_search", "--nprobe"), strict=True):
        if value is None:
            continue
        if value > max(ANY_EFFORT, count):
            problems.append(f"{flag} {value} is more than the index's {count} passages; give fewer")
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            kind = type(core_of(index)).__name__
            problems.append(f"{flag} {value}: an index of kind {kind} has no such setting; leave it out")
    return problems


def other_count(origin: str, vectors: int, expected: int) -> str:
    """What is said of an index that is not over all passages."""
    return f"{origin} holds {vectors} vectors, but there are {expected} passages; take the two that were built together"
