"""Turn errors of huggingface_hub into one line that says what to do.

huggingface_hub often hides the answer of the Hub behind an error of its own: a file that the Hub
refuses becomes "not in the local cache", and a failed upload becomes a RuntimeError. So the chain
of causes is searched for the error that explains most.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import unquote

from huggingface_hub import constants, errors

from spallm_formats.text import printable

from .errors import SourceError, SpallmError, one_line

#: A longer message of the Hub is cut.
_MESSAGE_LENGTH = 300
#: Tokens, in the forms in which a client library or a server may repeat them.
_TOKENS = re.compile(r"(?i)(?<=bearer )[^\s'\"]+|\bhf_[a-z0-9]{10,}")
_FILE_ADDRESS = re.compile(r"/resolve/[^/]+/(.+)")
_AGAIN = "run the command again"
_ADVICE = {
    401: "set HF_TOKEN to a valid token, or unset it",
    403: "set HF_TOKEN to a token that has this right",
    409: _AGAIN,
    412: f"another commit came first; {_AGAIN}",
}
_LATER = f"wait a while, then {_AGAIN}"


@contextlib.contextmanager
def clear_errors(repo_id: str, kind: type[SpallmError], request: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub inside the block into errors of this kind.

    Args:
        repo_id: Name of the repository, for the message.
        kind: Class of the new error: SourceError or HubError.
        request: What the block asks the Hub for, such as the name of a file. If it is given, the
            block does nothing else, so every error except those of this machine's files comes from
            an answer that cannot be used, and becomes an error of this kind too.
    """
    try:
        yield
    except SpallmError:
        raise
    except Exception as error:
        chain = list(error_chain(error))
        what = _explanation(chain, kind, request)
        if what is None and request:
            local = next((found for found in chain if _is_of_this_machine(found)), None)
            if local is not None:
                raise local from error
            what = _unusable(request, error)
        if what is None:
            raise
        raise kind(f"{repo_id}{what}") from error


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it, the last one first."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error reports; None for any other error."""
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    return status if isinstance(status, int) else None


def is_transport_error(error: BaseException, *names: str) -> bool:
    """Return whether an error is one of the HTTP client, or of one of its classes `names`.

    The client differs between versions of huggingface_hub, and its classes keep their names.
    """
    found = {kind.__name__ for kind in type(error).__mro__}
    return bool(found & set(names or ("RequestError", "InvalidURL")))


def described(error: BaseException) -> str:
    """Return what the Hub answered, or how the connection failed, without tokens."""
    status = status_of(error)
    if status is None:
        return _clean(one_line(error))
    with contextlib.suppress(ValueError):
        return f"{status} {HTTPStatus(status).phrase}"
    return str(status)


def _explanation(chain: list[BaseException], kind: type[SpallmError], request: str) -> str | None:
    """Return the message that follows the name of the repository; None for unknown errors."""
    for error in chain:
        if isinstance(error, errors.HfHubHTTPError):
            return _of_answer(error, kind, request)
    for error in chain:
        if isinstance(error, errors.OfflineModeIsEnabled):
            done = "downloaded" if kind is SourceError else "uploaded"
            then = ", or pass a folder" if kind is SourceError else ""
            return f": HF_HUB_OFFLINE is set, so nothing is {done}; unset it{then}"
        if isinstance(error, errors.HFValidationError):
            return f": not a repository id, expected ORG/NAME ({one_line(error)})"
        if isinstance(error, UnicodeEncodeError) and request:  # names are quoted, a token is not
            return ": HF_TOKEN holds characters that no token has; set it again, or unset it"
        if isinstance(error, errors.FileMetadataError) or is_transport_error(
            error, "TooManyRedirects", "InvalidURL", "UnsupportedProtocol", "DecodingError"
        ):
            return _unusable(request, error)
    cached = any(isinstance(error, errors.LocalEntryNotFoundError) for error in chain)
    for error in chain:
        if is_transport_error(error) and not cached:
            return (
                f": {_named(request)}the Hub cannot be reached ({described(error)}); check the "
                f"network, then {_AGAIN}"
            )
    if cached:
        return (
            f": {_named(request)}not in the local cache, and the Hub cannot be reached; check the "
            f"network, or pass a folder"
        )
    return None


def _of_answer(error: errors.HfHubHTTPError, kind: type[SpallmError], request: str) -> str:
    """Explain an answer of the Hub that reports an error."""
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
    status = status_of(error) or 0
    message = _clean(" ".join((error.server_message or "").split()))
    advice = _ADVICE.get(status) or (_LATER if status in {408, 429} or status >= 500 else "")
    return (
        f": {_named(request or _file_of(error))}the Hub answered {described(error)}"
        f"{f' ({message})' if message else ''}{f'; {advice}' if advice else ''}"
    )


def _unusable(request: str, error: BaseException) -> str:
    """Explain an answer that is none of the Hub's: a wrong type, HTML, a redirect in a circle."""
    return (
        f": {_named(request)}the answer of {constants.ENDPOINT} cannot be used "
        f"({type(error).__name__}: {_clean(one_line(error))}); check HF_ENDPOINT and the proxy, or "
        f"{_AGAIN} later"
    )


def _clean(text: str) -> str:
    """Return a foreign text without tokens and control characters, and not too long."""
    text = printable(_TOKENS.sub("***", text))
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]}..."


def _named(request: str) -> str:
    return f"{request}: " if request else ""


def _file_of(error: errors.HfHubHTTPError) -> str:
    """Return the name of the file that was asked for; "" if it was not a file."""
    request = getattr(error.response, "request", None)
    found = _FILE_ADDRESS.search(str(getattr(getattr(request, "url", None), "path", "")))
    return _clean(unquote(found[1])) if found else ""


def _is_of_this_machine(error: BaseException) -> bool:
    """Return whether an error is about a local file: a full disk, a folder without rights."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError | errors.HfHubHTTPError | TimeoutError)
        and not is_transport_error(error)
    )
