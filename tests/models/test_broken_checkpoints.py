"""Whatever is wrong with a checkpoint's files is one line that names the flag, and nothing beside it is run."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from rag.errors import UserError
from rag.models.checkpoints import load_model, load_tokenizer
from rag.models.encoders import load_encoder
from rag.models.loading import checkpoint_errors, load_config, read_json

FLAG = "--rag_model_name"


@pytest.fixture
def folder(bart_folder, tmp_path):
    return shutil.copytree(bart_folder, tmp_path / "model")


def refused(load, folder, match=""):
    with pytest.raises(UserError) as error:
        load(str(folder), flag=FLAG)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{FLAG} {folder}") and match in lines[0], lines
    return lines[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{nope", b"[1]", b"3", b"null", bytes(range(256)), '{"a": 1}'.encode("utf-16"), b"[" * 100_000, b"\xff"],
    ids=["empty", "no JSON", "list", "number", "null", "binary", "UTF-16", "nested", "byte"],
)
def test_a_config_that_is_none(content, folder):
    (folder / "config.json").write_bytes(content)
    refused(load_model, folder)
    refused(load_encoder, folder)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"d_model": -1}, ""),
        ({"d_model": "wide"}, ""),
        ({"encoder_attention_heads": 0}, ""),
        ({"decoder_layers": 10**9}, "decoder_layers 1000000000"),
        ({"vocab_size": None}, ""),
        ({"activation_function": "nothing"}, ""),
        ({"model_type": "nothing"}, ""),
        ({"dtype": "float7"}, ""),
        ({"eos_token_id": {"a": 1}}, ""),
    ],
    ids=str,
)
def test_a_config_that_says_what_no_model_has(values, match, folder):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    refused(load_model, folder, match)


@pytest.mark.parametrize("values", [{"n_docs": "three"}, {"n_docs": 0}, {"max_combined_length": -3}], ids=str)
def test_a_rag_config_that_retrieves_nothing(values, checkpoint):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    assert next(iter(values)) in refused(load_config, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * 1000,
        lambda data: struct.pack("<Q", 10**18) + data[8:],
        lambda data: data[:9] + b"\0\0" + data[11:],
    ],
    ids=["empty", "cut", "garbage", "size", "header"],
)
def test_weights_that_cannot_be_read(change, folder):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused(load_model, folder, "cannot be loaded")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(value, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.layers.0.fc1.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(load_model, folder, "NaN or infinity in 1 of its weights (model.encoder.layers.0.fc1.weight")


def test_large_weights_whose_sum_is_infinite_are_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.layers.0.fc1.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder)).model.encoder.layers[0].fc1.weight.min() == 3e38


class Dangerous:
    def __reduce__(self):
        return open, ("PWNED", "w")


def test_a_pickle_is_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    for save in (
        lambda path: path.write_bytes(pickle.dumps(Dangerous())),
        lambda path: torch.save([Dangerous()], path),
    ):
        save(folder / "pytorch_model.bin")
        assert "pickle" in refused(load_model, folder) or "cannot be loaded" in refused(load_model, folder)
    assert not (tmp_path / "PWNED").exists()


def test_tensors_in_a_bin_file_are_read(bart, folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_model(str(folder)).lm_head.weight, bart.lm_head.weight)


def test_code_beside_a_checkpoint_is_never_run(folder, tmp_path, monkeypatch):
    """transformers would ask on standard input, which says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForSeq2SeqLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    for load in (load_model, load_encoder):
        refused(load, folder, "needs code that lies beside it, which is not run; give --trust_remote_code")
    # A family that transformers has is loaded by transformers' own code.
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    load_model(str(folder))
    load_model(str(folder), "auto")
    load_tokenizer(str(folder))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": "1.0"}', bytes(range(256)), b"[" * 100_000, b'{"model": {"type": "Nothing"}}'],
    ids=["empty", "no JSON", "list", "no model", "binary", "nested", "unknown"],
)
def test_a_tokenizer_that_is_none(content, folder):
    (folder / "tokenizer.json").write_bytes(content)
    refused(load_tokenizer, folder)


def test_a_tokenizer_without_padding(folder, bart_tokenizer):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(load_tokenizer, folder, "no padding token")


@pytest.mark.parametrize("content", [b"3", b"[]", b"{", b"\xff", b"[" * 100_000, b'"text"'])
def test_small_files_of_another_shape(content, folder):
    (folder / "some.json").write_bytes(content)
    refused(lambda path, flag: read_json(path, "some.json", flag=flag), folder)


def test_generation_settings_of_another_shape(checkpoint):
    folder = checkpoint()
    (folder / "generation_config.json").write_text("[1]")
    refused(load_model, folder)
    (folder / "generation_config.json").write_text('{"early_stopping": "maybe", "num_beams": "many"}')
    refused(load_model, folder)


def test_what_is_no_error_of_the_checkpoint_goes_through(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint_errors(FLAG, str(tmp_path)):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="mine"), checkpoint_errors(FLAG, str(tmp_path)):
        raise UserError("mine")
    for error in (MemoryError(), RecursionError(), AssertionError(), KeyError("a"), Exception("tokenizers' own")):
        with pytest.raises(UserError, match=f"{FLAG} .* cannot be loaded"), checkpoint_errors(FLAG, str(tmp_path)):
            raise error
