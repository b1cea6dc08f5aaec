"""An index that is built in a process of its own, which a training starts and asks how far it is.

    build = IndexBuild(order, encoder=folder / "context_encoder", output=folder / "knowledge")
    build.start()
    while not build.is_over(): ...
    build.failure        # None where it went well

The process is `rag/knowledge/reembedding.py`. One that is killed is started again and goes on with the shards that are
left; it ends with the training, whatever ends that.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rag.distributed.ray_cluster import address_problem

COMMAND = (sys.executable, "-m", "rag.knowledge.reembedding")
TRIES = 4  # of a build that is killed
LOOK = 0.02  # seconds between two looks at whether it is over
# What tells a process that it is a rank of a job, which the build is not.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
             "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # fmt: skip
# What it tells by the flags of use_own_knowledge_dataset.py, by those of the training.
HERE = {"--num_encoding_processes": "--refresh_processes", "--distributed ray": "--refresh_device ray",
        " or less --tokens_per_batch": "", ", or give less --tokens_per_batch": ""}  # fmt: skip


@dataclass(frozen=True)
class BuildOrder:
    """What is embedded anew, and where.

    Attributes:
        passages_path: the run's passages.
        index_path: its index, which tells of what kind the new one is to be.
        device: cpu, cuda, cuda:N or ray; None for a GPU where there is one.
        processes: that embed.
        ray_address: of the cluster, for ray.
        beside: whether a training runs meanwhile, so that one core a process is enough.
        run_code: as --trust_remote_code.
    """

    passages_path: str
    index_path: str
    device: str | None
    processes: int
    ray_address: str
    beside: bool
    run_code: bool = False

    def words(self, encoder: Path, output: Path) -> list[str]:
        """The command line."""
        flags = {
            "passages_path": self.passages_path,
            "index_path": self.index_path,
            "encoder": encoder,
            "output_dir": output,
            "processes": self.processes,
            "parent": os.getpid(),
        }
        if self.device == "ray":
            flags["ray_address"] = self.ray_address
        words = [*COMMAND, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
        given = {"beside": self.beside, "trust_remote_code": self.run_code}
        return words + [f"--{name}" for name, is_given in given.items() if is_given]

    def environment(self) -> dict[str, str]:
        """Of this process, but that it is a rank of a job; with the device and the cores that the build may use."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment["PYTHONSAFEPATH"] = "1"  # no module of the folder that the training was started in
        if self.beside:
            environment["OMP_NUM_THREADS"] = "1"
        if self.device in ("cpu", "ray"):
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif self.device is not None and ":" in self.device:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            number = self.device.partition(":")[2]
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
        return environment


def device_problem(device: str | None, ray_address: str) -> str | None:
    """Why passages cannot be embedded on --refresh_device, as far as this process can tell."""
    if device == "ray":
        return address_problem(ray_address)
    if device is None or not device.startswith("cuda"):
        return None
    import torch

    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) < count:
        return None
    seen = f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"
    return f"--refresh_device {device}: this machine has {seen} that torch can use; name another, or leave it out"


class IndexBuild:
    """One build, in one process after the other where they are killed.

    Attributes:
        failure: why there will be no index, once that is known.
    """

    def __init__(self, order: BuildOrder, encoder: Path, output: Path):
        self.order, self.encoder, self.output = order, encoder, output
        self.log = output.with_name(f"{output.name}.log")
        self.process: subprocess.Popen | None = None
        self.tries = 0
        self.failure: str | None = None

    def start(self) -> None:
        self.tries += 1
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.order.words(self.encoder, self.output), env=self.order.environment(), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether there is an index, or a failure; waits so long for it."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process is not None, "start() comes first"
            status = self.process.poll()
            if status is not None and status < 0 and self.tries < TRIES:
                self.start()
            elif status is not None:
                if status:
                    self.failure = self._reason(status)
                else:
                    self.log.unlink(missing_ok=True)
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK)

    def _reason(self, status: int) -> str:
        if status < 0:
            return f"its process was killed ({signal.Signals(-status).name}) {self.tries} times"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line.partition(": error: ")[2] for line in lines if ": error: " in line), "")
        for theirs, ours in HERE.items():
            said = said.replace(theirs, ours)
        return said or (lines[-1] if lines else f"its process ended with status {status}")

    def stop(self) -> None:
        """End the process; what it has written is there for the next."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()
