"""A RAG model's generator in training: contexts to the decoder's last hidden states, without padding where it can be.

    hidden, answers = answer_states(model.generator, input_ids, attention_mask, decoder_input_ids)          # (R, d)
    nll = rag_sequence_nll(hidden, output_layer(model.generator), doc_scores, targets, pad_token_id, answers=answers)

Contexts of BART and T5 lie in one packed row, and so do the answers: one pass over each, whatever their lengths. Other
encoder-decoders run as transformers wrote them, padded. A language model reads prompts and answers in one row
(causal.py). Logits are left to `rag.training.loss`, which never holds all of them.
`scaled` and `output_layer` serve decoding, too, and `full_precision` serves the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rag.generation.causal import states_of_answers
from rag.generation.stacks import stack_of
from rag.packing import Attention, Heads, Packing, right_padded_lengths

# Rows of the output matrix in one pass over the vocabulary: their logits stay in a processor's cache.
CHUNK_VOCABULARY = 8192


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 at least, float64 stays: sums of 50,000 half-precision terms overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class EncodedContexts:
    """What the decoder reads.

    Attributes:
        hidden: the encoder's last hidden states, (T, d) packed or (N, S, d) padded.
        attention_mask: (N, S) of padded ones; None for packed ones.
        packing: of packed ones; None for padded ones.
    """

    hidden: torch.Tensor
    attention_mask: torch.Tensor | None
    packing: Packing | None

    def __len__(self) -> int:
        return len(self.hidden) if self.packing is None else len(self.packing.lengths)


def answer_states(
    generator, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor, *,
    lengths: np.ndarray | None = None, heads: Heads | None = None, decoder_lengths: np.ndarray | None = None,
) -> tuple[torch.Tensor, Packing | None]:  # fmt: skip
    """What the output layer reads behind contexts (N, S), of the decoder's inputs (B, T), each for N / B in a row.

    Args:
        lengths: (N) of the contexts, on the host, where it is known that padding is on the right; else the device is
            asked.
        heads: which contexts of a language model begin alike: each beginning is computed once.
        decoder_lengths: (B) of the decoder's inputs, on the host; None for T each.

    Returns:
        (R, d) and where the N answers' tokens lie in it; of an encoder-decoder's padded contexts (N, T, d) and None.
    """
    if generator.config.is_encoder_decoder:
        encoded = encode_contexts(generator, input_ids, attention_mask, lengths)
        return decode_answers(generator, encoded, decoder_input_ids, decoder_lengths)
    hidden, answers = states_of_answers(
        generator, input_ids, attention_mask, decoder_input_ids, lengths, heads, decoder_lengths
    )
    return scaled(hidden, generator.config), answers


def encode_contexts(
    generator, input_ids: torch.Tensor, attention_mask: torch.Tensor, lengths: np.ndarray | None = None
) -> EncodedContexts:
    """The encoder's last hidden states of contexts (N, S).

    Args:
        lengths: (N) on the host, where it is known that padding is on the right; else the device is asked for them.
    """
    stack = stack_of(generator)
    if stack is not None and lengths is None:
        lengths = right_padded_lengths(attention_mask)
    if stack is None or lengths is None:
        hidden = generator.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        return EncodedContexts(hidden, attention_mask, None)
    packing = Packing(lengths, input_ids.device)
    return EncodedContexts(stack.encode(packing.pack(input_ids), packing), None, packing)


def decode_answers(
    generator,
    encoded: EncodedContexts,
    decoder_input_ids: torch.Tensor,
    lengths: np.ndarray | None = None,
    attend: Callable[[Packing, Packing], Attention] = Attention,
) -> tuple[torch.Tensor, Packing | None]:
    """What the output layer reads, of the decoder's inputs (B, T), each for N / B contexts in a row.

    Args:
        lengths: (B) of the inputs, on the host; None for T each.
        attend: makes cross-attention over packed rows, of the answers' packing and the contexts'.

    Returns:
        (R, d) and where the N answers' tokens lie in it; of padded contexts (N, T, d) and None.
    """
    width = decoder_input_ids.shape[1]
    n_docs = len(encoded) // len(decoder_input_ids)
    if encoded.packing is None:
        hidden = generator.get_decoder()(
            input_ids=decoder_input_ids.repeat_interleave(n_docs, dim=0),
            encoder_hidden_states=encoded.hidden,
            encoder_attention_mask=encoded.attention_mask,
            use_cache=False,
        )[0]
        return scaled(hidden, generator.config), None
    if lengths is None:
        lengths = np.full(len(decoder_input_ids), width)
    answers = Packing(lengths.repeat(n_docs), decoder_input_ids.device)
    ids = answers.pack(decoder_input_ids.repeat_interleave(n_docs, dim=0))
    stack = stack_of(generator)
    assert stack is not None, "what was encoded in a packed row is read so"
    cross = attend(answers, encoded.packing)
    return scaled(stack.decode(ids, answers, encoded.hidden, cross), generator.config), answers


def scaled(hidden: torch.Tensor, config) -> torch.Tensor:
    """The last hidden states as the output layer reads them: a T5 whose embeddings are tied scales them, and so do some
    language models their logits."""
    if getattr(config, "scale_decoder_outputs", False) or (config.model_type == "umt5" and config.tie_word_embeddings):
        return hidden * config.d_model**-0.5
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        return hidden / config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return hidden * config.logit_scale
    return hidden


def output_layer(generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (V, d) and bias (V) of the layer that makes logits of the last hidden states."""
    layer = generator.get_output_embeddings()
    if getattr(layer, "bias", None) is not None:  # Phi's
        return layer.weight, layer.bias
    bias = getattr(generator, "final_logits_bias", None)  # BART's: a buffer, never trained
    return layer.weight, layer.weight.new_zeros(len(layer.weight)) if bias is None else bias[0]
