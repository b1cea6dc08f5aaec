"""The quickstart with a language model runs in small, and a second run finds its work done."""

import json
import subprocess
import sys

import pytest

from quickstart import language_model, weights
from tests.conftest import ROOT
from tests.quickstart.printed import parse_next_commands, require_calm
from tests.quickstart.test_weights import needs_weights


@pytest.mark.slow
@needs_weights(weights.MINILM_PACKAGE, weights.LANGUAGE_MODEL_PACKAGE)
def test_quickstart_in_small(tmp_path, capfd):
    args = language_model.parse_args(["--smoke", "--output_dir", str(tmp_path)])
    results = language_model.main(args)
    assert json.loads((tmp_path / "quickstart_llm_results.json").read_text()) == results
    assert list(results) == [
        "em_closed_book", "em_zero_shot", "em_after", "f1_after", "precision_at_1", "training_seconds", "seconds",
        "peak_memory_mb",
    ]  # fmt: skip
    assert results["precision_at_1"] >= 0.75
    assert 0 < results["training_seconds"] < results["seconds"]
    assert 0 < results["peak_memory_mb"] < 8192
    printed = capfd.readouterr().out
    assert len(require_calm(printed, tmp_path)) == 9
    assert printed.count("Q: ") == 3
    assert "$ python finetune_rag.py --" in printed and "closed-book" in printed
    parse_next_commands(printed)

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = language_model.main(args)  # its memory is this process's, which only grows
    assert {**again, "peak_memory_mb": 0} == {**results, "peak_memory_mb": 0}
    printed = capfd.readouterr().out
    assert printed.count("(done in an earlier run, in ") == 9
    require_calm(printed, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


@pytest.mark.parametrize("name", ["quickstart", "quickstart.language_model"])
def test_mistakes_are_told_under_the_name_that_was_called(name):
    done = subprocess.run([sys.executable, "-m", name, "--hlep"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"python -m {name}: error: unrecognized arguments: --hlep")
    told = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for what in ("minutes on two CPU cores", f"python -m {name} --smoke", "GPU", "report.html", "After a kill"):
        assert what in told
