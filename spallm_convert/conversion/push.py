"""Upload a sketched checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from spallm_convert.errors import FormatError, HubError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.paths import user_path
from spallm_convert.source.extra_files import extra_files
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SHARDS_GLOB,
    SINGLE_SHARD,
    SketchedCheckpoint,
    sha256,
)

from .report import REPORT_FILE, Report

#: Weights of an earlier push, which are removed: transformers prefers a single file to shards.
_ALL_WEIGHTS = [SINGLE_SHARD, INDEX_FILE, SHARDS_GLOB]


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload sketched model",
) -> str:
    """Upload a sketched checkpoint to the Hugging Face Hub.

    The checkpoint is checked first. Files that do not belong to it stay on this machine. Weights of
    an earlier upload are removed from the repository.

    Args:
        folder: Folder of the checkpoint.
        repo_id: Repository, as "ORG/NAME". It is created if it does not exist.
        private: Whether a new repository is private. An existing repository must already
            be private. If False, the default of the account or organization decides.
        token: Access token with the right to write. None: HF_TOKEN, or the token of
            `hf auth login`.
        message: Message of the commit.

    Returns:
        URL of the commit.

    Raises:
        FormatError: If the folder is not a complete sketched checkpoint, or its weights are not the
            ones that `conversion.json` describes.
        HubError: If there is no token, the Hub refuses, or `private` is set for a public
            repository.
    """
    folder = user_path(folder)
    checkpoint = SketchedCheckpoint.open(folder)
    report = Report.read(folder)
    check_can_push(repo_id, token)
    if report is not None:
        _check_unchanged(checkpoint, report)
    api = HfApi(token=token)
    with clear_errors(repo_id, HubError):
        # None: the default of the account or organization.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public: make it private on its page first, or push "
                f"without --private"
            )
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=_own_files(checkpoint, report),
            delete_patterns=_ALL_WEIGHTS,  # files of this upload are kept
        )
    return str(commit.commit_url)


def _own_files(checkpoint: SketchedCheckpoint, report: Report | None) -> list[str]:
    """List the files of a checkpoint, without other files in its folder."""
    if report is not None:
        return [*report.files, REPORT_FILE]
    weights = {tensor.file.name for tensor in checkpoint.tensors.values()}
    others = extra_files(checkpoint.folder)
    return sorted({CONFIG_FILE, INDEX_FILE, "README.md", *weights, *others})


def _check_unchanged(checkpoint: SketchedCheckpoint, report: Report) -> None:
    """Raise FormatError if the weights of a checkpoint differ from the ones in its report."""
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    changed = [
        file.name
        for file in sorted(files)
        if report.files.get(file.name, {}).get("sha256") != sha256(file)
    ]
    if changed:
        raise FormatError(
            f"{checkpoint.folder}: {REPORT_FILE} describes other weights than "
            f"{', '.join(changed)}, which were saved after the conversion; remove it, and the "
            f"figures in README.md"
        )


def check_can_push(repo_id: str, token: str | None = None) -> None:
    """Check, without a request, whether a push can work.

    Args:
        repo_id: Repository to push to.
        token: Access token, None for the one that huggingface_hub finds.

    Raises:
        HubError: If the name of the repository is not valid or there is no token.
    """
    with clear_errors(repo_id, HubError):
        validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise HubError(
            f"pushing to {repo_id} needs a token: set HF_TOKEN, or log in with `hf auth login`"
        )
