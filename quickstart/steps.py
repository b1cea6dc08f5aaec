"""The steps of a quickstart: scripts of the suite called with the command line that is printed, timed, and kept.

steps = Steps(folder / "steps.json")
with steps("Knowledge", folder / "knowledge" / "index.json"):
    knowledge = run("use_own_knowledge_dataset", csv_path="my.tsv", output_dir=folder / "knowledge")
steps.total_seconds, steps.peak_memory_mb
"""

import gc
import importlib
import json
import resource
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag.files import load_json, read_lines, save_json


def run(script: str, **flags: Any) -> Any:
    """Call a script's `main` in this process, with its command line printed; what `main` returned."""
    argv = as_words(flags)
    print(f"$ python {'-m ' + script if '.' in script else script + '.py'} {shlex.join(argv)}", flush=True)
    module = importlib.import_module(script)
    try:
        return module.main(module.parse_args(argv))
    finally:
        gc.collect()  # models and caches in circles would stay beside the next script's


def write_report(path: Path, run_dir: Path, answers: list[Path], gold: Path) -> None:
    """A page of the training, and of files of answers beside each other."""
    run("report_rag", output_path=path, run_dir=run_dir, predictions_path=answers, gold_data_path=gold)


def as_words(flags: dict[str, Any]) -> list[str]:
    """Flags as the words of a command line."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


class Steps:
    """The time of each step and the memory of all, kept in a file: a step that finds its work done keeps its time."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = {}
        self.earlier = load_json(path) if path.is_file() else {"seconds": {}, "peak_memory_mb": 0}

    @contextmanager
    def __call__(self, name: str, output: Path) -> Iterator[None]:
        """Time the step `name`, which is done when `output` exists."""
        was_done = output.exists() and name in self.earlier["seconds"]
        print(f"\n=== {name}{' (done in an earlier run)' if was_done else ''}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.earlier["seconds"][name] if was_done else time.perf_counter() - start
        save_json({"seconds": self.earlier["seconds"] | self.seconds, "peak_memory_mb": self.peak_memory_mb}, self.path)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_memory_mb(self) -> float:
        """The most memory this process and, beside it, its largest child held, of all runs."""
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes on Linux
        return max(self.earlier["peak_memory_mb"], sum(peaks) / unit)

    def print_table(self) -> None:
        print(f"\n{'':24}{'seconds':>10}")
        for name, seconds in (self.seconds | {"Total": self.total_seconds}).items():
            print(f"{name:24}{seconds:10.1f}")
        print(f"Peak memory {self.peak_memory_mb:,.0f} MB")


def print_answers(
    records_path: Path, right_answers: list[str], passages_path: str, heading: str, n: int = 5, width: int | None = None
) -> None:
    """The first `n` test questions with what was retrieved, in `width` characters of each passage, and answered."""
    from datasets import load_from_disk

    passages = load_from_disk(passages_path)
    records = [json.loads(line) for line in read_lines(records_path)[:n]]
    print(f"\n=== {len(records)} {heading}")
    for record, right in zip(records, right_answers, strict=False):
        print(f"\nQ: {record['question']}\nA: {record['answer']}   (right: {right})")
        for doc_id, title, score in zip(record["doc_ids"], record["titles"], record["scores"], strict=True):
            text = passages[doc_id]["text"]
            text = text if width is None else textwrap.shorten(text, width, placeholder=" ...")
            print(f"   {score:6.2f}  {title}: {text}")
