"""`--strategy fsdp`: the numbers of one process from ranks that each hold a part; files as whole as any."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import finetune_rag
from lightning_base import build_trainer
from rag.errors import UserError
from rag.models.checkpoints import load_model
from rag.training.sharding import StandIn, shard
from tests.conftest import ROOT
from tests.distributed.many_ranks import run_ranks
from tests.training.lightning_toy import toy_args
from tests.training.rank_runs import TOLERANCE, assert_same, frozen_of, outcome, train, two_ranks

FSDP = ["--strategy", "fsdp"]


def run(function, words: list[str], out: Path, *args) -> list:
    """What each of two ranks returns; an error of one is raised."""
    ends = run_ranks(function, 2, out.parent, words, out, *args, seconds=120)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return ends


def another(checkpoint, words: list[str], *parts: str) -> list[str]:
    return ["--model_name_or_path", str(checkpoint(*parts)), *words[2:]]


def train_and_weigh(rank: int, words: list[str], out: Path):
    """`train`, and the bytes of weights and moments: what this rank holds of them, and all."""
    from rag.training.qa_module import GenerativeQAModule
    from rag.training.sharding import local_part

    held = {}

    def on_train_end(module):
        states = module.optimizers().state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        for name, tensors in {"weights": [*module.parameters()], "moments": moments}.items():
            held[name] = (sum(local_part(one).nbytes for one in tensors), sum(one.nbytes for one in tensors))

    GenerativeQAModule.on_train_end = on_train_end
    return *train(rank, words, out), held


@pytest.mark.slow
def test_ranks_that_hold_half_of_the_weights_are_one_process(words, alone, tmp_path):
    """Losses, gradient norms and clipping, metrics, answers, weights; and the export is the best checkpoint's."""
    (_, written, held), (_, written_by_other, held_by_other) = run(
        train_and_weigh, two_ranks(words, tmp_path / "out", *FSDP, "--do_train", "--do_predict"), tmp_path / "out"
    )
    found, expected = outcome(tmp_path / "out"), alone(1)
    assert_same(found, expected, **TOLERANCE)
    assert max(found["log"]["grad_norm"]) > 1  # which is --max_grad_norm: some are clipped
    assert written and not written_by_other
    for name, (here, all_of_it) in held.items():
        assert 0 < here < 0.6 * all_of_it and here + held_by_other[name][0] == all_of_it, name
    for number in (1, 2, 3):
        best = torch.load(tmp_path / "out" / f"checkpoint{number}.ckpt", weights_only=True)["state_dict"]
        for name, weight in load_model(str(tmp_path / "out" / f"checkpoint{number}")).state_dict().items():
            assert torch.equal(weight, best[f"model.{name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "further"),
    [
        (("rag_token", "t5"), ["--gradient_checkpointing", "--gradient_accumulation_steps", "2"]),
        (
            ("rag_sequence", "bart"),
            ["--freeze_embeds", "--label_smoothing", "0.1", "--gradient_clip_algorithm", "value"],
        ),
    ],
)
def test_other_models_and_flags(parts, further, words, checkpoint, tmp_path):
    words = another(checkpoint, words, *parts)
    outs = tmp_path / "fsdp", tmp_path / "ddp"
    for out, strategy in zip(outs, ("fsdp", "ddp"), strict=True):
        run(train, two_ranks(words, out, "--strategy", strategy, *further), out)
    assert_same(*map(outcome, outs), **TOLERANCE)


@pytest.mark.slow
def test_a_frozen_question_encoder_asks_ahead(words, alone, ahead, monkeypatch, tmp_path):
    """In a thread of its own, while the generator's slices travel; a validation after each batch."""
    further = ["--freeze_question_encoder", "--val_check_interval", "1"]
    run(train, two_ranks(words, tmp_path / "out", *FSDP, "--do_train", "--do_predict", *further), tmp_path / "out")
    monkeypatch.undo()
    assert_same(outcome(tmp_path / "out"), frozen_of(alone(1, *further)), **TOLERANCE)


@pytest.mark.faults  # a rank has been seen to leave without its status, once in five runs beside other work
def test_a_run_that_was_stopped_goes_on_to_the_same_end(words, tmp_path):
    """Also with another strategy, from the same checkpoint; a damaged export is made again."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(train, two_ranks(words, whole, *FSDP), whole)
    argv = two_ranks(words, stopped, *FSDP)
    assert [status for status, _ in run(train, argv, stopped, 4)] == [143, 143]
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 5
    (stopped / "checkpoint2" / "config.json").unlink()
    shutil.copytree(stopped, tmp_path / "ddp")
    run(train, argv, stopped)
    assert_same(outcome(stopped), outcome(whole), rtol=0, atol=0)
    for folder in (stopped, whole):
        exported = load_model(str(folder / "checkpoint2")).state_dict()
        best = torch.load(whole / "checkpoint2.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(weight, best[f"model.{name}"]) for name, weight in exported.items())
    run(train, two_ranks(words, tmp_path / "ddp"), tmp_path / "ddp")
    assert_same(outcome(tmp_path / "ddp"), outcome(whole), **TOLERANCE)


def train_with_a_nan(rank: int, words: list[str], out: Path):
    """`train`, with gradients on rank 1 alone that are not finite in its second step."""
    from rag.training.qa_module import GenerativeQAModule

    step = GenerativeQAModule.training_step

    def training_step(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        if rank == 1 and module.global_step == 1 and not hasattr(module, "had_a_nan"):
            module.had_a_nan = True
            return loss * torch.tensor(float("nan"))
        return loss

    GenerativeQAModule.training_step = training_step
    return train(rank, words, out)


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_seen_on_every_rank(words, tmp_path):
    out = tmp_path / "skipped"
    ends = run(train_with_a_nan, two_ranks(words, out, *FSDP, "--nan_policy", "skip", "--max_steps", "3"), out)
    assert [metrics["skipped_steps"] for metrics, _ in ends] == [1, 1]
    assert all(weight.isfinite().all() for weight in outcome(out)["weights"].values())


class Holder(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_a_stand_in_holds_weights_for_a_while_and_keeps_their_ties(bart):
    module = Holder(copy.deepcopy(bart))
    own, stand_in = module.model, StandIn(module)
    others = {f"model.{name}": weight + 1 for name, weight in own.state_dict().items()}
    for weights in (None, others):
        stand_in.enter(weights)
        model = module.model
        assert model is not own and not model.training
        assert model.lm_head.weight is model.model.shared.weight
        for name, weight in own.named_parameters():
            held = model.get_parameter(name)
            assert torch.equal(held, weight if weights is None else weight + 1) and not held.requires_grad
        assert torch.equal(model.final_logits_bias, own.final_logits_bias)
        stand_in.leave()
        assert module.model is own
        assert all(weight.is_meta for weight in model.parameters())


def test_layers_that_the_config_drops_are_refused(bart):
    module = Holder(copy.deepcopy(bart))
    module.model.get_encoder().layerdrop = 0.1
    with pytest.raises(UserError, match=r"--encoder_layerdrop 0 .*ddp_find_unused_parameters_true"):
        shard(module, mesh=None)


@pytest.mark.cuda
def test_one_gpu_holds_all_of_it(words, tmp_path):
    """NCCL, and all that is moved between the devices."""
    outs = tmp_path / "fsdp", tmp_path / "ddp"
    for out, strategy in zip(outs, ("fsdp", "ddp"), strict=True):
        flags = ["--accelerator", "gpu", "--devices", "1", "--strategy", strategy, "--do_train", "--do_predict"]
        argv = [*words, *flags, "--train_batch_size", "4", "--output_dir", str(out)]
        subprocess.run([sys.executable, str(ROOT / "finetune_rag.py"), *argv], check=True, timeout=300)
    assert_same(*map(outcome, outs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--precision", "16-mixed"], ["--precision 16-mixed", "--bf16"]),
        (["--fp16"], ["--fp16", "--bf16"]),
        (["--compile"], ["--compile"]),
        (["--adafactor"], ["--adafactor"]),
        (["--encoder_layerdrop", "0.1"], ["--encoder_layerdrop 0.1"]),
        (["--strategy", "fsdp_cpu_offload"], ["--strategy fsdp_cpu_offload", "give fsdp"]),
        (["--strategy", "deepspeed_stage_3"], ["--strategy deepspeed_stage_3", "give fsdp"]),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_flags(flags, told):
    given = ["--model_name_or_path", "x", "--data_dir", "x", "--output_dir", "x", *FSDP, *flags]
    with pytest.raises(UserError) as error:
        finetune_rag.parse_args(given)
    assert all(word in str(error.value) for word in told) and "\n" not in str(error.value)


def test_one_process_on_a_cpu_is_told_that_it_has_nobody_to_share_with(tmp_path):
    with pytest.raises(UserError, match=r"^--strategy fsdp: there is one process, .* or give --devices 2 or more$"):
        build_trainer(toy_args(tmp_path, *FSDP), [], False)
