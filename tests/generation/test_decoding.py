"""Shared-encoding decoding against transformers' own `generate` on the same random weights: the same token ids.

In float64: the two sum in another order, and which of two words that nearly tie comes out in float32 depends on the
machine's instruction set.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks import decoding
from rag.errors import UserError
from rag.generation.decoding import generate_answers
from rag.generation.plain_decoder import decoder_of
from tests.conftest import assert_equal_but_for_rounding, in_float64

VOCABULARY, N_DOCS, QUESTIONS, MAX_LENGTH = 40, 4, 5, 14
SEEDS = range(4)
FEW = 3  # questions where there are many settings


def make_bart(seed: int, **config) -> BartForConditionalGeneration:
    settings = {
        "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    bart = _enliven(BartForConditionalGeneration(BartConfig(**settings | config)).eval())
    bart.final_logits_bias += torch.randn(VOCABULARY).double() / 2
    bart.generation_config.forced_bos_token_id = 0
    return bart


def make_t5(seed: int, **config) -> T5ForConditionalGeneration:
    settings = {
        "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return _enliven(T5ForConditionalGeneration(T5Config(**settings | config)).eval())


def _enliven(generator):
    """Weights and settings by which answers depend on their contexts and end at many different lengths."""
    for name, weight in generator.named_parameters():
        if weight.dim() == 2:
            words, places = "shared" in name or "embed_tokens" in name, "position" in name or "relative" in name
            gain = 2.0 if "lm_head" in name else 1.0
            nn.init.normal_(weight, std=0.2 if words else 1.0 if places else gain / weight.shape[1] ** 0.5)
    generator.generation_config.suppress_tokens = [generator.config.pad_token_id]
    generator.generation_config.exponential_decay_length_penalty = (3, 1.1)
    return in_float64(generator)


MAKE = {"bart": make_bart, "t5": make_t5}


def make_ending(kind: str):
    """A generator in float64 whose answers end early or late, as the rules of the search favor."""
    generator = MAKE[kind](0).double()
    generator.generation_config.exponential_decay_length_penalty = None
    generator.generation_config.sequence_bias = [[[generator.config.eos_token_id], 3.0 if kind == "bart" else 2.0]]
    return generator


def make_rag(model_class, generator, **config):
    encoder = DPRQuestionEncoder(
        DPRConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    rag_config = RagConfig.from_question_encoder_generator_configs(
        encoder.config, generator.config, n_docs=N_DOCS, **config
    )
    model = model_class(config=rag_config, question_encoder=encoder, generator=generator).eval()
    if model_class is RagTokenForGeneration:  # as load_model restores them
        model.generation_config = generator.generation_config
    return model


def make_contexts(pad_token_id: int, seed: int = 0, questions: int = QUESTIONS, n_docs: int = N_DOCS):
    """Contexts (B * n_docs, S) of unequal lengths, their mask, and doc_scores (B, n_docs) float64."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (questions * n_docs, 11), generator=random)
    lengths = torch.randint(4, 12, (questions * n_docs, 1), generator=random)
    mask = (torch.arange(11) < lengths).long()
    return ids.where(mask == 1, pad_token_id), mask, 2 * torch.randn(questions, n_docs, generator=random).double()


@contextmanager
def generate_as_meant(model, mask):
    """transformers' inner `generate` with the attention mask it is not given, and pads behind the end of an answer."""
    generate, masks = model.generator.generate, list(mask.split(model.config.n_docs))

    def wrapped(input_ids, **kwargs):
        kwargs["attention_mask"] = masks.pop(0)
        return pad_behind_end(generate(input_ids, **kwargs), model.generator.config, kwargs.get("eos_token_id"))

    model.generator.generate = wrapped
    yield
    del model.generator.generate


def pad_behind_end(sequences, config, ends=None):
    rows = []
    for row in sequences.tolist():
        places = [i for i, token in enumerate(row) if i and token in (ends or [config.eos_token_id])]
        length = places[0] + 1 if places else len(row)
        rows.append(row[:length] + [config.pad_token_id] * (len(row) - length))
    return torch.tensor(rows)


def reference(model, ids, mask, doc_scores, **kwargs):
    inputs = {"context_input_ids": ids, "context_attention_mask": mask, "doc_scores": doc_scores} | kwargs
    if isinstance(model, RagTokenForGeneration):
        inputs.pop("do_deduplication", None)
        return pad_behind_end(model.generate(**inputs), model.generator.config, kwargs.get("eos_token_id"))
    with generate_as_meant(model, mask):
        return model.generate(**inputs)


def trim(sequences, pad_token_id):
    rows = [list(row) for row in sequences.tolist()]
    for row in rows:
        while row and row[-1] == pad_token_id:
            row.pop()
    return rows


def assert_same(model, contexts, **kwargs):
    """Both decoders give the same token ids; returns them."""
    expected = reference(model, *contexts, **{"max_length": MAX_LENGTH, "min_length": 1} | kwargs)
    found = generate_answers(model, *contexts, n_docs=N_DOCS, **{"max_length": MAX_LENGTH} | kwargs)
    pad_token_id = model.generator.config.pad_token_id
    assert trim(found, pad_token_id) == trim(expected, pad_token_id)
    return trim(found, pad_token_id)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_same_token_ids_as_transformers(kind, model_class, num_beams):
    answers = []
    for seed in SEEDS:
        model = make_rag(model_class, MAKE[kind](seed))
        answers += assert_same(model, make_contexts(model.generator.config.pad_token_id, seed), num_beams=num_beams)
    assert len({tuple(a) for a in answers}) > 10, "degenerate answers show nothing"
    assert len({len(a) for a in answers}) > 2


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 3},
        {"num_return_sequences": 3, "do_deduplication": False},
        {"min_length": 9, "max_length": 11},
        {"max_length": 3},
        {"bad_words_ids": [[8], [27], [37, 37], [33]]},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"early_stopping": True, "length_penalty": 0.3},
        {"early_stopping": "never", "length_penalty": 2.0, "num_beams": 2},
        {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
        {"eos_token_id": [1, 2, 16], "num_beams": 3},
        {"length_penalty": -1},
        {"encoder_no_repeat_ngram_size": 1},
    ],
    ids=lambda s: "-".join(s),
)
def test_generation_settings(kind, settings):
    if isinstance(settings.get("eos_token_id"), list):
        settings = settings | {"forced_eos_token_id": None}
    for seed in SEEDS[:2]:
        model = make_rag(RagSequenceForGeneration, MAKE[kind](seed))
        contexts = make_contexts(model.generator.config.pad_token_id, seed, questions=FEW)
        assert_same(model, contexts, **{"num_beams": 4} | settings)
        if "encoder_no_repeat_ngram_size" in settings:  # transformers' own cannot do it for RAG-Token
            continue
        assert_same(make_rag(RagTokenForGeneration, model.generator), contexts, **{"num_beams": 4} | settings)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("num_beams", [1, 3])  # test_beams.py has the others
def test_one_document_is_answered_as_by_its_generator_alone(kind, num_beams):
    """All returned sequences of plain `generate`, whatever the rules of the search, in float64, where nothing ties."""
    generator = make_ending(kind)
    pad = generator.config.pad_token_id
    model = make_rag(RagSequenceForGeneration, generator)
    ids, mask, _ = make_contexts(pad, questions=FEW, n_docs=1)
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams}
    searches = itertools.product([0.5, 1.0, 2.0], [True, False, "never"]) if num_beams > 1 else [(1.0, False)]
    for length_penalty, early_stopping in searches:
        for constraints in (
            {"max_length": MAX_LENGTH},
            {"max_new_tokens": 8, "min_length": 6, "no_repeat_ngram_size": 2},
        ):
            rules = constraints | {"length_penalty": length_penalty, "early_stopping": early_stopping}
            expected = trim(
                pad_behind_end(generator.generate(ids, attention_mask=mask, **settings, **rules), generator.config), pad
            )
            found = generate_answers(
                model, ids, mask, torch.zeros(FEW, 1).double(), n_docs=1, decoding="fast", **settings, **rules
            )  # best first without the length penalty, which RAG-Sequence does not know
            for row in range(0, len(expected), num_beams):
                rows = slice(row, row + num_beams)
                assert sorted(trim(found, pad)[rows]) == sorted(expected[rows]), rules


def test_max_new_tokens_and_min_new_tokens_do_not_count_the_start():
    model = make_rag(RagSequenceForGeneration, make_bart(0))
    contexts = make_contexts(1)
    settings = {"n_docs": N_DOCS, "num_beams": 3}
    expected = generate_answers(model, *contexts, min_length=7, max_length=9, **settings)
    assert torch.equal(generate_answers(model, *contexts, min_new_tokens=6, max_new_tokens=8, **settings), expected)


def test_settings_of_the_generator_hold():
    """What a checkpoint says of generation is heeded as the generator's own `generate` heeds it."""
    model = make_rag(RagSequenceForGeneration, make_bart(0))
    model.generator.generation_config.no_repeat_ngram_size = 1
    answers = assert_same(model, make_contexts(1), num_beams=4)
    assert all(len(set(a[1:-1])) == len(a[1:-1]) for a in answers)


def test_transformers_attends_to_padding_without_the_mask():
    """The departure: `RagSequenceForGeneration.generate` hands no attention mask to its generator."""
    model = make_rag(RagSequenceForGeneration, make_bart(0))
    ids, mask, doc_scores = make_contexts(1)
    as_it_is = model.generate(
        context_input_ids=ids, context_attention_mask=mask, doc_scores=doc_scores, num_beams=4, max_length=MAX_LENGTH
    )
    assert trim(as_it_is, 1) != assert_same(model, (ids, mask, doc_scores), num_beams=4)


def test_transformers_fills_with_the_end_token_where_the_pad_id_is_0():
    """The other departure: there `get_nll` scores that filling, which an answer pays for being short."""
    model = make_rag(RagSequenceForGeneration, make_t5(0))
    ids, mask, _ = make_contexts(0)
    filled = model.generator.generate(ids, attention_mask=mask, num_beams=4, num_return_sequences=4, max_length=10)
    assert any(row[-2:] == [1, 1] for row in filled.tolist())


def test_sums_are_in_full_precision():
    """Of a model in half precision only the logits are rounded: probabilities over them add up to 1 in float32."""
    bart = make_bart(0).bfloat16()
    ids, mask, _ = make_contexts(1)
    decoder = decoder_of(bart)
    memory = decoder.read(ids, mask)
    hidden = decoder.decode(ids[:, :1], torch.tensor([[0]]), torch.ones(1, 1, 1).bool(), memory)
    vocabulary = torch.arange(VOCABULARY).repeat(len(ids))
    places = torch.arange(len(ids)).repeat_interleave(VOCABULARY)
    log_probs = decoder.token_log_probs(hidden[:, 0], places, vocabulary).view(-1, VOCABULARY)
    assert log_probs.dtype == decoder.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(log_probs, decoder.logits(hidden)[:, 0].log_softmax(-1), atol=0.05, rtol=0.02)
    for model_class in (RagSequenceForGeneration, RagTokenForGeneration):
        model = make_rag(model_class, bart)
        assert generate_answers(model, *make_contexts(1), n_docs=N_DOCS, max_length=MAX_LENGTH).shape[0] == QUESTIONS


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
def test_a_model_in_float32(model_class, num_beams):
    ids, mask, doc_scores = make_contexts(1)
    assert_same(make_rag(model_class, make_bart(0).float()), (ids, mask, doc_scores.float()), num_beams=num_beams)


def test_label_smoothing_and_n_docs_of_the_config_do_not_matter():
    model = make_rag(RagSequenceForGeneration, make_bart(1))
    contexts = make_contexts(1, seed=1)
    expected = assert_same(model, contexts, num_beams=4)
    model.config.label_smoothing, model.config.n_docs = 0.5, 2
    assert trim(generate_answers(model, *contexts, n_docs=N_DOCS, max_length=MAX_LENGTH), 1) == expected


@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
@pytest.mark.parametrize("kind", MAKE)
def test_a_missing_document_is_as_if_it_were_not_there(model_class, kind):
    model = make_rag(model_class, MAKE[kind](2))
    pad = model.generator.config.pad_token_id
    ids, mask, doc_scores = make_contexts(pad, seed=2)
    missing = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    found = trim(
        generate_answers(
            model, ids, mask, doc_scores.masked_fill(missing, float("-inf")), n_docs=N_DOCS, max_length=MAX_LENGTH
        ),
        pad,
    )
    missing[-1, 0] = False  # nothing was found: the first context holds the question alone
    for question, present in enumerate(~missing):
        rows = slice(question * N_DOCS, (question + 1) * N_DOCS)
        model.config.n_docs = int(present.sum())
        alone = ids[rows][present], mask[rows][present], doc_scores[question : question + 1, present]
        expected = trim(reference(model, *alone, num_beams=4, min_length=1, max_length=MAX_LENGTH), pad)
        assert found[question] == expected[0]


@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
def test_an_answer_does_not_hang_on_its_batch(model_class):
    model = make_rag(model_class, make_bart(3))
    ids, mask, doc_scores = make_contexts(1, seed=3, questions=9)
    together = trim(generate_answers(model, ids, mask, doc_scores, n_docs=N_DOCS, max_length=MAX_LENGTH), 1)
    for question in range(9):
        rows = slice(question * N_DOCS, (question + 1) * N_DOCS)
        length = int(mask[rows].sum(1).max())
        alone = ids[rows, :length], mask[rows, :length], doc_scores[question : question + 1]
        assert trim(generate_answers(model, *alone, n_docs=N_DOCS, max_length=MAX_LENGTH), 1) == [together[question]]


def test_a_true_tie_is_one():
    """Two words with the same weights: which of them comes out is open, the score of the answer is not."""
    bart = make_bart(0)
    twin, word = 39, 24
    with torch.no_grad():
        for weight in (bart.lm_head.weight, bart.model.shared.weight, bart.model.decoder.embed_tokens.weight):
            weight[twin] = weight[word]
        bart.final_logits_bias[0, word] += 6  # so that answers hold it
        bart.final_logits_bias[0, twin] = bart.final_logits_bias[0, word]
    model = make_rag(RagSequenceForGeneration, bart)
    contexts = ids, mask, doc_scores = make_contexts(1)
    settings = {"num_beams": 4, "max_length": 8}
    expected = trim(reference(model, *contexts, **settings), 1)
    answers = trim(generate_answers(model, *contexts, n_docs=N_DOCS, **settings), 1)
    assert any(word in a or twin in a for a in answers)
    for question, pair in enumerate(zip(expected, answers, strict=True)):
        rows = slice(question * N_DOCS, (question + 1) * N_DOCS)
        scores = [nll(model, ids[rows], mask[rows], doc_scores[question], answer) for answer in pair]
        assert_equal_but_for_rounding(*scores)


def nll(model, ids, mask, doc_scores, answer):
    with torch.no_grad():
        return model(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=doc_scores[None],
            labels=torch.tensor([answer]), exclude_bos_score=True,
        ).loss  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_fast_decoding_sums_over_the_documents_whose_beams_found_the_answer(kind, num_beams):
    for seed in SEEDS:
        model = make_rag(RagSequenceForGeneration, MAKE[kind](seed))
        config = model.generator.config
        ids, mask, doc_scores = make_contexts(config.pad_token_id, seed)
        settings = {"num_beams": num_beams, "max_length": MAX_LENGTH, "exponential_decay_length_penalty": None}
        found = generate_answers(model, ids, mask, doc_scores, n_docs=N_DOCS, decoding="fast", min_length=1, **settings)
        output = model.generator.generate(
            ids, attention_mask=mask, num_return_sequences=num_beams, output_scores=True, return_dict_in_generate=True,
            **settings,
        )  # fmt: skip
        sequences = pad_behind_end(output.sequences, config)
        for question, answer in enumerate(trim(found, config.pad_token_id)):
            joint = {}
            for row in range(question * N_DOCS * num_beams, (question + 1) * N_DOCS * num_beams):
                log_prob = beam_log_prob(output, sequences, row, num_beams, config.pad_token_id)
                key = tuple(trim(sequences[row : row + 1], config.pad_token_id)[0])
                weight = doc_scores[question].softmax(-1)[row // num_beams % N_DOCS]
                joint[key] = joint.get(key, 0.0) + weight * log_prob.exp()
            assert joint[tuple(answer)] == max(joint.values())


def beam_log_prob(output, sequences, row, num_beams, pad_token_id):
    tokens = sequences[row, 1:]
    length = len(trim(tokens[None], pad_token_id)[0])
    if num_beams > 1:
        return output.sequences_scores[row] * length
    steps = torch.stack(output.scores, 1)[row, :length].log_softmax(-1)
    return steps.gather(1, tokens[:length, None]).sum()


def test_t5_of_unequal_depth():
    """transformers needs use_cache=False for it: its cache has the encoder's number of layers."""
    for num_layers, num_decoder_layers in ((1, 3), (3, 1)):
        model = make_rag(
            RagSequenceForGeneration, make_t5(0, num_layers=num_layers, num_decoder_layers=num_decoder_layers)
        )
        contexts = make_contexts(0)
        expected = trim(reference(model, *contexts, num_beams=4, max_length=MAX_LENGTH, use_cache=False), 0)
        assert trim(generate_answers(model, *contexts, n_docs=N_DOCS, max_length=MAX_LENGTH), 0) == expected


def test_rows_without_a_candidate_are_padding():
    model = make_rag(RagSequenceForGeneration, make_bart(0))
    ids, mask, doc_scores = make_contexts(1)
    same = ids[:1].repeat(len(ids), 1), mask[:1].repeat(len(ids), 1), doc_scores
    answers = generate_answers(model, *same, n_docs=N_DOCS, num_beams=1, num_return_sequences=2, max_length=MAX_LENGTH)
    assert len(answers) == 2 * QUESTIONS
    assert (answers[1::2] == 1).all() and not (answers[::2] == 1).all(1).any()


def test_answers_without_a_word():
    """An untrained T5 may decode nothing but padding."""
    model = make_rag(RagSequenceForGeneration, make_t5(0))
    model.generator.generation_config.suppress_tokens = None
    nn.init.zeros_(model.generator.lm_head.weight)
    answers = generate_answers(model, *make_contexts(0), n_docs=N_DOCS, num_beams=1, max_length=MAX_LENGTH)
    assert answers.tolist() == [[0, 0]] * QUESTIONS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_beam": 2}, "num_beam"),
        ({"top_kk": 2}, "top_kk"),
        ({"stop_strings": ["."]}, "stop_strings"),
    ],
)
def test_settings_it_cannot_follow_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(make_rag(RagSequenceForGeneration, make_bart(0)), *make_contexts(1), n_docs=N_DOCS, **settings)


def test_an_unknown_generator_is_an_error():
    model = make_rag(RagSequenceForGeneration, make_bart(0))
    model.generator.config.model_type = "prophetnet"
    with pytest.raises(UserError, match="a prophetnet model cannot be a RAG model's generator"):
        generate_answers(model, *make_contexts(1), n_docs=N_DOCS)


def test_benchmark_compares_and_ends_where_answers_differ(monkeypatch):
    results = decoding.main(decoding.parse_args(["--size", "small", "--short"]))
    assert [(r["model"], r["same"]) for r in results] == [
        ("RagSequenceForGeneration", "2 of 2"),
        ("RagTokenForGeneration", "8 of 8"),
    ]
    assert all(figure > 0 for result in results for name in ("wall", "cpu") for figure in result[name])
    half = decoding.main(
        decoding.parse_args(["--size", "small", "--equal", "4", "--seeds", "1", "--precision", "bf16"])
    )
    for result in half:
        assert result["asked"] == 4 and 1 <= result["ours as transformers'"] <= 4
    ours = decoding.our_way
    monkeypatch.setattr(decoding, "our_way", lambda *args: ours(*args).flip(1))
    with pytest.raises(SystemExit, match="generate_answers is wrong"):
        decoding.main(decoding.parse_args(["--size", "small", "--equal", "2", "--seeds", "1"]))
