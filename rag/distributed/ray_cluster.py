"""This process's connection to a Ray cluster: one that runs already, or one of our own on the loopback interface.

    connection = RayConnection("auto")
    meeting = connection.open(num_workers=4)     # on rank 0
    connection.join(meeting)                     # on the others
    connection.close()

Ray is an optional package, imported where it is used.
"""

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from rag.distributed.stopped import StoppedClock, is_gone
from rag.distributed.watch import tell
from rag.errors import UserError

# Ray's queues and arrays on a cluster of our own: a batch of queries and ids is far below a megabyte.
OBJECT_STORE_BYTES = 100 * 2**20
DAEMONS = ("gcs_server", "raylet")  # without one of these a cluster of our own answers nobody
# Of the name of a Unix socket, and those that Ray's own folders and the socket add to that of the folder it is given.
SOCKET_BYTES, BYTES_ADDED = 107, 64
SECONDS_TO_END = 3.0  # that this process has where one of them has ended, maybe because the whole job was asked to


class RayConnection:
    """This process's connection to a Ray cluster.

    Args:
        address: "HOST:PORT" of a running cluster; "auto" for the one that RAY_ADDRESS names or `ray start` started on
            this node, or else one of our own: on this node alone, on the loopback interface, with token authentication.

    Where RAY_AUTH_MODE is not set, the token in the home folder opens a cluster that took it when `ray start` started
    this node; it is sent to no machine that only an address names.
    """

    def __init__(self, address: str):
        self.address = address
        self.folder: str | None = None  # sockets and logs of a cluster of our own
        self.guard: ClusterGuard | None = None
        self.opened = False

    def open(self, num_workers: int) -> dict:
        """Connect, or start a cluster; returns the address and, for one of our own, the environment that opens it."""
        import ray

        if not ray.is_initialized():
            running = _running_cluster() if self.address == "auto" else self.address
            if running is None:
                return {"address": self._start(num_workers), "environment": _authentication()}
            self._connect(running)
        return {"address": ray.get_runtime_context().gcs_address}

    def join(self, meeting: dict) -> None:
        """Connect to the cluster that `open` found or started on rank 0."""
        import ray

        if ray.is_initialized():
            return
        if "environment" in meeting:
            _authenticate(meeting["environment"])
            self._connect(meeting["address"], loopback=True)
        elif (running := _running_cluster() if self.address == "auto" else self.address) is None:
            raise UserError(f"no Ray runs on this node; let it join by `ray start --address={meeting['address']}`")
        else:
            self._connect(running)

    def close(self) -> None:
        """Disconnect, which ends what this process created; a cluster of our own ends altogether."""
        if self.guard is not None:
            self.guard.leave()
            self.guard = None
        if self.opened:
            import ray

            ray.shutdown()
            self.opened = False
        if self.folder is not None:
            self.remover.communicate(b"Ray is shut down\n")
            self.folder = None

    def _start(self, num_workers: int) -> str:
        import ray

        _token_switches()  # or everybody on this machine could use the cluster
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Ray would leave one in the home folder. It reads the token once a process, so it stays for the next start.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "RAY_AUTH_MODE" not in os.environ:
            _authenticate({"RAY_AUTH_MODE": "token"})
        _on_loopback(True)
        self.opened = True
        self.folder = _new_folder()
        self.remover = _remover(self.folder)
        _init_ray(
            address="local",
            num_cpus=num_workers,  # as many processes as Ray starts ahead
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=self.folder,
        )
        address = ray.get_runtime_context().gcs_address
        if not _is_loopback(address):  # the switch is there and does nothing any more
            self.close()
            raise _not_on_loopback(f"it listens on {address}")
        self.guard = ClusterGuard(self.remover.pid)
        self.guard.start()
        return address

    def _connect(self, address: str, loopback: bool = False) -> None:
        import ray

        try:
            _knock(address)
            _on_loopback(loopback)
            noted = self.address == "auto" and not os.environ.get("RAY_ADDRESS")  # by `ray start` on this node
            if not loopback and _takes_token(address, unknown=noted):
                _follow_token()
            self.opened = True
            _init_ray(address=address)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            remedy = (
                "Ray's own cluster of rank 0 serves one node; for several, run `ray start --head` and join it by "
                "`ray start --address` on the others"
                if loopback
                else "start one with `ray start --head`, or `ray stop` to forget one that died"
            )
            raise UserError(
                f"--ray_address {self.address}: no Ray cluster can be reached at {address} ({first_line(error)}); "
                f"{remedy}"
            ) from error


def _init_ray(**settings) -> None:
    """`ray.init` without its handler of SIGTERM, which ends the job with status 15 in the middle of a step."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _new_folder() -> str:
    """Of a cluster's sockets and logs: below /tmp where TMPDIR, as clusters' schedulers set it, is too long a name."""
    folder = tempfile.mkdtemp(prefix="rag_ray_")
    room = SOCKET_BYTES - BYTES_ADDED - len(os.fsencode(folder))
    if room >= 0:
        return folder
    os.rmdir(folder)
    try:
        return tempfile.mkdtemp(prefix="rag_ray_", dir="/tmp")
    except OSError as error:
        raise UserError(
            f"TMPDIR {tempfile.gettempdir()} has {-room} bytes too many for the names of Ray's sockets, and /tmp "
            f"cannot be used ({error.strerror}); set TMPDIR to a folder with a shorter name"
        ) from error


def _remover(folder: str) -> subprocess.Popen:
    """A process that removes the cluster at the end of the pipe to it, so also where this process is killed."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("ray_remover.py")), folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


class ClusterGuard(threading.Thread):
    """Ends this process and all that it started when its cluster's own processes die: Ray waits a minute or more.

    Args:
        remover: id of the process that sees to the rest of the cluster.
    """

    def __init__(self, remover: int):
        super().__init__(daemon=True)
        self.remover = remover
        own = {process: process.name() for process in psutil.Process().children()}
        self.daemons = {process: name for process, name in own.items() if name in DAEMONS}
        self.clock = StoppedClock()
        self.left = threading.Event()

    def run(self) -> None:
        while not self.left.wait(1.0):
            fates = {process: "has died" for process in self.daemons if is_gone(process)}
            fates |= dict.fromkeys(self.clock.stood_still(self.daemons), "was stopped (SIGSTOP)")
            for process, fate in fates.items():
                if not self.left.wait(SECONDS_TO_END):
                    name = f"Ray's {self.daemons[process]} (process {process.pid})"
                    tell(f"{name} {fate}, without which its workers are lost; the same command resumes")
                    self._end_at_once()
                return

    def leave(self) -> None:
        """From now on the cluster may end."""
        self.left.set()
        if self.is_alive():
            self.join()

    def _end_at_once(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid != self.remover:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        os._exit(1)


def address_problem(address: str) -> str | None:
    """Why no cluster can be reached at the address of one, as far as a connection tells; "auto" has none yet."""
    if address == "auto":
        return None
    try:
        _knock(address)
    except (OSError, ValueError) as error:
        return f"--ray_address {address}: no Ray cluster can be reached there ({first_line(error)}); give another"
    return None


def _knock(address: str) -> None:
    """Connect to HOST:PORT and hang up; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def _running_cluster() -> str | None:
    """Address of the cluster that RAY_ADDRESS names or `ray start` noted on this node; never another job's own one."""
    from ray._private.services import get_ray_address_from_environment

    return get_ray_address_from_environment(None, None)


def _on_loopback(only: bool) -> None:
    """Have Ray listen on 127.0.0.1 only, or not. On Linux it has no argument for that, though it does so elsewhere.

    Raises:
        UserError: only there, but this release of Ray has no such switch, so that it would listen everywhere.
    """
    try:
        from ray._private import ray_constants
    except ImportError:
        ray_constants = None

    if isinstance(getattr(ray_constants, "ENABLE_RAY_CLUSTER", None), bool):
        ray_constants.ENABLE_RAY_CLUSTER = not only
    elif only:
        raise _not_on_loopback("ray._private.ray_constants.ENABLE_RAY_CLUSTER is gone")


def _is_loopback(address: str) -> bool:
    """Whether no other machine reaches "HOST:PORT"."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def _not_on_loopback(reason: str) -> UserError:
    import ray

    return UserError(
        f"--ray_address auto: a cluster of our own would be open to other machines, as Ray {ray.__version__} cannot be "
        f"kept to this one ({reason}); install the release in requirements.txt, or run `ray start --head` first"
    )


def _authentication() -> dict[str, str]:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def _authenticate(environment: dict[str, str]) -> None:
    """Take over what opens a cluster. Ray read its own environment when it was imported.

    Raises:
        UserError: this release of Ray has no such switches.
    """
    loader, config = _token_switches()
    os.environ.update(environment)
    config.initialize("")
    loader.reset_cache()


def _follow_token() -> None:
    """Authenticate where a token is at hand and nothing says whether to, as `ray.init(address="auto")` does."""
    try:
        loader, _ = _token_switches()
    except UserError:  # a cluster that wants a token refuses us
        return
    if "RAY_AUTH_MODE" not in os.environ and loader.has_token(ignore_auth_mode=True):
        _authenticate({"RAY_AUTH_MODE": "token"})


def _takes_token(address: str, unknown: bool) -> bool:
    """Whether this node belongs to the cluster at "HOST:PORT" and `ray start` turned authentication on here.

    It does where it finds a token, and each `ray.init()` that starts a cluster leaves one. A cluster from before has no
    authentication, and its actors die of a token. So the environment of Ray's process on this node decides.

    Args:
        unknown: the answer where that cannot be seen.
    """
    host, _, port = address.rpartition(":")
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet":
            continue
        flag = next((word for word in process.info["cmdline"] or [] if word.startswith("--gcs-address=")), "")
        its_host, _, its_port = flag.removeprefix("--gcs-address=").rpartition(":")
        if its_port == port and (its_host == host or (_is_of_this_machine(its_host) and _is_of_this_machine(host))):
            try:
                return process.environ().get("RAY_AUTH_MODE") == "token"
            except psutil.Error:  # another user's
                return unknown
    return unknown


def _token_switches():
    """Ray's own loader of the token and its settings.

    Raises:
        UserError: this release of Ray has them no more.
    """
    import ray

    try:
        from ray._raylet import AuthenticationTokenLoader, Config

        return AuthenticationTokenLoader.instance(), Config
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--ray_address auto: a cluster of our own cannot be locked with Ray {ray.__version__} "
            f"({first_line(error)}); install the release in requirements.txt, or run `ray start --head` first"
        ) from error


def _is_of_this_machine(host: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return True


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
