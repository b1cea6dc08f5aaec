"""The flags of finetune_rag.py: the public suite's names and defaults, the Trainer's own, mistakes in one line each."""

import inspect
import json
import socket
import subprocess
import sys
import types
import typing

import pytest

from rag.command_line.trainer_flags import SET_BY_THE_SUITE, TrainerArguments
from rag.errors import UserError
from rag.training.arguments import parse_args, trainer_kwargs
from tests.conftest import ROOT

NEEDED = ["--model_name_or_path", "m", "--data_dir", "d"]
PUBLIC_DEFAULTS = {
    "model": {"config_name": None, "tokenizer_name": None, "cache_dir": None, "dropout": None, "label_smoothing": 0.0},
    "retrieval": {"distributed_retriever": "pytorch", "ray_address": "auto", "num_retrieval_workers": 1,
                  "index_name": None, "passages_path": None, "index_path": None, "use_dummy_dataset": False,
                  "distributed_port": -1},
    "data": {"max_source_length": 128, "max_target_length": 25, "val_max_target_length": 25,
             "test_max_target_length": 25, "n_train": -1, "n_val": -1, "n_test": -1, "train_batch_size": 32,
             "eval_batch_size": 32, "num_workers": 4},
    "training": {"learning_rate": 5e-5, "lr_scheduler": "linear", "weight_decay": 0.0, "adam_epsilon": 1e-8,
                 "warmup_steps": 0, "num_train_epochs": 3, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1,
                 "seed": 42, "early_stopping_patience": -1, "adafactor": False, "fp16": False},
    "run": {"logger_name": "default", "gpus": None, "n_tpu_cores": None, "profile": False, "do_predict": False},
}  # fmt: skip


def parse(folder, *flags):
    return parse_args([*NEEDED, "--output_dir", str(folder / "out"), *flags])


def mistakes(folder, *flags) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(folder, *flags)
    return str(error.value).splitlines()


def test_defaults_are_the_public_suites(tmp_path):
    args = parse(tmp_path).to_dict()
    for group, defaults in PUBLIC_DEFAULTS.items():
        assert {name: args[group][name] for name in defaults} == defaults
    assert args == json.loads(json.dumps(args))


def test_it_trains_unless_only_prediction_is_asked_for(tmp_path):
    done = [(args.run.do_train, args.run.do_predict) for args in (
        parse(tmp_path), parse(tmp_path, "--do_train"), parse(tmp_path, "--do_predict"),
        parse(tmp_path, "--do-train", "--do-predict"),
    )]  # fmt: skip
    assert done == [(True, False), (True, False), (False, True), (True, True)]


def test_trainer_flags_are_the_trainers_parameters(tmp_path):
    import pytorch_lightning as pl

    parameters = inspect.signature(inspect.unwrap(pl.Trainer.__init__)).parameters
    given = vars(parse(tmp_path).trainer)
    assert given == {name: parameters[name].default for name in given}
    assert set(given) | SET_BY_THE_SUITE | {"self"} == set(parameters)
    for (
        name
    ) in """val_check_interval check_val_every_n_epoch fast_dev_run max_steps limit_train_batches limit_val_batches
        limit_test_batches num_nodes accelerator devices strategy precision num_sanity_val_steps log_every_n_steps
        overfit_batches deterministic max_time""".split():  # noqa: SIM905
        assert name in given


def plain_types(annotation) -> set:
    """The types that a command line can hold, and the literals, of an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {plain for part in typing.get_args(annotation) for plain in plain_types(part)}
    return {annotation} & {int, float, str, bool, type(None)}


def test_trainer_flags_have_the_types_of_the_trainers_parameters():
    import pytorch_lightning as pl

    theirs = typing.get_type_hints(inspect.unwrap(pl.Trainer.__init__))
    ours = {"precision": {"auto"}}  # words beside theirs
    for name, annotation in typing.get_type_hints(TrainerArguments).items():
        assert plain_types(annotation) == plain_types(theirs[name]) | ours.get(name, set()), name


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--limit_val_batches", "0.5"], 0.5),
        (["--limit-val-batches", "2"], 2),
        (["--max_steps", "-1"], -1),
        (["--fast_dev_run"], True),
        (["--fast_dev_run", "3"], 3),
        (["--deterministic", "warn"], "warn"),
        (["--inference_mode", "false"], False),
        (["--check_val_every_n_epoch", "null", "--val_check_interval", "5"], None),
        (["--devices", "0,1"], "0,1"),
        (["--devices", "2"], 2),
        (["--precision", "16"], 16),
        (["--precision", "bf16-mixed"], "bf16-mixed"),
        (["--max_time", "00:12:00:00"], "00:12:00:00"),
    ],
)
def test_trainer_values_are_read_as_yaml_would(flags, value, tmp_path):
    given = getattr(parse(tmp_path, *flags).trainer, flags[0].removeprefix("--").replace("-", "_"))
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--precision", "15"], "16-mixed"),
        (["--max_steps", "1.5"], "int"),
        (["--deterministic", "maybe"], "warn"),
        (["--detect_anomaly", "2"], "bool"),
        (["--lr_scheduler", "stairs"], "polynomial"),
        (["--model_type", "gpt"], "rag_token"),
    ],
)
def test_values_outside_what_is_allowed_are_refused_with_what_is(flags, allowed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(tmp_path, *flags)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert flags[0] in message and allowed in message


def test_all_mistakes_are_told_at_once(tmp_path):
    told = mistakes(
        tmp_path, "--train_batch_size", "0", "--learning_rate", "-1", "--dropout", "1.5", "--fp16", "--bf16",
        "--n_train", "0", "--gpus", "two", "--early_stopping_patience", "-2", "--resume_from_checkpoint", "gone.ckpt",
    )  # fmt: skip
    for part in ("--train_batch_size 0 must be 1", "--learning_rate -1.0 must be 0", "--dropout 1.5 must be a prob",
                 "--fp16 and --bf16 contradict", "--n_train 0", "--gpus two is neither", "--early_stopping_patience -2",
                 "--resume_from_checkpoint gone.ckpt does not exist"):  # fmt: skip
        assert sum(part in line for line in told) == 1
    assert len(told) == 8


OUT_OF_RANGE = {
    "--seed": ["-1", str(2**32), str(2**70)],
    "--learning_rate": ["-1", "nan", "inf", "1e30", "11"],
    "--question_encoder_learning_rate": ["-inf", "12"],
    "--dropout": ["1", "-0.1", "nan"],
    "--weight_decay": ["nan", "-1"],
    "--adam_epsilon": ["nan", "inf"],
    "--save_interval": ["nan", "-1", "inf"],
    "--retrieval_worker_gpus": ["nan"],
    "--max_time": ["30", "xx", "1:2", "00:00:00:00", "1:00:00"],
    "--val_check_interval": ["0", "-1", "x", "2.0", "nan", "1:00"],
    "--limit_train_batches": ["0", "-1", "1.5", "nan"],
    "--limit_val_batches": ["-1", "1.5"],
    "--overfit_batches": ["-1", "1.5"],
    "--check_val_every_n_epoch": ["0", "-1", "null"],
    "--num_sanity_val_steps": ["-2"],
    "--log_every_n_steps": ["0", "-1"],
    "--max_steps": ["0", "-2"],
    "--min_steps": ["-1"],
    "--min_epochs": ["-1", "4"],
    "--fast_dev_run": ["-1"],
    "--val_max_target_length": ["1", "0"],
    "--test_max_target_length": ["1"],
    "--max_source_length": ["0", str(2**31), str(10**30)],
    "--devices": ["0", "-3", "abc", "1.5", "0,x"],
    "--gpus": ["", "-2", "0,x"],
    "--num_nodes": ["0"],
    "--accelerator": ["abacus", ""],
    "--gradient_clip_algorithm": ["xyz"],
    "--cache_dir": [__file__],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_is_out_of_range_is_one_line_that_begins_with_the_flag(name, tmp_path):
    for value in OUT_OF_RANGE[name]:
        told = mistakes(tmp_path, f"{name}={value}")
        assert len([line for line in told if line.startswith(f"{name} ")]) == 1, (value, told)


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--max_epochs", "0"], "--max_epochs 0 "),
        (["--max-epochs=0"], "--max_epochs 0 "),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 "),
        (["--gradient-clip-val", "-1"], "--gradient_clip_val -1.0 "),
        (["--accumulate_grad_batches", "0"], "--accumulate_grad_batches 0 "),
        (["--max_epochs", "1", "--min_epochs", "2"], "--min_epochs 2 is more than --max_epochs 1"),
    ],
)
def test_a_setting_is_told_under_the_name_it_was_given_by(flags, given, tmp_path):
    (told,) = mistakes(tmp_path, *flags)
    assert told.startswith(given)


def test_the_name_that_a_file_uses_is_told_too(tmp_path):
    (tmp_path / "run.yaml").write_text("max_epochs: 0\n")
    assert mistakes(tmp_path, "--config_file", str(tmp_path / "run.yaml"))[0].startswith("--max_epochs 0 ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit_test_batches", "0", "--do_predict"],
        ["--min_steps", "3", "--max_steps", "2"],
        ["--check_val_every_n_epoch", "null", "--val_check_interval", "0.5"],
        ["--gpus", "2", "--devices", "2"],
        ["--gpus", "2", "--accelerator", "cpu"],
        ["--gpus", "0", "--accelerator", "gpu"],
        ["--fp16", "--precision", "32"],
        ["--logger_name", "wandb"],
        ["--num_processes", "2", "--devices", "4"],
        ["--num_processes", "2", "--gpus", "4"],
        ["--num_processes", "2", "--accelerator", "gpu"],
        ["--distributed_backend", "ddp_cpu", "--gpus", "1"],
        ["--distributed_backend", "ddp_cpu", "--accelerator", "cuda"],
        ["--distributed_backend", "ddp", "--strategy", "fsdp"],
    ],
)
def test_contradictions_and_missing_packages_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert flags[0] in mistakes(tmp_path, *flags)[0]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {"accelerator": "auto", "devices": "auto", "precision": None, "strategy": "auto"}),
        (["--gpus", "8"], {"accelerator": "gpu", "devices": 8}),
        (["--gpus", "-1"], {"accelerator": "gpu", "devices": -1}),
        (["--gpus", "0,1"], {"accelerator": "gpu", "devices": "0,1"}),
        (["--gpus", "0"], {"accelerator": "cpu", "devices": 1}),
        (["--gpus", "0", "--accelerator", "cpu"], {"accelerator": "cpu", "devices": 1}),
        (["--fp16"], {"precision": "16-mixed"}),
        (["--bf16"], {"precision": "bf16-mixed"}),
        (["--decoder_layerdrop", "0.1"], {"strategy": "ddp_find_unused_parameters_true"}),
        (["--num_train_epochs", "5", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.1"],
         {"max_epochs": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (["--max_epochs", "5", "--accumulate-grad-batches", "2", "--gradient_clip_val", "0.1"],
         {"max_epochs": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (["--gpus=0", "--distributed_backend=ddp_cpu", "--num_processes=2"],
         {"accelerator": "cpu", "devices": 2, "strategy": "auto"}),
        (["--num-processes", "3"], {"accelerator": "cpu", "devices": 3}),
        (["--num_processes", "2", "--devices", "2"], {"accelerator": "cpu", "devices": 2}),
        (["--num_processes", "2", "--gpus", "2"], {"accelerator": "gpu", "devices": 2}),
        (["--distributed_backend", "ddp_cpu"], {"accelerator": "cpu", "devices": "auto"}),
        (["--distributed_backend", "ddp_cpu", "--devices", "2"], {"accelerator": "cpu", "devices": 2}),
        (["--distributed-backend", "ddp", "--gpus", "4"], {"accelerator": "gpu", "devices": 4, "strategy": "ddp"}),
        (["--distributed_backend", "ddp_spawn"], {"accelerator": "auto", "strategy": "ddp"}),
        (["--distributed_backend", "ddp", "--decoder_layerdrop", "0.1"],
         {"strategy": "ddp_find_unused_parameters_true"}),
    ],
)  # fmt: skip
def test_the_suites_names_reach_the_trainer(flags, settings, tmp_path):
    made = trainer_kwargs(parse(tmp_path, *flags))
    assert {name: made[name] for name in settings} == settings


ALIASES = [
    ("--num_train_epochs", "--max_epochs"),
    ("--max_grad_norm", "--gradient_clip_val"),
    ("--gradient_accumulation_steps", "--accumulate_grad_batches"),
]


@pytest.mark.parametrize(("name", "alias"), ALIASES)
def test_a_setting_under_two_names_has_one_value(name, alias, tmp_path, capsys):
    assert parse(tmp_path, name, "2", alias, "2").to_dict() == parse(tmp_path, name, "2").to_dict()
    for flags in ([name, "2", alias, "3"], [alias, "3", name.replace("_", "-"), "2"]):
        with pytest.raises(SystemExit) as stopped:
            parse(tmp_path, *flags)
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and message.count("\n") == 1
        assert f"{name} 2 and {alias} 3 are one setting" in message


def test_a_file_may_name_a_setting_otherwise_than_the_command_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("num_train_epochs: 2\n")
    assert parse(tmp_path, "--config_file", str(file), "--max_epochs", "4").training.num_train_epochs == 4
    file.write_text("num_train_epochs: 2\nmax_epochs: 3\n")
    with pytest.raises(SystemExit):
        parse(tmp_path, "--config_file", str(file))
    assert "--num_train_epochs 2 and --max_epochs 3 are one setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--devices", "2"], {}, "MASTER_PORT {port} is used by another process"),
        (["--gpus", "2"], {}, "MASTER_PORT {port} is used by another process"),
        # It may be rank 0's, on another node.
        (["--devices", "2", "--num_nodes", "2"], {"MASTER_ADDR": "node0", "NODE_RANK": "1"}, None),
        (["--num_nodes", "2"], {}, "--num_nodes 2: MASTER_ADDR not set"),
        (["--devices", "2"], {"SLURM_PROCID": "1"}, None),
        (["--devices", "1"], {}, None),
        (
            ["--devices", "3"],
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
            "makes 3 ranks, torchrun",
        ),
        (["--devices", "2"], {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, None),
    ],
)
def test_ranks_that_cannot_meet_are_told_before_torch_is_imported(flags, environment, message, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        if message is None:
            parse(tmp_path, *flags)
        else:
            assert message.format(port=port) in mistakes(tmp_path, *flags)[0]


def test_flags_without_effect_say_so(tmp_path, caplog):
    parse(tmp_path, "--fp16_opt_level", "O1", "--n_tpu_cores", "8", "--distributed-port", "9")
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "--fp16_opt_level", "--n_tpu_cores", "--distributed_port",
    ]  # fmt: skip
    caplog.clear()
    parse(tmp_path)
    assert not caplog.records


def test_a_folder_with_a_run_is_gone_on_with(tmp_path):
    assert parse(tmp_path).run.resume_from_checkpoint is None
    (tmp_path / "out").mkdir()
    last = tmp_path / "out" / "last.ckpt"
    last.touch()
    assert parse(tmp_path).run.resume_from_checkpoint == str(last)
    assert parse(tmp_path, "--overwrite_output_dir").run.resume_from_checkpoint is None
    assert parse(tmp_path, "--do_predict").run.resume_from_checkpoint is None
    assert "--overwrite_output_dir" in mistakes(
        tmp_path, "--overwrite_output_dir", "--resume_from_checkpoint", str(last)
    )[0]  # fmt: skip


def test_settings_come_from_a_file_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_batch_size: 3\nmax_steps: 7\ndeterministic: true\nval_check_interval: 0.5\nfp16: false\n")
    args = parse(tmp_path, "--config_file", str(file), "--max_steps", "8")
    assert args.data.train_batch_size == 3 and args.training.fp16 is False
    assert (args.trainer.max_steps, args.trainer.deterministic, args.trainer.val_check_interval) == (
        8,
        True,
        0.5,
    )


def test_help_needs_neither_torch_nor_lightning():
    code = (
        "import sys; from rag.training.arguments import parse_args\n"
        "try: parse_args(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    for flag in ("--learning_rate", "--ray-address", "--val_check_interval", "--limit_train_batches", "--bf16"):
        assert flag in shown
    for _, alias in ALIASES:
        assert f"{alias} is another name for it" in " ".join(shown.split())
