"""Optimizer, schedule, data and Trainer on a model of nine weights; a resumed run is the uninterrupted one."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import chain

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.nn.utils import get_total_norm
from transformers import optimization

from lightning_base import AtomicCheckpointIO, build_logger, build_trainer
from rag.errors import UserError
from rag.training.optimizer import build_optimizer, parameter_groups
from tests.conftest import ROOT, assert_equal_but_for_rounding
from tests.training.lightning_toy import At, Killed, ToyModule, fit, toy_args, write_data

# --- Going on ---------------------------------------------------------------------------------------------------------

RUNS = {
    "validation at the end of the epoch": [],
    "validation inside the epoch": ["--val_check_interval", "2"],
    "accumulated gradients": ["--gradient_accumulation_steps", "2"],
    "accumulated gradients, validation between": ["--gradient_accumulation_steps", "2", "--val_check_interval", "3"],
    "steps": ["--max_steps", "9"],
    "steps across epochs": ["--val_check_interval", "4", "--check_val_every_n_epoch", "null", "--max_steps", "11"],
    "part of an epoch": ["--limit_train_batches", "4"],
    "no validation": ["--limit_val_batches", "0"],
    "batches by length": ["--group_by_length"],
}
KILLS = [("on_train_batch_start", 3), ("on_train_batch_end", 5), ("on_validation_start", 2), ("on_validation_end", 1),
         ("on_train_epoch_end", 1), ("on_train_batch_start", 8)]  # fmt: skip


def outcome(folder, module):
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    return module.linear.weight.tolist(), metrics["val"]


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_killed_and_resumed_is_uninterrupted(flags, tmp_path):
    """Bit for bit, with dropout: weights, validations and the order of examples."""
    for interval in ("0", "1e-9"):  # last.ckpt after validations only, and after every step
        flags = [*flags, "--save_interval", interval]
        _, whole = fit(toy_args(tmp_path / f"whole{interval}", *flags))
        for hook, n in KILLS:
            folder = tmp_path / f"{hook}{n}{interval}"
            try:
                fit(toy_args(folder, *flags), extra_callbacks=[At(hook, n)])
            except Killed:
                args = toy_args(folder, *flags)
                _, resumed = fit(args)
                assert outcome(folder, resumed) == outcome(tmp_path / f"whole{interval}", whole), (hook, n, interval)
                assert resumed.trained_on == whole.trained_on[-len(resumed.trained_on) :]
                if interval == "1e-9" and hook.startswith("on_train_batch") and "accum" not in str(flags):
                    assert len(resumed.trained_on) < len(whole.trained_on)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--max_steps", "4"], ["--max_steps", "9"]),
        (["--num_train_epochs", "1"], []),
        (["--max_steps", "4", "--limit_val_batches", "0"], ["--limit_val_batches", "0"]),
    ],
)
def test_a_finished_run_is_lengthened_without_repeating_an_example(first, then, tmp_path):
    _, whole = fit(toy_args(tmp_path / "whole", *then))
    _, short = fit(toy_args(tmp_path, *first))
    trainer, longer = fit(toy_args(tmp_path, *then))
    assert short.trained_on + longer.trained_on == whole.trained_on
    assert trainer.global_step == len(whole.trained_on)
    assert fit(toy_args(tmp_path, *then))[1].trained_on == []


@pytest.mark.parametrize("flags", [[], ["--group_by_length"], ["--gradient_accumulation_steps", "2"]])
@pytest.mark.parametrize(("before", "after"), [("2", "4"), ("4", "2"), ("4", "3"), ("2", "6")])
def test_other_batches_go_on_within_the_epoch_and_repeat_nothing(before, after, flags, tmp_path):
    """As where another number of ranks resumes: 11 examples an epoch, each once, also in the epochs behind it."""
    flags = ["--num_train_epochs", "3", "--save_interval", "1e-9", *flags]
    for n in (3, 4, 5, 7, 8):
        folder = tmp_path / f"{n}"
        try:
            fit(toy_args(folder, *flags, "--train_batch_size", before), extra_callbacks=[At("on_train_batch_start", n)])
        except Killed:
            assert (folder / "out" / "last.ckpt").exists()
        state = torch.load(folder / "out" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]
        done = state["combined_loader"][0]["epoch"] * 11 + state["combined_loader"][0]["seen"]
        trainer, resumed = fit(toy_args(folder, *flags, "--train_batch_size", after))
        examples = list(chain(*resumed.trained_on))
        assert len(examples) == 33 - done
        rest, whole = examples[: -done % 11], examples[-done % 11 :]
        assert len(set(rest)) == len(rest)
        assert all(sorted(whole[i : i + 11]) == list(range(11)) for i in range(0, len(whole), 11))
        assert trainer.current_epoch == 3 and trainer.checkpoint_callback.validations == 3


@pytest.mark.parametrize(("hook", "n"), [("on_train_batch_start", 3), ("on_validation_start", 1)])
def test_a_run_asked_to_end_saves_and_does_not_claim_success(hook, n, tmp_path):
    _, whole = fit(toy_args(tmp_path / "whole"))
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the one that Ray's tests may have left
    with pytest.raises(SystemExit) as ended:
        fit(toy_args(tmp_path), extra_callbacks=[At(hook, n, do=lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "out" / "last.ckpt").exists() == (hook == "on_train_batch_start")
    signal.signal(signal.SIGTERM, handler)
    _, resumed = fit(toy_args(tmp_path))
    assert outcome(tmp_path, resumed) == outcome(tmp_path / "whole", whole)


def test_checkpoints_load_without_unpickling(tmp_path):
    args = toy_args(tmp_path, "--early_stopping_patience", "3", "--fp16_opt_level", "O1")
    trainer, _ = fit(args)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert checkpoint["hyper_parameters"] == args.to_dict()
    torch.save({"harm": os.system}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="without running what is in it"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)


# --- Optimizer and schedule -------------------------------------------------------------------------------------------


class Parts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.question_encoder, self.lm_head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
        layers = {"encoder": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2)}
        self.generator = torch.nn.ModuleDict(layers)


def test_each_part_of_the_model_has_its_learning_rate_and_vectors_do_not_decay(tmp_path):
    module = Parts()
    module.generator["encoder"].bias.requires_grad_(False)
    names = {parameter: name for name, parameter in module.named_parameters()}
    args = toy_args(tmp_path, "--question_encoder_learning_rate", "1e-6", "--weight_decay", "0.1")
    groups = [
        (group["suffix"], group["lr"], group["weight_decay"], {names[parameter] for parameter in group["params"]})
        for group in parameter_groups(module, args.training)
    ]
    assert groups == [
        ("_question_encoder", 1e-6, 0.1, {"question_encoder.weight"}),
        ("_question_encoder", 1e-6, 0.0, {"question_encoder.bias"}),
        ("_decoder", 0.1, 0.1, {"lm_head.weight", "generator.decoder.weight"}),
        ("", 0.1, 0.1, {"generator.encoder.weight"}),
        ("_decoder", 0.1, 0.0, {"generator.decoder.bias"}),
        ("", 0.1, 0.0, {"generator.norm.weight", "generator.norm.bias"}),
    ]


def logged(folder, name):
    rows = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0, 1 / 2] + [1 - i / 10 for i in range(10)]),
        ("cosine", [0, 1 / 2] + [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]),
        ("cosine_w_restarts", [0, 1 / 2] + [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]),
        ("polynomial", [0, 1 / 2] + [(1 - 1e-6) * (1 - i / 10) + 1e-6 for i in range(10)]),
    ],
)
def test_learning_rates_follow_the_schedule_step_by_step(schedule, shares, tmp_path):
    fit(toy_args(tmp_path, "--warmup_steps", "2", "--lr_scheduler", schedule))
    assert logged(tmp_path, "lr") == pytest.approx([0.1 * share for share in shares], abs=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_w_restarts", "polynomial"])
@pytest.mark.parametrize("warmup", ["12", "20"])
def test_a_warm_up_as_long_as_the_training_only_rises(schedule, warmup, tmp_path):
    fit(toy_args(tmp_path, "--warmup_steps", warmup, "--lr_scheduler", schedule))
    assert logged(tmp_path, "lr") == pytest.approx([0.1 * step / int(warmup) for step in range(12)])


def test_adafactor_is_there(tmp_path):
    trainer, _ = fit(toy_args(tmp_path, "--adafactor", "--max_steps", "2"))
    assert isinstance(trainer.optimizers[0], optimization.Adafactor)
    assert logged(tmp_path, "lr") == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_a_scaled_loss_are_unscaled_before_they_are_clipped(fused, tmp_path):
    """As --fp16 does it; a fused AdamW left alone would unscale them inside its step, and Lightning refuse to clip."""
    module = Parts()
    optimizer = build_optimizer(module, toy_args(tmp_path).training, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum(parameter.sum() for parameter in module.parameters())).backward()
    scaler.unscale_(optimizer)
    assert {gradient.item() for p in module.parameters() for gradient in p.grad.flatten()} == {1.0}
    MixedPrecision("16-mixed", "cpu", scaler).clip_gradients(optimizer, 1.0)
    assert get_total_norm([parameter.grad for parameter in module.parameters()]).item() == pytest.approx(1.0, abs=1e-4)
    before = [parameter.clone() for parameter in module.parameters()]
    scaler.step(optimizer)
    for old, new in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1)  # AdamW's first step is the learning rate, whatever the gradient


def test_gradient_norms_are_logged_before_they_are_clipped(tmp_path):
    fit(toy_args(tmp_path, "--max_steps", "2", "--max_grad_norm", "1e-3"))
    assert min(logged(tmp_path, "grad_norm")) > 0.1


# --- Trainer, data, logger --------------------------------------------------------------------------------------------


def test_every_example_is_trained_on_once_an_epoch_and_validated_once(tmp_path):
    trainer, module = fit(toy_args(tmp_path))
    assert sorted(chain(*module.trained_on[:6])) == sorted(chain(*module.trained_on[6:])) == list(range(11))
    assert trainer.callback_metrics["val_examples"] == 5


def test_overfitting_sees_the_same_batches_every_epoch(tmp_path):
    _, module = fit(toy_args(tmp_path, "--overfit_batches", "2"))
    assert module.trained_on == [[0, 1], [2, 3]] * 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "2"], ["--gpus 2", "--accelerator cpu"]),
        (["--gpus", "0", "--fp16"], ["--fp16", "--bf16"]),
        (["--strategy", "luck"], ["--strategy luck"]),
        (["--accelerator", "tpu"], ["--accelerator tpu"]),
        (["--precision", "16-mixed"], ["--precision 16-mixed"]),
        (["--strategy", "ddp_spawn"], ["--strategy ddp_spawn", "give ddp"]),
    ],
)
def test_what_the_hardware_or_the_trainer_cannot_do_is_the_users_to_mend(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = toy_args(tmp_path, "--accelerator", "auto", "--devices", "auto", *flags)
    with pytest.raises(UserError) as error:
        build_trainer(args, [], build_logger(args))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_profile_is_written_when_asked_for(tmp_path):
    fit(toy_args(tmp_path, "--profile", "--max_steps", "1"))
    assert "run_training_batch" in (tmp_path / "out" / "fit-profile.txt").read_text()


def test_fast_dev_run_leaves_nothing_behind(tmp_path):
    fit(toy_args(tmp_path, "--fast_dev_run"))
    assert not (tmp_path / "out").exists()


def test_a_resumed_log_goes_on_and_a_new_one_starts_afresh(tmp_path):
    fit(toy_args(tmp_path, "--num_train_epochs", "1"))
    fit(toy_args(tmp_path))
    assert len(logged(tmp_path, "loss")) == 12
    fit(toy_args(tmp_path, "--overwrite_output_dir"))
    assert len(logged(tmp_path, "loss")) == 12


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(tmp_path):
    """Without dropout, 11 examples in batches of 4: the last holds 3, one rank 1 of them and the other 2."""
    two = "--accelerator auto --devices auto --gpus=0 --distributed_backend=ddp_cpu --num_processes=2"  # public suite's
    write_data(tmp_path / "data", val=1)  # the second rank has nothing of its own to validate
    _, one = fit(toy_args(tmp_path, "--train_batch_size", "4", "--dropout", "0"))
    alone = outcome(tmp_path, one)
    command = [sys.executable, "-m", "tests.training.lightning_toy", str(tmp_path), "--dropout", "0", *two.split()]
    subprocess.run(
        [*command, "--overwrite_output_dir"],
        cwd=ROOT,
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    assert_equal_but_for_rounding(state["linear.weight"], torch.tensor(alone[0]))
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["val"]
    assert [row["val_examples"] for row in rows] == [1, 1]
    assert [row["val_em"] for row in rows] == pytest.approx([row["val_em"] for row in alone[1]], rel=1e-4)


def test_rows_of_one_process_are_each_index_once_in_order(tmp_path):
    module = ToyModule(toy_args(tmp_path))
    module.trainer = build_trainer(module.args, [], build_logger(module.args))
    assert module.gather_rows([{"index": 2}, {"index": 0}, {"index": 2}]) == [{"index": 0}, {"index": 2}]
