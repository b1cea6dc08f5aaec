"""The context encoder that learns: found passages are read anew in each step and scored with gradients from both sides.

    encoder, tokenizer = open_context_encoder(args, retriever)     # --train_context_encoder
    fresh = FreshScores(encoder, tokenizer, over_retrieve=64)
    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, rescore=fresh)
    save_context_encoder(encoder, tokenizer, "output/checkpoint1/context_encoder")

The index stays as it is (REALM, Guu et al. 2020, arXiv 2002.08909; RAG-end2end, Siriwardhana et al. 2022, arXiv
2210.02627): it says which passages are read, the encoder what they score. `refresh` makes it anew.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rag.errors import UserError, raise_problems
from rag.files import atomic_folder, shown
from rag.index.index_files import IndexDescription, pooling_of, read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.models.checkpoints import load_tokenizer, weights_digest
from rag.models.custom_code import save_code
from rag.models.encoders import encoder_dimension, load_encoder
from rag.models.fit import vocabulary_problems
from rag.models.modes import evaluating
from rag.models.packed_encoder import can_pack, encode_packed
from rag.models.passages import PassageReader, Passages
from rag.packing import Packing, to_device
from rag.retrieval.finding import FetchedPassages
from rag.training.arguments import FinetuneArguments

logger = logging.getLogger(__name__)

FLAG = "--context_encoder_name_or_path"
FOLDER = "context_encoder"  # of an exported checkpoint
PASSAGES_AT_A_TIME = 128  # that are read without gradients


class FreshScores:
    """Inner products of questions with found passages, which the context encoder reads as it is now: a `Rescoring`.

    Args:
        encoder: the context encoder; gradients reach its weights.
        tokenizer: its tokenizer.
        over_retrieve: passages a question that are searched for, of which the best are read; None for as many as these.
        packed: whether passages lie in one row, without padding, where the encoder can read that.
    """

    learns = True

    def __init__(self, encoder: PreTrainedModel, tokenizer: Any, over_retrieve: int | None = None, packed: bool = True):
        self.encoder, self.reader = encoder, PassageReader(encoder, tokenizer, FLAG)
        self.depth, self.packed = over_retrieve or 0, packed and can_pack(encoder)

    def __call__(self, found: FetchedPassages) -> torch.Tensor:
        """The scores (B, as many as were found), differentiable in the queries and in the encoder's weights.

        Passages that are equal, title and text, are read once. A slot without a passage counts as one without words,
        so that the encoder has a gradient in every step. Without gradients they are read without dropout.
        """
        if torch.is_grad_enabled():
            return self._scores(found, self.read)
        with evaluating(self.encoder):
            return self._scores(found, self._read_in_parts)

    def _scores(self, found: FetchedPassages, read: Callable[[Passages], torch.Tensor]) -> torch.Tensor:
        rows = [list(zip(doc["title"], doc["text"], strict=True)) for doc in found.docs]
        places: dict[tuple[str, str], int] = {}
        for passage in (passage for row in rows for passage in row):
            places.setdefault(passage, len(places))
        queries = found.queries
        index = to_device(np.array([[places[passage] for passage in row] for row in rows]), queries.device)
        vectors = read(list(places)).to(queries.dtype)  # (distinct, d)
        return (queries.unsqueeze(1) * vectors[index]).sum(-1)

    def read(self, passages: Passages) -> torch.Tensor:
        """The vectors (N, d) of passages, float32 at least."""
        tokens, device = self.reader.tokenize(passages), self.encoder.device
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        if self.packed and lengths.all():  # a text without a token has no place in a row
            row = np.concatenate([np.array(ids, dtype=np.int64) for ids in tokens["input_ids"]])
            vectors = encode_packed(self.encoder, to_device(row, device), Packing(lengths, device))
        else:
            padded = self.reader.tokenizer.pad(tokens, padding="longest", return_tensors="pt")
            vectors = self.encoder(**{name: to_device(tensor, device) for name, tensor in padded.items()})[0]
        return vectors.to(torch.promote_types(vectors.dtype, torch.float32))

    def _read_in_parts(self, passages: Passages) -> torch.Tensor:
        starts = range(0, len(passages), PASSAGES_AT_A_TIME)
        return torch.cat([self.read(passages[start : start + PASSAGES_AT_A_TIME]) for start in starts])


# --- Files ------------------------------------------------------------------------------------------------------------


def open_context_encoder(args: FinetuneArguments, retriever: Any) -> tuple[PreTrainedModel, Any]:
    """The encoder that made the retriever's index, and its tokenizer, as `index.json` says that they read passages.

    Raises:
        UserError: the index has no vectors or none of this encoder's kind, or the encoder cannot be found.
    """
    if retriever is None or getattr(retriever.index, "reads_text", False):
        kind = "model retrieves nothing" if retriever is None else f"scores are those of {retriever.config.index_name}"
        raise UserError(f"--train_context_encoder: the {kind}, where no context encoder can learn; leave it out")
    index = retriever.index
    index_path = getattr(index, "index_path", None)
    description = IndexDescription() if index_path is None else read_description(index_path)
    name = args.model.context_encoder_name_or_path or description.encoder
    if not name:
        raise UserError(f"--train_context_encoder needs {FLAG}: the index does not say which encoder made it")
    source = f"{FLAG} {name}"
    encoder = _load_as_described(name, description, args.model.cache_dir)
    tokenizer = load_tokenizer(name, cache_dir=args.model.cache_dir, flag=FLAG)
    size = index.vector_size if isinstance(index, KnowledgeIndex) else retriever.config.retrieval_vector_size
    problems = vocabulary_problems(encoder, tokenizer, source)
    if (d := encoder_dimension(encoder)) != size:
        problems.append(
            f"{source} gives {d} dimensions, but the index has vectors of {size}; give the encoder that made it"
        )
    raise_problems(problems)
    _compare(encoder, tokenizer, description, source)
    return encoder, tokenizer


def _load_as_described(name: str, description: IndexDescription, cache_dir: str | None) -> PreTrainedModel:
    """The encoder with the pooling and the prompt that index.json tells, where its folder alone says otherwise."""
    encoder = load_encoder(name, "context", cache_dir=cache_dir, flag=FLAG)
    told = {"pooling": description.pooling, "normalize": description.normalize}
    prompt = getattr(encoder.config, "passage_prompt", "")
    if not description.encoder_digest or (pooling_of(encoder.config), prompt) == (told, description.passage_prompt):
        return encoder
    pooling = "auto" if pooling_of(encoder.config) == told else description.pooling
    return load_encoder(name, "context", pooling, cache_dir, FLAG, description.passage_prompt)


def _compare(encoder: PreTrainedModel, tokenizer: Any, description: IndexDescription, source: str) -> None:
    """Refuse an encoder that reads passages otherwise than the one that made the index; warn of other weights."""
    if not description.encoder_digest:
        return
    mine = {**pooling_of(encoder.config), **PassageReader(encoder, tokenizer, FLAG).description()}
    raise_problems(
        [
            f"{source} has {name} {value!r}, but the index was made with {getattr(description, name)!r}; give the "
            "encoder that made it"
            for name, value in mine.items()
            if value != getattr(description, name)
        ]
    )
    if weights_digest(encoder) != description.encoder_digest:
        logger.warning(
            f"{source} has other weights than {shown(description.encoder)}, which made the index; until that is made "
            "anew, passages are found by one and scored by the other"
        )


def save_context_encoder(encoder: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write encoder and tokenizer for `load_encoder`, and so for --dpr_ctx_encoder_model_name; whole or not at all."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_padding()  # how it padded and cut last is no property of the encoder
        backend.no_truncation()
    with atomic_folder(folder) as half_written:
        encoder.save_pretrained(half_written)
        save_code(encoder, Path(half_written))
        tokenizer.save_pretrained(half_written)
