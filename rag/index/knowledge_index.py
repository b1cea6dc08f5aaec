"""Knowledge: passages on disk and the FAISS index over their embeddings.

    index = KnowledgeIndex.load_from_disk(768, "my_knowledge_dataset", "my_knowledge_dataset_hnsw_index.faiss")
    index.init_index()                    # maps the FAISS file; the passages are mapped from the start
    doc_ids, doc_embeds = index.get_top_docs(queries, n_docs=5)
    docs = index.get_doc_dicts(doc_ids)

Both files are memory-mapped, so that opening takes milliseconds and processes of one machine share one copy; only the
first opening reads, where there is something to check that no later one need check again (rag/checksums.py). The id of
a passage is its row number; -1 marks a slot for which no passage was found: a zero vector, empty title and text.

A copy shares what is open, which nothing changes. A pickle has the paths of what lies in files and opens them again;
only what is in memory travels with it.

An index may be cut into shards, so that it can be larger than a machine: then its path is a folder with a FAISS file
for each, named by the rows it holds. Rows are counted from 0 in every file.
"""

import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from rag.checksums import found_once
from rag.errors import UserError, raise_problems
from rag.files import atomic_folder
from rag.index.columns import EmbeddingColumn, IndexVectors, equally_long
from rag.index.device_opening import hold_on_device, slice_of
from rag.index.device_search import DeviceSearch
from rag.index.faiss_checks import foreign_row
from rag.index.faiss_kinds import describe_search
from rag.index.faiss_opening import files_of, fitting_index, joined, map_file, other_count, require_all_rows, set_effort
from rag.index.index_files import shard_files, write_faiss_index
from rag.index.integrity import require_undamaged
from rag.index.passage_checks import look_at_rows, open_passages, passage_problems
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
        device: "cuda", "cuda:1" or "cpu" compares the questions with all vectors, held there; where that cannot be, and
            with None, FAISS searches.
        precision: "fp16" (also None) or "int8", in which the device holds them.
        index_flag: the flag that gave the index, for the messages.
        origin: the flag that gave the passages, and its value, for the messages.

    Attributes:
        fallback: why the device is not used, if it was to be.

    Raises:
        UserError: a column is missing or of another type, or dimension or count of passages, index and model do not
            fit each other, or the index does not rank by inner products.
    """

    opened_parts = frozenset({"embeddings", "device_search", "faiss_index", "rows"})  # what `_open_parts` makes
    extra_dimensions = 0  # of the FAISS index, beyond the vectors'
    reads_text = False  # whether `encode_questions` makes the queries of the questions' words, or a part of them
    reads_vectors = True  # whether a question encoder makes them, or what stands before that part
    teaches: bool = True  # whether the scores depend on the question vectors by a derivative that is not zero

    def __init__(
        self, passages, vector_size: int, index_path=None, faiss_index=None, *,
        vectors_from: str = "passages", ef_search: int | None = None, nprobe: int | None = None,
        device: str | None = None, precision: str | None = None, index_flag: str = "--index_path",
        origin: str = "--passages_path",
    ):  # fmt: skip
        needed = PASSAGE_COLUMNS if vectors_from == "passages" else PASSAGE_COLUMNS[:2]
        raise_problems(passage_problems(passages, needed, origin))
        self.passage_rows = PassageRows(passages, origin)
        self.vectors_from = vectors_from
        self.vector_size = vector_size
        self.index_path = index_path
        self.index_flag = index_flag
        self.effort = {"efSearch": ef_search, "nprobe": nprobe}
        self.device = device
        self.precision = precision or "fp16"
        self.fallback: str | None = None
        self.shard: int | None = None  # the one that is open; None for all
        self.slice: tuple[int, int] | None = None  # number and count, where a part of the vectors is held
        self._open_parts(faiss_index)
        vectors = self.embeddings if isinstance(self.embeddings, EmbeddingColumn) else None
        look_at_rows(list(self.passage_rows.texts.values()), vectors, origin)

    def _open_parts(self, faiss_index=None) -> None:
        """What the files or the parts in memory give, made anew where this index was pickled."""
        self.embeddings: EmbeddingColumn | IndexVectors | None = None
        if self.vectors_from == "passages":
            self.embeddings = EmbeddingColumn(self.passage_rows.column("embeddings"), self.vector_size, self.origin)
        self.device_search: DeviceSearch | None = None
        self.faiss_index: Any = None
        self.by_distance = False  # whether FAISS's scores are no inner products, though the order is the same
        self.rows = range(len(self))  # those that are searched: of a shard or a slice fewer than all
        if faiss_index is not None:
            self._accept(self._fitting(faiss_index, len(self)))

    def __copy__(self) -> "KnowledgeIndex":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict) -> "KnowledgeIndex":
        return self.__copy__()

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in self.opened_parts}
        return state | {"faiss_index": None if self.index_path else self.faiss_index, "is_open": self.is_initialized()}

    def __setstate__(self, state: dict) -> None:
        faiss_index, is_open = state.pop("faiss_index"), state.pop("is_open")
        self.__dict__.update(state)
        self._open_parts(faiss_index)
        if is_open and self.slice is not None:
            self.init_slice(*self.slice)
        elif is_open:
            self.init_index(self.shard)

    @classmethod
    def load_from_disk(cls, vector_size: int, passages_path, index_path, **search) -> "KnowledgeIndex":
        """Map the two parts that `use_own_knowledge_dataset.py` leaves; FAISS files only at `init_index`.

        `search` is ef_search, nprobe, device and precision.
        """
        problems = []
        remedy = "build it with use_own_knowledge_dataset.py"
        if passages_path is None or not os.path.isdir(passages_path):
            problems.append(f"--passages_path {passages_path} is not a folder of passages; {remedy}")
        is_file = index_path is not None and os.path.isfile(index_path)
        is_folder = index_path is not None and os.path.isdir(index_path)
        if not is_file and not (is_folder and shard_files(index_path)):
            inside = sorted(Path(index_path).glob("*.faiss")) if is_folder else []
            remedy = f"give {inside[0]}, which is in it" if inside else remedy
            problems.append(f"--index_path {index_path} is not a FAISS index file, nor a folder of shards; {remedy}")
        raise_problems(problems)
        require_undamaged(passages_path, index_path)
        origin = f"--passages_path {passages_path}"
        return cls(open_passages(passages_path), vector_size, index_path=str(index_path), origin=origin, **search)

    @classmethod
    def from_dataset(cls, indexed_dataset, vector_size: int) -> "KnowledgeIndex":
        """Take a dataset on which `add_faiss_index("embeddings")` or `load_faiss_index` was called."""
        if isinstance(indexed_dataset, dict):
            splits = ", ".join(map(str, indexed_dataset))
            raise UserError(f"indexed_dataset holds several splits ({splits}); give one, as indexed_dataset['train']")
        names = indexed_dataset.list_indexes()
        if "embeddings" not in names:
            found = f", but of the name(s) {', '.join(names)}" if names else ""
            raise UserError(
                f"indexed_dataset has no index of the name embeddings{found}; call "
                "indexed_dataset.add_faiss_index('embeddings') first"
            )
        faiss_index = indexed_dataset.get_index("embeddings").faiss_index
        return cls(
            indexed_dataset,
            vector_size,
            faiss_index=faiss_index,
            index_flag="indexed_dataset",
            origin="indexed_dataset",
        )

    @property
    def origin(self) -> str:
        """The flag that gave the passages, and its value."""
        return self.passage_rows.origin

    @property
    def index_origin(self) -> str:
        """The flag that gave the index, and its value."""
        return self.index_flag if self.index_path is None else f"{self.index_flag} {self.index_path}"

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
        return 1 if self.index_path is None else len(files_of(self.index_path, len(self)))

    def is_initialized(self) -> bool:
        return self.faiss_index is not None or self.device_search is not None

    def init_index(self, shard: int | None = None) -> None:
        """Map the FAISS file, or all shards of it, or the one of this number; a second call does nothing."""
        if self.is_initialized():
            return
        files = files_of(self.index_path, len(self))
        require_all_rows(files, len(self), self.index_origin)
        files = files if shard is None else [files[shard]]
        self.shard, self.rows = shard, range(files[0][1], files[-1][2])
        if self.device is not None and self.vectors_from == "passages":
            self._search_on_device()
        if self.device_search is None:
            self._accept(self._map(files))
        if self.device is not None and self.vectors_from == "index":
            self._search_on_device()

    def _map(self, files: list[tuple[str, int, int]]):
        """The FAISS index of these files, the rows of one behind those of the other."""
        parts = []
        for path, start, end in files:
            part = map_file(path, self.index_flag)
            if len(files) > 1 and part.ntotal != end - start:  # of one alone `_accept` tells all that is wrong
                raise UserError(other_count(f"{self.index_flag} {path}", part.ntotal, end - start))
            parts.append(self._fitting(part, end - start, path, start))
        return joined(parts)

    def _fitting(self, faiss_index, count: int, path: str | None = None, start: int = 0):
        """The index of a file, or one in memory, over `count` passages from row `start` on, as it is searched."""
        origin = self.index_origin if path is None else f"{self.index_flag} {path}"
        given = faiss_index
        faiss_index, by_distance = fitting_index(
            faiss_index, count, origin, path, lambda: self.extra_dimensions > 0 or self._equally_long(path)
        )
        self.by_distance |= by_distance
        embeddings = self.embeddings
        if isinstance(embeddings, EmbeddingColumn) and (given.ntotal, given.d) == (count, self.vector_size):
            row = foreign_row(given, lambda rows: embeddings.gather(rows + start))
            if row is not None:
                logger.warning(
                    f"{origin}: its vector {row} is not the embedding of row {row + start} of {self.origin}: passages "
                    "are found by one and scored by the other; unless you mean it, take two that were built together"
                )
        return faiss_index

    def _equally_long(self, path: str | None) -> bool:
        """Whether all passages' vectors have one length, so that the nearest are those of largest inner product."""
        if not isinstance(self.embeddings, EmbeddingColumn):
            return False
        column = self.embeddings
        if path is None:
            return equally_long(column.blocks())
        return found_once(path, f"equal lengths {self.passage_rows.stamp()}", lambda: equally_long(column.blocks()))

    @property
    def can_be_sliced(self) -> bool:
        """Whether processes that each have a device of this name can each hold a part of the vectors."""
        return self.device in ("cpu", "cuda") and self.vectors_from == "passages"

    def init_slice(self, number: int, count: int) -> str | None:
        """Hold the `number`-th of `count` parts of the vectors on the device: `search` finds passages of it alone.

        Returns:
            Why that cannot be, if so; then `leave_slice` follows.
        """
        self.device_search = None  # frees what it holds
        self.rows = slice_of(len(self), number, count)
        self._search_on_device()
        self.slice = number, count
        return self.fallback

    def leave_slice(self, fallback: str) -> None:
        """Hold no vectors on a device, because of `fallback`: `init_index` opens the FAISS index instead."""
        self.device, self.slice, self.device_search, self.fallback = None, None, None, fallback
        self.rows = range(len(self))

    def _search_on_device(self) -> None:
        assert self.embeddings is not None and self.device is not None
        self.device_search, self.fallback = hold_on_device(
            self.embeddings, self.rows, self.vector_size, self.device, self.precision, self.origin
        )
        if self.fallback is not None:
            logger.warning(self.fallback)

    def _accept(self, faiss_index) -> None:
        problems = []
        dimension = faiss_index.d - self.extra_dimensions
        if dimension != self.vector_size:
            problems.append(
                f"{self.index_origin} has dimension {dimension}, but the question encoder gives "
                f"{self.vector_size}; build the index with the matching context encoder"
            )
        if faiss_index.ntotal != len(self.rows):
            problems.append(other_count(self.index_origin, faiss_index.ntotal, len(self.rows)))
        raise_problems(problems + set_effort(faiss_index, self.effort, len(self)))
        self.faiss_index = faiss_index
        if self.vectors_from == "index":
            self.embeddings = IndexVectors(faiss_index, self.vector_size)

    def __len__(self) -> int:
        return len(self.passage_rows)

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, n_docs) float32 and ids (B, n_docs) int64 of the largest inner products, best first."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.device_search is not None:
            scores, ids = self.device_search.search(queries, n_docs)
        else:
            scores, ids = self._search_by_faiss(queries, n_docs)
        if self.rows.start:
            ids[ids >= 0] += self.rows.start
        if self.by_distance and self.device_search is None:
            assert self.embeddings is not None
            products = np.einsum("bd,bnd->bn", queries, self.embeddings.gather(ids))
            scores = np.where(ids >= 0, products, np.finfo(np.float32).min)
        return scores, ids

    def _search_by_faiss(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's scores and ids, which are rows of what is open; a damaged file's may be anything."""
        try:
            scores, ids = self.faiss_index.search(queries, n_docs)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
            raise UserError(f"{self.index_origin}: FAISS cannot search it ({reason}); build it again") from error
        if ids.size and not -1 <= ids.min() <= ids.max() < len(self.rows):
            wrong = ids[(ids < -1) | (ids >= len(self.rows))][0]
            raise UserError(
                f"{self.index_origin} is damaged: it finds passage {wrong}, but there are {len(self.rows)}; build it "
                "again"
            )
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
        assert self.embeddings is not None, "init_index comes first"
        return doc_ids, self.embeddings.gather(doc_ids)

    def get_doc_dicts(self, doc_ids) -> list[PassageDict]:
        """For each row of `doc_ids` a dict with every column of its passages, in the order of the ids.

        Titles and texts are read at once, all else on first use: embeddings as an array (n_docs, d) float32, of
        any other column a list.

        Args:
            doc_ids: (B, n_docs) whole numbers: an array, a tensor on any device, or lists.
        """
        return self.passage_rows.doc_dicts(id_lists(doc_ids), self.passage_rows.names)

    def description(self) -> dict:
        """What bears on a retrieval score and belongs beside it: kind, size, efSearch, nprobe, vectors' origin."""
        size = {"passages": len(self), "dimension": self.vector_size}
        if self.device_search is not None:
            return self.device_search.description() | size
        description = describe_search(self.faiss_index) | size
        if self.vectors_from == "index":
            description["vectors_from"] = "index"
        return description


def id_lists(doc_ids) -> list[list[int]]:
    """Ids (B, n_docs) as lists, whatever holds them; a tensor may lie on a GPU."""
    return doc_ids.tolist() if hasattr(doc_ids, "tolist") else [[int(doc_id) for doc_id in row] for row in doc_ids]
