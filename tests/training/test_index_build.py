"""The process that builds an index: its command line, its device and cores."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rag.knowledge.reembedding import NICENESS, parse_args
from rag.training.index_build import COMMAND, OF_A_RANK, BuildOrder, IndexBuild, device_problem


def order_of(device=None, beside=True) -> BuildOrder:
    return BuildOrder("passages", "index.faiss", device, 3, "node:1", beside)


@pytest.mark.parametrize("beside", [True, False])
def test_it_understands_its_command_line(beside):
    words = order_of("cpu", beside).words(Path("an encoder"), Path("out"))
    args = parse_args(words[len(COMMAND) :])
    assert (args.passages_path, args.index_path, args.encoder) == ("passages", "index.faiss", "an encoder")
    assert (args.output_dir, args.processes, args.ray_address) == ("out", 3, None)
    assert (args.parent, args.beside, args.trust_remote_code) == (os.getpid(), beside, False)
    assert parse_args(order_of("ray").words(Path("e"), Path("o"))[len(COMMAND) :]).ray_address == "node:1"


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", "0,1", ""),
        ("ray", None, ""),
        ("cuda", "0,1", "0,1"),
        ("cuda:1", "4,7", "7"),
        ("cuda:1", None, "1"),
        (None, None, None),
    ],
)
def test_it_sees_the_device_that_it_may_use(device, visible, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in OF_A_RANK:
        monkeypatch.setenv(name, "1")
    environment = order_of(device).environment()
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected
    assert environment["OMP_NUM_THREADS"] == "1" and not set(OF_A_RANK) & environment.keys()


def test_a_device_that_there_is_not_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [device_problem(name, "auto") for name in (None, "cpu", "cuda", "cuda:0", "ray")] == [None] * 5
    assert device_problem("cuda:1", "auto") == (
        "--refresh_device cuda:1: this machine has 1 GPU that torch can use; name another, or leave it out"
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "--refresh_device cuda: this machine has no GPU" in device_problem("cuda", "auto")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        assert f"--ray_address {address}: no Ray cluster can be reached there (" in device_problem("ray", address)
    assert "--ray_address nowhere: no Ray cluster" in device_problem("ray", "nowhere")


def test_a_module_of_the_folder_that_the_training_was_started_in_is_none_of_its_own(tmp_path):
    (tmp_path / "dataclasses.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "rag").mkdir()
    (tmp_path / "rag" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    environment = order_of("cpu").environment()
    told = subprocess.run([*COMMAND, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and "--passages_path" in told.stdout


@pytest.mark.parametrize("beside", [True, False])
def test_beside_a_training_it_steps_back(beside, tmp_path):
    """Also where the system shares cores out among sessions, of which it leads one."""
    asked = """if True:
        import contextlib, os, pathlib, sys
        from rag.errors import UserError
        from rag.knowledge.reembedding import main, parse_args
        with contextlib.suppress(UserError):
            main(parse_args(sys.argv[1:]))  # there are no passages
        group = pathlib.Path("/proc/self/autogroup")
        print(os.nice(0), group.read_text() if group.exists() else "")
    """
    order = BuildOrder(str(tmp_path / "none"), str(tmp_path / "none.faiss"), "cpu", 1, "", beside)
    words = order.words(tmp_path / "encoder", tmp_path / "out")[len(COMMAND) :]
    told = subprocess.run([sys.executable, "-c", asked, *words], env=order.environment(), start_new_session=True,
                          capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    added = NICENESS if beside else 0
    assert int(told[0]) == min(os.nice(0) + added, 19)
    enabled = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if enabled.exists() and enabled.read_text().strip() == "1":
        assert told[2:] == ["nice", str(added)]


def test_its_failure_is_told_in_the_flags_of_the_training(monkeypatch, tmp_path):
    said = "x: error: one of 2 processes was killed; give fewer --num_encoding_processes or less --tokens_per_batch: y"
    monkeypatch.setattr(BuildOrder, "words", lambda *_: [sys.executable, "-c", f"raise SystemExit({said!r})"])
    build = IndexBuild(order_of("cpu"), tmp_path / "encoder", tmp_path / "knowledge")
    build.start()
    assert build.is_over(60) and build.failure == "one of 2 processes was killed; give fewer --refresh_processes: y"
