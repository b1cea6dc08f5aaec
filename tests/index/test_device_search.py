"""Search over embeddings on a device, here the CPU, beside a plain top-k and FAISS's exact search."""

import logging
from collections import Counter

import faiss
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rag.errors import UserError
from rag.index import device_search
from rag.index.arguments import SearchArguments
from rag.index.device_search import BeyondPrecisionError, DeviceSearch, DeviceUnavailableError
from rag.index.device_vectors import STORES
from rag.index.knowledge_index import KnowledgeIndex
from tests.conftest import DIMENSION, PASSAGES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# Scores that may be kept at a time: all, those of all questions in three passes, none but the maxima of tiles.
LIMITS = [2**27, 2**16, 2**10]


def vectors(seed: int, rows: int, dimension: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32)


def whole_numbers(seed: int, rows: int, dimension: int = 24) -> np.ndarray:
    """Vectors whose products are exact in half precision, in whatever order they are summed, and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, dimension)).astype(np.float32)


def searching(embeddings: np.ndarray, device: str = "cpu", precision: str = "fp16") -> DeviceSearch:
    blocks = np.array_split(embeddings, 3)
    return DeviceSearch(blocks, *embeddings.shape, device, precision, gather=lambda rows: embeddings[rows])


def plain_search(queries: np.ndarray, embeddings: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
    """All scores, sorted; of equal ones the lower row first."""
    scores = queries @ embeddings.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("n_docs", [1, 5, 40])
def test_answers_are_those_of_a_full_sort_ties_included(monkeypatch, device, precision, limit, n_docs):
    monkeypatch.setattr(device_search, "MAXIMA_AT_A_TIME", limit)
    monkeypatch.setattr(device_search, "SCORES_AT_A_TIME", 2**15)
    embeddings, queries = whole_numbers(0, 12_345), whole_numbers(1, 20)
    expected_scores, expected_rows = plain_search(queries, embeddings, n_docs)
    if precision == "int8":  # ties at the last candidate would make a difference
        monkeypatch.setattr(device_search, "CANDIDATES", len(embeddings))
    scores, rows = searching(embeddings, device, precision).search(queries, n_docs)
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("chunk", [7, 300, 4096])
@pytest.mark.parametrize("n_docs", [1, 5, 20])
def test_answers_are_those_of_faiss_over_the_same_halves(monkeypatch, limit, chunk, n_docs):
    monkeypatch.setattr(device_search, "MAXIMA_AT_A_TIME", limit)
    monkeypatch.setattr(device_search, "CPU_CHUNK", chunk)
    embeddings, queries = vectors(0, 5678), vectors(1, 16)
    exact = faiss.IndexFlatIP(48)
    exact.add(embeddings.astype(np.float16).astype(np.float32))
    expected_scores, expected_rows = exact.search(queries, n_docs)
    scores, rows = searching(embeddings).search(queries, n_docs)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_differs_only_where_half_precision_ties(device):
    embeddings, queries = vectors(0, 5000), vectors(1, 64)
    exact = faiss.IndexFlatIP(48)
    exact.add(embeddings)
    expected_scores, expected_rows = exact.search(queries, 5)
    _, rows = DeviceSearch([embeddings], len(embeddings), 48, device).search(queries, 5)
    true_scores = np.einsum("bd,bnd->bn", queries, embeddings[rows])
    # A coordinate is rounded by 2**-11 of itself, a product's sum by no more than that share of its parts. A GPU takes
    # the queries in half precision, too.
    rounding = 2.0**-10 if device == "cpu" else 2.0**-9
    largest = np.abs(queries) @ np.abs(embeddings).max(0) * rounding
    assert (np.abs(true_scores - expected_scores) <= largest[:, None]).all()
    assert (rows == expected_rows).mean() > 0.99


def test_fewer_passages_than_asked_for_and_no_questions():
    search = searching(vectors(0, 3))
    scores, rows = search.search(vectors(1, 2), 5)
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert sorted(rows[0, :3]) == [0, 1, 2] and np.isfinite(scores[:, :3]).all()
    scores, rows = search.search(vectors(1, 0), 5)
    assert scores.shape == rows.shape == (0, 5)


def test_why_a_device_cannot_be_used_is_told(monkeypatch):
    with pytest.raises(DeviceUnavailableError, match="no such device"):
        DeviceSearch([], 0, 4, "cuda:77")
    with pytest.raises(DeviceUnavailableError, match=r"need 2,001,610,612,736 bytes there, [\d,]+ are free"):
        DeviceSearch([], 10**9, 1000, "cpu")
    with pytest.raises(DeviceUnavailableError, match=r"embeddings in int8 need 1,\d{3},\d{3},\d{3},\d{3} bytes there"):
        searching(np.broadcast_to(np.float32(0), (10**9, 1000)), precision="int8")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [0, 1000, 2999])
def test_what_a_precision_cannot_hold_is_told(device, row):
    for precision, value in [("fp16", 1e5), ("fp16", np.nan), ("fp16", np.inf), ("int8", np.nan), ("int8", np.inf)]:
        embeddings = vectors(0, 3000, 4)
        embeddings[row, 2] = value
        name = {"fp16": "half precision ends at 65504", "int8": "int8 ends at 3e\\+38"}[precision]
        with pytest.raises(BeyondPrecisionError, match=f"{name}, an embedding goes beyond it"):
            searching(embeddings, device, precision)
    embeddings[row, 2] = 1e5
    searching(embeddings, device, "int8")


def test_a_knowledge_index_on_a_device(knowledge):
    paths = {name: knowledge[name] for name in ("passages_path", "index_path")}
    with_faiss = KnowledgeIndex.load_from_disk(DIMENSION, **paths)
    on_device = KnowledgeIndex.load_from_disk(DIMENSION, **paths, device="cpu")
    queries = vectors(2, 6, DIMENSION)
    for index in (with_faiss, on_device):
        index.init_index()
    assert on_device.description() == {
        "kind": "all embeddings, float16 on cpu", "passages": len(PASSAGES), "dimension": DIMENSION,
    }  # fmt: skip
    assert on_device.faiss_index is None and on_device.fallback is None
    for found, expected in zip(on_device.get_top_docs(queries, 4), with_faiss.get_top_docs(queries, 4), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_the_row_that_holds_no_number_is_told(knowledge, monkeypatch, value):
    index = KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], knowledge["index_path"], device="cpu")
    wrong = index.embeddings.gather(np.arange(len(index)))
    wrong[6, 3] = value
    monkeypatch.setattr(index.embeddings, "views", lambda rows: [wrong[rows.start : rows.stop]])
    if value == 1e5:
        index.init_index()
        assert "half precision ends at 65504" in index.fallback and index.faiss_index is not None
    else:
        with pytest.raises(UserError, match="the embedding of row 6 holds NaN or infinity; embed the passages again"):
            index.init_index()


def test_a_knowledge_index_in_int8(knowledge):
    paths = {name: knowledge[name] for name in ("passages_path", "index_path")}
    index = KnowledgeIndex.load_from_disk(DIMENSION, **paths, device="cpu", precision="int8")
    with_faiss = KnowledgeIndex.load_from_disk(DIMENSION, **paths)
    for each in (index, with_faiss):
        each.init_index()
    assert index.description()["kind"] == "all embeddings, int8 on cpu, the best 64 ranked in float32"
    queries = vectors(2, 6, DIMENSION)
    for found, expected in zip(index.get_top_docs(queries, 4), with_faiss.get_top_docs(queries, 4), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_without_a_device_is_refused(precision):
    expected = [
        f"--index_precision {precision} is how --index_device holds the embeddings; give --index_device cuda, too, or "
        "leave it out"
    ]
    assert SearchArguments(index_precision=precision).search_problems() == expected
    assert SearchArguments(index_precision=precision, index_device="cpu").search_problems() == []


def test_without_the_device_faiss_searches(knowledge, caplog):
    paths = {name: knowledge[name] for name in ("passages_path", "index_path")}
    index = KnowledgeIndex.load_from_disk(DIMENSION, **paths, device="cuda:77")
    with caplog.at_level(logging.WARNING):
        index.init_index()
    assert "--index_device cuda:77: there is no such device" in caplog.text
    assert "FAISS searches instead" in index.fallback and index.description()["kind"] == "IndexHNSWFlat"


@pytest.mark.parametrize("device", DEVICES)
def test_candidates_are_ranked_by_their_float32_vectors(device):
    embeddings, queries = vectors(0, 20_000), vectors(1, 16)
    expected_scores, expected_rows = plain_search(queries, embeddings, 5)
    scores, rows = searching(embeddings, device, "int8").search(queries, 5)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, np.einsum("bd,bnd->bn", queries, embeddings[rows]))
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_int8_finds_the_best_of_clustered_vectors_too():
    """Vectors of a cluster differ by a tenth of their length: their order hangs on small differences."""
    centers = vectors(0, 20, 64)
    embeddings = centers[np.arange(20_000) % 20] + 0.1 * vectors(1, 20_000, 64)
    queries = centers[np.arange(32) % 20] + 0.1 * vectors(2, 32, 64)
    _, expected_rows = plain_search(queries, embeddings, 5)
    _, rows = searching(embeddings, precision="int8").search(queries, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, expected_rows, strict=True)]) > 0.98


def test_vectors_of_zeros_and_of_any_length_in_int8():
    embeddings = vectors(0, 300, 13) * np.float32(10.0) ** np.arange(-15, 15, 0.1, dtype=np.float32)[:, None]
    embeddings[7] = 0
    _, expected_rows = plain_search(embeddings[290:], embeddings, 3)
    _, rows = searching(embeddings, precision="int8").search(embeddings[290:], 3)
    np.testing.assert_array_equal(rows, expected_rows)


# --- What a clock would show on a GPU, counted without one ------------------------------------------------------------


VIEWS = {f"aten::{name}" for name in ("alias", "slice.Tensor", "numpy_T", "unflatten.int", "split.Tensor", "unsqueeze")}


class Operators(TorchDispatchMode):
    """Counts operators by name, and the bytes of the embeddings that products read."""

    def __init__(self, vectors):
        super().__init__()
        self.storage = vectors.values.untyped_storage()
        self.counts, self.bytes_read = Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        self.counts[name] += 1
        if name in ("aten::mm.dtype", "aten::_int_mm"):
            right = args[1]
            self.bytes_read += right.numel() * right.element_size()
        if name == "aten::index_select":
            self.bytes_read += args[2].numel() * args[0].shape[1] * args[0].element_size()
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision, count, bytes_a_number", [("fp16", 5, 2), ("int8", 64, 1)])
@pytest.mark.parametrize("questions", [1, 64, 1024])
def test_a_search_reads_the_embeddings_once_and_waits_for_nothing(precision, count, bytes_a_number, questions):
    """On torch's device "meta", which computes shapes alone, a search takes the way that it takes on a GPU.

    An operator that asks the device for a value, or copies from it, fails there.
    """
    rows, dimension = 21_015_300, 768
    search = object.__new__(DeviceSearch)
    search.device, search.rows = torch.device("meta"), rows
    search.vectors = STORES[precision](rows, dimension, search.device)
    passes, tile = search._passes(questions, count)
    part = -(-questions // passes)
    with torch.inference_mode(), Operators(search.vectors) as operators:
        keys = search._one_pass(search.vectors.prepare(torch.empty((part, dimension), device="meta")), count, tile)
    assert keys.shape == (max(part, 32 if precision == "int8" else 1), count)
    once = rows * dimension * bytes_a_number
    assert once * 0.9999 <= operators.bytes_read
    assert operators.bytes_read <= 1.08 * once  # `count` tiles a question are looked at again
    products = operators.counts["aten::mm.dtype"] + operators.counts["aten::_int_mm"]
    blocks = 1 if tile == 1 else -(-rows * part // device_search.SCORES_AT_A_TIME) + 1
    assert products <= blocks
    assert operators.counts["aten::amax.out"] in (products, 0)
    launches = sum(count for name, count in operators.counts.items() if name not in VIEWS)
    assert launches <= (2 if precision == "fp16" else 3) * products + 150, operators.counts
    assert passes == {"fp16": {1: 1, 64: 1, 1024: 2}, "int8": {1: 1, 64: 1, 1024: 6}}[precision][questions]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_search_is_copied_from_the_device_once(monkeypatch, precision):
    monkeypatch.setattr(device_search, "MAXIMA_AT_A_TIME", 2**10)
    search = searching(vectors(0, 9000), precision=precision)
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or tensor)
    assert search._passes(100, 5)[0] > 1
    search.search(vectors(1, 100), 5)
    assert copies == [(100, 5 if precision == "fp16" else device_search.CANDIDATES)]
