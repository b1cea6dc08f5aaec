"""`benchmarks/gpu.py` on a CPU, where it measures nothing: its parts run, its table judges, a part that hangs is ended.

And who runs the tests that need a GPU.
"""

import ast
import os
import re
import sys
from functools import partial

import numpy as np
import psutil
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts.measuring import Measured, Settings, covered, holding
from benchmarks.gpu_parts.search import Vectors
from benchmarks.gpu_parts.table import Found, lines, markdown
from benchmarks.gpu_parts.training import LOOP, step_case, step_flop
from rag.errors import UserError
from tests.conftest import ROOT
from tests.test_benchmarks import make


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table's rows, but for its head."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


# --- The parts --------------------------------------------------------------------------------------------------------


def test_every_part_fills_its_rows(tmp_path, capsys):
    result = gpu.main(gpu.parse_args(["--device", "cpu", "--short", "--folder", str(tmp_path)]))
    settings = Settings("cpu", True, tmp_path)
    rows = rows_of("\n".join(result["table"]))
    assert [row[0] for row in rows] == [line.what for line in lines(settings)]
    assert [row[0] for row in rows if row[1] == "-"] == ["memory of int8, of fp16's"]  # which is a GPU's
    assert all((row[6] in ("yes", "no")) == bool(row[5]) for row in rows if row[1] != "-")
    assert [figures for figures in result["figures"] if "problem" in figures] == []
    public, ours = (
        next(one for one in result["figures"] if (one["case"], one["side"]) == (step_case(1, 0.1), side))
        for side in ("public", "ours")
    )
    assert ours["loss"] == pytest.approx(public["loss"], rel=1e-5)  # the same weights, questions and passages
    assert ours["padding"] < 0.02 < public["padding"]
    assert "A trial: none of these figures means anything." in capsys.readouterr().out


def test_it_needs_a_gpu_and_known_parts():
    with pytest.raises(UserError, match="this benchmark needs a GPU, and torch sees none here"):
        gpu.main(gpu.parse_args([]))
    with pytest.raises(UserError, match="--parts steps: there is no such part; the parts are ceilings, our_steps,"):
        gpu.parse_args(["--parts", "steps"])


def test_arithmetic_of_a_step():
    """360,000 context tokens a second are 49% of 780 TFLOP/s at BART-large size, as issue 13 counts."""
    from transformers import BartConfig, DPRConfig, RagConfig

    config = RagConfig.from_question_encoder_generator_configs(DPRConfig(), BartConfig())
    assert step_flop(config, 360_000, 0, 0) / 780e12 == pytest.approx(0.49, abs=0.005)
    assert step_flop(config, 0, 1, 0) == 6 * (12 * 14 * 1024**2 + 50265 * 1024)
    assert step_flop(config, 0, 0, 1) == 6 * 12 * 12 * 768**2


def test_vectors_that_share_memory_are_found_by_their_rows():
    vectors = Vectors(dimension=48, block=50)
    blocks = list(vectors.blocks(120))
    assert [len(block) for block in blocks] == [50, 50, 20]
    rows = np.array([[0, 49, 50], [77, 100, 119]])
    np.testing.assert_array_equal(vectors.gather(rows), np.concatenate(blocks)[rows])
    assert len(np.unique(np.concatenate(blocks), axis=0)) == 120


def test_time_in_which_kernels_overlap_counts_once():
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0


def test_a_number_of_the_host_itself_is_none_that_the_device_was_asked_for():
    assert holding([(0, 2), (3, 5), (6, 9)], [8, 4, 7, 2]) == 2
    assert holding([(0, 2)], []) == 0


# --- The table --------------------------------------------------------------------------------------------------------


def row_of(what: str, *measured: Measured) -> list[str]:
    settings = Settings("cuda", False, ROOT)
    (row,) = (row for row in rows_of(markdown(settings, Found(settings, measured))) if row[0] == what)
    return row


def test_bars_are_judged():
    chip = Measured("chip", "chip", {"bf16_tflops": 780.0, "fp32_tflops": 52.0, "copy_tb": 3.0, "bus_gb": 50.0})
    case = step_case(16, 0.1)
    step = {"context_tokens": 1e4, "read_tokens": 1e4, "flop": 1e13, "weights": 5e8}
    ours = Measured(case, "ours", {"ms": 40.0, "peak_mib": 60.0, **step})
    what, of_peak, peak = f"{case}, ms", "finetune_rag.py, batch 16, ms a step", "its rate, of the step's by itself"
    row = partial(row_of, what, chip, ours)
    limit = f"{1e16 / 780e12 + 28e3 * 5e8 / 3e12:.1f}"
    assert row(Measured(case, "public", {"ms": 120.0})) == [what, "40.0", "120.0", "3.0x", limit, "3x as fast", "yes"]
    assert row(Measured(case, "public", {"ms": 119.0}))[6] == "no"
    assert row(Measured(case, "public", {"problem": "out of | memory"}))[2:7:2] == [
        "out of / memory",
        limit,
        "not measured",
    ]
    loop = Measured(LOOP, "ours", {"ms": 44.0})
    assert row_of(peak, ours, loop)[1:] == ["91%", "", "", "", "at least 90%", "yes"]
    assert row_of(of_peak, chip, Measured(LOOP, "ours", {"problem": "no disk"}))[1] == "no disk"
    assert row_of(peak, chip)[1] == "-" and row_of(peak, chip)[6] == "not measured"


def test_several_bars_are_met_together():
    case = "RAG-Token, batch 64, bfloat16"
    public = Measured(case, "public", {"ms": 16.0})
    for ours, met in ((1.5, "yes"), (1.6, "no"), (2.1, "no")):
        row = row_of(f"{case}, ms a question", Measured(case, "ours", {"ms": ours}), public)
        assert row[5:] == ["8x as fast, at most 1.5 ms", met]


def test_a_share_of_an_unknown_peak_is_not_measured():
    case = "embedding"
    measured = [Measured(case, "ours", {"passages_per_second": 9e3, "flop": 1e10, "busy": 0.95})]
    settings = Settings("cuda", False, ROOT)
    rows = rows_of(markdown(settings, Found(settings, measured)))[-3:]
    assert [row[1] for row in rows] == ["9,000", "-", "95%"]
    assert [row[6] for row in rows] == ["yes", "not measured", "yes"]


# --- Processes --------------------------------------------------------------------------------------------------------


def test_a_part_that_hangs_or_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """The one that hangs has started another process, which ends with it; what it wrote before stays."""
    hangs = """
import pathlib, subprocess, sys, time
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
path = pathlib.Path("hangs.jsonl")
path.write_text('{"case": "a", "side": "ours", "figures": {"child": %d}}\\n{"case": "half' % child.pid)
time.sleep(600)
"""
    programs = {
        "hangs": hangs,
        "fails": "print('kept'); raise SystemExit('no kernel')",
        "works": "input(); print('done')",
    }
    commands = {name: [sys.executable, "-S", "-c", text] for name, text in programs.items()}
    monkeypatch.chdir(tmp_path)
    stopped = gpu.run_processes(commands, {"hangs": 3, "fails": 60, "works": 60}, tmp_path)
    assert stopped == {"hangs": "stopped after 3 s", "fails": "ended with status 1: no kernel"}
    assert (tmp_path / "works.log").read_text() == "done\n" and (tmp_path / "fails.log").read_text().startswith("kept")
    (kept,) = gpu.read_part("hangs", tmp_path)
    child = kept.figures["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert capsys.readouterr().out.startswith("hangs: stopped after 3 s\nfails: ended with status 1")


def test_no_part_begins_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ALL_SECONDS", -1)
    command = [sys.executable, "-S", "-c", "input(); open('begun', 'w')"]
    assert gpu.run_processes({"late": command}, {"late": 60}, tmp_path) == {"late": "no time was left for it"}


# --- Tests that need a GPU --------------------------------------------------------------------------------------------


def test_no_other_test_sees_a_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def is_marker(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "cuda" and getattr(node.value, "attr", "") == "mark"


@pytest.mark.parametrize("target", ["test", "test-cuda", "bench-gpu"])
def test_make_runs_the_files_that_need_one(target):
    (command,) = re.findall(r"pytest -m cuda((?: tests/\S+\.py)*)", make(target))
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if any(map(is_marker, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert set(command.split()) == marked and len(marked) > 1
