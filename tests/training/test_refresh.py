"""The index follows the context encoder: losses of a run that waits, kills, failed builds, the run's end."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import use_own_knowledge_dataset
from rag.errors import UserError
from rag.index.index_files import read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.arguments import KnowledgeArguments
from rag.knowledge.embedding import embed
from rag.models.checkpoints import load_tokenizer
from rag.models.encoders import load_encoder
from rag.training import index_build, refresh
from rag.training.refresh_schedule import RefreshSchedule, schedule_problems
from tests.conftest import PASSAGES, QUESTIONS
from tests.distributed.many_ranks import run_ranks
from tests.training.rank_runs import train, two_ranks
from tests.training.test_finetune_rag import SMALL, run, run_killed_at

PASSAGES_FOLDER = "my_knowledge_dataset"


@pytest.fixture(scope="module")
def own(context_encoder_folder, tmp_path_factory):
    """The flags of passages and index as use_own_knowledge_dataset.py makes them: 8-bit HNSW, vectors in float16."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "documents.tsv").write_text("".join(f"{title}\t{text}\n" for title, text in PASSAGES))
    args = KnowledgeArguments(
        csv_path=str(folder / "documents.tsv"), dpr_ctx_encoder_model_name=str(context_encoder_folder),
        index_factory="HNSW8,SQ8", half_precision=True, output_dir=str(folder / "out"), recall_queries=0,
    )  # fmt: skip
    made = use_own_knowledge_dataset.main(args)
    return ["--passages_path", made.passages_path, "--index_path", made.index_path]


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return checkpoint()


def losses_of(out) -> dict[int, float]:
    rows = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def vectors_of(path) -> np.ndarray:
    passages = path / PASSAGES_FOLDER
    index = KnowledgeIndex.load_from_disk(16, passages, path / read_description(passages).index)
    index.init_index()
    return index.embeddings.gather(np.arange(len(index)))


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_names_steps_and_when_their_index_is_taken():
    schedule = RefreshSchedule.parse("0-1000:500, 1000-:1000")
    assert [step for step in range(4001) if schedule.is_due(step)] == [500, 1000, 2000, 3000, 4000]
    assert [schedule.swap_step(step) for step in (500, 1000, 2000)] == [1000, 2000, 3000]
    sooner = RefreshSchedule.parse("0-900:800,1000-1300:100")
    assert [step for step in range(2000) if sooner.is_due(step)] == [800, 1000, 1100, 1200]
    assert [sooner.swap_step(step) for step in (800, 1000, 1200, 1500)] == [1000, 1100, 1300, 1500]
    assert [sooner.is_used_within(steps) for steps in (800, 1000, 1001, float("inf"))] == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' says no steps and interval"),
        ("500", "'500' says no steps and interval"),
        ("0-10:5,", "'' says no steps and interval"),
        ("0-10:-5", "'0-10:-5' says no steps"),
        ("0-10:0", "must be 1 or more"),
        ("10-5:1", "ends before it begins"),
        ("0-5:10", "no step of '0-5:10' is a multiple"),
        ("0-:5,10-:5", "'10-:5' begins before the part in front of it ends"),
        ("0-20:5,10-30:5", "'10-30:5' begins before"),
    ],
)
def test_schedules_that_say_nothing(text, message):
    (problem,) = schedule_problems(text)
    assert problem.startswith(f"--refresh_index {text!r}: ") and message in problem
    assert not schedule_problems("0-1000:500,1000-:1000")


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(own, tmp_path_factory):
    """Data and the flags of six steps, of which the last two search the index of step 2: their losses say so."""
    data = tmp_path_factory.mktemp("refresh_data")
    for split in ("train", "val", "test"):
        (data / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS))
        (data / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    flags = [
        *own, "--train_context_encoder", "--refresh_index", "0-3:2", "--num_train_epochs", 3, "--learning_rate", 0.05,
        "--n_docs", 2, "--save_interval", 1e-6, "--adam_epsilon", 1e-2,
    ]  # fmt: skip
    return data, flags


@pytest.fixture(scope="module")
def whole(model_folder, words, tmp_path_factory):
    """The output of a run that nothing ended, and which waited for its index as soon as it was begun."""
    out = tmp_path_factory.mktemp("whole") / "out"
    start = refresh.IndexRefresh._start

    def start_and_wait(callback, step):
        start(callback, step)
        assert callback.build.is_over(120)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh.IndexRefresh, "_start", start_and_wait)
        run(model_folder, words[0], out, *words[1])
    return out


@pytest.fixture(scope="module")
def stale(model_folder, words, tmp_path_factory):
    """The same with the index that was given, to the end."""
    out = tmp_path_factory.mktemp("stale") / "out"
    flags = [flag for flag in words[1] if flag not in ("--refresh_index", "0-3:2")]
    run(model_folder, words[0], out, *flags)
    return out


def assert_same_end(out, expected) -> None:
    assert losses_of(out) == losses_of(expected)
    mine, theirs = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (out, expected))
    assert mine.keys() == theirs.keys() and any(name.startswith("context_encoder.") for name in mine)
    for name, weight in theirs.items():
        assert torch.equal(mine[name], weight), name
    np.testing.assert_array_equal(vectors_of(out / "knowledge"), vectors_of(expected / "knowledge"))
    assert names_in(out) == names_in(expected)


def names_in(out) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.name != ".lock")


def test_a_run_beside_its_build_has_the_losses_of_one_that_waits(whole, stale, words, model_folder, tmp_path, capfd):
    run(model_folder, words[0], tmp_path / "out", *words[1])
    said = capfd.readouterr().out
    assert "step 4: the index of step 2 is taken (waited " in said and "--refresh_index: indexes taken: 1; of " in said
    assert_same_end(tmp_path / "out", whole)
    own, others = losses_of(whole), losses_of(stale)
    assert [step for step in own if own[step] != others[step]] == [4, 5]


def test_the_end_has_encoder_and_index_of_the_best_checkpoint(whole, own, capfd):
    description = read_description(whole / "knowledge" / PASSAGES_FOLDER)
    assert (description.factory, description.embeddings) == ("HNSW8,SQ8", "float16")
    folder = whole / "checkpoint3" / "context_encoder"
    encoder, tokenizer = load_encoder(str(folder), "context"), load_tokenizer(str(folder))
    titles, texts = zip(*PASSAGES, strict=True)
    expected = embed({"title": list(titles), "text": list(texts)}, encoder, tokenizer)["embeddings"]
    np.testing.assert_allclose(vectors_of(whole / "knowledge"), expected, rtol=2e-3, atol=2e-3)
    assert (whole / "refresh" / "step_2" / "knowledge").is_dir()  # which last.ckpt's steps searched


def test_killed_in_a_build_at_its_taking_and_in_the_last_one(whole, words, model_folder, monkeypatch, tmp_path):
    """The same command goes on to the same end."""
    out = tmp_path / "out"
    run_killed_at(monkeypatch, 3, model_folder, words[0], out, *words[1])
    for owner, name in ((refresh.IndexRefresh, "_take"), (refresh.IndexRefresh, "_await")):
        call, calls = getattr(owner, name), []

        def die(callback, what, *rest, call=call, calls=calls, name=name):
            if name == "_take" or what == "embedding of all passages":
                calls.append(what)
                callback._stop()
                raise MemoryError("killed")
            return call(callback, what, *rest)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(owner, name, die)
            run(model_folder, words[0], out, *words[1])
        assert calls
    run(model_folder, words[0], out, *words[1])
    assert_same_end(out, whole)


def test_a_run_that_is_too_short_for_its_schedule_says_so(words, model_folder, tmp_path, caplog):
    run(model_folder, words[0], tmp_path / "out", *words[1], "--max_steps", 4)
    assert "--refresh_index 0-3:2: none of the 4 steps of this training searches an index" in caplog.text


@pytest.mark.slow
def test_a_killed_build_goes_on(whole, words, model_folder, monkeypatch, tmp_path):
    start, killed = index_build.IndexBuild.start, []

    def start_and_kill(build):
        start(build)
        if build.output not in killed:
            killed.append(build.output)
            build.process.kill()

    monkeypatch.setattr(index_build.IndexBuild, "start", start_and_kill)
    run(model_folder, words[0], tmp_path / "out", *words[1])
    assert len(killed) == 2
    assert_same_end(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('reembedding.py: error: no room')", "no room"),
        pytest.param("1 / 0", "ZeroDivisionError: division by zero", marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), 9)", r"its process was killed \(SIGKILL\) 4 times", marks=pytest.mark.slow),
    ],
)
def test_a_build_that_fails_leaves_the_index(code, reason, stale, words, model_folder, monkeypatch, tmp_path, caplog):
    make = index_build.BuildOrder.words

    def failing(order, encoder, output):
        return [sys.executable, "-c", f"import os, sys; {code}"] if order.beside else make(order, encoder, output)

    monkeypatch.setattr(index_build.BuildOrder, "words", failing)
    run(model_folder, words[0], tmp_path / "out", *words[1])
    warnings = [record.getMessage() for record in caplog.records if record.name == "rag.training.refresh"]
    assert len(warnings) == 1
    assert re.fullmatch(rf"step 4: the index of step 2 failed \({reason}\); the one given stays", warnings[0])
    assert losses_of(tmp_path / "out") == losses_of(stale)
    np.testing.assert_array_equal(vectors_of(tmp_path / "out" / "knowledge"), vectors_of(stale / "knowledge"))


def test_what_cannot_be_made_anew_is_refused(words, own, model_folder, tmp_path):
    data, flags = words
    inside = tmp_path / "out" / "knowledge"
    shutil.copytree(Path(own[1]).parent, inside)
    moved = [str(flag).replace(str(Path(own[1]).parent), str(inside)) for flag in flags]
    with pytest.raises(UserError, match=r"lies in .*knowledge, where the training writes"):
        run(model_folder, data, tmp_path / "out", *moved)
    with pytest.raises(UserError, match="holds knowledge that no training made"):
        run(model_folder, data, tmp_path / "out", *flags)
    (tmp_path / "third/knowledge" / PASSAGES_FOLDER).mkdir(parents=True)  # of another origin: nothing is told of it
    with pytest.raises(UserError, match="holds knowledge that no training made"):
        run(model_folder, data, tmp_path / "third", *flags)
    named_alike = tmp_path / "fourth/knowledge/index.json"  # as the quickstart names its encoder
    named_alike.parent.mkdir(parents=True)
    named_alike.write_text(json.dumps({"encoder": "models/context_encoder"}))
    with pytest.raises(UserError, match="holds knowledge that no training made"):
        run(model_folder, data, tmp_path / "fourth", *flags)
    (tmp_path / "fifth").mkdir()
    (tmp_path / "fifth/refresh").write_text("")
    with pytest.raises(UserError, match="fifth: its refresh is no folder"):
        run(model_folder, data, tmp_path / "fifth", *flags)
    with pytest.raises(UserError, match="--over_retrieve 9 is more than the 8 passages"):
        run(model_folder, data, tmp_path / "other", *flags, "--over_retrieve", 9)


# --- Ranks ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["pytorch", "local", "ray"])
def test_two_ranks_take_the_index_together(retriever, whole, words, model_folder, tmp_path):
    start = ["--model_name_or_path", model_folder, "--data_dir", words[0], *SMALL, *words[1], "--do_train"]
    flags = [*map(str, start), "--do_predict", "--distributed_retriever", retriever]
    ends = run_ranks(train, 2, tmp_path, two_ranks(flags, tmp_path / "out"), tmp_path / "out", seconds=200)
    (_, written), (_, written_by_other) = ends
    assert written and not written_by_other
    found, expected = losses_of(tmp_path / "out"), losses_of(whole)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)
    np.testing.assert_allclose(vectors_of(tmp_path / "out/knowledge"), vectors_of(whole / "knowledge"), atol=0.02)
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["callbacks"]["IndexRefresh"]
    assert state == {"current": 2, "pending": None}
