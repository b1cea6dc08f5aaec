"""The finetuning dataset, its checks, and where a result came from; the public suite's helpers are imported here.

Nothing heavy is imported here, so that a script can check its arguments and its data before it waits for torch.

    python -c "from rag.metrics import f1_score; print(f1_score('the old Eiffel Tower', 'Eiffel Tower'))"
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Public names of this module, whose code is in rag/.
from rag.files import load_json, read_lines, save_json
from rag.metrics import calculate_exact_match, exact_match_score, f1_score, normalize_answer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

__all__ = [
    "Seq2SeqDataset",
    "calculate_exact_match",
    "check_data_files",
    "exact_match_score",
    "f1_score",
    "get_git_info",
    "load_json",
    "normalize_answer",
    "save_git_info",
    "save_json",
    "trim_batch",
]

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
