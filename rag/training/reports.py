"""What a training says of itself: `metrics.json`, log lines, learning rates and sizes in the log.

    callbacks = [MetricsWriter(output_dir), ProgressLines()]

Rank 0 writes; a resumed run drops what it makes again.
"""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from rag.files import load_json, save_json
from rag.progress import Pace
from rag.public_names import Replaced


def is_real_run(trainer: pl.Trainer) -> bool:
    """Whether what happens now counts: not in the sanity check before the training, nor in --fast_dev_run."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run


class MetricsWriter(Callback):
    """Keeps `metrics.json`: {"train": [...], "val": [...], "test": [...]}, a row of each a validation, and one a test.

    A row is {"step", "epoch", "step_count", the metrics}, where "step_count" is the number of validations so far, the N
    of `checkpointN`; metrics of training are the last step's, all steps are in the log. A resumed run drops the rows of
    the steps that it makes again.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir) / "metrics.json"
        self.step_count: int | None = None  # on rank 0; None until a run begins or goes on

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step_count = state_dict["step_count"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            last = trainer.global_step if trainer.ckpt_path else -1
            rows = {split: [row for row in rows if row["step"] <= last] for split, rows in self._rows().items()}
            if self.step_count is None:
                self.step_count = len(rows["val"])
            save_json(rows, self.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_real_run(trainer):
            metrics = trainer.callback_metrics
            validation = {name for name in metrics if name.startswith("val_")}
            self._write(
                trainer,
                train={name: value for name, value in metrics.items() if name not in validation},
                val={name: metrics[name] for name in validation},
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, test=trainer.callback_metrics)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, **metrics_of: dict[str, Any]) -> None:
        rows = self._rows()
        done = len(rows["val"]) if self.step_count is None else self.step_count
        self.step_count = done + ("val" in metrics_of)
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "step_count": self.step_count}
        for split, metrics in metrics_of.items():
            earlier = [row for row in rows[split] if row["step"] != trainer.global_step]
            rows[split] = [*earlier, place | {name: float(metrics[name]) for name in sorted(metrics)}]
        save_json(rows, self.path)

    def _rows(self) -> dict[str, list[dict[str, float]]]:
        return load_json(self.path) if self.path.is_file() else {"train": [], "val": [], "test": []}


class ProgressLines(Callback):
    """The training as lines in a log file, where a progress bar would be a mess: one about every `seconds`."""

    def __init__(self, seconds: float = 10):
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
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self._print(
            trainer,
            f"epoch {trainer.current_epoch + 1}, step {step:,} of {self._total:,}: loss {loss:.3f}, "
            f"{self._pace.rate(step - self._start_step, self._total - self._start_step)}",
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_real_run(trainer):
            metrics = [f"{k} {v:.4g}" for k, v in trainer.callback_metrics.items() if k.startswith("val_")]
            self._print(trainer, f"validated at step {trainer.global_step:,}: {', '.join(metrics)}")

    @staticmethod
    def _print(trainer: pl.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)


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
