"""Predictions that outlive a killed run: one line a question, appended batch by batch, and what made them beside it.

    predictions = Predictions("predictions.txt", questions, identity)
    predictions.start(index_description)
    for batch in missing_batches(len(predictions.lines), len(questions), batch_size=8):
        lines, details = answer(questions[batch.start : batch.stop])
        predictions.append(batch.start, lines, details)

Beside `predictions.txt` stand `predictions.txt.settings.json`, the settings that made it, and
`predictions.txt.jsonl`, a JSON record a question. The same settings continue an incomplete file; others are refused.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rag.errors import UserError
from rag.files import load_json, new_digest, save_json, write_lines

logger = logging.getLogger(__name__)

SLICE_BYTES = 1 << 20
SLICES = 64


def file_identity(path: str | os.PathLike, names: Iterable[str] = ("*",)) -> dict[str, str | None]:
    """What tells one state of a file, or of a folder's files that match `names`, from another, wherever it lies.

    Sizes and 64 slices of a megabyte enter the digest, so that 40 GB take as long as 64 MB. A name on the model hub has
    no digest: its name is all there is to tell.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for name in names for file in path.glob(name) if file.is_file())
    if not files:
        return {"path": str(path), "digest": None}
    digest = new_digest()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with open(file, "rb") as stream:
            for start in range(0, size, max(SLICE_BYTES, size * len(files) // SLICES)):
                stream.seek(start)
                digest.update(stream.read(SLICE_BYTES))
    return {"path": str(path), "digest": digest.hexdigest()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that are not the same, as `name old value (now new value)`."""
    texts = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if _essence(before) == _essence(after):
            continue
        before, after = (value["path"] if isinstance(value, dict) else value for value in (before, after))
        texts.append(f"{name} {before} ({'its content has changed' if before == after else f'now {after}'})")
    return texts


def _essence(value: Any) -> Any:
    """What counts of a setting: of a `file_identity` its content, or its name where the content cannot be seen."""
    return value["digest"] or value["path"] if isinstance(value, dict) else value


def _whole_lines(path: Path) -> tuple[list[str], bytes]:
    """The lines of a file, and the bytes behind its last newline: what a killed run left half-written."""
    if not path.is_file():
        return [], b""
    whole, newline, rest = path.read_bytes().replace(b"\r\n", b"\n").rpartition(b"\n")
    return (whole.decode("utf-8-sig").split("\n") if newline else []), rest


def missing_batches(done: int, total: int, batch_size: int) -> list[range]:
    """The numbers of the questions, from 0, of every batch that lacks a prediction.

    Batches lie where they lie in an uninterrupted run, also where a killed one left a batch half-written: padding, and
    with it the last bits of the scores, depends on who shares a batch.
    """
    starts = range(done // batch_size * batch_size, total, batch_size) if done < total else ()
    return [range(start, min(start + batch_size, total)) for start in starts]


class Predictions:
    """The predictions file of one evaluation, as far as it has got.

    Args:
        path: the predictions file; need not exist.
        questions: all questions, in order.
        identity: what the predictions depend on, as JSON can hold it; a file by its `file_identity`.
        recalculate: throw away what is there.
        enough: the least number that will do of a setting that is one (`n_docs`): a complete file that was made with as
            many, or more, is taken, and an unfinished one that was made with more than `identity` says is continued so.

    Attributes:
        identity: what the file was, or is to be, made with.
        lines: the predictions made so far; line n answers question n.
        records: as many dicts: id (line number, from 1), question and the details of `append`; no details where another
            program made the line.
        index: how the index was searched (kind, efSearch, ...), for the scores' reader; kept with the settings.
        origin_known: whether the settings beside the file are the ones that made it.

    Raises:
        UserError: the file was made with other settings, or has more lines than there are questions.
    """

    def __init__(
        self,
        path: str,
        questions: list[str],
        identity: dict[str, Any],
        recalculate: bool = False,
        enough: Mapping[str, int] | None = None,
    ):
        self.path = Path(path)
        self.settings_path, self.records_path = (Path(f"{path}.{end}") for end in ("settings.json", "jsonl"))
        self.questions = questions
        self.identity = identity
        self.index: dict[str, Any] = {}
        self.origin_known = True
        # What is there is written over in `start` only, when the model has been loaded.
        self.lines = [] if recalculate else self._lines_so_far()
        if self.lines:
            self._check_origin(enough or {})
        if len(self.lines) > len(questions):
            raise UserError(
                f"--predictions_path {path} has {len(self.lines)} lines for {len(questions)} questions; "
                "give another path, or --recalculate to overwrite it"
            )
        self.records = self._records_so_far()

    @property
    def is_complete(self) -> bool:
        return len(self.lines) == len(self.questions)

    def _lines_so_far(self) -> list[str]:
        lines, rest = _whole_lines(self.path)
        # An editor, or another program, may end its last line without a newline.
        if rest and not self.settings_path.is_file() and len(lines) + 1 == len(self.questions):
            return [*lines, rest.decode()]
        return lines

    def _check_origin(self, enough: Mapping[str, int]) -> None:
        self.origin_known = self.settings_path.is_file()
        if not self.origin_known:
            logger.warning(
                f"--predictions_path {self.path}: nothing beside it tells which model and settings made its "
                f"{len(self.lines):,} lines; they are taken as they are (--recalculate makes them anew)"
            )
            return
        kept = load_json(self.settings_path)
        self.index = kept["index"]
        for name, least in enough.items():
            there = kept["settings"].get(name)
            if there is not None and there >= (least if self.is_complete else self.identity[name]):
                self.identity = self.identity | {name: there}
        if changed := differences(kept["settings"], self.identity):
            raise UserError(
                f"--predictions_path {self.path} was made with {', '.join(changed)}; "
                "give another path, or --recalculate to overwrite it"
            )

    def _records_so_far(self) -> list[dict]:
        lines, _ = _whole_lines(self.records_path)
        records = [json.loads(line) for line in lines[: len(self.lines)]]
        return records + [self._record(number) for number in range(len(records), len(self.lines))]

    def _record(self, number: int) -> dict:
        return {"id": number + 1, "question": self.questions[number]}

    def start(self, index: dict[str, Any]) -> None:
        """Bring all three files to the state of `lines`; to be called once before the first `append`."""
        self.index = index
        write_lines(self.lines, self.path)
        write_lines([json.dumps(record, ensure_ascii=False) for record in self.records], self.records_path)
        if self.origin_known:
            save_json({"settings": self.identity, "index": index}, self.settings_path)

    def append(self, start: int, predictions: list[str], details: list[dict]) -> None:
        """Add a batch's predictions, a line each, and their details; on disk when this returns.

        Args:
            start: number, from 0, of the batch's first question; lines that are there already are kept.
        """
        assert len(predictions) == len(details) and not any(re.search(r"[\r\n]", line) for line in predictions)
        assert start <= len(self.lines)
        there = len(self.lines) - start
        predictions, details = predictions[there:], details[there:]
        records = [self._record(number) | detail for number, detail in enumerate(details, start=len(self.lines))]
        # The records first: those without a line are dropped when the run is continued.
        with open(self.records_path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in predictions)
        self.lines += predictions
        self.records += records
