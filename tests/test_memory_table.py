"""The memory that docs/language_models.md says language models need, counted again from their shapes."""

import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.conftest import ROOT

# family, d, feed-forward, layers, query heads, key heads, head size, words, whether embeddings are the output layer
SHAPES = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
GB = 1e9
R = 16


def model_of(name: str):
    """The model on no device, and its config."""
    family, d, wide, layers, queries, keys, size, words, tied = SHAPES[name]
    config = CONFIG_MAPPING[family](
        hidden_size=d, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=queries,
        num_key_value_heads=keys, head_dim=size, vocab_size=words, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def counted(name: str) -> list[str]:
    """The cells of a row of the table."""
    model, config = model_of(name)
    parameters = sum(weight.numel() for weight in {id(weight): weight for weight in model.parameters()}.values())
    linear = [
        layer
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    ]
    in_half = sum(layer.weight.numel() for layer in linear)
    adapters = sum(R * (layer.in_features + layer.out_features) for layer in linear)
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    wide = 2 * queries + 2 * keys + 2 * config.intermediate_size + 7 * R
    layers, d = config.num_hidden_layers, config.hidden_size
    return [
        f"{parameters / 1e6:,.0f}M",
        f"{4 * parameters / GB:.1f}",
        f"{(2 * in_half + 4 * (parameters - in_half)) / GB:.1f}",
        f"{(0.516 * in_half + 4 * (parameters - in_half)) / GB:.1f}",
        f"{16 * adapters / GB:.2f}",
        f"{layers * (4 * 2 * d + 4 * wide) * 1e3 / GB:.1f}",
        f"{layers * (4 * 2 * d + 2 * wide) * 1e3 / GB:.1f}",
        f"{layers * 2 * 2 * keys * 1e3 / GB:.2f}",
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_the_table_is_counted(name):
    page = (ROOT / "docs" / "language_models.md").read_text()
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", page, flags=re.MULTILINE)
    assert row, f"| {name} | {' | '.join(counted(name))} |"
    assert [cell.strip() for cell in row[1].split("|")] == counted(name)


def test_what_a_step_keeps_is_what_the_formula_says():
    """Bytes that autograd holds of a small model's layers between forward and backward pass, a token."""
    from rag.generation.causal import states_of_answers
    from rag.generation.stacks import use_packed_rows
    from rag.models.adapters import LoraPlan, add_adapters

    family, d, wide, queries, keys, size = "llama", 64, 128, 4, 2, 16
    config = CONFIG_MAPPING[family](
        hidden_size=d, intermediate_size=wide, num_hidden_layers=6, num_attention_heads=queries,
        num_key_value_heads=keys, head_dim=size, vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, LoraPlan(r=R, alpha=R))
    use_packed_rows(model)
    model.train()
    held = []
    tokens = 400
    ids, answers = torch.randint(3, 50, (2, tokens // 2)), torch.randint(3, 50, (1, 2))
    hidden, _ = states_of_answers(model, ids, torch.ones_like(ids), answers)
    seen = {}
    nodes = [hidden.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in held:
            continue
        held.append(node)
        nodes += [before for before, _ in node.next_functions]
        if (back := getattr(node, "back", None)) is not None:
            note_tensors(back, seen)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    total = sum(size for place, size in seen.items() if place not in weights)
    a_layer = 4 * (2 * d + 2 * queries * size + 2 * keys * size + 2 * wide + 7 * R)
    # The last layer keeps less behind its keys and values; places and masks of attention are shared by all layers.
    assert 0.8 < total / (5.5 * a_layer * tokens) < 1.25, total / (a_layer * tokens)


def note_tensors(thing, seen: dict[int, int], depth: int = 0) -> None:
    """The storages of the tensors that a function holds, by their places."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif callable(thing) and getattr(thing, "__closure__", None) and depth < 12:
        for cell in thing.__closure__:
            note_tensors(cell.cell_contents, seen, depth + 1)
    elif isinstance(thing, tuple | list) and depth < 12:
        for one in thing:
            note_tensors(one, seen, depth + 1)
    elif isinstance(thing, dict) and depth < 12:
        for one in thing.values():
            note_tensors(one, seen, depth + 1)
