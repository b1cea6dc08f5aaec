"""What a finished folder of knowledge holds, as its index.json tells it.

description = read_knowledge(output)
knowledge = knowledge_in(output, description)      # its paths and counts
for title, text in read_known(output, 1000): ...
verify(output)                                     # all files as they were written, or a UserError
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rag.errors import UserError, raise_problems
from rag.index.index_files import DESCRIPTION_FILE, IndexDescription, read_description
from rag.index.integrity import damage
from rag.knowledge.arguments import INDEXES, OUTPUT_FLAG, PASSAGES_FOLDER, WORDS_FOLDER, WORDS_KIND
from rag.knowledge.mending import require_whole


@dataclass
class Knowledge:
    """What a command made.

    Attributes:
        passages_path: folder of the passages, for `--passages_path`.
        index_path: the FAISS file or the folder of its shards, for `--index_path`.
        documents: that were read.
        passages: pieces they were cut into.
        dimension: d of the embeddings.
        reused: whether all of it was there from an earlier run.
        answer: of the RAG model; None where there was no question.
    """

    passages_path: str
    index_path: str
    documents: int
    passages: int
    dimension: int
    reused: bool = False
    answer: str | None = None

    @property
    def flags(self) -> dict[str, str]:
        """Those that open it, by their names."""
        if not self.dimension:
            return {"index_name": WORDS_KIND, "passages_path": self.passages_path}
        return {"index_name": "custom", "passages_path": self.passages_path, "index_path": self.index_path}


def read_knowledge(output: Path) -> IndexDescription:
    """The `index.json` of a folder; one that knows nothing where there is none, or one of an earlier version.

    Raises:
        UserError: it cannot be read, or names an index of another name than ours have.
    """
    description = read_description(output / PASSAGES_FOLDER, OUTPUT_FLAG)
    ours = {WORDS_FOLDER} if description.factory == WORDS_KIND else INDEXES
    if description.index and description.index not in ours:  # it may be removed, or added to
        raise UserError(
            f"{OUTPUT_FLAG} {output}: its {DESCRIPTION_FILE} names the index {description.index[:80]!r}, which no "
            "version has written; remove the folder and build the knowledge again"
        )
    return description if description.parts else IndexDescription()


def read_known(output: Path, count: int) -> Iterator[tuple[str, str]]:
    """The first `count` passages of a folder: those that were there before a command that may have been killed.

    Raises:
        UserError: something in the folder is damaged.
    """
    from rag.index.passage_checks import load_saved

    require_whole(output, read_knowledge(output))
    dataset = load_saved(output / PASSAGES_FOLDER).select_columns(["title", "text"])
    if not 0 <= count <= len(dataset):
        raise other_passages(output, count, len(dataset))
    for rows in dataset.select(range(count)).iter(1000):
        yield from zip(rows["title"], rows["text"], strict=True)


def verify(output: Path) -> Knowledge:
    """--verify: read all files of a folder, whatever is known of them, and compare them with their checksums.

    Raises:
        UserError: some are damaged, or the folder is not finished.
    """
    description = read_knowledge(output)
    if not (description.is_finished and description.checksums):
        raise UserError(
            f"--verify: {OUTPUT_FLAG} {output} is unfinished, or of a version that kept no checksums; run the command "
            "that built it first"
        )
    raise_problems(
        [
            f"{OUTPUT_FLAG} {output}: {problem}; run the command that built it, which makes it again"
            for problem in damage(output, description, verify=True)
        ]
    )
    print(f"{output}: {len(description.checksums):,} files are as they were written")
    return replace(knowledge_in(output, description), reused=True)


def knowledge_in(output: Path, description: IndexDescription) -> Knowledge:
    return Knowledge(
        passages_path=str(output / PASSAGES_FOLDER),
        index_path=str(output / description.index),
        documents=description.documents,
        passages=description.passages,
        dimension=description.dimension,
    )


def other_passages(output: Path, told: int, found: int) -> UserError:
    return UserError(
        f"{OUTPUT_FLAG} {output}: its {DESCRIPTION_FILE} tells of {told:,} passages, but there are {found:,}; remove "
        "the folder and build the knowledge again"
    )
