"""The index that a `RagConfig` describes, whatever its source: your own, Wikipedia's, DPR's, BM25, both, a file.

    index = open_index(config)   # config.index_name: custom, exact, compressed, legacy, bm25, hybrid or given
    index.init_index()

Neither torch nor transformers is imported: an actor that only searches is back in a moment.
"""

import copy
import logging

from rag.errors import UserError
from rag.hub import fetch_dataset
from rag.index.arguments import HUB_PREFIX, index_effort
from rag.index.bm25 import open_bm25
from rag.index.given_passages import open_given
from rag.index.hybrid import HybridIndex, open_hybrid
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


def open_vectors_and_words(config) -> HybridIndex:
    """`open_custom`'s, fused with BM25 over the same passages."""
    return open_hybrid(config, open_custom)


INDEX_SOURCES = {
    "custom": open_custom,
    "exact": open_wiki_dpr,
    "compressed": open_wiki_dpr,
    "legacy": open_legacy,
    "bm25": open_bm25,
    "hybrid": open_vectors_and_words,
    "given": open_given,
}


def open_index(config) -> KnowledgeIndex:
    """The passages that `config` describes, mapped, and their FAISS index, not yet opened.

    Raises:
        UserError: a part is missing or does not fit, or there is no such source.
    """
    if config.index_name not in INDEX_SOURCES:
        raise UserError(f"--index_name {config.index_name} is none of {', '.join(INDEX_SOURCES)}")
    if config.index_name in ("custom", "bm25", "hybrid") and (config.passages_path or "").startswith(HUB_PREFIX):
        config = fetched(config)
    return INDEX_SOURCES[config.index_name](config)


def open_own(config, passages_path: str, index_path: str) -> KnowledgeIndex:
    """Another index over the passages of the one that `config` describes, in its place, not yet opened.

    Raises:
        UserError: as of `open_index`.
    """
    config = copy.copy(config)
    config.index_name, config.passages_path, config.index_path = "custom", passages_path, index_path
    return open_index(config)


def fetched(config):
    """The config with the paths of the hub's cache in place of `hub:OWNER/NAME`; what is not there yet is fetched.

    Every process of a job may call this at once: one fetches, the others wait.

    Raises:
        UserError: there is no such dataset, it cannot be fetched, or holds no passages or an index of another kind.
    """
    name, source = config.passages_path.removeprefix(HUB_PREFIX), f"--passages_path {config.passages_path}"
    instead = "a folder of passages, with --index_path"
    folder = fetch_dataset(name, ["*"], None, lambda sizes: {}, "", source, instead)
    passages = next(iter(sorted(folder.glob("*/state.json"))), None)
    if passages is None:
        raise UserError(f"{source} holds no passages; give one that use_own_knowledge_dataset.py --push_to_hub wrote")
    description = read_description(passages.parent, source)
    kind = "bm25" if description.factory == "bm25" else "custom"
    wanted = "custom" if config.index_name == "hybrid" else config.index_name  # BM25's is built beside
    if not description.index or (kind != wanted and kind == "bm25"):
        has = "an index of words: give --index_name bm25" if kind == "bm25" else "no index: push the whole folder"
        raise UserError(f"{source} holds {has}")
    config = copy.copy(config)
    config.passages_path = str(passages.parent)
    config.index_path = str(folder / description.index) if kind == wanted else None
    return config
