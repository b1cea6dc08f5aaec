"""BART's and T5's encoder and decoder over packed rows: transformers' own layers, without padding between them.

    use_packed_rows(generator)
    stack = stack_of(generator)                                            # None for another family
    encoded = stack.encode(ids, contexts)                                  # (T) of a Packing to (T, d)
    hidden = stack.decode(answer_ids, answers, encoded, cross)             # (R) of another to (R, d)

Each layer is called as a module, so that what wraps it (checkpointing, adapters, a compiler) does its work. Under
autocast to bfloat16 a layer's weights are cast at once, and all it computes is bfloat16: autocast would cast each
activation again at every use; BART's layers have a backward pass of their own then (bart_layers.py). What is outside
the layers stays in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import dropout
from transformers import PreTrainedModel

from rag.casting import call_in, dtype_of_layers
from rag.generation.bart_layers import is_plain, run_layer
from rag.packing import Attention, Packing, accept_packed_rows, accepts_packed_rows


class Stack(ABC):
    """Encoder and decoder of a generator whose attention accepts packed rows."""

    def __init__(self, generator: PreTrainedModel):
        self.encoder, self.decoder, self.config = generator.get_encoder(), generator.get_decoder(), generator.config

    def encode(self, ids: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The encoder's last hidden states (T, d) of token ids (T)."""
        return self._run(self.encoder, ids, packing, Attention(packing, packing))

    def decode(self, ids: torch.Tensor, packing: Packing, encoded: torch.Tensor, cross: Attention) -> torch.Tensor:
        """The decoder's last hidden states (R, d) of N answers' token ids (R), which read (T, d) as `cross` says."""
        return self._run(self.decoder, ids, packing, Attention(packing, packing, causal=True), encoded, cross)

    def _run(self, part, ids: torch.Tensor, packing: Packing, own: Attention, *cross: Any) -> torch.Tensor:
        dtype = dtype_of_layers(ids.device)
        with torch.autocast(ids.device.type, enabled=False) if dtype is not None else nullcontext():
            hidden = self.embed(part, ids, packing)
            extras = self.extras(part, own, *cross)
            if dtype is not None:
                hidden = hidden.to(dtype)
                extras = [extra.to(dtype) if isinstance(extra, torch.Tensor) else extra for extra in extras]
            for layer in self.layers(part):
                if not self.is_left_out(part):
                    hidden = self.run(layer, dtype, hidden, extras)
            return self.finish(part, hidden, dtype)

    @abstractmethod
    def layers(self, part) -> Iterable[torch.nn.Module]: ...

    @abstractmethod
    def embed(self, part, ids: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(T) to the first layer's input (T, d)."""

    @abstractmethod
    def extras(self, part, own: Attention, *cross: Any) -> list[Any]:
        """What a layer is given behind its hidden states; `cross` is the contexts (T, d) and how they are read."""

    def run(self, layer, dtype: torch.dtype | None, hidden: torch.Tensor, extras: list[Any]) -> torch.Tensor:
        """One layer: (T, d) to (T, d)."""
        batch = [
            extra.unsqueeze(0) if isinstance(extra, torch.Tensor) and extra.dim() == 2 else extra for extra in extras
        ]
        result = call_in(layer, dtype, hidden.unsqueeze(0), *batch)
        return (result if isinstance(result, torch.Tensor) else result[0]).squeeze(0)

    def is_left_out(self, part) -> bool:
        """Whether a layer is skipped, as LayerDrop does in training."""
        return False

    def finish(self, part, hidden: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """What lies behind the last layer."""
        return hidden


class BartStack(Stack):
    def layers(self, part):
        return part.layers

    def embed(self, part, ids, packing):
        positions = part.embed_positions(ids, position_ids=packing.positions).squeeze(0)
        hidden = part.layernorm_embedding(part.embed_tokens(ids) + positions)
        return dropout(hidden, part.dropout, part.training)

    def extras(self, part, own, *cross):
        return [own, *cross]

    def run(self, layer, dtype, hidden, extras):
        if dtype is not None and torch.is_grad_enabled() and is_plain(layer):
            return run_layer(layer, hidden, *extras)
        return super().run(layer, dtype, hidden, extras)

    def is_left_out(self, part):
        return part.training and part.layerdrop > 0.0 and bool(torch.rand([]) < part.layerdrop)


class T5Stack(Stack):
    def layers(self, part):
        return part.block

    def embed(self, part, ids, packing):
        return part.dropout(part.embed_tokens(ids))

    def extras(self, part, own, *cross):
        longest = own.longest
        bias = part.block[0].layer[0].SelfAttention.compute_bias(longest, longest)
        if not cross:
            return [own, bias]
        return [own, bias, *cross, bias.new_zeros(())]  # cross-attention has no bias

    def finish(self, part, hidden, dtype):
        return part.dropout(call_in(part.final_layer_norm, dtype, hidden))


STACKS: dict[str, type[Stack]] = {"bart": BartStack, "t5": T5Stack, "mt5": T5Stack}


def use_packed_rows(generator: PreTrainedModel) -> None:
    """Have a generator run over packed rows, where its family can and nobody chose another attention for it."""
    if generator.config.model_type in STACKS or not generator.config.is_encoder_decoder:
        accept_packed_rows(generator)


def stack_of(generator: PreTrainedModel) -> Stack | None:
    """What runs a generator over packed rows; None where its family, or its attention, is another, or it is sharded."""
    kind = STACKS.get(generator.config.model_type)
    if kind is None or not accepts_packed_rows(generator):
        return None
    return None if is_sharded(generator) else kind(generator)


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether a part of it is gathered when it is called, and so must be called equally often on every rank."""
    return any(isinstance(part, FSDPModule) for part in module.modules())
