"""Questions put to knowledge from the command line; nothing is built."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import use_own_knowledge_dataset
from rag.errors import UserError
from rag.index.sources import open_index
from rag.models.checkpoints import load_model, load_tokenizer
from rag.retrieval.reranking import Upr
from tests.conftest import DIMENSION, QUESTIONS, assert_equal_but_for_rounding
from tests.knowledge.test_use_own_knowledge_dataset import run
from tests.retrieval.test_distributed_pytorch_retriever import rag_config
from use_own_knowledge_dataset import ENCODER_FLAG, main, parse_args

TWO = [question for question, _ in QUESTIONS[:2]]


def search(out, *words):
    return main(parse_args(["--output_dir", str(out), "--search", *TWO, *map(str, words)]))


def test_passages_for_questions(flags, question_encoder_folder, question_encoder, bert_tokenizer, tmp_path, capsys):
    run(flags)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(use_own_knowledge_dataset, "read_source", lambda *_: pytest.fail("read the documents"))
        found = search(tmp_path / "out", "--question_encoder_name_or_path", question_encoder_folder, "--n_docs", 3)
    assert [len(passages) for passages in found] == [3, 3]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Question: {TWO[0]}" and printed[4] == f"Question: {TWO[1]}" and len(printed) == 8
    for question, passages in zip(TWO, found, strict=True):
        with torch.no_grad():
            vector = question_encoder(**bert_tokenizer(question, return_tensors="pt"))[0][0].numpy()
        from datasets import load_from_disk

        rows = load_from_disk(tmp_path / "out" / "my_knowledge_dataset")
        scores = np.array(rows["embeddings"], dtype=np.float32) @ vector
        best = np.argsort(-scores)[:3]
        assert [passage["id"] for passage in passages] == best.tolist()
        assert_equal_but_for_rounding(np.array([passage["score"] for passage in passages], np.float32), scores[best])
        assert [passage["text"] for passage in passages] == [rows[int(i)]["text"] for i in best]
    title, text = found[1][2]["title"], found[1][2]["text"]
    assert printed[-1] == f"  {found[1][2]['score']:8.3f}  {title}: {text}"
    assert search(tmp_path / "out", "--question_encoder_name_or_path", question_encoder_folder, "--columns", 50)
    cut = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Question: ")]
    assert max(map(len, cut)) <= 50 and any(line.endswith(" ...") for line in cut)


def test_the_checkpoints_encoder(flags, checkpoint, question_encoder_folder, tmp_path):
    run(flags)
    by_encoder = search(tmp_path / "out", "--question_encoder_name_or_path", question_encoder_folder)
    by_checkpoint = search(tmp_path / "out", "--rag_model_name", checkpoint(), "--ef_search", 64)
    for one, other in zip(by_encoder, by_checkpoint, strict=True):
        assert [passage["id"] for passage in one] == [passage["id"] for passage in other]


def test_sentence_encoders_ask_for_themselves(flags, bert_tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **sizes))
    bert.save_pretrained(tmp_path / "bert")
    bert_tokenizer.save_pretrained(tmp_path / "bert")
    run(flags, **{ENCODER_FLAG: tmp_path / "bert", "--ctx_encoder_pooling": "mean"})
    found = search(tmp_path / "out")
    pooled = ["--question_encoder_name_or_path", tmp_path / "bert", "--question_encoder_pooling"]
    assert found == search(tmp_path / "out", *pooled, "mean")
    assert found != search(tmp_path / "out", *pooled, "cls")
    with torch.no_grad():
        next(bert.parameters()).mul_(1.01)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is not what it was when the passages were embedded"):
        search(tmp_path / "out")


def test_what_cannot_be_searched(flags, question_encoder_folder, context_encoder_folder, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--search: --output_dir .*out holds no knowledge"):
        search(tmp_path / "out")
    run(flags)
    with pytest.raises(UserError, match="needs the question encoder that belongs to"):
        search(tmp_path / "out")
    given = ["--question_encoder_name_or_path", question_encoder_folder]
    with pytest.raises(UserError, match="--nprobe 3: an index of kind IndexHNSWFlat has no such setting"):
        search(tmp_path / "out", *given, "--nprobe", 3)
    path = tmp_path / "out" / "index.json"
    made_by = json.loads(path.read_text())
    path.write_text(json.dumps(made_by | {"pooling": "mean"}))
    search(tmp_path / "out", *given)
    assert "Warning: passages are pooled by" in capsys.readouterr().out
    path.write_text(json.dumps(made_by | {"index": None}))
    with pytest.raises(UserError, match="is not finished; run the command that was building it"):
        search(tmp_path / "out", *given)
    shutil.rmtree(tmp_path / "out")


def test_words_beside_vectors(flags, question_encoder_folder, question_encoder, bert_tokenizer, tmp_path, capsys):
    run(flags)
    given = ["--question_encoder_name_or_path", question_encoder_folder, "--n_docs", 3, "--index_name", "hybrid"]
    found = search(tmp_path / "out", *given, "--dense_weight", 0.3)
    index = open_index(
        rag_config(
            index_name="hybrid", dense_weight=0.3, passages_path=str(tmp_path / "out" / "my_knowledge_dataset"),
            index_path=str(tmp_path / "out" / "my_knowledge_dataset_hnsw_index.faiss"),
        )
    )  # fmt: skip
    index.init_index()
    with torch.no_grad():
        vectors = question_encoder(**bert_tokenizer(TWO, padding=True, return_tensors="pt"))[0].numpy()
    scores, ids = index.search(np.concatenate([vectors, index.encode_questions(TWO)], axis=1), 3)
    assert [[passage["id"] for passage in passages] for passages in found] == ids.tolist()
    np.testing.assert_allclose([[passage["score"] for passage in passages] for passages in found], scores, atol=1e-4)
    assert next(passage["id"] for passage in search(tmp_path / "out", *given, "--dense_weight", 0)[0]) == 0  # BM25's
    assert main(parse_args(["--output_dir", str(tmp_path / "out"), "--verify"])) is not None
    assert run(flags)  # what is there is reused


def test_a_reranker_orders_what_was_found(flags, checkpoint, tmp_path):
    run(flags)
    folder = checkpoint()
    found = search(
        tmp_path / "out", "--rag_model_name", folder, "--reranker", "upr", "--rerank_depth", 6, "--n_docs", 2
    )
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    plain = search(tmp_path / "out", "--rag_model_name", folder, "--n_docs", 6)
    for question, own, passages in zip(TWO, found, plain, strict=True):
        texts = [(passage["title"], passage["text"]) for passage in passages]
        with torch.no_grad():
            scores = Upr(model.generator, tokenizer.generator, 6, model.config.max_combined_length).log_likelihoods(
                question, texts
            )
        order = scores.argsort(descending=True)[:2].tolist()
        assert [passage["id"] for passage in own] == [passages[place]["id"] for place in order]
        np.testing.assert_allclose([passage["score"] for passage in own], scores[order], atol=1e-3)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--search", "q", "--reranker", "upr"], "--reranker upr needs a generator; give --rag_model_name"),
        (["--search", "q", "--fusion", "ranks"], "--fusion ranks is for --index_name hybrid, not custom"),
        (["--search", "q", "--rerank_depth", "9"], "--rerank_depth 9 is for --reranker"),
        (["--index_name", "hybrid"], "--index_name hybrid is for --search; leave it out"),
        (["--reranker", "upr"], "--reranker upr is for --search; leave it out"),
    ],
)
def test_flags_of_a_search_that_cannot_be_meant(words, problem, flags, tmp_path):
    with pytest.raises(UserError, match=problem):
        main(parse_args(["--output_dir", str(tmp_path / "out"), "--csv_path", str(flags["--csv_path"]), *words]))


def test_words_alone_are_reranked_too_and_have_no_vectors(flags, checkpoint, tmp_path):
    words = {name: flags[name] for name in ("--csv_path", "--output_dir")}
    run(words | {"--index_factory": "bm25"})
    with pytest.raises(UserError, match="has words alone and no vectors; leave it out"):
        search(tmp_path / "out", "--index_name", "hybrid")
    reranker = ["--rag_model_name", checkpoint(), "--reranker", "upr", "--n_docs", 2]
    plain, found = search(tmp_path / "out", "--n_docs", 11), search(tmp_path / "out", *reranker)
    for own, passages in zip(found, plain, strict=True):
        assert len(own) == 2 and {passage["id"] for passage in own} <= {passage["id"] for passage in passages}
        assert own[0]["score"] >= own[1]["score"]
