"""Layers computed in another dtype than their weights are kept in: the weights are cast once, not at every use.

    dtype = dtype_of_layers(hidden.device)       # under autocast to bfloat16; else None
    hidden = call_in(layer, dtype, hidden, mask)
    weight = weight_of(layer)                    # of a linear layer, adapters included; None where none can be had
    hold_frozen_weights(generator, dtype)        # of a model that is trained by adapters

The gradients arrive at the weights themselves, in their own dtype; an optimizer, a checkpoint and whatever reduces
gradients between processes see float32 alone.
"""

from functools import partial
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def dtype_of_layers(device: torch.device) -> torch.dtype | None:
    """What layers are to be computed in, where that is not their own; float16 ends too early for their sums."""
    if not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype == torch.bfloat16 else None


def call_in(layer: torch.nn.Module, dtype: torch.dtype | None, *args: Any, linear_only: bool = False) -> Any:
    """A layer's result, computed with its weights in another dtype.

    Args:
        dtype: None for the weights' own.
        linear_only: cast those of linear layers and leave the norms to autocast, which computes them in float32.
    """
    if dtype is None:
        return layer(*args)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return checkpoint(partial(_call_with_copies, layer, dtype, linear_only), *args, use_reentrant=False)
    return _call_with_copies(layer, dtype, linear_only, *args)


def _call_with_copies(layer: Any, dtype: torch.dtype, linear_only: bool, *args: Any) -> Any:
    weights = {
        f"{name}.{own}" if name else own: weight
        for name, module in layer.named_modules()
        if not linear_only or isinstance(module, torch.nn.Linear)
        for own, weight in module.named_parameters(recurse=False)
        if weight.dtype != dtype and weight.is_floating_point()  # what is quantized stays packed
    }
    copies = dict(zip(weights, _Copies.apply(dtype, *weights.values()), strict=True)) if weights else {}
    recomputes = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False  # what calls this does it: the copies are to be made again, too
    try:
        return functional_call(layer, copies, args)
    finally:
        layer.gradient_checkpointing = recomputes


def hold_frozen_weights(model: Any, dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers in the dtype that autocast would cast them to at each use.

    The results stay the same, and an 8B model takes 16 GB less. Embeddings and the output layer, which are often one,
    stay as they are.
    """
    output = model.get_output_embeddings()
    for layer in model.modules():
        is_linear = type(layer) is torch.nn.Linear and layer is not output
        if is_linear and layer.weight.is_floating_point() and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)


def is_adapted(layer: torch.nn.Module) -> bool:
    """Whether it is a layer of peft's, which adds what LoRA has learned to the layer that it holds."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


@torch.no_grad()
def weight_of(layer: torch.nn.Module) -> torch.Tensor | None:
    """What a linear layer multiplies by, (outputs, d), with LoRA's share; not to be trained through.

    peft's layers have a `weight`, too, which is that of the layer that they hold, without what was learned.

    Returns:
        None for a layer that keeps it in another form, as a quantized one: it has to be called.
    """
    plain: Any = layer.base_layer if is_adapted(layer) else layer
    if type(plain) is not torch.nn.Linear:
        return None
    delta: Any = getattr(layer, "get_delta_weight", None)
    return plain.weight if delta is None else plain.weight + delta("default")


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, whatever their dtypes, in one kernel."""
    torch._foreach_copy_(targets, sources)


class _Copies(torch.autograd.Function):
    """Weights in another dtype, all in one kernel; so are their gradients, back in their own."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.dtypes = [weight.dtype for weight in weights]
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        copy_all(copies, list(weights))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [n for n, is_wanted in enumerate(ctx.needs_input_grad[1:]) if is_wanted]
        own = [torch.empty_like(gradients[n], dtype=ctx.dtypes[n]) for n in wanted]
        copy_all(own, [gradients[n] for n in wanted])
        result: list[torch.Tensor | None] = [None] * len(gradients)
        for n, gradient in zip(wanted, own, strict=True):
            result[n] = gradient
        return None, *result
