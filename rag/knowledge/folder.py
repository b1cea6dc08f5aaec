"""The folder that use_own_knowledge_dataset.py leaves: passages with embeddings, their index, and index.json.

    folder = KnowledgeFolder(Path("output/my_knowledge"), embedder, open_workers)
    knowledge = folder.build(source, description, plan)      # or folder.append(source, description)

index.json is written last and says what made the rest: its `digest` names the passages, the encoder and all settings
that bear on the embeddings, and is the dataset's fingerprint; `parts` are the documents that were added one after the
other; `checksums` are those of all files. What is found again and is not what was written is made again.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil

from rag.errors import UserError, raise_problems
from rag.files import json_digest, remove, space_problems
from rag.index.build import EmbeddingFiles, IndexPlan, build_index, extend_index
from rag.index.faiss_mapping import map_index
from rag.index.index_files import (
    DESCRIPTION_FILE,
    VECTOR_FIELDS,
    IndexDescription,
    shard_files,
    shard_path,
    write_description,
)
from rag.index.integrity import note_undamaged
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.arguments import (
    ENCODER_FLAG,
    HNSW_FILE,
    INDEX_FILE,
    INDEXES,
    OUTPUT_FLAG,
    PASSAGES_FOLDER,
    SHARDS_FOLDER,
    WORDS_FOLDER,
)
from rag.knowledge.contents import Knowledge, knowledge_in, other_passages, read_knowledge
from rag.knowledge.mending import all_checksums, index_is_whole, mend_lists, passages_are_whole, require_whole
from rag.knowledge.passages import PassageSource
from rag.knowledge.recall import report_recall
from rag.knowledge.shards import ShardPlan, digest_of, partial_folder, publish, shards_of, write_dataset, write_more

A_FILE = 2**13  # bytes that any file takes beside what is counted: its header, and what is left of its last block
SMALL_FILES = 2**16  # state.json, index.json and their like, and room to replace them


@dataclass
class KnowledgeFolder:
    """Puts passages into a folder and indexes them.

    Attributes:
        output: the folder.
        embedder: a `PassageEmbedder`, or what has a dimension: for it, and for the queries of the recall report.
        open_workers: a context that gives what embeds the shards (`encoding_workers`).
        num_shards: files of embeddings; None for about one in 2,048 passages.
        recall_queries: queries on which the index is compared with an exact search; 0 for none.
        n_docs: passages a query over which recall is counted.
    """

    output: Path
    embedder: Any
    open_workers: Callable[[], AbstractContextManager]
    num_shards: int | None = None
    recall_queries: int = 0
    n_docs: int = 5
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "datasets", "faiss-cpu")

    def build(self, source: PassageSource, description: IndexDescription, plan: IndexPlan) -> Knowledge:
        """Embed the passages and index them, or take what an earlier run left.

        Raises:
            UserError: the folder holds other knowledge, the index cannot be built, or there is no room for it.
        """
        earlier = read_knowledge(self.output)
        passages_path = self.output / PASSAGES_FOLDER
        mend_lists(self.output, description, earlier)
        description = self._described(description, plan, earlier)
        knowledge = knowledge_in(self.output, description)

        if passages_path.exists() and digest_of(passages_path) != description.digest:
            raise UserError(
                f"{OUTPUT_FLAG} {self.output} holds knowledge of other documents, another encoder or other settings, "
                "or is damaged; give another folder or remove it"
            )
        if not earlier.parts and not passages_path.exists() and (self.output / DESCRIPTION_FILE).exists():
            raise UserError(
                f"{OUTPUT_FLAG} {self.output} holds an {DESCRIPTION_FILE} that says nothing of passages; give another "
                "folder or remove it"
            )
        embedded = passages_path.exists() and passages_are_whole(self.output, description)
        if embedded and _same_index(description, earlier) and self._has_whole_index(earlier):
            self._complete(earlier)
            print(f"{self.output} holds this knowledge already and is reused")
            return replace(knowledge, reused=True)
        raise_problems(plan.problems(description.passages))
        self._require_room(source, description, plan)

        self.output.mkdir(parents=True, exist_ok=True)
        if earlier.parts:  # from here on there is no index that it describes
            write_description(self.output, replace(earlier, index="", checksums={}))
        if not embedded:
            shards = ShardPlan(source.count, num_shards=self.num_shards, dtype=description.embeddings)
            with self.open_workers() as workers:
                write_dataset(source.passages(), workers, passages_path, description.digest, shards)
            _print_what_was_cut(workers)
        start = time.monotonic()
        self._make_index(knowledge, description, plan)
        self._finish(replace(description, index_seconds=round(time.monotonic() - start, 1)))
        for name in INDEXES - {description.index}:
            remove(self.output / name)
        return knowledge

    def _has_whole_index(self, earlier: IndexDescription) -> bool:
        return index_is_whole(self.output, earlier, lambda: self._index_fits(earlier))

    def _described(self, description: IndexDescription, plan: IndexPlan, earlier: IndexDescription) -> IndexDescription:
        """The description with its digest, its parts and the index that is to be built."""
        digest = description.passages_digest()
        description = replace(
            description,
            digest=digest,
            parts=[replace(description.part(), digest=digest)],
            metric="inner product",
            factory=plan.factory,
            shards=plan.shards,
            train_sample=plan.train_sample,
            index=self._index_name(plan),
        )
        there = digest_of(self.output / PASSAGES_FOLDER)
        if earlier.parts and earlier.parts[0].digest == digest and there == earlier.digest:
            # Documents may have been added since.
            names = ("digest", "parts", "documents", "passages")
            return replace(description, **{name: getattr(earlier, name) for name in names})
        return description

    def _require_room(self, source: PassageSource, description: IndexDescription, plan: IndexPlan) -> None:
        """Refuse what disk or memory cannot hold, before hours of embedding; roughly, and rather too late."""
        count, d = description.passages, plan.dimension
        index = count * plan.bytes_a_vector()
        in_memory = max(index // plan.shards, 4 * d * plan.sample_size(count) if plan.learns() else 0)
        vectors = count * d * np.dtype(description.embeddings).itemsize if d else 0
        dataset = vectors + source.survey.text_bytes
        partial = partial_folder(self.output / PASSAGES_FOLDER, description.parts[0].digest)
        files = ShardPlan(max(count, 1), num_shards=self.num_shards).names()
        overhead = SMALL_FILES + A_FILE * (len(files) + 2 * plan.shards)
        written = sum(file.stat().st_size for file in partial.glob("data-*.arrow"))
        needs = {partial: dataset + index + overhead - written}
        problems = space_problems(f"--output_dir {self.output}", needs, "give a folder on a larger disk")
        memory = psutil.virtual_memory().available
        if in_memory > memory:
            problems.append(
                f"--index_factory {plan.factory}: the index takes {in_memory:,} bytes of memory while it is built and "
                f"{memory:,} are free; give more --num_index_shards, a kind with smaller vectors or a larger machine"
            )
        raise_problems(problems)

    def append(self, source: PassageSource, new: IndexDescription, factory: str | None) -> Knowledge:
        """Embed more passages and add them to the index; a folder stays as it is until all of it is at hand.

        New shards of embeddings gather in the dataset's folder, unknown to it, and the longer index, or its new shard,
        lies beside the old one. Then the dataset's list of files, the index and index.json are replaced, in moments, in
        this order; a run that is killed between them is finished by the next one.

        Args:
            new: what makes the passages to be added.
            factory: the kind of index that the user asks for; None for the one that is there.

        Raises:
            UserError: there is no finished index, these passages do not fit it, or there is no room for them.
        """
        earlier = read_knowledge(self.output)
        self._require_same_kind(earlier, new, factory)
        knowledge = knowledge_in(self.output, earlier)
        passages_path, index_path = Path(knowledge.passages_path), Path(knowledge.index_path)
        require_whole(self.output, earlier)
        total = earlier.passages + source.count
        if not source.count or any(part.csv_digest == new.csv_digest for part in earlier.parts):
            if digest_of(passages_path) == earlier.digest:  # else another --append is to be gone on with
                self._complete(earlier)
            print(f"{self.output} holds these documents already")
            return replace(knowledge, reused=True)
        digest = json_digest([earlier.digest, new.csv_digest, new.drop_duplicates])
        self._require_as_described(knowledge, earlier, digest)
        self._require_room_to_append(source, index_path)

        shards = ShardPlan(source.count, f"data-{digest}", self.num_shards, earlier.embeddings)
        with self.open_workers() as workers:
            checksums = write_more(source.passages(), workers, passages_path, shards)
        _print_what_was_cut(workers)
        start = time.monotonic()
        staged = self._extended(index_path, [passages_path / name for name in checksums], earlier.passages, digest)

        # A run that is killed from here on leaves files that are partly the new ones, for the next one to go on with.
        write_description(self.output, replace(earlier, checksums={}))
        publish(passages_path, checksums, digest)
        self._put(staged, index_path, earlier.passages, total)
        description = replace(
            earlier,
            digest=digest,
            parts=[*earlier.parts, new.part()],
            documents=earlier.documents + source.survey.documents,
            passages=total,
            index_seconds=round(time.monotonic() - start, 1),
        )
        self._finish(description)
        return knowledge_in(self.output, description)

    def _require_same_kind(self, earlier: IndexDescription, new: IndexDescription, factory: str | None) -> None:
        if not earlier.is_finished:
            raise UserError(
                f"--append: the index of {self.output} is not finished; run the command that was building it first"
            )
        problems = [
            f"--append: the passages in {self.output} have {name} {getattr(earlier, name)}, these would have "
            f"{getattr(new, name)}; give the {ENCODER_FLAG} and the settings that they were made with"
            for name in VECTOR_FIELDS
            if getattr(earlier, name) != getattr(new, name)
        ]
        if factory not in (None, earlier.factory):
            problems.append(
                f"--index_factory {factory}: --append adds to an index of kind {earlier.factory}; leave the flag out, "
                "or build another kind of the same passages first"
            )
        raise_problems(problems)

    def _require_as_described(self, knowledge: Knowledge, earlier: IndexDescription, digest: str) -> None:
        """Look at passages and index before more are embedded; at none that a killed run of this --append replaced."""
        found = digest_of(Path(knowledge.passages_path))
        if found == digest:
            return
        if found != earlier.digest:
            raise UserError(
                f"--append: the --append to {self.output} before this one was killed; run that command again first"
            )
        if (count := len(self._opened(knowledge))) != earlier.passages:
            raise other_passages(self.output, earlier.passages, count)

    def _require_room_to_append(self, source: PassageSource, index_path: Path) -> None:
        vectors = source.count * self.embedder.dimension * 4
        index = index_path.stat().st_size if index_path.is_file() else 0
        needed = source.survey.text_bytes + 2 * vectors + index + SMALL_FILES
        raise_problems(space_problems(f"--output_dir {self.output}", {index_path: needed}, "free some to add to it"))

    # --- The index: FAISS's ---

    def _index_name(self, plan: IndexPlan) -> str:
        if plan.shards > 1:
            return SHARDS_FOLDER
        return HNSW_FILE if plan.factory.startswith("HNSW") else INDEX_FILE

    def _make_index(self, knowledge: Knowledge, description: IndexDescription, plan: IndexPlan) -> None:
        vectors = EmbeddingFiles(shards_of(Path(knowledge.passages_path)), self.embedder.dimension)
        digest = json_digest([description.digest, _index_fields(description)])
        build_index(vectors, plan, Path(knowledge.index_path), digest)

    def _opened(self, knowledge: Knowledge) -> KnowledgeIndex:
        """Passages and index, which are found to fit each other."""
        index = KnowledgeIndex.load_from_disk(self.embedder.dimension, knowledge.passages_path, knowledge.index_path)
        index.init_index()
        return index

    def _index_fits(self, earlier: IndexDescription) -> bool:
        """Whether an index of which no checksum is known is one of all passages."""
        try:
            return len(self._opened(knowledge_in(self.output, earlier))) == earlier.passages
        except UserError:
            return False

    def _extended(self, index_path: Path, shards: list[Path], known: int, digest: str) -> Path | None:
        """The file that adds the rows from `known` on to an index; None where a killed run has put it there."""
        vectors = EmbeddingFiles(shards, self.embedder.dimension)
        return None if _rows_of(index_path) == len(vectors) else extend_index(index_path, vectors, known, digest)

    def _put(self, staged: Path | None, index_path: Path, known: int, total: int) -> None:
        if staged is not None:
            os.replace(staged, shard_path(index_path, known, total) if index_path.is_dir() else index_path)

    def _measured(self, description: IndexDescription) -> IndexDescription:
        """With the recall of the index, if it is wanted."""
        if not self.recall_queries:
            return description
        knowledge = knowledge_in(self.output, description)
        passages_path = Path(knowledge.passages_path)
        vectors = EmbeddingFiles(shards_of(passages_path), self.embedder.dimension)
        rows = report_recall(
            passages_path, Path(knowledge.index_path), self.embedder, vectors, description, self.recall_queries,
            self.n_docs,
        )  # fmt: skip
        return replace(description, recall=rows)

    # --- The end ---

    def _finish(self, description: IndexDescription) -> None:
        """Write `index.json`, then measure the index."""
        self._remove_leftovers()
        versions = {name: version(name) for name in self.packages}
        description = replace(
            description, versions=versions, recall=None, checksums=all_checksums(self.output, description)
        )
        write_description(self.output, description)
        note_undamaged(self.output, description)
        measured = self._measured(description)
        if measured != description:
            write_description(self.output, measured)
            note_undamaged(self.output, measured)

    def _complete(self, description: IndexDescription) -> None:
        """What a run of an earlier version, or one that was killed at its very end, has not written or removed."""
        self._remove_leftovers()
        complete = description
        if not complete.checksums:
            complete = replace(complete, checksums=all_checksums(self.output, complete))
        if complete.recall is None:
            complete = self._measured(complete)
        if complete != description:
            write_description(self.output, complete)
            note_undamaged(self.output, complete)

    def _remove_leftovers(self) -> None:
        """What killed runs that were never continued have left; locks stay, and what a search by words may build."""
        for left in self.output.glob(f".{PASSAGES_FOLDER}*"):
            if left.suffix != ".lock" and not left.name.startswith(f".{WORDS_FOLDER}."):
                remove(left)


def _index_fields(description: IndexDescription) -> dict:
    """What tells one index over the same passages from another."""
    return {name: getattr(description, name) for name in ("factory", "shards", "train_sample", "index")}


def _same_index(one: IndexDescription, other: IndexDescription) -> bool:
    return _index_fields(one) == _index_fields(other)


def _rows_of(index_path: Path) -> int:
    if index_path.is_dir():
        if not (files := shard_files(index_path)):
            raise UserError(
                f"{OUTPUT_FLAG} {index_path.parent}: its index.json names the index {index_path.name}, which holds no "
                "FAISS files; build the knowledge again"
            )
        return files[-1][2]
    return map_index(index_path).ntotal


def _print_what_was_cut(workers) -> None:
    if workers.cut:
        print(f"{workers.cut:,} passages reach the encoder's {workers.max_length} tokens; the rest is not read")
