"""What is in a knowledge folder, held against its checksums: what is damaged is found and, where it can be, made anew.

mend_lists(output, description, earlier)           # state.json and dataset_info.json, of what index.json says
if passages_are_whole(output, description): ...    # if not, an unfinished dataset lacks the damaged shards
"""

from collections.abc import Callable
from pathlib import Path

from rag.errors import UserError
from rag.index.index_files import IndexDescription
from rag.index.integrity import checksums_of
from rag.knowledge.arguments import OUTPUT_FLAG, PASSAGES_FOLDER
from rag.knowledge.shards import (
    INFO_FILE,
    STATE_FILE,
    is_whole,
    publish,
    reopen,
    shard_checksums,
    shards_of,
    write_info,
)


def damaged_files(output: Path, checksums: dict[str, str]) -> list[str]:
    """The files of a folder, by the names of index.json's checksums, that are gone or are not what was written."""
    return [name for name, checksum in checksums.items() if not is_whole(output / name, checksum)]


def require_whole(output: Path, earlier: IndexDescription) -> None:
    """Raise `UserError` if documents are to be added to what is damaged."""
    if damaged := damaged_files(output, earlier.checksums):
        raise UserError(
            f"{OUTPUT_FLAG} {output}: {damaged[0]} is damaged; run the command that built it, which makes it again, "
            "then add the documents"
        )


def mend_lists(output: Path, description: IndexDescription, earlier: IndexDescription) -> None:
    """Write state.json and dataset_info.json again where they are damaged and index.json says what was in them."""
    folder = output / PASSAGES_FOLDER
    lists = {f"{PASSAGES_FOLDER}/{name}" for name in (STATE_FILE, INFO_FILE)}
    ours = earlier.parts and earlier.parts[0].digest == description.passages_digest()
    recorded = {name: checksum for name, checksum in earlier.checksums.items() if name in lists}
    if not ours or not folder.is_dir() or not (damaged := damaged_files(output, recorded)):
        return
    print(f"{output}: {', '.join(damaged)}: damaged, and made again")
    shards = {
        Path(name).name: checksum
        for name, checksum in earlier.checksums.items()
        if Path(name).parent.name == PASSAGES_FOLDER and name.endswith(".arrow")
    }
    write_info(folder, earlier.dimension, earlier.embeddings)
    publish(folder, shards, earlier.digest)


def passages_are_whole(output: Path, description: IndexDescription) -> bool:
    """Whether all shards are what was written; if not, all but the damaged ones become an unfinished dataset.

    Raises:
        UserError: the documents of a damaged shard may not be at hand.
    """
    folder = output / PASSAGES_FOLDER
    damaged = damaged_files(folder, shard_checksums(folder))
    if not damaged:
        return True
    if len(description.parts) > 1:
        raise UserError(
            f"{OUTPUT_FLAG} {output}: {damaged[0]} of {PASSAGES_FOLDER} is damaged, and documents were added "
            "since it was built; remove the folder, build it and add them again"
        )
    print(f"{output}: {len(damaged)} files of passages are damaged and are made again")
    reopen(folder, description.digest)
    return False


def index_is_whole(output: Path, earlier: IndexDescription, fits: Callable[[], bool]) -> bool:
    """Whether the index is what was written; `fits` says so of one of which no checksum is known."""
    path = output / earlier.index
    of_index = {name: sum_ for name, sum_ in earlier.checksums.items() if Path(name).parts[0] == earlier.index}
    if not of_index:  # of an earlier version, or being added to when the run was killed
        return path.exists() and fits()
    damaged = damaged_files(output, of_index)
    if damaged:
        print(f"{output}: {damaged[0]} is damaged; the index is built again")
    return not damaged


def all_checksums(output: Path, description: IndexDescription) -> dict[str, str]:
    """Those of all files; of shards those that were written down when they were made."""
    folder = output / PASSAGES_FOLDER
    shards = {str(Path(PASSAGES_FOLDER) / name): sum_ for name, sum_ in shard_checksums(folder).items() if sum_}
    missing = [path for path in shards_of(folder) if str(path.relative_to(output)) not in shards]
    others = [*missing, folder / STATE_FILE, folder / INFO_FILE, output / description.index]
    return shards | checksums_of(output, others)
