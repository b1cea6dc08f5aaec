"""Texts to token ids, in whole, and what a tokenizer raises at a text as one line.

    rows = token_rows(tokenizer, texts)      # lists of ids, neither cut nor padded

Nothing heavy is imported.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from rag.errors import UserError, is_failure, one_line

# Threads that read texts, and how many of these are worth a thread.
MOST_THREADS, FEW_TEXTS = 8, 8


def token_rows(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    """The tokens of each text, in whole. A fast tokenizer gives ids alone: all else takes as long again.

    Args:
        special: with the special tokens that it puts around a text.
    """
    if not tokenizer.is_fast:
        return tokenizer(texts, verbose=False, add_special_tokens=special)["input_ids"]
    from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD, truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        max_length=None, stride=0, pad_to_multiple_of=None, padding_side=None,
    )  # fmt: skip
    with reading(tokenizer):
        return [encoding.ids for encoding in encode_in_threads(tokenizer, texts, special=special)]


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


def encode_in_threads(tokenizer: Any, texts: list[str], threads: int | None = None, special: bool = True) -> list[Any]:
    """The encodings of texts, in order, without the GIL: a GPU waits for those of a whole batch.

    The library's own threads are off: they would not outlive the forks of data-loading workers.

    Args:
        tokenizer: a fast one.
        threads: None for half of the cores, up to `MOST_THREADS`.
        special: with the special tokens that it puts around a text.
    """
    threads = min(len(os.sched_getaffinity(0)) // 2, MOST_THREADS) if threads is None else threads
    encode = partial(tokenizer.backend_tokenizer.encode_batch_fast, add_special_tokens=special)
    size = max(FEW_TEXTS, -(-len(texts) // max(threads, 1)))
    if size >= len(texts):
        return encode(texts)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(encode, (texts[i : i + size] for i in range(0, len(texts), size)))
        return [encoding for part in parts for encoding in part]
