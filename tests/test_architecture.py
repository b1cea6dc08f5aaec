"""The house: ten files that people know, one package by subject. The import contracts are in pyproject.toml.

import-linter reads packages; what the ten files of the top level import of each other is held here.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
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
    "report_rag",
    "demo_rag",
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
DISTRIBUTIONS = functools.cache(packages_distributions)  # the environment's, by the name that is imported
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


def packages_imported(paths) -> dict[str, set[str]]:
    """By the name that these files import: the packages, of the environment, that it comes from; not our own files."""
    names = set().union(*(imported(body(path)) for path in paths))
    names -= SCRIPTS | MODULES.keys() | {"rag", "quickstart", "tests", "benchmarks"} | sys.stdlib_module_names
    owners = DISTRIBUTIONS()
    return {name: {normalized(owner) for owner in owners.get(name, [name])} for name in sorted(names)}


def normalized(package: str) -> str:
    return package.lower().replace("_", "-")


def pinned() -> dict[str, str]:
    """Version by package, of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {normalized(match[1]): match[2] for line in lines if (match := re.fullmatch(r"([\w-]+)==([\w.]+)", line))}


def lower_bounds(*extras: str) -> dict[str, str]:
    """Version by package, of the [project] table's dependencies and those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    names = [one for one in requirements if not one.startswith(f"{project['name']}[")]
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+)", one) for one in names]
    assert all(bounds), names
    return {normalized(bound[1]): bound[2] for bound in bounds}


def test_every_package_that_is_imported_is_pinned():
    folders = (path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    packages = packages_imported([*FILES, *folders])
    unpinned = [name for name, owners in packages.items() if not owners & pinned().keys()]
    assert unpinned == ["trackio"], "which the tests have an imitation of"
    of_project = lower_bounds("ray", "lora", "report", "loggers", "dev").keys()
    assert [name for name, owners in packages.items() if not owners & of_project] == []


def test_an_installed_package_has_what_it_imports():
    shipped = [path for path in FILES if path.parent.name != "quickstart"]
    packages = packages_imported(shipped)
    for extra in ("ray", "peft", "matplotlib", "tensorboard", "trackio"):
        assert packages.pop(extra) == {extra}
    assert [name for name, owners in packages.items() if not owners & lower_bounds().keys()] == []
    unused = lower_bounds().keys() - set().union(*packages.values())
    assert unused == {"sentencepiece"}, "only that does transformers import for us"


def test_lower_bounds_are_not_above_the_pins():
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    pins, bounds = pinned(), lower_bounds("ray", "lora", "report", "dev")
    assert bounds.keys() - pins.keys() == {"pre-commit"}, "which `make test` does not need"
    assert [name for name, pin in pins.items() if numbers(bounds[name]) > numbers(pin)] == []


def test_the_walks_name_what_exists():
    walks = re.findall(r"^(\w[\w/]*\.py):([\w.]+) ", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(walks) > 30
    for file, name in walks:
        nodes = body(ROOT / file)
        for part in name.split("."):
            (node,) = [node for node in nodes if getattr(node, "name", None) == part] or [None]
            assert node, f"docs/architecture.md: {file} has no {name}"
            nodes = node.body
