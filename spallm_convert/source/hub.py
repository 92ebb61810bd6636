"""Download what a conversion needs from the Hugging Face Hub.

Everything goes through huggingface_hub, which honours HF_TOKEN, HF_HOME, HF_ENDPOINT and
HF_HUB_OFFLINE; this file chooses the files.
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

from .checkpoint import DenseCheckpoint, checked_shards, is_extra_file, open_dense, read_config


def download(model: str, revision: str | None) -> tuple[Path, str]:
    """Brings a model's config, weights and extra files into the Hub cache.

    Returns the folder and the commit. Raises SourceError when the repository does not exist, is
    gated or private, cannot be reached, has no safetensors weights, or is quantized already.
    """
    with clear_errors(model, SourceError):
        info = _info(model, revision)
        if info is None:
            folder = _cached(model, revision)
            return folder, folder.name
        # By the name of the revision, which the cache then knows when there is no network.
        small = _small(info)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=small))
        read_config(folder / CONFIG_FILE)  # refuses before the large files come
        commit = folder.name
        weights = _weight_files(model, folder, indexed=INDEX_FILE in small)
        snapshot_download(model, revision=commit, allow_patterns=weights)
    return folder, commit


def download_tables(repo_id: str, revision: str | None) -> Path:
    """Brings a tables-only checkpoint into the Hub cache; returns its folder.

    Raises SourceError when the repository cannot be had.
    """
    with clear_errors(repo_id, SourceError):
        wanted = [TABLES_METADATA_FILE, TABLES_FILE]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))


def remote_checkpoint(model: str, revision: str | None) -> DenseCheckpoint:
    """A model on the Hub by its headers: of the weights, only those are downloaded."""
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
            raise SourceError(f"{model}: tensors of dtype {', '.join(unknown)} cannot be read")
    return open_dense(folder, tensors)


def _info(model: str, revision: str | None) -> ModelInfo | None:
    """What the Hub says of a repository; None when told to stay offline."""
    try:
        return HfApi().model_info(model, revision=revision)
    except OfflineModeIsEnabled:
        return None


def _cached(model: str, revision: str | None) -> Path:
    """The folder that the cache holds, when it holds the config and all weights."""
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
    """The single weight file, or those that a folder's index names."""
    if not indexed:
        return [SINGLE_SHARD]
    try:
        return sorted(set(read_index(folder / INDEX_FILE).values()))
    except FormatError as error:
        raise SourceError(f"{model}: {error}") from error


def _small(info: ModelInfo) -> list[str]:
    """Config, index if there is one, card and extra files: all but the weights themselves."""
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = next((name for name in (SINGLE_SHARD, INDEX_FILE) if name in names), None)
    if weights is None:
        others = [
            name for name in names if name.endswith((".bin", ".gguf", ".pth", ".safetensors"))
        ]
        raise SourceError(
            f"{info.id}: no {SINGLE_SHARD} and no {INDEX_FILE} in the repository "
            f"(found {', '.join(others[:3]) or 'no weights'})"
        )
    if CONFIG_FILE not in names:
        raise SourceError(f"{info.id}: no {CONFIG_FILE} in the repository")
    extra = [name for name in names if is_extra_file(name)]
    index = {INDEX_FILE} if weights == INDEX_FILE else set()
    return [CONFIG_FILE, *extra, *index, *({"README.md"} & set(names))]
