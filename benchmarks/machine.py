"""What every benchmark says of the machine above its table, and processes and their memory; no benchmark itself.

    print(header("torch", "faiss-cpu"))  # date and command; processor, cores, Python and these packages' versions
    seconds = in_its_own_process(__file__, "--side", "ours")  # what this benchmark prints there, as JSON
    peak, allocated = status_mib("VmHWM"), status_mib("RssAnon", process.pid)

Memory is in MiB, as Linux tells it in /proc.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))  # that this process may use


def header(*packages: str, threads: int | None = None) -> str:
    """Two lines: when and how it was run, and on what; `threads` are torch's, where they bear on the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    facts = [processor, f"{CORES} cores"]
    if threads is not None:
        facts.append(f"{threads} threads")
    facts += [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    return f"{datetime.date.today()}, {' '.join(sys.argv)}\n{', '.join(facts)}"


def in_its_own_process(script: str, *words: str | Path) -> Any:
    """What a benchmark with these flags, in a new process, says in the last line it prints, which is JSON."""
    shown = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])


def status_mib(name: str, process: str | int = "self") -> float:
    """What a process holds (VmRSS), held at most (VmHWM), or holds that are no pages of a file (RssAnon)."""
    return _mib(f"/proc/{process}/status", name)


def anonymous_mib() -> float:
    """What this process holds that are no pages of a file, counted page by page; RssAnon may lag a little behind."""
    return _mib("/proc/self/smaps_rollup", "Anonymous")


def proportional_mib() -> float:
    """What this process and all it started hold, pages that are shared counted in parts (PSS)."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_mib(f"/proc/{process.pid}/smaps_rollup", "Pss") for process in processes)


def _mib(path: str, name: str) -> float:
    """The line `name: number kB` of a file of /proc."""
    return int(Path(path).read_text().partition(f"{name}:")[2].split()[0]) / 1024
