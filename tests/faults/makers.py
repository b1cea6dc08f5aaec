"""Faulty files and folders, made when a case begins: each maker is called with the world and the case's folder.

{"--gold_data_path": File(b"q\\t[]\\n")}          # a file with this content
{"--model_name_or_path": Copy("rag", {"config.json": cut(0.5)})}
"""

import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = bytes | Callable[[bytes], bytes] | None  # a file's new content, a change of the old one, or that it is gone


class Maker:
    """Makes something in a case's folder; the flag's value is what `make` returns."""

    def make(self, world: Path, folder: Path) -> Any:
        raise NotImplementedError


@dataclass
class File(Maker):
    """A file of this content."""

    content: bytes
    name: str = "in.txt"

    def make(self, world, folder):
        (folder / self.name).write_bytes(self.content)
        return folder / self.name


@dataclass
class Changed(Maker):
    """A copy of one of the world's files, changed."""

    source: str
    change: Change

    def make(self, world, folder):
        path = folder / Path(self.source).name
        apply(self.change, world / self.source, path)
        return path


@dataclass
class Copy(Maker):
    """A copy of one of the world's folders, in which some files are changed."""

    source: str
    changes: dict[str, Change] = field(default_factory=dict)

    def make(self, world, folder):
        path = folder / self.source
        shutil.copytree(world / self.source, path)
        for name, change in self.changes.items():
            for file in path.glob(name):
                apply(change, file, file)
        return path


@dataclass
class Special(Maker):
    """What is no file: "folder", "fifo", "device", "link" (to nothing), "loop" (a link to itself), "below" a file."""

    kind: str

    def make(self, world, folder):
        path = folder / self.kind
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "fifo":
            os.mkfifo(path)
        elif self.kind == "device":
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 7))  # a /dev/full of its own
        elif self.kind == "link":
            path.symlink_to(folder / "nowhere")
        elif self.kind == "loop":
            path.symlink_to(path)
        else:
            path.touch()
            path = path / "x"
        return path


@dataclass
class Passages(Maker):
    """The world's passages with changed columns, saved anew."""

    change: Callable[[dict], dict]

    def make(self, world, folder):
        from datasets import Dataset, load_from_disk

        columns = {name: list(column) for name, column in load_from_disk(str(world / "passages")).to_dict().items()}
        Dataset.from_dict(self.change(columns)).save_to_disk(folder / "passages")
        return folder / "passages"


@dataclass
class Index(Maker):
    """What `build(faiss, vectors)` makes of the world's vectors (8, 16): an index, or bytes."""

    build: Callable

    def make(self, world, folder):
        import faiss

        index = faiss.read_index(str(world / "index.faiss"))
        made = self.build(faiss, index.reconstruct_n(0, index.ntotal))
        path = folder / "index.faiss"
        path.write_bytes(made if isinstance(made, bytes) else faiss.serialize_index(made).tobytes())
        return path


@dataclass
class Of(Maker):
    """What a function of the world and the case's folder makes."""

    function: Callable[[Path, Path], Any]

    def make(self, world, folder):
        return self.function(world, folder)


def apply(change: Change, source: Path, target: Path) -> None:
    if change is None:
        target.unlink(missing_ok=True)
    else:
        target.write_bytes(change(source.read_bytes()) if callable(change) else change)


def cut(share: float) -> Change:
    return lambda old: old[: int(len(old) * share)]


def flip(share: float) -> Change:
    """One byte changed."""

    def change(old: bytes) -> bytes:
        at = min(int(len(old) * share), len(old) - 1)
        return old[:at] + bytes([old[at] ^ 0x55]) + old[at + 1 :]

    return change


def utf16(old: bytes) -> bytes:
    return old.decode().encode("utf-16")


def first_line(line: bytes) -> Change:
    """Another first line."""
    return lambda old: line + old[old.index(b"\n") :]


def settings(**values) -> Change:
    """A JSON object with other values."""
    return lambda old: json.dumps(json.loads(old) | values).encode()


def inside(part: str, **values) -> Change:
    """A JSON object with other values in one of the objects in it."""
    return lambda old: settings(**{part: json.loads(old)[part] | values})(old)


def huge_header(old: bytes) -> bytes:
    """A safetensors file whose header would take 10^18 bytes."""
    return struct.pack("<Q", 10**18) + old[8:]


# No JSON, or JSON of another shape: what a state file may have become.
NOT_JSON: dict[str, bytes] = {
    "empty": b"", "cut": b'{"a": ', "a list": b"[1]", "a number": b"7", "null": b"null", "nested": b"[" * 100_000,
    "binary": bytes(range(256)), "UTF-16": '{"a": 1}'.encode("utf-16"), "an empty object": b"{}",
}  # fmt: skip
