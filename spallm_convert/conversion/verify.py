"""Check a sketched checkpoint as far as possible without its source."""

from __future__ import annotations

import math
from pathlib import Path

from spallm_convert.errors import FormatError
from spallm_convert.paths import user_path
from spallm_convert.runtime.checking import check_generation_config
from spallm_convert.sketch.limits import loading_limit
from spallm_formats import CONFIG_FILE, SketchedCheckpoint, sha256

from .loadable import loading_problems
from .report import REPORT_FILE, Report


def verify(folder: str | Path) -> list[str]:
    """Check a sketched checkpoint completely.

    Headers must agree with config and index, and every file with its hash in `conversion.json`.
    Padding bits must be zero, and table values finite in the dtype that the model loads in.
    transformers must find every tensor of the model in the size that it expects; this is not
    checked for models that come with their own Python code, because `verify` runs no code. A
    missing `conversion.json` is a problem, because nothing else has the hashes.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Every problem found, in one line each; an empty list if there is none.
    """
    folder = user_path(folder)
    problems: list[str] = []
    try:
        checkpoint = SketchedCheckpoint.open(folder)
    except FormatError as error:
        return error.problems
    try:
        report = Report.read(folder)
    except FormatError as error:
        problems += error.problems
        report = None
    if report is None and not problems:
        problems.append(f"{REPORT_FILE} is missing, so there are no hashes to compare with")
    files = report.files if report else {}
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: listed in {REPORT_FILE}, but missing")
        # A file of another size may be huge, so it is not hashed.
        elif path.stat().st_size != file.get("bytes") or sha256(path) != file["sha256"]:
            problems.append(f"{name}: its SHA-256 is not the one in {REPORT_FILE}")
    weights = {tensor.file.name for tensor in checkpoint.tensors.values()} if report else set()
    problems += [f"{name}: not listed in {REPORT_FILE}" for name in weights if name not in files]
    problems += _loading_problems(checkpoint)
    return problems + list(checkpoint.deep_problems(_largest_entry(checkpoint)))


def _largest_entry(checkpoint: SketchedCheckpoint) -> float:
    """Return the largest table value that stays finite when a checkpoint is loaded."""
    metadata = checkpoint.metadata
    sketched = metadata.tensors()
    dense = {tensor.dtype for name, tensor in checkpoint.tensors.items() if name not in sketched}
    limit = loading_limit(checkpoint.config, dense, metadata.table_dtype)
    return math.inf if limit is None else limit.largest_entry


def _loading_problems(checkpoint: SketchedCheckpoint) -> list[str]:
    """Return what keeps transformers from loading a checkpoint, judged by its headers."""
    config = checkpoint.config
    try:
        check_generation_config(checkpoint.folder)
    except FormatError as error:
        return error.problems
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return [f"{CONFIG_FILE}: no architectures are named, so transformers cannot load it"]
    tensors = checkpoint.tensors.values()
    return loading_problems(checkpoint.folder, config, checkpoint.metadata, tensors)
