"""What is encoded together, and what is done beside the device."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rag.knowledge.token_batches import (
    CPU_TOKENS,
    PACKED_TOKENS,
    PADDED_TOKENS,
    ahead,
    cut_batches,
    tokens_that_fit,
)

# As nq_gold's passages: most have 33 to 49 tokens, one in twenty up to 184.
LENGTHS = np.random.default_rng(0).permutation(
    np.concatenate([np.linspace(29, 50, 1950), np.linspace(51, 184, 98)]).astype(int)
)


@pytest.mark.parametrize(
    ("limits", "encoded"),
    [
        ({"passages": 16}, lambda lengths: len(lengths) <= 16),
        ({"tokens": 1000}, lambda lengths: len(lengths) * lengths.max() <= 1000),
        ({"tokens": 1000, "packed": True}, lambda lengths: lengths.sum() <= 1000),
        ({"tokens": 1000, "passages": 7}, lambda lengths: len(lengths) * lengths.max() <= 1000 and len(lengths) <= 7),
        ({"tokens": 10}, lambda lengths: len(lengths) == 1),  # every passage is longer
        ({}, lambda lengths: len(lengths) == len(LENGTHS)),
    ],
)
def test_each_passage_is_in_one_batch_within_the_limits(limits, encoded):
    batches = cut_batches(LENGTHS, **limits)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(LENGTHS)))
    assert all(encoded(LENGTHS[rows]) for rows in batches)
    assert np.all(np.diff(LENGTHS[np.concatenate(batches)]) <= 0)  # the longest first: what does not fit fails at once


def test_batches_are_filled():
    for packed in (False, True):
        batches = cut_batches(LENGTHS, tokens=1000, packed=packed)
        assert all(LENGTHS[rows].sum() > 750 for rows in batches[:-1])


def test_padding_of_a_cpus_batches_is_under_two_percent():
    padded = sum(len(rows) * LENGTHS[rows].max() for rows in cut_batches(LENGTHS, tokens=CPU_TOKENS))
    assert padded < 1.02 * LENGTHS.sum()


def test_tokens_are_found_from_the_free_memory(monkeypatch):
    config = SimpleNamespace(model_type="dpr", hidden_size=768, intermediate_size=3072)
    encoder = SimpleNamespace(config=config, dtype=torch.float16)
    a_token = 2 * (8 * 768 + 3 * 3072)

    def found(free: int, packed: bool = True) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        return tokens_that_fit(encoder, torch.device("cuda"), packed)

    assert found(2 * 1000 * a_token) == 1000
    assert found(80 * 2**30) == PACKED_TOKENS and found(80 * 2**30, packed=False) == PADDED_TOKENS
    assert found(0) == 1
    encoder.dtype = torch.float32
    assert found(2 * 1000 * a_token) == 500
    assert tokens_that_fit(encoder, torch.device("cpu"), packed=False) == CPU_TOKENS


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_work_ahead_is_in_order_and_no_farther_than_it_may(depth):
    taken, threads = [], set()

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        threads.add(threading.current_thread())
        return number**2

    for number, result in enumerate(ahead(work, items(), depth)):
        assert result == number**2
        assert len(taken) <= number + 1 + depth
    assert number == 7 and len(threads) == 1
    assert (threads == {threading.current_thread()}) == (depth == 0)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_ahead_is_told_where_the_result_is_wanted(depth):
    def work(number: int) -> int:
        return 1 // (3 - number)

    results = ahead(work, range(10), depth)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
