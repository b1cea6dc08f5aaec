"""LoRA by peft: low-rank adapters in a model's linear layers, which alone are trained; written as peft writes them.

    add_adapters(model.generator, LoraPlan(r=16, alpha=32))       # in place; the rest is frozen
    save_adapters(model.generator, folder)           # adapter_config.json and adapter_model.safetensors
    load_adapters(model.generator, folder)           # into a model without any
    merge_adapters(model)                            # W + alpha / r * B A, and plain layers again

peft replaces each linear layer by one that holds it: classes, attributes and calls of the model stay. peft's own
`PeftModel.from_pretrained` opens the folder, too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, RagConfig
from transformers.pytorch_utils import Conv1D

from rag.casting import is_adapted
from rag.errors import UserError
from rag.files import load_json, save_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names in peft's files
NAME = "default"  # of the one adapter of each layer, as peft calls it
# What peft may write of adapters that are more than B A beside W, and what it writes where they are not.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None,
         "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "target_parameters": None}  # fmt: skip


@dataclass(frozen=True)
class LoraPlan:
    """What adapters are added.

    Attributes:
        r: rows of A and columns of B.
        alpha: B A is multiplied by alpha / r.
        dropout: probability, of what A reads.
        targets: names of layers, or the ends of such names; None for all linear layers but the output layer.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def parts_of(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """What adapters can be added to, by the words of files and flags."""
    if isinstance(model.config, RagConfig):
        return {"generator": model.rag.generator, "question_encoder": model.rag.question_encoder}
    return {"generator": model}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that hold adapters, by their names."""
    return ((name, part) for name, part in model.named_modules() if is_adapted(part))


def has_adapters(model: nn.Module) -> bool:
    return next(adapted_layers(model), None) is not None


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """The name that a parameter has, or would have, in a model without adapters."""
    return name.replace(".base_layer.", ".")


def add_adapters(part: PreTrainedModel, plan: LoraPlan, flag: str = "--lora_target_modules") -> None:
    """Freeze a generator or an encoder and add adapters, which change nothing until they are trained.

    Args:
        flag: that names the layers, for the messages.

    Raises:
        UserError: peft is not installed, or there are no such layers.
    """
    layers = _target_layers(part, plan.targets, flag)
    _inject(part, plan, sorted(_short_names(part, layers)))


def plan_of(part: PreTrainedModel) -> LoraPlan:
    """The plan of a model's adapters; its targets are the whole names of the layers."""
    config = part.peft_config[NAME]
    names = tuple(sorted(name for name, _ in adapted_layers(part)))
    return LoraPlan(config.r, config.lora_alpha, config.lora_dropout, names)


def require_plan(part: PreTrainedModel, plan: LoraPlan, source: str, flags: str = "lora") -> None:
    """Raise `UserError` where a model's adapters are others than those of a plan: they could not be trained on as such.

    Args:
        source: the flag that named the checkpoint that they are of, and its value.
        flags: what the names of the plan's flags begin with.
    """
    own = plan_of(part)
    targets = tuple(sorted(_target_layers(part, plan.targets, "--lora_target_modules")))
    changes = [
        f"{name} was {was:g} and is {now:g}"
        for name, was, now in (
            (f"--{flags}_r", own.r, plan.r),
            ("--lora_alpha", own.alpha, plan.alpha),
            ("--lora_dropout", own.dropout, plan.dropout),
        )
        if was != now
    ]
    if own.targets != targets:
        changes.append(f"they were of {len(own.targets or ())} layers and would be of {len(targets)}")
    if changes:
        raise UserError(
            f"{source} has adapters of other settings ({'; '.join(changes)}); give theirs to train them on, or merge "
            "them first (consolidate_rag_checkpoint.py --merge_adapters)"
        )


def _inject(part: PreTrainedModel, plan: LoraPlan, targets: list[str]) -> None:
    peft = import_peft()
    was_training, linear = part.training, part.get_output_embeddings()
    tied = getattr(part.config, "tie_word_embeddings", None)
    config = peft.LoraConfig(
        r=plan.r,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in part.modules()),
    )
    peft.inject_adapter_in_model(config, part, adapter_name=NAME)
    part.requires_grad_(False)
    for name, weight in part.named_parameters():
        weight.requires_grad_(is_adapter_weight(name))
    part.train(was_training)  # peft's layers are made in training mode
    assert part.get_output_embeddings() is linear and getattr(part.config, "tie_word_embeddings", None) == tied


def import_peft() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA's adapters need a package that is not installed: pip install peft") from error
    return peft


def _linear_layers(part: PreTrainedModel) -> list[str]:
    """The names of all that can have adapters: not the output layer, whose weights are often the embeddings'."""
    output = part.get_output_embeddings()
    inside = {f"{name}.{inner}" for name, layer in adapted_layers(part) for inner, _ in layer.named_modules() if inner}
    return [
        name
        for name, layer in part.named_modules()
        if layer is not output and name not in inside and (isinstance(layer, nn.Linear | Conv1D) or is_adapted(layer))
    ]


def _target_layers(part: PreTrainedModel, targets: tuple[str, ...] | None, flag: str) -> list[str]:
    """The whole names of the layers that are named by their ends."""
    layers = _linear_layers(part)
    if targets is None:
        return layers
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if missing := [target for target, names in found.items() if not names]:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"{flag} {' '.join(missing)}: a {part.config.model_type} model has no such linear layers; it has "
            f"{' '.join(kinds[:12])}"
        )
    return [name for name in layers if any(name in names for names in found.values())]


def _short_names(part: PreTrainedModel, layers: list[str]) -> set[str]:
    """The last words of the layers' names, and the whole name where that word is another part's, too."""
    chosen = set(layers)
    others = {name.rpartition(".")[2] for name, _ in part.named_modules() if name not in chosen}
    return {name if (last := name.rpartition(".")[2]) in others else last for name in layers}


def learning_summary(model: PreTrainedModel, beside: PreTrainedModel | None = None) -> str:
    """One line: what of a model learns, and of another one that is trained with it."""
    both = [model] if beside is None else [model, beside]
    weights = {id(weight): weight for part in both for weight in part.parameters()}.values()
    learning = sum(weight.numel() for weight in weights if weight.requires_grad)
    whole = sum(_size(weight) for weight in weights)
    parts = []
    for name, part in parts_of(model).items():
        if has_adapters(part):
            plan = plan_of(part)
            parts.append(f"LoRA r {plan.r} on {len(plan.targets or ())} layers of the {name.replace('_', ' ')}")
    what = f"{' and '.join(parts)}: " if parts else ""
    return f"{what}{_millions(learning)} of {_millions(whole)} parameters learn"


def _size(weight: torch.Tensor) -> int:
    """Parameters, of which bitsandbytes puts two into a byte."""
    return weight.numel() if weight.dtype != torch.uint8 else 2 * weight.numel()


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


# --- Files ------------------------------------------------------------------------------------------------------------


def save_adapters(part: PreTrainedModel, folder: Path) -> None:
    """Write a model's adapters as peft does, the same bytes for the same adapters."""
    peft = import_peft()
    folder.mkdir()
    weights = peft.get_peft_model_state_dict(part, adapter_name=NAME, save_embedding_layers=False)
    contiguous = {f"{PEFT_PREFIX}{name}": weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # Of the sets in it the order is chance.
    settings = json.loads(json.dumps(part.peft_config[NAME].to_dict(), default=sorted))
    settings |= {"inference_mode": True, "target_modules": sorted(settings["target_modules"])}
    save_json(settings, folder / CONFIG_FILE)


def load_adapters(part: PreTrainedModel, folder: Path) -> None:
    """Add the adapters that a folder holds, frozen, to a model that has none.

    Raises:
        UserError: peft is not installed.
        ValueError: they are others than `save_adapters` writes, or of another model.
    """
    peft = import_peft()
    plan = _read_plan(folder)
    assert plan.targets is not None
    _inject(part, plan, list(plan.targets))
    weights = load_file(folder / WEIGHTS_FILE)
    own = {name.removeprefix(PEFT_PREFIX): weight for name, weight in weights.items()}
    expected = peft.get_peft_model_state_dict(part, adapter_name=NAME, save_embedding_layers=False)
    if expected.keys() != own.keys():
        odd = sorted(expected.keys() ^ own.keys())
        raise ValueError(f"its adapters are of another model: {len(odd)} of their names differ, such as {odd[0]}")
    peft.set_peft_model_state_dict(part, own, adapter_name=NAME)
    part.requires_grad_(False)


def _read_plan(folder: Path) -> LoraPlan:
    """Of a stranger's file no more is taken than what plain LoRA needs: peft would import modules that it names."""
    settings = load_json(folder / CONFIG_FILE)
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG_FILE} holds no settings")
    odd = [name for name, value in PLAIN.items() if settings.get(name, value) not in (value, None)]
    if odd:
        raise ValueError(f"its adapters are no plain LoRA ({odd[0]} is {settings[odd[0]]!r})")
    numbers: list[Any] = [settings.get(name) for name in ("r", "lora_alpha", "lora_dropout")]
    targets = settings.get("target_modules")
    are_numbers = type(numbers[0]) is int and numbers[0] > 0 and all(isinstance(one, int | float) for one in numbers)
    if not are_numbers or not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{CONFIG_FILE} holds no r, alpha, dropout and names of layers")
    return LoraPlan(numbers[0], numbers[1], numbers[2], tuple(targets))


# --- Merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights that they belong to, and leave plain layers in their places, which may learn."""
    for name, layer in list(adapted_layers(model)):
        layer.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    for part in model.modules():
        if hasattr(part, "peft_config"):
            del part.peft_config
            part.requires_grad_(True)
