"""Training on several ranks: the numbers of one process, files by rank 0 alone, an end that leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

import callbacks_rag
import finetune_rag
from rag.errors import UserError
from rag.files import load_json, write_lines
from rag.models.checkpoints import load_model
from tests.conftest import PASSAGES, QUESTIONS, ROOT
from tests.distributed.many_ranks import run_ranks
from tests.distributed.two_nodes import CANNOT
from tests.training.rank_runs import (
    LEFT_BY_A_RUN,
    LEFT_BY_A_TEST,
    TOLERANCE,
    assert_same,
    frozen_of,
    outcome,
    train,
    two_ranks,
)

# --- Forked ranks, with the environment that torchrun gives them ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("retriever", "accumulate"), [("pytorch", 1), ("local", 2), ("ray", 1)])
def test_two_ranks_of_half_the_batch_are_one_process(retriever, accumulate, words, alone, checkpoint, tmp_path):
    """Losses, schedule, gradients, metrics, answers and weights; question encoder and generator learn together."""
    flags = ["--do_train", "--do_predict", "--distributed_retriever", retriever]
    argv = two_ranks(words, tmp_path / "out", *flags, "--gradient_accumulation_steps", accumulate)
    ends = run_ranks(train, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    (metrics, written), (other_metrics, written_by_other) = ends
    expected = alone(accumulate)
    assert expected["files"] == LEFT_BY_A_RUN | LEFT_BY_A_TEST
    assert len(expected["answers"]) == 5
    assert len(expected["log"]["lr"]) == 6 // accumulate
    assert_same(outcome(tmp_path / "out"), expected, **TOLERANCE)
    assert written and not written_by_other
    assert {name: metrics[name] for name in other_metrics if name.startswith("test")} == {
        name: value for name, value in other_metrics.items() if name.startswith("test")
    }
    before = load_model(words[1]).state_dict()
    moved = [name for name, weight in before.items() if not torch.equal(weight, expected["weights"][f"model.{name}"])]
    assert any("question_encoder" in name for name in moved) and any("generator" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["pytorch", "ray"])
def test_two_ranks_that_retrieve_ahead_are_one_process(retriever, words, alone, ahead, monkeypatch, tmp_path):
    """A validation after every batch, when the passages of the next one are there already."""
    further = ["--freeze_question_encoder", "--val_check_interval", "1"]
    flags = ["--do_train", "--do_predict", "--distributed_retriever", retriever, *further]
    run_ranks(train, 2, tmp_path, two_ranks(words, tmp_path / "out", *flags), tmp_path / "out", seconds=120)
    monkeypatch.undo()
    expected = alone(1, *further)
    assert len(expected["metrics"]["val"]) == 6
    assert_same(outcome(tmp_path / "out"), frozen_of(expected), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["pytorch", "ray"])
def test_two_ranks_that_are_given_passages_are_one_process(retriever, words, alone, tmp_path):
    texts = dict(PASSAGES)
    records = [
        {"question": question, "titles": ["oslo", answer], "texts": [texts["oslo"], texts[answer]], "scores": [1, 3]}
        for question, answer in QUESTIONS[:7]
    ]
    write_lines(map(json.dumps, records), tmp_path / "found.jsonl")
    given = ["--passages_file", str(tmp_path / "found.jsonl")]
    flags = ["--do_train", "--do_predict", "--distributed_retriever", retriever, *given]
    run_ranks(train, 2, tmp_path, two_ranks(words, tmp_path / "out", *flags), tmp_path / "out", seconds=120)
    assert_same(outcome(tmp_path / "out"), frozen_of(alone(1, *given)), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [[], ["--freeze_question_encoder"]])
def test_ranks_asked_to_end_stop_together_and_go_on_later(frozen, words, ahead, monkeypatch, tmp_path):
    """SIGTERM reaches one of two ranks: both leave with status 143; resumed, they end with the same weights.

    One process goes on as well, with the examples of the epoch that the two have not had.
    """
    words = [*words, *frozen]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_ranks(train, 2, tmp_path, two_ranks(words, whole), whole)
    argv = two_ranks(words, stopped)
    ends = run_ranks(train, 2, tmp_path, argv, stopped, 2)
    assert [status for status, _ in ends] == [143, 143]
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 3
    shutil.copytree(stopped, tmp_path / "one")
    run_ranks(train, 2, tmp_path, argv, stopped)
    expected = outcome(whole)
    assert_same(outcome(stopped), frozen_of(expected) if frozen else expected, rtol=0, atol=0)

    all_of_it, rest = (examples_of(two_ranks(words, tmp_path / name), monkeypatch) for name in ("none_before", "one"))
    assert [sorted(epoch) for epoch in (all_of_it[:7], all_of_it[7:14], all_of_it[14:])] == [[*range(7)]] * 3
    assert rest == all_of_it[7 + 4 :]


def examples_of(words: list[str], monkeypatch) -> list[int]:
    """Those that one process trains on, in order."""
    from rag.training.qa_module import GenerativeQAModule

    examples, step = [], GenerativeQAModule.training_step

    def training_step(module, batch, batch_idx):
        examples.extend(batch["index"])
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(GenerativeQAModule, "training_step", training_step)
        finetune_rag.main(finetune_rag.parse_args(words))
    return examples


def train_apart(rank: int, words: list[str], folder: Path) -> None:
    """A rank of a job on two nodes, each with a disk of its own."""
    callbacks_rag.SECONDS_TO_APPEAR = 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    finetune_rag.main(finetune_rag.parse_args(two_ranks(words, folder / f"node{rank}")))


def test_nodes_without_a_common_folder_are_told(words, tmp_path):
    for error in run_ranks(train_apart, 2, tmp_path, words, tmp_path):
        assert isinstance(error, UserError) and "is not the same folder on every node" in str(error)


# --- Real command lines -----------------------------------------------------------------------------------------------

SCRIPT = str(ROOT / "finetune_rag.py")
LAUNCHERS = {
    "lightning": ([sys.executable, SCRIPT], ["--devices", "2"]),
    "torchrun": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT],
        [],  # it has said how many
    ),
    "finetune_rag_ray.sh": ([str(ROOT / "finetune_rag_ray.sh")], ["--devices", "2"]),
}
# What undoes the settings of finetune_rag.sh.
PLAIN = """--lr_scheduler linear --early_stopping_patience -1 --weight_decay 0 --max_grad_norm 1 --label_smoothing 0
--num_retrieval_workers 1""".split()  # noqa: SIM905


class Job:
    """`finetune_rag.py` on two ranks, in a session of its own, with a folder of its own for temporary files."""

    def __init__(self, launcher: str, words: list[str], out: Path, *flags, **environment: str):
        start, devices = LAUNCHERS[launcher]
        self.out, self.temporary = out, Path(tempfile.mkdtemp())  # short, as Ray's sockets need it
        self.log = open(out.with_suffix(".log"), "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*start, *two_ranks(words, out, *devices, *flags)],
            env=os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"} | environment,
            stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip
        self.family: list[psutil.Process] = []

    def wait_for_training(self) -> None:
        deadline = time.monotonic() + 120
        while not (self.out / "metrics.json").exists() or not load_json(self.out / "metrics.json")["val"]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill_rank_one(self) -> None:
        ranks = [one for one in self.family if "finetune_rag.py" in " ".join(one.cmdline())]
        next(rank for rank in ranks if rank.environ().get("LOCAL_RANK") == "1").kill()

    def end(self) -> int:
        """The exit status; nothing of the job is left."""
        status = self.process.wait(120)
        assert not psutil.wait_procs(self.family, timeout=20)[1], self.output()
        deadline = time.monotonic() + 10
        while (
            left := [*self.temporary.glob("rag_ray_*"), *self.temporary.glob("tmp*")]
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
        return status

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def remove(self) -> None:
        for process in [*self.family, self.process]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def job(words, tmp_path):
    """A function that starts a job; what is left of it when the test ends is removed."""
    jobs = []

    def start(launcher: str, name: str, *flags, **environment) -> Job:
        jobs.append(Job(launcher, words, tmp_path / name, *flags, **environment))
        return jobs[-1]

    yield start
    for one in jobs:
        one.remove()


@pytest.mark.slow
def test_both_launchers_make_the_ranks_of_one_job(job, alone):
    shell = {"LAUNCH": sys.executable, "MODEL_NAME_OR_PATH": "given", "DATA_DIR": "behind", "OUTPUT_DIR": "the name"}
    jobs = [
        job("torchrun", "torchrun", "--do_train", "--do_predict"),
        job("finetune_rag_ray.sh", "lightning", *PLAIN, **shell),
    ]
    for one in jobs:
        assert one.end() == 0, one.output()
        assert "Traceback" not in one.output() and "arning" not in one.output()
        assert_same(outcome(one.out), alone(1), **TOLERANCE)


@pytest.mark.slow
def test_a_lost_rank_or_ctrl_c_ends_all_and_leaves_nothing(job):
    def begun(launcher: str, name: str, retriever: str) -> Job:
        one = job(launcher, name, "--num_train_epochs", 10**6, "--distributed_retriever", retriever)
        one.wait_for_training()
        return one

    for launcher, retriever in (("lightning", "ray"), ("torchrun", "pytorch")):
        killed = begun(launcher, f"killed_{launcher}", retriever)
        killed.kill_rank_one()
        assert killed.end() == 1
    interrupted = begun("lightning", "interrupted", "pytorch")
    os.killpg(interrupted.process.pid, signal.SIGINT)  # as a terminal does
    assert interrupted.end() == 130
    message = "finetune_rag.py: interrupted; run the same command again to resume"
    assert interrupted.output().splitlines()[-1] == message and "Traceback" not in interrupted.output()


@pytest.mark.slow
def test_a_port_in_use_is_named_and_ranks_that_were_not_started_are_not_expected(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        busy = job("lightning", "busy", MASTER_PORT=port)
        wrong = job("torchrun", "wrong", "--devices", "3")
        assert busy.end() == 2
        errors = [line for line in busy.output().splitlines() if "error" in line]
        assert errors == [
            f"finetune_rag.py: error: MASTER_PORT {port} is used by another process of this machine; set it to a free "
            "port, the same for every rank, or unset it where all ranks run on this machine"
        ]
    assert wrong.end() == 1  # torchrun's own, of a rank that ended with 2
    assert "--devices 3 on --num_nodes 1 makes 3 ranks, torchrun has started 2" in wrong.output()
    assert "Traceback" not in busy.output()
    assert not wrong.out.exists()


@pytest.mark.slow
def test_two_nodes_are_one_process(words, alone, tmp_path):
    """The ranks of two network namespaces, which meet without a variable that names their interface."""
    flags = ["--retriever", "pytorch", "--one_process", alone(1)["folder"]]
    command = [sys.executable, "-m", "tests.distributed.two_nodes", *flags, "--", *words]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert "6 losses equal" in done.stdout
    assert not list(tmp_path.iterdir())
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not re.search(r"\brag\d+[ab]\b", namespaces)
