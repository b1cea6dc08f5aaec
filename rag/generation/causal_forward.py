"""A language model's layers over a row of tokens, forwards alone: few operators, and products that suit few rows.

    layers = ForwardLayers(generator)               # where causal_layers.is_plain; once for a batch of questions
    hidden = layers(ids, positions, attention)      # (T) ids to (T, d); attention is a LayerAttention

Results are those of transformers' modules. Weights are cast to the dtype in which they are multiplied once, here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from rag.casting import dtype_of_layers
from rag.generation.causal_layers import (
    PRODUCTS,
    Linear,
    activation_of,
    full,
    linears_of,
    rotate,
    rotations,
    window_of,
)
from rag.generation.token_trees import product
from rag.packing import LayerAttention


class ForwardLayers:
    def __init__(self, generator):
        self.base = generator.base_model
        dtype = dtype_of_layers(generator.device) or generator.dtype
        self.layers = [_Layer(layer, dtype) for layer in self.base.layers]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """The last hidden states (T, d) of token ids (T) at positions (T)."""
        hidden = self.base.embed_tokens(ids)
        rotation_of = rotations(self.base, hidden, positions)
        with torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):

                def attend(query, key, value, layer=layer, number=number):
                    """(T, heads, head size) and twice (T, key heads, head size) to (T, heads * head size)."""
                    query, key, value = (heads.transpose(0, 1)[None] for heads in (query, key, value))
                    attended = attention.of_layer(number, query, key, value, 0.0, layer.scale, layer.window)
                    return attended[0].flatten(1)

                hidden = layer(hidden, rotation_of(layer.layer), attend)
            return self.base.norm(hidden)


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype):
        attention = layer.self_attn
        self.layer, self.dtype = layer, dtype
        self.scale, self.window, self.head_size = attention.scaling, window_of(attention), attention.head_dim
        self.key_heads, self.rotates = attention.config.num_key_value_heads, getattr(attention, "use_rope", True)
        self.activation = activation_of(layer.mlp)
        self.qkv, self.out, self.wide, self.narrow = (_Product(linears_of(layer, name), dtype) for name in PRODUCTS)
        self.head_norms = [_Norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        before_wide = "post_attention_layernorm"
        behind: list[str | None] = [None, None]
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma3's
            before_wide, behind = "pre_feedforward_layernorm", [before_wide, "post_feedforward_layernorm"]
        self.norm, self.norm_before_wide = _Norm(layer.input_layernorm), _Norm(getattr(layer, before_wide))
        self.norms_behind = [_same if name is None else _Norm(getattr(layer, name)) for name in behind]

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        heads = self.qkv(self.norm(hidden).to(self.dtype)).unflatten(1, (-1, self.head_size))
        sizes = [heads.shape[1] - 2 * self.key_heads, self.key_heads]
        turned, value = heads.split([sum(sizes), self.key_heads], 1)
        if self.head_norms:
            parts = zip(self.head_norms, turned.split(sizes, 1), strict=True)
            turned = torch.cat([norm(part) for norm, part in parts], 1)
        if self.rotates:
            rotate(turned, *rotation)
        behind_attention, behind_narrow = self.norms_behind
        hidden = hidden + behind_attention(self.out(attend(*turned.split(sizes, 1), value)))
        wide = self.wide.parts(self.norm_before_wide(hidden).to(self.dtype))
        gate, up = wide if len(wide) == 2 else wide[0].chunk(2, 1)
        return hidden + behind_narrow(self.narrow(self.activation(gate).mul_(up)))


def _same(rows: Tensor) -> Tensor:
    return rows


class _Norm:
    """RMSNorm over the last dimension."""

    def __init__(self, module: Any):
        is_gemma = hasattr(module, "eps")  # whose weights are what is added to one
        self.weight = full(module.weight) + 1.0 if is_gemma else full(module.weight)
        self.eps = module.eps if is_gemma else module.variance_epsilon

    def __call__(self, rows: Tensor) -> Tensor:
        return rms_norm(full(rows), self.weight.shape, self.weight, self.eps).to(rows.dtype)


class _Product:
    """What linear layers make of the same rows, side by side, adapters included: (T, inputs) to (T, outputs of all)."""

    def __init__(self, linears: list[Linear], dtype: torch.dtype):
        self.linears = [linear.cast_to(dtype) for linear in linears]

    def __call__(self, rows: Tensor) -> Tensor:
        made = self.parts(rows)
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The same, each layer's own."""
        return [self._one(linear, rows) for linear in self.linears]

    def _one(self, linear: Linear, rows: Tensor) -> Tensor:
        out = product(rows, linear.weight)
        if linear.bias is not None:
            out += linear.bias
        if linear.adapter is not None:
            out.addmm_(rows @ linear.adapter.a.t(), linear.adapter.b.t(), alpha=linear.adapter.scale)
        return out
