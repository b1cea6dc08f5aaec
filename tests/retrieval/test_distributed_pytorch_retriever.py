"""Rank 0 searches for all: the same results as one process, and no rank that waits for ever."""

import os
import pickle
import signal
import time

import faiss
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from transformers import BartConfig, DPRConfig, RagConfig

from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
from rag.distributed.ranks import RankError
from rag.errors import UserError
from rag.index import device_search
from rag.index.index_files import shard_path, write_faiss_index
from rag.index.legacy_dpr import IDS_FILE, INDEX_FILE, PASSAGES_PICKLE
from rag.index.sources import open_index
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, PASSAGES
from tests.distributed.many_ranks import run_ranks

# Questions on each of three ranks, and passages a question: ragged, empty on one rank or on all, more than there are.
ROUNDS = [((3, 3, 3), 2), ((5, 1, 2), 2), ((2, 4, 0), 5), ((0, 3, 1), 5), ((0, 0, 0), 1), ((1, 1, 1), len(PASSAGES))]


def rag_config(**index) -> RagConfig:
    return RagConfig(
        question_encoder=DPRConfig(hidden_size=DIMENSION, num_attention_heads=2).to_dict(),
        generator=BartConfig().to_dict(),
        retrieval_vector_size=DIMENSION,
        **index,
    )


@pytest.fixture(scope="module")
def config(knowledge):
    return rag_config(**knowledge)


@pytest.fixture
def legacy_config(tmp_path, monkeypatch):
    """A folder as DPR left its index: pickled passages and row numbers, vectors one longer for the inner product."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    rows = {str(row): (text, title) for row, (title, text) in enumerate(PASSAGES)}
    index = faiss.IndexHNSWFlat(DIMENSION + 1, 8)
    index.add(np.random.default_rng(0).standard_normal((len(PASSAGES), DIMENSION + 1), dtype=np.float32))
    faiss.write_index(index, str(tmp_path / INDEX_FILE))
    (tmp_path / PASSAGES_PICKLE).write_bytes(pickle.dumps(rows))
    (tmp_path / IDS_FILE).write_bytes(pickle.dumps([str(row) for row in reversed(range(len(PASSAGES)))]))
    return rag_config(index_name="legacy", index_path=str(tmp_path))


@pytest.fixture
def sharded_config(config, tmp_path):
    """The same passages with an exact index in three shards."""
    return rag_config(
        index_name="custom", passages_path=config.passages_path, index_path=write_shards(config, tmp_path)
    )


def write_shards(config, folder) -> str:
    embeddings = open_index(config).embeddings
    for start, end in [(0, 3), (3, 4), (4, 8)]:
        index = faiss.IndexFlatIP(DIMENSION)
        index.add(embeddings.gather(np.arange(start, end)))
        write_faiss_index(index, shard_path(folder, start, end))
    return str(folder)


@pytest.fixture
def device_config(config):
    return rag_config(
        index_name="custom", passages_path=config.passages_path, index_path=config.index_path, index_device="cpu"
    )


@pytest.fixture
def int8_config(device_config):
    device_config.index_precision = "int8"
    return device_config


@pytest.fixture
def ties_config(tmp_path):
    """Twenty passages of which many have equal scores: whole numbers, whose products are exact."""
    vectors = np.random.default_rng(0).integers(-1, 2, (20, DIMENSION)).astype(np.float32)
    rows = {"title": [str(row) for row in range(20)], "text": ["a"] * 20, "embeddings": vectors.tolist()}
    features = Features(
        {"title": Value("string"), "text": Value("string"), "embeddings": List(Value("float32"), length=DIMENSION)}
    )
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "passages")
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(vectors)
    write_faiss_index(index, tmp_path / "ties.faiss")
    paths = {"passages_path": str(tmp_path / "passages"), "index_path": str(tmp_path / "ties.faiss")}
    return rag_config(index_name="custom", index_device="cpu", **paths)


def queries_of(rank: int, round_number: int) -> np.ndarray:
    rows = ROUNDS[round_number][0][rank]
    return np.random.default_rng((rank, round_number)).standard_normal((rows, DIMENSION), dtype=np.float32)


def all_rounds(rank: int, config) -> list:
    os.environ["TRUST_REMOTE_CODE"] = "True"
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval(distributed_port=1234)
    retriever.init_retrieval()
    in_slices = getattr(config, "index_device", None) == "cpu"
    assert retriever.index.is_initialized() == (rank == 0 or in_slices)
    if in_slices:
        assert retriever.index.rows == range(*[(0, 2), (2, 5), (5, 8)][rank])
    return [retriever.retrieve(queries_of(rank, number), n_docs) for number, (_, n_docs) in enumerate(ROUNDS)]


@pytest.mark.parametrize("kind", ["config", "legacy_config", "sharded_config", "device_config", "int8_config"])
def test_every_rank_gets_what_one_process_gets(kind, request, tmp_path):
    config = request.getfixturevalue(kind)
    alone = RagKnowledgeRetriever(config, None, None)
    for rank, rounds in enumerate(run_ranks(all_rounds, 3, tmp_path, config)):
        assert isinstance(rounds, list), rounds
        for number, (embeds, ids, docs) in enumerate(rounds):
            assert embeds.dtype == np.float32 and ids.dtype == np.int64
            queries, n_docs = queries_of(rank, number), ROUNDS[number][1]
            assert ids.shape == (len(queries), n_docs) and embeds.shape == (*ids.shape, DIMENSION)
            if len(queries):
                expected_embeds, expected_ids, expected_docs = alone.retrieve(queries, n_docs)
                np.testing.assert_array_equal(ids, expected_ids)
                np.testing.assert_array_equal(embeds, expected_embeds)
                assert docs == expected_docs


def search_with_ties(rank: int, config) -> np.ndarray:
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    return retriever.retrieve(np.round(queries_of(rank, 0)), 7)[1]


def test_ties_between_slices_are_settled_as_on_one_device(ties_config, tmp_path):
    alone = RagKnowledgeRetriever(ties_config, None, None)
    for rank, ids in enumerate(run_ranks(search_with_ties, 2, tmp_path, ties_config)):
        queries = np.round(queries_of(rank, 0))
        np.testing.assert_array_equal(ids, alone.retrieve(queries, 7)[1])
        scores = np.take_along_axis(queries @ alone.index.embeddings.gather(np.arange(20)).T, ids, axis=1)
        assert (np.diff(scores) <= 0).all() and (np.diff(scores) == 0).any()
        assert (np.diff(ids)[np.diff(scores) == 0] > 0).all()  # the lower row first


def search_where_a_slice_finds_no_room(rank: int, config):
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    if rank == 1:
        device_search.usable_device = no_device
    retriever.init_retrieval()
    index = retriever.index
    ids = [retriever.retrieve(queries_of(rank, number), n_docs)[1] for number, (_, n_docs) in enumerate(ROUNDS)]
    return ids, index.fallback, index.device_search is None and (index.faiss_index is not None) == (rank == 0)


def no_device(name: str):
    raise device_search.DeviceUnavailableError("too little memory")


def test_where_one_rank_cannot_hold_its_slice_rank_zero_searches_by_faiss(device_config, tmp_path):
    alone = RagKnowledgeRetriever(device_config, None, None)
    for rank, (found, fallback, is_right) in enumerate(
        run_ranks(search_where_a_slice_finds_no_room, 2, tmp_path, device_config)
    ):
        assert fallback == "--index_device cpu: too little memory; FAISS searches instead" and is_right
        for number, ids in enumerate(found):
            queries, n_docs = queries_of(rank, number), ROUNDS[number][1]
            np.testing.assert_array_equal(ids, alone.index.search(queries, n_docs)[1])


def test_one_process_needs_no_group(config):
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    retriever.init_retrieval()
    alone = RagKnowledgeRetriever(config, None, None)
    np.testing.assert_array_equal(retriever.retrieve(queries_of(0, 0), 3)[1], alone.retrieve(queries_of(0, 0), 3)[1])


def other_n_docs(rank: int, config) -> None:
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    retriever.retrieve(queries_of(rank, 0), n_docs=3)
    retriever.retrieve(queries_of(rank, 0), n_docs=2 + (rank == 1))


def test_ranks_that_ask_for_different_numbers_of_passages_are_told(config, tmp_path):
    for error in run_ranks(other_n_docs, 3, tmp_path, config):
        assert isinstance(error, RankError)
        assert "retrieval 2: rank 1 asks for 3 passages a question, rank 0 for 2" in str(error)


def failing_search(rank: int, config, failing: int) -> None:
    retriever = RagPyTorchDistributedRetriever(config, None, None)
    retriever.init_retrieval()
    if rank == failing:
        retriever.index.search = lambda queries, n_docs: 1 // 0
    retriever.retrieve(queries_of(rank, 0), n_docs=3)


def test_an_error_in_the_search_reaches_every_rank(config, tmp_path):
    errors = run_ranks(failing_search, 3, tmp_path, config, 0)
    assert isinstance(errors[0], ZeroDivisionError)
    for error in errors[1:]:
        assert isinstance(error, RankError)
        assert "retrieval 1: rank 0 failed: ZeroDivisionError" in str(error)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_in_the_search_of_a_slice_reaches_every_rank(device_config, tmp_path, failing):
    errors = run_ranks(failing_search, 3, tmp_path, device_config, failing)
    if failing == 0:
        assert isinstance(errors.pop(0), ZeroDivisionError)
    for error in errors:
        assert isinstance(error, RankError)
        assert f"retrieval 1: rank {failing} failed: ZeroDivisionError" in str(error)


def start(rank: int, config) -> None:
    RagPyTorchDistributedRetriever(config, None, None).init_retrieval()


def test_a_mistake_of_the_users_reaches_every_rank(knowledge, tmp_path):
    broken = tmp_path / "broken.faiss"
    broken.write_bytes(b"IHNf")
    config = rag_config(**knowledge | {"index_path": str(broken)})
    for error in run_ranks(start, 2, tmp_path, config):
        assert isinstance(error, UserError) and "--index_path" in str(error)


def lose_a_rank(rank: int, config, how: str):
    """Rank 1 does not come to the second retrieval; what the others hear, and after how many seconds."""
    retriever = RagPyTorchDistributedRetriever(config, None, None, timeout=1)
    retriever.init_retrieval()
    retriever.retrieve(queries_of(rank, 0), n_docs=3)
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "leaves":
        return None
    if rank == 1 and how == "late":
        time.sleep(4)
        return None
    start = time.monotonic()
    try:
        retriever.retrieve(queries_of(rank, 0), n_docs=3)
    except RankError as error:
        return str(error), time.monotonic() - start


@pytest.mark.parametrize("how", ["killed", "leaves", "late"])
def test_a_lost_rank_ends_the_others_in_time(config, tmp_path, how):
    (message, seconds), _, (other_message, other_seconds) = run_ranks(lose_a_rank, 3, tmp_path, config, how)
    assert "retrieval 2: rank 1 " in message
    assert "retrieval 2: rank " in other_message
    assert seconds < 3.5 and other_seconds < 3.5  # before the one that is late
    if how != "late":  # a silence ends gloo's connections, and with them what rank 0 could say of it
        assert "rank 1 " in other_message


def lose_a_slice(rank: int, config):
    """Rank 1 dies while it searches its part; what the others hear, and after how many seconds."""
    retriever = RagPyTorchDistributedRetriever(config, None, None, timeout=1)
    retriever.init_retrieval()
    if rank == 1:
        retriever.index.search = lambda queries, n_docs: os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        retriever.retrieve(queries_of(rank, 0), n_docs=3)
    except RankError as error:
        return str(error), time.monotonic() - start


def test_a_rank_lost_with_its_slice_ends_the_others_in_time(device_config, tmp_path):
    (message, seconds), _, (other_message, other_seconds) = run_ranks(lose_a_slice, 3, tmp_path, device_config)
    assert "retrieval 1: rank 1 " in message and "rank 1 " in other_message
    assert seconds < 3.5 and other_seconds < 3.5


def lose_rank_zero(rank: int, config):
    retriever = RagPyTorchDistributedRetriever(config, None, None, timeout=2)
    retriever.init_retrieval()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    retriever.retrieve(queries_of(rank, 0), n_docs=3)


def test_the_loss_of_rank_zero_ends_the_others(config, tmp_path):
    for error in run_ranks(lose_rank_zero, 3, tmp_path, config)[1:]:
        assert isinstance(error, RankError) and "retrieval 1: rank 0 " in str(error)


def miss_the_start(rank: int, config):
    if rank == 1:
        time.sleep(2)
        return
    RagPyTorchDistributedRetriever(config, None, None, timeout=0.5).init_retrieval()


def test_a_rank_that_misses_the_start_ends_the_others(config, tmp_path):
    error = run_ranks(miss_the_start, 2, tmp_path, config)[0]
    assert isinstance(error, RankError) and "rank 0: the ranks did not all meet within 1 s" in str(error)
