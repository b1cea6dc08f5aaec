"""Each family of generators that RAG models may have, against transformers' own loss and answers, in float64."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)

from rag.errors import UserError
from rag.generation.decoding import generate_answers
from rag.generation.families import FAST, PLAIN, require_family
from rag.generation.forward import decode_answers, encode_contexts, output_layer
from rag.generation.stacks import use_packed_rows
from rag.training.loss import decoder_inputs_and_targets, rag_sequence_nll, rag_token_nll
from tests.conftest import assert_equal_but_for_rounding
from tests.generation.test_decoding import (
    MAX_LENGTH,
    N_DOCS,
    VOCABULARY,
    _enliven,
    make_contexts,
    make_rag,
    reference,
    trim,
)

BART_LIKE = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
T5_LIKE = {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "pad_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
OWN = {
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longt5": {"local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 4},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "pegasus_x": {"num_global_tokens": 2, "block_size": 4},
    "marian": {"forced_eos_token_id": 2, "decoder_start_token_id": 1},
}
FAMILIES = [family for family in FAST + PLAIN if family not in ("bart", "t5")]  # these have tests of their own


def make_generator(family: str):
    torch.manual_seed(1)
    sizes = T5_LIKE if "t5" in family else BART_LIKE
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, **sizes | OWN.get(family, {}))
    if not hasattr(config, "bos_token_id"):
        config.bos_token_id = None
    generator = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)](config).double().eval()
    if hasattr(generator, "final_logits_bias"):
        generator.final_logits_bias += torch.randn(VOCABULARY).double() / 2
    generator.generation_config.encoder_no_repeat_ngram_size = 0  # Blenderbot's; transformers' RAG-Token cannot do it
    return _enliven(generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_answers_equal_transformers(family):
    generator, answers = make_generator(family), []
    ids, mask, doc_scores = make_contexts(1, questions=4)
    labels = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(2))
    labels[1, 3:] = 1
    decoder_ids, targets = decoder_inputs_and_targets(labels, generator.config)
    use_packed_rows(generator)
    for model_class, nll in ((RagSequenceForGeneration, rag_sequence_nll), (RagTokenForGeneration, rag_token_nll)):
        model = make_rag(model_class, generator)
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "vocab_size"):
            setattr(model.config, name, getattr(generator.config, name))
        model.config.n_docs = N_DOCS
        with torch.no_grad():
            encoded = encode_contexts(generator, ids, mask)
            hidden, packed = decode_answers(generator, encoded, decoder_ids)
            ours = nll(hidden, output_layer(generator), doc_scores, targets, 1, answers=packed)
            theirs = model(
                context_input_ids=ids, context_attention_mask=mask, doc_scores=doc_scores, labels=decoder_ids
            ).loss
        assert_equal_but_for_rounding(ours, theirs)
        for num_beams in (1, 3):
            settings = {"num_beams": num_beams, "max_length": MAX_LENGTH}
            found = generate_answers(model, ids, mask, doc_scores, n_docs=N_DOCS, **settings)
            expected = reference(model, ids, mask, doc_scores, **settings)
            assert trim(found, 1) == trim(expected, 1), (model_class, num_beams)
            answers += trim(found, 1)
    assert len({tuple(answer) for answer in answers}) > 2, "degenerate answers show nothing"


def test_other_families_are_refused():
    with pytest.raises(
        UserError, match=r"--g x: a prophetnet model cannot be a RAG model's generator; give a causal .* or one of bart"
    ):
        require_family(CONFIG_MAPPING["prophetnet"](), "--g x")
    for family in FAST + PLAIN:
        require_family(CONFIG_MAPPING[family](), "--g x")
