"""From the columns of a table to questions and their right answers.

    examples = read_examples(args, tables)
    examples.questions, examples.answers

A cell of answers may hold a text, a list, or what the hub's data sets have: SQuAD's `{"text": [...], ...}`, TriviaQA's
`{"value": ..., "aliases": [...]}`, KILT's `[{"answer": ..., "provenance": ...}, ...]`. Questions and answers are one
line each, as they are in files of lines: whitespace in them is one blank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rag.errors import UserError
from rag.questions.arguments import ANSWERS_COLUMNS, QUESTION_COLUMNS, DatasetArguments
from rag.questions.literals import read_list
from rag.questions.tables import Table

# The keys of a record of answers, by the first of them, which says what it is.
ANSWER_KEYS = {"text": ("text",), "value": ("value", "aliases"), "answer": ("answer",)}
UNKNOWN = "<unk>"  # what TriviaQA's test set has in the place of its answers


@dataclass
class Examples:
    """The rows of a split.

    Attributes:
        questions: a line each.
        answers: every right one once; none where the row has none.
        cells: the answers as the data set has them.
        places: what a message calls each row.
    """

    questions: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    cells: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @property
    def unanswered(self) -> list[int]:
        """The numbers, from 0, of the rows without an answer."""
        return [number for number, answers in enumerate(self.answers) if not answers]


def read_examples(
    args: DatasetArguments, tables: Iterable[Table], as_they_are: bool = False, may_lack_answers: bool = False
) -> Examples:
    """All rows of some tables.

    Args:
        as_they_are: leave the whitespace in answers, which are patterns.
        may_lack_answers: a table without a column of answers has none.

    Raises:
        UserError: a column is missing, a question is blank or no text, or answers are none of the kinds above.
    """
    examples = Examples()
    for table in tables:
        what = f"--dataset_name {args.dataset_name}: {table.place}"
        question = _column("question_column", args.question_column, QUESTION_COLUMNS, table, what)
        if may_lack_answers and args.answers_column is None and not set(ANSWERS_COLUMNS) & set(table.names):
            cells: list[Any] = [[] for _ in table.cells(question)]
        else:
            cells = table.cells(_column("answers_column", args.answers_column, ANSWERS_COLUMNS, table, what))

        def answers(cell: Any, table: Table = table) -> list[str]:
            texts = answers_in(listed(cell) if table.is_text else cell)
            texts = [text.strip() if as_they_are else one_line_text(text) for text in texts]
            return list(dict.fromkeys(text for text in texts if text not in ("", UNKNOWN)))

        places = [f"{table.place}, {table.row} {number}" for number in range(1, len(cells) + 1)]
        examples.questions += _each(places, table.cells(question), question_in, args)
        examples.answers += _each(places, cells, answers, args)
        examples.cells += cells
        examples.places += places
    return examples


def _column(flag: str, given: str | None, candidates: tuple[str, ...], table: Table, what: str) -> str:
    wanted = candidates if given is None else (given,)
    if found := next((name for name in wanted if name in table.names), None):
        return found
    there = ", ".join(map(str, table.names[:20])) or "none"
    if given is not None:
        raise UserError(f"--{flag} {given}: {what} has no such column, but these: {there}; give one of them")
    raise UserError(f"{what} has no column {', '.join(wanted)}, but these: {there}; give --{flag}")


def _each(places: list[str], cells: list[Any], read: Callable[[Any], Any], args: DatasetArguments) -> list[Any]:
    results = []
    for place, cell in zip(places, cells, strict=True):
        try:
            results.append(read(cell))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--dataset_name {args.dataset_name}: {place}: {error}") from error
    return results


def one_line_text(text: str) -> str:
    return " ".join(text.split())


def question_in(cell: Any) -> str:
    """The question in a cell, in one line.

    Raises:
        ValueError: it is blank, or no text.
    """
    if not isinstance(cell, str):
        raise ValueError(f"its question, {_shown(cell)}, is no text")
    if not (question := one_line_text(cell)):
        raise ValueError("its question is blank")
    return _encodable(question)


def answers_in(cell: Any) -> list[str]:
    """Every text in a cell of answers, as it is written.

    Raises:
        ValueError: there is something else than texts, lists and records of answers.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        return [_encodable(cell)]
    if isinstance(cell, list):
        return [text for one in cell for text in answers_in(one)]
    if isinstance(cell, dict):
        keys = next((keys for first, keys in ANSWER_KEYS.items() if first in cell), None)
        if keys is None and "provenance" in cell:  # KILT's, of an output that is pages alone
            return []
        if keys is not None:
            return [text for key in keys for text in answers_in(cell.get(key))]
    raise ValueError(f"its answer, {_shown(cell)}, is no text and no list of texts")


def listed(cell: str) -> list[str] | str:
    """A text of a table as the list that is written in it, as pandas writes lists; or as it is."""
    if not cell.startswith(('["', "['", "[]", "array([")):
        return cell
    try:
        return read_list(cell)
    except ValueError as error:
        raise ValueError(f"its answers, {_shown(cell)}, are no whole list ({error})") from error


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_shown(text)} holds half of a surrogate pair, which is no text") from error
    return text


def _shown(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 80 else f"{text[:80]}..."
