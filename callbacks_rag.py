"""What happens around the training: the best checkpoints kept, an early stop, ranks that stop together, reports.

    callbacks = build_callbacks(args)
    trainer = build_trainer(args, callbacks, logger)   # lightning_base.py
    trainer.fit(module, datamodule=data)
    best = trainer.checkpoint_callback                 # BestCheckpoints
    trainer.test(datamodule=data, ckpt_path=best.best_model_path)

Names that the public suite has in this file are kept.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint, EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rag.errors import UserError
from rag.files import atomic_folder, remove
from rag.training.arguments import FinetuneArguments, trainer_kwargs

# Public names of this module, whose code is in rag/, beside others.
from rag.training.reports import (
    MetricsWriter,
    ProgressLines,
    Seq2SeqLoggingCallback,
    count_trainable_parameters,
    is_real_run,
)

__all__ = [
    "BestCheckpoints",
    "MetricsWriter",
    "ProgressLines",
    "Seq2SeqLoggingCallback",
    "SharedFolder",
    "StopTogether",
    "ValidationAtTheEnd",
    "ValidationEarlyStopping",
    "build_callbacks",
    "count_trainable_parameters",
    "get_checkpoint_callback",
    "get_early_stopping_callback",
]

SECONDS_TO_APPEAR = 60  # a network disk shows a new file that long after it was looked for in vain
STOPPED = 128 + signal.SIGTERM  # exit status
MONITOR = "val_em"  # exact match over the validation examples, a fraction, equal on every rank


def build_callbacks(args: FinetuneArguments) -> list[Callback]:
    """The callbacks of a finetuning run."""
    callbacks: list[Callback] = [
        SharedFolder(args.run.output_dir),
        ValidationAtTheEnd(),
        BestCheckpoints(args.run.output_dir, save_interval=60 * args.run.save_interval),
        MetricsWriter(args.run.output_dir),
    ]
    if args.training.early_stopping_patience >= 0:
        callbacks.append(ValidationEarlyStopping(args.training.early_stopping_patience))
    if not trainer_kwargs(args)["enable_progress_bar"]:
        callbacks.append(ProgressLines())
    return [*callbacks, StopTogether()]


class SharedFolder(Callback):
    """Refuses to train on several nodes that do not see the same output folder: each reads the checkpoints in it."""

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Collective."""
        if trainer.num_nodes == 1:
            return
        own = trainer.ckpt_path or str(self.output_dir / "hparams.json")  # rank 0 has written it
        sees_it = own == trainer.strategy.broadcast(own) and self._is_seen(own)
        if not trainer.strategy.reduce_boolean_decision(sees_it):
            raise UserError(
                f"--output_dir {self.output_dir} is not the same folder on every node; put it on a disk that all share"
            )

    @staticmethod
    def _is_seen(path: str) -> bool:
        deadline = time.monotonic() + SECONDS_TO_APPEAR
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(1)
        return os.path.exists(path)


class BestCheckpoints(Checkpoint):
    """Keeps the best validations' weights, and `last.ckpt` to go on from.

    After validation N, if it is among the best `keep` (of equals the later): `checkpointN/`, written by the module's
    `export(folder)`, if it has one, in Hugging Face format, and `checkpointN.ckpt`, Lightning's. Then `last.ckpt`,
    which also says what is kept; only then what is not kept any more is removed. So a kill at any time leaves a
    `last.ckpt` whose checkpoints are all there, and what else lies about goes when that run is resumed.

    This is not a ModelCheckpoint because there a tie keeps the earlier, and the state of a folder is not part of it.

    Args:
        save_interval: seconds between writings of `last.ckpt` inside an epoch; 0 for none.
        monitor: the metric that tells the best, equal on every rank.
        mode: "max", or "min" where less is better.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        save_interval: float = 0,
        keep: int = 3,
        monitor: str = MONITOR,
        mode: str = "max",
    ):
        self.output_dir = Path(output_dir)
        self.save_interval, self.keep = save_interval, keep
        self.monitor, self.sign = monitor, {"max": 1, "min": -1}[mode]
        self.validations = 0
        self.kept: list[dict[str, Any]] = []  # {"number", "score"}, the best first
        self._last_saved, self._saved_step, self._is_due = time.monotonic(), 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.kept = state_dict["validations"], state_dict["kept"]

    @property
    def best_model_path(self) -> str:
        """The Lightning checkpoint of the best validation, of equals the latest; "" where there was none."""
        return str(self._paths(self.kept[0]["number"])[1]) if self.kept else ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        # A run resumed into another folder starts without the checkpoints it kept in the old one.
        paths = slice(None) if hasattr(pl_module, "export") else slice(1, None)
        here = [kept for kept in self.kept if all(path.exists() for path in self._paths(kept["number"])[paths])]
        self.kept = trainer.strategy.broadcast(here)
        if trainer.is_global_zero:
            self._remove_strays(also_last=trainer.ckpt_path is None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_real_run(trainer):
            return
        self.validations += 1
        new = {"number": self.validations, "score": self._score(trainer.callback_metrics)}
        ranking = sorted([*self.kept, new], key=lambda kept: (self.sign * kept["score"], kept["number"]), reverse=True)
        self.kept = ranking[: self.keep]
        if new in self.kept:
            self._save(trainer, pl_module, new["number"])
        if trainer.fit_loop._should_accumulate():
            self._is_due = True  # half of the next step's gradients would be lost: save when the step is made
        else:
            self._save_last(trainer, same_as=self._paths(new["number"])[1] if new in self.kept else None)

    def _score(self, metrics: dict[str, Any]) -> float:
        if self.monitor not in metrics:
            raise UserError(
                f"checkpoints are kept by {self.monitor}, which the module does not log; it logs {', '.join(metrics)}"
            )
        return float(metrics[self.monitor])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if is_real_run(trainer) and self._is_due_on_rank_zero(trainer) and self._may_save_between_batches(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a validation at the end of the training, its end is saved here."""
        if is_real_run(trainer) and self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """`StopTogether` has stopped all ranks between two batches."""
        is_stopped = isinstance(exception, SIGTERMException)
        if is_stopped and is_real_run(trainer) and self._may_save_between_batches(trainer):
            self._save_last(trainer)

    @staticmethod
    def _may_save_between_batches(trainer: pl.Trainer) -> bool:
        """Not where gradients are half collected, nor where Lightning would take the validation to come for done."""
        loop = trainer.fit_loop
        before_validation = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        return not (before_validation or loop.epoch_loop.batch_progress.is_last_batch or loop._should_accumulate())

    def _is_due_on_rank_zero(self, trainer: pl.Trainer) -> bool:
        """Collective: ranks whose clocks differ must agree."""
        if self._is_due or trainer.should_stop or not self.save_interval:
            return self._is_due or trainer.should_stop
        return trainer.strategy.broadcast(time.monotonic() - self._last_saved >= self.save_interval)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, number: int) -> None:
        folder, checkpoint = self._paths(number)
        if trainer.is_global_zero and hasattr(pl_module, "export"):
            with atomic_folder(folder) as half_written:
                pl_module.export(half_written)
        trainer.save_checkpoint(checkpoint, weights_only=False)

    def _save_last(self, trainer: pl.Trainer, same_as: Path | None = None) -> None:
        last = self.output_dir / "last.ckpt"
        if same_as is None:
            trainer.save_checkpoint(last, weights_only=False)
        elif trainer.is_global_zero:
            _link(same_as, last)
        self._last_saved, self._is_due, self._saved_step = time.monotonic(), False, trainer.global_step
        if trainer.is_global_zero:
            self._remove_strays()

    def _paths(self, number: int) -> tuple[Path, Path]:
        """The folder and the Lightning checkpoint of a validation."""
        return self.output_dir / f"checkpoint{number}", self.output_dir / f"checkpoint{number}.ckpt"

    def _remove_strays(self, also_last: bool = False) -> None:
        """Remove checkpoints that are not kept: surpassed ones, or left by a killed or an earlier run."""
        numbers = {kept["number"] for kept in self.kept}
        for path in list(self.output_dir.glob("*")):
            numbered = re.fullmatch(r"checkpoint(\d+)(\.ckpt)?", path.name)
            half_written = re.fullmatch(r"\.(checkpoint\d+|last)(\.ckpt)?\.\d+\.(tmp|old)", path.name)
            if half_written or (numbered and int(numbered[1]) not in numbers):
                remove(path)
        if also_last:
            remove(self.output_dir / "last.ckpt")


def _link(path: Path, name: Path) -> None:
    """Give a file a second name in place of what had it: several GB are not written twice."""
    beside = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, beside)
    os.replace(beside, name)


class StopTogether(Callback):
    """Where one rank is asked to end (SIGTERM, as schedulers do), all end behind the same batch, with status 143.

    Lightning's own handler, which this one replaces, talks to the other ranks wherever it interrupts this one: of two
    ranks in the middle of a step each then waits for the other. Its loops do the rest: they stop at the end of a batch.
    """

    def __init__(self):
        self.process, self.is_asked = os.getpid(), False

    def _listen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._note)

    on_sanity_check_start = on_train_start = on_test_start = _listen

    def _note(self, *_: Any) -> None:
        if self.is_asked and os.getpid() != self.process:
            os._exit(STOPPED)  # a process that reads data: first the whole job was asked, now it is
        self.is_asked = True

    def _agree(self, trainer: pl.Trainer, *_: Any) -> None:
        """Collective."""
        asked = trainer.strategy.reduce_boolean_decision(self.is_asked, all=False)
        trainer._signal_connector.received_sigterm = asked

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
        if not trainer.fit_loop._should_accumulate():  # gradients half collected could not be saved
            self._agree(trainer)

    on_validation_batch_end = on_test_batch_end = _agree

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            exception.code = STOPPED  # Lightning's own would be 0


class ValidationAtTheEnd(Callback):
    """Validates when --max_steps ends the training inside an epoch: without it that work would be measured by nothing.

    Stands before `BestCheckpoints`, which asks whether a validation comes next.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


class ValidationEarlyStopping(EarlyStopping):
    """Stops after `patience` validations in a row without a better EM; a resumed run may change the patience."""

    def __init__(self, patience: int, monitor: str = MONITOR, mode: str = "max"):
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= max(self.patience, 1):  # a run that was stopped so is not to train on when repeated
            trainer.should_stop = True


# --- Callbacks for other modules and Trainers -------------------------------------------------------------------------


def _mode_of(metric: str) -> str:
    return "min" if "loss" in metric else "max"


def get_checkpoint_callback(output_dir: str | os.PathLike, metric: str) -> BestCheckpoints:
    """Keeps the three best validations by `val_{metric}`, which the module logs; a loss is better the lower it is."""
    return BestCheckpoints(output_dir, monitor=f"val_{metric}", mode=_mode_of(metric))


def get_early_stopping_callback(metric: str, patience: int) -> ValidationEarlyStopping:
    """Stops after `patience` validations in a row without a better `val_{metric}`."""
    return ValidationEarlyStopping(patience, monitor=f"val_{metric}", mode=_mode_of(metric))
