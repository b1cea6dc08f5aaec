"""Texts in one row, without padding, get the vectors that they get padded."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from rag.models.packed_encoder import can_pack, encode_packed
from rag.models.pooled_encoder import PooledEncoder, PooledEncoderConfig
from rag.packing import Packing
from tests.conftest import assert_equal_but_for_rounding

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 90}
LENGTHS = np.array([3, 40, 1, 17, 17, 2])


def dpr(kind=DPRContextEncoder, **config):
    return kind(DPRConfig(**SIZES, **config))


def pooled(pooling, backbone=None, **config):
    backbone = backbone or BertModel(BertConfig(**SIZES))
    return PooledEncoder(PooledEncoderConfig(backbone=backbone.config, pooling=pooling, **config), backbone)


DENSE = [{"in_features": 32, "out_features": 8, "bias": True, "activation": "Tanh"}]
ENCODERS = {
    "DPR": dpr,
    "DPR's questions": lambda: dpr(DPRQuestionEncoder),
    "DPR, projected": lambda: dpr(projection_dim=8),
    "first token": lambda: pooled("cls", normalize=False),
    "last token": lambda: pooled("last"),
    "mean": lambda: pooled("mean"),
    "maximum, dense": lambda: pooled("max", dense=DENSE),
    "RoBERTa": lambda: pooled("mean", RobertaModel(RobertaConfig(**SIZES))),
    "XLM-RoBERTa": lambda: pooled("cls", XLMRobertaModel(XLMRobertaConfig(**SIZES, pad_token_id=1))),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(0)
    encoder = ENCODERS[request.param]().eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return encoder


def both_ways(encoder, dtype, device="cpu"):
    """The vectors of the same texts, (N, d) float64: padded, and packed."""
    torch.manual_seed(1)
    mask = torch.arange(LENGTHS.max()) < torch.from_numpy(LENGTHS)[:, None]
    pad = 1 if encoder.config.model_type == "dpr" else encoder.config.backbone.pad_token_id
    ids = torch.randint(5, 90, mask.shape).masked_fill(~mask, pad)
    padded, packed = (copy.deepcopy(encoder).to(device, dtype) for _ in range(2))
    with torch.no_grad():
        expected = padded(ids.to(device), attention_mask=mask.long().to(device))[0]
    found = encode_packed(packed, ids[mask].to(device), Packing(LENGTHS, torch.device(device)))
    assert expected.dtype == found.dtype == dtype
    return expected.double(), found.double()


def test_both_ways_are_equal(encoder):
    assert can_pack(encoder)
    expected, found = both_ways(encoder, torch.float64)
    assert_equal_but_for_rounding(found, expected)
    expected, found = both_ways(encoder, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_bfloat16_is_as_near_to_float32_packed_as_padded(encoder):
    """Each way rounds some twenty sums on a value's way to 8 bits: neither is farther than that from the exact one."""
    exact, _ = both_ways(encoder, torch.float64)
    for found in both_ways(encoder, torch.bfloat16):
        assert (found - exact).abs().max() < 20 * 2**-8 * exact.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_both_ways_are_near_each_other_on_a_gpu(encoder, dtype):
    exact, _ = both_ways(encoder, torch.float64)
    bound = 20 * max(torch.finfo(dtype).eps, 2**-10) * exact.abs().max()  # TF32 may be on
    for found in both_ways(encoder, dtype, "cuda"):
        assert (found.cpu() - exact).abs().max() < bound


def test_what_is_built_otherwise_is_padded():
    sizes = SIZES | {"num_hidden_layers": 1}
    others = [
        MPNetModel(MPNetConfig(**sizes)),
        BertModel(BertConfig(**sizes, is_decoder=True)),
        BertModel(BertConfig(**sizes, chunk_size_feed_forward=2)),
        BertModel(BertConfig(**sizes | {"num_attention_heads": 8})),
        type("OwnBert", (BertModel,), {})(BertConfig(**sizes)),
    ]
    assert [can_pack(pooled("mean", backbone)) for backbone in others] == [False] * len(others)
