"""What lies in the folder: kinds of index, documents added later, duplicates, and what a kill in between leaves."""

import itertools
import json
import os
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from datasets import load_from_disk

from rag.errors import UserError
from rag.index.build import EmbeddingFiles
from rag.index.index_files import read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge import folder as knowledge_folder
from rag.knowledge.embedding import PassageEmbedder
from rag.models.encoders import load_encoder
from tests.conftest import DIMENSION, LONG, PASSAGES
from tests.knowledge.test_use_own_knowledge_dataset import run
from use_own_knowledge_dataset import ENCODER_FLAG

MORE = [("bergen", "bergen lies on the sea"), ("oslo", LONG), ("turin", "turin is a large city and lies in italy")]


@pytest.fixture
def more_path(tmp_path):
    path = tmp_path / "more.tsv"
    path.write_text("".join(f"{title}\t{text}\n" for title, text in MORE))
    return path


def opened(knowledge) -> KnowledgeIndex:
    index = KnowledgeIndex.load_from_disk(DIMENSION, knowledge.passages_path, knowledge.index_path)
    index.init_index()
    return index


def contents(folder) -> dict:
    """All that is in a folder, but for times and speeds."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(".lock", None)  # who held it
    description = json.loads(files.pop("index.json"))
    for name in ("index_seconds", "recall"):
        description.pop(name, None)
    return files | {"index.json": description}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "my_knowledge_dataset_hnsw_index.faiss"),
        ({"--index_factory": "Flat"}, "my_knowledge_dataset_index.faiss"),
        ({"--index_factory": "HNSW8,SQ8", "--num_index_shards": 3}, "my_knowledge_dataset_index"),
        ({"--index_factory": "IVF2,Flat", "--half_precision": True}, "my_knowledge_dataset_index.faiss"),
    ],
)
def test_kinds_of_index(flags, tmp_path, capsys, settings, name):
    knowledge = run(flags, **settings, **{"--num_shards": 4})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "my_knowledge_dataset", name, "index.json", ".lock"
    }  # fmt: skip
    assert knowledge.index_path == str(tmp_path / "out" / name)
    assert len(list((tmp_path / "out" / "my_knowledge_dataset").glob("*.arrow"))) == 4
    index = opened(knowledge)
    vectors = index.embeddings.gather(np.arange(11))
    _, ids = index.search(vectors, 11)
    products = vectors @ vectors.T
    if "IVF" not in read_description(knowledge.index_path).factory:  # which looks into one of two lists
        np.testing.assert_allclose(
            np.take_along_axis(products, ids, axis=1), -np.sort(-products, axis=1), rtol=1e-2, atol=0.5
        )
    rows = read_description(knowledge.index_path).recall
    assert rows[-1]["recall"] >= 0.9 and rows[0]["queries_per_second"] > 0
    assert "of the 5 best for 11 pieces of 10 words it finds" in capsys.readouterr().out
    assert run(flags, **settings).reused


def test_another_kind_takes_the_place_of_the_first(flags, tmp_path, monkeypatch, capsys):
    run(flags, **{"--num_index_shards": 2})
    with pytest.raises(UserError, match="--index_factory IVF64,Flat learns 64 centroids"):
        run(flags, **{"--index_factory": "IVF64,Flat"})
    monkeypatch.setattr(PassageEmbedder, "embed_shards", lambda *_: pytest.fail("embedded again"))
    knowledge = run(flags, **{"--index_factory": "Flat"})
    assert not knowledge.reused and len(opened(knowledge)) == 11
    run(flags, **{"--recall_queries": 0})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "my_knowledge_dataset", "my_knowledge_dataset_hnsw_index.faiss", "index.json", ".lock"
    }  # fmt: skip
    assert read_description(tmp_path / "out" / "any").recall is None


def test_what_killed_runs_have_left_is_removed(flags, tmp_path):
    run(flags)
    abandoned = tmp_path / "out" / ".my_knowledge_dataset_index.faiss.0123"
    abandoned.mkdir()
    (abandoned / "rows-000000000000-000000000011.faiss.saved").write_bytes(b"of a Flat index")
    (tmp_path / "out" / ".my_knowledge_dataset_hnsw_index.faiss.0123.faiss.saved").write_bytes(b"of an --append")
    (tmp_path / "out" / ".my_knowledge_dataset_bm25.lock").touch()  # which a process may hold
    run(flags, **{"--m": 4})
    assert {path.name for path in (tmp_path / "out").glob(".*")} == {".my_knowledge_dataset_bm25.lock", ".lock"}


@pytest.mark.parametrize("shards", [1, 2])
def test_documents_are_added(flags, more_path, tmp_path, shards, capsys):
    first = run(flags, **{"--num_index_shards": shards})
    more = {"--csv_path": more_path, "--append": True}
    knowledge = run(flags, **more)
    assert (knowledge.documents, knowledge.passages, knowledge.reused) == (12, 16, False)
    assert (knowledge.passages_path, knowledge.index_path) == (first.passages_path, first.index_path)
    dataset = load_from_disk(knowledge.passages_path)
    assert dataset["title"] == [title for title, _ in PASSAGES] + ["oslo"] * 3 + ["bergen"] + ["oslo"] * 3 + ["turin"]
    index = opened(knowledge)
    assert index.num_shards == (1 if shards == 1 else 3)
    vectors = index.embeddings.gather(np.arange(16))
    np.testing.assert_array_equal(vectors, np.array(dataset["embeddings"], dtype=np.float32))
    scores, _ = index.search(vectors, 1)
    np.testing.assert_allclose(scores[:, 0], (vectors @ vectors.T).max(axis=1), rtol=1e-4)
    description = read_description(knowledge.index_path)
    assert [part.passages for part in description.parts] == [11, 5] and description.passages == 16
    # Neither command does anything again, and the first one does not undo the second.
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert run(flags, **more).reused
    assert "holds these documents already" in capsys.readouterr().out
    assert run(flags, **{"--num_index_shards": shards}).passages == 16
    assert contents(tmp_path / "out") == before
    # Another index is of all passages.
    knowledge = run(flags, **{"--index_factory": "Flat"})
    assert knowledge.passages == 16 and len(opened(knowledge)) == 16


def kill(monkeypatch, moment: str) -> None:
    """Make an --append end at some moment, as a kill would."""
    places = {
        "embedding": (PassageEmbedder, "_encode"),
        "indexing": (EmbeddingFiles, "blocks"),
        "before the dataset grows": (knowledge_folder, "publish"),
        "before index.json": (knowledge_folder.KnowledgeFolder, "_finish"),
    }
    owner, name = places.get(moment, (knowledge_folder, "publish"))
    original = getattr(owner, name)
    calls = itertools.count()

    def ends(*args, **kwargs):
        if moment == "before the index is replaced":
            original(*args, **kwargs)
        elif moment == "embedding" and next(calls) < 2:
            return original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, ends)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_killed_append_ends_in_the_same_files(flags, more_path, tmp_path, shards):
    flags |= {"--num_index_shards": shards, "--batch_size": 1, "--recall_queries": 0}
    run(flags)
    run(flags, **{"--output_dir": tmp_path / "uninterrupted"})
    more = {"--csv_path": more_path, "--append": True, "--num_shards": 3}
    run(flags, **more, **{"--output_dir": tmp_path / "uninterrupted"})
    built = contents(tmp_path / "out")
    moments = ["embedding", "indexing", "before the dataset grows", "before the index is replaced", "before index.json"]
    for moment in moments:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, moment)
            with pytest.raises(KeyboardInterrupt):
                run(flags, **more)
        if moment in moments[:3]:  # as if nothing had been added
            found = contents(tmp_path / "out")
            if moment == moments[2]:  # what is about to be replaced is compared with nothing any more
                assert "checksums" not in found["index.json"] or found["index.json"]["checksums"] == {}
                found["index.json"]["checksums"] = built["index.json"]["checksums"]
            assert {name: found[name] for name in built} == built
    run(flags, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_what_does_not_belong_there_is_not_added(flags, more_path, context_encoder_folder, bert_tokenizer, tmp_path):
    more = {"--csv_path": more_path, "--append": True}
    with pytest.raises(UserError, match=r"--append: --output_dir .*out holds no knowledge"):
        run(flags, **more)
    run(flags)
    encoder = load_encoder(str(context_encoder_folder), "context")
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.01)
    encoder.save_pretrained(tmp_path / "retrained")
    bert_tokenizer.save_pretrained(tmp_path / "retrained")
    before = contents(tmp_path / "out")
    other = {ENCODER_FLAG: tmp_path / "retrained", "--half_precision": True, "--index_factory": "Flat"}
    with pytest.raises(UserError) as error:
        run(flags, **more, **other)
    digest, stored, factory = str(error.value).splitlines()
    assert "have encoder_digest" in digest and "have embeddings float32, these would have float16" in stored
    assert "--index_factory Flat: --append adds to an index of kind HNSW8,Flat" in factory
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"index": "."}, "'.' is not beside it|its index.json cannot be read"),
        ({"index": "my_knowledge_dataset"}, "names the index 'my_knowledge_dataset', which no version has written"),
        ({"index": "x" * 5000}, "names the index 'x{80}', which"),
        ({"passages": 10**15}, "tells of 1,000,000,000,000,000 passages, but there are 11"),
        ({"passages": -5}, "tells of -5 passages, but there are 11"),
        ({"digest": "0"}, "was killed; run that command again first"),
    ],
)
def test_nothing_is_added_to_what_index_json_does_not_describe(flags, more_path, tmp_path, changed, message, words):
    if words:
        flags = {"--csv_path": flags["--csv_path"], "--output_dir": tmp_path / "out"}
    run(flags, **({"--index_factory": "bm25"} if words else {}))
    path = tmp_path / "out" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    before = contents(tmp_path / "out")
    for more in ({}, {"--drop_duplicates": True}):
        with pytest.raises(UserError, match=message):
            run(flags, **{"--csv_path": more_path, "--append": True}, **more)
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["garbage", "other dimension", "pipe", "folder"])
@pytest.mark.parametrize("has_checksums", [False, True])
def test_nothing_is_added_to_an_index_that_is_none(flags, more_path, tmp_path, capsys, kind, has_checksums):
    flags |= {"--recall_queries": 0}
    knowledge = run(flags)
    index, path = Path(knowledge.index_path), tmp_path / "out" / "index.json"
    if not has_checksums:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": {}}))
    index.unlink()
    if kind == "garbage":
        index.write_bytes(b"x" * 1000)
    elif kind == "other dimension":
        other = faiss.index_factory(4, "Flat", faiss.METRIC_INNER_PRODUCT)
        other.add(np.ones((11, 4), dtype=np.float32))
        faiss.write_index(other, str(index))
    else:
        os.mkfifo(index) if kind == "pipe" else index.mkdir()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=index.name):
        run(flags, **{"--csv_path": more_path, "--append": True})
    assert contents(tmp_path / "out") == before
    run(flags)  # the command that built it mends it
    assert len(opened(knowledge)) == 11


def test_the_kind_of_an_index_is_printable(flags, more_path, tmp_path, capsys):
    run(flags)
    path = tmp_path / "out" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factory": "\x1b[2J"}))
    capsys.readouterr()
    run(flags, **{"--csv_path": more_path, "--append": True, "--recall_queries": 3})
    assert "\\x1b[2J: " in (printed := capsys.readouterr().out) and "\x1b" not in printed


def test_duplicates_are_left_out_and_counted(flags, more_path, tmp_path, capsys):
    more_path.write_text(more_path.read_text() * 2)
    knowledge = run(flags, **{"--csv_path": more_path, "--drop_duplicates": True})
    assert "5 exact duplicates among them are left out" in capsys.readouterr().out
    titles = load_from_disk(knowledge.passages_path)["title"]
    assert titles == ["bergen", "oslo", "oslo", "oslo", "turin"] and knowledge.passages == 5
    knowledge = run(flags, **{"--append": True, "--drop_duplicates": True})
    assert "3 exact duplicates among them are left out" in capsys.readouterr().out
    dataset = load_from_disk(knowledge.passages_path)
    assert len(dataset) == 13 == len(set(zip(dataset["title"], dataset["text"], strict=True)))
    assert len(opened(knowledge)) == 13
    more_path.write_text("bergen\tbergen lies on the sea\n")
    assert run(flags, **{"--csv_path": more_path, "--append": True, "--drop_duplicates": True}).reused


def test_a_run_that_was_killed_while_it_measured_the_index_is_completed(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(knowledge_folder, "report_recall", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(flags)
    assert read_description(tmp_path / "out" / "any").recall is None
    assert run(flags).reused
    assert read_description(tmp_path / "out" / "any").recall[-1]["recall"] >= 0.9
