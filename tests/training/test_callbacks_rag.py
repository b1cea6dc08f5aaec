"""The best checkpoints, `metrics.json`, early stopping, log lines; also where a run is killed between two writes."""

import json
import os
import re
import shutil
from itertools import chain, count
from pathlib import Path

import pytest
import torch

import callbacks_rag
import rag.files
from lightning_base import Seq2SeqDataModule, build_logger, build_trainer
from rag.errors import UserError
from rag.public_names import Replaced
from tests.training.lightning_toy import At, Killed, ToyModule, ToyTokenizer, fit, toy_args


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder / "out"))


def checkpoints(*numbers: int) -> set[str]:
    kept = chain(*((f"checkpoint{number}", f"checkpoint{number}.ckpt") for number in numbers))
    return {"last.ckpt", "metrics.json", "training_log.jsonl", *kept}


def epochs(n: int, *flags: str) -> list[str]:
    return ["--num_train_epochs", str(n), *flags]


def weights(path: Path) -> list:
    if path.is_dir():
        return json.loads((path / "weights.json").read_text())
    return torch.load(path, weights_only=True)["state_dict"]["linear.weight"].tolist()


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.1, 0.2, 0.3, 0.4], (2, 3, 4), 4),
        ([0.4, 0.3, 0.2, 0.1], (1, 2, 3), 1),
        ([0, 0, 0, 0, 0], (3, 4, 5), 5),
        ([0.5, 0.2, 0.5, 0.2, 0.5], (1, 3, 5), 5),
        ([0.5, 0.5, 0.2, 0.2, 0.1], (1, 2, 4), 2),
        ([0.5], (1,), 1),
    ],
)
def test_the_best_three_are_kept_and_of_equals_the_later(scores, kept, best, tmp_path):
    trainer, _ = fit(toy_args(tmp_path, *epochs(len(scores))), scores)
    assert files(tmp_path) == checkpoints(*kept)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "out" / f"checkpoint{best}.ckpt")


def test_folder_and_checkpoint_hold_the_weights_of_their_validation(tmp_path):
    _, module = fit(toy_args(tmp_path, *epochs(3)), [0.1, 0.2, 0.3])
    found = [weights(tmp_path / "out" / f"checkpoint{number}") for number in (1, 2, 3)]
    assert found == [weights(tmp_path / "out" / f"checkpoint{number}.ckpt") for number in (1, 2, 3)]
    assert found[0] != found[1] != found[2] == module.linear.weight.tolist() == weights(tmp_path / "out" / "last.ckpt")


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    _, module = fit(toy_args(tmp_path, *epochs(1)), [0.1])
    assert weights(tmp_path / "out" / "last.ckpt") == module.linear.weight.tolist()


def test_neither_sanity_check_nor_test_counts_as_validation(tmp_path):
    trainer, module = fit(toy_args(tmp_path, *epochs(1, "--num_sanity_val_steps", "2")))
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert trainer.checkpoint_callback.validations == 1
    assert files(tmp_path) == checkpoints(1)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [len(metrics[split]) for split in ("train", "val", "test")] == [1, 1, 1]
    assert metrics["test"][0].keys() == {"step", "epoch", "step_count", "test_sum"}


def test_a_resumed_run_counts_on_and_never_uses_a_number_again(tmp_path):
    fit(toy_args(tmp_path, *epochs(2)), [0.9, 0.1])
    fit(toy_args(tmp_path, *epochs(4)), [0.9, 0.1, 0.5, 0.3])
    assert files(tmp_path) == checkpoints(1, 3, 4)
    rows = _validations(tmp_path)
    assert [row["step"] for row in rows] == [6, 12, 18, 24]
    assert [row["step_count"] for row in rows] == [1, 2, 3, 4]
    assert [row["val_em"] for row in rows] == pytest.approx([0.9, 0.1, 0.5, 0.3])


def test_a_run_resumed_from_an_older_checkpoint_takes_back_what_came_later(tmp_path):
    fit(toy_args(tmp_path, *epochs(3)), [0.1, 0.2, 0.3])
    first = str(tmp_path / "out" / "checkpoint1.ckpt")
    fit(toy_args(tmp_path, *epochs(2, "--resume_from_checkpoint", first)), [0.1, 0.7])
    assert files(tmp_path) == checkpoints(1, 2)
    assert [row["val_em"] for row in _validations(tmp_path)] == pytest.approx([0.1, 0.7])


def test_a_run_resumed_into_another_folder_leaves_the_first_as_it_is(tmp_path):
    fit(toy_args(tmp_path, *epochs(2)), [0.9, 0.1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data").symlink_to(tmp_path / "data")
    last = str(tmp_path / "out" / "last.ckpt")
    trainer, _ = fit(toy_args(tmp_path / "other", *epochs(3, "--resume_from_checkpoint", last)), [0.9, 0.1, 0.2])
    assert files(tmp_path) == checkpoints(1, 2)
    assert files(tmp_path / "other") == checkpoints(3)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "other" / "out" / "checkpoint3.ckpt")


def test_a_run_started_afresh_removes_the_earlier_ones_checkpoints_only(tmp_path):
    fit(toy_args(tmp_path, *epochs(3)), [0.1, 0.2, 0.3])
    (tmp_path / "out" / "checkpoint_notes.txt").write_text("mine")
    fit(toy_args(tmp_path, *epochs(1, "--overwrite_output_dir")), [0.5])
    assert files(tmp_path) == checkpoints(1) | {"checkpoint_notes.txt"}
    assert len(_validations(tmp_path)) == 1


WRITES = [(os, "replace"), (os, "link"), (shutil, "rmtree"), (Path, "rename"), (Path, "unlink")]


def test_a_kill_between_any_two_writes_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    """Killed before its n-th write after the third validation, whatever n, the run ends as if it had not been."""
    scores, flags = [0.1, 0.2, 0.3, 0.4], epochs(4)
    _, whole = fit(toy_args(tmp_path / "whole", *flags), scores)
    with pytest.raises(Killed):
        fit(toy_args(tmp_path / "three", *flags), scores, [At("on_train_batch_start", 19)])
    for n in count(1):
        folder = tmp_path / f"killed{n}"
        shutil.copytree(tmp_path / "three", folder)
        try:
            with monkeypatch.context() as patched:
                done = count(1)
                for owner, name in WRITES:
                    patched.setattr(owner, name, _dies_at(getattr(owner, name), n, done))
                fit(toy_args(folder, *flags), scores)
            break
        except Killed:
            kept = torch.load(folder / "out" / "last.ckpt", weights_only=True)["callbacks"]["BestCheckpoints"]["kept"]
            for path in (folder / "out" / f"checkpoint{one['number']}" for one in kept):
                assert weights(path) == weights(path.with_suffix(".ckpt"))
            trainer, module = fit(toy_args(folder, *flags), scores)
            assert files(folder) == checkpoints(2, 3, 4)
            assert module.linear.weight.tolist() == whole.linear.weight.tolist()
            assert trainer.checkpoint_callback.validations == 4
            assert _validations(folder) == _validations(tmp_path / "whole")
    assert n > 10


def _dies_at(write, n: int, done):
    """The n-th of all writes raises and so do those after it, which a real kill would not get to."""

    def counted(*args, **kwargs):
        if next(done) >= n:
            raise Killed
        return write(*args, **kwargs)

    return counted


def _validations(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "metrics.json").read_text())["val"]


def test_last_is_written_inside_an_epoch_when_its_time_has_come(tmp_path, monkeypatch):
    seconds = count(0)  # a second a look at the clock
    monkeypatch.setattr(callbacks_rag.time, "monotonic", lambda: next(seconds))
    steps = []
    save = callbacks_rag.BestCheckpoints._save_last

    def noted(self, trainer, same_as=None):
        steps.append(trainer.global_step)
        save(self, trainer, same_as)

    monkeypatch.setattr(callbacks_rag.BestCheckpoints, "_save_last", noted)
    flags = ["--enable_progress_bar", "true", "--num_train_epochs", "1"]  # without lines, which look at the clock too
    for minutes, saved in (("0", [6]), ("1e-9", [1, 2, 3, 4, 5, 6])):
        steps.clear()
        fit(toy_args(tmp_path / minutes, *flags, "--save_interval", minutes))
        assert steps == saved


@pytest.mark.parametrize(
    ("patience", "scores", "validations"),
    [("-1", [0.5] * 5, 5), ("2", [0.1, 0.5, 0.5, 0.4, 0.9], 4), ("0", [0.5, 0.5, 0.9], 2), ("3", [0.1, 0.2, 0.3], 3)],
)
def test_it_stops_after_so_many_validations_without_a_better_one(patience, scores, validations, tmp_path):
    trainer, _ = fit(toy_args(tmp_path, *epochs(len(scores), "--early_stopping_patience", patience)), scores)
    assert trainer.checkpoint_callback.validations == validations


def test_patience_counts_on_after_a_kill_and_may_be_changed(tmp_path):
    scores = [0.5, 0.4, 0.4, 0.4, 0.4, 0.4]
    flags = epochs(6, "--early_stopping_patience", "3")
    with pytest.raises(Killed):
        fit(toy_args(tmp_path, *flags), scores, [At("on_train_batch_start", 14)])
    assert fit(toy_args(tmp_path, *flags), scores)[0].checkpoint_callback.validations == 4
    trainer, _ = fit(toy_args(tmp_path, *epochs(6, "--early_stopping_patience", "4")), scores)
    assert trainer.checkpoint_callback.validations == 5


def test_metrics_are_a_row_a_validation(tmp_path):
    fit(toy_args(tmp_path, "--val_check_interval", "3"), [0.1, 0.2, 0.3, 0.4])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [(row["step"], row["epoch"]) for row in metrics["val"]] == [(3, 0), (6, 0), (9, 1), (12, 1)]
    assert metrics["val"][0].keys() == {"step", "epoch", "step_count", "val_em", "val_examples"}
    assert [row["step_count"] for split in ("train", "val") for row in metrics[split]] == [1, 2, 3, 4] * 2
    assert metrics["train"][0].keys() == {"step", "epoch", "step_count", "loss", "lr", "grad_norm"}


def test_lines_tell_step_loss_rate_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks_rag.ProgressLines.__init__, "__defaults__", (0,))
    fit(toy_args(tmp_path, *epochs(1)), [0.25])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1, step 1 of 6: loss ") and lines[0].endswith(" left")
    assert "validated at step 6: val_em 0.25, val_examples 5" in lines
    fit(toy_args(tmp_path, *epochs(2)), [0.25, 0.5])
    assert capsys.readouterr().out.startswith("going on at step 6 of 12, from ")


def test_the_bar_shows_loss_em_rate_and_time_left(tmp_path, capsys):
    trainer, module = fit(toy_args(tmp_path, "--enable_progress_bar", "true"), [0.25, 0.5])
    last = capsys.readouterr().out.replace("\n", "\r").split("\r")
    ends = [line for line in last if line.startswith("Epoch 2: 100%")]
    assert re.search(r"6/6 \[.*it/s, loss=[\d.]+, val_em=0.500, left=00:00\]", ends[-1])
    shown = trainer.progress_bar_callback.get_metrics(trainer, module)
    assert shown["loss"] == pytest.approx(float(trainer.callback_metrics["loss"]), abs=1e-3)


def test_one_step_ends_the_training_with_a_validation(tmp_path):
    fit(toy_args(tmp_path, "--max_steps", "2"), [0.1])
    assert files(tmp_path) == checkpoints(1)


def test_an_export_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fails(self, folder):
        (folder / "weights.json").write_text("[")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(ToyModule, "export", fails)
        with pytest.raises(OSError, match="disk full"):
            fit(toy_args(tmp_path), [0.1, 0.2])
    assert files(tmp_path) == {"metrics.json", "training_log.jsonl"}


def test_a_disk_without_room_for_what_will_be_kept_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(rag.files, "free_bytes", lambda path: 400)  # three times nine weights with moments and export
    with pytest.raises(UserError, match=rf"^--output_dir {tmp_path / 'out'}: 432 bytes are needed and 400 are free"):
        fit(toy_args(tmp_path, *epochs(3)), [0.1, 0.2, 0.3])
    assert not (tmp_path / "out").exists()
    fit(toy_args(tmp_path, *epochs(2)), [0.1, 0.2])


# --- Callbacks for other modules and Trainers -------------------------------------------------------------------------


class LossModule(ToyModule):
    """Logs `val_loss`, the lower the better, and has nothing to export."""

    export = Replaced("nothing is exported")

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val_loss", -self.trainer.callback_metrics["val_em"])


def train_with(args, module, *callbacks):
    trainer = build_trainer(args, list(callbacks), build_logger(args))
    trainer.fit(module, datamodule=Seq2SeqDataModule(args.data, args.training.seed, ToyTokenizer()))
    return trainer


def test_the_best_three_by_the_metric_that_is_named(tmp_path):
    args = toy_args(tmp_path, *epochs(5))
    out = tmp_path / "out"
    best = callbacks_rag.get_checkpoint_callback(out, "loss")
    train_with(args, LossModule(args, [0.5, 0.1, 0.4, 0.2, 0.3]), best)
    assert {path.name for path in out.glob("checkpoint*")} == {f"checkpoint{n}.ckpt" for n in (1, 3, 5)}
    assert best.best_model_path == str(out / "checkpoint1.ckpt") and best.kept[0]["score"] == pytest.approx(-0.5)
    again = callbacks_rag.get_checkpoint_callback(str(out), "em")
    trainer = train_with(args, ToyModule(args, [0.5, 0.1, 0.4, 0.2, 0.3]), again)
    assert trainer.checkpoint_callback is again and again.best_model_path == str(out / "checkpoint1.ckpt")


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    args = toy_args(tmp_path)
    with pytest.raises(UserError, match=r"kept by val_rouge2, which the module does not log; it logs .*val_em"):
        train_with(args, ToyModule(args), callbacks_rag.get_checkpoint_callback(tmp_path / "out", "rouge2"))


@pytest.mark.parametrize(("metric", "module_class"), [("em", ToyModule), ("loss", LossModule)])
def test_it_stops_early_by_the_metric_that_is_named(metric, module_class, tmp_path):
    args = toy_args(tmp_path, *epochs(5))
    stop = callbacks_rag.get_early_stopping_callback(metric, 2)
    best = callbacks_rag.get_checkpoint_callback(tmp_path / "out", metric)
    train_with(args, module_class(args, [0.1, 0.5, 0.4, 0.3, 0.9]), stop, best)
    assert best.validations == 4


def test_sizes_and_learning_rates_are_logged_beside_metrics_json(tmp_path):
    args = toy_args(tmp_path, *epochs(1))
    module = ToyModule(args, [0.1, 0.2])
    module.linear.bias.requires_grad_(False)
    callbacks = [callbacks_rag.Seq2SeqLoggingCallback(), callbacks_rag.get_checkpoint_callback(tmp_path / "out", "em")]
    trainer = train_with(args, module, *callbacks)
    rows = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert {"step": 0, "n_params": 9, "mp": 9e-6, "grad_mp": 8e-6} in rows
    rates = [row["lr_group_0"] for row in rows if "lr_group_0" in row]
    assert len(rates) == trainer.global_step == 6 and rates == sorted(rates, reverse=True)
    assert [row["step_count"] for row in _validations(tmp_path)] == [1]
    assert callbacks_rag.count_trainable_parameters(module) == 8


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    left = [".checkpoint4.7.tmp", "..checkpoint4.7.tmp.7.tmp", ".checkpoint4.7.old", "checkpoint9", "checkpoint9.ckpt"]
    kept = ["metrics.json", "checkpoint4", ".checkpoint4.notes", ".lock"]
    for name in left + kept:
        (tmp_path / name).mkdir()
    callback = callbacks_rag.BestCheckpoints(tmp_path)
    callback.kept = [{"number": 4, "score": 0.0}]
    callback._remove_strays()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
