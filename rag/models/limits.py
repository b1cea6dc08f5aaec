"""How many tokens a model can read and write, as its config says, and the flags that ask for more.

most_tokens(config.question_encoder)                     # 512 of BERT, 512 of RoBERTa's 514, None of T5
raise_problems(length_problems(config, {"max_source_length": 128, "max_target_length": 25}))
"""

import errno
import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, RagConfig

from rag.errors import UserError
from rag.models.prompts import template_problem

# Families whose positions begin behind the padding id, so that the table of positions is longer than any text.
BEHIND_PADDING = {
    "altclip_text_model", "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# Families that compute positions for any length, whatever their config says.
ANY_LENGTH = {"fsmt", "m2m_100", "nllb-moe", "pegasus_x", "xlnet"}
# Flags by what they bound.
QUESTION_LENGTHS = ("max_source_length",)
CONTEXT_LENGTHS = ("max_combined_length",)
TARGET_LENGTHS = ("max_target_length", "val_max_target_length", "test_max_target_length")  # behind the start token
ANSWER_LENGTHS = ("max_length", "min_length")  # the start token included


def most_tokens(config: PreTrainedConfig, decoder: bool = False) -> int | None:
    """The tokens of the longest text that a model, or its decoder, has positions for; None where any length will do."""
    if config.model_type == "pooled_encoder":
        return most_tokens(config.backbone)
    if config.model_type == "encoder-decoder":
        return most_tokens(config.decoder if decoder else config.encoder)
    own = "max_decoder_position_embeddings" if decoder else "max_encoder_position_embeddings"  # LED's
    positions = getattr(config, own, None) or getattr(config, "max_position_embeddings", None)
    if config.model_type in ANY_LENGTH or not isinstance(positions, int) or positions < 1:
        return None
    if config.model_type in BEHIND_PADDING:
        positions -= 1 + (1 if config.model_type == "mpnet" else config.pad_token_id)
    return positions


def length_problems(config: PreTrainedConfig, lengths: Mapping[str, int | None], model: str = "") -> list[str]:
    """One line for each flag that asks for more tokens than the part of the model that it is about can have.

    Args:
        config: of a RAG model or of a bare generator, which reads the question itself.
        lengths: values by the flag's name; None is not asked for.
        model: the flag and value that named the model, for the messages.
    """
    rag = isinstance(config, RagConfig)
    generator = config.generator if rag else config
    reader, what = (config.question_encoder, "question encoder") if rag else (generator, "generator's encoder")
    decoder = most_tokens(generator, decoder=True)
    limits: dict[str, tuple[int | None, str]] = dict.fromkeys(QUESTION_LENGTHS, (most_tokens(reader), f"{what} reads"))
    limits |= dict.fromkeys(CONTEXT_LENGTHS, (most_tokens(generator), "generator's encoder reads"))
    limits |= dict.fromkeys(TARGET_LENGTHS, (decoder and decoder - 1, "generator writes"))
    limits |= dict.fromkeys(ANSWER_LENGTHS, (decoder, "generator writes"))
    of_model = f" ({model})" if model else ""
    problems = []
    for name, value in lengths.items():
        most, where = limits[name]
        if value is not None and most is not None and value > most:
            problems.append(f"--{name} {value} is more than the {most} tokens that the {where}{of_model}; lower it")
    return problems


def beams_problems(generator: PreTrainedConfig, num_beams: int) -> list[str]:
    """Beam search takes twice as many different words a step as there are beams."""
    words = getattr(generator.get_text_config(decoder=True), "vocab_size", None)
    if words is None or num_beams <= words // 2:
        return []
    return [f"--num_beams {num_beams} is more than half of the generator's {words} words; lower it"]


def require_sound(config: PreTrainedConfig, path: str, flag: str) -> None:
    """Refuse sizes in a config that no model has: what is built by them would fail late, or never end.

    Raises:
        UserError: the first of them.
    """
    least_one = ("n_docs", "max_combined_length", "retrieval_vector_size") if isinstance(config, RagConfig) else ()
    for name in least_one:
        if getattr(config, name) < 1:
            _refuse(path, flag, name, getattr(config, name), "it must be 1 or more")
    for name in ("doc_sep", "title_sep") if isinstance(config, RagConfig) else ():
        text = getattr(config, name)
        if not isinstance(text, str) or text != text.encode(errors="ignore").decode():
            _refuse(path, flag, name, repr(text)[:80], "it must be a text")
    for name in ("passages_path", "index_path") if isinstance(config, RagConfig) else ():
        if (value := getattr(config, name)) is not None and not _may_be_a_path(value):
            _refuse(path, flag, name, repr(value)[:80], "no file has such a name")
    for part in parts_of(config):
        template = getattr(part, "prompt_template", None)
        problem = "it must be a text" if not isinstance(template, str | None) else None
        if isinstance(template, str):
            problem = template_problem(template, closed_book=part is config)
        if problem is not None:
            _refuse(path, flag, "prompt_template", repr(template)[:80], problem)
        if not isinstance(part.architectures, list | None):
            _refuse(path, flag, "architectures", part.architectures, "it must be a list of names")
        if not isinstance(part.name_or_path, str | None):
            _refuse(path, flag, "_name_or_path", part.name_or_path, "it must be a name")
        for name, value in vars(part).items():
            if name.endswith("layers") and isinstance(value, int) and not 0 <= value <= 1000:
                _refuse(path, flag, name, value, "no model has so many")


def vector_size(config: PreTrainedConfig) -> int | None:
    """d, the length of the vectors that an encoder of this config gives; None where it does not say."""
    return getattr(config, "projection_dim", 0) or getattr(config, "hidden_size", None)


def settle_vector_size(config: RagConfig, path: str, flag: str) -> None:
    """Have a RAG model's config search with vectors as long as those that its question encoder gives.

    `from_pretrained_question_encoder_generator` leaves transformers' default there, whatever the encoder is.

    Raises:
        UserError: it says another number than both.
    """
    size, said = vector_size(config.question_encoder), config.retrieval_vector_size
    if not isinstance(size, int) or said == size:
        return
    if said != RagConfig.retrieval_vector_size:
        _refuse(path, flag, "retrieval_vector_size", said, f"write {size}, as its question encoder gives")
    config.retrieval_vector_size = size


def _may_be_a_path(value: Any) -> bool:
    """Whether a disk can be asked for it, whatever it answers."""
    try:
        os.lstat(value)
    except (ValueError, TypeError):  # a NUL; no text
        return False
    except OSError as error:
        return error.errno not in (errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(value, str)


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and those inside it."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for one in inside for part in parts_of(one))]


def _refuse(path: str, flag: str, name: str, value: Any, why: str) -> None:
    raise UserError(f"{flag} {path}: its config says {name} {value}; {why}")
