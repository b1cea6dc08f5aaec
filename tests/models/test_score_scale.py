"""A question encoder's scale multiplies scores, so that p(z|x) tells passages apart; what is found stays the same."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from consolidate_rag_checkpoint import main, parse_args
from rag.errors import UserError
from rag.models.checkpoints import load_model, load_tokenizer
from rag.models.encoders import describe_encoder, load_encoder
from rag.models.packed_encoder import encode_packed
from rag.packing import Packing
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import DIMENSION, QUESTIONS, assert_equal_but_for_rounding


@pytest.fixture
def encoder_folder(bert_tokenizer, tmp_path):
    """A sentence-transformers folder: mean pooled and normalized."""
    folder = tmp_path / "encoder"
    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(3)
    BertModel(BertConfig(vocab_size=len(bert_tokenizer), initializer_range=0.5, **sizes)).save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def consolidate(encoder, bart_folder, dest, scale):
    words = ["--question_encoder_name_or_path", encoder, "--generator_name_or_path", bart_folder, "--dest", dest]
    return main(parse_args([str(word) for word in [*words, "--question_encoder_scale", scale]]))


def test_scores_are_scaled_and_the_ranking_is_the_same(encoder_folder, bart_folder, knowledge, tmp_path):
    """Also after the checkpoint was written and read again."""
    contexts = {}
    for scale in (1, 10):
        folder = str(consolidate(encoder_folder, bart_folder, tmp_path / f"rag{scale}", scale))
        model, tokenizer = load_model(folder, config_overrides=knowledge), load_tokenizer(folder)
        assert model.question_encoder.config.scale == scale
        assert ("scale 10" in describe_encoder(model.question_encoder)) is (scale == 10)
        retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
        tokens = tokenizer.question_encoder([question for question, _ in QUESTIONS], padding=True, return_tensors="pt")
        contexts[scale] = retrieve_contexts(model.rag, retriever, tokens["input_ids"], tokens["attention_mask"], 3)
    assert np.array_equal(contexts[1].doc_ids, contexts[10].doc_ids)
    assert_equal_but_for_rounding(contexts[10].doc_scores, 10 * contexts[1].doc_scores)


def test_a_packed_row_is_scaled_too(encoder_folder, bert_tokenizer):
    encoder = load_encoder(str(encoder_folder), scale=7.5)
    tokens = bert_tokenizer([QUESTIONS[0][0]], return_tensors="pt")
    ids = tokens["input_ids"]
    packed = encode_packed(encoder, ids[0], Packing(np.array([ids.shape[1]]), ids.device))
    for vectors in (packed, encoder(**tokens)[0]):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.tensor([7.5]))


def test_passages_are_never_scaled(encoder_folder, tmp_path):
    """Whichever folder the context encoder comes from."""
    load_encoder(str(encoder_folder), scale=10).save_pretrained(tmp_path / "saved")
    assert load_encoder(str(tmp_path / "saved")).config.scale == 10
    assert load_encoder(str(tmp_path / "saved"), scale=2).config.scale == 2
    assert load_encoder(str(tmp_path / "saved"), "context").config.scale == 1
    assert load_encoder(str(encoder_folder), "context", scale=10).config.scale == 1


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_is_none_is_refused(scale, encoder_folder, bart_folder, tmp_path):
    with pytest.raises(UserError, match=f"^--question_encoder_scale {scale} must be a number above 0"):
        consolidate(encoder_folder, bart_folder, tmp_path / "rag", scale)


def test_a_dpr_encoder_has_no_scale(question_encoder_folder, bart_folder, tmp_path):
    with pytest.raises(UserError, match="is a DPR encoder, whose scores are not scaled; leave the scale 10 out"):
        consolidate(question_encoder_folder, bart_folder, tmp_path / "rag", 10)
    assert consolidate(question_encoder_folder, bart_folder, tmp_path / "rag", 1)
