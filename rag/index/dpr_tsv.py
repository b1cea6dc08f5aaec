"""The rows of DPR's `psgs_w100.tsv`: id, text and title behind tabs, under a header; fields may be quoted.

    for line, passage_id, text, title in dpr_rows(file): ...

Both DPR's legacy index and the documents of a knowledge folder are read by it.
"""

import csv
from collections.abc import Iterable, Iterator

DPR_HEADER = ["id", "text", "title"]
NOT_A_DPR_ROW = "is not `number TAB text TAB title` ({}); quotes in a quoted field must be doubled"


class DprRowError(ValueError):
    """A row that is not DPR's."""

    def __init__(self, line: int, reason: str):
        super().__init__(f"line {line} {reason}")
        self.line = line
        self.reason = reason


def cells(line: str) -> list[str]:
    return [cell.strip().lower() for cell in line.split("\t")]


def dpr_rows(lines: Iterable[str]) -> Iterator[tuple[int, int, str, str]]:
    """Line number, id, text and title of each row of DPR's `psgs_w100.tsv`, its header left out.

    Raises:
        DprRowError: a row is not of this form.
    """
    rows = csv.reader(lines, delimiter="\t", strict=True)
    try:
        for row in rows:
            if rows.line_num == 1 and cells(row[0]) == DPR_HEADER[:1]:
                continue
            number, text, title = row
            yield rows.line_num, int(number), text, title
    except (csv.Error, ValueError, IndexError) as error:
        raise DprRowError(rows.line_num, NOT_A_DPR_ROW.format(error)) from error
