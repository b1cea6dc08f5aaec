"""Fusion-in-Decoder: the passages of a question, each encoded apart, as one context that the decoder reads.

    passages = encode_passages(model.generator, input_ids, attention_mask, is_there)       # (B * n_docs, S)
    hidden, answers = decode_answers(model.generator, passages.joined(), decoder_input_ids)
    memory = joined_memory(memory, owners)                                                 # the same for a search

A slot without a passage is neither encoded nor attended to. A question without any passage is answered from its first
context, which holds the question alone. In a packed row a question's passages lie behind one another already: joined,
they are the same states under another `Packing`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rag.generation.forward import EncodedContexts, encode_contexts, full_precision
from rag.generation.token_trees import Memory
from rag.packing import Attention, Packing, to_device


def is_fusion(model) -> bool:
    """Whether a RAG model reads its passages so (`rag.models.fid_rag.RagFidForGeneration`)."""
    return getattr(model, "fuses_passages", False)


@dataclass
class Passages:
    """The encoded passages of B questions.

    Attributes:
        encoded: of D passages, each a context of its own.
        slots: (D) int64, where each stands among all questions' n_docs, ascending; one of a question at least.
        n_docs: slots of a question.
    """

    encoded: EncodedContexts
    slots: np.ndarray
    n_docs: int

    @property
    def owners(self) -> np.ndarray:
        """(D) int64, the question of each, ascending."""
        return self.slots // self.n_docs

    def joined(self, is_read: np.ndarray | None = None) -> EncodedContexts:
        """As one context a question.

        Args:
            is_read: (D) bool, one of a question at least; None for all.
        """
        encoded, owners = self.encoded, self.owners
        if is_read is not None:
            encoded, owners = _chosen(encoded, is_read), owners[is_read]
        device = encoded.hidden.device
        if encoded.packing is not None:
            return EncodedContexts(encoded.hidden, None, Packing(np.bincount(owners, encoded.packing.lengths), device))
        assert encoded.attention_mask is not None
        places = Packing(np.bincount(owners), device)
        hidden, mask = (places.unpack(part).flatten(1, 2) for part in (encoded.hidden, encoded.attention_mask))
        return EncodedContexts(hidden, mask, None)


def _chosen(encoded: EncodedContexts, is_chosen: np.ndarray) -> EncodedContexts:
    """Some of the contexts, by (N) bool."""
    device, packing = encoded.hidden.device, encoded.packing
    if packing is None:
        rows = to_device(np.flatnonzero(is_chosen), device)
        assert encoded.attention_mask is not None
        return EncodedContexts(encoded.hidden[rows], encoded.attention_mask[rows], None)
    tokens = to_device(np.flatnonzero(is_chosen.repeat(packing.lengths)), device)
    return EncodedContexts(encoded.hidden[tokens], None, Packing(packing.lengths[is_chosen], device))


def slots_of(is_there: np.ndarray) -> np.ndarray:
    """The slots (D) that are read, of (B, n_docs) bool: those with a passage; of a question without any its first."""
    is_first = np.arange(is_there.shape[1]) == 0
    return np.flatnonzero(is_there | (is_first & ~is_there.any(1, keepdims=True)))


def encode_passages(
    generator,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    is_there: np.ndarray,
    lengths: np.ndarray | None = None,
) -> Passages:
    """Encode the contexts (B * n_docs, S) that hold a passage.

    Args:
        is_there: (B, n_docs) bool, on the host.
        lengths: (B * n_docs) tokens of each context, on the host, where it is known that padding is on the right.
    """
    slots = slots_of(is_there)
    if len(slots) < is_there.size:
        kept = to_device(slots, input_ids.device)
        input_ids, attention_mask = input_ids[kept], attention_mask[kept]
        lengths = None if lengths is None else lengths[slots]
    return Passages(encode_contexts(generator, input_ids, attention_mask, lengths), slots, is_there.shape[1])


def joined_memory(memory: Memory, owners: np.ndarray) -> Memory:
    """What a tree decoder reads of D passages as what it reads of B questions, without the padding between passages.

    Args:
        memory: of the passages; its layers are taken out one by one, so that not all are there twice.
        owners: (D) int64, the question of each, ascending; every question has one.
    """
    device = memory.mask.device
    is_token = memory.mask[:, 0, 0].cpu().numpy()
    packing = Packing(np.bincount(owners, is_token.sum(1)), device)
    row, column = (to_device(places, device) for places in np.nonzero(is_token))

    def joined(part: torch.Tensor) -> torch.Tensor:
        """(D, heads, S, head size) to (B, heads, S', head size)."""
        return packing.unpack(part[row, :, column]).transpose(1, 2)

    layers = []
    while memory.layers:
        keys, values = memory.layers.pop(0)
        layers.append((joined(keys), joined(values)))
    is_token = np.arange(packing.longest) < packing.lengths[:, None]
    return Memory(layers, to_device(is_token, device)[:, None, None])


class NotedAttention(Attention):
    """Cross-attention that notes how much each token of the contexts gives to the answers that attend to it.

    That is its attention probability times the length of its value vector, as Izacard et al. 2022 (arXiv 2208.03299,
    section 2.2) measure it: averaged over layers, heads and the answer's tokens. Products are in float32 at least, of
    one question and one layer at a time.

    Attributes:
        given: (T') sums over layers of what the tokens of the keys' row give.
        layers: how many have been summed.
    """

    def __init__(self, queries: Packing, keys: Packing):
        super().__init__(queries, keys)
        self.given, self.layers = torch.zeros(keys.tokens, device=keys.device), 0

    def __call__(self, query, key, value, dropout: float, scale: float | None, bias=None) -> torch.Tensor:
        self._note(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return super().__call__(query, key, value, dropout, scale, bias)

    @torch.no_grad()
    def _note(self, query, key, value, scale: float) -> None:
        sides = (self.queries, query), (self.keys, key), (self.keys, value)
        parts = zip(*(tensor.split(packing.lengths.tolist()) for packing, tensor in sides), strict=True)
        given = []
        for own_query, own_key, own_value in parts:
            q, k, v = (full_precision(part.transpose(0, 1)) for part in (own_query, own_key, own_value))
            shares = (q @ k.mT * scale).softmax(-1)  # (heads, T, S)
            given.append((shares.mean(1) * v.norm(dim=-1)).mean(0))
        self.given = self.given + torch.cat(given)
        self.layers += 1

    def of_passages(self, passages: Packing) -> torch.Tensor:
        """What all tokens of a passage give, the mean over layers, (D), of the D passages that the keys' row holds."""
        numbers = np.arange(len(passages.lengths)).repeat(passages.lengths)
        sums = self.given.new_zeros(len(passages.lengths))
        return sums.index_add(0, to_device(numbers, sums.device), self.given) / self.layers
