"""The Hugging Face Hub: download what a conversion needs, push what it made.

Everything goes through huggingface_hub, which honours HF_TOKEN, HF_HOME, HF_ENDPOINT and
HF_HUB_OFFLINE; this file chooses files and turns the library's errors into one line each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spallm_convert.conversion.report import REPORT_FILE, Report
from spallm_convert.errors import FormatError, HubError, SourceError, SpallmError
from spallm_convert.paths import user_path
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    ITEM_BYTES,
    SHARDS_GLOB,
    SINGLE_SHARD,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    SketchedCheckpoint,
    StoredTensor,
    read_index,
    sha256,
)

from .locate import DenseCheckpoint, Source, extra_files, is_extra_file, open_dense, read_config

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

#: Weights that an earlier push may have left: transformers takes a single file before shards.
_ALL_WEIGHTS = [SINGLE_SHARD, INDEX_FILE, SHARDS_GLOB]


def download(model: str, revision: str | None) -> tuple[Path, str]:
    """Brings a model's config, weights and extra files into the Hub cache.

    Returns the folder and the commit. Raises SourceError when the repository does not exist, is
    gated or private, cannot be reached, has no safetensors weights, or is quantized already.
    """
    from huggingface_hub import snapshot_download

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
    from huggingface_hub import snapshot_download

    with clear_errors(repo_id, SourceError):
        wanted = [TABLES_METADATA_FILE, TABLES_FILE]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))


def remote_checkpoint(model: str, revision: str | None) -> DenseCheckpoint:
    """A model on the Hub by its headers: of the weights, only those are downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    with clear_errors(model, SourceError):
        info = _info(model, revision)
        if info is None:
            folder = _cached(model, revision)
            return Source(model, folder, folder.name).open(folder)
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


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload sketched model",
) -> str:
    """Uploads a sketched checkpoint that passes inspection; returns the commit's URL.

    Creates the repository when there is none. Raises FormatError when the folder is not a whole
    sketched checkpoint, HubError when there is no token or the Hub refuses.
    """
    from huggingface_hub import HfApi

    folder = user_path(folder)
    checkpoint = SketchedCheckpoint.open(folder)
    report = Report.read(folder)
    check_can_push(repo_id, token)
    if report is not None:
        _check_unchanged(checkpoint, report)
    api = HfApi(token=token)
    with clear_errors(repo_id, HubError):
        # None: as the owner's account has it for new repositories.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public: make it private on its page first")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=_own_files(checkpoint, report),
            delete_patterns=_ALL_WEIGHTS,  # but for what is uploaded
        )
    return str(commit.commit_url)


def _own_files(checkpoint: SketchedCheckpoint, report: Report | None) -> list[str]:
    """The files of a checkpoint, and not what else its owner keeps in the folder."""
    if report is not None:
        return [*report.files, REPORT_FILE]
    weights = {tensor.file.name for tensor in checkpoint.tensors.values()}
    others = extra_files(checkpoint.folder)
    return sorted({CONFIG_FILE, INDEX_FILE, "README.md", *weights, *others})


def _check_unchanged(checkpoint: SketchedCheckpoint, report: Report) -> None:
    """Raises FormatError for a checkpoint whose weights are not those that the report is about."""
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    changed = [
        file.name
        for file in sorted(files)
        if report.files.get(file.name, {}).get("sha256") != sha256(file)
    ]
    if changed:
        raise FormatError(
            f"{checkpoint.folder}: {REPORT_FILE} is of other weights than {', '.join(changed)}: "
            f"they were saved after the conversion; remove it, and what the README.md says of them"
        )


def check_can_push(repo_id: str, token: str | None = None) -> None:
    """Refuses a push that needs no request to be refused. Raises HubError."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with clear_errors(repo_id, HubError):
        validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise HubError(
            f"pushing to {repo_id} needs a token: set HF_TOKEN, or log in with `hf auth login`"
        )


def _info(model: str, revision: str | None) -> ModelInfo | None:
    """What the Hub says of a repository; None when told to stay offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return HfApi().model_info(model, revision=revision)
    except OfflineModeIsEnabled:
        return None


def _cached(model: str, revision: str | None) -> Path:
    """The folder that the cache holds, when it holds the config and all weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

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


@contextlib.contextmanager
def clear_errors(repo_id: str, kind: type[SpallmError]) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except SpallmError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found is not None:  # transformers raises its own errors from those of the library
            what = _explanation(found, kind)
            if what is not None:
                raise kind(f"{repo_id}{what}") from error
            found = found.__cause__
        raise


def _explanation(error: BaseException, kind: type[SpallmError]) -> str | None:
    """What to say of an error after the name of the repository; None when it is not the Hub's."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            " is gated: ask for access on its page, then set HF_TOKEN to a token of the account "
            "that has it"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            ": no such repository on the Hub, or it is private and HF_TOKEN does not give access; "
            "no folder of that name here either"
            if kind is SourceError
            else ": the Hub does not let this token write there"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ": no such revision on the Hub"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ": the Hub is not asked because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ": not in the local cache, and the Hub cannot be reached"
    if isinstance(error, errors.HfHubHTTPError):
        return f": the Hub refused ({_reason(error)})"
    if isinstance(error, errors.HFValidationError):
        return f": not a repository id ({error})"
    if isinstance(error, errors.SafetensorsParsingError):
        return f": {error}"
    if _is_transport_error(error):
        return f": the Hub cannot be reached ({error})"
    return None


def _reason(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = " ".join((getattr(error, "server_message", None) or str(error)).split())
    return f"{status}: {message}" if status else message


def _is_transport_error(error: BaseException) -> bool:
    """Connection failures, whichever HTTP client this version of huggingface_hub uses."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "ConnectionError", "LFSError"})
