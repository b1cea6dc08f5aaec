"""Where the log goes: equal values everywhere, each step once whatever was killed, one writer, mistakes in a line."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rag.errors import UserError
from rag.training.flag_problems import REPORTS
from rag.training.loggers import BUILDERS, build_logger
from tests.conftest import ROOT
from tests.training.imitations import calls_of, install
from tests.training.lightning_toy import At, Killed, fit, toy_args

SERVICES = ("wandb", "trackio", "mlflow")
# A process that trains with the imitations and kills itself at the n-th call of a hook, or when it is to log a row.
KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
import pytest
from rag.training.loggers import JsonLinesLogger
from tests.training.imitations import install
from tests.training.lightning_toy import At, fit, toy_args

def log_metrics(self, metrics, step=None, write=JsonLinesLogger.log_metrics, rows=count(1)):
    write(self, metrics, step) if next(rows) < int(n) else kill()

folder, calls, hook, n, *flags = sys.argv[1:]
install(pytest.MonkeyPatch(), Path(calls))
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if hook == "log_metrics":
    JsonLinesLogger.log_metrics = log_metrics
fit(toy_args(Path(folder), *flags), (), [At(hook, int(n), kill)])
"""


@pytest.fixture
def calls(monkeypatch, tmp_path) -> Path:
    install(monkeypatch, tmp_path / "calls.jsonl")
    return tmp_path / "calls.jsonl"


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]


def csv_of(folder: Path) -> list[dict]:
    with open(folder / "out" / "csv" / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def without_numbers_of_run(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("step", "epoch", "step_count")}


# --- What is written --------------------------------------------------------------------------------------------------


def test_every_report_has_the_values_of_metrics_json(calls, tmp_path):
    trainer, module = fit(toy_args(tmp_path, "--report_to", "csv,wandb", "trackio", "mlflow"), [0.25, 0.5])
    trainer.test(module, datamodule=trainer.datamodule)
    rows = log_of(tmp_path)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    validations = [without_numbers_of_run(row) for row in rows if "val_em" in row]
    assert validations == [without_numbers_of_run(row) for row in metrics["val"]]
    for row in metrics["train"]:
        (logged,) = [one for one in rows if "loss" in one and one["step"] == row["step"] - 1]
        assert without_numbers_of_run(logged) == without_numbers_of_run(row)
    assert [row["step"] for row in rows if "loss" in row] == list(range(12))
    assert without_numbers_of_run(rows[-1]) == without_numbers_of_run(metrics["test"][0])

    assert csv_of(tmp_path) == rows
    sent = [call["metrics"] for call in calls_of(calls, "wandb", "log")]
    assert [{"step": row.pop("trainer/global_step"), **row} for row in sent] == rows
    for service in ("trackio", "mlflow"):
        assert [{"step": call["step"], **call["metrics"]} for call in calls_of(calls, service, "log")] == rows
        assert len(calls_of(calls, service, "finish")) >= 1


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    flags = ["--report_to", "tensorboard"]
    with pytest.raises(Killed):
        fit(toy_args(tmp_path, *flags), [0.25, 0.5], [At("on_train_batch_start", 10)])  # goes on at step 6
    fit(toy_args(tmp_path, *flags), [0.25, 0.5])
    rows, events = log_of(tmp_path), events_of(tmp_path)
    for name in ("loss", "lr", "grad_norm", "val_em"):
        expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert events[name] == expected, name


def test_a_log_without_reports_is_the_json_lines_alone(tmp_path):
    assert [type(logger).__name__ for logger in build_logger(toy_args(tmp_path))] == ["JsonLinesLogger"]
    fit(toy_args(tmp_path, "--report_to", "jsonl"))
    assert not {"csv", "tensorboard", "run_ids.json"} & set(os.listdir(tmp_path / "out"))


# --- Killed and gone on with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minutes", "hook", "n"),
    [
        ("0", "on_train_batch_start", 10),  # three steps after the epoch's checkpoint, which are made again
        ("1e-9", "log_metrics", 9),  # behind the checkpoint of a step, before its row is written
        ("1e-9", "on_validation_start", 2),
    ],
)
def test_a_run_that_was_killed_has_every_step_once_in_order(minutes, hook, n, calls, tmp_path):
    flags = ["--save_interval", minutes, "--report_to", "csv", *SERVICES]
    fit(toy_args(tmp_path / "whole", "--save_interval", minutes))
    command = [sys.executable, "-c", KILLED, tmp_path / "run", calls, hook, str(n), *flags]
    killed = subprocess.run(list(map(str, command)), cwd=ROOT, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    with open(tmp_path / "run" / "out" / "training_log.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    ids = json.loads((tmp_path / "run" / "out" / "run_ids.json").read_text())
    settings = calls_of(calls, "mlflow", "config")
    fit(toy_args(tmp_path / "run", *flags))

    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert csv_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "out" / "run_ids.json").read_text()) == ids
    assert [call["id"] for call in calls_of(calls, "wandb", "init")] == [ids["wandb"]] * 2
    assert [call["resume"] for call in calls_of(calls, "wandb", "init")] == ["allow"] * 2
    assert {call["name"] for call in calls_of(calls, "trackio", "init")} == {ids["trackio"]}
    assert len(calls_of(calls, "mlflow", "init")) == 1 and calls_of(calls, "mlflow", "config") == settings
    assert {call["run_id"] for call in calls_of(calls, "mlflow", "log")} == {ids["mlflow"]}


def test_a_new_run_in_the_folder_begins_new_logs(calls, tmp_path):
    flags = ["--report_to", "csv,wandb,trackio", "--num_train_epochs", "1"]
    fit(toy_args(tmp_path, *flags))
    earlier = json.loads((tmp_path / "out" / "run_ids.json").read_text())
    fit(toy_args(tmp_path, *flags, "--overwrite_output_dir"))
    now = json.loads((tmp_path / "out" / "run_ids.json").read_text())
    assert earlier.keys() == now.keys() and all(earlier[name] != now[name] for name in now)
    assert csv_of(tmp_path) == log_of(tmp_path) and len(log_of(tmp_path)) == 7
    fit(toy_args(tmp_path, "--num_train_epochs", "1", "--overwrite_output_dir"))
    assert not (tmp_path / "out" / "run_ids.json").exists()


def test_an_earlier_run_s_rows_are_not_in_a_new_one_s_checkpoints(tmp_path):
    fit(toy_args(tmp_path))
    flags = ["--log_every_n_steps", "5", "--save_interval", "1e-9"]
    with pytest.raises(Killed):  # before the first row is logged
        fit(toy_args(tmp_path, *flags, "--overwrite_output_dir"), (), [At("on_train_batch_start", 3)])
    fit(toy_args(tmp_path, *flags))
    assert [row["step"] for row in log_of(tmp_path)] == [4, 5, 9, 11]


def test_a_test_alone_goes_on_with_the_training_s_logs(calls, tmp_path):
    flags = ["--report_to", "csv,wandb", "--num_train_epochs", "1"]
    fit(toy_args(tmp_path, *flags))
    args = toy_args(tmp_path, *flags, "--do_predict")
    trainer, module = fit_nothing(args)
    trainer.test(module, datamodule=trainer_data(args))
    assert len(log_of(tmp_path)) == 8 and "test_sum" in log_of(tmp_path)[-1]
    assert csv_of(tmp_path) == log_of(tmp_path)
    assert len({call["id"] for call in calls_of(calls, "wandb", "init")}) == 1
    fit(toy_args(tmp_path, "--report_to", "csv", "--num_train_epochs", "2"))  # the test's row is kept
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == list(range(12))
    assert sum("test_sum" in row for row in log_of(tmp_path)) == 1 and csv_of(tmp_path) == log_of(tmp_path)


def fit_nothing(args):
    from callbacks_rag import build_callbacks
    from lightning_base import build_trainer
    from tests.training.lightning_toy import ToyModule

    return build_trainer(args, build_callbacks(args), build_logger(args)), ToyModule(args)


def trainer_data(args):
    from lightning_base import Seq2SeqDataModule
    from tests.training.lightning_toy import ToyTokenizer

    return Seq2SeqDataModule(args.data, args.training.seed, ToyTokenizer())


@pytest.mark.slow
def test_of_two_ranks_one_writes(tmp_path):
    command = [sys.executable, "-m", "tests.training.lightning_toy", tmp_path, "--devices", "2", "--report_to", "csv"]
    subprocess.run(
        list(map(str, command)), cwd=ROOT, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(6)) and len(rows) == 8
    assert csv_of(tmp_path) == rows


def test_other_ranks_have_no_loggers_that_write_elsewhere(monkeypatch, calls, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    loggers = build_logger(toy_args(tmp_path, "--report_to", "csv,wandb,trackio,mlflow"))
    assert [type(logger).__name__ for logger in loggers] == ["JsonLinesLogger"]
    assert not calls.exists()


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_every_name_has_a_logger():
    assert list(REPORTS) == ["jsonl", *BUILDERS]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--report_to", "tensorbord"],
            r"--report_to tensorbord is none of jsonl, .*; did you mean tensorboard\?",
        ),
        (["--report_to", "csv,comet"], r"--report_to comet is none of jsonl, csv, tensorboard, wandb, trackio, mlflow"),
        (["--report_to", ","], r"--report_to names nothing; give some of jsonl, .*"),
        (
            ["--report_to", "csv", "--logger_name", "wandb"],
            r"--logger_name wandb sends to Weights & Biases, --report_to csv does not; add wandb to --report_to, or .*",
        ),
    ],
)
def test_names_that_there_are_not_and_contradictions_are_one_line(flags, message, calls, tmp_path):
    with pytest.raises(UserError, match=f"^{message}$"):
        toy_args(tmp_path, *flags)


@pytest.mark.parametrize("name", ["tensorboard", *SERVICES])
def test_a_package_that_is_missing_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        toy_args(tmp_path, "--report_to", f"csv,{name}")
    assert str(error.value) == f"--report_to {name} needs a package that is not installed: pip install {name}"


def test_a_folder_that_wandb_left_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "trackio").mkdir()
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"pip install trackio$"):
        toy_args(tmp_path, "--report_to", "trackio")


@pytest.mark.parametrize(
    ("flags", "project"),
    [
        (["--logger_name", "wandb"], "data"),
        (["--logger_name", "wandb_shared"], "hf_data"),
        (["--report_to", "wandb"], "data"),
        (["--report_to", "csv,wandb", "--logger_name", "wandb_shared"], "hf_data"),
    ],
)
def test_logger_name_means_what_it_meant(flags, project, calls, monkeypatch, tmp_path):
    fit(toy_args(tmp_path, "--num_train_epochs", "1", *flags))
    (begun,) = calls_of(calls, "wandb", "init")
    assert (begun["project"], begun["name"], begun["dir"]) == (project, "out", str(tmp_path / "out"))
    assert len(calls_of(calls, "wandb", "log")) == len(log_of(tmp_path)) == 7
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    args = toy_args(tmp_path, "--overwrite_output_dir", *flags)
    (logger,) = [one for one in build_logger(args) if type(one).__name__ == "WandbLogger"]
    assert logger.name == ("hf_data" if "wandb_shared" in flags else "mine")  # Lightning's name of a project
