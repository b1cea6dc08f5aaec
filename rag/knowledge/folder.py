"""The folder that use_own_knowledge_dataset.py leaves: passages with embeddings, their index, and index.json.

    knowledge = build(args, source, embedder, description, made_by)     # or append(...), to what is there

index.json is written last and says what made the rest: `digest` names the passages, the encoder and all settings that
bear on the embeddings, and is the dataset's fingerprint; `parts` are the documents that were added one after the other.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from datasets import load_from_disk

from rag.errors import UserError, raise_problems
from rag.files import new_digest, remove, space_problems
from rag.index.build import EmbeddingFiles, IndexPlan, build_index, exact_scores, extend_index, measure
from rag.index.faiss_mapping import map_index
from rag.index.index_files import read_description, shard_files, shard_path, write_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.arguments import ENCODER_FLAG, PASSAGES_FOLDER, KnowledgeArguments
from rag.knowledge.embedding import (
    ShardPlan,
    add_shards,
    embed_more,
    embed_passages,
    is_complete,
    partial_folder,
    shards_of,
)
from rag.knowledge.workers import encoding_workers

HNSW_FILE = "my_knowledge_dataset_hnsw_index.faiss"
INDEX_FILE = "my_knowledge_dataset_index.faiss"
SHARDS_FOLDER = "my_knowledge_dataset_index"
# What must be equal for passages to be added to others, and what tells one part from another.
SAME_FOR_ALL = (
    "encoder_digest", "pooling", "normalize", "input", "max_length", "precision", "embeddings", "words_a_passage",
)  # fmt: skip
OF_A_PART = ("csv_path", "csv_digest", "drop_duplicates", "documents", "passages")
WORDS_A_QUERY = 10


@dataclass
class Knowledge:
    """What `main` made.

    Attributes:
        passages_path: folder of the passages, for `--passages_path`.
        index_path: the FAISS file or the folder of its shards, for `--index_path`.
        documents: that were read.
        passages: pieces they were cut into.
        dimension: d of the embeddings.
        reused: whether all of it was there from an earlier run.
        answer: of the RAG model; None where none was asked.
    """

    passages_path: str
    index_path: str
    documents: int
    passages: int
    dimension: int
    reused: bool = False
    answer: str | None = None


def read_made_by(args: KnowledgeArguments) -> dict:
    """The `index.json` of --output_dir; {} where there is none, or one of an earlier version."""
    made_by = read_description(Path(args.output_dir) / PASSAGES_FOLDER)
    return made_by if "parts" in made_by else {}


def read_known(args: KnowledgeArguments, made_by: dict) -> Iterator[tuple[str, str]]:
    """The passages that were there before this command, which may have been killed, added any."""
    dataset = load_from_disk(str(Path(args.output_dir) / PASSAGES_FOLDER)).select_columns(["title", "text"])
    for rows in dataset.select(range(made_by["passages"])).iter(1000):
        yield from zip(rows["title"], rows["text"], strict=True)


# --- Anew -------------------------------------------------------------------------------------------------------------


def build(args: KnowledgeArguments, source, embedder, description: dict, made_by: dict) -> Knowledge:
    """Embed the passages and index them, or take what an earlier run left."""
    output = Path(args.output_dir)
    passages_path = output / PASSAGES_FOLDER
    own = {name: value for name, value in description.items() if name not in ("csv_path", "encoder")}
    digest = _digest(own)
    plan = IndexPlan(
        args.index_factory or f"HNSW{args.m},Flat", embedder.dimension, args.num_index_shards, args.train_sample
    )
    index = {
        "factory": plan.factory, "shards": plan.shards, "train_sample": plan.train_sample, "index": _index_name(plan)
    }  # fmt: skip
    description |= {"digest": digest, "metric": "inner product", "parts": [_part(description) | {"digest": digest}]}
    if made_by and made_by["parts"][0]["digest"] == digest and is_complete(passages_path, made_by["digest"]):
        # Documents may have been added since.
        description |= {name: made_by[name] for name in ("digest", "parts", "documents", "passages")}
    knowledge = _knowledge(output, description | index)

    embedded = is_complete(passages_path, description["digest"])
    if embedded and index.items() <= made_by.items() and Path(knowledge.index_path).exists():
        print(f"{output} holds this knowledge already and is reused")
        knowledge.reused = True
        return knowledge
    if passages_path.exists() and not embedded:
        raise UserError(
            f"--output_dir {output} holds knowledge of other documents, another encoder or other settings; "
            "give another folder or remove it"
        )
    raise_problems(plan.problems(description["passages"]))
    check_space(args, description, source.survey.text_bytes, plan, partial_folder(passages_path, digest))

    output.mkdir(parents=True, exist_ok=True)
    if made_by:
        write_description(output, made_by | {"index": None})  # from here on there is no index that it describes
    if not embedded:
        shards = ShardPlan(source.count, num_shards=args.num_shards, dtype=description["embeddings"])
        with encoding_workers(args, embedder, description["encoder_digest"]) as workers:
            embed_passages(source.passages(), workers, passages_path, digest, shards)
        _tell_what_was_cut(workers)
    start = time.monotonic()
    vectors = EmbeddingFiles(shards_of(passages_path), embedder.dimension)
    build_index(vectors, plan, Path(knowledge.index_path), _digest([description["digest"], index]))
    _finish(args, description | index | {"index_seconds": round(time.monotonic() - start, 1)}, embedder, vectors)
    for name in {HNSW_FILE, INDEX_FILE} - {index["index"]}:
        remove(output / name)
    if plan.shards == 1:
        remove(output / SHARDS_FOLDER)
    return knowledge


def check_space(args: KnowledgeArguments, description: dict, text_bytes: int, plan: IndexPlan, partial: Path) -> None:
    """Refuse what the disk or the memory cannot hold, before hours of embedding; roughly, and rather too late."""
    count, d = description["passages"], plan.dimension
    index = count * plan.bytes_a_vector()
    in_memory = max(index // plan.shards, 4 * d * plan.sample_size(count) if plan.learns() else 0)
    dataset = count * d * np.dtype(description["embeddings"]).itemsize + text_bytes
    written = sum(file.stat().st_size for file in partial.glob("data-*.arrow"))
    needs = {partial: dataset + index - written}
    problems = space_problems(f"--output_dir {args.output_dir}", needs, "give a folder on a larger disk")
    memory = psutil.virtual_memory().available
    if in_memory > memory:
        problems.append(
            f"--index_factory {plan.factory}: the index takes {in_memory:,} bytes of memory while it is built and "
            f"{memory:,} are free; give more --num_index_shards, a kind with smaller vectors or a larger machine"
        )
    raise_problems(problems)


# --- To what is there -------------------------------------------------------------------------------------------------


def append(args: KnowledgeArguments, source, embedder, description: dict, made_by: dict) -> Knowledge:
    """Embed more passages and add them to the index; a folder stays as it is until all of it is at hand.

    New shards of embeddings gather in the dataset's folder, unknown to it, and the longer index, or its new shard, lies
    beside the old one. Then the dataset's list of files, the index and index.json are replaced, in moments, in this
    order; a run that is killed between them is finished by the next one.
    """
    _check_append(args, description, made_by)
    output = Path(args.output_dir)
    knowledge = _knowledge(output, made_by)
    passages_path, index_path = Path(knowledge.passages_path), Path(knowledge.index_path)
    known, total = made_by["passages"], made_by["passages"] + source.count
    if not source.count or any(part["csv_digest"] == description["csv_digest"] for part in made_by["parts"]):
        print(f"{output} holds these documents already")
        knowledge.reused = True
        return knowledge
    digest = _digest([made_by["digest"], description["csv_digest"], description["drop_duplicates"]])
    _check_room_to_append(args, description, source, index_path)

    shards = ShardPlan(source.count, f"data-{digest}", args.num_shards, made_by["embeddings"])
    with encoding_workers(args, embedder, description["encoder_digest"]) as workers:
        files = embed_more(source.passages(), workers, passages_path, shards)
    _tell_what_was_cut(workers)
    start = time.monotonic()
    vectors = EmbeddingFiles(files, embedder.dimension)
    staged = None if _rows_of(index_path) == total else extend_index(index_path, vectors, known, digest)

    add_shards(passages_path, files, digest)
    if staged is not None:
        os.replace(staged, shard_path(index_path, known, total) if index_path.is_dir() else index_path)
    description = made_by | {
        "digest": digest,
        "parts": [*made_by["parts"], _part(description)],
        "documents": made_by["documents"] + source.survey.documents,
        "passages": total,
        "index_seconds": round(time.monotonic() - start, 1),
    }
    _finish(args, description, embedder, vectors)
    return _knowledge(output, description)


def _check_append(args: KnowledgeArguments, description: dict, made_by: dict) -> None:
    output = Path(args.output_dir)
    if made_by.get("index") is None:
        raise UserError(f"--append: the index of {output} is not finished; run the command that was building it first")
    problems = [
        f"--append: the passages in {output} have {name} {made_by[name]}, these would have {description[name]}; give "
        f"the {ENCODER_FLAG} and the settings that they were made with"
        for name in SAME_FOR_ALL
        if made_by[name] != description[name]
    ]
    if args.index_factory not in (None, made_by["factory"]):
        problems.append(
            f"--index_factory {args.index_factory}: --append adds to an index of kind {made_by['factory']}; leave the "
            "flag out, or build another kind of the same passages first"
        )
    raise_problems(problems)


def _check_room_to_append(args: KnowledgeArguments, description: dict, source, index_path: Path) -> None:
    vectors = source.count * description["dimension"] * 4
    needed = source.survey.text_bytes + 2 * vectors + (0 if index_path.is_dir() else index_path.stat().st_size)
    raise_problems(space_problems(f"--output_dir {args.output_dir}", {index_path: needed}, "free some to add to it"))


def _rows_of(index_path: Path) -> int:
    if index_path.is_dir():
        return shard_files(index_path)[-1][2]
    return map_index(index_path).ntotal


# --- The end of both --------------------------------------------------------------------------------------------------


def _finish(args: KnowledgeArguments, description: dict, embedder, vectors: EmbeddingFiles) -> None:
    """Measure the index and write `index.json`."""
    output = Path(args.output_dir)
    knowledge = _knowledge(output, description)
    for left in output.glob(f".{PASSAGES_FOLDER}*index.*"):  # of a run that was killed and never taken up again
        remove(left)
    versions = {name: version(name) for name in ("torch", "transformers", "datasets", "faiss-cpu")}
    write_description(output, description | {"versions": versions})
    if args.recall_queries:
        rows = measure_recall(args, knowledge, embedder, vectors, description)
        write_description(output, description | {"versions": versions, "recall": rows})


def measure_recall(args: KnowledgeArguments, knowledge: Knowledge, embedder, vectors, description: dict) -> list[dict]:
    """Print how much of an exact search the index finds, and how fast.

    Queries are ten words from the middle of passages, embedded by the passages' encoder: no question is at hand, and
    these are not vectors that the index holds.
    """
    passages = load_from_disk(knowledge.passages_path).select_columns(["title", "text"])
    count = min(args.recall_queries, len(passages))
    chosen = np.sort(np.random.default_rng(0).choice(len(passages), count, replace=False, shuffle=False))
    pieces = [("", _middle(text)) for text in passages[chosen]["text"]]
    queries = np.empty((count, embedder.dimension), dtype=np.float32)
    for rows, batch in embedder(pieces):
        queries[rows] = batch

    def open_index(**effort) -> KnowledgeIndex:
        return KnowledgeIndex.load_from_disk(
            embedder.dimension, knowledge.passages_path, knowledge.index_path, **effort
        )

    n_docs = min(args.n_docs, len(passages))
    rows = measure(open_index, queries, exact_scores(vectors, queries, n_docs))
    print(
        f"{description['factory']}: {size_of(Path(knowledge.index_path)):,} bytes, built in "
        f"{description['index_seconds']} s; of the {n_docs} best for {count} pieces of {WORDS_A_QUERY} words it finds"
    )
    for row in rows:
        effort = " ".join(f"--{name} {value}" for name, value in row.items() if name in ("ef_search", "nprobe"))
        print(f"  {100 * row['recall']:5.1f}%  {row['queries_per_second']:10,.0f} queries/s  {effort}".rstrip())
    return rows


def _middle(text: str) -> str:
    words = text.split()
    start = max((len(words) - WORDS_A_QUERY) // 2, 0)
    return " ".join(words[start : start + WORDS_A_QUERY])


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _knowledge(output: Path, description: dict) -> Knowledge:
    return Knowledge(
        passages_path=str(output / PASSAGES_FOLDER),
        index_path=str(output / description["index"]),
        documents=description["documents"],
        passages=description["passages"],
        dimension=description["dimension"],
    )


def _index_name(plan: IndexPlan) -> str:
    if plan.shards > 1:
        return SHARDS_FOLDER
    return HNSW_FILE if plan.factory.startswith("HNSW") else INDEX_FILE


def _part(description: dict) -> dict:
    return {name: description[name] for name in OF_A_PART}


def _digest(values) -> str:
    return new_digest(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _tell_what_was_cut(embedder) -> None:
    if embedder.cut:
        print(f"{embedder.cut:,} passages reach the encoder's {embedder.max_length} tokens; the rest is not read")
