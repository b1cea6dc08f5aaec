"""Passages are encoded in the precision that their folder was begun in; in another one no passage is added to them."""

import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk

import rag.models.precision as machine
from rag.errors import UserError
from rag.index.index_files import DocumentsPart, IndexDescription, read_description, write_description
from rag.knowledge import shards
from rag.knowledge.embedding import PassageEmbedder
from rag.knowledge.precision import machine_precision, precision_problems, settle_precision
from rag.knowledge.workers import EncoderPlan, _embedder
from rag.models import encoders
from rag.models.checkpoints import weights_digest
from rag.models.encoders import load_encoder
from tests.knowledge.test_folder import contents
from tests.knowledge.test_use_own_knowledge_dataset import run

BFLOAT16 = {"--precision": "bf16"}


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    """A machine without them; `matrix_units(True)` gives it some."""

    def have(units: bool) -> None:
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: units)

    have(False)
    return have


@pytest.fixture
def settings(flags, monkeypatch):
    monkeypatch.setattr(shards, "PASSAGES_PER_SHARD", 4)
    return flags | {"--recall_queries": 0}


def precision_of(folder) -> str:
    return read_description(folder / "any").precision


def vectors_of(knowledge) -> np.ndarray:
    return np.array(load_from_disk(knowledge.passages_path)["embeddings"], dtype=np.float32)


def kill_after(monkeypatch, batches: int) -> None:
    encode, calls = PassageEmbedder._encode, []

    def killed(self, batch):
        calls.append(batch)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(PassageEmbedder, "_encode", killed)


def test_the_machine_decides_where_nothing_is_begun(settings, tmp_path, matrix_units, capsys):
    run(settings)
    assert precision_of(tmp_path / "out") == "float32"
    matrix_units(True)
    fast = settings | {"--output_dir": tmp_path / "fast"}
    knowledge = run(fast)
    assert precision_of(tmp_path / "fast") == "bfloat16"
    assert "Passages are encoded in bfloat16" in capsys.readouterr().out
    # A weight and each of some twenty sums on a value's way is rounded to 8 bits.
    exact = vectors_of(run(settings))
    found = vectors_of(knowledge)
    assert 0 < np.abs(found - exact).max() < 20 * 2**-9 * np.abs(exact).max()
    run(settings | {"--output_dir": tmp_path / "exact"}, **{"--precision": "fp32"})
    assert precision_of(tmp_path / "exact") == "float32"
    assert machine_precision("auto", "cuda") == torch.float16


def test_a_killed_run_goes_on_in_its_precision(settings, tmp_path, matrix_units, monkeypatch):
    whole = settings | {"--output_dir": tmp_path / "whole"}
    run(whole, **BFLOAT16)
    matrix_units(True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 2)
        run(settings)
    matrix_units(False)
    with pytest.raises(UserError, match=r"--precision fp32: the passages in --output_dir .*out were begun in bfloat16"):
        run(settings, **{"--precision": "fp32"})
    run(settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_documents_are_added_in_the_precision_of_the_first(settings, tmp_path, matrix_units):
    run(settings)
    matrix_units(True)
    (tmp_path / "more.tsv").write_text("bergen\tbergen lies on the sea\n")
    more = {"--csv_path": tmp_path / "more.tsv", "--append": True}
    with pytest.raises(UserError, match=r"--precision bf16: the passages in --output_dir .*out were begun in float32"):
        run(settings, **more, **BFLOAT16)
    knowledge = run(settings, **more)
    assert knowledge.passages == 12 and precision_of(tmp_path / "out") == "float32"
    alone = {"--output_dir": tmp_path / "alone", "--csv_path": tmp_path / "more.tsv", "--precision": "fp32"}
    np.testing.assert_array_equal(vectors_of(knowledge)[-1:], vectors_of(run(settings, **alone)))


def test_a_damaged_shard_is_mended_in_its_precision(settings, tmp_path, matrix_units):
    run(settings, **BFLOAT16)
    out = tmp_path / "out"
    whole = contents(out)
    (out / "my_knowledge_dataset" / "data-00001-of-00003.arrow").unlink()
    run(settings)
    assert contents(out) == whole
    # The same vectors take another index, and are known again where index.json is lost.
    assert run(settings, **{"--index_factory": "Flat"}).passages == 11
    (out / "index.json").unlink()
    run(settings)
    assert contents(out) == whole


def test_float16_is_for_gpus(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "load_encoder", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="--precision fp16: on a CPU it is several times slower than fp32"):
        run(settings, **{"--precision": "fp16"})
    assert precision_problems("fp16", "cuda", tmp_path) == precision_problems("auto", "cpu", tmp_path) == []


def test_what_a_gpu_began_a_cpu_goes_on_with(tmp_path, capsys):
    part = DocumentsPart("documents.csv", "0", False, 1, 1)
    write_description(tmp_path, IndexDescription(precision="float16", parts=[part]))
    for asked in ("auto", "fp16"):
        assert precision_problems(asked, "cpu", tmp_path) == []
        assert settle_precision(asked, "cpu", tmp_path, IndexDescription()) == torch.float16
    assert "was begun in float16, which is slow on a CPU" in capsys.readouterr().out
    assert [problem.split(":")[0] for problem in precision_problems("bf16", "cuda", tmp_path)] == ["--precision bf16"]
    # An index.json of another origin says nothing that is known.
    description = json.loads((tmp_path / "index.json").read_text()) | {"precision": "int7"}
    (tmp_path / "index.json").write_text(json.dumps(description))
    assert settle_precision("auto", "cpu", tmp_path, IndexDescription()) == torch.float32


def test_workers_take_the_precision_they_are_told(context_encoder_folder, matrix_units):
    digest = weights_digest(load_encoder(str(context_encoder_folder), "context"))
    for units, precision in ((True, torch.float32), (False, torch.bfloat16)):
        matrix_units(units)
        plan = EncoderPlan(str(context_encoder_folder), "auto", digest, None, "cpu", precision, tokens_per_batch=50)
        embedder = _embedder.__wrapped__(plan)
        assert {weight.dtype for weight in embedder.encoder.parameters()} == {precision}
        assert (embedder.batch_size, embedder.tokens_per_batch) == (None, 50)
        assert all(found.dtype == np.float32 for _, found in embedder([("oslo", "a city")]))
