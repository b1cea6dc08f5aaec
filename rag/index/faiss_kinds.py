"""Which kind of FAISS index lies behind shards and rotations, and what of it bears on a search.

    core_of(index)            # IndexHNSWFlat, behind an IndexPreTransform (OPQ, PCA) or IndexShards
    describe_search(index)    # {"kind": "IndexHNSWFlat", "ef_search": 16}

SWIG gives the class that a C++ function declares; `downcast_index` gives the object's own.
"""

import faiss


def core_of(index):
    """The index behind a rotation (OPQ, PCA), by its own class; of shards, which are all of one kind, the first's."""
    if isinstance(index, faiss.IndexShards):
        index = index.at(0)
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


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
