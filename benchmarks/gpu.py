"""All bars of a GPU in one run of under five minutes: the training step, finetune_rag.py, answers, search, embedding.

    make bench-gpu                                          # this, then the tests that need a GPU
    PYTHONPATH=. python benchmarks/gpu.py                   # this alone, with any Python that has torch and the rest
    PYTHONPATH=. python benchmarks/gpu.py --parts our_steps public_steps
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --short     # a trial: each part at a size that measures nothing

Sizes are those of BART-large and DPR-base with random weights, the public way runs in the same run. Every part is a
process of its own with a limit in seconds; one that hangs or fails costs no more than its limit, and the table says so.
While one measures, the next one imports. The table comes last; --folder has it and all figures as JSON, and what each
part printed. Needed: torch, Lightning, transformers, datasets and faiss-cpu, no network. Texts are those of
../shared/data/nq_gold, or made up where it is not there.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.gpu_parts.measuring import Measured, Settings
from benchmarks.machine import header
from benchmarks.training_step import NQ_GOLD
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError
from rag.files import save_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A function of a module of `gpu_parts`, and the seconds that it may take."""

    module: str
    function: str
    seconds: float


PARTS = {
    part.function: part
    for part in (
        Part("measuring", "ceilings", 60),  # the first, whose imports nothing hides
        Part("training", "our_steps", 45),
        Part("training", "public_steps", 55),
        Part("answers", "answers", 50),
        Part("search", "search", 50),
        Part("embedding", "embedding", 25),
        Part("training", "loop", 40),
        Part("training", "compiled_steps", 45),
    )
}
ALL_SECONDS = 285  # of all parts together


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Each part at a tiny size: a trial that it works.")
    device: str = flag("cuda", "cuda; with cpu, for a trial, all parts run in this process.")
    parts: list[str] = flag([], f"Only these of {', '.join(PARTS)}; left out, all.")
    folder: Path = flag(Path("output/gpu"), "Where figures, logs and scratch are left.")
    part: str | None = flag(None, "Run one part in this process, once a line comes from stdin.")


def parse_args(argv=None) -> BenchmarkArguments:
    args = parse_into(BenchmarkArguments, description=__doc__, argv=argv)
    if unknown := [name for name in args.parts if name not in PARTS]:
        raise UserError(f"--parts {' '.join(unknown)}: there is no such part; the parts are {', '.join(PARTS)}")
    return args


# --- One part ---------------------------------------------------------------------------------------------------------


def measured_of(part: Part, settings: Settings) -> Iterator[Measured]:
    return getattr(importlib.import_module(f"benchmarks.gpu_parts.{part.module}"), part.function)(settings)


def figures_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def run_part(name: str, settings: Settings) -> None:
    """Write what the part yields, a line each as it comes: what is there stays if the part is stopped."""
    with open(figures_file(settings.folder, name), "w", encoding="utf-8") as file:
        for measured in measured_of(PARTS[name], settings):
            print(json.dumps(asdict(measured)), file=file, flush=True)


def read_part(name: str, folder: Path) -> list[Measured]:
    path = figures_file(folder, name)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [Measured(**json.loads(line)) for line in lines if line.endswith("\n")]


class Process:
    """A part's process, which imports what it needs and then waits for `go`."""

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name, self.log = name, log
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )

    def finish(self, seconds: float) -> str:
        """Let it begin; why it did not end well within so many seconds, or ""."""
        assert self.process.stdin is not None
        try:
            if seconds <= 0:
                return "no time was left for it"
            with suppress(BrokenPipeError):  # it has ended
                self.process.stdin.write("go\n")
                self.process.stdin.close()
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            self.kill()
        if status == 0:
            return ""
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"ended with status {status}: {''.join(last)[:120]}"

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_processes(commands: dict[str, Sequence[str]], limits: dict[str, float], folder: Path) -> dict[str, str]:
    """Run the commands in turn, each under its limit; why a part did not end well, by its name."""
    deadline, names = time.monotonic() + ALL_SECONDS, list(commands)
    ended: dict[str, str] = {}
    following: Process | None = None
    try:
        for name, behind in zip(names, [*names[1:], None], strict=True):
            process = following or Process(name, commands[name], folder / f"{name}.log")
            following = Process(behind, commands[behind], folder / f"{behind}.log") if behind else None
            start = time.monotonic()
            ended[name] = process.finish(min(limits[name], deadline - start))
            print(f"{name}: {ended[name] or f'{time.monotonic() - start:.0f} s'}", flush=True)
    finally:
        if following is not None:
            following.kill()
    return {name: reason for name, reason in ended.items() if reason}


# --- All parts --------------------------------------------------------------------------------------------------------


def main(args: BenchmarkArguments) -> dict:
    settings = Settings(args.device, args.short, args.folder)
    if args.part is not None:
        for library in ("pytorch_lightning", "transformers", "datasets"):  # while another part measures
            importlib.import_module(library)

        sys.stdin.readline()
        run_part(args.part, settings)
        return {}
    require_device(args.device)
    names = args.parts or list(PARTS)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        figures_file(args.folder, name).unlink(missing_ok=True)
    print(f"{header('torch', 'transformers', 'faiss-cpu')}\n{text_source()}", flush=True)
    stopped = run_here(names, settings) if args.device == "cpu" else run_alone(names, args)
    return report(names, settings, stopped)


def require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU, and torch sees none here; --device cpu --short tries its parts")


def text_source() -> str:
    return "nq_gold" if NQ_GOLD.is_dir() else f"made-up text, as {NQ_GOLD} is not there"


def run_here(names: list[str], settings: Settings) -> dict[str, str]:
    for name in names:
        run_part(name, settings)
    return {}


def run_alone(names: list[str], args: BenchmarkArguments) -> dict[str, str]:
    common = ["--device", args.device, "--folder", str(args.folder), *(["--short"] if args.short else [])]
    commands = {name: [sys.executable, str(Path(__file__).resolve()), "--part", name, *common] for name in names}
    return run_processes(commands, {name: PARTS[name].seconds for name in names}, args.folder)


def report(names: list[str], settings: Settings, stopped: dict[str, str]) -> dict:
    """Print the table and leave it, with every figure, in the folder."""
    from benchmarks.gpu_parts.table import Found, markdown

    measured = [one for name in names for one in read_part(name, settings.folder)]
    found = Found(settings, measured)
    table = markdown(settings, found)
    result = {
        "header": header("torch", "transformers", "faiss-cpu").splitlines(), "text": text_source(), "stopped": stopped,
        "figures": [{"case": case, "side": side, **figures} for (case, side), figures in found.figures.items()],
        "table": table.splitlines(),
    }  # fmt: skip
    save_json(result, settings.folder / "results.json")
    print(f"\n{chip_line(found)}\n")
    if settings.short or settings.device == "cpu":
        print("A trial: none of these figures means anything.\n")
    print(table)
    for name, reason in stopped.items():
        print(f"\n{name}: {reason}; see {settings.folder / f'{name}.log'}")
    return result


def chip_line(found) -> str:
    """Machine and ceilings in a line."""
    name = found.get("chip", "name", "chip") or "a CPU"
    return (
        f"{name}: {found.bf16 / 1e12:,.0f} TFLOP/s in bf16, {found.fp32 / 1e12:,.0f} in float32, device copy "
        f"{found.copy / 1e12:.2f} TB/s (read and written), from pinned memory {found.bus / 1e9:.0f} GB/s"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # for the parts, too
    run_script(parse_args, main)
