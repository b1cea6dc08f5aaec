"""Text files, metrics, the finetuning dataset, whole-or-nothing files and progress: what every script shares.

Nothing heavy is imported here, so that a script can check its arguments and its data before it waits for torch.

    python -c "from utils_rag import f1_score; print(f1_score('the old Eiffel Tower', 'Eiffel Tower'))"
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import string
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import regex
from tqdm import tqdm

from cli_rag import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# --- Text files -------------------------------------------------------------------------------------------------------


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""The lines of a UTF-8 file without their ends.

    Lines end at \n, \r\n or \r and nowhere else: `str.splitlines` also splits at U+2028, \x0b or \x85, which stand
    inside Wikipedia's sentences and would shift every later pair of source and target.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # text mode turns \r\n and \r into \n
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it first") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_lines(lines: Iterable[str], path: str | os.PathLike) -> None:
    """Write one line each; a line that holds a line end would come back as two, so it is refused."""
    with atomic_write(path) as file:
        for line in lines:
            assert "\n" not in line and "\r" not in line, f"a line end inside a line: {line!r}"
            file.write(line + "\n")


# --- Metrics: fractions -----------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_DPR_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def normalize_answer(s: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (the SQuAD v1.1 evaluation script)."""
    s = s.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", s).split())


def exact_match_score(prediction: str, ground_truth: str) -> bool:
    """Whether two answers are equal once normalised (SQuAD v1.1)."""
    return normalize_answer(prediction) == normalize_answer(ground_truth)


def f1_score(prediction: str, ground_truth: str) -> float:
    """Harmonic mean of precision and recall over the normalised words of two answers (SQuAD v1.1)."""
    prediction_words = normalize_answer(prediction).split()
    truth_words = normalize_answer(ground_truth).split()
    shared = (Counter(prediction_words) & Counter(truth_words)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction_words), shared / len(truth_words)
    return 2 * precision * recall / (precision + recall)


def metric_max_over_ground_truths(
    metric_fn: Callable[[str, str], float], prediction: str, ground_truths: Sequence[str]
) -> float:
    """The best score of a prediction over the answers that count as right."""
    return max(metric_fn(prediction, truth) for truth in ground_truths)


def calculate_exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that match the reference of the same place; as many of one as of the other."""
    return sum(starmap(exact_match_score, zip(predictions, references, strict=True))) / len(references)


def precision_at_k(retrieved_titles: Sequence[str], gold_titles: Iterable[str], k: int) -> float:
    """Distinct gold titles among the first k retrieved ones, over k, also where fewer are gold (public suite)."""
    return len(set(retrieved_titles[:k]) & set(gold_titles)) / k


def reciprocal_rank(retrieved_titles: Sequence[str], gold_titles: Iterable[str]) -> float:
    """1 / the rank (from 1) of the first gold title; 0 where none was retrieved."""
    gold_titles = set(gold_titles)
    return next((1 / rank for rank, title in enumerate(retrieved_titles, start=1) if title in gold_titles), 0.0)


def answer_recall_at_k(retrieved_texts: Sequence[str], answers: Iterable[str], k: int) -> bool:
    """Whether one of the first k passages contains one of the answers, word for word (DPR, Karpukhin et al. 2020).

    Words are compared case-folded and Unicode-normalised; "Rome" is not found in "Romeo".
    """
    needles = [needle for needle in map(_dpr_words, answers) if needle.strip()]
    return any(needle in text for text in map(_dpr_words, retrieved_texts[:k]) for needle in needles)


def _dpr_words(text: str) -> str:
    """DPR's words between single spaces, with one before the first and one behind the last."""
    return f" {' '.join(_DPR_TOKEN.findall(unicodedata.normalize('NFD', text.lower())))} "


# --- The finetuning dataset -------------------------------------------------------------------------------------------


def check_data_files(data_dir: str | os.PathLike, splits: Iterable[str]) -> list[str]:
    """What is wrong with `{split}.source` and `{split}.target`, one line a problem, before anything heavy is loaded."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return [f"--data_dir {data_dir} is not a folder; it must hold train|val|test .source and .target files"]
    problems = []
    for split in splits:
        lengths = {}
        for path in (data_dir / f"{split}.source", data_dir / f"{split}.target"):
            if not path.is_file():
                problems.append(f"--data_dir {data_dir}: {path.name} is missing; one example a line is expected in it")
                continue
            lines = read_lines(path)
            lengths[path.name] = len(lines)
            problems += _blank_line_problems(path, lines)
        if len(set(lengths.values())) > 1:
            counts = " but ".join(f"{name} has {length} lines" for name, length in lengths.items())
            problems.append(f"--data_dir {data_dir}: {counts}; line n of one belongs to line n of the other")
    return problems


def _blank_line_problems(path: Path, lines: list[str]) -> list[str]:
    if not lines:
        return [f"{path} is empty; one example a line is expected in it"]
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if not blank:
        return []
    return [
        f"{path}: blank lines, {len(blank)} in all, the first is line {blank[0]};"
        " fill them or remove them from .source and .target alike"
    ]


class Seq2SeqDataset:
    """Pairs of one line of `{type_path}.source` and one of `{type_path}.target`, read by a torch `DataLoader`.

    Args:
        tokenizer: reads the sources (the question encoder's tokenizer for RAG).
        target_tokenizer: reads the targets (the generator's tokenizer for RAG); `tokenizer` where left out.
        n_obs: pairs to use, from the first on; -1 for all.
        prefix: put before every source (T5's "question: ").
    """

    def __init__(
        self,
        tokenizer,
        data_dir: str | os.PathLike,
        max_source_length: int,
        max_target_length: int,
        type_path: str = "train",
        n_obs: int = -1,
        prefix: str = "",
        target_tokenizer=None,
    ):
        self.tokenizer = tokenizer
        self.target_tokenizer = target_tokenizer or tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        end = None if n_obs < 0 else n_obs
        self.sources = [prefix + line for line in read_lines(Path(data_dir) / f"{type_path}.source")[:end]]
        self.targets = read_lines(Path(data_dir) / f"{type_path}.target")[:end]
        assert len(self.sources) == len(self.targets), "check_data_files comes first"
        self._warn_of_cut_targets(type_path)

    def _warn_of_cut_targets(self, type_path: str) -> None:
        """A target beyond the limit trains without its end, and without the end token: worth a word."""
        lengths = [len(ids) for ids in self.target_tokenizer(text_target=self.targets, verbose=False)["input_ids"]]
        cut = sum(length > self.max_target_length for length in lengths)
        if cut:
            logger.warning(
                f"{cut} of {len(lengths)} targets of {type_path}.target are longer than {self.max_target_length} tokens"
                f" (the longest has {max(lengths)}) and are cut; raise the maximum target length to keep them whole"
            )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"source": self.sources[index], "target": self.targets[index], "index": index}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenise a batch, each side padded on the right to its longest: input_ids (B, S), labels (B, T), int64."""
        columns = {key: [example[key] for example in batch] for key in ("source", "target", "index")}
        padded = {"truncation": True, "padding": "longest", "padding_side": "right", "return_tensors": "pt"}
        sources = self.tokenizer(columns["source"], max_length=self.max_source_length, **padded)
        targets = self.target_tokenizer(text_target=columns["target"], max_length=self.max_target_length, **padded)
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "labels": targets["input_ids"],
            **columns,
        }


def trim_batch(
    input_ids: torch.Tensor, pad_token_id: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Drop the columns of input_ids (B, S), and of its mask where one is given, that are padding in every row."""
    keep = input_ids.ne(pad_token_id).any(dim=0)
    if attention_mask is None:
        return input_ids[:, keep]
    return input_ids[:, keep], attention_mask[:, keep]


# --- Files and folders that appear whole or not at all ----------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `path` that takes its place when the block ends well and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(beside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place, and its old content's, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)  # a killed run's: in a container every run has the same process id
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            path.rename(old)  # os.replace cannot take the place of a folder that holds anything
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def save_json(obj: Any, path: str | os.PathLike) -> None:
    """Write an object as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(obj, file, indent=2, ensure_ascii=False)
        file.write("\n")


def load_json(path: str | os.PathLike) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def new_digest(data: bytes = b""):
    """A hash object, fed with `data`, whose 16 bytes tell one content from another: no two ever meet by accident."""
    return hashlib.blake2b(data, digest_size=16)


def remove(path: str | os.PathLike) -> None:
    """Remove a file, or a folder in one go: under its name it is whole until it is gone. Nothing there is no error."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        gone = path.with_name(f".{path.name}.{os.getpid()}.old")
        if gone.exists():  # a killed run's: in a container every run has the same process id
            shutil.rmtree(gone)
        path = path.rename(gone)
    shutil.rmtree(path)


def free_bytes(path: str | os.PathLike) -> int:
    """Free space on the disk of a file or folder, which may have to be made yet."""
    return shutil.disk_usage(_existing(path)).free


def space_problems(what: str, needs: Mapping[str | os.PathLike, int], remedy: str) -> list[str]:
    """One line for each disk that has no room for the bytes that are to be written.

    Args:
        what: the flag that asks for them, and its value.
        needs: bytes by the file or folder that they are for; what lies on one disk is added up.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in needs.items():
        existing = _existing(path)
        disk = os.stat(existing).st_dev
        disks[disk] = (existing, disks.get(disk, (existing, 0))[1] + size)
    return [
        f"{what}: {size:,} bytes are needed and {free:,} are free at {folder}; {remedy}"
        for folder, size in disks.values()
        if (free := free_bytes(folder)) < size
    ]


def _existing(path: str | os.PathLike) -> Path:
    return next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())


# --- Where a result came from, and how far it has got -----------------------------------------------------------------


def get_git_info() -> dict[str, str | None]:
    """The suite's repository, commit and branch ("HEAD" where none is checked out), and this machine's name.

    The first three are None outside a checkout and where the git program, which gitpython runs, is missing.
    """
    info = dict.fromkeys(("repo_id", "repo_sha", "repo_branch")) | {"hostname": os.uname().nodename}
    try:
        import git
    except ImportError:  # gitpython's, where there is no git program
        return info
    try:
        with git.Repo(Path(__file__).resolve().parent, search_parent_directories=True) as repo:
            info["repo_id"] = str(repo.working_tree_dir)
            info["repo_branch"] = "HEAD" if repo.head.is_detached else repo.active_branch.name
            info["repo_sha"] = repo.head.commit.hexsha
    except (git.GitError, ValueError, OSError) as error:  # ValueError: there is no commit yet
        logger.debug(f"no git information: {error}")
    return info


def save_git_info(folder: str | os.PathLike) -> None:
    """Write `git_log.json` into a folder."""
    save_json(get_git_info(), Path(folder) / "git_log.json")


def progress(
    iterable: Iterable, total: int | None, desc: str, unit: str, size: Callable[[Any], int] = lambda item: 1
) -> Iterator:
    """Go through an iterable while its rate and the time left are shown on stderr.

    On a terminal as a bar, elsewhere (a log file) as a line about every ten seconds. `size` says how many units an
    item holds, where that is not one (the questions of a batch).
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=desc, unit=f" {unit}", unit_scale=total is None or total >= 10**6) as bar:
            for item in iterable:
                yield item
                bar.update(size(item))
        return
    done, pace = 0, Pace(unit)
    for item in iterable:
        yield item
        done += size(item)
        if pace.line_is_due():
            print(_progress_line(done, total, pace, desc), file=sys.stderr, flush=True)
    pace.line_is_due()
    print(_progress_line(done, total, pace, desc), file=sys.stderr, flush=True)


def _progress_line(done: int, total: int | None, pace: Pace, desc: str) -> str:
    if total is None or done >= total:
        return f"{desc}: {done:,} {pace.unit} in {tqdm.format_interval(pace.seconds)}, {pace.rate(done)}"
    return f"{desc}: {done:,} of {total:,} {pace.unit}, {pace.rate(done, total)}"


class Pace:
    """When the next line about some work is due in a log file, and how fast the work has gone so far.

    Args:
        unit: what is counted, in the plural.
        every: seconds between two lines.
        digits: behind the point, of the rate.

    Attributes:
        seconds: from the beginning to the last call of `line_is_due`.
    """

    def __init__(self, unit: str, every: float = 10, digits: int = 1):
        self.unit, self.every, self.digits, self.seconds = unit, every, digits, 0.0
        self._start = self._last_line = time.monotonic()

    def line_is_due(self) -> bool:
        """Whether a line is to be printed now; the next one is due `every` seconds later."""
        now = time.monotonic()
        self.seconds = now - self._start
        if now - self._last_line < self.every:
            return False
        self._last_line = now
        return True

    def rate(self, done: int, total: int | None = None) -> str:
        """Units a second, and the time left where more than is done is to be done in `total`."""
        rate = done / max(self.seconds, 1e-6)
        text = f"{rate:,.{self.digits}f} {self.unit}/s"
        if total is None:
            return text
        return f"{text}, {tqdm.format_interval((total - done) / rate) if done else '?'} left"
