"""Download what a conversion needs from the Hugging Face Hub.

This module chooses the files. huggingface_hub downloads them, and follows HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from spallm_convert.errors import FormatError, SourceError
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_SHARD,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    StoredTensor,
    read_index,
)
from spallm_formats.reader import index_problems

from .checkpoint import (
    DenseCheckpoint,
    checked_shards,
    no_weights,
    open_dense,
    read_config,
    refuse_adapter,
)
from .extra_files import is_extra_file
from .hub_files import Listing, fetch, fetch_all, find_cached, in_parallel, list_files
from .remote_headers import read_remote_header


def download(model: str, revision: str | None) -> tuple[Path, str]:
    """Download a model's config, weights and extra files into the Hub cache.

    Args:
        model: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The folder in the cache, and the commit.

    Raises:
        SourceError: If the repository does not exist, is gated or private, cannot be reached, has
            no safetensors weights, or is quantized by a method that is not read.
    """
    listing = list_files(model, revision)
    if listing is None:
        folder = _cached(model, revision)
        return folder, folder.name
    others = _other_files(model, listing)
    # Ask by the name of the revision: the cache then knows the name without a network, too.
    folder = fetch(model, CONFIG_FILE, revision).parent
    read_config(folder / CONFIG_FILE)  # refuse it before large files are downloaded
    commit = folder.name
    fetch_all(model, others, commit)
    fetch_all(model, _weight_files(model, folder, listing.names), commit)
    return folder, commit


def download_tables(repo_id: str, revision: str | None) -> Path:
    """Download a checkpoint of tables into the Hub cache.

    Args:
        repo_id: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The folder in the cache.

    Raises:
        FormatError: If the repository holds no tables.
        SourceError: If the repository does not exist, is gated or private, or cannot be reached.
    """
    listing = list_files(repo_id, revision)
    if listing is None:
        return _cached_folder(repo_id, [TABLES_FILE], revision)
    if TABLES_FILE not in listing.names:
        raise FormatError(
            f"{repo_id} holds no sketch tables: {TABLES_FILE} not in the repository; upload the "
            f"folder that save_tables writes"
        )
    folder = fetch(repo_id, TABLES_FILE, revision).parent
    if TABLES_METADATA_FILE in listing.names:  # the only description of older tables
        fetch(repo_id, TABLES_METADATA_FILE, folder.name)
    return folder


def remote_checkpoint(model: str, revision: str | None) -> DenseCheckpoint:
    """Open a model on the Hub without its weights: only their headers are downloaded.

    Args:
        model: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The checkpoint. Its tensors name files that are not there.

    Raises:
        SourceError: As in `download`, or if a header breaks the format.
    """
    listing = list_files(model, revision)
    if listing is None:
        folder = _cached(model, revision)
        return open_dense(folder, checked_shards(folder))
    commit = listing.commit
    others = [name for name in _other_files(model, listing) if name.endswith((".py", INDEX_FILE))]
    folder = fetch(model, CONFIG_FILE, commit).parent
    fetch_all(model, others, commit)
    shards = _weight_files(model, folder, listing.names)
    headers = in_parallel(lambda name: read_remote_header(model, name, commit, folder), shards)
    if SINGLE_SHARD not in listing.names:
        _check_index(model, folder, dict(zip(shards, headers, strict=True)))
    return open_dense(
        folder, {name: tensor for header in headers for name, tensor in header.items()}
    )


def _check_index(model: str, folder: Path, headers: dict[str, dict[str, StoredTensor]]) -> None:
    """Raise SourceError if the index lists other tensors than the headers of the files."""
    listed: dict[str, set[str]] = {name: set() for name in headers}
    for tensor, name in read_index(folder / INDEX_FILE).items():
        listed[name].add(tensor)
    problems = [
        problem
        for name, header in headers.items()
        for problem in index_problems(name, set(header), listed[name])
    ]
    if problems:
        raise SourceError(f"{model}: {FormatError(problems)}")


def _cached(model: str, revision: str | None) -> Path:
    """Return the folder in the cache; raise an error if config or weights are not complete."""
    folder = _cached_folder(model, [CONFIG_FILE], revision)
    indexed = (folder / INDEX_FILE).exists() and not (folder / SINGLE_SHARD).exists()
    names = frozenset({INDEX_FILE if indexed else SINGLE_SHARD})
    return _cached_folder(model, _indexed_files(model, folder, names), folder.name)


def _cached_folder(repo_id: str, names: list[str], revision: str | None) -> Path:
    """Return the folder in the cache that holds files; raise an error if one is missing."""
    found = {name: find_cached(repo_id, name, revision) for name in names}
    missing = [name for name, path in found.items() if path is None]
    folders = [path.parent for path in found.values() if path is not None]
    if missing:
        raise SourceError(
            f"{repo_id}: not in the local cache ({missing[0]} is missing), and HF_HUB_OFFLINE is "
            f"set, so nothing is downloaded; unset it, or pass a folder"
        )
    return folders[0]


def _weight_files(model: str, folder: Path, names: Set[str]) -> list[str]:
    """Return the names of the weight files, all of which are in the repository."""
    files = _indexed_files(model, folder, names)
    missing = [name for name in files if name not in names]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise SourceError(
            f"{model}: {INDEX_FILE} names {missing[0]}{more}, which the repository does not have; "
            f"tell its owner, or choose another --revision"
        )
    return files


def _indexed_files(model: str, folder: Path, names: Set[str]) -> list[str]:
    """Return the single weight file, or the files that the index names."""
    if SINGLE_SHARD in names:  # if both are there, transformers uses this one too
        return [SINGLE_SHARD]
    try:
        return sorted(set(read_index(folder / INDEX_FILE).values()))
    except FormatError as error:
        raise SourceError(f"{model}: {error}") from error


def _other_files(model: str, listing: Listing) -> list[str]:
    """Return the names of all files besides config and weights: index, card and extra files."""
    names = listing.names
    refuse_adapter(names, model)
    weights = next((name for name in (SINGLE_SHARD, INDEX_FILE) if name in names), None)
    if weights is None:
        raise no_weights(names, model)
    if CONFIG_FILE not in names:
        raise SourceError(
            f"{model}: no {CONFIG_FILE} in the repository, expected a model for transformers"
        )
    extra = {name for name in names if is_extra_file(name)}
    index = {INDEX_FILE} if weights == INDEX_FILE else set()
    return sorted(extra | index | ({"README.md"} & names))
