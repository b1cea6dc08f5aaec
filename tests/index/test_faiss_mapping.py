"""rag/index/faiss_mapping.py: the same index that FAISS reads, without reading it."""

import os
import re
from pathlib import Path

import faiss
import numpy as np
import pytest

from rag.index import faiss_mapping
from rag.index.faiss_mapping import map_index

ROWS, DIMENSION = 600, 16
METRICS = [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2]


@pytest.fixture
def random():
    return np.random.default_rng(0)


def written(path: Path, factory: str, metric: int, vectors: np.ndarray) -> Path:
    index = faiss.index_factory(vectors.shape[1], factory, metric)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


@pytest.fixture
def only_ours(monkeypatch):
    """FAISS may not open the file, only read what is in memory."""
    read_index = faiss.read_index

    def refuse(source, *flags):
        assert isinstance(source, faiss.VectorIOReader), "left to FAISS"
        return read_index(source, *flags)

    monkeypatch.setattr(faiss, "read_index", refuse)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["HNSW32,Flat", "HNSW8", "HNSW16,SQ8", "HNSW16,SQ4", "HNSW16,SQfp16"])
def test_an_hnsw_index_is_the_one_of_the_file_without_faiss_walking_over_it(
    factory, metric, random, tmp_path, only_ours
):
    vectors = random.standard_normal((ROWS, DIMENSION), dtype=np.float32)
    path = written(tmp_path / "index.faiss", factory, metric, vectors)
    index = map_index(path)
    assert faiss.serialize_index(index).tobytes() == path.read_bytes()
    read = faiss.deserialize_index(np.frombuffer(path.read_bytes(), dtype=np.uint8))
    for one in (index, read):
        faiss.ParameterSpace().set_index_parameter(one, "efSearch", 64)
    for ours, theirs in zip(index.search(vectors[:50], 7), read.search(vectors[:50], 7), strict=True):
        assert np.array_equal(ours, theirs)
    rows = np.arange(ROWS)
    assert np.array_equal(index.reconstruct_batch(rows), read.reconstruct_batch(rows))


def test_the_installed_faiss_is_one_that_was_tested():
    assert faiss.__version__ in faiss_mapping.TESTED_FAISS_VERSIONS


def test_every_index_of_another_faiss_is_opened_by_it(random, tmp_path, monkeypatch):
    vectors = random.standard_normal((ROWS, DIMENSION), dtype=np.float32)
    path = written(tmp_path / "index.faiss", "HNSW8,Flat", METRICS[0], vectors)
    expected = map_index(path).search(vectors[:20], 3)

    def refuse(path):
        raise AssertionError("its layout is not known")

    monkeypatch.setattr(faiss_mapping, "_map_hnsw", refuse)
    monkeypatch.setattr(faiss, "__version__", "1.16.0")
    for ours, theirs in zip(map_index(path).search(vectors[:20], 3), expected, strict=True):
        assert np.array_equal(ours, theirs)
    path.write_bytes(path.read_bytes()[:-1])
    for broken in (path, tmp_path / "none.faiss"):
        with pytest.raises(RuntimeError):
            map_index(broken)


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF8,Flat", "IVF8_HNSW8,Flat", "HNSW8,PQ4x4np", "PCA8,HNSW8,Flat", "IDMap,HNSW8", "SQ8"]
)
def test_any_other_index_is_opened_by_faiss(factory, random, tmp_path):
    vectors = random.standard_normal((ROWS, DIMENSION), dtype=np.float32)
    if factory.startswith("IDMap"):
        index = faiss.IndexIDMap(faiss.IndexHNSWFlat(DIMENSION, 8))
        index.add_with_ids(vectors, np.arange(ROWS) + 7)
        faiss.write_index(index, str(tmp_path / "index.faiss"))
    else:
        written(tmp_path / "index.faiss", factory, faiss.METRIC_L2, vectors)
    index = map_index(tmp_path / "index.faiss")
    expected = faiss.read_index(str(tmp_path / "index.faiss")).search(vectors[:20], 3)
    assert np.array_equal(index.search(vectors[:20], 3)[1], expected[1])


def test_an_empty_hnsw_index_and_another_metric_are_opened_by_faiss(random, tmp_path):
    faiss.write_index(faiss.IndexHNSWFlat(DIMENSION, 8), str(tmp_path / "empty.faiss"))
    assert map_index(tmp_path / "empty.faiss").ntotal == 0
    vectors = random.standard_normal((ROWS, DIMENSION), dtype=np.float32)
    path = written(tmp_path / "l1.faiss", "HNSW8", faiss.METRIC_L1, vectors)
    assert map_index(path).metric_type == faiss.METRIC_L1


@pytest.mark.parametrize("factory", ["HNSW8,Flat", "HNSW8,SQ8"])
def test_a_file_cut_anywhere_is_refused(factory, random, tmp_path):
    path = written(
        tmp_path / "index.faiss", factory, METRICS[0], random.standard_normal((50, DIMENSION), dtype=np.float32)
    )
    whole = path.read_bytes()
    for length in [*range(0, 200), *range(200, len(whole), 17), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(RuntimeError):
            map_index(path)


@pytest.mark.parametrize("part", ["levels", "offsets", "neighbors"])
def test_parts_that_do_not_fit_are_told_by_faiss(part, random, tmp_path):
    index = faiss.IndexHNSWFlat(DIMENSION, 8)
    index.add(random.standard_normal((50, DIMENSION), dtype=np.float32))
    numbers = getattr(index.hnsw, part)
    numbers.resize(numbers.size() - 1)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(RuntimeError, match="HNSW"):
        map_index(tmp_path / "index.faiss")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"none\.faiss"):
        map_index(tmp_path / "none.faiss")


def resident_share(path: Path) -> float:
    """How much of a mapped file the pages of this process hold."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    _, found = maps.split(f" {path}\n", 1)
    size, resident = (int(re.search(rf"^{name}: +(\d+) kB", found, re.MULTILINE)[1]) for name in ("Size", "Rss"))
    return resident / size


def test_what_is_mapped_is_not_read(random, tmp_path):
    path = written(
        tmp_path / "index.faiss", "HNSW64", METRICS[0], random.standard_normal((20000, 64), dtype=np.float32)
    )
    map_index(path.resolve())  # the first time its links are looked at
    index = map_index(path.resolve())
    assert resident_share(path.resolve()) < 0.15
    assert index.search(random.standard_normal((200, 64), dtype=np.float32), 5)[1].min() >= 0
    assert resident_share(path.resolve()) > 0.5


# --- Lists in a file of their own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["IVF2,Flat", "PCA4,IVF2,Flat"])
def test_lists_on_disk_are_beside_their_index_and_whole(tmp_path, build):
    vectors = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
    index = faiss.index_factory(8, build, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    inside = faiss.extract_index_ivf(index)
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "here" / "lists.ivfdata"
    lists = faiss.OnDiskInvertedLists(inside.nlist, inside.code_size, str(file))
    inside.replace_invlists(lists)
    index.add(vectors)
    for folder in ("here", "elsewhere"):
        faiss.write_index(index, str(tmp_path / folder / "x.faiss"))
    assert map_index(tmp_path / "here" / "x.faiss").ntotal == 80
    with pytest.raises(RuntimeError, match=r"its lists are in .*/here/lists.ivfdata; put that file beside it"):
        map_index(tmp_path / "elsewhere" / "x.faiss")
    (tmp_path / "short").write_bytes(file.read_bytes()[:100])
    os.replace(tmp_path / "short", file)
    with pytest.raises(RuntimeError, match="which ends before they do"):
        map_index(tmp_path / "here" / "x.faiss")
