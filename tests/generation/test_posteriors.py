"""rag/generation/posteriors.py: a passage's part in an answer is Bayes' rule on full passes, one at a time."""

import pytest
import torch
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from rag.generation.decoding import generate_answers
from tests.generation.test_causal_decoder import START, make_lm, prompts_of
from tests.generation.test_causal_decoder import make_contexts as make_prompts
from tests.generation.test_decoding import MAKE, make_contexts, make_rag, trim

MAX_LENGTH, N_DOCS = 7, 4
ABSENT = float("-inf")


@torch.no_grad()
def token_log_probs(generator, ids, mask, answer: list[int], start: int) -> list[float]:
    """log p(y_t | x, z, y_<t) of an answer's tokens behind its first, by one full pass."""
    if generator.config.is_encoder_decoder:
        logits = generator(ids[None], attention_mask=mask[None], decoder_input_ids=torch.tensor([answer[:-1]])).logits[
            0
        ]
    else:
        (prompt,) = prompts_of(ids[None], mask[None])
        assert prompt[-1] == start
        logits = generator(torch.tensor([prompt + answer[1:-1]])).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer[1:])[:, None])[:, 0].tolist()


def brute_force(model, contexts, answers: list[list[int]], of_tokens: bool):
    """Of each question the documents' shares, of each token where they draw their own, and the answer's log p(y|x)."""
    ids, mask, doc_scores = contexts
    found = []
    for question, answer in enumerate(answers):
        rows = slice(question * N_DOCS, (question + 1) * N_DOCS)
        pairs = zip(ids[rows], mask[rows], strict=True)
        log_probs = torch.tensor([token_log_probs(model.generator, *pair, answer, START) for pair in pairs]).double()
        prior = doc_scores[question].double().log_softmax(0)
        if of_tokens:
            weights = (prior[:, None] + log_probs).exp().T
            found.append((weights / weights.sum(1, keepdim=True), weights.sum(1).log().sum()))
        else:
            weights = (prior + log_probs.sum(1)).exp()
            found.append((weights / weights.sum(), weights.sum().log()))
    return found


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["bart", "t5", "llama", "qwen3"])
@pytest.mark.parametrize("model_class", [RagSequenceForGeneration, RagTokenForGeneration])
def test_posteriors_are_bayes_rule_on_full_passes(model_class, kind, num_beams):
    if kind in MAKE:
        generator = MAKE[kind](0)
        contexts = make_contexts(generator.config.pad_token_id, n_docs=N_DOCS)
    else:
        generator = make_lm(kind)
        *contexts, _ = make_prompts(1)
    ids, mask, doc_scores = contexts
    doc_scores = doc_scores.clone()
    doc_scores[0, 1] = doc_scores[1, 2] = ABSENT
    model = make_rag(model_class, generator)
    of_tokens = model_class is RagTokenForGeneration
    settings = {"n_docs": N_DOCS, "num_beams": num_beams, "max_length": MAX_LENGTH, "min_length": 0}
    noted = []
    token_ids = generate_answers(model, ids, mask, doc_scores, note_posteriors=noted.append, **settings)
    (posteriors,) = noted
    assert torch.equal(token_ids, generate_answers(model, ids, mask, doc_scores, **settings))
    answers = trim(token_ids, generator.config.pad_token_id)
    expected = brute_force(model, (ids, mask, doc_scores), answers, of_tokens)
    torch.testing.assert_close(posteriors.passages.sum(1), torch.ones(len(answers)))
    assert posteriors.passages[0, 1] == posteriors.passages[1, 2] == 0
    for question, (own, log_prob) in enumerate(expected):
        torch.testing.assert_close(posteriors.answers[question], log_prob.float(), atol=1e-4, rtol=1e-4)
        whole = own.mean(0) if of_tokens else own
        torch.testing.assert_close(posteriors.passages[question], whole.float(), atol=1e-5, rtol=1e-4)
        if of_tokens:
            tokens = posteriors.tokens[question]
            torch.testing.assert_close(tokens[: len(own)], own.float(), atol=1e-5, rtol=1e-4)
            assert not tokens[len(own) :].any()
    assert of_tokens == (posteriors.tokens is not None)
    assert posteriors.passages.std() > 0.05, "equal shares show nothing"
