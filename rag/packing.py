"""Sequences of different length in one row, without padding, and attention that keeps them apart.

    accept_packed_rows(model)                                  # once: from then on its attention knows such rows
    packing = Packing(lengths, device)                         # of N sequences, (N) on the host
    row = packing.pack(padded)                                 # (N, S, ...) to (T, ...), T = lengths.sum()
    hidden = layer(row[None], Attention(packing, packing))     # a transformers layer, given this as its mask
    padded = packing.unpack(hidden[0])                         # (N, longest, ...)

Linear layers and norms work on real tokens alone, whatever the lengths. Attention itself runs in one kernel for ragged
sequences (FlashAttention, with dropout) where the device has it and there is no bias to add, elsewhere over padded
groups of similar length: the results are the same. transformers' modules hand their mask through to the attention
function; without an `Attention` as mask, a model works as it does with "sdpa".
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

IMPLEMENTATION = "packed"  # its name in transformers
PADDED = "padded"  # that of "sdpa" where it was asked for: `accept_packed_rows` leaves it alone
# What one group more costs on a CPU, as positions that attention could read in its time.
GROUP_COST = 64
# Where shapes cost time at their first use (kernels are chosen, graphs made), lengths are rounded up to a multiple.
LADDER = 64
# cuDNN's attention, torch's first choice on some GPUs, plans anew for every shape.
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that no work there is waited for: a GPU takes it from pinned memory."""
    tensor = torch.as_tensor(array)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def groups_of_similar_length(
    lengths: np.ndarray, group_cost: int, group_tokens: int | None = None
) -> list[tuple[np.ndarray, int]]:
    """The cheapest way to read sequences in padded groups: tokens, padding included, and `group_cost` for each group.

    Args:
        lengths: (N) int64, at least 1 each.
        group_tokens: the most tokens, padding included, of a group of more than one sequence; None for no limit.

    Returns:
        The rows of each group and the length of its longest; each row is in one group.
    """
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order]
    costs, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)  # of the best first i groups
    for stop in range(1, len(order) + 1):
        longest = sizes[stop - 1]
        first = 0 if group_tokens is None else max(0, stop - max(1, group_tokens // longest))
        ways = costs[first:stop] + (stop - np.arange(first, stop)) * longest + group_cost
        starts[stop], costs[stop] = first + ways.argmin(), ways.min()
    groups, stop = [], len(order)
    while stop:
        groups.append((order[starts[stop] : stop], int(sizes[stop - 1])))
        stop = starts[stop]
    return groups


def right_padded_lengths(attention_mask: torch.Tensor) -> np.ndarray | None:
    """The length (N) of each sequence of a mask (N, S), on the host.

    None where padding stands before or between tokens, or a sequence has none.
    """
    mask = attention_mask.cpu().numpy()
    lengths = mask.sum(1)
    is_token = np.arange(mask.shape[1]) < lengths[:, None]
    return lengths if (mask == is_token).all() and lengths.min(initial=1) > 0 else None


class Packing:
    """Where N sequences lie in one row of T tokens, one behind the other.

    Attributes:
        lengths: (N) int64, on the host.
        tokens: T.
        longest: of the lengths.
        device: where the tensors are.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens, self.longest, self.device = int(self.lengths.sum()), int(self.lengths.max(initial=0)), device
        self.first = np.concatenate([[0], np.cumsum(self.lengths)])  # (N + 1), on the host
        self._place = np.arange(self.tokens) - self.first[:-1].repeat(self.lengths)  # (T) in its sequence
        self._places: dict[int, torch.Tensor] = {}

    @cached_property
    def starts(self) -> torch.Tensor:
        """(N + 1) int32, where each sequence begins, and T."""
        return to_device(self.first.astype(np.int32), self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """(T) int64, each token's place in its sequence."""
        return to_device(self._place, self.device)

    def places(self, width: int) -> torch.Tensor:
        """(T) int64, where each token stands in the sequences padded to one width and laid end to end."""
        if width not in self._places:
            rows = np.arange(len(self.lengths)).repeat(self.lengths)
            self._places[width] = to_device(rows * width + self._place, self.device)
        return self._places[width]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(N, S, ...) to (T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places(padded.shape[1]))

    def unpack(self, row: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """(T, ...) to (N, width, ...), zero behind the ends; the width is that of the longest, unless it is given."""
        width = self.longest if width is None else width
        shape = (len(self.lengths) * width, *row.shape[1:])
        return row.new_zeros(shape).index_copy(0, self.places(width), row).unflatten(0, (-1, width))


@dataclass
class Heads:
    """Beginnings that several contexts share: those tokens of a language model's prompt that a passage alone decides.

    Attributes:
        lengths: (N) tokens of each context's own.
        first: (N) the first context that begins with the same tokens: its own number where it is that one.
    """

    lengths: np.ndarray
    first: np.ndarray


@dataclass
class _Group:
    """Sequences that attend in one padded call: their numbers, and the lengths that they are padded to."""

    sequences: np.ndarray
    queries: int
    keys: int
    is_ragged: bool  # whether some keys are padding


class Attention:
    """Which tokens attend to which: those of sequence n of one packing to those of sequence n of another.

    Args:
        queries: whose tokens attend.
        keys: to whose; the same packing for self-attention.
        causal: each token attends to itself and those before it alone; the queries are the last of the keys' tokens.
        window: so many at most, itself included; None for all before it. For causal ones.
    """

    def __init__(self, queries: Packing, keys: Packing, causal: bool = False, window: int | None = None):
        assert len(queries.lengths) == len(keys.lengths), (len(queries.lengths), len(keys.lengths))
        assert causal or window is None
        assert queries is keys or not causal or (queries.lengths <= keys.lengths).all()
        self.queries, self.keys, self.causal, self.window = queries, keys, causal, window

    @property
    def longest(self) -> int:
        """How many places a bias needs for keys, and for queries of self-attention."""
        return self.keys.longest if self.keys.device.type == "cpu" else _rung(self.keys.longest)

    def __call__(self, query, key, value, dropout: float, scale: float | None, bias=None) -> torch.Tensor:
        """query (T, heads, head size), key and value (T', key heads, head size) to (T, heads, head size).

        Args:
            bias: (1, heads, Q, K), added to each sequence's products, at least as large as the longest; or None.
        """
        if bias is None and _has_kernel_for(query):
            return self._ragged(query, key, value, dropout, scale)
        return self._grouped(query, key, value, dropout, scale, bias)

    def with_backward(
        self, query, key, value, dropout: float, scale: float | None
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
        """The same without autograd: the result, and a function from its gradient to those of the three."""
        if _has_kernel_for(query):
            return self._ragged_with_backward(query, key, value, dropout, scale)
        dtype = query.dtype
        # A CPU's attention goes back through bfloat16 in twice the time that it takes through float32.
        inner = torch.float32 if query.device.type == "cpu" and dtype == torch.bfloat16 else dtype
        query, key, value = (tensor.detach().to(inner).requires_grad_() for tensor in (query, key, value))
        with torch.enable_grad():
            attended = self._grouped(query, key, value, dropout, scale, None)

        def back(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            gradients = torch.autograd.grad(attended, (query, key, value), gradient.to(inner))
            return tuple(part.to(dtype) for part in gradients)

        return attended.detach().to(dtype), back

    def _ragged_with_backward(self, query, key, value, dropout: float, scale: float | None):
        places = self._kernel_places
        attended, sums, *random, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *places, dropout, self.causal, False, scale=scale, **self._kernel_window
        )

        def back(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.ops.aten._flash_attention_backward(
                gradient, query, key, value, attended, sums, *places, dropout, self.causal, *random,
                scale=scale, **self._kernel_window,
            )  # fmt: skip

        return attended, back

    def _ragged(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """By FlashAttention's kernel; `torch.nn.attention.varlen.varlen_attn`, which calls it, takes no dropout."""
        places = self._kernel_places
        return torch.ops.aten._flash_attention_forward(
            query, key, value, *places, dropout, self.causal, False, scale=scale, **self._kernel_window
        )[0]

    def _grouped(self, query, key, value, dropout: float, scale: float | None, bias) -> torch.Tensor:
        queries = self._query_places.split(query)
        keys, values = self._key_places.split(key), self._key_places.split(value)
        attended = []
        fewer = query.shape[1] != key.shape[1]
        for group, q, k, v, counts in zip(self._groups, queries, keys, values, self._masks, strict=True):
            mask = self._mask(group, counts, None if bias is None else bias.to(q.dtype))
            if fewer and q.is_cuda:  # of BACKENDS none but the slow one takes fewer heads of keys
                k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with sdpa_kernel(BACKENDS) if q.is_cuda else nullcontext():
                is_causal = self.causal and mask is None
                out = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=fewer)
            attended.append(out.transpose(1, 2))
        return self._query_places.join(attended)

    def _mask(self, group: "_Group", counts: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to a group's products, or which of its keys count; None where all do, or all up to a query."""
        if bias is None:
            return counts
        bias = bias[:, :, : group.queries, : group.keys]
        if self.causal and counts is None:
            counts = torch.ones(group.queries, group.keys, dtype=torch.bool, device=bias.device).tril()
        return bias if counts is None else bias.masked_fill(~counts, float("-inf"))

    @cached_property
    def _kernel_places(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where the queries' and the keys' sequences begin, and the longest of each, rounded up to a rung."""
        return self.queries.starts, self.keys.starts, _rung(self.queries.longest), _rung(self.keys.longest)

    @property
    def _kernel_window(self) -> dict[str, int]:
        """Left of a query and right of it; what the kernel calls causal are the last queries of the keys, too."""
        return {} if self.window is None else {"window_size_left": self.window - 1, "window_size_right": 0}

    @cached_property
    def _is_tail(self) -> np.ndarray:
        """(N) whether the queries are but the last of the keys, of a causal one."""
        return self.causal & (self.queries.lengths < self.keys.lengths)

    @cached_property
    def _groups(self) -> list[_Group]:
        queries, keys = self.queries.lengths, self.keys.lengths
        if self.keys.device.type == "cpu":
            sides = np.flatnonzero(~self._is_tail), np.flatnonzero(self._is_tail)
            rows = [own[group] for own in sides for group, _ in groups_of_similar_length(keys[own], GROUP_COST)]
            sizes = [(int(queries[own].max()), int(keys[own].max())) for own in rows]
        else:  # one call of a size from a short ladder
            rows, sizes = [np.arange(len(keys))], [(_rung(self.queries.longest), _rung(self.keys.longest))]
        return [
            _Group(own, longest_query, longest_key, bool((keys[own] < longest_key).any()))
            for own, (longest_query, longest_key) in zip(rows, sizes, strict=True)
        ]

    @cached_property
    def _masks(self) -> list[torch.Tensor | None]:
        """Of each group: which keys count, (G, 1, 1 or Q, K) bool; None where all do, or all up to a query."""
        masks: list[torch.Tensor | None] = []
        for group in self._groups:
            if not self.causal:
                is_key = np.arange(group.keys) < self.keys.lengths[group.sequences, None]
                masks.append(to_device(is_key, self.keys.device)[:, None, None] if group.is_ragged else None)
            elif self.window is None and not self._is_tail[group.sequences].any():
                masks.append(None)  # padding lies behind every token that a query reads
            else:
                masks.append(to_device(self._reach(group), self.keys.device)[:, None])
        return masks

    def _reach(self, group: _Group) -> np.ndarray:
        """Which keys a causal group's queries attend to, (G, Q, K); padding as the last token."""
        queries, keys = (side.lengths[group.sequences, None] for side in (self.queries, self.keys))
        place = (keys - queries + np.minimum(np.arange(group.queries), queries - 1))[:, :, None]
        key = np.arange(group.keys)
        return (key <= place) & (key > place - (self.window or group.keys))

    @cached_property
    def _query_places(self) -> "_Places":
        return _Places(self.queries, [(group.sequences, group.queries) for group in self._groups])

    @cached_property
    def _key_places(self) -> "_Places":
        if self.keys is self.queries:
            return self._query_places
        return _Places(self.keys, [(group.sequences, group.keys) for group in self._groups])


class _Places:
    """The way of tokens from a row into padded groups, and back."""

    def __init__(self, packing: Packing, groups: list[tuple[np.ndarray, int]]):
        self.shapes = [(len(sequences), width) for sequences, width in groups]
        self.sizes = [count * width for count, width in self.shapes]
        sources, is_token = [], []
        place_of = np.empty(packing.tokens, dtype=np.int64)
        end = 0
        for sequences, width in groups:
            lengths = packing.lengths[sequences, None]  # (G, 1)
            columns = np.arange(width)
            source = packing.first[sequences][:, None] + np.minimum(columns, lengths - 1)  # padding repeats the last
            real = columns < lengths
            place_of[source[real]] = end + np.flatnonzero(real)
            sources.append(source.ravel())
            is_token.append(real.ravel())
            end += source.size
        self.source = to_device(np.concatenate(sources), packing.device)  # of each padded place, in the row
        self.place_of = to_device(place_of, packing.device)  # of each token, among the padded places
        self.is_token = to_device(np.concatenate(is_token), packing.device)[:, None, None]

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """(T, heads, head size) to the groups' (G, width, heads, head size)."""
        padded = _Take.apply(row, self.source, self.place_of, None)
        return [part.unflatten(0, shape) for part, shape in zip(padded.split(self.sizes), self.shapes, strict=True)]

    def join(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """The groups' (G, width, heads, head size) to (T, heads, head size)."""
        return _Take.apply(
            torch.cat([group.flatten(0, 1) for group in groups]), self.place_of, self.source, self.is_token
        )


class _Take(torch.autograd.Function):
    """Rows by number, whose gradients are rows by number, too: the plain one would add into zeros."""

    @staticmethod
    def forward(ctx, rows, numbers, back, keep):
        ctx.save_for_backward(back, keep)
        return rows.index_select(0, numbers)

    @staticmethod
    def backward(ctx, gradient):
        back, keep = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        return (gradient if keep is None else gradient * keep), None, None, None


def _rung(length: int) -> int:
    """The next length on the ladder."""
    return -(-length // LADDER) * LADDER


@cache
def has_ragged_kernel(device: torch.device) -> bool:
    """Whether FlashAttention's kernel runs there: from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_ragged_head_size(size: int) -> bool:
    """Whether that kernel takes heads of this size."""
    return size <= 256 and size % 8 == 0


def _has_kernel_for(query: torch.Tensor) -> bool:
    in_half = query.dtype in (torch.bfloat16, torch.float16)
    return in_half and is_ragged_head_size(query.shape[-1]) and has_ragged_kernel(query.device)


@torch.compiler.disable  # the lengths differ with every batch: what lies around it is compiled
def packed_attention(
    module: torch.nn.Module, query, key, value, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, position_bias: torch.Tensor | None = None, **kwargs: Any,
):  # fmt: skip
    """What `accept_packed_rows` sets, in transformers' form: (1, heads, T, head size) each and an `Attention` as mask.

    Args:
        position_bias: T5's, (1, heads, Q, K), or a single number where a layer has none.
    """
    if isinstance(attention_mask, LayerAttention):
        window = kwargs.get("sliding_window")
        layer = module.layer_idx
        return attention_mask.of_layer(layer, query, key, value, dropout, scaling, window), None  # type: ignore
    if not isinstance(attention_mask, Attention):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, position_bias=position_bias, **kwargs
        )
    bias = position_bias if position_bias is not None and position_bias.dim() else None
    # Views, whose gradients are views: of `[0]` it would be a tensor of zeros to write into.
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attention_mask(query, key, value, dropout, scaling, bias).unsqueeze(0), None


class LayerAttention(ABC):
    """What the layers of a language model attend to, each in its own way: the model is run as it is, `masked_by` it."""

    @abstractmethod
    def of_layer(
        self, layer: int, query, key, value, dropout: float, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query (1, heads, T, head size), key and value (1, key heads, T, head size) to (1, T, heads, head size).

        Args:
            layer: its number, from 0.
            window: a token attends to so many at most, itself included; None for all before it.
        """


_layout: ContextVar[LayerAttention | None] = ContextVar("layout", default=None)


@contextmanager
def masked_by(layout: LayerAttention) -> Iterator[None]:
    """Have the layers of a model that accepts packed rows attend as the layout says, whatever mask they would make."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def _mask_of_layout(**kwargs: Any) -> Any:
    """In the place of the mask that transformers makes for a model: the layout, where there is one."""
    layout = _layout.get()
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs) if layout is None else layout


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionInterface.register(PADDED, sdpa_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask_of_layout)
AttentionMaskInterface.register(PADDED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def accept_packed_rows(model: PreTrainedModel) -> None:
    """Have a model's layers take an `Attention` as their mask; with any other mask they stay as they were ("sdpa").

    A model for which another attention was chosen keeps that.
    """
    if _attention_of(model) == "sdpa":
        model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def accepting_packed_rows(model: PreTrainedModel) -> Iterator[None]:
    """The same for a while, also of a model for which another attention was chosen."""
    chosen = _attention_of(model)
    if chosen == IMPLEMENTATION:
        yield
        return
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def accepts_packed_rows(model: PreTrainedModel) -> bool:
    return _attention_of(model) == IMPLEMENTATION


def _attention_of(model: PreTrainedModel) -> str | None:
    return model.config._attn_implementation
