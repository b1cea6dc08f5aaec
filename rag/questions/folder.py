"""A data set by name as a folder of text files that a training reads, written once.

    folder, digest = written_folder(args.data, Path(output_dir, "dataset"), ["train", "val"], expected=None)

The folder has a name of its own for each source, and holds `{train,val,test}.source`, `.target` (the first answer) and
`.qa` (all answers), and `dataset.json`, which says what it was made of and what was written. As long as that is so
nothing is read again: a run that goes on needs no hub, and sees the examples that it began with.
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rag.checksums import file_checksum
from rag.errors import RankError, UserError
from rag.files import atomic_folder, json_digest, load_json, remove, save_json, write_lines
from rag.questions.arguments import DatasetArguments
from rag.questions.columns import Examples, read_examples
from rag.questions.reading import Splits, read_splits, split_named
from rag.questions.tables import FOLDER_TEXT, SPLIT_NAMES, is_local, local_files

IDENTITY_FILE = "dataset.json"
SECONDS_BETWEEN_LOOKS = 0.2


def written_folder(
    args: DatasetArguments, parent: Path, needed: Sequence[str], expected: str | None
) -> tuple[Path, str]:
    """The folder, written unless it is there as it was written, and the digest of its examples.

    Args:
        parent: of the folders of all data sets.
        needed: of "train", "val" and "test" those that must be in it.
        expected: the digest of the run that is to go on with them; None for a new one.

    Raises:
        UserError: the data set cannot be read, lacks a split, holds no answers, or has other examples than expected.
    """
    identity = _identity(args)
    folder = _folder_of(parent, identity)
    digest = _digest_in(folder, identity, needed)
    if digest is not None:
        _require_same(args, parent, digest, expected)
        print(f"{folder}: the examples of --dataset_name {args.dataset_name} as they were read before", flush=True)
        return folder, digest
    contents, notes = _contents(args, read_splits(args), needed)
    for left in parent.glob(".*.[0-9]*.*"):  # a killed run's
        remove(left)
    with atomic_folder(folder) as beside:
        for split, examples in contents.items():
            _write_split(beside / split, examples)
        files = {path.name: file_checksum(path) for path in sorted(beside.iterdir())}
        digest = json_digest(files)
        _require_same(args, parent, digest, expected)
        save_json({"source": identity, "files": files}, beside / IDENTITY_FILE)
    counts = ", ".join(f"{sum(map(bool, examples.answers)):,} {split}" for split, examples in contents.items())
    print(f"{folder}: {counts} examples of --dataset_name {args.dataset_name}{''.join(notes)}", flush=True)
    return folder, digest


def awaited_folder(args: DatasetArguments, parent: Path, needed: Sequence[str], seconds: float) -> tuple[Path, str]:
    """What `written_folder` returns, as soon as another process has written it.

    Raises:
        RankError: it is not there in time.
    """
    identity, deadline = _identity(args), time.monotonic() + seconds
    folder = _folder_of(parent, identity)
    while (digest := _digest_in(folder, identity, needed)) is None:
        if time.monotonic() > deadline:
            raise RankError(
                f"{folder} with the examples of --dataset_name {args.dataset_name} is not there after --rank_timeout "
                f"{seconds:g}: rank 0 has failed, or sees another --output_dir or another data set than this rank does"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return folder, digest


def _require_same(args: DatasetArguments, parent: Path, digest: str, expected: str | None) -> None:
    if expected not in (None, digest):
        raise UserError(
            f"--dataset_name {args.dataset_name} is not what the run in {parent.parent} was begun with: it has other "
            "examples now; restore it, or give another --output_dir, or --overwrite_output_dir to begin anew"
        )


# --- What it is made of -----------------------------------------------------------------------------------------------


def _identity(args: DatasetArguments) -> dict[str, Any]:
    """What the files follow from. A name on the hub stands for what it held when it was read."""
    name = args.dataset_name
    assert name is not None
    columns = {"question_column": args.question_column, "answers_column": args.answers_column}
    if not is_local(name):
        return {"dataset_name": name, "dataset_config": args.dataset_config, **columns}
    files = [path for own in local_files(name).values() for path in own]
    return {"files": {path.name: file_checksum(path) for path in files}, **columns}


def _folder_of(parent: Path, identity: dict[str, Any]) -> Path:
    return parent / json_digest(identity)[:12]


def _digest_in(folder: Path, identity: dict[str, Any], needed: Iterable[str]) -> str | None:
    """The digest of the examples in a folder; None where it is not there, or not as it was written."""
    try:
        written = load_json(folder / IDENTITY_FILE)
        files = written["files"]
        whole = written["source"] == identity and all(file_checksum(folder / name) == files[name] for name in files)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return json_digest(files) if whole and all(f"{split}.source" in files for split in needed) else None


# --- Contents ---------------------------------------------------------------------------------------------------------


def _contents(args: DatasetArguments, splits: Splits, needed: Sequence[str]) -> tuple[dict[str, Examples], list[str]]:
    """The examples of each split with answers, by the suite's name for it, and what there is to say of them."""
    contents: dict[str, Examples] = {}
    notes: list[str] = []
    for split, names in SPLIT_NAMES.items():
        found = split_named(splits, names)
        if found is None:
            continue
        examples = read_examples(args, splits[found])
        left_out = len(examples.unanswered)
        if left_out < len(examples.questions):
            contents[split] = examples
        if left_out:
            notes.append(f"; of {found} {left_out:,} are left out for want of an answer")
    if "test" not in contents and "val" in contents:
        contents["test"] = contents["val"]
        notes.append("; no test split has answers, so that test is the validation's")
    for split in needed:
        if split not in contents:
            raise UserError(_lack(args, split, splits))
    return contents, notes


def _lack(args: DatasetArguments, split: str, splits: Splits) -> str:
    wanted = SPLIT_NAMES[split][0]
    there = ", ".join(name for name in splits if name) or "one file"
    if split_named(splits, SPLIT_NAMES[split]) is not None:
        return f"--dataset_name {args.dataset_name}: no question of {wanted} has an answer; give data with answers"
    return (
        f"--dataset_name {args.dataset_name} has no split {wanted} (it has: {there}); set aside some of its rows, and "
        f"give a folder: {FOLDER_TEXT}"
    )


def _write_split(path: Path, examples: Examples) -> None:
    pairs = [pair for pair in zip(examples.questions, examples.answers, strict=True) if pair[1]]
    write_lines([question for question, _ in pairs], path.with_suffix(".source"))
    write_lines([answers[0] for _, answers in pairs], path.with_suffix(".target"))
    write_lines(
        [f"{question}\t{json.dumps(answers, ensure_ascii=False)}" for question, answers in pairs],
        path.with_suffix(".qa"),
    )
