"""How the ranks of a training job meet, and how they end together.

    trainer = build_trainer(args, callbacks, logger)   # its launcher is a `RankLauncher`
    with ended_together(trainer):
        trainer.fit(module, datamodule=data)

Whatever ends rank 0, a mistake of the user's, Ctrl-C or an error, leaves no rank behind that it started; a rank that
fails leaves rank 0 time to end by itself, as what it has started is to be stopped.
"""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from rag.distributed.meeting import port_in_use
from rag.errors import UserError

# Seconds that rank 0 has to end when a rank that it launched has failed. Over gloo it hears of that at once; on GPUs it
# may wait for the lost rank without end.
PATIENCE = 30


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which looks after what it launches: left alone, it kills rank 0 where a rank has failed."""

    def launch(self, function, *args, trainer=None, **kwargs):
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()  # which also makes this process one whose siblings are there
            threading.Thread(target=self._watch, daemon=True).start()
        _choose_interface(self.cluster_environment.main_address)
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _watch(self) -> None:
        while not any(process.poll() for process in self.procs):  # None while it runs, 0 where all went well
            if all(process.returncode == 0 for process in self.procs):
                return
            time.sleep(0.5)
        time.sleep(PATIENCE)
        print("a rank has failed and rank 0 waits for it: rank 0 is killed", file=sys.stderr, flush=True)
        self.kill(signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def end(self, seconds: float) -> None:
        """Wait for the launched ranks; kill those that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.procs:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _StartsRanks:
    """Before a strategy of Lightning's: what it would start by Lightning's launcher it starts by a `RankLauncher`."""

    launcher: Any
    cluster_environment: ClusterEnvironment
    num_processes: int
    num_nodes: int

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]  # the strategy's
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


def use_rank_launcher() -> None:
    """Have the Trainers that are made from now on start their ranks by a `RankLauncher`, whatever their strategy.

    Lightning chooses the strategy by name and number of devices, so each name stands for one that does so.
    """
    for name in StrategyRegistry.available_strategies():
        known = StrategyRegistry[name]
        strategy, init_params = known["strategy"], known["init_params"]
        # Those that fork or spawn have another launcher, and may have to be pickled.
        if init_params.get("start_method", "popen") == "popen" and not issubclass(strategy, _StartsRanks):
            ours = type(strategy.__name__, (_StartsRanks, strategy), {})
            StrategyRegistry.register(name, ours, known["description"], override=True, **init_params)


@contextmanager
def ended_together(trainer: pl.Trainer) -> Iterator[None]:
    """Leave with the ranks that this process launched: when they are done, or soon after an error here."""
    patience = 5.0
    try:
        yield
        patience = PATIENCE
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning makes a plain status 1
            if trainer.is_global_zero:
                raise KeyboardInterrupt from None
            end.code = 128 + signal.SIGINT
        raise
    except dist.DistNetworkError as error:
        patience = 0.0  # they wait for rank 0
        raise UserError(_meeting_problem(trainer.global_rank, error)) from error
    finally:
        if isinstance(trainer.strategy.launcher, RankLauncher):
            trainer.strategy.launcher.end(patience)


def _meeting_problem(rank: int, error: Exception) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if rank == 0 and "EADDRINUSE" in str(error):
        return port_in_use(port)
    return (
        f"rank {rank}: the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port} "
        f"({str(error).splitlines()[0]}); set both, on every node, to an address and a free port of the node of rank 0"
    )


def _choose_interface(main_address: str) -> None:
    """Have gloo talk over the network interface that leads to rank 0's node.

    Left to itself it takes the one that this machine's host name stands for, which may be none, or one that no other
    node reaches.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(main_address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0])
    except OSError:  # rank 0's node is not to be found: said where it is called
        return
    for name, addresses in psutil.net_if_addrs().items():
        found = {ipaddress.ip_address(one.address.split("%")[0]) for one in addresses if one.family == family}
        if own in found or (own.is_loopback and any(one.is_loopback for one in found)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
