"""The questions of an evaluation and, for each, what counts as right: answers or titles.

    data = read_data(args)
    data.questions, data.gold, data.answers

All problems of the files are reported at once, before a model is loaded.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import UserError, file_problems, raise_problems
from rag.evaluation.arguments import EvalArguments
from rag.evaluation.kilt import answers_of, is_kilt, pages_of, question_of, read_record
from rag.files import read_lines
from rag.metrics import compile_pattern
from rag.outputs import output_file_problems
from rag.questions.literals import CSV_FIELD, read_list, unquoted
from rag.questions.tables import json_of, path_problems

logger = logging.getLogger(__name__)

FILE_ENDS = ("", ".jsonl", ".settings.json", ".scores.json")  # of the files that belong to the predictions

HEADER = re.compile(r'"?questions?"?[\t,;]"?answers?"?\s*', re.IGNORECASE)
_LIST_FIELD = re.compile(r'[,;] ?(?="?(?:\[|\(|array\())')  # before a list in a table with commas or semicolons


@dataclass
class EvalData:
    """The questions and, for each, what counts as right."""

    questions: list[str]
    gold: list[list[str]]  # answers or patterns (e2e), titles (retrieval)
    answers: list[list[str]] | None = None  # retrieval: answers or patterns, for recall@k
    pages: list[list[list[str]]] | None = None  # of KILT's gold: the titles of each evidence set
    identity: dict[str, str] | None = None  # of --dataset_name: path and digest, as `file_identity` gives them


def read_data(args: EvalArguments) -> EvalData:
    """Questions and gold; one `UserError` for all the files that are missing or do not fit each other."""
    raise_problems(input_problems(args))
    assert args.evaluation_set is not None and args.gold_data_path is not None, "of parsed arguments"
    questions = _read_questions("--evaluation_set", args.evaluation_set)
    blank = [number for number, line in enumerate(questions, start=1) if not line.strip()]
    if blank or not questions:
        what = f"line {blank[0]} is blank" if blank else "there is none"
        raise UserError(f"--evaluation_set {args.evaluation_set}: {what}; a question a line is expected")
    if with_answers(questions):
        raise UserError(
            f"--evaluation_set {args.evaluation_set} has more than questions: answers, or records of them, which would "
            f"be asked, too; give a file of questions alone, and this one as {_gold_flag(args)}"
        )
    is_retrieval = args.eval_mode == "retrieval"
    mode = "titles" if is_retrieval else args.gold_data_mode
    pages = None
    if args.gold_data_mode == "kilt" or (mode in ("qa", "titles") and _holds_kilt(args.gold_data_path)):
        pages = _read_pages("--gold_data_path", args.gold_data_path, questions)
    if is_retrieval and pages is not None:
        gold = titles_in(pages)
    else:
        gold = read_gold("--gold_data_path", args.gold_data_path, questions, mode)
    data = EvalData(questions, gold, pages=pages)
    if args.answers_path is not None:
        mode = "regex" if args.gold_data_mode == "regex" else "qa"
        data.answers = read_gold("--answers_path", args.answers_path, questions, mode)
    return data


def _gold_flag(args: EvalArguments) -> str:
    return "--gold_data_path" if args.eval_mode == "e2e" else "--answers_path"


def checkpoint_folders(path: str) -> list[Path]:
    """The folders `checkpoint*` in Hugging Face format, checkpoint2 before checkpoint10."""
    folders = [folder for folder in Path(path).glob("checkpoint*") if (folder / "config.json").is_file()]
    return sorted(folders, key=lambda folder: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", folder.name)])


def own_predictions_path(path: str, folder: Path) -> str:
    """--eval_all_checkpoints: where the predictions of a checkpoint's folder go."""
    return str(Path(path).with_name(f"{Path(path).stem}.{folder.name}{Path(path).suffix}"))


def titles_in(pages: list[list[list[str]]]) -> list[list[str]]:
    """The titles of all evidence sets of each question, each once."""
    return [list(dict.fromkeys(title for own in sets for title in own)) for sets in pages]


def input_problems(args: EvalArguments) -> list[str]:
    """Files that are missing, and outputs that cannot be written or are files that are read."""
    remedies = {
        "evaluation_set": "give a file of questions, one a line",
        "gold_data_path": "give the file of right answers or titles",
        "answers_path": "give a file `question TAB ['answer', ...]`",
        "dataset_name": "",
    }
    inputs = {name: remedy for name, remedy in remedies.items() if getattr(args, name) is not None}
    problems = []
    for name, remedy in inputs.items():
        problems += file_problems(f"--{name}", getattr(args, name), remedy) if remedy else path_problems(args)
    folders = checkpoint_folders(args.model_name_or_path) if args.eval_all_checkpoints else []
    if args.eval_all_checkpoints and not folders:
        problems.append(
            f"--model_name_or_path {args.model_name_or_path} holds no folder checkpoint* with a config.json; "
            "give the --output_dir of finetune_rag.py, or leave --eval_all_checkpoints out"
        )
    if output_problems := output_file_problems("--predictions_path", args.predictions_path):
        return problems + output_problems
    outputs = [own_predictions_path(args.predictions_path, folder) for folder in folders] or [args.predictions_path]
    problems += _side_file_problems(outputs)
    written = {os.path.realpath(f"{path}{end}"): f"{path}{end}" for path in outputs for end in FILE_ENDS}
    for name in inputs:
        path = getattr(args, name)
        if Path(path).exists() and (file := written.get(os.path.realpath(path))):
            what = f"--predictions_path {args.predictions_path}"
            what += " is" if file == args.predictions_path else f": {file}, beside it, is"
            problems.append(f"{what} --{name}, which would be overwritten; name another file")
    return problems


def _side_file_problems(outputs: list[str]) -> list[str]:
    """Why one of the files of these predictions cannot be written, as a list of none or one line."""
    longest = f".settings.json.{os.getpid()}.tmp"  # of the names that `rag.files.atomic_write` gives
    for path in outputs:
        names = [f"{path}{end}" for end in FILE_ENDS] + [str(Path(path).with_name(f".{Path(path).name}{longest}"))]
        for name in names:
            if problems := output_file_problems("--predictions_path", name):
                return problems
    return []


def _read_questions(flag: str, path: str) -> list[str]:
    """The lines of a file; of a .jsonl file of records as NQ-open and KILT have them, their questions alone."""
    lines = read_flag_lines(flag, path)
    if path.endswith(".jsonl") and lines and isinstance(json_of(lines[0]), dict):
        return _each(flag, path, lines, _question_of_json)
    return lines


def _read_pages(flag: str, path: str, questions: list[str]) -> list[list[list[str]]]:
    """The evidence sets of a gold file of KILT's."""
    lines = read_flag_lines(flag, path)
    _require_as_many(flag, path, lines, questions)

    def pages(line: str) -> list[list[str]]:
        return [list(map(strip_title, own)) for own in pages_of(read_record(line))]

    return _each(flag, path, lines, pages)


def _require_as_many(flag: str, path: str, lines: list[str], questions: list[str]) -> None:
    if len(lines) != len(questions):
        raise UserError(
            f"{flag} {path} has {len(lines)} lines, but the number of questions is {len(questions)}; "
            f"line n of one belongs to line n of the other{_header_hint(lines)}"
        )


def read_gold(flag: str, path: str, questions: list[str], mode: str) -> list[list[str]]:
    lines = gold_lines(flag, path, mode)
    _require_as_many(flag, path, lines, questions)
    gold = parse_lines(flag, path, lines, mode)
    if mode in WITH_QUESTIONS:
        _warn_of_other_questions(flag, path, [split_qa_line(line)[0] for line in lines], questions)
    return gold


# --- The lines of a gold file -----------------------------------------------------------------------------------------


def gold_lines(flag: str, path: str, mode: str) -> list[str]:
    """The lines of a gold file; those of a .jsonl file, also of KILT's, as `question TAB ["answer", ...]`.

    Args:
        mode: of `PARSE_LINE`.
    """
    lines = read_flag_lines(flag, path)
    is_json = mode == "kilt" or str(path).endswith(".jsonl")
    if mode not in WITH_QUESTIONS:
        # Read as titles, or as one answer, such lines would score 0 without an error.
        if is_json or sum(map(_is_qa_line, lines)) > len(lines) / 2:
            what = (
                "--eval_mode retrieval reads titles; give answers as --answers_path"
                if mode == "titles"
                else "--gold_data_mode ans reads an answer a line; give --gold_data_mode qa"
            )
            raise UserError(f"{flag} {path} has questions with their answers, but {what}")
        return lines
    return _each(flag, path, lines, _qa_line_of_json) if is_json else _joined_fields(flag, path, lines)


def read_flag_lines(flag: str, path: str) -> list[str]:
    """As `rag.files.read_lines`; its error names the flag."""
    try:
        return read_lines(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


def parse_lines(flag: str, path: str, lines: list[str], mode: str) -> list[list[str]]:
    """What counts as right on each line, or a `UserError` that names the first faulty one."""
    return _each(flag, path, lines, PARSE_LINE[mode])


def _each(flag: str, path: str, lines: list[str], parse: Callable[[str], Any]) -> list:
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(parse(line))
        except ValueError as error:
            hint = _header_hint(lines) if number == 1 else ""
            raise UserError(f"{flag} {path}, line {number}: {error}{hint}") from error
    return results


def _qa_line_of_json(line: str) -> str:
    """`{"question": ..., "answer": [...]}`, as NQ-open has it, with `answers`, or KILT's, as a line with a tab."""
    record = json_of(line)
    if is_kilt(record):
        record = read_record(line)
        record = {"question": question_of(record), "answers": answers_of(record)}
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        record = {}
    answers = record.get("answers", record.get("answer"))
    if answers is None:
        raise ValueError(f'`{{"question": "...", "answer": ["...", ...]}}` is expected, not {line[:80]!r}')
    question = " ".join(record["question"].split())
    return f"{question}\t{json.dumps([answers] if isinstance(answers, str) else answers)}"


def _question_of_json(line: str) -> str:
    record = json_of(line)
    question = record.get("input" if is_kilt(record) else "question") if isinstance(record, dict) else None
    if not isinstance(question, str):
        raise ValueError(f"a record with a `question`, or KILT's `input`, is expected, not {line[:80]!r}")
    return " ".join(question.split())


def _holds_kilt(path: str) -> bool:
    if not path.endswith(".jsonl"):
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return is_kilt(json_of(file.readline()))


def _joined_fields(flag: str, path: str, lines: list[str]) -> list[str]:
    """The lines of a qa file, those of a quoted list of answers in one: NumPy breaks its lists at 75 characters."""
    joined: list[list[str]] = []
    is_open = False
    for line in lines:
        if is_open:
            joined[-1].append(line)
            is_open = line.count('"') % 2 == 0
        else:
            joined.append([line])
            answers = split_qa_line(line)[1]
            is_open = answers.startswith(('"[', '"(', '"array(')) and answers.count('"') % 2 == 1
    if is_open:
        raise UserError(f"{flag} {path}, line {len(joined)}: a quote before its answers is not closed")
    return ["\n".join(parts) for parts in joined]


def split_qa_line(line: str) -> tuple[str, str]:
    """The question and its answers as they are written, a csv writer's quotes and all; no answers without a tab."""
    quoted = CSV_FIELD.match(line)  # a tab may be in it
    if quoted and line[quoted.end() : quoted.end() + 1] == "\t":
        return quoted[0], line[quoted.end() + 1 :].strip()
    question, _, answers = line.partition("\t")
    return question, answers.strip()


def parse_qa_line(line: str) -> list[str]:
    """`question TAB ['answer', ...]`: the answers, a list as Python, JSON or NumPy print it, quoted or not.

    Blank answers are left out.
    """
    _, text = split_qa_line(line)
    try:
        answers = read_list(unquoted(text))
    except ValueError as error:
        hint = "" if "\t" in line else "; for an answer a line give --gold_data_mode ans"
        raise ValueError(f"`question TAB ['answer', ...]` is expected, not {_start_of(line)}{hint}") from error
    answers = [answer for answer in answers if answer.strip()]
    if not answers:
        raise ValueError(f"no answer that is not blank in {_start_of(line)}")
    return answers


def _start_of(line: str) -> str:
    return repr(line if len(line) <= 80 else f"{line[:80]}...")


def parse_pattern_line(line: str) -> list[str]:
    """`question TAB ['pattern', ...]`: regular expressions, each of which is right."""
    patterns = parse_qa_line(line)
    for pattern in patterns:
        compile_pattern(pattern)
    return patterns


def parse_ans_line(line: str) -> list[str]:
    """One answer."""
    if not line.strip():
        raise ValueError("blank, but an answer is expected")
    return [line]


def parse_titles_line(line: str) -> list[str]:
    """Tab-separated titles."""
    titles = [title for title in map(strip_title, line.split("\t")) if title]
    if not titles:
        raise ValueError("blank, but tab-separated titles are expected")
    return titles


def _is_qa_line(line: str) -> bool:
    try:
        return "\t" in line and bool(parse_qa_line(line))
    except ValueError:
        return False


def with_answers(lines: list[str]) -> bool:
    """Whether a file of questions is none: most of its lines hold answers, too, or it is a table or JSON.

    A question may have a tab or a comma in it: what follows has to be a list of texts.
    """
    if lines and HEADER.fullmatch(lines[0]):
        return True
    if "".join(lines[:2]).lstrip("[ \t").startswith("{"):
        whole = json_of("\n".join(lines))
        if isinstance(whole, dict) or (isinstance(whole, list) and any(isinstance(one, dict) for one in whole)):
            return True
    return sum(map(_has_answers, lines)) > len(lines) / 2


def _has_answers(line: str) -> bool:
    if line.startswith("{"):
        return isinstance(json_of(line), dict)
    if "\t" not in line and (gap := _LIST_FIELD.search(line)):
        line = f"{line[: gap.start()]}\t{line[gap.end() :]}"
    return _is_qa_line(line)


def strip_title(title: str) -> str:
    """A title without the blanks and quotes around it; wiki_dpr has quotes."""
    return title.strip().removeprefix('"').removesuffix('"').strip()


# By --gold_data_mode, and of retrieval.
PARSE_LINE: dict[str, Callable[[str], list[str]]] = {
    "qa": parse_qa_line,
    "kilt": parse_qa_line,
    "regex": parse_pattern_line,
    "ans": parse_ans_line,
    "titles": parse_titles_line,
}
WITH_QUESTIONS = ("qa", "kilt", "regex")


def _header_hint(lines: list[str]) -> str:
    """Of a table's first line, which pandas writes unless it is told not to."""
    if lines and HEADER.fullmatch(lines[0]):
        return f"; its first line, {lines[0]!r}, is a header: take it out"
    return ""


def _warn_of_other_questions(flag: str, path: str, file_questions: list[str], questions: list[str]) -> None:
    """A file that is a line off scores 0 without an error."""
    pairs = zip(file_questions, questions, strict=True)
    other = [
        n for n, (theirs, ours) in enumerate(pairs) if ours.split() not in (theirs.split(), unquoted(theirs).split())
    ]
    if other:
        logger.warning(
            f"{flag} {path}: {len(other)} of {len(questions)} questions are not those of --evaluation_set; the first, "
            f"on line {other[0] + 1}: {file_questions[other[0]]!r} against {questions[other[0]]!r}"
        )
