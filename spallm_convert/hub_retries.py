"""Repeat requests to the Hub that failed for a moment.

huggingface_hub repeats some requests itself: for the properties of a file, for a part of an upload,
and downloads that are answered with 429 or time out. It does not repeat the request for the list of
files, the creation of a repository, a commit, or a download that is answered with 5xx. Those go
through `retried`, so that no wait is multiplied. Versions before 2 do not repeat an upload whose
connection breaks either: it ends in an error, and the next push sends only what is missing.
"""

from __future__ import annotations

import email.utils
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from .hub_errors import described, error_chain, is_transport_error, status_of

Result = TypeVar("Result")

TRIES = 4
#: Longest wait in seconds, whatever the Hub asks for.
LONGEST_WAIT = 60.0
#: Answers that may differ a moment later.
PASSING = frozenset({408, 429, 500, 502, 503, 504})
#: The same for a download: huggingface_hub has already waited for the other ones.
PASSING_OF_DOWNLOADS = frozenset({500, 502, 503, 504})

#: Connections that broke. A connection that cannot be made is an error at once: most likely there
#: is no network, and a user should not wait to hear that.
_BROKEN = "ReadError", "WriteError", "CloseError", "RemoteProtocolError", "ReadTimeout"

_log = logging.getLogger(__name__)


def retried(name: str, request: Callable[[], Result], passing: frozenset[int] = PASSING) -> Result:
    """Send a request, again after a wait if it failed for a moment.

    Args:
        name: What is asked for, for the line that says why the command waits.
        request: Sends the request. It must be safe to send it twice.
        passing: Statuses after which the request is sent again.

    Returns:
        The result of `request`.

    Raises:
        Exception: The error of the last try, as `request` raised it.
    """
    for attempt in range(1, TRIES):
        try:
            return request()
        except Exception as error:
            if not _is_passing(error, passing):
                raise
            wait = _wait(error, attempt)
            _log.warning("%s: %s; next try in %.0f s", name, described(error), wait)
            time.sleep(wait)
    return request()


def _is_passing(error: Exception, passing: frozenset[int]) -> bool:
    """Return whether an error can go away by itself, and huggingface_hub has not waited for it.

    huggingface_hub hides an error that it has waited for behind another one, or resumes a download
    while it handles the error of the last try, so that the errors form a chain.
    """
    broken = is_transport_error(error, *_BROKEN)
    tries = sum(is_transport_error(found) for found in error_chain(error))
    return status_of(error) in passing or (broken and tries == 1)


def _wait(error: Exception, attempt: int) -> float:
    """Return the seconds to wait: those that the Hub asks for, or 1, 2, 4, ... with jitter.

    Jitter keeps many clients that failed together from coming back together.
    """
    response = getattr(error, "response", None)
    asked = asked_wait(response.headers) if response is not None else None
    wait = 2.0 ** (attempt - 1) if asked is None else asked
    return min(wait * random.uniform(1.0, 1.25), LONGEST_WAIT)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks a client to wait; None if it does not say.

    Args:
        headers: Headers of the answer. `Retry-After` holds seconds or a date. The Hub says in
            `RateLimit` when a limit ends.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    if value:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:  # not a date either
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None
