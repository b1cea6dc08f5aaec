"""The best validations' weights, in two formats, and `last.ckpt`; what was damaged since is found when a run goes on.

    best = BestCheckpoints(output_dir, save_interval=1800)
    trainer = build_trainer(args, [best], logger)
    best.best_model_path

`callbacks_rag.build_callbacks` has it among its callbacks.
"""

import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rag.errors import UserError
from rag.files import atomic_folder, remove, space_problems
from rag.training.batches import ResumableDataLoader
from rag.training.loading import read_checkpoint
from rag.training.non_finite import LeftOutError, NonFiniteError, weights_are_finite
from rag.training.reports import any_rank, collects_gradients, is_real_run, raise_on_all_ranks
from rag.training.seals import is_as_recorded, is_whole, records_of, stamp_of
from rag.training.sharding import ShardedStrategy

logger = logging.getLogger(__name__)

MONITOR = "val_em"  # exact match over the validation examples, a fraction, equal on every rank


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
        # {"number", "score", "measured" (what its card tells), "exported": `records_of` the folder, "stamp": `stamp_of`
        # the .ckpt}, the best first
        self.kept: list[dict[str, Any]] = []
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
        """What is kept and whole, and whether there is room for more. Collective."""
        if trainer.fast_dev_run:
            return
        problems: list[str] = []
        if trainer.is_global_zero:
            problems = self._find_kept(trainer, pl_module) or self._space_problems(trainer, pl_module)
        problems, self.kept = trainer.strategy.broadcast((problems, self.kept))
        if problems:
            raise_on_all_ranks(trainer, "\n".join(problems))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what is not kept, now that the start has not been refused."""
        if trainer.fast_dev_run:
            return
        if trainer.is_global_zero:
            self._remove_strays(also_last=trainer.ckpt_path is None)
        if self._goes_on(trainer):
            self._saved_step = trainer.global_step

    def _goes_on(self, trainer: pl.Trainer) -> bool:
        """Whether the run goes on with the state that its own folder has."""
        return trainer.ckpt_path is not None and Path(trainer.ckpt_path) == self.output_dir / "last.ckpt"

    def _find_kept(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Leave in `kept` what is whole; an export that is not is made again. Returns what keeps the run from going on.

        A run that is resumed from a checkpoint other than its `last.ckpt`, or into another folder, starts without what
        is not here.
        """
        whole = [kept for kept in self.kept if self._is_kept_whole(kept)]
        lost = [self._paths(kept["number"])[1] for kept in self.kept if kept not in whole]
        self.kept = whole
        if lost and self._goes_on(trainer):
            last = self.output_dir / "last.ckpt"
            return [
                f"--output_dir {self.output_dir}: {path.name}, one of the best, is damaged or missing; give "
                "--resume_from_checkpoint with an earlier checkpoint of this folder to train it again from there, or "
                f"another --output_dir and --resume_from_checkpoint {last} to go on without the best so far"
                for path in lost
            ]
        if hasattr(pl_module, "export"):
            for kept in whole:
                folder, checkpoint = self._paths(kept["number"])
                if not is_as_recorded(folder, kept.get("exported", {})):
                    print(f"{folder} is damaged or missing: it is exported again from {checkpoint.name}", flush=True)
                    self._export_again(trainer, pl_module, kept)
        return []

    def _is_kept_whole(self, kept: dict[str, Any]) -> bool:
        """Whether its Lightning checkpoint is; one that has not been touched since it was saved is not read again."""
        path = self._paths(kept["number"])[1]
        return path.is_file() and (stamp_of(path) == kept.get("stamp") or is_whole(path))

    def _export_again(self, trainer: pl.Trainer, pl_module: Any, kept: dict[str, Any]) -> None:
        weights = read_checkpoint(self._paths(kept["number"])[1])["state_dict"]
        pl_module.measured = kept.get("measured", {})
        if isinstance(trainer.strategy, ShardedStrategy):
            with trainer.strategy.holding(weights):
                self._export(pl_module, kept)
            return
        own = {name: weight.clone() for name, weight in pl_module.state_dict().items() if name in weights}
        pl_module.load_state_dict(weights)
        self._export(pl_module, kept)
        pl_module.load_state_dict(own)

    def _space_problems(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Whether the disk has room for the checkpoints that the training will certainly keep."""
        trained = sum(weight.nbytes for weight in pl_module.parameters() if weight.requires_grad)
        holds_all = getattr(pl_module, "learned", None) is None
        weights = sum(weight.nbytes for weight in pl_module.parameters()) if holds_all else trained
        moments = 2 * trained if any(isinstance(one, torch.optim.Adam) for one in trainer.optimizers) else 0
        a_checkpoint = weights + moments + (weights if hasattr(pl_module, "export") else 0)
        may_end_early = trainer.max_steps > 0 or trainer.early_stopping_callback or trainer.max_epochs is None
        validations = 1 if may_end_early else (trainer.max_epochs or 1) // (trainer.check_val_every_n_epoch or 1)
        here = {file.stat().st_ino: file.stat().st_size for file in self.output_dir.rglob("*") if file.is_file()}
        needed = min(max(validations, 1), self.keep) * a_checkpoint - sum(here.values())
        return space_problems(
            f"--output_dir {self.output_dir}", {self.output_dir: needed}, "make room, or give another folder"
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_real_run(trainer):
            return
        self.validations += 1
        new: dict[str, Any] = {"number": self.validations, "score": self._score(trainer.callback_metrics)}
        new["measured"] = getattr(pl_module, "measured", {})
        ranking = sorted([*self.kept, new], key=lambda kept: (self.sign * kept["score"], kept["number"]), reverse=True)
        self.kept = ranking[: self.keep]
        if new in self.kept:
            self._save(trainer, pl_module, new)
        if collects_gradients(trainer):
            self._is_due = True  # half of the next step's gradients would be lost: save when the step is made
        else:
            self._save_last(trainer, same_as=self._paths(new["number"])[1] if new in self.kept else None)

    def _score(self, metrics: dict[str, Any]) -> float:
        if self.monitor not in metrics:
            raise UserError(
                f"checkpoints are kept by {self.monitor}, which the module does not log; it logs {', '.join(metrics)}"
            )
        score = float(metrics[self.monitor])
        return score if not math.isnan(score) else -self.sign * math.inf

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if is_real_run(trainer) and self._is_due_on_rank_zero(trainer) and self._may_save_between_batches(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a validation at the end of the training, its end is saved here."""
        if is_real_run(trainer) and self._saved_step != trainer.global_step:
            self._save_last(trainer)
        if is_real_run(trainer) and trainer.is_global_zero and not self.validations:
            logger.warning(
                f"{self.output_dir}: the training ended without a validation, so nothing was measured or exported; "
                "last.ckpt has the weights"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """`StopTogether` has stopped all ranks between two batches, or all have met a loss that is not finite."""
        if not is_real_run(trainer):
            return
        if isinstance(exception, SIGTERMException | LeftOutError):
            is_saved = isinstance(exception, LeftOutError) and trainer.global_step == self._saved_step
            if not is_saved and self._may_save_between_batches(trainer):
                self._save_last(trainer)
        elif isinstance(exception, NonFiniteError):
            self._save_before_step(trainer, pl_module)

    def _save_before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the state that this step began with, unless it is saved already, or gradients are half collected.

        Nothing has changed since but what counts the batches.
        """
        progress, loader = trainer.fit_loop.epoch_loop.batch_progress, trainer.train_dataloader
        is_saved = trainer.global_step in (0, self._saved_step)
        is_first = trainer.accumulate_grad_batches > 1 or progress.current.ready <= 1
        if is_saved or is_first or not isinstance(loader, ResumableDataLoader):
            return
        if not trainer.strategy.reduce_boolean_decision(weights_are_finite(pl_module)):
            return
        for counts in (progress.total, progress.current):
            counts.ready, counts.started = counts.ready - 1, counts.started - 1
        progress.is_last_batch = False
        loader.batch_sampler.position -= 1
        self._save_last(trainer)

    @staticmethod
    def _may_save_between_batches(trainer: pl.Trainer) -> bool:
        """Not where gradients are half collected, nor where Lightning would take the validation to come for done."""
        loop = trainer.fit_loop
        before_validation = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        return not (before_validation or loop.epoch_loop.batch_progress.is_last_batch or collects_gradients(trainer))

    def _is_due_on_rank_zero(self, trainer: pl.Trainer) -> bool:
        """Collective: ranks whose clocks differ must agree."""
        if self._is_due or trainer.should_stop or not self.save_interval:
            return self._is_due or trainer.should_stop
        is_due = time.monotonic() - self._last_saved >= self.save_interval
        return any_rank(trainer, trainer.is_global_zero and is_due)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kept: dict[str, Any]) -> None:
        self._require_finite_weights(trainer)
        if trainer.is_global_zero and hasattr(pl_module, "export"):
            self._export(pl_module, kept)
        checkpoint = self._paths(kept["number"])[1]
        trainer.save_checkpoint(checkpoint, weights_only=False)
        if trainer.is_global_zero:
            kept["stamp"] = stamp_of(checkpoint)  # known to the checkpoints that come after it

    def _export(self, pl_module: Any, kept: dict[str, Any]) -> None:
        folder = self._paths(kept["number"])[0]
        with atomic_folder(folder) as half_written:
            pl_module.export(half_written)
        kept["exported"] = records_of(folder)

    @staticmethod
    def _require_finite_weights(trainer: pl.Trainer) -> None:
        """What is not finite is neither the best nor to go on from. Collective."""
        if not trainer.strategy.reduce_boolean_decision(weights_are_finite(trainer.lightning_module)):
            raise_on_all_ranks(
                trainer,
                f"step {trainer.global_step}: the weights are not finite and are not saved; start afresh "
                "(--overwrite_output_dir) with a lower --learning_rate, or without float16 or bfloat16",
            )

    def _save_last(self, trainer: pl.Trainer, same_as: Path | None = None) -> None:
        last = self.output_dir / "last.ckpt"
        if same_as is None:
            self._require_finite_weights(trainer)
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
            # Twice where `save_model` wrote into a folder that was half-written itself.
            half_written = re.fullmatch(r"\.+(checkpoint\d+|last)(\.ckpt)?(\.\d+\.(tmp|old))+", path.name)
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
