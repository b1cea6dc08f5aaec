"""Passages as a search shows them.

print_passages("Where is Oslo?", ids, scores, docs)
"""

import textwrap
from collections.abc import Mapping

import numpy as np

from rag.errors import printable


def print_passages(
    question: str, ids: np.ndarray, scores: np.ndarray, docs: Mapping, columns: int | None = None
) -> list[dict]:
    """Print a question and its passages, and return these; -1 among the ids ends them.

    Args:
        columns: of the line that each passage gets; None for as many as it needs.
    """
    print(f"Question: {question}")
    passages = [
        {"id": int(number), "score": float(score), "title": title, "text": text}
        for number, score, title, text in zip(ids, scores, docs["title"], docs["text"], strict=True)
        if number >= 0
    ]
    for passage in passages:
        print(passage_line(passage["score"], passage["title"], passage["text"], columns))
    return passages


def passage_line(score: float, title: str, text: str, columns: int | None = None) -> str:
    """A passage on a line, cut between words where that would be longer than `columns`."""
    start, line = f"  {score:8.3f}  ", f"{title}: {text}"
    return printable(
        start + (line if columns is None else textwrap.shorten(line, columns - len(start), placeholder=" ..."))
    )
