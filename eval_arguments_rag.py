"""The settings of `eval_rag.py`, and its question and gold files, checked before anything heavy is loaded.

args = parse_args(["--model_name_or_path", "rag", "--evaluation_set", "test.source", "--gold_data_path", "test.qa"])
data = read_data(args)
data.questions, data.gold, data.answers
"""

import ast
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cli_rag import UserError, check_device, check_file, parse_into, raise_problems
from utils_rag import read_lines

logger = logging.getLogger(__name__)

AT_LEAST_ONE = ("n_docs", "ef_search", "nprobe", "eval_batch_size", "max_source_length", "num_beams", "max_length")
# Which index is searched, and how.
SEARCH_FLAGS = ("ef_search", "nprobe", "doc_vectors", "index_device")
WIKI_FLAGS = ("dataset", "dataset_encoding", "use_dummy_dataset")
INDEX_FLAGS = ("index_name", "index_path", "passages_path", *SEARCH_FLAGS, *WIKI_FLAGS)


@dataclass
class EvalArguments:
    """What is measured, on which questions, with which passages."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint to measure: a folder or a name on the hub."})
    evaluation_set: str = field(metadata={"help": "File of questions, one a line."})
    gold_data_path: str = field(metadata={"help": "File of the right answers or titles, a line a question."})
    model_type: Literal["rag_sequence", "rag_token", "bart", "t5", "auto"] | None = field(
        default=None, metadata={"help": "Left out, it is read from the checkpoint; bart and t5 answer closed-book."}
    )
    eval_mode: Literal["e2e", "retrieval"] = field(
        default="e2e", metadata={"help": "e2e measures answers (EM, F1), retrieval passages (precision@k, MRR)."}
    )
    gold_data_mode: Literal["qa", "ans"] = field(
        default="qa", metadata={"help": "e2e: qa is `question TAB ['answer', ...]`, ans is one answer a line."}
    )
    answers_path: str | None = field(
        default=None,
        metadata={"help": "retrieval: file of answers (qa), for recall@k: is an answer in one of k passages?"},
    )
    predictions_path: str = field(
        default="predictions.txt", metadata={"help": "File of predictions: written, continued or scored again."}
    )
    recalculate: bool = field(default=False, metadata={"help": "Overwrite the predictions that are there."})
    eval_all_checkpoints: bool = field(
        default=False, metadata={"help": "Measure every folder checkpoint* in --model_name_or_path, and print a table."}
    )
    index_name: Literal["exact", "compressed", "legacy", "custom", "bm25"] | None = field(
        default=None,
        metadata={"help": "Kind of index; left out, the checkpoint's, or custom where --passages_path is given."},
    )
    index_path: str | None = field(
        default=None,
        metadata={"help": "FAISS file (custom) or folder (legacy; bm25, beside the passages if left out)."},
    )
    passages_path: str | None = field(
        default=None, metadata={"help": "Folder of passages that use_own_knowledge_dataset.py wrote (custom, bm25)."}
    )
    ef_search: int | None = field(
        default=None, metadata={"help": "Candidates an HNSW search keeps: more find more, slower; the index's own."}
    )
    nprobe: int | None = field(
        default=None, metadata={"help": "Lists an IVF search visits: more find more, slower; the index's own."}
    )
    index_device: str | None = field(
        default=None,
        metadata={"help": "cuda, cuda:1 or cpu: compare with all embeddings, held there; left out, FAISS searches."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "wiki_dpr (exact, compressed): its name on the hub or a folder of its layout."}
    )
    use_dummy_dataset: bool = field(
        default=False, metadata={"help": "Its first 10,000 passages only, also where the checkpoint has all."}
    )
    dataset_encoding: Literal["nq", "multiset"] | None = field(
        default=None, metadata={"help": "Its encoder pair; left out, that in the question encoder's name, else nq."}
    )
    doc_vectors: Literal["passages", "index"] | None = field(
        default=None,
        metadata={"help": "Whence the scores' vectors; left out, index for exact, passages for compressed."},
    )
    n_docs: int = field(default=5, metadata={"help": "e2e: passages a question, as in the public suite."})
    k: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "retrieval: one or more k; the largest is retrieved."}
    )
    eval_batch_size: int = field(default=8, metadata={"help": "Questions at a time."})
    max_source_length: int = field(default=128, metadata={"help": "Question tokens kept, as in finetune_rag.py."})
    prefix: str = field(default="", metadata={"help": "Put before every question, as --prefix of finetune_rag.py was."})
    num_beams: int = field(default=4, metadata={"help": "Beams of generation; 1 is greedy."})
    decoding: Literal["thorough", "fast"] = field(
        default="thorough",
        metadata={
            "help": "rag_sequence: thorough scores every candidate under every passage, fast only where beams found it."
        },
    )
    min_length: int = field(default=1, metadata={"help": "Fewest tokens of an answer."})
    max_length: int = field(default=50, metadata={"help": "Most tokens of an answer."})
    print_predictions: bool = field(default=False, metadata={"help": "Print each question and its answer."})
    print_docs: bool = field(default=False, metadata={"help": "Print titles and scores of each question's passages."})
    device: str | None = field(
        default=None, metadata={"help": "Where the model runs (cpu, cuda:1); left out, the GPU if there is one."}
    )


@dataclass
class EvalData:
    """The questions and, for each, what counts as right."""

    questions: list[str]
    gold: list[list[str]]  # answers (e2e) or titles (retrieval)
    answers: list[list[str]] | None = None  # retrieval: for recall@k


def parse_args(argv: list[str] | None = None, description: str | None = None) -> EvalArguments:
    """Read the command line; raises one `UserError` for all settings that are out of range."""
    args = parse_into(EvalArguments, description=description, argv=argv)
    raise_problems(_range_problems(args))
    return args


def _range_problems(args: EvalArguments) -> list[str]:
    problems = [
        f"--{name} {getattr(args, name)} must be 1 or more"
        for name in AT_LEAST_ONE
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    if min(args.k, default=0) < 1:
        problems.append(f"--k {' '.join(map(str, args.k))}: give one or more numbers, each 1 or more")
    problems += check_device("--index_device", args.index_device)
    if args.min_length > args.max_length:
        problems.append(f"--min_length {args.min_length} is more than --max_length {args.max_length}; lower it")
    if args.eval_mode == "retrieval" and args.model_type in ("bart", "t5", "auto"):
        problems.append(f"--model_type {args.model_type} retrieves nothing; measure it with --eval_mode e2e")
    if args.eval_mode == "e2e" and args.answers_path is not None:
        problems.append(f"--answers_path {args.answers_path} is for --eval_mode retrieval; leave it out")
    return problems


def checkpoint_folders(path: str) -> list[Path]:
    """The folders `checkpoint*` in Hugging Face format, checkpoint2 before checkpoint10."""
    folders = [folder for folder in Path(path).glob("checkpoint*") if (folder / "config.json").is_file()]
    return sorted(folders, key=lambda folder: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", folder.name)])


def read_data(args: EvalArguments) -> EvalData:
    """Questions and gold; one `UserError` for all the files that are missing or do not fit each other."""
    raise_problems(_file_problems(args))
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


def _file_problems(args: EvalArguments) -> list[str]:
    problems = check_file("--evaluation_set", args.evaluation_set, "give a file of questions, one a line")
    problems += check_file("--gold_data_path", args.gold_data_path, "give the file of right answers or titles")
    if args.answers_path is not None:
        problems += check_file("--answers_path", args.answers_path, "give a file `question TAB ['answer', ...]`")
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
    gold = []
    for number, line in enumerate(lines, start=1):
        try:
            gold.append(parse_line(line))
        except ValueError as error:
            raise UserError(f"{flag} {path}, line {number}: {error}") from error
    if parse_line is parse_qa_line:
        _warn_of_other_questions(flag, path, [line.partition("\t")[0] for line in lines], questions)
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


def _warn_of_other_questions(flag: str, path: str, asked: list[str], questions: list[str]) -> None:
    """A file that is a line off scores 0 without an error."""
    other = [n for n, (one, two) in enumerate(zip(asked, questions, strict=True)) if one.split() != two.split()]
    if other:
        logger.warning(
            f"{flag} {path}: {len(other)} of {len(questions)} questions are not those of --evaluation_set; the first, "
            f"on line {other[0] + 1}: {asked[other[0]]!r} against {questions[other[0]]!r}"
        )
