"""Encoders of BERT's build read many texts in one row, without padding.

    if can_pack(encoder):
        packing = Packing(lengths, device)                       # of N texts, (N)
        vectors = encode_packed(encoder, input_ids, packing)     # (T) token ids, one text behind the other, to (N, d)

The vectors are those of the padded way, `encoder(input_ids, attention_mask)[0]`, but for rounding.
"""

import torch
from transformers import BertModel, PreTrainedModel, RobertaModel, XLMRobertaModel

from rag.casting import call_in, dtype_of_layers
from rag.models.pooled_encoder import pool
from rag.packing import Attention, Packing, accept_packed_rows, is_ragged_head_size

# transformers' own classes whose layers take a mask as it is given; of a derived one nothing is known.
PACKABLE = (BertModel, RobertaModel, XLMRobertaModel)


def can_pack(encoder: PreTrainedModel) -> bool:
    """Whether `encode_packed` reads texts with this encoder, on whatever device."""
    backbone = _backbone_of(encoder)
    if type(backbone) not in PACKABLE:
        return False
    config = backbone.config
    head_size = config.hidden_size // config.num_attention_heads
    plain = not config.is_decoder and not config.chunk_size_feed_forward
    return plain and is_ragged_head_size(head_size)


def encode_packed(encoder: PreTrainedModel, input_ids: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The vectors (N, d) of N texts whose token ids (T) lie in one row; the encoder's layers accept such rows then.

    Under autocast norms and vectors stay in float32, as autocast has it.
    """
    backbone = _backbone_of(encoder)
    accept_packed_rows(backbone)
    positions = packing.positions
    if not isinstance(backbone, BertModel):  # theirs begin behind the padding's id
        positions = positions + 1 + backbone.config.pad_token_id
    hidden = backbone.embeddings(input_ids=input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0))
    attention, dtype = Attention(packing, packing), dtype_of_layers(input_ids.device)
    for layer in backbone.encoder.layer:
        hidden = call_in(layer, dtype, hidden, attention, linear_only=True)
    hidden = hidden.squeeze(0)  # (T, hidden)
    if encoder.config.model_type != "dpr":
        return encoder.project(_pool_packed(hidden, packing, encoder.config.pooling))
    vectors = _pool_packed(hidden, packing, "cls")
    dpr = encoder.base_model
    return dpr.encode_proj(vectors) if dpr.projection_dim > 0 else vectors


def _backbone_of(encoder: PreTrainedModel) -> PreTrainedModel:
    return encoder.base_model.bert_model if encoder.config.model_type == "dpr" else encoder.backbone


def _pool_packed(hidden: torch.Tensor, packing: Packing, pooling: str) -> torch.Tensor:
    """As `pool`, of a row: (T, hidden) to (N, hidden)."""
    if pooling == "cls":
        return hidden.index_select(0, packing.starts[:-1])
    if pooling == "last":
        return hidden.index_select(0, packing.starts[1:] - 1)
    is_token = packing.unpack(torch.ones_like(packing.positions))
    return pool(packing.unpack(hidden), is_token, pooling)
