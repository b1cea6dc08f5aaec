"""BART's layers with a backward pass of their own, against transformers' modules on the same weights."""

import copy

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartModel

from rag.generation.bart_layers import is_plain, run_layer
from rag.packing import Attention, Packing, accept_packed_rows
from tests.conftest import assert_equal_but_for_rounding

CPU = torch.device("cpu")
CONTEXTS, ANSWERS = Packing(np.array([7, 2, 11]), CPU), Packing(np.array([3, 1, 4]), CPU)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = BartModel(config).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    accept_packed_rows(model)
    return model.train()


def inputs(side: str) -> tuple[torch.Tensor, list]:
    """Hidden states, and what else a layer reads."""
    encoded = torch.randn(CONTEXTS.tokens, 16, dtype=torch.float64, requires_grad=True)
    if side == "encoder":
        return encoded, [Attention(CONTEXTS, CONTEXTS)]
    hidden = torch.randn(ANSWERS.tokens, 16, dtype=torch.float64, requires_grad=True)
    return hidden, [Attention(ANSWERS, ANSWERS, causal=True), encoded, Attention(ANSWERS, CONTEXTS)]


def by_module(layer, hidden, own, encoded=None, cross=None):
    extras = [] if encoded is None else [encoded[None], cross]
    return layer(hidden[None], own, *extras)[0]


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("frozen", [(), ("self_attn.k_proj.weight", "fc1.bias", "final_layer_norm.weight")])
def test_results_and_gradients_are_those_of_the_module(side, frozen, model):
    layer = getattr(model, side).layers[0]
    for name, weight in layer.named_parameters():
        weight.requires_grad_(name not in frozen)
    hidden, extras = inputs(side)
    found, expected = run_layer(layer, hidden, *extras), by_module(layer, hidden, *extras)
    assert_equal_but_for_rounding(found, expected)
    wanted = [hidden, *(one for one in extras if isinstance(one, torch.Tensor))]
    wanted += [weight for weight in layer.parameters() if weight.requires_grad]
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(one, wanted, direction) for one in (found, expected))
    assert_equal_but_for_rounding(*({str(n): one for n, one in enumerate(side)} for side in (ours, theirs)))


def test_with_dropout_gradients_are_those_of_what_was_drawn(model):
    """By differences: the same random numbers are drawn again. Attention's own dropout is the kernel's matter."""
    layer = model.encoder.layers[0]
    layer.dropout, layer.activation_dropout = 0.3, 0.2
    hidden, extras = inputs("encoder")
    direction = torch.randn(len(hidden), 16, dtype=torch.float64)

    def value(rows):
        torch.manual_seed(1)
        return (run_layer(layer, rows, *extras) * direction).sum()

    gradient = torch.autograd.grad(value(hidden), hidden)[0]
    step = torch.randn_like(hidden)
    with torch.no_grad():
        difference = (value(hidden + 1e-5 * step) - value(hidden - 1e-5 * step)) / 2e-5
    assert abs((gradient * step).sum() - difference) < 1e-6 * abs(difference)
    assert run_layer(layer, hidden, *extras).ne(run_layer(layer.eval(), hidden, *extras)).any()


def test_weights_that_changed_are_cast_again(model):
    layer = model.encoder.layers[0]
    hidden, extras = inputs("encoder")
    before = run_layer(layer, hidden, *extras)
    with torch.no_grad():
        layer.fc2.weight.mul_(2.0)
    after = run_layer(layer, hidden, *extras)
    assert before.ne(after).any()
    assert_equal_but_for_rounding(after, by_module(layer, hidden, *extras))
    layer.fc1.weight = torch.nn.Parameter(layer.fc1.weight * 2)  # another object
    assert_equal_but_for_rounding(run_layer(layer, hidden, *extras), by_module(layer, hidden, *extras))


def test_in_bfloat16_they_are_near_those_of_the_module_and_weights_gradients_are_their_own(model):
    layer = model.float().decoder.layers[0]
    hidden, (own, encoded, cross) = inputs("decoder")
    hidden, encoded = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, encoded))
    found = run_layer(layer, hidden, own, encoded, cross)
    expected = by_module(layer, hidden.float(), own, encoded.float(), cross)
    assert found.dtype == torch.bfloat16
    wanted, direction = list(layer.parameters()), torch.randn_like(expected)
    ours = torch.autograd.grad(found, wanted, direction.bfloat16())
    theirs = torch.autograd.grad(expected, wanted, direction)
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    flat, right = (torch.cat([gradient.flatten() for gradient in side]) for side in (ours, theirs))
    assert flat.dtype == torch.float32 and (flat - right).norm() < 0.05 * right.norm()


def test_what_is_wrapped_compiled_or_recomputed_stays_a_module(model):
    encoder = model.encoder.layers[0]
    assert is_plain(encoder) and is_plain(model.decoder.layers[0])
    adapted, compiled, recomputed = (copy.deepcopy(encoder) for _ in range(3))
    adapted.fc1 = torch.nn.Sequential(adapted.fc1)
    compiled.compile(backend="eager")
    recomputed.gradient_checkpointing = True
    assert not any(map(is_plain, (adapted, compiled, recomputed)))


@pytest.mark.cuda
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_on_a_gpu_in_bfloat16_they_are_near_the_modules_in_float32(side, model):
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = BartConfig(
        d_model=256, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=512, decoder_ffn_dim=512,
        encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, attention_dropout=0.0, vocab_size=60,
    )  # fmt: skip
    model = BartModel(config).to(device).train()
    accept_packed_rows(model)
    layer = getattr(model, side).layers[0]
    contexts, answers = Packing(CONTEXTS.lengths * 9, device), Packing(ANSWERS.lengths, device)
    encoded = torch.randn(contexts.tokens, 256, device=device, requires_grad=True)
    hidden, extras = encoded, [Attention(contexts, contexts)]
    if side == "decoder":
        hidden = torch.randn(answers.tokens, 256, device=device, requires_grad=True)
        extras = [Attention(answers, answers, causal=True), encoded, Attention(answers, contexts)]
    halves = [one.bfloat16() if isinstance(one, torch.Tensor) else one for one in extras]
    found, expected = run_layer(layer, hidden.bfloat16(), *halves), by_module(layer, hidden, *extras)
    wanted, direction = [hidden, *layer.parameters()], torch.randn_like(expected)
    ours = torch.autograd.grad(found, wanted, direction.bfloat16())
    theirs = torch.autograd.grad(expected, wanted, direction)
    flat, right = (torch.cat([gradient.flatten() for gradient in one]) for one in (ours, theirs))
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    assert (flat - right).norm() < 0.05 * right.norm()
