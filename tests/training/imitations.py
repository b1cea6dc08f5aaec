"""Imitations of wandb, trackio and mlflow: they write each call that loggers make to a file, one JSON line a call.

install(monkeypatch, tmp_path / "calls.jsonl")
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def install(monkeypatch: pytest.MonkeyPatch, calls: Path) -> None:
    """Have Lightning and the suite find the imitations until the test ends."""

    def note(service: str, call: str, **values) -> None:
        with open(calls, "a") as file:
            file.write(json.dumps({"service": service, "call": call, **values}) + "\n")

    for name, contents in (_wandb(note) | _trackio(note) | _mlflow(note)).items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="imitation")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setattr("pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE", True)
    for variable in ("WANDB_PROJECT", "WANDB_RUN_ID", "TRACKIO_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)


def calls_of(path: Path, service: str, call: str) -> list[dict]:
    return [
        row
        for row in map(json.loads, path.read_text().splitlines())
        if (row["service"], row["call"]) == (service, call)
    ]


class _Run:
    """Of wandb or trackio."""

    def __init__(self, service: str, note, settings: dict):
        note(service, "init", **{name: value for name, value in settings.items() if name != "config"})
        self.id, self.name = settings.get("id"), settings["name"]
        self.config = SimpleNamespace(update=lambda config, allow_val_change: note(service, "config", config=config))
        self.log = lambda metrics, step=None: note(service, "log", metrics=metrics, step=step)


def _wandb(note) -> dict[str, dict]:
    run = {"run": None, "init": lambda **settings: _Run("wandb", note, settings)}
    disabled = type("RunDisabled", (), {})
    return {
        "wandb": run,
        "wandb.sdk": {},
        "wandb.sdk.lib": {"RunDisabled": disabled},
        "wandb.wandb_run": {"Run": type("Run", (), {})},
    }


def _trackio(note) -> dict[str, dict]:
    return {
        "trackio": {
            "init": lambda **settings: _Run("trackio", note, settings),
            "finish": lambda: note("trackio", "finish"),
        }
    }


def _mlflow(note) -> dict[str, dict]:
    class MlflowClient:
        def __init__(self, tracking_uri):
            note("mlflow", "client", uri=tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location):
            note("mlflow", "experiment", name=name)
            return "7"

        def create_run(self, experiment_id, tags):
            note("mlflow", "init", tags=tags)
            return self.get_run("given by the server")

        def get_run(self, run_id):
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id, experiment_id="7"))

        def log_batch(self, run_id, metrics=(), params=()):
            if params:
                note("mlflow", "config", run_id=run_id)
            if metrics:
                values = {metric.key: metric.value for metric in metrics}
                note("mlflow", "log", run_id=run_id, metrics=values, step=metrics[0].step)

        def set_terminated(self, run_id, status):
            note("mlflow", "finish", run_id=run_id, status=status)

    return {
        "mlflow": {"set_tracking_uri": lambda uri: None},
        "mlflow.tracking": {"MlflowClient": MlflowClient, "context": SimpleNamespace(resolve_tags=None)},
        "mlflow.tracking.context": {"resolve_tags": lambda tags: tags},
        "mlflow.utils": {},
        "mlflow.utils.mlflow_tags": {"MLFLOW_RUN_NAME": "mlflow.runName"},
        "mlflow.entities": {"Param": SimpleNamespace, "Metric": SimpleNamespace},
    }
