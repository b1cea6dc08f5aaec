"""Runs that are killed, doubled, out of disk or that find damage: the same command goes on to the same result."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.jobs import SCRIPTS, Job, differences, write_longer_data
from tests.faults.makers import Change, apply, cut, flip
from tests.faults.processes import left_behind, tree

MOST_KILLS = 10


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The output of a run of each kind that nothing ended, made when it is asked for."""
    write_longer_data(world.folder)
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def output(kind: str):
        if kind not in made:
            job = Job(world, kind, folder / kind, begin=output("knowledge") if kind == "append" else None)
            seen = job.finish()
            assert seen.status == 0, seen.text[-2000:]
            made[kind] = job.out
        return made[kind]

    return output


def job_of(world, whole, kind, tmp_path, **kwargs) -> Job:
    begin = whole("knowledge") if kind == "append" else None
    return Job(world, kind, tmp_path / "job", **{"begin": begin} | kwargs)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("kind", SCRIPTS)
def test_sigkill_at_any_moment(world, whole, tmp_path, kind, number):
    reference, draw = whole(kind), random.Random(f"{kind} {number}")
    job = job_of(world, whole, kind, tmp_path)
    for _ in range(MOST_KILLS):
        process = job.start()
        if not job.wait_for_progress(process, draw.choice([0.0, draw.uniform(0, 0.1), draw.uniform(0, 1)])):
            break
        process.kill()
    seen = job.finish()
    assert seen.status == 0 and not seen.has_traceback, seen.text[-2000:]
    assert not differences(job.out, reference)


@pytest.mark.faults
def test_sigkill_while_an_index_is_made_anew(world, whole, tmp_path):
    """Beside the training, behind the step that takes it, and at the end."""
    reference, job = whole("refresh"), job_of(world, whole, "refresh", tmp_path)
    for moment in ("refresh/step_5/knowledge", "refresh/step_5/knowledge/.my*", "refresh/step_12", "knowledge/*"):
        process = job.start()
        while not list(job.out.glob(moment)):
            assert process.poll() is None, job.folder
            time.sleep(0.002)
        process.kill()
    seen = job.finish()
    assert seen.status == 0 and not seen.has_traceback, seen.text[-2000:]
    assert not differences(job.out, reference)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["eval", "knowledge", "finetune"])
def test_signals_end_a_run_which_goes_on(world, whole, tmp_path, kind, number):
    job = job_of(world, whole, kind, tmp_path)
    process = job.start()
    assert job.wait_for_progress(process, 0.1)
    os.kill(process.pid, number)
    seen = process.wait(30)
    assert seen.status == 128 + number and not seen.has_traceback, seen.text[-2000:]
    assert job.finish().status == 0
    assert not differences(job.out, whole(kind))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.faults] if kind != "eval" else []) for kind in SCRIPTS]
)
def test_two_at_once(world, whole, tmp_path, kind):
    """The second ends at once, names the first, and disturbs nothing."""
    job = job_of(world, whole, kind, tmp_path)
    first = job.start()
    while not any(lock.read_text() for lock in job.out.rglob("*.lock")):  # it says who holds it
        assert first.poll() is None
    os.kill(first.pid, signal.SIGSTOP)
    second = Job.finish(job)
    os.kill(first.pid, signal.SIGCONT)
    assert second.status == 2 and f"in use by process {first.pid}" in second.text, second.text[-2000:]
    assert first.wait().status == 0
    assert not differences(job.out, whole(kind))


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "kilobytes"), [("eval", 8), ("knowledge", 60), ("append", 40), ("finetune", 300)])
def test_a_full_disk(world, whole, tmp_path, kind, kilobytes):
    """One line; on a larger disk the same command goes on. `kilobytes` are free at the beginning."""
    job = job_of(world, whole, kind, tmp_path, begin=None)
    job.out.mkdir()
    if kind == "append":
        kilobytes += sum(4 * -(-path.stat().st_size // 4096) for path in whole("knowledge").rglob("*")) + 8
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", job.out]).returncode:
        pytest.skip("small disks need root")
    try:
        if kind == "append":
            shutil.copytree(whole("knowledge"), job.out, dirs_exist_ok=True)
        seen = job.finish()
        assert seen.status == 2 and seen.errors and not seen.has_traceback, seen.text[-2000:]
        subprocess.run(["mount", "-o", "remount,size=200m", job.out], check=True)
        seen = job.finish()
        assert seen.status == 0, seen.text[-2000:]
        assert not differences(job.out, whole(kind))
    finally:
        subprocess.run(["umount", "-l", job.out])


def line_out(old: bytes) -> bytes:
    lines = old.splitlines(keepends=True)
    return b"".join(lines[:3] + lines[4:])


BYTES: dict[str, Change] = {
    "cut": cut(0.5),
    "a byte": flip(0.5),
    "a byte at the end": flip(0.99),
    "empty": b"",
    "gone": None,
}
TEXT: dict[str, Change] = {"cut": cut(0.5), "a byte": flip(0.4), "a line out": line_out, "empty": b"", "gone": None}
DAMAGE = {
    ("eval", "half"): {"p.txt": TEXT, "p.txt.jsonl": TEXT, "p.txt.settings.json": BYTES},
    ("eval", "whole"): {"p.txt": TEXT, "p.txt.jsonl": TEXT, "p.txt.settings.json": BYTES, "p.txt.scores.json": BYTES},
    ("knowledge", "half"): {".my*/data*00000*.arrow": BYTES, ".my*/data*00001*.arrow": BYTES},
    ("knowledge", "whole"): {
        "*.faiss": BYTES, "my_knowledge_dataset/data*00000*.arrow": BYTES, "my_knowledge_dataset/state.json": BYTES,
        "my_knowledge_dataset/dataset_info.json": BYTES, "index.json": BYTES,
    },
    ("finetune", "half"): {
        "last.ckpt": BYTES, "checkpoint1.ckpt": BYTES, "checkpoint1/model.safetensors": BYTES, "hparams.json": BYTES,
        "metrics.json": BYTES, "training_log.jsonl": TEXT,
    },
    ("lora", "half"): {
        "last.ckpt": BYTES, "checkpoint1.ckpt": BYTES, "checkpoint1/*/adapter_model.safetensors": BYTES,
        "checkpoint1/*/adapter_config.json": BYTES, "checkpoint1/base.json": BYTES,
    },
    ("finetune", "whole"): {"last.ckpt": BYTES, "checkpoint?.ckpt": BYTES, "metrics.json": BYTES},
}  # fmt: skip
SHORT = {("eval", "whole", "p.txt", "a line out"), ("knowledge", "whole", "*.faiss", "a byte")}
ROWS = [
    pytest.param(
        kind, state, name, change, id=f"{kind}, {state}: {name} {way}",
        marks=[] if (kind, state, name, way) in SHORT else [pytest.mark.faults],
    )
    for (kind, state), files in DAMAGE.items() for name, ways in files.items() for way, change in ways.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def half(world, whole, tmp_path_factory):
    """What a run of each kind has written when it is killed in its middle."""
    folder, made = tmp_path_factory.mktemp("half"), {}

    def output(kind: str):
        if kind not in made:
            whole(kind)
            job = Job(world, kind, folder / kind)
            process = job.start()
            done = {"eval": lambda: _lines(job.out / "p.txt") >= 20, "finetune": lambda: _has(job.out, "checkpoint1"),
                    "lora": lambda: _has(job.out, "checkpoint1"),
                    "knowledge": lambda: len(list(job.out.glob(".my*/data*.arrow"))) >= 8}[kind]  # fmt: skip
            while not done():
                assert process.poll() is None, job.folder
            process.kill()
            made[kind] = job.out
        return made[kind]

    return output


def _lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _has(out, name) -> bool:
    return (out / f"{name}.ckpt").exists() and (out / "last.ckpt").exists()


@pytest.mark.parametrize(("kind", "state", "name", "change"), ROWS)
def test_damage_is_told_or_mended(world, whole, half, tmp_path, kind, state, name, change):
    job = Job(world, kind, tmp_path / "job", begin={"whole": whole, "half": half}[state](kind))
    found = sorted(job.out.glob(name))
    assert found
    apply(change, found[0], found[0])
    before = tree(job.out)
    seen = job.finish()
    assert not seen.has_traceback, seen.text[-2000:]
    if seen.status == 2:
        assert len(seen.errors) == 1
        assert not left_behind(before, tree(job.out))
    else:
        assert seen.status == 0, seen.text[-2000:]
        assert not differences(job.out, whole(kind))
