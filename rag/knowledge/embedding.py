"""Passages to embeddings.

embedder = PassageEmbedder(encoder, tokenizer, batch_size=16)
for rows, vectors in embedder([("Oslo", "Oslo is in Norway."), ...]): ...
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from rag.errors import UserError, is_failure, one_line
from rag.knowledge.arguments import ENCODER_FLAG
from rag.knowledge.shards import Passages
from rag.models.limits import most_tokens

# What a tokenizer that knows of no limit says, and the tokens that are read where nothing names one: most encoders'.
ANY_LENGTH, TOKENS_OF_NO_LIMIT = int(1e30), 512

FITTING = "put the tokenizer beside the encoder that belongs to it"


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
        own = getattr(encoder.config, "max_seq_length", None) or ANY_LENGTH
        self.max_length = min(tokenizer.model_max_length, most_tokens(backbone) or ANY_LENGTH, own)
        if self.max_length == ANY_LENGTH:  # nothing names a limit
            self.max_length = TOKENS_OF_NO_LIMIT
        if self.max_length < 1:
            raise UserError(f"{ENCODER_FLAG}: its tokenizer says model_max_length {self.max_length}; mend it there")
        self.prompt = getattr(encoder.config, "passage_prompt", "")
        if self.prompt and len(tokenizer(self.prompt)["input_ids"]) >= self.max_length:
            raise UserError(
                f"{ENCODER_FLAG}: the passage prompt {self.prompt[:80]!r} leaves no room for a passage in the "
                f"encoder's {self.max_length} tokens; give another encoder"
            )
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
        tokens = self._tokenized(titles, texts)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        self.cut += int((lengths == self.max_length).sum())
        for rows in np.split(np.argsort(-lengths), range(self.batch_size, len(lengths), self.batch_size)):
            batch = {name: [values[i] for i in rows] for name, values in tokens.items()}
            yield rows, self._encode(self.tokenizer.pad(batch, padding="longest", return_tensors="pt"))

    @torch.inference_mode()
    def read(self, texts: list[str]) -> np.ndarray:
        """The vectors of a few texts, (N, d) float32: a trial."""
        first = [(self.prompt + text).lower() if self.lower_case else self.prompt + text for text in texts]
        tokens = self._tokenized(first, texts if self.as_pair else None)
        batch = self.tokenizer.pad(dict(tokens), padding="longest", return_tensors="pt")
        return self.encoder(**batch.to(self.device))[0].float().cpu().numpy()

    def _tokenized(self, titles: list[str], texts: list[str] | None):
        try:
            return self.tokenizer(
                titles, texts, truncation=True, max_length=self.max_length, return_token_type_ids=False
            )
        except BaseException as error:  # the tokenizers package has no class of its own for it
            if not is_failure(error):
                raise
            reason = one_line(error, 120)
            raise UserError(f"{ENCODER_FLAG}: its tokenizer cannot read the passages ({reason}); {FITTING}") from error

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
