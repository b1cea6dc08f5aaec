"""Names of the public suite: where this one keeps them, and what replaces those that have no meaning here.

    ELSEWHERE = {"split_text": "rag.knowledge.passages"}
    REPLACED = {"device": "an encoder's device is `encoder.device`"}
    __getattr__ = module_getattr(__name__, ELSEWHERE, REPLACED)

    class Module:
        total_steps = Replaced("`trainer.estimated_stepping_batches` is that number")

Nothing is imported before its name is used, so that `--help` stays light. docs/differences.md has every name.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)


def module_getattr(
    module: str, elsewhere: Mapping[str, str] | None = None, replaced: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """A `__getattr__` for a module.

    Args:
        module: its name.
        elsewhere: names by the module that defines them, which is imported when the name is first used.
        replaced: names that are gone, by a sentence that says what to use.

    Raises:
        ImportError: by the `__getattr__`, for a name that is gone. An AttributeError would lose its message in
            `from module import name`.
    """

    def look_up(name: str) -> Any:
        if elsewhere and name in elsewhere:
            return getattr(importlib.import_module(elsewhere[name]), name)
        if replaced and name in replaced:
            raise ImportError(_message(f"{module}.{name}", replaced[name]), name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up


class Replaced:
    """A method of the public suite that is gone: reading it raises an AttributeError that says what to use.

    A subclass that defines it is warned by `warn_of_uncalled_methods`: nothing here would call the method.
    """

    def __init__(self, remedy: str):
        self.remedy = remedy

    def __set_name__(self, owner: type, name: str) -> None:
        self.message = _message(f"{owner.__name__}.{name}", self.remedy)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        raise AttributeError(self.message)


def replaced_method(owner: type, name: str) -> Replaced | None:
    """The `Replaced` that a class, or the nearest of its parents that has the name, keeps under it."""
    found = next((vars(parent)[name] for parent in owner.__mro__ if name in vars(parent)), None)
    return found if isinstance(found, Replaced) else None


def warn_of_uncalled_methods(owner: type) -> None:
    """Log a warning for each method that a class defines where its parents have a `Replaced`."""
    for name in vars(owner):
        for parent in owner.__mro__[1:]:
            if isinstance(replaced := vars(parent).get(name), Replaced):
                logger.warning(f"{owner.__name__}.{name} is never called: {replaced.remedy}")
                break


def _message(name: str, remedy: str) -> str:
    return f"{name} of the public suite has no place here: {remedy}"
