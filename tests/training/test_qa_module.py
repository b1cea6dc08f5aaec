"""The training step under the flags for accelerators: each leaves the loss and the gradients what they are."""

import json
import threading
import time

import pytest
import torch
from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop
from transformers import RagTokenizer

from rag import packing
from rag.errors import UserError
from rag.models.checkpoints import load_model
from rag.retrieval.retriever import RagKnowledgeRetriever
from rag.training.arguments import parse_args
from rag.training.qa_module import GenerativeQAModule
from tests.conftest import QUESTIONS, assert_equal_but_for_rounding, in_float64
from tests.training.test_finetune_rag import run


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return {name: checkpoint("rag_sequence", name) for name in ("bart", "t5")}


@pytest.fixture
def module_of(model_folder, bert_tokenizer, request):
    """A function that makes a module of one of the models under given flags."""

    def make(name, *flags):
        model = load_model(str(model_folder[name]), config_overrides={"dropout": 0.1})
        tokenizer = RagTokenizer(bert_tokenizer, request.getfixturevalue(f"{name}_tokenizer"))
        args = parse_args(["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags])
        retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
        return GenerativeQAModule(args, model, tokenizer, retriever).train()

    return make


@pytest.fixture
def step(module_of, bert_tokenizer, monkeypatch):
    """A function that takes one step's loss and gradients, with dropout, under given flags."""
    monkeypatch.setattr(packing, "GROUP_COST", 1)

    def take(name, *flags, dtype=torch.float64):
        module = module_of(name, *flags)
        if dtype == torch.float64:
            in_float64(module.model)
        batch = dict(bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt"))
        answers = [answer + " of the sea" * (i % 3) for i, (_, answer) in enumerate(QUESTIONS)]
        batch["labels"] = module.answer_tokenizer(text_target=answers, padding=True, return_tensors="pt").input_ids
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=module.args.training.bf16):
            loss = module.negative_log_likelihood(batch)[0].mean()
        loss.backward()
        return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return take


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name, step):
    loss, gradients = step(name)
    again, checkpointed = step(name, "--gradient_checkpointing")
    assert_equal_but_for_rounding(again, loss)
    assert_equal_but_for_rounding(checkpointed, gradients)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_bf16_is_near_full_precision_in_float32_gradients(name, step):
    loss, gradients = step(name, dtype=torch.float32)
    half, half_gradients = step(name, "--bf16", dtype=torch.float32)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.02, atol=0.02)
    assert half_gradients.keys() == gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in half_gradients.values())
    flat, right = (torch.cat([g.flatten() for g in side.values()]) for side in (half_gradients, gradients))
    assert (flat - right).norm() < 0.1 * right.norm()


def test_compile_changes_neither_loss_nor_gradients(step, monkeypatch):
    """Each layer is traced for any lengths; the backend is none, as a C++ compiler takes a minute."""
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_eagerly(module, **settings):
        compiled.append(settings)
        compile_module(module, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    loss, gradients = step("bart")
    again, same = step("bart", "--compile")
    assert compiled == [{"dynamic": True}] * 2  # one layer each
    assert_equal_but_for_rounding(again, loss)
    assert_equal_but_for_rounding(same, gradients)


def test_a_run_in_bf16_with_gradient_checkpointing(model_folder, data_dir, tmp_path):
    """The whole script: training, validation and its generation under autocast; weights stay in float32."""
    metrics = run(
        model_folder["bart"], data_dir, tmp_path / "out", "--bf16", "--gradient_checkpointing", "--max_steps", 2
    )
    assert metrics["val_avg_loss"] > 0
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in state.values()} <= {torch.float32, torch.int64}


# --- Retrieval ahead of the step --------------------------------------------------------------------------------------


def logged(folder) -> list[dict]:
    """All that was logged but seconds and rates."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(("_time", "_second"))} for row in rows]


@pytest.mark.parametrize("flags", [[], ["--bf16", "--dropout", 0.1], ["--index_name", "bm25"]])
def test_retrieving_ahead_changes_nothing(flags, model_folder, data_dir, tmp_path, request):
    """Also with validations in the middle of an epoch, when the next batch's passages are there already."""
    flags = [*flags, "--freeze_question_encoder", "--val_check_interval", 1, "--do_train", "--do_predict"]
    if "bm25" in flags:
        flags.remove("--freeze_question_encoder")
        flags += ["--passages_path", load_model(str(model_folder["bart"])).config.passages_path]
        flags += ["--index_path", tmp_path / "bm25"]
    run(model_folder["bart"], data_dir, tmp_path / "then", *flags)
    request.getfixturevalue("ahead")
    run(model_folder["bart"], data_dir, tmp_path / "ahead", *flags)
    assert logged(tmp_path / "ahead") == logged(tmp_path / "then")
    weights = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("ahead", "then")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_the_next_batch_is_retrieved_while_this_one_is_trained_on(ahead, model_folder, data_dir, tmp_path, monkeypatch):
    step, retrieve = GenerativeQAModule.training_step, RagKnowledgeRetriever.retrieve
    begun = [threading.Event(), threading.Event()]  # the retrieval of the first batch, of the second

    def note(retriever, *arguments):
        next((event for event in begun if not event.is_set()), begun[1]).set()
        return retrieve(retriever, *arguments)

    def wait_for_the_next(module, batch, batch_idx):
        assert begun[batch_idx + 1].wait(20) if batch_idx == 0 else True
        return step(module, batch, batch_idx)

    monkeypatch.setattr(RagKnowledgeRetriever, "retrieve", note)
    monkeypatch.setattr(GenerativeQAModule, "training_step", wait_for_the_next)
    flags = ["--freeze_question_encoder", "--max_steps", 2, "--num_sanity_val_steps", 0]
    run(model_folder["bart"], data_dir, tmp_path / "out", *flags)
    assert all(event.is_set() for event in begun)


def test_no_retrieval_is_under_way_when_a_validation_forks_its_workers(
    ahead, model_folder, data_dir, tmp_path, monkeypatch
):
    """A tokenizer at work in another thread would be copied with its lock taken."""
    retrieve, reset, working = RagKnowledgeRetriever.retrieve, _EvaluationLoop.reset, threading.Event()
    seen = []

    def slow(retriever, *arguments):
        working.set()
        time.sleep(0.1)
        found = retrieve(retriever, *arguments)
        working.clear()
        return found

    def note(loop):
        seen.append(working.is_set())
        return reset(loop)

    monkeypatch.setattr(RagKnowledgeRetriever, "retrieve", slow)
    monkeypatch.setattr(_EvaluationLoop, "reset", note)
    run(model_folder["bart"], data_dir, tmp_path / "out", "--freeze_question_encoder", "--val_check_interval", 1)
    assert len(seen) >= 4 and not any(seen)


def test_what_goes_wrong_ahead_is_told(ahead, model_folder, data_dir, tmp_path, monkeypatch):
    retrieve, calls = RagKnowledgeRetriever.retrieve, []

    def fail(retriever, *arguments):
        calls.append(threading.current_thread())
        if len(calls) == 3:
            raise UserError("the disk of the passages is gone")
        return retrieve(retriever, *arguments)

    monkeypatch.setattr(RagKnowledgeRetriever, "retrieve", fail)
    with pytest.raises(UserError, match="the disk of the passages is gone"):
        run(model_folder["bart"], data_dir, tmp_path / "out", "--freeze_question_encoder")
    assert calls[2] is not threading.main_thread()


def test_only_a_device_of_its_own_with_a_frozen_question_encoder_is_searched_beside(module_of):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    learning, frozen = module_of("bart"), module_of("bart", "--freeze_question_encoder")
    assert frozen.can_prefetch(cuda)
    assert not frozen.can_prefetch(cpu) and not learning.can_prefetch(cuda)
