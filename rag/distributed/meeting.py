"""Whether the ranks of a job can meet, as far as it can be told before torch is imported."""

import os
import socket

# What launchers tell a process that they started: torchrun and Lightning, SLURM, LSF, Open MPI and others' MPI.
LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "LSB_JOBID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


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
