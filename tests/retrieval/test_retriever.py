"""The retriever against transformers' own over the same passages and weights."""

import copy

import datasets
import faiss
import numpy as np
import pytest
import torch
from transformers import RagRetriever

from rag.errors import UserError
from rag.index.knowledge_index import KnowledgeIndex
from rag.models.checkpoints import load_tokenizer
from rag.models.tokens import encode_in_threads
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import DIMENSION, PASSAGES, QUESTIONS, assert_equal_but_for_rounding, in_float64


@pytest.fixture(scope="module")
def questions(bert_tokenizer):
    return bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def vectors(rag_sequence, questions):
    with torch.no_grad():
        return rag_sequence.rag.question_encoder(**questions)[0].numpy()


@pytest.fixture(scope="module")
def slow_retriever(rag_sequence, retriever):
    """transformers' retriever on the very same files."""
    return RagRetriever(rag_sequence.config, retriever.question_encoder_tokenizer, retriever.generator_tokenizer)


def test_retrieve_equals_transformers(retriever, slow_retriever, vectors):
    embeds, ids, docs = retriever.retrieve(vectors, n_docs=3)
    slow_embeds, slow_ids, slow_docs = slow_retriever.retrieve(vectors, n_docs=3)
    assert embeds.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_array_equal(ids, slow_ids)
    np.testing.assert_array_equal(embeds, slow_embeds)
    for doc, slow_doc in zip(docs, slow_docs, strict=True):
        assert doc == slow_doc and slow_doc["embeddings"].dtype == doc["embeddings"].dtype


def test_contexts_equal_transformers_but_for_the_padding(retriever, slow_retriever, questions, vectors):
    fast = retriever(questions.input_ids, vectors, n_docs=3, return_tensors="pt")
    slow = slow_retriever(questions.input_ids, vectors, n_docs=3, return_tensors="pt")
    length = fast.context_input_ids.shape[1]
    assert length % 8 == 0 and length < slow.context_input_ids.shape[1]
    assert torch.equal(fast.context_input_ids, slow.context_input_ids[:, :length])
    assert torch.equal(fast.context_attention_mask, slow.context_attention_mask[:, :length])
    assert slow.context_attention_mask[:, length:].sum() == 0


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("max_combined_length", [300, 28, 12, 9, 5])
def test_a_context_that_is_too_long_loses_its_passage_and_never_its_question(
    max_combined_length, is_fast, retriever, slow_retriever, questions, vectors, monkeypatch
):
    monkeypatch.setattr(type(retriever.generator_tokenizer), "is_fast", is_fast)
    docs = retriever.retrieve(vectors, n_docs=3)[2]
    texts = retriever.question_encoder_tokenizer.batch_decode(questions.input_ids, skip_special_tokens=True)
    slow_retriever.config.max_combined_length = 300
    whole, mask = slow_retriever.postprocess_docs(docs, texts, "", 3, return_tensors="pt")
    lengths = mask.sum(1).tolist()
    monkeypatch.setattr(retriever.config, "max_combined_length", max_combined_length)
    made, cut = retriever.contexts, retriever.cut_contexts
    input_ids, mask = retriever.postprocess_docs(docs, texts, "", 3, return_tensors="pt")
    assert retriever.contexts - made == len(lengths)
    assert retriever.cut_contexts - cut == sum(length > max_combined_length for length in lengths)
    for row, (ids, length) in enumerate(zip(whole.tolist(), lengths, strict=True)):
        tail = retriever.generator_tokenizer("// " + texts[row // 3], add_special_tokens=False)["input_ids"]
        body = ids[1 : length - 1]
        assert body[-len(tail) :] == tail
        if length > max_combined_length:
            room = max_combined_length - 2
            body = (body[: max(0, room - len(tail))] + tail)[:room]
        assert input_ids[row][mask[row].bool()].tolist() == [ids[0], *body, ids[length - 1]]


def test_contexts_end_where_the_generator_can_read_no_further(retriever, monkeypatch):
    monkeypatch.setattr(retriever.config, "max_combined_length", 10**6)
    docs = [{"title": ["oslo"], "text": ["the castle " * 300]}]
    input_ids, mask = retriever.postprocess_docs(docs, ["where is oslo"], "", 1, return_tensors="pt")
    assert input_ids.shape == (1, 128) and mask.all()
    assert retriever.generator_tokenizer.decode(input_ids[0, -5:]) == "<unk> where is oslo </s>"


def test_a_tokenizer_without_a_fast_backend_makes_the_same_contexts(retriever, vectors, monkeypatch):
    docs = retriever.retrieve(vectors, n_docs=3)[2]
    arguments = (docs, [question for question, _ in QUESTIONS], "prefix ", 3)
    fast, mask = retriever.postprocess_docs(*arguments, return_tensors="pt")
    monkeypatch.setattr(type(retriever.generator_tokenizer), "is_fast", False)
    slow, slow_mask = retriever.postprocess_docs(*arguments, return_tensors="np")
    assert isinstance(slow, np.ndarray) and (fast.numpy() == slow).all() and (mask.numpy() == slow_mask).all()


@pytest.mark.parametrize("threads", [0, 1, 3, 50])
def test_threads_read_texts_in_order(retriever, threads):
    tokenizer = retriever.generator_tokenizer
    texts = [" ".join(["the castle of oslo"] * n) for n in range(21)]
    found = [encoding.ids for encoding in encode_in_threads(tokenizer, texts, threads)]
    assert found == [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_tokenizers_of_a_checkpoint_are_fast_ones(generator, checkpoint):
    tokenizer = load_tokenizer(str(checkpoint("rag_sequence", generator)))
    assert tokenizer.question_encoder.is_fast and tokenizer.generator.is_fast


def test_retrieve_contexts_gives_the_scores_of_rag_model(rag_sequence, retriever, questions):
    rag_sequence = in_float64(copy.deepcopy(rag_sequence))
    contexts = retrieve_contexts(rag_sequence.rag, retriever, **questions, n_docs=2)
    rag_sequence.set_retriever(retriever)
    with torch.no_grad():
        outputs = rag_sequence.rag(**questions, n_docs=2, output_retrieved=True, decoder_input_ids=questions.input_ids)
    assert_equal_but_for_rounding(contexts.doc_scores, outputs.doc_scores)
    assert torch.equal(contexts.input_ids, outputs.context_input_ids)
    contexts.doc_scores.sum().backward()
    assert all(p.grad is not None for p in rag_sequence.rag.question_encoder.parameters() if p.requires_grad)


def test_a_missing_passage_has_no_probability_and_no_text(rag_sequence, retriever, questions):
    n_docs = len(PASSAGES) + 2
    contexts = retrieve_contexts(rag_sequence.rag, retriever, **questions, n_docs=n_docs)
    assert (contexts.doc_ids[:, -2:] == -1).all() and (contexts.doc_ids[:, :-2] >= 0).all()
    probabilities = contexts.doc_scores.softmax(1)
    assert (probabilities[:, -2:] == 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(QUESTIONS)))
    assert all(doc["title"][-2:] == ["", ""] and doc["text"][-2:] == ["", ""] for doc in contexts.docs)


def test_from_pretrained_round_trip(retriever, rag_sequence, tmp_path, vectors):
    retriever.save_pretrained(tmp_path)
    again = RagKnowledgeRetriever.from_pretrained(tmp_path, n_docs=2)
    assert again.n_docs == 2
    np.testing.assert_array_equal(again.retrieve(vectors, 3)[1], retriever.retrieve(vectors, 3)[1])


def test_an_indexed_dataset_in_memory(retriever, knowledge, tmp_path, vectors):
    retriever.save_pretrained(tmp_path)
    dataset = datasets.load_from_disk(knowledge["passages_path"]).select([7, 6, 5, 4, 3, 2, 1, 0])
    with pytest.raises(UserError, match="add_faiss_index"):
        RagKnowledgeRetriever.from_pretrained(tmp_path, indexed_dataset=dataset)
    dataset.add_faiss_index("embeddings", custom_index=faiss.IndexFlatIP(DIMENSION))
    again = RagKnowledgeRetriever.from_pretrained(tmp_path, indexed_dataset=dataset)
    np.testing.assert_array_equal(7 - again.retrieve(vectors, 3)[1], retriever.retrieve(vectors, 3)[1])
    np.testing.assert_array_equal(again.retrieve(vectors, 3)[0], retriever.retrieve(vectors, 3)[0])


def test_an_indexed_dataset_that_is_none_is_told(retriever, knowledge, tmp_path):
    retriever.save_pretrained(tmp_path)
    dataset = datasets.load_from_disk(knowledge["passages_path"])
    dataset.add_faiss_index("embeddings", index_name="mine")
    with pytest.raises(UserError, match=r"no index of the name embeddings, but of the name\(s\) mine; call"):
        RagKnowledgeRetriever.from_pretrained(tmp_path, indexed_dataset=dataset)
    with pytest.raises(UserError, match=r"several splits \(train\); give one"):
        RagKnowledgeRetriever.from_pretrained(tmp_path, indexed_dataset=datasets.DatasetDict(train=dataset))


@pytest.mark.parametrize("shape", [(2, DIMENSION + 1), (DIMENSION,)])
def test_question_vectors_of_another_length_are_told(retriever, shape):
    with pytest.raises(UserError, match=rf"have shape .*--index_path .* of shape \(questions, {DIMENSION}\)"):
        retriever.retrieve(np.ones(shape, dtype=np.float32), 2)


def test_any_index_of_transformers_interface_will_do(rag_sequence, retriever, vectors, knowledge):
    index = KnowledgeIndex.load_from_disk(DIMENSION, knowledge["passages_path"], knowledge["index_path"])
    given = RagKnowledgeRetriever(
        rag_sequence.config, retriever.question_encoder_tokenizer, retriever.generator_tokenizer, index=index
    )
    assert given.index is index and index.is_initialized()
    np.testing.assert_array_equal(given.retrieve(vectors, 1)[1], retriever.retrieve(vectors, 1)[1])
