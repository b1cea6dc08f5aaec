"""What any finetuning run needs of Lightning: batches that resume, checkpoints, loggers, the Trainer.

    args = parse_args(argv)
    module = GenerativeQAModule(args, model, tokenizer, retriever)
    data = Seq2SeqDataModule(args.data, args.training.seed, question_tokenizer, generator_tokenizer)
    trainer = build_trainer(args, callbacks=build_callbacks(args), logger=build_logger(args))
    trainer.fit(module, datamodule=data, ckpt_path=args.run.resume_from_checkpoint)

The module's base class is `rag.training.base_module.BaseTransformer`.
"""

import argparse
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.data import suggested_max_num_workers
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from rag.distributed.addresses import open_store
from rag.distributed.launch import use_rank_launcher
from rag.distributed.meeting import rank_problems
from rag.errors import UserError, one_line, raise_problems
from rag.files import atomic_write
from rag.models.quantization import quantization_problems
from rag.public_names import Replaced, module_getattr
from rag.training.arguments import DataArguments, FinetuneArguments, trainer_kwargs
from rag.training.base_module import BaseTransformer
from rag.training.batches import GlobalBatchSampler, ResumableDataLoader
from rag.training.loading import read_checkpoint
from rag.training.loggers import LogKeeper, build_logger
from rag.training.named_data import settle_data
from rag.training.namespaces import add_run_flags, finetune_arguments
from rag.training.optimizer import SCHEDULES
from rag.training.reports import raise_on_all_ranks
from rag.training.seals import SealedFile
from rag.training.sharding import SHARDED, register_sharding
from utils_rag import Seq2SeqDataset

logger = logging.getLogger(__name__)

# Public names of this module, whose code is in rag/.
add_generic_args = add_run_flags
arg_to_scheduler = SCHEDULES
arg_to_scheduler_choices = sorted(arg_to_scheduler)
arg_to_scheduler_metavar = "{" + ", ".join(arg_to_scheduler_choices) + "}"
REPLACED = {"MODEL_MODES": "a module is given its model; rag.models.checkpoints.MODEL_CLASSES has the classes by type"}
__getattr__ = module_getattr(__name__, replaced=REPLACED)

# --- Data -------------------------------------------------------------------------------------------------------------


class Seq2SeqDataModule(pl.LightningDataModule):
    """The three splits of the data as batches of `Seq2SeqDataset`; the training ones with a "loss_weight" (float).

    `prefetch` is called with each training batch while the one before is trained on (`ResumableDataLoader.prefetch`).
    Validation and test come in the order of the file. Rows made of a batch keep its "index", so that
    `BaseTransformer.gather_rows` can leave out what a rank was given only to keep step.
    """

    def __init__(
        self, data: DataArguments, seed: int, tokenizer: Any, target_tokenizer: Any = None, prefetch: Any = None
    ):
        super().__init__()
        self.data, self.seed, self.prefetch = data, seed, prefetch
        self.tokenizer, self.target_tokenizer = tokenizer, target_tokenizer
        self.datasets: dict[str, Seq2SeqDataset] = {}

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            self.datasets[split] = self.trainer.lightning_module.get_dataset(split)  # which may come back for ours

    def get_dataset(self, type_path: str) -> Seq2SeqDataset:
        """The dataset of a split ("train", "val", "test"), as the flags limit it."""
        data = self.data
        limits = {
            "train": (data.max_target_length, data.n_train),
            "val": (data.val_max_target_length, data.n_val),
            "test": (data.test_max_target_length, data.n_test),
        }
        max_target_length, n_obs = limits[type_path]
        return Seq2SeqDataset(
            self.tokenizer,
            data.folder,
            data.max_source_length,
            max_target_length,
            type_path=type_path,
            n_obs=n_obs,
            prefix=data.prefix,
            target_tokenizer=self.target_tokenizer,
        )

    def train_dataloader(self) -> ResumableDataLoader:
        lengths = list(map(len, self.datasets["train"].sources)) if self.data.group_by_length else None
        # --overfit_batches wants the same batches every epoch
        seed = self.seed if self.trainer.overfit_batches == 0 else None
        loader = self._loader(ResumableDataLoader, "train", self.data.train_batch_size, seed=seed, lengths=lengths)
        loader.prefetch, loader.renumbered = self.prefetch, self._renumber_batches
        if seed is not None and hasattr(self.datasets["train"], "draw_answers"):
            self.datasets["train"].draw_answers(seed, loader.batch_sampler)
        self._require_interval_in_epoch(len(loader))
        return loader

    def _require_interval_in_epoch(self, batches: int) -> None:
        interval, limit = self.trainer.val_check_interval, self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        counts_epochs = self.trainer.check_val_every_n_epoch is not None
        if counts_epochs and isinstance(interval, int) and interval > batches:
            raise_on_all_ranks(
                self.trainer,
                f"--val_check_interval {interval} is more than the {batches} batches of an epoch; lower it, or give "
                "--check_val_every_n_epoch null to count batches across epochs",
            )

    def _renumber_batches(self, difference: int) -> None:
        """Have Lightning count the batches of a resumed epoch as if this number of ranks had begun it."""
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        for count in ("ready", "started", "processed", "completed"):
            setattr(current, count, getattr(current, count) + difference)

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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints whole or not at all, not held in memory a second time, sealed, and read without unpickling anything.

    What was damaged since it was written is refused by a `UserError`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with atomic_write(path, "wb") as file:
            sealed = SealedFile(file)
            try:
                torch.save(checkpoint, sealed)
            except RuntimeError as error:  # torch fails at closing the file and hides why: Ctrl-C, SIGTERM, a full disk
                raise error.__context__ or error from None
            sealed.seal()

    def load_checkpoint(self, path: str, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path, map_location)


# --- The Trainer ------------------------------------------------------------------------------------------------------


def build_trainer(
    args: FinetuneArguments, callbacks: list[pl.Callback], logger: Logger | list[Logger] | bool, profiler: Any = None
) -> pl.Trainer:
    """The Trainer that the flags ask for; what it refuses is a `UserError`.

    Args:
        profiler: in place of that of `--profile`.
    """
    kwargs = trainer_kwargs(args)
    raise_problems(_hardware_problems(kwargs, args))
    # What Lightning says of itself at every start; whether it found a GPU is said by its own lines or by our errors.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="Found .* in eval mode", module="pytorch_lightning")  # what is frozen
    warnings.filterwarnings("ignore", message=".*not supported by the model summary", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="You have overridden .on_before_batch", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="Experiment logs directory", module="lightning_fabric")  # `CsvLogger`
    if args.run.profile and profiler is None:
        profiler = SimpleProfiler(dirpath=args.run.output_dir, filename="profile")
    if kwargs["strategy"] == "fsdp":
        register_sharding()
        # Weights that are gathered in inference mode could not be trained on.
        kwargs |= {"strategy": SHARDED, "inference_mode": False}
    use_rank_launcher(args.run.rank_timeout)
    with refusals(args, ValueError, TypeError, RuntimeError, ImportError):
        trainer = pl.Trainer(
            **kwargs, callbacks=callbacks, logger=logger, profiler=profiler, plugins=[AtomicCheckpointIO()]
        )
    nodes = trainer.num_nodes
    raise_problems(rank_problems(kwargs["devices"], nodes, trainer.num_devices * nodes))
    if kwargs["strategy"] == SHARDED and trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu":
        raise UserError(
            "--strategy fsdp: there is one process, which has nobody to share its weights with; leave it out, or give "
            "--devices 2 or more"
        )
    if trainer.world_size > 1:
        open_store(trainer.strategy.cluster_environment, one_node=nodes == 1)
    return trainer


@contextmanager
def refusals(args: FinetuneArguments, *errors: type[Exception]) -> Iterator[None]:
    """Turn what Lightning says of settings that it refuses into one line, with those that were given.

    Args:
        errors: that mean this, too, beside its own.

    Raises:
        UserError: it refuses them.
    """
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, *errors) as error:
        given = [
            f"--{field.name} {getattr(args.trainer, field.name)}"
            for field in dataclasses.fields(args.trainer)
            if getattr(args.trainer, field.name) != field.default
        ]
        raise UserError(
            f"the Lightning Trainer refuses its settings ({' '.join(given) or 'all defaults'}): {one_line(error)}"
        ) from error


def training_device(args: FinetuneArguments) -> torch.device:
    """The kind of device that the flags ask for; of other accelerators than a GPU no more than that it is none."""
    on_gpu = trainer_kwargs(args)["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _hardware_problems(kwargs: dict[str, Any], args: FinetuneArguments) -> list[str]:
    accelerator, strategy = kwargs["accelerator"], kwargs["strategy"]
    if strategy.endswith("_spawn"):
        return [f"--strategy {strategy}: a model with a thread of its own cannot be handed to a new process; give ddp"]
    wants_gpu = accelerator in ("gpu", "cuda")
    flag = f"--gpus {args.run.gpus}" if args.run.gpus is not None else f"--accelerator {accelerator}"
    half = "--fp16" if args.training.fp16 else f"--precision {kwargs['precision']}"
    if wants_gpu and not torch.cuda.is_available():
        return [f"{flag}: torch sees no CUDA device here; use --accelerator cpu, or a CUDA build of torch"]
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and str(kwargs["precision"]) in ("16", "16-mixed", "16-true"):
        return [f"{half} (float16) needs a GPU; use --bf16, or leave it out on a CPU"]
    if problems := quantization_problems(args.model.quantization, on_cpu):
        return problems
    available = torch.cuda.device_count()
    if wants_gpu and isinstance(kwargs["devices"], int) and kwargs["devices"] > available:
        return [f"{flag}: {kwargs['devices']} devices are asked for, torch sees {available}"]
    return []


# --- The public suite's way to train ----------------------------------------------------------------------------------


class InitCallback(pl.Callback):
    """Opens the retriever's index before the first batch, where `GenerativeQAModule.setup` has not done so."""

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collective where the retriever's `init_retrieval` is."""
        if getattr(pl_module, "retriever", None) is not None:
            pl_module.retriever.init_retrieval()


class LoggingCallback(pl.Callback):
    """Logs the metrics of each validation and of the test, a line each; the module writes test_results.txt."""

    on_batch_end = Replaced("`BaseTransformer` logs the learning rates")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("Validation", trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("Test", trainer)

    @rank_zero_only
    def _log(self, what: str, trainer: pl.Trainer) -> None:
        logger.info(f"***** {what} results *****")
        for name, value in sorted(trainer.callback_metrics.items()):
            logger.info(f"{name} = {float(value):.6g}")


def generic_train(
    model: BaseTransformer,
    args: FinetuneArguments | argparse.Namespace,
    early_stopping_callback: pl.Callback | None = None,
    logger: Logger | bool = True,
    custom_ddp_plugin: None = None,
    extra_callbacks: Iterable[pl.Callback] = (),
    checkpoint_callback: pl.Callback | None = None,
    logging_callback: pl.Callback | None = None,
    profiler: Any = None,
) -> pl.Trainer:
    """Train a module on `--data_dir` or `--dataset_name`, unless `--do_predict` stands alone; returns the Trainer.

    `trainer.test(model, datamodule=trainer.datamodule)` comes next. `finetune_rag.main` does more: it keeps the best
    checkpoints, describes the run and writes metrics.json.

    Args:
        model: its `question_tokenizer` and `answer_tokenizer` read the data; a `train_dataloader` of its own is used.
        logger: True for those of `--report_to`.
        custom_ddp_plugin: None; `--strategy` chooses the strategy.
        checkpoint_callback: None keeps the checkpoint of the lowest `val_avg_loss`.
        logging_callback: None for `LoggingCallback`.
        profiler: as the Trainer's; None for `--profile`'s.

    Raises:
        UserError: a setting is out of range, or `custom_ddp_plugin` is given.
    """
    args = finetune_arguments(args)
    if custom_ddp_plugin is not None:
        raise UserError("custom_ddp_plugin: Lightning 2 has no such plugins; leave it out and give --strategy")
    settle_data(args)
    model.args.data.data_dir = args.data.data_dir
    pl.seed_everything(args.training.seed, workers=True, verbose=False)
    if checkpoint_callback is None:
        best = {"monitor": "val_avg_loss", "mode": "min", "save_top_k": 1}
        checkpoint_callback = ModelCheckpoint(args.run.output_dir, "checkpoint-{step}", **best)
    callbacks = [logging_callback or LoggingCallback(), *extra_callbacks, checkpoint_callback, InitCallback()]
    if early_stopping_callback:
        callbacks.append(early_stopping_callback)
    if logger is True:
        callbacks.insert(0, LogKeeper(args.run.output_dir))
    trainer = build_trainer(args, callbacks, build_logger(args) if logger is True else logger, profiler)
    if args.run.do_train:
        trainer.fit(model, datamodule=_data_for(model, args), ckpt_path=args.run.resume_from_checkpoint)
    return trainer


def _data_for(model: BaseTransformer, args: FinetuneArguments) -> Seq2SeqDataModule | None:
    if is_overridden("train_dataloader", model):
        return None
    return Seq2SeqDataModule(args.data, args.training.seed, model.question_tokenizer, model.answer_tokenizer)
