"""Which passages are the first of their kind: exact duplicates are known by 16 bytes each, not by their text.

    keep = first_of_equals(read_passages("my_documents.tsv"))                  # (N,) bool
    passages = itertools.compress(read_passages("my_documents.tsv"), keep)

Two passages are equal where title and text are.
"""

from collections.abc import Iterable

import numpy as np

from rag.files import new_digest


def first_of_equals(passages: Iterable[tuple[str, str]], known: Iterable[tuple[str, str]] = ()) -> np.ndarray:
    """Whether each of N passages differs, in title or text, from all before it and from those `known`: (N,) bool.

    It takes about 50 bytes a passage, known ones included. Two that differ have one digest with a probability of N^2 in
    2^129.
    """
    digests = bytearray()
    for passage in known:
        digests += _digest(passage)
    first_new = len(digests) // 16
    for passage in passages:
        digests += _digest(passage)
    keys = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first comes first
    repeats = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    keep = np.ones(len(keys), dtype=bool)
    keep[order[1:][repeats]] = False
    return keep[first_new:]


def _digest(passage: tuple[str, str]) -> bytes:
    title, text = (part.encode() for part in passage)
    return new_digest(b"%d " % len(title) + title + text).digest()
