"""The index and passages of the first DPR release, on which RAG was trained: `--index_name legacy --index_path FOLDER`.

    index = open_legacy(config)   # config.index_path holds the files named below

    hf_bert_base.hnswSQ8_correct_phi_128.c_index.index.dpr        FAISS: HNSW, 8 bits a coordinate, distances (L2)
    hf_bert_base.hnswSQ8_correct_phi_128.c_index.index_meta.dpr   pickled list: the passage id of each vector
    psgs_w100.tsv, or psgs_w100.tsv.pkl                           id, text, title; or a pickled {id: (text, title)}

Vectors have one dimension more, the square root of (phi - |x|^2) where phi is the largest |x|^2: then all are equally
long and the nearest one is the one of largest inner product (Bachrach et al. 2014; Karpukhin et al. 2020 for DPR).

A pickle can run any program when it is read. These are read only where TRUST_REMOTE_CODE is set, as in transformers,
and even then by a reader that knows containers, strings and numbers and refuses all else before it is run.
"""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from rag.errors import UserError, file_problems, one_line, raise_problems
from rag.files import new_digest
from rag.index.arguments import index_effort
from rag.index.dpr_tsv import DprRowError, dpr_rows
from rag.index.knowledge_index import KnowledgeIndex, id_lists
from rag.index.passage_rows import PassageDict

INDEX_FILE = "hf_bert_base.hnswSQ8_correct_phi_128.c_index.index.dpr"
IDS_FILE = "hf_bert_base.hnswSQ8_correct_phi_128.c_index.index_meta.dpr"
PASSAGES_TSV = "psgs_w100.tsv"
PASSAGES_PICKLE = "psgs_w100.tsv.pkl"
TRUE = ("y", "yes", "t", "true", "on", "1")  # as transformers reads TRUST_REMOTE_CODE
FEATURES = Features({"id": Value("int64"), "text": Value("string"), "title": Value("string")})


class LegacyIndex(KnowledgeIndex):
    """A `KnowledgeIndex` whose ids are those that the passages bear, as in `transformers.LegacyIndex`.

    Args:
        passages: dataset of id (int64), text, title.
        passage_ids: (N,) int64, the passage's id for each vector of the FAISS index.
        vector_size: dimension d of the queries; the FAISS index has d + 1.
        index_path: the FAISS file.
        search: ef_search, nprobe, device and precision.
    """

    extra_dimensions = 1
    opened_parts = KnowledgeIndex.opened_parts | {"order", "sorted_ids"}

    def __init__(self, passages: Dataset, passage_ids: np.ndarray, vector_size: int, index_path: str, **search):
        self.passage_ids = passage_ids  # as many as there are vectors
        origin = f"--index_path {Path(index_path).parent}"
        super().__init__(passages, vector_size, index_path=index_path, vectors_from="index", origin=origin, **search)
        unknown = np.setdiff1d(passage_ids, self.sorted_ids)
        if len(unknown):
            raise UserError(
                f"--index_path {Path(index_path).parent}: {IDS_FILE} names {len(unknown)} passages, {unknown[0]} "
                "first, that the file of passages lacks; take the files that were built together"
            )

    def _open_parts(self, faiss_index=None) -> None:
        super()._open_parts(faiss_index)
        ids_in_file = self.passage_rows.column("id").to_numpy()
        self.order = np.argsort(ids_in_file, kind="stable")  # rows by their id
        self.sorted_ids = ids_in_file[self.order]

    def __len__(self) -> int:
        return len(self.passage_ids)

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, n_docs) float32 and ids (B, n_docs) int64 of the largest inner products, best first."""
        doc_ids, vectors = self.get_top_docs(queries, n_docs)
        return np.einsum("bd,bnd->bn", queries, vectors).astype(np.float32), doc_ids

    def get_top_docs(self, question_hidden_states: np.ndarray, n_docs: int = 5) -> tuple[np.ndarray, np.ndarray]:
        queries = np.ascontiguousarray(question_hidden_states, dtype=np.float32)
        if self.device_search is not None:  # inner products: no extra dimension
            _, places = self.device_search.search(queries, n_docs)
        else:
            _, places = self._search_by_faiss(np.pad(queries, ((0, 0), (0, 1))), n_docs)
        present = places >= 0
        doc_ids = np.full(places.shape, -1, dtype=np.int64)
        doc_ids[present] = self.passage_ids[places[present]]
        assert self.embeddings is not None, "init_index comes first"
        return doc_ids, self.embeddings.gather(places)

    def get_doc_dicts(self, doc_ids) -> list[PassageDict]:
        """Titles and texts, as transformers' legacy index has them."""
        doc_ids = np.array(id_lists(doc_ids), dtype=np.int64)
        present = doc_ids >= 0
        rows = np.full(doc_ids.shape, -1, dtype=np.int64)
        rows[present] = self.order[np.searchsorted(self.sorted_ids, doc_ids[present])]
        return self.passage_rows.doc_dicts(rows.tolist(), ("title", "text"))


def open_legacy(config) -> LegacyIndex:
    """The index in the folder `config.index_path`, its FAISS part not yet opened.

    Raises:
        UserError: a file is missing, a pickle is not trusted or holds what it should not, or files do not fit.
    """
    if config.index_path is None or not Path(config.index_path).is_dir():
        raise UserError(
            f"--index_path {config.index_path} is not a folder; --index_name legacy needs one that holds {INDEX_FILE}, "
            f"{IDS_FILE} and {PASSAGES_TSV}"
        )
    folder = Path(config.index_path)
    passages_file = next((path for name in (PASSAGES_TSV, PASSAGES_PICKLE) if (path := folder / name).is_file()), None)
    problems = [
        problem
        for name in (INDEX_FILE, IDS_FILE)
        for problem in file_problems("--index_path", folder / name, "fetch it from where the index came from")
    ]
    if passages_file is None:
        problems.append(f"--index_path {folder} holds neither {PASSAGES_TSV} nor {PASSAGES_PICKLE}; put one there")
    raise_problems(problems)
    assert passages_file is not None
    raise_problems(_trust_problems(folder / IDS_FILE))
    ids = _read_ids(folder / IDS_FILE)
    passages = _passages(passages_file)
    return LegacyIndex(passages, ids, config.retrieval_vector_size, str(folder / INDEX_FILE), **index_effort(config))


# --- Passages ---------------------------------------------------------------------------------------------------------


def _passages(path: Path) -> Dataset:
    """The passages, memory-mapped: an Arrow copy in the cache of `datasets`, made the first time."""
    state = path.stat()
    # A changed file is another one: its size and time are part of the copy's name.
    origin = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    fingerprint = new_digest(origin.encode()).hexdigest()
    read = read_dpr_tsv if path.suffix == ".tsv" else _read_pickled_passages
    try:
        return Dataset.from_generator(read, FEATURES, gen_kwargs={"path": str(path)}, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def read_dpr_tsv(path: str | os.PathLike) -> Iterator[dict]:
    """The rows of DPR's `psgs_w100.tsv`: id, text, title, under a header; fields may be quoted, quotes in them doubled.

    Raises:
        UserError: a row that is not of this form.
    """
    with open(path, encoding="utf-8", newline="") as file:
        try:
            for _, number, text, title in dpr_rows(file):
                yield {"id": number, "text": text, "title": title}
        except DprRowError as error:
            raise UserError(f"--index_path {path} {error}") from error


def _read_pickled_passages(path: str) -> Iterator[dict]:
    raise_problems(_trust_problems(path))
    passages = load_plain_pickle(path)
    if not isinstance(passages, dict):
        raise UserError(f"--index_path {path} holds a {type(passages).__name__}, not a dict of passages by their id")
    try:
        for number, (text, title) in passages.items():
            yield {"id": int(number), "text": text, "title": title}
    except (TypeError, ValueError) as error:
        raise UserError(f"--index_path {path} holds other things than {{id: (text, title)}} ({error})") from error


# --- Pickles ----------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers, which need no code; whatever would call some is refused before it can."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def load_plain_pickle(path: str | os.PathLike):
    """The content of a pickle of plain containers, strings and numbers.

    Raises:
        UserError: it holds something else, or is not a whole pickle.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # bytes that are no pickle can raise anything
            reason = one_line(error) or "it ends too early"
            raise UserError(
                f"--index_path {path} is refused: {reason}; only a pickle of plain lists, dicts, strings and numbers "
                "is read"
            ) from error


def _trust_problems(path: str | os.PathLike) -> list[str]:
    if os.environ.get("TRUST_REMOTE_CODE", "").lower() in TRUE:
        return []
    return [
        f"--index_path {path} is a pickle, which is read only if you say so: where you trust its origin, set "
        "TRUST_REMOTE_CODE=True in the environment"
    ]


def _read_ids(path: Path) -> np.ndarray:
    """(N,) int64, the passage's id for each vector."""
    ids = load_plain_pickle(path)
    try:
        return np.fromiter(map(int, ids), dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise UserError(f"--index_path {path} holds other things than a list of passage ids ({error})") from error
