"""A small loopback server that speaks enough of the Hub's HTTP API for ``huggingface_hub``.

Tests of pushing and pulling want the real client, its cache and its own error classes, but neither
a network nor an account.  ``HubServer`` keeps model repositories in memory and answers the requests
listed in ``ROUTES``; ``environment()`` gives the variables that point a client at it (the client
reads them when it is imported, so it belongs in a subprocess).

What it answers follows the Hub as the client sees it:

* an unknown token is refused everywhere (401); a read token cannot push (403);
* a missing repository, or a private one without a token, is ``RepoNotFound``: 401 without a token,
  404 with one.  The Hub leaves that code out of some 401 answers and the client infers it from an
  ``https`` address; over plain ``http`` it has to be spelled out to raise the same class;
* a gated repository can be listed by everyone, while its files are ``GatedRepo``: 401 without a
  token, 403 with a token that is not in ``gated_tokens``;
* every commit on ``main``, the only branch, is a new revision, and older ones stay readable.

Left out: data sets and spaces, pull requests, tags, paging, Xet storage, and reading model cards
beyond finding their metadata block.
"""

from __future__ import annotations

import re
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_faults import Faults, kind_of
from .hub_repos import HubError, Repo
from .hub_routes import ROUTES, Request, Response, json_response


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        """Bind without looking up the name of the address, which could ask a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # an idle connection does not keep its thread for ever

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server.hub, urlsplit(self.path).path
        kind = kind_of(self.command, path, ranged="Range" in self.headers)
        hub.kinds.append((kind, path, self.headers.get("Authorization")))
        fault = hub.faults.take(kind, path)
        if fault is not None and fault.effect == "close":
            self.close_connection = True
        elif fault is not None and fault.effect == "answer":
            headers = {"Content-Type": "application/json"} | {
                name: value.replace("PATH", self.path) for name, value in fault.headers.items()
            }
            self._send(Response(fault.body.encode(), fault.status, headers))
        else:
            self._send(self._answer_or_error(body), cut=fault is not None)

    def _send(self, response: Response, *, cut: bool = False) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)
        if cut:
            self.close_connection = True

    def _answer_or_error(self, body: bytes) -> Response:
        with self.server.hub.lock:
            try:
                return self._answer(body)
            except HubError as error:
                return json_response({"error": str(error)}, error.status, **error.headers)
            except (KeyError, TypeError, ValueError) as error:
                return json_response({"error": f"Malformed request: {error!r}"}, 400)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names http.server calls

    def _answer(self, body: bytes) -> Response:
        hub, address = self.server.hub, urlsplit(self.path)
        hub.requests.append((self.command, address.path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token is not None and token not in hub.write_tokens | hub.read_tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        query = {name: values[-1].lower() for name, values in parse_qs(address.query).items()}
        if "create_pr" in query:
            raise HubError(400, "This server does not open pull requests")
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, address.path) if method == self.command else None
            if found is not None:
                part = {key: unquote(text) for key, text in found.groupdict().items() if text}
                return answer(Request(hub, part, query, self.headers.get("Range"), body, token))
        raise HubError(404, f"No route for {self.command} {address.path}")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: ``HubServer.requests`` is the record."""


class HubServer:
    """The server as tests use it: ``with HubServer() as hub: ...``.

    ``write_tokens``, ``read_tokens`` and ``gated_tokens`` (those let into gated repositories) may
    be changed at any time.  Setting ``refuse_push`` refuses LFS batches and commits with that
    message (403); setting ``refuse_lfs`` accepts the batch and refuses each object in it.
    ``faults`` holds what else goes wrong.
    """

    def __init__(self, *, user: str = "tester") -> None:
        self.user = user
        self.write_tokens = {"write-token"}
        self.read_tokens = {"read-token"}
        self.gated_tokens: set[str] = set()
        self.refuse_push: str | None = None
        self.refuse_lfs: str | None = None
        self.requests: list[tuple[str, str]] = []  # (method, path without the query), in order
        self.kinds: list[tuple[str, str, str | None]] = []  # (kind, path, Authorization), in order
        self.faults = Faults()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded LFS contents by SHA-256
        self.lock = threading.Lock()
        self._server = _Server(self)
        poll = {"poll_interval": 0.05}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_repo(
        self, repo_id: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False
    ) -> str:
        """Create a repository, or give it a commit with exactly these files; its commit sha."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id))
            repo.private, repo.gated = private, gated
            return repo.commit_files(files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file at a revision."""
        with self.lock:
            repo = self.repos[repo_id]
            tree = repo.commits[repo.revision(revision)]
            return {path: blob.data for path, blob in tree.items()}

    def environment(self, token: str | None = None, *, home: str | Path) -> dict[str, str]:
        """Variables for a client's process, to lay over its own; no token is an empty HF_TOKEN."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_TOKEN": token or "",
            "no_proxy": "127.0.0.1",
        }
