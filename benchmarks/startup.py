"""Seconds from the command to its answer: `--help` of every script, a mistyped flag, and files that do not exist.

    python benchmarks/startup.py --short
    python benchmarks/startup.py --rounds 15

Medians of new processes, after one that is not counted. What was imported is tested in tests/test_startup.py: none of
torch, transformers, datasets, faiss, Lightning and Ray, which all wait until the arguments are good.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import header
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

ROOT = Path(__file__).resolve().parent.parent
GONE = "no/such/path"
MISTAKES = {
    "finetune_rag": ["--model_name_or_path", GONE, "--data_dir", GONE, "--output_dir", GONE],
    "eval_rag": ["--model_name_or_path", GONE, "--evaluation_set", GONE, "--gold_data_path", GONE],
    "use_own_knowledge_dataset": ["--csv_path", GONE, "--output_dir", GONE],
    "consolidate_rag_checkpoint": ["--model_type", "rag_sequence", "--dest", GONE],
    "parse_dpr_relevance_data": ["--src_path", GONE, "--evaluation_set", GONE, "--gold_data_path", GONE],
    "report_rag": ["--run_dir", GONE, "--predictions_path", GONE, "--output_path", GONE],
    "demo_rag": ["--model_name_or_path", GONE, "--passages_path", GONE, "--index_path", GONE],
    "quickstart": ["--config_file", GONE],
}
WAYS = {"--help": 0, "--hlep": 2, "missing files": 2}  # and the status of each


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Three rounds.")
    rounds: int = flag(9, "Processes of each command.")

    def __post_init__(self):
        if self.short:
            self.rounds = 3


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def seconds(script: str, way: str) -> float:
    words = MISTAKES[script] if way == "missing files" else [way]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", script, *words], cwd=ROOT, capture_output=True)
    elapsed = time.perf_counter() - start
    assert done.returncode == WAYS[way], done.stderr.decode()
    return elapsed


def main(args: BenchmarkArguments) -> dict[str, dict[str, float]]:
    print(f"{header()}\nmedians of {args.rounds}\n\n| script | {', s | '.join(WAYS)}, s |\n|{'---|' * (len(WAYS) + 1)}")
    rows = {}
    for script in MISTAKES:
        rows[script] = {
            way: statistics.median([seconds(script, way) for _ in range(args.rounds + 1)][1:]) for way in WAYS
        }
        print(f"| `{script}` | " + " | ".join(f"{value:.2f}" for value in rows[script].values()) + " |", flush=True)
    slowest = {way: max(row[way] for row in rows.values()) for way in WAYS}
    print(f"\nslowest: --help {slowest['--help']:.2f} s (bar 1), a mistake {max(slowest.values()):.2f} s (bar 2)")
    return rows


if __name__ == "__main__":
    run_script(parse_args, main)
