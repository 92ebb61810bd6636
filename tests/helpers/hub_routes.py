"""The answers of ``hub_server``: what it replies to each request, as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .hub_repos import GITATTRIBUTES, Blob, HubError, Repo, git_oid, is_lfs

if TYPE_CHECKING:
    from .hub_server import HubServer

CARD_METADATA = re.compile(r"---\s*\n.*?\S.*?\n---\s*(\n|$)", re.DOTALL)
ANONYMOUS = "Invalid username or password."


@dataclass(frozen=True)
class Request:
    """One request: the parts of its address that the route names, and who sent it."""

    hub: HubServer
    part: dict[str, str]
    query: dict[str, str]
    range: str | None
    body: bytes
    token: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, *, write: bool = False) -> Repo:
        """The repository asked for, when the sender may know that it exists (or write to it)."""
        repo = self.hub.repos.get(self.part["repo"])
        if self.token is None and (repo is None or repo.private or write):
            raise HubError(401, ANONYMOUS, "RepoNotFound")
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.need_write()
        return repo

    def need_write(self) -> None:
        if self.token is None:
            raise HubError(401, ANONYMOUS)
        if self.token not in self.hub.write_tokens:
            raise HubError(403, "You don't have the rights to write: this token can only read")


@dataclass(frozen=True)
class Response:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(content: object, status: int = 200, **headers: str) -> Response:
    headers["Content-Type"] = "application/json"
    return Response(json.dumps(content).encode(), status, headers)


def whoami(request: Request) -> Response:
    if request.token is None:
        raise HubError(401, ANONYMOUS)
    role = "write" if request.token in request.hub.write_tokens else "read"
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return json_response({"type": "user", "name": request.hub.user, "orgs": [], "auth": auth})


def create_repo(request: Request) -> Response:
    request.need_write()
    wanted = request.json
    if wanted.get("type", "model") != "model":
        raise HubError(400, "This server only keeps models")
    repo_id = f"{wanted.get('organization') or request.hub.user}/{wanted['name']}"
    url = f"{request.hub.endpoint}/{repo_id}"
    if repo_id in request.hub.repos:
        return json_response({"error": "You already created this model repo", "url": url}, 409)
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    repo = request.hub.repos[repo_id] = Repo(repo_id, private=private)
    repo.commit_files({".gitattributes": GITATTRIBUTES.encode()})
    return json_response({"url": url, "name": repo_id})


def validate_yaml(request: Request) -> Response:
    found = CARD_METADATA.match(request.json["content"])
    warning = {"message": "empty or missing yaml metadata in repo card"}
    return json_response({"errors": [], "warnings": [] if found else [warning]})


def repo_info(request: Request) -> Response:
    repo = request.repo()
    sha = repo.revision(request.part.get("revision", "main"))
    siblings: list[dict[str, Any]] = []
    for path, blob in repo.commits[sha].items():
        siblings.append({"rfilename": path})
        if request.query.get("blobs") == "true":
            siblings[-1] |= {"size": len(blob.data), "blobId": blob.oid, "lfs": blob.lfs or None}
    info = {"id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.split("/")[0]}
    state = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
    return json_response({**info, **state, "sha": sha, "tags": [], "siblings": siblings})


def list_tree(request: Request) -> Response:
    repo = request.repo()
    sha = repo.revision(request.part["revision"])
    folder = request.part.get("path", "").strip("/")
    prefix = f"{folder}/" if folder else ""
    recursive = request.query.get("recursive") == "true"
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in repo.commits[sha].items():
        if not path.startswith(prefix):
            continue
        folders = [path[: end.start()] for end in re.finditer("/", path)]
        folders = [parent for parent in folders if len(parent) > len(folder)]
        for parent in folders if recursive else folders[:1]:
            entry = {"type": "directory", "oid": git_oid(parent.encode()), "size": 0}
            entries[parent] = entry | {"path": parent}
        if recursive or not folders:
            entries[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            entries[path] |= {"lfs": blob.lfs} if blob.lfs else {}
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {sha}", "EntryNotFound")
    return json_response(list(entries.values()))


def preupload(request: Request) -> Response:
    repo = request.repo(write=True)
    tree = repo.commits[repo.revision(request.part["revision"], branch_only=True)]
    answers = []
    for file in request.json["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        answers[-1] |= {"oid": tree[path].etag} if path in tree else {}
    return json_response({"files": answers})


def lfs_batch(request: Request) -> Response:
    request.repo(write=True)
    hub = request.hub
    if hub.refuse_push is not None:
        raise HubError(403, hub.refuse_push)
    answers = []
    for wanted in request.json["objects"]:
        answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if hub.refuse_lfs is not None:
            answer["error"] = {"code": 422, "message": hub.refuse_lfs}
        elif wanted["oid"] not in hub.objects:
            verify = f"{hub.endpoint}/{request.part['repo']}.git/info/lfs/verify"
            upload = f"{hub.endpoint}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        answers.append(answer)
    return json_response({"transfer": "basic", "objects": answers})


def lfs_upload(request: Request) -> Response:
    """Store an object; its address stands for a signed one, so no token comes with it."""
    if hashlib.sha256(request.body).hexdigest() != request.part["oid"]:
        raise HubError(400, "The content does not have the announced SHA-256")
    request.hub.objects[request.part["oid"]] = request.body
    return Response()


def lfs_verify(request: Request) -> Response:
    request.repo(write=True)
    data = request.hub.objects.get(request.json["oid"])
    if data is None or len(data) != request.json["size"]:
        raise HubError(404, "The object was not uploaded")
    return Response()


def commit(request: Request) -> Response:
    repo = request.repo(write=True)
    head = repo.revision(request.part["revision"], branch_only=True)
    if request.hub.refuse_push is not None:
        raise HubError(403, request.hub.refuse_push)
    tree = dict(repo.commits[head])
    for operation in map(json.loads, request.body.splitlines()):
        key, value = operation["key"], operation["value"]
        if key != "header":
            _apply(request.hub, tree, key, value)
        elif not head.startswith(value.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
    sha = repo.commit(tree)
    url = f"{request.hub.endpoint}/{repo.repo_id}/commit/{sha}"
    return json_response({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _apply(hub: HubServer, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise HubError(400, f"LFS pointer {path} points to a file that does not exist")
        tree[path] = Blob(hub.objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        inside = {name for name in tree if name.startswith(path.rstrip("/") + "/")}
        gone = inside if key == "deletedFolder" else {path} & tree.keys()
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del tree[name]
    else:
        raise HubError(400, f"This server does not know the operation {key}")


def resolve(request: Request) -> Response:
    repo = request.repo()
    if repo.gated and request.token not in request.hub.gated_tokens:
        message = f"Access to model {repo.repo_id} is restricted."
        raise HubError(401 if request.token is None else 403, message, "GatedRepo")
    sha = repo.revision(request.part["revision"])
    blob = repo.commits[sha].get(request.part["path"])
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.etag}"'}
    return ranged(blob.data, request.range, headers)


def ranged(data: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if found is None or found[0] == "bytes=-":
        return Response(data, headers=headers)
    first, last = found.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    if start >= stop:
        raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{len(data)}")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, headers)


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[[Request], Response]], ...] = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", f"/api/models/{REPO}", repo_info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", repo_info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?P<path>/.+)?", list_tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
)
