"""Packed rows: tokens into them and out of them, and attention over them as over each sequence by itself."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rag import packing
from rag.packing import Attention, Packing, accept_packed_rows, accepts_packed_rows
from tests.conftest import assert_equal_but_for_rounding

CPU = torch.device("cpu")
QUERIES, KEYS = np.array([3, 1, 4, 2, 4]), np.array([7, 2, 11, 1, 6])


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(lengths.sum()), 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)


def one_by_one(queries, keys, query, key, value, scale=None, bias=None, causal=False):
    """What each sequence's attention is by itself."""
    ends_q, ends_k = np.cumsum(queries), np.cumsum(keys)
    attended = []
    for end_q, end_k, n_q, n_k in zip(ends_q, ends_k, queries, keys, strict=True):
        q, k, v = query[end_q - n_q : end_q], key[end_k - n_k : end_k], value[end_k - n_k : end_k]
        mask = torch.zeros(1, 1, n_q, n_k, dtype=query.dtype) if bias is None else bias[:, :, :n_q, :n_k]
        if causal:
            mask = mask.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool).triu(1), float("-inf"))
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended.append(scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(attended)


def test_a_row_is_packed_and_unpacked():
    lengths = np.array([2, 3, 1])
    place = Packing(lengths, CPU)
    padded = torch.arange(1, 13).view(3, 4)
    row = place.pack(padded)
    assert row.tolist() == [1, 2, 5, 6, 7, 9]
    assert place.unpack(row).tolist() == [[1, 2, 0], [5, 6, 7], [9, 0, 0]]
    assert place.unpack(row, 4).shape == (3, 4)
    assert place.starts.tolist() == [0, 2, 5, 6] and place.starts.dtype == torch.int32
    assert place.positions.tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("group_cost", [1, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["cross", "self", "causal"])
def test_attention_keeps_sequences_apart(kind, with_bias, group_cost, monkeypatch):
    """In many groups and in one, with gradients."""
    monkeypatch.setattr(packing, "GROUP_COST", group_cost)
    keys = Packing(KEYS, CPU)
    queries = Packing(QUERIES, CPU) if kind == "cross" else keys
    attention = Attention(queries, keys, causal=kind == "causal")
    tensors = [rows(queries.lengths), rows(KEYS, 1), rows(KEYS, 2)]
    bias = torch.randn(1, 2, 12, 12, dtype=torch.float64, requires_grad=True) if with_bias else None
    found = attention(*tensors, 0.0, 0.3, bias)
    assert len(attention._groups) == (1 if group_cost == 1000 else 3)
    expected = one_by_one(queries.lengths, KEYS, *tensors, scale=0.3, bias=bias, causal=kind == "causal")
    assert_equal_but_for_rounding(found, expected)
    inputs, weights = [*tensors, *([bias] if with_bias else [])], torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((weights * x).sum(), inputs) for x in (found, expected))
    for gradient, right in zip(ours, theirs, strict=True):
        assert_equal_but_for_rounding(gradient, right)


@pytest.mark.parametrize("kind", ["cross", "self", "causal"])
def test_the_ragged_kernel_is_told_where_sequences_begin(kind, monkeypatch):
    """Its place is taken by what its arguments say, sequence by sequence."""

    def kernel(query, key, value, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale):
        lengths = [starts.diff().numpy() for starts in (starts_q, starts_k)]
        assert max_q >= lengths[0].max() and max_k >= lengths[1].max() and dropout == 0.1 and debug is False
        return (one_by_one(*lengths, query, key, value, scale, causal=causal),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    keys = Packing(KEYS, CPU)
    queries = Packing(QUERIES, CPU) if kind == "cross" else keys
    attention = Attention(queries, keys, causal=kind == "causal")
    tensors = [rows(queries.lengths), rows(KEYS, 1), rows(KEYS, 2)]
    found = attention._ragged(*tensors, 0.1, 0.3)
    assert_equal_but_for_rounding(found, attention._grouped(*tensors, 0.0, 0.3, None))


def test_a_hundred_batches_have_few_shapes(monkeypatch):
    """What a kernel of a GPU is chosen, or a graph made for: lengths rounded up to a rung."""
    shapes = set()
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda q, *given, **_: shapes.add(given[4:6]) or (q, 0, 0, 0, 0)
    )
    random = np.random.default_rng(0)
    for _ in range(100):
        contexts, answers = (Packing(random.integers(1, most, 80), CPU) for most in (301, 26))
        for queries, keys in ((contexts, contexts), (answers, contexts), (answers, answers)):
            Attention(queries, keys)._ragged(*(torch.empty(0, 1, 8),) * 3, 0.0, None)
    longest = {size for shape in shapes for size in shape}
    assert longest <= {64, 128, 192, 256, 320} and len(shapes) <= 5


def test_the_kernel_has_its_backward_pass_without_autograd_too(monkeypatch):
    """Each kernel's place is taken by what its arguments say."""
    keys, queries = Packing(KEYS, CPU), Packing(QUERIES, CPU)
    attention = Attention(queries, keys)

    def forward(query, key, value, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale):
        lengths = [starts.diff().numpy() for starts in (starts_q, starts_k)]
        return one_by_one(*lengths, query, key, value, scale), "sums", "random", "unused", "debug"

    def backward(gradient, q, k, v, out, sums, starts_q, starts_k, max_q, max_k, dropout, causal, *random, scale):
        assert (sums, random, dropout, causal) == ("sums", ("random", "unused"), 0.1, False)
        tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        found = forward(*tensors, starts_q, starts_k, max_q, max_k, dropout, causal, False, scale=scale)[0]
        assert_equal_but_for_rounding(out, found.detach())
        return torch.autograd.grad(found, tensors, gradient)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    tensors = [rows(QUERIES), rows(KEYS, 1), rows(KEYS, 2)]
    found, back = attention._ragged_with_backward(*tensors, 0.1, 0.3)
    expected, expected_back = attention.with_backward(*tensors, 0.0, 0.3)
    gradient = torch.randn_like(expected)
    assert_equal_but_for_rounding(found, expected)
    for ours, theirs in zip(back(gradient), expected_back(gradient), strict=True):
        assert_equal_but_for_rounding(ours, theirs)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_without_packed_rows_a_model_works_as_before(name, request):
    model = request.getfixturevalue(name)
    packed = copy.deepcopy(model)
    accept_packed_rows(packed)
    assert accepts_packed_rows(packed) and not accepts_packed_rows(model)
    ids, mask = torch.randint(4, 60, (3, 9)), (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    labels = torch.randint(4, 60, (3, 4))
    logits = [one(input_ids=ids, attention_mask=mask, labels=labels).logits for one in (model, packed)]
    assert_equal_but_for_rounding(logits[1], logits[0])
    answers = [one.generate(ids, attention_mask=mask, num_beams=2, max_length=8).tolist() for one in (model, packed)]
    assert answers[0] == answers[1]


def test_what_was_set_is_not_written_into_a_checkpoint(bart, tmp_path):
    model = copy.deepcopy(bart)
    accept_packed_rows(model)
    model.save_pretrained(tmp_path)
    assert packing.IMPLEMENTATION not in (tmp_path / "config.json").read_text()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cross", "self", "causal"])
def test_on_a_gpu_ragged_attention_is_that_of_groups(kind, dtype):
    device = torch.device("cuda")
    keys = Packing(KEYS * 9, device)
    queries = Packing(QUERIES * 5, device) if kind == "cross" else keys
    attention = Attention(queries, keys, causal=kind == "causal")

    def tensors():
        sizes = (queries.lengths, keys.lengths, keys.lengths)
        made = [torch.randn(int(n.sum()), 2, 64, generator=torch.Generator().manual_seed(1)) for n in sizes]
        return [one.to(device, dtype).requires_grad_() for one in made]

    sides = []
    for way in (attention._ragged, lambda *given: attention._grouped(*given, None)):
        inputs = tensors()
        found = way(*inputs, 0.0, 0.125)
        sides.append([found, *torch.autograd.grad(found.float().square().sum(), inputs)])
    for ours, theirs in zip(*sides, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()
    dropped = attention(*tensors(), 0.5, 0.125)
    assert dropped.isfinite().all() and not dropped.equal(sides[0][0])
