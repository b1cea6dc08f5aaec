"""A file of settings, YAML or JSON, as the words of a command line, so that both are checked by the same code.

n_docs: 10            # --n_docs=10
k: [1, 5, 20]         # --k 1 5 20
recalculate: true     # --recalculate=True
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from rag.errors import UserError, one_line

NOT_HERE = {"trust_remote_code"}  # what a stranger's file must not say
LARGEST = 1 << 20  # bytes: a hundred times what all flags would take


def settings_as_words(path: str) -> list[str]:
    """The settings of the file at `path`; one that is null is left out.

    Raises:
        UserError: it is no file of `flag: value` pairs; the message names --config_file.
    """
    flag = f"--config_file {path}"
    text = _read(flag, Path(path))
    try:
        is_json = path.endswith(".json")
        settings = json.loads(text, object_pairs_hook=_each_key_once) if is_json else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{flag} cannot be read: {one_line(error, 300)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{flag} must hold `flag: value` pairs")
    names = [str(name).replace("-", "_") for name in settings]
    twice = sorted({name for name in names if names.count(name) > 1} | ({"config_file"} & set(names)))
    if twice:
        raise UserError(f"{flag} gives {twice[0]} once too often; leave one out")
    if given := sorted(NOT_HERE & set(names)):
        raise UserError(f"{flag} gives {given[0]}, which no file may; give --{given[0]} on the command line")
    return [word for name, value in settings.items() if value is not None for word in _words(flag, name, value)]


def _read(flag: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{flag} {'is no file' if path.exists() else 'does not exist'}; give a YAML or JSON file")
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{flag} is larger than {LARGEST:,} bytes; give a file of settings")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} cannot be read as UTF-8 text ({error}); write it anew") from error


def _words(flag: str, name: Any, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not isinstance(name, str) or any(
        isinstance(one, dict | list | set | tuple | bytes) or one is None for one in values
    ):
        raise UserError(f"{flag}: {name!r}: {value!r:.60} is no setting; write `flag: value` or `flag: [value, value]`")
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if options := [one for one in values if str(one).startswith("--")]:
        raise UserError(
            f"{flag}: {name} has the value {options[0]}, which reads as a flag; give it on the command line"
        )
    return [f"--{name}", *map(str, values)]


def _each_key_once(pairs: Iterable[tuple[Any, Any]]) -> dict:
    """A dict of the pairs; of a key that stands there twice the last value would win without a word."""
    settings: dict = {}
    for name, value in pairs:
        if name in settings:
            raise ValueError(f"{name!r} stands there twice")
        settings[name] = value
    return settings


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, for which a key stands once and an alias for one value: lists of aliases of lists explode."""

    def compose_node(self, parent, index):
        aliased = self.anchors.get(self.peek_event().anchor) if self.check_event(yaml.AliasEvent) else None
        if aliased is not None and not isinstance(aliased, yaml.ScalarNode):
            raise yaml.YAMLError("an alias stands for a list or pairs; write them out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.YAMLError("a key is a list or pairs")
        _each_key_once((self.construct_object(key, deep=True), None) for key, _ in node.value)
        return super().construct_mapping(node, deep)
