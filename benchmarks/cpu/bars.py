"""Judge what the CPU backend must show: each bar with its figure, and whether it is met."""

from __future__ import annotations

import operator
from typing import Any

from benchmarks.shared.markdown import markdown

_HOLDS = {">=": operator.ge, "<=": operator.le}

Row = dict[str, Any]


def judged(name: str, sign: str, limit: float, figure: float) -> Row:
    """Return a bar with its figure and `met`."""
    met = bool(_HOLDS[sign](figure, limit))
    return {"bar": name, "limit": f"{sign} {limit:g}", "figure": figure, "met": met}


def bars_table(what: str, bars: list[Row]) -> str:
    """Return bars as a Markdown table. what: what they judge."""
    body = [
        (bar["bar"], bar["limit"], f"{bar['figure']:.2f}", "met" if bar["met"] else "not met")
        for bar in bars
    ]
    return markdown((f"{what}, target", "limit", "figure", ""), body)
