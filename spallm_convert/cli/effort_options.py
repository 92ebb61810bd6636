"""Define the options of the effort of a conversion, and of the text that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from spallm_convert.calibration_config import STEPS, CalibrationConfig
from spallm_convert.effort import EFFORTS, FAST, HIGH, NORMAL, tokens_of

#: Options that ask for more than the effort normal, if no effort is given.
_ASK_FOR_MORE = ("calibration", "without", "heal", "target_bits")
_OPTIONS = (
    click.option(
        "--effort",
        type=click.Choice(list(EFFORTS)),
        help=f"How much to do for quality. fast: sketch the weights alone. normal: weights count "
        f"by the inputs that they meet in {tokens_of(NORMAL):,} tokens of text. high: fit layers "
        f"one after the other to {tokens_of(HIGH):,} tokens. best: as high, then tune the tables.  "
        f"[default: normal; high with --calibration, --without or --target-bits; best with "
        f"--heal; fast with --mapping hash]",
    ),
    click.option(
        "--calibration",
        metavar="SRC",
        help="Text to read: builtin, a text, .json or .jsonl file, or a dataset on the Hub.  "
        "[default: builtin]",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        help=f"Number of samples of the text.  [default: {EFFORTS[NORMAL].samples}; "
        f"{EFFORTS[HIGH].samples} for high and best]",
    ),
    click.option(
        "--seqlen",
        type=click.IntRange(min=2),
        help=f"Tokens per sample.  [default: {EFFORTS[NORMAL].seqlen}; {EFFORTS[HIGH].seqlen} for "
        f"high and best]",
    ),
    click.option(
        "--target-bits",
        metavar="N",
        type=click.FloatRange(min=0, min_open=True),
        help="Bits per weight, tables included; layers that need more get more (high and best).",
    ),
    click.option(
        "--without",
        multiple=True,
        type=click.Choice(STEPS),
        help="Step to leave out (high and best); may be repeated.",
    ),
    click.option(
        "--heal",
        metavar="STEPS",
        type=click.IntRange(min=0),
        help="Steps that tune all tables in the end to predict what the dense model predicts.  "
        "[default: 300 for best]",
    ),
    click.option(
        "--fallback",
        is_flag=True,
        help="If the model cannot be run block by block, do what fast does (normal always does). "
        "Not with --heal, best or --target-bits.",
    ),
)


def effort_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_effort(
    effort: str | None,
    mapping: str,
    *,
    calibration: str | None,
    without: tuple[str, ...],
    **others: Any,
) -> tuple[str | None, CalibrationConfig | None]:
    """Return the effort and the options of the text as `SketchConfig` takes them.

    Args:
        effort: The effort, None if it is not given.
        mapping: The mapping, which the effort depends on if it is not given.
        calibration: Source of the text, None if it is not given.
        without: Steps to leave out.
        others: The other options of `CalibrationConfig` by name, None or False if not given.
    """
    given: dict[str, Any] = {k: v for k, v in others.items() if v is not None and v is not False}
    given |= {"without": without} if without else {}
    named = given | ({} if calibration is None else {"calibration": calibration})
    if not named:
        return effort, None
    asks_for_more = any(name in named for name in _ASK_FOR_MORE)
    options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(named))
    if effort == FAST:
        raise click.UsageError(
            f"--effort fast reads no text, so {options} cannot be used: leave them out, or choose "
            f"another effort"
        )
    if effort is None and not asks_for_more:
        if mapping == "hash":
            raise click.UsageError(
                f"--mapping hash means --effort fast, which reads no text, so {options} cannot be "
                f"used: leave them out, or add --effort high or --effort best"
            )
        effort = NORMAL
    if calibration is not None:
        given["text"] = calibration
    return effort, CalibrationConfig(**given)
