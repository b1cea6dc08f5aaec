"""`lightning_base.generic_train`: the public suite's way to train a module."""

import argparse
import json

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_base
from callbacks_rag import Seq2SeqLoggingCallback, get_checkpoint_callback, get_early_stopping_callback
from finetune_rag import GenerativeQAModule
from rag.errors import UserError
from rag.files import load_json, read_lines
from rag.training.arguments import parse_args
from rag.training.run_card import making_of
from tests.conftest import QUESTIONS
from tests.training.lightning_toy import ToyModule, toy_args
from tests.training.test_finetune_rag import SMALL


@pytest.fixture
def args(bart_folder, data_dir, tmp_path):
    """Settings of a closed-book run of two epochs, as a namespace of flags."""
    words = ["--model_name_or_path", bart_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *SMALL]
    args = parse_args([str(word) for word in words[: words.index("--n_docs")]])
    return argparse.Namespace(**{name: value for group in args.to_dict().values() for name, value in group.items()})


def test_a_module_is_trained_with_the_public_callbacks_and_tested(args, tmp_path):
    model = GenerativeQAModule(args)
    out = tmp_path / "out"
    trainer = lightning_base.generic_train(
        model,
        args,
        get_early_stopping_callback(model.val_metric, 3),
        checkpoint_callback=get_checkpoint_callback(args.output_dir, model.val_metric),
        logging_callback=Seq2SeqLoggingCallback(),
    )
    assert {"checkpoint1", "checkpoint2", "last.ckpt", "metrics.json"} <= {path.name for path in out.iterdir()}
    trainer.test(model, datamodule=trainer.datamodule, verbose=False)
    rows = load_json(out / "metrics.json")
    assert [row["step_count"] for row in rows["val"]] == [1, 2] and rows["test"][0]["step_count"] == 2
    results = dict(line.split(": ") for line in read_lines(out / "test_results.txt"))
    assert results["test_avg_em"] == f"{rows['test'][0]['test_avg_em']:.6f}"
    loaded = GenerativeQAModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert loaded.args.data.data_dir == args.data_dir


class Mine(GenerativeQAModule):
    """What subclasses of the public module change: data, measures and the metric that steers."""

    val_metric = "letters"

    def get_dataset(self, type_path):
        dataset = super().get_dataset(type_path)
        dataset.sources, dataset.targets = dataset.sources[:3], dataset.targets[:3]
        return dataset

    def calc_generative_metrics(self, preds, target):
        return {"letters": sum(len(text) for text in target) / len(target)}


def test_what_a_subclass_changes_is_what_is_done(args, tmp_path, caplog):
    trainer = lightning_base.generic_train(
        Mine(args), args, checkpoint_callback=get_checkpoint_callback(args.output_dir, "letters")
    )
    cities = [city for _, city in QUESTIONS[:3]]
    mean = sum(map(len, cities)) / 3
    assert trainer.callback_metrics["val_avg_letters"] == pytest.approx(mean)
    assert trainer.checkpoint_callback.kept[0]["score"] == pytest.approx(mean)
    assert trainer.global_step == 2  # an epoch of three examples is one batch


def test_without_callbacks_the_lowest_loss_is_kept(args, tmp_path):
    trainer = lightning_base.generic_train(GenerativeQAModule(args), args)
    kept = [path.name for path in (tmp_path / "out").glob("checkpoint-*.ckpt")]
    assert len(kept) == 1 and trainer.checkpoint_callback.monitor == "val_avg_loss"
    args.do_train, args.do_predict = False, True
    assert lightning_base.generic_train(GenerativeQAModule(args), args).global_step == 0


def test_data_by_name_are_read_first(args, tmp_path):
    (tmp_path / "named").mkdir()
    for split in ("train", "validation"):
        records = [json.dumps({"question": question, "answer": city}) for question, city in QUESTIONS[:3]]
        (tmp_path / "named" / f"{split}.jsonl").write_text("\n".join(records))
    args.data_dir, args.dataset_name, args.max_steps = None, str(tmp_path / "named"), 1
    module = GenerativeQAModule(args)
    lightning_base.generic_train(module, args)
    assert making_of(module).data_sizes == {"train": 3, "val": 3} and making_of(module).data == str(tmp_path / "named")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*.ckpt")
    assert making_of(GenerativeQAModule.load_from_checkpoint(checkpoint)).data_sizes == {}


def test_a_module_with_loaders_of_its_own_needs_no_data_module(tmp_path):
    args = toy_args(tmp_path, "--max_steps", "1", "--limit_val_batches", "0")

    class WithLoader(ToyModule):
        def train_dataloader(self):
            return DataLoader(
                [{"index": 3, "loss_weight": 1.0}], collate_fn=lambda rows: {"index": [3]} | {"loss_weight": 1.0}
            )

    module = WithLoader(args)
    before = module.linear.weight.clone()
    checkpoints = get_checkpoint_callback(tmp_path / "out", "em")
    lightning_base.generic_train(module, args, checkpoint_callback=checkpoints)
    assert module.trained_on == [[3]] and not torch.equal(module.linear.weight, before)


def test_a_plugin_of_lightning_1_is_refused(tmp_path):
    args = toy_args(tmp_path)
    with pytest.raises(UserError, match="custom_ddp_plugin: Lightning 2 has no such plugins"):
        lightning_base.generic_train(ToyModule(args), args, custom_ddp_plugin=object())


def test_methods_of_the_public_base_class(args, bart, tmp_path):
    module = GenerativeQAModule(args)
    with torch.no_grad():
        module.model.lm_head.weight.add_(1)
    module.load_hf_checkpoint(args.model_name_or_path)
    assert all(torch.equal(weight, bart.state_dict()[name]) for name, weight in module.model.state_dict().items())
    with pytest.raises(AttributeError, match="`on_validation_epoch_end`, without outputs"):
        module.validation_epoch_end  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_subclass_is_warned_of_a_method_that_is_never_called(caplog):
    class Old(GenerativeQAModule):
        def save_metrics(self, latest_metrics, type_path):
            pass

    assert "Old.save_metrics is never called: callbacks_rag.MetricsWriter writes metrics.json" in caplog.text


def test_schedules_by_name():
    assert lightning_base.arg_to_scheduler_choices == ["cosine", "cosine_w_restarts", "linear", "polynomial"]
    assert lightning_base.arg_to_scheduler_metavar == "{cosine, cosine_w_restarts, linear, polynomial}"
    assert set(lightning_base.arg_to_scheduler) == set(lightning_base.arg_to_scheduler_choices)
