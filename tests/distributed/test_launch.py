"""Ranks that meet over the right interface and end together; on real jobs, see test_finetune_ranks.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch.distributed.rendezvous import rendezvous

from rag.distributed import addresses
from rag.distributed.addresses import choose_interface, open_store
from rag.distributed.launch import RankLauncher, ended_together, use_rank_launcher
from rag.distributed.meeting import LAUNCHED, node_problems, timeout_problems
from rag.distributed.watch import LEFT_ALONE
from rag.errors import RankError, UserError


@pytest.mark.parametrize(
    ("address", "one_node", "interface"),
    [
        ("127.0.0.1", False, {"GLOO_SOCKET_IFNAME": "lo"}),
        ("::1", False, {"GLOO_SOCKET_IFNAME": "lo"}),
        ("no.such.host.invalid", False, {}),
        ("no.such.host.invalid", True, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),
    ],
)
def test_the_interface_is_the_one_that_leads_to_rank_zero(address, one_node, interface, monkeypatch):
    environment = {}
    monkeypatch.setattr(addresses.os, "environ", environment)
    choose_interface(address, one_node)
    assert environment == interface
    environment["GLOO_SOCKET_IFNAME"] = "chosen"
    choose_interface(address, one_node)
    assert environment["GLOO_SOCKET_IFNAME"] == "chosen"


@pytest.fixture
def store(monkeypatch):
    """Opens the store of rank 0 and gives the addresses at which this process listens then."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")  # is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(addresses, "_stores", [])

    def listening() -> set:
        return {one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}

    def open_one(one_node: bool, rank: int = 0, **environment: str) -> set:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        before, cluster = listening(), LightningEnvironment()
        cluster.set_global_rank(rank)
        open_store(cluster, one_node)
        return {address.ip for address in listening() - before}

    yield open_one
    rank_zero_only.rank = 0


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "node7"}])
def test_ranks_of_one_node_meet_on_the_loopback_interface(given, store):
    assert store(True, **given) == {"127.0.0.1"}
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert store(True) == set()  # there is one
    meeting = rendezvous("env://", rank=0, world_size=1, timeout=timedelta(seconds=10))
    next(meeting)[0].set("a", "b")
    assert addresses._stores[0].get("a") == b"b"


@pytest.mark.parametrize(("address", "expected"), [("127.0.0.2", "127.0.0.2"), ("198.51.100.1", "::")])
def test_ranks_of_several_nodes_meet_at_rank_zeros_address_alone_where_it_has_that(address, expected, store):
    assert store(False, MASTER_ADDR=address) == {expected}
    assert os.environ["MASTER_ADDR"] == address


def test_other_ranks_and_those_of_torchrun_open_no_store(store):
    assert store(True, rank=1) == store(True, TORCHELASTIC_RUN_ID="1") == set()
    assert not addresses._stores


@pytest.mark.parametrize("address", ["127.0.0.1", "198.51.100.1"])
def test_a_port_that_was_taken_meanwhile_is_named(address, store):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is used by another process"):
            store(address == "127.0.0.1", MASTER_ADDR=address, MASTER_PORT=port)


def test_several_nodes_need_to_be_told_where_to_meet(monkeypatch):
    for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert node_problems(1) == []
    assert "--num_nodes 2: MASTER_ADDR and MASTER_PORT not set" in node_problems(2)[0]
    monkeypatch.setenv("RANK", "0")  # torchrun
    assert node_problems(2) == []
    monkeypatch.delenv("RANK")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        assert name in node_problems(2)[0].split(" not set")[0]
        monkeypatch.setenv(name, "1")
    assert node_problems(2) == []


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_cannot_be_counted_is_refused(seconds):
    assert timeout_problems(600) == []
    assert f"--rank_timeout {seconds:g} must be from 1 to 10000000 seconds" in timeout_problems(seconds)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn"])
def test_every_strategy_that_starts_ranks_as_scripts_does_so_by_our_launcher(strategy):
    for _ in range(2):
        use_rank_launcher(timeout=77)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy_of = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet).strategy
    assert isinstance(strategy_of, DDPStrategy) and strategy_of._timeout == timedelta(seconds=77)
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


def exit_as_lightning():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        sys.exit(1)


def lose_the_other_rank_first():
    with contextlib.suppress(KeyboardInterrupt):  # as Python has to where it comes in a destructor
        os.kill(os.getpid(), signal.SIGINT)
    raise RuntimeError("[a/gloo/b.cc:1] Connection closed by peer")


@pytest.mark.parametrize("end", [exit_as_lightning, lose_the_other_rank_first])
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_ctrl_c_whatever_comes_of_it_and_the_other_rank_is_gone(end, rank, trainer, capsys):
    trainer.strategy.launcher.kill(signal.SIGKILL)  # as Lightning does
    trainer.global_rank, trainer.is_global_zero = rank, rank == 0
    with pytest.raises(SystemExit if rank else KeyboardInterrupt) as ending, ended_together(trainer):
        end()
    assert not rank or ending.value.code == 130
    assert capsys.readouterr().err == ""
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


@pytest.mark.parametrize(("rank", "status"), [(0, 1), (1, LEFT_ALONE)])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RankError("retrieval 3: rank 1 has failed"), "retrieval 3: rank 1 has failed"),
        (
            RuntimeError("[a/gloo/b.cc:1] Timed out waiting"),
            "another rank was lost, or did not come within --rank",
        ),
        (dist.DistBackendError("NCCL error"), "(NCCL error)"),
    ],
)
def test_what_a_lost_rank_breaks_ends_in_one_line(error, words, rank, status, trainer, monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(trainer.strategy.launcher, "end", lambda seconds: trainer.strategy.launcher.procs[0].kill())
    trainer.global_rank, trainer.is_global_zero = rank, rank == 0
    with pytest.raises(SystemExit) as end, ended_together(trainer):
        raise error
    assert end.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_an_error_of_ones_own_stays_one(trainer, monkeypatch):
    monkeypatch.setattr(trainer.strategy.launcher, "end", lambda seconds: None)
    with pytest.raises(RuntimeError, match="shapes"), ended_together(trainer):
        raise RuntimeError("shapes do not fit")
