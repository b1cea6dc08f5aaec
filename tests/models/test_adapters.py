"""Adapters: what they add, what is written of them, whose they are; and checkpoints that a base belongs to."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import consolidate_rag_checkpoint
from rag.casting import weight_of
from rag.errors import UserError
from rag.files import load_json, save_json
from rag.generation.bart_layers import is_plain
from rag.models.adapters import (
    LoraPlan,
    adapted_layers,
    add_adapters,
    has_adapters,
    is_adapter_weight,
    learning_summary,
    load_adapters,
    merge_adapters,
    plan_of,
    save_adapters,
)
from rag.models.bases import base_of, read_base
from rag.models.checkpoints import load_model, load_tokenizer, save_model
from rag.models.packed_encoder import encode_packed
from rag.models.pooled_encoder import PooledEncoder, PooledEncoderConfig
from rag.models.quantization import quantization_config, quantization_problems, quantized_loading
from rag.packing import Packing
from tests.conftest import assert_equal_but_for_rounding, make_rag

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "llama": {"num_key_value_heads": 2}, "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8}, "mistral": {"num_key_value_heads": 2}, "phi": {},
    "phi3": {}, "smollm3": {"num_key_value_heads": 2}, "gpt2": GPT2,
}  # fmt: skip


def language_model(family: str):
    torch.manual_seed(4)
    sizes = {} if family == "gpt2" else SIZES
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes, **FAMILIES[family], **tokens)).eval()


def teach(model, std: float = 0.2) -> None:
    """Give adapters weights as training would."""
    generator = torch.Generator().manual_seed(11)
    for name, weight in model.named_parameters():
        if is_adapter_weight(name):
            weight.data.normal_(std=std, generator=generator)


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(4, 40, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_learn_by_adapters_alone(family, tmp_path):
    """On all linear layers but the output's; nothing changes until they learn, and merged they are the same."""
    model = language_model(family)
    ids = ids_of(3, 7)
    with torch.no_grad():
        before = model(ids).logits
    add_adapters(model, LoraPlan(r=4, alpha=8))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)
    assert not any(layer is model.get_output_embeddings() for _, layer in adapted_layers(model))
    assert not model.training and not any(part.training for part in model.modules())
    model(ids, labels=ids).loss.backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if is_adapter_weight(name)}
    assert len(learning) == 2 * len(plan_of(model).targets)

    teach(model)
    with torch.no_grad():
        learned = model(ids).logits
    assert (learned - before).norm() > 0.05 * before.norm()
    save_adapters(model, tmp_path / "adapter")
    other = language_model(family)
    names = other.state_dict().keys()
    load_adapters(other, tmp_path / "adapter")
    assert not any(weight.requires_grad for weight in other.parameters())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, learned)
    merge_adapters(other)
    assert not has_adapters(other) and other.state_dict().keys() == names
    assert all(weight.requires_grad for weight in other.parameters())
    with torch.no_grad():
        assert_equal_but_for_rounding(other(ids).logits, learned)


def test_peft_opens_what_is_written(tmp_path):
    """And writes the same adapters; the same are the same bytes, whatever the order of a set was."""
    import peft

    model = language_model("llama")
    add_adapters(model, LoraPlan(4, 8.0, 0.1, ("q_proj", "down_proj")))
    teach(model)
    for name in "ab":
        save_adapters(model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    opened = peft.PeftModel.from_pretrained(language_model("llama"), tmp_path / "a").eval()
    ids = ids_of(2, 6)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)
    opened.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "peft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    settings = load_json(tmp_path / "a" / "adapter_config.json")
    assert settings["target_modules"] == ["down_proj", "q_proj"] and settings["lora_dropout"] == 0.1


@pytest.mark.parametrize("kind", ["dpr", "pooled"])
def test_encoders_read_packed_rows_with_adapters(kind, question_encoder, question_encoder_folder):
    """Also dense layers behind the pooling, whose names are numbers as those of other lists are."""
    from rag.models.encoders import load_encoder

    if kind == "dpr":
        encoder = load_encoder(str(question_encoder_folder))
    else:
        torch.manual_seed(2)
        config = BertConfig(**SIZES | {"num_attention_heads": 4})
        dense = [{"in_features": 32, "out_features": 8, "bias": True, "activation": "Tanh"}]
        backbone = BertModel(config, add_pooling_layer=False)
        encoder = PooledEncoder(PooledEncoderConfig(backbone=config, dense=dense), backbone).eval()
    add_adapters(encoder, LoraPlan(2, 4.0))
    teach(encoder)
    assert len(plan_of(encoder).targets) == (6 if kind == "dpr" else 13)
    ids, packing = ids_of(9), Packing(np.array([4, 5]), torch.device("cpu"))
    for dtype, bound in ((None, 1e-5), (torch.bfloat16, 0.1)):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            apart = encode_packed(encoder, ids, packing)
        alone = torch.cat([encoder(part[None])[0] for part in ids.split([4, 5])])
        assert (apart - alone).norm() < bound * alone.norm()
    apart.float().sum().backward()
    assert all((weight.grad is not None) == is_adapter_weight(name) for name, weight in encoder.named_parameters())
    merge_adapters(encoder)
    assert_equal_but_for_rounding(encode_packed(encoder, ids, packing), alone)


def test_a_layer_is_asked_for_the_weight_that_it_multiplies_by(bart):
    import copy

    generator = copy.deepcopy(bart)
    layer = generator.model.decoder.layers[0]
    assert is_plain(layer)
    plain = layer.fc1.weight.clone()
    assert weight_of(layer.fc1) is layer.fc1.weight
    add_adapters(generator, LoraPlan(2, 6.0, targets=("fc1",)))
    teach(generator)
    assert not is_plain(layer), "the backward pass by hand knows no adapters"
    assert torch.equal(layer.fc1.weight, plain), "as peft has it"
    a, b = layer.fc1.lora_A["default"].weight, layer.fc1.lora_B["default"].weight
    torch.testing.assert_close(weight_of(layer.fc1), plain + 3 * b @ a)
    assert weight_of(torch.nn.Conv1d(1, 1, 1)) is None
    assert learning_summary(generator).startswith("LoRA r 2 on 2 layers of the generator: 192 of ")


# --- Checkpoints with a base ------------------------------------------------------------------------------------------


@pytest.fixture
def learned(checkpoint, tmp_path):
    """The folder of a checkpoint of adapters, and that of its base."""
    base, folder = checkpoint("rag_sequence", "bart"), tmp_path / "learned"
    shutil.copytree(base, tmp_path / "base")
    base = tmp_path / "base"
    model = load_model(str(base))
    add_adapters(model.rag.generator, LoraPlan(4, 8.0))
    teach(model)
    for weight in model.rag.question_encoder.parameters():
        weight.data.add_(0.01)
    save_model(model, folder, load_tokenizer(str(base)), base_of(str(base)))
    return folder, base, model


def test_a_base_is_named_by_its_path_and_its_weights(learned):
    folder, base, model = learned
    named = read_base(str(folder))
    assert named.name_or_path == str(base) and named.revision is None and named.quantization is None
    assert named.changed == {
        f"rag.question_encoder.{name}" for name, _ in model.rag.question_encoder.named_parameters()
    }
    assert read_base(str(base)) is None
    assert base_of(str(folder)) == named, "what starts from it has its base"
    opened = load_model(str(folder), keep_adapters=True)
    own = opened.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in model.state_dict().items())
    # Weights in several files are the same base as long as these are.
    load_model(str(base)).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    assert base_of(str(base)).digest != named.digest and base_of(str(base)).digest == base_of(str(base)).digest


def test_a_base_that_was_moved_is_found_where_its_file_says(learned, tmp_path):
    folder, base, _ = learned
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"^--model_name_or_path {folder} .*: its base {base} is not a folder.*; put"):
        load_model(str(folder))
    save_json(load_json(folder / "base.json") | {"name_or_path": str(tmp_path / "moved")}, folder / "base.json")
    load_model(str(folder))


def test_a_base_of_the_hub_is_named_with_its_commit(learned, tmp_path, monkeypatch):
    folder, base, model = learned
    cache, commit = tmp_path / "cache" / "models--us--base", "0123456789" * 4
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(base, cache / "snapshots" / commit)
    named = base_of("us/base", cache_dir=str(tmp_path / "cache"))
    assert (named.name_or_path, named.revision, named.digest) == ("us/base", commit, base_of(str(base)).digest)
    save_model(model, folder, base=named)
    (cache / "refs" / "main").write_text("f" * 40)  # the newest is another since
    opened = load_model(str(folder), cache_dir=str(tmp_path / "cache"), keep_adapters=True).state_dict()
    assert all(torch.equal(opened[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(UserError, match=r"base cannot be read: its base us/base .*hub"):
        load_model(str(folder), cache_dir=str(tmp_path / "empty"))


def test_another_base_is_refused(learned):
    folder, base, _ = learned
    model = load_model(str(base))
    model.rag.generator.model.shared.weight.data[0] += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"holds adapters of another base: the weights at .* are not those"):
        load_model(str(folder))


def change_settings(folder, **changes):
    path = folder / "generator_adapter" / "adapter_config.json"
    save_json(load_json(path) | changes, path)


def change_weights(folder, change):
    path = folder / "generator_adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


FAULTS = {
    "no base": (lambda f: (f / "base.json").write_text("{}"), "does not name its base"),
    "a list": (lambda f: (f / "base.json").write_text("[]"), "base.json holds a list"),
    "another kind": (lambda f: change_settings(f, use_dora=True), r"no plain LoRA \(use_dora is True\)"),
    "other ranks": (lambda f: change_settings(f, rank_pattern={"fc1": 8}), "no plain LoRA"),
    "no rank": (lambda f: change_settings(f, r="4"), "holds no r, alpha, dropout"),
    "huge names": (lambda f: change_settings(f, target_modules="all-linear"), "holds no r, alpha, dropout"),
    "layers of another model": (lambda f: change_settings(f, target_modules=["gate_proj"]), "cannot be loaded"),
    "fewer weights": (
        lambda f: change_weights(f, lambda w: dict(list(w.items())[1:])),
        "adapters are of another model",
    ),
    "another rank": (lambda f: change_settings(f, r=2), "cannot be loaded"),
    "no numbers": (lambda f: change_weights(f, lambda w: {n: v * torch.nan for n, v in w.items()}), "has NaN"),
    "cut": (lambda f: (f / "generator_adapter" / "adapter_model.safetensors").write_bytes(b"\x08"), "cannot be loaded"),
    "gone": (lambda f: (f / "generator_adapter" / "adapter_model.safetensors").unlink(), "cannot be loaded"),
    "other parts": (lambda f: save_file({"x": torch.ones(1)}, f / "trained.safetensors"), "weights of another model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_one_line(fault, learned):
    folder, _, _ = learned
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--model_name_or_path {folder}")


def test_a_file_of_adapters_has_nothing_imported(learned, monkeypatch):
    """peft imports the module that `megatron_core` names."""
    import importlib

    folder, _, _ = learned
    change_settings(folder, megatron_core="antigravity", megatron_config={"a": 1})
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: pytest.fail(f"{name} was imported"))
    load_adapters(load_model(str(learned[1])).rag.generator, folder / "generator_adapter")


def test_without_peft_a_checkpoint_of_adapters_is_one_line(learned, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^LoRA's adapters need a package that is not installed: pip install peft$"):
        load_model(str(learned[0]))


def test_merging_writes_a_whole_checkpoint(learned, tmp_path, capsys):
    folder, base, model = learned
    dest = tmp_path / "whole"
    words = ["--merge_adapters", str(folder), "--dest", str(dest)]
    consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(words))
    assert f"those of {base} and what {folder} has learned" in capsys.readouterr().out
    shutil.rmtree(base)
    assert {path.name for path in dest.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "question_encoder_tokenizer",
        "generator_tokenizer",
    }  # fmt: skip
    from transformers import RagSequenceForGeneration

    whole, ids = RagSequenceForGeneration.from_pretrained(dest).eval(), ids_of(2, 6)
    with torch.no_grad():
        for part in ("generator", "question_encoder"):
            kwargs = {"labels": ids} if part == "generator" else {}
            found, expected = (getattr(one, part)(ids, **kwargs) for one in (whole, model))
            index = "logits" if part == "generator" else 0
            assert_equal_but_for_rounding(found[index], expected[index])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^--generator_name_or_path and --question_encoder_name_or_path must be given"),
        ("--generator_name_or_path x", "^--question_encoder_name_or_path must be given"),
        ("--merge_adapters BASE", "has nothing to merge; use it as it is"),
        ("--merge_adapters BASE --generator_name_or_path x", "leave --generator_name_or_path out"),
        ("--merge_adapters none", "^--merge_adapters none"),
    ],
)
def test_what_cannot_be_merged_is_told(words, message, learned, tmp_path):
    argv = ["--dest", str(tmp_path / "whole"), *words.replace("BASE", str(learned[1])).split()]
    with pytest.raises(UserError, match=message):
        consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(argv))
    assert not (tmp_path / "whole").exists()


# --- Quantized weights ------------------------------------------------------------------------------------------------


def test_quantized_weights_are_of_the_generator_alone(rag_sequence):
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = make_rag(type(rag_sequence), rag_sequence.question_encoder, rag_sequence.generator, {})
    four, eight = (quantization_config(kind, model.config) for kind in ("4bit", "8bit"))
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and eight.load_in_8bit
    for config in (four, eight):
        converted = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and should_convert_module(name, config.llm_int8_skip_modules)
        ]
        assert len(converted) == 16 and all(name.startswith("rag.generator.model.") for name in converted)
    assert quantized_loading(None, model.config) == {}
    assert quantized_loading("4bit", model.config)["device_map"] == {"": 0}


def test_where_weights_cannot_be_quantized(monkeypatch):
    assert quantization_problems(None, on_cpu=True) == []
    assert "CUDA GPU" in quantization_problems("4bit", on_cpu=True)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quantization_problems("8bit", on_cpu=False) == [
        "--load_in_8bit needs packages that are not installed: pip install bitsandbytes accelerate"
    ]


def test_a_base_tells_how_it_was_read(learned, caplog):
    """Merging adds to the weights in full precision, and says so."""
    folder, base, model = learned
    save_model(model, folder, load_tokenizer(str(base)), base_of(str(base), "4bit"))
    assert json.loads((folder / "base.json").read_text())["quantization"] == "4bit"
    load_model(str(folder))
    assert "its adapters were trained beside weights in 4bit" in caplog.text
