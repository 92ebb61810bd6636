"""Write figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text, and whose others are figures."""
    rows = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
