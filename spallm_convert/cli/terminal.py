"""Print to a terminal: tables, remarks and progress bars, for all commands.

Every text goes through `printable`, as in `lines.py`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from spallm_formats.text import printable


class SafeConsole(Console):
    """Print text and cells of tables without the control characters in them.

    Markup is off, because names of layers and answers of models may contain brackets.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn text into what rich prints; rich calls this for every string."""
        return super().render_str(printable(text, lines=True), **options)


#: Progress and remarks go to stderr, results to stdout. rich honours NO_COLOR.
stderr = SafeConsole(stderr=True)
stdout = SafeConsole()
#: Wider than any table.
_FILE_WIDTH = 1000


def print_table(table: Table) -> None:
    """Print a table to stdout, at the width of a terminal, or at full width to a file."""
    (stdout if stdout.is_terminal else SafeConsole(width=_FILE_WIDTH)).print(table)


def quiet_libraries(*, downloads: bool = True) -> None:
    """Hide the progress bars of transformers.

    Progress bars of downloads are hidden too, except on a terminal with `downloads`.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # hides downloads too
    if downloads and stderr.is_terminal and not hidden:
        enable_progress_bars()


class _Rate(ProgressColumn):
    """Show the speed, in `unit` per second; one `unit` is `scale` steps of the task."""

    def __init__(self, unit: str, scale: float) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._unit, self._scale = unit, scale

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rounded(speed / self._scale)} {self._unit}/s" if speed else "")


def _rounded(number: float) -> str:
    """Return a number without decimals, or with two digits if it is small."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


class _WorkProgress:
    """Show a bar with rate and time left on a terminal, or else print a line per tenth of the work.

    The class implements `spallm_convert.progress.Progress`. Subclasses define words and units.
    """

    _first: str  # shown until the amount of work is known
    _verb: str
    _done_verb: str
    _unit: str
    _scale: float  # of the unit

    def __init__(self, *, hidden: bool = False) -> None:
        self._hidden = hidden
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            _Rate(self._unit, self._scale),
            TimeRemainingColumn(),
            console=stderr,
            disable=hidden or not stderr.is_terminal,
        )
        self._total = self._done = 0
        # Only one is visible at a time: uncounted work has no share, no rate and no time left.
        self._counted = self._bar.add_task("", visible=False)
        self._uncounted = self._bar.add_task(self._first, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._bar.disable:  # rich 13.7 prints an empty line even for a bar that is disabled
            self._bar.stop()

    def start(self, total: int, /) -> None:
        self._total = total
        self._bar.reset(self._counted, total=total, description=self._verb, visible=True)
        self._bar.update(self._uncounted, visible=False)

    def advance(self, amount: int, name: str = "", /) -> None:
        before, self._done = self._done, self._done + amount
        description = printable(f"{self._verb} {name}") if name else self._verb
        self._bar.update(self._counted, advance=amount, description=description, visible=True)
        self._bar.update(self._uncounted, visible=False)
        tenth = 10 * self._done // self._total
        if not stderr.is_terminal and tenth > 10 * before // self._total:
            whole = f"{_rounded(self._total / self._scale)} {self._unit} {self._done_verb}"
            self.remark(f"{10 * tenth}% of {whole}" + (f": {name}" if name else ""))

    def say(self, line: str, /) -> None:
        self._bar.update(self._uncounted, description=printable(line), visible=True)
        self._bar.update(self._counted, visible=False)
        if not stderr.is_terminal:
            self.remark(line)

    def remark(self, line: str, /) -> None:
        if not self._hidden or line.startswith("warning:"):
            stderr.print(line, soft_wrap=True)  # on a terminal: above the bar


class ConversionProgress(_WorkProgress):
    """Show the progress of a conversion, in weights."""

    _first, _verb, _done_verb = "reading the source", "sketching", "sketched"
    _unit, _scale = "M weights", 1e6


class EvaluationProgress(_WorkProgress):
    """Show the progress of a measurement, in tokens."""

    _first, _verb, _done_verb = "loading the model", "measuring", "measured"
    _unit, _scale = "tokens", 1
