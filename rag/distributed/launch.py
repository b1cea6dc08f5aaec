"""How the ranks of a training job meet, and how they end together.

    trainer = build_trainer(args, callbacks, logger)   # its launcher is a `RankLauncher`
    with ended_together(trainer):
        trainer.fit(module, datamodule=data)

Whatever ends rank 0, a mistake of the user's, Ctrl-C or an error, leaves no rank behind that it started; a rank that
fails leaves rank 0 time to end by itself, as what it has started is to be stopped.
"""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeGuard

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from rag.distributed.addresses import choose_interface
from rag.distributed.beats import Beats
from rag.distributed.meeting import port_in_use
from rag.distributed.ranks import reason_of
from rag.distributed.watch import LAUNCHER, LEFT_ALONE, PATIENCE, RankWatch, peers_of, tell
from rag.errors import RankError, UserError


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which looks after what it launches: left alone, it kills rank 0 where a rank has failed."""

    watch: RankWatch | None = None

    def launch(self, function, *args, trainer=None, **kwargs):
        environment = self.cluster_environment
        if not environment.creates_processes_externally:
            os.environ[LAUNCHER] = str(os.getpid())
            self._call_children_scripts()  # which also makes this process one whose siblings are there
        choose_interface(environment.main_address, one_node=self.num_nodes == 1)
        if self.num_nodes > 1 and environment.global_rank() == 0 and not dist.is_initialized():
            place = f"MASTER_ADDR {environment.main_address}, MASTER_PORT {environment.main_port}"
            print(f"rank 0 waits for the ranks of {self.num_nodes} nodes at {place}", file=sys.stderr, flush=True)
        if self.watch is None:
            rank = environment.global_rank()

            def step() -> str:
                return f"step {trainer.global_step}"

            beats = Beats(rank, environment.world_size(), step) if self.num_nodes > 1 else None
            self.watch = RankWatch(peers_of(self.procs), rank, step, self.procs, beats=beats)
            self.watch.start()
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def end(self, seconds: float) -> None:
        """Wait for the launched ranks; kill those that are still there after so many seconds."""
        if self.watch is not None:
            self.watch.leave()
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


def use_rank_launcher(timeout: float | None = None) -> None:
    """Have the Trainers that are made from now on start their ranks by a `RankLauncher`, whatever their strategy.

    Lightning chooses the strategy by name and number of devices, so each name stands for one that does so.

    Args:
        timeout: seconds that a rank waits for another one in a collective call; None for Lightning's 1800.
    """
    for name in StrategyRegistry.available_strategies():
        known = StrategyRegistry[name]
        strategy, init_params = known["strategy"], dict(known["init_params"])
        # Those that fork or spawn have another launcher, and may have to be pickled.
        if init_params.get("start_method", "popen") == "popen" and not issubclass(strategy, _StartsRanks):
            strategy = type(strategy.__name__, (_StartsRanks, strategy), {})
        if timeout is not None and "timeout" in inspect.signature(strategy).parameters:
            init_params["timeout"] = timedelta(seconds=timeout)
        StrategyRegistry.register(name, strategy, known["description"], override=True, **init_params)


def _note_interrupts() -> threading.Event:
    """An event that is set once Ctrl-C has come, which raises `KeyboardInterrupt` as before."""
    interrupted = threading.Event()

    def interrupt(*_) -> NoReturn:
        interrupted.set()
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
        signal.signal(signal.SIGINT, interrupt)
    return interrupted


@contextmanager
def ended_together(trainer: pl.Trainer) -> Iterator[None]:
    """Leave with the ranks that this process launched: when they are done, or soon after an error here.

    Ctrl-C ends rank 0 by `KeyboardInterrupt` and the others with status 130, whatever comes of it: Lightning makes it a
    status 1, a rank that has ended a little sooner makes it a lost connection, and Python may have printed and
    forgotten it where it came in a destructor.
    """
    interrupted = _note_interrupts()
    patience = 5.0
    try:
        yield
        patience = PATIENCE
    except (Exception, SystemExit) as error:
        if interrupted.is_set():
            if trainer.is_global_zero:
                raise KeyboardInterrupt from None
            sys.exit(128 + signal.SIGINT)
        if isinstance(error, dist.DistError) and not dist.is_initialized():
            patience = 0.0  # they wait for rank 0
            raise UserError(_meeting_problem(trainer.global_rank, error)) from error
        if not _is_collective(error):
            raise
        _explain(trainer, error)
        sys.exit(1 if trainer.is_global_zero else LEFT_ALONE)
    finally:
        if isinstance(trainer.strategy.launcher, RankLauncher):
            trainer.strategy.launcher.end(patience)


def _is_collective(error: BaseException) -> TypeGuard[RuntimeError]:
    """Whether an error is of a call that all ranks make, and so may well be another rank's."""
    if isinstance(error, RankError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo/" in str(error) or "NCCL" in str(error))


def _explain(trainer: pl.Trainer, error: RuntimeError) -> None:
    """Have one rank of each machine say which rank was lost."""
    problem = str(error)
    if not isinstance(error, RankError):
        problem = f"another rank was lost, or did not come within --rank_timeout ({reason_of(error)})"
    launcher = trainer.strategy.launcher
    if isinstance(launcher, RankLauncher) and launcher.watch is not None:
        launcher.watch.explain(problem)
    else:
        tell(f"rank {trainer.global_rank}: {problem}")


def _meeting_problem(rank: int, error: Exception) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if rank == 0 and "EADDRINUSE" in str(error):
        return port_in_use(port)
    return (
        f"rank {rank}: the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port} "
        f"({str(error).splitlines()[0]}); set both, on every node, to an address and a free port of the node of rank 0"
    )
