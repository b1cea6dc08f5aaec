"""Passages, with their embeddings where there are any, written shard by shard: a killed run resumes where it was.

    write_dataset(read_passages(path), embedder, Path("out/my_knowledge_dataset"), digest, ShardPlan(count))

A shard is an Arrow file of the finished dataset (`datasets.load_from_disk`), so nothing is copied at the end: shards
gather in a folder beside, named by the digest of everything that made them, and one rename makes it the dataset. Where
passages are added to a dataset, their shards gather in it, and are part of it once its `state.json` names them.

The checksum of a shard is written down when the shard is: in a hidden journal while shards gather, in `state.json`
then. What is found again later is taken only if it is still what was written.
"""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features, List, Value

from rag.checksums import checksum_size, file_checksum
from rag.errors import UserError
from rag.files import DATA_FILES, atomic_write, not_following, read_state, save_json
from rag.knowledge.arguments import ENCODER_FLAG
from rag.progress import progress

# Passages are sorted by length within a shard: 2,048 of Wikipedia leave 1 to 1.5% of padding at batch 16, in their own
# order a third. A killed run loses at most a shard, or a hundredth of its work. More files would make a large dataset
# slow to open (a millisecond each), fewer would keep more vectors in memory (0.6 GB of 768 dimensions for Wikipedia).
PASSAGES_PER_SHARD = 2048
MOST_SHARDS = 100
JOURNAL = ".checksums.jsonl"
STATE_FILE, INFO_FILE = "state.json", "dataset_info.json"

Passages = list[tuple[str, str]]  # titles and texts


@dataclass(frozen=True)
class ShardPlan:
    """How passages are cut into Arrow files.

    Attributes:
        count: passages in all.
        prefix: of the files' names.
        num_shards: files; None for about one in 2,048 passages.
        dtype: of the embeddings on disk.
    """

    count: int
    prefix: str = "data"
    num_shards: int | None = None
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Passages in every shard but the last."""
        if self.num_shards is not None:
            return -(-self.count // self.num_shards)
        return max(PASSAGES_PER_SHARD, -(-self.count // MOST_SHARDS))

    def names(self) -> list[str]:
        shards = -(-self.count // self.size)
        return [f"{self.prefix}-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]


def write_dataset(passages: Iterator[tuple[str, str]], embedder, folder: Path, digest: str, plan: ShardPlan) -> None:
    """Write the dataset `folder` (title, text, embeddings); shards of an earlier run with the same digest are kept.

    Args:
        passages: `plan.count` pairs of title and text, the same ones in the same order in every run.
        embedder: a `PassageEmbedder`, or what has its `dimension` (0: no embeddings) and `embed_shards`.
        digest: of the passages, the encoder and the settings.
    """
    partial = partial_folder(folder, digest)
    partial.mkdir(parents=True, exist_ok=True)
    _write_missing(passages, embedder, partial, plan)
    write_info(partial, embedder.dimension, plan.dtype)
    checksums = _read_journal(partial)
    publish(partial, {name: checksums[name] for name in plan.names()}, digest)
    partial.rename(folder)


def write_more(passages: Iterator[tuple[str, str]], embedder, folder: Path, plan: ShardPlan) -> dict[str, str]:
    """Write shards of more passages into the dataset `folder`, which does not change before `publish`.

    Returns:
        the checksums of all files of the dataset as it is to be, by name.
    """
    _write_missing(passages, embedder, folder, plan)
    known = {name: sum_ for name, sum_ in shard_checksums(folder).items() if not name.startswith(f"{plan.prefix}-")}
    checksums = _read_journal(folder)
    return known | {name: checksums[name] for name in plan.names()}


def publish(folder: Path, checksums: dict[str, str], digest: str) -> None:
    """Make the files of these names the dataset, in their order, under a digest; any other shard is removed."""
    save_json(_state(checksums, digest), folder / STATE_FILE)
    for path in folder.iterdir():
        ours = path.suffix == ".arrow" or path.name.startswith(".")
        if ours and path.is_file() and path.name not in checksums:
            path.unlink()


def write_info(folder: Path, dimension: int, dtype: str) -> None:
    """The `dataset_info.json` of passages with embeddings of this dimension; 0 for none."""
    DatasetInfo(features=_features(dimension, dtype)).write_to_directory(os.path.abspath(folder))


# --- What there is ----------------------------------------------------------------------------------------------------


def shards_of(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, in the order of their rows."""
    return [folder / name for name in shard_checksums(folder)]


def shard_checksums(folder: Path) -> dict[str, str]:
    """The checksums of these files, by name; "" of one that was written by an earlier version."""
    files = _read_state(folder)[DATA_FILES]
    return {file["filename"]: str(file.get("checksum") or "") for file in files}


def digest_of(folder: Path) -> str | None:
    """What made the dataset `folder`; None where there is none, or no more than a damaged one."""
    try:
        return _read_state(folder)["_fingerprint"]
    except UserError:
        return None


def is_whole(path: Path, checksum: str) -> bool:
    """Whether a file is there and is what was written."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        size = path.stat().st_size
        return size == checksum_size(checksum) and file_checksum(path) == checksum if checksum else size > 0
    except (OSError, ValueError):  # ValueError: no checksum at all
        return False


def partial_folder(folder: Path, digest: str) -> Path:
    """Where the shards of `folder` gather until all are there."""
    return folder.with_name(f".{folder.name}.{digest}")


def reopen(folder: Path, digest: str) -> int:
    """Make a dataset of which shards are damaged unfinished again, without these; how many they were."""
    checksums = shard_checksums(folder)
    damaged = [name for name, checksum in checksums.items() if not is_whole(folder / name, checksum)]
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    with atomic_write(folder / JOURNAL) as file:
        for name, checksum in checksums.items():
            if name not in damaged:
                file.write(_journal_line(name, checksum or file_checksum(folder / name)))
    folder.rename(partial_folder(folder, digest))
    return len(damaged)


def _read_state(folder: Path) -> dict:
    state = read_state(folder / STATE_FILE, f"remove {folder} and build the knowledge again")
    files = state.get(DATA_FILES)
    if not (
        isinstance(files, list)
        and all(isinstance(file, dict) and Path(str(file.get("filename"))).name == file["filename"] for file in files)
        and isinstance(state.get("_fingerprint"), str)
    ):
        raise UserError(f"{folder / STATE_FILE} is damaged; remove {folder} and build the knowledge again")
    return state


def _read_journal(folder: Path) -> dict[str, str]:
    """The checksums of shards by name, of which the last counts; a line that a kill has cut is none."""
    checksums = {}
    if (folder / JOURNAL).is_file():
        for line in (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, checksum = json.loads(line)
                checksums[str(name)] = str(checksum)
            except (ValueError, TypeError, RecursionError):
                continue
    return checksums


def _journal_line(name: str, checksum: str) -> str:
    return f"\n{json.dumps([name, checksum])}\n"  # begins anew where a kill has cut the line before


# --- Writing ----------------------------------------------------------------------------------------------------------


def _write_missing(passages: Iterator[tuple[str, str]], embedder, folder: Path, plan: ShardPlan) -> None:
    """Write the shards that are not there yet, or are not what was written."""
    names = plan.names()
    paths = [folder / name for name in names]
    sizes = [min(plan.size, plan.count - i * plan.size) for i in range(len(paths))]
    checksums = _read_journal(folder)
    damaged = 0
    for path, rows in zip(paths, sizes, strict=True):  # a run with another --num_shards may have used the same names
        if path.exists() and not (is_whole(path, checksums.get(path.name, "-")) and _rows_in(path) == rows):
            damaged += path.name in checksums and not is_whole(path, checksums[path.name])
            path.unlink()
    if damaged:
        print(f"{damaged:,} files of an earlier run are damaged and are made again")
    kept = sum(rows for path, rows in zip(paths, sizes, strict=True) if path.exists())
    doing, done = ("Embedding", "embedded") if embedder.dimension else ("Writing", "written")  # words have no vectors
    if kept:
        print(f"{kept:,} of {plan.count:,} passages were {done} by an earlier run and are kept")
    shards = ((path, list(itertools.islice(passages, rows))) for path, rows in zip(paths, sizes, strict=True))
    missing = ((path, shard) for path, shard in shards if not path.exists())

    def write(path: Path, shard: Passages, vectors: np.ndarray | None) -> None:
        _write_shard(path, shard, vectors, plan.dtype)
        with open(folder / JOURNAL, "a", encoding="utf-8", opener=not_following) as journal:
            journal.write(_journal_line(path.name, file_checksum(path)))
            journal.flush()
            os.fsync(journal.fileno())

    work = embedder.embed_shards(missing, write)
    for _ in progress(work, total=plan.count - kept, desc=doing, unit="passages", size=int):
        pass


def _rows_in(path: Path) -> int:
    with pa.memory_map(str(path)) as file:
        return sum(len(batch) for batch in pa.ipc.open_stream(file))


def _write_shard(path: Path, shard: Passages, vectors: np.ndarray | None, dtype: str) -> None:
    titles, texts = zip(*shard, strict=True)
    columns = [pa.array(titles, pa.string()), pa.array(texts, pa.string())]
    if vectors is not None:
        if not np.isfinite(vectors).all():
            raise UserError(f"{ENCODER_FLAG} gives vectors that are not finite (NaN or inf); give a whole encoder")
        with np.errstate(over="ignore"):
            stored = vectors.astype(dtype, copy=False)
        if not np.isfinite(stored).all():
            raise UserError(
                f"--half_precision: a vector holds {np.abs(vectors).max():g}, too much for it; leave it out"
            )
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), vectors.shape[1]))
    schema = _features(0 if vectors is None else vectors.shape[1], dtype).arrow_schema
    with atomic_write(path, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))


def _features(dimension: int, dtype: str) -> Features:
    text = {"title": Value("string"), "text": Value("string")}
    return Features(text | {"embeddings": List(Value(dtype), length=dimension)} if dimension else text)


def _state(checksums: dict[str, str], digest: str) -> dict:
    """The `state.json` by which `datasets.load_from_disk` knows its files, and we their checksums."""
    return {
        DATA_FILES: [{"filename": name, "checksum": checksum} for name, checksum in checksums.items()],
        "_fingerprint": digest,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
