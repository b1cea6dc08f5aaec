"""Encoders of questions and passages: DPR's, pooled ones, and any BERT-like model or sentence-transformers folder.

    encoder = load_encoder("sentence-transformers/all-MiniLM-L6-v2", role="context")
    vectors = encoder(**tokens)[0]             # (B, d) float32
    encoder_dimension(encoder)                 # d = 384

Each is called as transformers' DPR encoders are, and is saved with what says how it pools.
"""

from typing import Any

from transformers import AutoModel, DPRContextEncoder, DPRQuestionEncoder, PreTrainedConfig, PreTrainedModel

from rag.errors import UserError, raise_problems
from rag.models.custom_code import code_beside, custom_model_class, name_own_code
from rag.models.limits import vector_size
from rag.models.loading import checkpoint_errors, hub_access, load_config, load_weights, not_finite_problems
from rag.models.pooled_encoder import ENCODER_HALVES, PooledEncoder, PooledEncoderConfig, reads_forward
from rag.models.sentence_transformers import Card, read_card

DPR_CLASSES = {"question": DPRQuestionEncoder, "context": DPRContextEncoder}
PROMPTS = {"question": "query_prompt", "context": "passage_prompt"}


def read_encoder_config(
    path: str, cache_dir: str | None = None, flag: str = "--question_encoder_name_or_path"
) -> tuple[PreTrainedConfig, Card | None]:
    """The config of the transformer at `path`, and what a sentence-transformers folder says beside."""
    card = read_card(path, cache_dir, flag)
    return load_config(path if card is None else card.folder, cache_dir, flag, of_encoder=True), card


def load_encoder(
    path: str,
    role: str = "question",
    pooling: str = "auto",
    cache_dir: str | None = None,
    flag: str = "--question_encoder_name_or_path",
    prompt: str | None = None,
    scale: float | None = None,
) -> PreTrainedModel:
    """The encoder at `path`, whose output [0] is (B, d), in evaluation mode and float32.

    Args:
        role: "question" or "context": which of DPR's two classes a DPR checkpoint is loaded into, and whose prompt
            `prompt` is.
        pooling: "auto" takes a DPR or pooled encoder as it is, a sentence-transformers folder as its authors meant it
            and any other encoder by its first token; "cls", "mean", "max" and "last" pool so, without normalizing.
        prompt: text before every question, or passage, in place of the one that the folder names.
        scale: what a question's vector is multiplied by; None for the encoder's own. A passage's never is.

    Raises:
        UserError: there is no such encoder, it lacks weights, or it cannot be pooled so.
    """
    config, card = read_encoder_config(path, cache_dir, flag)
    if config.model_type == "dpr":
        return _load_dpr(path, role, pooling, cache_dir, flag, prompt, scale, config)
    given: dict[str, Any] = {} if prompt is None else {PROMPTS[role]: prompt}
    if role == "context":
        given["scale"] = 1.0  # the folder may be a question encoder's
    elif scale is not None:
        given["scale"] = scale
    if config.model_type == "pooled_encoder":
        if pooling != "auto":
            config.pooling, config.normalize, config.dense = pooling, False, None
        _require_pooling(config.backbone, config.pooling, path, flag)
        for name, value in given.items():
            setattr(config, name, value)
        return load_weights(PooledEncoder, path, flag, config=config, cache_dir=cache_dir)
    transformer = path if card is None else card.folder
    with checkpoint_errors(flag, path), code_beside(transformer, cache_dir=cache_dir, **hub_access(transformer)):
        custom = custom_model_class(config)
    half = ENCODER_HALVES.get(config.model_type) if custom is None else None
    if config.is_encoder_decoder and half is None:
        raise UserError(
            f"{flag} {path} is a {config.model_type} model, not an encoder; give a DPR or BERT-like encoder"
        )
    settings: dict[str, Any] = {} if card is None else card.settings
    if pooling != "auto":
        settings = settings | {"pooling": pooling, "normalize": False, "dense": None}
    plain: dict[str, Any] = {"pooling": "cls", "normalize": False}
    settings = plain | settings | given
    _require_pooling(config, settings["pooling"], path, flag)
    backbone = load_weights(
        custom or half or AutoModel, transformer, flag, without_heads=True, config=config, cache_dir=cache_dir
    )
    name_own_code(config, backbone)
    encoder = PooledEncoder(PooledEncoderConfig(backbone=config, **settings), backbone)
    with checkpoint_errors(flag, path):
        for layer, weights in zip(encoder.dense, card.dense if card and settings["dense"] else [], strict=True):
            layer.load_state_dict(weights)
    raise_problems(not_finite_problems(encoder.dense, path, flag))
    return encoder.eval()


def _load_dpr(path, role, pooling, cache_dir, flag, prompt, scale, config) -> PreTrainedModel:
    dpr_class = DPR_CLASSES[role]
    if dpr_class.__name__ not in (config.architectures or [dpr_class.__name__]):
        raise UserError(f"{flag} {path} is a {config.architectures[0]}; give a {dpr_class.__name__}")
    if pooling not in ("auto", "cls"):
        raise UserError(f"{flag} {path} is a DPR encoder, which takes its first token; leave the pooling on auto")
    if prompt:
        raise UserError(
            f"{flag} {path} is a DPR encoder, which was trained without prompts; leave the prompt {prompt!r} out"
        )
    if scale not in (None, 1):
        raise UserError(f"{flag} {path} is a DPR encoder, whose scores are not scaled; leave the scale {scale:g} out")
    return load_weights(dpr_class, path, flag, config=config, cache_dir=cache_dir)


def _require_pooling(config: PreTrainedConfig, pooling: str, path: str, flag: str) -> None:
    """Raise `UserError` where the first token's vector says nothing of the text."""
    if pooling == "cls" and (reads_forward(config) or config.model_type in ENCODER_HALVES):
        raise UserError(
            f"{flag} {path} is a {config.model_type} model, whose first token says nothing of the text, and its folder "
            "does not say how it is pooled; give the pooling: mean, max or last"
        )


def describe_encoder(encoder: PreTrainedModel) -> str:
    """One line: how an encoder makes a vector of a text."""
    config = encoder.config
    if config.model_type != "pooled_encoder":
        return type(encoder).__name__
    parts = [f"{type(encoder).__name__} of {config.backbone.model_type}", f"{config.pooling} pooling"]
    parts += [f"{len(config.dense)} dense"] if config.dense else []
    parts += ["normalized"] if config.normalize else []
    parts += [f"{config.max_seq_length} tokens"] if config.max_seq_length else []
    parts += ["lower-cased"] if config.lower_case else []
    parts += [f"scale {config.scale:g}"] if config.scale != 1 else []
    parts += [f"{name} {value!r}" for name in PROMPTS.values() if (value := getattr(config, name))]
    return ", ".join(parts)


def encoder_dimension(encoder: PreTrainedModel) -> int:
    """d, the length of the vectors that an encoder gives."""
    size = vector_size(encoder.config)
    assert size is not None
    return size
