"""Embeddings on their way to a device: each in its row, whatever the blocks, and errors on the way."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rag.index import device_loading
from rag.index.device_loading import load
from rag.index.device_vectors import HalfVectors, Int8Vectors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def embeddings(rows: int, dtype=np.float32) -> np.ndarray:
    return (10 * np.random.default_rng(0).standard_normal((rows, 6))).astype(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("sizes", [[1000], [1] * 50 + [0, 300, 0] + [650], [64] * 15 + [40], [0, 0]])
@pytest.mark.parametrize("buffer_rows", [8, 333])
def test_every_embedding_lies_in_its_row(monkeypatch, device, dtype, sizes, buffer_rows):
    monkeypatch.setattr(device_loading, "BUFFER_BYTES", buffer_rows * 4 * 6)
    expected = embeddings(sum(sizes), dtype)
    expected.flags.writeable = False  # as a mapped file is
    half = HalfVectors(len(expected), 6, torch.zeros(0, device=device).device)
    found, largest = load(np.split(expected, np.cumsum(sizes)[:-1]), half, 6)
    assert found == len(expected) and largest == np.abs(expected.astype(np.float32)).max(initial=0)
    np.testing.assert_array_equal(half.values.cpu(), expected.astype(np.float32).astype(np.float16))


@pytest.mark.parametrize("device", DEVICES)
def test_int8_is_within_half_a_step_of_each_vectors_scale(device):
    expected = embeddings(1003)
    expected[5] = 0
    int8 = Int8Vectors(len(expected), 6, torch.zeros(0, device=device).device)
    load([expected], int8, 6)
    scales = int8.scales.cpu().numpy()[:1003, None]
    np.testing.assert_allclose(scales[:, 0], np.abs(expected).max(1) / 127, rtol=1e-6)
    values = int8.values.cpu().numpy()
    assert values.shape == (1008, 8) and not values[1003:].any() and not values[:, 6:].any()
    assert (np.abs(values[:1003, :6] * scales - expected) <= 0.5001 * scales).all()


def test_an_error_of_the_blocks_or_of_a_reader_is_raised():
    def blocks():
        yield embeddings(10)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        load(blocks(), HalfVectors(20, 6, torch.device("cpu")), 6)
    with pytest.raises(ValueError, match="broadcast"):
        load([embeddings(10)], HalfVectors(10, 5, torch.device("cpu")), 5)


def test_reading_goes_on_while_the_device_takes_what_was_read(monkeypatch):
    """When the first buffer is put, the second is being filled already."""
    monkeypatch.setattr(device_loading, "BUFFER_BYTES", 8 * 4 * 6)
    asked, put = [], []

    def blocks():
        for number in range(6):
            asked.append(number)
            yield embeddings(8)

    class Vectors(HalfVectors):
        def put(self, start, chunk):
            put.append((start, len(asked)))
            return super().put(start, chunk)

    load(blocks(), Vectors(48, 6, torch.device("cpu")), 6)
    assert put == [(0, 2), (8, 3), (16, 4), (24, 5), (32, 6), (40, 6)]


def test_the_device_is_asked_for_one_number(monkeypatch):
    monkeypatch.setattr(device_loading, "BUFFER_BYTES", 8 * 4 * 6)
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.name() == "aten::_local_scalar_dense":
                asked.append(args[0].shape)
            return operator(*args, **(kwargs or {}))

    for store in (HalfVectors, Int8Vectors):
        vectors = store(100, 6, torch.device("cpu"))
        with Asked():
            load([embeddings(100)], vectors, 6)
    assert asked == [(), ()]
