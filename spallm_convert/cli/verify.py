"""`spallm-convert verify DIR`."""

from __future__ import annotations

from pathlib import Path

import click

EXIT_VERIFY_FAILED = 3


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Only the exit code and the problems.")
def command(folder: Path, quiet: bool) -> None:
    """Check the sketched checkpoint in FOLDER down to its last bit.

    Structure, shapes and types, the hashes in conversion.json, padding bits of the index maps, and
    that every table value is finite. Exit code 3 when something is wrong.
    """
    from spallm_convert.conversion.verify import verify

    problems = verify(folder)
    for problem in problems:
        click.echo(f"spallm-convert: {problem}", err=True)
    if problems:
        raise click.exceptions.Exit(EXIT_VERIFY_FAILED)
    if not quiet:
        click.echo(f"{folder}: whole and sound")
