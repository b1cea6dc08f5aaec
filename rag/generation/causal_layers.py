"""A language model's layers over one row, with a backward pass of their own: less memory, fewer operators.

    if is_plain(generator):
        hidden = states_of_row(generator, ids, row)                        # (T) ids of a PromptRow to (R, d) of answers

Results and gradients are those of transformers' Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma3 and Phi3, with or without
peft's adapters. A layer keeps what its products read or make and no more: norms are computed again. Adapters of linear
layers that read the same share their products. In the last layer only the answers' tokens ask, and only they go on.
A block returns what it computed and a function for its backward pass, which notes the gradients of its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from rag.casting import dtype_of_layers
from rag.generation.bart_layers import is_compiled, weight_gradient

Backward = Callable[[Tensor], Tensor]
# A family by its config's model_type, and where transformers keeps it.
FAMILIES = {
    family: f"transformers.models.{folder}.modeling_{folder}"
    for family, folder in {
        "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3",
        "gemma3_text": "gemma3", "phi3": "phi3",
    }.items()
}  # fmt: skip
KNOWN = {nn.Linear, nn.Dropout, nn.Identity, nn.ModuleDict, nn.ParameterDict, nn.SiLU, SiLUActivation, GELUTanh}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(generator) -> bool:
    """Whether all layers are as transformers and peft wrote them, draw no random numbers, and nobody looks on."""
    base = generator.base_model
    home = FAMILIES.get(generator.config.model_type)
    if home is None or type(base).__module__ != home:
        return False
    return all(_is_plain_part(part, home) for layer in base.layers for part in layer.modules())


def _is_plain_part(part: Any, home: str) -> bool:
    own = vars(part)  # attributes that are not there would cost a module's own search
    if is_compiled(part) or "forward" in own or any(own[hooks] for hooks in HOOKS):
        return False
    if part.training and (own.get("p", 0.0) > 0.0 or (own.get("attention_dropout") or 0.0) > 0.0):
        return False
    return type(part) in KNOWN or type(part).__module__ == home or _is_adapted(part)


def _is_adapted(part: Any) -> bool:
    """Whether it is peft's linear layer with at most one adapter of the common kind, or holds an adapter's tensors."""
    if type(part).__module__ == "peft.tuners._buffer_dict":
        return True
    if (type(part).__module__, type(part).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    is_common = not part.lora_variant and not part.fan_in_fan_out and all(b.bias is None for b in part.lora_B.values())
    return len(part.active_adapters) == 1 and is_common


def states_of_row(generator, ids: Tensor, row: Any) -> Tensor:
    """The last hidden states (R, d) of the answers' tokens, of the ids (T) of a `rag.generation.causal.PromptRow`."""
    base = generator.base_model
    dtype = dtype_of_layers(ids.device)
    hidden = base.embed_tokens(ids)
    rotation_of = rotations(base, hidden, row.positions)
    for layer in base.layers:
        is_last = layer is base.layers[-1]
        plan = _Plan(layer, dtype or hidden.dtype, row, rotation_of(layer), is_last)
        hidden = _Layer.apply(plan, hidden, *plan.trained.values())
    return base.norm(hidden)


def rotations(base: Any, hidden: Tensor, positions: Tensor) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """From a layer to the cosines and sines by which its heads at positions (T) are turned, (T, 1, rotated)."""
    made: dict[str | None, tuple[Tensor, Tensor]] = {}

    def of_layer(layer: Any) -> tuple[Tensor, Tensor]:
        kind = layer.self_attn.layer_type if base.config.model_type == "gemma3_text" else None
        if kind not in made:
            cos, sin = base.rotary_emb(hidden, positions[None], *([kind] if kind else []))
            made[kind] = cos[0, :, None], sin[0, :, None]
        return made[kind]

    return of_layer


@dataclass
class Adapter:
    """A (r, inputs) and B (outputs, r), their names in the layer, and what their product is multiplied by."""

    a: Tensor
    b: Tensor
    names: tuple[str, str]
    scale: float


@dataclass
class Linear:
    """A linear layer: weight (outputs, inputs), bias (outputs) or None, their names in the layer, and its adapter."""

    weight: Tensor
    bias: Tensor | None
    names: tuple[str, str]
    adapter: Adapter | None = None

    def cast_to(self, dtype: torch.dtype) -> "Linear":
        """For products of that dtype alone."""
        adapter = self.adapter
        if adapter is not None:
            adapter = replace(adapter, a=adapter.a.to(dtype), b=adapter.b.to(dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias, adapter=adapter)


class _Plan:
    """What one pass through a layer needs to know.

    Attributes:
        trained: the layer's parameters that want gradients, by name.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, row: Any, rotation: tuple[Tensor, Tensor], is_last: bool):
        self.layer, self.dtype, self.row, self.rotation, self.is_last = layer, dtype, row, rotation, is_last
        self.trained = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
        self.recomputes = layer.training and getattr(layer, "gradient_checkpointing", False)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, hidden, *trained):
        blocks = _Blocks(plan)
        result, back = blocks.run(hidden)
        ctx.plan, ctx.hidden, ctx.blocks, ctx.back = plan, hidden, blocks, back
        if plan.recomputes:
            ctx.blocks = ctx.back = None
        else:
            ctx.hidden = None  # what is needed of it the blocks keep
        return result

    @staticmethod
    def backward(ctx, gradient):
        blocks, back, plan = ctx.blocks, ctx.back, ctx.plan
        if back is None:
            blocks = _Blocks(plan)
            _, back = blocks.run(ctx.hidden)
        ctx.blocks = ctx.back = ctx.hidden = None
        to_hidden = back(gradient, ctx.needs_input_grad[1])
        found = blocks.gradients
        own = [found[name].to(weight.dtype) if name in found else None for name, weight in plan.trained.items()]
        return None, to_hidden, *own


class _Blocks:
    """The parts of one layer's forward pass, each with its backward pass.

    Attributes:
        gradients: of the layer's parameters by name, filled by the backward passes.
    """

    def __init__(self, plan: _Plan):
        self.plan, self.layer = plan, plan.layer
        self.gradients: dict[str, Tensor] = {}
        self.has_norms_behind = hasattr(plan.layer, "pre_feedforward_layernorm")  # Gemma3's

    def run(self, hidden: Tensor) -> tuple[Tensor, Callable[[Tensor, bool], Tensor | None]]:
        """(T, d) to the layer's result, of the last layer (R, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            middle, attention_back = self.attention(hidden)
            result, feed_back = self.feed_forward(middle)

        def back(gradient: Tensor, is_wanted: bool) -> Tensor | None:
            with torch.autocast(gradient.device.type, enabled=False):
                return attention_back(feed_back(gradient), is_wanted)

        return result, back

    def attention(self, hidden: Tensor) -> tuple[Tensor, Callable[[Tensor, bool], Tensor | None]]:
        module, row, plan = self.layer.self_attn, self.plan.row, self.plan
        linears = linears_of(self.layer, "qkv")
        normed, norm_back = self._norm("input_layernorm", hidden, plan.dtype)
        qkv, qkv_back = self._product(linears, normed())
        qkv = qkv.view(len(hidden), -1, module.head_dim)
        n_keys = module.config.num_key_value_heads
        n_queries = qkv.shape[1] - 2 * n_keys
        query, key, value = qkv.split([n_queries, n_keys, n_keys], 1)
        query, query_back = self._head_norm("self_attn.q_norm", query)
        key, key_back = self._head_norm("self_attn.k_norm", key)
        cos, sin = plan.rotation
        rotates = getattr(module, "use_rope", True)
        if rotates:
            rotate(query, cos, sin)
            rotate(key, cos, sin)
        places = row.answer_places if plan.is_last else None
        if places is not None:
            query, hidden = query.index_select(0, places), hidden.index_select(0, places)
        attended, attended_back = row.with_backward(query, key, value, module.scaling, window_of(module), plan.is_last)
        attended = attended.flatten(1)
        out, out_back = self._product(linears_of(self.layer, "out"), attended)
        out, out_norm_back = self._norm_behind("post_attention_layernorm", out, hidden.dtype)
        result = hidden + out
        size = len(qkv)

        def back(gradient: Tensor, is_wanted: bool) -> Tensor | None:
            to_out = out_norm_back(gradient).to(plan.dtype)
            to_attended = out_back(to_out, attended)
            to_query, to_key, to_value = attended_back(to_attended.view(len(to_attended), n_queries, -1))
            if places is not None:
                to_query, gradient = (_spread(part, places, size) for part in (to_query, gradient))
            if rotates:
                rotate(to_query, cos, -sin)
                rotate(to_key, cos, -sin)
            to_qkv = torch.cat([query_back(to_query), key_back(to_key), to_value], 1).flatten(1)
            is_wanted = is_wanted or "input_layernorm.weight" in plan.trained
            to_normed = qkv_back(to_qkv, normed(), is_wanted)
            return None if to_normed is None else norm_back(to_normed) + gradient

        return result, back

    def feed_forward(self, hidden: Tensor) -> tuple[Tensor, Backward]:
        module, plan = self.layer.mlp, self.plan
        name = "pre_feedforward_layernorm" if self.has_norms_behind else "post_attention_layernorm"
        normed, norm_back = self._norm(name, hidden, plan.dtype)
        linears = linears_of(self.layer, "wide")
        inner, inner_back = self._product(linears, normed())
        gate, up = inner.chunk(2, 1)
        activation = activation_of(module)
        out, product_back = self._product(linears_of(self.layer, "narrow"), activation(gate).mul_(up))
        out, out_norm_back = self._norm_behind("post_feedforward_layernorm", out, hidden.dtype)

        def back(gradient: Tensor) -> Tensor:
            to_out = out_norm_back(gradient).to(plan.dtype)
            active = activation(gate)
            to_product = product_back(to_out, active * up)
            to_inner = torch.empty_like(inner)
            to_gate, to_up = to_inner.chunk(2, 1)
            torch.mul(to_product, active, out=to_up)
            _activation_gradient(activation, to_product.mul_(up), gate, to_gate)
            to_normed = inner_back(to_inner, normed())
            return norm_back(to_normed) + gradient

        return hidden + out, back

    def _norm(self, name: str, rows: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Backward]:
        """RMSNorm over the last dimension, in this dtype, made anew at each call."""
        module = self.layer.get_submodule(name)
        is_gemma = hasattr(module, "eps")  # whose weights are what is added to one
        eps = module.eps if is_gemma else module.variance_epsilon
        weight = full(module.weight) + 1.0 if is_gemma else full(module.weight)
        size = rows.shape[-1]
        scale = torch.linalg.vector_norm(full(rows), dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()

        def back(gradient: Tensor) -> Tensor:
            straight, gradient = full(rows) * scale, full(gradient)
            if f"{name}.weight" in self.plan.trained:
                self.gradients[f"{name}.weight"] = (gradient * straight).flatten(0, -2).sum(0)
            gradient = gradient * weight
            along = (gradient * straight).sum(-1, keepdim=True).div_(-size)
            return gradient.addcmul_(straight, along).mul_(scale).to(rows.dtype)

        return lambda: (full(rows) * scale).mul_(weight).to(dtype), back

    def _head_norm(self, name: str, heads: Tensor) -> tuple[Tensor, Backward]:
        """The norm of each head of queries or keys, of the families that have it."""
        if not hasattr(self.layer.self_attn, name.rpartition(".")[2]):
            return heads, lambda gradient: gradient
        normed, back = self._norm(name, heads, heads.dtype)
        return normed(), back

    def _norm_behind(self, name: str, out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Backward]:
        """The norm of what a block adds, of the families that have it."""
        if not self.has_norms_behind:
            return out, lambda gradient: gradient
        normed, back = self._norm(name, out, dtype)
        return normed(), back

    def _product(self, linears: list[Linear], rows: Tensor) -> tuple[Tensor, Any]:
        """What linear layers make of the same rows (T, inputs), side by side: (T, outputs of all).

        The backward pass is given the rows again, and makes nothing of their gradient where it is not wanted.
        """
        sizes = [len(linear.weight) for linear in linears]
        out = rows.new_empty(len(rows), sum(sizes))
        for linear, part in zip(linears, out.split(sizes, 1), strict=True):
            weight = linear.weight.to(rows.dtype).t()
            if linear.bias is None:
                torch.mm(rows, weight, out=part)
            else:
                torch.addmm(linear.bias.to(rows.dtype), rows, weight, out=part)
        adapters_back = self._add_adapters(linears, rows, out.split(sizes, 1))

        def back(gradient: Tensor, rows: Tensor, is_wanted: bool = True) -> Tensor | None:
            to_rows = None
            parts = gradient.split(sizes, 1)
            for linear, part in zip(linears, parts, strict=True):
                if is_wanted:
                    weight = linear.weight.to(rows.dtype)
                    to_rows = part @ weight if to_rows is None else to_rows.addmm_(part, weight)
                if linear.names[0] in self.plan.trained:
                    self.gradients[linear.names[0]] = weight_gradient(part, rows)
                if linear.names[1] in self.plan.trained:
                    self.gradients[linear.names[1]] = full(part).sum(0)
            adapters_back(parts, rows, to_rows)
            return to_rows

        return out, back

    def _add_adapters(self, linears: list[Linear], rows: Tensor, outs: tuple[Tensor, ...]) -> Any:
        """Add to each linear layer's result what its adapter makes of the rows, by one product with all A of them."""
        adapters = {n: linear.adapter for n, linear in enumerate(linears) if linear.adapter is not None}
        if not adapters:
            return lambda parts, rows, to_rows: None
        first = torch.cat([adapter.a for adapter in adapters.values()]).to(rows.dtype)
        ranks = [len(adapter.a) for adapter in adapters.values()]
        lows = (rows @ first.t()).split(ranks, 1)  # (T, r) each
        for (n, adapter), low in zip(adapters.items(), lows, strict=True):
            outs[n].addmm_(low, adapter.b.to(rows.dtype).t(), alpha=adapter.scale)

        def back(parts: tuple[Tensor, ...], rows: Tensor, to_rows: Tensor | None) -> None:
            to_lows = []
            for (n, adapter), low in zip(adapters.items(), lows, strict=True):
                to_lows.append(parts[n] @ (adapter.b * adapter.scale).to(rows.dtype))
                # The narrow side first: half the time on a CPU.
                self.gradients[adapter.names[1]] = weight_gradient(low, parts[n]).t() * adapter.scale
            to_low = torch.cat(to_lows, 1)
            for adapter, own in zip(adapters.values(), weight_gradient(to_low, rows).split(ranks), strict=True):
                self.gradients[adapter.names[0]] = own
            if to_rows is not None:
                to_rows.addmm_(to_low, first)

        return back


# Where a layer's products are, and the names of their linear layers, of which the first are taken that are there.
PRODUCTS: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "qkv": ("self_attn", [("qkv_proj",), ("q_proj", "k_proj", "v_proj")]),
    "out": ("self_attn", [("o_proj",)]),
    "wide": ("mlp", [("gate_up_proj",), ("gate_proj", "up_proj")]),
    "narrow": ("mlp", [("down_proj",)]),
}


def linears_of(layer: Any, product: str) -> list[Linear]:
    """The linear layers of one of a layer's PRODUCTS."""
    owner, choices = PRODUCTS[product]
    part = layer.get_submodule(owner)
    names = next(names for names in choices if hasattr(part, names[0]))
    return [_linear_of(getattr(part, name), f"{owner}.{name}") for name in names]


def activation_of(mlp: Any) -> Any:
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def _linear_of(module: Any, name: str) -> Linear:
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias, (f"{name}.weight", f"{name}.bias"))
    base, (key,) = module.base_layer, module.active_adapters
    adapter = None
    if not (module.disable_adapters or module.merged) and key in module.lora_A:
        names = f"{name}.lora_A.{key}.weight", f"{name}.lora_B.{key}.weight"
        adapter = Adapter(module.lora_A[key].weight, module.lora_B[key].weight, names, module.scaling[key])
    names = f"{name}.base_layer.weight", f"{name}.base_layer.bias"
    return Linear(base.weight, base.bias, names, adapter)


def window_of(attention: Any) -> int | None:
    """How many tokens a token attends to at most, where the family reads that of its attention, or its config."""
    if attention.config.model_type in ("mistral", "phi3"):
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the heads' first dimensions (T, heads, size) in place, those of either half together."""
    size = cos.shape[-1] // 2
    cos, sin = cos[..., :size], sin[..., :size]
    one, other = heads[..., :size], heads[..., size : 2 * size]
    turned = one * cos - other * sin
    other.copy_(other * cos + one * sin)  # rounded once where the cosines are of more digits
    one.copy_(turned)


def _activation_gradient(activation: nn.Module, gradient: Tensor, rows: Tensor, out: Tensor) -> None:
    if isinstance(activation, GELUTanh):
        torch.ops.aten.gelu_backward.grad_input(gradient, rows, approximate="tanh", grad_input=out)
    else:
        torch.ops.aten.silu_backward.grad_input(gradient, rows, grad_input=out)


def full(rows: Tensor) -> Tensor:
    """float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows at their places among so many, the others zero."""
    return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)
