"""Ray actors search for all: the same results as one process, dead and busy actors, nothing left behind."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from transformers.models.rag.retrieval_rag import CustomHFIndex

from distributed_ray_retriever import RagRayDistributedRetriever, RayRetriever, RetrievalWorkers
from rag.distributed import ray_cluster
from rag.distributed.ray_cluster import RayConnection, _running_cluster
from rag.errors import JobError, UserError
from rag.index.knowledge_index import KnowledgeIndex
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, PASSAGES
from tests.distributed.many_ranks import FORK_SERVER, run_ranks
from tests.retrieval.test_distributed_pytorch_retriever import device_config, legacy_config, rag_config, write_shards  # noqa: F401

ray = pytest.importorskip("ray")
ray_constants = pytest.importorskip("ray._private.ray_constants")


def queries_of(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIMENSION), dtype=np.float32)


def process_of(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def actors_of(retriever) -> list:
    [pool] = retriever.pools
    return pool.actors


def ray_processes() -> set[str]:
    """Ray's processes on this machine, whoever started them, but for those of tests that run beside these."""
    beside = {process.pid for process in psutil.Process().parent().children()} - {os.getpid()}
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.info["name"] in ("raylet", "gcs_server") or words.startswith("ray::") or "rag_ray_" in words:
            with contextlib.suppress(psutil.NoSuchProcess):
                if beside.isdisjoint(parent.pid for parent in process.parents()):
                    found.add(f"{process.pid} {words[:80]}")
    return found


def gone(processes: set[str], seconds: float = 10) -> bool:
    """Whether all these processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while ray_processes() & processes and time.monotonic() < deadline:
        time.sleep(0.1)
    return not ray_processes() & processes


@pytest.fixture(scope="module")
def config(knowledge):
    return rag_config(**knowledge)


@pytest.fixture(scope="module")
def alone(config):
    return RagKnowledgeRetriever(config, None, None)


@pytest.fixture(scope="module")
def retriever(config):
    """Two actors on a cluster of our own; when it has closed, nothing of it is left."""
    before = ray_processes()
    with RetrievalWorkers(num_workers=2) as workers:
        retriever = RagRayDistributedRetriever(config, None, None, workers)
        retriever.init_retrieval()
        retriever.init_retrieval()
        folder = workers.connection.folder
        started = ray_processes() - before
        assert len(started) >= 4 and os.path.isdir(folder)
        yield retriever
    assert gone(started)
    assert not os.path.exists(folder) and not ray.is_initialized()


def same(results, expected) -> None:
    for found, wanted in zip(results[:2], expected[:2], strict=True):
        assert found.dtype == wanted.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, wanted)
    assert results[2] == expected[2]


@pytest.mark.parametrize("rows, n_docs", [(3, 2), (5, 5), (1, 1), (2, len(PASSAGES)), (0, 3), (40, 5)])
def test_retrieve_gives_what_one_process_gives(retriever, alone, rows, n_docs):
    same(retriever.retrieve(queries_of(rows, rows), n_docs), alone.retrieve(queries_of(rows, rows), n_docs))


@pytest.mark.parametrize("kind", ["legacy_config", "device_config"])
def test_other_indexes_give_what_one_process_gives(kind, request, retriever):
    config = request.getfixturevalue(kind)
    alone = RagKnowledgeRetriever(config, None, None)
    with RetrievalWorkers(1) as workers:
        other = RagRayDistributedRetriever(config, None, None, workers)
        other.init_retrieval()
        for rows, n_docs in [(3, 2), (0, 3), (2, len(PASSAGES))]:
            same(other.retrieve(queries_of(rows, rows), n_docs), alone.retrieve(queries_of(rows, rows), n_docs))


def test_vectors_and_words_travel_together(config, tmp_path, retriever):
    shutil.copytree(Path(config.passages_path).parent, tmp_path / "own")  # beside which BM25's index is built
    paths = {name: str(tmp_path / "own" / Path(getattr(config, name)).name) for name in ("passages_path", "index_path")}
    hybrid = rag_config(index_name="hybrid", **paths)
    alone = RagKnowledgeRetriever(hybrid, None, None)
    words = alone.index.encode_questions(["the capital of norway", "the river tagus"])
    queries = np.concatenate([queries_of(2, 2), words], axis=1)
    with RetrievalWorkers(1) as workers:
        other = RagRayDistributedRetriever(hybrid, None, None, workers)
        other.init_retrieval()
        same(other.retrieve(queries, 3), alone.retrieve(queries, 3))
        same(other.retrieve(queries[:0], 3), alone.retrieve(queries[:0], 3))


def test_workers_search_an_index_that_is_given(config, knowledge, alone, retriever):
    elsewhere = rag_config(index_name="custom", passages_path="nowhere", index_path="nowhere")  # is not read
    paths = (knowledge["passages_path"], knowledge["index_path"])
    expected = alone.retrieve(queries_of(3, 4), 3)
    with RetrievalWorkers(1) as workers:
        for actors, kind in ((workers, CustomHFIndex), ([ray.remote(RayRetriever).remote()], KnowledgeIndex)):
            index = kind.load_from_disk(DIMENSION, *paths)
            given = RagRayDistributedRetriever(elsewhere, None, None, actors, index=index)
            given.init_retrieval()
            same(given.retrieve(queries_of(3, 4), 3), expected)
            with pytest.raises(ValueError, match="in memory"):
                RagRayDistributedRetriever(elsewhere, None, None, actors, index=alone.index)


def test_actors_with_a_shard_each_find_what_one_index_does(config, alone, retriever, tmp_path):
    sharded = rag_config(
        index_name="custom", passages_path=config.passages_path, index_path=write_shards(config, tmp_path)
    )
    with RetrievalWorkers(4) as workers:
        other = RagRayDistributedRetriever(sharded, None, None, workers)
        other.init_retrieval()
        assert [len(pool.actors) for pool in other.pools] == [2, 1, 1]
        for rows, n_docs in [(3, 2), (0, 3), (40, 5), (2, len(PASSAGES))]:
            same(other.retrieve(queries_of(rows, rows), n_docs), alone.retrieve(queries_of(rows, rows), n_docs))
        for pool in other.pools:  # one of every shard dies
            os.kill(process_of(pool.actors[0]), signal.SIGKILL)
        same(other.retrieve(queries_of(3, 3), 3), alone.retrieve(queries_of(3, 3), 3))
    with RetrievalWorkers(2) as workers, pytest.raises(UserError, match=r"--num_retrieval_workers 2: .* has 3; give 3"):
        RagRayDistributedRetriever(sharded, None, None, workers).init_retrieval()


def test_our_own_cluster_is_locked_and_listens_on_this_machine_only(retriever):
    from ray._raylet import AuthenticationMode, get_authentication_mode

    me = psutil.Process()
    sockets = [socket for one in [me, *me.children(recursive=True)] for socket in one.net_connections("inet")]
    addresses = {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert _running_cluster() is None  # another job does not take it for a cluster to use


def test_a_killed_actor_costs_a_moment_and_comes_back(retriever, alone):
    queries = queries_of(1, 4)
    expected = alone.retrieve(queries, 3)
    old = process_of(actors_of(retriever)[0])
    os.kill(old, signal.SIGKILL)
    start = time.monotonic()
    for _ in range(5):
        same(retriever.retrieve(queries, 3), expected)
    # Ray takes about a second to notice, longer beside other tests; an answer would be waited for 600.
    assert time.monotonic() - start < 15
    assert process_of(actors_of(retriever)[0]) != old
    both = [process_of(actor) for actor in actors_of(retriever)]
    for process in both:
        os.kill(process, signal.SIGKILL)
    same(retriever.retrieve(queries, 3), expected)


@contextlib.contextmanager
def busy(actor, end: Path):
    """Keep an actor busy until the block ends, by way of a file."""

    def wait(self):
        while not end.exists():
            time.sleep(0.05)

    call = actor.__ray_call__.remote(wait)
    try:
        yield
    finally:
        end.touch()
        ray.get(call)


def test_a_busy_actor_is_passed_over(retriever, tmp_path):
    for number, actor in enumerate(actors_of(retriever)):
        start = time.monotonic()
        with busy(actor, tmp_path / str(number)):
            retriever.retrieve(queries_of(2, 4), 3)
        assert time.monotonic() - start < 10  # of 600 that it would wait for an answer


def test_a_retrieval_that_takes_too_long_says_so(config, retriever, tmp_path):
    impatient = RagRayDistributedRetriever(config, None, None, actors_of(retriever)[:1])
    impatient.init_retrieval()
    impatient.timeout = impatient.pools[0].timeout = 0.5
    with busy(actors_of(retriever)[0], tmp_path / "end"), pytest.raises(JobError, match=r"within 0\.5 s"):
        impatient.retrieve(queries_of(2, 4), 3)


def test_handles_as_in_the_public_suite(config, alone, retriever, bert_tokenizer, bart_tokenizer, tmp_path):
    RagKnowledgeRetriever(config, bert_tokenizer, bart_tokenizer).save_pretrained(tmp_path)
    handles = [ray.remote(RayRetriever).options(num_cpus=0).remote()]
    given = RagRayDistributedRetriever.from_pretrained(tmp_path, handles)
    given.init_retrieval()
    same(given.retrieve(queries_of(3, 4), 3), alone.retrieve(queries_of(3, 4), 3))
    process = psutil.Process(process_of(handles[0]))
    ray.kill(handles[0])
    process.wait(30)  # until then it may answer
    with pytest.raises(RuntimeError, match="every retrieval worker has died"):
        given.retrieve(queries_of(3, 4), 3)


def test_the_users_mistakes_are_told(config, knowledge, alone, retriever, tmp_path):
    with pytest.raises(UserError, match="--num_retrieval_workers 0"):
        RetrievalWorkers(0)
    with pytest.raises(UserError, match="in memory"):
        RagRayDistributedRetriever(config, None, None, actors_of(retriever), index=alone.index)
    with RetrievalWorkers(1, gpus_each=64) as workers, pytest.raises(UserError, match="--retrieval_worker_gpus 64"):
        workers.connect(config)
    broken = tmp_path / "broken.faiss"
    broken.write_bytes(b"IHNf")
    with RetrievalWorkers(1) as workers, pytest.raises(UserError, match=r"--index_path .*broken\.faiss"):
        workers.connect(rag_config(**knowledge | {"index_path": str(broken)}))
    with pytest.raises(UserError, match=r"--ray_address 127.0.0.1:9: .*ray start --head"):
        RayConnection("127.0.0.1:9")._connect("127.0.0.1:9")
    assert ray.is_initialized()  # a connection that was there before stays


@pytest.fixture
def start(monkeypatch):
    """`RayConnection._start` without Ray's processes; gives what was left running."""
    running = []
    monkeypatch.setattr(ray_cluster, "_init_ray", lambda **settings: running.append(settings["_temp_dir"]))
    monkeypatch.setattr(ray, "shutdown", running.clear)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "none")  # no token is made
    # Is restored after the test.
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    return running


@pytest.mark.parametrize("value", [None, "moved"])
def test_a_cluster_of_our_own_is_refused_where_ray_has_no_switch_for_the_loopback(start, monkeypatch, value):
    if value is None:
        monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    else:
        monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", value)
    with pytest.raises(UserError, match=r"--ray_address auto: .*ENABLE_RAY_CLUSTER is gone.*ray start --head") as error:
        RayConnection("auto")._start(1)
    assert "\n" not in str(error.value)
    assert start == []
    ray_cluster._on_loopback(False)  # needs no switch: other people's clusters are joined as before


@pytest.mark.parametrize("address", ["10.1.2.3:6379", "node7:6379", "[fe80::1]:6379"])
def test_a_cluster_of_our_own_that_others_could_reach_is_ended(start, monkeypatch, address):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    connection = RayConnection("auto")
    with pytest.raises(UserError, match=r"--ray_address auto: .*it listens on .*:6379"):
        connection._start(1)
    assert start == [] and connection.folder is None and not connection.opened


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379"])
def test_a_cluster_of_our_own_on_the_loopback_stays(start, monkeypatch, address):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    connection = RayConnection("auto")
    assert connection._start(1) == address
    [folder] = start
    assert os.path.isdir(folder)
    connection.close()
    assert start == [] and not os.path.exists(folder)


def two_ranks(rank: int, config) -> tuple:
    with RetrievalWorkers(2) as workers:
        retriever = RagRayDistributedRetriever(config, None, None, workers)
        retriever.init_retrieval()
        found = [retriever.retrieve(queries_of(rank, rows), 3) for rows in (1 + rank, 4)]
        return [process_of(actor) for actor in actors_of(retriever)], found, workers.namespace


def test_every_rank_reaches_the_same_actors(config, alone, tmp_path):
    before = ray_processes()
    results = run_ranks(two_ranks, 2, tmp_path, config, seconds=120)
    (actors, found, namespace), (other_actors, other_found, other_namespace) = results
    assert namespace != other_namespace
    assert actors == other_actors[::-1]  # each prefers another one
    for rank, retrieved in enumerate((found, other_found)):
        for rows, results in zip((1 + rank, 4), retrieved, strict=True):
            same(results, alone.retrieve(queries_of(rank, rows), 3))
    assert gone(ray_processes() - before)


def wait_with_workers(pipe, config) -> None:
    try:
        with RetrievalWorkers(1) as workers:
            workers.connect(config)
            pipe.send(workers.connection.folder)
            time.sleep(60)
    except KeyboardInterrupt:
        pipe.send("interrupted")


def test_nothing_is_left_after_ctrl_c(config):
    before = ray_processes()
    receiver, sender = FORK_SERVER.Pipe(duplex=False)
    job = FORK_SERVER.Process(target=wait_with_workers, args=(sender, config))
    job.start()
    sender.close()
    folder = receiver.recv()
    os.kill(job.pid, signal.SIGINT)
    assert receiver.poll(60) and receiver.recv() == "interrupted"
    job.join(10)
    assert not os.path.exists(folder)
    assert gone(ray_processes() - before)
