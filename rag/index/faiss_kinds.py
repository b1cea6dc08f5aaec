"""Which kind of FAISS index lies behind shards and rotations, and what of it bears on a search.

    core_of(index)            # IndexHNSWFlat, behind an IndexPreTransform (OPQ, PCA) or IndexShards
    describe_search(index)    # {"kind": "IndexHNSWFlat", "ef_search": 16}

SWIG gives the class that a C++ function declares; `downcast_index` gives the object's own.
"""

import faiss
import numpy as np


def core_of(index):
    """The index behind a rotation (OPQ, PCA), by its own class; of shards, which are all of one kind, the first's."""
    if isinstance(index, faiss.IndexShards):
        index = index.at(0)
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def parts_of(index) -> list:
    """The indexes that one consists of; none of one that holds the vectors itself."""
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexShards, faiss.IndexReplicas)):
        return [index.at(number) for number in range(index.count())]
    if isinstance(index, faiss.IndexRefine):
        return [index.base_index, index.refine_index]
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexPreTransform)):
        return [index.index]
    return []


def transforms_of(index) -> list:
    """What an index does to vectors before it keeps them."""
    index = faiss.downcast_index(index)
    chain = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    return [] if chain is None else [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]


def view_of(numbers: np.ndarray):
    """A FAISS vector of uint8 or int32 that lies where the array lies, and does not own it."""
    kind = {1: faiss.MaybeOwnedVectorUInt8, 4: faiss.MaybeOwnedVectorInt32}[numbers.itemsize]
    return kind.create_view(faiss.cast_integer_to_void_ptr(numbers.ctypes.data), len(numbers), kind().owner)


def describe_search(index) -> dict:
    """Kind of index, number of shards where there are several, efSearch and nprobe where the kind has them."""
    core = core_of(index)
    description = {"kind": type(core).__name__}
    if isinstance(index, faiss.IndexShards):
        description["shards"] = index.count()
    graph = faiss.downcast_index(core.quantizer) if isinstance(core, faiss.IndexIVF) else core
    if hasattr(graph, "hnsw"):
        description["ef_search"] = graph.hnsw.efSearch
    if hasattr(core, "nprobe"):
        description["nprobe"] = core.nprobe
    return description
