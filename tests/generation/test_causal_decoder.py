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

from benchmarks import language_model
from benchmarks.language_model_parts.answers import Sides
from rag.generation import causal_decoder
from rag.generation.answering import answering_model
from rag.generation.bounds import Bounds
from rag.generation.causal_cache import HeadCache
from rag.generation.decoding import answer_prompts, generate_answers
from rag.generation.pace import PACES, Pace
from rag.generation.plain_decoder import decoder_of
from rag.generation.search import Search
from rag.generation.token_trees import Past
from rag.packing import Heads
from tests.conftest import assert_equal_but_for_rounding
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
        for way in ("thorough", "fast"):
            expected = sequence_reference(lm, ids, mask, doc_scores, num_beams, way == "thorough")
            settings = {"num_beams": num_beams, "decoding": way}
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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 1},
        {"num_return_sequences": 3},
        {"num_return_sequences": 3, "do_deduplication": False},
        {"min_length": 6},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"length_penalty": 2.0, "early_stopping": "never"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("sharpness", [1, 4])
def test_what_cannot_be_the_best_is_left_out_and_nothing_else(family, settings, sharpness, monkeypatch):
    """With bounds and without the same rows, in the same order, whatever the rules of the search; in fewer steps."""
    model = make_rag(RagSequenceForGeneration, make_lm(family))
    left_out, may_be_best, steps = [], Bounds.may_be_best, {"with": 0, "without": 0}

    def noted(bounds, candidates):
        kept = may_be_best(bounds, candidates)
        left_out.append(int((candidates.lengths > 0).sum() - kept.sum()))
        return kept

    @contextmanager
    def counting(side, **methods):
        with monkeypatch.context() as patch:
            for name, method in methods.items():
                patch.setattr(Bounds, name, method)
            begin = Bounds.begin

            def counted(*args):
                steps[side] += 1
                begin(*args)

            patch.setattr(Bounds, "begin", counted)
            yield

    def all_of_them(bounds, candidates):
        return torch.from_numpy(candidates.lengths > 0)

    def undecided(bounds, item):
        return torch.zeros_like(item, dtype=torch.bool)

    for seed in range(8):
        ids, mask, doc_scores, _ = make_contexts(seed)
        doc_scores[0, 1:] = doc_scores[1, 0] = float("-inf")
        for own in (slice(None), slice(2, 3)):
            rows = slice(own.start and own.start * N_DOCS, own.stop and own.stop * N_DOCS)
            contexts = ids[rows], mask[rows], sharpness * doc_scores[own]
            with counting("with", may_be_best=noted):
                found = answers_of(model, *contexts, **{"num_beams": 4} | settings)
            with counting("without", may_be_best=all_of_them, decided=undecided):
                assert answers_of(model, *contexts, **{"num_beams": 4} | settings) == found
    assert sum(left_out) > 10
    if "num_return_sequences" in settings:
        assert steps["with"] == steps["without"]
    elif settings in ({}, {"num_beams": 1}) and sharpness > 1:
        assert steps["with"] < steps["without"], steps


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_is_each_of_its_ways(family):
    """Hidden states of a tree's tokens, read in one pass and in two, are those of full passes over each way."""
    lm = make_lm(family)
    decoder = decoder_of(lm)
    ids, mask, _, heads = make_contexts(side="left")
    memory = decoder.read(ids, mask, heads.lengths)
    tokens = torch.tensor([[START, 9, 10, 11, 12]]).repeat(len(ids), 1)
    parents, depths = [0, 0, 0, 1, 3], torch.tensor([[0, 1, 1, 2, 3]])
    ancestors = torch.eye(5, dtype=torch.bool)[None]
    for node, parent in list(enumerate(parents))[1:]:
        ancestors[0, node] |= ancestors[0, parent]
    whole = decoder.decode(tokens, depths, ancestors, memory)
    past = Past(decoder.depth, capacity=5)
    steps = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]
    parts = [
        decoder.decode(tokens[:, own], depths[:, own], ancestors[:, own, : own.stop], memory, past) for own in steps
    ]
    assert_equal_but_for_rounding(torch.cat(parts, 1).float(), whole.float())
    for row, prompt in enumerate(prompts_of(ids, mask)):
        for node in range(5):
            way = prompt[:-1] + tokens[row, ancestors[0, node]].tolist()
            expected = lm(torch.tensor([way])).logits[0, -1]
            # Norms and positions are float32's whatever the weights are.
            assert_equal_but_for_rounding(decoder.logits(whole[row, node][None])[0].float(), expected.float())


def test_another_start_token_than_the_configs():
    lm = make_lm("llama")
    ids, mask, _, _ = make_contexts()
    found = answer_prompts(lm, ids, mask, max_length=MAX_LENGTH, min_length=0, decoder_start_token_id=9)
    prompts = [[*prompt[:-1], 9] for prompt in prompts_of(ids, mask)]
    assert trim(found) == [beams_of(lm, prompt, 4)[0] for prompt in prompts]


@pytest.mark.parametrize("pace", [Pace(16, 64, 2**20, False), Pace(16, 64, 50, True)])
@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
def test_the_pace_changes_nothing(pace, model_class, monkeypatch):
    model = make_rag(model_class, make_lm("llama"))
    ids, mask, doc_scores, heads = make_contexts(2)
    expected = answers_of(model, ids, mask, doc_scores, heads=heads)
    monkeypatch.setitem(PACES, "cpu", pace)
    assert answers_of(model, ids, mask, doc_scores, heads=heads) == expected
    assert answers_of(model, ids, mask, doc_scores) == expected


@contextmanager
def pieces_read(monkeypatch):
    """The texts that are read while it is open."""
    pieces, prefill = [], causal_decoder.CausalDecoder._keys_and_values

    def noted(self, own, *args, **kwargs):
        pieces.extend(tuple(piece.tolist()) for piece in own)
        return prefill(self, own, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(causal_decoder.CausalDecoder, "_keys_and_values", noted)
        yield pieces


@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
def test_a_head_is_read_once_a_batch_and_with_a_cache_once_at_all(model_class, monkeypatch):
    model, cache = make_rag(model_class, make_lm("qwen3")), HeadCache()
    ids, mask, doc_scores, heads = make_contexts(0)
    own = {tuple(row[seen == 1][:length].tolist()) for row, seen, length in zip(ids, mask, heads.lengths, strict=True)}
    expected = answers_of(model, ids, mask, doc_scores)
    for times in (1, 0):
        with pieces_read(monkeypatch) as pieces:
            assert answers_of(model, ids, mask, doc_scores, heads=heads, head_cache=cache) == expected
        assert [pieces.count(head) for head in own] == [times] * len(own) and len(own) < len(ids)
    other_ids, other_mask, other_scores, other_heads = make_contexts(0)
    other_ids[other_ids == 9] = 10  # other questions, and some of the passages
    expected = answers_of(model, other_ids, other_mask, other_scores)
    settings = {"heads": other_heads, "head_cache": cache}
    assert answers_of(model, other_ids, other_mask, other_scores, **settings) == expected


def test_the_cache_is_bounded_and_the_head_longest_unused_goes_first():
    cache = HeadCache(most_bytes=3 * 8 * 10)
    heads = {name: torch.full((10,), float(number)).double() for number, name in enumerate((b"a", b"b", b"c", b"d"))}
    for name in (b"a", b"b", b"c"):
        cache.put(name, heads[name])
    assert cache.get(b"a") is not None and len(cache) == 3
    cache.put(b"d", heads[b"d"])
    assert cache.get(b"b") is None and cache.used_bytes == 3 * 80
    assert all(torch.equal(cache.get(name), heads[name]) for name in (b"a", b"c", b"d"))
    cache.put(b"large", torch.zeros(31).double())
    assert cache.get(b"large") is None and len(cache) == 3
    free = HeadCache()
    free.put(b"a", heads[b"a"])
    assert 2**20 < free.most_bytes <= 4 * 2**30


def test_a_small_cache_changes_nothing():
    model = make_rag(RagSequenceForGeneration, make_lm("mistral"))
    ids, mask, doc_scores, heads = make_contexts(0)
    expected = answers_of(model, ids, mask, doc_scores)
    head = 3 * 2 * 2 * 8 * 8  # bytes of a token: layers, keys and values, key heads, head size, float64
    cache = HeadCache(most_bytes=10 * head)
    for _ in range(2):
        assert answers_of(model, ids, mask, doc_scores, heads=heads, head_cache=cache) == expected
        assert 0 < cache.used_bytes <= 10 * head


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_and_below(family):
    lm = make_lm(family).float()
    model = make_rag(RagSequenceForGeneration, lm)
    ids, mask, doc_scores, heads = make_contexts(0)
    doc_scores = doc_scores.float()
    expected = sequence_reference(lm, ids, mask, doc_scores, 4)
    assert answers_of(model, ids, mask, doc_scores, heads=heads) == expected
    half = answering_model(model, torch.bfloat16)
    expected = answers_of(half, ids, mask, doc_scores, heads=heads)
    with torch.autocast("cpu", torch.bfloat16):
        assert answers_of(half, ids, mask, doc_scores, heads=heads) == expected
        assert len(answers_of(model, ids, mask, doc_scores, heads=heads)) == QUESTIONS


@torch.no_grad()
def test_positions_that_the_prompt_takes_are_not_the_answers():
    lm = make_lm("llama")
    ids, mask = torch.arange(3, 17).view(2, 7), torch.ones(2, 7, dtype=torch.long)
    decoder = decoder_of(lm)
    for heads in (None, np.array([6, 2])):  # the longest head with the longest rest would be eleven
        search = Search(lm, {"max_length": MAX_LENGTH}, decoder, decoder.read(ids, mask, heads), ids)
        assert search.stops[0].max_position_embeddings == 64 - 7


def test_adapters_run_as_modules():
    peft = pytest.importorskip("peft")
    lm = make_lm("llama")
    model = make_rag(RagSequenceForGeneration, lm)
    ids, mask, doc_scores, heads = make_contexts(0)
    before = answers_of(model, ids, mask, doc_scores)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), lm)
    expected = sequence_reference(lm.double(), ids, mask, doc_scores, 4)
    assert answers_of(model, ids, mask, doc_scores, heads=heads) == expected != before


def test_benchmark_compares_and_ends_where_answers_differ(monkeypatch):
    monkeypatch.setattr(language_model, "SMALL", {"vocab_size": 500, "num_hidden_layers": 2, "intermediate_size": 64})
    args = language_model.parse_args(["--part", "decode", "--short", "--n_docs", "3"])
    result = language_model.main(args)
    assert (result["same"], result["asked"]) == (1, 1) and result["speed"] > 0 < result["second"]
    ours = Sides.ours
    monkeypatch.setattr(Sides, "ours", lambda *given: ours(*given)[:-1])
    with pytest.raises(SystemExit, match="in float64 too"):
        language_model.main(args)
