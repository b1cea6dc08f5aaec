"""The training step under the flags for accelerators: each leaves the loss and the gradients what they are."""

import pytest
import torch
from transformers import RagTokenizer

import generator_rag
from finetune_arguments_rag import parse_args
from generative_qa_rag import GenerativeQAModule
from models_rag import load_model
from retriever_rag import RagKnowledgeRetriever
from tests.conftest import QUESTIONS
from tests.test_finetune_rag import run


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return {name: checkpoint("rag_sequence", name) for name in ("bart", "t5")}


@pytest.fixture
def step(model_folder, bert_tokenizer, request, monkeypatch):
    """A function that takes one step's loss and gradients, with dropout, under given flags."""
    monkeypatch.setitem(generator_rag.GROUP_COST, "cpu", 1)

    def take(name, *flags):
        model = load_model(str(model_folder[name]), config_overrides={"dropout": 0.1})
        tokenizer = RagTokenizer(bert_tokenizer, request.getfixturevalue(f"{name}_tokenizer"))
        args = parse_args(["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags])
        retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
        module = GenerativeQAModule(args, model, tokenizer, retriever).train()
        batch = dict(bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt"))
        answers = [answer + " of the sea" * (i % 3) for i, (_, answer) in enumerate(QUESTIONS)]
        batch["labels"] = tokenizer.generator(text_target=answers, padding=True, return_tensors="pt").input_ids
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.training.bf16):
            loss = module.negative_log_likelihood(batch)[0].mean()
        loss.backward()
        return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return take


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name, step):
    loss, gradients = step(name)
    again, checkpointed = step(name, "--gradient_checkpointing")
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(checkpointed, gradients)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_bf16_is_near_full_precision_in_float32_gradients(name, step):
    loss, gradients = step(name)
    half, half_gradients = step(name, "--bf16")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.02, atol=0.02)
    assert half_gradients.keys() == gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in half_gradients.values())
    flat, right = (torch.cat([g.flatten() for g in side.values()]) for side in (half_gradients, gradients))
    assert (flat - right).norm() < 0.1 * right.norm()


def test_compile_changes_neither_loss_nor_gradients(step, monkeypatch):
    """The generator is traced whole and for any lengths; the backend is none, as a C++ compiler takes a minute."""
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_eagerly(module, **settings):
        compiled.append(settings)
        compile_module(module, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    loss, gradients = step("bart")
    again, same = step("bart", "--compile")
    assert compiled == [{"dynamic": True}] * 2
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same, gradients)


def test_a_run_in_bf16_with_gradient_checkpointing(model_folder, data_dir, tmp_path):
    """The whole script: training, validation and its generation under autocast; weights stay in float32."""
    metrics = run(
        model_folder["bart"], data_dir, tmp_path / "out", "--bf16", "--gradient_checkpointing", "--max_steps", 2
    )
    assert metrics["val_avg_loss"] > 0
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in state.values()} <= {torch.float32, torch.int64}
