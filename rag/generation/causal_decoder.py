"""Any causal language model as a decoder over trees of tokens that hang on prompts.

    decoder = CausalDecoder(generator)      # called as token_trees.TreeDecoder is
    memory = decoder.read(context_input_ids, context_attention_mask, head_lengths, cache)
    hidden = decoder.decode(tokens, depths, ancestors, memory, past)

A context is a prompt without its last token, which is the decoder's first one: the root of every tree. Memory is each
layer's keys and values of the contexts. A token attends to its whole context and to its ancestors; its position is the
context's length and its depth. Query heads that share a key head stand beside each other in one product, so that keys
and values are never repeated. The start token is read with the contexts, and a search keeps its tokens behind them.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from rag.generation.causal_cache import HeadCache
from rag.generation.causal_forward import ForwardLayers
from rag.generation.causal_layers import is_plain
from rag.generation.forward import scaled
from rag.generation.pace import pace_of
from rag.generation.stacks import is_sharded
from rag.generation.token_trees import Memory, Past, TokenScores, attention_bias
from rag.packing import (
    Attention,
    LayerAttention,
    Packing,
    accept_packed_rows,
    accepting_packed_rows,
    masked_by,
    to_device,
)

ROOM = 64  # tokens of a search: four beams of 15 and the start token; with more of them it makes itself room


class ContextMemory(Memory):
    """Keys and values of D contexts, and of the start token behind each.

    Attributes:
        kept: (layers, 2, D', key heads, S + ROOM, head size), the start token's at S, of these and other contexts.
        mask: (D, 1, 1, S) bool; padding may stand anywhere.
        root: (D, d) what the output layer reads of the start token.
        longest: tokens of the longest context, S at most.
        numbers: (D) of the contexts in `kept`; None for all. Nothing is copied until it is asked for.
    """

    def __init__(self, kept: torch.Tensor, mask: torch.Tensor, root: torch.Tensor, longest: int, numbers=None):
        self.kept, self.mask, self.root, self.longest, self.numbers = kept, mask, root, longest, numbers

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        kept = self.own()[..., : self.mask.shape[-1], :]
        return [(keys, values) for keys, values in kept]

    def own(self) -> torch.Tensor:
        """What is kept of these contexts, with the room behind them."""
        return self.kept if self.numbers is None else self.kept[:, :, self.numbers]

    def select(self, documents):
        numbers = torch.arange(len(self.mask), device=self.mask.device) if self.numbers is None else self.numbers
        return ContextMemory(self.kept, self.mask[documents], self.root[documents], self.longest, numbers[documents])


class CausalDecoder(TokenScores):
    def __init__(self, generator):
        super().__init__(generator)
        accept_packed_rows(generator)
        self.model, self.config = generator.base_model, generator.config
        self.start = generator.config.decoder_start_token_id
        self.layers = ForwardLayers(generator) if is_plain(generator) and not is_sharded(generator) else None

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        head_lengths: np.ndarray | None = None,
        cache: HeadCache | None = None,
    ) -> ContextMemory:
        """Keys and values of contexts (D, S), padded on either side.

        Args:
            head_lengths: (D) tokens of each context's own that others may begin with, too; equal heads are read once.
            cache: where heads are looked for, and put.
        """
        is_token = attention_mask.bool().cpu().numpy()
        lengths = is_token.sum(1)
        borders = np.zeros_like(lengths) if head_lengths is None else head_lengths
        contexts = [row[own] for row, own in zip(input_ids.cpu().numpy(), is_token, strict=True)]
        begun = [row[:border] for row, border in zip(contexts, borders, strict=True)]
        rests = [np.append(row[border:], self.start) for row, border in zip(contexts, borders, strict=True)]
        room = _Room(self._read_heads(begun, input_ids.device, cache), borders, lengths - borders)
        mask, roots = to_device(room.is_token, input_ids.device)[:, None, None], []
        for block in _blocks(lengths - borders, pace_of(input_ids.device).chunk_tokens):
            roots.append(self._read_rests(rests[block], room, block, mask))
        assert room.kept is not None, "each context has a start token at least"
        return ContextMemory(room.kept, mask, torch.cat(roots), int(lengths.max()))

    def _read_heads(
        self, heads: list[np.ndarray], device: torch.device, cache: HeadCache | None
    ) -> list[torch.Tensor | None]:
        """Keys and values (layers, 2, key heads, tokens, head size) of each head, None of an empty one."""
        distinct = {head.tobytes(): head for head in heads if len(head)}
        found = {} if cache is None else {key: kept for key in distinct if (kept := cache.get(key)) is not None}
        missing = [head for key, head in distinct.items() if key not in found]
        for block in _blocks(np.array([len(head) for head in missing]), pace_of(device).chunk_tokens):
            for head, kept in zip(missing[block], self._keys_and_values(missing[block], device), strict=True):
                found[head.tobytes()] = kept
                if cache is not None:
                    cache.put(head.tobytes(), kept)
        return [found.get(head.tobytes()) for head in heads]

    def _keys_and_values(self, texts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        """(layers, 2, key heads, tokens, head size) of each text."""
        packing = Packing(np.array([len(text) for text in texts]), device)
        attention = _TextAttention(packing, self.depth)
        with suppress(_AllKept):
            self._run(to_device(np.concatenate(texts), device), packing.positions, attention)
        kept = torch.stack(attention.kept)  # (layers, 2, key heads, T, head size)
        return list(kept.split(packing.lengths.tolist(), 3))

    def _read_rests(self, rests: list[np.ndarray], room: "_Room", block: slice, mask: torch.Tensor) -> torch.Tensor:
        """Put what stands behind a block's heads into the room; what the output layer reads of the ends, (n, d)."""
        device, head_width = mask.device, room.head_width
        packing = _AtTheEnd(np.array([len(rest) for rest in rests]), device)
        packing.longest = room.is_token.shape[1] - head_width + 1  # those of all blocks begin and end alike
        depths = to_device(np.arange(packing.longest) - packing.longest + packing.lengths[:, None], device)
        past = _RoomsPast(self.depth, room, block)
        past.grow(depths)
        # Padding attends to itself: a sum over nothing is no number.
        reach = (depths[:, None] <= depths[..., None]) & (depths[:, None] >= 0)
        ancestors = reach | torch.eye(packing.longest, dtype=torch.bool, device=device)
        heads = Memory([], mask[block, ..., :head_width]) if head_width else None
        is_full = packing.tokens == depths.numel()
        attention = _TreeAttention(depths, depths, ancestors, heads, past, None if is_full else packing)
        attention.is_joined = True
        begins = to_device(room.borders[block].repeat(packing.lengths), device)
        hidden = self._run(to_device(np.concatenate(rests), device), packing.positions + begins, attention)
        return hidden[to_device(packing.first[1:] - 1, device)]

    def decode(self, tokens, depths, ancestors, memory: ContextMemory, past: Past | None = None) -> torch.Tensor:
        """As `TreeDecoder.decode`: last hidden states (D, N, d) of tokens (D, N) that hang on D contexts."""
        key_depths = depths
        if past is not None:
            is_first = past.kept is None
            if is_first:
                past.begin_behind(memory.own(), memory.mask.shape[-1])
            past.grow(depths)
            key_depths = past.depths
            if is_first and bool((tokens == self.start).all()):
                return memory.root[:, None]
        attention = _TreeAttention(depths, key_depths, ancestors, memory, past)
        attention.is_joined = past is not None
        positions = memory.mask.sum(-1).flatten(1) + depths
        return self._run(tokens.flatten(), positions.expand(tokens.shape).flatten(), attention).view(*tokens.shape, -1)

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, attention: LayerAttention) -> torch.Tensor:
        """What the output layer reads, of tokens (T) in a row, (T, d)."""
        if self.layers is not None:
            return scaled(self.layers(tokens, positions, attention), self.config)
        with accepting_packed_rows(self.model), masked_by(attention):
            hidden = self.model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)[0][0]
        return scaled(hidden, self.config)


class _AllKept(Exception):
    """The last layer's keys and values are there: nobody asks for what it makes of them."""


class _TextAttention(LayerAttention):
    """Whole texts in a row: each token attends to those before it in its own. Nobody asks for more than `kept`.

    Attributes:
        kept: keys and values (2, key heads, T, head size) of each layer.
    """

    def __init__(self, packing: Packing, layers: int):
        self.packing, self.layers = packing, layers
        self.kept: list[torch.Tensor] = []
        self._attention: dict[int | None, Attention] = {}

    def of_layer(self, layer, query, key, value, dropout, scale, window):
        self.kept.append(torch.cat([key, value]))
        if len(self.kept) == self.layers:
            raise _AllKept
        if window not in self._attention:
            self._attention[window] = Attention(self.packing, self.packing, causal=True, window=window)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self._attention[window](query, key, value, 0.0, scale)[None]


class _TreeAttention(LayerAttention):
    """What tokens (D, N) in a row attend to: their contexts in `memory`, and ancestors in `past` and among themselves.

    Args:
        depths: (D or 1, N) of the tokens.
        key_depths: (D or 1, keys) of the tokens in `past` and these.
        ancestors: (D or 1, N, keys).
        packing: where the tokens lie in the row if some of the N are padding.
    """

    is_joined = False  # whether `past` begins with the contexts

    def __init__(self, depths, key_depths, ancestors, memory: Memory | None, past: Past | None, packing=None):
        self.depths, self.key_depths, self.ancestors = depths, key_depths, ancestors
        self.memory, self.past, self.packing = memory, past, packing
        self._biases: dict[int | None, torch.Tensor] = {}

    def of_layer(self, layer, query, key, value, dropout, scale, window):
        query, new = self._padded(query), torch.stack([self._padded(key), self._padded(value)]).transpose(2, 3)
        pieces = [new.unbind() if self.past is None else self.past.append(layer, new)]
        if self.memory is not None and not self.is_joined:
            pieces.insert(0, self.memory.layers[layer])
        key_heads, sharing = new.shape[2], query.shape[2] // new.shape[2]
        query = query.unflatten(2, (key_heads, sharing)).transpose(1, 2)  # (D, key heads, N, sharing, head size)
        attended = _attend(query.flatten(2, 3), pieces, self._bias(window, sharing, query.dtype), scale)
        attended = attended.unflatten(2, (-1, sharing)).transpose(1, 2).flatten(2, 3)  # (D, N, heads, head size)
        return (attended.flatten(0, 1) if self.packing is None else self.packing.pack(attended))[None]

    def _padded(self, row: torch.Tensor) -> torch.Tensor:
        """(1, heads, T, head size) to (D, N, heads, head size)."""
        row = row[0].transpose(0, 1)
        return row.unflatten(0, (-1, self.depths.shape[1])) if self.packing is None else self.packing.unpack(row)

    def _bias(self, window: int | None, sharing: int, dtype: torch.dtype) -> torch.Tensor:
        """What attention adds, (D or 1, 1, N * sharing, places in memory and keys); one for all layers of a window."""
        if window not in self._biases:
            attends, distances = self.ancestors, self.depths[..., None] - self.key_depths[:, None]
            if self.memory is not None:
                mask = self.memory.mask[:, 0]  # (D, 1, S)
                positions = mask.sum(-1, keepdim=True) + self.depths[..., None]  # (D, N, 1)
                of_memory = positions - (mask.cumsum(-1) - 1)
                documents, tokens = of_memory.shape[:2]
                attends = torch.cat([mask.expand(-1, tokens, -1), attends.expand(documents, -1, -1)], -1)
                distances = torch.cat([of_memory, distances.expand(documents, -1, -1)], -1)
            if window is not None:
                attends = attends & (distances < window)
            self._biases[window] = attention_bias(attends.repeat_interleave(sharing, 1)[:, None], dtype)
        return self._biases[window]


def _attend(query, pieces, bias, scale: float | None) -> torch.Tensor:
    """Attention (D, key heads, M, head size) of queries of that shape to keys that lie in one or two pieces."""
    if len(pieces) == 1:
        keys, values = pieces[0]
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.cat([query @ keys.mT for keys, _ in pieces], -1).add_(bias)
    shares = scores.softmax(-1).split([keys.shape[2] for keys, _ in pieces], -1)
    return shares[0] @ pieces[0][1] + shares[1] @ pieces[1][1]


class _Room:
    """Where the keys and values of D contexts lie: their heads, padded behind, and their rests, padded before.

    Args:
        heads: (D) each one's (layers, 2, key heads, tokens, head size), None of an empty one.
        borders: (D) tokens of the heads.
        rests: (D) of what stands behind them, without the start token.

    Attributes:
        is_token: (D, S) bool, on the host.
        kept: (layers, 2, D, key heads, S + ROOM, head size), None until it is known how large a layer's are.
    """

    def __init__(self, heads: list[torch.Tensor | None], borders: np.ndarray, rests: np.ndarray):
        self.heads, self.borders, self.head_width = heads, borders, int(borders.max())
        place = np.arange(self.head_width + rests.max())
        self.is_token = (place < borders[:, None]) | (place >= len(place) - rests[:, None])
        self.kept: torch.Tensor | None = None

    def make(self, new: torch.Tensor, layers: int) -> torch.Tensor:
        """For such keys and values as a layer's new ones, (2, contexts, key heads, tokens, head size)."""
        contexts, width = self.is_token.shape
        kept = new.new_empty(layers, 2, contexts, new.shape[2], width + ROOM, new.shape[4])
        for row, (head, border) in enumerate(zip(self.heads, self.borders, strict=True)):
            if head is not None:
                kept[:, :, row, :, :border] = head
            kept[:, :, row, :, border : self.head_width] = 0  # a product with what is masked must be a number
        return kept


class _RoomsPast(Past):
    """Of a block of contexts: keys and values go into the room, behind the heads."""

    def __init__(self, layers: int, room: _Room, block: slice):
        super().__init__(layers, capacity=0)
        self.room, self.block, self.length = room, block, room.head_width

    def _make_room(self, new):
        if self.room.kept is None:
            self.room.kept = self.room.make(new, self.number_of_layers)
        self.kept = self.room.kept[:, :, self.block]
        super()._make_room(new)


class _AtTheEnd(Packing):
    """Sequences whose padding stands before them."""

    def places(self, width: int) -> torch.Tensor:
        if width not in self._places:
            moved = to_device((width - self.lengths).repeat(self.lengths), self.device)
            self._places[width] = super().places(width) + moved
        return self._places[width]


def _blocks(lengths: np.ndarray, most: int) -> Iterator[slice]:
    """Neighbors of `most` tokens together, or one alone that is longer."""
    first, tokens = 0, 0
    for place, length in enumerate(lengths):
        if place > first and tokens + length > most:
            yield slice(first, place)
            first, tokens = place, 0
        tokens += length
    if first < len(lengths):
        yield slice(first, len(lengths))
