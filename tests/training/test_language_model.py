"""A RAG model with a causal language model, from its parts to its scores, by the suite's own scripts."""

import json

import pytest

import consolidate_rag_checkpoint
import eval_rag
import finetune_rag
from rag.models.checkpoints import load_model, load_tokenizer
from tests.conftest import QUESTIONS
from tests.distributed.many_ranks import run_ranks
from tests.training.rank_runs import SETTINGS, TOLERANCE, assert_same, outcome, train, two_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 5), ("test", 8)):
        (folder / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS[:count]))
        (folder / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS[:count]))
    return folder


def words_of(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def make_checkpoint(llama_folder, question_encoder_folder, dest, model_type):
    flags = {
        "generator_name_or_path": llama_folder,
        "question_encoder_name_or_path": question_encoder_folder,
        "model_type": model_type,
        "dest": dest,
    }
    return consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(words_of(flags)))


def finetune(checkpoint, data, out, *more) -> dict:
    argv = ["--model_name_or_path", str(checkpoint), "--data_dir", str(data), "--output_dir", str(out)]
    return finetune_rag.main(finetune_rag.parse_args([*argv, *more]))


def evaluate(checkpoint, data, out, **flags) -> dict:
    files = {
        "evaluation_set": data / "test.source", "gold_data_path": data / "test.target", "gold_data_mode": "ans",
        "predictions_path": out, "model_name_or_path": checkpoint, "max_length": 6,
    }  # fmt: skip
    return eval_rag.main(eval_rag.parse_args(words_of(files | flags)))


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
def test_it_learns_is_exported_and_answers(
    model_type, llama_folder, question_encoder_folder, knowledge, data, tmp_path, capsys
):
    checkpoint = make_checkpoint(llama_folder, question_encoder_folder, tmp_path / "rag", model_type)
    assert "Title: {title}" in capsys.readouterr().out
    search = [*words_of(knowledge), "--n_docs", "2"]
    steps = ["--max_steps", "40", "--train_batch_size", "8", "--learning_rate", "1e-2", "--num_train_epochs", "40"]
    late = [
        "--check_val_every_n_epoch",
        "40",
        "--num_workers",
        "0",
        "--max_combined_length",
        "64",
        "--do_train",
        "--do_predict",
    ]
    metrics = finetune(checkpoint, data, tmp_path / "run", *search, *steps, *late)
    assert metrics["val_em"] > 0.5, metrics
    exported = tmp_path / "run" / "checkpoint1"
    model = load_model(str(exported))
    assert type(model).__name__ == json.loads((exported / "config.json").read_text())["architectures"][0]
    assert load_tokenizer(str(exported)).generator.prompt_template == model.config.generator.prompt_template
    scores = evaluate(exported, data, tmp_path / "answers.txt", n_docs=2, num_beams=1, **knowledge)
    assert scores["em"] > 0.5, (tmp_path / "answers.txt").read_text()
    tested = (tmp_path / "run" / "test_generations.txt").read_text().splitlines()
    assert tested == (tmp_path / "answers.txt").read_text().splitlines()


def test_a_bare_language_model_is_the_closed_book_baseline(llama_folder, data, tmp_path):
    steps = ["--max_steps", "60", "--train_batch_size", "8", "--learning_rate", "1e-2", "--num_train_epochs", "60"]
    late = ["--check_val_every_n_epoch", "60", "--num_workers", "0"]
    metrics = finetune(llama_folder, data, tmp_path / "run", "--model_type", "causal", *steps, *late)
    assert metrics["val_em"] > 0.5
    scores = evaluate(tmp_path / "run" / "checkpoint1", data, tmp_path / "answers.txt", model_type="causal")
    assert scores["em"] > 0.5, (tmp_path / "answers.txt").read_text()


@pytest.fixture(scope="module")
def words(checkpoint, llama, llama_tokenizer, data):
    """A command line for a language model, whose configs have no dropout to switch off."""
    place = SETTINGS.index("--dropout")
    settings = SETTINGS[:place] + SETTINGS[place + 2 :]
    counts = ["--n_train", "7", "--max_combined_length", "64"]
    return [
        "--model_name_or_path",
        str(checkpoint("rag_sequence", "llama")),
        "--data_dir",
        str(data),
        *settings,
        *counts,
    ]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    flags = ["--train_batch_size", "4", "--do_train", "--do_predict", "--output_dir", str(out)]
    finetune_rag.main(finetune_rag.parse_args([*words, *flags]))
    return outcome(out)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(strategy, words, alone, tmp_path):
    argv = two_ranks(words, tmp_path / "out", "--do_train", "--do_predict", "--strategy", strategy)
    run_ranks(train, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    assert_same(outcome(tmp_path / "out"), alone, **TOLERANCE)


@pytest.mark.slow
def test_ranks_that_were_asked_to_end_go_on_to_the_same_end(words, alone, tmp_path):
    argv = two_ranks(words, tmp_path / "out", "--do_train", "--do_predict")
    ends = run_ranks(train, 2, tmp_path, argv, tmp_path / "out", 2, seconds=120)
    assert [status for status, _ in ends] == [143, 143]
    run_ranks(train, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    assert_same(outcome(tmp_path / "out"), alone, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_own_attention_learns_the_same(implementation, words, alone, tmp_path):
    flags = ["--train_batch_size", "4", "--do_train", "--do_predict", "--output_dir", str(tmp_path / "out")]
    finetune_rag.main(finetune_rag.parse_args([*words, *flags, "--attn_implementation", implementation]))
    assert_same(outcome(tmp_path / "out"), alone, **TOLERANCE)
