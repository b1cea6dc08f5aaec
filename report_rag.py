"""Write a page of a training and its evaluations: one HTML file, to look at and to share, that opens without a network.

    python report_rag.py --output_path output/report.html --run_dir output/quickstart/finetuned \\
        --predictions_path output/quickstart/before/answers.txt output/quickstart/after/answers.txt \\
        --gold_data_path test_data/test.qa

--run_dir: curves of loss, EM, learning rates, gradient norms and speed. --predictions_path, of one or several runs of
eval_rag.py: scores with 95% intervals, run against run, retrieval against answers, calibration, kinds of questions,
the best and the worst with their passages, and all questions to search. What the files do not hold is left out, and
the page says so. No model is loaded.

Gold files are those of eval_rag.py, line n for question n: `qa`: `question TAB ['answer', 'another']`; `ans`: the
answer; `regex`: as qa, with regular expressions; `titles`: the titles of the right passages, tab-separated.
"""

from typing import NoReturn

from rag.command_line.script import run_script
from rag.errors import raise_problems
from rag.files import atomic_write, shown
from rag.outputs import writing
from rag.reports.arguments import ReportArguments, path_problems
from rag.reports.arguments import parse_args as parse_report_args


def parse_args(argv: list[str] | None = None) -> ReportArguments:
    return parse_report_args(argv, description=__doc__)


def main(args: ReportArguments) -> str:
    """Write the page, whole or not at all; return its path."""
    raise_problems(path_problems(args))
    from rag.reports.figures import load_matplotlib
    from rag.reports.page import render
    from rag.reports.reading import read_evaluations, read_gold
    from rag.reports.training_run import read_run

    run = read_run(args.run_dir) if args.run_dir is not None else None
    gold = read_gold(args.gold_data_path, args.gold_data_mode) if args.gold_data_path is not None else None
    evaluations = read_evaluations(args.predictions_path, gold)
    load_matplotlib()
    page = render(run, evaluations, gold).encode(errors="replace")  # halves of surrogate pairs become question marks
    with writing("--output_path", args.output_path), atomic_write(args.output_path, "wb", follow=True) as file:
        file.write(page)
    print(f"{shown(args.output_path)}: {len(page):,} bytes; open it in a browser")
    return args.output_path


def cli() -> NoReturn:
    """The command `rag-report`."""
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
