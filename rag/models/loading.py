"""Read a model's folder or hub name: weights exactly as they were saved, and one line where they cannot be read."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from rag.errors import UserError, raise_problems
from rag.files import load_json
from rag.hub import hub_is_reachable

MODEL_FLAG = "--model_name_or_path"


def load_config(path: str, cache_dir: str | None = None, flag: str = MODEL_FLAG) -> PreTrainedConfig:
    """The config at `path` (folder or hub name), or a `UserError` that names `flag`."""
    with checkpoint_errors(flag, path):
        return AutoConfig.from_pretrained(path, cache_dir=cache_dir, **hub_access(path))


def load_weights(model_class, path: str, flag: str, **kwargs) -> PreTrainedModel:
    """`from_pretrained` that refuses to start any weight at random or to leave one out."""
    with checkpoint_errors(flag, path), _quiet_transformers():
        model, info = model_class.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **hub_access(path), **kwargs
        )
    # BERT's pooler is part of many encoder checkpoints, and of none that is used here.
    missing, unexpected = (
        sorted(key for key in info[f"{kind}_keys"] if "pooler.dense" not in key) for kind in ("missing", "unexpected")
    )
    name = model_class.__name__
    counts = {f"lacks {len(missing)} of {name}'s weights": missing, f"has {len(unexpected)} weights more": unexpected}
    raise_problems(
        [
            f"{flag} {path} {what} ({', '.join(keys[:3])}, ...); give a whole checkpoint of this model"
            for what, keys in counts.items()
            if keys
        ]
    )
    return model


@contextmanager
def _quiet_transformers():
    """Without transformers' own report on the weights, a table of every one of them: ours says it in a line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def checkpoint_errors(flag: str, path: str):
    """Turn what transformers raises about a checkpoint into one line that names the flag."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if Path(path).is_dir():
            reason = f"cannot be loaded: {' '.join(str(error).split())[:200]}"
        elif path.startswith((".", "/", "~")) or path.count("/") > 1:
            reason = "is not a folder"
        elif hub_is_reachable():
            reason = "is neither a folder nor known to the model hub"
        else:
            reason = "is not a folder, the model hub cannot be reached and its cache does not hold it"
        raise UserError(f"{flag} {path} {reason}; give the folder of a checkpoint or the name of one") from error


def hub_access(path: str) -> dict:
    """Arguments that keep transformers from trying an unreachable hub for half a minute a file."""
    return {"local_files_only": Path(path).is_dir() or not hub_is_reachable()}


def read_json(path: str, name: str, cache_dir: str | None = None) -> Any:
    """A JSON file of the checkpoint at `path` (folder or hub name); None where it has none."""
    file = cached_file(
        path,
        name,
        cache_dir=cache_dir,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_access(path),
    )
    return None if file is None else load_json(file)
