"""Partition sorted values optimally by charging a penalty per cluster.

Minimising error + penalty * clusters puts no limit on the number of clusters, so one pass over the
values solves it. The pass keeps a queue of the interval starts that may still win; their order
never changes, because the error of an interval is a concave Monge cost. If the solution has exactly
the requested number of clusters, it is optimal among all partitions with that number. It remains to
find a penalty that gives that number (Aggarwal, Schieber & Tokuyama, "Finding a minimum-weight
k-link path in graphs with the concave Monge property", 1994). That takes about 3 passes, because
the number falls with the cube root of the penalty. If clusters tie, there may be no such penalty.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

_MAX_PENALTIES = 40


@numba.njit(cache=True, nogil=True)
def prefix_sums(values: Floats, mass: Floats, sums: Floats) -> float:
    """Write the prefix sums of mass and mass * value, with values centred.

    Args:
        values: float64 [n], ascending.
        mass: float64 [n], positive.
        sums: float64 [2, n + 1] or longer, written.

    Returns:
        The second moment, the sum of mass * (value - mean)^2.
    """
    n = len(values)
    total = mass.sum()
    centre = values[0] + (mass * (values - values[0])).sum() / total
    sums[0, 0] = sums[1, 0] = 0.0
    moment = 0.0
    for i in range(n):
        offset = values[i] - centre
        sums[0, i + 1] = sums[0, i] + mass[i]
        sums[1, i + 1] = sums[1, i] + mass[i] * offset
        moment += mass[i] * offset * offset
    return moment


@numba.njit(cache=True, nogil=True, inline="always")
def _gain(sums: Floats, i: int, j: int) -> float:
    """Return how much one cluster of i..j-1 lowers the second moment: (sum m x)^2 / sum m."""
    mass = sums[0, j] - sums[0, i]
    linear = sums[1, j] - sums[1, i]
    # A mass below the resolution of the sums can be computed as 0; its gain is below it too.
    return linear * linear / mass if mass > 0.0 else 0.0


@numba.njit(cache=True, nogil=True)
def penalised_partition(
    n: int, moment: float, sums: Floats, best: Floats, links: Integers, bounds: Integers
) -> bool:
    """Search for a penalty whose optimal partition has the requested number of clusters.

    Args:
        n: Number of values.
        moment: Second moment, from `prefix_sums`.
        sums: Prefix sums, from `prefix_sums`.
        best: Scratch, float64 [n + 1] or longer.
        links: Scratch, int32 [4, n + 1] or longer.
        bounds: int32 [clusters + 1], written: cluster c is values bounds[c] .. bounds[c + 1] - 1.

    Returns:
        Whether such a penalty was found.
    """
    entries = len(bounds) - 1
    # Panter & Dite (1951): a Gaussian's error at k levels is about 2.72 variance / k^2, and the
    # penalty that asks for k levels is its slope.
    penalty = 5.44 * moment / entries**3
    low, high = 0.0, np.inf
    for _ in range(_MAX_PENALTIES):
        clusters = _penalised(n, penalty, sums, best, links)
        if clusters == entries:
            bound = n
            for c in range(entries, -1, -1):
                bounds[c] = bound
                bound = links[0, bound]
            return True
        if clusters > entries:
            low = penalty
        else:
            high = penalty
        penalty *= (clusters / entries) ** 3
        if not low < penalty < high:
            penalty = np.sqrt(low * high) if low > 0.0 and high < np.inf else penalty
        if not low < penalty < high:
            return False
    return False


@numba.njit(cache=True, nogil=True)
def _penalised(n: int, penalty: float, sums: Floats, best: Floats, links: Integers) -> int:
    """Partition n values at a price per cluster; return the number of clusters.

    best[j] is the largest gain of the first j values, net of penalties. links[0, j] is where the
    last cluster of their partition begins, and links[1, j] the number of its clusters. links[2] and
    links[3] are a queue: candidate starts, and the first j for which each start is best.
    """
    parent, count, start, since = links[0], links[1], links[2], links[3]
    best[0], count[0], parent[0] = 0.0, 0, 0
    start[0], since[0] = 0, 1
    head, tail = 0, 1
    for j in range(1, n + 1):
        while head + 1 < tail and since[head + 1] <= j:
            head += 1
        i = start[head]
        best[j] = best[i] + _gain(sums, i, j) - penalty
        parent[j] = i
        count[j] = count[i] + 1
        if j == n:
            break
        while True:
            if head == tail:
                start[tail], since[tail] = j, j + 1
                tail += 1
                break
            rival = start[tail - 1]
            behind = best[rival] - best[j]
            at = max(since[tail - 1], j + 1)
            if _gain(sums, j, at) >= behind + _gain(sums, rival, at):
                tail -= 1
                continue
            # j overtakes its rival soon or never: look 1, 2, 4, ... steps ahead, then bisect.
            step, ahead = 1, at + 1
            while ahead <= n and _gain(sums, j, ahead) < behind + _gain(sums, rival, ahead):
                at = ahead
                step *= 2
                ahead = at + step
            if ahead > n:
                ahead = n
                if at == n or _gain(sums, j, n) < behind + _gain(sums, rival, n):
                    break
            while ahead - at > 1:
                middle = (at + ahead) // 2
                if _gain(sums, j, middle) < behind + _gain(sums, rival, middle):
                    at = middle
                else:
                    ahead = middle
            start[tail], since[tail] = j, ahead
            tail += 1
            break
    return count[n]
