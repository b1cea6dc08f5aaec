"""BART's layers over packed rows with a backward pass of their own: a fraction of autograd's operators.

    if is_plain(layer):
        hidden = run_layer(layer, hidden, own)                      # encoder: (T, d) to (T, d)
        hidden = run_layer(layer, hidden, own, encoded, cross)      # decoder

Results and gradients are those of transformers' BartEncoderLayer and BartDecoderLayer. Queries, keys and values come of
one product; gradients of weights leave their products in float32; what is cheap is computed again instead of kept. A
block returns what it computed and a function for its backward pass, which notes the gradients of its weights.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer, BartEncoderLayer

from rag.casting import copy_all
from rag.packing import Attention

Backward = Callable[[Tensor], Any]
KNOWN = {BartEncoderLayer, BartDecoderLayer, BartAttention, nn.Linear, nn.LayerNorm, GELUActivation}


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is transformers' own, as it wrote it, and neither compiled nor to be recomputed."""
    if type(layer) not in (BartEncoderLayer, BartDecoderLayer) or getattr(layer, "gradient_checkpointing", False):
        return False
    return all(type(part) in KNOWN for part in layer.modules()) and not is_compiled(layer)


def is_compiled(layer: nn.Module) -> bool:
    return layer._compiled_call_impl is not None


class LayerWeights:
    """A layer's weights in another dtype, those of queries, keys and values joined.

    Attributes:
        sources: the layer's own, by name, in the order of their gradients.
        joined: weight (outputs, d) and bias (outputs) of each product ("self_attn.qkv"), and those of each norm.
    """

    def __init__(self, layer: Any, dtype: torch.dtype):
        self.sources: dict[str, nn.Parameter] = {}
        self.joined: dict[str, tuple[Tensor, Tensor]] = {}
        self._targets: list[Tensor] = []
        products = [("self_attn.qkv", [f"self_attn.{part}_proj" for part in "qkv"])]
        single = ["self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
        if hasattr(layer, "encoder_attn"):
            products.append(("encoder_attn.kv", [f"encoder_attn.{part}_proj" for part in "kv"]))
            single += ["encoder_attn.q_proj", "encoder_attn.out_proj", "encoder_attn_layer_norm"]
        self.parts = dict(products) | {name: [name] for name in single}
        for name, members in self.parts.items():
            modules = [layer.get_submodule(member) for member in members]
            pair = []
            for own in ("weight", "bias"):
                weights = [getattr(module, own) for module in modules]
                self.sources |= {f"{member}.{own}": w for member, w in zip(members, weights, strict=True)}
                whole = torch.empty(
                    sum(map(len, weights)), *weights[0].shape[1:], dtype=dtype, device=weights[0].device
                )
                self._targets += whole.split([len(weight) for weight in weights])
                pair.append(whole)
            self.joined[name] = (pair[0], pair[1])

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights, all in one kernel."""
        copy_all(self._targets, list(self.sources.values()))

    def belong_to(self, layer: Any, hidden: Tensor) -> bool:
        """Whether they are still this layer's, where and as the hidden states are."""
        joined = self.joined["fc1"][0]
        is_own = layer.fc1.weight is self.sources["fc1.weight"]
        return is_own and (joined.device, joined.dtype) == (hidden.device, hidden.dtype)

    def gradients(self, joined: dict[str, tuple[Tensor, Tensor]], wanted: list[bool]) -> list[Tensor | None]:
        """Those of `sources`, in their order and dtype, of those of `joined`, which is emptied: what nothing else holds
        becomes the weight's own gradient without a copy."""
        by_name: dict[str, Tensor] = {}
        for name, members in self.parts.items():
            for own, gradient in zip(("weight", "bias"), joined.pop(name), strict=True):
                parts = [gradient] if len(members) == 1 else gradient.chunk(len(members))
                by_name |= {f"{member}.{own}": part for member, part in zip(members, parts, strict=True)}
        return [
            by_name[name].to(source.dtype) if is_wanted else None
            for (name, source), is_wanted in zip(self.sources.items(), wanted, strict=True)
        ]


_kept: WeakKeyDictionary[nn.Module, LayerWeights] = WeakKeyDictionary()


def run_layer(layer: Any, hidden: Tensor, own: Attention, encoded: Tensor | None = None, cross: Any = None) -> Tensor:
    """What a plain layer makes of packed hidden states (T, d), in their dtype.

    Args:
        encoded: (T', d), what a decoder's layer reads, as `cross` says.
    """
    weights = _kept.get(layer)
    if weights is None or not weights.belong_to(layer, hidden):
        weights = _kept[layer] = LayerWeights(layer, hidden.dtype)
    weights.refresh()
    return _Layer.apply(layer, weights, own, cross, hidden, encoded, *weights.sources.values())


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, weights, own, cross, hidden, encoded, *sources):
        blocks = _Blocks(layer, weights)
        hidden, attention_back = blocks.self_attention(hidden, own)
        if encoded is not None:
            hidden, cross_back = blocks.cross_attention(hidden, encoded, cross)
        hidden, feed_back = blocks.feed_forward(hidden)
        ctx.weights, ctx.found = weights, blocks.gradients
        ctx.backs = [attention_back, cross_back, feed_back] if encoded is not None else [attention_back, feed_back]
        return hidden

    @staticmethod
    def backward(ctx, gradient):
        backs, ctx.backs = ctx.backs, None  # what they keep is freed as they are used
        assert backs is not None, "one backward pass"
        gradient = backs.pop()(gradient)
        to_encoded = None
        if len(backs) == 2:
            gradient, to_encoded = backs.pop()(gradient)
        gradient = backs.pop()(gradient)
        return None, None, None, None, gradient, to_encoded, *ctx.weights.gradients(ctx.found, ctx.needs_input_grad[6:])


class _Blocks:
    """The parts of one layer's forward pass, each with its backward pass.

    Attributes:
        gradients: of the joined weights by name, filled by the backward passes.
    """

    def __init__(self, layer: Any, weights: LayerWeights):
        self.layer, self.weights, self.training = layer, weights, layer.training
        self.gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def self_attention(self, hidden: Tensor, own: Attention) -> tuple[Tensor, Backward]:
        attention = self.layer.self_attn
        qkv, qkv_back = self._product("self_attn.qkv", hidden)  # (T, 3d)
        query, key, value = self._heads(qkv, 3)
        attended, attended_back = own.with_backward(query, key, value, self._rate(attention.dropout), attention.scaling)
        out, out_back = self._product("self_attn.out_proj", attended.flatten(1))
        hidden, residual_back = self._residual("self_attn_layer_norm", hidden, out)

        def back(gradient: Tensor) -> Tensor:
            to_hidden, to_out = residual_back(gradient)
            parts = attended_back(out_back(to_out).view_as(attended))
            return to_hidden.add_(qkv_back(torch.stack(parts, 1).flatten(1)))

        return hidden, back

    def cross_attention(self, hidden: Tensor, encoded: Tensor, cross: Attention) -> tuple[Tensor, Backward]:
        attention = self.layer.encoder_attn
        (query,), query_back = self._product_of_heads("encoder_attn.q_proj", hidden, 1)
        (key, value), kv_back = self._product_of_heads("encoder_attn.kv", encoded, 2)
        rate = self._rate(attention.dropout)
        attended, attended_back = cross.with_backward(query, key, value, rate, attention.scaling)
        out, out_back = self._product("encoder_attn.out_proj", attended.flatten(1))
        hidden, residual_back = self._residual("encoder_attn_layer_norm", hidden, out)

        def back(gradient: Tensor) -> tuple[Tensor, Tensor]:
            to_hidden, to_out = residual_back(gradient)
            to_query, *to_kv = attended_back(out_back(to_out).view_as(attended))
            to_encoded = kv_back(torch.stack(to_kv, 1).flatten(1))
            return to_hidden.add_(query_back(to_query.flatten(1))), to_encoded

        return hidden, back

    def feed_forward(self, hidden: Tensor) -> tuple[Tensor, Backward]:
        inner, inner_back = self._product("fc1", hidden)  # (T, 4d)
        rate = self._rate(self.layer.activation_dropout)
        dropped, mask = _drop(torch.nn.functional.gelu(inner), rate)
        out, out_back = self._product("fc2", dropped, keep=False)
        hidden, residual_back = self._residual("final_layer_norm", hidden, out)

        def back(gradient: Tensor) -> Tensor:
            to_hidden, to_out = residual_back(gradient)
            again = _undrop(torch.nn.functional.gelu(inner), mask, rate)
            to_dropped = _undrop(out_back(to_out, again), mask, rate)
            return to_hidden.add_(inner_back(torch.ops.aten.gelu_backward(to_dropped, inner)))

        return hidden, back

    def _rate(self, rate: float) -> float:
        return rate if self.training else 0.0

    def _heads(self, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(T, parts * d) to (T, heads, head size) each."""
        attention = self.layer.self_attn
        return rows.view(len(rows), parts, attention.num_heads, attention.head_dim).unbind(1)

    def _product_of_heads(self, name: str, rows: Tensor, parts: int) -> tuple[tuple[Tensor, ...], Backward]:
        product, back = self._product(name, rows)
        return self._heads(product, parts), back

    def _product(self, name: str, rows: Tensor, keep: bool = True) -> tuple[Tensor, Any]:
        """rows @ weight.T + bias.

        Args:
            keep: whether the rows are kept for the backward pass; else that is given them again.
        """
        weight, bias = self.weights.joined[name]
        kept = rows if keep else None

        def back(gradient: Tensor, again: Tensor | None = None) -> Tensor:
            read = kept if again is None else again
            assert read is not None
            full = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
            self.gradients[name] = weight_gradient(gradient, read), gradient.sum(0, dtype=full)
            return gradient @ weight

        return torch.addmm(bias, rows, weight.t()), back

    def _residual(self, name: str, hidden: Tensor, out: Tensor) -> tuple[Tensor, Backward]:
        """norm(hidden + dropout(out)); its backward pass gives the gradients of both."""
        weight, bias = self.weights.joined[name]
        norm, rate = self.layer.get_submodule(name), self._rate(self.layer.dropout)
        dropped, mask = _drop(out, rate)
        total = hidden + dropped
        shape = list(norm.normalized_shape)
        normed, mean, scale = torch.native_layer_norm(total, shape, weight, bias, norm.eps)

        def back(gradient: Tensor) -> tuple[Tensor, Tensor]:
            to_total, *own = torch.ops.aten.native_layer_norm_backward(
                gradient, total, shape, mean, scale, weight, bias, [True, True, True]
            )
            self.gradients[name] = own[0], own[1]
            return to_total, _undrop(to_total, mask, rate)

        return normed, back


def _drop(rows: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    """With dropout, and which stay; None where all do."""
    return torch.native_dropout(rows, rate, True) if rate > 0.0 else (rows, None)


def _undrop(gradient: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """The gradient of what was dropped, which is also dropout as it was drawn."""
    if mask is None:
        return gradient
    return torch.ops.aten.native_dropout_backward(gradient, mask, 1.0 / (1.0 - rate) if rate < 1.0 else 0.0)


def weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """gradient.T @ rows, (outputs, d), summed and returned in float32 where the device's product can."""
    if gradient.is_cuda and gradient.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(gradient.t(), rows, out_dtype=torch.float32)
    return gradient.t() @ rows
