"""One `retrieve` beside FAISS alone and transformers' `RagRetriever`, the contexts' tokenizing, opening, memory.

    python benchmarks/retrieval_call.py --short                # 20,000 passages, Flat too: about a minute
    python benchmarks/retrieval_call.py                        # HNSW128 over 20,000 x 768, Flat over 200,000 x 768

Random vectors and passages of about 100 words are written to --folder first, and reused. HNSW is measured among vectors
around centers, where it is quick, and around none, where all passages are about equally far. Milliseconds are medians
over calls in one process, ours and FAISS's in turn. "Opening" is from the paths to an index that can be searched,
"memory" what opening and one call added to the anonymous memory of a new process: pages that are not the files' own.
Contexts are the passages and questions of ../shared/data/nq_gold, or made-up text where it is not there.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import anonymous_mib, header, in_its_own_process
from benchmarks.retrieval_backends import CENTERS, build, random_vectors
from benchmarks.retrieval_backends import BenchmarkArguments as KnowledgeArguments
from benchmarks.training_step import NQ_GOLD, examples, make_tokenizer
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

SIDES = ("transformers", "ours")
DIMENSION, N_DOCS = 768, 5


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "3 calls, and 20,000 passages for Flat, too.")
    calls: int = flag(7, "Measured calls a side; medians are reported.")
    flat_passages: int = flag(200_000, "Passages of the Flat index.")
    hnsw_passages: int = flag(20_000, "Passages of the HNSW128 index.")
    folder: Path = flag(Path("output/retrieval_call"), "Where the indexes are kept.")
    side: str | None = flag(None, "Open and call once in this process, and print JSON.")
    index: Path | None = flag(None, "The FAISS file, for --side.")

    def __post_init__(self):
        if self.short:
            self.calls, self.flat_passages = 3, min(self.flat_passages, 20_000)


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def build_index(args: BenchmarkArguments, kind: str, passages: int, centers: int = CENTERS) -> Path:
    """The FAISS file of one kind; its passages lie beside it."""
    knowledge = KnowledgeArguments(
        folder=args.folder, passages=passages, dimension=DIMENSION, kinds=[kind], centers=centers
    )
    return build(knowledge).resolve() / f"{kind}.faiss"


def make_retriever(side: str, index: Path, tokenizer=None):
    """A retriever of one side over a FAISS file and the passages beside it."""
    from transformers import BartConfig, DPRConfig, RagConfig, RagRetriever

    from rag.retrieval.retriever import RagKnowledgeRetriever

    config = RagConfig(
        question_encoder=DPRConfig().to_dict(), generator=BartConfig().to_dict(), index_name="custom",
        retrieval_vector_size=DIMENSION, passages_path=str(index.parent / "passages"), index_path=str(index),
    )  # fmt: skip
    kind = {"transformers": RagRetriever, "ours": RagKnowledgeRetriever}[side]
    return kind(config, tokenizer, tokenizer)


def median_ms(calls: int, **functions) -> dict[str, float]:
    """Milliseconds of each function, which take turns, after one round that is not counted."""
    seconds = {name: [] for name in functions}
    for _ in range(calls + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times[1:]) for name, times in seconds.items()}


# --- Opening and memory, in a process of their own --------------------------------------------------------------------


def open_and_call(args: BenchmarkArguments) -> dict:
    queries = random_vectors(64, DIMENSION, seed=10**6)
    make_retriever("ours", args.index)  # what is imported at the first call is no part of opening an index
    before = anonymous_mib()
    start = time.perf_counter()
    retriever = make_retriever(args.side, args.index)
    opened = time.perf_counter() - start
    retriever.retrieve(queries, N_DOCS)
    return {"open_s": opened, "memory_mib": anonymous_mib() - before}


# --- The table --------------------------------------------------------------------------------------------------------


def measure(args: BenchmarkArguments, index: Path, batch: int, centers: int = CENTERS) -> dict:
    kind = index.stem + ("" if centers else ", no centers")
    opened = {side: in_its_own_process(__file__, "--side", side, "--index", index) for side in SIDES}
    retrievers = {side: make_retriever(side, index) for side in SIDES}
    queries = random_vectors(batch, DIMENSION, 10**6, centers)
    searched = retrievers["ours"].index.faiss_index
    found = {side: retriever.retrieve(queries, N_DOCS)[1].tolist() for side, retriever in retrievers.items()}
    # transformers calls alone: after it the processor's caches hold its copy of the index, not the mapped file.
    calls = {side: lambda side=side: retrievers[side].retrieve(queries, N_DOCS) for side in SIDES}
    ms = median_ms(3 * args.calls, faiss=lambda: searched.search(queries, N_DOCS), ours=calls["ours"])
    ms |= median_ms(args.calls, transformers=calls["transformers"])
    same = sum(map(list.__eq__, *found.values()))
    size = index.stat().st_size / 2**20
    print(
        f"| {kind}, {len(retrievers['ours'].index)} passages, {batch} queries | {ms['faiss']:.1f} | {ms['ours']:.1f} | "
        f"{ms['transformers']:.1f} | {ms['ours'] / ms['faiss']:.2f}x | {ms['transformers'] / ms['ours']:.2f}x | "
        + " | ".join(f"{opened[side]['open_s']:.3f}" for side in ("ours", "transformers"))
        + f" | {size:.0f} | "
        + " | ".join(f"{opened[side]['memory_mib']:.0f}" for side in ("ours", "transformers"))
        + f" | {same} of {batch} |",
        flush=True,
    )
    return {"kind": kind, "ms": ms, "opened": opened}


def measure_tokenizing(args: BenchmarkArguments, index: Path) -> dict:
    """320 contexts: five passages for each of 64 questions."""
    import torch

    questions, _, passages = examples()
    docs = []
    for i in range(64):
        titles, texts = zip(*(passages[(N_DOCS * i + j) * 7 % len(passages)] for j in range(N_DOCS)), strict=True)
        docs.append({"title": list(titles), "text": list(texts)})
    tokenizer = make_tokenizer()
    retrievers = {side: make_retriever(side, index, tokenizer) for side in SIDES}
    ways = {
        side: lambda retriever=retriever: retriever.postprocess_docs(docs, questions[:64], None, N_DOCS, "pt")
        for side, retriever in retrievers.items()
    }
    (their_ids, their_mask), (our_ids, our_mask) = (ways[side]() for side in SIDES)
    length = our_ids.shape[1]
    same = torch.equal(their_ids[:, :length], our_ids) and torch.equal(their_mask[:, :length], our_mask)
    assert same and not their_mask[:, length:].any()
    ms = median_ms(args.calls, **ways)
    print(
        f"\n320 contexts tokenized: transformers {ms['transformers']:.0f} ms, ours {ms['ours']:.0f} ms: "
        f"{ms['transformers'] / ms['ours']:.2f}x (bar 2); the same tokens, padded to {length} instead of 300; "
        f"{'nq_gold' if NQ_GOLD.is_dir() else f'made-up text, as {NQ_GOLD} is not there'}",
        flush=True,
    )
    return {"kind": "tokenizing", "ms": ms}


def main(args: BenchmarkArguments) -> list[dict]:
    if args.side is not None:
        print(json.dumps(open_and_call(args)))
        return []
    hnsw, plain = (build_index(args, "hnsw128", args.hnsw_passages, centers) for centers in (CENTERS, 0))
    flat = build_index(args, "flat", args.flat_passages)
    print(
        f"{header('faiss-cpu', 'transformers')}\n{N_DOCS} passages a query, medians of {args.calls} calls\n\n"
        "| index | FAISS alone, ms | ours, ms | transformers, ms | ours to FAISS (bar 1.15) | transformers to ours "
        "(bar 3, Flat) | ours opens in, s (bar 0.1) | transformers, s | index, MiB | ours adds, MiB | "
        f"transformers, MiB | same passages |\n|{'---|' * 12}",
        flush=True,
    )
    return [
        measure(args, hnsw, 64),
        measure(args, plain, 64, centers=0),
        measure(args, flat, 256),
        measure_tokenizing(args, hnsw),
    ]


if __name__ == "__main__":
    run_script(parse_args, main)
