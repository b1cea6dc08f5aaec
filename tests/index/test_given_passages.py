"""Passages that another system found: looked up by question, scored as they were, by the scripts' own flags."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import BartConfig, DPRConfig, RagConfig

import eval_rag
import finetune_rag
from rag.errors import UserError
from rag.files import load_json, read_lines, write_lines
from rag.index.sources import open_index
from rag.models.checkpoints import load_model
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import DIMENSION, PASSAGES, QUESTIONS, assert_the_generator_alone_learned

ASKED, ANSWERS = zip(*QUESTIONS, strict=True)
FOUND = [
    {"question": "who", "titles": ["A", "B", None], "texts": ["a", "b", "c"], "scores": [1, 3.5, -2]},
    {"question": " where  is it", "titles": ["B"], "texts": ["b"], "scores": ["0.5"]},
    {"question": "when", "titles": ["A", "A"], "texts": ["a", "other"], "scores": [7, 7]},
]


def rag_config(path) -> RagConfig:
    config = RagConfig(
        question_encoder=DPRConfig(hidden_size=DIMENSION, num_attention_heads=2).to_dict(),
        generator=BartConfig().to_dict(), index_name="given", retrieval_vector_size=DIMENSION,
    )  # fmt: skip
    config.passages_file = str(path)
    return config


@pytest.fixture
def opened(tmp_path):
    """The index of a file with these records, a line each; of a file of this name."""

    def opened(records, name="found.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps(records) if name.endswith(".json") else "".join(map(line_of, records)))
        index = open_index(rag_config(path))
        index.init_index()
        return index

    return opened


def line_of(record) -> str:
    return (record if isinstance(record, str) else json.dumps(record)) + "\n"


def ctxs(record) -> dict:
    """As DPR's retriever writes it."""
    columns = zip(record["titles"], record["texts"], record["scores"], strict=True)
    passages = [{"id": "wiki:7", "title": a, "text": b, "score": str(c), "has_answer": False} for a, b, c in columns]
    return {"question": record["question"], "answers": ["x"], "ctxs": passages}


# --- A lookup ---------------------------------------------------------------------------------------------------------


def test_passages_come_with_their_scores_best_first(opened):
    index = opened(FOUND)
    queries = index.encode_questions(["when", "who", "where is   it "])
    ids, vectors = index.get_top_docs(queries, 2)
    scores = (vectors @ queries[:, :, None])[:, :, 0]
    # Rows in the order of the file: B of 3.5, A of 1, c, and the other A; of equal scores the first in the file.
    assert ids.tolist() == [[1, 3], [0, 1], [0, -1]] and scores.tolist() == [[7, 7], [3.5, 1], [0.5, 0]]
    docs = index.get_doc_dicts(ids)
    assert docs[0] == {"title": ["A", "A"], "text": ["a", "other"]} and docs[2] == {
        "title": ["B", ""],
        "text": ["b", ""],
    }
    assert index.get_top_docs(queries, 3)[0].tolist() == [[1, 3, -1], [0, 1, 2], [0, -1, -1]]
    assert index.get_doc_dicts([[2]])[0] == {"title": [""], "text": ["c"]}
    assert index.description() == {"kind": "given passages", "passages": 4, "questions": 3}
    assert index.get_top_docs(queries[:0], 2)[0].shape == (0, 2)


@pytest.mark.parametrize("name", ["found.jsonl", "found.json"])
@pytest.mark.parametrize("form", [dict, ctxs])
def test_both_forms_in_both_files_are_the_same(opened, form, name):
    expected, index = opened(FOUND, "other.jsonl"), opened([form(record) for record in FOUND], name)
    queries = index.encode_questions(["who", "when"])
    for one, two in zip(expected.search(queries, 3), index.search(queries, 3), strict=True):
        np.testing.assert_array_equal(one, two)
    assert index.get_doc_dicts([[0, 1, 2, 3]]) == expected.get_doc_dicts([[0, 1, 2, 3]])


def test_a_question_may_come_again_with_the_same_passages(opened):
    index = opened([FOUND[0], FOUND[1], FOUND[0] | {"question": "who "}])
    assert index.description()["questions"] == 2


def test_every_question_has_its_own_passages_among_many(opened):
    records = [
        {"question": f"q{n}", "titles": [str(n), "all"], "texts": [f"text {n}", "of all"], "scores": [n, n - 0.5]}
        for n in range(25_000)
    ]
    index = opened(records)
    asked = [24_999, 0, 12_345]
    ids, vectors = index.get_top_docs(index.encode_questions([f"q{n}" for n in asked]), 2)
    assert [doc["text"] for doc in index.get_doc_dicts(ids)] == [[f"text {n}", "of all"] for n in asked]
    assert vectors[:, :, 0].tolist() == [[n, n - 0.5] for n in asked] and len(index) == 25_001


def test_a_pickle_needs_no_file(opened, tmp_path):
    index = opened(FOUND)
    data = pickle.dumps(index)
    (tmp_path / "found.jsonl").unlink()
    again = pickle.loads(data)
    queries = again.encode_questions(["who"])
    np.testing.assert_array_equal(again.get_top_docs(queries, 3)[0], index.get_top_docs(queries, 3)[0])


# --- Mistakes ---------------------------------------------------------------------------------------------------------

WHO = FOUND[0]
BROKEN = {
    "text": ("who\tA", r"is expected, not \"who"),
    "list": ([1], r"is expected, not \[1\]"),
    "deep": ("[" * 100_000, "is expected, not"),
    "no question": ({"titles": []}, "is expected, not"),
    "blank question": (WHO | {"question": " "}, "is expected, not"),
    "no titles": ({"question": "x", "texts": ["a"], "scores": [1]}, "`titles` is null, not a list"),
    "texts are one": (WHO | {"texts": "a b c"}, '`texts` is "a b c", not a list'),
    "too few scores": (WHO | {"scores": [1, 2]}, "3 titles, 3 texts and 2 scores; give as many of each"),
    "no passages": (WHO | {"titles": [], "texts": [], "scores": []}, "0 titles, .* one or more"),
    "text is a number": (WHO | {"texts": ["a", 3, "c"]}, "3 is no text"),
    "text is none": (WHO | {"texts": ["a", None, "c"]}, "null is no text"),
    "half a character": (WHO | {"texts": ["a", "b\ud800", "c"]}, "is no Unicode text"),
    "NaN": (WHO | {"scores": [1, float("nan"), 2]}, "the score NaN is not a finite number"),
    "infinity": (WHO | {"scores": [1, float("inf"), 2]}, "the score Infinity is not a finite number"),
    "beyond float32": (WHO | {"scores": [1, 1e39, 2]}, r"the score 1e\+39 is not a finite number"),
    "score is a word": (WHO | {"scores": [1, "high", 2]}, 'the score "high" is not a finite number'),
    "score is a truth": (WHO | {"scores": [1, True, 2]}, "the score true is not a finite number"),
    "score is a list": (WHO | {"scores": [1, [2], 2]}, r"the score \[2\] is not a finite number"),
    "score is missing": (WHO | {"scores": [1, None, 2]}, "the score null is not a finite number"),
    "ctxs are texts": ({"question": "x", "ctxs": ["a"]}, "`ctxs` is a list of"),
    "ctxs without a score": ({"question": "x", "ctxs": [{"title": "a", "text": "b"}]}, "the score null is not"),
    "twice": (FOUND[1] | {"question": "where is it", "scores": [1]}, "is that of line 2, with other passages"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_record_that_is_none_is_named_by_its_line(opened, case):
    record, reason = BROKEN[case]
    with pytest.raises(UserError, match=rf"^--passages_file .*found\.jsonl, line 4: .*{reason}") as error:
        opened([*FOUND, record])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_that_are_none_are_named(opened, tmp_path):
    with pytest.raises(UserError, match=r"--passages_file .*none is not a file; give one with a line"):
        open_index(rag_config(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has 0 questions"):
        opened([])
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl is not UTF-8"):
        open_index(rag_config(tmp_path / "latin.jsonl"))
    for content in ("{}", "", '{"question": "a"}\n{"question": "b"}\n'):
        (tmp_path / "lines.json").write_text(content)
        with pytest.raises(UserError, match=r"lines.json: a list of records is expected; .* \.jsonl"):
            open_index(rag_config(tmp_path / "lines.json"))
    with pytest.raises(UserError, match=r"found.json, record 2: "):
        opened([FOUND[0], 3], "found.json")


def test_a_question_that_is_not_there_is_named(opened):
    index = opened(FOUND)
    with pytest.raises(UserError, match=r"--passages_file .* has no passages for the question 'why'"):
        index.encode_questions(["who", "why"])
    with pytest.raises(UserError, match=r"for 2 question\(s\) of --evaluation_set, the first on line 2: 'why'"):
        index.expect(["who", "why", "what"], "--evaluation_set")
    index.expect(["who"], "train.source", prefix="question: ")
    assert index.encode_questions(["question: when"]).tolist() == [[1, 2]]


def test_flags_that_ask_for_an_index_too_are_refused(evaluate, rag_folder, data_dir, tmp_path, found):
    for flags, reason in (
        (["--passages_path", "x"], "--passages_path asks for one"),
        (["--index_name", "bm25", "--passages_path", "x"], "--passages_path asks for one"),
        (["--index_name", "exact"], "--index_name exact asks for one"),
    ):
        with pytest.raises(UserError, match=rf"--passages_file .* is read in the place of an index, and {reason}"):
            evaluate("--passages_file", found, *flags)
    words = ["--model_name_or_path", rag_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out"]
    for flags, reason in (
        (["--index_name", "given"], "--index_name given needs --passages_file"),
        (["--passages_file", found, "--freeze_generator"], "nothing would learn"),
        (["--passages_file", found, "--question_encoder_lora_r", 4], "and --index_name given contradict each other"),
    ):
        with pytest.raises(UserError, match=reason):
            finetune_rag.main(finetune_rag.parse_args(list(map(str, [*words, *flags]))))


# --- The scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture
def found(tmp_path):
    """For each of the questions the passage of its answer, and another one."""
    texts = dict(PASSAGES)
    path = tmp_path / "found.jsonl"
    records = [
        {"question": question, "titles": ["oslo", answer], "texts": [texts["oslo"], texts[answer]], "scores": [1.5, 3]}
        for question, answer in QUESTIONS
        if answer != "oslo"
    ]
    records.append({"question": ASKED[-1], "titles": ["oslo"], "texts": [texts["oslo"]], "scores": [2]})
    write_lines(map(json.dumps, records), path)
    return path


@pytest.fixture
def evaluate(rag_folder, tmp_path):
    write_lines(ASKED, tmp_path / "questions")
    write_lines(ANSWERS, tmp_path / "gold")

    def run(*flags, model=rag_folder, to="predictions"):
        words = ["--model_name_or_path", model, "--evaluation_set", tmp_path / "questions", "--gold_data_mode", "ans"]
        words += ["--gold_data_path", tmp_path / "gold", "--predictions_path", tmp_path / to, "--max_length", 8, *flags]
        return eval_rag.main(eval_rag.parse_args(list(map(str, words))))

    return run


def test_what_an_index_found_gives_its_answers(evaluate, tmp_path):
    """The passages and scores of an evaluation as a file: the same answers from the same contexts."""
    evaluate("--n_docs", 3)
    records = [json.loads(line) for line in read_lines(tmp_path / "predictions.jsonl")]
    lines = [
        {name: record[name] for name in ("question", "titles", "scores")}
        | {"texts": [PASSAGES[number][1] for number in record["doc_ids"]]}
        for record in records
    ]
    write_lines(map(json.dumps, lines), tmp_path / "found.jsonl")
    evaluate("--n_docs", 3, "--passages_file", tmp_path / "found.jsonl", to="given")
    assert read_lines(tmp_path / "given") == read_lines(tmp_path / "predictions")
    for line, record in zip(read_lines(tmp_path / "given.jsonl"), records, strict=True):
        given = json.loads(line)
        assert given["titles"] == record["titles"] and given["scores"] == pytest.approx(record["scores"], rel=1e-6)


def test_evaluation_of_passages(evaluate, found, tmp_path):
    flags = ["--passages_file", found, "--eval_mode", "retrieval", "--k", 1, 4]
    assert evaluate(*flags) == {"precision_at_1": 1.0, "precision_at_4": 0.25, "mrr": 1.0}
    assert read_lines(tmp_path / "predictions")[-1] == "oslo"  # it has one, where four are asked for
    written = load_json(tmp_path / "predictions.scores.json")
    assert written["index"] == {"kind": "given passages", "passages": 8, "questions": 8}
    assert written["settings"]["index_name"] == "given"
    found.write_text(found.read_text().replace("1.5", "2.5"))
    with pytest.raises(UserError, match=r"passages_file .* \(its content has changed\)"):
        evaluate(*flags)
    assert 0 <= evaluate("--passages_file", found, "--n_docs", 4, to="answers")["em"] <= 1


def test_evaluation_tells_missing_questions_before_it_begins(evaluate, found, tmp_path):
    write_lines(read_lines(found)[:6], found)
    with pytest.raises(UserError, match=r"no passages for 2 question\(s\) of --evaluation_set, the first on line 7"):
        evaluate("--passages_file", found)
    assert not (tmp_path / "predictions").exists()


def test_finetuning_from_given_passages(evaluate, rag_folder, found, data_dir, tmp_path, caplog):
    words = f"""--model_name_or_path {rag_folder} --data_dir {data_dir} --output_dir {tmp_path / "out"}
    --passages_file {found} --train_batch_size 4 --num_workers 0 --accelerator cpu --n_docs 3 --prefix oslo
    --num_train_epochs 3 --learning_rate 0.01 --max_source_length 32 --num_sanity_val_steps 0 --log_every_n_steps 1"""
    finetune_rag.main(finetune_rag.parse_args(words.split()))
    assert "the question encoder does not learn" in caplog.text
    folder = tmp_path / "out" / "checkpoint3"
    assert_the_generator_alone_learned(rag_folder, folder)
    assert evaluate("--eval_mode", "retrieval", model=folder)["precision_at_1"] == 1.0  # it remembers the file


def test_finetuning_tells_missing_questions_before_it_begins(rag_folder, found, data_dir, tmp_path):
    write_lines(read_lines(found)[1:], found)
    words = ["--model_name_or_path", rag_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out"]
    words += ["--passages_file", found, "--accelerator", "cpu"]
    with pytest.raises(UserError, match=r"question\(s\) of --data_dir .*train.source, the first on line 1: "):
        finetune_rag.main(finetune_rag.parse_args(list(map(str, words))))


def test_contexts_of_fewer_passages_have_no_probability(rag_folder, found):
    retriever = RagKnowledgeRetriever.from_pretrained(rag_folder, index_name="given", passages_file=str(found))
    retriever.init_retrieval()
    model = load_model(str(rag_folder))
    tokens = retriever.question_encoder_tokenizer(list(ASKED[-2:]), return_tensors="pt", padding=True)
    with torch.no_grad():
        contexts = retrieve_contexts(
            model.rag, retriever, tokens["input_ids"], tokens["attention_mask"], 3, texts=list(ASKED[-2:])
        )
    none = float("-inf")
    assert contexts.doc_scores.tolist() == [[3.0, 1.5, none], [2.0, none, none]]
    assert contexts.doc_ids.tolist()[1][1:] == [-1, -1] and contexts.docs[1]["title"] == ["oslo", "", ""]
