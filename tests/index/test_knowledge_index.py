"""Opening, searching and describing a knowledge index, and what is said when its parts do not fit."""

import shutil

import datasets
import faiss
import numpy as np
import pyarrow as pa
import pytest

from rag.errors import UserError
from rag.index.columns import EmbeddingColumn, TextColumn
from rag.index.index_files import (
    DocumentsPart,
    IndexDescription,
    read_description,
    shard_files,
    shard_path,
    write_description,
    write_faiss_index,
)
from rag.index.knowledge_index import KnowledgeIndex
from rag.retrieval.remote import best_of_shards
from tests.conftest import DIMENSION, PASSAGES, assert_equal_but_for_rounding, write_index


@pytest.fixture
def index(knowledge):
    opened = KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], knowledge["index_path"])
    opened.init_index()
    return opened


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fixed_size", [True, False])
def test_embeddings_are_gathered_from_any_arrow_layout(dtype, fixed_size):
    rows = np.random.default_rng(0).standard_normal((10, 4)).astype(dtype)
    value_type = pa.from_numpy_dtype(dtype)
    list_type = pa.list_(value_type, 4) if fixed_size else pa.list_(value_type)
    # Chunks that are themselves slices: what a memory-mapped dataset of several files looks like.
    whole = pa.array(list(rows), type=list_type)
    column = EmbeddingColumn(pa.chunked_array([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3, 7)]), 4)
    assert len(column) == 10
    ids = np.array([[9, 0, -1], [3, 2, 9]])
    gathered = column.gather(ids)
    assert gathered.dtype == np.float32 and gathered.shape == (2, 3, 4)
    np.testing.assert_array_equal(gathered[ids >= 0], rows.astype(np.float32)[ids[ids >= 0]])
    assert (gathered[0, 2] == 0).all()
    np.testing.assert_array_equal(np.concatenate(list(column.blocks(size=2))), rows.astype(np.float32))


def test_search_finds_the_largest_inner_products(index):
    vectors = index.embeddings.gather(np.arange(len(PASSAGES)))
    queries = np.random.default_rng(0).standard_normal((5, DIMENSION)).astype(np.float32)
    scores, ids = index.search(queries, 4)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :4]
    np.testing.assert_array_equal(ids, expected)
    assert_equal_but_for_rounding(scores, np.take_along_axis(queries @ vectors.T, expected, 1))


def test_strings_by_row():
    words = pa.chunked_array([["a", "b"], [], ["", "Ünï"]], type=pa.string())
    assert TextColumn(words).gather(np.array([3, -1, 0, 3, 2])) == ["Ünï", "", "a", "Ünï", ""]


def test_blocks_of_some_rows():
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    whole = pa.array(list(rows), type=pa.list_(pa.float32(), 4))
    column = EmbeddingColumn(pa.chunked_array([whole.slice(0, 3), whole.slice(3, 7)]), 4)
    for some in (range(10), range(2, 9), range(3), range(4, 10), range(3, 3)):
        blocks = list(column.blocks(size=2, rows=some))
        assert all(0 < len(block) <= 2 for block in blocks)
        np.testing.assert_array_equal(np.concatenate([np.zeros((0, 4), np.float32), *blocks]), rows[some])


# --- Shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(knowledge, index, tmp_path) -> dict:
    """The flags of the same passages with an index in three shards."""
    for start, end in [(0, 3), (3, 4), (4, 8)]:
        part = faiss.IndexFlatIP(DIMENSION)
        part.add(index.embeddings.gather(np.arange(start, end)))
        write_faiss_index(part, shard_path(tmp_path, start, end))
    return {"passages_path": knowledge["passages_path"], "index_path": str(tmp_path)}


@pytest.mark.parametrize("n_docs", [1, 4, 8, 10])
def test_a_sharded_index_finds_the_same(index, shards, n_docs):
    queries = np.random.default_rng(0).standard_normal((5, DIMENSION)).astype(np.float32)
    scores, ids = index.search(queries, n_docs)
    together = KnowledgeIndex.load_from_disk(DIMENSION, **shards)
    together.init_index()
    assert together.description() == {"kind": "IndexFlatIP", "passages": 8, "dimension": DIMENSION, "shards": 3}
    found_scores, found_ids = together.search(queries, n_docs)
    np.testing.assert_array_equal(found_ids, ids)
    present = ids >= 0
    np.testing.assert_array_equal(found_scores[~present], scores[~present])  # the least number there is
    assert_equal_but_for_rounding(found_scores[present], scores[present])

    answers = []
    for number in range(together.num_shards):
        one = KnowledgeIndex.load_from_disk(DIMENSION, **shards)
        one.init_index(shard=number)
        answers.append(one.search(queries, n_docs))
    np.testing.assert_array_equal(best_of_shards(answers, n_docs), ids)


def test_shards_that_do_not_belong_together_are_refused(shards, tmp_path):
    first, second, last = [path for path, _, _ in shard_files(tmp_path)]

    def message() -> str:
        with pytest.raises(UserError) as error:
            KnowledgeIndex.load_from_disk(DIMENSION, **shards).init_index()
        return str(error.value)

    moved = second.rename(tmp_path / "elsewhere.faiss")
    assert f"--index_path {tmp_path}: its shards do not hold row 3 exactly once" in message()
    moved.rename(second)
    again = shard_path(tmp_path, 2, 4)
    again.write_bytes(second.read_bytes())
    assert "row 2 exactly once" in message()
    again.unlink()
    longer = last.rename(shard_path(tmp_path, 4, 9))
    assert "holds 9 vectors, but there are 8 passages" in message()
    longer.rename(last)
    last.write_bytes(first.read_bytes())
    assert f"{last} holds 3 vectors, but there are 4 passages" in message()


# --- Settings and faults ----------------------------------------------------------------------------------------------


def test_documents_of_missing_ids_are_empty(index):
    vectors = index.embeddings.gather
    assert index.get_doc_dicts(np.array([[1, -1], [1, 0]])) == [
        {"title": ["london", ""], "text": [PASSAGES[1][1], ""], "embeddings": vectors(np.array([1, -1]))},
        {
            "title": ["london", "paris"],
            "text": [PASSAGES[1][1], PASSAGES[0][1]],
            "embeddings": vectors(np.array([1, 0])),
        },
    ]
    empty = {"title": [""], "text": [""], "embeddings": np.zeros((1, DIMENSION), np.float32)}
    assert index.get_doc_dicts(np.array([[-1]])) == [empty]


def test_settings_name_kind_and_effort(index):
    assert index.description() == {"kind": "IndexHNSWFlat", "passages": 8, "dimension": DIMENSION, "ef_search": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passages_path": "nowhere"}, "--passages_path nowhere is not a folder of passages; build it with"),
        ({"passages_path": None}, "--passages_path None is not"),
        ({"index_path": "nowhere.faiss"}, "--index_path nowhere.faiss is not a FAISS index file"),
        ({"vector_size": 7}, "have dimension 16, but the question encoder gives 7"),
    ],
)
def test_what_does_not_fit_is_named(knowledge, change, message):
    arguments = {"vector_size": DIMENSION, **knowledge, **change}
    del arguments["index_name"]
    with pytest.raises(UserError, match=message):
        KnowledgeIndex.load_from_disk(**arguments)


def test_the_folder_around_passages_and_index_is_told_from_them(knowledge, tmp_path):
    shutil.copytree(knowledge["passages_path"], tmp_path / "my_knowledge_dataset")
    shutil.copy(knowledge["index_path"], tmp_path / "my_index.faiss")
    with pytest.raises(UserError, match=rf"but {tmp_path}/my_knowledge_dataset is; give that"):
        KnowledgeIndex.load_from_disk(DIMENSION, tmp_path, knowledge["index_path"])
    with pytest.raises(UserError, match=rf"nor a folder of shards; give {tmp_path}/my_index.faiss, which is in it"):
        KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], tmp_path)


def test_an_index_of_other_passages_is_refused(knowledge, tmp_path):
    for rows, dimension, message in [(5, DIMENSION, "holds 5 vectors, but"), (8, 3, "has dimension 3, but")]:
        path = tmp_path / f"{rows}.faiss"
        write_index("HNSW4,Flat", np.ones((rows, dimension), np.float32), path)
        index = KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], path)
        with pytest.raises(UserError, match=message):
            index.init_index()


def test_a_half_written_index_is_refused(knowledge, tmp_path):
    path = tmp_path / "half.faiss"
    with open(knowledge["index_path"], "rb") as whole:
        path.write_bytes(whole.read()[:300])
    with pytest.raises(UserError, match="is not a whole FAISS index"):
        KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], path).init_index()


def test_passages_without_embeddings_are_refused(tmp_path):
    datasets.Dataset.from_dict({"title": ["a"], "text": ["b"]}).save_to_disk(tmp_path / "passages")
    (tmp_path / "i.faiss").touch()
    with pytest.raises(UserError, match=r"lack the column\(s\) embeddings"):
        KnowledgeIndex.load_from_disk(4, tmp_path / "passages", tmp_path / "i.faiss")


def test_a_failed_write_leaves_the_old_index(tmp_path):
    path = tmp_path / "i.faiss"
    write_faiss_index(faiss.IndexFlatIP(3), path)
    with pytest.raises(TypeError):
        write_faiss_index("not an index", path)
    assert faiss.read_index(str(path)).d == 3
    assert list(tmp_path.iterdir()) == [path]


def test_description_beside_the_index(tmp_path):
    assert read_description(tmp_path / "i.faiss") == IndexDescription()
    part = DocumentsPart("d.tsv", "0123", drop_duplicates=False, documents=2, passages=3)
    description = IndexDescription(dimension=3, normalize=False, parts=[part], recall=[{"recall": 1.0}])
    write_description(tmp_path, description)
    assert read_description(tmp_path / "i.faiss") == description
    (tmp_path / "index.json").write_text('{"dimension": 3, "of_a_later_version": 1}')
    assert read_description(tmp_path / "i.faiss") == IndexDescription(dimension=3)
