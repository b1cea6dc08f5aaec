"""The Lightning Trainer's settings that a command line can hold, under the Trainer's names and with its defaults.

    add_trainer_flags(parser.add_argument_group("Lightning Trainer"))
    trainer = TrainerArguments(**vars(parser.parse_args()))

Lightning is not imported, which would take seconds of every `--help`; a test compares names, types and defaults with
the Trainer's signature.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rag.command_line.flags import flag

# The Trainer's other settings: objects, settings that the suite makes itself or under the public suite's names, and
# what it has no use for.
SET_BY_THE_SUITE = {
    "accumulate_grad_batches",  # --gradient_accumulation_steps
    "barebones",
    "callbacks",
    "default_root_dir",  # --output_dir
    "enable_autolog_hparams",
    "enable_checkpointing",
    "gradient_clip_val",  # --max_grad_norm
    "limit_predict_batches",
    "logger",  # --report_to
    "max_epochs",  # --num_train_epochs
    "model_registry",
    "plugins",
    "profiler",  # --profile
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
}
WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclasses.dataclass
class TrainerArguments:
    """Where training runs, how long, and how often it is measured."""

    accelerator: str = flag("auto", "What to train on: cpu, gpu, tpu, mps; auto takes the best this machine has.")
    strategy: str = flag(
        "auto", "How processes train together: ddp (auto, for several), or fsdp, each with a slice of the weights."
    )
    devices: int | str = flag("auto", "Devices on each node: a number, their indices (0,1) or -1 for all.")
    num_nodes: int = flag(1, "Machines that train together.")
    precision: Literal[
        64, 32, 16, "transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true",
        "bf16-mixed", "32-true", "64-true", "64", "32", "16", "bf16", "auto",
    ] | None = flag(
        None,
        "Number format: 32-true, bf16-mixed, 16-mixed (GPU only), or auto: bf16-mixed where the machine multiplies "
        "bfloat16 faster (GPUs, CPUs with AMX or AVX512-BF16); left out, 32-true.",
    )  # fmt: skip
    fast_dev_run: int | bool = flag(
        False, "Try the code: run this many batches (1 without a number) of each split and write no checkpoint."
    )
    min_epochs: int | None = flag(None, "Epochs before early stopping may end the training.")
    max_steps: int = flag(-1, "Optimizer steps after which training ends; -1 sets no limit.")
    min_steps: int | None = flag(None, "Optimizer steps before early stopping may end the training.")
    max_time: str | None = flag(None, "Time after which training ends, as DD:HH:MM:SS; left out, no limit.")
    limit_train_batches: int | float | None = flag(
        None, "Training batches an epoch: a number for each device, or a share of them (0.5); left out, all."
    )
    limit_val_batches: int | float | None = flag(
        None, "Validation batches: a number for each device, or a share of them; 0 skips validation; left out, all."
    )
    limit_test_batches: int | float | None = flag(
        None, "Test batches: a number for each device, or a share of them; left out, all."
    )
    overfit_batches: int | float = flag(
        0.0, "Train on the same few batches in every epoch to try the code: a number or a share; 0 is off."
    )
    val_check_interval: int | float | str | None = flag(
        None,
        "When to validate inside an epoch: after a share of its batches (0.25), a number of batches (500) or a time "
        "(DD:HH:MM:SS); left out, at its end. With --check_val_every_n_epoch null batches are counted across epochs.",
    )
    check_val_every_n_epoch: int | None = flag(
        1, "Validate in every n-th epoch; null goes by --val_check_interval alone."
    )
    num_sanity_val_steps: int | None = flag(
        None, "Validation batches run before training to find mistakes early; -1 is all; left out, 2."
    )
    log_every_n_steps: int | None = flag(None, "Optimizer steps between two logged steps; left out, 50.")
    enable_progress_bar: bool | None = flag(
        None, "Show a progress bar; left out, on a terminal only, and lines in a log file instead."
    )
    enable_model_summary: bool | None = flag(
        None, "Print Lightning's table of the model's parts first; left out, one line says how much learns."
    )
    gradient_clip_algorithm: str | None = flag(
        None, "How --max_grad_norm limits gradients: norm (of all together) or value (each); left out, norm."
    )
    deterministic: bool | Literal["warn"] | None = flag(
        None, "Use algorithms that give the same result every time, slower; warn: where there are any; left out, false."
    )
    benchmark: bool | None = flag(
        None, "Let cuDNN try which algorithms are fastest, which helps inputs of one size; left out, torch's setting."
    )
    inference_mode: bool = flag(True, "Validate and test in torch.inference_mode; false uses torch.no_grad.")
    detect_anomaly: bool = flag(False, "Find the operation that made a NaN gradient; slow, for debugging only.")
    sync_batchnorm: bool = flag(
        False, "Share batch norm's statistics between processes; BART, T5 and DPR have no batch norm."
    )


def add_trainer_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for each setting of the Trainer; values are read as YAML would (0.5, 2, true, null)."""
    types = get_type_hints(TrainerArguments)
    for field in dataclasses.fields(TrainerArguments):
        may_stand_alone = bool in _plain_types(types[field.name])
        alone: dict[str, Any] = {"nargs": "?", "const": True} if may_stand_alone else {}
        parser.add_argument(
            *dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]),
            type=_value_reader(types[field.name]),
            default=field.default,
            help=field.metadata["help"],
            **alone,
        )


def _plain_types(annotation: Any) -> list[Any]:
    """The types of a union and the values of its literals, in their order."""
    if get_origin(annotation) is None:
        return [annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [plain for part in get_args(annotation) for plain in _plain_types(part)]


def _value_reader(annotation: Any) -> Callable[[str], Any]:
    """A reader of one value that refuses what the annotation does not allow."""
    allowed = _plain_types(annotation)

    def read(text: str) -> Any:
        value = _plain_value(text)
        if type(value) in allowed or value in allowed:
            return value
        if str in allowed or text in allowed:
            return text
        names = [plain.__name__ if isinstance(plain, type) else str(plain) for plain in allowed]
        names = ["null" if name == "NoneType" else name for name in names]
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(dict.fromkeys(names))}")

    return read


def _plain_value(text: str) -> Any:
    """`0.5` as a float, `2` as an int, `true` and `null` as such, anything else as it is."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
