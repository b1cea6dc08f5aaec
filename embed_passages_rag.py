"""Passages and their embeddings, written shard by shard, so that a killed run goes on where it was.

    embedder = PassageEmbedder(encoder, tokenizer, batch_size=16)
    embed_passages(read_passages(path), count, embedder, Path("out/my_knowledge_dataset"), digest)

A shard is an Arrow file of the finished dataset (`datasets.load_from_disk`), so nothing is copied at the end: shards
gather in a folder beside, named by the digest of everything that made them, and one rename makes it the dataset.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo, Features, List, Value
from transformers import PreTrainedModel

from utils_rag import atomic_write, load_json, progress, save_json

# Passages are sorted by length within a shard: 2,048 of Wikipedia leave 1 to 1.5% of padding at batch 16, in their own
# order a third. A killed run loses at most a shard; thousands of files would make a large dataset slow to open.
PASSAGES_PER_SHARD = 2048
MOST_SHARDS = 1000


class PassageEmbedder:
    """Turns (title, text) into vectors, on the GPU, in half precision, where there is one.

    A DPR encoder reads title and text as a pair, as it was trained to; any other reads "title text": sentence encoders
    were trained on plain text (MiniLM, nq_gold, 500 questions: gold passage first 0.900, as a pair 0.888).

    Attributes:
        dimension: d.
        max_length: tokens an encoder can read; longer passages are cut.
        cut: passages that were.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer, batch_size: int):
        from models_rag import encoder_dimension

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = torch.float16 if self.device == "cuda" else torch.float32
        self.encoder = encoder.to(self.device, self.precision)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.dimension = encoder_dimension(encoder)
        self.as_pair = encoder.config.model_type == "dpr"
        backbone = encoder.config if self.as_pair else encoder.config.backbone
        self.max_length = min(tokenizer.model_max_length, backbone.max_position_embeddings)
        self.cut = 0
        # Each batch is padded on its own, after all were tokenised to be sorted: the slower way, which it warns of.
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def settings(self) -> dict:
        """What bears on the vectors, beside the encoder's weights."""
        return {
            "input": "title, text" if self.as_pair else "title text",
            "max_length": self.max_length,
            "precision": str(self.precision).removeprefix("torch."),
        }

    def __call__(self, passages: list[tuple[str, str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and their vectors (b, d) float32, a batch at a time; batches hold texts of like length."""
        titles, texts = map(list, zip(*passages, strict=True))
        if not self.as_pair:
            titles, texts = [f"{title} {text}".strip() for title, text in passages], None
        tokens = self.tokenizer(titles, texts, truncation=True, max_length=self.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        self.cut += int((lengths == self.max_length).sum())
        for rows in np.split(np.argsort(-lengths), range(self.batch_size, len(lengths), self.batch_size)):
            batch = {name: [values[i] for i in rows] for name, values in tokens.items()}
            yield rows, self._encode(self.tokenizer.pad(batch, padding="longest", return_tensors="pt"))

    @torch.inference_mode()
    def _encode(self, batch) -> np.ndarray:
        return self.encoder(**batch.to(self.device))[0].float().cpu().numpy()


def embed_passages(
    passages: Iterator[tuple[str, str]], count: int, embedder: PassageEmbedder, folder: Path, digest: str
) -> None:
    """Write the dataset `folder` (title, text, embeddings); shards of an earlier run with the same digest are kept.

    Args:
        passages: `count` pairs of title and text, the same ones in the same order in every run.
        digest: of the passages, the encoder and the settings.
    """
    partial = partial_folder(folder, digest)
    partial.mkdir(parents=True, exist_ok=True)
    size = max(PASSAGES_PER_SHARD, -(-count // MOST_SHARDS))
    shards = -(-count // size)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    sizes = [min(size, count - i * size) for i in range(shards)]
    kept = sum(rows for name, rows in zip(names, sizes, strict=True) if (partial / name).exists())
    if kept:
        print(f"{kept:,} of {count:,} passages were embedded by an earlier run and are kept")
    work = _embed_missing(passages, [partial / name for name in names], size, embedder)
    for _ in progress(work, total=count - kept, desc="Embedding", unit="passages", size=int):
        pass
    DatasetInfo(features=_features(embedder.dimension)).write_to_directory(partial)
    save_json(_state(names, digest), partial / "state.json")
    partial.rename(folder)


def partial_folder(folder: Path, digest: str) -> Path:
    """Where the shards of `folder` gather until all are there."""
    return folder.with_name(f".{folder.name}.{digest}")


def is_complete(folder: Path, digest: str) -> bool:
    """Whether `folder` is the dataset that `embed_passages` made with this digest."""
    state = folder / "state.json"
    return state.is_file() and load_json(state)["_fingerprint"] == digest


def _embed_missing(passages, paths: list[Path], size: int, embedder: PassageEmbedder) -> Iterator[int]:
    """Write the shards that are not there yet; yield the number of passages behind every batch."""
    for path in paths:
        shard = list(itertools.islice(passages, size))
        if path.exists():
            continue
        vectors = np.empty((len(shard), embedder.dimension), dtype=np.float32)
        for rows, batch in embedder(shard):
            vectors[rows] = batch
            yield len(rows)
        _write_shard(path, shard, vectors)


def _write_shard(path: Path, shard: list[tuple[str, str]], vectors: np.ndarray) -> None:
    schema = _features(vectors.shape[1]).arrow_schema
    titles, texts = zip(*shard, strict=True)
    columns = [
        pa.array(titles, pa.string()),
        pa.array(texts, pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
    ]
    with atomic_write(path, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))


def _features(dimension: int) -> Features:
    return Features(
        {"title": Value("string"), "text": Value("string"), "embeddings": List(Value("float32"), length=dimension)}
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
