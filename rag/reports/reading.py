"""Evaluations and right answers, as their files have them; no file need hold more than an answer a line.

    gold = read_gold(args.gold_data_path, args.gold_data_mode)
    evaluations = read_evaluations(args.predictions_path, gold)

What is damaged or does not fit is one `UserError`, with the line.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag.errors import UserError, one_line, raise_problems
from rag.evaluation.gold import WITH_QUESTIONS, gold_lines, parse_lines, read_flag_lines, split_qa_line
from rag.files import read_state
from rag.questions.literals import unquoted

LISTS = {"titles": str, "texts": str, "scores": float, "posteriors": float}  # of a record, an entry a passage
REMEDY = "run eval_rag.py again with --recalculate, or remove the file to go without what it holds"


@dataclass
class Gold:
    """What counts as right."""

    path: str
    mode: str  # qa, ans, regex or titles
    right: list[list[str]]  # answers, patterns or titles by question
    questions: list[str] | None  # where the file has them


@dataclass
class Evaluation:
    """One --predictions_path and what stands beside it."""

    name: str  # short, and no other's
    path: str
    lines: list[str]  # an answer a line, or tab-separated titles
    records: list[dict[str, Any]]  # as many, or none
    scores: dict[str, float] = field(default_factory=dict)  # fractions, as eval_rag.py wrote them
    settings: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def is_retrieval(self) -> bool:
        """Whether the lines are titles."""
        if "eval_mode" in self.settings:
            return self.settings["eval_mode"] == "retrieval"
        return self.column("answer_rank") is not None or any("\t" in line for line in self.lines)

    def column(self, name: str) -> list[Any] | None:
        """What every record has under a name; None where one lacks it."""
        if not self.records or not all(name in record for record in self.records):
            return None
        return [record[name] for record in self.records]


def read_gold(path: str, mode: str) -> Gold:
    lines = gold_lines("--gold_data_path", path, mode)
    right = parse_lines("--gold_data_path", path, lines, mode)
    questions = [unquoted(split_qa_line(line)[0]) for line in lines] if mode in WITH_QUESTIONS else None
    return Gold(path, mode, right, questions)


def read_evaluations(paths: list[str], gold: Gold | None) -> list[Evaluation]:
    """The evaluations in their order; all problems are told at once."""
    if not paths:
        return []
    evaluations: list[Evaluation] = []
    problems: list[str] = []
    for name, path in zip(short_names(paths), paths, strict=True):
        try:
            evaluations.append(read_evaluation(name, path, gold))
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems)
    return evaluations


def short_names(paths: list[str]) -> list[str]:
    """Each path's last parts without its ending: as few as tell all of them apart."""
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):  # answers.txt and answers.tsv
        parts = [Path(path).absolute().parts for path in paths]
    shortest = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-shortest:]) for part in parts]


def read_evaluation(name: str, path: str, gold: Gold | None) -> Evaluation:
    lines = read_flag_lines("--predictions_path", path)
    if not lines:
        raise UserError(f"--predictions_path {path} is empty; run eval_rag.py first")
    if gold is not None and len(lines) != len(gold.right):
        raise UserError(
            f"--predictions_path {path} has {len(lines):,} lines, but --gold_data_path {gold.path} has "
            f"{len(gold.right):,}; finish the evaluation, or give the gold file of the same questions"
        )
    evaluation = Evaluation(name, path, lines, _read_records(path, len(lines)))
    try:
        for end in ("settings", "scores"):
            if Path(f"{path}.{end}.json").is_file():
                _take(evaluation, read_state(f"{path}.{end}.json", REMEDY))
    except UserError as error:
        raise UserError(f"--predictions_path {path}: {error}") from error
    return evaluation


def _take(evaluation: Evaluation, content: dict[str, Any]) -> None:
    for name in ("settings", "index", "scores"):
        if isinstance(found := content.get(name), dict):
            setattr(evaluation, name, found)
    evaluation.scores = {name: value for name, value in evaluation.scores.items() if is_number(value)}


def _read_records(path: str, questions: int) -> list[dict[str, Any]]:
    beside = f"{path}.jsonl"
    if not Path(beside).is_file():
        return []
    lines = read_flag_lines("--predictions_path", beside)
    if len(lines) != questions:
        raise UserError(
            f"--predictions_path {path} has {questions:,} lines, but {beside} has {len(lines):,}; finish the "
            "evaluation, or remove the latter to go without passages"
        )
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if problem := record_problem(record):
                raise ValueError(problem)
        except (ValueError, RecursionError) as error:
            where = f"--predictions_path {path}: {beside}, line {number} is damaged"
            raise UserError(f"{where} ({one_line(error, 100)}); {REMEDY}") from error
        records.append(record)
    return records


def record_problem(record: Any) -> str | None:
    """What is wrong with a line of PREDICTIONS.jsonl; a record may lack anything."""
    if not isinstance(record, dict):
        return "no JSON object"
    if not isinstance(record.get("question", ""), str):
        return "its question is no text"
    rank = record.get("answer_rank")
    if rank is not None and not (isinstance(rank, int) and rank > 0):
        return "its answer_rank is no rank"
    lengths = set()
    for name, kind in LISTS.items():
        if name not in record:
            continue
        values = record[name]
        fits = is_number if kind is float else lambda value: isinstance(value, str)
        if not isinstance(values, list) or not all(map(fits, values)):
            return f"its {name} are no list of {'numbers' if kind is float else 'texts'}"
        lengths.add(len(values))
    ids = record.get("doc_ids", [])
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        return "its doc_ids are no list of numbers"
    if not is_number(record.get("answer_log_prob", 0.0)):
        return "its answer_log_prob is no number"
    return "its lists differ in length" if len(lengths) > 1 else None


def is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def questions_of(evaluation: Evaluation, gold: Gold | None) -> list[str] | None:
    """The questions, by the records or the gold file; None where neither has them."""
    return evaluation.column("question") or (gold.questions if gold is not None else None)
