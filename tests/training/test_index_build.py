"""The process that builds an index: its command line, its device and cores."""

import os
from pathlib import Path

import pytest

from rag.knowledge.reembedding import parse_args
from rag.training.index_build import COMMAND, OF_A_RANK, BuildOrder


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
