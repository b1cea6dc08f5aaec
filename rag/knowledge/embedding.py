"""Passages to embeddings.

embedder = PassageEmbedder(encoder, tokenizer)
for rows, vectors in embedder([("Oslo", "Oslo is in Norway."), ...]): ...

On a GPU passages are read and tokenized, and batches copied, while the device encodes others: it waits for nothing but
the first piece. A CPU does the same one after the other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rag.errors import UserError
from rag.knowledge.precision import machine_precision
from rag.knowledge.shards import PASSAGES_PER_SHARD, Passages
from rag.knowledge.token_batches import ahead, cut_batches, tokens_that_fit
from rag.models.packed_encoder import can_pack, encode_packed
from rag.models.passages import PassageReader
from rag.packing import Packing, has_ragged_kernel

# Pieces that are read and tokenized, and batches whose vectors are on their way back, while a GPU encodes another one.
# So many pieces are some seconds of work: a whole shard is read before the first piece of it.
PIECES_AHEAD, BATCHES_BEHIND = 16, 1
# Passages that are tokenized, and sorted by length, together; a shard's first ones, which a GPU may have to wait for.
PIECE, FIRST_PIECE = PASSAGES_PER_SHARD, 512


@dataclass
class Batch:
    """Passages that are encoded together.

    Attributes:
        rows: (b) their numbers.
        lengths: (b) the tokens of each.
        inputs: the encoder's, by name: (b, longest) each; of packed passages input_ids (T) alone.
    """

    rows: np.ndarray
    lengths: np.ndarray
    inputs: dict[str, torch.Tensor]


@dataclass
class Coming:
    """Vectors that are being copied from the device."""

    host: torch.Tensor  # (b, d) float32
    copied: torch.cuda.Event | None  # None of those that are here

    def arrived(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.numpy()


@dataclass
class _Shard:
    """A shard whose vectors are not all there."""

    path: Path
    passages: Passages
    vectors: np.ndarray
    left: int  # passages without one


class PassageEmbedder:
    """Turns (title, text) into vectors, on the GPU where there is one.

    Args:
        batch_size: passages encoded at a time, at most; None for no limit.
        device: None for the GPU, where there is one.
        precision: of the encoder's weights; None for the one that is fast on the device.
        tokens_per_batch: at most; None for no limit where there is one of passages, else what the device has room for.
        packed: whether passages lie in one row, without padding, if the encoder can read that; None for where it is
            faster (on two cores by an eighth: nq_gold, float32).

    Attributes:
        dimension: d.
        cut: passages that were longer than the encoder can read.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer,
        batch_size: int | None = None,
        device: str | None = None,
        precision: torch.dtype | None = None,
        tokens_per_batch: int | None = None,
        packed: bool | None = None,
    ):
        from rag.models.encoders import encoder_dimension

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = precision or machine_precision("auto", self.device.type)
        self.reader = PassageReader(encoder, tokenizer)
        self.encoder = encoder.to(self.device, self.precision)
        self.dimension = encoder_dimension(encoder)
        self.on_gpu = self.device.type == "cuda"
        if packed is None:
            packed = not self.on_gpu or has_ragged_kernel(self.device)
        self.packed = packed and can_pack(encoder)
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        if batch_size is None and tokens_per_batch is None:
            self.tokens_per_batch = tokens_that_fit(encoder, self.device, self.packed)
        self.pieces_ahead, self.batches_behind = (PIECES_AHEAD, BATCHES_BEHIND) if self.on_gpu else (0, 0)
        self.cut = 0

    @property
    def max_length(self) -> int:
        """Tokens the encoder can read."""
        return self.reader.max_length

    def embed_shards(self, shards: Iterable[tuple[Path, Passages]], write: Callable) -> Iterator[int]:
        """Call `write(path, passages, vectors)` for every shard; yields the number of passages behind every batch."""

        def pieces() -> Iterator[tuple[_Shard, int, Passages]]:
            for path, passages in shards:
                vectors = np.empty((len(passages), self.dimension), dtype=np.float32)
                shard = _Shard(path, passages, vectors, len(passages))
                for start, piece in self._pieces(passages):
                    yield shard, start, piece

        for shard, rows, found in self._encoded(pieces()):
            shard.vectors[rows] = found
            shard.left -= len(rows)
            yield len(rows)
            if not shard.left:
                write(shard.path, shard.passages, shard.vectors)

    def __call__(self, passages: Passages) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and their vectors (b, d) float32, a batch at a time; batches hold texts of like length."""
        pieces = ((None, start, piece) for start, piece in self._pieces(passages))
        return ((rows, found) for _, rows, found in self._encoded(pieces))

    def batches(self, passages: Passages) -> Iterator[Batch]:
        """What the encoder is given of passages."""
        for start, piece in self._pieces(passages):
            yield from self._prepared((None, start, piece))[1]

    def read(self, texts: list[str]) -> np.ndarray:
        """The vectors of a few texts, (N, d) float32: a trial."""
        tokens = self.reader.tokenize([("", text) for text in texts])
        return self._vectors(self._batch(0, tokens, np.arange(len(texts)))).cpu().numpy()

    # --- The way of a piece ---

    def _pieces(self, passages: Passages) -> Iterator[tuple[int, Passages]]:
        """The pieces of a shard, each with the number of its first passage."""
        start, size = 0, FIRST_PIECE if self.packed and self.pieces_ahead else PIECE
        while start < len(passages):
            yield start, passages[start : start + size]
            start, size = start + size, PIECE

    def _encoded(self, pieces: Iterable[tuple[Any, int, Passages]]) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """For each batch whose piece it is, its rows, and their vectors (b, d) float32, in order."""
        under_way: deque[tuple[Any, np.ndarray, Coming]] = deque()
        for shard, batches, cut in ahead(self._prepared, pieces, self.pieces_ahead):
            self.cut += cut
            for batch in batches:
                under_way.append((shard, batch.rows, self._encode(batch)))
                if len(under_way) > self.batches_behind:
                    shard_of, rows, vectors = under_way.popleft()
                    yield shard_of, rows, vectors.arrived()
        for shard_of, rows, vectors in under_way:
            yield shard_of, rows, vectors.arrived()

    def _prepared(self, piece: tuple[Any, int, Passages]) -> tuple[Any, list[Batch], int]:
        """The batches of some passages, with whose piece it is before them and behind them how many had to be cut."""
        shard, start, passages = piece
        tokens = self.reader.tokenize(passages)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        cuts = cut_batches(lengths, self.batch_size, self.tokens_per_batch, self.packed)
        return shard, [self._batch(start, tokens, rows) for rows in cuts], int((lengths == self.max_length).sum())

    def _batch(self, start: int, tokens: dict[str, list[list[int]]], rows: np.ndarray) -> Batch:
        """Some rows of a piece that begins at row `start` of its shard."""
        chosen = {name: [values[i] for i in rows] for name, values in tokens.items()}
        lengths = np.array([len(ids) for ids in chosen["input_ids"]])
        if self.packed and lengths.all():  # a text without a token has no place in a row
            inputs = {"input_ids": torch.tensor([token for ids in chosen["input_ids"] for token in ids])}
        else:
            inputs = dict(self.reader.tokenizer.pad(chosen, padding="longest", return_tensors="pt"))
        if self.on_gpu:
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        return Batch(start + rows, lengths, inputs)

    @torch.inference_mode()
    def _vectors(self, batch: Batch) -> torch.Tensor:
        """(b, d) float32 on the device."""
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        if inputs["input_ids"].dim() == 1:
            return encode_packed(self.encoder, inputs["input_ids"], Packing(batch.lengths, self.device)).float()
        return self.encoder(**inputs)[0].float()

    def _encode(self, batch: Batch) -> Coming:
        """Begin with a batch: a GPU is given its work, which nothing here waits for."""
        try:
            vectors = self._vectors(batch)
        except torch.OutOfMemoryError as error:
            name = "batch_size" if self.tokens_per_batch is None else "tokens_per_batch"
            size = f"--{name} {getattr(self, name)}"
            raise UserError(f"{size}: the GPU has no room for such a batch; give less") from error
        if not self.on_gpu:
            return Coming(vectors, None)
        host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return Coming(host, copied)


def embed(documents: dict[str, list[str]], ctx_encoder: PreTrainedModel, ctx_tokenizer) -> dict[str, np.ndarray]:
    """The vectors of passages, {"title": [...], "text": [...]}, as {"embeddings": (N, d) float32}.

    Args:
        ctx_encoder: a DPR context encoder or a `PooledEncoder`; it stays on its device, in float32.
        ctx_tokenizer: its tokenizer.
    """
    passages = list(zip(documents["title"], documents["text"], strict=True))
    embedder = PassageEmbedder(
        ctx_encoder, ctx_tokenizer, max(len(passages), 1), str(ctx_encoder.device), torch.float32, packed=False
    )
    vectors = np.empty((len(passages), embedder.dimension), dtype=np.float32)
    for rows, batch in embedder(passages) if passages else ():
        vectors[rows] = batch
    return {"embeddings": vectors}
