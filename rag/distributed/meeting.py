"""Whether the ranks of a job can meet, as far as it can be told before torch is imported."""

import os
import socket

# What launchers tell a process that they started: torchrun and Lightning, SLURM, LSF, Open MPI and others' MPI.
LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "LSB_JOBID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


LONGEST_TIMEOUT = 10_000_000.0  # seconds; torch counts in nanoseconds of 64 bits, and this is four months


def timeout_problems(seconds: float) -> list[str]:
    """--rank_timeout is none, or one that torch could not count."""
    if 1 <= seconds <= LONGEST_TIMEOUT:
        return []
    return [f"--rank_timeout {seconds:g} must be from 1 to {LONGEST_TIMEOUT:.0f} seconds"]


def rank_problems(devices: int | str, num_nodes: int, ranks: int) -> list[str]:
    """Torchrun has started another number of ranks than the flags ask for.

    Args:
        devices: --devices; on each of `num_nodes`.
        ranks: what the two make.
    """
    started = int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else ranks
    if started == ranks:
        return []
    return [
        f"--devices {devices} on --num_nodes {num_nodes} makes {ranks} ranks, torchrun has started {started}; leave "
        "--num_nodes and --devices (or --gpus, --num_processes) out to take torchrun's"
    ]


def node_problems(num_nodes: int) -> list[str]:
    """Several nodes are asked for and nothing says where the others are, so that rank 0 would wait for nobody."""
    if num_nodes == 1 or any(name in os.environ for name in LAUNCHED if name != "NODE_RANK"):
        return []
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not missing:
        return []
    return [
        f"--num_nodes {num_nodes}: {' and '.join(missing)} not set, so that the nodes cannot meet; start the command "
        "by torchrun on every node (docs/several_nodes.md), or set these two and NODE_RANK there, or leave --num_nodes "
        "out to train on this one"
    ]


def port_problems() -> list[str]:
    """MASTER_PORT is taken on this machine; for a process that is to start all other ranks itself."""
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or any(name in os.environ for name in LAUNCHED):
        return []
    try:
        socket.create_server(("", int(port))).close()
    except OSError:
        return [port_in_use(port)]
    return []


def port_in_use(port: str) -> str:
    return (
        f"MASTER_PORT {port} is used by another process of this machine; set it to a free port, the same for every "
        "rank, or unset it where all ranks run on this machine"
    )
