"""The generator in training: contexts and answers in packed rows, logits in parts, half precision, fused attention."""

import copy
import itertools

import numpy as np
import pytest
import torch

from rag.generation import logprobs
from rag.generation.forward import decode_answers, encode_contexts, output_layer
from rag.generation.stacks import use_packed_rows
from rag.packing import groups_of_similar_length
from rag.training.loss import rag_sequence_nll, rag_token_nll
from tests.conftest import assert_equal_but_for_rounding, in_float64


def cost(lengths, groups, group_cost):
    assert sorted(row for rows, _ in groups for row in rows) == list(range(len(lengths)))
    assert all(longest == max(lengths[row] for row in rows) for rows, longest in groups)
    return sum(len(rows) * longest + group_cost for rows, longest in groups)


def test_groups_are_the_cheapest_there_are():
    random = np.random.default_rng(0)
    for group_cost in (1, 10, 40, 1000):
        lengths = random.integers(1, 50, size=7)
        order, cheapest = np.argsort(lengths), np.inf
        for cuts in itertools.product([False, True], repeat=6):
            parts = np.split(order, [i + 1 for i, cut in enumerate(cuts) if cut])
            cheapest = min(cheapest, sum(len(rows) * lengths[rows].max() + group_cost for rows in parts))
        assert cost(lengths, groups_of_similar_length(lengths, group_cost), group_cost) == cheapest
    assert len(groups_of_similar_length(np.full(9, 30), 1)) == 1


def test_a_group_holds_no_more_tokens_than_it_may():
    lengths = np.random.default_rng(1).integers(1, 50, size=40)
    groups = groups_of_similar_length(lengths, 1000, group_tokens=100)
    cost(lengths, groups, 1000)
    assert all(len(rows) * longest <= 100 for rows, longest in groups)
    assert len(groups_of_similar_length(np.full(9, 30), 1, group_tokens=90)) == 3
    assert len(groups_of_similar_length(np.array([200, 1, 300]), 1000, group_tokens=100)) == 3


@pytest.fixture
def contexts():
    """Seven contexts of 1 to 23 tokens, ids (7, 24) and mask."""
    torch.manual_seed(0)
    mask = (torch.arange(24) < torch.tensor([[23], [3], [9], [1], [20], [4], [9]])).long()
    return torch.randint(4, 60, mask.shape).where(mask == 1, 1), mask


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_contexts_and_answers_are_read_as_padded_ones(name, side, contexts, request):
    generator = in_float64(copy.deepcopy(request.getfixturevalue(name)))
    use_packed_rows(generator)
    ids, mask = contexts if side == "right" else (tensor.flip(1) for tensor in contexts)
    encoded = encode_contexts(generator, ids, mask)
    expected = generator.get_encoder()(ids, attention_mask=mask)[0]
    assert (encoded.packing is not None) == (side == "right")  # else positions count what stands before the text
    found = encoded.hidden if encoded.packing is None else encoded.packing.unpack(encoded.hidden, ids.shape[1])
    assert_equal_but_for_rounding(found[mask == 1], expected[mask == 1])
    decoder_ids, lengths = torch.randint(4, 60, (7, 5)), np.array([5, 2, 1, 5, 3, 4, 5])
    hidden, answers = decode_answers(generator, encoded, decoder_ids, lengths)
    weight, bias = output_layer(generator)
    logits = generator(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    if answers is not None:
        assert len(encoded.hidden) == mask.sum() and len(hidden) == lengths.sum()
        logits = answers.pack(logits)
    assert_equal_but_for_rounding(hidden @ weight.T + bias, logits)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_step_in_bfloat16_goes_on_behind_what_was_read_in_inference_mode(name, contexts, request):
    """As behind a validation, whose tensors no step may use."""
    generator = copy.deepcopy(request.getfixturevalue(name))
    use_packed_rows(generator)
    decoder_ids = torch.randint(4, 60, (7, 5))

    def read():
        with torch.autocast("cpu", torch.bfloat16):
            return decode_answers(generator, encode_contexts(generator, *contexts), decoder_ids)[0].float()

    with torch.inference_mode():
        found = read()
    trained = read()
    trained.sum().backward()
    torch.testing.assert_close(found.clone(), trained, rtol=0.05, atol=0.05)
    assert all(w.grad is not None for n, w in generator.named_parameters() if "layer_norm" in n)


def test_another_attention_that_was_chosen_stays(bart, contexts):
    generator = copy.deepcopy(bart)
    generator.set_attn_implementation("eager")
    use_packed_rows(generator)
    assert generator.config._attn_implementation == "eager" and encode_contexts(generator, *contexts).packing is None


@pytest.mark.parametrize("is_frozen", [False, True])
def test_log_probabilities_and_gradients_are_those_of_whole_logits(is_frozen, monkeypatch):
    """Of hidden states, and of a weight that is trained."""
    monkeypatch.setattr(logprobs, "CHUNK_VOCABULARY", 4)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape).double().requires_grad_() for shape in ((2, 3, 5), (11, 5)))
    weight.requires_grad_(not is_frozen)
    bias, targets = torch.randn(11).double(), torch.tensor([[0, 3, 4], [7, 8, 10]])
    logits = hidden @ weight.T + bias
    expected = torch.stack([logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], logits.logsumexp(-1)])
    weights = torch.randn(2, 2, 3).double()
    found = torch.stack(logprobs.target_logprobs(hidden, weight, bias, targets))
    assert_equal_but_for_rounding(found, expected)
    wanted = [hidden] if is_frozen else [hidden, weight]
    our_gradients, gradients = (torch.autograd.grad((weights * x).sum(), wanted) for x in (found, expected))
    for gradient, right in zip(our_gradients, gradients, strict=True):
        assert_equal_but_for_rounding(gradient, right)


@pytest.mark.parametrize("loss", [rag_sequence_nll, rag_token_nll])
def test_a_frozen_output_layer_gets_no_gradient(loss):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(11, 5)
    nll = loss(hidden, (weight, torch.zeros(11)), torch.randn(2, 2), torch.randint(2, 11, (2, 3)), 1)
    nll.sum().backward()
    assert weight.grad is None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", [rag_sequence_nll, rag_token_nll])
def test_half_precision_is_summed_in_float32(loss, label_smoothing):
    """Under autocast, as with --bf16: float32 results near those of full precision, gradients in the weights' own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True)
    bias, scores, targets = torch.randn(20_000), torch.randn(2, 2), torch.randint(2, 20_000, (2, 3))
    nll = loss(hidden, (weight, bias), scores, targets, 1, label_smoothing)
    gradients = torch.autograd.grad(nll.sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(hidden, (weight, bias), scores, targets, 1, label_smoothing)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, nll, rtol=0.02, atol=0.02)
    for gradient, right in zip(torch.autograd.grad(half.sum(), (hidden, weight)), gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() < 0.05 * right.norm()


def test_attention_is_not_materialised(checkpoint):
    """A RAG checkpoint's generator and question encoder are loaded with fused attention."""
    from rag.models.checkpoints import load_model

    model = load_model(str(checkpoint("rag_sequence", "bart")))
    kinds = {
        type(module).__name__: module.config._attn_implementation
        for module in model.modules()
        if "Attention" in type(module).__name__ and hasattr(module, "config")
    }
    assert {"BartAttention", "BertSelfAttention"} <= kinds.keys() and set(kinds.values()) == {"sdpa"}
