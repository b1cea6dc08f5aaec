"""The index that a `RagConfig` describes, whatever its source: your own, Wikipedia's, DPR's legacy files, BM25.

    index = open_index(config)   # config.index_name: custom, exact, compressed, legacy or bm25
    index.init_index()

Neither torch nor transformers is imported: an actor that only searches is back in a moment.
"""

import logging
import re

from bm25_index_rag import open_bm25
from cli_rag import UserError
from index_rag import KnowledgeIndex, read_description, search_settings
from legacy_index_rag import open_legacy
from wiki_dpr_rag import open_wiki_dpr

logger = logging.getLogger(__name__)


def open_custom(config) -> KnowledgeIndex:
    """The two parts that `use_own_knowledge_dataset.py` leaves, at passages_path and index_path."""
    index = KnowledgeIndex.load_from_disk(
        config.retrieval_vector_size, config.passages_path, config.index_path, **search_settings(config)
    )
    for warning in encoder_mismatches(read_description(config.index_path), config.question_encoder):
        logger.warning(f"--index_path {config.index_path}: {warning}")
    return index


INDEX_SOURCES = {
    "custom": open_custom,
    "exact": open_wiki_dpr,
    "compressed": open_wiki_dpr,
    "legacy": open_legacy,
    "bm25": open_bm25,
}


def open_index(config) -> KnowledgeIndex:
    """The passages that `config` describes, mapped, and their FAISS index, not yet opened.

    Raises:
        UserError: a part is missing or does not fit, or there is no such source.
    """
    if config.index_name not in INDEX_SOURCES:
        raise UserError(f"--index_name {config.index_name} is none of {', '.join(INDEX_SOURCES)}")
    return INDEX_SOURCES[config.index_name](config)


def encoder_mismatches(made_by: dict, question_encoder, name: str | None = None) -> list[str]:
    """Signs that questions and passages are embedded by encoders that were not trained together.

    DPR's published pairs are "single-nq" and "multiset"; across them up to 11 points of top-20 recall are lost.

    Args:
        made_by: the index's `index.json`; of another origin, {}.
        question_encoder: its config.
        name: where it is from; None for what the config says.
    """
    found = []
    theirs = name or getattr(question_encoder, "name_or_path", None) or ""
    passages_pair, questions_pair = (
        re.findall("single-nq|multiset", source) for source in (made_by.get("encoder", ""), theirs)
    )
    if passages_pair and questions_pair and passages_pair != questions_pair:
        found.append(
            f"the passages' encoder {made_by['encoder']} is of the {passages_pair[0]} pair, the question encoder "
            f"{theirs} of {questions_pair[0]}: retrieval will suffer; embed them with "
            f"facebook/dpr-ctx_encoder-{questions_pair[0]}-base"
        )
    ours = {key: made_by[key] for key in ("pooling", "normalize") if key in made_by}
    if ours and ours != (asked := pooling_of(question_encoder)):
        found.append(f"passages are pooled by {ours}, questions by {asked}: retrieval will suffer")
    return found


def pooling_of(encoder) -> dict:
    """How an encoder with this config makes one vector; DPR's is the first token's."""
    if encoder.model_type == "pooled_encoder":
        return {"pooling": encoder.pooling, "normalize": encoder.normalize}
    return {"pooling": "cls", "normalize": False}
