"""Whether a tokenizer is the one that its model was trained with, and what a model's config leaves to its tokenizer.

require_fit(model, tokenizer, flags)        # a UserError where ids would be looked up wrongly
require_reading(encoder, read, flags)       # a UserError where an encoder tells no text from another
complete_start(model, tokenizer, flags)     # mBART's decoder begins with the language code
settle_prompt(model, tokenizer, flags)      # a bare language model's begins behind a prompt
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel, RagConfig

from rag.errors import UserError, one_line, raise_problems
from rag.models.custom_code import code_files
from rag.models.prompts import PLAIN_CLOSED_BOOK, settle_language_model

logger = logging.getLogger(__name__)

# Families whose decoder begins with the last token of the answer (a language code) where the config names no other.
BEGIN_WITH_LAST = {"mbart", "plbart"}
# Tokens that decoding begins with, ends with or is made to write.
DECODER_TOKENS = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
TWO_TEXTS = ["a river", "the seven hills of a large city, which is old ?"]


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
    ids, rows = max(len(tokenizer), 1 + max(known, default=-1)), _embedding_rows(model)
    if rows is None or ids <= rows:
        return []
    return [f"{source}: the tokenizer has {ids} tokens, the {part} only {rows}; give the tokenizer that belongs to it"]


def _embedding_rows(model: PreTrainedModel) -> int | None:
    """Rows of the embeddings; None of a model that has none, as CANINE, which hashes characters."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


def require_reading(encoder: PreTrainedModel, read: Callable[[list[str]], Any], source: str) -> None:
    """Raise `UserError` unless an encoder gives vectors of texts, and not the same one of all.

    Whether a model reads token ids at all, and whether its pooled token has seen the others, is told by no config. An
    encoder that is code beside its checkpoint is warned of: it is what somebody meant it to be.

    Args:
        read: texts to their vectors, an array (N, d).
        source: the flag that named the encoder, and its value.
    """
    try:
        first, second = np.asarray(read(TWO_TEXTS))
    except UserError:
        raise
    except Exception as error:  # a model of another kind ends wherever it misses something
        raise UserError(f"{source} cannot read texts ({one_line(error, 200)}); give an encoder of texts") from error
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError(f"{source} gives vectors that are not finite (NaN or inf); give a whole encoder")
    if np.allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max()):
        problem = (
            f"{source} gives the same vector of all texts: its pooling, its prompt or its max_seq_length leaves "
            "nothing of them; give another pooling, or another encoder"
        )
        if not code_files(encoder):
            raise UserError(problem)
        logger.warning(problem)


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
    if problems := _unknown_tokens(generator, source):
        return problems
    if tokenizer.pad_token_id == pad:
        return []
    return [
        f"{source}: the tokenizer pads with id {tokenizer.pad_token_id}, the generator with {pad}; give the tokenizer "
        "that belongs to it"
    ]


def _unknown_tokens(generator: PreTrainedModel, source: str) -> list[str]:
    """Tokens of the generator's configs that its embeddings have no rows for."""
    rows = _embedding_rows(generator)
    problems = {}  # the two configs mostly say the same
    for name in DECODER_TOKENS:
        for config in (generator.config, generator.generation_config):
            value = getattr(config, name, None)
            for token in value if isinstance(value, list) else [value]:
                if rows is not None and token is not None and not (type(token) is int and 0 <= token < rows):
                    problems[name] = f"{source}: the generator's {name} is {token!r}, of {rows} tokens; mend its config"
    return list(problems.values())


def settle_prompt(model: PreTrainedModel, tokenizer: Any, source: str) -> None:
    """Give a bare causal language model the prompt that it reads questions in, and its tokenizer; others stay as is.

    It is the one that the model's checkpoint keeps, else the plain one.

    Args:
        source: the flag that named the tokenizer, and its value.
    """
    if not model.config.is_encoder_decoder:
        template = getattr(model.config, "prompt_template", None) or PLAIN_CLOSED_BOOK
        settle_language_model(model, tokenizer, template, source)


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
