"""What any finetuning run needs of Lightning: optimizer and schedule, batches that resume, checkpoints, the Trainer.

args = finetune_arguments_rag.parse_args()
module = GenerativeQAModule(args)                                   # a BaseTransformer
data = Seq2SeqDataModule(args.data, args.training.seed, question_tokenizer, generator_tokenizer)
trainer = build_trainer(args, callbacks=build_callbacks(args), logger=build_logger(args))
trainer.fit(module, datamodule=data, ckpt_path=args.run.resume_from_checkpoint)
"""

import json
import logging
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.data import suggested_max_num_workers
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import optimization

from batches_rag import GlobalBatchSampler, ResumableDataLoader
from cli_rag import UserError, raise_problems
from finetune_arguments_rag import DataArguments, FinetuneArguments, TrainingArguments, trainer_settings
from launch_rag import use_rank_launcher
from utils_rag import Seq2SeqDataset, atomic_write

SCHEDULES = {
    "linear": optimization.get_linear_schedule_with_warmup,
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "cosine_w_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
}


# --- The module -------------------------------------------------------------------------------------------------------


class BaseTransformer(pl.LightningModule):
    """Optimizer, schedule and what is logged about them; a subclass brings the model and its steps.

    A subclass that overrides `on_train_start`, `on_train_batch_start` or `on_before_optimizer_step` calls `super()`'s.
    """

    def __init__(self, args: FinetuneArguments):
        super().__init__()
        self.args = args
        self.save_hyperparameters(args.to_dict())

    def configure_optimizers(self) -> dict[str, Any]:
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
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps != 0:
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


def build_optimizer(module: torch.nn.Module, training: TrainingArguments, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the trainable parameters.

    Args:
        fused: whether AdamW updates each weight in one pass over memory, on a CPU three times as fast.
    """
    groups = parameter_groups(module, training)
    if training.adafactor:
        return optimization.Adafactor(groups, lr=training.learning_rate, scale_parameter=False, relative_step=False)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, eps=training.adam_epsilon, fused=fused)
    # Else it takes float16's gradients scaled and unscales them inside its step, too late for clipping and for the log;
    # Lightning refuses to clip then, with bfloat16 too, which is not scaled at all.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def parameter_groups(module: torch.nn.Module, training: TrainingArguments) -> list[dict[str, Any]]:
    """Trainable parameters by their part of the model and by whether they decay: vectors (biases, norms) do not.

    Each group has a "suffix" for what is logged of it: `_question_encoder`, `_decoder`, or none for all else.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        suffix, learning_rate = _part_of_model(name, training)
        decays = parameter.ndim > 1
        group = groups.setdefault((suffix, decays), {"params": [], "suffix": suffix})
        group["lr"] = training.learning_rate if learning_rate is None else learning_rate
        group["weight_decay"] = training.weight_decay if decays else 0.0
        group["params"].append(parameter)
    return list(groups.values())


def _part_of_model(parameter_name: str, training: TrainingArguments) -> tuple[str, float | None]:
    if "question_encoder." in parameter_name:
        return "_question_encoder", training.question_encoder_learning_rate
    if ".decoder." in f".{parameter_name}" or "lm_head" in parameter_name:
        return "_decoder", training.decoder_learning_rate
    return "", training.learning_rate


# --- Data -------------------------------------------------------------------------------------------------------------


class Seq2SeqDataModule(pl.LightningDataModule):
    """The three splits of `--data_dir` as batches of `Seq2SeqDataset`; the training ones with a "loss_weight" (float).

    `begin` is called with each training batch while the one before is trained on (`ResumableDataLoader.begin`).
    Validation and test come in the order of the file. Rows made of a batch keep its "index", so that
    `BaseTransformer.gather_rows` can leave out what a rank was given only to keep step.
    """

    def __init__(self, data: DataArguments, seed: int, tokenizer: Any, target_tokenizer: Any = None, begin: Any = None):
        super().__init__()
        self.data, self.seed, self.begin = data, seed, begin
        self.tokenizer, self.target_tokenizer = tokenizer, target_tokenizer
        self.datasets: dict[str, Seq2SeqDataset] = {}

    def setup(self, stage: str) -> None:
        data = self.data
        limits = {
            "train": (data.max_target_length, data.n_train),
            "val": (data.val_max_target_length, data.n_val),
            "test": (data.test_max_target_length, data.n_test),
        }
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            max_target_length, n_obs = limits[split]
            self.datasets[split] = Seq2SeqDataset(
                self.tokenizer,
                data.data_dir,
                data.max_source_length,
                max_target_length,
                type_path=split,
                n_obs=n_obs,
                prefix=data.prefix,
                target_tokenizer=self.target_tokenizer,
            )

    def train_dataloader(self) -> ResumableDataLoader:
        lengths = list(map(len, self.datasets["train"].sources)) if self.data.group_by_length else None
        # --overfit_batches wants the same batches every epoch
        seed = self.seed if self.trainer.overfit_batches == 0 else None
        loader = self._loader(ResumableDataLoader, "train", self.data.train_batch_size, seed=seed, lengths=lengths)
        loader.begin = self.begin
        return loader

    def val_dataloader(self) -> DataLoader:
        return self._loader(DataLoader, "val", self.data.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        return self._loader(DataLoader, "test", self.data.eval_batch_size)

    def _loader(self, loader_class: type[DataLoader], split: str, batch_size: int, **sampling: Any) -> DataLoader:
        dataset, trainer = self.datasets[split], self.trainer
        return loader_class(
            dataset,
            batch_sampler=GlobalBatchSampler(
                len(dataset), batch_size, trainer.global_rank, trainer.world_size, **sampling
            ),
            collate_fn=dataset.collate_fn,
            num_workers=min(self.data.num_workers, suggested_max_num_workers(1)),  # no more than there are cores
            pin_memory=torch.cuda.is_available(),
        )


# --- The Trainer ------------------------------------------------------------------------------------------------------


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints whole or not at all, not held in memory a second time, and read without unpickling anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


class JsonLinesLogger(Logger):
    """Every logged step as one JSON line, by the process of rank 0; a resumed run goes on with the same file."""

    def __init__(self, path: str | os.PathLike, append: bool):
        super().__init__()
        self.path, self.mode = Path(path), "a" if append else "w"

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, self.mode, encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.mode = "a"

    def log_hyperparams(self, params: Any) -> None:
        """They are in hparams.json."""


def build_logger(args: FinetuneArguments) -> Logger:
    """The logger that `--logger_name` asks for; the public suite's project names for Weights & Biases."""
    output_dir = Path(args.run.output_dir)
    if args.run.logger_name == "default":
        goes_on = args.run.resume_from_checkpoint is not None or not args.run.do_train
        return JsonLinesLogger(output_dir / "training_log.jsonl", append=goes_on)
    from pytorch_lightning.loggers import WandbLogger

    dataset = Path(args.data.data_dir).name
    project = os.environ.get("WANDB_PROJECT", dataset) if args.run.logger_name == "wandb" else f"hf_{dataset}"
    return WandbLogger(name=output_dir.name, project=project, save_dir=str(output_dir))


def build_trainer(args: FinetuneArguments, callbacks: list[pl.Callback], logger: Logger) -> pl.Trainer:
    """The Trainer as the flags ask for; what it refuses is the user's to mend."""
    settings = trainer_settings(args)
    raise_problems(_hardware_problems(settings, args))
    # What Lightning says of itself at every start; whether it found a GPU is said by its own lines or by our errors.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="Found .* in eval mode", module="pytorch_lightning")  # what is frozen
    warnings.filterwarnings("ignore", message=".*not supported by the model summary", module="pytorch_lightning")
    profiler = SimpleProfiler(dirpath=args.run.output_dir, filename="profile") if args.run.profile else None
    use_rank_launcher()
    try:
        trainer = pl.Trainer(
            **settings, callbacks=callbacks, logger=logger, profiler=profiler, plugins=[AtomicCheckpointIO()]
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"the Lightning Trainer refuses its settings: {' '.join(str(error).split())}") from error
    ranks = trainer.num_devices * trainer.num_nodes
    started = int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else ranks  # by torchrun
    if started != ranks:
        raise UserError(
            f"--devices {settings['devices']} on --num_nodes {settings['num_nodes']} makes {ranks} ranks, "
            f"torchrun has started {started}; leave --num_nodes and --devices (or --gpus) out to take torchrun's"
        )
    return trainer


def _hardware_problems(settings: dict[str, Any], args: FinetuneArguments) -> list[str]:
    accelerator = settings["accelerator"]
    wants_gpu = accelerator in ("gpu", "cuda")
    flag = f"--gpus {args.run.gpus}" if args.run.gpus is not None else f"--accelerator {accelerator}"
    if wants_gpu and not torch.cuda.is_available():
        return [f"{flag}: torch sees no CUDA device here; use --accelerator cpu, or a CUDA build of torch"]
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and str(settings["precision"]) in ("16", "16-mixed", "16-true"):
        return ["--fp16 (float16) needs a GPU; use --bf16 or neither on a CPU"]
    available = torch.cuda.device_count()
    if wants_gpu and isinstance(settings["devices"], int) and settings["devices"] > available:
        return [f"{flag}: {settings['devices']} devices are asked for, torch sees {available}"]
    return []
