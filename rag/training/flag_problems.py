"""What is wrong with the settings of a finetuning run: numbers out of range, settings that contradict each other.

    raise_problems(range_problems(args) + contradictions(args) + run_problems(args.run))

All of it is found before torch is imported, one line a problem.
"""

import difflib
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.command_line.trainer_flags import TrainerArguments
from rag.distributed.meeting import timeout_problems
from rag.retrieval.arguments import UPR
from rag.training.retrieval_problems import nothing_learns, retrieval_contradictions, scores_that_teach_nothing

if TYPE_CHECKING:
    from rag.training import arguments
    from rag.training.arguments import FinetuneArguments, ModelArguments, RunArguments

LARGEST_NUMBER = 2**31 - 1  # of anything counted: libraries in C take no larger one
LARGEST_SEED = 2**32 - 1  # numpy's generator takes no larger one
MOST_PROCESSES = 1024  # that embed, as in use_own_knowledge_dataset.py
LARGEST_LEARNING_RATE = 10.0  # of both optimizers; a step of such a size leaves nothing of a pretrained model
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
# Where a log can go, and the package that it takes.
REPORTS = {
    "jsonl": None,
    "csv": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
A_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def _is_time(value: Any) -> bool:
    return isinstance(value, str) and A_TIME.fullmatch(value.strip()) is not None and bool(re.search("[1-9]", value))


def _is_batches(value: Any) -> bool:
    """A number of batches or a share of them, more than none."""
    return value >= 1 if isinstance(value, int) else 0 < value <= 1


def _is_interval(value: Any) -> bool:
    return _is_time(value) if isinstance(value, str) else _is_batches(value)


def _are_devices(value: Any) -> bool:
    """`auto`, a number of devices, -1 for all, or their indices."""
    if isinstance(value, int):
        return value == -1 or value >= 1
    return value == "auto" or all(part.strip().isdigit() for part in value.strip("[], ").split(","))


LAYERS_LEFT_OUT = "no rank knows which layers another leaves out"
BATCHES = "must be a number of batches from 1 on, or a share of them above 0 and up to 1.0"
# Names of settings, what a good value is, and what the message says of another.
RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        """num_retrieval_workers max_source_length max_target_length num_processes train_batch_size eval_batch_size
        num_beams num_train_epochs gradient_accumulation_steps n_docs max_combined_length num_nodes
        check_val_every_n_epoch lora_r question_encoder_lora_r over_retrieve""",
        lambda value: value >= 1,
        "must be 1 or more",
    ),
    (
        "refresh_processes",
        lambda value: 1 <= value <= MOST_PROCESSES,
        f"must be from 1 to {MOST_PROCESSES:,}: those of a machine",
    ),
    (
        "val_max_target_length test_max_target_length",
        lambda value: value >= 2,
        "must be 2 or more: the token that generation begins with counts",
    ),
    (
        """num_workers warmup_steps weight_decay adam_epsilon max_grad_norm save_interval retrieval_worker_gpus
        min_epochs min_steps""",
        lambda value: value >= 0,
        "must be 0 or more",
    ),
    (
        "learning_rate question_encoder_learning_rate context_encoder_learning_rate decoder_learning_rate",
        lambda value: 0 <= value <= LARGEST_LEARNING_RATE,
        f"must be 0 or more, and {LARGEST_LEARNING_RATE:g} or less: 5e-5 is usual",
    ),
    ("seed", lambda value: 0 <= value <= LARGEST_SEED, f"must be 0 or more, and {LARGEST_SEED} or less"),
    (
        "encoder_layerdrop decoder_layerdrop dropout attention_dropout lora_dropout label_smoothing",
        lambda value: 0 <= value < 1,
        "must be a probability, from 0 to below 1",
    ),
    (
        "retriever_loss_weight retriever_temperature teacher_temperature",
        lambda value: value > 0,
        "must be more than 0; 1 is usual",
    ),
    ("lora_alpha", lambda value: value > 0, "must be more than 0; left out, it is twice --lora_r"),
    ("early_stopping_patience num_sanity_val_steps", lambda value: value >= -1, "must be -1 or more"),
    ("n_train n_val n_test", lambda value: value == -1 or value >= 1, "must be -1 (all) or 1 or more"),
    ("max_steps", lambda value: value == -1 or value >= 1, "must be -1 (no limit) or 1 or more"),
    ("log_every_n_steps", lambda value: value >= 1, "must be 1 or more; a large number logs once an epoch"),
    ("fast_dev_run", lambda value: value >= 0, "must be true, false or a number of batches"),
    ("limit_train_batches", _is_batches, f"{BATCHES}; left out, all"),
    ("limit_val_batches limit_test_batches overfit_batches", lambda value: value == 0 or _is_batches(value), BATCHES),
    ("max_time", _is_time, "must be a time of more than 0, as DD:HH:MM:SS (00:12:00:00 is twelve hours)"),
    ("val_check_interval", _is_interval, f"{BATCHES}, or a time as DD:HH:MM:SS"),
    ("devices", _are_devices, "must be auto, a number from 1 on, -1 for all, or indices such as 0,1"),
    ("accelerator", lambda value: value in ACCELERATORS, f"is none of: {', '.join(ACCELERATORS)}"),
    ("gradient_clip_algorithm", lambda value: value in ("norm", "value"), "is none of: norm, value"),
    ("cache_dir", lambda value: not Path(value).is_file(), "is a file; give a folder for downloads"),
]


def range_problems(args: "FinetuneArguments") -> list[str]:
    """Each setting for itself."""
    values = {name: value for group in vars(args).values() for name, value in vars(group).items() if value is not None}
    problems = {
        name: f"--{name} {values[name]} {rule}"
        for names, is_good, rule in RULES
        for name in names.split()
        if name in values and not is_good(values[name])
    }
    for name, value in values.items():
        if name == "seed":
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems[name] = f"--{name} {value} must be a finite number"
        elif isinstance(value, int) and value > LARGEST_NUMBER:
            problems.setdefault(name, f"--{name} {value} must be {LARGEST_NUMBER} or less")
    return list(problems.values())


def contradictions(args: "FinetuneArguments") -> list[str]:
    """Settings that cannot be given together."""
    run, trainer = args.run, args.trainer
    problems = retrieval_contradictions(args) + _data_contradictions(args.data)
    precisions = [f"--{name}" for name in ("fp16", "bf16") if getattr(args.training, name)]
    precisions += [f"--precision {trainer.precision}"] if trainer.precision is not None else []
    if len(precisions) > 1:
        problems.append(f"{' and '.join(precisions)} contradict each other; give one of them")
    problems += _adapter_contradictions(args) + _length_contradictions(args) + _sharding_contradictions(args)
    return problems + _gpu_contradictions(run, trainer) + _lightning_1_contradictions(run, trainer)


def _data_contradictions(data: "arguments.DataArguments") -> list[str]:
    if data.data_dir is None and data.dataset_name is None:
        return ["--data_dir is missing; give a folder of train|val|test .source and .target, or --dataset_name"]
    if data.data_dir is not None and data.dataset_name is not None:
        return [f"--data_dir {data.data_dir} and --dataset_name {data.dataset_name} both name the data; give one"]
    return data.dataset_problems()


def _sharding_contradictions(args: "FinetuneArguments") -> list[str]:
    """What a strategy that shards the weights cannot do, and strategies whose weights could not be exported."""
    strategy, model, training = args.trainer.strategy, args.model, args.training
    if strategy.startswith(("fsdp_", "deepspeed")):
        return [f"--strategy {strategy}: its checkpoints cannot be exported for Hugging Face; give fsdp"]
    if strategy != "fsdp":
        return []
    given = {
        "--compile": (model.compile, "its layers are gathered one by one"),
        "--adafactor": (training.adafactor, "it needs whole rows and columns of a weight"),
        f"--encoder_layerdrop {model.encoder_layerdrop}": (model.encoder_layerdrop, LAYERS_LEFT_OUT),
        f"--decoder_layerdrop {model.decoder_layerdrop}": (model.decoder_layerdrop, LAYERS_LEFT_OUT),
        f"--reranker {UPR}": (args.retrieval.reranker == UPR, "it reads the generator outside of a step"),
    }
    problems = [
        f"--strategy fsdp and {flag} contradict each other: {why}; leave one out"
        for flag, (is_given, why) in given.items()
        if is_given
    ]
    precision = "--fp16" if training.fp16 else f"--precision {args.trainer.precision}"
    if training.fp16 or str(args.trainer.precision) in ("16", "16-mixed", "16-true"):
        problems.append(f"--strategy fsdp and {precision} (float16) contradict each other; give --bf16")
    return problems


def _adapter_contradictions(args: "FinetuneArguments") -> list[str]:
    """Flags of adapters that have none to be about, and what would leave nothing to learn."""
    model, problems = args.model, []
    quantized = [f"--load_in_{bits}" for bits in ("4bit", "8bit") if getattr(model, f"load_in_{bits}")]
    if len(quantized) > 1:
        problems.append(f"{' and '.join(quantized)} contradict each other; give one of them")
    if quantized and model.lora_r is None and not model.freeze_generator:
        problems.append(
            f"{quantized[0]}: what is quantized cannot be trained; give --lora_r 16 to train adapters beside it, or "
            "--freeze_generator"
        )
    if model.lora_r is None:
        given = [f"--{name}" for name in ("lora_alpha", "lora_target_modules") if getattr(model, name) is not None]
        given += ["--lora_dropout"] if model.lora_dropout and model.question_encoder_lora_r is None else []
        problems += [f"{name} is for adapters; give --lora_r, or leave it out" for name in given]
    if model.lora_r is not None and model.freeze_generator:
        problems.append("--lora_r and --freeze_generator contradict each other; give one of them")
    if model.question_encoder_lora_r is not None:
        given = ["--freeze_question_encoder"] if model.freeze_question_encoder else []
        given += list(scores_that_teach_nothing(args.retrieval))
        problems += [f"--question_encoder_lora_r and {flag} contradict each other; give one of them" for flag in given]
    problems += nothing_learns(args)
    if args.trainer.strategy == "fsdp" and (flag := _flag_of_frozen_parts(model)) is not None:
        problems.append(
            f"--strategy fsdp shares out what learns, and {flag} leaves little of that; give --strategy ddp or leave "
            "it out"
        )
    return problems


def _flag_of_frozen_parts(model: "ModelArguments") -> str | None:
    """A flag that leaves whole parts of a model as they are in checkpoints of what was trained alone."""
    if model.lora_r is not None:
        return f"--lora_r {model.lora_r}"
    if model.question_encoder_lora_r is not None:
        return f"--question_encoder_lora_r {model.question_encoder_lora_r}"
    return "--freeze_generator" if model.freeze_generator else None


def _length_contradictions(args: "FinetuneArguments") -> list[str]:
    """Settings of how long to train, and how often to measure, that cannot both be meant."""
    trainer, epochs, problems = args.trainer, args.training.num_train_epochs, []
    if trainer.min_epochs is not None and trainer.min_epochs > epochs:
        problems.append(f"--min_epochs {trainer.min_epochs} is more than --num_train_epochs {epochs}; lower it")
    if trainer.min_steps is not None and 0 < trainer.max_steps < trainer.min_steps:
        problems.append(f"--min_steps {trainer.min_steps} is more than --max_steps {trainer.max_steps}; lower it")
    if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, float | None):
        problems.append(
            "--check_val_every_n_epoch null needs --val_check_interval as a number of batches or a time; give it"
        )
    if args.run.do_predict and trainer.limit_test_batches == 0:
        problems.append("--limit_test_batches 0 leaves nothing for --do_predict; leave one out")
    return problems


def _gpu_contradictions(run: "RunArguments", trainer: TrainerArguments) -> list[str]:
    if run.gpus is None:
        return []
    problems = []
    if trainer.devices != "auto":
        problems.append(f"--gpus {run.gpus} and --devices {trainer.devices} both count devices; give one")
    if trainer.accelerator not in (("auto", "cpu") if run.gpus.strip() == "0" else ("auto", "gpu", "cuda")):
        problems.append(f"--gpus {run.gpus} contradicts --accelerator {trainer.accelerator}; leave one out")
    if run.gpus.strip() != "-1" and not all(part.strip().isdigit() for part in run.gpus.split(",")):
        problems.append(
            f"--gpus {run.gpus} is neither a number of GPUs (-1 for all of them) nor a list of theirs such as 0,1"
        )
    return problems


def _lightning_1_contradictions(run: "RunArguments", trainer: TrainerArguments) -> list[str]:
    """What --num_processes and --distributed_backend cannot be given with."""
    problems = []
    if run.num_processes is not None and trainer.devices not in ("auto", run.num_processes):
        problems.append(
            f"--num_processes {run.num_processes} and --devices {trainer.devices} both count processes; give one"
        )
    off_the_cpu = f"--accelerator {trainer.accelerator}" if trainer.accelerator not in ("auto", "cpu") else None
    if run.gpus is not None and run.gpus.strip() != "0":
        off_the_cpu = f"--gpus {run.gpus}"
    if off_the_cpu and run.num_processes is not None and run.gpus != str(run.num_processes):
        problems.append(
            f"--num_processes {run.num_processes} counts processes on the CPU, {off_the_cpu} asks for another device; "
            "leave one out"
        )
    if off_the_cpu and run.distributed_backend == "ddp_cpu":
        problems.append(f"--distributed_backend ddp_cpu contradicts {off_the_cpu}; leave one out")
    if run.distributed_backend in ("ddp", "ddp_spawn") and trainer.strategy not in ("auto", "ddp"):
        problems.append(
            f"--distributed_backend {run.distributed_backend} contradicts --strategy {trainer.strategy}; leave one out"
        )
    return problems


def package_problems(model: "ModelArguments") -> list[str]:
    """The package that adapters need, if it is missing."""
    given = [name for name in ("lora_r", "question_encoder_lora_r") if getattr(model, name) is not None]
    if not given or importlib.util.find_spec("peft") is not None:
        return []
    return [f"--{given[0]} needs a package that is not installed: pip install peft"]


def run_problems(run: "RunArguments") -> list[str]:
    """Checkpoints and packages that are named and missing."""
    problems = timeout_problems(run.rank_timeout)
    resumed = run.resume_from_checkpoint
    if resumed is not None and not Path(resumed).is_file():
        what = "is a folder, not a Lightning checkpoint" if Path(resumed).is_dir() else "does not exist"
        problems.append(f"--resume_from_checkpoint {resumed} {what}; leave it out to resume from last.ckpt")
    if resumed is not None and run.overwrite_output_dir:
        problems.append("--overwrite_output_dir would remove what --resume_from_checkpoint resumes; give one")
    return problems + report_problems(run)


def report_problems(run: "RunArguments") -> list[str]:
    """Loggers that there are not, that need a package, or that --logger_name and --report_to disagree about."""
    named = run.report_to
    if named is not None and not named:
        return [f"--report_to names nothing; give some of {', '.join(REPORTS)}, or leave it out"]
    problems = []
    for name in named or []:
        if name not in REPORTS:
            close = difflib.get_close_matches(name, REPORTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"--report_to {name} is none of {', '.join(REPORTS)}{hint}")
    if named is not None and run.logger_name != "default" and "wandb" not in named:
        problems.append(
            f"--logger_name {run.logger_name} sends to Weights & Biases, --report_to {','.join(named)} does not; "
            "add wandb to --report_to, or leave --logger_name out"
        )
    for name in run.reports:
        package = REPORTS.get(name)
        if package is not None and not is_installed(package):
            flag = f"--report_to {name}" if name in (named or []) else f"--logger_name {run.logger_name}"
            problems.append(f"{flag} needs a package that is not installed: pip install {package}")
    return problems


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as one that wandb left, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
