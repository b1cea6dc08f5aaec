"""Search over embeddings on a device, here the CPU, beside FAISS's exact search over the same vectors."""

import logging

import faiss
import numpy as np
import pytest

from rag.index import device_search
from rag.index.device_search import DeviceSearch, DeviceUnavailableError
from rag.index.knowledge_index import KnowledgeIndex
from tests.conftest import DIMENSION, PASSAGES


def vectors(seed: int, rows: int, dimension: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32)


def on_cpu(embeddings: np.ndarray) -> DeviceSearch:
    return DeviceSearch(np.array_split(embeddings, 3), len(embeddings), embeddings.shape[1], "cpu")


@pytest.mark.parametrize("chunk", [7, 100, 4096])
@pytest.mark.parametrize("n_docs", [1, 5, 20])
def test_answers_are_those_of_faiss_over_the_same_halves(monkeypatch, chunk, n_docs):
    monkeypatch.setattr(device_search, "CPU_CHUNK", chunk)
    embeddings, queries = vectors(0, 1000), vectors(1, 16)
    exact = faiss.IndexFlatIP(48)
    exact.add(embeddings.astype(np.float16).astype(np.float32))
    expected_scores, expected_rows = exact.search(queries, n_docs)
    scores, rows = on_cpu(embeddings).search(queries, n_docs)
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
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
    search = on_cpu(vectors(0, 3))
    scores, rows = search.search(vectors(1, 2), 5)
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert sorted(rows[0, :3]) == [0, 1, 2] and np.isfinite(scores[:, :3]).all()
    scores, rows = search.search(vectors(1, 0), 5)
    assert scores.shape == rows.shape == (0, 5)


def test_why_a_device_cannot_be_used_is_told(monkeypatch):
    with pytest.raises(DeviceUnavailableError, match="no such device"):
        DeviceSearch([], 0, 4, "cuda:77")
    with pytest.raises(DeviceUnavailableError, match=r"need 2,000,268,435,456 bytes there, [\d,]+ are free"):
        DeviceSearch([], 10**9, 1000, "cpu")
    with pytest.raises(DeviceUnavailableError, match="half precision ends"):
        DeviceSearch([np.full((1, 4), 1e5, np.float32)], 1, 4, "cpu")


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


def test_without_the_device_faiss_searches(knowledge, caplog):
    paths = {name: knowledge[name] for name in ("passages_path", "index_path")}
    index = KnowledgeIndex.load_from_disk(DIMENSION, **paths, device="cuda:77")
    with caplog.at_level(logging.WARNING):
        index.init_index()
    assert "--index_device cuda:77: there is no such device" in caplog.text
    assert "FAISS searches instead" in index.fallback and index.description()["kind"] == "IndexHNSWFlat"
