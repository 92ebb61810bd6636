"""Turn errors of huggingface_hub into one line that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub import errors

from .errors import SourceError, SpallmError


@contextlib.contextmanager
def clear_errors(repo_id: str, kind: type[SpallmError]) -> Iterator[None]:
    """Turn errors of huggingface_hub inside the block into errors of this kind.

    Args:
        repo_id: Name of the repository, for the message.
        kind: Class of the new error: SourceError or HubError.
    """
    try:
        yield
    except SpallmError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found is not None:  # transformers raises its own errors from errors of the library
            what = _explanation(found, kind)
            if what is not None:
                raise kind(f"{repo_id}{what}") from error
            found = found.__cause__
        raise


def _explanation(error: BaseException, kind: type[SpallmError]) -> str | None:
    """Return the message that follows the name of the repository; None for any other error."""
    if isinstance(error, errors.GatedRepoError):
        return " is gated: ask for access on its page, then set HF_TOKEN to a token of your account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            ": no such repository on the Hub, and no such folder here; check the name, or set "
            "HF_TOKEN if the repository is private"
            if kind is SourceError
            else ": the token cannot write there; set HF_TOKEN to a token with write access"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ": no such revision on the Hub; check the name of the revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ": HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or pass a folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            ": not in the local cache, and the Hub cannot be reached; check the network, or pass a "
            "folder"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f": the Hub refused ({_reason(error)})"
    if isinstance(error, errors.HFValidationError):
        return f": not a repository id, expected ORG/NAME ({error})"
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
    """Return whether an error is a connection failure, of any HTTP client of huggingface_hub."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "ConnectionError", "LFSError"})
