"""Documents cut into passages of 100 words, one after the other, whatever the size of their source.

    survey = survey_documents("my_documents.jsonl.zst")      # problems, counts and digest, in one pass
    for title, text in read_passages("my_documents.jsonl.zst"): ...

`documents` says which files and folders are read.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from rag.errors import UserError, raise_problems
from rag.files import new_digest, shown
from rag.knowledge.documents import read_documents
from rag.knowledge.duplicates import first_of_equals
from rag.knowledge.records import Document, Notice, Problem, ReadingOptions

WORDS_PER_PASSAGE = 100
PROBLEMS_SHOWN = 10  # and as many notices
MOST_PROBLEMS = 1000  # then it is no file of documents
# Scripts without blanks between words: Chinese and Japanese, Thai, Lao, Tibetan, Myanmar and Khmer. Two characters
# count as a word, so that a passage of 200 is about as many tokens as one of 100 English words.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0f40-\u0fbc\u1000-\u109f\u1780-\u17d3"
    "\u2e80-\u2fdf\u3001-\u3003\u3005-\u3011\u3021-\u3029\u3031-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\uff66-\uff9f\U00020000-\U0003ffff"
)
# Signs that stay with the character before them: vowels and tones, marks of length, and closing punctuation.
ATTACHED = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u0f71-\u0f84\u102b-\u103e\u17b6-\u17d3"
    "\u3001-\u3003\u3005\u3009\u300b\u300d\u300f\u3011\u3099\u309a\u30fc\uff01\uff09\uff0c\uff1a\uff1b\uff1f"
)
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
# A few of such characters between blanks are a word as any other: a name in a text of another script.
UNSPACED_WORD = (
    rf"(?:(?<!\S)[^\s{UNSPACED}]*+(?:[{UNSPACED}][^\s{UNSPACED}]*+){{1,6}}(?!\S)"
    rf"|(?:[{UNSPACED}][{ATTACHED}]*){{1,2}}|[^\s{UNSPACED}]+)"
)


@dataclass
class DocumentsSurvey:
    """What is in a file or folder of documents.

    Attributes:
        problems: lines that name a problem each, ready for `raise_problems`.
        notices: lines that say how a file was understood.
        skipped: rows without text that were passed over.
        documents: how many there are.
        passages: pieces that they are cut into.
        text_bytes: of the passages and their titles, in UTF-8.
        digest: of the passages in their order: the same ones from another kind of file have the same digest.
    """

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    skipped: int = 0
    documents: int = 0
    passages: int = 0
    text_bytes: int = 0
    digest: str = ""


def survey_documents(path: str | os.PathLike, options: ReadingOptions | None = None) -> DocumentsSurvey:
    """Read all documents once and say what is in them, with the first ten problems."""
    options = options or ReadingOptions()
    survey = DocumentsSurvey()
    digest = new_digest()
    problems = 0
    for item in read_documents(path, options):
        if isinstance(item, Notice):
            survey.notices.append(f"{item.place}: {item.says}")
            continue
        if isinstance(item, Problem):
            if item.is_empty and options.skip_empty:
                survey.skipped += 1
                continue
            problems += 1
            if problems <= PROBLEMS_SHOWN:
                survey.problems.append(_message(item))
            if problems == MOST_PROBLEMS:
                break
            continue
        survey.documents += 1
        title = item.title.encode()
        for passage in cut(item):
            text = passage.encode()
            digest.update(b"%d %d " % (len(title), len(text)) + title + text)
            survey.passages += 1
            survey.text_bytes += len(title) + len(text)
    if problems > PROBLEMS_SHOWN:
        end = "; nothing behind them was read" if problems == MOST_PROBLEMS else ""
        survey.problems.append(f"--csv_path {path}: {problems - PROBLEMS_SHOWN} more lines like these{end}")
    if not problems and not survey.documents:
        survey.problems.append(f"--csv_path {path} holds no document; write a line `title TAB text` for each")
    survey.digest = digest.hexdigest()
    return survey


def read_passages(path: str | os.PathLike, options: ReadingOptions | None = None) -> Iterator[tuple[str, str]]:
    """Title and text of each passage, in the order of the documents, in which `survey_documents` saw no problem."""
    options = options or ReadingOptions()
    for item in read_documents(path, options):
        if isinstance(item, Problem) and not (item.is_empty and options.skip_empty):
            raise UserError(f"{_message(item)} (it has changed since it was looked at)")
        if isinstance(item, Document):
            for passage in cut(item):
                yield item.title, passage


@dataclass
class PassageSource:
    """The passages of --csv_path, without duplicates where none are wanted.

    Attributes:
        path: of the documents.
        survey: what is in them.
        options: how they are read.
        keep: (N,) bool, the passages that are taken; None for all.
    """

    path: str
    survey: DocumentsSurvey
    options: ReadingOptions = field(default_factory=ReadingOptions)
    keep: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.survey.passages if self.keep is None else int(self.keep.sum())

    def passages(self) -> Iterator[tuple[str, str]]:
        """Title and text of each passage that is taken."""
        passages = read_passages(self.path, self.options)
        return passages if self.keep is None else itertools.compress(passages, self.keep)


def open_source(
    path: str, known: Iterable[tuple[str, str]] | None = None, options: ReadingOptions | None = None
) -> PassageSource:
    """Survey documents and print what is in them.

    Args:
        known: leave out passages that equal one of these, or an earlier one of the documents; None takes all.

    Raises:
        UserError: something is wrong with the documents.
    """
    options = options or ReadingOptions()
    survey = survey_documents(path, options)
    for notice in survey.notices[:PROBLEMS_SHOWN]:
        print(notice)
    if len(survey.notices) > PROBLEMS_SHOWN:
        print(f"{path}: {len(survey.notices) - PROBLEMS_SHOWN} more files like these")
    raise_problems(survey.problems)
    print(f"{shown(path)}: {survey.documents:,} documents, {survey.passages:,} passages")
    if survey.skipped:
        print(f"{survey.skipped:,} rows without text are passed over")
    source = PassageSource(path, survey, options)
    if known is not None:
        source.keep = first_of_equals(read_passages(path, options), known)
        print(f"{survey.passages - source.count:,} exact duplicates among them are left out")
    return source


def cut(document: Document) -> list[str]:
    """The passages of a document; DPR's are passages already."""
    return [document.text.strip()] if document.is_passage else split_text(document.text)


def split_text(text: str, n: int = WORDS_PER_PASSAGE, character: str = " ") -> list[str]:
    """A text in pieces of `n` words, the last one shorter; the white space within a piece stays as it is.

    Args:
        character: what lies between words; " " is any white space, however much of it, and nothing where a script
            has none.
    """
    return [match[0].strip() for match in _words(text, n, character)]


def words_from(text: str, start: int, count: int) -> str:
    """`count` words of a text from the one of this number on, with what lies between them."""
    words = list(_words(text, 1))[start : start + count]
    return text[words[0].start() : words[-1].end()] if words else ""


def count_words(text: str) -> int:
    return sum(1 for _ in _words(text, 1))


def _words(text: str, n: int, character: str = " ") -> Iterator[re.Match]:
    """Pieces of `n` words each; without a list of all words, of which a document can hold millions."""
    if character != " ":
        blank = re.escape(character)
        word, between = rf"(?:(?!{blank}).)+", rf"(?:{blank})+"
    elif not text.isascii() and IS_UNSPACED.search(text):
        word, between = UNSPACED_WORD, r"\s*"
    else:
        word, between = r"\S+", r"\s+"
    return re.finditer(f"{word}(?:{between}{word}){{0,{n - 1}}}", text, re.DOTALL)


def split_documents(documents: dict[str, list[str | None]]) -> dict[str, list[str]]:
    """The passages of documents, {"title": [...], "text": [...]}, in the same form; a text that is None has none."""
    rows = [
        (title or "", passage)
        for title, text in zip(documents["title"], documents["text"], strict=True)
        for passage in split_text(text or "")
    ]
    return {"title": [title for title, _ in rows], "text": [passage for _, passage in rows]}


def _message(problem: Problem) -> str:
    return f"--csv_path {problem.place}: {problem.reason}"
