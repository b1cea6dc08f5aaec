"""The decoder of any family over trees of tokens, by transformers' own modules: exact, and slower than a tree decoder.

    decoder = PlainDecoder(generator)      # called as token_trees.TreeDecoder is

Each way from the root of a tree to one of its leaves is decoded as a sequence of its own, without a cache.
"""

import torch

from rag.generation.families import require_family
from rag.generation.forward import scaled
from rag.generation.stacks import use_packed_rows
from rag.generation.token_trees import CHUNK_TOKENS, DECODERS, Memory, Past, TokenScores, TreeDecoder


class PlainDecoder(TokenScores):
    def __init__(self, generator):
        super().__init__(generator)
        self.encoder, self.decoder, self.config = generator.get_encoder(), generator.get_decoder(), generator.config

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Memory:
        """Encode contexts (D, S), all at one length: some families' vectors depend on it."""
        rows = max(1, CHUNK_TOKENS // input_ids.shape[1])
        parts = zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
        encoded = torch.cat([self.encoder(input_ids=ids, attention_mask=mask)[0] for ids, mask in parts])
        return Memory([(encoded, encoded)], attention_mask[:, None, None, :].bool())

    def decode(self, tokens, depths, ancestors, memory: Memory, past: Past | None = None) -> torch.Tensor:
        """As `TreeDecoder.decode`: the last hidden states (D, N, d) of tokens (D, N)."""
        documents = len(tokens)
        if past is not None:
            past.grow(depths)
            column = tokens[:, None, :, None]
            tokens = past.append(0, column, column)[0][:, 0, :, 0]  # (D, tokens in past)
        ancestors = ancestors.expand(documents, -1, -1)
        if past is not None:  # all new tokens are equally deep, and each ends a way of its own
            length = past.steps
            places = ancestors.nonzero()[:, 2].view(documents, -1, length)
            ways = tokens[:, None].expand(-1, places.shape[1], -1).gather(2, places)  # (D, N, length)
            return self._hidden(ways, memory)[:, :, -1]
        # The tree is the same for every document; a node's way begins at the root, and nodes are numbered downwards.
        tree = ancestors[0]
        leaves = (tree.sum(0) == 1).nonzero().squeeze(1).tolist()
        paths = [tree[leaf].nonzero().squeeze(1).tolist() for leaf in leaves]
        length = max(map(len, paths))
        places = torch.tensor([path + [path[-1]] * (length - len(path)) for path in paths], device=tokens.device)
        hidden = self._hidden(tokens[:, places], memory)  # (D, leaves, length, d)
        where = {node: (way, depth) for way, path in enumerate(paths) for depth, node in enumerate(path)}
        way, depth = torch.tensor([where[node] for node in range(len(tree))], device=tokens.device).unbind(1)
        return hidden[:, way, depth]

    def _hidden(self, ways: torch.Tensor, memory: Memory) -> torch.Tensor:
        """What the output layer reads (D, W, T, d) of W sequences (D, W, T) for each document."""
        (encoded, _), mask = memory.layers[0], memory.mask[:, 0, 0].long()
        number, length = ways.shape[1:]
        rows = torch.arange(len(ways), device=ways.device).repeat_interleave(number)
        parts = []
        step = max(1, CHUNK_TOKENS // max(length, encoded.shape[1]))
        for own, sequences in zip(rows.split(step), ways.flatten(0, 1).split(step), strict=True):
            hidden = self.decoder(
                input_ids=sequences,
                encoder_hidden_states=encoded[own],
                encoder_attention_mask=mask[own],
                use_cache=False,
            )[0]
            parts.append(scaled(hidden, self.config))
        return torch.cat(parts).unflatten(0, (len(ways), number))


def decoder_of(generator) -> TreeDecoder | PlainDecoder:
    """What decodes for a generator: over trees where its family's decoder is known, else by its own modules.

    Raises:
        UserError: its family cannot be a RAG model's.
    """
    require_family(generator.config, "the generator")
    use_packed_rows(generator)
    return DECODERS.get(generator.config.model_type, PlainDecoder)(generator)
