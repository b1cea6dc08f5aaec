"""BART's and T5's decoders over trees of tokens that hang on documents; nothing is computed or kept twice.

    decoder = BartDecoder(generator)
    memory = decoder.read(context_input_ids, context_attention_mask)  # each document encoded and projected once
    hidden = decoder.decode(tokens, depths, ancestors, memory)  # all tokens of the tree of each document in one pass

A token attends to its ancestors in the tree and to its document. A beam search is a tree that grows by a level a step:
`Past` keeps its keys and values and never moves them. Candidate answers are one tree, whose beginnings they share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import linear, log_softmax, scaled_dot_product_attention

from rag.casting import weight_of
from rag.generation.forward import CHUNK_VOCABULARY, full_precision, output_layer, scaled
from rag.generation.pace import pace_of
from rag.generation.stacks import stack_of
from rag.packing import Packing, groups_of_similar_length, right_padded_lengths, to_device


def _logsumexp(x: torch.Tensor) -> torch.Tensor:
    """`x.logsumexp(-1)`, on a CPU eight times as fast: of the two only log_softmax has a kernel of its own."""
    return x.amax(-1) - log_softmax(x, -1).amax(-1)


@dataclass
class Memory:
    """What the decoder reads of D documents: cross-attention keys and values (D, heads, S, head size) of each layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor  # (D, 1, 1, S) bool

    @cached_property
    def bias(self) -> torch.Tensor:
        """The mask as attention adds it, (D, 1, 1, S)."""
        return attention_bias(self.mask, self.layers[0][0].dtype)

    def select(self, documents: torch.Tensor | slice) -> "Memory":
        return Memory([(keys[documents], values[documents]) for keys, values in self.layers], self.mask[documents])


def attention_bias(attends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token attends and -inf elsewhere, (..., keys): made once, not in each layer from a mask of bools.

    Its rows begin at multiples of 16, or CUDA's kernels would copy it in each layer.
    """
    keys = attends.shape[-1]
    bias = torch.zeros(*attends.shape[:-1], -(-keys // 16) * 16, dtype=dtype, device=attends.device)[..., :keys]
    return bias.masked_fill_(~attends, float("-inf"))


class Past:
    """Keys and values of the tokens decoded so far: those of all layers in one tensor, which grows as it must."""

    def __init__(self, layers: int, capacity: int):
        self.number_of_layers, self.capacity, self.steps, self.length = layers, capacity, 0, 0
        self.depths: torch.Tensor | None = None  # (1, length) of each token in its tree
        self.kept: torch.Tensor | None = None  # (layers, 2, D, heads, at most capacity, head size)
        self.slots: tuple[torch.Tensor, ...] = ()  # of each layer, where this step's keys and values go
        self.present: tuple[torch.Tensor, ...] = ()  # keys of all tokens and their values, of each layer

    def begin_behind(self, kept: torch.Tensor, length: int) -> None:
        """Have the first step's tokens stand behind `length` others, in what holds theirs already."""
        self.kept, self.length, self.capacity = kept, length, self.capacity + length

    def grow(self, depths: torch.Tensor) -> None:
        """Begin a step of new tokens, whose depths are (1, N)."""
        self.steps += 1
        self.length += depths.shape[1]
        self.depths = depths if self.depths is None else torch.cat([self.depths, depths], 1)
        self.slots = ()

    def append(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's keys and values (2, D, heads, N, head size); those of all tokens so far."""
        if not self.slots:
            self._make_room(new)
        self.slots[layer].copy_(new)
        return self.present[2 * layer], self.present[2 * layer + 1]

    def _make_room(self, new: torch.Tensor) -> None:
        _, documents, heads, tokens, size = new.shape
        before = self.length - tokens
        if self.kept is None or self.length > self.kept.shape[4]:
            room = min(self.capacity, max(16, 2 * self.length))
            grown = new.new_empty(self.number_of_layers, 2, documents, heads, room, size)
            if self.kept is not None:
                grown[..., :before, :] = self.kept[..., :before, :]
            self.kept = grown
        self.slots = self.kept[..., before : self.length, :].unbind(0)
        self.present = self.kept[..., : self.length, :].flatten(0, 1).unbind(0)

    def select(self, documents: torch.Tensor) -> None:
        """Go on with some documents; between two steps."""
        assert self.kept is not None, "a step comes first"
        kept = self.kept.new_empty(*self.kept.shape[:2], len(documents), *self.kept.shape[3:])
        kept[..., : self.length, :] = self.kept[:, :, documents, :, : self.length]
        self.kept = kept


class TokenScores:
    """A generator's output layer: from what the decoder says to the probabilities of words.

    Under autocast the weights are cast once, here, and not at every use.
    """

    def __init__(self, generator):
        self.pad = generator.config.pad_token_id
        weight, bias = output_layer(generator)  # (vocabulary, d), (vocabulary)
        self.product_dtype = autocast_dtype(weight)
        self.weight, self.bias = weight.to(self.product_dtype), bias.to(self.product_dtype)
        self.dtype = full_precision(self.weight[:0]).dtype  # of log-probabilities

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return full_precision(product(hidden.flatten(0, -2), self.weight).add_(self.bias).view(*hidden.shape[:-1], -1))

    def token_log_probs(self, hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(targets | hidden[places]): (M, d), (E), (E) to (E), without all logits at a time."""
        chunks = zip(self.weight.split(CHUNK_VOCABULARY), self.bias.split(CHUNK_VOCABULARY), strict=True)
        normalizers = [_logsumexp(full_precision(linear(hidden, weight, bias))) for weight, bias in chunks]
        normalizer = torch.stack(normalizers).logsumexp(0)  # (M)
        logits = full_precision(hidden[places] * self.weight[targets]).sum(-1) + self.bias[targets]
        return logits - normalizer[places]


def autocast_dtype(weight: torch.Tensor) -> torch.dtype:
    """In which dtype a weight is multiplied: under autocast in half precision, else in its own."""
    kind = weight.device.type
    halves = weight.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if halves else weight.dtype


FEWEST_ROWS, FEW_ROWS = 5, 128


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows (M, d) times weight (outputs, d) transposed, (M, outputs).

    On a CPU a plain product of few rows keeps one core busy; in as many parts as threads it keeps all. The fewest rows
    are best asked the other way around.
    """
    threads = torch.get_num_threads()
    suits = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    if suits and len(rows) <= FEWEST_ROWS:
        return torch.mm(weight, rows.t()).t().contiguous()
    if not suits or len(rows) > FEW_ROWS or len(weight) % threads:
        return torch.mm(rows, weight.t())
    parts = torch.bmm(
        rows.expand(threads, -1, -1), weight.unflatten(0, (threads, -1)).mT
    )  # (threads, M, outputs / ...)
    return parts.transpose(0, 1).flatten(1)


class Product:
    """One matrix product in the place of those of several linear layers that read the same.

    LoRA's adapters are added to the weights; layers whose weights are quantized are called.
    """

    def __init__(self, *layers: torch.nn.Linear):
        known = [weight_of(layer) for layer in layers]
        self.called = layers if any(weight is None for weight in known) else ()
        if self.called:
            return
        weights: list[torch.Tensor] = [weight.to(autocast_dtype(weight)) for weight in known if weight is not None]
        self.weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).t()  # (d, outputs)
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases).to(self.weight.dtype) if biases else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(M, d) to (M, outputs)."""
        if self.called:
            return torch.cat([layer(x) for layer in self.called], -1)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class TreeDecoder(TokenScores, ABC):
    """A generator's encoder and decoder, the decoder over trees of tokens; the subclasses know their layers."""

    def __init__(self, generator):
        super().__init__(generator)
        self.generator, self.config = generator, generator.config
        self.encoder, self.decoder = generator.get_encoder(), generator.get_decoder()

    n_heads: int
    scale: float | None  # of attention's products; None is 1 / sqrt(head size)
    layers: list[Any]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @abstractmethod
    def cross_projections(self) -> list[tuple[Any, Any]]:
        """The linear layers that make cross-attention's keys and values, of each layer."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """(D, N) and (D or 1, N) to the first layer's input (D, N, d)."""

    @abstractmethod
    def self_attention_bias(self, ancestors, depths: torch.Tensor, key_depths: torch.Tensor) -> torch.Tensor:
        """What self-attention adds, (D or 1, 1 or heads, N, keys), of (D or 1, 1, N, keys) and (D or 1, N or keys)."""

    @abstractmethod
    def apply(self, layer, hidden: torch.Tensor, attend_self: Callable, attend_memory: Callable) -> torch.Tensor:
        """One layer: (D * N, d) to (D * N, d)."""

    @abstractmethod
    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """What lies behind the last layer, up to the output layer: (D * N, d) to (D * N, d)."""

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Memory:
        """Encode contexts (D, S) and project what cross-attention reads of them."""
        lengths, stack = right_padded_lengths(attention_mask), stack_of(self.generator)
        if lengths is None or stack is None:
            encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
            layers = [(self.heads(k(encoded)), self.heads(v(encoded))) for k, v in self.cross_projections()]
            return Memory(layers, attention_mask[:, None, None].bool())
        longest, device = int(lengths.max()), input_ids.device
        pace = pace_of(device)
        memory: list[torch.Tensor] = []
        for group, _ in groups_of_similar_length(lengths, pace.pass_cost, pace.chunk_tokens):
            rows, packing = to_device(group, device), Packing(lengths[group], device)
            encoded = stack.encode(packing.pack(input_ids[rows]), packing)  # (T, d)
            for i, pair in enumerate(self.cross_projections()):
                for j, projection in enumerate(pair):
                    projected = self.heads(packing.unpack(projection(encoded), longest))
                    if i == len(memory):
                        memory.append(projected.new_zeros(2, len(lengths), *projected.shape[1:]))
                    memory[i][j, rows] = projected
        return Memory([(keys, values) for keys, values in memory], attention_mask[:, None, None, :longest].bool())

    def decode(self, tokens, depths, ancestors, memory: Memory, past: Past | None = None) -> torch.Tensor:
        """Last hidden states of tokens (D, N) that hang on D documents, (D, N, d).

        Args:
            depths: (D or 1, N), 0 for the decoder's first token.
            ancestors: (D or 1, N, tokens in `past` and these), True where a token attends.
        """
        key_depths = depths
        if past is not None:
            past.grow(depths)
            assert past.depths is not None
            key_depths = past.depths
        bias = self.self_attention_bias(ancestors[:, None], depths, key_depths)
        hidden = self.embed(tokens, depths).flatten(0, 1)
        for i, (layer, (memory_keys, memory_values)) in enumerate(zip(self.layers, memory.layers, strict=True)):

            def attend_self(projected, i=i):
                """Of queries, keys and values in a row, (D * N, 3 * d)."""
                heads = projected.view(*tokens.shape, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
                keys, values = heads[1:].unbind(0) if past is None else past.append(i, heads[1:])
                return self.attend(heads[0], keys, values, bias)

            def attend_memory(query, keys=memory_keys, values=memory_values):
                query = query.view(*tokens.shape, self.n_heads, -1).transpose(1, 2)
                return self.attend(query, keys, values, memory.bias)

            hidden = self.apply(layer, hidden, attend_self, attend_memory)
        return self.finish(hidden).view(*tokens.shape, -1)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(D, N, d) to (D, heads, N, head size)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def attend(self, query, keys, values, bias) -> torch.Tensor:
        """(D, heads, N, head size) to (D * N, d)."""
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=self.scale)
        return attended.transpose(1, 2).reshape(-1, self.n_heads * query.shape[-1])


class BartLayer:
    """A decoder layer's products, and its modules between them."""

    def __init__(self, layer):
        own, cross = layer.self_attn, layer.encoder_attn
        self.own, self.own_out = Product(own.q_proj, own.k_proj, own.v_proj), Product(own.out_proj)
        self.cross, self.cross_out = Product(cross.q_proj), Product(cross.out_proj)
        self.wide, self.narrow, self.activate = Product(layer.fc1), Product(layer.fc2), layer.activation_fn
        self.norms = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm


class BartDecoder(TreeDecoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.decoder_attention_heads, None
        self.layers = [BartLayer(layer) for layer in self.decoder.layers]

    def cross_projections(self):
        return [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in self.decoder.layers]

    def embed(self, tokens, depths):
        positions = self.decoder.embed_positions(tokens, position_ids=depths).squeeze(0)  # it puts a 1 before
        return self.decoder.layernorm_embedding(self.decoder.embed_tokens(tokens) + positions)

    def self_attention_bias(self, ancestors, depths, key_depths):
        return attention_bias(ancestors, self.product_dtype)

    def apply(self, layer, hidden, attend_self, attend_memory):
        norm, cross_norm, last_norm = layer.norms
        hidden = norm(hidden + layer.own_out(attend_self(layer.own(hidden))))
        hidden = cross_norm(hidden + layer.cross_out(attend_memory(layer.cross(hidden))))
        return last_norm(hidden + layer.narrow(layer.activate(layer.wide(hidden))))

    def finish(self, hidden):
        return hidden


class T5Layer:
    """A decoder block's products of attention, and its modules around them."""

    def __init__(self, block):
        own, cross, self.feed_forward = block.layer
        attention, cross_attention = own.SelfAttention, cross.EncDecAttention
        self.own, self.own_out = Product(attention.q, attention.k, attention.v), Product(attention.o)
        self.cross, self.cross_out = Product(cross_attention.q), Product(cross_attention.o)
        self.norms = own.layer_norm, cross.layer_norm


class T5Decoder(TreeDecoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.num_heads, 1.0
        self.layers = [T5Layer(block) for block in self.decoder.block]

    def cross_projections(self):
        return [(block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v) for block in self.decoder.block]

    def embed(self, tokens, depths):
        return self.decoder.embed_tokens(tokens)

    def self_attention_bias(self, ancestors, depths, key_depths):
        """T5's bias by distance, (D or 1, heads, N, keys): a distance in the tree is one in the sequence."""
        first = self.decoder.block[0].layer[0].SelfAttention
        buckets = first._relative_position_bucket(
            key_depths[:, None] - depths[..., None],
            bidirectional=False,
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        by_distance = first.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        # In place: a sum would lie as the distances do, heads beside each other, which no fused kernel takes.
        return attention_bias(ancestors.expand(-1, self.n_heads, -1, -1), self.product_dtype).add_(by_distance)

    def apply(self, layer, hidden, attend_self, attend_memory):
        norm, cross_norm = layer.norms
        hidden = hidden + layer.own_out(attend_self(layer.own(norm(hidden))))
        hidden = hidden + layer.cross_out(attend_memory(layer.cross(cross_norm(hidden))))
        return layer.feed_forward(hidden)

    def finish(self, hidden):
        return scaled(self.decoder.final_layer_norm(hidden), self.config)


DECODERS: dict[str, type[TreeDecoder]] = {"bart": BartDecoder, "t5": T5Decoder, "mt5": T5Decoder}
