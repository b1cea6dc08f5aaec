"""rag/generation/beams.py: sequences and scores are those of transformers' `generate` over public processors."""

import itertools

import pytest
import torch
from transformers.generation import (
    EosTokenCriteria,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from rag.generation.beams import BeamSearch
from tests.generation.test_decoding import MAKE, make_contexts, make_ending, pad_behind_end

MAX_LENGTH = 10
PENALTIES = [0.5, 1.0, 2.0]
CONSTRAINTS = [{}, {"min_length": 6, "no_repeat_ngram_size": 2}]


@pytest.fixture(scope="module", params=MAKE)
def model(request):
    """A tiny generator in float64: where no two scores are equal, rounding decides nothing."""
    return make_ending(request.param)


def processors_of(model, constraints: dict) -> LogitsProcessorList:
    """transformers' public classes in the order in which its `generate` applies them."""
    config, end = model.generation_config, model.config.eos_token_id
    settings = LogitsProcessorList([SequenceBiasLogitsProcessor(config.sequence_bias)])
    if "no_repeat_ngram_size" in constraints:
        settings.append(NoRepeatNGramLogitsProcessor(constraints["no_repeat_ngram_size"]))
    if "min_length" in constraints:
        settings.append(MinLengthLogitsProcessor(constraints["min_length"], end))
    if config.forced_bos_token_id is not None:
        settings.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        settings.append(ForcedEOSTokenLogitsProcessor(MAX_LENGTH, config.forced_eos_token_id))
    settings.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    return settings


@torch.no_grad()
def beam_search(model, ids, mask, constraints: dict, **rules):
    """The search as rag/generation/beams.py's docstring writes it, with the whole prefixes decoded at each step."""
    search = BeamSearch(max_length=MAX_LENGTH, **rules)
    processors = processors_of(model, constraints)
    stops = StoppingCriteriaList([MaxLengthCriteria(MAX_LENGTH), EosTokenCriteria(model.config.eos_token_id)])
    beams = search.start(len(ids), model.config.decoder_start_token_id, model.config.pad_token_id)
    encoded = model.get_encoder()(ids, attention_mask=mask)[0].repeat_interleave(search.num_beams, 0)
    mask = mask.repeat_interleave(search.num_beams, 0)
    for length in range(1, MAX_LENGTH):
        prefixes = beams.running[..., :length].flatten(0, 1)
        output = model(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=prefixes, use_cache=False)
        log_probs = processors(prefixes, output.logits[:, -1].float().log_softmax(-1))
        beams = search.advance(beams, log_probs.view(len(ids), search.num_beams, -1), length, stops)
        if search.is_over(beams).all():
            break
    return search, beams


def generate(model, ids, mask, num_beams: int, **settings):
    output = model.generate(
        ids, attention_mask=mask, num_beams=num_beams, num_return_sequences=num_beams, max_length=MAX_LENGTH,
        output_scores=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    sequences = pad_behind_end(output.sequences, model.config)
    filling = torch.full((len(sequences), MAX_LENGTH - sequences.shape[1]), model.config.pad_token_id)
    return torch.cat([sequences, filling], 1).view(-1, num_beams, MAX_LENGTH), output.sequences_scores.view(
        -1, num_beams
    )


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_sequences_and_scores_are_those_of_transformers(model, num_beams, early_stopping):
    ids, mask, _ = make_contexts(model.config.pad_token_id, questions=2)
    lengths = set()
    for length_penalty, constraints in itertools.product(PENALTIES, CONSTRAINTS):
        rules = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        sequences, scores = generate(model, ids, mask, **rules, **constraints)
        _, beams = beam_search(model, ids, mask, constraints, **rules)
        assert torch.equal(beams.sequences, sequences), (length_penalty, constraints)
        torch.testing.assert_close(beams.scores, scores)
        assert beams.finished.all()
        lengths |= set(beams.lengths.flatten().tolist())
    assert len(lengths) > 2, "answers of one length show nothing"


def test_rules_change_the_answers(model):
    """The grid above compares different searches, not the same one again and again."""
    ids, mask, _ = make_contexts(model.config.pad_token_id, questions=4)
    rules = itertools.product(PENALTIES, [True, False])
    answers = [
        beam_search(model, ids, mask, {}, num_beams=3, length_penalty=penalty, early_stopping=stop)[1].sequences
        for penalty, stop in rules
    ]
    assert len({str(found.tolist()) for found in answers}) > 3


def test_scores_are_log_probabilities_over_the_length(model):
    ids, mask, _ = make_contexts(model.config.pad_token_id, questions=1)
    search, beams = beam_search(model, ids, mask, {}, num_beams=3, length_penalty=0.5)
    torch.testing.assert_close(search.log_probs(beams), beams.scores * beams.lengths**0.5)
    assert (beams.lengths == (beams.sequences != model.config.pad_token_id)[..., 1:].sum(-1)).all()


def test_an_item_does_not_depend_on_its_batch(model):
    ids, mask, _ = make_contexts(model.config.pad_token_id, questions=1)
    _, together = beam_search(model, ids, mask, {}, num_beams=3)
    for row in range(len(ids)):
        _, alone = beam_search(model, ids[row : row + 1], mask[row : row + 1], {}, num_beams=3)
        assert torch.equal(alone.sequences[0], together.sequences[row])


def test_selected_items_remember_their_place():
    beams = BeamSearch(num_beams=2, max_length=4).start(3, start_token_id=7, pad_token_id=0)
    rows = beams.select(torch.tensor([2, 0]))
    assert rows.item.tolist() == [2, 0]
    assert rows.running.shape == (2, 2, 4)
    assert rows.running[..., 0].eq(7).all()


def test_each_end_token_of_each_beam_leaves_a_beam_to_run_on():
    """Two end tokens are the likeliest of both beams: the four candidates that end displace no running one."""
    search = BeamSearch(num_beams=2, max_length=5, end_tokens=2)
    beams = search.start(1, start_token_id=0, pad_token_id=0)
    log_probs = torch.tensor([[[-9.0, -1.0, -2.0, -5.0, -6.0]]])
    stops = EosTokenCriteria([1, 2])
    beams = search.advance(beams, log_probs, 1, stops)
    assert beams.running[0, :, 1].tolist() == [3, 4]
    assert beams.sequences[0, :, 1].tolist() == [1, 2]
    beams = search.advance(beams, log_probs.expand(-1, 2, -1), 2, stops)
    assert beams.running[0, :, 1:3].tolist() == [[3, 3], [3, 4]]
    assert search.is_over(beams).all()
