"""Fusion-in-Decoder's answers: those of `generate` from the encoder's states of all passages, joined by hand."""

import math

import pytest
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessorList,
    MT5Config,
    MT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from rag.generation.answering import answering_model
from rag.generation.decoding import generate_answers
from rag.models.fid_rag import RagFidForGeneration
from tests.conftest import assert_equal_but_for_rounding
from tests.generation.test_decoding import (
    MAKE,
    MAX_LENGTH,
    N_DOCS,
    VOCABULARY,
    _enliven,
    make_contexts,
    make_rag,
    pad_behind_end,
    trim,
)

NONE = float("-inf")


def make_mt5(seed: int) -> MT5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = MT5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return _enliven(MT5ForConditionalGeneration(config).eval())


MAKE_FUSED = MAKE | {"mt5": make_mt5}


def contexts_with_gaps(pad_token_id: int, seed: int = 0):
    """Contexts of which some are missing, of one question all."""
    ids, mask, doc_scores = make_contexts(pad_token_id, seed)
    doc_scores[1, 2] = doc_scores[3, 0] = NONE
    doc_scores[2] = NONE
    return ids, mask, doc_scores


def joined_states(generator, ids, mask, doc_scores):
    """The encoder's states of all passages of a question (B, n_docs * S, d), and which of them count."""
    questions = len(doc_scores)
    with torch.no_grad():
        encoded = generator.get_encoder()(ids, attention_mask=mask)[0]
    is_there = doc_scores > NONE
    is_there[:, 0] |= ~is_there.any(1)
    mask = mask.view(questions, N_DOCS, -1) * is_there[..., None]
    return encoded.view(questions, -1, encoded.shape[-1]), mask.flatten(1)


def reference(generator, contexts, **settings) -> list[list[int]]:
    states, mask = joined_states(generator, *contexts)
    settings = {"max_length": MAX_LENGTH, "min_length": 1} | settings
    outputs = BaseModelOutput(last_hidden_state=states)
    config = generator.config
    return trim(pad_behind_end(generator.generate(encoder_outputs=outputs, attention_mask=mask, **settings), config),
                config.pad_token_id)  # fmt: skip


def found(model, contexts, **settings) -> list[list[int]]:
    answers = generate_answers(model, *contexts, n_docs=N_DOCS, **{"max_length": MAX_LENGTH} | settings)
    return trim(answers, model.generator.config.pad_token_id)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("kind", MAKE_FUSED)
def test_answers_are_generates_from_joined_states(kind, num_beams):
    answers = []
    for seed in range(3):
        model = make_rag(RagFidForGeneration, MAKE_FUSED[kind](seed))
        model.generator.generation_config.exponential_decay_length_penalty = (3, 1.4 if num_beams == 1 else 1.1)
        contexts = contexts_with_gaps(model.generator.config.pad_token_id, seed)
        settings = {"num_beams": num_beams, "num_return_sequences": num_beams}
        own = found(model, contexts, **settings)
        assert own == reference(model.generator, contexts, **settings)
        answers += own
    assert len({tuple(a) for a in answers}) > 7, "degenerate answers show nothing"
    assert len({len(a) for a in answers}) > 1


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2, "min_length": 6},
        {"bad_words_ids": [[5, 5], [7]], "length_penalty": 2.0},
        {"early_stopping": True, "repetition_penalty": 1.5},
    ],
)
def test_settings_are_followed(kind, settings):
    model = make_rag(RagFidForGeneration, MAKE[kind](5))
    contexts = contexts_with_gaps(model.generator.config.pad_token_id)
    expected = reference(model.generator, contexts, num_beams=3, **settings)
    assert found(model, contexts, num_beams=3, **settings) == expected


@pytest.mark.parametrize("kind", MAKE)
def test_a_rule_on_repetition_holds_for_all_passages(kind):
    """`generate`, which is given states, knows no passages: it is told the rule itself."""
    model = make_rag(RagFidForGeneration, MAKE[kind](5))
    pad = model.generator.config.pad_token_id
    ids, mask, doc_scores = contexts_with_gaps(pad)
    joined = ids.masked_fill(doc_scores.isneginf().view(-1, 1), pad).view(len(doc_scores), -1)
    rule = EncoderNoRepeatNGramLogitsProcessor(1, joined)
    expected = reference(model.generator, (ids, mask, doc_scores), logits_processor=LogitsProcessorList([rule]))
    assert found(model, (ids, mask, doc_scores), num_beams=1, encoder_no_repeat_ngram_size=1) == expected
    assert found(model, (ids, mask, doc_scores), num_beams=1) != expected


@pytest.mark.parametrize("kind", MAKE)
def test_the_order_of_passages_changes_nothing(kind):
    model = make_rag(RagFidForGeneration, MAKE[kind](1))
    ids, mask, doc_scores = contexts_with_gaps(model.generator.config.pad_token_id)
    order = torch.tensor([2, 0, 3, 1])
    is_there = doc_scores.isfinite().any(1)  # of a question without a passage the first context is read

    def turned(rows):
        return rows.view(-1, N_DOCS, rows.shape[1])[:, order].flatten(0, 1)

    answers = found(model, (ids, mask, doc_scores), num_beams=3)
    again = found(model, (turned(ids), turned(mask), doc_scores[:, order]), num_beams=3)
    kept = is_there.nonzero().flatten().tolist()
    assert [answers[n] for n in kept] == [again[n] for n in kept]


@pytest.mark.parametrize("kind", MAKE)
def test_a_missing_passage_is_not_read(kind):
    """Whatever stands in its slot."""
    model = make_rag(RagFidForGeneration, MAKE[kind](2))
    ids, mask, doc_scores = contexts_with_gaps(model.generator.config.pad_token_id)
    answers = found(model, (ids, mask, doc_scores), num_beams=3, encoder_no_repeat_ngram_size=3)
    other, missing = ids.clone(), doc_scores.isneginf()
    missing[2, 0] = False
    other[missing.flatten()] = (other[missing.flatten()] + 7) % VOCABULARY
    assert found(model, (other, mask, doc_scores), num_beams=3, encoder_no_repeat_ngram_size=3) == answers


@pytest.mark.parametrize("kind", MAKE)
def test_with_one_passage_it_is_the_plain_generator(kind):
    model = make_rag(RagFidForGeneration, MAKE[kind](3))
    ids, mask, _ = make_contexts(model.generator.config.pad_token_id)
    for num_beams in (1, 3):
        settings = {"num_beams": num_beams, "max_length": MAX_LENGTH}
        own = generate_answers(model, ids, mask, torch.zeros(len(ids), 1), n_docs=1, **settings)
        config = model.generator.config
        plain = pad_behind_end(model.generator.generate(ids, attention_mask=mask, min_length=1, **settings), config)
        assert trim(own, config.pad_token_id) == trim(plain, config.pad_token_id)


@pytest.mark.parametrize("kind", MAKE)
def test_how_likely_an_answer_is_is_told_and_no_passages_part_in_it(kind):
    model = make_rag(RagFidForGeneration, MAKE[kind](0))
    contexts = contexts_with_gaps(model.generator.config.pad_token_id)
    noted, steps = [], []
    answers = found(model, contexts, num_beams=1, note_posteriors=noted.append, note_step=steps.append)
    (posteriors,) = noted
    assert posteriors.passages is None and posteriors.tokens is None
    states, mask = joined_states(model.generator, *contexts)
    for question, answer in enumerate(answers):
        own = slice(question, question + 1)
        with torch.no_grad():
            logits = model.generator(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[own]), attention_mask=mask[own],
                decoder_input_ids=torch.tensor([answer[:-1]]),
            ).logits[0]  # fmt: skip
        each = logits.log_softmax(-1).gather(1, torch.tensor(answer[1:])[:, None])
        assert posteriors.answers[question].item() == pytest.approx(each.sum().item(), abs=1e-5)
    assert all(step.shape == (len(answers), length) for length, step in enumerate(steps, start=2))
    for step in steps:  # greedy: what runs is how the answer begins
        running = trim(step, model.generator.config.pad_token_id)
        assert all(answer[: len(one)] == one for answer, one in zip(answers, running, strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_in_half_precision_answers_so_too(kind):
    model = make_rag(RagFidForGeneration, MAKE[kind](0).float())
    contexts = contexts_with_gaps(model.generator.config.pad_token_id)
    copied = answering_model(model, torch.bfloat16)
    assert isinstance(copied, RagFidForGeneration) and copied.generator.dtype == torch.bfloat16
    noted = []
    for one in (model, copied):
        generate_answers(one, *contexts, n_docs=N_DOCS, max_length=3, note_posteriors=noted.append)
    full, half = (one.answers for one in noted)
    assert half.isfinite().all() and math.isclose(full.sum(), half.sum(), rel_tol=0.2)


@pytest.mark.parametrize("kind", MAKE)
def test_memory_without_padding_is_the_same(kind):
    """Joined keys and values of passages that are padded on the left, where no rows are packed."""
    model = make_rag(RagFidForGeneration, MAKE[kind](4))
    ids, mask, doc_scores = contexts_with_gaps(model.generator.config.pad_token_id)
    contexts = ids.flip(1), mask.flip(1), doc_scores
    assert found(model, contexts, num_beams=3) == reference(model.generator, contexts, num_beams=3)


def test_it_says_that_it_does_not_run_by_itself():
    model = make_rag(RagFidForGeneration, MAKE["bart"](0))
    for run in (model, model.generate):
        with pytest.raises(NotImplementedError, match="generate_answers answers"):
            run(torch.ones(1, 2, dtype=torch.long))


def test_scores_decide_nothing_but_which_are_there():
    model = make_rag(RagFidForGeneration, MAKE["t5"](0))
    contexts = contexts_with_gaps(0)
    noted = []
    for scores in (contexts[2], contexts[2] * 7 - 3):
        generate_answers(model, *contexts[:2], scores, n_docs=N_DOCS, note_posteriors=noted.append)
    assert_equal_but_for_rounding(noted[1].answers, noted[0].answers)
