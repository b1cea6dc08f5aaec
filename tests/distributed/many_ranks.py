"""Ranks of a job for tests: processes forked from a server that has imported torch and transformers once."""

import multiprocessing
import os
from pathlib import Path
from uuid import uuid4

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["torch.distributed", "datasets", "faiss", "rag.models.checkpoints", "pytorch_lightning"]
)


def run_ranks(function, size: int, folder: Path, *args, seconds: float = 60) -> list:
    """`function(rank, *args)` on `size` ranks with a process group on the loopback interface.

    Returns what each rank returned or the exception that it raised; None for one that was killed.
    """
    store = f"file://{folder}/store-{uuid4().hex}"
    ends = [FORK_SERVER.Pipe(duplex=False) for _ in range(size)]
    processes = [
        FORK_SERVER.Process(target=_rank, args=(rank, size, store, ends[rank][1], function, args))
        for rank in range(size)
    ]
    try:
        for process, (_, writer) in zip(processes, ends, strict=True):
            process.start()
            writer.close()
        return [_result(reader, seconds) for reader, _ in ends]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _result(reader, seconds: float):
    assert reader.poll(seconds), f"a rank still hangs after {seconds} s"
    try:
        return reader.recv()
    except EOFError:
        return None


def _rank(rank: int, size: int, store: str, writer, function, args) -> None:
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        writer.send(function(rank, *args))
    except Exception as error:
        writer.send(error)
    os._exit(0)  # as a rank that fails leaves: without taking leave of the process group
