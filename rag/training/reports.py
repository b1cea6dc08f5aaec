"""What a training says of itself: `metrics.json`, log lines, learning rates and sizes in the log.

    callbacks = [MetricsWriter(output_dir), ProgressLines()]  # or TrainingBar() on a terminal

Rank 0 writes; a resumed run drops what it makes again.
"""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from rag.errors import COLUMNS, ReportedError, UserError
from rag.files import save_json
from rag.progress import Pace
from rag.public_names import Replaced
from rag.training.run_folder import SPLITS, read_metrics


def is_real_run(trainer: pl.Trainer) -> bool:
    """Whether what happens now counts: not in the sanity check before the training, nor in --fast_dev_run."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run


def collects_gradients(trainer: pl.Trainer) -> bool:
    """Whether the next batch belongs to the optimizer step of this one, so that gradients are half collected."""
    return trainer.fit_loop._should_accumulate()


_host_groups: "WeakKeyDictionary[pl.Trainer, Any]" = WeakKeyDictionary()


def any_rank(trainer: pl.Trainer, decision: bool) -> bool:
    """Whether any rank says so. Collective; between GPUs, too, the processes talk, and no device is waited for."""
    if trainer.world_size == 1:
        return decision
    if trainer not in _host_groups:
        on_gpus = trainer.strategy.root_device.type == "cuda"
        _host_groups[trainer] = torch.distributed.new_group(backend="gloo") if on_gpus else None
    says_so = torch.tensor(int(decision))
    torch.distributed.all_reduce(says_so, torch.distributed.ReduceOp.MAX, group=_host_groups[trainer])
    return bool(says_so)


def raise_on_all_ranks(trainer: pl.Trainer, problem: str) -> NoReturn:
    """End every rank with what all of them know; rank 0 says it."""
    raise (UserError if trainer.is_global_zero else ReportedError)(problem)


class MetricsWriter(Callback):
    """Keeps `metrics.json`: {"train": [...], "val": [...], "test": [...]}, a row of each a validation, and one a test.

    A row is {"step", "epoch", "step_count", the metrics}, where "step_count" is the number of validations so far, the N
    of `checkpointN`; metrics of training are the last that were logged, all steps are in the log. A checkpoint has the
    rows and what was logged last, so that a resumed run writes the file that the unbroken one would have.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir) / "metrics.json"
        self.step_count: int | None = None  # on rank 0; None until a run begins or goes on
        self.rows: dict[str, list[dict[str, Any]]] | None = None  # those of a training that is under way, on rank 0
        self.logged: dict[str, float] = {}  # what the resumed run had logged of its training

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step_count, self.logged = state_dict["step_count"], state_dict.get("logged", {})
        self.rows = state_dict.get("rows")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Here and not in `state_dict`, which is not handed what was logged."""
        logged = {name: float(value) for name, value in self._training_metrics(trainer).items()}
        state = {"step_count": self.step_count, "rows": self.rows, "logged": logged}
        checkpoint["callbacks"][self.state_key] = state

    def _training_metrics(self, trainer: pl.Trainer) -> dict[str, Any]:
        metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("val_")}
        return self.logged | metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        last = trainer.global_step if trainer.ckpt_path else -1
        tests = self._rows_of_tests()
        if self.rows is None:  # a new run, or a checkpoint of another version
            self.rows = read_metrics(self.path) if trainer.ckpt_path else {split: [] for split in SPLITS}
        rows = self.rows | {"test": tests}
        self.rows = {split: [row for row in rows[split] if row["step"] <= last] for split in SPLITS}
        if self.step_count is None:
            self.step_count = len(self.rows["val"])
        if self.path.is_file():  # else a start that is refused at its first step would leave it
            save_json(self.rows, self.path)

    def _rows_of_tests(self) -> list[dict[str, Any]]:
        """Which come after the training, and so are in no checkpoint; they are made again if the file is damaged."""
        try:
            return read_metrics(self.path)["test"]
        except UserError:
            return []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_real_run(trainer) and trainer.is_global_zero and not self.path.is_file():  # nothing was measured
            save_json(self.rows, self.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_real_run(trainer):
            metrics = trainer.callback_metrics
            validation = {name: metrics[name] for name in metrics if name.startswith("val_")}
            self._write(trainer, train=self._training_metrics(trainer), val=validation)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, test=trainer.callback_metrics)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, **metrics_of: dict[str, Any]) -> None:
        rows = read_metrics(self.path) if self.rows is None else self.rows
        done = len(rows["val"]) if self.step_count is None else self.step_count
        self.step_count = done + ("val" in metrics_of)
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "step_count": self.step_count}
        for split, metrics in metrics_of.items():
            earlier = [row for row in rows[split] if row["step"] != trainer.global_step]
            rows[split] = [*earlier, place | {name: float(metrics[name]) for name in sorted(metrics)}]
        save_json(rows, self.path)


class ProgressLines(Callback):
    """The training as lines in a log file, where a progress bar would be a mess.

    Args:
        seconds: before the first line; later ones become rarer, as `Pace` says.
    """

    def __init__(self, seconds: float = 20):
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = int(trainer.estimated_stepping_batches)
        self._pace = Pace("steps", self.seconds, digits=2)
        self._start_step = trainer.global_step
        if trainer.ckpt_path:
            self._print(trainer, f"going on at step {self._start_step:,} of {self._total:,}, from {trainer.ckpt_path}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *batch: Any) -> None:
        step = trainer.global_step
        if step == self._start_step or not self._pace.line_is_due():
            return
        loss = f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.3f}" if outputs else "no loss"
        self._print(
            trainer,
            f"epoch {trainer.current_epoch + 1}, step {step:,} of {self._total:,}: {loss}, "
            f"{self._pace.rate(step - self._start_step, self._total - self._start_step)}",
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_real_run(trainer):
            metrics = [f"{k} {v:.4g}" for k, v in trainer.callback_metrics.items() if k.startswith("val_")]
            line = f"validated at step {trainer.global_step:,}: {', '.join(metrics)}"
            self._print(trainer, textwrap.fill(line, COLUMNS, subsequent_indent="  "))

    @staticmethod
    def _print(trainer: pl.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)


class TrainingBar(TQDMProgressBar):
    """The training on a terminal: a bar an epoch with loss, last validation's EM, and time left of the whole training.

    Args:
        refresh_rate: batches between two refreshings, each of which reads the loss, for which the device is waited for.
    """

    def __init__(self, refresh_rate: int = 1):
        super().__init__(refresh_rate)
        self.left: Callable[[int], str] | None = None  # of the step that is reached; None before the training

    def init_train_tqdm(self) -> Any:
        """Without the times of the epoch: beside them a terminal of 80 columns has no room for `left`."""
        bar = super().init_train_tqdm()
        bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{rate_noinv_fmt}{postfix}]"
        return bar

    def on_train_start(self, trainer: pl.Trainer, *module: Any) -> None:
        super().on_train_start(trainer, *module)
        pace, start = Pace("steps"), trainer.global_step
        total = int(trainer.estimated_stepping_batches) - start
        self.left = lambda step: pace.time_left(step - start, total)

    def on_train_epoch_start(self, trainer: pl.Trainer, *module: Any) -> None:
        super().on_train_epoch_start(trainer, *module)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float]:
        """What stands behind the rate; Lightning's own has the version of the first logger before it."""
        metrics: dict[str, int | str | float] = {**trainer.progress_bar_metrics}
        measure = f"val_{getattr(pl_module, 'val_metric', 'em')}"
        if measure in trainer.callback_metrics:
            metrics[measure] = float(trainer.callback_metrics[measure])
        if self.left is not None:
            metrics["left"] = self.left(trainer.global_step)
        return metrics


def count_trainable_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Seq2SeqLoggingCallback(MetricsWriter):
    """`MetricsWriter` in the module's `output_dir`, or the Trainer's, that also logs sizes and learning rates.

    Once "n_params", "mp" and "grad_mp" (parameters, millions of them, and of those that are trained), and every
    `log_every_n_steps` steps "lr_group_{i}". The module writes test_results.txt and test_generations.txt.
    """

    on_batch_end = Replaced("Lightning 2 calls `on_train_batch_end`")

    def __init__(self):
        super().__init__("")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.path = Path(getattr(pl_module, "output_dir", trainer.default_root_dir)) / "metrics.json"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        millions = {"mp": total / 1e6, "grad_mp": count_trainable_parameters(pl_module) / 1e6}
        self._log(trainer, {"n_params": total, **millions})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            groups = trainer.optimizers[0].param_groups
            self._log(trainer, {f"lr_group_{i}": group["lr"] for i, group in enumerate(groups)})

    @staticmethod
    def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
        """Loggers write on rank 0 only."""
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
