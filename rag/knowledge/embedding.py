"""Passages and their embeddings, written shard by shard, so that a killed run resumes where it was.

    embedder = PassageEmbedder(encoder, tokenizer, batch_size=16)
    embed_passages(read_passages(path), count, embedder, Path("out/my_knowledge_dataset"), digest)

A shard is an Arrow file of the finished dataset (`datasets.load_from_disk`), so nothing is copied at the end: shards
gather in a folder beside, named by the digest of everything that made them, and one rename makes it the dataset. Where
passages are added to a dataset, their shards gather in it, and are part of it once its `state.json` names them.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, Features, List, Value
from transformers import PreTrainedModel

from rag.errors import UserError
from rag.files import atomic_write, load_json, save_json
from rag.models.limits import most_tokens
from rag.progress import progress

# Passages are sorted by length within a shard: 2,048 of Wikipedia leave 1 to 1.5% of padding at batch 16, in their own
# order a third. A killed run loses at most a shard, or a hundredth of its work. More files would make a large dataset
# slow to open (a millisecond each), fewer would keep more vectors in memory (0.6 GB of 768 dimensions for Wikipedia).
PASSAGES_PER_SHARD = 2048
MOST_SHARDS = 100
# What a tokenizer that knows of no limit says, and the tokens that are read where nothing names one: most encoders'.
ANY_LENGTH, TOKENS_OF_NO_LIMIT = int(1e30), 512

Passages = list[tuple[str, str]]  # titles and texts


def precision_on(device: str) -> torch.dtype:
    """Half precision is faster on a GPU, and slower on most CPUs."""
    return torch.float16 if device == "cuda" else torch.float32


class PassageEmbedder:
    """Turns (title, text) into vectors, on the GPU, in half precision, where there is one.

    A DPR encoder reads title and text as a pair, as it was trained to; any other reads "title text": sentence encoders
    were trained on plain text (MiniLM, nq_gold, 500 questions: gold passage first 0.900, as a pair 0.888).

    Attributes:
        dimension: d.
        max_length: tokens an encoder can read; longer passages are cut.
        prompt: text before every passage.
        lower_case: whether passages are lower-cased first.
        cut: passages that were.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer, batch_size: int, device: str | None = None):
        from rag.models.encoders import encoder_dimension

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision_on(self.device)
        self.encoder = encoder.to(self.device, self.precision)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.dimension = encoder_dimension(encoder)
        self.as_pair = encoder.config.model_type == "dpr"
        backbone = encoder.config if self.as_pair else encoder.config.backbone
        own = getattr(encoder.config, "max_length", None) or ANY_LENGTH
        self.max_length = min(tokenizer.model_max_length, most_tokens(backbone) or ANY_LENGTH, own)
        if self.max_length == ANY_LENGTH:  # nothing names a limit
            self.max_length = TOKENS_OF_NO_LIMIT
        self.prompt = getattr(encoder.config, "passage_prompt", "")
        self.lower_case = getattr(encoder.config, "lower_case", False)
        self.cut = 0
        # Each batch is padded on its own, after all were tokenized to be sorted: the slower way, which it warns of.
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def description(self, device: str | None = None) -> dict:
        """Fields of `IndexDescription`: what bears on the vectors beside the encoder's weights, here or on `device`."""
        return {
            "input": "title, text" if self.as_pair else "title text",
            "passage_prompt": self.prompt,
            "max_length": self.max_length,
            "precision": str(precision_on(device or self.device)).removeprefix("torch."),
        }

    def embed_shards(self, shards: Iterator[tuple[Path, Passages]], write: Callable) -> Iterator[int]:
        """Call `write(path, passages, vectors)` for every shard; yields the number of passages behind every batch."""
        for path, shard in shards:
            vectors = np.empty((len(shard), self.dimension), dtype=np.float32)
            for rows, batch in self(shard):
                vectors[rows] = batch
                yield len(rows)
            write(path, shard, vectors)

    def __call__(self, passages: Passages) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and their vectors (b, d) float32, a batch at a time; batches hold texts of like length."""
        texts: list[str] | None
        if self.as_pair:
            titles, texts = map(list, zip(*passages, strict=True))
        else:
            titles, texts = [self.prompt + f"{title} {text}".strip() for title, text in passages], None
            if self.lower_case:
                titles = [title.lower() for title in titles]
        # DPR was trained, and the public suite embeds, without telling title and text apart by token types.
        tokens = self.tokenizer(titles, texts, truncation=True, max_length=self.max_length, return_token_type_ids=False)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        self.cut += int((lengths == self.max_length).sum())
        for rows in np.split(np.argsort(-lengths), range(self.batch_size, len(lengths), self.batch_size)):
            batch = {name: [values[i] for i in rows] for name, values in tokens.items()}
            yield rows, self._encode(self.tokenizer.pad(batch, padding="longest", return_tensors="pt"))

    @torch.inference_mode()
    def _encode(self, batch) -> np.ndarray:
        return self.encoder(**batch.to(self.device))[0].float().cpu().numpy()


def embed(documents: dict[str, list[str]], ctx_encoder: PreTrainedModel, ctx_tokenizer) -> dict[str, np.ndarray]:
    """The vectors of passages, {"title": [...], "text": [...]}, as {"embeddings": (N, d) float32}, in one batch.

    Args:
        ctx_encoder: a DPR context encoder or a `PooledEncoder`; it stays on its device, in float32.
        ctx_tokenizer: its tokenizer.
    """
    passages = list(zip(documents["title"], documents["text"], strict=True))
    embedder = PassageEmbedder(ctx_encoder, ctx_tokenizer, max(len(passages), 1), str(ctx_encoder.device))
    vectors = np.empty((len(passages), embedder.dimension), dtype=np.float32)
    for rows, batch in embedder(passages) if passages else ():
        vectors[rows] = batch
    return {"embeddings": vectors}


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


def embed_passages(passages: Iterator[tuple[str, str]], embedder, folder: Path, digest: str, plan: ShardPlan) -> None:
    """Write the dataset `folder` (title, text, embeddings); shards of an earlier run with the same digest are kept.

    Args:
        passages: `plan.count` pairs of title and text, the same ones in the same order in every run.
        embedder: a `PassageEmbedder`, or what has its `dimension` and `embed_shards`.
        digest: of the passages, the encoder and the settings.
    """
    partial = partial_folder(folder, digest)
    partial.mkdir(parents=True, exist_ok=True)
    _embed_missing(passages, embedder, partial, plan)
    features = _features(embedder.dimension, plan.dtype)
    DatasetInfo(features=features).write_to_directory(partial)
    _publish(partial, plan.names(), digest)
    partial.rename(folder)


def embed_more(passages: Iterator[tuple[str, str]], embedder, folder: Path, plan: ShardPlan) -> list[Path]:
    """Write shards of more passages into the dataset `folder`, which does not change before `add_shards`.

    Returns:
        all files of the dataset as it is to be.
    """
    _embed_missing(passages, embedder, folder, plan)
    known = [path for path in shards_of(folder) if not path.name.startswith(f"{plan.prefix}-")]
    return known + [folder / name for name in plan.names()]


def add_shards(folder: Path, files: list[Path], digest: str) -> None:
    """Make these files of the folder the dataset, under a new digest."""
    _publish(folder, [path.name for path in files], digest)


def shards_of(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, in the order of their rows."""
    return [folder / file["filename"] for file in load_json(folder / "state.json")["_data_files"]]


def partial_folder(folder: Path, digest: str) -> Path:
    """Where the shards of `folder` gather until all are there."""
    return folder.with_name(f".{folder.name}.{digest}")


def is_complete(folder: Path, digest: str) -> bool:
    """Whether `folder` is the dataset that was made with this digest."""
    state = folder / "state.json"
    return state.is_file() and load_json(state)["_fingerprint"] == digest


def _embed_missing(passages: Iterator[tuple[str, str]], embedder, folder: Path, plan: ShardPlan) -> None:
    """Write the shards that are not there yet."""
    paths = [folder / name for name in plan.names()]
    sizes = [min(plan.size, plan.count - i * plan.size) for i in range(len(paths))]
    for path, rows in zip(paths, sizes, strict=True):  # a run with another --num_shards may have used the same names
        if path.exists() and len(Dataset.from_file(str(path))) != rows:
            path.unlink()
    kept = sum(rows for path, rows in zip(paths, sizes, strict=True) if path.exists())
    if kept:
        print(f"{kept:,} of {plan.count:,} passages were embedded by an earlier run and are kept")
    shards = ((path, list(itertools.islice(passages, rows))) for path, rows in zip(paths, sizes, strict=True))
    missing = ((path, shard) for path, shard in shards if not path.exists())

    def write(path: Path, shard: Passages, vectors: np.ndarray) -> None:
        _write_shard(path, shard, vectors, plan.dtype)

    work = embedder.embed_shards(missing, write)
    for _ in progress(work, total=plan.count - kept, desc="Embedding", unit="passages", size=int):
        pass


def _publish(folder: Path, names: list[str], digest: str) -> None:
    """Make these files the dataset; others, of a run that was cut otherwise or half-written, are removed."""
    save_json(_state(names, digest), folder / "state.json")
    for path in folder.iterdir():
        ours = path.suffix == ".arrow" or path.name.startswith(".")
        if ours and path.is_file() and path.name not in names:
            path.unlink()


def _write_shard(path: Path, shard: Passages, vectors: np.ndarray, dtype: str) -> None:
    with np.errstate(over="ignore"):
        stored = vectors.astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        raise UserError(f"--half_precision: a vector holds {np.abs(vectors).max():g}, too much for it; leave it out")
    schema = _features(vectors.shape[1], dtype).arrow_schema
    titles, texts = zip(*shard, strict=True)
    columns = [
        pa.array(titles, pa.string()),
        pa.array(texts, pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), vectors.shape[1]),
    ]
    with atomic_write(path, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))


def _features(dimension: int, dtype: str) -> Features:
    return Features(
        {"title": Value("string"), "text": Value("string"), "embeddings": List(Value(dtype), length=dimension)}
    )


def _state(names: list[str], digest: str) -> dict:
    """The `state.json` by which `datasets.load_from_disk` knows its files."""
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
