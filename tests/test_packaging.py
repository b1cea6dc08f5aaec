"""The wheel, built and installed into an empty folder: its files, its modules, its commands."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_architecture import MODULES, SCRIPTS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
PAGE = [f"rag/reports/page.{end}" for end in ("css", "html", "js")]
RAG = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "rag").rglob("*.py"))
NAMES = [*SCRIPTS, *MODULES, *(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in RAG)]
IMPORT = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])] + ["ray" in sys.modules]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*PIP, "wheel", *here, "--wheel-dir", str(folder), str(ROOT)], check=True)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's files and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-index", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """A function that runs a command as after an install: in another folder, with the wheel's files first."""

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_the_wheel_holds_the_package_and_the_ten_modules(wheel):
    assert wheel.name == f"rag_suite-{PROJECT['version']}-py3-none-any.whl"
    assert wheel.stat().st_size < 600_000
    about = f"rag_suite-{PROJECT['version']}.dist-info"
    expected = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    expected |= {f"{about}/licenses/{path.name}" for path in ROOT.glob("LICENSE*")}
    with zipfile.ZipFile(wheel) as files:
        assert set(files.namelist()) == {*RAG, *PAGE, *(f"{name}.py" for name in SCRIPTS | MODULES.keys()), *expected}


def test_every_module_is_imported_from_there(run, installed):
    shown = run(sys.executable, "-c", IMPORT, json.dumps(NAMES))
    assert shown.returncode == 0, shown.stderr
    *files, with_ray = json.loads(shown.stdout.splitlines()[-1])
    assert [path for path in files if not Path(path).is_relative_to(installed)] == []
    assert not with_ray, "an extra"


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_each_command_is_there_under_its_name(command, run, installed):
    shown = run(sys.executable, str(installed / "bin" / command), "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {command} "), shown.stderr
    mistaken = run(sys.executable, str(installed / "bin" / command), "--hlep")
    assert mistaken.returncode == 2 and mistaken.stderr.startswith(f"{command}: error: "), mistaken.stderr


def test_every_script_is_a_command():
    assert set(PROJECT["scripts"].values()) == {f"{name}:cli" for name in SCRIPTS}


def test_a_command_does_its_job(run, installed, tmp_path):
    record = {"question": "which city?", "positive_ctxs": [{"title": "Oslo", "text": ""}]}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    flags = ["--src_path", "records.json", "--evaluation_set", "questions", "--gold_data_path", "pages"]
    done = run(sys.executable, str(installed / "bin" / "rag-parse-dpr"), *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "questions").read_text() == "which city?\n" and (tmp_path / "pages").read_text() == "Oslo\n"


def test_the_example_documents_are_in_a_checkout_only(run, installed):
    done = run(sys.executable, str(installed / "bin" / "rag-knowledge"))
    assert done.returncode == 2 and done.stderr.startswith("rag-knowledge: error: --csv_path is needed: your documents")
    assert len(done.stderr.splitlines()) == 1
