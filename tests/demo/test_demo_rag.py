"""`demo_rag.py` over HTTP, on tiny models: answers, what is told meanwhile, settings of each question, two models."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from datasets import load_from_disk

from rag.demo import model as demo_model
from rag.evaluation import predictors
from rag.index.index_files import write_faiss_index
from tests.conftest import PASSAGES, QUESTIONS
from tests.demo.conftest import parsed, serving

QUESTION = QUESTIONS[0][0]
JSON = {"Content_Type": "application/json"}
TYPES = {"Sequence": "rag_sequence", "Token": "rag_token", "Fid": "fid"}  # by a word of the class's name


@pytest.fixture(scope="module")
def ivf(knowledge, tmp_path_factory) -> dict:
    """The flags of the same passages with an index of two lists."""
    vectors = np.array(load_from_disk(knowledge["passages_path"])["embeddings"], dtype=np.float32)
    index = faiss.index_factory(vectors.shape[1], "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    path = tmp_path_factory.mktemp("ivf") / "ivf.faiss"
    write_faiss_index(index, path)
    return knowledge | {"index_path": path}


def predicted(model, question: str = QUESTION, **plan) -> dict:
    """What `eval_rag.py` has of a question, with the demo's flags."""
    args = parsed(model)
    model_type = predictors.load_config(str(model)).architectures[0]
    model_type = next(name for word, name in TYPES.items() if word in model_type)
    plan = replace(args.answer_plan, **plan)
    predict, _ = predictors.load_predictor(str(model), model_type, plan, predictors.rag_config(args))
    with torch.inference_mode():
        _, (detail,) = predict([question], None)
    return detail


def assert_same(answer: dict, expected: dict) -> None:
    for name in ("answer", "doc_ids", "titles", "texts", "tokens"):
        assert answer.get(name) == expected.get(name), name
    for name in ("scores", "posteriors", "token_posteriors"):
        assert (name in answer) == (name in expected)
        if name in expected:
            np.testing.assert_allclose(answer[name], expected[name], atol=1e-5, rtol=1e-5)
    assert answer["probability"] == pytest.approx(np.exp(expected["answer_log_prob"]), rel=1e-4)


# --- Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "generator"),
    [("rag_sequence", "bart"), ("rag_token", "t5"), ("rag_sequence", "llama"), ("rag_token", "llama")],
)
def test_answers_are_those_of_eval_rag(serve, checkpoint, model_type, generator):
    folder = checkpoint(model_type, generator)
    client = serve(folder)
    for _ in range(2):  # a language model knows the passages the second time
        answer = client.ask(QUESTION)
        assert_same(answer, predicted(folder))
    assert sum(answer["priors"]) == pytest.approx(1) and answer["priors"] == sorted(answer["priors"], reverse=True)
    np.testing.assert_allclose(np.diff(np.log(answer["priors"])), np.diff(answer["scores"]), atol=1e-4)
    assert sum(answer["posteriors"]) == pytest.approx(1)
    assert 0 < answer["probability"] <= 1
    if model_type == "rag_token":
        shares = np.array(answer["token_posteriors"])
        assert shares.shape == (len(answer["tokens"]), 3) and len(shares) > 1
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(shares.mean(0), answer["posteriors"], atol=1e-5)
    else:
        assert "tokens" not in answer and "token_posteriors" not in answer


@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_a_fusion_in_decoder_answers_without_posteriors(serve, checkpoint, generator):
    folder = checkpoint("fid", generator)
    answer = serve(folder).ask(QUESTION)
    assert_same(answer, predicted(folder))
    assert "posteriors" not in answer and sum(answer["priors"]) == pytest.approx(1) and 0 < answer["probability"] <= 1


def test_the_answer_is_told_while_it_is_searched_for(client):
    answer = client.ask(QUESTION, num_beams=1)
    partial = answer["partial"]
    assert len(partial) >= 2 and len(set(partial)) >= 2
    assert all(answer["answer"].startswith(text) for text in partial), "greedy: the beginnings of the answer"


def test_each_question_brings_its_own_settings(client, rag_folder):
    before = client.ask(QUESTION)
    assert_same(client.ask(QUESTION, n_docs=1, num_beams=1), predicted(rag_folder, n_docs=1, num_beams=1))
    assert_same(client.ask(QUESTION, n_docs=8, num_beams=3), predicted(rag_folder, n_docs=8, num_beams=3))
    index = client.server.models[0].retriever.index
    client.ask(QUESTION, ef_search=5)
    assert index.description()["ef_search"] == 5
    client.post("/search", question=QUESTION, ef_search=7)
    assert index.description()["ef_search"] == 7
    assert_same(client.ask(QUESTION), before | {"answer_log_prob": np.log(before["probability"])})
    assert index.description()["ef_search"] == 16


def test_an_ivf_index_visits_as_many_lists_as_are_asked_for(serve, checkpoint, ivf):
    client = serve(checkpoint("rag_sequence", "bart"), **ivf)
    few, many, again = (client.ask(QUESTION, n_docs=8, **effort) for effort in ({}, {"nprobe": 2}, {}))
    assert len(few["titles"]) < 8 and sorted(many["titles"]) == sorted(title for title, _ in PASSAGES)
    assert again["titles"] == few["titles"]


def test_only_settings_that_the_index_has_are_offered(client, serve, checkpoint, ivf, knowledge):
    folder = checkpoint("rag_sequence", "bart")
    bm25 = {"index_name": "bm25", "passages_path": knowledge["passages_path"]}
    efforts = {"ef_search", "nprobe"}
    for asked, expected in [
        (client, {"ef_search"}),
        (serve(folder, **ivf), {"nprobe"}),
        (serve(folder, **bm25), set()),
        (serve(folder, index_device="cpu"), set()),
    ]:
        page = asked.send("GET", "/")[2].decode()
        assert set(re.findall(r'<input id="(\w+)"', page)) - {"question"} == {"n_docs", "num_beams"} | expected
        for name in efforts - expected:
            assert name in asked.error(question=QUESTION, **{name: 1})
        assert asked.ask(QUESTION, **dict.fromkeys(expected, 2))["answer"]


def test_two_checkpoints_side_by_side(serve, checkpoint, rag_folder):
    other = checkpoint("rag_sequence", "t5")
    client = serve(rag_folder, compare_with=other)
    assert_same(client.ask(QUESTION), predicted(rag_folder))
    assert_same(client.ask(QUESTION, model=1), predicted(other))
    page = client.send("GET", "/")[2].decode()
    assert page.count(str(rag_folder)) == page.count(str(other)) == 2  # in the heading and in the data
    assert "model 2 must be a whole number from 0 to 1" in client.error(question=QUESTION, model=2)


def test_passages_alone_are_those_of_an_answer(client, monkeypatch):
    expected = client.ask(QUESTION, n_docs=4)

    def refuse(*args, **kwargs):
        raise AssertionError("the generator runs")

    monkeypatch.setattr(predictors, "generate_answers", refuse)
    status, [line] = client.post("/search", question=QUESTION, n_docs=4)
    assert status == 200 and list(line) == ["found"]
    for name in ("doc_ids", "titles", "texts"):
        assert line["found"][name] == expected[name]
    for name in ("scores", "priors"):
        np.testing.assert_allclose(line["found"][name], expected[name], rtol=1e-5)


def test_questions_are_answered_in_turn(client, monkeypatch):
    running, most, ask = [], [], demo_model.DemoModel.ask

    def watched(model, question, tell):
        running.append(question)
        most.append(len(running))
        time.sleep(0.02)
        ask(model, question, tell)
        running.pop()

    monkeypatch.setattr(demo_model.DemoModel, "ask", watched)
    asked = [question for question, _ in QUESTIONS[:4]]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(client.ask, asked))
    assert most == [1] * 4
    monkeypatch.undo()
    assert [answer["answer"] for answer in answers] == [client.ask(question)["answer"] for question in asked]


def test_a_client_that_leaves_ends_its_search(client, monkeypatch):
    assert len(client.ask(QUESTION)["partial"]) > 1
    steps, began, left = [], threading.Event(), threading.Event()

    def decode(tokenizer, token_ids):
        steps.append(len(token_ids))
        began.set()
        assert left.wait(60)
        return predictors.decode(tokenizer, token_ids)

    monkeypatch.setattr(demo_model, "decode", decode)
    body = json.dumps({"question": QUESTION}).encode()
    lines = ["POST /ask HTTP/1.0", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        assert began.wait(60)
    left.set()
    with client.server.turn:  # free again when the search has ended
        assert len(steps) == 1
    assert client.ask(QUESTION)["answer"]


def test_the_end_waits_for_the_question_that_is_answered(rag_folder, monkeypatch):
    """Else Python would end in the middle of torch's code."""
    begun, ended = threading.Event(), threading.Event()

    def ask(question, tell):
        begun.set()
        try:
            while True:
                tell({"partial": ""})
                time.sleep(0.01)
        finally:
            time.sleep(0.3)
            ended.set()

    def client_asks(client):
        with contextlib.suppress(OSError, http.client.HTTPException):
            client.post("/ask", question="where is oslo")

    with serving(parsed(rag_folder)) as client:
        monkeypatch.setattr(client.server.models[0], "ask", ask)
        asking = threading.Thread(target=client_asks, args=(client,))
        asking.start()
        assert begun.wait(30)
        client.server.shutdown()
        client.server.end()
        assert ended.is_set()
        asking.join(30)
