"""Passages that another system found for each question, in the place of an index: `--passages_file FOUND.jsonl`.

    {"question": "who wrote it", "titles": ["Hamlet"], "texts": ["a play by ..."], "scores": [71.3]}
    {"question": "who wrote it", "ctxs": [{"title": "Hamlet", "text": "a play by ...", "score": "71.3"}]}

    index = open_given(config)               # config.passages_file
    queries = index.encode_questions(["who wrote it"])
    doc_ids, vectors = index.get_top_docs(queries, n_docs=5)

A file named .jsonl has a record a line, one named .json a list of records. The second form is what DPR's retriever
writes. A question is looked up by its text, whatever blanks are in it. Its passages are taken by their scores, the
largest first, and the scores are the logits of p(passage | question). Nothing is differentiable and no encoder runs.

A question travels as (1, its number), float32, and a passage that was found answers with (score, 0): their inner
product is the score, so that all retrievers carry them as they carry vectors. Equal passages are one, whose id is its
row among all passages in the order of the file.
"""

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any

import datasets
import numpy as np
import pyarrow as pa

from rag.errors import UserError
from rag.index.arguments import index_effort
from rag.index.knowledge_index import KnowledgeIndex

logger = logging.getLogger(__name__)

FLAG = "--passages_file"
EXPECTED = '`{"question": "...", "titles": [...], "texts": [...], "scores": [...]}`'
MOST_QUESTIONS = 2**24  # beyond, float32 does not tell neighboring numbers apart
LARGEST_SCORE = float(np.finfo(np.float32).max)
ROWS_OF_A_CHUNK = 10_000  # of which all texts fit into Arrow's 2 GB


class GivenPassages(KnowledgeIndex):
    """A `KnowledgeIndex` whose searches were done by somebody else.

    Args:
        path: of the file, which is read whole.

    Attributes:
        prefix: what stands before every question that is asked, and not in the file.

    Raises:
        UserError: a record is none, or two have the same question; names the line.
    """

    reads_text, reads_vectors, teaches = True, False, False

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.prefix = ""
        self.is_ready = False
        self.number_of: dict[str, int] = {}  # of each question, without needless blanks
        rows_of: dict[tuple[str, str], int] = {}
        counts: list[int] = []
        rows: list[int] = []
        scores: list[float] = []
        for found in _unlike(_records(self.path), self.origin_of_file):
            self.number_of[found.question] = len(counts)
            counts.append(len(found.scores))
            rows += [rows_of.setdefault(passage, len(rows_of)) for passage in found.passages]
            scores += found.scores
        self._require_few(len(counts))
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.rows_found, self.scores_found = np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32)
        super().__init__(_dataset(list(rows_of)), 2, vectors_from="index", origin=self.origin_of_file)

    @property
    def origin_of_file(self) -> str:
        return f"{FLAG} {self.path}"

    def _require_few(self, questions: int) -> None:
        if not 0 < questions <= MOST_QUESTIONS:
            raise UserError(
                f"{self.origin_of_file} has {questions:,} questions, but from 1 to {MOST_QUESTIONS:,} can be told "
                "apart; give a file with those that are asked"
            )

    def is_initialized(self) -> bool:
        return self.is_ready

    def init_index(self, shard: int | None = None) -> None:
        """There is nothing to open: the file was read."""
        self.is_ready = True

    def expect(self, questions: Iterable[str], source: str, prefix: str = "") -> None:
        """Raise `UserError` if the file lacks one of the questions that are to be asked, each behind `prefix`.

        Args:
            source: where the questions are from, for the message.
        """
        self.prefix = prefix
        lacking = [(line, text) for line, text in enumerate(questions, start=1) if _key(text) not in self.number_of]
        if lacking:
            line, text = lacking[0]
            raise UserError(
                f"{self.origin_of_file} has no passages for {len(lacking):,} question(s) of {source}, the first on "
                f"line {line}: {text[:80]!r}; give a file with a record for each"
            )

    def encode_questions(self, questions: list[str]) -> np.ndarray:
        """Queries (B, 2) float32: a one, and the question's number in the file.

        Raises:
            UserError: a question is not in the file.
        """
        queries = np.ones((len(questions), 2), dtype=np.float32)
        for query, question in zip(queries, questions, strict=True):
            number = self.number_of.get(_key(question.removeprefix(self.prefix)))
            if number is None:
                raise UserError(
                    f"{self.origin_of_file} has no passages for the question {question[:80]!r}; give a file with a "
                    "record for each"
                )
            query[1] = number
        return queries

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """The file's scores (B, n_docs) float32 and ids (B, n_docs) int64, best first; where it has fewer: id -1."""
        scores = np.full((len(queries), n_docs), np.finfo(np.float32).min, dtype=np.float32)
        ids = np.full((len(queries), n_docs), -1, dtype=np.int64)
        for row, number in enumerate(queries[:, 1].astype(np.int64)):
            start, end = self.starts[number], min(self.starts[number + 1], self.starts[number] + n_docs)
            scores[row, : end - start] = self.scores_found[start:end]
            ids[row, : end - start] = self.rows_found[start:end]
        return scores, ids

    def get_top_docs(self, question_hidden_states: np.ndarray, n_docs: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, n_docs) int64, best first, and (B, n_docs, 2) float32, the score and a zero of each."""
        scores, ids = self.search(question_hidden_states, n_docs)
        vectors = np.zeros((*ids.shape, 2), dtype=np.float32)
        vectors[:, :, 0] = np.where(ids >= 0, scores, 0)
        return ids, vectors

    def description(self) -> dict:
        return {"kind": "given passages", "passages": len(self), "questions": len(self.number_of)}


def open_given(config) -> GivenPassages:
    """The passages of `config.passages_file`.

    Raises:
        UserError: there is no such file, or a record in it is none; names the line.
    """
    path = getattr(config, "passages_file", None)
    if path is None or not os.path.isfile(path):
        raise UserError(f"{FLAG} {path} is not a file; give one with a line {EXPECTED} for each question")
    for name, value in index_effort(config).items():
        if value is not None:
            logger.warning(f"{name} {value} has no effect on passages that were found already")
    return GivenPassages(path)


def _dataset(passages: list[tuple[str, str]]) -> datasets.Dataset:
    """Titles and texts as the columns of a dataset in memory."""
    columns = {
        name: pa.chunked_array(
            [
                pa.array([passage[place] for passage in passages[start : start + ROWS_OF_A_CHUNK]], pa.string())
                for start in range(0, len(passages), ROWS_OF_A_CHUNK)
            ]
        )
        for place, name in enumerate(("title", "text"))
    }
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


# --- The records of a file --------------------------------------------------------------------------------------------


class Found:
    """What was found for a question.

    Args:
        record: a JSON value.

    Attributes:
        question: without needless blanks.
        passages: (title, text) of each, best first.
        scores: as many, finite.

    Raises:
        ValueError: it is no such record.
    """

    def __init__(self, record: Any):
        question = record.get("question") if isinstance(record, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{EXPECTED} is expected, not {json.dumps(record)[:80]}")
        self.question = _key(question)
        titles, texts, scores = _columns(record)
        if not len(titles) == len(texts) == len(scores) or not texts:
            raise ValueError(
                f"{len(titles)} titles, {len(texts)} texts and {len(scores)} scores; give as many of each, one or more"
            )
        for text in itertools.chain(titles, texts):
            if not isinstance(text, str):
                raise ValueError(f"{json.dumps(text)[:80]} is no text; titles and texts are texts")
            _require_unicode(text)
        numbers = [_score(score) for score in scores]
        order = sorted(range(len(numbers)), key=lambda place: -numbers[place])  # of equal ones the file's first
        self.passages = [(titles[place], texts[place]) for place in order]
        self.scores = [numbers[place] for place in order]


def _columns(record: dict) -> tuple[list, list, list]:
    """Titles, texts and scores, of either form; a title may be left out or null, as in a passage of a web page."""
    if "ctxs" in record:
        passages = record["ctxs"]
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise ValueError('`ctxs` is a list of `{"title": "...", "text": "...", "score": 1.0}`')
        titles, texts, scores = ([passage.get(name) for passage in passages] for name in ("title", "text", "score"))
    else:
        titles, texts, scores = (_list(record, name) for name in ("titles", "texts", "scores"))
    return ["" if title is None else title for title in titles], texts, scores


def _list(record: dict, name: str) -> list:
    column = record.get(name)
    if not isinstance(column, list):
        raise ValueError(f"`{name}` is {json.dumps(column)[:80]}, not a list; {EXPECTED} is expected")
    return column


def _score(value: Any) -> float:
    """A score as a number; DPR writes it as a text."""
    try:
        score = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not abs(score) <= LARGEST_SCORE:  # nor is NaN
        raise ValueError(f"the score {json.dumps(value)[:80]} is not a finite number")
    return score


def _require_unicode(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\\ud800", half of a character
            raise ValueError(f"{text[max(0, error.start - 20) : error.end]!a} is no Unicode text") from error


def _key(question: str) -> str:
    return " ".join(question.split())


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Each JSON value of a file, behind its place."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                yield from ((f"record {number}", record) for number, record in enumerate(_list_of(path, file), start=1))
                return
            for number, line in enumerate(file, start=1):
                yield f"line {number}", _json_of(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{FLAG} {path} is not UTF-8 ({error.reason}); write it anew as UTF-8") from error


def _list_of(path: str, file: IO[str]) -> list:
    text = file.read()
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, list):
        raise UserError(f"{FLAG} {path}: a list of records is expected; name a file of a record a line .jsonl")
    return records


def _json_of(line: str) -> Any:
    """What is written there, the text itself where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.rstrip("\n")


def _unlike(records: Iterable[tuple[str, Any]], origin: str) -> Iterator[Found]:
    """What was found for each question; a question may come again with the same passages, which is left out."""
    places: dict[str, tuple[str, int]] = {}
    for place, record in records:
        try:
            found = Found(record)
        except ValueError as error:
            raise UserError(f"{origin}, {place}: {error}") from error
        content = hash((tuple(found.passages), tuple(found.scores)))
        if found.question not in places:
            places[found.question] = place, content
            yield found
        elif places[found.question][1] != content:
            raise UserError(
                f"{origin}, {place}: the question {found.question[:80]!r} is that of {places[found.question][0]}, with "
                "other passages; keep one of them"
            )
