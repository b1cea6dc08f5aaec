"""What any finetuning module needs of Lightning: optimizer and schedule, seeded steps, norms in the log, rows gathered.

    class MyModule(BaseTransformer): ...

The subclass brings the model and its steps.
"""

import json
import random
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch.nn.utils import get_total_norm

from rag.training.arguments import FinetuneArguments
from rag.training.optimizer import SCHEDULES, build_optimizer


class BaseTransformer(pl.LightningModule):
    """Optimizer, schedule and what is logged about them; a subclass brings the model and its steps.

    A subclass that overrides `on_train_start`, `on_train_batch_start` or `on_before_optimizer_step` calls `super()`'s.
    """

    def __init__(self, args: FinetuneArguments):
        super().__init__()
        self.args = args
        self.save_hyperparameters(args.to_dict())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        training = self.args.training
        optimizer = build_optimizer(self, training, fused=self.device.type in ("cpu", "cuda"))
        # A warm-up that is longer than the training ends with it; the decay after it must not divide by zero.
        steps = max(int(self.trainer.estimated_stepping_batches), training.warmup_steps + 1)
        schedule = SCHEDULES[training.lr_scheduler](optimizer, training.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Restore the loader's place in the epoch.

        Lightning does that when it makes the loader. Here this was too early, when `configure_optimizers` asked for the
        number of steps and the checkpoint's place had not been read.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on seed, epoch, batch and rank only: a resumed run draws as the uninterrupted one does."""
        place = f"{self.args.training.seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(63))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log learning rates and, before they are clipped, the gradients' norms."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # its logger connector sets it
        if (self.trainer.global_step + 1) % every != 0:
            return
        gradients: dict[str, list[torch.Tensor]] = {"": []}
        for group in optimizer.param_groups:
            self.log(f"lr{group['suffix']}", group["lr"])
            for suffix in {"", group["suffix"]}:
                gradients.setdefault(suffix, []).extend(p.grad for p in group["params"] if p.grad is not None)
        for suffix, those in gradients.items():
            self.log(f"grad_norm{suffix}", get_total_norm(those))

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
