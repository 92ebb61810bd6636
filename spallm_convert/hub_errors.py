"""Errors of huggingface_hub, each as one line that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub import errors

from .errors import SourceError, SpallmError


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
