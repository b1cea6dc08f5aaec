"""What code written for the public suite and for transformers' retriever relies on: columns, types, copies, files."""

import copy
import json
import pickle

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import RagRetriever, RagSequenceForGeneration
from transformers.models.rag.retrieval_rag import CustomHFIndex

from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
from distributed_ray_retriever import RagRayDistributedRetriever, RayRetriever
from rag.files import write_lines
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.passage_rows import PassageRows
from rag.index.wiki_dpr import choose_encoding
from rag.retrieval.actor import index_config
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION
from tests.retrieval.test_distributed_pytorch_retriever import config, legacy_config, rag_config, sharded_config  # noqa: F401

# The second passage is twice the first: it is the nearest of a positive query, the first one of a negative query.
QUERIES = np.stack([np.ones(DIMENSION), -np.ones(DIMENSION)]).astype(np.float32)
COLUMNS = ["embeddings", "id", "number", "text", "title"]


def two_passages() -> Dataset:
    """With more columns than the generator reads, and an index over them."""
    dataset = Dataset.from_dict(
        {
            "id": ["p0", "p1"],
            "text": ["one", "two"],
            "title": ["One", "Two"],
            "number": [10, 20],
            "embeddings": [np.ones(DIMENSION), 2 * np.ones(DIMENSION)],
        }
    )
    dataset.add_faiss_index("embeddings", string_factory="Flat", metric_type=faiss.METRIC_INNER_PRODUCT)
    return dataset


@pytest.fixture
def on_disk(tmp_path) -> dict:
    """The same in files: the flags that open them."""
    dataset = two_passages()
    dataset.get_index("embeddings").save(str(tmp_path / "index.faiss"))
    dataset.drop_index("embeddings")
    dataset.save_to_disk(tmp_path / "passages")
    return {
        "index_name": "custom",
        "passages_path": str(tmp_path / "passages"),
        "index_path": str(tmp_path / "index.faiss"),
    }


def public_index(flags: dict) -> CustomHFIndex:
    return CustomHFIndex.load_from_disk(DIMENSION, flags["passages_path"], flags["index_path"])


def check(retriever, n_docs: int = 1) -> None:
    """What the public suite's and transformers' tests check of every retriever."""
    embeds, doc_ids, docs = retriever.retrieve(QUERIES, n_docs=n_docs)
    assert embeds.shape == (2, n_docs, DIMENSION) and len(docs) == 2
    assert sorted(docs[0]) == COLUMNS and len(docs[0]["id"]) == n_docs
    assert [doc["id"][0] for doc in docs] == ["p1", "p0"] and doc_ids[:, 0].tolist() == [1, 0]
    np.testing.assert_array_equal(np.stack([doc["embeddings"] for doc in docs]), embeds)


# --- Columns ----------------------------------------------------------------------------------------------------------


def test_doc_dicts_have_every_column_of_the_passages(on_disk):
    retriever = RagKnowledgeRetriever(rag_config(**on_disk), None, None)
    check(retriever)
    check(retriever, n_docs=2)
    theirs = RagRetriever(rag_config(**on_disk), None, None)
    assert retriever.retrieve(QUERIES, 2)[2] == theirs.retrieve(QUERIES, 2)[2]


def test_a_column_is_read_when_it_is_asked_for(monkeypatch):
    rows = PassageRows(two_passages())
    read = []
    monkeypatch.setattr(rows, "_read", lambda numbers, name: read.append(name) or [name] * len(numbers))
    [doc] = rows.doc_dicts([[1, 0]], rows.names)
    assert doc["title"] == ["Two", "One"] and doc["text"] == ["two", "one"]
    assert len(doc) == 5 and set(doc) == set(COLUMNS) == set(doc.keys()) and "id" in doc and "none" not in doc
    assert read == []
    assert doc["id"] == doc["id"] == ["id", "id"] and read == ["id"]


def document() -> dict:
    rows = PassageRows(two_passages())
    return rows.doc_dicts([[1, -1]], rows.names)[0]


def test_a_doc_dict_is_a_dict():
    plain = {
        "id": ["p1", ""],
        "text": ["two", ""],
        "title": ["Two", ""],
        "number": [20, None],
        "embeddings": np.stack([2 * np.ones(DIMENSION), np.zeros(DIMENSION)]).astype(np.float32),
    }
    assert isinstance(document(), dict) and list(document()) == list(plain) and list(reversed(document()))
    assert document() == plain and plain == document() and document() == document()
    other = plain | {"embeddings": 1 - plain["embeddings"]}
    assert document() != other and other != document() and document() != {"id": ["p1", ""]} and document() != 1
    for made in (
        dict(document()),
        {**document()},
        document().copy(),
        copy.copy(document()),
        copy.deepcopy(document()),
        pickle.loads(pickle.dumps(document())),
        dict(document().items()),
        dict(zip(document(), document().values(), strict=True)),
    ):
        assert type(made) is dict and document() == made
    assert (document() | {"more": 1})["id"] == ({"more": 1} | document())["id"] == ["p1", ""]
    changed = document()
    changed |= {"more": 1}
    assert changed.pop("id") == ["p1", ""] and changed.get("number") == [20, None] and changed.get("id") is None
    assert changed.setdefault("title") == ["Two", ""] and sorted(changed)[-1] == "title" and changed["more"] == 1
    assert "p1" in repr(document())
    with pytest.raises(KeyError):
        document()["none"]


@pytest.mark.parametrize("as_ids", [np.array, torch.tensor, list], ids=["array", "tensor", "lists"])
def test_ids_of_any_type(as_ids, on_disk, request):
    index = RagKnowledgeRetriever(rag_config(**on_disk), None, None).index
    assert [doc["title"] for doc in index.get_doc_dicts(as_ids([[1, 0], [0, -1]]))] == [["Two", "One"], ["One", ""]]
    legacy = RagKnowledgeRetriever(request.getfixturevalue("legacy_config"), None, None).index
    some = [legacy.passage_ids[:2].tolist()]
    expected = legacy.get_doc_dicts(np.array(some))
    assert legacy.get_doc_dicts(as_ids(some)) == expected and list(expected[0]) == ["title", "text"]


def test_the_dataset_gives_rows_with_every_column(on_disk):
    for retriever in (
        RagKnowledgeRetriever(rag_config(**on_disk), None, None),
        RagRetriever(rag_config(**on_disk), None, None),
    ):
        dataset = retriever.index.dataset
        assert len(dataset) == 2 and dataset[1]["text"] == "two" and sorted(dataset[0]) == COLUMNS
        assert dataset[[1, 0]]["id"] == ["p1", "p0"] and dataset[0]["embeddings"].dtype == np.float32


# --- Calls ------------------------------------------------------------------------------------------------------------


def test_a_call_gives_the_types_that_are_asked_for(on_disk, bert_tokenizer, bart_tokenizer):
    given = rag_config(**on_disk)
    ours, theirs = (kind(given, bert_tokenizer, bart_tokenizer) for kind in (RagKnowledgeRetriever, RagRetriever))
    questions = [[5, 7], [10, 11]]
    for return_tensors, kind in [(None, list), ("np", np.ndarray), ("pt", torch.Tensor)]:
        for ids in (questions, np.array(questions), torch.tensor(questions)):
            given = ours(ids, QUERIES, n_docs=1, return_tensors=return_tensors)
            expected = theirs(ids, QUERIES, n_docs=1, return_tensors=return_tensors)
            assert given.keys() == expected.keys()
            for name, value in given.items():
                assert type(value) is type(expected[name]), name
            assert isinstance(given["context_input_ids"], kind) and isinstance(given["context_attention_mask"], kind)
            assert given["retrieved_doc_embeds"].shape == (2, 1, DIMENSION)
            length = len(given["context_input_ids"][0])
            for row, wanted in zip(given["context_input_ids"], expected["context_input_ids"], strict=True):
                assert list(row) == list(wanted[:length])
    with pytest.raises(ValueError, match="return_tensors 'tf'"):
        ours(questions, QUERIES, n_docs=1, return_tensors="tf")


def test_a_call_tokenizes_the_passages_for_a_context_encoder(on_disk, bert_tokenizer, bart_tokenizer):
    retriever = RagKnowledgeRetriever(rag_config(**on_disk), bert_tokenizer, bart_tokenizer)
    retriever.set_ctx_encoder_tokenizer(bert_tokenizer)
    out = retriever([[5, 7], [10, 11]], QUERIES, n_docs=1)
    assert len(out) == 6 and {"tokenized_doc_ids", "tokenized_doc_attention_mask"} <= out.keys()


def test_the_public_suites_search_by_parts_finds_the_same(on_disk):
    retriever = RagKnowledgeRetriever(rag_config(**on_disk, retrieval_batch_size=1), None, None)
    doc_ids, vectors = retriever._main_retrieve(QUERIES, 2)
    for one, two in zip((vectors, doc_ids), retriever.retrieve(QUERIES, 2), strict=False):
        np.testing.assert_array_equal(one, two)


# --- Saving and copying -----------------------------------------------------------------------------------------------


def test_an_index_in_memory_is_saved_beside_the_checkpoint(on_disk, bert_tokenizer, bart_tokenizer, tmp_path):
    folders = [tmp_path / name for name in ("empty", "first", "second")]
    RagKnowledgeRetriever(rag_config(**on_disk), bert_tokenizer, bart_tokenizer).save_pretrained(folders[0])
    retriever = RagKnowledgeRetriever.from_pretrained(folders[0], indexed_dataset=two_passages())
    for folder in (*folders[1:], folders[1]):  # each has its own; what is there is replaced
        retriever.save_pretrained(folder)
        assert retriever.config.passages_path == str(folder / "hf_dataset")
    for kind in (RagKnowledgeRetriever, RagPyTorchDistributedRetriever, RagRetriever):
        again = kind.from_pretrained(folders[2])
        again.init_retrieval()
        check(again)
        assert again.config.index_path == str(folders[2] / "hf_dataset_index.faiss")
    # What is in files stays there.
    retriever = RagKnowledgeRetriever.from_pretrained(folders[1])
    retriever.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "hf_dataset").exists()
    check(RagKnowledgeRetriever.from_pretrained(tmp_path / "third"))
    # transformers' own index in memory, too.
    theirs = CustomHFIndex(DIMENSION, two_passages())
    in_memory = rag_config(index_name="custom")
    RagKnowledgeRetriever(in_memory, bert_tokenizer, bart_tokenizer, index=theirs).save_pretrained(tmp_path / "third")
    check(RagKnowledgeRetriever.from_pretrained(tmp_path / "third"))


@pytest.fixture(params=["custom", "sharded_config", "legacy_config", "bm25", "hybrid", "given"])
def some_config(request, on_disk, tmp_path):
    """Indexes of each kind whose parts are in files."""
    if request.param == "custom":
        return rag_config(**on_disk)
    if request.param == "hybrid":
        return rag_config(**on_disk | {"index_name": "hybrid"})
    if request.param == "bm25":
        return rag_config(index_name="bm25", passages_path=on_disk["passages_path"])
    if request.param == "given":
        found = [{"question": name, "titles": [name], "texts": ["x"], "scores": [1]} for name in ("one", "two")]
        write_lines(map(json.dumps, found), tmp_path / "found.jsonl")
        return rag_config(index_name="given", passages_file=str(tmp_path / "found.jsonl"))
    return request.getfixturevalue(request.param)


def answers(retriever) -> tuple:
    index = retriever.index
    parts = [QUERIES] if index.reads_vectors else []
    parts += [index.encode_questions(["two", "one"][: len(QUERIES)])] if index.reads_text else []
    return retriever.retrieve(np.concatenate(parts, axis=1), 2)


def same(one: tuple, two: tuple) -> None:
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert one[2] == two[2]


def test_copies_share_what_is_open(some_config):
    retriever = RagKnowledgeRetriever(some_config, None, None)
    expected = answers(retriever)
    for copied in (copy.deepcopy(retriever), copy.copy(retriever)):
        assert copied.index.faiss_index is retriever.index.faiss_index
        assert copied.index.embeddings is retriever.index.embeddings
        same(answers(copied), expected)
    assert copy.deepcopy(retriever).config is not retriever.config
    closed = RagKnowledgeRetriever(some_config, None, None, init_retrieval=False)
    copied = copy.deepcopy(closed)
    copied.init_retrieval()
    assert not closed.index.is_initialized()
    same(answers(copied), expected)


def test_a_pickle_opens_the_files_again(some_config):
    retriever = RagKnowledgeRetriever(some_config, None, None)
    expected = answers(retriever)
    same(answers(pickle.loads(pickle.dumps(retriever))), expected)
    closed = pickle.loads(pickle.dumps(RagKnowledgeRetriever(some_config, None, None, init_retrieval=False)))
    assert not closed.index.is_initialized()
    closed.init_retrieval()
    same(answers(closed), expected)


def test_a_pickle_of_a_shard_opens_that_shard(request):
    sharded = request.getfixturevalue("sharded_config")
    index = RagKnowledgeRetriever(sharded, None, None, init_retrieval=False).index
    index.init_index(shard=1)
    again = pickle.loads(pickle.dumps(index))
    assert again.rows == index.rows != range(len(index))
    np.testing.assert_array_equal(again.search(QUERIES, 1)[1], index.search(QUERIES, 1)[1])


def test_an_index_in_memory_travels_with_its_pickle():
    retriever = RagKnowledgeRetriever(
        rag_config(index_name="custom"), None, None, index=KnowledgeIndex.from_dataset(two_passages(), DIMENSION)
    )
    check(pickle.loads(pickle.dumps(retriever)))
    check(copy.deepcopy(retriever))


def test_files_are_neither_pickled_nor_read_into_memory(tmp_path):
    rows, long = 2_000, "word " * 2_000
    dataset = Dataset.from_dict(
        {"title": ["t"] * rows, "text": [long] * rows, "embeddings": np.ones((rows, DIMENSION), dtype=np.float32)}
    )
    dataset.save_to_disk(tmp_path / "passages")
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(np.ones((rows, DIMENSION), dtype=np.float32))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    opened = KnowledgeIndex.load_from_disk(DIMENSION, tmp_path / "passages", tmp_path / "index.faiss")
    opened.init_index()
    opened.get_doc_dicts(opened.get_top_docs(QUERIES, 2)[0])
    pickled = pickle.dumps(opened)
    assert len(pickled) < 20_000 < rows * DIMENSION
    assert pickle.loads(pickled).get_doc_dicts([[0]])[0]["text"] == [long]


@pytest.mark.parametrize("kind", [RagKnowledgeRetriever, RagPyTorchDistributedRetriever])
def test_models_take_a_retriever_that_has_searched(kind, checkpoint, knowledge):
    folder = checkpoint("rag_sequence")
    retriever = kind.from_pretrained(folder, **knowledge)
    retriever.init_retrieval()
    retriever.retrieve(QUERIES, 1)
    for _ in range(2):
        model = RagSequenceForGeneration.from_pretrained(folder, retriever=retriever)
        assert model.rag.retriever.index.faiss_index is retriever.index.faiss_index
        answer = model.generate(torch.tensor([[2, 5, 6, 3]]), num_beams=1, max_new_tokens=3)
        assert answer.shape[0] == 1


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_without_workers_the_search_runs_in_this_process(on_disk, checkpoint):
    ray = pytest.importorskip("ray")
    for index in (None, public_index(on_disk), CustomHFIndex(DIMENSION, two_passages())):
        retriever = RagRayDistributedRetriever(rag_config(**on_disk), None, None, [], index=index)
        retriever.init_retrieval()
        retriever.init_retrieval()
        check(retriever)
        assert copy.deepcopy(retriever) is retriever
    check(RagRayDistributedRetriever.from_pretrained(checkpoint("rag_sequence"), [], two_passages()))
    assert not ray.is_initialized()


def test_an_actor_gives_embeddings(on_disk):
    actor = RayRetriever()
    actor.create_rag_retriever(index_config(rag_config(**on_disk)), None, None, None)
    actor.init_retrieval()
    doc_ids, embeds = actor.retrieve(QUERIES, 2)
    expected = RagKnowledgeRetriever(rag_config(**on_disk), None, None).retrieve(QUERIES, 2)
    np.testing.assert_array_equal(doc_ids, expected[1])
    np.testing.assert_array_equal(embeds, expected[0])
    # The suite's own ranks read them from the passages.
    assert actor.search(QUERIES.tobytes(), DIMENSION, 2)[2] is None


def test_an_actor_knows_the_question_encoders_name():
    named = rag_config(index_name="exact")
    named.question_encoder.name_or_path = "facebook/dpr-question_encoder-multiset-base"
    assert choose_encoding(index_config(named)) == choose_encoding(named) == "multiset"
