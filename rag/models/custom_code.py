"""Encoders whose classes are code beside a checkpoint (`auto_map`): found, kept with a RAG checkpoint, found again.

    with code_beside("path/to/encoder"):
        model_class = custom_model_class(config)     # None for a model of transformers
    name_own_code(config, backbone)
    save_code(model, folder)                         # the files that those names speak of

transformers runs such code for a checkpoint's own class alone. An encoder inside a RAG model is a part of one, and its
classes are found here. Nothing is run unless `trust.code_is_allowed`.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from rag.errors import UserError
from rag.models.trust import code_is_allowed

# Where the checkpoint that is being opened lies, as arguments of get_class_from_dynamic_module.
_place: ContextVar[dict[str, Any] | None] = ContextVar("_place", default=None)


@contextmanager
def code_beside(path: str, **access: Any) -> Iterator[None]:
    """Let parts of configs and models that are built in the block find their code at `path` (folder or hub name).

    Args:
        access: cache_dir and local_files_only, as `from_pretrained` takes them.
    """
    token = _place.set({"pretrained_model_name_or_path": path, **access})
    try:
        yield
    finally:
        _place.reset(token)


def is_custom(kind: type) -> bool:
    """Whether a class is code that lay beside a checkpoint."""
    return kind.__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def nested_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a model's part, from its dict.

    Raises:
        ValueError: its class is code that may not be run, or no class that there is.
    """
    kind = _named_class(settings.get("auto_map"), "AutoConfig")
    return AutoConfig.for_model(**settings) if kind is None else kind(**settings)


def custom_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The encoder's class that a config names beside the checkpoint; None where it names none.

    Raises:
        ValueError: it is code that may not be run.
    """
    return _named_class(getattr(config, "auto_map", None), "AutoModel")


def _named_class(auto_map: Mapping[str, Any] | None, name: str) -> Any:
    if not auto_map:
        return None
    place = _place.get()
    if place is None or not code_is_allowed():
        raise ValueError("a part of it is code, and trust_remote_code was not given")
    return get_class_from_dynamic_module(auto_map[name], **place) if name in auto_map else None


def name_own_code(config: PreTrainedConfig, backbone: PreTrainedModel) -> None:
    """Make a config name its code by the files that `save_code` will write, whatever repository they came from."""
    kinds = {"AutoConfig": type(config), "AutoModel": type(backbone)}
    names = {
        name: f"{kind.__module__.split('.')[-1]}.{kind.__name__}" for name, kind in kinds.items() if is_custom(kind)
    }
    if names:
        config.auto_map = names
    elif hasattr(config, "auto_map"):
        del config.auto_map


def code_files(model: PreTrainedModel) -> list[Path]:
    """The files of a model's custom parts and of what they import of their neighbors, by name; none for most models."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    kinds = {type(thing) for part in parts for thing in (part, part.config) if is_custom(type(thing))}
    files = {str(sys.modules[kind.__module__].__file__) for kind in kinds}
    files |= {str(neighbor) for file in files for neighbor in get_relative_import_files(file)}
    return sorted(map(Path, files), key=lambda file: file.name)


def save_code(model: PreTrainedModel, folder: Path) -> None:
    """Copy a model's code into a folder.

    Raises:
        UserError: two different files have one name.
    """
    for file in code_files(model):
        _copy(file, folder)


def gather_tokenizer_code(folder: Path) -> None:
    """Move the code of a RAG checkpoint's two tokenizers to where transformers looks for it: beside config.json.

    Raises:
        UserError: two different files have one name.
    """
    for file in sorted(folder.glob("*_tokenizer/*.py")):
        _copy(file, folder)
        file.unlink()


def _copy(file: Path, folder: Path) -> None:
    target = folder / file.name
    if target.exists() and target.read_bytes() != file.read_bytes():
        raise UserError(
            f"the parts of the model bring two different files {file.name} of code, and a checkpoint has room for "
            "one; rename one of them, and what auto_map says of it"
        )
    shutil.copyfile(file, target)


def restore_buffers(model: PreTrainedModel) -> None:
    """Compute again what custom code keeps beside its weights and does not save, as tables of positions.

    transformers builds a model without any memory before it fills in weights, and has its own models' `_init_weights`
    compute such tables a second time. Code that was written for transformers 4 does not: it would be left with whatever
    the memory held.
    """
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and is_custom(type(part)))
    if (part := next(parts, None)) is None:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        fresh = type(part)(part.config)
        saved = fresh.state_dict().keys()
        for name, buffer in fresh.named_buffers():
            if name not in saved:
                part.get_buffer(name).copy_(buffer)
