"""A model that cannot be run with its own settings is told when it is loaded; one that can stays as it is."""

import copy

import pytest
import torch
from transformers import RagTokenizer

from rag.errors import UserError
from rag.generation.decoding import generate_answers
from rag.generation.trial import FLAGS_DECIDE, require_runs
from rag.models.checkpoints import load_model
from rag.models.fit import settle_prompt
from tests.conftest import make_language_model


@pytest.fixture
def tokenizer(bert_tokenizer, bart_tokenizer):
    return RagTokenizer(bert_tokenizer, bart_tokenizer)


@pytest.mark.parametrize("name", ["rag_sequence", "rag_token"])
def test_a_model_that_runs_is_left_as_it_is(request, tokenizer, name):
    model = request.getfixturevalue(name)
    before = torch.get_rng_state()
    require_runs(model, tokenizer, "--model_name_or_path x", train=True, num_beams=2, bad_words_ids=[[0, 0]])
    assert torch.equal(torch.get_rng_state(), before) and not model.training


@pytest.mark.parametrize("train", [False, True])
def test_dropout_out_of_range_is_told(rag_sequence, tokenizer, train):
    model = copy.deepcopy(rag_sequence)
    for module in model.generator.modules():
        if hasattr(module, "dropout"):
            module.dropout = 1.5
    with pytest.raises(UserError, match=r"--model_name_or_path x: .*between 0 and 1"):
        require_runs(model, tokenizer, "--model_name_or_path x", train=train)


@pytest.mark.parametrize("setting", [{"decoder_start_token_id": -1}, {"length_penalty": "x"}, {"stop_strings": ["a"]}])
def test_generation_settings_that_cannot_be_followed_are_told(rag_sequence, tokenizer, setting):
    model = copy.deepcopy(rag_sequence)
    for name, value in setting.items():
        setattr(model.generator.generation_config, name, value)
    with pytest.raises(UserError, match="cannot be run"):
        require_runs(model, tokenizer, "--model_name_or_path x", num_beams=2)


@pytest.mark.parametrize("part, what", [("question_encoder", "a question's vector"), ("generator", "a word's score")])
def test_numbers_that_overflow_are_told(rag_sequence, tokenizer, part, what):
    model = copy.deepcopy(rag_sequence)
    with torch.no_grad():
        for weight in getattr(model, part).parameters():
            weight.fill_(3e38)
    with pytest.raises(UserError, match=what):
        require_runs(model, tokenizer, "--model_name_or_path x")


def test_only_the_question_encoder_where_nothing_is_answered(rag_sequence, tokenizer):
    model = copy.deepcopy(rag_sequence)
    model.generator.generation_config.decoder_start_token_id = -1
    require_runs(model, tokenizer, "--model_name_or_path x", answers=False)


@pytest.mark.parametrize("kind", ["bart_folder", "rag"])
def test_the_flags_decide_on_length_and_number(request, checkpoint, bart_tokenizer, kind):
    """Not what a checkpoint's generation_config.json says of new tokens and sequences."""
    model = load_model(str(checkpoint() if kind == "rag" else request.getfixturevalue(kind)))
    generator = model.generator if kind == "rag" else model
    tokens = bart_tokenizer("what is the capital of france", return_tensors="pt")

    def answer():
        settings = {"num_beams": 2, "min_length": 5, "max_length": 6, **FLAGS_DECIDE}
        if kind != "rag":
            return model.generate(tokens.input_ids, attention_mask=tokens.attention_mask, **settings)
        return generate_answers(
            model, tokens.input_ids, tokens.attention_mask, torch.zeros(1, 1), n_docs=1, **settings
        )  # fmt: skip

    expected = answer()
    generator.generation_config.update(max_new_tokens=1, min_new_tokens=1, num_beams=2, num_return_sequences=2)
    assert torch.equal(answer(), expected)


@pytest.mark.parametrize(("family", "is_known"), [
    ("llama", True), ("qwen3", True), ("mistral", True), ("gemma3_text", True), ("phi3", True), ("phi", True),
    ("smollm3", True), ("olmo2", True), ("granite", True), ("cohere", True), ("gemma2", False),
])  # fmt: skip
def test_a_language_model_that_says_something_else_read_our_way_is_told(family, is_known, llama_tokenizer):
    scales = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}
    model = make_language_model(family, len(llama_tokenizer), **scales.get(family, {}))
    tokenizer = copy.deepcopy(llama_tokenizer)
    settle_prompt(model, tokenizer, "--model_name_or_path x")
    if is_known:
        require_runs(model, tokenizer, "--model_name_or_path x", train=True, num_beams=2)
        return
    with pytest.raises(UserError, match=rf"--model_name_or_path x: .*a {family} model scales its scores, or attends"):
        require_runs(model, tokenizer, "--model_name_or_path x", num_beams=2)
