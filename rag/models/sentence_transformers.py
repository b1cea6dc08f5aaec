"""What a sentence-transformers folder says of its encoder: pooling, dense layers, prompts, lengths.

    card = read_card("path/to/e5", None, "--question_encoder_name_or_path")     # None for a plain encoder
    card.settings                                  # keyword arguments of PooledEncoderConfig

Layouts old (`pooling_mode_mean_tokens`, `sentence_bert_config.json`, weights in `0_Transformer`) and new
(`pooling_mode`) are read, without the package of that name.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rag.errors import UserError
from rag.models.loading import checkpoint_errors, checkpoint_file, read_json
from rag.models.pooled_encoder import ACTIVATIONS, POOLINGS

OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
NEW_MODES = {"lasttoken": "last"}
LENGTH_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# The names that a prompt of a role may have, the first one that is there counts; else the default prompt, unless it is
# one of the other role's.
PROMPT_NAMES = {"query": ("query", "question"), "passage": ("document", "passage", "corpus")}


@dataclass
class Card:
    """An encoder as its authors meant it.

    Attributes:
        folder: of the transformer itself.
        settings: keyword arguments of `PooledEncoderConfig`.
        dense: the weights of the dense layers, in their order.
    """

    folder: str
    settings: dict[str, Any]
    dense: list[dict[str, torch.Tensor]] = field(default_factory=list)


def read_card(path: str, cache_dir: str | None, flag: str) -> Card | None:
    """What the folder or hub name at `path` says; None where it is no sentence-transformers model.

    Raises:
        UserError: it says what cannot be read, or a file of it is broken.
    """
    modules = read_json(path, "modules.json", cache_dir, flag, list)
    if modules is None:
        return None
    with checkpoint_errors(flag, path):  # JSON of any shape
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        folders = [str(module.get("path", "")) for module in modules]
    layers = [kind for kind in kinds if kind != "Dropout"]
    dense_layers = layers[2 : len(layers) - (layers[-1:] == ["Normalize"])]
    if layers[:2] != ["Transformer", "Pooling"] or set(dense_layers) - {"Dense"}:
        raise UserError(
            f"{flag} {path} has the layers {', '.join(kinds)}; only Pooling, Dense and Normalize can be read, in this "
            "order"
        )
    at = dict(zip(kinds, folders, strict=True))
    settings: dict[str, Any] = {"normalize": "Normalize" in layers}
    settings |= _prompts(path, cache_dir, flag)
    settings |= _pooling(
        path, at["Pooling"], cache_dir, flag, bool(settings["query_prompt"] or settings["passage_prompt"])
    )
    settings |= _lengths(path, at["Transformer"], cache_dir, flag)
    dense = [
        _dense(path, folder, cache_dir, flag) for kind, folder in zip(kinds, folders, strict=True) if kind == "Dense"
    ]
    settings["dense"] = [layer for layer, _ in dense] or None
    folder = _transformer(path, at["Transformer"], flag)
    return Card(folder, settings, [weights for _, weights in dense])


def transformer_folder(path: str, cache_dir: str | None, flag: str) -> str:
    """Where config, weights and tokenizer of the model at `path` lie: older folders have these in one of their own."""
    modules = read_json(path, "modules.json", cache_dir, flag, list) or []
    first = modules[0] if modules and isinstance(modules[0], dict) else {}
    return _transformer(path, str(first.get("path", "")), flag)


def _transformer(path: str, folder: str, flag: str) -> str:
    if not folder.strip("./"):
        return path
    if not Path(path, folder).is_dir():
        raise UserError(
            f"{flag} {path}: modules.json names the folder {folder}, which is not there; give a whole folder"
        )
    return str(Path(path, folder))


def _pooling(path: str, folder: str, cache_dir: str | None, flag: str, has_prompts: bool) -> dict[str, Any]:
    config = _needed(path, f"{folder}/config.json", cache_dir, flag)
    mode = config.get("pooling_mode")
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    if mode is None and len(modes) == 1:
        mode = OLD_MODES.get(modes[0])
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    mode = NEW_MODES.get(mode, mode) if isinstance(mode, str) else None
    if mode not in POOLINGS:
        raise UserError(f"{flag} {path} pools by {config}; only one of {', '.join(POOLINGS)} can be read")
    if has_prompts and config.get("include_prompt") is False:
        raise UserError(f"{flag} {path} pools without its prompts (include_prompt false), which cannot be read")
    return {"pooling": mode}


def _prompts(path: str, cache_dir: str | None, flag: str) -> dict[str, str]:
    config = read_json(path, "config_sentence_transformers.json", cache_dir, flag) or {}
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    texts = prompts.values() if isinstance(prompts, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or (default is not None and default not in prompts):
        raise UserError(
            f"{flag} {path}: config_sentence_transformers.json has the prompts {prompts} and the default {default}; "
            "prompts are texts by their names"
        )

    def prompt(role: str) -> str:
        names = [name for name in PROMPT_NAMES[role] if name in prompts]
        others = [name for own, named in PROMPT_NAMES.items() if own != role for name in named]
        if not names and default is not None and default not in others:
            names = [default]
        return prompts[names[0]] if names else ""

    return {"query_prompt": prompt("query"), "passage_prompt": prompt("passage")}


def _lengths(path: str, folder: str, cache_dir: str | None, flag: str) -> dict[str, Any]:
    places = [f"{folder}/{name}".lstrip("./") for name in LENGTH_FILES]
    config: dict = next(
        (found for place in places if (found := read_json(path, place, cache_dir, flag)) is not None), {}
    )
    length, lower_case = config.get("max_seq_length"), config.get("do_lower_case", False)
    if (length is not None and (type(length) is not int or length < 1)) or not isinstance(lower_case, bool):
        raise UserError(
            f"{flag} {path}: max_seq_length {length} and do_lower_case {lower_case} are no number of tokens and no "
            "true or false; mend its sentence_bert_config.json"
        )
    return {"max_seq_length": length, "lower_case": lower_case}


def _dense(path: str, folder: str, cache_dir: str | None, flag: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A dense layer as PooledEncoderConfig has it, and its weights."""
    config = _needed(path, f"{folder}/config.json", cache_dir, flag)
    activation = str(config.get("activation_function", "")).rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise UserError(f"{flag} {path} has the activation {activation}; only {', '.join(ACTIVATIONS)} can be read")
    with checkpoint_errors(flag, path):
        if (file := checkpoint_file(path, f"{folder}/model.safetensors", cache_dir)) is not None:
            weights = load_file(file)
        elif (file := checkpoint_file(path, f"{folder}/pytorch_model.bin", cache_dir)) is not None:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise OSError(f"{folder} has no weights")
        weights = {name.removeprefix("linear."): weight.float() for name, weight in weights.items()}
        out_features, in_features = weights["weight"].shape
    layer = {"in_features": in_features, "out_features": out_features, "bias": "bias" in weights}
    return layer | {"activation": activation}, weights


def _needed(path: str, name: str, cache_dir: str | None, flag: str) -> dict:
    if (content := read_json(path, name, cache_dir, flag)) is None:
        raise UserError(f"{flag} {path}: {name} is missing; give a whole folder")
    return content
