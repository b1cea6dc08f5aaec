"""Which names the project's files use, and where: attributes, imports, keyword arguments, methods and strings."""

import ast
from collections import defaultdict
from functools import cache

from tests.conftest import ROOT

NOT_PRODUCT = {"tests", "benchmarks", "docs", "output", "build", "dist"}


@cache
def product_trees() -> dict[str, ast.Module]:
    """Every file of the project but tests and benchmarks, by its path."""
    folders = [f for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "." and f.name not in NOT_PRODUCT]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}


@cache
def tokens_of_product() -> dict[str, list[str]]:
    """Every token that the project uses, with the places "file:line"."""
    places = defaultdict(list)
    for file, tree in product_trees().items():
        for node in ast.walk(tree):
            for token in tokens_of(node):
                places[token].append(f"{file}:{node.lineno}")
    return places


def tokens_of(node: ast.AST) -> list[str]:
    match node:
        case ast.Call(func=ast.Name("getattr" | "setattr" | "hasattr"), args=[owner, ast.Constant(str() as name), *_]):
            return [f"{ast.unparse(owner)}.{name}"]
        case ast.Attribute():
            return [ast.unparse(node)]
        case ast.Import(names):
            return [alias.name for alias in names]
        case ast.ImportFrom(str() as module, names):
            return [f"{module}.{alias.name}" for alias in names]
        case ast.keyword(str() as name):
            return [f"{name}="]
        case ast.FunctionDef(name):
            return [f"def {name}"]
        case ast.Constant(str() as text):
            return [repr(text)]
    return []


def names_of_product() -> set[str]:
    """What the project defines: functions, classes, fields and attributes of `self`."""
    names = set()
    for node in (node for tree in product_trees().values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name):
                names.add(name)
            case ast.Name(name, ast.Store()) | ast.Attribute(ast.Name("self" | "cls"), name, ast.Store()):
                names.add(name)
            case ast.arg(name):
                names.add(name)
    return names


def matches(text: str, token: str) -> bool:
    return text == token or text.endswith(f".{token}")


def places_of(token: str) -> list[str]:
    return [place for text, places in tokens_of_product().items() if matches(text, token) for place in places]
