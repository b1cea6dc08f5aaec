"""Train on two nodes, and compare with one process: two network namespaces of this machine stand for the nodes.

    python -m tests.distributed.two_nodes --retriever pytorch ray -- --model_name_or_path CHECKPOINT --data_dir DATA ...

What follows `--` are flags of `finetune_rag.py`, but for the output folder, ranks and batch size. Each way trains with
torchrun, a rank in each namespace, half the batch a rank; losses and weights are those of one process with the whole
batch. With `ray`, a Ray cluster over both namespaces searches. Needs root, iproute2 and a kernel that lets make
namespaces; exits with status 77 where these are not there. Afterwards the namespaces and all in them are gone.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
MAIN_PORT, RAY_PORT = "29511", "6391"
CANNOT = 77
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32, sums in another order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retriever", nargs="+", choices=["pytorch", "ray", "local"], default=["pytorch", "ray"])
    parser.add_argument("--batch_size", type=int, default=2, help="Questions a rank; one process takes twice as many.")
    parser.add_argument("--one_process", type=Path, help="Output folder of the run on one process; or else it is run.")
    parser.add_argument("flags", nargs="*", help="of finetune_rag.py, behind --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="two_nodes_"))  # short, as Ray's sockets need it
    try:
        with two_namespaces() as nodes:
            one = args.one_process or folder / "one"
            if args.one_process is None:
                seconds = train_alone(args, one)
                print(f"one process: {seconds:.0f} s", flush=True)
            for retriever in args.retriever:
                seconds = train_on(nodes, args, folder / retriever, retriever)
                print(
                    f"two nodes, {retriever}: {seconds:.0f} s, {compare(one, folder / retriever)}",
                    flush=True,
                )
    except PermissionError as error:
        print(f"two nodes cannot be tried here: {error}")
        return CANNOT
    finally:
        shutil.rmtree(folder)
    return 0


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """The names of two network namespaces that see each other at `ADDRESSES` and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise PermissionError("root and iproute2 are needed")
    nodes = [f"rag{os.getpid()}{letter}" for letter in "ab"]
    try:
        for node in nodes:
            try:
                ip("netns", "add", node)
            except subprocess.CalledProcessError as error:
                raise PermissionError(error.stderr.strip()) from error
        ends = [f"v{node}" for node in nodes]
        ip("link", "add", ends[0], "netns", nodes[0], "type", "veth", "peer", "name", ends[1], "netns", nodes[1])
        for node, end, address in zip(nodes, ends, ADDRESSES, strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", node, "link", "set", device, "up")
            ip("-n", node, "route", "add", "default", "dev", end)
        yield nodes
    finally:
        for node in nodes:
            pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def start(node: str, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    with open(log, "a") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", node, *command], cwd=ROOT, stdout=output, stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)} | environment,
        )  # fmt: skip


def script(args: argparse.Namespace, out: Path, batch_size: int) -> list[str]:
    flags = ["--train_batch_size", str(batch_size), "--output_dir", str(out), "--accelerator", "cpu"]
    return [str(ROOT / "finetune_rag.py"), *args.flags, *flags]


def train_alone(args: argparse.Namespace, out: Path) -> float:
    began = time.monotonic()
    command = [sys.executable, *script(args, out, 2 * args.batch_size), "--distributed_retriever", "local"]
    subprocess.run([*command, "--devices", "1"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def train_on(nodes: list[str], args: argparse.Namespace, out: Path, retriever: str) -> float:
    """Seconds that the job took, without the start of a Ray cluster."""
    flags, environment = ["--distributed_retriever", retriever], {}
    logs = [out.with_suffix(f".{node}") for node in nodes]
    if retriever == "ray":
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        start_ray(nodes, out.parent / "r", logs, environment)
        flags += ["--ray_address", f"{ADDRESSES[0]}:{RAY_PORT}", "--num_retrieval_workers", "2"]
    began = time.monotonic()
    ranks = [
        start(
            node,
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
                *("--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", MAIN_PORT),
                *script(args, out, args.batch_size),
                *("--num_nodes", "2", "--devices", "1", *flags),
            ],
            logs[rank],
            **environment,
        )
        for rank, node in enumerate(nodes)
    ]
    statuses = [rank.wait(300) for rank in ranks]
    if any(statuses):
        raise RuntimeError("\n".join(f"status {s}: {log.read_text()}" for s, log in zip(statuses, logs, strict=True)))
    return time.monotonic() - began


def start_ray(nodes: list[str], folder: Path, logs: list[Path], environment: dict[str, str]) -> None:
    """A Ray cluster over both nodes, up when this returns; it ends with the namespaces."""
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "2", "--disable-usage-stats"]
    head = ["--head", "--port", RAY_PORT, "--temp-dir", str(folder), "--include-dashboard", "false"]
    start(nodes[0], [*ray, "--node-ip-address", ADDRESSES[0], *head], logs[0], **environment)
    wait_until_answered(nodes[0], logs[0], environment, size=1)
    address = f"{ADDRESSES[0]}:{RAY_PORT}"
    start(nodes[1], [*ray, "--node-ip-address", ADDRESSES[1], "--address", address], logs[1], **environment)
    wait_until_answered(nodes[0], logs[0], environment, size=2)


def wait_until_answered(node: str, log: Path, environment: dict[str, str], size: int) -> None:
    """Until the cluster has so many nodes."""
    program = (
        "import ray, sys, time\n"
        f"ray.init('{ADDRESSES[0]}:{RAY_PORT}', log_to_driver=False)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {size}: time.sleep(0.2)\n"
    )
    for _ in range(20):
        if start(node, [sys.executable, "-c", program], log, **environment).wait(60) == 0:
            return
        time.sleep(0.5)
    raise RuntimeError(f"no Ray cluster of {size} nodes: {log.read_text()}")


def compare(one: Path, two: Path) -> str:
    """How far apart the two runs are; raises an error where that is more than the order of sums explains."""
    import numpy as np
    import torch

    logs = [[json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()] for out in (one, two)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    np.testing.assert_allclose(losses[1], losses[0], **TOLERANCE)
    weights = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], **TOLERANCE)
    apart = max((weights[1][name] - weight).abs().max().item() for name, weight in weights[0].items())
    return f"{len(losses[0])} losses equal, weights at most {apart:.1e} apart"


if __name__ == "__main__":
    sys.exit(main())
