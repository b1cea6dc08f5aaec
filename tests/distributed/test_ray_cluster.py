"""Which token opens a Ray cluster, and what happens where Ray has no switch for it any more."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rag.distributed import ray_cluster
from rag.distributed.ray_cluster import RayConnection
from rag.errors import UserError
from tests.conftest import ROOT

raylet = pytest.importorskip("ray._raylet")

HERE, ELSEWHERE = "127.0.0.1:6379", "198.51.100.1:6379"
TOKEN = {"RAY_AUTH_MODE": "token"}


@pytest.fixture
def ray(monkeypatch):
    """Ray without its processes.

    Attributes: token, whether one is at hand; node, Ray's process on this node, if any; environment, what `ray.init`
    met.
    """
    ray = SimpleNamespace(token=True, node=None, environment=None)
    loader = SimpleNamespace(has_token=lambda ignore_auth_mode: ray.token, reset_cache=lambda: None)
    monkeypatch.setattr(raylet, "AuthenticationTokenLoader", SimpleNamespace(instance=lambda: loader))
    monkeypatch.setattr(raylet, "Config", SimpleNamespace(initialize=lambda settings: None))
    monkeypatch.setattr(
        psutil, "process_iter", lambda names: [node_process(HERE, TOKEN, name="sh"), *filter(None, [ray.node])]
    )
    monkeypatch.setattr(ray_cluster, "_on_loopback", lambda only: None)
    monkeypatch.setattr(ray_cluster.socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(ray_cluster, "_init_ray", lambda **_: setattr(ray, "environment", os.environ.copy()))
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # is restored after the test
        monkeypatch.delenv(name)
    return ray


def node_process(address: str, environment: dict | None, name: str = "raylet"):
    """A process of Ray's that belongs to the cluster at this address; another user's where it has no environment."""

    def environ() -> dict:
        if environment is None:
            raise psutil.AccessDenied()
        return environment

    return SimpleNamespace(info={"name": name, "cmdline": ["ray", f"--gcs-address={address}"]}, environ=environ)


def mode_at(ray, flag: str, address: str) -> str | None:
    """RAY_AUTH_MODE when this process connects."""
    RayConnection(flag)._connect(address)
    return ray.environment.get("RAY_AUTH_MODE")


@pytest.mark.parametrize(
    ("flag", "address", "node", "mode"),
    [
        ("auto", HERE, node_process(HERE, TOKEN), "token"),
        ("auto", ELSEWHERE, node_process(ELSEWHERE, TOKEN), "token"),  # this node joined it by `ray start --address`
        (HERE, HERE, node_process(HERE, TOKEN), "token"),
        ("localhost:6379", "localhost:6379", node_process(HERE, TOKEN), "token"),
        (ELSEWHERE, ELSEWHERE, node_process(ELSEWHERE, TOKEN), "token"),
        # Without authentication.
        ("auto", HERE, node_process(HERE, {}), None),
        (HERE, HERE, node_process(HERE, {}), None),
        # It cannot be seen: as Ray itself does.
        ("auto", HERE, node_process(HERE, None), "token"),
        ("auto", ELSEWHERE, None, "token"),
        (HERE, HERE, node_process(HERE, None), None),
        # No part of this node: it does not see the token.
        (ELSEWHERE, ELSEWHERE, None, None),
        (ELSEWHERE, ELSEWHERE, node_process(HERE, TOKEN), None),
        (HERE, HERE, node_process("127.0.0.1:6380", TOKEN), None),
    ],
)
def test_the_token_at_hand_opens_the_cluster_that_this_node_locks_with_it(ray, flag, address, node, mode):
    ray.node = node
    assert mode_at(ray, flag, address) == mode


def test_no_token_is_sent_where_there_is_none_or_it_is_not_wanted(ray, monkeypatch):
    ray.node, ray.token = node_process(HERE, TOKEN), False
    assert mode_at(ray, "auto", HERE) is None
    ray.token = True
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert mode_at(ray, "auto", HERE) == "disabled"
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_ADDRESS", ELSEWHERE)
    assert mode_at(ray, "auto", ELSEWHERE) is None


@pytest.mark.parametrize("gone", ["AuthenticationTokenLoader", "Config"])
def test_a_cluster_of_our_own_is_refused_where_ray_cannot_lock_it(ray, monkeypatch, gone):
    monkeypatch.delattr(raylet, gone)
    connection = RayConnection("auto")
    for start in (
        lambda: connection._start(1),
        lambda: connection.join({"address": HERE, "environment": {"RAY_AUTH_MODE": "token"}}),
    ):
        with pytest.raises(UserError, match=rf"--ray_address auto: .*{gone}.*ray start --head") as error:
            start()
        assert "\n" not in str(error.value)
    assert ray.environment is None and connection.folder is None and not connection.opened
    ray.node = node_process(HERE, TOKEN)
    assert mode_at(ray, HERE, HERE) is None  # a cluster that wants a token refuses us


def test_a_long_name_of_the_temporary_folder_is_none_for_sockets(tmp_path, monkeypatch):
    session = "/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
    assert len(session) == ray_cluster.BYTES_ADDED
    short = tempfile.mkdtemp(dir="/tmp", prefix="short_")
    longest = Path(short, "x" * (107 - len(session) - len(f"{short}//rag_ray_12345678")))
    longer = tmp_path / ("y" * 60)
    for parent, used in ((longest, longest), (longer, Path("/tmp"))):
        parent.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        folder = Path(ray_cluster._new_folder())
        assert folder.parent == used and folder.is_dir() and len(f"{folder}{session}") <= 107
        folder.rmdir()
        parent.rmdir()  # nothing is left in it
    os.rmdir(short)


IN_A_NAMESPACE = """
set -e
ip link set lo up
start() { "$RAY" start --head --port $1 --node-ip-address 127.0.0.1 --num-cpus 1 --include-dashboard false \\
    --disable-usage-stats; }
start 6399
"$PYTHON" -c "$PROGRAM" auto 127.0.0.1:6399
"""
PROGRAM = """
import sys
from rag.distributed.ray_cluster import RayConnection
import ray
class Actor:
    def one(self):
        return 1
for address in sys.argv[1:]:
    connection = RayConnection(address)
    there = connection.open(1)["address"]
    actor = ray.remote(Actor).options(num_cpus=0).remote()
    print("an actor at", there, "says", ray.get(actor.one.remote()), flush=True)
    connection.close()
"""


@pytest.mark.slow
def test_the_token_of_an_earlier_run_opens_what_ray_start_started():
    namespace = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*namespace, "ip", "link"], capture_output=True).returncode:
        pytest.skip("no namespace can be made here")
    home = Path(tempfile.mkdtemp(prefix="rag_"))  # short, as Ray's sockets need it
    try:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        program = {"RAY": str(Path(sys.executable).with_name("ray")), "PYTHON": sys.executable, "PROGRAM": PROGRAM}
        shown = subprocess.run(
            [*namespace, "sh", "-c", IN_A_NAMESPACE], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=inherited | program | {"HOME": str(home), "TMPDIR": str(home)},
        )  # fmt: skip
        assert shown.stdout.count("an actor at 127.0.0.1:6399 says 1") == 2, shown.stdout + shown.stderr
        assert "Token authentication is enabled" in shown.stdout + shown.stderr
    finally:
        shutil.rmtree(home)
