"""The files of an index: a FAISS file or a folder of shards, and `index.json` beside it, which says what made it.

write_faiss_index(index, shard_path(folder, 0, 1000))
description = read_description(index_path)
encoder_mismatches(description, config.question_encoder)
"""

import os
import re
from pathlib import Path

import faiss

from rag.files import load_json, save_json

DESCRIPTION_FILE = "index.json"


def shard_path(folder: str | os.PathLike, start: int, end: int) -> Path:
    """The FAISS file of the rows from `start` to before `end`, in the folder of an index that is cut into shards."""
    return Path(folder) / f"rows-{start:012d}-{end:012d}.faiss"


def shard_files(folder: str | os.PathLike) -> list[tuple[Path, int, int]]:
    """The FAISS files of such a folder, each with its first row and the one behind its last, in the rows' order."""
    found = [(path, re.fullmatch(r"rows-(\d+)-(\d+)\.faiss", path.name)) for path in Path(folder).glob("rows-*.faiss")]
    return sorted(((path, int(rows[1]), int(rows[2])) for path, rows in found if rows), key=lambda file: file[1:])


def write_faiss_index(index, path: str | os.PathLike) -> None:
    """Write the index whole or not at all."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        faiss.write_index(index, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_description(folder: str | os.PathLike, description: dict) -> None:
    """Write `index.json`: what made the index, so that a mismatch is noticed before hours of training."""
    save_json(description, Path(folder) / DESCRIPTION_FILE)


def read_description(index_path: str | os.PathLike) -> dict:
    """The `index.json` beside a FAISS file; {} where there is none (an index of another origin)."""
    path = Path(index_path).parent / DESCRIPTION_FILE
    return load_json(path) if path.is_file() else {}


def encoder_mismatches(made_by: dict, question_encoder, name: str | None = None) -> list[str]:
    """Signs that questions and passages are embedded by encoders that were not trained together.

    DPR's published pairs are "single-nq" and "multiset"; across them up to 11 points of top-20 recall are lost.

    Args:
        made_by: the index's `index.json`; of another origin, {}.
        question_encoder: its config.
        name: where it is from; None for what the config says.
    """
    found = []
    theirs = name or getattr(question_encoder, "name_or_path", None) or ""
    passages_pair, questions_pair = (
        re.findall("single-nq|multiset", source) for source in (made_by.get("encoder", ""), theirs)
    )
    if passages_pair and questions_pair and passages_pair != questions_pair:
        found.append(
            f"the passages' encoder {made_by['encoder']} is of the {passages_pair[0]} pair, the question encoder "
            f"{theirs} of {questions_pair[0]}: retrieval will suffer; embed them with "
            f"facebook/dpr-ctx_encoder-{questions_pair[0]}-base"
        )
    ours = {key: made_by[key] for key in ("pooling", "normalize") if key in made_by}
    if ours and ours != (asked := pooling_of(question_encoder)):
        found.append(f"passages are pooled by {ours}, questions by {asked}: retrieval will suffer")
    return found


def pooling_of(encoder) -> dict:
    """How an encoder with this config makes one vector; DPR's is the first token's."""
    if encoder.model_type == "pooled_encoder":
        return {"pooling": encoder.pooling, "normalize": encoder.normalize}
    return {"pooling": "cls", "normalize": False}
