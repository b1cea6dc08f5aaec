"""The house: ten files that people know, one package by subject. The import contracts are in pyproject.toml.

import-linter reads packages; what the ten files of the top level import of each other is held here.
"""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = {
    "finetune_rag",
    "eval_rag",
    "use_own_knowledge_dataset",
    "consolidate_rag_checkpoint",
    "parse_dpr_relevance_data",
}
# The public suite's modules, with those of them that each may import.
MODULES = {
    "utils_rag": set(),
    "distributed_pytorch_retriever": set(),
    "distributed_ray_retriever": set(),
    "callbacks_rag": set(),
    "lightning_base": {"utils_rag"},
}
HEAVY = {"torch", "transformers", "datasets", "faiss", "pytorch_lightning", "ray"}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("rag/**/*.py"), *ROOT.glob("quickstart/*.py")])


def body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def imported(nodes) -> set[str]:
    """The top-level names of the modules that these statements, or any inside them, import."""
    names = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                names |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                names.add(inner.module.split(".")[0])
    return names


def test_the_top_level_holds_the_known_files():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | MODULES.keys()


def test_import_contracts_are_kept():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and " 0 broken" in shown.stdout, shown.stdout + shown.stderr


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_import_no_scripts(name):
    assert not imported(body(ROOT / f"{name}.py")) & (SCRIPTS | {"quickstart"})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_import_from_below(name):
    assert imported(body(ROOT / f"{name}.py")) & (SCRIPTS | MODULES.keys() | {"quickstart"}) <= MODULES[name]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_import_nothing_heavy_at_the_top(name):
    top = [node for node in body(ROOT / f"{name}.py") if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imported(top) & (HEAVY | MODULES.keys() - {"utils_rag"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_its_job(path):
    first, *rest = body(path)
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    if path.name == "__init__.py":
        assert not rest, "a package is imported for the sake of one module: its __init__ imports nothing"


def test_every_package_that_is_imported_is_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        match[1].lower().replace("_", "-") for line in lines if (match := re.fullmatch(r"([\w-]+)==[\w.]+", line))
    }
    paths = [*FILES, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
    packages = set().union(*(imported(ast.parse(path.read_text(encoding="utf-8")).body) for path in paths))
    packages -= {path.stem for path in paths} | {"rag", "quickstart", "tests", "benchmarks"} | sys.stdlib_module_names
    owners = packages_distributions()
    names = {name: {owner.lower().replace("_", "-") for owner in owners.get(name, [name])} for name in packages}
    assert [name for name in sorted(names) if not names[name] & pinned] == []


def test_the_walks_name_what_exists():
    walks = re.findall(r"^(\w[\w/]*\.py):([\w.]+) ", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(walks) > 30
    for file, name in walks:
        nodes = body(ROOT / file)
        for part in name.split("."):
            (node,) = [node for node in nodes if getattr(node, "name", None) == part] or [None]
            assert node, f"docs/architecture.md: {file} has no {name}"
            nodes = node.body
