"""Questions to the question encoder's tokens and back, with the prompt that the encoder was trained with.

    tokenizer = with_prompt(tokenizer, config.question_encoder)      # remembers prompt and limit
    tokens = encode_questions(tokenizer, ["where is oslo?"], max_length=128, padding="longest", return_tensors="pt")
    bare_questions(tokenizer, tokens["input_ids"])                   # ["where is oslo?"], whatever the prompt is

BM25, the contexts and the generator see the bare question. Nothing heavy is imported.
"""

from typing import Any

from rag.errors import UserError
from rag.models.prompts import encode_closed_book, template_of
from rag.models.tokens import reading

# Attributes that `with_prompt` gives a tokenizer: the text before a question, the most tokens, whether case is dropped.
PROMPT, LIMIT, LOWER_CASE = "question_prompt", "question_limit", "question_lower_case"


def with_prompt(tokenizer: Any, encoder_config: Any) -> Any:
    """The tokenizer, which from now on knows what the encoder with this config wants of questions.

    Raises:
        UserError: the prompt leaves no room for a question.
    """
    from rag.models.limits import most_tokens

    limits = [most_tokens(encoder_config), getattr(encoder_config, "max_seq_length", None)]
    prompt, limit = getattr(encoder_config, "query_prompt", ""), min((limit for limit in limits if limit), default=None)
    if prompt and limit is not None and len(tokenizer(prompt)["input_ids"]) >= limit:
        raise UserError(
            f"the query prompt {prompt[:60]!r} leaves no room for a question in the encoder's {limit} tokens; give a "
            "shorter --question_encoder_prompt to consolidate_rag_checkpoint.py"
        )
    setattr(tokenizer, PROMPT, prompt)
    setattr(tokenizer, LIMIT, limit)
    setattr(tokenizer, LOWER_CASE, getattr(encoder_config, "lower_case", False))
    return tokenizer


def encode_questions(tokenizer: Any, questions: list[str], max_length: int | None = None, **kwargs: Any) -> Any:
    """The tokens of questions behind the prompt, if there is one; a tokenizer that knows of none is simply called.

    A language model's without retrieval gives the whole prompt.

    Args:
        max_length: tokens of a question that are kept, the prompt's not counted; fewer where the encoder reads no more.
        kwargs: of the tokenizer's call.
    """
    if template_of(tokenizer) is not None:
        return encode_closed_book(tokenizer, questions, max_length, **kwargs)
    prompt, limit = getattr(tokenizer, PROMPT, ""), getattr(tokenizer, LIMIT, None)
    if getattr(tokenizer, LOWER_CASE, False):
        questions = [question.lower() for question in questions]
    if max_length is not None and prompt:
        max_length += len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if limit is not None:
        max_length = limit if max_length is None else min(max_length, limit)
    texts = [prompt + question for question in questions]
    with reading(tokenizer):
        return tokenizer(texts, max_length=max_length, truncation=True, **kwargs)


def bare_questions(tokenizer: Any, input_ids: Any) -> list[str]:
    """What token ids (B, S) say, without special tokens and without the prompt."""
    if prompt := getattr(tokenizer, PROMPT, "").strip():
        prompt = prompt.lower() if getattr(tokenizer, LOWER_CASE, False) else prompt
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        input_ids = [_without(row, ids, set(tokenizer.all_special_ids)) for row in input_ids.tolist()]
    return tokenizer.batch_decode(input_ids, skip_special_tokens=True)


def _without(row: list[int], prompt: list[int], special: set[int]) -> list[int]:
    """A row of token ids without those of the prompt, if it begins with it behind special tokens."""
    for start in range(len(row)):
        if row[start : start + len(prompt)] == prompt:
            return row[start + len(prompt) :]
        if row[start] not in special:
            break
    return row
