"""Questions to the question encoder's tokens and back, with the prompt that the encoder was trained with.

    tokenizer = with_prompt(tokenizer, config.question_encoder)      # remembers prompt and limit
    tokens = encode_questions(tokenizer, ["where is oslo?"], max_length=128, padding="longest", return_tensors="pt")
    bare_questions(tokenizer, tokens["input_ids"])                   # ["where is oslo?"], whatever the prompt is

BM25, the contexts and the generator see the bare question. Nothing heavy is imported.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from rag.errors import UserError, is_failure, one_line

# Attributes that `with_prompt` gives a tokenizer: the text before a question, the most tokens, whether case is dropped.
PROMPT, LIMIT, LOWER_CASE = "question_prompt", "question_limit", "question_lower_case"

# Threads that read contexts, and how many of these are worth a thread.
MOST_THREADS, FEW_TEXTS = 8, 8


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
    texts = [prompt + question for question in questions]
    with reading(tokenizer):
        return tokenizer(texts, max_length=max_length, truncation=True, **kwargs)


@contextmanager
def reading(tokenizer: Any) -> Iterator[None]:
    """Turn what a tokenizer raises at a text into one line; no one checks its files, which may be a stranger's."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):  # a pattern that has no end makes the library panic
            raise
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} cannot read a text ({one_line(error, 120)}); give a checkpoint "
            "with the tokenizer that belongs to it"
        ) from error


def encode_in_threads(tokenizer: Any, texts: list[str], threads: int | None = None) -> list[Any]:
    """The encodings of texts, in order, without the GIL: a GPU waits for those of a whole batch.

    The library's own threads are off: they would not outlive the forks of data-loading workers.

    Args:
        tokenizer: a fast one.
        threads: None for half of the cores, up to `MOST_THREADS`.
    """
    threads = min(len(os.sched_getaffinity(0)) // 2, MOST_THREADS) if threads is None else threads
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    size = max(FEW_TEXTS, -(-len(texts) // max(threads, 1)))
    if size >= len(texts):
        return encode(texts)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(encode, (texts[i : i + size] for i in range(0, len(texts), size)))
        return [encoding for part in parts for encoding in part]


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
