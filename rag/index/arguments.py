"""The flags that say which index is searched and how: declared once, parsed by every script that searches.

@dataclass
class EvalArguments(SearchArguments): ...
args.apply_to(config)                 # a RagConfig, which carries them to `open_index`
index_effort(config)                  # what an index is opened with
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from rag.command_line.flags import flag
from rag.errors import UserError, raise_problems
from rag.hub import is_owned_name

# What bears on a search of any index, and what belongs to wiki_dpr alone.
SEARCH_FLAGS = ("ef_search", "nprobe", "doc_vectors", "index_device", "index_precision")
WIKI_FLAGS = ("dataset", "dataset_encoding", "use_dummy_dataset")
# FAISS counts in 32 bits; an index allows less, by its size (rag/index/faiss_opening.py).
MOST_EFFORT = 2**31 - 1
WITHOUT_ENCODER = ("bm25", "given")  # kinds that read a question's words alone, so that no question encoder runs
READING_TEXT = (*WITHOUT_ENCODER, "hybrid")  # kinds that read a question's words
FUSION_FLAGS = ("fusion", "dense_weight", "hybrid_depth")
HYBRID_DEPTH = 100
# Of the dense part, by the fusion: docs/better_passages.md has the sweep over training questions. Cormack et al. 2009
# give all ranks one weight.
DENSE_WEIGHTS = {"weighted": 0.6, "ranks": 0.5}
HUB_PREFIX = "hub:"  # before the name of a dataset on the hub, in the place of a folder of passages
NO_PASSAGES_FILE = "--index_name given needs --passages_file, the passages that were found for each question"
INDEX_FLAGS = (
    "index_name", "index_path", "passages_path", "passages_file", *SEARCH_FLAGS, *FUSION_FLAGS, *WIKI_FLAGS,
)  # fmt: skip


@dataclass(kw_only=True)
class EffortArguments:
    """How hard a search tries."""

    ef_search: int | None = flag(
        None, "Candidates an HNSW search keeps: more find more, slower; left out, the index's own (16)."
    )
    nprobe: int | None = flag(
        None, "Lists an IVF search visits: more find more, slower; left out, the index's own (1)."
    )

    def effort_problems(self) -> list[str]:
        """What is out of range."""
        values = {"ef_search": self.ef_search, "nprobe": self.nprobe}
        return [
            f"--{name} {value} must be from 1 to {MOST_EFFORT:,}"
            for name, value in values.items()
            if value is not None and not 1 <= value <= MOST_EFFORT
        ]


@dataclass(kw_only=True)
class FusionArguments:
    """How a hybrid index makes one score of two."""

    fusion: Literal["weighted", "ranks"] | None = flag(
        None,
        "hybrid: weighted adds both scores, each less its mean over a question's candidates and divided by their "
        "deviation; ranks adds reciprocal ranks; left out, the checkpoint's, or weighted.",
    )
    dense_weight: float | None = flag(
        None,
        "hybrid: weight of the dense part from 0 to 1, the words' is the rest; left out, the checkpoint's, or 0.6 "
        "(weighted) and 0.5 (ranks).",
    )
    hybrid_depth: int | None = flag(
        None, "hybrid: passages that each of the two indexes is asked for; left out, the checkpoint's, or 100."
    )

    def fusion_problems(self, index_name: str | None) -> list[str]:
        """What is out of range, or has no use with this kind of index; None for one that is not known yet."""
        given = {name: value for name in FUSION_FLAGS if (value := getattr(self, name)) is not None}
        if index_name not in (None, "hybrid"):
            return [
                f"--{name} {value} is for --index_name hybrid, not {index_name}; leave it out"
                for name, value in given.items()
            ]
        problems = []
        if self.dense_weight is not None and not 0 <= self.dense_weight <= 1:
            problems.append(f"--dense_weight {self.dense_weight:g} must be from 0 to 1")
        if self.hybrid_depth is not None and not 1 <= self.hybrid_depth <= MOST_EFFORT:
            problems.append(f"--hybrid_depth {self.hybrid_depth} must be from 1 to {MOST_EFFORT:,}")
        return problems


@dataclass(kw_only=True)
class SearchArguments(EffortArguments, FusionArguments):
    """Which index is searched, and how. What is left out is the checkpoint's."""

    index_name: Literal["exact", "compressed", "legacy", "custom", "bm25", "hybrid", "given"] | None = flag(
        None,
        "Kind of index; left out, the checkpoint's, custom where --passages_path is given, or given where "
        "--passages_file is.",
    )
    passages_path: str | None = flag(
        None,
        "Folder of passages from use_own_knowledge_dataset.py (custom, bm25, hybrid), or hub:OWNER/NAME for what its "
        "--push_to_hub has left on the Hugging Face hub, with its index.",
    )
    passages_file: str | None = flag(
        None,
        "Passages that another system found, in the place of an index (given): .jsonl of `{question, titles, texts, "
        "scores}`, or the .json of DPR's retriever. Scores stay as they are: no question encoder runs or learns.",
    )
    index_path: str | None = flag(
        None,
        "FAISS file or folder of shards (custom, hybrid), or a folder (legacy; bm25, where it defaults to a folder "
        "beside the passages).",
    )
    index_device: str | None = flag(
        None,
        "cuda, cuda:1 or cpu: compare each question with all embeddings, held there in half precision; "
        "left out, FAISS searches.",
    )
    index_precision: Literal["fp16", "int8"] | None = flag(
        None,
        "How --index_device holds the embeddings: int8 takes half the bytes of fp16, and what it finds is ranked again "
        "in float32; left out, the checkpoint's, or fp16.",
    )
    dataset: str | None = flag(
        None, "wiki_dpr (exact, compressed): its name on the hub or a folder of its layout; left out, the checkpoint's."
    )
    use_dummy_dataset: bool = flag(
        False, "Use the first 10,000 passages of wiki_dpr only, also where the checkpoint uses all."
    )
    dataset_encoding: Literal["nq", "multiset"] | None = flag(
        None, "Encoder pair of wiki_dpr; left out, the pair in the question encoder's name, else nq."
    )
    doc_vectors: Literal["passages", "index"] | None = flag(
        None,
        "Take the vectors for document scores from the passages or from the index; left out, index for "
        "exact, passages for compressed.",
    )

    def __post_init__(self):
        if self.passages_path is not None and self.index_name is None:
            self.index_name = "custom"  # nothing else reads them
        if self.passages_file is not None and self.index_name is None:
            self.index_name = "given"

    @property
    def is_on_hub(self) -> bool:
        """Whether the passages are named by a dataset on the hub."""
        return self.passages_path is not None and self.passages_path.startswith(HUB_PREFIX)

    def given(self) -> dict[str, Any]:
        """The flags that were given, by name."""
        values = {name: getattr(self, name) for name in INDEX_FLAGS}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def search_problems(self) -> list[str]:
        """What is out of range, no name of a device or a dataset, an idle precision, or passages from two places."""
        problems = self.effort_problems() + device_problems("--index_device", self.index_device)
        problems += self.fusion_problems(self.index_name)
        if self.is_on_hub and not is_owned_name(str(self.passages_path).removeprefix(HUB_PREFIX)):
            problems.append(f"--passages_path {self.passages_path} names no dataset; give hub:OWNER/NAME")
        if self.passages_file is not None and self.index_name != "given":
            other = "--passages_path" if self.passages_path is not None else f"--index_name {self.index_name}"
            problems.append(
                f"--passages_file {self.passages_file} is read in the place of an index, and {other} asks for one; "
                "leave one out"
            )
        if self.index_precision is not None and self.index_device is None:
            problems.append(
                f"--index_precision {self.index_precision} is how --index_device holds the embeddings; give "
                "--index_device cuda, too, or leave it out"
            )
        return problems

    def path_problems(self) -> list[str]:
        """Paths that this kind of index needs and that are missing, or that it does not read."""
        if self.is_on_hub and self.index_path:
            return [f"--index_path {self.index_path}: {self.passages_path} has an index of its own; leave it out"]
        both = self.index_name in ("custom", "hybrid") and not self.is_on_hub
        if both and not (self.passages_path and self.index_path):
            return [
                f"--index_name {self.index_name} needs --passages_path and --index_path; use_own_knowledge_dataset.py "
                "makes both"
            ]
        if self.index_name == "bm25" and not self.passages_path:
            return [
                "--index_name bm25 needs --passages_path, a folder of passages; use_own_knowledge_dataset.py makes one"
            ]
        if self.index_name == "given" and not self.passages_file:
            return [NO_PASSAGES_FILE]
        if self.index_name not in (None, "custom", "bm25", "hybrid") and self.passages_path:
            return [
                f"--passages_path is read with --index_name custom, bm25 and hybrid only, not with {self.index_name}"
            ]
        return []

    def apply_to(self, config) -> None:
        """Put the flags that were given into a `RagConfig`, which has no fields for some of them.

        Raises:
            UserError: flags were given and it is the config of a model that retrieves nothing, or --index_name given
                where neither names a file, or flags of fusion with an index of another kind.
        """
        if not hasattr(config, "index_name"):
            raise_problems(
                [
                    f"--{name} {value}: a {config.model_type} model has no such setting; leave it out"
                    for name, value in self.given().items()
                ]
            )
        for name, value in self.given().items():
            setattr(config, name, value)
        raise_problems(self.fusion_problems(getattr(config, "index_name", None)))
        if getattr(config, "index_name", None) == "given" and not getattr(config, "passages_file", None):
            raise UserError(NO_PASSAGES_FILE)


def device_problems(flag: str, name: str | None) -> list[str]:
    """The problem with the name of a device, if any; whether there is such a device takes torch to tell."""
    if name is None or re.fullmatch(r"cpu|cuda(:\d+)?", name):
        return []
    return [f"{flag} {name} is no device; give cuda, cuda:1 or cpu, or leave it out"]


def index_effort(config) -> dict[str, Any]:
    """ef_search, nprobe, device and precision of a `RagConfig`, which has them only where they were set."""
    effort = {name: getattr(config, name, None) for name in ("ef_search", "nprobe")}
    return effort | {name: getattr(config, f"index_{name}", None) for name in ("device", "precision")}


def fusion_of(config) -> dict[str, Any]:
    """fusion, dense_weight and hybrid_depth of a `RagConfig`, which has them only where they were set."""
    fusion, weight, depth = (getattr(config, name, None) for name in FUSION_FLAGS)
    fusion = "weighted" if fusion is None else fusion
    weight = DENSE_WEIGHTS[fusion] if weight is None else weight
    return dict(zip(FUSION_FLAGS, (fusion, weight, HYBRID_DEPTH if depth is None else depth), strict=True))


def teaches(index_name: str | None, fusion: str | None, dense_weight: float | None) -> bool:
    """Whether a question encoder could learn through this kind of index's scores, as far as flags tell."""
    return index_name not in WITHOUT_ENCODER and not (
        index_name == "hybrid" and (fusion == "ranks" or dense_weight == 0)
    )
