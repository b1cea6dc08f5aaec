"""KILT's gold files and its measures of pages (Petroni et al. 2021), as the benchmark's own scripts define them.

    {"id": "1", "input": "who painted it", "output": [{"answer": "Munch", "provenance": [{"title": "The Scream"}]}]}

    pages = pages_of(read_record(line))                        # [["The Scream"], ...]: an evidence set an output
    r_precision(["Oslo", "The Scream"], pages)                 # 0.0: of the first page none is right
    page_recall_at_k(["Oslo", "The Scream"], pages, k=2)       # 1.0

Each output is one way to be right: an answer, the pages that bear it out, or both. KILT compares pages by their number
in its Wikipedia, and here they are compared by title, which is what an index knows of them; in KILT's Wikipedia each
page has a title of its own.
"""

import json
from collections.abc import Sequence
from typing import Any

EXPECTED = '`{"input": "...", "output": [{"answer": "...", "provenance": [{"title": "..."}]}]}`'


def is_kilt(record: Any) -> bool:
    """Whether a JSON object looks like one of KILT's."""
    return isinstance(record, dict) and "input" in record and "question" not in record


def read_record(line: str) -> dict[str, Any]:
    """A line of a gold file.

    Raises:
        ValueError: it is none.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    outputs = record.get("output") if isinstance(record, dict) else None
    if not is_kilt(record) or not isinstance(record["input"], str) or not isinstance(outputs, list):
        raise ValueError(f"KILT's {EXPECTED} is expected, not {line[:80]!r}")
    if not outputs or not all(isinstance(output, dict) for output in outputs):
        raise ValueError(f"`output` holds no answer (KILT's test sets come without); {EXPECTED} is expected")
    return record


def question_of(record: dict[str, Any]) -> str:
    """The question in one line."""
    return " ".join(record["input"].split())


def answers_of(record: dict[str, Any]) -> list[str]:
    """Every answer once, without the blank ones.

    Raises:
        ValueError: one is no text.
    """
    answers = [output["answer"] for output in record["output"] if output.get("answer") is not None]
    for answer in answers:
        if not isinstance(answer, str):
            raise ValueError(f"`answer` {str(answer)[:80]} is no text")
    return list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))


def pages_of(record: dict[str, Any]) -> list[list[str]]:
    """The evidence sets, an output each: the titles of its pages, each once; [] of one that names no page.

    An output without the key `provenance` has no evidence set.

    Raises:
        ValueError: a provenance is none, or has no title to compare pages by.
    """
    return [_titles(output["provenance"]) for output in record["output"] if output.get("provenance") is not None]


def _titles(provenance: Any) -> list[str]:
    if not isinstance(provenance, list) or not all(isinstance(page, dict) for page in provenance):
        raise ValueError(f"`provenance` is a list of pages, not {str(provenance)[:80]}")
    titles = [page.get("title") for page in provenance]
    for title, page in zip(titles, provenance, strict=True):
        if not isinstance(title, str) or not title.strip():
            raise ValueError(f"a page has no `title` to compare it by: {str(page)[:80]}")
    return list(dict.fromkeys(title.strip() for title in titles))


# --- Measures ---------------------------------------------------------------------------------------------------------


def r_precision(titles: Sequence[str], pages: Sequence[Sequence[str]]) -> float:
    """Share of right pages among the first R, where R pages are right; of several evidence sets the best one's.

    Args:
        titles: of the passages that were retrieved, best first; passages of one page count once.
        pages: evidence sets, each with the titles of its pages.
    """
    found = list(dict.fromkeys(titles))
    return max((len(set(found[: len(own)]) & set(own)) / len(own) for own in pages if own), default=0.0)


def page_recall_at_k(titles: Sequence[str], pages: Sequence[Sequence[str]], k: int) -> float:
    """Share of the distinct evidence sets that are complete within the first k places.

    A page of no evidence set takes a place. An evidence set takes one, where the last of its pages is that was found,
    and counts if all were. A set without a page is never found. Arguments as of `r_precision`.
    """
    found = list(dict.fromkeys(titles))
    sets = list(dict.fromkeys(frozenset(own) for own in pages))
    last = [max((place for place, page in enumerate(found) if page in own), default=-1) for own in sets]
    ranking = []
    for place, page in enumerate(found):
        holders = [number for number, own in enumerate(sets) if page in own]
        ranking += [sets[number] <= set(found) for number in holders if last[number] == place]
        ranking += [] if holders else [False]
    return sum(ranking[:k]) / len(sets) if sets else 0.0
