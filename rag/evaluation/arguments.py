"""The flags of `eval_rag.py`: what is measured, on which questions, with which passages.

    args = parse_args(["--model_name_or_path", "rag", "--evaluation_set", "test.source", "--gold_data_path", "test.qa"])
    data = read_data(args)
    data.questions, data.gold, data.answers

The flags are checked before anything heavy is imported; `gold.py` reads the files that they name.
"""

import logging
from dataclasses import dataclass, fields
from typing import Literal

from rag.command_line.flags import flag, required_flag, trust_flag
from rag.command_line.parser import parse_into
from rag.distributed.meeting import timeout_problems
from rag.errors import raise_problems
from rag.index.arguments import SearchArguments
from rag.questions.arguments import DatasetArguments
from rag.retrieval.arguments import RerankArguments

logger = logging.getLogger(__name__)

# Above this it is a slip of the keyboard, and would end for want of memory.
MOST, MOST_BEAMS = 1_000_000, 10_000


@dataclass(frozen=True)
class AnswerPlan:
    """How questions are read and answers are searched for."""

    prefix: str  # put before every question
    max_source_length: int  # question tokens kept
    n_docs: int  # passages a question
    num_beams: int
    decoding: str  # of RAG-Sequence: thorough or fast
    min_length: int  # tokens of an answer
    max_length: int


@dataclass(kw_only=True)
class AnswerArguments(SearchArguments, RerankArguments):
    """Which model answers, from which passages, and how its answers are searched for."""

    model_name_or_path: str = required_flag("Checkpoint to ask: a folder or a name on the hub.")
    n_docs: int = flag(5, "Passages a question.")
    max_source_length: int = flag(128, "Question tokens kept, as in finetune_rag.py.")
    prefix: str = flag("", "Put before every question, as --prefix of finetune_rag.py was.")
    num_beams: int = flag(4, "Beams of generation; 1 is greedy.")
    decoding: Literal["thorough", "fast"] = flag(
        "thorough", "rag_sequence: thorough scores every candidate under every passage, fast only where beams found it."
    )
    min_length: int = flag(1, "Fewest tokens of an answer.")
    max_length: int = flag(50, "Most tokens of an answer.")
    trust_remote_code: bool = trust_flag()
    precision: Literal["fp32", "bf16", "fp16", "auto"] = flag(
        "fp32",
        "Of weights and products. auto takes bf16 where the machine multiplies it fast (GPUs, CPUs with AMX or "
        "AVX512-BF16), else fp32.",
    )
    device: str | None = flag(None, "Where the model runs (cpu, cuda:1); left out, the GPU if there is one.")

    @property
    def answer_plan(self) -> AnswerPlan:
        names = [field.name for field in fields(AnswerPlan)]
        return AnswerPlan(**{name: getattr(self, name) for name in names})

    @property
    def gives_answers(self) -> bool:
        """Whether the generator runs."""
        return True

    @property
    def passages_per_question(self) -> int:
        """Passages to retrieve."""
        return self.n_docs

    def answer_problems(self) -> list[str]:
        """What is out of range."""
        problems = [
            line for name in ("n_docs", "max_source_length", "max_length") for line in self.count_problems(name)
        ]
        problems += self.count_problems("num_beams", MOST_BEAMS) + self.search_problems()
        problems += self.rerank_problems(self.passages_per_question)
        if self.max_length == 1:
            problems.append("--max_length 1 must be 2 or more: the token that generation begins with counts")
        if self.min_length < 0:
            problems.append(f"--min_length {self.min_length} must be 0 or more")
        if self.min_length > self.max_length:
            problems.append(f"--min_length {self.min_length} is more than --max_length {self.max_length}; lower it")
        return problems

    def count_problems(self, name: str, most: int = MOST) -> list[str]:
        """The problem with a flag that counts something, if any."""
        value = getattr(self, name)
        if value < 1:
            return [f"--{name} {value} must be 1 or more"]
        return [f"--{name} {value} is too much; give {most:,} or fewer"] if value > most else []


@dataclass(kw_only=True)
class EvalArguments(AnswerArguments, DatasetArguments):
    """What is measured, on which questions, with which passages."""

    evaluation_set: str | None = flag(
        None,
        "File of questions, one a line; of a .jsonl file of NQ-open's or KILT's records the questions are taken; or "
        "give --dataset_name.",
    )
    gold_data_path: str | None = flag(
        None, "File of the right answers or titles, a line a question; or give --dataset_name."
    )
    dataset_split: str | None = flag(
        None, "Split of --dataset_name; left out, its test, or the validation where there is none."
    )
    model_type: Literal["rag_sequence", "rag_token", "fid", "bart", "t5", "causal", "auto"] | None = flag(
        None, "Left out, it is read from the checkpoint; bart, t5 and causal (a language model) answer closed-book."
    )
    eval_mode: Literal["e2e", "retrieval"] = flag(
        "e2e", "e2e measures answers (EM, F1), retrieval passages (precision@k, MRR)."
    )
    gold_data_mode: Literal["qa", "ans", "regex", "kilt"] = flag(
        "qa",
        "qa is `question TAB ['answer', ...]`, ans is one answer a line, regex is qa with regular expressions "
        "(CuratedTrec), kilt is KILT's JSON lines, which qa knows, too, in a file named .jsonl; of retrieval the "
        "--answers_path, qa or regex.",
    )
    answers_path: str | None = flag(
        None, "retrieval: file of answers (qa or regex), for recall@k: is an answer in one of k passages?"
    )
    predictions_path: str = flag(
        "predictions.txt",
        "File of predictions: written, continued (in the precision that it was begun in) or scored again.",
    )
    recalculate: bool = flag(False, "Overwrite the predictions that are there.")
    eval_all_checkpoints: bool = flag(
        False, "Measure every folder checkpoint* in --model_name_or_path, and print a table."
    )
    n_docs: int = flag(5, "Passages a question; retrieval takes a larger --k in its place.")
    k: list[int] = flag([1], "retrieval: one or more k, scored from one predictions file.")
    eval_batch_size: int = flag(8, "Questions at a time.")
    contains: bool = flag(
        False, "e2e: also score how many answers contain a right one, word for word, whatever else they say."
    )
    print_predictions: bool = flag(False, "Print each question and its answer.")
    print_docs: bool = flag(False, "Print titles and scores of each question's passages.")
    rank_timeout: float = flag(
        600.0,
        "torchrun: seconds that process 0 waits for the slowest one's batch; a stopped or killed one of this machine "
        "is told within half a minute.",
    )

    @property
    def gives_answers(self) -> bool:
        return self.eval_mode == "e2e"

    @property
    def passages_per_question(self) -> int:
        return self.n_docs if self.gives_answers else max(self.n_docs, *self.k)


def parse_args(argv: list[str] | None = None, description: str | None = None) -> EvalArguments:
    """Read the command line; raises one `UserError` for all settings that are out of range."""
    args = parse_into(EvalArguments, description=description, argv=argv)
    raise_problems(_range_problems(args))
    return args


def _range_problems(args: EvalArguments) -> list[str]:
    problems = args.answer_problems() + args.count_problems("eval_batch_size") + timeout_problems(args.rank_timeout)
    if min(args.k, default=0) < 1 or max(args.k) > MOST:
        ks = " ".join(map(str, args.k))
        problems.append(f"--k {ks}: give one or more numbers, each 1 or more, and {MOST:,} or fewer")
    if args.eval_mode == "retrieval" and args.model_type in ("bart", "t5", "causal", "auto"):
        problems.append(f"--model_type {args.model_type} retrieves nothing; measure it with --eval_mode e2e")
    if args.eval_mode == "e2e" and args.answers_path is not None:
        problems.append(f"--answers_path {args.answers_path} is for --eval_mode retrieval; leave it out")
    if args.eval_mode == "retrieval" and args.contains:
        problems.append("--contains is for answers, --eval_mode e2e; leave it out, or give --answers_path for recall@k")
    has_answers = args.answers_path is not None or args.dataset_name is not None
    if args.eval_mode == "retrieval" and not has_answers and args.gold_data_mode == "regex":
        problems.append("--gold_data_mode regex is for answers; with --eval_mode retrieval give --answers_path, too")
    return problems + _source_problems(args)


def _source_problems(args: EvalArguments) -> list[str]:
    """Questions and gold that come from nowhere, or from two places."""
    files = {"evaluation_set": "a file of questions", "gold_data_path": "the file of right answers or titles"}
    if args.dataset_name is None:
        missing = [f"--{name} is missing; give {what}" for name, what in files.items() if getattr(args, name) is None]
        return [f"{problem}, or --dataset_name" for problem in missing] + args.dataset_problems()
    if args.eval_mode == "retrieval":
        files["answers_path"] = files.pop("gold_data_path")
    problems = [
        f"--{name} {path} and --dataset_name {args.dataset_name} both say what is asked or right; leave one out"
        for name in files
        if (path := getattr(args, name)) is not None
    ]
    if args.gold_data_mode == "ans":
        problems.append("--gold_data_mode ans is for files of lines; leave it out with --dataset_name")
    return problems + args.dataset_problems()
