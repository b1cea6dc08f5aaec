"""Layers with a backward pass of their own, beside transformers' and peft's modules over the same row."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from rag.generation import causal
from rag.generation.causal_layers import FAMILIES, is_plain
from tests.conftest import assert_equal_but_for_rounding
from tests.generation.test_causal import (  # noqa: F401
    Batch,
    gradients,
    in_a_row,
    language_model,
    norms_in_the_weights_precision,
)  # fmt: skip


@pytest.fixture
def by_modules(monkeypatch):
    """Losses and gradients of a batch, by the modules."""

    def run(model, batch, **given):
        with monkeypatch.context() as patch:
            patch.setattr(causal, "is_plain", lambda generator: False)
            losses = in_a_row(model, batch, **given)
        return losses, gradients(model, losses)

    return run


def adapted(model, **settings):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = copy.deepcopy(model).requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(**config | settings), model)


def biases_and_norms_too(model):
    """All that may be trained beside adapters."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "layers.1.mlp" in name:
            parameter.requires_grad_()
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_are_those_of_the_modules(family, shared, by_modules):
    batch, model = Batch(shared=shared), biases_and_norms_too(language_model(family))
    assert is_plain(model)
    expected, expected_gradients = by_modules(model, batch, heads=batch.heads)
    found = in_a_row(model, batch, heads=batch.heads)
    assert_equal_but_for_rounding(found.detach(), expected.detach())
    assert_equal_but_for_rounding(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_bfloat16_is_as_near_to_float64_as_the_modules_are(family, how, by_modules):
    batch, model = Batch(), language_model(family)
    exact = in_a_row(model, batch, heads=batch.heads)
    exact_gradients = gradients(model, exact)
    model = model.to(torch.float32 if how == "autocast" else torch.bfloat16)

    def distances(losses, own):
        assert {name: gradient.dtype for name, gradient in own.items()} == {
            name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        joined, right = (torch.cat([side[n].flatten().double() for n in own]) for side in (own, exact_gradients))
        return (losses - exact).norm() / exact.norm(), (joined - right).norm() / right.norm()

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        theirs = distances(*by_modules(model, batch, heads=batch.heads))
        losses = in_a_row(model, batch, heads=batch.heads)
    for ours, bound in zip(distances(losses, gradients(model, losses)), theirs, strict=True):
        assert ours < max(2.5 * bound, 0.01)  # as far as chance goes


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_layer_that_is_to_be_computed_again_keeps_its_input_alone(family):
    batch, model = Batch(), language_model(family).train()
    expected = gradients(model, in_a_row(model, batch, heads=batch.heads))
    model.activation_checkpointing_enable()
    assert is_plain(model)
    losses = in_a_row(model, batch, heads=batch.heads)
    step, layers = losses.grad_fn, []
    while step is not None:
        layers += [step] if type(step).__name__ == "_LayerBackward" else []
        step = next((one for one, _ in step.next_functions if one is not None and "Accumulate" not in str(one)), None)
    assert len(layers) == 2 and all(layer.back is None and layer.hidden is not None for layer in layers)
    assert_equal_but_for_rounding(gradients(model, losses), expected)


def test_whether_all_layers_are_plain(monkeypatch):
    model = language_model("llama", lora=False)
    assert is_plain(model) and is_plain(adapted(model)) and is_plain(adapted(model, use_rslora=True))
    assert not is_plain(language_model("phi"))  # another build
    assert not is_plain(adapted(model, use_dora=True))
    assert not is_plain(adapted(model, lora_bias=True))
    dropping = adapted(model, lora_dropout=0.1)
    assert is_plain(dropping.eval()) and not is_plain(dropping.train())
    assert not is_plain(language_model("llama", attention_dropout=0.1).train())
    assert not is_plain(language_model("phi3", resid_pdrop=0.1).train())
    two = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), adapted(model), "second")
    assert is_plain(two)
    two.model.layers[0].self_attn.q_proj._active_adapter = ["default", "second"]
    assert not is_plain(two)
    watched = adapted(model)
    watched.model.layers[1].mlp.down_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    assert not is_plain(watched)

    class Quantized(nn.Linear):
        pass

    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj = Quantized(32, 48)
    assert not is_plain(other)


@pytest.mark.parametrize("state", ["merged", "disabled", "frozen"])
def test_adapters_that_are_merged_disabled_or_frozen(state, by_modules):
    batch, model = Batch(), language_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name if state != "frozen" else "lora_B" in name)
    for part in model.modules():
        if hasattr(part, "lora_A"):
            part.merge() if state == "merged" else part._disable_adapters or setattr(
                part, "_disable_adapters", state == "disabled"
            )
    assert is_plain(model)
    expected, expected_gradients = by_modules(model, batch, heads=batch.heads)
    found = in_a_row(model, batch, heads=batch.heads)
    assert_equal_but_for_rounding(found.detach(), expected.detach())
    assert_equal_but_for_rounding(gradients(model, found), expected_gradients)


def test_without_gradients_nothing_is_kept():
    batch, model = Batch(), language_model("llama")
    expected = batch.states(model)[0].detach()
    with torch.no_grad():
        found = batch.states(model)[0]
    assert found.equal(expected) and found.grad_fn is None
    with torch.inference_mode():
        assert_equal_but_for_rounding(batch.states(model)[0], expected)
