"""Checkpoints of what was trained alone: adapters, and whole weights of what else learned. The rest is its base's.

    base = base_of("path/to/rag", flag="--model_name_or_path")     # of a run that starts from there
    save_learned(model, folder, base)                              # base.json, adapters, trained.safetensors
    base = read_base("output/checkpoint3")                         # None of a whole checkpoint
    load_learned(model, "output/checkpoint3")                      # into a model with the base's weights

`base.json` names the base by its absolute path or its name on the hub, and by a digest of its weights: what was learned
beside other weights means nothing.
"""

import copy
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, RagConfig

from rag.checksums import file_checksum, found_once
from rag.errors import UserError, raise_problems
from rag.files import json_digest, save_json
from rag.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    has_adapters,
    is_adapter_weight,
    load_adapters,
    parts_of,
    plain_name,
    save_adapters,
)
from rag.models.loading import (
    MODEL_FLAG,
    checkpoint_errors,
    checkpoint_file,
    not_finite_problems,
    read_json,
)

BASE_FILE, TRAINED_FILE = "base.json", "trained.safetensors"
WHOLE_FILES, OF_SHARDS = ("model.safetensors", "pytorch_model.bin"), ".index.json"  # the first that is there is read
ADAPTER = "_adapter"  # behind the name of a part: the folder of its adapters
PARTS = (f"generator{ADAPTER}", f"question_encoder{ADAPTER}", TRAINED_FILE)
SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # in the paths of the hub's cache


@dataclass(frozen=True)
class Base:
    """The checkpoint that a training started from, whose frozen weights are not written again.

    Attributes:
        name_or_path: absolute path, or name on the hub.
        digest: of the files of its weights.
        revision: the commit, where it is from the hub's cache.
        quantization: "4bit" or "8bit", as whose copy its generator was read in training; None for its own precision.
        changed: names of weights that an earlier training changed, which are written again.
        holds: what lies beside a checkpoint's `base.json`: folders of adapters, and the file of whole weights.
    """

    name_or_path: str
    digest: str
    revision: str | None = None
    quantization: str | None = None
    changed: frozenset[str] = frozenset()
    holds: tuple[str, ...] = ()


def base_of(path: str, quantization: str | None = None, cache_dir: str | None = None, flag: str = MODEL_FLAG) -> Base:
    """The base of a training that starts from the checkpoint at `path`: of one that has a base, that.

    Reads every byte of the weights, once for each file as long as it stays as it is.

    Raises:
        UserError: the base cannot be read.
    """
    if (base := read_base(path, cache_dir, flag)) is not None:
        return replace(base, quantization=quantization)
    with checkpoint_errors(flag, path):
        files = _weight_files(path, cache_dir, None)
        match = SNAPSHOT.search(files[0])
        is_local = Path(path).is_dir()
        name = os.path.abspath(path) if is_local else path
        return Base(name, _digest(files), None if is_local or match is None else match[1], quantization)


def read_base(path: str, cache_dir: str | None = None, flag: str = MODEL_FLAG) -> Base | None:
    """What `base.json` says; None where there is none, as in a whole checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    content = read_json(path, BASE_FILE, cache_dir, flag)
    if content is None:
        return None
    values = {name: content.get(name) for name in ("name_or_path", "digest", "revision", "quantization")}
    texts = [value for name, value in values.items() if value is not None or name in ("name_or_path", "digest")]
    holds = content.get("holds")
    are_names = isinstance(holds, list) and all(name in PARTS for name in holds)
    if not are_names or not all(isinstance(value, str) and value for value in texts):
        raise UserError(
            f"{flag} {path}: {BASE_FILE} does not name its base and the digest of it; give a whole checkpoint"
        )
    changed: frozenset[str] = frozenset()
    with checkpoint_errors(flag, path):
        if (file := checkpoint_file(path, TRAINED_FILE, cache_dir)) is not None:
            with safe_open(file, "pt") as trained:
                changed = frozenset(trained.keys())
    return Base(**values, changed=changed, holds=tuple(holds))


def require_base(base: Base, path: str, cache_dir: str | None = None, flag: str = MODEL_FLAG) -> None:
    """Raise `UserError` unless the base of the checkpoint at `path` is there, and is the one that it was."""
    remedy = f"put it back, or write where it is as name_or_path into {Path(path) / BASE_FILE}"
    name = base.name_or_path
    try:
        with checkpoint_errors("its base", name):
            files = _weight_files(name, cache_dir, base.revision)
            digest = _digest(files)
    except UserError as error:
        raise UserError(
            f"{flag} {path} holds what was trained of a model whose base cannot be read: {error}; {remedy}"
        ) from error
    if digest != base.digest:
        raise UserError(
            f"{flag} {path} holds adapters of another base: the weights at {name} are not those that it was trained "
            f"on; {remedy}"
        )


def _weight_files(path: str, cache_dir: str | None, revision: str | None) -> list[str]:
    """The files that transformers reads the weights of a checkpoint from, by their names' order.

    Raises:
        OSError: it has none.
    """

    def file_of(name: str) -> str | None:
        return checkpoint_file(path, name, cache_dir, revision)

    for whole in WHOLE_FILES:
        if (file := file_of(whole)) is not None:
            return [file]
        if file_of(f"{whole}{OF_SHARDS}") is not None:
            listed = (read_json(path, f"{whole}{OF_SHARDS}", cache_dir) or {}).get("weight_map")
            shards = sorted(set(listed.values())) if isinstance(listed, dict) else []
            files = [file for shard in shards if (file := file_of(str(shard))) is not None]
            if shards and len(files) == len(shards):
                return files
            raise OSError(f"not all files of its {whole}{OF_SHARDS} are there")
    raise OSError("it holds no weights")


def _digest(files: list[str]) -> str:
    return json_digest([found_once(file, "checksum", partial(file_checksum, file)) for file in files])


# --- What was learned -------------------------------------------------------------------------------------------------


def save_learned(model: PreTrainedModel, folder: Path, base: Base) -> None:
    """Write config, adapters and what else is not the base's: what learns, and what an earlier training changed."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in (config, *([config.generator] if isinstance(config, RagConfig) else [])):
        if hasattr(part, "quantization_config"):  # of how the base was read, whose own weights are not quantized
            del part.quantization_config
    config.save_pretrained(folder)
    adapted = {f"{name}{ADAPTER}": part for name, part in parts_of(model).items() if has_adapters(part)}
    for name, part in adapted.items():
        save_adapters(part, folder / name)
    trained = {
        name: weight.detach().cpu().contiguous()
        for name, weight in ((plain_name(name), weight) for name, weight in model.named_parameters())
        if name in base.changed or (weight.requires_grad and not is_adapter_weight(name))
    }
    if trained:
        save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})
    content = {name: value for name, value in asdict(base).items() if value is not None and name != "changed"}
    save_json(content | {"holds": [*adapted, *([TRAINED_FILE] if trained else [])]}, folder / BASE_FILE)


def load_learned(
    model: PreTrainedModel, path: str, base: Base, cache_dir: str | None = None, flag: str = MODEL_FLAG
) -> None:
    """Give a model that has its base's weights what the checkpoint at `path` has learned; adapters stay apart.

    Raises:
        UserError: it is of another model, or damaged.
    """
    with checkpoint_errors(flag, path):
        files = {name: _held_file(path, name, cache_dir) for name in base.holds}
        if TRAINED_FILE in files:
            trained = load_file(files[TRAINED_FILE])
            odd = model.load_state_dict(trained, strict=False).unexpected_keys
            if odd:
                raise ValueError(f"{TRAINED_FILE} has {len(odd)} weights of another model, such as {odd[0]}")
        for name, part in parts_of(model).items():
            if f"{name}{ADAPTER}" in files:
                load_adapters(part, Path(files[f"{name}{ADAPTER}"]).parent)
        model.eval()
    raise_problems(not_finite_problems(model, path, flag))


def _held_file(path: str, name: str, cache_dir: str | None) -> str:
    """Where a checkpoint's file of whole weights lies, or the settings of its adapters beside these.

    Raises:
        OSError: one of them is gone.
    """
    wanted = [f"{name}/{CONFIG_FILE}", f"{name}/{WEIGHTS_FILE}"] if name.endswith(ADAPTER) else [name]
    files = [checkpoint_file(path, file, cache_dir) for file in wanted]
    if None in files:
        raise OSError(f"{wanted[files.index(None)]} is missing")
    return str(files[0])
