"""A language model over one row of prompts and answers, beside one pass of transformers' model a passage."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.functional import rms_norm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from rag.generation.causal import PromptRow, states_of_answers
from rag.generation.forward import answer_states, output_layer
from rag.generation.stacks import use_packed_rows
from rag.packing import Heads, Packing
from rag.training.loss import rag_sequence_nll, rag_token_nll
from tests.conftest import assert_equal_but_for_rounding

PAD, START, WORDS = 0, 2, 61
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 5},
    "phi3": {"pad_token_id": PAD, "original_max_position_embeddings": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": PAD},
}
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip


def language_model(family: str, lora: bool = True, dtype=torch.float64, **settings):
    """With adapters whose second factor is not zero, as behind some steps; norms and biases as trained ones."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(SIZES | FAMILIES.get(family, {}) | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    if lora:
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), model)
        targets = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
        assert len(targets) >= 2 * 4
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    use_packed_rows(model)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def norms_in_the_weights_precision(monkeypatch):
    """transformers takes variances in float32, also of a model in float64."""

    def forward(norm, hidden):
        is_gemma = "Gemma" in type(norm).__name__
        eps = norm.eps if is_gemma else norm.variance_epsilon
        return rms_norm(hidden, norm.weight.shape, norm.weight + 1.0 if is_gemma else norm.weight, eps)

    for module in (llama, qwen2, qwen3, gemma3, mistral, phi3, smollm3, granite):
        for name in vars(module):
            if name.endswith("RMSNorm"):
                monkeypatch.setattr(getattr(module, name), "forward", forward)


class Batch:
    """Questions with three passages each, some of which several of them have; prompts begin with the passage."""

    def __init__(self, questions: int = 2, shared: bool = True, side: str = "right"):
        random = np.random.default_rng(0)
        passages = [random.integers(4, WORDS, size).tolist() for size in (9, 4, 11, 1, 7, 6)]
        chosen = [[0, 1, 2], [2, 0, 3]] if shared else [[0, 1, 2], [3, 4, 5]]
        self.prompts, firsts = [], {}
        self.heads = Heads(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        for own in chosen[:questions]:
            question = random.integers(4, WORDS, random.integers(1, 6)).tolist()
            for passage in own:
                first = firsts.setdefault(passage, len(self.prompts))
                self.prompts.append(passages[passage] + question)
                self.heads.lengths = np.append(self.heads.lengths, len(passages[passage]))
                self.heads.first = np.append(self.heads.first, first)
        width = max(map(len, self.prompts)) + 1
        rows = [self._padded(prompt, width, side) for prompt in self.prompts]
        self.ids, self.mask = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
        self.answers = [[9, 10, 3], [11, 3]][:questions]
        width = max(map(len, self.answers))
        self.targets = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in self.answers])
        self.decoder_ids = torch.cat([torch.full((questions, 1), START), self.targets[:, :-1]], 1)
        self.scores = torch.tensor([[0.3, -0.2, 0.9], [1.1, 0.4, -0.5]][:questions], dtype=torch.float64)

    @staticmethod
    def _padded(prompt: list[int], width: int, side: str) -> tuple[list[int], list[int]]:
        missing = width - len(prompt)
        ones, zeros, pads = [1] * len(prompt), [0] * missing, [PAD] * missing
        return (prompt + pads, ones + zeros) if side == "right" else (pads + prompt, zeros + ones)

    def states(self, model, **given):
        lengths = np.array([len(answer) for answer in self.answers])
        return answer_states(model, self.ids, self.mask, self.decoder_ids, decoder_lengths=lengths, **given)


def in_a_loop(model, batch: Batch, smoothing: float = 0.0, per_token: bool = False) -> torch.Tensor:
    """The losses (B) of whole logits, by a pass of transformers' model for each passage."""
    losses = []
    for question, answer in enumerate(batch.answers):
        prompts = batch.prompts[3 * question : 3 * question + 3]
        logprobs = []  # of each passage, (T, V)
        for prompt in prompts:
            logits = model(torch.tensor([[*prompt, START, *answer[:-1]]])).logits
            logprobs.append(logits[0, len(prompt) :].log_softmax(-1))
        logprobs = torch.stack(logprobs)
        prior = batch.scores[question].to(logprobs.dtype).log_softmax(0)
        target = logprobs[:, range(len(answer)), answer]  # (3, T)
        every = logprobs.sum(-1)
        if per_token:
            nll = -(target + prior[:, None]).logsumexp(0).sum()
            every = -(logprobs + prior[:, None, None]).logsumexp(0).sum()
        else:
            nll, every = -(target.sum(1) + prior).logsumexp(0), -(every.sum(1) + WORDS * prior).logsumexp(0)
        losses.append((1 - smoothing) * nll + (smoothing / WORDS * every if smoothing else 0.0))
    return torch.stack(losses)


def in_a_row(model, batch: Batch, smoothing: float = 0.0, per_token: bool = False, **given) -> torch.Tensor:
    hidden, answers = batch.states(model, **given)
    assert hidden.shape == (3 * sum(map(len, batch.answers)), model.config.hidden_size)
    nll = rag_token_nll if per_token else rag_sequence_nll
    return nll(hidden, output_layer(model), batch.scores, batch.targets, PAD, smoothing, answers)


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_a_loop(model, batch: Batch, *settings, **given):
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    theirs, ours = in_a_loop(plain, batch, *settings), in_a_row(model, batch, *settings, **given)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[hidden_dtype(model)]
    torch.testing.assert_close(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance)
    expected, found = gradients(plain, theirs), gradients(model, ours)
    assert found.keys() == expected.keys() and found
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance * float(largest))


def hidden_dtype(model) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_adapters_gradients_are_those_of_a_pass_a_passage(family, shared, dtype):
    batch = Batch(shared=shared)
    assert_equal_to_a_loop(language_model(family, dtype=dtype), batch, heads=batch.heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_can_be_trained(family):
    batch = Batch()
    assert_equal_to_a_loop(language_model(family, lora=False), batch, heads=batch.heads)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("missing", [True, False])
def test_both_losses_with_smoothing_and_a_missing_passage(smoothing, per_token, missing):
    batch = Batch()
    if missing and smoothing:
        pytest.skip("the loop's own sum has no value there; tests/training/test_loss.py has")
    if missing:
        batch.scores[1, 2] = float("-inf")
    assert_equal_to_a_loop(language_model("qwen3"), batch, smoothing, per_token, heads=batch.heads)


@pytest.mark.parametrize("questions", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_gives_equal_numbers(family, questions):
    model = language_model(family)
    right, left = (Batch(questions, side=side) for side in ("right", "left"))
    lengths = np.array([len(prompt) for prompt in right.prompts])
    expected = right.states(model)[0]
    assert left.states(model)[0].equal(expected)
    assert right.states(model, lengths=lengths)[0].equal(expected)
    assert_equal_but_for_rounding(left.states(model, heads=left.heads)[0], expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi"])
def test_checkpointed_layers_have_the_same_gradients(family):
    batch, model = Batch(), language_model(family)
    expected = gradients(model, in_a_row(model, batch, heads=batch.heads))
    model.activation_checkpointing_enable()
    model.train()
    found = gradients(model, in_a_row(model, batch, heads=batch.heads))
    for name, gradient in found.items():
        assert_equal_but_for_rounding(gradient, expected[name])


def test_with_dropout_each_prompt_draws_for_itself():
    """Its rate is attention's; shared heads would have shared their draws."""
    batch, model = Batch(), language_model("llama", attention_dropout=0.5).train()
    batch.ids[3:] = batch.ids[2]
    batch.mask[3:] = batch.mask[2]
    batch.heads.first[3:], batch.heads.lengths[3:] = 2, batch.heads.lengths[2]
    hidden, answers = batch.states(model, heads=batch.heads)
    first = answers.unpack(hidden)[3:, 0]
    assert not torch.allclose(first[0], first[1])
    first = answers.unpack(batch.states(model.eval(), heads=batch.heads)[0])[3:, 0]
    assert torch.allclose(first[0], first[1])


def test_an_attention_that_knows_no_rows_is_given_padded_ones():
    batch, model = Batch(), language_model("llama", dtype=torch.float32)  # its softmax is of float32, whatever comes
    expected = batch.states(model, heads=batch.heads)[0]
    model.set_attn_implementation("eager")
    assert_equal_but_for_rounding(batch.states(model, heads=batch.heads)[0], expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_bfloat16_numbers_are_near(family):
    batch, model = Batch(), language_model(family, dtype=torch.float32)
    expected = batch.states(model, heads=batch.heads)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = batch.states(model, heads=batch.heads)[0]
    half = batch.states(model.to(torch.bfloat16), heads=batch.heads)[0]
    for found in (mixed, half):
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("family", "scale"), [("granite", {"logits_scaling": 3.0}), ("cohere", {"logit_scale": 0.25})])
def test_families_that_scale_their_logits(family, scale):
    batch = Batch()
    assert_equal_to_a_loop(language_model(family, dtype=torch.float32, **scale), batch, heads=batch.heads)


def test_what_is_shared_passes_the_layers_once():
    batch, model, seen = Batch(), language_model("llama"), []
    model.base_model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    hidden, _ = states_of_answers(model, batch.ids, batch.mask, batch.decoder_ids, heads=batch.heads)
    rests = batch.mask.sum().item() - batch.heads.lengths.sum() + 6 * batch.decoder_ids.shape[1]
    distinct = batch.heads.lengths[np.unique(batch.heads.first)].sum()
    assert sum(rows.numel() // 32 for rows in seen) == distinct + rests
    assert len(hidden) == 6 * batch.decoder_ids.shape[1]


def test_a_row_says_where_its_tokens_lie():
    heads = Heads(np.array([3, 2, 3, 0]), np.array([0, 1, 0, 3]))
    row = PromptRow(np.array([4, 2, 5, 1]), Packing(np.array([2, 1, 1, 1]), torch.device("cpu")), heads)
    assert row.queries.lengths.tolist() == [3, 3, 3, 3, 2] and row.keys.lengths.tolist() == [3, 6, 3, 6, 2]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]
    assert row.key_places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 9, 10, 11, 12, 13]
    assert row.answer_places.tolist() == [4, 5, 8, 11, 13]
    assert row.token_places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16]
