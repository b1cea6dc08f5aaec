"""What a quickstart prints: its steps, their lines, and the commands that it proposes in the end."""

import importlib
import re
import shlex

from tests.conftest import ROOT

MOST_LINES, COLUMNS = 10, 120


def require_calm(printed: str, folder) -> list[str]:
    """Check that it is short, and free of noise; returns the headings of its steps."""
    printed = printed.replace(str(folder), "output/quickstart")
    assert "FLOPs" not in printed and "Warning" not in printed
    assert str(ROOT) not in printed
    assert [line for line in printed.splitlines() if len(line) > COLUMNS] == []
    headings = re.findall(r"^=== (\d+/\d+ .*)$", printed, flags=re.MULTILINE)
    steps = re.split(r"^=== .*$", printed, flags=re.MULTILINE)[1 : len(headings) + 1]
    lines = {heading: len(step.split("\n")) - 3 for heading, step in zip(headings, steps, strict=True)}
    assert {heading: count for heading, count in lines.items() if count > MOST_LINES} == {}
    return headings


def next_commands(printed: str) -> dict[str, list[str]]:
    """The words behind each script that is proposed, by the script's name."""
    proposed = printed.partition("=== Next\n")[2].replace("\\\n", " ")
    commands = [shlex.split(line) for line in proposed.splitlines() if line.startswith("  python ")]
    return {words[1].removesuffix(".py"): words[2:] for words in commands}


def parse_next_commands(printed: str) -> None:
    """Check that there are three commands, and that their flags exist."""
    commands = next_commands(printed)
    assert list(commands) == ["demo_rag", "use_own_knowledge_dataset", "finetune_rag"]
    for script, words in commands.items():
        importlib.import_module(script).parse_args(words)
