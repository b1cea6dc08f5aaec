"""The whole script in-process on CPU: what it writes, how it resumes, what it refuses."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import RagSequenceForGeneration

import finetune_rag
from lightning_base import AtomicCheckpointIO
from rag.errors import UserError
from rag.files import load_json, read_lines, save_json
from rag.models.checkpoints import load_model
from rag.training.run_folder import held
from tests.conftest import QUESTIONS, ROOT

SMALL = """--train_batch_size 4 --eval_batch_size 3 --num_workers 0 --accelerator cpu --num_train_epochs 2
--learning_rate 0.01 --max_source_length 32 --num_sanity_val_steps 1 --log_every_n_steps 1 --n_docs 2""".split()  # noqa: SIM905


def run(model, data_dir, output_dir, *flags):
    words = ["--model_name_or_path", model, "--data_dir", data_dir, "--output_dir", output_dir, *SMALL, *flags]
    return finetune_rag.main(finetune_rag.parse_args([str(word) for word in words]))


def run_killed_at(monkeypatch, global_step: int, *words) -> None:
    """The same, ended by an error in the training step of this number."""
    from rag.training.qa_module import GenerativeQAModule

    step = GenerativeQAModule.training_step

    def die(module, batch, batch_idx):
        if module.global_step == global_step:
            raise MemoryError("killed")
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(GenerativeQAModule, "training_step", die)
        run(*words)


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


def test_what_is_too_small_for_a_cpu_to_be_quick_about_is_zero_in_all_threads(model_folder, data_dir, tmp_path):
    code = """if True:
        import sys
        import torch
        import finetune_rag
        from rag.training.qa_module import GenerativeQAModule

        def look(module, *_):
            tiny = torch.full((10**6,), 2e-38) * 0.1
            print("threads and left:", torch.get_num_threads(), tiny.count_nonzero().item())

        GenerativeQAModule.on_train_batch_end = look
        finetune_rag.main(finetune_rag.parse_args(sys.argv[1:]))
    """
    words = ["--model_name_or_path", model_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    words = [sys.executable, "-c", code, *map(str, words), "--max_steps", "1"]
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "threads and left: 2 0" in said.stdout


def test_a_run_writes_what_the_readme_says(model_folder, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = run(model_folder, data_dir, out, "--do_train", "--do_predict", "--num_train_epochs", 4)
    said = capsys.readouterr()
    assert re.match(r"([\d,]+) of \1 parameters learn\n", said.out) and "FLOPs" not in said.out + said.err
    names = {path.name for path in out.iterdir()}
    assert {"metrics.json", "hparams.json", "git_log.json", "test_results.txt", "test_generations.txt"} <= names
    exported = sorted(path for path in out.glob("checkpoint*") if path.is_dir())
    assert len(exported) == 3 and len(list(out.glob("*.ckpt"))) == 4  # the best three and last.ckpt
    assert [name for name in names if name.startswith(".")] == [".lock"]

    assert load_json(out / "hparams.json")["training"]["learning_rate"] == 0.01
    validations = load_json(out / "metrics.json")["val"]
    assert len(validations) == 4  # one an epoch; the sanity check is none
    expected = {"val_avg_loss", "val_avg_em", "val_avg_f1", "val_avg_gen_time", "val_avg_gen_len", "val_doc_entropy"}
    assert expected <= set(validations[-1])
    assert validations[-1]["val_avg_loss"] < validations[0]["val_avg_loss"]
    assert len(read_lines(out / "test_generations.txt")) == len(QUESTIONS)
    assert f"test_avg_em: {metrics['test_avg_em']:.6f}" in read_lines(out / "test_results.txt")

    # What was exported is what was trained, and it opens with transformers alone.
    trained = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    loaded = RagSequenceForGeneration.from_pretrained(exported[-1]).state_dict()
    assert all(torch.equal(trained[f"model.{name}"], weight) for name, weight in loaded.items())
    before = load_model(str(model_folder)).state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in loaded.items() if "question_encoder" in name)


@pytest.mark.parametrize("frozen", [[], ["--freeze_question_encoder"]])
def test_the_same_command_goes_on_where_it_was_killed(frozen, model_folder, data_dir, tmp_path, monkeypatch, request):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--num_train_epochs", 3, "--save_interval", 1e-6, *frozen]  # last.ckpt after every step
    run(model_folder, data_dir, whole, *flags)
    if frozen:
        request.getfixturevalue("ahead")

    for deadly in (1, 4):  # in the middle of the first epoch, and at the start of the third, each of two steps
        run_killed_at(monkeypatch, deadly, model_folder, data_dir, killed, *flags)
    run(model_folder, data_dir, killed, *flags)

    validations = {folder: load_json(folder / "metrics.json")["val"] for folder in (whole, killed)}
    assert [v["step"] for v in validations[killed]] == [2, 4, 6]
    for once, resumed in zip(validations[whole], validations[killed], strict=True):
        assert {**once, "val_avg_gen_time": 0} == {**resumed, "val_avg_gen_time": 0}
    rows = [load_json(folder / "metrics.json")["train"][-1] for folder in (whole, killed)]
    assert [row | {"tokens_per_second": 0} for row in rows] == [rows[0] | {"tokens_per_second": 0}] * 2
    weights = {folder: torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, killed)}
    assert all(torch.equal(weight, weights[killed][name]) for name, weight in weights[whole].items())
    # Once more, and there is nothing left to do.
    run(model_folder, data_dir, killed, *flags)
    assert load_json(killed / "metrics.json")["val"] == validations[killed]


def test_a_run_that_was_stopped_early_is_finished(model_folder, data_dir, tmp_path):
    """Its repetition tests it at the step and in the epoch that the run itself has."""
    out = tmp_path / "out"
    flags = ["--num_train_epochs", 9, "--early_stopping_patience", 1, "--learning_rate", 1e-9]
    for _ in range(3):
        run(model_folder, data_dir, out, *flags, "--do_train", "--do_predict")
        metrics, logged = load_json(out / "metrics.json"), read_lines(out / "training_log.jsonl")[-1]
        assert [row["step"] for row in metrics["val"]] == [2, 4]
        assert [(row["step"], row["epoch"]) for row in metrics["test"]] == [(4, 2)]
        assert (json.loads(logged)["step"], json.loads(logged)["epoch"]) == (4, 2)


def test_another_run_in_the_same_folder_is_refused(model_folder, data_dir, tmp_path):
    out = tmp_path / "out"
    run(model_folder, data_dir, out, "--max_steps", 1)
    kept = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"--learning_rate was 0\.01 and is 0\.5.*--overwrite_output_dir"):
        run(model_folder, data_dir, out, "--max_steps", 1, "--learning_rate", 0.5)
    assert kept == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    run(model_folder, data_dir, out, "--max_steps", 1, "--learning_rate", 0.5, "--overwrite_output_dir")
    assert json.loads((out / "hparams.json").read_text())["training"]["learning_rate"] == 0.5
    assert len(load_json(out / "metrics.json")["val"]) == 1


def test_a_run_of_an_earlier_release_had_what_leaving_a_flag_out_means(model_folder, data_dir, tmp_path):
    out = tmp_path / "out"
    run(model_folder, data_dir, out, "--max_steps", 1)
    settings, new = load_json(out / "hparams.json"), ("reranker", "refresh_processes", "dense_weight", "over_retrieve")
    for name in new:
        del settings["retrieval"][name]
    for name in ("train_context_encoder", "context_encoder_name_or_path"):
        del settings["model"][name]
    save_json(settings, out / "hparams.json")
    for name, value in (("reranker", "upr"), ("train_context_encoder", True)):
        was = "None" if name == "reranker" else "False"
        with pytest.raises(UserError, match=rf"--{name} was {was} and is {value}"):
            run(model_folder, data_dir, out, "--max_steps", 2, f"--{name}", value)
    run(model_folder, data_dir, out, "--max_steps", 2)
    assert [row["step"] for row in load_json(out / "metrics.json")["val"]] == [1, 2]


@pytest.mark.parametrize(("model_type", "generator"), [("rag_token", "bart"), ("rag_sequence", "t5")])
def test_other_kinds_of_rag(model_type, generator, checkpoint, data_dir, tmp_path):
    flags = ["--max_steps", 1, "--label_smoothing", 0.1, "--freeze_question_encoder"]
    metrics = run(checkpoint(model_type, generator), data_dir, tmp_path / "out", *flags)
    assert 0 <= metrics["val_em"] <= 1 and metrics["val_avg_loss"] > 0


@pytest.mark.parametrize("generator", ["bart", "t5"])
def test_bare_generators_need_no_retriever(generator, request, data_dir, tmp_path):
    folder = request.getfixturevalue(f"{generator}_folder")
    words = ["--model_name_or_path", folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *SMALL]
    words = words[: words.index("--n_docs")]
    metrics = finetune_rag.main(finetune_rag.parse_args([str(word) for word in words]))
    assert "val_em" in metrics and "val_doc_entropy" not in metrics


def test_a_test_leaves_what_the_training_wrote(model_folder, data_dir, tmp_path):
    out = tmp_path / "out"
    run(model_folder, data_dir, out, "--max_steps", 1)
    described, logged = (out / "hparams.json").read_text(), (out / "training_log.jsonl").read_text()
    run(out / "checkpoint1", data_dir, out, "--do_predict")
    assert (out / "hparams.json").read_text() == described
    assert (out / "training_log.jsonl").read_text().startswith(logged)


def test_predict_alone(model_folder, data_dir, tmp_path):
    metrics = run(model_folder, data_dir, tmp_path / "out", "--do_predict")
    assert "test_avg_em" in metrics and "val_em" not in metrics
    assert not list((tmp_path / "out").glob("*.ckpt"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--index_name", "custom"], "--index_name custom needs --passages_path and --index_path"),
        (["--n_docs", 9], "--n_docs 9"),
        (["--do_predict", "--n_test", 0], "--n_test 0"),
        (["--limit_val_batches", 0], "--limit_val_batches 0 measures nothing"),
        (["--check_val_every_n_epoch", 3], "--check_val_every_n_epoch 3 is more than --num_train_epochs 2"),
        (["--val_check_interval", 3], "--val_check_interval 3 is more than the 2 batches of an epoch"),
        (["--resume_from_checkpoint", __file__], "--resume_from_checkpoint .* is damaged, or no Lightning checkpoint"),
        (["--gpus", 1], "--gpus 1"),
        (["--index_name", "custom", "--passages_path", "no", "--index_path", "no"], "--passages_path no"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(flags, message, model_folder, data_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        run(model_folder, data_dir, tmp_path / "out", *flags)
    assert {path.name for path in (tmp_path / "out").rglob("*")} <= {".lock"}


@pytest.mark.parametrize("path", ["", "x\0y", __file__, f"{__file__}/out", "/proc/out"])
def test_a_folder_that_cannot_be_written_is_told_first(path, model_folder, data_dir):
    with pytest.raises(UserError, match=r"^--output_dir "):
        run(model_folder, data_dir, path, "--max_steps", 1)


def test_a_folder_that_is_in_use_is_left_alone(model_folder, data_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with held(out), pytest.raises(UserError, match=rf"^--output_dir {out} is in use by process {os.getpid()}"):
        run(model_folder, data_dir, out, "--max_steps", 1)
    assert [path.name for path in out.iterdir()] == [".lock"]
    monkeypatch.setenv("RANK", "1")
    with held(out), held(out):  # rank 0 has it for all
        pass


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(model_folder, data_dir, tmp_path, monkeypatch):
    out, save = tmp_path / "out", AtomicCheckpointIO.save_checkpoint

    def fill(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, checkpoint, path, storage_options)

    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "save_checkpoint", fill)
        with pytest.raises(UserError, match=rf"^--output_dir {out} cannot be written: the disk is full; make room"):
            run(model_folder, data_dir, out)
    run(model_folder, data_dir, out)
    assert [row["step"] for row in load_json(out / "metrics.json")["val"]] == [2, 4]


def test_unpaired_data_are_named(model_folder, data_dir, tmp_path):
    (data_dir / "val.target").write_text("paris\n\n")
    with pytest.raises(UserError) as error:
        run(model_folder, data_dir, tmp_path / "out")
    assert "val.target: blank lines, 1 in all, the first is line 2" in str(error.value)
    assert "val.source has 8 lines but val.target has 2 lines" in str(error.value)


def test_predict_alone_measures_the_checkpoint_that_is_named(model_folder, data_dir, tmp_path):
    run(model_folder, data_dir, tmp_path / "out", "--max_steps", 2)
    flags = ["--do_predict", "--resume_from_checkpoint"]
    trained = run(model_folder, data_dir, tmp_path / "test", *flags, tmp_path / "out" / "last.ckpt")
    untrained = run(model_folder, data_dir, tmp_path / "base", "--do_predict")
    assert trained["test_avg_loss"] < untrained["test_avg_loss"]
