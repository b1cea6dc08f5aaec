"""`eval_rag.py` on several ranks: the files of one process, whoever answers, dies or is asked in vain."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import eval_rag
from rag.distributed.ranks import RankError
from rag.errors import ReportedError, UserError
from rag.evaluation import predictors
from rag.files import read_lines, write_lines
from tests.conftest import QUESTIONS, ROOT
from tests.distributed.many_ranks import run_ranks

ASKED, ANSWERS = zip(*QUESTIONS, strict=True)
ENDS = ("", ".jsonl", ".settings.json", ".scores.json")
BATCH = 3  # so that eight questions make two rounds of two ranks, the second with one batch, of two questions
FLAGS = {
    "e2e": ["--gold_data_mode", "ans", "--num_beams", "2", "--max_length", "8", "--n_docs", "3"],
    "retrieval": ["--eval_mode", "retrieval", "--k", "1", "5"],
}


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of questions and gold, whose paths stand in the files that are compared."""
    folder = tmp_path_factory.mktemp("questions")
    write_lines(ASKED, folder / "q")
    write_lines(ANSWERS, folder / "e2e")
    write_lines(ANSWERS, folder / "retrieval")
    write_lines([f"{question}\t{[answer]}" for question, answer in QUESTIONS], folder / "qa")
    return folder


def flags(model, data, predictions, kind="e2e", *more) -> list[str]:
    words = ["--model_name_or_path", model, "--predictions_path", predictions, "--eval_batch_size", BATCH]
    words += ["--evaluation_set", data / "q", "--gold_data_path", data / kind, *FLAGS[kind], *more]
    if kind == "retrieval":
        words += ["--answers_path", data / "qa"]
    return [str(word) for word in words]


def alone(argv):
    return eval_rag.main(eval_rag.parse_args(argv))


def one_of_many(rank: int, size: int, argv: list[str], spoil):
    """`main` as torchrun starts it, after something was done to this rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if spoil is not None:
        spoil(rank)
    return alone(argv)


def run(size: int, tmp_path, argv, spoil=None) -> list:
    return run_ranks(one_of_many, size, tmp_path, size, argv, spoil)


def assert_same_files(path: Path, expected: Path) -> None:
    for end in ENDS:
        assert Path(f"{path}{end}").read_bytes() == Path(f"{expected}{end}").read_bytes(), end


def in_a_batch_of_rank_one(act, number: int, rank: int) -> None:
    """Have rank 1 do something before its batch of that number, from 1."""
    answer = predictors.answer_from_passages
    batches = []

    def spoilt(*args, **rest):
        batches.append(args)
        if rank == 1 and len(batches) == number:
            act()
        return answer(*args, **rest)

    predictors.answer_from_passages = spoilt


# --- The files of one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("e2e", 2), ("retrieval", 2), ("e2e", 4)])
def test_the_files_are_those_of_one_process(rag_folder, data, tmp_path, kind, size):
    expected = alone(flags(rag_folder, data, tmp_path / "one", kind))
    argv = flags(rag_folder, data, tmp_path / "many", kind)
    assert run(size, tmp_path, argv) == [expected] * size
    assert_same_files(tmp_path / "many", tmp_path / "one")
    if size == 4:  # complete: scored again without a model; then made anew
        written = (tmp_path / "many").stat().st_mtime_ns
        assert run(2, tmp_path, argv, no_model) == [expected] * 2
        assert (tmp_path / "many").stat().st_mtime_ns == written
        assert run(2, tmp_path, [*argv, "--recalculate"]) == [expected] * 2
        assert (tmp_path / "many").stat().st_mtime_ns > written
        assert_same_files(tmp_path / "many", tmp_path / "one")


def no_model(rank: int) -> None:
    predictors.load_predictor = None


@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_closed_book_answers_are_those_of_one_process(request, data, tmp_path, generator):
    folder = request.getfixturevalue(f"{generator}_folder")
    expected = alone(flags(folder, data, tmp_path / "one"))
    assert run(2, tmp_path, flags(folder, data, tmp_path / "many")) == [expected] * 2
    assert_same_files(tmp_path / "many", tmp_path / "one")


def test_all_checkpoints_are_measured_by_all_ranks(rag_folder, bart_folder, data, tmp_path):
    for name, source in (("checkpoint1", rag_folder), ("checkpoint2", bart_folder)):
        shutil.copytree(source, tmp_path / "out" / name)
    expected = alone(flags(tmp_path / "out", data, tmp_path / "one.txt", "e2e", "--eval_all_checkpoints"))
    argv = flags(tmp_path / "out", data, tmp_path / "many.txt", "e2e", "--eval_all_checkpoints")
    assert run(2, tmp_path, argv) == [expected] * 2
    for name in ("checkpoint1", "checkpoint2"):
        assert_same_files(tmp_path / f"many.{name}.txt", tmp_path / f"one.{name}.txt")


@pytest.mark.parametrize("lines", [3, 5])
def test_any_number_of_ranks_continues_a_killed_run(rag_folder, data, tmp_path, lines):
    alone(flags(rag_folder, data, tmp_path / "one"))
    for end in ENDS[:3]:
        shutil.copy(f"{tmp_path / 'one'}{end}", f"{tmp_path / 'many'}{end}")
    write_lines(read_lines(tmp_path / "one")[:lines], tmp_path / "many")
    with open(tmp_path / "many", "a") as file:
        file.write("half a li")
    run(2, tmp_path, flags(rag_folder, data, tmp_path / "many"))
    assert_same_files(tmp_path / "many", tmp_path / "one")


# --- What goes wrong on one rank --------------------------------------------------------------------------------------


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_loss_of_a_rank_ends_the_others_and_leaves_what_one_process_continues(rag_folder, data, tmp_path):
    argv = flags(rag_folder, data, tmp_path / "many", "e2e", "--eval_batch_size", "1")
    first, lost, third = run(3, tmp_path, argv, partial(in_a_batch_of_rank_one, kill_itself, 3))
    assert lost is None and isinstance(first, RankError) and isinstance(third, RankError)
    # What it had sent of round 2 may be lost with it.
    assert re.search(r"^answering, round [23]: rank 1 has failed", str(first)) and "rank 1 has failed" in str(third)
    alone(flags(rag_folder, data, tmp_path / "one", "e2e", "--eval_batch_size", "1"))
    lines = read_lines(tmp_path / "many")
    assert len(lines) in (3, 6) and lines == read_lines(tmp_path / "one")[: len(lines)]
    alone(argv)
    assert_same_files(tmp_path / "many", tmp_path / "one")


def test_an_error_on_one_rank_is_told_by_all(rag_folder, data, tmp_path):
    argv = flags(rag_folder, data, tmp_path / "many", "e2e", "--eval_batch_size", "1")
    first, second = run(2, tmp_path, argv, partial(in_a_batch_of_rank_one, partial(divmod, 1, 0), 2))
    assert "answering, round 2: rank 1 failed: ZeroDivisionError" in str(first)
    assert isinstance(second, RankError) and "rank 1 failed: ZeroDivisionError" in str(second)
    assert len(read_lines(tmp_path / "many")) == 2


def test_a_mistake_of_the_users_is_told_by_rank_zero(rag_folder, data, tmp_path):
    argv = flags(rag_folder, data, tmp_path / "many", "e2e", "--gold_data_path", "nowhere")
    first, second = run(2, tmp_path, argv)
    assert type(first) is UserError and isinstance(second, ReportedError)
    assert str(first) == str(second) and str(first).startswith("--gold_data_path nowhere does not exist")


def test_ranks_that_see_other_files_are_refused(rag_folder, request, tmp_path, data):
    """As on two nodes that have different checkpoints under one path."""
    for rank, source in enumerate((rag_folder, request.getfixturevalue("checkpoint")("rag_token", "bart"))):
        shutil.copytree(source, tmp_path / str(rank) / "model")
    errors = run(2, tmp_path, flags("model", data, tmp_path / "many"), partial(in_own_folder, tmp_path))
    assert [type(error) for error in errors] == [UserError, ReportedError]
    assert "rank 1 on " in str(errors[0]) and "model_name_or_path model (its content has changed)" in str(errors[0])
    assert not (tmp_path / "many").exists()


def in_own_folder(folder: Path, rank: int) -> None:
    os.chdir(folder / str(rank))


def test_ranks_without_a_launcher_are_named(rag_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT not set: start the ranks"):
        alone(flags(rag_folder, data, tmp_path / "many"))


# --- The command line -------------------------------------------------------------------------------------------------


def torchrun(argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, str(ROOT / "eval_rag.py"), *argv],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_torchrun_writes_the_files_of_one_process(rag_folder, data, tmp_path, capsys):
    alone(flags(rag_folder, data, tmp_path / "one", "e2e"))
    printed = capsys.readouterr()
    out, err = torchrun(flags(rag_folder, data, tmp_path / "many", "e2e")).communicate(timeout=120)
    assert out == printed.out.replace(f"{tmp_path}/one", f"{tmp_path}/many"), err
    assert [line.split(" in ")[0].split()[1:] for line in err.splitlines()] == [["8", "questions"]]  # the job's, once
    assert_same_files(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("mistake", [["--n_docs", "0"], ["--gold_data_path", "nowhere"]])
def test_torchrun_ends_with_one_message_and_status_2(rag_folder, data, tmp_path, mistake):
    job = torchrun(flags(rag_folder, data, tmp_path / "many", "e2e", *mistake))
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0 and err.count(f"eval_rag.py: error: {' '.join(mistake)} ") == 1
    own_words = err.split("torch/distributed/elastic")[0]  # torchrun's own come after
    assert "Traceback" not in own_words
    # The first rank that ends is named with its status; the other one may be ended by torchrun before it has its own.
    statuses = re.findall(r"exitcode  : (-?\d+) ", err)
    assert "2" in statuses and {*statuses} <= {"2", "-15", str(128 + signal.SIGTERM)}


def test_an_interrupted_job_leaves_no_process_and_is_continued(rag_folder, data, tmp_path):
    times = 400
    for name in ("q", "e2e"):
        write_lines(read_lines(data / name) * times, tmp_path / name)
    argv = flags(rag_folder, tmp_path, tmp_path / "many", "e2e", "--eval_batch_size", "1")
    job = torchrun(argv)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    while not (tmp_path / "many").is_file() or len(read_lines(tmp_path / "many")) < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    ranks = children.read_text().split()
    assert len(ranks) >= 2
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert err.count("eval_rag.py: interrupted; run the same command again to resume") == 1
    lines = read_lines(tmp_path / "many")
    alone(flags(rag_folder, data, tmp_path / "one", "e2e", "--eval_batch_size", "1"))
    assert 4 <= len(lines) < 8 * times
    assert lines == (read_lines(tmp_path / "one") * times)[: len(lines)]
