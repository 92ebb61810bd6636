"""Partition sorted values optimally by a dynamic programme over layers, with careful sums.

The programme is that of `reference/kmeans.py`. The best split of the first j values moves right as
j grows, so each layer is filled by divide and conquer in O(n log n) interval errors.

The error of an interval is merged from two halves that meet at a fixed value, by the parallel
variance formula of Chan, Golub & LeVeque (1979). Tables of the halves for every power of two (a
disjoint sparse table) reduce that to one merge per interval. Every term is non-negative and every
mean is stored relative to the value where the halves meet, so nothing cancels: errors have a
relative accuracy of about 1e-14, however large the values are. Prefix sums lose this.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]


@numba.njit(cache=True, nogil=True)
def layered_partition(values: Floats, mass: Floats, bounds: Integers) -> None:
    """Write the bounds of the optimal intervals: cluster c is bounds[c] .. bounds[c + 1] - 1.

    Args:
        values: float64 [n], ascending and distinct.
        mass: float64 [n], positive.
        bounds: int32 [clusters + 1], written; there must be fewer clusters than values.
    """
    n, clusters = len(values), len(bounds) - 1
    halves, level_of = _half_tables(values, mass)
    split = np.zeros((clusters + 1, n + 1), np.int32)
    previous = np.empty(n + 1)
    current = np.empty(n + 1)
    for j in range(1, n + 1):
        previous[j] = _error(halves, level_of, 0, j)
    for q in range(2, clusters + 1):
        _fill_layer(q, n, halves, level_of, previous, current, split[q])
        previous, current = current, previous
    bounds[clusters] = n
    for q in range(clusters, 0, -1):
        bounds[q - 1] = split[q, bounds[q]]


@numba.njit(cache=True, nogil=True)
def _fill_layer(
    q: int,
    n: int,
    halves: Floats,
    level_of: Integers,
    previous: Floats,
    current: Floats,
    split: Integers,
) -> None:
    """Compute the best errors and splits of the first j = q .. n values in q intervals."""
    stack = np.empty((64, 4), np.int32)  # deeper than the binary logarithm of any row
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = q, n, q - 1, n - 1
    depth = 1
    while depth:
        depth -= 1
        low, high, first, last = stack[depth]
        j = (low + high) // 2
        least, at = np.inf, first
        for i in range(first, min(last, j - 1) + 1):
            total = previous[i] + _error(halves, level_of, i, j)
            if total < least:
                least, at = total, i
        current[j] = least
        split[j] = at
        if low < j:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = (
                low,
                j - 1,
                first,
                at,
            )
            depth += 1
        if j < high:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = (
                j + 1,
                high,
                at,
                last,
            )
            depth += 1


@numba.njit(cache=True, nogil=True)
def _half_tables(values: Floats, mass: Floats) -> tuple[Floats, Integers]:
    """Return `halves` and `level_of`.

    halves[level, :, i] is the mass, mean offset and error of the values between i and the middle of
    its block of 2^(level + 1). level_of[l ^ r] is the level at which l and r lie in different
    halves.
    """
    n = len(values)
    level_of = np.zeros(max(2, 2 * n), np.int32)
    for i in range(2, len(level_of)):
        level_of[i] = level_of[i // 2] + 1
    levels = level_of[max(1, n - 1)] + 1
    halves = np.zeros((levels, 3, n))
    for level in range(levels):
        half = 1 << level
        for middle in range(half, n, 2 * half):
            pivot = values[middle]
            _accumulate(values, mass, pivot, middle - 1, middle - half - 1, -1, halves[level])
            _accumulate(values, mass, pivot, middle, min(middle + half, n), 1, halves[level])
    return halves, level_of


@numba.njit(cache=True, nogil=True)
def _accumulate(
    values: Floats, mass: Floats, pivot: float, start: int, stop: int, step: int, half: Floats
) -> None:
    total = mean = error = 0.0
    for i in range(start, stop, step):
        away = values[i] - pivot - mean
        share = mass[i] / (total + mass[i])
        error += away * away * total * share
        mean += away * share
        total += mass[i]
        half[0, i], half[1, i], half[2, i] = total, mean, error


@numba.njit(cache=True, nogil=True, inline="always")
def _error(halves: Floats, level_of: Integers, i: int, j: int) -> float:
    """Return the weighted squared error of values i .. j - 1 around their mean."""
    last = j - 1
    if i == last:
        return 0.0
    half = halves[level_of[i ^ last]]
    apart = half[1, last] - half[1, i]
    left, right = half[0, i], half[0, last]
    return half[2, i] + half[2, last] + apart * apart * (left * (right / (left + right)))
