"""Upload a sketched checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from spallm_convert.errors import FormatError, HubError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.paths import user_path
from spallm_convert.source.checkpoint import extra_files
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SHARDS_GLOB,
    SINGLE_SHARD,
    SketchedCheckpoint,
    sha256,
)

from .report import REPORT_FILE, Report

#: Weights that an earlier push may have left: transformers takes a single file before shards.
_ALL_WEIGHTS = [SINGLE_SHARD, INDEX_FILE, SHARDS_GLOB]


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
    with clear_errors(repo_id, HubError):
        validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise HubError(
            f"pushing to {repo_id} needs a token: set HF_TOKEN, or log in with `hf auth login`"
        )
