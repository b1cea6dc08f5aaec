"""Metrics of answers and of retrieved passages, as fractions: pure functions, one question at a time.

    python -c "from rag.metrics import f1_score; print(f1_score('the old Eiffel Tower', 'Eiffel Tower'))"

Multiply by 100 where they are printed.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import starmap
from math import prod

import regex

LONGEST_PATTERN, MOST_REPEATS = 10_000, 1_000_000  # characters, copies that `regex` makes of what is repeated
PATTERN_SECONDS = 10.0
_COUNT = re.compile(r"(.?)\{(\d*)(?:,(\d*))?\}", re.DOTALL)
# What `re` reads as letters, and `regex` as leave to err: a{e<=1}.
_FUZZY = re.compile(r"(?<!\\)\{(?=[^{}]*[a-z<=][^{}]*\})")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")  # not of `regex`, whose words end elsewhere beside combining marks, ² and ½
# Scripts that put no blanks between words: there a letter, with the marks on it, is compared like a word.
_NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_DPR_TOKEN = regex.compile(rf"(?V1)[{_NO_BLANKS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_NO_BLANKS}]]+|[^\p{{Z}}\p{{C}}]")


def normalize_answer(s: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (the SQuAD v1.1 evaluation script)."""
    s = s.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", s).split())


def exact_match_score(prediction: str, ground_truth: str) -> bool:
    """Whether two answers are equal once normalized (SQuAD v1.1)."""
    return normalize_answer(prediction) == normalize_answer(ground_truth)


def f1_score(prediction: str, ground_truth: str) -> float:
    """Harmonic mean of precision and recall over the normalized words of two answers (SQuAD v1.1)."""
    prediction_words = normalize_answer(prediction).split()
    truth_words = normalize_answer(ground_truth).split()
    shared = (Counter(prediction_words) & Counter(truth_words)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction_words), shared / len(truth_words)
    return 2 * precision * recall / (precision + recall)


def metric_max_over_ground_truths(
    metric_fn: Callable[[str, str], float], prediction: str, ground_truths: Sequence[str]
) -> float:
    """The best score of a prediction over the answers that count as right."""
    return max(metric_fn(prediction, truth) for truth in ground_truths)


def calculate_exact_match(output_lns: Sequence[str], reference_lns: Sequence[str]) -> dict[str, float]:
    """{"em": share of the outputs that match the reference of the same place}; 0 where there are none.

    Raises:
        ValueError: there are not as many references as outputs.
    """
    matches = list(starmap(exact_match_score, zip(output_lns, reference_lns, strict=True)))
    return {"em": sum(matches) / max(len(matches), 1)}


def precision_at_k(retrieved_titles: Sequence[str], gold_titles: Iterable[str], k: int) -> float:
    """Distinct gold titles among the first k retrieved ones, over k, also where fewer are gold (public suite)."""
    return len(set(retrieved_titles[:k]) & set(gold_titles)) / k


def reciprocal_rank(retrieved_titles: Sequence[str], gold_titles: Iterable[str]) -> float:
    """1 / the rank (from 1) of the first gold title; 0 where none was retrieved."""
    gold_titles = set(gold_titles)
    return next((1 / rank for rank, title in enumerate(retrieved_titles, start=1) if title in gold_titles), 0.0)


def answer_recall_at_k(retrieved_texts: Sequence[str], answers: Iterable[str], k: int) -> bool:
    """Whether one of the first k passages contains one of the answers, word for word (DPR, Karpukhin et al. 2020).

    Words are compared case-folded and Unicode-normalized; "Rome" is not found in "Romeo". Of scripts without blanks,
    such as Chinese, Japanese and Thai, letters are compared: an answer may stand anywhere in a sentence.
    """
    needles = [needle for needle in map(_dpr_words, answers) if needle.strip()]
    return any(needle in text for text in map(_dpr_words, retrieved_texts[:k]) for needle in needles)


def find_answers(text: str, answers: Iterable[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text in Unicode's decomposed form (NFD), and from where to where in it answers stand, as
    `answer_recall_at_k` finds them; places may overlap.
    """
    text = unicodedata.normalize("NFD", text)
    matches = list(_DPR_TOKEN.finditer(text))
    words = [unicodedata.normalize("NFD", match[0].lower()) for match in matches]
    places = []
    for needle in (_dpr_words(answer).split() for answer in answers):
        for at in range(len(words) - len(needle) + 1):
            if needle and words[at : at + len(needle)] == needle:
                places.append((matches[at].start(), matches[at + len(needle) - 1].end()))
    return text, sorted(places)


def _dpr_words(text: str) -> str:
    """DPR's words between single spaces, with one before the first and one behind the last."""
    return f" {' '.join(_DPR_TOKEN.findall(unicodedata.normalize('NFD', text.lower())))} "


# --- Regular expressions in the place of answers, as CuratedTrec has them ---------------------------------------------


def compile_pattern(pattern: str) -> regex.Pattern:
    """A regular expression of Python's, whatever the case of letters.

    Raises:
        ValueError: it cannot be compiled, or would be too large.
    """
    try:
        re.compile(pattern)  # `regex`, which can stop after a time, understands more than is meant here
        if len(pattern) > LONGEST_PATTERN or _most_repeats(pattern) > MOST_REPEATS:
            raise ValueError("too long, or repeats too often")
        return regex.compile(_FUZZY.sub(r"\{", pattern), regex.IGNORECASE | regex.MULTILINE)
    except (ValueError, re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from error


def _most_repeats(pattern: str) -> int:
    """No less than how often a part of a pattern is repeated by counts in braces, within each other."""
    counts = [(behind, max(int(least or 1), int(most or 1))) for behind, least, most in _COUNT.findall(pattern)]
    alone = max((count for behind, count in counts if behind != ")"), default=1)
    return prod((count for behind, count in counts if behind == ")"), start=alone)


def pattern_match_score(prediction: str, pattern: str) -> bool:
    """Whether a pattern matches an answer from its beginning on (DrQA, Chen et al. 2017; so do ORQA and DPR).

    Raises:
        ValueError: the pattern is none, or matching takes too long.
    """
    return _timed(compile_pattern(pattern).match, pattern, prediction)


def pattern_recall_at_k(retrieved_texts: Sequence[str], patterns: Iterable[str], k: int) -> bool:
    """Whether one of the first k passages holds, anywhere, what one of the patterns matches (DPR).

    Raises:
        ValueError: as of `pattern_match_score`.
    """
    compiled = [(compile_pattern(pattern).search, pattern) for pattern in patterns]
    return any(_timed(search, pattern, text) for text in retrieved_texts[:k] for search, pattern in compiled)


def _timed(find: Callable, pattern: str, text: str) -> bool:
    try:
        return find(text, timeout=PATTERN_SECONDS) is not None
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"the pattern {pattern[:80]!r} has not come to an end after {PATTERN_SECONDS:g} s on {text[:80]!r}"
        ) from error
