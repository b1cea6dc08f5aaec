"""Ranks that meet over the right interface and end together; on real jobs, see test_finetune_ranks.py."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from rag.distributed import launch
from rag.distributed.launch import RankLauncher, ended_together, use_rank_launcher
from rag.errors import UserError


@pytest.mark.parametrize(("address", "interface"), [("127.0.0.1", "lo"), ("::1", "lo"), ("no.such.host.invalid", None)])
def test_the_interface_is_the_one_that_leads_to_rank_zero(address, interface, monkeypatch):
    environment = {}
    monkeypatch.setattr(launch.os, "environ", environment)
    launch._choose_interface(address)
    assert environment.get("GLOO_SOCKET_IFNAME") == interface
    environment["GLOO_SOCKET_IFNAME"] = "chosen"
    launch._choose_interface(address)
    assert environment["GLOO_SOCKET_IFNAME"] == "chosen"


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn"])
def test_every_strategy_that_starts_ranks_as_scripts_does_so_by_our_launcher(strategy):
    for _ in range(2):
        use_rank_launcher()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy_of = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet).strategy
    assert isinstance(strategy_of, DDPStrategy)
    assert isinstance(strategy_of.launcher, RankLauncher) == (strategy != "ddp_spawn")
    if strategy != "ddp_spawn":
        assert (strategy_of.launcher.num_processes, strategy_of.launcher.num_nodes) == (2, 1)
        assert strategy_of.launcher.cluster_environment is strategy_of.cluster_environment


def test_one_device_has_no_launcher():
    use_rank_launcher()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    assert pl.Trainer(accelerator="cpu", devices=1, **quiet).strategy.launcher is None


@pytest.fixture
def trainer():
    """Rank 0 of two, whose other rank sleeps."""
    launcher = RankLauncher(LightningEnvironment(), 2, 1)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), global_rank=0, is_global_zero=True)


def test_ctrl_c_is_ctrl_c_again_and_the_other_rank_is_gone(trainer):
    trainer.strategy.launcher.kill(signal.SIGKILL)  # as Lightning does
    with pytest.raises(KeyboardInterrupt), ended_together(trainer):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    assert trainer.strategy.launcher.procs[0].returncode == -signal.SIGKILL


def test_other_exits_keep_their_status(trainer, monkeypatch):
    monkeypatch.setattr(trainer.strategy.launcher, "end", lambda seconds: trainer.strategy.launcher.procs[0].kill())
    with pytest.raises(SystemExit) as end, ended_together(trainer):
        sys.exit(143)
    assert end.value.code == 143


@pytest.mark.parametrize(
    ("rank", "reason", "words"),
    [
        (0, "port: 29500, EADDRINUSE", ["MASTER_PORT 29500 is used by another process", "free port"]),
        (1, "timed out", ["rank 1", "MASTER_ADDR node7, MASTER_PORT 29500", "(timed out)"]),
    ],
)
def test_ranks_that_cannot_meet_are_told_where(rank, reason, words, trainer, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    trainer.global_rank = rank
    with pytest.raises(UserError) as error, ended_together(trainer):
        raise dist.DistNetworkError(reason)
    assert all(word in str(error.value) for word in words)
    assert trainer.strategy.launcher.procs[0].returncode == -signal.SIGKILL  # it waited for rank 0
