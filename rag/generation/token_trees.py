"""BART's and T5's decoders over trees of tokens that hang on documents; nothing is computed or kept twice.

    decoder = BartDecoder(generator)
    memory = decoder.read(context_input_ids, context_attention_mask)  # each document encoded and projected once
    hidden = decoder.decode(tokens, depths, ancestors, memory)  # all tokens of the tree of each document in one pass

A token attends to its ancestors in the tree and to its document. A beam search is a tree that grows by a level a step:
`Past` keeps its keys and values and never moves them. Candidate answers are one tree, whose beginnings they share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, log_softmax, scaled_dot_product_attention

from rag.generation.forward import CHUNK_VOCABULARY, full_precision, output_layer, scaled
from rag.generation.stacks import stack_of
from rag.packing import GROUP_COST, Packing, groups_of_similar_length, right_padded_lengths

# Tokens encoded or decoded in one pass: enough to keep the cores busy, few enough that padding and memory stay small.
CHUNK_TOKENS = 2048


def _logsumexp(x: torch.Tensor) -> torch.Tensor:
    """`x.logsumexp(-1)`, on a CPU eight times as fast: of the two only log_softmax has a kernel of its own."""
    return x.amax(-1) - log_softmax(x, -1).amax(-1)


@dataclass
class Memory:
    """What the decoder reads of D documents: cross-attention keys and values (D, heads, S, head size) of each layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor  # (D, 1, 1, S) bool

    def select(self, documents) -> "Memory":
        return Memory([(keys[documents], values[documents]) for keys, values in self.layers], self.mask[documents])


class Past:
    """Keys and values of the tokens decoded so far; they are appended and never moved."""

    def __init__(self, capacity: int):
        self.capacity, self.steps, self.length = capacity, 0, 0
        self.depths: torch.Tensor | None = None  # (length) of each token in its tree
        self.layers: list[torch.Tensor] = []  # (2, D, heads, capacity, head size)

    def grow(self, depths: torch.Tensor) -> None:
        self.steps += 1
        self.length += len(depths)
        self.depths = depths if self.depths is None else torch.cat([self.depths, depths])

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        documents, heads, new, size = keys.shape
        if layer == len(self.layers):
            self.layers.append(keys.new_empty(2, documents, heads, self.capacity, size))
        self.layers[layer][0, :, :, self.length - new : self.length] = keys
        self.layers[layer][1, :, :, self.length - new : self.length] = values
        keys, values = self.layers[layer][:, :, :, : self.length].unbind(0)
        return keys, values

    def select(self, documents: torch.Tensor) -> None:
        for i, layer in enumerate(self.layers):
            kept = layer.new_empty(2, len(documents), *layer.shape[2:])
            kept[:, :, :, : self.length] = layer[:, documents, :, : self.length]
            self.layers[i] = kept


class TokenScores:
    """A generator's output layer: from what the decoder says to the probabilities of words."""

    def __init__(self, generator):
        self.pad = generator.config.pad_token_id
        self.weight, self.bias = output_layer(generator)  # (vocabulary, d), (vocabulary)
        self.dtype = full_precision(self.weight[:0]).dtype  # of log-probabilities

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return full_precision(linear(hidden, self.weight, self.bias))

    def token_log_probs(self, hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(targets | hidden[:, places]): (n, N, d), (E), (E) to (n, E), without all logits at a time."""
        chunks = zip(self.weight.split(CHUNK_VOCABULARY), self.bias.split(CHUNK_VOCABULARY), strict=True)
        normalizers = [_logsumexp(full_precision(linear(hidden, weight, bias))) for weight, bias in chunks]
        normalizer = torch.stack(normalizers).logsumexp(0)  # (n, N)
        logits = full_precision(hidden[:, places] * self.weight[targets]).sum(-1) + self.bias[targets]
        return logits - normalizer[:, places]


class TreeDecoder(TokenScores, ABC):
    """A generator's encoder and decoder, the decoder over trees of tokens; the subclasses know their layers."""

    def __init__(self, generator):
        super().__init__(generator)
        self.generator, self.config = generator, generator.config
        self.encoder, self.decoder = generator.get_encoder(), generator.get_decoder()

    n_heads: int
    scale: float | None  # of attention's products; None is 1 / sqrt(head size)

    @abstractmethod
    def layers(self) -> Iterable[Any]: ...

    @abstractmethod
    def cross_projections(self) -> list[tuple[Any, Any]]:
        """The linear layers that make cross-attention's keys and values, of each layer."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """(D, N) and (N) to the first layer's input (D, N, d)."""

    @abstractmethod
    def self_attention_bias(self, ancestors, depths: torch.Tensor, key_depths: torch.Tensor) -> torch.Tensor:
        """What scaled_dot_product_attention takes as its mask, bool or added: (D or 1, 1 or heads, N, keys)."""

    @abstractmethod
    def apply(self, layer, hidden: torch.Tensor, attend_self: Callable, attend_memory: Callable) -> torch.Tensor:
        """One layer: (D, N, d) to (D, N, d)."""

    @abstractmethod
    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """What lies behind the last layer, up to the output layer: (D, N, d) to (D, N, d)."""

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Memory:
        """Encode contexts (D, S) and project what cross-attention reads of them."""
        lengths, stack = right_padded_lengths(attention_mask), stack_of(self.generator)
        if lengths is None or stack is None:
            encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
            layers = [(self.heads(k(encoded)), self.heads(v(encoded))) for k, v in self.cross_projections()]
            return Memory(layers, attention_mask[:, None, None].bool())
        longest, device = int(lengths.max()), input_ids.device
        memory: list[torch.Tensor] = []
        for group, _ in groups_of_similar_length(lengths, GROUP_COST, CHUNK_TOKENS):
            rows, packing = torch.from_numpy(group).to(device), Packing(lengths[group], device)
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
            depths: (N), 0 for the decoder's first token.
            ancestors: (D or 1, N, tokens in `past` and these), True where a token attends.
        """
        if past is None:
            key_depths = depths
        else:
            past.grow(depths)
            key_depths = past.depths
        bias = self.self_attention_bias(ancestors[:, None], depths, key_depths)
        hidden = self.embed(tokens, depths)
        for i, (layer, (memory_keys, memory_values)) in enumerate(zip(self.layers(), memory.layers, strict=True)):

            def attend_self(query, keys, values, i=i):
                keys, values = self.heads(keys), self.heads(values)
                if past is not None:
                    keys, values = past.append(i, keys, values)
                return self.attend(query, keys, values, bias)

            def attend_memory(query, keys=memory_keys, values=memory_values):
                return self.attend(query, keys, values, memory.mask)

            hidden = self.apply(layer, hidden, attend_self, attend_memory)
        return self.finish(hidden)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(D, N, d) to (D, heads, N, head size)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def attend(self, query, keys, values, mask) -> torch.Tensor:
        attended = scaled_dot_product_attention(self.heads(query), keys, values, attn_mask=mask, scale=self.scale)
        return attended.transpose(1, 2).flatten(2)


class BartDecoder(TreeDecoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.decoder_attention_heads, None

    def layers(self):
        return self.decoder.layers

    def cross_projections(self):
        return [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in self.decoder.layers]

    def embed(self, tokens, depths):
        positions = self.decoder.embed_positions(tokens, position_ids=depths)
        return self.decoder.layernorm_embedding(self.decoder.embed_tokens(tokens) + positions)

    def self_attention_bias(self, ancestors, depths, key_depths):
        return ancestors

    def apply(self, layer, hidden, attend_self, attend_memory):
        own, cross = layer.self_attn, layer.encoder_attn
        attended = own.out_proj(attend_self(own.q_proj(hidden), own.k_proj(hidden), own.v_proj(hidden)))
        hidden = layer.self_attn_layer_norm(hidden + attended)
        hidden = layer.encoder_attn_layer_norm(hidden + cross.out_proj(attend_memory(cross.q_proj(hidden))))
        return layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))

    def finish(self, hidden):
        return hidden


class T5Decoder(TreeDecoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.num_heads, 1.0

    def layers(self):
        return self.decoder.block

    def cross_projections(self):
        return [(block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v) for block in self.decoder.block]

    def embed(self, tokens, depths):
        return self.decoder.embed_tokens(tokens)

    def self_attention_bias(self, ancestors, depths, key_depths):
        """T5's bias by distance, (D or 1, heads, N, keys): a distance in the tree is one in the sequence."""
        first = self.decoder.block[0].layer[0].SelfAttention
        buckets = first._relative_position_bucket(
            key_depths - depths[:, None],
            bidirectional=False,
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        bias = first.relative_attention_bias(buckets).permute(2, 0, 1)
        return bias.masked_fill(~ancestors, float("-inf"))

    def apply(self, block, hidden, attend_self, attend_memory):
        own, cross, feed_forward = block.layer
        normed, attention = own.layer_norm(hidden), own.SelfAttention
        hidden = hidden + attention.o(attend_self(attention.q(normed), attention.k(normed), attention.v(normed)))
        attention = cross.EncDecAttention
        hidden = hidden + attention.o(attend_memory(attention.q(cross.layer_norm(hidden))))
        return feed_forward(hidden)

    def finish(self, hidden):
        return scaled(self.decoder.final_layer_norm(hidden), self.config)


DECODERS: dict[str, type[TreeDecoder]] = {"bart": BartDecoder, "t5": T5Decoder, "mt5": T5Decoder}
