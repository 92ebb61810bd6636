"""Keep the verdicts of `self_check.py` in a file of the user's cache, for later processes.

The file is JSON: an object whose `verdicts` map a key to null (all kernels are right) or to the
fault. A key names everything that a verdict depends on. A file that cannot be read or written, or
that is not of this form, is ignored: the check then runs again. Processes that write at the same
time replace the whole file, so a verdict can get lost, and is then found again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import tempfile
from pathlib import Path

import torch

_FORMAT = 1
#: Bytes of the largest file that is read, and the most verdicts that are kept.
_MOST_BYTES, _MOST_VERDICTS = 1 << 20, 256


def describe_device(device: torch.device) -> str:
    """Return the names and versions that a verdict depends on, apart from the kernels."""
    properties = torch.cuda.get_device_properties(device)
    kind = f"capability {properties.major}.{properties.minor}"
    if torch.version.hip is not None:
        kind = properties.gcnArchName
    triton = importlib.import_module("triton").__version__
    return f"{properties.name} ({kind}), Triton {triton}, torch {torch.__version__}"


def key_of(device_words: str, backend: str, bits: int) -> str | None:
    """Return the key of a verdict; None if the kernels have no source files to take a digest of."""
    digest = _digest()
    return None if digest is None else f"{device_words}; kernels {digest}; {backend}, {bits} bits"


def cache_file() -> Path | None:
    """Return the path of the file, in XDG_CACHE_HOME or ~/.cache; None if there is no home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The XDG specification says to ignore relative paths.
        root = root if root.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "spallm-convert" / "gpu-check.json"


def read_verdicts() -> dict[str, str | None]:
    """Return the kept verdicts by key; none if there is no file or it cannot be used."""
    path = cache_file()
    try:
        if path is None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return {}
    verdicts = document.get("verdicts")
    if not isinstance(verdicts, dict):
        return {}
    return {k: v for k, v in verdicts.items() if v is None or isinstance(v, str)}


def keep_verdict(key: str, fault: str | None) -> None:
    """Add a verdict to the file, if the file can be written.

    Args:
        key: Key of the verdict.
        fault: What is wrong with the kernels; None if they are right.
    """
    verdicts = read_verdicts()
    verdicts.pop(key, None)
    _write(verdicts | {key: fault})


def forget_verdict(key: str) -> None:
    """Remove a verdict from the file, if it is there and the file can be written."""
    verdicts = read_verdicts()
    if key in verdicts:
        del verdicts[key]
        _write(verdicts)


def _write(verdicts: dict[str, str | None]) -> None:
    path = cache_file()
    if path is None:
        return
    newest = dict([*verdicts.items()][-_MOST_VERDICTS:])
    text = json.dumps({"format": _FORMAT, "verdicts": newest}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def _digest() -> str | None:
    """Return a digest of the source of the kernels and of the check."""
    here = Path(__file__).parent
    try:
        sources = [here / "self_check.py", *sorted((here / "triton").glob("*.py"))]
        content = b"".join(source.read_bytes() for source in sources)
    except OSError:
        return None
    return hashlib.sha256(content).hexdigest()[:16]
