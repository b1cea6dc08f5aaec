"""FAISS files, mapped instead of read: opened at once, however large.

    index = map_index("my_knowledge_dataset_hnsw_index.faiss")

FAISS maps vectors and links by itself, but it walks over all links of an HNSW graph first, to see that each is in
range: for Wikipedia 20 GB that come from the disk. So an HNSW index of whole or scalar-quantized vectors is put
together here: FAISS reads a copy of the file's head that says the index is empty, the 12 bytes that are kept for each
vector beside its links are copied, and links and vectors are views into the mapped file. A file of any other kind, or
of which the parts do not fit, is left to FAISS, and so is every file where FAISS is of a version with which this was
not tested.

That the links stay within the graph is looked at when the file is opened for the first time, as FAISS would follow any
of them; that it was is kept in the user's cache as long as the file is not written to (rag/checksums.py).
"""

import os
import struct
from pathlib import Path

import faiss
import numpy as np

from rag.checksums import found_once
from rag.index.faiss_checks import links_problem
from rag.index.faiss_kinds import parts_of, view_of

# FAISS may change its file's layout, or its vectors' views, at any release: a longer list needs `make test` with each.
TESTED_FAISS_VERSIONS = ("1.15.1",)

HEADER = struct.Struct("<4siqqq?i")  # kind, dimension, vectors, two unused, is_trained, metric
GRAPH = struct.Struct("<5i")  # entry_point, max_level, efConstruction, efSearch, one unused
QUANTIZER = struct.Struct("<iifQQ")  # qtype, rangestat, its argument, dimension, bytes of a vector
NOTHING = struct.pack("<Q", 0)  # how many numbers an empty vector holds
GRAPHS = (b"IHNf", b"IHNs")
PLAIN, QUANTIZED = (b"IxFI", b"IxF2"), b"IxSQ"


def map_index(path: str | os.PathLike):
    """The FAISS index of a file, to be searched, not changed; the file must stay as it is meanwhile.

    Raises:
        RuntimeError: it is not a whole FAISS index.
    """
    index = _map_hnsw(path) if faiss.__version__ in TESTED_FAISS_VERSIONS else None
    if index is None:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if problem := _elsewhere_problem(index, Path(path)):
            raise RuntimeError(problem)
    return index


def _elsewhere_problem(index, path: Path) -> str | None:
    """Why the lists of an IVF index, which FAISS has mapped, cannot be read, where they are in a file of their own."""
    index = faiss.downcast_index(index)
    lists = faiss.downcast_InvertedLists(index.invlists) if isinstance(index, faiss.IndexIVF) else None
    if isinstance(lists, faiss.OnDiskInvertedLists):
        file = Path(os.path.realpath(lists.filename))
        if file.parent != Path(os.path.realpath(path)).parent:
            return f"its lists are in {file}; put that file beside it and write the index there again"
        if not file.is_file() or file.stat().st_size < lists.totsize:
            return f"its lists are in {file}, which ends before they do"
    return next(filter(None, (_elsewhere_problem(part, path) for part in parts_of(index))), None)


class _MappedFile:
    """The bytes of a file, taken one part after the other."""

    def __init__(self, path):
        try:
            self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # not there, or empty
            raise RuntimeError(f"{path}: {error}") from error
        self.at = 0

    def take(self, size: int) -> np.ndarray:
        if size > len(self.bytes) - self.at:
            raise RuntimeError(f"it ends after {len(self.bytes):,} bytes, before what it says it holds")
        self.at += size
        return self.bytes[self.at - size : self.at]

    def unpack(self, form: struct.Struct) -> tuple:
        return form.unpack(self.take(form.size).tobytes())

    def vector(self, dtype: str) -> np.ndarray:
        """Numbers that lie behind their count."""
        count = int(self.take(8).view("<u8")[0])
        return self.take(count * np.dtype(dtype).itemsize).view(dtype)

    def since(self, start: int) -> bytes:
        return self.bytes[start : self.at].tobytes()


def _map_hnsw(path):
    """The index of a file in the format that faiss/impl/index_write.cpp gives an HNSW graph; None of another kind."""
    file = _MappedFile(path)
    header = file.unpack(HEADER)
    kind, _, size, *_, metric = header
    if kind not in GRAPHS or metric not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        return None
    start = file.at
    file.vector("<f8")  # probability of each level
    first_of_level = file.vector("<i4")
    shape = file.since(start)
    levels, offsets, links = file.vector("<i4"), file.vector("<u8"), file.vector("<i4")
    entry_point, max_level, *effort = file.unpack(GRAPH)

    storage_header = file.unpack(HEADER)
    start = file.at
    if storage_header[0] == QUANTIZED:
        file.unpack(QUANTIZER), file.vector("<f4")
    elif storage_header[0] not in PLAIN:
        return None
    quantizer = file.since(start)
    file.take(8)  # the size of what comes last: the vectors

    image = [
        _emptied(header), shape, NOTHING, struct.pack("<QQ", 1, 0), NOTHING, GRAPH.pack(-1, -1, *effort),
        _emptied(storage_header), quantizer, NOTHING,
    ]  # fmt: skip
    index = faiss.deserialize_index(np.frombuffer(b"".join(image), dtype=np.uint8))
    storage = faiss.downcast_index(index.storage)
    codes = file.take(size * storage.code_size)
    whole = (
        size == storage_header[2] == len(levels) == len(offsets) - 1
        and offsets[-1] == len(links)
        and 0 <= entry_point < size
        and levels[entry_point] == max_level + 1
        and file.at == len(file.bytes)
    )
    if not whole:
        return None
    graph = (levels, offsets, links, first_of_level, entry_point, max_level)
    if problem := found_once(path, "links", lambda: links_problem(*graph)):
        raise RuntimeError(problem)
    index.ntotal = storage.ntotal = size
    index.hnsw.entry_point, index.hnsw.max_level = entry_point, max_level
    faiss.copy_array_to_vector(levels, index.hnsw.levels)
    faiss.copy_array_to_vector(offsets, index.hnsw.offsets)
    index.hnsw.neighbors = view_of(links)
    storage.codes = view_of(codes)
    index.referenced_objects = [file.bytes]  # is unmapped with the index, not before
    return index


def _emptied(header: tuple) -> bytes:
    kind, dimension, _, *rest = header
    return HEADER.pack(kind, dimension, 0, *rest)
