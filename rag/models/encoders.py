"""Encoders of questions and passages: DPR's, pooled ones, and any BERT-like model or sentence-transformers folder.

    encoder = load_encoder("sentence-transformers/all-MiniLM-L6-v2", role="context")
    vectors = encoder(**tokens)[0]             # (B, d) float32
    encoder_dimension(encoder)                 # d = 384

Each is called as transformers' DPR encoders are, and is saved with what says how it pools.
"""

from transformers import AutoModel, DPRContextEncoder, DPRQuestionEncoder, PreTrainedModel

from rag.errors import UserError
from rag.models.loading import load_config, load_weights, read_json
from rag.models.pooled_encoder import POOLINGS, PooledEncoder, PooledEncoderConfig

DPR_CLASSES = {"question": DPRQuestionEncoder, "context": DPRContextEncoder}


def load_encoder(
    path: str,
    role: str = "question",
    pooling: str = "auto",
    cache_dir: str | None = None,
    flag: str = "--question_encoder_name_or_path",
) -> PreTrainedModel:
    """The encoder at `path`, whose output [0] is (B, d), in evaluation mode and float32.

    Args:
        role: "question" or "context": which of DPR's two classes a DPR checkpoint is loaded into.
        pooling: "auto" takes a DPR or pooled encoder as it is, a sentence-transformers folder as its authors meant it
            and any other encoder by its first token; "cls", "mean" and "max" pool so, without normalizing.

    Raises:
        UserError: there is no such encoder, it lacks weights, or it cannot be pooled so.
    """
    config = load_config(path, cache_dir, flag)
    if config.model_type == "dpr":
        dpr_class = DPR_CLASSES[role]
        if dpr_class.__name__ not in (config.architectures or [dpr_class.__name__]):
            raise UserError(f"{flag} {path} is a {config.architectures[0]}; give a {dpr_class.__name__}")
        if pooling not in ("auto", "cls"):
            raise UserError(f"{flag} {path} is a DPR encoder, which takes its first token; leave the pooling on auto")
        return load_weights(dpr_class, path, flag, config=config, cache_dir=cache_dir)
    if config.model_type == "pooled_encoder":
        if pooling != "auto":
            config.pooling, config.normalize = pooling, False
        return load_weights(PooledEncoder, path, flag, config=config, cache_dir=cache_dir)
    if config.is_encoder_decoder:
        raise UserError(
            f"{flag} {path} is a {config.model_type} model, not an encoder; give a DPR or BERT-like encoder"
        )
    normalize = False
    if pooling == "auto":
        pooling, normalize = _pooling_of_sentence_transformer(path, cache_dir, flag)
    backbone = load_weights(AutoModel, path, flag, config=config, cache_dir=cache_dir)
    return PooledEncoder(PooledEncoderConfig(backbone=config, pooling=pooling, normalize=normalize), backbone).eval()


def encoder_dimension(encoder: PreTrainedModel) -> int:
    """d, the length of the vectors that an encoder gives."""
    return getattr(encoder.config, "projection_dim", 0) or encoder.config.hidden_size


def _pooling_of_sentence_transformer(path: str, cache_dir, flag: str) -> tuple[str, bool]:
    """How the authors pool, and whether they normalize; ("cls", False) for a plain encoder."""
    modules = read_json(path, "modules.json", cache_dir)
    if modules is None:
        return "cls", False
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{flag} {path} has the layers {', '.join(kinds)}; only Pooling and Normalize can be read")
    pooling_config = read_json(path, modules[kinds.index("Pooling")]["path"] + "/config.json", cache_dir)
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
    modes = [mode for mode, on in pooling_config.items() if mode.startswith("pooling_mode_") and on]
    pooling = pooling_config.get("pooling_mode", names.get(modes[0]) if len(modes) == 1 else None)
    if pooling not in POOLINGS:
        raise UserError(f"{flag} {path} pools by {pooling_config}; only one of {', '.join(POOLINGS)} can be read")
    return pooling, "Normalize" in kinds
