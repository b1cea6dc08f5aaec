"""What a search tells of itself after each step: its best beams; the answers are the same whether it tells or not."""

import pytest
import torch
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from rag.generation.decoding import generate_answers
from tests.generation.test_causal_decoder import make_contexts as make_prompts
from tests.generation.test_causal_decoder import make_lm
from tests.generation.test_decoding import MAKE, make_contexts, make_rag, trim

MAX_LENGTH, N_DOCS = 7, 4
MODELS = [RagSequenceForGeneration, RagTokenForGeneration]


def model_and_contexts(model_class, kind: str):
    if kind in MAKE:
        generator = MAKE[kind](0)
        contexts = make_contexts(generator.config.pad_token_id, n_docs=N_DOCS)
    else:
        generator = make_lm(kind)
        *contexts, _ = make_prompts(1)
    return make_rag(model_class, generator), contexts


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
@pytest.mark.parametrize("model_class", MODELS)
def test_each_step_is_told_and_nothing_changes(model_class, kind, num_beams):
    model, contexts = model_and_contexts(model_class, kind)
    settings = {"n_docs": N_DOCS, "num_beams": num_beams, "max_length": MAX_LENGTH, "min_length": 0}
    told = []
    token_ids = generate_answers(model, *contexts, note_step=told.append, **settings)
    assert torch.equal(token_ids, generate_answers(model, *contexts, **settings))
    questions = len(contexts[2])
    assert 1 <= len(told) < MAX_LENGTH
    assert [step.shape for step in told] == [(questions, length) for length in range(2, len(told) + 2)]
    assert all(step.device.type == "cpu" and step.dtype == torch.int64 for step in told)
    pad = model.generator.config.pad_token_id
    for step, before in zip(told[1:], told, strict=False):
        for row, old in zip(step.tolist(), before.tolist(), strict=True):
            assert row[-1] != pad or row[:-1] == old, "a question whose search is over keeps what was told last"


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_greedy_steps_of_a_token_model_are_the_answers_beginnings(kind):
    model, contexts = model_and_contexts(RagTokenForGeneration, kind)
    told = []
    token_ids = generate_answers(
        model, *contexts, n_docs=N_DOCS, num_beams=1, max_length=MAX_LENGTH, min_length=0, note_step=told.append
    )
    pad = model.generator.config.pad_token_id
    answers = trim(token_ids, pad)
    for length, step in enumerate(told, start=2):
        for row, answer in zip(trim(step, pad), answers, strict=True):
            assert row == answer[: len(row)] and len(row) >= min(length, len(answer) - 1)


def test_the_document_of_the_largest_joint_probability_is_told():
    """RAG-Sequence, greedily: the running sequence of the document for which p(z|x) p(beginning|x,z) is largest."""
    model, (ids, mask, doc_scores) = model_and_contexts(RagSequenceForGeneration, "bart")
    told = []
    settings = {"num_beams": 1, "max_length": MAX_LENGTH, "min_length": 0}
    generate_answers(model, ids, mask, doc_scores, n_docs=N_DOCS, note_step=told.append, **settings)
    settings = model.generator.generation_config
    assert (told[0][:, 1] == settings.forced_bos_token_id).all()
    begun = torch.tensor([[model.generator.config.decoder_start_token_id, settings.forced_bos_token_id]])
    with torch.no_grad():
        logits = model.generator(ids, attention_mask=mask, decoder_input_ids=begun.expand(len(ids), -1)).logits[:, -1]
    logits[:, model.generator.config.pad_token_id] = float("-inf")  # suppressed
    best = logits.log_softmax(-1).max(-1)
    runs = best.indices != model.generator.config.eos_token_id
    joint = best.values.masked_fill(~runs, float("-inf")).view(-1, N_DOCS) + doc_scores.log_softmax(-1)
    document = joint.argmax(1) + torch.arange(len(doc_scores)) * N_DOCS
    is_open = runs.view(-1, N_DOCS).any(1)
    assert is_open.any() and torch.equal(told[1][is_open, 2], best.indices[document[is_open]])


@pytest.mark.parametrize("model_class", MODELS)
def test_what_is_raised_ends_the_search(model_class):
    model, contexts = model_and_contexts(model_class, "bart")
    steps = []

    def leave(token_ids):
        steps.append(token_ids)
        raise ConnectionError

    settings = {"n_docs": N_DOCS, "num_beams": 3, "max_length": MAX_LENGTH}
    expected = generate_answers(model, *contexts, **settings)
    with pytest.raises(ConnectionError):
        generate_answers(model, *contexts, note_step=leave, **settings)
    assert len(steps) == 1
    assert torch.equal(generate_answers(model, *contexts, **settings), expected)
