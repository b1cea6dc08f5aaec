"""Every kind of index is built of files of embeddings, whole or in shards, the same after a kill, and measured."""

import re
import shutil
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from rag.files import read_lines
from rag.index import build as index_build
from rag.index.build import EmbeddingFiles, IndexPlan, build_index, extend_index
from rag.index.index_files import shard_files
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.recall import exact_scores, measure_efforts, recall
from rag.knowledge.shards import shards_of
from tests.conftest import assert_equal_but_for_rounding

D, COUNT = 16, 1000


@pytest.fixture(scope="module")
def passages_path(tmp_path_factory):
    """A thousand passages around thirty centers, in seven Arrow files."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((30, D))[random.integers(30, size=COUNT)] + 0.5 * random.standard_normal(
        (COUNT, D)
    )
    features = Features(
        {"title": Value("string"), "text": Value("string"), "embeddings": List(Value("float32"), length=D)}
    )
    rows = {
        "title": [str(i) for i in range(COUNT)],
        "text": [""] * COUNT,
        "embeddings": list(vectors.astype(np.float32)),
    }
    folder = tmp_path_factory.mktemp("knowledge") / "passages"
    Dataset.from_dict(rows, features=features).save_to_disk(folder, num_shards=7)
    return folder


@pytest.fixture
def vectors(passages_path):
    return EmbeddingFiles(shards_of(passages_path), D)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((20, D)).astype(np.float32)


def everything(vectors) -> np.ndarray:
    return vectors.gather(np.arange(COUNT))


def test_embeddings_are_read_a_file_at_a_time(vectors):
    whole = everything(vectors)
    assert whole.shape == (COUNT, D) and len(vectors.paths) == 7
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(size=50))), whole)
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(rows=range(140, 441)))), whole[140:441])
    np.testing.assert_array_equal(vectors.gather(np.array([3, 142, 143, 999])), whole[[3, 142, 143, 999]])


@pytest.mark.parametrize(
    ("factory", "kind", "least"),
    [
        ("Flat", "IndexFlatIP", 1.0),
        ("HNSW16,Flat", "IndexHNSWFlat", 0.95),
        ("HNSW16,SQ8", "IndexHNSWSQ", 0.9),
        ("IVF8,Flat", "IndexIVFFlat", 1.0),
        ("IVF8,PQ4x4np", "IndexIVFPQ", 0.2),
        ("OPQ4_8,IVF8,PQ4x4", "IndexIVFPQ", 0.2),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_kinds(vectors, passages_path, queries, tmp_path, factory, kind, least, shards):
    plan = IndexPlan(factory, D, shards, train_sample=500)
    assert plan.problems(COUNT) == []
    path = tmp_path / "index"
    build_index(vectors, plan, path, "digest")
    assert list(tmp_path.iterdir()) == [path] and path.is_dir() == (shards > 1)
    best = exact_scores(vectors, queries, 5)
    rows = measure_efforts(
        lambda **effort: KnowledgeIndex.load_from_disk(D, passages_path, path, **effort), queries, best
    )
    assert rows[-1]["recall"] >= least and all(row["queries_per_second"] > 0 for row in rows)
    shares = [row["recall"] for row in rows]
    assert shares == sorted(set(shares))  # measuring ends where more effort finds no more
    index = KnowledgeIndex.load_from_disk(D, passages_path, path)
    index.init_index()
    assert index.description()["kind"] == kind


def test_exact_scores_and_recall(vectors, queries):
    whole = everything(vectors)
    products = queries @ whole.T
    order = np.argsort(-products, axis=1)
    best = exact_scores(vectors, queries, 5)
    assert_equal_but_for_rounding(best, np.take_along_axis(products, order[:, :5], axis=1))
    assert recall(queries, whole[order[:, :5]], best) == 1
    assert recall(queries, whole[order[:, 2:7]], best) == pytest.approx(0.6)
    # Another passage with the same vector counts as well; a slot without one does not.
    assert recall(queries, np.zeros((20, 5, D), dtype=np.float32), best) == 0


def killed_at(monkeypatch, block: int) -> None:
    """Make the reading of vectors fail at the block of this number."""
    blocks = EmbeddingFiles.blocks
    seen = []

    def broken(self, *args, **kwargs):
        for one in blocks(self, *args, **kwargs):
            seen.append(len(one))
            if len(seen) > block:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(EmbeddingFiles, "blocks", broken)


@pytest.mark.parametrize("factory", ["HNSW16,Flat", "PCA8,IVF8,PQ4x4np"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_run_ends_in_the_same_files(vectors, tmp_path, monkeypatch, factory, shards):
    plan = IndexPlan(factory, D, shards, train_sample=500)
    build_index(vectors, plan, tmp_path / "whole", "digest")
    with monkeypatch.context() as patch:
        killed_at(patch, block=5)
        with pytest.raises(KeyboardInterrupt):
            build_index(vectors, plan, tmp_path / "index", "digest")
    (partial,) = tmp_path.glob(".index*")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("rows-*.faiss")}
    assert len(kept) == (1 if shards > 1 else 0) and not (tmp_path / "index").exists()
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "_train", lambda *_: pytest.fail("trained again"))
        build_index(vectors, plan, tmp_path / "index", "digest")
    if shards == 1:
        assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes()
        return
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names[0] == "rows-000000000000-000000000333.faiss" and len(names) == 3
    for name in names:
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {name: (tmp_path / "index" / name).stat().st_mtime_ns for name in kept} == kept


def save_every_block(monkeypatch) -> None:
    monkeypatch.setattr(index_build, "SAVE_AFTER", 0)
    monkeypatch.setattr(index_build, "SAVES_COST", 0)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16,Flat", "PCA8,HNSW16,SQ8", "PCA8,IVF8,PQ4x4np"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("block", [1, 5])
def test_what_a_killed_run_has_saved_is_not_added_again(vectors, tmp_path, monkeypatch, factory, shards, block):
    plan = IndexPlan(factory, D, shards, train_sample=500)
    build_index(vectors, plan, tmp_path / "whole", "digest")
    save_every_block(monkeypatch)
    with monkeypatch.context() as patch:
        killed_at(patch, block)
        with pytest.raises(KeyboardInterrupt):
            build_index(vectors, plan, tmp_path / "index", "digest")
    (saved,) = tmp_path.glob(".index.digest/*.saved")
    assert len(read_lines(saved.with_name(f"{saved.name}.xxh3"))) <= 2  # of the file, and of the one that it replaced
    half = saved.with_name(f"{saved.name}.1.part")
    half.write_bytes(b"half-written")
    read, blocks = [], EmbeddingFiles.blocks

    def counted(self, *args, **kwargs):
        for one in blocks(self, *args, **kwargs):
            assert not half.exists()  # nobody runs out of disk for it
            read.append(len(one))
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingFiles, "blocks", counted)
        build_index(vectors, plan, tmp_path / "index", "digest")
    assert len(read) == (7 if shards == 1 else 8) - block  # the fourth file is of both shards
    whole, index = (sorted([path, *path.glob("*")]) for path in (tmp_path / "whole", tmp_path / "index"))
    assert len(whole) == len(index) == (1 if shards == 1 else 3)
    for one, other in zip(whole, index, strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "index", tmp_path / "whole"]


@pytest.mark.parametrize("name", ["*.saved", "trained.faiss", "rows-000000000000-*.faiss", "*.xxh3"])
def test_what_was_saved_and_then_damaged_is_made_again(vectors, tmp_path, monkeypatch, name):
    plan = IndexPlan("IVF8,PQ4x4np", D, 2, train_sample=500)
    build_index(vectors, plan, tmp_path / "whole", "digest")
    save_every_block(monkeypatch)
    with monkeypatch.context() as patch:
        killed_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            build_index(vectors, plan, tmp_path / "index", "digest")
    found = sorted((tmp_path / ".index.digest").glob(name))
    assert found
    for path in found:
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    build_index(vectors, plan, tmp_path / "index", "digest")
    whole, index = (sorted(path.iterdir()) for path in (tmp_path / "whole", tmp_path / "index"))
    assert [path.name for path in index] == [path.name for path in whole]
    assert [path.read_bytes() for path in index] == [path.read_bytes() for path in whole]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_killed_extension_goes_on_where_it_was_saved(vectors, tmp_path, monkeypatch, shards):
    first = EmbeddingFiles(vectors.paths[:2], D)
    path = tmp_path / "index"
    build_index(first, IndexPlan("HNSW16,Flat", D, shards), path, "digest")
    expected = extend_index(path, vectors, len(first), "at once").read_bytes()
    save_every_block(monkeypatch)
    with monkeypatch.context() as patch:
        killed_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            extend_index(path, vectors, len(first), "more")
    (saved,) = tmp_path.glob(".*.saved")
    added = len(EmbeddingFiles(vectors.paths[2:5], D))
    assert faiss.read_index(str(saved)).ntotal == added + (len(first) if shards == 1 else 0)
    assert extend_index(path, vectors, len(first), "more").read_bytes() == expected
    assert not list(tmp_path.glob(".*.saved"))


def test_nothing_is_saved_where_the_disk_has_no_room_for_both(vectors, tmp_path, monkeypatch):
    save_every_block(monkeypatch)
    room = 4 * D * (COUNT + 300)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    written, write = [], index_build.write_faiss_index

    def recorded(index, path):
        written.append(index.ntotal)
        write(index, path)

    monkeypatch.setattr(index_build, "write_faiss_index", recorded)
    build_index(vectors, IndexPlan("Flat", D), tmp_path / "index", "digest")
    assert written == [0, 143, 286, COUNT]  # as trained, saved twice, and the end


@pytest.mark.parametrize("factory", ["HNSW16,Flat", "IVF8,PQ4x4np"])
def test_vectors_are_added_to_what_is_there(vectors, tmp_path, factory):
    first = EmbeddingFiles(vectors.paths[:3], D)
    known = len(first)
    for shards in (1, 2):
        path = tmp_path / str(shards)
        build_index(first, IndexPlan(factory, D, shards, train_sample=200), path, "digest")
        before = {file: file.stat().st_mtime_ns for file in [path, *path.glob("*")]}
        staged = extend_index(path, vectors, known, "more")
        assert {file: file.stat().st_mtime_ns for file in before} == before
        index = faiss.read_index(str(staged))
        assert index.ntotal == (COUNT if shards == 1 else COUNT - known)
        # As if added in the first place.
        trained = faiss.read_index(str(shard_files(path)[0][0] if shards > 1 else path))
        if shards > 1:
            trained.reset()
        for block in vectors.blocks(rows=range(known, COUNT)):
            trained.add(block)
        assert faiss.serialize_index(index).tobytes() == faiss.serialize_index(trained).tobytes()
        time = staged.stat().st_mtime_ns
        assert extend_index(path, vectors, known, "more").stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        ("nonsense", {}, "--index_factory nonsense: FAISS adds no vectors of dimension 16 to it"),
        ("IVF8,PQ5", {}, r"dimension of the vector \(d\) should be a multiple"),
        ("IDMap,Flat", {}, "--index_factory IDMap,Flat: FAISS adds no vectors"),
        ("HNSW16,PQ4", {}, "--index_factory HNSW16,PQ4: FAISS ranks it by distance, RAG by inner product"),
        ("IVF2000,Flat", {}, r"learns 2000 centroids, .* \(there are 1000\)"),
        ("IVF8,PQ4", {"train_sample": 100}, "learns 256 centroids"),
        ("HNSW0", {}, "--index_factory HNSW0: its numbers must be from 1 to"),
        ("IVF4_HNSW1,Flat", {}, "a vector has from 2 to 1,024 links"),
        ("HNSW1000000,Flat", {}, "a vector has from 2 to 1,024 links"),
        ("NSG0", {}, "its numbers must be"),
        ("PQ4x0", {}, "its numbers must be"),
        ("RR0,Flat", {}, "its numbers must be"),
        ("HNSW99999999999999999999", {}, "its numbers must be"),
        ("IVF0,Flat", {}, "its numbers must be"),
        ("HNSW-5", {}, "could not parse"),
        ("", {}, "could not parse"),
        (" Flat", {}, "a kind is written without blanks"),
        ("Flat\x00", {}, "a kind is written without blanks"),
        ("Flat" * 500, {}, "it is 2000 characters long"),
        ("PCA64,Flat", {}, "PCA makes fewer dimensions of 16, not 64"),
        ("OPQ4_16,Flat", {"train_sample": 100}, "learns 256 centroids"),
        ("RQ2x8", {"train_sample": 100}, "learns 256 centroids"),
        ("IVF16777216,Flat", {}, "learns 16777216 centroids"),
        ("IDMap2,IVF4,Flat", {}, "it has ids of its own"),
        ("IVF4,FlatDedup", {}, "equal passages would share one number"),
        ("L2norm,Flat", {}, "FAISS ranks it by cosine"),
        ("Flat", {"shards": 1001}, "--num_index_shards 1001, but there are only 1000 passages"),
    ],
)
def test_what_cannot_be_built_is_told_before_it_is_tried(factory, settings, message):
    (problem,) = IndexPlan(factory, D, **settings).problems(COUNT)
    assert re.search(message, problem)
    assert "\n" not in problem and len(problem) < 500


@pytest.mark.parametrize(
    "factory",
    ["Flat", "HNSW2", "HNSW8,SQ8", "IVF8,PQ4x4fs", "IVF8_HNSW8,Flat", "OPQ4_8,IVF8,PQ4", "PCA8,HNSW8,Flat", "RQ2x4",
     "SQfp16", "SQbf16", "RR16,Flat", "IVF8,PQ4,RFlat", "RR32,Flat", "IVF8,RaBitQ"],
)  # fmt: skip
def test_what_can_be_built_is_not_refused(factory):
    assert IndexPlan(factory, D).problems(COUNT) == []


def test_plans():
    assert IndexPlan("Flat", D).bytes_a_vector() == 4 * D
    assert IndexPlan("HNSW8,Flat", D).bytes_a_vector() == 4 * D + 8 * 8
    assert IndexPlan("HNSW8,SQ8", D).bytes_a_vector() == D + 8 * 8
    assert IndexPlan("OPQ4_8,IVF8,PQ4", D).bytes_a_vector() == 4 + 1 + 8  # code, its list, its id
    assert IndexPlan("IVF4096,PQ4", D).sample_size(10**6) == 50 * 4096
    assert IndexPlan("IVF8,PQ4", D).sample_size(10**6) == 65_536
    assert IndexPlan("IVF8,PQ4", D).sample_size(500) == 500
    assert IndexPlan("IVF8,PQ4", D, train_sample=300).sample_size(500) == 300
    assert IndexPlan("Flat", D, shards=3).spans(10) == [(0, 3), (3, 6), (6, 10)]
