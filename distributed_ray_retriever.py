"""Ray actors search for every rank of every node: N open indexes a job, wherever the cluster puts them.

    with RetrievalWorkers(num_workers=4, address="auto") as workers:
        retriever = RagRayDistributedRetriever.from_pretrained(checkpoint, workers)
        retriever.init_retrieval()              # collective where a process group is up
        retriever.retrieve(vectors, n_docs=5)   # not collective

Each rank prefers one actor, and the actors are shared evenly; where that one is busy, the least busy one searches too
and the first answer counts. Query vectors travel there and ids back; passages and their vectors are read on each rank.
Ray restarts an actor that dies while the others answer. Ray is an optional package, imported where it is used.

Of an index in S shards actor i holds shard i mod S; one actor of each shard searches, and the best of all count. Where
there are no workers, the search runs in this process, without Ray.
"""

import logging
import os
import time
import uuid
from functools import partial
from math import ceil

import numpy as np
from transformers.models.rag.retrieval_rag import CustomHFIndex

from rag.distributed.ranks import Ranks
from rag.distributed.ray_cluster import RayConnection
from rag.errors import UserError
from rag.index.knowledge_index import KnowledgeIndex
from rag.public_names import Replaced
from rag.retrieval.actor import RayRetriever, index_config
from rag.retrieval.actor_pool import ActorPool, call_all
from rag.retrieval.remote import best_of_shards
from rag.retrieval.retriever import RagKnowledgeRetriever

logger = logging.getLogger(__name__)

# Allows the pickles of a legacy index to be read (rag/index/legacy_dpr.py).
TRUST = ("TRUST_REMOTE_CODE",)


class RagRayDistributedRetriever(RagKnowledgeRetriever):
    """`RagKnowledgeRetriever` whose searches run in Ray actors.

    Args:
        config: `RagConfig`; the actors open the index that it describes.
        question_encoder_tokenizer: as transformers' `RagRetriever`.
        generator_tokenizer: as transformers' `RagRetriever`.
        retrieval_workers: a `RetrievalWorkers`, or handles of `RayRetriever` actors; an empty list to search in this
            process, without Ray.
        index: used in place of the one that the config describes, a `KnowledgeIndex` or one of transformers'. The
            workers open its files for themselves; an index that is in memory they cannot reach.
        timeout: seconds a retrieval may take, the restart of dead actors included.

    A deep copy is the retriever itself, as what it is connected to cannot be doubled.

    Raises:
        UserError: the index is in memory, and there are workers.
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
        if retrieval_workers and index is not None and index.is_initialized():
            raise UserError(
                "--distributed_retriever ray: Ray's processes cannot read an index in memory; save it with its "
                "passages and give --passages_path and --index_path"
            )
        if retrieval_workers and isinstance(index, CustomHFIndex):
            # The same files, for actors that start and restart without transformers.
            index = KnowledgeIndex(index.dataset, index.vector_size, index_path=index.index_path)
        super().__init__(config, question_encoder_tokenizer, generator_tokenizer, index, init_retrieval=False)
        self.retrieval_workers = retrieval_workers
        self.given_index = index
        self.timeout = timeout
        self.pools: list[ActorPool] = []  # one for each shard
        # Passages and index that the workers have opened last, and that are searched in place of the config's.
        self.opened: tuple[str, str] | None = None
        self.knowledge: tuple[str, str] | None = None

    @classmethod
    def from_pretrained(cls, retriever_name_or_path, actor_handles, indexed_dataset=None, **kwargs):
        """As the parent's, with the workers (`retrieval_workers`) that search."""
        config = cls._config(retriever_name_or_path, **kwargs)
        tokenizers = cls._tokenizers(retriever_name_or_path, config)
        index = None if indexed_dataset is None else cls._index_of(config, indexed_dataset)
        return cls(config, *tokenizers, actor_handles, index)

    get_tokenizers = Replaced("transformers has no such method to call; `from_pretrained` reads both tokenizers")

    def init_retrieval(self) -> None:
        """Have the workers open the index; a second call does nothing. Collective with a `RetrievalWorkers`."""
        if self.pools:
            return
        if not self.retrieval_workers:
            super().init_retrieval()
            return
        if isinstance(self.retrieval_workers, RetrievalWorkers):
            pools = self.retrieval_workers.connect(self.config, getattr(self.index, "num_shards", 1), self.given_index)
        else:
            pools = [list(self.retrieval_workers)]  # each with the whole index, in however many shards
            arguments = (index_config(self.config), None, None, self.given_index)
            call_all(pools[0], "create_rag_retriever", *arguments, timeout=self.timeout)
            call_all(pools[0], "init_retrieval", timeout=self.timeout)
        self.pools = [ActorPool(actors, self.timeout) for actors in pools]

    def _open_search(self, index, paths: tuple[str, str]) -> None:
        """Have the workers open the index; one that dies and is restarted opens it by the next search."""
        if not self.retrieval_workers:
            super()._open_search(index, paths)
            return
        assert self.pools, "call init_retrieval() first"
        actors = list(dict.fromkeys(actor for pool in self.pools for actor in pool.actors))
        call_all(actors, "open_beside", *paths, timeout=self.timeout)
        self.opened = paths

    def take_index(self, index) -> None:
        super().take_index(index)
        self.knowledge = self.opened

    def _search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """As the parent's, in one actor of each shard, all at the same time."""
        if not self.retrieval_workers:
            return super()._search(queries, n_docs)
        import ray

        assert self.pools, "call init_retrieval() first"
        deadline = time.monotonic() + self.timeout
        data = queries.tobytes()
        if len(self.pools) > 1:
            data = ray.put(data)  # once for all shards
        asked = (data, queries.shape[1], n_docs, *([] if self.knowledge is None else [self.knowledge]))
        searches = [pool.begin(*asked) for pool in self.pools]
        answers = [pool.finish(search, deadline) for pool, search in zip(self.pools, searches, strict=True)]
        if len(answers) > 1:
            doc_ids = best_of_shards([(scores, ids) for scores, ids, _ in answers], n_docs)
            return doc_ids, self.index.embeddings.gather(doc_ids)
        _, doc_ids, vectors = answers[0]
        # Ray's arrays are read-only.
        return doc_ids.copy(), self.index.embeddings.gather(doc_ids) if vectors is None else vectors.copy()

    def __deepcopy__(self, memo: dict) -> "RagRayDistributedRetriever":
        return self


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

    def connect(self, config, num_shards: int = 1, index=None) -> list[list]:
        """Handles of the actors, ready to search.

        Collective where a process group is up: rank 0 creates the actors, the others look them up by name.

        Args:
            config: `RagConfig`, which describes the index.
            num_shards: of the index.
            index: opened in place of the one that the config describes.

        Returns:
            For each shard the actors that hold it, this rank's preferred one first.
        """
        if not self.actors:
            self.ranks = Ranks(self.timeout)
            create = partial(self._create, config, num_shards, index)
            meeting = self.ranks.from_rank_zero("start of the retrieval workers", create)
            self.ranks.all_or_none("reaching the retrieval workers", lambda: self._attach(meeting))
        pools = [self.actors[shard::num_shards] for shard in range(num_shards)]
        first = self.ranks.rank
        return [pool[first % len(pool) :] + pool[: first % len(pool)] for pool in pools]

    def _create(self, config, num_shards: int, index) -> dict:
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
                plain_config, actors_on_node, shard=number % num_shards if num_shards > 1 else None, index=index
            )
            for number, name in enumerate(self._names())
        ]
        for fallback in filter(None, set(call_all(actors, "init_retrieval", timeout=self.timeout))):
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
