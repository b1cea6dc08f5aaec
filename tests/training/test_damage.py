"""Files of a run that were damaged since: found when it goes on, made again where they can be, else told in a line."""

import json
import os
import shutil

import pytest
import torch

from lightning_base import AtomicCheckpointIO
from rag.errors import UserError
from rag.training.loading import read_checkpoint
from rag.training.run_folder import checkpoint_to_resume, continuation_problems
from rag.training.seals import SealedFile, is_as_recorded, is_whole, records_of
from tests.training.lightning_toy import At, Killed, fit, toy_args

SCORES = [0.1, 0.2, 0.3, 0.4]
FLAGS = ["--num_train_epochs", "4", "--save_interval", "1e-9", "--log_every_n_steps", "5"]


def cut(share):
    return lambda data: data[: int(len(data) * share)]


def flip(share):
    def change(data):
        at = int(len(data) * share)
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]

    return change


def write(path, content: bytes):
    """The other names of a file, which are hard links, stay as they are."""
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run, and one that was killed in its third epoch."""
    folder = tmp_path_factory.mktemp("runs")
    fit(toy_args(folder / "whole", *FLAGS), SCORES)
    with pytest.raises(Killed):
        fit(toy_args(folder / "killed", *FLAGS), SCORES, [At("on_train_batch_start", 18)])
    return folder


@pytest.fixture
def killed(runs, tmp_path):
    """A copy of the killed run."""
    shutil.copytree(runs / "killed", tmp_path / "run")
    return tmp_path / "run"


def go_on(folder, *flags):
    args = toy_args(folder, *FLAGS, *flags)
    args.run.resume_from_checkpoint = checkpoint_to_resume(args)
    return fit(args, SCORES)


def contents(folder):
    """All that a run leaves, without times: metrics, the log, weights."""
    out = folder / "out"
    log = {
        (row["step"], name): value
        for line in (out / "training_log.jsonl").read_text().splitlines()
        for row in [json.loads(line)]
        for name, value in row.items()
    }
    weights = {
        path.name: torch.load(path, weights_only=True)["state_dict"]["linear.weight"].tolist()
        for path in out.glob("*.ckpt")
    }
    exported = {path.parent.name: path.read_text() for path in out.glob("*/weights.json")}
    return json.loads((out / "metrics.json").read_text()), log, weights, exported


def test_a_killed_run_goes_on_to_the_same_files(runs, killed):
    """Also to what was logged before the kill and is not logged again: learning rate and norm of step 15."""
    go_on(killed)
    assert contents(killed) == contents(runs / "whole")
    assert contents(killed)[0]["train"][2].keys() >= {"lr", "grad_norm", "loss"}


DAMAGE = {
    "cut": cut(0.5),
    "a byte of a weight": flip(0.5),
    "a byte at the end": flip(0.99),
    "empty": cut(0),
    "garbage": lambda data: b"\xff" * len(data),
    "gone": None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_last(name, runs, killed, capsys):
    last = killed / "out" / "last.ckpt"
    if DAMAGE[name] is None:
        last.unlink()
    else:
        write(last, DAMAGE[name](last.read_bytes()))
    go_on(killed)
    assert f"going on from {killed / 'out' / 'checkpoint2.ckpt'}" in capsys.readouterr().out
    assert contents(killed) == contents(runs / "whole")


def test_where_no_checkpoint_is_whole_that_is_told(killed):
    for path in (killed / "out").glob("*.ckpt"):
        write(path, path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"^--output_dir .*last\.ckpt and checkpoint2\.ckpt and checkpoint1\.ckpt are"):
        checkpoint_to_resume(toy_args(killed, *FLAGS))
    assert checkpoint_to_resume(toy_args(killed, *FLAGS, "--overwrite_output_dir")) is None


@pytest.mark.parametrize("change", [cut(0.5), flip(0.5), None])
def test_one_of_the_best_that_is_damaged_is_told(change, killed):
    path = killed / "out" / "checkpoint1.ckpt"
    if change is None:
        path.unlink()
    else:
        write(path, change(path.read_bytes()))
    with pytest.raises(UserError, match=r"^--output_dir .*: checkpoint1\.ckpt, one of the best, is damaged or missing"):
        go_on(killed)
    second = str(killed / "out" / "checkpoint2.ckpt")
    trainer, _ = go_on(killed, "--resume_from_checkpoint", second)  # as the line says
    assert [kept["number"] for kept in trainer.checkpoint_callback.kept] == [4, 3, 2]


@pytest.mark.parametrize("change", [cut(0.5), flip(0.5), None])
def test_an_export_that_is_damaged_is_made_again(change, runs, killed):
    path = killed / "out" / "checkpoint2" / "weights.json"
    if change is None:
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(change(path.read_bytes()))
    go_on(killed)
    assert contents(killed) == contents(runs / "whole")


@pytest.mark.parametrize("name", ["metrics.json", "training_log.jsonl"])
@pytest.mark.parametrize("change", [cut(0.7), cut(0), lambda _: b"[1, 2]\n", lambda _: b"\xff\xfe\x00", None])
def test_metrics_and_log_come_back_from_the_checkpoint(name, change, runs, killed):
    path = killed / "out" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    go_on(killed)
    assert contents(killed) == contents(runs / "whole")


def test_half_a_line_is_not_glued_to_the_next(runs, killed):
    with open(killed / "out" / "training_log.jsonl", "a") as file:
        file.write('{"step": 14, "lo')
    go_on(killed)
    assert contents(killed) == contents(runs / "whole")


# --- Before anything is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model": {}}', '{"model": 1, "training": 2}', "\xff"])
def test_settings_that_cannot_be_read_are_told_with_a_way_on(content, tmp_path):
    args = toy_args(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hparams.json").write_text(content, encoding="latin-1")
    (problem,) = continuation_problems(args)
    assert "hparams.json is damaged" in problem and "--resume_from_checkpoint" in problem and "\n" not in problem


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"train": [], "val": [], "test": [3]}'])
def test_a_test_is_told_of_metrics_that_cannot_be_read(content, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text(content)
    (problem,) = continuation_problems(toy_args(tmp_path, "--do_predict"))
    assert problem.startswith("--output_dir") and "metrics.json is damaged" in problem


def test_checkpoints_without_settings_are_strays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.ckpt").touch()
    (problem,) = continuation_problems(toy_args(tmp_path))
    assert "holds last.ckpt" in problem and "--overwrite_output_dir" in problem


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04N.", b"PK\x03\x04" + b"\0" * 100])
def test_what_is_no_checkpoint_is_refused_before_anything_is_loaded(content, tmp_path):
    (tmp_path / "other.ckpt").write_bytes(content)
    args = toy_args(tmp_path, "--resume_from_checkpoint", str(tmp_path / "other.ckpt"))
    with pytest.raises(UserError, match=r"^--resume_from_checkpoint .* is damaged, or no Lightning checkpoint"):
        checkpoint_to_resume(args)


# --- Seals ------------------------------------------------------------------------------------------------------------


def test_any_byte_that_changes_breaks_the_seal(tmp_path):
    path = tmp_path / "x.ckpt"
    content = {"hyper_parameters": {}, "state_dict": {"w": torch.arange(3.0)}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    good = path.read_bytes()
    assert is_whole(path) and torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.arange(3.0))
    comment = good.rindex(b"xxh3:")
    for at in [
        *range(0, comment - 2, 7),
        comment + 5,
        len(good) - 1,
    ]:  # between the two stands the length of the comment
        write(path, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert not is_whole(path), at
    for end in (0, 10, comment - 5):
        write(path, good[:end])
        assert not is_whole(path), end
    write(path, good)
    os.link(path, tmp_path / "twin.ckpt")
    assert is_whole(tmp_path / "twin.ckpt") and not is_whole(tmp_path / "none.ckpt")
    torch.save(content, tmp_path / "unsealed.ckpt")
    assert is_whole(tmp_path / "unsealed.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of"):
        torch.save([1], tmp_path / "list.ckpt")
        read_checkpoint(tmp_path / "list.ckpt")


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_what_ends_the_writing_of_a_checkpoint_stays_what_it_is(ending, at, tmp_path, monkeypatch):
    written, plain = [], SealedFile.write

    def end(self, data):
        written.append(len(data))
        if len(written) == at:
            raise ending
        return plain(self, data)

    monkeypatch.setattr(SealedFile, "write", end)
    with pytest.raises(type(ending)) as error:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "x.ckpt")
    assert error.value is ending and not list(tmp_path.iterdir())


def test_a_folder_is_as_it_was_recorded_or_not(tmp_path):
    folder = tmp_path / "x"
    (folder / "deep").mkdir(parents=True)
    file = folder / "deep" / "weights.json"
    file.write_text("12345")
    records = records_of(folder)
    assert is_as_recorded(folder, records) and is_as_recorded(folder, {})
    os.utime(file, ns=(1, 1))
    assert is_as_recorded(folder, records)  # another time, the same bytes
    file.write_text("12346")
    assert not is_as_recorded(folder, records)
    file.unlink()
    assert not is_as_recorded(folder, records) and not is_as_recorded(tmp_path / "none", {})
