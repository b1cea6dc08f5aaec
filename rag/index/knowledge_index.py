"""Knowledge: passages on disk and the FAISS index over their embeddings.

    index = KnowledgeIndex.load_from_disk(768, "my_knowledge_dataset", "my_knowledge_dataset_hnsw_index.faiss")
    index.init_index()                    # maps the FAISS file; the passages are mapped from the start
    doc_ids, doc_embeds = index.get_top_docs(queries, n_docs=5)
    docs = index.get_doc_dicts(doc_ids)

Both files are memory-mapped, so that opening takes milliseconds and processes of one machine share one copy. The id of
a passage is its row number; -1 marks a slot for which no passage was found: a zero vector, empty title and text.

A copy shares what is open, which nothing changes. A pickle has the paths of what lies in files and opens them again;
only what is in memory travels with it.

An index may be cut into shards, so that it can be larger than a machine: then its path is a folder with a FAISS file
for each, named by the rows it holds. Rows are counted from 0 in every file.
"""

import logging
from pathlib import Path

import datasets
import faiss
import numpy as np

from rag.errors import UserError, raise_problems
from rag.files import atomic_folder
from rag.index.columns import EmbeddingColumn, IndexVectors
from rag.index.device_search import DeviceSearch, DeviceUnavailableError
from rag.index.faiss_mapping import map_index
from rag.index.index_files import shard_files, write_faiss_index
from rag.index.passage_rows import PassageDict, PassageRows

logger = logging.getLogger(__name__)

PASSAGE_COLUMNS = ("title", "text", "embeddings")


class KnowledgeIndex:
    """Passages with embeddings and a FAISS index over them, behind transformers' `Index` interface.

    It does not inherit from it: transformers and torch take seconds to import, and a Ray actor that only searches is to
    be back in a moment.

    Args:
        passages: dataset with the columns title (str), text (str) and, unless `vectors_from` is "index", embeddings
            (lists of `vector_size` floats).
        vector_size: dimension d of the embeddings and of the queries.
        index_path: the FAISS file, or a folder of shards; None when `faiss_index` is given.
        faiss_index: an index in memory, over the passages in their order.
        vectors_from: where the vectors that are returned come from. "passages": their embeddings, which every process
            can read; "index": what the FAISS index gives back of them, which only a process that opened it can.
        ef_search: candidates that an HNSW search keeps; None for the index's own.
        nprobe: lists that an IVF search visits; None for the index's own.
        device: "cuda", "cuda:1" or "cpu" compares the questions with all vectors, held there in half precision; where
            that cannot be, and with None, FAISS searches.
        index_flag: the flag that gave the index, for the messages.

    Attributes:
        fallback: why the device is not used, if it was to be.

    Raises:
        UserError: a column is missing, or dimension or count of passages, index and model do not fit each other.
    """

    begun = frozenset({"embeddings", "device_search", "faiss_index", "rows"})  # what `_begin` makes
    extra_dimensions = 0  # of the FAISS index, beyond the vectors'
    reads_text = False  # whether `encode_questions` makes the queries, not a question encoder

    def __init__(
        self, passages, vector_size: int, index_path=None, faiss_index=None, *,
        vectors_from: str = "passages", ef_search: int | None = None, nprobe: int | None = None,
        device: str | None = None, index_flag: str = "--index_path",
    ):  # fmt: skip
        check_columns(passages, PASSAGE_COLUMNS if vectors_from == "passages" else PASSAGE_COLUMNS[:2])
        self.passage_rows = PassageRows(passages)
        self.vectors_from = vectors_from
        self.vector_size = vector_size
        self.index_path = index_path
        self.index_flag = index_flag
        self.effort = {"efSearch": ef_search, "nprobe": nprobe}
        self.device = device
        self.fallback: str | None = None
        self.shard: int | None = None  # the one that is open; None for all
        self._begin(faiss_index)

    def _begin(self, faiss_index=None) -> None:
        """What the files or the parts in memory give, made anew where this index was pickled."""
        self.embeddings: EmbeddingColumn | IndexVectors | None = None
        if self.vectors_from == "passages":
            self.embeddings = EmbeddingColumn(self.passage_rows.column("embeddings"), self.vector_size)
        self.device_search: DeviceSearch | None = None
        self.faiss_index = None
        self.rows = range(len(self))  # those that are searched: of one shard fewer than all
        if faiss_index is not None:
            self._accept(faiss_index)

    def __copy__(self) -> "KnowledgeIndex":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict) -> "KnowledgeIndex":
        return self.__copy__()

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in self.begun}
        return state | {"faiss_index": None if self.index_path else self.faiss_index, "is_open": self.is_initialized()}

    def __setstate__(self, state: dict) -> None:
        faiss_index, is_open = state.pop("faiss_index"), state.pop("is_open")
        self.__dict__.update(state)
        self._begin(faiss_index)
        if is_open:
            self.init_index(self.shard)

    @classmethod
    def load_from_disk(cls, vector_size: int, passages_path, index_path, **search) -> "KnowledgeIndex":
        """Map the two parts that `use_own_knowledge_dataset.py` leaves; FAISS files only at `init_index`.

        `search` is ef_search, nprobe and device.
        """
        problems = []
        remedy = "build it with use_own_knowledge_dataset.py"
        if passages_path is None or not (Path(passages_path) / "dataset_info.json").is_file():
            problems.append(f"--passages_path {passages_path} is not a folder of passages; {remedy}")
        is_file = index_path is not None and Path(index_path).is_file()
        if not is_file and not (index_path is not None and shard_files(index_path)):
            problems.append(f"--index_path {index_path} is not a FAISS index file, nor a folder of shards; {remedy}")
        raise_problems(problems)
        return cls(datasets.load_from_disk(str(passages_path)), vector_size, index_path=str(index_path), **search)

    @classmethod
    def from_dataset(cls, indexed_dataset, vector_size: int) -> "KnowledgeIndex":
        """Take a dataset on which `add_faiss_index("embeddings")` or `load_faiss_index` was called."""
        if "embeddings" not in indexed_dataset.list_indexes():
            raise UserError("indexed_dataset has no index; call indexed_dataset.add_faiss_index('embeddings') first")
        return cls(indexed_dataset, vector_size, faiss_index=indexed_dataset.get_index("embeddings").faiss_index)

    @property
    def in_memory(self) -> bool:
        """Whether the FAISS index is in no file, so that it ends with this process."""
        return self.index_path is None and self.faiss_index is not None

    def save(self, passages_path, index_path) -> None:
        """Write passages and FAISS index for `load_from_disk`, each whole or not at all.

        Args:
            passages_path: the folder of the passages; what is there is replaced.
            index_path: the FAISS file.
        """
        with atomic_folder(passages_path) as folder:
            self.passage_rows.save(folder)
        write_faiss_index(self.faiss_index, index_path)

    @property
    def dataset(self) -> datasets.Dataset:
        """Every column of the passages, by row: `index.dataset[7]["text"]`; embeddings as float32 arrays."""
        return self.passage_rows.dataset

    @property
    def passages(self) -> datasets.Dataset:
        """Titles and texts by row."""
        return self.dataset.with_format(None).select_columns(["title", "text"])

    @property
    def num_shards(self) -> int:
        """FAISS files that the index consists of."""
        return len(self._files())

    def _files(self) -> list[tuple[str, int, int]]:
        """The FAISS files, each with the rows it holds."""
        if self.index_path is not None and Path(self.index_path).is_dir():
            return [(str(path), start, end) for path, start, end in shard_files(self.index_path)]
        return [(self.index_path, 0, len(self))]

    def is_initialized(self) -> bool:
        return self.faiss_index is not None or self.device_search is not None

    def init_index(self, shard: int | None = None) -> None:
        """Map the FAISS file, or all shards of it, or the one of this number; a second call does nothing."""
        if self.is_initialized():
            return
        files = self._files()
        self._check_rows(files)
        files = files if shard is None else [files[shard]]
        self.shard, self.rows = shard, range(files[0][1], files[-1][2])
        if self.device is not None and self.vectors_from == "passages":
            self._search_on_device()
        if self.device_search is None:
            self._accept(self._map(files))
        if self.device is not None and self.vectors_from == "index":
            self._search_on_device()

    def _check_rows(self, files: list[tuple[str, int, int]]) -> None:
        """The rows of the shards follow each other."""
        expected = 0
        for _, start, end in files:
            if start != expected:
                raise UserError(
                    f"{self.index_flag} {self.index_path}: its shards do not hold row {min(start, expected)} exactly "
                    "once; put all of one index there, and no other"
                )
            expected = end
        if expected != len(self):
            raise UserError(_other_count(self.index_flag, self.index_path, expected, len(self)))

    def _map(self, files: list[tuple[str, int, int]]):
        """The FAISS index of these files, the rows of one behind those of the other."""
        parts = []
        for path, start, end in files:
            try:
                parts.append(map_index(path))
            except RuntimeError as error:
                raise UserError(
                    f"{self.index_flag} {path} is not a whole FAISS index ({str(error).splitlines()[0]}); build or "
                    "fetch it again"
                ) from error
            if len(files) > 1 and parts[-1].ntotal != end - start:  # of one alone `_accept` tells all that is wrong
                raise UserError(_other_count(self.index_flag, path, parts[-1].ntotal, end - start))
        if len(parts) == 1:
            return parts[0]
        whole = faiss.IndexShards(parts[0].d, False, True)  # one after the other, each with all threads
        for part in parts:
            whole.add_shard(part)
        return whole

    def _search_on_device(self) -> None:
        try:
            self.device_search = DeviceSearch(
                self.embeddings.blocks(rows=self.rows), len(self.rows), self.vector_size, self.device
            )
        except DeviceUnavailableError as error:
            self.fallback = f"--index_device {self.device}: {error}; FAISS searches instead"
            logger.warning(self.fallback)

    def _accept(self, faiss_index) -> None:
        problems = []
        dimension = faiss_index.d - self.extra_dimensions
        if dimension != self.vector_size:
            problems.append(
                f"{self.index_flag} {self.index_path} has dimension {dimension}, but the question encoder gives "
                f"{self.vector_size}; build the index with the matching context encoder"
            )
        if faiss_index.ntotal != len(self.rows):
            problems.append(_other_count(self.index_flag, self.index_path, faiss_index.ntotal, len(self.rows)))
        raise_problems(problems + self._set_effort(faiss_index))
        self.faiss_index = faiss_index
        if self.vectors_from == "index":
            self.embeddings = IndexVectors(faiss_index, self.vector_size)

    def _set_effort(self, faiss_index) -> list[str]:
        """Apply what is set of efSearch and nprobe; the problems with it."""
        problems = []
        for (name, value), flag in zip(self.effort.items(), ("--ef_search", "--nprobe"), strict=True):
            if value is None:
                continue
            try:
                faiss.ParameterSpace().set_index_parameter(faiss_index, name, value)
            except RuntimeError:
                kind = type(_one_of(faiss_index)).__name__
                problems.append(f"{flag} {value}: an index of kind {kind} has no such setting; leave it out")
        return problems

    def __len__(self) -> int:
        return len(self.passage_rows)

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, n_docs) float32 and ids (B, n_docs) int64 of the largest inner products, best first."""
        searcher = self.device_search or self.faiss_index
        scores, ids = searcher.search(np.ascontiguousarray(queries, dtype=np.float32), n_docs)
        if self.rows.start:
            ids[ids >= 0] += self.rows.start
        return scores, ids

    def get_top_docs(self, question_hidden_states: np.ndarray, n_docs: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """One search for the whole batch, one gather.

        Args:
            question_hidden_states: (B, d) float32 query vectors.
            n_docs: passages a query.

        Returns:
            ids (B, n_docs) int64, best first, and their embeddings (B, n_docs, d) float32.
        """
        _, doc_ids = self.search(question_hidden_states, n_docs)
        return doc_ids, self.embeddings.gather(doc_ids)

    def get_doc_dicts(self, doc_ids) -> list[PassageDict]:
        """For each row of `doc_ids` a dict with every column of its passages, in the order of the ids.

        Titles and texts are read at once, all else on first use: embeddings as an array (n_docs, d) float32, of
        any other column a list.

        Args:
            doc_ids: (B, n_docs) whole numbers: an array, a tensor on any device, or lists.
        """
        return self.passage_rows.doc_dicts(id_lists(doc_ids), self.passage_rows.names)

    def settings(self) -> dict:
        """What bears on a retrieval score and belongs beside it: kind, size, efSearch, nprobe, vectors' origin."""
        size = {"passages": len(self), "dimension": self.vector_size}
        if self.device_search is not None:
            return self.device_search.settings() | size
        index = _one_of(self.faiss_index)
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        settings = {"kind": type(index).__name__} | size
        if isinstance(self.faiss_index, faiss.IndexShards):
            settings["shards"] = self.faiss_index.count()
        graph = faiss.downcast_index(index.quantizer) if isinstance(index, faiss.IndexIVF) else index
        if hasattr(graph, "hnsw"):
            settings["ef_search"] = graph.hnsw.efSearch
        if hasattr(index, "nprobe"):
            settings["nprobe"] = index.nprobe
        if self.vectors_from == "index":
            settings["vectors_from"] = "index"
        return settings


def _one_of(faiss_index):
    """A FAISS index by its own class; of shards, which are all of one kind, the first."""
    if isinstance(faiss_index, faiss.IndexShards):
        faiss_index = faiss_index.at(0)
    return faiss.downcast_index(faiss_index)


def _other_count(flag: str, path, size: int, expected: int) -> str:
    return (
        f"{flag} {path} holds {size} vectors, but there are {expected} passages; take the two that were built together"
    )


def id_lists(doc_ids) -> list[list[int]]:
    """Ids (B, n_docs) as lists, whatever holds them; a tensor may lie on a GPU."""
    return doc_ids.tolist() if hasattr(doc_ids, "tolist") else [[int(doc_id) for doc_id in row] for row in doc_ids]


def check_columns(passages, needed: tuple[str, ...]) -> None:
    """Raise `UserError` if the passages lack a column."""
    missing = [name for name in needed if name not in passages.column_names]
    if missing:
        raise UserError(
            f"--passages_path: the passages lack the column(s) {', '.join(missing)} (found: "
            f"{', '.join(passages.column_names)}); build them with use_own_knowledge_dataset.py"
        )
