"""Ranks that meet over the right interface and end together; on real jobs, see test_finetune_ranks.py."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment

from rag.distributed import launch
from rag.distributed.launch import RankLauncher, ended_together
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
