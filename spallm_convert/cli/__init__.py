"""Run the command line: parse, make a config, call the library, print."""

from .main import main

__all__ = ["main"]
