"""--precision auto and --attn_implementation of finetune_rag.py: chosen by the machine, kept by the run."""

import json
from types import SimpleNamespace

import pytest
import torch

from rag.errors import UserError
from rag.packing import accepts_packed_rows
from rag.training import loading
from rag.training.loading import settle_precision
from rag.training.qa_module import GenerativeQAModule
from rag.training.reports import any_rank
from rag.training.run_folder import continuation_problems
from tests.distributed.many_ranks import run_ranks
from tests.training.lightning_toy import toy_args
from tests.training.test_finetune_rag import run

CPU = torch.device("cpu")


@pytest.fixture
def bfloat16_machine(monkeypatch):
    """A function that gives the machine units for bfloat16, or takes them."""
    return lambda has: monkeypatch.setattr(
        loading, "dtype_of", lambda word, device: torch.bfloat16 if has else torch.float32
    )


@pytest.mark.parametrize("has_units, word", [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_what_the_machine_is_fast_in(has_units, word, bfloat16_machine, tmp_path, capsys):
    bfloat16_machine(has_units)
    args = toy_args(tmp_path, "--precision", "auto")
    settle_precision(args, CPU)
    assert args.trainer.precision == word and args.to_dict()["trainer"]["precision"] == word
    assert capsys.readouterr().out == f"--precision auto: {word}\n"
    given = toy_args(tmp_path, "--precision", "64-true")
    settle_precision(given, CPU)
    assert given.trainer.precision == "64-true"


def test_a_run_goes_on_in_the_precision_that_it_began_in(model_folder, data_dir, bfloat16_machine, tmp_path):
    """Also on a machine that would begin in another; a flag that asks for another is refused before that."""
    out = tmp_path / "out"
    bfloat16_machine(True)
    run(model_folder, data_dir, out, "--precision", "auto", "--max_steps", 1)
    bfloat16_machine(False)
    run(model_folder, data_dir, out, "--precision", "auto", "--num_train_epochs", 1)
    weights = [torch.load(out / "last.ckpt", weights_only=True)["hyper_parameters"]["trainer"]["precision"]]
    assert weights == ["bf16-mixed"]
    with pytest.raises(
        UserError, match=r"holds a run with other settings \(--precision was bf16-mixed and is 32-true\)"
    ):
        run(model_folder, data_dir, out, "--num_train_epochs", 2)


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.mark.parametrize(
    "begun, flags, problems",
    [
        ([], ["--precision", "32"], 0),
        ([], ["--precision", "auto"], 0),
        (["--precision", "bf16"], ["--precision", "bf16-mixed"], 0),
        (["--precision", "64"], [], 1),
        ([], ["--precision", "bf16-mixed"], 1),
    ],
)
def test_other_words_for_the_same_precision_go_on(begun, flags, problems, tmp_path):
    from finetune_rag import write_run_description

    args = toy_args(tmp_path, *begun)
    (tmp_path / "out").mkdir()
    write_run_description(args)
    assert len(continuation_problems(toy_args(tmp_path, *flags))) == problems


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_another_attention_gives_the_same_training(name, model_folder, data_dir, tmp_path, monkeypatch):
    seen = []

    def note(module):
        seen.append(accepts_packed_rows(module.generator))

    monkeypatch.setattr(GenerativeQAModule, "on_fit_start", note)
    flags = ["--max_steps", 2, "--log_every_n_steps", 1, "--dropout", 0.0, "--attention_dropout", 0.0]
    run(model_folder, data_dir, tmp_path / "packed", *flags)
    run(model_folder, data_dir, tmp_path / name, *flags, "--attn_implementation", name)
    assert seen == [True, False]
    logs = [(tmp_path / one / "training_log.jsonl").read_text().splitlines() for one in (name, "packed")]
    losses = [[row["loss"] for row in map(json.loads, log) if "loss" in row] for log in logs]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_attention_that_is_not_installed_is_told_in_a_line(model_folder, data_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"^--attn_implementation flash_attention_2 cannot be used here \(.*\); leave it out$"
    ):
        run(model_folder, data_dir, tmp_path / "out", "--attn_implementation", "flash_attention_2")
    assert not list((tmp_path / "out").glob("*.json")) and not list((tmp_path / "out").glob("*.ckpt"))


class TrainerOfTwo:
    """What `any_rank` asks of a Trainer."""

    def __init__(self, rank: int):
        self.world_size, self.strategy = 2, SimpleNamespace(root_device=torch.device("cuda", rank))


def _agree_as_between_gpus(rank: int) -> list[bool]:
    trainer = TrainerOfTwo(rank)
    return [any_rank(trainer, decision) for decision in (rank == 1, False, True)]


def test_ranks_on_gpus_agree_by_a_group_of_their_processes(tmp_path):
    assert run_ranks(_agree_as_between_gpus, 2, tmp_path) == [[True, False, True]] * 2


def test_one_process_agrees_with_itself():
    assert any_rank(SimpleNamespace(world_size=1), True) and not any_rank(SimpleNamespace(world_size=1), False)
