"""The Hugging Face hub: whether it can be reached, files of a dataset from it or its cache, and room for them.

    folder = fetch_dataset("facebook/wiki_dpr", ["data/psgs_w100/dummy.nq/*.parquet"], None, unpacked_size, remedy)

Nothing heavy is imported at the top.
"""

import functools
import logging
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rag.errors import UserError, raise_problems
from rag.files import space_problems

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"  # what the hub shows of a model or a data set, and reads its metadata from


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers within three seconds; never called where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def fetch_dataset(
    repo: str,
    patterns: list[str],
    revision: str | None,
    also_needed: Callable[[dict[str, int]], dict[str, int]],
    remedy: str,
) -> Path:
    """The folder of the hub's cache that holds those files of a dataset that match `patterns`; fetched if need be.

    Args:
        repo: "owner/name".
        patterns: as of `huggingface_hub.snapshot_download`.
        revision: branch, tag or commit; None for the newest.
        also_needed: from the bytes of the files still to be fetched (by name) to the bytes that will be written of them
            elsewhere (by folder), so that a disk too small is noticed before hours of fetching.
        remedy: what else to do where a disk is too small.

    Raises:
        UserError: no such dataset or files, the hub cannot be reached and its cache does not hold all of them, or a
            disk is too small.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    if hub_is_reachable():
        try:
            plan = snapshot_download(repo, dry_run=True, **wanted)
            sizes = {file.filename: file.file_size for file in plan if file.will_download}
            if sizes:
                needs = Counter({constants.HF_HUB_CACHE: sum(sizes.values())})
                needs.update(also_needed(sizes))
                require_space(f"--dataset {repo}", needs, remedy)
                logger.warning(f"{repo}: fetching {len(sizes)} files, {sum(sizes.values()):,} bytes")
            return Path(snapshot_download(repo, **wanted))
        except (OSError, HFValidationError) as error:
            reason = f"the hub answers {' '.join(str(error.__cause__ or error).split())[:200]!r}"
    try:
        return Path(snapshot_download(repo, local_files_only=True, **wanted))
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"--dataset {repo}: {reason}, and the cache {constants.HF_HUB_CACHE} does not hold all of its files; give "
            "a folder of the same layout, or your own knowledge by --index_name custom"
        ) from error


def require_space(what: str, needs: Mapping[str, int], remedy: str) -> None:
    """Raise `UserError` unless the disks have room for the bytes that are to be written in each of some folders."""
    raise_problems(space_problems(what, needs, f"free some or set HF_HOME to a folder on a larger disk{remedy}"))
