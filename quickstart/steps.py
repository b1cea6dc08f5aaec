"""The steps of a quickstart: scripts of the suite called by the command line that is printed, timed, and kept.

steps = Steps(folder, {"Knowledge": Step("embeds the passages and builds their index", 40)}, origin="quickstart")
with steps("Knowledge", folder / "knowledge" / "index.json"):
    settings = folder / "settings" / "knowledge.json"
    knowledge = run("use_own_knowledge_dataset", settings, csv_path="my.tsv", output_dir=folder / "knowledge")
steps.total_seconds, steps.peak_memory_mb
"""

import gc
import importlib
import json
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rag.errors import COLUMNS, UserError, raise_problems
from rag.files import read_lines, read_state, save_json, shown
from rag.knowledge.printing import passage_line
from rag.locks import one_at_a_time
from rag.outputs import output_folder_problems, writing

OUTPUT_FLAG = "--output_dir"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let no other quickstart use the folder while the block runs; what cannot be written is told in a line.

    The libraries' own bars, one for each file they open, are switched off.

    Raises:
        UserError: it cannot be written, another quickstart uses it, or its disk fills up.
    """
    raise_problems(output_folder_problems(OUTPUT_FLAG, folder))
    with writing(OUTPUT_FLAG, folder), one_at_a_time(folder / ".lock", OUTPUT_FLAG, folder):
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        yield


def run(script: str, settings: Path, **flags: Any) -> Any:
    """Call a script's `main` in this process, with its flags in a file of settings; what `main` returned."""
    save_json({name: plain(value) for name, value in flags.items()}, settings)
    print(f"$ python {'-m ' + script if '.' in script else script + '.py'} --config_file {shown(settings)}", flush=True)
    module = importlib.import_module(script)
    try:
        return module.main(module.parse_args(["--config_file", str(settings)]))
    finally:
        gc.collect()  # models and caches in circles would stay beside the next script's


def plain(value: Any) -> Any:
    """A flag's value as JSON has it."""
    if isinstance(value, list):
        return list(map(plain, value))
    return str(value) if isinstance(value, Path) else value


def command(script: str, **flags: Any) -> str:
    """The command line of a script, in lines of `COLUMNS` characters where its words allow that."""
    words = ["  python", f"{script}.py"]
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words.append(" ".join([f"--{name}", *(shlex.quote(shown(str(one))) for one in values)]))
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > COLUMNS:
            lines[-1] += " \\"
            lines.append(f"      {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


@dataclass(frozen=True)
class Step:
    """What a step does, as its heading says it, and its seconds on two cores; None where that is not known."""

    does: str
    seconds: float | None = None


class Steps:
    """The time of each step and the memory of all, kept in a file: a step that finds its work done keeps its time.

    Args:
        plan: all steps, in their order.
        origin: what tells this quickstart's results from another's.
        smoke: of a small sample, whose steps take other times.

    Raises:
        UserError: `folder` holds the results of another quickstart.
    """

    def __init__(self, folder: Path, plan: dict[str, Step], origin: str, smoke: bool = False):
        if smoke:
            plan, origin = {name: replace(step, seconds=None) for name, step in plan.items()}, f"{origin} --smoke"
        self.path, self.plan, self.origin = folder / "steps.json", plan, origin
        self.seconds: dict[str, float] = {}
        self.earlier: dict[str, Any] = {"origin": origin, "seconds": {}, "peak_memory_mb": 0}
        if self.path.is_file():
            self.earlier |= read_state(self.path, "remove it: what is done is found again, its times are lost")
        if self.earlier["origin"] != origin:
            raise UserError(
                f"{OUTPUT_FLAG} {folder} holds what `{self.earlier['origin']}` has left, not `{origin}`; give another "
                "folder, or remove that one"
            )
        self._save()

    @contextmanager
    def __call__(self, name: str, output: Path) -> Iterator[None]:
        """Time the step `name`, which is done when `output` exists."""
        was_done = output.exists() and name in self.earlier["seconds"]
        step, number = self.plan[name], list(self.plan).index(name) + 1
        about = "" if step.seconds is None else f" (about {in_words(step.seconds)})"
        if was_done:
            about = f" (done in an earlier run, in {in_words(self.earlier['seconds'][name])})"
        print(f"\n=== {number}/{len(self.plan)} {name}: {step.does}{about}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.earlier["seconds"][name] if was_done else time.perf_counter() - start
        if not was_done:
            print(f"done in {in_words(self.seconds[name])}", flush=True)
        self._save()

    def _save(self) -> None:
        seconds = self.earlier["seconds"] | self.seconds
        save_json({"origin": self.origin, "seconds": seconds, "peak_memory_mb": self.peak_memory_mb}, self.path)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_memory_mb(self) -> float:
        """The most memory this process and, beside it, its largest child held, of all runs."""
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes on Linux
        return max(self.earlier["peak_memory_mb"], sum(peaks) / unit)

    def print_total(self) -> None:
        print(f"\n=== Done in {in_words(self.total_seconds)}, with {self.peak_memory_mb / 1000:.1f} GB of memory\n")


def in_words(seconds: float) -> str:
    """0.4 -> 0.4 s, 36.2 -> 36 s, 244 -> 4.1 min."""
    if seconds >= 100:
        return f"{seconds / 60:.2g} min"
    return f"{seconds:.1f} s" if seconds < 10 and seconds != int(seconds) else f"{seconds:.0f} s"


def write_report(folder: Path, answers: list[Path], gold: Path) -> None:
    """A page of the training, and of files of answers beside each other."""
    page = {"output_path": folder / "report.html", "run_dir": folder / "finetuned"}
    run("report_rag", folder / "settings" / "report.json", **page, predictions_path=answers, gold_data_path=gold)


# --- The end ----------------------------------------------------------------------------------------------------------


def print_answers(records_path: Path, right_answers: list[str], passages_path: str, heading: str, n: int = 3) -> None:
    """The first `n` test questions with what was retrieved and answered."""
    from datasets import load_from_disk

    passages = load_from_disk(passages_path)
    records = [json.loads(line) for line in read_lines(records_path)]
    print(f"\n=== {min(n, len(records))} of {len(records)} {heading}")
    for record, right in zip(records[:n], right_answers, strict=False):
        print(f"\nQ: {record['question']}\nA: {record['answer']}   (right: {right})")
        for doc_id, title, score in zip(record["doc_ids"], record["titles"], record["scores"], strict=True):
            print(passage_line(score, title, passages[doc_id]["text"], COLUMNS))


def print_scores(columns: dict[str, dict[str, float]], labels: dict[str, str], n_questions: int) -> None:
    """Scores in percent, a column each time that they were measured; "-" where there are none."""
    print(f"\n=== {n_questions} test questions, percent\n")
    print(f"{'':14}" + "".join(f"{heading:>14}" for heading in columns))
    for name, label in labels.items():
        cells = [f"{100 * scores[name]:.1f}" if name in scores else "-" for scores in columns.values()]
        print(f"{label:14}" + "".join(f"{cell:>14}" for cell in cells))


def print_summary(folder: Path, passages: int, before: float, after: float, found: float, questions: int) -> None:
    """What was built, how good it is, what to look at.

    Args:
        before, after: EM, a fraction; `found` is precision@1.
    """
    print(
        f"{shown(folder / 'finetuned' / 'checkpoint1')} is a RAG model over {passages:,} passages.\n"
        f"It answers {after:.1%} of {questions} test questions exactly, before training {before:.1%}; "
        f"the first passage is right for {found:.1%}.\n"
        f"Look at it question by question: open {shown(folder / 'report.html')} in a browser."
    )


def print_next_commands(folder: Path, encoder: str, index: dict[str, Any], training: dict[str, Any]) -> None:
    """Three commands to go on with.

    Args:
        encoder: the folder, in `models`, of the encoder of passages.
        index: the flags that open the index.
        training: flags of finetune_rag.py beside those of data and index.
    """
    checkpoint = folder / "finetuned" / "checkpoint1"
    own = {"csv_path": "my.tsv", "output_dir": folder / "my_knowledge"}
    own |= {"dpr_ctx_encoder_model_name": folder / "models" / encoder, "rag_model_name": checkpoint, "question": "..."}
    train = {"model_name_or_path": folder / "checkpoint", "data_dir": "my_questions"}
    train |= {"output_dir": folder / "my_finetuned", "freeze_question_encoder": True} | training
    opened = {name: index[name] for name in ("index_name", "passages_path", "index_path")}
    print(
        f"""
=== Next

Ask it in a browser:
{command("demo_rag", model_name_or_path=checkpoint, **opened)}
Ask it about documents of your own (a line `title TAB text` each):
{command("use_own_knowledge_dataset", **own)}
Finetune it on questions of your own (train|val .source and .target in a folder):
{command("finetune_rag", **train, **index)}"""
    )
