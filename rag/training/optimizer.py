"""AdamW or Adafactor over the parts of a model, each with its learning rate, and the schedules.

    optimizer = build_optimizer(module, args.training)
    schedule = SCHEDULES[args.training.lr_scheduler](optimizer, warmup_steps, steps)

Biases and norms never decay.
"""

from typing import Any

import torch
from transformers import optimization

from rag.training.arguments import TrainingArguments

SCHEDULES = {
    "linear": optimization.get_linear_schedule_with_warmup,
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "cosine_w_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
}


def build_optimizer(module: torch.nn.Module, training: TrainingArguments, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the trainable parameters.

    Args:
        fused: whether AdamW updates each weight in one pass over memory, on a CPU three times as fast.
    """
    groups = parameter_groups(module, training)
    if training.adafactor:
        return optimization.Adafactor(groups, lr=training.learning_rate, scale_parameter=False, relative_step=False)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, eps=training.adam_epsilon, fused=fused)
    # Else it takes float16's gradients scaled and unscales them inside its step, too late for clipping and for the log;
    # Lightning refuses to clip then, with bfloat16 too, which is not scaled at all.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def parameter_groups(module: torch.nn.Module, training: TrainingArguments) -> list[dict[str, Any]]:
    """Trainable parameters by their part of the model and by whether they decay: vectors (biases, norms) do not.

    Each group has a "suffix" for what is logged of it: `_question_encoder`, `_context_encoder`, `_decoder`, or none for
    all else.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        suffix, learning_rate = _part_of_model(name, training)
        decays = parameter.ndim > 1
        group = groups.setdefault((suffix, decays), {"params": [], "suffix": suffix})
        group["lr"] = training.learning_rate if learning_rate is None else learning_rate
        group["weight_decay"] = training.weight_decay if decays else 0.0
        group["params"].append(parameter)
    return list(groups.values())


def _part_of_model(parameter_name: str, training: TrainingArguments) -> tuple[str, float | None]:
    if parameter_name.startswith("context_encoder."):
        return "_context_encoder", training.context_encoder_learning_rate
    if "question_encoder." in parameter_name:
        return "_question_encoder", training.question_encoder_learning_rate
    if ".decoder." in f".{parameter_name}" or "lm_head" in parameter_name:
        return "_decoder", training.decoder_learning_rate
    return "", training.learning_rate
