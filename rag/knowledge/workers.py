"""Passages embedded by several processes at once: on this node, one a GPU, or wherever a Ray cluster has room.

    with encoding_workers(embedder, plan, resources) as workers:
        write_dataset(passages, workers, folder, digest, shards)

One process reads the documents and writes the shards; the workers get texts and give vectors back, so that nodes need
no common disk for them. Two shards a worker are under way at a time. Each worker loads the encoder once, by its name,
and refuses other weights than the first process has. Ray is an optional package.
"""

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch

from rag.distributed.ray_cluster import RayConnection
from rag.distributed.stopped import StoppedClock
from rag.errors import UserError
from rag.knowledge.arguments import ENCODER_FLAG
from rag.knowledge.embedding import PassageEmbedder
from rag.knowledge.shards import Passages
from rag.models.checkpoints import load_tokenizer, weights_digest
from rag.models.encoders import load_encoder
from rag.models.trust import allow_code

SHARDS_A_WORKER = 2  # one is encoded while the next one is on its way
RETRIES = 3  # of a shard whose Ray worker, or node, died
RESUMES = "the same command resumes with the shards that are left"


@dataclass(frozen=True)
class EncodingResources:
    """Where passages are embedded.

    Attributes:
        distributed: "ray" for the nodes of a Ray cluster; None for this node.
        processes: of this node; None for one a GPU, or one.
        ray_address: as `RayConnection`'s.
        gpus_per_task: share of a GPU that a task on Ray reserves; None for 1 if this node has any, else 0.
    """

    distributed: str | None = None
    processes: int | None = None
    ray_address: str = "auto"
    gpus_per_task: float | None = None

    @property
    def device(self) -> str:
        """cuda or cpu."""
        if self.distributed == "ray" and self.gpus_per_task is not None:
            return "cuda" if self.gpus_per_task > 0 else "cpu"
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def on_this_node(self) -> int:
        """Processes of this node that encode, if it is not left to Ray."""
        return self.processes or max(torch.cuda.device_count(), 1)

    def tokenizer_threads(self, asked: int | None) -> int:
        """Threads that tokenize in each process: beside a GPU they have the cores for themselves."""
        if asked is not None or self.device == "cpu":
            return asked or 1
        return max(1, len(os.sched_getaffinity(0)) // self.on_this_node)


@dataclass(frozen=True)
class EncoderPlan:
    """What a worker needs to be equal to the `PassageEmbedder` of the first process.

    Attributes:
        name: folder or hub name of the encoder, the same on every node.
        pooling: as --ctx_encoder_pooling.
        digest: of its weights.
        batch_size: as --batch_size.
        device: cuda or cpu.
        precision: of its weights, on whatever machine.
        tokens_per_batch: as --tokens_per_batch.
        prompt: as --ctx_encoder_prompt.
        run_code: as --trust_remote_code.
    """

    name: str
    pooling: str
    digest: str
    batch_size: int | None
    device: str
    precision: torch.dtype
    tokens_per_batch: int | None = None
    prompt: str | None = None
    run_code: bool = False


def encoding_workers(embedder: PassageEmbedder, plan: EncoderPlan, resources: EncodingResources):
    """A context that gives what embeds the shards: the embedder itself, where one process is to do it."""
    if resources.distributed is None:
        processes = resources.on_this_node
        return nullcontext(embedder) if processes == 1 else NodeWorkers(embedder, plan, processes)
    gpus = resources.gpus_per_task if resources.gpus_per_task is not None else float(plan.device == "cuda")
    return RayWorkers(embedder, plan, resources.ray_address, gpus)


def embed_shard(plan: EncoderPlan, shard: Passages) -> tuple[np.ndarray, int]:
    """A worker's task: the vectors (n, d) float32 of n passages, and how many of these the encoder had to cut."""
    embedder = _embedder(plan)
    cut = embedder.cut
    vectors = np.empty((len(shard), embedder.dimension), dtype=np.float32)
    for rows, batch in embedder(shard):
        vectors[rows] = batch
    return vectors, embedder.cut - cut


@lru_cache(maxsize=1)
def _embedder(plan: EncoderPlan) -> PassageEmbedder:
    allow_code(plan.run_code)
    encoder = load_encoder(plan.name, "context", plan.pooling, flag=ENCODER_FLAG, prompt=plan.prompt)
    if weights_digest(encoder) != plan.digest:
        raise UserError(
            f"{ENCODER_FLAG} {plan.name} has other weights on {os.uname().nodename} than where the command was given; "
            "give every node the same"
        )
    tokenizer = load_tokenizer(plan.name, flag=ENCODER_FLAG)
    return PassageEmbedder(encoder, tokenizer, plan.batch_size, plan.device, plan.precision, plan.tokens_per_batch)


class Workers(ABC):
    """Embeds shards as a `PassageEmbedder` does, in other processes.

    Attributes:
        dimension: d.
        max_length: tokens an encoder can read.
        cut: passages that were longer.
    """

    def __init__(self, embedder: PassageEmbedder, plan: EncoderPlan):
        self.plan = plan
        self.dimension, self.max_length = embedder.dimension, embedder.max_length
        self.cut = 0

    def embed_shards(self, shards: Iterator[tuple[Path, Passages]], write: Callable) -> Iterator[int]:
        """Call `write(path, passages, vectors)` for every shard, as they get ready; yields the passages of each."""
        under_way: dict = {}
        for path, shard in shards:
            under_way[self._submit(shard)] = (path, shard)
            if len(under_way) >= SHARDS_A_WORKER * self._size():
                yield from self._finish(under_way, write)
        while under_way:
            yield from self._finish(under_way, write)

    def _finish(self, under_way: dict, write: Callable) -> Iterator[int]:
        """Write the shards that are ready, one at least."""
        for answer in self._ready(list(under_way)):
            path, shard = under_way.pop(answer)
            vectors, cut = self._result(answer)
            write(path, shard, vectors)
            self.cut += cut
            yield len(shard)

    @abstractmethod
    def _submit(self, shard: Passages):
        """Begin with a shard; what stands for its result."""

    @abstractmethod
    def _ready(self, answers: list) -> list:
        """Wait until some of the answers are there; those."""

    @abstractmethod
    def _result(self, answer) -> tuple[np.ndarray, int]:
        """What `embed_shard` gave."""

    @abstractmethod
    def _size(self) -> int:
        """Shards that can be encoded at a time."""


class NodeWorkers(Workers):
    """Processes on this node: one for each GPU, or `processes` that share the cores."""

    def __init__(self, embedder: PassageEmbedder, plan: EncoderPlan, processes: int):
        super().__init__(embedder, plan)
        self.processes = processes
        self.clock, self.stopped = StoppedClock(), None
        self.others = set(multiprocessing.active_children())  # not this pool's
        spawn = multiprocessing.get_context("spawn")  # a fork would share the first process's CUDA, and its locks
        gpus = spawn.Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        for number in range(processes):
            gpus.put(visible.split(",")[number % max(torch.cuda.device_count(), 1)])
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        self.pool = ProcessPoolExecutor(processes, spawn, initializer=_start_worker, initargs=(gpus, threads))

    def __enter__(self) -> "NodeWorkers":
        return self

    def __exit__(self, _, error, traceback) -> None:
        end = threading.Thread(target=self.pool.shutdown, kwargs={"cancel_futures": True})
        end.start()  # it waits for all processes, also for one that was stopped when it had nothing more to do
        while end.is_alive():
            if self._end_stopped():  # and all others: it may have held the lock with which they wait for work
                for process in set(multiprocessing.active_children()) - self.others:
                    process.kill()
            end.join(1.0)
        if isinstance(error, BrokenProcessPool):
            if self.stopped is not None:
                raise UserError(
                    f"--num_encoding_processes {self.processes}: process {self.stopped} was stopped (SIGSTOP) and "
                    f"stood still for {self.clock.patience:g} s: {RESUMES}"
                ) from error
            raise UserError(
                f"one of {self.processes} processes that encode was killed, as happens when memory runs out; give "
                f"fewer --num_encoding_processes or less --tokens_per_batch: {RESUMES}"
            ) from error

    def _submit(self, shard: Passages):
        return self.pool.submit(embed_shard, self.plan, shard)

    def _ready(self, answers: list) -> list:
        while not (done := wait(answers, timeout=1.0, return_when=FIRST_COMPLETED).done):
            self._end_stopped()
        return list(done)

    def _end_stopped(self) -> bool:
        """Kill what has stood still for too long, which breaks the pool; whether there was any."""
        stopped = self.clock.stood_still(psutil.Process().children())
        for process in stopped:
            self.stopped = process.pid
            process.kill()
        return bool(stopped)

    def _result(self, answer) -> tuple[np.ndarray, int]:
        return answer.result()

    def _size(self) -> int:
        return self.processes


def _start_worker(gpus, threads: int) -> None:
    """Give a new process of a `NodeWorkers` its GPU, before it has seen any, and its share of the cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    """A pool's process waits for work for good, also where nobody is left to give it any."""
    parent.join()
    os._exit(1)


class RayWorkers(Workers):
    """Tasks on a Ray cluster, which Ray places where there is room, spread over the nodes, and repeats where one died.

    Args:
        address: as `RayConnection`'s.
        gpus_a_task: share of a GPU that a task reserves; 0 for a core.
    """

    def __init__(self, embedder: PassageEmbedder, plan: EncoderPlan, address: str, gpus_a_task: float):
        super().__init__(embedder, plan)
        self.connection = RayConnection(address)
        self.gpus_a_task = gpus_a_task

    def __enter__(self) -> "RayWorkers":
        import ray

        self.connection.open(len(os.sched_getaffinity(0)))
        gpus = ray.cluster_resources().get("GPU", 0)
        if self.gpus_a_task > gpus:
            self.connection.close()
            raise UserError(
                f"--gpus_per_task {self.gpus_a_task:g} is more than the Ray cluster's {gpus:g} GPUs; give less, or 0 "
                "to encode on CPUs"
            )
        self.task = ray.remote(embed_shard).options(
            num_cpus=1, num_gpus=self.gpus_a_task, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        return self

    def __exit__(self, *error) -> None:
        self.connection.close()

    def _submit(self, shard: Passages):
        return self.task.remote(self.plan, shard)

    def _ready(self, answers: list) -> list:
        import ray

        return ray.wait(answers, num_returns=1)[0]

    def _result(self, answer) -> tuple[np.ndarray, int]:
        import ray

        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # a worker or its node has died too often
            raise UserError(
                f"--distributed ray: of {1 + RETRIES} tries to encode a shard the last one ended so: "
                f"{str(error).splitlines()[0]}; see to the cluster, or give less --tokens_per_batch: {RESUMES}"
            ) from error

    def _size(self) -> int:
        """Asked again for every shard: nodes come and go."""
        import ray

        resources = ray.cluster_resources()
        cores = int(resources.get("CPU", 1))
        return max(1, min(cores, int(resources["GPU"] / self.gpus_a_task)) if self.gpus_a_task else cores)
