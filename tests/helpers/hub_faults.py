"""Faults of ``hub_server``: what it does to requests of one kind instead of answering them."""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

_RESOLVE = "/[^/]+/[^/]+/resolve/.+"
#: Kinds of requests: method, path, and whether a part of a file is asked for.
_KINDS: tuple[tuple[str, str, str, bool], ...] = (
    ("info", "GET", r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?", False),
    ("create", "POST", "/api/repos/create", False),
    ("validate", "POST", "/api/validate-yaml", False),
    ("preupload", "POST", "/api/models/.+/preupload/.+", False),
    ("commit", "POST", "/api/models/.+/commit/.+", False),
    ("batch", "POST", r"/.+\.git/info/lfs/objects/batch", False),
    ("verify", "POST", r"/.+\.git/info/lfs/verify", False),
    ("upload", "PUT", "/lfs/.+", False),
    ("head", "HEAD", _RESOLVE, False),
    ("range", "GET", _RESOLVE, True),
    ("get", "GET", _RESOLVE, False),
)


def kind_of(method: str, path: str, *, ranged: bool) -> str:
    """Return the kind of a request; "" for one of no kind."""
    found = (
        kind
        for kind, verb, pattern, part in _KINDS
        if verb == method and re.fullmatch(pattern, path) and part in {ranged, False}
    )
    return next(found, "")


@dataclass
class Fault:
    """Something that happens to requests.

    `effect` is "answer" (with `status`, `headers` and `body`), "close" (the connection is closed
    without an answer) or "cut" (the true answer stops half-way).
    """

    kind: str
    status: int = 500
    suffix: str = ""  # of the path
    times: int = 1_000_000
    effect: str = "answer"
    body: str = '{"error": "no such luck"}'
    headers: Mapping[str, str] = field(default_factory=dict)


class Faults:
    """The faults to come, by the kind of request and the end of its path."""

    def __init__(self) -> None:
        self._left: list[Fault] = []
        self._lock = threading.Lock()

    def set(self, *faults: Fault) -> None:
        """Replace all faults."""
        with self._lock:
            self._left = list(faults)

    def take(self, kind: str, path: str) -> Fault | None:
        """Return the fault of a request, and count it down."""
        with self._lock:
            for fault in self._left:
                if fault.kind == kind and path.endswith(fault.suffix) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None
