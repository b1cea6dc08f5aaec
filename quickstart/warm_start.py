"""Warm start: a BERT's weights become the DPR encoders and the BART generator of a RAG model.

    bert = BertModel.from_pretrained("all-MiniLM-L6-v2")
    dpr_question_encoder_from_bert(bert).save_pretrained("question_encoder")
    bart_from_bert(bert, decoder_layers=3).save_pretrained("generator")

The encoders are copies; the generator is the BERT2BERT of Rothe et al. 2020 (arXiv 1907.12461) in BART's shape. Both
are post-LayerNorm transformers, so the copied encoder computes what BERT computed; only the decoder has to learn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import BartForConditionalGeneration, BertModel, DPRContextEncoder, DPRQuestionEncoder

# The parts of one layer: BERT's name, then BART's.
SELF_ATTENTION = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
}
CROSS_ATTENTION = {theirs: ours.replace("self_attn", "encoder_attn") for theirs, ours in SELF_ATTENTION.items()}
FEED_FORWARD = {"intermediate.dense": "fc1", "output.dense": "fc2", "output.LayerNorm": "final_layer_norm"}

DPR_SETTINGS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
]


def bart_from_bert(
    bert: BertModel, decoder_layers: int = 3, cls_token_id: int = 101, sep_token_id: int = 102
) -> BartForConditionalGeneration:
    """A BART whose encoder is `bert`, whose decoder starts from its layers, and which shares its tokenizer.

    The encoder's output equals `bert(...).last_hidden_state` for token type 0, to 1e-3 (1e-4 for MiniLM): BART's
    LayerNorms add 1e-5 to the variance where BERT's add 1e-12. The decoder takes `decoder_layers` of BERT's layers,
    spread from the first to the last; its cross-attention starts as a copy of the same layer's self-attention. The
    embeddings are tied to the output layer.

    Answers are written `[CLS] answer [SEP]`: decoding starts with `cls_token_id` and ends with `sep_token_id`, whose
    defaults are those of the original BERT vocabularies (BERT's config does not name them).
    """
    from transformers import BartForConditionalGeneration

    encoder_layers = bert.config.num_hidden_layers
    if not 1 <= decoder_layers <= encoder_layers:
        raise ValueError(f"decoder_layers is {decoder_layers}; this BERT has {encoder_layers} layers to copy")
    bart = BartForConditionalGeneration(_bart_config(bert, decoder_layers, cls_token_id, sep_token_id))
    bart.load_state_dict(_bart_weights(bert, copied_layers(encoder_layers, decoder_layers)))
    return bart.eval()


def dpr_question_encoder_from_bert(bert: BertModel) -> DPRQuestionEncoder:
    """A DPR question encoder whose pooled output is `bert`'s last hidden state of the first token."""
    from transformers import DPRQuestionEncoder

    return _dpr_from_bert(DPRQuestionEncoder, bert)


def dpr_context_encoder_from_bert(bert: BertModel) -> DPRContextEncoder:
    """A DPR context encoder whose pooled output is `bert`'s last hidden state of the first token."""
    from transformers import DPRContextEncoder

    return _dpr_from_bert(DPRContextEncoder, bert)


def copied_layers(encoder_layers: int, decoder_layers: int) -> list[int]:
    """Which of BERT's layers the decoder starts from: spread evenly, and always with the last, whose output the
    embeddings read; 3 of 6 are 0, 2 and 5."""
    if decoder_layers == 1:
        return [encoder_layers - 1]
    return [i * (encoder_layers - 1) // (decoder_layers - 1) for i in range(decoder_layers)]


def _bart_config(bert, decoder_layers, cls_token_id, sep_token_id):
    from transformers import BartConfig

    config = bert.config
    return BartConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        d_model=config.hidden_size,
        encoder_layers=config.num_hidden_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=config.num_attention_heads,
        decoder_attention_heads=config.num_attention_heads,
        encoder_ffn_dim=config.intermediate_size,
        decoder_ffn_dim=config.intermediate_size,
        activation_function=config.hidden_act,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        init_std=config.initializer_range,
        # BERT's embeddings are so small (a variance of 3e-3) that BART's LayerNorm epsilon would show. Multiplied by
        # sqrt(d) before that LayerNorm, which undoes it, they are not; the output layer still reads them as they are.
        scale_embedding=True,
        pad_token_id=config.pad_token_id,
        bos_token_id=cls_token_id,
        decoder_start_token_id=cls_token_id,
        eos_token_id=sep_token_id,
        forced_eos_token_id=sep_token_id,
    )


def _bart_weights(bert: BertModel, decoder_from: list[int]) -> dict[str, torch.Tensor]:
    """BERT's weights under BART's names; the decoder's layer i comes from BERT's layer `decoder_from[i]`."""
    import torch

    theirs = bert.state_dict()
    words = theirs["embeddings.word_embeddings.weight"]  # (V, d)
    # BART knows one token type, scales words but not positions, and looks position p up in row p + 2.
    positions = theirs["embeddings.position_embeddings.weight"] + theirs["embeddings.token_type_embeddings.weight"][0]
    positions = positions * math.sqrt(bert.config.hidden_size)
    positions = torch.cat([torch.zeros_like(positions[:2]), positions])  # (2 + positions, d)

    weights = {
        "model.shared.weight": words,
        "lm_head.weight": words,
        "final_logits_bias": words.new_zeros(1, len(words)),
    }
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_tokens.weight"] = words
        weights[f"model.{side}.embed_positions.weight"] = positions
        for kind in ("weight", "bias"):
            weights[f"model.{side}.layernorm_embedding.{kind}"] = theirs[f"embeddings.LayerNorm.{kind}"]

    def copy_layer(target: str, source: int, *parts: dict[str, str]) -> None:
        for part in parts:
            for their_name, our_name in part.items():
                for kind in ("weight", "bias"):
                    weights[f"{target}.{our_name}.{kind}"] = theirs[f"encoder.layer.{source}.{their_name}.{kind}"]

    for layer in range(bert.config.num_hidden_layers):
        copy_layer(f"model.encoder.layers.{layer}", layer, SELF_ATTENTION, FEED_FORWARD)
    for layer, source in enumerate(decoder_from):
        copy_layer(f"model.decoder.layers.{layer}", source, SELF_ATTENTION, CROSS_ATTENTION, FEED_FORWARD)
    return weights


def _dpr_from_bert(encoder_class, bert: BertModel):
    from transformers import DPRConfig

    config = bert.config.to_dict()
    encoder = encoder_class(DPRConfig(**{name: config[name] for name in DPR_SETTINGS}))
    # DPR has no pooler: its vector is the first token's.
    weights = {name: weight for name, weight in bert.state_dict().items() if not name.startswith("pooler.")}
    encoder.base_model.bert_model.load_state_dict(weights)
    return encoder.eval()
