"""Which precision is chosen is asked of the machine, and a word is taken as it stands."""

import pytest
import torch

from rag.models import precision
from rag.models.precision import dtype_of, multiplies_bfloat16, name_of


@pytest.mark.parametrize("units, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu_is_bfloat16_where_it_multiplies_them(monkeypatch, units, expected):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: units)
    assert dtype_of("auto", "cpu") == expected


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_is_bfloat16_where_it_multiplies_them(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert dtype_of("auto", torch.device("cuda", 1)) == expected


@pytest.mark.parametrize(
    "capabilities, kernels, expected",
    [
        ({"amx_bf16": True}, "AVX512", True),
        ({"avx512_bf16": True}, "AVX512", True),
        ({"amx_bf16": True}, "DEFAULT", False),
        ({"avx512_f": True, "avx512_bf16": False}, "AVX512", False),
        ({}, "AVX2", False),
    ],
)
def test_instructions_count_where_torch_uses_them(monkeypatch, capabilities, kernels, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert multiplies_bfloat16() is expected


def test_a_torch_that_does_not_tell_has_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16()


@pytest.mark.parametrize("word, name", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_word_is_taken_as_it_stands(word, name):
    assert name_of(dtype_of(word, "cpu")) == name
