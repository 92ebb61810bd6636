"""Let contestants take turns, so that a disturbance slows down all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.shared.machine import Load, quantiles

Row = dict[str, Any]
#: What a contestant does in a turn, given the number of the turn.
Contestants = Mapping[str, Callable[[int], object]]
#: First turns, which are not counted: they compile, start threads and touch memory.
WARM_UP = 2


def milliseconds(contestants: Contestants, turns: int) -> Row:
    """Return quantiles of the milliseconds of each contestant, and how busy the machine was.

    In a turn each contestant is called twice, and the second call is timed.

    elsewhere: the share of all cores that other processes took meanwhile.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    load = Load()
    for turn in range(WARM_UP + turns):
        if turn == WARM_UP:
            load = Load()
        for name, call in contestants.items():
            # The contestant before may have threads that still wait for work, on our cores.
            call(turn + 1)
            start = time.perf_counter()
            call(turn)
            samples[name].append(1000 * (time.perf_counter() - start))
    return {
        "milliseconds": {name: quantiles(times[WARM_UP:]) for name, times in samples.items()},
        "elsewhere": load.elsewhere(),
    }


def ratio(row: Row, above: str, below: str) -> float:
    """Return the median time of one contestant, divided by that of another."""
    times = row["milliseconds"]
    return float(times[above]["p50"] / times[below]["p50"])
