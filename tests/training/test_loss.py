"""Our losses against transformers' own classes, on the same weights and batch."""

import pytest
import torch
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from rag import packing
from rag.generation import logprobs
from rag.generation.forward import decode_answers, encode_contexts, output_layer
from rag.generation.stacks import use_packed_rows
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from rag.training import loss as loss_module
from rag.training.loss import _logit_sum, decoder_inputs_and_targets, rag_sequence_nll, rag_token_nll, sequence_nll
from tests.conftest import QUESTIONS, assert_equal_but_for_rounding, in_float64, make_rag

LOSSES = {RagSequenceForGeneration: rag_sequence_nll, RagTokenForGeneration: rag_token_nll}


@pytest.fixture(params=["bart", "t5"])
def generator(request):
    """A generator and its tokenizer: BART starts its answers with </s><s>, T5 with <pad> and has no <s>."""
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("model_class", LOSSES)
def test_loss_and_gradients_equal_transformers(
    model_class, label_smoothing, dtype, generator, question_encoder, knowledge, bert_tokenizer, monkeypatch
):
    """With contexts in several groups and the vocabulary in several parts."""
    monkeypatch.setattr(packing, "GROUP_COST", 1)
    for module in (loss_module, logprobs):
        monkeypatch.setattr(module, "CHUNK_VOCABULARY", 32)
    generator, tokenizer = generator
    model = make_rag(model_class, question_encoder, generator, knowledge, label_smoothing=label_smoothing)
    if dtype == torch.float64:
        model = in_float64(model)
    retriever = RagKnowledgeRetriever(model.config, bert_tokenizer, tokenizer)
    questions = bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt")
    answers = [answer + " of the sea" * (i % 3) for i, (_, answer) in enumerate(QUESTIONS)]  # ragged
    labels = tokenizer(answers, padding=True, return_tensors="pt").input_ids
    decoder_input_ids, targets = decoder_inputs_and_targets(labels, generator.config)

    def gradients(losses):
        model.zero_grad()
        losses.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    contexts = retrieve_contexts(model.rag, retriever, **questions)
    use_packed_rows(model.generator)
    encoded = encode_contexts(model.generator, contexts.input_ids, contexts.attention_mask)
    lengths = (targets != generator.config.pad_token_id).sum(1).numpy()
    hidden, packed = decode_answers(model.generator, encoded, decoder_input_ids, lengths)
    assert packed is not None and lengths.min() < lengths.max()
    layer, pad_token_id = output_layer(model.generator), generator.config.pad_token_id
    ours = LOSSES[model_class](
        hidden, layer, contexts.doc_scores, targets, pad_token_id, label_smoothing, answers=packed
    )
    our_gradients = gradients(ours)
    model.set_retriever(retriever)
    theirs = model(**questions, labels=decoder_input_ids).loss
    their_gradients = gradients(theirs)

    assert ours.dtype == dtype
    assert_equal_but_for_rounding(ours, theirs)
    assert_equal_but_for_rounding(our_gradients, their_gradients)
    assert any(name.startswith("rag.question_encoder") for name in our_gradients)


@pytest.mark.parametrize("loss", LOSSES.values())
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_document_without_probability_changes_nothing(loss, label_smoothing):
    torch.manual_seed(0)
    hidden, scores = torch.randn(2 * 3, 4, 5).double(), torch.randn(2, 3).double().requires_grad_()
    layer = torch.randn(11, 5).double(), torch.randn(11).double()
    targets = torch.tensor([[3, 4, 5, 1], [6, 1, 1, 1]])
    without = loss(hidden.view(2, 3, 4, 5)[:, :2].flatten(0, 1), layer, scores[:, :2], targets, 1, label_smoothing)
    masked = scores.masked_fill(torch.tensor([False, False, True]), float("-inf"))
    with_missing = loss(hidden, layer, masked, targets, 1, label_smoothing)
    assert_equal_but_for_rounding(with_missing, without)
    gradient = torch.autograd.grad(with_missing.sum(), scores)[0]
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = (torch.randn(2, 4, 50_000) * 8).half()
    targets = torch.randint(2, 50_000, (2, 4))
    smoothed = sequence_nll(logits, targets, pad_token_id=1, label_smoothing=0.1)
    assert smoothed.dtype == torch.float32 and smoothed.isfinite().all()
    torch.testing.assert_close(smoothed, sequence_nll(logits.float(), targets, 1, 0.1))


def test_bare_generator_loss_is_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 13).double()
    targets = torch.tensor([[2, 3, 4, 5, 6], [2, 3, 1, 1, 1], [7, 1, 1, 1, 1]])
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=1, label_smoothing=0.1, reduction="none"
    ).sum(1)
    assert_equal_but_for_rounding(sequence_nll(logits, targets, 1, 0.1), expected)


def test_decoder_inputs_start_as_generation_does(bart, bart_tokenizer, t5, t5_tokenizer):
    paris = bart_tokenizer("paris", return_tensors="pt").input_ids
    word = paris[0, 1].item()
    inputs, targets = decoder_inputs_and_targets(paris, bart.config)
    assert inputs.tolist() == [[2, 0, word, 2]] and targets.tolist() == [[0, word, 2, 1]]
    inputs, targets = decoder_inputs_and_targets(t5_tokenizer("paris", return_tensors="pt").input_ids, t5.config)
    assert inputs.tolist() == [[0, word - 1, 1]] and targets.tolist() == [[word - 1, 1, 0]]
    # A BERT-like tokenizer puts the start token first itself.
    inputs, targets = decoder_inputs_and_targets(torch.tensor([[2, 9, 3]]), bart.config)
    assert inputs.tolist() == [[2, 9, 3]] and targets.tolist() == [[9, 3, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smoothing_under_autocast_sums_the_logits_in_float32(dtype):
    """Half precision cannot hold a sum of 50,000 logits of about 7."""
    hidden, weight = torch.ones(1, 2, 4), torch.full((50265, 4), 1.72)
    expected = _logit_sum(hidden, weight, torch.zeros(50265))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(_logit_sum(hidden, weight, torch.zeros(50265)), expected)
