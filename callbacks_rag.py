"""What happens around the training: the best checkpoints kept, an early stop, ranks that stop together, reports.

    callbacks = build_callbacks(args)
    trainer = build_trainer(args, callbacks, logger)   # lightning_base.py
    trainer.fit(module, datamodule=data)
    best = trainer.checkpoint_callback                 # BestCheckpoints
    trainer.test(datamodule=data, ckpt_path=best.best_model_path)

Names that the public suite has in this file are kept.
"""

import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rag.files import atomic_write
from rag.training.arguments import FinetuneArguments, trainer_kwargs

# Public names of this module, whose code is in rag/, beside others.
from rag.training.best_checkpoints import MONITOR, BestCheckpoints
from rag.training.loggers import LogKeeper
from rag.training.reports import (
    MetricsWriter,
    ProgressLines,
    Seq2SeqLoggingCallback,
    TrainingBar,
    any_rank,
    collects_gradients,
    count_trainable_parameters,
    raise_on_all_ranks,
)

__all__ = [
    "BestCheckpoints",
    "FlatTeacher",
    "MetricsWriter",
    "ProgressLines",
    "RunDescription",
    "Seq2SeqLoggingCallback",
    "SharedFolder",
    "StopTogether",
    "TrainingBar",
    "ValidationAtTheEnd",
    "ValidationEarlyStopping",
    "build_callbacks",
    "count_trainable_parameters",
    "get_checkpoint_callback",
    "get_early_stopping_callback",
]

FLAT = 0.95  # of the most entropy that a teacher can have
SECONDS_TO_APPEAR = 60  # a network disk shows a new file that long after it was looked for in vain
STOPPED = 128 + signal.SIGTERM  # exit status


def build_callbacks(args: FinetuneArguments) -> list[Callback]:
    """The callbacks of a finetuning run."""
    callbacks: list[Callback] = [
        SharedFolder(args.run.output_dir),
        ValidationAtTheEnd(),
        BestCheckpoints(args.run.output_dir, save_interval=60 * args.run.save_interval),
        MetricsWriter(args.run.output_dir),
        LogKeeper(args.run.output_dir),
    ]
    if args.training.retriever_loss != "marginal":
        callbacks.append(FlatTeacher())
    if args.training.early_stopping_patience >= 0:
        callbacks.append(ValidationEarlyStopping(args.training.early_stopping_patience))
    kwargs = trainer_kwargs(args)
    if not kwargs["enable_progress_bar"]:
        callbacks.append(ProgressLines())
    else:  # a GPU is to be waited for no more often than the log does it
        callbacks.append(TrainingBar(kwargs["log_every_n_steps"] or 50 if torch.cuda.is_available() else 1))
    return [*callbacks, StopTogether()]


class FlatTeacher(Callback):
    """Tells once that what teaches the retriever holds all passages for nearly alike: their order is forgotten."""

    def __init__(self):
        self.is_told = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Collective."""
        if self.is_told or not pl_module.is_log_step():
            return
        entropy, most = trainer.callback_metrics.get("teacher_entropy"), math.log(pl_module.model.config.n_docs)
        if entropy is None or entropy < FLAT * most:
            return
        self.is_told = True
        if trainer.is_global_zero:
            print(
                f"step {trainer.global_step + 1}: what teaches the retriever holds all passages for nearly alike "
                f"(teacher_entropy {entropy:.3f} of at most {most:.3f} nats) and makes it forget their order; give a "
                "smaller --teacher_temperature",
                flush=True,
            )


class RunDescription(Callback):
    """Calls `write`, which tells what made the results, on rank 0 once there is something to describe.

    That is behind the first batch: a start that is refused leaves nothing that a corrected one would be held to.
    """

    def __init__(self, write: Callable[[], None]):
        self.write, self.is_written = write, False

    def _write_once(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and not self.is_written:
            self.write()
            self.is_written = True

    on_train_batch_end = on_train_end = on_test_batch_end = _write_once


class SharedFolder(Callback):
    """Refuses to train on several nodes that do not see the same output folder: each reads the checkpoints in it."""

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Collective."""
        if trainer.num_nodes == 1:
            return
        path, token = self.output_dir / ".nodes.lock", trainer.strategy.broadcast(secrets.token_hex(8))
        if trainer.is_global_zero:
            with atomic_write(path) as file:
                file.write(token)
        sees_it = trainer.ckpt_path == trainer.strategy.broadcast(trainer.ckpt_path) and self._is_seen(path, token)
        is_shared = trainer.strategy.reduce_boolean_decision(sees_it)
        if trainer.is_global_zero:
            path.unlink()
        if not is_shared:
            raise_on_all_ranks(
                trainer,
                f"--output_dir {self.output_dir} is not the same folder on every node; put it on a disk that all share",
            )

    @staticmethod
    def _is_seen(path: Path, token: str) -> bool:
        deadline = time.monotonic() + SECONDS_TO_APPEAR
        while True:
            if path.is_file() and path.read_text() == token:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(1)


class StopTogether(Callback):
    """Where one rank is asked to end (SIGTERM, as schedulers do), all end behind the same batch, with status 143.

    Lightning's own handler, which this one replaces, talks to the other ranks wherever it interrupts this one: of two
    ranks in the middle of a step each then waits for the other. Its loops do the rest: they stop at the end of a batch.
    """

    def __init__(self):
        self.process, self.is_asked = os.getpid(), False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before each batch Lightning asks rank 0's device, and so waits for it, what the ranks have agreed on already.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _listen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._note)

    on_sanity_check_start = on_train_start = on_test_start = _listen

    def _note(self, *_: Any) -> None:
        if self.is_asked and os.getpid() != self.process:
            os._exit(STOPPED)  # a process that reads data: first the whole job was asked, now it is
        self.is_asked = True

    def _agree(self, trainer: pl.Trainer, *_: Any) -> None:
        """Collective."""
        trainer._signal_connector.received_sigterm = any_rank(trainer, self.is_asked)

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
        if not collects_gradients(trainer):  # gradients half collected could not be saved
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
        if self.wait_count < max(self.patience, 1):
            return
        trainer.should_stop = True  # a run that was stopped so is not to train on when repeated
        loop = trainer.fit_loop
        if loop.epoch_loop._batches_that_stepped < trainer.global_step:  # saved by the last validation, inside a step
            loop.epoch_loop._batches_that_stepped = trainer.global_step
            loop.epoch_progress.current.completed += 1  # as where the run itself went on to its end


# --- Callbacks for other modules and Trainers -------------------------------------------------------------------------


def _mode_of(metric: str) -> str:
    return "min" if "loss" in metric else "max"


def get_checkpoint_callback(output_dir: str | os.PathLike, metric: str) -> BestCheckpoints:
    """Keeps the three best validations by `val_{metric}`, which the module logs; a loss is better the lower it is."""
    return BestCheckpoints(output_dir, monitor=f"val_{metric}", mode=_mode_of(metric))


def get_early_stopping_callback(metric: str, patience: int) -> ValidationEarlyStopping:
    """Stops after `patience` validations in a row without a better `val_{metric}`."""
    return ValidationEarlyStopping(patience, monitor=f"val_{metric}", mode=_mode_of(metric))
