"""From a file of documents to an answered question, through the script's own main."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from transformers import RagSequenceForGeneration, RagTokenizer

from consolidate_rag_checkpoint import main as consolidate
from consolidate_rag_checkpoint import parse_args as parse_consolidate
from rag.errors import UserError
from rag.index.index_files import IndexDescription, read_description, write_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.sources import open_index
from rag.knowledge import shards
from rag.knowledge.embedding import PassageEmbedder
from rag.knowledge.folder import A_FILE, SMALL_FILES
from rag.knowledge.passages import survey_documents
from rag.models import encoders, loading
from rag.models.checkpoints import compose_rag, load_model, load_tokenizer, save_model
from rag.models.encoders import load_encoder
from tests.conftest import DIMENSION, PASSAGES, QUESTIONS, ROOT, assert_equal_but_for_rounding
from use_own_knowledge_dataset import ENCODER_FLAG, build_and_go_on, parse_args
from use_own_knowledge_dataset import main as build_knowledge


@pytest.fixture
def rag_folder(question_encoder, bart, bert_tokenizer, bart_tokenizer, tmp_path):
    model = compose_rag("rag_sequence", question_encoder, bart)
    model.config.max_combined_length, model.config.n_docs = 48, 3
    save_model(model, tmp_path / "rag", RagTokenizer(bert_tokenizer, bart_tokenizer))
    return tmp_path / "rag"


def arguments(flags):
    return parse_args([str(word) for flag in flags.items() for word in flag])


def run(flags, **more):
    return build_knowledge(arguments(flags | more))


def times(folder):
    """When each file was written; the lock is written by every run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock" and path.is_file()}


def test_passages_index_and_description(flags, tmp_path, capsys):
    knowledge = run(flags)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "my_knowledge_dataset", "my_knowledge_dataset_hnsw_index.faiss", "index.json", ".lock"
    }  # fmt: skip
    assert (knowledge.documents, knowledge.passages, knowledge.dimension, knowledge.reused) == (9, 11, DIMENSION, False)
    dataset = load_from_disk(knowledge.passages_path)
    assert dataset["title"] == [title for title, _ in PASSAGES] + ["oslo"] * 3
    assert [len(text.split()) for text in dataset["text"]][-3:] == [100, 100, 10]
    index = faiss.read_index(knowledge.index_path)
    assert (index.ntotal, index.d, index.metric_type) == (11, DIMENSION, faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_array_equal(index.reconstruct_n(0, 11), np.array(dataset["embeddings"], dtype=np.float32))
    description = read_description(knowledge.index_path)
    expected = {
        "dimension": DIMENSION,
        "passages": 11,
        "pooling": "cls",
        "metric": "inner product",
        "factory": "HNSW8,Flat",
    }
    assert expected.items() <= asdict(description).items()
    assert set(description.versions) == {"torch", "transformers", "datasets", "faiss-cpu"}
    assert "Next: " not in capsys.readouterr().out
    build_and_go_on(arguments(flags))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{out} holds this knowledge already and is reused",
        f"Next: python finetune_rag.py --index_name custom --passages_path {out}/my_knowledge_dataset "
        f"--index_path {out}/my_knowledge_dataset_hnsw_index.faiss ...",
    ]
    # The printed flags open it.
    opened = KnowledgeIndex.load_from_disk(DIMENSION, knowledge.passages_path, knowledge.index_path)
    opened.init_index()


def test_a_passage_is_found_by_its_own_vector(flags, context_encoder_folder, bert_tokenizer):
    knowledge = run(flags)
    index = faiss.read_index(knowledge.index_path)
    encoder = load_encoder(str(context_encoder_folder), "context").double()
    for row, (title, text) in enumerate(PASSAGES):
        with torch.no_grad():
            vector = encoder(**bert_tokenizer(title, text, return_tensors="pt"))[0].float().numpy()
        scores, _ = index.search(vector, 11)
        assert_equal_but_for_rounding(index.reconstruct(row), vector[0])
        assert scores[0, 0] >= vector[0] @ vector[0] - 1e-3


def test_a_second_run_reuses_the_first(flags, tmp_path, capsys, monkeypatch):
    run(flags)
    capsys.readouterr()
    before = times(tmp_path / "out")
    monkeypatch.setattr(PassageEmbedder, "embed_shards", lambda *_: pytest.fail("embedded again"))
    assert run(flags, **{"--batch_size": 3}).reused
    assert "holds this knowledge already and is reused" in capsys.readouterr().out
    assert times(tmp_path / "out") == before
    # Another m needs another index, of the same vectors.
    knowledge = run(flags, **{"--m": 4})
    assert not knowledge.reused and read_description(knowledge.index_path).factory == "HNSW4,Flat"
    # A lost or half-made index is made again.
    (tmp_path / "out" / "index.json").unlink()
    assert not run(flags, **{"--m": 4}).reused


def test_other_documents_or_another_encoder_are_never_mixed_in(
    flags, csv_path, context_encoder_folder, bert_tokenizer, tmp_path
):
    run(flags)
    before = times(tmp_path / "out")
    # The same name, other weights.
    retrained = tmp_path / "retrained"
    encoder = load_encoder(str(context_encoder_folder), "context")
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.01)
    encoder.save_pretrained(retrained)
    bert_tokenizer.save_pretrained(retrained)
    with pytest.raises(UserError, match="holds knowledge of other documents, another encoder or other settings"):
        run(flags, **{ENCODER_FLAG: retrained})
    csv_path.write_text(csv_path.read_text() + "bergen\tbergen lies on the sea\n")
    with pytest.raises(UserError, match=r"--output_dir .*out holds knowledge"):
        run(flags)
    assert times(tmp_path / "out") == before


def test_a_killed_run_leaves_nothing_that_looks_whole_and_goes_on(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "PASSAGES_PER_SHARD", 4)
    encode, calls = PassageEmbedder._encode, []

    def killed(self, batch):
        calls.append(len(batch.rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(PassageEmbedder, "_encode", killed)
    flags |= {"--recall_queries": 0}
    with pytest.raises(KeyboardInterrupt):
        run(flags)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    knowledge = run(flags)
    assert "8 of 11 passages were embedded by an earlier run and are kept" in capsys.readouterr().out
    assert sum(calls[3:]) == 3 and knowledge.passages == 11
    assert len(load_from_disk(knowledge.passages_path)) == 11


@pytest.mark.parametrize("model_class", ["rag_sequence", "rag_token"])
def test_one_question_is_answered(flags, rag_folder, model_class, capsys):
    load_and_save = load_model(str(rag_folder), model_class)
    save_model(load_and_save, rag_folder, load_tokenizer(str(rag_folder)))
    question, _ = QUESTIONS[0]
    knowledge = run(flags, **{"--rag_model_name": rag_folder, "--question": question})
    printed = capsys.readouterr().out
    assert f"Question: {question}" in printed and f"Answer: {knowledge.answer}" in printed
    passages = printed.split("Question: ")[1].splitlines()[1:-1]
    assert len(passages) == 3
    scores = [float(line.split()[0]) for line in passages]
    assert scores == sorted(scores, reverse=True)


def test_no_question_without_a_checkpoint_or_a_question(flags, rag_folder, monkeypatch, capsys, tmp_path):
    assert run(flags, **{"--rag_model_name": rag_folder}).answer is None
    assert "No question is asked: --question was not given" in capsys.readouterr().out
    assert run(flags, **{"--question": "who"}).answer is None
    assert "No question is asked: --rag_model_name was not given" in capsys.readouterr().out
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    start = time.monotonic()
    for name in ("facebook/rag-sequence-nq", tmp_path / "missing"):
        assert run(flags, **{"--rag_model_name": name, "--question": "who"}).answer is None
        printed = capsys.readouterr().out
        assert f"--question will not be asked: --rag_model_name {name} is not a folder" in printed
    assert time.monotonic() - start < 10


def test_faults_are_found_before_any_model_is_loaded(flags, csv_path, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "load_encoder", lambda *_, **__: pytest.fail("loaded"))
    csv_path.write_text("a\tb\nno tab\n\n")
    with pytest.raises(UserError) as error:
        run(flags)
    assert [line.split(" line ")[1][:1] for line in str(error.value).splitlines()] == ["2", "3"]
    with pytest.raises(UserError) as error:
        run(flags, **{"--csv_path": tmp_path / "none.csv", "--m": 0, "--batch_size": 0, "--num_proc": 0, "--d": -1})
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "--csv_path", "--num_proc", "--batch_size", "--d", "--m"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.glob("out/*")] in ([], [".lock"])


def test_dimensions_must_fit(flags, rag_folder, question_encoder_folder):
    assert run(flags, **{"--d": DIMENSION}).dimension == DIMENSION
    config = json.loads((rag_folder / "config.json").read_text()) | {"retrieval_vector_size": 99}
    config["question_encoder"]["hidden_size"] = 99
    (rag_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        run(flags, **{"--d": 768, "--rag_model_name": rag_folder})
    own, theirs = str(error.value).splitlines()
    assert "--d 768" in own and "gives 16 dimensions; leave --d out" in own
    assert "asks with 99" in theirs
    with pytest.raises(UserError, match=f"{ENCODER_FLAG} .* is a DPRQuestionEncoder"):
        run(flags, **{ENCODER_FLAG: question_encoder_folder})
    with pytest.raises(UserError, match="is a dpr model; give a RAG checkpoint"):
        run(flags, **{"--rag_model_name": question_encoder_folder})


def test_too_small_a_disk_or_memory_is_told_in_bytes(flags, monkeypatch, tmp_path):
    import psutil

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50))
    size = survey_documents(tmp_path / "documents.csv").text_bytes
    with pytest.raises(UserError) as error:
        run(flags)
    disk, memory = str(error.value).splitlines()
    assert (
        f"{11 * (4 * 16 + 4 * 16 + 8 * 8) + size + SMALL_FILES + 3 * A_FILE:,} bytes are needed and 100 are free"
        in disk
    )
    assert f"takes {11 * (4 * 16 + 8 * 8):,} bytes of memory while it is built and 50 are free" in memory
    assert [path.name for path in tmp_path.glob("out/*")] in ([], [".lock"])


def test_encoders_that_were_not_trained_together_are_warned_of(rag_folder, knowledge, tmp_path, caplog):
    config = load_model(str(rag_folder)).config
    encoder = "facebook/dpr-ctx_encoder-multiset-base"
    description = IndexDescription(encoder=encoder, pooling="cls", normalize=False)
    question_encoder = config.question_encoder
    (warning,) = description.encoder_mismatches(question_encoder, "facebook/dpr-question_encoder-single-nq-base")
    assert "of the multiset pair" in warning and "facebook/dpr-ctx_encoder-single-nq-base" in warning
    assert description.encoder_mismatches(question_encoder) == []
    assert IndexDescription().encoder_mismatches(question_encoder) == []
    question_encoder._name_or_path = "facebook/dpr-question_encoder-multiset-base"
    assert description.encoder_mismatches(question_encoder) == []
    (warning,) = replace(description, pooling="mean").encoder_mismatches(question_encoder)
    assert warning.startswith("passages are pooled by {'pooling': 'mean'")
    # Whoever opens the index is told.
    folder = shutil.copytree(Path(knowledge["index_path"]).parent, tmp_path / "copy")
    write_description(folder, replace(description, normalize=True))
    config.index_name, config.passages_path, config.index_path = (
        "custom", str(folder / "my_knowledge_dataset"), str(folder / Path(knowledge["index_path"]).name)
    )  # fmt: skip
    open_index(config)
    assert f"--index_path {config.index_path}: passages are pooled by" in caplog.text


def test_pooling_as_the_authors_meant_and_its_mismatch(tmp_path, csv_path, flags, bart_folder, bert_tokenizer, capsys):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(bert_tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    bert_tokenizer.save_pretrained(tmp_path / "bert")
    words = ["--generator_name_or_path", bart_folder, "--question_encoder_name_or_path", tmp_path / "bert"]
    words += ["--question_encoder_pooling", "mean", "--dest", tmp_path / "mean_rag"]
    rag = consolidate(parse_consolidate(list(map(str, words))))
    own = {ENCODER_FLAG: tmp_path / "bert", "--rag_model_name": rag}
    knowledge = run(flags, **own, **{"--ctx_encoder_pooling": "mean"})
    assert read_description(knowledge.index_path).pooling == "mean"
    assert "Warning" not in capsys.readouterr().out
    run(flags | {"--output_dir": tmp_path / "cls"}, **own)
    assert "Warning: passages are pooled by {'pooling': 'cls'" in capsys.readouterr().out


def test_the_command_line(flags, tmp_path):
    command = [sys.executable, "use_own_knowledge_dataset.py", *(str(word) for flag in flags.items() for word in flag)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Embedding: 11 passages in" in done.stderr and "passages/s" in done.stderr
    (tmp_path / "documents.csv").write_text("no tab\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "line 1: has no tab" in done.stderr


def test_what_transformers_alone_makes_of_it(flags, rag_folder, bert_tokenizer):
    """Its own retriever opens the passages and the index."""
    from transformers import RagRetriever

    knowledge = run(flags)
    model = RagSequenceForGeneration.from_pretrained(rag_folder)
    retriever = RagRetriever.from_pretrained(
        rag_folder, index_name="custom", passages_path=knowledge.passages_path, index_path=knowledge.index_path
    )
    with torch.no_grad():
        vectors = model.question_encoder(**bert_tokenizer(QUESTIONS[0][0], return_tensors="pt"))[0]
    _, ids, docs = retriever.retrieve(vectors.numpy(), n_docs=2)
    assert ids.shape == (1, 2) and docs[0]["title"][0] in dict(PASSAGES)


@pytest.mark.parametrize("name", ["~", "~/x", "file:x", "a*[b]?"])
def test_a_folder_whose_name_datasets_would_read_otherwise(name, flags, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert run(flags | {"--output_dir": name}).passages == 11
    assert (tmp_path / "here" / name / "my_knowledge_dataset" / "dataset_info.json").is_file()
    with pytest.raises(UserError, match="--output_dir a::b: datasets cannot read a path with '::'"):
        run(flags | {"--output_dir": "a::b"})
