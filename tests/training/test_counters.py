"""What a GPU's clock would show, counted on the CPU: kernels a step, reads of the device, shapes of attention, padding.

Where a GPU has one kernel (attention over ragged sequences), its place is taken by a call that counts as one.
"""

import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import BartConfig, BartForConditionalGeneration

from rag.generation import bart_layers, logprobs
from rag.generation.forward import decode_answers, encode_contexts, output_layer
from rag.generation.stacks import use_packed_rows
from rag.packing import Attention
from rag.training.base_module import BaseTransformer
from rag.training.loss import decoder_inputs_and_targets, rag_sequence_nll
from rag.training.qa_module import GenerativeQAModule
from tests.training.test_finetune_rag import run

VIEWS = (
    "view", "t", "detach", "transpose", "_unsafe_view", "expand", "unsqueeze", "squeeze", "alias", "split", "slice",
    "select", "permute", "as_strided", "unbind", "empty", "empty_like", "lift_fresh",
)  # fmt: skip
HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique2"}
READS = {"tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__", "__index__"}


class Operators(TorchDispatchMode):
    """Counts what is dispatched, and notes where numbers are read of tensors.

    Reads in the retriever are noted apart: questions' vectors go to the host, and contexts are made there.
    """

    def __init__(self):
        super().__init__()
        self.names, self.reads, self.retriever_reads, self.methods = Counter(), [], [], _Methods(self._note)

    def __enter__(self):
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.names[name] += 1
        if name in HOST:
            self._note(name)
        return function(*args, **kwargs or {})

    def _note(self, name: str) -> None:
        files = [Path(frame.filename).name for frame in traceback.extract_stack()]
        (self.retriever_reads if "retriever.py" in files else self.reads).append(name)

    @property
    def kernels(self) -> int:
        return sum(count for name, count in self.names.items() if name not in VIEWS)


class _Methods(TorchFunctionMode):
    def __init__(self, note):
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (name := getattr(function, "__name__", "")) in READS:
            self.note(name)
        return function(*args, **kwargs or {})


def without_counting(function):
    """The function as one kernel."""

    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


class OneKernel(torch.autograd.Function):
    """Attention over ragged sequences as the kernel's one call forward and one backward."""

    @staticmethod
    def forward(ctx, query, key, value, grouped):
        ctx.grouped = grouped
        ctx.save_for_backward(query, key, value)
        with _disable_current_modes():
            return grouped(query.detach(), key.detach(), value.detach())

    @staticmethod
    def backward(ctx, gradient):
        with _disable_current_modes(), torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return *torch.autograd.grad(ctx.grouped(*inputs), inputs, gradient), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The path of a GPU, whose kernel is counted as such; the lengths that attention is called with are noted."""
    called = []

    def ragged(attention, query, key, value, dropout, scale, bias=None):
        called.append((attention.queries.longest, attention.keys.longest))
        return OneKernel.apply(query, key, value, lambda *tensors: attention._grouped(*tensors, dropout, scale, None))

    with_backward, product = Attention.with_backward, bart_layers.weight_gradient

    def fused(attention, *tensors):
        called.append((attention.queries.longest, attention.keys.longest))
        attended, back = without_counting(with_backward)(attention, *tensors)
        return attended, without_counting(back)

    monkeypatch.setattr(Attention, "__call__", ragged)
    monkeypatch.setattr(Attention, "with_backward", fused)
    monkeypatch.setattr(bart_layers, "weight_gradient", without_counting(lambda *two: product(*two).float()))
    monkeypatch.setattr(logprobs, "words_at_a_time", lambda rows, device: 2**27 // rows)
    monkeypatch.setattr(BaseTransformer, "judges_later", lambda module, optimizer: True)
    return called


@pytest.fixture
def counted_steps(monkeypatch):
    """The operators of each training step, from the batch's arrival to its end."""
    steps: list[Operators] = []
    start, end = GenerativeQAModule.on_train_batch_start, GenerativeQAModule.on_train_batch_end

    def begin(module, batch, batch_idx):
        steps.append(Operators())
        steps[-1].__enter__()
        return start(module, batch, batch_idx)

    def finish(module, outputs, batch, batch_idx):
        end(module, outputs, batch, batch_idx)
        steps[-1].__exit__(None, None, None)

    monkeypatch.setattr(GenerativeQAModule, "on_train_batch_start", begin)
    monkeypatch.setattr(GenerativeQAModule, "on_train_batch_end", finish)
    return steps


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("rag_sequence", []),
        ("rag_sequence", ["--freeze_question_encoder"]),
        ("rag_sequence", ["--bf16"]),
        ("fid", []),
        ("fid", ["--bf16", "--retriever_loss", "adist"]),
        ("fid", ["--retriever_loss", "loop"]),
    ],
)
def test_a_step_reads_nothing_of_the_device_but_at_log_steps(
    model_type, flags, as_on_a_gpu, counted_steps, checkpoint, data_dir, tmp_path
):
    flags = [*flags, "--max_steps", 4, "--log_every_n_steps", 3, "--num_sanity_val_steps", 0]
    run(checkpoint(model_type, "bart"), data_dir, tmp_path / "out", *flags)
    assert len(counted_steps) == 4
    for number, step in enumerate(counted_steps, start=1):
        assert bool(step.reads) == (number == 3), (number, step.reads)
        # The vectors, one copy; what else is read there was on the host before: masks and ids of contexts, scores.
        assert Counter(step.retriever_reads)["cpu"] <= 3, step.retriever_reads


def test_the_generators_step_takes_less_than_half_of_the_operators_it_took(as_on_a_gpu):
    """Forward and backward pass of six and six layers in bfloat16: 3,347 operators at commit 7531d5f, 1,588 of them no
    views, by the same count (its padded groups of a GPU, attention as one kernel a call)."""
    torch.manual_seed(0)
    generator = BartForConditionalGeneration(
        BartConfig(
            vocab_size=30522, d_model=16, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, attention_dropout=0.1, activation_dropout=0.1,
        )
    ).train()  # fmt: skip
    use_packed_rows(generator)
    lengths = np.random.default_rng(0).integers(40, 161, 8 * 5)
    mask = torch.from_numpy(np.arange(160) < lengths[:, None]).long()
    ids, scores = torch.randint(4, 30000, mask.shape).where(mask == 1, 1), torch.randn(8, 5, requires_grad=True)
    labels = torch.randint(4, 30000, (8, 7))
    labels[:, 5:] = 1
    decoder_ids, targets = decoder_inputs_and_targets(labels, generator.config)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            encoded = encode_contexts(generator, ids, mask, lengths)
            hidden, answers = decode_answers(generator, encoded, decoder_ids, np.full(8, 5))
            nll = rag_sequence_nll(hidden, output_layer(generator), scores, targets, 1, answers=answers)
        nll.mean().backward()
        generator.zero_grad()

    step()
    as_on_a_gpu.clear()
    with Operators() as counted:
        step()
    assert len(as_on_a_gpu) == 6 + 2 * 6
    # Not counted yet: attention, forward and backward, and the gradients of four and seven weights a layer.
    fused = 2 * len(as_on_a_gpu) + 6 * 4 + 6 * 7
    assert counted.names.total() + fused < 3347 / 2
    assert counted.kernels + fused < 1588 / 2
    assert not counted.reads
