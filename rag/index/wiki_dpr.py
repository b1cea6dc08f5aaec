"""Wikipedia, RAG's default knowledge: the dataset facebook/wiki_dpr, from the hub, its cache or a folder.

    index = open_wiki_dpr(config)   # config.index_name "exact" or "compressed"; config.dataset a name or a folder

Layout, as the hub's stored pages show it (written and tested against a folder of this layout, never against the hub):

    data/psgs_w100/{nq,multiset,no_embeddings,dummy.nq,...}/train-00000-of-00157.parquet    id, text, title, embeddings
    index/psgs_w100.{nq,multiset}.HNSW128_SQ8-IP-train.faiss             exact: 38.0 GB, vectors rounded to 8 bits
    index/psgs_w100.{nq,multiset}.IVF4096_HNSW128_PQ128-IP-train.faiss   compressed: 2.9 GB, vectors of 128 bytes

Where a passage's vector for the document scores comes from (`config.doc_vectors`):
- exact: "index". The index gives its vectors back, rounded by less than 1/255 of a coordinate's range, so that only
  texts are fetched beside it. RAG itself was trained so (transformers' legacy index).
- compressed: "passages", the embeddings in the rows, as transformers does. What this index gives back is too coarse to
  be the same model's scores; who has no room for 86 GB more, and as much again unpacked, chooses "index" knowingly.
- the dummy dataset's 10,000 passages come with embeddings and without an index: one that compares all is made of them.

`config.dataset_encoding` chooses the encoder pair: "nq" or "multiset"; left out, the one in the question encoder's
name, else "nq", transformers' default. License of the data: CC BY-NC 4.0.
"""

import logging
import os
import re
from pathlib import Path

import datasets
import faiss

from rag.errors import UserError, file_problems, raise_problems
from rag.hub import fetch_dataset, require_space
from rag.index.arguments import index_effort
from rag.index.columns import EmbeddingColumn
from rag.index.knowledge_index import KnowledgeIndex

logger = logging.getLogger(__name__)

# RagConfig's default is the name from before datasets had owners.
HUB_NAMES = {"wiki_dpr": "facebook/wiki_dpr"}
ENCODINGS = ("nq", "multiset")
FAISS_KINDS = {"exact": "HNSW128_SQ8", "compressed": "IVF4096_HNSW128_PQ128"}
DOC_VECTORS = {"exact": "index", "compressed": "passages"}
# Bytes of the Arrow copy for a byte of Parquet, rounded up: texts are compressed to 58%, embeddings hardly.
UNPACKED = {"passages": 1.0, "index": 2.0}
REMEDY = {
    "passages": ", or take --index_name exact or --doc_vectors index, for which no embeddings are fetched",
    "index": "",
}


def open_wiki_dpr(config) -> KnowledgeIndex:
    """The index that `config` (a `RagConfig`) describes, its files fetched, its FAISS part not yet opened.

    Read of the config: dataset, dataset_split, dataset_revision, index_name, use_dummy_dataset, retrieval_vector_size;
    and ours: dataset_encoding, doc_vectors, ef_search, nprobe.

    Raises:
        UserError: files are missing and cannot be fetched, or there is no room for them.
    """
    encoding, vectors_from = choose_encoding(config), choose_vectors(config)
    if config.index_path is not None:
        logger.warning(f"--index_path {config.index_path} is not read: --index_name {config.index_name} brings its own")
    dummy = "dummy." if config.use_dummy_dataset else ""
    part = encoding if vectors_from == "passages" else "no_embeddings"
    shards = f"data/psgs_w100/{dummy}{part}/{config.dataset_split}-*.parquet"
    index_file = f"index/psgs_w100.{encoding}.{FAISS_KINDS[config.index_name]}-IP-{config.dataset_split}.faiss"

    folder = _folder(config, [shards] if dummy else [shards, index_file], vectors_from)
    files = _complete_shards(folder, shards)
    if not dummy:
        raise_problems(file_problems("--dataset", folder / index_file, "fetch it from the hub into the same folder"))
        _warn_of_memory(folder / index_file)
    passages = _passages(files, config.dataset_split, vectors_from)
    if dummy:
        index = {"faiss_index": _flat_index(passages, config.retrieval_vector_size)}
    else:
        index = {"index_path": str(folder / index_file)}
    origin = f"--dataset {config.dataset}"
    search = {"vectors_from": vectors_from, "index_flag": "--dataset", "origin": origin, **index_effort(config)}
    return KnowledgeIndex(passages, config.retrieval_vector_size, **index, **search)


def choose_encoding(config) -> str:
    """ "nq" or "multiset": chosen, else known from the question encoder's name, else "nq"."""
    name = config.question_encoder.name_or_path
    in_name = re.search(r"(?<![a-z])(nq|multiset)(?![a-z])", Path(name).name)
    chosen = getattr(config, "dataset_encoding", None) or (in_name[1] if in_name else "nq")
    if chosen not in ENCODINGS:
        raise UserError(f"--dataset_encoding {chosen} is neither of {', '.join(ENCODINGS)}")
    if in_name and in_name[1] != chosen:
        logger.warning(
            f"--dataset_encoding {chosen}: the question encoder {name} is of the {in_name[1]} pair, so that retrieval "
            "will suffer; leave the flag out"
        )
    return chosen


def choose_vectors(config) -> str:
    """ "passages" or "index": where the vectors for document scores come from (see the file's docstring)."""
    if config.use_dummy_dataset:
        return "passages"
    chosen = getattr(config, "doc_vectors", None) or DOC_VECTORS[config.index_name]
    if chosen not in UNPACKED:
        raise UserError(f"--doc_vectors {chosen} is neither of {', '.join(UNPACKED)}")
    return chosen


def _folder(config, patterns: list[str], vectors_from: str) -> Path:
    """The folder in which the files lie: the user's own, or that of the hub's cache."""
    name = config.dataset
    if Path(name).is_dir():
        if config.dataset_revision is not None:
            logger.warning(f"--dataset_revision {config.dataset_revision} has no effect on the folder {name}")
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--dataset {name} is not a folder; give one of wiki_dpr's layout, or its name on the hub")

    def arrow_copy(sizes: dict[str, int]) -> dict[str, int]:
        return _arrow_copy(sum(size for file, size in sizes.items() if file.endswith(".parquet")), vectors_from)

    repo = HUB_NAMES.get(name, name)
    return fetch_dataset(repo, patterns, config.dataset_revision, arrow_copy, REMEDY[vectors_from])


def _arrow_copy(parquet_bytes: int, vectors_from: str) -> dict[str, int]:
    """The bytes that `datasets` will write, at most, and where."""
    return {str(datasets.config.HF_DATASETS_CACHE): int(parquet_bytes * UNPACKED[vectors_from])}


def _complete_shards(folder: Path, pattern: str) -> list[str]:
    """The Parquet files, all of them: their names say how many there are."""
    shards = sorted(folder.glob(pattern))
    expected = int(re.findall(r"-of-(\d+)", shards[0].name)[0]) if shards else "any"
    if len(shards) != expected:
        raise UserError(
            f"--dataset {folder}: {len(shards)} of {expected} files {pattern} are there; fetch the others from the hub"
        )
    return [str(shard) for shard in shards]


def _passages(shards: list[str], split: str, vectors_from: str) -> datasets.Dataset:
    """The rows as a memory-mapped Arrow copy in the cache of `datasets`, made the first time."""
    columns = ["id", "title", "text"] + (["embeddings"] if vectors_from == "passages" else [])
    builder = datasets.load_dataset_builder("parquet", data_files={split: shards}, columns=columns)
    if not Path(builder.cache_dir).exists():
        needs = _arrow_copy(sum(os.path.getsize(shard) for shard in shards), vectors_from)
        require_space("--dataset, unpacked", needs, REMEDY[vectors_from])
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _flat_index(passages: datasets.Dataset, dimension: int):
    """The dummy dataset has no index: all of its few vectors are compared, whatever --index_name says."""
    index = faiss.IndexFlatIP(dimension)
    for block in EmbeddingColumn(passages.data.column("embeddings"), dimension).blocks():
        index.add(block)
    return index


def _warn_of_memory(index_path: Path) -> None:
    size, memory = os.path.getsize(index_path), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        logger.warning(
            f"{index_path}: {size:,} bytes are mapped, but the machine has {memory:,} of memory; searches will wait "
            "for the disk"
        )
