"""Find the nearest entry of an ascending table, one value at a time, in numba."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]


@numba.njit(cache=True, nogil=True)
def fill_middles(table: Singles, middles: Singles) -> None:
    """Write the middles between neighbours: [groups, entries] to [groups, entries - 1]."""
    for group in range(table.shape[0]):
        for entry in range(table.shape[1] - 1):
            low, high = np.float64(table[group, entry]), np.float64(table[group, entry + 1])
            middles[group, entry] = np.float32((low + high) * 0.5)


@numba.njit(cache=True, nogil=True, inline="always")
def nearest(value: np.float32, middles: Singles) -> np.int32:
    """Return the code of the nearest entry, as `assign` does; of two as near, the lower code."""
    code = np.int32(0)
    for entry in range(len(middles)):
        code += np.int32(value > middles[entry])
    return code
