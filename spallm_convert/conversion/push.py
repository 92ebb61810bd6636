"""Upload a sketched checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from spallm_convert.errors import FormatError, HubError
from spallm_convert.hub_errors import clear_errors
from spallm_convert.hub_retries import retried
from spallm_convert.paths import user_path
from spallm_convert.source.extra_files import extra_files
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    SHARDS_GLOB,
    SINGLE_SHARD,
    SketchedCheckpoint,
)
from spallm_formats.text import summary

from .card import CARD_FILE
from .report import REPORT_FILE, Report
from .upload_files import UploadFiles
from .verify import verify

#: Weights of an earlier push, which are removed: transformers prefers a single file to shards.
_ALL_WEIGHTS = [SINGLE_SHARD, INDEX_FILE, SHARDS_GLOB]
_TIMEOUT = 60.0  # seconds without a byte


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload sketched model",
) -> str:
    """Upload a sketched checkpoint to the Hugging Face Hub.

    The checkpoint is checked completely before anything is sent. Files that do not belong to it
    stay on this machine. Weights of an earlier upload are removed from the repository.

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
        FormatError: If `verify` finds a problem, a file is a link out of the folder, or a file
            changes while it is uploaded.
        HubError: If there is no token, the Hub refuses, or `private` is set for a public
            repository.
    """
    folder = user_path(folder)
    checkpoint = SketchedCheckpoint.open(folder)
    report = Report.read(folder)
    check_can_push(repo_id, token)
    files = UploadFiles(folder, _own_files(checkpoint, report))
    _check(checkpoint, report)
    hashes = {} if report is None else report.files
    additions = files.additions({name: file["sha256"] for name, file in hashes.items()})
    api = HfApi(token=token)
    _create(api, repo_id, private=private)
    with clear_errors(repo_id, HubError, "upload"):
        # Not sent again after an error: huggingface_hub does that for every request in it.
        api.preupload_lfs_files(repo_id, additions, free_memory=False)
    files.check_unchanged()
    return _commit(api, repo_id, additions, message)


def _own_files(checkpoint: SketchedCheckpoint, report: Report | None) -> list[str]:
    """List the files of a checkpoint, without other files in its folder."""
    if report is not None:
        return [*report.files, REPORT_FILE]
    folder = checkpoint.folder
    weights = {tensor.file.name for tensor in checkpoint.tensors.values()}
    others = {name for name in (INDEX_FILE, CARD_FILE) if (folder / name).exists()}
    return sorted({CONFIG_FILE, *weights, *others, *extra_files(folder)})


def _check(checkpoint: SketchedCheckpoint, report: Report | None) -> None:
    """Raise FormatError if a checkpoint has problems that `verify` finds.

    The folder of a fine-tuned model has no report, and so no hashes to compare with.
    """
    folder = checkpoint.folder
    if report is None:
        problems = list(checkpoint.deep_problems())
    else:
        problems = verify(folder)
        if CONFIG_FILE not in report.files:
            problems.append(f"{CONFIG_FILE}: not listed in {REPORT_FILE}")
    if not problems:
        return
    trained = report is not None and any(_is_about_weights(checkpoint, line) for line in problems)
    remedy = (
        f"if you saved a trained model there, remove {REPORT_FILE} and the figures in {CARD_FILE}"
        if trained
        else f"see all of them: spallm-convert verify {folder}"
    )
    raise FormatError(f"{folder}: not uploaded: {summary(problems)}; {remedy}")


def _is_about_weights(checkpoint: SketchedCheckpoint, problem: str) -> bool:
    names = {tensor.file.name for tensor in checkpoint.tensors.values()}
    return any(problem.startswith(f"{name}: its SHA-256 ") for name in names)


def _create(api: HfApi, repo_id: str, *, private: bool) -> None:
    """Create a repository if it does not exist."""
    request = "creation of the repository"
    with clear_errors(repo_id, HubError, request):
        retried(
            f"{repo_id}: {request}",
            # None: the default of the account or organization.
            lambda: api.create_repo(repo_id, private=private or None, exist_ok=True),
        )
    if not private:
        return
    request = "visibility of the repository"
    with clear_errors(repo_id, HubError, request):
        is_private = retried(
            f"{repo_id}: {request}", lambda: api.model_info(repo_id, timeout=_TIMEOUT).private
        )
    if is_private is not True:
        raise HubError(
            f"{repo_id} exists and is public: make it private on its page first, or push "
            f"without --private"
        )


def _commit(api: HfApi, repo_id: str, additions: list[CommitOperationAdd], message: str) -> str:
    """Commit files whose content is on the Hub, and remove weights of an earlier upload.

    Returns:
        URL of the commit.
    """
    added = {addition.path_in_repo for addition in additions}

    def ask() -> str:
        # If an answer was lost, the commit may be there, and its removals cannot be repeated.
        info = api.model_info(repo_id, timeout=_TIMEOUT)
        stale = [
            CommitOperationDelete(sibling.rfilename, is_folder=False)
            for sibling in info.siblings or []
            if _is_weights(sibling.rfilename) and sibling.rfilename not in added
        ]
        done = api.create_commit(repo_id, [*stale, *additions], commit_message=message)
        return str(done.commit_url)

    with clear_errors(repo_id, HubError, "commit"):
        return retried(f"{repo_id}: commit", ask)


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _ALL_WEIGHTS)


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
