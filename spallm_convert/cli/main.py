"""Run `spallm-convert`: find the command, and turn errors into messages and exit codes.

A command is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from spallm_convert.errors import OptionError, SpallmError
from spallm_convert.version import __version__

from .lines import say

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_COMMANDS = {
    "convert": "Sketch a model (the default: `spallm-convert MODEL` does this).",
    "demo": "Convert a small real model and compare it with the original.",
    "doctor": "Show what runs where on this machine, and check the kernels.",
    "eval": "Measure a model's perplexity on a text, or its accuracy on tasks.",
    "inspect": "Show what a sketched checkpoint holds.",
    "push": "Upload a sketched checkpoint to the Hub.",
    "verify": "Check a sketched checkpoint down to its last bit.",
}


class _Commands(click.Group):
    """Import a command when it is called. A first word that is not a command is a MODEL."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"spallm_convert.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*_COMMANDS, "-h", "--help", "--version"}:
            similar = difflib.get_close_matches(args[0], _COMMANDS, 1, cutoff=0.75)
            if similar and not Path(args[0]).exists():
                raise click.UsageError(f"no command {args[0]!r}; did you mean {similar[0]!r}?", ctx)
            args = ["convert", *args]
        return super().parse_args(ctx, args or ["--help"])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spallm-convert")
def cli() -> None:
    """Convert pretrained Hugging Face models into sketched ones: small, and trainable as they are.

    \b
    spallm-convert meta-llama/Llama-3.2-1B          sketch a model on the Hub
    spallm-convert ./my-model -o out                sketch a local folder
    spallm-convert convert --help                   all options of a conversion

    MODEL is an id on the Hub, a folder, or a GGUF file. With --debug anywhere, an error shows its
    traceback.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 success, 1 failure, 2 options that cannot be used, 3 `verify` found problems, 130
    interrupted.

    Args:
        arguments: Words of the command line. None: `sys.argv[1:]`.
    """
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [word for word in given if word != "--debug"]
    debug = arguments != given
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code: Any = cli.main(arguments, prog_name="spallm-convert", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        say(usage.getvalue().rstrip("\n"), err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        converting = arguments[0] == "convert" or arguments[0] not in _COMMANDS
        remedy = "; continue with --resume, without --overwrite" * converting
        say(f"spallm-convert: interrupted{remedy}", err=True)
        code = EXIT_INTERRUPTED
    except SpallmError as error:
        if debug:
            raise
        say(f"spallm-convert: error: {error}", err=True)
        code = EXIT_USAGE if isinstance(error, OptionError) else EXIT_FAILURE
    except OSError as error:
        if debug:
            raise
        say(f"spallm-convert: error: {_system_error(error)}", err=True)
        code = EXIT_FAILURE
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _system_error(error: OSError) -> str:
    file = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{file}"
