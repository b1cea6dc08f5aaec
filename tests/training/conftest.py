"""The command line of small runs on ranks, and their outcome in one process."""

import functools

import pytest

import finetune_rag
from tests.conftest import QUESTIONS
from tests.training.rank_runs import SETTINGS, outcome


@pytest.fixture(scope="module")
def words(checkpoint, tmp_path_factory):
    """The command line of a run, but for its output folder, batch size and ranks."""
    data = tmp_path_factory.mktemp("data")
    for split, count in (("train", 7), ("val", 5), ("test", 5)):
        (data / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS[:count]))
        (data / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS[:count]))
    return ["--model_name_or_path", str(checkpoint()), "--data_dir", str(data), *SETTINGS]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """The outcome of one process with batches of 4, by the number of batches a step and further flags."""

    def run(accumulate: int, *further) -> dict:
        out = tmp_path_factory.mktemp("alone") / "out"
        flags = ["--train_batch_size", "4", "--gradient_accumulation_steps", str(accumulate), *further]
        argv = [*words, *flags, "--do_train", "--do_predict", "--output_dir", str(out)]
        finetune_rag.main(finetune_rag.parse_args(argv))
        return outcome(out)

    return functools.cache(run)
