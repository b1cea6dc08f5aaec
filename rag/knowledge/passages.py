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
from rag.files import new_digest
from rag.knowledge.documents import Document, Problem, read_documents
from rag.knowledge.duplicates import first_of_equals

WORDS_PER_PASSAGE = 100
PROBLEMS_SHOWN = 10


@dataclass
class DocumentsSurvey:
    """What is in a file or folder of documents.

    Attributes:
        problems: lines that name a problem each, ready for `raise_problems`.
        documents: how many there are.
        passages: pieces that they are cut into.
        text_bytes: of the passages and their titles, in UTF-8.
        digest: of the passages in their order: the same ones from another kind of file have the same digest.
    """

    problems: list[str] = field(default_factory=list)
    documents: int = 0
    passages: int = 0
    text_bytes: int = 0
    digest: str = ""


def survey_documents(path: str | os.PathLike) -> DocumentsSurvey:
    """Read all documents once and say what is in them, with the first ten problems."""
    survey = DocumentsSurvey()
    digest = new_digest()
    problems = 0
    for item in read_documents(path):
        if isinstance(item, Problem):
            problems += 1
            if problems <= PROBLEMS_SHOWN:
                survey.problems.append(_message(item))
            continue
        survey.documents += 1
        title = item.title.encode()
        for passage in cut(item):
            text = passage.encode()
            digest.update(b"%d %d " % (len(title), len(text)) + title + text)
            survey.passages += 1
            survey.text_bytes += len(title) + len(text)
    if problems > PROBLEMS_SHOWN:
        survey.problems.append(f"--csv_path {path}: {problems - PROBLEMS_SHOWN} more lines like these")
    if not problems and not survey.documents:
        survey.problems.append(f"--csv_path {path} holds no document; write a line `title TAB text` for each")
    survey.digest = digest.hexdigest()
    return survey


def read_passages(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Title and text of each passage, in the order of the documents, in which `survey_documents` saw no problem."""
    for item in read_documents(path):
        if isinstance(item, Problem):
            raise UserError(f"{_message(item)} (it has changed since it was looked at)")
        for passage in cut(item):
            yield item.title, passage


@dataclass
class PassageSource:
    """The passages of --csv_path, without duplicates where none are wanted.

    Attributes:
        path: of the documents.
        survey: what is in them.
        keep: (N,) bool, the passages that are taken; None for all.
    """

    path: str
    survey: DocumentsSurvey
    keep: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.survey.passages if self.keep is None else int(self.keep.sum())

    def passages(self) -> Iterator[tuple[str, str]]:
        """Title and text of each passage that is taken."""
        passages = read_passages(self.path)
        return passages if self.keep is None else itertools.compress(passages, self.keep)


def open_source(path: str, known: Iterable[tuple[str, str]] | None = None) -> PassageSource:
    """Survey documents and print what is in them.

    Args:
        known: leave out passages that equal one of these, or an earlier one of the documents; None takes all.

    Raises:
        UserError: something is wrong with the documents.
    """
    survey = survey_documents(path)
    raise_problems(survey.problems)
    print(f"{path}: {survey.documents:,} documents, {survey.passages:,} passages")
    source = PassageSource(path, survey)
    if known is not None:
        source.keep = first_of_equals(read_passages(path), known)
        print(f"{survey.passages - source.count:,} exact duplicates among them are left out")
    return source


def cut(document: Document) -> list[str]:
    """The passages of a document; DPR's are passages already."""
    return [document.text.strip()] if document.is_passage else split_text(document.text)


def split_text(text: str, n: int = WORDS_PER_PASSAGE, character: str = " ") -> list[str]:
    """A text in pieces of `n` words, the last one shorter; the white space within a piece stays as it is.

    Args:
        character: what lies between words; " " is any white space, however much of it.
    """
    word = r"\S+" if character == " " else rf"(?:(?!{re.escape(character)}).)+"
    spans = [match.span() for match in re.finditer(word, text, re.DOTALL)]
    pieces = [spans[i : i + n] for i in range(0, len(spans), n)]
    return [text[piece[0][0] : piece[-1][1]].strip() for piece in pieces]


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
