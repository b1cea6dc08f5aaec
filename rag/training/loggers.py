"""Where the numbers of a training go: `training_log.jsonl` always, and what --report_to names beside it.

    trainer = pl.Trainer(logger=build_logger(args), callbacks=[LogKeeper(args.run.output_dir)])

Rank 0 writes. A run that goes on continues the same logs: those in its folder without what it makes again, those
elsewhere under the same id, which its folder keeps.
"""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rag.files import atomic_write, read_state, remove, save_json
from rag.training.arguments import FinetuneArguments
from rag.training.run_folder import is_rank_zero

LOG_FILE = "training_log.jsonl"
RUN_IDS_FILE = "run_ids.json"


class JsonLinesLogger(Logger):
    """Every logged step as one JSON line, by the process of rank 0; a resumed run goes on with the same file."""

    def __init__(self, path: str | os.PathLike, append: bool):
        super().__init__()
        self.path, self.mode, self.is_open = Path(path), "a" if append else "w", False

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_open and self.path.is_symlink():
            self.path.unlink()  # in a stranger's folder it may lead anywhere: the file takes its place
        if self.mode == "a" and not self.is_open:
            _drop_half_line(self.path)
        with open(self.path, self.mode, encoding="utf-8") as file:
            file.write(_line(step, metrics))
        self.mode, self.is_open = "a", True

    def log_hyperparams(self, params: Any) -> None:
        """They are in hparams.json."""


def _line(step: int | None, metrics: dict[str, float]) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"


def _drop_half_line(path: Path) -> None:
    """Cut off what a kill or a full disk has left of a last line, so that the next one is not glued to it."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


class CsvLogger(CSVLogger):
    """Lightning's, which begins its file anew at every start: a run that goes on gives it the rows so far again."""

    @rank_zero_only
    def begin_with(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of `training_log.jsonl` so far."""
        for row in rows:
            self.experiment.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])
        self.save()


class EventLogger(TensorBoardLogger):
    """Lightning's, with a mark in the log from which step on TensorBoard is to forget what an earlier start wrote."""

    @rank_zero_only
    def begin_at(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self.experiment.file_writer.add_event(Event(session_log=start), step)


class MlflowLogger(MLFlowLogger):
    """Lightning's; settings are written when the run begins: MLflow refuses to change one, such as --max_steps."""

    def __init__(self, run_id: str | None, **kwargs: Any):
        super().__init__(run_id=run_id, **kwargs)
        self.goes_on = run_id is not None

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        if not self.goes_on:
            super().log_hyperparams(params)


class TrackioLogger(Logger):
    """A run of trackio, which Lightning has no logger for; one of the same project and name goes on."""

    def __init__(self, project: str, run_name: str):
        super().__init__()
        self.project, self.run_name = project, run_name
        self.config: dict[str, Any] = {}
        self.run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun or gone on with when it is first asked for."""
        if self.run is None:
            import trackio

            self.run = trackio.init(
                project=self.project, name=self.run_name, config=self.config, resume="allow", embed=False
            )
        return self.run

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self.config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is still to be sent; a test that follows opens the run again."""
        if self.run is not None:
            import trackio

            trackio.finish()
            self.run = None


# --- What the flags ask for -------------------------------------------------------------------------------------------


def build_logger(args: FinetuneArguments) -> list[Logger]:
    """The loggers of `--report_to` and `--logger_name`, that of `training_log.jsonl` first; on other ranks no more."""
    folder = Path(args.run.output_dir)
    continues = args.run.resume_from_checkpoint is not None or not args.run.do_train
    run_ids = read_run_ids(folder) if continues else {}
    jsonl = JsonLinesLogger(folder / LOG_FILE, append=continues)
    others = args.run.reports[1:] if is_rank_zero() else []
    return [jsonl, *(BUILDERS[name](args, run_ids.get(name)) for name in others)]


def read_run_ids(folder: Path) -> dict[str, str]:
    """The ids of the run in --output_dir at other services, by their names in --report_to."""
    path = folder / RUN_IDS_FILE
    return read_state(path, "remove it to begin new runs there") if path.is_file() else {}


def _build_csv(args: FinetuneArguments, run_id: str | None) -> Logger:
    return CsvLogger(args.run.output_dir, name="csv", version="")


def _build_tensorboard(args: FinetuneArguments, run_id: str | None) -> Logger:
    return EventLogger(args.run.output_dir, name="tensorboard", version="", default_hp_metric=False)


def _build_wandb(args: FinetuneArguments, run_id: str | None) -> Logger:
    """With the public suite's project names."""
    folder, data = Path(args.run.output_dir), _data_name(args)
    project = f"hf_{data}" if args.run.logger_name == "wandb_shared" else os.environ.get("WANDB_PROJECT", data)
    run_id = os.environ.get("WANDB_RUN_ID") or run_id or secrets.token_hex(4)
    return WandbLogger(name=folder.name, project=project, save_dir=str(folder), id=run_id)


def _build_trackio(args: FinetuneArguments, run_id: str | None) -> Logger:
    project = os.environ.get("TRACKIO_PROJECT", _data_name(args))
    return TrackioLogger(project, run_id or f"{Path(args.run.output_dir).name}-{secrets.token_hex(2)}")


def _build_mlflow(args: FinetuneArguments, run_id: str | None) -> Logger:
    """Into a database in the run's folder unless a server is named: MLflow 3 refuses the plain files of Lightning."""
    folder = Path(args.run.output_dir)
    if not (server := os.environ.get("MLFLOW_TRACKING_URI")):
        folder.mkdir(parents=True, exist_ok=True)
    return MlflowLogger(
        run_id,
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", _data_name(args)),
        run_name=folder.name,
        tracking_uri=server or f"sqlite:///{folder.resolve() / 'mlflow.db'}",
    )


def _data_name(args: FinetuneArguments) -> str:
    return Path(args.data.name).name


BUILDERS: dict[str, Callable[[FinetuneArguments, str | None], Logger]] = {
    "csv": _build_csv,
    "tensorboard": _build_tensorboard,
    "wandb": _build_wandb,
    "trackio": _build_trackio,
    "mlflow": _build_mlflow,
}
ELSEWHERE = {"wandb": WandbLogger, "trackio": TrackioLogger, "mlflow": MlflowLogger}  # whose `version` is the run's id


# --- Going on ---------------------------------------------------------------------------------------------------------


class LogKeeper(Callback):
    """Has the log's lines in every checkpoint, so that a run that goes on has each step once, and tells the loggers.

    What was cut or lost of `training_log.jsonl` since the checkpoint is there again, and what came after it is not.
    Stands before callbacks that log when the training starts.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.folder = Path(output_dir)
        self.path = self.folder / LOG_FILE
        self.lines = b""  # of the resumed run, up to its checkpoint
        self.unwritten: dict[str, Any] | None = None  # the row that was to follow them
        self.has_begun = False

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        state = {"lines": self._content().decode(errors="replace"), "unwritten": self._unwritten_row(trainer)}
        checkpoint["callbacks"][self.state_key] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines, self.unwritten = state_dict["lines"].encode(), state_dict.get("unwritten")

    @staticmethod
    def _unwritten_row(trainer: pl.Trainer) -> dict[str, Any] | None:
        """The row of a step whose checkpoint is saved before Lightning has its row logged."""
        batches, connector = trainer.fit_loop.epoch_loop.batch_progress.current, trainer._logger_connector
        if batches.processed == batches.completed or not connector.should_update_logs:
            return None
        values = {name: float(value) for name, value in connector.metrics["log"].items()}
        return {"step": trainer.global_step - 1, **values, "epoch": trainer.current_epoch}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path and trainer.is_global_zero and not trainer.fast_dev_run:
            self._go_back_to(trainer.global_step)
        self._begin(trainer, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, None)

    def _go_back_to(self, step: int) -> None:
        """Leave in the log what a run has logged that has made `step` steps, and the tests of it."""
        content = self._content()
        later = content[len(self.lines) :] if content.startswith(self.lines) else b""
        rows = [row for row in _rows(later) if row["step"] < step or (row["step"] == step and _is_test(row))]
        if self.unwritten is not None and all(row["step"] != self.unwritten["step"] for row in rows):
            rows.insert(0, self.unwritten)
        lines = self.lines + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if lines != content:
            with atomic_write(self.path, "wb") as file:
                file.write(lines)

    def _begin(self, trainer: pl.Trainer, step: int | None) -> None:
        """Tell each logger where it goes on, once; a test alone (`step` None) goes on at the log's end."""
        if self.has_begun or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.has_begun, is_new = True, step is not None and not trainer.ckpt_path
        if is_new:
            remove(self.path)  # an earlier run's, which would be in the checkpoints before the first row is logged
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger) and not is_new:
                logger.begin_with(_rows(self._content()))
            if isinstance(logger, EventLogger) and step is not None:
                logger.begin_at(step)
        self._keep_run_ids(trainer, {} if is_new else read_run_ids(self.folder))

    def _keep_run_ids(self, trainer: pl.Trainer, earlier: dict[str, str]) -> None:
        ids = earlier | {
            name: logger.version
            for name, kind in ELSEWHERE.items()
            for logger in trainer.loggers
            if isinstance(logger, kind)
        }
        if ids:
            save_json(ids, self.folder / RUN_IDS_FILE)
        else:
            remove(self.folder / RUN_IDS_FILE)

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


def _rows(lines: bytes) -> list[dict[str, Any]]:
    """The rows of whole lines."""
    rows = []
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _is_test(row: dict[str, Any]) -> bool:
    return any(name.startswith("test_") for name in row)
