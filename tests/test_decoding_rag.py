"""Shared-encoding decoding against transformers' own `generate` on the same random weights: the same token ids."""

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

from decoding_rag import generate_answers

VOCABULARY, N_DOCS, QUESTIONS, MAX_LENGTH = 40, 4, 5, 14
SEEDS = range(4)


def make_bart(seed: int, **config) -> BartForConditionalGeneration:
    settings = {
        "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    bart = _enliven(BartForConditionalGeneration(BartConfig(**settings | config)).eval())
    bart.final_logits_bias += torch.randn(VOCABULARY) / 2
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
    return generator


MAKE = {"bart": make_bart, "t5": make_t5}


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
    """Contexts (B * n_docs, S) of unequal lengths, their mask, and doc_scores (B, n_docs)."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (questions * n_docs, 11), generator=random)
    lengths = torch.randint(4, 12, (questions * n_docs, 1), generator=random)
    mask = (torch.arange(11) < lengths).long()
    return ids.where(mask == 1, pad_token_id), mask, 2 * torch.randn(questions, n_docs, generator=random)


@contextmanager
def generate_as_meant(model, mask):
    """transformers' inner `generate` with the attention mask it is not given, and pads behind the end of an answer."""
    generate, masks = model.generator.generate, list(mask.split(model.config.n_docs))

    def wrapped(input_ids, **kwargs):
        kwargs["attention_mask"] = masks.pop(0)
        return pad_behind_end(generate(input_ids, **kwargs), model.generator.config)

    model.generator.generate = wrapped
    yield
    del model.generator.generate


def pad_behind_end(sequences, config):
    rows = []
    for row in sequences.tolist():
        end = row.index(config.eos_token_id, 1) + 1 if config.eos_token_id in row[1:] else len(row)
        rows.append(row[:end] + [config.pad_token_id] * (len(row) - end))
    return torch.tensor(rows)


def reference(model, ids, mask, doc_scores, **kwargs):
    inputs = {"context_input_ids": ids, "context_attention_mask": mask, "doc_scores": doc_scores} | kwargs
    if isinstance(model, RagTokenForGeneration):
        inputs.pop("do_deduplication", None)
        return pad_behind_end(model.generate(**inputs), model.generator.config)
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
