"""The index that a `RagConfig` describes, whatever its source: your own, Wikipedia's, DPR's legacy files, BM25, a file.

    index = open_index(config)   # config.index_name: custom, exact, compressed, legacy, bm25 or given
    index.init_index()

Neither torch nor transformers is imported: an actor that only searches is back in a moment.
"""

import logging

from rag.errors import UserError
from rag.index.arguments import index_effort
from rag.index.bm25 import open_bm25
from rag.index.given_passages import open_given
from rag.index.index_files import read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.legacy_dpr import open_legacy
from rag.index.wiki_dpr import open_wiki_dpr

logger = logging.getLogger(__name__)


def open_custom(config) -> KnowledgeIndex:
    """The two parts that `use_own_knowledge_dataset.py` leaves, at passages_path and index_path."""
    index = KnowledgeIndex.load_from_disk(
        config.retrieval_vector_size, config.passages_path, config.index_path, **index_effort(config)
    )
    for warning in read_description(config.index_path).encoder_mismatches(config.question_encoder):
        logger.warning(f"--index_path {config.index_path}: {warning}")
    return index


INDEX_SOURCES = {
    "custom": open_custom,
    "exact": open_wiki_dpr,
    "compressed": open_wiki_dpr,
    "legacy": open_legacy,
    "bm25": open_bm25,
    "given": open_given,
}


def open_index(config) -> KnowledgeIndex:
    """The passages that `config` describes, mapped, and their FAISS index, not yet opened.

    Raises:
        UserError: a part is missing or does not fit, or there is no such source.
    """
    if config.index_name not in INDEX_SOURCES:
        raise UserError(f"--index_name {config.index_name} is none of {', '.join(INDEX_SOURCES)}")
    return INDEX_SOURCES[config.index_name](config)
