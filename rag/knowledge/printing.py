"""Passages as a search shows them.

print_passages("Where is Oslo?", ids, scores, docs)
"""

from collections.abc import Mapping

import numpy as np

from rag.errors import printable


def print_passages(question: str, ids: np.ndarray, scores: np.ndarray, docs: Mapping) -> list[dict]:
    """Print a question and its passages, and return these; -1 among the ids ends them."""
    print(f"Question: {question}")
    passages = [
        {"id": int(number), "score": float(score), "title": title, "text": text}
        for number, score, title, text in zip(ids, scores, docs["title"], docs["text"], strict=True)
        if number >= 0
    ]
    for passage in passages:
        print(printable(f"  {passage['score']:8.3f}  {passage['title']}: {passage['text']}"))
    return passages
