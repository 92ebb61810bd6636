"""Download what a conversion needs from the Hugging Face Hub.

This module chooses the files. huggingface_hub downloads them, and follows HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo

from spallm_convert.errors import FormatError, SourceError
from spallm_convert.hub_errors import clear_errors
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    ITEM_BYTES,
    SINGLE_SHARD,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    StoredTensor,
    read_index,
)

from .checkpoint import (
    DenseCheckpoint,
    checked_shards,
    no_weights,
    open_dense,
    read_config,
    refuse_adapter,
)
from .extra_files import is_extra_file


def download(model: str, revision: str | None) -> tuple[Path, str]:
    """Download a model's config, weights and extra files into the Hub cache.

    Args:
        model: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The folder in the cache, and the commit.

    Raises:
        SourceError: If the repository does not exist, is gated or private, cannot be reached, has
            no safetensors weights, or is already quantized.
    """
    with clear_errors(model, SourceError):
        info = _info(model, revision)
        if info is None:
            folder = _cached(model, revision)
            return folder, folder.name
        # Ask by the name of the revision: the cache then knows the name without a network, too.
        small = _small(info)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=small))
        read_config(folder / CONFIG_FILE)  # refuse it before large files are downloaded
        commit = folder.name
        weights = _weight_files(model, folder, indexed=INDEX_FILE in small)
        snapshot_download(model, revision=commit, allow_patterns=weights)
    return folder, commit


def download_tables(repo_id: str, revision: str | None) -> Path:
    """Download a checkpoint of tables into the Hub cache.

    Args:
        repo_id: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The folder in the cache.

    Raises:
        SourceError: If the repository does not exist, is gated or private, or cannot be reached.
    """
    with clear_errors(repo_id, SourceError):
        wanted = [TABLES_METADATA_FILE, TABLES_FILE]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))


def remote_checkpoint(model: str, revision: str | None) -> DenseCheckpoint:
    """Open a model on the Hub without its weights: only their headers are downloaded.

    Args:
        model: Id on the Hub.
        revision: Branch, tag or commit. None: the default branch.

    Returns:
        The checkpoint. Its tensors name files that are not there.

    Raises:
        SourceError: As in `download`, or if a tensor has an unsupported dtype.
    """
    api = HfApi()
    with clear_errors(model, SourceError):
        info = _info(model, revision)
        if info is None:
            folder = _cached(model, revision)
            return open_dense(folder, checked_shards(folder))
        names = {CONFIG_FILE, INDEX_FILE}
        needed = [name for name in _small(info) if name in names or name.endswith(".py")]
        folder = Path(snapshot_download(model, revision=info.sha, allow_patterns=needed))
        files = _weight_files(model, folder, indexed=INDEX_FILE in needed)
        with ThreadPoolExecutor(max_workers=8) as pool:
            headers = pool.map(
                lambda file: api.parse_safetensors_file_metadata(model, file, revision=info.sha),
                files,
            )
            tensors = {
                name: StoredTensor(
                    name, tensor.dtype, tuple(tensor.shape), folder / file, tensor.data_offsets[0]
                )
                for file, header in zip(files, headers, strict=True)
                for name, tensor in header.tensors.items()
            }
        unknown = sorted({tensor.dtype for tensor in tensors.values()} - set(ITEM_BYTES))
        if unknown:
            raise SourceError(
                f"{model}: found tensors of dtype {', '.join(unknown)}, expected one of "
                f"{', '.join(ITEM_BYTES)}"
            )
    return open_dense(folder, tensors)


def _info(model: str, revision: str | None) -> ModelInfo | None:
    """Ask the Hub about a repository; return None if HF_HUB_OFFLINE is set."""
    try:
        return HfApi().model_info(model, revision=revision)
    except OfflineModeIsEnabled:
        return None


def _cached(model: str, revision: str | None) -> Path:
    """Return the folder in the cache; raise an error if config or weights are not complete."""
    folder = Path(
        snapshot_download(
            model, revision=revision, allow_patterns=[CONFIG_FILE], local_files_only=True
        )
    )
    indexed = (folder / INDEX_FILE).exists() and not (folder / SINGLE_SHARD).exists()
    needed = [CONFIG_FILE, *_weight_files(model, folder, indexed=indexed)]
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise LocalEntryNotFoundError(f"{', '.join(missing)} not in {folder}")
    return folder


def _weight_files(model: str, folder: Path, *, indexed: bool) -> list[str]:
    """Return the names of the weight files: the single one, or those in the index."""
    if not indexed:
        return [SINGLE_SHARD]
    try:
        return sorted(set(read_index(folder / INDEX_FILE).values()))
    except FormatError as error:
        raise SourceError(f"{model}: {error}") from error


def _small(info: ModelInfo) -> list[str]:
    """Return the names of all files besides weights: config, index, card and extra files."""
    names = [sibling.rfilename for sibling in info.siblings or []]
    refuse_adapter(names, str(info.id))
    weights = next((name for name in (SINGLE_SHARD, INDEX_FILE) if name in names), None)
    if weights is None:
        raise no_weights(names, str(info.id))
    if CONFIG_FILE not in names:
        raise SourceError(
            f"{info.id}: no {CONFIG_FILE} in the repository, expected a model for transformers"
        )
    extra = [name for name in names if is_extra_file(name)]
    index = {INDEX_FILE} if weights == INDEX_FILE else set()
    return [CONFIG_FILE, *extra, *index, *({"README.md"} & set(names))]
