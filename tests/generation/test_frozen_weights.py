"""Frozen weights in half precision, as autocast would have cast them: the same numbers in half the memory."""

import pytest
import torch

from rag.casting import hold_frozen_weights
from rag.generation.forward import answer_states, output_layer
from rag.generation.stacks import use_packed_rows
from rag.models.adapters import LoraPlan, add_adapters
from rag.training.loss import rag_sequence_nll
from tests.conftest import make_language_model

WORDS = 60


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_losses_and_gradients_stay_the_same(family):
    generator = make_language_model(family, WORDS)
    generator.config.decoder_start_token_id = 3
    add_adapters(generator, LoraPlan(r=2, alpha=4))
    for name, weight in generator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    use_packed_rows(generator)
    random = torch.Generator().manual_seed(0)
    ids, answers = (torch.randint(4, WORDS, shape, generator=random) for shape in ((4, 9), (2, 3)))
    outcomes = []
    for holds in (False, True):
        if holds:
            hold_frozen_weights(generator, torch.bfloat16)
        generator.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden, packing = answer_states(generator, ids, torch.ones_like(ids), answers)
            scores = torch.zeros(2, 2)
            loss = rag_sequence_nll(hidden, output_layer(generator), scores, answers, 2, answers=packing).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
        outcomes.append((loss.detach(), gradients))
    (loss, gradients), (held_loss, held_gradients) = outcomes
    assert torch.equal(loss, held_loss) and gradients.keys() == held_gradients.keys() and gradients
    assert all(torch.equal(gradient, held_gradients[name]) for name, gradient in gradients.items())
    kept = {name for name, weight in generator.named_parameters() if weight.dtype == torch.float32}
    assert any("lora_" in name for name in kept) and any("embed" in name for name in kept)
    assert not any("proj.base_layer.weight" in name for name in kept)
