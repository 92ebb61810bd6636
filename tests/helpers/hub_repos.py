"""Model repositories in memory, as ``hub_server`` keeps them: files, commits, LFS facts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".bin", ".gguf", ".npz", ".onnx", ".pt", ".safetensors")
LFS_MINIMUM = 10 * 1024 * 1024  # files of this size go through LFS whatever their name
GITATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than success, with the error code the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        line = " ".join(message.encode("ascii", "replace").decode().split())
        self.headers = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Blob:
    """One file: its content, its git object id and, if it is kept in LFS, its LFS facts."""

    def __init__(self, data: bytes, *, lfs: bool) -> None:
        self.data = data
        self.oid = self.etag = git_oid(data)
        self.lfs: dict[str, Any] = {}
        if lfs:
            self.etag = hashlib.sha256(data).hexdigest()
            pointer = "version https://git-lfs.github.com/spec/v1\n"
            pointer += f"oid sha256:{self.etag}\nsize {len(data)}\n"
            self.oid = git_oid(pointer.encode())
            self.lfs = {"oid": self.etag, "sha256": self.etag, "size": len(data)}
            self.lfs["pointerSize"] = len(pointer)


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_MINIMUM)


@dataclass
class Repo:
    """A model repository: its commits, oldest first, each with a whole tree of files."""

    repo_id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def commit(self, tree: Mapping[str, Blob]) -> str:
        listing = sorted((path, blob.oid) for path, blob in tree.items())
        seed = json.dumps([self.repo_id, list(self.commits), listing])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = dict(tree)
        return sha

    def commit_files(self, files: Mapping[str, bytes]) -> str:
        lfs = {path: is_lfs(path, len(data)) for path, data in files.items()}
        return self.commit({path: Blob(data, lfs=lfs[path]) for path, data in files.items()})

    def revision(self, name: str, *, branch_only: bool = False) -> str:
        sha = self.head if name == "main" else name
        if sha not in self.commits or (branch_only and name != "main"):
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return sha
