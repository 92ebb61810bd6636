"""Define the command `spallm-convert verify DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from .lines import say

EXIT_VERIFY_FAILED = 3
#: The most problems that are printed.
_SHOWN = 20


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print problems only.")
def command(folder: Path, quiet: bool) -> None:
    """Check every bit of the sketched checkpoint in FOLDER.

    Checks structure, shapes and dtypes, the hashes in conversion.json, the padding bits of the
    index maps, and that every table value is finite. The exit code is 3 if there are problems.
    """
    from spallm_convert.conversion.verify import verify

    problems = verify(folder)
    for problem in problems[:_SHOWN]:
        say(f"spallm-convert: {problem}", err=True)
    if len(problems) > _SHOWN:
        say(f"spallm-convert: and {len(problems) - _SHOWN} more problems", err=True)
    if problems:
        raise click.exceptions.Exit(EXIT_VERIFY_FAILED)
    if not quiet:
        say(f"{folder}: no problems found")
