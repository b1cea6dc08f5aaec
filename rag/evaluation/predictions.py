"""Predictions that outlive a killed run: one line a question, appended batch by batch, and what made them beside it.

    predictions = Predictions("predictions.txt", questions, identity)
    predictions.start(index_description)
    for batch in missing_batches(len(predictions.lines), len(questions), batch_size=8):
        lines, details = answer(questions[batch.start : batch.stop])
        predictions.append(batch.start, lines, details)

Beside `predictions.txt` stand `predictions.txt.settings.json`, the settings that made it, and
`predictions.txt.jsonl`, a JSON record a question. The same settings continue an incomplete file; others are refused.

A record ends with a digest of itself and of its line, and the settings with one of themselves. What was changed, taken
out or put in since is refused, not scored. What is merely lost at the end, of either file, is predicted again.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from rag.errors import UserError
from rag.files import json_digest, new_digest, read_state, require_lines, save_json, write_lines
from rag.outputs import writing

logger = logging.getLogger(__name__)

REMEDY = "give another path, or --recalculate to overwrite it"
DIGEST = "digest"  # the last key of a record, and of the settings
# Settings that files of earlier versions do not name, and what they were.
UNNAMED = {"precision": "float32"}
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
        before, after = (value.get("path") if isinstance(value, dict) else value for value in (before, after))
        texts.append(f"{name} {before} ({'its content has changed' if before == after else f'now {after}'})")
    return texts


def _essence(value: Any) -> Any:
    """What counts of a setting: of a `file_identity` its content, or its name where the content cannot be seen."""
    return value.get("digest") or value.get("path") if isinstance(value, dict) else value


def _whole_lines(path: Path) -> tuple[list[str], bytes]:
    """The lines of a file, and the bytes behind its last newline: what a killed run left half-written."""
    if not path.is_file():
        return [], b""
    try:
        require_lines(path)
    except UserError as error:
        raise UserError(f"--predictions_path: {error}; {REMEDY}") from error
    whole, newline, rest = path.read_bytes().replace(b"\r\n", b"\n").rpartition(b"\n")
    return (_decoded(path, whole).split("\n") if newline else []), rest


def _decoded(path: Path, text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f"--predictions_path: {path}, line {line} is not UTF-8; {REMEDY}") from error


def sealed(record: Mapping[str, Any], prediction: str) -> str:
    """A record as its line of the .jsonl file, with the digest that binds it to the prediction."""
    text = json.dumps(record, ensure_ascii=False)
    digest = xxhash.xxh3_64_hexdigest(f"{text}\n{prediction}".encode())
    return f'{text[:-1]}, "{DIGEST}": "{digest}"}}'


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
        kept: settings that stay what they were when the file was begun, whatever `identity` says.

    Attributes:
        identity: what the file was, or is to be, made with.
        lines: the predictions made so far; line n answers question n.
        records: as many dicts: id (line number, from 1), question and the details of `append`; no details where another
            program made the line.
        index: how the index was searched (kind, efSearch, ...), for the scores' reader; kept with the settings.
        origin_known: whether the settings beside the file are the ones that made it.

    Raises:
        UserError: the file was made with other settings, has more lines than there are questions, or was changed since.
    """

    def __init__(
        self,
        path: str,
        questions: list[str],
        identity: dict[str, Any],
        recalculate: bool = False,
        enough: Mapping[str, int] | None = None,
        kept: Iterable[str] = (),
    ):
        self.path = Path(path)
        self.settings_path, self.records_path = (Path(f"{path}.{end}") for end in ("settings.json", "jsonl"))
        self.questions = questions
        self.identity = identity
        self.index: dict[str, Any] = {}
        self.origin_known = True
        self.lines: list[str] = []
        self.records: list[dict] = []
        if not recalculate:  # what is there is written over in `start` only, when the model has been loaded
            self._read(enough or {}, kept)

    @property
    def is_complete(self) -> bool:
        return len(self.lines) == len(self.questions)

    def _read(self, enough: Mapping[str, int], kept_names: Iterable[str]) -> None:
        lines, rest = _whole_lines(self.path)
        is_ours = self.settings_path.exists() or self.records_path.exists()
        # An editor, or another program, may end its last line without a newline.
        if rest and not is_ours and len(lines) + 1 == len(self.questions):
            lines.append(_decoded(self.path, rest))
        if len(lines) > len(self.questions):
            raise UserError(
                f"--predictions_path {self.path} has {len(lines)} lines for {len(self.questions)} questions; {REMEDY}"
            )
        self.lines = lines
        if not lines:
            return
        kept = self._settings() if is_ours else {"settings": None, "index": {}}
        self.origin_known, self.index = kept["settings"] is not None, kept["index"]
        if not self.origin_known:
            logger.warning(
                f"--predictions_path {self.path}: nothing beside it tells which model and settings made its "
                f"{len(lines):,} lines; they are taken as they are (--recalculate makes them anew)"
            )
        texts = self._record_texts()
        if self.origin_known:
            self._check_identity(kept["settings"], enough, kept_names)
        self.records = [self._checked_record(*pair, is_sealed=DIGEST in kept) for pair in enumerate(texts)]
        self.records += [self._record(number) for number in range(len(texts), len(self.lines))]

    def _settings(self) -> dict[str, Any]:
        """`settings` (None where another program began the file), `index` and a digest, but of an old version."""
        remedy = f"it belongs to --predictions_path {self.path}; {REMEDY}"
        kept = read_state(self.settings_path, remedy)
        content = {name: value for name, value in kept.items() if name != DIGEST}
        is_whole = kept[DIGEST] == json_digest(content) if DIGEST in kept else isinstance(kept.get("settings"), dict)
        if not is_whole or not isinstance(kept.get("index"), dict) or "settings" not in kept:
            raise UserError(f"{self.settings_path} is damaged (its digest is another's); {remedy}")
        if DIGEST not in kept:
            logger.warning(f"--predictions_path {self.path}: an old version made it, without digests to check it by")
        return kept

    def _record_texts(self) -> list[str]:
        """The records' lines; lines without a record are dropped, and predicted again."""
        texts = _whole_lines(self.records_path)[0][: len(self.lines)]
        if not texts and self.origin_known:
            raise UserError(
                f"--predictions_path {self.path}: its records, {self.records_path}, are gone, by which its lines are "
                f"checked; {REMEDY}"
            )
        if texts and len(texts) < len(self.lines):
            logger.warning(
                f"--predictions_path {self.path}: {len(self.lines) - len(texts):,} of its {len(self.lines):,} lines "
                f"have no record in {self.records_path} any more; they are predicted again"
            )
            del self.lines[len(texts) :]
        return texts

    def _check_identity(self, settings: dict[str, Any], enough: Mapping[str, int], kept: Iterable[str]) -> None:
        settings = {name: value for name, value in UNNAMED.items() if name in self.identity} | settings
        self.identity = self.identity | {name: settings[name] for name in kept}
        for name, least in enough.items():
            there = settings.get(name)
            if there is not None and there >= (least if self.is_complete else self.identity[name]):
                self.identity = self.identity | {name: there}
        if changed := differences(settings, self.identity):
            raise UserError(f"--predictions_path {self.path} was made with {', '.join(changed)}; {REMEDY}")

    def _checked_record(self, number: int, text: str, is_sealed: bool) -> dict:
        """The record of a line, without its digest, which tells whether either was changed."""
        line = self.lines[number]
        try:
            record = json.loads(text)
            digest = record.pop(DIGEST, None)
            fits = text == sealed(record, line) if is_sealed else digest is None and record.get("answer", line) == line
            fits = fits and record["id"] == number + 1 and record["question"] == self.questions[number]
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # no JSON, or another shape
            fits = False
        if not fits:
            raise UserError(
                f"--predictions_path {self.path}, line {number + 1}: it is not what {self.records_path} has there: "
                f"one of them was changed; {REMEDY}"
            )
        return record

    def _record(self, number: int) -> dict:
        return {"id": number + 1, "question": self.questions[number]}

    def start(self, index: dict[str, Any]) -> None:
        """Bring all three files to the state of `lines`; to be called once before the first `append`."""
        self.index = index
        content = {"settings": self.identity if self.origin_known else None, "index": index}
        pairs = zip(self.records, self.lines, strict=True)
        with writing("--predictions_path", self.path):
            # Lines without records, where a run is killed in between, are refused where the settings are known only.
            write_lines(self.lines, self.path, follow=True)
            save_json(content | {DIGEST: json_digest(content)}, self.settings_path)
            write_lines([sealed(record, line) for record, line in pairs], self.records_path)

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
        pairs = zip(records, predictions, strict=True)
        with writing("--predictions_path", self.path):
            # The records first: those without a line are dropped when the run is continued.
            with open(self.records_path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(sealed(record, line) + "\n" for record, line in pairs)
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(line + "\n" for line in predictions)
        self.lines += predictions
        self.records += records
