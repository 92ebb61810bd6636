"""Print lines without what a terminal could obey.

Names in files and answers of servers may hold escape codes. Only this module and `terminal.py`
print. It does not import rich, so that `--help` answers at once.
"""

from __future__ import annotations

import os

import click

from spallm_formats.text import printable


def say(line: str, *, err: bool = False) -> None:
    """Print text to stdout, or to stderr, with control characters escaped.

    Args:
        line: The text. Line feeds and tabs are printed as they are.
        err: Whether to print to stderr.
    """
    click.echo(printable(line, lines=True), err=err)


def hide_bars(hidden: bool) -> None:
    """Hide the progress bars of tqdm, such as the bar of transformers for GGUF files.

    tqdm reads the variable when it is imported, so this must be called before.

    Args:
        hidden: Whether to hide them. False changes nothing.
    """
    if hidden:
        os.environ["TQDM_DISABLE"] = "1"
