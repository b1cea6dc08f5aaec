"""The Hugging Face hub: whether it can be reached, files of a dataset from it or its cache, folders that go to it.

    folder = fetch_dataset("facebook/wiki_dpr", ["data/psgs_w100/dummy.nq/*.parquet"], None, unpacked_size, remedy)
    require_push("alice/rag")                                       # before hours of work, not after them
    push_folder("alice/rag", "model", "path/to/rag")

Nothing heavy is imported at the top.
"""

import functools
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rag.errors import UserError, one_line, raise_problems
from rag.files import space_problems

logger = logging.getLogger(__name__)

PUSH_FLAG = "--push_to_hub"
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


def is_hub_name(path: str) -> bool:
    """Whether this can be the name of a repository on the hub, and is no file or folder here."""
    return _is_valid_name(path) and not os.path.exists(path)


def is_owned_name(name: str) -> bool:
    """Whether this can be the name of somebody's repository on the hub: OWNER/NAME."""
    return "/" in name and _is_valid_name(name)


def _is_valid_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(path: str) -> str:
    """A hub name as it is, and of a local path its last part."""
    if is_hub_name(path):
        return path
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    return "~" if str(absolute) == os.path.expanduser("~") else absolute.name


def fetch_dataset(
    repo: str,
    patterns: list[str],
    revision: str | None,
    also_needed: Callable[[dict[str, int]], dict[str, int]],
    remedy: str,
    source: str | None = None,
    instead: str = "a folder of the same layout, or your own knowledge by --index_name custom",
) -> Path:
    """The folder of the hub's cache that holds those files of a dataset that match `patterns`; fetched if need be.

    Args:
        repo: "owner/name".
        patterns: as of `huggingface_hub.snapshot_download`.
        revision: branch, tag or commit; None for the newest.
        also_needed: from the bytes of the files still to be fetched (by name) to the bytes that will be written of them
            elsewhere (by folder), so that a disk too small is noticed before hours of fetching.
        remedy: what else to do where a disk is too small.
        source: the flag that named it, and its value; None for --dataset.
        instead: what else to give.

    Raises:
        UserError: no such dataset or files, the hub cannot be reached and its cache does not hold all of them, or a
            disk is too small.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    source = source or f"--dataset {repo}"
    wanted: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    if hub_is_reachable():
        try:
            plan = snapshot_download(repo, dry_run=True, **wanted)
            sizes = {file.filename: file.file_size for file in plan if file.will_download}
            if sizes:
                needs = Counter({constants.HF_HUB_CACHE: sum(sizes.values())})
                needs.update(also_needed(sizes))
                require_space(source, needs, remedy)
                logger.warning(f"{repo}: fetching {len(sizes)} files, {sum(sizes.values()):,} bytes")
            return Path(snapshot_download(repo, **wanted))
        except (OSError, HFValidationError) as error:
            reason = f"the hub answers {' '.join(str(error.__cause__ or error).split())[:200]!r}"
    try:
        return Path(snapshot_download(repo, local_files_only=True, **wanted))
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{source}: {reason}, and the cache {constants.HF_HUB_CACHE} does not hold all of its files; give {instead}"
        ) from error


def require_space(what: str, needs: Mapping[str, int], remedy: str) -> None:
    """Raise `UserError` unless the disks have room for the bytes that are to be written in each of some folders."""
    raise_problems(space_problems(what, needs, f"free some or set HF_HOME to a folder on a larger disk{remedy}"))


# --- What goes to the hub ---------------------------------------------------------------------------------------------


def push_name_problems(repo: str | None) -> list[str]:
    """What is wrong with the value of --push_to_hub, as far as the name shows it."""
    if repo is None or is_owned_name(repo):
        return []
    if not _is_valid_name(repo):
        return [f"{PUSH_FLAG} {repo!r} is no name on the hub; give YOUR_NAME/NAME"]
    return [f"{PUSH_FLAG} {repo} does not say whose it is; give YOUR_NAME/{repo}"]


def require_push(repo: str) -> None:
    """Raise `UserError` unless the hub can be reached, knows who we are, and lets us write under that name."""
    from huggingface_hub import HfApi, constants, get_token

    raise_problems(push_name_problems(repo))
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{PUSH_FLAG} {repo}: HF_HUB_OFFLINE is set; unset it, or leave {PUSH_FLAG} out")
    if not hub_is_reachable():
        raise UserError(f"{PUSH_FLAG} {repo}: {constants.ENDPOINT} cannot be reached; leave {PUSH_FLAG} out for now")
    if get_token() is None:
        raise UserError(f"{PUSH_FLAG} {repo}: there is no token of yours; run `hf auth login`, or set HF_TOKEN")
    with hub_errors(repo, "give another token: run `hf auth login`, or set HF_TOKEN"):
        account = HfApi().whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"{PUSH_FLAG} {repo}: your token may read only; make one that may write, and set HF_TOKEN to it"
        )
    names = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    if (owner := repo.partition("/")[0]) not in names:
        raise UserError(f"{PUSH_FLAG} {repo}: your token is not {owner}'s; give {names[0]}/{repo.partition('/')[2]}")


def push_folder(
    repo: str,
    kind: Literal["model", "dataset"],
    folder: str | Path,
    patterns: list[str] | None = None,
    last: Mapping[str, bytes] | None = None,
) -> str:
    """Upload a folder and return its address; what an upload that broke has brought there is not sent again.

    Args:
        repo: "owner/name", made where there is none.
        patterns: which files go there; None for all but hidden ones.
        last: contents of further files by name, which come in one commit after all others.

    Raises:
        UserError: the hub refuses it, or the connection broke.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub_errors(repo, "the same command goes on with it"):
        address = api.create_repo(repo, repo_type=kind, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=patterns,
            ignore_patterns=[".*", "*/.*", *(last or ())],
            commit_message=f"Upload {Path(folder).name}",
        )
        if last:
            operations = [CommitOperationAdd(name, content) for name, content in last.items()]
            names = " and ".join(last)
            api.create_commit(repo, operations, repo_type=kind, commit_message=f"Upload {names}")
    return str(address)


@contextmanager
def hub_errors(repo: str, remedy: str) -> Iterator[None]:
    """What the hub or the connection to it says becomes one line; no token is in it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # an upload's thread raises RuntimeError
        told = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        said = one_line(told).replace(get_token() or "\0", "...")
        raise UserError(f"{PUSH_FLAG} {repo}: the hub says {said[:200]!r}; {remedy}") from None
