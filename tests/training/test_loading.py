"""A finished run's checkpoint gives its module back, alone, and settings come from whatever holds them."""

import argparse
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import finetune_rag
from finetune_rag import GenerativeQAModule
from rag.errors import UserError
from rag.training.arguments import FinetuneArguments, parse_args
from rag.training.loading import read_lightning_checkpoint
from rag.training.namespaces import NAMES_OF_GROUPS, SETTINGS, finetune_arguments, group_settings
from tests.conftest import QUESTIONS
from tests.training.test_finetune_rag import SMALL, run


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Folder of a finished run of one step, whose base model is at `base` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(checkpoint("rag_sequence", "bart"), folder / "base")
    for split in ("train", "val"):
        (folder / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS))
        (folder / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    run(folder / "base", folder, folder / "out", "--max_steps", 1, "--dropout", 0.1)
    return folder


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the run, its base model gone."""
    shutil.copytree(trained / "out", tmp_path / "out")
    (trained / "base").rename(trained / "hidden")
    yield tmp_path / "out"
    (trained / "hidden").rename(trained / "base")


def weights_of(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_has_weights_of(module, path):
    expected, found = weights_of(path), module.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def ask(module) -> list[str]:
    tokens = module.question_tokenizer(["what is the capital of oslo"], return_tensors="pt")
    return module.ids_to_clean_text(module.model.generate(tokens.input_ids, attention_mask=tokens.attention_mask))


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.ckpt", "checkpoint1.ckpt"])
def test_a_module_comes_back_from_its_checkpoint_alone(trained, name):
    module = GenerativeQAModule.load_from_checkpoint(str(trained / "out" / name))
    assert_has_weights_of(module, trained / "out" / name)
    assert module.model.config.generator.dropout == 0.1 and module.model.config.n_docs == 2  # as the flags said
    assert module.output_dir == trained / "out" and module.val_metric == "em"
    # It searches, and transformers' own ways through the model work.
    assert module.model.retriever.index.get_doc_dicts(torch.tensor([[0]]))[0]["title"] == ["paris"]
    assert len(ask(module)) == 1
    tokens = module.question_tokenizer(["what is oslo"], return_tensors="pt")
    labels = module.answer_tokenizer(["norway"], return_tensors="pt").input_ids
    assert module(tokens.input_ids, attention_mask=tokens.attention_mask, labels=labels).loss.shape == (1,)


def test_the_weights_are_not_those_that_the_training_began_with(trained):
    module = GenerativeQAModule.load_from_checkpoint(trained / "out" / "last.ckpt")
    untrained = GenerativeQAModule(module.args)
    assert untrained.retriever is not None
    found, before = module.state_dict(), untrained.state_dict()
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_what_was_exported_takes_the_place_of_a_base_model_that_is_gone(moved):
    module = GenerativeQAModule.load_from_checkpoint(moved / "checkpoint1.ckpt")
    assert_has_weights_of(module, moved / "checkpoint1.ckpt")
    assert module.args.model.model_name_or_path == str(moved / "checkpoint1")


def test_a_base_model_that_is_gone_is_named_in_one_line(moved, trained):
    with pytest.raises(UserError) as error:
        GenerativeQAModule.load_from_checkpoint(moved / "last.ckpt")
    message = str(error.value)
    assert str(moved / "last.ckpt") in message and str(trained / "base") in message and "\n" not in message
    assert "give model_name_or_path=FOLDER" in message
    module = GenerativeQAModule.load_from_checkpoint(moved / "last.ckpt", model_name_or_path=str(moved / "checkpoint1"))
    assert_has_weights_of(module, moved / "last.ckpt")


def test_settings_can_be_changed_and_mistyped_ones_are_refused(trained, tmp_path):
    last = trained / "out" / "last.ckpt"
    module = GenerativeQAModule.load_from_checkpoint(last, n_docs=3, map_location="cpu", strict=True)
    assert module.model.config.n_docs == 3 and module.args.data.max_source_length == 32
    with pytest.raises(UserError, match="n_dosc is no setting of a finetuning run; did you mean n_docs"):
        GenerativeQAModule.load_from_checkpoint(last, n_dosc=3)
    other = json.loads((trained / "out" / "hparams.json").read_text())
    other["data"]["max_source_length"] = 7
    (tmp_path / "hparams.json").write_text(json.dumps(other))
    module = GenerativeQAModule.load_from_checkpoint(last, hparams_file=tmp_path / "hparams.json")
    assert module.args.data.max_source_length == 7


def test_parts_that_are_given_are_not_loaded(moved, trained):
    shutil.copytree(trained / "hidden", moved / "base")
    parts = GenerativeQAModule.load_from_checkpoint(moved / "last.ckpt", model_name_or_path=str(moved / "base"))
    given = {"model": parts.model, "tokenizer": parts.tokenizer, "retriever": parts.retriever}
    module = GenerativeQAModule.load_from_checkpoint(moved / "last.ckpt", **given)
    assert module.model is parts.model and module.retriever is parts.retriever


def test_a_subclass_with_the_public_signature_comes_back(trained):
    class Weighted(GenerativeQAModule):
        def __init__(self, hparams, **kwargs):
            super().__init__(hparams, **kwargs)
            self.rescaled = True

    module = Weighted.load_from_checkpoint(trained / "out" / "checkpoint1.ckpt")
    assert type(module) is Weighted and module.rescaled
    assert_has_weights_of(module, trained / "out" / "checkpoint1.ckpt")


def test_a_bare_generator_comes_back(bart_folder, trained, tmp_path):
    words = ["--model_name_or_path", bart_folder, "--data_dir", trained, "--output_dir", tmp_path / "out", *SMALL]
    words = [*map(str, words[: words.index("--n_docs")]), "--max_steps", "1"]
    finetune_rag.main(parse_args(words))
    module = GenerativeQAModule.load_from_checkpoint(tmp_path / "out" / "last.ckpt")
    assert_has_weights_of(module, tmp_path / "out" / "last.ckpt")
    assert module.retriever is None and len(ask(module)) == 1


def test_what_is_no_checkpoint_of_this_suite_is_refused_unread(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt does not exist"):
        read_lightning_checkpoint(tmp_path / "none.ckpt")
    torch.save({"hyper_parameters": os.system, "state_dict": {}}, tmp_path / "evil.ckpt")
    torch.save({"epoch": 1}, tmp_path / "bare.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name in ("evil", "bare", "text"):
        with pytest.raises(UserError, match=r"is no checkpoint|no Lightning checkpoint") as error:
            read_lightning_checkpoint(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(error.value)


# --- Settings ---------------------------------------------------------------------------------------------------------


def flat(args: FinetuneArguments) -> dict:
    return {name: value for group in args.to_dict().values() for name, value in group.items()}


def test_every_setting_has_a_name_of_its_own():
    assert len(SETTINGS) == sum(len(fields(group)) for group in NAMES_OF_GROUPS.values())


def test_settings_come_from_groups_a_flat_dict_or_a_namespace(caplog):
    words = "--model_name_or_path m --data_dir d --output_dir o --seed 7 --devices 2"
    args = parse_args(words.split())
    assert finetune_arguments(args) is args
    for given in (args.to_dict(), flat(args), argparse.Namespace(**flat(args))):
        assert finetune_arguments(given) == args
    assert finetune_arguments(flat(args) | {"actor_handles": []}) == args
    assert "left out: actor_handles" in caplog.text
    with pytest.raises(UserError, match="--seed -1 must be 0 or more"):
        finetune_arguments(flat(args) | {"seed": -1})
    with pytest.raises(UserError, match="--model_name_or_path is missing"):
        group_settings({"data_dir": "d", "output_dir": "o"})
    with pytest.raises(UserError, match="--data_dir is missing"):
        finetune_arguments({"model_name_or_path": "m", "output_dir": "o"})


def test_the_public_way_to_read_flags_gives_the_same_settings():
    parser = argparse.ArgumentParser()
    parser = GenerativeQAModule.add_model_specific_args(parser, os.getcwd())
    parser = GenerativeQAModule.add_retriever_specific_args(parser)
    parser = GenerativeQAModule.add_ray_specific_args(parser)
    parser.add_argument("--mine", default=1)
    words = "--model_name_or_path m --data_dir d --output_dir o --fp16 --n_docs 4 --precision null --index_name exact"
    namespace = parser.parse_args(words.split())
    assert finetune_arguments(namespace) == parse_args(words.split())
    with pytest.raises(UserError, match="--data_dir d is not a folder"):
        finetune_rag.main(namespace)


def test_a_run_is_begun_from_a_namespace(trained, tmp_path):
    args = parse_args(
        [str(word) for word in ("--model_name_or_path", trained / "base", "--data_dir", trained, "--output_dir",
                                tmp_path / "out", *SMALL, "--max_steps", 1)]
    )  # fmt: skip
    metrics = finetune_rag.main(argparse.Namespace(**flat(args)))
    assert "val_em" in metrics and Path(tmp_path / "out" / "last.ckpt").is_file()
