"""BM25 over the words of passages, in the place of vectors: `--index_name bm25 --passages_path FOLDER`.

    index = open_bm25(config)              # built beside the passages the first time, then reused
    index.init_index()                     # maps it
    queries = index.encode_questions(["who wrote hamlet"])
    doc_ids, vectors = index.get_top_docs(queries, n_docs=5)

A question travels as (1, id, id, ..., -1), float32: a one, the numbers of its words, filled up with -1. A passage that
was found answers with (score, 0, ..., 0). Their inner product is the passage's BM25 score, as with any other index, so
that all retrievers carry them as they carry vectors. Nothing is differentiable and no encoder runs: a fixed
retriever, whose scores are the logits of p(passage | question) (Lewis et al. 2020, section 4.5).

Words are runs of two or more letters or digits, in lower case and without accents; 33 English ones that mean little
("the", "of", "is") are left out. Chinese, Japanese, Thai, Lao, Khmer and Burmese, which are written without blanks,
are cut into pairs of neighboring letters. The index is that of the package bm25s, Lucene's formula. Beside its three
arrays lie words.arrow, all words in their order, in which a word's place is its number, and index.json, which says what
it is of.
"""

import bisect
import fcntl
import itertools
import logging
import os
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import regex

from rag.errors import UserError, one_line, raise_problems
from rag.files import atomic_folder, load_json, not_following, save_json
from rag.index.arguments import index_effort
from rag.index.columns import REBUILD
from rag.index.index_files import DESCRIPTION_FILE
from rag.index.integrity import checksums_of, damaged, require_undamaged
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.passage_checks import open_passages, passage_problems
from rag.index.passage_rows import fingerprint_of
from rag.progress import progress

logger = logging.getLogger(__name__)

# The defaults of bm25s and, but for k1, of Lucene.
BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}
# The rule of `words_of`: an index that was built by another one is built again.
WORDS_ARE = "words, bigrams of letters without blanks"
# Accents, and the points of Hebrew and Arabic vowels; in India's scripts vowel signs are part of a word.
ACCENTS = re.compile("[\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670]")
WORD = re.compile(r"\w[\w\u0900-\u0963\u0971-\u0df3]+")
WITHOUT_BLANKS = regex.compile(
    r"((?:[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\uff70\uff9e\uff9f]\p{M}*)+)"
)
WORDS_FILE = "words.arrow"
QUERY_SIZE = 128  # the one, and the words of a question of as many tokens as the scripts keep by default
MOST_WORDS = 2**24  # beyond, float32 does not tell neighbouring numbers apart
PASSAGES_AT_A_TIME = 1000


class Bm25Index(KnowledgeIndex):
    """A `KnowledgeIndex` that reads a question's words.

    Args:
        passages: dataset with the columns title and text.
        folder: what `build_bm25` wrote.
        origin: the flag that gave the passages, and its value, for the messages.
    """

    reads_text, reads_vectors, teaches = True, False, False
    opened_parts = KnowledgeIndex.opened_parts | {"bm25", "words"}

    def __init__(self, passages: datasets.Dataset, folder: Path, origin: str = "--passages_path"):
        self.folder = folder
        super().__init__(passages, QUERY_SIZE, vectors_from="index", origin=origin)

    def _open_parts(self, faiss_index=None) -> None:
        super()._open_parts(faiss_index)
        self.bm25: Any = None
        # A record batch of one column, mapped: every rank looks words up, also where it never searches.
        with self._told_if_damaged():
            self.words = pa.ipc.open_file(pa.memory_map(str(self.folder / WORDS_FILE))).get_batch(0).column(0)
            self.words.validate()

    def is_initialized(self) -> bool:
        return self.bm25 is not None

    def init_index(self, shard: int | None = None) -> None:
        """Map the arrays; a second call does nothing. There is one shard."""
        if not self.is_initialized():
            import bm25s

            with self._told_if_damaged():
                self.bm25 = bm25s.BM25.load(self.folder, mmap=True, load_vocab=False)

    @contextmanager
    def _told_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Arrow, numpy and JSON fail in ways of their own
            reason = one_line(error, 200)
            raise UserError(
                f"--index_path {self.folder} is damaged ({reason}); remove the folder, and it is built again"
            ) from error

    def encode_questions(self, questions: list[str]) -> np.ndarray:
        """Queries (B, QUERY_SIZE) float32: a one, then the numbers of those words that occur in passages, then -1."""
        queries = np.full((len(questions), QUERY_SIZE), -1, dtype=np.float32)
        queries[:, 0] = 1
        for query, question in zip(queries, questions, strict=True):
            numbers = [number for word in words_of(question) if (number := self._number_of(word)) is not None]
            numbers = numbers[: QUERY_SIZE - 1]
            query[1 : 1 + len(numbers)] = numbers
        return queries

    def _number_of(self, word: str) -> int | None:
        place = bisect.bisect_left(self.words, word, key=pa.StringScalar.as_py)
        return place if place < len(self.words) and self.words[place].as_py() == word else None

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """BM25 scores (B, n_docs) float32 and ids (B, n_docs) int64, best first, of equal ones the first row's.

        Passages that share no word with the question score 0. Where there are fewer than `n_docs`: id -1.
        """
        scores = np.full((len(queries), n_docs), np.finfo(np.float32).min, dtype=np.float32)
        ids = np.full((len(queries), n_docs), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            of_passages = self.scores(query)
            best = largest(of_passages, n_docs)
            ids[row, : len(best)], scores[row, : len(best)] = best, of_passages[best]
        return scores, ids

    def scores(self, query: np.ndarray) -> np.ndarray:
        """The BM25 score of each passage, (N,) float32, for a query (QUERY_SIZE,)."""
        return self.bm25.get_scores_from_ids(query[1:][query[1:] >= 0])

    def get_top_docs(self, question_hidden_states: np.ndarray, n_docs: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, n_docs) int64, best first, and (B, n_docs, QUERY_SIZE) float32, the score and zeros of each."""
        scores, ids = self.search(question_hidden_states, n_docs)
        vectors = np.zeros((*ids.shape, QUERY_SIZE), dtype=np.float32)
        vectors[:, :, 0] = np.where(ids >= 0, scores, 0)
        return ids, vectors

    def description(self) -> dict:
        return {"kind": "BM25", "passages": len(self), "words": len(self.words), **BM25_SETTINGS}


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places (at most `count`,) int64 of the largest of scores (N,), none of them negative; of equal ones the first."""
    count = min(count, len(scores))
    positive = np.flatnonzero(scores)
    if len(positive) < count:
        zeros = np.flatnonzero(scores[:count] == 0)[: count - len(positive)]
        return np.concatenate([positive[np.argsort(-scores[positive], kind="stable")], zeros])
    least = np.partition(scores[positive], -count)[-count]
    candidates = positive[scores[positive] >= least]
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


# --- Words ------------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text, as often as they occur; of scripts that are written without blanks, pairs of letters."""
    text = text.lower()
    if text.isascii():
        return _blank_separated(text)
    words: list[str] = []
    # In turn: what lies between the runs of such letters, and these.
    for place, piece in enumerate(WITHOUT_BLANKS.split(text)):
        if place % 2:
            letters = regex.findall(r"\X", unicodedata.normalize("NFKC", piece))  # with the marks above and below
            words += ["".join(pair) for pair in itertools.pairwise(letters)] if len(letters) > 1 else letters
        elif piece:
            words += _blank_separated(ACCENTS.sub("", unicodedata.normalize("NFD", piece)))
    return words


def _blank_separated(text: str) -> list[str]:
    return [word for word in WORD.findall(text) if word not in stop_words()]


@cache
def stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


# --- From a config to the index ---------------------------------------------------------------------------------------


def open_bm25(config) -> Bm25Index:
    """The index over `config.passages_path`, in `config.index_path` or else beside the passages; built if need be.

    Every process of a job may call this at once: one builds, the others wait.

    Raises:
        UserError: there are no passages, or the index's folder holds something else or cannot be written.
    """
    path = config.passages_path
    if path is None or not os.path.isdir(path):
        raise UserError(
            f"--passages_path {path} is not a folder of passages, which BM25 needs; build it with "
            "use_own_knowledge_dataset.py, or save a dataset of title and text by save_to_disk"
        )
    for name, value in index_effort(config).items():
        if value is not None:
            logger.warning(f"{name} {value} has no effect on BM25")
    require_undamaged(path)
    passages = open_passages(path)
    origin = f"--passages_path {path}"
    raise_problems(passage_problems(passages, ("title", "text"), origin))
    wanted = {"kind": "bm25", "fingerprint": fingerprint_of(passages), "passages": len(passages), **BM25_SETTINGS}
    wanted["words_are"] = WORDS_ARE
    folder = _folder(config)
    if not _is_ready(folder, wanted):
        try:
            with _one_at_a_time(folder):
                if not _holds(folder, wanted):  # another process may have built it meanwhile
                    build_bm25(passages, folder, wanted)
        except pa.ArrowException as error:
            raise UserError(f"{origin}: texts are damaged ({one_line(error, 100)}); {REBUILD}") from error
        except OSError as error:
            raise UserError(
                f"--index_path {folder} cannot be written ({error.strerror}: {error.filename}); give a folder for the "
                "BM25 index on a disk with room"
            ) from error
    for problem in damaged(folder, load_json(folder / DESCRIPTION_FILE).get("checksums", {})).values():
        raise UserError(f"--index_path {folder} is damaged: {problem}; remove the folder, and it is built again")
    return Bm25Index(passages, folder, origin)


def _folder(config) -> Path:
    passages = Path(config.passages_path)
    beside = passages.with_name(f"{passages.name}_bm25")
    if config.index_path is None or os.path.isfile(config.index_path):  # of a FAISS index, which a checkpoint remembers
        return beside
    return Path(config.index_path)


def _is_ready(folder: Path, wanted: dict) -> bool:
    """Whether the wanted index is there, seen from outside the lock: another process may just be putting it there."""
    try:
        description = load_json(folder / DESCRIPTION_FILE)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(description, dict) and wanted.items() <= description.items()


def _holds(folder: Path, wanted: dict) -> bool:
    """Whether a folder holds the wanted index; one of other passages or settings is to be replaced. Under the lock.

    Raises:
        UserError: it holds something else.
    """
    if not (folder / DESCRIPTION_FILE).is_file():
        if any(folder.iterdir()) if folder.is_dir() else os.path.lexists(folder):
            raise UserError(f"--index_path {folder} holds something else than a BM25 index; give another folder")
        return False
    try:
        description = load_json(folder / DESCRIPTION_FILE)
    except (ValueError, RecursionError) as error:
        description = error
    if not isinstance(description, dict):
        raise UserError(f"--index_path {folder}: its {DESCRIPTION_FILE} is damaged; remove the folder")
    if description.get("kind") != wanted["kind"]:
        raise UserError(f"--index_path {folder} holds an index of another kind; give another folder")
    return wanted.items() <= description.items()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w", opener=not_following) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, by a kill if need be
        yield


# --- Building ---------------------------------------------------------------------------------------------------------


def build_bm25(passages: datasets.Dataset, folder: Path, description: dict) -> None:
    """Write the index over title and text of the passages, whole or not at all.

    Raises:
        UserError: there is no word, or there are more different ones than a query can tell apart.
    """
    import bm25s

    words, numbers, lengths = _number_words(passages)
    if not 0 < len(words) <= MOST_WORDS:
        raise UserError(
            f"--passages_path: the passages have {len(words):,} different words, but BM25 can tell from 1 to "
            f"{MOST_WORDS:,} apart; take other passages"
        )
    bm25 = bm25s.BM25(**BM25_SETTINGS)
    bm25.scores = bm25.build_index_from_ids(range(len(words)), _Rows(numbers, lengths), show_progress=False)
    bm25.vocab_dict = {}  # ours is words.arrow, which need not be read into memory
    with atomic_folder(folder) as beside:
        bm25.save(beside, show_progress=False)
        column = pa.record_batch({"word": pa.array(words, pa.string())})
        with pa.OSFile(str(beside / WORDS_FILE), "wb") as file, pa.ipc.new_file(file, column.schema) as writer:
            writer.write_batch(column)
        facts = {
            "words": len(words),
            "versions": {"bm25s": version("bm25s")},
            "checksums": checksums_of(beside, [beside]),
        }
        save_json(description | facts, beside / DESCRIPTION_FILE)


def _number_words(passages: datasets.Dataset) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All words in their order, the place therein of each passage's words (int32), and how many each passage has.

    The second is one array for all passages: 4 bytes a word, where lists would take 8 and more.
    """
    number_of: dict[str, int] = defaultdict(lambda: len(number_of))
    numbers, lengths = array("i"), array("i")
    batches = passages.select_columns(["title", "text"]).with_format("arrow").iter(PASSAGES_AT_A_TIME)
    for batch in progress(batches, len(passages), "Indexing words", "passages", size=len):
        batch.validate(full=True)  # else a damaged place of a text would end the process
        for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True):
            word_numbers = [number_of[word] for word in words_of(f"{title or ''} {text}")]
            numbers.extend(word_numbers)
            lengths.append(len(word_numbers))
    words = sorted(number_of)
    place = np.empty(len(words), dtype=np.int32)
    place[[number_of[word] for word in words]] = np.arange(len(words), dtype=np.int32)
    return words, place[np.asarray(numbers)], np.asarray(lengths)


class _Rows:
    """The lists of numbers that bm25s reads, several times, each made as it is read."""

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray):
        self.numbers = numbers
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends.tolist():
            yield self.numbers[start:end].tolist()
            start = end
