"""State exact weighted 1-D k-means as plainly as possible. The optimised one is `cpu/kmeans.py`.

Optimal clusters of sorted values are intervals, so the best split of the first j values into q
intervals follows from the best splits of fewer values into q - 1 (Fisher 1958; Wang & Song 2011):

    D[q, j] = min over i < j of  D[q - 1, i] + cost(i, j)

where cost(i, j) is the weighted squared error of values i..j-1 around their weighted mean. This
takes O(entries * n^2) time, so it is for tests only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def kmeans(
    weights: npt.ArrayLike, importance: npt.ArrayLike, groups: int, entries: int
) -> tuple[Floats, Floats]:
    """Compute the tables of each row that minimise the weighted squared error.

    Args:
        weights: [rows, columns].
        importance: [1 or rows, columns], non-negative. If it is zero in a whole group, that group
            counts as uniform.
        groups: Number of equal groups that each row is cut into; must divide the columns.
        entries: Entries per table.

    Returns:
        Ascending tables, float64 [rows, groups, entries], and the error of each table, float64
        [rows, groups]. If a group has fewer distinct values than entries, its last value is
        repeated.
    """
    values = np.asarray(weights, np.float64)
    rows, columns = values.shape
    values = values.reshape(rows, groups, columns // groups)
    importance = np.broadcast_to(np.asarray(importance, np.float64), (rows, columns))
    importance = importance.reshape(values.shape)
    tables = np.empty((rows, groups, entries))
    errors = np.empty((rows, groups))
    for row in range(rows):
        for group in range(groups):
            tables[row, group], errors[row, group] = _kmeans_1d(
                values[row, group], importance[row, group], entries
            )
    return tables, errors


def assign(weights: npt.ArrayLike, tables: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Return the code of the nearest entry for every weight.

    Args:
        weights: [rows, columns].
        tables: [rows, groups, entries], ascending.

    Returns:
        Codes, uint8 [rows, columns]. A weight halfway between two entries takes the lower code.
    """
    values = np.asarray(weights, np.float64)
    table = np.asarray(tables, np.float64)
    rows, columns = values.shape
    grouped = values.reshape(rows, table.shape[1], -1, 1)
    middles = (table[:, :, None, :-1] + table[:, :, None, 1:]) / 2
    return (grouped > middles).sum(axis=-1).astype(np.uint8).reshape(rows, columns)


def _kmeans_1d(values: Floats, importance: Floats, entries: int) -> tuple[Floats, float]:
    if not importance.any():
        importance = np.ones_like(values)
    order = np.argsort(values[importance > 0], kind="stable")
    values, importance = values[importance > 0][order], importance[importance > 0][order]
    n = len(values)
    cost = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(i + 1, n + 1):
            cost[i, j] = _error(values[i:j], importance[i:j])
    best = np.full((entries + 1, n + 1), np.inf)
    split = np.zeros((entries + 1, n + 1), int)
    best[:, 0] = 0
    for q in range(1, entries + 1):
        for j in range(1, n + 1):
            totals = best[q - 1, :j] + cost[:j, j]
            split[q, j] = totals.argmin()
            best[q, j] = totals[split[q, j]]
    means: list[float] = []
    j = n
    for q in range(entries, 0, -1):
        if j == 0:
            break
        i = split[q, j]
        means.insert(0, values[i] + np.average(values[i:j] - values[i], weights=importance[i:j]))
        j = i
    means += [means[-1]] * (entries - len(means))
    return np.array(means), float(best[entries, n])


def _error(values: Floats, importance: Floats) -> float:
    offsets = values - values[0]  # differences are exact where the values themselves are close
    mean = np.average(offsets, weights=importance)
    return float((importance * (offsets - mean) ** 2).sum())
