"""FAISS indexes of other people's making: ranked by distance, with ids of their own, with links that lead nowhere."""

import copy

import datasets
import faiss
import numpy as np
import pytest

from rag import checksums
from rag.errors import UserError
from rag.index import faiss_mapping
from rag.index.faiss_checks import foreign_row, ids_problem, ranking_of
from rag.index.faiss_mapping import map_index
from rag.index.faiss_opening import ANY_EFFORT
from rag.index.index_files import shard_path
from rag.index.knowledge_index import KnowledgeIndex

ROWS, D, N_DOCS = 300, 16, 4
RANDOM = np.random.default_rng(5)
VECTORS = RANDOM.standard_normal((ROWS, D)).astype(np.float32)
UNEQUAL = VECTORS * RANDOM.uniform(0.5, 3, (ROWS, 1)).astype(np.float32)
EQUAL = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
QUERIES = RANDOM.standard_normal((6, D)).astype(np.float32)


def dataset(vectors) -> datasets.Dataset:
    rows = {"title": [f"t{row}" for row in range(ROWS)], "text": ["x"] * ROWS, "embeddings": vectors}
    return datasets.Dataset.from_dict(rows)


def best(vectors) -> np.ndarray:
    return np.argsort(-(QUERIES @ vectors.T), axis=1)[:, :N_DOCS]


def filled(factory: str, vectors, metric=faiss.METRIC_L2):
    index = factory if isinstance(factory, faiss.Index) else faiss.index_factory(D, factory, metric)
    index.train(vectors)
    index.add(vectors)
    return index


def opened(index, vectors, tmp_path, **search) -> KnowledgeIndex:
    dataset(vectors).save_to_disk(tmp_path / "kb")
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    return reopened(tmp_path, **search)


def reopened(tmp_path, **search) -> KnowledgeIndex:
    knowledge = KnowledgeIndex.load_from_disk(D, tmp_path / "kb", tmp_path / "x.faiss", **search)
    knowledge.init_index()
    return knowledge


def assert_finds_the_best(knowledge: KnowledgeIndex, vectors) -> None:
    scores, ids = knowledge.search(QUERIES, N_DOCS)
    np.testing.assert_array_equal(ids, best(vectors))
    np.testing.assert_allclose(scores, np.take_along_axis(QUERIES @ vectors.T, ids, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(knowledge.get_top_docs(QUERIES, N_DOCS)[0], ids)


# --- By distance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: faiss.IndexFlatL2(D), lambda: faiss.index_factory(D, "Flat")])
def test_a_flat_index_by_distance_is_searched_by_inner_product(build, tmp_path):
    assert_finds_the_best(opened(filled(build(), UNEQUAL), UNEQUAL, tmp_path), UNEQUAL)


def test_flat_shards_by_distance_are_searched_by_inner_product(tmp_path):
    dataset(UNEQUAL).save_to_disk(tmp_path / "kb")
    (tmp_path / "x.faiss").mkdir()
    for start, end in [(0, 100), (100, ROWS)]:
        faiss.write_index(filled("Flat", UNEQUAL[start:end]), str(shard_path(tmp_path / "x.faiss", start, end)))
    assert_finds_the_best(reopened(tmp_path), UNEQUAL)


def test_an_index_in_memory_by_distance_is_searched_by_inner_product_and_stays_as_it_is():
    knowledge = dataset(UNEQUAL)
    knowledge.add_faiss_index("embeddings")  # datasets' own default
    theirs = knowledge.get_index("embeddings").faiss_index
    ours = KnowledgeIndex.from_dataset(knowledge, D)
    assert_finds_the_best(ours, UNEQUAL)
    assert_finds_the_best(copy.deepcopy(ours), UNEQUAL)
    assert theirs.metric_type == faiss.METRIC_L2
    distances = ((QUERIES[:, None] - UNEQUAL) ** 2).sum(-1)
    np.testing.assert_array_equal(theirs.search(QUERIES, 1)[1][:, 0], distances.argmin(1))


def test_what_was_in_memory_is_saved_by_inner_product(tmp_path):
    knowledge = dataset(UNEQUAL)
    knowledge.add_faiss_index("embeddings")
    KnowledgeIndex.from_dataset(knowledge, D).save(tmp_path / "kb", tmp_path / "x.faiss")
    assert faiss.read_index(str(tmp_path / "x.faiss")).metric_type == faiss.METRIC_INNER_PRODUCT
    assert_finds_the_best(reopened(tmp_path), UNEQUAL)


@pytest.mark.parametrize(
    "factory",
    ["HNSW32", "HNSW16,SQ8", "IVF4,Flat", "PQ4x4", "SQ8", "L2norm,Flat", "PCA8,Flat", "Flat,RFlat", "IDMap,Flat"],
)
def test_any_other_index_by_distance_is_refused(factory, tmp_path):
    index = faiss.index_factory(D, factory)
    if factory.startswith("IDMap"):
        index.add_with_ids(UNEQUAL, np.arange(ROWS))
    else:
        filled(index, UNEQUAL)
    with pytest.raises(UserError, match=r"x\.faiss ranks passages by (distance|cosine), RAG by inner product") as error:
        opened(index, UNEQUAL, tmp_path)
    assert "METRIC_INNER_PRODUCT" in str(error.value) and "--index_factory" in str(error.value)


def test_cosines_are_refused_also_where_the_metric_is_the_inner_product(tmp_path):
    assert ranking_of(faiss.index_factory(D, "L2norm,Flat", faiss.METRIC_INNER_PRODUCT)) == "cosine"
    assert ranking_of(faiss.index_factory(D, "PCAW8,Flat", faiss.METRIC_INNER_PRODUCT)) == "cosine"
    assert ranking_of(faiss.index_factory(D, "PCA8,HNSW8,Flat", faiss.METRIC_INNER_PRODUCT)) == "inner product"
    assert ranking_of(faiss.index_factory(D, "IVF4,PQ4,RFlat", faiss.METRIC_INNER_PRODUCT)) == "inner product"
    assert ranking_of(faiss.IndexFlat(D, faiss.METRIC_L1)) == "another metric"
    with pytest.raises(UserError, match="ranks passages by cosine"):
        opened(filled("L2norm,Flat", UNEQUAL, faiss.METRIC_INNER_PRODUCT), UNEQUAL, tmp_path)


@pytest.mark.parametrize("factory", ["HNSW32", "L2norm,Flat", "IVF1,Flat"])
def test_vectors_of_one_length_are_nearest_where_their_product_is_largest(factory, tmp_path):
    knowledge = opened(filled(factory, EQUAL), EQUAL, tmp_path, **{"ef_search": 300} if factory == "HNSW32" else {})
    assert_finds_the_best(knowledge, EQUAL)


def test_an_index_by_distance_is_not_asked_where_a_device_searches(tmp_path):
    knowledge = opened(filled("HNSW32", UNEQUAL), UNEQUAL, tmp_path, device="cpu")
    np.testing.assert_array_equal(knowledge.search(QUERIES, N_DOCS)[1], best(UNEQUAL))


# --- Ids --------------------------------------------------------------------------------------------------------------


def with_ids(index, ids):
    index.train(VECTORS)
    index.add_with_ids(VECTORS, np.asarray(ids, dtype=np.int64))
    return index


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW8", "IVF4,Flat", "PCA8,IVF4,Flat"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (range(1000, 1000 + ROWS), r"it has ids of its own: 1\d\d\d is not the number of one of 300 passages"),
        ([0, *range(ROWS - 1)], "its ids are not the numbers of 300 passages, each once"),
        ([-5, *range(1, ROWS)], "it has ids of its own: -5 is not"),
    ],
)
def test_ids_that_are_no_rows_are_told_when_the_index_is_opened(factory, ids, message, tmp_path):
    index = with_ids(faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT), ids)
    with pytest.raises(UserError, match=rf"--index_path .*x\.faiss: {message}"):
        opened(index, VECTORS, tmp_path)


def test_ids_that_are_the_rows_in_any_order_are_right(tmp_path):
    order = RANDOM.permutation(ROWS)
    index = faiss.index_factory(D, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(VECTORS[order], order)
    assert_finds_the_best(opened(index, VECTORS, tmp_path), VECTORS)


def test_ids_beyond_the_passages_that_a_search_gives_are_told(tmp_path):
    knowledge = opened(filled("Flat", VECTORS, faiss.METRIC_INNER_PRODUCT), VECTORS, tmp_path)
    longer = filled("Flat", np.concatenate([VECTORS, 9 * QUERIES]), faiss.METRIC_INNER_PRODUCT)
    assert "is not the number" in ids_problem(
        with_ids(faiss.IndexIDMap(faiss.IndexFlatIP(D)), range(7, 7 + ROWS)), ROWS
    )
    knowledge.faiss_index = longer
    with pytest.raises(UserError, match=r"is damaged: it finds passage 30\d, but there are 300"):
        knowledge.search(QUERIES, N_DOCS)


# --- Links ------------------------------------------------------------------------------------------------------------


def change(numbers, at, value) -> None:
    array = faiss.vector_to_array(numbers)
    array[at] = value
    faiss.copy_array_to_vector(array, numbers)


def damaged_graph(part: str, at, value):
    index = filled("HNSW8,Flat", VECTORS, faiss.METRIC_INNER_PRODUCT)
    change(getattr(index.hnsw, part), at, value)
    return index


@pytest.mark.parametrize(
    ("part", "at", "value", "message"),
    [
        ("neighbors", slice(None), ROWS, "links to vectors beyond its 300"),
        ("neighbors", 17, 2**30, "links to vectors beyond"),
        ("neighbors", -1, -2, "links to vectors beyond"),
        ("levels", 3, 0, "levels that it does not have"),
        ("levels", 3, 7, "levels that it does not have|without a place"),
        ("offsets", 5, 3, "not where they should be"),
        ("offsets", 0, 1, "without a place to start"),
        ("cum_nneighbor_per_level", 1, 0, "not where they should be"),
    ],
)
def test_a_graph_that_leads_out_of_itself_is_told(part, at, value, message, tmp_path):
    with pytest.raises(UserError, match=rf"x\.faiss is not a whole FAISS index \(an HNSW graph .*({message})"):
        opened(damaged_graph(part, at, value), VECTORS, tmp_path)


def test_a_link_to_a_vector_that_is_not_on_the_level_is_told(tmp_path):
    index = filled("HNSW8,Flat", VECTORS, faiss.METRIC_INNER_PRODUCT)
    levels, offsets = faiss.vector_to_array(index.hnsw.levels), faiss.vector_to_array(index.hnsw.offsets)
    upper, lowest = np.flatnonzero(levels > 1)[0], np.flatnonzero(levels == 1)[-1]
    change(index.hnsw.neighbors, int(offsets[upper]) + index.hnsw.cum_nb_neighbors(1), lowest)
    with pytest.raises(UserError, match="links to vectors that are not on that level"):
        opened(index, VECTORS, tmp_path)


def test_links_are_looked_at_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(faiss_mapping, "links_problem", lambda *graph: looked.append(1))
    path = tmp_path / "x.faiss"
    faiss.write_index(filled("HNSW8,Flat", VECTORS), str(path))
    for _ in range(3):
        map_index(path)
        monkeypatch.setattr(checksums, "_notes", {})  # another process
    assert looked == [1]
    faiss.write_index(filled("HNSW8,Flat", VECTORS), str(path))
    map_index(path)
    assert looked == [1, 1]


def test_a_file_with_any_byte_changed_is_told_or_searched(tmp_path):
    passages, path = dataset(VECTORS), tmp_path / "x.faiss"
    random = np.random.default_rng(0)
    for factory in ("HNSW8,Flat", "HNSW8,SQ8", "IVF4,Flat", "IVF4,PQ4x4", "Flat"):
        whole = bytes(faiss.serialize_index(filled(factory, VECTORS, faiss.METRIC_INNER_PRODUCT)))
        places = [*range(0, 400, 23), *random.integers(0, len(whole), 10)]
        for place in places:
            data = bytearray(whole)
            data[place] ^= int(random.integers(1, 256))
            path.write_bytes(data)
            try:
                knowledge = KnowledgeIndex(passages, D, index_path=str(path))
                knowledge.init_index()
                _, ids = knowledge.search(QUERIES, N_DOCS)
            except UserError as error:
                assert "--index_path" in str(error) and "\n" not in str(error)
            else:
                assert ids.max() < ROWS


# --- Effort -----------------------------------------------------------------------------------------------------------


def test_more_effort_than_makes_sense_is_refused(tmp_path):
    index = filled("HNSW8,Flat", VECTORS, faiss.METRIC_INNER_PRODUCT)
    assert opened(index, VECTORS, tmp_path, ef_search=ANY_EFFORT).description()["ef_search"] == ANY_EFFORT
    with pytest.raises(UserError, match="--ef_search 1000000000 is more than the index's 300 passages; give fewer"):
        reopened(tmp_path, ef_search=10**9)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat", "SQ8", "SQ4", "HNSW8,SQ8", "IDMap,Flat"])
def test_vectors_of_other_passages_are_found(factory):
    vectors = np.random.default_rng(5).standard_normal((300, 16), dtype=np.float32)
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    rows = np.arange(300)
    if factory.startswith("IDMap"):
        rows = rows[::-1].copy()
        index.add_with_ids(vectors[rows], rows)
    else:
        index.add(vectors)
    assert foreign_row(index, lambda rows: vectors.astype(np.float16)[rows].astype(np.float32)) is None
    assert foreign_row(index, lambda rows: vectors[rows - 1]) == rows[0]
    assert foreign_row(index, lambda rows: 0 * vectors[rows]) is None  # nothing is known of these
    assert foreign_row(index, lambda rows: 7 * vectors[rows]) is None  # the index may be one for cosines
    assert foreign_row(index, lambda rows: np.nan * vectors[rows]) is None


@pytest.mark.parametrize("factory", ["PQ4x4", "PCA8,Flat", "IVF4,Flat", "L2norm,Flat"])
def test_of_vectors_that_are_not_kept_nothing_is_said(factory):
    vectors = np.random.default_rng(5).standard_normal((300, 16), dtype=np.float32)
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    assert foreign_row(index, lambda rows: vectors[rows]) is None


@pytest.mark.parametrize("rows", [slice(None), slice(None, None, -1)])
def test_an_index_of_other_vectors_is_warned_of(tmp_path, caplog, rows):
    index = filled("Flat", VECTORS[rows], faiss.METRIC_INNER_PRODUCT)
    opened(index, VECTORS, tmp_path)
    warned = f"--index_path {tmp_path / 'x.faiss'}: its vector 0 is not the embedding of row 0" in caplog.text
    assert warned == (rows.step == -1)
