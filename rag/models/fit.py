"""Whether a tokenizer is the one that its model was trained with, and what a model's config leaves to its tokenizer.

require_fit(model, tokenizer, flags)        # a UserError where ids would be looked up wrongly
complete_start(model, tokenizer, flags)     # mBART's decoder begins with the language code
"""

import logging
from typing import Any

from transformers import PreTrainedModel, RagConfig

from rag.errors import UserError, raise_problems

logger = logging.getLogger(__name__)

# Families whose decoder begins with the last token of the answer (a language code) where the config names no other.
BEGIN_WITH_LAST = {"mbart", "plbart"}


def require_fit(model: PreTrainedModel, tokenizer: Any, source: str) -> None:
    """Raise what is wrong between a model and its tokenizer; a RAG model has a `RagTokenizer`.

    Args:
        source: the flag that named the tokenizer, and its value.

    Raises:
        UserError: the tokenizer has ids that the embeddings have no rows for, or pads with another id.
    """
    if not isinstance(model.config, RagConfig):
        raise_problems(vocabulary_problems(model, tokenizer, source) + generator_problems(model, tokenizer, source))
        return
    raise_problems(
        vocabulary_problems(model.question_encoder, tokenizer.question_encoder, source, "question encoder")
        + vocabulary_problems(model.generator, tokenizer.generator, source, "generator")
        + generator_problems(model.generator, tokenizer.generator, source)
    )


def vocabulary_problems(model: PreTrainedModel, tokenizer: Any, source: str, part: str = "model") -> list[str]:
    """A tokenizer of another model would look up rows that the embeddings do not have, in mid-training."""
    known = [*tokenizer.get_vocab().values(), *tokenizer("a ?")["input_ids"]]  # a template may add ids of its own
    ids, rows = max(len(tokenizer), 1 + max(known, default=-1)), model.get_input_embeddings().num_embeddings
    if ids <= rows:
        return []
    return [f"{source}: the tokenizer has {ids} tokens, the {part} only {rows}; give the tokenizer that belongs to it"]


def generator_problems(generator: PreTrainedModel, tokenizer: Any, source: str) -> list[str]:
    """Answers are padded by the tokenizer, and the loss leaves out the model's padding."""
    pad, ends = generator.config.pad_token_id, generator.generation_config.eos_token_id
    ends = ends if ends is not None else generator.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        logger.warning(
            f"{source}: the tokenizer ends an answer with id {tokenizer.eos_token_id}, the generator with "
            f"{', '.join(map(str, ends))}: it will not stop where it learned to"
        )
    if tokenizer.pad_token_id == pad:
        return []
    return [
        f"{source}: the tokenizer pads with id {tokenizer.pad_token_id}, the generator with {pad}; give the tokenizer "
        "that belongs to it"
    ]


def complete_start(model: PreTrainedModel, tokenizer: Any, source: str) -> None:
    """Give a generator whose config names no first token of the decoder the one that its family begins with.

    mBART moves the language code, an answer's last token, to the front; it is the same for all answers.

    Args:
        source: the flag that named the model, and its value.

    Raises:
        UserError: its family has no such rule.
    """
    rag = isinstance(model.config, RagConfig)
    generator, tokenizer = (model.generator, tokenizer.generator) if rag else (model, tokenizer)
    configs = [generator.config, generator.generation_config, *([model.config] if rag else [])]
    start = next(
        (config.decoder_start_token_id for config in configs if config.decoder_start_token_id is not None), None
    )
    if start is None and generator.config.model_type in BEGIN_WITH_LAST:
        start = tokenizer(text_target="a")["input_ids"][-1]
    if start is None:
        raise UserError(
            f"{source}: its config has no decoder_start_token_id, the token that answers begin with; set it there"
        )
    for config in configs:
        if config.decoder_start_token_id is None:
            config.decoder_start_token_id = start
