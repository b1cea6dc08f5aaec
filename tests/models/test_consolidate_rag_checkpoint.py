"""Two parts in, one RAG checkpoint out: the same weights, settings and tokenizers, or nothing."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DPRQuestionEncoder,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    RagTokenizer,
)

import consolidate_rag_checkpoint
from consolidate_rag_checkpoint import main, parse_args
from rag.errors import UserError
from rag.models import checkpoints, loading
from rag.models.checkpoints import load_model
from rag.models.fid_rag import RagFidForGeneration
from tests.conftest import DIMENSION, ROOT, assert_equal_but_for_rounding


def consolidate(generator, question_encoder, dest, *more):
    flags = {"--generator_name_or_path": generator, "--question_encoder_name_or_path": question_encoder, "--dest": dest}
    return main(parse_args([str(word) for flag in flags.items() for word in flag] + [str(word) for word in more]))


@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_checkpoint_holds_the_very_parts(
    model_class, kind, bart_folder, t5_folder, bart, t5, question_encoder, question_encoder_folder, tmp_path
):
    folder, generator = {"bart": (bart_folder, bart), "t5": (t5_folder, t5)}[kind]
    model_type = {RagSequenceForGeneration: "rag_sequence", RagTokenForGeneration: "rag_token"}[model_class]
    dest = consolidate(folder, question_encoder_folder, tmp_path / "rag", "--model_type", model_type)
    assert {path.name for path in dest.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "question_encoder_tokenizer",
        "generator_tokenizer", "README.md",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["rag"]
    loaded = model_class.from_pretrained(dest)
    for part, original in ((loaded.question_encoder, question_encoder), (loaded.generator, generator)):
        weights = original.state_dict()
        assert part.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in part.state_dict().items())
    config = loaded.config
    assert config.retrieval_vector_size == DIMENSION
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "vocab_size"):
        assert getattr(config, name) == getattr(generator.config, name, None)
    # transformers' own loss, which for T5 asks for a bos_token_id.
    ids = torch.randint(5, 40, (4, 6))
    contexts = {"context_input_ids": ids, "context_attention_mask": torch.ones_like(ids), "n_docs": 2}
    loss = loaded(**contexts, doc_scores=torch.zeros(2, 2), labels=torch.randint(5, 40, (2, 4))).loss
    assert loss.isfinite().all()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_fusion_in_decoder_holds_the_very_parts(kind, question_encoder_folder, question_encoder, request, tmp_path):
    """Under the names of transformers' RAG models, which open it, too."""
    folder, generator = request.getfixturevalue(f"{kind}_folder"), request.getfixturevalue(kind)
    dest = consolidate(folder, question_encoder_folder, tmp_path / "rag", "--model_type", "fid")
    assert json.loads((dest / "config.json").read_text())["architectures"] == ["RagFidForGeneration"]
    assert "# Fusion-in-Decoder of" in (dest / "README.md").read_text()
    loaded, theirs = load_model(str(dest)), RagSequenceForGeneration.from_pretrained(dest)
    assert type(loaded) is RagFidForGeneration
    for part, original in ((loaded.question_encoder, question_encoder), (loaded.generator, generator)):
        assert all(torch.equal(weight, part.state_dict()[name]) for name, weight in original.state_dict().items())
    weights = theirs.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


def test_a_fusion_in_decoder_takes_few_generators(llama_folder, question_encoder_folder, tmp_path):
    with pytest.raises(UserError, match="--model_type fid takes a generator of bart, t5, mt5, not of llama"):
        consolidate(llama_folder, question_encoder_folder, tmp_path / "rag", "--model_type", "fid")
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_and_tokenizers_come_along(bart, bart_tokenizer, question_encoder_folder, tmp_path):
    generator = BartForConditionalGeneration(bart.config)
    generator.generation_config.update(num_beams=4, forced_bos_token_id=0, no_repeat_ngram_size=3)
    generator.save_pretrained(tmp_path / "generator")
    bart_tokenizer.save_pretrained(tmp_path / "tokenizer")
    dest = consolidate(
        tmp_path / "generator", question_encoder_folder, tmp_path / "rag",
        "--generator_tokenizer_name_or_path", tmp_path / "tokenizer",
    )  # fmt: skip
    settings = load_model(str(dest)).generator.generation_config
    assert (settings.num_beams, settings.forced_bos_token_id, settings.no_repeat_ngram_size) == (4, 0, 3)
    assert RagTokenizer.from_pretrained(dest).generator("paris").input_ids == bart_tokenizer("paris").input_ids


def test_settings_of_another_checkpoint_are_taken_but_not_its_parts(bart_folder, question_encoder_folder, tmp_path):
    RagConfig(n_docs=9, title_sep=" | ", index_name="exact", bos_token_id=77).save_pretrained(tmp_path / "config")
    dest = consolidate(
        bart_folder, question_encoder_folder, tmp_path / "rag", "--config_name_or_path", tmp_path / "config"
    )
    config = load_model(str(dest)).config
    assert (config.n_docs, config.title_sep, config.index_name) == (9, " | ", "exact")
    assert config.generator.d_model == config.question_encoder.hidden_size == DIMENSION
    assert (config.retrieval_vector_size, config.bos_token_id) == (DIMENSION, 0)


def test_pooling_can_be_chosen(bart_folder, question_encoder_folder, bert_tokenizer, tmp_path):
    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    bert_tokenizer.save_pretrained(tmp_path / "bert")
    dest = consolidate(bart_folder, tmp_path / "bert", tmp_path / "rag", "--question_encoder_pooling", "mean")
    batch = bert_tokenizer(["paris is the capital"], return_tensors="pt")
    vector = load_model(str(dest)).question_encoder.double()(**batch)[0]
    assert_equal_but_for_rounding(vector, bert.double()(**batch).last_hidden_state.mean(1))


def test_a_taken_folder_is_left_alone(bart_folder, question_encoder_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--dest .* already exists; give the name of a new folder or remove it"):
        consolidate(bart_folder, question_encoder_folder, tmp_path)
    (tmp_path / "empty").mkdir()
    assert consolidate(bart_folder, question_encoder_folder, tmp_path / "empty") == tmp_path / "empty"


def test_faults_of_both_parts_are_told_at_once(question_encoder_folder, bart_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    with pytest.raises(UserError) as error:
        consolidate("facebook/bart-large", tmp_path / "missing", tmp_path / "rag")
    generator, encoder = str(error.value).splitlines()
    assert "--generator_name_or_path facebook/bart-large" in generator
    assert "--question_encoder_name_or_path" in encoder and "is not a folder" in encoder
    with pytest.raises(UserError, match="neither RAG nor an encoder-decoder"):
        consolidate(question_encoder_folder, question_encoder_folder, tmp_path / "rag")
    whole = consolidate(bart_folder, question_encoder_folder, tmp_path / "whole")
    with pytest.raises(UserError, match="is a whole RAG checkpoint; give a bare generator"):
        consolidate(whole, question_encoder_folder, tmp_path / "rag")
    with pytest.raises(UserError, match=r"--config_name_or_path .* is the config of a bart model"):
        consolidate(bart_folder, question_encoder_folder, tmp_path / "rag", "--config_name_or_path", bart_folder)


def test_a_tokenizer_of_another_model_is_refused(bart, t5_tokenizer, question_encoder_folder, tmp_path):
    bart.save_pretrained(tmp_path / "bart")
    t5_tokenizer = copy.deepcopy(t5_tokenizer)
    t5_tokenizer.add_tokens([f"extra{i}" for i in range(50)])
    t5_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"--generator_tokenizer_name_or_path .*: the tokenizer has \d+ tokens"):
        consolidate(
            tmp_path / "bart", question_encoder_folder, tmp_path / "rag",
            "--generator_tokenizer_name_or_path", tmp_path / "tokenizer",
        )  # fmt: skip
    with pytest.raises(UserError, match=r"--generator_name_or_path .* cannot be loaded: it holds no tokenizer"):
        consolidate(tmp_path / "bart", question_encoder_folder, tmp_path / "rag")
    assert not (tmp_path / "rag").exists()


def test_nothing_is_left_where_the_reload_differs(bart_folder, question_encoder_folder, tmp_path, monkeypatch):
    digests = iter(["question encoder", "generator", "question encoder", "another generator"])
    monkeypatch.setattr(checkpoints, "weights_digest", lambda model: next(digests))
    with pytest.raises(AssertionError, match="the reload changed weights"):
        consolidate(bart_folder, question_encoder_folder, tmp_path / "rag")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_parts_become_float32(bart, question_encoder, bart_tokenizer, bert_tokenizer, tmp_path):
    for name, model, tokenizer in (("g", bart, bart_tokenizer), ("q", question_encoder, bert_tokenizer)):
        type(model)(copy.deepcopy(model.config)).half().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    dest = consolidate(tmp_path / "g", tmp_path / "q", tmp_path / "rag")
    for loaded in (load_model(str(dest)), RagSequenceForGeneration.from_pretrained(dest)):
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert isinstance(load_model(str(dest)).question_encoder, DPRQuestionEncoder)


def test_the_command_line(bart_folder, question_encoder_folder, tmp_path):
    """The public suite's own command, dashes and all; mistakes end with a line and status 2."""
    command = [sys.executable, "consolidate_rag_checkpoint.py", "--question_encoder_name_or_path"]
    command += [question_encoder_folder, "--dest", tmp_path / "rag", "--generator-name-or-path"]
    done = subprocess.run([*command, bart_folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the reload gives the same" in done.stdout and "16-d" in done.stdout
    assert json.loads((tmp_path / "rag" / "config.json").read_text())["architectures"] == ["RagSequenceForGeneration"]
    again = subprocess.run([*command, bart_folder], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "Traceback" not in again.stderr and "--dest" in again.stderr


def test_other_code_gives_the_settings_in_the_public_order(bart_folder, question_encoder_folder, tmp_path):
    dest = tmp_path / "rag"
    dest.mkdir()  # as the public suite does first
    parts = (str(bart_folder), str(question_encoder_folder))
    assert consolidate_rag_checkpoint.consolidate("rag_token", *parts, dest, None, *parts) == dest
    assert type(load_model(str(dest))).__name__ == "RagTokenForGeneration"
