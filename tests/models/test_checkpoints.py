"""Checkpoints come back exactly as they were saved, through `load_model` and through transformers alone."""

import copy
import json
import os
import shutil
import time

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartModel,
    BertConfig,
    BertModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RagSequenceForGeneration,
    RagTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from rag.errors import UserError
from rag.models import loading
from rag.models.checkpoints import MODEL_CLASSES, compose_rag, infer_model_type, load_model, load_tokenizer, save_model
from rag.models.encoders import encoder_dimension, load_encoder
from rag.models.pooled_encoder import PooledEncoder, PooledEncoderConfig, pool
from tests.conftest import DIMENSION, assert_equal_but_for_rounding, in_float64


def tiny_t5(tokenizer, **settings):
    torch.manual_seed(3)
    sizes = {"d_model": DIMENSION, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes | settings)
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture
def generators(bart, t5_tokenizer):
    untied = tiny_t5(t5_tokenizer, tie_word_embeddings=False)  # T5 1.1: an output layer of its own
    untied.lm_head.weight = torch.nn.Parameter(torch.randn_like(untied.lm_head.weight))
    untied.all_tied_weights_keys.pop("lm_head.weight")
    return {"bart": copy.deepcopy(bart), "t5": tiny_t5(t5_tokenizer), "t5 untied": untied}


@torch.no_grad()
def train_a_bit(model):
    """Change every weight, and the buffers that BART saves, so that nothing can be right by its initial value."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.05)
    if hasattr(model.generator, "final_logits_bias"):
        model.generator.final_logits_bias.normal_()


def assert_same_weights(model, other):
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, theirs[name])] == []


def contexts(vocabulary, n_docs=2):
    ids = torch.randint(5, vocabulary, (2 * n_docs, 6), generator=torch.Generator().manual_seed(0))
    return {
        "context_input_ids": ids,
        "context_attention_mask": torch.ones_like(ids),
        "doc_scores": torch.tensor([[1.0, 0.5]] * 2),
        "n_docs": n_docs,
    }


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
@pytest.mark.parametrize("kind", ["bart", "t5", "t5 untied"])
def test_what_was_trained_is_what_is_loaded(model_type, kind, generators, question_encoder, tmp_path):
    model = compose_rag(model_type, copy.deepcopy(question_encoder), generators[kind])
    train_a_bit(model)
    save_model(model, tmp_path / "rag")
    loaded = load_model(str(tmp_path / "rag"))
    assert type(loaded) is MODEL_CLASSES[model_type] and not loaded.training
    assert_same_weights(model, loaded)
    assert_same_weights(model, MODEL_CLASSES[model_type].from_pretrained(tmp_path / "rag"))
    shared = loaded.generator.get_input_embeddings().weight
    assert (loaded.generator.lm_head.weight is shared) == (kind != "t5 untied")
    inputs = contexts(model.config.generator.vocab_size)
    labels = torch.randint(5, 40, (2, 4))
    # In float64: how a product of float32 is rounded may depend on where in memory the weights lie.
    losses = [in_float64(copy.deepcopy(one))(**inputs, labels=labels).loss for one in (model, loaded)]
    assert_equal_but_for_rounding(*losses)
    # Once more, as a resumed and again saved run does.
    save_model(loaded, tmp_path / "again")
    assert_same_weights(model, load_model(str(tmp_path / "again")))


def test_composing_leaves_both_parts_as_they_are(generators, question_encoder):
    for generator in generators.values():
        before = copy.deepcopy(generator)
        model = compose_rag("rag_sequence", question_encoder, generator)
        assert model.generator is generator
        assert_same_weights(before, generator)
        assert model.config.retrieval_vector_size == DIMENSION
        assert model.config.decoder_start_token_id == generator.config.decoder_start_token_id
        assert model.config.eos_token_id == generator.config.eos_token_id


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
def test_generation_settings_survive(model_type, generators, question_encoder, tmp_path):
    settings = {"num_beams": 3, "forced_bos_token_id": 0, "length_penalty": 2.0, "decoder_start_token_id": 2}
    generators["bart"].generation_config.update(**settings)
    save_model(compose_rag(model_type, question_encoder, generators["bart"]), tmp_path / "rag")
    assert (tmp_path / "rag" / "generation_config.json").is_file()
    loaded = load_model(str(tmp_path / "rag"))
    assert loaded.generation_config is loaded.generator.generation_config
    for name, value in settings.items():
        assert getattr(loaded.generation_config, name) == value


def test_generation_settings_of_an_older_checkpoint(rag_sequence, tmp_path):
    rag_sequence.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["generator"] |= {"num_beams": 4, "forced_bos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert loaded.generator.generation_config.num_beams == 4
    assert loaded.generation_config.forced_bos_token_id == 0


@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_t5_of_unequal_depth_generates(decoder_layers, question_encoder, t5_tokenizer, tmp_path):
    """transformers alone: a deeper decoder overruns the cache, a shallower one breaks RAG-Token's beams."""
    t5 = tiny_t5(t5_tokenizer, num_layers=2, num_decoder_layers=decoder_layers)
    t5.save_pretrained(tmp_path / "t5")
    bare = load_model(str(tmp_path / "t5"))
    ids = torch.randint(5, 40, (3, 6))
    in_full = in_float64(copy.deepcopy(bare))  # where no two words tie
    with_cache, without = (
        in_full.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_length=8, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    for model_type in ("rag_sequence", "rag_token"):
        model = compose_rag(model_type, question_encoder, bare)
        save_model(model, tmp_path / model_type)
        loaded = in_float64(load_model(str(tmp_path / model_type)))
        loaded.config.n_docs = 2
        answers = loaded.generate(**contexts(bare.config.vocab_size), num_beams=2, max_length=8)
        loaded.generation_config.use_cache = False
        assert torch.equal(answers, loaded.generate(**contexts(bare.config.vocab_size), num_beams=2, max_length=8))


def test_overrides_go_where_the_setting_is(rag_sequence, t5_folder, tmp_path):
    rag_sequence.save_pretrained(tmp_path)
    overrides = {"dropout": 0.3, "n_docs": 7, "encoder_layerdrop": None}
    config = load_model(str(tmp_path), config_overrides=overrides).config
    assert (config.n_docs, config.generator.dropout) == (7, 0.3)
    assert load_model(str(t5_folder), config_overrides={"dropout": 0.3}).config.dropout_rate == 0.3
    with pytest.raises(UserError, match=r"--attention_dropout 0.1: a t5 model has no such setting"):
        load_model(str(t5_folder), config_overrides={"attention_dropout": 0.1})


def test_model_types_are_inferred(
    llama_folder, rag_sequence, rag_token, checkpoint, bart_folder, t5_folder, question_encoder_folder, tmp_path
):
    rag_sequence.save_pretrained(tmp_path / "sequence")
    rag_token.save_pretrained(tmp_path / "token")
    PegasusForConditionalGeneration(
        PegasusConfig(
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=32,
        )
    ).save_pretrained(tmp_path / "pegasus")
    folders = {
        "rag_sequence": tmp_path / "sequence",
        "rag_token": tmp_path / "token",
        "fid": checkpoint("fid"),
        "bart": bart_folder,
        "t5": t5_folder,
        "auto": tmp_path / "pegasus",
        "causal": llama_folder,
    }
    assert {name: infer_model_type(str(folder)) for name, folder in folders.items()} == {n: n for n in MODEL_CLASSES}
    assert type(load_model(str(tmp_path / "pegasus"))) is PegasusForConditionalGeneration
    with pytest.raises(UserError, match="neither RAG nor an encoder-decoder"):
        infer_model_type(str(question_encoder_folder))
    with pytest.raises(UserError, match=r"--model_type bart does not fit .* a RAG checkpoint"):
        load_model(str(tmp_path / "sequence"), "bart")
    with pytest.raises(UserError, match=r"--model_type rag_token does not fit .* a bart checkpoint"):
        load_model(str(bart_folder), "rag_token")
    # The same weights serve all RAG models.
    for model_type in ("rag_token", "fid"):
        loaded = load_model(str(tmp_path / "sequence"), model_type)
        assert type(loaded) is MODEL_CLASSES[model_type]
        assert_same_weights(rag_sequence, loaded)


def test_a_bart_without_its_own_head_is_whole(bart, tmp_path):
    """bart-base and bart-large are published as BartModel: tied output layer, no final_logits_bias."""
    BartModel(bart.config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.shared.weight
    assert not loaded.final_logits_bias.any()


def test_missing_and_unknown_weights_are_named(rag_sequence, tmp_path):
    weights = rag_sequence.state_dict()
    del weights["rag.generator.model.encoder.layers.0.fc1.bias"]
    weights["rag.generator.model.encoder.layers.9.fc1.bias"] = torch.zeros(4)
    rag_sequence.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path), flag="--rag_model_name")
    lacks, unknown = str(error.value).splitlines()
    assert (
        f"--rag_model_name {tmp_path} lacks 1 of RagSequenceForGeneration's weights" in lacks
        and "layers.0.fc1.bias" in lacks
    )
    assert "layers.9.fc1.bias" in unknown


def test_a_context_encoder_of_end_to_end_training_is_left_out(rag_sequence, tmp_path, caplog):
    weights = {**rag_sequence.state_dict(), "rag.ctx_encoder.ctx_encoder.bert_model.x.weight": torch.zeros(4)}
    rag_sequence.save_pretrained(tmp_path, state_dict=weights)
    assert_same_weights(rag_sequence, load_model(str(tmp_path)))
    assert "context encoder (rag.ctx_encoder.*) are left out" in caplog.text


def test_unreadable_checkpoints(rag_sequence, tmp_path, monkeypatch):
    rag_sequence.save_pretrained(tmp_path / "rag")
    os.truncate(tmp_path / "rag" / "model.safetensors", 1000)
    with pytest.raises(UserError, match=r"--model_name_or_path .*rag cannot be loaded: .*header"):
        load_model(str(tmp_path / "rag"))
    (tmp_path / "rag" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load_model(str(tmp_path / "rag"))
    with pytest.raises(UserError, match=r"missing is not a folder; give"):
        load_model(str(tmp_path / "missing"))
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    start = time.monotonic()
    with pytest.raises(UserError, match="--model_name_or_path nobody/nothing is not a folder, the model hub cannot"):
        load_model("nobody/nothing")
    assert time.monotonic() - start < 5  # transformers alone: half a minute of retries


def test_saving_is_whole_and_opens_with_its_tokenizers(rag_sequence, bert_tokenizer, bart_tokenizer, tmp_path):
    tokenizer = RagTokenizer(bert_tokenizer, bart_tokenizer)
    save_model(rag_sequence, tmp_path / "rag", tokenizer)
    assert {path.name for path in (tmp_path / "rag").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "question_encoder_tokenizer",
        "generator_tokenizer",
    }  # fmt: skip
    for loaded in (load_tokenizer(str(tmp_path / "rag")), RagTokenizer.from_pretrained(tmp_path / "rag")):
        assert loaded.question_encoder("paris").input_ids == bert_tokenizer("paris").input_ids
        assert loaded.generator("paris").input_ids == bart_tokenizer("paris").input_ids

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(rag_sequence, tmp_path / "other", Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["rag"]


# --- Encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(bert_tokenizer):
    torch.manual_seed(4)
    return BertModel(
        BertConfig(
            vocab_size=len(bert_tokenizer),
            hidden_size=DIMENSION,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
    ).eval()


@pytest.fixture
def sentence_transformer(bert, bert_tokenizer, tmp_path):
    """The layout of sentence-transformers: mean pooling, then normalized."""
    bert.save_pretrained(tmp_path)
    bert_tokenizer.save_pretrained(tmp_path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules])
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": DIMENSION, "pooling_mode_cls_token": False,
                    "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False})
    )  # fmt: skip
    return tmp_path


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 5.0], [3.0, -1.0], [100.0, 100.0]], [[-2.0, 0.0], [100.0, 100.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pool(hidden, mask, "cls").tolist() == [[1, 5], [-2, 0]]
    assert pool(hidden, mask, "mean").tolist() == [[2, 2], [-2, 0]]
    assert pool(hidden, mask, "max").tolist() == [[3, 5], [-2, 0]]


def test_an_encoder_pools_as_its_authors_meant_unless_told_otherwise(sentence_transformer, bert, bert_tokenizer):
    texts = ["paris is the capital", "rome"]
    batch = bert_tokenizer(texts, padding=True, return_tensors="pt")
    hidden = copy.deepcopy(bert).double()(**batch).last_hidden_state
    mean = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    expected = {"auto": torch.nn.functional.normalize(mean, dim=-1), "mean": mean, "cls": hidden[:, 0]}
    for pooling, vectors in expected.items():
        encoder = load_encoder(str(sentence_transformer), pooling=pooling).double()
        assert encoder_dimension(encoder) == DIMENSION
        assert_equal_but_for_rounding(encoder(**batch)[0], vectors)
    # A text's vector does not depend on what it is batched with.
    alone = encoder(**bert_tokenizer(texts[1:], return_tensors="pt"))[0]
    assert_equal_but_for_rounding(encoder(**batch)[0][1:], alone)
    # Without modules.json it is a plain BERT: its first token.
    (sentence_transformer / "modules.json").unlink()
    assert_equal_but_for_rounding(load_encoder(str(sentence_transformer)).double()(**batch)[0], hidden[:, 0])


def test_a_pooled_encoder_survives_in_a_rag_checkpoint(sentence_transformer, bart, bert_tokenizer, tmp_path):
    encoder = load_encoder(str(sentence_transformer))
    model = compose_rag("rag_sequence", encoder, bart)
    save_model(model, tmp_path / "rag", RagTokenizer(bert_tokenizer, bert_tokenizer))
    batch = bert_tokenizer(["paris is the capital"], return_tensors="pt")
    for loaded in (load_model(str(tmp_path / "rag")), RagSequenceForGeneration.from_pretrained(tmp_path / "rag")):
        assert_same_weights(model, loaded)
        assert isinstance(loaded.question_encoder, PooledEncoder)
        vectors = [copy.deepcopy(one).double()(**batch)[0] for one in (loaded.question_encoder, encoder)]
        assert_equal_but_for_rounding(*vectors)
    # Every weight gets a gradient: distributed training needs no search for unused ones.
    loaded.question_encoder(**batch)[0].sum().backward()
    assert [n for n, weight in loaded.question_encoder.named_parameters() if weight.grad is None] == []
    # And on its own, as a context encoder.
    encoder.save_pretrained(tmp_path / "encoder")
    assert_same_weights(encoder, load_encoder(str(tmp_path / "encoder"), role="context"))
    assert load_encoder(str(tmp_path / "encoder"), pooling="max").config.pooling == "max"


def test_pooled_encoder_config_keeps_its_backbone():
    config = PooledEncoderConfig(backbone=BertConfig(hidden_size=48), pooling="max", normalize=False)
    again = PooledEncoderConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.hidden_size, again.pooling, again.normalize) == (48, "max", False)
    assert isinstance(again.backbone, BertConfig)


def test_dpr_encoders_know_their_role(question_encoder_folder, context_encoder_folder, bart_folder):
    assert encoder_dimension(load_encoder(str(question_encoder_folder))) == DIMENSION
    assert encoder_dimension(load_encoder(str(context_encoder_folder), role="context")) == DIMENSION
    flag = "--dpr_ctx_encoder_model_name"
    with pytest.raises(UserError, match=f"{flag} .* is a DPRQuestionEncoder; give a DPRContextEncoder"):
        load_encoder(str(question_encoder_folder), role="context", flag=flag)
    with pytest.raises(UserError, match="is a DPR encoder"):
        load_encoder(str(question_encoder_folder), pooling="mean")
    with pytest.raises(UserError, match="is a bart model, not an encoder"):
        load_encoder(str(bart_folder))


def test_layers_that_cannot_be_read_are_refused(sentence_transformer):
    pooling = sentence_transformer / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_mean_sqrt_len_tokens": True}))
    with pytest.raises(UserError, match="only one of cls, mean, max, last"):
        load_encoder(str(sentence_transformer))
    modules = json.loads((sentence_transformer / "modules.json").read_text())
    modules.insert(2, {"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"})
    (sentence_transformer / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="Transformer, Pooling, LSTM, Normalize; only Pooling, Dense and Normalize can"):
        load_encoder(str(sentence_transformer))


def test_seq2seq_checkpoints_open_with_transformers_alone(bart, bart_tokenizer, tmp_path):
    save_model(bart, tmp_path / "bart", bart_tokenizer)
    assert_same_weights(bart, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bart"))
    assert load_tokenizer(str(tmp_path / "bart"))("paris").input_ids == bart_tokenizer("paris").input_ids


@pytest.mark.parametrize("kind", ["rag", "bart"])
def test_settings_without_effect_are_saved_again(request, checkpoint, tmp_path, kind):
    """transformers reads a penalty on length without beams, and refuses to write it."""
    folder = (
        checkpoint() if kind == "rag" else shutil.copytree(request.getfixturevalue("bart_folder"), tmp_path / "bart")
    )
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"length_penalty": 2.0, "top_k": 20}))
    save_model(load_model(str(folder)), tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (saved["length_penalty"], saved["top_k"]) == (2.0, 20)
    assert load_model(str(tmp_path / "again")).generation_config.length_penalty == 2.0
