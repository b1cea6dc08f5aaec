"""Questions to the question encoder's tokens and back, with the prompt that the encoder was trained with.

    tokenizer = with_prompt(tokenizer, config.question_encoder)      # remembers prompt and limit
    tokens = encode_questions(tokenizer, ["where is oslo?"], max_length=128, padding="longest", return_tensors="pt")
    bare_questions(tokenizer, tokens["input_ids"])                   # ["where is oslo?"], whatever the prompt is

BM25, the contexts and the generator see the bare question. Nothing heavy is imported.
"""

from typing import Any

# Attributes that `with_prompt` gives a tokenizer: the text before a question, the most tokens, whether case is dropped.
PROMPT, LIMIT, LOWER_CASE = "question_prompt", "question_limit", "question_lower_case"


def with_prompt(tokenizer: Any, encoder_config: Any) -> Any:
    """The tokenizer, which from now on knows what the encoder with this config wants of questions."""
    from rag.models.limits import most_tokens

    limits = [most_tokens(encoder_config), getattr(encoder_config, "max_length", None)]
    setattr(tokenizer, PROMPT, getattr(encoder_config, "query_prompt", ""))
    setattr(tokenizer, LIMIT, min((limit for limit in limits if limit), default=None))
    setattr(tokenizer, LOWER_CASE, getattr(encoder_config, "lower_case", False))
    return tokenizer


def encode_questions(tokenizer: Any, questions: list[str], max_length: int | None = None, **kwargs: Any) -> Any:
    """The tokens of questions behind the prompt, if there is one; a tokenizer that knows of none is simply called.

    Args:
        max_length: tokens of a question that are kept, the prompt's not counted; fewer where the encoder reads no more.
        kwargs: of the tokenizer's call.
    """
    prompt, limit = getattr(tokenizer, PROMPT, ""), getattr(tokenizer, LIMIT, None)
    if getattr(tokenizer, LOWER_CASE, False):
        questions = [question.lower() for question in questions]
    if max_length is not None and prompt:
        max_length += len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if limit is not None:
        max_length = limit if max_length is None else min(max_length, limit)
    return tokenizer([prompt + question for question in questions], max_length=max_length, truncation=True, **kwargs)


def bare_questions(tokenizer: Any, input_ids: Any) -> list[str]:
    """What token ids (B, S) say, without special tokens and without the prompt."""
    questions = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
    if not (prompt := getattr(tokenizer, PROMPT, "").strip()):
        return questions
    prompt = prompt.lower() if getattr(tokenizer, LOWER_CASE, False) else prompt
    decoded = tokenizer.decode(tokenizer(prompt, add_special_tokens=False)["input_ids"]).strip()
    return [question.strip().removeprefix(decoded).strip() for question in questions]
