"""Knowledge without vectors: passages and BM25's index of their words, made and searched without any encoder.

    folder = WordsFolder(Path("output/my_knowledge"))
    knowledge = folder.build(source, description, WordsPlan())
    search_words(Path("output/my_knowledge"), ["Where is Oslo?"], n_docs=5)

Neither torch nor transformers is imported.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rag.files import remove
from rag.index.bm25 import Bm25Index, open_bm25
from rag.index.index_files import IndexDescription
from rag.knowledge.arguments import PASSAGES_FOLDER, WORDS_FOLDER, WORDS_KIND
from rag.knowledge.contents import Knowledge
from rag.knowledge.folder import KnowledgeFolder
from rag.knowledge.printing import print_passages
from rag.knowledge.shards import Passages

if TYPE_CHECKING:
    from rag.knowledge.reranking import SearchReranker

BYTES_A_PASSAGE = 300  # of BM25's index, of 100 words


@dataclass(frozen=True)
class WordsPlan:
    """In an `IndexPlan`'s place: there is nothing to choose."""

    factory: str = WORDS_KIND
    dimension: int = 0
    shards: int = 1
    train_sample: int | None = None

    def problems(self, count: int) -> list[str]:
        return []

    def learns(self) -> bool:
        return False

    def bytes_a_vector(self) -> int:
        return BYTES_A_PASSAGE


class WithoutVectors:
    """In a `PassageEmbedder`'s place: passages are written as they are."""

    dimension = 0
    cut = 0
    max_length = 0

    def embed_shards(self, shards: Iterator[tuple[Path, Passages]], write: Callable) -> Iterator[int]:
        for path, shard in shards:
            write(path, shard, None)
            yield len(shard)


class WordsFolder(KnowledgeFolder):
    """A `KnowledgeFolder` whose index is BM25's."""

    packages: ClassVar[tuple[str, ...]] = ("datasets", "bm25s")

    def __init__(self, output: Path, num_shards: int | None = None):
        writer = WithoutVectors()
        super().__init__(output, writer, lambda: nullcontext(writer), num_shards)

    def _index_name(self, plan) -> str:
        return WORDS_FOLDER

    def _make_index(self, knowledge: Knowledge, description: IndexDescription, plan) -> None:
        remove(knowledge.index_path)  # it may be damaged
        _open(self.output)

    def _opened(self, knowledge: Knowledge) -> Bm25Index:
        return _open(self.output)

    def _index_fits(self, earlier: IndexDescription) -> bool:
        return False  # it is built in no time

    def _extended(self, index_path: Path, shards: list[Path], known: int, digest: str) -> None:
        return None

    def _put(self, staged: Path | None, index_path: Path, known: int, total: int) -> None:
        remove(index_path)
        _open(self.output)


def _open(output: Path) -> Bm25Index:
    """The index of a folder, built if it is not there."""
    config = SimpleNamespace(passages_path=str(output / PASSAGES_FOLDER), index_path=str(output / WORDS_FOLDER))
    return open_bm25(config)


def search_words(
    output: Path, questions: list[str], n_docs: int, columns: int | None = None, rescore: "SearchReranker | None" = None
) -> list[list[dict]]:
    """Print the passages of a folder that share words with each question, best first, and return them.

    Args:
        columns: as of `print_passages`.
        rescore: a `SearchReranker`; None for BM25's scores.
    """
    index = _open(output)
    index.init_index()
    count = min(n_docs if rescore is None else rescore.depth, len(index))
    scores, ids = index.search(index.encode_questions(questions), count)
    ids = np.where(scores > 0, ids, -1)
    if rescore is not None:
        scores, ids = rescore(index, questions, ids, n_docs)
    docs = index.get_doc_dicts(ids)
    return [print_passages(*row, columns) for row in zip(questions, ids, scores, docs, strict=True)]
