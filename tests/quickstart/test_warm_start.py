"""The warm start copies a BERT exactly: checked on tiny random BERTs of several shapes."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModel, BartForConditionalGeneration, BertConfig, BertModel, DPRQuestionEncoder

from quickstart.warm_start import (
    bart_from_bert,
    copied_layers,
    dpr_context_encoder_from_bert,
    dpr_question_encoder_from_bert,
)
from tests.conftest import assert_equal_but_for_rounding

SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 24}


@pytest.fixture(scope="module", params=[(16, 120), (24, 130)], ids=str)
def bert(request):
    torch.manual_seed(0)
    hidden_size, vocab_size = request.param
    model = BertModel(BertConfig(**SHAPE, hidden_size=hidden_size, vocab_size=vocab_size, pad_token_id=3)).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("embeddings."):  # trained weights are larger, and a swap of ones and zeros goes unseen
            torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
    return model


@pytest.fixture
def batch():
    input_ids = torch.randint(4, 100, (3, 11), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 3), "attention_mask": attention_mask}


def test_bart_encoder_computes_what_bert_computes(bert, batch):
    encoder = bart_from_bert(bert).model.encoder.double()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = deepcopy(bert).double()(**batch).last_hidden_state[real]
        torch.testing.assert_close(encoder(**batch).last_hidden_state[real], expected, atol=1e-3, rtol=0)
        # Most of that comes of BART's LayerNorms, which add more to the variance.
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = bert.config.layer_norm_eps
        # The embeddings of positions and token type were added up in float32.
        torch.testing.assert_close(encoder(**batch).last_hidden_state[real], expected, atol=1e-6, rtol=0)


def test_decoder_starts_from_berts_layers(bert):
    bart = bart_from_bert(bert, decoder_layers=3)
    for layer, source in zip(bart.model.decoder.layers, copied_layers(4, 3), strict=True):
        attention = bert.encoder.layer[source].attention.self
        for copy in (layer.self_attn, layer.encoder_attn):
            for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
                assert torch.equal(getattr(copy, ours).weight, getattr(attention, theirs).weight)
                assert torch.equal(getattr(copy, ours).bias, getattr(attention, theirs).bias)
        assert torch.equal(layer.fc2.weight, bert.encoder.layer[source].output.dense.weight)


@pytest.mark.parametrize(
    ("layers", "of", "copied"), [(3, 6, [0, 2, 5]), (1, 6, [5]), (6, 6, [0, 1, 2, 3, 4, 5]), (3, 12, [0, 5, 11])]
)
def test_copied_layers_are_spread_and_end_with_the_last(layers, of, copied):
    assert copied_layers(of, layers) == copied


def test_bart_shares_embeddings_and_special_ids(bert, tmp_path):
    bart_from_bert(bert, cls_token_id=5, sep_token_id=6).save_pretrained(tmp_path)
    bart = BartForConditionalGeneration.from_pretrained(tmp_path)
    assert bart.lm_head.weight is bart.model.shared.weight
    assert bart.model.decoder.embed_tokens.weight is bart.model.shared.weight
    assert torch.equal(bart.lm_head.weight, bert.embeddings.word_embeddings.weight)
    for ids in (bart.config, bart.generation_config):
        assert (ids.decoder_start_token_id, ids.bos_token_id) == (5, 5)
        assert (ids.eos_token_id, ids.forced_eos_token_id, ids.pad_token_id) == (6, 6, 3)


def test_bart_answers_and_learns(bert, batch):
    bart = bart_from_bert(bert)
    assert bart.generate(**batch, max_length=6, num_beams=2).shape[0] == 3
    bart(**batch, labels=batch["input_ids"]).loss.backward()
    assert bart.model.decoder.layers[0].encoder_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("convert", [dpr_question_encoder_from_bert, dpr_context_encoder_from_bert])
def test_dpr_vector_is_berts_first_token(convert, bert, batch, tmp_path):
    convert(bert).save_pretrained(tmp_path)
    encoder = type(convert(bert)).from_pretrained(tmp_path).double()
    with torch.no_grad():
        expected = deepcopy(bert).double()(**batch).last_hidden_state[:, 0]
        assert_equal_but_for_rounding(encoder(**batch).pooler_output, expected)


def test_dpr_folder_opens_as_any_transformers_model(bert, tmp_path):
    dpr_question_encoder_from_bert(bert).save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), DPRQuestionEncoder)


def test_more_decoder_layers_than_bert_has_is_an_error(bert):
    with pytest.raises(ValueError, match="4 layers to copy"):
        bart_from_bert(bert, decoder_layers=5)
