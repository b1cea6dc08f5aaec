"""BM25 as an index: scores by its formula, built once, carried by each retriever, used by both scripts."""

import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

import eval_rag
import finetune_rag
from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
from rag.errors import UserError
from rag.files import load_json, read_lines, write_lines
from rag.index import bm25
from rag.index.bm25 import QUERY_SIZE, largest, stop_words, words_of
from rag.index.sources import open_index
from rag.retrieval.actor import RayRetriever, index_config
from rag.retrieval.remote import search_to_send
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import PASSAGES, QUESTIONS, assert_the_generator_alone_learned
from tests.distributed.many_ranks import FORK_SERVER, run_ranks
from tests.knowledge.test_use_own_knowledge_dataset import run as run_knowledge
from tests.retrieval.test_distributed_pytorch_retriever import rag_config

ASKED = [
    "What is the capital of France?",
    "the capital capital of capital",  # counts twice
    "Lisbon, the Tagus and the SEA",
    "xyzzy what is it",  # no word that any passage has
    "",
    "Ákerselva",
]


def save(passages, folder: Path) -> str:
    titles, texts = map(list, zip(*passages, strict=True))
    datasets.Dataset.from_dict({"title": titles, "text": texts}).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def passages_path(tmp_path):
    """Passages without embeddings."""
    return save(PASSAGES, tmp_path / "passages")


@pytest.fixture
def config(passages_path):
    return rag_config(index_name="bm25", passages_path=passages_path)


def opened(config):
    index = open_index(config)
    index.init_index()
    return index


def expected_scores(question: str, passages=PASSAGES, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's BM25 of each passage, by the book (Kamphuis et al. 2020)."""
    documents = [Counter(words_of(f"{title} {text}")) for title, text in passages]
    average = sum(document.total() for document in documents) / len(documents)
    scores = np.zeros(len(documents))
    for word in words_of(question):
        holding = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for i, document in enumerate(documents):
            scores[i] += idf * document[word] / (document[word] + k1 * (1 - b + b * document.total() / average))
    return scores


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_formula_best_first_and_of_equal_ones_the_first(config):
    index = opened(config)
    scores, ids = index.search(index.encode_questions(ASKED), 5)
    assert scores.dtype == np.float32 and ids.dtype == np.int64 and scores.shape == ids.shape == (len(ASKED), 5)
    for question, own_scores, own_ids in zip(ASKED, scores, ids, strict=True):
        right = expected_scores(question).round(5)
        np.testing.assert_array_equal(own_ids, np.argsort(-right, kind="stable")[:5], question)
        np.testing.assert_allclose(own_scores, right[own_ids], atol=1e-4)
    assert ids[3].tolist() == [0, 1, 2, 3, 4] and not scores[3].any()
    assert ids[5, 0] == 7 and scores[5, 0] > 0 and not scores[5, 1:].any()


def test_more_passages_than_there_are(config):
    index = opened(config)
    scores, ids = index.search(index.encode_questions(ASKED[:1]), len(PASSAGES) + 2)
    assert sorted(ids[0, :8]) == list(range(8)) and ids[0, 8:].tolist() == [-1, -1]
    doc_ids, vectors = index.get_top_docs(index.encode_questions(ASKED[:1]), len(PASSAGES) + 2)
    np.testing.assert_array_equal(vectors[0, :, 0], [*scores[0, :8], 0, 0])
    assert index.get_doc_dicts(doc_ids)[0]["title"][8:] == ["", ""]
    assert index.search(index.encode_questions([]), 3)[1].shape == (0, 3)


def test_the_inner_product_of_question_and_passage_is_the_score(config):
    index = opened(config)
    queries = index.encode_questions(ASKED)
    assert queries.dtype == np.float32 and queries.shape == (len(ASKED), QUERY_SIZE)
    doc_ids, vectors = index.get_top_docs(queries, 4)
    scores, ids = index.search(queries, 4)
    np.testing.assert_array_equal(doc_ids, ids)
    np.testing.assert_array_equal(np.einsum("bd,bnd->bn", queries, vectors), scores)


def test_largest_agrees_with_sorting():
    random = np.random.default_rng(0)
    for size, kinds in [(1, 1), (50, 3), (50, 40), (300, 6), (300, 300)]:
        scores = random.integers(0, kinds, size).astype(np.float32)
        for count in (1, 2, size // 2 + 1, size, size + 5):
            np.testing.assert_array_equal(largest(scores, count), np.argsort(-scores, kind="stable")[:count])


def test_words():
    assert words_of("The CAFÉ of São Paulo, in 1984: it's A-1!") == ["cafe", "sao", "paulo", "1984"]
    assert words_of("東京 naïve snake_case") == ["東京", "naive", "snake_case"]
    assert len(stop_words()) == 33


def test_texts_without_blanks_are_cut_into_pairs_of_letters():
    assert words_of("北京是首都。") == ["北京", "京是", "是首", "首都"]
    assert words_of("東京Towerの高さ、333m 山") == ["東京", "tower", "の高", "高さ", "333m", "山"]
    assert words_of("ガラス") == words_of("ｶﾞﾗｽ") == ["ガラ", "ラス"]  # half-width, its marks apart
    assert words_of("กินข้าว") == ["กิน", "นข้", "ข้า", "าว"]  # a letter and the marks above it
    assert words_of("မြန်မာ") == ["မြန်", "န်မ", "မာ"]
    assert words_of("한국의 수도") == [unicodedata.normalize("NFD", word) for word in ("한국의", "수도")]


def test_vowel_signs_do_not_cut_a_word():
    assert words_of("हिन्दी। भाषा") == ["हिन्दी", "भाषा"]
    assert words_of("كِتَاب") == ["كتاب"] and words_of("שָׁלוֹם") == ["שלום"]


def test_texts_with_blanks_have_the_words_that_they_always_had():
    def earlier(text):
        text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text.lower()))
        return [word for word in re.findall(r"\w\w+", text) if word not in stop_words()]

    texts = [text for passage in PASSAGES for text in passage] + [
        "Österreichs Straßen, 3½ km²; l'été à Zürich – «Ça va?»", "Москва и ёлка, Ελλάδα, İstanbul, Huế, naïve_x"
    ]  # fmt: skip
    for text in texts:
        assert words_of(text) == earlier(text)


def test_passages_without_blanks_are_found(tmp_path):
    passages = [
        ("北京", "北京是中华人民共和国的首都。"),
        ("東京", "東京は日本の首都です。"),
        ("กรุงเทพ", "กรุงเทพเป็นเมืองหลวงของไทย"),
        *PASSAGES,
    ]
    index = opened(rag_config(index_name="bm25", passages_path=save(passages, tmp_path / "passages")))
    asked = ["中国的首都是北京吗？", "日本の首都は？", "เมืองหลวงของไทย", "capital of France"]
    scores, ids = index.search(index.encode_questions(asked), 2)
    assert ids[:, 0].tolist() == [0, 1, 2, 3] and (scores[:, 0] > scores[:, 1]).all()
    for question, own_scores, own_ids in zip(asked, scores, ids, strict=True):
        np.testing.assert_allclose(own_scores, expected_scores(question, passages)[own_ids], atol=1e-4)


def test_a_question_of_many_words_keeps_the_first(config):
    queries = open_index(config).encode_questions(["paris " + "rome " * 200])
    assert (queries[0] >= 0).all() and len(set(queries[0, 2:])) == 1 != queries[0, 1]


def test_gold_passages_of_real_questions(shared_data, tmp_path):
    lines = read_lines(shared_data / "nq_gold" / "passages.tsv")
    rows = [line.split("\t") for line in lines]
    index = opened(rag_config(index_name="bm25", passages_path=save([row[1:] for row in rows], tmp_path / "passages")))
    questions = [json.loads(line) for line in read_lines(shared_data / "nq_gold" / "questions.jsonl")[:500]]
    row_of = {row[0]: number for number, row in enumerate(rows)}
    _, ids = index.search(index.encode_questions([question["question"] for question in questions]), 5)
    found = ids == np.array([row_of[question["passage_id"]] for question in questions])[:, None]
    assert found[:, 0].mean() == pytest.approx(0.762, abs=0.01) and found.any(1).mean() == pytest.approx(
        0.906, abs=0.01
    )


# --- Building ---------------------------------------------------------------------------------------------------------


def test_it_is_built_once_beside_the_passages_and_mapped(config, tmp_path, monkeypatch):
    opened(config)
    folder = tmp_path / "passages_bm25"
    described = {"kind": "bm25", "passages": 8, "method": "lucene", "k1": 1.5, "b": 0.75}
    assert described.items() <= load_json(folder / "index.json").items()
    monkeypatch.setattr(bm25, "build_bm25", lambda *_: pytest.fail("built again"))
    index = opened(config)
    maps = Path("/proc/self/maps").read_text()
    assert all(str(file) in maps for file in [*folder.glob("*.npy"), folder / "words.arrow"])
    assert index.description() == {
        "kind": "BM25", "passages": 8, "words": len(index.words), "method": "lucene", "k1": 1.5, "b": 0.75
    }  # fmt: skip
    assert index.num_shards == 1 and len(index) == 8


def test_other_passages_or_settings_make_it_anew(config, tmp_path, monkeypatch):
    config.index_path = str(tmp_path / "index")
    opened(config)
    monkeypatch.setitem(bm25.BM25_SETTINGS, "k1", 0.9)
    index = opened(config)
    scores, ids = index.search(index.encode_questions(ASKED[:1]), 3)
    np.testing.assert_allclose(scores[0], expected_scores(ASKED[0], k1=0.9)[ids[0]], atol=1e-4)
    shutil.rmtree(config.passages_path)
    save([("oslo", "a fjord"), *PASSAGES], Path(config.passages_path))
    index = opened(config)
    assert index.search(index.encode_questions(["fjord"]), 1)[1].tolist() == [[0]]
    assert {path.name for path in tmp_path.iterdir()} == {"index", ".index.lock", "passages"}


def test_an_index_by_another_rule_of_words_is_made_anew(config, tmp_path):
    opened(config)
    (path,) = tmp_path.glob("*_bm25/index.json")
    description = load_json(path)
    del description["words_are"]  # as before there were pairs of letters
    path.write_text(json.dumps(description))
    opened(config)
    assert load_json(path)["words_are"] == bm25.WORDS_ARE


def test_a_missing_title_has_no_words(tmp_path):
    datasets.Dataset.from_dict({"title": [None, "none"], "text": ["a fjord", "x y z"]}).save_to_disk(tmp_path / "p")
    index = opened(rag_config(index_name="bm25", passages_path=str(tmp_path / "p")))
    scores, _ = index.search(index.encode_questions(["none"]), 2)
    assert (scores[0] > 0).tolist() == [True, False]


@pytest.mark.parametrize("name", ["words.arrow", "data.csc.index.npy", "indices.csc.index.npy", "params.index.json"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_damaged_index_is_told(config, tmp_path, name, content, with_checksums):
    opened(config)
    (folder,) = tmp_path.glob("*_bm25")
    if not with_checksums:
        description = load_json(folder / "index.json")
        (folder / "index.json").write_text(json.dumps({**description, "checksums": {}}))
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--index_path {folder} is damaged") as error:
        opened(config)
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_told(config, tmp_path):
    opened(config)
    (file,) = tmp_path.glob("*_bm25/data.csc*.npy")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        opened(config)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_an_index_json_of_another_shape_is_told(config, tmp_path, content):
    opened(config)
    (path,) = tmp_path.glob("*_bm25/index.json")
    path.write_text(content)
    with pytest.raises(UserError, match=r"its index.json is damaged; remove the folder"):
        opened(config)


def test_passages_that_are_appended_are_found_too(flags, tmp_path):
    knowledge = run_knowledge(flags)
    config = rag_config(index_name="bm25", passages_path=knowledge.passages_path)
    assert len(opened(config)) == 11
    more = tmp_path / "more.tsv"
    more.write_text("bergen\tbergen lies behind seven mountains\n")
    run_knowledge(flags, **{"--csv_path": more, "--append": True})
    index = opened(config)
    assert len(index) == 12 and index.search(index.encode_questions(["seven mountains"]), 1)[1].tolist() == [[11]]


def test_a_killed_build_leaves_nothing_that_looks_whole(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bm25, "save_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        open_index(config)
    assert not (tmp_path / "passages_bm25").exists()
    opened(config)


def _open_and_count(config, builds) -> None:
    build = bm25.build_bm25

    def counted(*args):
        with builds.get_lock():
            builds.value += 1
        build(*args)

    bm25.build_bm25 = counted
    opened(config)


def test_many_processes_build_it_once(config):
    builds = FORK_SERVER.Value("i", 0)
    processes = [FORK_SERVER.Process(target=_open_and_count, args=(config, builds)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 3 and builds.value == 1


def test_a_file_in_the_way_is_left_alone(config, tmp_path):
    (tmp_path / "passages_bm25").write_text("mine")
    with pytest.raises(UserError, match="_bm25 holds something else than a BM25 index; give another folder"):
        open_index(config)
    assert (tmp_path / "passages_bm25").read_text() == "mine"


def test_what_is_in_the_way_is_named(config, tmp_path, knowledge):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    config.index_path = str(tmp_path / "mine")
    with pytest.raises(UserError, match="mine holds something else than a BM25 index; give another folder"):
        open_index(config)
    (tmp_path / "mine" / "index.json").write_text("{}")
    with pytest.raises(UserError, match="mine holds an index of another kind"):
        open_index(config)
    (tmp_path / "file").write_text("")
    config.index_path = str(tmp_path / "file" / "index")
    with pytest.raises(UserError, match=r"--index_path .*index cannot be written \(File exists: .*/file\)"):
        open_index(config)
    for path in (None, str(tmp_path / "none")):
        with pytest.raises(UserError, match="is not a folder of passages, which BM25 needs"):
            open_index(rag_config(index_name="bm25", passages_path=path))
    # A checkpoint that remembers a FAISS file.
    config.index_path = knowledge["index_path"]
    assert open_index(config).folder == tmp_path / "passages_bm25"
    datasets.Dataset.from_dict({"body": ["text"]}).save_to_disk(tmp_path / "bodies")
    with pytest.raises(UserError, match=r"lack the column\(s\) title, text"):
        open_index(rag_config(index_name="bm25", passages_path=str(tmp_path / "bodies")))


def test_no_word_and_more_words_than_a_query_can_tell_apart(config, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="have 0 different words"):
        open_index(rag_config(index_name="bm25", passages_path=save([("", "?"), ("the", "of")], tmp_path / "silent")))
    monkeypatch.setattr(bm25, "MOST_WORDS", 10)
    with pytest.raises(UserError, match=r"have \d\d different words, but BM25 can tell from 1 to 10 apart"):
        open_index(config)
    assert not list(tmp_path.glob("*_bm25"))


# --- Retrievers -------------------------------------------------------------------------------------------------------


def _retrieve(rank: int, config, questions: list[list[str]]):
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    return [retriever.retrieve(retriever.index.encode_questions(own), 3) for own in (questions[rank], questions[-1])]


def test_each_retriever_gives_what_one_process_finds(config, tmp_path):
    alone = RagKnowledgeRetriever(config, None, None)
    shares = [ASKED[:2], ASKED[2:], []]
    for rank, answers in enumerate(run_ranks(_retrieve, 2, tmp_path, config, shares)):
        for own, (vectors, ids, docs) in zip((shares[rank], []), answers, strict=True):
            right = alone.retrieve(alone.index.encode_questions(own), 3)
            np.testing.assert_array_equal(vectors, right[0])
            np.testing.assert_array_equal(ids, right[1])
            assert docs == right[2]
    actor = RayRetriever(index_config(config))
    queries = alone.index.encode_questions(ASKED)
    for one, two in zip(actor.retrieve(queries, 3), search_to_send(alone.index, queries, 3)[1:], strict=True):
        np.testing.assert_array_equal(one, two)


def test_scores_are_the_logits_and_the_question_encoder_is_not_asked(
    config, rag_sequence, bert_tokenizer, bart_tokenizer, monkeypatch
):
    config.max_combined_length = 48
    retriever = RagKnowledgeRetriever(config, bert_tokenizer, bart_tokenizer)
    monkeypatch.setattr(rag_sequence.question_encoder, "forward", lambda *_, **__: pytest.fail("encoded"))
    tokens = bert_tokenizer(ASKED[:3], padding=True, return_tensors="pt")
    for texts in (None, ASKED[:3]):
        found = retrieve_contexts(rag_sequence.rag, retriever, tokens.input_ids, tokens.attention_mask, 3, texts)
        right = np.array([expected_scores(question)[ids] for question, ids in zip(ASKED, found.doc_ids, strict=False)])
        np.testing.assert_allclose(found.doc_scores.numpy(), right, atol=1e-4)
        assert not found.doc_scores.requires_grad and found.docs[0]["title"][0] == "paris"
    # Words that the tokenizer does not know are found by the text.
    unknown = bert_tokenizer(["Ákerselva"], return_tensors="pt")
    found = retrieve_contexts(rag_sequence.rag, retriever, *unknown.values(), 1, ["Akerselva"])
    assert found.docs[0]["title"] == ["oslo"]


# --- The scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture
def evaluate(rag_folder, tmp_path, passages_path):
    asked, answers = zip(*QUESTIONS, strict=True)
    write_lines(asked, tmp_path / "questions")
    write_lines(answers, tmp_path / "gold")

    def run(*flags, model=rag_folder, index=("--index_name", "bm25", "--passages_path", passages_path)):
        words = ["--model_name_or_path", model, "--evaluation_set", tmp_path / "questions", "--gold_data_mode", "ans"]
        words += ["--gold_data_path", tmp_path / "gold", "--predictions_path", tmp_path / "found", *index, *flags]
        return eval_rag.main(eval_rag.parse_args(list(map(str, words))))

    return run


def test_evaluation(evaluate, tmp_path, capsys):
    scores = evaluate("--eval_mode", "retrieval", "--k", 1, 5)
    assert scores == {"precision_at_1": 1.0, "precision_at_5": 0.2, "mrr": 1.0}
    assert " (rag_sequence), index BM25, n_docs " in capsys.readouterr().out
    index = load_json(tmp_path / "found.scores.json")["index"]
    assert index["passages"] == 8 and index["k1"] == 1.5
    assert evaluate("--eval_mode", "retrieval", "--k", 1, 5) == scores  # scored again
    assert 0 <= evaluate("--recalculate", "--num_beams", 2, "--max_length", 5)["em"] <= 1


def test_finetuning_leaves_the_question_encoder_as_it_is(evaluate, rag_folder, passages_path, data_dir, tmp_path):
    words = f"""--model_name_or_path {rag_folder} --data_dir {data_dir} --output_dir {tmp_path / "out"}
    --index_name bm25 --passages_path {passages_path} --train_batch_size 4 --num_workers 0 --accelerator cpu --n_docs 2
    --num_train_epochs 3 --learning_rate 0.01 --max_source_length 32 --num_sanity_val_steps 0 --log_every_n_steps 1"""
    finetune_rag.main(finetune_rag.parse_args(words.split()))
    folder = tmp_path / "out" / "checkpoint3"
    assert_the_generator_alone_learned(rag_folder, folder)
    assert evaluate("--eval_mode", "retrieval", "--k", 1, model=folder, index=())["precision_at_1"] == 1.0


def test_finetuning_asks_for_passages(rag_folder, data_dir, tmp_path):
    words = ["--model_name_or_path", rag_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="--index_name bm25 needs --passages_path"):
        finetune_rag.main(finetune_rag.parse_args([*map(str, words), "--index_name", "bm25"]))
