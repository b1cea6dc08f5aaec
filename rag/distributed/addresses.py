"""Which addresses the ranks of a job listen on: the loopback interface where all of them run on one machine.

choose_interface(main_address, one_node=True)          # gloo's and NCCL's connections
open_store(trainer.strategy.cluster_environment, True) # torch's store, where torchrun has not opened one
"""

import errno
import ipaddress
import os
import socket
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist

from rag.distributed.meeting import port_in_use
from rag.errors import UserError

if TYPE_CHECKING:  # eval_rag.py does without Lightning, which takes seconds
    from pytorch_lightning.plugins.environments import ClusterEnvironment

LOOPBACK = "127.0.0.1"
# Of torch's env:// start: set, rank 0 connects to a store that is there, as ranks of torchrun do, and opens none of its
# own, which would listen on every interface.
STORE_IS_THERE = "TORCHELASTIC_USE_AGENT_STORE"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

_stores: list[dist.TCPStore] = []  # of this process; they serve as long as they are kept


def open_store(environment: "ClusterEnvironment", one_node: bool) -> None:
    """Rank 0: open the store at which the ranks meet, on one address; nothing on the others or under torchrun.

    Of ranks on one node that is the loopback interface, whatever MASTER_ADDR says. Of several nodes it is MASTER_ADDR,
    or every interface where this machine has no such address, as behind a forwarded port.

    Raises:
        UserError: the port is in use.
    """
    if dist.is_torchelastic_launched():
        return
    if one_node:
        os.environ["MASTER_ADDR"] = LOOPBACK
    if environment.global_rank() != 0 or _stores:
        return
    port = environment.main_port
    listener = _listener(environment.main_address, port)
    host = listener.getsockname()[0]
    own = LOOPBACK if ipaddress.ip_address(host).is_unspecified else host
    _stores.append(dist.TCPStore(own, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()))
    os.environ |= {"MASTER_PORT": str(port), STORE_IS_THERE: "True"}


def _listener(address: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(port_in_use(str(port))) from None
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError:
        raise UserError(port_in_use(str(port))) from None


def choose_interface(main_address: str, one_node: bool) -> None:
    """Have gloo and NCCL talk over the loopback interface on one node, gloo else over the one that leads to rank 0's.

    Left to itself gloo takes the one that this machine's host name stands for, which may be none, or one that no other
    node reaches; NCCL takes any but the loopback one. What the user has set stays.
    """
    interface = _interface_towards(LOOPBACK if one_node else main_address)
    if interface is None:  # rank 0's node is not to be found: said where it is called
        return
    for name in INTERFACES if one_node else INTERFACES[:1]:
        os.environ.setdefault(name, interface)


def _interface_towards(main_address: str) -> str | None:
    try:
        family, _, _, _, address = socket.getaddrinfo(main_address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0])
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        found = {ipaddress.ip_address(one.address.split("%")[0]) for one in addresses if one.family == family}
        if own in found or (own.is_loopback and any(one.is_loopback for one in found)):
            return name
    return None
