"""Every benchmark starts from its file; what they share names the machine and sees memory that is allocated."""

import ast
import datetime
import importlib
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import training_step
from benchmarks.machine import CORES, header
from rag.errors import UserError
from tests.conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name != "machine.py")
PARTS = sorted(f"{path.parent.name}/{path.name}" for path in (ROOT / "benchmarks").glob("*_parts/[!_]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts_from_anywhere(script, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "--short" in shown


@pytest.mark.parametrize("script", [*SCRIPTS, *PARTS])
def test_all_it_imports_of_the_package_is_there(script):
    """Where it is used, behind the flags: what moved to another room would end the benchmark in the middle."""
    tree = ast.parse((ROOT / "benchmarks" / script).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rag."):
            module = importlib.import_module(node.module)
            assert not [name.name for name in node.names if not hasattr(module, name.name)], node.module


def make(target: str) -> str:
    """What `make` would run."""
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_bench_runs_all_but_that_of_a_gpu():
    named = re.findall(r"benchmarks/(\w+\.py)", make("bench"))
    assert sorted([*named, "gpu.py"]) == SCRIPTS


def test_the_header_names_day_command_machine_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decoding.py", "--short"])
    command, machine = header("torch", threads=3).splitlines()
    assert command == f"{datetime.date.today()}, decoding.py --short"
    assert f", {CORES} cores, 3 threads, Python 3." in machine and machine.endswith(f", torch {torch.__version__}")


def test_allocated_memory_is_seen():
    """In a process of its own: here what earlier tests have left may go meanwhile."""
    code = """if True:
        import numpy as np
        from benchmarks.machine import anonymous_mib, proportional_mib, status_mib
        readers = [lambda: status_mib("VmRSS"), lambda: status_mib("RssAnon"), anonymous_mib, proportional_mib]
        before = [reader() for reader in readers]
        held = np.ones(2**25)  # 256 MiB
        grown = [reader() - was for reader, was in zip(readers, before, strict=True)]
        assert min(grown) > 200 and held.all(), grown
        resident = status_mib("VmRSS")  # first: what comes between may take some more
        assert status_mib("VmHWM") >= resident
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_minilm_a_tokenizer_is_made_of_the_texts(monkeypatch):
    def missing():
        raise UserError("the pretrained weights are missing")

    monkeypatch.setattr("quickstart.__main__.minilm_folder", missing)
    monkeypatch.setattr(
        training_step, "examples", lambda: (["who is it"], ["the mayor"], [("Oslo", "The city of Oslo")])
    )
    tokenizer = training_step.make_tokenizer()
    ids = tokenizer(["Who is the mayor", "oslo"], padding=True).input_ids
    first = tokenizer.convert_ids_to_tokens(ids[0])
    assert first == ["[CLS]", "who", "is", "the", "mayor", "[SEP]"]
    assert ids[1][3:] == [tokenizer.pad_token_id] * 3
