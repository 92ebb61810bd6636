"""Run jobs in separate processes, and keep their results in a file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from spallm_convert.errors import OptionError

from .machine import module_environment, write_results

Row = dict[str, Any]


def run_in_process(
    module: str, job: Row, scratch: Path, environment: Mapping[str, str] | None = None
) -> Row | None:
    """Run a module on a job in a new process, and return its result; None if it failed.

    The module is started with two files: one to read the job from, one to write the result to.
    environment: variables to set in the process, in addition to those of this one.
    """
    described, result = scratch / "job.json", scratch / "result.json"
    write_results(described, job)
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, described, result]
    variables = module_environment() | dict(environment or {})
    process = subprocess.run(command, env=variables, check=False)
    if process.returncode:
        click.echo(f"    ended with code {process.returncode}", err=True)
        return None
    found: Row = json.loads(result.read_text())
    return found


def missing(packages: Iterable[str]) -> list[str]:
    """Return the packages that are not installed, sorted, by the names they are imported by."""
    return sorted(name for name in set(packages) if importlib.util.find_spec(name) is None)


def open_document(path: Path, header: Row, *, fresh: bool) -> Row:
    """Return the document to add to: the contents of the file, if it was made in the same way.

    The platform may differ, because an updated kernel does not make another machine.
    """
    if fresh or not path.exists():
        return header | {"runs": []}
    try:
        document: Row = json.loads(path.read_text())
    except ValueError as error:
        raise OptionError(f"{path} is not JSON: {error}") from None
    before, now = _flat(document), _flat(header)
    different = [
        f"{name}: {before.get(name)!r} in the file, {now.get(name)!r} now"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]
    if different:
        raise OptionError(
            f"{path} was written with other settings; name another --output, or start over with "
            f"--fresh\n  " + "\n  ".join(different)
        )
    return document


def _flat(document: Row) -> Row:
    """Return settings, versions and machine with dotted names, without the platform."""
    found: Row = {"benchmark": document.get("benchmark")}
    for part in ("settings", "versions", "machine"):
        found |= {f"{part}.{name}": value for name, value in document.get(part, {}).items()}
    found.pop("machine.platform", None)
    return found
