"""FAISS indexes of any kind, built of embeddings that need not fit into memory.

    vectors = EmbeddingFiles(shards_of("my_knowledge_dataset"), dimension=768)
    plan = IndexPlan("OPQ64_256,IVF4096,PQ64", dimension=768, shards=8)
    build_index(vectors, plan, Path("my_knowledge_dataset_index"), digest)

A kind is written as FAISS writes it (its wiki: "The index factory"); scores are inner products. An index that learns
(IVF, PQ, OPQ, SQ) is trained once, on a sample. Vectors are added a file of embeddings at a time, on all cores; an
index in shards needs memory for one of them. What has been added is saved every few minutes. With faiss 1.15.1 a
rebuilt index was the same to the bit in all trials, HNSW too, whatever the number of threads.
"""

import itertools
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from rag.checksums import file_checksum
from rag.errors import UserError
from rag.files import free_bytes, read_lines, remove, write_lines
from rag.index.columns import EmbeddingColumn
from rag.index.faiss_checks import ranking_of
from rag.index.faiss_kinds import core_of, parts_of, transforms_of
from rag.index.faiss_mapping import map_index
from rag.index.index_files import shard_files, shard_path, write_faiss_index
from rag.progress import progress

EXAMPLES = "Flat, HNSW32,Flat, HNSW32,SQ8, IVF1024,Flat, IVF1024,PQ64 or OPQ64_256,IVF1024,PQ64"
FEWEST_TRAINED_ON = 65_536  # 256 vectors for each of a product quantizer's 256 centroids, as many as FAISS ever uses
TRAINED_ON_A_LIST = 50  # FAISS warns below 39 vectors a centroid and uses 256 at most
ROWS_AT_A_TIME = 65_536
LONGEST_FACTORY, MOST_OF_ANYTHING, MOST_LINKS = 200, 2**24, 1024
OPQ_CENTROIDS = 256  # of the product quantizer for which OPQ rotates
# An unfinished index is saved when so many seconds, and so many times what saving took last, have passed since.
SAVE_AFTER, SAVES_COST = 120.0, 10


class EmbeddingFiles:
    """The embeddings of a saved dataset, of whose files one at a time is mapped: reading all of them takes no memory.

    Args:
        paths: its Arrow files, in the order of their rows.
        dimension: length d of every vector.
    """

    def __init__(self, paths: list[Path], dimension: int):
        self.dimension = dimension
        self.paths = paths
        self.starts = np.cumsum([0] + [len(self._open(path)) for path in self.paths])

    def _open(self, path: Path) -> EmbeddingColumn:
        with pa.memory_map(str(path)) as file:
            return EmbeddingColumn(pa.ipc.open_stream(file).read_all().column("embeddings"), self.dimension)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, size: int = ROWS_AT_A_TIME, rows: range | None = None) -> Iterator[np.ndarray]:
        """All vectors in order, or those of consecutive rows, as float32 arrays of at most `size` rows."""
        rows = range(len(self)) if rows is None else rows
        for path, first, last in zip(self.paths, self.starts, self.starts[1:], strict=False):
            if rows.start < last and first < rows.stop:
                yield from self._open(path).blocks(size, range(max(rows.start - first, 0), rows.stop - first))

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of `ids` (n,), in ascending order, as float32 (n, d)."""
        parts = np.split(ids, np.searchsorted(ids, self.starts[1:-1]))
        vectors = [
            self._open(path).gather(part - first)
            for path, first, part in zip(self.paths, self.starts, parts, strict=False)
            if len(part)
        ]
        return np.concatenate(vectors)


# --- Kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexPlan:
    """What index is to be built.

    Attributes:
        factory: FAISS's factory string.
        dimension: d of the vectors.
        shards: FAISS files that hold equally many rows; 1 for a single file.
        train_sample: vectors to train on; None for what the kind needs.
    """

    factory: str
    dimension: int
    shards: int = 1
    train_sample: int | None = None

    def empty(self):
        """The index, untrained and without vectors."""
        return faiss.index_factory(self.dimension, self.factory, faiss.METRIC_INNER_PRODUCT)

    def problems(self, count: int) -> list[str]:
        """Why the index cannot be built over `count` vectors."""
        flag = f"--index_factory {self.factory[:80]}"
        if reason := _factory_problem(self.factory):
            return [f"{flag}: {reason}; try {EXAMPLES}"]
        learned = max(map(int, re.findall(r"IVF(\d+)", self.factory)), default=0)
        if learned <= count:  # else there may be no memory to try it
            try:
                index = self.empty()
                if index.is_trained:
                    index.add(np.zeros((1, self.dimension), dtype=np.float32))
            except (RuntimeError, MemoryError) as error:
                what = f"FAISS adds no vectors of dimension {self.dimension} to it"
                return [f"{flag}: {what} ({_reason(error)}); try {EXAMPLES}"]
            if (ranking := ranking_of(index)) != "inner product":
                return [f"{flag}: FAISS ranks it by {ranking}, RAG by inner product; try {EXAMPLES}"]
            if any(isinstance(part, faiss.IndexIDMap) for part in _with_parts(index)):
                return [f"{flag}: it has ids of its own, RAG numbers passages by their rows; try {EXAMPLES}"]
            for transform in transforms_of(index):
                if isinstance(transform, faiss.PCAMatrix) and transform.d_out > transform.d_in:
                    return [
                        f"{flag}: PCA makes fewer dimensions of {transform.d_in}, not {transform.d_out}; give fewer"
                    ]
            learned = _centroids(index)
        problems = []
        if learned > min(count, self.train_sample or count):
            problems.append(
                f"{flag} learns {learned} centroids, for which there must be as many passages (there are "
                f"{count}) and no smaller --train_sample; give fewer lists, or Flat"
            )
        if self.shards > count:
            problems.append(f"--num_index_shards {self.shards}, but there are only {count} passages; give fewer shards")
        return problems

    def learns(self) -> bool:
        """Whether the kind learns anything of the vectors."""
        return not self.empty().is_trained

    def sample_size(self, count: int) -> int:
        """How many of `count` vectors the index is trained on."""
        wanted = self.train_sample or max(FEWEST_TRAINED_ON, TRAINED_ON_A_LIST * _centroids(self.empty()))
        return min(wanted, count)

    def bytes_a_vector(self) -> int:
        """What the index keeps of a vector: its code, and its links or its id; roughly."""
        return _bytes_a_vector(self.empty())

    def spans(self, count: int) -> list[tuple[int, int]]:
        """First row and the one behind the last of each shard."""
        ends = [count * number // self.shards for number in range(self.shards + 1)]
        return list(itertools.pairwise(ends))


def _bytes_a_vector(index) -> int:
    core = core_of(index)
    if hasattr(core, "hnsw"):
        return core.storage.sa_code_size() + 4 * core.hnsw.nb_neighbors(0)
    return core.sa_code_size() + (8 if isinstance(core, faiss.IndexIVF) else 0)


def _centroids(index) -> int:
    """The most that any part of the index learns by k-means, or of directions by PCA; 0 where none does."""
    learned = [0]
    for part in _with_parts(index):
        for transform in transforms_of(part):
            if isinstance(transform, faiss.OPQMatrix):
                learned.append(OPQ_CENTROIDS)
            elif isinstance(transform, faiss.PCAMatrix):
                learned.append(transform.d_out)
        storage = faiss.downcast_index(part.storage) if hasattr(part, "hnsw") else part
        learned.append(part.nlist if isinstance(part, faiss.IndexIVF) else 0)
        learned.append(storage.pq.ksub if hasattr(storage, "pq") else 0)
        for name in ("rq", "lsq", "prq", "plsq"):
            if hasattr(storage, name):
                learned.append(2 ** int(faiss.vector_to_array(getattr(storage, name).nbits).max(initial=0)))
    return int(max(learned))


def _with_parts(index) -> Iterator:
    """The index by its own class, and all that it consists of."""
    yield faiss.downcast_index(index)
    for part in parts_of(index):
        yield from _with_parts(part)


def _factory_problem(factory: str) -> str | None:
    """What FAISS would make of a factory string that ends the process, or takes all memory, before it says a word."""
    if not factory.isascii() or not factory.isprintable() or " " in factory:
        return "a kind is written without blanks, in letters, digits, commas and _"
    if len(factory) > LONGEST_FACTORY:
        return f"it is {len(factory)} characters long"
    if any(not 1 <= int(number) <= MOST_OF_ANYTHING for number in re.findall(r"\d+", re.sub("fp16|bf16", "", factory))):
        return f"its numbers must be from 1 to {MOST_OF_ANYTHING:,}"
    links = [int(number) for number in re.findall(r"(?:HNSW|NSG)(\d+)", factory)]
    if any(not 2 <= number <= MOST_LINKS for number in links):
        return f"a vector has from 2 to {MOST_LINKS:,} links (--m, or the number behind HNSW or NSG)"
    if "Dedup" in factory:
        return "equal passages would share one number"
    return None


def _reason(error: Exception) -> str:
    reason = str(error).partition("Error: ")[2] or str(error).rpartition(": ")[2] or "out of memory"
    return " ".join(reason.split())[:200]


# --- Building ---------------------------------------------------------------------------------------------------------


def build_index(vectors: EmbeddingFiles, plan: IndexPlan, path: Path, digest: str) -> None:
    """Write the index at `path`: a FAISS file, or a folder of shards; whole or not at all.

    What a killed run has trained, finished and saved is taken over by the next one of the same `digest`, which stands
    for the vectors and the plan.
    """
    partial = path.with_name(f".{path.name}.{digest}")
    partial.mkdir(parents=True, exist_ok=True)
    trained = partial / "trained.faiss"
    if not _is_whole(trained):
        _write_noted(_train(plan, vectors), trained)
    work = _add_to(trained, vectors, plan.spans(len(vectors)), lambda span: shard_path(partial, *span))
    for _ in progress(work, total=len(vectors), desc="Indexing", unit="passages", size=int):
        pass
    remove(path)
    if plan.shards == 1:
        os.replace(shard_path(partial, 0, len(vectors)), path)
        shutil.rmtree(partial)
    else:
        for other in set(partial.iterdir()) - {file for file, _, _ in shard_files(partial)}:
            other.unlink()  # what it was trained to be, and what a kill has left of a file
        partial.rename(path)


def extend_index(path: Path, vectors: EmbeddingFiles, known: int, digest: str) -> Path:
    """The FAISS file that holds the vectors from row `known` on, beside the index at `path`, which stays as it is.

    It is to take the place of `path` where that is a file, and to join its shards where that is a folder. What an
    earlier run of the same `digest` has finished or saved is taken over.
    """
    staged = path.with_name(f".{path.name}.{digest}.faiss")
    base = shard_files(path)[0][0] if path.is_dir() else path
    work = _add_to(base, vectors, [(known, len(vectors))], lambda _: staged, from_nothing=path.is_dir())
    for _ in progress(work, total=len(vectors) - known, desc="Indexing", unit="passages", size=int):
        pass
    return staged


def _add_to(base: Path, vectors, spans, path_of, from_nothing: bool = False) -> Iterator[int]:
    """Write an index for each span that has none yet: `base` and the span's rows. Yields the rows of every block."""
    for start, end in spans:
        path = path_of((start, end))
        saved = path.with_name(f"{path.name}.saved")
        if _is_whole(path):
            yield end - start
        else:
            yield from _write_one(base, vectors, range(start, end), path, saved, from_nothing)
        for left in (saved, _note_of(saved)):
            left.unlink(missing_ok=True)


def _write_one(base: Path, vectors, rows: range, path: Path, saved: Path, from_nothing: bool) -> Iterator[int]:
    """Write `base`, or what it has learned, and these rows at `path`; begin with what is saved, and save in between."""
    for left in path.parent.glob(f"{path.name}*.part"):  # half-written when a run was killed
        left.unlink()
    first = 0 if from_nothing else map_index(base).ntotal
    whole = first + len(rows)
    if _is_whole(saved):
        index = _read_unfinished(saved, first)
        yield index.ntotal - first
    else:
        index = faiss.read_index(str(base))
        if from_nothing:
            index.reset()
    last_saved, pause = time.monotonic(), SAVE_AFTER
    for block in vectors.blocks(rows=rows[index.ntotal - first :]):
        index.add(block)
        yield len(block)
        now = time.monotonic()
        if now - last_saved >= pause and index.ntotal < whole and _has_room(path.parent, index, whole):
            _write_noted(index, saved)
            last_saved = time.monotonic()
            pause = max(SAVE_AFTER, SAVES_COST * (last_saved - now))
    _write_noted(index, path)


def _write_noted(index, path: Path) -> None:
    """Write the index, and its checksum beside it: a run that goes on is to take over nothing that was damaged.

    The checksum is there before the file, beside that of the one it replaces: a kill between the two costs neither.
    """
    fresh, note = path.with_name(f"{path.name}.fresh.part"), _note_of(path)
    write_faiss_index(index, fresh)
    earlier = read_lines(note)[-1:] if note.exists() else []
    write_lines([*earlier, file_checksum(fresh)], note)
    os.replace(fresh, path)


def _is_whole(path: Path) -> bool:
    """Whether the file is there, as it was written."""
    return path.exists() and _note_of(path).exists() and file_checksum(path) in read_lines(_note_of(path))


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def _read_unfinished(saved: Path, first: int):
    """An unfinished index, to which all but its `first` vectors were added, as if it had never been written."""
    index = faiss.read_index(str(saved))
    core = core_of(index)
    if hasattr(core, "hnsw"):
        for _ in range(index.ntotal - first):  # a file holds no state of the random numbers, of which each took one
            core.hnsw.random_level()
    return index


def _has_room(folder: Path, index, whole: int) -> bool:
    """Whether the disk can take what there is of an index beside all `whole` vectors of it, which come after."""
    return free_bytes(folder) > _bytes_a_vector(index) * (index.ntotal + whole)


def _train(plan: IndexPlan, vectors: EmbeddingFiles):
    """The index without vectors, trained where its kind learns."""
    index = plan.empty()
    if not index.is_trained:
        size = plan.sample_size(len(vectors))
        start = time.monotonic()
        rows = np.random.default_rng(0).choice(len(vectors), size, replace=False, shuffle=False)
        try:
            index.train(vectors.gather(np.sort(rows)))
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"--index_factory {plan.factory}: FAISS cannot train it on {size:,} passages ({_reason(error)}); try "
                f"{EXAMPLES}"
            ) from error
        print(f"Trained on {size:,} passages in {time.monotonic() - start:.1f} s")
    return index
