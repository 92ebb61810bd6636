"""Look at the checkpoint that is in the output folder already."""

from __future__ import annotations

from pathlib import Path

from spallm_convert.errors import FormatError, SpallmError
from spallm_convert.source.extra_files import is_extra_file
from spallm_formats import CONFIG_FILE, INDEX_FILE, sha256
from spallm_formats.layout import SHARD_NAME

from .card import CARD_FILE
from .report import REPORT_FILE, Report


def written_hashes(older: Report | None) -> dict[str, str]:
    """Return the SHA-256 of the files that an older conversion wrote into the folder.

    Args:
        older: Report of that conversion. None: there was none.

    Returns:
        Hashes by name, without names that no conversion writes: a report may list anything.
    """
    files = older.files.items() if older else ()
    return {name: file["sha256"] for name, file in files if _is_written(name)}


def _is_written(name: str) -> bool:
    own = name in {CONFIG_FILE, CARD_FILE, INDEX_FILE} or SHARD_NAME.fullmatch(name)
    return bool(own) or is_extra_file(name)


def older_report(folder: Path) -> Report | None:
    """Return the report of the checkpoint in the folder, None if there is none or it is damaged."""
    try:
        return Report.read(folder)
    except FormatError:
        return None


def written_report(folder: Path) -> Report:
    """Return the report of a conversion that was complete but for the moving of its files."""
    report = Report.read(folder)
    if report is None:
        raise SpallmError(
            f"{folder}: {REPORT_FILE} of the interrupted conversion is missing; use --overwrite to "
            f"convert again"
        )
    return report


def check_files(folder: Path, report: Report) -> None:
    """Raise SpallmError if a file of a complete conversion is missing or has changed."""
    for name, about in report.files.items():
        file = folder / name
        if not file.is_file() or sha256(file) != about["sha256"]:
            raise SpallmError(
                f"{folder}: {name} is missing or has changed since the conversion; use --overwrite "
                f"to convert again"
            )
