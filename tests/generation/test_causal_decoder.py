"""Answers of language models from caches of keys and values are those of plain loops over transformers' own models.

In float64, where nothing ties: a loop of `generate` over the passages and full forward passes for each candidate.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, RagSequenceForGeneration, RagTokenForGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from rag.generation.decoding import answer_prompts, generate_answers
from rag.packing import Heads
from tests.generation.test_decoding import make_rag

VOCABULARY, PAD, START = 24, 0, 7
ENDS = [2, 5, 11, 13, 17]
N_DOCS, QUESTIONS, MAX_LENGTH = 4, 4, 9
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": ENDS, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = 5  # shorter than any prompt
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "phi3": {"sliding_window": WINDOW},
    "phi": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}  # fmt: skip


def make_lm(family: str, seed: int = 0, **settings):
    """A random language model in float64 whose answers depend on its prompts and end at different lengths."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family] | settings)
    config.decoder_start_token_id = START
    lm = AutoModelForCausalLM.from_config(config).eval().double()
    for name, weight in lm.named_parameters():
        if weight.dim() == 2:
            words = 0.05 if "gemma" in family else 0.3  # Gemma scales them
            gain = 2.0 if "lm_head" in name else 1.5
            nn.init.normal_(weight, std=words if "embed" in name else gain / weight.shape[1] ** 0.5)
        elif "bias" in name:
            nn.init.normal_(weight, std=0.3)
    lm.generation_config.suppress_tokens = [PAD]
    lm.generation_config.exponential_decay_length_penalty = None
    return lm


def make_contexts(seed: int = 0, side: str = "right"):
    """Prompts without their last token (B * n_docs, S), each one of five heads and a question; mask, scores, heads."""
    random = np.random.default_rng(seed)
    heads = [random.integers(3, VOCABULARY, length) for length in (6, 3, 7, 4, 5)]
    rows, borders = [], []
    for question in (random.integers(3, VOCABULARY, length) for length in random.integers(1, 5, QUESTIONS)):
        for number in random.permutation(len(heads))[:N_DOCS]:
            rows.append(np.concatenate([heads[number], question]))
            borders.append(len(heads[number]))
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), dtype=np.int64)
    for own_ids, own_mask, row in zip(ids, mask, rows, strict=True):
        place = slice(len(row)) if side == "right" else slice(longest - len(row), None)
        own_ids[place], own_mask[place] = row, 1
    doc_scores = 2 * torch.from_numpy(random.standard_normal((QUESTIONS, N_DOCS)))
    keys = [row[:border].tobytes() for row, border in zip(rows, borders, strict=True)]
    heads = Heads(np.array(borders), np.array([keys.index(key) for key in keys]))
    return torch.from_numpy(ids), torch.from_numpy(mask), doc_scores, heads


def prompts_of(ids, mask) -> list[list[int]]:
    return [[*row[own == 1].tolist(), START] for row, own in zip(ids, mask, strict=True)]


def trim(rows, ends=ENDS) -> list[list[int]]:
    """Answers up to their first end token; without padding where there is none."""
    trimmed = []
    for row in torch.as_tensor(rows).tolist():
        while len(row) > 1 and row[-1] == PAD:
            row.pop()
        place = next((i for i, token in enumerate(row) if i and token in ends), len(row))
        trimmed.append(row[: place + 1])
    return trimmed


def log_prob(lm, prompt, answer, without_pad=False) -> torch.Tensor:
    """log p(answer | prompt) by one full pass; the answer's first token is the prompt's last."""
    logits = lm(torch.tensor([prompt + answer[1:]])).logits[0, len(prompt) - 1 : -1]
    if without_pad:
        logits[:, PAD] = float("-inf")
    return logits.log_softmax(-1).gather(1, torch.tensor(answer[1:])[:, None]).sum()


def beams_of(lm, prompt, num_beams, **settings) -> list[list[int]]:
    rows = lm.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=num_beams,
        num_return_sequences=num_beams, max_new_tokens=MAX_LENGTH - 1, **settings,
    )  # fmt: skip
    return trim(rows[:, len(prompt) - 1 :])


def sequence_reference(lm, ids, mask, doc_scores, num_beams, thorough=True) -> list[list[int]]:
    """RAG-Sequence's answers by the definition."""
    prompts, answers = prompts_of(ids, mask), []
    for question, scores in enumerate(doc_scores):
        own = prompts[question * N_DOCS : (question + 1) * N_DOCS]
        weights = scores.log_softmax(-1)
        found = [beams_of(lm, p, num_beams) if w > float("-inf") else [] for p, w in zip(own, weights, strict=True)]
        totals = {}
        for candidate in dict.fromkeys(tuple(answer) for beams in found for answer in beams):
            terms = [
                weight + log_prob(lm, prompt, list(candidate), without_pad=not thorough)
                for prompt, weight, beams in zip(own, weights, found, strict=True)
                if thorough or list(candidate) in beams
            ]
            totals[candidate] = torch.stack(terms).logsumexp(0)
        answers.append(list(max(totals, key=totals.get)))
    return answers


@contextmanager
def marginal_lm(lm, prompts, weights):
    """The language model whose next token's probability is the mean over prompts: what RAG-Token searches."""
    full = lm.forward

    def forward(input_ids=None, **kwargs):
        rows = []
        for prefix in input_ids.tolist():
            terms = [
                weight + full(torch.tensor([prompt + prefix[1:]])).logits[0, -1].log_softmax(-1)
                for prompt, weight in zip(prompts, weights, strict=True)
                if weight > float("-inf")
            ]
            rows.append(torch.stack(terms).logsumexp(0))
        return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])

    lm.forward = forward
    yield lm
    del lm.forward


def token_reference(lm, ids, mask, doc_scores, num_beams) -> list[list[int]]:
    prompts, answers = prompts_of(ids, mask), []
    for question, scores in enumerate(doc_scores):
        own = prompts[question * N_DOCS : (question + 1) * N_DOCS]
        with marginal_lm(lm, own, scores.log_softmax(-1)) as marginal:
            rows = marginal.generate(
                torch.tensor([[START]]), num_beams=num_beams, max_length=MAX_LENGTH, use_cache=False
            )
        answers += trim(rows)
    return answers


def answers_of(model, ids, mask, doc_scores, **settings) -> list[list[int]]:
    settings = {"n_docs": N_DOCS, "max_length": MAX_LENGTH, "min_length": 0} | settings
    return trim(generate_answers(model, ids, mask, doc_scores, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_bare_model_answers_as_generate(family, num_beams):
    lm = make_lm(family)
    lengths = set()
    for side in ("right", "left"):
        ids, mask, _, _ = make_contexts(side=side)
        rows = answer_prompts(
            lm, ids, mask, num_beams=num_beams, num_return_sequences=num_beams, max_length=MAX_LENGTH, min_length=0
        )
        expected = [answer for prompt in prompts_of(ids, mask) for answer in beams_of(lm, prompt, num_beams)]
        assert trim(rows) == expected
        lengths |= {len(answer) for answer in expected}
    assert len(lengths) > 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_rag_sequence_is_generate_and_full_passes(family, num_beams):
    lm, several = make_lm(family), set()
    model = make_rag(RagSequenceForGeneration, lm)
    for seed, side in enumerate(("right", "left")):
        ids, mask, doc_scores, heads = make_contexts(seed, side)
        doc_scores[0, 1:] = doc_scores[1, 0] = float("-inf")
        for decoding in ("thorough", "fast"):
            expected = sequence_reference(lm, ids, mask, doc_scores, num_beams, decoding == "thorough")
            settings = {"num_beams": num_beams, "decoding": decoding}
            assert answers_of(model, ids, mask, doc_scores, **settings) == expected
            assert answers_of(model, ids, mask, doc_scores, **settings, heads=heads) == expected
            several |= {tuple(answer) for answer in expected}
    assert len(several) > 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_rag_token_is_a_search_over_the_means(family, num_beams):
    lm = make_lm(family)
    model = make_rag(RagTokenForGeneration, lm)
    ids, mask, doc_scores, heads = make_contexts(1)
    doc_scores[1, 0] = doc_scores[2, 2] = float("-inf")
    expected = token_reference(lm, ids, mask, doc_scores, num_beams)
    assert answers_of(model, ids, mask, doc_scores, num_beams=num_beams) == expected
    assert answers_of(model, ids, mask, doc_scores, num_beams=num_beams, heads=heads) == expected
    assert len({tuple(answer) for answer in expected}) > 2
