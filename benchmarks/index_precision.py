"""How much of an exact float32 search `--index_precision fp16` and `int8` find, on the CPU: the share, no times.

    python benchmarks/index_precision.py --short     # 20,000 x 384, seconds
    python benchmarks/index_precision.py             # 200,000 x 768, a minute

Three sorts of vectors: normal ones; such around 1,000 centers, within a tenth of a center's length, so that the best
differ by little; normal ones of which one coordinate in a hundred is ten times as large, which leaves the others few of
int8's 127 steps. Queries are other vectors of the same sort. For int8 recall is given with fewer candidates than the
search takes, which is 64, or four for each passage where these are more.
"""

from dataclasses import dataclass

from benchmarks.machine import header
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

CANDIDATES = (8, 16, 64, 200)  # a question


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "20,000 vectors of 384 dimensions.")
    vectors: int = flag(200_000, "Vectors of each sort.")
    dimension: int = flag(768, "Length of a vector.")
    queries: int = flag(256, "Queries of a search.")

    def __post_init__(self):
        if self.short:
            self.vectors, self.dimension = 20_000, 384


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def normal(rng, rows: int, dimension: int):
    return rng.standard_normal((rows, dimension), dtype="float32")


def clustered(rng, rows: int, dimension: int):
    import numpy as np

    centers = np.random.default_rng(0).standard_normal((1000, dimension), dtype="float32")
    return centers[rng.integers(0, len(centers), rows)] + 0.1 * normal(rng, rows, dimension)


def uneven(rng, rows: int, dimension: int):
    vectors = normal(rng, rows, dimension)
    vectors[:, ::100] *= 10
    return vectors


SORTS = {"normal": normal, "clustered": clustered, "uneven": uneven}


def measure(name: str, args: BenchmarkArguments) -> list[dict]:
    """Recall of both precisions among vectors of one sort, of the best 5 and of the best 50."""
    import faiss
    import numpy as np

    from rag.index.device_search import DeviceSearch
    from rag.index.recall import recall

    vectors = SORTS[name](np.random.default_rng(1), args.vectors, args.dimension)
    queries = SORTS[name](np.random.default_rng(2), args.queries, args.dimension)
    best, _ = faiss.knn(queries, vectors, 50, metric=faiss.METRIC_INNER_PRODUCT)
    rows = []
    for precision, candidates in [("fp16", (0,)), ("int8", CANDIDATES)]:
        search = DeviceSearch([vectors], *vectors.shape, "cpu", precision, gather=lambda rows: vectors[rows])
        search.candidates_a_passage = 1  # so that fewer can be tried
        for search.candidates in candidates:
            row = {"vectors": name, "precision": precision, "candidates": search.candidates}
            for n_docs in (5, 50):
                if 0 < search.candidates < n_docs:
                    continue
                _, found = search.search(queries, n_docs)
                row[n_docs] = recall(queries, vectors[found], best[:, :n_docs])
            rows.append(row)
    return rows


def main(args: BenchmarkArguments) -> list[dict]:
    print(
        f"{header('torch')}\n{args.vectors:,} x {args.dimension}, {args.queries} queries\n\n"
        "| vectors | `--index_precision` | candidates | recall@5 | recall@50 |\n|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for name in SORTS:
        for row in measure(name, args):
            at_50 = f"{row[50]:.4f}" if 50 in row else ""
            print(f"| {name} | {row['precision']} | {row['candidates'] or ''} | {row[5]:.4f} | {at_50} |", flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(parse_args, main)
