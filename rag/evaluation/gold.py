"""The questions of an evaluation and, for each, what counts as right: answers or titles.

    data = read_data(args)
    data.questions, data.gold, data.answers

All problems of the files are reported at once, before a model is loaded.
"""

import ast
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rag.errors import UserError, file_problems, raise_problems
from rag.evaluation.arguments import EvalArguments
from rag.files import read_lines

logger = logging.getLogger(__name__)


@dataclass
class EvalData:
    """The questions and, for each, what counts as right."""

    questions: list[str]
    gold: list[list[str]]  # answers (e2e) or titles (retrieval)
    answers: list[list[str]] | None = None  # retrieval: for recall@k


def read_data(args: EvalArguments) -> EvalData:
    """Questions and gold; one `UserError` for all the files that are missing or do not fit each other."""
    raise_problems(_input_problems(args))
    questions = read_lines(args.evaluation_set)
    blank = [number for number, line in enumerate(questions, start=1) if not line.strip()]
    if blank or not questions:
        what = f"line {blank[0]} is blank" if blank else "there is none"
        raise UserError(f"--evaluation_set {args.evaluation_set}: {what}; a question a line is expected")
    if args.eval_mode == "e2e":
        parse_line = {"qa": parse_qa_line, "ans": parse_ans_line}[args.gold_data_mode]
        return EvalData(questions, _read_gold("--gold_data_path", args.gold_data_path, questions, parse_line))
    data = EvalData(questions, _read_gold("--gold_data_path", args.gold_data_path, questions, parse_titles_line))
    if args.answers_path is not None:
        data.answers = _read_gold("--answers_path", args.answers_path, questions, parse_qa_line)
    return data


def checkpoint_folders(path: str) -> list[Path]:
    """The folders `checkpoint*` in Hugging Face format, checkpoint2 before checkpoint10."""
    folders = [folder for folder in Path(path).glob("checkpoint*") if (folder / "config.json").is_file()]
    return sorted(folders, key=lambda folder: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", folder.name)])


def _input_problems(args: EvalArguments) -> list[str]:
    problems = file_problems("--evaluation_set", args.evaluation_set, "give a file of questions, one a line")
    problems += file_problems("--gold_data_path", args.gold_data_path, "give the file of right answers or titles")
    if args.answers_path is not None:
        problems += file_problems("--answers_path", args.answers_path, "give a file `question TAB ['answer', ...]`")
    if Path(args.predictions_path).is_dir():
        problems.append(f"--predictions_path {args.predictions_path} is a folder; name a file in it")
    for name in ("evaluation_set", "gold_data_path", "answers_path"):
        path = getattr(args, name)
        if path is not None and Path(path).exists() and Path(path).resolve() == Path(args.predictions_path).resolve():
            problems.append(
                f"--predictions_path {args.predictions_path} is --{name}, which would be overwritten; name another file"
            )
    if args.eval_all_checkpoints and not checkpoint_folders(args.model_name_or_path):
        problems.append(
            f"--model_name_or_path {args.model_name_or_path} holds no folder checkpoint* with a config.json; "
            "give the --output_dir of finetune_rag.py, or leave --eval_all_checkpoints out"
        )
    return problems


def _read_gold(flag: str, path: str, questions: list[str], parse_line: Callable[[str], list[str]]) -> list[list[str]]:
    lines = read_lines(path)
    if len(lines) != len(questions):
        raise UserError(
            f"{flag} {path} has {len(lines)} lines, but --evaluation_set has {len(questions)}; "
            "line n of one belongs to line n of the other"
        )
    gold = parse_lines(flag, path, lines, parse_line)
    if parse_line is parse_qa_line:
        _warn_of_other_questions(flag, path, [line.partition("\t")[0] for line in lines], questions)
    return gold


def parse_lines(flag: str, path: str, lines: list[str], parse_line: Callable[[str], list[str]]) -> list[list[str]]:
    """What counts as right on each line, or a `UserError` that names the first faulty one."""
    gold = []
    for number, line in enumerate(lines, start=1):
        try:
            gold.append(parse_line(line))
        except ValueError as error:
            raise UserError(f"{flag} {path}, line {number}: {error}") from error
    return gold


def parse_ans_line(line: str) -> list[str]:
    """One answer."""
    if not line.strip():
        raise ValueError("blank, but an answer is expected")
    return [line]


def parse_titles_line(line: str) -> list[str]:
    """Tab-separated titles."""
    titles = [strip_title(title) for title in line.split("\t") if title.strip()]
    if not titles:
        raise ValueError("blank, but tab-separated titles are expected")
    return titles


def strip_title(title: str) -> str:
    """A title without the blanks and quotes around it; wiki_dpr has quotes."""
    return title.strip().removeprefix('"').removesuffix('"').strip()


def parse_qa_line(line: str) -> list[str]:
    """`question TAB ['answer', ...]`: the answers, a Python list of strings."""
    _, tab, text = line.partition("\t")
    try:
        answers = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        answers = None
    if not answers or not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        hint = "" if tab else "; for an answer a line give --gold_data_mode ans"
        raise ValueError(f"`question TAB ['answer', ...]` is expected, not {line[:80]!r}{hint}")
    return answers


def _warn_of_other_questions(flag: str, path: str, file_questions: list[str], questions: list[str]) -> None:
    """A file that is a line off scores 0 without an error."""
    pairs = zip(file_questions, questions, strict=True)
    other = [n for n, (theirs, ours) in enumerate(pairs) if theirs.split() != ours.split()]
    if other:
        logger.warning(
            f"{flag} {path}: {len(other)} of {len(questions)} questions are not those of --evaluation_set; the first, "
            f"on line {other[0] + 1}: {file_questions[other[0]]!r} against {questions[other[0]]!r}"
        )
