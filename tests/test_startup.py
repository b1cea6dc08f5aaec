"""Nothing heavy is imported and nothing connected to before the arguments are good."""

import json
import subprocess
import sys

import pytest

from benchmarks.startup import MISTAKES
from tests.conftest import ROOT

HEAVY = "torch transformers datasets faiss pytorch_lightning ray huggingface_hub".split()  # noqa: SIM905
RUN = """
import json, runpy, socket, sys
script, commands, heavy = json.loads(sys.argv[1])
connected, results = [], []
socket.socket.connect = lambda self, address: connected.append(address)
socket.getaddrinfo = lambda host, *rest, **more: connected.append(host)
for words in commands:
    sys.argv = [script, *words]
    try:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        results.append([stopped.code, sorted(set(heavy) & set(sys.modules)), connected])
sys.stdout.write("\\n" + json.dumps(results))
"""


@pytest.mark.parametrize("script", MISTAKES)
def test_help_and_mistakes_need_nothing_heavy_and_no_network(script):
    commands = [["--help"], ["--hlep"], MISTAKES[script]]
    given = json.dumps([script, commands, HEAVY])
    shown = subprocess.run([sys.executable, "-c", RUN, given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout.splitlines()[-1]) == [[0, [], []], [2, [], []], [2, [], []]], shown.stderr
    assert "no/such/path" in shown.stderr or script == "consolidate_rag_checkpoint"
