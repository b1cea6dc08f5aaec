"""An index that takes another's place: opened beside it, searched from then on, by a retriever or a Ray worker."""

import copy

import numpy as np
import pytest

from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
from rag.errors import UserError
from rag.retrieval.actor import RayRetriever, index_config
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, write_index

QUERIES = np.random.default_rng(0).standard_normal((5, DIMENSION), dtype=np.float32)


@pytest.fixture(scope="module")
def other(knowledge, tmp_path_factory):
    """Passages and index of the same texts with other vectors."""
    from datasets import load_from_disk

    folder = tmp_path_factory.mktemp("other")
    dataset = load_from_disk(knowledge["passages_path"])
    vectors = np.random.default_rng(1).standard_normal((len(dataset), DIMENSION), dtype=np.float32)
    features = dataset.features
    turned = dataset.map(lambda _, i: {"embeddings": vectors[i]}, with_indices=True, features=features)
    turned.save_to_disk(folder / "passages")
    turned.select(range(7)).save_to_disk(folder / "fewer")
    write_index("HNSW8,Flat", vectors, folder / "index.faiss")
    write_index("HNSW8,Flat", vectors[:7], folder / "fewer.faiss")
    return str(folder / "passages"), str(folder / "index.faiss")


def config_of(rag_sequence, paths):
    config = copy.deepcopy(rag_sequence.config)
    config.passages_path, config.index_path = paths
    return config


@pytest.mark.parametrize("kind", [RagKnowledgeRetriever, RagPyTorchDistributedRetriever])
def test_the_old_index_is_searched_until_the_new_one_is_taken(kind, rag_sequence, other):
    retriever, expected = (kind(config, None, None) for config in (rag_sequence.config, config_of(rag_sequence, other)))
    for one in (retriever, expected):
        one.init_retrieval()
    before, after = retriever.retrieve(QUERIES, 3), expected.retrieve(QUERIES, 3)
    assert not np.array_equal(before[1], after[1])
    index = retriever.open_beside(*other)
    np.testing.assert_array_equal(retriever.retrieve(QUERIES, 3)[1], before[1])
    retriever.take_index(index)
    found = retriever.retrieve(QUERIES, 3)
    np.testing.assert_array_equal(found[1], after[1])
    np.testing.assert_array_equal(found[0], after[0])
    assert [doc["text"] for doc in found[2]] == [doc["text"] for doc in after[2]]


def test_an_index_of_other_passages_is_refused(rag_sequence, other):
    retriever = RagKnowledgeRetriever(rag_sequence.config, None, None)
    fewer = [path.replace("passages", "fewer").replace("index.faiss", "fewer.faiss") for path in other]
    with pytest.raises(UserError, match="is of 7 passages, and 8 were searched so far"):
        retriever.open_beside(*fewer)
    with pytest.raises(UserError, match="is not a folder of passages"):
        retriever.open_beside("nowhere", other[1])


def test_a_worker_searches_what_it_is_asked_to(rag_sequence, other, knowledge):
    """Also one that died, and opens it only now."""
    old = RagKnowledgeRetriever(rag_sequence.config, None, None).retrieve(QUERIES, 3)[1]
    new = RagKnowledgeRetriever(config_of(rag_sequence, other), None, None).retrieve(QUERIES, 3)[1]
    asked = QUERIES.tobytes(), DIMENSION, 3
    begun, restarted = (RayRetriever(index_config(rag_sequence.config)) for _ in range(2))
    np.testing.assert_array_equal(begun.search(*asked)[1], old)
    begun.open_beside(*other)
    np.testing.assert_array_equal(begun.search(*asked)[1], old)
    for worker in (begun, restarted):
        np.testing.assert_array_equal(worker.search(*asked, other)[1], new)
        assert worker.index is None and worker.init_retrieval() is None and worker.index is None
    back = knowledge["passages_path"], knowledge["index_path"]
    begun.open_beside(*back)
    np.testing.assert_array_equal(begun.search(*asked, other)[1], new)  # another rank's, which comes late
    np.testing.assert_array_equal(begun.search(*asked, back)[1], old)
    assert list(begun.beside) == [back]
