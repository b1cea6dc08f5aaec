"""Scores as eval_rag.py prints them: what made them in a line, a table, and where all settings are.

print_scores(scores, ranges, 250, made_with(settings, index), "predictions.txt.scores.json")
"""

from typing import Any

from rag.errors import COLUMNS, printable
from rag.evaluation.scores import label
from rag.files import shown


def print_scores(
    scores: dict[str, float], ranges: dict[str, tuple[float, float]], questions: int, made_with: str, path: str
) -> None:
    """Print scores in percent.

    Args:
        ranges: where each score lies in 95% of the resamples, by name.
        path: of the file that has scores and settings.
    """
    print(printable(made_with))
    heading = f"{questions:,} questions"
    width = max(map(len, [heading, *map(label, scores)])) + 1
    print(f"{heading:{width}}{'percent':>9}  [95% interval]")
    for name, score in scores.items():
        low, high = ranges[name]
        print(f"{label(name) + ':':{width}}{100 * score:9.2f}  [{100 * low:.1f}, {100 * high:.1f}]")
    print(printable(f"settings: {shown(path)}"))


def made_with(settings: dict[str, Any] | None, index: dict[str, Any]) -> str:
    """The settings that tell most of scores, on a line of `COLUMNS` characters: a longer path loses its beginning.

    Args:
        settings: `Predictions.identity`; None where they are unknown.
        index: `Predictions.index`.
    """
    if settings is None:
        return "made with unknown settings"
    effort = [f"{name} {index[name]}" for name in ("ef_search", "nprobe") if name in index]
    parts = [" ".join(["index", index["kind"].removeprefix("Index"), *effort])] if "kind" in index else []
    parts += [f"{name} {settings[name]}" for name in ("n_docs", "num_beams") if name in settings]
    parts += ["decoding fast"] if settings.get("decoding") == "fast" else []
    rest = ", ".join([f" ({settings['model_type']})", *parts, settings["precision"]])
    model, room = shown(settings["model_name_or_path"]["path"]), COLUMNS - len(rest)
    return (model if len(model) <= room else f"...{model[len(model) + 3 - room :]}") + rest


def print_checkpoints(scores: dict[str, dict[str, float]]) -> None:
    """A row a checkpoint, percent; "-" where a score has no meaning for one."""
    width = max(map(len, [*scores, "checkpoint"]))
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    columns = {name: max(14, len(label(name)) + 2) for name in names}
    print(f"{'checkpoint':{width}}" + "".join(f"{label(name):>{columns[name]}}" for name in names))
    for checkpoint, own in scores.items():
        cells = {name: f"{100 * own[name]:.2f}" if name in own else "-" for name in names}
        print(f"{checkpoint:{width}}" + "".join(f"{cell:>{columns[name]}}" for name, cell in cells.items()))
