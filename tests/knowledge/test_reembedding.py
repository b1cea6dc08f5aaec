"""Passages embedded anew by another encoder: the kind of the old index, what is there, killed processes."""

import shutil

import numpy as np
import pytest
import torch

from rag.index.index_files import read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge import reembedding
from rag.models.encoders import load_encoder
from tests.conftest import DIMENSION
from tests.knowledge.test_workers import Killer


def vectors_of(made) -> np.ndarray:
    index = KnowledgeIndex.load_from_disk(DIMENSION, made.passages_path, made.index_path)
    index.init_index()
    return index.embeddings.gather(np.arange(len(index)))


@pytest.fixture
def args(knowledge, context_encoder_folder, tmp_path):
    paths = knowledge["passages_path"], knowledge["index_path"]
    return reembedding.ReembeddingArguments(*paths, str(context_encoder_folder), str(tmp_path / "out"))


def test_an_index_of_an_unknown_origin_becomes_the_usual_kind(args, context_encoder_folder, tmp_path, capsys):
    made = reembedding.main(args)
    description = read_description(made.passages_path)
    assert (description.factory, description.passages, made.reused) == ("HNSW128,Flat", 8, False)
    assert "does not say of which kind it is: HNSW128,Flat is built" in capsys.readouterr().out
    assert reembedding.main(args).reused
    encoder = load_encoder(str(context_encoder_folder), "context")
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    other = shutil.copytree(context_encoder_folder, tmp_path / "other")
    encoder.save_pretrained(other)
    before = vectors_of(made)
    args.encoder = str(other)
    made = reembedding.main(args)
    assert not made.reused and not np.allclose(vectors_of(made), before)  # what was there made room


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("index.json", b"{"),
        ("index.json", None),
        ("my_knowledge_dataset/state.json", b"{"),
        ("my_knowledge_dataset/state.json", None),
        ("my_knowledge_dataset/data-00000-of-00001.arrow", b""),
        ("my_knowledge_dataset_hnsw_index.faiss", b"x"),
    ],
)
def test_what_is_damaged_is_made_again(file, content, args, tmp_path):
    expected = vectors_of(reembedding.main(args))
    path = tmp_path / "out" / file
    path.unlink() if content is None else path.write_bytes(content)
    made = reembedding.main(args)
    assert not made.reused
    np.testing.assert_array_equal(vectors_of(made), expected)


@pytest.mark.slow
def test_a_killed_process_costs_its_shards(args, tmp_path, capsys):
    expected = vectors_of(reembedding.main(args))
    args.output_dir, args.processes = str(tmp_path / "spread"), 2
    with Killer("spawn_main", 1) as killer:
        made = reembedding.main(args)
    assert len(killer.killed) == 1 and "processes that encode was killed" in capsys.readouterr().out
    np.testing.assert_allclose(vectors_of(made), expected, rtol=1e-4, atol=1e-4)
