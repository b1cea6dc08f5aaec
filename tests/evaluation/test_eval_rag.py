"""`eval_rag.py` as its command line runs it: scores by hand, reuse, continuation, refusal, all checkpoints."""

import copy
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from transformers import RagSequenceForGeneration

import eval_rag
from rag.errors import UserError
from rag.evaluation import predictors
from rag.evaluation.scores import attribution_values, means
from rag.files import json_digest, load_json, read_lines, save_json, write_lines
from rag.locks import lock_beside, one_at_a_time
from rag.metrics import answer_recall_at_k
from rag.models import precision
from rag.models.checkpoints import save_model
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, PASSAGES, QUESTIONS, ROOT

ASKED, ANSWERS = zip(*QUESTIONS, strict=True)


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_answers_are_scored_as_by_the_squad_script(run, rag_folder, files, no_model):
    write_lines(["The Paris!", "london town", "", "x", "y", "Madrid", "lisbon", "oslo oslo"], files / "predictions.txt")
    assert run(rag_folder, "ans") == {"em": 3 / 8, "f1": pytest.approx((3 + 2 / 3 + 2 / 3) / 8)}
    write_lines(["The Paris!", "the london", "", "x", "y", "Madrid", "lisbon", "oslo"], files / "predictions.txt")
    assert run(rag_folder, "qa") == {"em": 5 / 8, "f1": 5 / 8}


def test_attribution_is_of_the_passage_that_says_most():
    texts = ["a stone", "the paris of today", "rome"]
    one = {"texts": texts, "scores": [3.0, 2.0, 1.0], "posteriors": [0.1, 0.7, 0.2]}
    other = {"texts": texts, "scores": [3.0, 2.0, 1.0], "posteriors": [0.6, 0.2, 0.2]}
    nothing = {"texts": [], "scores": [], "posteriors": []}
    gold = [["London", "Paris"], ["stone"], ["Paris"]]
    scores = means(attribution_values([one, other, nothing], gold, answer_recall_at_k))
    assert scores == {"attribution": 2 / 3, "attribution_prior": 1 / 3}
    assert attribution_values([one, {"id": 2}], gold[:2], answer_recall_at_k) == {}


def test_passages_are_scored_over_all_k(run, rag_folder, files, no_model):
    titles = ['"paris"\trome', "rome\tlondon", "rome", "x\ty", "x\tx", "another\tmadrid", "x\tlisbon", "oslo\tz"]
    write_lines(titles, files / "predictions.txt")
    scores = run(rag_folder, "pages", k=[1, 2])
    assert scores == {
        "precision_at_1": 4 / 8,
        "precision_at_2": (1 + 1 + 1 + 0 + 0 + 2 + 1 + 1) / 16,
        "mrr": (1 + 1 / 2 + 1 + 0 + 0 + 1 + 1 / 2 + 1) / 8,
    }


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_rag_answers_end_to_end(run, checkpoint, files, model_type, generator):
    scores = run(checkpoint(model_type, generator), "ans")
    answers = read_lines(files / "predictions.txt")
    assert len(answers) == 8 and scores["em"] == sum(a == b for a, b in zip(answers, ANSWERS, strict=True)) / 8
    records = [json.loads(line) for line in read_lines(files / "predictions.txt.jsonl")]
    for number, (record, (question, _)) in enumerate(zip(records, QUESTIONS, strict=True), start=1):
        of_tokens = ["tokens", "token_posteriors"] * (model_type == "rag_token")
        of_passages = ["doc_ids", "titles", "texts", "scores", "posteriors"]
        assert list(record) == ["id", "question", "answer", "answer_log_prob", *of_passages, *of_tokens, "digest"]
        assert record["answer_log_prob"] <= 0
        assert (record["id"], record["question"], record["answer"]) == (number, question, answers[number - 1])
        assert [record["titles"], record["texts"]] == [[PASSAGES[i][n] for i in record["doc_ids"]] for n in (0, 1)]
        assert len(record["scores"]) == len(record["posteriors"]) == 3
        assert sum(record["posteriors"]) == pytest.approx(1)
        if of_tokens:
            assert all(sum(shares) == pytest.approx(1) for shares in record["token_posteriors"])
            assert len(record["tokens"]) == len(record["token_posteriors"]) > 0
            mean = np.mean(record["token_posteriors"], 0)
            np.testing.assert_allclose(record["posteriors"], mean, atol=1e-6)
        assert record["scores"] == sorted(record["scores"], reverse=True)
    for name, by in (("attribution", "posteriors"), ("attribution_prior", "scores")):
        best = [record["texts"][np.argmax(record[by])] for record in records]
        assert scores[name] == sum(answer in text for answer, text in zip(ANSWERS, best, strict=True)) / 8
    written = load_json(files / "predictions.txt.scores.json")
    assert written["scores"] == scores and written["questions"] == 8
    assert written["settings"]["model_type"] == model_type and written["settings"]["num_beams"] == 2
    assert written["index"] == {"kind": "IndexHNSWFlat", "passages": 8, "dimension": DIMENSION, "ef_search": 16}


def test_the_batch_does_not_change_the_answers(run, rag_folder, files):
    run(rag_folder, predictions="threes")
    run(rag_folder, predictions="all", eval_batch_size=8)
    run(rag_folder, predictions="ones", eval_batch_size=1)
    assert read_lines(files / "threes") == read_lines(files / "ones") == read_lines(files / "all")


@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_a_bare_generator_answers_closed_book(run, request, files, generator):
    model = request.getfixturevalue(generator)
    tokenizer = request.getfixturevalue(f"{generator}_tokenizer")
    run(request.getfixturevalue(f"{generator}_folder"), prefix="oslo ")
    tokens = tokenizer(["oslo " + q for q in ASKED], padding=True, return_tensors="pt")
    token_ids = model.generate(**tokens, num_beams=2, min_length=1, max_length=8)
    assert read_lines(files / "predictions.txt") == tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    assert list(json.loads(read_lines(files / "predictions.txt.jsonl")[0])) == ["id", "question", "answer", "digest"]


def test_retrieval_equals_a_search_by_hand(run, rag_folder, files, question_encoder, bert_tokenizer):
    def encode(texts):
        with torch.no_grad():
            return question_encoder(**bert_tokenizer(list(texts), padding=True, return_tensors="pt"))[0]

    found = (encode(ASKED) @ encode(text for _, text in PASSAGES).T).argsort(1, descending=True)[:, :5].tolist()
    ranks = [row.index(number) + 1 if number in row else None for number, row in enumerate(found)]
    scores = run(rag_folder, "pages", k=[1, 3, 5], answers_path=files / "qa")
    for k in (1, 3, 5):
        hits = sum(rank is not None and rank <= k for rank in ranks)
        assert scores[f"precision_at_{k}"] == pytest.approx(hits / k / 8)
        assert scores[f"recall_at_{k}"] == hits / 8
    assert scores["mrr"] == pytest.approx(sum(1 / rank for rank in ranks if rank) / 8)
    titles = [line.split("\t") for line in read_lines(files / "predictions.txt")]
    assert titles == [[PASSAGES[i][0] for i in row] for row in found]
    records = [json.loads(line) for line in read_lines(files / "predictions.txt.jsonl")]
    assert [record["answer_rank"] for record in records] == ranks
    assert [record["doc_ids"] for record in records] == found


def test_one_file_of_titles_is_scored_at_any_k(run, rag_folder, files, request):
    """As many titles as --n_docs says; a smaller k, and another n_docs, are scored from them without the model."""
    run(rag_folder, "pages", "five", n_docs=5)
    wide = run(rag_folder, "pages", n_docs=6, k=[2, 6], answers_path=files / "qa")
    assert {len(line.split("\t")) for line in read_lines(files / "predictions.txt")} == {6}
    request.getfixturevalue("no_model")
    again = run(rag_folder, "pages", n_docs=5, k=[1, 2], answers_path=files / "qa")
    assert again["precision_at_2"] == wide["precision_at_2"] and again["recall_at_2"] == wide["recall_at_2"]
    # Only the first five titles count for what was asked for, as in a file of five.
    assert again["mrr"] == run(rag_folder, "pages", "five", n_docs=5)["mrr"]
    assert load_json(files / "predictions.txt.scores.json")["settings"]["n_docs"] == 6
    with pytest.raises(UserError, match=r"was made with n_docs 6 \(now 7\); .*--recalculate"):
        run(rag_folder, "pages", n_docs=5, k=[7], answers_path=files / "qa")


def test_k_above_n_docs_retrieves_k(run, rag_folder, files):
    run(rag_folder, "pages", n_docs=2, k=[1, 4])
    assert {len(line.split("\t")) for line in read_lines(files / "predictions.txt")} == {4}


def test_a_killed_retrieval_is_continued_with_as_many_titles_as_it_began_with(run, rag_folder, files):
    run(rag_folder, "pages", "whole", n_docs=6)
    run(rag_folder, "pages", n_docs=6)
    for end in ("", ".jsonl"):
        write_lines(read_lines(files / f"predictions.txt{end}")[:4], files / f"predictions.txt{end}")
    with pytest.raises(UserError, match=r"n_docs 6 \(now 7\)"):
        run(rag_folder, "pages", n_docs=7)
    run(rag_folder, "pages", n_docs=5)
    for end in ("", ".jsonl"):
        assert read_lines(files / f"predictions.txt{end}") == read_lines(files / f"whole{end}")


def test_another_programs_file_of_titles_is_scored_up_to_as_many_as_it_has(run, rag_folder, files, no_model):
    path = files / "predictions.txt"
    path.write_text("\n".join(f"{answer}\tx\tanother" for answer in ANSWERS))  # no line end behind the last
    assert run(rag_folder, "pages", k=[1, 3], n_docs=5) == {"precision_at_1": 1, "precision_at_3": 2 / 3, "mrr": 1}
    with pytest.raises(UserError, match=r"has 3 titles a line at most, too few for --k 4; give --recalculate"):
        run(rag_folder, "pages", k=[1, 4])


def test_more_passages_are_asked_for_than_there_are(run, rag_folder, files):
    scores = run(rag_folder, "pages", k=[20])
    assert scores["precision_at_20"] == 1 / 20 and scores["mrr"] > 0
    assert {len(line.split("\t")) for line in read_lines(files / "predictions.txt")} == {8}
    assert 0 <= run(rag_folder, predictions="e2e", n_docs=12)["em"] <= 1


def test_the_effort_of_the_search_is_a_setting(run, rag_folder, files):
    run(rag_folder, "pages", ef_search=4)
    written = load_json(files / "predictions.txt.scores.json")
    assert written["index"]["ef_search"] == written["settings"]["ef_search"] == 4
    with pytest.raises(UserError, match=r"was made with ef_search 4 \(now 5\)"):
        run(rag_folder, "pages", ef_search=5)
    with pytest.raises(UserError, match="--nprobe 2: an index of kind IndexHNSWFlat has no such setting"):
        run(rag_folder, "pages", "other", nprobe=2)


def test_what_is_printed(run, rag_folder, capsys):
    run(rag_folder, print_docs=True, print_predictions=True)
    first = capsys.readouterr().out
    assert "Q: what is the capital of oslo" not in first and first.count("Q: what is the capital of ") == 8
    titles = [line.split()[-1] for line in first.splitlines() if line.startswith("    ")]
    assert len(titles) == 24 and set(titles) <= set(ANSWERS)
    *_, made, heading, em, _, _, _, last = first.splitlines()
    assert made.endswith(" (rag_sequence), index HNSWFlat ef_search 16, n_docs 3, num_beams 2, float32")
    assert len(made) <= 120
    assert heading.split() == ["8", "questions", "percent", "[95%", "interval]"]
    assert em.split() == ["EM:", "0.00", "[0.0,", "0.0]"] and em.index("[") == heading.index("[")
    assert last.startswith("settings: ") and load_json(last.split()[1])["settings"]["max_source_length"] == 128
    run(rag_folder, print_docs=True, print_predictions=True)
    second = capsys.readouterr().out
    assert second.splitlines()[1:] == first.splitlines()


def test_patterns_in_the_place_of_answers(run, rag_folder, files, request):
    """As CuratedTrec has them: EM of answers, recall@k of passages, kept with the settings that made the ranks."""
    write_lines([f"{question}\t{[answer[:3] + '.*', 'x{3}']}" for question, answer in QUESTIONS], files / "patterns")
    flags = {"answers_path": files / "patterns", "gold_data_mode": "regex", "k": [1, 8], "n_docs": 8}
    scores = run(rag_folder, "pages", "ranks", **flags)
    records = [json.loads(line) for line in read_lines(files / "ranks.jsonl")]
    for (_, answer), record in zip(QUESTIONS, records, strict=True):
        texts = [PASSAGES[number][1] for number in record["doc_ids"]]
        assert record["answer_rank"] == next(n for n, text in enumerate(texts, 1) if answer[:3] in text)
    assert scores["recall_at_8"] == 1
    with pytest.raises(UserError, match=r"gold_data_mode regex \(now None\)"):
        run(rag_folder, "pages", "ranks", **flags | {"gold_data_mode": "qa", "answers_path": files / "qa"})
    request.getfixturevalue("no_model")
    write_lines([answer.upper() + "!" for answer in ANSWERS[:4]] + ["in x", "xx", "XXX", ""], files / "predictions.txt")
    scores = run(rag_folder, "patterns", gold_data_mode="regex")
    assert (
        scores
        == {"em": 5 / 8}
        == eval_rag.get_scores(Namespace(gold_data_mode="regex"), files / "predictions.txt", files / "patterns")
    )


def test_two_evaluations_of_one_file_are_kept_apart(run, rag_folder, files):
    with one_at_a_time(lock_beside(files / "predictions.txt"), "--x", "y"):
        with pytest.raises(
            UserError, match=f"--predictions_path .* is in use by process {os.getpid()} on {os.uname().nodename}"
        ):
            run(rag_folder)
        assert not (files / "predictions.txt").exists()
        run(rag_folder, predictions="other.txt")
    run(rag_folder)


def test_a_refused_run_leaves_nothing(run, files, rag_folder):
    for flags in (
        {"model_name_or_path": files / "none"},
        {"gold_data_path": files / "none"},
        {"index_path": files / "none"},
    ):
        with pytest.raises(UserError):
            run(**{"model": rag_folder, "predictions": "new/p.txt"} | flags)
        assert not (files / "new").exists() or {path.name for path in (files / "new").iterdir()} == {".p.txt.lock"}


# --- Functions that other code imports --------------------------------------------------------------------------------


def test_two_files_are_scored_as_the_public_suite_does(files, caplog):
    caplog.set_level("INFO")
    write_lines(["The Paris!", "london town", "", "x", "y", "Madrid", "lisbon", "oslo oslo"], files / "answers")
    scores = eval_rag.get_scores(Namespace(gold_data_mode="ans"), files / "answers", files / "ans")
    assert scores == {"em": 3 / 8, "f1": pytest.approx((3 + 2 / 3 + 2 / 3) / 8)}
    assert "EM: 37.50" in caplog.text and "F1: 54.17" in caplog.text
    assert eval_rag.get_scores(Namespace(gold_data_mode="qa"), files / "answers", files / "qa")["em"] == 3 / 8
    write_lines([f"x\t{answer}" for answer in ANSWERS], files / "titles")
    expected = {"precision_at_1": 0, "precision_at_2": 1 / 2, "mrr": 1 / 2}
    assert eval_rag.get_precision_at_k(Namespace(k=[1, 2]), files / "titles", files / "pages") == expected
    assert eval_rag.get_precision_at_k(Namespace(k=2), files / "titles", files / "pages")["precision_at_2"] == 1 / 2
    with pytest.raises(UserError, match="has 2 titles a line at most, too few for --k 3"):
        eval_rag.get_precision_at_k(Namespace(k=3), files / "titles", files / "pages")
    write_lines(ANSWERS[1:], files / "short")
    with pytest.raises(UserError, match=r"short has 7 lines and .*ans 8"):
        eval_rag.get_scores(Namespace(gold_data_mode="ans"), files / "short", files / "ans")


def test_batches_are_answered_by_a_model_that_has_its_retriever(run, rag_folder, files):
    assert eval_rag.infer_model_type(str(rag_folder)) == "rag_sequence"
    run(rag_folder)
    run(rag_folder, "pages", "titles")
    retriever = RagKnowledgeRetriever.from_pretrained(rag_folder, n_docs=3)
    model = RagSequenceForGeneration.from_pretrained(rag_folder, retriever=retriever, n_docs=3).eval()
    words = ["--model_name_or_path", rag_folder, "--evaluation_set", files / "q", "--gold_data_path", files / "ans",
             "--num_beams", 2, "--max_length", 8, "--n_docs", 3]  # fmt: skip
    args = eval_rag.get_args([str(word) for word in words])
    assert eval_rag.evaluate_batch_e2e(args, model, ASKED[:3]) == read_lines(files / "predictions.txt")[:3]
    assert eval_rag.evaluate_batch_retrieval(args, model, ASKED[:3]) == read_lines(files / "titles")[:3]


# --- Reuse, continuation, refusal -------------------------------------------------------------------------------------


def test_a_complete_file_is_scored_again_without_the_model(run, rag_folder, request):
    scores = run(rag_folder)
    request.getfixturevalue("no_model")
    assert run(rag_folder) == scores
    assert run(rag_folder, "qa") != {}  # another gold file, the same predictions
    with pytest.raises(AssertionError, match="a model is loaded"):
        run(rag_folder, recalculate=True)


def test_a_killed_run_is_continued(run, rag_folder, files, monkeypatch):
    run(rag_folder, predictions="whole")
    answer = predictors.answer_from_passages
    asked = []

    def killed(args, model, retriever, questions, answers, **rest):
        asked.extend(questions)
        if len(asked) > 6:
            raise KeyboardInterrupt
        return answer(args, model, retriever, questions, answers, **rest)

    monkeypatch.setattr(predictors, "answer_from_passages", killed)
    with pytest.raises(KeyboardInterrupt):
        run(rag_folder)
    with open(files / "predictions.txt", "a") as file:
        file.write("half a li")
    assert not (files / "predictions.txt.scores.json").exists()
    asked = asked[:-10]
    run(rag_folder)
    assert tuple(asked) == ASKED[6:]
    for end in ("", ".jsonl"):
        assert read_lines(files / f"predictions.txt{end}") == read_lines(files / f"whole{end}")


def test_another_checkpoint_or_other_settings_are_refused(run, rag_folder, rag_token, files, tmp_path):
    run(rag_folder)
    shutil.copytree(rag_folder, files / "moved")
    run(files / "moved")  # the same model
    other = copy.deepcopy(rag_token)
    save_model(other, files / "other")
    for folder in ("question_encoder_tokenizer", "generator_tokenizer"):
        shutil.copytree(rag_folder / folder, files / "other" / folder)
    refused = r"was made with .*{}.*--recalculate"
    with pytest.raises(UserError, match=refused.format("model_name_or_path .* \\(now .*other\\)")):
        run(files / "other")
    with pytest.raises(UserError, match=refused.format(r"n_docs 3 \(now 2\), num_beams 2 \(now 4\)")):
        run(rag_folder, n_docs=2, num_beams=4)
    with pytest.raises(UserError, match=refused.format(r"eval_mode e2e \(now retrieval\)")):
        run(rag_folder, "pages")
    run(files / "other", recalculate=True)
    write_lines([*ASKED[1:], "what is near"], files / "q")
    with pytest.raises(UserError, match=refused.format("evaluation_set .* \\(its content has changed\\)")):
        run(files / "other")


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dtypes(monkeypatch):
    """The dtypes of the models that answered, and of the query vectors that were searched for."""
    used, original, retrieve = set(), predictors.answer_from_passages, RagKnowledgeRetriever.retrieve

    def answer(plan, model, *args, **rest):
        used.add(model.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return original(plan, model, *args, **rest)

    def searched(retriever, vectors, n_docs):
        assert vectors.dtype == np.float32
        return retrieve(retriever, vectors, n_docs)

    monkeypatch.setattr(predictors, "answer_from_passages", answer)
    monkeypatch.setattr(RagKnowledgeRetriever, "retrieve", searched)
    return used


def cut(files, lines: int, name: str = "predictions.txt"):
    """As a killed run leaves it."""
    for end in ("", ".jsonl"):
        write_lines(read_lines(files / f"{name}{end}")[:lines], files / f"{name}{end}")


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_in_half_precision(run, checkpoint, files, dtypes, model_type, word, dtype):
    folder = checkpoint(model_type, "bart")
    full = run(folder, predictions="full")
    scores = run(folder, predictions="half", precision=word)
    assert dtypes == {torch.float32, dtype} and scores.keys() == full.keys()
    assert load_json(files / "half.scores.json")["settings"]["precision"] == str(dtype).removeprefix("torch.")
    for one, other in zip(read_lines(files / "full.jsonl"), read_lines(files / "half.jsonl"), strict=True):
        one, other = json.loads(one), json.loads(other)
        ids = set(one["doc_ids"]) & set(other["doc_ids"])  # the third may be another
        assert len(ids) >= 2
        for doc_id in ids:
            pair = [record["scores"][record["doc_ids"].index(doc_id)] for record in (one, other)]
            assert pair[0] != pair[1] and pair[0] == pytest.approx(pair[1], rel=0.05)


def test_passages_and_closed_book_answers_in_half_precision(run, rag_folder, bart, bart_folder, bart_tokenizer, files):
    full = run(rag_folder, "pages", "full", k=[1, 8], n_docs=8)
    assert run(rag_folder, "pages", "half", k=[1, 8], n_docs=8, precision="bf16").keys() == full.keys()
    pairs = zip(read_lines(files / "full.jsonl"), read_lines(files / "half.jsonl"), strict=True)
    scores = [[json.loads(record)["scores"] for record in pair] for pair in pairs]
    assert all(one != other and np.allclose(one, other, rtol=0.05, atol=0.05) for one, other in scores)
    run(bart_folder, precision="bf16")
    tokens = bart_tokenizer(list(ASKED), padding=True, return_tensors="pt")
    half = copy.deepcopy(bart).bfloat16()
    token_ids = [
        half.generate(**{name: ids[rows] for name, ids in tokens.items()}, num_beams=2, min_length=1, max_length=8)
        for rows in (slice(3), slice(3, 6), slice(6, 8))
    ]
    expected = [text for ids in token_ids for text in bart_tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert read_lines(files / "predictions.txt") == expected


def test_a_file_is_finished_in_the_precision_that_it_was_begun_in(run, rag_folder, files, dtypes, monkeypatch, capsys):
    run(rag_folder, precision="bf16")
    whole = read_lines(files / "predictions.txt")
    cut(files, 3)
    with pytest.raises(UserError, match=r"was made with precision bfloat16 \(now float32\); .*--recalculate"):
        run(rag_folder)
    dtypes.clear()
    run(rag_folder, precision="auto")  # whatever this machine would take
    assert dtypes == {torch.bfloat16} and read_lines(files / "predictions.txt") == whole
    assert ", bfloat16\n8 questions" in capsys.readouterr().out
    for has_units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda has_units=has_units: has_units)
        dtypes.clear()
        run(rag_folder, precision="auto", recalculate=True, device="cpu")
        assert dtypes == {dtype}


def test_files_of_a_version_without_precisions_are_float32(run, rag_folder, files, dtypes):
    run(rag_folder)
    cut(files, 3)
    path = files / "predictions.txt.settings.json"
    kept = load_json(path)
    del kept["settings"]["precision"], kept["digest"]
    save_json(kept | {"digest": json_digest(kept)}, path)
    with pytest.raises(UserError, match=r"was made with precision float32 \(now bfloat16\); .*--recalculate"):
        run(rag_folder, precision="bf16")
    dtypes.clear()
    run(rag_folder, precision="auto")
    assert dtypes == {torch.float32} and len(read_lines(files / "predictions.txt")) == 8
    assert load_json(path)["settings"]["precision"] == "float32"


def test_decoding_is_handed_on_noted_and_for_rag_sequence_only(run, rag_folder, checkpoint, files, monkeypatch):
    used, original = set(), predictors.generate_answers

    def generate_answers(*args, decoding, **settings):
        used.add(decoding)
        return original(*args, decoding=decoding, **settings)

    monkeypatch.setattr(predictors, "generate_answers", generate_answers)
    run(rag_folder, decoding="fast")
    assert used == {"fast"}
    assert load_json(files / "predictions.txt.settings.json")["settings"]["decoding"] == "fast"
    with pytest.raises(UserError, match=r"decoding fast \(now thorough\)"):
        run(rag_folder)
    with pytest.raises(UserError, match=r"--decoding fast is for rag_sequence; leave it out: .* is a rag_token model"):
        run(checkpoint("rag_token", "bart"), predictions="other.txt", decoding="fast")


def test_all_checkpoints_are_measured_each_into_its_own_file(run, rag_folder, files, bart, capsys):
    output = files / "output"
    for name in ("checkpoint10", "checkpoint2"):
        shutil.copytree(rag_folder, output / name)
    (output / "checkpoint3").mkdir()  # half-written: no config
    scores = run(output, eval_all_checkpoints=True)
    assert list(scores) == ["checkpoint2", "checkpoint10"] and scores["checkpoint2"] == scores["checkpoint10"]
    assert len(read_lines(files / "predictions.checkpoint2.txt")) == 8
    assert len(read_lines(files / "predictions.checkpoint10.txt")) == 8
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert table[0] == ["checkpoint", "EM", "F1", "Attribution", "Attribution-prior"]
    assert [row[0] for row in table[1:]] == list(scores)
    with pytest.raises(UserError, match=r"holds no folder checkpoint\*"):
        run(rag_folder, eval_all_checkpoints=True)


# --- Mistakes, before anything is loaded ------------------------------------------------------------------------------


def test_missing_files_and_bad_values_are_named_together(run, files, no_model):
    with pytest.raises(UserError) as error:
        run("nowhere", evaluation_set="no_q", gold_data_path="no_gold", predictions_path=files)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "--evaluation_set", "--gold_data_path", "--predictions_path",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--predictions_path .* is --gold_data_path, which would be overwritten"):
        run("nowhere", predictions_path=files / "ans", gold_data_path=files / "ans", recalculate=True)
    with pytest.raises(UserError) as error:
        run("nowhere", n_docs=0, k=[5, 0], min_length=9, answers_path="x")
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "--n_docs", "--min_length", "--k", "--answers_path",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "line", "message"),
    [
        ("ans", " ", "line 3: blank"),
        ("pages", "\t", "line 3: blank"),
        ("qa", "what is\t['a', 'b'", 'line 3: `question TAB .*not "what is'),
        ("qa", "berlin", "line 3: .*--gold_data_mode ans"),
        ("qa", "q\t[]", "line 3"),
        ("qa", "q\t[1984]", "line 3"),
        ("qa", "q\t'berlin'", "line 3"),
        ("qa", "q\t__import__('os')", "line 3"),
        ("ans", "one\ntwo", "has 9 lines, but the number of questions is 8"),
    ],
)
def test_a_bad_gold_line_is_named(run, files, no_model, gold, line, message):
    lines = read_lines(files / gold)
    (files / gold).write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=message):
        run("nowhere", gold)


def test_blank_questions_are_named(run, files, no_model):
    write_lines(["a", " "], files / "q")
    with pytest.raises(UserError, match="line 2 is blank"):
        run("nowhere")
    write_lines([], files / "q")
    with pytest.raises(UserError, match="there is none"):
        run("nowhere")


def test_gold_that_is_a_line_off_is_remarked(run, files, rag_folder, caplog):
    lines = read_lines(files / "qa")
    write_lines([*lines[1:], lines[0]], files / "qa")
    write_lines(ANSWERS, files / "predictions.txt")
    run(rag_folder, "qa")
    assert "8 of 8 questions are not those of --evaluation_set" in caplog.text


def test_a_generator_retrieves_nothing(run, bart_folder):
    with pytest.raises(UserError, match="is a bart model, which retrieves nothing"):
        run(bart_folder, "pages")
    with pytest.raises(UserError, match="--model_type bart retrieves nothing"):
        run(bart_folder, "pages", model_type="bart")


def test_an_index_that_is_not_there_is_named_before_the_model_is_loaded(run, rag_folder, monkeypatch):
    monkeypatch.setattr(predictors, "load_model", None)
    with pytest.raises(UserError, match="--index_path nowhere"):
        run(rag_folder, index_path="nowhere")
    with pytest.raises(UserError, match="--passages_path nowhere"):
        run(rag_folder, passages_path="nowhere")


def test_an_unknown_device_is_named(run, rag_folder):
    with pytest.raises(UserError, match="--device toaster cannot be used"):
        run(rag_folder, device="toaster")


def test_each_rank_of_a_node_has_a_gpu_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert predictors.pick_device(None) == torch.device("cuda:0")
    for rank, device in (("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert predictors.pick_device(None) == current[-1] == torch.device(device)
        assert predictors.pick_device("cpu") == torch.device("cpu")


def test_the_command_line_answers_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "eval_rag.py"), "--model-name-or-path", "x", "--evaluation-set", "none"]
    command += ["--gold-data-path", "none", "--predictions-path", str(tmp_path / "p")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[0].startswith("eval_rag.py: error: --evaluation_set none does not exist")
    code = "import sys, eval_rag; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == "[]"


def test_blanks_around_titles_do_not_count(run, files, rag_folder):
    expected = run(rag_folder, gold="pages")
    (files / "spaced").write_text("".join(f" {line} \n" for line in (files / "pages").read_text().splitlines()))
    spaced = run(rag_folder, gold="pages", predictions="again", gold_data_path=files / "spaced")
    assert spaced == expected and expected["precision_at_1"] > 0
