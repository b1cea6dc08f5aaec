"""`FinetuneArguments` of what other code holds: an argparse namespace, a flat dict, the settings in a checkpoint.

    parser = argparse.ArgumentParser()
    add_run_flags(add_flags(parser, ModelArguments, RetrievalArguments))
    args = finetune_arguments(parser.parse_args())
    args = group_settings(checkpoint["hyper_parameters"], passages_path="moved/here")

Settings that the suite does not know are left out, with a warning.
"""

import argparse
import difflib
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from rag.command_line.parser import RagArgumentParser, options_of
from rag.command_line.trainer_flags import TrainerArguments, add_trainer_flags
from rag.errors import UserError
from rag.training.arguments import (
    GROUPS,
    DataArguments,
    FinetuneArguments,
    RunArguments,
    TrainingArguments,
    require_sound,
)

logger = logging.getLogger(__name__)

NAMES_OF_GROUPS = {group._argument_group_name: group for group in GROUPS} | {"trainer": TrainerArguments}
SETTINGS = {field.name for group in NAMES_OF_GROUPS.values() for field in fields(group)}


def finetune_arguments(settings: FinetuneArguments | argparse.Namespace | Mapping[str, Any]) -> FinetuneArguments:
    """All settings of a run, checked as those of a command line are; `FinetuneArguments` are, and stay as they are."""
    if isinstance(settings, FinetuneArguments):
        return settings
    args = group_settings(settings)
    require_sound(args)
    return args


def group_settings(settings: argparse.Namespace | Mapping[str, Any], **changes: Any) -> FinetuneArguments:
    """All settings of a run, unchecked: those of a checkpoint speak of files that may be gone.

    Args:
        settings: by their names, or as `FinetuneArguments.to_dict` gives them. Names that are no settings of this suite
            are left out, with a warning.
        changes: settings to take instead, by their names.

    Raises:
        UserError: a setting is missing, or a change is no setting.
    """
    if unknown := sorted(changes.keys() - SETTINGS):
        close = difflib.get_close_matches(unknown[0], SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else "finetune_rag.py --help lists them all"
        raise UserError(f"{unknown[0]} is no setting of a finetuning run; {hint}")
    given = _flat(settings if isinstance(settings, Mapping) else vars(settings)) | changes
    if ignored := sorted(given.keys() - SETTINGS):
        logger.warning(f"no settings of a finetuning run, left out: {', '.join(ignored)}")
    return FinetuneArguments(**{name: _group_of(group, given) for name, group in NAMES_OF_GROUPS.items()})


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their names, whether or not they stand in groups."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = name in NAMES_OF_GROUPS and isinstance(value, Mapping)
        flat |= value if is_group else {name: value}
    return flat


def _group_of(group: type, given: dict[str, Any]) -> Any:
    needed = [field.name for field in fields(group) if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in needed if given.get(name) is None]:
        raise UserError(f"--{missing[0]} is missing from the settings; give it")
    return group(**{field.name: given[field.name] for field in fields(group) if field.init and field.name in given})


def add_flags(parser: argparse.ArgumentParser, *groups: type) -> argparse.ArgumentParser:
    """Add the flags of dataclasses of settings to a plain parser, but for those that it has."""
    for action in dict.fromkeys(options_of(RagArgumentParser(*groups)).values()):
        is_there = options_of(parser).keys() & set(action.option_strings)
        if action.dest not in ("help", "config_file") and not is_there:
            parser._add_action(action)
    return parser


def add_run_flags(parser: argparse.ArgumentParser, root_dir: str | None = None) -> argparse.ArgumentParser:
    """Add the flags of data, training, run and Lightning's Trainer to a plain parser, but for those that it has.

    Args:
        root_dir: without effect, as in the public suite, where this is `lightning_base.add_generic_args`.
    """
    add_flags(parser, DataArguments, TrainingArguments, RunArguments)
    if "--accelerator" not in options_of(parser):
        add_trainer_flags(parser.add_argument_group("Lightning Trainer"))
    return parser
