"""A loss, gradients or weights that are not finite: stopped or skipped, saved as before, never kept as the best."""

import json

import pytest
import torch

from rag.errors import UserError
from rag.training.base_module import BaseTransformer
from rag.training.non_finite import LeftOutError, NonFiniteError, OptimizerStep, weights_are_finite
from tests.training.lightning_toy import ToyModule, fit, toy_args

BAD = 7  # the example whose loss or gradients are not finite
FLAGS = ["--save_interval", "0", "--val_check_interval", "2"]


class NanLoss(ToyModule):
    def losses(self, batch):
        return torch.where(torch.tensor(batch["index"]) == BAD, float("nan"), super().losses(batch))


class InfiniteGradients(ToyModule):
    def __init__(self, args, scores=()):
        super().__init__(args, scores)
        self.linear.weight.register_hook(lambda gradient: gradient * float("inf") if self.is_bad else gradient)

    def losses(self, batch):
        self.is_bad = BAD in batch["index"]
        return super().losses(batch)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("module_class", [NanLoss, InfiniteGradients])
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(module_class, accumulate, tmp_path, caplog):
    args = toy_args(tmp_path, *FLAGS, "--nan_policy", "skip", "--gradient_accumulation_steps", accumulate)
    trainer, module = fit(args, module_class=module_class)
    assert weights_are_finite(module) and module.skipped_steps == 2  # one an epoch
    assert trainer.callback_metrics["skipped_steps"] == 2
    assert [row["skipped_steps"] for row in log_of(tmp_path) if "skipped_steps" in row][-1] == 2
    told = [record.getMessage() for record in caplog.records]
    assert any("'line 7 long'" in line and "is skipped" in line for line in told)
    assert any(line.startswith(f"2 of {trainer.global_step} steps had a loss or gradients") for line in told)
    checkpoint = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert checkpoint["skipped_steps"] == 2


def test_a_skipped_step_changes_nothing_but_the_learning_rate(tmp_path):
    """As if the batch had not been there: AdamW's moments and its count of steps stay, too."""
    args = toy_args(tmp_path, "--nan_policy", "skip", "--num_train_epochs", "1")
    trainer, _ = fit(args, module_class=NanLoss)
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert (trainer.global_step, steps) == (6, {5})


@pytest.mark.parametrize("module_class", [NanLoss, InfiniteGradients])
@pytest.mark.parametrize("flags", [FLAGS, ["--save_interval", "0"]])
def test_it_stops_saved_as_before_the_step_and_goes_on_by_skipping(module_class, flags, tmp_path):
    _, whole = fit(toy_args(tmp_path / "whole", *flags, "--nan_policy", "skip"), module_class=module_class)
    with pytest.raises(NonFiniteError) as error:
        fit(toy_args(tmp_path, *flags), module_class=module_class)
    order = [index for batch in whole.trained_on for index in batch]
    step = order.index(BAD) // 2 + 1
    assert str(error.value).startswith(f"step {step}: the ") and "'line 7 long'" in str(error.value)
    assert "\n" not in str(error.value) and "--nan_policy skip" in str(error.value)
    saved = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step - 1
    with pytest.raises(NonFiniteError, match=rf"^step {step}: "):  # again
        fit(toy_args(tmp_path, *flags), module_class=module_class)
    _, resumed = fit(toy_args(tmp_path, *flags, "--nan_policy", "skip"), module_class=module_class)
    assert resumed.trained_on == whole.trained_on[step - 1 :]
    assert resumed.linear.weight.tolist() == whole.linear.weight.tolist()
    assert resumed.skipped_steps == whole.skipped_steps
    metrics = [json.loads((folder / "out" / "metrics.json").read_text()) for folder in (tmp_path, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    values = [
        {(row["step"], name): row[name] for row in log_of(one) for name in row}
        for one in (tmp_path, tmp_path / "whole")
    ]
    assert values[0] == values[1]


@pytest.fixture
def later(monkeypatch):
    """The CPU as a device that is not waited for but at log steps."""
    monkeypatch.setattr(BaseTransformer, "judges_later", lambda module, optimizer: True)


LATER_FLAGS = ["--save_interval", "0", "--log_every_n_steps", "4"]


@pytest.mark.parametrize("module_class", [NanLoss, InfiniteGradients])
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_device_leaves_out_a_step_as_it_is_skipped(module_class, accumulate, later, tmp_path, caplog, monkeypatch):
    flags = [*LATER_FLAGS, "--nan_policy", "skip", "--gradient_accumulation_steps", accumulate]
    trainer, module = fit(toy_args(tmp_path / "later", *flags), module_class=module_class)
    told = [record.getMessage() for record in caplog.records]
    assert any("'line 7 long'" in line and "is skipped" in line for line in told)
    assert module.skipped_steps == 2 and not module.pending_steps.steps
    monkeypatch.undo()
    same_trainer, same = fit(toy_args(tmp_path / "at_once", *flags), module_class=module_class)
    assert module.trained_on == same.trained_on and module.linear.weight.tolist() == same.linear.weight.tolist()
    counts = [{float(state["step"]) for state in one.optimizers[0].state.values()} for one in (trainer, same_trainer)]
    assert counts[0] == counts[1]
    assert {record.getMessage() for record in caplog.records} == set(told)


@pytest.mark.parametrize("module_class", [NanLoss, InfiniteGradients])
def test_what_a_device_left_out_stops_the_run_again_until_it_may_skip(module_class, later, tmp_path):
    _, whole = fit(toy_args(tmp_path / "whole", *LATER_FLAGS, "--nan_policy", "skip"), module_class=module_class)
    step = [index for batch in whole.trained_on for index in batch].index(BAD) // 2 + 1
    for _ in range(2):
        with pytest.raises(LeftOutError, match=rf"^step {step}: the .*'line 7 long'.*--nan_policy skip goes on"):
            fit(toy_args(tmp_path, *LATER_FLAGS), module_class=module_class)
        saved = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
        assert step <= saved["global_step"] <= step + 4 and saved["left_out"].startswith(f"step {step}: ")
    _, resumed = fit(toy_args(tmp_path, *LATER_FLAGS, "--nan_policy", "skip"), module_class=module_class)
    assert resumed.trained_on == whole.trained_on[saved["global_step"] :]
    assert resumed.linear.weight.tolist() == whole.linear.weight.tolist()
    assert resumed.skipped_steps == whole.skipped_steps


def test_only_a_fused_optimizer_on_a_device_leaves_steps_out_by_itself(tmp_path, monkeypatch):
    module = ToyModule(toy_args(tmp_path))
    fused, plain = (torch.optim.AdamW(module.parameters(), fused=fused) for fused in (True, False))
    assert not module.judges_later(fused)
    monkeypatch.setattr(ToyModule, "device", torch.device("meta"))
    assert module.judges_later(fused) and not module.judges_later(plain)


class BadFirst(ToyModule):
    def losses(self, batch):
        return super().losses(batch) * float("nan")


def test_a_first_step_that_is_not_finite_leaves_nothing(tmp_path):
    with pytest.raises(NonFiniteError, match=r"^step 1: the loss is nan \(questions: 'line "):
        fit(toy_args(tmp_path), module_class=BadFirst)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


class BadWeights(ToyModule):
    """Its weights are lost where no step can see it, before the second validation."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        if self.trainer.checkpoint_callback.validations == 1:
            with torch.no_grad():
                self.linear.weight[0, 0] = float("nan")


def test_weights_that_are_not_finite_are_neither_the_best_nor_the_last(tmp_path):
    with pytest.raises(UserError, match=r"^step 12: the weights are not finite and are not saved"):
        fit(toy_args(tmp_path), [0.1, 0.9], module_class=BadWeights)
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*c*k*p*")} == {"checkpoint1", "checkpoint1.ckpt", "last.ckpt"}
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_score_that_is_nan_is_the_worst(tmp_path):
    trainer, _ = fit(toy_args(tmp_path, "--num_train_epochs", "3"), [0.2, float("nan"), 0.1])
    assert [kept["number"] for kept in trainer.checkpoint_callback.kept] == [1, 3, 2]


def test_the_questions_are_those_whose_loss_is_not_finite():
    step = OptimizerStep()
    nan, inf = float("nan"), float("inf")
    step.add(torch.tensor(nan), torch.tensor([1.0, nan, inf]), [4, 5, 6], ["a", "b", "c" * 200])
    assert not step.is_finite(None)
    rows = step.rows()
    assert [row["index"] for row in rows] == [5, 6]
    assert step.description(None, rows) == f"the loss is nan (questions: 'b', '{'c' * 80}')"
    step = OptimizerStep()
    step.add(torch.tensor(1.0), torch.ones(5), list(range(5)), list("abcde"))
    assert step.is_finite(torch.tensor(3.0)) and not step.is_finite(torch.tensor(inf))
    told = step.description(torch.tensor(inf), step.rows())
    assert told == "the gradients' norm is inf (questions: 'a', 'b', 'c' and 2 more)"
