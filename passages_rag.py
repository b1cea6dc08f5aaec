"""Documents from a tab-separated file, cut into passages of 100 words; read line by line, whatever its size.

    survey = survey_documents("my_knowledge_dataset.csv")      # problems, counts and digest, in one pass
    for title, text in read_passages("my_knowledge_dataset.csv"): ...

A line is `title TAB text`. Nothing is quoted or escaped: quotation marks, `NA` and `null` are what they are, and only
\\n, \\r\\n and \\r end a line. A first line that reads `title TAB text` is a header and skipped.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WORDS_PER_PASSAGE = 100
PROBLEMS_SHOWN = 10


@dataclass
class DocumentsSurvey:
    """What is in a file of documents.

    Attributes:
        problems: lines that name a fault each, ready for `raise_problems`.
        documents: lines with a document.
        passages: passages that they are cut into.
        digest: of all that is read from the file.
    """

    problems: list[str] = field(default_factory=list)
    documents: int = 0
    passages: int = 0
    digest: str = ""


def survey_documents(path: str | os.PathLike) -> DocumentsSurvey:
    """Read all of a file once and tell what is in it, the faults of at most ten lines among it."""
    survey = DocumentsSurvey()
    digest = hashlib.blake2b(digest_size=16)
    faults = 0
    for number, line in _lines(path):
        _, tab, text = line.partition("\t")
        fault = _fault(line, tab, text)
        if fault is None:
            survey.documents += 1
            survey.passages += len(split_text(text))
            digest.update(f"{line}\n".encode())
            continue
        faults += 1
        if faults <= PROBLEMS_SHOWN:
            survey.problems.append(f"--csv_path {path} line {number}: {fault}")
    if faults > PROBLEMS_SHOWN:
        survey.problems.append(f"--csv_path {path}: {faults - PROBLEMS_SHOWN} more lines like these")
    if not faults and not survey.documents:
        survey.problems.append(f"--csv_path {path} holds no document; write a line `title TAB text` for each")
    survey.digest = digest.hexdigest()
    return survey


def read_passages(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Title and text of each passage, in the order of the file, which `survey_documents` found without fault."""
    for _, line in _lines(path):
        title, _, text = line.partition("\t")
        for passage in split_text(text):
            yield title, passage


def split_text(text: str, words: int = WORDS_PER_PASSAGE) -> list[str]:
    """A text in pieces of `words` words, the last one shorter; the white space within a piece stays as it is."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    pieces = [spans[i : i + words] for i in range(0, len(spans), words)]
    return [text[piece[0][0] : piece[-1][1]] for piece in pieces]


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Each line but a header, with its number from 1; bytes that are not UTF-8 become surrogates."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix("\n")
            if number == 1 and [cell.strip().lower() for cell in line.split("\t")] == ["title", "text"]:
                continue
            yield number, line


def _fault(line: str, tab: str, text: str) -> str | None:
    if not line.strip():
        return "is empty; remove it"
    if not tab:
        return "has no tab; write title, tab, text"
    if not text.strip():
        return "has no text behind the tab; write title, tab, text"
    try:
        line.encode()
    except UnicodeEncodeError:
        return "is not UTF-8; convert the file (iconv -t utf-8)"
    return None
