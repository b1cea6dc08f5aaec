"""Rows of bad input, and how one is tried: a table is a list of these.

TABLE = Cases()
TABLE.refused("eval_rag.py", "no passages", {"--n_docs": 0}, "n_docs")

"refused" is a pattern that the error lines hold; "works" is status 0; "cleanly" is either.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.makers import Maker
from tests.faults.processes import left_behind, run, tree

EVAL, FINETUNE, KNOWLEDGE = "eval_rag.py", "finetune_rag.py", "use_own_knowledge_dataset.py"
CONSOLIDATE, PARSE, REPORT = "consolidate_rag_checkpoint.py", "parse_dpr_relevance_data.py", "report_rag.py"
MOST_LINES = 12  # a line for each thing that is wrong, ten at most and a word on the rest


@dataclass
class Case:
    name: str
    script: str
    changes: dict
    outcome: str  # "refused", "works" or "cleanly"
    says: str = ""
    short: bool = False  # part of `make test`

    @property
    def id(self) -> str:
        return f"{self.script}: {self.name}"


class Cases(list[Case]):
    """A table of cases."""

    def refused(self, script: str, name: str, changes: dict, says: str, short: bool = False) -> None:
        self.append(Case(name, script, changes, "refused", says, short))

    def works(self, script: str, name: str, changes: dict, says: str = "", short: bool = False) -> None:
        self.append(Case(name, script, changes, "works", says, short))

    def cleanly(self, script: str, name: str, changes: dict, says: str = "") -> None:
        self.append(Case(name, script, changes, "cleanly", says))

    def parameters(self) -> list:
        """For `pytest.mark.parametrize`: a short form of the table is part of `make test`."""
        return [pytest.param(case, id=case.id, marks=[] if case.short else [pytest.mark.faults]) for case in self]


def require_answered_well(case: Case, world, folder: Path) -> None:
    """Run the case's script in a new folder, and fail where it does not end as the case says."""
    folder.mkdir()
    made = {
        flag: value.make(world.folder, folder) if isinstance(value, Maker) else value
        for flag, value in case.changes.items()
    }
    before, world_before = tree(folder), tree(world.folder)
    seen = run(case.script, world.flags_of(case.script, folder, made), folder)
    assert seen.status is not None, "it does not end"
    assert not seen.has_traceback, seen.text[-2000:]
    assert tree(world.folder).items() >= world_before.items()
    if case.outcome == "works":
        assert seen.status == 0, seen.text[-1000:]
        assert re.search(case.says, seen.text)
    elif case.outcome == "refused" or seen.status != 0:
        assert seen.status == 2 and 1 <= len(seen.errors) <= MOST_LINES, (seen.status, seen.text[-1000:])
        assert re.search(case.says, "\n".join(seen.errors)), seen.errors
        assert not left_behind(before, tree(folder))
