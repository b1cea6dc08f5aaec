"""The finetuning dataset, its checks, where a result came from, and the small helpers that other code imports.

Nothing heavy is imported here, so that a script can check its arguments and its data before it waits for torch.

    python -c "from rag.metrics import f1_score; print(f1_score('the old Eiffel Tower', 'Eiffel Tower'))"
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Public names of this module, whose code is in rag/.
from rag import files
from rag.errors import UserError
from rag.evaluation.gold import gold_lines, parse_lines, split_qa_line
from rag.files import atomic_write, load_json, read_lines
from rag.metrics import calculate_exact_match, exact_match_score, f1_score, normalize_answer
from rag.models.prompts import encode_answers
from rag.models.questions import encode_questions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

__all__ = [
    "Seq2SeqDataset",
    "calculate_exact_match",
    "data_file_problems",
    "encode_line",
    "exact_match_score",
    "f1_score",
    "flatten_list",
    "get_git_info",
    "is_rag_model",
    "lmap",
    "load_json",
    "normalize_answer",
    "pickle_save",
    "read_answers",
    "save_git_info",
    "save_json",
    "set_extra_model_params",
    "trim_batch",
]

# --- The finetuning dataset -------------------------------------------------------------------------------------------


def data_file_problems(data_dir: str | os.PathLike, splits: Iterable[str]) -> list[str]:
    """What is wrong with `{split}.source`, `.target` and, if it is there, `.qa`, before anything heavy is loaded."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return [f"--data_dir {data_dir} is not a folder; it must hold train|val|test .source and .target files"]
    problems = []
    for split in splits:
        lengths = {}
        problems += _answers_problems(data_dir, split)
        for path in (data_dir / f"{split}.source", data_dir / f"{split}.target"):
            if not path.is_file():
                what = "is a folder, a device or a pipe" if path.exists() else "is missing"
                problems.append(f"--data_dir {data_dir}: {path.name} {what}; one example a line is expected in it")
                continue
            try:
                lines = read_lines(path)
            except (UserError, OSError) as error:
                problems.append(f"--data_dir {data_dir}: {path.name} cannot be read ({error})")
                continue
            lengths[path.name] = len(lines)
            problems += _blank_line_problems(path, lines)
        if len(set(lengths.values())) > 1:
            counts = " but ".join(f"{name} has {length} lines" for name, length in lengths.items())
            problems.append(f"--data_dir {data_dir}: {counts}; line n of one belongs to line n of the other")
    return problems


def _answers_problems(data_dir: Path, split: str) -> list[str]:
    """What is wrong with the answers of a split, which a folder may have or not."""
    source = data_dir / f"{split}.source"
    try:
        answers = read_answers(data_dir, split)
    except (UserError, OSError) as error:
        return str(error).splitlines()
    try:
        if answers is None or not source.is_file():
            return []
        questions = read_lines(source)
    except (UserError, OSError):  # told with the source
        return []
    name = f"--data_dir {data_dir}: {split}.qa"
    if len(answers) != len(questions):
        return [f"{name} has {len(answers)} lines but {split}.source has {len(questions)}; line n belongs to line n"]
    others = [n for n, (question, _) in enumerate(answers) if _letters(question) != _letters(questions[n])]
    if 2 * len(others) <= len(questions):
        return []
    first = others[0]
    return [
        f"{name}: {len(others)} of its questions are not those of {split}.source, the first on line {first + 1}: "
        f"{answers[first][0][:80]!r} against {questions[first][:80]!r}; line n of one belongs to line n of the other"
    ]


def _letters(text: str) -> str:
    """A question without what csv writers and tokenizers do to it."""
    return "".join(filter(str.isalnum, text.lower()))


def read_answers(data_dir: str | os.PathLike, split: str) -> list[tuple[str, list[str]]] | None:
    """The questions of `{split}.qa` and their right answers, several a question; None where there is no such file.

    Raises:
        UserError: a line is no `question TAB ['answer', ...]`.
    """
    path = Path(data_dir) / f"{split}.qa"
    if not path.is_file():
        return None
    lines = gold_lines("--data_dir", str(path), "qa")
    answers = parse_lines("--data_dir", str(path), lines, "qa")
    return list(zip((split_qa_line(line)[0] for line in lines), answers, strict=True))


def _blank_line_problems(path: Path, lines: list[str]) -> list[str]:
    if not lines:
        return [f"--data_dir {path.parent}: {path.name} is empty; one example a line is expected in it"]
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if not blank:
        return []
    return [
        f"--data_dir {path.parent}: {path.name}: blank lines, {len(blank)} in all, the first is line {blank[0]};"
        " fill them or remove them from .source and .target alike"
    ]


class Seq2SeqDataset:
    """Pairs of one line of `{type_path}.source` and one of `{type_path}.target`, read by a torch `DataLoader`.

    Where there is a `{type_path}.qa`, too, each batch has the "answers" that are right, lists of texts; and after
    `draw_answers` the target is one of them, another in each epoch.

    Args:
        tokenizer: reads the sources and the targets; of a `RagTokenizer` the question encoder's reads the sources and
            the generator's the targets.
        n_obs: pairs to use, from the first on; None or -1 for all.
        src_lang: kept as an attribute, without effect, as in the public suite.
        tgt_lang: as `src_lang`.
        prefix: put before every source (T5's "question: ").
        target_tokenizer: reads the targets in place of `tokenizer`.
    """

    def __init__(
        self,
        tokenizer,
        data_dir: str | os.PathLike,
        max_source_length: int,
        max_target_length: int,
        type_path: str = "train",
        n_obs: int | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        prefix: str = "",
        target_tokenizer=None,
    ):
        self.tokenizer = getattr(tokenizer, "question_encoder", tokenizer)
        self.target_tokenizer = target_tokenizer or getattr(tokenizer, "generator", tokenizer)
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        end = None if n_obs is None or n_obs < 0 else n_obs
        self.sources = [prefix + line for line in read_lines(Path(data_dir) / f"{type_path}.source")[:end]]
        self.targets = read_lines(Path(data_dir) / f"{type_path}.target")[:end]
        assert len(self.sources) == len(self.targets), "data_file_problems comes first"
        answers = read_answers(data_dir, type_path)
        self.answers = None if answers is None else [right for _, right in answers[:end]]
        self.seed, self.epochs = 0, None
        self._warn_of_cut_sources(type_path)
        self._warn_of_cut_targets(type_path)

    @staticmethod
    def get_char_lens(data_file: str | os.PathLike) -> list[int]:
        """Characters of each line of a file, without its end."""
        return lmap(len, read_lines(data_file))

    def _warn_of_cut_sources(self, type_path: str) -> None:
        """A question beyond the limit loses its end. Only long lines are looked at: a token has a byte or more."""
        long = [source for source in self.sources if len(source.encode(errors="replace")) > self.max_source_length - 2]
        lengths = [len(ids) for ids in self.tokenizer(long, verbose=False)["input_ids"]] if long else []
        cut = sum(length > self.max_source_length for length in lengths)
        if cut:
            logger.warning(
                f"{cut} of {len(self.sources)} questions of {type_path}.source are longer than --max_source_length "
                f"{self.max_source_length} tokens (the longest has {max(lengths)}) and are cut"
            )

    def _warn_of_cut_targets(self, type_path: str) -> None:
        """A target beyond the limit trains without its end, and without the end token: worth a word."""
        targets = self.targets if self.answers is None else list(itertools.chain(*self.answers))
        lengths = [len(ids) for ids in encode_answers(self.target_tokenizer, targets, verbose=False)["input_ids"]]
        cut = sum(length > self.max_target_length for length in lengths)
        if cut:
            logger.warning(
                f"{cut} of {len(lengths)} targets of {type_path}.target are longer than {self.max_target_length} tokens"
                f" (the longest has {max(lengths)}) and are cut; raise the maximum target length to keep them whole"
            )

    def __len__(self) -> int:
        return len(self.sources)

    def draw_answers(self, seed: int, epochs: Any) -> None:
        """Let each epoch have an answer of its own, drawn by seed, epoch and example, whatever the number of ranks.

        Args:
            epochs: its attribute `epoch` is the epoch that an example is read for.
        """
        self.seed, self.epochs = seed, epochs

    def _target(self, index: int) -> str:
        if self.answers is None or self.epochs is None:
            return self.targets[index]
        return random.Random(f"{self.seed} {self.epochs.epoch} {index}").choice(self.answers[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = {"source": self.sources[index], "target": self._target(index), "index": index}
        return example if self.answers is None else example | {"answers": self.answers[index]}

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenize a batch, each side padded on the right to its longest: input_ids (B, S), labels (B, T), int64.

        The public suite names the targets `decoder_input_ids`. They are not: the loss shifts them first.
        """
        columns = {key: [example[key] for example in batch] for key in batch[0]}
        padded = {"padding": "longest", "padding_side": "right", "return_tensors": "pt"}
        sources = encode_questions(self.tokenizer, columns["source"], self.max_source_length, **padded)
        targets = encode_answers(self.target_tokenizer, columns["target"], self.max_target_length, **padded)
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


def encode_line(
    tokenizer,
    line: str,
    max_length: int,
    padding_side: str,
    pad_to_max_length: bool = True,
    return_tensors: str | None = "pt",
):
    """One line as the tokenizer's ids and mask, (1, S), cut at `max_length` and, if asked to, padded up to it."""
    return tokenizer(
        [line],
        max_length=max_length,
        padding="max_length" if pad_to_max_length else False,
        padding_side=padding_side,
        truncation=True,
        return_tensors=return_tensors,
    )


# --- Small helpers ----------------------------------------------------------------------------------------------------


def lmap(f: Callable, x: Iterable) -> list:
    """`list(map(f, x))`."""
    return list(map(f, x))


def flatten_list(summary_ids: Iterable[Iterable]) -> list:
    """The items of all the lists, in one list."""
    return list(itertools.chain.from_iterable(summary_ids))


def is_rag_model(model_prefix: str) -> bool:
    """Whether a model type (`rag_sequence`, `bart`, ...) is a RAG model's."""
    return model_prefix.startswith("rag")


def set_extra_model_params(extra_params: Sequence[str], hparams: Any, config: Any) -> tuple[Any, Any]:
    """Move the settings that `hparams` has, and that are not empty, from its attributes into a model's config.

    Raises:
        UserError: the model has no such setting.
    """
    from rag.models.checkpoints import override_config

    settings = {name: value for name in extra_params if (value := getattr(hparams, name, None))}
    override_config(config, settings)
    for name in settings:
        delattr(hparams, name)
    return hparams, config


def save_json(content: Any, path: str | os.PathLike, indent: int | None = 2, **json_dump_kwargs: Any) -> None:
    """Write an object as indented JSON, whole or not at all, of a link into the file behind it.

    Other arguments are those of `json.dump`.
    """
    files.save_json(content, path, indent, follow=True, **json_dump_kwargs)


class _PlainDataPickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Called for whatever is neither a number nor text nor a container of Python's."""
        raise TypeError(
            f"pickle_save writes plain data only, not a {type(obj).__name__}, which would have to be run to be read; "
            "use save_json(vars(args), path) for settings and torch.save for tensors"
        )


def pickle_save(obj: Any, path: str | os.PathLike) -> None:
    """Pickle numbers, text, and lists, tuples, sets and dicts of them.

    Raises:
        TypeError: there is an object of another class in it, a function or a class; nothing is written.
    """
    with atomic_write(path, "wb", follow=True) as file:
        _PlainDataPickler(file).dump(obj)


# --- Where a result came from -----------------------------------------------------------------------------------------


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


def save_git_info(folder_path: str | os.PathLike) -> None:
    """Write `git_log.json` into a folder."""
    files.save_json(get_git_info(), Path(folder_path) / "git_log.json")
