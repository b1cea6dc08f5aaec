"""What any finetuning module needs of Lightning: optimizer and schedule, seeded steps, norms in the log, rows gathered.

    class MyModule(BaseTransformer): ...

The subclass brings the model and its steps.
"""

import argparse
import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rag.errors import UserError
from rag.models.adapters import has_adapters
from rag.models.bases import Base
from rag.models.checkpoints import load_model
from rag.public_names import Replaced, replaced_method, warn_of_uncalled_methods
from rag.training.arguments import DataArguments, FinetuneArguments, ModelArguments, TrainingArguments
from rag.training.namespaces import add_flags, finetune_arguments
from rag.training.non_finite import (
    ELSEWHERE,
    LeftOutError,
    NonFiniteError,
    OptimizerStep,
    PendingSteps,
    gradient_norm,
    parameters_of,
)
from rag.training.optimizer import SCHEDULES, build_optimizer
from rag.training.sharding import whole

logger = logging.getLogger(__name__)

MOST_TOLD = 3  # skipped steps that are told as they happen; all of them are counted


class BaseTransformer(pl.LightningModule):
    """Optimizer, schedule and what is logged about them; a subclass brings the model and its steps.

    A subclass that overrides one of the hooks below calls `super()`'s. Its training step notes its losses by
    `note_losses`, so that one that is not finite stops the training, or is skipped, as --nan_policy says.

    Args:
        args: all settings; a namespace or a dict of them is read by `finetune_arguments`.
    """

    get_dataloader = Replaced(
        "lightning_base.Seq2SeqDataModule makes the loaders of what `get_dataset` returns, each example exactly once"
    )
    test_epoch_end = Replaced("Lightning 2 calls `on_test_epoch_end`, without outputs")
    validation_epoch_end = Replaced("Lightning 2 calls `on_validation_epoch_end`, without outputs")

    def __init__(self, args: FinetuneArguments | argparse.Namespace | dict[str, Any]):
        super().__init__()
        self.args = finetune_arguments(args)
        self.save_hyperparameters(self.args.to_dict())
        self.optimizer_step_so_far, self.pending_steps = OptimizerStep(), PendingSteps()
        self.skipped_steps = 0  # whose loss or gradients were not finite
        self.left_out: str | None = None  # the first that the device left out and that is to stop the training
        # Of a model whose other weights stay a base's: what learns, which is all that checkpoints hold.
        self.base: Base | None = None
        self.learned: frozenset[str] | None = None  # names of weights

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        warn_of_uncalled_methods(cls)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:  # torch's, which would hide what a `Replaced` says
            if (replaced := replaced_method(type(self), name)) is None:
                raise
            raise AttributeError(replaced.message) from error

    @staticmethod
    def add_model_specific_args(parser: argparse.ArgumentParser, root_dir: str | None = None):
        """Add the flags of model, data and training to a plain parser, and return it; `root_dir` has no effect."""
        return add_flags(parser, ModelArguments, DataArguments, TrainingArguments)

    @property
    def output_dir(self) -> Path:
        return Path(self.args.run.output_dir)

    def load_hf_checkpoint(self, path: str | os.PathLike) -> None:
        """Take over the weights of a Hugging Face checkpoint of the same shapes; `self.model` stays the same object."""
        self.model.load_state_dict(load_model(str(path), keep_adapters=has_adapters(self.model)).state_dict())

    def learn_beside(self, base: Base) -> None:
        """Have checkpoints hold what learns alone, as it is frozen now; the rest is the base's.

        Raises:
            UserError: nothing learns.
        """
        learned = [name for name, weight in self.named_parameters() if weight.requires_grad]
        if not learned:
            raise UserError("nothing would learn: all parts of the model are frozen; leave one of the --freeze_... out")
        self.base, self.learned = base, frozenset(learned)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; where checkpoints hold what learns alone, exactly that, or everything.

        Raises:
            ValueError: other weights are missing.
        """
        if self.learned is None or self.state_dict().keys() == state_dict.keys():
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        if strict and (odd := sorted(self.learned ^ state_dict.keys())):
            missing = len(self.learned - state_dict.keys())
            raise ValueError(
                f"it lacks {missing} of the weights that learn here and has {len(odd) - missing} others: {odd[0]}, ..."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def get_dataset(self, type_path: str) -> Any:
        """The dataset of a split ("train", "val", "test"); what a subclass returns is what is trained or measured on.

        Other datasets of a subclass give, as `Seq2SeqDataset` does, items with "source", "target" and "index" and have
        its `collate_fn`.
        """
        return self.trainer.datamodule.get_dataset(type_path)

    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        self.opt = build_optimizer(self, self.args.training, fused=self.device.type in ("cpu", "cuda"))
        return {"optimizer": self.opt, "lr_scheduler": self.get_lr_scheduler()}

    def get_lr_scheduler(self) -> LRSchedulerConfigType:
        """The schedule of `self.opt`, as Lightning wants it."""
        training = self.args.training
        # A warm-up that is longer than the training ends with it; the decay after it must not divide by zero.
        steps = max(self.total_steps(), training.warmup_steps + 1)
        schedule = SCHEDULES[training.lr_scheduler](self.opt, training.warmup_steps, steps)
        return {"scheduler": schedule, "interval": "step"}

    def on_train_start(self) -> None:
        """Restore the loader's place in the epoch.

        Lightning does that when it makes the loader. Here this was too early, when `configure_optimizers` asked for the
        number of steps and the checkpoint's place had not been read.
        """
        self.trainer.fit_loop._load_combined_loader_states()
        if self.args.training.nan_policy == "stop":
            self._stop_behind_left_out_step()
        self.left_out = None

    def is_log_step(self) -> bool:
        """Whether what is done now belongs to an optimizer step that is logged, for which the device is waited for."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on seed, epoch, batch and rank only: a resumed run draws as the uninterrupted one does."""
        place = f"{self.args.training.seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(63))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log learning rates and, before they are clipped, the gradients' norms."""
        if not self.is_log_step():
            return
        gradients: dict[str, list[torch.Tensor]] = {"": []}
        for group in optimizer.param_groups:
            self.log(f"lr{group['suffix']}", group["lr"])
            for suffix in {"", group["suffix"]}:
                gradients.setdefault(suffix, []).extend(p.grad for p in group["params"] if p.grad is not None)
        for suffix, those in gradients.items():
            self.log(f"grad_norm{suffix}", whole(get_total_norm(those)))

    def note_losses(self, loss: torch.Tensor, nll: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """The mean of all ranks' losses, noted for the optimizer step that this batch belongs to. Collective.

        Args:
            loss: this rank's mean.
            nll: of each of its examples (B,).
        """
        mean = loss.detach().clone()
        if self.trainer.world_size > 1:  # Lightning's own `reduce` begins with a barrier, which waits for the device
            torch.distributed.all_reduce(mean)
            mean /= self.trainer.world_size
        self.optimizer_step_so_far.add(mean, nll, batch.get("index"), batch.get("source"))
        return mean

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients. Where they or the losses are not finite, stop, or leave this step out (--nan_policy).

        Of float16's only the losses are asked: their scaler leaves out steps by itself. Every rank has the same losses
        and, once they are reduced, the same norm of all gradients, and so decides alike.
        """
        step, self.optimizer_step_so_far = self.optimizer_step_so_far, OptimizerStep()
        norm = None
        if isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            norm = gradient_norm(optimizer)
        if norm is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_grads_with_norm_(parameters_of(optimizer), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        judged = None if has_scaler or norm is None else whole(norm)
        number = self.trainer.global_step + 1
        if judged is not None and self.judges_later(optimizer):
            optimizer.found_inf = self.pending_steps.add(number, step, judged)  # type: ignore[attr-defined]
        elif not step.is_finite(judged):
            problem = self._problem(number, step, judged)
            if self.args.training.nan_policy == "stop":
                raise self._error(NonFiniteError, problem)
            self._count_left_out(problem)
            for parameter in parameters_of(optimizer):
                parameter.grad = None  # no optimizer touches a weight that has none

    def judges_later(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the device leaves out steps by itself, and is asked at log steps alone which these were.

        On a CPU there is nothing to wait for.
        """
        return self.device.type != "cpu" and bool(optimizer.defaults.get("fused"))

    def judge_pending_steps(self) -> None:
        """Count and tell the steps that the device has left out. Collective."""
        for number, step, norm in self.pending_steps.left_out():
            problem = self._problem(number, step, norm)
            if self.args.training.nan_policy == "stop":
                self.left_out = self.left_out or problem
            self._count_left_out(problem)

    def _problem(self, number: int, step: OptimizerStep, norm: torch.Tensor | None) -> str:
        """Collective."""
        return f"step {number}: {step.description(norm, self.gather_rows(step.rows()))}"

    def _count_left_out(self, problem: str) -> None:
        self.skipped_steps += 1
        if self.trainer.is_global_zero and self.skipped_steps <= MOST_TOLD and self.left_out is None:
            logger.warning(f"{problem}; it is skipped (--nan_policy skip)")

    def _error(self, kind: type[NonFiniteError], problem: str) -> NonFiniteError:
        if not self.trainer.is_global_zero:
            kind = ELSEWHERE[kind]
        return kind(
            f"{problem}; --nan_policy skip goes on from what is saved and leaves such steps out; to start afresh give "
            "a lower --learning_rate, and --overwrite_output_dir where the folder holds this run"
        )

    def _stop_behind_left_out_step(self) -> None:
        if self.left_out is not None:
            raise self._error(LeftOutError, self.left_out)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            self.judge_pending_steps()
            if self.skipped_steps:
                self.log("skipped_steps", float(self.skipped_steps))
        self._stop_behind_left_out_step()

    def on_train_end(self) -> None:
        self.judge_pending_steps()
        self._stop_behind_left_out_step()
        if self.skipped_steps and self.trainer.is_global_zero:
            logger.warning(
                f"{self.skipped_steps} of {self.trainer.global_step} steps had a loss or gradients that were not finite"
                " and were skipped (--nan_policy skip)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is saved behind a step that the device left out says so: a run that is to stop at it is stopped again.

        Collective.
        """
        self.judge_pending_steps()
        checkpoint["skipped_steps"], checkpoint["left_out"] = self.skipped_steps, self.left_out
        if self.base is not None and self.learned is not None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weight for name, weight in weights.items() if name in self.learned}
            checkpoint["base"] = self.base.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the run goes on with.

        Raises:
            ValueError: it was trained beside other weights.
        """
        if self.base is not None and checkpoint.get("base", self.base.digest) != self.base.digest:
            raise ValueError(f"its adapters are of another base: {self.base.name_or_path} has other weights")
        self.skipped_steps, self.left_out = checkpoint.get("skipped_steps", 0), checkpoint.get("left_out")

    def gather_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of all ranks by their "index", each index once: metrics over them are exact on any number of ranks.

        Collective: every rank calls this equally often. Rows are JSON-able; every rank gets all of them.
        """
        if self.trainer.world_size > 1:
            text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(self.device)
            sizes = [int(size) for size in self._gather(torch.tensor(len(text), device=self.device))]
            texts = self._gather(torch.nn.functional.pad(text, (0, max(sizes) - len(text))))
            parts = [part[:size].cpu().numpy().tobytes() for part, size in zip(texts, sizes, strict=True)]
            rows = [row for part in parts for row in json.loads(part)]
        by_index = {row["index"]: row for row in rows}
        return [by_index[index] for index in sorted(by_index)]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, all of one shape. Collective."""
        gathered = [torch.empty_like(tensor) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(gathered, tensor)
        return gathered
