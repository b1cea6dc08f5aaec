"""Read a model's folder or hub name: weights exactly as they were saved, and one line where they cannot be read.

Code that lies beside a checkpoint is run for an encoder or a tokenizer alone, and only where `trust.code_is_allowed`;
nothing is unpickled but tensors.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, RagConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rag.errors import UserError, is_failure, one_line, raise_problems
from rag.files import LARGEST_JSON, load_json
from rag.hub import hub_is_reachable
from rag.models.custom_code import code_beside, restore_buffers
from rag.models.limits import parts_of, require_sound, settle_vector_size
from rag.models.pooled_encoder import PooledEncoderConfig
from rag.models.trust import code_is_allowed

logger = logging.getLogger(__name__)

MODEL_FLAG = "--model_name_or_path"
SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")  # of the files that are read of a checkpoint
CONTEXT_ENCODER = "rag.ctx_encoder."  # weights of end-to-end training, which other suites save in a RAG checkpoint
READ_WHOLE = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece",
              "sentence", "chat_template", "modules")  # fmt: skip
NOT_RUN = {"trust_remote_code": False}  # left out, transformers asks on standard input


def load_config(
    path: str,
    cache_dir: str | None = None,
    flag: str = MODEL_FLAG,
    *,
    of_encoder: bool = False,
    for_other_parts: bool = False,
) -> PreTrainedConfig:
    """The config at `path` (folder or hub name), or a `UserError` that names `flag`.

    A family that transformers has is read by its own code where that beside the checkpoint may not be run, and the
    config then names none (no auto_map).

    Args:
        of_encoder: its class may be code beside it, where such is allowed.
        for_other_parts: of a RAG model's only what is beside the configs of its parts is used.
    """
    run = of_encoder and code_is_allowed()
    access = {"cache_dir": cache_dir, **hub_access(path)}
    with checkpoint_errors(flag, path), code_beside(path, **access):
        config = AutoConfig.from_pretrained(path, trust_remote_code=run, **access)
        if isinstance(config, RagConfig) and not for_other_parts:
            settle_vector_size(config, path, flag)
    if of_encoder and not run and getattr(config, "auto_map", None):
        _warn_of_code(path, flag, config.model_type)
    _drop_code(config, keep=run)
    require_sound(config, path, flag)
    return config


def _drop_code(config: PreTrainedConfig, keep: bool) -> None:
    """Make a config, and those inside it, name no code; transformers would ask on standard input whether to run it.

    Args:
        keep: what the config itself names. What a pooled encoder's backbone names is kept: it was allowed, or refused.
    """
    parts = parts_of(config)
    kept = [config] if keep else []
    kept += [part.backbone for part in parts if isinstance(part, PooledEncoderConfig)]
    for part in parts:
        if hasattr(part, "auto_map") and not any(part is one for one in kept):
            del part.auto_map


@cache
def _warn_of_code(path: str, flag: str, family: str) -> None:
    """Once: the vectors may be others than the encoder's authors meant."""
    logger.warning(
        f"{flag} {path} is read as transformers' own {family}, and the code beside it is not run; give "
        "--trust_remote_code if you trust it"
    )


def load_weights(
    model_class, path: str, flag: str, *, without_heads: bool = False, with_pooler: bool = False, **kwargs
) -> PreTrainedModel:
    """`from_pretrained` that refuses to start any weight at random, to leave one out or to take one that is no number.

    Args:
        without_heads: leave out what the checkpoint has beside the model, as a language model's output layer beside an
            encoder, and say so. What would belong inside the model is still refused: it has fewer layers than that.
        with_pooler: BERT's pooler is a part of the model, as of a classifier.
    """
    cache_dir = kwargs.pop("cache_dir", None)
    access = {"cache_dir": cache_dir, **hub_access(path)}
    _require_own_shards(path, cache_dir, flag)
    with checkpoint_errors(flag, path), _quiet_transformers(), code_beside(path, **access):
        model, info = model_class.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **access, **NOT_RUN, **kwargs
        )
        restore_buffers(model)
    # BERT's pooler is part of many encoder checkpoints, and of no encoder that is used here.
    missing, unexpected = (
        sorted(key for key in info[f"{kind}_keys"] if with_pooler or "pooler.dense" not in key)
        for kind in ("missing", "unexpected")
    )
    if without_heads:
        heads = [key for key in unexpected if _is_beside(model, key)]
        unexpected = [key for key in unexpected if key not in heads]
        if heads:
            parts = ", ".join(dict.fromkeys(key.split(".")[0] for key in heads))
            logger.warning(
                f"{flag} {path}: {len(heads)} weights of its head ({parts}) are left out: an encoder has none"
            )
    if any(key.startswith(CONTEXT_ENCODER) for key in unexpected):
        unexpected = [key for key in unexpected if not key.startswith(CONTEXT_ENCODER)]
        logger.warning(
            f"{flag} {path}: the weights of its context encoder ({CONTEXT_ENCODER}*) are left out: it has none"
        )
    name = model_class.__name__
    counts = {f"lacks {len(missing)} of {name}'s weights": missing, f"has {len(unexpected)} weights more": unexpected}
    raise_problems(
        [
            f"{flag} {path} {what} ({', '.join(keys[:3])}, ...); give a whole checkpoint of this model"
            for what, keys in counts.items()
            if keys
        ]
        + not_finite_problems(model, path, flag)
    )
    return model


def _require_own_shards(path: str, cache_dir: str | None, flag: str) -> None:
    """Raise `UserError` where a checkpoint's list of files names one outside of its folder."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        files = (read_json(path, name, cache_dir, flag) or {}).get("weight_map")
        for file in files.values() if isinstance(files, dict) else []:
            if Path(str(file)).name != file:
                raise UserError(
                    f"{flag} {path}: {name} names {str(file)[:80]!r}, outside of the folder; give a whole checkpoint"
                )


def _is_beside(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to no part of the model."""
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first not in dict(model.named_children()) and first not in dict(model.named_parameters(recurse=False))


def not_finite_problems(model: torch.nn.Module, path: str, flag: str) -> list[str]:
    """A sum is no number where one of its terms is none; it takes a third of the time of looking at each weight."""
    faulty = [
        name
        for name, weight in model.named_parameters()
        if not torch.isfinite(weight.detach().sum()) and not torch.isfinite(weight).all()
    ]
    if not faulty:
        return []
    return [
        f"{flag} {path} has NaN or infinity in {len(faulty)} of its weights ({faulty[0]}, ...); "
        "give a checkpoint from before the training went astray"
    ]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own report on the weights, a table of every one of them: ours says it in a line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def checkpoint_errors(flag: str, path: str) -> Iterator[None]:
    """Turn what libraries raise about a checkpoint into one line that names the flag.

    To be put around calls of transformers, tokenizers, safetensors and torch alone. They check little of what a file
    says, so that a broken one ends wherever it is first used: any error there is the checkpoint's.
    """
    if problem := _endless_file(Path(path)):
        raise UserError(f"{flag} {path}: {problem}; give a whole checkpoint")
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{flag} {path} needs code that lies beside it, {_why_not_run()}") from error
        raise UserError(
            f"{flag} {path} {_reason(path, error)}; give the folder of a checkpoint or the name of one"
        ) from error


def _endless_file(folder: Path) -> str | None:
    """What keeps a local checkpoint's files from being read to their end, as a pipe without a writer, if anything."""
    for file in (file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.suffix in SUFFIXES):
        if file.exists() and not (file.is_file() or file.is_dir()):
            return f"{file} is a pipe or a device, not a file"
        if file.name.startswith(READ_WHOLE) and file.is_file() and (size := file.stat().st_size) > LARGEST_JSON:
            return f"{file} has {size:,} bytes, more than any of its kind"
    return None


def _why_not_run() -> str:
    if code_is_allowed():
        return "which is run of encoders and tokenizers alone; give a model that transformers has"
    return "which is not run; give --trust_remote_code if you trust it"


def _reason(path: str, error: BaseException) -> str:
    text = one_line(error) or type(error).__name__
    if "Weights only load failed" in text:
        return "holds a pickle that is more than tensors, which is never unpickled: safetensors hold weights alone"
    if path and Path(path).is_dir():
        if isinstance(error, RecursionError):
            text = "a file of it is nested too deeply"
        return f"cannot be loaded: {text[:200]}"
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path or Path(path).exists():
        return "is not a folder"
    if not isinstance(error, (OSError, ValueError)):
        return f"cannot be loaded: {text[:200]}"
    if hub_is_reachable():
        return "is neither a folder nor known to the model hub"
    return "is not a folder, the model hub cannot be reached and its cache does not hold it"


def hub_access(path: str) -> dict[str, bool]:
    """Arguments that keep transformers from trying an unreachable hub for half a minute a file."""
    return {"local_files_only": Path(path).is_dir() or not hub_is_reachable()}


def checkpoint_file(path: str, name: str, cache_dir: str | None, revision: str | None = None) -> str | None:
    """Where a file of the checkpoint at `path` (folder or hub name) lies here; None where it has none.

    Args:
        revision: commit on the hub; None for the newest, and for a folder.
    """
    return cached_file(
        path,
        name,
        cache_dir=cache_dir,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_access(path),
    )


def read_json(path: str, name: str, cache_dir: str | None = None, flag: str = MODEL_FLAG, kind: type = dict) -> Any:
    """A JSON file of the checkpoint at `path` (folder or hub name); None where it has none.

    Raises:
        UserError: it is no JSON, or not of this kind.
    """
    with checkpoint_errors(flag, path):
        file = checkpoint_file(path, name, cache_dir)
        content = None if file is None else load_json(file)
    if content is not None and not isinstance(content, kind):
        what = "an object" if kind is dict else "a list"
        raise UserError(f"{flag} {path}: {name} holds a {type(content).__name__}, not {what}; give a whole checkpoint")
    return content
