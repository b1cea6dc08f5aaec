"""Seconds and memory of a retrieval: rank 0 searching, Ray actors searching, every rank searching for itself.

    python benchmarks/retrieval_backends.py --short                  # 20,000 passages, 2 workers, about a minute
    python benchmarks/retrieval_backends.py                          # 200,000 x 768, 1, 2 and 4 workers

Random clustered vectors and passages of about 100 words are written to --folder first, and reused. Every worker (a
rank) asks for 5 passages of each of 8 questions, all workers at once; "ms a retrieval" is the median of every worker's
every call, until vectors and texts are there. "FAISS alone" is the same searches without all else: as many processes as
search in that way, with its number of threads, each with the questions that come to it, all at once (for pytorch one
process with the questions of all workers, for local one with its own for each worker). "Memory" is what opening and
searching added to the proportional memory (PSS) of the ranks and of all they started, after the same questions in all.
"copies" is the local way without memory-mapping, for comparison.
"""

import multiprocessing
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import CORES, header, proportional_mib
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import atomic_folder, save_json

FORK_SERVER = multiprocessing.get_context("forkserver")
WAYS = ("local", "pytorch", "ray", "copies")
FACTORIES = {"hnsw": "HNSW32,Flat", "hnsw128": "HNSW128,Flat", "ivf": "IVF512,Flat", "flat": "Flat"}
CENTERS = 1000
NPROBE = 16  # lists of an ivf index that are searched


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "20,000 passages, 1 and 2 workers, 30 calls: a minute.")
    folder: Path = flag(Path("output/retrieval_backends"), "Where the indexes are kept.")
    passages: int = flag(200_000, "Passages in the index.")
    dimension: int = flag(768, "Length of a vector.")
    centers: int = flag(CENTERS, "What vectors lie around; 0 for no clusters.")
    kinds: list[str] = flag(["hnsw", "ivf"], "Indexes: hnsw, hnsw128, ivf, flat.")
    ways: list[str] = flag(list(WAYS), "What to measure.")
    workers: list[int] = flag([1, 2, 4], "Numbers of ranks.")
    actors: int = flag(CORES, "Ray actors at most, and never more than ranks.")
    calls: int = flag(100, "Measured calls a worker; medians are reported.")
    batch_size: int = flag(8, "Questions a worker asks at a time.")
    n_docs: int = flag(5, "Passages a question.")

    def __post_init__(self):
        if self.short:
            self.passages, self.workers, self.calls = min(self.passages, 20_000), [1, 2], 30


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- The knowledge ----------------------------------------------------------------------------------------------------


def random_vectors(rows: int, dimension: int, seed: int, centers: int = CENTERS):
    """Vectors (rows, dimension) float32 around centers, which are the same for every seed, or around none."""
    import numpy as np

    random = np.random.default_rng(seed)
    noise = random.standard_normal((rows, dimension), dtype=np.float32)
    if not centers:
        return noise
    around = np.random.default_rng(0).standard_normal((centers, dimension), dtype=np.float32)
    return around[random.integers(centers, size=rows)] + 0.7 * noise


def build(args: BenchmarkArguments) -> Path:
    """Passages and one index of each kind, written once."""
    import datasets
    import pyarrow as pa

    from rag.index.build import EmbeddingFiles, IndexPlan, build_index
    from rag.knowledge.shards import shards_of

    folder = args.folder / f"{args.passages}x{args.dimension}-{args.centers}"
    blocks = [(start, min(start + 10_000, args.passages)) for start in range(0, args.passages, 10_000)]
    if not folder.is_dir():
        tables = []
        for start, end in blocks:
            vectors = random_vectors(end - start, args.dimension, seed=1 + start, centers=args.centers)
            text = [f"Passage number {row} " + "and some more words of text " * 16 for row in range(start, end)]
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), args.dimension)
            titles = [f"Title {row}" for row in range(start, end)]
            tables.append(datasets.Dataset(pa.table({"title": titles, "text": text, "embeddings": embeddings})))
        with atomic_folder(folder) as unfinished:
            datasets.concatenate_datasets(tables).save_to_disk(unfinished / "passages")
    vectors = EmbeddingFiles(shards_of(folder / "passages"), args.dimension)
    for kind in args.kinds:
        path = folder / f"{kind}.faiss"
        if not path.exists():
            start = time.monotonic()
            build_index(vectors, IndexPlan(FACTORIES[kind], args.dimension), path, "benchmark")
            print(
                f"{kind}: built in {time.monotonic() - start:.0f} s, {path.stat().st_size / 2**20:.0f} MiB", flush=True
            )
    return folder


# --- One measurement --------------------------------------------------------------------------------------------------


def make_retriever(way: str, folder: Path, kind: str, args: BenchmarkArguments, size: int, stack: ExitStack):
    from transformers import BartConfig, DPRConfig, RagConfig

    from distributed_pytorch_retriever import RagPyTorchDistributedRetriever
    from distributed_ray_retriever import RagRayDistributedRetriever, RetrievalWorkers
    from rag.retrieval.retriever import RagKnowledgeRetriever

    config = RagConfig(
        question_encoder=DPRConfig().to_dict(), generator=BartConfig().to_dict(), index_name="custom",
        retrieval_vector_size=args.dimension, passages_path=str(folder / "passages"),
        index_path=str(folder / f"{kind}.faiss"), **({"nprobe": NPROBE} if kind == "ivf" else {}),
    )  # fmt: skip
    if way == "pytorch":
        retriever = RagPyTorchDistributedRetriever(config, None, None)
    elif way == "ray":
        workers = stack.enter_context(RetrievalWorkers(min(args.actors, size)))
        retriever = RagRayDistributedRetriever(config, None, None, workers)
    else:
        retriever = RagKnowledgeRetriever(config, None, None, init_retrieval=False)
        if way == "copies":
            import faiss

            from rag.index import knowledge_index

            knowledge_index.map_index = faiss.read_index
    return retriever


def start_together() -> float:
    """Wait for a moment that all processes of the machine know: they leave a barrier up to a millisecond apart."""
    tick = 0.004
    time.sleep(tick - time.perf_counter() % tick + tick)
    return time.perf_counter()


def warm_up(folder: Path) -> None:
    """Bring the files into the machine's memory, so that no way waits for the disk in place of another."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def rank_main(rank: int, size: int, store: str, way: str, folder: Path, kind: str, args, writer) -> None:
    """One worker: seconds of each call, and the memory that retrieval added."""
    import faiss
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(CORES if way == "pytorch" else max(1, CORES // size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    # All before the first call: a rank that is done must not compute while another still waits for its answer. After
    # the timed calls come more until all workers together have asked, and touched of the files, as much as one alone.
    seeds = range(rank, max(args.workers) * (10 + args.calls), size)
    batches = [random_vectors(args.batch_size, args.dimension, 10**6 + seed, args.centers) for seed in seeds]
    seconds = []
    with ExitStack() as stack:
        retriever = make_retriever(way, folder, kind, args, size, stack)
        dist.barrier()
        before = proportional_mib()
        dist.barrier()
        retriever.init_retrieval()
        for call, queries in enumerate(batches):
            if call < 10 + args.calls:
                dist.barrier()
                start = start_together()
                retriever.retrieve(queries, args.n_docs)
                seconds.append(time.perf_counter() - start)
            else:
                retriever.retrieve(queries, args.n_docs)
        dist.barrier()
        memory = proportional_mib() - before
        dist.barrier()
    writer.send((seconds[10:], memory))


@dataclass(frozen=True)
class Searchers:
    """How a way spreads the questions of all workers over processes that search."""

    processes: int
    searches: int  # one after the other, of each process
    questions: int  # of each search

    @classmethod
    def of(cls, way: str, size: int, args) -> "Searchers":
        if way == "pytorch":
            return cls(1, 1, args.batch_size * size)
        processes = min(args.actors, size) if way == "ray" else size
        return cls(processes, -(-size // processes), args.batch_size)


def faiss_alone(rank: int, searchers: Searchers, barrier, folder: Path, kind: str, args, writer) -> None:
    """Seconds of FAISS for the same searches, without any of the suite's code."""
    import faiss

    faiss.omp_set_num_threads(max(1, CORES // searchers.processes))
    index = faiss.read_index(str(folder / f"{kind}.faiss"), faiss.IO_FLAG_MMAP_IFC)
    if kind == "ivf":
        index.nprobe = NPROBE
    calls = 10 + args.calls
    count = calls * searchers.searches * searchers.questions
    queries = random_vectors(count, args.dimension, 10**6 + rank, args.centers)
    seconds = []
    for batches in queries.reshape(calls, searchers.searches, searchers.questions, args.dimension):
        barrier.wait()
        start = start_together()
        for batch in batches:
            index.search(batch, args.n_docs)
        seconds.append(time.perf_counter() - start)
    writer.send(seconds[10:])


def time_alone(searchers: Searchers, folder: Path, kind: str, args) -> float:
    """Median milliseconds of `faiss_alone`."""
    barrier = FORK_SERVER.Barrier(searchers.processes)
    ranks = [(rank, searchers, barrier, folder, kind, args) for rank in range(searchers.processes)]
    return 1000 * statistics.median(second for own in run(faiss_alone, ranks) for second in own)


def run(target, arguments: list[tuple]) -> list:
    """What each process, one for each tuple of arguments, sends back."""
    pipes = [FORK_SERVER.Pipe(duplex=False) for _ in arguments]
    processes = [
        FORK_SERVER.Process(target=target, args=(*own, writer))
        for own, (_, writer) in zip(arguments, pipes, strict=True)
    ]
    for process, (_, writer) in zip(processes, pipes, strict=True):
        process.start()
        writer.close()
    results = [reader.recv() for reader, _ in pipes]
    for process in processes:
        process.join()
    return results


# --- The table --------------------------------------------------------------------------------------------------------


def main(args: BenchmarkArguments) -> list[dict]:
    FORK_SERVER.set_forkserver_preload(["torch.distributed", "faiss", "transformers.models.rag.retrieval_rag"])
    folder = build(args).resolve()
    print(
        f"{header('torch', 'faiss-cpu', 'ray')}\n{args.passages} x {args.dimension}, batch {args.batch_size} a worker, "
        f"{args.n_docs} passages, medians of {args.calls} calls a worker\n\n"
        "| index | way | workers | ms a retrieval | FAISS alone, ms | beyond it, ms | memory, MiB |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    warm_up(folder)
    rows, alone = [], {}
    for kind in args.kinds:
        for way in args.ways:
            for size in args.workers:
                searchers = Searchers.of(way, size, args)
                if (kind, searchers) not in alone:
                    alone[kind, searchers] = time_alone(searchers, folder, kind, args)
                row = {"index": kind, "way": way, "workers": size, "faiss_ms": alone[kind, searchers]}
                rows.append(row | measure(way, size, folder, kind, args, alone[kind, searchers]))
                print("| {index} | {way} | {workers} | {ms:.2f} | {faiss_ms:.2f} | {beyond_ms:.2f} | {memory_mib:.0f} |"
                      .format(**rows[-1]), flush=True)  # fmt: skip
    save_json(rows, folder / "results.json")
    return rows


def measure(way: str, size: int, folder: Path, kind: str, args, alone: float) -> dict:
    """Median milliseconds of all workers' calls, those beyond FAISS's own, and the memory of the machine."""
    store = folder / f"store-{uuid4().hex}"
    try:
        results = run(rank_main, [(rank, size, f"file://{store}", way, folder, kind, args) for rank in range(size)])
    finally:
        store.unlink(missing_ok=True)
    ms = 1000 * statistics.median(seconds for times, _ in results for seconds in times)
    return {"ms": ms, "beyond_ms": ms - alone, "memory_mib": sum(memory for _, memory in results)}


if __name__ == "__main__":
    run_script(parse_args, main)
