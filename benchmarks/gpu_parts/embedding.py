"""Passages to vectors at DPR-base size: `PassageEmbedder` beside the public way of `benchmarks/embedding.py`.

The passages are those of a training step (of at most 100 words), again and again; ours in shards, as
use_own_knowledge_dataset.py embeds them, in half precision, the public way in float32.
"""

import os
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from benchmarks import embedding as embedding_benchmark
from benchmarks.gpu_parts.measuring import Measured, Settings, attempt, profiled, timed
from benchmarks.machine import CORES
from benchmarks.training_step import examples

EMBEDDING = "embedding"
PASSAGES, PUBLIC_PASSAGES = 16_384, 1_024


def embedding(settings: Settings) -> Iterator[Measured]:
    import torch

    if settings.device == "cuda":  # as use_own_knowledge_dataset.py has it beside a GPU
        os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(CORES))
    with torch.device(settings.device):
        encoder, tokenizer = embedding_benchmark.make_encoder(**(embedding_benchmark.TINY if settings.short else {}))
    passages = list(islice(cycle(examples()[2]), 96 if settings.short else PASSAGES))
    yield from attempt(EMBEDDING, "public", partial(measure_public, settings, encoder, tokenizer, passages))
    yield from attempt(EMBEDDING, "ours", partial(measure_ours, settings, encoder, tokenizer, passages))


def measure_public(settings: Settings, encoder, tokenizer, passages: list) -> dict[str, float]:
    some = passages[: 32 if settings.short else PUBLIC_PASSAGES]
    embedding_benchmark.public_way(encoder, tokenizer, some[:16])
    seconds = timed(lambda: embedding_benchmark.public_way(encoder, tokenizer, some), settings.device)
    return {"passages_per_second": len(some) / seconds}


def measure_ours(settings: Settings, encoder, tokenizer, passages: list) -> dict[str, float]:
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.shards import PASSAGES_PER_SHARD

    embedder = PassageEmbedder(encoder, tokenizer, device=settings.device)

    def embed(some: list) -> None:
        shards = (
            (Path(str(first)), some[first : first + PASSAGES_PER_SHARD])
            for first in range(0, len(some), PASSAGES_PER_SHARD)
        )
        for _ in embedder.embed_shards(shards, lambda path, shard, vectors: None):
            pass

    embed(passages[:PASSAGES_PER_SHARD])
    seconds = timed(lambda: embed(passages), settings.device)
    counts = profiled(lambda: embed(passages), settings.device)
    titles, texts = zip(*passages, strict=True)
    tokens = sum(map(len, tokenizer(list(titles), list(texts), truncation=True).input_ids))
    config = encoder.config
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return {
        "passages_per_second": len(passages) / seconds, "busy": counts["busy"],
        "flop": 2 * config.num_hidden_layers * layer * tokens / len(passages),
    }  # fmt: skip
