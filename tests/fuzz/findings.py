"""Collect what a case breaks: errors that are not ours, messages, memory, files of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spallm_convert import SpallmError
from spallm_convert.cli import main

#: A message is read on a terminal: one line, not longer than this, without control characters.
LONGEST_MESSAGE = 2_000
_LARGE = 1 << 20


@dataclass
class Findings:
    """List the rules that a case breaks, each with what happened.

    Attributes:
        outcome: A word on how the case ended, such as "refused".
        broken: Pairs of a rule and what happened.
    """

    outcome: str = "?"
    broken: list[tuple[str, str]] = field(default_factory=list)

    def add(self, rule: str, what: str) -> None:
        """Add a broken rule."""
        self.broken.append((rule, what[:600]))

    def attempt(
        self, name: str, call: Callable[[], Any], allowed: tuple[type[Exception], ...] = ()
    ) -> tuple[Any, Exception | None]:
        """Call a function that may refuse.

        Args:
            name: Name of the function, for the list.
            call: The function.
            allowed: Errors that it may raise besides SpallmError.

        Returns:
            Its result and its error; one of them is None.
        """
        try:
            return call(), None
        except SpallmError as error:
            self.check_message(name, str(error))
            return None, error
        except Exception as error:
            if not isinstance(error, allowed):
                text = " ".join(str(error).split())[:200]
                self.add(f"{name} raises {type(error).__name__}", f"{text!a} at {place(error)}")
            return None, error

    def check_message(self, name: str, text: str) -> None:
        """Check the message of an error of ours."""
        if len(text) >= LONGEST_MESSAGE:
            self.add(f"{name}: long message", f"{len(text):,} characters: {text[:200]!a}")
        if len(text.splitlines()) > 1:
            self.add(f"{name}: message of several lines", ascii(text[:300]))

    def command(self, *words: object) -> int:
        """Run the command line, check what it prints, and return its exit code."""
        name = f"spallm-convert {words[0]}" if words[0] in {"verify", "inspect"} else "convert CLI"
        code, printed, said = run_command([str(word) for word in words])
        if code is None:
            self.add(f"{name} raises {printed}", said)
            return 1
        for line in [*printed.split("\n"), *said.split("\n")]:
            if len(line) >= LONGEST_MESSAGE:
                self.add(f"{name}: long line", f"{len(line):,} characters: {line[:200]!a}")
            if controls := [letter for letter in line if is_control(letter)]:
                self.add(f"{name}: control characters", f"{controls[0]!a} in {line[:200]!a}")
        for line in said.split("\n"):
            if line.strip() and not line.startswith("spallm-convert: "):
                self.add(f"{name}: message of several lines", ascii(line[:200]))
        return code


def is_control(letter: str) -> bool:
    """Return whether a letter is a control code of C0 or C1, such as those of escape sequences."""
    return unicodedata.category(letter) == "Cc"


def run_command(words: list[str]) -> tuple[int | None, str, str]:
    """Run the command line in this process.

    Returns:
        Exit code, standard output, standard error. If anything but SystemExit is raised: None, its
        name, and where.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="\n")
    code: int | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except Exception as error:
            return None, type(error).__name__, f"{str(error)[:200]!a} at {place(error)}"
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


def place(error: BaseException) -> str:
    """Return the innermost line of this project that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/spallm_" in f.filename and "/tests/" not in f.filename]
    if not ours:
        return "no line of ours"
    frame = ours[-1]
    return f"{frame.filename[frame.filename.rindex('/spallm_') + 1 :]}:{frame.lineno} {frame.name}"


def snapshot(root: Path, without: Path | None = None) -> dict[str, tuple[Any, ...]]:
    """Describe every file below a folder, except below `without`."""
    return dict(_described(root, str(without)))


def _described(root: Path, without: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for entry in os.scandir(root):
        if entry.path == without:
            continue
        about = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(about.st_mode)
        if stat.S_ISDIR(about.st_mode):
            yield entry.path, (kind,)
            yield from _described(Path(entry.path), without)
        elif stat.S_ISLNK(about.st_mode):
            yield entry.path, (kind, Path(entry.path).readlink())
        elif stat.S_ISREG(about.st_mode) and about.st_size < _LARGE:
            data = Path(entry.path).read_bytes()
            yield entry.path, (kind, hashlib.sha256(data).hexdigest())
        else:
            yield entry.path, (kind, about.st_size, about.st_mtime_ns)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the paths of which two snapshots differ."""
    return sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
