"""The Lightning Trainer's own settings as command-line flags, read off the Trainer's source without importing it.

`Trainer.__init__`'s signature gives names, types and defaults, its docstring the help; a new Lightning brings its new
settings along. Importing Lightning instead would take seconds of every `--help`.
"""

import argparse
import ast
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Objects that a command line cannot hold, and settings that the suite makes itself, under the public suite's names.
NOT_FLAGS = set(
    """logger callbacks plugins profiler model_registry enable_autolog_hparams enable_checkpointing barebones
    max_epochs accumulate_grad_batches gradient_clip_val default_root_dir use_distributed_sampler
    reload_dataloaders_every_n_epochs limit_predict_batches""".split()  # noqa: SIM905
)
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}
WORDS = {"true": True, "false": False, "null": None, "none": None}


def add_trainer_flags(parser: argparse._ActionsContainer) -> None:
    """Add one flag for each setting of the Trainer that is plain data; values are read as YAML would (0.5, 2, true)."""
    init = _trainer_init()
    helps = _argument_helps(ast.get_docstring(init))
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        name = argument.arg
        if name in NOT_FLAGS:
            continue
        may_stand_alone = "bool" in _names(argument.annotation)
        parser.add_argument(
            *dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]),
            type=_value_reader(argument.annotation),
            default=ast.literal_eval(default),
            help=helps.get(name, "").replace("%", "%%") or None,
            **({"nargs": "?", "const": True} if may_stand_alone else {}),
        )


def _trainer_init() -> ast.FunctionDef:
    tree = _parse_module("pytorch_lightning.trainer.trainer")
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    return next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")


@cache
def _parse_module(module: str) -> ast.Module:
    package, *parts = module.split(".")
    path = Path(importlib.util.find_spec(package).submodule_search_locations[0], *parts)  # finding does not import
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _argument_helps(docstring: str) -> dict[str, str]:
    """Each argument's paragraph of a Google-style docstring, without its markup."""
    section = docstring.partition("Args:\n")[2].partition("\nRaises:")[0]
    paragraphs = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: re.sub(r":\w+:(?=`)|[`~]", "", " ".join(text.split())) for name, text in paragraphs}


def _value_reader(annotation: ast.expr) -> Callable[[str], Any]:
    """A reader of one value that refuses what the annotation does not allow."""
    literals = _literals(annotation, "pytorch_lightning.trainer.trainer")
    names = _names(annotation)
    types = tuple(TYPES[name] for name in TYPES if name in names)
    expected = list(map(str, literals)) + [name for name in TYPES if name in names]

    def read(text: str) -> Any:
        value = _plain_value(text)
        if value is None and "Optional" in names:
            return None
        allowed = "bool" in names if isinstance(value, bool) else isinstance(value, types) or value in literals
        if not allowed and ("str" in names or text in literals):
            value, allowed = text, True
        if not allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(dict.fromkeys(expected))}")
        return value

    return read


def _plain_value(text: str) -> Any:
    """`0.5` as a float, `2` as an int, `true` and `null` as such, anything else as it is."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _names(annotation: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}


def _literals(expression: ast.expr, module: str) -> list[Any]:
    """The values of every `Literal` in a type, also where it stands behind names imported from other modules."""
    if isinstance(expression, ast.Subscript) and _names(expression.value) == {"Literal"}:
        return [ast.literal_eval(node) for node in getattr(expression.slice, "elts", [expression.slice])]
    if isinstance(expression, ast.Name):
        return _literals_behind(expression.id, module) if expression.id.startswith("_") else []
    return [value for child in ast.iter_child_nodes(expression) for value in _literals(child, module)]


def _literals_behind(name: str, module: str) -> list[Any]:
    for node in _parse_module(module).body:
        if isinstance(node, ast.Assign) and name in _names(node.targets[0]):
            return _literals(node.value, module)
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            return _literals_behind(name, node.module)
    return []
