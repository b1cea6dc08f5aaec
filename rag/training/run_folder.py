"""The run that --output_dir holds: held by one command at a time, continued from what is whole of it, or refused.

    with held(args.run.output_dir):
        raise_problems(continuation_problems(args))
        args.run.resume_from_checkpoint = checkpoint_to_resume(args)

Nothing heavy is imported, so that a mistake is told at once.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rag.errors import UserError
from rag.files import read_state
from rag.locks import one_at_a_time
from rag.training.arguments import FinetuneArguments
from rag.training.seals import is_whole

# What an earlier run in the same folder must agree with, for this one to be its continuation. Left out: what changes
# neither weights nor order of examples, how long to train, and what to do when there is no way on.
FREE_TO_CHANGE = {
    "retrieval": {
        "distributed_retriever",
        "ray_address",
        "num_retrieval_workers",
        "retrieval_worker_gpus",
        "refresh_device",
        "refresh_processes",
        "distributed_port",
    },
    "data": {"eval_batch_size", "num_workers", "n_test", "test_max_target_length", "dataset_digest"},
    "training": {"num_train_epochs", "early_stopping_patience", "fp16_opt_level", "nan_policy"},
}
COMPARED = ("model", "retrieval", "data", "training")
# The number of a process in its job, as torchrun, Lightning, SLURM, Open MPI, other MPIs and LSF tell it.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK",
                  "JSM_NAMESPACE_RANK")  # fmt: skip
SPLITS = ("train", "val", "test")
PRECISIONS = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


def is_rank_zero() -> bool:
    """Whether this process is a job's first, or alone: as far as its launcher says, before the ranks meet."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


@contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Let no other command use --output_dir while the block runs; the first rank of a job holds it for all.

    Raises:
        UserError: another command uses it.
    """
    if not is_rank_zero():
        yield
        return
    with one_at_a_time(Path(folder) / ".lock", "--output_dir", folder):
        yield


def continuation_problems(args: FinetuneArguments) -> list[str]:
    """What keeps this run from going on with the one that --output_dir holds."""
    folder = Path(args.run.output_dir)
    if not args.run.do_train:
        return metrics_problems(folder / "metrics.json")
    if args.run.overwrite_output_dir:
        return []
    if not (folder / "hparams.json").is_file():
        return _stray_problems(folder)
    remedy = (
        f"give another --output_dir and --resume_from_checkpoint {folder / 'last.ckpt'} to go on with that run, or "
        "--overwrite_output_dir to remove it"
    )
    try:
        earlier = read_state(folder / "hparams.json", remedy)
    except UserError as error:
        return [f"--output_dir: {error}"]
    if not all(isinstance(earlier.get(group), dict) for group in COMPARED):
        return [f"--output_dir: {folder / 'hparams.json'} is damaged (it lacks groups of settings); {remedy}"]
    changes = [
        f"--{name} was {earlier_value} and is {value}"
        for group in COMPARED
        for name, value in args.to_dict()[group].items()
        if name not in FREE_TO_CHANGE.get(group, ())
        and (earlier_value := _earlier_value(earlier[group], getattr(args, group), name)) != value
    ]
    then, now = precision_of(earlier), precision_of(args.to_dict())
    if not changes and now not in (then, "auto"):
        changes = [f"--precision was {then} and is {now}"]
    if not changes:
        return []
    return [
        f"--output_dir {folder} holds a run with other settings ({'; '.join(changes)}); choose another folder, or give "
        "--overwrite_output_dir to remove that run"
    ]


def _earlier_value(earlier: dict[str, Any], group: Any, name: str) -> Any:
    """What a run had for a setting of a group; one from before there was the setting had what leaving it out means."""
    default = next(field.default for field in fields(group) if field.name == name)
    return earlier.get(name, getattr(group, name) if default is MISSING else default)


def precision_of(settings: dict[str, Any]) -> str:
    """The number format that settings ask for, in Lightning's longer words; "auto" where the machine is to decide."""
    training = settings["training"]
    if training.get("fp16") or training.get("bf16"):
        return "16-mixed" if training["fp16"] else "bf16-mixed"
    word = str(settings.get("trainer", {}).get("precision"))
    return PRECISIONS.get(word, word)


def begun_precision(checkpoint: str | None) -> str | None:
    """The number format of the run that wrote a checkpoint, where its folder tells it."""
    description = Path(checkpoint or "").parent / "hparams.json"
    if checkpoint is None or not description.is_file():
        return None
    settings = read_state(description, "give --precision 32-true or bf16-mixed")
    return precision_of(settings) if isinstance(settings.get("training"), dict) else None


def _stray_problems(folder: Path) -> list[str]:
    strays = sorted(path.name for path in folder.glob("*checkpoint*"))
    if not strays and not (folder / "last.ckpt").exists():
        return []
    return [
        f"--output_dir {folder} holds {(strays or ['last.ckpt'])[0]}, which no run of this script left, or whose "
        "hparams.json is gone; choose another folder, or give --overwrite_output_dir to remove them"
    ]


def checkpoint_to_resume(args: FinetuneArguments) -> str | None:
    """--resume_from_checkpoint; left out, the newest whole checkpoint of the run in --output_dir, None for a new run.

    Every rank that sees the folder chooses the same one, and rank 0 says so where it is not last.ckpt.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    run, last = args.run, Path(args.run.output_dir) / "last.ckpt"
    given = run.resume_from_checkpoint
    if not run.do_train or run.overwrite_output_dir or given not in (None, str(last)):
        if given is not None and not is_whole(given):
            raise UserError(
                f"--resume_from_checkpoint {given} is damaged, or no Lightning checkpoint; give one that "
                "finetune_rag.py wrote (checkpointN.ckpt), or leave it out"
            )
        return given
    found = [path for path in (last, *_numbered_checkpoints(last.parent)) if path.is_file()]
    whole = next((path for path in found if is_whole(path)), None)
    if whole is None and found:
        raise UserError(
            f"--output_dir {last.parent}: {' and '.join(path.name for path in found)} "
            f"{'is' if len(found) == 1 else 'are'} damaged, so there is nothing to go on from; give "
            "--overwrite_output_dir to start afresh, or another folder"
        )
    if whole is not None and whole != last and is_rank_zero():
        what = "is damaged" if last in found else "is missing"
        print(f"{last} {what}: going on from {whole}, the newest whole checkpoint", flush=True)
    return None if whole is None else str(whole)


def _numbered_checkpoints(folder: Path) -> list[Path]:
    """`checkpointN.ckpt`, the newest first."""
    matches = [(re.fullmatch(r"checkpoint(\d+)\.ckpt", path.name), path) for path in folder.glob("checkpoint*.ckpt")]
    numbered = [(int(match[1]), path) for match, path in matches if match]
    return [path for _, path in sorted(numbered, reverse=True)]


def metrics_problems(path: Path) -> list[str]:
    """What keeps `metrics.json`, if it is there, from being continued."""
    try:
        read_metrics(path)
    except UserError as error:
        return [f"--output_dir: {error}"]
    return []


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of `metrics.json` by their split; none where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return {split: [] for split in SPLITS}
    remedy = "restore it, or remove it to go on without the rows that it had"
    rows = read_state(path, remedy)
    lists = [rows.get(split) for split in SPLITS]
    if not all(isinstance(rows_of, list) and all(map(_is_row, rows_of)) for rows_of in lists):
        raise UserError(f"{path} is damaged (it holds no lists of rows); {remedy}")
    return {split: rows[split] for split in SPLITS}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int | float)
