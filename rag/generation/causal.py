"""A language model in training: prompts and the answers behind them in one row, what they share once, without padding.

    hidden, answers = states_of_answers(generator, input_ids, attention_mask, decoder_input_ids, heads=heads)   # (R, d)

The row holds each head that several contexts share, and then of every context the rest with its decoder inputs. Each
token attends to those before it in its own prompt alone, wherever they lie, at the place that it has in that prompt:
results and gradients are those of one pass a context. Only the answers' hidden states leave: prompts have no logits.
"""

import numpy as np
import torch

from rag.generation.causal_layers import is_plain, states_of_row
from rag.generation.stacks import is_sharded
from rag.packing import Attention, Heads, LayerAttention, Packing, accepts_packed_rows, masked_by, to_device


class PromptRow(LayerAttention):
    """Where N prompts with their answers lie in one row: heads that several share, then what is each one's own.

    Args:
        prompts: (N) tokens of each.
        answers: those of each, at least one token.
        heads: of the prompts; None where none are shared.

    Attributes:
        whole: the prompts with their answers, as they would be without sharing.
        queries: the row's pieces.
        keys: the same pieces, with their heads in front.
        key_places: (K) int64, where the keys lie in the row; None where they are the queries.
        positions: (T) int64, each token's place in its prompt.
        token_places: (T) int64 on the host, where the row's tokens lie in `whole`.
        answer_places: (R) int64, where the answers' tokens lie in the row.
    """

    def __init__(self, prompts: np.ndarray, answers: Packing, heads: Heads | None):
        device = answers.device
        self.whole, self.answers = Packing(prompts + answers.lengths, device), answers
        own = np.arange(len(prompts))
        first, lengths = (own, np.zeros_like(own)) if heads is None else (heads.first, heads.lengths)
        is_shared = (np.bincount(first, minlength=len(own))[first] > 1) & (lengths > 0)
        owners = np.unique(first[is_shared])  # whose heads stand in the row as pieces of their own
        begins = np.where(is_shared, lengths, 0)  # of each sequence's own piece
        sequences = np.concatenate([owners, own])  # of each piece
        offsets = np.concatenate([np.zeros_like(owners), begins])
        sizes = np.concatenate([lengths[owners], self.whole.lengths - begins])
        self.queries = self.keys = Packing(sizes, device)
        self.token_places = spans(self.whole.first[sequences] + offsets, sizes)
        self.key_places = None
        if len(owners):
            self.keys = Packing(sizes + offsets, device)
            head_starts = self.queries.first[np.where(is_shared, np.searchsorted(owners, first), 0)]
            starts = np.stack([np.concatenate([np.zeros_like(owners), head_starts]), self.queries.first[:-1]], 1)
            self.key_places = to_device(spans(starts.ravel(), np.stack([offsets, sizes], 1).ravel()), device)
        self.positions = self.queries.positions + to_device(offsets.repeat(sizes), device)
        ends = self.queries.first[len(owners) + 1 :]
        self.answer_places = to_device(spans(ends - answers.lengths, answers.lengths), device)
        self._attention: dict[tuple[int | None, bool], Attention] = {}

    def of_layer(self, layer, query, key, value, dropout, scale, window):
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        if self.key_places is not None:
            key, value = (tensor.index_select(0, self.key_places) for tensor in (key, value))
        return self.attention(window)(query, key, value, dropout, scale).unsqueeze(0)

    def with_backward(self, query, key, value, scale: float | None, window: int | None, answers_alone: bool):
        """The same of (T, heads, head size) without autograd or dropout: the result, and from its gradient the three's.

        Args:
            answers_alone: the queries are the answers' tokens, (R, heads, head size).
        """
        places, size = self.key_places, len(key)
        if places is not None:
            places = places[-self.whole.tokens :] if answers_alone else places
            key, value = (tensor.index_select(0, places) for tensor in (key, value))
        attended, back = self.attention(window, answers_alone).with_backward(query, key, value, 0.0, scale)

        def back_to_row(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            to_query, *others = back(gradient)
            if places is not None:  # a head's keys are read by all who share it
                others = [part.new_zeros(size, *part.shape[1:]).index_add_(0, places, part) for part in others]
            return to_query, *others

        return attended, back_to_row

    def attention(self, window: int | None, answers_alone: bool = False) -> Attention:
        if window is not None and window >= self.keys.longest:
            window = None
        if (window, answers_alone) not in self._attention:
            sides = (self.answers, self.whole) if answers_alone else (self.queries, self.keys)
            self._attention[window, answers_alone] = Attention(*sides, causal=True, window=window)
        return self._attention[window, answers_alone]


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """So many numbers from each start on, end to end."""
    return np.arange(lengths.sum()) + (starts - (lengths.cumsum() - lengths)).repeat(lengths)


def states_of_answers(
    generator, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor,
    lengths: np.ndarray | None = None, heads: Heads | None = None, decoder_lengths: np.ndarray | None = None,
) -> tuple[torch.Tensor, Packing]:  # fmt: skip
    """A language model's last hidden states of the decoder's inputs; `rag.generation.forward.answer_states` says more.

    Returns:
        (R, d), and where the N answers' tokens lie in it.
    """
    (batch, width), device = decoder_input_ids.shape, input_ids.device
    n_docs = len(input_ids) // batch
    if decoder_lengths is None:
        decoder_lengths = np.full(batch, width)
    prompts, places = _tokens(attention_mask, lengths)
    answers = Packing(decoder_lengths.repeat(n_docs), device)
    is_packed = accepts_packed_rows(generator)
    row = PromptRow(prompts, answers, heads if is_packed and not _drops_out(generator) else None)
    starts = np.stack([prompts.cumsum() - prompts, len(places) + np.arange(batch).repeat(n_docs) * width], 1)
    whole = spans(starts.ravel(), np.stack([prompts, answers.lengths], 1).ravel())
    places = np.concatenate([places, input_ids.numel() + np.arange(batch * width)])[whole[row.token_places]]
    ids = torch.cat([input_ids.flatten(), decoder_input_ids.flatten()]).index_select(0, to_device(places, device))
    prepares_backward = not torch.is_inference_mode_enabled()  # which would refuse that
    if is_packed and prepares_backward and is_plain(generator) and not is_sharded(generator):
        return states_of_row(generator, ids, row), answers
    hidden = _run(generator, ids, row) if is_packed else _run_padded(generator, ids, row)
    return hidden.index_select(0, row.answer_places), answers


def _tokens(attention_mask: torch.Tensor, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens each context (N, S) has, and where they lie in the contexts end to end, padding left out."""
    count, width = attention_mask.shape
    if lengths is not None:
        return lengths, spans(np.arange(count) * width, lengths)
    mask = attention_mask.cpu().numpy()
    return mask.sum(1), np.flatnonzero(mask)


def _drops_out(generator) -> bool:
    """Whether random numbers are drawn for each token: a head's would be the same in all prompts that share it."""
    rates = [part.p for part in generator.modules() if isinstance(part, torch.nn.Dropout)]
    rates.append(getattr(generator.config, "attention_dropout", None) or 0.0)
    return generator.training and max(rates) > 0.0


def _run(generator, ids: torch.Tensor, row: PromptRow) -> torch.Tensor:
    """Token ids (T) of a row to the last hidden states (T, d)."""
    with masked_by(row):
        return generator.base_model(ids[None], position_ids=row.positions[None], use_cache=False)[0][0]


def _run_padded(generator, ids: torch.Tensor, row: PromptRow) -> torch.Tensor:
    """The same by an attention that does not know of rows."""
    mask = row.whole.unpack(torch.ones_like(ids))
    hidden = generator.base_model(row.whole.unpack(ids), attention_mask=mask, use_cache=False)[0]
    return row.whole.pack(hidden)
