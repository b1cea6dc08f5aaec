"""The curves of a training, as its folder has them.

    run = read_run("output/run")
    run.charts["loss"]["val_avg_loss"]         # [(step, value), ...]

training_log.jsonl has a row every few steps. Where it is missing the rows of metrics.json, one a validation, do.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag.errors import UserError
from rag.files import read_state
from rag.reports.arguments import LOG_FILE, METRICS_FILE, SETTINGS_FILE
from rag.reports.reading import is_number
from rag.training.run_folder import SPLITS, read_metrics

MOST_POINTS = 400  # of a curve; of more neighbors are averaged
# A chart's title, and what belongs into it: names, or beginnings of names that end with a star.
CHARTS = {
    "Loss": ("loss", "val_avg_loss"),
    "Answers of the validation": ("val_em", "val_avg_em", "val_f1", "val_avg_f1"),
    "Learning rates": ("lr*",),
    "Gradient norms": ("grad_norm*",),
    "Tokens a second": ("tokens_per_second",),
    "Distinct passages, share": ("distinct_docs", "val_distinct_docs"),
    "Entropy of p(z|x), nats": ("doc_entropy", "val_doc_entropy", "teacher_entropy"),
    "Contexts cut, share": ("cut_contexts",),
}
SAME = {"val_avg_em": "val_em", "val_avg_f1": "val_f1"}  # one thing under two names
SHOWN_SETTINGS = ("model_name_or_path", "model_type", "n_docs", "index_name", "train_batch_size", "max_steps", "seed",
                  "gradient_accumulation_steps", "learning_rate", "num_train_epochs", "lora_r")  # fmt: skip

Curve = list[tuple[float, float]]


@dataclass
class TrainingRun:
    path: str
    charts: dict[str, dict[str, Curve]]  # by title and name
    missing: list[str]  # titles of charts that nothing was written for
    last: dict[str, dict[str, float]]  # the last row of "val" and of "test"
    settings: dict[str, Any]


def read_run(path: str) -> TrainingRun:
    """Raises `UserError` where the folder holds no run, or a damaged one."""
    folder = Path(path)
    if not any((folder / name).is_file() for name in (METRICS_FILE, LOG_FILE)):
        raise UserError(
            f"--run_dir {path} has neither {METRICS_FILE} nor {LOG_FILE}; give the --output_dir of a training that has "
            "been validated"
        )
    try:
        metrics = read_metrics(folder / METRICS_FILE)
        has_settings = (folder / SETTINGS_FILE).is_file()
        settings = read_state(folder / SETTINGS_FILE, "restore or remove it") if has_settings else {}
        rows = read_log(folder / LOG_FILE)
    except UserError as error:
        raise UserError(f"--run_dir: {error}") from error
    curves = curves_of(rows or [row for split in SPLITS[:2] for row in metrics[split]])
    charts = {title: found for title, names in CHARTS.items() if (found := _those_of(curves, names))}
    last = {split: metrics[split][-1] for split in SPLITS[1:] if metrics[split]}
    last = {split: _numbers_of(row) for split, row in last.items()}
    return TrainingRun(path, charts, [title for title in CHARTS if title not in charts], last, _flat(settings))


def _numbers_of(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if is_number(value) and SAME.get(name) not in row}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of training_log.jsonl; of a run that is under way, or was killed, the last may be half a row."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not is_number(row.get("step")):
            raise UserError(f"{path}, line {number} is damaged; restore or remove it, to go with {METRICS_FILE}")
        rows.append(row)
    return rows


def curves_of(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """Of every number that is logged, the steps and its values; what is not finite leaves a gap."""
    curves: dict[str, Curve] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        for name, value in row.items():
            if name not in ("step", "epoch", "step_count") and is_number(value):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: thinned(curve) for name, curve in curves.items()}


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points, each the mean of neighbors."""
    if len(curve) <= MOST_POINTS:
        return curve
    return [tuple(part.mean(0).tolist()) for part in np.array_split(np.array(curve, float), MOST_POINTS)]


def _those_of(curves: dict[str, Curve], names: tuple[str, ...]) -> dict[str, Curve]:
    found = {}
    for name, curve in curves.items():
        fits = any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in names)
        if fits and SAME.get(name) not in curves:
            found[name] = curve
    return found


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings worth a line, out of the groups of hparams.json."""
    groups = [group for group in settings.values() if isinstance(group, dict)]
    flat = {
        name: value for group in [settings, *groups] for name, value in group.items() if not isinstance(value, dict)
    }
    return {name: flat[name] for name in SHOWN_SETTINGS if flat.get(name) is not None}
