"""Judge what the measurements must show: each bar with its figure, and whether it is met.

Nothing is measured here, and nothing is known in advance: figures are read from the sections of the
document. A bar over several layers takes the worst layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .operands import LARGE, LLAMA
from .published import STEPS

Row = dict[str, Any]
Sections = dict[str, Any]
#: Figures by case; None if the measurement is missing.
Cases = dict[str, float | None]

_HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_LLAMA = tuple(layer.name for layer in LLAMA)
_ALL = (*_LLAMA, LARGE.name)


@dataclass(frozen=True)
class Bar:
    """Bound every figure that `cases` reads from the sections."""

    name: str
    sign: str
    limit: float
    cases: Callable[[Sections], Cases]

    def judged(self, sections: Sections) -> Row:
        """Return the bar with `met`: False if a figure misses it, else None if one is missing."""
        cases = self.cases(sections)
        known = [value for value in cases.values() if value is not None]
        met: bool | None = all(_HOLDS[self.sign](value, self.limit) for value in known)
        if met and (not cases or len(known) < len(cases)):
            met = None
        return {
            "bar": self.name,
            "limit": f"{self.sign} {self.limit:g}",
            "figure": self._worst(known),
            "met": met,
            "cases": cases,
        }

    def _worst(self, values: list[float]) -> float | None:
        not_a_number = [value for value in values if math.isnan(value)]
        if not_a_number or not values:
            return not_a_number[0] if not_a_number else None
        return min(values) if self.sign.startswith(">") else max(values)


def judge(sections: Sections) -> list[Row]:
    """Return all bars, from the sections that exist."""
    return [bar.judged(sections) for bar in _BARS]


def add_shares(sections: Sections) -> None:
    """Add to every forward product its share of the bandwidth of a copy in the same run."""
    copy = next((row for row in _rows(sections, "ceilings") if row["what"] == "copy"), None)
    for row in _rows(sections, "forward") if copy else ():
        row["share_of_copy"] = {
            name: rate / copy["gigabytes_per_second"]
            for name, rate in row["gigabytes_per_second"].items()
        }


def _rows(sections: Sections, name: str) -> list[Row]:
    rows: list[Row] = sections.get(name, {}).get("rows", [])
    return rows


def _by_layer(
    section: str,
    value: Callable[[Row], float | None],
    layers: Iterable[str] = _LLAMA,
    **which: int,
) -> Callable[[Sections], Cases]:
    """Return a value of those rows of a section that have some fields, by layer."""

    def cases(sections: Sections) -> Cases:
        found = {
            row["layer"]: value(row)
            for row in _rows(sections, section)
            if all(row[field] == wanted for field, wanted in which.items())
        }
        return {layer: found.get(layer) for layer in layers}

    return cases


def _single(section: str) -> Callable[[Sections], Cases]:
    """Return the speedup of a section that has one row."""

    def cases(sections: Sections) -> Cases:
        rows = _rows(sections, section)
        return {section: rows[0]["speedup"] if rows else None}

    return cases


def _rival(section: str, tokens: int, name: str) -> Callable[[Sections], Cases]:
    return _by_layer(section, lambda row: row["speedup"][name], tokens=tokens)


def _errors(dtype: str) -> Callable[[Sections], Cases]:
    """Return the largest relative error of the product and of each gradient."""

    def cases(sections: Sections) -> Cases:
        rows = [
            row["relative_error"] for row in _rows(sections, "numerics") if row["dtype"] == dtype
        ]
        worst: Cases = {}
        for kind in ("y", "x_grad", "table_grad"):
            values = [row[kind] for row in rows]
            # NaN counts as the largest error; max alone would ignore it.
            worst[kind] = max(values, key=lambda v: (math.isnan(v), v)) if values else None
        return worst | _unfinished(sections, "numerics")

    return cases


def _repeated(sections: Sections) -> Cases:
    rows = _rows(sections, "numerics")
    share = sum(row["repeats"] for row in rows) / len(rows) if rows else None
    return {"share of cases": share} | _unfinished(sections, "numerics")


def _unfinished(sections: Sections, name: str) -> Cases:
    """Return a missing figure, unless every measurement of a section was made."""
    done = sections.get(name, {}).get("status") == "done"
    return {} if done else {"the rest of the section": None}


def _speedup(row: Row) -> float:
    return float(row["speedup"])


def _time(row: Row) -> float:
    """Return our time as a multiple of cuBLAS's."""
    return 1 / float(row["speedup"])


def _share(row: Row) -> float | None:
    share = row.get("share_of_copy")
    return None if share is None else float(share["ours"])


_BARS = (
    Bar(
        "1 token, cuBLAS's time over ours",
        ">=",
        3.0,
        _by_layer("forward", _speedup, _ALL[1:], tokens=1),
    ),
    Bar(
        "1 token, share of the copy's bandwidth",
        ">=",
        0.75,
        _by_layer("forward", _share, (LARGE.name,), tokens=1),
    ),
    Bar("1 token, seven layers of a block", ">=", 2.5, _single("block")),
    Bar(
        "16 tokens, cuBLAS's time over ours",
        ">=",
        2.0,
        _by_layer("forward", _speedup, _ALL, tokens=16),
    ),
    *(
        Bar(
            f"{bits} bits, 1 token, time at 4 bits over ours",
            ">",
            1.0,
            _by_layer("widths", lambda r, b=bits: r["speedup_over_4_bits"][f"{b} bits"], _ALL),
        )
        for bits in (3, 2)
    ),
    Bar(
        "2048 tokens, our time over cuBLAS's",
        "<=",
        1.20,
        _by_layer("forward", _time, _ALL, tokens=2048),
    ),
    Bar(
        "8192 tokens, our time over cuBLAS's",
        "<=",
        1.08,
        _by_layer("forward", _time, _ALL, tokens=8192),
    ),
    Bar(
        "backward, 4096 tokens, our time over the dense one's",
        "<=",
        1.15,
        _by_layer("backward", lambda row: row["time_over_dense"]),
    ),
    Bar(
        "peak extra memory over one dense weight",
        "<=",
        1.1,
        _by_layer("memory", lambda row: row["ours_times_dense_weight"]["peak"]),
    ),
    Bar(
        "memory kept between passes over one dense weight",
        "<=",
        0.01,  # nothing, but for what the allocator rounds up to
        _by_layer("memory", lambda row: row["ours_times_dense_weight"]["between_passes"]),
    ),
    *(
        Bar(f"1 token, {name}, time over ours", ">=", 5.0, _rival("published", 1, name))
        for name in STEPS
    ),
    *(
        Bar(
            f"training, {name}, time over ours",
            ">",
            1.0,
            _rival("published", 4096, name),
        )
        for name in STEPS
    ),
    *(
        Bar(
            f"{tokens} token{'s' * (tokens > 1)}, NF4's time over ours",
            ">",
            1.0,
            _rival("nf4", tokens, "nf4"),
        )
        for tokens in (1, 16)
    ),
    Bar("whole model, dense time over ours", ">=", 2.5, _single("model")),
    Bar(
        "16 tokens of 16 sets, without reading tables, time over that of one set",
        "<=",
        1.5,
        _by_layer("tenants", lambda row: row["times_one_set"], tokens=16),
    ),
    Bar(
        "64 affine sets, 1 group, time over the base's",
        "<=",
        1.3,
        _by_layer("affine", lambda row: row["times_lut_linear"], groups_per_row=1),
    ),
    Bar("relative error, bfloat16", "<", 1e-2, _errors("bfloat16")),
    Bar("relative error, float16", "<", 2e-3, _errors("float16")),
    Bar("runs that repeat bit for bit", ">=", 1.0, _repeated),
)
