"""Ray actors search for every rank of every node: N open indexes a job, wherever the cluster puts them.

    with RetrievalWorkers(num_workers=4, address="auto") as workers:
        retriever = RagRayDistributedRetriever.from_pretrained(checkpoint, workers)
        retriever.init_retrieval()              # collective where a process group is up
        retriever.retrieve(vectors, n_docs=5)   # not collective

Each rank has an actor of its own to ask, shared evenly; where that one is busy, the least busy one is asked too and the
first answer taken. Query vectors travel there and ids back; passages and their vectors are read on each rank. An actor
that dies is restarted by Ray while the others answer. Ray is an optional package, imported where it is used.

Of an index in S shards actor i holds shard i mod S; one actor of each shard is asked, and the best of all are taken.
"""

import ipaddress
import logging
import os
import secrets
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import uuid
from collections import deque
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from cli_rag import UserError
from index_rag import best_of_shards
from ranks_rag import Ranks
from retrieval_actor_rag import RayRetriever, index_config
from retriever_rag import RagKnowledgeRetriever

logger = logging.getLogger(__name__)

# Ray's queues and arrays on a cluster of our own: a batch of queries and ids is far below a megabyte.
OBJECT_STORE_BYTES = 100 * 2**20
# Allows the pickles of a legacy index to be read (legacy_index_rag.py).
TRUST = ("TRUST_REMOTE_CODE",)
# Seconds beyond the usual after which a worker that has not answered counts as busy.
SHORTEST_PATIENCE = 0.02


class RagRayDistributedRetriever(RagKnowledgeRetriever):
    """`RagKnowledgeRetriever` whose searches run in Ray actors.

    Args:
        config: `RagConfig`; the actors open the index that it describes.
        question_encoder_tokenizer: as transformers' `RagRetriever`.
        generator_tokenizer: as transformers' `RagRetriever`.
        retrieval_workers: a `RetrievalWorkers`, or handles of `RayRetriever` actors.
        index: read for passages in place of the one that the config describes; not in memory, where no actor sees it.
        timeout: seconds a retrieval may take, the restart of dead actors included.
    """

    def __init__(
        self,
        config,
        question_encoder_tokenizer,
        generator_tokenizer,
        retrieval_workers,
        index=None,
        timeout: float = 600.0,
    ):
        if index is not None and index.is_initialized():
            raise UserError(
                "--distributed_retriever ray: Ray's processes cannot read an index in memory; save it with its "
                "passages and give --passages_path and --index_path"
            )
        super().__init__(config, question_encoder_tokenizer, generator_tokenizer, index, init_retrieval=False)
        self.retrieval_workers = retrieval_workers
        self.timeout = timeout
        self.pools: list[ActorPool] = []  # one for each shard

    @classmethod
    def from_pretrained(cls, retriever_name_or_path, actor_handles, indexed_dataset=None, **kwargs):
        """As the parent's, with the actors (`retrieval_workers`) that search."""
        config = cls._config(retriever_name_or_path, **kwargs)
        tokenizers = cls._tokenizers(retriever_name_or_path, config)
        return cls(config, *tokenizers, actor_handles, cls._index_of(config, indexed_dataset))

    def init_retrieval(self) -> None:
        """Have the actors open the index; a second call does nothing. Collective with a `RetrievalWorkers`."""
        if self.pools:
            return
        if isinstance(self.retrieval_workers, RetrievalWorkers):
            pools = self.retrieval_workers.connect(self.config, self.index.num_shards)
        else:
            pools = [list(self.retrieval_workers)]  # each with the whole index, in however many shards
            given = (index_config(self.config), None, None, None)
            _ask_all(pools[0], "create_rag_retriever", *given, timeout=self.timeout)
            _ask_all(pools[0], "init_retrieval", timeout=self.timeout)
        self.pools = [ActorPool(actors, self.timeout) for actors in pools]

    def _search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """As the parent's, in one actor of each shard, all at the same time."""
        import ray

        assert self.pools, "call init_retrieval() first"
        deadline = time.monotonic() + self.timeout
        data = queries.tobytes()
        if len(self.pools) > 1:
            data = ray.put(data)  # once for all shards
        asked = [pool.ask(data, queries.shape[1], n_docs) for pool in self.pools]
        found = [pool.answer(own, deadline) for pool, own in zip(self.pools, asked, strict=True)]
        if len(found) > 1:
            doc_ids = best_of_shards([(scores, ids) for scores, ids, _ in found], n_docs)
            return doc_ids, self.index.embeddings.gather(doc_ids)
        _, doc_ids, vectors = found[0]
        # Ray's arrays are read-only.
        return doc_ids.copy(), self.index.embeddings.gather(doc_ids) if vectors is None else vectors.copy()


class ActorPool:
    """Actors that hold the same passages, any of which may answer.

    Args:
        actors: handles, the first is this rank's own.
        timeout: seconds an answer may take, the restart of dead actors included; for the messages.
    """

    def __init__(self, actors: list, timeout: float):
        self.actors = actors
        # Ray's own retries would wait for the restart of an actor, while another one is free.
        self.searches = {actor: actor.search.options(max_task_retries=0) for actor in actors}
        self.timeout = timeout
        self.seconds: deque[float] = deque(maxlen=32)  # what the last answers took

    def ask(self, *question) -> "Asked":
        """Begin `RayRetriever.search(*question)` in this rank's own actor."""
        return self._ask(self.actors[0], question)

    def _ask(self, actor, question: tuple) -> "Asked":
        return Asked(actor, question, time.monotonic(), self.searches[actor].remote(*question))

    def answer(self, asked: "Asked", deadline: float) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
        """What `RayRetriever.search` returned, in the least busy actor where the asked one is busy, or has died."""
        import ray

        while True:
            try:
                found = self._first_answer(asked, deadline)
            except ray.exceptions.GetTimeoutError as error:
                raise TimeoutError(f"no retrieval worker answered within {self.timeout:g} s") from error
            except ray.exceptions.RayActorError as error:
                logger.warning(f"a retrieval worker died, another is asked: {_first_line(error)}")
                asked = self._ask(self._least_busy(self.actors, [], deadline), asked.question)
                continue
            self.seconds.append(time.monotonic() - asked.start)
            return found

    def _first_answer(self, asked: "Asked", deadline: float):
        """The answer of the actor that was asked or, where it lets us wait, of another one if that comes first."""
        import ray

        patience = SHORTEST_PATIENCE + 4 * statistics.median(self.seconds or [0])
        if len(self.actors) > 1 and time.monotonic() + patience < deadline:
            try:
                return ray.get(asked.answer, timeout=patience)
            except ray.exceptions.GetTimeoutError:
                others = [actor for actor in self.actors if actor is not asked.actor]
            if (free := self._least_busy(others, [asked.answer], deadline)) is not None:
                answers = [asked.answer, self._ask(free, asked.question).answer]
                ready, _ = ray.wait(answers, num_returns=1, timeout=max(deadline - time.monotonic(), 0))
                return ray.get(ready or answers, timeout=0)[0]
        return ray.get(asked.answer, timeout=max(deadline - time.monotonic(), 0))

    def _least_busy(self, actors: list, answers: list, deadline: float):
        """The actor that answers first, None where one of `answers` comes before.

        An actor answers its calls in turn, one that died when it was restarted.
        """
        import ray

        calls = {actor.init_retrieval.remote(): actor for actor in actors}
        while calls:
            ready, _ = ray.wait([*answers, *calls], num_returns=1, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"none of {len(self.actors)} retrieval workers was free within {self.timeout:g} s")
            if ready[0] in answers:
                return None
            actor = calls.pop(ready[0])
            try:
                ray.get(ready[0])
                return actor
            except ray.exceptions.RayActorError:  # Ray does not restart it
                self.actors.remove(actor)
        if answers:
            return None
        raise RuntimeError("every retrieval worker has died for good")


@dataclass
class Asked:
    """A search that has begun in an actor, and Ray's reference to its answer."""

    actor: object
    question: tuple
    start: float
    answer: object


class RetrievalWorkers:
    """N named `RayRetriever` actors that every rank of the job reaches, and a cluster for them if none was running.

    Nothing is started before `connect`. Leaving the `with` ends the actors, and the cluster if it is our own.

    Args:
        num_workers: actors; each maps the index.
        address: as `RayConnection`'s.
        gpus_each: share of a GPU that Ray sets aside for each actor.
        timeout: seconds that the actors may take to open the index.
    """

    def __init__(self, num_workers: int = 1, address: str = "auto", gpus_each: float = 0.0, timeout: float = 600.0):
        if num_workers < 1:
            raise UserError(f"--num_retrieval_workers {num_workers}: at least one has to search")
        self.num_workers = num_workers
        self.gpus_each = gpus_each
        self.timeout = timeout
        self.connection = RayConnection(address)
        self.namespace = f"rag-{uuid.uuid4().hex}"  # rank 0's counts; parallel jobs have each their own
        self.actors: list = []
        self.ranks: Ranks | None = None

    def __enter__(self) -> "RetrievalWorkers":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error is None and self.actors:  # they end with rank 0, so rank 0 leaves only when all ranks are done
                self.ranks.all_or_none("end of the retrieval workers", lambda: None)
        finally:
            self.actors = []
            self.connection.close()

    def connect(self, config, num_shards: int = 1) -> list[list]:
        """Handles of the actors, ready to search the index that `config` describes.

        Collective where a process group is up: rank 0 creates the actors, the others look them up by name.

        Args:
            num_shards: of that index.

        Returns:
            For each shard the actors that hold it, this rank's preferred one first.
        """
        if not self.actors:
            self.ranks = Ranks(self.timeout)
            create = partial(self._create, config, num_shards)
            meeting = self.ranks.from_rank_zero("start of the retrieval workers", create)
            self.ranks.all_or_none("reaching the retrieval workers", lambda: self._attach(meeting))
        pools = [self.actors[shard::num_shards] for shard in range(num_shards)]
        first = self.ranks.rank
        return [pool[first % len(pool) :] + pool[: first % len(pool)] for pool in pools]

    def _create(self, config, num_shards: int) -> dict:
        """Rank 0: the actors, each with its index open; returns what the other ranks need to reach them."""
        import ray

        if self.num_workers < num_shards:
            raise UserError(
                f"--num_retrieval_workers {self.num_workers}: each holds one shard of --index_path "
                f"{config.index_path}, which has {num_shards}; give {num_shards} or more"
            )
        meeting = self.connection.open(self.num_workers)
        gpus = ray.cluster_resources().get("GPU", 0)
        if self.gpus_each * self.num_workers > gpus:
            raise UserError(
                f"--retrieval_worker_gpus {self.gpus_each:g} for each of {self.num_workers} workers is more than the "
                f"cluster's {gpus:g} GPUs; give less, or fewer workers"
            )
        nodes = sum(node["Alive"] for node in ray.nodes())
        options = {
            "namespace": self.namespace,
            "get_if_exists": True,
            "max_restarts": -1,
            "max_task_retries": -1,
            "num_cpus": 0,  # they work while the ranks wait for them
            "num_gpus": self.gpus_each,
            "scheduling_strategy": "SPREAD",
            # What this process may read the actors may read, also on a cluster that was started elsewhere.
            "runtime_env": {"env_vars": {name: os.environ[name] for name in TRUST if name in os.environ}},
        }
        plain_config = index_config(config)
        if self.gpus_each and getattr(config, "index_device", None) is None:
            plain_config.index_device = "cuda"  # the one that Ray gives it
        retriever, actors_on_node = ray.remote(RayRetriever), ceil(self.num_workers / nodes)
        actors = [
            retriever.options(name=name, **options).remote(
                plain_config, actors_on_node, shard=number % num_shards if num_shards > 1 else None
            )
            for number, name in enumerate(self._names())
        ]
        for fallback in filter(None, set(_ask_all(actors, "init_retrieval", timeout=self.timeout))):
            logger.warning(f"retrieval workers: {fallback}")
        self.actors = actors
        return meeting | {"namespace": self.namespace}

    def _attach(self, meeting: dict) -> None:
        """Another rank's way to the actors that rank 0 created."""
        if self.actors:
            return
        import ray

        self.connection.join(meeting)
        self.actors = [ray.get_actor(name, namespace=meeting["namespace"]) for name in self._names()]

    def _names(self) -> list[str]:
        return [f"retriever-{number}" for number in range(self.num_workers)]


class RayConnection:
    """This process's connection to a Ray cluster.

    Args:
        address: "HOST:PORT" of a running cluster; "auto" for the one that RAY_ADDRESS names or `ray start` started on
            this node, or else one of our own: on this node alone, on the loopback interface, with token authentication.
    """

    def __init__(self, address: str):
        self.address = address
        self.folder: str | None = None  # sockets and logs of a cluster of our own
        self.opened = False

    def open(self, num_workers: int) -> dict:
        """Connect, or start a cluster; returns the address and, for one of our own, the environment that opens it."""
        import ray

        if not ray.is_initialized():
            running = _running_cluster() if self.address == "auto" else self.address
            if running is None:
                return {"address": self._start(num_workers), "environment": _authentication()}
            self._connect(running)
        return {"address": ray.get_runtime_context().gcs_address}

    def join(self, meeting: dict) -> None:
        """Connect to the cluster that `open` found or started on rank 0."""
        import ray

        if ray.is_initialized():
            return
        if "environment" in meeting:
            _authenticate(meeting["environment"])
            self._connect(meeting["address"], loopback=True)
        elif (running := _running_cluster() if self.address == "auto" else self.address) is None:
            raise UserError(f"no Ray runs on this node; let it join by `ray start --address={meeting['address']}`")
        else:
            self._connect(running)

    def close(self) -> None:
        """Disconnect, which ends what this process created; a cluster of our own ends altogether."""
        if self.opened:
            import ray

            ray.shutdown()
            self.opened = False
        if self.folder is not None:
            self.remover.communicate()
            self.folder = None

    def _start(self, num_workers: int) -> str:
        import ray

        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Ray would leave one in the home folder. It reads the token once a process, so it stays for the next start.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _on_loopback(True)
        self.opened = True
        self.folder = tempfile.mkdtemp(prefix="rag_ray_")
        self.remover = _remover(self.folder)
        _init_ray(
            address="local",
            num_cpus=num_workers,  # as many processes as Ray starts ahead
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=self.folder,
        )
        address = ray.get_runtime_context().gcs_address
        if not _is_loopback(address):  # the switch is there and does nothing any more
            self.close()
            raise _not_on_loopback(f"it listens on {address}")
        return address

    def _connect(self, address: str, loopback: bool = False) -> None:
        import ray

        try:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
            _on_loopback(loopback)
            self.opened = True
            _init_ray(address=address)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            remedy = (
                "Ray's own cluster of rank 0 serves one node; for several, run `ray start --head` and join it by "
                "`ray start --address` on the others"
                if loopback
                else "start one with `ray start --head`, or `ray stop` to forget one that died"
            )
            raise UserError(
                f"--ray_address {self.address}: no Ray cluster can be reached at {address} ({_first_line(error)}); "
                f"{remedy}"
            ) from error


def _init_ray(**settings) -> None:
    """`ray.init` without its handler of SIGTERM, which ends the job with status 15 in the middle of a step."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _remover(folder: str) -> subprocess.Popen:
    """A process that removes the folder at the end of the pipe to it, so also where this process is killed.

    The kernel ends Ray's processes then; they may write on for a moment.
    """
    command = ["sh", "-c", 'cat; rm -rf "$0"; while [ -e "$0" ]; do sleep 0.2; rm -rf "$0"; done', folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _running_cluster() -> str | None:
    """Address of the cluster that RAY_ADDRESS names or `ray start` noted on this node; never another job's own one."""
    from ray._private.services import get_ray_address_from_environment

    return get_ray_address_from_environment(None, None)


def _on_loopback(only: bool) -> None:
    """Have Ray listen on 127.0.0.1 only, or not. On Linux it has no argument for that, though it does so elsewhere.

    Raises:
        UserError: only there, but this release of Ray has no such switch, so that it would listen everywhere.
    """
    try:
        from ray._private import ray_constants
    except ImportError:
        ray_constants = None

    if isinstance(getattr(ray_constants, "ENABLE_RAY_CLUSTER", None), bool):
        ray_constants.ENABLE_RAY_CLUSTER = not only
    elif only:
        raise _not_on_loopback("ray._private.ray_constants.ENABLE_RAY_CLUSTER is gone")


def _is_loopback(address: str) -> bool:
    """Whether no other machine reaches "HOST:PORT"."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def _not_on_loopback(reason: str) -> UserError:
    import ray

    return UserError(
        f"--ray_address auto: a cluster of our own would be open to other machines, as Ray {ray.__version__} cannot be "
        f"kept to this one ({reason}); install the release in requirements.txt, or run `ray start --head` first"
    )


def _authentication() -> dict[str, str]:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def _authenticate(environment: dict[str, str]) -> None:
    """Take over what opens another process's cluster. Ray read its own environment when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config

    os.environ.update(environment)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _ask_all(actors: list, method: str, *args, timeout: float) -> list:
    """What a method of every actor returns; their mistakes of the user's come back as such."""
    import ray

    try:
        return ray.get([getattr(actor, method).remote(*args) for actor in actors], timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(
            f"{len(actors)} retrieval workers were not ready after {timeout:g} s; `ray status` tells what they wait for"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
