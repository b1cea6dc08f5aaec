"""The index that a `RagConfig` describes, whatever its source: your own, Wikipedia's, or DPR's legacy files.

    index = open_index(config)   # config.index_name: custom, exact, compressed or legacy
    index.init_index()

Neither torch nor transformers is imported: an actor that only searches is back in a moment.
"""

from cli_rag import UserError
from index_rag import KnowledgeIndex, search_settings
from legacy_index_rag import open_legacy
from wiki_dpr_rag import open_wiki_dpr


def open_custom(config) -> KnowledgeIndex:
    """The two parts that `use_own_knowledge_dataset.py` leaves, at passages_path and index_path."""
    return KnowledgeIndex.load_from_disk(
        config.retrieval_vector_size, config.passages_path, config.index_path, **search_settings(config)
    )


INDEX_SOURCES = {
    "custom": open_custom,
    "exact": open_wiki_dpr,
    "compressed": open_wiki_dpr,
    "legacy": open_legacy,
}


def open_index(config) -> KnowledgeIndex:
    """The passages that `config` describes, mapped, and their FAISS index, not yet opened.

    Raises:
        UserError: a part is missing or does not fit, or there is no such source.
    """
    if config.index_name not in INDEX_SOURCES:
        raise UserError(f"--index_name {config.index_name} is none of {', '.join(INDEX_SOURCES)}")
    return INDEX_SOURCES[config.index_name](config)
