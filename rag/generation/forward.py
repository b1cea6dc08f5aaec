"""A RAG model's generator in training: contexts to the decoder's last hidden states, with next to no padding encoded.

    encoded = encode_contexts(model.generator, contexts.input_ids, contexts.attention_mask)           # (N, S, d)
    hidden = decode_answers(model.generator, encoded, contexts.attention_mask, decoder_input_ids)     # (N, T, d)
    nll = rag_sequence_nll(hidden, output_layer(model.generator), doc_scores, targets, pad_token_id)  # (B,)

Contexts are encoded in groups of similar length, which changes no result; logits are left to `rag.training.loss`,
which never holds them in whole. The groups, `context_lengths`, `scaled` and `output_layer` serve decoding, too, and
`full_precision` serves the loss.
"""

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad

from rag.generation.families import FAST

# What one group more costs, as tokens that could be encoded in its time: on a CPU another turn at the weights'
# gradients, on a GPU the launch of some thousand kernels.
GROUP_COST = {"cpu": 64, "cuda": 4096}
# Rows of the output matrix in one pass over the vocabulary: their logits stay in a processor's cache.
CHUNK_VOCABULARY = 8192


def groups_of_similar_length(
    lengths: np.ndarray, group_cost: int, group_tokens: int | None = None
) -> list[tuple[np.ndarray, int]]:
    """The cheapest way to encode sequences in groups: tokens, padding included, and `group_cost` for each group.

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


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 at least, float64 stays: sums of 50,000 half-precision terms overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def context_lengths(attention_mask: torch.Tensor) -> torch.Tensor:
    """The length (N) of each context (N, S) up to its last token that is no padding."""
    return (attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)).amax(1)


def encode_contexts(generator, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The encoder's last hidden states (N, S, d) of contexts (N, S); what stands at padding is not to be read."""
    encoder, longest, device = generator.get_encoder(), input_ids.shape[1], input_ids.device
    # Others may scale embeddings, or read differently at another length; of sharded layers no rank may call one more.
    if generator.config.model_type not in FAST or any(isinstance(part, FSDPModule) for part in encoder.modules()):
        return encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
    lengths = context_lengths(attention_mask).cpu().numpy()
    groups = groups_of_similar_length(lengths, GROUP_COST.get(device.type, GROUP_COST["cuda"]))
    embedded = encoder.get_input_embeddings()(input_ids)  # at once: each lookup has a gradient as large as the table
    encoded, places = [], []
    for rows, length in groups:
        places.append(torch.from_numpy(rows).to(device))
        mask = attention_mask[places[-1], :length]
        hidden = encoder(inputs_embeds=embedded[places[-1], :length], attention_mask=mask)[0]
        encoded.append(pad(hidden, (0, 0, 0, longest - length)))
    return torch.cat(encoded)[torch.cat(places).argsort()]


def decode_answers(generator, encoded, attention_mask, decoder_input_ids) -> torch.Tensor:
    """What the output layer reads (N, T, d), of encoded contexts (N, S, d), their mask and decoder inputs (N, T)."""
    hidden = generator.get_decoder()(
        input_ids=decoder_input_ids,
        encoder_hidden_states=encoded,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    )[0]
    return scaled(hidden, generator.config)


def scaled(hidden: torch.Tensor, config) -> torch.Tensor:
    """The decoder's last hidden states as the output layer reads them: a T5 whose embeddings are tied scales them."""
    if getattr(config, "scale_decoder_outputs", False) or (config.model_type == "umt5" and config.tie_word_embeddings):
        return hidden * config.d_model**-0.5
    return hidden


def output_layer(generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (V, d) and bias (V) of the layer that makes logits of the decoder's hidden states."""
    weight = generator.get_output_embeddings().weight
    bias = getattr(generator, "final_logits_bias", None)  # BART's: a buffer, never trained
    return weight, weight.new_zeros(len(weight)) if bias is None else bias[0]
