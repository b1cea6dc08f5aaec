"""Passages of other people's making and damaged ones: read rightly, or told in one line when they are opened."""

import shutil

import datasets
import faiss
import numpy as np
import pyarrow as pa
import pytest

from rag.errors import UserError
from rag.index import passage_checks
from rag.index.columns import EmbeddingColumn, TextColumn, equally_long
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.passage_checks import open_passages

ROWS, D = 30, 4
VECTORS = np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32)
LISTS = VECTORS.tolist()


def columns(**changes) -> dict:
    titles = pa.array([f"title {row}" for row in range(ROWS)])
    return {"title": titles, "text": titles, "embeddings": pa.array(LISTS, pa.list_(pa.float32()))} | changes


@pytest.fixture
def open_changed(tmp_path):
    """Open passages with columns of these values, over an index of the vectors."""

    def save_and_open(**changes) -> KnowledgeIndex:
        datasets.Dataset(pa.table(columns(**changes))).save_to_disk(tmp_path / "kb")
        return reopen(tmp_path)

    index = faiss.IndexFlatIP(D)
    index.add(VECTORS)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    return save_and_open


def reopen(tmp_path) -> KnowledgeIndex:
    knowledge = KnowledgeIndex.load_from_disk(D, tmp_path / "kb", tmp_path / "x.faiss")
    knowledge.init_index()
    return knowledge


def changed(row: int, value) -> list:
    return [*LISTS[:row], value, *LISTS[row + 1 :]]


# --- Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float16()), pa.list_(pa.float32(), D),
        pa.list_(pa.float64(), D), pa.large_list(pa.float32()),
    ],
    ids=str,
)  # fmt: skip
def test_vectors_of_any_layout_are_read(kind, open_changed):
    values = VECTORS.astype(np.float16).tolist()
    lists = values if "half" not in str(kind) else [list(map(np.float16, row)) for row in values]
    knowledge = open_changed(embeddings=pa.array(lists, kind))
    _, vectors = knowledge.get_top_docs(VECTORS[:3], 2)
    ids, _ = knowledge.get_top_docs(VECTORS[:3], 2)
    np.testing.assert_array_equal(vectors, VECTORS.astype(np.float16).astype(np.float32)[ids])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_of_any_layout_are_read(kind):
    texts = pa.array(["", "Ünï", "b", "Ünï"]).cast(kind)
    column = TextColumn(pa.chunked_array([texts.slice(0, 1), texts.slice(1, 3)]))
    assert column.gather(np.array([3, -1, 0, 2])) == ["Ünï", "", "", "b"]


def test_a_missing_title_is_an_empty_one(open_changed, tmp_path):
    titles = [None] + [f"title {row}" for row in range(1, ROWS)]
    docs = open_changed(title=pa.array(titles)).get_doc_dicts(np.array([[0, 1]]))
    assert docs[0]["title"] == ["", "title 1"]
    shutil.rmtree(tmp_path / "kb")
    docs = open_changed(title=pa.nulls(ROWS)).get_doc_dicts(np.array([[0, 1]]))
    assert docs[0]["title"] == ["", ""] and docs[0]["text"] == ["title 0", "title 1"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("title", pa.array(range(ROWS)), "the column title holds int64, not text"),
        ("title", pa.array([["a"]] * ROWS), "the column title holds list<.*, not text"),
        ("text", pa.array([b"a"] * ROWS), "the column text holds binary, not text"),
        ("text", pa.nulls(ROWS), r"row 0 has no text \(null, as 30 rows have\)"),
        ("text", pa.array(["a"] * 7 + [None] * 2 + ["a"] * 21), r"row 7 has no text \(null, as 2 rows have\)"),
        ("embeddings", pa.array(["[1.0]"] * ROWS), "the column embeddings holds string, not lists of numbers"),
        ("embeddings", pa.array([["1"]] * ROWS), "the column embeddings holds list<.*string.*, not lists of numbers"),
        ("embeddings", pa.array([1.0] * ROWS), "the column embeddings holds double, not lists of numbers"),
        ("embeddings", pa.nulls(ROWS), "the column embeddings holds null, not lists of numbers"),
        ("embeddings", pa.array(changed(5, None)), r"row 5 has no embeddings \(null, as 1 rows have\)"),
        ("embeddings", pa.array(changed(5, [1.0, None, 2.0, 3.0])), "the embedding of row 5 has a number missing"),
        ("embeddings", pa.array(changed(5, [1.0] * 3)), "the embedding of row 5 has 3 numbers, not 4"),
        ("embeddings", pa.array([*LISTS[:3], [1.0] * 3, [1.0] * 5, *LISTS[5:]]), "row 3 has 3 numbers, not 4"),
        ("embeddings", pa.array([[1.0] * 6] * ROWS), "have dimension 6, but the question encoder gives 4"),
        ("embeddings", pa.array(changed(9, [np.nan] * D)), "the embedding of row 9 holds NaN or infinity"),
        ("embeddings", pa.array(changed(9, [1.0, np.inf, 0.0, 0.0])), "the embedding of row 9 holds NaN or infinity"),
        ("embeddings", pa.array(changed(9, [1e300] * D)), "the embedding of row 9 holds NaN or infinity"),
    ],
)
def test_what_is_wrong_with_a_column_is_told_when_it_is_opened(open_changed, tmp_path, name, values, message):
    with pytest.raises(UserError, match=rf"^--passages_path {tmp_path}/kb: .*{message}") as error:
        open_changed(**{name: values})
    assert "\n" not in str(error.value)


def test_of_many_rows_some_are_looked_at_and_a_retrieval_tells_of_the_others(open_changed, monkeypatch):
    monkeypatch.setattr(passage_checks, "FEW_ROWS", 10)
    monkeypatch.setattr(passage_checks, "SOME_ROWS", 4)
    with pytest.raises(UserError, match="row 29 holds NaN"):
        open_changed(embeddings=pa.array(changed(29, [np.nan] * D)))


def test_a_passage_of_nan_that_is_retrieved_is_told(open_changed, monkeypatch, question_encoder, bert_tokenizer):
    from rag.retrieval.retriever import RagKnowledgeRetriever

    monkeypatch.setattr(passage_checks, "FEW_ROWS", 10)
    monkeypatch.setattr(passage_checks, "SOME_ROWS", 4)
    knowledge = open_changed(embeddings=pa.array(changed(8, [np.nan] * D)))
    retriever = object.__new__(RagKnowledgeRetriever)
    retriever.index = knowledge
    others = [row for row in range(ROWS) if row != 8]
    assert retriever.retrieve(VECTORS[others[:2]], 1)[0].shape == (2, 1, D)
    with pytest.raises(UserError, match="the embedding of row 8 holds NaN or infinity; embed the passages again"):
        retriever.retrieve(VECTORS[8:9] * 9, ROWS)
    with pytest.raises(UserError, match="row 8 holds NaN"):
        KnowledgeIndex(knowledge.dataset, D, index_path=knowledge.index_path, device="cpu").init_index()


def test_equal_lengths():
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    assert equally_long([unit[:3], unit[3:]]) and equally_long([unit.astype(np.float16).astype(np.float32)])
    assert not equally_long([unit[:3], 1.01 * unit[3:]])
    assert not equally_long([np.full((2, D), np.nan, np.float32)])


# --- Damage -----------------------------------------------------------------------------------------------------------

ARROW = "data-00000-of-00001.arrow"


def damage(tmp_path, name: str, content) -> None:
    file = tmp_path / "kb" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ARROW, lambda data: data[: len(data) // 2]), (ARROW, b"\xff" * 1000), (ARROW, b""), (ARROW, None),
        ("state.json", None), ("state.json", b"{"), ("state.json", b"[]"), ("state.json", b"{}"),
        ("state.json", b"\xff"), ("dataset_info.json", None),
        ("dataset_info.json", b"{"), ("dataset_info.json", b"[]"),
        ("dataset_info.json", b'{"features": 3}'), ("dataset_info.json", b'{"features": {"title": {"_type": "X"}}}'),
        ("state.json", b'{"_data_files": [{"filename": "../none.arrow"}]}'), ("state.json", b"[" * 10**5),
    ],
)  # fmt: skip
def test_a_damaged_dataset_is_told_in_one_line(open_changed, tmp_path, name, content):
    open_changed()
    damage(tmp_path, name, content)
    with pytest.raises(UserError, match=f"^--passages_path {tmp_path}/kb is not a folder of passages, or is damaged"):
        reopen(tmp_path)
    with pytest.raises(UserError, match=r"^--output_dir ") as error:
        open_passages(tmp_path / "kb", "--output_dir")
    assert "\n" not in str(error.value)


def test_a_folder_of_several_splits_is_told(tmp_path):
    part = datasets.Dataset.from_dict({"title": ["a"], "text": ["b"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "kb")
    with pytest.raises(UserError, match=r"holds several splits \(train, test\); give the folder of one"):
        open_passages(tmp_path / "kb")


def test_passages_with_any_byte_changed_are_told_or_read(open_changed, tmp_path):
    open_changed()
    whole = (tmp_path / "kb" / ARROW).read_bytes()
    random = np.random.default_rng(0)
    told = 0
    for place in [*range(0, len(whole), 11)]:
        data = bytearray(whole)
        data[place] ^= int(random.integers(1, 256))
        damage(tmp_path, ARROW, bytes(data))
        try:
            knowledge = reopen(tmp_path)
            ids, vectors = knowledge.get_top_docs(VECTORS, 5)
            docs = knowledge.get_doc_dicts(ids)
            assert np.isfinite(vectors).all() and all(isinstance(title, str) for title in docs[0]["title"])
        except UserError as error:
            told += 1
            assert "--passages_path" in str(error) and "\n" not in str(error)
    assert told > 10


def test_offsets_that_lead_anywhere_are_told(tmp_path):
    buffers = [None, pa.py_buffer(np.array([0, 2, 1, 4], np.int32)), pa.py_buffer(b"abcd")]
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    with pytest.raises(UserError, match=r"^--passages_path kb: rows 0 to 2 are damaged \(a string ends before it"):
        TextColumn(pa.chunked_array([texts]), "--passages_path kb").gather(np.array([0]))
    buffers = [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
    texts = TextColumn(pa.chunked_array([pa.Array.from_buffers(pa.string(), 3, buffers)]))
    assert texts.gather(np.array([0, 2])) == ["a", "c"]
    with pytest.raises(UserError, match="row 1 is not UTF-8"):
        texts.gather(np.array([1]))
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4]), pa.array([1.0] * 4))
    assert len(EmbeddingColumn(pa.chunked_array([lists]), 2)) == 2
