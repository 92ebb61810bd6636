"""Make small Hessians and weights like those of layers."""

from __future__ import annotations

import numpy as np


def correlated_hessian(n, seed, *, dead=(), rank=None):
    """Return X^T X of correlated inputs of very different size per column; `dead` ones are zero."""
    rng = np.random.default_rng(seed)
    rank = rank or 2 * n
    inputs = rng.standard_normal((rank, n)) + 2 * rng.standard_normal((rank, 1))
    inputs *= rng.lognormal(size=n)
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs


def weight_rows(rows, n, seed, kind="normal"):
    """Return float32 [rows, n]: Gaussian, or with constant rows, or with few distinct values."""
    weights = np.random.default_rng([seed, 1]).standard_normal((rows, n)).astype(np.float32)
    if kind == "constant":
        weights[::2] = np.float32(0.25)
    elif kind == "few values":
        weights = np.round(weights).clip(-1, 1)
    return weights


def sorted_tables(weights, groups, entries, seed):
    """Return float32 [rows, groups, entries]: weights of each group, ascending."""
    rng = np.random.default_rng([seed, 2])
    grouped = weights.reshape(len(weights), groups, -1)
    places = rng.integers(0, grouped.shape[2], (len(weights), groups, entries))
    return np.sort(np.take_along_axis(grouped, places, axis=2), axis=2)
