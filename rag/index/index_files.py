"""The files of an index: a FAISS file or a folder of shards, and `index.json` beside it, which says what made it.

    write_faiss_index(index, shard_path(folder, 0, 1000))
    description = read_description(index_path)
    description.encoder_mismatches(config.question_encoder)

Files appear whole or not at all.
"""

import os
import re
import types
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any, get_args, get_origin, get_type_hints

import faiss

from rag.errors import UserError, printable
from rag.files import json_digest, load_json, save_json

DESCRIPTION_FILE = "index.json"
# Two lots of passages can share an index where these are equal.
VECTOR_FIELDS = (
    "encoder_digest", "pooling", "normalize", "input", "passage_prompt", "max_length", "precision", "embeddings",
    "words_a_passage",
)  # fmt: skip


# --- FAISS files ------------------------------------------------------------------------------------------------------


def shard_path(folder: str | os.PathLike, start: int, end: int) -> Path:
    """The FAISS file of the rows from `start` to before `end`, in the folder of an index that is cut into shards."""
    return Path(folder) / f"rows-{start:012d}-{end:012d}.faiss"


def shard_files(folder: str | os.PathLike) -> list[tuple[Path, int, int]]:
    """The FAISS files of such a folder, each with its first row and the one behind its last, in the rows' order."""
    names = [(path, re.fullmatch(r"rows-(\d+)-(\d+)\.faiss", path.name)) for path in Path(folder).glob("rows-*.faiss")]
    return sorted(((path, int(rows[1]), int(rows[2])) for path, rows in names if rows), key=lambda file: file[1:])


def write_faiss_index(index, path: str | os.PathLike) -> None:
    """Write the index whole or not at all."""
    temporary = f"{path}.{os.getpid()}.part"
    Path(temporary).unlink(missing_ok=True)  # FAISS would follow a link
    try:
        faiss.write_index(index, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# --- index.json -------------------------------------------------------------------------------------------------------


@dataclass
class DocumentsPart:
    """Documents that were added in one go."""

    csv_path: str
    csv_digest: str
    drop_duplicates: bool
    documents: int
    passages: int
    digest: str = ""  # of the first part: that of its passages


@dataclass
class IndexDescription:
    """What made the passages and their index. A field that is empty is not known: the index has another origin."""

    # The encoder and all that bears on the vectors.
    encoder: str = ""  # folder or hub name
    encoder_digest: str = ""  # of its weights
    pooling: str = ""
    normalize: bool | None = None
    input: str = ""  # "title, text" (a pair) or "title text"
    passage_prompt: str = ""  # text before each passage
    max_length: int = 0  # tokens the encoder reads
    precision: str = ""  # dtype of the encoder's weights
    embeddings: str = ""  # dtype of the vectors on disk
    dimension: int = 0
    # The documents and the passages they were cut into.
    csv_path: str = ""
    csv_digest: str = ""
    drop_duplicates: bool = False
    words_a_passage: int = 0
    documents: int = 0
    passages: int = 0
    parts: list[DocumentsPart] = field(default_factory=list)  # in the order in which they were added
    digest: str = ""  # of all of the above: the dataset's fingerprint
    # The index over them.
    metric: str = ""
    factory: str = ""  # FAISS's factory string
    shards: int = 1
    train_sample: int | None = None
    index: str = ""  # file or folder beside index.json; empty while it is being built
    index_seconds: float = 0.0
    recall: list[dict[str, float]] | None = None  # at growing effort, with queries_per_second
    versions: dict[str, str] | None = None  # of the packages that built it
    checksums: dict[str, str] = field(default_factory=dict)  # of passages and index, by path beside index.json

    @property
    def is_finished(self) -> bool:
        """Whether there is an index that this describes; an index.json of an earlier version has no parts."""
        return bool(self.index and self.parts)

    def passages_digest(self) -> str:
        """A digest of passages, encoder and settings, wherever documents and encoder lie."""
        names = (*VECTOR_FIELDS, "dimension", "csv_digest", "drop_duplicates", "documents", "passages")
        values = {name: getattr(self, name) for name in names}
        if not self.passage_prompt:
            del values["passage_prompt"]  # so that passages from before there were prompts are known again
        return json_digest(values)

    def part(self) -> DocumentsPart:
        """The documents, as one of the parts."""
        return DocumentsPart(self.csv_path, self.csv_digest, self.drop_duplicates, self.documents, self.passages)

    def encoder_mismatches(self, question_encoder, name: str | None = None) -> list[str]:
        """Signs that questions and passages are embedded by encoders that were not trained together.

        DPR's published pairs are "single-nq" and "multiset"; across them up to 11 points of top-20 recall are lost.

        Args:
            question_encoder: its config.
            name: where it is from; None for what the config says.
        """
        mismatches: list[str] = []
        theirs = name or getattr(question_encoder, "name_or_path", None) or ""
        passages_pair, questions_pair = (re.findall("single-nq|multiset", source) for source in (self.encoder, theirs))
        if passages_pair and questions_pair and passages_pair != questions_pair:
            mismatches.append(
                f"the passages' encoder {self.encoder} is of the {passages_pair[0]} pair, the question encoder "
                f"{theirs} of {questions_pair[0]}: retrieval will suffer; embed them with "
                f"facebook/dpr-ctx_encoder-{questions_pair[0]}-base"
            )
        ours = {"pooling": self.pooling, "normalize": self.normalize}
        if self.normalize is not None and ours != (questions := pooling_of(question_encoder)):
            mismatches.append(f"passages are pooled by {ours}, questions by {questions}: retrieval will suffer")
        return [printable(mismatch) for mismatch in mismatches]


def write_description(folder: str | os.PathLike, description: IndexDescription) -> None:
    """Write `index.json`, whole or not at all."""

    def known(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if value not in (None, "")}

    save_json(asdict(description, dict_factory=known), Path(folder) / DESCRIPTION_FILE)


def read_description(index_path: str | os.PathLike, flag: str = "--index_path") -> IndexDescription:
    """The `index.json` beside a FAISS file; one that knows nothing where there is none (an index of another origin).

    Args:
        index_path: the FAISS file or the folder of passages, which need not be there.
        flag: the one that gave the folder, for the message.

    Raises:
        UserError: it is not JSON, of another shape, or names a file outside its folder.
    """
    path = Path(index_path).parent / DESCRIPTION_FILE
    try:
        if not path.is_file():
            return IndexDescription()
        description = _of_json(IndexDescription, load_json(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{flag} {path.parent}: its {DESCRIPTION_FILE} cannot be read ({str(error).splitlines()[0]}); remove it, "
            "or build the knowledge again"
        ) from error
    return description


def _of_json(kind: type, values: Any) -> Any:
    """An instance of a dataclass of this module; keys of a later version are left out.

    Raises:
        ValueError: a value is of another type, one that must be there is missing, or a path leads out of the folder.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    hints = get_type_hints(kind)
    known = {name: value for name, value in values.items() if name in hints and value is not None}
    if "parts" in known and isinstance(known["parts"], list):
        known["parts"] = [_of_json(DocumentsPart, part) for part in known["parts"]]
    for name, value in known.items():
        if not isinstance(value, _types_of(hints[name])) or (hints[name] is int and isinstance(value, bool)):
            raise ValueError(f"{name} is {str(value)[:40]}")
    checksums = known.get("checksums", {})
    if not all(
        isinstance(value, str) and re.fullmatch(r"\w+:[0-9a-f]+:\d{1,18}", value) for value in checksums.values()
    ):
        raise ValueError("checksums hold something else")
    for path in [known.get("index", ""), *checksums]:
        if PurePath(path).is_absolute() or ".." in PurePath(path).parts or "\0" in path:
            raise ValueError(f"{path[:80]!r} leads out of the folder")
    if PurePath(known.get("index", "")).name != known.get("index", ""):
        raise ValueError(f"index {known['index'][:80]!r} is not beside it")
    missing = [one.name for one in fields(kind) if one.default is one.default_factory and one.name not in known]
    if missing:  # both are MISSING: a field without a default
        raise ValueError(f"a part lacks {missing[0]}")
    return kind(**known)


def _types_of(hint) -> tuple[type, ...]:
    """The classes that a field's values may have in Python after JSON."""
    if isinstance(hint, types.UnionType):
        return tuple(one for part in get_args(hint) for one in _types_of(part))
    return (int, float) if hint is float else (get_origin(hint) or hint,)


def pooling_of(encoder) -> dict[str, Any]:
    """How an encoder with this config makes one vector; DPR's is the first token's."""
    if encoder.model_type == "pooled_encoder":
        return {"pooling": encoder.pooling, "normalize": encoder.normalize}
    return {"pooling": "cls", "normalize": False}
