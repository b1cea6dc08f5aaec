"""The splits of a data set by name, from the hub or from local files, with errors that say what there is instead.

    splits = read_splits(args)                                # {"train": [Table, ...], "validation": [...]}
    name = split_named(splits, SPLIT_NAMES["val"])            # "validation"

The hub's are loaded by the `datasets` package, which runs no code of theirs; what it has fetched stays in its cache.
"""

import re
from collections.abc import Iterable

from rag.errors import UserError, one_line
from rag.hub import hub_is_reachable, is_hub_name
from rag.questions.arguments import DatasetArguments
from rag.questions.tables import KINDS_TEXT, Table, is_local, local_tables

Splits = dict[str, list[Table]]


def read_splits(args: DatasetArguments) -> Splits:
    """The tables of each split by its name; of a single file by "".

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    name = args.dataset_name
    assert name is not None
    return local_tables(name) if is_local(name) else _hub_splits(name, args.dataset_config)


def split_named(splits: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of some names that a split has, whatever the case of its letters; None where there is none."""
    by_name = {split.lower(): split for split in splits}
    return next((by_name[name.lower()] for name in names if name.lower() in by_name), None)


def _hub_splits(name: str, config: str | None) -> Splits:
    what = f"--dataset_name {name}"
    if not is_hub_name(name):
        raise UserError(f"{what} is no path and no name on the hub; {KINDS_TEXT}")
    import datasets

    reachable = hub_is_reachable()
    if not reachable:  # else it would be tried for a minute before the cache is looked into
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # of each of its readers, and of the connection
        raise UserError(f"{what} {_reason(error, config, reachable)}") from error
    return {split: [_table(f"split {split}", dataset)] for split, dataset in loaded.items()}


def _reason(error: Exception, config: str | None, reachable: bool) -> str:
    text = one_line(error, 400)
    if "onfig name is missing" in text or "BuilderConfig" in text:
        there = re.search(r"\[([^\]]*)\]", text)
        names = there[1].replace("'", "") if there else "those that its page names"
        has = "has several configurations" if config is None else f"has no configuration {config}"
        return f"{has}; give --dataset_config, one of: {names[:300]}"
    if not reachable:
        return f"is no path, the hub cannot be reached and its cache does not hold it; {KINDS_TEXT}"
    if "scripts are no longer supported" in text:
        return "is read by code of its own, which is not run; save its rows as .jsonl or .parquet and give that"
    return f"cannot be loaded from the hub ({text[:200]}); {KINDS_TEXT}"


def _table(place: str, dataset) -> Table:
    def cells(name: str) -> list:
        return dataset.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()

    return Table(place, list(dataset.column_names), cells)
