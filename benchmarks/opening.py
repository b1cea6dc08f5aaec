"""Opening an HNSW index that is as large as Wikipedia's, beside FAISS's own mapping of the same file.

    python benchmarks/opening.py --short                # 200,000 passages: seconds
    python benchmarks/opening.py                        # 1,000,000, and Wikipedia's 21,015,300 without FAISS

The file is that of an HNSW128 index of 768 dimensions with true levels and offsets; links and vectors, which opening
should not read, are a hole in the file, so that 80 GiB take 250 MB of disk. FAISS reads all links, from memory here: of
more than --faiss_passages they would not fit there. Ours reads them the first time, to see that each is in range. Each
opening is in a process of its own; medians, but for the first time.
"""

import json
import statistics
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import header, in_its_own_process
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

LINKS = 128


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "One index of 200,000 passages, opened three times.")
    passages: list[int] = flag([1_000_000, 21_015_300], "Passages of the indexes.")
    dimension: int = flag(768, "Length of a vector.")
    faiss_passages: int = flag(1_000_000, "Passages up to which FAISS opens it, too.")
    openings: int = flag(5, "Openings a side.")
    folder: Path = flag(Path("output/opening"), "Scratch; the files are removed.")
    side: str | None = flag(None, "Open --index in this process and print JSON.")
    index: Path | None = flag(None, "The FAISS file, for --side.")

    def __post_init__(self):
        if self.short:
            self.passages, self.openings = [200_000], 3


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def write_hollow_index(path: Path, passages: int, dimension: int) -> None:
    """The file of an HNSW index over so many passages, with a hole where links and vectors belong."""
    import faiss
    import numpy as np

    from rag.index.faiss_mapping import GRAPH, HEADER

    graph = faiss.HNSW(LINKS)
    levels = 1 + np.array([graph.random_level() for _ in range(min(passages, 100_000))], dtype="<i4")
    levels = np.resize(levels, passages)
    levels[0] = levels.max()  # links of zeros lead to the first vector, on whatever level
    probabilities, ranges = (faiss.vector_to_array(v) for v in (graph.assign_probas, graph.cum_nneighbor_per_level))
    offsets = np.concatenate([[0], np.cumsum(ranges[levels], dtype="<u8")]).astype("<u8")
    entry_point = int(levels.argmax())

    def head(kind: bytes) -> bytes:
        return HEADER.pack(kind, dimension, passages, 0, 0, True, faiss.METRIC_INNER_PRODUCT)

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(head(b"IHNf"))
        for numbers in (probabilities, ranges, levels, offsets):
            file.write(struct.pack("<Q", len(numbers)) + numbers.tobytes())
        file.write(struct.pack("<Q", int(offsets[-1])))
        file.seek(4 * int(offsets[-1]), 1)
        file.write(GRAPH.pack(entry_point, int(levels[entry_point]) - 1, 40, 16, 1))
        file.write(head(b"IxFI") + struct.pack("<Q", passages * dimension))
        file.truncate(file.tell() + 4 * passages * dimension)


def open_once(args: BenchmarkArguments) -> float:
    import faiss

    from rag.index.faiss_mapping import map_index

    ways = {"ours": map_index, "faiss": lambda path: faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)}
    start = time.perf_counter()
    index = ways[args.side](args.index)
    seconds = time.perf_counter() - start
    assert index.ntotal == index.hnsw.levels.size() > 0
    return seconds


def first_and_median(args: BenchmarkArguments, side: str, index: Path) -> tuple[float, float]:
    words = ("--side", side, "--index", index)
    seconds = [in_its_own_process(__file__, *words) for _ in range(args.openings + 1)]
    return seconds[0], statistics.median(seconds[1:])


def main(args: BenchmarkArguments) -> list[dict]:
    if args.side is not None:
        print(json.dumps(open_once(args)))
        return []
    print(
        f"{header('faiss-cpu')}\nHNSW{LINKS}, {args.dimension} dimensions, medians of {args.openings} openings\n\n"
        "| passages | GiB | the first time, s | ours, s (bar 0.1) | FAISS, mapped, s | ratio |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for passages in args.passages:
        path = args.folder / f"hnsw-{passages}.faiss"
        try:
            write_hollow_index(path, passages, args.dimension)
            size = path.stat().st_size / 2**30
            first, ours = first_and_median(args, "ours", path)
            theirs = first_and_median(args, "faiss", path)[1] if passages <= args.faiss_passages else None
        finally:
            path.unlink(missing_ok=True)
        shown = f"{theirs:.3f} | {theirs / ours:.0f}x" if theirs else " | "
        print(f"| {passages:,} | {size:.1f} | {first:.4f} | {ours:.4f} | {shown} |", flush=True)
        rows.append({"passages": passages, "first": first, "ours": ours, "faiss": theirs})
    return rows


if __name__ == "__main__":
    run_script(parse_args, main)
