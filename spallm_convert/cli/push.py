"""Define the command `spallm-convert push DIR ORG/NAME`."""

from __future__ import annotations

from pathlib import Path

import click

from .lines import say


@click.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option(
    "--message", default="Upload sketched model", show_default=True, help="Commit message."
)
def command(folder: Path, repo_id: str, private: bool, message: str) -> None:
    """Upload the sketched checkpoint in FOLDER to the Hub as ORG/NAME."""
    from spallm_convert.conversion.push import push_to_hub

    url = push_to_hub(folder, repo_id, private=private, message=message)
    say(f"pushed to {url}")
