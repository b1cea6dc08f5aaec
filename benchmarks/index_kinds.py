"""Kinds of index on the same knowledge: bytes, time and memory to build, time to open, recall and speed.

    python benchmarks/index_kinds.py --short     # 20,000 x 384, under a minute
    python benchmarks/index_kinds.py             # 1,000,000 x 384: Flat, IVF-PQ, BM25; the first 200,000: HNSW

Passages are real ones (../shared/data/nq_gold, or test_data where it is missing) over and over with another number each
time; their vectors are random, of length 1, around 1,000 centers, because encoding a million would take hours. (Around
no center, all neighbours would be equally far, and recall would say nothing.) Queries are other vectors around the same
centers. "peak" is the most memory of the process that builds (VmHWM: with the pages of mapped files) and, of that, what
it allocated itself (RssAnon). "open" is until the first search can begin. Recall@5 is against an exact search, queries
go in one call, on all cores; of the efforts that are tried (--nprobe, --ef_search) each is a line.
"""

import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header, status_mib
from benchmarks.retrieval_backends import random_vectors, run
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import save_json

ROOT = Path(__file__).resolve().parent.parent
NQ_GOLD = ROOT.parent / "shared" / "data" / "nq_gold" / "passages.tsv"  # id, title, text
BM25 = "bm25"


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "20,000 passages for every kind, in under a minute.")
    folder: Path = flag(Path("output/index_kinds"), "Scratch; removed at the end.")
    passages: int = flag(1_000_000, "Passages of the indexes of --kinds.")
    graph_passages: int = flag(200_000, "Passages, the first ones, of --graph_kinds.")
    dimension: int = flag(384, "Length of a vector.")
    kinds: list[str] = flag(["Flat", "IVF1024,PQ64", BM25], "Factory strings, or bm25, over all passages.")
    graph_kinds: list[str] = flag(["HNSW128,Flat", "HNSW32,SQ8"], "Factory strings over fewer.")
    queries: int = flag(256, "Queries of a search.")
    n_docs: int = flag(5, "Passages a query.")

    def __post_init__(self):
        if self.short:
            self.passages = self.graph_passages = 20_000
            self.kinds, self.graph_kinds = ["Flat", "IVF64,PQ64x4", BM25], ["HNSW32,Flat", "HNSW32,SQ8"]


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- Knowledge --------------------------------------------------------------------------------------------------------


def unit_vectors(rows: int, dimension: int, seed: int):
    """(rows, dimension) float32 of length 1, in clusters."""
    import numpy as np

    vectors = random_vectors(rows, dimension, seed)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class RandomEmbedder:
    """In a `PassageEmbedder`'s place: the vectors of a shard follow from its number, not from its texts."""

    def __init__(self, dimension: int):
        self.dimension = dimension

    def embed_shards(self, shards, write):
        for path, shard in shards:
            write(path, shard, unit_vectors(len(shard), self.dimension, seed=1 + int(path.name.split("-")[1])))
            yield len(shard)


def real_passages() -> list[tuple[str, str]]:
    """Title and text of nq_gold's passages where they are at hand, else of the quickstart's."""
    from rag.files import read_lines
    from rag.knowledge.passages import read_passages

    if NQ_GOLD.is_file():
        return [tuple(line.split("\t")[1:3]) for line in read_lines(NQ_GOLD)]
    return list(read_passages(ROOT / "test_data" / "my_knowledge_dataset.csv"))


def passages_of(count: int):
    """Title and text of `count` passages, no two of them equal."""
    import itertools

    for number, (title, text) in enumerate(itertools.islice(itertools.cycle(real_passages()), count)):
        yield title, f"{text} ({number})"


def make_passages(count: int, dimension: int, folder: Path, writer) -> None:
    from rag.knowledge.shards import ShardPlan, write_dataset

    write_dataset(passages_of(count), RandomEmbedder(dimension), folder, "benchmark", ShardPlan(count))
    writer.send(None)


# --- One kind ---------------------------------------------------------------------------------------------------------


class PeakMemory:
    """The most MiB that this process held, and of those the most that it had allocated, watched ten times a second."""

    def __enter__(self) -> "PeakMemory":
        self.allocated, self.over = 0.0, threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self.watcher.join()
        self.allocated = max(self.allocated, status_mib("RssAnon"))
        self.held = status_mib("VmHWM")

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            self.allocated = max(self.allocated, status_mib("RssAnon"))


def build(folder: Path, kind: str, args, writer) -> None:
    """Seconds and memory of one index."""
    from rag.index.build import EmbeddingFiles, IndexPlan, build_index
    from rag.knowledge.shards import shards_of

    vectors = EmbeddingFiles(shards_of(folder / "passages"), args.dimension)
    with PeakMemory() as peak:
        start = time.perf_counter()
        if kind == BM25:
            open_words(folder)
        else:
            build_index(vectors, IndexPlan(kind, args.dimension), folder / "index", "benchmark")
        seconds = time.perf_counter() - start
    writer.send({"build_seconds": seconds, "peak_mib": peak.held, "allocated_mib": peak.allocated})


def open_words(folder: Path):
    """The BM25 index, built the first time."""
    from types import SimpleNamespace

    from rag.index.bm25 import open_bm25

    return open_bm25(SimpleNamespace(passages_path=folder / "passages", index_path=folder / "words"))


def search(folder: Path, kind: str, args, writer) -> None:
    """Milliseconds until an index is open, then recall, which BM25 has not, and speed at every effort."""
    from rag.index.build import EmbeddingFiles
    from rag.index.knowledge_index import KnowledgeIndex
    from rag.index.recall import exact_scores, measure_efforts
    from rag.knowledge.shards import shards_of

    def open_index(**effort) -> KnowledgeIndex:
        if kind == BM25:
            return open_words(folder)
        return KnowledgeIndex.load_from_disk(args.dimension, folder / "passages", folder / "index", **effort)

    start = time.perf_counter()
    index = open_index()
    index.init_index()
    open_ms = 1000 * (time.perf_counter() - start)
    if kind == BM25:
        texts = index.passages[:: len(index) // args.queries]["text"][: args.queries]
        queries = index.encode_questions([" ".join(text.split()[20:30]) for text in texts])
        start = time.perf_counter()
        index.search(queries, args.n_docs)
        writer.send((open_ms, [{"queries_per_second": args.queries / (time.perf_counter() - start)}]))
        return
    queries = unit_vectors(args.queries, args.dimension, seed=10**6)
    best = exact_scores(EmbeddingFiles(shards_of(folder / "passages"), args.dimension), queries, args.n_docs)
    writer.send((open_ms, measure_efforts(open_index, queries, best)))


def main(args: BenchmarkArguments) -> list[dict]:
    from rag.knowledge.recall import size_of

    print(
        f"{header('faiss-cpu')}\n"
        f"{args.dimension} dimensions, {args.queries} queries in a call, {args.n_docs} passages each\n\n"
        "| index | passages | MiB | built in, s | peak, MiB (allocated) | open, ms | effort | recall | queries/s |\n"
        "|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for count, kinds in ((args.passages, args.kinds), (args.graph_passages, args.graph_kinds)):
        folder = (args.folder / str(count)).resolve()
        if kinds and not folder.exists():
            folder.mkdir(parents=True)
            run(make_passages, [(count, args.dimension, folder / "passages")])
        for kind in kinds:
            built = run(build, [(folder, kind, args)])[0]
            size = size_of(folder / ("words" if kind == BM25 else "index")) / 2**20
            open_ms, efforts = run(search, [(folder, kind, args)])[0]
            for found in efforts:
                effort = " ".join(f"{name} {value}" for name, value in found.items() if name in ("nprobe", "ef_search"))
                recall = f"{found['recall']:.3f}" if "recall" in found else ""
                row = {"index": kind, "passages": count, "mib": size, **built, "open_ms": open_ms, **found}
                rows.append(row)
                print(
                    f"| {kind} | {count:,} | {size:,.0f} | {built['build_seconds']:.1f} | {built['peak_mib']:,.0f} "
                    f"({built['allocated_mib']:,.0f}) | {open_ms:.0f} | {effort} | {recall} | "
                    f"{found['queries_per_second']:,.0f} |",
                    flush=True,
                )
    save_json(rows, args.folder.with_name(f"{args.folder.name}.json"))
    shutil.rmtree(args.folder)
    return rows


if __name__ == "__main__":
    run_script(parse_args, main)
