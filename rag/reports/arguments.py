"""The flags of `report_rag.py`, and what is wrong with the paths that they name."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.errors import file_problems
from rag.evaluation.gold import FILE_ENDS
from rag.outputs import output_file_problems

METRICS_FILE, LOG_FILE, SETTINGS_FILE = RUN_FILES = ("metrics.json", "training_log.jsonl", "hparams.json")


@dataclass
class ReportArguments:
    """What the page is made of, and where it goes."""

    output_path: str = flag("report.html", "HTML file to write; it opens without a network.")
    run_dir: str | None = flag(None, "The --output_dir of a training: its curves.")
    predictions_path: list[str] = flag(
        [],
        "One or more --predictions_path of eval_rag.py; what stands beside each (.jsonl, .scores.json) is read, too.",
    )
    gold_data_path: str | None = flag(
        None, "File of the right answers or titles, a line a question; left out, no question is judged."
    )
    gold_data_mode: Literal["qa", "ans", "regex", "titles"] = flag(
        "qa",
        "qa, ans, regex: as of eval_rag.py; titles: the right passages' titles, tab-separated (--eval_mode retrieval).",
    )


def parse_args(argv: list[str] | None = None, description: str | None = None) -> ReportArguments:
    return parse_into(ReportArguments, description=description, argv=argv)


def path_problems(args: ReportArguments) -> list[str]:
    """The paths that are missing or cannot be used."""
    problems = []
    if args.run_dir is None and not args.predictions_path:
        problems.append("--run_dir and --predictions_path are missing; give one of them, or both")
    problems += _run_problems(args.run_dir)
    for path in args.predictions_path:
        problems += file_problems("--predictions_path", path, "give a --predictions_path of eval_rag.py")
    if len({os.path.realpath(path) for path in args.predictions_path}) < len(args.predictions_path):
        problems.append(f"--predictions_path {' '.join(args.predictions_path)} names one file twice; give each once")
    if args.gold_data_path is not None:
        problems += file_problems("--gold_data_path", args.gold_data_path, "give the file of right answers or titles")
        if not args.predictions_path:
            problems.append("--gold_data_path judges predictions; give --predictions_path, too")
    return problems + _output_problems(args)


def _run_problems(run_dir: str | None) -> list[str]:
    if run_dir is None or (run_dir.strip() and Path(run_dir).is_dir()):
        return []
    what = "is a file, not a folder" if Path(run_dir).is_file() else "is no folder"
    what = what if run_dir.strip() and os.path.exists(run_dir) else "does not exist"
    return [
        f"--run_dir {run_dir if run_dir.strip() else repr(run_dir)} {what}; give the --output_dir of finetune_rag.py"
    ]


def _output_problems(args: ReportArguments) -> list[str]:
    if problems := output_file_problems("--output_path", args.output_path):
        return problems
    read = [f"{path}{end}" for path in args.predictions_path for end in FILE_ENDS]
    read += [args.gold_data_path] if args.gold_data_path is not None else []
    read += [str(Path(args.run_dir, name)) for name in RUN_FILES] if args.run_dir is not None else []
    same = [path for path in read if os.path.realpath(path) == os.path.realpath(args.output_path)]
    return [f"--output_path {args.output_path} is {same[0]}, which is read; name another file"] if same else []
