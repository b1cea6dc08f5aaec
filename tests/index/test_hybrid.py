"""Dense and BM25 fused: the formulas by plain numpy, gradients, every retriever and script."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RagConfig

import eval_rag
import finetune_rag
from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
from rag.errors import UserError
from rag.files import load_json, write_lines
from rag.index.arguments import SearchArguments
from rag.index.bm25 import QUERY_SIZE
from rag.index.hybrid import FUSIONS
from rag.index.sources import open_index
from rag.retrieval.actor import RayRetriever, index_config
from rag.retrieval.finding import find_passages, learns_from
from rag.retrieval.remote import search_to_send
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, PASSAGES, QUESTIONS, assert_the_generator_alone_learned
from tests.distributed.many_ranks import run_ranks
from tests.index.test_bm25 import ASKED, expected_scores
from tests.retrieval.test_distributed_pytorch_retriever import rag_config, write_shards

IDLE = "is for --index_name hybrid, not"
FINETUNING = """--train_batch_size 4 --num_workers 0 --accelerator cpu --n_docs 2 --num_train_epochs 2
--learning_rate 0.01 --max_source_length 32 --num_sanity_val_steps 0 --log_every_n_steps 1""".split()  # noqa: SIM905
VECTORS = np.random.default_rng(5).standard_normal((len(ASKED), DIMENSION)).astype(np.float32)
FUSION_CASES = [
    ("weighted", 0.5),
    ("weighted", 0.8),
    ("weighted", 1.0),
    ("weighted", 0.0),
    ("ranks", 0.5),
    ("ranks", 0.3),
]


@pytest.fixture(scope="module")
def own_knowledge(knowledge, tmp_path_factory) -> dict:
    """A copy, beside which BM25's index may be built."""
    folder = tmp_path_factory.mktemp("own") / "knowledge"
    shutil.copytree(Path(knowledge["passages_path"]).parent, folder)
    return {name: str(folder / Path(knowledge[name]).name) for name in ("passages_path", "index_path")}


@pytest.fixture
def config(own_knowledge):
    return rag_config(index_name="hybrid", **own_knowledge)


def opened(config, **settings):
    for name, value in settings.items():
        setattr(config, name, value)
    index = open_index(config)
    index.init_index()
    return index


def queries_of(index, questions=ASKED, vectors=VECTORS) -> np.ndarray:
    return np.concatenate([vectors, index.encode_questions(questions)], axis=1)


def expected(vector, question, embeddings, fusion: str, weight: float, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates' rows and fused scores, best first, as the module's text has them."""
    dense, words = embeddings @ vector, expected_scores(question)
    by_words = [row for row in np.argsort(-words.round(5), kind="stable")[:depth] if words[row] > 0]
    rows = np.array(sorted({*np.argsort(-dense)[:depth].tolist(), *by_words}))
    d, b = dense[rows], words[rows]
    if fusion == "weighted":
        z = [(score - score.mean()) / score.std() if score.std() > 1e-9 else 0 * score for score in (d, b)]
        fused = weight * z[0] + (1 - weight) * z[1]
    else:
        rank_d, rank_b = (np.argsort(np.argsort(-score.round(5), kind="stable"), kind="stable") + 1 for score in (d, b))
        fused = weight / (60 + rank_d) + (1 - weight) * np.where(b > 0, 1 / (60 + rank_b), 0)
        fused = (fused - fused.mean()) / fused.std()
    fused = fused * d.std()
    order = np.argsort(-fused.round(5), kind="stable")
    return rows[order], fused[order]


@pytest.mark.parametrize(("fusion", "weight"), FUSION_CASES)
@pytest.mark.parametrize("depth", [2, 3, 100])
def test_scores_are_those_of_the_formulas(config, fusion, weight, depth):
    index = opened(config, fusion=fusion, dense_weight=weight, hybrid_depth=depth)
    embeddings = index.dense.embeddings.gather(np.arange(len(PASSAGES))).astype(np.float64)
    scores, ids = index.search(queries_of(index), 2)
    assert scores.dtype == np.float32 and ids.dtype == np.int64 and set(FUSIONS) == {"weighted", "ranks"}
    for row, question in enumerate(ASKED):
        rows, fused = expected(VECTORS[row].astype(np.float64), question, embeddings, fusion, weight, depth)
        np.testing.assert_allclose(scores[row], fused[:2], atol=1e-4, err_msg=question)
        unequal = abs(fused[0] - fused[1]) > 1e-4 and (len(fused) < 3 or abs(fused[1] - fused[2]) > 1e-4)
        if unequal:
            np.testing.assert_array_equal(ids[row], rows[:2], question)


@pytest.mark.parametrize(("fusion", "weight"), FUSION_CASES)
def test_the_inner_product_of_question_and_passage_is_the_score(config, fusion, weight):
    index = opened(config, fusion=fusion, dense_weight=weight, hybrid_depth=4)
    queries = queries_of(index)
    assert queries.shape == (len(ASKED), DIMENSION + QUERY_SIZE) and index.vector_size == queries.shape[1]
    ids, vectors = index.get_top_docs(queries, 4)
    scores, again = index.search(queries, 4)
    np.testing.assert_array_equal(ids, again)
    assert (ids >= 0).all() and vectors.dtype == np.float32
    np.testing.assert_allclose(np.einsum("bd,bnd->bn", queries, vectors), scores, atol=1e-4)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_dense_scores_alone_are_the_dense_indexs_probabilities(config, knowledge):
    index, dense = opened(config, dense_weight=1.0), opened(rag_config(**knowledge))
    fused, ids = index.search(queries_of(index), 5)
    scores, dense_ids = dense.search(VECTORS, 5)
    np.testing.assert_array_equal(ids, dense_ids)
    np.testing.assert_allclose(fused - fused[:, :1], scores - scores[:, :1], atol=1e-4)


def test_fewer_candidates_than_passages_wanted(config):
    index = opened(config, hybrid_depth=1)
    scores, ids = index.search(queries_of(index), len(PASSAGES) + 2)
    assert [sorted(row) for row in ids] == [[-1, -1, *range(len(PASSAGES))]] * len(ASKED)
    assert (scores[ids < 0] == np.finfo(np.float32).min).all()
    ids, vectors = index.get_top_docs(queries_of(index), len(PASSAGES) + 2)
    assert not vectors[ids < 0].any() and index.get_doc_dicts(ids)[0]["title"][8:] == ["", ""]
    none = index.get_top_docs(queries_of(index, [], VECTORS[:0]), 3)
    assert none[0].shape == (0, 3) and none[1].shape == (0, 3, index.vector_size)


def test_one_candidate_alone_and_a_question_without_words(tmp_path, config):
    index = opened(config, hybrid_depth=1)
    scores, ids = index.search(queries_of(index, ["xyzzy"] * len(ASKED)), 1)
    assert (ids >= 0).all() and np.isfinite(scores).all()
    np.testing.assert_array_equal(ids, index.dense.search(VECTORS, 1)[1])


def test_settings_that_are_left_out(config):
    index = opened(config)
    assert index.description() == {
        **opened(rag_config(index_name="custom", passages_path=config.passages_path, index_path=config.index_path))
        .description(),
        "kind": "IndexHNSWFlat and BM25", "fusion": "weighted", "dense_weight": 0.6, "hybrid_depth": 100,
    }  # fmt: skip


def test_shards_and_a_device_search_the_same_passages(config, tmp_path):
    right = opened(config).search(queries_of(opened(config)), 3)[1]
    sharded = opened(rag_config(
        index_name="hybrid", passages_path=config.passages_path, index_path=write_shards(config_of(config), tmp_path)
    ))  # fmt: skip
    assert sharded.num_shards == 1
    on_device = opened(config, index_device="cpu")
    assert on_device.dense.device_search is not None and not on_device.can_be_sliced
    for index in (sharded, on_device):
        np.testing.assert_array_equal(index.search(queries_of(index), 3)[1], right)


def config_of(config):
    return rag_config(index_name="custom", passages_path=config.passages_path, index_path=config.index_path)


def test_damage_of_a_part_is_told(config, tmp_path):
    shutil.copytree(Path(config.passages_path).parent, tmp_path / "copy")
    moved = {
        name: str(tmp_path / "copy" / Path(getattr(config, name)).name) for name in ("passages_path", "index_path")
    }
    damaged = rag_config(index_name="hybrid", **moved)
    opened(damaged)
    Path(moved["index_path"]).write_bytes(b"no index")
    with pytest.raises(UserError, match=f"--index_path {moved['index_path']}"):
        opened(damaged)
    shutil.copy(config.index_path, moved["index_path"])
    (words,) = (tmp_path / "copy").glob("*_bm25")
    (words / "words.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=f"--index_path {words} is damaged"):
        opened(damaged)


# --- Retrievers -------------------------------------------------------------------------------------------------------


def _retrieve(rank: int, config, shares: list[np.ndarray]):
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    return [retriever.retrieve(own, 3) for own in (shares[rank], shares[-1])]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_retriever_gives_what_one_process_finds(config, fusion, tmp_path):
    config.fusion = fusion
    alone = RagKnowledgeRetriever(config, None, None)
    queries = queries_of(alone.index)
    shares = [queries[:2], queries[2:], queries[:0]]
    for rank, answers in enumerate(run_ranks(_retrieve, 2, tmp_path, config, shares)):
        for own, (vectors, ids, docs) in zip((shares[rank], shares[-1]), answers, strict=True):
            right = alone.retrieve(own, 3)
            np.testing.assert_array_equal(vectors, right[0])
            np.testing.assert_array_equal(ids, right[1])
            assert docs == right[2]
    actor = RayRetriever(index_config(config))
    for one, two in zip(actor.retrieve(queries, 3), search_to_send(alone.index, queries, 3)[1:], strict=True):
        np.testing.assert_array_equal(one, two)


def test_question_vectors_of_another_length_are_told(config):
    retriever = RagKnowledgeRetriever(config, None, None)
    with pytest.raises(UserError, match="the question vectors have shape"):
        retriever.retrieve(VECTORS, 2)


def test_the_question_encoder_learns_from_the_dense_part_alone(config, rag_sequence, bert_tokenizer, bart_tokenizer):
    config.max_combined_length = 48
    tokens = bert_tokenizer(ASKED[:3], padding=True, return_tensors="pt")
    encoder, gradients = rag_sequence.rag.question_encoder, {}
    for name, settings in {
        "half": {"dense_weight": 0.5}, "all": {"dense_weight": 1.0}, "ranks": {"fusion": "ranks"}
    }.items():  # fmt: skip
        for flag, value in ({"fusion": "weighted", "dense_weight": 0.5} | settings).items():
            setattr(config, flag, value)
        retriever = RagKnowledgeRetriever(config, bert_tokenizer, bart_tokenizer)
        assert learns_from(retriever) == (name != "ranks")
        encoder.zero_grad()
        found = find_passages(encoder, retriever, tokens, ASKED[:3], len(PASSAGES))
        scores, ids = retriever.index.search(found.queries.detach().numpy(), len(PASSAGES))
        np.testing.assert_array_equal(found.doc_ids, ids)
        np.testing.assert_allclose(found.scores.detach().numpy(), scores, atol=1e-4)
        back = torch.from_numpy(np.argsort(found.doc_ids, axis=1))
        found.scores.gather(1, back)[:, 0].sum().backward()
        gradients[name] = [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]
    encoder.zero_grad()
    vectors = encoder(**tokens)[0]
    (
        vectors @ torch.from_numpy(retriever.index.dense.embeddings.gather(np.zeros(1, dtype=np.int64))[0])
    ).sum().backward()
    plain = [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]
    encoder.zero_grad()
    for share, name in ((1.0, "all"), (0.5, "half"), (0.0, "ranks")):
        for own, other in zip(gradients[name], plain, strict=True):
            torch.testing.assert_close(own, share * other, atol=1e-5, rtol=1e-4)


# --- The scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture
def evaluate(rag_folder, tmp_path, own_knowledge):
    asked, answers = zip(*QUESTIONS, strict=True)
    write_lines(asked, tmp_path / "questions")
    write_lines(answers, tmp_path / "gold")

    def run(*flags):
        words = ["--model_name_or_path", rag_folder, "--evaluation_set", tmp_path / "questions", "--gold_data_mode"]
        words += ["ans", "--gold_data_path", tmp_path / "gold", "--predictions_path", tmp_path / "found"]
        words += ["--index_name", "hybrid", *(f"--{name}={path}" for name, path in own_knowledge.items()), *flags]
        return eval_rag.main(eval_rag.parse_args(list(map(str, words))))

    return run


def test_evaluation(evaluate, tmp_path, capsys):
    retrieval = ("--eval_mode", "retrieval", "--k", 1, 5)
    scores = evaluate(*retrieval, "--dense_weight", 0.0)
    assert scores["precision_at_1"] == 1.0  # BM25's
    assert "index HNSWFlat and BM25" in capsys.readouterr().out
    made = load_json(tmp_path / "found.scores.json")
    assert made["index"]["dense_weight"] == made["settings"]["dense_weight"] == 0.0
    with pytest.raises(UserError, match=r"dense_weight 0.0 \(now 0.6\)"):
        evaluate(*retrieval)
    with pytest.raises(UserError, match=r"fusion weighted \(now ranks\)"):
        evaluate(*retrieval, "--dense_weight", 0.0, "--fusion", "ranks")
    assert 0 <= evaluate("--recalculate", "--num_beams", 2, "--max_length", 5, "--fusion", "ranks")["em"] <= 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_finetuning(fusion, rag_folder, data_dir, tmp_path, own_knowledge):
    flags = ["--model_name_or_path", rag_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *FINETUNING]
    flags += [
        "--index_name",
        "hybrid",
        "--fusion",
        fusion,
        *(f"--{name}={path}" for name, path in own_knowledge.items()),
    ]
    finetune_rag.main(finetune_rag.parse_args(list(map(str, flags))))
    exported = tmp_path / "out" / "checkpoint2"
    assert load_json(exported / "config.json")["fusion"] == fusion
    if fusion == "ranks":
        assert_the_generator_alone_learned(rag_folder, exported)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"index_name": "hybrid", "dense_weight": 1.5}, "--dense_weight 1.5 must be from 0 to 1"),
        ({"index_name": "hybrid", "dense_weight": float("nan")}, "--dense_weight nan must be from 0 to 1"),
        ({"index_name": "hybrid", "hybrid_depth": 0}, "--hybrid_depth 0 must be from 1 to 2,147,483,647"),
        ({"index_name": "bm25", "fusion": "ranks"}, f"--fusion ranks {IDLE} bm25; leave it out"),
        ({"passages_path": "p", "dense_weight": 0.0}, f"--dense_weight 0.0 {IDLE} custom; leave it out"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_meant(flags, problem):
    assert SearchArguments(**flags).search_problems() == [problem]


def test_fusion_of_what_the_checkpoint_searches_otherwise_is_refused(rag_folder):
    config = RagConfig.from_pretrained(rag_folder)
    assert config.index_name == "custom"
    with pytest.raises(UserError, match=r"^--fusion ranks is for --index_name hybrid, not custom; leave it out$"):
        SearchArguments(fusion="ranks").apply_to(config)


def test_both_paths_are_needed():
    (problem,) = SearchArguments(index_name="hybrid", passages_path="p").path_problems()
    assert problem.startswith("--index_name hybrid needs --passages_path and --index_path")
    assert SearchArguments(index_name="hybrid", passages_path="hub:me/mine").path_problems() == []


@pytest.mark.parametrize("flags", [["--fusion", "ranks"], ["--dense_weight", "0"]])
def test_nothing_would_learn(flags, rag_folder, data_dir, tmp_path):
    words = ["--model_name_or_path", rag_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out"]
    words += ["--index_name", "hybrid", "--passages_path", "p", "--index_path", "i", "--freeze_generator", *flags]
    with pytest.raises(UserError, match=f"{' '.join(flags)}.*: nothing would learn; leave one out"):
        finetune_rag.parse_args(list(map(str, words)))
