"""Write docs/models.md from the records of `helpers.reach`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.reach import Reach

PAGE = Path(__file__).parents[2] / "docs/models.md"
#: Share of the linear weights from which an architecture counts as sketched.
LEAST_SHARE = 0.95

_HEAD = """\
# Models

This page says what works with which architecture. {total} model classes of transformers {version}
were built from their configs, tiny and random, and taken all the way: saved as the Hub has them,
planned, converted, compared, trained, saved, loaded again and calibrated. {good} of them are
sketched at {least:.0f} % of their linear weights or more.

| Column | Meaning |
| --- | --- |
| Sketched | Share of the linear weights that is sketched. Linear weights are all matrices inside \
blocks, experts and routers among them. Embeddings and heads do not count. |
| Bits | Bits per sketched weight. Rows of 32 columns have as much table as code: at real sizes \
these are 4.0 to 4.3. |
| Difference | Largest difference between the outputs of the sketched model and of a dense model, \
both in float32, relative to the largest output. The dense model has the same weights, decoded by \
other code. |
| Step | One training step changes the tables that the loss depends on, and nothing else. In \
brackets: the share of the tables that the step reaches, if not all. |
| Saved | A saved model has the same tensors, and a loaded one the same outputs, bit for bit. |
| Calibrated | A conversion with `--calibration` works. |

A script writes this page. Run it in a checkout, which takes about ten minutes:

<!-- no-run: it takes minutes -->
```console
$ PYTHONPATH=.:formats:kernels:tests python -m helpers.reach --write
```

## Architectures

| Architecture | Kind | Sketched | Bits | Difference | Step | Saved | Calibrated |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(version: str, records: list[Reach]) -> str:
    """Return the page.

    Args:
        version: The version of transformers.
        records: One for every architecture.
    """
    good = sum((record.share or 0) >= LEAST_SHARE and record.failure is None for record in records)
    head = _HEAD.format(total=len(records), version=version, good=good, least=100 * LEAST_SHARE)
    rows = [_row(record) for record in records]
    return head + "\n".join(rows) + "\n" + _dense(records) + _reasons(records)


def _row(record: Reach) -> str:
    def answer(value: str | None) -> str:
        return "" if value is None else "yes" if value == "yes" else "no"

    step = answer(record.trained)
    if step == "yes" and record.reached is not None and record.reached < 1:
        step += f" ({100 * record.reached:.0f} %)"
    cells = [
        f"`{record.name}`",
        record.kind,
        "refused" if record.share is None else f"{100 * record.share:.1f} %",
        "" if record.bits is None else f"{record.bits:.1f}",
        _difference(record),
        step,
        answer(record.saved),
        answer(record.calibrated),
    ]
    return f"| {' | '.join(cells)} |"


def _difference(record: Reach) -> str:
    if record.difference is not None:
        return f"{record.difference:.0e}"
    return "" if record.share is None else "fails"


def _dense(records: list[Reach]) -> str:
    """List what stays dense where it is more than a little."""
    lines = [
        f"* `{record.name}`: "
        + ", ".join(
            f"`{kind}` ({100 * share:.1f} %)" for kind, share in (record.dense or {}).items()
        )
        for record in records
        if record.share is not None and record.share < LEAST_SHARE
    ]
    if not lines:
        return ""
    return "\n## Layers that stay dense\n\n" + "\n".join(lines) + "\n"


def _reasons(records: list[Reach]) -> str:
    """List what fails, once for each reason."""
    found: dict[str, list[str]] = {}
    for record in records:
        for reason in (record.failure, record.trained, record.saved, record.calibrated):
            if reason not in (None, "yes"):
                found.setdefault(_general(reason, record.name), []).append(f"`{record.name}`")
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    lines = [f"* {text}\n  {', '.join(dict.fromkeys(names))}" for text, names in ordered]
    return "\n## Reasons\n\n" + "\n".join(lines) + "\n"


def _general(reason: str, name: str) -> str:
    """Return a message without the names of the model and its layers, so that equal ones meet."""
    short = reason.partition("; --fallback")[0].replace(name, "MODEL").replace("`", "'")
    text = re.sub(r"(?!torch|nn\.)\b[a-z][\w*]*(\.[\w*]+)+", "LAYER", short)
    return re.sub(r"LAYER((, | and )LAYER)+", "LAYERS", text).replace("|", "\\|")
