"""The decoder of any family over trees of tokens, by transformers' own modules: exact, and slower than a tree decoder.

    decoder = PlainDecoder(generator)      # called as token_trees.TreeDecoder is

Each way from the root of a tree to one of its leaves is decoded as a sequence of its own, without a cache.
"""

import torch

from rag.generation.causal_decoder import CausalDecoder
from rag.generation.families import require_family
from rag.generation.forward import scaled
from rag.generation.pace import pace_of
from rag.generation.stacks import use_packed_rows
from rag.generation.token_trees import DECODERS, Memory, Past, TokenScores, TreeDecoder


class PlainDecoder(TokenScores):
    depth = 1  # of what `Past` keeps: the tokens

    def __init__(self, generator):
        super().__init__(generator)
        self.encoder, self.decoder, self.config = generator.get_encoder(), generator.get_decoder(), generator.config

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Memory:
        """Encode contexts (D, S), all at one length: some families' vectors depend on it."""
        rows = max(1, pace_of(input_ids.device).chunk_tokens // input_ids.shape[1])
        parts = zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
        encoded = torch.cat([self.encoder(input_ids=ids, attention_mask=mask)[0] for ids, mask in parts])
        return Memory([(encoded, encoded)], attention_mask[:, None, None, :].bool())

    def decode(self, tokens, depths, ancestors, memory: Memory, past: Past | None = None) -> torch.Tensor:
        """As `TreeDecoder.decode`: the last hidden states (D, N, d) of tokens (D, N); nodes are numbered downwards."""
        documents = len(tokens)
        if past is not None:  # all new tokens are equally deep, and each ends a way of its own
            past.grow(depths)
            column = tokens[:, None, :, None]
            tokens = past.append(0, torch.stack([column, column]))[0][:, 0, :, 0]  # (D, tokens in past)
            places = _first_places(ancestors.expand(documents, -1, -1), past.steps)
            ways = tokens[:, None].expand(-1, places.shape[1], -1).gather(2, places)  # (D, N, length)
            return self._hidden(ways, memory)[:, :, -1]
        # A node's way begins at the root; it is decoded as a part of the way to some leaf below it.
        ancestors = ancestors.expand(documents, -1, -1)
        depths = depths.expand(documents, -1)
        is_leaf = ancestors.sum(1) == 1
        leaves = _first_places(is_leaf, int(is_leaf.sum(1).max()))  # (D, L), some nodes of smaller trees among them
        above = ancestors.take_along_dim(leaves[..., None], 1)  # (D, L, N)
        length = int(depths.max()) + 1
        places = _first_places(above, length)
        places = places.where(torch.arange(length, device=tokens.device) <= depths.gather(1, leaves)[..., None], 0)
        ways = tokens[:, None].expand(-1, places.shape[1], -1).gather(2, places)
        hidden = self._hidden(ways, memory)  # (D, L, length, d)
        way = above.int().argmax(1)  # (D, N)
        return hidden[torch.arange(documents, device=tokens.device)[:, None], way, depths]

    def _hidden(self, ways: torch.Tensor, memory: Memory) -> torch.Tensor:
        """What the output layer reads (D, W, T, d) of W sequences (D, W, T) for each document."""
        (encoded, _), mask = memory.layers[0], memory.mask[:, 0, 0].long()
        number, length = ways.shape[1:]
        rows = torch.arange(len(ways), device=ways.device).repeat_interleave(number)
        parts = []
        step = max(1, pace_of(ways.device).chunk_tokens // max(length, encoded.shape[1]))
        for own, sequences in zip(rows.split(step), ways.flatten(0, 1).split(step), strict=True):
            hidden = self.decoder(
                input_ids=sequences,
                encoder_hidden_states=encoded[own],
                encoder_attention_mask=mask[own],
                use_cache=False,
            )[0]
            parts.append(scaled(hidden, self.config))
        return torch.cat(parts).unflatten(0, (len(ways), number))


def _first_places(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` places along the last dimension where a mask is True, in order, and some others behind them."""
    return (~mask).int().argsort(dim=-1, stable=True)[..., :count]


def decoder_of(generator) -> TreeDecoder | PlainDecoder | CausalDecoder:
    """What decodes for a generator: over trees where its family's decoder is known, else by its own modules.

    A causal language model of any family decodes over trees.

    Raises:
        UserError: its family cannot be a RAG model's.
    """
    if not generator.config.is_encoder_decoder:
        return CausalDecoder(generator)
    require_family(generator.config, "the generator")
    use_packed_rows(generator)
    return DECODERS.get(generator.config.model_type, PlainDecoder)(generator)
