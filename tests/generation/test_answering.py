"""Answers in half precision: a copy of the model, and whatever autocast is around."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from rag.generation.answering import answering_model
from rag.generation.decoding import generate_answers
from tests.generation.test_decoding import MAKE, MAX_LENGTH, N_DOCS, QUESTIONS, make_contexts, make_rag, trim

MODELS = [RagSequenceForGeneration, RagTokenForGeneration]


def answers(model, **settings) -> list[list[int]]:
    pad = model.generator.config.pad_token_id
    ids, mask, doc_scores = make_contexts(pad, seed=1)
    settings = {"n_docs": N_DOCS, "max_length": MAX_LENGTH} | settings
    return trim(generate_answers(model, ids, mask, doc_scores.float(), **settings), pad)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("model_class", MODELS)
def test_the_copy_answers_and_the_model_is_what_it_was(kind, model_class):
    model = make_rag(model_class, MAKE[kind](1).float()).train()
    model.rag.question_encoder.eval()
    before, parts = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    answering = answering_model(model, torch.bfloat16)
    assert {weight.dtype for weight in answering.generator.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in answering.generator.parameters())
    assert not any(module.training for module in answering.modules())
    assert answering.rag.question_encoder is model.rag.question_encoder
    assert type(answering) is model_class and answering.generator is not model.generator
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert [module.training for module in model.modules()] == parts
    assert all(weight.requires_grad for weight in model.generator.parameters())
    expected = copy.deepcopy(model)
    expected.rag.generator.bfloat16()
    assert answers(answering) == answers(expected.eval())


def test_tied_weights_stay_tied_and_equal_ones_are_shared():
    bart = MAKE["bart"](0, tie_word_embeddings=True).float()
    bart.tie_weights()
    half = answering_model(bart, torch.bfloat16)
    assert half.lm_head.weight is half.model.shared.weight and half.final_logits_bias.dtype == torch.bfloat16
    same = answering_model(bart, torch.float32)
    assert same.lm_head.weight.data_ptr() == bart.lm_head.weight.data_ptr()
    ids, mask, _ = make_contexts(1)
    expected = copy.deepcopy(bart).bfloat16().generate(ids, attention_mask=mask, max_length=MAX_LENGTH)
    assert torch.equal(half.generate(ids, attention_mask=mask, max_length=MAX_LENGTH), expected)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("model_class", MODELS)
def test_autocast_around_a_half_model_changes_nothing(kind, model_class):
    model = answering_model(make_rag(model_class, MAKE[kind](1).float()), torch.bfloat16)
    for settings in ({"num_beams": 4}, {"num_beams": 1}):
        expected = answers(model, **settings)
        with torch.autocast("cpu", torch.bfloat16):
            assert answers(model, **settings) == expected
            assert torch.is_autocast_enabled("cpu")


class Casts(TorchDispatchMode):
    """Counts the casts of a decoder's matrices, and of the output layer's, but for those that read the contexts."""

    def __init__(self, generator):
        super().__init__()
        named = generator.get_decoder().layers.named_parameters()
        matrices = [weight for name, weight in named if "encoder_attn.k_" not in name and "encoder_attn.v_" not in name]
        self.places = {weight.data_ptr() for weight in (*matrices, generator.lm_head.weight) if weight.dim() == 2}
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket.__name__ == "_to_copy" and args[0].data_ptr() in self.places
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_class", MODELS)
def test_no_weight_is_cast_at_every_step(model_class):
    """Under autocast each is cast once a batch, of a half model none, however long the answers are."""
    model = make_rag(model_class, MAKE["bart"](1).float())
    half = answering_model(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for own, expected in ((half, 0), (model, 1 + 2 * 8)):  # the output layer, and 8 matrices in each layer
            for max_length in (5, MAX_LENGTH):
                with Casts(own.generator) as casts:
                    assert len(answers(own, max_length=max_length, min_length=max_length)) == QUESTIONS
                assert casts.number == expected
