"""An encoder that turns a text into one vector by pooling its token vectors; it takes DPR's place in a RAG model.

    encoder = PooledEncoder(PooledEncoderConfig(backbone=bert.config, pooling="mean", normalize=True), bert)
    vectors = encoder(input_ids, attention_mask)[0]        # (B, d)

Importing this module makes it known to transformers' AutoConfig and AutoModel, so that a RAG checkpoint whose question
encoder it is round-trips through `RagSequenceForGeneration.from_pretrained`.
"""

import copy

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    MT5EncoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    UMT5EncoderModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.dpr.modeling_dpr import DPRQuestionEncoderOutput

from rag.models.custom_code import custom_model_class, nested_config

POOLINGS = ("cls", "mean", "max", "last")
ACTIVATIONS = {"Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh, "ReLU": torch.nn.ReLU, "GELU": torch.nn.GELU}
# Encoder-decoder families of which the encoder alone makes vectors.
ENCODER_HALVES = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}


class PooledEncoderConfig(PreTrainedConfig):
    """A transformer encoder and how its token vectors become one vector.

    Args:
        backbone: config of the encoder, or its dict.
        pooling: "cls" (first token), "last" (last token), "mean" or "max", of the tokens that are not padding.
        normalize: scale the vector to length 1, so that inner products are cosines.
        dense: layers behind the pooling, dicts of in_features, out_features, bias and activation.
        query_prompt: text that stands before every question.
        passage_prompt: text that stands before every passage.
        max_seq_length: tokens of a text that are read; None for as many as the encoder can.
        lower_case: whether texts are lower-cased first.
        scale: number above 0 that the vector is multiplied by. That of a question: inner products of normalized
            vectors lie between -1 and 1, and p(z|x), their softmax, would be nearly flat. Rankings stay as they are.
    """

    model_type = "pooled_encoder"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012 (transformers' own declaration)

    backbone: PreTrainedConfig | dict | None = None
    pooling: str = "mean"
    normalize: bool = True
    dense: list[dict] | None = None
    query_prompt: str = ""
    passage_prompt: str = ""
    max_seq_length: int | None = None
    lower_case: bool = False
    scale: float = 1.0

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone, dict):
            self.backbone = nested_config(self.backbone)
        elif self.backbone is None:  # transformers builds every config without arguments to find its defaults
            self.backbone = AutoConfig.for_model("bert")
        else:  # a live model's config stays its own: transformers resets the attention of a config's parts
            self.backbone = copy.deepcopy(self.backbone)
        assert self.pooling in POOLINGS, self.pooling
        assert self.scale > 0, self.scale
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        assert isinstance(self.backbone, PreTrainedConfig)
        return self.dense[-1]["out_features"] if self.dense else self.backbone.hidden_size


class PooledEncoder(PreTrainedModel):
    """An encoder whose output [0] is one vector a text, as DPR's: it takes DPR's place in a RAG model."""

    config_class = PooledEncoderConfig
    base_model_prefix = "pooled_encoder"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PooledEncoderConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = backbone if backbone is not None else new_backbone(config.backbone)
        if hasattr(self.backbone, "pooler"):
            self.backbone.pooler = None  # BERT's own: trained for another task, and without a gradient here
        self.dense = torch.nn.ModuleList(
            torch.nn.Linear(layer["in_features"], layer["out_features"], layer["bias"]) for layer in config.dense or []
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, **kwargs) -> DPRQuestionEncoderOutput:
        """input_ids and attention_mask (B, S) -> pooler_output (B, d)."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.backbone.pad_token_id).long()
        if reads_forward(self.config.backbone):
            kwargs["use_cache"] = False
        outputs = self.backbone(input_ids, attention_mask=attention_mask, **kwargs | {"return_dict": True})
        vectors = self.project(pool(outputs.last_hidden_state, attention_mask, self.config.pooling))  # (B, d)
        return DPRQuestionEncoderOutput(vectors, outputs.hidden_states, outputs.attentions)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """What stands behind the pooling: dense layers, length and scale; (B, hidden size) to (B, d)."""
        for layer, settings in zip(self.dense, self.config.dense or [], strict=True):
            pooled = ACTIVATIONS[settings["activation"]]()(layer(pooled))
        if self.config.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled if self.config.scale == 1 else pooled * self.config.scale


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A transformer with new weights that turns tokens into vectors."""
    kind = custom_model_class(config) or ENCODER_HALVES.get(config.model_type)
    return AutoModel.from_config(config) if kind is None else kind(config)


def reads_forward(config: PreTrainedConfig) -> bool:
    """Whether a token's vector knows only of those before it, as in a GPT: then the first token's says nothing."""
    if config.model_type in ("xlnet", "bert-generation") or getattr(config, "use_bidirectional_attention", False):
        return False
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


AutoConfig.register("pooled_encoder", PooledEncoderConfig, exist_ok=True)
AutoModel.register(PooledEncoderConfig, PooledEncoder, exist_ok=True)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text, (B, d), from its token vectors (B, S, d); padding (mask 0) takes no part."""
    if pooling in ("cls", "last"):  # whichever side the padding is on
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        order = places + 1 if pooling == "last" else places.flip(0) + 1
        return hidden_states[torch.arange(len(hidden_states)), (attention_mask * order).argmax(1)]
    mask = attention_mask.unsqueeze(-1).bool()  # (B, S, 1)
    if pooling == "max":
        return hidden_states.masked_fill(~mask, float("-inf")).amax(1)
    return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1)
