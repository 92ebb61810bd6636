"""List the files of a repository on the Hub, and download single files by their exact names.

huggingface_hub could download several files at once, but it takes shell patterns: a name from an
index of somebody else could then stand for all files of a repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled

from spallm_convert.errors import SourceError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.hub_retries import PASSING_OF_DOWNLOADS, retried

_LISTING = "the list of its files"
_TIMEOUT = 60.0  # seconds without a byte
_AT_ONCE = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Listing:
    """Hold what a repository contains at a revision.

    Attributes:
        commit: The commit.
        names: Paths of all files, relative to the repository.
    """

    commit: str
    names: frozenset[str]


def list_files(repo_id: str, revision: str | None) -> Listing | None:
    """Ask the Hub for the files of a repository.

    Args:
        repo_id: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The files; None if HF_HUB_OFFLINE is set.

    Raises:
        SourceError: If the repository or the revision does not exist, is gated or private, or the
            Hub cannot be reached.
    """

    def ask() -> Listing:
        info = HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if not isinstance(info.sha, str) or not all(isinstance(name, str) for name in names):
            raise TypeError("no commit, or names that are not texts")
        return Listing(info.sha, frozenset(names))

    with clear_errors(repo_id, SourceError, _LISTING):
        try:
            return retried(f"{repo_id}: {_LISTING}", ask)
        except OfflineModeIsEnabled:
            return None


def fetch(repo_id: str, name: str, revision: str | None) -> Path:
    """Download one file into the Hub cache.

    Args:
        repo_id: Id on the Hub.
        name: Path of the file in the repository, taken literally.
        revision: Branch, tag or commit. The cache learns which commit a branch or tag stands for.

    Returns:
        The file in the cache.

    Raises:
        SourceError: If it cannot be downloaded.
    """

    def ask() -> Path:
        return Path(hf_hub_download(repo_id, name, revision=revision))

    with clear_errors(repo_id, SourceError, name):
        return retried(f"{repo_id}: {name}", ask, PASSING_OF_DOWNLOADS)


def fetch_all(repo_id: str, names: Iterable[str], revision: str) -> None:
    """Download files into the Hub cache, several at once. Raises as `fetch`."""
    in_parallel(lambda name: fetch(repo_id, name, revision), names)


def find_cached(repo_id: str, name: str, revision: str | None) -> Path | None:
    """Return a file in the Hub cache, None if it is not there. No request is sent."""
    with clear_errors(repo_id, SourceError):
        found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function with every item, several at once; after an error, start no more calls.

    Args:
        function: The function.
        items: Its arguments.

    Returns:
        The results, in the order of the items.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
